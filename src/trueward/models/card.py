"""The model card that goes with a saved reward model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trueward.models.reward_model import RewardModel

_TEMPLATE = """---
library_name: transformers
tags: [trueward, reward-model, rlhf]
---
# Reward model

{kind}, {parameters:,} parameters, at most {max_length} tokens. Trained with trueward.

| | |
|---|---|
{facts}

Scores of a completion are comparable within a prompt; {scale}

```python
from trueward import RewardModel

reward_model = RewardModel.from_pretrained("this folder")
posterior = reward_model.score(["a prompt"], ["a completion"])
```
"""


def reward_model_card(model: "RewardModel") -> str:
    """Return the card's Markdown: what the model is, its training data and its evaluation."""
    members = model.members
    gaussian = model.head is not None and model.head.describe()["kind"] == "gaussian"
    kind = f"Gaussian heads ({members}) on one backbone" if gaussian else "One scalar reward"
    facts = {
        "backbone": getattr(model.backbone.config, "model_type", "unknown"),
        "training data": "not recorded",
    } | model.facts
    lines = [f"| {k} | {_value(v)} |" for k, v in facts.items()]
    return _TEMPLATE.format(
        kind=kind,
        parameters=sum(p.numel() for p in model.parameters()),
        max_length=model.max_length,
        facts="\n".join(lines),
        scale=(
            "its mean and std on reference samples are in `config.json`."
            if members == 1
            else "members are put on one scale by the statistics in `config.json`."
        ),
    )


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|")
