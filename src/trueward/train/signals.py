"""What a policy in training gives away without a gold reward: numbers of a step's completions.

Every signal is a short function of what a training step already has: the members' rewards of its
completions, the states that a reward model's head reads, log-probabilities, lengths. All are on
scales of their own; `train.alarm` counts them from their values at the start of the run.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trueward import objectives
from trueward.data.rows import Completion, Prompt
from trueward.models.reward_function import PosteriorFunction, Reward, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.train.attributes import completion_states

SHRINKAGE = 0.1  # of the reference's covariance towards a multiple of the identity
LEAST_GAIN = 0.5  # stds of the reference's rewards: below, a share of the gain says nothing


class Seen(NamedTuple):
    """What a monitor sees of some completions."""

    posterior: RewardPosterior
    states: Float[Tensor, "completion hidden"] | None  # None: the monitor has none

    def some(self, rows: Tensor) -> "Seen":
        """Return some of the completions."""
        return Seen(self.posterior[rows], None if self.states is None else self.states[rows])


class Monitor:
    """Who watches: the members of a reward, and the states of its first model.

    It may be another reward than the one that is optimised: an ensemble can watch a single reward,
    or gold itself.

    Args:
        reward: A reward model, several, or a function, whose completions have no states.
        posterior: A function that asks the same members: where it is what is optimised, nobody is
            asked twice.
    """

    def __init__(self, reward: Reward, *, posterior: PosteriorFunction | None = None) -> None:
        self.posterior: PosteriorFunction = posterior or posterior_function(reward)
        models = [reward] if isinstance(reward, RewardModel) else reward
        self._reads: RewardModel | None = None
        if isinstance(models, Sequence):
            # The members of a LoRA ensemble have states of their own, a published classifier none.
            own = (m for m in models if m.head is not None and m.lora is None)
            self._reads = next(own, None)

    @torch.no_grad()
    def see(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        posterior: RewardPosterior | None = None,
        max_tokens: int = 16384,
    ) -> Seen:
        """Return what the monitor sees; a posterior that is known is not computed again."""
        if posterior is None:
            posterior = self.posterior(prompts, completions)
        model = self._reads
        if model is None:
            return Seen(posterior, None)
        tokens = [model.tokenize(p, c) for p, c in zip(prompts, completions, strict=True)]
        return Seen(posterior, completion_states(model, tokens, max_tokens=max_tokens))


# ---- of the members ----------------------------------------------------------------------------


def spread(posterior: RewardPosterior) -> float:
    """Standard deviation between the members (ddof 0), the mean over completions."""
    return posterior.std.mean().item()


def gap(posterior: RewardPosterior) -> float:
    """Nominal less worst-case reward, the mean over completions; see `objectives.nominal`."""
    return (objectives.nominal(posterior) - objectives.worst_case(posterior)).mean().item()


def spread_share(posterior: RewardPosterior, reference: RewardPosterior) -> float:
    """What the spread has gained on the reference's, for each unit that the reward has gained.

    A gain of less than `LEAST_GAIN` stds of the reference's rewards counts as that much.
    """
    least = LEAST_GAIN * reference.mean.std(correction=0).clamp_min(1e-6)
    gained = (posterior.mean.mean() - reference.mean.mean()).clamp_min(float(least))
    return ((posterior.std.mean() - reference.std.mean()) / gained).item()


def gain(posterior: RewardPosterior, reference: RewardPosterior) -> float:
    """What the members' mean has gained on the reference's, in stds of the reference's rewards."""
    std = reference.mean.std(correction=0).clamp_min(1e-6)
    return ((posterior.mean.mean() - reference.mean.mean()) / std).item()


def width(posterior: RewardPosterior) -> float:
    """The members' own standard deviation, the mean over all: of Gaussian heads, or EBRM's width.

    Raises:
        ValueError: Members without stds.
    """
    if posterior.stds is None:
        raise ValueError("width needs members with stds of their own, which these have not.")
    return posterior.stds.mean().item()


