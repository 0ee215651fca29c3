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
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, PreferenceRow, Prompt, prompt_key, text_of
from trueward.refine.equivalence import Equivalence, cluster


class Skipped(StrEnum):
    """Why a prompt gave no preference."""

    LOW_CONFIDENCE = "low confidence"  # the largest cluster is smaller than gamma
    SINGLE_CLUSTER = "single cluster"  # all samples agree: there is nothing to reject
    TIED_REWARDS = "tied rewards"  # only where a pair is ranked by reward
    NO_COMPLETIONS = "no completions"  # none with a finite reward


@dataclass(frozen=True, kw_only=True)
class SyntheticPreference:
    """One pair made of the policy's samples.

    The rejected reward may be the higher one: SPG trusts agreement between clusters, and the
    reward only within one. So it is no margin to train on.
    """

    prompt: Prompt
    chosen: Completion  # one assistant message where the prompt is messages
    rejected: Completion
    confidence: float | None  # |largest cluster| / n; None where nothing was clustered
    cluster_sizes: tuple[int, ...]  # in order of first appearance; () where nothing was clustered
    chosen_reward: float
    rejected_reward: float
    chosen_index: int  # among the prompt's completions as they came in
    rejected_index: int

    def as_row(self) -> dict[str, Any]:
        """Return the pair in TRL's preference format, with where it comes from beside it."""
        sides = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return sides | self._provenance()

    def as_preference(self, *, where: str = "synthetic") -> PreferenceRow:
        """Return the pair as a row to train on, without a margin; see the class."""
        return PreferenceRow(
            self.prompt, self.chosen, self.rejected, where=where, extra=self._provenance()
        )

    def _provenance(self) -> dict[str, Any]:
        return {
            "confidence": self.confidence,
            "cluster_sizes": list(self.cluster_sizes),
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
        }


@dataclass(frozen=True, kw_only=True)
class SyntheticReport:
    """What became of the prompts, and what the pairs look like.

    `prompts` is `accepted` and the four reasons of `Skipped` together. The chosen side being
    longer is this method's known bias (510 against 449 characters in the paper).
    """

    prompts: int
    accepted: int
    low_confidence: int
    single_cluster: int
    tied_rewards: int
    no_completions: int
    left_out: int  # completions that are blank, or whose reward is not finite
    cluster_counts: dict[int, int] = field(default_factory=dict)  # clusters -> prompts with so many
    mean_confidence: float | None  # over all clustered prompts; None without any
    mean_chosen_length: float | None  # characters; None without pairs
    mean_rejected_length: float | None


@dataclass(frozen=True, kw_only=True)
class SyntheticResult:
    """Preferences in the order of their prompts, and the report on all prompts."""

    preferences: list[SyntheticPreference]
    report: SyntheticReport

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the preferences in TRL's format; see `SyntheticPreference.as_row`."""
        return [preference.as_row() for preference in self.preferences]

    def to_preferences(self) -> list[PreferenceRow]:
        """Return the preferences as rows to train on."""
        return [preference.as_preference() for preference in self.preferences]


def confidence(cluster_ids: Sequence[int]) -> float:
    """Self-consistency of a prompt's samples: `|largest cluster| / n`, in {1/n, ..., 1}.

    Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279).
    """
    if not cluster_ids:
        raise ValueError("confidence needs the cluster of at least one completion, got none.")
    return max(Counter(cluster_ids).values()) / len(cluster_ids)


