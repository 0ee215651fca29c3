import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from trueward.evaluate.calibration import reliability_curve
from trueward.evaluate.comparison import Estimate
from trueward.report.figures import (
    Curve,
    Mark,
    curve_figure,
    legend_height,
    marked_figure,
    matrix_figure,
    overoptimization_figure,
    peak_and_end_figure,
    reliability_panels,
    save_figure,
    settle_layout,
    several_dots_figure,
    sqrt_ticks,
)
from trueward.report.svg import INK, SERIES_LIGHT, to_svg


def gold() -> Curve:
    return Curve(name="gold", x=[0.0, 1.0, 4.0, 9.0], y=[0.0, 1.0, 2.0, 1.5])


def proxy() -> Curve:
    return Curve(name="proxy", x=[0.0, 1.0, 4.0, 9.0], y=[0.0, 1.0, 2.5, 4.0])


def band() -> Curve:
    return Curve(name="mean", x=[1, 2, 3], y=[1, 2, 3], low=[0, 1, 2], high=[2, 3, 4])


def both() -> Figure:
    return curve_figure([gold(), band()], title="Two", x_label="x", y_label="y")


# --- Curve ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y": [1.0]}, r"as many x as y, got 2 and 1"),
        ({"low": [0.0, 0.0]}, r"one end of its band"),
        ({"low": [0.0], "high": [1.0, 1.0]}, r"as many low as y, got 1 and 2"),
        ({"low": [0.0, 0.0], "high": [1.0]}, r"as many high as y, got 1 and 2"),
        ({"color": '"/><script>'}, r"which is no colour"),
    ],
)
def test_a_curve_that_does_not_fit_itself_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(**({"name": "a", "x": [1.0, 2.0], "y": [1.0, 2.0]} | changed))


# --- what is drawn ---


def test_lines_are_drawn_at_their_values_in_the_palettes_order() -> None:
    axes = both().axes[0]
    assert [line.get_color() for line in axes.lines] == list(SERIES_LIGHT[:2])
    assert axes.lines[0].get_ydata().tolist() == [0.0, 1.0, 2.0, 1.5]
    assert axes.lines[1].get_xdata().tolist() == [1, 2, 3]


def test_a_band_covers_low_to_high_and_only_where_given() -> None:
    (area,) = both().axes[0].collections
    corners = area.get_paths()[0].get_extents()
    assert (corners.x0, corners.y0, corners.x1, corners.y1) == (1, 0, 3, 4)


def test_a_legend_stands_where_there_are_two_curves_with_names_as_they_are() -> None:
    names = ["_hidden", "costs $5 or $6"]
    two = [Curve(name=name, x=[0, 1], y=[1, 2]) for name in names]
    figure = curve_figure(two, title="t", x_label="x", y_label="y")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["_hidden", r"costs \$5 or \$6"]
    assert "costs $5 or $6" in to_svg(figure)
    assert not curve_figure(two[:1], title="t", x_label="x", y_label="y").legends


def test_marks_stand_at_their_places_in_panels_of_their_own() -> None:
    peak, alarm = Mark(name="peak", x=4, style="dotted"), Mark(name="alarm", x=6, style="solid")
    panels = {"one": (gold(), [peak, alarm]), "two": (proxy(), [alarm]), "three": (gold(), [])}
    panels["four"] = (gold(), [])
    figure = marked_figure(panels, title="Runs", x_label="step", y_label="gold")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["one", "two", "three", "four"]
    lines = [[(tuple(line.get_xdata()), line.get_linestyle()) for line in a.lines] for a in shown]
    assert lines[0][1:] == [((4, 4), ":"), ((6, 6), "-")]
    assert lines[1][1:] == [((6, 6), "-")]
    assert lines[2][1:] == lines[3][1:] == []
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["peak", "alarm"]
    assert [axes.get_xlabel() for axes in shown] == ["", "step", "step", "step"]
    alone = marked_figure({"one": (gold(), [])}, title="", x_label="step", y_label="gold")
    assert alone.axes[0].get_title(loc="left") == ""
    assert not alone.legends


def test_few_points_are_marked_and_many_are_not() -> None:
    single = Curve(name="one", x=[1.0], y=[1.0])
    axes = curve_figure([single, gold()], title="t", x_label="x", y_label="y").axes[0]
    assert axes.lines[0].get_marker() == "o"
    assert axes.lines[1].get_marker() == "None"


