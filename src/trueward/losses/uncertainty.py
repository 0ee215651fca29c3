"""Losses for members that give a mean and a standard deviation.

Per example and per member, `[batch, member]` in and out: a caller whose members see subsets of
the data multiplies by its mask and reduces. Yan et al. 2024, BRME
(https://arxiv.org/abs/2409.15360) trains the members with an MSE, as secondary sources tell;
`mse_reparam_loss` on drawn rewards is our reading of it.

Which losses can learn a std. `mse_reparam_loss` and `bt_reparam_loss` grow with the std whatever
the error, so both drive every std to zero: put a floor under it at the head. `gaussian_nll_loss`
has its minimum at `std = |mean - target|`. `bt_marginal_loss` falls with the std of a pair in the
wrong order and grows with that of a pair in the right order.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward.losses.shapes import require_same_shape

# Nodes for the expectation over a standard normal. On an even grid the trapezoidal rule converges
# geometrically for such integrands; 193 nodes give sigmoid's expectation to 1e-6 up to a margin
# std of 10, where Gauss-Hermite with 20 nodes is off by 5e-2, and by 3e-3 already at 4.
_GRID_LIMIT = 12.0
_GRID_NODES = 193


def mse_reparam_loss(
    means: Float[Tensor, "batch member"],
    stds: Float[Tensor, "batch member"],
    targets: Float[Tensor, " batch"] | Float[Tensor, "batch member"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch member"]:
    """Squared error of one draw per member, `(mean + std * z - target)^2` with `z ~ N(0, 1)`.

    Yan et al. 2024, stage 2 (https://arxiv.org/abs/2409.15360). Its expectation is
    `(mean - target)^2 + std^2`: every std goes to zero.

    Args:
        means: Each member's reward.
        stds: Each member's standard deviation.
        targets: One per example, or one per example and member.
        generator: Source of `z`.
    """
    require_same_shape(means=means, stds=stds)
    return (_draw(means, stds, generator) - _per_member(targets, means)).square()


def gaussian_nll_loss(
    means: Float[Tensor, "batch member"],
    stds: Float[Tensor, "batch member"],
    targets: Float[Tensor, " batch"] | Float[Tensor, "batch member"],
) -> Float[Tensor, "batch member"]:
    """Negative log-likelihood of the target, `log std + (mean - target)^2 / (2 std^2)`.

    Less the constant `log(2 pi) / 2`. Lou et al. 2024, URM (https://arxiv.org/abs/2410.00847)
    has it as an option.

    Args:
        means: Each member's reward.
        stds: Each member's standard deviation, positive: floor it at the head.
        targets: One per example, or one per example and member.
    """
    require_same_shape(means=means, stds=stds)
    return stds.log() + ((means - _per_member(targets, means)) / stds).square() / 2


def bt_reparam_loss(
    chosen_means: Float[Tensor, "batch member"],
    chosen_stds: Float[Tensor, "batch member"],
    rejected_means: Float[Tensor, "batch member"],
    rejected_stds: Float[Tensor, "batch member"],
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch member"]:
    """Bradley-Terry loss of drawn rewards, the mean of the log: `E[-log sigmoid(r_w - r_l)]`.

    Both rewards are drawn from their Gaussians. By Jensen's inequality it grows with the std for
    every margin: stds go to zero.

    Args:
        chosen_means: Each member's reward of the preferred completions.
        chosen_stds: Their standard deviations.
        rejected_means: Each member's reward of the others.
        rejected_stds: Their standard deviations.
        samples: Draws to average over; the expectation does not depend on it.
        generator: Source of the draws.
    """
    margins = _margin_draws(
        chosen_means, chosen_stds, rejected_means, rejected_stds, samples, generator
    )
    return -F.logsigmoid(margins).mean(dim=0)


def bt_marginal_loss(
    chosen_means: Float[Tensor, "batch member"],
    chosen_stds: Float[Tensor, "batch member"],
    rejected_means: Float[Tensor, "batch member"],
    rejected_stds: Float[Tensor, "batch member"],
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch member"]:
    """Bradley-Terry loss of the marginal probability, the log of the mean.

    `-log E[sigmoid(r_w - r_l)]`. PURM, Eq. 4 (https://arxiv.org/abs/2503.22480), which estimates
    the expectation from draws. It needs one dimension only, the margin
    `N(mean_w - mean_l, std_w^2 + std_l^2)`, so the default integrates it numerically, without
    noise and without the upward bias that the log of a sample mean has.

    Args:
        chosen_means: Each member's reward of the preferred completions.
        chosen_stds: Their standard deviations.
        rejected_means: Each member's reward of the others.
        rejected_stds: Their standard deviations.
        samples: Estimate from this many draws, as the paper does; None integrates.
        generator: Source of the draws; only with `samples`.
    """
    if samples is not None:
        margins = _margin_draws(
            chosen_means, chosen_stds, rejected_means, rejected_stds, samples, generator
        )
        return math.log(samples) - F.logsigmoid(margins).logsumexp(dim=0)
    if generator is not None:
        raise ValueError("generator has no use without draws; give samples too, or drop it.")
    _require_pairs(chosen_means, chosen_stds, rejected_means, rejected_stds)
    variance = chosen_stds.square() + rejected_stds.square()
    # The square root's slope at 0 is infinite: without the floor two stds of 0 give NaN gradients.
    std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    nodes = torch.linspace(
        -_GRID_LIMIT, _GRID_LIMIT, _GRID_NODES, dtype=std.dtype, device=std.device
    )[:, None, None]
    log_weights = (-nodes.square() / 2).log_softmax(dim=0)
    margins = chosen_means - rejected_means + std * nodes
    return -(F.logsigmoid(margins) + log_weights).logsumexp(dim=0)


def bhattacharyya_coefficient(
    mean_1: Float[Tensor, "*batch"],
    std_1: Float[Tensor, "*batch"],
    mean_2: Float[Tensor, "*batch"],
    std_2: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Overlap of two Gaussians, the integral of `sqrt(p_1 p_2)`: 1 if equal, 0 if disjoint.

    `sqrt(2 s_1 s_2 / (s_1^2 + s_2^2)) exp(-(m_1 - m_2)^2 / (4 (s_1^2 + s_2^2)))`. The uncertainty
    of a comparison in PURM (https://arxiv.org/abs/2503.22480).
    """
    require_same_shape(mean_1=mean_1, std_1=std_1, mean_2=mean_2, std_2=std_2)
    variance = std_1.square() + std_2.square()
    scale = (2 * std_1 * std_2 / variance).sqrt()
    return scale * (-(mean_1 - mean_2).square() / (4 * variance)).exp()


def _draw(means: Tensor, stds: Tensor, generator: torch.Generator | None) -> Tensor:
    z = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
    return means + stds * z


def _per_member(targets: Tensor, means: Tensor) -> Tensor:
    if targets.ndim == 1:
        targets = targets[:, None].expand(-1, means.shape[1])
    require_same_shape(means=means, targets=targets)
    return targets


def _require_pairs(
    chosen_means: Tensor, chosen_stds: Tensor, rejected_means: Tensor, rejected_stds: Tensor
) -> None:
    require_same_shape(
        chosen_means=chosen_means,
        chosen_stds=chosen_stds,
        rejected_means=rejected_means,
        rejected_stds=rejected_stds,
    )


def _margin_draws(
    chosen_means: Tensor,
    chosen_stds: Tensor,
    rejected_means: Tensor,
    rejected_stds: Tensor,
    samples: int,
    generator: torch.Generator | None,
) -> Float[Tensor, "sample batch member"]:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    _require_pairs(chosen_means, chosen_stds, rejected_means, rejected_stds)
    shape = (samples, *chosen_means.shape)
    chosen = _draw(chosen_means.expand(shape), chosen_stds, generator)
    rejected = _draw(rejected_means.expand(shape), rejected_stds, generator)
    return chosen - rejected
