"""`trueward compare`: methods times seeds in a world, over processes, each cell in its folder."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.live import Live

from trueward.console import main_console
from trueward.data.rows import text_of
from trueward.data.sources import DataError
from trueward.evaluate.comparison import (
    MethodRuns,
    SeedRun,
    peak_place,
    peaks_at_end,
    place_name,
    summarise,
)
from trueward.lab.cells import read_evaluation, read_result
from trueward.lab.plan import (
    MAY_CHANGE,
    CompareConfig,
    cell_folder,
    cell_tasks,
    check,
    scout_folder,
    scouting_tasks,
    trains_policies,
)
from trueward.lab.processes import Outcome, State, Task, only_one, run_tasks
from trueward.report.comparison import comparison_report, rich_comparison_table
from trueward.report.html import Completion, SampleRow
from trueward.report.numbers import format_number
from trueward.train.run_folder import RunFolder, environment, to_plain, write_text

logger = logging.getLogger(__name__)
console = main_console()


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Run every cell that is not finished, and write the report.

    Raises:
        DataError: The configuration asks for what the world cannot do, or cells failed.
    """
    check(config)
    if config.world == "recorded":  # what cannot be used is told before, and in the page
        console.print(config.recorded.open(seed=config.first_seed).report, highlight=False)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        folder = RunFolder(out, command="compare", config=config, free=MAY_CHANGE)
        for stale in ("summary.json", "failures.txt"):  # of a run before this one
            (out / stale).unlink(missing_ok=True)
        started, before = time.monotonic(), _seconds_so_far(out)
        steps = config.language.steps
        if config.language.long and trains_policies(config):
            steps = long_steps(config, out)
        failed = _run(config, cell_tasks(config, steps), out)
        seconds = before + time.monotonic() - started
        write_text(out / "seconds.json", json.dumps(seconds))
        methods = read_methods(config, out)
        console.print(rich_comparison_table(methods, config.baseline))
        if failed:
            write_failures(failed, out)
        if any(m.runs for m in methods):
            console.print(f"Report: {write_report(config, methods)}", highlight=False)
        if failed:
            raise DataError(_failure(failed, out))
        metrics = {m.name: {"gold": _mean([r.points[-1]["gold"] for r in m.runs])} for m in methods}
        return folder.finish(metrics, seed=config.first_seed, seconds=seconds)


def long_steps(config: CompareConfig, out: Path) -> int:
    """Return how long policies are trained: `long` times the steps to the baseline's peak.

    Found once, by running the baseline for `steps`, and kept in `scout/steps.json`: methods and
    seeds that are added later run as long as the others.

    Raises:
        DataError: A scouting run failed, or the baseline's mean gold peaks at its start or end.
    """
    kept = out / "scout" / "steps.json"
    if kept.exists():
        return int(json.loads(kept.read_text("utf-8")))
    failed = _run(config, scouting_tasks(config), out)
    if failed:
        write_failures(failed, out)
        raise DataError(_failure(failed, out))
    runs = [read_result(scout_folder(out, config.baseline, s)) for s in config.all_seeds]
    scouted = MethodRuns(
        name=config.baseline,
        label=config.baseline,
        optimiser=config.methods[config.baseline].optimiser,
        runs=[run for run in runs if run is not None],
    )
    peak, every = int(peak_place(scouted)), config.language.evaluate_every
    if peak in (0, config.language.steps):
        raise DataError(
            f"The baseline's gold is highest at step {peak} of {config.language.steps}, so there "
            "is no peak to measure the length by: change language.steps or "
            "language.learning_rate, or set language.long to 0."
        )
    steps = max(every, math.ceil(config.language.long * peak / every) * every)
    logger.info("The baseline peaks at step %d: all methods run for %d.", peak, steps)
    write_text(kept, json.dumps(steps))
    return steps


# --- running and reading ---


