"""Multi-view learning on the policy's samples: RLP-UML.

Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279), after Federici et al. 2020
(https://arxiv.org/abs/2002.07017). Two samples of one prompt are two views of it. An encoder on
the reward model's last state gives each view a Gaussian; what the views share is held up, what
only one of them knows is pressed out, and the gradient shapes the backbone. The reward stays a
linear head on that state: encoder and critic are thrown away after training.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, Prompt, prompt_key
from trueward.data.packing import Group
from trueward.losses.information import (
    gaussian_symmetric_kl,
    gaussian_symmetric_kl_sample,
    jensen_shannon_mi,
)
from trueward.models.backbone import make_batch
from trueward.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

STD_FLOOR = 1e-7  # softplus reaches 0 in float32


@dataclass(frozen=True, kw_only=True)
class MultiViewLoss:
    """One value for each prompt of the batch; reduce them at the call site."""

    loss: Float[Tensor, " batch"]
    mutual_information: Float[Tensor, " batch"]  # Jensen-Shannon surrogate: <= 0, not nats
    symmetric_kl: Float[Tensor, " batch"]  # nats


def multi_view_loss(
    mean_1: Float[Tensor, "batch latent"],
    std_1: Float[Tensor, "batch latent"],
    z_1: Float[Tensor, "batch latent"],
    mean_2: Float[Tensor, "batch latent"],
    std_2: Float[Tensor, "batch latent"],
    z_2: Float[Tensor, "batch latent"],
    critic: nn.Module,
    *,
    skl_coef: float,
    monte_carlo: bool = False,
) -> MultiViewLoss:
    """L_M of RLP-UML: `-I_JSD(z_1; z_2) + skl_coef * D_SKL(p(z|v_1) || p(z|v_2))`.

    Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279), where `skl_coef` is 1. The
    critic is trained by the same loss: lower loss is a tighter estimate. Negatives are the first
    views of the previous prompt in the batch, so each row must belong to a prompt of its own.

    Args:
        mean_1: Mean of the first view's Gaussian.
        std_1: Its standard deviations.
        z_1: A reparameterised draw from it.
        mean_2: Mean of the second view's Gaussian.
        std_2: Its standard deviations.
        z_2: A reparameterised draw from it.
        critic: Scores of pairs, `(z_1, z_2) -> [batch]`.
        skl_coef: Weight of the divergence; 0 leaves the mutual information alone.
        monte_carlo: Estimate the divergence from the draws, as Federici et al. do, where the
            closed form is exact.
    """
    if len(z_1) < 2:
        raise ValueError(
            f"multi_view_loss needs at least 2 prompts in a batch, got {len(z_1)}: rolled within a "
            "batch of one, the negative would be the positive itself."
        )
    information = jensen_shannon_mi(critic(z_1, z_2), critic(z_1.roll(1, dims=0), z_2))
    if monte_carlo:
        divergence = gaussian_symmetric_kl_sample(mean_1, std_1, mean_2, std_2, z_1, z_2)
    else:
        divergence = gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2)
    return MultiViewLoss(
        loss=-information + skl_coef * divergence,
        mutual_information=information,
        symmetric_kl=divergence,
    )


class GaussianEncoder(nn.Module):
    """`p(z|v) = N(mu(h), diag sigma(h)^2)`: two separate three-layer ReLU networks on the state.

    `sigma = softplus(raw) + 1e-7`. Widths are not in the paper; these are those of Federici et al.

    Args:
        hidden_size: Width of the reward model's state.
        latent: Width of z.
        width: Of the two hidden layers.
    """

    def __init__(self, hidden_size: int, *, latent: int = 64, width: int = 1024) -> None:
        super().__init__()
        self.mean = _mlp(hidden_size, width, latent)
        self.raw_std = _mlp(hidden_size, width, latent)

    def forward(
        self, hidden: Float[Tensor, "batch hidden"]
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Return the means and standard deviations of z."""
        return self.mean(hidden), F.softplus(self.raw_std(hidden)) + STD_FLOOR


class Critic(nn.Module):
    """`T(z_1, z_2)`: three layers on both draws side by side, trained to tell matched pairs."""

    def __init__(self, latent: int, *, width: int = 1024) -> None:
        super().__init__()
        self.score = _mlp(2 * latent, width, 1)

    def forward(
        self, z_1: Float[Tensor, "batch latent"], z_2: Float[Tensor, "batch latent"]
    ) -> Float[Tensor, " batch"]:
        """Return the score of each pair of draws."""
        scores: Tensor = self.score(torch.cat([z_1, z_2], dim=1)).squeeze(1)
        return scores


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(width, width, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(width, outputs, dtype=torch.float32),
    )


