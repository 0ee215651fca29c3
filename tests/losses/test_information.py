import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from trueward.losses import (
    gaussian_symmetric_kl,
    gaussian_symmetric_kl_sample,
    info_nce_loss,
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
    with pytest.raises(ValueError, match=r"z_2 \(1, 2\)"):
        info_nce_loss(one, torch.ones(1, 2), temperature=1.0)


def test_symmetric_kl_grows_without_bound_in_the_mean() -> None:
    far = torch.tensor([[0.0], [1.0], [100.0]])
    one, zero = torch.ones(3, 1), torch.zeros(3, 1)
    values = gaussian_symmetric_kl(zero, one, far, one)
    torch.testing.assert_close(values, torch.tensor([0.0, 0.5, 5000.0]))


# --- InfoNCE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_info_nce_of_equal_orthonormal_views_is_the_golden_number(
    batch: int, temperature: float
) -> None:
    views = torch.eye(batch, 20, dtype=torch.float64)
    loss = info_nce_loss(views, views, temperature=temperature)
    expected = math.log1p((batch - 1) * math.exp(-1 / temperature))
    torch.testing.assert_close(loss, torch.full_like(loss, expected))


def test_info_nce_is_the_logarithm_of_the_batch_where_views_tell_nothing() -> None:
    same = torch.ones(7, 3)
    loss = info_nce_loss(same, same, temperature=0.1)
    torch.testing.assert_close(loss, torch.full((7,), math.log(7)))
    # Partners that stand across: cos 0, and cos 1 with the other prompt's.
    views = torch.eye(2)
    loss = info_nce_loss(views, views.flip(0), temperature=0.5)
    torch.testing.assert_close(loss, torch.full((2,), math.log(1 + math.exp(2))))


def test_info_nce_agrees_with_a_loop_over_pairs_in_both_directions() -> None:
    z_1, _, z_2, _ = gaussians(batch=4)
    z_1 = z_1 - 1

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))

    expected = []
    for i in range(4):
        own = math.exp(cosine(z_1[i], z_2[i]) / 0.3)
        from_first = sum(math.exp(cosine(z_1[i], z_2[j]) / 0.3) for j in range(4))
        from_second = sum(math.exp(cosine(z_1[j], z_2[i]) / 0.3) for j in range(4))
        assert abs(from_first - from_second) > 0.01
        expected.append(-(math.log(own / from_first) + math.log(own / from_second)) / 2)
    assert info_nce_loss(z_1, z_2, temperature=0.3).tolist() == pytest.approx(expected)


def test_info_nce_is_symmetric_and_blind_to_length_and_order() -> None:
    z_1, _, z_2, _ = gaussians()
    loss = info_nce_loss(z_1, z_2, temperature=0.2)
    torch.testing.assert_close(info_nce_loss(z_2, z_1, temperature=0.2), loss)
    lengths = torch.linspace(0.1, 50, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(info_nce_loss(lengths * z_1, z_2, temperature=0.2), loss)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(info_nce_loss(z_1[order], z_2[order], temperature=0.2), loss[order])


def test_gradient_of_info_nce_turns_partners_towards_each_other() -> None:
    z_1, _, z_2, _ = gaussians()
    z_1, z_2 = (z_1 - 1).requires_grad_(), (z_2 - 1).requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return info_nce_loss(a, b, temperature=0.5)

    assert torch.autograd.gradcheck(loss, (z_1, z_2))
    loss(z_1, z_2).mean().backward()
    # Length does not matter, so nothing pulls along it.
    torch.testing.assert_close((z_1.grad * z_1).sum(1), torch.zeros(6, dtype=torch.float64))
    before = torch.nn.functional.cosine_similarity(z_1, z_2).mean()
    closer = z_1 - 0.1 * z_1.grad, z_2 - 0.1 * z_2.grad
    assert loss(*closer).mean() < loss(z_1, z_2).mean()
    assert torch.nn.functional.cosine_similarity(*closer).mean() > before
    # Its own partner pulls a view, every other prompt's pushes it.
    one = torch.eye(3, 4).requires_grad_()
    other = torch.full((3, 4), 0.5)
    info_nce_loss(one, other + torch.eye(3, 4), temperature=0.5).sum().backward()
    assert (one.grad[:, :3].masked_select(~torch.eye(3, dtype=torch.bool)) > 0).all()


def test_info_nce_is_finite_at_the_ends() -> None:
    far = 1e4 * torch.eye(3, requires_grad=True)
    for views in (far, 1e-4 * far, -far):
        loss = info_nce_loss(far, views, temperature=1e-3)
        assert loss.isfinite().all()
    assert info_nce_loss(far, -far, temperature=1e-3).mean().item() == pytest.approx(
        1000 + math.log(2), rel=1e-5
    )
    zero = torch.zeros(3, 3, requires_grad=True)
    info_nce_loss(zero, zero, temperature=0.1).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_info_nce_without_negatives_or_temperature_is_refused() -> None:
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match="needs negatives: a batch of at least 2, got 1"):
        info_nce_loss(one, one, temperature=0.1)
    two = torch.ones(2, 2)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            info_nce_loss(two, two, temperature=temperature)
