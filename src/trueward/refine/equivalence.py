"""Which completions say the same: equivalences of text pairs, and clusters made with them.

An `Equivalence` answers for a batch of pairs at a time, so that a model behind it is called with
full batches. RLP-SPG (Lang et al. 2024, section 4.2, https://arxiv.org/abs/2403.19279) clusters
the policy's samples by bidirectional entailment; which of the three rules below it used is not
published, so the rule is an argument.
"""

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trueward.data.formats import DataError, Prompt, text_of
from trueward.data.packing import Group, pad, token_budget_batches
from trueward.models.backbone import hidden_states
from trueward.models.policy import Policy

logger = logging.getLogger(__name__)

# (prompts, firsts, seconds) -> for each pair, whether both completions answer the prompt alike.
Equivalence = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[bool]]
Embed = Callable[[list[str]], Float[Tensor, "text dim"]]
NLILabel = Literal["contradiction", "neutral", "entailment"]
NLIMode = Literal["relaxed", "strict", "no_contradiction"]
_NLI_LABELS: tuple[NLILabel, ...] = get_args(NLILabel)
_CHUNK = 4096  # pairs tokenised at once


def cluster(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[str]], equivalent: Equivalence
) -> list[list[int]]:
    """Group each prompt's completions by greedy first match.

    A completion is compared with the first member of each cluster, in order, and joins the first
    one that is equivalent; else it opens a cluster. Equivalences need not be transitive, so the
    result can depend on the order of the completions: it is that of the order given. A completion
    whose very text has been seen joins its twin without a comparison.

    All prompts go in step: the i-th completions of all prompts are compared in one call, so the
    number of calls is that of the longest list, not of the prompts.

    Args:
        prompts: One for each list of completions.
        completions: The samples of each prompt; the lists may differ in length.
        equivalent: Answers for a batch of pairs, cluster's first member first.

    Returns:
        For each prompt the cluster of each completion, numbered by first appearance.
    """
    _require_one_each(prompts=prompts, completions=completions)
    ids: list[list[int]] = [[] for _ in prompts]
    firsts: list[list[str]] = [[] for _ in prompts]  # each cluster's first member
    seen: list[dict[str, int]] = [{} for _ in prompts]  # text -> its cluster
    for wave in range(max(map(len, completions), default=0)):
        going = [i for i, texts in enumerate(completions) if wave < len(texts)]
        fresh = [i for i in going if completions[i][wave] not in seen[i]]
        pairs = [(i, first, completions[i][wave]) for i in fresh for first in firsts[i]]
        answers = iter(_ask(equivalent, [(prompts[i], a, b) for i, a, b in pairs]))
        for i in fresh:
            matches = [next(answers) for _ in firsts[i]]
            text = completions[i][wave]
            if not any(matches):
                firsts[i].append(text)
            seen[i][text] = matches.index(True) if any(matches) else len(matches)
        for i in going:
            ids[i].append(seen[i][completions[i][wave]])
    return ids


def _ask(equivalent: Equivalence, pairs: list[tuple[Prompt, str, str]]) -> list[bool]:
    if not pairs:
        return []
    prompts, firsts, seconds = (list(column) for column in zip(*pairs, strict=True))
    answers = [bool(answer) for answer in equivalent(prompts, firsts, seconds)]
    if len(answers) != len(pairs):
        raise ValueError(
            f"An equivalence must answer once for each pair: asked about {len(pairs)}, it gave "
            f"{len(answers)} answers."
        )
    return answers


# --- By text -------------------------------------------------------------------------------------


def normalise_text(text: str) -> str:
    """Return the text in one form: NFKC, casefolded, single spaces, no punctuation at the ends.

    Articles are kept. So are signs that change an answer: a minus or a decimal point before a
    digit at the start, `%` and `#` at the end ("5" is not "-5" nor "5%"; "C" is not "C#"). A text
    of punctuation alone keeps it.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(text.split())
    start, end = 0, len(text)
    while start < end and _is_edge(text[start]) and not re.match(r"-?\.?\d", text[start:end]):
        start += 1
    while start < end and _is_edge(text[end - 1]) and text[end - 1] not in "%#":
        end -= 1
    return text[start:end] or text


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def exact_match(
    prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
) -> list[bool]:
    """Equivalent where the texts are the same after `normalise_text`."""
    _require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
    pairs = zip(firsts, seconds, strict=True)
    return [normalise_text(first) == normalise_text(second) for first, second in pairs]


def exact_answer(
    prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
) -> list[bool]:
    """Equivalent where the last number of each text is the same, for problems such as GSM8K's.

    "... = $1,250." and "So the answer is 1250.00" are equivalent. Two texts without any number are
    compared by `exact_match`; a text with and one without are not equivalent.
    """
    _require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
    answers = []
    for prompt, first, second in zip(prompts, firsts, seconds, strict=True):
        numbers = last_number(first), last_number(second)
        if numbers == (None, None):
            answers.extend(exact_match([prompt], [first], [second]))
        else:
            answers.append(numbers[0] == numbers[1])
    return answers


# A minus only where nothing that it could be subtracted from precedes it; commas only between
# groups of thousands (or lakhs); digits inside a word ("H2O", "A1") are no answer.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_])(?<!\d\.)(?P<sign>(?<![\w)\]])(?:-\$?|\$-)|)"
    r"(?P<number>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})(?![A-Za-z0-9])|\s?/\s?(?P<denominator>\d+)(?!\d*[.,/]\d))?"
)


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text exactly, or None where there is none.

    It reads `$1,250.00`, `-3`, `.5`, `2/3` and `1e6`; in `10-4` the last number is 4, and a number
    of more than a thousand characters is none.
    """
    match = None
    for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007
        pass
    if match is None or len(match[0]) > 1000:  # a policy may run on in digits
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["denominator"] and int(match["denominator"]):
        value /= int(match["denominator"])
    return -value if match["sign"] else value


