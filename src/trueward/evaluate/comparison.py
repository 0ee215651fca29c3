"""Methods compared over seeds: means, intervals, peaks, drops, win rates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueward.evaluate.calibration import (
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from trueward.evaluate.overoptimization import (
    OveroptimizationLaw,
    best_of_n_law,
    fit_best_of_n_law,
    fit_rl_law,
    rl_law,
)
from trueward.evaluate.preferences import mean_interval

Point = dict[str, float]
PLACES = ("step", "n", "1/beta")  # the keys that say how far a point's policy was optimised
KLS = ("kl/exact", "kl/bound", "kl/k1")  # the first that a method knows is its KL
SEEDS_FOR_INTERVAL = 5  # with fewer, figures show the lowest and the highest seed
MOST_RMS = 0.2  # of a curve's range of gold: a law further off does not describe it
_SEEDS_FOR_WIN_INTERVAL = 3
_NORMAL_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """One cell: a method under one seed.

    `points` are in order of optimisation, from the reference policy on, and have the same places in
    every seed of a method. Keys: the place (`step`, `n` or `1/beta`), `gold`, `gold_sem` (over
    prompts), `proxy`, `length` (words), and where known `kl/exact`, `kl/k1`, `kl/k2`, `kl/k3` (nats
    a completion; best-of-n has `kl/bound` instead, `log n - (n-1)/n`, exact without ties and an
    upper bound with them), `spread` (std between members, mean over answers), `agreement` (of proxy
    with gold on pairs of the policy's own answers), `win_rate` (share of pairs of its and the
    reference policy's answers in which its has more gold).
    """

    seed: int
    points: Sequence[Point]
    seconds: float
    final_gold: Sequence[float] = ()  # of the optimised policy's answer to each evaluation prompt
    probabilities: Sequence[float] = ()  # held-out pairs: the reward's chance that the first wins
    outcomes: Sequence[bool] = ()  # and whether the annotator prefers it
    # Share of pairs that the reward orders as gold does, by whose answers they are: the reference
    # policy's, and those of the policy that was optimised a little against the first reward.
    agreements: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MethodRuns:
    """All cells of a method."""

    name: str
    label: str
    optimiser: str
    runs: Sequence[SeedRun]
    nominal_weight: float | None = None  # of the reward-robust mix


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval (Student's t); NaN where there is none.

    Seeds without a finite value are left out; `seeds` says how many are in, `lowest` and `highest`
    how far they lie apart.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    lowest: float = math.nan
    highest: float = math.nan
    seeds: int = 0
    over_prompts: bool = False  # one seed alone: the interval is over its prompts, not over seeds

    @property
    def half_width(self) -> float:
        """Half of the interval's width: what stands after the plus-minus sign."""
        return (self.high - self.low) / 2

    @property
    def band(self) -> tuple[float, float]:
        """What figures draw around the mean: the interval, or the seeds' range where they are few.

        With two seeds Student's t is 12.7: the interval would leave the figure.
        """
        if 1 < self.seeds < SEEDS_FOR_INTERVAL:
            return self.lowest, self.highest
        return self.low, self.high


@dataclass(frozen=True, kw_only=True)
class MeanPoint:
    """What the seeds of a method have in the mean at one place of its optimisation."""

    place: float
    gold: Estimate
    proxy: Estimate
    means: Point  # of every key, over the seeds with a finite value; NaN where none has


@dataclass(frozen=True, kw_only=True)
class MethodSummary:
    """A row of the comparison's table. Means over seeds; NaN where nothing is known."""

    name: str
    label: str
    optimiser: str
    nominal_weight: float | None
    seeds: int
    place_name: str  # step, n or 1/beta
    peak_place: float
    peaks_at_end: bool  # the peak is the last place: more optimisation might have gone higher
    gold_start: Estimate
    gold_peak: Estimate
    gold_end: Estimate
    drop: Estimate  # gold at the peak less gold at the end, paired by seed
    less_baseline: Estimate | None  # gold at the end less the baseline's, paired over common seeds
    kl_name: str  # one of `KLS`; empty where none is known
    kl_peak: float
    kl_end: float
    proxy_end: Estimate
    length_end: float  # words
    spread_start: float
    spread_end: float
    agreement_start: float
    agreement_end: float
    win_rate_end: Estimate  # against the reference policy; NaN where it is not known
    # Of the reward, by whose answers; with the policy's own at the end.
    agreements: Mapping[str, Estimate]
    agreements_less_baseline: Mapping[str, Estimate]  # paired over common seeds
    seconds_mean: float  # of a cell
    seconds_max: float


@dataclass(frozen=True, kw_only=True)
class MethodFit:
    """A law of Gao et al. 2022 fitted to a method's mean curve."""

    law: OveroptimizationLaw
    initial_gold: float  # of the reference policy, where the law is 0
    best_of_n: bool  # which of the two laws
    gold_range: float  # highest less lowest gold of the curve

    @property
    def describes(self) -> bool:
        """Whether the law describes the curve, so that its peak means something.

        It must rise and fall (`alpha > 0`, `beta > 0`), and miss the points by at most `MOST_RMS`
        of their range. The two parameters always have a least-squares solution, and with `beta > 0`
        always a peak: of a curve that has another form, both say nothing.
        """
        law = self.law
        return law.alpha > 0 and law.beta > 0 and law.rms_error <= MOST_RMS * self.gold_range

    @property
    def peak_gold(self) -> float:
        """Gold reward at the predicted peak, on the scale of the curve."""
        return self.initial_gold + self.law.peak_gold

    def gold_at(self, kl: Sequence[float]) -> list[float]:
        """Return the gold rewards that the law gives at these KLs, on the scale of the curve."""
        nats = torch.tensor(kl, dtype=torch.float64)
        law = best_of_n_law if self.best_of_n else rl_law
        gold = self.initial_gold + law(nats, alpha=self.law.alpha, beta=self.law.beta)
        return gold.tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class WinRates:
    """How often the row's answer has more gold than the column's answer to the same prompt.

    NaN where a method has no `final_gold`, or two methods have no seed in common; intervals are
    over seeds (Student's t, cut at 0 and 1) and need three: of two they say nothing.
    """

    names: tuple[str, ...]
    mean: Float[Tensor, "method method"]
    low: Float[Tensor, "method method"]
    high: Float[Tensor, "method method"]
    seeds: Int[Tensor, "method method"]  # that both have


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledReliability:
    """A method's reward on held-out pairs, all seeds' pairs together."""

    curve: ReliabilityCurve
    ece: float
    brier: float
    accuracy: Estimate  # share of pairs in which the likelier side wins, p = 1/2 as half right
    pairs: int


# --- curves ---


def over_seeds(method: MethodRuns) -> list[MeanPoint]:
    """Return the mean over the seeds at each place, in order of optimisation; [] without runs.

    Raises:
        ValueError: A seed has other places than the first one.
    """
    places = places_of(method)
    if not places:
        return []
    keys = list(dict.fromkeys(key for run in method.runs for point in run.points for key in point))
    by_key = {key: _values(method, key) for key in keys}
    nothing = torch.full((len(method.runs), len(places)), math.nan, dtype=torch.float64)
    gold, proxy = (by_key.get(key, nothing) for key in ("gold", "proxy"))
    sems = by_key.get("gold_sem", nothing)
    means = {key: values.nanmean(dim=0).tolist() for key, values in by_key.items()}
    return [
        MeanPoint(
            place=place,
            gold=_estimate(gold[:, i], sems[:, i]),
            proxy=_estimate(proxy[:, i]),
            means={key: values[i] for key, values in means.items()},
        )
        for i, place in enumerate(places)
    ]


def place_name(method: MethodRuns) -> str:
    """Return what this method's places are: `step`, `n` or `1/beta`; empty without points."""
    first = next((run.points[0] for run in method.runs if run.points), None)
    if first is None:
        return ""
    found = next((name for name in PLACES if name in first), None)
    if found is None:
        raise ValueError(
            f"the points of method {method.name!r} have no place: give one of {', '.join(PLACES)}."
        )
    return found


def places_of(method: MethodRuns) -> list[float]:
    """Return the places that all seeds of a method share.

    Raises:
        ValueError: A seed has other places than the first one, or comes twice.
    """
    name = place_name(method)
    if not name:
        return []
    expected = [point.get(name, math.nan) for point in method.runs[0].points]
    seen: set[int] = set()
    for run in method.runs:
        if run.seed in seen:
            raise ValueError(f"method {method.name!r} has seed {run.seed} twice: leave one out.")
        seen.add(run.seed)
        own = [point.get(name, math.nan) for point in run.points]
        if own != expected:
            raise ValueError(
                f"method {method.name!r} has other places in seed {run.seed} than in seed "
                f"{method.runs[0].seed} ({_shown(own)} and {_shown(expected)}): run both with the "
                "same settings."
            )
    return expected


def kl_name(method: MethodRuns) -> str:
    """Return the key of the best KL that a method has, the first of `KLS`; empty without any."""
    for key in KLS:
        if any(math.isfinite(p.get(key, math.nan)) for run in method.runs for p in run.points):
            return key
    return ""


def peak_place(method: MethodRuns) -> float:
    """Return the place at which the mean gold curve over the seeds is highest.

    See `summarise` on why the mean's; the first of several equals.
    """
    return places_of(method)[_peak_index(method)]


def peaks_at_end(method: MethodRuns) -> bool:
    """Tell whether the mean gold curve is highest at its last place: it may not have peaked yet."""
    return _peak_index(method) == len(places_of(method)) - 1


# --- summaries ---


def summarise(method: MethodRuns, baseline: MethodRuns | None = None) -> MethodSummary:
    """Return a method's row in the table of the comparison.

    The peak is the highest point of the MEAN gold curve over the seeds, and every seed is read at
    that one place. The mean of each seed's own maximum would be biased upwards: of many noisy
    points the highest is high by luck too. A little of this is left in the mean curve, and less
    with more seeds; so is the drop, which cannot be negative in the mean.

    Args:
        method: With one run at least.
        baseline: What the gold at the end is compared with; None, or the method itself, for none.

    Raises:
        ValueError: The method has no gold reward at any place, or the places of its seeds differ.
    """
    places, peak = places_of(method), _peak_index(method)
    gold, sems = _values(method, "gold"), _values(method, "gold_sem")
    nats = kl_name(method)
    kl = _mean_of(method, nats)
    spread, agreement = _mean_of(method, "spread"), _mean_of(method, "agreement")
    seconds = [run.seconds for run in method.runs]
    return MethodSummary(
        name=method.name,
        label=method.label,
        optimiser=method.optimiser,
        nominal_weight=method.nominal_weight,
        seeds=len(method.runs),
        place_name=place_name(method),
        peak_place=places[peak],
        peaks_at_end=peak == len(places) - 1,
        gold_start=_estimate(gold[:, 0], sems[:, 0]),
        gold_peak=_estimate(gold[:, peak], sems[:, peak]),
        gold_end=_estimate(gold[:, -1], sems[:, -1]),
        drop=_estimate(gold[:, peak] - gold[:, -1]),
        less_baseline=_less_baseline(method, baseline),
        kl_name=nats,
        kl_peak=kl[peak],
        kl_end=kl[-1],
        proxy_end=_estimate(_values(method, "proxy")[:, -1]),
        length_end=_mean_of(method, "length")[-1],
        spread_start=spread[0],
        spread_end=spread[-1],
        agreement_start=agreement[0],
        agreement_end=agreement[-1],
        win_rate_end=_estimate(_values(method, "win_rate")[:, -1]),
        agreements=_over_seeds(_agreements(method)),
        agreements_less_baseline=_agreements_less(method, baseline),
        seconds_mean=sum(seconds) / len(seconds),
        seconds_max=max(seconds),
    )


def fit_law(method: MethodRuns) -> MethodFit | None:
    """Fit Gao et al.'s law to the mean curve: gold against the KL, both means over the seeds.

    Best-of-n has a law of its own, every other optimiser has that of reinforcement learning. Gold
    counts from the first place, the reference policy. Gao et al. 2022
    (https://arxiv.org/abs/2210.10760).

    Returns:
        None where a fit is impossible: with fewer than two different positive KLs, or without a
        gold reward at the first place.
    """
    if not places_of(method):
        return None
    kl, gold = _mean_of(method, kl_name(method)), _mean_of(method, "gold")
    known = [(k, g) for k, g in zip(kl, gold, strict=True) if math.isfinite(k) and math.isfinite(g)]
    if not math.isfinite(gold[0]) or len({k for k, _ in known if k > 0}) < 2:
        return None
    best_of_n = method.optimiser == "best_of_n"
    law = (fit_best_of_n_law if best_of_n else fit_rl_law)(
        torch.tensor([k for k, _ in known], dtype=torch.float64),
        torch.tensor([g for _, g in known], dtype=torch.float64),
        initial_gold=gold[0],
    )
    golds = [g for _, g in known]
    return MethodFit(
        law=law,
        initial_gold=gold[0],
        best_of_n=best_of_n,
        gold_range=max(golds) - min(golds),
    )


def win_rates(methods: Sequence[MethodRuns]) -> WinRates:
    """Return `P(row's answer has more gold than column's to the same prompt)`, ties as half.

    A share for each seed that both have (the policies of a seed answer the same prompts), then the
    mean over these seeds. Prompts where a gold reward is NaN are left out.

    Raises:
        ValueError: Two methods have gold rewards of different numbers of answers in a seed.
    """
    golds = [
        {run.seed: torch.tensor(run.final_gold, dtype=torch.float64) for run in m.runs}
        for m in methods
    ]
    golds = [{seed: g for seed, g in own.items() if g.numel()} for own in golds]
    count = len(methods)
    mean, low, high = (torch.full((count, count), math.nan, dtype=torch.float64) for _ in range(3))
    seeds = torch.zeros((count, count), dtype=torch.int64)
    for i, row in enumerate(golds):
        for j, column in enumerate(golds[:i]):
            common = [seed for seed in row if seed in column]
            for seed in common:
                _require_same_prompts(methods[i], methods[j], seed, row[seed], column[seed])
            rates = [(1 + torch.sign(row[s] - column[s]).nanmean()) / 2 for s in common]
            found = _estimate(torch.stack(rates) if rates else torch.empty(0, dtype=torch.float64))
            mean[i, j], mean[j, i] = found.mean, 1 - found.mean
            if found.seeds >= _SEEDS_FOR_WIN_INTERVAL:
                low[i, j], high[i, j] = max(found.low, 0.0), min(found.high, 1.0)
                low[j, i], high[j, i] = 1 - high[i, j], 1 - low[i, j]
            seeds[i, j] = seeds[j, i] = found.seeds
        if row:
            mean[i, i] = 0.5
            seeds[i, i] = len(row)
    return WinRates(
        names=tuple(m.name for m in methods), mean=mean, low=low, high=high, seeds=seeds
    )


def pooled_reliability(method: MethodRuns, *, bins: int = 10) -> PooledReliability | None:
    """Return how far a method's reward knows its own chance of being right; None without pairs.

    The outcomes are the annotator's choices: the event is "the annotator prefers the first answer",
    in pairs whose order does not depend on the choice (see `expected_calibration_error` on why this
    matters).

    Raises:
        ValueError: A run has not one outcome for each probability, or a probability is none.
    """
    runs = [run for run in method.runs if len(run.probabilities) or len(run.outcomes)]
    for run in runs:
        if len(run.probabilities) != len(run.outcomes):
            raise ValueError(
                f"method {method.name!r} must have as many outcomes as probabilities in seed "
                f"{run.seed}, got {len(run.outcomes)} and {len(run.probabilities)}."
            )
    if not runs:
        return None
    stated = [torch.tensor(run.probabilities, dtype=torch.float64) for run in runs]
    happened = [torch.tensor(run.outcomes, dtype=torch.float64) for run in runs]
    pooled, outcomes = torch.cat(stated), torch.cat(happened)
    # sign(p - 1/2) sign(2 outcome - 1) is 1 for right, -1 for wrong, 0 for undecided.
    right = [
        (1 + (torch.sign(p - 0.5) * torch.sign(2 * o - 1)).mean()) / 2
        for p, o in zip(stated, happened, strict=True)
    ]
    return PooledReliability(
        curve=reliability_curve(pooled, outcomes, bins=bins),
        ece=expected_calibration_error(pooled, outcomes, bins=bins),
        brier=brier_score(pooled, outcomes),
        accuracy=_estimate(torch.stack(right)),
        pairs=pooled.numel(),
    )


# --- arithmetic ---


def estimate_of(values: Sequence[float]) -> Estimate:
    """Return the mean of one value for each seed, with Student's interval."""
    return _estimate(torch.tensor(values, dtype=torch.float64))


def _estimate(
    values: Float[Tensor, " seed"], sems: Float[Tensor, " seed"] | None = None
) -> Estimate:
    """Mean and interval of the finite values; a single one gets `± 1.96 sem` where it has one."""
    finite = values.isfinite()
    known = values[finite]
    if known.numel() == 0:
        return Estimate(mean=math.nan)
    found = Estimate(
        mean=float(known.double().mean()),
        lowest=float(known.min()),
        highest=float(known.max()),
        seeds=known.numel(),
    )
    if known.numel() > 1:
        low, high = mean_interval(known)
        return replace(found, low=low, high=high)
    half = _NORMAL_95 * float(sems[finite]) if sems is not None else math.nan
    if not math.isfinite(half):
        return found
    return replace(found, low=found.mean - half, high=found.mean + half, over_prompts=True)


def _values(method: MethodRuns, key: str) -> Float[Tensor, "seed place"]:
    """Return what each seed has at each place; NaN where it has nothing finite."""
    rows = [[point.get(key, math.nan) for point in run.points] for run in method.runs]
    values = torch.tensor(rows, dtype=torch.float64)
    return values.where(values.isfinite(), math.nan)


def _mean_of(method: MethodRuns, key: str) -> list[float]:
    return _values(method, key).nanmean(dim=0).tolist()


def _peak_index(method: MethodRuns) -> int:
    known = [g if math.isfinite(g) else -math.inf for g in _mean_gold(method)]
    if not known or max(known) == -math.inf:
        raise ValueError(f"method {method.name!r} has no gold reward at any place of its runs.")
    return known.index(max(known))


def _mean_gold(method: MethodRuns) -> list[float]:
    return _mean_of(method, "gold") if places_of(method) else []


def _less_baseline(method: MethodRuns, baseline: MethodRuns | None) -> Estimate | None:
    if baseline is None or baseline.name == method.name:
        return None
    others = {run.seed: run.points[-1].get("gold", math.nan) for run in baseline.runs if run.points}
    differences = [
        run.points[-1].get("gold", math.nan) - others[run.seed]
        for run in method.runs
        if run.seed in others
    ]
    return _estimate(torch.tensor(differences, dtype=torch.float64))


OWN = "own"  # in `agreements`: on the answers of the policy that the method ends with


def _agreements(method: MethodRuns) -> dict[str, dict[int, float]]:
    """Return agreement with gold by whose answers, then by seed."""
    found: dict[str, dict[int, float]] = {}
    for run in method.runs:
        if not run.agreements:
            continue
        own = run.points[-1].get("agreement")  # best-of-n has no policy of its own
        for name, value in (run.agreements | ({} if own is None else {OWN: own})).items():
            found.setdefault(name, {})[run.seed] = value
    return found


def _over_seeds(found: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    return {
        name: _estimate(torch.tensor(list(values.values()), dtype=torch.float64))
        for name, values in found.items()
    }


def _agreements_less(method: MethodRuns, baseline: MethodRuns | None) -> dict[str, Estimate]:
    if baseline is None or baseline.name == method.name:
        return {}
    theirs = _agreements(baseline)
    return _over_seeds(
        {
            name: {s: v - theirs[name][s] for s, v in own.items() if s in theirs.get(name, {})}
            for name, own in _agreements(method).items()
        }
    )


def _require_same_prompts(
    one: MethodRuns, other: MethodRuns, seed: int, own: Tensor, theirs: Tensor
) -> None:
    if own.shape != theirs.shape:
        raise ValueError(
            f"methods {one.name!r} and {other.name!r} must answer the same prompts, got "
            f"{own.numel()} and {theirs.numel()} final gold rewards in seed {seed}."
        )


def _shown(places: Sequence[float]) -> str:
    return f"{len(places)} up to {places[-1]:g}" if places else "none"
