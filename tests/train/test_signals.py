"""Each signal by hand, and what a monitor sees."""

import math

import pytest
import torch

from trueward.data.packing import Group
from trueward.evaluate.shift import energy_test, last_states
from trueward.models.backbone import layer_list, make_batch
from trueward.models.policy import Policy, energy_losses
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_language_model, tiny_texts, tiny_tokenizer
from trueward.train.signals import (
    Monitor,
    Seen,
    disagreement,
    drift,
    gain,
    gap,
    outlyingness,
    signals_of,
    spread,
    spread_share,
    width,
)

TOKENIZER = tiny_tokenizer()
TWO = RewardPosterior(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))  # means 2, 2; stds 1, 0
REFERENCE = RewardPosterior(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))  # mean 0, std 1, spread 0


def test_spread_is_the_mean_std_between_members() -> None:
    assert spread(TWO) == pytest.approx(0.5)


def test_gap_is_nominal_less_worst_case() -> None:
    assert gap(TWO) == pytest.approx(0.5)  # means 2 and 2, minima 1 and 2
    certain = RewardPosterior(TWO.means, torch.tensor([[0.5, 0.1], [0.1, 0.5]]))
    assert gap(certain) == pytest.approx(1.0)  # nominal 3 and 2


def test_gain_counts_in_stds_of_the_reference() -> None:
    assert gain(TWO, REFERENCE) == pytest.approx(2.0)
    assert gain(TWO, RewardPosterior(3 * REFERENCE.means)) == pytest.approx(2 / 3)


def test_spread_share_is_gained_spread_over_gained_reward() -> None:
    assert spread_share(TWO, REFERENCE) == pytest.approx(0.25)
    # A gain below half a std of the reference's rewards counts as half a std.
    assert spread_share(RewardPosterior(TWO.means - 2), REFERENCE) == pytest.approx(1.0)


def test_width_is_the_members_own_std() -> None:
    posterior = RewardPosterior(TWO.means, torch.tensor([[0.1, 0.3], [0.2, 0.6]]))
    assert width(posterior) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="stds of their own"):
        width(TWO)


def test_disagreement_counts_pairs_that_two_members_order_differently() -> None:
    # One prompt, three completions, two members: pairs (0, 1) and (0, 2) agree, (1, 2) does not.
    means = torch.tensor([[[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]]])
    assert disagreement(means) == pytest.approx(1 / 3)
    assert disagreement(torch.stack([means[0], means[0]])) == pytest.approx(1 / 3)
    assert disagreement(means[:, :, :1].repeat(1, 1, 4)) == 0.0
    assert disagreement(torch.stack([means[0, :, 0], -means[0, :, 0]], -1)[None]) == 1.0
    assert disagreement(means[:, :, :1]) == 0.0  # one member


def test_equal_texts_are_no_pair_and_one_member_s_tie_is_half_a_disagreement() -> None:
    equal = torch.tensor([[[1.0, 5.0], [1.0, 5.0], [2.0, 6.0]]])
    assert disagreement(equal) == 0.0
    assert disagreement(equal[:, :2]) == 0.0  # nothing to order at all
    assert disagreement(torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])) == 0.5


def test_three_members_disagree_by_pairs_of_members() -> None:
    # Two say up, one says down: of three pairs of members two disagree.
    means = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, -1.0]]])
    assert disagreement(means) == pytest.approx(2 / 3)


def test_drift_is_the_coefficient_of_the_energy_test() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=g) + 1, torch.randn(7, 3, generator=g)
    assert drift(x, y) == pytest.approx(energy_test(x, y, permutations=1).coefficient)
    assert drift(y, y) == pytest.approx(0.0, abs=1e-12)
    assert drift(x, y) == pytest.approx(drift(5 * x, 5 * y))
    # Points 0 and 4 against 2 and 2: E|X-Y| = 2, E|X-X'| = 2, E|Y-Y'| = 0.
    assert drift(torch.tensor([[0.0], [4.0]]), torch.tensor([[2.0], [2.0]])) == pytest.approx(0.5)


