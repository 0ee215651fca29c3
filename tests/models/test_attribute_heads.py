"""URM's head: which output is what, how gates make one reward, and that it comes back from disk."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trueward.models.attribute_heads import (
    HELPSTEER2,
    AttributeHeads,
    gating_network,
    weighted_mean,
    weighted_std,
)
from trueward.models.head_kinds import make_head
from trueward.models.reward_function import posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_texts

TEXTS = tiny_texts(6), tiny_texts(6, seed=4)


def with_random_gates(head: AttributeHeads, seed: int = 0) -> AttributeHeads:
    """Give the last layer weights, so that gates differ from state to state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.gating[4].weight.normal_(generator=generator)
    return head


def urm(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options) -> RewardModel:
    torch.manual_seed(seed)
    head = with_random_gates(AttributeHeads(32, HELPSTEER2, **options), seed)
    backbone = tiny_backbone(vocab_size=len(tokenizer), seed=0)
    return RewardModel(backbone, head, tokenizer).eval()


def test_means_and_log_stds_come_in_turn() -> None:
    head = AttributeHeads(2, ["short", "true"])
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.5]]))
        head.linear.bias.copy_(torch.tensor([0.0, 0.0, 10.0, math.log(2)]))
    means, stds = head.attributes(torch.tensor([[3.0, 2.0]]))
    assert means.tolist() == [[3.0, 16.0]]
    torch.testing.assert_close(stds, torch.tensor([[math.e**2, 2 * math.e]]))


def test_the_rewards_mean_and_std_by_hand() -> None:
    head = AttributeHeads(1, ["short", "true"])
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([4.0, math.log(3), -2.0, math.log(0.8)]))
        head.gating[4].bias.copy_(torch.tensor([0.4, -2.0]))
    means, stds = head(torch.tensor([[1.0]]))
    assert means.item() == pytest.approx(0.4 * 4 + -2 * -2)
    # .4 * 3 = 1.2 and 2 * .8 = 1.6: their root sum of squares is 2; a weight's sign is no matter
    assert stds.item() == pytest.approx(2.0)


def test_the_moments_are_those_of_a_weighted_sum_of_draws() -> None:
    gates, means = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, -0.3])
    stds = torch.tensor([2.0, 0.4, 0.1])
    z = torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0))
    draws = (gates * (means + stds * z)).sum(1)
    assert weighted_mean(gates, means).item() == pytest.approx(draws.mean().item(), abs=0.01)
    assert weighted_std(gates, stds).item() == pytest.approx(draws.std().item(), rel=0.01)


def test_outputs_are_those_of_an_explicit_loop() -> None:
    torch.manual_seed(0)
    head = with_random_gates(AttributeHeads(6, HELPSTEER2, gate_width=4))
    hidden = torch.randn(3, 6)
    gates = head.gates(hidden)
    out = head.linear(hidden)
    means, stds = head(hidden)
    assert gates.std(0).min() > 0.01  # they differ from state to state
    for i in range(3):
        mean = variance = 0.0
        for k in range(5):
            mean += gates[i, k].item() * out[i, 2 * k].item()
            variance += (gates[i, k].item() * math.exp(out[i, 2 * k + 1].item())) ** 2
        assert means[i, 0].item() == pytest.approx(mean, rel=1e-5)
        assert stds[i, 0].item() == pytest.approx(math.sqrt(variance), rel=1e-5)


