"""Pure functions from tensors to one value per example, one per equation."""

from trueward.losses.diversity import nuclear_norm_diversity
from trueward.losses.energy import nce_candidates, nce_loss, noise_draws, noise_log_density
from trueward.losses.information import (
    gaussian_symmetric_kl,
    gaussian_symmetric_kl_sample,
    info_nce_loss,
    jensen_shannon_mi,
)
from trueward.losses.policy import (
    AdvantagesAndReturns,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_mean,
    masked_whiten,
    ppo_clip_loss,
    squared_kl_loss,
    terminal_rewards,
    value_clip_loss,
)
from trueward.losses.preference import (
    bradley_terry_loss,
    centring_loss,
    preference_probability,
)
from trueward.losses.uncertainty import (
    bhattacharyya_coefficient,
    bt_marginal_loss,
    bt_reparam_loss,
    gaussian_nll_loss,
    mse_reparam_loss,
)

__all__ = [
    "AdvantagesAndReturns",
    "bhattacharyya_coefficient",
    "bradley_terry_loss",
    "bt_marginal_loss",
    "bt_reparam_loss",
    "centring_loss",
    "gaussian_nll_loss",
    "gaussian_symmetric_kl",
    "gaussian_symmetric_kl_sample",
    "generalized_advantages",
    "group_advantages",
    "info_nce_loss",
    "jensen_shannon_mi",
    "kl_estimate",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_whiten",
    "mse_reparam_loss",
    "nce_candidates",
    "nce_loss",
    "noise_draws",
    "noise_log_density",
    "nuclear_norm_diversity",
    "ppo_clip_loss",
    "preference_probability",
    "squared_kl_loss",
    "terminal_rewards",
    "value_clip_loss",
]
