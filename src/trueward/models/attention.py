"""Attention over packed rows in pieces: what no token may see is not computed.

A packed row of a prompt and k completions has a square mask of which most is empty: each completion
sees the prompt and itself. Taken apart, the prompt attends to itself and each completion to both,
which a row of 256 + 8 x 64 tokens does with a third of the square's operations. Pieces are many
small calls, which suit a CPU; on an accelerator the mask stays, or FlexAttention takes a mask by
blocks and leaves out those that nobody sees.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trueward.data.packing import PackedBatch, sees


class RowLayout(NamedTuple):
    """Where the pieces of a packed row lie, one after the other."""

    prompt: int  # tokens
    completions: tuple[int, ...]  # tokens of each


class Pieces(NamedTuple):
    """What a call's attention needs: its rows, and the masks of their completions."""

    layouts: list[RowLayout]
    masks: dict[tuple[int, int], Float[Tensor, "token seen"]]  # by (prompt, completion)


def layouts_of(batch: PackedBatch) -> list[RowLayout]:
    """Return the layout of each row of a packed batch."""
    prompts = [0] * batch.input_ids.shape[0]
    lengths: list[list[int]] = [[] for _ in prompts]
    for row, end, length in zip(
        batch.rows.tolist(), batch.prompt_ends.tolist(), batch.lengths.tolist(), strict=True
    ):
        prompts[row] = end + 1
        lengths[row].append(length)
    return [RowLayout(p, tuple(c)) for p, c in zip(prompts, lengths, strict=True)]


@contextlib.contextmanager
def packed_attention(backbone: nn.Module, batch: PackedBatch) -> Iterator[Tensor | BlockMask]:
    """Let the backbone attend in pieces or in blocks while the context lasts, where it can.

    Yields the mask to hand to it: the batch's own, one by blocks, or an empty one that carries the
    layout. A model
    that does something to its mask loses the layout and fails, since there is nothing to fall back
    on; `models.backbone.can_share_prefixes` finds that out and has whole masks used.
    """
    if batch.packed and attends_in_blocks(backbone):
        with _attending(backbone, "flex_attention"):
            yield block_mask(batch)
        return
    short = batch.input_ids.shape[1] < pieces_from()
    if short or not (batch.packed and attends_in_pieces(backbone)):
        yield batch.attention_mask
        return
    mask = torch.empty(0, 1, 1, 1)
    layouts = layouts_of(batch)
    shapes = {(layout.prompt, length) for layout in layouts for length in layout.completions}
    masks = {shape: _completion_mask(*shape) for shape in shapes}
    mask._trueward_pieces = Pieces(layouts, masks)  # type: ignore[attr-defined]
    with _attending(backbone, _NAME):
        yield mask


@contextlib.contextmanager
def _attending(backbone: nn.Module, implementation: str) -> Iterator[None]:
    config = _text_config(_base(backbone))
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def attends_in_pieces(backbone: nn.Module) -> bool:
    """Tell whether attention is SDPA's on a CPU, and goes through transformers' interface."""
    inner = _base(backbone)
    return bool(
        isinstance(inner, PreTrainedModel)
        and inner.device.type == "cpu"
        and getattr(inner, "_supports_attention_backend", False)
        and not getattr(inner, "_trueward_whole_masks", False)
        and _can_switch(inner)
    )


def attends_in_blocks(backbone: nn.Module) -> bool:
    """Tell whether FlexAttention was asked for (`use_block_masks`) and can be had."""
    inner = _base(backbone)
    return bool(
        isinstance(inner, PreTrainedModel)
        and getattr(inner, "_trueward_block_masks", False)
        and getattr(inner, "_supports_flex_attn", False)
        and _can_switch(inner)
    )


def _can_switch(inner: PreTrainedModel) -> bool:
    # Checkpointed layers are computed again in the backward pass, when attention is SDPA's again.
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in inner.modules())
    return not checkpointed and _text_config(inner)._attn_implementation == "sdpa"


def pieces_from() -> int:
    """Return from how many tokens of a row on attention in pieces pays."""
    return _PIECES_FROM * min(torch.get_num_threads(), _MOST_THREADS)


def use_whole_masks(backbone: nn.Module) -> None:
    """Never attend in pieces or blocks in this backbone again."""
    inner: Any = _base(backbone)
    inner._trueward_whole_masks, inner._trueward_block_masks = True, False


