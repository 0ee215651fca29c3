import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from trueward.losses import (
    gaussian_symmetric_kl,
    gaussian_symmetric_kl_sample,
    jensen_shannon_mi,
)


def gaussians(batch: int = 6, dim: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(batch, dim, generator=generator, dtype=torch.float64)

    return 2 * draw(), 0.3 + draw(), 2 * draw(), 0.3 + draw()


def test_symmetric_kl_matches_the_golden_number() -> None:
    mean_1, std_1 = torch.tensor([[0.0]]), torch.tensor([[1.0]])
    mean_2, std_2 = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    assert gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2).item() == pytest.approx(0.875)


def test_symmetric_kl_agrees_with_torch_distributions() -> None:
    mean_1, std_1, mean_2, std_2 = gaussians()
    p_1 = Independent(Normal(mean_1, std_1), 1)
    p_2 = Independent(Normal(mean_2, std_2), 1)
    expected = (kl_divergence(p_1, p_2) + kl_divergence(p_2, p_1)) / 2
    torch.testing.assert_close(gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2), expected)


def test_symmetric_kl_is_symmetric_and_zero_for_equals() -> None:
    mean_1, std_1, mean_2, std_2 = gaussians()
    torch.testing.assert_close(
        gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2),
        gaussian_symmetric_kl(mean_2, std_2, mean_1, std_1),
    )
    zero = gaussian_symmetric_kl(mean_1, std_1, mean_1, std_1)
    torch.testing.assert_close(zero, torch.zeros_like(zero))


def test_sample_form_averages_to_the_closed_form_exactly() -> None:
    # The integrand is quadratic in z, so a rule with three nodes takes its expectation exactly;
    # dimensions add up, so one dimension says it all.
    mean_1, std_1, mean_2, std_2 = gaussians(dim=1)
    nodes, weights = hermegauss(3)
    estimate = torch.zeros(6, dtype=torch.float64)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        z_1, z_2 = mean_1 + std_1 * node, mean_2 + std_2 * node
        estimate += weight * gaussian_symmetric_kl_sample(mean_1, std_1, mean_2, std_2, z_1, z_2)
    torch.testing.assert_close(estimate, gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2))


def test_sample_form_is_the_log_density_ratio_of_both_draws() -> None:
    mean_1, std_1, mean_2, std_2 = gaussians()
    z_1, z_2 = mean_1 + 0.3, mean_2 - 1.1
    p_1, p_2 = Independent(Normal(mean_1, std_1), 1), Independent(Normal(mean_2, std_2), 1)
    expected = (p_1.log_prob(z_1) - p_2.log_prob(z_1) + p_2.log_prob(z_2) - p_1.log_prob(z_2)) / 2
    estimate = gaussian_symmetric_kl_sample(mean_1, std_1, mean_2, std_2, z_1, z_2)
    torch.testing.assert_close(estimate, expected)


def test_a_critic_that_knows_nothing_gives_minus_two_log_two() -> None:
    estimate = jensen_shannon_mi(torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(estimate, torch.full((3,), -2 * math.log(2)))
    assert estimate[0].item() == pytest.approx(-1.386294)


def test_estimate_matches_hand_calculation() -> None:
    estimate = jensen_shannon_mi(torch.tensor([1.0]), torch.tensor([-2.0]))
    expected = -math.log(1 + math.exp(-1)) - math.log(1 + math.exp(-2))
    assert estimate.item() == pytest.approx(expected)


def expectation(scores: Tensor, joint: Tensor, product: Tensor) -> Tensor:
    """Of the estimate, over every matched pair with every independent pair."""
    size = scores.numel()
    matched = scores.repeat_interleave(size)
    independent = scores.repeat(size)
    weights = joint.repeat_interleave(size) * product.repeat(size)
    return (weights * jensen_shannon_mi(matched, independent)).sum()


def discrete_joint() -> tuple[Tensor, Tensor]:
    table = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.20, 0.08], [0.10, 0.05, 0.15]])
    table = table.double()
    product = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
    return table.flatten(), product.flatten()


def test_the_best_critic_gives_twice_the_divergence_less_two_log_two() -> None:
    joint, product = discrete_joint()
    mixture = (joint + product) / 2
    divergence = (
        (joint * (joint / mixture).log()).sum() + (product * (product / mixture).log()).sum()
    ) / 2
    assert divergence.item() > 0.05
    best = (joint / product).log()
    torch.testing.assert_close(expectation(best, joint, product), 2 * divergence - 2 * math.log(2))


def test_no_other_critic_does_better() -> None:
    joint, product = discrete_joint()
    best = (joint / product).log().requires_grad_()
    value = expectation(best, joint, product)
    value.backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = torch.randn(9, generator=generator, dtype=torch.float64)
        assert expectation(best.detach() + 0.5 * noise, joint, product) < value


def test_estimate_is_never_positive_and_rises_as_the_critic_separates() -> None:
    strength = torch.linspace(0, 30, 50)
    estimate = jensen_shannon_mi(strength, -strength)
    assert (estimate <= 0).all()
    assert (estimate.diff() >= 0).all()
    assert estimate[-1].item() == pytest.approx(0.0, abs=1e-6)
    assert jensen_shannon_mi(torch.tensor([-1e4]), torch.tensor([1e4])).item() == -2e4


@pytest.mark.usefixtures("without_annotation_checks")
def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"joint_scores \(3,\), product_scores \(3, 1\)"):
        jensen_shannon_mi(torch.zeros(3), torch.zeros(3, 1))
    one = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"std_2 \(3, 1\)"):
        gaussian_symmetric_kl(one, one, one, torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"z_2 \(1, 2\)"):
        gaussian_symmetric_kl_sample(one, one, one, one, one, torch.ones(1, 2))


def test_symmetric_kl_grows_without_bound_in_the_mean() -> None:
    far = torch.tensor([[0.0], [1.0], [100.0]])
    one, zero = torch.ones(3, 1), torch.zeros(3, 1)
    values = gaussian_symmetric_kl(zero, one, far, one)
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 5000.0]))
