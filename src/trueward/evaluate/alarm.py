"""Is the alarm right? Runs with a known gold, an alarm calibrated on some and judged on others.

The gold of a run is smoothed over neighbouring evaluations, and read between them along straight
lines. Its highest point is the true peak, where an oracle would stop; a run whose gold does not
fall below it by more than `FALL` has no peak but its end, and nothing to be alarmed about.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueward.evaluate.comparison import Estimate, estimate_of
from trueward.train.alarm import SIGNALS, Calibration

FALL = 0.25  # in gold's unit, stds of the reference policy's answers
NEAR = 0.2  # an alarm this share of the peak's place from it is at the peak
EITHER_WAY = ("length", "logprob", "energy_loss")  # may go wrong upwards or downwards
THRESHOLDS = 24  # that are tried, at even quantiles of the scores
PATIENCES = (1, 2, 3)
REWINDS = (1.0, 0.75, 0.5)
SLACKS = (None, 1.0)


@dataclass(frozen=True, kw_only=True)
class WatchedRun:
    """A policy's optimisation with the signals of every step, and gold where it was measured.

    A place is a number of updates. `signals[name][p]` is of the completions that step `p + 1`
    starts with, those of the policy of place `p`; the policy that the run ends with, of place
    `steps`, has no signals.
    """

    world: str
    method: str
    seed: int
    gold_is_reward: bool  # nothing can be over-optimised
    signals: Mapping[str, Sequence[float]]
    places: Sequence[int]  # of the evaluations, the first 0 and the last `steps`
    gold: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.places) != len(self.gold) or len(self.places) < 2:
            raise ValueError(
                f"{self._name} must have gold at two places or more, got {len(self.places)} places "
                f"and {len(self.gold)} values."
            )
        if self.places[0] != 0 or sorted(set(self.places)) != list(self.places):
            raise ValueError(f"{self._name} must have its places in order, from 0 on.")
        lengths = {name: len(values) for name, values in self.signals.items()}
        if any(length != self.steps for length in lengths.values()):
            raise ValueError(
                f"{self._name} has {self.steps} steps and must have as many values of each signal, "
                f"got {lengths}."
            )

    @property
    def steps(self) -> int:
        """How many updates the run has."""
        return self.places[-1]

    @property
    def _name(self) -> str:
        return f"{self.world}/{self.method}/seed-{self.seed}"


# ---- the truth ---------------------------------------------------------------------------------


def smoothed(gold: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, one on either side where there is one."""
    return [
        sum(some) / len(some) for some in (gold[max(0, i - 1) : i + 2] for i in range(len(gold)))
    ]


def gold_by_place(run: WatchedRun) -> Float[Tensor, " place"]:
    """Smoothed gold at every place from 0 to the run's end, linear between evaluations."""
    found, values = [], smoothed(run.gold)
    for (a, before), (b, after) in itertools.pairwise(zip(run.places, values, strict=True)):
        found += [before + (after - before) * (p - a) / (b - a) for p in range(a, b)]
    return torch.tensor([*found, values[-1]], dtype=torch.float64)


class Peak(NamedTuple):
    """Where a run's gold is highest."""

    place: int
    gold: float
    falls: bool  # by more than `FALL` until the end; else the peak's place is the end


def true_peak(run: WatchedRun) -> Peak:
    """Return the highest of the smoothed evaluations, the first of equals.

    Where gold does not fall after it, the place is the run's end; the gold is the highest all the
    same, which no rule can surpass.
    """
    values = smoothed(run.gold)
    best = max(values)
    falls = best - values[-1] > FALL
    return Peak(run.places[values.index(best)] if falls else run.steps, best, falls)


# ---- rules that stop ---------------------------------------------------------------------------


def score_series(
    signals: Mapping[str, Sequence[float]], calibration: Calibration
) -> Float[Tensor, " step"]:
    """What `train.alarm.Alarm.update` returns step after step; minus infinity in its window."""
    window, total = calibration.window, torch.zeros(0)
    for name, weight in calibration.weights.items():
        z = _standardised(
            torch.tensor(signals[name], dtype=torch.float64)[None],
            window,
            calibration.floors.get(name, 0.0),
        )[0]
        total = weight * z + (total if len(total) else 0.0)
    return _accumulated(total[None], window, calibration.slack)[0]


