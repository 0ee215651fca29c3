import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from trueward.losses import bradley_terry_loss, centring_loss, preference_probability


def pairs(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=generator, dtype=torch.float64),
        torch.randn(*shape, generator=generator, dtype=torch.float64),
    )


def test_bradley_terry_matches_golden_numbers() -> None:
    loss = bradley_terry_loss(torch.tensor([2.0, 3.0, 0.5]), torch.tensor([2.0, 2.0, 1.5]))
    torch.testing.assert_close(loss, torch.tensor([0.693147, 0.313262, 1.313262]))


def test_bradley_terry_is_minus_log_of_the_preference_probability() -> None:
    chosen, rejected = pairs(50)
    expected = -preference_probability(chosen, rejected).log()
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), expected)


def test_bradley_terry_agrees_with_binary_cross_entropy() -> None:
    chosen, rejected = pairs(50)
    expected = F.binary_cross_entropy_with_logits(
        chosen - rejected, torch.full_like(chosen, 0.9), reduction="none"
    )
    loss = bradley_terry_loss(chosen, rejected, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_bradley_terry_gradient_is_the_probability_of_being_wrong() -> None:
    chosen, rejected = pairs(20)
    chosen.requires_grad_()
    rejected.requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    wrong = (rejected - chosen).sigmoid().detach()
    torch.testing.assert_close(chosen.grad, -wrong)
    torch.testing.assert_close(rejected.grad, wrong)


def test_a_constant_added_to_both_rewards_changes_no_loss() -> None:
    chosen, rejected = pairs(20)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 3, rejected + 3), bradley_terry_loss(chosen, rejected)
    )


def test_margin_is_what_the_chosen_reward_must_lead_by() -> None:
    chosen, rejected = pairs(20)
    shifted = bradley_terry_loss(chosen - 0.7, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margin=0.7), shifted)
    margin = torch.linspace(-1, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(
        bradley_terry_loss(chosen, rejected, margin=margin),
        bradley_terry_loss(chosen - margin, rejected),
    )


def test_label_smoothing_has_its_minimum_at_the_believed_odds() -> None:
    rejected = torch.zeros(1, dtype=torch.float64)
    best = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(best, rejected, label_smoothing=0.2).sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros(1, dtype=torch.float64))


def test_label_smoothing_mixes_the_two_orders() -> None:
    chosen, rejected = pairs(20)
    right, flipped = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
    loss = bradley_terry_loss(chosen, rejected, label_smoothing=0.3)
    torch.testing.assert_close(loss, 0.7 * right + 0.3 * flipped)


def test_bradley_terry_is_finite_and_linear_at_extreme_rewards() -> None:
    loss = bradley_terry_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 2e4]))


def test_members_of_an_ensemble_are_scored_apart() -> None:
    chosen, rejected = pairs(6, 3)
    loss = bradley_terry_loss(chosen, rejected)
    for member in range(3):
        torch.testing.assert_close(
            loss[:, member], bradley_terry_loss(chosen[:, member], rejected[:, member])
        )


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, float("nan")])
def test_label_smoothing_out_of_range_is_refused(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0\.5\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), label_smoothing=label_smoothing)


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize("function", [bradley_terry_loss, centring_loss, preference_probability])
def test_shapes_that_would_broadcast_are_refused(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"chosen_rewards \(3,\), rejected_rewards \(3, 1\)"):
        function(torch.zeros(3), torch.zeros(3, 1))


@pytest.mark.usefixtures("without_annotation_checks")
def test_a_margin_that_would_broadcast_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin \(3, 1\)"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(3, 1))


def test_centring_loss_is_the_square_of_the_sum() -> None:
    loss = centring_loss(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([-1.0, 1.0, -0.5]))
    torch.testing.assert_close(loss, torch.tensor([0.0, 9.0, 2.25]))


def test_centring_fixes_the_constant_that_bradley_terry_leaves_free() -> None:
    # Along the direction in which both rewards move together, centring alone has a slope.
    offset = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    chosen, rejected = pairs(1)
    preference = bradley_terry_loss(chosen + offset, rejected + offset).sum()
    (slope,) = torch.autograd.grad(preference, offset)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)
    (slope,) = torch.autograd.grad(centring_loss(chosen + offset, rejected + offset).sum(), offset)
    assert slope.item() == pytest.approx(4 * (chosen + rejected + 0.8).item())


def test_preference_probability_matches_hand_calculation() -> None:
    probability = preference_probability(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]))
    torch.testing.assert_close(probability, torch.tensor([0.5, 1 / (1 + math.exp(2))]))


def test_probabilities_of_a_pair_and_of_its_swap_sum_to_one() -> None:
    chosen, rejected = pairs(20)
    total = preference_probability(chosen, rejected) + preference_probability(rejected, chosen)
    torch.testing.assert_close(total, torch.ones_like(total))
