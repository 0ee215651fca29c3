"""How different the members of an ensemble are, from their weights."""

import torch
from jaxtyping import Float
from torch import Tensor


def nuclear_norm_diversity(stacked: Float[Tensor, "*matrix rows d"]) -> Float[Tensor, "*matrix"]:
    """Nuclear norm over Frobenius norm of the members' matrices, stacked: `||A||_* / ||A||_F`.

    The diversity of UP-RLHF, to be maximised: `A = [A_1; ...; A_N]`, the members' LoRA matrices of
    one layer one below the other. Zhai et al. 2024, Eq. 12 (https://arxiv.org/abs/2401.00243). The
    sum of the singular values over the root of the sum of their squares lies between 1, where all
    rows are multiples of one, and `sqrt(min(rows, d))`, where all singular values are equal, as
    those of orthogonal rows of one length. Identical members of rank r reach `sqrt(r)` at most.
    It does not depend on the matrix's scale.

    Args:
        stacked: One matrix, or any number of them along leading axes; computed in float32 at least.

    Returns:
        One value for each matrix; 0 for a matrix of zeros, whose ratio has no value.
    """
    if stacked.dtype in (torch.float16, torch.bfloat16):
        stacked = stacked.float()
    with torch.autocast(stacked.device.type, enabled=False):
        values = torch.linalg.svdvals(stacked)
        tiny = torch.finfo(values.dtype).tiny
        return values.sum(-1) / values.square().sum(-1).clamp_min(tiny).sqrt()
