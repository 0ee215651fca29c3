"""The policy, its frozen reference and its critic, over packed batches."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trueward.data.formats import DataError
from trueward.data.packing import PackedBatch
from trueward.data.tokens import ensure_pad_token
from trueward.models.backbone import (
    add_adapters,
    default_device,
    disable_dropout,
    grow_vocabulary,
    hidden_states,
    max_positions,
)
from trueward.models.heads import ScalarHead
from trueward.models.reward_model import RewardModel, merged


class TokenScores(NamedTuple):
    """What the policy says of each completion token, right padded (see `PackedBatch.mask`)."""

    logprobs: Float[Tensor, "completion token"]
    entropies: Float[Tensor, "completion token"]


class Policy(nn.Module):
    """A causal language model with its tokenizer, and log-probabilities of completions."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        ensure_pad_token(tokenizer)
        grow_vocabulary(model, len(tokenizer))
        disable_dropout(model)
        self.max_length = max_positions(model) or 2**31

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        lora_rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> "Policy":
        """Load a causal language model from a folder or the hub."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"No language model could be read from {path}: give a folder with a model and its "
                "tokenizer, or the hub id of one."
            ) from error
        model, info = loaded
        if info["missing_keys"]:  # they would be random
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise DataError(
                f"{path} lacks the weights {missing}: it is no language model (a reward model, "
                "perhaps), or one of another architecture."
            )
        policy = cls(model, tokenizer)
        if lora_rank:
            policy.add_lora(lora_rank)
        return policy.to(device or default_device())

    def add_lora(self, rank: int, *, alpha: int | None = None, seed: int = 0) -> None:
        """Freeze the model and train low-rank adapters; the reference is the adapter off."""
        self.model = add_adapters(self.model, rank=rank, alpha=alpha, seed=seed)

    @property
    def has_adapter(self) -> bool:
        """True where the weights of the reference are still inside."""
        return isinstance(self.model, PeftModel)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.device

    @property
    def backbone(self) -> PreTrainedModel:
        """The model below its language head (with its adapters, which live inside the layers)."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        backbone: PreTrainedModel = getattr(inner, str(inner.base_model_prefix))
        return backbone

    def forward(self, batch: PackedBatch, *, temperature: float = 1.0) -> TokenScores:
        """Return log-probability and entropy of each completion token.

        Logits are made at the completions' tokens only, a slice at a time and recomputed in the
        backward pass: there is never a `[row, seq, vocab]` tensor in float32.
        """
        mask = batch.mask
        logprobs, entropies = token_logprobs(
            self.predicting_states(batch),
            self.readout(),
            batch.targets[mask],
            temperature=temperature,
        )
        out = torch.zeros(mask.shape, device=mask.device)
        return TokenScores(out.masked_scatter(mask, logprobs), out.masked_scatter(mask, entropies))

    def predicting_states(self, batch: PackedBatch) -> Float[Tensor, "token hidden"]:
        """Return the state that predicts each completion token, the batch's padding left out."""
        hidden, mask = hidden_states(self.backbone, batch), batch.mask
        return hidden[batch.rows[:, None].expand_as(mask)[mask], batch.predictor_columns[mask]]

    def readout(self) -> "Readout":
        """Return the map from states to the logits of the whole model."""
        return Readout(self.model.get_output_embeddings(), *self._logit_scaling())

    def _logit_scaling(self) -> tuple[float, float | None]:
        """Tell by computing what the model does to its head's output; remembered.

        Cohere and Granite multiply it by a constant, Gemma 2 bounds it with a tanh.
        """
        known: tuple[float, float | None] | None = getattr(self.model, "_trueward_logits", None)
        if known is None:
            known = logit_scaling(self)
            self.model._trueward_logits = known  # type: ignore[assignment]
        return known

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator["Policy"]:
        """Read the reference from the same weights while the context lasts."""
        if not isinstance(self.model, PeftModel):
            raise ValueError("Only a policy with an adapter holds its reference within it.")
        with self.model.disable_adapter():
            yield self

    def frozen_copy(self) -> "Policy":
        """Return a copy that no optimiser will touch: the reference of full fine-tuning."""
        ref = Policy(copy.deepcopy(self.model), self.tokenizer)
        return ref.requires_grad_(False).eval()

    def rounded_copy(self, dtype: torch.dtype) -> "Policy":
        """Return a copy with rounded weights to write with: no float32 copy is made on the way.

        Buffers (rotary frequencies, say) keep their precision.
        """
        rounded: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False)
            for p in self.model.parameters()
        }
        return Policy(copy.deepcopy(self.model, rounded), self.tokenizer).eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write model (adapters merged) and tokenizer as a Hugging Face folder."""
        merged(self.model).save_pretrained(path)
        self.tokenizer.save_pretrained(path)


@torch.no_grad()
def energy_losses(
    policy: Policy, batch: PackedBatch, *, last_layer: nn.Module
) -> Float[Tensor, " completion"]:
    """How much of its states' L1 norm the policy's last layer takes away: the energy loss.

    `||h_in||_1 - ||h_out||_1` of the last layer, the mean over a completion's tokens. After Miao et
    al. 2025 (https://arxiv.org/abs/2501.19358), whose abstract says that the energy loss of the
    final layer grows in reinforcement learning, and excessively where the reward is hacked; the
    norm and the mean over tokens are how it is read here, not checked against their code.

    Args:
        policy: Whose states are read.
        batch: Completions.
        last_layer: Of the policy's backbone (`models.backbone.layer_list`).
    """
    norms: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        norms.append(before.float().abs().sum(-1) - after.float().abs().sum(-1))

    handle = last_layer.register_forward_hook(hook, with_kwargs=True)
    try:
        hidden_states(policy.backbone, batch)
    finally:
        handle.remove()
    mask = batch.mask
    tokens = norms[0][batch.rows[:, None].expand_as(mask), batch.target_columns]
    return (tokens * mask).sum(1) / batch.lengths


class Readout(nn.Module):
    """A language head and what its model does to the logits afterwards."""

    def __init__(self, head: nn.Module, scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.head = head
        self.scale = scale
        self.softcap = softcap

    def forward(self, states: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        """Return the logits as the whole model would."""
        logits: Tensor = self.head(states)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@torch.no_grad()
def logit_scaling(policy: Policy) -> tuple[float, float | None]:
    """Return (scale, softcap) with which the head's output gives the model's own logits.

    Raises:
        DataError: Neither a constant nor the configured softcap explains the model's logits.
    """
    ids = torch.arange(1, 4, device=policy.device)[None]
    was_training = policy.training
    policy.eval()
    wanted = policy.model(input_ids=ids, use_cache=False).logits[0].float()
    states = policy.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
    head: nn.Module = policy.model.get_output_embeddings()
    policy.train(was_training)
    raw = head(states).float()
    softcap = getattr(policy.model.config.get_text_config(), "final_logit_softcapping", None)
    scale = float((wanted * raw).sum() / raw.square().sum())
    tolerance = 1e-4 if policy.model.dtype == torch.float32 else 2e-2
    for candidate in ((1.0, None), (1.0, softcap), (scale, None)):
        difference = (Readout(head, *candidate)(states).float() - wanted).abs().max()
        if difference <= tolerance * wanted.abs().max():
            return candidate
    raise DataError(
        f"{type(policy.model).__name__} changes its logits in a way that trueward does not know, "
        "so log-probabilities would be wrong: use another language model."
    )


def token_logprobs(
    states: Float[Tensor, "token hidden"],
    language_head: nn.Module,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    slice_tokens: int = 2048,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """Return log p(target) and the entropy at each state, in float32, `slice_tokens` at a time."""

    def of_slice(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = language_head(states).float() / temperature
        log_z = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - log_z
        with torch.no_grad():
            entropies = log_z - (logits.softmax(-1) * logits).sum(-1)
        return logprobs, entropies

    parts = []
    for some, these in zip(states.split(slice_tokens), targets.split(slice_tokens), strict=True):
        if torch.is_grad_enabled() and states.shape[0] > slice_tokens:
            parts.append(checkpoint(of_slice, some, these, use_reentrant=False))
        else:
            parts.append(of_slice(some, these))
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def exact_token_kl(
    policy: Policy, ref: Policy, batch: PackedBatch, *, temperature: float = 1.0
) -> Float[Tensor, "completion token"]:
    """KL(policy || ref) of the next token, over the whole vocabulary, before each completion token.

    Summed over a completion that the policy wrote, it is an unbiased estimate of the KL between the
    distributions of completions, never negative and of lower variance than k1: only the prefixes
    are sampled. Amini et al. 2025 (https://arxiv.org/abs/2504.10637).
    """
    parts = []
    states, ref_states = policy.predicting_states(batch), ref.predicting_states(batch)
    readout, ref_readout = policy.readout(), ref.readout()
    for some, ref_some in zip(states.split(2048), ref_states.split(2048), strict=True):
        logprobs = (readout(some).float() / temperature).log_softmax(-1)
        ref_logprobs = (ref_readout(ref_some).float() / temperature).log_softmax(-1)
        parts.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    out = torch.zeros(batch.mask.shape, device=batch.mask.device)
    return out.masked_scatter(batch.mask, torch.cat(parts))


class ValueModel(nn.Module):
    """The critic: a backbone and a scalar head read at the state before each completion token.

    AlpacaFarm zeroes the head; here a scalar reward model's is kept, on the rewards' scale.
    """

    def __init__(self, backbone: PreTrainedModel, head: ScalarHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel) -> "ValueModel":
        """Copy the reward model's backbone; its head too where it is scalar, else a zero head.

        A critic that starts from the reward model already ranks states by what they will earn
        (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, appendix C).
        """
        backbone = copy.deepcopy(merged(reward_model.backbone))
        head = ScalarHead(backbone.config.get_text_config().hidden_size)
        nn.init.zeros_(head.linear.weight)
        if isinstance(reward_model.head, ScalarHead):
            head.linear.weight.data.copy_(
                reward_model.head.linear.weight / reward_model.reward_std[0]
            )
        critic = cls(backbone.requires_grad_(True), head.to(backbone.device))
        if isinstance(reward_model.head, ScalarHead):  # the rewards' own scale, mean and all
            offset = -reward_model.reward_mean[0] / reward_model.reward_std[0]
            critic.bias.data.copy_(offset)
        return critic

    @classmethod
    def from_policy(cls, policy: Policy) -> "ValueModel":
        """Copy the policy's body under a zero head: for rewards that are plain functions."""
        plain = copy.deepcopy(merged(policy.model))
        backbone: PreTrainedModel = getattr(plain, plain.base_model_prefix)
        head = ScalarHead(backbone.config.get_text_config().hidden_size)
        nn.init.zeros_(head.linear.weight)
        return cls(backbone.requires_grad_(True), head.to(backbone.device))

    def forward(self, batch: PackedBatch) -> Float[Tensor, "completion token"]:
        """Return the value of the state before each completion token (0 at padding)."""
        hidden = hidden_states(self.backbone, batch)
        states = hidden[batch.rows[:, None], batch.predictor_columns]
        values: Tensor = self.head(states).means[..., 0] + self.bias
        return values * batch.mask
