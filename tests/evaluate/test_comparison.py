import dataclasses
import math
import random

import pytest
import torch

from trueward.evaluate.calibration import expected_calibration_error
from trueward.evaluate.comparison import (
    MOST_RMS,
    MethodFit,
    MethodRuns,
    SeedRun,
    fit_law,
    kl_name,
    over_seeds,
    peak_place,
    peaks_at_end,
    pooled_reliability,
    summarise,
    win_rates,
)
from trueward.evaluate.overoptimization import OveroptimizationLaw, best_of_n_law, rl_law

T3 = 4.302652729696142  # 97.5 % quantiles of Student's t, 2 degrees of freedom
T2 = 12.706204736432095  # and 1
NAN = math.nan


def points(golds: list[float], **extra: list[float]) -> list[dict[str, float]]:
    """A point for each gold at the steps 0, 10, 20, ..."""
    made = [{"step": 10.0 * i, "gold": gold} for i, gold in enumerate(golds)]
    for key, values in extra.items():
        for point, value in zip(made, values, strict=True):
            point[key.replace("kl_", "kl/")] = value
    return made


def method(
    *curves: list[float], name: str = "a", optimiser: str = "rloo", first_seed: int = 0
) -> MethodRuns:
    runs = [
        SeedRun(seed=first_seed + i, points=points(golds), seconds=10.0 * (i + 1))
        for i, golds in enumerate(curves)
    ]
    return MethodRuns(name=name, label=name.upper(), optimiser=optimiser, runs=runs)


def with_runs(base: MethodRuns, **changes: list) -> MethodRuns:
    """The method with a field of each run replaced: a value for each seed."""
    runs = base.runs
    for key, values in changes.items():
        runs = [dataclasses.replace(r, **{key: v}) for r, v in zip(runs, values, strict=True)]
    return dataclasses.replace(base, runs=runs)


# --- means over seeds ---


def test_a_mean_over_seeds_and_its_interval_by_hand() -> None:
    first, second = over_seeds(method([0.0, 1.0], [0.0, 2.0], [0.0, 6.0]))
    assert (first.place, second.place) == (0.0, 10.0)
    assert (first.gold.mean, first.gold.low, first.gold.high) == (0.0, 0.0, 0.0)
    assert second.gold.mean == pytest.approx(3.0)
    half = T3 * math.sqrt(7.0 / 3)  # the variance of 1, 2, 6 with ddof 1 is 7
    assert second.gold.half_width == pytest.approx(half, rel=1e-6)
    assert second.gold.low == pytest.approx(3.0 - half, rel=1e-6)
    assert (second.gold.seeds, second.gold.over_prompts) == (3, False)
    assert second.means == {"step": 10.0, "gold": pytest.approx(3.0)}
    assert math.isnan(second.proxy.mean)


def test_one_seed_has_an_interval_over_prompts_and_says_so() -> None:
    base = method([0.0, 1.0])
    run = dataclasses.replace(base.runs[0], points=points([0.0, 1.0], gold_sem=[0.1, 0.2]))
    found = over_seeds(dataclasses.replace(base, runs=[run]))[1].gold
    assert (found.low, found.high) == (pytest.approx(1 - 0.392), pytest.approx(1 + 0.392))
    assert found.over_prompts
    assert found.seeds == 1
    without = over_seeds(base)[1].gold
    assert without.mean == 1.0
    assert math.isnan(without.low)
    assert not without.over_prompts


def test_figures_draw_the_range_of_few_seeds_and_the_interval_of_five() -> None:
    few = over_seeds(method(*([0.0, g] for g in (1.0, 2.0, 6.0, 3.0))))[1].gold
    assert (few.lowest, few.highest) == (1.0, 6.0)
    assert few.band == (1.0, 6.0)
    assert few.low < 1.0  # the interval is wider
    five = over_seeds(method(*([0.0, g] for g in (1.0, 2.0, 6.0, 3.0, 3.0))))[1].gold
    assert five.band == (five.low, five.high)
    assert five.high == pytest.approx(3.0 + 2.776445 * math.sqrt(3.5 / 5))  # below 6
    assert five.highest == 6.0
    alone = over_seeds(method([0.0, 1.0]))[1].gold
    assert (alone.lowest, alone.highest) == (1.0, 1.0)
    assert all(map(math.isnan, alone.band))
    base = method([0.0])
    run = dataclasses.replace(base.runs[0], points=points([1.0], gold_sem=[0.1]))
    over_prompts = over_seeds(dataclasses.replace(base, runs=[run]))[0].gold
    assert over_prompts.band == (pytest.approx(1 - 0.196), pytest.approx(1 + 0.196))


