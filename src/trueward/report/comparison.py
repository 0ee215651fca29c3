"""The report of a comparison of methods over seeds: figures, tables and one page."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table as RichTable

from trueward.evaluate.comparison import (
    Estimate,
    MeanPoint,
    MethodFit,
    MethodRuns,
    MethodSummary,
    PooledReliability,
    WinRates,
    fit_law,
    over_seeds,
    pooled_reliability,
    summarise,
    win_rates,
)
from trueward.report.figures import (
    INK,
    SERIES_LIGHT,
    Curve,
    Law,
    Scale,
    curve_figure,
    legend_height,
    matrix_figure,
    overoptimization_figure,
    peak_and_end_figure,
    reliability_panels,
    save_figure,
    settle_layout,
    to_svg,
)
from trueward.report.html import (
    Cell,
    Details,
    FigureHtml,
    PanelsHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.run import _versions, rich_table
from trueward.train.run_folder import write_text

_PANEL = (3.0, 2.2)  # inches
_MOST_BANDS = 4  # curves on common axes whose bands can still be told apart
_PLACE_LABELS = {"step": "step", "n": "n, of which the proxy picks the best", "1/beta": "1 / β"}
_PLACE_SCALES: Mapping[str, Scale] = {"step": "linear", "n": "log", "1/beta": "sqrt"}
_FAMILIES = {"closed_form": "optimal policies", "best_of_n": "best-of-n"}


def comparison_report(
    folder: str | Path,
    methods: Sequence[MethodRuns],
    *,
    title: str,
    lead: str,
    baseline: str,
    samples: Sequence[SampleRow],
    notes: str,
    config_text: str,
    environment: Mapping[str, Any],
) -> Path:
    """Write the report of a comparison into a folder and return the path of `report.html`.

    Beside it: `figures/`, each figure as PNG and PDF, and `comparison.json` with the numbers of the
    tables and the mean curves (NaN as null). Methods without runs are named and left out, sections
    without data too.

    Args:
        folder: Where to write; made if it is not there.
        methods: In the order of the tables.
        title: The page's heading.
        lead: What was found, in one or two sentences.
        baseline: Name of the method that the others are compared with.
        samples: Completions to be read side by side.
        notes: What was compared, above the first table; a blank line parts paragraphs.
        config_text: The configuration, shown verbatim.
        environment: Versions and device, as in `environment.json`.

    Raises:
        ValueError: `baseline` is the name of no method, or no method has a run.
    """
    root = Path(folder)
    reference = _baseline(methods, baseline)
    shown = _shown(methods, reference)
    if not shown:
        raise ValueError(f"none of {len(methods)} methods has a run: there is nothing to report.")
    keep = _Keeper(root / "figures")
    groups = _groups(shown)
    rates = win_rates([s.method for s in shown])
    rewards = _rewards(shown)
    sections = [
        _results_section(shown, methods, baseline, notes),
        *(_curves_section(keep, name, group) for name, group in groups.items()),
        _fits_section(shown),
        _stability_section(keep, groups),
        _kl_section(keep, shown, baseline),
        _peak_section(keep, shown),
        _over_places_section(keep, groups, "spread"),
        _over_places_section(keep, groups, "agreement"),
        _reliability_section(keep, rewards),
        _weights_section(keep, shown),
        _win_section(keep, shown, rates),
        Section(title="Answers side by side", samples=samples) if samples else None,
        _configuration_section(config_text, environment),
    ]
    page = render_report(
        title=title,
        lead=lead,
        sections=[section for section in sections if section is not None],
        footer=_versions(environment),
    )
    numbers = json.dumps(_numbers(shown, baseline, rates, rewards), indent=1, allow_nan=False)
    write_text(root / "comparison.json", numbers + "\n")
    target = root / "report.html"
    write_text(target, page)
    return target


def rich_comparison_table(methods: Sequence[MethodRuns], baseline: str) -> RichTable:
    """Return the comparison so far, for the terminal; the baseline is bold.

    Methods without runs have an empty row; one whose seeds do not fit together has its reason below
    the table.
    """
    rows: list[list[Cell]] = []
    reasons: list[str] = []
    for method in methods:
        row: list[Cell] = [method.label or method.name, len(method.runs)]
        try:
            summary = summarise(method) if method.runs else None
        except ValueError as error:
            reasons.append(str(error))
            summary = None
        if summary is None:
            rows.append([*row, None, None, None, None, None])
            continue
        rows.append(
            [
                *row,
                _interval_text(summary.gold_end),
                _interval_text(summary.gold_peak),
                _interval_text(summary.drop),
                _decimal(summary.kl_end, 1),
                _decimal(summary.seconds_mean, 1),
            ]
        )
    table = rich_table(
        Table(
            columns=["method", "seeds", "gold at the end", "at its peak", "drop", "KL", "s/cell"],
            rows=rows,
            notes=" ".join(reasons),
        )
    )
    for drawn, method in zip(table.rows, methods, strict=True):
        drawn.style = "bold" if method.name == baseline else None
    return table


# --- what is shown ---


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A method with its statistics, and how figures draw it."""

    method: MethodRuns
    name: str
    family: str  # what shares its x and its law
    color: str
    dashed: bool  # from the ninth on, as the palette begins again
    points: list[MeanPoint]
    summary: MethodSummary
    fit: MethodFit | None

    def kl(self) -> list[float]:
        """The KL of each point that the method's KL is known by."""
        return self.means(self.summary.kl_name)

    def means(self, key: str) -> list[float]:
        return [point.means.get(key, math.nan) for point in self.points]

    def places(self) -> list[float]:
        return [point.place for point in self.points]

    def curve(self, x: Sequence[float], estimates: Sequence[Estimate], *, band: bool) -> Curve:
        """A curve of this method's, without its points of unknown x."""
        known = [(a, e) for a, e in zip(x, estimates, strict=True) if math.isfinite(a)]
        return Curve(
            name=self.name,
            x=[a for a, _ in known],
            y=[e.mean for _, e in known],
            low=[e.low for _, e in known] if band else None,
            high=[e.high for _, e in known] if band else None,
            color=self.color,
            dashed=self.dashed,
        )


