"""What the numbers of a diagnosis mean, in words.

Each verdict is a function of numbers and gives one sentence: what was seen, what it means, and what
to do about it. The thresholds at which they turn are constants, each with its reason in the
docstring of the verdict that reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

COLLAPSED_RATIO = 1.1  # of the 90 % to the 10 % quantile of a member's own stds
COLLAPSED_SHARE = 0.5  # of the own stds at their member's smallest
IDENTICAL_CORRELATION = 0.99  # mean over the pairs of members
IDENTICAL_SPREAD = 0.1  # std between members over the reward's own, both of margins
USEFUL_AUROC = 0.6
DOMINANT_SHARE = 0.9  # of the completions of which one member is the nominal one

MINUS = "\N{MINUS SIGN}"
LABELS = {
    "between": "std between members",
    "own": "members' own std",
    "total": "total std",
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A number with its confidence interval, the widest possible one where there is none."""

    value: float
    low: float
    high: float


def single_member_verdict(members: int, *, has_own_std: bool) -> str:
    """Whether there is an uncertainty between members at all; "" with two members or more."""
    if members > 1:
        return ""
    kept = "only its own std is left" if has_own_std else "there is no uncertainty at all"
    return (
        f"There is one member alone, so nothing can be said between members and {kept}: train "
        "several members, or give several reward models, before using a robust objective."
    )


def identical_members_verdict(correlation: float | None, spread: float | None) -> str:
    """Whether members differ: `IDENTICAL_CORRELATION` and `IDENTICAL_SPREAD`.

    Members of unit variance with correlation r have a variance of 1 - r between them, so .99 and a
    spread of .1 are one threshold in two forms: disagreement that is a tenth of the reward can turn
    only pairs whose margin is a tenth of the usual one, about 1 in 12 if margins are normal.
    Correlation alone finds members that differ in scale, spread those that differ in an offset for
    each prompt.
    """
    if correlation is None or spread is None:
        return (
            "Fewer than two members vary, or every margin is 0, so members cannot be compared: "
            "look at the rewards themselves first."
        )
    seen = (
        f"the members correlate at {correlation:.2f} and the spread between them is {spread:.2f} "
        "of the reward's own"
    )
    if correlation >= IDENTICAL_CORRELATION or spread <= IDENTICAL_SPREAD:
        return (
            f"Members are nearly identical: {seen}, so that every objective over members is that "
            "of one of them; train them on different subsets, seeds or orders of the data."
        )
    return (
        f"Members differ: {seen}, so that objectives over members have something to go by; the "
        "verdicts on the std between members say what it is worth."
    )


def collapsed_std_verdict(ratio: float | None, at_floor: float) -> str:
    """Whether the members' own stds vary: `COLLAPSED_RATIO` and `COLLAPSED_SHARE`.

    A std that moves by less than a tenth between a model's surest and least sure tenths takes the
    same off every reward, so that no order changes. More than half of the stds at the smallest is
    a head that sits on its floor, where the mean-squared-error and Bradley-Terry losses of drawn
    rewards drive it. A ratio of None is infinite.
    """
    seen = f"90 % to 10 % ratio {'infinite' if ratio is None else f'{ratio:.2f}'}, "
    seen += f"{at_floor:.0%} at the smallest"
    if (ratio is not None and ratio <= COLLAPSED_RATIO) or at_floor > COLLAPSED_SHARE:
        return (
            f"The members' own stds have collapsed to a constant ({seen}), so a penalty on them "
            "takes the same off every completion of the data and the nominal member is chosen by "
            "scale or noise; train with a loss that can learn a std (a Gaussian likelihood, the "
            "marginal Bradley-Terry loss)."
        )
    return (
        f"The members' own stds vary ({seen}), so they have not collapsed; whether they vary in "
        "the right places is for the verdicts on error and on out-of-distribution text."
    )


