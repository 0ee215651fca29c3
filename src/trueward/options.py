"""What names of objectives on the command line stand for, in literal dicts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trueward import objectives
from trueward.posterior import RewardPosterior
from trueward.train.loop import seed_of


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which objective turns a posterior into a reward, by its name in `trueward.objectives`."""

    name: Literal[
        "mean",
        "median",
        "nominal",
        "worst_case",
        "reward_robust",
        "uncertainty_weighted",
        "lower_confidence_bound",
        "uncertainty_penalised",
        "entropic",
        "quantile",
    ] = "mean"
    nominal_weight: float = 0.4  # reward_robust: 1 is nominal alone, 0 the worst case alone
    # reward_robust: where the weight arrives at the last step of policy optimisation, and how.
    # Outside of it (scoring, best of n, evaluation) the objective stays at its start.
    nominal_weight_end: float | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_level: Literal["sample", "batch"] = "sample"  # reward_robust
    # uncertainty_weighted, lower_confidence_bound and uncertainty_penalised, which is the second
    # but for the running mean that policy optimisation adds.
    coef: float = 0.5
    temperature: float = 1.0  # entropic
    level: float = 0.25  # quantile
    # What each member puts into the objective: its mean, `mean - bound_coef * std`, or a draw. The
    # last two need Gaussian heads.
    uncertainty_set: Literal["means", "lower_bound", "samples"] = "means"
    bound_coef: float = 1.0  # lower_bound
    sample_seed: int = 0  # samples: draws are a function of it and of the posterior
    # reward_robust: the mean of the member with the lowest std, or that of all members. A third
    # choice, the score of a single-head model, can only be handed in from Python
    # (`objectives.reward_robust`): an objective known by name sees nothing but the posterior.
    nominal: Literal["lowest_std", "mean"] = "lowest_std"

    def __post_init__(self) -> None:
        moves = self.nominal_weight_end is not None
        if moves != (self.schedule != "constant") or (moves and self.name != "reward_robust"):
            raise ValueError(
                "A weight that moves needs name=reward_robust, nominal_weight_end and "
                f"schedule=linear or cosine together, got name={self.name}, "
                f"nominal_weight_end={self.nominal_weight_end} and schedule={self.schedule}."
            )
        if self.nominal_weight_end is not None and not 0.0 <= self.nominal_weight_end <= 1.0:
            raise ValueError(
                f"nominal_weight_end must lie in [0, 1], got {self.nominal_weight_end}."
            )
        # Asked once of a made-up posterior, so that a bad number is refused before hours of work.
        self.build()(RewardPosterior(torch.zeros(1, 2), torch.ones(1, 2)))

    def build(self) -> Callable[[RewardPosterior], Tensor]:
        """Return the objective as a function of the posterior.

        `reward_robust` and `uncertainty_penalised` are `objectives.RunObjective`s, new ones at each
        call: `train_policy` tells them its progress, for all others they are plain functions.
        """
        if self.name == "reward_robust":
            return objectives.ScheduledRewardRobust(
                nominal_weight=self.nominal_weight,
                end=self.nominal_weight_end,
                schedule=self.schedule,
                mix=self._reward_robust,
            )
        if self.name == "uncertainty_penalised":
            return objectives.UncertaintyPenalised(coef=self.coef, uncertainty_set=self._set_of)
        builders: dict[str, Callable[[RewardPosterior], Tensor]] = {
            "mean": objectives.mean,
            "median": objectives.median,
            "nominal": objectives.nominal,
            "worst_case": objectives.worst_case,
            "uncertainty_weighted": lambda p: objectives.uncertainty_weighted(p, coef=self.coef),
            "lower_confidence_bound": lambda p: objectives.lower_confidence_bound(
                p, coef=self.coef
            ),
            "entropic": lambda p: objectives.entropic(p, temperature=self.temperature),
            "quantile": lambda p: objectives.quantile(p, level=self.level),
        }
        objective = builders[self.name]
        if self.uncertainty_set == "means":
            return objective
        return lambda posterior: objective(self._set_of(posterior))

    def _set_of(self, posterior: RewardPosterior) -> RewardPosterior:
        """Return the uncertainty set: what each member puts into the objective."""
        if self.uncertainty_set == "lower_bound":
            return objectives.lower_bounds(posterior, coef=self.bound_coef)
        if self.uncertainty_set == "samples":
            # No state that a resumed run would have lost, and other draws for other rows.
            generator = torch.Generator(posterior.means.device)
            generator.manual_seed(seed_of(self.sample_seed, posterior.means.tolist()))
            return objectives.sampled(posterior, generator=generator)
        return posterior

    def _reward_robust(self, posterior: RewardPosterior, *, nominal_weight: float) -> Tensor:
        chosen = {"lowest_std": objectives.nominal, "mean": objectives.mean}[self.nominal]
        return objectives.reward_robust(
            self._set_of(posterior),
            nominal_weight=nominal_weight,
            min_level=self.min_level,
            nominal_reward=chosen(posterior),
        )