def test_a_seed_without_a_value_is_left_out_of_that_place_alone() -> None:
    base = method([0.0, 1.0], [0.0, NAN], [0.0, 3.0])
    first, second = over_seeds(base)
    assert (first.gold.seeds, second.gold.seeds) == (3, 2)
    assert second.gold.mean == pytest.approx(2.0)
    assert second.gold.half_width == pytest.approx(T2, rel=1e-6)  # s = sqrt 2 over sqrt 2
    lone = with_runs(
        base, points=[points([0.0, 1.0], spread=[0.5, 0.7]), *[points([0.0, 1.0])] * 2]
    )
    assert [p.means["spread"] for p in over_seeds(lone)] == [0.5, 0.7]
    assert math.isnan(over_seeds(method([NAN], [NAN]))[0].gold.mean)


def test_a_method_without_runs_has_no_points() -> None:
    assert over_seeds(method()) == []


def test_seeds_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(ValueError, match=r"method 'a' has other places in seed 1 than in seed 0"):
        over_seeds(method([0.0, 1.0], [0.0, 1.0, 2.0]))
    moved = method([0.0, 1.0], [0.0, 1.0])
    moved.runs[1].points[1]["step"] = 11.0
    with pytest.raises(ValueError, match=r"in seed 1 .* \(2 up to 11 and 2 up to 10\)"):
        summarise(moved)
    twice = with_runs(method([0.0], [0.0]), seed=[4, 4])
    with pytest.raises(ValueError, match="seed 4 twice"):
        over_seeds(twice)
    lost = with_runs(method([0.0]), points=[[{"gold": 1.0}]])
    with pytest.raises(ValueError, match="have no place: give one of step, n, 1/beta"):
        over_seeds(lost)


# --- the peak ---


def test_the_peak_is_the_mean_curves_not_the_mean_of_the_seeds_own() -> None:
    # Each seed is lucky at another step; together they are highest at step 10.
    noisy = method([0.0, 2.0, 3.0, 0.0], [0.0, 3.0, 0.0, 3.0], [3.5, 2.0, 0.0, 0.0])
    found = summarise(noisy)
    assert (found.peak_place, found.place_name) == (10.0, "step")
    assert found.gold_peak.mean == pytest.approx(7 / 3)
    assert found.gold_peak.mean < (3 + 3 + 3.5) / 3
    assert peak_place(noisy) == 10.0
    assert not peaks_at_end(noisy)
    assert not found.peaks_at_end


def test_of_equal_places_the_first_is_the_peak_and_nan_never_is() -> None:
    assert peak_place(method([0.0, 2.0, NAN, 2.0])) == 10.0
    rising = method([0.0, 1.0, 2.0], [0.0, 3.0, 4.0])
    assert peaks_at_end(rising)
    assert summarise(rising).peaks_at_end
    with pytest.raises(ValueError, match="method 'a' has no gold reward"):
        peak_place(method([NAN, NAN]))
    with pytest.raises(ValueError, match="method 'a' has no gold reward"):
        summarise(method())


def test_the_place_may_be_n_or_one_over_beta() -> None:
    for key in ("n", "1/beta"):
        run = SeedRun(
            seed=0, points=[{key: 1.0, "gold": 0.0}, {key: 4.0, "gold": 1.0}], seconds=1.0
        )
        found = summarise(MethodRuns(name="a", label="", optimiser="best_of_n", runs=[run]))
        assert (found.place_name, found.peak_place) == (key, 4.0)


# --- the row of the table ---


def test_the_drop_is_paired_by_seed() -> None:
    # Seeds differ by 10, but each falls by about 1: the drop is known far better than its ends.
    found = summarise(method([0.0, 12.0, 11.0], [0.0, 2.0, 1.0], [0.0, 7.0, 5.7]))
    assert found.peak_place == 10.0
    assert found.drop.mean == pytest.approx(1.1)
    assert found.drop.half_width == pytest.approx(T3 * 0.1, rel=1e-6)  # of 1, 1, 1.3
    assert found.gold_end.half_width > 10
    assert (found.gold_start.mean, found.gold_peak.mean) == (0.0, pytest.approx(7.0))


