"""The report of a comparison of methods over seeds: figures, tables and one page."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from trueward.evaluate.comparison import (
    Estimate,
    MethodRuns,
    WinRates,
    summarise,
    win_rates,
)
from trueward.report.curves import (
    FAMILIES,
    PLACE_LABELS,
    PLACE_SCALES,
    Shown,
    any_finite,
    band_words,
    by_family,
    capital,
    common_axes,
    file_name,
    has_room_for_bands,
    kl_label,
    shown_methods,
    x_range,
    y_range,
)
from trueward.report.figures import (
    Curve,
    matrix_figure,
    overoptimization_figure,
    peak_and_end_figure,
)
from trueward.report.html import (
    Details,
    FigureHtml,
    PanelsHtml,
    SampleRow,
    Section,
    Table,
    render_report,
)
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, decimal, interval_text, share_text
from trueward.report.reliability import Reward, distinct_rewards, reliability_section
from trueward.report.run import configuration_details, rich_table, versions_line
from trueward.report.svg import INK, SERIES_LIGHT
from trueward.report.tables import agreements_section, fits_section, results_section
from trueward.train.run_folder import write_text

_PANEL = (3.0, 2.2)  # inches
_GLOSSARY = {
    "gold": "The reward that stands for what people want. It judges the policies and is never "
    "optimised, unless a method says so.",
    "proxy": "The learned reward that a method optimises in its place.",
    "reference policy": "The policy from which every method starts.",
    "KL, nats": "How far a policy has moved from the reference policy: the Kullback-Leibler "
    "divergence of a completion, in natural logarithms.",
    "best of n": "No training: of n answers of the reference policy, the one that the proxy likes "
    "best.",
    "cell": "One method under one seed, from its data to its last evaluation.",
    "spread": "The standard deviation between the members of an ensemble of rewards.",
    "agreement": "In what share of pairs of the policy's own answers the proxy prefers the one "
    "with more gold.",
    "nominal, worst case, mix": "The reward of one member, the lowest among the members, and a "
    "weighted sum of both.",
    "ECE, Brier score": "Calibration error: how far stated probabilities lie from observed "
    "frequencies. Brier score: the mean squared error of a probability; 0.25 for always a half.",
}


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
        methods: In the order of the tables, in which families stay together and the baseline leads.
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
    if baseline not in {method.name for method in methods}:
        known = ", ".join(method.name for method in methods)
        raise ValueError(f"the baseline {baseline!r} is none of the methods {known or '(none)'}.")
    shown = shown_methods(methods, baseline)
    if not shown:
        raise ValueError(f"none of {len(methods)} methods has a run: there is nothing to report.")
    keep = Keeper(root / "figures")
    groups = by_family(shown)
    rates = win_rates([s.method for s in shown])
    rewards = distinct_rewards(shown)
    configuration = configuration_details(config_text, environment)
    sections = [
        results_section(groups, methods, baseline, notes),
        Section(title="Answers side by side", samples=samples) if samples else None,
        *(_curves_section(keep, name, group) for name, group in groups.items()),
        _places_section(keep, groups, "gold"),
        _peak_section(keep, shown),
        _weights_section(keep, shown),
        _places_section(keep, groups, "spread"),
        _places_section(keep, groups, "agreement"),
        agreements_section(keep, shown),
        _places_section(keep, groups, "win_rate"),
        reliability_section(keep, rewards),
        _win_section(keep, shown, rates),
        fits_section(shown),
        _kl_section(keep, shown),
        Section(title="Configuration", details=configuration) if configuration else None,
    ]
    page = render_report(
        title=title,
        lead=lead,
        preface=[Details(summary="What the words mean", terms=_GLOSSARY)],
        sections=[section for section in sections if section is not None],
        footer=versions_line(environment),
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
                interval_text(summary.gold_end),
                interval_text(summary.gold_peak),
                None if summary.peaks_at_end else interval_text(summary.drop),
                decimal(summary.kl_end, 1),
                decimal(summary.seconds_mean, 1),
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


# --- gold and proxy against the KL ---


def _curves_section(keep: Keeper, name: str, group: Sequence[Shown]) -> Section | None:
    drawable = [s for s in group if any_finite(s.kl())]
    if not drawable:
        return None
    pairs = {s.name: s.gold_and_proxy() for s in drawable}
    width = x_range([gold for gold, _ in pairs.values()])
    height, cut = y_range(list(pairs.values()))
    laws = {s.name: law for s in drawable if (law := s.law(width, height)) is not None}
    title, x_label = f"Gold and proxy reward: {name}", kl_label(drawable)
    together = overoptimization_figure(
        pairs,
        title=title,
        x_label=x_label,
        panels=True,
        laws=laws,
        x_range=width,
        y_range=height,
    )
    apart = {
        key: overoptimization_figure(
            {key: pair},
            title="",
            x_label=x_label,
            laws=laws,
            x_range=width,
            y_range=height,
            legend=False,
            size=_PANEL,
        )
        for key, pair in pairs.items()
    }
    band = band_words(drawable)
    caption = (
        f"Solid: gold reward{f'; band: {band}' if band else ''}. Dashed: the proxy that was "
        "optimised. Dot: gold's highest point."
    )
    if laws:
        caption += " Dotted: the law, where it describes the curve; diamond: the peak it predicts."
    if cut:
        caption += " What leaves a panel is cut."
    figures: list[FigureHtml | PanelsHtml] = []
    if len(drawable) > 1:
        banded = has_room_for_bands(drawable)
        golds = [s.gold(s.kl(), band=banded) for s in drawable]
        overview = common_axes(
            golds, title=f"Gold reward: {name}", x_label=x_label, y_label="gold reward", peaks=True
        )
        words = "All gold rewards on common axes; a dot marks the peak."
        words += f" Band: {band}." if banded and band else ""
        figures.append(keep.figure(f"gold_{file_name(name)}", overview, words))
    figures.append(keep.panels(f"gold_and_proxy_{file_name(name)}", together, apart, caption))
    best_of_n = name == FAMILIES["best_of_n"]
    text = (
        "x is the KL on a square-root scale; gold is about "
        f"{'d (α − β d)' if best_of_n else 'd (α − β log d)'}, with d = √KL (Gao et al. 2022, "
        "arXiv 2210.10760)."
    )
    if best_of_n:
        text += " The KL is log n − (n − 1)/n: exact without ties, an upper bound with them."
    return Section(title=title, text=text, figures=figures)


def _kl_section(keep: Keeper, shown: Sequence[Shown]) -> Section | None:
    """Compare the estimators of the KL in one method, and in one that PPO trained."""
    known = {s.name: [key for key in _ESTIMATORS if any_finite(s.means(key))] for s in shown}
    several = [s for s in shown if len(known[s.name]) > 1]
    drawn = several[:1] + [s for s in several[1:] if s.method.optimiser == "ppo"][:1]
    if not drawn:
        return None
    figures = [_estimators_figure(keep, s, known[s.name]) for s in drawn]
    return Section(
        title="Estimators of the KL",
        text="`k1` is unbiased and may be negative; `k2` is biased, the more so the further "
        "the policy has moved; `k3` is unbiased with a heavy tail (Schulman 2020).",
        figures=figures,
    )


_ESTIMATORS = ("kl/k1", "kl/k2", "kl/k3", "kl/exact")  # as drawn: the exact one on top


def _estimators_figure(keep: Keeper, one: Shown, keys: Sequence[str]) -> FigureHtml:
    curves = [
        Curve(
            name=key.removeprefix("kl/"),
            x=one.places(),
            y=one.means(key),
            dashed=key == "kl/exact",
            color=INK if key == "kl/exact" else SERIES_LIGHT[_ESTIMATORS.index(key)],
        )
        for key in keys
    ]
    place = one.summary.place_name
    figure = common_axes(
        curves,
        title=f"KL: {one.name}",
        y_label="nats a completion",
        x_label=PLACE_LABELS[place],
        x_scale=PLACE_SCALES[place],
    )
    # One heavy tail would flatten all other lines.
    tame = [c for c in curves if c.name in ("exact", "k1")]
    largest = max((v for c in tame for v in c.y if math.isfinite(v)), default=0.0)
    top = figure.axes[0].get_ylim()[1]
    cut = 0 < 3 * largest < top
    figure.axes[0].set_ylim(top=3 * largest if cut else top)
    caption = "Means over seeds." + (" What leaves the axes is cut." if cut else "")
    return keep.figure(f"kl_estimators_{file_name(one.method.name)}", figure, caption)


# --- over the course of optimisation ---

_OVER_PLACES = {
    "gold": (
        "Gold over the course of optimisation",
        "gold reward",
        "Where a line still rises at its end, more optimisation may help; where it falls, "
        "stopping at the right moment would have to be known without the gold reward.",
    ),
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
    "win_rate": (
        "Wins against the reference policy",
        "share of pairs",
        "In what share of pairs of the policy's and the reference policy's answers the policy's "
        "has more gold; ties count half.",
    ),
}


def _places_section(
    keep: Keeper, groups: Mapping[str, Sequence[Shown]], key: str
) -> Section | None:
    title, _, text = _OVER_PLACES[key]
    drawn = (_place_figure(keep, key, name, group) for name, group in groups.items())
    figures = [figure for figure in drawn if figure is not None]
    return Section(title=title, text=text, figures=figures) if figures else None


def _place_figure(keep: Keeper, key: str, name: str, group: Sequence[Shown]) -> FigureHtml | None:
    """Draw a quantity of a family's methods against how far they were optimised."""
    known = [s for s in group if any_finite(s.means(key))]
    if not known:
        return None
    place = known[0].summary.place_name
    same = [s for s in known if s.summary.place_name == place]
    banded = key == "gold" and has_room_for_bands(same)
    curves = [
        s.gold(s.places(), band=banded)
        if key == "gold"
        else s.curve(s.places(), [Estimate(mean=v) for v in s.means(key)], band=False)
        for s in same
    ]
    figure = common_axes(
        curves,
        title=capital(name),
        y_label=_OVER_PLACES[key][1],
        x_label=PLACE_LABELS[place],
        x_scale=PLACE_SCALES[place],
        peaks=key == "gold",
        line=0.5 if key in ("agreement", "win_rate") else None,
    )
    caption = "Means over seeds" + ("; a dot marks the peak." if key == "gold" else ".")
    if banded and band_words(same):
        caption += f" Band: {band_words(same)}."
    return keep.figure(f"{key}_over_{file_name(place)}_{file_name(name)}", figure, caption)


