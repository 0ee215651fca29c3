"""The stages of a run: each is done once, goes on after a kill, and is loaded afterwards."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueward.data.formats import (
    LoadReport,
    PreferenceRow,
    Prompt,
    text_of,
)
from trueward.evaluate.policy_judge import policy_judge
from trueward.evaluate.shift import agreement
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import load_policy
from trueward.pipeline.config import RLPConfig
from trueward.pipeline.evaluation import evaluate_on
from trueward.pipeline.inputs import Inputs
from trueward.refine.refinement import (
    METHODS,
    RefineMethod,
    refine_reward,
    rewards_of,
    warm_start,
    with_facts,
)
from trueward.sampling import SamplingConfig, read_samples, sample_to_file
from trueward.train.families import (
    FamilyConfig,
    Maker,
    Reference,
    load_family,
    train_family,
)
from trueward.train.loop import seed_of
from trueward.train.policy import train_policy
from trueward.train.run_folder import RunFolder, finished_summary, write_text
from trueward.train.sft import train_sft

logger = logging.getLogger(__name__)


def sft_stage(config: RLPConfig, inputs: Inputs, out: Path) -> Policy:
    """Train the policy that everything starts from."""
    if finished_summary(out) is None:
        texts = (text_of(t) for row in inputs.demonstrations for t in (row.prompt, row.completion))
        policy = load_policy(config.model, texts, seed=config.seed)
        report = LoadReport("demonstrations", read=len(inputs.demonstrations))
        train_sft(
            policy,
            inputs.demonstrations,
            dataclasses.replace(config.sft, seed=config.seed),
            output_dir=out,
            report=report,
        )
        write_text(out / "data.txt", report.summary(limit=20) + "\n")
    return Policy.from_pretrained(out / "model", lora_rank=config.model.lora_rank)


def reward_stage(
    config: RLPConfig,
    make: Maker,
    preferences: Sequence[PreferenceRow],
    inputs: Inputs,
    out: Path,
    *,
    seed: int,
    reference: Reference,
    family: FamilyConfig | None = None,
) -> Reward:
    """Train a reward on preferences, from the SFT model's body."""
    source = config.data.gold_preferences if out.name == "02_gold" else config.data.preferences
    report = LoadReport("preference pairs", read=len(preferences))
    reward = train_family(
        with_facts(make, {"training data": source, "stage": out.name}),
        preferences,
        family or config.family,
        dataclasses.replace(config.reward, seed=seed),
        output_dir=out,
        report=report,
        evaluation=lambda r: evaluate_on(r, inputs.evaluation),
        reference=reference,
    )
    _tell_once(out, report)
    return reward


def _tell_once(out: Path, report: LoadReport) -> None:
    if not (out / "data.txt").exists():
        write_text(out / "data.txt", report.summary(limit=20) + "\n")


def fresh_rewards(config: RLPConfig, sft: Policy) -> Maker:
    """Return what makes untrained reward models on the SFT model's body."""
    path = Path(config.output_dir) / "01_sft" / "model"

    def make(**options: Any) -> RewardModel:
        own: dict[str, Any] = {"lora_rank": config.model.lora_rank} | options
        return RewardModel.from_backbone(
            path, sft.tokenizer, max_length=config.reward.max_length, **own
        )

    return make


def ensemble_of(models: Sequence[Reward]) -> list[RewardModel]:
    """Return the reward models of all rounds as the members of one posterior."""
    found: list[RewardModel] = []
    for model in models:
        found += [model] if isinstance(model, RewardModel) else list(model)  # type: ignore[arg-type]
    return found


def reference_stage(
    config: RLPConfig, sft: Policy, inputs: Inputs, out: Path
) -> tuple[list[Prompt], list[str]]:
    """Return the reference policy's samples, on which every reward model is normalised."""
    prompts = inputs.prompts[:128]
    sampling = dataclasses.replace(config.samples, n=2, temperature=1.0, seed=config.seed)
    drawn = draw_stage(sft, prompts, sampling, out / "01_reference_samples")
    return [p for p, texts in drawn for _ in texts], [t for _, texts in drawn for t in texts]


def policy_stage(
    config: RLPConfig,
    reward: Reward,
    inputs: Inputs,
    out: Path,
    *,
    refinement: "Refinement | None" = None,
) -> Policy:
    """Optimise a policy from the SFT model; the reference is SFT too (Alg. 1, line 5).

    A policy with a refinement has its reward refreshed within the run, where that is asked for.
    """
    options = dataclasses.replace(config.policy, seed=config.seed)
    if refinement is None:
        options = dataclasses.replace(options, refresh_every=0)
    if finished_summary(out) is None:
        sft = Policy.from_pretrained(
            Path(config.output_dir) / "01_sft" / "model", lora_rank=config.model.lora_rank
        )
        train_policy(
            sft,
            reward,
            inputs.prompts,
            options,
            objective=config.objective.build(),
            output_dir=out,
            alarm=config.alarm,
            refresh=(
                refinement.refresher(reward, out)
                if refinement is not None and options.refresh_every
                else None
            ),
        )
    return Policy.from_pretrained(out / "model")


def samples_stage(
    config: RLPConfig, policy: Policy, inputs: Inputs, out: Path
) -> list[tuple[Prompt, list[str]]]:
    """Draw what a policy writes, for the refinement of its reward."""
    sampling = dataclasses.replace(config.samples, seed=config.seed)
    return draw_stage(policy, inputs.prompts, sampling, out)


