"""The stages that the cells of a comparison share, in a world of language.

For each seed: the reference policy answers, the annotator compares, reward models learn from the
comparisons, and (for best-of-n) a pool of answers is drawn and scored. Every stage has its folder,
is done once and goes on after a kill; `lab.cells` stands on them.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from trueward import objectives
from trueward.data.formats import load_preferences
from trueward.data.rows import Completion, PreferenceRow, Prompt
from trueward.data.sources import read_jsonl, write_jsonl
from trueward.evaluate.policy_judge import policy_judge
from trueward.evaluate.shift import agreement
from trueward.lab.controls import length_reward, random_reward
from trueward.lab.methods import REFINED, Method
from trueward.lab.worlds import LanguageDials, LanguageWorld, answers_of
from trueward.models.policy import Policy
from trueward.models.reward_function import PosteriorFunction, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    METHODS,
    RefineMethod,
    refine_reward,
    require_own_options,
    rewards_of,
)
from trueward.refine.spg import SPGConfig
from trueward.train.families import FamilyConfig, train_family
from trueward.train.loop import seed_of
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.run_folder import RunFolder, finished_summary

logger = logging.getLogger(__name__)
_REFERENCE = 400  # answers of the reference policy that give members their common scale
_REFINED = 50  # the seed that all refined rewards share: they differ in method alone
_SHIFT = (100, 4)  # held-out prompts, and answers to each, on which rewards are held against gold


_COUNTS = (
    "pairs",
    "held_out_pairs",
    "reward_batch_size",
    "steps",
    "prompts_per_step",
    "training_prompts",
    "inner_epochs",
    "evaluate_every",
    "evaluation_prompts",
    "refine_after",
    "refine_prompts",
    "max_batch_tokens",
)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes of a cell's stages in a world of language; the defaults suit the embedded world."""

    pairs: int = 800  # prompts with two answers each, compared once
    held_out_pairs: int = 300  # compared too, for the rewards' reliability
    reward_epochs: float = 4.0
    reward_learning_rate: float = 1e-3
    reward_batch_size: int = 32  # pairs
    subset: float = 0.8  # share of the comparisons that each of several heads sees; models see all
    steps: int = 60  # of policy optimisation; with `long`, of the scouting run
    long: float = 0.0  # > 0: optimise for this many times the steps at which the baseline peaks
    prompts_per_step: int = 16
    completions_per_prompt: int = 4
    training_prompts: int = 600
    learning_rate: float = 2e-4  # of the policies, constant
    value_learning_rate_scale: float = 1.0  # the critic's rate over the policy's
    inner_epochs: int = 1  # passes over a step's completions
    evaluate_every: int = 5  # steps
    evaluation_prompts: int = 64
    evaluation_samples: int = 2  # answers to each, at every evaluation
    pool: int = 256  # answers to each evaluation prompt that best-of-n chooses from
    refine_after: int = 15  # steps of the policy that a refinement samples: RLP's pi_theta
    refine_optimiser: Literal["ppo", "rloo", "grpo"] = "rloo"  # of that policy
    refine_prompts: int = 200
    refine_samples: int = 10  # answers to each
    spg: SPGConfig = field(default_factory=lambda: SPGConfig(progress=False))
    uml: MultiViewConfig = field(default_factory=lambda: MultiViewConfig(latent=32, width=128))
    families: FamilyConfig = field(default_factory=FamilyConfig)  # options of the methods' families
    max_batch_tokens: int = 8192  # padded tokens computed at once

    def __post_init__(self) -> None:
        for name in ("evaluation_samples", "completions_per_prompt", "refine_samples", "pool"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}.")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "reward_learning_rate", "reward_epochs", "subset"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.subset > 1:
            raise ValueError(f"subset is a share in (0, 1], got {self.subset}.")
        require_own_options(self.spg, self.uml, REFINED)
        if self.spg.equivalence != SPGConfig().equivalence:
            raise ValueError("spg.equivalence is the world's own here: leave it out.")
        if self.long < 0:
            raise ValueError(f"long must be at least 0 (off), got {self.long}.")


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A world of language, the sizes, and the folder that everything is written to."""

    world: LanguageDials
    config: LanguageConfig
    out: Path
    monitor: int = 0  # models in the ensemble whose signals every policy's training logs; 0 = none

    @property
    def shared(self) -> Path:
        """What all seeds have in common."""
        return self.out / "shared"

    def ground(self, seed: int) -> Path:
        """What the cells of a seed have in common."""
        return self.out / "ground" / f"seed-{seed}"

    def open(self, seed: int) -> LanguageWorld:
        """Return the world, built before."""
        return self.world.open(self.shared, self.ground(seed) / "reference")

    def start(self, folder: Path, *, config: object = None) -> RunFolder | None:
        """Open a stage's folder; None where the stage is finished."""
        made_of = {"world": self.world, "language": self.config, "stage": config}
        run = RunFolder(folder, command="compare", config=made_of, free=("label",))
        return None if finished_summary(folder) is not None else run


