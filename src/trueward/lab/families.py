"""`trueward families`: every family of rewards trained and diagnosed on real preferences.

The question of a table of families is what their uncertainty is worth and what it costs: on the
same pairs, from the same backbone, beside the single head and one that was trained for longer. For
each seed the prompts are split anew, a backbone is made (a language model fine-tuned on the chosen
completions, or a frozen sentence encoder), every family is trained from it, and all of them are
diagnosed on the held-out prompts.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from trueward.console import main_console
from trueward.data.formats import (
    DataError,
    DemonstrationRow,
    PreferenceRow,
    load_preferences,
    write_jsonl,
)
from trueward.data.rows import split_by_prompt, text_of
from trueward.evaluate.diagnosis import Diagnosis, diagnose
from trueward.evaluate.out_of_distribution import (
    OutOfDistribution,
    answers_beside,
    made_completions,
    read_answers,
)
from trueward.evaluate.preferences import evaluate_preferences
from trueward.lab.processes import Task, only_one, run_tasks, teller
from trueward.models.reward_function import Reward, fitting_rows, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.models.sentence_backbone import SentenceBackbone, sentence_backbone
from trueward.report.families import FamilyRuns, families_report
from trueward.train.brme import pair_states
from trueward.train.families import (
    POST_HOC,
    FamilyConfig,
    load_family,
    seconds_of,
    train_family,
)
from trueward.train.loop import permutation
from trueward.train.reward import RewardConfig, encode_pairs, own_completions
from trueward.train.run_folder import (
    RunFolder,
    environment,
    finished_summary,
    keep_config,
    to_plain,
    write_text,
)
from trueward.train.sft import SFTConfig, train_sft

console = main_console()
SINGLE = "single"  # the row that all others are compared with, and that post-hoc ones stand on


@dataclass(frozen=True, kw_only=True)
class FamilyMethod(FamilyConfig):
    """A row of the table."""

    label: str = ""  # as the table names it; empty: its key
    epochs_scale: float = 1.0  # reward training this many times as long: the control at equal cost
    learning_rate_scale: float = 1.0  # adapters learn at a higher rate than whole models

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_own_options()
        if self.family in POST_HOC and (self.epochs_scale, self.learning_rate_scale) != (1, 1):
            raise ValueError(
                f"family={self.family} stands on the single head's training: epochs_scale and "
                "learning_rate_scale are for rows that train on pairs; set its own epochs instead."
            )


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig:
    """What is trained on which preferences, over how many seeds.

    Rows come from a file: `trueward families --config recipes/families.yaml`; what it names can be
    changed by `--methods.NAME.field value`.
    """

    output_dir: str = "runs/families"
    title: str = "Families of rewards on real preferences"
    preferences: dict[str, str] = field(default_factory=dict)  # name -> file, folder or hub name
    out_of_distribution: dict[str, str] = field(default_factory=dict)  # name -> JSONL of answers
    data_dir: str = ""  # folder that holds the data instead of the hub; also TRUEWARD_DATA
    methods: dict[str, FamilyMethod] = field(default_factory=dict)
    pairs: int = 1000  # of each set of preferences at most, drawn by the seed; 0 = all
    test: float = 0.2  # share of the prompts kept for the diagnosis
    encoder: str = ""  # a sentence encoder, kept frozen; empty: a language model, fine-tuned first
    hidden_size: int = 256  # of the trunk on the encoder
    layers: int = 1  # of that trunk
    model: ModelSource = field(default_factory=ModelSource)
    sft: SFTConfig = field(default_factory=SFTConfig)
    train: RewardConfig = field(default_factory=RewardConfig)
    seeds: int = 5
    first_seed: int = 0
    repeats: int = 7  # of each timing, alternating with the single head's
    processes: int = 0  # 0 = as many as there are cores

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")
        if not 0 < self.test < 1:
            raise ValueError(f"test must lie in (0, 1), got {self.test}.")
        single = self.methods.get(SINGLE)
        if self.methods and (single is None or single.family != "single"):
            raise ValueError(
                f"The methods need one called {SINGLE!r} of the family single: the others are "
                "compared with it, and post-hoc ones start from it."
            )

    @property
    def all_seeds(self) -> range:
        """The seeds, in order."""
        return range(self.first_seed, self.first_seed + self.seeds)


def run_families(config: FamiliesConfig) -> dict[str, Any]:
    """Train and diagnose whatever is not finished, and write the report.

    Raises:
        DataError: There is nothing to compare, a file cannot be read, or a row failed.
    """
    if not config.methods or not config.preferences:
        raise DataError(
            "Families are compared on preferences: give methods and preferences in a file, as "
            "recipes/families.yaml does."
        )
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        folder = RunFolder(out, command="families", config=config, free=MAY_CHANGE)
        for stale in ("summary.json", "failures.txt"):  # of a run before this one
            (out / stale).unlink(missing_ok=True)
        for source in config.out_of_distribution.values():  # refused before hours of training
            read_answers(source)
        read_rows(config, config.first_seed)
        outcomes = run_tasks(_tasks(config), processes=config.processes, on_change=teller())
        failed = {name: o for name, o in outcomes.items() if o.state == "failed"}
        results = read_results(config)
        write_report(config, results)
        if failed:
            name, first = next(iter(failed.items()))
            traces = "\n\n".join(f"{n}\n{o.traceback}" for n, o in failed.items())
            write_text(out / "failures.txt", traces)
            others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            raise DataError(
                f"{name}{others} failed ({first.error.rstrip('.')}); "
                f"{out / 'failures.txt'} has the traces, and running it again tries them again."
            )
        metrics = {row.name: {"accuracy": _mean_of(row, "accuracy")} for row in results}
        return folder.finish(metrics, seed=config.first_seed)


MAY_CHANGE = ("methods", "seeds", "processes", "title", "label", "data_dir")


def _tasks(config: FamiliesConfig) -> list[Task]:
    tasks = []
    for seed in config.all_seeds:
        ground = f"seed-{seed}/backbone"
        tasks.append(Task(name=ground, function=build_backbone, arguments=(config, seed)))
        for name in config.methods:
            # Post-hoc rows stand on the single head, and all are timed beside it.
            after = (ground,) if name == SINGLE else (ground, f"seed-{seed}/{SINGLE}")
            tasks.append(
                Task(
                    name=f"seed-{seed}/{name}",
                    function=train_and_diagnose,
                    arguments=(config, seed, name),
                    needs=after,
                )
            )
    return tasks


# --- stages ---


def read_rows(config: FamiliesConfig, seed: int) -> dict[str, list[PreferenceRow]]:
    """Return at most `pairs` rows of each set, drawn by the seed; ties have no order and go."""
    found = {}
    for name, source in config.preferences.items():
        loaded = load_preferences(source, data_dir=config.data_dir or None)
        rows = [row for row in loaded.rows if not row.extra.get("tie")]
        order = permutation(len(rows), seed, "families", name)
        found[name] = [rows[i] for i in order[: config.pairs or None]]
    return found


def split_rows(config: FamiliesConfig, seed: int) -> None:
    """Draw a seed's rows and part them by prompt, once for all families."""
    folder = _ground(config, seed) / "rows"
    training: list[PreferenceRow] = []
    for name, rows in read_rows(config, seed).items():
        kept, apart = split_by_prompt(rows, fraction=config.test, seed=seed)
        training += kept
        _write_rows(folder / f"test-{name}.jsonl", apart)
        if not apart:
            raise DataError(
                f"No prompt of {name} fell into the held-out share of seed {seed}: give more pairs "
                "or raise test."
            )
    # Mixed, because members' scales are measured on the first ones.
    order = permutation(len(training), seed, "families", "training")
    _write_rows(folder / "training.jsonl", [training[i] for i in order])


