import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trueward.data.formats import Completion, Prompt
from trueward.evaluate.judges import Judge, JudgeReport, function_judge
from trueward.evaluate.preferences import wilson_interval
from trueward.evaluate.winrate import fit_logistic, length_controlled_win_rate, win_rate


def fixed(outcomes: Sequence[float]) -> Judge:
    return lambda prompts, completions, references: torch.tensor(outcomes)


def test_win_rate_by_hand() -> None:
    result = win_rate(
        fixed([1.0, 0.5, 0.0, 0.75]),
        ["p"] * 4,
        ["aaaa", "bb", "c", "d"],
        ["a", "b", "cc", [{"role": "assistant", "content": "four"}]],
    )
    assert result.win_rate == pytest.approx(2.25 / 4)
    assert (result.low, result.high) == wilson_interval(2.25, 4)
    assert result.standard_error == pytest.approx(math.sqrt(0.5625 * 0.4375 / 4))
    assert (result.wins, result.ties, result.losses, result.pairs) == (2, 1, 1, 4)
    assert (result.mean_length, result.mean_reference_length) == (2.0, 2.0)
    assert result.position_bias is None


def test_standard_errors_are_those_of_the_specification() -> None:
    # At 50 %: 1.8 points for 805 prompts, 5.0 for 100, 5.6 for 80.
    for pairs, points in ((805, 1.8), (100, 5.0), (80, 5.6)):
        tied = win_rate(fixed([0.5] * pairs), ["p"] * pairs, ["a"] * pairs, ["b"] * pairs)
        assert 100 * tied.standard_error == pytest.approx(points, abs=0.05)


def test_judge_sees_the_completion_first_and_the_reference_second() -> None:
    judge = function_judge(lambda prompt, a, b: float((prompt, a, b) == ("p", "mine", "theirs")))
    assert win_rate(judge, ["p"], ["mine"], ["theirs"]).win_rate == 1.0
    assert win_rate(judge, ["p"], ["theirs"], ["mine"]).win_rate == 0.0


def test_swapped_sides_have_the_rest_of_the_win_rate() -> None:
    outcomes = torch.rand(60, generator=torch.Generator().manual_seed(0)).round().tolist()
    mine, theirs = ["x" * (i % 7) for i in range(60)], ["x" * (i % 5) for i in range(60)]
    there = win_rate(fixed(outcomes), ["p"] * 60, mine, theirs)
    back = win_rate(fixed([1 - o for o in outcomes]), ["p"] * 60, theirs, mine)
    assert there.win_rate + back.win_rate == pytest.approx(1)
    controlled, reverse = there.length_controlled, back.length_controlled
    assert controlled.win_rate + reverse.win_rate == pytest.approx(1)
    assert controlled.low + reverse.high == pytest.approx(1)
    assert controlled.length_coefficient == pytest.approx(reverse.length_coefficient)


def synthetic(theta: float, phi: float, shift: float, size: int = 40_000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    differences = 100 * (torch.randn(size, generator=generator, dtype=torch.float64) + shift)
    scaled = (differences / differences.std(correction=0)).tanh()
    chance = (theta + phi * scaled).sigmoid()
    wins = torch.rand(size, generator=generator, dtype=torch.float64) < chance
    return wins.double(), differences


@pytest.mark.parametrize(("theta", "phi"), [(0.4, 1.5), (-0.7, 0.8), (0.0, -1.0)])
def test_length_control_finds_theta_and_phi_again(theta: float, phi: float) -> None:
    outcomes, differences = synthetic(theta, phi, shift=0.5)
    result = length_controlled_win_rate(outcomes, differences)
    truth = torch.tensor(theta).sigmoid().item()
    assert result.win_rate == pytest.approx(truth, abs=0.01)
    assert result.length_coefficient == pytest.approx(phi, abs=0.05)
    assert result.low < truth < result.high
    # Longer completions won more than they should: the raw win rate is off by far more.
    assert abs(float(outcomes.mean()) - truth) > 0.04


def test_a_judge_of_length_alone_gives_a_half_at_equal_length() -> None:
    # Always longer, and the reference never wins against a longer one... unless length is equal.
    differences = torch.linspace(-50, 150, 2001, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    std = differences.std(correction=0)
    chance = (2 * (differences / std).tanh()).sigmoid()
    outcomes = (torch.rand(2001, generator=generator, dtype=torch.float64) < chance).double()
    result = length_controlled_win_rate(outcomes, differences)
    assert outcomes.mean() > 0.6
    assert result.win_rate == pytest.approx(0.5, abs=0.04)


def test_interval_has_the_width_of_the_binomial_when_length_says_nothing() -> None:
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.0] * 200)
    differences = torch.tensor([1.0, 1.0, -1.0, -1.0] * 200)
    result = length_controlled_win_rate(outcomes, differences)
    assert result.win_rate == pytest.approx(0.5, abs=1e-6)
    half = 1.959964 / math.sqrt(800 * 0.25)  # in theta: 1 / sqrt(n p (1 - p))
    assert result.high == pytest.approx(1 / (1 + math.exp(-half)), abs=1e-4)
    assert result.low == pytest.approx(1 - result.high, abs=1e-9)
    narrow = length_controlled_win_rate(outcomes, differences, confidence=0.5)
    assert result.low < narrow.low < narrow.high < result.high