def test_outlyingness_is_mahalanobis_by_hand() -> None:
    # Variances 4 and 1 without covariance, shrunk by a tenth towards 2.5: 3.85 and 1.15.
    reference = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]])
    found = outlyingness(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), reference)
    assert found == pytest.approx((9 / 3.85 + 4 / 1.15) / 2 / 2)
    assert outlyingness(reference + 7, reference + 7) == pytest.approx((4 / 3.85 + 1 / 1.15) / 2)


@torch.no_grad()
def test_energy_loss_is_what_the_last_layer_takes_from_the_l1_norm() -> None:
    policy = Policy(tiny_language_model(vocab_size=len(TOKENIZER)), TOKENIZER)
    prompt, first, second = [5, 6, 7], [8, 9, 10, 2], [11, 2]
    batch = make_batch(policy.backbone, [Group(prompt, [first, second])], pad_id=0)
    before = len(policy.backbone.layers[-1]._forward_hooks)
    last_layer = layer_list(policy.backbone)[-1]
    found = energy_losses(policy, batch, last_layer=last_layer)
    assert len(policy.backbone.layers[-1]._forward_hooks) == before  # none is left behind
    for completion, value in zip((first, second), found, strict=True):
        ids = torch.tensor([prompt + completion])
        states = policy.backbone(input_ids=ids, output_hidden_states=True).hidden_states
        layer = policy.backbone.layers[-1]
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
        policy.backbone(input_ids=ids)
        handle.remove()
        out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        lost = states[-2][0].abs().sum(-1) - out.reshape(states[-2].shape)[0].abs().sum(-1)
        assert float(value) == pytest.approx(float(lost[3:].mean()), rel=1e-4)


def test_all_signals_of_a_step_and_those_that_one_member_has() -> None:
    states = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    means = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
    seen = Seen(RewardPosterior(means, torch.ones(4, 2)), states)
    before = Seen(REFERENCE, states[:2])
    found = signals_of(seen, before, samples=2)
    assert list(found) == [
        "gain",
        "spread",
        "gap",
        "spread_share",
        "disagreement",
        "width",
        "drift",
        "outlyingness",
    ]
    assert found["spread"] == spread(seen.posterior)
    assert found["drift"] == drift(states, states[:2])
    assert found["disagreement"] == 1.0
    alone = Seen(RewardPosterior(means[:, :1]), None)
    assert list(signals_of(alone, Seen(REFERENCE, None), samples=2)) == ["gain"]
    assert "disagreement" not in signals_of(seen, before, samples=1)


def test_completions_without_a_finite_reward_are_left_out() -> None:
    means = torch.tensor([[1.0, 3.0], [2.0, 2.0], [math.nan, 1.0], [1.0, 0.0]])
    seen = Seen(RewardPosterior(means), None)
    found = signals_of(seen, Seen(REFERENCE, None), samples=2)
    finite = RewardPosterior(means[[0, 1, 3]])
    assert found["spread"] == pytest.approx(spread(finite))
    assert found["gain"] == pytest.approx(gain(finite, REFERENCE))
    assert found["disagreement"] == disagreement(means[None, :2])
    none = signals_of(Seen(RewardPosterior(means[2:3]), None), Seen(REFERENCE, None), samples=1)
    assert list(none) == [name for name in found if name != "disagreement"]
    assert all(math.isnan(value) for value in none.values())


def test_a_monitor_reads_states_of_its_first_model_and_spares_a_known_posterior() -> None:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    model = RewardModel.from_backbone(backbone, TOKENIZER, members=2)
    prompts, answers = tiny_texts(3), tiny_texts(3, seed=5)
    seen = Monitor(model).see(prompts, answers)
    assert torch.equal(seen.posterior.means, model.score(prompts, answers, normalise=True).means)
    assert seen.states is not None
    assert torch.equal(seen.states, last_states(model, prompts, answers))
    known = RewardPosterior(torch.zeros(3, 1))
    assert Monitor([model, model]).see(prompts, answers, posterior=known).posterior is known
    assert Monitor([model, model]).see(prompts, answers).posterior.members == 4
    function = Monitor(lambda prompts, completions: [1.0] * len(completions))
    assert function.see(prompts, answers).states is None