class Scale(NamedTuple):
    """The unit of gold: mean and standard deviation over the reference policy's answers."""

    mean: float
    std: float

    def __call__(self, gold: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return gold in this unit."""
        return (gold - self.mean) / self.std


class RewardSpec(NamedTuple):
    """One reward model that a method needs; methods that need the same one share it."""

    name: str
    seed: int  # told apart from the cell's
    heads: int = 1
    epochs_scale: float = 1.0
    refine: RefineMethod | Literal[""] = ""
    family: str = ""  # of `train.families`; empty: heads on one body, trained on pairs
    round: int = 1  # of the refinement


def reward_specs(method: Method) -> list[RewardSpec]:
    """Return the reward models whose posterior a method optimises; none for a control."""
    if method.reward in REFINED:
        rounds = [refined_spec(method.reward, k + 1) for k in range(method.rounds)]
        return [FIRST, *rounds] if method.ensemble_rounds else rounds[-1:]
    if method.reward != "learned":
        return []
    scale = method.epochs_scale
    suffix = "" if scale == 1 else f"-epochs-{scale:g}x"
    if method.family == "heads":
        return [RewardSpec(f"heads-{method.members}{suffix}", 0, method.members, scale)]
    if method.family != "deep":
        name = f"{method.family}-{method.members}{suffix}"
        return [RewardSpec(name, 0, method.members, scale, family=method.family)]
    return [RewardSpec(f"deep-{k}{suffix}", k, 1, scale) for k in range(method.members)]


def monitor_specs(lab: Lab) -> list[RewardSpec]:
    """Return the reward models that watch every policy; the first one may be what it optimises."""
    return reward_specs(Method(members=lab.monitor)) if lab.monitor else []


FIRST = RewardSpec("deep-0", 0)  # r_phi: what is refined


def refined_spec(method: RefineMethod, round_: int) -> RewardSpec:
    """Return the reward model of a round of refinement."""
    suffix = "" if round_ == 1 else f"-{round_}"
    return RewardSpec(f"{method}{suffix}", _REFINED + round_ - 1, refine=method, round=round_)


def refined_from(spec: RewardSpec) -> RewardSpec:
    """Return the reward model of the round before, whose policy's samples refine this one."""
    assert spec.refine
    return FIRST if spec.round == 1 else refined_spec(spec.refine, spec.round - 1)


# --- stages ---


def build_shared(lab: Lab) -> None:
    """Build what all seeds have in common."""
    run = lab.start(lab.shared)
    if run:
        lab.world.build_shared(lab.shared)
        run.finish({}, seed=0)


def build_reference(lab: Lab, seed: int) -> None:
    """Build the reference policy of a seed."""
    lab.world.build(lab.shared, lab.ground(seed) / "reference", seed=seed)


def compare_answers(lab: Lab, seed: int) -> None:
    """Let the annotator compare pairs of the reference policy's answers; measure gold's scale."""
    folder = lab.ground(seed) / "comparisons"
    run = lab.start(folder)
    if run is None:
        return
    world, config = lab.open(seed), lab.config
    kept = {}
    for name, count in (("preferences", config.pairs), ("held_out", config.held_out_pairs)):
        stream = seed_of(seed, name)
        prompts = world.prompts(count, seed=stream, held_out=name == "held_out")
        answers = world.answers(prompts, n=2, seed=stream)
        rows = world.comparisons(prompts, answers, seed=stream)
        kept[name] = len(rows)
        write_jsonl(
            folder / f"{name}.jsonl",
            [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows],
        )
        if name == "preferences":
            flat_prompts = [p for p in prompts for _ in range(2)]
            flat = [a for pair in answers for a in pair]
            gold = world.gold(flat_prompts, flat)
    # The members' scale is measured on answers that none of them was trained on.
    prompts = world.prompts(_REFERENCE, seed=seed_of(seed, "reference"))
    answers = world.answers(prompts, n=1, seed=seed_of(seed, "reference"))
    some = zip(prompts, answers, strict=True)
    write_jsonl(folder / "reference.jsonl", [{"prompt": p, "completion": a[0]} for p, a in some])
    std = max(gold.std(correction=0).item(), 1e-6)
    run.finish({"gold_mean": gold.mean().item(), "gold_std": std, **kept}, seed=seed)


def scale_of(lab: Lab, seed: int) -> Scale:
    """Return the unit of gold that `compare_answers` measured."""
    summary = finished_summary(lab.ground(seed) / "comparisons")
    assert summary is not None
    return Scale(summary["metrics"]["gold_mean"], summary["metrics"]["gold_std"])


def train_member(lab: Lab, seed: int, spec: RewardSpec) -> None:
    """Train one reward model from the reference policy's body on the seed's comparisons."""
    folder = lab.ground(seed) / "rewards" / spec.name
    if finished_summary(folder) is not None:
        return
    own = seed * 100 + spec.seed
    world, config = lab.open(seed), lab.config
    rows: list[PreferenceRow] = load_preferences(
        lab.ground(seed) / "comparisons" / "preferences.jsonl"
    ).rows
    train = RewardConfig(
        learning_rate=config.reward_learning_rate,
        batch_size=config.reward_batch_size,
        epochs=config.reward_epochs * spec.epochs_scale,
        subset=config.subset,
        auxiliary_learning_rate_scale=1.0,  # the rate is high enough for multi-view heads
        seed=own,
        max_batch_tokens=config.max_batch_tokens,
        progress=False,
    )
    reference = _reference_samples(lab, seed)

    def make(**options: Any) -> RewardModel:
        return RewardModel.from_backbone(
            copy.deepcopy(world.policy.backbone), world.policy.tokenizer, **options
        )

    if spec.family:
        family, _, preset = spec.family.partition("_")
        chosen: dict[str, Any] = {"family": family, "preset": preset or "none"}
        families = replace(config.families, members=spec.heads, **chosen)
        train_family(make, rows, families, train, output_dir=folder, reference=reference)
        return
    if spec.refine:
        drawn = samples_of(lab, seed, refined_from(spec)) if any(METHODS[spec.refine]) else []
        source = lab.ground(seed) / "sampled" / refined_from(spec).name / "training" / "model"
        judges = METHODS[spec.refine].pairs == "rlaif"
        refine_reward(
            spec.refine,
            make,
            rows,
            drawn,
            rewards=rewards_of(load_member(lab, seed, refined_from(spec)), objectives.mean),
            train=train,
            output_dir=folder,
            # Like the first reward, a Gaussian head: the method alone tells them apart.
            family=FamilyConfig(family="heads", members=spec.heads),
            spg=config.spg,
            uml=config.uml,
            equivalent=world.equivalence([answers for _, answers in drawn]) if drawn else None,
            policy=world.policy,
            judge=policy_judge(Policy.from_pretrained(source)) if judges else None,
            reference=reference,
        )
        return
    model = make(members=spec.heads, seed=own)
    train_reward(model, rows, train, output_dir=folder, reference=reference)


def sample_optimised(lab: Lab, seed: int, spec: RewardSpec) -> None:
    """Optimise a policy a little against a reward model, and draw the samples that refine it."""
    folder = lab.ground(seed) / "sampled" / spec.name
    run = lab.start(folder)
    if run is None:
        return
    world, config = lab.open(seed), lab.config
    policy = Policy(copy.deepcopy(world.policy.model), world.policy.tokenizer)
    reward = load_member(lab, seed, spec)
    method = Method(optimiser=config.refine_optimiser)
    train_policy(
        policy,
        reward,
        world.prompts(config.training_prompts, seed=seed_of(seed, "training")),
        policy_config(lab, world, seed, method, steps=config.refine_after),
        objective=objectives.mean,
        output_dir=folder / "training",
    )
    prompts = world.prompts(config.refine_prompts, seed=seed_of(seed, "refine"))
    n, stream = config.refine_samples, seed_of(seed, "refine")
    answers = answers_of(policy, prompts, n=n, max_new_tokens=world.max_new_tokens, seed=stream)
    rows = zip(prompts, answers, strict=True)
    write_jsonl(folder / "samples.jsonl", [{"prompt": p, "completions": a} for p, a in rows])
    run.finish({"prompts": len(prompts)}, seed=seed)


def draw_shift(lab: Lab, seed: int) -> None:
    """Draw answers to held-out prompts from the reference policy and from the first optimised one.

    On pairs of them every reward is held against gold: the paper's claim is that refined rewards
    tell more of what the policy writes, and it shows no such number.
    """
    folder = lab.ground(seed) / "shift"
    run = lab.start(folder)
    if run is None:
        return
    world, (count, n) = lab.open(seed), _SHIFT
    stream = seed_of(seed, "shift")
    prompts = world.prompts(count, seed=stream, held_out=True)
    moved = Policy.from_pretrained(lab.ground(seed) / "sampled" / FIRST.name / "training" / "model")
    for name, policy in ((REFERENCE, world.policy), (MOVED, moved)):
        answers = answers_of(policy, prompts, n=n, max_new_tokens=world.max_new_tokens, seed=stream)
        flat = [p for p in prompts for _ in range(n)], [a for some in answers for a in some]
        gold = scale_of(lab, seed)(world.gold(*flat)).view(count, n).tolist()
        rows = zip(prompts, answers, gold, strict=True)
        write_jsonl(
            folder / f"{name}.jsonl",
            [{"prompt": p, "completions": a, "gold": g} for p, a, g in rows],
        )
    run.finish({"prompts": count, "answers": n}, seed=seed)


REFERENCE, MOVED = "reference", "moved"  # whose answers rewards are held against gold on


def told_of(
    lab: Lab, seed: int, reward: "RewardOf", objective: Callable[[RewardPosterior], Tensor]
) -> dict[str, float]:
    """Return the share of pairs that a reward orders as gold does, by whose answers they are.

    Empty where nothing is refined in the comparison: then nobody drew the answers.
    """
    found = {}
    for name in (REFERENCE, MOVED):
        file = lab.ground(seed) / "shift" / f"{name}.jsonl"
        if not file.exists():
            return {}
        rows = [row for _, row in read_jsonl(file)]
        gold = torch.tensor([row["gold"] for row in rows])
        prompts = [row["prompt"] for row in rows for _ in row["completions"]]
        answers = [a for row in rows for a in row["completions"]]
        proxy = objective(reward.posterior(prompts, answers)).view(gold.shape)
        found[name] = agreement(proxy, gold)
    return found


def draw_pool(lab: Lab, seed: int) -> None:
    """Draw the answers that best-of-n chooses from, with their gold in its unit."""
    folder = lab.ground(seed) / "pool"
    run = lab.start(folder)
    if run is None:
        return
    world, config = lab.open(seed), lab.config
    prompts = evaluation_prompts(world, config, seed)
    answers = world.answers(prompts, n=config.pool, seed=seed_of(seed, "pool"))
    flat_prompts = [p for p in prompts for _ in range(config.pool)]
    gold = scale_of(lab, seed)(world.gold(flat_prompts, [a for some in answers for a in some]))
    rows = zip(prompts, answers, gold.view(len(prompts), -1).tolist(), strict=True)
    write_jsonl(
        folder / "pool.jsonl", [{"prompt": p, "completions": a, "gold": g} for p, a, g in rows]
    )
    run.finish({"answers": len(flat_prompts), "gold": gold.mean().item()}, seed=seed)


class AnswerPool(NamedTuple):
    """Answers of the reference policy to the evaluation prompts, as many to each."""

    prompts: list[Prompt]
    answers: list[list[Completion]]
    gold: Float[Tensor, "prompt sample"]

    @property
    def flat(self) -> tuple[list[Prompt], list[Completion]]:
        """Prompts and answers as two lists of the same length."""
        prompts = [p for p, a in zip(self.prompts, self.answers, strict=True) for _ in a]
        return prompts, [c for some in self.answers for c in some]


def read_pool(lab: Lab, seed: int) -> AnswerPool:
    """Return what `draw_pool` drew."""
    rows = [row for _, row in read_jsonl(lab.ground(seed) / "pool" / "pool.jsonl")]
    return AnswerPool(
        [r["prompt"] for r in rows],
        [r["completions"] for r in rows],
        torch.tensor([r["gold"] for r in rows]),
    )


def score_pool(lab: Lab, seed: int, spec: RewardSpec) -> None:
    """Score the pool by one reward model."""
    folder = lab.ground(seed) / "pool" / spec.name
    run = lab.start(folder, config=spec._asdict())
    if run is None:
        return
    posterior = load_member(lab, seed, spec).score(*read_pool(lab, seed).flat, normalise=True)
    found = {"means": posterior.means}
    if posterior.stds is not None:
        found["stds"] = posterior.stds
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "scores.safetensors")
    run.finish({"mean": posterior.mean.mean().item()}, seed=seed)


