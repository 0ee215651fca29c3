"""Noise-contrastive estimation of an energy: the equation, the noise, and what its minimum is."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trueward.losses import nce_candidates, nce_loss, noise_draws, noise_log_density


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# ---- the loss ----------------------------------------------------------------------------------


def test_the_loss_is_the_equation_written_as_a_loop() -> None:
    energies, log_noise, lam = 2 * normal(5, 7), normal(5, 7, seed=1) - 2, 0.05
    found = nce_loss(energies, log_noise, regularisation=lam)
    for i in range(5):
        weights = [
            math.exp(energies[i, m].item()) / math.exp(log_noise[i, m].item()) for m in range(7)
        ]
        square = sum(energies[i, m].item() ** 2 for m in range(7)) / 7
        by_hand = -math.log(weights[0] / sum(weights)) + lam * square
        assert found[i].item() == pytest.approx(by_hand, rel=1e-12)


def test_a_loss_by_hand() -> None:
    # Weights 3, 1 and 2: the example has a half of all. Squares of log 3, 0 and log 1.
    energies = torch.tensor([[math.log(3), 0.0, 0.0]])
    log_noise = torch.tensor([[0.0, 0.0, -math.log(2)]])
    assert nce_loss(energies, log_noise).item() == pytest.approx(math.log(2))
    regularised = nce_loss(energies, log_noise, regularisation=0.6)
    assert regularised.item() == pytest.approx(math.log(2) + 0.2 * math.log(3) ** 2)


def test_what_cannot_be_told_apart_costs_the_logarithm_of_the_candidates() -> None:
    loss = nce_loss(torch.full((2, 9), 1.3), torch.full((2, 9), -4.0))
    torch.testing.assert_close(loss, torch.full((2,), math.log(9)))


def test_only_the_regulariser_sees_a_constant() -> None:
    energies, log_noise = normal(3, 6), normal(3, 6, seed=1)
    loss = nce_loss(energies, log_noise)
    torch.testing.assert_close(nce_loss(energies + 5, log_noise - 3), loss)
    moved = nce_loss(energies + 5, log_noise, regularisation=0.1)
    torch.testing.assert_close(moved, loss + 0.1 * (energies + 5).square().mean(1))


def test_the_gradient_is_the_softmax_less_the_example() -> None:
    energies, log_noise = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    nce_loss(energies, log_noise, regularisation=0.2).sum().backward()
    wanted = (energies - log_noise).detach().softmax(1) + 0.2 * 2 * energies.detach() / 4
    wanted[:, 0] -= 1
    torch.testing.assert_close(energies.grad, wanted)


def test_large_energies_stay_finite_where_exp_and_log_would_not() -> None:
    energies = torch.tensor([[-1e4, 0.0], [1e4, 0.0], [1e4, 1e4]], requires_grad=True)
    loss = nce_loss(energies, torch.zeros(3, 2))
    assert loss.tolist() == pytest.approx([1e4, 0.0, math.log(2)])
    loss.sum().backward()
    assert bool(energies.grad.isfinite().all())


def expected_loss(energies: Tensor, data: Tensor, noise: Tensor, draws: int) -> Tensor:
    """The mean over all ways to draw an example and `draws` values of the noise."""
    ways = torch.tensor(list(itertools.product(range(len(data)), repeat=draws + 1)))
    chances = data[ways[:, 0]] * noise[ways[:, 1:]].prod(1)
    return (chances * nce_loss(energies[ways], noise.log()[ways])).sum()


@pytest.mark.parametrize("draws", [1, 3])
def test_the_minimum_is_at_the_true_probabilities(draws: int) -> None:
    data = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    noise = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
    energies = (data.log() + 2.7).requires_grad_()  # up to a constant
    loss = expected_loss(energies, data, noise, draws)
    (slope,) = torch.autograd.grad(loss, energies)
    torch.testing.assert_close(slope, torch.zeros(4).double(), atol=1e-12, rtol=0)
    for seed in range(5):
        elsewhere = energies.detach() + 0.3 * normal(4, seed=seed)
        assert expected_loss(elsewhere, data, noise, draws) > loss + 1e-4


def test_shapes_and_signs_that_cannot_be_meant_are_refused(
    without_annotation_checks: None,
) -> None:
    with pytest.raises(ValueError, match=r"energies \(2, 3\), log_noise \(2, 1\)"):
        nce_loss(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"regularisation must be at least 0, got -0\.1"):
        nce_loss(torch.zeros(2, 3), torch.zeros(2, 3), regularisation=-0.1)


# ---- the noise ---------------------------------------------------------------------------------


def test_the_density_of_one_gaussian_by_hand() -> None:
    found = noise_log_density(torch.tensor([[1.0, 4.5]]), torch.tensor([1.0]), stds=[3.5])
    peak = -math.log(3.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found, torch.tensor([[peak, peak - 0.5]]))


def test_the_density_of_several_is_their_mean() -> None:
    stds, centres = [0.2, 1.0, 4.0], normal(6)
    rewards = centres[:, None] + 3 * normal(6, 5, seed=1)
    normals = [torch.distributions.Normal(centres[:, None], s) for s in stds]
    wanted = torch.stack([n.log_prob(rewards).exp() for n in normals]).mean(0).log()
    torch.testing.assert_close(noise_log_density(rewards, centres, stds=stds), wanted)


def test_the_density_far_out_is_not_rounded_to_nothing() -> None:
    found = noise_log_density(torch.tensor([[400.0]]), torch.tensor([0.0]), stds=[1.0, 2.0])
    assert found.item() == pytest.approx(-(400**2) / 8 - math.log(2 * 2 * math.sqrt(2 * math.pi)))


def test_draws_are_of_the_density() -> None:
    stds = [0.5, 2.0]
    draws = noise_draws(torch.tensor([1.0, -7.0]), stds=stds, samples=40_000, generator=seeded())
    torch.testing.assert_close(draws.mean(1), torch.tensor([1.0, -7.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(draws.var(1), torch.full((2,), 2.125), atol=0.06, rtol=0)
    # Within .5 of the centre: half of .6827 (one std) and of .1974 (a quarter of one).
    near = ((draws - torch.tensor([[1.0], [-7.0]])).abs() < 0.5).float().mean(1)
    torch.testing.assert_close(near, torch.full((2,), 0.44005), atol=0.01, rtol=0)
    assert torch.corrcoef(draws)[0, 1].abs() < 0.02  # rows are drawn apart


def test_candidates_are_the_perturbed_example_and_then_the_noise() -> None:
    rewards = torch.full((20_000,), 2.0)
    found = nce_candidates(rewards, stds=[3.5], beta=0.1, samples=2, generator=seeded())
    assert found.shape == (20_000, 3)
    torch.testing.assert_close(found.mean(0), torch.full((3,), 2.0), atol=0.1, rtol=0)
    torch.testing.assert_close(found.std(0), torch.tensor([0.35, 3.5, 3.5]), rtol=0.02, atol=0)
    # The noise lies about the reward itself, not about its perturbation.
    wide = nce_candidates(rewards, stds=[3.5], beta=1.0, samples=2, generator=seeded())
    torch.testing.assert_close(torch.corrcoef(wide.T), torch.eye(3), atol=0.03, rtol=0)
    exact = nce_candidates(rewards[:5], stds=[3.5], beta=0.0, samples=2)
    assert torch.equal(exact[:, 0], rewards[:5])


def test_draws_are_a_function_of_the_generator() -> None:
    drawn = [
        nce_candidates(torch.zeros(4), stds=[1.0, 2.0], beta=0.1, samples=3, generator=seeded(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("stds", [[], [1.0, 0.0], [-1.0]])
def test_a_noise_without_width_is_refused(stds: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one std, all above 0"):
        noise_log_density(torch.zeros(1, 1), torch.zeros(1), stds=stds)


@pytest.mark.parametrize("options", [{"beta": -0.1, "samples": 2}, {"beta": 0.1, "samples": 0}])
def test_candidates_that_cannot_be_drawn_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="beta must be at least 0 and samples at least 1"):
        nce_candidates(torch.zeros(2), stds=[1.0], **options)


# ---- what is learned ---------------------------------------------------------------------------


def test_a_conditional_gaussian_is_recovered_with_the_examples_jitter_added() -> None:
    # r = .8 x - .5 + .6 z; the jitter is .2 * 2 = .4, so the density's std is sqrt(.36 + .16).
    stds, beta = [2.0], 0.2
    x, z = normal(4000).float(), normal(4000, seed=1).float()
    rewards = 0.8 * x - 0.5 + 0.6 * z
    parameters = torch.zeros(3, requires_grad=True)  # slope, intercept, log std
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    generator = seeded(2)
    for step in range(120):
        some = torch.randint(len(x), (512,), generator=generator)
        candidates = nce_candidates(
            rewards[some], stds=stds, beta=beta, samples=64, generator=generator
        )
        slope, intercept, log_std = parameters
        means = slope * x[some] + intercept
        energies = -((candidates - means[:, None]) / log_std.exp()).square() / 2
        loss = nce_loss(energies, noise_log_density(candidates, rewards[some], stds=stds)).mean()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 120)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = parameters.detach()
    assert found[0].item() == pytest.approx(0.8, abs=0.05)
    assert found[1].item() == pytest.approx(-0.5, abs=0.05)
    assert found[2].exp().item() == pytest.approx(math.sqrt(0.52), abs=0.05)
