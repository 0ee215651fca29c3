"""What is wrong with preferences that a machine made: one report in numbers, and in words.

Synthetic pairs fail in known ways: the chosen side is longer (510 against 449 characters in Lang et
al. 2024, section 5.5, https://arxiv.org/abs/2403.19279), prompts on which samples never agree have
no pair, labels repeat the mistakes of the reward that made them, and texts repeat each other. Each
is measured here by a short function of its own, and `PreferenceAudit.verdicts` says what stands
out. What to do about it is in `gates` and `review`.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trueward.data.formats import PreferenceRow, Prompt, prompt_key, text_of
from trueward.evaluate.calibration import spearman
from trueward.evaluate.judges import Judge
from trueward.evaluate.preferences import mean_interval, pair_rewards, wilson_interval
from trueward.evaluate.verdicts import MINUS, Measured
from trueward.models.reward_function import Reward
from trueward.refine.equivalence import Embed
from trueward.refine.gates import (
    by_people,
    judge_probabilities,
    lengths_of,
    margin_of,
    number_of,
    pair_key,
)

# Where verdicts turn; each has its reason in the verdict that reads it.
UNEVEN_SHARE = 0.05
OFTEN_NEGATIVE = 0.1
OFTEN_REPEATED = 0.1
STRONG_CORRELATION = 0.3
MORE_ALIKE = 0.05


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of `pairs`, with its 95 % Wilson interval."""

    share: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts between edges; a bin holds its lower edge, the last one all that lies above."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Numbers of some pairs at a glance."""

    pairs: int
    mean: float
    smallest: float
    median: float
    largest: float
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Lengths in characters. Share and ratio are weighted by the rows' weights."""

    longer: Share  # the chosen side is the longer one, ties at half
    ties: int
    log_ratio: float  # mean of log(chosen / rejected)
    log_ratio_interval: tuple[float, float] | None  # Student's t; None for a single pair
    chosen: Distribution
    rejected: Distribution
    confidence_correlation: float | None  # Spearman's, of confidence and the chosen side's length
    reference: Share | None  # the same share among the reference's pairs

    @property
    def factor(self) -> float:
        """How many times as long as the rejected side the chosen one is, geometric mean."""
        return math.exp(self.log_ratio)


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How far the texts of one side differ; the last three from embeddings, where there are any."""

    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_similarity: float | None
    repeated: float  # share of the texts that stand in more than one pair
    mean_cosine: float | None = None
    spread: float | None = None
    vendi_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class UncoveredCluster:
    """Prompts alike, none of which has a pair."""

    prompts: int
    example: str  # the one nearest to their centre


@dataclass(frozen=True, kw_only=True)
class PromptCoverage:
    """Which prompts have a pair; by cluster of prompts where there are embeddings."""

    prompts: int  # different ones
    covered: int
    elsewhere: int  # prompts of pairs that are not among them
    clusters: int | None = None
    covered_clusters: int | None = None
    expected_clusters: float | None = None  # if as many prompts had been drawn at random
    expected_std: float | None = None
    uncovered: list[UncoveredCluster] = field(default_factory=list)  # the largest first


@dataclass(frozen=True, kw_only=True)
class ConfidenceBin:
    """Agreement among the pairs of like confidence."""

    low: float
    high: float
    agreement: Share


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often someone else prefers the chosen side, ties at half."""

    agreement: Share
    ties: int
    unanswered: int  # pairs on which nobody or nothing said anything
    by_confidence: list[ConfidenceBin]
    confidence_correlation: Measured | None  # Spearman's, of confidence and agreement


@dataclass(frozen=True, kw_only=True)
class LabelQuality:
    """What speaks for and against the labels."""

    confidence: Distribution | None
    margin: Distribution | None  # chosen reward less rejected reward
    negative_margins: Share | None
    judge: Agreement | None
    reference: Agreement | None


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """What stands in the data more than once."""

    duplicates: int  # pairs that an earlier one says already
    contradictions: int  # pairs of texts that stand there in both orders
    prompts: int  # different ones
    repeated_prompts: int  # those with several pairs
    most_pairs: int  # of one prompt