def _run(config: CompareConfig, tasks: Sequence[Task], out: Path) -> dict[str, Outcome]:
    """Run tasks under a live table; return those that failed or were skipped.

    Finished ones are asked too: each ends at once, after it has seen that its folder holds what is
    wanted and not, say, another method's cell of the same name.
    """
    with Progress(config, out, total=len(tasks)) as progress:
        outcomes = run_tasks(tasks, processes=config.processes, on_change=progress.show)
    return {name: o for name, o in outcomes.items() if o.state != "done"}


class Progress:
    """A live table on a terminal; elsewhere a line every ten seconds, and for each failure."""

    def __init__(self, config: CompareConfig, out: Path, *, total: int) -> None:
        self._config, self._out, self._total = config, out, total
        self._failed: set[str] = set()  # and said
        self._drawn = 0.0
        self._read: dict[Path, SeedRun] = {}  # finished cells: each is read once
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *stopped: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, states: Mapping[str, State]) -> None:
        """Show what has changed."""
        over = [name for name, state in states.items() if state in ("done", "failed", "skipped")]
        running = [name for name, state in states.items() if state == "running"]
        for name, state in states.items():
            if state == "failed" and name not in self._failed:
                self._failed.add(name)
                console.print(f"{name}: failed", highlight=False)
        pause = 1 if self._live else 10
        if time.monotonic() - self._drawn < pause and len(over) < self._total:
            return
        self._drawn = time.monotonic()
        line = f"{len(over)} of {self._total} stages; running: {', '.join(running) or 'none'}"
        if self._live is None:
            console.print(line, highlight=False)
            return
        methods = read_methods(self._config, self._out, known=self._read)
        table = rich_comparison_table(methods, self._config.baseline)
        self._live.update(Group(table, line), refresh=True)


def read_methods(
    config: CompareConfig, out: Path, *, known: dict[Path, SeedRun] | None = None
) -> list[MethodRuns]:
    """Return every method with the cells that are finished, in the configuration's order.

    `known` cells are not read again, and those that are read become known.
    """
    known = {} if known is None else known
    for folder in (cell_folder(out, n, s) for n in config.methods for s in config.all_seeds):
        if folder not in known and (run := read_result(folder)) is not None:
            known[folder] = run
    found = []
    for name, method in config.methods.items():
        runs = [known.get(cell_folder(out, name, seed)) for seed in config.all_seeds]
        objective = method.objective
        # Worst case and nominal reward are the mix's two ends.
        weights = {"worst_case": 0.0, "nominal": 1.0, "reward_robust": objective.nominal_weight}
        found.append(
            MethodRuns(
                name=name,
                label=method.label or name,
                optimiser=method.optimiser,
                nominal_weight=weights.get(objective.name) if method.members > 1 else None,
                runs=[run for run in runs if run is not None],
            )
        )
    return found


def write_report(config: CompareConfig, methods: Sequence[MethodRuns]) -> Path:
    """Write figures and page from the finished cells; return the page's path."""
    full = [m for m in methods if m.runs]
    baseline = next((m for m in full if m.name == config.baseline), full[0])
    lead = (
        f"{len(full)} methods over {config.seeds} {'seed' if config.seeds == 1 else 'seeds'} in "
        f"the world `{config.world}`. {_what_became_of_gold(baseline)}"
    )
    notes = []
    trained = {int(r.points[-1]["step"]) for m in full for r in m.runs if "step" in r.points[-1]}
    if trained:
        notes.append(f"Policies were optimised for {max(trained)} steps.")
    if config.world == "recorded":
        notes.append(config.recorded.open(seed=config.first_seed).report)
    missing = [f"{m.name} has {len(m.runs)}" for m in methods if len(m.runs) < config.seeds]
    if missing:
        notes.append(f"Not all of the {config.seeds} seeds are there: {', '.join(missing)}.")
    return comparison_report(
        config.output_dir,
        methods,
        title=config.title or f"Comparison in the world {config.world}",
        lead=lead,
        baseline=baseline.name,
        samples=side_by_side(config, full, baseline),
        notes=" ".join(notes),
        config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
        environment=environment(),
    )


