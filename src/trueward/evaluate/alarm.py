"""Is the alarm right? Runs with a known gold, an alarm calibrated on some and judged on others.

The gold of a run is smoothed over neighbouring evaluations, and read between them along straight
lines. Its highest point is the true peak, where an oracle would stop; a run whose gold does not
fall below it by more than `FALL` has no peak but its end, and nothing to be alarmed about.

A rule says when: an alarm's calibration, of which a KL budget is one (unit `raw`), or a number of
steps. It is chosen for one of two aims: to `warn` at the peak, or to `stop` with the most gold.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueward.evaluate.comparison import Estimate, estimate_of
from trueward.train.alarm import SIGNALS, Calibration, Unit

FALL = 0.25  # in gold's unit, stds of the reference policy's answers
NEAR = 0.2  # an alarm this share of the peak's place from it is at the peak
NEAR_GOLD = (
    0.15  # an alarm about a policy whose gold is this close to the peak's is near it in gold
)
EITHER_WAY = ("length", "logprob", "energy_loss")  # may go wrong upwards or downwards
UNITS: tuple[Unit, ...] = ("window", "floor", "differences")
THRESHOLDS = 101  # that are tried, at even quantiles of the scores
PATIENCES = (1, 2, 3)
REWINDS = (1.0, 0.75, 0.5)
SLACKS = (None, 1.0)
_TIE = 1e-6  # of a unit of gold in a share of hits: less than one hit among any number of runs here

Aim = Literal["warn", "stop"]
Rule = Calibration | int  # an alarm, or the number of steps after which to stop
Timing = Literal["early", "hit", "late", "never"]


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
    # Gold of the first answer to each prompt and of the others, by place; none: not known apart.
    halves: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        if len(self.places) != len(self.gold) or len(self.places) < 2:
            raise ValueError(
                f"{self._name} must have gold at two places or more, got {len(self.places)} places "
                f"and {len(self.gold)} values."
            )
        if self.places[0] != 0 or sorted(set(self.places)) != list(self.places):
            raise ValueError(f"{self._name} must have its places in order, from 0 on.")
        lengths = {name: len(values) for name, values in self.signals.items()}
        if any(not math.isfinite(v) for values in self.signals.values() for v in values):
            raise ValueError(f"{self._name} has a signal that is not finite at every step.")
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


class Agreement(NamedTuple):
    """How well the peak of one half of a run's answers is hit by that of the other; 0 to 1."""

    place: float
    gold: float


def halves_agree(run: WatchedRun) -> Agreement:
    """Return what an alarm would hit that knows gold, but from half of the answers.

    Judged by the other half, by `NEAR` and `NEAR_GOLD`, the mean of both ways around: a bound, and
    as the true peak is of both halves a low one, on what any alarm can hit.
    """
    halves = [smoothed(half) for half in zip(*run.halves, strict=True)]
    place, gold = 0.0, 0.0
    for known, other in (halves, halves[::-1]):
        at, peak = known.index(max(known)), other.index(max(other))
        place += _near(run.places[at], run.places[peak]) / 2
        gold += (max(other) - other[at] <= NEAR_GOLD) / 2
    return Agreement(place, gold)


def _near(place: int, peak: int) -> bool:
    return abs(place - peak) <= NEAR * peak


# ---- rules -----------------------------------------------------------------------------------


def score_series(
    signals: Mapping[str, Sequence[float]], calibration: Calibration
) -> Float[Tensor, " step"]:
    """What `train.alarm.Alarm.update` returns step after step; minus infinity in its window."""
    window, total = calibration.window, torch.zeros(0)
    for name, weight in calibration.weights.items():
        values = torch.tensor(signals[name], dtype=torch.float64)[None]
        floor = calibration.floors.get(name, 0.0)
        z = _standardised(values, window, calibration.unit, floor)[0]
        total = weight * z + (total if len(total) else 0.0)
    return _accumulated(total[None], window, calibration.slack)[0]


def raised_step(run: WatchedRun, rule: Rule) -> int | None:
    """Return the step, from 1 on, in which a rule tells to stop; None if it never does."""
    if isinstance(rule, int):
        return rule + 1 if rule < run.steps else None
    scores = score_series(run.signals, rule)
    crossed = _crossings(
        scores[None], rule.patience, torch.tensor([rule.threshold], dtype=torch.float64)
    )
    index = int(crossed[0, 0])
    return index + 1 if index < run.steps else None


def kept_place(run: WatchedRun, rule: Rule) -> int:
    """Return the place of the policy that a rule which stops leaves behind."""
    step, rewind = raised_step(run, rule), 1.0 if isinstance(rule, int) else rule.rewind
    return run.steps if step is None else math.floor(rewind * (step - 1))


