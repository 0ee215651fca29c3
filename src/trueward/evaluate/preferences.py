"""How well does a reward agree with preferences, and does it know when it does not?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, PreferenceRow, Prompt, text_of
from trueward.evaluate.calibration import (
    brier_score,
    expected_calibration_error,
    scaled_margins,
    spearman,
)
from trueward.models.reward_function import Reward, posterior_function
from trueward.posterior import RewardPosterior

Objective = Callable[[RewardPosterior], Tensor]


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class PreferenceAccuracy:
    """Share of pairs in which the chosen completion has the higher reward, ties at half."""

    accuracy: float
    low: float
    high: float
    ties: int
    pairs: int


def wilson_interval(successes: int | float, trials: int, *, confidence: float = 0.95) -> Interval:
    """Interval of a binomial share; unlike `p ± 2 SE` it stays in [0, 1] and holds near its ends.

    `(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`. Wilson 1927
    (https://doi.org/10.1080/01621459.1927.10502953). Ties that count half may make `successes`
    fractional; the interval is then a little wider than it need be.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes must lie in [0, trials] with at least one trial, got {successes} of "
            f"{trials}."
        )
    z = NormalDist().inv_cdf(_upper_quantile(confidence))
    p = successes / trials
    centre = p + z**2 / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def mean_interval(values: Float[Tensor, " value"], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of a mean: `mean ± t s / sqrt(n)`, s with ddof 1.

    For means over few independent values: seeds, or prompts. Needs two values or more.
    """
    _require_values(values, at_least=2)
    n = values.numel()
    values = values.double()
    half = _student_t_quantile(_upper_quantile(confidence), n - 1) * float(
        values.std(correction=1) / math.sqrt(n)
    )
    mean = float(values.mean())
    return Interval(mean - half, mean + half)


def bootstrap_interval(
    values: Float[Tensor, " value"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a mean, for skewed values; the seed fixes the result.

    Too narrow for fewer than about 20 values: take `mean_interval` for a handful of seeds. Efron
    and Tibshirani 1993.
    """
    _require_values(values, at_least=1)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}.")
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    n = values.numel()
    means = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):  # one by one: all indices at once may not fit in memory
        means[i] = values[torch.randint(n, (n,), generator=generator)].mean()
    upper = _upper_quantile(confidence)
    low, high = means.quantile(torch.tensor([1 - upper, upper], dtype=torch.float64)).tolist()
    return Interval(low, high)


def preference_accuracy(
    chosen_rewards: Float[Tensor, " pair"],
    rejected_rewards: Float[Tensor, " pair"],
    *,
    confidence: float = 0.95,
) -> PreferenceAccuracy:
    """Share of pairs with `chosen > rejected`, ties at half, with its Wilson interval.

    Many ties mean rewards of too few digits (bfloat16 steps are 0.06 between 8 and 16).
    """
    if chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"chosen and rejected rewards must have the same length, got "
            f"{chosen_rewards.numel()} and {rejected_rewards.numel()}."
        )
    _require_values(chosen_rewards, at_least=1)
    _require_values(rejected_rewards, at_least=1)
    pairs = chosen_rewards.numel()
    ties = int((chosen_rewards == rejected_rewards).sum())
    successes = int((chosen_rewards > rejected_rewards).sum()) + ties / 2
    low, high = wilson_interval(successes, pairs, confidence=confidence)
    return PreferenceAccuracy(
        accuracy=successes / pairs, low=low, high=high, ties=ties, pairs=pairs
    )