def use_block_masks(module: nn.Module) -> None:
    """Let packed rows go through FlexAttention in all language models within a module.

    It is compiled at the first call; on a CPU it has no gradients.
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel):
            found: Any = inner
            found._trueward_block_masks = True
            if getattr(inner, "_trueward_shares_prefixes", False):
                found._trueward_shares_prefixes = None  # is asked again, of the blocks


@no_type_check  # at run time: its inner function is traced, as `sees` is
def block_mask(batch: PackedBatch) -> BlockMask:
    """Return the mask of packed rows by blocks, for FlexAttention (torch.nn.attention).

    Members of a LoRA ensemble come one after the other, each with all rows: rows start anew.
    """
    segments = batch.segments
    rows, seq = segments.shape

    def seen_by(row: Tensor, head: Tensor, column: Tensor, other: Tensor) -> Tensor:
        del head
        return sees(segments[row % rows, column], segments[row % rows, other], column, other)

    made = create_block_mask if segments.device.type == "cpu" else _compiled_block_mask()
    mask: BlockMask = made(
        # The number of its arguments is looked at, which whatever wraps a function may hide.
        lambda row, head, column, other: seen_by(row, head, column, other),
        B=rows,
        H=None,
        Q_LEN=seq,
        KV_LEN=seq,
        device=segments.device,
    )
    return mask


@functools.cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def _base(backbone: nn.Module) -> nn.Module:
    return backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone


def _text_config(backbone: Any) -> Any:
    return backbone.config.get_text_config()


def shared_prefix_attention(
    module: nn.Module,
    query: Float[Tensor, "row head seq dim"],
    key: Float[Tensor, "row group seq dim"],
    value: Float[Tensor, "row group seq dim"],
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "row seq head dim"], None]:
    """Attend piece by piece, as the layouts that the mask carries say.

    Raises:
        AttributeError: The model did something to its mask.
        ValueError: It asks for more than a mask (a bias, sinks, a window).
    """
    pieces: Pieces = attention_mask._trueward_pieces  # type: ignore[attr-defined]
    if any(kwargs.get(name) is not None for name in _SPECIAL):
        raise ValueError(f"{type(module).__name__} attends in a way that pieces do not know.")
    # Members of a LoRA ensemble come one after the other, each with all rows.
    layouts = pieces.layouts * (query.shape[0] // len(pieces.layouts))
    heads = query.shape[1] // key.shape[1]
    if heads > 1:  # grouped queries
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    rows = zip(query.split(1), key.split(1), value.split(1), layouts, strict=True)
    out = [_attend(*row, pieces.masks, dropout_p=dropout, scale=scaling) for row in rows]
    return torch.cat(out).transpose(1, 2).contiguous(), None


def _attend(
    query: Float[Tensor, "1 head seq dim"],
    key: Float[Tensor, "1 head seq dim"],
    value: Float[Tensor, "1 head seq dim"],
    layout: RowLayout,
    masks: Mapping[tuple[int, int], Tensor],
    **options: Any,
) -> Float[Tensor, "1 head seq dim"]:
    sizes = [layout.prompt, *layout.completions]
    sizes.append(query.shape[2] - sum(sizes))  # padding: nobody reads it
    queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor, **masked: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options, **masked)

    out = [attend(queries[0], keys[0], values[0], is_causal=True)]
    for i, length in enumerate(layout.completions, start=1):
        seen = torch.cat([keys[0], keys[i]], 2), torch.cat([values[0], values[i]], 2)
        mask = masks[layout.prompt, length].to(query.dtype)
        out.append(attend(queries[i], *seen, attn_mask=mask))
    out.append(torch.zeros_like(values[-1]))
    return torch.cat(out, 2)


def _completion_mask(prompt: int, length: int) -> Float[Tensor, "token seen"]:
    """Return the additive mask of a completion's tokens over the prompt and the completion."""
    mask = torch.zeros(length, prompt + length)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask[:, prompt:].masked_fill_(later, -torch.inf)
    return mask


# Tokens of a row, for each thread, from which pieces pay: below, many small calls cost more than
# the square (measured on a Llama of 1 million parameters, on one thread: 0.6 to 0.8 times as fast
# at 24 to 70 tokens, 1.2 at 180; on two, training on pairs takes 0.91 of the time from 300 on).
_PIECES_FROM, _MOST_THREADS = 150, 4
_NAME = "trueward_shared_prefix"
# What some models hand to their attention beside the mask.
_SPECIAL = ("position_bias", "cache", "softcap", "s_aux", "sliding_window", "is_causal")
ALL_ATTENTION_FUNCTIONS.register(_NAME, shared_prefix_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
