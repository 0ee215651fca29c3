"""Figures, and the HTML report of a run or a comparison."""

from trueward.report.figures import (
    Curve,
    bar_figure,
    curve_figure,
    overoptimization_figure,
    reliability_figure,
    save_figure,
    to_svg,
)
from trueward.report.html import (
    Completion,
    Details,
    FigureHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.run import report_run, rich_table

__all__ = [
    "Completion",
    "Curve",
    "Details",
    "FigureHtml",
    "SampleRow",
    "Section",
    "Table",
    "bar_figure",
    "curve_figure",
    "overoptimization_figure",
    "reliability_figure",
    "render_report",
    "report_run",
    "rich_table",
    "save_figure",
    "to_svg",
]
