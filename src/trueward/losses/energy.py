"""Noise-contrastive estimation of an energy over rewards: the loss of EBRM, and its noise.

Lochab and Zhang 2025, "Energy-Based Reward Models" (https://arxiv.org/abs/2504.13134), with the
NCE+ of Gustafsson et al. 2020, "How to Train Your Energy-Based Model for Regression"
(https://arxiv.org/abs/2005.01698): the density `p(r|e) = exp f(e, r) / Z(e)` is learned by telling
one example from M draws of a known noise, without the integral `Z`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.losses.shapes import require_same_shape


def nce_loss(
    energies: Float[Tensor, "batch candidate"],
    log_noise: Float[Tensor, "batch candidate"],
    *,
    regularisation: float = 0.0,
) -> Float[Tensor, " batch"]:
    """Negative log-probability of finding the example among noise, plus `lam * mean f^2`.

    `-log [w_0 / sum_{m=0..M} w_m] + lam / (M + 1) sum_m f_m^2` with `w_m = exp(f_m - log q_m)`,
    in log space. As M grows, the first term tends to `log Z - f_0` up to a constant: the negative
    log-likelihood of the perturbed example. The second keeps `f` near 0, which pins the constant
    that the first leaves free, and flattens the density.

    Args:
        energies: `f(e, r^(m))`, the example (m = 0) first, then M draws of the noise. Higher is
            likelier.
        log_noise: `log p_N(r^(m) | r)`, the log density of the noise at each candidate.
        regularisation: `lam`.
    """
    require_same_shape(energies=energies, log_noise=log_noise)
    if regularisation < 0:
        raise ValueError(f"regularisation must be at least 0, got {regularisation}.")
    found = (energies - log_noise).log_softmax(dim=1)[:, 0]
    return regularisation * energies.square().mean(dim=1) - found


def noise_log_density(
    rewards: Float[Tensor, "batch candidate"],
    centres: Float[Tensor, " batch"],
    *,
    stds: Sequence[float],
) -> Float[Tensor, "batch candidate"]:
    """Log density of the noise, `p_N(r | c) = 1/K sum_k N(r; c, s_k^2)`.

    Args:
        rewards: Where it is asked for.
        centres: `c`, the reward of each example.
        stds: `s_1 .. s_K`.
    """
    scales = _scales(stds).to(rewards)
    z = (rewards - centres[:, None])[..., None] / scales
    logs = -z.square() / 2 - scales.log() - math.log(2 * math.pi) / 2
    return logs.logsumexp(dim=-1) - math.log(len(scales))


def noise_draws(
    centres: Float[Tensor, " batch"],
    *,
    stds: Sequence[float],
    samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch sample"]:
    """Draws from `1/K sum_k N(c, s_k^2)` for each example; see `noise_log_density`."""
    shape = (len(centres), samples)
    scales = _scales(stds).to(centres)
    of = torch.randint(len(scales), shape, generator=generator, device=centres.device)
    z = torch.randn(shape, generator=generator, dtype=centres.dtype, device=centres.device)
    return centres[:, None] + scales[of] * z


def nce_candidates(
    rewards: Float[Tensor, " batch"],
    *,
    stds: Sequence[float],
    beta: float,
    samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch candidate"]:
    """The example, perturbed, and M draws of the noise: what `nce_loss` compares.

    `r^(0) = r + v` with `v` from `p_b(v) = 1/K sum_k N(v; 0, (beta s_k)^2)`, and `r^(m)` from
    `p_N(. | r)` for `m = 1 .. M`. What is learned is so the density of `r + v`: for a reward that
    follows from the state, one of std `beta * s`.

    Args:
        rewards: One for each example.
        stds: `s_1 .. s_K` of the noise.
        beta: Share of them by which examples are perturbed; 0 leaves them as they are.
        samples: M.
        generator: Source of all draws.
    """
    if beta < 0 or samples < 1:
        raise ValueError(
            f"beta must be at least 0 and samples at least 1, got beta={beta} and "
            f"samples={samples}."
        )
    none = torch.zeros_like(rewards)
    jitter = beta * noise_draws(none, stds=stds, samples=1, generator=generator)
    noise = noise_draws(rewards, stds=stds, samples=samples, generator=generator)
    return torch.cat([rewards[:, None] + jitter, noise], dim=1)


def _scales(stds: Sequence[float]) -> Float[Tensor, " component"]:
    scales = torch.tensor(list(stds), dtype=torch.float64)
    if len(scales) == 0 or not bool((scales > 0).all()):
        raise ValueError(f"The noise needs at least one std, all above 0, got {list(stds)}.")
    return scales
