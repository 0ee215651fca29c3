"""The page of a table of families: what each reward's uncertainty is worth, and what it costs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trueward.evaluate.comparison import Estimate
from trueward.evaluate.preferences import mean_interval
from trueward.report.figures import dots_figure
from trueward.report.html import Details, Section, Table, render_report
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, decimal, interval_text
from trueward.report.run import configuration_details, markdown, versions_line
from trueward.train.run_folder import write_text

_GLOSSARY = {
    "accuracy": "Share of held-out pairs of which the reward tells the chosen completion.",
    "ECE": "Expected calibration error, 15 bins: how far the probability sigmoid(margin) that the "
    "higher reward (of the members' mean) is the chosen one lies from how often it is.",
    "AUROC": "Chance that a completion which was tampered with has a higher uncertainty than the "
    "chosen one it was made from; 0.5 says nothing. Of the total uncertainty where members have "
    "stds of their own, else of what there is.",
    "told by the reward": "The same asked of the reward itself: the chance that it is lower for "
    "the completion that was tampered with. A single head has nothing else.",
    "passes": "Floating-point operations of scoring, over those of the single head.",
}


@dataclass(frozen=True, kw_only=True)
class FamilyRuns:
    """One row of the table: its numbers by seed, and what was said of its first seed."""

    name: str
    label: str
    numbers: Mapping[int, Mapping[str, float]]
    verdicts: Sequence[str] = ()

    def estimate(self, key: str, less: "FamilyRuns | None" = None) -> Estimate | None:
        """Return the mean over seeds, or of the paired differences to another row.

        None where a number is not defined for all of the seeds that the row has.
        """
        seeds = [s for s in self.numbers if less is None or s in less.numbers]
        values = [self.numbers[s].get(key, math.nan) for s in seeds]
        if less is not None:
            theirs = [less.numbers[s].get(key, math.nan) for s in seeds]
            values = [v - t for v, t in zip(values, theirs, strict=True)]
        if not values or any(math.isnan(v) for v in values):
            return None
        mean = sum(values) / len(values)
        if len(values) == 1:
            return Estimate(mean=mean)
        low, high = mean_interval(torch.tensor(values))
        return Estimate(mean=mean, low=low, high=high)


def families_report(
    folder: str | Path,
    rows: Sequence[FamilyRuns],
    *,
    baseline: str,
    title: str,
    sets: Sequence[str],
    behind: str = "",
    config_text: str,
    environment: Mapping[str, Any],
) -> Path:
    """Write `report.html`, `table.md`, `families.json` and `figures/`; return the page's path.

    Args:
        folder: Where to write.
        rows: Those with runs, in the table's order.
        baseline: Name of the single head.
        title: The page's heading.
        sets: Names of the sets of preferences.
        behind: What the cost leaves out, where it does.
        config_text: The configuration, shown verbatim.
        environment: Versions and device.
    """
    root = Path(folder)
    rows = [row for row in rows if row.numbers]
    first = next(row for row in rows if row.name == baseline)
    kinds = _kinds(rows)
    tables = [
        _accuracy_table(rows, first, sets),
        _calibration_table(rows),
        _auroc_table(rows, kinds),
        _cost_table(rows, behind),
    ]
    keep = Keeper(root / "figures")
    seeds = sorted({len(row.numbers) for row in rows})
    figures = []
    differences, aurocs = _differences(rows, first), _aurocs(rows, kinds)
    if differences:
        drawn = dots_figure(
            differences,
            title="Accuracy, less the single head's",
            x_label="difference of shares",
            middle=0.0,
        )
        caption = "Accuracy less the single head's, paired over seeds, with 95 % intervals."
        figures.append(keep.figure("accuracy_difference", drawn, caption))
    if aurocs:
        drawn = dots_figure(aurocs, title="AUROC, mean over kinds", x_label="AUROC", middle=0.5)
        caption = "How well the uncertainty tells completions that were tampered with."
        figures.append(keep.figure("auroc", drawn, caption))
    said = [
        Details(summary=row.label, text="\n".join(row.verdicts)) for row in rows if row.verdicts
    ]
    page = render_report(
        title=title,
        lead=f"{len(rows)} rewards over {seeds[-1]} {'seed' if seeds[-1] == 1 else 'seeds'}, "
        "diagnosed on prompts that none of them was trained on.",
        preface=[Details(summary="What the words mean", terms=_GLOSSARY)],
        sections=[
            Section(title="Results", tables=tables, figures=figures),
            Section(title="Verdicts", text="Of the first seed, in words.", details=said),
            Section(title="Configuration", details=configuration_details(config_text, environment)),
        ],
        footer=versions_line(environment),
    )
    write_text(root / "table.md", "\n\n".join(markdown(table) for table in tables) + "\n")
    plain = {row.name: {str(s): dict(n) for s, n in row.numbers.items()} for row in rows}
    write_text(root / "families.json", json.dumps(plain, indent=1) + "\n")
    write_text(root / "report.html", page)
    return root / "report.html"


def _accuracy_table(rows: Sequence[FamilyRuns], first: FamilyRuns, sets: Sequence[str]) -> Table:
    body: list[list[Cell]] = []
    for row in rows:
        cells: list[Cell] = [row.label, _three(row.estimate("accuracy"))]
        cells.append(None if row is first else _three(row.estimate("accuracy", less=first)))
        body.append(cells + [_three(row.estimate(f"accuracy/{name}")) for name in sets])
    return Table(
        columns=["reward", "accuracy", "less the\nsingle head", *sets],
        rows=body,
        caption="Pairs told right on held-out prompts.",
        notes="± is half of the 95 % interval over seeds (Student's t); differences are paired.",
    )


def _calibration_table(rows: Sequence[FamilyRuns]) -> Table:
    columns = ("correlation with error", "correlation with wrong order", "correlation of members")
    body: list[list[Cell]] = []
    for row in rows:
        cells: list[Cell] = [row.label, *(_three(row.estimate(key)) for key in ("ECE", "Brier"))]
        body.append(cells + [interval_text(row.estimate(key)) for key in columns])
    return Table(
        columns=["reward", "ECE", "Brier", *(c.replace(" ", "\n", 1) for c in columns)],
        rows=body,
        caption="Calibration, and whether the uncertainty of a pair's margin tells its error.",
        notes="Rank correlations; 0 says nothing. Of members: of their rewards, 1 is the same.",
    )


def _auroc_table(rows: Sequence[FamilyRuns], kinds: Sequence[str]) -> Table:
    body: list[list[Cell]] = []
    for row in rows:
        own = [row.estimate(f"AUROC {kind}") for kind in kinds]
        by_reward = [row.estimate(f"reward AUROC {kind}") for kind in kinds]
        if any(own):
            body.append([row.label, "uncertainty", *map(interval_text, own)])
        body.append([row.label, "reward", *map(interval_text, by_reward)])
    return Table(
        columns=["reward", "told by", *kinds],
        rows=body,
        caption="Area under the ROC curve for completions outside of the data.",
        notes="0.5 is chance; below it, such completions look more certain than the data's own.",
    )


def _cost_table(rows: Sequence[FamilyRuns], behind: str) -> Table:
    body: list[list[Cell]] = []
    for row in rows:
        seconds = row.estimate("training seconds")
        body.append(
            [
                row.label,
                interval_text(row.estimate("passes")),
                interval_text(row.estimate("seconds ratio")),
                None if seconds is None else decimal(seconds.mean, 0),
            ]
        )
    return Table(
        columns=["reward", "passes", "seconds, over the\nsingle head's", "training,\nseconds"],
        rows=body,
        caption="What scoring costs beside the single head, and training (post-hoc: without it).",
        notes=f"Counted and timed {behind}." if behind else "",
    )


def _kinds(rows: Sequence[FamilyRuns]) -> list[str]:
    kinds: dict[str, None] = {}
    for row in rows:
        for numbers in row.numbers.values():
            for key in numbers:
                if key.startswith("reward AUROC "):
                    kinds[key.removeprefix("reward AUROC ")] = None
    return list(kinds)


def _differences(rows: Sequence[FamilyRuns], first: FamilyRuns) -> dict[str, Estimate]:
    found = {row.label: row.estimate("accuracy", less=first) for row in rows if row is not first}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _aurocs(rows: Sequence[FamilyRuns], kinds: Sequence[str]) -> dict[str, Estimate]:
    found = {}
    for row in rows:
        numbers = {
            seed: {"mean": sum(n[f"AUROC {k}"] for k in kinds) / len(kinds)}
            for seed, n in row.numbers.items()
            if all(f"AUROC {k}" in n for k in kinds)
        }
        estimate = FamilyRuns(name=row.name, label=row.label, numbers=numbers).estimate("mean")
        if estimate is not None:
            found[row.label] = estimate
    return found


def _three(estimate: Estimate | None) -> Cell:
    """Return `0.612 ± 0.021`: accuracies differ in the third digit."""
    if estimate is None:
        return None
    text = decimal(estimate.mean, 3)
    half = decimal(estimate.half_width, 3)
    return f"{text} ± {half}" if half is not None else text
