"""The demo: over-optimisation shown, and what is done against it, in the embedded world.

A policy learns the grammar, an annotator compares some of its answers, five reward models learn
from the noisy comparisons, and policies are optimised hard against several rewards made of them.
The gold reward is only watched. What comes out is reported as it is.
"""

import copy
import dataclasses
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from trueward import objectives
from trueward.data.rows import Completion, PreferenceRow, Prompt
from trueward.evaluate.preferences import evaluate_preferences, mean_interval
from trueward.lab.grammar import GrammarWorld, same_content
from trueward.models.policy import Policy
from trueward.models.reward_function import posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.refine.multiview import MultiView, MultiViewConfig
from trueward.refine.synthetic import synthetic_preferences
from trueward.report.html import Table
from trueward.report.run import report_run, rich_table
from trueward.sampling import SamplingConfig, sample
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.run_folder import RunFolder, write_text
from trueward.train.sft import SFTConfig, train_sft

logger = logging.getLogger(__name__)
# A file or pipe has no width of its own: leave the tables theirs.
console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
_REFINED = 50  # the "member" whose seed control, SPG and UML share: they differ in method alone
_MAX_WORDS = 40  # of an answer; those of the demonstrations end by 30
Objective = Callable[[RewardPosterior], Tensor]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults take some minutes on two cores."""

    output_dir: str = "runs/demo"
    seed: int = 0
    demonstrations: int = 3000
    pairs: int = 800  # prompts with two answers each, compared once
    members: int = 5  # reward models
    steps: int = 45  # of policy optimisation
    prompts_per_step: int = 16
    completions_per_prompt: int = 4
    learning_rate: float = 2e-4  # of the policies
    nominal_weight: float = 0.2  # of the reward-robust mix
    refine_after: int = 15  # steps of the single-reward policy after which RLP samples it
    refine_prompts: int = 200  # prompts on which RLP samples the policy
    evaluation_prompts: int = 256  # fresh prompts for the table
    world: GrammarWorld = field(default_factory=GrammarWorld)


@dataclass
class _Stage:
    """What the demo carries from step to step."""

    config: DemoConfig
    out: Path
    sft: Policy
    reference: tuple[list[str], list[str]]  # prompts and SFT answers
    gold_mean: float  # of the SFT answers; gold is shown in their units
    gold_std: float
    shown: list[dict[str, Any]] = field(
        default_factory=lambda: [{"prompt": "", "completions": []} for _ in range(3)]
    )

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return the gold reward, 0 and 1 being mean and std of the SFT policy's answers."""
        raw = self.config.world.gold(prompts, completions)
        return (raw - self.gold_mean) / self.gold_std


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, write table, curves and report, and print the table."""
    out = Path(config.output_dir)
    folder = RunFolder(out, command="demo", config=config)
    torch.set_num_threads(1)  # matrices are tiny: more threads only wait for each other
    world, seed = config.world, config.seed

    _say("1/5 a policy learns the language (supervised fine-tuning)")
    sft = world.new_policy(seed=seed)
    sft_config = SFTConfig(learning_rate=3e-3, batch_size=64, epochs=4.0, seed=seed)
    train_sft(sft, world.demonstrations(config.demonstrations, seed=seed), sft_config)

    _say("2/5 an annotator compares its answers; reward models learn from the comparisons")
    prompts = world.prompts(config.pairs, seed=seed + 1)
    answers = _answers(sft, prompts, n=2, seed=seed)
    flat_prompts = [p for p in prompts for _ in range(2)]
    flat = [a for pair in answers for a in pair]
    gold = world.gold(flat_prompts, flat)
    stage = _Stage(
        config,
        out,
        sft,
        (flat_prompts[:400], flat[:400]),
        gold.mean().item(),
        gold.std(correction=0).item(),
    )
    preferences = world.comparisons(prompts, answers, seed=seed)
    members = [_reward_model(stage, preferences, k) for k in range(config.members)]
    single = members[:1]

    _say("3/5 policies are optimised against five rewards made of them (RLOO, no KL penalty)")
    rewards: dict[str, tuple[list[RewardModel], Objective]] = {
        "single reward": (single, objectives.mean),
        "worst case": (members, objectives.worst_case),
        f"reward-robust mix ({config.nominal_weight:g})": (
            members,
            lambda p: objectives.reward_robust(p, nominal_weight=config.nominal_weight),
        ),
        "ensemble mean": (members, objectives.mean),
        "uncertainty-weighted": (
            members,
            lambda p: objectives.uncertainty_weighted(p, coef=0.5),
        ),
    }
    results = {"SFT": _measure(stage, "SFT", sft, single, objectives.mean)}
    curves: dict[str, list[dict[str, float]]] = {}
    early: dict[str, Policy] = {}
    for name, (models, objective) in rewards.items():
        policy, early[name], curves[name] = _optimise(stage, name, models, objective)
        results[name] = _measure(stage, name, policy, models, objective)

    _say("4/5 the reward model is refined on what the first policy writes (RLP)")
    first = early["single reward"]
    refined = _refined(stage, first, single[0], preferences)
    accuracy = _accuracies(stage, {"single reward": single[0], **refined}, first)
    for name, model in refined.items():
        policy, _, curves[name] = _optimise(stage, name, [model], objectives.mean)
        results[name] = _measure(stage, name, policy, [model], objectives.mean)

    _say("5/5 report")
    for table in _write(stage, results, curves, accuracy):
        console.print(rich_table(table))
    metrics = {"policies": results, "reward_model_accuracy": accuracy}
    summary = folder.finish(metrics, seed=seed)
    console.print(f"Report: {report_run(out)}", highlight=False)
    return summary


def _reward_model(
    stage: _Stage,
    preferences: Sequence[PreferenceRow],
    member: int,
    *,
    auxiliary: nn.Module | None = None,
    synthetic: Sequence[PreferenceRow] = (),
) -> RewardModel:
    """Train one Gaussian reward from the SFT body; members differ in head, order and subset."""
    seed = stage.config.seed * 100 + member
    model = RewardModel.from_backbone(
        copy.deepcopy(stage.sft.backbone), stage.sft.tokenizer, members=1, seed=seed
    )
    rng = random.Random(seed)
    seen = [row for row in preferences if rng.random() < 0.8]
    config = RewardConfig(learning_rate=1e-3, batch_size=32, epochs=4.0, seed=seed)
    return train_reward(
        model, [*seen, *synthetic], config, reference=stage.reference, auxiliary=auxiliary
    )


def _optimise(
    stage: _Stage, name: str, models: list[RewardModel], objective: Objective
) -> tuple[Policy, Policy, list[dict[str, float]]]:
    """Optimise a policy from SFT.

    Returns the policy, how it was after `refine_after` steps, and gold, proxy and KL of each step's
    samples.
    """
    config = stage.config
    posterior_of = posterior_function(models)
    gold: list[float] = []

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        gold.append(stage.gold(prompts, completions).mean().item())  # watched, never optimised
        return posterior_of(prompts, completions)

    early: list[Policy] = []

    def keep_early(policy: Policy, step: int) -> dict[str, float]:
        if step == config.refine_after:
            early.append(policy.frozen_copy())
        return {}

    policy = Policy(copy.deepcopy(stage.sft.model), stage.sft.tokenizer)
    folder = stage.out / ("policy_" + "_".join(name.split(" (")[0].split()))
    train_policy(
        policy,
        reward,
        config.world.prompts(600, seed=config.seed + 2),
        PolicyConfig(
            algorithm="rloo",
            steps=config.steps,
            prompts_per_step=config.prompts_per_step,
            completions_per_prompt=config.completions_per_prompt,
            max_new_tokens=_MAX_WORDS,
            learning_rate=config.learning_rate,
            schedule="constant",
            warmup_ratio=0.05,
            kl_coef=0.0,
            checkpoint_every=0,
            evaluate_every=config.refine_after,
            seed=config.seed,
        ),
        objective=objective,
        output_dir=folder,
        evaluation=keep_early,
    )
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        policy,
        early[0] if early else policy,
        [
            {"step": float(s["step"]), "kl": s["kl/k1"], "gold": g, "proxy": s["reward"]}
            for s, g in zip(steps, gold, strict=True)
        ],
    )


def _measure(
    stage: _Stage, name: str, policy: Policy, models: list[RewardModel], objective: Objective
) -> dict[str, float]:
    """Return proxy, gold with its interval, and length of fresh answers to fresh prompts."""
    prompts = stage.config.world.prompts(
        stage.config.evaluation_prompts, seed=stage.config.seed + 3
    )
    answers = [a[0] for a in _answers(policy, prompts, n=1, seed=stage.config.seed + 3)]
    gold = stage.gold(prompts, answers)
    low, high = mean_interval(gold)
    proxy = objective(posterior_function(models)(prompts, answers))
    for i, shown in enumerate(stage.shown):  # some to look at
        shown["prompt"] = prompts[i]
        scores = {"gold": round(gold[i].item(), 2), "proxy": round(proxy[i].item(), 2)}
        shown["completions"].append({"text": answers[i], "label": name, "scores": scores})
    return {
        "proxy": proxy.mean().item(),
        "gold": gold.mean().item(),
        "gold_low": low,
        "gold_high": high,
        "length": sum(len(a.split()) for a in answers) / len(answers),
    }


def _refined(
    stage: _Stage, policy: Policy, scorer: RewardModel, preferences: Sequence[PreferenceRow]
) -> dict[str, RewardModel]:
    """Refine the single reward on the policy's samples: SPG, UML, and the control with neither."""
    config = stage.config
    prompts = config.world.prompts(config.refine_prompts, seed=config.seed + 4)
    answers = _answers(policy, prompts, n=10, seed=config.seed + 4)
    rewards = scorer.score(
        [p for p in prompts for _ in range(10)], [a for ten in answers for a in ten]
    ).mean.view(-1, 10)
    made = synthetic_preferences(
        prompts, answers, rewards, equivalent=same_content, gamma=0.5, seed=config.seed
    )
    logger.info(
        "SPG: %d of %d prompts gave a pair (mean confidence %.2f).",
        made.report.accepted,
        made.report.prompts,
        made.report.mean_confidence or 0.0,
    )
    width = stage.sft.backbone.config.hidden_size
    multi_view = MultiView(
        width,
        list(zip(prompts, answers, strict=True)),
        MultiViewConfig(latent=32, width=128, seed=config.seed),
    )
    return {
        "retrained (control)": _reward_model(stage, preferences, _REFINED),
        "RLP-SPG": _reward_model(stage, preferences, _REFINED, synthetic=made.to_preferences()),
        "RLP-UML": _reward_model(stage, preferences, _REFINED, auxiliary=multi_view),
    }


