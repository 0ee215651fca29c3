import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, PreferenceRow, Prompt, text_of
from trueward.evaluate.calibration import uncertainty_auroc
from trueward.evaluate.diagnosis import (
    Diagnosis,
    diagnose,
    mean_pairwise_correlation,
    measured_spearman,
    member_spread,
    nominal_member,
    own_std_distribution,
    paired_auroc,
    reliability_bins,
    uncertainties,
)
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.verdicts import Measured, collapsed_std_verdict
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_texts

Score = Callable[[Sequence[Prompt], Sequence[Completion]], RewardPosterior]


def table_reward(texts: Sequence[str], means: Tensor, stds: Tensor | None = None) -> Score:
    """A reward that looks a completion's text up."""
    places = {text: i for i, text in enumerate(texts)}

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        rows = torch.tensor([places[text_of(completion)] for completion in completions])
        return RewardPosterior(means[rows], stds[rows] if stds is not None else None)

    return score


def named(pairs: int) -> tuple[list[PreferenceRow], list[str], list[str]]:
    """Rows, the texts of their chosen, then rejected completions, and foreign completions."""
    rows = [PreferenceRow(prompt=f"p{i}", chosen=f"c{i}", rejected=f"r{i}") for i in range(pairs)]
    sides = [row.chosen for row in rows] + [row.rejected for row in rows]
    return rows, [text_of(side) for side in sides], [f"o{i}" for i in range(pairs)]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagnosed(
    chosen: Tensor,
    rejected: Tensor,
    foreign: Tensor | None = None,
    *,
    stds: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | None = None,
    **options: Any,
) -> Diagnosis:
    """The diagnosis of given means (and stds) of the sides and of foreign completions."""
    rows, sides, others = named(len(chosen))
    given = {"foreign": others} if foreign is not None else {}
    means = torch.cat([chosen, rejected, *([foreign] if foreign is not None else [])])
    reward = table_reward(sides + others, means, torch.cat(stds) if stds is not None else None)
    return diagnose(reward, rows, out_of_distribution=given, **options)


def sentence(diagnosis: Diagnosis, words: str) -> str:
    [found] = [verdict for verdict in diagnosis.verdicts if words in verdict]
    return found


# --- Out-of-distribution completions ------------------------------------------------------------


def test_auroc_is_one_where_each_uncertainty_rises_on_every_foreign_completion() -> None:
    # Signs that sum to 0: the std between the members of a row is its factor.
    signs = torch.tensor([1.0, -1.0]).double()
    inside, outside = 0.1 + draws(30, 1).abs(), 5 + draws(30, 1, seed=1).abs()
    diagnosis = diagnosed(
        1 + inside * signs,
        inside * signs,
        outside * signs,
        stds=(inside.expand(30, 2), inside.expand(30, 2), outside.expand(30, 2)),
    )
    for name in ("between", "own", "total"):
        auroc = diagnosis.uncertainties[name].auroc["foreign"]
        assert (auroc.value, auroc.low, auroc.high) == (1.0, 1.0, 1.0)
    assert "rises on every kind" in sentence(diagnosis, "The total std rises")


def test_auroc_is_one_half_for_a_constant_and_no_signal() -> None:
    ones = torch.ones(30, 2).double()
    means = draws(30, 2)
    diagnosis = diagnosed(means + 1, means, draws(30, 2, seed=1), stds=(ones, ones, ones))
    auroc = diagnosis.uncertainties["own"].auroc["foreign"]
    assert (auroc.value, auroc.low, auroc.high) == (0.5, 0.5, 0.5)
    found = sentence(diagnosis, "The members' own std is no better than chance")
    assert "AUROC foreign 0.50" in found
    assert diagnosis.uncertainties["own"].error_correlation is None


def test_each_uncertainty_is_told_apart_from_the_others() -> None:
    # Between members all rises, of the members' own stds all falls.
    signs = torch.tensor([1.0, -1.0]).double()
    means, stds = 0.1 * signs + draws(20, 1), torch.ones(20, 2).double()
    diagnosis = diagnosed(
        means, means - 1, 0.5 * signs + draws(20, 1, seed=1), stds=(stds, stds, 0.1 * stds)
    )
    values = {name: s.auroc["foreign"].value for name, s in diagnosis.uncertainties.items()}
    assert values == {"between": 1.0, "own": 0.0, "total": 0.0}  # 1.01 against .26


