"""Every kind of reward head by the name under which a saved model's `config.json` has it."""

from collections.abc import Callable

from trueward.models.attribute_heads import AttributeHeads
from trueward.models.energy import EnergyHead
from trueward.models.heads import GaussianHeads, Head, ScalarHead
from trueward.models.laplace import LaplaceHead
from trueward.models.lora_ensemble import MemberHeads

KINDS: dict[str, Callable[..., Head]] = {
    "scalar": ScalarHead,
    "gaussian": GaussianHeads,
    "attributes": AttributeHeads,
    "energy": EnergyHead,
    "laplace": LaplaceHead,
    "member": MemberHeads,
}


def make_head(description: dict[str, object], hidden_size: int) -> Head:
    """Build a head from its description in a saved model's `config.json`."""
    options = dict(description)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"Unknown reward head {kind!r}: known are {', '.join(KINDS)}.")
    return KINDS[str(kind)](hidden_size, **options)