def _shown(methods: Sequence[MethodRuns], baseline: MethodRuns) -> list[_Shown]:
    with_runs = [method for method in methods if any(run.points for run in method.runs)]
    names = [method.label or method.name for method in with_runs]
    families = [_FAMILIES.get(method.optimiser, "trained policies") for method in with_runs]
    # Figures show a family each, which has the palette to itself.
    places = [families[:i].count(family) for i, family in enumerate(families)]
    return [
        _Shown(
            method=method,
            name=name if names.count(name) == 1 else f"{name} ({method.name})",
            family=family,
            color=SERIES_LIGHT[place % len(SERIES_LIGHT)],
            dashed=place // len(SERIES_LIGHT) % 2 == 1,
            points=over_seeds(method),
            summary=summarise(method, baseline),
            fit=fit_law(method),
        )
        for method, name, family, place in zip(with_runs, names, families, places, strict=True)
    ]


def _baseline(methods: Sequence[MethodRuns], name: str) -> MethodRuns:
    for method in methods:
        if method.name == name:
            return method
    known = ", ".join(method.name for method in methods)
    raise ValueError(f"the baseline {name!r} is none of the methods {known or '(none)'}.")


def _groups(shown: Sequence[_Shown]) -> dict[str, list[_Shown]]:
    """Part the methods by what their x is and which law they follow."""
    groups: dict[str, list[_Shown]] = {}
    for one in shown:
        groups.setdefault(one.family, []).append(one)
    return groups


class _Keeper:
    """Writes figures as files for papers, and returns them as the page needs them."""

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


# --- the table of methods ---


def _results_section(
    shown: Sequence[_Shown], methods: Sequence[MethodRuns], baseline: str, notes: str
) -> Section:
    places = {s.summary.place_name for s in shown}
    reference = next((s.name for s in shown if s.method.name == baseline), "")
    columns = [
        "method",
        "gold\nat the end",
        "less the\nbaseline",
        "gold at\nits peak",
        f"peak\nat {places.pop()}" if len(places) == 1 else "peak\nat",
        "drop",
        "KL\nat end",
        "proxy\nat end",
        "words",
        "seconds\na cell",
    ]
    rows: list[list[Cell]] = [
        [
            s.name,
            _interval_text(s.summary.gold_end),
            _interval_text(s.summary.less_baseline),
            _interval_text(s.summary.gold_peak),
            f"{s.summary.peak_place:g}",
            _interval_text(s.summary.drop),
            _decimal(s.summary.kl_end, 1),
            _decimal(s.summary.proxy_end.mean, 2),
            _decimal(s.summary.length_end, 1),
            _decimal(s.summary.seconds_mean, 0 if s.summary.seconds_mean >= 10 else 1),
        ]
        for s in shown
    ]
    held = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    table = Table(
        columns=[columns[i] for i in held],
        rows=[[row[i] for i in held] for row in rows],
        caption="Gold reward and what it cost, "
        + _seeds_text([s.summary.seeds for s in shown])
        + ".",
        notes=" ".join(_table_remarks(shown, methods, reference)),
    )
    return Section(title="Results", text=notes, tables=[table])