# ---- calibration -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rule that a search chose, and what it is worth on the search's runs."""

    rule: Rule
    worth: float  # stop: gold kept; warn: the share of hits, and a millionth of the gold kept
    false_alarms: float  # share of the runs with gold as reward in which it is raised
    candidates: int  # rules that were tried


def calibrate(
    runs: Sequence[WatchedRun],
    *,
    aim: Aim = "stop",
    signals: Sequence[str] = SIGNALS,
    units: Sequence[Unit] = UNITS,
    window: int = 5,
    max_false_alarms: float = 0.1,
) -> Found:
    """Choose the alarm that serves an aim best, among those that seldom cry wolf.

    To `stop`, that is gold at the stop, in the mean over the runs of learned rewards (each world
    counts the same). To `warn`, it is the share of those whose gold falls in which the alarm is
    raised at the peak, by `NEAR`; of equals, gold at its moment. Either is subject to at most
    `max_false_alarms` of the runs with gold as reward being alarmed: of fewer than ten runs, a
    tenth is none.

    The search is exhaustive: each signal alone and each sum of two (those of `EITHER_WAY` with both
    signs), in each unit, as they are or as a CUSUM, at `THRESHOLDS` quantiles of the scores, with
    the `PATIENCES` and, to stop, the `REWINDS`. Of equals the first, simplest one is taken. A KL
    budget is what it finds with the signal `kl` and the unit `raw`, which knows neither window nor
    CUSUM.

    Args:
        runs: With a known gold; one at least whose reward is learned.
        aim: What the alarm is for.
        signals: That may be used, where all runs have them.
        units: That may be used.
        window: Steps that signals are counted from.
        max_false_alarms: Share of the runs with gold as reward; 1 for no bound.

    Raises:
        ValueError: No run of a learned reward, no common signal, or no alarm within the bound.
    """
    usable = [s for s in signals if all(s in run.signals for run in runs)]
    if not usable:
        raise ValueError(f"a calibration needs runs with a signal in common, none has {signals}.")
    table = _Table(runs)
    best: Calibration | None = None
    most, false_alarms, tried = -math.inf, 0.0, 0
    starts = {unit: 0 if unit == "raw" else window for unit in units}
    floors = {(n, u): table.floor(n, starts[u], u) for n in usable for u in units}
    z = {(n, u): table.standardised(n, starts[u], u, floors[n, u]) for n in usable for u in units}
    for weights, unit in itertools.product(_weightings(usable), units):
        level = sum((w * z[name, unit] for name, w in weights.items()), torch.zeros(()))
        for slack in SLACKS if unit != "raw" else (None,):
            scores = _accumulated(level, starts[unit], slack)
            thresholds = _thresholds(scores, table.valid(starts[unit]))
            for patience in PATIENCES:
                crossed = _crossings(scores, patience, thresholds)
                false = table.false_alarms(crossed)
                for rewind in REWINDS if aim == "stop" else (1.0,):
                    tried += len(thresholds)
                    worth = table.worth(crossed, aim, rewind)
                    worth = torch.where(false <= max_false_alarms, worth, -math.inf)
                    at = int(worth.argmax())
                    if float(worth[at]) <= most + 1e-12:
                        continue
                    most, false_alarms = float(worth[at]), float(false[at])
                    best = Calibration(
                        weights=weights,
                        threshold=float(thresholds[at]),
                        unit=unit,
                        floors={} if unit == "raw" else {n: floors[n, unit] for n in weights},
                        window=starts[unit],
                        patience=patience,
                        slack=slack,
                        rewind=rewind,
                    )
    if best is None:
        raise ValueError(
            f"no alarm was raised in at most {max_false_alarms:g} of the runs with gold as reward: "
            "allow more."
        )
    return Found(rule=best, worth=most, false_alarms=false_alarms, candidates=tried)


