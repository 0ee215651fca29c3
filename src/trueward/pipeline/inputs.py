"""The rows of a run, loaded once: nothing is trained on that is reported on."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from trueward.data.formats import (
    DataError,
    DemonstrationRow,
    Loaded,
    LoadReport,
    PreferenceRow,
    Prompt,
    PromptRow,
    load_demonstrations,
    load_preferences,
    load_prompts,
    prompt_key,
)
from trueward.models.policy import Policy
from trueward.pipeline.config import RLPConfig
from trueward.refine.spg import prompt_routes
from trueward.sampling import fitting_prompts


@dataclass(frozen=True)
class Inputs:
    """All rows of a run, loaded once; the report says what was left out."""

    demonstrations: list[DemonstrationRow]
    preferences: list[PreferenceRow]
    unlabelled: list[PromptRow]  # the held-out ones first
    prompts: list[Prompt]  # of the policy; known once the policy's context is
    held_out: list[Prompt]
    gold: list[PreferenceRow]
    evaluation: dict[str, list[PreferenceRow]]
    routes: dict[str, str]  # of a prompt's key, by which its equivalence is chosen
    reports: list[LoadReport]


def load_inputs(config: RLPConfig) -> Inputs:
    """Read all sources, and leave out of training what is reported on.

    Raises:
        DataError: A source cannot be read, or no prompt is left for the policy.
    """
    data = config.data
    common: dict[str, Any] = {
        "data_dir": data.data_dir or None,
        "local_names": data.local_names,
        "conversational": data.conversational,
    }
    demonstrations = load_demonstrations(
        data.demonstrations, max_rows=data.max_demonstrations or None, **common
    )
    preferences = load_preferences(
        data.preferences, max_rows=data.max_preferences or None, **common
    )
    wanted = data.skip_prompts + data.max_prompts + data.evaluation_prompts
    prompts = load_prompts(data.prompts, max_rows=wanted if data.max_prompts else None, **common)
    gold = [
        load_preferences(s, max_rows=data.max_gold_preferences or None, **common)
        for s in data.gold_preferences
    ]
    evaluation = {
        name: load_preferences(s, max_rows=data.max_evaluation or None, **common)
        for name, s in data.evaluation.items()
    }
    parts: list[Loaded[Any]] = [demonstrations, preferences, prompts, *gold, *evaluation.values()]
    # Nothing is trained on that is reported on: neither the evaluation sets' prompts nor the
    # held-out ones, whatever source they come from.
    reserved = {prompt_key(row.prompt) for part in evaluation.values() for row in part.rows}
    unlabelled = _without(prompts, reserved)[data.skip_prompts :]
    reserved |= {prompt_key(row.prompt) for row in unlabelled[: data.evaluation_prompts]}
    trainable: list[Loaded[Any]] = [demonstrations, preferences, *gold]
    trained = [_without(part, reserved) for part in trainable]
    if len(unlabelled) <= data.evaluation_prompts:
        raise DataError(
            f"{data.prompts} has {len(unlabelled)} prompts after skip_prompts={data.skip_prompts}, "
            f"of which evaluation_prompts={data.evaluation_prompts} are held out: none is left for "
            "the policy."
        )
    return Inputs(
        demonstrations=trained[0],
        preferences=trained[1],
        unlabelled=unlabelled,
        prompts=[],
        held_out=[],
        gold=[row for rows in trained[2:] for row in rows],
        evaluation={name: part.rows for name, part in evaluation.items()},
        routes=prompt_routes(unlabelled, route_by=config.spg.route_by),
        reports=[part.report for part in parts],
    )


def split_prompts(config: RLPConfig, policy: Policy, inputs: Inputs) -> Inputs:
    """Report prompts that leave no room for a completion; split the others."""
    fitting = fitting_prompts(policy, inputs.unlabelled, inputs.reports[2])
    held_out = {prompt_key(r.prompt) for r in inputs.unlabelled[: config.data.evaluation_prompts]}
    return dataclasses.replace(
        inputs,
        prompts=[r.prompt for r in fitting if prompt_key(r.prompt) not in held_out],
        held_out=[r.prompt for r in fitting if prompt_key(r.prompt) in held_out],
    )


def _without(part: Loaded[Any], reserved: set[str]) -> list[Any]:
    """Return the rows whose prompt is in no evaluation set, and report the others."""
    kept = []
    for row in part.rows:
        if prompt_key(row.prompt) in reserved:
            part.report.add("in an evaluation set", row.where, "its prompt is reported on")
        else:
            kept.append(row)
    return kept