def test_gates_are_two_selu_layers_and_a_linear_one() -> None:
    head = AttributeHeads(1, ["one"], gate_width=1)
    values = {"0.weight": 2.0, "0.bias": -1.0, "2.weight": -1.0, "2.bias": 0.5}
    values |= {"4.weight": 3.0, "4.bias": 0.25}
    state = {k: torch.full(v.shape, values[k]) for k, v in head.gating.state_dict().items()}
    head.gating.load_state_dict(state)
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    first = scale * (2 * 1.5 - 1)  # above 0
    second = scale * alpha * (math.exp(-first + 0.5) - 1)  # below
    assert head.gates(torch.tensor([[1.5]])).item() == pytest.approx(3 * second + 0.25, rel=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
def test_fresh_gates_are_equal_for_every_state(softmax: bool) -> None:
    gates = AttributeHeads(8, HELPSTEER2, softmax=softmax).gates(torch.randn(10, 8))
    torch.testing.assert_close(gates, torch.full((10, 5), 0.2))


def test_softmax_gates_are_shares_and_free_ones_are_not() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(10, 8)
    shares, free = (
        with_random_gates(AttributeHeads(8, HELPSTEER2, softmax=s)).gates(hidden)
        for s in (True, False)
    )
    torch.testing.assert_close(shares.sum(1), torch.ones(10))
    assert shares.min() > 0 > free.min()


def test_a_gating_networks_states_keep_their_variance() -> None:
    torch.manual_seed(0)
    network = gating_network(256, 256, 1, fresh=0.0)
    assert network[:4](torch.randn(500, 256)).std().item() == pytest.approx(1.0, abs=0.1)


def test_log_stds_stay_in_their_range() -> None:
    for limits in ((-5.0, 2.0), (-20.0, 20.0)):
        head = AttributeHeads(1, ["one"], log_std_range=limits)
        head.linear.weight.data[:] = torch.tensor([[0.0], [1.0]])
        stds = head.attributes(torch.tensor([[-1e4], [1e4]]))[1]
        torch.testing.assert_close(stds[:, 0], torch.tensor(limits).exp())
    assert AttributeHeads(1, ["one"]).log_std_range == (-5.0, 2.0)


def test_stds_start_near_one_and_means_with_unit_variance() -> None:
    torch.manual_seed(0)
    means, stds = AttributeHeads(256, HELPSTEER2).attributes(torch.randn(2000, 256))
    assert means.std().item() == pytest.approx(1.0, abs=0.1)
    assert 0.6 < stds.min() < 1 < stds.max() < 1.7


def test_the_head_computes_in_float32_under_bf16_states_and_autocast() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 16).bfloat16()
    head = with_random_gates(AttributeHeads(16, HELPSTEER2))
    expected = head(hidden.float())
    with torch.autocast("cpu", torch.bfloat16):
        means, stds = head(hidden)
    assert torch.equal(means, expected.means)
    assert torch.equal(stds, expected.stds)


def test_the_head_takes_any_leading_axes() -> None:
    head = AttributeHeads(8, HELPSTEER2)
    assert head(torch.zeros(2, 7, 8)).stds.shape == (2, 7, 1)
    assert head.attributes(torch.zeros(2, 7, 8))[0].shape == (2, 7, 5)
    assert (head.members, head.has_stds) == (1, True)


def test_a_zero_gate_has_a_finite_gradient() -> None:
    gates = torch.zeros(1, 2, requires_grad=True)
    weighted_std(gates, torch.ones(1, 2)).sum().backward()
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": []}, "one attribute or more"),
        ({"attributes": ["a", "a"]}, "each with its own name"),
        ({"attributes": ["a"], "gate_width": -1}, "gate_width must be at least 0"),
        ({"attributes": ["a"], "log_std_range": (2.0, -5.0)}, "log_std_range must be"),
    ],
)
def test_heads_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeHeads(4, **options)


# ---- models ------------------------------------------------------------------------------------


def test_a_head_is_built_again_from_its_description() -> None:
    head = AttributeHeads(8, ["a", "b"], softmax=True, gate_width=3, log_std_range=(-9.0, 1.0))
    again = make_head(json.loads(json.dumps(head.describe())), 8)
    assert again.describe() == head.describe()
    again.load_state_dict(with_random_gates(head).state_dict())
    hidden = 9 * torch.randn(5, 8)
    for one, other in zip(head(hidden), again(hidden), strict=True):
        assert torch.equal(one, other)


READ = """
import json, sys, torch
from trueward.models.reward_model import RewardModel
torch.set_num_threads(1)
model = RewardModel.from_pretrained(sys.argv[1])
posterior = model.score(*json.loads(sys.argv[2]))
print(json.dumps([posterior.means.tolist(), posterior.stds.tolist(), model.head.describe()]))
"""


def test_a_saved_model_gives_the_same_posterior_in_another_process(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = urm(tokenizer, softmax=True, gate_width=7)
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    means, stds, description = json.loads(done.stdout.strip().splitlines()[-1])
    posterior = model.score(*TEXTS)
    assert posterior.means.std() > 0.01
    torch.testing.assert_close(posterior.means, torch.tensor(means), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(posterior.stds, torch.tensor(stds), atol=1e-6, rtol=1e-6)
    assert description["attributes"] == list(HELPSTEER2)


def test_several_urms_are_an_ensemble_with_both_uncertainties(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    models = [urm(tokenizer, seed) for seed in range(3)]
    apart = [model.score(*TEXTS) for model in models]
    ensemble = RewardPosterior.stack_members(apart)
    means: Tensor = torch.cat([p.means for p in apart], 1)
    stds = torch.cat([p.stds for p in apart], 1)
    assert ensemble.members == 3
    torch.testing.assert_close(ensemble.variance, means.var(1, correction=0))
    expected = means.var(1, correction=0) + stds.square().mean(1)
    torch.testing.assert_close(ensemble.total_variance, expected)
    for model in models:
        model.set_normalisation(*TEXTS)
    scaled = posterior_function(models)(*TEXTS)
    torch.testing.assert_close(scaled.means.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.stds, stds / means.std(0, correction=0))
