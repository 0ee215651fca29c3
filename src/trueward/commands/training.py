"""Commands that train: sft, reward, policy, refine, rlp."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    PreferenceRow,
    Prompt,
    PromptRow,
    load_demonstrations,
    load_preferences,
    load_prompts,
    prompt_key,
    read_jsonl,
    split_by_prompt,
    text_of,
)
from trueward.evaluate.policy_judge import policy_judge
from trueward.models.policy import Policy
from trueward.models.reward_function import Reward, load_reward_models
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource, load_policy
from trueward.options import ObjectiveConfig
from trueward.pipeline import RLPConfig, evaluate_on, run_rlp
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    METHODS,
    RefineMethod,
    refine_reward,
    require_composable,
    require_own_options,
    rewards_of,
    spg_for,
    synthetic_rows,
    warm_start,
    with_facts,
)
from trueward.refine.spg import SPGConfig, prompt_routes
from trueward.report.run import report_run
from trueward.sampling import fitting_prompts, read_samples
from trueward.train.alarm import AlarmConfig
from trueward.train.families import FamilyConfig, Maker, require_processes, train_family
from trueward.train.loop import seed_of
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import finished_summary
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
        require_processes(self, self.train)
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

    start(config, "reward")
    train_family(
        with_facts(
            _maker(config, config.lora_rank),
            {"training data": Path(config.preferences).name, "base": config.backbone},
        ),
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


def _maker(config: "RewardCommand | RefineCommand", lora_rank: int) -> Maker:
    """Return what makes untrained reward models on the command's backbone."""

    def make(**options: Any) -> RewardModel:
        own: dict[str, Any] = {"max_length": config.train.max_length, "lora_rank": lora_rank}
        return RewardModel.from_backbone(config.backbone, **(own | options))

    return make


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
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    # What the alarm looks through, named as `reward` is; empty: the reward itself.
    monitor: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.monitor and self.alarm.action == "off":
            raise ValueError("A monitor is for the alarm: set alarm.action, or leave it out.")
        if self.train.refresh_every:
            raise ValueError(
                "A reward is refreshed from preferences and samples, which this command has not: "
                "leave train.refresh_every out, or run `trueward rlp` with policy.refresh_every."
            )


def policy(config: PolicyCommand) -> None:
    """Train a policy and save it in `output_dir/model`."""
    if finished(config, "policy"):
        return
    loaded = load_prompts(config.prompts, **config.data.arguments())
    writer = Policy.from_pretrained(config.policy, lora_rank=config.lora_rank)
    rows = fitting_prompts(writer, loaded.rows, loaded.report)
    reward_function = load_reward(config.reward)
    monitor = load_reward(config.monitor) if config.monitor else None
    if config.alarm.action not in ("off", "log"):
        config.alarm.load()  # a file that cannot be read is told before anything is done
    start(config, "policy")
    train_policy(
        writer,
        reward_function,
        rows,
        config.train,
        objective=config.objective.build(),
        output_dir=config.output_dir,
        alarm=config.alarm,
        monitor=monitor,
    )
    tell(config.output_dir, loaded)


@dataclass(frozen=True, kw_only=True)
class RefineCommand:
    """Train a reward again on what the policy writes."""

    # spg, and its ablations reward, select_all, rlaif: synthetic preferences. uml, and its
    # ablations infomax, mvi, contrastive: a loss beside the training. spg_uml: both. control:
    # neither, the same training with nothing new.
    method: RefineMethod
    reward_model: list[str]  # the current one; several make an ensemble. It ranks SPG's samples
    preferences: str  # D: file, folder, or hub name
    samples: str  # from `trueward sample`, n completions for each prompt
    backbone: str  # the SFT model: the new reward starts from it
    output_dir: str
    pairs_only: bool = False  # make the synthetic preferences, for `trueward audit`, and stop
    synthetic: str = ""  # train on these instead, as `trueward audit` kept them
    warm_start: bool = False  # start from the current reward model instead, with its family
    lora_rank: int = 0  # 0 = train all weights
    policy: str = ""  # rlaif: who judges the samples, the policy that wrote them
    selection: str = ""  # more preferences, on which family=warm selects its members
    reference: str = ""  # JSONL with prompt and completion(s): what members' scales are measured on
    held_out: float = 0.05  # share of D's prompts kept for the evaluation
    evaluation: dict[str, str] = field(default_factory=dict)  # name -> more preferences
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    family: FamilyConfig = field(default_factory=FamilyConfig)  # of the new reward
    spg: SPGConfig = field(default_factory=SPGConfig)
    uml: MultiViewConfig = field(default_factory=MultiViewConfig)
    train: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        self.family.require_own_options()
        require_own_options(self.spg, self.uml, [self.method])
        require_composable(self.method, self.family)
        pairs = METHODS[self.method].pairs
        if (pairs == "rlaif") != bool(self.policy):
            raise ValueError(
                "--policy is who judges the samples: method=rlaif needs it, and no other method "
                f"reads it; got method={self.method} and policy={self.policy!r}."
            )
        if not pairs and (self.pairs_only or self.synthetic):
            raise ValueError(
                f"method={self.method} makes no synthetic preferences: leave pairs_only and "
                "synthetic out."
            )
        if self.pairs_only and self.synthetic:
            raise ValueError("pairs_only makes the preferences that synthetic reads: give one.")
        if self.warm_start and (self.family != FamilyConfig() or self.lora_rank):
            raise ValueError(
                "warm_start trains the current model on, whose family and adapters it keeps: leave "
                "family and lora_rank out."
            )
        if self.selection and self.family.family != "warm":
            raise ValueError(f"selection is for family=warm, got family={self.family.family}.")


