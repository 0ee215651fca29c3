"""RLP: the stages of a run, each in its folder, resumable.

Lang et al. 2024, Algorithm 1 (https://arxiv.org/abs/2403.19279)::

    sft -> reward -> policy -> samples -> refine (SPG | UML) -> policy again, from SFT
                        ^                                              |
                        '---------------- next round ------------------'

With `policy.refresh_every` the reward is also trained again within a policy's run, on what the
policy writes by then. A stage is done when its folder holds a `summary.json`; it is then loaded,
never done again. A killed stage goes on from its last checkpoint. The folder's own `summary.json`
holds the numbers of every stage, `table.json` the comparison of the policies.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    text_of,
)
from trueward.evaluate.judges import reward_judge
from trueward.evaluate.policy_judge import policy_judge
from trueward.evaluate.preferences import evaluate_preferences, mean_interval
from trueward.evaluate.shift import agreement
from trueward.evaluate.winrate import win_rate
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward, fitting_rows, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.options import ObjectiveConfig
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    LABELS,
    METHODS,
    RefineMethod,
    refine_reward,
    warm_start,
    with_facts,
)
from trueward.refine.spg import SPGConfig
from trueward.sampling import SamplingConfig, fitting_prompts, read_samples, sample_to_file
from trueward.train.families import (
    FamilyConfig,
    Maker,
    Reference,
    load_family,
    train_family,
)
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import RunFolder, finished_summary, write_text
from trueward.train.sft import SFTConfig, train_sft

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RLPData:
    """Where the rows come from: files, folders, or hub names `owner/name[@config][:split]`."""

    demonstrations: str  # for SFT
    preferences: str  # D, for the reward model
    prompts: str  # U, unlabelled, for PPO and the policy's samples
    gold_preferences: list[str] = field(default_factory=list)  # of the held-out judge
    evaluation: dict[str, str] = field(default_factory=dict)  # name -> preferences to report on
    data_dir: str = ""  # folder that holds the data instead of the hub; also TRUEWARD_DATA
    local_names: dict[str, str] = field(default_factory=dict)  # hub name -> name under data_dir
    conversational: bool = True  # strings become user turns, so that one template serves all
    max_demonstrations: int = 0  # 0 = all
    max_preferences: int = 0
    max_prompts: int = 0
    skip_prompts: int = 0  # passed over first, where `prompts` begins with the demonstrations
    max_gold_preferences: int = 0  # of each source
    max_evaluation: int = 0  # of each source
    evaluation_prompts: int = 200  # held out from `prompts`, for the policies


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """When a method has no further round; 0 switches a rule off. The last policy then stands."""

    min_accepted: float = 0.0  # smallest share of the prompts that gave a synthetic preference
    # How far the mean accuracy on `data.evaluation` may fall below the first reward model's.
    max_accuracy_loss: float = 0.0
    # Share of pairs of the policy's samples that the new reward orders as the last one did: above
    # it, nothing new was learned.
    max_agreement: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"stop.{name} is a share in [0, 1], got {value}.")


@dataclass(frozen=True, kw_only=True)
class RLPConfig:
    """The whole pipeline."""

    output_dir: str
    data: RLPData
    model: ModelSource = field(default_factory=ModelSource)
    family: FamilyConfig = field(default_factory=FamilyConfig)  # of every reward but gold
    # control: trained again on D with another seed and nothing new, at the same cost
    methods: list[RefineMethod] = field(default_factory=lambda: ["control", "spg", "uml"])
    rounds: int = 1
    stop: StopConfig = field(default_factory=StopConfig)  # of a method's rounds
    warm_start: bool = False  # refine the last reward model instead of a fresh one from SFT
    # Optimise against the reward models of all rounds so far, as one ensemble, not the last alone.
    ensemble_rounds: bool = False
    refresh_prompts: int = 0  # sampled at a refresh within a run (policy.refresh_every); 0 = all
    seed: int = 42
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    samples: SamplingConfig = field(default_factory=lambda: SamplingConfig(n=10))
    spg: SPGConfig = field(default_factory=SPGConfig)
    uml: MultiViewConfig = field(default_factory=MultiViewConfig)
    evaluation_temperature: float = 0.7  # the paper's, one completion for each prompt

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError(f"methods must name at least one of {', '.join(METHODS)}.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}.")
        if self.data.evaluation_prompts < 2:
            raise ValueError(
                "data.evaluation_prompts must be at least 2 (an interval needs two), got "
                f"{self.data.evaluation_prompts}."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "rlp runs in one process: its stages share files. Launch `trueward reward` and "
                "`trueward policy` under torchrun instead."
            )
        self.family.require_own_options()
        if self.warm_start and self.family.family not in ("single", "heads"):
            raise ValueError(
                "warm_start trains one model on: it is for family=single and heads, got "
                f"family={self.family.family}."
            )
        if self.policy.refresh_every and self.policy.bf16 != self.reward.bf16:
            raise ValueError(
                "policy.refresh_every trains rewards within the policy's run: policy.bf16 and "
                "reward.bf16 must be the same."
            )


@dataclass(frozen=True)
class _Inputs:
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


def run_rlp(config: RLPConfig) -> dict[str, object]:
    """Run the pipeline, or what is left of it, and return its summary."""
    out = Path(config.output_dir)
    folder = RunFolder(out, command="rlp", config=config)
    done = finished_summary(out)
    if done is not None:
        logger.info("%s is finished.", out)
        return done
    inputs = _load(config)
    for report in inputs.reports:
        logger.info("%s", report.summary())

    sft = _sft(config, inputs, out / "01_sft")
    inputs = _split_prompts(config, sft, inputs)
    gold = None
    if inputs.gold:
        # Another seed and other data than the proxy's: its errors are not the proxy's errors.
        gold = _reward(
            config,
            _fresh(config, sft),
            inputs.gold,
            inputs,
            out / "02_gold",
            seed=config.seed + 1000,
            family=FamilyConfig(),
            reference=_reference(config, sft, inputs, out),
        )
    reward = _reward(
        config,
        _fresh(config, sft),
        inputs.preferences,
        inputs,
        out / "02_reward",
        seed=config.seed,
        reference=_reference(config, sft, inputs, out),
    )
    first = _policy(config, reward, inputs, out / "03_policy")
    name_of_first = config.policy.algorithm.upper()
    policies: dict[str, tuple[Policy, Reward | None]] = {
        "SFT": (sft, None),
        name_of_first: (first, reward),
    }
    stopped: dict[str, str] = {}
    for method in config.methods:
        refinement = _Refinement(config, method, sft, inputs, out)
        current, models = first, [reward]
        for round_ in range(1, config.rounds + 1):
            name = f"{method}_{round_}"
            drawn = _samples(
                config, current, inputs, out / f"04_samples_{'1' if round_ == 1 else name}"
            )
            model = refinement(models[-1], current, drawn, out / f"05_reward_{name}", number=round_)
            if reason := _reason_to_stop(config, models[-1], model, drawn, out, name):
                stopped[method] = f"round {round_}: {reason}"
                logger.info("%s stops before the policy of %s", method, stopped[method])
                break
            models.append(model)
            optimised = _ensemble(models) if config.ensemble_rounds else model
            current = _policy(
                config, optimised, inputs, out / f"06_policy_{name}", refinement=refinement
            )
            label = LABELS[method] + (f" round {round_}" if config.rounds > 1 else "")
            policies[label] = (current, optimised)
    rows = {
        label: _evaluate_policy(config, label, policy, reward, gold, inputs, out)
        for label, (policy, _) in policies.items()
    }
    shift = _shift(config, policies, gold, inputs, out)
    stages = {
        p.parent.name: json.loads(p.read_text("utf-8")) for p in sorted(out.glob("*/summary.json"))
    }
    _write_table(out, rows)
    write_text(out / "data.txt", "\n\n".join(r.summary(limit=20) for r in inputs.reports) + "\n")
    metrics = {
        "policies": rows,
        "reward_models_on_policy_samples": shift,
        "stopped": stopped,
        "stages": {k: {"seconds": s["seconds"], **s["metrics"]} for k, s in stages.items()},
    }
    spent = sum(s["seconds"] for s in stages.values())
    return folder.finish(metrics, seed=config.seed, seconds=spent)


def _load(config: RLPConfig) -> _Inputs:
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
    return _Inputs(
        demonstrations=trained[0],
        preferences=trained[1],
        unlabelled=unlabelled,
        prompts=[],
        held_out=[],
        gold=[row for rows in trained[2:] for row in rows],
        evaluation={name: part.rows for name, part in evaluation.items()},
        routes={
            prompt_key(row.prompt): str(row.extra[config.spg.route_by])
            for row in unlabelled
            if config.spg.route_by in row.extra
        },
        reports=[part.report for part in parts],
    )


def _split_prompts(config: RLPConfig, policy: Policy, inputs: _Inputs) -> _Inputs:
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


def _sft(config: RLPConfig, inputs: _Inputs, out: Path) -> Policy:
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


def _reward(
    config: RLPConfig,
    make: Maker,
    preferences: Sequence[PreferenceRow],
    inputs: _Inputs,
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


def _fresh(config: RLPConfig, sft: Policy) -> Maker:
    """Return what makes untrained reward models on the SFT model's body."""
    path = Path(config.output_dir) / "01_sft" / "model"

    def make(**options: Any) -> RewardModel:
        own: dict[str, Any] = {"lora_rank": config.model.lora_rank} | options
        return RewardModel.from_backbone(
            path, sft.tokenizer, max_length=config.reward.max_length, **own
        )

    return make


