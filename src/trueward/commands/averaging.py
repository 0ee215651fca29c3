"""The command that averages weights, after it has judged whether they may be averaged."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from trueward.commands.shared import (
    DataOptions,
    console,
    finished,
)
from trueward.data.formats import (
    DataError,
    PreferenceRow,
    load_preferences,
)
from trueward.evaluate.out_of_distribution import (
    read_answers,
)
from trueward.evaluate.preferences import evaluate_preferences
from trueward.models.mode_connectivity import (
    AveragePoint,
    LinearPath,
    PathPoint,
    compare_with_models,
    linear_mode_connectivity,
    proven_barrier,
    simultaneous_confidence,
)
from trueward.models.reward_function import (
    ENSEMBLE,
    fitting_rows,
)
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import average_weights, select_best
from trueward.report.figures import Curve, curve_figure, save_figure
from trueward.report.html import Table
from trueward.report.numbers import Cell, decimal
from trueward.report.run import rich_table
from trueward.report.svg import INK
from trueward.train.reward import own_completions
from trueward.train.run_folder import RunFolder, write_text


@dataclass(frozen=True, kw_only=True)
class AverageCommand:
    """Average the weights of reward models that were fine-tuned from one start (WARM)."""

    reward_model: list[str]  # folders or hub ids; the folder of an ensemble stands for its members
    output_dir: str
    # Held-out pairs on which the path between the models is tested: file, folder, or hub name.
    # Empty: not tested.
    preferences: str = ""
    best: int = 0  # models averaged: those of highest accuracy on `selection`; 0 = all
    selection: str = ""  # preferences for that, if possible unlike the training data
    reference: str = ""  # JSONL with prompt and completion(s), for the scale; else the preferences'
    confidence: float = 0.95  # that no sound average is refused, over all points tested together
    test_only: bool = False  # no average, only the test
    force: bool = False  # average in spite of a barrier
    data: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if not self.reward_model:
            raise ValueError("--reward_model needs the models to average.")
        again = [name for name in self.reward_model if self.reward_model.count(name) > 1]
        if again:
            raise ValueError(f"--reward_model has {again[0]} more than once: give each model once.")
        if bool(self.best) != bool(self.selection):
            raise ValueError(
                "--best and --selection go together: how many models, and by what accuracy."
            )
        if self.best < 0 or self.best == 1:
            raise ValueError(f"best must be 0 (all) or at least 2 models, got {self.best}.")
        if self.test_only and not self.preferences:
            raise ValueError("--test_only needs --preferences, on which the paths are tested.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), as 0.95, got {self.confidence}.")


def average(config: AverageCommand) -> None:
    """Test the paths between the models, and save their average in `output_dir/model`.

    Each model is tested on its path to the first (the best, where some were selected), and the
    average itself against the mean of all: M - 1 paths and one comparison in place of M (M - 1) / 2
    paths. A model of another start shows on its own path; that connectedness need not carry over
    from two paths to the models between them is what the last comparison is for.
    """
    if finished(config, "average"):
        return
    names = _member_names(config.reward_model)
    if len(names) < 2:
        raise DataError(f"An average needs two models at least, got one: {names[0]}.")
    rows, selection = (
        _rows_of(source, config) for source in (config.preferences, config.selection)
    )
    reference = read_answers(config.reference) if config.reference else None
    run = RunFolder(config.output_dir, command="average", config=config, free={"force"})
    accuracies: dict[str, float] = {}
    if selection:
        bar = tqdm(names, desc="selection", disable=None)
        accuracies = {name: _accuracy_of(name, selection) for name in bar}
        names = select_best(names, list(accuracies.values()), config.best)
    # Three inner points of each path, and the average: their intervals hold together.
    confidence = simultaneous_confidence(config.confidence, len(_INNER) * (len(names) - 1) + 1)
    made = average_weights(RewardModel.from_pretrained(name) for name in names)
    paths, point = {}, None
    if rows:
        paths = _paths(names, rows, confidence)
        members = (RewardModel.from_pretrained(name) for name in names)
        point = compare_with_models(made, members, rows, confidence=confidence)
        _show_paths(Path(config.output_dir), names, paths, point)
    barrier = proven_barrier(names[0], paths, point)
    if barrier and not (config.force or config.test_only):
        raise DataError(f"{barrier}: average models of one start, or give --force True.")
    if not config.test_only:
        if reference is None and (rows or selection):
            reference = own_completions(fitting_rows(made, rows or selection))
        if reference is not None:
            made.set_normalisation(*reference)
        made.save_pretrained(Path(config.output_dir) / "model")
    numbers: dict[str, Any] = {"members": names}
    if accuracies:
        numbers["selection_accuracy"] = accuracies
    numbers |= _path_numbers(paths, point)
    if barrier:
        numbers |= {"barrier": barrier, "forced": config.force and not config.test_only}
    summary = run.finish(numbers, seed=0)
    said = f"{barrier}." if barrier else "No barrier is proven between them."
    if not rows:
        said = "Whether these models may be averaged was not tested: --preferences would tell."
    console.print(
        f"{config.output_dir}: {summary['seconds']:.0f} s. {said}", highlight=False, markup=False
    )


def _rows_of(source: str, config: AverageCommand) -> list[PreferenceRow]:
    if not source:
        return []
    loaded = load_preferences(source, **config.data.arguments())
    console.print(loaded.report.summary(), highlight=False)
    return loaded.rows


def _member_names(names: Sequence[str]) -> list[str]:
    """Return what to load one by one: an ensemble's folder gives its members' folders."""
    found: list[str] = []
    for name in names:
        listing = Path(name) / ENSEMBLE
        members = json.loads(listing.read_text("utf-8"))["members"] if listing.is_file() else [""]
        found += [str(Path(name) / member) if member else name for member in members]
    return found


def _accuracy_of(name: str, rows: Sequence[PreferenceRow]) -> float:
    model = RewardModel.from_pretrained(name)
    fitting = fitting_rows(model, rows)
    if not fitting:
        raise DataError(f"No row of the selection fits the context of {name}.")
    return evaluate_preferences(model, fitting)["accuracy"]


_INNER = (0.25, 0.5, 0.75)  # weights of the second model


def _paths(
    names: Sequence[str], rows: Sequence[PreferenceRow], confidence: float
) -> dict[str, LinearPath]:
    """Return the path from the first model to each of the others, by the other's name."""
    first = RewardModel.from_pretrained(names[0])
    return {
        name: linear_mode_connectivity(
            first,
            RewardModel.from_pretrained(name),
            rows,
            weights=(0.0, *_INNER, 1.0),
            confidence=confidence,
        )
        for name in tqdm(names[1:], desc="paths", disable=None)
    }


