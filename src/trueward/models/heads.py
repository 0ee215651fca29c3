"""Reward heads: hidden states in, means (and stds) of the members out, always in float32."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # the floor keeps a collapsing std from reaching 0


class HeadOutput(NamedTuple):
    """Means and, where the head has them, stds of each member."""

    means: Float[Tensor, "... member"]
    stds: Float[Tensor, "... member"] | None


class Head(nn.Module):
    """What turns a completion's last state into the members' rewards.

    A head's weights and buffers are saved as `head.*`; `describe` tells, in JSON, how
    `models.head_kinds.make_head` builds it again.
    """

    members: int  # columns of the posterior
    has_stds: bool  # whether each member has a std of its own

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return means, and stds where the head has them."""
        raise NotImplementedError

    def describe(self) -> dict[str, object]:
        """Return the head's `kind` and the other arguments of its constructor."""
        raise NotImplementedError


class ScalarHead(Head):
    """One linear reward, without bias: Bradley-Terry sees differences only.

    Weights start from N(0, 1/(d+1)), so that rewards of unit-variance states have unit variance.
    """

    members = 1
    has_stds = False

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(hidden_size + 1))

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return one mean for each state; float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return HeadOutput(self.linear(hidden.float()), None)

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build this head again."""
        return {"kind": "scalar"}


class GaussianHeads(Head):
    """K members on one backbone, each a Gaussian over the reward: the heads of BRME.

    `out = W h` viewed as `[..., member, 2]`: a mean and a log std. Yan et al. 2024, "Reward-Robust
    RLHF in LLMs" (https://arxiv.org/abs/2409.15360); the clamp of the log std to [-5, 2] is ours.
    """

    has_stds = True

    def __init__(self, hidden_size: int, members: int = 5, *, dropout: float = 0.0) -> None:
        super().__init__()
        if members < 1:
            raise ValueError(f"GaussianHeads needs at least one member, got members={members}.")
        self.members = members
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_size, 2 * members, dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(hidden_size + 1))
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():  # stds start near 1
            self.linear.weight.view(members, 2, hidden_size)[:, 1] *= 0.1

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return each member's mean and std; float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.linear(self.dropout(hidden.float()))
        out = out.unflatten(-1, (self.members, 2))
        log_stds = out[..., 1].clamp(LOG_STD_MIN, LOG_STD_MAX)
        # No view: whatever a sharded model returns gets a hook, which a view could lose.
        return HeadOutput(out[..., 0].clone(), log_stds.exp())

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build these heads again."""
        return {"kind": "gaussian", "members": self.members, "dropout": self.dropout.p}