def disagreement(means: Float[Tensor, "prompt sample member"]) -> float:
    """How often two members order two completions of a prompt differently: 0 never, 1/2 as chance.

    The mean over pairs of members, prompts, and pairs of completions; one member's tie is half a
    disagreement, and completions that tie for all members (equal texts) are left out.
    """
    samples, members = means.shape[1:]
    if members < 2:
        return 0.0
    first, second = torch.triu_indices(samples, samples, offset=1)
    signs = (means[:, first] - means[:, second]).sign()
    signs = signs[signs.abs().sum(-1) > 0]  # [pair, member]
    if len(signs) == 0:
        return 0.0
    # (sum s)^2 - sum s^2 is twice the sum over pairs of members of s_a s_b
    agreed = (signs.sum(-1).square() - signs.square().sum(-1)) / (members * (members - 1))
    return ((1 - agreed) / 2).mean().item()


# ---- of the states -----------------------------------------------------------------------------


def drift(
    states: Float[Tensor, "completion hidden"], reference: Float[Tensor, "other hidden"]
) -> float:
    """Energy coefficient of the completions' states and the reference's: 0 the same, 1 apart.

    `1 - (E|X - X'| + E|Y - Y'|) / (2 E|X - Y|)`: the energy distance (Szekely and Rizzo 2013,
    https://doi.org/10.1016/j.jspi.2013.03.018; here the V form) free of the states' scale.
    """
    x, y = states.double(), reference.double()
    between, *within = (
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").mean()
        for a, b in ((x, y), (x, x), (y, y))
    )
    return 0.0 if between == 0 else (1 - (within[0] + within[1]) / (2 * between)).item()


def outlyingness(
    states: Float[Tensor, "completion hidden"], reference: Float[Tensor, "other hidden"]
) -> float:
    """Squared Mahalanobis distance to the reference's states over their number of dimensions.

    The mean over completions: for the reference itself 1 where all dimensions vary alike, less
    where few carry the variance. The covariance is shrunk by `SHRINKAGE` towards the identity times
    its mean variance, so that few states suffice.
    """
    x, y = states.double(), reference.double()
    mean, size = y.mean(0), y.shape[1]
    centred = y - mean
    covariance = centred.T @ centred / len(y)
    variance = covariance.diagonal().mean().clamp_min(1e-12)
    eye = torch.eye(size, dtype=y.dtype)
    covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * variance * eye
    away = x - mean
    return (away * torch.linalg.solve(covariance, away.T).T).sum(1).mean().item() / size


# ---- all of them -------------------------------------------------------------------------------


def signals_of(seen: Seen, reference: Seen, *, samples: int) -> dict[str, float]:
    """Return the signals that a monitor has of a step's completions.

    Completions with a reward that is not finite are left out, for `disagreement` with all others
    of their prompt.

    Args:
        seen: Of the step's completions, those of a prompt in a row.
        reference: Of the reference policy's completions.
        samples: Completions of each prompt.

    Returns:
        Their values, by name; NaN where no completion has finite rewards.
    """
    finite = seen.posterior.means.isfinite().all(1)
    own = seen.some(finite)
    before = reference.some(reference.posterior.means.isfinite().all(1))
    found = {"gain": lambda: gain(own.posterior, before.posterior)}
    if own.posterior.members > 1:
        found["spread"] = lambda: spread(own.posterior)
        found["gap"] = lambda: gap(own.posterior)
        found["spread_share"] = lambda: spread_share(own.posterior, before.posterior)
    if own.posterior.members > 1 and samples > 1:
        whole = finite.view(-1, samples).all(1)
        means = seen.posterior.means.view(-1, samples, own.posterior.members)
        found["disagreement"] = lambda: disagreement(means[whole])
    if own.posterior.stds is not None:
        found["width"] = lambda: width(own.posterior)
    states, others = own.states, before.states
    if states is not None and others is not None:
        found["drift"] = lambda: drift(states, others)
        found["outlyingness"] = lambda: outlyingness(states, others)
    return {name: value() if finite.any() else math.nan for name, value in found.items()}
