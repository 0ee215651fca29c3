"""An ensemble of low-rank adapters on one frozen base, all members in one forward.

UP-RLHF, Zhai et al. 2024, "Uncertainty-Penalized Reinforcement Learning from Human Feedback with
Diverse Reward LoRA Ensembles" (https://arxiv.org/abs/2401.00243). Member n computes each adapted
linear layer with the weight `W0 + scale * B_n A_n` (Eq. 11, before the mean over members) and reads
its own state with a head of its own. Below the first adapted layer all members agree: that trunk is
computed once, and from there on the rows travel as [member * row]. Whatever the number of members,
one base is in memory.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trueward.data.packing import PackedBatch
from trueward.losses.diversity import nuclear_norm_diversity
from trueward.models.backbone import hidden_states, layer_list
from trueward.models.heads import Head, HeadOutput

# On a CPU a part of a batch holds at most so many tokens of all members together for each thread:
# beyond that the activations leave the caches, and are mapped by the system anew for every
# operation. Fewer would call each layer too often: with half of them on two threads, five members
# of a model of 1 million parameters take 1.06 to 1.28 times as long.
CPU_TOKENS = 2048


class MemberHeads(Head):
    """One linear reward for each member, of the member's own state: no bias, no stds.

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


class MemberAdapters(nn.Module):
    """The members' `scale * B_n A_n` beside one linear layer of the base, in float32.

    A is drawn uniformly from +-1/sqrt(inputs), as peft draws it, for each member its own; B is
    zero, so that every member starts as the base.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        members: int,
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale = scale
        uniform = torch.rand(members, rank, inputs, generator=generator, dtype=torch.float32)
        self.a = nn.Parameter((2 * uniform - 1) / math.sqrt(inputs))
        self.b = nn.Parameter(torch.zeros(members, outputs, rank, dtype=torch.float32))

    def forward(self, x: Tensor, output: Tensor, *, common: bool = False) -> Tensor:
        """Add the members' parts to what the base's layer gave for `x`, rows as [member * row].

        Where all members read the same (`common`), `x` and `output` have its rows once.
        """
        members, rank, inputs = self.a.shape
        rows = x.reshape(1 if common else members, -1, inputs)
        base = output.reshape(rows.shape[0], rows.shape[1], -1)
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast:
            rows = rows.float()
        if common:  # one product for all members' A
            low = (rows[0] @ self.a.flatten(0, 1).T).unflatten(1, (members, rank)).transpose(0, 1)
        else:
            low = rows @ self.a.mT
        if autocast or base.dtype != torch.float32:
            added = (base + self.scale * (low @ self.b.mT)).to(base.dtype)
        elif common or torch.is_grad_enabled():
            added = torch.baddbmm(base, low, self.b.mT, alpha=self.scale)
        else:  # in place: nobody else holds the layer's output
            added = base.baddbmm_(low, self.b.mT, alpha=self.scale)
        return added.reshape(-1, *output.shape[1:])


class LoRAEnsemble(nn.Module):
    """Low-rank adapters of several members on the linear layers of one base.

    The base is not part of this module and is not changed: it computes as several members within
    `hidden_states` only.

    Args:
        backbone: The base; `nn.Linear` and GPT-2's `Conv1D` are adapted.
        members: N >= 1.
        rank: r >= 1, of each adapter.
        layers: How many of the backbone's layers are adapted, counted from the top.
        alpha: `scale = alpha / rank`; None for `2 * rank`, as `backbone.add_adapters`.
        seed: The first weights depend on it alone.

    Raises:
        ValueError: The numbers are out of range, or the backbone has no layers that can be adapted.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        *,
        members: int,
        rank: int,
        layers: int,
        alpha: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(backbone, PeftModel):
            raise ValueError("The backbone has adapters already: merge them before an ensemble.")
        for name, value in (("members", members), ("rank", rank)):
            if value < 1:
                raise ValueError(f"A LoRA ensemble needs {name} of at least 1, got {value}.")
        total = len(layer_list(backbone))
        if not 1 <= layers <= total:
            raise ValueError(f"layers must lie between 1 and the backbone's {total}, got {layers}.")
        self.members, self.rank, self.layers = members, rank, layers
        self.alpha = 2 * rank if alpha is None else alpha
        generator = torch.Generator().manual_seed(seed)
        self.adapters = nn.ModuleDict()
        for i, name, module in _linear_layers(backbone, layers):
            inputs, outputs = _width(module)
            self.adapters[_key(i, name)] = MemberAdapters(
                inputs,
                outputs,
                members=members,
                rank=rank,
                scale=self.alpha / rank,
                generator=generator,
            )
        if not self.adapters:
            raise ValueError(f"{type(backbone).__name__} has no linear layers to adapt.")

    def describe(self) -> dict[str, int]:
        """Return the arguments of the constructor, for a saved model's `config.json`."""
        return {
            "members": self.members,
            "rank": self.rank,
            "layers": self.layers,
            "alpha": self.alpha,
        }

    def stacked(self) -> list[Float[Tensor, "rows inputs"]]:
        """Return `[A_1; ...; A_N]`, `[members * rank, inputs]`, of each adapted linear layer."""
        return [adapter.a.flatten(0, 1) for adapter in self._adapters()]

    def _adapters(self) -> Iterator[MemberAdapters]:
        for adapter in self.adapters.values():
            assert isinstance(adapter, MemberAdapters)
            yield adapter

    def parts(self, batch: PackedBatch) -> Iterator[PackedBatch]:
        """Split a batch by rows into parts to be computed one after the other.

        On accelerators the batch is the only part; on a CPU see `CPU_TOKENS`.
        """
        rows, seq = batch.input_ids.shape
        at_once = max(1, CPU_TOKENS * torch.get_num_threads() // (self.members * seq))
        if batch.input_ids.device.type != "cpu" or at_once >= rows:
            yield batch
            return
        for first in range(0, rows, at_once):
            these = slice(first, first + at_once)
            inside = (batch.rows >= first) & (batch.rows < first + at_once)
            yield replace(
                batch,
                input_ids=batch.input_ids[these],
                position_ids=batch.position_ids[these],
                segments=batch.segments[these],
                rows=batch.rows[inside] - first,
                prompt_ends=batch.prompt_ends[inside],
                starts=batch.starts[inside],
                lengths=batch.lengths[inside],
            )

    def hidden_states(
        self, backbone: PreTrainedModel, batch: PackedBatch
    ) -> Float[Tensor, "member row seq hidden"]:
        """Return every member's last layer's states: one forward, whose trunk they share.

        Raises:
            ValueError: The backbone checkpoints its gradients, or one of its adapted layers reads
                some of the tokens only.
        """
        if backbone.training and any(
            getattr(module, "gradient_checkpointing", False) for module in backbone.modules()
        ):
            raise ValueError(
                "A LoRA ensemble cannot compute layers a second time for their gradients: switch "
                "gradient checkpointing off and lower max_batch_tokens instead."
            )
        with self._attached(backbone, batch):
            states = hidden_states(backbone, batch)
        return states.unflatten(0, (self.members, -1))

    @contextmanager
    def _attached(self, backbone: PreTrainedModel, batch: PackedBatch) -> Iterator[None]:
        """Make the base's upper layers compute as the members, for as long as this lasts."""
        rows, seq = batch.input_ids.shape
        # A sentence backbone's layers read one state of a text, not one of each token.
        states = 1 if getattr(backbone, "trueward_layers", None) is not None else seq
        one = _Pass(members=self.members, rows=rows, seq=states)
        layers = layer_list(backbone)
        handles: list[RemovableHandle] = []
        try:
            for layer in layers[len(layers) - self.layers :]:
                handles.append(layer.register_forward_pre_hook(one.enter, with_kwargs=True))
            for i, name, module in _linear_layers(backbone, self.layers):
                if i == len(layers) - self.layers and self.members > 1:
                    handles.append(module.register_forward_pre_hook(one.read_once))
                add = partial(one.add_members, self.adapters[_key(i, name)])
                handles.append(module.register_forward_hook(add))
            yield
        finally:
            for handle in handles:
                handle.remove()


def layer_count(share: float, total: int) -> int:
    """Return how many of `total` layers are meant: a share up to 1, a count above.

    The share is rounded, to one layer at least.

    Raises:
        ValueError: Not above 0, above `total`, or a count that is not whole.
    """
    if not 0 < share <= max(1, total) or (share > 1 and share != int(share)):
        raise ValueError(
            f"lora_layers must be a share in (0, 1] or a whole number of the backbone's {total} "
            f"layers, got {share}."
        )
    return int(share) if share > 1 else max(1, round(share * total))


def backbone_layers(backbone: PreTrainedModel) -> int:
    """Return the number of the backbone's layers."""
    return len(layer_list(backbone))


class AdapterDiversity(nn.Module):
    """Keeps the members' adapters apart: `-coef * mean_m ||A_m||_* / ||A_m||_F`.

    `A_m = [A_1; ...; A_N]` stacks the members' A matrices of the m-th adapted linear layer; the B
    matrices do not enter. Zhai et al. 2024, Eq. 12 (https://arxiv.org/abs/2401.00243), which prints
    the maximised sign and no value of the coefficient. Hand it to `train.reward.train_reward` as
    `auxiliary`; it has no parameters of its own.

    Args:
        coef: Weight of the mean; 0 only measures it.
    """

    def __init__(self, coef: float = 0.01) -> None:
        super().__init__()
        if coef < 0:
            raise ValueError(f"coef must be at least 0, got {coef}: diversity is to grow.")
        self.coef = coef

    def forward(self, reward_model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the term to add to the loss, and the mean itself as `diversity`."""
        del step
        lora = getattr(reward_model, "lora", None)
        if not isinstance(lora, LoRAEnsemble):
            raise ValueError(
                "AdapterDiversity is for a LoRA ensemble: make the model with "
                "RewardModel.from_backbone(..., lora_members=5, lora_rank=8)."
            )
        diversity = torch.stack([nuclear_norm_diversity(a) for a in lora.stacked()]).mean()
        return -self.coef * diversity, {"diversity": diversity.item()}


def _linear_layers(backbone: PreTrainedModel, layers: int) -> Iterator[tuple[int, str, nn.Module]]:
    """Yield (layer, name in it, module) of the linear layers in the upper `layers` of the base."""
    stack = layer_list(backbone)
    for i in range(len(stack) - layers, len(stack)):
        for name, module in stack[i].named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                yield i, name, module


def _key(layer: int, name: str) -> str:
    return f"{layer}/{name}".replace(".", "/")  # a module's name must not have dots


def _width(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]  # Conv1D keeps its weight transposed


class _Pass:
    """What one forward of a base as several members remembers, and the hooks that make it so."""

    def __init__(self, *, members: int, rows: int, seq: int) -> None:
        self.members, self.rows, self.tokens = members, rows, members * rows * seq
        self.repeated: dict[int, tuple[Tensor, Tensor]] = {}  # by identity, with the original
        self.blocks: dict[int, tuple[BlockMask, BlockMask]] = {}  # so too
        self.common: Tensor | None = None  # what every member's first linear layer reads, ...
        self.once: Tensor | None = None  # ... and the part of it that is one member's

    def enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give each member a copy of a layer's inputs: a forward pre-hook of the adapted layers.

        The states come with `rows` rows into the first of them only; masks, positions and rotary
        factors come so into each, and their copies serve all.
        """
        del layer
        if self.members == 1:
            return args, kwargs
        return tuple(map(self._repeat, args)), {k: self._repeat(v) for k, v in kwargs.items()}

    def _repeat(self, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(map(self._repeat, value))
        if isinstance(value, BlockMask):
            if id(value) not in self.blocks:
                where = torch.arange(self.rows, device=value.kv_num_blocks.device)
                blocks = value[where.repeat(self.members)]
                blocks.mask_mod = value.mask_mod  # slicing drops it; ours counts rows anew
                self.blocks[id(value)] = (value, blocks)
            return self.blocks[id(value)][1]
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] != self.rows:
            return value
        if id(value) not in self.repeated:
            copies = value.repeat(self.members, *[1] * (value.ndim - 1))
            self.repeated[id(value)] = (value, copies)
        return self.repeated[id(value)][1]

    def read_once(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take the copies away again before a linear layer whose input no adapter has touched yet.

        A forward pre-hook of the linear layers in the first adapted layer: what the first of them
        reads is the same for every member, and the others (keys and values after the queries) may
        read that very tensor.
        """
        del layer
        x = args[0]
        if self.common is None:  # none but the very first: later ones may read what is adapted
            self.common = x
            self.once = x[: self.rows] if x.shape[0] == self.members * self.rows else None
        if x is self.common and self.once is not None:
            return (self.once, *args[1:])
        return args

    def add_members(
        self, adapter: nn.Module, layer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """Add the members' parts to a linear layer's output: its forward hook."""
        tokens = output.shape[:-1].numel()
        common = args[0] is self.once
        if not common and tokens != self.tokens:
            raise ValueError(
                f"A {type(layer).__name__} of the adapted layers reads {tokens} of {self.tokens} "
                "tokens, as experts do, so members cannot be told apart: adapt fewer layers with "
                "lora_layers, or use Gaussian heads."
            )
        added: Tensor = adapter(args[0], output, common=common)
        return added