def test_the_baseline_is_subtracted_over_common_seeds_only() -> None:
    base = method([0.0, 1.0], [0.0, 2.0], [0.0, 3.0], name="base")
    other = method([0.0, 4.0], [0.0, 5.5], [0.0, 99.0], name="other", first_seed=1)
    found = summarise(other, base).less_baseline
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(2.25), 2)  # 4 - 2 and 5.5 - 3
    assert found.half_width == pytest.approx(T2 * 0.25, rel=1e-6)
    assert summarise(base, base).less_baseline is None
    assert summarise(base).less_baseline is None
    apart = summarise(other, method([0.0, 1.0], name="base", first_seed=50)).less_baseline
    assert apart is not None
    assert math.isnan(apart.mean)
    assert apart.seeds == 0


def test_a_summary_takes_the_exact_kl_before_k1_and_reads_the_rest_where_it_should() -> None:
    extra = {
        "kl_k1": [0.0, 1.0, 2.0],
        "proxy": [0.0, 5.0, 9.0],
        "length": [8.0, 9.0, 12.0],
        "spread": [0.3, 0.4, 0.8],
        "agreement": [0.8, 0.7, 0.55],
    }
    curve = [0.0, 2.0, 1.0]
    estimated = with_runs(method(curve), points=[points(curve, **extra)])
    found = summarise(estimated)
    assert (found.kl_name, found.kl_peak, found.kl_end) == ("kl/k1", 1.0, 2.0)
    assert (found.proxy_end.mean, found.length_end) == (9.0, 12.0)
    assert (found.spread_start, found.spread_end) == (0.3, 0.8)
    assert (found.agreement_start, found.agreement_end) == (0.8, 0.55)
    exact = with_runs(
        method(curve, curve), points=[points(curve, **extra, kl_exact=[0.0, 1.5, 2.5])] * 2
    )
    found = summarise(exact)
    assert (found.kl_name, found.kl_peak, found.kl_end) == ("kl/exact", 1.5, 2.5)
    assert (found.seconds_mean, found.seconds_max, found.seeds) == (15.0, 20.0, 2)
    bare = summarise(method(curve))
    assert bare.kl_name == ""
    assert all(math.isnan(v) for v in (bare.kl_peak, bare.kl_end, bare.spread_end))


def test_the_best_known_kl_is_the_exact_one_then_the_bound_then_k1() -> None:
    curve = [0.0, 2.0]
    every = {"kl_exact": [0.0, 1.0], "kl_bound": [0.0, 1.2], "kl_k1": [0.0, 0.9]}
    for wanted in ("kl_exact", "kl_bound", "kl_k1"):
        found = with_runs(method(curve), points=[points(curve, **every)])
        assert kl_name(found) == wanted.replace("_", "/")
        assert summarise(found).kl_end == every[wanted][1]
        del every[wanted]
    unknown = with_runs(method(curve), points=[points(curve, kl_exact=[NAN, NAN], kl_k2=curve)])
    assert kl_name(unknown) == ""


# --- the laws ---

KL = [0.0, 0.5, 1.0, 3.0, 6.0, 10.0]


def fitted(optimiser: str, gold: list[float], kl: list[float]) -> MethodRuns:
    """Two seeds whose mean is exactly `gold`."""
    shifts = ([g + 0.3 for g in gold], [g - 0.3 for g in gold])
    base = method(gold, gold, optimiser=optimiser)
    return with_runs(base, points=[points(own, kl_exact=kl) for own in shifts])


@pytest.mark.parametrize("optimiser", ["rloo", "ppo", "grpo", "closed_form"])
def test_the_law_of_reinforcement_learning_is_found_again_above_the_reference(
    optimiser: str,
) -> None:
    law = rl_law(torch.tensor(KL, dtype=torch.float64), alpha=1.1, beta=0.5)
    fit = fit_law(fitted(optimiser, (law - 2.0).tolist(), KL))
    assert fit is not None
    assert (fit.law.alpha, fit.law.beta) == (pytest.approx(1.1), pytest.approx(0.5))
    assert fit.initial_gold == pytest.approx(-2.0)
    assert fit.peak_gold == pytest.approx(-2.0 + 0.5 * math.exp(1.1 / 0.5 - 1))
    assert fit.gold_at([0.0, 4.0]) == pytest.approx([-2, -2 + 2 * (1.1 - 0.5 * math.log(2))])


def test_best_of_n_has_its_own_law() -> None:
    gold = best_of_n_law(torch.tensor(KL, dtype=torch.float64), alpha=1.4, beta=0.35).tolist()
    fit = fit_law(fitted("best_of_n", gold, KL))
    assert fit is not None
    assert (fit.law.alpha, fit.law.beta) == (pytest.approx(1.4), pytest.approx(0.35))
    assert fit.law.peak_kl == pytest.approx(4.0)
    assert fit.gold_at([4.0]) == pytest.approx([2 * (1.4 - 0.7)])


