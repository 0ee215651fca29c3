"""Does a reward stay accurate where the policy went, and how far away is that?

A reward model is judged on pairs of the policy's own completions, in the order that a gold reward
or a judge gives them: before optimisation, after it, and after the reward was refined on them. How
far the completions moved stands beside it: by the KL to the reference, by the energy distance of
their states, and by their lengths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trueward import objectives
from trueward.data.formats import (
    Completion,
    DataError,
    PreferenceRow,
    Prompt,
    prompt_key,
    text_of,
)
from trueward.data.rows import canonical
from trueward.data.tokens import tokenize
from trueward.evaluate.judges import Judge
from trueward.evaluate.preferences import Interval, Objective, apply_objective, mean_interval
from trueward.losses.policy import kl_estimate
from trueward.models.policy import Policy, exact_token_kl
from trueward.models.reward_function import Reward, fits_context, fitting_rows, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.sampling import Sample
from trueward.train.attributes import completion_states
from trueward.train.policy import sample_batches

# ---- pairs of a policy's own completions -------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JudgedPairs:
    """Pairs of a policy's completions in the order that gold or a judge gave them."""

    rows: list[PreferenceRow]  # `margin` is the difference of gold; None from a judge
    equal: int  # pairs without an order: equal gold, a verdict of 1/2, or the same text twice
    unjudged: int  # pairs with a completion that gold has no finite reward for, or cannot read


def judged_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    *,
    gold: Reward | None = None,
    judge: Judge | None = None,
    pairs: Literal["all", "first"] = "all",
) -> JudgedPairs:
    """Order the completions of each prompt in pairs, by a gold reward or by a judge.

    A gold reward is asked once for each completion; a judge once for each pair of unequal texts.

    Args:
        prompts: One for each list of completions.
        completions: At least two of each prompt; the lists may differ in length.
        gold: The reward that is held to be true. Exactly one of `gold` and `judge` is needed.
        judge: Gives the probability that its first completion is the better one.
        pairs: All n (n - 1) / 2 pairs of a prompt, or that of its first two completions alone.

    Raises:
        ValueError: A prompt with fewer than two completions, or a judge's answer outside of [0, 1].
    """
    if (gold is None) == (judge is None):
        raise ValueError("pairs are ordered by either a gold reward or a judge: give one of them.")
    if pairs not in ("all", "first"):
        raise ValueError(f"pairs must be 'all' or 'first', got {pairs!r}.")
    if len(prompts) != len(completions):
        raise ValueError(
            "there must be one list of completions for each prompt, got "
            f"{len(completions)} lists and {len(prompts)} prompts."
        )
    for i, some in enumerate(completions):
        if len(some) < 2:
            raise ValueError(
                f"a pair needs two completions, prompt {i + 1} has {len(some)}: draw at least two "
                "of each prompt."
            )
    places = [
        (i, a, b)
        for i, some in enumerate(completions)
        for a in range(len(some) if pairs == "all" else 1)
        for b in range(a + 1, len(some) if pairs == "all" else 2)
    ]
    if judge is not None:
        return _pairs_by_judge(prompts, completions, places, judge)
    assert gold is not None
    values = _gold_values(prompts, completions, gold)
    rows, equal, unjudged = [], 0, 0
    for place in places:
        i, a, b = place
        difference = values[i][a] - values[i][b]
        if not math.isfinite(difference):
            unjudged += 1
        elif difference == 0:
            equal += 1
        else:
            rows.append(_pair(prompts, completions, place, difference, abs(difference)))
    return JudgedPairs(rows=rows, equal=equal, unjudged=unjudged)


Place = tuple[int, int, int]  # prompt, first and second completion


def _pairs_by_judge(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    places: Sequence[Place],
    judge: Judge,
) -> JudgedPairs:
    differing = [(i, a, b) for i, a, b in places if completions[i][a] != completions[i][b]]
    if not differing:
        return JudgedPairs(rows=[], equal=len(places), unjudged=0)
    verdicts = judge(
        [prompts[i] for i, _, _ in differing],
        [completions[i][a] for i, a, _ in differing],
        [completions[i][b] for i, _, b in differing],
    )
    values = verdicts.detach().double().cpu()
    if values.shape != (len(differing),) or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"the judge must give one probability in [0, 1] for each of {len(differing)} pairs, "
            f"got the shape {tuple(values.shape)} or a value outside."
        )
    leanings = (values - 0.5).tolist()
    rows = [
        _pair(prompts, completions, place, leaning, None)
        for place, leaning in zip(differing, leanings, strict=True)
        if leaning != 0
    ]
    return JudgedPairs(rows=rows, equal=len(places) - len(rows), unjudged=0)


