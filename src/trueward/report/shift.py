"""How a reward's accuracy changes with where the completions come from: a figure and tables."""

import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from trueward.evaluate.shift import EnergyTest, LengthDifference, ShiftTable
from trueward.report.figures import Curve, curve_figure, legend_height, settle_layout
from trueward.report.html import FigureHtml, Section, Table
from trueward.report.numbers import Cell, decimal
from trueward.report.svg import INK, SERIES_LIGHT, to_svg

_APART = 0.09  # of the distance between two sources, so that intervals do not hide each other


def shift_figure(table: ShiftTable, *, title: str = "Accuracy where the policy went") -> Figure:
    """Accuracy of each reward against where the pairs come from, with intervals.

    Sources stand in the order of the table, which should be that of the policy's way: the reference
    policy's samples, those after so many steps, those after the refinement.
    """
    count = len(table.rewards)
    curves = []
    for k, reward in enumerate(table.rewards):
        found = [table.accuracy(reward, source) for source in table.sources]
        aside = _APART * (k - (count - 1) / 2)
        curves.append(
            Curve(
                name=reward,
                x=[place + aside for place in range(len(found))],
                y=[f.accuracy for f in found],
                color=SERIES_LIGHT[k % len(SERIES_LIGHT)],
                dashed=k // len(SERIES_LIGHT) % 2 == 1,
            )
        )
    legend = legend_height(table.rewards) if count > 1 else 0.0
    figure = curve_figure(
        curves,
        title=title,
        x_label="whose completions",
        y_label="pairs ordered as by gold",
        marked=True,
        size=(4.5, 3.0 + legend),
    )
    axes = figure.axes[0]
    for reward, curve in zip(table.rewards, curves, strict=True):
        for x, source in zip(curve.x, table.sources, strict=True):
            found_here = table.accuracy(reward, source)
            if math.isfinite(found_here.low):
                axes.vlines(x, found_here.low, found_here.high, color=curve.color, linewidth=1.2)
    axes.axhline(0.5, color=INK, linewidth=0.8, alpha=0.7)  # a coin
    axes.xaxis.set_major_locator(FixedLocator(range(len(table.sources))))
    axes.set_xticklabels([source.replace("$", r"\$") for source in table.sources])
    axes.set_xlim(-0.5, len(table.sources) - 0.5)
    return figure


def shift_tables(
    table: ShiftTable,
    *,
    lengths: Mapping[str, LengthDifference] | None = None,
    energies: Mapping[str, EnergyTest] | None = None,
) -> list[Table]:
    """Tables of accuracies, of paired differences, and of how far the completions moved.

    Args:
        table: From `evaluate.shift_table`.
        lengths: By source, its lengths beside those of the first source; without that one.
        energies: By source, its energy distance to the first one.
    """
    tables = [_accuracy_table(table)]
    if table.differences:
        tables.append(_difference_table(table))
    if lengths or energies:
        tables.append(_distance_table(table, lengths or {}, energies or {}))
    return tables


def shift_section(
    table: ShiftTable,
    *,
    lengths: Mapping[str, LengthDifference] | None = None,
    energies: Mapping[str, EnergyTest] | None = None,
) -> Section:
    """The figure and the tables as a section of a page."""
    figure = FigureHtml(
        svg=to_svg(settle_layout(shift_figure(table))),
        caption="Share of each source's pairs that a reward orders as gold does, with "
        f"{100 * table.confidence:g} % intervals over prompts; at 0.5 a coin does as well.",
    )
    return Section(
        title="Where the policy went",
        tables=shift_tables(table, lengths=lengths, energies=energies),
        figures=[figure],
    )


def _accuracy_table(table: ShiftTable) -> Table:
    rows: list[list[Cell]] = []
    for reward in table.rewards:
        found = [table.accuracy(reward, source) for source in table.sources]
        rows.append([reward, *(_interval(f.accuracy, f.low, f.high) for f in found)])
    firsts = [table.accuracy(table.rewards[0], source) for source in table.sources]
    sizes = ", ".join(f"{f.source}: {f.pairs} of {f.prompts} prompts" for f in firsts)
    notes = [
        f"In brackets: {100 * table.confidence:g} % intervals, bootstrap over prompts.",
        f"Pairs: {sizes}.",
        *(
            f"{left} pairs of {source} are longer than a reward's context and left out."
            for source, left in table.left_out.items()
            if left
        ),
    ]
    return Table(
        columns=["reward", *table.sources],
        rows=rows,
        caption="Share of pairs ordered as by gold, by whose completions they are.",
        notes=" ".join(notes),
    )


def _difference_table(table: ShiftTable) -> Table:
    names = list(dict.fromkeys((d.reward, d.baseline) for d in table.differences))
    rows: list[list[Cell]] = []
    for reward, baseline in names:
        found = [table.difference(reward, baseline, source) for source in table.sources]
        cells = [_interval(f.difference, f.low, f.high) for f in found]
        rows.append([f"{reward} less {baseline}", *cells])
    return Table(
        columns=["difference", *table.sources],
        rows=rows,
        caption="Difference of accuracy on the same pairs.",
        notes="An interval without 0 is a difference that these prompts show.",
    )


def _distance_table(
    table: ShiftTable,
    lengths: Mapping[str, LengthDifference],
    energies: Mapping[str, EnergyTest],
) -> Table:
    columns = ["completions of"]
    notes = "Characters over the prompts that both answer, with 95 % intervals."
    if lengths:
        columns += ["characters", "longer by"]
    if energies:
        columns += ["energy\ncoefficient", "p"]
        notes += (
            " Energy coefficient: energy distance of the completions' states over twice their mean "
            "distance, from 0 (one distribution) to 1; p by permutation."
        )
    rows: list[list[Cell]] = []
    for source in table.sources[1:]:
        row: list[Cell] = [source]
        if lengths:
            length = lengths.get(source)
            row.append(decimal(length.mean, 0) if length else None)
            row.append(_interval(length.difference, length.low, length.high, 0) if length else None)
        if energies:
            energy = energies.get(source)
            row.append(decimal(energy.coefficient, 3) if energy else None)
            row.append(decimal(energy.p_value, 3) if energy else None)
        rows.append(row)
    return Table(
        columns=columns,
        rows=rows,
        caption=f"How far the completions moved from those of {table.sources[0]}.",
        notes=notes,
    )


def _interval(value: float, low: float, high: float, decimals: int = 3) -> Cell:
    text = decimal(value, decimals)
    ends = [decimal(end, decimals) for end in (low, high)]
    return text if None in ends else f"{text} [{ends[0]}, {ends[1]}]"
