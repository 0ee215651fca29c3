"""What a run of RLP is made of, and what it refuses."""

import dataclasses
import os
from dataclasses import dataclass, field

from trueward.models.scratch import ModelSource
from trueward.options import ObjectiveConfig
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    METHODS,
    RefineMethod,
    require_composable,
    require_own_options,
)
from trueward.refine.spg import SPGConfig
from trueward.sampling import SamplingConfig
from trueward.train.alarm import AlarmConfig
from trueward.train.families import (
    FamilyConfig,
)
from trueward.train.policy import PolicyConfig
from trueward.train.reward import RewardConfig
from trueward.train.sft import SFTConfig


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
    # Optimise against the reward models of all rounds so far, as one ensemble, not the last alone;
    # the last alone makes the next round's preferences.
    ensemble_rounds: bool = False
    refresh_prompts: int = 0  # sampled at a refresh within a run (policy.refresh_every); 0 = all
    seed: int = 42
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)  # in every policy's run
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
        # Of all methods: a recipe's options stay when the command line takes fewer of them.
        require_own_options(self.spg, self.uml, tuple(METHODS))
        for name, default in (
            ("sft", SFTConfig()),
            ("reward", RewardConfig()),
            ("policy", PolicyConfig()),
            ("samples", SamplingConfig()),
        ):
            if getattr(self, name).seed != default.seed:
                raise ValueError(f"{name}.seed is the run's: set seed, and leave it out.")
        if self.samples.n < 2 or self.samples.temperature <= 0:
            raise ValueError(
                "A refinement compares different samples of a prompt: samples.n must be at least 2 "
                f"and samples.temperature above 0, got {self.samples.n} and "
                f"{self.samples.temperature}."
            )
        for method in self.methods:
            require_composable(method, self.family)
        if self.ensemble_rounds and self.policy.refresh_every:
            raise ValueError(
                "ensemble_rounds optimises the rewards of all rounds and policy.refresh_every one "
                "that is made anew within a run: choose one of them."
            )
        if self.refresh_prompts and not self.policy.refresh_every:
            raise ValueError("refresh_prompts is for policy.refresh_every: set that too.")
        if self.stop.max_accuracy_loss and not self.data.evaluation:
            raise ValueError(
                "stop.max_accuracy_loss needs data.evaluation to measure accuracy on: name a set."
            )
        if self.stop.min_accepted and not any(METHODS[m].pairs for m in self.methods):
            raise ValueError(
                "stop.min_accepted is about synthetic preferences, and none of the methods makes "
                "any: leave it out."
            )
        if self.warm_start and self.family.family not in ("single", "heads"):
            raise ValueError(
                "warm_start trains one model on: it is for family=single and heads, got "
                f"family={self.family.family}."
            )
        if self.policy.refresh_every and self.alarm.action != "off":
            raise ValueError(
                "A reward that is refreshed cannot watch its own policy, as its scale moves: leave "
                "policy.refresh_every or the alarm out."
            )
        if self.policy.refresh_every and self.policy.bf16 != self.reward.bf16:
            raise ValueError(
                "policy.refresh_every trains rewards within the policy's run: policy.bf16 and "
                "reward.bf16 must be the same."
            )