@dataclass(frozen=True, kw_only=True)
class PreferenceAudit:
    """The report on a set of preferences; `to_json` gives it as JSON holds it."""

    pairs: int
    weighted: bool  # not all weights are equal
    labelled_by_people: int
    length: LengthBias
    position: Share | None  # the chosen side was drawn before the rejected one
    chosen: Diversity
    rejected: Diversity
    coverage: PromptCoverage | None
    labels: LabelQuality
    repeats: Repeats

    @property
    def verdicts(self) -> list[str]:
        """One sentence for each thing that is wrong: seen, what it means, what to do."""
        labels = self.labels
        found = [
            _length_verdict(self.length),
            _length_confidence_verdict(self.length),
            _position_verdict(self.position),
            _margin_verdict(labels.negative_margins),
            _agreement_verdict("the judge", labels.judge),
            _agreement_verdict("the reference", labels.reference),
            _confidence_verdict("the judge", labels.judge),
            _confidence_verdict("the reference", labels.reference),
            _alike_verdict(self.chosen, self.rejected),
            _repeated_verdict(self.chosen),
            _coverage_verdict(self.coverage),
            *_repeats_verdicts(self.repeats),
        ]
        return [verdict for verdict in found if verdict]

    def to_json(self) -> dict[str, Any]:
        """Return numbers and verdicts as plain lists and dicts."""
        return dataclasses.asdict(self) | {"verdicts": self.verdicts}


def audit_preferences(
    rows: Sequence[PreferenceRow],
    *,
    embed: Embed | None = None,
    judge: Judge | None = None,
    reward: Reward | None = None,
    reference: Sequence[PreferenceRow] = (),
    prompts: Sequence[Prompt] | None = None,
) -> PreferenceAudit:
    """Measure what can be wrong with preferences that were made of a policy's samples.

    Of `extra`, `confidence`, `chosen_reward` and `rejected_reward` are read as `trueward refine`
    writes them, and `chosen_index` and `rejected_index` (places among the prompt's samples) where
    they are there; what a row lacks, it is left out of.

    Args:
        rows: The pairs. Rows marked as ties have no order, so they are refused.
        embed: Texts to vectors, for diversity and for clusters of prompts.
        judge: One that had no part in the labels. Which side it is shown first hangs on the texts
            alone; NaN is no answer.
        reward: Gives the margins in place of the rows' own rewards.
        reference: Labels of people, or others to trust: those of the same prompt and the same two
            texts, in either order, are compared.
        prompts: All prompts that samples were drawn for, with or without a pair.

    Raises:
        ValueError: There is no row, a row is a tie, or all weights are 0.
        DataError: A row's confidence, reward or index is no number.
    """
    _require_pairs(rows)
    confidences = [number_of(row, "confidence") for row in rows]
    margins = _margins(rows, reward)
    embedded = _embedder(embed)
    verdicts = judge_probabilities(rows, judge) if judge is not None else None
    labels = LabelQuality(
        confidence=_distribution(confidences, low=0.0, high=1.0),
        margin=_distribution(margins),
        negative_margins=_share([float(m < 0) for m in margins if m is not None]),
        judge=_agreement(verdicts, confidences) if verdicts is not None else None,
        reference=_agreement(_reference_labels(rows, reference), confidences),
    )
    return PreferenceAudit(
        pairs=len(rows),
        weighted=len({row.weight for row in rows}) > 1,
        labelled_by_people=sum(map(by_people, rows)),
        length=_length_bias(rows, confidences, reference),
        position=_position_bias(rows),
        chosen=_diversity([text_of(row.chosen) for row in rows], embedded),
        rejected=_diversity([text_of(row.rejected) for row in rows], embedded),
        coverage=_coverage(rows, prompts, embedded) if prompts else None,
        labels=labels,
        repeats=_repeats(rows),
    )


