"""Divergence and mutual information for representations of two views.

Federici et al. 2020, Multi-View Information Bottleneck (https://arxiv.org/abs/2002.07017), as
used in RLP-UML, Lang et al. 2024 (https://arxiv.org/abs/2403.19279): one encoder gives each view
a diagonal Gaussian; the views' Gaussians are drawn together and the mutual information of their
draws is held up. InfoNCE is the contrastive loss that this is compared with.
"""

import torch
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


def info_nce_loss(
    z_1: Float[Tensor, "batch dim"],
    z_2: Float[Tensor, "batch dim"],
    *,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Symmetric InfoNCE: each view has to find its partner among the other views of the batch.

    `-1/2 [log softmax_j(s_ij)_i + log softmax_j(s_ji)_i]` with `s_ij = cos(z_1i, z_2j) / t`. Van
    den Oord et al. 2018, Eq. 4 (https://arxiv.org/abs/1807.03748), in both directions as Radford et
    al. 2021 (https://arxiv.org/abs/2103.00020). Views that tell nothing give `log B`, and `log B`
    less its mean is a lower bound of their mutual information.

    Args:
        z_1: First view of each; its length does not matter.
        z_2: Second view of each. The other rows are its negatives, so they must be of others.
        temperature: t, above 0; lower ones weigh the nearest negatives more.

    Raises:
        ValueError: A batch of one, which has no negatives, or a temperature that is not above 0.
    """
    require_same_shape(z_1=z_1, z_2=z_2)
    if len(z_1) < 2:
        raise ValueError(f"InfoNCE needs negatives: a batch of at least 2, got {len(z_1)}.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}.")
    similarity = F.normalize(z_1, dim=1) @ F.normalize(z_2, dim=1).T / temperature
    partner = torch.arange(len(z_1), device=z_1.device)
    forward = F.cross_entropy(similarity, partner, reduction="none")
    backward = F.cross_entropy(similarity.T, partner, reduction="none")
    return (forward + backward) / 2


def _log_kernel(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Diagonal Gaussian log density, less its normaliser."""
    return -((z - mean) / std).square().sum(dim=1) / 2
