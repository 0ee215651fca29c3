"""Drawings as SVG that a page can restyle, and the colours that it may restyle."""

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import Literal
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

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
_XLINK = "{http://www.w3.org/1999/xlink}href"


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
    with output_settings():
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


@contextmanager
def output_settings() -> Iterator[None]:
    """Apply what matplotlib reads from its settings alone: text as text, ids from the drawing."""
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trueward", "pdf.fonttype": 42}),
        warnings.catch_warnings(),
    ):
        # The reader's browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


# --- rewriting ---


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
