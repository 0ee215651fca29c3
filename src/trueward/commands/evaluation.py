"""Commands that judge and show: evaluate, average (which judges before it acts) and report."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm

from trueward.commands.shared import (
    DataOptions,
    completions_of_rows,
    console,
    finished,
    load_reward,
    numbers_text,
)
from trueward.data.formats import (
    Completion,
    DataError,
    PreferenceRow,
    Prompt,
    load_preferences,
    read_jsonl,
)
from trueward.evaluate.diagnosis import Diagnosis, diagnose
from trueward.evaluate.judges import ChatJudge, Judge, reward_judge
from trueward.evaluate.out_of_distribution import (
    OUT_OF_DISTRIBUTION,
    OutOfDistribution,
    answers_beside,
    made_completions,
    read_answers,
)
from trueward.evaluate.overoptimization import best_of_n_curve, best_of_n_kl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.winrate import win_rate
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
    PosteriorFunction,
    fits_context,
    fitting_rows,
    posterior_function,
)
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import average_weights, select_best
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.report.diagnosis import diagnosis_report, result_tables
from trueward.report.figures import Curve, curve_figure, save_figure
from trueward.report.html import Table
from trueward.report.numbers import Cell, decimal
from trueward.report.run import report_run, rich_table
from trueward.report.svg import INK
from trueward.train.loop import permutation
from trueward.train.reward import own_completions
from trueward.train.run_folder import RunFolder, environment, to_plain, write_text

_CHUNK = 512  # completions scored between two moves of the bar; even, so that pairs stay together


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """A reward on preferences, its uncertainty diagnosed; or completions against others."""

    reward_model: list[str] = field(default_factory=list)  # several make an ensemble; or FILE.py:F
    preferences: dict[str, str] = field(default_factory=dict)  # name -> file, folder or hub name
    # Whether the uncertainty is diagnosed too, which scores about five more kinds of completions.
    diagnosis: bool = True
    diagnosis_rows: int = 0  # pairs of each set diagnosed at most, drawn by the seed; 0 = all
    # More completions that the data did not cover, for the diagnosis: name -> JSONL with prompt and
    # completion(s), as another policy's answers, or answers in another language.
    out_of_distribution: dict[str, str] = field(default_factory=dict)
    seed: int = 0  # of the pairs drawn, and of the completions made for the diagnosis
    completions: str = ""  # JSONL with prompt and completion(s), for a win rate
    reference_completions: str = ""  # the same prompts, answered by another policy
    judge: str = ""  # a reward model's folder, or chat:MODEL for an OpenAI-compatible endpoint
    base_url: str = "https://api.openai.com/v1"  # of the chat judge; its key is OPENAI_API_KEY
    best_of_n: str = ""  # JSONL with the lists `proxy` and `gold` of a prompt's samples
    output: str = ""  # a .json file for the numbers
    page: str = ""  # a .html file for the diagnosis
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        diagnosed = bool(self.preferences) and self.diagnosis
        for name in ("page", "out_of_distribution"):
            if getattr(self, name) and not diagnosed:
                raise ValueError(
                    f"--{name} belongs to the diagnosis: give --preferences NAME FILE, and leave "
                    "--diagnosis on."
                )
        if self.diagnosis_rows < 0:
            raise ValueError(f"diagnosis_rows must be at least 0, got {self.diagnosis_rows}.")
        taken = [name for name in self.out_of_distribution if name in OUT_OF_DISTRIBUTION]
        if taken:
            raise ValueError(
                f"--out_of_distribution has a name that is taken, {taken[0]!r}: give it another."
            )


def evaluate(config: EvaluateCommand) -> None:
    """Print the numbers, and write them where asked."""
    found: dict[str, Any] = {}
    for path in (config.output, config.page):  # not after an hour of scoring
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if config.preferences:
        found |= _evaluate_preferences(config)
    if config.completions:
        if not (config.reference_completions and config.judge):
            raise DataError("--completions needs --reference_completions and --judge.")
        found["win_rate"] = _win_rate(config)
    if config.best_of_n:
        found["best_of_n"] = _best_of_n(config.best_of_n)
    if not found:
        raise DataError(
            "Nothing to evaluate: give --preferences NAME FILE, --completions FILE or --best_of_n "
            "FILE."
        )
    if config.output:
        write_text(Path(config.output), json.dumps(found, indent=2))
    for name, numbers in found.items():
        shown = {key: value for key, value in numbers.items() if key != "diagnosis"}
        console.print(f"{name}: {numbers_text(shown)}", highlight=False)
        for sentence in _said(numbers.get("diagnosis", {})):
            console.print(f"  - {sentence}", highlight=False, markup=False)


def _evaluate_preferences(config: EvaluateCommand) -> dict[str, Any]:
    """Return the numbers by set, with the diagnosis beside them; print its tables, write its page.

    A scalar model is asked for its raw rewards, whose margins are the logits that it was trained
    on; several members are put on one scale.
    """
    if not config.reward_model:
        raise DataError("--preferences needs --reward_model: which model shall be evaluated?")
    sources = {name: read_answers(file) for name, file in config.out_of_distribution.items()}
    model = load_reward(config.reward_model)
    function = model.score if isinstance(model, RewardModel) else posterior_function(model)
    fits = fits_context(model) if isinstance(model, RewardModel | Sequence) else None
    objective = config.objective.build()
    found: dict[str, Any] = {}
    diagnoses: dict[str, Diagnosis] = {}
    remarks: dict[str, list[str]] = {}
    for name, source in config.preferences.items():
        loaded = load_preferences(source, keep_ties=True, **config.data.arguments())
        console.print(loaded.report.summary(), highlight=False)
        rows = fitting_rows(model, loaded.rows)
        if not rows:
            raise DataError("No row fits the reward model's context.")
        found[name] = {"overlong": float(len(loaded.rows) - len(rows))}
        drawn = _drawn(rows, config) if config.diagnosis else []
        if drawn:
            kinds, remarks[name] = _outside_of(drawn, sources, seed=config.seed)
            total = len(drawn) * (2 + len(kinds))
            with tqdm(total=total, desc=name, unit="text", disable=None) as bar:
                diagnoses[name] = diagnose(
                    _moving(function, bar, size=_CHUNK if fits is not None else None),
                    drawn,
                    out_of_distribution=kinds,
                    objective=objective,
                    fits=fits,
                    seed=config.seed,
                )
            remarks[name] += _overlong(diagnoses[name])
        if len(drawn) == len(rows):
            found[name] |= diagnoses[name].metrics
        else:
            found[name] |= evaluate_preferences(function, rows, objective=objective)
        if drawn:
            found[name]["diagnosis"] = _plain(diagnoses[name], remarks[name])
    if diagnoses:
        for table in result_tables(diagnoses):
            console.print(rich_table(table))
    if config.page:
        diagnosis_report(
            config.page,
            diagnoses,
            title=f"Diagnosis: {', '.join(config.reward_model)}",
            remarks=remarks,
            config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
            environment=environment(),
        )
    return found


def _drawn(rows: list[PreferenceRow], config: EvaluateCommand) -> list[PreferenceRow]:
    """Return the rows to diagnose, in their order; some of those with an order, if not all."""
    if not 0 < config.diagnosis_rows < len(rows):
        return rows
    ordered = [row for row in rows if not row.extra.get("tie")]
    kept = permutation(len(ordered), config.seed, "diagnosis")[: config.diagnosis_rows]
    return [ordered[i] for i in sorted(kept)]


def _outside_of(
    rows: Sequence[PreferenceRow],
    sources: Mapping[str, tuple[list[Prompt], list[Completion]]],
    *,
    seed: int,
) -> tuple[dict[str, OutOfDistribution], list[str]]:
    """Return completions that the data did not cover, by kind, and what is to be said of them."""
    prompts = [row.prompt for row in rows]
    made = made_completions(prompts, [row.chosen for row in rows], seed=seed)
    kinds: dict[str, OutOfDistribution] = dict(made.completions)
    remarks = [f"There are no {name} completions: {why}" for name, why in made.left_out.items()]
    for name, (answered, answers) in sources.items():
        beside = answers_beside(prompts, answered, answers, seed=seed)
        kinds[name] = beside.completions
        missing = sum(answer is None for answer in beside.completions)
        if beside.other_prompts:
            remarks.append(
                f"The completions of {name} answer other prompts: none of theirs is among those of "
                "the preferences, so they were dealt out at random."
            )
        if missing:
            remarks.append(
                f"{missing} of {len(rows)} pairs have no completion of {name}, so its AUROC is "
                "over the others."
            )
    return kinds, remarks


def _overlong(found: Diagnosis) -> list[str]:
    return [
        f"{about.overlong} completions of the kind {kind} are longer than the reward's context, so "
        f"its AUROC is over {about.completions} others."
        for kind, about in found.out_of_distribution.items()
        if about.overlong
    ]


def _moving(
    function: Callable[..., RewardPosterior], bar: "tqdm[Any]", *, size: int | None
) -> PosteriorFunction:
    """Return the function, scoring `size` completions at a time so that the bar can move.

    None scores all that it is given at once, as a user's own function may look at all of them.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        parts = []
        step = size or len(prompts)
        for start in range(0, len(prompts), step):
            some = slice(start, start + step)
            parts.append(function(prompts[some], completions[some]))
            bar.update(len(parts[-1]))
        return RewardPosterior.cat(parts)

    return score