def _margins(rows: Sequence[PreferenceRow], reward: Reward | None) -> list[float | None]:
    if reward is None:
        return [margin_of(row) for row in rows]
    chosen, rejected = pair_rewards(
        reward,
        [row.prompt for row in rows],
        [row.chosen for row in rows],
        [row.rejected for row in rows],
    )
    return list((chosen - rejected).tolist())


def _require_pairs(rows: Sequence[PreferenceRow]) -> None:
    if not rows:
        raise ValueError("an audit needs at least one pair, got none.")
    tie = next((row for row in rows if row.extra.get("tie")), None)
    if tie is not None:
        raise ValueError(f"{tie.where or 'A row'} is a tie, which has no order: leave ties out.")
    if not sum(row.weight for row in rows) > 0:
        raise ValueError("every row has weight 0, so that nothing is left to audit: raise some.")


# --- numbers ---


def words(text: str) -> list[str]:
    """Return the words of a text in one case; a Chinese or Japanese character is a word."""
    return _WORD.findall(text.casefold())


_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of words: 1 if none comes twice; 0 without any.

    Li et al. 2016, section 5 (https://arxiv.org/abs/1510.03055), who divide by the number of words;
    by that of n-grams, as is usual, a single n-gram counts the same at any n. It falls with the
    amount of text, so compare sets of about the same size.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    grams = Counter(gram for text in texts for gram in _grams(words(text), n))
    return len(grams) / grams.total() if grams else 0.0


def self_similarity(texts: Sequence[str], *, n: int = 2) -> float | None:
    """Mean cosine between two texts' sets of n-grams of words: 0 if none share any, 1 if all are.

    `mean_{i<j} |G_i & G_j| / sqrt(|G_i| |G_j|)`, in one pass, since all pairs together are
    `|sum_i u_i|^2 - sum_i |u_i|^2` for the sets as unit vectors u. Unlike Self-BLEU (Zhu et al.
    2018, https://arxiv.org/abs/1802.01886) it does not grow with the number of texts. A text of
    fewer than n words is one gram; without words it shares nothing. None for fewer than two texts.
    """
    if len(texts) < 2:
        return None
    total: dict[tuple[str, ...], float] = {}
    squares = 0
    for text in texts:
        own = words(text)
        grams = set(_grams(own, min(n, max(1, len(own)))))
        squares += bool(grams)
        for gram in grams:
            total[gram] = total.get(gram, 0.0) + 1 / math.sqrt(len(grams))
    together = math.fsum(weight * weight for weight in total.values())
    return max(0.0, together - squares) / (len(texts) * (len(texts) - 1))


def _grams(own: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(own[i:] for i in range(n)), strict=False))


def mean_pairwise_cosine(vectors: Float[Tensor, "text dim"]) -> float | None:
    """Mean cosine between two different rows; None for fewer than two.

    `(|sum_i u_i|^2 - sum_i |u_i|^2) / (n (n - 1))` with unit vectors u: no n x n matrix.
    """
    n = len(vectors)
    if n < 2:
        return None
    units = F.normalize(vectors.double(), dim=1)
    return float((units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1)))


def embedding_spread(vectors: Float[Tensor, "text dim"]) -> float:
    """Root mean square distance of the unit vectors from their mean: 0 if all are one, up to 1."""
    units = F.normalize(vectors.double(), dim=1)
    return float((units - units.mean(0)).square().sum(1).mean().sqrt())


def vendi_score(vectors: Float[Tensor, "text dim"]) -> float:
    """How many different texts there are in effect: 1 if all are one, n if all are orthogonal.

    `exp(-sum_i l_i log l_i)` of the eigenvalues of the cosines' matrix over n. Friedman and Dieng
    2023, Eq. 3 (https://arxiv.org/abs/2210.02410).
    """
    units = F.normalize(vectors.double(), dim=1)
    gram = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    values = torch.linalg.eigvalsh(gram / len(units)).clamp_min(0)
    return float(torch.special.entr(values).sum().exp())