def _peak_section(keep: Keeper, shown: Sequence[Shown]) -> Section:
    summaries = [s.summary for s in shown]
    starts = [s.gold_start.mean for s in summaries]
    figure = peak_and_end_figure(
        [s.name for s in shown],
        peaks=[s.gold_peak.mean for s in summaries],
        ends=[s.gold_end.mean for s in summaries],
        drops=[math.nan if s.peaks_at_end else s.drop.mean for s in summaries],
        low=[s.gold_end.band[0] for s in summaries],
        high=[s.gold_end.band[1] for s in summaries],
        colors=[s.color for s in shown],
        title="Gold reward at its peak and at the end",
        x_label="gold reward",
        reference=sum(starts) / len(starts) if all(map(math.isfinite, starts)) else None,
    )
    band = band_words(shown)
    caption = (
        f"Ring: the peak of the mean curve. Dot: the end{f'; line: {band}' if band else ''}. "
        "Dashed: the reference policy. There is no drop where the peak is the last place."
    )
    return Section(title="Peak and end", figures=[keep.figure("peak_and_end", figure, caption)])


def _weights_section(keep: Keeper, shown: Sequence[Shown]) -> Section | None:
    """Sweep the weight of the nominal reward, for each optimiser that has two weights."""
    figures = []
    for optimiser in dict.fromkeys(s.method.optimiser for s in shown):
        own = [
            (s.method.nominal_weight, s)
            for s in shown
            if s.method.optimiser == optimiser and s.method.nominal_weight is not None
        ]
        own.sort(key=lambda pair: pair[0])
        weights = [weight for weight, _ in own]
        if len(set(weights)) < 2:
            continue
        ends, peaks = ([getattr(s.summary, e) for _, s in own] for e in ("gold_end", "gold_peak"))
        name = FAMILIES.get(optimiser, optimiser.upper())
        figure = common_axes(
            [
                _weight_curve("gold at the end", weights, ends, dashed=False),
                _weight_curve("gold at its peak", weights, peaks, dashed=True),
            ],
            title=capital(name),
            x_label="weight of the nominal reward",
            y_label="gold reward",
            x_scale="linear",
            marked=True,
        )
        band = band_words([s for _, s in own])
        caption = "Means over seeds." + (f" Bands: {band}." if band else "")
        figures.append(keep.figure(f"nominal_weight_{optimiser}", figure, caption))
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
        low=[e.band[0] for e in estimates],
        high=[e.band[1] for e in estimates],
        dashed=dashed,
        color=SERIES_LIGHT[1 if dashed else 0],
    )


