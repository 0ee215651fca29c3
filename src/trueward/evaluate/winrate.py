"""How often is a policy's answer better than a reference's, beyond being longer?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, Prompt, text_of
from trueward.evaluate.judges import Judge, JudgeReport, ReportingJudge
from trueward.evaluate.preferences import wilson_interval


@dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """Win rate at equal lengths, from `length_controlled_win_rate`."""

    win_rate: float
    low: float
    high: float
    length_coefficient: float  # phi: above 0 the judge prefers the longer completion


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """Share of prompts on which a completion beats the reference's, ties at half."""

    win_rate: float
    low: float  # Wilson interval
    high: float
    standard_error: float  # binomial; too large where verdicts are not just 0 and 1
    wins: int  # verdicts above 1/2
    ties: int
    losses: int
    pairs: int
    mean_length: float  # characters
    mean_reference_length: float
    length_controlled: LengthControlled
    position_bias: JudgeReport | None  # of these pairs, from a judge that reports on itself


def win_rate(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    reference_completions: Sequence[Completion],
    *,
    confidence: float = 0.95,
) -> WinRate:
    """Win rate of completions against reference completions of the same prompts.

    Judges reward length, so the length-controlled rate and both lengths stand beside it.

    Args:
        judge: Gives the probability that its first completion is the better one.
        prompts: One for each pair.
        completions: Those whose win rate is wanted.
        reference_completions: Those they are compared with.
        confidence: Of the intervals.
    """
    if not len(prompts) == len(completions) == len(reference_completions) or not prompts:
        raise ValueError(
            "there must be one completion and one reference for each prompt, at least one of "
            f"each; got {len(prompts)} prompts, {len(completions)} completions and "
            f"{len(reference_completions)} references."
        )
    before = judge.report() if isinstance(judge, ReportingJudge) else None
    outcomes = judge(prompts, completions, reference_completions).detach().double().cpu()
    if outcomes.shape != (len(prompts),) or not bool(((outcomes >= 0) & (outcomes <= 1)).all()):
        raise ValueError(
            f"the judge must give one probability in [0, 1] for each of {len(prompts)} pairs, got "
            f"{outcomes.tolist() if outcomes.numel() < 5 else f'shape {tuple(outcomes.shape)}'}."
        )
    lengths, references = _lengths(completions), _lengths(reference_completions)
    pairs, rate = len(prompts), float(outcomes.mean())
    low, high = wilson_interval(float(outcomes.sum()), pairs, confidence=confidence)
    return WinRate(
        win_rate=rate,
        low=low,
        high=high,
        standard_error=math.sqrt(rate * (1 - rate) / pairs),
        wins=int((outcomes > 0.5).sum()),
        ties=int((outcomes == 0.5).sum()),
        losses=int((outcomes < 0.5).sum()),
        pairs=pairs,
        mean_length=float(lengths.mean()),
        mean_reference_length=float(references.mean()),
        length_controlled=length_controlled_win_rate(
            outcomes, lengths - references, confidence=confidence
        ),
        position_bias=(
            judge.report() - before
            if before is not None and isinstance(judge, ReportingJudge)
            else None
        ),
    )


def length_controlled_win_rate(
    outcomes: Float[Tensor, " pair"],
    length_differences: Float[Tensor, " pair"],
    *,
    ridge: float = 0.01,
    confidence: float = 0.95,
) -> LengthControlled:
    """Win rate that a logistic regression predicts at equal lengths: `sigmoid(theta)`.

    `p = sigmoid(theta + phi tanh(difference / std(difference)))`. Dubois et al. 2024,
    AlpacaEval 2 (https://arxiv.org/abs/2404.04475), without its term for the difficulty of the
    instruction. Where all differences are equal, length and quality cannot be told apart, and phi
    is 0.

    Args:
        outcomes: Probability or verdict that the completion beats its reference.
        length_differences: Length of the completion less that of its reference.
        ridge: Coefficient of `(theta^2 + phi^2) / 2` beside the summed log loss: keeps the fit
            finite where all outcomes are wins.
        confidence: Of the interval, normal in theta.
    """
    std = length_differences.double().std(correction=0)
    scaled = length_differences.double() / std if std > 0 else torch.zeros_like(outcomes).double()
    features = torch.stack([torch.ones_like(scaled), scaled.tanh()], dim=1)
    weights, covariance = fit_logistic(features, outcomes.double(), ridge=ridge)
    theta, phi = weights.tolist()
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(float(covariance[0, 0]))
    win_rate, low, high = (
        torch.tensor([theta, theta - half, theta + half], dtype=torch.float64).sigmoid().tolist()
    )
    return LengthControlled(win_rate=win_rate, low=low, high=high, length_coefficient=phi)


def fit_logistic(
    features: Float[Tensor, "pair feature"], outcomes: Float[Tensor, " pair"], *, ridge: float
) -> tuple[Float[Tensor, " feature"], Float[Tensor, "feature feature"]]:
    """Ridge logistic regression by Newton's method; returns the weights and their covariance.

    Minimises `sum log loss + ridge |w|^2 / 2`; the covariance is the inverse Hessian there.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}.")
    weights = torch.zeros(features.shape[1], dtype=features.dtype)
    penalty = ridge * torch.eye(features.shape[1], dtype=features.dtype)

    def loss(weights: Tensor) -> Tensor:
        logits = features @ weights
        errors = F.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum")
        return errors + ridge * weights.square().sum() / 2

    for _ in range(100):
        probabilities = (features @ weights).sigmoid()
        gradient = features.T @ (probabilities - outcomes) + ridge * weights
        curvature = probabilities * (1 - probabilities)
        hessian = features.T @ (features * curvature[:, None]) + penalty
        step = torch.linalg.solve(hessian, gradient)
        if float(gradient @ step) < 1e-16 * len(outcomes):
            break
        size = 1.0
        # A full step may overshoot where all outcomes agree and the curvature is small.
        while float(loss(weights - size * step)) > float(loss(weights)) and size > 1e-6:
            size /= 2
        weights = weights - size * step
    return weights, torch.linalg.inv(hessian)


def _lengths(completions: Sequence[Completion]) -> Float[Tensor, " pair"]:
    texts = [text_of(completion) for completion in completions]
    return torch.tensor([len(text) for text in texts], dtype=torch.float64)
