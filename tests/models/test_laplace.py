"""The head with a Gaussian over its weights: its two readings, and the draws of one of them."""

import pytest
import torch
from torch import Tensor

from trueward.models.head_kinds import make_head
from trueward.models.laplace import LaplaceHead, linear_std, posterior_draws

WEIGHT = torch.tensor([1.0, 2.0])
FACTOR = torch.tensor([[1.0, 0.0], [1.0, 3.0]])  # covariance [[1, 1], [1, 10]]


def posterior(hidden: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(hidden, generator=generator, dtype=torch.float64)
    factor = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return weight, factor


def test_a_mean_and_a_std_by_hand() -> None:
    head = LaplaceHead(2).set_posterior(WEIGHT, FACTOR)
    means, stds = head(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]))
    assert (head.members, head.has_stds) == (1, True)
    assert means.tolist() == [[3.0], [1.0], [-4.0], [0.0]]
    # h' Sigma h: 1 + 1 + 1 + 10; 1; 4 * 10; 0
    torch.testing.assert_close(stds[:, 0].square(), torch.tensor([13.0, 1.0, 40.0, 0.0]))


def test_the_std_is_the_root_of_the_quadratic_form_in_the_covariance() -> None:
    _, factor = posterior()
    states = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.einsum("...i,ij,...j->...", states, factor @ factor.T, states).sqrt()
    torch.testing.assert_close(linear_std(states, factor), wanted)


def test_a_difference_is_not_as_uncertain_as_its_sides() -> None:
    head = LaplaceHead(2).set_posterior(WEIGHT, FACTOR)
    first, second = torch.tensor([[1.0, 1.0]] * 3), torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1, -1]])
    stds = head.difference_std(first, second)
    torch.testing.assert_close(stds.square(), torch.tensor([0.0, 1.0, 52.0]))
    # Of sides that were independent: 13 + 13, 13 + 10, 13 + 13.
    apart = head(first).stds[:, 0].square() + head(second).stds[:, 0].square()
    torch.testing.assert_close(apart, torch.tensor([26.0, 23.0, 26.0]))


@pytest.mark.parametrize("members", [1, 2, 5, 64])
def test_the_draws_mean_is_the_posteriors_mean(members: int) -> None:
    weight, factor = posterior()
    generator = torch.Generator().manual_seed(3)
    draws = posterior_draws(weight, 10 * factor, members, generator=generator)
    assert draws.shape == (members, 6)
    torch.testing.assert_close(draws.mean(0), weight, atol=1e-12, rtol=0)
    head = LaplaceHead(6, members).set_posterior(weight, factor)
    states = torch.randn(7, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(
        head(states).means.mean(1), states @ weight.float(), atol=1e-5, rtol=1e-5
    )


def test_a_single_draw_is_the_mean_itself() -> None:
    weight, factor = posterior()
    assert torch.equal(posterior_draws(weight, factor, 1)[0], weight)


def test_the_variance_over_many_members_is_the_posteriors() -> None:
    weight, factor = posterior()
    head = LaplaceHead(6, 20_000).set_posterior(weight, factor)
    states = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    means = head(states).means
    wanted = linear_std(states.double(), factor).float()
    torch.testing.assert_close(means.std(1, correction=0), wanted, rtol=0.03, atol=0)
    # Members are whole rewards: their differences have the std of the difference.
    apart = (means[0] - means[1]).std(correction=0)
    torch.testing.assert_close(apart, head.difference_std(states[0], states[1]), rtol=0.03, atol=0)


def test_the_variance_over_few_members_is_right_on_average_and_so_is_each_draw() -> None:
    weight, factor = posterior(2)
    generator = torch.Generator().manual_seed(6)
    state = torch.tensor([0.5, -1.0], dtype=torch.float64)
    draws = torch.stack(
        [posterior_draws(weight, factor, 3, generator=generator) for _ in range(20_000)]
    )
    variance = (draws @ state).var(1, correction=0).mean()
    wanted = linear_std(state, factor).square()
    assert variance.item() == pytest.approx(wanted.item(), rel=0.03)
    covariance = torch.cov(draws[:, 0].T)
    torch.testing.assert_close(covariance, factor @ factor.T, rtol=0.05, atol=0.05)


def test_draws_are_a_function_of_the_seed() -> None:
    weight, factor = posterior()
    first = LaplaceHead(6, 4).set_posterior(weight, factor, seed=1)
    torch.manual_seed(9)
    again = LaplaceHead(6, 4).set_posterior(weight, factor, seed=1)
    assert torch.equal(first.draws, again.draws)
    assert not torch.equal(first.draws, first.read_as(4, seed=2).draws)


def test_the_same_posterior_reads_either_way() -> None:
    weight, factor = posterior()
    drawn = LaplaceHead(6, 4).set_posterior(weight, factor)
    states = torch.randn(3, 6, generator=torch.Generator().manual_seed(7))
    assert drawn(states).stds is None
    assert (drawn.members, drawn.has_stds) == (4, False)
    gaussian = drawn.read_as(0)
    torch.testing.assert_close(gaussian(states).stds[:, 0], linear_std(states, factor.float()))
    assert torch.equal(gaussian.weight, drawn.weight)


@pytest.mark.parametrize("members", [0, 3])
def test_a_head_is_built_again_from_its_description_and_its_buffers(members: int) -> None:
    head = LaplaceHead(6, members).set_posterior(*posterior())
    again = make_head(head.describe(), 6)
    assert again.describe() == head.describe() == {"kind": "laplace", "members": members}
    again.load_state_dict(head.state_dict())
    states = torch.randn(4, 6, generator=torch.Generator().manual_seed(8))
    assert torch.equal(again(states).means, head(states).means)
    if not members:
        assert torch.equal(again(states).stds, head(states).stds)


@pytest.mark.parametrize("members", [0, 3])
def test_it_computes_in_float32_under_bf16_states_and_autocast(members: int) -> None:
    head = LaplaceHead(6, members).set_posterior(*posterior())
    states = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(9)).bfloat16()
    wanted = head(states.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = head(states)
    assert found.means.shape == (2, 3, max(1, members))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None and b is None) or (a.dtype == torch.float32 and torch.equal(a, b))


def test_fewer_than_no_members_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number of draws, got -1"):
        LaplaceHead(4, -1)
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        posterior_draws(*posterior(), 0)