def evaluate_preferences(
    score: Reward,
    rows: Sequence[PreferenceRow],
    *,
    objective: Objective = objectives.mean,
    bins: int = 15,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Accuracy, calibration and uncertainty of a reward on preference rows.

    Both sides of a row are scored in one call and next to each other, so that a model can share
    their prompt. Rows marked as ties (`extra["tie"]`) have no order: they are counted in
    `unordered_rows` and enter nothing else. A metric that is not defined is left out (accuracy of
    members for one member, a correlation with a constant), so every value is finite.

    Pass `reward_model.score` for a scalar model's raw logits; it puts several members on one
    scale, as a `RewardModel` itself, or several, are scored. There `ece`, `brier` and `nll` are
    not those of the logits: `functools.partial(reward_model.score, normalise=False)` gives those.

    Args:
        score: A reward model, several, or any function from prompts and completions to rewards.
        rows: The preferences.
        objective: From the posterior to the reward that is evaluated.
        bins: Bins of the calibration error.
        confidence: Of the intervals.

    Returns:
        Of the objective's reward:
            `accuracy`, `accuracy_low`, `accuracy_high`: ties at half, Wilson interval.
            `ties`, `pairs`, `unordered_rows`: counts.
            `margin`: mean of chosen - rejected.
            `mean_reward`, `std_reward`: over all completions (ddof 0).
            `ece`: calibration error of `sigmoid(|margin|)` as the probability that the completion
                with the higher reward is the chosen one (a tie is half right).
            `ece_scaled`: the same with margins scaled so that the largest has confidence .99.
            `brier`, `nll`: of `sigmoid(margin)`; .25 and log 2 for rewards that say nothing.
            `accuracy/<subset>`: for each value of `extra["subset"]`.
        Of the data:
            `accuracy_longer`: accuracy of preferring the longer text, the baseline to beat.
        Of the uncertainty, where there is one:
            `accuracy_member_min`, `accuracy_member_max`: over the members, each on its own.
            `between_member_std`: mean std between members (ddof 0).
            `member_std`, `member_std_min`, `member_std_max`: mean, smallest and largest of the
                members' own stds; `member_std/<k>`: mean of member k. Watch them for collapse.
            `std_error_spearman`: rank correlation of the margin's std with the error
                `1 - sigmoid(margin)`; positive if the reward knows when it is wrong.
    """
    ordered = [row for row in rows if not row.extra.get("tie")]
    if not ordered:
        raise ValueError(
            f"there must be at least one row with an order to evaluate, got {len(rows)} rows, "
            "all marked as ties."
            if rows
            else "there must be at least one row, got none."
        )
    posterior = _score_pairs(
        score,
        [row.prompt for row in ordered],
        [row.chosen for row in ordered],
        [row.rejected for row in ordered],
        where=[row.where for row in ordered],
    )
    rewards = apply_objective(objective, posterior)
    margins = rewards[0::2] - rewards[1::2]
    metrics = {
        **_accuracy_metrics(rewards[0::2], rewards[1::2], confidence),
        "unordered_rows": float(len(rows) - len(ordered)),
        "margin": float(margins.mean()),
        "mean_reward": float(rewards.mean()),
        "std_reward": float(rewards.std(correction=0)),
        "ece": _winner_calibration_error(margins, margins, bins),
        "ece_scaled": _winner_calibration_error(margins, scaled_margins(margins), bins),
        "brier": brier_score(margins.sigmoid(), torch.ones_like(margins)),
        "nll": float(-F.logsigmoid(margins).mean()),
        "accuracy_longer": _accuracy_of_longer(ordered),
        **_uncertainty_metrics(posterior, margins),
        **_subset_metrics(margins, ordered),
    }
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def apply_objective(objective: Objective, posterior: RewardPosterior) -> Float[Tensor, " batch"]:
    """The objective's rewards in float64 on the CPU, checked for their shape and for NaN."""
    rewards = objective(posterior)
    if rewards.shape != (len(posterior),):
        raise ValueError(
            f"the objective must return one reward for each of {len(posterior)} completions, got "
            f"the shape {tuple(rewards.shape)}."
        )
    rewards = rewards.detach().double().cpu()
    if not bool(rewards.isfinite().all()):
        raise ValueError("the objective made NaN or infinite rewards out of finite ones.")
    return rewards


def pair_rewards(
    score: Reward,
    prompts: Sequence[Prompt],
    completions_1: Sequence[Completion],
    completions_2: Sequence[Completion],
    *,
    objective: Objective = objectives.mean,
) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Rewards of two completions to each prompt, from one call that scores them side by side."""
    rewards = apply_objective(objective, _score_pairs(score, prompts, completions_1, completions_2))
    return rewards[0::2], rewards[1::2]


def _score_pairs(
    score: Reward,
    prompts: Sequence[Prompt],
    completions_1: Sequence[Completion],
    completions_2: Sequence[Completion],
    where: Sequence[str] | None = None,
) -> RewardPosterior:
    """Posterior in float64 with the pairs' first completions at even places, second at odd."""
    if not len(prompts) == len(completions_1) == len(completions_2):
        raise ValueError(
            "there must be two completions for each prompt, got "
            f"{len(prompts)} prompts, {len(completions_1)} and {len(completions_2)} completions."
        )
    if len(prompts) == 0:
        raise ValueError("there must be at least one prompt to compare completions for, got none.")
    sides = zip(prompts, completions_1, completions_2, strict=True)
    flat = [(prompt, side) for prompt, *pair in sides for side in pair]
    scored = posterior_function(score)([prompt for prompt, _ in flat], [side for _, side in flat])
    finite = scored.means.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0]) // 2
        name = where[first] if where and where[first] else f"pair {first + 1}"
        raise ValueError(
            f"{int((~finite).sum())} of {len(scored)} rewards are missing, NaN or infinite, the "
            f"first for {name}; leave such rows out or mend the reward."
        )
    return RewardPosterior(
        scored.means.detach().cpu().double(),
        scored.stds.detach().cpu().double() if scored.stds is not None else None,
    )


