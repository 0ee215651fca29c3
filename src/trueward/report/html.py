"""The HTML report: one file that needs nothing else, set like a paper."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from trueward.report.numbers import (
    Cell,
    column_decimals,
    format_number,
    is_number_column,
    sort_key,
)
from trueward.report.svg import SERIES_DARK, SERIES_LIGHT, with_id_prefix


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under columns; numbers are aligned and sorted as numbers, None is an empty cell.

    A column's name may have several lines, as a page does not break it by itself.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("a table needs at least one column, got none.")
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of a table has {len(row)} cells under {len(self.columns)} "
                    "columns: give one for each, None where there is nothing to say."
                )


@dataclass(frozen=True, kw_only=True)
class FigureHtml:
    """A drawing from `to_svg`, put into the page as it is: never from an untrusted source."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class PanelsHtml:
    """Small drawings under one caption, as many beside each other as the page has room for.

    The names stand above the drawings, as a page can break a long one into lines.
    """

    svgs: Mapping[str, str]  # by name
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion of a sample, with who wrote it and what it was worth to whom."""

    text: str
    label: str = ""
    scores: Mapping[str, float | int | None]


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """A prompt, and its completions to be read side by side."""

    prompt: str
    completions: Sequence[Completion]


@dataclass(frozen=True, kw_only=True)
class Details:
    """What stands behind a line that opens it: terms and their meanings, a table, verbatim text."""

    summary: str
    terms: Mapping[str, str] = field(default_factory=dict)
    table: Table | None = None
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands below it, in this order; a blank line parts paragraphs."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[FigureHtml | PanelsHtml] = ()
    samples: Sequence[SampleRow] = ()
    details: Sequence[Details] = ()


def render_report(
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    preface: Sequence[Details] = (),
    footer: str = "",
) -> str:
    """Return the page as one self-contained HTML file.

    All text is escaped; in prose, `backticks` set code. The figures' ids are made unique.

    Args:
        title: The heading.
        lead: What was found, in one or two sentences.
        sections: The body.
        preface: What may be opened before it (what the words mean).
        footer: A last, small line (versions).
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "number": format_number}
    environment.globals |= {"set_table": _set_table, "set_figure": _set_figure}
    environment.globals["figure_class"] = _figure_class
    source = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        title=title,
        lead=lead,
        sections=sections,
        preface=preface,
        footer=footer,
        series=list(zip(SERIES_LIGHT, SERIES_DARK, strict=True)),
    )


@dataclass(frozen=True)
class _SetCell:
    text: str
    key: str  # what to sort by; empty goes last
    numeric: bool


def _set_table(table: Table) -> dict[str, object]:
    """Return a table's cells as the template needs them: formatted, with their sorting keys."""
    by_column = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    decimals = [column_decimals(cells) for cells in by_column]
    numeric = [is_number_column(cells) for cells in by_column]
    rows = [
        [
            _SetCell(format_number(c, d), sort_key(c, numeric=n), n)
            for c, d, n in zip(row, decimals, numeric, strict=True)
        ]
        for row in table.rows
    ]
    # Rows are named by their first cell, where that is a name.
    return {"rows": rows, "numeric": numeric, "named": not numeric[0]}


def _set_figure(figure: FigureHtml | PanelsHtml, number: int) -> dict[str, object]:
    if isinstance(figure, PanelsHtml):
        return {
            "panels": {
                name: Markup(with_id_prefix(svg, f"figure-{number}-panel-{k}-"))
                for k, (name, svg) in enumerate(figure.svgs.items())
            }
        }
    # A wide one would shrink beyond reading on a phone: it scrolls in its own box.
    width = _width(figure.svg)
    return {
        "svg": Markup(with_id_prefix(figure.svg, f"figure-{number}-")),
        "wide": width > 400,
        "most": round(1.7 * width),  # pixels a point: letters no larger than the page's
    }


def _figure_class(figures: Sequence[FigureHtml | PanelsHtml]) -> str:
    """Return how figures stand together: small ones in more columns, a single one by itself."""
    single = [figure for figure in figures if isinstance(figure, FigureHtml)]
    if single and all(_width(figure.svg) < 300 for figure in single):
        return "small"
    return "alone" if len(single) <= 1 else ""


def _width(svg: str) -> float:
    box = re.search(r'viewBox="[\d.\-]+ [\d.\-]+ ([\d.]+)', svg)
    return float(box[1]) if box else 0.0


def _prose(text: str) -> Markup:
    """Escape; then paragraphs at blank lines, and code between backticks."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text.strip()) if p.strip()]
    return Markup("\n").join(Markup("<p>{}</p>").format(_code(p)) for p in paragraphs)


def _code(text: str) -> Markup:
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(text))))