# --- By embeddings -------------------------------------------------------------------------------


class EmbeddingEquivalence:
    """Equivalent where the cosine similarity of the completions' embeddings reaches a threshold.

    The prompt is not read. Embeddings are kept by text, on the CPU, for as long as this object
    lives.

    Args:
        embed: Texts to vectors, such as `sentence_transformer(name)`.
        threshold: Smallest cosine similarity, inclusive, of equivalent texts.
    """

    def __init__(self, embed: Embed, *, threshold: float = 0.85) -> None:
        if not -1.0 <= threshold <= 1.0:
            raise ValueError(f"threshold is a cosine similarity in [-1, 1], got {threshold}.")
        self.embed = embed
        self.threshold = threshold
        self._units: dict[str, Float[Tensor, " dim"]] = {}

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        """Return for each pair whether its similarity reaches the threshold."""
        _require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
        if not firsts:
            return []
        self._fetch([*firsts, *seconds])
        first = torch.stack([self._units[text] for text in firsts])
        second = torch.stack([self._units[text] for text in seconds])
        near: list[bool] = ((first * second).sum(1) >= self.threshold).tolist()
        # A text is itself, also where rounding puts its cosine below a threshold of 1.
        return [n or a == b for n, a, b in zip(near, firsts, seconds, strict=True)]

    def _fetch(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._units]
        if not new:
            return
        vectors = torch.as_tensor(self.embed(new)).detach().float().cpu()
        if vectors.ndim != 2 or len(vectors) != len(new):
            raise ValueError(
                f"embed must return one vector for each text, [text, dim]: given {len(new)} texts, "
                f"it returned shape {tuple(vectors.shape)}."
            )
        # A row of a tensor keeps the whole tensor alive, so each gets memory of its own.
        units = F.normalize(vectors, dim=1)
        self._units |= {text: unit.clone() for text, unit in zip(new, units, strict=True)}


def unrelated_threshold(embed: Embed, texts: Sequence[str], *, level: float = 0.95) -> float:
    """Return the cosine that `level` of the pairs of unrelated texts stay below.

    A threshold for `EmbeddingEquivalence` that fits any embedding: two completions count as
    equivalent where they are closer than completions of different prompts hardly ever are.

    Args:
        embed: Texts to vectors.
        texts: One completion of each of several prompts; at least two different ones.
        level: Share of the pairs, in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a share of pairs in (0, 1), got {level}.")
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise ValueError(f"two different texts are needed to compare, got {len(distinct)}.")
    units = F.normalize(embed(distinct).float().cpu(), dim=1)
    upper = torch.triu_indices(len(distinct), len(distinct), offset=1)
    return float((units @ units.T)[upper[0], upper[1]].quantile(level))


def sentence_transformer(
    name: str, *, batch_size: int = 64, device: str | torch.device | None = None
) -> Embed:
    """Return an embedding function from a sentence-transformers model (extra `embeddings`)."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"Embeddings of {name} need the package sentence-transformers: install "
            "trueward[embeddings]."
        ) from error
    model = SentenceTransformer(name, device=str(device) if device is not None else None)

    def embed(texts: list[str]) -> Float[Tensor, "text dim"]:
        vectors: Tensor = model.encode(
            texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors

    return embed


def mean_state_embedding(
    policy: Policy, *, reference: Sequence[str], max_tokens: int = 8192
) -> Embed:
    """Return an embedding from the policy's own last states, averaged over a text's tokens.

    No other model is needed. A language model's mean states lie in a narrow cone (all cosines are
    high), so the mean over `reference` texts is taken off; cosines then spread around 0.
    """

    @torch.no_grad()
    def mean_states(texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        ids = [policy.tokenizer(t, add_special_tokens=False).input_ids for t in texts]
        # The first token stands in as the "prompt" of its row; an empty text becomes a pad.
        ids = [i[: policy.max_length - 1] or [int(policy.tokenizer.pad_token_id)] for i in ids]
        groups = [Group(i[:1], [i]) for i in ids]
        vectors: list[Tensor] = [torch.empty(0)] * len(texts)
        for some in token_budget_batches(groups, max_tokens=max_tokens, shared_prefix=False):
            batch = pad([groups[i] for i in some], pad_id=int(policy.tokenizer.pad_token_id))
            batch = batch.to(policy.device)
            mask = batch.attention_mask[..., None]
            states = hidden_states(policy.backbone, batch) * mask
            for i, vector in zip(some, states.sum(1) / mask.sum(1), strict=True):
                vectors[i] = vector.float().cpu()
        return torch.stack(vectors)

    if not reference:
        raise ValueError("mean_state_embedding needs reference texts to centre on, got none.")
    centre = mean_states(reference).mean(0)
    return lambda texts: mean_states(texts) - centre


# --- By entailment -------------------------------------------------------------------------------


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
        """Load a classifier and its tokenizer from a path or the hub.

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
            model.to(device or "cpu"),
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
        _require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
        # Both directions in one go.
        labels = self.labels([*prompts, *prompts], [*firsts, *seconds], [*seconds, *firsts])
        count = len(firsts)
        return nli_equivalent(labels[:count], labels[count:], mode=self.mode)

    def labels(
        self, prompts: Sequence[Prompt], premises: Sequence[str], hypotheses: Sequence[str]
    ) -> list[NLILabel]:
        """Return the model's label of each (premise, hypothesis), both read after the prompt."""
        _require_one_each(prompts=prompts, premises=premises, hypotheses=hypotheses)
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


def _require_one_each(**columns: Sequence[object]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"The lists must be equally long, got {got}.")