def alarm_step(run: WatchedRun, calibration: Calibration) -> int | None:
    """Return the step, from 1 on, in which the alarm is raised; None if it never is."""
    scores = score_series(run.signals, calibration)
    crossed = _crossings(scores[None], calibration.patience, torch.tensor([calibration.threshold]))
    index = int(crossed[0, 0])
    return index + 1 if index < run.steps else None


def alarm_place(run: WatchedRun, calibration: Calibration) -> int:
    """Return the place of the policy that an alarm which stops leaves behind."""
    step = alarm_step(run, calibration)
    return run.steps if step is None else math.floor(calibration.rewind * (step - 1))


def budget_place(run: WatchedRun, budget: float) -> int:
    """Return the last place before the KL of a step's completions first exceeds a budget."""
    over = [p for p, kl in enumerate(run.signals["kl"]) if kl > budget]
    return max(0, over[0] - 1) if over else run.steps


# ---- calibration -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What the search chose on its runs, and how the rivals of the alarm were set there."""

    alarm: Calibration
    gold: float  # at the alarm's stop: the mean over worlds of the mean over learned rewards' runs
    false_alarms: float  # share of the runs with gold as reward in which it is raised
    kl_budget: float  # that keeps the most gold there
    budget_gold: float
    fixed_steps: int  # that keep the most gold there
    fixed_gold: float
    candidates: int  # alarms that were tried


def calibrate(
    runs: Sequence[WatchedRun],
    *,
    signals: Sequence[str] = SIGNALS,
    window: int = 5,
    max_false_alarms: float = 0.1,
) -> Calibrated:
    """Choose the alarm that keeps the most gold, among those that seldom cry wolf.

    The criterion is gold at the stop, in the mean over the runs of learned rewards (each world
    counts the same), subject to at most `max_false_alarms` of the runs with gold as reward being
    stopped. The search is exhaustive: each signal alone and each sum of two (those of
    `EITHER_WAY` with both signs), as they are or as a CUSUM, at `THRESHOLDS` quantiles of the
    scores, with the `PATIENCES` and `REWINDS`. Of equals the first, simplest one is taken.

    The rivals are set on the same runs to the same criterion, without the bound: a KL budget at
    one of a hundred quantiles of the steps' KL, and a number of steps.

    Args:
        runs: With a known gold; one at least whose reward is learned.
        signals: That may be used, where all runs have them.
        window: Steps that signals are counted from.
        max_false_alarms: Share of the runs with gold as reward.

    Raises:
        ValueError: No run of a learned reward, no common signal, or no alarm within the bound.
    """
    learned = [run for run in runs if not run.gold_is_reward]
    usable = [s for s in signals if all(s in run.signals for run in runs)]
    if not learned or not usable:
        raise ValueError(
            "a calibration needs runs of learned rewards that have a signal in common, got "
            f"{len(learned)} of {len(runs)} runs and the signals {usable}."
        )
    table = _Table(runs, window=window)
    best, best_gold, best_false, tried = None, -math.inf, 0.0, 0
    floors = {name: table.floor(name) for name in usable}
    z = {name: table.standardised(name, floors[name]) for name in usable}
    for weights in _weightings(usable):
        level = sum((w * z[name] for name, w in weights.items()), torch.zeros(()))
        for slack in SLACKS:
            scores = _accumulated(level, window, slack)
            thresholds = _thresholds(scores, table.valid(window))
            for patience in PATIENCES:
                crossed = _crossings(scores, patience, thresholds)
                false = table.false_alarms(crossed)
                for rewind in REWINDS:
                    tried += len(thresholds)
                    gold = table.mean_gold(table.rewound(crossed, rewind))
                    gold = torch.where(false <= max_false_alarms, gold, -math.inf)
                    at = int(gold.argmax())
                    if float(gold[at]) > best_gold + 1e-12:
                        best_gold, best_false = float(gold[at]), float(false[at])
                        best = Calibration(
                            weights=weights,
                            threshold=float(thresholds[at]),
                            floors={name: floors[name] for name in weights},
                            window=window,
                            patience=patience,
                            slack=slack,
                            rewind=rewind,
                        )
    if best is None:
        raise ValueError(
            f"no alarm was raised in at most {max_false_alarms:g} of the runs with gold as reward: "
            "allow more."
        )
    budget, budget_gold = table.best_budget()
    steps, fixed_gold = table.best_steps()
    return Calibrated(
        alarm=best,
        gold=best_gold,
        false_alarms=best_false,
        kl_budget=budget,
        budget_gold=budget_gold,
        fixed_steps=steps,
        fixed_gold=fixed_gold,
        candidates=tried,
    )


