"""What became of each prompt's samples: a synthetic preference or the reason for none; reports."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from trueward.data.formats import Completion, PreferenceRow, Prompt, text_of


class Skipped(StrEnum):
    """Why a prompt gave no preference."""

    LOW_CONFIDENCE = "low confidence"  # the largest cluster is smaller than gamma
    SINGLE_CLUSTER = "single cluster"  # all samples agree: there is nothing to reject
    TIED_REWARDS = "tied rewards"  # only where a pair is ranked by reward
    TIED_JUDGEMENT = "tied judgement"  # only where a judge decides
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
            # Places among the prompt's samples: a liking for one of them shows in `trueward audit`.
            "chosen_index": self.chosen_index,
            "rejected_index": self.rejected_index,
        }


@dataclass(frozen=True, kw_only=True)
class PromptOutcome:
    """What became of one prompt: its pair, or why there is none, and what that was decided on."""

    pair: SyntheticPreference | Skipped
    rewards: tuple[float | None, ...]  # of all n completions; None where not finite
    clusters: tuple[int | None, ...]  # of all n, None where left out; () where nothing is clustered
    left_out: int  # completions that are blank, or whose reward is not finite
    duplicates: int  # of those that are left, the ones whose text an earlier one has
    judgement: float | None = None  # a judge's probability that the pair's earlier one is better

    @property
    def cluster_sizes(self) -> tuple[int, ...]:
        """Completions in each cluster, in order of first appearance."""
        return tuple(Counter(c for c in self.clusters if c is not None).values())

    @property
    def confidence(self) -> float | None:
        """Return `|largest cluster| / n`, or None where nothing was clustered."""
        sizes = self.cluster_sizes
        return max(sizes) / len(self.clusters) if sizes else None

    def as_row(self, prompt: Prompt) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        row: dict[str, Any] = {"prompt": prompt}
        if isinstance(self.pair, Skipped):
            row |= {"outcome": str(self.pair), "confidence": self.confidence}
            row |= {"cluster_sizes": list(self.cluster_sizes)}
        else:
            indices = {k: getattr(self.pair, k) for k in ("chosen_index", "rejected_index")}
            row |= {"outcome": "accepted"} | self.pair.as_row() | indices
        return row | {
            "rewards": list(self.rewards),
            "clusters": list(self.clusters),
            "left_out": self.left_out,
            "duplicates": self.duplicates,
            "judgement": self.judgement,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any], prompt: Prompt) -> "PromptOutcome":
        """Return what `as_row` wrote. The prompt is handed in: JSON changes some messages."""
        pair: SyntheticPreference | Skipped
        if row["outcome"] == "accepted":
            pair = SyntheticPreference(
                prompt=prompt,
                chosen=row["chosen"],
                rejected=row["rejected"],
                confidence=row["confidence"],
                cluster_sizes=tuple(row["cluster_sizes"]),
                chosen_reward=row["chosen_reward"],
                rejected_reward=row["rejected_reward"],
                chosen_index=row["chosen_index"],
                rejected_index=row["rejected_index"],
            )
        else:
            pair = Skipped(row["outcome"])
        return cls(
            pair=pair,
            rewards=tuple(row["rewards"]),
            clusters=tuple(row["clusters"]),
            left_out=row["left_out"],
            duplicates=row["duplicates"],
            judgement=row["judgement"],
        )


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """The prompts of one kind: a language, a task, whatever field was asked for."""

    prompts: int
    accepted: int
    acceptance_rate: float
    mean_confidence: float | None  # over the clustered prompts; None without any


@dataclass(frozen=True, kw_only=True)
class SyntheticReport:
    """What became of the prompts, and what the pairs look like.

    `prompts` is `accepted` and the five reasons of `Skipped` together. The chosen side being
    longer is this method's known bias (510 against 449 characters in the paper).
    """

    prompts: int
    accepted: int  # the size of D^
    acceptance_rate: float | None  # None without prompts
    low_confidence: int
    single_cluster: int
    tied_rewards: int
    tied_judgements: int
    no_completions: int
    left_out: int  # completions that are blank, or whose reward is not finite
    duplicates: int  # completions whose text an earlier one of their prompt has; they count in n
    cluster_counts: dict[int, int] = field(default_factory=dict)  # clusters -> prompts with so many
    # Confidence, rounded down to a tenth -> clustered prompts: "0.5" holds [0.5, 0.6).
    confidence_counts: dict[str, int] = field(default_factory=dict)
    mean_confidence: float | None  # over all clustered prompts; None without any
    mean_chosen_length: float | None  # characters; None without pairs
    mean_rejected_length: float | None
    chosen_longer: float | None  # share of pairs, equal lengths as half; None without pairs
    by_kind: dict[str, KindReport] = field(default_factory=dict)  # "" = the field was not given
    thresholds: dict[str, float] = field(default_factory=dict)  # cosines of embedding equivalences

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it, where keys are strings."""
        counts = {str(count): prompts for count, prompts in self.cluster_counts.items()}
        return asdict(self) | {"cluster_counts": counts}


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