def _table_remarks(
    shown: Sequence[_Shown], methods: Sequence[MethodRuns], reference: str
) -> list[str]:
    found = ["± is half of the 95 % interval over seeds (Student's t)."]
    single = [s.name for s in shown if s.summary.gold_end.over_prompts]
    if single:
        found.append(
            f"With one seed ({', '.join(single)}) there is no interval over seeds: the ± of its "
            "gold is over prompts alone."
        )
    if reference and len(shown) > 1:
        found.append(f"The baseline is {reference}; differences to it and drops are paired.")
    found.append("The peak is that of the mean curve; every seed is read at that one place.")
    rising = [s.name for s in shown if s.summary.peaks_at_end]
    if rising:
        found.append(f"Highest at the end, so perhaps not yet at its peak: {', '.join(rising)}.")
    estimated = sorted({s.summary.kl_name for s in shown} - {"", "kl/exact"})
    if estimated:
        found.append(f"KL in nats a completion; where it is not exact, `{estimated[0]}`.")
    names = {s.method.name for s in shown}
    missing = [m.label or m.name for m in methods if m.name not in names]
    if missing:
        found.append(f"Without runs: {', '.join(missing)}.")
    return found


def _seeds_text(seeds: Sequence[int]) -> str:
    low, high = min(seeds), max(seeds)
    if low != high:
        return f"means over {low} to {high} seeds"
    return f"means over {high} seeds" if high > 1 else "one seed"


# --- gold and proxy against the KL ---


def _curves_section(keep: _Keeper, name: str, group: Sequence[_Shown]) -> Section | None:
    drawable = [s for s in group if _any_finite(s.kl())]
    if not drawable:
        return None
    pairs = {s.name: _gold_and_proxy(s) for s in drawable}
    x_range = _x_range([gold for gold, _ in pairs.values()])
    y_range, cut = _y_range(list(pairs.values()))
    laws = {s.name: law for s in drawable if (law := _law(s, x_range, y_range)) is not None}
    title = f"Gold and proxy reward: {name}"
    file = name.replace(" ", "_").replace("-", "_")
    together = overoptimization_figure(
        pairs, title=title, panels=True, laws=laws, x_range=x_range, y_range=y_range
    )
    apart = {
        key: overoptimization_figure(
            {key: pair},
            title="",
            laws=laws,
            x_range=x_range,
            y_range=y_range,
            legend=False,
            size=_PANEL,
        )
        for key, pair in pairs.items()
    }
    caption = (
        "Solid: gold reward with its interval. Dashed: the proxy that was optimised. Dot: gold's "
        "highest point."
    )
    if laws:
        caption += " Dotted: the fitted law; diamond: the peak that it predicts."
    if cut:
        caption += " What leaves a panel is cut."
    figures: list[FigureHtml | PanelsHtml] = []
    if len(drawable) > 1:
        band = len(drawable) <= _MOST_BANDS
        golds = [s.curve(s.kl(), [p.gold for p in s.points], band=band) for s in drawable]
        overview = _curves(golds, title=f"Gold reward: {name}", y_label="gold reward", peaks=True)
        figures.append(
            keep.figure(f"gold_{file}", overview, "All gold rewards on common axes, peaks dotted.")
        )
    figures.append(keep.panels(f"gold_and_proxy_{file}", together, apart, caption))
    best_of_n = name == _FAMILIES["best_of_n"]
    text = (
        "The axis is stretched by the square root of the KL, `d`. The law of gold is "
        f"`{'d (alpha - beta d)' if best_of_n else 'd (alpha - beta log d)'}` (Gao et al. 2022, "
        "arXiv 2210.10760)."
    )
    if best_of_n:
        text += " The KL of best-of-n is `log n - (n - 1)/n`."
    return Section(title=title, text=text, figures=figures)