def _pair(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    place: Place,
    leaning: float,
    margin: float | None,
) -> PreferenceRow:
    i, a, b = place
    chosen, rejected = (a, b) if leaning > 0 else (b, a)
    return PreferenceRow(
        prompts[i],
        completions[i][chosen],
        completions[i][rejected],
        margin=margin,
        where=f"prompt {i + 1}, completions {a + 1} and {b + 1}",
    )


def _gold_values(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], gold: Reward
) -> list[list[float]]:
    """Return gold's reward of each completion, NaN where it has none."""
    fits = fits_context(gold)
    asked = [
        (i, k)
        for i, some in enumerate(completions)
        for k, completion in enumerate(some)
        if fits(prompts[i], completion)
    ]
    values = [[math.nan] * len(some) for some in completions]
    if asked:
        posterior = posterior_function(gold)(
            [prompts[i] for i, _ in asked], [completions[i][k] for i, k in asked]
        )
        for (i, k), value in zip(asked, posterior.mean.tolist(), strict=True):
            values[i][k] = value
    return values


def agreement(proxy: Float[Tensor, "prompt sample"], gold: Float[Tensor, "prompt sample"]) -> float:
    """Share of a prompt's pairs of answers that the proxy orders as gold does; ties count half.

    Args:
        proxy: The reward that is judged.
        gold: The reward that is held to be true; pairs of equal gold are left out.

    Returns:
        NaN where no pair differs in gold.
    """
    first, second = torch.triu_indices(gold.shape[1], gold.shape[1], offset=1).unbind(0)
    wanted = (gold[:, first] - gold[:, second]).sign()
    said = (proxy[:, first] - proxy[:, second]).sign()
    right = ((wanted * said) + 1) / 2  # 1, 1/2 for a tied proxy, 0
    return right[wanted != 0].mean().item()


# ---- the accuracy of each reward on each source of pairs ---------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShiftAccuracy:
    """Share of a source's pairs that a reward orders as gold does, tied rewards at half."""

    reward: str
    source: str
    accuracy: float
    low: float  # NaN where there is one prompt alone
    high: float
    pairs: int
    prompts: int
    ties: int  # pairs of equal reward


@dataclass(frozen=True, kw_only=True)
class ShiftDifference:
    """Accuracy of one reward less that of another, on the same pairs."""

    source: str
    reward: str
    baseline: str
    difference: float  # the reward's accuracy less the baseline's
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ShiftTable:
    """How accurate each reward is on the pairs of each source, from `shift_table`."""

    rewards: list[str]
    sources: list[str]
    accuracies: list[ShiftAccuracy]  # rewards within sources
    differences: list[ShiftDifference]  # each reward less each one before it
    left_out: dict[str, int]  # by source, pairs longer than a reward's context
    confidence: float  # of the intervals

    def accuracy(self, reward: str, source: str) -> ShiftAccuracy:
        """Return a reward's accuracy on a source."""
        for found in self.accuracies:
            if (found.reward, found.source) == (reward, source):
                return found
        raise KeyError(f"no reward {reward!r} on a source {source!r}.")

    def difference(self, reward: str, baseline: str, source: str) -> ShiftDifference:
        """Return a reward's accuracy less a baseline's on a source, whichever was given first."""
        for found in self.differences:
            if found.source != source:
                continue
            if (found.reward, found.baseline) == (reward, baseline):
                return found
            if (found.reward, found.baseline) == (baseline, reward):
                return ShiftDifference(
                    source=source,
                    reward=reward,
                    baseline=baseline,
                    difference=-found.difference,
                    low=-found.high,
                    high=-found.low,
                )
        raise KeyError(f"no rewards {reward!r} and {baseline!r} on a source {source!r}.")


