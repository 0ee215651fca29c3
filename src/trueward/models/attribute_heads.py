"""URM's head: a Gaussian for each attribute of an answer, and a network that weighs attributes.

Lou et al. 2024, "Uncertainty-aware Reward Model" (https://arxiv.org/abs/2410.00847). People rate an
answer by several attributes (HelpSteer2: helpfulness, correctness, coherence, complexity,
verbosity). The head gives each its mean and std, learned from ratings; gates learned from
comparisons make one reward of them. `train.attributes` trains both, `models.published_urm` reads
the authors' checkpoints.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trueward.models.heads import LOG_STD_MAX, LOG_STD_MIN, Head, HeadOutput

HELPSTEER2 = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# What the `config.json` of the authors' gated checkpoints names as its architecture.
URM_ARCHITECTURE = "LlamaForSequenceClassificationWithNormal_Weights"


class AttributeHeads(Head):
    """Gaussian attributes of an answer, and gates from the same state that weigh them: one member.

    `out = W h` viewed as `[..., attribute, 2]`: a mean `mu_i` and a log std, as the published
    checkpoints have them; `w = gating(h)`; the reward is `sum_i w_i mu_i` with the std
    `sqrt(sum_i w_i^2 s_i^2)`, which takes the attributes as independent, as the paper does
    (Section 4.1): ratings that go together make the true std larger.

    The gating network has the published shape, two hidden layers with SELU, and its output is used
    as it is: weights may be negative and need not sum to 1. `softmax=True`, which the published
    checkpoints have not, makes them shares. Fresh gates are `1 / m` for every answer.

    Args:
        hidden_size: Of the states.
        attributes: Their names, in the order of the outputs.
        softmax: Whether gates are positive and sum to 1.
        gate_width: Of the gating network's hidden layers; 0 for `hidden_size`, as published.
        log_std_range: Between which log stds are clamped; the range is ours.
    """

    members = 1
    has_stds = True

    def __init__(
        self,
        hidden_size: int,
        attributes: Sequence[str],
        *,
        softmax: bool = False,
        gate_width: int = 0,
        log_std_range: Sequence[float] = (LOG_STD_MIN, LOG_STD_MAX),
    ) -> None:
        super().__init__()
        names = tuple(attributes)
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"AttributeHeads needs one attribute or more, each with its own name, got {names}."
            )
        if gate_width < 0:
            raise ValueError(f"gate_width must be at least 0, got {gate_width}.")
        lowest, highest = log_std_range
        if not lowest < highest:
            raise ValueError(f"log_std_range must be (lowest, highest), got {log_std_range}.")
        self.attribute_names = names
        self.softmax = softmax
        self.gate_width = gate_width or hidden_size
        self.log_std_range = (float(lowest), float(highest))
        self.linear = nn.Linear(hidden_size, 2 * len(names), dtype=torch.float32)
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(hidden_size + 1))
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():  # stds start near 1
            self.linear.weight.view(len(names), 2, hidden_size)[:, 1] *= 0.1
        fresh = 0.0 if softmax else 1 / len(names)
        self.gating = gating_network(hidden_size, self.gate_width, len(names), fresh=fresh)

    def attributes(
        self, hidden: Float[Tensor, "... hidden"]
    ) -> tuple[Float[Tensor, "... attribute"], Float[Tensor, "... attribute"]]:
        """Return each attribute's mean and std, in the units of the ratings learned from."""
        with torch.autocast(hidden.device.type, enabled=False):
            out = self.linear(hidden.float()).unflatten(-1, (len(self.attribute_names), 2))
        return out[..., 0], out[..., 1].clamp(*self.log_std_range).exp()

    def gates(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... attribute"]:
        """Return the weight of each attribute in the reward."""
        with torch.autocast(hidden.device.type, enabled=False):
            weights: Tensor = self.gating(hidden.float())
        return weights.softmax(-1) if self.softmax else weights

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return the reward's mean and std; float32 even under autocast."""
        means, stds = self.attributes(hidden)
        gates = self.gates(hidden)
        return HeadOutput(
            weighted_mean(gates, means)[..., None], weighted_std(gates, stds)[..., None]
        )

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build these heads again."""
        return {
            "kind": "attributes",
            "attributes": list(self.attribute_names),
            "softmax": self.softmax,
            "gate_width": self.gate_width,
            "log_std_range": list(self.log_std_range),
        }


def gating_network(hidden_size: int, width: int, attributes: int, *, fresh: float) -> nn.Sequential:
    """Return state -> width -> width -> attributes, SELU between, which says `fresh` of any state.

    Its last layer starts with zero weights and that bias.
    """
    layers = [
        nn.Linear(rows, columns, dtype=torch.float32)
        for rows, columns in ((hidden_size, width), (width, width), (width, attributes))
    ]
    for layer in layers:  # SELU keeps unit variance under these, Klambauer et al. 2017
        nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(layers[-1].weight)
    nn.init.constant_(layers[-1].bias, fresh)
    return nn.Sequential(layers[0], nn.SELU(), layers[1], nn.SELU(), layers[2])


def weighted_mean(
    gates: Float[Tensor, "... attribute"], means: Float[Tensor, "... attribute"]
) -> Float[Tensor, "..."]:
    """The mean of `sum_i w_i r_i`, with `r_i ~ N(mu_i, s_i^2)`: `sum_i w_i mu_i`."""
    return (gates * means).sum(-1)


def weighted_std(
    gates: Float[Tensor, "... attribute"], stds: Float[Tensor, "... attribute"]
) -> Float[Tensor, "..."]:
    """The std of `sum_i w_i r_i` for independent `r_i`: `sqrt(sum_i w_i^2 s_i^2)`."""
    return torch.linalg.vector_norm(gates * stds, dim=-1)