def test_on_a_sqrt_scale_four_times_the_kl_is_twice_as_far_also_below_zero() -> None:
    curve = Curve(name="a", x=[-1.0, 0.0, 1.0, 4.0, 9.0], y=[0.0, 1.0, 2.0, 3.0, 4.0])
    figure = curve_figure([curve], title="t", x_label="x", y_label="y", x_scale="sqrt")
    to_pixels = figure.axes[0].transData.transform
    at = {x: to_pixels((x, 0))[0] for x in (-1.0, 0.0, 1.0, 4.0, 9.0)}
    unit = at[1.0] - at[0.0]
    assert unit > 0
    assert at[4.0] - at[0.0] == pytest.approx(2 * unit)
    assert at[9.0] - at[0.0] == pytest.approx(3 * unit)
    assert at[0.0] - at[-1.0] == pytest.approx(unit)


def test_whole_numbers_do_for_x_on_a_sqrt_scale() -> None:
    figure = curve_figure([band()], title="t", x_label="x", y_label="y", x_scale="sqrt")
    assert list(figure.axes[0].get_xticks()) == [0.0, 1.0, 2.0, 3.0]


def test_steps_are_whole_numbers_on_the_axis() -> None:
    curve = Curve(name="a", x=[1, 2], y=[0.0, 1.0])
    ticks = curve_figure([curve], title="t", x_label="x", y_label="y").axes[0].get_xticks()
    assert all(float(t).is_integer() for t in ticks)


def test_a_log_scale_refuses_zero_and_labels_few_points_each() -> None:
    curve = Curve(name="n", x=[1, 4, 16], y=[0.0, 1.0, 2.0])
    figure = curve_figure([curve], title="t", x_label="n", y_label="y", x_scale="log")
    assert list(figure.axes[0].get_xticks()) == [1, 4, 16]
    with pytest.raises(ValueError, match=r"x above 0, got 0\.0"):
        curve_figure([gold()], title="t", x_label="n", y_label="y", x_scale="log")


def test_a_figure_without_a_finite_value_is_refused() -> None:
    empty = Curve(name="a", x=[1.0], y=[math.nan])
    with pytest.raises(ValueError, match="at least one finite value"):
        curve_figure([empty], title="t", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="at least one finite value"):
        curve_figure([], title="t", x_label="x", y_label="y")


def test_gold_is_solid_and_its_proxy_dashed_in_the_same_colour_with_a_dot_at_golds_peak() -> None:
    figure = overoptimization_figure({"a": (gold(), proxy()), "b": (gold(), None)}, title="t")
    dashed, solid, dot, other, _ = figure.axes[0].lines
    assert dashed.get_ydata().tolist() == proxy().y
    assert dashed.is_dashed()
    assert solid.get_ydata().tolist() == gold().y
    assert not solid.is_dashed()
    assert dashed.get_color() == solid.get_color() == dot.get_color() == SERIES_LIGHT[0]
    assert other.get_color() == SERIES_LIGHT[1]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([4.0], [2.0])
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["a", "b", "gold reward", "proxy reward"]


def test_the_peak_passes_over_nan_and_takes_the_first_of_equals() -> None:
    curve = Curve(name="g", x=[0.0, 1.0, 2.0, 3.0], y=[0.0, 2.0, math.nan, 2.0])
    dot = overoptimization_figure({"a": (curve, None)}, title="t").axes[0].lines[-1]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([1.0], [2.0])


def test_panels_have_a_method_each_on_common_axes() -> None:
    methods = {name: (gold(), proxy()) for name in "abcd"}
    figure = overoptimization_figure(methods, title="All", panels=True)
    seen = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in seen] == list("abcd")
    assert len({axes.get_ylim() for axes in seen}) == 1
    assert len({axes.get_xlim() for axes in seen}) == 1
    assert figure.get_suptitle() == "All"


def test_peaks_and_points_are_marked_on_demand() -> None:
    plain = curve_figure([gold()], title="t", x_label="x", y_label="y").axes[0]
    assert len(plain.lines) == 1
    marked = curve_figure([gold()], title="t", x_label="x", y_label="y", peaks=True, marked=True)
    _, peak, dots = marked.axes[0].lines
    assert (list(peak.get_xdata()), list(peak.get_ydata())) == ([4.0], [2.0])
    assert (dots.get_marker(), len(dots.get_xdata())) == ("o", 4)


def test_a_law_is_dotted_with_a_diamond_at_the_peak_that_it_predicts() -> None:
    law = Curve(name="law", x=[0.0, 9.0], y=[0.0, 1.6])
    figure = overoptimization_figure(
        {"a": (gold(), None), "b": (gold(), None)},
        title="t",
        laws={"a": (law, (5.0, 2.1)), "b": (law, None)},
        panels=True,
    )
    first, second = (axes.lines for axes in figure.axes)
    _, dotted, diamond, dot = first
    assert (dotted.get_ydata().tolist(), dotted.get_color()) == ([0.0, 1.6], INK)
    assert dotted.get_linewidth() < first[0].get_linewidth()
    assert (list(diamond.get_xdata()), list(diamond.get_ydata())) == ([5.0], [2.1])
    assert (diamond.get_marker(), dot.get_marker()) == ("D", "o")
    assert len(second) == 3
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["gold reward", "fitted law", "its peak"]


