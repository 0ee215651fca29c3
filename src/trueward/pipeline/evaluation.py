"""What a run reports: rewards on preferences, policies on held-out prompts, and the shift."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from trueward.data.formats import (
    PreferenceRow,
    Prompt,
)
from trueward.evaluate.judges import reward_judge
from trueward.evaluate.preferences import evaluate_preferences, mean_interval
from trueward.evaluate.shift import judged_pairs, shift_table
from trueward.evaluate.winrate import win_rate
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward, fitting_rows, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.pipeline.config import RLPConfig
from trueward.pipeline.inputs import Inputs
from trueward.sampling import SamplingConfig, read_samples
from trueward.train.run_folder import write_text

Samples = list[tuple[Prompt, list[str]]]
# Draws completions once into a folder: `stages.draw_stage`.
Draw = Callable[[Policy, Sequence[Prompt], SamplingConfig, Path], Samples]


def evaluate_on(reward: Reward, sources: dict[str, list[PreferenceRow]]) -> dict[str, float]:
    """Return `NAME/metric` of a reward model, or of several, on each set of preferences.

    Rows with a side longer than the model's context are left out and counted in `NAME/overlong`.
    """
    score = reward.score if isinstance(reward, RewardModel) else reward
    found: dict[str, float] = {}
    for name, rows in sources.items():
        fitting = fitting_rows(reward, rows)
        found[f"{name}/overlong"] = float(len(rows) - len(fitting))
        if fitting:
            metrics = evaluate_preferences(score, fitting)
            found |= {f"{name}/{key}": value for key, value in metrics.items()}
    return found


def evaluate_policy(
    config: RLPConfig,
    label: str,
    policy: Policy,
    proxy: Reward,
    gold: Reward | None,
    inputs: Inputs,
    out: Path,
    draw: Draw,
) -> dict[str, float]:
    """Draw one completion for each held-out prompt and report proxy, gold, length and win rate."""
    sampling = dataclasses.replace(
        config.samples, n=1, temperature=config.evaluation_temperature, seed=config.seed + 1
    )
    name = folder_name(label)
    drawn = draw(policy, inputs.held_out, sampling, out / f"07_completions_{name}")
    texts = [t[0] for _, t in drawn]
    rewards = posterior_function(proxy)(inputs.held_out, texts)
    row = {
        "proxy": config.objective.build()(rewards).mean().item(),
        "length": sum(len(t.split()) for t in texts) / len(texts),
    }
    if gold is not None:
        scores = posterior_function(gold)(inputs.held_out, texts).mean
        low, high = mean_interval(scores)
        row |= {"gold": scores.mean().item(), "gold_low": low, "gold_high": high}
        sft = read_samples(out / "07_completions_sft" / "completions.jsonl")
        rate = win_rate(reward_judge(gold), inputs.held_out, texts, [t[0] for _, t in sft])
        row |= {
            "win_rate": rate.win_rate,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "win_rate_length_controlled": rate.length_controlled.win_rate,
        }
    return row


def shift_of(
    config: RLPConfig,
    policies: dict[str, tuple[Policy, Reward | None]],
    gold: Reward | None,
    inputs: Inputs,
    out: Path,
    draw: Draw,
) -> dict[str, dict[str, float]]:
    """Return each reward's agreement with gold on pairs of each policy's samples.

    The paper's claim is that refinement keeps the reward accurate where the policy went. Beside the
    numbers, `shift.json` holds their intervals and paired differences.
    """
    rewards = {label: reward for label, (_, reward) in policies.items() if reward is not None}
    if gold is None:
        return {}
    sampling = dataclasses.replace(config.samples, n=2, seed=config.seed + 2)
    sources = {}
    for label, (policy, _) in policies.items():
        drawn = draw(policy, inputs.held_out, sampling, out / f"07_pairs_{folder_name(label)}")
        prompts, completions = [p for p, _ in drawn], [texts for _, texts in drawn]
        sources[label] = judged_pairs(prompts, completions, gold=gold).rows
    judged = {label: rows for label, rows in sources.items() if rows}
    if not judged:
        return {}
    table = shift_table(rewards, judged, objective=config.objective.build(), seed=config.seed)
    write_text(out / "shift.json", json.dumps(dataclasses.asdict(table), indent=1))
    return {
        f"reward model of {reward}": {
            f"accuracy on {source}": table.accuracy(reward, source).accuracy for source in judged
        }
        for reward in rewards
    }


def folder_name(label: str) -> str:
    """Return a policy's label as it stands in names of folders."""
    return label.lower().replace(" ", "_")


def write_table(out: Path, rows: dict[str, dict[str, float]]) -> None:
    """Write the comparison of the policies for the report."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = {
        "columns": ["policy", *columns],
        "rows": [[label, *(row.get(c) for c in columns)] for label, row in rows.items()],
        "caption": "Policies on held-out prompts; gold is a reward model trained on other data.",
    }
    write_text(out / "table.json", json.dumps(table, indent=2))
