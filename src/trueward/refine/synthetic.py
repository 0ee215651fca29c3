"""Synthetic preferences from the policy's own samples: RLP-SPG and its ablations.

Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279): of n samples of a prompt, the
largest cluster of equivalent ones is taken for right if it holds at least a part gamma of them.
The chosen side is its member with the highest reward, the rejected side any sample outside it.
Then plain Bradley-Terry on the real and the synthetic pairs together.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, Prompt, prompt_key
from trueward.evaluate.judges import Judge
from trueward.refine.equivalence import Equivalence, cluster
from trueward.refine.outcomes import (
    KindReport,
    PromptOutcome,
    Skipped,
    SyntheticPreference,
    SyntheticReport,
    SyntheticResult,
    result_of,
)

__all__ = [
    "KindReport",
    "PromptOutcome",
    "Rejected",
    "Rewards",
    "Skipped",
    "SyntheticPreference",
    "SyntheticReport",
    "SyntheticResult",
    "clustered_outcomes",
    "confidence",
    "judged_outcomes",
    "judged_pairs",
    "ranked_outcomes",
    "result_of",
    "reward_ranked_pairs",
    "select_pair",
    "synthetic_preferences",
]

Rewards = Float[Tensor, "prompt sample"] | Sequence[Sequence[float]]  # lists may differ in length
Rejected = Literal["uniform", "length_matched"]


def confidence(cluster_ids: Sequence[int], *, samples: int | None = None) -> float:
    """Self-consistency of a prompt's samples: `|largest cluster| / n`, in {1/n, ..., 1}.

    Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279).

    Args:
        cluster_ids: Of each completion.
        samples: n, where samples were left out before clustering; they count against confidence.
    """
    if not cluster_ids:
        raise ValueError("confidence needs the cluster of at least one completion, got none.")
    return max(Counter(cluster_ids).values()) / (samples or len(cluster_ids))


def select_pair(
    completions: Sequence[str],
    rewards: Sequence[float],
    cluster_ids: Sequence[int],
    *,
    gamma: float,
    generator: torch.Generator,
    samples: int | None = None,
    rejected: Rejected = "uniform",
) -> tuple[int, int] | Skipped:
    """Return the indices (chosen, rejected) of one prompt's pair, or why there is none.

    `g* = argmax |g|`, accepted if `|g*| >= gamma n`; `y_w = argmax_{y in g*} r(x, y)`; `y_l`
    uniform over the samples outside `g*`. Lang et al. 2024, section 4.2
    (https://arxiv.org/abs/2403.19279), which leaves open what follows: of equally large clusters
    the one with the highest reward is taken (then the one that appeared first), equal rewards give
    the earlier sample, and a prompt whose samples all agree has no pair.

    Args:
        completions: The prompt's samples. One whose text is the chosen one's is never rejected.
        rewards: Of each, finite, from the current reward model (in the paper, the first).
        cluster_ids: Of each, such as `cluster` returns.
        gamma: Smallest confidence, inclusive. 0 accepts all (the paper's Select-All).
        generator: Draws the rejected side.
        samples: n, where samples were left out of the lists; they count against the confidence.
        rejected: `length_matched` (ours, not the paper's) takes of the samples outside `g*` the one
            whose length in characters is nearest to the chosen one's, as a ratio, and draws among
            equals: the reward model is given less to learn from length alone.
    """
    _require_gamma(gamma)
    if not len(completions) == len(rewards) == len(cluster_ids):
        raise ValueError(
            "select_pair needs one reward and one cluster for each completion, got "
            f"{len(completions)} completions, {len(rewards)} rewards and {len(cluster_ids)} "
            "clusters."
        )
    if not all(map(math.isfinite, rewards)):
        raise ValueError("select_pair ranks by rewards, so each must be finite: leave others out.")
    if not completions:
        return Skipped.NO_COMPLETIONS
    clusters: dict[int, list[int]] = {}
    for i, cluster_id in enumerate(cluster_ids):
        clusters.setdefault(cluster_id, []).append(i)
    # max takes the first of equals, here and below: the earlier cluster, the earlier sample.
    largest = max(clusters.values(), key=lambda g: (len(g), max(rewards[i] for i in g)))
    # The tolerance is for gamma * n: 0.28 * 25 is 7.000000000000001.
    if len(largest) < gamma * (samples or len(completions)) - 1e-9:
        return Skipped.LOW_CONFIDENCE
    chosen = max(largest, key=lambda i: rewards[i])
    inside = set(largest)
    outside = [
        i for i, text in enumerate(completions) if i not in inside and text != completions[chosen]
    ]
    if not outside:
        return Skipped.SINGLE_CLUSTER
    if rejected == "length_matched":
        outside = _nearest_in_length(outside, completions, len(completions[chosen]))
    return chosen, outside[_draw(len(outside), generator)]


def _nearest_in_length(indices: list[int], completions: Sequence[str], length: int) -> list[int]:
    """Return those with the least |log(length / wanted)|; an empty text is infinitely far."""

    def ratio(i: int) -> float:
        lengths = len(completions[i]), length
        return max(lengths) / min(lengths) if min(lengths) else math.inf

    least = min(map(ratio, indices))
    return [i for i in indices if ratio(i) == least]


def synthetic_preferences(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    equivalent: Equivalence,
    gamma: float = 0.5,
    seed: int = 0,
    rejected: Rejected = "uniform",
) -> SyntheticResult:
    """RLP-SPG: at most one preference for each prompt, by `select_pair` on the clustered samples.

    Each prompt's random choice hangs on the seed and the prompt alone, so shards of the prompts
    give together what all of them give at once.

    Args:
        prompts: Unlabelled prompts: strings or messages.
        completions: n samples of each from the policy, as text.
        rewards: Of each sample, from the current reward model. A completion that is blank, or whose
            reward is not finite, is left out before clustering, and counted: in the report, and in
            n, against the confidence.
        equivalent: Which samples say the same; see `trueward.refine.equivalence`.
        gamma: Smallest confidence, inclusive. 0 accepts all: the paper's Select-All.
        seed: Of the rejected sides.
        rejected: How the rejected side is drawn; see `select_pair`.
    """
    outcomes = clustered_outcomes(
        prompts,
        completions,
        rewards,
        equivalent=equivalent,
        gamma=gamma,
        seed=seed,
        rejected=rejected,
    )
    return result_of(outcomes)


def clustered_outcomes(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    equivalent: Equivalence,
    gamma: float = 0.5,
    seed: int = 0,
    rejected: Rejected = "uniform",
) -> list[PromptOutcome]:
    """Return what `synthetic_preferences` makes of each prompt."""
    _require_gamma(gamma)
    samples = _finite_samples(prompts, completions, rewards)
    clusters = cluster(prompts, [s.completions for s in samples], equivalent)
    outcomes = []
    for prompt, own, ids in zip(prompts, samples, clusters, strict=True):
        pair = select_pair(
            own.completions,
            own.rewards,
            ids,
            gamma=gamma,
            generator=_generator(seed, prompt),
            samples=own.count,
            rejected=rejected,
        )
        outcomes.append(_outcome(prompt, own, pair, cluster_ids=ids))
    return outcomes


def reward_ranked_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    seed: int = 0,
) -> SyntheticResult:
    """SPG without clusters: a random pair of different samples, ranked by their rewards.

    The ablation "Reward" of Lang et al. 2024, Table 5 (https://arxiv.org/abs/2403.19279): the
    baseline that SPG has to beat. Arguments and result as in `synthetic_preferences`, without
    confidence and clusters.
    """
    return result_of(ranked_outcomes(prompts, completions, rewards, seed=seed))


def ranked_outcomes(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    seed: int = 0,
) -> list[PromptOutcome]:
    """Return what `reward_ranked_pairs` makes of each prompt."""
    samples = _finite_samples(prompts, completions, rewards)
    outcomes = []
    for prompt, own in zip(prompts, samples, strict=True):
        pair = _random_pair(own, _generator(seed, prompt))
        if not isinstance(pair, Skipped):
            i, j = pair
            pair = _ordered(pair, own.rewards[i] - own.rewards[j], tie=Skipped.TIED_REWARDS)
        outcomes.append(_outcome(prompt, own, pair))
    return outcomes


def judged_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    judge: Judge,
    seed: int = 0,
) -> SyntheticResult:
    """SPG without clusters and without the reward: a random pair, labelled by a judge.

    The ablation "RLAIF" of Lang et al. 2024, Table 5 (https://arxiv.org/abs/2403.19279), where the
    judge is the policy itself (`trueward.evaluate.policy_judge`). With one seed the pairs are those
    of `reward_ranked_pairs`; the rewards stand in the rows and decide nothing but, where not
    finite, which completions are left out. A probability of exactly 1/2 gives no pair.
    """
    return result_of(judged_outcomes(prompts, completions, rewards, judge=judge, seed=seed))


def judged_outcomes(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Rewards,
    *,
    judge: Judge,
    seed: int = 0,
) -> list[PromptOutcome]:
    """Return what `judged_pairs` makes of each prompt; the judge is asked once for all."""
    samples = _finite_samples(prompts, completions, rewards)
    pairs = [
        _random_pair(own, _generator(seed, prompt))
        for prompt, own in zip(prompts, samples, strict=True)
    ]
    asked = [
        (prompt, own.completions[pair[0]], own.completions[pair[1]])
        for prompt, own, pair in zip(prompts, samples, pairs, strict=True)
        if not isinstance(pair, Skipped)
    ]
    verdicts = iter(_judgements(judge, asked))
    outcomes = []
    for prompt, own, pair in zip(prompts, samples, pairs, strict=True):
        judgement = None
        if not isinstance(pair, Skipped):
            judgement = next(verdicts)
            pair = _ordered(pair, judgement - 0.5, tie=Skipped.TIED_JUDGEMENT)
        outcomes.append(_outcome(prompt, own, pair, judgement=judgement))
    return outcomes


def _judgements(judge: Judge, asked: Sequence[tuple[Prompt, str, str]]) -> list[float]:
    if not asked:
        return []
    prompts, firsts, seconds = (list(column) for column in zip(*asked, strict=True))
    found = judge(prompts, firsts, seconds)
    if found.shape != (len(asked),) or not bool(((found >= 0) & (found <= 1)).all()):
        raise ValueError(
            f"A judge must give one probability for each pair: asked about {len(asked)}, it gave "
            f"shape {tuple(found.shape)} or values outside [0, 1]."
        )
    verdicts: list[float] = found.double().tolist()
    return verdicts


@dataclass(frozen=True)
class _Samples:
    """One prompt's usable completions, and where they stood among all."""

    completions: list[str]
    rewards: list[float]
    indices: list[int]
    all_rewards: tuple[float | None, ...]  # of all n, None where not finite

    @property
    def count(self) -> int:
        return len(self.all_rewards)


def _finite_samples(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[str]], rewards: Rewards
) -> list[_Samples]:
    if not len(prompts) == len(completions) == len(rewards):
        raise ValueError(
            "There must be a list of completions and a row of rewards for each prompt, got "
            f"{len(prompts)} prompts, {len(completions)} lists and {len(rewards)} rows."
        )
    rows = rewards.double().tolist() if isinstance(rewards, Tensor) else rewards
    samples = []
    for i, (texts, row) in enumerate(zip(completions, rows, strict=True)):
        if len(texts) != len(row):
            raise ValueError(
                f"Prompt {i + 1} has {len(texts)} completions and {len(row)} rewards: give one "
                "reward for each (NaN leaves a completion out)."
            )
        # A blank completion can stand on neither side of a preference.
        finite = [k for k, r in enumerate(row) if math.isfinite(r) and texts[k].strip()]
        samples.append(
            _Samples(
                completions=[texts[k] for k in finite],
                rewards=[row[k] for k in finite],
                indices=finite,
                all_rewards=tuple(r if math.isfinite(r) else None for r in row),
            )
        )
    return samples


def _random_pair(samples: _Samples, generator: torch.Generator) -> tuple[int, int] | Skipped:
    """Draw two different texts, the earlier one first."""
    texts = samples.completions
    if not texts:
        return Skipped.NO_COMPLETIONS
    pairs = [(i, j) for j in range(len(texts)) for i in range(j) if texts[i] != texts[j]]
    return pairs[_draw(len(pairs), generator)] if pairs else Skipped.SINGLE_CLUSTER


def _ordered(pair: tuple[int, int], margin: float, *, tie: Skipped) -> tuple[int, int] | Skipped:
    """Return (chosen, rejected) by the sign of the first one's margin over the second."""
    if margin == 0:
        return tie
    return pair if margin > 0 else (pair[1], pair[0])


def _outcome(
    prompt: Prompt,
    samples: _Samples,
    pair: tuple[int, int] | Skipped,
    *,
    cluster_ids: Sequence[int] | None = None,
    judgement: float | None = None,
) -> PromptOutcome:
    """Put together what is known of a prompt; `cluster_ids` is None where nothing is clustered."""
    clusters: list[int | None] = []
    if cluster_ids is not None:
        clusters = [None] * samples.count
        for index, cluster_id in zip(samples.indices, cluster_ids, strict=True):
            clusters[index] = cluster_id
    return PromptOutcome(
        pair=pair
        if isinstance(pair, Skipped)
        else _preference(prompt, samples, pair, cluster_ids=cluster_ids or []),
        rewards=samples.all_rewards,
        clusters=tuple(clusters),
        left_out=samples.count - len(samples.indices),
        duplicates=len(samples.completions) - len(set(samples.completions)),
        judgement=judgement,
    )


def _preference(
    prompt: Prompt, samples: _Samples, pair: tuple[int, int], *, cluster_ids: Sequence[int]
) -> SyntheticPreference:
    chosen, rejected = pair
    sizes = Counter(cluster_ids)  # in order of first appearance
    return SyntheticPreference(
        prompt=prompt,
        chosen=_as_completion(prompt, samples.completions[chosen]),
        rejected=_as_completion(prompt, samples.completions[rejected]),
        confidence=confidence(cluster_ids, samples=samples.count) if cluster_ids else None,
        cluster_sizes=tuple(sizes.values()),
        chosen_reward=samples.rewards[chosen],
        rejected_reward=samples.rewards[rejected],
        chosen_index=samples.indices[chosen],
        rejected_index=samples.indices[rejected],
    )


def _as_completion(prompt: Prompt, text: str) -> Completion:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _require_gamma(gamma: float) -> None:
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is a confidence in [0, 1], got {gamma}.")


def _generator(seed: int, prompt: Prompt) -> torch.Generator:
    """Return noise that hangs on the seed and the prompt, not on the prompts around it."""
    digest = hashlib.sha256(f"{seed}\n{prompt_key(prompt)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