def test_given_ranges_hold_and_the_legend_can_be_left_out() -> None:
    figure = overoptimization_figure(
        {"a": (gold(), proxy())},
        title="t",
        x_range=(0.0, 16.0),
        y_range=(-1.0, 3.0),
        legend=False,
    )
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.0, 16.0), (-1.0, 3.0))
    assert max(axes.get_xticks()) == 10.0  # of the range, not of the curves
    assert not figure.legends


def test_peak_and_end_are_rings_and_dots_with_their_drop_beside_them() -> None:
    figure = peak_and_end_figure(
        ["falls", "stays"],
        peaks=[2.0, 1.0],
        ends=[0.5, 1.0],
        drops=[1.5, math.nan],
        low=[0.25, math.nan],
        high=[0.75, math.nan],
        title="Peaks",
        x_label="gold",
        reference=0.0,
    )
    axes = figure.axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in points] == [2.0, 0.5, 1.0, 1.0]
    assert [line.get_markerfacecolor() == "none" for line in points] == [True, False] * 2
    drop, interval = (c.get_segments()[0][:, 0].tolist() for c in axes.collections[:2])
    assert (drop, interval) == ([0.5, 2.0], [0.25, 0.75])
    assert [t.get_text() for t in axes.texts] == ["1.50", "–", "drop"]
    assert figure.get_suptitle() == "Peaks"
    two = {"peaks": [1, 1], "ends": [1, 1], "low": [1, 1], "high": [1, 1]}
    for names, drops, found in ((["a"], [1, 1], "1 and 2"), (["a", "b"], [1], "2 and 1")):
        with pytest.raises(ValueError, match=f"for each peak and end, got {found} for 2"):
            peak_and_end_figure(names, drops=drops, **two, title="t", x_label="x")


def test_a_drop_too_small_to_be_seen_is_written_without_a_sign() -> None:
    one = {"peaks": [1.0], "ends": [1.001], "low": [1.0], "high": [1.0]}
    figure = peak_and_end_figure(["a"], drops=[-0.001], **one, title="t", x_label="x")
    assert figure.axes[0].texts[0].get_text() == "0.00"


def test_a_matrix_is_blue_above_the_middle_orange_below_and_never_more_than_half_opaque() -> None:
    values = [[0.5, 1.0, 0.25], [0.0, 0.5, math.nan], [0.75, math.nan, 0.5]]
    figure = matrix_figure(["a", "b", "c"], values, title="Wins")
    axes = figure.axes[0]
    cells = {(p.get_x() + 0.47, p.get_y() + 0.47): p for p in axes.patches}
    assert len(cells) == 7
    shades = {place: round(p.get_alpha(), 6) for place, p in cells.items()}
    assert shades[1.0, 0.0] == shades[0.0, 1.0] == 0.5
    assert shades[2.0, 0.0] == shades[0.0, 2.0] == 0.25
    assert shades[0.0, 0.0] == 0.0
    svg = to_svg(figure)
    assert "var(--figure-series-1" in svg
    assert "var(--figure-series-2" in svg
    assert {">100<", ">25<", ">0<", ">75<"} <= set(re.findall(r">\d+<", svg))
    assert [t.get_text() for t in axes.get_yticklabels()] == ["1  a", "2  b", "3  c"]
    with pytest.raises(ValueError, match="2 rows and columns"):
        matrix_figure(["a", "b"], [[0.5, 0.5]], title="t")


def test_reliability_panels_leave_out_empty_bins_and_scale_the_counts() -> None:
    curve = reliability_curve(
        torch.tensor([0.1, 0.1, 0.1, 0.9]), torch.tensor([0.0, 1.0, 0.0, 1.0]), bins=5
    )
    figure = reliability_panels({"a": curve, "b": curve}, title="All", remarks={"a": "ECE 0.1"})
    first, second = figure.axes
    assert first.lines[1].get_ydata() == pytest.approx([1 / 3, 1.0])
    assert [bar.get_height() for bar in first.patches] == pytest.approx([0.25, 0.25 / 3])
    assert [t.get_text() for t in first.texts + second.texts] == ["ECE 0.1", ""]
    assert figure.get_suptitle() == "All"
    with pytest.raises(ValueError, match="at least one curve"):
        reliability_panels({})


