"""Which completions say the same: equivalences of text pairs, and clusters made with them.

An `Equivalence` answers for a batch of pairs at a time, so that a model behind it is called with
full batches. RLP-SPG (Lang et al. 2024, section 4.2, https://arxiv.org/abs/2403.19279) clusters
the policy's samples by bidirectional entailment (in `nli`; its names can be had from here too).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Prompt, prompt_key, text_of
from trueward.data.packing import Group
from trueward.models.backbone import hidden_states, packed_batches
from trueward.models.policy import Policy
from trueward.refine.nli import (
    NLIEquivalence,
    NLILabel,
    NLIMode,
    nli_equivalent,
    nli_label_order,
)
from trueward.refine.shapes import require_one_each

__all__ = [
    "Embed",
    "EmbeddingEquivalence",
    "Equivalence",
    "NLIEquivalence",
    "NLILabel",
    "NLIMode",
    "RoutedEquivalence",
    "cluster",
    "exact_answer",
    "exact_match",
    "last_number",
    "mean_state_embedding",
    "nli_equivalent",
    "nli_label_order",
    "normalise_text",
    "sentence_transformer",
    "unrelated_threshold",
]

# (prompts, firsts, seconds) -> for each pair, whether both completions answer the prompt alike.
Equivalence = Callable[[Sequence[Prompt], Sequence[str], Sequence[str]], list[bool]]
Embed = Callable[[list[str]], Float[Tensor, "text dim"]]


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
    require_one_each(prompts=prompts, completions=completions)
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
    require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
    forms = {text: normalise_text(text) for text in {*firsts, *seconds}}
    return [forms[first] == forms[second] for first, second in zip(firsts, seconds, strict=True)]


def exact_answer(
    prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
) -> list[bool]:
    """Equivalent where the last number of each text is the same, for problems such as GSM8K's.

    "... = $1,250." and "So the answer is 1250.00" are equivalent. Two texts without any number are
    compared by `exact_match`; a text with and one without are not equivalent.
    """
    require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
    numbers = {text: last_number(text) for text in {*firsts, *seconds}}
    same_text = exact_match(prompts, firsts, seconds)
    return [
        same
        if numbers[first] is None and numbers[second] is None
        else numbers[first] == numbers[second]
        for first, second, same in zip(firsts, seconds, same_text, strict=True)
    ]


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

    The prompt is not read. Embeddings are kept by text, on the CPU, until `forget` is called.

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
        require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
        if not firsts:
            return []
        self._fetch([*firsts, *seconds])
        first = torch.stack([self._units[text] for text in firsts])
        second = torch.stack([self._units[text] for text in seconds])
        near: list[bool] = ((first * second).sum(1) >= self.threshold).tolist()
        # A text is itself, also where rounding puts its cosine below a threshold of 1.
        return [n or a == b for n, a, b in zip(near, firsts, seconds, strict=True)]

    def forget(self) -> None:
        """Drop the embeddings kept so far: those of many thousand texts fill the memory."""
        self._units.clear()

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


def related_threshold(
    embed: Embed, completions: Sequence[Sequence[str]], *, level: float = 0.5
) -> float:
    """Return the cosine that `level` of the pairs of completions of one prompt stay below.

    For embeddings that know topics rather than answers, where all completions of a prompt are
    closer than `unrelated_threshold`: what counts as saying the same is then relative to how alike
    the policy's completions are in general.

    Args:
        embed: Texts to vectors.
        completions: By prompt.
        level: Share of the pairs, in (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a share of pairs in (0, 1), got {level}.")
    found = []
    for texts in completions:
        distinct = list(dict.fromkeys(texts))
        if len(distinct) > 1:
            units = F.normalize(embed(distinct).float().cpu(), dim=1)
            upper = torch.triu_indices(len(distinct), len(distinct), offset=1)
            found.append((units @ units.T)[upper[0], upper[1]])
    if not found:
        raise ValueError("two different completions of one prompt are needed to compare, got none.")
    return float(torch.cat(found).sort().values[int(level * (sum(map(len, found)) - 1))])


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
        for some, batch in packed_batches(
            policy.backbone,
            groups,
            pad_id=int(policy.tokenizer.pad_token_id),
            max_tokens=max_tokens,
            shared_prefix=False,
        ):
            mask = batch.attention_mask[..., None]
            states = hidden_states(policy.backbone, batch) * mask
            for i, vector in zip(some, states.sum(1) / mask.sum(1), strict=True):
                vectors[i] = vector.float().cpu()
        return torch.stack(vectors)

    if not reference:
        raise ValueError("mean_state_embedding needs reference texts to centre on, got none.")
    centre = mean_states(reference).mean(0)
    return lambda texts: mean_states(texts) - centre


# --- By route ------------------------------------------------------------------------------------


class RoutedEquivalence:
    """Another equivalence for other prompts: languages, modalities, tasks.

    Args:
        routes: From a route (`de`, say) to its equivalence.
        routes_of: From a prompt's `prompt_key` to its route. A prompt that is not in it, or whose
            route is not in `routes`, takes the default.
        default: None where every prompt is known to have a route.
    """

    def __init__(
        self,
        routes: Mapping[str, Equivalence],
        *,
        routes_of: Mapping[str, str],
        default: Equivalence | None,
    ) -> None:
        self.routes = dict(routes)
        self.routes_of = routes_of
        self.default = default

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        """Return for each pair what its prompt's equivalence says, each called once."""
        require_one_each(prompts=prompts, firsts=firsts, seconds=seconds)
        # A prompt comes with many pairs, as the same object: its key is made once.
        distinct = {id(prompt): prompt for prompt in prompts}
        chosen = {name: self.equivalence_of(prompt) for name, prompt in distinct.items()}
        pairs: dict[
            int, list[int]
        ] = {}  # by equivalence, so that one behind two routes is called once
        for i, prompt in enumerate(prompts):
            pairs.setdefault(id(chosen[id(prompt)]), []).append(i)
        answers = [False] * len(prompts)
        for some in pairs.values():
            equivalent = chosen[id(prompts[some[0]])]
            found = equivalent(
                [prompts[i] for i in some], [firsts[i] for i in some], [seconds[i] for i in some]
            )
            for i, answer in zip(some, found, strict=True):
                answers[i] = bool(answer)
        return answers

    def equivalence_of(self, prompt: Prompt) -> Equivalence:
        """Return the equivalence that a prompt is routed to.

        Raises:
            ValueError: It has no route, and there is no default.
        """
        found = self.routes.get(self.routes_of.get(prompt_key(prompt), ""), self.default)
        if found is None:
            raise ValueError(
                f"The prompt {text_of(prompt)[:60]!r} has no route, and there is no default "
                "equivalence: give one, or a route to every prompt."
            )
        return found
