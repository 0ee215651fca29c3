"""`trueward alarm`: alarms calibrated on stored runs of some worlds and seeds, judged on others.

The runs are made by `trueward compare` with a `monitor`: the signals of every step stand in the
metrics of each cell, gold in its evaluations. What is left is arithmetic on files.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from trueward.data.sources import DataError
from trueward.evaluate.alarm import (
    Aim,
    Found,
    Outcome,
    WatchedRun,
    calibrate,
    calibrate_steps,
    judge,
    summarise_outcomes,
)
from trueward.lab.cells import read_evaluation, stage_seconds
from trueward.lab.exact_path import ExactPaths, exact_runs
from trueward.lab.methods import TRAINED
from trueward.report.alarm import ALARM, ALONE, BUDGET, FIXED, Judged, Provenance, alarm_report
from trueward.train.alarm import PREFIX, SIGNALS, Calibration
from trueward.train.run_folder import (
    RunFolder,
    environment,
    finished_summary,
    to_plain,
    write_text,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WatchedWorld:
    """A comparison whose policies were watched."""

    folder: str = ""  # its output_dir, or a file of `store`
    command: str = ""  # that made it, for the page
    # The alarm is judged on all others that are there.
    calibration_seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AlarmStudyConfig:
    """Where the runs are, and how the alarm is chosen."""

    output_dir: str = "runs/alarm"
    worlds: dict[str, WatchedWorld] = field(default_factory=dict)
    exact: ExactPaths = field(default_factory=ExactPaths)  # runs of the exact world, made here
    signals: list[str] = field(default_factory=lambda: list(SIGNALS))  # that the alarm may use
    window: int = 5  # steps that signals are counted from
    max_false_alarms: float = 0.1  # share of the calibration's runs with gold as reward
    store: str = ""  # folder that the runs are also written to, a file for each world; empty: none
    page: str = ""  # Markdown with all tables, its figure in `figures` beside it; empty: none
    shown: str = ""  # the world whose first judged seed the figure shows; empty: the first
    title: str = ""  # of the report

    def __post_init__(self) -> None:
        unknown = [name for name in self.signals if name not in SIGNALS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no signal; there are {', '.join(SIGNALS)}.")
        if self.window < 2:
            raise ValueError(f"window must be at least 2 steps, got {self.window}.")
        if _EXACT in self.worlds:
            raise ValueError(f"'{_EXACT}' is the exact world's name: give that of worlds another.")
        if not 0 <= self.max_false_alarms <= 1:
            raise ValueError(f"max_false_alarms is a share in [0, 1], got {self.max_false_alarms}.")


def run_alarm(config: AlarmStudyConfig) -> dict[str, Any]:
    """Calibrate, judge, and write `warn.json`, `stop.json`, tables, `outcomes.json`, a report.

    A world that lacks a signal which a chosen rule reads is judged by rules of its own, from the
    same runs and the signals that it has (`warn_WORLD.json`, `stop_WORLD.json`).

    Raises:
        DataError: A folder holds no watched runs, or no seeds are left for one of the two parts.
    """
    read = {name: read_world(name, Path(one.folder)) for name, one in config.worlds.items()}
    if config.store:
        for name, one in read.items():
            store_world(one, Path(config.store) / f"{name}.json")
    runs = {name: one.runs for name, one in read.items()}
    own_seeds = {name: world.calibration_seeds for name, world in config.worlds.items()}
    if config.exact.seeds:
        runs[_EXACT], own_seeds[_EXACT] = exact_runs(config.exact), config.exact.calibration_seeds
    if not runs:
        raise DataError(
            "There is nothing to read: name comparisons under `worlds:`, or a --setting."
        )
    chosen: list[WatchedRun] = []
    others: list[WatchedRun] = []
    for name, some in runs.items():
        chosen += [run for run in some if run.seed in own_seeds[name]]
        others += [run for run in some if run.seed not in own_seeds[name]]
    if not chosen or not others:
        raise DataError(
            f"{len(chosen)} runs are for the calibration and {len(others)} for the judgement: give "
            "calibration_seeds that leave some of the runs to either."
        )
    out = Path(config.output_dir)
    # Nothing is kept from before: the same folder may be written with other options.
    folder = RunFolder(out, command="alarm", config=config, free=[f.name for f in fields(config)])
    rules = _rules(config, chosen, config.signals)
    by_world = dict.fromkeys(runs, rules)
    for name, some in runs.items():
        known = set.intersection(*(set(run.signals) for run in some))
        wanted = {
            signal
            for found in (*rules["warn"].values(), *rules["stop"].values())
            if isinstance(found.rule, Calibration)
            for signal in found.rule.weights
        }
        if wanted - known:
            by_world[name] = _rules(config, chosen, [s for s in config.signals if s in known])
    apart = {f"_{name}": own for name, own in by_world.items() if own is not rules}
    for name, own in ({"": rules} | apart).items():
        for aim, found in own.items():
            alarm = found[ALARM].rule
            assert isinstance(alarm, Calibration)
            alarm.save(out / f"{aim}{name}.json")
    judged = _judged(others, by_world)
    page = alarm_report(
        out,
        by_world,
        others,
        judged,
        calibration=_judged(chosen, by_world),
        max_false_alarms=config.max_false_alarms,
        apart=_EXACT,
        example=_example(config, others),
        markdown_page=Path(config.page) if config.page else None,
        made=[_provenance(one, config.worlds[name].command) for name, one in read.items()],
        title=config.title or "An alarm without gold",
        config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
        environment=environment(),
    )
    logger.info("Report: %s", page)
    return folder.finish(_numbers(rules, judged), seed=0)


_EXACT = "exact"  # the name of the exact world in tables
# What a rule may read, so that the table tells what the ensemble adds: `None` for all signals.
_KINDS: dict[str, tuple[str, ...] | None] = {
    ALARM: None,
    "alarm, KL alone": ("kl",),
    "alarm, no ensemble": ("length", "logprob", "energy_loss"),
    "alarm, members alone": ("spread", "gap", "spread_share", "disagreement", "width"),
}
Rules = dict[Aim, dict[str, Found]]


def _rules(config: AlarmStudyConfig, runs: Sequence[WatchedRun], signals: Sequence[str]) -> Rules:
    """Return the rules for either aim, all chosen on the same runs: the alarm and its rivals."""
    rules: Rules = {"warn": {}, "stop": {}}
    bound, window = config.max_false_alarms, config.window
    common = set.intersection(*(set(run.signals) for run in runs))
    try:
        for aim, found in rules.items():
            for kind, some in _KINDS.items():
                names = [s for s in signals if some is None or s in some]
                if some is None or common.intersection(names):
                    found[kind] = calibrate(
                        runs, aim=aim, signals=names, window=window, max_false_alarms=bound
                    )
            if "kl" in common.intersection(signals):
                for kind, most in ((BUDGET, bound), (f"{BUDGET}, {ALONE}", 1.0)):
                    found[kind] = calibrate(
                        runs, aim=aim, signals=["kl"], units=["raw"], max_false_alarms=most
                    )
            found[FIXED] = calibrate_steps(runs, aim=aim)
    except ValueError as error:
        raise DataError(f"No alarm can be calibrated: {error}") from error
    return rules


def _judged(runs: Sequence[WatchedRun], by_world: dict[str, Rules]) -> Judged:
    """Return the outcomes of every rule, by aim and kind; of the runs whose world has the kind."""
    judged: dict[Aim, dict[str, list[Outcome]]] = {"warn": {}, "stop": {}}
    for run in runs:
        for aim, found in by_world[run.world].items():
            for kind, one in found.items():
                judged[aim].setdefault(kind, []).append(judge(run, one.rule))
    return judged


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The runs of a world, and what they took."""

    runs: list[WatchedRun]
    commit: str
    date: str
    seconds: float  # by the clocks of all stages, added up


