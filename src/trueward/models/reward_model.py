"""RewardModel: a backbone and a head; training forward, scoring, saving and loading.

On disk it is an ordinary Hugging Face folder. A scalar model is saved as the backbone's
`...ForSequenceClassification` class with one label, so other programs read the same scores. A
model with Gaussian heads keeps them in the same `model.safetensors`, under `head.*`, described in
`config.json` under `trueward`; the adapters of a LoRA ensemble stand there too, under `lora.*`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from trueward.data.formats import Completion, DataError, Prompt
from trueward.data.packing import (
    PackedBatch,
    group_by_prompt,
    token_budget_batches,
)
from trueward.data.tokens import (
    Tokens,
    ensure_pad_token,
    start_token_id,
    tokenize,
    truncate_prompt,
)
from trueward.models.attribute_heads import URM_ARCHITECTURE
from trueward.models.backbone import (
    add_adapters,
    batch_budget,
    can_share_prefixes,
    default_device,
    disable_dropout,
    grow_vocabulary,
    hidden_states,
    make_batch,
    max_positions,
    row_room,
)
from trueward.models.card import reward_model_card
from trueward.models.head_kinds import make_head
from trueward.models.heads import GaussianHeads, Head, ScalarHead
from trueward.models.lora_ensemble import LoRAEnsemble, MemberHeads, backbone_layers, layer_count
from trueward.posterior import RewardPosterior

logger = logging.getLogger(__name__)


class OverlongError(DataError):
    """A completion longer than the model's context."""