def _what_became_of_gold(method: MethodRuns) -> str:
    """Return a sentence on a method's gold reward: from where, to which peak, to which end."""
    found = summarise(method)
    estimates = (found.gold_start, found.gold_peak, found.gold_end, found.proxy_end)
    start, peak, end, proxy = (format_number(e.mean, 2) for e in estimates)
    place = f"{place_name(method)} {found.peak_place:g}"
    said = f"Under {method.label}, gold goes from {start} to {peak} at {place}"
    if peaks_at_end(method):
        return f"{said}, its highest and its end."
    return f"{said} and ends at {end}, while the proxy goes to {proxy}."


def side_by_side(
    config: CompareConfig, methods: Sequence[MethodRuns], baseline: MethodRuns, *, prompts: int = 4
) -> list[SampleRow]:
    """Return answers of the first seed: before, at the baseline's peak, after; and another's end.

    The prompts are those at which the baseline's proxy and gold part most, so that the hacking is
    seen. The other is the learned reward of the same optimiser whose gold ends highest.
    """
    out, seed = Path(config.output_dir), config.first_seed
    places = _evaluations(out, baseline.name, seed)
    if not places:
        return []
    peers = [
        m
        for m in methods
        if m.optimiser == baseline.optimiser
        and m is not baseline
        and config.methods[m.name].reward not in ("gold", "random", "length")
    ]
    best = max(peers, key=lambda m: _mean([r.points[-1]["gold"] for r in m.runs]), default=None)
    peak, last = int(peak_place(baseline)), places[-1]
    wanted = [
        ("before", baseline, places[0]),
        (f"{baseline.label}, at its peak ({peak})", baseline, peak),
        (f"{baseline.label}, after ({last})", baseline, last),
    ]
    if best is not None and _evaluations(out, best.name, seed):
        end = _evaluations(out, best.name, seed)[-1]
        wanted.append((f"{best.label}, after ({end})", best, end))
    found = [
        (label, read_evaluation(cell_folder(out, m.name, seed), place))
        for label, m, place in wanted
    ]
    before, after = found[0][1], found[2][1]
    parted = [
        (p1 - p0) - (g1 - g0)
        for p0, p1, g0, g1 in zip(
            before["proxy"], after["proxy"], before["gold"], after["gold"], strict=True
        )
    ]
    most = sorted(range(len(parted)), key=lambda i: -parted[i])[:prompts]
    return [
        SampleRow(
            prompt=text_of(before["prompts"][i]),
            completions=[
                Completion(
                    text=text_of(e["answers"][i]),
                    label=label,
                    scores={"gold": e["gold"][i], "its own proxy": e["proxy"][i]},
                )
                for label, e in found
            ],
        )
        for i in most
    ]


def _evaluations(out: Path, name: str, seed: int) -> list[int]:
    folder = cell_folder(out, name, seed) / "evaluations"
    return sorted(int(file.stem) for file in folder.glob("*.json"))


def write_failures(failed: Mapping[str, Outcome], out: Path) -> None:
    """Write the traces of what failed into `failures.txt`."""
    broken = {name: o for name, o in failed.items() if o.state == "failed"}
    write_text(out / "failures.txt", "\n\n".join(f"{n}\n{o.traceback}" for n, o in broken.items()))


def _failure(failed: Mapping[str, Outcome], out: Path) -> str:
    """Return one sentence on what failed."""
    broken = {name: o for name, o in failed.items() if o.state == "failed"}
    name, first = next(iter(broken.items()))
    others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return (
        f"{name}{others} failed ({first.error.rstrip('.')}); {out / 'failures.txt'} has the "
        "traces, and running it again tries them again."
    )


def _seconds_so_far(out: Path) -> float:
    file = out / "seconds.json"
    return float(json.loads(file.read_text("utf-8"))) if file.exists() else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