@dataclass(frozen=True, kw_only=True)
class MultiViewConfig:
    """How the policy's samples enter the reward model's training (RLP-UML)."""

    weight: float = 0.5  # of L_M beside the ranking loss (lambda)
    latent: int = 64  # width of z
    width: int = 1024  # of the hidden layers of encoder and critic
    skl_coef: float = 1.0  # of the symmetrised KL within L_M
    prompts_per_batch: int = 8  # two samples of each; at least 2, better 8 or more
    seed: int = 0  # of the initial weights, the batches and the draws
    monte_carlo: bool = False  # estimate the KL from the draws, where the closed form is exact

    def __post_init__(self) -> None:
        if self.prompts_per_batch < 2:
            raise ValueError(
                f"prompts_per_batch must be at least 2, got {self.prompts_per_batch}: rolled "
                "within a batch of one, the negative would be the positive itself."
            )
        for name in ("latent", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("weight", "skl_coef"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and at least 0, got {getattr(self, name)}."
                )


class MultiView(nn.Module):
    """The multi-view loss on batches of the policy's samples, beside a reward model's training.

    Call it once a step, add the loss to the ranking loss, and give its parameters to the
    optimiser: they are the encoder's and the critic's, and of no use afterwards. What a step draws
    hangs on the config's seed and the step's number alone, so there is nothing to save but the
    weights, and a resumed run draws as an unbroken one. In several processes every one draws the
    same batch, so their mean gradient is that of a single process.

    Args:
        hidden_size: Width of the reward model's state.
        samples: Prompts with their completions from the policy. Lists of one prompt are joined. A
            prompt with fewer than two different completions has no two views: it is left out and
            counted in `excluded`.
        config: See `MultiViewConfig`.
    """

    def __init__(
        self,
        hidden_size: int,
        samples: Sequence[tuple[Prompt, Sequence[Completion]]],
        config: MultiViewConfig,
    ) -> None:
        super().__init__()
        self.config = config
        self.samples, self.excluded = _with_two_views(samples)
        if self.excluded:
            logger.warning(
                "%d of %d prompts have fewer than two different completions and are left out of "
                "multi-view learning.",
                self.excluded,
                self.excluded + len(self.samples),
            )
        if len(self.samples) < 2:
            raise ValueError(
                "Multi-view learning needs at least 2 prompts with two different completions each, "
                f"got {len(self.samples)} ({self.excluded} left out): sample more completions."
            )
        # Initial weights hang on the config's seed, and the caller's random state is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.encoder = GaussianEncoder(hidden_size, latent=config.latent, width=config.width)
            self.critic = Critic(config.latent, width=config.width)

    def forward(
        self, reward_model: RewardModel, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return `weight * mean L_M` of the step's batch, and metrics.

        `uml/jsd` is the Jensen-Shannon surrogate of the mutual information: it starts near
        -2 log 2 = -1.386, rises towards 0, and is not in nats. `uml/symmetric_kl` is in nats,
        `uml/loss` is the mean of L_M before the weight.
        """
        if reward_model.head is None:
            raise ValueError(
                "Multi-view learning reads the state under a reward head of ours, and this reward "
                "model keeps its own classifier: make one with RewardModel.from_backbone."
            )
        generator = _step_generator(self.config.seed, step)
        groups = [_views(reward_model, *views) for views in self.draw(generator)]
        pad_id = reward_model.tokenizer.pad_token_id
        batch = make_batch(reward_model.backbone, groups, pad_id=pad_id)
        hidden = reward_model.hidden(batch)
        # Under mixed precision too, encoder, draws and losses are computed in float32.
        with torch.autocast(hidden.device.type, enabled=False):
            mean, std = self.encoder(hidden.float())
            # Drawn on the CPU: the same noise on every device.
            z = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
            terms = multi_view_loss(
                *(mean[0::2], std[0::2], z[0::2]),  # each prompt's two views are neighbours
                *(mean[1::2], std[1::2], z[1::2]),
                self.critic,
                skl_coef=self.config.skl_coef,
                monte_carlo=self.config.monte_carlo,
            )
        loss = terms.loss.mean()
        metrics = {
            "uml/jsd": terms.mutual_information.mean().item(),
            "uml/symmetric_kl": terms.symmetric_kl.mean().item(),
            "uml/loss": loss.item(),
        }
        return self.config.weight * loss, metrics

    def draw(self, generator: torch.Generator) -> list[tuple[Prompt, Completion, Completion]]:
        """Draw different prompts, and for each two different completions, without replacement."""
        order = torch.randperm(len(self.samples), generator=generator)
        views = []
        for i in order[: self.config.prompts_per_batch].tolist():
            prompt, completions = self.samples[i]
            first, second = torch.randperm(len(completions), generator=generator)[:2].tolist()
            views.append((prompt, completions[first], completions[second]))
        return views


def _with_two_views(
    samples: Sequence[tuple[Prompt, Sequence[Completion]]],
) -> tuple[list[tuple[Prompt, list[Completion]]], int]:
    """Join lists of one prompt, drop repeats, and leave out prompts without two views."""
    joined: dict[str, tuple[Prompt, dict[str, Completion]]] = {}
    for prompt, completions in samples:
        _, distinct = joined.setdefault(prompt_key(prompt), (prompt, {}))
        for completion in completions:
            distinct.setdefault(prompt_key(completion), completion)
    usable = [(p, list(distinct.values())) for p, distinct in joined.values() if len(distinct) > 1]
    return usable, len(joined) - len(usable)


def _views(
    reward_model: RewardModel, prompt: Prompt, first: Completion, second: Completion
) -> Group:
    """Tokenise two completions of a prompt as one group."""
    try:
        views = [reward_model.tokenize(prompt, completion) for completion in (first, second)]
    except DataError as error:
        raise DataError(f"A policy sample for multi-view learning: {error}") from error
    # A long prompt is cut to fit each completion; the shorter remainder fits both.
    shared = min((view.prompt_ids for view in views), key=len)
    return Group(shared, [view.completion_ids for view in views])


def _step_generator(seed: int, step: int) -> torch.Generator:
    """Return noise that hangs on (seed, step) alone; hashed, so that no two pairs share it."""
    digest = hashlib.sha256(f"multiview {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
