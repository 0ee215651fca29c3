"""A frozen sentence encoder under a small trained trunk: reward models on cached embeddings.

Every text is embedded once, and what is trained afterwards costs as much as a small network does:
Sun et al. 2025, "Reusing Embeddings" (https://arxiv.org/abs/2502.04357), train reward models so
without a GPU. The encoder and its trunk are one transformers model, so that heads, ensembles,
weight averages, saving and scoring are those of any other backbone.
"""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from trueward.data.formats import DataError

# Encoders have no chat template: turns are written one below the other.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class SentenceConfig(PreTrainedConfig):
    """Shape of a `SentenceBackbone`."""

    model_type = "trueward_sentence"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        hidden_size: int = 256,
        layers: int = 2,
        max_positions: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.encoder = encoder or {}  # the encoder's own configuration
        self.hidden_size = hidden_size  # of the trunk, and of the states that heads read
        self.layers = layers  # of the trunk
        self.max_position_embeddings = max_positions  # tokens that the encoder reads


class SentenceBackbone(PreTrainedModel):
    """Mean-pooled states of a frozen encoder, through a trunk of linear layers with GELU.

    `last_hidden_state` holds the same state, of the whole text, at every token: a head that reads
    the last one reads the sentence. Embeddings are kept in memory by the text's ids; copies of
    the model (members of an ensemble) share encoder and embeddings and own their trunk.
    """

    config_class = SentenceConfig
    base_model_prefix = "sentence"

    def __init__(self, config: SentenceConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
            options = dict(config.encoder)
            encoder_config = AutoConfig.for_model(options.pop("model_type"), **options)
            encoder = AutoModel.from_config(encoder_config)
        self.encoder = encoder.requires_grad_(False).eval()
        width = self.encoder.config.get_text_config().hidden_size
        sizes = [width, *[config.hidden_size] * config.layers]
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # embeddings on one scale
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(0.0)
        self.embeddings: dict[tuple[int, ...], Tensor] = {}
        self._trueward_shares_prefixes = False  # a sentence is read whole: see can_share_prefixes
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if any(module is layer for layer in self.trunk):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "SentenceBackbone":
        """Set the trunk's mode; the encoder is never trained."""
        super().train(mode)
        self.encoder.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "SentenceBackbone":
        """Set whether the trunk is trained; the encoder never is."""
        super().requires_grad_(requires_grad)
        self.encoder.requires_grad_(False)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SentenceBackbone":
        """Copy the trunk; encoder and embeddings are shared."""
        memo[id(self.encoder)] = self.encoder
        memo[id(self.embeddings)] = self.embeddings
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    @property
    def trueward_layers(self) -> nn.ModuleList:
        """What adapters may stand on: the trunk, not the frozen encoder."""
        return self.trunk

    def get_input_embeddings(self) -> nn.Module:
        """Return the encoder's."""
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's."""
        self.encoder.set_input_embeddings(value)

    def forward(
        self, input_ids: Int[Tensor, "row seq"], attention_mask: Int[Tensor, "row seq"]
    ) -> BaseModelOutput:
        """Return the state of each text at each of its tokens."""
        state = self.norm(self.embed(input_ids, attention_mask))
        for layer in self.trunk:
            state = self.dropout(nn.functional.gelu(layer(state)))
        return BaseModelOutput(last_hidden_state=state[:, None].expand(-1, input_ids.shape[1], -1))

    @torch.no_grad()
    def embed(
        self, input_ids: Int[Tensor, "row seq"], attention_mask: Int[Tensor, "row seq"]
    ) -> Float[Tensor, "row embedding"]:
        """Return each text's mean state under the encoder, computed once for each text."""
        rows = zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)
        keys = [tuple(ids[:length]) for ids, length in rows]  # right padded
        new = list({key: i for i, key in enumerate(keys) if key not in self.embeddings}.items())
        if new:
            where = [i for _, i in new]
            mask = attention_mask[where]
            states = self.encoder(input_ids[where], attention_mask=mask).last_hidden_state
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for (key, _), embedding in zip(new, pooled.float().cpu(), strict=True):
                self.embeddings[key] = embedding.clone()
        found = torch.stack([self.embeddings[key] for key in keys])
        return found.to(input_ids.device)

    def save_embeddings(self, folder: str | Path, *, name: str) -> None:
        """Write what was embedded so far to `folder/NAME.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        keys = list(self.embeddings)
        width = self.encoder.config.get_text_config().hidden_size
        none = torch.zeros(0, width)
        tensors = {
            "ids": torch.tensor([i for key in keys for i in key], dtype=torch.int32),
            "lengths": torch.tensor([len(key) for key in keys], dtype=torch.int32),
            "embeddings": torch.stack([self.embeddings[key] for key in keys]) if keys else none,
        }
        draft = folder / f"{name}.tmp"
        save_file(tensors, draft)
        draft.replace(folder / f"{name}.safetensors")

    def load_embeddings(self, folder: str | Path) -> None:
        """Take in what `save_embeddings` wrote for this encoder; texts beyond it are embedded."""
        for file in sorted(Path(folder).glob("*.safetensors")):
            tensors = load_file(file)
            ids, starts = tensors["ids"].tolist(), [0, *tensors["lengths"].cumsum(0).tolist()]
            spans = itertools.pairwise(starts)
            for (start, end), embedding in zip(spans, tensors["embeddings"], strict=True):
                self.embeddings[tuple(ids[start:end])] = embedding


def sentence_embedding(
    backbone: SentenceBackbone, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 256
) -> Callable[[list[str]], Tensor]:
    """Return what embeds texts by the frozen encoder alone: `texts -> [text, embedding]`.

    Embeddings are kept with the backbone's others, so that a store serves both.

    Args:
        backbone: Whose encoder embeds.
        tokenizer: Its tokenizer.
        max_length: Tokens of a text that are read, special ones included.
    """

    def embed(texts: list[str]) -> Tensor:
        ids = [tokenizer(t, truncation=True, max_length=max_length).input_ids for t in texts]
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(ids), 32):
            some = by_length[start : start + 32]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in some]}, return_tensors="pt")
            rows = backbone.embed(batch["input_ids"], batch["attention_mask"])
            for i, row in zip(some, rows, strict=True):
                found[i] = row
        return torch.stack(found)

    return embed


AutoConfig.register(SentenceConfig.model_type, SentenceConfig)
AutoModel.register(SentenceConfig, SentenceBackbone)


def sentence_backbone(
    path: str | Path, *, hidden_size: int = 256, layers: int = 2, seed: int = 0
) -> tuple[SentenceBackbone, PreTrainedTokenizerBase]:
    """Put a fresh trunk on a sentence encoder, and return it with the encoder's tokenizer.

    Args:
        path: Folder or hub id of an encoder, as sentence-transformers publishes them.
        hidden_size: Of the trunk.
        layers: Of the trunk; 0 puts heads straight on the embeddings.
        seed: Of the trunk's first weights.

    Raises:
        DataError: There is no such encoder.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        encoder = AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise DataError(
            f"No sentence encoder could be read from {path}: give a folder with a model and its "
            "tokenizer, or the hub id of one."
        ) from error
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    text_config = encoder.config.get_text_config()
    config = SentenceConfig(
        encoder=encoder.config.to_dict(),
        hidden_size=hidden_size if layers else text_config.hidden_size,
        layers=layers,
        max_positions=text_config.max_position_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = SentenceBackbone(config, encoder)
        for layer in backbone.trunk:
            backbone._init_weights(layer)
    return backbone, tokenizer