def _accuracy_metrics(
    chosen: Float[Tensor, " pair"], rejected: Float[Tensor, " pair"], confidence: float
) -> dict[str, float]:
    result = preference_accuracy(chosen, rejected, confidence=confidence)
    return {
        "accuracy": result.accuracy,
        "accuracy_low": result.low,
        "accuracy_high": result.high,
        "ties": float(result.ties),
        "pairs": float(result.pairs),
    }


def _winner_calibration_error(
    margins: Float[Tensor, " pair"], confidence_margins: Float[Tensor, " pair"], bins: int
) -> float:
    """Calibration of the confidence in whichever side has the higher reward."""
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    return expected_calibration_error(confidence_margins.abs().sigmoid(), right, bins=bins)


def _accuracy_of_longer(rows: Sequence[PreferenceRow]) -> float:
    chosen = torch.tensor([float(len(text_of(row.chosen))) for row in rows])
    rejected = torch.tensor([float(len(text_of(row.rejected))) for row in rows])
    return preference_accuracy(chosen, rejected).accuracy


def _uncertainty_metrics(
    posterior: RewardPosterior, margins: Float[Tensor, " pair"]
) -> dict[str, float]:
    """The metrics that need several members, or members with stds."""
    metrics: dict[str, float] = {}
    if posterior.members > 1:
        accuracies = [
            preference_accuracy(means[0::2], means[1::2]).accuracy for means in posterior.means.T
        ]
        metrics["accuracy_member_min"] = min(accuracies)
        metrics["accuracy_member_max"] = max(accuracies)
        metrics["between_member_std"] = float(posterior.std.mean())
    if posterior.stds is not None:
        metrics["member_std"] = float(posterior.stds.mean())
        metrics["member_std_min"] = float(posterior.stds.min())
        metrics["member_std_max"] = float(posterior.stds.max())
        for member, std in enumerate(posterior.stds.mean(dim=0).tolist()):
            metrics[f"member_std/{member}"] = std
    if metrics and len(margins) > 1:
        error = 1 - margins.sigmoid()
        metrics["std_error_spearman"] = spearman(_margin_std(posterior), error)
    return metrics


def _margin_std(posterior: RewardPosterior) -> Float[Tensor, " pair"]:
    """Std of chosen - rejected for a random member: sqrt(Var_k margin_k + mean_k of both stds^2).

    A member's offset, which the two sides share, cancels before the variance is taken.
    """
    member_margins = posterior.means[0::2] - posterior.means[1::2]
    variance = member_margins.var(dim=1, correction=0)
    if posterior.stds is not None:
        squares = posterior.stds.square()
        variance = variance + (squares[0::2] + squares[1::2]).mean(dim=1)
    return variance.sqrt()


def _subset_metrics(
    margins: Float[Tensor, " pair"], rows: Sequence[PreferenceRow]
) -> dict[str, float]:
    subsets: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.extra.get("subset") is not None:
            subsets.setdefault(str(row.extra["subset"]), []).append(i)
    return {
        f"accuracy/{subset}": preference_accuracy(
            margins[members], torch.zeros(len(members), dtype=margins.dtype)
        ).accuracy
        for subset, members in sorted(subsets.items())
    }


def _upper_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), as 0.95, got {confidence}.")
    return (1 + confidence) / 2


@lru_cache
def _student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection on the angle `atan(t / sqrt(degrees))`."""
    if degrees > 100_000:  # differs from the normal by less than 1e-4 there
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _student_t_inside(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _student_t_inside(angle: float, degrees: int) -> float:
    """`P(|T| < sqrt(degrees) tan(angle))`. Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    odd = degrees % 2
    steps = torch.arange(1, max(1, (degrees - odd) // 2), dtype=torch.float64)
    # Odd: 1, 2/3 c^2, (2 4)/(3 5) c^4, ...; even: 1, 1/2 c^2, (1 3)/(2 4) c^4, ...
    ratios = (2 * steps - 1 + odd) / (2 * steps + odd) * math.cos(angle) ** 2
    series = float(1 + ratios.cumprod(dim=0).sum())
    if not odd:
        return math.sin(angle) * series
    tail = math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0
    return 2 / math.pi * (angle + tail)


def _require_values(values: Tensor, *, at_least: int) -> None:
    if values.numel() < at_least:
        raise ValueError(
            f"at least {at_least} value{'s are' if at_least > 1 else ' is'} needed, got "
            f"{values.numel()}."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("values must be finite, got NaN or an infinity.")