def calibrate_steps(runs: Sequence[WatchedRun], *, aim: Aim = "stop") -> Found:
    """Choose the number of steps that serves an aim best, without a bound on false alarms.

    Raises:
        ValueError: See `calibrate`.
    """
    table = _Table(runs)
    steps = torch.arange(int(table.steps.max()) + 1)[None].expand(len(runs), -1)
    crossed = torch.minimum(steps, table.steps[:, None])
    worth = table.worth(crossed, aim, 1.0)
    at = int(worth.argmax())
    false = float(table.false_alarms(crossed)[at])
    return Found(rule=at, worth=float(worth[at]), false_alarms=false, candidates=steps.shape[1])


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

    def __init__(self, runs: Sequence[WatchedRun]) -> None:
        learned = torch.tensor([not run.gold_is_reward for run in runs], dtype=torch.bool)
        if not learned.any():
            raise ValueError(
                f"a calibration needs runs of learned rewards, got {len(runs)} others."
            )
        self.runs = runs
        self.steps = torch.tensor([run.steps for run in runs])
        longest = int(self.steps.max())
        self.gold = torch.stack([_padded(gold_by_place(run), longest + 1) for run in runs])
        peaks = [true_peak(run) for run in runs]
        self.peaks = torch.tensor([peak.place for peak in peaks])
        self.falls = learned & torch.tensor([peak.falls for peak in peaks])
        self.weights = torch.zeros(len(runs), dtype=torch.float64)
        for world in {run.world for run in runs}:
            own = learned & torch.tensor([run.world == world for run in runs])
            self.weights[own] = 1 / max(1, int(own.sum()))
        self.weights /= self.weights.sum()
        self.controls = ~learned

    def series(self, name: str) -> Float[Tensor, "run step"]:
        longest = int(self.steps.max())
        rows = [torch.tensor(run.signals[name], dtype=torch.float64) for run in self.runs]
        return torch.stack([_padded(row, longest) for row in rows])

    def floor(self, name: str, window: int, unit: Unit) -> float:
        """Root mean square over runs of what a run's first values give; 1 in the unit `raw`."""
        if unit == "raw":
            return 1.0
        if int(self.steps.min()) <= window:
            raise ValueError(f"every run needs more than {window} steps, the alarm's window.")
        first = self.series(name)[:, :window]
        return max(float(_variance(first, unit).mean().sqrt()), 1e-9)

    def standardised(
        self, name: str, window: int, unit: Unit, floor: float
    ) -> Float[Tensor, "run step"]:
        return _standardised(self.series(name), window, unit, floor)

    def valid(self, window: int) -> Tensor:
        """Tell which steps a run has, its window left out."""
        step = torch.arange(int(self.steps.max()))
        return (step[None] < self.steps[:, None]) & (step[None] >= window)

    def rewound(self, crossed: Int[Tensor, "run rule"], rewind: float) -> Int[Tensor, "run rule"]:
        back = (crossed.double() * rewind).floor().long()
        return torch.where(crossed < self.steps[:, None], back, crossed)

    def worth(self, crossed: Int[Tensor, "run rule"], aim: Aim, rewind: float) -> Tensor:
        """Return what rules are worth that are raised at these places, [rule]."""
        kept = self.rewound(crossed, rewind)
        gold = (self.gold.gather(1, kept) * self.weights[:, None]).sum(0)
        if aim == "stop":
            return gold
        if not self.falls.any():
            raise ValueError(
                "an alarm that warns is calibrated on runs whose gold falls, got none."
            )
        near = (crossed - self.peaks[:, None]).abs() <= NEAR * self.peaks[:, None]
        hits = (near & (crossed < self.steps[:, None]))[self.falls].double().mean(0)
        return hits + _TIE * gold

    def false_alarms(self, crossed: Int[Tensor, "run rule"]) -> Float[Tensor, " rule"]:
        raised = (crossed < self.steps[:, None])[self.controls].double()
        return raised.mean(0) if len(raised) else torch.zeros(crossed.shape[1]).double()


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(length - len(values))])


def _variance(first: Float[Tensor, "run step"], unit: Unit) -> Float[Tensor, " run"]:
    if unit == "differences":
        return first.diff(dim=1).square().mean(1) / 2
    return first.var(1)


def _standardised(
    values: Float[Tensor, "run step"], window: int, unit: Unit, floor: float
) -> Float[Tensor, "run step"]:
    """`train.alarm.standardised` of whole runs."""
    if unit == "raw":
        return values
    first = values[:, :window]
    mean = first.mean(1, keepdim=True)
    least = (1e-6 * mean.abs()).clamp_min(max(floor, 1e-12))
    if unit == "floor":
        return (values - mean) / least
    return (values - mean) / torch.maximum(_variance(first, unit).sqrt()[:, None], least)


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
    """What a rule makes of a run."""

    world: str
    method: str
    seed: int
    gold_is_reward: bool
    falls: bool
    peak: int  # place
    raised_at: int | None  # step
    kept: int  # place of the policy that the rule leaves behind
    gold_start: float
    gold_raised: float  # of the policy that the alarm is about; never raised: of the last
    gold_kept: float
    gold_none: float  # of the last
    gold_oracle: float

    @property
    def timing(self) -> Timing | None:
        """When the alarm is raised, by `NEAR`; None where gold does not fall."""
        if not self.falls:
            return None
        if self.raised_at is None:
            return "never"
        if _near(self.raised_at - 1, self.peak):
            return "hit"
        return "early" if self.raised_at - 1 < self.peak else "late"

    @property
    def near_in_gold(self) -> bool:
        """Whether the alarm is about a policy whose gold is near the peak's, by `NEAR_GOLD`."""
        raised = self.falls and self.raised_at is not None
        return raised and self.gold_oracle - self.gold_raised <= NEAR_GOLD

    @property
    def gain_kept(self) -> float:
        """Gain at the rule's stop over the oracle's gain; NaN where the oracle gains nothing."""
        gain = self.gold_oracle - self.gold_start
        return (self.gold_kept - self.gold_start) / gain if gain > 0 else math.nan