def refine(config: RefineCommand) -> None:
    """Train the refined reward and save it in `output_dir/model`."""
    if finished(config, "refine"):
        return
    out = Path(config.output_dir)
    loaded = load_preferences(config.preferences, **config.data.arguments())
    rows, held_out = split_by_prompt(loaded.rows, fraction=config.held_out, seed=config.train.seed)
    sets = {"test": held_out} if held_out else {}  # trainers have a held_out of their own
    for name, source in config.evaluation.items():
        sets[name] = load_preferences(source, **config.data.arguments()).rows
    models = load_reward_models(*config.reward_model)
    current: Reward = models[0] if len(models) == 1 else models
    make = warm_start(current) if config.warm_start else _maker(config, config.lora_rank)
    drawn = _samples_apart(config.samples, sets)
    routes = _routes(config)
    names = {config.spg.equivalence, *config.spg.routes.values()}
    clusters = METHODS[config.method].pairs in ("spg", "select_all") and not config.synthetic
    embeds = "policy_states" in names and (clusters or config.uml.views == "cluster")
    policy = Policy.from_pretrained(config.backbone) if embeds else None
    judge = policy_judge(Policy.from_pretrained(config.policy)) if config.policy else None
    synthetic = None
    if config.synthetic:
        synthetic = load_preferences(config.synthetic, **config.data.arguments()).rows
    start(config, "refine")
    rewards = rewards_of(current, config.objective.build())
    if config.pairs_only:
        synthetic_rows(
            spg_for(config.spg, METHODS[config.method].pairs),
            rewards,
            drawn,
            out / "preferences",
            policy=policy,
            judge=judge,
            equivalent=None,
            seed=_refined_seed(config),
            routes=routes,
        )
        _tell_pairs(out)
        return
    selection = []
    if config.selection:
        selection = load_preferences(config.selection, **config.data.arguments()).rows
    refine_reward(
        config.method,
        with_facts(
            make, {"training data": Path(config.preferences).name, "refined by": config.method}
        ),
        rows,
        drawn,
        rewards=rewards,
        train=replace(config.train, seed=_refined_seed(config)),
        output_dir=out,
        family=config.family,
        spg=config.spg,
        uml=config.uml,
        policy=policy,
        judge=judge,
        synthetic=synthetic,
        routes=routes,
        reference=_reference(config.reference),
        report=loaded.report,
        selection=selection,
        evaluation=lambda reward: evaluate_on(reward, sets),
    )
    if synthetic is None:
        _tell_pairs(out)
    tell(config.output_dir, loaded)


def _refined_seed(config: RefineCommand) -> int:
    """Return another seed than the first reward's, which is trained with the same options.

    It is the same for all methods: they differ by method alone.
    """
    return seed_of(config.train.seed, "refined") % 2**31


def _tell_pairs(out: Path) -> None:
    made = finished_summary(out / "preferences")
    if made is not None:
        console.print(numbers_text(made["metrics"]), highlight=False)


def _samples_apart(
    source: str, sets: dict[str, list[PreferenceRow]]
) -> list[tuple[Prompt, list[str]]]:
    """Return the samples of prompts that nothing is reported on; the others are told."""
    reserved = {prompt_key(row.prompt) for rows in sets.values() for row in rows}
    drawn = read_samples(source)
    kept = [(prompt, texts) for prompt, texts in drawn if prompt_key(prompt) not in reserved]
    if len(kept) < len(drawn):
        console.print(
            f"{source}: {len(drawn) - len(kept)} of {len(drawn)} prompts are in an evaluation set "
            "and left out.",
            highlight=False,
        )
    return kept


def _routes(config: RefineCommand) -> dict[str, str]:
    """Return the value by which each prompt of the samples chooses its equivalence.

    Raises:
        DataError: Routes are asked for, and no row says which it takes.
    """
    rows = [
        PromptRow(row["prompt"], f"{config.samples}:{line}", row)
        for line, row in read_jsonl(config.samples)
    ]
    routes = prompt_routes(rows, route_by=config.spg.route_by)
    if config.spg.routes and not set(routes.values()) & set(config.spg.routes):
        raise DataError(
            f"spg.routes go by '{config.spg.route_by}', and no row of {config.samples} has one of "
            f"{', '.join(config.spg.routes)} there: give the prompts that column before "
            f"`trueward sample --keep {config.spg.route_by}`, or set spg.route_by."
        )
    return routes


def rlp(config: RLPConfig) -> None:
    """Run the pipeline and write its report."""
    run_rlp(config)
    console.print(f"Report: {report_run(config.output_dir)}", highlight=False)
