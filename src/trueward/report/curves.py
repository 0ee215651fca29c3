"""The methods of a comparison as figures draw them: names, families, colours, curves, laws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from trueward.evaluate.comparison import (
    KLS,
    SEEDS_FOR_INTERVAL,
    Estimate,
    MeanPoint,
    MethodFit,
    MethodRuns,
    MethodSummary,
    fit_law,
    over_seeds,
    summarise,
)
from trueward.report.figures import Curve, Law, Scale, curve_figure, legend_height
from trueward.report.svg import INK, SERIES_LIGHT

FAMILIES = {"closed_form": "optimal policies", "best_of_n": "best-of-n"}
TRAINED = "trained policies"  # the family of all other optimisers
PLACE_LABELS = {"step": "step", "n": "n, of which the proxy picks the best", "1/beta": "1 / β"}
PLACE_SCALES: Mapping[str, Scale] = {"step": "linear", "n": "log", "1/beta": "sqrt"}
_MOST_BANDS = 4  # curves on common axes whose bands can still be told apart


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A method with its statistics, and how figures draw it."""

    method: MethodRuns
    name: str
    family: str  # what shares its x and its law
    compared_with: str  # whom in the family it is compared with; itself for that one
    color: str
    dashed: bool  # from the ninth on, as the palette begins again
    points: list[MeanPoint]
    summary: MethodSummary
    fit: MethodFit | None

    def kl(self) -> list[float]:
        """Return the KL of each point that the method's KL is known by."""
        return self.means(self.summary.kl_name)

    def means(self, key: str) -> list[float]:
        """Return the mean of a key at each place, NaN where nothing is known."""
        return [point.means.get(key, math.nan) for point in self.points]

    def places(self) -> list[float]:
        """Return how far the policy was optimised at each point."""
        return [point.place for point in self.points]

    def curve(self, x: Sequence[float], estimates: Sequence[Estimate], *, band: bool) -> Curve:
        """Return a curve of this method's, without its points of unknown x."""
        known = [(a, e) for a, e in zip(x, estimates, strict=True) if math.isfinite(a)]
        return Curve(
            name=self.name,
            x=[a for a, _ in known],
            y=[e.mean for _, e in known],
            low=[e.band[0] for _, e in known] if band else None,
            high=[e.band[1] for _, e in known] if band else None,
            color=self.color,
            dashed=self.dashed,
        )

    def gold(self, x: Sequence[float], *, band: bool = True) -> Curve:
        """Return the gold reward against x."""
        return self.curve(x, [p.gold for p in self.points], band=band)

    def gold_and_proxy(self) -> tuple[Curve, Curve | None]:
        """Return both rewards against the KL."""
        proxy = self.curve(self.kl(), [p.proxy for p in self.points], band=False)
        return self.gold(self.kl()), proxy if any_finite(proxy.y) else None

    def law(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> Law | None:
        """Return the fitted law to where the KL ends, or on to the predicted peak in sight.

        None where the law does not describe the curve (see `MethodFit.describes`).
        """
        if self.fit is None or not self.fit.describes:
            return None
        law, height = self.fit.law, self.fit.peak_gold
        seen = 0 < law.peak_kl <= x_range[1] and y_range[0] <= height <= y_range[1]
        end = max(k for k in self.kl() if math.isfinite(k))
        end = min(max(end, 1.1 * law.peak_kl), x_range[1]) if seen else end
        nats = [end * (i / 60) ** 2 for i in range(61)]  # even in the square root
        curve = Curve(name="fitted law", x=nats, y=self.fit.gold_at(nats))
        return curve, (law.peak_kl, height) if seen else None


def shown_methods(methods: Sequence[MethodRuns], baseline: str) -> list[Shown]:
    """Return the methods that have runs, the baseline and its family first.

    Families stay together, as a place and a KL mean the same within one. Differences are within a
    family: to the baseline, or where that is not in it to the family's first method.
    """
    with_runs = [method for method in methods if any(run.points for run in method.runs)]
    names = [method.label or method.name for method in with_runs]
    families: dict[str, list[tuple[str, MethodRuns]]] = {}
    for method, name in zip(with_runs, names, strict=True):
        own = name if names.count(name) == 1 else f"{name} ({method.name})"
        families.setdefault(FAMILIES.get(method.optimiser, TRAINED), []).append((own, method))
    for members in families.values():
        members.sort(key=lambda member: member[1].name != baseline)
    order = sorted(families, key=lambda family: families[family][0][1].name != baseline)
    return [
        Shown(
            method=method,
            name=name,
            family=family,
            compared_with=families[family][0][0],
            # Figures show a family each, which has the palette to itself.
            color=SERIES_LIGHT[place % len(SERIES_LIGHT)],
            dashed=place // len(SERIES_LIGHT) % 2 == 1,
            points=over_seeds(method),
            summary=summarise(method, families[family][0][1]),
            fit=fit_law(method),
        )
        for family in order
        for place, (name, method) in enumerate(families[family])
    ]


def by_family(shown: Sequence[Shown]) -> dict[str, list[Shown]]:
    """Part the methods by what their x is and which law they follow."""
    groups: dict[str, list[Shown]] = {}
    for one in shown:
        groups.setdefault(one.family, []).append(one)
    return groups


def has_room_for_bands(curves: Sequence[object]) -> bool:
    """Whether so few curves stand on common axes that their bands can be told apart."""
    return len(curves) <= _MOST_BANDS


# --- axes ---


def common_axes(
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
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


def x_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return an axis of KLs, with some room beyond the last point."""
    found = [float(x) for curve in curves for x in curve.x]
    low, high = min(0.0, *found), max(found)
    # In the square root, 3 % of the width.
    return low, high * 1.03**2 if high > 0 else 1.0


def y_range(pairs: Sequence[tuple[Curve, Curve | None]]) -> tuple[tuple[float, float], bool]:
    """Return an axis on which gold can be read, and whether a curve or a band leaves it.

    Proxies, and bands over few prompts or seeds, may run far away; they get some room and are cut
    there.
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


# --- words ---


def kl_words(shown: Sequence[Shown]) -> str:
    """Return which KL these methods are known by: `exact`, `bound`, `k1` or several of them."""
    known = {s.summary.kl_name for s in shown}
    return " or ".join(name.removeprefix("kl/") for name in KLS if name in known)


def kl_label(shown: Sequence[Shown]) -> str:
    """Return an axis's label that says which KL it is."""
    return f"KL (nats, {kl_words(shown)})"


def band_words(shown: Sequence[Shown]) -> str:
    """Return what the bands around these methods' gold are; empty where there are none."""
    few, many = "the lowest to the highest seed", "the 95 % interval over seeds"
    seeds = [s.summary.seeds for s in shown]
    found = {few if n < SEEDS_FOR_INTERVAL else many for n in seeds if n > 1}
    if any(s.summary.gold_end.over_prompts for s in shown):
        found.add("of one seed the 95 % interval over prompts")
    if {few, many} <= found:
        found = found - {few} | {f"of fewer than {SEEDS_FOR_INTERVAL} {few}"}
    return ", ".join(sorted(found, key=lambda words: words.startswith("of ")))


def file_name(name: str) -> str:
    """Return a name as part of a file's."""
    return name.replace(" ", "_").replace("-", "_").replace("/", "_")


def any_finite(values: Sequence[float | int]) -> bool:
    """Whether anything is known."""
    return any(math.isfinite(value) for value in values)


def capital(name: str) -> str:
    """Return a name as the beginning of a sentence."""
    return name[0].upper() + name[1:]