def cluster_vectors(
    vectors: Float[Tensor, "text dim"], count: int, *, rounds: int = 20
) -> Int[Tensor, " text"]:
    """Return the cluster of each vector by its direction, numbered without gaps; no randomness.

    k-means with cosines (Dhillon and Modha 2001, https://doi.org/10.1023/A:1007612920971). It
    starts from the vector nearest to the mean and then, again and again, the one farthest from all
    starts so far (Gonzalez 1985). Fewer clusters than asked for where vectors are the same.
    """
    if count < 1 or not len(vectors):
        raise ValueError(f"clusters need a count and a vector, got {count} and {len(vectors)}.")
    units = F.normalize(vectors.double(), dim=1)
    starts = [int((units @ units.mean(0)).argmax())]
    nearest = units @ units[starts[0]]
    while len(starts) < count and float(nearest.min()) < 1 - 1e-9:
        starts.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, units @ units[starts[-1]])
    centres, ids = units[starts], torch.full((len(units),), -1)
    for _ in range(rounds):
        before, ids = ids, (units @ centres.T).argmax(1)
        if torch.equal(ids, before):
            break
        sums = torch.zeros_like(centres).index_add(0, ids, units)
        empty = sums.norm(dim=1) == 0  # or its members cancel
        centres = torch.where(empty[:, None], centres, F.normalize(sums, dim=1))
    return torch.unique(ids, return_inverse=True)[1]