def test_paired_auroc_by_hand() -> None:
    inside, outside = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    # Above each inside one: 3, 2.5, 1.5 of 3; below each outside one: 1.5, 2.5, 3.
    value = 7 / 9
    shares = [3 / 3 + 1.5 / 3 - value, 2.5 / 3 + 2.5 / 3 - value, 1.5 / 3 + 3 / 3 - value]
    half = 4.302653 * np.std(shares, ddof=1) / math.sqrt(3)
    found = paired_auroc(inside, outside)
    assert found.value == pytest.approx(value) == uncertainty_auroc(inside, outside)
    assert found.low == pytest.approx(value - half, abs=1e-6)
    assert (found.high, value + half > 1) == (1.0, True)
    assert paired_auroc(inside[:1], outside[:1]) == Measured(value=1.0, low=0.0, high=1.0)


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_paired_auroc_covers_the_truth_as_often_as_it_says(shared: float) -> None:
    # out = in + .5 in the mean, both of unit variance: AUROC = Phi(.5 / sqrt 2) for other pairs.
    truth = 0.5 * (1 + math.erf(0.5 / 2))
    noise = draws(3, 500, 60)
    inside = math.sqrt(shared) * noise[0] + math.sqrt(1 - shared) * noise[1]
    outside = math.sqrt(shared) * noise[0] + math.sqrt(1 - shared) * noise[2] + 0.5
    found = [paired_auroc(a, b, 0.9) for a, b in zip(inside, outside, strict=True)]
    assert np.mean([m.low <= truth <= m.high for m in found]) == pytest.approx(0.9, abs=0.035)


def test_the_reward_s_own_view_of_foreign_completions() -> None:
    diagnosis = diagnosed(
        torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        torch.zeros(4, 1),
        torch.tensor([[5.0], [2.0], [0.0], [0.0]]),
    )
    kind = diagnosis.out_of_distribution["foreign"]
    assert (kind.completions, kind.unchanged, kind.preferred) == (4, 0, 1.5 / 4)


def test_unchanged_completions_are_counted_and_left_out() -> None:
    rows, sides, others = named(4)
    means = torch.tensor([[0.0, 1], [0, 2], [0, 3], [0, 4]] * 3)
    means[8:] += torch.tensor([0.0, 10])
    reward = table_reward(sides + others, means)
    same = [sides[0], *others[1:3], sides[3]]
    diagnosis = diagnose(reward, rows, out_of_distribution={"mixed": same, "same": sides[:4]})
    mixed = diagnosis.out_of_distribution["mixed"]
    assert (mixed.completions, mixed.unchanged) == (2, 2)
    assert diagnosis.uncertainties["between"].auroc["mixed"].value == 1.0
    nothing = diagnosis.out_of_distribution["same"]
    assert (nothing.completions, nothing.unchanged, nothing.preferred) == (0, 4, None)
    assert "same" not in diagnosis.uncertainties["between"].auroc


def test_rows_without_a_completion_of_a_kind_are_counted_and_left_out() -> None:
    rows, sides, others = named(5)
    rows[4].extra["tie"] = True
    # Of the rows with a completion, the first has a lower std outside, the third a higher one.
    means = torch.zeros(15, 2)
    means[:, 1] = torch.tensor([3.0, 9, 1, 9, 9, 0, 0, 0, 0, 0, 2, 9, 4, 9, 9])
    reward = table_reward(sides + others, means)
    given = [others[0], None, others[2], sides[3], None]
    diagnosis = diagnose(reward, rows, out_of_distribution={"some": given})
    kind = diagnosis.out_of_distribution["some"]
    assert (kind.completions, kind.unchanged, kind.overlong, kind.missing) == (2, 1, 0, 1)
    # Stds outside 1 and 2, inside 1.5 and 0.5: three of the four comparisons are won.
    assert diagnosis.uncertainties["between"].auroc["some"].value == 0.75
    assert kind.preferred == 0.5
    nothing = diagnose(reward, rows, out_of_distribution={"none": [None] * 5})
    assert nothing.out_of_distribution["none"].missing == 4
    assert nothing.out_of_distribution["none"].preferred is None


def test_completions_that_do_not_fit_are_counted_and_left_out() -> None:
    rows, sides, others = named(3)
    asked: list[Completion] = []

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        asked.extend(completions)
        return table_reward(sides + others, torch.arange(18.0).view(9, 2))(prompts, completions)

    diagnosis = diagnose(
        score,
        rows,
        out_of_distribution={"foreign": others},
        fits=lambda prompt, completion: (prompt, completion) != ("p1", "o1"),
    )
    kind = diagnosis.out_of_distribution["foreign"]
    assert (kind.completions, kind.overlong) == (2, 1)
    assert "o1" not in asked


