"""RLP: the stages of a run, each in its folder, resumable.

Lang et al. 2024, Algorithm 1 (https://arxiv.org/abs/2403.19279)::

    sft -> reward -> policy -> samples -> refine (SPG | UML) -> policy again, from SFT
                        ^                                              |
                        '---------------- next round ------------------'

A stage is done when its folder holds a `summary.json`; it is then loaded, never done again. A
killed stage goes on from its last checkpoint. The folder's own `summary.json` holds the numbers
of every stage, `table.json` the comparison of the policies.
"""

import copy
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    write_jsonl,
)
from trueward.evaluate.judges import reward_judge
from trueward.evaluate.preferences import evaluate_preferences, mean_interval
from trueward.evaluate.winrate import win_rate
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward, fitting_rows
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.options import ObjectiveConfig, SPGConfig
from trueward.refine.multiview import MultiView, MultiViewConfig
from trueward.refine.synthetic import SyntheticResult, synthetic_preferences
from trueward.sampling import SamplingConfig, fitting_prompts, read_samples, sample_to_file
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
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
class RLPConfig:
    """The whole pipeline."""

    output_dir: str
    data: RLPData
    model: ModelSource = field(default_factory=ModelSource)
    members: int = 0  # 0 = one scalar reward, K = Gaussian heads
    # control: trained again on D with another seed and nothing new, at the same cost
    methods: list[Literal["control", "spg", "uml"]] = field(
        default_factory=lambda: ["control", "spg", "uml"]
    )
    rounds: int = 1
    warm_start: bool = False  # refine the last reward model instead of a fresh one from SFT
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
            raise ValueError("methods must name at least one of control, spg and uml.")
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
        if self.members < 0:
            raise ValueError(f"members must be 0 (scalar) or at least 1, got {self.members}.")


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
            config, sft, inputs.gold, inputs, out / "02_gold", seed=config.seed + 1000, members=0
        )
    reward = _reward(config, sft, inputs.preferences, inputs, out / "02_reward", seed=config.seed)
    first = _policy(config, reward, inputs, out / "03_policy")
    name_of_first = config.policy.algorithm.upper()
    policies: dict[str, tuple[Policy, RewardModel | None]] = {
        "SFT": (sft, None),
        name_of_first: (first, reward),
    }
    for method in config.methods:
        current, model = first, reward
        for round_ in range(1, config.rounds + 1):
            name = f"{method}_{round_}"
            drawn = _samples(
                config, current, inputs, out / f"04_samples_{'1' if round_ == 1 else name}"
            )
            model = _refine(config, method, sft, model, drawn, inputs, out / f"05_reward_{name}")
            current = _policy(config, model, inputs, out / f"06_policy_{name}")
            label = "control" if method == "control" else f"RLP-{method.upper()}"
            label += f" round {round_}" if config.rounds > 1 else ""
            policies[label] = (current, model)
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
    sft: Policy,
    preferences: Sequence[PreferenceRow],
    inputs: _Inputs,
    out: Path,
    *,
    seed: int,
    members: int | None = None,
    start: RewardModel | None = None,
    samples: list[tuple[Prompt, list[str]]] | None = None,
) -> RewardModel:
    """Train a reward model from the SFT model's body (or `start`), with UML where samples come."""
    if finished_summary(out) is None:
        model = copy.deepcopy(start) if start else _fresh(config, sft, members, seed)
        auxiliary = None
        if samples is not None:
            width = model.backbone.config.get_text_config().hidden_size
            auxiliary = MultiView(width, samples, dataclasses.replace(config.uml, seed=seed))
        held_out = inputs.evaluation
        source = config.data.gold_preferences if out.name == "02_gold" else config.data.preferences
        model.facts = {"training data": source, "stage": out.name}
        report = LoadReport("preference pairs", read=len(preferences))
        train_reward(
            model,
            preferences,
            dataclasses.replace(config.reward, seed=seed),
            output_dir=out,
            report=report,
            auxiliary=auxiliary,
            evaluation=lambda m: evaluate_on(m, held_out),
            reference=_reference(config, sft, inputs, out.parent),
        )
        write_text(out / "data.txt", report.summary(limit=20) + "\n")
    return RewardModel.from_pretrained(out / "model")


def _fresh(config: RLPConfig, sft: Policy, members: int | None, seed: int) -> RewardModel:
    path = Path(config.output_dir) / "01_sft" / "model"
    return RewardModel.from_backbone(
        path,
        sft.tokenizer,
        members=config.members if members is None else members,
        lora_rank=config.model.lora_rank,
        max_length=config.reward.max_length,
        seed=seed,
    )


def _reference(
    config: RLPConfig, sft: Policy, inputs: _Inputs, out: Path
) -> tuple[list[Prompt], list[str]]:
    """Return the reference policy's samples, on which every reward model is normalised."""
    prompts = inputs.prompts[:128]
    sampling = dataclasses.replace(config.samples, n=2, temperature=1.0, seed=config.seed)
    drawn = _sample_stage(sft, prompts, sampling, out / "01_reference_samples")
    return [p for p, texts in drawn for _ in texts], [t for _, texts in drawn for t in texts]


