"""The page and the tables of an audit: what is wrong with preferences, as read and as kept."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trueward.data.formats import PreferenceRow, text_of
from trueward.refine.audit import Agreement, Histogram, PreferenceAudit, Share
from trueward.refine.gates import number_of
from trueward.refine.review import ReviewResult
from trueward.report.figures import Curve, curve_figure, settle_layout
from trueward.report.html import (
    Completion,
    Details,
    FigureHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.numbers import Cell, decimal, share_text
from trueward.report.run import configuration_details, versions_line
from trueward.report.svg import to_svg
from trueward.train.run_folder import write_text

_GLOSSARY = {
    "chosen longer": "Share of the pairs in which the chosen side has more characters, ties at "
    "half, in per cent with its 95 % interval; by weight where pairs have weights.",
    "times as long": "The chosen side's length over the rejected one's, geometric mean.",
    "confidence": "Share of a prompt's samples that lie in the largest group of like answers, from "
    "which the chosen one was taken.",
    "margin": "The reward of the chosen side less that of the rejected one, by the reward that "
    "made the pairs; below 0 it prefers the side that was rejected.",
    "agreement": "How often a judge, or people, prefer the chosen side, ties at half.",
    "distinct-n": "Share of different sequences of n words among all; it falls with the amount of "
    "text.",
    "self-similarity": "Mean cosine of two texts as sets of pairs of words; 0 if they share none.",
    "repeated": "Share of the texts that stand in more than one pair.",
    "spread, Vendi score": "Of the texts' embeddings: the distance from their mean, at most 1; and "
    "how many different texts there are in effect.",
}


@dataclass(frozen=True, kw_only=True)
class AuditPage:
    """What an audit's page shows.

    The first audit is that of the pairs as they were read; a second one, of those kept, stands
    beside it.
    """

    audits: Mapping[str, PreferenceAudit]
    title: str = "Audit of preferences"
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason
    review: ReviewResult | None = None
    doubtful: Sequence[PreferenceRow] = ()  # pairs to look at
    remarks: Sequence[str] = ()
    config_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


def audit_report(path: str | Path, page: AuditPage) -> Path:
    """Write the page, one file that needs nothing else; return its path."""
    text = render_report(
        title=page.title,
        lead=_lead(page.audits),
        preface=[Details(summary="What the words mean", terms=_GLOSSARY)],
        sections=list(_sections(page)),
        footer=versions_line(page.environment),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def audit_tables(audits: Mapping[str, PreferenceAudit]) -> list[Table]:
    """The tables that a terminal and the page begin with: lengths, labels, diversity."""
    found = [_lengths_table(audits), _labels_table(audits), _diversity_table(audits)]
    return [table for table in found if table is not None]


def _sections(page: AuditPage) -> Iterator[Section]:
    yield Section(title="Results", tables=audit_tables(page.audits))
    for name, audit in page.audits.items():
        title = "Verdicts" if len(page.audits) == 1 else f"Verdicts: {name}"
        said = audit.verdicts or ["Nothing stands out."]
        yield Section(title=title, text="\n\n".join(said))
    if page.remarks:
        yield Section(title="Remarks", text="\n\n".join(page.remarks))
    yield Section(title="Distributions", figures=list(_figures(page.audits)))
    tables = [
        *_agreement_tables(page.audits),
        *_coverage_tables(page.audits),
        *_decision_tables(page.dropped, page.review),
    ]
    if tables:
        yield Section(title="Labels, prompts, decisions", tables=tables)
    if page.doubtful:
        yield Section(
            title="Doubtful pairs",
            text="Those whose labels are least certain, by margin and confidence.",
            samples=[_sample(row) for row in page.doubtful],
        )
    details = configuration_details(page.config_text, page.environment)
    if details:
        yield Section(title="Configuration", details=details)


def _lead(audits: Mapping[str, PreferenceAudit]) -> str:
    (name, first), *others = audits.items()
    found = len(first.verdicts)
    says = {0: "nothing stands out", 1: "one thing stands out"}
    text = f"{first.pairs:,} pairs of {first.repeats.prompts:,} prompts {name}; "
    text += f"{says.get(found, f'{found} things stand out')}."
    for other, audit in others:
        text += f" {audit.pairs:,} pairs {other}."
    return text


# --- tables ---


def _lengths_table(audits: Mapping[str, PreferenceAudit]) -> Table:
    rows: list[list[Cell]] = [
        [
            name,
            audit.pairs,
            audit.repeats.prompts,
            _share(audit.length.longer),
            decimal(audit.length.factor, 2),
            decimal(audit.length.chosen.mean, 0),
            decimal(audit.length.rejected.mean, 0),
        ]
        for name, audit in audits.items()
    ]
    reference = next(iter(audits.values())).length.reference
    notes = "Shares in per cent with their 95 % intervals; lengths in characters."
    if reference is not None:
        notes += f" In the reference the chosen side is longer in {_share(reference)} %."
    return Table(
        columns=[
            *("set", "pairs", "prompts", "chosen\nlonger"),
            *("times\nas long", "chosen\nlength", "rejected\nlength"),
        ],
        rows=rows,
        caption="How long the sides are.",
        notes=notes,
    )


def _labels_table(audits: Mapping[str, PreferenceAudit]) -> Table | None:
    rows: list[list[Cell]] = []
    for name, audit in audits.items():
        labels = audit.labels
        rows.append(
            [
                name,
                None if labels.confidence is None else decimal(labels.confidence.mean, 2),
                _share(labels.negative_margins),
                _share(labels.judge.agreement if labels.judge else None),
                _share(labels.reference.agreement if labels.reference else None),
                _share(audit.position),
            ]
        )
    columns = [
        *("set", "mean\nconfidence", "negative\nmargins", "judge\nagrees"),
        *("reference\nagrees", "chosen\ndrawn first"),
    ]
    if all(cell is None for row in rows for cell in row[1:]):
        return None
    return _without_empty(
        columns, rows, caption="What the labels are worth.", notes="Shares in per cent."
    )


def _diversity_table(audits: Mapping[str, PreferenceAudit]) -> Table:
    columns = [
        *("set", "side", "distinct\n1", "distinct\n2", "distinct\n3", "self-\nsimilar"),
        *("repeated", "mean\ncosine", "spread", "Vendi\nscore"),
    ]
    rows: list[list[Cell]] = [
        [
            name,
            side,
            decimal(found.distinct_1, 3),
            decimal(found.distinct_2, 3),
            decimal(found.distinct_3, 3),
            _decimal(found.self_similarity, 3),
            decimal(found.repeated, 3),
            _decimal(found.mean_cosine, 3),
            _decimal(found.spread, 3),
            _decimal(found.vendi_score, 1),
        ]
        for name, audit in audits.items()
        for side, found in (("chosen", audit.chosen), ("rejected", audit.rejected))
    ]
    return _without_empty(columns, rows, caption="How far the texts differ.", notes="")


def _agreement_tables(audits: Mapping[str, PreferenceAudit]) -> Iterator[Table]:
    rows: list[list[Cell]] = []
    for name, audit in audits.items():
        asked: dict[str, Agreement | None] = {
            "judge": audit.labels.judge,
            "reference": audit.labels.reference,
        }
        for who, found in asked.items():
            for some in found.by_confidence if found is not None else ():
                share = some.agreement
                stated = f"{some.low:.1f} to {some.high:.1f}"
                rows.append([name, who, stated, share.pairs, _share(share)])
    if rows:
        yield Table(
            columns=["set", "asked", "confidence", "pairs", "agreement, %"],
            rows=rows,
            caption="Whether labels of higher confidence are better ones.",
            notes="Confidence from its lower end on, and below the upper one.",
        )


def _coverage_tables(audits: Mapping[str, PreferenceAudit]) -> Iterator[Table]:
    covered = {name: a.coverage for name, a in audits.items() if a.coverage is not None}
    if covered:
        columns = [
            *("set", "prompts", "with\na pair", "clusters", "with\na pair "),
            *("by\nchance", "prompts of\nother sources"),
        ]
        rows: list[list[Cell]] = [
            [
                name,
                found.prompts,
                found.covered,
                found.clusters,
                found.covered_clusters,
                _decimal(found.expected_clusters, 1),
                found.elsewhere,
            ]
            for name, found in covered.items()
        ]
        yield _without_empty(columns, rows, caption="Which prompts have a pair.", notes="")
    missing: list[list[Cell]] = [
        [name, cluster.prompts, _short(cluster.example)]
        for name, found in covered.items()
        for cluster in found.uncovered[:10]
    ]
    if missing:
        yield Table(
            columns=["set", "prompts", "such as"],
            rows=missing,
            caption="Clusters of prompts without a pair, the largest ones.",
        )


def _decision_tables(dropped: Mapping[str, int], review: ReviewResult | None) -> Iterator[Table]:
    if dropped:
        yield Table(
            columns=["reason", "pairs"],
            rows=[[reason, count] for reason, count in dropped.items()],
            caption="What was dropped.",
        )
    if review is not None:
        agreement = review.agreement
        notes = ""
        if agreement is not None:
            share = share_text(agreement.value, agreement.low, agreement.high)
            notes = f"People agree with {share} % of the labels of the pairs that they were shown."
        yield Table(
            columns=["people's answer", "pairs"],
            rows=[[kind, count] for kind, count in review.counts.items()],
            caption="What people said.",
            notes=notes,
        )


# --- figures ---


def _figures(audits: Mapping[str, PreferenceAudit]) -> Iterator[FigureHtml]:
    for name, audit in audits.items():
        sides = {"chosen": audit.length.chosen, "rejected": audit.length.rejected}
        figure = histogram_figure(
            {side: found.histogram for side, found in sides.items()},
            title=f"Length: pairs {name}",
            x_label="characters",
        )
        caption = "The last bin holds the longest hundredth, however long."
        if audit.weighted:
            caption += " Weights are left out: each pair counts once."
        yield FigureHtml(svg=to_svg(settle_layout(figure)), caption=caption)
    stated = {n: a.labels.confidence for n, a in audits.items() if a.labels.confidence is not None}
    if stated:
        figure = histogram_figure(
            {name: found.histogram for name, found in stated.items()},
            title="Confidence",
            x_label="share of the samples in the largest cluster",
        )
        caption = "How much of each prompt's samples stands behind the chosen one."
        yield FigureHtml(svg=to_svg(settle_layout(figure)), caption=caption)
    name, first = next(iter(audits.items()))
    if first.labels.margin is not None:
        figure = histogram_figure(
            {name: first.labels.margin.histogram},
            title=f"Margin: pairs {name}",
            x_label="reward, chosen less rejected",
        )
        caption = "Left of 0 the reward prefers the side that was rejected."
        yield FigureHtml(svg=to_svg(settle_layout(figure)), caption=caption)


def histogram_figure(histograms: Mapping[str, Histogram], *, title: str, x_label: str) -> Figure:
    """Histograms over each other, as per cent of the pairs of each, with a legend for several.

    Args:
        histograms: By name.
        title: Above the axes.
        x_label: What is counted, with its unit.
    """
    curves = []
    for name, found in histograms.items():
        total = max(1, sum(found.counts))
        heights = [100 * count / total for count in found.counts]
        # Up and down at each edge: the outline of columns.
        x = [edge for edge in found.edges for _ in "ud"]
        y = [0.0, *(height for height in heights for _ in "lr"), 0.0]
        curves.append(Curve(name=name, x=x, y=y, low=[0.0] * len(y), high=y))
    figure = curve_figure(curves, title=title, x_label=x_label, y_label="pairs, %")
    figure.axes[0].set_ylim(bottom=0)
    return figure


# --- samples and cells ---


def _sample(row: PreferenceRow) -> SampleRow:
    sides = {"chosen": row.chosen, "rejected": row.rejected}
    shown = []
    for side, completion in sides.items():
        text = text_of(completion)
        scores: dict[str, float | int | None] = {"characters": len(text)}
        reward = number_of(row, f"{side}_reward")
        if reward is not None:
            scores["reward"] = reward
        if side == "chosen" and number_of(row, "confidence") is not None:
            scores["confidence"] = number_of(row, "confidence")
        shown.append(Completion(text=text, label=side, scores=scores))
    return SampleRow(prompt=text_of(row.prompt), completions=shown)


def _without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, caption: str, notes: str
) -> Table:
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return Table(
        columns=[columns[i].rstrip() for i in kept],
        rows=[[row[i] for i in kept] for row in rows],
        caption=caption,
        notes=notes,
    )


def _share(share: Share | None) -> Cell:
    """Return `63 [55, 71]`, in per cent."""
    return None if share is None else share_text(share.share, share.low, share.high)


def _decimal(value: float | None, decimals: int) -> Cell:
    return None if value is None else decimal(value, decimals)


def _short(text: str, limit: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit].rstrip()} ..."
