"""An ensemble of low-rank adapters on one frozen base, all members in one forward.

UP-RLHF, Zhai et al. 2024, "Uncertainty-Penalized RLHF with Diverse Reward LoRA Ensembles"
(https://arxiv.org/abs/2401.00243): member n computes every adapted layer with the weight
`W0 + scale * B_n A_n` (Eq. 11, before its mean) and has a reward head of its own. Below the first
adapted layer the members agree, so their common part, the trunk, is computed once; from there on
rows travel as [member * row]. One base is in memory, however many the members.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trueward.data.packing import PackedBatch
from trueward.losses.diversity import nuclear_norm_diversity
from trueward.models.backbone import hidden_states
from trueward.models.heads import Head, HeadOutput


class MemberHeads(Head):
    """One linear reward for each member, on that member's own state; no bias, no stds.

    Weights start from N(0, 1/(d+1)), as those of `ScalarHead`.
    """

    has_stds = False

    def __init__(self, hidden_size: int, members: int = 5) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"MemberHeads needs at least one member, got members={members}.")
        self.members = members
        self.weight = nn.Parameter(torch.empty(members, hidden_size, dtype=torch.float32))
        nn.init.normal_(self.weight, std=1 / math.sqrt(hidden_size + 1))

    def forward(self, hidden: Float[Tensor, "... member hidden"]) -> HeadOutput:
        """Return each member's mean, of the state that is its own; float32 even under autocast."""
        return HeadOutput((hidden.float() * self.weight).sum(-1), None)

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build these heads again."""
        return {"kind": "member", "members": self.members}


class MemberAdapter(nn.Module):
    """The members' `scale * B_n A_n` beside one linear layer of the base, in float32.

    `a` is uniform in +-1/sqrt(inputs), as peft has it, and differs from member to member; `b` is
    zero, so that all members start as the base.
    """

    def __init__(
        self, inputs: int, outputs: int, *, members: int, rank: int, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(members, rank, inputs, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(members, outputs, rank, dtype=torch.float32))

    def add(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add each member's part to what the base's layer gave: a forward hook of that layer."""
        x = args[0].reshape(self.a.shape[0], -1, args[0].shape[-1])
        low = x @ self.a.mT
        base = output.view(x.shape[0], x.shape[1], -1)
        return torch.baddbmm(base, low, self.b.mT, alpha=self.scale).view_as(output)
