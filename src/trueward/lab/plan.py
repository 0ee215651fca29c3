"""What a comparison is: its configuration, what it refuses, and the tasks that it is made of."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trueward.data.sources import DataError
from trueward.evaluate.comparison import SeedRun
from trueward.lab import exact, recorded
from trueward.lab.cells import best_of_n_cell, optimise_cell
from trueward.lab.exact import ExactWorld
from trueward.lab.gold_model import GoldModelWorld
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import (
    FIRST,
    Lab,
    LanguageConfig,
    RewardSpec,
    build_reference,
    build_shared,
    compare_answers,
    draw_pool,
    draw_shift,
    monitor_specs,
    refined_from,
    reward_specs,
    sample_optimised,
    score_pool,
    train_member,
)
from trueward.lab.methods import REFINED, TRAINED, Method
from trueward.lab.processes import Task
from trueward.lab.recorded import RecordedWorld
from trueward.train.run_folder import RunFolder, finished_summary, write_text

WorldName = Literal["exact", "grammar", "gold_model", "recorded"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, where, and over how many seeds.

    Methods come from a file: `trueward compare --config recipes/compare_demo.yaml`; what it names
    can then be changed by `--methods.NAME.field value`.
    """

    output_dir: str = "runs/compare"
    world: WorldName = "grammar"
    methods: dict[str, Method] = field(default_factory=dict)
    baseline: str = "single"  # the method that the others are held against
    seeds: int = 3
    first_seed: int = 0
    processes: int = 0  # 0 = as many as there are cores
    title: str = ""  # of the report
    # Reward models in an ensemble that watches every policy in training: its signals are logged at
    # every step, for `trueward alarm`; 0 = none. Worlds of language.
    monitor: int = 0
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
MAY_CHANGE = ("methods", "baseline", "seeds", "first_seed", "processes", "title", "monitor")


def trains_policies(config: CompareConfig) -> bool:
    """Tell whether any method trains a policy."""
    return any(m.optimiser in TRAINED for m in config.methods.values())


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
    if config.processes < 0:
        raise DataError(f"processes must be at least 0 (all cores), got {config.processes}.")
    defaults = CompareConfig()
    language = config.world in ("grammar", "gold_model")
    for name in ("exact", "grammar", "gold_model", "recorded"):
        if name != config.world and getattr(config, name) != getattr(defaults, name):
            raise DataError(f"`{name}` sets dials of another world than `world: {config.world}`.")
    if not language and config.language != defaults.language:
        raise DataError(f"`language` is for worlds of language, not for `world: {config.world}`.")
    if config.monitor < 0 or (config.monitor and not language):
        raise DataError(
            f"monitor is a number of reward models in a world of language, got {config.monitor} in "
            f"`world: {config.world}`."
        )
    for name, method in config.methods.items():
        if not name or any(c in name for c in "/\\. ") or name != name.strip("-_"):
            raise DataError(
                f"The method's name '{name}' must do as a folder's: letters, digits, - and _; what "
                "figures shall say is its `label`."
            )
        try:
            _require_known(config, method)
        except ValueError as error:
            raise DataError(f"methods.{name}: {error}") from error
    varies = any("{seed}" in path for path in config.recorded.reward_models)
    if config.world == "recorded" and config.seeds > 1 and not varies:
        raise DataError(
            "Seeds change nothing about recorded answers unless a reward model's path holds "
            "{seed}: leave seeds at 1, where intervals are over prompts."
        )
    trains = config.methods[config.baseline].optimiser in TRAINED
    if language and config.language.long and not trains:
        raise DataError(
            f"language.long asks when the baseline peaks in training, but '{config.baseline}' "
            "trains no policy."
        )


def _require_known(config: CompareConfig, method: Method) -> None:
    if config.world == "exact":
        exact.require_known(config.exact, method)
    elif config.world == "recorded":
        recorded.require_known(method)
    elif method.optimiser == "closed_form":
        raise ValueError(
            f"the world '{config.world}' has no policies in closed form: give an optimiser among "
            f"{', '.join((*TRAINED, 'best_of_n'))}."
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
    lab = Lab(
        world=dials,
        config=config.language,
        out=Path(config.output_dir),
        monitor=config.monitor,
    )
    refines = any(m.reward in REFINED for m in config.methods.values())
    tasks = _ground(lab, method, seed, refines=refines)
    needs = tuple(task.name for task in tasks)
    if method.optimiser == "best_of_n":
        what: tuple[Any, ...] = (best_of_n_cell, lab, method, seed, folder)
    else:
        what = (optimise_cell, lab, method, seed, round(steps * method.steps_scale), folder)
    return [*tasks, Task(name=name, function=what[0], arguments=what[1:], needs=needs)]


def _ground(lab: Lab, method: Method, seed: int, *, refines: bool) -> list[Task]:
    """Return the stages of a seed that a method stands on, in an order that can be run.

    Where any method refines, all are held against gold on the answers that it started from.
    """

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
    watching = monitor_specs(lab) if method.optimiser in TRAINED else []
    trained = dict.fromkeys(before for spec in specs for before in _with_those_before(spec))
    trained |= dict.fromkeys(watching)
    if refines:
        trained = dict.fromkeys([FIRST, *trained])
    for spec in trained:
        after = f"{at}/comparisons"
        if spec.refine:
            source = refined_from(spec)
            after = f"{at}/sampled/{source.name}"
            tasks.append(task(after, sample_optimised, source, after=_reward_task(at, source)))
        tasks.append(task(_reward_task(at, spec), train_member, spec, after=after))
    if refines:
        sampled = f"{at}/sampled/{FIRST.name}"
        tasks.append(task(sampled, sample_optimised, FIRST, after=_reward_task(at, FIRST)))
        tasks.append(task(f"{at}/shift", draw_shift, after=sampled))
    if method.optimiser == "best_of_n":
        tasks.append(task(f"{at}/pool", draw_pool, after=f"{at}/comparisons"))
        for spec in specs:
            needs = (f"{at}/pool", _reward_task(at, spec))
            tasks.append(task(f"{at}/pool/{spec.name}", score_pool, spec, after=needs))
    return tasks


def _with_those_before(spec: RewardSpec) -> list[RewardSpec]:
    """Return a reward model after those of the rounds before it."""
    return [*_with_those_before(refined_from(spec)), spec] if spec.refine else [spec]


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
    made_of = {"world": world, "method": method, "inputs": recorded.inputs_of(world, seed)}
    run = RunFolder(folder, command="compare", config=made_of, free=("label",))
    if finished_summary(folder) is not None:
        return
    result = run_cell(world, method, seed)
    write_text(folder / "result.json", json.dumps(asdict(result)))
    run.finish({"gold": result.points[-1]["gold"]}, seed=seed, seconds=result.seconds)