def test_equal_differences_leave_the_plain_win_rate() -> None:
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 10)
    result = length_controlled_win_rate(outcomes, torch.full((40,), 12.0))
    assert result.win_rate == pytest.approx(0.75, abs=1e-3)
    assert result.length_coefficient == 0.0


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_all_wins_and_all_losses_stay_finite(outcome: float) -> None:
    differences = torch.linspace(-3, 9, 100)
    result = length_controlled_win_rate(torch.full((100,), outcome), differences)
    assert abs(result.win_rate - outcome) < 0.02
    assert math.isfinite(result.length_coefficient)
    assert 0 <= result.low <= result.win_rate <= result.high <= 1


def test_separable_outcomes_stay_finite() -> None:
    differences = torch.linspace(-1, 1, 100)
    result = length_controlled_win_rate((differences > 0).float(), differences)
    assert result.win_rate == pytest.approx(0.5, abs=1e-6)
    assert 5 < result.length_coefficient < 1000


def test_logistic_fit_is_where_the_gradient_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    outcomes = torch.rand(50, generator=generator, dtype=torch.float64)
    weights, covariance = fit_logistic(features, outcomes, ridge=0.3)
    weights.requires_grad_()

    def loss(w: Tensor) -> Tensor:
        p = (features @ w).sigmoid()
        log_loss = -(outcomes * p.log() + (1 - outcomes) * (1 - p).log()).sum()
        return log_loss + 0.15 * (w**2).sum()

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    assert float(gradient.abs().max()) < 1e-7
    hessian = torch.autograd.functional.hessian(loss, weights.detach())
    torch.testing.assert_close(covariance, torch.linalg.inv(hessian))


class BiasedJudge:
    """Reports as a chat judge does."""

    def __init__(self) -> None:
        self.total = JudgeReport(pairs=100, disagreements=100, pairs_parsed_twice=100)

    def __call__(
        self, prompts: Sequence[Prompt], a: Sequence[Completion], b: Sequence[Completion]
    ) -> Tensor:
        self.total += JudgeReport(
            pairs=len(prompts), disagreements=1, pairs_parsed_twice=len(prompts)
        )
        return torch.full((len(prompts),), 0.5)

    def report(self) -> JudgeReport:
        return self.total


def test_position_bias_is_that_of_these_pairs_only() -> None:
    result = win_rate(BiasedJudge(), ["p"] * 4, ["a"] * 4, ["b"] * 4)
    assert result.position_bias is not None
    assert result.position_bias.pairs == 4
    assert result.position_bias.order_disagreement == 0.25


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="0 prompts"):
        win_rate(fixed([]), [], [], [])
    with pytest.raises(ValueError, match="2 prompts, 1 completions and 2 references"):
        win_rate(fixed([1.0]), ["p", "q"], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"judge must give .* got \[2\.0\]"):
        win_rate(fixed([2.0]), ["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="judge must give"):
        win_rate(fixed([1.0, 0.0]), ["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="judge must give"):
        win_rate(fixed([math.nan]), ["p"], ["a"], ["b"])
    with pytest.raises(ValueError, match="ridge"):
        fit_logistic(torch.ones(1, 1), torch.ones(1), ridge=0.0)
