"""What a backbone can do, and its hidden states for a packed batch."""

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trueward.data.packing import (
    Group,
    PackedBatch,
    pack,
    pad,
    row_tokens,
    token_budget_batches,
)
from trueward.models.attention import (
    attends_in_blocks,
    attends_in_pieces,
    packed_attention,
    pieces_from,
    use_whole_masks,
)

logger = logging.getLogger(__name__)


def hidden_states(backbone: nn.Module, batch: PackedBatch) -> Float[Tensor, "row seq hidden"]:
    """Return the last layer's states; the cache is off because nothing here continues a text."""
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids}
    # Without sharing, rows are right padded and the model's own count is right; RoBERTa's starts
    # after its pad id, so ours would be wrong there.
    if batch.packed:
        inputs["position_ids"] = batch.position_ids
    if "use_cache" in _parameters(backbone):
        inputs["use_cache"] = False
    with packed_attention(backbone, batch) as mask:
        states: Tensor = backbone(**inputs, attention_mask=mask).last_hidden_state
    return states


def takes_position_ids(backbone: nn.Module) -> bool:
    """Tell whether the forward has `position_ids`: models with ALiBi or recurrence have none."""
    return "position_ids" in _parameters(backbone)


def _parameters(backbone: nn.Module) -> Mapping[str, inspect.Parameter]:
    inner = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
    return inspect.signature(inner.forward).parameters


def can_share_prefixes(backbone: PreTrainedModel | PeftModel) -> bool:
    """Tell by computing whether this backbone reads a packed row as it reads separate ones.

    A packed and an unpacked forward of a made-up prompt with two completions are compared. Encoders
    (every token sees every other), recurrent models and windowed attention fail it or are refused;
    a message says so once, and the caller computes unpacked.
    """
    inner = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
    known: bool | None = getattr(inner, "_trueward_shares_prefixes", None)
    if known is not None:
        return known
    reason = _refusal(backbone)
    if reason and (attends_in_pieces(backbone) or attends_in_blocks(backbone)):
        if attends_in_blocks(backbone):
            logger.warning("FlexAttention %s: square masks are used instead.", reason)
        use_whole_masks(backbone)
        reason = _refusal(backbone)
    if reason:
        logger.warning(
            "%s %s: prompts are computed once for each completion.",
            type(backbone).__name__,
            reason,
        )
    inner._trueward_shares_prefixes = not reason  # type: ignore[assignment]
    return not reason


