"""The page of rewards refined on recorded samples: what their choices are worth."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trueward.evaluate.comparison import Estimate
from trueward.evaluate.preferences import mean_interval
from trueward.report.figures import dots_figure
from trueward.report.html import Section, Table, render_report
from trueward.report.keeper import Keeper
from trueward.report.numbers import Cell, decimal
from trueward.report.run import configuration_details, markdown, versions_line
from trueward.train.run_folder import write_text


@dataclass(frozen=True, kw_only=True)
class RefinementRuns:
    """One row of the table, with what every prompt and seed has."""

    name: str
    label: str
    values: Mapping[int, Mapping[str, Mapping[str, float]]]  # seed -> column -> prompt's key
    numbers: Mapping[int, Mapping[int, Mapping[str, float]]]  # seed -> fold -> of the reward
    made: Mapping[str, float]  # of its synthetic preferences, in the mean over folds and seeds

    def by_prompt(self, column: str) -> dict[str, float]:
        """Return the mean over the seeds for each prompt that all seeds have."""
        seeds = [columns.get(column, {}) for columns in self.values.values()]
        if not seeds:
            return {}
        common = set(seeds[0]).intersection(*seeds[1:])
        return {k: sum(s[k] for s in seeds) / len(seeds) for k in seeds[0] if k in common}

    def estimate(self, column: str, less: "RefinementRuns | None" = None) -> Estimate:
        """Return the mean over prompts with its 95 % interval, or that of paired differences.

        Prompts are what the answers to a next prompt would be drawn like; a prompt's value is its
        mean over the seeds, so that seeds do not count as more prompts than there are.
        """
        own = self.by_prompt(column)
        if less is not None:
            theirs = less.by_prompt(column)
            own = {k: v - theirs[k] for k, v in own.items() if k in theirs}
        return _estimate(list(own.values()))

    def over_seeds(self, column: str, less: "RefinementRuns | None" = None) -> list[float]:
        """Return each seed's mean over the prompts, or that of the paired differences."""
        found = []
        for seed, columns in self.values.items():
            own = columns.get(column, {})
            if less is not None:
                theirs = less.values.get(seed, {}).get(column, {})
                own = {k: v - theirs[k] for k, v in own.items() if k in theirs}
            if own:
                found.append(sum(own.values()) / len(own))
        return found

    def number(self, key: str) -> Estimate:
        """Return the mean of a reward's number over seeds and folds, with the folds' interval."""
        folds: dict[int, list[float]] = {}
        for seed in self.numbers.values():
            for fold, found in seed.items():
                if key in found:
                    folds.setdefault(fold, []).append(found[key])
        return _estimate([sum(v) / len(v) for v in folds.values()])


def _estimate(values: Sequence[float]) -> Estimate:
    if not values:
        return Estimate(mean=math.nan)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean=mean, seeds=1)
    low, high = mean_interval(torch.tensor(values, dtype=torch.float64))
    return Estimate(mean=mean, low=low, high=high, seeds=len(values))