def test_given_completions_belong_to_the_rows_with_ties_among_them() -> None:
    rows, sides, others = named(4)
    rows[1].extra["tie"] = True
    means = torch.arange(12.0)[:, None] * torch.tensor([1.0, 2.0])
    asked: list[tuple[Prompt, Completion]] = []

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        asked.extend(zip(prompts, completions, strict=True))
        return table_reward(sides + others, means)(prompts, completions)

    diagnosis = diagnose(score, rows, out_of_distribution={"foreign": others})
    assert diagnosis.pairs == 3
    assert asked[6:] == [("p0", "o0"), ("p2", "o2"), ("p3", "o3")]


# --- Error --------------------------------------------------------------------------------------


def test_spearman_interval_by_hand() -> None:
    # r = .5 of 28 values: z = .549306 ± 1.959964 sqrt(1.125 / 25).
    ranks = torch.arange(28.0)
    others = ranks.clone()
    # Rank distances must sum (squared) to (1 - .5) 28 (28^2 - 1) / 6 = 1827.
    generator = torch.Generator().manual_seed(0)
    while float((others - ranks).square().sum()) != 1828:  # even sums only: r = .49973
        others = (ranks + 9 * torch.randn(28, generator=generator)).argsort().argsort().float()
    r = 1 - 6 * 1828 / (28 * (28**2 - 1))
    found = measured_spearman(ranks, others)
    assert found is not None
    half = 1.959964 * math.sqrt((1 + r**2 / 2) / 25)
    assert found.value == pytest.approx(r)
    assert found.low == pytest.approx(math.tanh(math.atanh(r) - half), abs=1e-6)
    assert found.high == pytest.approx(math.tanh(math.atanh(r) + half), abs=1e-6)


def test_spearman_interval_at_its_limits() -> None:
    x = torch.arange(10.0)
    perfect = measured_spearman(x, x)
    assert perfect is not None
    assert (perfect.value, perfect.low > 0.999, perfect.high) == (1.0, True, pytest.approx(1.0))
    assert measured_spearman(x, torch.ones(10)) is None
    assert measured_spearman(x[:1], x[:1]) is None
    assert measured_spearman(x[:3], x[:3]) == Measured(value=1.0, low=-1.0, high=1.0)


@pytest.mark.parametrize("binary", [False, True])
def test_spearman_interval_covers_zero_as_often_as_it_says(binary: bool) -> None:
    noise = draws(2, 500, 60, seed=2)
    y = (noise[1] > 0.8).double() if binary else noise[1]
    found = [measured_spearman(a, b, 0.9) for a, b in zip(noise[0], y, strict=True)]
    covered = [m.low <= 0 <= m.high for m in found if m is not None]
    assert len(covered) == 500
    assert np.mean(covered) == pytest.approx(0.9, abs=0.035)