def expected_coverage(sizes: Sequence[int], share: float) -> tuple[float, float]:
    """Return how many clusters have a member among a random `share` of all, and the std.

    `sum_c 1 - (1 - share)^size_c`, as if each member were drawn by itself; its std so is a little
    too large where a fixed number is drawn.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in [0, 1], got {share}.")
    chances = [1 - (1 - share) ** size for size in sizes]
    return sum(chances), math.sqrt(sum(p * (1 - p) for p in chances))


def rank_correlation_interval(correlation: float, pairs: int) -> Measured:
    """95 % interval of Spearman's correlation, by Fisher's z: `tanh(atanh r ± 1.96 sqrt(1.06 / (n -
    3)))`, Fieller et al. 1957 (https://doi.org/10.1093/biomet/44.3-4.470); [-1, 1] below 4 pairs.
    """
    if pairs < 4 or abs(correlation) >= 1:
        low, high = (-1.0, 1.0) if pairs < 4 else (correlation, correlation)
        return Measured(value=correlation, low=low, high=high)
    z, half = math.atanh(correlation), 1.96 * math.sqrt(1.06 / (pairs - 3))
    return Measured(value=correlation, low=math.tanh(z - half), high=math.tanh(z + half))


def agreement_by_confidence(
    confidences: Sequence[float], agreements: Sequence[float], *, bins: int = 10
) -> list[ConfidenceBin]:
    """Return the agreement of the pairs in equal-width bins of confidence that hold any."""
    held: dict[int, list[float]] = {}
    for confidence, agreement in zip(confidences, agreements, strict=True):
        # The tolerance is for the product: 0.29 * 100 is 28.999999999999996.
        index = min(bins - 1, max(0, math.floor(confidence * bins + 1e-9)))
        held.setdefault(index, []).append(agreement)
    found = []
    for index, values in sorted(held.items()):
        share = _share(values)
        assert share is not None
        low, high = index / bins, (index + 1) / bins
        found.append(ConfidenceBin(low=low, high=high, agreement=share))
    return found


def weighted_share(values: Sequence[float], weights: Sequence[float]) -> Share:
    """Return `sum w v / sum w` of values in [0, 1], with the interval of as many pairs as count.

    These are `(sum w)^2 / sum w^2`, rounded down: Kish 1965. With equal weights, all.
    """
    total = math.fsum(weights)
    effective = total**2 / math.fsum(w * w for w in weights)
    share = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    trials = max(1, int(effective + 1e-9))
    low, high = wilson_interval(min(share, 1.0) * trials, trials)
    return Share(share=share, low=low, high=high, pairs=len(values))


def _share(values: Sequence[float]) -> Share | None:
    return weighted_share(values, [1.0] * len(values)) if values else None


def _distribution(
    values: Sequence[float | None], *, low: float | None = None, high: float | None = None
) -> Distribution | None:
    held = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    if not held.numel():
        return None
    low = float(held.min()) if low is None else low
    return Distribution(
        pairs=held.numel(),
        mean=float(held.mean()),
        smallest=float(held.min()),
        median=float(held.quantile(0.5)),
        largest=float(held.max()),
        histogram=histogram(
            held.tolist(), low=low, high=float(held.max()) if high is None else high
        ),
    )


def histogram(values: Sequence[float], *, low: float, high: float, bins: int = 20) -> Histogram:
    """Count values in equal-width bins from `low` to `high`; those beyond go to the last ones."""
    width = (high - low) / bins or 1.0 / bins
    counts = [0] * bins
    for value in values:
        # The tolerance keeps a value on an edge, such as a confidence of 0.6, above it.
        counts[min(bins - 1, max(0, math.floor((value - low) / width + 1e-9)))] += 1
    return Histogram(edges=[low + i * width for i in range(bins + 1)], counts=counts)


# --- parts of the report ---


def _length_bias(
    rows: Sequence[PreferenceRow],
    confidences: Sequence[float | None],
    reference: Sequence[PreferenceRow],
) -> LengthBias:
    lengths = [lengths_of(row) for row in rows]
    chosen, rejected = ([float(pair[side]) for pair in lengths] for side in (0, 1))
    # Lengths have a long tail: the last bin holds the longest hundredth.
    most = float(torch.tensor([*chosen, *rejected], dtype=torch.float64).quantile(0.99))
    sides = [_distribution(side, low=0.0, high=most) for side in (chosen, rejected)]
    assert sides[0] is not None
    assert sides[1] is not None
    both = [(c, x) for c, x in zip(confidences, chosen, strict=True) if c is not None]
    ordered = [row for row in reference if not row.extra.get("tie")]
    log_ratio, interval = _mean_log_ratio(rows, lengths)
    return LengthBias(
        longer=weighted_share([_longer(pair) for pair in lengths], [row.weight for row in rows]),
        ties=sum(c == r for c, r in lengths),
        log_ratio=log_ratio,
        log_ratio_interval=interval,
        chosen=sides[0],
        rejected=sides[1],
        confidence_correlation=_spearman([c for c, _ in both], [x for _, x in both]),
        reference=_share([_longer(lengths_of(row)) for row in ordered]),
    )


def _longer(lengths: tuple[int, int]) -> float:
    return 0.5 if lengths[0] == lengths[1] else float(lengths[0] > lengths[1])


def _mean_log_ratio(
    rows: Sequence[PreferenceRow], lengths: Sequence[tuple[int, int]]
) -> tuple[float, tuple[float, float] | None]:
    ratios = torch.tensor([math.log(c / r) for c, r in lengths], dtype=torch.float64)
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float64)
    weights = weights / weights.mean()
    mean = float((weights * ratios).mean())
    if len(rows) < 2:
        return mean, None
    # A weighted mean errs as the mean of the terms w (x - mean) does.
    low, high = mean_interval(mean + weights * (ratios - mean))
    return mean, (low, high)


def _position_bias(rows: Sequence[PreferenceRow]) -> Share | None:
    places = [(number_of(row, "chosen_index"), number_of(row, "rejected_index")) for row in rows]
    return _share([float(c < r) for c, r in places if c is not None and r is not None])


def _diversity(
    texts: Sequence[str], embedded: Callable[[Sequence[str]], Tensor] | None
) -> Diversity:
    counts = Counter(texts)
    found = Diversity(
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_3=distinct_n(texts, 3),
        self_similarity=self_similarity(texts),
        repeated=sum(c for c in counts.values() if c > 1) / len(texts),
    )
    if embedded is None:
        return found
    vectors = embedded(texts)
    return dataclasses.replace(
        found,
        mean_cosine=mean_pairwise_cosine(vectors),
        spread=embedding_spread(vectors),
        vendi_score=vendi_score(vectors),
    )


def _embedder(embed: Embed | None) -> Callable[[Sequence[str]], Tensor] | None:
    """Return the embedding of texts that may repeat, each of which is embedded once."""
    if embed is None:
        return None

    def embedded(texts: Sequence[str]) -> Tensor:
        places = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        vectors = torch.as_tensor(embed(list(places))).detach().float().cpu()
        if vectors.ndim != 2 or len(vectors) != len(places):
            raise ValueError(
                f"embed must return one vector for each text, [text, dim]: given {len(places)} "
                f"texts, it returned shape {tuple(vectors.shape)}."
            )
        return vectors[[places[text] for text in texts]]

    return embedded


def _coverage(
    rows: Sequence[PreferenceRow],
    prompts: Sequence[Prompt],
    embedded: Callable[[Sequence[str]], Tensor] | None,
) -> PromptCoverage:
    by_key = {prompt_key(prompt): text_of(prompt) for prompt in prompts}
    paired = {prompt_key(row.prompt) for row in rows}
    covered = [key in paired for key in by_key]
    found = PromptCoverage(
        prompts=len(by_key), covered=sum(covered), elsewhere=len(paired - by_key.keys())
    )
    if embedded is None or len(by_key) < 2:
        return found
    texts = list(by_key.values())
    vectors = embedded(texts)
    ids = cluster_vectors(vectors, min(50, max(2, math.isqrt(len(texts))))).tolist()
    members: dict[int, list[int]] = {}
    for i, cluster_id in enumerate(ids):
        members.setdefault(cluster_id, []).append(i)
    without = [some for some in members.values() if not any(covered[i] for i in some)]
    expected, std = expected_coverage(
        [len(some) for some in members.values()], sum(covered) / len(covered)
    )
    return dataclasses.replace(
        found,
        clusters=len(members),
        covered_clusters=len(members) - len(without),
        expected_clusters=expected,
        expected_std=std,
        uncovered=[
            UncoveredCluster(prompts=len(some), example=texts[_central(vectors, some)])
            for some in sorted(without, key=len, reverse=True)
        ],
    )


def _central(vectors: Tensor, members: Sequence[int]) -> int:
    """Return which of the members is nearest to their mean direction."""
    units = F.normalize(vectors[list(members)].double(), dim=1)
    return members[int((units @ units.mean(0)).argmax())]


def _reference_labels(
    rows: Sequence[PreferenceRow], reference: Sequence[PreferenceRow]
) -> list[float | None]:
    """Return how often the reference prefers the chosen side, None where it lacks the pair."""
    wins: Mapping[tuple[str, str, str], int] = Counter(
        pair_key(row) for row in reference if not row.extra.get("tie")
    )
    labels: list[float | None] = []
    for row in rows:
        prompt, chosen, rejected = pair_key(row)
        same = wins.get((prompt, chosen, rejected), 0)
        other = wins.get((prompt, rejected, chosen), 0)
        labels.append(same / (same + other) if same + other else None)
    return labels


def _agreement(
    probabilities: Sequence[float | None], confidences: Sequence[float | None]
) -> Agreement | None:
    """Return the agreement of whoever gave these probabilities to the chosen sides."""
    verdicts = [None if p is None else 0.5 if p == 0.5 else float(p > 0.5) for p in probabilities]
    held = [v for v in verdicts if v is not None]
    share = _share(held)
    if share is None:
        return None
    both = [
        (c, v)
        for c, v in zip(confidences, verdicts, strict=True)
        if c is not None and v is not None
    ]
    stated, agreed = [c for c, _ in both], [v for _, v in both]
    correlation = _spearman(stated, agreed)
    return Agreement(
        agreement=share,
        ties=sum(v == 0.5 for v in held),
        unanswered=len(verdicts) - len(held),
        by_confidence=agreement_by_confidence(stated, agreed),
        confidence_correlation=(
            None if correlation is None else rank_correlation_interval(correlation, len(both))
        ),
    )


def _spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the rank correlation, None where one of the two is constant."""
    if len(x) < 2:
        return None
    sides = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    found = spearman(*sides)
    return None if math.isnan(found) else found


def _repeats(rows: Sequence[PreferenceRow]) -> Repeats:
    keys = [pair_key(row) for row in rows]
    seen = set(keys)
    prompts = Counter(key[0] for key in keys)
    return Repeats(
        duplicates=len(keys) - len(seen),
        contradictions=sum(c < r and (p, r, c) in seen for p, c, r in seen),
        prompts=len(prompts),
        repeated_prompts=sum(count > 1 for count in prompts.values()),
        most_pairs=max(prompts.values()),
    )


# --- words ---


def _length_verdict(found: LengthBias) -> str:
    """Whether length tells the label: `UNEVEN_SHARE` away from a half, and the interval too.

    A reward that learns length from 55 % of the pairs gains one pair in twenty by it, which is as
    much as refinement is worth in most papers.
    """
    share = found.longer
    if abs(share.share - 0.5) < UNEVEN_SHARE or share.low <= 0.5 <= share.high:
        return ""
    longer = share.share > 0.5
    real = ""
    if found.reference is not None:
        real = f"; in the reference the chosen side is longer in {_percent(found.reference)}"
    return (
        f"The chosen side is longer in {_percent(share)} of the pairs ({found.factor:.2f} times as "
        f"long on average{real}), so that a reward trained on them learns that "
        f"{'longer' if longer else 'shorter'} is better; balance the lengths, by a subset or by "
        "weights, and measure win rates with length control."
    )


def _length_confidence_verdict(found: LengthBias) -> str:
    """Whether a gate on confidence is one on length: `STRONG_CORRELATION`, a tenth of variance."""
    correlation = found.confidence_correlation
    if correlation is None or abs(correlation) < STRONG_CORRELATION:
        return ""
    kind = "longer" if correlation > 0 else "shorter"
    return (
        f"The confidence hangs on length (rank correlation {_signed(correlation)} with that of the "
        f"chosen side), so that a gate on confidence keeps {kind} answers; compare lengths before "
        "and after it."
    )


def _position_verdict(share: Share | None) -> str:
    if share is None or share.low <= 0.5 <= share.high:
        return ""
    place = "before" if share.share > 0.5 else "after"
    return (
        f"The chosen side was drawn {place} the rejected one more often than not (before it in "
        f"{_percent(share)}), though samples have no order; look for a rule that takes the first "
        "of equals."
    )


def _margin_verdict(share: Share | None) -> str:
    """Whether labels and reward are at odds: more than `OFTEN_NEGATIVE` by the interval.

    SPG takes its rejected side without regard to the reward, so a few are to be expected.
    """
    if share is None or share.low <= OFTEN_NEGATIVE:
        return ""
    return (
        f"The reward prefers the rejected side in {_percent(share)} of the pairs, so that labels "
        "and reward contradict each other there; let people look at those pairs, or gate on the "
        "margin."
    )


def _agreement_verdict(who: str, found: Agreement | None) -> str:
    """Whether labels are better than a coin, by the interval."""
    if found is None or found.agreement.low > 0.5:
        return ""
    share = found.agreement
    if share.high < 0.5:
        return (
            f"{_capital(who)} prefers the rejected side more often than not (the chosen one in "
            f"{_percent(share)} of {share.pairs} pairs), so that the labels mislead; do not train "
            "on them before you know why."
        )
    return (
        f"The labels are no better than a coin to {who} (it prefers the chosen side in "
        f"{_percent(share)} of {share.pairs} pairs), so that nothing is known to be learnt from "
        "them; ask about more pairs, or raise the gates."
    )


def _confidence_verdict(who: str, found: Agreement | None) -> str:
    """Whether confidence tells right labels from wrong ones: an interval above 0."""
    correlation = None if found is None else found.confidence_correlation
    if found is None or correlation is None or correlation.low > 0:
        return ""
    numbers = (
        f"{_signed(correlation.value)} [{_signed(correlation.low)}, {_signed(correlation.high)}]"
    )
    if correlation.high < 0:
        return (
            f"{_capital(who)} agrees less where the confidence is higher (rank correlation "
            f"{numbers}), so that a gate on confidence keeps the worse labels; do without it."
        )
    return (
        f"The confidence is unrelated to agreement with {who} (rank correlation {numbers}), so "
        "that a gate on it is not known to keep the better labels; ask about more pairs if the "
        "interval is wide."
    )


def _alike_verdict(chosen: Diversity, rejected: Diversity) -> str:
    """Whether the chosen sides are more of one kind than the rejected: `MORE_ALIKE` in cosine.

    Cosines of unrelated texts differ by less than that between two sets of the same policy.
    """
    pairs = [
        ("mean cosine", chosen.mean_cosine, rejected.mean_cosine),
        ("self-similarity", chosen.self_similarity, rejected.self_similarity),
    ]
    name, one, other = pairs[0] if chosen.mean_cosine is not None else pairs[1]
    if one is None or other is None or one - other < MORE_ALIKE:
        return ""
    return (
        f"The chosen sides are more alike than the rejected ones ({name} {_signed(one)} against "
        f"{_signed(other)}), so that a policy can please the reward by saying one kind of thing; "
        "look at what they share."
    )


def _repeated_verdict(chosen: Diversity) -> str:
    """Whether one answer serves many prompts: `OFTEN_REPEATED`."""
    if chosen.repeated < OFTEN_REPEATED:
        return ""
    return (
        f"{100 * chosen.repeated:.0f} % of the chosen texts are chosen in more than one pair, so "
        "that a reward can learn them by heart; look for an answer that fits any prompt, such as "
        "a refusal."
    )


def _coverage_verdict(found: PromptCoverage | None) -> str:
    """Whether kinds of prompts are missing: two stds fewer clusters than by chance."""
    if found is None or found.covered_clusters is None or not found.uncovered:
        return ""
    assert found.expected_clusters is not None
    assert found.expected_std is not None
    if found.covered_clusters >= found.expected_clusters - 2 * found.expected_std:
        return ""
    prompts = sum(cluster.prompts for cluster in found.uncovered)
    return (
        f"{found.covered_clusters} of {found.clusters} clusters of prompts have a pair, and "
        f"{found.expected_clusters:.1f} would have by chance: nothing was learnt on {prompts} "
        f"prompts such as {_quoted(found.uncovered[0].example)}, so that the data are skewed to "
        "prompts on which samples agree; lower the gate there, or ask people."
    )


def _repeats_verdicts(found: Repeats) -> list[str]:
    said = []
    if found.contradictions:
        said.append(
            f"Two texts stand there in both orders ({_times(found.contradictions)}), so that one "
            "label of the two is wrong; drop them, or let people decide."
        )
    if found.duplicates:
        said.append(
            f"Pairs repeat an earlier one ({_times(found.duplicates)}), so that they count more "
            "than they say; drop them."
        )
    if found.repeated_prompts >= OFTEN_REPEATED * found.prompts and found.most_pairs > 1:
        said.append(
            f"{found.repeated_prompts} of {found.prompts} prompts have several pairs, up to "
            f"{found.most_pairs}, so that the number of pairs says more than there is to learn; "
            "split training and test by prompt."
        )
    return said


def _percent(share: Share) -> str:
    return f"{100 * share.share:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _signed(value: float) -> str:
    text = f"{value:.2f}"
    return (text if float(text) else "0.00").replace("-", MINUS)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _quoted(text: str, limit: int = 60) -> str:
    flat = " ".join(text.split())
    return f'"{flat}"' if len(flat) <= limit else f'"{flat[:limit].rstrip()} ..."'