def _weightings(usable: Sequence[str]) -> list[dict[str, float]]:
    """Return each signal alone, then each sum of two, with either sign where both make sense."""
    signed = [
        (name, sign) for name in usable for sign in ((1.0, -1.0) if name in EITHER_WAY else (1.0,))
    ]
    pairs = [(a, b) for a, b in itertools.combinations(signed, 2) if a[0] != b[0]]
    return [dict([one]) for one in signed] + [dict(pair) for pair in pairs]


class _Table:
    """Runs as arrays, padded to the longest: gold at each place, signals at each step.

    A run that is stopped in its padding is one that is not: gold there is that of its end.
    """

    def __init__(self, runs: Sequence[WatchedRun], *, window: int) -> None:
        self.runs, self.window = runs, window
        self.steps = torch.tensor([run.steps for run in runs])
        longest = int(self.steps.max())
        if int(self.steps.min()) <= window:
            raise ValueError(f"every run needs more than {window} steps, the alarm's window.")
        self.gold = torch.stack([_padded(gold_by_place(run), longest + 1) for run in runs])
        learned = torch.tensor([not run.gold_is_reward for run in runs])
        worlds = {run.world: i for i, run in enumerate(runs)}
        self.weights = torch.zeros(len(runs), dtype=torch.float64)
        for world in worlds:
            own = learned & torch.tensor([run.world == world for run in runs])
            self.weights[own] = 1 / max(1, int(own.sum()))
        self.weights /= self.weights.sum()
        self.controls = ~learned

    def series(self, name: str) -> Float[Tensor, "run step"]:
        longest = int(self.steps.max())
        rows = [torch.tensor(run.signals[name], dtype=torch.float64) for run in self.runs]
        return torch.stack([_padded(row, longest) for row in rows])

    def floor(self, name: str) -> float:
        """Root mean square over runs of the standard deviation within the window."""
        first = self.series(name)[:, : self.window]
        return max(float(first.var(1).mean().sqrt()), 1e-9)

    def standardised(self, name: str, floor: float) -> Float[Tensor, "run step"]:
        return _standardised(self.series(name), self.window, floor)

    def valid(self, window: int) -> Tensor:
        """Tell which steps a run has, its window left out."""
        step = torch.arange(int(self.steps.max()))
        return (step[None] < self.steps[:, None]) & (step[None] >= window)

    def rewound(self, crossed: Int[Tensor, "run rule"], rewind: float) -> Int[Tensor, "run rule"]:
        back = (crossed.double() * rewind).floor().long()
        return torch.where(crossed < self.steps[:, None], back, crossed)

    def mean_gold(self, places: Int[Tensor, "run rule"]) -> Float[Tensor, " rule"]:
        return (self.gold.gather(1, places) * self.weights[:, None]).sum(0)

    def false_alarms(self, crossed: Int[Tensor, "run rule"]) -> Float[Tensor, " rule"]:
        raised = (crossed < self.steps[:, None])[self.controls].double()
        return raised.mean(0) if len(raised) else torch.zeros(crossed.shape[1]).double()

    def best_budget(self) -> tuple[float, float]:
        if any("kl" not in run.signals for run in self.runs):
            return math.inf, math.nan
        kl = self.series("kl")[self.valid(0)]
        budgets = [*kl.quantile(torch.linspace(0, 1, 101, dtype=kl.dtype)).tolist(), math.inf]
        places = torch.tensor([[budget_place(run, b) for b in budgets] for run in self.runs])
        gold = self.mean_gold(places)
        at = int(gold.argmax())
        return budgets[at], float(gold[at])

    def best_steps(self) -> tuple[int, float]:
        steps = torch.arange(int(self.steps.max()) + 1)[None].expand(len(self.runs), -1)
        gold = self.mean_gold(torch.minimum(steps, self.steps[:, None]))
        at = int(gold.argmax())
        return at, float(gold[at])


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(length - len(values))])