def ensemble_of_known_noise(pairs: int = 3000) -> Diagnosis:
    """Five members about one that errs with the same std as they have, which differs by pair."""
    scale = 0.1 + 2 * torch.rand(
        pairs, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    mean = 1 + draws(pairs, 1) + scale * draws(pairs, 1, seed=1)
    members = mean + scale * draws(pairs, 5, seed=2)
    return diagnosed(members, torch.zeros(pairs, 5).double())


def test_noise_of_known_size_shows_in_wrong_orders_and_not_in_graded_errors() -> None:
    diagnosis = ensemble_of_known_noise()
    signal = diagnosis.uncertainties["between"]
    assert signal.error_correlation is not None
    assert signal.wrong_correlation is not None
    assert signal.error_correlation.low < 0 < signal.error_correlation.high
    assert signal.wrong_correlation.low > 0.05
    assert "is larger where the reward errs" in sentence(diagnosis, "with a wrong order")


def test_error_and_its_correlation_are_those_of_evaluate_preferences() -> None:
    rows, sides, _ = named(50)
    stds = draws(100, 3, seed=4).abs()
    reward = table_reward(sides, draws(100, 3), stds)
    for objective in (objectives.mean, objectives.worst_case):
        metrics = evaluate_preferences(reward, rows, objective=objective)
        diagnosis = diagnose(reward, rows, out_of_distribution={}, objective=objective)
        error = diagnosis.uncertainties["total"].error_correlation
        assert error is not None
        assert error.value == pytest.approx(metrics["std_error_spearman"])
        assert dataclasses.astuple(diagnosis.accuracy) == (
            metrics["accuracy"],
            metrics["accuracy_low"],
            metrics["accuracy_high"],
        )
        assert (diagnosis.ece, diagnosis.brier) == (metrics["ece"], metrics["brier"])


def test_an_uncertainty_drawn_at_random_is_unrelated_to_error() -> None:
    stds = draws(400, 1, seed=5).abs()
    diagnosis = diagnosed(draws(200, 1) + 1, draws(200, 1, seed=1), stds=(stds[:200], stds[200:]))
    assert "is unrelated to error" in sentence(diagnosis, "The members' own std is")


def test_an_uncertainty_that_falls_with_error_misleads() -> None:
    margins = draws(200, 1) + 0.5
    stds = torch.exp(margins) / math.sqrt(2)
    diagnosis = diagnosed(margins, torch.zeros(200, 1).double(), stds=(stds, stds))
    signal = diagnosis.uncertainties["own"]
    assert signal.error_correlation is not None
    assert signal.error_correlation.value == pytest.approx(-1.0)
    assert signal.wrong_correlation is not None
    assert signal.wrong_correlation.high < 0
    assert "misleads" in sentence(diagnosis, "smaller where the reward errs")


def test_reliability_by_hand() -> None:
    # |margins| with probabilities .55, .58, .9, and a tie at .5: bins 8 (.533 to .6), 13 and 7.
    logits = [math.log(p / (1 - p)) for p in (0.55, 0.58, 0.9)]
    found = reliability_bins(torch.tensor([logits[0], -logits[1], logits[2], 0.0]).double())
    assert len(found) == 15
    filled = {i: b for i, b in enumerate(found) if b.count}
    assert {i: b.count for i, b in filled.items()} == {7: 1, 8: 2, 13: 1}
    assert filled[7].frequency == 0.5
    assert (filled[8].confidence, filled[8].frequency) == (pytest.approx(0.565), 0.5)
    assert (filled[13].confidence, filled[13].frequency) == (pytest.approx(0.9), 1.0)
    assert (found[0].confidence, found[0].frequency) == (None, None)
    assert found[0].centre == pytest.approx(1 / 30)


def test_the_ece_is_the_mean_gap_of_the_reliability() -> None:
    diagnosis = diagnosed(draws(80, 3) + 0.5, draws(80, 3, seed=1))
    curve = diagnosis.reliability_curve
    full = curve.count > 0
    gaps = (curve.frequency - curve.confidence)[full].abs() * curve.count[full]
    assert float(gaps.sum() / 80) == pytest.approx(diagnosis.ece)
    assert bool(curve.frequency[~full].isnan().all())
    assert diagnosis.metrics["ece"] == diagnosis.ece
    assert diagnosis.metrics["margin"] > 0


def test_quantiles_are_of_the_stds_of_single_completions() -> None:
    # Members (0, 2k) have std k: of 0 to 40, each quantile is twice its step of 5 %.
    means = torch.stack([torch.zeros(41), 2 * torch.arange(41.0)], dim=1).double()
    stds = torch.full((41, 2), 0.5).double()
    diagnosis = diagnosed(means, means, stds=(stds, stds))
    between = diagnosis.uncertainties["between"].quantiles
    # 0, 0, 1, 1, ..., 40, 40: at share q the value at place 81 q of them.
    expected = np.quantile(np.repeat(np.arange(41.0), 2), np.arange(21) / 20)
    assert list(between) == pytest.approx(expected.tolist())
    assert list(diagnosis.uncertainties["own"].quantiles) == [0.5] * 21


# --- Members ------------------------------------------------------------------------------------


def test_correlation_of_members_agrees_with_numpy() -> None:
    values = draws(40, 4) + draws(40, 1, seed=1)
    expected = np.corrcoef(values.T.numpy())[np.triu_indices(4, 1)].mean()
    assert mean_pairwise_correlation(values) == pytest.approx(expected)
    moved = torch.cat([values * torch.tensor([1.0, 5, 0.1, 2]) + 1000, torch.ones(40, 1)], dim=1)
    assert mean_pairwise_correlation(moved) == pytest.approx(expected)
    assert mean_pairwise_correlation(moved[:, 3:]) is None


def test_correlations_are_of_the_means_and_of_the_errors() -> None:
    chosen, rejected = draws(50, 2), draws(50, 2, seed=1)
    diagnosis = diagnosed(chosen, rejected)
    means = np.corrcoef(torch.cat([chosen, rejected]).T.numpy())[0, 1]
    errors = np.corrcoef(1 - (chosen - rejected).sigmoid().T.numpy())[0, 1]
    assert diagnosis.member_correlation == pytest.approx(means)
    assert diagnosis.member_error_correlation == pytest.approx(errors)


def test_member_spread_by_hand() -> None:
    # Margins (1, 3) and (-1, -1): variances 1 and 0, means 2 and -1.
    margins = RewardPosterior(torch.tensor([[1.0, 3.0], [-1.0, -1.0]]))
    assert member_spread(margins) == pytest.approx(math.sqrt(0.5) / math.sqrt(2.5))
    assert member_spread(RewardPosterior(torch.tensor([[1.0, -1.0]]))) is None


@pytest.mark.parametrize("correlation", [0.9, 0.99, 0.999])
def test_the_two_thresholds_of_identical_members_are_one(correlation: float) -> None:
    # Unit variance, correlation r: spread^2 = (1 - r)(K - 1)/K over r + (1 - r)/K, of margins.
    margins = math.sqrt(correlation) * draws(20_000, 1)
    margins = margins + math.sqrt(1 - correlation) * draws(20_000, 5, seed=1)
    spread = member_spread(RewardPosterior(margins))
    assert mean_pairwise_correlation(margins) == pytest.approx(correlation, rel=0.01)
    assert spread == pytest.approx(math.sqrt((1 - correlation) * 0.8), rel=0.1)


def test_equal_members_have_no_uncertainty_whatever_their_mean_s_rounding() -> None:
    chosen, rejected, foreign = (draws(50, 1, seed=i).expand(50, 3) for i in range(3))
    assert bool((RewardPosterior(chosen.contiguous()).std > 0).any())  # rounding is there
    diagnosis = diagnosed(chosen + 1, rejected, 100 * foreign)
    assert diagnosis.member_correlation == pytest.approx(1.0)
    assert diagnosis.member_error_correlation == pytest.approx(1.0)
    assert diagnosis.member_spread == pytest.approx(0.0, abs=1e-12)
    signal = diagnosis.uncertainties["between"]
    assert (signal.auroc["foreign"].value, signal.error_correlation) == (0.5, None)
    assert "nearly identical" in sentence(diagnosis, "correlate at 1.00")


def test_members_that_differ_in_scale_or_in_prompts_offsets_are_identical_too() -> None:
    chosen, rejected = draws(50, 1), draws(50, 1, seed=1)
    factors = torch.tensor([1.0, 3.0]).double()
    scaled = diagnosed(chosen * factors, rejected * factors)
    assert scaled.member_spread is not None
    assert scaled.member_spread == pytest.approx(0.5)
    assert "nearly identical" in sentence(scaled, "correlate")
    offsets = 5 * draws(50, 2, seed=2)
    moved = diagnosed(chosen + offsets, rejected + offsets)
    assert moved.member_correlation is not None
    assert moved.member_correlation < 0.5
    assert moved.member_spread == pytest.approx(0.0, abs=1e-12)
    assert "nearly identical" in sentence(moved, "correlate")
    differing = diagnosed(chosen + draws(50, 2, seed=3), rejected.expand(50, 2))
    assert "Members differ" in sentence(differing, "correlate")


# --- Own stds -----------------------------------------------------------------------------------


def test_own_stds_by_hand() -> None:
    stds = torch.stack([torch.arange(1.0, 12.0), torch.full((11,), 4.0)], dim=1).double()
    found = own_std_distribution(stds)
    assert found.quantiles["0%"] == 1.0
    assert found.quantiles["50%"] == 4.0
    assert found.quantiles["100%"] == 11.0
    assert found.member_means == [6.0, 4.0]
    assert found.ratio == pytest.approx((10 / 2 + 1) / 2)  # the median of two members
    assert found.at_floor == pytest.approx(12 / 22)


def test_constant_stds_of_different_members_have_collapsed() -> None:
    stds = torch.tensor([0.01, 1.0, 5.0]).double().expand(50, 3)
    diagnosis = diagnosed(draws(50, 3), draws(50, 3, seed=1), stds=(stds, stds))
    assert diagnosis.own_stds is not None
    assert diagnosis.own_stds.ratio == pytest.approx(1.0)
    assert diagnosis.own_stds.quantiles["90%"] == 5.0
    assert "90 % to 10 % ratio 1.00, 100% at the smallest" in sentence(diagnosis, "collapsed to")


def test_stds_at_their_floor_have_collapsed_even_if_some_are_above() -> None:
    stds = torch.full((100, 2), math.exp(-5)).double()
    stds[:30] = 1 + draws(30, 2).abs()
    found = own_std_distribution(stds)
    assert found.ratio is not None
    assert found.ratio > 100
    assert found.at_floor == pytest.approx(0.7)
    assert "have collapsed" in collapsed_std_verdict(found.ratio, found.at_floor)


def test_zero_stds_have_collapsed_and_zero_to_something_is_infinite() -> None:
    assert own_std_distribution(torch.zeros(10, 2).double()).ratio == 1.0
    some = torch.zeros(10, 1).double()
    some[5:] = torch.arange(1.0, 6.0)[:, None]
    found = own_std_distribution(some)
    assert (found.ratio, found.at_floor) == (None, 0.5)
    assert "infinite" in collapsed_std_verdict(found.ratio, found.at_floor)


# --- The nominal member -------------------------------------------------------------------------


def test_nominal_member_by_hand() -> None:
    # Chosen then rejected; nominal: member 1 (2.0) against member 0 (1.0), then 0 (0.0) and 0.
    sides = RewardPosterior(
        torch.tensor([[0.0, 2.0], [1.0, 3.0], [0.0, 5.0], [0.0, 1.0]]),
        torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]),
    )
    found = nominal_member(sides)
    assert found.shares == [0.75, 0.25]
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert found.entropy == pytest.approx(entropy)
    assert found.accuracy == (1 + 0.5) / 2
    # Pair 1: 0>1, 0>3, 2>1, 2>3: one right of four; pair 2: 0=0, 0>1, 5>0, 5>1: 2.5 of 4.
    assert found.random_accuracy == (0.25 + 0.625) / 2
    assert found.member_accuracy == (0 + 0 + 0.5 + 1) / 4
    assert found.gain.value == pytest.approx((0.75 - 0.125) / 2)
    half = 12.706205 * np.std([0.75, -0.125], ddof=1) / math.sqrt(2)
    assert found.gain.high == pytest.approx((0.75 - 0.125) / 2 + half, abs=1e-5)