def _policy(config: RLPConfig, reward: RewardModel, inputs: _Inputs, out: Path) -> Policy:
    """Optimise a policy from the SFT model; the reference is SFT too (Alg. 1, line 5)."""
    if finished_summary(out) is None:
        sft = Policy.from_pretrained(
            Path(config.output_dir) / "01_sft" / "model", lora_rank=config.model.lora_rank
        )
        train_policy(
            sft,
            reward,
            inputs.prompts,
            dataclasses.replace(config.policy, seed=config.seed),
            objective=config.objective.build(),
            output_dir=out,
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


def _refine(
    config: RLPConfig,
    method: str,
    sft: Policy,
    scorer: RewardModel,
    drawn: list[tuple[Prompt, list[str]]],
    inputs: _Inputs,
    out: Path,
) -> RewardModel:
    """Train the reward model again: on D + synthetic pairs (SPG), or on D beside L_M (UML)."""
    start = scorer if config.warm_start else None
    if method == "control":
        # Hundreds apart from the other seeds, and another one in each round.
        seed = config.seed + 100 * int(out.name.rpartition("_")[2])
        return _reward(config, sft, inputs.preferences, inputs, out, seed=seed, start=start)
    if method == "uml":
        return _reward(
            config,
            sft,
            inputs.preferences,
            inputs,
            out,
            seed=config.seed,
            start=start,
            samples=drawn,
        )
    pairs = out.with_name(out.name.replace("05_reward", "05_preferences"))
    if finished_summary(pairs) is None:
        folder = RunFolder(pairs, command="spg", config=config.spg)
        made = write_synthetic(
            config.spg, config.objective, scorer, sft, drawn, pairs, seed=config.seed
        )
        report = dataclasses.asdict(made.report)
        report["cluster_counts"] = {str(k): v for k, v in report["cluster_counts"].items()}
        folder.finish(report, seed=config.seed)
    synthetic: list[PreferenceRow] = []
    if finished_summary(pairs)["metrics"]["accepted"]:  # type: ignore[index]
        synthetic = load_preferences(pairs / "preferences.jsonl").rows
    else:
        logger.warning("SPG accepted no prompt: the reward model is retrained on D alone.")
    pooled = [*inputs.preferences, *synthetic]  # plain pooling, no weights (Eq. 1)
    return _reward(config, sft, pooled, inputs, out, seed=config.seed, start=start)


def write_synthetic(
    spg: SPGConfig,
    objective: ObjectiveConfig,
    scorer: RewardModel,
    embedder: Policy | None,
    drawn: Sequence[tuple[Prompt, list[str]]],
    folder: Path,
    *,
    seed: int,
) -> SyntheticResult:
    """Make synthetic preferences of the policy's samples and write them as `preferences.jsonl`.

    Args:
        spg: Rules and equivalence.
        objective: Turns the scorer's posterior into the reward that ranks.
        scorer: The current reward model.
        embedder: Whose states embed the texts, for `policy_states`.
        drawn: Prompts with n completions each.
        folder: Where the preferences go (and the labels of an NLI model, which are kept).
        seed: Of the rejected sides.
    """
    prompts = [prompt for prompt, _ in drawn]
    completions = [texts for _, texts in drawn]
    posterior = scorer.score(
        [p for p, texts in drawn for _ in texts],
        [t for texts in completions for t in texts],
        normalise=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    made = synthetic_preferences(
        prompts,
        completions,
        objective.build()(posterior).view(len(drawn), -1),
        equivalent=spg.build(embedder, completions, cache=folder / "nli_cache.jsonl"),
        gamma=spg.gamma,
        seed=seed,
    )
    write_jsonl(folder / "preferences.jsonl", made.to_rows())
    return made


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
    proxy: RewardModel,
    gold: RewardModel | None,
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
    rewards = proxy.score(inputs.held_out, texts, normalise=True)
    row = {
        "proxy": config.objective.build()(rewards).mean().item(),
        "length": sum(len(t.split()) for t in texts) / len(texts),
    }
    if gold is not None:
        scores = gold.score(inputs.held_out, texts, normalise=True).mean
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
    policies: dict[str, tuple[Policy, RewardModel | None]],
    gold: RewardModel | None,
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
        scores = gold.score([p for p, _ in drawn for _ in "ab"], flat, normalise=True).mean
        pairs[label] = [
            PreferenceRow(prompt, texts[first < second], texts[first >= second])
            for (prompt, texts), (first, second) in zip(
                drawn, scores.view(-1, 2).tolist(), strict=True
            )
            if first != second  # no made-up labels
        ]
    return {
        f"reward model of {label}": {
            f"accuracy on {source}": evaluate_preferences(model.score, rows)["accuracy"]
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
