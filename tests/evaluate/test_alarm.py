"""The alarm's judgement: peaks, rules and gold by hand; a calibration whose answer is known."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from trueward.evaluate.alarm import (
    Calibrated,
    Outcome,
    WatchedRun,
    alarm_place,
    alarm_step,
    budget_place,
    calibrate,
    gold_by_place,
    judge,
    score_series,
    smoothed,
    summarise_outcomes,
    true_peak,
)
from trueward.train.alarm import Alarm, Calibration

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


# ---- rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [None, 0.7])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_judge_s_alarm_is_the_one_in_the_loop(slack: float | None, patience: int) -> None:
    g = torch.Generator().manual_seed(3)
    for trial in range(8):
        steps = 30
        walks = {
            name: torch.randn(steps, generator=g).cumsum(0).tolist() for name in ("kl", "length")
        }
        rules = Calibration(
            weights={"kl": 1.0, "length": -0.5},
            floors={"kl": 0.4},
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
        assert alarm_step(run, rules) == alarm.raised_at
        expected = steps if alarm.raised_at is None else int(0.75 * (alarm.raised_at - 1))
        assert alarm_place(run, rules) == expected


def test_the_budget_keeps_the_last_policy_within_it() -> None:
    run = run_of(signals={"kl": [0.0, 1.0, 3.0, 2.0, 5.0, 9.0, 9.0, 9.0, 9.0, 9.0]})
    assert budget_place(run, 2.5) == 1
    assert budget_place(run, 3.0) == 3
    assert budget_place(run, 0.0) == 0
    assert budget_place(run, 9.0) == 10


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
    found = calibrate(runs, signals=["length", "spread"])
    assert list(found.alarm.weights) == ["spread"]
    assert found.false_alarms == 0
    oracle = sum(true_peak(r).gold for r in runs[:6]) / 6
    assert found.gold == pytest.approx(oracle, abs=0.03)
    # On other runs: at the peak every time, never where nothing falls.
    judged = [judge(r, found) for r in synthetic(range(50, 60))]
    assert all(o.at_peak for o in judged)
    calm = [judge(r, found) for r in synthetic(range(50, 60), falls=False)]
    assert not any(o.raised_at for o in calm)
    assert all(o.gold_alarm == o.gold_none for o in calm)
    # The rivals are set to the same criterion: all runs fall at the same place.
    assert found.fixed_steps == 18
    assert found.fixed_gold == pytest.approx(oracle)
    assert found.budget_gold < oracle - 0.1  # KL grows at a rate of each run's own


def test_an_alarm_on_noise_is_held_to_its_rate_of_false_alarms() -> None:
    runs = synthetic(range(6)) + synthetic(range(20), falls=False)
    strict = calibrate(runs, signals=["length"], max_false_alarms=0.05)
    loose = calibrate(runs, signals=["length"], max_false_alarms=1.0)
    assert strict.false_alarms <= 0.05
    assert loose.false_alarms > 0.05
    assert loose.gold > strict.gold  # stopping at random is better than never, on these runs
    fresh = [judge(r, strict) for r in synthetic(range(100, 160), falls=False)]
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
    found = calibrate(early + late, signals=["spread"])
    # By runs (nine to one) stopping at 8 is better; by worlds the steeper one decides.
    assert found.fixed_steps == 20


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
    for run in short:
        assert judge(run, found).at_peak
    never = dataclasses.replace(found, alarm=dataclasses.replace(found.alarm, threshold=1e9))
    assert judge(short[0], never).kept == 30


def test_a_calibration_without_runs_or_signals_is_refused() -> None:
    with pytest.raises(ValueError, match="runs of learned rewards"):
        calibrate(synthetic(range(2), falls=False))
    with pytest.raises(ValueError, match="a signal in common"):
        calibrate(synthetic(range(2)), signals=["drift"])
    with pytest.raises(ValueError, match="more than 40 steps"):
        calibrate(synthetic(range(2)), window=40)


# ---- judgement ---------------------------------------------------------------------------------


def found_by_kl(threshold: float, **options: Any) -> Calibrated:
    rules = {"weights": {"kl": 1.0}, "window": 2, "floors": {"kl": 1.0}, "threshold": threshold}
    return Calibrated(
        alarm=Calibration(**(rules | options)),
        gold=0.0,
        false_alarms=0.0,
        kl_budget=4.0,
        budget_gold=0.0,
        fixed_steps=3,
        fixed_gold=0.0,
        candidates=1,
    )


def test_an_outcome_by_hand() -> None:
    # KL 0, 1, 2, ... counted from 0.5 with std 1: the score of place p is p - 0.5.
    o = judge(run_of(HILL), found_by_kl(4.0))  # above 4 at place 5, in step 6
    assert (o.raised_at, o.kept, o.peak, o.falls) == (6, 5, 4, True)
    gold = [0.3, 0.45, 0.6, 0.7, 0.8, (0.8 - 0.2 / 3) / 2]
    assert o.gold_alarm == pytest.approx(gold[5])
    assert o.gold_start == pytest.approx(gold[0])
    assert o.gold_oracle == pytest.approx(gold[4])
    assert o.gold_none == pytest.approx(-4.0)
    assert (o.budget, o.gold_budget) == (4, pytest.approx(gold[4]))
    assert o.gold_fixed == pytest.approx(gold[3])
    assert o.gold_kept == pytest.approx((gold[5] - 0.3) / 0.5)
    assert not o.at_peak  # one step from 4 is a quarter
    assert judge(run_of(HILL), found_by_kl(3.0)).at_peak
    back = judge(run_of(HILL), found_by_kl(4.0, rewind=0.8))
    assert (back.raised_at, back.kept, back.gold_alarm) == (6, 4, pytest.approx(gold[4]))
    assert (back.at_peak, back.kept_at_peak) == (False, True)  # its moment, and its policy
    assert (o.at_peak, o.kept_at_peak) == (False, False)


def test_a_peak_is_hit_within_a_fifth_on_either_side() -> None:
    base = judge(run_of(HILL), found_by_kl(3.0))
    far = [dataclasses.replace(base, peak=20, raised_at=r).at_peak for r in (16, 17, 25, 26)]
    assert far == [False, True, True, False]
    assert not dataclasses.replace(base, falls=False).at_peak
    assert not dataclasses.replace(base, raised_at=None).at_peak


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
        "gold_alarm": 1.0,
        "gold_none": -3.0,
        "gold_oracle": 2.0,
        "gold_budget": 0.5,
        "gold_fixed": 1.5,
        "budget": 6,
    }
    return Outcome(seed=seed, **(base | options))


def test_a_summary_counts_runs_and_compares_in_pairs() -> None:
    s = summarise_outcomes(
        [
            outcome(0),
            outcome(1, gold_alarm=3.0, gold_none=-4.0, gold_oracle=4.0, raised_at=5),
            outcome(2, gold_alarm=2.0, gold_none=-2.0, gold_oracle=3.0, raised_at=None),
            outcome(3, falls=False, gold_alarm=2.0, gold_none=-3.0, gold_oracle=3.0),
        ]
    )
    assert (s.runs, s.falling, s.raised, s.at_peak, s.early, s.false) == (4, 3, 2, 1, 1, 1)
    assert s.kept_at_peak == 2
    assert s.less_none.mean == pytest.approx((4 + 7 + 4 + 5) / 4)
    assert s.less_none.half_width == pytest.approx(3.182446 * math.sqrt(2) / 2, rel=1e-5)
    assert s.less_oracle.mean == pytest.approx(-1.0)
    assert s.less_oracle.half_width == pytest.approx(0.0, abs=1e-12)
    assert s.less_budget.mean == pytest.approx(1.5)
    assert s.less_fixed.mean == pytest.approx(0.5)
    assert s.gold_kept == pytest.approx(2 / 3)


def test_a_seed_counts_once_whatever_its_runs() -> None:
    s = summarise_outcomes(
        [
            outcome(0, gold_alarm=0.0, method="a"),
            outcome(0, gold_alarm=2.0, method="b"),
            outcome(1, gold_alarm=4.0, method="a"),
        ]
    )
    assert s.gold_alarm.mean == pytest.approx(2.5)
    assert s.gold_alarm.seeds == 2
    other = summarise_outcomes([outcome(0), outcome(0, world="v")])
    assert other.gold_alarm.seeds == 2
