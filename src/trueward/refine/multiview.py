"""Multi-view learning on the policy's samples: RLP-UML.

Lang et al. 2024, section 4.2 (https://arxiv.org/abs/2403.19279), after Federici et al. 2020
(https://arxiv.org/abs/2002.07017). Two samples of one prompt are two views of it. An encoder on
the reward model's last state gives each view a Gaussian; what the views share is held up, what
only one of them knows is pressed out, and the gradient shapes the backbone. The reward stays a
linear head on that state: encoder and critic are thrown away after training.

Beside the method stand the losses that the paper's Table 4 compares it with. A good and a bad
sample are pulled together too, against the ranking: `uml/reward_gap` tells whether the rewards of a
prompt's samples draw near, and `views="cluster"` takes both views from samples that say the same.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, Prompt, prompt_key, text_of
from trueward.data.packing import Group
from trueward.losses.information import (
    gaussian_symmetric_kl,
    gaussian_symmetric_kl_sample,
    info_nce_loss,
    jensen_shannon_mi,
)
from trueward.models.backbone import make_batch
from trueward.models.reward_model import RewardModel
from trueward.refine.equivalence import Equivalence, cluster

logger = logging.getLogger(__name__)

LossName = Literal["uml", "infomax", "mvi", "contrastive"]
Schedule = Literal["constant", "linear", "exponential"]
Warmup = Literal["constant", "linear"]
Views = Literal["distinct", "cluster"]
STD_FLOOR = 1e-7  # softplus reaches 0 in float32


# --- The equations -------------------------------------------------------------------------------


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
    information = -multi_view_infomax_loss(z_1, z_2, critic)
    if monte_carlo:
        divergence = gaussian_symmetric_kl_sample(mean_1, std_1, mean_2, std_2, z_1, z_2)
    else:
        divergence = gaussian_symmetric_kl(mean_1, std_1, mean_2, std_2)
    return MultiViewLoss(
        loss=-information + skl_coef * divergence,
        mutual_information=information,
        symmetric_kl=divergence,
    )


def multi_view_infomax_loss(
    z_1: Float[Tensor, "batch latent"], z_2: Float[Tensor, "batch latent"], critic: nn.Module
) -> Float[Tensor, " batch"]:
    """`-I_JSD(z_1; z_2)`: what the views share is held up, and nothing is pressed out.

    MVI in Lang et al. 2024, Table 4 (https://arxiv.org/abs/2403.19279); the baseline Multi-View
    InfoMax of Federici et al. 2020 (https://arxiv.org/abs/2002.07017). Negatives are the first
    views of the previous prompt in the batch.

    Args:
        z_1: A draw from each first view's Gaussian.
        z_2: A draw from each second view's.
        critic: Scores of pairs, `(z_1, z_2) -> [batch]`.
    """
    _require_two_prompts(z_1)
    return -jensen_shannon_mi(critic(z_1, z_2), critic(z_1.roll(1, dims=0), z_2))


def infomax_loss(
    hidden: Float[Tensor, "batch hidden"], z: Float[Tensor, "batch latent"], critic: nn.Module
) -> Float[Tensor, " batch"]:
    """`-I_JSD(h; z)` of one view: z keeps all that it can of the view, shared or not.

    InfoMax in Lang et al. 2024, Table 4 (https://arxiv.org/abs/2403.19279), after Hjelm et al. 2019
    (https://arxiv.org/abs/1808.06670). The reward model's state stands for the view, a text.
    Negatives are the states of the previous prompt in the batch.

    Args:
        hidden: The state of each view.
        z: A draw from its Gaussian.
        critic: Scores of pairs, `(hidden, z) -> [batch]`.
    """
    _require_two_prompts(z)
    return -jensen_shannon_mi(critic(hidden, z), critic(hidden.roll(1, dims=0), z))


def _require_two_prompts(batch: Tensor) -> None:
    if len(batch) < 2:
        raise ValueError(
            f"A multi-view loss needs at least 2 prompts in a batch, got {len(batch)}: rolled "
            "within a batch of one, the negative would be the positive itself."
        )


def scheduled_coefficient(
    step: int, *, start: float, end: float, steps: int, schedule: Schedule
) -> float:
    """Return a coefficient that goes from `start` at step 0 to `end` at `steps`, and stays there.

    Linear in the value, or (`exponential`) in its logarithm, which is how Federici et al. 2020
    (https://arxiv.org/abs/2002.07017) raise the weight of the divergence, from 1e-3 to 1.

    Args:
        step: Training steps count from 1, so that none has `start` itself.
        start: Above 0 where exponential.
        end: The only value of a `constant` schedule; above 0 where exponential.
        steps: At least 1; not read by a `constant` schedule.
        schedule: See above.
    """
    if schedule == "constant":
        return end
    if steps < 1:
        raise ValueError(f"a {schedule} schedule needs at least 1 step, got {steps}.")
    if schedule == "exponential" and not (start > 0 and end > 0):
        raise ValueError(
            f"an exponential schedule runs between values above 0, got {start} and {end}."
        )
    done = min(max(step / steps, 0.0), 1.0)
    if done == 1.0:
        return end  # exactly, where rounding would leave it beside
    if schedule == "linear":
        return start + done * (end - start)
    ratio: float = (end / start) ** done
    return start * ratio


# --- The networks that are thrown away -----------------------------------------------------------


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
    """`T(a, b)`: three layers on both side by side, trained to tell matched pairs.

    Args:
        first: Width of the first of a pair.
        second: Width of the second; as wide as the first by default.
        width: Of the two hidden layers.
    """

    def __init__(self, first: int, second: int | None = None, *, width: int = 1024) -> None:
        super().__init__()
        self.score = _mlp(first + (first if second is None else second), width, 1)

    def forward(
        self, first: Float[Tensor, "batch first"], second: Float[Tensor, "batch second"]
    ) -> Float[Tensor, " batch"]:
        """Return the score of each pair."""
        scores: Tensor = self.score(torch.cat([first, second], dim=1)).squeeze(1)
        return scores


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(width, width, dtype=torch.float32),
        nn.ReLU(),
        nn.Linear(width, outputs, dtype=torch.float32),
    )


# --- The method ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MultiViewConfig:
    """How the policy's samples enter the reward model's training (RLP-UML).

    Marked [paper] are values of Lang et al. 2024, [MIB] those of Federici et al. 2020 or of their
    code, where the paper has none, and [choice] ours, where neither has one.

    The paper cites Caron et al. 2020 (SwAV, https://arxiv.org/abs/2006.09882) for its contrastive
    loss and leaves form and temperature open: here it is InfoNCE between the two views' projected
    and normalised states, the other prompts' views as negatives, at SwAV's temperature.
    """

    # [paper]: uml is the method, the others are the rows of Table 4 that it is compared with:
    # InfoMax, MVI (uml without the divergence) and a contrastive loss.
    loss: LossName = "uml"
    # [choice]: two different samples of a prompt, or two different ones of a cluster of samples
    # that say the same, which needs an equivalence.
    views: Views = "distinct"
    weight: float = 0.5  # of L_M beside the ranking loss (lambda) [paper]
    schedule: Warmup = "constant"  # of the weight; linear rises from 0 [choice]
    warmup_steps: int = 0  # steps until a linear schedule reaches the weight [choice]
    latent: int = 64  # width of z [MIB]
    width: int = 1024  # of the hidden layers of encoder, critic and projection [MIB]
    skl_coef: float = 1.0  # of the symmetrised KL within L_M, with uml [paper]
    skl_schedule: Schedule = "constant"  # of skl_coef [paper]; exponential [MIB]
    skl_start: float = 1e-3  # where another schedule than the constant begins [MIB]
    skl_steps: int = 0  # steps until it reaches skl_coef; 100,000 [MIB], far above a usual run's
    monte_carlo: bool = False  # estimate the KL from the draws [MIB]; the closed form is exact
    temperature: float = 0.1  # of the contrastive loss [choice], SwAV's
    prompts_per_batch: int = 8  # two samples of each; at least 2, better 8 or more [choice]
    seed: int = 0  # of the initial weights, the batches and the draws

    def __post_init__(self) -> None:
        for name, known in (
            ("loss", get_args(LossName)),
            ("views", get_args(Views)),
            ("schedule", get_args(Warmup)),
            ("skl_schedule", get_args(Schedule)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.prompts_per_batch < 2:
            raise ValueError(
                f"prompts_per_batch must be at least 2, got {self.prompts_per_batch}: rolled "
                "within a batch of one, the negative would be the positive itself."
            )
        for name in ("latent", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("weight", "skl_coef", "skl_start"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be finite and at least 0, got {getattr(self, name)}."
                )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}.")
        if self.loss != "uml":  # the default stands for whatever loss a method names later
            _refuse_idle_options(self)
        if self.skl_start != 1e-3 and self.skl_schedule == "constant":
            raise ValueError(
                "skl_start is where a linear or exponential skl_schedule begins and would do "
                "nothing with skl_schedule='constant': leave it out, or choose another schedule."
            )
        _check_steps("schedule", self.schedule, "warmup_steps", self.warmup_steps)
        _check_steps("skl_schedule", self.skl_schedule, "skl_steps", self.skl_steps)
        if self.skl_schedule == "exponential" and not (self.skl_start > 0 and self.skl_coef > 0):
            raise ValueError(
                "skl_schedule='exponential' runs between values above 0, got "
                f"skl_start={self.skl_start} and skl_coef={self.skl_coef}: use 'linear' for a 0."
            )


# Options that one loss alone reads: with any other they would do nothing.
_READ_BY = {
    "skl_coef": "uml",
    "skl_schedule": "uml",
    "skl_start": "uml",
    "skl_steps": "uml",
    "monte_carlo": "uml",
    "temperature": "contrastive",
}


def idle_options(config: MultiViewConfig, losses: Collection[str]) -> list[str]:
    """Return the names of the options that are set and that none of the losses reads."""
    given = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    return [name for name, loss in _READ_BY.items() if name in given and loss not in losses]


def _refuse_idle_options(config: MultiViewConfig) -> None:
    for name in idle_options(config, [config.loss]):
        raise ValueError(
            f"{name} is read with loss={_READ_BY[name]!r} and would do nothing with "
            f"loss={config.loss!r}: leave it out."
        )


def for_loss(config: MultiViewConfig, loss: LossName, *, seed: int) -> MultiViewConfig:
    """Return the options of another loss: what that one does not read goes back to its default."""
    defaults = {f.name: f.default for f in fields(config)}
    idle: dict[str, Any] = {name: defaults[name] for name, by in _READ_BY.items() if by != loss}
    return replace(config, loss=loss, seed=seed, **idle)


def _check_steps(schedule_name: str, schedule: str, steps_name: str, steps: int) -> None:
    if schedule == "constant" and steps != 0:
        raise ValueError(
            f"{steps_name}={steps} would do nothing with {schedule_name}='constant': leave it out, "
            "or choose another schedule."
        )
    if schedule != "constant" and steps < 1:
        raise ValueError(
            f"{schedule_name}={schedule!r} needs {steps_name}, the steps until its end, of at "
            f"least 1, got {steps}."
        )


def require_one_state(reward_model: RewardModel) -> None:
    """Refuse a reward model that has no single state of ours for each completion.

    `MultiView` asks this at each step; ask it first where much comes before the first step.

    Raises:
        ValueError: The model keeps its published classifier, or is a LoRA ensemble.
    """
    if reward_model.head is None:
        raise ValueError(
            "Multi-view learning reads the state under a reward head of ours, and this reward "
            "model keeps its own classifier: make one with RewardModel.from_backbone."
        )
    if reward_model.lora is not None:
        raise ValueError(
            "Multi-view learning reads one last state of each completion, and in a LoRA ensemble "
            f"each of the {reward_model.members} members has its own: take a scalar or Gaussian "
            "head (lora_members=0)."
        )


class MultiView(nn.Module):
    """The multi-view loss on batches of the policy's samples, beside a reward model's training.

    Call it once a step, add the loss to the ranking loss, and give its parameters to the
    optimiser: they are the encoder's and the critic's (a contrastive loss has a projection in their
    place), and of no use afterwards. What a step draws hangs on the config's seed and the step's
    number alone, so there is nothing to save but the weights, and a resumed run draws as an
    unbroken one. In several processes every one draws the same batch, so their mean gradient is
    that of a single process.

    Args:
        hidden_size: Width of the reward model's state.
        samples: Prompts with their completions from the policy. Lists of one prompt are joined. A
            prompt with fewer than two different completions has no two views: it is left out and
            counted in `excluded`.
        config: See `MultiViewConfig`.
        equivalent: Which completions say the same, for `views="cluster"`: each prompt's different
            completions are clustered here, at once, by `refine.equivalence.cluster`. A prompt
            without two in one cluster is left out and counted in `unclustered`.

    Raises:
        ValueError: Fewer than two prompts are left, or views and equivalence do not go together.
    """

    def __init__(
        self,
        hidden_size: int,
        samples: Sequence[tuple[Prompt, Sequence[Completion]]],
        config: MultiViewConfig,
        equivalent: Equivalence | None = None,
    ) -> None:
        super().__init__()
        _refuse_idle_options(config)
        _require_equivalence_for_clusters(config, equivalent)
        self.config = config
        self.samples, self.excluded = _with_two_views(samples)
        self.unclustered = 0
        # Of each prompt, the sets of completions from which two views may be drawn.
        self.clusters = [[list(range(len(completions)))] for _, completions in self.samples]
        if equivalent is not None:
            clusters = _clusters_of_two(self.samples, equivalent)
            kept = [i for i, own in enumerate(clusters) if own]
            self.unclustered = len(self.samples) - len(kept)
            self.samples = [self.samples[i] for i in kept]
            self.clusters = [clusters[i] for i in kept]
        self._tell_left_out()
        # Initial weights hang on the config's seed, and the caller's random state is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            if config.loss == "contrastive":
                self.projection = _mlp(hidden_size, config.width, config.latent)
            else:
                encoder = GaussianEncoder(hidden_size, latent=config.latent, width=config.width)
                scored = hidden_size if config.loss == "infomax" else config.latent
                self.encoder = encoder
                self.critic = Critic(scored, config.latent, width=config.width)

    def forward(
        self, reward_model: RewardModel, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return `weight * mean L_M` of the step's batch, and metrics.

        | metric | is |
        |---|---|
        | `uml/loss` | the mean of L_M, before the weight |
        | `uml/weight`, `uml/skl_coef` | the coefficients of this step |
        | `uml/reward_gap` | mean distance of the two views' rewards: the members' mean, raw |
        | `uml/jsd` | Jensen-Shannon surrogate of the views' mutual information |
        | `uml/jsd_state` | with `infomax`, the same of a view's state and its z |
        | `uml/symmetric_kl` | in nats; with `infomax` and `mvi` it is only measured |

        The surrogate starts near -2 log 2 = -1.386, rises towards 0, and is not in nats.
        A contrastive loss has no Gaussians, so no such metric; it starts near the logarithm of the
        number of prompts in a batch.
        """
        require_one_state(reward_model)
        assert reward_model.head is not None
        config = self.config
        generator = _step_generator(config.seed, step)
        groups = [_views(reward_model, *views) for views in self.draw(generator)]
        pad_id = reward_model.tokenizer.pad_token_id
        batch = make_batch(reward_model.backbone, groups, pad_id=pad_id)
        hidden = reward_model.hidden(batch)
        # Under mixed precision too, encoder, draws and losses are computed in float32.
        with torch.autocast(hidden.device.type, enabled=False):
            losses, measured = LOSSES[config.loss](self, hidden.float(), generator, step)
        loss = losses.mean()
        weight = scheduled_coefficient(
            step, start=0.0, end=config.weight, steps=config.warmup_steps, schedule=config.schedule
        )
        metrics = {
            **measured,
            "uml/loss": loss.item(),
            "uml/weight": weight,
            "uml/reward_gap": _reward_gap(reward_model.head, hidden.detach()),
        }
        return weight * loss, metrics

    def encode(
        self, hidden: Float[Tensor, "completion hidden"], generator: torch.Generator
    ) -> "tuple[View, View]":
        """Return the Gaussians of both views of each prompt, which are neighbours in `hidden`."""
        mean, std = self.encoder(hidden)
        # Drawn on the CPU: the same noise on every device.
        z = mean + std * torch.randn(mean.shape, generator=generator).to(mean.device)
        return View(mean[0::2], std[0::2], z[0::2]), View(mean[1::2], std[1::2], z[1::2])

    def skl_coef_at(self, step: int) -> float:
        """Return the weight of the divergence at a step."""
        config = self.config
        return scheduled_coefficient(
            step,
            start=config.skl_start,
            end=config.skl_coef,
            steps=config.skl_steps,
            schedule=config.skl_schedule,
        )

    def draw(self, generator: torch.Generator) -> list[tuple[Prompt, Completion, Completion]]:
        """Draw different prompts, and for each two different completions, without replacement.

        With `views="cluster"` both are of one cluster, drawn in proportion to its size.
        """
        order = torch.randperm(len(self.samples), generator=generator)
        views = []
        for i in order[: self.config.prompts_per_batch].tolist():
            prompt, completions = self.samples[i]
            members = _drawn_cluster(self.clusters[i], generator)
            first, second = torch.randperm(len(members), generator=generator)[:2].tolist()
            views.append((prompt, completions[members[first]], completions[members[second]]))
        return views

    def _tell_left_out(self) -> None:
        of = self.excluded + self.unclustered + len(self.samples)
        if self.excluded:
            logger.warning(
                "%d of %d prompts have fewer than two different completions and are left out of "
                "multi-view learning.",
                self.excluded,
                of,
            )
        if self.unclustered:
            logger.warning(
                "%d of %d prompts have no two different completions that say the same and are left "
                "out of multi-view learning.",
                self.unclustered,
                of,
            )
        if len(self.samples) < 2:
            alike = " of one cluster" if self.config.views == "cluster" else ""
            raise ValueError(
                f"Multi-view learning needs at least 2 prompts with two different completions"
                f"{alike} each, got {len(self.samples)} ({of - len(self.samples)} left out): "
                "sample more completions."
            )


# --- What each loss makes of the states of a batch ------------------------------------------------


class View(NamedTuple):
    """One view of each prompt of a batch: its Gaussians and a draw from each."""

    mean: Float[Tensor, "batch latent"]
    std: Float[Tensor, "batch latent"]
    z: Float[Tensor, "batch latent"]


Terms = tuple[Float[Tensor, " batch"], dict[str, float]]


def _uml_terms(module: MultiView, hidden: Tensor, generator: torch.Generator, step: int) -> Terms:
    one, two = module.encode(hidden, generator)
    skl_coef = module.skl_coef_at(step)
    terms = multi_view_loss(
        *one, *two, module.critic, skl_coef=skl_coef, monte_carlo=module.config.monte_carlo
    )
    return terms.loss, {
        "uml/jsd": terms.mutual_information.mean().item(),
        "uml/symmetric_kl": terms.symmetric_kl.mean().item(),
        "uml/skl_coef": skl_coef,
    }


def _mvi_terms(module: MultiView, hidden: Tensor, generator: torch.Generator, step: int) -> Terms:
    del step
    one, two = module.encode(hidden, generator)
    losses = multi_view_infomax_loss(one.z, two.z, module.critic)
    return losses, {"uml/jsd": -losses.mean().item(), **_measured_divergence(one, two)}


def _infomax_terms(
    module: MultiView, hidden: Tensor, generator: torch.Generator, step: int
) -> Terms:
    del step
    one, two = module.encode(hidden, generator)
    # Each view by itself, so that a negative is of another prompt.
    first = infomax_loss(hidden[0::2], one.z, module.critic)
    second = infomax_loss(hidden[1::2], two.z, module.critic)
    losses = (first + second) / 2
    return losses, {"uml/jsd_state": -losses.mean().item(), **_measured_divergence(one, two)}


def _contrastive_terms(
    module: MultiView, hidden: Tensor, generator: torch.Generator, step: int
) -> Terms:
    del generator, step
    one, two = module.projection(hidden[0::2]), module.projection(hidden[1::2])
    return info_nce_loss(one, two, temperature=module.config.temperature), {}


LOSSES: dict[LossName, Callable[[MultiView, Tensor, torch.Generator, int], Terms]] = {
    "uml": _uml_terms,
    "infomax": _infomax_terms,
    "mvi": _mvi_terms,
    "contrastive": _contrastive_terms,
}


@torch.no_grad()
def _measured_divergence(one: View, two: View) -> dict[str, float]:
    divergence = gaussian_symmetric_kl(one.mean, one.std, two.mean, two.std)
    return {"uml/symmetric_kl": divergence.mean().item()}


@torch.no_grad()
def _reward_gap(head: nn.Module, hidden: Float[Tensor, "completion hidden"]) -> float:
    """Return the mean distance between the rewards of each prompt's two views."""
    was_training = head.training
    head.eval()  # dropout would widen it
    rewards: Tensor = head(hidden).means.mean(1)
    head.train(was_training)
    return (rewards[0::2] - rewards[1::2]).abs().mean().item()


# --- Which samples are views ----------------------------------------------------------------------


def _require_equivalence_for_clusters(
    config: MultiViewConfig, equivalent: Equivalence | None
) -> None:
    if config.views == "cluster" and equivalent is None:
        raise ValueError(
            "views='cluster' draws both views from completions that say the same, so MultiView "
            "needs an equivalence: pass `equivalent`, such as refine.equivalence.exact_match."
        )
    if config.views != "cluster" and equivalent is not None:
        raise ValueError(
            f"An equivalence would do nothing with views={config.views!r}: leave it out, or set "
            "views='cluster'."
        )


def _clusters_of_two(
    samples: Sequence[tuple[Prompt, list[Completion]]], equivalent: Equivalence
) -> list[list[list[int]]]:
    """Return each prompt's clusters of two completions or more, as places in its list."""
    prompts = [prompt for prompt, _ in samples]
    texts = [[text_of(completion) for completion in completions] for _, completions in samples]
    clusters = []
    for ids in cluster(prompts, texts, equivalent):
        own: dict[int, list[int]] = {}
        for place, cluster_id in enumerate(ids):
            own.setdefault(cluster_id, []).append(place)
        clusters.append([places for places in own.values() if len(places) > 1])
    return clusters


def _drawn_cluster(clusters: list[list[int]], generator: torch.Generator) -> list[int]:
    """Return one cluster, drawn in proportion to its size: that of a member drawn at random."""
    if len(clusters) == 1:  # nothing to draw, and the noise stays that of undivided samples
        return clusters[0]
    homes = [places for places in clusters for _ in places]
    return homes[int(torch.randint(len(homes), (), generator=generator))]


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