def _refusal(backbone: PreTrainedModel | PeftModel) -> str:
    text_config = backbone.config.get_text_config()
    if getattr(text_config, "sliding_window", None) and getattr(
        text_config, "use_sliding_window", True
    ):
        return "attends through a sliding window, which a packed row would not keep"
    kinds = {*(getattr(text_config, "layer_types", None) or ["full_attention"])}
    # GPT-Neo lists its "global" and "local" layers in `attention_layers`.
    kinds |= {*(getattr(text_config, "attention_layers", None) or ["global"])}
    if kinds - {"full_attention", "global"}:
        return "has layers without full attention, which would mix up a packed row's completions"
    if not takes_position_ids(backbone):
        return "takes no position ids, which a packed row needs"
    limit = max_positions(backbone)
    if limit and any(buffer.shape[-2:] == (limit, limit) for buffer in backbone.buffers()):
        return "keeps a causal mask of fixed size, which a packed row would outgrow"
    high = text_config.vocab_size - 1
    prompt, first, second = [high, 1, 2 % high], [3 % high, high, 1], [high, 2 % high]
    # A short row goes through the square mask, a long one in pieces where the backbone can.
    long = [first, second] * (pieces_from() // len(first + second) + 1)
    groups = [Group(prompt, [first, second]), Group(prompt, long)]
    was_training = backbone.training
    backbone.eval()
    try:
        # Under autocast the two would differ by more than the weights' own precision allows.
        with torch.no_grad(), torch.autocast(backbone.device.type, enabled=False):
            states = [
                torch.cat(
                    [
                        _last_states(
                            backbone, form([group], pad_id=0).to(backbone.device, backbone.dtype)
                        )
                        for group in groups
                    ]
                )
                for form in (pack, pad)
            ]
            # In a causal model the prompt's states do not know which completion follows.
            ends = [
                hidden_states(
                    backbone,
                    pad([Group(prompt, [c])], pad_id=0).to(backbone.device, backbone.dtype),
                )[0, len(prompt) - 1].float()
                for c in (first[:2], second)
            ]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"refused a packed row ({type(error).__name__})"
    finally:
        backbone.train(was_training)
    if (ends[0] - ends[1]).abs().max() > 1e-6 * ends[0].abs().max():
        return "lets a prompt's tokens see what follows it"
    difference = (states[0] - states[1]).abs().max().item()
    scale = states[1].abs().max().item()
    tolerance = 1e-3 if backbone.dtype == torch.float32 else 5e-2
    if not difference <= tolerance * scale:
        return f"gives other states for a packed row (they differ by {difference:.2g})"
    return ""


def _last_states(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    return hidden_states(backbone, batch)[batch.rows, batch.last].float()


def make_batch(
    backbone: PreTrainedModel | PeftModel,
    groups: Sequence[Group],
    *,
    pad_id: int,
    shared_prefix: bool = True,
) -> PackedBatch:
    """Pack the groups where the backbone can share prefixes, and pad them where it cannot.

    Groups of one completion each share nothing: rows without a mask of their own are cheaper.
    """
    several = any(len(group.completions) > 1 for group in groups)
    form = pack if several and shared_prefix and can_share_prefixes(backbone) else pad
    return form(groups, pad_id=pad_id).to(backbone.device, backbone.dtype)


def packed_batches(
    backbone: PreTrainedModel | PeftModel,
    groups: Sequence[Group],
    *,
    pad_id: int,
    max_tokens: int,
    shared_prefix: bool = True,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yield batches of at most `max_tokens` padded tokens, with the indices of their groups."""
    shared_prefix = shared_prefix and can_share_prefixes(backbone)
    for some in token_budget_batches(
        groups, shared_prefix=shared_prefix, **batch_budget(backbone, max_tokens)
    ):
        batch = [groups[i] for i in some]
        yield some, make_batch(backbone, batch, pad_id=pad_id, shared_prefix=shared_prefix)


def row_room(
    backbone: PreTrainedModel | PeftModel, *, max_tokens: int, shared_prefix: bool = True
) -> Callable[[int], int]:
    """Return how long a packed row may be, as a function of its prompt's tokens.

    Attention in pieces costs a completion the same in any row, so that the row may grow until the
    prompt is a small part of it; over a square mask see `row_tokens`. 0 where nothing is shared.
    """
    if not (shared_prefix and can_share_prefixes(backbone)):
        return lambda _: 0
    if attends_in_pieces(backbone):
        return lambda prompt: min(16 * prompt, max(_CPU_TOKENS, 4 * prompt), max_tokens)
    hidden_size = backbone.config.get_text_config().hidden_size
    return partial(row_tokens, hidden_size=hidden_size)


def batch_budget(backbone: PreTrainedModel | PeftModel, max_tokens: int) -> dict[str, int]:
    """Return the budget of a call in `token_budget_batches`, for where the backbone is.

    An accelerator wants calls as full as can be. A CPU does not: a call costs as much as a few
    tokens (80 and 5 measured on Llamas of 0.4 and 5 million parameters, forward and backward), and
    what does not fit its caches costs more, so that small calls with next to no padding are best.
    """
    if backbone.device.type != "cpu":
        return {"max_tokens": max_tokens, "call_tokens": max_tokens}
    return {"max_tokens": min(max_tokens, _CPU_TOKENS), "call_tokens": 32}


_CPU_TOKENS = 2048  # of a call


def compile_layers(module: nn.Module, *, backend: str | Callable[..., object] = "inductor") -> None:
    """Let torch.compile compile the layers of all language models within a module, in place.

    Args:
        module: Holds language models.
        backend: Of torch.compile.
    """
    for inner in module.modules():
        if isinstance(inner, PreTrainedModel) and inner.base_model is inner:
            for layer in layer_list(inner):
                layer.compile(dynamic=True, backend=backend)


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run compiled layers as they are written, for as long as this lasts.

    Writing token by token would have each layer compiled for its own part of the cache, and use up
    torch's limit of compiled forms (8) before training is compiled at all.
    """
    compiled = [m for m in module.modules() if m._compiled_call_impl is not None]
    calls = [m._compiled_call_impl for m in compiled]
    for layer in compiled:
        layer._compiled_call_impl = None
    try:
        yield
    finally:
        for layer, call in zip(compiled, calls, strict=True):
            layer._compiled_call_impl = call


def layer_list(backbone: PreTrainedModel | PeftModel) -> nn.ModuleList:
    """Return the list of the backbone's layers: the one as long as its configuration says.

    A backbone of ours may name it: the trunk on a sentence encoder, whose own layers are frozen.
    """
    named = getattr(backbone, "trueward_layers", None)
    if isinstance(named, nn.ModuleList):
        return named
    count = backbone.config.get_text_config().num_hidden_layers
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"No list of {count} layers was found in {type(backbone).__name__}, so they "
        "can neither have members' adapters (a LoRA ensemble) nor be spread over processes "
        "(sharding=full): leave both out."
    )


def max_positions(backbone: PreTrainedModel | PeftModel) -> int | None:
    """Return the longest sequence that the backbone's positions allow, None where unlimited."""
    positions: int | None = getattr(
        backbone.config.get_text_config(), "max_position_embeddings", None
    )
    if positions is None:
        return None
    for name, module in backbone.named_modules():
        # RoBERTa counts from after its pad id: a table of 514 rows holds 512 positions.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(positions, module.num_embeddings - skipped)
    return positions


def grow_vocabulary(model: PreTrainedModel | PeftModel, size: int) -> None:
    """Give the embeddings at least `size` rows; never fewer than before.

    Published models often have more rows than their tokenizer has tokens; cutting those off would
    change the normaliser of every log-probability.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    if size > embeddings.num_embeddings:
        model.resize_token_embeddings(size)


def add_adapters(
    model: PreTrainedModel | PeftModel, *, rank: int, alpha: int | None = None, seed: int = 0
) -> PeftModel:
    """Freeze the model and put low-rank adapters on its linear layers; alpha is `2 * rank`.

    The adapters' first weights depend on the seed alone.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,
        target_modules="all-linear",
        # GPT-2 keeps its weights transposed; peft warns where it has to find that out itself.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    if isinstance(model, PeftModel):
        raise ValueError("The model has adapters already: merge them first, or go on with those.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def default_device() -> torch.device:
    """Return the accelerator if there is one (under torchrun the process's own), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK")
    return torch.device("cuda") if local is None else torch.device("cuda", int(local))


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: rewards and log-probabilities must not be noisy."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention dropout is often a plain number on the attention module.
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
