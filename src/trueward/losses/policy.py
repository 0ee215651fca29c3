"""The pieces of policy optimisation: KL estimates, clipped losses, advantages, masked statistics.

Completions are right-padded, `[batch, seq]`, and `mask` is True on their tokens, the EOS included.
What a padded position holds is never read, NaN included.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueward.losses.shapes import require_same_shape

# exp overflows float32 near 88, and a ratio of e^20 is past any use: both ends are held here.
_MAX_LOG_RATIO = 20.0
# Keeps a division by a vanishing variance finite.
_WHITEN_EPS = 1e-8


def kl_estimate(
    logprobs: Float[Tensor, "*tokens"],
    ref_logprobs: Float[Tensor, "*tokens"],
    *,
    estimator: Literal["k1", "k2", "k3"],
) -> Float[Tensor, "*tokens"]:
    """Estimate of `KL(policy || ref)` at each token, for tokens sampled from the policy.

    With `l = logprobs - ref_logprobs`: `k1 = l`, unbiased, of either sign, the one for a reward
    (detach it there); `k2 = l^2 / 2`, biased as a value, but its gradient on the policy's own
    samples is that of the KL; `k3 = exp(-l) - 1 + l`, unbiased, never negative, of low variance,
    but with a biased gradient. Schulman 2020 (http://joschu.net/blog/kl-approx.html); gradients:
    https://arxiv.org/abs/2510.01555. `l` is clamped to +-20 inside k3's exponential and nowhere
    else: clamping k1 at zero would bias it upwards.

    Args:
        logprobs: Of the sampled tokens under the policy.
        ref_logprobs: Of the same tokens under the reference policy.
        estimator: Name it in the metric's key.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        # expm1: the terms of order l cancel, and with exp(.) - 1 so would the digits.
        return torch.expm1(-log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)) + log_ratio
    raise ValueError(f'estimator must be "k1", "k2" or "k3", got {estimator!r}.')