def _plain(found: Diagnosis, remarks: list[str]) -> dict[str, Any]:
    """Return a diagnosis as JSON holds it; the metrics stand beside it."""
    plain = dataclasses.asdict(found)
    del plain["metrics"]
    return plain | {"verdicts": found.verdicts, "remarks": remarks}


def _said(diagnosis: Mapping[str, Any]) -> list[str]:
    return [*diagnosis.get("verdicts", []), *diagnosis.get("remarks", [])]


def _best_of_n(source: str) -> dict[str, float]:
    """Return the expected gold reward of the proxy's pick among n, for n in powers of two."""
    rows = [row for _, row in read_jsonl(source)]
    for line, row in enumerate(rows, start=1):
        if not {"proxy", "gold"} <= set(row):
            raise DataError(f"{source}, row {line}: needs the lists 'proxy' and 'gold'.")
    size = min(len(row["proxy"]) for row in rows)
    ns = [2**k for k in range(size.bit_length()) if 2**k <= size]
    proxy = torch.tensor([row["proxy"][:size] for row in rows], dtype=torch.float64)
    gold = torch.tensor([row["gold"][:size] for row in rows], dtype=torch.float64)
    curve = best_of_n_curve(proxy, gold, ns).tolist()
    return {f"n={n} (KL {best_of_n_kl(n):.2f})": g for n, g in zip(ns, curve, strict=True)}


def _win_rate(config: EvaluateCommand) -> dict[str, Any]:
    first = [row for _, row in read_jsonl(config.completions)]
    second = [row for _, row in read_jsonl(config.reference_completions)]
    prompts, completions, _ = completions_of_rows(first, config.completions)
    reference_prompts, references, _ = completions_of_rows(second, config.reference_completions)
    if prompts != reference_prompts:
        raise DataError(
            f"{config.completions} and {config.reference_completions} must answer the same prompts "
            "in the same order."
        )
    judge: Judge
    if config.judge.startswith("chat:"):
        judge = ChatJudge(base_url=config.base_url, model=config.judge.removeprefix("chat:"))
    else:
        judge = reward_judge(RewardModel.from_pretrained(config.judge))
    return dataclasses.asdict(win_rate(judge, prompts, completions, references))


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


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write the HTML report of a run's folder."""

    folder: str


def report(config: ReportCommand) -> None:
    """Write `report.html` into the folder."""
    console.print(str(report_run(config.folder)), highlight=False)
