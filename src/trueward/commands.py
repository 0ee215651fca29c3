"""What each command does: makes objects from names and files, and calls the functions below."""

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from trueward.config import parse
from trueward.data.formats import (
    DataError,
    Loaded,
    PreferenceRow,
    load_demonstrations,
    load_preferences,
    load_prompts,
    read_jsonl,
    split_by_prompt,
    text_of,
    write_jsonl,
)
from trueward.evaluate.judges import ChatJudge, Judge, reward_judge
from trueward.evaluate.overoptimization import best_of_n_curve, best_of_n_kl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.winrate import win_rate
from trueward.lab.compare import run_compare
from trueward.lab.demo import DemoConfig, run_demo
from trueward.lab.plan import CompareConfig
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.options import ObjectiveConfig, SPGConfig
from trueward.pipeline import RLPConfig, evaluate_on, run_rlp, write_synthetic
from trueward.posterior import RewardPosterior
from trueward.refine.multiview import MultiView, MultiViewConfig
from trueward.report.run import report_run
from trueward.sampling import SamplingConfig, fitting_prompts, read_samples, sample_to_file
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.run_folder import RunFolder, finished_summary, write_text
from trueward.train.sft import SFTConfig, train_sft

logger = logging.getLogger(__name__)
console = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How sources are looked up and read."""

    data_dir: str = ""  # folder that holds the data instead of the hub; also TRUEWARD_DATA
    local_names: dict[str, str] = field(default_factory=dict)  # hub name -> name under data_dir
    conversational: bool = False  # make strings into user turns
    max_rows: int = 0  # 0 = all

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the load functions."""
        return {
            "data_dir": self.data_dir or None,
            "local_names": self.local_names,
            "conversational": self.conversational,
            "max_rows": self.max_rows or None,
        }


@dataclass(frozen=True, kw_only=True)
class SFTCommand:
    """Train a policy on demonstrations."""

    demonstrations: str  # file, folder, or hub name owner/name[@config][:split]
    output_dir: str
    model: ModelSource = field(default_factory=ModelSource)
    data: DataOptions = field(default_factory=DataOptions)
    train: SFTConfig = field(default_factory=SFTConfig)


def sft(config: SFTCommand) -> None:
    """Train a policy and save it in `output_dir/model`."""
    if _finished(config, "sft"):
        return
    loaded = load_demonstrations(config.demonstrations, **config.data.arguments())
    texts = (text_of(t) for row in loaded.rows for t in (row.prompt, row.completion))
    policy = load_policy(config.model, texts, seed=config.train.seed)
    _start(config, "sft")
    train_sft(policy, loaded.rows, config.train, output_dir=config.output_dir, report=loaded.report)
    _tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class RewardCommand:
    """Train a reward model on preferences."""

    preferences: str  # file, folder, or hub name owner/name[@config][:split]
    backbone: str  # folder or hub id: the SFT model, or any backbone
    output_dir: str
    members: int = 0  # 0 = one scalar reward, K = Gaussian heads
    head_dropout: float = 0.0
    lora_rank: int = 0  # 0 = train all weights
    held_out: float = 0.05  # share of the prompts kept for the evaluation
    evaluation: dict[str, str] = field(default_factory=dict)  # name -> more preferences
    data: DataOptions = field(default_factory=DataOptions)
    train: RewardConfig = field(default_factory=RewardConfig)