def squared_kl_loss(
    logprobs: Float[Tensor, "*tokens"],
    ref_logprobs: Float[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """KL to the reference as a loss, to differentiate: `l^2`, `l = logprobs - ref_logprobs`.

    Zhai et al. 2024, UP-RLHF, Eq. 15 (https://arxiv.org/abs/2401.00243), here token by token. It is
    twice k2, so k2 has half its gradient, `2 l grad log pi`; over the policy's own samples that is
    on average twice the gradient of each token's `KL(policy || ref)`, the text before it held
    fixed.

    A k1 in the reward is another thing. There the price of a token is also paid by the tokens
    before it, which led to it, and it passes through baselines, whitening and clipping with the
    reward; here a token pays for itself alone, at full strength whatever its advantage is. And k1
    as a loss would do nothing: its gradient, `grad log pi`, is zero on average.

    Args:
        logprobs: Of the sampled tokens under the policy that is being trained.
        ref_logprobs: Of the same tokens under the reference policy, a constant.
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return (logprobs - ref_logprobs).square()


def ppo_clip_loss(
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    clip_range: float = 0.2,
) -> Float[Tensor, "*tokens"]:
    """PPO's clipped surrogate, to minimise: `-min(w A, clip(w, 1 - c, 1 + c) A)` at each token.

    `w = exp(logprobs - old_logprobs)`, its logarithm clamped to +-20. Schulman et al. 2017, Eq. 7
    (https://arxiv.org/abs/1707.06347).

    Args:
        logprobs: Under the policy that is being trained.
        old_logprobs: Under the policy that sampled the tokens, a constant.
        advantages: A constant per token.
        clip_range: `c`.
    """
    _require_positive("clip_range", clip_range)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = (logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def value_clip_loss(
    values: Float[Tensor, "*tokens"],
    old_values: Float[Tensor, "*tokens"],
    returns: Float[Tensor, "*tokens"],
    *,
    clip_range: float = 0.2,
) -> Float[Tensor, "*tokens"]:
    """Clipped value loss, `1/2 max((V - R)^2, (V_c - R)^2)` at each token.

    `V_c = V_old + clip(V - V_old, -c, c)`: a value that has moved further than `c` towards the
    return gets no more gradient. From OpenAI's PPO code; Engstrom et al. 2020, section 3
    (https://arxiv.org/abs/2005.12729).

    Args:
        values: Of the value model that is being trained.
        old_values: At the time of the rollout, a constant.
        returns: Targets, a constant.
        clip_range: `c`, in units of reward; infinity turns clipping off.
    """
    _require_positive("clip_range", clip_range)
    require_same_shape(values=values, old_values=old_values, returns=returns)
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


class AdvantagesAndReturns(NamedTuple):
    """Zero outside the mask."""

    advantages: Float[Tensor, "batch seq"]
    returns: Float[Tensor, "batch seq"]


def generalized_advantages(
    rewards: Float[Tensor, "batch seq"],
    values: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> AdvantagesAndReturns:
    """Generalised advantage estimates (GAE) and the value targets that go with them.

    `A_t = sum_k (gamma lam)^k delta_{t+k}`, `delta_t = r_t + gamma V_{t+1} - V_t`, and
    `returns = A + V`. Schulman et al. 2016, Eq. 16 (https://arxiv.org/abs/1506.02438). A
    completion ends at its last token: the value beyond it is zero.

    Args:
        rewards: Per token, as `terminal_rewards` makes them.
        values: Value of the state in which each token is chosen.
        mask: True on a completion's tokens, from the first position on.
        gamma: Discount, in [0, 1].
        lam: 0 trusts the value model, 1 the sampled rewards.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {number}.")
    require_same_shape(rewards=rewards, values=values, mask=mask)
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "mask must be True from the first position to the completion's end, got a row with a "
            "gap or left padding; pad completions on the right."
        )
    rewards = _zero_outside(rewards, mask)
    values = _zero_outside(values, mask)
    following = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(values[:, 0])
    backwards = []
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * following - values[:, step]
        advantage = delta + gamma * lam * advantage  # stays 0 until the last real token
        following = values[:, step]
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return AdvantagesAndReturns(advantages, advantages + values)


def leave_one_out_advantages(
    rewards: Float[Tensor, "prompt group"],
) -> Float[Tensor, "prompt group"]:
    """Each completion's reward less the mean reward of the prompt's other completions (RLOO).

    Kool et al. 2019; Ahmadian et al. 2024 (https://arxiv.org/abs/2402.14740). A reward that is
    not finite leaves the baseline and gets the advantage 0; so does one with nobody left beside.

    Args:
        rewards: Of the completions of each prompt, at least two.
    """
    _require_group(rewards)
    shifted, valid, count = _shifted_rewards(rewards)
    others = (shifted.sum(dim=1, keepdim=True) - shifted) / (count - 1).clamp_min(1)
    return torch.where(valid, shifted - others, 0.0)


def group_advantages(
    rewards: Float[Tensor, "prompt group"],
    *,
    scale: bool = True,
    eps: float = 1e-4,
) -> Float[Tensor, "prompt group"]:
    """Each completion's reward less its group's mean, divided by the group's std (GRPO).

    `(r - mean) / (std + eps)`, the std with ddof 1. Shao et al. 2024, section 4.1.2
    (https://arxiv.org/abs/2402.03300). A group of equal rewards gets exactly zero. Dividing by
    the std blows up differences that may be the reward model's noise: `scale=False` (Liu et al.
    2025, https://arxiv.org/abs/2503.20783) leaves them as they are. A reward that is not finite
    leaves mean and std and gets the advantage 0.

    Args:
        rewards: Of the completions of each prompt, at least two.
        scale: Whether to divide by the std.
        eps: Added to the std.
    """
    _require_group(rewards)
    _require_positive("eps", eps)
    shifted, valid, count = _shifted_rewards(rewards)
    mean = shifted.sum(dim=1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(valid, shifted - mean, 0.0)
    if not scale:
        return centred
    variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp_min(1)
    return centred / (variance.sqrt() + eps)


def terminal_rewards(
    kl: Float[Tensor, "batch seq"],
    scores: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch seq"],
    *,
    kl_coef: float,
) -> Float[Tensor, "batch seq"]:
    """Per-token rewards: `-kl_coef * kl` at every token, plus the score at the last real one.

    Ziegler et al. 2019, section 2 (https://arxiv.org/abs/1909.08593). Zero outside the mask.

    Args:
        kl: Per-token estimate, k1, detached.
        scores: The reward of each whole completion.
        mask: True on a completion's tokens; each completion has at least one.
        kl_coef: Price of a nat.
    """
    if not 0.0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef must be finite and at least 0, got {kl_coef}.")
    require_same_shape(kl=kl, mask=mask)
    require_same_shape(rows_of_mask=mask.any(dim=1), scores=scores)
    if not bool(mask.any(dim=1).all()):
        row = int((~mask.any(dim=1)).nonzero()[0, 0])
        raise ValueError(f"every completion needs a token to carry its score, row {row} has none.")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    return torch.where(
        positions == last,
        scores[:, None] - kl_coef * kl,
        _zero_outside(-kl_coef * kl, mask),
    )


def masked_mean(
    values: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
) -> Float[Tensor, ""]:
    """Mean over the positions where the mask is True; 0 if there are none."""
    require_same_shape(values=values, mask=mask)
    return _zero_outside(values, mask).sum() / mask.sum().clamp_min(1)


def masked_whiten(
    values: Float[Tensor, "*tokens"],
    mask: Bool[Tensor, "*tokens"],
    *,
    shift_mean: bool = True,
) -> Float[Tensor, "*tokens"]:
    """Values at mean 0 and variance 1 (ddof 0) over the mask, zero outside it.

    With `shift_mean=False` the mean stays where it was, which is how PPO implementations whiten
    rewards; every token then still gets `mean (1 - 1 / std)` more than plain scaling would give it.
    Equal values give exactly zero (or their mean). In several processes, gather before this.
    """
    require_same_shape(values=values, mask=mask)
    if not bool(mask.any()):
        return torch.zeros_like(values)
    # Counted from the smallest, so that equal values give exact zeros and not rounding errors
    # divided by a vanishing std.
    anchor = torch.where(mask, values, math.inf).amin()
    shifted = values - anchor
    mean = masked_mean(shifted, mask)
    centred = _zero_outside(shifted - mean, mask)
    whitened = centred * (masked_mean(centred.square(), mask) + _WHITEN_EPS).rsqrt()
    if shift_mean:
        return whitened
    return _zero_outside(whitened + anchor + mean, mask)


def _zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    # Not values * mask: NaN * 0 is NaN.
    return torch.where(mask, values, 0.0)


def _shifted_rewards(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards above the group's lowest (0 where not finite), which are finite, how many are.

    No advantage depends on the shift; with it a group of equal rewards gives exact zeros.
    """
    valid = rewards.isfinite()
    lowest = torch.where(valid, rewards, math.inf).amin(dim=1, keepdim=True)
    shifted = torch.where(valid, rewards - lowest, 0.0)
    return shifted, valid, valid.sum(dim=1, keepdim=True)


def _require_group(rewards: Tensor) -> None:
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            "rewards must have the shape [prompt, group] with a group of at least 2, got "
            f"{tuple(rewards.shape)}; sample more completions per prompt."
        )


def _require_positive(name: str, number: float) -> None:
    if not number > 0.0:
        raise ValueError(f"{name} must be positive, got {number}.")
