"""The head with an energy over the reward: its mode, its width, and the ascent to the mode."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from trueward.models.energy import (
    EnergyHead,
    EnergyNetwork,
    ascend,
    density_std,
    quadrature_log_weights,
)
from trueward.models.head_kinds import make_head

HIDDEN = 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Gaussian(nn.Module):
    """`f(e, r) = -(r - a)^2 / (2 s^2)` with `a` the first part of the state."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, states: Tensor, rewards: Tensor) -> Tensor:
        return -((rewards - states[:, :1]) / self.std).square() / 2


class TwoPeaks(nn.Module):
    """A low peak at -1, and a higher one at +3, whatever the state."""

    def forward(self, states: Tensor, rewards: Tensor) -> Tensor:
        low, high = -(rewards + 1).square() / 0.18, 1 - (rewards - 3).square() / 0.18
        return torch.logaddexp(low, high)


def measured_head(**options: object) -> EnergyHead:
    """A head with a wild network, on a base with a mean and a scale of its own."""
    torch.manual_seed(0)
    sizes = {"reward_widths": (4, 8), "widths": (16, 8)}
    head = EnergyHead(HIDDEN, **(sizes | options))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in head.network.parameters():
            parameter *= 3
    states = 2 * normal(200, HIDDEN) + 0.7
    return head.set_base(normal(HIDDEN, seed=1), states)


def gaussian_head(std: float, **options: object) -> EnergyHead:
    """A Gaussian energy with its peak at the state's first part, as the head standardises it."""
    head = measured_head(**options)
    head.network = Gaussian(std)
    return head


def peaks_of(head: EnergyHead, hidden: Tensor) -> Tensor:
    """Where `gaussian_head` has its peak, on the base's scale."""
    first = (hidden[..., 0] - head.state_mean[0]) / head.state_std[0]
    return head.base_mean + first * head.base_std / head.reward_scale


# ---- mode and width ----------------------------------------------------------------------------


@pytest.mark.parametrize("reward_scale", [1.0, 4.0])
@pytest.mark.parametrize("trusted", [0.0, 2.0])
def test_a_gaussian_energy_has_its_peak_for_a_mode_and_its_std_for_a_width(
    reward_scale: float, trusted: float
) -> None:
    head = gaussian_head(0.6, reward_scale=reward_scale, trusted=trusted)
    hidden = 2 * normal(40, HIDDEN, seed=3) + 0.7
    means, stds = head(hidden)
    assert (means.shape, stds.shape) == ((40, 1), (40, 1))
    torch.testing.assert_close(means[:, 0], peaks_of(head, hidden), atol=1e-4, rtol=1e-4)
    width = 0.6 * head.base_std / reward_scale
    torch.testing.assert_close(stds[:, 0], width.expand(40), rtol=1e-5, atol=0)


def test_the_width_is_that_of_the_density_and_not_of_its_peak() -> None:
    # Masses 1 : e of two Gaussians of std .3 at -1 and 3: a Bernoulli of span 4, plus .09.
    head = measured_head()
    head.network = TwoPeaks()
    share = 1 / (1 + math.e)
    wanted = math.sqrt(16 * share * (1 - share) + 0.09) * head.base_std.item()
    assert head(normal(1, HIDDEN)).stds.item() == pytest.approx(wanted, rel=1e-4)


def test_an_energy_that_says_nothing_is_as_wide_as_the_range() -> None:
    grid = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    found = density_std(torch.zeros(2, 2001, dtype=torch.float64), grid)
    torch.testing.assert_close(
        found, torch.full((2,), 12 / math.sqrt(12)).double(), rtol=1e-5, atol=0
    )
    # The trapezoidal rule with three points: masses 1/4, 1/2, 1/4 at -6, 0, 6.
    coarse = density_std(torch.zeros(1, 3), torch.tensor([-6.0, 0.0, 6.0]))
    assert coarse.item() == pytest.approx(math.sqrt(18))
    assert quadrature_log_weights(grid).exp().sum().item() == pytest.approx(12.0)