def read_world(name: str, source: Path) -> Watched:
    """Return the watched runs of a comparison's folder, or of a file of `store_world`.

    Raises:
        DataError: See `read_runs`; or the file holds something else.
    """
    if source.suffix == ".json":
        try:
            found = json.loads(source.read_text("utf-8"))
            runs = [
                WatchedRun(world=name, **run | {"halves": [(a, b) for a, b in run["halves"]]})
                for run in found.pop("runs")
            ]
            return Watched(runs=runs, **found)
        except OSError as error:
            raise DataError(f"The runs {source} cannot be read: {error.strerror}.") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{source} holds no watched runs: {error}") from error
    runs = read_runs(name, source)
    made = source / "environment.json"
    revision = json.loads(made.read_text("utf-8"))["revision"] if made.exists() else None
    return Watched(
        runs=runs,
        commit=str(revision or "")[:7],
        date=date.fromtimestamp((source / "config.yaml").stat().st_mtime).isoformat(),
        seconds=stage_seconds(source),
    )


def store_world(watched: Watched, file: Path) -> None:
    """Write the runs of a world to one JSON file, a line for each, small enough for git."""
    lines = []
    for run in watched.runs:
        plain = asdict(run)
        plain.pop("world")
        lines.append(json.dumps(_rounded(plain)))
    head = json.dumps({k: v for k, v in asdict(watched).items() if k != "runs"})[:-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f'{head}, "runs": [\n' + ",\n".join(lines) + "\n]}\n")


