"""The command about preferences themselves: audit, with gates, balanced lengths and reviews."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from trueward.commands.shared import DataOptions, console, load_reward
from trueward.data.formats import (
    Completion,
    LoadReport,
    PreferenceRow,
    Prompt,
    load_preferences,
    load_prompts,
    prompt_key,
    write_jsonl,
)
from trueward.evaluate.judges import ChatJudge, Judge, ReportingJudge, reward_judge
from trueward.models.reward_function import fits_context
from trueward.refine.audit import PreferenceAudit, audit_preferences
from trueward.refine.equivalence import Embed, sentence_transformer
from trueward.refine.gates import (
    Dropped,
    GateConfig,
    GateResult,
    Reason,
    apply_gates,
    length_balanced,
    length_balanced_weights,
    record_of,
    text_key,
)
from trueward.refine.review import (
    ReviewResult,
    doubtful_pairs,
    export_for_review,
    import_reviews,
)
from trueward.report.audit import AuditPage, audit_report, audit_tables
from trueward.report.run import rich_table
from trueward.train.run_folder import RunFolder, environment, to_plain, write_text

_READ, _KEPT = "read", "kept"
_SHOWN = 5  # doubtful pairs on the page
_GATE = 0.5  # where confidences are doubtful if no gate says so


@dataclass(frozen=True, kw_only=True)
class AuditCommand:
    """Say what is wrong with preferences, and write those that pass the gates."""

    preferences: str  # such as the preferences.jsonl of `trueward refine`
    output_dir: str
    reference: str = ""  # preferences of people, compared where they have the same pair
    prompts: str = ""  # all prompts that samples were drawn for: prompts or samples
    judge: str = ""  # a reward model's folder, FILE.py:FUNCTION, or chat:MODEL
    base_url: str = "https://api.openai.com/v1"  # of the chat judge; its key is OPENAI_API_KEY
    embedding_model: str = ""  # of sentence-transformers; empty: diversity from words alone
    gates: GateConfig = field(default_factory=GateConfig)
    # How lengths are balanced after the gates: a subset without a bias, or weights and all pairs.
    length: Literal["none", "balance", "weights"] = "none"
    max_weight: float = 10.0  # largest factor, with length=weights
    review: int = 0  # the most doubtful pairs, written to review.csv for people to answer; 0 = none
    reviewed: str = ""  # a review.csv or .jsonl with answers
    seed: int = 0  # of the balanced subset, and of which side people see first
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if self.review < 0:
            raise ValueError(f"review must be at least 0 pairs, got {self.review}.")
        if self.max_weight < 1:
            raise ValueError(f"max_weight must be at least 1, got {self.max_weight}.")
        if self.gates.min_judge_probability and not self.judge:
            raise ValueError("gates.min_judge_probability needs a --judge.")


def audit(config: AuditCommand) -> None:
    """Write audit.json, audit.html, kept.jsonl, dropped.jsonl and, where asked, review.csv."""
    folder = Path(config.output_dir)
    loaded = load_preferences(config.preferences, **config.data.arguments())
    console.print(loaded.report.summary(), highlight=False)
    review = import_reviews(config.reviewed, loaded.rows) if config.reviewed else None
    reference = _reference(config)
    prompts = _prompts(config)
    run = RunFolder(  # the same folder may be audited again, with answers or other gates
        folder,
        command="audit",
        config=config,
        free={option.name for option in dataclasses.fields(config)},
    )
    rows = review.rows if review is not None else loaded.rows
    exported = _export(rows, config)
    judge = _judge(config)
    remembered = _remembering(judge) if judge is not None else None
    embed = _embed(config)

    def audited(some: Sequence[PreferenceRow], judge: Judge | None) -> PreferenceAudit:
        return audit_preferences(
            some, embed=embed, judge=judge, reference=reference, prompts=prompts
        )

    audits = {_READ: audited(loaded.rows, remembered)}
    result = _decided(rows, config, remembered, review)
    remarks = _remarks(loaded.report, config, result, review)
    if result.kept:
        # A judge that chose the pairs agrees with them, and says nothing new.
        audits[_KEPT] = audited(
            result.kept, None if config.gates.min_judge_probability else remembered
        )
    write_jsonl(folder / "kept.jsonl", map(record_of, result.kept))
    write_jsonl(folder / "dropped.jsonl", _dropped_records(result, loaded.report))
    found = _numbers(audits, result, loaded.report, review, judge)
    write_text(folder / "audit.json", json.dumps(found, indent=2))
    gate = config.gates.min_confidence or _GATE
    audit_report(
        folder / "audit.html",
        AuditPage(
            audits=audits,
            title=f"Audit: {Path(config.preferences).name}",
            dropped=result.counts,
            review=review,
            doubtful=doubtful_pairs(rows, limit=_SHOWN, gate=gate),
            remarks=remarks,
            config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
            environment=environment(),
        ),
    )
    run.finish(_summary(audits, result, review, exported), seed=config.seed)
    _tell(folder, audits, remarks, exported)


# --- inputs ---


def _reference(config: AuditCommand) -> list[PreferenceRow]:
    if not config.reference:
        return []
    loaded = load_preferences(config.reference, **config.data.arguments())
    console.print(loaded.report.summary(), highlight=False)
    return loaded.rows


def _prompts(config: AuditCommand) -> list[Prompt] | None:
    if not config.prompts:
        return None
    loaded = load_prompts(config.prompts, **config.data.arguments())
    console.print(loaded.report.summary(), highlight=False)
    return [row.prompt for row in loaded.rows]


def _judge(config: AuditCommand) -> Judge | None:
    if not config.judge:
        return None
    if config.judge.startswith("chat:"):
        return ChatJudge(base_url=config.base_url, model=config.judge.removeprefix("chat:"))
    reward = load_reward([config.judge])
    fits, judge = fits_context(reward), reward_judge(reward)

    def fitting(
        prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Judge the pairs that fit the reward's context; NaN for others."""
        triples = list(zip(prompts, first, second, strict=True))
        places = [i for i, (p, a, b) in enumerate(triples) if fits(p, a) and fits(p, b)]
        answers = torch.full((len(triples),), torch.nan, dtype=torch.float64)
        if places:
            answers[places] = judge(
                *(list(column) for column in zip(*(triples[i] for i in places), strict=True))
            ).double()
        return answers

    return fitting