def error_verdict(name: str, error: Measured | None, wrong: Measured | None) -> str:
    """Whether an uncertainty is related to error: an interval of a rank correlation above 0.

    Above 0 in either is a signal, as each misses what the other sees (see `diagnose`). Neither
    above 0 is none: an interval that covers 0 cannot be told from an uncertainty drawn at random.
    """
    label = LABELS[name]
    if error is None:
        return (
            f"The {label} or the error is the same for all pairs, so the one says nothing of the "
            "other; no objective can make use of it."
        )
    seen = f"rank correlation {_shown(error)}"
    if wrong is not None:
        seen += f", with a wrong order {_shown(wrong)}"
    present = [measured for measured in (error, wrong) if measured is not None]
    if any(measured.low > 0 for measured in present):
        return (
            f"The {label} is larger where the reward errs ({seen}), so it knows something of its "
            "errors; an objective that takes it off the reward has a reason to."
        )
    if any(measured.high < 0 for measured in present):
        return (
            f"The {label} is smaller where the reward errs ({seen}), so it misleads; do not take "
            "it off the reward, and look for members that agree on the same mistake."
        )
    return (
        f"The {label} is unrelated to error ({seen}), so that a penalty on it is noise on these "
        "data; use the mean, or evaluate on more pairs if the interval is wide."
    )


def out_of_distribution_verdict(name: str, auroc: Mapping[str, Measured]) -> str:
    """On which kinds an uncertainty rises: interval above 1/2 and `USEFUL_AUROC`; "" without any.

    At .5 a coin does as well. Below .6 fewer than three in five out-of-distribution completions are
    more uncertain than one of the data, even if many pairs make that certain: too few for a penalty
    to hold a policy that picks the others.
    """
    if not auroc:
        return ""
    label = LABELS[name]
    risen = {kind: a for kind, a in auroc.items() if a.low > 0.5 and a.value >= USEFUL_AUROC}
    rest = {kind: a for kind, a in auroc.items() if kind not in risen}
    if not rest:
        return (
            f"The {label} rises on every kind of out-of-distribution text (AUROC {_listed(risen)}),"
            " so that a penalty on it can hold a policy back there; use an objective that has one."
        )
    if not risen:
        return (
            f"The {label} is no better than chance, or hardly, on out-of-distribution text (AUROC "
            f"{_listed(rest)}), so that a penalty on it will not hold a policy back; keep the KL "
            "penalty, and refresh the reward on what the policy writes."
        )
    return (
        f"The {label} rises on some out-of-distribution text (AUROC {_listed(risen)}) but is no "
        f"better than chance, or hardly, on other ({_listed(rest)}), so that a policy can move "
        "there unpunished; watch its samples for that kind."
    )


def nominal_verdict(largest_share: float, entropy: float, gain: Measured) -> str:
    """Whether the lowest std picks the better member: `DOMINANT_SHARE`, and the gain's interval.

    With one member nominal for nine in ten completions there is hardly a choice to judge. A gain
    whose interval covers 0 is that of a member drawn at random for each completion, whatever the
    entropy: stds that differ by noise alone give that, with an entropy near 1.
    """
    numbers = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    seen = f"accuracy {numbers.replace('-', MINUS)} against a random member"
    if largest_share >= DOMINANT_SHARE:
        return (
            f"One member is nominal for {largest_share:.0%} of the completions ({seen}), so that "
            "the nominal reward is that of this member; compare the members' own stds by scale."
        )
    seen += f", entropy {entropy:.2f}"
    if gain.low > 0:
        return (
            f"The member with the lowest std is the better one to ask ({seen}), so the nominal "
            "reward carries information; compare it with the mean all the same."
        )
    if gain.high < 0:
        return (
            f"The member with the lowest std is the worse one to ask ({seen}), so that the nominal "
            "reward misleads; use the mean in its place."
        )
    return (
        f"The nominal member is chosen as if at random ({seen}), so that the nominal reward is "
        "that of one random member; use the mean, or weight the worst case more."
    )


def _shown(measured: Measured) -> str:
    text = f"{measured.value:.2f} [{measured.low:.2f}, {measured.high:.2f}]"
    return text.replace("-", MINUS)


def _listed(aurocs: Mapping[str, Measured]) -> str:
    return ", ".join(f"{kind} {auroc.value:.2f}" for kind, auroc in aurocs.items())
