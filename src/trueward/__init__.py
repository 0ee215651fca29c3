"""Reward learning that survives optimisation."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trueward import evaluate, losses, objectives
    from trueward.models.policy import Policy
    from trueward.models.reward_model import RewardModel
    from trueward.posterior import RewardPosterior

__all__ = ["Policy", "RewardModel", "RewardPosterior", "evaluate", "losses", "objectives"]

_CLASSES = {
    "Policy": "trueward.models.policy",
    "RewardModel": "trueward.models.reward_model",
    "RewardPosterior": "trueward.posterior",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: transformers takes seconds to load."""
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in __all__:
        return importlib.import_module(f"trueward.{name}")
    raise AttributeError(f"module 'trueward' has no attribute {name!r}")
