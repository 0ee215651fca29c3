"""Watched runs in the exact world: gold in closed form at every step, signals from sampled answers.

A run is the path `pi_t ~ reference exp(t reward)`: natural policy gradient without noise, whose
price of KL `1/t` falls as it goes. Few of very many responses are uncovered, badly misjudged and
worse than the rest, so that gold rises and falls (see `lab.exact`).
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.evaluate.alarm import WatchedRun
from trueward.lab.exact import ExactTable, ExactWorld, optimal_policy
from trueward.lab.methods import Method
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.train.loop import seed_of
from trueward.train.signals import Seen, signals_of


def _method(**options: object) -> Method:
    return Method(optimiser="closed_form", **options)  # type: ignore[arg-type]


METHODS: dict[str, Method] = {
    "single": _method(),
    "mean": _method(members=5),
    "worst_case": _method(members=5, objective=ObjectiveConfig(name="worst_case")),
    "mix": _method(members=5, objective=ObjectiveConfig(name="reward_robust", nominal_weight=0.4)),
    "uwo": _method(members=5, objective=ObjectiveConfig(name="uncertainty_weighted", coef=0.5)),
    "gold": _method(reward="gold"),
}


def _turning() -> ExactWorld:
    return ExactWorld(
        response_count=1024, coverage=0.95, covered_std=0.6, uncovered_std=3.0, uncovered_gold=-1.0
    )


@dataclass(frozen=True, kw_only=True)
class ExactPaths:
    """How many paths there are, and how they are watched; all five members of the world watch."""

    seeds: int = 0  # 0 = none
    first_seed: int = 0
    calibration_seeds: list[int] = field(default_factory=list)
    steps: int = 40
    strongest: float = 4.0  # the last step's `1 / beta`
    samples: int = 8  # answers to each prompt that the signals of a step are of
    world: ExactWorld = field(default_factory=_turning)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.samples < 2 or not 0 < self.strongest < math.inf:
            raise ValueError(
                "exact needs at least 1 step, 2 samples and a finite strongest tilt above 0, got "
                f"{self.steps}, {self.samples} and {self.strongest}."
            )


def exact_runs(config: ExactPaths, *, name: str = "exact") -> list[WatchedRun]:
    """Return the runs of all `METHODS` in all seeds."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [
        path_of(config, config.world.open(seed=seed), method, world=name)
        for method in METHODS
        for seed in seeds
    ]


def path_of(config: ExactPaths, table: ExactTable, method: str, *, world: str) -> WatchedRun:
    """Return one path: gold is expected, the signals are of answers drawn at every step."""
    proxy, _ = table.proxy(METHODS[method])
    tilts = torch.arange(config.steps + 1, dtype=proxy.dtype) * (config.strongest / config.steps)
    policies = optimal_policy(
        proxy, beta=1 / tilts[:, None, None], reference=table.reference
    )  # the first tilt is 0: the reference
    draws = [
        _draw(policy, config.samples, seed=seed_of(table.seed, "path", place))
        for place, policy in enumerate(policies[:-1])
    ]
    before = _draw(table.reference, 8 * config.samples, seed=seed_of(table.seed, "reference"))
    reference = Seen(_posterior(table, before), None)
    steps = []
    for policy, drawn in zip(policies, draws, strict=False):
        found = signals_of(Seen(_posterior(table, drawn), None), reference, samples=config.samples)
        logprob = policy.log().gather(1, drawn).mean().item()
        found["kl"] = logprob + math.log(config.world.response_count)  # k1: all were as likely
        steps.append(found | {"logprob": logprob})
    return WatchedRun(
        world=world,
        method=method,
        seed=table.seed,
        gold_is_reward=method == "gold",
        signals={name: [step[name] for step in steps] for name in steps[0]},
        places=list(range(config.steps + 1)),
        gold=(policies * table.gold_table).sum(-1).mean(-1).tolist(),
    )


def _draw(policy: Float[Tensor, "prompt response"], samples: int, *, seed: int) -> Tensor:
    """Return the indices of answers drawn from a policy, [prompt, sample]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(policy, samples, replacement=True, generator=generator)


def _posterior(table: ExactTable, drawn: Tensor) -> RewardPosterior:
    """Return what the members say of drawn answers, those of a prompt in a row."""
    rows = torch.arange(len(drawn))[:, None].expand_as(drawn)
    return RewardPosterior(
        table.means[rows, drawn].flatten(0, 1), table.stds[rows, drawn].flatten(0, 1)
    )
