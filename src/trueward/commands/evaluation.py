"""Commands that judge and show: evaluate and report."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueward.commands.shared import (
    DataOptions,
    completions_of_rows,
    console,
    load_reward,
    numbers_text,
)
from trueward.data.formats import (
    DataError,
    PreferenceRow,
    load_preferences,
    read_jsonl,
)
from trueward.evaluate.judges import ChatJudge, Judge, reward_judge
from trueward.evaluate.overoptimization import best_of_n_curve, best_of_n_kl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.winrate import win_rate
from trueward.models.reward_function import Reward
from trueward.models.reward_model import RewardModel
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.report.run import report_run
from trueward.train.run_folder import write_text


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
        console.print(f"{name}: {numbers_text(numbers)}", highlight=False)


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
class ReportCommand:
    """Write the HTML report of a run's folder."""

    folder: str


def report(config: ReportCommand) -> None:
    """Write `report.html` into the folder."""
    console.print(str(report_run(config.folder)), highlight=False)
