"""Every family of reward models, trained by its name from one backbone.

A family is a way to a posterior: what is trained, how often, and from what. Each ends as a folder
`model` that `models.reward_function.load_reward_models` reads again. `brme`, `attributes`,
`energy` and `laplace` stand on a finished single head, which is trained first where none is given,
on all of the pairs: what they then hold out, to judge their own stage, stage 1 has seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import nn

from trueward.data.formats import (
    Completion,
    DataError,
    LoadReport,
    PreferenceRow,
    Prompt,
    read_jsonl,
)
from trueward.data.rows import split_by_prompt
from trueward.models.backbone import default_device
from trueward.models.lora_ensemble import AdapterDiversity
from trueward.models.reward_function import (
    Reward,
    fitting_rows,
    load_reward_models,
    save_ensemble,
)
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import (
    DROPOUTS,
    average_weights,
    diverse_members,
    probe_head,
    select_best,
    start_member,
)
from trueward.train.attributes import (
    AttributeConfig,
    GatingConfig,
    RatedRow,
    rated_by_text,
    train_attributes,
    train_gating,
)
from trueward.train.brme import PRESETS, BRMEConfig, require_ratings, train_brme
from trueward.train.energy import EnergyConfig, train_energy
from trueward.train.laplace import LaplaceConfig, fit_laplace
from trueward.train.loop import seed_of
from trueward.train.processes import process_count
from trueward.train.reward import (
    RewardConfig,
    own_completions,
    require_unweighted,
    train_reward,
)
from trueward.train.run_folder import RunFolder, finished_summary, keep_config

Maker = Callable[..., RewardModel]  # RewardModel.from_backbone, its backbone given
Reference = tuple[Sequence[Prompt], Sequence[Completion]]
# (model, seed) -> what is trained beside it on pairs and thrown away, as `refine.MultiView` is.
AuxiliaryOf = Callable[[RewardModel, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class WARMConfig:
    """What the weight average is made of (Ramé et al. 2024, https://arxiv.org/abs/2401.12187)."""

    candidates: int = 10  # members trained
    best: int = 6  # members averaged: those of highest accuracy on the selection rows
    # Of `train.learning_rate`: the paper's 1e-5, 4e-5 and 1e-4 about their middle.
    learning_rate_scales: tuple[float, ...] = (0.25, 1.0, 2.5)
    dropouts: tuple[float, ...] = DROPOUTS  # the paper's; they go round with the rates
    selection: float = 0.1  # share of the prompts kept for the selection, where no rows are given

    def __post_init__(self) -> None:
        if not 1 <= self.best <= self.candidates:
            raise ValueError(
                f"best must lie between 1 and candidates ({self.candidates}), got {self.best}."
            )
        if not 0 < self.selection < 1:
            raise ValueError(f"selection must lie in (0, 1), got {self.selection}.")


@dataclass(frozen=True, kw_only=True)
class LoRAEnsembleConfig:
    """Members that are adapters on one base (UP-RLHF, https://arxiv.org/abs/2401.00243)."""

    rank: int = 8  # of each member's adapters
    layers: float = 0.25  # share of the layers, from the top, that have adapters; 1 = all
    member_loss: Literal["each", "mean"] = "mean"  # the paper: of the mean of the members' rewards
    # Price of the nuclear-norm diversity, Eq. 12; the paper does not give its value. 0 = none.
    diversity: float = 0.01


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Which family, and the options of each."""

    family: Literal[
        "single",  # one scalar head, by maximum likelihood
        "heads",  # K Gaussian heads on one backbone, all trained together
        "brme",  # a single head first, then K Gaussian heads on its backbone
        "deep",  # K models, each with its own seed
        "lora",  # K low-rank adapters on one base, in one pass
        "warm",  # the average of several models' weights
        "attributes",  # URM: Gaussian attributes, and a gate that weighs them
        "energy",  # EBRM: the mode and width of an energy over rewards
        "laplace",  # a Gaussian over the last layer's weights
    ] = "single"
    members: int = 5  # of heads, brme, deep and lora; draws of laplace, unless it has none
    stage1: str = ""  # a finished single head for brme, attributes, energy, laplace; empty: train
    # Which loss and target `brme` has: its own fields', or those of a preset. faithful is the
    # paper as told (stds collapse), sound the likelihood of ratings, pairs that of comparisons
    # alone, whose stds mostly collapse too.
    preset: Literal["none", "faithful", "sound", "pairs"] = "none"
    # attributes: JSONL with prompt, completion and a number for each attribute, as HelpSteer2 has
    # them; empty: measured on the text, beside stage 1's score.
    ratings: str = ""
    # What a family alone has. Seed, lengths, precision and bookkeeping are those of `train`.
    brme: BRMEConfig = field(default_factory=BRMEConfig)  # family=brme
    lora: LoRAEnsembleConfig = field(default_factory=LoRAEnsembleConfig)  # family=lora
    warm: WARMConfig = field(default_factory=WARMConfig)  # family=warm
    attributes: AttributeConfig = field(default_factory=AttributeConfig)  # family=attributes, 1st
    gating: GatingConfig = field(default_factory=GatingConfig)  # family=attributes, 2nd stage
    energy: EnergyConfig = field(default_factory=EnergyConfig)  # family=energy
    laplace: LaplaceConfig = field(default_factory=LaplaceConfig)  # family=laplace

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}.")
        if self.stage1 and self.family not in POST_HOC:
            raise ValueError(
                f"stage1 is what {', '.join(POST_HOC)} start from; family={self.family} starts "
                "from the backbone."
            )
        if self.preset != "none" and self.family != "brme":
            raise ValueError(f"preset is for family=brme, got family={self.family}.")
        if self.ratings and self.family != "attributes":
            raise ValueError(f"ratings is for family=attributes, got family={self.family}.")
        chosen = (self.brme.loss, self.brme.target)
        preset = PRESETS.get(self.preset)
        if preset and chosen not in ((BRMEConfig().loss, BRMEConfig().target), (*preset.values(),)):
            raise ValueError(
                f"preset={self.preset} sets brme.loss and brme.target: leave them, or the preset, "
                "out."
            )

    def require_own_options(self) -> None:
        """Refuse options that the family does not read: they would be ignored in silence.

        Raises:
            ValueError: Another family's option is not at its default.
        """
        for name, made in _OPTIONS.items():
            owner = "attributes" if name == "gating" else name
            if self.family != owner and getattr(self, name) != made():
                raise ValueError(
                    f"{name}. options are for family={owner}, got family={self.family}."
                )


def require_processes(config: FamilyConfig, train: RewardConfig) -> None:
    """Refuse a family that cannot be trained over processes as it is asked to be.

    Raises:
        ValueError: torchrun started several processes, or weights are to be sharded.
    """
    if process_count() > 1 and config.family not in OVER_PROCESSES:
        raise ValueError(
            f"family={config.family} is trained in one process: leave torchrun out, or train "
            f"{', '.join(OVER_PROCESSES)} with it."
        )
    if train.sharding == "full" and config.family not in SHARDED:
        raise ValueError(
            f"sharding=full is for family={' or '.join(SHARDED)}, got family={config.family}: "
            "leave sharding out."
        )


# What belongs to a run as a whole, not to one of its trainings.
_SHARED = (
    *("seed", "max_length", "max_batch_tokens", "bf16"),
    *("log_every", "checkpoint_every", "tracker", "progress"),
)
ConfigT = TypeVar("ConfigT")

_OPTIONS: dict[str, Callable[[], object]] = {
    "brme": BRMEConfig,
    "lora": LoRAEnsembleConfig,
    "warm": WARMConfig,
    "attributes": AttributeConfig,
    "gating": GatingConfig,
    "energy": EnergyConfig,
    "laplace": LaplaceConfig,
}
OVER_PROCESSES = ("single", "heads", "lora")  # one training, by `train_reward`
SHARDED = ("single", "heads")
POST_HOC = ("brme", "attributes", "energy", "laplace")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the training of any family needs; see `train_family`."""

    make: Maker
    preferences: Sequence[PreferenceRow]
    config: FamilyConfig
    train: RewardConfig
    folder: Path
    reference: Reference | None
    report: LoadReport | None
    selection: Sequence[PreferenceRow]
    evaluation: Callable[[Reward], dict[str, float]] | None
    load: Callable[[Path], RewardModel]
    auxiliary: AuxiliaryOf | None = None

    @property
    def common(self) -> dict[str, Any]:
        """The keywords that every training function takes, for the family's own folder."""
        return {
            "output_dir": self.folder,
            "reference": self.reference,
            "report": self.report,
            "evaluation": self.evaluation,
        }

    def beside(self, model: RewardModel, seed: int) -> nn.Module | None:
        """Return what is trained beside a model on pairs; nothing by default."""
        return self.auxiliary(model, seed) if self.auxiliary is not None else None

    def finish(self, metrics: dict[str, float]) -> None:
        """Write the summary of a family whose parts were trained in folders of their own."""
        if self.evaluation is not None:
            metrics |= self.evaluation(load_family(self.folder))
        config = {"family": self.config, "train": self.train}
        run = RunFolder(self.folder, command="reward", config=config)
        run.finish(metrics, seed=self.train.seed, seconds=seconds_of(self.folder))


def train_family(
    make: Maker,
    preferences: Sequence[PreferenceRow],
    config: FamilyConfig,
    train: RewardConfig,
    *,
    output_dir: str | Path,
    reference: Reference | None = None,
    report: LoadReport | None = None,
    selection: Sequence[PreferenceRow] = (),
    evaluation: Callable[[Reward], dict[str, float]] | None = None,
    load: Callable[[Path], RewardModel] = RewardModel.from_pretrained,
    auxiliary: AuxiliaryOf | None = None,
) -> Reward:
    """Train a family's reward; a killed run given the same folder goes on where it was.

    Args:
        make: Called with `seed` and, as a family needs them, `members` or `lora_...`: returns an
            untrained model on a backbone of its own, as `RewardModel.from_backbone` does with its
            backbone given by path.
        preferences: Pairs.
        config: Which family.
        train: Options of training on pairs; its seed is the family's.
        output_dir: Receives `model/`, a folder for each part that is trained on the way, and the
            summary.
        reference: (prompts, completions) of the reference policy, on which members are put on one
            scale; without them, the training pairs' own completions serve.
        report: Receives the rows that do not fit.
        selection: Rows that `warm` selects its members on, if possible unlike the training rows;
            without them a share of the prompts is kept from training.
        evaluation: Called with the trained reward; its numbers stand in the summary.
        load: Reads a finished part again, for what is trained on it.
        auxiliary: Makes what is trained beside each model that learns from pairs (of `deep` and
            `warm` each member, of those on a single head that head); see `train_reward`.

    Returns:
        A reward model, or a list of them for `deep`.

    Raises:
        ValueError: An auxiliary for a LoRA ensemble, which has its own and one state a member, or
            for a single head that is finished already; several processes or sharded weights for a
            family that is not trained so.
    """
    require_processes(config, train)
    if auxiliary is not None and config.stage1:
        raise ValueError(
            "What is trained beside a single head needs that head's training: leave stage1 out."
        )
    if auxiliary is not None and config.family == "lora":
        raise ValueError(
            "Members of a LoRA ensemble have last states of their own, so no multi-view loss can "
            "be trained beside them: choose another family, or a method without views."
        )
    if config.family in POST_HOC:  # their second stages read no weights
        require_unweighted(preferences, f"family={config.family}")
    folder = Path(output_dir)
    # Beside the configurations of the parts: another family's folder must not pass for this one's.
    keep_config(folder / "family.yaml", {"family": config, "train": train})
    if finished_summary(folder) is None:
        job = Job(
            make=make,
            preferences=preferences,
            config=config,
            train=train,
            folder=folder,
            reference=reference,
            report=report,
            selection=selection,
            evaluation=evaluation,
            load=load,
            auxiliary=auxiliary,
        )
        FAMILIES[config.family](job)
    return load_family(folder)


def load_family(output_dir: str | Path) -> Reward:
    """Return what `train_family` trained: a reward model, or a list of several."""
    models = load_reward_models(Path(output_dir) / "model")
    return models[0] if len(models) == 1 else models


def seconds_of(output_dir: str | Path) -> float:
    """Return how long all parts of a family were trained, whatever was resumed in between."""
    summaries = [finished_summary(file.parent) for file in Path(output_dir).rglob("summary.json")]
    return sum(float(summary["seconds"]) for summary in summaries if summary is not None)


# --- trained on pairs ---


def _single(job: Job) -> None:
    model = job.make(seed=job.train.seed)
    auxiliary = job.beside(model, job.train.seed)
    train_reward(model, job.preferences, job.train, auxiliary=auxiliary, **job.common)


def _heads(job: Job) -> None:
    model = job.make(seed=job.train.seed, members=job.config.members)
    auxiliary = job.beside(model, job.train.seed)
    train_reward(model, job.preferences, job.train, auxiliary=auxiliary, **job.common)


def _lora(job: Job) -> None:
    options = job.config.lora
    model = job.make(
        seed=job.train.seed,
        lora_members=job.config.members,
        lora_rank=options.rank,
        lora_layers=options.layers,
    )
    auxiliary = AdapterDiversity(coef=options.diversity) if options.diversity else None
    train = replace(job.train, member_loss=options.member_loss)
    train_reward(model, job.preferences, train, auxiliary=auxiliary, **job.common)


def _deep(job: Job) -> None:
    names = [f"member_{k}" for k in range(job.config.members)]
    for k, name in enumerate(names):
        # Its own seed: of the head, and of the order of the data.
        seed = seed_of(job.train.seed, "member", k) if k else job.train.seed
        report = job.report if k == 0 else None  # a row is reported once
        _train_one(job, job.folder / "model" / name, seed=seed, report=report)
    save_ensemble(job.folder / "model", [f"{name}/model" for name in names])
    job.finish(_mean_numbers([job.folder / "model" / name for name in names]))


def _warm(job: Job) -> None:
    config, train = job.config.warm, job.train
    rows, selection = list(job.preferences), list(job.selection)
    if not selection:
        rows, selection = split_by_prompt(
            rows, fraction=config.selection, seed=seed_of(train.seed, "selection")
        )
        if not rows or not selection:
            raise DataError(
                f"{len(job.preferences)} pairs of too few prompts to keep some for the selection "
                "of members: give more."
            )
    folders = [job.folder / "members" / str(k) for k in range(config.candidates)]
    settings = diverse_members(
        config.candidates,
        learning_rates=[train.learning_rate * scale for scale in config.learning_rate_scales],
        dropouts=config.dropouts,
        seed=seed_of(train.seed, "warm") % 2**31,
    )
    start: RewardModel | None = None
    for k, (own, folder) in enumerate(zip(settings, folders, strict=True)):
        if finished_summary(folder) is None:
            if start is None:
                start = probe_head(job.make(seed=train.seed).to(default_device()), rows)
            member = start_member(start, own)
            train_reward(
                member,
                rows,
                replace(train, learning_rate=own.learning_rate, seed=own.seed),
                output_dir=folder,
                reference=job.reference,
                report=job.report if k == 0 else None,
                auxiliary=job.beside(member, own.seed),
                evaluation=lambda model: {"selection/accuracy": _accuracy(model, selection)},
            )
    accuracies = [_numbers(folder)["selection/accuracy"] for folder in folders]
    chosen = select_best(folders, accuracies, config.best)
    average = average_weights(
        (job.load(folder / "model") for folder in chosen),
        reference=job.reference or own_completions(rows),
    )
    average.save_pretrained(job.folder / "model")
    numbers = {"selection/accuracy": _accuracy(average, selection)}
    for k, accuracy in enumerate(accuracies):
        numbers[f"selection/member_{k}"] = accuracy
    job.finish(numbers)


# --- on a finished single head ---


def _brme(job: Job) -> None:
    preset = PRESETS.get(job.config.preset, {})
    config = replace(_like(job.train, job.config.brme), members=job.config.members, **preset)
    require_ratings(job.preferences, config)  # before hours of stage 1
    train_brme(_stage1(job), job.preferences, config, **job.common)


def _energy(job: Job) -> None:
    config = _like(job.train, job.config.energy)
    train_energy(_stage1(job), job.preferences, config, **job.common)


def _laplace(job: Job) -> None:
    config = _like(job.train, job.config.laplace)
    if config.members:  # 0: one member, with the std
        config = replace(config, members=job.config.members)
    fit_laplace(_stage1(job), job.preferences, config, **job.common)


def _attributes(job: Job) -> None:
    options = job.config
    rated = read_ratings(options.ratings) if options.ratings else []  # before hours of stage 1
    stage1 = _stage1(job)
    if not rated:  # for want of people's ratings: what the text itself shows, and stage 1's score
        rated = rated_by_text(job.preferences, {"stage1": stage1})
    folder = job.folder / "attributes"
    if finished_summary(folder) is None:
        config = _like(job.train, options.attributes)
        train_attributes(stage1, rated, config, output_dir=folder, reference=job.reference)
    model = job.load(folder / "model")
    train_gating(model, job.preferences, _like(job.train, options.gating), **job.common)


def read_ratings(source: str | Path) -> list[RatedRow]:
    """Read JSONL rows with `prompt`, `completion` and a number for each attribute rated.

    Every column of numbers is an attribute; `attributes.attributes` names those to learn.

    Raises:
        DataError: A row lacks prompt or completion.
    """
    rows = []
    for line, row in read_jsonl(source):
        where = f"{source}, line {line}"
        completion = row.get("completion", row.get("response"))  # HelpSteer2 has responses
        if "prompt" not in row or completion is None:
            raise DataError(f"{where}: needs 'prompt' and 'completion' beside its ratings.")
        ratings = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        rows.append(RatedRow(row["prompt"], completion, ratings, where))
    return rows


def _stage1(job: Job) -> RewardModel:
    if job.config.stage1:
        return job.load(Path(job.config.stage1))
    _train_one(job, job.folder / "stage1", seed=job.train.seed, report=None)  # stage 2 reports
    return job.load(job.folder / "stage1" / "model")


FAMILIES: dict[str, Callable[[Job], None]] = {
    "single": _single,
    "heads": _heads,
    "brme": _brme,
    "deep": _deep,
    "lora": _lora,
    "warm": _warm,
    "attributes": _attributes,
    "energy": _energy,
    "laplace": _laplace,
}


def _like(train: RewardConfig, config: ConfigT) -> ConfigT:
    """Return the options of another training with what does not belong to it alone."""
    values = {name: getattr(train, name) for name in _SHARED if hasattr(config, name)}
    return replace(config, **values)  # type: ignore[type-var]


def _train_one(job: Job, folder: Path, *, seed: int, report: LoadReport | None) -> None:
    """Train a single head in a folder of its own, unless it is there."""
    if finished_summary(folder) is None:
        model = job.make(seed=seed)
        train_reward(
            model,
            job.preferences,
            replace(job.train, seed=seed),
            output_dir=folder,
            reference=job.reference,
            report=report,
            auxiliary=job.beside(model, seed),
        )


def _accuracy(model: RewardModel, rows: Sequence[PreferenceRow]) -> float:
    """Share of the rows that fit the context whose order the model tells, ties at half."""
    rows = fitting_rows(model, rows)
    prompts, completions = own_completions(rows, limit=len(rows))
    rewards = model.score(prompts, completions).mean
    return ((rewards[0::2] - rewards[1::2]).sign() + 1).mean().item() / 2


def _numbers(folder: Path) -> dict[str, float]:
    summary = finished_summary(folder)
    assert summary is not None
    return {k: float(v) for k, v in summary["metrics"].items() if isinstance(v, int | float)}


def _mean_numbers(folders: Sequence[Path]) -> dict[str, float]:
    """Return the mean over the members of every number that all of them have."""
    found = [_numbers(folder) for folder in folders]
    return {
        f"members/{key}": sum(f[key] for f in found) / len(found)
        for key in found[0]
        if all(key in f for f in found)
    }
