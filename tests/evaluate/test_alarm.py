"""The alarm's judgement: peaks, rules and gold by hand; a calibration whose answer is known."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from trueward.evaluate.alarm import (
    Outcome,
    WatchedRun,
    calibrate,
    calibrate_steps,
    gold_by_place,
    halves_agree,
    judge,
    kept_place,
    less,
    over_seeds,
    raised_step,
    score_series,
    smoothed,
    summarise_outcomes,
    true_peak,
)
from trueward.train.alarm import Alarm, Calibration, Unit

HILL = [0.0, 0.6, 1.2, 0.6, -2.0, -6.0]  # smoothed: .3 .6 .8 -.067 -2.47 -4


def run_of(
    gold: list[float] = HILL,
    *,
    every: int = 2,
    signals: dict[str, list[float]] | None = None,
    **options: Any,
) -> WatchedRun:
    places = [every * i for i in range(len(gold))]
    known = {"kl": [float(p) for p in range(places[-1])]}
    values: dict[str, Any] = {"world": "w", "method": "single", "seed": 0, "gold_is_reward": False}
    return WatchedRun(places=places, gold=gold, signals=signals or known, **(values | options))


# ---- the truth ---------------------------------------------------------------------------------


def test_gold_is_smoothed_over_neighbours_and_linear_between_evaluations() -> None:
    assert smoothed([3.0, 0.0, 6.0, 9.0]) == pytest.approx([1.5, 3.0, 5.0, 7.5])
    run = run_of([3.0, 0.0, 6.0, 9.0], every=2)
    assert gold_by_place(run).tolist() == pytest.approx([1.5, 2.25, 3, 4, 5, 6.25, 7.5])


def test_the_true_peak_is_the_highest_smoothed_place() -> None:
    peak = true_peak(run_of(HILL, every=3))
    assert (peak.place, peak.falls) == (6, True)
    assert peak.gold == pytest.approx(0.8)


def test_a_run_that_hardly_falls_has_its_peak_at_the_end() -> None:
    flat = true_peak(run_of([0.0, 1.0, 1.0, 0.9, 0.9, 0.8]))
    assert (flat.place, flat.falls) == (10, False)
    assert flat.gold == pytest.approx((1 + 1 + 0.9) / 3)  # of place 4, which an oracle would take
    assert true_peak(run_of([0.0, 1.0, 2.0, 3.0])) == (6, 2.5, False)


def test_runs_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="as many values of each signal"):
        run_of(signals={"kl": [0.0]})
    with pytest.raises(ValueError, match="in order, from 0 on"):
        WatchedRun(
            world="w",
            method="m",
            seed=0,
            gold_is_reward=False,
            signals={},
            places=[1, 2],
            gold=[0.0, 1.0],
        )
    with pytest.raises(ValueError, match="two places or more"):
        run_of([1.0])
    with pytest.raises(ValueError, match="not finite at every step"):
        run_of([0.0, 1.0], signals={"kl": [0.0, math.nan]})


def test_half_of_the_answers_hits_what_the_other_half_calls_the_peak() -> None:
    def agreement(first: list[float], others: list[float]) -> tuple[float, float]:
        run = run_of(HILL, every=5, halves=list(zip(first, others, strict=True)))
        return halves_agree(run)

    assert agreement(HILL, HILL) == (1.0, 1.0)
    # Smoothed peaks at places 10 and 15: 5 is within a fifth of neither; gold by half differs too.
    later = [0.0, 0.0, 0.6, 1.2, 0.6, -2.0]
    assert smoothed(later).index(max(smoothed(later))) == 3
    assert agreement(HILL, later) == (0.0, 0.0)
    # At 20 and 25, one way around only: 5 is a fifth of 25, a quarter of 20. In gold neither is
    # more than 0.15 below the other's peak.
    assert agreement([0.0, 0.0, 0.0, 0.2, 0.3, 0.05], [0.0, 0.0, 0.0, 0.0, 0.1, 0.3]) == (0.5, 1.0)


# ---- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [None, 0.7])
@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("unit", ["window", "differences", "floor", "raw"])
def test_the_judge_s_alarm_is_the_one_in_the_loop(
    slack: float | None, patience: int, unit: Unit
) -> None:
    g = torch.Generator().manual_seed(3)
    for trial in range(8):
        steps = 30
        walks = {
            name: torch.randn(steps, generator=g).cumsum(0).tolist() for name in ("kl", "length")
        }
        rules = Calibration(
            weights={"kl": 1.0, "length": -0.5},
            floors={"kl": 0.4, "length": 0.7},
            unit=unit,
            window=4,
            patience=patience,
            slack=slack,
            threshold=2.0 + trial,
            rewind=0.75,
        )
        run = run_of([0.0] * 16, signals=walks)
        alarm = Alarm(rules)
        scores = [alarm.update(i + 1, {k: v[i] for k, v in walks.items()}) for i in range(steps)]
        series = score_series(walks, rules)
        assert series[:4].tolist() == [-math.inf] * 4
        assert series[4:].tolist() == pytest.approx(scores[4:])
        assert raised_step(run, rules) == alarm.raised_at
        expected = steps if alarm.raised_at is None else int(0.75 * (alarm.raised_at - 1))
        assert kept_place(run, rules) == expected


def test_an_alarm_on_the_raw_kl_is_a_budget() -> None:
    run = run_of(signals={"kl": [0.0, 1.0, 3.0, 2.0, 5.0, 9.0, 9.0, 9.0, 9.0, 9.0]})

    def budget(nats: float, rewind: float = 1.0) -> tuple[int | None, int]:
        rule = Calibration(weights={"kl": 1.0}, threshold=nats, unit="raw", window=0, rewind=rewind)
        return raised_step(run, rule), kept_place(run, rule)

    assert budget(2.5) == (3, 2)
    assert budget(3.0) == (5, 4)
    assert budget(3.0, 0.75) == (5, 3)
    assert budget(-1.0) == (1, 0)
    assert budget(9.0) == (None, 10)


def test_a_number_of_steps_is_a_rule() -> None:
    run = run_of(HILL)
    assert (raised_step(run, 4), kept_place(run, 4)) == (5, 4)
    assert (raised_step(run, 10), kept_place(run, 10)) == (None, 10)
    assert (raised_step(run, 99), kept_place(run, 99)) == (None, 10)


# ---- calibration -------------------------------------------------------------------------------


def synthetic(seeds: range, *, jump_at: int = 18, falls: bool = True) -> list[WatchedRun]:
    """Runs of 40 steps whose smoothed gold is highest at place 18, where `spread` jumps.

    `length` is noise, `kl` grows by a rate of the run's own whether gold falls or not.
    """
    runs = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, 40, generator=g)
        rate = 0.5 + float(torch.rand(1, generator=g))
        jump = [
            (3.0 if falls and p >= jump_at else 0.0) + 0.1 * float(noise[0, p]) for p in range(40)
        ]
        gold = [0.05 * p if p <= 20 or not falls else 1.0 - 0.5 * (p - 20) for p in range(0, 41, 2)]
        signals = {
            "spread": jump,
            "length": noise[1].tolist(),
            "kl": [rate * p for p in range(40)],
        }
        runs.append(
            run_of(
                gold,
                signals=signals,
                seed=seed,
                gold_is_reward=not falls,
                method="single" if falls else "gold",
            )
        )
    return runs


def test_the_calibration_finds_the_signal_that_knows() -> None:
    runs = synthetic(range(6)) + synthetic(range(6), falls=False)
    oracle = sum(true_peak(r).gold for r in runs[:6]) / 6
    for aim in ("warn", "stop"):
        found = calibrate(runs, signals=["length", "spread"], aim=aim)
        assert isinstance(found.rule, Calibration)
        assert list(found.rule.weights) == ["spread"]
        assert found.false_alarms == 0
        worth = 1 + 1e-6 * oracle if aim == "warn" else oracle
        assert found.worth == pytest.approx(worth, abs=1e-7 if aim == "warn" else 0.03)
        # On other runs: at the peak every time, never where nothing falls.
        assert all(judge(r, found.rule).timing == "hit" for r in synthetic(range(50, 60)))
        calm = [judge(r, found.rule) for r in synthetic(range(50, 60), falls=False)]
        assert not any(o.raised_at for o in calm)
        assert all(o.gold_kept == o.gold_none for o in calm)
    # The rivals are set to the same aim: all runs fall at the same place.
    steps = calibrate_steps(runs)
    assert (steps.rule, steps.worth, steps.false_alarms) == (18, pytest.approx(oracle), 1.0)
    budget = calibrate(runs, signals=["kl"], units=["raw"], max_false_alarms=1.0)
    assert isinstance(budget.rule, Calibration)
    assert (budget.rule.unit, budget.rule.window, budget.rule.slack) == ("raw", 0, None)
    assert budget.worth < oracle - 0.05  # KL grows at a rate of each run's own


def test_an_alarm_that_warns_may_be_late_for_gold_and_one_that_stops_goes_back() -> None:
    # `spread` jumps 6 steps after the peak, where gold is 3 lower; 0.75 of 24 is 18, the peak.
    runs = synthetic(range(4), jump_at=24) + synthetic(range(4), falls=False)
    stop = calibrate(runs, signals=["spread"], aim="stop")
    assert isinstance(stop.rule, Calibration)
    assert stop.rule.rewind == 0.75
    assert stop.worth == pytest.approx(true_peak(runs[0]).gold, abs=0.1)
    outcomes = [judge(r, stop.rule) for r in runs[:4]]
    assert {(o.timing, o.kept) for o in outcomes} == {("late", 18)}
    warn = calibrate(runs, signals=["spread"], aim="warn")
    assert isinstance(warn.rule, Calibration)
    assert warn.rule.rewind == 1.0  # it is about the moment


def test_an_alarm_that_warns_breaks_ties_by_gold() -> None:
    # A steady climb hits the peak at 18 from place 15 to 21: the best of these is 18 itself.
    runs = [
        dataclasses.replace(r, signals={"kl": [float(p) for p in range(40)]})
        for r in synthetic(range(3))
    ]
    found = calibrate(runs, signals=["kl"], units=["floor"], aim="warn")
    assert judge(runs[0], found.rule).raised_at == 19
    assert found.worth == pytest.approx(1 + 1e-6 * true_peak(runs[0]).gold)
    assert calibrate_steps(runs, aim="warn").rule == 18


def test_only_alarms_that_are_raised_in_learned_rewards_runs_are_hits() -> None:
    # The peak is at place 17 of 20: the end, where an alarm is silent, is within a fifth of it.
    gold = [0.1 * p for p in range(19)] + [-1.0, -6.0]
    run = run_of(gold, every=1)
    assert true_peak(run).place == 17
    twin = dataclasses.replace(run, gold_is_reward=True)
    silent = calibrate([run, twin], signals=["kl"], aim="warn")  # any alarm would be a false one
    assert raised_step(run, silent.rule) is None
    assert silent.worth == pytest.approx(1e-6 * -3.5)
    # A gold run that falls by chance is not one to hit.
    calm = dataclasses.replace(twin, signals={"kl": [0.0] * 20})
    assert calibrate([run, calm], signals=["kl"], aim="warn").worth == pytest.approx(1, abs=1e-5)


def test_a_trend_is_a_clock_unless_its_differences_are_the_unit() -> None:
    # The same signal at half and twice the rate, and a jump at a known height of it.
    def run(rate: float) -> WatchedRun:
        kl = [rate * p + 0.1 * (-1) ** p for p in range(40)]
        return run_of([0.0] * 21, signals={"kl": kl})

    def step(rate: float, unit: Unit) -> int | None:
        z = {"window": 8.0, "differences": 60.0, "floor": 60.0}[unit]
        rule = Calibration(weights={"kl": 1.0}, threshold=z, unit=unit, floors={"kl": 0.15})
        return raised_step(run(rate), rule)

    assert [step(rate, "window") for rate in (1.0, 2.0)] == [16, 16]  # whatever the rate
    assert [step(rate, "floor") for rate in (1.0, 2.0)] == [13, 8]  # 9 = 60 x 0.15 above the start


def test_floors_are_pooled_in_their_unit() -> None:
    walks = ([0.0, 1.0, 4.0, 9.0, 9.0], [2.0, 2.0, 5.0, 5.0, 5.0])
    runs = [run_of([0.0, 1.0, -3.0, -3.0, -3.0, -3.0], every=1, signals={"kl": w}) for w in walks]
    found = {
        unit: calibrate(runs, signals=["kl"], units=[unit], window=3).rule
        for unit in ("window", "floor", "differences")
    }
    # Variances of the first three: 13/3 and 3; halved squared differences: (1 + 9)/4 and 9/4.
    std, differences = math.sqrt((13 / 3 + 3) / 2), math.sqrt((10 / 4 + 9 / 4) / 2)
    for unit, expected in (("window", std), ("floor", std), ("differences", differences)):
        rule = found[unit]
        assert isinstance(rule, Calibration)
        assert rule.floors == {"kl": pytest.approx(expected)}


def test_an_alarm_on_noise_is_held_to_its_rate_of_false_alarms() -> None:
    runs = synthetic(range(6)) + synthetic(range(20), falls=False)
    strict = calibrate(runs, signals=["length"], max_false_alarms=0.05)
    loose = calibrate(runs, signals=["length"], max_false_alarms=1.0)
    assert strict.false_alarms <= 0.05
    assert loose.false_alarms > 0.05
    assert loose.worth > strict.worth  # stopping at random is better than never, on these runs
    fresh = [judge(r, strict.rule) for r in synthetic(range(100, 160), falls=False)]
    assert sum(o.raised_at is not None for o in fresh) / 60 < 0.25


def test_each_world_counts_the_same() -> None:
    # Two worlds with a peak at 20 and one at 8; the second is in the majority by runs.
    early = [
        dataclasses.replace(
            r, world="other", gold=[min(p, 16 - p) / 8 for p in range(0, 41, 2)], seed=i
        )
        for i, r in enumerate(synthetic(range(9)))
    ]
    late = [
        dataclasses.replace(r, gold=[10 * min(p, 40 - p) / 20 for p in range(0, 41, 2)])
        for r in synthetic(range(1))
    ]
    # By runs (nine to one) stopping at 8 is better; by worlds the steeper one decides.
    assert calibrate_steps(early + late).rule == 20


def test_runs_of_other_lengths_stand_beside_each_other() -> None:
    short = [
        dataclasses.replace(
            r,
            world="short",
            places=r.places[:16],
            gold=r.gold[:16],
            signals={k: v[:30] for k, v in r.signals.items()},
        )
        for r in synthetic(range(3))
    ]
    found = calibrate(short + synthetic(range(3)), signals=["spread"])
    assert isinstance(found.rule, Calibration)
    for run in short:
        assert judge(run, found.rule).timing == "hit"
    never = dataclasses.replace(found.rule, threshold=1e9)
    assert judge(short[0], never).kept == 30


def test_a_calibration_without_runs_or_signals_is_refused() -> None:
    with pytest.raises(ValueError, match="runs of learned rewards"):
        calibrate(synthetic(range(2), falls=False))
    with pytest.raises(ValueError, match="a signal in common"):
        calibrate(synthetic(range(2)), signals=["drift"])
    with pytest.raises(ValueError, match="more than 40 steps"):
        calibrate(synthetic(range(2)), window=40)
    calm = [dataclasses.replace(r, gold_is_reward=False) for r in synthetic(range(2), falls=False)]
    with pytest.raises(ValueError, match="runs whose gold falls, got none"):
        calibrate(calm, aim="warn")


# ---- judgement ---------------------------------------------------------------------------------


def by_kl(threshold: float, **options: Any) -> Calibration:
    rules = {"weights": {"kl": 1.0}, "window": 2, "floors": {"kl": 1.0}, "threshold": threshold}
    return Calibration(**(rules | options))


def test_an_outcome_by_hand() -> None:
    # KL 0, 1, 2, ... counted from 0.5 with std 1: the score of place p is p - 0.5.
    o = judge(run_of(HILL), by_kl(4.0))  # above 4 at place 5, in step 6
    assert (o.raised_at, o.kept, o.peak, o.falls) == (6, 5, 4, True)
    gold = [0.3, 0.45, 0.6, 0.7, 0.8, (0.8 - 0.2 / 3) / 2]
    assert o.gold_raised == o.gold_kept == pytest.approx(gold[5])
    assert o.gold_start == pytest.approx(gold[0])
    assert o.gold_oracle == pytest.approx(gold[4])
    assert o.gold_none == pytest.approx(-4.0)
    assert o.gain_kept == pytest.approx((gold[5] - 0.3) / 0.5)
    assert (o.timing, o.near_in_gold) == ("late", False)  # one step from 4 is a quarter
    assert judge(run_of(HILL), by_kl(3.0)).timing == "hit"
    early = judge(run_of(HILL), by_kl(2.0))  # place 3: gold 0.7, 0.1 below the peak's
    assert (early.timing, early.near_in_gold) == ("early", True)
    back = judge(run_of(HILL), by_kl(4.0, rewind=0.8))
    assert (back.raised_at, back.kept) == (6, 4)
    assert (back.gold_raised, back.gold_kept) == pytest.approx((gold[5], gold[4]))
    never = judge(run_of(HILL), by_kl(1e9))
    assert (never.timing, never.near_in_gold, never.kept) == ("never", False, 10)
    assert never.gold_raised == never.gold_kept == never.gold_none
    assert judge(run_of(HILL), 3).gold_kept == pytest.approx(gold[3])


def test_a_peak_is_hit_within_a_fifth_on_either_side() -> None:
    base = judge(run_of(HILL), by_kl(3.0))
    far = [dataclasses.replace(base, peak=20, raised_at=r).timing for r in (16, 17, 25, 26)]
    assert far == ["early", "hit", "hit", "late"]
    assert dataclasses.replace(base, falls=False).timing is None
    assert not dataclasses.replace(base, falls=False).near_in_gold


def outcome(seed: int, **options: Any) -> Outcome:
    base: dict[str, Any] = {
        "world": "w",
        "method": "m",
        "gold_is_reward": False,
        "falls": True,
        "peak": 10,
        "raised_at": 11,
        "kept": 10,
        "gold_start": 0.0,
        "gold_raised": 1.9,
        "gold_kept": 1.0,
        "gold_none": -3.0,
        "gold_oracle": 2.0,
    }
    return Outcome(seed=seed, **(base | options))


def test_a_summary_counts_runs_and_compares_in_pairs() -> None:
    ours = [
        outcome(0),
        outcome(1, gold_kept=3.0, gold_none=-4.0, gold_oracle=4.0, raised_at=5),
        outcome(2, gold_kept=2.0, gold_none=-2.0, gold_oracle=3.0, raised_at=None),
        outcome(3, falls=False, gold_kept=2.0, gold_none=-3.0, gold_oracle=3.0),
    ]
    s = summarise_outcomes(ours)
    assert (s.runs, s.falling, s.near_in_gold, s.false) == (4, 3, 1, 1)
    assert s.timings == {"early": 1, "hit": 1, "late": 0, "never": 1}
    assert s.less_none.mean == pytest.approx((4 + 7 + 4 + 5) / 4)
    assert s.less_none.half_width == pytest.approx(3.182446 * math.sqrt(2) / 2, rel=1e-5)
    assert s.less_oracle.mean == pytest.approx(-1.0)
    assert s.less_oracle.half_width == pytest.approx(0.0, abs=1e-12)
    assert s.gain_kept == pytest.approx(2 / 3)
    theirs = [outcome(seed, gold_kept=0.5 * seed) for seed in (3, 2, 1)]  # seed 0 is not there
    assert less(ours, theirs).mean == pytest.approx((2.5 + 1.0 + 0.5) / 3)


def test_a_seed_counts_once_whatever_its_runs() -> None:
    rows = [
        outcome(0, gold_kept=0.0, method="a"),
        outcome(0, gold_kept=2.0, method="b", raised_at=None),
        outcome(1, gold_kept=4.0, method="a"),
    ]
    s = summarise_outcomes(rows)
    assert s.gold_kept.mean == pytest.approx(2.5)
    assert s.gold_kept.seeds == 2
    # One of two in seed 0, one of one in seed 1: not two of three.
    assert s.hit_share.mean == s.near_share.mean == pytest.approx(0.75)
    assert s.hit_share.half_width == pytest.approx(12.7062 * 0.25, rel=1e-4)
    assert math.isnan(s.false_share.mean)
    calm = summarise_outcomes([outcome(0, falls=False), outcome(1, falls=False, raised_at=None)])
    assert calm.false_share.mean == pytest.approx(0.5)
    assert over_seeds([outcome(0), outcome(0, world="v")], lambda o: o.peak).seeds == 2
