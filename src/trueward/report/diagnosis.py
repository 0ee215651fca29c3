"""The page and the tables of a diagnosis: what a reward's uncertainty is worth, set by set."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from trueward.evaluate.comparison import Estimate
from trueward.evaluate.diagnosis import QUANTILE_LEVELS, Diagnosis
from trueward.evaluate.verdicts import LABELS, Measured
from trueward.report.figures import (
    Curve,
    curve_figure,
    dots_figure,
    reliability_panels,
    settle_layout,
)
from trueward.report.html import (
    Details,
    FigureHtml,
    PanelsHtml,
    Section,
    Table,
    render_report,
)
from trueward.report.numbers import Cell, decimal
from trueward.report.run import configuration_details, versions_line
from trueward.report.svg import INK, SERIES_LIGHT, to_svg
from trueward.train.run_folder import write_text

BY_REWARD = "the reward itself"
_COLORS = dict(zip(LABELS, SERIES_LIGHT, strict=False))  # by uncertainty
_SHOWN_QUANTILES = {"smallest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "largest": 1.0}
_GLOSSARY = {
    "accuracy": "Share of the pairs in which the chosen completion has the higher reward, ties at "
    "half.",
    "ECE, Brier score": "Expected calibration error, 15 bins: how far the probability "
    "sigmoid(|margin|) that the higher reward is the chosen one lies from how often it is. Brier "
    "score: the mean squared error of sigmoid(margin); 0.25 for a reward that says nothing.",
    "std between members": "How far the members of an ensemble, or the heads of a model, disagree.",
    "members' own std": "What each member states of its own reward, averaged over the members.",
    "total std": "Of a draw from a random member: the two above together.",
    "correlation with error": "Spearman's, of the uncertainty of a pair's margin with "
    "1 − sigmoid(margin); with a wrong order: with 0 or 1 in its place.",
    "AUROC": "Chance that a completion which the data did not cover is more uncertain than the "
    "chosen one it stands beside; 0.5 says nothing.",
    BY_REWARD: "The same asked of the reward: the chance that such a completion has a lower reward "
    "than the chosen one beside it.",
    "spread": "The std between members of a pair's margin over that margin, root mean squares.",
    "own std 90 % / 10 %": "How widely a member's own std varies from completion to completion; "
    "at 1 it is a constant.",
}


def diagnosis_report(
    path: str | Path,
    diagnoses: Mapping[str, Diagnosis],
    *,
    title: str,
    remarks: Mapping[str, Sequence[str]],
    config_text: str,
    environment: Mapping[str, Any],
) -> Path:
    """Write the page of a reward's diagnosis, one file that needs nothing else; return its path.

    Args:
        path: Where to write; its folder is made if it is not there.
        diagnoses: By the name of the preferences.
        title: The page's heading.
        remarks: By the same names, sentences on what was left out and where completions came from.
        config_text: The configuration, shown verbatim.
        environment: Versions and device, as in `environment.json`.
    """
    page = render_report(
        title=title,
        lead=_lead(diagnoses),
        preface=[Details(summary="What the words mean", terms=_GLOSSARY)],
        sections=list(_sections(diagnoses, remarks, config_text, environment)),
        footer=versions_line(environment),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    return target


def result_tables(diagnoses: Mapping[str, Diagnosis]) -> list[Table]:
    """The tables that a terminal and the page begin with; without those that have nothing to say.

    What the reward gets right; how far members differ; whether each uncertainty is larger where the
    reward errs; and how well it, and the reward itself, tells completions outside of the data.
    """
    accuracy = Table(
        columns=["set", "pairs", "accuracy", "ECE", "Brier\nscore", "members"],
        rows=[
            [name, d.pairs, _with_interval(d.accuracy), d.ece, d.brier, d.members]
            for name, d in diagnoses.items()
        ],
        caption="What the reward gets right.",
    )
    found = [_members_table(diagnoses), _error_table(diagnoses), _auroc_table(diagnoses)]
    return [accuracy, *(table for table in found if table is not None)]


def _members_table(diagnoses: Mapping[str, Diagnosis]) -> Table | None:
    columns = [
        *("set", "correlation\nof members", "of their\nerrors", "spread of\nmembers"),
        *("own std\n90 % / 10 %", "gain of the\nnominal one"),
    ]
    rows: list[list[Cell]] = [
        [
            name,
            _two(d.member_correlation),
            _two(d.member_error_correlation),
            _two(d.member_spread),
            _two(d.own_stds.ratio) if d.own_stds is not None else None,
            _with_interval(d.nominal.gain) if d.nominal is not None else None,
        ]
        for name, d in diagnoses.items()
    ]
    if all(cell is None for row in rows for cell in row[1:]):
        return None
    return _without_empty(
        Table(columns=columns, rows=rows, caption="How far members differ, and their own stds.")
    )


def _error_table(diagnoses: Mapping[str, Diagnosis]) -> Table | None:
    rows: list[list[Cell]] = [
        [
            name,
            LABELS[key],
            _with_interval(signal.error_correlation),
            _with_interval(signal.wrong_correlation),
        ]
        for name, found in diagnoses.items()
        for key, signal in found.uncertainties.items()
    ]
    if not rows:
        return None
    return Table(
        columns=["set", "uncertainty", "correlation\nwith error", "with a\nwrong order"],
        rows=rows,
        caption="Whether the uncertainty is larger where the reward errs.",
        notes="Rank correlations; empty where one of the two is constant.",
    )


def _auroc_table(diagnoses: Mapping[str, Diagnosis]) -> Table | None:
    keys = [key for key in LABELS if any(key in d.uncertainties for d in diagnoses.values())]
    rows: list[list[Cell]] = []
    for name, found in diagnoses.items():
        for kind, about in found.out_of_distribution.items():
            signals = [found.uncertainties[k] for k in keys if k in found.uncertainties]
            aurocs = [signal.auroc.get(kind) for signal in signals]
            reward = None if about.preferred is None else 1 - about.preferred
            rows.append([name, kind, *(_two(a.value if a else None) for a in aurocs), _two(reward)])
    if not rows:
        return None
    return Table(
        columns=["set", "kind", *(LABELS[key] for key in keys), BY_REWARD],
        rows=rows,
        caption="AUROC for completions outside of the data.",
        notes="0.5 is chance; below it they look more certain, or better, than the data's own.",
    )


# --- the page ---


def _sections(
    diagnoses: Mapping[str, Diagnosis],
    remarks: Mapping[str, Sequence[str]],
    config_text: str,
    environment: Mapping[str, Any],
) -> Iterator[Section]:
    yield Section(title="Results", tables=result_tables(diagnoses))
    for name, found in diagnoses.items():
        title = "Verdicts" if len(diagnoses) == 1 else f"Verdicts: {name}"
        yield Section(title=title, text="\n\n".join([*found.verdicts, *remarks.get(name, ())]))
    yield _reliability_section(diagnoses)
    for section in (_outside_section(diagnoses), _stds_section(diagnoses)):
        if section is not None:
            yield section
    details = configuration_details(config_text, environment)
    if details:
        yield Section(title="Configuration", details=details)


def _lead(diagnoses: Mapping[str, Diagnosis]) -> str:
    first = next(iter(diagnoses.values()))
    members = "one member" if first.members == 1 else f"{first.members} members"
    stds = "" if first.own_stds is None else ", each with a std of its own"
    stds = stds.replace("each ", "") if first.members == 1 else stds
    pairs = sum(found.pairs for found in diagnoses.values())
    sets = "" if len(diagnoses) == 1 else f" in {len(diagnoses)} sets"
    return f"A reward of {members}{stds}, on {pairs:,} pairs{sets}."


def _reliability_section(diagnoses: Mapping[str, Diagnosis]) -> Section:
    svgs = {}
    for name, found in diagnoses.items():
        remark = f"accuracy {found.accuracy.value:.2f}\nECE {found.ece:.3f}"
        figure = reliability_panels({"": found.reliability_curve}, remarks={"": remark})
        axes = figure.axes[0]  # the higher reward's probability is at least a half
        axes.set_xlim(0.48, 1.02)
        axes.xaxis.set_major_locator(FixedLocator([0.5, 0.75, 1.0]))
        axes.texts[0].set(x=1.0, y=0.28, ha="right", va="bottom")  # between line and columns
        svgs[name] = to_svg(settle_layout(figure), label=f"Reliability: {name}")
    caption = (
        "How often the higher reward was the chosen one against the probability that its margin "
        "stands for; on the dashed diagonal a probability means what it says. Columns: how many "
        "pairs."
    )
    return Section(title="Reliability", figures=[PanelsHtml(svgs=svgs, caption=caption)])


def _outside_section(diagnoses: Mapping[str, Diagnosis]) -> Section | None:
    figures: list[FigureHtml | PanelsHtml] = []
    rows: list[list[Cell]] = []
    for name, found in diagnoses.items():
        figure = auroc_figure(found, title=f"AUROC: {name}")
        if figure is not None:
            caption = (
                "Above the line at 0.5 the uncertainty is higher outside of the data (or the "
                "reward lower); lines are 95\N{NO-BREAK SPACE}% intervals."
            )
            figures.append(FigureHtml(svg=to_svg(settle_layout(figure)), caption=caption))
        for kind, counts in found.out_of_distribution.items():
            rows.append(
                [
                    name,
                    kind,
                    counts.completions,
                    counts.unchanged,
                    counts.overlong,
                    counts.missing,
                    _two(counts.preferred),
                ]
            )
    if not rows:
        return None
    table = Table(
        columns=[
            *("set", "kind", "completions", "the same as\nthe data's"),
            *("longer than\nthe context", "none for\nthe pair", "higher reward\nthan the data's"),
        ],
        rows=rows,
        caption="What the completions outside of the data were.",
        notes="Each stands beside the chosen completion of its pair; the last column is a share.",
    )
    return Section(title="Outside of the data", figures=figures, tables=[table])


def _stds_section(diagnoses: Mapping[str, Diagnosis]) -> Section | None:
    figures: list[FigureHtml | PanelsHtml] = []
    rows: list[list[Cell]] = []
    places = [QUANTILE_LEVELS.index(level) for level in _SHOWN_QUANTILES.values()]
    for name, found in diagnoses.items():
        if not found.uncertainties:
            continue
        figure = curve_figure(
            [
                Curve(name=LABELS[key], x=QUANTILE_LEVELS, y=s.quantiles, color=_COLORS[key])
                for key, s in found.uncertainties.items()
            ],
            title=f"Stds: {name}",
            x_label="share of the completions below",
            y_label="std",
        )
        figure.axes[0].set_ylim(bottom=0)
        caption = "A flat line is a std that is the same for every completion, and says nothing."
        figures.append(FigureHtml(svg=to_svg(settle_layout(figure)), caption=caption))
        for key, signal in found.uncertainties.items():
            rows.append([name, LABELS[key], *(signal.quantiles[i] for i in places)])
    if not rows:
        return None
    table = Table(
        columns=["set", "uncertainty", *_SHOWN_QUANTILES],
        rows=rows,
        caption="How the stds are distributed over single completions of the pairs.",
    )
    return Section(title="How large the stds are", figures=figures, tables=[table])


def auroc_figure(found: Diagnosis, *, title: str) -> Figure | None:
    """Each kind of completion outside of the data with the AUROC of all that could tell it.

    A dot with its interval for each uncertainty, a ring for the reward itself. None without a kind.
    """
    kinds = [k for k, about in found.out_of_distribution.items() if about.completions]
    if not kinds:
        return None
    series = list(found.uncertainties.items())
    figure = dots_figure(
        {kind: Estimate(mean=math.nan) for kind in kinds}, title=title, x_label="AUROC", middle=0.5
    )
    step = 0.8 / (len(series) + 1)  # below each other within a kind's row
    figure.set_figheight((0.14 * len(series) + 0.22) * len(kinds) + 1.2)
    axes = figure.axes[0]
    marks: list[tuple[Line2D, str]] = []
    for i, (key, signal) in enumerate(series):
        mark = {"color": _COLORS[key], "marker": "o", "markersize": 4.0, "linewidth": 0.0}
        for row, kind in enumerate(kinds):
            auroc, place = signal.auroc[kind], row + (i - len(series) / 2) * step
            axes.plot([auroc.value], [place], **mark)  # type: ignore[arg-type]
            axes.hlines(place, auroc.low, auroc.high, color=_COLORS[key], linewidth=1.2)
        marks.append((Line2D([], [], **mark), LABELS[key]))  # type: ignore[arg-type]
    ring = {"color": INK, "marker": "o", "markersize": 4.5, "linewidth": 0.0, "fillstyle": "none"}
    for row, kind in enumerate(kinds):
        preferred = found.out_of_distribution[kind].preferred
        assert preferred is not None
        axes.plot([1 - preferred], [row + len(series) / 2 * step], **ring)  # type: ignore[arg-type]
    marks.append((Line2D([], [], **ring), BY_REWARD))  # type: ignore[arg-type]
    axes.set_xlim(-0.03, 1.03)
    figure.legend(
        *zip(*marks, strict=True),
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure


# --- cells ---


def _without_empty(table: Table) -> Table:
    kept = [i for i in range(len(table.columns)) if any(row[i] is not None for row in table.rows)]
    return replace(
        table,
        columns=[table.columns[i] for i in kept],
        rows=[[row[i] for i in kept] for row in table.rows],
    )


def _two(value: float | None) -> Cell:
    return None if value is None else decimal(value, 2)


def _with_interval(measured: Measured | None) -> Cell:
    """Return `0.61 [0.55, 0.67]`."""
    if measured is None:
        return None
    value, low, high = (decimal(v, 2) for v in (measured.value, measured.low, measured.high))
    return f"{value} [{low}, {high}]"