def _accuracies(
    stage: _Stage, models: dict[str, RewardModel], first: Policy
) -> dict[str, dict[str, float]]:
    """Return each reward's agreement with gold on pairs of the SFT and of the first policy."""
    config = stage.config
    world = dataclasses.replace(config.world, label_noise=0.0)
    prompts = world.prompts(config.evaluation_prompts, seed=config.seed + 5)
    pairs = {}
    for name, policy in {"SFT policy": stage.sft, "first policy": first}.items():
        answers = _answers(policy, prompts, n=2, seed=config.seed + 5)
        pairs[name] = world.comparisons(prompts, answers, seed=config.seed)
    return {
        model_name: {
            f"pairs of the {name}": evaluate_preferences(model.score, rows)["accuracy"]
            for name, rows in pairs.items()
            if rows
        }
        for model_name, model in models.items()
    }


def _answers(policy: Policy, prompts: Sequence[str], *, n: int, seed: int) -> list[list[str]]:
    drawn = sample(policy, prompts, SamplingConfig(n=n, max_new_tokens=_MAX_WORDS, seed=seed))
    return [[s.text for s in drawn[i * n : (i + 1) * n]] for i in range(len(prompts))]


def _write(
    stage: _Stage,
    results: dict[str, dict[str, float]],
    curves: dict[str, list[dict[str, float]]],
    accuracy: dict[str, dict[str, float]],
) -> list[Table]:
    """Write `table.json` and `curves.json` for the report, and return the tables."""
    columns = ["reward", "proxy", "gold", "95 % interval", "gold at its peak", "KL at end", "words"]
    rows: list[list[str | float | None]] = []
    for name, numbers in results.items():
        smooth = _smooth(curves.get(name, []))
        interval = f"{numbers['gold_low']:.2f} to {numbers['gold_high']:.2f}"
        peak = max((point["gold"] for point in smooth), default=None)
        end = smooth[-1]["kl"] if smooth else 0.0
        rows.append(
            [name, numbers["proxy"], numbers["gold"], interval, peak, end, numbers["length"]]
        )
        numbers |= {"gold_peak": peak or 0.0, "kl": end}
    agreement = Table(
        columns=["reward model", *next(iter(accuracy.values()))],
        rows=[[name, *row.values()] for name, row in accuracy.items()],
        caption="Agreement with gold on pairs of answers, before and after refinement",
        notes=(
            f"The first policy is the single reward's after {stage.config.refine_after} steps, on "
            "whose samples SPG and UML refined the reward. The control was trained again with "
            "another seed and nothing new."
        ),
    )
    table = Table(
        columns=columns,
        rows=rows,
        caption=f"Policies after {stage.config.steps} steps of RLOO without a KL penalty",
        notes=(
            "Rewards in standard deviations of the SFT policy's answers, 0 being their mean. "
            "Proxy is what the row optimises, so proxies of different rows are not comparable. "
            f"One seed ({stage.config.seed}); the interval is over prompts, not over seeds."
        ),
    )
    write_text(
        stage.out / "table.json",
        json.dumps([dataclasses.asdict(t) for t in (table, agreement)], indent=2),
    )
    smooth_curves = {name: _smooth(points) for name, points in curves.items()}
    figures: dict[str, Any] = {
        f"{y.capitalize()} {words}": {
            "curves": [
                {"name": name, "x": [p[x] for p in points], "y": [p[y] for p in points]}
                for name, points in smooth_curves.items()
            ],
            "x_label": label,
            "y_label": y,
            "x_scale": scale,
        }
        for y, x, words, label, scale in (
            ("gold", "step", "over the steps", "step", "linear"),
            ("proxy", "step", "over the steps", "step", "linear"),
            ("gold", "kl", "against KL", "KL from the SFT policy (nats)", "sqrt"),
        )
    }
    write_text(stage.out / "samples.json", json.dumps(stage.shown, indent=2))
    write_text(stage.out / "curves.json", json.dumps(figures))
    return [table, agreement]


def _smooth(points: list[dict[str, float]], window: int = 5) -> list[dict[str, float]]:
    """Return means over blocks of steps: one step's samples are few."""
    blocks = [points[i : i + window] for i in range(0, len(points), window)]
    return [{k: sum(p[k] for p in b) / len(b) for k in b[0]} for b in blocks]


def _say(text: str) -> None:
    console.print(f"[bold]{text}[/bold]", highlight=False)