def reward(config: RewardCommand) -> None:
    """Train a reward model and save it in `output_dir/model`."""
    if _finished(config, "reward"):
        return
    loaded = load_preferences(config.preferences, **config.data.arguments())
    rows, held_out = split_by_prompt(loaded.rows, fraction=config.held_out, seed=config.train.seed)
    sets = {"held_out": held_out} if held_out else {}
    for name, source in config.evaluation.items():
        more = load_preferences(source, **config.data.arguments())
        console.print(more.report.summary(), highlight=False)
        sets[name] = more.rows
    model = RewardModel.from_backbone(
        config.backbone,
        members=config.members,
        head_dropout=config.head_dropout,
        lora_rank=config.lora_rank,
        max_length=config.train.max_length,
        seed=config.train.seed,
    )
    model.facts = {"training data": Path(config.preferences).name, "base": config.backbone}
    _start(config, "reward")
    train_reward(
        model,
        rows,
        config.train,
        output_dir=config.output_dir,
        report=loaded.report,
        evaluation=lambda m: evaluate_on(m, sets),
    )
    _tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class PolicyCommand:
    """Optimise a policy against a reward."""

    policy: str  # folder or hub id
    reward: list[str]  # reward models (several make an ensemble), or one FILE.py:FUNCTION
    prompts: str  # file, folder, or hub name owner/name[@config][:split]
    output_dir: str
    lora_rank: int = 0  # 0 = train all weights; above, the reference is the adapter off
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataOptions = field(default_factory=DataOptions)
    train: PolicyConfig = field(default_factory=PolicyConfig)