def test_a_law_passes_over_points_without_a_kl_and_is_none_where_it_cannot_be_fitted() -> None:
    law = rl_law(torch.tensor(KL, dtype=torch.float64), alpha=1.1, beta=0.5).tolist()
    holed = fit_law(fitted("rloo", [*law[:3], 99.0, *law[4:]], [*KL[:3], NAN, *KL[4:]]))
    assert holed is not None
    assert holed.law.alpha == pytest.approx(1.1)
    assert fit_law(fitted("rloo", [0.0, 1.0, 2.0], [0.0, 1.0, 1.0])) is None
    assert fit_law(fitted("rloo", [NAN, 1.0, 2.0], [0.0, 1.0, 2.0])) is None
    assert fit_law(method([0.0, 1.0, 2.0])) is None
    assert fit_law(method()) is None


@pytest.mark.parametrize(
    ("alpha", "beta", "rms", "expected"),
    [
        (1.0, 0.5, 0.4, True),  # 20 % of the range of 2
        (1.0, 0.5, 0.41, False),
        (-0.1, 0.5, 0.0, False),  # never rises
        (1.0, -0.1, 0.0, False),  # never falls
        (0.0, 0.5, 0.0, False),
        (1.0, 0.0, 0.0, False),
    ],
)
def test_a_law_describes_a_curve_that_rises_falls_and_lies_near_it(
    alpha: float, beta: float, rms: float, expected: bool
) -> None:
    law = OveroptimizationLaw(alpha=alpha, beta=beta, peak_kl=1.0, peak_gold=1.0, rms_error=rms)
    fit = MethodFit(law=law, initial_gold=0.0, best_of_n=False, gold_range=2.0)
    assert MOST_RMS == 0.2
    assert fit.describes is expected


def test_a_fitted_law_knows_the_range_of_its_curve() -> None:
    gold = [0.0, 1.0, -1.0, 1.0, -1.0, 2.0]
    zigzag = fit_law(fitted("rloo", gold, KL))
    assert zigzag is not None
    assert zigzag.gold_range == pytest.approx(3.0)
    assert not zigzag.describes
    law = rl_law(torch.tensor(KL, dtype=torch.float64), alpha=1.1, beta=0.5)
    exact = fit_law(fitted("rloo", law.tolist(), KL))
    assert exact is not None
    assert exact.gold_range == pytest.approx(float(law.max()))
    assert exact.describes


# --- win rates ---


