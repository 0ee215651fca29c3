"""Divergence and mutual information for representations of two views.

Federici et al. 2020, Multi-View Information Bottleneck (https://arxiv.org/abs/2002.07017), as
used in RLP-UML, Lang et al. 2024 (https://arxiv.org/abs/2403.19279): one encoder gives each view
a diagonal Gaussian; the views' Gaussians are drawn together and the mutual information of their
draws is held up.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward.losses.shapes import require_same_shape


def gaussian_symmetric_kl(
    mean_1: Float[Tensor, "batch dim"],
    std_1: Float[Tensor, "batch dim"],
    mean_2: Float[Tensor, "batch dim"],
    std_2: Float[Tensor, "batch dim"],
) -> Float[Tensor, " batch"]:
    """Symmetrised KL of two diagonal Gaussians, `(KL(p_1||p_2) + KL(p_2||p_1)) / 2`, in nats.

    `1/4 sum_d [(s_1^2 + D^2) / s_2^2 + (s_2^2 + D^2) / s_1^2 - 2]`, `D = mean_1 - mean_2`: the
    logarithms of the two directions cancel. The D_SKL of Lang et al. 2024, section 4.2
    (https://arxiv.org/abs/2403.19279), in closed form.

    Args:
        mean_1: Mean of the first view's Gaussian.
        std_1: Its standard deviations, positive.
        mean_2: Mean of the second view's Gaussian.
        std_2: Its standard deviations, positive.
    """
    require_same_shape(mean_1=mean_1, std_1=std_1, mean_2=mean_2, std_2=std_2)
    variance_1, variance_2 = std_1.square(), std_2.square()
    gap = (mean_1 - mean_2).square()
    terms = (variance_1 + gap) / variance_2 + (variance_2 + gap) / variance_1 - 2
    return terms.sum(dim=1) / 4


def gaussian_symmetric_kl_sample(
    mean_1: Float[Tensor, "batch dim"],
    std_1: Float[Tensor, "batch dim"],
    mean_2: Float[Tensor, "batch dim"],
    std_2: Float[Tensor, "batch dim"],
    z_1: Float[Tensor, "batch dim"],
    z_2: Float[Tensor, "batch dim"],
) -> Float[Tensor, " batch"]:
    """One-draw estimate of `gaussian_symmetric_kl`, unbiased, but noisy and at times negative.

    `1/2 [log p_1(z_1) - log p_2(z_1) + log p_2(z_2) - log p_1(z_2)]`, summed over dimensions, the
    form that the authors of the Multi-View Information Bottleneck train on
    (https://arxiv.org/abs/2002.07017).

    Args:
        mean_1: Mean of the first view's Gaussian.
        std_1: Its standard deviations, positive.
        mean_2: Mean of the second view's Gaussian.
        std_2: Its standard deviations, positive.
        z_1: A reparameterised draw from the first.
        z_2: A reparameterised draw from the second.
    """
    require_same_shape(mean_1=mean_1, std_1=std_1, mean_2=mean_2, std_2=std_2, z_1=z_1, z_2=z_2)
    # The normalisers of the densities cancel between the two terms.
    at_1 = _log_kernel(z_1, mean_1, std_1) - _log_kernel(z_1, mean_2, std_2)
    at_2 = _log_kernel(z_2, mean_2, std_2) - _log_kernel(z_2, mean_1, std_1)
    return (at_1 + at_2) / 2


def jensen_shannon_mi(
    joint_scores: Float[Tensor, " batch"],
    product_scores: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Jensen-Shannon estimate of mutual information, to maximise: `-softplus(-T) - softplus(T')`.

    `T` is the critic's score of a matched pair `(z_1, z_2)`, `T'` that of an independent pair.
    Hjelm et al. 2019, Eq. 4 (https://arxiv.org/abs/1808.06670). The best critic is the log ratio
    of joint to product density; there the mean is `2 D - 2 log 2`, with `D` the Jensen-Shannon
    divergence of joint and product. So it lies between `-2 log 2` (what `T = 0` gives) and 0: a
    surrogate that rises with the mutual information, not nats.

    Args:
        joint_scores: Critic on matched pairs.
        product_scores: Critic on mismatched pairs. Rolling one view within the batch makes them,
            but of a batch of one it gives back the matched pair, and the estimate means nothing.
    """
    require_same_shape(joint_scores=joint_scores, product_scores=product_scores)
    return -F.softplus(-joint_scores) - F.softplus(product_scores)


def _log_kernel(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Diagonal Gaussian log density, less its normaliser."""
    return -((z - mean) / std).square().sum(dim=1) / 2
