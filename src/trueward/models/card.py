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


_KINDS = {
    "scalar": "One scalar reward",
    "gaussian": "Gaussian heads ({members}) on one backbone",
    "member": "An ensemble of {members} low-rank adapters on one backbone",
    "attributes": "One reward, the gated sum of Gaussian attributes (URM)",
    "energy": "One reward, the mode of an energy over rewards, with its width (EBRM)",
    "laplace": "One reward with a Gaussian over its last layer's weights (members: {members})",
}


def reward_model_card(model: "RewardModel") -> str:
    """Return the card's Markdown: what the model is, its training data and its evaluation."""
    members = model.members
    kind = str(model.head.describe()["kind"]) if model.head is not None else "scalar"
    facts = {
        "backbone": getattr(model.backbone.config, "model_type", "unknown"),
        "training data": "not recorded",
    } | model.facts
    lines = [f"| {k} | {_value(v)} |" for k, v in facts.items()]
    return _TEMPLATE.format(
        kind=_KINDS[kind].format(members=members),
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