# --- win rates ---


def _win_section(keep: Keeper, shown: Sequence[Shown], rates: WinRates) -> Section | None:
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
            if i == j
            else share_text(
                float(rates.mean[i, j]), float(rates.low[i, j]), float(rates.high[i, j])
            )
            for j in known
        ]
        rows.append([f"{place + 1}  {names[place]}", *cells])
    table = Table(
        columns=["row against column", *(str(place + 1) for place in range(len(known)))],
        rows=rows,
        caption="Win rates of the row against the column in per cent, with the 95 % interval over "
        "seeds from three on.",
    )
    caption = (
        "How often, in per cent, the row's last policy answers a prompt with more gold than the "
        "column's; ties count half. Blue wins, orange loses."
    )
    return Section(
        title="Win rates",
        figures=[keep.figure("win_rates", figure, caption)],
        details=[Details(summary="The win rates as a table", table=table)],
    )


# --- numbers ---


def _numbers(
    shown: Sequence[Shown], baseline: str, rates: WinRates, rewards: Sequence[Reward]
) -> dict[str, Any]:
    """Return what `comparison.json` holds."""
    methods = []
    for s in shown:
        fit = None
        if s.fit is not None:
            own = {"peak_gold": s.fit.peak_gold, "describes": s.fit.describes}
            fit = dataclasses.asdict(s.fit) | own
        methods.append(
            {
                **dataclasses.asdict(s.summary),
                "family": s.family,
                "compared_with": s.compared_with,
                "fit": fit,
                "curve": [dataclasses.asdict(point) for point in s.points],
            }
        )
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
    plain: dict[str, Any] = _finite(
        {"baseline": baseline, "methods": methods, "reliability": reliability, "win_rates": wins}
    )
    return plain


def _finite(value: Any) -> Any:
    """Return the value with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
