"""Figures, and the HTML report of a run or a comparison."""

from trueward.report.comparison import comparison_report, rich_comparison_table
from trueward.report.figures import (
    Curve,
    curve_figure,
    matrix_figure,
    overoptimization_figure,
    peak_and_end_figure,
    reliability_panels,
    save_figure,
)
from trueward.report.html import (
    Completion,
    Details,
    FigureHtml,
    PanelsHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.paper import (
    direction_table,
    multiple_choice_table,
    paper_table,
    win_rate_table,
)
from trueward.report.run import report_run, rich_table
from trueward.report.shift import shift_figure, shift_section, shift_tables
from trueward.report.svg import to_svg

__all__ = [
    "Completion",
    "Curve",
    "Details",
    "FigureHtml",
    "PanelsHtml",
    "SampleRow",
    "Section",
    "Table",
    "comparison_report",
    "curve_figure",
    "direction_table",
    "matrix_figure",
    "multiple_choice_table",
    "overoptimization_figure",
    "paper_table",
    "peak_and_end_figure",
    "reliability_panels",
    "render_report",
    "report_run",
    "rich_comparison_table",
    "rich_table",
    "save_figure",
    "shift_figure",
    "shift_section",
    "shift_tables",
    "to_svg",
    "win_rate_table",
]
