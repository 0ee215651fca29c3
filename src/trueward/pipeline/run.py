"""RLP from its demonstrations to its table of policies."""

import json
import logging
from pathlib import Path

from trueward.models.policy import Policy
from trueward.models.reward_function import Reward
from trueward.pipeline.config import RLPConfig
from trueward.pipeline.evaluation import evaluate_policy, shift_of, write_table
from trueward.pipeline.inputs import load_inputs, split_prompts
from trueward.pipeline.stages import (
    Refinement,
    draw_stage,
    ensemble_of,
    fresh_rewards,
    policy_stage,
    reason_to_stop,
    reference_stage,
    reward_stage,
    samples_stage,
    sft_stage,
)
from trueward.refine.refinement import (
    LABELS,
)
from trueward.train.families import (
    FamilyConfig,
)
from trueward.train.run_folder import RunFolder, finished_summary, write_text

logger = logging.getLogger(__name__)


def run_rlp(config: RLPConfig) -> dict[str, object]:
    """Run the pipeline, or what is left of it, and return its summary."""
    out = Path(config.output_dir)
    folder = RunFolder(out, command="rlp", config=config)
    done = finished_summary(out)
    if done is not None:
        logger.info("%s is finished.", out)
        return done
    inputs = load_inputs(config)
    for report in inputs.reports:
        logger.info("%s", report.summary())

    sft = sft_stage(config, inputs, out / "01_sft")
    inputs = split_prompts(config, sft, inputs)
    gold = None
    if inputs.gold:
        # Another seed and other data than the proxy's: its errors are not the proxy's errors.
        gold = reward_stage(
            config,
            fresh_rewards(config, sft),
            inputs.gold,
            inputs,
            out / "02_gold",
            seed=config.seed + 1000,
            family=FamilyConfig(),
            reference=reference_stage(config, sft, inputs, out),
        )
    reward = reward_stage(
        config,
        fresh_rewards(config, sft),
        inputs.preferences,
        inputs,
        out / "02_reward",
        seed=config.seed,
        reference=reference_stage(config, sft, inputs, out),
    )
    first = policy_stage(config, reward, inputs, out / "03_policy")
    name_of_first = config.policy.algorithm.upper()
    policies: dict[str, tuple[Policy, Reward | None]] = {
        "SFT": (sft, None),
        name_of_first: (first, reward),
    }
    stopped: dict[str, str] = {}
    for method in config.methods:
        refinement = Refinement(config, method, sft, inputs, out)
        current, models = first, [reward]
        for round_ in range(1, config.rounds + 1):
            name = f"{method}_{round_}"
            drawn = samples_stage(
                config, current, inputs, out / f"04_samples_{'1' if round_ == 1 else name}"
            )
            model = refinement(
                models[-1], current, drawn, out / f"05_reward_{name}", number=(round_,)
            )
            if reason := reason_to_stop(config, models[-1], model, drawn, out, name):
                stopped[method] = f"round {round_}: {reason}"
                logger.info("%s stops before the policy of %s", method, stopped[method])
                break
            models.append(model)
            optimised = ensemble_of(models) if config.ensemble_rounds else model
            current = policy_stage(
                config, optimised, inputs, out / f"06_policy_{name}", refinement=refinement
            )
            models[-1] = refinement.last(model, out / f"06_policy_{name}")
            if not config.ensemble_rounds:
                optimised = models[-1]
            label = LABELS[method] + (f" round {round_}" if config.rounds > 1 else "")
            policies[label] = (current, optimised)
    rows = {
        label: evaluate_policy(config, label, policy, reward, gold, inputs, out, draw_stage)
        for label, (policy, _) in policies.items()
    }
    shift = shift_of(config, policies, gold, inputs, out, draw_stage)
    stages = {
        p.parent.name: json.loads(p.read_text("utf-8")) for p in sorted(out.glob("*/summary.json"))
    }
    write_table(out, rows)
    write_text(out / "data.txt", "\n\n".join(r.summary(limit=20) for r in inputs.reports) + "\n")
    metrics = {
        "policies": rows,
        "reward_models_on_policy_samples": shift,
        "stopped": stopped,
        "stages": {k: {"seconds": s["seconds"], **s["metrics"]} for k, s in stages.items()},
    }
    spent = sum(s["seconds"] for s in stages.values())
    return folder.finish(metrics, seed=config.seed, seconds=spent)
