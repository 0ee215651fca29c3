"""EBRM: an energy over rewards, fitted beside a finished single-head reward model.

Lochab and Zhang 2025, "Energy-Based Reward Models for Robust Language Model Alignment"
(https://arxiv.org/abs/2504.13134). The base is not trained. Pairs that it orders wrongly are left
out (the paper's conflict filter); both sides of every other pair are examples `(e, r)`, the last
state and the base's reward of it, and a network `f(e, r)` learns their density by noise-contrastive
estimation (`losses.energy`). The density's mode replaces the reward, and its width is the std of
the posterior (`models.energy.EnergyHead`, where stands what it does and does not say).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.data.rows import split_by_prompt
from trueward.losses.energy import nce_candidates, nce_loss, noise_log_density
from trueward.models.energy import EnergyHead
from trueward.models.heads import ScalarHead
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.train.brme import (
    BRMEConfig,
    Example,
    encode_examples,
    pair_states,
    rank_correlation,
)
from trueward.train.loop import Loop, LoopConfig, permutation, seed_of
from trueward.train.reward import Evaluation, own_completions

logger = logging.getLogger(__name__)

MOVED = 0.1  # in stds of the base reward: a mode farther than this from it has moved
_ENERGIES_AT_ONCE = 2**16  # with gradients, in float32: 2 GB with the paper's layers


@dataclass(frozen=True, kw_only=True)
class EnergyConfig(LoopConfig):
    """Options of `train_energy`.

    The defaults are the paper's but for those whose comment names the paper's value: ours fit
    thousands of pairs and a CPU. `EnergyConfig.paper()` has the paper's, but for `limit`.
    """

    reward_widths: tuple[int, ...] = (16, 32, 64)  # layers of the reward alone
    widths: tuple[int, ...] = (256, 128)  # of state and reward together; the paper: (1024, 512)
    dropout: float = 0.1  # the paper: .5, too much for narrow layers
    reward_scale: float = 1.0  # stds of the base reward; the paper has 4 for its 8B base
    noise_stds: tuple[float, ...] = (3.5,)  # s_k, in units of the scaled reward
    noise_samples: int = 64  # M, draws of the noise for each example; the paper: 768
    beta: float = 0.1  # examples are perturbed by beta * s_k
    regularisation: float = 0.05  # lam, coefficient of f^2
    trusted: float = 2.0  # the ascent starts at base rewards up to so many stds from their mean
    limit: float = 8.0  # half the range of the density, in stds of the base reward; ours
    ascent_steps: int = 50
    step_size: float = 0.5  # of the ascent, at first
    shrink: float = 0.1  # factor on the step of an ascent that went too far
    learning_rate: float = 3e-3  # the paper: 9e-5, for tens of thousands of pairs
    weight_decay: float = 1e-2
    warmup_ratio: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    epochs: float = 5.0
    batch_size: int = 64  # sides of pairs for each optimiser step; the paper: 256
    max_length: int = 1024  # tokens of prompt and completion
    held_out: float = 0.1  # share of the prompts kept from training, on which modes are judged
    evaluate_every: int = 0  # steps between judgements; 0 = only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise_stds or not all(0 < s < math.inf for s in self.noise_stds):
            raise ValueError(
                f"noise_stds needs at least one std, all above 0, got {self.noise_stds}."
            )
        if self.noise_samples < 1:
            raise ValueError(f"noise_samples must be at least 1, got {self.noise_samples}.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")
        for name in ("beta", "regularisation", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        self.head(1)  # it refuses its own options

    @classmethod
    def paper(cls) -> "EnergyConfig":
        """The values of the paper, for a GPU and some tens of thousands of pairs."""
        return cls(**PRESETS["paper"])

    def head(self, hidden_size: int) -> EnergyHead:
        """Return an untrained head of these sizes, a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return EnergyHead(
                hidden_size,
                reward_widths=self.reward_widths,
                widths=self.widths,
                dropout=self.dropout,
                reward_scale=self.reward_scale,
                trusted=self.trusted,
                limit=self.limit,
                steps=self.ascent_steps,
                step_size=self.step_size,
                shrink=self.shrink,
            )


# Where the paper's values are not the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "widths": (1024, 512),
        "dropout": 0.5,
        "noise_samples": 768,
        "learning_rate": 9e-5,
        "batch_size": 256,
        "max_grad_norm": 0.0,
    }
}


class PairStates(NamedTuple):
    """The states of chosen and rejected, and what the base gives for them."""

    states: Float[Tensor, "pair side hidden"]
    rewards: Float[Tensor, "pair side"]