def sides_with_one_good_member(known: str) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen, rejected and stds: at each completion one of four members errs little."""
    good = torch.randint(4, (2400,), generator=torch.Generator().manual_seed(0))
    noise = torch.full((2400, 4), 3.0).double()
    noise[torch.arange(2400), good] = 0.1
    truth = torch.cat([torch.ones(1200, 1), torch.zeros(1200, 1)]).double()
    means = truth + noise * draws(2400, 4, seed=1)
    stds = {"right": noise, "wrong": 1 / noise, "random": draws(2400, 4, seed=2).abs()}[known]
    return means[:1200], means[1200:], stds


@pytest.mark.parametrize(
    ("known", "words"),
    [("right", "better one to ask"), ("random", "as if at random"), ("wrong", "worse one to ask")],
)
def test_whether_the_lowest_std_picks_the_better_member(known: str, words: str) -> None:
    chosen, rejected, stds = sides_with_one_good_member(known)
    diagnosis = diagnosed(chosen, rejected, stds=(stds[:1200], stds[1200:]))
    assert diagnosis.nominal is not None
    assert words in sentence(diagnosis, "against a random member")
    if known == "random":
        assert abs(diagnosis.nominal.gain.value) < 0.05
        assert diagnosis.nominal.entropy == pytest.approx(1.0, abs=0.01)
    if known == "right":
        assert diagnosis.nominal.accuracy > 0.99


def test_one_member_that_is_always_nominal_is_named_as_such() -> None:
    stds = torch.tensor([1.0, 0.5, 2.0]).double().expand(30, 3)
    diagnosis = diagnosed(draws(30, 3) + 1, draws(30, 3, seed=1), stds=(stds, stds))
    assert diagnosis.nominal is not None
    assert (diagnosis.nominal.shares, diagnosis.nominal.entropy) == ([0.0, 1.0, 0.0], 0.0)
    assert "One member is nominal for 100%" in sentence(diagnosis, "against a random member")


# --- The whole ----------------------------------------------------------------------------------


def test_a_scalar_reward_has_no_uncertainty_and_says_so() -> None:
    diagnosis = diagnosed(draws(20, 1) + 1, draws(20, 1, seed=1), draws(20, 1, seed=2))
    assert diagnosis.uncertainties == {}
    assert (diagnosis.member_correlation, diagnosis.member_spread) == (None, None)
    assert (diagnosis.own_stds, diagnosis.nominal) == (None, None)
    [only] = diagnosis.verdicts
    assert only.startswith("There is one member alone")
    assert "no uncertainty at all" in only
    assert diagnosis.out_of_distribution["foreign"].completions == 20


def test_uncertainties_are_those_there_are() -> None:
    means, stds = draws(5, 2), draws(5, 2, seed=1).abs()
    both = uncertainties(RewardPosterior(means, stds))
    torch.testing.assert_close(both["between"], means.std(dim=1, correction=0))
    torch.testing.assert_close(both["own"], stds.mean(dim=1))
    squares = means.var(dim=1, correction=0) + stds.square().mean(dim=1)
    torch.testing.assert_close(both["total"], squares.sqrt())
    assert list(uncertainties(RewardPosterior(means))) == ["between"]
    assert list(uncertainties(RewardPosterior(means[:, :1], stds[:, :1]))) == ["own"]


def hashed(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
    """A reward and stds that hang on the prompt's and the completion's texts alone."""
    rows = [
        draws(8, seed=sum(ord(c) * (i + 1) for i, c in enumerate(text_of(p) + "|" + text_of(y))))
        for p, y in zip(prompts, completions, strict=True)
    ]
    values = torch.stack(rows)
    return RewardPosterior(values[:, :4], values[:, 4:].abs())


def tiny_rows(pairs: int = 40, *, messages: bool = False) -> list[PreferenceRow]:
    texts = tiny_texts(3 * pairs, seed=9, words=(4, 12))
    rows = []
    for i in range(pairs):
        prompt, *sides = texts[3 * i : 3 * i + 3]
        row = PreferenceRow(prompt=prompt, chosen=sides[0], rejected=sides[1])
        if messages:
            row = PreferenceRow(
                prompt=[{"role": "user", "content": prompt}],
                chosen=[{"role": "assistant", "content": sides[0]}],
                rejected=[{"role": "assistant", "content": sides[1]}],
            )
        rows.append(row)
    return rows


def numbers(diagnosis: Diagnosis) -> dict[str, Any]:
    """All numbers by their path."""
    found: dict[str, Any] = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}/{key}", inner)
        elif isinstance(value, list):
            walk(path, dict(enumerate(value)))
        else:
            found[path] = value

    walk("", dataclasses.asdict(diagnosis))
    return found


def test_the_default_kinds_are_asked_of_strings_and_of_messages() -> None:
    diagnosis = diagnose(hashed, tiny_rows())
    assert list(diagnosis.out_of_distribution) == [
        "shuffled",
        "repeated",
        "repeated x4",
        "mismatched",
        "truncated",
    ]
    assert all(kind.completions == 40 for kind in diagnosis.out_of_distribution.values())
    in_messages = diagnose(hashed, tiny_rows(messages=True))
    assert in_messages.accuracy == diagnosis.accuracy
    assert in_messages.own_stds == diagnosis.own_stds
    assert all(kind.completions == 40 for kind in in_messages.out_of_distribution.values())
    json.dumps(dataclasses.asdict(diagnosis), allow_nan=False)


def test_the_seed_decides_what_is_made_and_nothing_else() -> None:
    rows = tiny_rows()
    diagnosis = numbers(diagnose(hashed, rows, seed=1))
    assert diagnosis == numbers(diagnose(hashed, rows, seed=1))
    other = numbers(diagnose(hashed, rows, seed=2))
    differing = [path for path in diagnosis if diagnosis[path] != other[path]]
    assert differing
    assert all("auroc" in path or "preferred" in path for path in differing)


def test_order_of_rows_does_not_matter() -> None:
    rows = tiny_rows()
    moved = [rows[(7 * i) % 40] for i in range(40)]
    assert numbers(diagnose(hashed, moved)) == pytest.approx(numbers(diagnose(hashed, rows)))


def test_order_of_members_and_a_constant_for_all_do_not_matter() -> None:
    rows = tiny_rows()
    order = torch.tensor([2, 0, 3, 1])

    def moved(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        posterior = hashed(prompts, completions)
        assert posterior.stds is not None
        return RewardPosterior(posterior.means[:, order] + 8, posterior.stds[:, order])

    expected = diagnose(hashed, rows)
    found = diagnose(moved, rows)
    assert expected.own_stds is not None
    assert found.own_stds is not None
    means = [expected.own_stds.member_means[i] for i in order.tolist()]
    assert list(found.own_stds.member_means) == pytest.approx(means)
    by_member = ("member_means", "shares", "member_std/", "mean_reward")
    ours, theirs = (
        {path: v for path, v in numbers(d).items() if not any(name in path for name in by_member)}
        for d in (expected, found)
    )
    assert theirs == pytest.approx(ours)


def test_members_offsets_change_nothing_that_is_of_pairs() -> None:
    offsets = torch.tensor([0.0, 50.0, -3.0]).double()
    chosen, rejected = draws(40, 3) + 1, draws(40, 3, seed=1)
    # The quantiles are of single completions, as are some of the metrics.
    plain, moved = (
        {path: v for path, v in numbers(found).items() if not re.search("quantiles|metrics", path)}
        for found in (
            diagnosed(chosen, rejected),
            diagnosed(chosen + offsets, rejected + offsets),
        )
    )
    assert moved == pytest.approx(plain)


def test_confidence_widens_every_interval() -> None:
    chosen, rejected, stds = sides_with_one_good_member("random")
    options: dict[str, Any] = {
        "stds": (stds[:1200], stds[1200:], stds[:1200] + draws(1200, 4).abs())
    }
    foreign = draws(1200, 4, seed=7)
    narrow = diagnosed(chosen, rejected, foreign, confidence=0.5, **options)
    wide = diagnosed(chosen, rejected, foreign, confidence=0.99, **options)
    assert narrow.nominal is not None
    assert wide.nominal is not None
    before, after = narrow.uncertainties["total"], wide.uncertainties["total"]
    for a, b in (
        (narrow.accuracy, wide.accuracy),
        (narrow.nominal.gain, wide.nominal.gain),
        (before.error_correlation, after.error_correlation),
        (before.wrong_correlation, after.wrong_correlation),
        (before.auroc["foreign"], after.auroc["foreign"]),
    ):
        assert a is not None
        assert b is not None
        assert a.value == b.value
        assert b.low < a.low < a.high < b.high


def test_one_pair_and_two_are_enough_for_what_can_be_known() -> None:
    one = diagnosed(draws(1, 2), draws(1, 2, seed=1), draws(1, 2, seed=2))
    assert one.uncertainties["between"].error_correlation is None
    auroc = one.uncertainties["between"].auroc["foreign"]
    assert (auroc.low, auroc.high) == (0.0, 1.0)
    stds = draws(6, 2).abs()
    two = diagnosed(
        draws(2, 2), draws(2, 2, seed=1), draws(2, 2, seed=2), stds=(stds[:2], stds[2:4], stds[4:])
    )
    json.dumps(dataclasses.asdict(two), allow_nan=False)
    assert two.verdicts


def test_every_question_has_its_verdict() -> None:
    diagnosis = diagnose(hashed, tiny_rows())
    beginnings = [verdict.split(" (")[0][:24] for verdict in diagnosis.verdicts]
    assert len(beginnings) == 1 + 1 + 3 + 3 + 1  # members, own stds, error, text, nominal
    assert all(verdict.endswith(".") for verdict in diagnosis.verdicts)


# --- Errors -------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    rows = tiny_rows(4)
    with pytest.raises(ValueError, match="at least one row, got none"):
        diagnose(hashed, [])
    with pytest.raises(ValueError, match=r"\['french'\] must give one completion for each of 4"):
        diagnose(hashed, rows, out_of_distribution={"french": ["oui"]})
    with pytest.raises(ValueError, match=r"\['french'\].*got the string 'oui'"):
        diagnose(hashed, rows, out_of_distribution={"french": "oui"})
    with pytest.raises(ValueError, match="answer one prompt"):
        diagnose(hashed, rows[:1])

    def broken(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Tensor:
        return torch.tensor([math.nan if y == "odd" else 1.0 for y in completions])

    with pytest.raises(ValueError, match=r"some rewards of out_of_distribution\['odd'\]"):
        diagnose(broken, rows, out_of_distribution={"odd": ["odd"] * 4})
