from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trueward.losses import (
    bhattacharyya_coefficient,
    bt_marginal_loss,
    bt_reparam_loss,
    gaussian_nll_loss,
    mse_reparam_loss,
)

PairLoss = Callable[..., Tensor]

# The std-collapse table: rows margin D, columns std s of the margin.
TABLE_STDS = [0.0, 0.5, 1.0, 2.0]
MEAN_OF_LOG = {1.0: [0.3133, 0.3376, 0.4069, 0.6425], -1.0: [1.3133, 1.3376, 1.4069, 1.6425]}
LOG_OF_MEAN = {1.0: [0.3133, 0.3277, 0.3614, 0.4343], -1.0: [1.3133, 1.275, 1.1931, 1.0433]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(margin: float, stds: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One member per std of the margin: 3/5 of it in the chosen reward, 4/5 in the other."""
    std = torch.tensor([stds], dtype=torch.float64)
    offset = torch.full_like(std, 0.3)
    return offset + margin, 0.6 * std, offset, 0.8 * std


def column(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_marginal_loss_matches_the_collapse_table(margin: float) -> None:
    loss = bt_marginal_loss(*pair(margin, TABLE_STDS))
    torch.testing.assert_close(loss, column(LOG_OF_MEAN[margin]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_reparameterised_loss_matches_the_collapse_table(margin: float) -> None:
    loss = bt_reparam_loss(*pair(margin, TABLE_STDS), samples=400_000, generator=seeded())
    # Standard error at s = 2: at most 2 / sqrt(400000) = 0.0032.
    torch.testing.assert_close(loss, column(MEAN_OF_LOG[margin]), atol=0.006, rtol=0)
    torch.testing.assert_close(loss[:, :1], column(MEAN_OF_LOG[margin][:1]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("margin", [1.0, -1.0])
def test_marginal_loss_by_draws_agrees_with_the_integral(margin: float) -> None:
    drawn = bt_marginal_loss(*pair(margin, TABLE_STDS), samples=400_000, generator=seeded(1))
    torch.testing.assert_close(
        drawn, bt_marginal_loss(*pair(margin, TABLE_STDS)), atol=0.004, rtol=0
    )


@pytest.mark.parametrize("margin", [-6.0, -1.0, 0.0, 1.0, 6.0])
@pytest.mark.parametrize("std", [0.05, 0.5, 2.0, 5.0, 10.0])
def test_marginal_loss_is_the_integral_to_six_digits(margin: float, std: float) -> None:
    z = np.linspace(-14, 14, 200_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    expected = -np.log(np.trapezoid(density / (1 + np.exp(-(margin + std * z))), z))
    loss = bt_marginal_loss(*pair(margin, [std]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    single = bt_marginal_loss(*(part.float() for part in pair(margin, [std])))
    assert single.item() == pytest.approx(expected, abs=2e-5)


def slope_in_std(loss: PairLoss, margin: float, std: float) -> tuple[float, float]:
    """Gradient of the loss in the chosen and in the rejected std."""
    chosen_means, chosen_stds, rejected_means, rejected_stds = pair(margin, [std])
    chosen_stds.requires_grad_()
    rejected_stds.requires_grad_()
    loss(chosen_means, chosen_stds, rejected_means, rejected_stds).sum().backward()
    return chosen_stds.grad.item(), rejected_stds.grad.item()


@pytest.mark.parametrize("margin", [-2.0, -0.5, 0.5, 2.0])
@pytest.mark.parametrize("std", [0.3, 1.0, 3.0, 10.0])
def test_marginal_loss_wants_more_std_on_a_wrong_pair_and_less_on_a_right_one(
    margin: float, std: float
) -> None:
    for slope in slope_in_std(bt_marginal_loss, margin, std):
        assert slope * margin > 0


@pytest.mark.parametrize("margin", [-2.0, -0.5, 0.5, 2.0])
@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
def test_reparameterised_loss_wants_less_std_on_every_pair(margin: float, std: float) -> None:
    loss = partial(bt_reparam_loss, samples=40_000, generator=seeded())
    for slope in slope_in_std(loss, margin, std):
        assert slope > 0


def test_without_std_both_pair_losses_are_bradley_terry() -> None:
    margins = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None]
    zero = torch.zeros_like(margins)
    expected = -F.logsigmoid(margins)
    torch.testing.assert_close(bt_marginal_loss(margins, zero, zero, zero), expected)
    torch.testing.assert_close(bt_reparam_loss(margins, zero, zero, zero), expected)


def test_gradients_are_finite_without_std_and_at_extreme_margins() -> None:
    for std in (0.0, 1.0, 7.4):
        parts = [
            torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True),
            torch.full((1, 3), std, requires_grad=True),
            torch.zeros(1, 3, requires_grad=True),
            torch.full((1, 3), std, requires_grad=True),
        ]
        loss = bt_marginal_loss(*parts)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert all(part.grad.isfinite().all() for part in parts)
        slopes = parts[0].grad[0].tolist()
        assert slopes[:2] == pytest.approx([0.0, -1.0], abs=1e-3)
        assert -0.5 <= slopes[2] < -0.05


def test_pair_losses_leave_out_nothing_of_either_side() -> None:
    base = [torch.full((1, 1), value) for value in (0.4, 0.7, -0.2, 1.1)]
    losses = (bt_marginal_loss, lambda *parts: bt_reparam_loss(*parts, generator=seeded()))
    for loss in losses:
        for position in range(4):
            changed = [part + 0.1 * (position == k) for k, part in enumerate(base)]
            assert loss(*changed).item() != pytest.approx(loss(*base).item(), abs=1e-3)


def test_chosen_and_rejected_draw_their_own_noise() -> None:
    # Noise in common would cancel in the margin and leave the loss at log 2.
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    loss = bt_reparam_loss(zero, one, zero, one, samples=100_000, generator=seeded())
    spread = bt_reparam_loss(zero, 2**0.5 * one, zero, zero, samples=100_000, generator=seeded(1))
    assert loss.item() == pytest.approx(spread.item(), abs=0.01)
    assert loss.item() > 0.85


def test_one_draw_makes_the_two_pair_losses_one() -> None:
    parts = [part.repeat(3, 1) for part in pair(0.5, TABLE_STDS)]
    torch.testing.assert_close(
        bt_marginal_loss(*parts, samples=1, generator=seeded()),
        bt_reparam_loss(*parts, samples=1, generator=seeded()),
    )


def test_the_log_of_a_mean_of_few_draws_is_biased_upwards() -> None:
    parts = [part.repeat(20_000, 1) for part in pair(-1.0, [2.0])]
    few = bt_marginal_loss(*parts, samples=2, generator=seeded()).mean().item()
    exact = bt_marginal_loss(*pair(-1.0, [2.0])).item()
    single = bt_reparam_loss(*parts, generator=seeded()).mean().item()
    assert exact + 0.1 < few < single - 0.1


def test_members_and_examples_are_scored_apart() -> None:
    generator = seeded(2)
    parts = [torch.rand(5, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    loss = bt_marginal_loss(*parts)
    for row in range(5):
        for member in range(3):
            one = [part[row : row + 1, member : member + 1] for part in parts]
            torch.testing.assert_close(
                loss[row : row + 1, member : member + 1], bt_marginal_loss(*one)
            )
    torch.testing.assert_close(
        bt_reparam_loss(*parts, samples=50_000, generator=seeded()).exp(),
        torch.stack(
            [
                bt_reparam_loss(
                    *(part[:, k : k + 1] for part in parts), samples=50_000, generator=seeded(k)
                )[:, 0]
                for k in range(3)
            ],
            dim=1,
        ).exp(),
        atol=0.05,
        rtol=0,
    )


@pytest.mark.parametrize("loss", [bt_reparam_loss, bt_marginal_loss])
def test_draws_must_be_at_least_one(loss: PairLoss) -> None:
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        loss(*pair(1.0, [1.0]), samples=0)


def test_a_generator_without_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="generator has no use without draws"):
        bt_marginal_loss(*pair(1.0, [1.0]), generator=seeded())


def test_mse_reparam_expectation_is_squared_error_plus_variance() -> None:
    means = torch.tensor([[1.0, 2.0]]).expand(200_000, 2)
    stds = torch.tensor([[0.5, 1.5]]).expand(200_000, 2)
    loss = mse_reparam_loss(means, stds, torch.full((200_000,), 0.5), generator=seeded())
    expected = torch.tensor([0.25 + 0.25, 2.25 + 2.25])
    torch.testing.assert_close(loss.mean(0), expected, atol=0.06, rtol=0)


def test_members_draw_their_own_noise() -> None:
    zero, one = torch.zeros(20_000, 3), torch.ones(20_000, 3)
    squares = mse_reparam_loss(zero, one, torch.zeros(20_000), generator=seeded())
    pairwise = bt_reparam_loss(zero, one, zero, one, generator=seeded())
    for loss in (squares, pairwise):
        correlation = torch.corrcoef(loss.T) - torch.eye(3)
        assert correlation.abs().max() < 0.03


def test_mse_reparam_without_std_is_the_squared_error() -> None:
    means = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    loss = mse_reparam_loss(means, torch.zeros(2, 2), torch.tensor([0.5, 1.0]))
    torch.testing.assert_close(loss, torch.tensor([[0.25, 6.25], [1.0, 4.0]]))


def test_mse_reparam_drives_std_to_zero_whatever_the_error() -> None:
    for error in (0.0, 3.0):
        stds = torch.full((100_000, 1), 0.8, requires_grad=True)
        means = torch.full((100_000, 1), error)
        loss = mse_reparam_loss(means, stds, torch.zeros(100_000), generator=seeded())
        loss.mean().backward()
        assert stds.grad.sum().item() == pytest.approx(2 * 0.8, abs=0.06)


def test_gaussian_nll_matches_hand_calculation_and_torch() -> None:
    means = torch.tensor([[1.0, 3.0], [0.0, -1.0]], dtype=torch.float64)
    stds = torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    targets = torch.tensor([2.0, -1.0], dtype=torch.float64)
    loss = gaussian_nll_loss(means, stds, targets)
    expected = [[0.5, np.log(2) + 1 / 8], [np.log(0.5) + 2, np.log(3)]]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    reference = F.gaussian_nll_loss(
        means, targets[:, None].expand(2, 2), stds.square(), reduction="none"
    )
    torch.testing.assert_close(loss, reference)


def test_gaussian_nll_has_its_minimum_where_std_is_the_error() -> None:
    means = torch.tensor([[1.5, -0.3]], dtype=torch.float64)
    targets = torch.zeros(1, dtype=torch.float64)
    stds = means.abs().clone().requires_grad_()
    gaussian_nll_loss(means, stds, targets).sum().backward()
    torch.testing.assert_close(stds.grad, torch.zeros(1, 2, dtype=torch.float64))
    for factor, sign in ((0.9, -1), (1.1, 1)):
        stds = (means.abs() * factor).requires_grad_()
        gaussian_nll_loss(means, stds, targets).sum().backward()
        assert (stds.grad * sign > 0).all()


def test_targets_may_be_one_per_member() -> None:
    means, stds = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)
    loss = gaussian_nll_loss(means, stds, torch.tensor([[1.0, 4.0]]))
    torch.testing.assert_close(loss, torch.tensor([[0.0, 2.0]]))
    loss = mse_reparam_loss(means, 0 * stds, torch.tensor([[1.0, 4.0]]))
    torch.testing.assert_close(loss, torch.tensor([[0.0, 4.0]]))


@pytest.mark.usefixtures("without_annotation_checks")
def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"means \(3, 2\), stds \(3, 1\)"):
        gaussian_nll_loss(torch.zeros(3, 2), torch.ones(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"targets \(3, 1\)"):
        mse_reparam_loss(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 1))
    for loss in (bt_marginal_loss, bt_reparam_loss):
        with pytest.raises(ValueError, match=r"rejected_stds \(2,\)"):
            loss(torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(3, 2), torch.ones(2))


def test_bhattacharyya_matches_the_integral() -> None:
    x = np.linspace(-30, 30, 200_001)

    def density(mean: float, std: float) -> np.ndarray:
        return np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))

    for mean_1, std_1, mean_2, std_2 in [(0, 1, 0, 1), (0, 1, 2, 1), (-1, 0.5, 1, 2), (3, 2, 3, 1)]:
        expected = np.trapezoid(np.sqrt(density(mean_1, std_1) * density(mean_2, std_2)), x)
        parts = (torch.tensor([float(v)]) for v in (mean_1, std_1, mean_2, std_2))
        assert bhattacharyya_coefficient(*parts).item() == pytest.approx(expected, abs=1e-6)


def test_bhattacharyya_is_one_for_equals_symmetric_and_falls_with_distance() -> None:
    means, stds = torch.zeros(4), torch.full((4,), 0.7)
    torch.testing.assert_close(bhattacharyya_coefficient(means, stds, means, stds), torch.ones(4))
    apart, wider = torch.tensor([0.0, 1.0, 2.0, 30.0]), torch.full((4,), 1.9)
    overlap = bhattacharyya_coefficient(means, stds, apart, wider)
    torch.testing.assert_close(bhattacharyya_coefficient(apart, wider, means, stds), overlap)
    assert (overlap.diff() < 0).all()
    assert overlap[-1] < 1e-20
