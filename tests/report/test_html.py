import re
from html.parser import HTMLParser

import pytest

from trueward.report.figures import Curve, curve_figure
from trueward.report.html import (
    Completion,
    Details,
    FigureHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.svg import to_svg

EVIL = "<script>alert('x')</script> & \"quoted\""


class Page(HTMLParser):
    """Counts tags, checks that they close, and collects attributes."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def figure(title: str = "t") -> FigureHtml:
    curve = Curve(name="a", x=[0.0, 1.0], y=[0.0, 1.0], low=[0.0, 0.5], high=[0.5, 2.0])
    drawn = curve_figure([curve], title=title, x_label="x", y_label="y")
    return FigureHtml(svg=to_svg(drawn), caption="What it shows.")


def sections() -> list[Section]:
    table = Table(
        columns=["method", "gold", "interval"],
        rows=[["mean", -0.5, "0.61 ± 0.02"], ["robust", 1.25, None]],
        caption="Two methods.",
        notes="Over `5` seeds.",
    )
    sample = SampleRow(
        prompt="A prompt",
        completions=[
            Completion(text="one", label="SFT", scores={"gold": 1.5, "proxy": -2}),
            Completion(text="", scores={}),
        ],
    )
    return [
        Section(title="First", text="One.\n\nTwo.", tables=[table], figures=[figure(), figure()]),
        Section(title="Second", samples=[sample], details=[Details(summary="c", text="a: 1\n")]),
    ]


def page() -> str:
    return render_report(title="A report", lead="What was found.", sections=sections(), footer="v")


def test_the_page_is_well_formed_and_needs_nothing_from_outside() -> None:
    text = page()
    parsed = Page(text)
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "img", "iframe", "object")]
    assert all("src" not in attributes for _, attributes in parsed.tags)
    assert set(re.findall(r"https?://[^\"' <)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)


def test_every_id_is_there_once_even_for_the_same_figure_twice() -> None:
    parsed = Page(page())
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert sum(str(i).startswith("figure-2-") for i in ids) > 0
    labels = [a["aria-labelledby"] for _, a in parsed.tags if "aria-labelledby" in a]
    assert labels
    assert set(labels) <= set(ids)


def test_all_that_comes_from_data_is_escaped() -> None:
    clean = Page(page())
    text = render_report(
        title=EVIL,
        lead=EVIL,
        footer=EVIL,
        sections=[
            Section(
                title=EVIL,
                text=f"{EVIL} `{EVIL}`",
                tables=[Table(columns=[EVIL], rows=[[EVIL]], caption=EVIL, notes=EVIL)],
                figures=[FigureHtml(svg=figure(EVIL).svg, caption=EVIL)],
                samples=[
                    SampleRow(
                        prompt=EVIL,
                        completions=[Completion(text=EVIL, label=EVIL, scores={EVIL: 1.0})],
                    )
                ],
                details=[Details(summary=EVIL, text=EVIL)],
            )
        ],
    )
    assert len(Page(text).all("script")) == len(clean.all("script")) == 2
    assert "<script>alert" not in text
    # title twice, lead, footer, section, prose twice, 5 of the table (one a key), figure (label,
    # text, caption), sample 4, details 2
    assert text.count("&lt;script&gt;alert") == 21


def test_rows_of_a_table_are_refused_where_cells_are_missing() -> None:
    with pytest.raises(ValueError, match="row 2 of a table has 1 cells under 2 columns"):
        Table(columns=["a", "b"], rows=[["x", 1.0], ["y"]])
    with pytest.raises(ValueError, match="at least one column"):
        Table(columns=[], rows=[])


def test_headers_can_be_pressed_and_cells_carry_what_to_sort_by() -> None:
    parsed = Page(page())
    heads = [a for a in parsed.all("th") if a.get("scope") == "col"]
    assert [a["aria-sort"] for a in heads] == ["none"] * 3
    assert [a.get("class") for a in heads] == [None, "n", "n"]
    assert len(parsed.all("button")) == 3 + 1  # and the theme's
    assert all(a["type"] == "button" for a in parsed.all("button"))
    cells = [a["data-key"] for a in parsed.all("td")]
    assert cells == ["-0.5", "0.61", "1.25", ""]
    assert [a["data-key"] for a in parsed.all("th") if a.get("scope") == "row"] == [
        "mean",
        "robust",
    ]


def test_tables_and_captioned_figures_are_numbered_through() -> None:
    text = page()
    assert re.findall(r"<b>(Table \d+|Figure \d+)\.</b>", text) == [
        "Table 1",
        "Figure 1",
        "Figure 2",
    ]
    bare = render_report(
        title="t",
        lead="l",
        sections=[Section(title="s", figures=[FigureHtml(svg=figure().svg), figure()])],
    )
    assert re.findall(r"Figure \d+", bare) == ["Figure 1"]


def test_paragraphs_part_at_blank_lines_and_backticks_are_code() -> None:
    text = page()
    assert "<p>One.</p>\n<p>Two.</p>" in text
    assert "Over <code>5</code> seeds." in text


def test_wide_figures_scroll_in_their_own_box_and_small_ones_share_a_row() -> None:
    curve = Curve(name="a", x=[0, 1], y=[0, 1])
    made = {
        width: to_svg(curve_figure([curve], title="t", x_label="x", y_label="y", size=(width, 2.0)))
        for width in (3.6, 4.5, 7.8)
    }

    def drawn(*widths: float) -> str:
        figures = [FigureHtml(svg=made[w]) for w in widths]
        return render_report(title="t", lead="l", sections=[Section(title="s", figures=figures)])

    assert '<figure class="wide">' in drawn(7.8)
    assert '<figure class="wide">' not in drawn(4.5)
    assert 'class="figures small"' in drawn(3.6, 3.6)
    assert 'class="figures "' in drawn(3.6, 4.5)
    assert 'class="figures alone"' in drawn(4.5)


def test_a_long_report_has_contents_that_lead_to_its_sections() -> None:
    assert not Page(page()).all("nav")
    parsed = Page(
        render_report(title="t", lead="l", sections=[Section(title=str(i)) for i in range(4)])
    )
    links = [str(a["href"])[1:] for a in parsed.all("a")]
    assert (
        links == [a["id"] for a in parsed.all("section")] == [f"section-{i}" for i in range(1, 5)]
    )


def test_both_themes_are_there_by_preference_and_by_choice() -> None:
    text = page()
    assert "@media (prefers-color-scheme: dark)" in text
    assert ':root[data-theme="dark"]' in text
    assert ':root:not([data-theme="light"])' in text
    assert text.count("--figure-series-8: ") == 3  # light, dark by preference, dark by choice


def test_the_same_content_gives_the_same_page() -> None:
    assert page() == page()


def test_an_empty_completion_says_so() -> None:
    text = page()
    assert text.count("(empty)") == 1
    assert "<dt>proxy</dt><dd>−2</dd>" in text


def test_a_preface_opens_terms_and_a_detail_a_table_that_is_counted() -> None:
    table = Table(columns=["row", "1"], rows=[["a", "50 [40, 60]"]], caption="Folded.")
    text = render_report(
        title="t",
        lead="l",
        preface=[Details(summary="Words", terms={"gold <b>": "What `counts`."})],
        sections=[
            Section(title="s", tables=[table], details=[Details(summary="More", table=table)])
        ],
    )
    Page(text)
    head, body = text.split("</header>")
    assert "<summary>Words</summary>" in head
    assert "<dt>gold &lt;b&gt;</dt><dd><p>What <code>counts</code>.</p></dd>" in head
    folded = body.split("<details>")[1].split("</details>")[0]
    assert folded.startswith("<summary>More</summary>")
    assert "<b>Table 2.</b>" in folded
    assert 'data-key="50"' in folded
    assert "<pre" not in text