def _show_paths(
    folder: Path, names: Sequence[str], paths: Mapping[str, LinearPath], point: AveragePoint
) -> None:
    """Print the paths, and write `table.json`, which `trueward report` shows, and `paths.png`."""
    labels = dict(zip(names, _labels(names), strict=True))
    rows: list[list[Cell]] = [
        [
            labels[name],
            f"{p.weight:g}",
            p.accuracy,
            _gap_text(p) if 0 < p.weight < 1 else None,
            p.loss,
            p.loss_line,
        ]
        for name, path in paths.items()
        for p in path.points
    ]
    rows.append(["mean of all", "", point.accuracy, _gap_text(point), point.loss, point.loss_mean])
    table = Table(
        columns=["path to", "weight", "accuracy", "above the line", "loss", "loss on\nthe line"],
        rows=rows,
        caption=f"From {labels[names[0]]} to the other models.",
        notes=f"{point.pairs} pairs, {point.left_out} left out. The line joins what the models "
        "themselves have; its interval below 0 is a barrier. Last: the average of all, against the "
        "mean of all. The intervals hold for all points together.",
    )
    console.print(rich_table(table))
    write_text(folder / "table.json", json.dumps(dataclasses.asdict(table), indent=1))
    figure = curve_figure(
        [
            Curve(
                name=labels[name],
                x=[p.weight for p in path.points],
                y=[p.gap for p in path.points],
                low=[p.low for p in path.points],
                high=[p.high for p in path.points],
            )
            for name, path in paths.items()
        ],
        title="Accuracy above the line between two models",
        x_label=f"weight of the other model beside {labels[names[0]]}",
        y_label="difference of shares",
        marked=True,
    )
    figure.axes[0].axhline(0, color=INK, linewidth=0.8)
    save_figure(figure, folder / "paths")


def _labels(names: Sequence[str]) -> list[str]:
    """Return the names without the folder that all of them are in."""
    parts = [Path(name).parts for name in names]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))  # noqa: RUF071  (not of letters)
    return ["/".join(part[shared:]) for part in parts]


def _gap_text(point: PathPoint | AveragePoint) -> str:
    value, low, high = (decimal(v, 3) for v in (point.gap, point.low, point.high))
    return f"{value} [{low}, {high}]"


def _path_numbers(paths: Mapping[str, LinearPath], point: AveragePoint | None) -> dict[str, Any]:
    """Return what the summary tells of the test."""
    if point is None:
        return {"tested": False}
    return {
        "tested": True,
        "pairs": point.pairs,
        "accuracy": point.accuracy,
        "accuracy_of_members": point.mean,
        "accuracy_gap_low": point.low,
        "accuracy_gap_high": point.high,
        "lowest_gap": {name: min(p.gap for p in path.inner) for name, path in paths.items()},
        "loss_barrier": {name: path.loss_barrier for name, path in paths.items()},
    }