def test_win_rates_by_hand_ties_as_half_over_common_seeds() -> None:
    a = with_runs(method([0.0], [0.0]), final_gold=[[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    b = with_runs(
        method([0.0], [0.0], [0.0], name="b"),
        final_gold=[[0.0, 2.0, 5.0, 0.0], [0.0, 0.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0]],
    )
    c = method([0.0], name="c")
    rates = win_rates([a, b, c])
    assert rates.names == ("a", "b", "c")
    # Seed 0: win, tie, loss, win; seed 1: three wins and a tie; seed 2 is b's alone.
    assert float(rates.mean[0, 1]) == pytest.approx((0.625 + 0.875) / 2)
    assert float(rates.mean[1, 0]) == pytest.approx(0.25)
    assert rates.mean.diagonal()[:2].tolist() == [0.5, 0.5]
    assert rates.seeds.tolist() == [[2, 2, 0], [2, 3, 0], [0, 0, 0]]
    assert bool(rates.mean[2].isnan().all() and rates.mean[:, 2].isnan().all())
    assert bool(rates.low.isnan().all() and rates.high.isnan().all())  # of two seeds


def test_win_rates_of_three_seeds_have_an_interval_within_0_and_1() -> None:
    a = with_runs(method(*[[0.0]] * 3), final_gold=[[1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    b = with_runs(method(*[[0.0]] * 3, name="b"), final_gold=[[0.0, 0.0]] * 3)
    rates = win_rates([a, b])
    # 1, 1, 1/2: mean 5/6, s / sqrt 3 = 1/6, and t 4.303.
    assert float(rates.mean[0, 1]) == pytest.approx(5 / 6)
    assert float(rates.low[0, 1]) == pytest.approx(5 / 6 - T3 / 6, rel=1e-6)
    assert float(rates.high[0, 1]) == 1.0
    assert (float(rates.low[1, 0]), float(rates.high[1, 0])) == (
        0.0,
        pytest.approx(1 / 6 + T3 / 6, rel=1e-6),
    )


def test_win_rates_have_mirrored_intervals_and_leave_out_nan() -> None:
    generator = random.Random(0)
    golds = [[[generator.gauss(m, 1) for _ in range(400)] for _ in range(5)] for m in (0.0, 0.3)]
    a, b = (
        with_runs(method(*[[0.0]] * 5, name=n), final_gold=g)
        for n, g in zip("ab", golds, strict=True)
    )
    rates = win_rates([a, b])
    # P(N(0.3, 2) > 0) = Phi(0.3 / sqrt 2) = 0.584
    assert float(rates.mean[1, 0]) == pytest.approx(0.584, abs=0.03)
    assert 0 < float(rates.low[1, 0]) < float(rates.mean[1, 0]) < float(rates.high[1, 0]) < 1
    assert float(rates.low[0, 1]) == pytest.approx(1 - float(rates.high[1, 0]))
    one = with_runs(method([0.0]), final_gold=[[1.0, NAN, 3.0]])
    other = with_runs(method([0.0], name="b"), final_gold=[[0.0, 5.0, 4.0]])
    assert float(win_rates([one, other]).mean[0, 1]) == pytest.approx(0.5)


def test_win_rates_need_the_same_prompts() -> None:
    one = with_runs(method([0.0]), final_gold=[[1.0, 2.0]])
    other = with_runs(method([0.0], name="b"), final_gold=[[1.0]])
    with pytest.raises(ValueError, match=r"'b' and 'a' must answer the same prompts.* seed 0"):
        win_rates([one, other])


# --- reliability ---


def test_reliability_pools_the_pairs_and_means_the_accuracy_over_seeds() -> None:
    base = with_runs(
        method([0.0], [0.0], [0.0]),
        probabilities=[[0.9, 0.2, 0.5, 0.6], [0.8, 0.1], []],
        outcomes=[[True, True, False, True], [True, False], []],
    )
    found = pooled_reliability(base, bins=5)
    assert found is not None
    assert found.pairs == 6
    # Right, wrong, undecided, right; then twice right.
    assert found.accuracy.mean == pytest.approx((0.625 + 1.0) / 2)
    assert found.accuracy.seeds == 2
    assert found.curve.count.tolist() == [1, 1, 1, 1, 2]
    pooled = torch.tensor([0.9, 0.2, 0.5, 0.6, 0.8, 0.1], dtype=torch.float64)
    happened = torch.tensor([1.0, 1, 0, 1, 1, 0], dtype=torch.float64)
    assert found.ece == pytest.approx(expected_calibration_error(pooled, happened, bins=5))
    assert found.brier == pytest.approx((0.01 + 0.64 + 0.25 + 0.16 + 0.04 + 0.01) / 6)


def test_reliability_is_none_without_pairs_and_names_the_seed_that_does_not_fit() -> None:
    assert pooled_reliability(method([0.0])) is None
    wrong = with_runs(method([0.0], first_seed=7), probabilities=[[0.5, 0.6]], outcomes=[[True]])
    with pytest.raises(
        ValueError, match="as many outcomes as probabilities in seed 7, got 1 and 2"
    ):
        pooled_reliability(wrong)


def test_what_a_reward_tells_of_whose_answers_is_a_mean_over_seeds_paired_with_the_baseline() -> (
    None
):
    def told(*shares: float, name: str, own: list[float]) -> MethodRuns:
        made = method(*([[0.0, 1.0]] * len(shares)), name=name)
        runs = [
            dataclasses.replace(
                run,
                agreements={"moved": share},
                points=points([0.0, 1.0], agreement=[0.5, value], win_rate=[0.5, 0.6]),
            )
            for run, share, value in zip(made.runs, shares, own, strict=True)
        ]
        return dataclasses.replace(made, runs=runs)

    one = told(0.6, 0.8, name="one", own=[0.7, 0.9])
    other = told(0.5, 0.6, name="other", own=[0.9, 0.9])
    found = summarise(one, other)
    assert found.agreements["moved"].mean == pytest.approx(0.7)
    assert found.agreements["own"].mean == pytest.approx(0.8)  # of the last point
    assert found.win_rate_end.mean == pytest.approx(0.6)
    less = found.agreements_less_baseline["moved"]
    assert less.mean == pytest.approx(0.15)  # of 0.1 and 0.2
    assert less.half_width == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert summarise(one).agreements_less_baseline == {}
    assert summarise(method([0.0, 1.0])).agreements == {}
    bare = dataclasses.replace(one, runs=[dataclasses.replace(one.runs[0], points=points([1.0]))])
    assert set(summarise(bare).agreements) == {"moved"}  # best-of-n has no policy of its own