def _standardised(
    values: Float[Tensor, "run step"], window: int, floor: float
) -> Float[Tensor, "run step"]:
    """`train.alarm.standardised` of whole runs."""
    first = values[:, :window]
    mean = first.mean(1, keepdim=True)
    least = torch.maximum(1e-6 * mean.abs(), torch.tensor(max(floor, 1e-12)).double())
    return (values - mean) / torch.maximum(first.std(1, keepdim=True), least)


def _accumulated(
    scores: Float[Tensor, "run step"], window: int, slack: float | None
) -> Float[Tensor, "run step"]:
    """Return the scores after the window, or their CUSUM; minus infinity before."""
    out = scores.clone()
    if slack is not None:
        total = torch.zeros(len(scores), dtype=scores.dtype)
        for step in range(window, scores.shape[1]):
            total = (total + scores[:, step] - slack).clamp_min(0.0)
            out[:, step] = total
    out[:, :window] = -math.inf
    return out


def _crossings(
    scores: Float[Tensor, "run step"], patience: int, thresholds: Float[Tensor, " rule"]
) -> Int[Tensor, "run rule"]:
    """Return the index of the step that ends the first `patience` ones above each threshold.

    The number of steps where there is none.
    """
    lowest = scores.clone()  # minus infinity at the first step: no streak begins before
    for back in range(1, patience):
        lowest[:, back:] = torch.minimum(lowest[:, back:], scores[:, :-back])
    highest = lowest.cummax(1).values
    # As long as the highest so far is not above, nothing has crossed.
    return (highest[:, :, None] <= thresholds.to(scores)).sum(1)


def _thresholds(scores: Tensor, valid: Tensor) -> Float[Tensor, " rule"]:
    """Return even quantiles of the scores, to four digits, and a threshold that none exceeds."""
    known = scores[valid]
    levels = known.quantile(torch.linspace(0, 1, THRESHOLDS, dtype=known.dtype))
    rounded = [float(f"{v:.4g}") for v in levels.tolist()]
    return torch.tensor([*rounded, float(known.max()) + 1], dtype=torch.float64)


# ---- judgement ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the alarm's table: one run, and where each rule would have stopped it."""

    world: str
    method: str
    seed: int
    gold_is_reward: bool
    falls: bool
    peak: int  # place
    raised_at: int | None  # step
    kept: int  # place of the policy that the alarm leaves behind
    gold_start: float
    gold_alarm: float
    gold_none: float  # without an alarm
    gold_oracle: float
    gold_budget: float
    gold_fixed: float
    budget: int  # place where the KL budget stops

    @property
    def at_peak(self) -> bool:
        """Whether the alarm is about a policy near the true peak, by `NEAR`."""
        return self.raised_at is not None and self._near(self.raised_at - 1)

    @property
    def kept_at_peak(self) -> bool:
        """Whether the policy that the alarm leaves behind is near the true peak, by `NEAR`."""
        return self.raised_at is not None and self._near(self.kept)

    def _near(self, place: int) -> bool:
        return self.falls and abs(place - self.peak) <= NEAR * self.peak

    @property
    def gold_kept(self) -> float:
        """Gain at the alarm's stop over the oracle's gain; NaN where the oracle gains nothing."""
        gain = self.gold_oracle - self.gold_start
        return (self.gold_alarm - self.gold_start) / gain if gain > 0 else math.nan