def policy(config: PolicyCommand) -> None:
    """Train a policy and save it in `output_dir/model`."""
    if _finished(config, "policy"):
        return
    loaded = load_prompts(config.prompts, **config.data.arguments())
    start = Policy.from_pretrained(config.policy, lora_rank=config.lora_rank)
    rows = fitting_prompts(start, loaded.rows, loaded.report)
    reward_function = load_reward(config.reward)
    _start(config, "policy")
    train_policy(
        start,
        reward_function,
        rows,
        config.train,
        objective=config.objective.build(),
        output_dir=config.output_dir,
    )
    _tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Draw completions."""

    policy: str  # folder or hub id
    prompts: str  # file, folder, or hub name
    output: str  # a .jsonl file: prompt, completions, finished, logps
    data: DataOptions = field(default_factory=DataOptions)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def sample(config: SampleCommand) -> None:
    """Write a row for each prompt; a killed command goes on at its first missing shard."""
    loaded = load_prompts(config.prompts, **config.data.arguments())
    writer = Policy.from_pretrained(config.policy)
    rows = fitting_prompts(writer, loaded.rows, loaded.report)
    console.print(loaded.report.summary(), highlight=False)
    numbers = sample_to_file(
        writer,
        [row.prompt for row in rows],
        config.sampling,
        config.output,
        progress=None,
    )
    console.print(f"{config.output}: {_numbers(numbers)}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class ScoreCommand:
    """Score completions."""

    reward_model: list[str]  # several make an ensemble
    input: str  # JSONL rows with prompt and completion, or prompt and completions
    output: str  # the same rows with reward, mean, std and members
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    max_tokens: int = 16384  # padded tokens computed at once


def score(config: ScoreCommand) -> None:
    """Add `reward` (the objective's), `mean`, `std` and `members` to each row."""
    rows = [row for _, row in read_jsonl(config.input)]
    prompts, completions, counts = _completions(rows, config.input)
    models = [RewardModel.from_pretrained(path) for path in config.reward_model]
    # One model by its own convention (a scalar one's raw logit); several on their common scale.
    scale = None if len(models) == 1 else True
    posterior = RewardPosterior.stack_members(
        [
            m.score(
                prompts, completions, max_tokens=config.max_tokens, normalise=scale, progress=None
            )
            for m in models
        ]
    )
    values = {
        "reward": config.objective.build()(posterior).tolist(),
        "mean": posterior.mean.tolist(),
        "std": posterior.std.tolist(),
        "members": posterior.means.tolist(),
    }
    at = 0
    for row, count in zip(rows, counts, strict=True):
        for name, numbers in values.items():
            some = numbers[at : at + count]
            row[name] = some if "completions" in row else some[0]
        at += count
    write_jsonl(config.output, rows)
    console.print(f"{config.output}: {len(completions):,} completions scored.", highlight=False)


@dataclass(frozen=True, kw_only=True)
class RefineCommand:
    """Retrain a reward model on what the policy writes."""

    method: Literal["spg", "uml"]
    reward_model: str  # the current one: it ranks SPG's samples
    preferences: str  # D: file, folder, or hub name
    samples: str  # from `trueward sample`, n completions for each prompt
    backbone: str  # the SFT model: the new reward model starts from it
    output_dir: str
    warm_start: bool = False  # start from the current reward model instead
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    spg: SPGConfig = field(default_factory=SPGConfig)
    uml: MultiViewConfig = field(default_factory=MultiViewConfig)
    train: RewardConfig = field(default_factory=RewardConfig)


def refine(config: RefineCommand) -> None:
    """Train the refined reward model and save it in `output_dir/model`."""
    if _finished(config, "refine"):
        return
    out = Path(config.output_dir)
    loaded = load_preferences(config.preferences, **config.data.arguments())
    current = RewardModel.from_pretrained(config.reward_model)
    model = current
    if not config.warm_start:
        members = current.members if current.members > 1 else 0
        model = RewardModel.from_backbone(
            config.backbone,
            members=members,
            max_length=config.train.max_length,
            seed=config.train.seed,
        )
    model.facts = {"training data": Path(config.preferences).name, "refined by": config.method}
    drawn = read_samples(config.samples)
    _start(config, "refine")
    rows, auxiliary = list(loaded.rows), None
    if config.method == "uml":
        width = model.backbone.config.get_text_config().hidden_size
        auxiliary = MultiView(width, drawn, config.uml)
    else:
        needs_states = config.spg.equivalence == "policy_states"
        made = write_synthetic(
            config.spg,
            config.objective,
            current,
            Policy.from_pretrained(config.backbone) if needs_states else None,
            drawn,
            out,
            seed=config.train.seed,
        )
        console.print(_numbers(dataclasses.asdict(made.report)), highlight=False)
        rows += made.to_preferences()
    train_reward(
        model, rows, config.train, output_dir=out, report=loaded.report, auxiliary=auxiliary
    )
    _tell(config.output_dir, loaded)


def rlp(config: RLPConfig) -> None:
    """Run the pipeline and write its report."""
    run_rlp(config)
    console.print(f"Report: {report_run(config.output_dir)}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """A reward model on preferences; or completions against others, by a judge."""

    reward_model: list[str] = field(default_factory=list)  # several make an ensemble
    preferences: dict[str, str] = field(default_factory=dict)  # name -> file, folder or hub name
    completions: str = ""  # JSONL with prompt and completion(s), for a win rate
    reference_completions: str = ""  # the same prompts, answered by another policy
    judge: str = ""  # a reward model's folder, or chat:MODEL for an OpenAI-compatible endpoint
    base_url: str = "https://api.openai.com/v1"  # of the chat judge; its key is OPENAI_API_KEY
    best_of_n: str = ""  # JSONL with the lists `proxy` and `gold` of a prompt's samples
    output: str = ""  # a .json file for the numbers
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def evaluate(config: EvaluateCommand) -> None:
    """Print the numbers, and write them where asked."""
    found: dict[str, Any] = {}
    if config.preferences:
        if not config.reward_model:
            raise DataError("--preferences needs --reward_model: which model shall be evaluated?")
        model = load_reward(config.reward_model)
        for name, source in config.preferences.items():
            loaded = load_preferences(source, keep_ties=True, **config.data.arguments())
            console.print(loaded.report.summary(), highlight=False)
            found[name] = _evaluate_rows(model, loaded.rows, config.objective.build())
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
        console.print(f"{name}: {_numbers(numbers)}", highlight=False)


def _evaluate_rows(
    reward: Reward, rows: list[PreferenceRow], objective: Callable[[RewardPosterior], Tensor]
) -> dict[str, float]:
    """Evaluate on the rows that fit the reward's context; `overlong` counts the others."""
    models = [reward] if isinstance(reward, RewardModel) else reward
    fitting = rows
    if isinstance(models, Sequence):
        fitting = [
            r
            for r in rows
            if all(m.fits(r.prompt, r.chosen) and m.fits(r.prompt, r.rejected) for m in models)
        ]
    if not fitting:
        raise DataError("No row fits the reward model's context.")
    function = reward.score if isinstance(reward, RewardModel) else reward
    numbers = evaluate_preferences(function, fitting, objective=objective)
    return {"overlong": float(len(rows) - len(fitting)), **numbers}


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
    prompts, completions, _ = _completions(first, config.completions)
    reference_prompts, references, _ = _completions(second, config.reference_completions)
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
class ReportCommand:
    """Write the HTML report of a run's folder."""

    folder: str


def report(config: ReportCommand) -> None:
    """Write `report.html` into the folder."""
    console.print(str(report_run(config.folder)), highlight=False)


Training = SFTCommand | RewardCommand | PolicyCommand | RefineCommand

RUNS: dict[str, tuple[type, Callable[..., object]]] = {
    "demo": (DemoConfig, run_demo),
    "sft": (SFTCommand, sft),
    "reward": (RewardCommand, reward),
    "policy": (PolicyCommand, policy),
    "sample": (SampleCommand, sample),
    "score": (ScoreCommand, score),
    "refine": (RefineCommand, refine),
    "rlp": (RLPConfig, rlp),
    "evaluate": (EvaluateCommand, evaluate),
    "compare": (CompareConfig, run_compare),
    "report": (ReportCommand, report),
}


def run(name: str, arguments: Sequence[str]) -> None:
    """Parse a command's configuration and run it."""
    config_class, function = RUNS[name]
    function(parse(config_class, arguments, command=name))


def load_reward(names: Sequence[str]) -> Reward:
    """Return a reward model, several, or the function that `FILE.py:FUNCTION` names."""
    if not names:
        raise DataError("A reward is needed: a reward model's folder, or FILE.py:FUNCTION.")
    path, _, function = names[0].rpartition(":")
    if path.endswith(".py"):
        if len(names) > 1:
            raise DataError("Give either one reward function or reward models, not both.")
        return _python_function(Path(path), function)
    models = [RewardModel.from_pretrained(name) for name in names]
    return models[0] if len(models) == 1 else models


def _python_function(path: Path, name: str) -> Callable[..., object]:
    if not path.exists():
        raise DataError(f"The reward function's file {path} does not exist: check the path.")
    spec = importlib.util.spec_from_file_location("trueward_user_reward", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[..., object] | None = getattr(module, name, None)
    if not callable(found):
        raise DataError(f"{path} has no function '{name}'.")
    return found


def _completions(rows: list[dict[str, Any]], source: str) -> tuple[list[Any], list[Any], list[int]]:
    """Return prompts and completions, flat, and how many each row holds."""
    prompts, completions, counts = [], [], []
    for line, row in enumerate(rows, start=1):
        some = row.get("completions", [row["completion"]] if "completion" in row else None)
        if some is None or "prompt" not in row:
            raise DataError(
                f"{source}, row {line}: needs 'prompt' and 'completion' (or 'completions'), has "
                f"{', '.join(row) or 'nothing'}."
            )
        prompts += [row["prompt"]] * len(some)
        completions += some
        counts.append(len(some))
    return prompts, completions, counts


def _finished(config: "Training", name: str) -> bool:
    """Tell whether the folder holds this very run, finished; refuse another one's."""
    if finished_summary(config.output_dir) is None:
        return False
    _start(config, name)
    console.print(f"{config.output_dir} is finished; remove it to start afresh.", highlight=False)
    return True


def _start(config: "Training", name: str) -> None:
    """Save the command's whole configuration once its inputs are read; refuse another run's."""
    RunFolder(config.output_dir, command=name, config=config)


def _tell(output_dir: str, loaded: Loaded[Any]) -> None:
    """Print what was read, what was left out, and the summary's numbers."""
    console.print(loaded.report.summary(), highlight=False)
    summary = finished_summary(output_dir)
    if summary is not None:
        console.print(
            f"{output_dir}: {summary['seconds']:.0f} s; {_numbers(summary['metrics'])}",
            highlight=False,
        )


def _numbers(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()
    )