# --- what cells ask for ---


def load_member(lab: Lab, seed: int, spec: RewardSpec) -> RewardModel:
    """Return a reward model that `train_member` trained."""
    return RewardModel.from_pretrained(lab.ground(seed) / "rewards" / spec.name / "model")


def pool_posterior(lab: Lab, seed: int, method: Method, pool: AnswerPool) -> RewardPosterior:
    """Return the posterior of every answer in the pool under a method's reward."""
    specs = reward_specs(method)
    if not specs:
        posterior_of = control_reward(lab.open(seed), scale_of(lab, seed), method, seed)
        return posterior_of(*pool.flat)
    found = [
        load_file(lab.ground(seed) / "pool" / spec.name / "scores.safetensors") for spec in specs
    ]
    return RewardPosterior.stack_members(
        [RewardPosterior(f["means"], f.get("stds")) for f in found]
    )


class RewardOf(NamedTuple):
    """What a method optimises, and how many of its units a logit of its preferences has."""

    posterior: PosteriorFunction
    logit_scale: float  # Bradley-Terry's margin over that of the standardised members


def reward_of(lab: Lab, world: LanguageWorld, method: Method, seed: int) -> RewardOf:
    """Return a method's reward as a function of prompts and answers."""
    specs = reward_specs(method)
    if not specs:
        return RewardOf(control_reward(world, scale_of(lab, seed), method, seed), 1.0)
    models = [load_member(lab, seed, spec) for spec in specs]
    scale = torch.cat([m.reward_std for m in models]).mean().item()
    return RewardOf(posterior_function(models), scale)