def _rounded(value: Any) -> Any:
    """Keep five significant digits of every float."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _provenance(watched: Watched, command: str) -> Provenance:
    seeds = sorted({run.seed for run in watched.runs})
    return Provenance(
        world=watched.runs[0].world,
        command=command,
        seeds=seeds,
        runs=len(watched.runs),
        seconds=watched.seconds,
        commit=watched.commit,
        date=watched.date,
    )


def read_runs(world: str, folder: Path) -> list[WatchedRun]:
    """Return the finished, watched runs of a comparison: of trained policies, in their order.

    Raises:
        DataError: The folder holds no comparison, or no cell whose training was watched.
    """
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder} holds no comparison ({error.strerror}): run `trueward compare` with a "
            "monitor first."
        ) from error
    there = sorted(cells.name for cells in (folder / "cells").glob("*"))
    order = [name for name in config.get("methods") or {} if name in there]
    samples = (config.get("language") or {}).get("evaluation_samples", 1)
    found = []
    for name in dict.fromkeys([*order, *there]):  # earlier calls may have had other methods
        cells = sorted((folder / "cells" / name).glob("seed-*"), key=_seed_of)
        runs = [_read_run(world, name, cell, samples=samples) for cell in cells]
        found += [run for run in runs if run is not None]
    if not found:
        raise DataError(
            f"{folder} has no finished cell whose training was watched: run `trueward compare` "
            "with `monitor` above 0."
        )
    return found


def _read_run(world: str, method: str, cell: Path, *, samples: int) -> WatchedRun | None:
    """Return a cell's run; None where it is not finished, trains no policy or was not watched."""
    if finished_summary(cell) is None:
        return None
    made_of = yaml.safe_load((cell / "config.yaml").read_text("utf-8"))["stage"]["method"]
    if made_of["optimiser"] not in TRAINED:
        return None
    points = json.loads((cell / "result.json").read_text("utf-8"))["points"]
    lines = (cell / "training" / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    names = [s for s in SIGNALS if all(f"{PREFIX}{s}" in step for step in steps)]
    if not names:
        return None
    places = [int(point["step"]) for point in points]
    return WatchedRun(
        world=world,
        method=method,
        seed=_seed_of(cell),
        gold_is_reward=made_of["reward"] == "gold",
        signals={s: _filled([step[f"{PREFIX}{s}"] for step in steps], s, cell) for s in names},
        places=places,
        gold=[point["gold"] for point in points],
        halves=[_halves(cell, place, samples) for place in places] if samples > 1 else [],
    )


def _halves(cell: Path, place: int, samples: int) -> tuple[float, float]:
    """Return gold of the first answer to each prompt, which is stored, and of the others."""
    stored = read_evaluation(cell, place)
    first = sum(stored["gold"]) / len(stored["gold"])
    return first, (samples * stored["point"]["gold"] - first) / (samples - 1)


def _filled(values: Sequence[float], name: str, cell: Path) -> list[float]:
    """Put the value before in the place of one that is not finite; 0 where there is none."""
    filled, last = [], 0.0
    for value in values:
        last = value if math.isfinite(value) else last
        filled.append(last)
    if filled != list(values):
        logger.warning("%s: '%s' is not finite at every step: it is held there.", cell, name)
    return filled


def _seed_of(cell: Path) -> int:
    return int(cell.name.removeprefix("seed-"))


def _example(config: AlarmStudyConfig, runs: Sequence[WatchedRun]) -> list[WatchedRun]:
    """Return the runs of the figure: one seed of one world, a gold reward's among them."""
    world = config.shown or runs[0].world
    own = [run for run in runs if run.world == world]
    if not own:
        raise DataError(f"shown: '{world}' is none of the worlds with judged runs.")
    same = [run for run in own if run.seed == own[0].seed]
    gold = [run for run in same if run.gold_is_reward][:1]
    return [run for run in same if not run.gold_is_reward][: 4 - len(gold)] + gold


def _numbers(rules: Rules, judged: Judged) -> dict[str, Any]:
    """Return the summary's numbers: of the embedded worlds."""
    warned, stopped = (
        [o for o in judged[aim][ALARM] if o.world != _EXACT] for aim in ("warn", "stop")
    )
    learned = summarise_outcomes([o for o in warned if not o.gold_is_reward])
    return {
        "candidates": sum(rules[aim][ALARM].candidates for aim in rules),
        "runs": len(warned),
        "falling": learned.falling,
        **{f"warn/{timing}": count for timing, count in learned.timings.items()},
        "gold_as_reward": sum(o.gold_is_reward for o in warned),
        "warn/false_alarms": sum(o.gold_is_reward and o.raised_at is not None for o in warned),
        "stop/false_alarms": sum(o.gold_is_reward and o.raised_at is not None for o in stopped),
    }
