"""Does a reward know what it does not know: numbers for any family, and what they mean in words.

Whatever returns a `RewardPosterior` has up to three uncertainties: the std between its members,
the mean of the members' own stds, and the two together. Each is asked two things here: is it larger
where the reward errs, and is it larger on completions that the data did not cover? The verdicts say
which of them carry a signal and which do not (`evaluate.verdicts`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, PreferenceRow, Prompt
from trueward.data.rows import canonical
from trueward.evaluate.calibration import (
    ReliabilityCurve,
    reliability_curve,
    spearman,
    uncertainty_auroc,
)
from trueward.evaluate.out_of_distribution import (
    OUT_OF_DISTRIBUTION,
    OutOfDistribution,
    completions_of,
)
from trueward.evaluate.preferences import (
    Objective,
    apply_objective,
    evaluate_preferences,
    mean_interval,
)
from trueward.evaluate.verdicts import (
    Measured,
    collapsed_std_verdict,
    error_verdict,
    identical_members_verdict,
    nominal_verdict,
    out_of_distribution_verdict,
    single_member_verdict,
)
from trueward.models.reward_function import (
    PosteriorFunction,
    Reward,
    fits_context,
    posterior_function,
)
from trueward.posterior import RewardPosterior

QUANTILE_LEVELS = tuple(i / 20 for i in range(21))  # of `UncertaintySignal.quantiles`

Fits = Callable[[Prompt, Completion], bool]

_AT_FLOOR = 1.01  # within 1 % of the smallest
_ROUNDING = 1e-9  # of the largest reward: a smaller std between members is the mean's rounding


@dataclass(frozen=True, kw_only=True)
class UncertaintySignal:
    """What one uncertainty says of the reward's errors and of text that the data did not cover."""

    error_correlation: Measured | None  # Spearman with 1 - sigmoid(margin); None: constant
    wrong_correlation: Measured | None  # Spearman with the pair being in the wrong order
    auroc: Mapping[str, Measured]  # by kind of out-of-distribution completion
    quantiles: Sequence[float]  # at QUANTILE_LEVELS, over single completions of the pairs


@dataclass(frozen=True, kw_only=True)
class OutOfDistributionKind:
    """How many completions there were of a kind, and what the reward gave for them."""

    completions: int
    unchanged: int  # the same as in the data, so left out
    overlong: int  # longer than the reward's context, so left out
    missing: int  # pairs for which the source has none
    preferred: float | None  # share with a higher reward than the data's, ties at half


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """A bin of the probability that the higher reward is the chosen one; None: it is empty."""

    centre: float
    confidence: float | None  # mean stated probability
    frequency: float | None  # share in which it was, ties at half
    count: int