def draw_stage(
    policy: Policy, prompts: Sequence[Prompt], sampling: SamplingConfig, out: Path
) -> list[tuple[Prompt, list[str]]]:
    """Draw completions into `completions.jsonl`, shard by shard; return them by prompt."""
    if finished_summary(out) is None:
        folder = RunFolder(out, command="sample", config=sampling)
        count = sample_to_file(policy, prompts, sampling, out / "completions.jsonl", progress=None)
        folder.finish(count, seed=sampling.seed)
    return read_samples(out / "completions.jsonl")


@dataclass(frozen=True)
class Refinement:
    """A method of refinement with all that its stages need."""

    config: RLPConfig
    method: RefineMethod
    sft: Policy
    inputs: Inputs
    out: Path

    def __call__(
        self,
        scorer: Reward,
        policy: Policy,
        drawn: list[tuple[Prompt, list[str]]],
        out: Path,
        *,
        number: tuple[int, ...],
    ) -> Reward:
        """Train the reward again on D and what the method takes from the samples.

        The seed is another one than the first reward's, and another in each round and refresh; all
        methods share it, the control too, so that they differ by method alone.
        """
        config = self.config
        seed = seed_of(config.seed, "refined", *number) % 2**31
        report = LoadReport("preference pairs", read=len(self.inputs.preferences))
        make = warm_start(scorer) if config.warm_start else fresh_rewards(config, self.sft)
        reward = refine_reward(
            self.method,
            with_facts(make, {"training data": config.data.preferences, "stage": out.name}),
            self.inputs.preferences,
            drawn,
            rewards=rewards_of(scorer, config.objective.build()),
            train=dataclasses.replace(config.reward, seed=seed),
            output_dir=out,
            family=config.family,
            spg=config.spg,
            uml=config.uml,
            policy=self.sft,
            judge=policy_judge(policy) if METHODS[self.method].pairs == "rlaif" else None,
            pairs_dir=out.with_name(out.name.replace("reward", "preferences", 1)),
            routes=self.inputs.routes,
            reference=reference_stage(config, self.sft, self.inputs, self.out),
            report=report,
            evaluation=lambda r: evaluate_on(r, self.inputs.evaluation),
        )
        _tell_once(out, report)
        return reward

    def refresher(self, reward: Reward, out: Path) -> Callable[[Policy, int], Reward]:
        """Return what makes the reward anew within a policy's run, each in a folder of its step."""
        prompts = self.inputs.prompts[: self.config.refresh_prompts or None]
        every = self.config.policy.refresh_every

        def refresh(policy: Policy, step: int) -> Reward:
            folder = out / "refreshed" / f"{step:06d}"
            if finished_summary(folder / "reward") is not None:
                return load_family(folder / "reward")
            before = out / "refreshed" / f"{step - every:06d}" / "reward"
            scorer = load_family(before) if step > every else reward
            sampling = dataclasses.replace(self.config.samples, seed=self.config.seed)
            drawn = draw_stage(policy, prompts, sampling, folder / "samples")
            return self(scorer, policy, drawn, folder / "reward", number=(0, step))

        return refresh

    def last(self, reward: Reward, out: Path) -> Reward:
        """Return the reward that a policy's run ended with: the last refreshed, or the given."""
        made = sorted((out / "refreshed").glob("*/reward/summary.json"))
        return load_family(made[-1].parent) if made else reward


def reason_to_stop(
    config: RLPConfig,
    last: Reward,
    new: Reward,
    drawn: list[tuple[Prompt, list[str]]],
    out: Path,
    name: str,
) -> str:
    """Return why a method shall have no further round; nothing where it goes on."""
    stop = config.stop
    pairs = finished_summary(out / f"05_preferences_{name}")
    if pairs is not None and stop.min_accepted:
        share = pairs["metrics"]["accepted"] / max(1, pairs["metrics"]["prompts"])
        if share < stop.min_accepted:
            return f"{share:.3f} of the prompts gave a pair, fewer than {stop.min_accepted:g}"
    if stop.max_accuracy_loss:
        sets = list(config.data.evaluation)
        folders = (out / "02_reward", out / f"05_reward_{name}")
        before, after = (_mean_accuracy(folder, sets) for folder in folders)
        if before - after > stop.max_accuracy_loss:
            return (
                f"accuracy on the evaluation sets fell from {before:.3f} to {after:.3f}, by more "
                f"than {stop.max_accuracy_loss:g}"
            )
    if stop.max_agreement:
        objective, n = config.objective.build(), len(drawn[0][1])
        flat = [p for p, texts in drawn for _ in texts], [t for _, texts in drawn for t in texts]
        one, two = (rewards_of(r, objective)(*flat).view(-1, n) for r in (last, new))
        read = one.isfinite().all(1) & two.isfinite().all(1)
        same = agreement(two[read], one[read])
        if same > stop.max_agreement:
            return f"it orders {same:.3f} of the sampled pairs as the last reward did"
    return ""


def _mean_accuracy(folder: Path, sets: Sequence[str]) -> float:
    """Return the mean over the evaluation sets, not over what a family holds out itself."""
    summary = finished_summary(folder)
    assert summary is not None
    found = [summary["metrics"].get(f"{name}/accuracy") for name in sets]
    known = [value for value in found if value is not None]
    if not known:
        raise DataError(
            f"No pair of the evaluation sets {', '.join(sets)} fits the reward's context, so "
            "stop.max_accuracy_loss has nothing to go by: raise reward.max_length."
        )
    return float(sum(known) / len(known))
