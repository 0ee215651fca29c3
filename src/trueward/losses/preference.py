"""Losses on pairs of rewards: one value per pair, to be reduced at the call site.

Rewards may have any shape, as long as both sides have the same: `[batch]` for one reward model,
`[batch, member]` for the members of an ensemble.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward.losses.shapes import require_same_shape


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, "*batch"],
    rejected_rewards: Float[Tensor, "*batch"],
    *,
    margin: Float[Tensor, "*batch"] | float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of each preference under the Bradley-Terry model.

    `-(1 - e) log sigmoid(d) - e log sigmoid(-d)`, with `d = chosen - rejected - margin`
    and `e = label_smoothing`. Ouyang et al. 2022, Eq. 1 (https://arxiv.org/abs/2203.02155);
    smoothing as in cDPO, Eq. 3 (https://ericmitchell.ai/cdpo.pdf).

    Args:
        chosen_rewards: Rewards of the preferred completions.
        rejected_rewards: Rewards of the others, pair by pair.
        margin: By how much the chosen reward should lead; one for all pairs or one per pair.
        label_smoothing: Assumed share of flipped labels, in [0, 0.5).

    Returns:
        One loss per pair; reduce it at the call site.
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}.")
    require_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if isinstance(margin, Tensor):
        require_same_shape(chosen_rewards=chosen_rewards, margin=margin)
    delta = chosen_rewards - rejected_rewards - margin
    return -(1 - label_smoothing) * F.logsigmoid(delta) - label_smoothing * F.logsigmoid(-delta)


def centring_loss(
    chosen_rewards: Float[Tensor, "*batch"],
    rejected_rewards: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """The square of each pair's sum of rewards, `(chosen + rejected)^2`.

    Bradley-Terry leaves a free constant per prompt, which makes a minimum or a variance over
    members meaningless; a small multiple of this term takes it away. Eisenstein et al. 2023
    (https://arxiv.org/abs/2312.09244).
    """
    require_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return (chosen_rewards + rejected_rewards).square()


def preference_probability(
    chosen_rewards: Float[Tensor, "*batch"],
    rejected_rewards: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """How likely the Bradley-Terry model holds each preference, `sigmoid(chosen - rejected)`."""
    require_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return (chosen_rewards - rejected_rewards).sigmoid()