def judge(run: WatchedRun, found: Calibrated) -> Outcome:
    """Return what an alarm and its rivals make of a run."""
    gold, peak = gold_by_place(run).tolist(), true_peak(run)
    kept = alarm_place(run, found.alarm)
    budget = budget_place(run, found.kl_budget) if "kl" in run.signals else run.steps
    return Outcome(
        world=run.world,
        method=run.method,
        seed=run.seed,
        gold_is_reward=run.gold_is_reward,
        falls=peak.falls,
        peak=peak.place,
        raised_at=alarm_step(run, found.alarm),
        kept=kept,
        gold_start=gold[0],
        gold_alarm=gold[kept],
        gold_none=gold[-1],
        gold_oracle=peak.gold,
        gold_budget=gold[budget],
        gold_fixed=gold[min(found.fixed_steps, run.steps)],
        budget=budget,
    )


@dataclass(frozen=True, kw_only=True)
class AlarmSummary:
    """Outcomes of one world and method, or of any others, over seeds; intervals are Student's."""

    runs: int
    falling: int  # whose gold falls
    raised: int  # of the falling ones
    at_peak: int  # of the falling ones
    kept_at_peak: int  # of the falling ones
    early: int  # of the falling ones: raised before the peak, and not at it
    false: int  # raised where gold does not fall
    gold_start: Estimate
    gold_alarm: Estimate
    gold_none: Estimate
    gold_oracle: Estimate
    gold_budget: Estimate
    gold_fixed: Estimate
    less_none: Estimate  # gold at the alarm's stop less that without one, paired
    less_budget: Estimate
    less_fixed: Estimate
    less_oracle: Estimate
    gold_kept: float  # mean gain at the alarm's stop over the oracle's mean gain


def summarise_outcomes(outcomes: Sequence[Outcome]) -> AlarmSummary:
    """Return the row of some outcomes.

    A seed's runs (of several methods) are not independent: each seed counts once, by the mean of
    its runs. Seeds of different worlds are different seeds.
    """
    falling = [o for o in outcomes if o.falls]
    start, alarm, oracle = (
        _over_seeds(outcomes, key) for key in ("gold_start", "gold_alarm", "gold_oracle")
    )
    gain = oracle.mean - start.mean
    return AlarmSummary(
        runs=len(outcomes),
        falling=len(falling),
        raised=sum(o.raised_at is not None for o in falling),
        at_peak=sum(o.at_peak for o in falling),
        kept_at_peak=sum(o.kept_at_peak for o in falling),
        early=sum(
            o.raised_at is not None and not o.at_peak and o.raised_at - 1 < o.peak for o in falling
        ),
        false=sum(o.raised_at is not None and not o.falls for o in outcomes),
        gold_start=start,
        gold_alarm=alarm,
        gold_none=_over_seeds(outcomes, "gold_none"),
        gold_oracle=oracle,
        gold_budget=_over_seeds(outcomes, "gold_budget"),
        gold_fixed=_over_seeds(outcomes, "gold_fixed"),
        less_none=_over_seeds(outcomes, "gold_alarm", "gold_none"),
        less_budget=_over_seeds(outcomes, "gold_alarm", "gold_budget"),
        less_fixed=_over_seeds(outcomes, "gold_alarm", "gold_fixed"),
        less_oracle=_over_seeds(outcomes, "gold_alarm", "gold_oracle"),
        gold_kept=(alarm.mean - start.mean) / gain if gain > 0 else math.nan,
    )


def _over_seeds(outcomes: Sequence[Outcome], key: str, less: str = "") -> Estimate:
    seeds: dict[tuple[str, int], list[float]] = {}
    for o in outcomes:
        value = getattr(o, key) - (getattr(o, less) if less else 0.0)
        seeds.setdefault((o.world, o.seed), []).append(value)
    return estimate_of([sum(values) / len(values) for values in seeds.values()])