def control_reward(
    world: LanguageWorld, scale: Scale, method: Method, seed: int
) -> PosteriorFunction:
    """Return gold itself, noise, or length, as a posterior of one member."""

    def posterior(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        if method.reward == "gold":
            values = scale(world.gold(prompts, completions))
        elif method.reward == "random":
            values = random_reward(prompts, completions, seed=seed)
        else:
            values = length_reward(prompts, completions)
        return RewardPosterior(values.float()[:, None])

    return posterior


def policy_config(
    lab: Lab, world: LanguageWorld, seed: int, method: Method, *, steps: int
) -> PolicyConfig:
    """Return the options of a policy's optimisation."""
    config = lab.config
    if method.optimiser == "best_of_n" or method.optimiser == "closed_form":
        raise ValueError(f"{method.optimiser} trains no policy.")
    return PolicyConfig(
        algorithm=method.optimiser,
        steps=steps,
        prompts_per_step=config.prompts_per_step,
        completions_per_prompt=config.completions_per_prompt,
        max_new_tokens=world.max_new_tokens,
        learning_rate=config.learning_rate,
        value_learning_rate_scale=config.value_learning_rate_scale,
        inner_epochs=config.inner_epochs,
        schedule="constant",  # a curve's early part must not depend on how long the run is
        warmup_ratio=0.0,
        kl_coef=method.kl_coef,
        max_batch_tokens=config.max_batch_tokens,
        checkpoint_every=config.evaluate_every,
        evaluate_every=config.evaluate_every,
        seed=seed,
        progress=False,
    )


def evaluation_prompts(world: LanguageWorld, config: LanguageConfig, seed: int) -> list[Prompt]:
    """Return the prompts on which every method of a seed is measured."""
    return world.prompts(config.evaluation_prompts, seed=seed_of(seed, "evaluation"), held_out=True)


def held_out_rows(lab: Lab, seed: int) -> list[PreferenceRow]:
    """Return the comparisons that no reward model learned from."""
    return list(load_preferences(lab.ground(seed) / "comparisons" / "held_out.jsonl").rows)


def _reference_samples(lab: Lab, seed: int) -> tuple[list[Prompt], list[Completion]]:
    rows = [r for _, r in read_jsonl(lab.ground(seed) / "comparisons" / "reference.jsonl")]
    return [r["prompt"] for r in rows], [r["completion"] for r in rows]


def samples_of(lab: Lab, seed: int, spec: RewardSpec) -> list[tuple[Prompt, list[str]]]:
    """Return what the policy of a reward model wrote; see `sample_optimised`."""
    file = lab.ground(seed) / "sampled" / spec.name / "samples.jsonl"
    return [(r["prompt"], r["completions"]) for _, r in read_jsonl(file)]
