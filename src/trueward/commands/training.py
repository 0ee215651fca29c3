"""Commands that train: sft, reward, policy, refine, rlp."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trueward.commands.shared import (
    DataOptions,
    completions_of_rows,
    console,
    finished,
    load_reward,
    numbers_text,
    start,
    tell,
)
from trueward.data.formats import (
    Completion,
    DataError,
    Prompt,
    load_demonstrations,
    load_preferences,
    load_prompts,
    read_jsonl,
    split_by_prompt,
    text_of,
)
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.options import ObjectiveConfig, SPGConfig
from trueward.pipeline import RLPConfig, evaluate_on, run_rlp, write_synthetic
from trueward.refine.multiview import MultiView, MultiViewConfig
from trueward.report.run import report_run
from trueward.sampling import fitting_prompts, read_samples
from trueward.train.families import FamilyConfig, train_family
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.sft import SFTConfig, train_sft


@dataclass(frozen=True, kw_only=True)
class SFTCommand:
    """Train a policy on demonstrations."""

    demonstrations: str  # file, folder, or hub name owner/name[@config][:split]
    output_dir: str
    model: ModelSource = field(default_factory=ModelSource)
    data: DataOptions = field(default_factory=DataOptions)
    train: SFTConfig = field(default_factory=SFTConfig)


def sft(config: SFTCommand) -> None:
    """Train a policy and save it in `output_dir/model`."""
    if finished(config, "sft"):
        return
    loaded = load_demonstrations(config.demonstrations, **config.data.arguments())
    texts = (text_of(t) for row in loaded.rows for t in (row.prompt, row.completion))
    policy = load_policy(config.model, texts, seed=config.train.seed)
    start(config, "sft")
    train_sft(policy, loaded.rows, config.train, output_dir=config.output_dir, report=loaded.report)
    tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class RewardCommand(FamilyConfig):
    """Train a reward on preferences: a single head, or any family with an uncertainty."""

    preferences: str  # file, folder, or hub name owner/name[@config][:split]
    backbone: str  # folder or hub id: the SFT model, or any backbone
    output_dir: str
    lora_rank: int = 0  # 0 = train all weights
    selection: str = ""  # more preferences, on which warm selects its members
    reference: str = ""  # JSONL with prompt and completion(s): what members' scales are measured on
    held_out: float = 0.05  # share of the prompts kept for the evaluation
    evaluation: dict[str, str] = field(default_factory=dict)  # name -> more preferences
    data: DataOptions = field(default_factory=DataOptions)
    train: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_own_options()
        if self.lora_rank and self.family == "lora":
            raise ValueError("family=lora has adapters of its own: set --lora.rank, not lora_rank.")
        if self.selection and self.family != "warm":
            raise ValueError(f"selection is for family=warm, got family={self.family}.")


def reward(config: RewardCommand) -> None:
    """Train a reward and save it in `output_dir/model`."""
    if finished(config, "reward"):
        return
    loaded = load_preferences(config.preferences, **config.data.arguments())
    rows, held_out = split_by_prompt(loaded.rows, fraction=config.held_out, seed=config.train.seed)
    sets = {"test": held_out} if held_out else {}  # trainers have a held_out of their own
    for name, source in config.evaluation.items():
        more = load_preferences(source, **config.data.arguments())
        console.print(more.report.summary(), highlight=False)
        sets[name] = more.rows
    selection = []
    if config.selection:
        selection = load_preferences(config.selection, **config.data.arguments()).rows

    def make(**options: Any) -> RewardModel:
        own: dict[str, Any] = {"max_length": config.train.max_length, **options}
        model = RewardModel.from_backbone(config.backbone, **{"lora_rank": config.lora_rank} | own)
        model.facts = {"training data": Path(config.preferences).name, "base": config.backbone}
        return model

    start(config, "reward")
    train_family(
        make,
        rows,
        config,
        config.train,
        output_dir=config.output_dir,
        reference=_reference(config.reference),
        report=loaded.report,
        selection=selection,
        evaluation=lambda reward: evaluate_on(reward, sets),
    )
    tell(config.output_dir, loaded)


def _reference(source: str) -> tuple[list[Prompt], list[Completion]] | None:
    if not source:
        return None
    prompts, completions, _ = completions_of_rows([row for _, row in read_jsonl(source)], source)
    return prompts, completions


@dataclass(frozen=True, kw_only=True)
class PolicyCommand:
    """Optimise a policy against a reward."""

    policy: str  # folder or hub id
    reward: list[str]  # reward models (several make an ensemble), or one FILE.py:FUNCTION
    prompts: str  # file, folder, or hub name owner/name[@config][:split]
    output_dir: str
    lora_rank: int = 0  # 0 = train all weights; above, the reference is the adapter off
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataOptions = field(default_factory=DataOptions)
    train: PolicyConfig = field(default_factory=PolicyConfig)


def policy(config: PolicyCommand) -> None:
    """Train a policy and save it in `output_dir/model`."""
    if finished(config, "policy"):
        return
    loaded = load_prompts(config.prompts, **config.data.arguments())
    writer = Policy.from_pretrained(config.policy, lora_rank=config.lora_rank)
    rows = fitting_prompts(writer, loaded.rows, loaded.report)
    reward_function = load_reward(config.reward)
    start(config, "policy")
    train_policy(
        writer,
        reward_function,
        rows,
        config.train,
        objective=config.objective.build(),
        output_dir=config.output_dir,
    )
    tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class RefineCommand:
    """Retrain a reward model on what the policy writes."""

    method: Literal["spg", "uml"]
    reward_model: str  # the current one: it ranks SPG's samples
    preferences: str  # D: file, folder, or hub name
    samples: str  # from `trueward sample`, n completions for each prompt
    backbone: str  # the SFT model: the new reward model starts from it
    output_dir: str
    warm_start: bool = False  # start from the current reward model instead
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    spg: SPGConfig = field(default_factory=SPGConfig)
    uml: MultiViewConfig = field(default_factory=MultiViewConfig)
    train: RewardConfig = field(default_factory=RewardConfig)


def refine(config: RefineCommand) -> None:
    """Train the refined reward model and save it in `output_dir/model`."""
    if finished(config, "refine"):
        return
    out = Path(config.output_dir)
    loaded = load_preferences(config.preferences, **config.data.arguments())
    current = RewardModel.from_pretrained(config.reward_model)
    kind = current.head.describe()["kind"] if current.head is not None else "published"
    if kind not in ("scalar", "gaussian") and not config.warm_start:
        raise DataError(
            f"refine makes scalar or Gaussian heads anew, and {config.reward_model} has a {kind} "
            "head: give one of those, or train on with warm_start."
        )
    model = current
    if not config.warm_start:
        members = current.members if current.members > 1 else 0
        model = RewardModel.from_backbone(
            config.backbone,
            members=members,
            max_length=config.train.max_length,
            seed=config.train.seed,
        )
    model.facts = {"training data": Path(config.preferences).name, "refined by": config.method}
    drawn = read_samples(config.samples)
    start(config, "refine")
    rows, auxiliary = list(loaded.rows), None
    if config.method == "uml":
        width = model.backbone.config.get_text_config().hidden_size
        auxiliary = MultiView(width, drawn, config.uml)
    else:
        needs_states = config.spg.equivalence == "policy_states"
        made = write_synthetic(
            config.spg,
            config.objective,
            current,
            Policy.from_pretrained(config.backbone) if needs_states else None,
            drawn,
            out,
            seed=config.train.seed,
        )
        console.print(numbers_text(dataclasses.asdict(made.report)), highlight=False)
        rows += made.to_preferences()
    train_reward(
        model, rows, config.train, output_dir=out, report=loaded.report, auxiliary=auxiliary
    )
    tell(config.output_dir, loaded)


def rlp(config: RLPConfig) -> None:
    """Run the pipeline and write its report."""
    run_rlp(config)
    console.print(f"Report: {report_run(config.output_dir)}", highlight=False)
