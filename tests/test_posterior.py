from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch

from trueward.posterior import RewardPosterior


@pytest.fixture
def without_annotation_checks() -> Iterator[None]:
    """As users run it: our own errors speak, not the annotation check that tests add."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def example() -> RewardPosterior:
    means = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0], [-1.0, 1.0, 3.0]])
    stds = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    return RewardPosterior(means, stds)


def assert_same(left: RewardPosterior, right: RewardPosterior) -> None:
    torch.testing.assert_close(left.means, right.means)
    assert (left.stds is None) == (right.stds is None)
    if left.stds is not None:
        torch.testing.assert_close(left.stds, right.stds)


def test_statistics_match_hand_calculation() -> None:
    posterior = example()
    assert (len(posterior), posterior.members) == (3, 3)
    torch.testing.assert_close(posterior.mean, torch.tensor([3.0, 0.0, 1.0]))
    # Row 0: (4 + 1 + 9) / 3, the population's variance; with ddof 1 it would be 7.
    torch.testing.assert_close(posterior.variance, torch.tensor([14 / 3, 0.0, 8 / 3]))
    torch.testing.assert_close(posterior.std, torch.tensor([14 / 3, 0.0, 8 / 3]).sqrt())
    torch.testing.assert_close(
        posterior.total_variance, torch.tensor([14 / 3 + 14 / 3, 0.25, 8 / 3 + 1 / 3])
    )


def test_one_member_has_variance_zero_rather_than_nan() -> None:
    posterior = RewardPosterior(torch.tensor([[1.0], [2.0]]))
    torch.testing.assert_close(posterior.variance, torch.zeros(2))
    torch.testing.assert_close(posterior.std, torch.zeros(2))


def test_total_variance_without_stds_is_the_variance_between_members() -> None:
    posterior = RewardPosterior(example().means)
    torch.testing.assert_close(posterior.total_variance, posterior.variance)


def test_total_variance_is_that_of_draws_from_a_random_member() -> None:
    one = example()[0]
    many = RewardPosterior(one.means.expand(100_000, 3), one.stds.expand(100_000, 3))
    draws = many.rsample(torch.Generator().manual_seed(0))
    # The fourth moment of this mixture puts the estimate's standard error at 0.025.
    assert draws.var(correction=0).item() == pytest.approx(one.total_variance.item(), abs=0.1)


def test_rsample_has_the_members_moments() -> None:
    one = example()[0]
    many = RewardPosterior(one.means.expand(40_000, 3), one.stds.expand(40_000, 3))
    draws = many.rsample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), one.means[0], atol=0.06, rtol=0)
    torch.testing.assert_close(draws.std(0), one.stds[0], atol=0.05, rtol=0)
    correlation = torch.corrcoef(draws.T) - torch.eye(3)
    assert correlation.abs().max() < 0.02  # each member draws its own noise


def test_rsample_is_reproducible_and_differentiable() -> None:
    posterior = example()
    stds = posterior.stds.clone().requires_grad_()
    means = posterior.means.clone().requires_grad_()
    draw = RewardPosterior(means, stds).rsample(torch.Generator().manual_seed(1))
    again = posterior.rsample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(draw.detach(), again)
    draw.sum().backward()
    torch.testing.assert_close(means.grad, torch.ones(3, 3))
    eps = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(stds.grad, eps)


def test_rsample_without_stds_returns_the_means() -> None:
    means = example().means
    torch.testing.assert_close(RewardPosterior(means).rsample(), means)


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        (torch.tensor([False, False, False]), []),
        (1, [1]),
        (-1, [2]),
        (torch.tensor(2), [2]),
    ],
)
def test_indexing_takes_rows_of_means_and_stds(
    index: int | slice | torch.Tensor, rows: list[int]
) -> None:
    posterior = example()
    expected = RewardPosterior(posterior.means[rows], posterior.stds[rows])
    assert_same(posterior[index], expected)
    assert posterior[index].members == 3
    assert RewardPosterior(posterior.means)[index].stds is None


def test_iterating_gives_each_row_and_ends() -> None:
    assert_same(RewardPosterior.cat(list(example())), example())
    with pytest.raises(IndexError, match="index 3 is out of range for a batch of 3"):
        example()[3]
    with pytest.raises(IndexError, match="index -4 is out of range"):
        example()[-4]


def test_cat_undoes_slicing() -> None:
    posterior = example()
    assert_same(RewardPosterior.cat([posterior[:2], posterior[2:]]), posterior)
    means = RewardPosterior(posterior.means)
    assert_same(RewardPosterior.cat([means[:1], means[1:]]), means)


def test_stack_members_joins_ensembles_over_the_same_rows() -> None:
    posterior = example()
    parts = [
        RewardPosterior(posterior.means[:, k : k + 1], posterior.stds[:, k : k + 1])
        for k in range(3)
    ]
    assert_same(RewardPosterior.stack_members(parts), posterior)
    both = RewardPosterior.stack_members([posterior, posterior])
    assert (len(both), both.members) == (3, 6)
    torch.testing.assert_close(both.variance, posterior.variance)


@pytest.mark.parametrize("join", [RewardPosterior.cat, RewardPosterior.stack_members])
def test_joining_refuses_nothing_and_stds_on_some(
    join: Callable[[list[RewardPosterior]], RewardPosterior],
) -> None:
    with pytest.raises(ValueError, match="at least one posterior"):
        join([])
    with pytest.raises(ValueError, match="got them on 1 of 2"):
        join([example(), RewardPosterior(example().means)])


def test_joining_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match=r"same number of members in each, got \[3, 2\]"):
        RewardPosterior.cat(
            [RewardPosterior(torch.zeros(2, 3)), RewardPosterior(torch.zeros(2, 2))]
        )
    with pytest.raises(ValueError, match=r"same number of rows in each, got \[2, 4\]"):
        RewardPosterior.stack_members(
            [RewardPosterior(torch.zeros(2, 3)), RewardPosterior(torch.zeros(4, 3))]
        )


def test_to_moves_both_tensors() -> None:
    posterior = example().to(torch.float64)
    assert posterior.means.dtype == posterior.stds.dtype == torch.float64
    moved = example().to("cpu", torch.float16)
    assert moved.means.dtype == torch.float16
    assert RewardPosterior(example().means).to("cpu").stds is None


def test_standardised_members_have_mean_zero_and_std_one_on_the_reference() -> None:
    posterior = RewardPosterior(
        torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1.0, 20.0])
        + torch.tensor([5.0, 0.0, -30.0]),
        torch.full((50, 3), 2.0),
    )
    mean, std = posterior.means.mean(0), posterior.means.std(0, correction=0)
    scaled = posterior.standardised(mean, std)
    torch.testing.assert_close(scaled.means.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.means.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(scaled.stds, (2.0 / std).expand(50, 3))
    assert RewardPosterior(posterior.means).standardised(mean, std).stds is None


def test_standardised_takes_one_number_for_all_members() -> None:
    posterior = example()
    scaled = posterior.standardised(1.0, 2.0)
    torch.testing.assert_close(scaled.means, (posterior.means - 1) / 2)
    torch.testing.assert_close(scaled.stds, posterior.stds / 2)


def test_standardised_keeps_the_dtype_of_the_posterior() -> None:
    scaled = example().standardised(torch.zeros(3).double(), torch.ones(3).double())
    assert scaled.means.dtype == torch.float32


@pytest.mark.usefixtures("without_annotation_checks")
def test_standardised_refuses_scales_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="std must be positive"):
        example().standardised(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="std must be finite"):
        example().standardised(torch.zeros(3), torch.tensor([1.0, float("nan"), 1.0]))
    with pytest.raises(ValueError, match="mean must be finite"):
        example().standardised(float("inf"), 1.0)
    with pytest.raises(ValueError, match=r"one per member \(3\), got the shape \(1,\)"):
        example().standardised(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="std must be one number or one per member"):
        example().standardised(0.0, torch.ones(2))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 2, 1), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"means must have the shape \[batch, member\]"):
        RewardPosterior(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"stds must have the shape \[batch, member\]"):
        RewardPosterior(torch.zeros(3, 2), torch.zeros(shape))


@pytest.mark.usefixtures("without_annotation_checks")
def test_stds_must_have_the_shape_of_means() -> None:
    with pytest.raises(ValueError, match=r"the shape of means, \(3, 2\), got \(3, 1\)"):
        RewardPosterior(torch.zeros(3, 2), torch.zeros(3, 1))


@pytest.mark.usefixtures("without_annotation_checks")
def test_what_is_not_a_floating_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"means must be floating, got torch\.int64"):
        RewardPosterior(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="stds must be floating"):
        RewardPosterior(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"means must be a torch\.Tensor, got list"):
        RewardPosterior([[1.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1e-3, float("nan"), float("-inf")])
def test_negative_and_nan_stds_are_refused(bad: float) -> None:
    stds = torch.ones(3, 2)
    stds[1, 1] = bad
    with pytest.raises(ValueError, match="stds must not be negative or NaN"):
        RewardPosterior(torch.zeros(3, 2), stds)


def test_means_that_are_not_finite_are_kept() -> None:
    posterior = RewardPosterior(torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]))
    assert posterior.mean.isfinite().tolist() == [False, False]


def test_an_empty_batch_is_a_posterior() -> None:
    posterior = RewardPosterior(torch.zeros(0, 3), torch.zeros(0, 3))
    assert len(posterior) == 0
    assert posterior.mean.shape == posterior.total_variance.shape == (0,)
    assert_same(RewardPosterior.cat([posterior, example()]), example())


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError):
        example().means = torch.zeros(3, 3)  # type: ignore[misc]