def _gold_and_proxy(one: _Shown) -> tuple[Curve, Curve | None]:
    gold = one.curve(one.kl(), [p.gold for p in one.points], band=True)
    proxy = one.curve(one.kl(), [p.proxy for p in one.points], band=False)
    return gold, proxy if _any_finite(proxy.y) else None


def _law(one: _Shown, x_range: tuple[float, float], y_range: tuple[float, float]) -> Law | None:
    """Return the fitted law to where the method's KL ends, or on to the predicted peak in sight."""
    if one.fit is None:
        return None
    law, height = one.fit.law, one.fit.peak_gold
    seen = 0 < law.peak_kl <= x_range[1] and y_range[0] <= height <= y_range[1]
    end = max(k for k in one.kl() if math.isfinite(k))
    end = min(max(end, 1.1 * law.peak_kl), x_range[1]) if seen else end
    nats = [end * (i / 60) ** 2 for i in range(61)]  # even in the square root
    curve = Curve(name="fitted law", x=nats, y=one.fit.gold_at(nats))
    return curve, (law.peak_kl, height) if seen else None


def _x_range(curves: Sequence[Curve]) -> tuple[float, float]:
    found = [float(x) for curve in curves for x in curve.x]
    low, high = min(0.0, *found), max(found)
    # In the square root, 3 % of the width beyond the last point.
    return low, high * 1.03**2 if high > 0 else 1.0


def _y_range(pairs: Sequence[tuple[Curve, Curve | None]]) -> tuple[tuple[float, float], bool]:
    """Return an axis on which gold can be read, and whether a proxy leaves it.

    Proxies, and intervals of few seeds, may run far away; they get some room and are cut there.
    """
    golds = [float(y) for gold, _ in pairs for y in gold.y if math.isfinite(y)]
    ends = [float(y) for g, _ in pairs for e in (g.low, g.high) if e for y in e if math.isfinite(y)]
    proxies = [float(y) for _, p in pairs if p is not None for y in p.y if math.isfinite(y)]
    if not golds:
        return (0.0, 1.0), False
    room = max(golds) - min(golds) or 1.0
    floor, ceiling = min(golds) - 0.25 * room, max(golds) + 0.5 * room
    low = max(min([*golds, *ends, *proxies]), floor)
    high = min(max([*golds, *ends, *proxies]), ceiling)
    cut = any(not floor <= y <= ceiling for y in proxies + ends)
    margin = 0.04 * (high - low)
    return (low - margin, high + margin), cut


def _fits_section(shown: Sequence[_Shown]) -> Section | None:
    rows: list[list[Cell]] = []
    for s in shown:
        if s.fit is None:
            continue
        law = s.fit.law
        rows.append(
            [
                s.name,
                law.alpha,
                law.beta,
                _decimal(law.peak_kl, 1) if law.peak_kl < 1e5 else None,
                s.fit.peak_gold if law.peak_kl < 1e5 else None,
                _decimal(s.summary.kl_peak, 1),
                s.summary.gold_peak.mean,
                law.rms_error,
            ]
        )
    if not rows:
        return None
    table = Table(
        columns=[
            "method",
            "alpha",
            "beta",
            "predicted\npeak KL",
            "predicted\npeak gold",
            "observed\npeak KL",
            "observed\npeak gold",
            "rms\nerror",
        ],
        rows=rows,
        caption="The laws' parameters, fitted to the mean curves by least squares.",
        notes="A peak without numbers lies out of reach: the law does not fall. A predicted peak "
        "far beyond the last KL is an extrapolation. The error is in units of the gold reward.",
    )
    return Section(title="Fitted laws", tables=[table])


# --- over the course of optimisation ---


def _stability_section(keep: _Keeper, groups: Mapping[str, Sequence[_Shown]]) -> Section | None:
    figures = [
        figure
        for name, group in groups.items()
        if (figure := _place_figure(keep, "gold", name, group)) is not None
    ]
    if not figures:
        return None
    return Section(
        title="Gold over the course of optimisation",
        text="Where a line still rises at its end, more optimisation may help; where it falls, "
        "stopping at the right moment would have to be known without the gold reward.",
        figures=figures,
    )


_OVER_PLACES = {
    "spread": (
        "Spread between the members",
        "std between members",
        "How far the members of a reward disagree on the policy's own answers: it should grow "
        "where the reward is no longer to be trusted.",
    ),
    "agreement": (
        "Agreement of the proxy with gold",
        "share of pairs",
        "In what share of pairs of the policy's own answers the proxy prefers the one with more "
        "gold. At a half (the thin line) the proxy has nothing left to teach.",
    ),
}


