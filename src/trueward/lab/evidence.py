"""What holds: claims of the papers, held against the stored results of comparisons.

A comparison's numbers are stored small enough for git, seed by seed. A claim (`lab.claims`) is a
list of contrasts, each a number for each seed and the side of a bound on which its interval must
lie; the page says of each claim what was measured and what came of it.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

import yaml
from matplotlib.figure import Figure

from trueward.data.sources import DataError
from trueward.evaluate.comparison import Estimate, SeedRun, estimate_of
from trueward.lab.cells import read_result, stage_seconds
from trueward.lab.claims import CLAIMS, GRAMMAR, Contrast
from trueward.lab.plan import cell_folder
from trueward.report.figures import (
    Curve,
    overoptimization_figure,
    save_figure,
    settle_layout,
    several_dots_figure,
)
from trueward.report.numbers import decimal
from trueward.train.run_folder import write_text


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """Options of `trueward evidence`."""

    # Finished comparisons to store, by the name of the recipe that made them.
    add: dict[str, str] = field(default_factory=dict)
    results: str = "docs/evidence"  # folder of the stored results
    page: str = "docs/evidence.md"  # written from them; its figure lies in `figures` beside it


@dataclass(frozen=True, kw_only=True)
class StoredMethod:
    """A method's numbers: gold at each place of each seed, and agreements at the end."""

    label: str
    places: list[float]  # steps, or n
    gold: list[list[float]]  # [seed][place], in standard deviations of the reference's answers
    agreements: dict[str, list[float]] = field(default_factory=dict)  # by whose answers: [seed]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One comparison's results, as they are kept."""

    title: str
    command: str
    commit: str
    date: str
    seeds: list[int]
    seconds: float  # by the clocks of all stages, added up
    methods: dict[str, StoredMethod]


