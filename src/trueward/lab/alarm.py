"""`trueward alarm`: an alarm calibrated on stored runs of some worlds and seeds, judged on others.

The runs are made by `trueward compare` with a `monitor`: the signals of every step stand in the
metrics of each cell, gold in its evaluations. What is left is arithmetic on files.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trueward.data.sources import DataError
from trueward.evaluate.alarm import Calibrated, Outcome, WatchedRun, calibrate, judge
from trueward.lab.exact_path import ExactPaths, exact_runs
from trueward.lab.methods import TRAINED
from trueward.report.alarm import alarm_report
from trueward.train.alarm import PREFIX, SIGNALS
from trueward.train.run_folder import RunFolder, environment, finished_summary, to_plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WatchedWorld:
    """A comparison whose policies were watched."""

    folder: str = ""  # its output_dir
    calibration_seeds: list[int] = field(default_factory=list)  # the alarm is judged on all others


@dataclass(frozen=True, kw_only=True)
class AlarmStudyConfig:
    """Where the runs are, and how the alarm is chosen."""

    output_dir: str = "runs/alarm"
    worlds: dict[str, WatchedWorld] = field(default_factory=dict)
    exact: ExactPaths = field(default_factory=ExactPaths)  # runs of the exact world, made here
    signals: list[str] = field(default_factory=lambda: list(SIGNALS))  # that the alarm may use
    window: int = 5  # steps that signals are counted from
    max_false_alarms: float = 0.1  # share of the calibration's runs with gold as reward
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
    """Calibrate, judge, and write `alarm.json`, `table.md`, `runs.md`, `outcomes.json`, a page.

    A world that lacks a signal which the calibration chose is judged by an alarm of its own, from
    the same runs and the signals that it has (`alarm_WORLD.json`).

    Raises:
        DataError: A folder holds no watched runs, or no seeds are left for one of the two parts.
    """
    runs = {name: read_runs(name, Path(world.folder)) for name, world in config.worlds.items()}
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
    found = _calibrated(config, chosen, config.signals)
    found.alarm.save(out / "alarm.json")
    by_world = dict.fromkeys(runs, found)
    for name, some in runs.items():
        if any(set(found.alarm.weights) - set(run.signals) for run in some):
            usable = [s for s in config.signals if all(s in run.signals for run in some)]
            by_world[name] = _calibrated(config, chosen, usable)
            by_world[name].alarm.save(out / f"alarm_{name}.json")
    judged = [judge(run, by_world[run.world]) for run in others]
    page = alarm_report(
        out,
        by_world,
        judged,
        calibration=[judge(run, by_world[run.world]) for run in chosen],
        example=_example(config, others, judged),
        title=config.title or "An alarm without gold",
        config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
        environment=environment(),
    )
    logger.info("Report: %s", page)
    return folder.finish(_numbers(found, judged), seed=0)


_EXACT = "exact"  # the name of the exact world in tables


def _calibrated(
    config: AlarmStudyConfig, runs: Sequence[WatchedRun], signals: Sequence[str]
) -> Calibrated:
    try:
        return calibrate(
            runs, signals=signals, window=config.window, max_false_alarms=config.max_false_alarms
        )
    except ValueError as error:
        raise DataError(f"No alarm can be calibrated: {error}") from error


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
    found = []
    for name in dict.fromkeys([*order, *there]):  # earlier calls may have had other methods
        cells = sorted((folder / "cells" / name).glob("seed-*"), key=_seed_of)
        runs = [_read_run(world, name, cell) for cell in cells]
        found += [run for run in runs if run is not None]
    if not found:
        raise DataError(
            f"{folder} has no finished cell whose training was watched: run `trueward compare` "
            "with `monitor` above 0."
        )
    return found


def _read_run(world: str, method: str, cell: Path) -> WatchedRun | None:
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
    return WatchedRun(
        world=world,
        method=method,
        seed=_seed_of(cell),
        gold_is_reward=made_of["reward"] == "gold",
        signals={name: [step[f"{PREFIX}{name}"] for step in steps] for name in names},
        places=[int(point["step"]) for point in points],
        gold=[point["gold"] for point in points],
    )


def _seed_of(cell: Path) -> int:
    return int(cell.name.removeprefix("seed-"))


def _example(
    config: AlarmStudyConfig, runs: Sequence[WatchedRun], judged: Sequence[Outcome]
) -> list[tuple[WatchedRun, Outcome]]:
    """Return the runs of the figure: one seed of one world, a gold reward's among them."""
    world = config.shown or runs[0].world
    own = [(run, o) for run, o in zip(runs, judged, strict=True) if run.world == world]
    if not own:
        raise DataError(f"shown: '{world}' is none of the worlds with judged runs.")
    seed = own[0][0].seed
    same = [pair for pair in own if pair[0].seed == seed]
    gold = [pair for pair in same if pair[0].gold_is_reward][:1]
    return [pair for pair in same if not pair[0].gold_is_reward][: 4 - len(gold)] + gold


def _numbers(found: Calibrated, judged: Sequence[Outcome]) -> dict[str, Any]:
    learned = [o for o in judged if not o.gold_is_reward]
    controls = [o for o in judged if o.gold_is_reward]
    falling = [o for o in learned if o.falls]
    return {
        "candidates": found.candidates,
        "runs": len(judged),
        "falling": len(falling),
        "at_peak": sum(o.at_peak for o in falling),
        "gold_as_reward": len(controls),
        "false_alarms": sum(o.raised_at is not None for o in controls),
    }