def train_energy(
    base: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: EnergyConfig,
    *,
    output_dir: str | Path | None = None,
    report: LoadReport | None = None,
    evaluation: Evaluation | None = None,
    reference: tuple[Sequence[Prompt], Sequence[Completion]] | None = None,
) -> RewardModel:
    """Fit an energy over the base's rewards; return it as a new model.

    The states of all pairs are computed once and kept in memory, `2 * pairs * hidden * 4` bytes. At
    every evaluation the log has, on prompts kept from training, the accuracy of the base and of the
    mode, the share of completions whose mode moved, and the mean width.

    Args:
        base: A finished reward model with one scalar head. It is not changed; the new model stands
            on its very backbone, so do not train either on.
        preferences: Pairs; one whose longer side does not fit is left out, a long prompt loses its
            beginning; so is, but for the held-out prompts, a pair that the base orders wrongly.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        report: Receives the rows left out: those that do not fit, and the conflicts.
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        reference: (prompts, completions) of the reference policy, on which the reward's scale is
            measured; without them, the pairs' own completions serve.

    Raises:
        DataError: The base is no scalar model of ours, no pair fits `max_length`, or none is left
            beside the held-out prompts and the conflicts.
    """
    if not isinstance(base.head, ScalarHead):
        raise DataError(
            "EBRM starts from a reward model with one scalar head: train it with train_reward on "
            "RewardModel.from_backbone(..., members=0)."
        )
    training, held_out, counts = _pairs(base, preferences, config, report)
    states = training.states.flatten(0, 1)
    head = config.head(states.shape[1]).set_base(base.head.linear.weight[0].cpu(), states)
    count = len(states)
    batch_size = min(config.batch_size, count)
    per_epoch = math.ceil(count / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    loop = Loop(
        config, total_steps=total, modules={"head": head}, stage="energy", output_dir=output_dir
    )
    judged: dict[str, float] = {}
    head.train()
    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(count, config.seed, "energy", epoch)
        batch = order[at * batch_size : (at + 1) * batch_size]
        metrics = _accumulate(head, states[batch], step, loop, config)
        metrics |= {"grad_norm": loop.update(), "epoch": epoch + 1}
        every = config.evaluate_every
        if len(held_out.states) and (step == total or (every and step % every == 0)):
            judged = _judge(head, held_out)
            metrics |= judged
        loop.log(metrics, show=["loss", "mean_f"])
    model = _with_head(base, head)
    model.set_normalisation(*(reference or own_completions(preferences)))
    evaluated = evaluation(model) if evaluation else {}
    model.facts |= {"pairs": len(training.states), **evaluated}
    summary: dict[str, float] = {
        "steps": total,
        **counts,
        "reference/mean": model.reward_mean.mean().item(),
        "reference/std": model.reward_std.mean().item(),
        **judged,
        **evaluated,
    }
    loop.finish(summary, model.save_pretrained)
    return model


def _with_head(base: RewardModel, head: EnergyHead) -> RewardModel:
    model = RewardModel(base.backbone, head, base.tokenizer, max_length=base.max_length)
    model.facts = {k: v for k, v in base.facts.items() if k in ("base", "training data")}
    return model.to(base.device).eval()


def _accumulate(
    head: EnergyHead,
    states: Float[Tensor, "example hidden"],
    step: int,
    loop: Loop,
    config: EnergyConfig,
) -> dict[str, float]:
    """Add this process's part of a batch to the gradient; return the batch's numbers."""
    inputs, rewards = head.inputs(states.to(head.weight.device))
    # A function of seed and step, for the whole batch: whoever computes which part of it.
    generator = torch.Generator().manual_seed(seed_of(config.seed, "energy", "noise", step))
    candidates = nce_candidates(
        rewards.cpu(),
        stds=config.noise_stds,
        beta=config.beta,
        samples=config.noise_samples,
        generator=generator,
    ).to(rewards.device)
    log_noise = noise_log_density(candidates, rewards, stds=config.noise_stds)
    sums = [0.0, 0.0, 0.0]
    mine = torch.tensor(loop.share(range(len(states))), dtype=torch.long, device=rewards.device)
    for some in mine.split(max(1, _ENERGIES_AT_ONCE // (config.noise_samples + 1))):
        energies = head.network(inputs[some], candidates[some])
        losses = nce_loss(energies, log_noise[some], regularisation=config.regularisation)
        loop.backward(losses.sum() / len(states))
        with torch.no_grad():
            parts = (losses, energies.mean(1), energies.square().mean(1))
            sums = [total + part.sum().item() for total, part in zip(sums, parts, strict=True)]
    gathered = loop.gather([sums])
    loss, mean_f, square = (sum(column) / len(states) for column in zip(*gathered, strict=True))
    return {"loss": loss, "nce": loss - config.regularisation * square, "mean_f": mean_f}


# ---- examples ----------------------------------------------------------------------------------


def _pairs(
    base: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: EnergyConfig,
    report: LoadReport | None,
) -> tuple[PairStates, PairStates, dict[str, int]]:
    """Return the pairs that are learned from, those held out, and what became of all."""
    # The margin, which nothing here uses, carries the row's number.
    numbered = [replace(row, margin=float(i)) for i, row in enumerate(preferences)]
    pairs = BRMEConfig(target="stage1_score", max_length=config.max_length)
    examples = encode_examples(base, numbered, pairs, report)
    # A draw of its own: with the seed of an outer split, the prompts that it left would all train.
    split_seed = seed_of(config.seed, "energy", "held_out")
    kept, apart = split_by_prompt(examples, fraction=config.held_out, seed=split_seed)
    if not kept:
        raise DataError(
            f"All {len(examples)} pairs are held out: lower held_out, or give pairs of more "
            "prompts."
        )
    if config.held_out and not apart:
        logger.warning("No prompt fell into the held-out share: modes are not judged.")
    training, held_out = (_computed(base, side, config) for side in (kept, apart))
    agree = agreeing(training.rewards)
    if not bool(agree.any()):
        raise DataError(
            f"The base orders all {len(kept)} training pairs wrongly, so that none is left: train "
            "the base on such pairs first."
        )
    if report is not None:
        for example, agreed in zip(kept, agree.tolist(), strict=True):
            if not agreed:
                where = preferences[int(example.margin)].where
                report.add("conflict", where, "the base does not prefer the chosen side", kept=True)
    counts = {
        "pairs": int(agree.sum()),
        "conflicting_pairs": int((~agree).sum()),
        "held_out_pairs": len(apart),
        "overlong_pairs": len(preferences) - len(examples),
    }
    return PairStates(training.states[agree], training.rewards[agree]), held_out, counts


def agreeing(rewards: Float[Tensor, "pair side"]) -> Bool[Tensor, " pair"]:
    """Which pairs the conflict filter keeps: those whose chosen side has the higher reward."""
    return rewards[:, 0] > rewards[:, 1]


def _computed(base: RewardModel, examples: Sequence[Example], config: EnergyConfig) -> PairStates:
    assert isinstance(base.head, ScalarHead)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=config.bf16):
        states = pair_states(base, examples, max_tokens=config.max_batch_tokens)
    return PairStates(states, states @ base.head.linear.weight.detach()[0].float().cpu())


# ---- judging modes -----------------------------------------------------------------------------


@torch.no_grad()
def _judge(head: EnergyHead, held_out: PairStates) -> dict[str, float]:
    means, stds = head(held_out.states.flatten(0, 1).to(head.weight.device))
    assert stds is not None
    posterior = RewardPosterior(means.cpu(), stds.cpu())
    return held_out_metrics(posterior, held_out.rewards, base_std=head.base_std.item())


def held_out_metrics(
    posterior: RewardPosterior, base_rewards: Float[Tensor, "pair side"], *, base_std: float
) -> dict[str, float]:
    """What became of the base's rewards, on pairs kept from training; conflicts are among them.

    Args:
        posterior: Modes and widths, of chosen and rejected in turn.
        base_rewards: Of chosen and rejected.
        base_std: Of the base's rewards in training, the unit of `moved` and `width`.

    Returns:
        `held_out/` `accuracy_base` and `accuracy` (of the mode; ties count half), `moved` (share of
        completions whose mode is farther than .1 std from the base reward), `move` (mean distance),
        `width` (mean; both in stds) and `spearman` (rank correlation of the width of a pair's
        margin, taken as if its sides were independent, with `1 - sigmoid(margin)`).
    """
    assert posterior.stds is not None
    modes = posterior.means[:, 0].unflatten(0, (-1, 2))
    variances = posterior.stds[:, 0].square().unflatten(0, (-1, 2))
    margins = modes[:, 0] - modes[:, 1]
    moves = (modes - base_rewards).abs() / base_std
    return {
        "held_out/accuracy_base": _accuracy(base_rewards[:, 0] - base_rewards[:, 1]),
        "held_out/accuracy": _accuracy(margins),
        "held_out/moved": (moves > MOVED).float().mean().item(),
        "held_out/move": moves.mean().item(),
        "held_out/width": posterior.stds.mean().item() / base_std,
        "held_out/spearman": rank_correlation(variances.sum(1).sqrt(), 1 - torch.sigmoid(margins)),
    }


def _accuracy(margins: Float[Tensor, " pair"]) -> float:
    return ((margins.sign() + 1) / 2).mean().item()