class RewardModel(nn.Module):
    """A backbone, a head on the last real token's state, and a tokenizer.

    Args:
        backbone: Any transformers model without a head; or, with `head=None`, a published
            one-label classifier that keeps the head it came with (encoders such as DeBERTa).
        head: `ScalarHead`, `GaussianHeads` or None; `MemberHeads` beside `lora`.
        tokenizer: The backbone's; pad and EOS are made distinct.
        lora: Adapters of several members, which freeze the backbone; see `lora_ensemble`.
        reward_mean: Per member, its mean on reference samples; with `reward_std` the scale on
            which members are compared. Identity until `set_normalisation`.
        reward_std: Per member, its standard deviation on the same samples.
        max_length: Tokens of prompt and completion together; prompts are cut from the left.
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel,
        head: Head | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lora: LoRAEnsemble | None = None,
        reward_mean: Float[Tensor, " member"] | None = None,
        reward_std: Float[Tensor, " member"] | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if (lora.members if lora is not None else 0) != (
            head.members if isinstance(head, MemberHeads) else 0
        ):
            raise ValueError("A LoRA ensemble and MemberHeads go together, with as many members.")
        if lora is not None:
            backbone.requires_grad_(False)
        self.backbone = backbone
        self.lora = lora
        self.head = head
        self.tokenizer = tokenizer
        members = head.members if head is not None else 1
        mean = torch.zeros(members) if reward_mean is None else reward_mean.float()
        std = torch.ones(members) if reward_std is None else reward_std.float()
        self.register_buffer("reward_mean", mean, persistent=False)
        self.register_buffer("reward_std", std, persistent=False)
        limits = [n for n in (max_length, max_positions(backbone)) if n]
        self.max_length = min(limits) if limits else 2**31
        self.facts: dict[str, Any] = {}  # what the model card tells: data, metrics, base

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        members: int = 0,
        head_dropout: float = 0.0,
        lora_rank: int = 0,
        lora_members: int = 0,
        lora_layers: float = 0.25,
        max_length: int | None = None,
        seed: int = 0,
    ) -> "RewardModel":
        """Put a fresh head on a backbone, given as a model or as a path or hub id.

        Args:
            backbone: A causal language model's path keeps its body and drops its language head.
            tokenizer: Needed with a model object; loaded from the path otherwise.
            members: 0 for one scalar reward, K >= 1 for K Gaussian heads.
            head_dropout: Dropout before the Gaussian heads; the backbone has none.
            lora_rank: 0 trains the whole backbone; above, low-rank adapters on its linear layers.
            lora_members: Above 0, that many members of an ensemble, each with adapters and a
                scalar head of its own, on one frozen backbone (see `lora_ensemble`).
            lora_layers: Which layers have the members' adapters, counted from the top: a share up
                to 1 (all), a count above. Below them a batch is computed once for all members.
            max_length: Longest sequence in tokens; None for the backbone's own limit.
            seed: Set before the head is made, so that the head depends on it alone.
        """
        if isinstance(backbone, str | Path):
            path = backbone
            try:
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(path)
                backbone = AutoModel.from_pretrained(path, dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"No backbone could be read from {path}: give a folder with a model and its "
                    "tokenizer, or the hub id of one."
                ) from error
        if tokenizer is None:
            raise ValueError("A backbone given as a model needs its tokenizer beside it.")
        if members < 0:
            raise ValueError(f"members must be 0 (scalar) or at least 1, got {members}.")
        assert not isinstance(backbone, str | Path)
        if lora_members and (members or lora_members < 1 or lora_rank < 1):
            raise ValueError(
                "lora_members needs lora_rank of at least 1, such as 8, and members=0, because "
                f"each has a scalar head; got lora_members={lora_members}, "
                f"lora_rank={lora_rank}, members={members}."
            )
        if head_dropout and not members:
            raise ValueError("head_dropout is for Gaussian heads: a scalar head has none.")
        torch.manual_seed(seed)  # before anything random: new embedding rows, head, adapters
        ensure_pad_token(tokenizer)
        grow_vocabulary(backbone, len(tokenizer))
        disable_dropout(backbone)
        torch.manual_seed(seed)
        width = backbone.config.get_text_config().hidden_size
        if lora_members:
            lora = LoRAEnsemble(
                backbone,
                members=lora_members,
                rank=lora_rank,
                layers=layer_count(lora_layers, backbone_layers(backbone)),
                seed=seed,
            )
            heads = MemberHeads(width, lora_members)
            return cls(backbone, heads, tokenizer, lora=lora, max_length=max_length)
        head: Head = (
            GaussianHeads(width, members, dropout=head_dropout) if members else ScalarHead(width)
        )
        model = cls(backbone, head, tokenizer, max_length=max_length)
        if lora_rank:
            model.add_lora(lora_rank, seed=seed)
        return model

    def add_lora(self, rank: int, *, alpha: int | None = None, seed: int = 0) -> None:
        """Freeze the backbone and train low-rank adapters on its linear layers (and the head)."""
        if self.lora is not None:
            raise ValueError("A LoRA ensemble has its members' adapters and takes no others.")
        self.backbone = add_adapters(self.backbone, rank=rank, alpha=alpha, seed=seed)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.reward_mean.device

    @property
    def members(self) -> int:
        """Columns of the posterior."""
        return self.head.members if self.head is not None else 1

    @property
    def has_stds(self) -> bool:
        """Whether each member of the posterior has a std of its own."""
        return self.head is not None and self.head.has_stds

    @property
    def copies(self) -> int:
        """Rows that a row of a batch becomes: budgets of tokens computed at once are so divided."""
        return self.lora.members if self.lora is not None else 1

    @property
    def shares_prefixes(self) -> bool:
        """Whether completions of one prompt can travel as one packed row, and be read apart."""
        return self.head is not None and can_share_prefixes(self.backbone)

    def hidden(self, batch: PackedBatch) -> Float[Tensor, "completion *member hidden"]:
        """Return the last layer's state at the last real token of each completion."""
        if self.lora is not None:
            assert isinstance(self.backbone, PreTrainedModel)
            parts = [
                self.lora.hidden_states(self.backbone, part)[:, part.rows, part.last]
                for part in self.lora.parts(batch)
            ]
            return torch.cat(parts, 1).transpose(0, 1)
        return hidden_states(self.backbone, batch)[batch.rows, batch.last]

    def forward(self, batch: PackedBatch) -> RewardPosterior:
        """Return the raw posterior of each completion in the batch, with gradients."""
        if self.head is None:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            return RewardPosterior(self.backbone(**inputs).logits.float())
        return RewardPosterior(*self.head(self.hidden(batch)))

    def tokenize(self, prompt: Prompt, completion: Completion) -> Tokens:
        """Return ids that fit `max_length`, the prompt cut from the left if need be.

        Raises:
            DataError: The completion alone does not fit.
        """
        tokens = tokenize(self.tokenizer, prompt, completion)
        start = start_token_id(self.tokenizer)
        fitting = truncate_prompt(tokens, self.max_length, bos_token_id=start)
        if fitting is None:
            raise OverlongError(
                f"a completion of {len(tokens.completion_ids)} tokens does not fit into the "
                f"model's {self.max_length}: shorten it, or raise max_length where the backbone "
                "allows it."
            )
        return fitting

    def fits(self, prompt: Prompt, completion: Completion) -> bool:
        """Tell whether the completion fits the context (beside at least one prompt token)."""
        try:
            self.tokenize(prompt, completion)
        except OverlongError:
            return False
        return True

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        batch_size: int | None = None,
        max_tokens: int = 16384,
        normalise: bool | None = None,
        shared_prefix: bool = True,
        progress: bool | None = False,
    ) -> RewardPosterior:
        """Return the posterior of each (prompt, completion), on the CPU, in the order given.

        Completions of one prompt share its computation; batches are made by length, and a score
        does not depend on its batch. A completion is read as finished: it gets its EOS, also where
        a sampler cut it off (see `PolicyConfig.missing_eos_penalty`).

        Args:
            prompts: One for each completion: strings or lists of messages.
            completions: Strings or lists of messages.
            batch_size: Completions a batch at most; None leaves it to `max_tokens`.
            max_tokens: Padded tokens a batch, those of all members of a LoRA ensemble together.
            normalise: Standardise each member by the saved statistics. None: yes for a model of
                several members (a minimum or variance over unequal scales means nothing), no for
                a scalar one, whose raw logit is what other programs read.
            shared_prefix: False computes each completion with a prompt of its own.
            progress: True for a bar, None for a bar on terminals only.

        Raises:
            DataError: Lists of different lengths, or a completion longer than the context.
        """
        if len(prompts) != len(completions):
            raise DataError(
                f"score needs one prompt for each completion, got {len(prompts)} prompts and "
                f"{len(completions)} completions."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 completion, got {batch_size}.")
        if not prompts:
            none = torch.zeros(0, self.members)
            return RewardPosterior(none, none if self.has_stds else None)
        tokens = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                tokens.append(self.tokenize(prompt, completion))
            except DataError as error:
                raise type(error)(f"Row {i + 1}: {error}") from error
        # The same text is computed once: no waste, and equal completions tie to the last bit.
        first_seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        inverse = [first_seen.setdefault((tuple(p), tuple(c)), len(first_seen)) for p, c in tokens]
        tokens = [Tokens(list(p), list(c)) for p, c in first_seen]
        share = shared_prefix and self.shares_prefixes
        budget = max(1, max_tokens // self.copies)
        groups, members = group_by_prompt(
            [t.prompt_ids for t in tokens],
            [t.completion_ids for t in tokens],
            max_tokens=row_room(self.backbone, max_tokens=budget, shared_prefix=share),
            max_completions=batch_size,
        )
        was_training = self.training
        self.eval()
        means = torch.zeros(len(tokens), self.members)
        stds = torch.zeros_like(means) if self.has_stds else None
        bar = tqdm(total=len(tokens), desc="score", unit="row", disable=_hidden(progress))
        for batch in token_budget_batches(
            groups, shared_prefix=share, **batch_budget(self.backbone, budget)
        ):
            for some in _at_most(batch, members, batch_size):
                packed = make_batch(
                    self.backbone,
                    [groups[g] for g in some],
                    pad_id=self.tokenizer.pad_token_id,
                    shared_prefix=share,
                )
                posterior = self(packed).to("cpu")
                where = torch.tensor([i for g in some for i in members[g]])
                means[where] = posterior.means
                if stds is not None:
                    stds[where] = posterior.stds
                bar.update(len(where))
        bar.close()
        self.train(was_training)
        posterior = RewardPosterior(means, stds)[torch.tensor(inverse)]
        if normalise or (normalise is None and self.members > 1):
            return posterior.standardised(self.reward_mean.cpu(), self.reward_std.cpu())
        return posterior

    def set_normalisation(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> None:
        """Measure each member's mean and std on reference samples and keep them with the model.

        Bradley-Terry leaves every member a free constant and scale; a minimum or a variance over
        members is meaningless until they share one. Use the reference policy's samples; those
        that do not fit the context are left out.
        """
        fitting = [i for i, p in enumerate(prompts) if self.fits(p, completions[i])]
        if len(fitting) < 2:
            raise DataError(
                f"A scale needs at least two reference samples that fit, got {len(fitting)} of "
                f"{len(prompts)}: give the reference policy's completions of some hundred prompts."
            )
        means = self.score(
            [prompts[i] for i in fitting], [completions[i] for i in fitting], normalise=False
        ).means
        self.reward_mean = means.mean(0).to(self.device)
        self.reward_std = means.std(0, correction=0).clamp_min(1e-6).to(self.device)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the model, tokenizer and model card as a Hugging Face folder."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        backbone = merged(self.backbone)
        config = type(backbone.config).from_dict(backbone.config.to_dict())
        config.pad_token_id = self.tokenizer.pad_token_id
        config.trueward = {
            "head": self.head.describe() if self.head is not None else None,
            "reward_mean": self.reward_mean.tolist(),
            "reward_std": self.reward_std.tolist(),
            "max_length": self.max_length,
            "facts": self.facts,
        }
        if self.lora is not None:
            config.trueward["lora"] = self.lora.describe()
        if isinstance(self.head, ScalarHead) and _publishes_score(config):
            config.num_labels = 1
            with torch.device("meta"):  # an empty shell that names and orders the weights
                shell = AutoModelForSequenceClassification.from_config(config)
            setattr(shell, shell.base_model_prefix, backbone)
            shell.score = self.head.linear
            shell.save_pretrained(path)
        elif self.head is not None:
            config.architectures = ["TruewardRewardModel"]
            weights = backbone.state_dict()
            weights |= {f"head.{k}": v for k, v in self.head.state_dict().items()}
            if self.lora is not None:
                weights |= {f"lora.{k}": v for k, v in self.lora.state_dict().items()}
            backbone.save_pretrained(path, state_dict=weights)
            config.save_pretrained(path)
        else:
            backbone.config.trueward = config.trueward
            backbone.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        (path / "README.md").write_text(reward_model_card(self), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> "RewardModel":
        """Load one of ours, or any one-label `AutoModelForSequenceClassification`.

        Raises:
            DataError: The folder holds another kind of model.
        """
        try:
            config = AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"No reward model could be read from {path}: give a folder with a model and its "
                "tokenizer, or the hub id of one."
            ) from error
        ours: dict[str, Any] = getattr(config, "trueward", None) or {}
        statistics = {k: torch.tensor(ours[k]) for k in ("reward_mean", "reward_std") if k in ours}
        head: Head | None
        lora: LoRAEnsemble | None = None
        if "TruewardRewardModel" in (config.architectures or []):
            backbone, info = AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
            _refuse_missing(path, info)
            head = make_head(ours["head"], config.get_text_config().hidden_size)
            head.load_state_dict(_own_weights(Path(path), "head."))
            if "lora" in ours:
                lora = LoRAEnsemble(backbone, **ours["lora"])
                adapters = _own_weights(Path(path), "lora.")
                missing = [f"lora.{name}" for name in lora.state_dict() if name not in adapters]
                _refuse_missing(path, {"missing_keys": missing})
                lora.load_state_dict(adapters)
        else:
            kinds = config.architectures or []
            if kinds and not any("SequenceClassification" in kind for kind in kinds):
                raise DataError(
                    f"{path} holds a {kinds[0]}, which is no reward model: train one with "
                    "`trueward reward`, or use RewardModel.from_backbone for a fresh head."
                )
            if URM_ARCHITECTURE in kinds:
                raise DataError(
                    f"{path} is a published URM: read it with "
                    "trueward.models.published_urm.load_published_urm."
                )
            if config.num_labels != 1:
                raise DataError(
                    f"{path} has {config.num_labels} labels where a reward model has one: give a "
                    "model saved by trueward or a sequence classifier with num_labels=1."
                )
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, output_loading_info=True
            )
            _refuse_missing(path, info)
            backbone, head = _split(model)
            if head is not None and tokenizer.pad_token_id is None:
                ensure_pad_token(tokenizer)
                grow_vocabulary(backbone, len(tokenizer))
        disable_dropout(backbone)
        limit = ours.get("max_length")
        model = cls(backbone, head, tokenizer, lora=lora, max_length=limit, **statistics)
        model.facts = ours.get("facts", {})
        return model.eval().to(device or default_device())


def merged(backbone: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return a plain model: adapters are merged into a copy of the weights."""
    if not isinstance(backbone, PeftModel):
        return backbone
    import copy

    plain: PreTrainedModel = copy.deepcopy(backbone).merge_and_unload()
    return plain


def _publishes_score(config: Any) -> bool:
    """True where the architecture's classifier is a bias-free `score` on the last token."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    with torch.device("meta"):
        shell = AutoModelForSequenceClassification.from_config(config)
    return isinstance(getattr(shell, "score", None), nn.Linear) and shell.score.bias is None


def _split(model: PreTrainedModel) -> tuple[PreTrainedModel, Head | None]:
    """Take a decoder's classifier apart; an encoder's keeps its own head (None)."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        return model, None
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    if pad is not None and pad == eos:
        logger.warning(
            "This model's pad token is its EOS: transformers reads the token before EOS there, "
            "trueward the EOS itself, so scores differ for texts that end with it."
        )
    backbone: PreTrainedModel = getattr(model, model.base_model_prefix)
    head = ScalarHead(score.in_features)
    head.linear.weight = nn.Parameter(score.weight.detach().float())
    return backbone, head


def _refuse_missing(path: str | Path, info: dict[str, Any]) -> None:
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise DataError(
            f"{path} lacks the weights {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}: it "
            "is no reward model, or one of another architecture. Train one with `trueward reward`, "
            "or use RewardModel.from_backbone for a fresh head."
        )


def _own_weights(path: Path, prefix: str) -> dict[str, Tensor]:
    """Read `head.*` or `lora.*` from the folder's safetensors, sharded or not."""
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(path)))
    index = path / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file for key, file in weight_map.items() if key.startswith(prefix)}
    weights = {}
    for file in files:
        with safe_open(path / file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                if key.startswith(prefix):
                    weights[key.removeprefix(prefix)] = tensors.get_tensor(key)
    return weights


def _at_most(
    batch: list[int], members: list[list[int]], batch_size: int | None
) -> Iterator[list[int]]:
    """Split a batch of groups so that it holds at most `batch_size` completions."""
    if batch_size is None:
        yield batch
        return
    part: list[int] = []
    for group in batch:
        if part and sum(len(members[g]) for g in part) + len(members[group]) > batch_size:
            yield part
            part = []
        part.append(group)
    yield part


def _hidden(progress: bool | None) -> bool | None:
    """Turn "show" into tqdm's "disable" (None: only where there is no terminal)."""
    return None if progress is None else not progress