def result_of(
    outcomes: Sequence[PromptOutcome],
    *,
    kinds: Sequence[str] | None = None,
    thresholds: dict[str, float] | None = None,
) -> SyntheticResult:
    """Return the pairs and the report on all prompts.

    Args:
        outcomes: Of each prompt.
        kinds: Of each prompt, "" where unknown: acceptance is then reported by kind too.
        thresholds: What the embedding equivalences used, to stand in the report.
    """
    pairs = [o.pair for o in outcomes if isinstance(o.pair, SyntheticPreference)]
    skipped = Counter(o.pair for o in outcomes if isinstance(o.pair, Skipped))
    clustered = [o for o in outcomes if o.cluster_sizes]
    lengths = [(len(text_of(p.chosen)), len(text_of(p.rejected))) for p in pairs]
    by_kind: dict[str, list[PromptOutcome]] = {}
    for outcome, kind in zip(outcomes, kinds or [], strict=kinds is not None):
        by_kind.setdefault(kind, []).append(outcome)
    report = SyntheticReport(
        prompts=len(outcomes),
        accepted=len(pairs),
        acceptance_rate=len(pairs) / len(outcomes) if outcomes else None,
        low_confidence=skipped[Skipped.LOW_CONFIDENCE],
        single_cluster=skipped[Skipped.SINGLE_CLUSTER],
        tied_rewards=skipped[Skipped.TIED_REWARDS],
        tied_judgements=skipped[Skipped.TIED_JUDGEMENT],
        no_completions=skipped[Skipped.NO_COMPLETIONS],
        left_out=sum(o.left_out for o in outcomes),
        duplicates=sum(o.duplicates for o in outcomes),
        cluster_counts=dict(sorted(Counter(len(o.cluster_sizes) for o in clustered).items())),
        confidence_counts=dict(sorted(Counter(map(_tenth, clustered)).items())),
        mean_confidence=_mean_confidence(clustered),
        mean_chosen_length=_mean([chosen for chosen, _ in lengths]),
        mean_rejected_length=_mean([rejected for _, rejected in lengths]),
        chosen_longer=_mean(
            [(chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in lengths]
        ),
        by_kind={kind: _kind_report(some) for kind, some in sorted(by_kind.items())},
        thresholds=thresholds or {},
    )
    return SyntheticResult(preferences=pairs, report=report)


def _kind_report(outcomes: list[PromptOutcome]) -> KindReport:
    accepted = sum(isinstance(o.pair, SyntheticPreference) for o in outcomes)
    return KindReport(
        prompts=len(outcomes),
        accepted=accepted,
        acceptance_rate=accepted / len(outcomes),
        mean_confidence=_mean_confidence(outcomes),
    )


def _tenth(outcome: PromptOutcome) -> str:
    # In whole numbers, so that nothing is rounded at a tenth's edge.
    return f"{10 * max(outcome.cluster_sizes) // len(outcome.clusters) / 10:.1f}"


def _mean_confidence(outcomes: Sequence[PromptOutcome]) -> float | None:
    return _mean([o.confidence for o in outcomes if o.confidence is not None])


def _mean(values: Sequence[int] | Sequence[float]) -> float | None:
    # fsum: the same prompts in another order have the same mean.
    return math.fsum(values) / len(values) if values else None
