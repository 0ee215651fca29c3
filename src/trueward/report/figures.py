"""Figures for papers and for the HTML report, drawn without pyplot's global state."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.scale import FuncScale
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from trueward.evaluate.calibration import ReliabilityCurve
from trueward.evaluate.comparison import Estimate
from trueward.report.numbers import decimal, format_number
from trueward.report.svg import INK, SERIES_LIGHT, output_settings

Scale = Literal["linear", "sqrt", "log"]
Numbers = Sequence[float | int]

_QUIET = 0.7  # opacity of tick labels and axes
_GRID = 0.12
_TEXT, _SMALL = 9.5, 8.5  # points
_LONG_LEGEND = 6  # entries that may stand below each other
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


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at one place of a curve."""

    name: str
    x: float | int
    style: Literal["solid", "dashed", "dotted"]


def marked_figure(
    panels: Mapping[str, tuple[Curve, Sequence[Mark]]], *, title: str, x_label: str, y_label: str
) -> Figure:
    """Curves with vertical marks, each in a panel of its own, three beside each other.

    Args:
        panels: By name, which stands above each where there are several.
        title: Of the figure; empty for none.
        x_label: What x is.
        y_label: What y is.
    """
    _require_curves([curve for curve, _ in panels.values()])
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (2.6 * columns if columns > 1 else 4.5, 2.0 * rows + 0.9 if len(panels) > 1 else 3.2)
    figure = _figure(width=size[0], height=size[1])
    if title:
        _head(figure, title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    several = len(panels) > 1
    for index, (name, (curve, marks)) in enumerate(panels.items()):
        axes = grid[index]
        color = _series_color(curve, 0)
        _draw(axes, curve, color)
        for mark in marks:
            axes.axvline(mark.x, color=INK, linewidth=1.1, linestyle=mark.style, alpha=0.85)
        _dress(
            axes,
            title=name if several else "",
            x_label=x_label if index + columns >= len(panels) else "",
            y_label=y_label if index % columns == 0 else "",
            weight="normal",
        )
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    known = {mark.name: mark.style for _, marks in panels.values() for mark in marks}
    lines = [(Line2D([], [], color=INK, lw=1.1, ls=style), name) for name, style in known.items()]
    if lines:
        _legend(figure, lines)
    return figure


def peak_and_end_figure(
    names: Sequence[str],
    *,
    peaks: Numbers,
    ends: Numbers,
    drops: Numbers,
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
        drops: How far each fell, written beside its row; NaN where the end is the peak.
        low: Lower ends of the lines through the last values; NaN draws none.
        high: Their upper ends.
        title: Of the figure.
        x_label: What the values are.
        colors: One for each row; the palette's first by default.
        reference: Where to draw a line to compare with (the start).
    """
    Curve(name=title, x=peaks, y=ends, low=low, high=high)  # checks the lengths
    if not names or not len(names) == len(ends) == len(drops):
        raise ValueError(
            f"there must be a name and a drop for each peak and end, got {len(names)} and "
            f"{len(drops)} for {len(ends)}."
        )
    figure = _figure(height=1.1 + 0.34 * len(names))
    _head(figure, title)
    axes = figure.add_subplot()
    _dress(axes, title="", x_label=x_label, y_label="", grid="x")
    if reference is not None:
        axes.axvline(reference, color=INK, linewidth=0.8, dashes=(4, 3), alpha=_QUIET)
    drawn = colors or [SERIES_LIGHT[0]] * len(names)
    rows = zip(peaks, ends, drops, low, high, drawn, strict=True)
    for place, (peak, end, drop, bottom, top, color) in enumerate(rows):
        axes.hlines(place, min(peak, end), max(peak, end), color=color, linewidth=4, alpha=0.3)
        axes.hlines(place, bottom, top, color=color, linewidth=1.1)
        axes.plot([peak], [place], color=color, **_RING)
        axes.plot([end], [place], color=color, marker="o", markersize=4.5, linewidth=0)
        _beside(axes, format_number(decimal(drop, 2)), place)
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


def dots_figure(
    estimates: Mapping[str, Estimate], *, title: str, x_label: str, middle: float
) -> Figure:
    """A dot with its interval for each name, one below the other, beside a line at `middle`.

    Args:
        estimates: From the name to its estimate, top to bottom.
        title: Of the figure.
        x_label: What x is.
        middle: Where nothing is gained or said.
    """
    return several_dots_figure({"": estimates}, title=title, x_label=x_label, middle=middle)


def several_dots_figure(
    series: Mapping[str, Mapping[str, Estimate]], *, title: str, x_label: str, middle: float
) -> Figure:
    """Dots with their intervals for each name, a colour for each series; see `dots_figure`.

    Args:
        series: From its name to the estimates by theirs; the first one's names are the rows, in
            which the dots of all series stand a little apart.
        title: Of the figure.
        x_label: What x is.
        middle: Where nothing is gained or said.
    """
    names = list(next(iter(series.values()), {}))
    if not names:
        raise ValueError("a figure of dots needs at least one estimate, got none.")
    figure = _figure(width=4.5, height=(0.22 + 0.04 * len(series)) * len(names) + 0.9)
    axes = figure.add_subplot()
    _head(figure, title)
    _dress(axes, title="", x_label=x_label, y_label="", grid="x")
    axes.axvline(middle, color=INK, linewidth=0.8, alpha=_QUIET)
    look: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}
    for i, estimates in enumerate(series.values()):
        apart = 0.22 * (i - (len(series) - 1) / 2)
        for place, name in enumerate(names):
            estimate = estimates.get(name, Estimate(mean=math.nan))
            half = 0.0 if math.isnan(estimate.half_width) else estimate.half_width
            axes.errorbar(estimate.mean, place + apart, xerr=half, color=SERIES_LIGHT[i], **look)
    axes.set_yticks(range(len(names)), [_plain(_wrapped(name, 34)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    if len(series) > 1:
        marks = [Line2D([], [], color=SERIES_LIGHT[i], **look) for i in range(len(series))]
        _legend(figure, list(zip(marks, series, strict=True)))
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
    with output_settings():
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
    with output_settings():
        figure.savefig(png, dpi=200, facecolor="white", metadata={"Software": None})
        dates = {"CreationDate": None, "ModDate": None}
        figure.savefig(pdf, facecolor="white", metadata=dates)
    return png, pdf


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
    """Return the labels, wrapped where they would leave the figure, and how many stand abreast.

    Many stand in two columns at least: one would be taller than the axes.
    """
    room = width * 13.4  # characters that fit beside each other
    least = 2 if len(names) > _LONG_LEGEND else 1
    labels = [_plain(_wrapped(name, int(room / least) - 6)) for name in names]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    return labels, max(least, min(len(labels), int(room / (longest + 6))))


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
