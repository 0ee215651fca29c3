import json
import math
from collections.abc import Sequence
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, PreferenceRow, Prompt
from trueward.evaluate.preferences import (
    bootstrap_interval,
    evaluate_preferences,
    mean_interval,
    pair_rewards,
    preference_accuracy,
    wilson_interval,
)
from trueward.posterior import RewardPosterior

# --- Intervals ----------------------------------------------------------------------------------


def test_wilson_interval_golden() -> None:
    # 8 of 10 (Wilson score, two-sided 95 %): 0.4902 to 0.9433.
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("successes", "trials"), [(3, 7), (402.5, 805), (1, 100)])
def test_wilson_ends_lie_z_standard_errors_from_the_share(
    successes: int | float, trials: int, confidence: float
) -> None:
    # The definition: p0 is an end iff |p - p0| = z sqrt(p0 (1 - p0) / n).
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    interval = wilson_interval(successes, trials, confidence=confidence)
    assert interval.low < successes / trials < interval.high
    for end in interval:
        distance = abs(successes / trials - end)
        assert distance == pytest.approx(z * math.sqrt(end * (1 - end) / trials))


def test_wilson_interval_stays_in_the_unit_interval() -> None:
    assert 0.0 <= wilson_interval(0, 5).low < 1e-12
    assert 1.0 >= wilson_interval(5, 5).high > 1 - 1e-12
    assert 0 < wilson_interval(5, 5).low < 1


def test_mean_interval_golden() -> None:
    # t(.975, 4) = 2.776445, s = sqrt(2.5).
    low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (low, high) == (pytest.approx(3 - half, abs=1e-6), pytest.approx(3 + half, abs=1e-6))


@pytest.mark.parametrize(
    ("degrees", "confidence", "quantile"),
    [
        (1, 0.95, 12.706205),
        (2, 0.95, 4.302653),
        (3, 0.95, 3.182446),
        (7, 0.99, 3.499483),
        (10, 0.90, 1.812461),
        (30, 0.95, 2.042272),
        (101, 0.95, 1.983731),
        (200_000, 0.95, 1.959964),
    ],
)
def test_mean_interval_has_the_quantiles_of_student_s_tables(
    degrees: int, confidence: float, quantile: float
) -> None:
    values = torch.zeros(degrees + 1, dtype=torch.float64)
    values[0] = 1.0
    mean, n = 1 / (degrees + 1), degrees + 1
    standard_error = math.sqrt((mean - mean**2) * n / degrees / n)
    half = mean_interval(values, confidence=confidence).high - mean
    assert half / standard_error == pytest.approx(quantile, rel=2e-5)


def test_mean_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 5, generator=generator, dtype=torch.float64) * 3 + 7
    covered = [mean_interval(row, confidence=0.9) for row in draws]
    share = sum(interval.low < 7 < interval.high for interval in covered) / 2000
    assert share == pytest.approx(0.9, abs=0.02)


def test_bootstrap_interval_is_near_the_normal_one_for_many_values() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 2
    low, high = bootstrap_interval(values)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.02)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.02)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow.low < narrow.high < high
    assert (narrow.high - narrow.low) / (high - low) == pytest.approx(0.6745 / 1.96, abs=0.05)


def test_bootstrap_interval_repeats_with_its_seed() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == bootstrap_interval(values, seed=0)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert bootstrap_interval(torch.ones(3)) == (1.0, 1.0)


# --- Accuracy -----------------------------------------------------------------------------------


def test_accuracy_counts_ties_half() -> None:
    result = preference_accuracy(
        torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, -1.0])
    )
    assert (result.accuracy, result.ties, result.pairs) == (2.5 / 4, 1, 4)
    assert (result.low, result.high) == wilson_interval(2.5, 4)


def test_accuracy_of_swapped_sides_is_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 101, generator=generator).round()
    there, back = preference_accuracy(chosen, rejected), preference_accuracy(rejected, chosen)
    assert there.accuracy + back.accuracy == pytest.approx(1.0)
    assert there.low + back.high == pytest.approx(1.0)
    assert there.ties == back.ties > 0


# --- evaluate_preferences -----------------------------------------------------------------------

REWARDS = {"a": 2.0, "b": 1.0, "bb": 1.0, "ccc": -1.0}


