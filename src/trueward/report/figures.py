"""Figures for papers and for the HTML report, drawn without pyplot's global state."""

import hashlib
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.scale import FuncScale
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from trueward.evaluate.calibration import ReliabilityCurve

Scale = Literal["linear", "sqrt", "log"]
Numbers = Sequence[float | int]

# Told apart by the colour-blind (after Okabe and Ito, and Tol); at least 3:1 on either page.
SERIES_LIGHT = (
    "#0072b2",
    "#d55e00",
    "#00896a",
    "#a8518a",
    "#957000",
    "#6b6b6b",
    "#3a93c8",
    "#7a2048",
)
SERIES_DARK = (
    "#5aa9e6",
    "#f08a3c",
    "#36b893",
    "#d88bbd",
    "#cfa93a",
    "#a9a6a0",
    "#8fcdf2",
    "#d4768f",
)
INK = "#1d1c1a"  # what becomes `currentColor`: no series may have it
INK_DARK = "#e7e4de"
_QUIET = 0.7  # opacity of tick labels and axes
_GRID = 0.12
_TEXT, _SMALL = 9.5, 8.5  # points
KL_LABEL = "KL from the reference policy (nats)"
_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.2, "linewidth": 0}
_DIAMOND = {"marker": "D", "markersize": 5.5, **_HOLLOW}
_RING = {"marker": "o", "markersize": 7, **_HOLLOW}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line, with a band from `low` to `high` where both are given; NaN breaks the line."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False
    color: str | None = None  # any matplotlib colour; None takes the next of the palette

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(
                f"curve {self.name!r} must have as many x as y, got {len(self.x)} and "
                f"{len(self.y)} values."
            )
        if (self.low is None) != (self.high is None):
            raise ValueError(f"curve {self.name!r} has one end of its band: give low and high.")
        for side, values in (("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.y):
                raise ValueError(
                    f"curve {self.name!r} must have as many {side} as y, got {len(values)} and "
                    f"{len(self.y)} values."
                )
        if self.color is not None and not is_color_like(self.color):
            raise ValueError(
                f"curve {self.name!r} has color={self.color!r}, which is no colour: give a name "
                "such as 'teal' or a hex code such as '#0072b2'."
            )


Law = tuple[Curve, tuple[float, float] | None]  # a fitted curve, and the peak that it predicts


def curve_figure(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    peaks: bool = False,
    marked: bool = False,
    size: tuple[float, float] = (4.5, 3.2),
) -> Figure:
    """All curves on one pair of axes, with a legend below where there are two or more.

    Args:
        curves: In the order of the legend.
        title: Above the axes.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        x_scale: How x is stretched.
        peaks: Whether a dot marks each curve's highest point.
        marked: Whether small dots mark all points: of few, that lines only join.
        size: Width and height in inches; text is 8 to 11 points on any. `legend_height` says how
            much of it a long legend takes.
    """
    _require_curves(curves)
    figure = _figure(width=size[0], height=size[1])
    axes = figure.add_subplot()
    _dress(axes, title=title, x_label=x_label, y_label=y_label)
    for index, curve in enumerate(curves):
        color = _series_color(curve, index)
        _draw(axes, curve, color)
        if peaks:
            _mark_peak(axes, curve, color)
        if marked:
            axes.plot(curve.x, curve.y, color=color, marker="o", markersize=4, linewidth=0)
    _set_x_scale(axes, curves, x_scale)
    if len(curves) > 1:
        entries = [(c.name, _series_color(c, i), c.dashed) for i, c in enumerate(curves)]
        _legend(figure, [_legend_line(*entry) for entry in entries])
    return figure


def overoptimization_figure(
    methods: Mapping[str, tuple[Curve, Curve | None]],
    *,
    title: str,
    x_label: str = KL_LABEL,
    y_label: str = "reward",
    x_scale: Scale = "sqrt",
    panels: bool = False,
    laws: Mapping[str, Law] | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    legend: bool = True,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Gold (solid) and proxy (dashed) reward of each method against the square root of the KL.

    The dot is gold's highest point: beyond it, more of the proxy is less of what is wanted. Drawn
    against `sqrt(KL)` as in Gao et al. 2022, Fig. 1 (https://arxiv.org/abs/2210.10760).

    Args:
        methods: From the method's name to its gold and (where known) its proxy curve.
        title: Of the whole figure.
        x_label: What the curves' x is.
        y_label: What their y is.
        x_scale: How x is stretched.
        panels: One small panel for each method on common axes, instead of all methods on one.
        laws: A law fitted to a method's gold (dotted), with the peak that it predicts (a diamond)
            where that lies within the axes.
        x_range: Both ends of the x axis; None fits them to the curves. With `y_range`, figures of
            their own can be compared like panels.
        y_range: Both ends of the y axis; what lies beyond is cut.
        legend: Whether a legend below says what is what.
        size: Width and height in inches; None fits them to the panels.
    """
    pairs = [[c for c in pair if c is not None] for pair in methods.values()]
    everything = [c for pair in pairs for c in pair]
    _require_curves(everything)
    columns = min(3, len(pairs)) if panels else 1
    rows = math.ceil(len(pairs) / columns) if panels else 1
    wide = columns > 1
    laws = laws or {}
    fitting = (2.6 * columns if wide else 4.5, 2.2 * rows + 0.9 if rows * columns > 1 else 3.2)
    figure = _figure(width=(size or fitting)[0], height=(size or fitting)[1])
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for index, (name, (gold, proxy)) in enumerate(methods.items()):
        axes = grid[index if panels else 0]
        color = gold.color or SERIES_LIGHT[index % len(SERIES_LIGHT)]
        if proxy is not None:
            _draw(axes, proxy, color, dashed=True)
        _draw(axes, gold, color, dashed=False)
        if name in laws:
            _draw_law(axes, laws[name], color)
        _mark_peak(axes, gold, color)
        if panels:
            last = index + columns >= len(pairs)  # of its column
            _dress(
                axes,
                title=_wrapped(name, 27) if wide else name,
                x_label=x_label if last else "",
                y_label=y_label if index % columns == 0 else "",
                weight="normal",
            )
            axes.xaxis.label.set_size(_SMALL)
            axes.tick_params(labelbottom=last)
    for axes in grid[len(pairs) if panels else 1 :]:
        axes.set_visible(False)
    ends = [] if x_range is None else [Curve(name="", x=x_range, y=x_range)]
    small = figure.get_figwidth() / columns < 3.5
    _set_x_scale(grid[0], ends or everything, x_scale, ticks=3 if small else 6)
    if x_range is not None:
        grid[0].set_xlim(*x_range)
    if y_range is not None:
        grid[0].set_ylim(*y_range)
    if panels:
        _head(figure, title)
    else:
        _dress(grid[0], title=title, x_label=x_label, y_label=y_label)
    if legend:
        _overoptimization_legend(figure, methods, named=not panels, fitted=bool(laws))
    return figure


def peak_and_end_figure(
    names: Sequence[str],
    *,
    peaks: Numbers,
    ends: Numbers,
    low: Numbers,
    high: Numbers,
    title: str,
    x_label: str,
    colors: Sequence[str] | None = None,
    reference: float | int | None = None,
) -> Figure:
    """Where each curve peaked (a ring) and where it ended (a dot), with the drop between them.

    Args:
        names: One for each row, from the top down.
        peaks: The highest values.
        ends: The last values.
        low: Lower ends of the last values' intervals; NaN draws none.
        high: Their upper ends.
        title: Of the figure.
        x_label: What the values are.
        colors: One for each row; the palette's first by default.
        reference: Where to draw a line to compare with (the start).
    """
    Curve(name=title, x=peaks, y=ends, low=low, high=high)  # checks the lengths
    if not names or len(names) != len(ends):
        raise ValueError(
            f"there must be a name for each peak and end, got {len(names)} and {len(ends)}."
        )
    figure = _figure(height=1.1 + 0.34 * len(names))
    _head(figure, title)
    axes = figure.add_subplot()
    _dress(axes, title="", x_label=x_label, y_label="", grid="x")
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, dashes=(4, 3), alpha=_QUIET)
    drawn = colors or [SERIES_LIGHT[0]] * len(names)
    rows = zip(peaks, ends, low, high, drawn, strict=True)
    for place, (peak, end, bottom, top, color) in enumerate(rows):
        axes.hlines(place, min(peak, end), max(peak, end), color=color, linewidth=4, alpha=0.3)
        axes.hlines(place, bottom, top, color=color, linewidth=1.1)
        axes.plot([peak], [place], color=color, **_RING)
        axes.plot([end], [place], color=color, marker="o", markersize=4.5, linewidth=0)
        drop = f"{end - peak:.2f}".replace("-", "\N{MINUS SIGN}") if end < peak else "0"
        if math.isfinite(peak - end):
            _beside(axes, drop, place)
    _beside(axes, "drop", -0.9)
    axes.set_yticks(
        range(len(names)), [_plain(_wrapped(n, 28)) for n in names], color=INK, alpha=1.0
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    marks = [
        (Line2D([], [], color=INK, **_RING), "peak"),
        (Line2D([], [], color=INK, marker="o", markersize=4.5, lw=0), "end"),
    ]
    _legend(figure, marks)
    return figure


def matrix_figure(
    names: Sequence[str], values: Sequence[Numbers], *, title: str, middle: float = 0.5
) -> Figure:
    """Shares between 0 and 1 of each row against each column, in per cent, as a heat map.

    Blue lies above `middle`, orange below, the stronger the further. The shades are opacities of
    at most a half, so that the numbers are legible on any page; NaN is an empty cell.

    Args:
        names: Of the rows; columns are called by the row's number.
        values: A row of shares for each name.
        title: Of the figure.
        middle: The share without a shade.
    """
    count = len(names)
    if not count or len(values) != count or any(len(row) != count for row in values):
        raise ValueError(f"a matrix needs {count} rows and columns for its names, got another.")
    labels = [_plain(_wrapped(f"{i}  {name}", 30)) for i, name in enumerate(names, start=1)]
    longest = max(len(line) for label in labels for line in label.splitlines())
    cell = 0.32
    figure = _figure(width=max(3.0, cell * count + 0.07 * longest + 0.3), height=cell * count + 0.8)
    axes = figure.add_subplot()
    _head(figure, title)
    _dress(axes, title="", x_label="", y_label="")
    axes.grid(visible=False)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if math.isnan(value):
                continue
            away = (value - middle) / max(middle, 1 - middle)
            color = SERIES_LIGHT[0 if away > 0 else 1]
            shade = 0.5 * min(abs(away), 1.0)
            axes.add_patch(
                Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, color=color, alpha=shade, linewidth=0)
            )
            text = "\N{MIDDLE DOT}" if i == j else f"{100 * value:.0f}"
            axes.text(j, i, text, ha="center", va="center", size=_SMALL, color=INK)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks(range(count), labels)
    axes.set_xticks(range(count), [str(i + 1) for i in range(count)])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def bar_figure(
    names: Sequence[str],
    values: Numbers,
    *,
    low: Numbers | None = None,
    high: Numbers | None = None,
    title: str,
    x_label: str,
    reference: float | int | None = None,
    colors: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars from zero, each with its value and, where given, its interval.

    Args:
        names: One for each bar, from the top down.
        values: How long the bars are.
        low: Lower ends of the intervals.
        high: Their upper ends.
        title: Of the figure.
        x_label: What the values are.
        reference: Where to draw a line to compare with (chance, a baseline).
        colors: One for each bar; the palette's first by default.
    """
    bars = Curve(name=title, x=range(len(names)), y=values, low=low, high=high)
    if not names:
        raise ValueError("a bar figure needs at least one bar, got none.")
    figure = _figure(height=0.75 + 0.3 * len(names))
    axes = figure.add_subplot()
    _dress(axes, title=title, x_label=x_label, y_label="", grid="x")
    drawn = colors or [SERIES_LIGHT[0]] * len(names)
    axes.barh(bars.x, bars.y, height=0.62, color=drawn, alpha=0.85, linewidth=0)
    ends = list(bars.y)
    largest = max((abs(v) for v in bars.y if math.isfinite(v)), default=0.0) or 1.0
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), 4)
    if bars.low is not None and bars.high is not None:
        axes.hlines(bars.x, bars.low, bars.high, color=INK, linewidth=1.2)
        ends = [max(pair) for pair in zip(bars.high, bars.y, strict=True)]
    for place, (end, value) in enumerate(zip(ends, bars.y, strict=True)):
        if math.isfinite(value) and math.isfinite(end):
            axes.annotate(
                f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}"),
                (max(end, 0.0), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=_SMALL,
                color=INK,
            )
    axes.set_yticks(list(bars.x), [_plain(name) for name in names], color=INK, alpha=1.0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=_QUIET)
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, dashes=(4, 3), alpha=_QUIET)
    axes.spines["left"].set_visible(False)
    return figure


def reliability_figure(
    curve: ReliabilityCurve,
    *,
    title: str = "Reliability",
    x_label: str = "stated probability",
    y_label: str = "observed frequency",
) -> Figure:
    """Observed frequency against stated probability, above how many examples each bin holds.

    On the dashed diagonal a probability means what it says; below it the model is too sure.
    """
    full = curve.count > 0
    confidence, frequency = curve.confidence[full].tolist(), curve.frequency[full].tolist()
    if not confidence:
        raise ValueError("a reliability figure needs at least one example, got empty bins only.")
    width = 1.0 / len(curve.centres)
    figure = _figure(height=4.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _dress(above, title=title, x_label="", y_label=y_label)
    _dress(below, title="", x_label=x_label, y_label="examples")
    above.plot([0, 1], [0, 1], color=INK, linewidth=0.8, dashes=(4, 3), alpha=_QUIET)
    above.plot(
        confidence, frequency, color=SERIES_LIGHT[0], linewidth=1.6, marker="o", markersize=4
    )
    below.bar(
        curve.centres[full].tolist(),
        curve.count[full].tolist(),
        width=width * 0.86,
        color=SERIES_LIGHT[0],
        alpha=0.5,
        linewidth=0,
    )
    # Of two sides the likelier has at least 1/2: half of the axis would stay empty.
    first = 0.5 if float(curve.centres[full].min()) > 0.5 else 0.0
    below.set_xlim(first - 0.01, 1.01)
    above.set_ylim(min(first, *frequency) - 0.02, 1.02)
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    figure.align_ylabels()
    return figure


def reliability_panels(
    curves: Mapping[str, ReliabilityCurve],
    *,
    title: str = "",
    remarks: Mapping[str, str] | None = None,
    x_label: str = "stated probability",
    y_label: str = "observed frequency",
) -> Figure:
    """A small panel for each curve: frequency against probability, above the share of each bin.

    Args:
        curves: From the reward's name to its curve.
        title: Of the whole figure; empty for none.
        remarks: What is written into a panel's corner (accuracy, calibration error).
        x_label: What x is.
        y_label: What y is.
    """
    if not curves:
        raise ValueError("reliability panels need at least one curve, got none.")
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _figure(width=2.8 * columns, height=2.5 * rows + 0.3 * bool(title))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for index, (name, curve) in enumerate(curves.items()):
        axes, last = grid[index], index + columns >= len(curves)
        _dress(
            axes,
            title=_wrapped(name, 28),
            x_label=x_label if last else "",
            y_label=y_label if index % columns == 0 else "",
            weight="normal",
        )
        axes.tick_params(labelbottom=last)
        _draw_reliability(axes, curve)
        remark = (remarks or {}).get(name, "")
        axes.text(0.03, 0.97, _plain(remark), ha="left", va="top", size=_SMALL, color=INK)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    if title:
        _head(figure, title)
    return figure


def settle_layout(figure: Figure) -> Figure:
    """Place everything once and for all: each of several outputs would place it anew, slowly."""
    with _output_settings():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def save_figure(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write PNG (200 dots per inch) and PDF side by side; return where.

    A suffix `.png` or `.pdf` of `path` is replaced, any other dot is part of the name. The same
    figure gives the same bytes.
    """
    base = Path(path)
    if base.suffix in (".png", ".pdf"):
        base = base.with_suffix("")
    base.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = base.with_name(base.name + ".png"), base.with_name(base.name + ".pdf")
    with _output_settings():
        figure.savefig(png, dpi=200, facecolor="white", metadata={"Software": None})
        dates = {"CreationDate": None, "ModDate": None}
        figure.savefig(pdf, facecolor="white", metadata=dates)
    return png, pdf


def to_svg(
    figure: Figure, *, theme: Literal["light", "dark"] = "light", label: str | None = None
) -> str:
    """Return an `<svg>` to put into a page or a file: transparent, self-contained, deterministic.

    Text and axes are `currentColor`, set from the page's `--figure-ink`, and the palette's colours
    are `--figure-series-1` ... `-8`, so that one SVG serves both themes of a page that defines
    them. `theme` says which colours hold where nothing does (a file on its own), `label` what the
    drawing is to those who do not see it (its title by default). Ids that are referred to begin
    with a digest of the drawing, the others are dropped.
    """
    out = StringIO()
    with _output_settings():
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    _strip(root)
    colors = _color_names(theme)
    for element in root.iter():
        _rewrite(element, colors)
    ink = INK if theme == "light" else INK_DARK
    width, height = root.attrib["viewBox"].split()[2:]
    titles = [a.get_title(loc="left") for a in figure.axes]
    title = label or figure.get_suptitle() or next((t for t in titles if t), "figure")
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "width": f"{float(width):g}",
        "height": f"{float(height):g}",
        "role": "img",
        "aria-label": title.replace(r"\$", "$").replace("\n", " "),
        # As a style element (matplotlib's way) these would hold for the whole page.
        "style": f"color: var(--figure-ink, {ink}); stroke-linejoin: round; stroke-linecap: butt",
    }
    svg = ElementTree.tostring(root, encoding="unicode")
    return with_id_prefix(svg, "f" + hashlib.sha256(svg.encode()).hexdigest()[:8] + "-")


def with_id_prefix(svg: str, prefix: str) -> str:
    """Return the SVG with `prefix` before every id and every reference to one."""
    svg = re.sub(r'(<[^<>]*?\sid=")', rf"\g<1>{prefix}", svg)
    return re.sub(r'(\shref="#|url\(#)', rf"\g<1>{prefix}", svg)


def sqrt_ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """Round numbers (1, 2, 3, 5 x 10^k) about evenly apart in the square root, and zero."""
    reach = math.sqrt(max(high, -low, 0.0))
    if reach == 0:
        return [0.0]
    ticks, gap = [0.0], reach / (count + 2)
    for power in range(math.floor(math.log10(gap**2)), math.floor(math.log10(reach**2)) + 1):
        for digit in (1, 2, 3, 5):
            # From text, as 3 * 10.0**-1 is not quite 0.3.
            value = float(f"{digit}e{power}")
            if value <= reach**2 * (1 + 1e-9) and math.sqrt(value) - math.sqrt(ticks[-1]) >= gap:
                ticks.append(value)
    both = [-t for t in reversed(ticks[1:])] + ticks
    return [t for t in both if low <= t <= high * (1 + 1e-9) or t == 0]


# --- drawing ---


def _figure(*, width: float = 4.5, height: float = 3.2) -> Figure:
    """Start a figure narrow enough that its text stays readable when a phone shows it whole."""
    return Figure(figsize=(width, height), layout="constrained")


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(_plain(title), x=0.01, ha="left", size=_TEXT + 1, weight="bold", color=INK)


def _dress(
    axes: Axes,
    *,
    title: str,
    x_label: str,
    y_label: str,
    weight: str = "bold",
    grid: Literal["x", "y"] = "y",
) -> None:
    axes.set_title(_plain(title), loc="left", size=_TEXT + 1, weight=weight, color=INK)
    axes.set_xlabel(_plain(x_label), size=_TEXT, color=INK)
    axes.set_ylabel(_plain(y_label), size=_TEXT, color=INK)
    axes.tick_params(labelsize=_SMALL, colors=INK, length=3, width=0.6, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=INK, linewidth=0.6, alpha=_QUIET)
    axes.grid(axis=grid, color=INK, alpha=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw(axes: Axes, curve: Curve, color: str, *, dashed: bool | None = None) -> None:
    dash = curve.dashed if dashed is None else dashed
    if curve.low is not None and curve.high is not None:
        axes.fill_between(
            np.asarray(curve.x, dtype=float),
            np.asarray(curve.low, dtype=float),
            np.asarray(curve.high, dtype=float),
            color=color,
            alpha=0.16,
            linewidth=0,
        )
    axes.plot(
        curve.x,
        curve.y,
        color=color,
        linewidth=1.3 if dash or len(curve.y) > 100 else 1.7,  # many steps are noisy
        linestyle=(0, (4, 2.2)) if dash else "-",
        # A line of one point cannot be seen, and few points should show where they are.
        marker="o" if len(curve.y) <= 2 else None,
        markersize=3.5,
    )


def _mark_peak(axes: Axes, gold: Curve, color: str) -> None:
    known = [(y, x) for x, y in zip(gold.x, gold.y, strict=True) if math.isfinite(y)]
    if known:
        y, x = max(known, key=lambda point: (point[0], -point[1]))
        axes.plot([x], [y], marker="o", markersize=6.5, color=color, linewidth=0, clip_on=False)


def _draw_law(axes: Axes, law: Law, color: str) -> None:
    curve, peak = law
    dots = (0, (1, 1.6))
    axes.plot(curve.x, curve.y, color=INK, linewidth=1.0, linestyle=dots, alpha=0.9, zorder=2.5)
    if peak is not None:
        axes.plot([peak[0]], [peak[1]], color=color, **_DIAMOND)


def _draw_reliability(axes: Axes, curve: ReliabilityCurve) -> None:
    """Draw a panel's line over the bins' shares, the fullest bin a quarter of its height."""
    full = curve.count > 0
    centres, counts = curve.centres[full].tolist(), curve.count[full].tolist()
    most = max(counts, default=1)
    axes.bar(
        centres,
        [0.25 * c / most for c in counts],
        width=0.86 / len(curve.centres),
        color=SERIES_LIGHT[0],
        alpha=0.22,
        linewidth=0,
    )
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, dashes=(4, 3), alpha=_QUIET)
    axes.plot(
        curve.confidence[full].tolist(),
        curve.frequency[full].tolist(),
        color=SERIES_LIGHT[0],
        linewidth=1.5,
        marker="o",
        markersize=3.5,
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0, 0.5, 1]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _beside(axes: Axes, text: str, row: float | int) -> None:
    """Write into a column right of the axes."""
    axes.annotate(
        text,
        (1.0, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(30, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        size=_SMALL,
        color=INK,
        annotation_clip=False,
    )


def _set_x_scale(axes: Axes, curves: Sequence[Curve], scale: Scale, *, ticks: int = 6) -> None:
    found = [float(x) for c in curves for x in c.x if math.isfinite(x)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    if scale == "log":
        if low <= 0:
            raise ValueError(f"a log scale needs x above 0, got {low}: take 'sqrt' or 'linear'.")
        axes.set_xscale("log")
        if len(set(found)) <= 8:  # as of best-of-n: say which
            axes.xaxis.set_major_locator(FixedLocator(sorted(set(found))))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    elif scale == "sqrt":
        # Signed, as an estimate of the KL (k1) may lie below zero.
        axes.set_xscale(
            FuncScale(
                axes.xaxis,
                (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda r: np.sign(r) * np.square(r)),
            )
        )
        axes.xaxis.set_major_locator(FixedLocator(sqrt_ticks(low, high, count=ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:g}".replace("-", "\N{MINUS SIGN}"))
        )
    elif scale == "linear":
        whole = all(x.is_integer() for x in found)  # there is no step 1.5
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=whole))
    else:
        raise ValueError(f"x_scale must be 'linear', 'sqrt' or 'log', got {scale!r}.")


Entry = tuple[Line2D, str]


def legend_height(names: Sequence[str], *, width: float = 4.5) -> float:
    """Return how many inches a legend of these names takes below a figure of this width."""
    labels, columns = _legend_layout(names, width)
    lines = max(label.count("\n") + 1 for label in labels) if labels else 0
    return 0.17 * lines * math.ceil(len(labels) / columns)


def _legend_layout(names: Sequence[str], width: float) -> tuple[list[str], int]:
    """Return the labels, wrapped where they would leave the figure, and how many stand abreast."""
    room = width * 12  # characters that fit beside each other
    labels = [_plain(_wrapped(name, int(room) - 6)) for name in names]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    return labels, max(1, min(len(labels), int(room / (longest + 6))))


def _legend_line(name: str, color: str, dashed: bool) -> Entry:
    line = Line2D([], [], color=color, linewidth=1.7, linestyle=(0, (3, 1.6)) if dashed else "-")
    return line, name


def _legend(figure: Figure, entries: Sequence[Entry]) -> None:
    labels, columns = _legend_layout([name for _, name in entries], figure.get_figwidth())
    legend = figure.legend(
        [handle for handle, _ in entries],
        ["."] * len(entries),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=_SMALL,
        labelcolor=INK,
        handlelength=1.8,
        columnspacing=1.4,
        borderpad=0.2,
    )
    # Set afterwards, as a legend leaves out labels that begin with an underscore.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def _overoptimization_legend(
    figure: Figure,
    methods: Mapping[str, tuple[Curve, Curve | None]],
    *,
    named: bool,
    fitted: bool,
) -> None:
    entries: list[Entry] = []
    if named and len(methods) > 1:
        entries = [
            _legend_line(name, gold.color or SERIES_LIGHT[i % len(SERIES_LIGHT)], False)
            for i, (name, (gold, _)) in enumerate(methods.items())
        ]
    proxies = any(proxy is not None for _, proxy in methods.values())
    if proxies or fitted:
        entries.append(_legend_line("gold reward", INK, False))
    if proxies:
        entries.append(_legend_line("proxy reward", INK, True))
    if fitted:
        law = Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (1, 1.6)))
        entries += [(law, "fitted law"), (Line2D([], [], color=INK, **_DIAMOND), "its peak")]
    if entries:
        _legend(figure, entries)


def _series_color(curve: Curve, index: int) -> str:
    return curve.color or SERIES_LIGHT[index % len(SERIES_LIGHT)]


def _require_curves(curves: Sequence[Curve]) -> None:
    if not any(math.isfinite(y) for curve in curves for y in curve.y):
        raise ValueError(
            f"a figure needs at least one finite value, {len(curves)} curves have none."
        )


def _wrapped(text: str, characters: int) -> str:
    """Break a long name into at most two lines, the second cut with an ellipsis if need be."""
    lines = textwrap.wrap(text, characters)
    if len(text) <= characters or not lines:
        return text
    if len(lines) > 2:
        lines[1] = lines[1][: characters - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return "\n".join(lines[:2])


def _plain(text: str) -> str:
    """Keep two dollar signs in a name from becoming a formula."""
    return text.replace("$", r"\$")


# --- output ---


@contextmanager
def _output_settings() -> Iterator[None]:
    """Apply what matplotlib reads from its settings alone: text as text, ids from the drawing."""
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trueward", "pdf.fonttype": 42}),
        warnings.catch_warnings(),
    ):
        # The reader's browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


_XLINK = "{http://www.w3.org/1999/xlink}href"


def _strip(root: ElementTree.Element) -> None:
    """Take away what refers outside, holds for the whole page or is of no use in it."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if _XLINK in element.attrib:
            element.set("href", element.attrib.pop(_XLINK))
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if element.tag != "text":
            element.text = None
        element.tail = None
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style") or (child.tag == "defs" and not len(child)):
                parent.remove(child)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', ElementTree.tostring(root, "unicode")))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _color_names(theme: Literal["light", "dark"]) -> dict[str, str]:
    fallback = SERIES_LIGHT if theme == "light" else SERIES_DARK
    names = {INK: "currentColor", "#000000": "currentColor"}
    for index, (color, own) in enumerate(zip(SERIES_LIGHT, fallback, strict=True)):
        names[color] = f"var(--figure-series-{index + 1}, {own})"
    return names


def _rewrite(element: ElementTree.Element, colors: Mapping[str, str]) -> None:
    """Name the colours, and let the page choose the typeface."""
    style = element.get("style", "")
    if element.tag == "text":
        style = re.sub(
            r"font-family: [^;]+", "font-family: var(--figure-font, system-ui, sans-serif)", style
        )
        if "fill:" not in style:
            style += "; fill: currentColor"
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    style = re.sub(r"#[0-9a-f]{6}\b", lambda found: colors.get(found[0], found[0]), style)
    if style:
        element.set("style", style)