def shift_table(
    rewards: Mapping[str, Reward],
    sources: Mapping[str, Sequence[PreferenceRow]],
    *,
    objective: Objective = objectives.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ShiftTable:
    """Accuracy of every reward on the pairs of every source, and their paired differences.

    The pairs of one prompt share its completions, so they are no independent trials: the intervals
    are percentile bootstraps over prompts (all pairs of a drawn prompt come along), and a
    difference is drawn on the same prompts for both rewards. They are too narrow for fewer than
    about 20 prompts, and have no width where every pair is right.

    Args:
        rewards: By name, the rewards to compare, such as before and after a refinement.
        sources: By name, preference rows from `judged_pairs` (`.rows`), such as those of the
            reference policy's samples and of the optimised policy's.
        objective: From the posterior to the reward that orders the pairs.
        confidence: Of the intervals.
        resamples: Draws of the bootstrap.
        seed: Of the bootstrap; equal seeds give equal intervals.

    Raises:
        ValueError: A source without a pair that all rewards can read, or a reward that is not
            finite.
    """
    if not rewards or not sources:
        raise ValueError("a shift needs at least one reward and one source of pairs.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "confidence must lie in (0, 1) and resamples be at least 1, got "
            f"{confidence} and {resamples}."
        )
    accuracies: list[ShiftAccuracy] = []
    differences: list[ShiftDifference] = []
    left_out: dict[str, int] = {}
    names = list(rewards)
    for source, given in sources.items():
        rows = list(given)
        for reward in rewards.values():  # the same pairs for all
            rows = fitting_rows(reward, rows)
        left_out[source] = len(given) - len(rows)
        if not rows:
            raise ValueError(
                f"The source {source!r} has no pair to judge by: give samples that differ in gold "
                "and fit the rewards' contexts."
            )
        right = torch.stack(
            [_right(reward, rows, objective, name) for name, reward in rewards.items()], dim=1
        )
        sums, pairs = _by_prompt(right, rows)
        draws = _cluster_draws(sums, pairs, resamples=resamples, seed=seed)
        overall = right.mean(dim=0).tolist()
        for column, name in enumerate(names):
            low, high = _ends(draws[:, column], len(pairs), confidence)
            accuracies.append(
                ShiftAccuracy(
                    reward=name,
                    source=source,
                    accuracy=overall[column],
                    low=low,
                    high=high,
                    pairs=len(rows),
                    prompts=len(pairs),
                    ties=int((right[:, column] == 0.5).sum()),
                )
            )
            for before in range(column):
                low, high = _ends(draws[:, column] - draws[:, before], len(pairs), confidence)
                differences.append(
                    ShiftDifference(
                        source=source,
                        reward=name,
                        baseline=names[before],
                        difference=overall[column] - overall[before],
                        low=low,
                        high=high,
                    )
                )
    return ShiftTable(
        rewards=names,
        sources=list(sources),
        accuracies=accuracies,
        differences=differences,
        left_out=left_out,
        confidence=confidence,
    )


def _right(
    reward: Reward, rows: Sequence[PreferenceRow], objective: Objective, name: str
) -> Float[Tensor, " pair"]:
    """Return 1, 1/2 or 0 for each pair; a completion of several pairs is scored once."""
    places: dict[tuple[str, str], int] = {}
    prompts: list[Prompt] = []
    completions: list[Completion] = []
    where: list[str] = []
    pairs = []
    for row in rows:
        sides = []
        for side in (row.chosen, row.rejected):
            key = (prompt_key(row.prompt), canonical(side))
            if key not in places:
                places[key] = len(prompts)
                prompts.append(row.prompt)
                completions.append(side)
                where.append(row.where)
            sides.append(places[key])
        pairs.append(sides)
    posterior = posterior_function(reward)(prompts, completions)
    finite = posterior.means.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = where[int((~finite).nonzero()[0])] or "a pair"
        raise ValueError(
            f"{int((~finite).sum())} rewards of {name!r} are missing, NaN or infinite, the first "
            f"for {first}; leave such rows out or mend the reward."
        )
    values = apply_objective(objective, posterior)[torch.tensor(pairs)]
    return ((values[:, 0] - values[:, 1]).sign() + 1) / 2


def _by_prompt(
    right: Float[Tensor, "pair column"], rows: Sequence[PreferenceRow]
) -> tuple[Float[Tensor, "prompt column"], Float[Tensor, " prompt"]]:
    """Return what is right, and how many pairs there are, of each prompt."""
    numbers: dict[str, int] = {}
    of_pair = torch.tensor([numbers.setdefault(prompt_key(r.prompt), len(numbers)) for r in rows])
    sums = torch.zeros(len(numbers), right.shape[1], dtype=right.dtype)
    sums.index_add_(0, of_pair, right)
    return sums, of_pair.bincount(minlength=len(numbers)).to(right.dtype)


def _cluster_draws(
    sums: Float[Tensor, "prompt column"],
    pairs: Float[Tensor, " prompt"],
    *,
    resamples: int,
    seed: int,
) -> Float[Tensor, "resample column"]:
    """Bootstrap over prompts of `sum of sums / sum of pairs`, the same prompts for all columns."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(resamples, sums.shape[1], dtype=sums.dtype)
    for i in range(resamples):
        drawn = torch.randint(len(pairs), (len(pairs),), generator=generator)
        draws[i] = sums[drawn].sum(dim=0) / pairs[drawn].sum()
    return draws


def _ends(draws: Float[Tensor, " resample"], prompts: int, confidence: float) -> Interval:
    if prompts < 2:  # one prompt drawn again and again says nothing of others
        return Interval(math.nan, math.nan)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=draws.dtype)
    low, high = draws.quantile(tails).tolist()
    return Interval(low, high)


# ---- how far the completions moved -------------------------------------------------------------


def energy_distance(
    x: Float[Tensor, "first dim"], y: Float[Tensor, "second dim"], *, unbiased: bool = False
) -> float:
    """Energy distance of two samples: `2 E|X - Y| - E|X - X'| - E|Y - Y'|`, Euclidean norms.

    Zero in the population if and only if both distributions are the same. Szekely and Rizzo 2013,
    Energy statistics (https://doi.org/10.1016/j.jspi.2013.03.018). `scipy.stats.energy_distance`
    is the square root of the V form in one dimension.

    Args:
        x: A row for each completion of the one source.
        y: Of the other.
        unbiased: False is the V-statistic, whose means within a sample count each row with itself:
            never negative, 0 for the same sample twice, and above 0 on average for two samples of
            one distribution. True is the U-statistic, without those zeros: unbiased, of either
            sign, and needs two rows of each.
    """
    _require_points(x, y, at_least=2 if unbiased else 1)
    x, y = x.double(), y.double()
    n, m, less = len(x), len(y), int(unbiased)
    between = 2 * _distance_sum(x, y) / (n * m)
    within = _distance_sum(x, x) / (n * (n - less)) + _distance_sum(y, y) / (m * (m - less))
    return between - within


@dataclass(frozen=True, kw_only=True)
class EnergyTest:
    """Energy distance of two samples, with how often chance alone would reach it."""

    distance: float  # the V form
    coefficient: float  # distance / (2 E|X - Y|), in [0, 1]: free of the states' scale
    p_value: float  # of the hypothesis that both are of one distribution
    permutations: int


def energy_test(
    x: Float[Tensor, "first dim"],
    y: Float[Tensor, "second dim"],
    *,
    groups: tuple[Sequence[object], Sequence[object]] | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> EnergyTest:
    """Permutation test that two samples are of one distribution, by their energy distance.

    `p = (1 + permutations that reach the distance) / (1 + permutations)`, valid for any sample
    size. All distances are held at once: 8 bytes times the square of the number of rows.

    Args:
        x: A row for each completion of the one source.
        y: Of the other.
        groups: The prompt of each row of `x`, and of `y`. Completions of one prompt resemble each
            other, so they can only be exchanged among themselves: labels are permuted within each
            prompt, and what is tested is that both sources answer a prompt alike. None permutes
            all rows and is right for independent ones alone, one completion of each prompt, say.
        permutations: How many, at random.
        seed: Of the permutations.

    Raises:
        ValueError: No prompt that both sources answer, so that nothing could be exchanged.
    """
    _require_points(x, y, at_least=1)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}.")
    if groups is not None and (len(groups[0]), len(groups[1])) != (len(x), len(y)):
        raise ValueError(
            f"groups must name the prompt of each row, got {len(groups[0])} and {len(groups[1])} "
            f"names for {len(x)} and {len(y)} rows."
        )
    if groups is not None and not set(groups[0]) & set(groups[1]):
        raise ValueError(
            "the two sources have no prompt in common, so nothing can be exchanged within one: "
            "give one completion of each prompt, without groups."
        )
    names: dict[object, int] = {}
    told = [*groups[0], *groups[1]] if groups is not None else [0] * (len(x) + len(y))
    group = torch.tensor([names.setdefault(name, len(names)) for name in told])
    together = torch.cat([x, y]).double().cpu()
    distances = torch.cdist(
        together, together, compute_mode="donot_use_mm_for_euclid_dist"
    )  # the other mode is inexact for near points
    first = torch.zeros(len(together), dtype=torch.float64)
    first[: len(x)] = 1
    observed = _energies(first[:, None], distances)[0]
    generator = torch.Generator().manual_seed(seed)
    reached = 0
    for start in range(0, permutations, 64):
        some = min(64, permutations - start)
        labels = torch.stack([_permuted(first, group, generator) for _ in range(some)], dim=1)
        # The same labels in another order of summation are no smaller.
        slack = 1e-10 * distances.mean()
        reached += int((_energies(labels, distances) >= observed - slack).sum())
    between = 2 * float(distances[: len(x), len(x) :].mean())
    distance = max(0.0, float(observed))
    return EnergyTest(
        distance=distance,
        coefficient=distance / between if between > 0 else 0.0,
        p_value=(1 + reached) / (1 + permutations),
        permutations=permutations,
    )


def _energies(
    labels: Float[Tensor, "point draw"], distances: Float[Tensor, "point point"]
) -> Float[Tensor, " draw"]:
    """Return the V form for each column of labels, which are 1 in the first sample, else 0."""
    n = labels.sum(dim=0)
    m = len(labels) - n
    within = (labels * (distances @ labels)).sum(dim=0)
    between = (labels * distances.sum(dim=0)[:, None]).sum(dim=0) - within
    other = distances.sum() - within - 2 * between
    return 2 * between / (n * m) - within / n**2 - other / m**2


def _permuted(
    labels: Float[Tensor, " point"], group: Tensor, generator: torch.Generator
) -> Float[Tensor, " point"]:
    """Return the labels exchanged at random within each group."""
    shuffled = torch.randperm(len(labels), generator=generator)
    shuffled = shuffled[group[shuffled].argsort(stable=True)]
    out = torch.empty_like(labels)
    out[group.argsort(stable=True)] = labels[shuffled]
    return out


def _distance_sum(x: Float[Tensor, "first dim"], y: Float[Tensor, "second dim"]) -> float:
    parts = (
        torch.cdist(some, y, compute_mode="donot_use_mm_for_euclid_dist").sum()
        for some in x.split(512)
    )
    return float(sum(parts))


def _require_points(x: Tensor, y: Tensor, *, at_least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            "an energy distance is of rows of the same width, [completion, dim], got the shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )
    if min(len(x), len(y)) < at_least:
        raise ValueError(
            f"an energy distance needs at least {at_least} rows of each sample, got {len(x)} and "
            f"{len(y)}."
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("an energy distance needs finite values, got NaN or an infinity.")


def last_states(
    reward_model: RewardModel,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    max_tokens: int = 16384,
) -> Float[Tensor, "completion hidden"]:
    """The state of each completion that a reward model's head reads: for `energy_distance`.

    Raises:
        ValueError: A model whose states cannot be had (a published classifier, a LoRA ensemble,
            whose members have states of their own), or a completion longer than its context.
    """
    if reward_model.head is None or reward_model.lora is not None:
        raise ValueError(
            "the reward model has no single state for each completion (a classifier as published, "
            "or a LoRA ensemble): use another model's states, or an embedding."
        )
    tokens = [reward_model.tokenize(p, c) for p, c in zip(prompts, completions, strict=True)]
    return completion_states(reward_model, tokens, max_tokens=max_tokens)


@dataclass(frozen=True, kw_only=True)
class LengthDifference:
    """How much longer one source's completions are than another's, in characters."""

    mean: float
    other_mean: float
    difference: float  # over the prompts that both answer; of the means where there is none
    low: float  # 95 %, Student's t over those prompts; NaN with fewer than two
    high: float
    prompts: int  # that both answer


def length_difference(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    other_prompts: Sequence[Prompt],
    other_completions: Sequence[Completion],
) -> LengthDifference:
    """Length of one source's completions less another's, paired by prompt.

    Judges and rewards favour length, so a change of accuracy is read beside a change of length.
    """
    ours, theirs = _lengths(prompts, completions), _lengths(other_prompts, other_completions)
    mean, other_mean = (
        sum(sum(some) for some in lengths.values()) / sum(map(len, lengths.values()))
        for lengths in (ours, theirs)
    )
    shared = [key for key in ours if key in theirs]
    differences = torch.tensor(
        [sum(ours[k]) / len(ours[k]) - sum(theirs[k]) / len(theirs[k]) for k in shared],
        dtype=torch.float64,
    )
    low, high = mean_interval(differences) if len(shared) > 1 else (math.nan, math.nan)
    return LengthDifference(
        mean=mean,
        other_mean=other_mean,
        difference=float(differences.mean()) if shared else mean - other_mean,
        low=low,
        high=high,
        prompts=len(shared),
    )


def _lengths(
    prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> dict[str, list[float]]:
    if not prompts or len(prompts) != len(completions):
        raise ValueError(
            "there must be one prompt for each completion, and at least one, got "
            f"{len(prompts)} prompts and {len(completions)} completions."
        )
    lengths: dict[str, list[float]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        lengths.setdefault(prompt_key(prompt), []).append(float(len(text_of(completion))))
    return lengths


@torch.no_grad()
def policy_kl(
    policy: Policy, ref: Policy, samples: Sequence[Sample], *, max_tokens: int = 16384
) -> dict[str, float]:
    """KL of a policy to the reference on its own completions, in nats a completion.

    `kl/exact` sums the exact KL of each next token (see `exact_token_kl`); `kl/k1`, `kl/k2` and
    `kl/k3` sum the estimators of Schulman 2020 (http://joschu.net/blog/kl-approx.html). On another
    policy's completions these numbers mean nothing.
    """
    if not samples:
        raise ValueError("a KL needs the policy's completions, got none.")
    totals: dict[str, float] = dict.fromkeys(("kl/exact", "kl/k1", "kl/k2", "kl/k3"), 0.0)
    for batch, _ in sample_batches(policy, samples, range(len(samples)), max_tokens):
        logprobs, ref_logprobs = policy(batch).logprobs, ref(batch).logprobs
        totals["kl/exact"] += exact_token_kl(policy, ref, batch).sum().item()
        for estimator in ("k1", "k2", "k3"):
            kl = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
            totals[f"kl/{estimator}"] += (kl * batch.mask).sum().item()
    return {key: value / len(samples) for key, value in totals.items()}


def samples_of_texts(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    finished: Sequence[bool] | None = None,
) -> list[Sample]:
    """Completions read back from a file, as `policy_kl` wants them.

    A text is tokenised anew, which may part it otherwise than the policy wrote it; the KL is then
    that of the tokens read, which is near, and not exactly that of the tokens written.

    Args:
        policy: Whose tokenizer reads the texts.
        prompts: One for each completion.
        completions: What the policy wrote.
        finished: Whether each ended by itself and so has an EOS; all, where not given.

    Raises:
        DataError: A completion that does not fit the policy's context, or has no token.
    """
    ends = [True] * len(prompts) if finished is None else finished
    samples = []
    for i, (prompt, completion, end) in enumerate(zip(prompts, completions, ends, strict=True)):
        tokens = tokenize(policy.tokenizer, prompt, completion, eos=end)
        length = len(tokens.prompt_ids) + len(tokens.completion_ids)
        if length > policy.max_length or not tokens.completion_ids or not tokens.prompt_ids:
            raise DataError(
                f"Completion {i + 1} has {len(tokens.completion_ids)} tokens after a prompt of "
                f"{len(tokens.prompt_ids)} and the policy reads {policy.max_length}: leave it out."
            )
        samples.append(
            Sample(
                prompt_index=i,
                prompt_ids=tokens.prompt_ids,
                completion_ids=tokens.completion_ids,
                logprobs=[],
                text=text_of(completion),
                finished=end,
            )
        )
    return samples
