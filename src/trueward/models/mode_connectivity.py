"""Is what lies between reward models as good as they are? Linear mode connectivity.

Weights may be averaged where the straight line between two models has no barrier. Models that were
fine-tuned from one start have none as a rule, models from two starts have one; which it is, is
measured here on preferences, before the weights go into an average (`models.weight_averaging`).
Frankle et al. 2020 (https://arxiv.org/abs/1912.05671); for reward models Ramé et al. 2024, WARM
(https://arxiv.org/abs/2401.12187).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import DataError, PreferenceRow
from trueward.losses.preference import bradley_terry_loss
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import (
    interpolate_weights,
    require_share,
    sides_of,
    usable_rows,
)


@dataclass(frozen=True, kw_only=True)
class PathPoint:
    """One model on the line between two, on the same pairs as they."""

    weight: float  # of the second model
    accuracy: float  # ties at half
    line: float  # (1 - weight) accuracy_1 + weight accuracy_2
    low: float  # of the interval of accuracy - line, paired over the rows
    high: float
    loss: float  # Bradley-Terry, nats a pair
    loss_line: float  # (1 - weight) loss_1 + weight loss_2

    @property
    def gap(self) -> float:
        """Accuracy above the line; below it, negative."""
        return self.accuracy - self.line

    @property
    def holds(self) -> bool:
        """Whether Eq. 2 of the paper holds for these pairs: `accuracy >= line`."""
        return self.gap >= -1e-9  # the two are sums of the same numbers in another order


@dataclass(frozen=True, kw_only=True)
class LinearPath:
    """Accuracy and loss on the straight line between the weights of two models."""

    points: tuple[PathPoint, ...]
    pairs: int
    left_out: int  # rows without an order, or with a side beyond the context

    @property
    def inner(self) -> tuple[PathPoint, ...]:
        """The points between the two models."""
        return tuple(point for point in self.points if 0 < point.weight < 1)

    @property
    def holds(self) -> bool:
        """Whether no inner point is below the line, as Eq. 2 asks; chance alone can break it."""
        return all(point.holds for point in self.inner)

    @property
    def refuted(self) -> bool:
        """Whether an inner point is below the line by more than chance: its interval is."""
        return any(point.high < 0 for point in self.inner)

    @property
    def loss_barrier(self) -> float:
        """How far the loss rises above its own line between the models; negative if it never does.

        In nats a pair. It sees what the accuracy of easy pairs does not; 0 without inner points.
        """
        return max((point.loss - point.loss_line for point in self.inner), default=0.0)


def linear_mode_connectivity(
    model_1: RewardModel,
    model_2: RewardModel,
    preferences: Sequence[PreferenceRow],
    *,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    confidence: float = 0.95,
) -> LinearPath:
    """Measure whether two models may be averaged: is what lies between them as good as they are?

    `Acc((1-l) phi_1 + l phi_2) >= (1-l) Acc(phi_1) + l Acc(phi_2)`, Eq. 2 of Ramé et al. 2024
    (https://arxiv.org/abs/2401.12187). All points are read on the same pairs, so the interval is
    that of the mean of each pair's own difference, which is far narrower than the two accuracies'
    intervals apart: the normal one, for a hundred independent pairs or more, and for each point by
    itself. Rewards are raw; where a head has several members, their mean, each member on the
    scale of its rewards for these very pairs, as `RewardModel.set_normalisation` would have it.

    Args:
        model_1: Weight 0.
        model_2: Weight 1.
        preferences: Held-out rows.
        weights: Of the second model, each in [0, 1].
        confidence: Of the intervals.

    Raises:
        ValueError: The models cannot be mixed, or a weight lies outside [0, 1].
        DataError: Fewer than two rows can be used.
    """
    for weight in weights:
        require_share("weights", weight)
    _require_confidence(confidence)
    rows = usable_rows([model_1, model_2], preferences)
    _require_two(rows)
    ends = [_pair_margins(model, rows) for model in (model_1, model_2)]
    points = []
    for weight in weights:
        if 0 < weight < 1:
            margins = _pair_margins(interpolate_weights(model_1, model_2, weight), rows)
        else:
            margins = ends[int(weight)]
        line = (1 - weight) * _right(ends[0]) + weight * _right(ends[1])
        loss_line = (1 - weight) * _losses(ends[0]) + weight * _losses(ends[1])
        low, high = _interval(_right(margins) - line, confidence)
        points.append(
            PathPoint(
                weight=weight,
                accuracy=_right(margins).mean().item(),
                line=line.mean().item(),
                low=low,
                high=high,
                loss=_losses(margins).mean().item(),
                loss_line=loss_line.mean().item(),
            )
        )
    left_out = len(preferences) - len(rows)
    return LinearPath(points=tuple(points), pairs=len(rows), left_out=left_out)


@dataclass(frozen=True, kw_only=True)
class AveragePoint:
    """An average on the same pairs as the models that it was made of."""

    accuracy: float  # ties at half
    mean: float  # of the models' accuracies
    low: float  # of the interval of accuracy - mean, paired over the rows
    high: float
    loss: float  # Bradley-Terry, nats a pair
    loss_mean: float
    accuracies: tuple[float, ...]  # of each model
    pairs: int
    left_out: int  # rows without an order, or with a side beyond the average's context

    @property
    def gap(self) -> float:
        """Accuracy above the models' mean; below it, negative."""
        return self.accuracy - self.mean

    @property
    def refuted(self) -> bool:
        """Whether the average is worse than its models' mean by more than chance."""
        return self.high < 0


def compare_with_models(
    average: RewardModel,
    models: Iterable[RewardModel],
    preferences: Sequence[PreferenceRow],
    *,
    confidence: float = 0.95,
) -> AveragePoint:
    """Measure an average against the mean of its models: Eq. 2 of the paper for M models.

    `Acc(1/M sum_i phi_i) >= 1/M sum_i Acc(phi_i)`. Two models that are each connected with a third
    need not be so with each other, so paths alone do not speak for an average of three; this does.
    Rewards and intervals are as in `linear_mode_connectivity`.

    Args:
        average: Of all of the models, with equal weights: its context is the shortest of theirs.
        models: What it was made of; with a generator one is in memory at a time.
        preferences: Held-out rows.
        confidence: Of the interval.

    Raises:
        ValueError: No models, or a confidence outside (0, 1).
        DataError: Fewer than two rows can be used.
    """
    _require_confidence(confidence)
    rows = usable_rows([average], preferences)
    _require_two(rows)
    margins = _pair_margins(average, rows)
    each = [_pair_margins(model, rows) for model in models]
    if not each:
        raise ValueError("An average is compared with the models it was made of, got none.")
    right = torch.stack([_right(m) for m in each])
    low, high = _interval(_right(margins) - right.mean(dim=0), confidence)
    return AveragePoint(
        accuracy=_right(margins).mean().item(),
        mean=right.mean().item(),
        low=low,
        high=high,
        loss=_losses(margins).mean().item(),
        loss_mean=torch.stack([_losses(m) for m in each]).mean().item(),
        accuracies=tuple(right.mean(dim=1).tolist()),
        pairs=len(rows),
        left_out=len(preferences) - len(rows),
    )


def simultaneous_confidence(confidence: float, intervals: int) -> float:
    """The confidence of each of several intervals that together have this one: Bonferroni's.

    `1 - (1 - c) / n`. With intervals of 95 % each, the sixteen points of six sound models would
    show a barrier that is not there far more often than once in twenty times.
    """
    _require_confidence(confidence)
    return 1 - (1 - confidence) / intervals


def proven_barrier(first: str, paths: Mapping[str, LinearPath], point: AveragePoint | None) -> str:
    """What the intervals prove against an average, in words without a full stop; "" if nothing.

    Args:
        first: Name of the model that the paths start from.
        paths: By the name of the model that they lead to.
        point: The average of all, where it was measured.
    """
    for name, path in paths.items():
        if path.refuted:
            worst = min(path.inner, key=lambda p: p.high)
            return (
                f"There is a barrier between {first} and {name}: with the weight {worst.weight:g} "
                f"on the second the accuracy is {_below(worst)} below the line between the two"
            )
    if point is not None and point.refuted:
        return (
            f"The average of {len(point.accuracies)} models has an accuracy {_below(point)} below "
            "their mean"
        )
    return ""


def _below(point: PathPoint | AveragePoint) -> str:
    return f"{-point.gap:.3f} [{-point.high:.3f}, {-point.low:.3f}]"


def _pair_margins(model: RewardModel, rows: Sequence[PreferenceRow]) -> Float[Tensor, " pair"]:
    rewards = model.score(*sides_of(rows), normalise=False).means.double()
    if model.members > 1:  # or the member with the widest scale would speak for all
        rewards = rewards / rewards.std(dim=0, correction=0).clamp_min(1e-6)
    means = rewards.mean(dim=1)
    return means[0::2] - means[1::2]


def _right(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    return (1 + margins.sign()) / 2


def _losses(margins: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    return bradley_terry_loss(margins, torch.zeros_like(margins))


def _interval(values: Float[Tensor, " pair"], confidence: float) -> tuple[float, float]:
    """Normal interval of a mean: `mean ± z s / sqrt(n)`, s with ddof 1."""
    mean = values.mean().item()
    half = NormalDist().inv_cdf((1 + confidence) / 2) * values.std(correction=1).item()
    half /= math.sqrt(len(values))
    return mean - half, mean + half


def _require_two(rows: Sequence[PreferenceRow]) -> None:
    if len(rows) < 2:
        raise DataError("An interval over pairs needs at least two preference rows, got one.")


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), as 0.95, got {confidence}.")
