"""The demo: over-optimisation shown, and what is done against it, in the embedded world.

A policy learns the grammar, an annotator compares some of its answers, reward models learn from the
noisy comparisons, and policies are optimised hard against several rewards made of them. The gold
reward is only watched. What comes out is reported as it is: a comparison of one seed.
"""

from dataclasses import dataclass, field
from typing import Any

from trueward.lab.compare import run_compare
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import LanguageConfig
from trueward.lab.methods import Method
from trueward.lab.plan import CompareConfig
from trueward.options import ObjectiveConfig

METHODS = {
    "single": Method(label="single reward"),
    "single_5x": Method(label="single reward, trained 5 x as long", epochs_scale=5.0),
    "worst_case": Method(
        label="worst case of 5", members=5, objective=ObjectiveConfig(name="worst_case")
    ),
    "mix": Method(
        label="reward-robust mix 0.2",
        members=5,
        objective=ObjectiveConfig(name="reward_robust", nominal_weight=0.2),
    ),
    "mean": Method(label="mean of 5", members=5),
    "uwo": Method(
        label="uncertainty-weighted 0.5",
        members=5,
        objective=ObjectiveConfig(name="uncertainty_weighted", coef=0.5),
    ),
    "retrained": Method(label="retrained (control)", reward="control"),
    "spg": Method(label="RLP-SPG", reward="spg"),
    "uml": Method(label="RLP-UML", reward="uml"),
    "gold": Method(label="gold itself", reward="gold"),
}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What may be changed about the demo; the defaults take some minutes on two cores."""

    output_dir: str = "runs/demo"
    seed: int = 0
    processes: int = 0  # 0 = as many as there are cores
    world: GrammarWorld = field(default_factory=GrammarWorld)
    language: LanguageConfig = field(default_factory=lambda: LanguageConfig(steps=45))


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Compare the demo's methods on one seed; write and print what came of them."""
    return run_compare(
        CompareConfig(
            output_dir=config.output_dir,
            methods=METHODS,
            seeds=1,
            first_seed=config.seed,
            processes=config.processes,
            title="When a reward is optimised too hard",
            grammar=config.world,
            language=config.language,
        )
    )
