"""BRME's second stage: K Gaussian heads on the backbone of a finished single-head reward model.

Yan et al. 2024, "Reward-Robust RLHF in LLMs" (https://arxiv.org/abs/2409.15360; known to us from
secondary sources, and no code is public). Stage 1 is `train.reward.train_reward` with one scalar
head; here its backbone is copied, and K heads learn a mean and a std of the reward. What the paper
leaves open is a field of `BRMEConfig`.

Which settings can learn a std at all:

- `mse_reparam` and `bt_reparam` grow with the std whatever the error: stds fall to the floor.
- `gaussian_nll` learns the targets' noise about the mean. Stage 1's own score has none: it is a
  linear function of the states on which the heads stand, so that every member can learn it exactly
  and all members become stage 1. Ratings have noise.
- `bt_marginal` learns from the pairs that a member orders wrongly; it needs no ratings. It can tell
  a std in principle; where the noise was known it hardly did, and most stds ended at a clamp.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.data.packing import Group, PackedBatch
from trueward.data.rows import split_by_prompt
from trueward.losses.preference import centring_loss
from trueward.losses.uncertainty import (
    bt_marginal_loss,
    bt_reparam_loss,
    gaussian_nll_loss,
    mse_reparam_loss,
)
from trueward.models.backbone import packed_batches
from trueward.models.heads import LOG_STD_MAX, LOG_STD_MIN, GaussianHeads, ScalarHead
from trueward.models.reward_model import RewardModel, merged
from trueward.posterior import RewardPosterior
from trueward.train.loop import Loop, LoopConfig, permutation, seed_of
from trueward.train.reward import (
    Evaluation,
    Pair,
    batch_metrics,
    encode_pairs,
    member_subsets,
    own_completions,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BRMEConfig(LoopConfig):
    """Options of `train_brme`; `faithful` and `sound` are two that belong together.

    The paper gives K = 5, a backbone shared by all heads, a subset of the data for each member and
    "an MSE loss". It leaves open: the target of that loss; the parameterisation of the std (here
    its log, clamped by the head to [-5, 2]); whether the backbone is trained; rate, epochs and
    batch (here Coste et al.'s batch and epochs, https://arxiv.org/abs/2310.02743).
    """

    members: int = 5  # K heads
    loss: Literal["mse_reparam", "gaussian_nll", "bt_reparam", "bt_marginal"] = "mse_reparam"
    # Open in the paper. stage1_score and rating are numbers for both sides of a pair, standardised
    # over the training pairs; pair_prob is the comparison itself: a squared error of its
    # probability with mse_reparam, and what the Bradley-Terry losses learn from.
    target: Literal["stage1_score", "rating", "pair_prob"] = "stage1_score"
    rating_columns: tuple[str, str] = ("score_chosen", "score_rejected")  # further columns of a row
    subset: float = 0.8  # share of the pairs that each member sees; 1 = all. Open in the paper
    head_dropout: float = 0.0  # before the heads
    # The losses see no smaller std, so that none is pushed further down once it is there; the model
    # may give smaller ones, though never below exp(-5) = .0067, where the head clamps them. Ours.
    std_floor: float = math.exp(LOG_STD_MIN)
    freeze_backbone: bool = True  # True: states are computed once; False: it learns too. Open
    lora_rank: int = 0  # adapters on the frozen backbone; 0 = none
    centring: float = 0.01  # pair_prob: coefficient of (r_chosen + r_rejected)^2
    learning_rate: float = 1e-3  # for heads alone; take 1e-5 where the backbone learns
    epochs: float = 5.0
    batch_size: int = 32  # pairs for each optimiser step
    max_length: int = 1024  # tokens of prompt and completion
    held_out: float = 0.1  # share of the prompts kept from training, on which stds are judged
    evaluate_every: int = 50  # steps between judgements; 0 = only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}.")
        if not 0 < self.subset <= 1:
            raise ValueError(f"subset must lie in (0, 1], got {self.subset}.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}.")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout must lie in [0, 1), got {self.head_dropout}.")
        for name in ("lora_rank", "evaluate_every", "centring"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        lowest, highest = math.exp(LOG_STD_MIN), math.exp(LOG_STD_MAX)
        if not lowest <= self.std_floor < highest:
            raise ValueError(
                f"std_floor must lie in [{lowest:.6f}, {highest:.4f}), the range of the heads' "
                f"stds, got {self.std_floor}."
            )
        if self.lora_rank and not self.freeze_backbone:
            raise ValueError(
                "lora_rank puts adapters on a frozen backbone: leave freeze_backbone at True, or "
                "set lora_rank=0 to train the whole backbone."
            )
        known = PAIR_LOSSES if self.target == "pair_prob" else VALUE_LOSSES
        if self.loss not in known:
            raise ValueError(
                f"loss={self.loss} cannot learn from target={self.target}, which goes with "
                f"{' or '.join(known)}: the Bradley-Terry losses need target=pair_prob, "
                "gaussian_nll needs stage1_score or rating."
            )

    @classmethod
    def faithful(cls) -> "BRMEConfig":
        """The paper as told: an MSE on drawn rewards, here against stage 1's score.

        Stds fall to the floor, so that "the head with the lowest std" is picked by noise: a
        baseline, not a recommendation.
        """
        return cls(**PRESETS["faithful"])

    @classmethod
    def pairs(cls) -> "BRMEConfig":
        """The marginal likelihood of comparisons alone, for want of ratings.

        It can tell a std in principle, by the pairs that a member orders wrongly; measured
        on made-up noise of known size it hardly does, and most stds end at a clamp.
        """
        return cls(**PRESETS["pairs"])

    @classmethod
    def sound(cls) -> "BRMEConfig":
        """The likelihood on per-member subsets, of targets that have noise to be learned.

        Needs ratings (`rating_columns`); with comparisons alone, take `BRMEConfig.pairs()`.
        """
        return cls(**PRESETS["sound"])


# Which loss learns from what, by the presets' names.
PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {"loss": "mse_reparam", "target": "stage1_score"},
    "sound": {"loss": "gaussian_nll", "target": "rating"},
    "pairs": {"loss": "bt_marginal", "target": "pair_prob"},
}


class Example(NamedTuple):
    """One preference as ids, with what its two sides are worth where the rows say so."""

    prompt: Prompt
    group: Group  # the prompt once, then chosen and rejected
    margin: float
    ratings: tuple[float, float]  # of chosen and rejected; NaN unless they are the target


class Split(NamedTuple):
    """The training or the held-out pairs, with what was computed of them once."""

    examples: Sequence[Example]
    targets: Float[Tensor, "pair side"] | None  # None where the comparison itself is the target
    states: Float[Tensor, "pair side hidden"] | None  # None where the backbone learns


def train_brme(
    stage1: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: BRMEConfig,
    *,
    output_dir: str | Path | None = None,
    reference: tuple[Sequence[Prompt], Sequence[Completion]] | None = None,
    evaluation: Evaluation | None = None,
    report: LoadReport | None = None,
) -> RewardModel:
    """Train K Gaussian heads on a copy of stage 1's backbone; return them as a new model.

    Each member learns from its own fixed subset of the pairs, chosen by the pair's content. With a
    frozen backbone the last states of all pairs are computed once and kept in memory,
    `2 * pairs * hidden * 4` bytes. At every evaluation the log has, on prompts kept from training,
    each head's mean std and the rank correlation of its std with its error.

    Args:
        stage1: The nominal reward model, with one scalar head; it is not changed.
        preferences: Pairs; one whose longer side does not fit is left out and counted in
            `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        reference: (prompts, completions) of the reference policy, on which members are put on
            one scale; without them, the training pairs' own completions serve.
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        report: Receives the rows that do not fit.

    Raises:
        DataError: Stage 1 is no scalar model of ours, no pair fits `max_length`, a rating is
            missing, or the targets are all the same.
    """
    if not isinstance(stage1.head, ScalarHead):
        raise DataError(
            "BRME's second stage starts from a reward model with one scalar head: train it with "
            "train_reward on RewardModel.from_backbone(..., members=0)."
        )
    examples = encode_examples(stage1, preferences, config, report)
    # Its own draw: rows split before by the same seed and hash would all fall on one side.
    split_seed = seed_of(config.seed, "brme", "held_out")
    kept, apart = split_by_prompt(examples, fraction=config.held_out, seed=split_seed)
    if not kept:
        raise DataError(
            f"All {len(examples)} pairs are held out: lower held_out, or give pairs of more "
            "prompts."
        )
    if config.held_out and not apart:
        logger.warning("No prompt fell into the held-out share: stds are not judged.")
    if config.target == "stage1_score" and config.loss == "gaussian_nll":
        logger.warning(
            "Stage 1's score has no noise: every member can learn it exactly, and its std says "
            "only how far the training got. Use ratings, or loss=bt_marginal with "
            "target=pair_prob."
        )
    seen = member_subsets(
        [e.group for e in kept], config.members, share=config.subset, seed=config.seed
    )  # [pair, member]
    model = with_gaussian_heads(stage1, config)
    batch_size = min(config.batch_size, len(kept))
    per_epoch = math.ceil(len(kept) / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    loop = Loop(
        config,
        total_steps=total,
        modules={"reward_model": model},
        stage="brme",
        output_dir=output_dir,
    )
    training, held_out = _splits(stage1, model, (kept, apart), loop, config)
    judged: dict[str, float] = {}
    model.train()
    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(len(kept), config.seed, "brme", epoch)
        batch = order[at * batch_size : (at + 1) * batch_size]
        loss, margins, rewards = _accumulate(model, training, batch, seen, loop, config)
        norm = loop.update()
        loss = sum(loop.gather([loss]))
        margins, rewards = loop.gather(margins), loop.gather(rewards)
        metrics = batch_metrics(loss, margins, rewards) | {"grad_norm": norm, "epoch": epoch + 1}
        every = config.evaluate_every
        if apart and (step == total or (every and step % every == 0)):
            judged = _judge(model, held_out, loop, config)
            metrics |= judged
        loop.log(metrics, show=["loss", "accuracy"])
    model.eval()
    model.set_normalisation(*(reference or own_completions(preferences)))
    evaluated = evaluation(model) if evaluation else {}
    model.facts |= {"pairs": len(kept), **evaluated}
    summary: dict[str, float] = {
        "steps": total,
        "pairs": len(kept),
        "held_out_pairs": len(apart),
        "overlong_pairs": len(preferences) - len(examples),
        "reference/mean": model.reward_mean.mean().item(),
        "reference/std": model.reward_std.mean().item(),
        **judged,
        **evaluated,
    }
    loop.finish(summary, model.save_pretrained)
    return model


# ---- the model ---------------------------------------------------------------------------------


def with_gaussian_heads(stage1: RewardModel, config: BRMEConfig) -> RewardModel:
    """Return a model with fresh Gaussian heads on a copy of stage 1's backbone.

    Stage 1's adapters, if it has any, are merged first. The heads depend on the seed alone.
    """
    width = stage1.backbone.config.get_text_config().hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = GaussianHeads(width, config.members, dropout=config.head_dropout)
    backbone = copy.deepcopy(merged(stage1.backbone))
    backbone.requires_grad_(not config.freeze_backbone)
    model = RewardModel(backbone, head, stage1.tokenizer, max_length=stage1.max_length)
    model.facts = {k: v for k, v in stage1.facts.items() if k in ("base", "training data")}
    if config.lora_rank:
        model.add_lora(config.lora_rank, seed=config.seed)
    return model.to(stage1.device)


@torch.no_grad()
def pair_states(
    model: RewardModel, examples: Sequence[Example | Pair], *, max_tokens: int
) -> Float[Tensor, "pair side hidden"]:
    """Return the last states of chosen and rejected, in float32 on the CPU."""
    width = model.backbone.config.get_text_config().hidden_size
    states = torch.zeros(len(examples), 2, width)
    was_training = model.training
    model.eval()
    for some, packed in _packed(model, [e.group for e in examples], max_tokens=max_tokens):
        states[some] = model.hidden(packed).float().cpu().unflatten(0, (-1, 2))
    model.train(was_training)
    return states


def _packed(
    model: RewardModel, groups: Sequence[Group], *, max_tokens: int
) -> Iterator[tuple[list[int], PackedBatch]]:
    return packed_batches(
        model.backbone,
        groups,
        pad_id=model.tokenizer.pad_token_id,
        max_tokens=max_tokens,
        shared_prefix=model.shares_prefixes,
    )


def _posteriors(
    model: RewardModel, split: Split, wanted: Sequence[int], loop: Loop
) -> Iterator[tuple[list[int], RewardPosterior]]:
    """Yield the posterior of the wanted pairs, part by part: chosen and rejected in turn."""
    assert isinstance(model.head, GaussianHeads)
    if split.states is not None:
        if wanted:  # a process may have no share of a short batch
            flat = split.states[list(wanted)].flatten(0, 1).to(model.device)
            yield list(wanted), RewardPosterior(*model.head(flat))
        return
    groups = [split.examples[i].group for i in wanted]
    for some, packed in _packed(model, groups, max_tokens=loop.config.max_batch_tokens):
        with loop.accelerator.autocast():
            posterior = model(packed)
        yield [wanted[i] for i in some], posterior


def _accumulate(
    model: RewardModel,
    training: Split,
    batch: Sequence[int],
    seen: Bool[Tensor, "pair member"],
    loop: Loop,
    config: BRMEConfig,
) -> tuple[float, list[float], list[float]]:
    """Add this process's part of a batch to the gradient; return its loss, margins and rewards."""
    weight = seen[list(batch)].sum().clamp_min(1).item()
    loss = 0.0
    margins: list[float] = []
    rewards: list[float] = []
    for some, posterior in _posteriors(model, training, loop.share(batch), loop):
        targets = training.targets[some].to(model.device) if training.targets is not None else None
        wanted = torch.tensor([training.examples[i].margin for i in some], device=model.device)
        losses = example_losses(posterior, targets, wanted, config)  # [pair, member]
        part = (losses * seen[some].to(losses.device)).sum() / weight
        loop.backward(part)
        loss += part.item()
        means = posterior.means.detach().mean(1)
        margins += (means[0::2] - means[1::2]).tolist()
        rewards += means.tolist()
    return loss, margins, rewards


# ---- targets -----------------------------------------------------------------------------------


def encode_examples(
    model: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: BRMEConfig,
    report: LoadReport | None = None,
) -> list[Example]:
    """Tokenise the pairs that fit, and read their ratings where these are the target."""
    # encode_pairs does not say which rows it leaves out: the margin carries the row's number.
    numbered = [replace(row, margin=float(i)) for i, row in enumerate(preferences)]
    examples = []
    for pair in encode_pairs(model, numbered, config.max_length, report):
        row = preferences[int(pair.margin)]
        ratings = (math.nan, math.nan)
        if config.target == "rating":
            chosen, rejected = config.rating_columns
            ratings = (_rating(row, chosen), _rating(row, rejected))
        examples.append(Example(row.prompt, pair.group, row.margin or 0.0, ratings))
    return examples


def require_ratings(preferences: Sequence[PreferenceRow], config: BRMEConfig) -> None:
    """Refuse rows that lack the ratings which the configuration learns from.

    Raises:
        DataError: Names the first such row and its column.
    """
    if config.target == "rating":
        for row in preferences:
            for column in config.rating_columns:
                _rating(row, column)


def _rating(row: PreferenceRow, column: str) -> float:
    value = row.extra.get(column)
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise DataError(
            f"{row.where or 'A row'}: target=rating needs a number in the column {column!r}, got "
            f"{str(value)[:40]!r}: name the columns in rating_columns, or use loss=bt_marginal "
            "with target=pair_prob, which needs no ratings."
        )
    return float(value)  # type: ignore[arg-type]


def _splits(
    stage1: RewardModel,
    model: RewardModel,
    sides: tuple[Sequence[Example], Sequence[Example]],
    loop: Loop,
    config: BRMEConfig,
) -> tuple[Split, Split]:
    """Compute states and targets of the training and the held-out pairs, before any step.

    Every process computes all of them, so that none has to wait for another's share later.
    """
    cached = config.freeze_backbone and not config.lora_rank
    states: list[Tensor] = []
    if cached or config.target == "stage1_score":
        with loop.accelerator.autocast():  # the model's backbone is still stage 1's
            states = [pair_states(model, s, max_tokens=config.max_batch_tokens) for s in sides]
    targets: list[Tensor] = []
    if config.target == "rating":
        targets = [torch.tensor([e.ratings for e in side]).view(-1, 2) for side in sides]
    elif config.target == "stage1_score":
        assert isinstance(stage1.head, ScalarHead)
        with torch.no_grad():
            head = stage1.head
            targets = [head(s.to(head.linear.weight.device)).means[..., 0].cpu() for s in states]
    if targets:
        targets = _standardised(targets, config.target)
    training, held_out = (
        Split(side, targets[i] if targets else None, states[i] if cached else None)
        for i, side in enumerate(sides)
    )
    return training, held_out


def _standardised(targets: Sequence[Tensor], name: str) -> list[Tensor]:
    """Return the targets in units of the training pairs' std, from their mean."""
    mean, std = targets[0].mean(), targets[0].std(correction=0)
    if not std > 1e-6 * (1 + mean.abs()):
        raise DataError(
            f"The targets ({name}) of all {len(targets[0])} training pairs are the same, "
            f"{mean.item():.4g}: there is nothing to learn from them."
        )
    return [(t - mean) / std for t in targets]


# ---- losses ------------------------------------------------------------------------------------


def brier_reparam_loss(
    chosen_means: Float[Tensor, "batch member"],
    chosen_stds: Float[Tensor, "batch member"],
    rejected_means: Float[Tensor, "batch member"],
    rejected_stds: Float[Tensor, "batch member"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch member"]:
    """Squared error of the probability that one draw gives to the comparison.

    `(sigmoid(r_w - r_l) - y)^2` with `r = mean + std * z`, `z ~ N(0, 1)`, and `y = 1`, because
    `chosen` is the preferred side: one reading of the MSE in Yan et al. 2024, stage 2
    (https://arxiv.org/abs/2409.15360).

    Args:
        chosen_means: Each member's reward of the preferred completions.
        chosen_stds: Their standard deviations.
        rejected_means: Each member's reward of the others.
        rejected_stds: Their standard deviations.
        generator: Source of `z`.
    """
    chosen = RewardPosterior(chosen_means, chosen_stds).rsample(generator)
    rejected = RewardPosterior(rejected_means, rejected_stds).rsample(generator)
    return (torch.sigmoid(chosen - rejected) - 1).square()


# Losses on a number for each side, and on the pair; draws come from the step's own seed (see Loop).
VALUE_LOSSES = {"mse_reparam": mse_reparam_loss, "gaussian_nll": gaussian_nll_loss}
PAIR_LOSSES = {
    "mse_reparam": brier_reparam_loss,
    "bt_reparam": bt_reparam_loss,
    "bt_marginal": bt_marginal_loss,
}


def example_losses(
    posterior: RewardPosterior,
    targets: Float[Tensor, "pair side"] | None,
    margins: Float[Tensor, " pair"],
    config: BRMEConfig,
) -> Float[Tensor, "pair member"]:
    """Return the loss of each pair under each member: the mean of its sides, or that of the pair.

    Args:
        posterior: Chosen and rejected in turn.
        targets: Of chosen and rejected; None where the comparison itself is the target.
        margins: By how much chosen should win; only where the comparison is the target.
        config: Options.
    """
    assert posterior.stds is not None
    means, stds = posterior.means, posterior.stds.clamp_min(config.std_floor)
    if targets is not None:
        sides = VALUE_LOSSES[config.loss](means, stds, targets.flatten())
        return sides.unflatten(0, (-1, 2)).mean(1)
    chosen, rejected = means[0::2], means[1::2]
    losses = PAIR_LOSSES[config.loss](chosen - margins[:, None], stds[0::2], rejected, stds[1::2])
    return losses + config.centring * centring_loss(chosen, rejected)


# ---- judging stds ------------------------------------------------------------------------------


@torch.no_grad()
def _judge(model: RewardModel, held_out: Split, loop: Loop, config: BRMEConfig) -> dict[str, float]:
    model.eval()
    means = torch.zeros(len(held_out.examples), 2, config.members)
    stds = torch.zeros_like(means)
    for some, part in _posteriors(model, held_out, range(len(held_out.examples)), loop):
        assert part.stds is not None
        means[some] = part.means.float().cpu().unflatten(0, (-1, 2))
        stds[some] = part.stds.float().cpu().unflatten(0, (-1, 2))
    model.train()
    posterior = RewardPosterior(means.flatten(0, 1), stds.flatten(0, 1))
    return held_out_metrics(posterior, held_out.targets, std_floor=config.std_floor)


def held_out_metrics(
    posterior: RewardPosterior,
    targets: Float[Tensor, "pair side"] | None,
    *,
    std_floor: float = math.exp(LOG_STD_MIN),
) -> dict[str, float]:
    """Do stds say where a member errs? Numbers on pairs kept from training.

    The error is `|mean - target|`, set against the member's std; where the comparison is the
    target, `1 - sigmoid(mean_w - mean_l)`, set against the std of the pair's margin.

    Args:
        posterior: Chosen and rejected in turn.
        targets: Of chosen and rejected; None where the comparison itself is the target.
        std_floor: Stds at or below it count as collapsed.

    Returns:
        `held_out/` `error` (mean), `std_k` (the k-th member's mean std), `std`, `spearman_k` (rank
        correlation of std and error; 0 where all stds are equal), `spearman`, `at_floor` (share of
        stds) and `accuracy` (of the members' mean; ties count half).
    """
    assert posterior.stds is not None
    means, stds = posterior.means, posterior.stds
    if targets is not None:
        errors, spreads = (means - targets.flatten()[:, None]).abs(), stds
    else:
        errors = 1 - torch.sigmoid(means[0::2] - means[1::2])
        spreads = (stds[0::2].square() + stds[1::2].square()).sqrt()
    correlations = [rank_correlation(s, e) for s, e in zip(spreads.T, errors.T, strict=True)]
    margins = posterior.mean[0::2] - posterior.mean[1::2]
    metrics = {
        "held_out/error": errors.mean().item(),
        "held_out/std": stds.mean().item(),
        "held_out/spearman": sum(correlations) / len(correlations),
        "held_out/at_floor": (stds <= 1.001 * std_floor).float().mean().item(),
        "held_out/accuracy": ((margins.sign() + 1) / 2).mean().item(),
    }
    for k, correlation in enumerate(correlations):
        metrics[f"held_out/std_{k}"] = stds[:, k].mean().item()
        metrics[f"held_out/spearman_{k}"] = correlation
    return metrics


def rank_correlation(x: Float[Tensor, " batch"], y: Float[Tensor, " batch"]) -> float:
    """Spearman's rank correlation, with mean ranks for ties; 0 where x or y is constant."""
    ranks = []
    for values in (x, y):
        _, where, counts = torch.unique(values, return_inverse=True, return_counts=True)
        mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
        ranks.append(mean_rank[where] - (len(values) + 1) / 2)
    scale = float((ranks[0].square().sum() * ranks[1].square().sum()).sqrt())
    return float((ranks[0] * ranks[1]).sum()) / scale if scale > 0 else 0.0