def length_and_table(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
    return torch.tensor([REWARDS[str(completion)] for completion in completions])


def rows(*pairs: tuple[str, str], subsets: Sequence[str | None] | None = None) -> list:
    names = subsets or [None] * len(pairs)
    return [
        PreferenceRow(
            prompt=f"p{i}",
            chosen=chosen,
            rejected=rejected,
            where=f"file:{i + 1}",
            extra={} if name is None else {"subset": name},
        )
        for i, ((chosen, rejected), name) in enumerate(zip(pairs, names, strict=True))
    ]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_metrics_of_a_plain_reward_by_hand() -> None:
    # Margins 1, 0, -3, 3.
    data = rows(("a", "b"), ("b", "bb"), ("ccc", "a"), ("a", "ccc"), subsets=["x", "y", "x", None])
    metrics = evaluate_preferences(length_and_table, data)
    margins = [1.0, 0.0, -3.0, 3.0]
    probabilities = [sigmoid(m) for m in margins]
    everything = [2, 1, 1, 1, -1, 2, 2, -1]
    mean = sum(everything) / 8
    low, high = wilson_interval(2.5, 4)
    # Confidence in the winner: .73 (right), .5 (half right), .95 (wrong), .95 (right).
    ece = (abs(1 - sigmoid(1)) + 0 + 2 * abs(0.5 - sigmoid(3))) / 4
    scale = math.log(99) / 3
    ece_scaled = (abs(1 - sigmoid(scale)) + 0 + 2 * abs(0.5 - 0.99)) / 4
    expected = {
        "accuracy": 2.5 / 4,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": 1,
        "pairs": 4,
        "unordered_rows": 0,
        "margin": 0.25,
        "mean_reward": mean,
        "std_reward": math.sqrt(sum((r - mean) ** 2 for r in everything) / 8),
        "ece": ece,
        "ece_scaled": ece_scaled,
        "brier": sum((1 - p) ** 2 for p in probabilities) / 4,
        "nll": sum(-math.log(p) for p in probabilities) / 4,
        "accuracy_longer": 1.5 / 4,  # lengths 1-1, 1-2, 3-1, 1-3
        "accuracy/x": 0.5,
        "accuracy/y": 0.5,
    }
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert all(type(value) in (int, float) for value in metrics.values())


def test_metrics_of_an_ensemble_by_hand() -> None:
    # Two members, two pairs, in the order chosen, rejected, chosen, rejected.
    posterior = RewardPosterior(
        torch.tensor([[3.0, 1.0], [0.0, 0.0], [1.0, 5.0], [2.0, 1.0]]),
        torch.tensor([[0.5, 1.0], [0.5, 2.0], [0.25, 1.0], [0.75, 1.0]]),
    )
    metrics = evaluate_preferences(lambda prompts, completions: posterior, rows(*[("a", "b")] * 2))
    # Member margins: (3, 1) and (-1, 4).
    assert metrics["accuracy_member_min"] == 0.5
    assert metrics["accuracy_member_max"] == 1.0
    assert metrics["between_member_std"] == pytest.approx((1 + 0 + 2 + 0.5) / 4)
    assert metrics["member_std"] == pytest.approx((0.5 + 1 + 0.5 + 2 + 0.25 + 1 + 0.75 + 1) / 8)
    assert (metrics["member_std_min"], metrics["member_std_max"]) == (0.25, 2.0)
    assert (metrics["member_std/0"], metrics["member_std/1"]) == (0.5, 1.25)
    assert metrics["margin"] == pytest.approx((2 + 1.5) / 2)
    # Std of the margin: sqrt(1 + 2.75), sqrt(6.25 + 1.3125); the second has the smaller margin.
    assert metrics["std_error_spearman"] == pytest.approx(1.0)


def test_margin_std_cancels_what_a_member_adds_to_both_sides() -> None:
    # Member offsets make between-member std large everywhere; only pair 0 has uncertain order.
    means = torch.tensor([[10.0, -10.0], [12.0, -12.0], [10.0, -10.0], [7.0, -13.0]])
    metrics = evaluate_preferences(
        lambda prompts, completions: RewardPosterior(means), rows(*[("a", "b")] * 2)
    )
    # Margins (-2, 2) -> mean 0, std 2; (3, 3) -> mean 3, std 0: uncertain where it errs.
    assert metrics["std_error_spearman"] == pytest.approx(1.0)
    assert metrics["between_member_std"] == pytest.approx((10 + 12 + 10 + 10) / 4)


@pytest.mark.parametrize("side", [0, 1])
def test_margin_std_takes_in_the_stds_of_both_sides(side: int) -> None:
    # One member, margins 3, 1, -1: the more wrong, the wider one of its two sides.
    means = torch.tensor([[3.0], [0.0], [1.0], [0.0], [-1.0], [0.0]])
    stds = torch.full((6, 1), 0.1)
    stds[side::2, 0] = torch.tensor([0.2, 0.3, 0.4])
    metrics = evaluate_preferences(
        lambda prompts, completions: RewardPosterior(means, stds), rows(*[("a", "b")] * 3)
    )
    assert metrics["std_error_spearman"] == pytest.approx(1.0)


def test_uncertainty_metrics_are_left_out_where_there_is_none() -> None:
    metrics = evaluate_preferences(length_and_table, rows(("a", "b"), ("a", "ccc")))
    assert not [name for name in metrics if "member" in name or "std_error" in name]
    constant = evaluate_preferences(
        lambda prompts, completions: RewardPosterior(
            torch.arange(4.0)[:, None].flip(0), torch.ones(4, 1)
        ),
        rows(("a", "b"), ("a", "ccc")),
    )
    assert constant["member_std"] == 1.0
    assert "std_error_spearman" not in constant
    json.dumps(constant, allow_nan=False)


def test_objective_decides_the_reward() -> None:
    posterior = RewardPosterior(torch.tensor([[4.0, -2.0], [0.0, 0.5]]))

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        return posterior

    assert evaluate_preferences(score, rows(("a", "b")))["margin"] == pytest.approx(0.75)
    robust = evaluate_preferences(score, rows(("a", "b")), objective=objectives.worst_case)
    assert robust["margin"] == pytest.approx(-2.0)
    assert robust["accuracy"] == 0.0


def test_sides_of_a_pair_are_scored_next_to_each_other_in_one_call() -> None:
    calls = []

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
        calls.append(list(zip(prompts, completions, strict=True)))
        return torch.zeros(len(completions))

    evaluate_preferences(score, rows(("a", "b"), ("bb", "ccc")))
    assert calls == [[("p0", "a"), ("p0", "b"), ("p1", "bb"), ("p1", "ccc")]]


def test_rows_marked_as_ties_are_counted_and_left_out() -> None:
    data = rows(("a", "b"), ("ccc", "a"))
    data[1].extra["tie"] = True
    metrics = evaluate_preferences(length_and_table, data)
    assert (metrics["accuracy"], metrics["pairs"], metrics["unordered_rows"]) == (1.0, 1, 1)
    with pytest.raises(ValueError, match="all marked as ties"):
        evaluate_preferences(length_and_table, data[1:])


def test_bins_and_confidence_are_passed_on() -> None:
    data = rows(("a", "b"), ("ccc", "a"), ("b", "ccc"))
    default = evaluate_preferences(length_and_table, data)
    assert evaluate_preferences(length_and_table, data, bins=1)["ece"] != default["ece"]
    wide = evaluate_preferences(length_and_table, data, confidence=0.99)
    assert wide["accuracy_low"] < default["accuracy_low"]


def test_conversations_are_scored_as_they_are_and_measured_by_their_text() -> None:
    row = PreferenceRow(
        prompt=[{"role": "user", "content": "hello"}],
        chosen=[{"role": "assistant", "content": "long answer"}],
        rejected=[{"role": "assistant", "content": "short"}],
    )
    seen = []

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        seen.extend(completions)
        return [1.0, 0.0]

    metrics = evaluate_preferences(score, [row])
    assert seen == [row.chosen, row.rejected]
    assert (metrics["accuracy"], metrics["accuracy_longer"]) == (1.0, 1.0)


def test_pair_rewards_come_back_in_order() -> None:
    first, second = pair_rewards(length_and_table, ["p", "q"], ["a", "ccc"], ["b", "bb"])
    assert (first.tolist(), second.tolist()) == ([2.0, -1.0], [1.0, 1.0])


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="at least one row, got none"):
        evaluate_preferences(length_and_table, [])
    data = rows(("a", "b"), ("a", "b"), ("a", "b"))
    broken = torch.tensor([0.0, 1.0, 2.0, math.nan, math.inf, 0.0])
    with pytest.raises(ValueError, match=r"2 of 6 rewards .* first for file:2"):
        evaluate_preferences(lambda prompts, completions: broken, data)
    with pytest.raises(ValueError, match="pair 2"):
        pair_rewards(lambda prompts, completions: broken, ["p"] * 3, ["a"] * 3, ["b"] * 3)
    with pytest.raises(ValueError, match="2 prompts, 1 and 2 completions"):
        pair_rewards(length_and_table, ["p", "q"], ["a"], ["b", "bb"])
    with pytest.raises(ValueError, match="at least one prompt"):
        pair_rewards(length_and_table, [], [], [])
    with pytest.raises(ValueError, match="objective must return one reward"):
        evaluate_preferences(length_and_table, data, objective=lambda posterior: torch.zeros(2))
    with pytest.raises(ValueError, match="objective made NaN"):
        evaluate_preferences(
            length_and_table, data, objective=lambda posterior: posterior.mean * math.nan
        )
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\).*95"):
        wilson_interval(1, 2, confidence=95.0)
    with pytest.raises(ValueError, match="at least 2 values"):
        mean_interval(torch.ones(1))
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval(torch.ones(1), resamples=0)
    with pytest.raises(ValueError, match="at least 1 value is"):
        preference_accuracy(torch.ones(0), torch.ones(0))