def judge(run: WatchedRun, rule: Rule) -> Outcome:
    """Return what a rule makes of a run."""
    gold, peak = gold_by_place(run).tolist(), true_peak(run)
    step, kept = raised_step(run, rule), kept_place(run, rule)
    return Outcome(
        world=run.world,
        method=run.method,
        seed=run.seed,
        gold_is_reward=run.gold_is_reward,
        falls=peak.falls,
        peak=peak.place,
        raised_at=step,
        kept=kept,
        gold_start=gold[0],
        gold_raised=gold[run.steps if step is None else step - 1],
        gold_kept=gold[kept],
        gold_none=gold[-1],
        gold_oracle=peak.gold,
    )


@dataclass(frozen=True, kw_only=True)
class AlarmSummary:
    """Outcomes of one world and method, or of any others; estimates are over seeds."""

    runs: int
    falling: int  # whose gold falls
    timings: Mapping[Timing, int]  # of the falling ones
    near_in_gold: int  # of the falling ones
    false: int  # raised where gold does not fall
    hit_share: Estimate
    near_share: Estimate
    false_share: Estimate
    gold_kept: Estimate
    gold_none: Estimate
    gold_oracle: Estimate
    less_none: Estimate  # gold at the rule's stop less that without one, paired
    less_oracle: Estimate
    gain_kept: float  # mean gain at the rule's stop over the oracle's mean gain


def summarise_outcomes(outcomes: Sequence[Outcome]) -> AlarmSummary:
    """Return the row of some outcomes of a rule."""
    falling, calm = [o for o in outcomes if o.falls], [o for o in outcomes if not o.falls]
    timings: dict[Timing, int] = dict.fromkeys(("early", "hit", "late", "never"), 0)
    for o in falling:
        assert o.timing is not None
        timings[o.timing] += 1
    kept = over_seeds(outcomes, lambda o: o.gold_kept)
    start = over_seeds(outcomes, lambda o: o.gold_start)
    oracle = over_seeds(outcomes, lambda o: o.gold_oracle)
    gain = oracle.mean - start.mean
    return AlarmSummary(
        runs=len(outcomes),
        falling=len(falling),
        timings=timings,
        near_in_gold=sum(o.near_in_gold for o in falling),
        false=sum(o.raised_at is not None for o in calm),
        hit_share=over_seeds(falling, lambda o: o.timing == "hit"),
        near_share=over_seeds(falling, lambda o: o.near_in_gold),
        false_share=over_seeds(calm, lambda o: o.raised_at is not None),
        gold_kept=kept,
        gold_none=over_seeds(outcomes, lambda o: o.gold_none),
        gold_oracle=oracle,
        less_none=over_seeds(outcomes, lambda o: o.gold_kept - o.gold_none),
        less_oracle=over_seeds(outcomes, lambda o: o.gold_kept - o.gold_oracle),
        gain_kept=(kept.mean - start.mean) / gain if gain > 0 else math.nan,
    )


def less(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Estimate:
    """Return gold at one rule's stop less that at another's, on the runs of both."""
    other = {(o.world, o.method, o.seed): o.gold_kept for o in theirs}
    both = [o for o in ours if (o.world, o.method, o.seed) in other]
    return over_seeds(both, lambda o: o.gold_kept - other[o.world, o.method, o.seed])


R = TypeVar("R", Outcome, WatchedRun)


def over_seeds(rows: Sequence[R], value: Callable[[R], float]) -> Estimate:
    """Return the mean of a number of runs, or of a share, with Student's interval over seeds.

    A seed's runs (of several methods) are not independent: each seed counts once, by the mean of
    its runs. Seeds of different worlds are different seeds.
    """
    seeds: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        seeds.setdefault((row.world, row.seed), []).append(float(value(row)))
    return estimate_of([sum(values) / len(values) for values in seeds.values()])