def test_long_names_are_broken_into_two_lines_and_then_cut() -> None:
    name = "a method with a very long name that goes on and on and costs $5"
    methods = {key: (gold(), None) for key in (name, "short", "third")}
    figure = overoptimization_figure(methods, title="t", panels=True)
    lines = figure.axes[0].get_title(loc="left").split("\n")
    assert len(lines) == 2
    assert max(map(len, lines)) <= 27
    assert lines[1].endswith("\N{HORIZONTAL ELLIPSIS}")
    both = [Curve(name=n, x=[0, 1], y=[0, 1]) for n in (name, "short")]
    drawn = curve_figure(both, title="t", x_label="x", y_label="y").legends[0].get_texts()
    assert " ".join(drawn[0].get_text().split()) == name.replace("$", r"\$")
    assert "\n" in drawn[0].get_text()


def test_a_legends_height_counts_its_rows() -> None:
    line = legend_height(["a"])
    assert 0.1 < line < 0.25
    assert legend_height(["a", "b", "c"]) == line  # beside each other
    assert legend_height(["x" * 40, "y" * 40]) == pytest.approx(2 * line)
    assert legend_height([]) == 0.0


def test_more_than_six_entries_stand_in_two_columns() -> None:
    def columns(count: int) -> int:
        curves = [Curve(name=f"{'x' * 20} {i} y", x=[0, 1], y=[0, i]) for i in range(count)]
        return curve_figure(curves, title="t", x_label="x", y_label="y").legends[0]._ncols

    assert (columns(6), columns(7)) == (2, 2)
    long = [f"a reward with a long name, trained {i} x as long" for i in range(7)]
    assert legend_height(long) == pytest.approx(4 * 2 * legend_height(["a"]))  # rows of two lines
    assert legend_height(long[:6]) == pytest.approx(6 * legend_height(["a"]))


def test_a_settled_layout_is_kept_by_every_output(tmp_path: Path) -> None:
    figure = settle_layout(both())
    place = figure.axes[0].get_position().bounds
    assert place != both().axes[0].get_position().bounds
    save_figure(figure, tmp_path / "a")
    assert figure.axes[0].get_position().bounds == place


# --- ticks ---


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 40.0, [0, 1, 5, 10, 20, 30]),
        (0.0, 10.0, [0, 0.2, 1, 2, 5, 10]),
        (0.0, 0.5, [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5]),
        (-1.0, 9.0, [-1, -0.2, 0, 0.2, 1, 2, 5]),
        (0.0, 0.0, [0]),
    ],
)
def test_sqrt_ticks_are_round_and_spread(low: float, high: float, expected: list[float]) -> None:
    assert sqrt_ticks(low, high) == expected


def test_sqrt_ticks_keep_their_distance_on_any_scale() -> None:
    for high in (1e-4, 0.07, 3.3, 57.0, 12345.0):
        roots = [math.sqrt(t) for t in sqrt_ticks(0.0, high)]
        gaps = [b - a for a, b in pairwise(roots)]
        assert 4 <= len(roots) <= 9
        assert min(gaps) >= math.sqrt(high) / 8 - 1e-12
        assert max(gaps) <= math.sqrt(high) / 2


# --- output ---


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    assert to_svg(both()) == to_svg(both())
    for name in ("one", "two"):
        save_figure(both(), tmp_path / name)
    for suffix in (".png", ".pdf"):
        first, second = ((tmp_path / (n + suffix)).read_bytes() for n in ("one", "two"))
        assert first == second


def test_png_and_pdf_lie_side_by_side_and_other_dots_stay(tmp_path: Path) -> None:
    png, pdf = save_figure(both(), tmp_path / "new" / "kl.0.1.png")
    assert (png.name, pdf.name) == ("kl.0.1.png", "kl.0.1.pdf")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert pdf.read_bytes()[:4] == b"%PDF"
    assert [p.name for p in save_figure(both(), tmp_path / "v1.2")] == ["v1.2.png", "v1.2.pdf"]


def test_dots_of_several_series_stand_apart_in_their_rows() -> None:
    one = {"a": Estimate(mean=0.6, low=0.5, high=0.7), "b": Estimate(mean=0.8)}
    figure = several_dots_figure(
        {"first": one, "second": {"b": Estimate(mean=0.4)}}, title="t", x_label="x", middle=0.5
    )
    axes = figure.axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(d.get_xdata()[0], round(d.get_ydata()[0], 2)) for d in dots[:2]] == [
        (0.6, -0.11),
        (0.8, 0.89),
    ]
    assert dots[3].get_xdata()[0] == 0.4
    assert round(dots[3].get_ydata()[0], 2) == 1.11
    assert dots[0].get_color() != dots[3].get_color()
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["first", "second"]
    with pytest.raises(ValueError, match="at least one estimate"):
        several_dots_figure({}, title="t", x_label="x", middle=0.5)