def seed_rows(
    config: FamiliesConfig, seed: int
) -> tuple[list[PreferenceRow], dict[str, list[PreferenceRow]]]:
    """Return a seed's training rows of all sets together, and each set's held-out rows."""
    folder = _ground(config, seed) / "rows"
    training = load_preferences(folder / "training.jsonl").rows
    test = {n: load_preferences(folder / f"test-{n}.jsonl").rows for n in config.preferences}
    return training, test


def _write_rows(path: Path, rows: Sequence[PreferenceRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = ("prompt", "chosen", "rejected", "margin")
    write_jsonl(
        path,
        [
            row.extra | {k: getattr(row, k) for k in keys if getattr(row, k) is not None}
            for row in rows
        ],
    )


def build_backbone(config: FamiliesConfig, seed: int) -> None:
    """Make what all families of a seed start from."""
    folder = _ground(config, seed)
    made_of = {"model": config.model, "sft": config.sft, "encoder": config.encoder}
    run = RunFolder(folder, command="families", config=made_of)
    if finished_summary(folder) is not None:
        return
    split_rows(config, seed)
    training, test = seed_rows(config, seed)
    if config.encoder:
        _embed(config, seed, [row for rows in (training, *test.values()) for row in rows])
    else:
        texts = (text_of(t) for r in training for t in (r.prompt, r.chosen, r.rejected))
        policy = load_policy(config.model, texts, seed=seed)
        rows = [DemonstrationRow(prompt=r.prompt, completion=r.chosen) for r in training]
        train_sft(policy, rows, replace(config.sft, seed=seed), output_dir=folder / "sft")
    run.finish({"pairs": len(training)}, seed=seed)


def make_model(config: FamiliesConfig, ground: Path, **options: Any) -> RewardModel:
    """Return an untrained reward model on the backbone in a seed's folder."""
    own = {"max_length": config.train.max_length, **options}
    if not config.encoder:
        return RewardModel.from_backbone(ground / "sft" / "model", **own)
    backbone, tokenizer = sentence_backbone(
        config.encoder,
        hidden_size=config.hidden_size,
        layers=config.layers,
        seed=own.get("seed", 0),
    )
    backbone.load_embeddings(Path(config.output_dir) / "embeddings")
    return RewardModel.from_backbone(backbone, tokenizer, **own)


def train_and_diagnose(config: FamiliesConfig, seed: int, name: str) -> None:
    """Train one row of the table for one seed, and write what its diagnosis finds."""
    method = config.methods[name]
    folder = row_folder(config, seed, name)
    made_of = to_plain({"method": replace(method, label=""), "single": config.methods[SINGLE]})
    keep_config(folder / "row.yaml", made_of)
    if (folder / "result.json").exists():
        return
    training, test = seed_rows(config, seed)
    if method.family in POST_HOC and not method.stage1:
        stage1 = row_folder(config, seed, SINGLE) / "model"
        method = replace(method, stage1=str(stage1))
    reward = train_family(
        lambda **options: make_model(config, _ground(config, seed), **options),
        training,
        method,
        replace(
            config.train,
            seed=seed,
            epochs=config.train.epochs * method.epochs_scale,
            learning_rate=config.train.learning_rate * method.learning_rate_scale,
        ),
        output_dir=folder,
        load=lambda path: _loaded(config, path),
    )
    _remember(config, reward)
    rows = {n: fitting_rows(reward, some) for n, some in test.items()}
    together = [row for some in rows.values() for row in some]
    found = diagnose(reward, together, out_of_distribution=kinds(config, together, seed), seed=seed)
    result = numbers_of(found)
    result |= calibration(reward, together)
    for n, some in ((n, some) for n, some in rows.items() if some):
        result[f"accuracy/{n}"] = diagnose(reward, some, out_of_distribution={}).accuracy.value
    single = load_family(row_folder(config, seed, SINGLE)) if name != SINGLE else reward
    _remember(config, single)
    result |= cost(reward, single, together[:16], repeats=config.repeats)
    result["training seconds"] = seconds_of(folder)
    written = {"numbers": result, "verdicts": found.verdicts, "diagnosis": asdict(found)}
    write_text(folder / "result.json", json.dumps(written))


def kinds(
    config: FamiliesConfig, rows: Sequence[PreferenceRow], seed: int
) -> dict[str, OutOfDistribution]:
    """Return completions that the data did not cover, by kind: made ones, and those of files."""
    prompts = [row.prompt for row in rows]
    made = made_completions(prompts, [row.chosen for row in rows], seed=seed)
    found: dict[str, OutOfDistribution] = dict(made.completions)
    for name, source in config.out_of_distribution.items():
        found[name] = answers_beside(prompts, *read_answers(source), seed=seed).completions
    return found


def calibration(reward: Reward, rows: Sequence[PreferenceRow]) -> dict[str, float]:
    """Return ECE and Brier score of the members' mean, on the scale of its own logits.

    A posterior is in units of the members' std on reference samples; multiplied by that std, its
    margins are those by which the loss learned the probabilities.
    """
    models = [reward] if isinstance(reward, RewardModel) else reward
    assert isinstance(models, Sequence)
    scale = torch.cat([model.reward_std for model in models]).mean().item()
    posterior = posterior_function(reward)(*own_completions(rows, limit=len(rows)))
    found = evaluate_preferences(lambda *_: posterior.mean * scale, rows)
    return {"ECE": found["ece"], "Brier": found["brier"]}


def cost(
    reward: Reward, single: Reward, rows: Sequence[PreferenceRow], *, repeats: int
) -> dict[str, float]:
    """What scoring costs beside the single head: in arithmetic, and in seconds.

    Returns:
        `passes`: floating-point operations over the single head's; `seconds ratio`: the median of
        `repeats` alternating runs of each, after one of each to warm up.
    """
    prompts, completions = own_completions(rows, limit=len(rows))
    timed: list[list[float]] = [[], []]
    operations = []
    functions = [posterior_function(reward), posterior_function(single)]
    for function in functions:
        function(prompts[:1], completions[:1])  # a model tries its backbone at its first text
        with FlopCounterMode(display=False) as counter:
            function(prompts, completions)
        operations.append(counter.get_total_flops())
    for _ in range(repeats):
        for function, seconds in zip(functions, timed, strict=True):
            started = time.perf_counter()
            function(prompts, completions)
            seconds.append(time.perf_counter() - started)
    return {
        "passes": operations[0] / max(operations[1], 1),
        "seconds ratio": median(timed[0]) / median(timed[1]),
    }


def numbers_of(found: Diagnosis) -> dict[str, float]:
    """Return a diagnosis as numbers by name; what is not defined is left out.

    `AUROC KIND` is that of the last uncertainty there is: in all (total), else the members' own,
    else that between members; `reward AUROC KIND` is the share of the completions of that kind
    which the reward itself puts below the data's.
    """
    numbers: dict[str, float | None] = {
        "accuracy": found.accuracy.value,
        "correlation of members": found.member_correlation,
        "spread of members": found.member_spread,
    }
    if found.own_stds is not None:
        numbers["own std 90 % / 10 %"] = found.own_stds.ratio
        numbers["at floor"] = found.own_stds.at_floor
    for kind, about in found.out_of_distribution.items():
        numbers[f"reward AUROC {kind}"] = None if about.preferred is None else 1 - about.preferred
    for name in ("total", "own", "between"):
        signal = found.uncertainties.get(name)
        if signal is None:
            continue
        for title, measured in (
            ("error", signal.error_correlation),
            ("wrong order", signal.wrong_correlation),
        ):
            numbers[f"correlation with {title}"] = measured.value if measured else None
        for kind, auroc in signal.auroc.items():
            numbers[f"AUROC {kind}"] = auroc.value
        break
    return {key: float(value) for key, value in numbers.items() if value is not None}


# --- embeddings, once for all rows and seeds ---


def _embed(config: FamiliesConfig, seed: int, rows: Sequence[PreferenceRow]) -> None:
    """Embed the seed's texts, those of the diagnosis too, into the run's store."""
    store = Path(config.output_dir) / "embeddings"
    backbone, tokenizer = sentence_backbone(config.encoder, layers=0)
    backbone.load_embeddings(store)
    model = RewardModel.from_backbone(backbone, tokenizer, max_length=config.train.max_length)
    # As training reads a pair, both sides with the same part of the prompt, and as scoring does.
    pair_states(model, encode_pairs(model, rows, model.max_length), max_tokens=4096)
    prompts, completions = own_completions(rows, limit=len(rows))
    fitting = [i for i, p in enumerate(prompts) if model.fits(p, completions[i])]
    model.score([prompts[i] for i in fitting], [completions[i] for i in fitting])
    _, test = seed_rows(config, seed)
    together = [row for some in test.values() for row in fitting_rows(model, some)]
    diagnose(model, together, out_of_distribution=kinds(config, together, seed), seed=seed)
    backbone.save_embeddings(store, name=f"seed-{seed}")


def _loaded(config: FamiliesConfig, path: Path) -> RewardModel:
    model = RewardModel.from_pretrained(path)
    _remember(config, model)
    return model


def _remember(config: FamiliesConfig, reward: Reward) -> None:
    """Let loaded models look up the embeddings instead of computing them again."""
    models = [reward] if isinstance(reward, RewardModel) else reward
    assert isinstance(models, Sequence)
    shared: dict[tuple[int, ...], Any] | None = None
    for model in models:
        assert isinstance(model, RewardModel)
        if isinstance(model.backbone, SentenceBackbone):
            if shared is None:
                model.backbone.load_embeddings(Path(config.output_dir) / "embeddings")
                shared = model.backbone.embeddings
            model.backbone.embeddings = shared


# --- results ---


def _ground(config: FamiliesConfig, seed: int) -> Path:
    return Path(config.output_dir) / f"seed-{seed}" / "backbone"


def row_folder(config: FamiliesConfig, seed: int, name: str) -> Path:
    """Where a row of the table writes for a seed."""
    return Path(config.output_dir) / f"seed-{seed}" / name


def read_results(config: FamiliesConfig) -> list[FamilyRuns]:
    """Return every row of the table with what is finished."""
    found = []
    for name, method in config.methods.items():
        read: dict[int, dict[str, Any]] = {}
        for seed in config.all_seeds:
            file = row_folder(config, seed, name) / "result.json"
            if file.exists():
                read[seed] = json.loads(file.read_text("utf-8"))
        found.append(
            FamilyRuns(
                name=name,
                label=method.label or name,
                numbers={seed: result["numbers"] for seed, result in read.items()},
                verdicts=next(iter(read.values()))["verdicts"] if read else (),
            )
        )
    return found


def write_report(config: FamiliesConfig, rows: Sequence[FamilyRuns]) -> None:
    """Write page, table and figures from what is finished, if the single head is."""
    if not any(row.numbers for row in rows if row.name == SINGLE):
        return
    page = families_report(
        config.output_dir,
        rows,
        baseline=SINGLE,
        title=config.title,
        sets=list(config.preferences),
        behind="behind the frozen encoder, whose pass over each text is the same for all"
        if config.encoder
        else "",
        config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
        environment=environment(),
    )
    console.print(f"Report: {page}", highlight=False)


def _mean_of(row: FamilyRuns, key: str) -> float:
    estimate = row.estimate(key)
    return math.nan if estimate is None else estimate.mean
