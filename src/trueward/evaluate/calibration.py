"""Does a stated probability, or a stated uncertainty, mean what it says?"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Outcomes = Float[Tensor, " batch"] | Bool[Tensor, " batch"] | Int[Tensor, " batch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReliabilityCurve:
    """Stated probability against observed frequency, in equal-width bins of [0, 1].

    Empty bins have count 0 and NaN as confidence and frequency.
    """

    centres: Float[Tensor, " bin"]
    confidence: Float[Tensor, " bin"]  # mean stated probability
    frequency: Float[Tensor, " bin"]  # mean outcome
    count: Int[Tensor, " bin"]


def reliability_curve(
    probabilities: Float[Tensor, " batch"], outcomes: Outcomes, *, bins: int = 15
) -> ReliabilityCurve:
    """Mean probability and mean outcome in equal-width bins; a bin holds its lower edge.

    Args:
        probabilities: The stated probability that the event happens.
        outcomes: Whether it happened: 0 or 1, or between (a tie, a share of annotators).
        bins: How many bins [0, 1] is cut into; the last one holds 1.
    """
    _require_probabilities(probabilities, outcomes)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}.")
    stated = probabilities.detach().double().cpu()
    happened = outcomes.detach().double().cpu()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # Found by comparison with the edges, as i / bins may lie just below its own product by bins.
    index = (torch.bucketize(stated, edges, right=True) - 1).clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    return ReliabilityCurve(
        centres=(edges[:-1] + edges[1:]) / 2,
        confidence=torch.bincount(index, weights=stated, minlength=bins) / count,
        frequency=torch.bincount(index, weights=happened, minlength=bins) / count,
        count=count,
    )


def expected_calibration_error(
    probabilities: Float[Tensor, " batch"], outcomes: Outcomes, *, bins: int = 15
) -> float:
    """Gap between stated probability and observed frequency, averaged over the examples.

    `sum_b |B_b| / batch * |mean outcome in B_b - mean probability in B_b|`, equal-width bins. Guo
    et al. 2017, Eq. 3 (https://arxiv.org/abs/1706.04599). The binary convention: `probabilities`
    is that of one fixed event, and `outcomes` says whether the event happened.

    The trap with preferences: the event "chosen is preferred" happens in every row of a preference
    file, so `sigmoid(chosen - rejected)` against ones gives `1 - mean probability`, no matter how
    well calibrated the rewards are. Either show the two sides in an order that does not depend on
    the label, or ask about the event "the completion with the higher reward is preferred", whose
    probability is `sigmoid(|margin|)` (as `evaluate_preferences` does).
    """
    curve = reliability_curve(probabilities, outcomes, bins=bins)
    gaps = (curve.frequency - curve.confidence).abs().nan_to_num()  # NaN in empty bins
    return float((gaps * curve.count).sum() / curve.count.sum())


def brier_score(probabilities: Float[Tensor, " batch"], outcomes: Outcomes) -> float:
    """Mean squared difference between probability and outcome; `p = 1/2` always scores 1/4."""
    _require_probabilities(probabilities, outcomes)
    return float((probabilities.double() - outcomes.double()).square().mean())


def scaled_margins(
    margins: Float[Tensor, " batch"], *, largest_confidence: float = 0.99
) -> Float[Tensor, " batch"]:
    """Margins scaled so that the largest has the confidence `sigmoid(|margin|)` that is asked for.

    Makes the calibration of rewards on different scales comparable (standardised ones say). Zhai et
    al. 2024, UP-RLHF (https://arxiv.org/abs/2401.00243), which uses .99. All-zero margins stay 0.
    """
    if not 0.5 < largest_confidence < 1:
        raise ValueError(f"largest_confidence must lie in (0.5, 1), got {largest_confidence}.")
    largest = margins.abs().max()
    if largest == 0:
        return margins
    return margins / largest * math.log(largest_confidence / (1 - largest_confidence))


def mean_ranks(values: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Ranks from 1 in float64; equal values share the mean of their ranks."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group]


def spearman(x: Float[Tensor, " batch"], y: Float[Tensor, " batch"]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; NaN where x or y is constant."""
    if x.shape != y.shape or x.numel() < 2:
        raise ValueError(
            f"a rank correlation needs two tensors of the same length, at least 2; "
            f"got {x.numel()} and {y.numel()} values."
        )
    _require_finite("x", x)
    _require_finite("y", y)
    rank_x = mean_ranks(x) - (x.numel() + 1) / 2
    rank_y = mean_ranks(y) - (y.numel() + 1) / 2
    scale = float((rank_x.square().sum() * rank_y.square().sum()).sqrt())
    return float((rank_x * rank_y).sum()) / scale if scale > 0 else math.nan


def uncertainty_auroc(
    uncertainty_in: Float[Tensor, " inside"], uncertainty_out: Float[Tensor, " outside"]
) -> float:
    """Chance that an out-of-distribution example is more uncertain than an in-distribution one.

    `P(u_out > u_in) + P(u_out = u_in) / 2`, from the rank sum (Mann-Whitney U): 1 tells them
    apart, 1/2 is no better than a coin.
    """
    n_in, n_out = uncertainty_in.numel(), uncertainty_out.numel()
    if n_in == 0 or n_out == 0:
        raise ValueError(f"both sets need at least one example, got {n_in} inside, {n_out} out.")
    _require_finite("uncertainty_in", uncertainty_in)
    _require_finite("uncertainty_out", uncertainty_out)
    ranks = mean_ranks(torch.cat([uncertainty_in, uncertainty_out]))
    return float((ranks[n_in:].sum() - n_out * (n_out + 1) / 2) / (n_in * n_out))


def _require_probabilities(probabilities: Tensor, outcomes: Tensor) -> None:
    if probabilities.shape != outcomes.shape or probabilities.numel() == 0:
        raise ValueError(
            f"probabilities and outcomes must have the same length, at least 1; "
            f"got {probabilities.numel()} and {outcomes.numel()}."
        )
    for name, values in (("probabilities", probabilities), ("outcomes", outcomes)):
        if not bool(((values >= 0) & (values <= 1)).all()):  # false for NaN too
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {values.min().item()} to "
                f"{values.max().item()}; take the sigmoid of logits and margins first."
            )


def _require_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite to be ranked, got NaN or an infinity.")