def _over_places_section(
    keep: _Keeper, groups: Mapping[str, Sequence[_Shown]], key: str
) -> Section | None:
    title, y_label, text = _OVER_PLACES[key]
    figures = [
        figure
        for name, group in groups.items()
        if (figure := _place_figure(keep, key, name, group, y_label=y_label)) is not None
    ]
    return Section(title=title, text=text, figures=figures) if figures else None


def _place_figure(
    keep: _Keeper, key: str, name: str, group: Sequence[_Shown], *, y_label: str = "gold reward"
) -> FigureHtml | None:
    """Draw a quantity of a group's methods against how far they were optimised."""
    known = [s for s in group if _any_finite(s.means(key))]
    if not known:
        return None
    place = known[0].summary.place_name
    same = [s for s in known if s.summary.place_name == place]
    band = key == "gold" and len(same) <= _MOST_BANDS
    curves = [
        s.curve(s.places(), [p.gold for p in s.points], band=band)
        if key == "gold"
        else s.curve(s.places(), [Estimate(mean=v) for v in s.means(key)], band=False)
        for s in same
    ]
    figure = _curves(
        curves,
        title=name[0].upper() + name[1:],
        y_label=y_label,
        x_label=_PLACE_LABELS[place],
        x_scale=_PLACE_SCALES[place],
        peaks=key == "gold",
        line=0.5 if key == "agreement" else None,
    )
    file = f"{key}_over_{place.replace('/', '_')}_{name.replace(' ', '_').replace('-', '_')}"
    return keep.figure(
        file, figure, "Means over seeds" + (", peaks dotted." if key == "gold" else ".")
    )


def _curves(
    curves: Sequence[Curve],
    *,
    title: str,
    y_label: str,
    x_label: str = "KL from the reference policy (nats)",
    x_scale: Scale = "sqrt",
    peaks: bool = False,
    marked: bool = False,
    line: float | None = None,
) -> Figure:
    """Curves on common axes that keep their height whatever the legend takes."""
    legend = legend_height([curve.name for curve in curves]) if len(curves) > 1 else 0.0
    figure = curve_figure(
        curves,
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_scale=x_scale,
        peaks=peaks,
        marked=marked,
        size=(4.5, 3.0 + legend),
    )
    if line is not None:
        figure.axes[0].axhline(line, color=INK, linewidth=0.8, alpha=0.7)
    return figure


def _kl_section(keep: _Keeper, shown: Sequence[_Shown], baseline: str) -> Section | None:
    """Compare the estimators of the KL in one method: the baseline, or the first that has two."""
    order = sorted(shown, key=lambda s: s.method.name != baseline)
    keys = ("kl/exact", "kl/k1", "kl/k2", "kl/k3")
    for s in order:
        known = [key for key in keys if _any_finite(s.means(key))]
        if len(known) < 2:
            continue
        curves = [
            Curve(name=key, x=s.places(), y=s.means(key), dashed=key == "kl/exact") for key in known
        ]
        place = s.summary.place_name
        figure = _curves(
            curves,
            title=f"KL: {s.name}",
            y_label="nats a completion",
            x_label=_PLACE_LABELS[place],
            x_scale=_PLACE_SCALES[place],
        )
        # One heavy tail would flatten all other lines.
        sizes = [v for c in curves[:2] for v in c.y if math.isfinite(v)]
        top = figure.axes[0].get_ylim()[1]
        figure.axes[0].set_ylim(top=min(top, 3 * max(sizes)) if max(sizes) > 0 else top)
        return Section(
            title="Estimators of the KL",
            text="`k1` is unbiased and may be negative; `k2` is biased, the more so the further "
            "the policy has moved; `k3` is unbiased with a heavy tail (Schulman 2020).",
            figures=[keep.figure("kl_estimators", figure, "Means over seeds, cut where far off.")],
        )
    return None