def refinements_report(
    folder: str | Path,
    rows: Sequence[RefinementRuns],
    *,
    baseline: str,
    controls: Sequence[str],
    title: str,
    config_text: str,
    environment: Mapping[str, Any],
) -> Path:
    """Write `report.html`, `table.md`, `refinements.json` and `figures/`; return the page's path.

    Args:
        folder: Where to write.
        rows: In the table's order; those without runs are left out.
        baseline: Name of the first reward's row.
        controls: Names of the rows that were trained again with nothing new; differences to the
            first of them stand beside those to the baseline.
        title: The page's heading.
        config_text: The configuration, shown verbatim.
        environment: Versions and device.
    """
    root = Path(folder)
    rows = [row for row in rows if row.values]
    first = next(row for row in rows if row.name == baseline)
    control = next((row for row in rows if row.name in controls), None)
    table = _table(rows, first, control)
    keep = Keeper(root / "figures")
    figures = []
    drawn = {r.label: r.estimate("gold", first) for r in rows if r is not first}
    drawn = {label: e for label, e in drawn.items() if math.isfinite(e.low)}
    if drawn:
        figure = dots_figure(
            drawn,
            title="Gold of the choice, less the first reward's",
            x_label="difference of gold",
            middle=0.0,
        )
        caption = "Differences paired by prompt, with 95 % intervals over prompts."
        figures.append(keep.figure("gold_difference", figure, caption))
    prompts = len(first.by_prompt("gold"))
    seeds = len(first.values)
    configuration = configuration_details(config_text, environment)
    page = render_report(
        title=title,
        lead=f"{len(rows)} ways to choose among recorded answers to {prompts} prompts that none of "
        f"the rewards was trained or refined on, over {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'}.",
        sections=[
            Section(title="Results", tables=[table], figures=figures),
            *([Section(title="Configuration", details=configuration)] if configuration else []),
        ],
        footer=versions_line(environment),
    )
    write_text(root / "table.md", markdown(table))
    write_text(root / "refinements.json", json.dumps(_numbers(rows, first, control), indent=1))
    target = root / "report.html"
    write_text(target, page)
    return target


def _table(
    rows: Sequence[RefinementRuns], first: RefinementRuns, control: RefinementRuns | None
) -> Table:
    columns = ["reward", "gold of\nits choice", "less the\nfirst reward's"]
    columns += ["less the\ncontrol's"] if control is not None else []
    columns += ["pairs of answers\nordered as gold", "less the\nfirst reward's"]
    columns += ["pair accuracy", "words", "pairs made\nof 100 prompts", "their chosen\nlonger, %"]
    cells: list[list[Cell]] = []
    for row in rows:
        same = row is first
        line: list[Cell] = [row.label, plain(row.estimate("gold"))]
        line.append(None if same else plain(row.estimate("gold", first)))
        if control is not None:
            line.append(None if row is control else plain(row.estimate("gold", control)))
        line.append(plain(row.estimate("agreement")))
        line.append(None if same else plain(row.estimate("agreement", first)))
        line.append(plain(row.number("pair accuracy")))
        line.append(decimal(row.estimate("length").mean, 0))
        made = row.made.get("accepted")
        share = None if made is None else 100 * made / row.made["prompts"]
        line.append(None if share is None else decimal(share, 0))
        longer = row.made.get("chosen_longer")
        line.append(None if longer is None else decimal(100 * longer, 0))
        cells.append(line)
    return Table(
        columns=columns,
        rows=cells,
        caption="What gold says of the answer that each reward chooses among all judged ones.",
        notes="± is half of the 95 % interval, over prompts for choices and orders (each prompt's "
        "mean over the seeds; differences are paired by prompt), over folds for pair accuracy. An "
        "interval over prompts does not hold what the seeds of training add.",
    )


def plain(estimate: Estimate) -> Cell:
    """Return `1.342 ± 0.026`, three decimals; None where there is nothing."""
    if math.isnan(estimate.mean):
        return None
    text, half = decimal(estimate.mean, 3), decimal(estimate.half_width, 3)
    return text if half is None else f"{text} ± {half}"


def _numbers(
    rows: Sequence[RefinementRuns], first: RefinementRuns, control: RefinementRuns | None
) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        columns = list(dict.fromkeys(c for seed in row.values.values() for c in seed))
        found.append(
            {
                "name": row.name,
                "label": row.label,
                "made": dict(row.made),
                "pair accuracy": _plain(row.number("pair accuracy")),
                "columns": {
                    column: {
                        "mean": _plain(row.estimate(column)),
                        "less first": _plain(row.estimate(column, first)),
                        "less control": _plain(row.estimate(column, control)) if control else None,
                        "seeds": row.over_seeds(column),
                        "seeds less first": row.over_seeds(column, first),
                    }
                    for column in columns
                },
            }
        )
    return found


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in asdict(estimate).items()
    }