Verdict = Literal["holds", "holds in part", "does not hold here", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A contrast with what was seen; `side` is 1 as claimed, -1 against it, 0 not told apart."""

    contrast: Contrast
    estimate: Estimate | None  # None: not stored
    side: int


def run_evidence(config: EvidenceConfig) -> dict[str, str]:
    """Store the comparisons that are to be added, and write the page; return the verdicts.

    Raises:
        DataError: A folder holds no finished comparison, or nothing is stored.
    """
    results = Path(config.results)
    results.mkdir(parents=True, exist_ok=True)
    for name, folder in config.add.items():
        write_text(results / f"{name}.json", _as_json(store(name, Path(folder))))
    stored = {file.stem: read_stored(file) for file in sorted(results.glob("*.json"))}
    if not stored:
        raise DataError(
            f"{results} holds no results: add finished comparisons, as in --add compare_grammar "
            "runs/compare_grammar."
        )
    page = Path(config.page)
    page.parent.mkdir(parents=True, exist_ok=True)
    findings = {claim.name: [measure(c, stored) for c in claim.contrasts] for claim in CLAIMS}
    figures = {"evidence": _figure(findings)}
    if GRAMMAR in stored:
        figures["gold_by_reward"] = _gold_figure(stored[GRAMMAR])
    for name, figure in figures.items():
        _, pdf = save_figure(settle_layout(figure), page.parent / "figures" / name)
        pdf.unlink()  # of no use beside a page in Markdown
    write_text(page, evidence_page(stored, findings))
    return {claim.name: verdict_of(findings[claim.name]) for claim in CLAIMS}


# --- storing ---


def store(recipe: str, folder: Path) -> Stored:
    """Read the cells of a finished comparison that `recipes/RECIPE.yaml` made.

    Raises:
        DataError: The folder holds none, or not every method has every seed.
    """
    file = folder / "config.yaml"
    if not file.exists() or not (folder / "summary.json").exists():
        raise DataError(f"{folder} holds no finished comparison: let `trueward compare` end there.")
    config = yaml.safe_load(file.read_text("utf-8"))
    seeds = list(range(config["first_seed"], config["first_seed"] + config["seeds"]))
    methods = {}
    for name, options in config["methods"].items():
        runs = [read_result(cell_folder(folder, name, seed)) for seed in seeds]
        found = [run for run in runs if run is not None]
        if len(found) != len(seeds):
            raise DataError(
                f"{folder} has {len(found)} of {len(seeds)} seeds of {name}: run the comparison "
                "again, it goes on where it was."
            )
        methods[name] = _stored(options["label"] or name, found)
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    summary = folder / "summary.json"
    return Stored(
        title=config["title"],
        command=f"trueward compare --config recipes/{recipe}.yaml",
        commit=str(environment["revision"] or "")[:7],
        date=date.fromtimestamp(summary.stat().st_mtime).isoformat(),
        seeds=seeds,
        seconds=stage_seconds(folder),
        methods=methods,
    )


def _stored(label: str, runs: Sequence[SeedRun]) -> StoredMethod:
    points = [run.points for run in runs]
    place = next(key for key in ("n", "step", "1/beta") if key in points[0][0])
    agreements = {
        name: [round(run.agreements[name], 4) for run in runs] for name in runs[0].agreements
    }
    if agreements and "agreement" in points[0][-1]:
        agreements["own"] = [round(some[-1]["agreement"], 4) for some in points]
    return StoredMethod(
        label=label,
        places=[point[place] for point in points[0]],
        gold=[[round(point["gold"], 4) for point in some] for some in points],
        agreements=agreements,
    )


def read_stored(file: Path) -> Stored:
    """Read what `store` returned."""
    found = json.loads(file.read_text("utf-8"))
    methods = {name: StoredMethod(**method) for name, method in found.pop("methods").items()}
    return Stored(**found, methods=methods)


# --- measuring ---


def values_of(contrast: Contrast, stored: Stored) -> list[float]:
    """Return a contrast's number for each seed.

    Raises:
        KeyError: The comparison has not such a method, or no such agreement.
    """
    method = stored.methods[contrast.method]
    if contrast.kind == "agreement":
        one, other = (method.agreements[name] for name in contrast.whose)
        return [a - b for a, b in zip(one, other, strict=True)]
    if contrast.kind == "drop":
        return drops(method.gold)
    ends = [gold[-1] for gold in method.gold]
    if not contrast.less:
        return ends
    other_ends = [gold[-1] for gold in stored.methods[contrast.less].gold]
    return [a - b for a, b in zip(ends, other_ends, strict=True)]


def drops(gold: Sequence[Sequence[float]]) -> list[float]:
    """Return how far each seed ends below the place where the others' mean gold is highest.

    A peak chosen on the seed's own curve would be high by luck, and the drop above 0 where nothing
    falls.
    """
    found = []
    for i, own in enumerate(gold):
        others = [curve for j, curve in enumerate(gold) if j != i]
        means = [statistics.fmean(column) for column in zip(*others, strict=True)]
        found.append(own[means.index(max(means))] - own[-1])
    return found


def measure(contrast: Contrast, stored: dict[str, Stored]) -> Finding:
    """Return what was seen of a contrast, and whether it is as claimed."""
    comparison = stored.get(contrast.results)
    try:
        values = values_of(contrast, comparison) if comparison is not None else []
    except KeyError:
        values = []
    if len(values) < 2:
        return Finding(contrast=contrast, estimate=None, side=0)
    estimate = estimate_of(values)
    return Finding(contrast=contrast, estimate=estimate, side=side_of(contrast, estimate))


def side_of(contrast: Contrast, estimate: Estimate) -> int:
    """Return 1 where the whole interval is as claimed, -1 where all of it is against, else 0."""
    if contrast.above is not None:
        return (estimate.low > contrast.above) - (estimate.high < contrast.above)
    assert contrast.below is not None
    return (estimate.high < contrast.below) - (estimate.low > contrast.below)


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """Judge a claim: it holds where every contrast is as claimed, in part where some are."""
    if any(finding.estimate is None for finding in findings):
        return "not measured"
    sides = [finding.side for finding in findings]
    if all(side == 1 for side in sides):
        return "holds"
    return "holds in part" if 1 in sides else "does not hold here"


# --- the page ---


def evidence_page(stored: dict[str, Stored], findings: dict[str, list[Finding]]) -> str:
    """Return the page in Markdown."""
    lines = [
        "# Evidence",
        "",
        "Made by `trueward evidence` from the results stored in `docs/evidence`; claims, contrasts",
        "and bounds stand in `src/trueward/lab/claims.py`. Gold is in standard deviations of the",
        "reference policy's answers; ± is half of Student's 95 % interval over seeds; differences",
        "are paired by seed. A contrast is as claimed where its whole interval is (✓), against the",
        "claim where all of it is on the other side (✗), and else not told apart (·). A claim",
        "holds where every contrast is as claimed, in part where some are. A drop is claimed to be",
        "above 0 of what is said to fall, below 0.25 of what is said not to. These are small",
        "worlds: what does not hold here may hold at scale, and the other way round.",
        "",
        "![Every contrast with its interval](figures/evidence.png)",
        "",
        *(["![Gold of trained policies over their steps](figures/gold_by_reward.png)", ""])
        * (GRAMMAR in stored),
        "| claim | from | verdict |",
        "| --- | --- | --- |",
        *(f"| {c.claim} | {c.source} | **{verdict_of(findings[c.name])}** |" for c in CLAIMS),
        "",
    ]
    for claim in CLAIMS:
        lines += [
            f"## {claim.claim}",
            f"{claim.source}. Verdict: **{verdict_of(findings[claim.name])}**.",
            "",
            "| contrast | comparison | claimed | seen | |",
            "| --- | --- | --- | --- | --- |",
            *(_row(finding) for finding in findings[claim.name]),
            "",
        ]
    lines += [
        "## The comparisons",
        "| name | what | command | seeds | minutes, stages added up | commit | date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in stored.items():
        seeds = f"{one.seeds[0]} to {one.seeds[-1]}"
        lines.append(
            f"| {name} | {one.title}, {len(one.methods)} methods | `{one.command}` | {seeds} | "
            f"{one.seconds / 60:.0f} | {one.commit} | {one.date} |"
        )
    return "\n".join(lines) + "\n"


def _row(finding: Finding) -> str:
    contrast, estimate = finding.contrast, finding.estimate
    bound = contrast.above if contrast.above is not None else contrast.below
    claimed = f"{'above' if contrast.above is not None else 'below'} {bound:g}"
    if estimate is None:
        return f"| {contrast.words} | {contrast.results} | {claimed} | not measured | |"
    seen = f"{decimal(estimate.mean, 2)} ± {decimal(estimate.half_width, 2)}"
    mark = {1: "✓", 0: "·", -1: "✗"}[finding.side]
    return f"| {contrast.words} | {contrast.results} | {claimed} | {seen} | {mark} |"


def _figure(findings: dict[str, list[Finding]]) -> Figure:
    """Draw each contrast, turned so that right is as claimed and 0 the bound."""
    series: dict[str, dict[str, Estimate]] = {"as claimed": {}, "against": {}, "not told apart": {}}
    names = {1: "as claimed", -1: "against", 0: "not told apart"}
    rows: dict[str, Estimate] = {}
    for claim in CLAIMS:
        for finding in findings[claim.name]:
            label = f"{claim.name}: {finding.contrast.words}"
            rows[label] = Estimate(mean=math.nan)
            if finding.estimate is not None:
                series[names[finding.side]][label] = _towards(finding.contrast, finding.estimate)
    # The first series names the rows; NaN draws nothing.
    drawn = {name: rows | some for name, some in series.items()}
    figure = several_dots_figure(
        drawn, title="Claims held against measurements", x_label="beyond the bound", middle=0.0
    )
    # Differences of best-of-n are a hundredth of those between trained policies.
    figure.axes[0].set_xscale("symlog", linthresh=0.5)
    return figure


_DRAWN = ("single", "single_5x", "mean", "worst_case", "mix_4", "warm", "worst_kl_small", "gold")


def _gold_figure(stored: Stored) -> Figure:
    """Draw gold over the steps of some trained policies: means over seeds, peaks as rings."""
    drawn = {}
    for name in _DRAWN:
        method = stored.methods.get(name)
        if method is not None:
            means = [statistics.fmean(column) for column in zip(*method.gold, strict=True)]
            curve = Curve(name=method.label, x=method.places, y=means)
            drawn[method.label] = (curve, None)
    return overoptimization_figure(
        drawn,
        title=f"Gold while policies learn to please a reward, mean of {len(stored.seeds)} seeds",
        x_label="step",
        y_label="gold (std of the reference's answers)",
        x_scale="linear",
        y_range=_SHOWN,
        size=(6.5, 4.2),
    )


_SHOWN = (-3.0, 2.5)  # what falls further leaves the figure


def _towards(contrast: Contrast, estimate: Estimate) -> Estimate:
    if contrast.above is not None:
        shift, sign = contrast.above, 1
    else:
        shift, sign = contrast.below or 0.0, -1
    ends = sorted(sign * (x - shift) for x in (estimate.low, estimate.high))
    return Estimate(mean=sign * (estimate.mean - shift), low=ends[0], high=ends[1])


def _as_json(stored: Stored) -> str:
    """Return one line for each seed of a method: small, and easy to compare."""
    return re.sub(r"\n {5,}|\n {4}(?=\])", " ", json.dumps(asdict(stored), indent=1)) + "\n"