def _peak_section(keep: _Keeper, shown: Sequence[_Shown]) -> Section:
    summaries = [s.summary for s in shown]
    starts = [s.gold_start.mean for s in summaries]
    figure = peak_and_end_figure(
        [s.name for s in shown],
        peaks=[s.gold_peak.mean for s in summaries],
        ends=[s.gold_end.mean for s in summaries],
        low=[s.gold_end.low for s in summaries],
        high=[s.gold_end.high for s in summaries],
        colors=[s.color for s in shown],
        title="Gold reward at its peak and at the end",
        x_label="gold reward",
        reference=sum(starts) / len(starts) if all(map(math.isfinite, starts)) else None,
    )
    caption = (
        "Ring: the peak of the mean curve. Dot: the end, with its interval. Dashed: the reference "
        "policy."
    )
    return Section(title="Peak and end", figures=[keep.figure("peak_and_end", figure, caption)])


# --- the rewards themselves ---


@dataclass(frozen=True, kw_only=True)
class _Reward:
    names: list[str]  # of the methods that share it
    reliability: PooledReliability


def _rewards(shown: Sequence[_Shown]) -> list[_Reward]:
    """Return each distinct reward once: methods that share one have identical probabilities."""
    found: dict[object, list[_Shown]] = {}
    for s in shown:
        key = tuple(
            (run.seed, tuple(run.probabilities), tuple(run.outcomes))
            for run in s.method.runs
            if run.probabilities
        )
        if key:
            found.setdefault(key, []).append(s)
    rewards = []
    for sharing in found.values():
        reliability = pooled_reliability(sharing[0].method)
        if reliability is not None:
            rewards.append(_Reward(names=[s.name for s in sharing], reliability=reliability))
    return rewards


def _reliability_section(keep: _Keeper, rewards: Sequence[_Reward]) -> Section | None:
    if not rewards:
        return None
    curves = {_title_of(r.names): r.reliability.curve for r in rewards}
    remarks = {_title_of(r.names): _remark(r.reliability) for r in rewards}
    together = reliability_panels(curves, title="Reliability on held-out pairs", remarks=remarks)
    apart = {n: reliability_panels({"": c}, remarks={"": remarks[n]}) for n, c in curves.items()}
    rows: list[list[Cell]] = [
        [
            "; ".join(r.names),
            _interval_text(r.reliability.accuracy),
            r.reliability.ece,
            r.reliability.brier,
            r.reliability.pairs,
        ]
        for r in rewards
    ]
    table = Table(
        columns=["methods with this reward", "accuracy", "ECE", "Brier score", "pairs"],
        rows=rows,
        caption="Each reward on the annotator's choices between held-out answers of the reference "
        "policy.",
        notes="Where the annotator errs, not even gold agrees with every choice. ± over seeds. ECE "
        "and Brier score are of all seeds' pairs together; a reward that says nothing has a Brier "
        "score of 0.25.",
    )
    caption = (
        "How often the first answer was preferred against the chance that the reward gave it; on "
        "the dashed diagonal a probability means what it says. Columns: how many pairs."
    )
    return Section(
        title="Reliability of the rewards",
        tables=[table],
        figures=[keep.panels("reliability", together, apart, caption)],
    )


def _remark(found: PooledReliability) -> str:
    return f"accuracy {found.accuracy.mean:.2f}\nECE {found.ece:.3f}"


def _title_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _weights_section(keep: _Keeper, shown: Sequence[_Shown]) -> Section | None:
    """Sweep the weight of the nominal reward, for each optimiser that has two weights."""
    figures = []
    for optimiser in dict.fromkeys(s.method.optimiser for s in shown):
        own = [
            (s.method.nominal_weight, s.summary)
            for s in shown
            if s.method.optimiser == optimiser and s.method.nominal_weight is not None
        ]
        own.sort(key=lambda pair: pair[0])
        weights = [weight for weight, _ in own]
        if len(set(weights)) < 2:
            continue
        curves = [
            _weight_curve("gold at the end", weights, [s.gold_end for _, s in own], dashed=False),
            _weight_curve("gold at its peak", weights, [s.gold_peak for _, s in own], dashed=True),
        ]
        name = _FAMILIES.get(optimiser, optimiser.upper())
        figure = _curves(
            curves,
            title=name[0].upper() + name[1:],
            x_label="weight of the nominal reward",
            y_label="gold reward",
            x_scale="linear",
            marked=True,
        )
        figures.append(
            keep.figure(f"nominal_weight_{optimiser}", figure, "Means and intervals over seeds.")
        )
    if not figures:
        return None
    return Section(
        title="The weight of the nominal reward",
        text="The reward-robust mix is this weight times the nominal reward and the rest times "
        "the worst case: 0 is the worst case alone, 1 the nominal reward alone.",
        figures=figures,
    )