@dataclass(frozen=True, kw_only=True)
class OwnStds:
    """How the members' own stds are distributed over the completions of the pairs."""

    quantiles: Mapping[str, float]  # "0%", "10%", "50%", "90%", "100%"; members pooled
    ratio: float | None  # 90 % over 10 %, median over the members; None if infinite
    at_floor: float  # share within 1 % of the member's smallest
    member_means: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class NominalMember:
    """Which member has the lowest own std, and whether that makes it the better one to ask."""

    shares: Sequence[float]  # of the completions, by member; the first member wins a tie
    entropy: float  # of the shares, over log K: 1 is evenly spread, 0 always the same member
    accuracy: float  # of the nominal reward
    random_accuracy: float  # of a random member for each completion: the control
    member_accuracy: float  # of one member for both completions of a pair, mean over members
    gain: Measured  # accuracy - random_accuracy, paired


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found; None where a number is not defined."""

    pairs: int
    members: int
    accuracy: Measured
    ece: float
    brier: float
    metrics: Mapping[str, float]  # all of `evaluate_preferences` on the same pairs
    reliability: Sequence[ReliabilityBin]  # of `sigmoid(|margin|)`, as the ECE
    uncertainties: Mapping[str, UncertaintySignal]  # "between", "own", "total": those there are
    out_of_distribution: Mapping[str, OutOfDistributionKind]
    member_correlation: float | None  # Pearson of the means, mean over the pairs of members
    member_error_correlation: float | None  # the same of 1 - sigmoid(member's margin)
    member_spread: float | None  # between members / of their mean, root mean squares of margins
    own_stds: OwnStds | None
    nominal: NominalMember | None

    @property
    def reliability_curve(self) -> ReliabilityCurve:
        """The reliability as `report.figures.reliability_panels` draws it."""

        def column(values: Sequence[float | None]) -> Tensor:
            known = [math.nan if value is None else value for value in values]
            return torch.tensor(known, dtype=torch.float64)

        return ReliabilityCurve(
            centres=column([b.centre for b in self.reliability]),
            confidence=column([b.confidence for b in self.reliability]),
            frequency=column([b.frequency for b in self.reliability]),
            count=torch.tensor([b.count for b in self.reliability]),
        )

    @property
    def verdicts(self) -> list[str]:
        """One sentence for each question that can be asked: seen, what it means, what to do."""
        found = [single_member_verdict(self.members, has_own_std=self.own_stds is not None)]
        if self.members > 1:
            found.append(identical_members_verdict(self.member_correlation, self.member_spread))
        if self.own_stds is not None:
            found.append(collapsed_std_verdict(self.own_stds.ratio, self.own_stds.at_floor))
        for name, signal in self.uncertainties.items():
            found.append(error_verdict(name, signal.error_correlation, signal.wrong_correlation))
        for name, signal in self.uncertainties.items():
            found.append(out_of_distribution_verdict(name, signal.auroc))
        if self.nominal is not None:
            nominal = self.nominal
            found.append(nominal_verdict(max(nominal.shares), nominal.entropy, nominal.gain))
        return [verdict for verdict in found if verdict]


def diagnose(
    reward: Reward,
    preferences: Sequence[PreferenceRow],
    *,
    out_of_distribution: Mapping[str, OutOfDistribution] = OUT_OF_DISTRIBUTION,
    objective: Objective = objectives.mean,
    fits: Fits | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Diagnosis:
    """Asks of a reward of any family whether its uncertainty means anything.

    The error of a pair is `1 - sigmoid(margin)` of the objective's reward, as in
    `evaluate_preferences`, and its uncertainty that of the margin, in which what a member adds to
    both sides cancels. Noise as likely to widen a margin as to narrow it moves that error both ways
    and its rank correlation stays at 0, however well its size is known; it does put more pairs into
    the wrong order, so the correlation with a wrong order (0 or 1, ties 1/2) stands beside it.

    Out-of-distribution completions are compared with the chosen ones that they were made from, by
    the uncertainty of single completions. There a member's offset counts as disagreement: put
    members on one scale first, as a `RewardModel` is. Intervals take pairs as independent; with
    fewer than about 20 they are too narrow.

    Args:
        reward: A reward model, several, or any function from prompts and completions to rewards.
        preferences: Held out from training; rows marked as ties are left out.
        out_of_distribution: By name, a maker or the completions themselves, one for each row
            (another policy's, say), None where there is none for a row. Completions that are those
            of the data, or longer than the context, are left out and counted.
        objective: From the posterior to the reward that is evaluated; one that takes uncertainty
            off the reward is correlated with it by construction.
        fits: Whether a completion fits the reward's context; None asks the reward models, and lets
            everything pass where the reward is a function.
        confidence: Of the intervals.
        seed: Of the makers.

    Raises:
        ValueError: No pairs, rewards that are not finite, completions that do not fit the rows.
    """
    function = posterior_function(reward)
    fits = fits or fits_context(reward)
    scored: list[RewardPosterior] = []

    def recording(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        scored.append(function(prompts, completions))
        return scored[-1]

    metrics = evaluate_preferences(
        recording, preferences, objective=objective, confidence=confidence
    )
    sides = _in_float64(scored[0])  # chosen at even places, rejected at odd ones
    margins = margin_posterior(sides)
    rewards = apply_objective(objective, sides)
    known = rewards[0::2] - rewards[1::2]
    kinds, aurocs = {}, {}
    for name, source in out_of_distribution.items():
        made = completions_of(
            source,
            [row.prompt for row in preferences],
            [row.chosen for row in preferences],
            seed=seed,
            name=f"out_of_distribution[{name!r}]",
        )
        kinds[name], aurocs[name] = _out_of_distribution_kind(
            name, made, preferences, sides[0::2], function, fits, objective, confidence
        )
    several, single = margins.members > 1, uncertainties(sides)
    return Diagnosis(
        pairs=len(margins),
        members=margins.members,
        accuracy=Measured(
            value=metrics["accuracy"],
            low=metrics["accuracy_low"],
            high=metrics["accuracy_high"],
        ),
        ece=metrics["ece"],
        brier=metrics["brier"],
        metrics=metrics,
        reliability=reliability_bins(known),
        uncertainties={
            name: UncertaintySignal(
                error_correlation=measured_spearman(uncertainty, (-known).sigmoid(), confidence),
                wrong_correlation=measured_spearman(uncertainty, 1 - _right(known), confidence),
                auroc={kind: found[name] for kind, found in aurocs.items() if name in found},
                quantiles=quantiles(single[name], QUANTILE_LEVELS),
            )
            for name, uncertainty in uncertainties(margins).items()
        },
        out_of_distribution=kinds,
        member_correlation=mean_pairwise_correlation(sides.means),
        member_error_correlation=mean_pairwise_correlation((-margins.means).sigmoid()),
        member_spread=member_spread(margins) if several else None,
        own_stds=own_std_distribution(sides.stds) if sides.stds is not None else None,
        nominal=nominal_member(sides, confidence) if several and sides.stds is not None else None,
    )


# --- Numbers ------------------------------------------------------------------------------------


def margin_posterior(sides: RewardPosterior) -> RewardPosterior:
    """Each member's chosen - rejected, with std `sqrt(std_w^2 + std_l^2)`.

    `sides` has the chosen completions at even places and the rejected ones behind them.
    """
    stds = None
    if sides.stds is not None:
        stds = (sides.stds[0::2].square() + sides.stds[1::2].square()).sqrt()
    return RewardPosterior(sides.means[0::2] - sides.means[1::2], stds)


def uncertainties(posterior: RewardPosterior) -> dict[str, Float[Tensor, " batch"]]:
    """The uncertainties that a posterior has, as stds.

    `between` members (ddof 0; from two members on), the mean of the members' `own` stds, and the
    `total` of a random member's draw, where there are both. A `between` that is no more than the
    rounding of the mean is 0, as equal members would be ranked by it.
    """
    found = {}
    if posterior.members > 1:
        rounding = _ROUNDING * posterior.means.abs().amax() if len(posterior) else 0.0
        found["between"] = torch.where(posterior.std > rounding, posterior.std, 0.0)
    if posterior.stds is not None:
        found["own"] = posterior.stds.mean(dim=1)
    if len(found) == 2:
        found["total"] = posterior.total_variance.sqrt()
    return found


def reliability_bins(margins: Float[Tensor, " pair"], *, bins: int = 15) -> list[ReliabilityBin]:
    """How often the higher reward is the chosen one, by the probability `sigmoid(|margin|)` of it.

    What the `ece` of `evaluate_preferences` is the mean gap of. As the probability is at least a
    half, the lower bins are empty.
    """
    curve = reliability_curve(margins.abs().sigmoid(), _right(margins), bins=bins)
    columns = (curve.centres, curve.confidence, curve.frequency, curve.count)
    return [
        ReliabilityBin(
            centre=centre,
            confidence=confidence if count else None,
            frequency=frequency if count else None,
            count=count,
        )
        for centre, confidence, frequency, count in zip(*(c.tolist() for c in columns), strict=True)
    ]


def quantiles(values: Float[Tensor, " batch"], levels: Sequence[float]) -> list[float]:
    """The values below which these shares lie, interpolated between neighbours."""
    found: list[float] = values.quantile(torch.tensor(levels, dtype=values.dtype)).tolist()
    return found


def measured_spearman(
    x: Float[Tensor, " batch"], y: Float[Tensor, " batch"], confidence: float = 0.95
) -> Measured | None:
    """Rank correlation with its interval: Fisher's z, standard error `sqrt((1 + r^2/2)/(n - 3))`.

    Bonett and Wright 2000 (https://doi.org/10.1007/BF02294183). None where x or y is constant, and
    [-1, 1] for fewer than four values.
    """
    value = spearman(x, y) if x.numel() > 1 else math.nan
    if math.isnan(value):
        return None
    if x.numel() < 4:
        return Measured(value=value, low=-1.0, high=1.0)
    z = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))  # ±1 up to rounding
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(
        (1 + value**2 / 2) / (x.numel() - 3)
    )
    return Measured(value=value, low=math.tanh(z - half), high=math.tanh(z + half))


def paired_auroc(
    uncertainty_in: Float[Tensor, " pair"],
    uncertainty_out: Float[Tensor, " pair"],
    confidence: float = 0.95,
) -> Measured:
    """`uncertainty_auroc` with its interval, where `out[i]` was made from `in[i]`.

    Student's t over each pair's share in the AUROC, `P(u_out > in_i) + P(out_i > u_in) - AUROC`,
    whose mean is the AUROC: DeLong's placements with a pair as a cluster. Obuchowski 1997
    (https://doi.org/10.2307/2533958). [0, 1] for one pair.
    """
    value = uncertainty_auroc(uncertainty_in, uncertainty_out)
    if uncertainty_in.numel() < 2:
        return Measured(value=value, low=0.0, high=1.0)
    shares = 1 - _share_below(uncertainty_in, uncertainty_out)
    shares = shares + _share_below(uncertainty_out, uncertainty_in) - value
    low, high = mean_interval(shares, confidence=confidence)
    return Measured(value=value, low=max(0.0, low), high=min(1.0, high))


def mean_pairwise_correlation(values: Float[Tensor, "batch member"]) -> float | None:
    """Pearson's correlation over the batch, mean over the pairs of members that are not constant.

    None without such a pair. Members that are right for the same reason are correlated too: it says
    how much they have in common, not how much of it is error.
    """
    centred = values.double() - values.double().mean(dim=0)
    norms = centred.norm(dim=0)
    varied = norms > _ROUNDING * values.abs().amax() * math.sqrt(max(len(values), 1))
    members = int(varied.sum())
    if members < 2:
        return None
    units = centred[:, varied] / norms[varied]
    # The square of the sum of K unit vectors is K plus twice the sum over the pairs.
    return float((units.sum(dim=1).square().sum() - members) / (members * (members - 1)))


def member_spread(margins: RewardPosterior) -> float | None:
    """`sqrt(mean Var_k margin_k) / sqrt(mean (mean_k margin_k)^2)`; None if every margin is 0.

    Members in full agreement have 0; under 1, their mean outweighs what they disagree on.
    """
    scale = float(margins.mean.square().mean().sqrt())
    return float(margins.variance.mean().sqrt()) / scale if scale > 0 else None


def own_std_distribution(stds: Float[Tensor, "batch member"]) -> OwnStds:
    """Quantiles, the ratio of 90 % to 10 %, the share at the smallest, and the members' means.

    Ratio and smallest are each member's own, so that members of different stds, each of which is
    constant, do not pass for stds that vary.
    """
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=stds.dtype)
    low, high = stds.quantile(levels[[1, 3]], dim=0)
    ratios = torch.where(high > 0, high / low, 1.0)  # all at 0: constant
    ratio = float(ratios.quantile(0.5))
    return OwnStds(
        quantiles={
            f"{round(100 * level)}%": value
            for level, value in zip(
                levels.tolist(), stds.flatten().quantile(levels).tolist(), strict=True
            )
        },
        ratio=ratio if math.isfinite(ratio) else None,
        at_floor=float((stds <= _AT_FLOOR * stds.amin(dim=0)).double().mean()),
        member_means=stds.mean(dim=0).tolist(),
    )


def nominal_member(sides: RewardPosterior, confidence: float = 0.95) -> NominalMember:
    """Which member `objectives.nominal` asks, and what that choice is worth.

    Nominal is chosen for each completion, so the control is a member drawn for each completion too:
    its accuracy is the mean over all pairs of members, exactly, and the gain is 0 in the mean if
    the stds say nothing. Needs stds and two members.
    """
    assert sides.stds is not None
    counts = torch.bincount(sides.stds.argmin(dim=1), minlength=sides.members).double()
    shares = counts / counts.sum()
    rewards = objectives.nominal(sides)
    right = _right(rewards[0::2] - rewards[1::2])
    chosen, rejected = sides.means[0::2], sides.means[1::2]
    control = _right(chosen[:, :, None] - rejected[:, None, :]).mean(dim=(1, 2))
    gains = right - control
    low, high = mean_interval(gains, confidence=confidence) if len(gains) > 1 else (-1.0, 1.0)
    return NominalMember(
        shares=shares.tolist(),
        entropy=abs(float(-torch.xlogy(shares, shares).sum())) / math.log(sides.members),
        accuracy=float(right.mean()),
        random_accuracy=float(control.mean()),
        member_accuracy=float(_right(chosen - rejected).mean()),
        gain=Measured(value=float(gains.mean()), low=low, high=high),
    )


# --- Helpers ------------------------------------------------------------------------------------


def _out_of_distribution_kind(
    name: str,
    made: Sequence[Completion | None],
    preferences: Sequence[PreferenceRow],
    chosen: RewardPosterior,
    function: PosteriorFunction,
    fits: Fits,
    objective: Objective,
    confidence: float,
) -> tuple[OutOfDistributionKind, dict[str, Measured]]:
    """The kind's counts, and the AUROC of each uncertainty over the rows that it changes."""
    pairs = zip(preferences, made, strict=True)
    ordered = [(row, new) for row, new in pairs if not row.extra.get("tie")]
    given = [(i, row, new) for i, (row, new) in enumerate(ordered) if new is not None]
    changed = [found for found in given if canonical(found[2]) != canonical(found[1].chosen)]
    kept = [found for found in changed if fits(found[1].prompt, found[2])]
    counts = {
        "completions": len(kept),
        "unchanged": len(given) - len(changed),
        "overlong": len(changed) - len(kept),
        "missing": len(ordered) - len(given),
    }
    if not kept:
        return OutOfDistributionKind(**counts, preferred=None), {}
    posterior = function([row.prompt for _, row, _ in kept], [new for _, _, new in kept])
    if not bool(posterior.means.isfinite().all()):
        raise ValueError(
            f"some rewards of out_of_distribution[{name!r}] are missing, NaN or infinite; mend the "
            "reward, or leave this kind out."
        )
    outside, inside = _in_float64(posterior), chosen[torch.tensor([i for i, _, _ in kept])]
    higher = apply_objective(objective, outside) - apply_objective(objective, inside)
    known, found = uncertainties(inside), uncertainties(outside)
    kind = OutOfDistributionKind(**counts, preferred=float(_right(higher).mean()))
    return kind, {key: paired_auroc(known[key], found[key], confidence) for key in known}


def _in_float64(posterior: RewardPosterior) -> RewardPosterior:
    stds = posterior.stds
    return RewardPosterior(
        posterior.means.detach().cpu().double(),
        stds.detach().cpu().double() if stds is not None else None,
    )


def _right(margins: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def _share_below(
    values: Float[Tensor, " pair"], others: Float[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    """For each value the share of the others that lie below it, ties at half."""
    ordered = others.sort().values
    left = torch.searchsorted(ordered, values, right=False)
    right = torch.searchsorted(ordered, values, right=True)
    return (left + right).double() / (2 * others.numel())