def select_pair(
    completions: Sequence[str],
    rewards: Sequence[float],
    cluster_ids: Sequence[int],
    *,
    gamma: float,
    generator: torch.Generator,
    samples: int | None = None,
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
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is a confidence in [0, 1], got {gamma}.")
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
    return chosen, outside[_draw(len(outside), generator)]


def synthetic_preferences(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Float[Tensor, "prompt sample"],
    *,
    equivalent: Equivalence,
    gamma: float = 0.5,
    seed: int = 0,
) -> SyntheticResult:
    """RLP-SPG: at most one preference for each prompt, by `select_pair` on the clustered samples.

    Each prompt's random choice hangs on the seed and the prompt alone, so shards of the prompts
    give together what all of them give at once.

    Args:
        prompts: Unlabelled prompts: strings or messages.
        completions: n samples of each from the policy, as text.
        rewards: Of each sample, from the current reward model. A completion that is blank, or whose
            reward is not finite, is left out before clustering, and counted.
        equivalent: Which samples say the same; see `trueward.refine.equivalence`.
        gamma: Smallest confidence, inclusive. 0 accepts all: the paper's Select-All.
        seed: Of the rejected sides.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma is a confidence in [0, 1], got {gamma}.")
    samples = _finite_samples(prompts, completions, rewards)
    kept = [s.completions for s in samples]
    clusters = cluster(prompts, kept, equivalent)
    outcomes: list[SyntheticPreference | Skipped] = []
    for prompt, own, ids in zip(prompts, samples, clusters, strict=True):
        pair = select_pair(
            own.completions,
            own.rewards,
            ids,
            gamma=gamma,
            generator=_generator(seed, prompt),
            samples=len(own.completions) + own.left_out,
        )
        outcomes.append(
            pair if isinstance(pair, Skipped) else _preference(prompt, own, pair, cluster_ids=ids)
        )
    return _result(outcomes, samples, clusters)


def reward_ranked_pairs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Float[Tensor, "prompt sample"],
    *,
    seed: int = 0,
) -> SyntheticResult:
    """SPG without clusters: a random pair of different samples, ranked by their rewards.

    The ablation "Reward" of Lang et al. 2024, Table 5 (https://arxiv.org/abs/2403.19279): the
    baseline that SPG has to beat. Arguments and result as in `synthetic_preferences`, without
    confidence and clusters.
    """
    samples = _finite_samples(prompts, completions, rewards)
    outcomes: list[SyntheticPreference | Skipped] = []
    for prompt, own in zip(prompts, samples, strict=True):
        pair = _ranked_pair(own, _generator(seed, prompt))
        outcomes.append(
            pair if isinstance(pair, Skipped) else _preference(prompt, own, pair, cluster_ids=[])
        )
    return _result(outcomes, samples, clusters=[])


@dataclass(frozen=True)
class _Samples:
    """One prompt's usable completions, and where they stood among all."""

    completions: list[str]
    rewards: list[float]
    indices: list[int]
    left_out: int


def _finite_samples(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    rewards: Float[Tensor, "prompt sample"],
) -> list[_Samples]:
    if not len(prompts) == len(completions) == len(rewards):
        raise ValueError(
            "There must be a list of completions and a row of rewards for each prompt, got "
            f"{len(prompts)} prompts, {len(completions)} lists and {len(rewards)} rows."
        )
    samples = []
    for i, (texts, row) in enumerate(zip(completions, rewards.double().tolist(), strict=True)):
        if len(texts) != len(row):
            raise ValueError(
                f"Prompt {i + 1} has {len(texts)} completions and {len(row)} rewards: give one "
                "reward for each (NaN leaves a completion out)."
            )
        # A blank completion can stand on neither side of a preference.
        finite = [k for k, r in enumerate(row) if math.isfinite(r) and texts[k].strip()]
        own = [texts[k] for k in finite], [row[k] for k in finite]
        samples.append(_Samples(*own, finite, len(texts) - len(finite)))
    return samples


def _ranked_pair(samples: _Samples, generator: torch.Generator) -> tuple[int, int] | Skipped:
    texts, rewards = samples.completions, samples.rewards
    if not texts:
        return Skipped.NO_COMPLETIONS
    pairs = [(i, j) for j in range(len(texts)) for i in range(j) if texts[i] != texts[j]]
    if not pairs:
        return Skipped.SINGLE_CLUSTER
    i, j = pairs[_draw(len(pairs), generator)]
    if rewards[i] == rewards[j]:
        return Skipped.TIED_REWARDS
    return (i, j) if rewards[i] > rewards[j] else (j, i)


def _preference(
    prompt: Prompt, samples: _Samples, pair: tuple[int, int], *, cluster_ids: list[int]
) -> SyntheticPreference:
    chosen, rejected = pair
    sizes = Counter(cluster_ids)  # in order of first appearance
    return SyntheticPreference(
        prompt=prompt,
        chosen=_as_completion(prompt, samples.completions[chosen]),
        rejected=_as_completion(prompt, samples.completions[rejected]),
        confidence=confidence(cluster_ids) if cluster_ids else None,
        cluster_sizes=tuple(sizes.values()),
        chosen_reward=samples.rewards[chosen],
        rejected_reward=samples.rewards[rejected],
        chosen_index=samples.indices[chosen],
        rejected_index=samples.indices[rejected],
    )


def _as_completion(prompt: Prompt, text: str) -> Completion:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _result(
    outcomes: list[SyntheticPreference | Skipped],
    samples: list[_Samples],
    clusters: list[list[int]],
) -> SyntheticResult:
    preferences = [o for o in outcomes if isinstance(o, SyntheticPreference)]
    skipped = Counter(o for o in outcomes if isinstance(o, Skipped))
    clustered = [ids for ids in clusters if ids]
    histogram = Counter(len(set(ids)) for ids in clustered)
    report = SyntheticReport(
        prompts=len(outcomes),
        accepted=len(preferences),
        low_confidence=skipped[Skipped.LOW_CONFIDENCE],
        single_cluster=skipped[Skipped.SINGLE_CLUSTER],
        tied_rewards=skipped[Skipped.TIED_REWARDS],
        no_completions=skipped[Skipped.NO_COMPLETIONS],
        left_out=sum(s.left_out for s in samples),
        cluster_counts=dict(sorted(histogram.items())),
        mean_confidence=_mean([confidence(ids) for ids in clustered]),
        mean_chosen_length=_mean([len(text_of(p.chosen)) for p in preferences]),
        mean_rejected_length=_mean([len(text_of(p.rejected)) for p in preferences]),
    )
    return SyntheticResult(preferences=preferences, report=report)


def _mean(values: Sequence[int] | Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _generator(seed: int, prompt: Prompt) -> torch.Generator:
    """Return noise that hangs on the seed and the prompt, not on the prompts around it."""
    digest = hashlib.sha256(f"{seed}\n{prompt_key(prompt)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
