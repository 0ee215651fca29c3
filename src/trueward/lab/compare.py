"""`trueward compare`: methods times seeds in a world, over processes, each cell in its folder."""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console, Group
from rich.live import Live

from trueward.data.rows import text_of
from trueward.data.sources import DataError
from trueward.evaluate.comparison import MethodRuns, SeedRun, peak_place
from trueward.lab import exact, recorded
from trueward.lab.cells import best_of_n_cell, optimise_cell, read_evaluation, read_result
from trueward.lab.exact import ExactWorld
from trueward.lab.gold_model import GoldModelWorld
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import (
    Lab,
    LanguageConfig,
    RewardSpec,
    build_reference,
    build_shared,
    compare_answers,
    draw_pool,
    optimise_first,
    reward_specs,
    score_pool,
    train_member,
)
from trueward.lab.methods import TRAINED, Method
from trueward.lab.processes import Outcome, State, Task, only_one, run_tasks
from trueward.lab.recorded import RecordedWorld
from trueward.report.comparison import comparison_report, rich_comparison_table
from trueward.report.html import Completion, SampleRow
from trueward.train.run_folder import (
    RunFolder,
    environment,
    finished_summary,
    to_plain,
    write_text,
)

logger = logging.getLogger(__name__)
console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
WorldName = Literal["exact", "grammar", "gold_model", "recorded"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, where, and over how many seeds."""

    output_dir: str = "runs/compare"
    world: WorldName = "grammar"
    methods: dict[str, Method] = field(default_factory=dict)
    baseline: str = "single"  # the method that the others are held against
    seeds: int = 3
    first_seed: int = 0
    processes: int = 0  # 0 = as many as there are cores
    title: str = ""  # of the report
    exact: ExactWorld = field(default_factory=ExactWorld)
    grammar: GrammarWorld = field(default_factory=GrammarWorld)
    gold_model: GoldModelWorld = field(default_factory=GoldModelWorld)
    recorded: RecordedWorld = field(default_factory=RecordedWorld)
    language: LanguageConfig = field(default_factory=LanguageConfig)  # grammar, gold_model

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of every method."""
        return list(range(self.first_seed, self.first_seed + self.seeds))


# What may differ between a comparison and its resume: more methods and seeds add cells.
_FREE = ("methods", "baseline", "seeds", "first_seed", "processes", "title")


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
        folder = RunFolder(out, command="compare", config=config, free=_FREE)
        started, before = time.monotonic(), _seconds_so_far(out)
        steps = config.language.steps
        failed: dict[str, Outcome] = {}
        if config.language.long and _trains(config):
            failed |= _run(config, scouting_tasks(config), out)
            steps = long_steps(config, out)
        failed |= _run(config, cell_tasks(config, steps), out)
        methods = read_methods(config, out)
        write_text(out / "seconds.json", json.dumps(before + time.monotonic() - started))
        if not any(m.runs for m in methods):
            raise DataError(_failures(failed, out))
        console.print(rich_comparison_table(methods, config.baseline))
        page = write_report(config, methods, steps)
        console.print(f"Report: {page}", highlight=False)
        if failed:
            raise DataError(_failures(failed, out))
        metrics = {m.name: {"gold": _mean([r.points[-1]["gold"] for r in m.runs])} for m in methods}
        return folder.finish(
            metrics, seed=config.first_seed, seconds=before + time.monotonic() - started
        )


def check(config: CompareConfig) -> None:
    """Refuse what cannot be run, before anything is.

    Raises:
        DataError: In one sentence.
    """
    if not config.methods:
        raise DataError("There is nothing to compare: name at least one method under `methods:`.")
    if config.baseline not in config.methods:
        known = ", ".join(config.methods)
        raise DataError(f"The baseline '{config.baseline}' is none of the methods: {known}.")
    if config.seeds < 1:
        raise DataError(f"seeds must be at least 1, got {config.seeds}.")
    defaults = CompareConfig()
    language = config.world in ("grammar", "gold_model")
    for name in ("exact", "grammar", "gold_model", "recorded"):
        if name != config.world and getattr(config, name) != getattr(defaults, name):
            raise DataError(f"`{name}` sets dials of another world than `world: {config.world}`.")
    if not language and config.language != defaults.language:
        raise DataError(f"`language` is for worlds of language, not for `world: {config.world}`.")
    can = {"exact": ("closed_form",), "recorded": ("best_of_n",)}.get(
        config.world, (*TRAINED, "best_of_n")
    )
    for name, method in config.methods.items():
        if not name or any(c in name for c in "/\\. ") or name != name.strip("-_"):
            raise DataError(
                f"The method's name '{name}' must do as a folder's: letters, digits, - and _; what "
                "figures shall say is its `label`."
            )
        if method.optimiser not in can:
            raise DataError(
                f"methods.{name}: the world '{config.world}' has no optimiser "
                f"'{method.optimiser}', only {', '.join(can)}."
            )
    trains = config.methods[config.baseline].optimiser in TRAINED
    if language and config.language.long and not trains:
        raise DataError(
            f"language.long asks when the baseline peaks in training, but '{config.baseline}' "
            "trains no policy."
        )


# --- tasks ---


def cell_tasks(config: CompareConfig, steps: int) -> list[Task]:
    """Return every cell with what it stands on, seeds first: the first rows fill early."""
    tasks: dict[str, Task] = {}
    for seed in config.all_seeds:
        for name, method in config.methods.items():
            folder = cell_folder(Path(config.output_dir), name, seed)
            for task in _cell(config, f"{name}/seed-{seed}", method, seed, steps, folder):
                tasks.setdefault(task.name, task)
    return list(tasks.values())


def scouting_tasks(config: CompareConfig) -> list[Task]:
    """Return the baseline's cells of `steps` steps, which tell where its gold peaks."""
    tasks: dict[str, Task] = {}
    method = config.methods[config.baseline]
    for seed in config.all_seeds:
        folder = scout_folder(Path(config.output_dir), config.baseline, seed)
        name = f"scout/{config.baseline}/seed-{seed}"
        for task in _cell(config, name, method, seed, config.language.steps, folder):
            tasks.setdefault(task.name, task)
    return list(tasks.values())


def cell_folder(out: Path, name: str, seed: int) -> Path:
    """Where a cell writes."""
    return out / "cells" / name / f"seed-{seed}"


def scout_folder(out: Path, name: str, seed: int) -> Path:
    """Where a cell of the scouting run writes."""
    return out / "scout" / name / f"seed-{seed}"


def long_steps(config: CompareConfig, out: Path) -> int:
    """Return `long` times the step at which the baseline's mean gold peaks.

    `steps` where it has not peaked by then: nobody knows how far the peak is.
    """
    runs = [read_result(scout_folder(out, config.baseline, s)) for s in config.all_seeds]
    found = [run for run in runs if run is not None]
    if not found:
        return config.language.steps
    baseline = config.methods[config.baseline]
    scouted = MethodRuns(
        name=config.baseline, label=config.baseline, optimiser=baseline.optimiser, runs=found
    )
    peak = int(peak_place(scouted))
    if peak == config.language.steps:
        logger.warning(
            "The baseline has not peaked within %d steps, so the runs are no longer than that: "
            "raise language.steps.",
            peak,
        )
        return peak
    every = config.language.evaluate_every
    steps = max(every, math.ceil(config.language.long * peak / every) * every)
    logger.info("The baseline peaks at step %d: all methods run for %d.", peak, steps)
    return steps


def _cell(
    config: CompareConfig, name: str, method: Method, seed: int, steps: int, folder: Path
) -> list[Task]:
    """Return a cell's task after those that it needs."""
    quick: dict[str, tuple[object, object]] = {
        "exact": (exact.run_cell, config.exact),
        "recorded": (recorded.run_cell, config.recorded),
    }
    if config.world in quick:
        arguments = (*quick[config.world], method, seed, folder)
        return [Task(name=name, function=quick_cell, arguments=arguments)]
    dials = config.grammar if config.world == "grammar" else config.gold_model
    lab = Lab(world=dials, config=config.language, out=Path(config.output_dir))
    tasks = _ground(lab, method, seed)
    needs = tuple(task.name for task in tasks)
    if method.optimiser == "best_of_n":
        what: tuple[Any, ...] = (best_of_n_cell, lab, method, seed, folder)
    else:
        what = (optimise_cell, lab, method, seed, steps, folder)
    return [*tasks, Task(name=name, function=what[0], arguments=what[1:], needs=needs)]


def _ground(lab: Lab, method: Method, seed: int) -> list[Task]:
    """Return the stages of a seed that a method stands on, in an order that can be run."""

    def task(
        name: str, function: Callable[..., object], *rest: object, after: str | tuple[str, ...]
    ) -> Task:
        needs = (after,) if isinstance(after, str) else after
        return Task(name=name, function=function, arguments=(lab, seed, *rest), needs=needs)

    at = f"ground/seed-{seed}"
    tasks = [
        Task(name="shared", function=build_shared, arguments=(lab,)),
        task(f"{at}/reference", build_reference, after="shared"),
        task(f"{at}/comparisons", compare_answers, after=f"{at}/reference"),
    ]
    specs = reward_specs(method)
    refined = any(spec.refine for spec in specs)
    if refined:
        first = reward_specs(Method())[0]
        tasks.append(
            task(f"{at}/rewards/{first.name}", train_member, first, after=f"{at}/comparisons")
        )
        tasks.append(task(f"{at}/first", optimise_first, after=f"{at}/rewards/{first.name}"))
    for spec in specs:
        after = f"{at}/first" if spec.refine else f"{at}/comparisons"
        tasks.append(task(_reward_task(at, spec), train_member, spec, after=after))
    if method.optimiser == "best_of_n":
        tasks.append(task(f"{at}/pool", draw_pool, after=f"{at}/comparisons"))
        for spec in specs:
            needs = (f"{at}/pool", _reward_task(at, spec))
            tasks.append(task(f"{at}/pool/{spec.name}", score_pool, spec, after=needs))
    return tasks


def _reward_task(at: str, spec: RewardSpec) -> str:
    return f"{at}/rewards/{spec.name}"


def quick_cell(
    run_cell: Callable[[Any, Method, int], SeedRun],
    world: object,
    method: Method,
    seed: int,
    folder: Path,
) -> None:
    """Compute a cell that trains nothing, and write its result."""
    run = RunFolder(folder, command="compare", config={"world": world, "method": method})
    if finished_summary(folder) is not None:
        return
    result = run_cell(world, method, seed)
    write_text(folder / "result.json", json.dumps(asdict(result)))
    run.finish({"gold": result.points[-1]["gold"]}, seed=seed, seconds=result.seconds)


# --- running and reading ---


def _run(config: CompareConfig, tasks: Sequence[Task], out: Path) -> dict[str, Outcome]:
    """Run tasks under a live table; return those that failed or were skipped."""
    left = [task for task in tasks if not _is_done(task)]
    done = {task.name for task in tasks} - {task.name for task in left}
    left = [replace(t, needs=tuple(n for n in t.needs if n not in done)) for t in left]
    if done and left:
        console.print(f"{len(done)} of {len(tasks)} stages are there already.", highlight=False)
    if not left:
        return {}
    with Progress(config, out, total=len(tasks), done=len(done)) as progress:
        outcomes = run_tasks(left, processes=config.processes, on_change=progress.show)
    return {name: o for name, o in outcomes.items() if o.state != "done"}


def _is_done(task: Task) -> bool:
    """Tell whether a cell's folder, the last of its arguments, holds a finished run."""
    folder = task.arguments[-1]
    return isinstance(folder, Path) and finished_summary(folder) is not None


class Progress:
    """A live table on a terminal; elsewhere a line for each finished task."""

    def __init__(self, config: CompareConfig, out: Path, *, total: int, done: int) -> None:
        self._config, self._out = config, out
        self._total, self._done_before = total, done
        self._said: set[str] = set()
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
        if self._live is None:
            for name in over:
                if name not in self._said:
                    self._said.add(name)
                    count = self._done_before + len(self._said)
                    console.print(f"{count}/{self._total} {name}: {states[name]}", highlight=False)
            return
        everything = len(over) == len(states)
        if time.monotonic() - self._drawn < 1 and not everything:
            return
        self._drawn = time.monotonic()
        running = [name for name, state in states.items() if state == "running"]
        line = f"{self._done_before + len(over)} of {self._total} stages; running: "
        methods = read_methods(self._config, self._out, known=self._read)
        table = rich_comparison_table(methods, self._config.baseline)
        self._live.update(Group(table, line + ", ".join(running)), refresh=True)


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
        found.append(
            MethodRuns(
                name=name,
                label=method.label or name,
                optimiser=method.optimiser,
                nominal_weight=(
                    objective.nominal_weight if objective.name == "reward_robust" else None
                ),
                runs=[run for run in runs if run is not None],
            )
        )
    return found


def write_report(config: CompareConfig, methods: Sequence[MethodRuns], steps: int) -> Path:
    """Write figures and page from the finished cells; return the page's path."""
    out = Path(config.output_dir)
    full = [m for m in methods if m.runs]
    missing = [f"{m.name} has {len(m.runs)}" for m in methods if len(m.runs) < config.seeds]
    lead = (
        f"{len(full)} methods over {config.seeds} {'seed' if config.seeds == 1 else 'seeds'} in "
        f"the world `{config.world}`."
    )
    notes = []
    if _trains(config):
        notes.append(f"Policies were optimised for {steps} steps.")
    if config.world == "recorded":
        notes.append(config.recorded.open(seed=config.first_seed).report)
    if missing:
        notes.append(f"Not all of the {config.seeds} seeds are there: {', '.join(missing)}.")
    return comparison_report(
        out,
        full,
        title=config.title or f"Comparison in the world {config.world}",
        lead=lead,
        baseline=config.baseline,
        samples=side_by_side(config, full),
        notes=" ".join(notes),
        config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
        environment=environment(),
    )


def side_by_side(
    config: CompareConfig, methods: Sequence[MethodRuns], *, prompts: int = 4
) -> list[SampleRow]:
    """Return answers of the first seed: before, at the baseline's peak, after; and another's end.

    The other is the method of the same optimiser that ends highest.
    """
    out, seed = Path(config.output_dir), config.first_seed
    by_name = {m.name: m for m in methods}
    baseline = by_name.get(config.baseline)
    if baseline is None or not (_evaluations(out, baseline.name, seed)):
        return []
    places = _evaluations(out, baseline.name, seed)
    peak = int(peak_place(baseline))
    peers = [m for m in methods if m.optimiser == baseline.optimiser and m is not baseline]
    best = max(peers, key=lambda m: _mean([r.points[-1]["gold"] for r in m.runs]), default=None)
    wanted = [
        ("before", baseline, places[0]),
        (f"{baseline.label}, at its peak ({peak})", baseline, peak),
        (f"{baseline.label}, after ({places[-1]})", baseline, places[-1]),
    ]
    if best is not None and _evaluations(out, best.name, seed):
        last = _evaluations(out, best.name, seed)[-1]
        wanted.append((f"{best.label}, after ({last})", best, last))
    found = [
        (label, read_evaluation(cell_folder(out, m.name, seed), place))
        for label, m, place in wanted
    ]
    return [
        SampleRow(
            prompt=text_of(found[0][1]["prompts"][i]),
            completions=[
                Completion(
                    text=text_of(e["answers"][i]),
                    label=label,
                    scores={"gold": e["gold"][i], "proxy": e["proxy"][i]},
                )
                for label, e in found
            ],
        )
        for i in range(min(prompts, len(found[0][1]["prompts"])))
    ]


def _evaluations(out: Path, name: str, seed: int) -> list[int]:
    folder = cell_folder(out, name, seed) / "evaluations"
    return sorted(int(file.stem) for file in folder.glob("*.json"))


def _trains(config: CompareConfig) -> bool:
    return any(m.optimiser in TRAINED for m in config.methods.values())


def _failures(failed: Mapping[str, Outcome], out: Path) -> str:
    """Return one sentence on what failed; the traces are in a file."""
    broken = {name: o for name, o in failed.items() if o.state == "failed"}
    text = "\n\n".join(f"{name}\n{o.traceback}" for name, o in broken.items())
    write_text(out / "failures.txt", text)
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
