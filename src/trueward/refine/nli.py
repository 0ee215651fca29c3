"""Equivalence by natural language inference: does each completion entail the other?

Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279) cluster by bidirectional
entailment; which of the three rules below it used is not published, so the rule is an argument.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trueward.data.formats import DataError, Prompt, text_of
from trueward.models.backbone import default_device
from trueward.refine.shapes import require_one_each

logger = logging.getLogger(__name__)

NLILabel = Literal["contradiction", "neutral", "entailment"]
NLIMode = Literal["relaxed", "strict", "no_contradiction"]
_NLI_LABELS: tuple[NLILabel, ...] = get_args(NLILabel)
_CHUNK = 4096  # pairs tokenised at once


def nli_equivalent(
    forward_labels: Sequence[NLILabel], backward_labels: Sequence[NLILabel], *, mode: NLIMode
) -> list[bool]:
    """Equivalence from the labels of both directions, first to second and back.

    `strict` is the rule of Kuhn et al. 2023 (https://arxiv.org/abs/2302.09664).

    | mode | equivalent iff |
    |---|---|
    | `strict` | entailment in both directions |
    | `relaxed` | no contradiction, and not both neutral |
    | `no_contradiction` | no direction is contradiction |
    """
    if mode not in get_args(NLIMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(NLIMode))}, got {mode!r}.")
    answers = []
    for pair in zip(forward_labels, backward_labels, strict=True):
        if mode == "strict":
            answers.append(pair == ("entailment", "entailment"))
        else:
            both_neutral = pair == ("neutral", "neutral")
            refused = both_neutral and mode == "relaxed"
            answers.append("contradiction" not in pair and not refused)
    return answers


class _Request(NamedTuple):
    """Does `prompt premise` entail `prompt hypothesis`?"""

    prompt: str
    premise: str
    hypothesis: str

    @property
    def texts(self) -> tuple[str, str]:
        return f"{self.prompt} {self.premise}", f"{self.prompt} {self.hypothesis}"


class NLIEquivalence:
    """Equivalence by natural language inference in both directions: see `nli_equivalent`.

    Each side is the prompt's text, a space and the completion, given as `tokenizer(text,
    text_pair)`. Labels are kept by pair of texts, so the three modes can share one cache. Where a
    pair is too long, the prompt gives way first, from its left and equally on both sides: cutting
    from the right would leave two copies of a long prompt, which entail each other whatever was
    answered. Only then is the longer completion cut, until both are equally long.

    Args:
        model: A sequence classifier whose config names its labels contradiction, neutral and
            entailment, in any order and case.
        tokenizer: The model's fast tokenizer.
        mode: `relaxed`, `strict` or `no_contradiction`.
        batch_size: Pairs in one forward pass; pairs are sorted by length.
        max_length: Tokens of a pair; the model's and tokenizer's own limits win where lower.
        cache_path: A JSONL file to which labels are appended, and from which they are read back.
            Keys hold the model's name, so named models do not read each other's labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: NLIMode = "relaxed",
        batch_size: int = 32,
        max_length: int = 512,
        cache_path: str | Path | None = None,
    ) -> None:
        if mode not in get_args(NLIMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(NLIMode))}, got {mode!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 pair, got {batch_size}.")
        if not tokenizer.is_fast:
            raise ValueError("NLIEquivalence needs a fast tokenizer, to cut long prompts exactly.")
        limits = [max_length, tokenizer.model_max_length]
        limits.append(getattr(model.config, "max_position_embeddings", None) or max_length)
        self.max_length = min(limits)
        self._specials = tokenizer.num_special_tokens_to_add(pair=True)
        if self.max_length < self._specials + 2:
            raise ValueError(
                f"max_length {self.max_length} leaves no room for two texts beside "
                f"{self._specials} special tokens: raise it."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.mode: NLIMode = mode
        self.batch_size = batch_size
        self.truncated = 0  # pairs that had to be cut, so far
        self._order = nli_label_order(model.config.id2label)
        self._name = str(getattr(model.config, "_name_or_path", ""))
        self._cache = _LabelCache(Path(cache_path) if cache_path is not None else None)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "microsoft/deberta-large-mnli",
        *,
        mode: NLIMode = "relaxed",
        batch_size: int = 32,
        max_length: int = 512,
        cache_path: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "NLIEquivalence":
        """Load a classifier and its tokenizer from a path or the hub; `device` None = a GPU if any.

        Raises:
            DataError: There is no sequence classifier under this name.
        """
        try:
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            first = str(error).strip().split("\n")[0]
            raise DataError(f"No NLI model could be read from {name}: {first}") from error
        return cls(
            model.to(device or default_device()),
            tokenizer,
            mode=mode,
            batch_size=batch_size,
            max_length=max_length,
            cache_path=cache_path,
        )

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        """Return for each pair whether it is equivalent under `mode`."""
        require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
        # Both directions in one go.
        labels = self.labels([*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts])
        count = len(firsts)
        return nli_equivalent(labels[:count], labels[count:], mode=self.mode)

    def labels(
        self, prompts: Sequence[Prompt], premises: Sequence[str], hypotheses: Sequence[str]
    ) -> list[NLILabel]:
        """Return the model's label of each (premise, hypothesis), both read after the prompt."""
        require_one_each(prompts=prompts, premises=premises, hypotheses=hypotheses)
        texts = map(text_of, prompts)
        requests = [_Request(*r) for r in zip(texts, premises, hypotheses, strict=True)]
        keys = [self._key(request) for request in requests]
        # A dict also drops repeats within the call.
        wanted = {k: r for k, r in zip(keys, requests, strict=True) if k not in self._cache.labels}
        new = list(wanted)
        for start in range(0, len(new), _CHUNK):  # bounds what is held as ids
            self._label({key: wanted[key] for key in new[start : start + _CHUNK]})
        return [self._cache.labels[key] for key in keys]

    def _label(self, requests: dict[str, _Request]) -> None:
        encoded = dict(zip(requests, self._encode(list(requests.values())), strict=True))
        by_length = sorted(encoded, key=lambda key: len(encoded[key]["input_ids"]))
        for start in range(0, len(by_length), self.batch_size):
            some = by_length[start : start + self.batch_size]
            found = self._classify([encoded[key] for key in some])
            self._cache.add(dict(zip(some, found, strict=True)))

    def _key(self, request: _Request) -> str:
        identity = json.dumps([self._name, self.max_length, *request.texts])
        return hashlib.sha256(identity.encode()).hexdigest()

    def _encode(self, requests: list[_Request]) -> list[dict[str, list[int]]]:
        # verbose=False: a length above the model's is looked at here, and needs no warning.
        premises, hypotheses = zip(*(request.texts for request in requests), strict=True)
        columns = self.tokenizer(list(premises), list(hypotheses), verbose=False)
        encoded = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        for i, ids in enumerate(columns["input_ids"]):
            if len(ids) > self.max_length:
                self.truncated += 1
                shorter = self._with_shorter_prompt(requests[i]).texts
                cut = self.tokenizer(
                    *shorter, truncation="longest_first", max_length=self.max_length
                )
                encoded[i] = dict(cut)
        return encoded

    def _with_shorter_prompt(self, request: _Request) -> _Request:
        sides = [
            len(self.tokenizer(f" {side}", add_special_tokens=False, verbose=False)["input_ids"])
            for side in (request.premise, request.hypothesis)
        ]
        keep = max(self.max_length - self._specials - sum(sides), 0) // 2
        offsets = self.tokenizer(
            request.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        if keep >= len(offsets):
            return request
        start = offsets[-keep][0] if keep else len(request.prompt)
        return request._replace(prompt=request.prompt[start:])

    @torch.no_grad()
    def _classify(self, encoded: list[dict[str, list[int]]]) -> list[NLILabel]:
        batch = self.tokenizer.pad(encoded, return_tensors="pt").to(self.model.device)
        logits = self.model(**batch).logits
        return [self._order[i] for i in logits.argmax(1).tolist()]


def nli_label_order(
    id2label: Mapping[int, str] | Mapping[str, str] | None,
) -> list[NLILabel]:
    """Return the label of each output, from the names in a model's config, in any case.

    Raises:
        ValueError: The names are not contradiction, neutral and entailment.
    """
    by_output = {int(i): name for i, name in (id2label or {}).items()}
    names = [by_output[i].strip().casefold() for i in sorted(by_output)]
    labels: list[NLILabel] = [label for name in names for label in _NLI_LABELS if label == name]
    if len(names) != len(_NLI_LABELS) or set(labels) != set(_NLI_LABELS):
        raise ValueError(
            "An NLI model's config must name its labels contradiction, neutral and entailment in "
            f"id2label, got {list(by_output.values())}: choose an NLI model with three labels, or "
            "set model.config.id2label."
        )
    return labels


class _LabelCache:
    """Labels by key, in memory and in an append-only JSONL file.

    A line that cannot be read, such as one torn by a killed run, counts as not there.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.labels: dict[str, NLILabel] = {}
        self._torn = False  # the file's last line has no end
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        self._torn = bool(text) and not text.endswith("\n")
        lines = text.split("\n")
        unreadable = sum(not self._take(line) for line in lines if line)
        if unreadable:
            logger.warning("%s: %d line(s) could not be read and are ignored.", path, unreadable)

    def _take(self, line: str) -> bool:
        try:
            record: Any = json.loads(line)
        except ValueError:
            return False
        if not isinstance(record, dict) or record.get("label") not in _NLI_LABELS:
            return False
        self.labels[str(record.get("key"))] = record["label"]
        return True

    def add(self, labels: dict[str, NLILabel]) -> None:
        """Keep new labels; they are in the file when this returns."""
        self.labels |= labels
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, "label": label}) + "\n" for key, label in labels.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn + "".join(lines))
        self._torn = False