def _ensemble(models: Sequence[Reward]) -> list[RewardModel]:
    """Return the reward models of all rounds as the members of one posterior."""
    found: list[RewardModel] = []
    for model in models:
        found += [model] if isinstance(model, RewardModel) else list(model)  # type: ignore[arg-type]
    return found


def _reference(
    config: RLPConfig, sft: Policy, inputs: _Inputs, out: Path
) -> tuple[list[Prompt], list[str]]:
    """Return the reference policy's samples, on which every reward model is normalised."""
    prompts = inputs.prompts[:128]
    sampling = dataclasses.replace(config.samples, n=2, temperature=1.0, seed=config.seed)
    drawn = _sample_stage(sft, prompts, sampling, out / "01_reference_samples")
    return [p for p, texts in drawn for _ in texts], [t for _, texts in drawn for t in texts]


def _policy(
    config: RLPConfig,
    reward: Reward,
    inputs: _Inputs,
    out: Path,
    *,
    refinement: "_Refinement | None" = None,
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
            refresh=(
                refinement.refresher(reward, out)
                if refinement is not None and options.refresh_every
                else None
            ),
        )
    return Policy.from_pretrained(out / "model")


def _samples(
    config: RLPConfig, policy: Policy, inputs: _Inputs, out: Path
) -> list[tuple[Prompt, list[str]]]:
    sampling = dataclasses.replace(config.samples, seed=config.seed)
    return _sample_stage(policy, inputs.prompts, sampling, out)


