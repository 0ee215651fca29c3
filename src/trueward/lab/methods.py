"""A method: a reward, the objective made of it, and how a policy is optimised against it."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from trueward.options import ObjectiveConfig
from trueward.refine.refinement import RefineMethod

# From the annotator's comparisons; gold, random (noise of the text) and length; or learned again,
# from the comparisons and a policy's samples, by a method of `refine.refinement`.
RewardName = Literal["learned", "gold", "random", "length"] | RefineMethod
REFINED: tuple[RefineMethod, ...] = get_args(RefineMethod)
# A model for each member (each one Gaussian head by `bt_marginal`), Gaussian heads on one backbone,
# or another family by its name in `train.families`; those stand on scalar heads, as `single` is.
MemberFamily = Literal[
    "deep",
    "heads",
    "single",
    "brme_faithful",
    "brme_pairs",
    "lora",
    "warm",
    "attributes",
    "energy",
    "laplace",
]
ONE_MEMBER = (
    "single",
    "warm",
    "attributes",
    "energy",
)  # families whose posterior has a single member
Optimiser = Literal["closed_form", "best_of_n", "ppo", "rloo", "grpo"]
TRAINED: tuple[Optimiser, ...] = ("ppo", "rloo", "grpo")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of a comparison."""

    label: str = ""  # as figures name it; empty: its key
    reward: RewardName = "learned"  # gold, random (noise of the text) and length are controls
    members: int = 1  # in the posterior that the objective gets
    family: MemberFamily = "deep"  # where the members come from; see `train.families`
    epochs_scale: float = 1.0  # reward training this many times as long: the control at equal cost
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimiser: Optimiser = "rloo"
    kl_coef: float = 0.0  # price of a nat of KL, in units of the reward; trained policies only
    steps_scale: float = 1.0  # policy training this many times as long: the policy trained twice
    # Refined rewards: policy -> samples -> reward, this many times, each from the reference policy.
    rounds: int = 1
    # Optimise the rewards of all rounds, the first one's included; what a round samples is a policy
    # optimised against the last round's reward alone.
    ensemble_rounds: bool = False

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}.")
        if self.epochs_scale <= 0:
            raise ValueError(f"epochs_scale must be above 0, got {self.epochs_scale}.")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be at least 0, got {self.kl_coef}.")
        if self.steps_scale <= 0:
            raise ValueError(f"steps_scale must be above 0, got {self.steps_scale}.")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}.")
        if self.reward not in REFINED and (self.rounds, self.ensemble_rounds) != (1, False):
            raise ValueError(f"rounds are for refined rewards, not for reward={self.reward}.")
        if self.steps_scale != 1 and self.optimiser not in TRAINED:
            raise ValueError(
                f"steps_scale is for trained policies ({', '.join(TRAINED)}), not for "
                f"{self.optimiser}."
            )
        if self.kl_coef and self.optimiser not in TRAINED:
            raise ValueError(
                f"kl_coef is for trained policies ({', '.join(TRAINED)}), not for {self.optimiser}."
            )
        if self.family in ("lora", "laplace") and self.members < 2:
            raise ValueError(
                f"family={self.family} is about the disagreement of its members: give at least 2, "
                f"got members={self.members}."
            )
        own = {"lower_bound", "samples"}  # sets made of the members' own stds
        if self.objective.uncertainty_set in own and self.family in ("lora", "laplace", "warm"):
            raise ValueError(
                f"uncertainty_set={self.objective.uncertainty_set} needs members with stds of "
                f"their own, which family={self.family} has not: take means."
            )
        if self.family in ONE_MEMBER and self.members != 1:
            raise ValueError(
                f"A reward of the family {self.family} has one member, got members={self.members}."
            )
        shape = (self.members, self.epochs_scale, self.family)
        if self.reward != "learned" and shape != (1, 1, "deep"):
            raise ValueError(
                f"members, epochs_scale and family are for learned rewards, reward={self.reward} "
                "has none of them."
            )