def _remembering(judge: Judge) -> Judge:
    """Return a judge that is asked about a pair once, however often it comes up."""
    known: dict[tuple[str, str, str], float] = {}

    def asked(
        prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        triples = list(zip(prompts, first, second, strict=True))
        keys = [(prompt_key(p), text_key(a), text_key(b)) for p, a, b in triples]
        new = {key: some for key, some in zip(keys, triples, strict=True) if key not in known}
        if new:
            columns = (list(column) for column in zip(*new.values(), strict=True))
            known.update(zip(new, judge(*columns).double().tolist(), strict=True))
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    return asked


def _embed(config: AuditCommand) -> Embed | None:
    """Return the embedding, which keeps what it has embedded."""
    if not config.embedding_model:
        return None
    embed = sentence_transformer(config.embedding_model)
    known: dict[str, Tensor] = {}

    def embedded(texts: list[str]) -> Float[Tensor, "text dim"]:
        new = [text for text in texts if text not in known]
        if new:
            known.update(zip(new, embed(new).float().cpu(), strict=True))
        return torch.stack([known[text] for text in texts])

    return embedded


# --- decisions ---


def _decided(
    rows: Sequence[PreferenceRow],
    config: AuditCommand,
    judge: Judge | None,
    review: ReviewResult | None,
) -> GateResult:
    """Return the pairs to train on, and all others with their reasons."""
    result = apply_gates(rows, config.gates, judge)
    kept, dropped = result.kept, result.dropped
    if review is not None:
        dropped = [
            *(Dropped(row, Reason.PEOPLE_TIE) for row in review.ties),
            *(Dropped(row, Reason.PEOPLE_DROP) for row in review.dropped),
            *dropped,
        ]
    if config.length == "balance":
        balanced = length_balanced(kept, config.seed)
        kept, dropped = balanced.kept, [*dropped, *balanced.dropped]
    elif config.length == "weights":
        weights = length_balanced_weights(kept, max_weight=config.max_weight)
        kept = [dataclasses.replace(r, weight=w) for r, w in zip(kept, weights, strict=True)]
    return GateResult(kept, dropped)


def _export(rows: Sequence[PreferenceRow], config: AuditCommand) -> int:
    """Write review.csv where asked; return how many pairs it shows."""
    target = Path(config.output_dir) / "review.csv"
    if not config.review:
        return 0
    if config.reviewed and target.exists() and target.samefile(config.reviewed):
        console.print(
            f"{target} is being read, so no new one is written: move it away to ask about more "
            "pairs.",
            highlight=False,
        )
        return 0
    gate = config.gates.min_confidence or _GATE
    return export_for_review(rows, target, limit=config.review, seed=config.seed, gate=gate)


# --- outputs ---


def _dropped_records(result: GateResult, report: LoadReport) -> list[dict[str, Any]]:
    """Return the pairs that were dropped with their reasons, and lines that were no pairs."""
    records = [
        record_of(row) | {"reason": reason.value, "where": row.where}
        for row, reason in result.dropped
    ]
    return records + [
        {"reason": problem.kind, "where": problem.where, "detail": problem.detail}
        for problem in report.problems
        if not problem.kept
    ]


def _remarks(
    report: LoadReport, config: AuditCommand, result: GateResult, review: ReviewResult | None
) -> list[str]:
    found = []
    if report.dropped:
        found.append(f"Not all lines are pairs to train on: {report.summary()}")
    if review is not None and review.unknown:
        some = ", ".join(answer.where for answer in review.unknown[:3])
        more = ", ..." if len(review.unknown) > 3 else ""
        found.append(
            f"{len(review.unknown)} of people's answers are about no pair of these data ({some}"
            f"{more}): were they read with the file that the pairs were taken from?"
        )
    if config.gates.min_judge_probability:
        found.append(
            "The judge decided which pairs were kept, so its agreement with them is left out."
        )
    if not result.kept:
        found.append("No pair is left to train on: loosen the gates.")
    return found


def _numbers(
    audits: dict[str, PreferenceAudit],
    result: GateResult,
    report: LoadReport,
    review: ReviewResult | None,
    judge: Judge | None,
) -> dict[str, Any]:
    """Return what stands in audit.json."""
    found: dict[str, Any] = {name: one.to_json() for name, one in audits.items()}
    found |= {"dropped": result.counts, "problems": report.counts()}
    if review is not None:
        agreement = review.agreement
        found["review"] = review.counts | {
            "agreement": dataclasses.asdict(agreement) if agreement is not None else None,
            "unknown_answers": [dataclasses.asdict(answer) for answer in review.unknown],
        }
    if isinstance(judge, ReportingJudge):
        found["judge"] = dataclasses.asdict(judge.report())
    return found


def _summary(
    audits: dict[str, PreferenceAudit],
    result: GateResult,
    review: ReviewResult | None,
    exported: int,
) -> dict[str, Any]:
    numbers: dict[str, Any] = {"pairs": audits[_READ].pairs, "kept": len(result.kept)}
    numbers |= {f"dropped/{reason}": count for reason, count in result.counts.items()}
    numbers |= {f"chosen_longer/{name}": a.length.longer.share for name, a in audits.items()}
    if review is not None:
        numbers |= {f"review/{kind}": count for kind, count in review.counts.items()}
    return numbers | {"exported_for_review": exported}


def _tell(
    folder: Path, audits: dict[str, PreferenceAudit], remarks: Sequence[str], exported: int
) -> None:
    for table in audit_tables(audits):
        console.print(rich_table(table))
    for name, one in audits.items():
        for sentence in one.verdicts or ["Nothing stands out."]:
            console.print(f"  - {name}: {sentence}", highlight=False, markup=False)
    for sentence in remarks:
        console.print(f"  - {sentence}", highlight=False, markup=False)
    kept = audits[_KEPT].pairs if _KEPT in audits else 0
    console.print(f"{folder}: {kept:,} of {audits[_READ].pairs:,} pairs kept.", highlight=False)
    if exported:
        console.print(
            f"{folder / 'review.csv'}: {exported} doubtful pairs. Fill in the answers (1, 2, tie, "
            "drop), and give the file as --reviewed.",
            highlight=False,
            markup=False,
        )
