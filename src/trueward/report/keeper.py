"""Figures as files for papers, and as drawings for the page."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from trueward.report.figures import save_figure, settle_layout
from trueward.report.html import FigureHtml, PanelsHtml
from trueward.report.svg import to_svg


class Keeper:
    """Writes figures into a folder, and returns them as the page needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figure(self, name: str, figure: Figure, caption: str) -> FigureHtml:
        """Keep a figure that the page shows as it is."""
        save_figure(settle_layout(figure), self.folder / name)
        return FigureHtml(svg=to_svg(figure), caption=caption)

    def panels(
        self, name: str, figure: Figure, panels: Mapping[str, Figure], caption: str
    ) -> PanelsHtml:
        """Keep a figure of panels, which the page lays out by itself: a phone has one column."""
        save_figure(settle_layout(figure), self.folder / name)
        svgs = {key: to_svg(panel, label=key) for key, panel in panels.items()}
        return PanelsHtml(svgs=svgs, caption=caption)
