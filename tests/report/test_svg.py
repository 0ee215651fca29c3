import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from trueward.report.figures import Curve, curve_figure
from trueward.report.svg import (
    INK,
    INK_DARK,
    SERIES_DARK,
    SERIES_LIGHT,
    to_svg,
    with_id_prefix,
)


def gold() -> Curve:
    return Curve(name="gold", x=[0.0, 1.0, 4.0, 9.0], y=[0.0, 1.0, 2.0, 1.5])


def band() -> Curve:
    return Curve(name="mean", x=[1, 2, 3], y=[1, 2, 3], low=[0, 1, 2], high=[2, 3, 4])


def both() -> Figure:
    return curve_figure([gold(), band()], title="Two", x_label="x", y_label="y")


def test_numbers_on_the_strongest_shades_are_legible_in_both_themes() -> None:
    for series, ink, paper in ((SERIES_LIGHT, INK, "#fdfcf9"), (SERIES_DARK, INK_DARK, "#171614")):
        for color in series[:2]:
            mixed = "#" + "".join(
                f"{(int(color[i : i + 2], 16) + int(paper[i : i + 2], 16)) // 2:02x}"
                for i in (1, 3, 5)
            )
            assert contrast(mixed, ink) >= 4.5


def test_the_svg_refers_to_nothing_outside_and_styles_nothing_but_itself() -> None:
    svg = to_svg(both())
    assert set(re.findall(r"https?://[^\"' ]+", svg)) == {"http://www.w3.org/2000/svg"}
    for word in (
        "<style",
        "<script",
        "<image",
        "<metadata",
        "DOCTYPE",
        "<?xml",
        "xlink",
        "@import",
    ):
        assert word not in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_text_stays_text_in_the_pages_own_colour_and_typeface() -> None:
    svg = to_svg(both())
    texts = re.findall(r"<text[^>]*style=\"([^\"]*)\"", svg)
    assert texts
    assert all("fill: currentColor" in style for style in texts)
    assert all("font-family: var(--figure-font" in style for style in texts)
    assert ">Two</text>" in svg
    assert INK not in svg.replace(f"--figure-ink, {INK}", "")
    assert "#000000" not in svg
    assert "stroke: currentColor" in svg


@pytest.mark.parametrize(
    ("theme", "ink", "series"), [("light", INK, SERIES_LIGHT), ("dark", INK_DARK, SERIES_DARK)]
)
def test_the_theme_gives_the_colours_of_a_file_on_its_own(
    theme: str, ink: str, series: tuple[str, ...]
) -> None:
    svg = to_svg(both(), theme=theme)
    assert f"color: var(--figure-ink, {ink})" in svg
    assert f"stroke: var(--figure-series-1, {series[0]})" in svg
    assert f"fill: var(--figure-series-2, {series[1]})" in svg


def test_the_background_is_transparent() -> None:
    first, *_ = re.findall(r"<path[^>]*>", to_svg(both()))
    assert "fill: none" in first


def test_two_drawings_on_one_page_share_no_id_and_all_references_lead_somewhere() -> None:
    svgs = [to_svg(both()), to_svg(curve_figure([gold()], title="t", x_label="x", y_label="y"))]
    ids = [set(re.findall(r'\sid="([^"]+)"', svg)) for svg in svgs]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == own


def test_an_id_prefix_goes_before_ids_and_references_but_not_into_text() -> None:
    svg = '<g id="a"><use href="#a"/><g clip-path="url(#a)"/><text>id="a" #a</text></g>'
    assert with_id_prefix(svg, "p-") == (
        '<g id="p-a"><use href="#p-a"/><g clip-path="url(#p-a)"/><text>id="a" #a</text></g>'
    )


def test_a_label_names_a_drawing_without_a_title() -> None:
    bare = curve_figure([gold()], title="", x_label="x", y_label="y")
    assert 'aria-label="figure"' in to_svg(bare)
    assert 'aria-label="a &amp; b"' in to_svg(bare, label="a & b")


def test_names_are_escaped_and_letters_outside_the_font_do_no_harm() -> None:
    curve = Curve(name="<script>", x=[0, 1], y=[0, 1])
    svg = to_svg(curve_figure([curve, band()], title='報酬 <b>&"', x_label="x", y_label="y"))
    assert "<script>" not in svg
    assert "<b>" not in svg
    assert "&lt;script&gt;" in svg
    assert "報酬" in svg


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    before = dict(mpl.rcParams)
    to_svg(both())
    assert dict(mpl.rcParams) == before


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("series", "paper"), [(SERIES_LIGHT, "#fdfcf9"), (SERIES_DARK, "#171614")])
def test_every_series_stands_out_from_its_page(series: tuple[str, ...], paper: str) -> None:
    assert min(contrast(color, paper) for color in series) >= 3
    assert len(set(series)) == 8