def test_the_ascent_starts_from_a_trusted_base_reward_and_else_from_the_best_point() -> None:
    head = measured_head(trusted=2.0)
    head.network = TwoPeaks()
    # States along the base's weight, whose base reward is then known, in stds from its mean.
    wanted = torch.tensor([-1.1, 1.8, -2.3, -30.0, 2.3])
    direction = head.weight / head.weight.square().sum()
    hidden = (head.base_mean + wanted * head.base_std)[:, None] * direction
    modes = (head(hidden).means[:, 0] - head.base_mean) / head.base_std
    torch.testing.assert_close(modes, torch.tensor([-1.0, 3.0, 3.0, 3.0, 3.0]), atol=1e-4, rtol=0)


def test_the_mode_has_no_lower_energy_than_the_base_reward() -> None:
    head = measured_head(trusted=8.0)
    hidden = 2 * normal(100, HIDDEN, seed=4) + 0.7
    base = head.base_rewards(hidden)
    assert torch.allclose(base, hidden @ head.weight)
    means = head(hidden).means[:, 0]
    unit = head.base_std / head.reward_scale
    states, _ = head.inputs(hidden)
    before, after = (
        head.network.eval()(states, ((some - head.base_mean) / unit)[:, None])[:, 0]
        for some in (base, means)
    )
    assert bool((after >= before - 1e-5).all())
    assert (after > before + 0.1).float().mean() > 0.2


def test_the_mode_stays_in_the_range_of_the_density() -> None:
    head = gaussian_head(5.0, limit=1.5, trusted=1.5)
    hidden = torch.full((1, HIDDEN), 40.0)
    assert head(hidden).means.item() == pytest.approx(
        (head.base_mean + 1.5 * head.base_std).item(), rel=1e-5
    )


def test_the_density_integrates_to_one_on_the_base_scale_and_is_nothing_outside() -> None:
    head = measured_head(limit=5.0)
    low, high = ((head.base_mean + sign * 5 * head.base_std).item() for sign in (-1, 1))
    rewards = torch.linspace(low + 1e-4, high - 1e-4, 4001)
    logs = head.log_density(normal(2, 3, HIDDEN), rewards)
    assert logs.shape == (2, 3, 4001)
    total = logs.double().exp().sum(-1) * (high - low) / 4000
    torch.testing.assert_close(total, torch.ones(2, 3).double(), atol=5e-3, rtol=0)
    outside = head.log_density(normal(1, HIDDEN), torch.tensor([low - 0.1, high + 0.1]))
    assert outside.tolist() == [[-math.inf, -math.inf]]


def test_the_density_of_a_gaussian_energy_is_the_gaussian() -> None:
    head = gaussian_head(0.6, reward_scale=4.0)
    hidden = normal(3, HIDDEN)
    rewards = head.base_mean + torch.linspace(-1, 1, 9) * head.base_std
    std = (0.6 * head.base_std / 4).item()
    wanted = torch.distributions.Normal(peaks_of(head, hidden)[:, None], std).log_prob(rewards)
    found = head.log_density(hidden, rewards)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


# ---- the ascent --------------------------------------------------------------------------------


def test_steps_by_hand() -> None:
    def energy(r: Tensor) -> Tensor:  # slope -10 at 1: to -4, which is lower; then .05 of it
        return -5 * r.square()

    ends = [ascend(energy, torch.tensor([1.0]), steps=n).item() for n in range(4)]
    assert ends == pytest.approx([1.0, 1.0, 0.5, 0.25])
    halved = ascend(energy, torch.tensor([1.0]), steps=5, step_size=0.4, shrink=0.5)
    assert halved.item() == pytest.approx(0.0, abs=1e-6)  # .4, .2 and then .1: 1 - .1 * 10