def _sample_stage(
    policy: Policy, prompts: Sequence[Prompt], sampling: SamplingConfig, out: Path
) -> list[tuple[Prompt, list[str]]]:
    """Draw completions into `completions.jsonl`, shard by shard; return them by prompt."""
    if finished_summary(out) is None:
        folder = RunFolder(out, command="sample", config=sampling)
        count = sample_to_file(policy, prompts, sampling, out / "completions.jsonl", progress=None)
        folder.finish(count, seed=sampling.seed)
    return read_samples(out / "completions.jsonl")


@dataclass(frozen=True)
class _Refinement:
    """A method of refinement with all that its stages need."""

    config: RLPConfig
    method: RefineMethod
    sft: Policy
    inputs: _Inputs
    out: Path

    def __call__(
        self,
        scorer: Reward,
        policy: Policy,
        drawn: list[tuple[Prompt, list[str]]],
        out: Path,
        *,
        number: int,
    ) -> Reward:
        """Train the reward again on D and what the method takes from the samples.

        The control's seed is hundreds apart from the other seeds, and another one in each round.
        """
        config = self.config
        seed = config.seed + (100 * number if self.method == "control" else 0)
        objective, posterior_of = config.objective.build(), posterior_function(scorer)
        report = LoadReport("preference pairs", read=len(self.inputs.preferences))
        make = warm_start(scorer) if config.warm_start else _fresh(config, self.sft)
        reward = refine_reward(
            self.method,
            with_facts(make, {"training data": config.data.preferences, "stage": out.name}),
            self.inputs.preferences,
            drawn,
            rewards=lambda prompts, answers: objective(posterior_of(prompts, answers)),
            train=dataclasses.replace(config.reward, seed=seed),
            output_dir=out,
            family=config.family,
            spg=config.spg,
            uml=config.uml,
            policy=self.sft,
            judge=policy_judge(policy) if METHODS[self.method].pairs == "rlaif" else None,
            pairs_dir=out.with_name(out.name.replace("reward", "preferences")),
            routes=self.inputs.routes,
            reference=_reference(config, self.sft, self.inputs, self.out),
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
            drawn = _sample_stage(policy, prompts, sampling, folder / "samples")
            return self(scorer, policy, drawn, folder / "reward", number=step)

        return refresh


def _reason_to_stop(
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
        before, after = (_mean_accuracy(out / f) for f in ("02_reward", f"05_reward_{name}"))
        if before - after > stop.max_accuracy_loss:
            return (
                f"accuracy on the evaluation sets fell from {before:.3f} to {after:.3f}, by more "
                f"than {stop.max_accuracy_loss:g}"
            )
    if stop.max_agreement:
        objective, n = config.objective.build(), len(drawn[0][1])
        flat = [p for p, texts in drawn for _ in texts], [t for _, texts in drawn for t in texts]
        one, two = (objective(posterior_function(r)(*flat)).view(-1, n) for r in (last, new))
        same = agreement(two, one)
        if same > stop.max_agreement:
            return f"it orders {same:.3f} of the sampled pairs as the last reward did"
    return ""


def _mean_accuracy(folder: Path) -> float:
    summary = finished_summary(folder)
    assert summary is not None
    found = [v for k, v in summary["metrics"].items() if k.endswith("/accuracy")]
    if not found:
        raise DataError("stop.max_accuracy_loss needs data.evaluation to measure accuracy on.")
    return float(sum(found) / len(found))


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


def _evaluate_policy(
    config: RLPConfig,
    label: str,
    policy: Policy,
    proxy: Reward,
    gold: Reward | None,
    inputs: _Inputs,
    out: Path,
) -> dict[str, float]:
    """Draw one completion for each held-out prompt and report proxy, gold, length and win rate."""
    sampling = dataclasses.replace(
        config.samples, n=1, temperature=config.evaluation_temperature, seed=config.seed + 1
    )
    name = label.lower().replace(" ", "_")
    drawn = _sample_stage(policy, inputs.held_out, sampling, out / f"07_completions_{name}")
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


def _shift(
    config: RLPConfig,
    policies: dict[str, tuple[Policy, Reward | None]],
    gold: Reward | None,
    inputs: _Inputs,
    out: Path,
) -> dict[str, dict[str, float]]:
    """Return each reward model's agreement with the gold judge on pairs of each policy's samples.

    The paper's claim is that refinement keeps the reward model accurate where the policy went.
    """
    if gold is None:
        return {}
    pairs: dict[str, list[PreferenceRow]] = {}
    for label, (policy, _) in policies.items():
        sampling = dataclasses.replace(config.samples, n=2, seed=config.seed + 2)
        name = label.lower().replace(" ", "_")
        drawn = _sample_stage(policy, inputs.held_out, sampling, out / f"07_pairs_{name}")
        flat = [t for _, texts in drawn for t in texts]
        asked = [p for p, _ in drawn for _ in "ab"]
        scores = posterior_function(gold)(asked, flat).mean
        pairs[label] = [
            PreferenceRow(prompt, texts[first < second], texts[first >= second])
            for (prompt, texts), (first, second) in zip(
                drawn, scores.view(-1, 2).tolist(), strict=True
            )
            if first != second  # no made-up labels
        ]
    return {
        f"reward model of {label}": {
            f"accuracy on {source}": evaluate_preferences(posterior_function(model), rows)[
                "accuracy"
            ]
            for source, rows in pairs.items()
            if rows
        }
        for label, (_, model) in policies.items()
        if model is not None
    }


def _write_table(out: Path, rows: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = {
        "columns": ["policy", *columns],
        "rows": [[label, *(row.get(c) for c in columns)] for label, row in rows.items()],
        "caption": "Policies on held-out prompts; gold is a reward model trained on other data.",
    }
    write_text(out / "table.json", json.dumps(table, indent=2))
