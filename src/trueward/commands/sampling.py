"""Commands from JSONL to JSONL: sample and score."""

from dataclasses import dataclass, field

from trueward.commands.shared import DataOptions, completions_of_rows, console, numbers_text
from trueward.data.formats import (
    load_prompts,
    read_jsonl,
    write_jsonl,
)
from trueward.models.policy import Policy
from trueward.models.reward_function import load_reward_models
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.sampling import SamplingConfig, fitting_prompts, sample_to_file


@dataclass(frozen=True, kw_only=True)
class SampleCommand:
    """Draw completions."""

    policy: str  # folder or hub id
    prompts: str  # file, folder, or hub name
    output: str  # a .jsonl file: prompt, completions, finished, logps
    # Columns of the prompts' rows that the output keeps: `lang` chooses an equivalence later.
    keep: list[str] = field(default_factory=lambda: ["lang"])
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
        extras=[{k: row.extra[k] for k in config.keep if k in row.extra} for row in rows],
    )
    console.print(f"{config.output}: {numbers_text(numbers)}", highlight=False)


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
    prompts, completions, counts = completions_of_rows(rows, config.input)
    models = load_reward_models(*config.reward_model)
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