def _weight_curve(
    name: str, weights: Sequence[float], estimates: Sequence[Estimate], *, dashed: bool
) -> Curve:
    return Curve(
        name=name,
        x=weights,
        y=[e.mean for e in estimates],
        low=[e.low for e in estimates],
        high=[e.high for e in estimates],
        dashed=dashed,
        color=SERIES_LIGHT[1 if dashed else 0],
    )


def _win_section(keep: _Keeper, shown: Sequence[_Shown], rates: WinRates) -> Section | None:
    known = [i for i in range(len(shown)) if not math.isnan(float(rates.mean[i, i]))]
    if len(known) < 2:
        return None
    names = [shown[i].name for i in known]
    values = [[float(rates.mean[i, j]) for j in known] for i in known]
    figure = matrix_figure(names, values, title="Win rate of the row against the column (%)")
    rows: list[list[Cell]] = []
    for place, i in enumerate(known):
        cells: list[Cell] = [
            None
            if i == j or math.isnan(float(rates.mean[i, j]))
            else _share_text(
                float(rates.mean[i, j]), float(rates.low[i, j]), float(rates.high[i, j])
            )
            for j in known
        ]
        rows.append([f"{place + 1}  {names[place]}", *cells])
    table = Table(
        columns=["row against column", *(str(place + 1) for place in range(len(known)))],
        rows=rows,
        caption="Win rates of the row against the column in per cent, ± half of the 95 % interval "
        "over seeds.",
    )
    caption = (
        "How often, in per cent, the row's last policy answers a prompt with more gold than the "
        "column's; ties count half. Blue wins, orange loses."
    )
    return Section(
        title="Win rates",
        figures=[keep.figure("win_rates", figure, caption)],
        tables=[table],
    )


def _configuration_section(config: str, environment: Mapping[str, Any]) -> Section | None:
    details = []
    if config:
        details.append(Details(summary="config.yaml", text=config.rstrip()))
    if environment:
        text = "\n".join(f"{key}: {value}" for key, value in environment.items())
        details.append(Details(summary="environment.json", text=text))
    return Section(title="Configuration", details=details) if details else None


# --- numbers ---


def _numbers(
    shown: Sequence[_Shown], baseline: str, rates: WinRates, rewards: Sequence[_Reward]
) -> dict[str, Any]:
    """Return what `comparison.json` holds."""
    methods = []
    for s in shown:
        summary = dataclasses.asdict(s.summary)
        fit = {**dataclasses.asdict(s.fit), "peak_gold": s.fit.peak_gold} if s.fit else None
        curve = [dataclasses.asdict(point) for point in s.points]
        methods.append({**summary, "fit": fit, "curve": curve})
    reliability = [
        {
            "methods": r.names,
            "accuracy": dataclasses.asdict(r.reliability.accuracy),
            "ece": r.reliability.ece,
            "brier": r.reliability.brier,
            "pairs": r.reliability.pairs,
        }
        for r in rewards
    ]
    wins = {
        "names": list(rates.names),
        "mean": rates.mean.tolist(),
        "low": rates.low.tolist(),
        "high": rates.high.tolist(),
        "seeds": rates.seeds.tolist(),
    }
    found = {
        "baseline": baseline,
        "methods": methods,
        "reliability": reliability,
        "win_rates": wins,
    }
    plain: dict[str, Any] = _finite(found)
    return plain


def _finite(value: Any) -> Any:
    """Return the value with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval_text(estimate: Estimate | None) -> Cell:
    """Return `0.61 ± 0.02`, without the interval where there is none."""
    if estimate is None or math.isnan(estimate.mean):
        return None
    return _plus_minus(estimate.mean, estimate.half_width, 2 if abs(estimate.mean) < 100 else 1)


def _plus_minus(mean: float, half: float, decimals: int) -> str:
    text = f"{mean:.{decimals}f}"
    text = text if float(text) else f"{0:.{decimals}f}"  # never -0.00
    if math.isfinite(half):
        text += f" ± {half:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _share_text(mean: float, low: float, high: float) -> str:
    return _plus_minus(100 * mean, 50 * (high - low), 0)


def _decimal(value: float, decimals: int) -> Cell:
    """Return a number with these decimals, nothing for NaN."""
    if abs(value) >= 1e6:
        return value
    return _plus_minus(value, math.nan, decimals) if math.isfinite(value) else None


def _any_finite(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)