def test_an_arrived_row_is_left_alone_and_ends_the_search() -> None:
    calls = 0

    def flat(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 0 * r

    assert ascend(flat, torch.tensor([0.3, 9.0]), limit=4.0).tolist() == pytest.approx([0.3, 4.0])
    assert calls == 1 + 6  # steps .5 to 5e-6 are refused; 5e-7 is below 1e-6


def test_the_energy_never_falls_on_the_way() -> None:
    head = measured_head()
    states = normal(300, HIDDEN, seed=5).double()
    network = head.network.double().eval()

    def energy(r: Tensor) -> Tensor:
        return network(states, r[:, None])[:, 0]

    start = 4 * normal(300, seed=6).double()
    heights = torch.stack([energy(ascend(energy, start, steps=n)) for n in (0, 1, 2, 4, 8, 16, 50)])
    assert bool((heights.diff(dim=0) >= 0).all())
    assert (heights[-1] > heights[0] + 1e-2).float().mean() > 0.25


def test_a_rows_end_does_not_depend_on_the_others() -> None:
    centres, start = 3 * normal(8), 3 * normal(8, seed=1)
    together = ascend(lambda r: -(r - centres).square(), start)
    for i in range(8):
        alone = ascend(lambda r, i=i: -(r - centres[i]).square(), start[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])


# ---- a score -----------------------------------------------------------------------------------


def test_a_score_does_not_depend_on_its_batch_or_order(monkeypatch: pytest.MonkeyPatch) -> None:
    head = measured_head()
    hidden = 4 * normal(60, HIDDEN, seed=7)  # many outside the trusted range
    untrusted = (head.base_rewards(hidden) - head.base_mean).abs() > 2 * head.base_std
    assert 10 < untrusted.sum() < 50
    whole = head(hidden)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = head(hidden[order])
    alone = [head(row) for row in hidden[::6]]
    monkeypatch.setattr("trueward.models.energy._ENERGIES_AT_ONCE", 17 * 129)
    parts = head(hidden)
    for k in range(2):
        torch.testing.assert_close(shuffled[k], whole[k][order], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(parts[k], whole[k], rtol=1e-6, atol=1e-6)
        rows = torch.stack([posterior[k] for posterior in alone])
        torch.testing.assert_close(rows, whole[k][::6], rtol=1e-6, atol=1e-6)


def test_a_score_moves_little_when_the_state_is_rounded_otherwise() -> None:
    head = measured_head()
    hidden = 4 * normal(60, HIDDEN, seed=7)
    one, other = head(hidden), head(hidden * (1 + 1e-7))
    torch.testing.assert_close(one.means, other.means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.stds, other.stds, rtol=1e-4, atol=1e-4)


def test_nothing_is_drawn_in_training_mode_either() -> None:
    head = measured_head(dropout=0.5)
    hidden, state = normal(5, HIDDEN), torch.random.get_rng_state()
    posteriors = [head.train()(hidden), head(hidden), head.eval()(hidden)]
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in posteriors[1:]:
        assert torch.equal(other.means, posteriors[0].means)
        assert torch.equal(other.stds, posteriors[0].stds)
    assert head.train().network.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_ascent_works_whether_or_not_gradients_are_kept(context: type) -> None:
    head, hidden = measured_head(), normal(2, 3, HIDDEN)
    wanted = head(hidden)
    with context():
        found = head(hidden.clone().requires_grad_(context is torch.enable_grad))
        assert head.log_density(hidden.clone(), torch.zeros(1)).shape == (2, 3, 1)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == (2, 3, 1)
        assert not a.requires_grad
        assert torch.equal(a, b)
    assert all(p.grad is None and p.requires_grad for p in head.network.parameters())


def test_bf16_states_and_autocast_change_nothing() -> None:
    head, hidden = measured_head(), normal(4, HIDDEN).bfloat16()
    wanted = head(hidden.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_no_rows_have_no_posterior() -> None:
    means, stds = measured_head()(torch.zeros(0, HIDDEN))
    assert means.shape == stds.shape == (0, 1)


# ---- the network -------------------------------------------------------------------------------


def test_the_layers_are_the_papers() -> None:
    network = EnergyNetwork(512)
    shapes = [tuple(p.shape) for p in network.parameters() if p.ndim == 2]
    assert shapes == [(16, 1), (32, 16), (64, 32), (1024, 576), (512, 1024), (1, 512)]
    assert all(
        layer.bias is not None for layer in network.modules() if isinstance(layer, nn.Linear)
    )
    assert network.dropout.p == 0.5


def test_the_network_is_that_of_the_concatenated_state_and_reward() -> None:
    torch.manual_seed(0)
    network = EnergyNetwork(HIDDEN, reward_widths=(3, 5), widths=(7, 4)).eval()
    states, rewards = normal(4, HIDDEN), normal(4, 9, seed=1)
    found = network(states, rewards)
    for i in range(4):
        for j in range(9):
            x = rewards[i, j : j + 1]
            for layer in network.reward_layers:
                x = torch.tanh(layer(x))
            x = torch.cat([states[i], x])
            for layer in network.layers:
                x = torch.tanh(layer(x))
            torch.testing.assert_close(found[i, j], network.last(x)[0])


def test_dropout_stands_between_the_rewards_layers_and_after_the_common_ones() -> None:
    network, seen = EnergyNetwork(HIDDEN), []
    network.dropout.register_forward_hook(lambda _, args, out: seen.append(out.shape[-1]))
    network(normal(2, HIDDEN), normal(2, 3))
    assert seen == [16, 32, 1024, 512]


# ---- the base's scale, and saving --------------------------------------------------------------


def test_states_and_rewards_are_standardised_over_the_examples() -> None:
    head = EnergyHead(HIDDEN, widths=(8,), reward_scale=4.0)
    states = 3 * normal(500, HIDDEN) + torch.arange(6.0)
    states[:, 5] = 7.0  # a part that never varies
    head.set_base(normal(HIDDEN, seed=1), states)
    inputs, rewards = head.inputs(states)
    torch.testing.assert_close(rewards.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(rewards.std(correction=0), torch.tensor(4.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(inputs.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    stds = inputs.std(0, correction=0)
    torch.testing.assert_close(stds[:5], torch.ones(5), rtol=1e-4, atol=0)
    assert stds[5] == 0
    moved = states.clone()
    moved[:, 5] += 0.03
    assert (head.inputs(moved)[0] - inputs).abs().max() < 20  # not infinite


def test_a_base_that_gives_one_reward_to_all_has_no_scale() -> None:
    with pytest.raises(ValueError, match="all 3 examples the same reward, 2"):
        EnergyHead(2, widths=(4,)).set_base(torch.tensor([2.0, 0.0]), torch.ones(3, 2))


def test_the_base_is_no_parameter() -> None:
    head = measured_head()
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"network"}
    assert {"weight", "base_mean", "base_std", "state_mean", "state_std"} < set(head.state_dict())


def test_a_head_is_built_again_from_its_description_and_its_weights() -> None:
    options = {
        "reward_widths": [5, 3],
        "widths": [9],
        "dropout": 0.2,
        "reward_scale": 3.0,
        "trusted": 1.0,
        "limit": 4.0,
        "grid_points": 65,
        "steps": 7,
        "step_size": 0.3,
        "shrink": 0.4,
    }
    head = measured_head(**options)
    assert head.describe() == {"kind": "energy", **options}
    again = make_head(json.loads(json.dumps(head.describe())), HIDDEN)
    again.load_state_dict(head.state_dict())
    hidden = normal(7, HIDDEN)
    for a, b in zip(again(hidden), head(hidden), strict=True):
        assert torch.equal(a, b)
    assert (again.members, again.has_stds) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trusted": 9.0}, "trusted must lie between 0 and limit, got trusted=9.0"),
        ({"trusted": -1.0}, "trusted must lie between"),
        ({"shrink": 1.0}, r"shrink must lie in \(0, 1\), got 1.0"),
        ({"shrink": 0.0}, "shrink must lie"),
        ({"reward_scale": 0.0}, "reward_scale must be above 0"),
        ({"limit": math.inf}, "limit must be above 0 and finite"),
        ({"step_size": 0.0}, "step_size > 0"),
        ({"steps": -1}, "steps=-1"),
        ({"grid_points": 2}, "grid_points=2"),
        ({"widths": ()}, "at least one layer each"),
        ({"reward_widths": ()}, "at least one layer each"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyHead(4, **options)
