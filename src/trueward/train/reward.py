"""Reward-model training on preferences: Bradley-Terry, one scalar head or K Gaussian members."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.data.packing import Group, PackedBatch
from trueward.data.tokens import Tokens, start_token_id, tokenize, truncate_prompt
from trueward.losses.preference import bradley_terry_loss, centring_loss
from trueward.losses.uncertainty import bt_marginal_loss, bt_reparam_loss
from trueward.models.backbone import packed_batches
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.train.loop import Loop, LoopConfig, permutation, seed_of

Evaluation = Callable[[RewardModel], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(LoopConfig):
    """Options of `train_reward`."""

    learning_rate: float = 1e-5
    epochs: float = 1.0
    batch_size: int = 32  # pairs for each optimiser step
    max_length: int = 1024  # tokens of prompt and completion
    centring: float = 0.01  # coefficient of (r_chosen + r_rejected)^2; removes a free constant
    label_smoothing: float = 0.0  # in [0, 0.5)
    gaussian_loss: Literal["bt_marginal", "bt_reparam"] = "bt_marginal"  # for Gaussian heads
    auxiliary_learning_rate_scale: float = 10.0  # of an auxiliary module's own parameters
    # Of members without stds: each learns alone, or their mean reward does (UP-RLHF, Eq. 12).
    member_loss: Literal["each", "mean"] = "each"
    subset: float = 0.8  # share of the pairs that each member alone sees; 1 = all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.subset <= 1:
            raise ValueError(f"subset must lie in (0, 1], got {self.subset}.")


class Pair(NamedTuple):
    """One preference as ids: the prompt once, then chosen and rejected."""

    group: Group
    margin: float
    weight: float = 1.0


def train_reward(
    reward_model: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: RewardConfig,
    *,
    output_dir: str | Path | None = None,
    report: LoadReport | None = None,
    auxiliary: nn.Module | None = None,
    evaluation: Evaluation | None = None,
    reference: tuple[Sequence[Prompt], Sequence[Completion]] | None = None,
) -> RewardModel:
    """Train the head, and whatever of the backbone wants gradients, on preference pairs.

    A scalar head minimises `-log sigmoid(r_chosen - r_rejected - margin)`; Gaussian heads minimise
    `config.gaussian_loss`, each member on its own fixed subset of the pairs. Members without stds
    minimise the scalar head's loss, each on its own subset, or (`member_loss`) all of them together
    with the mean of their rewards, on all pairs. Each member's
    `centring * (r_chosen + r_rejected)^2` is added. A batch's loss is the mean of the losses of its
    pairs, weighted by the rows' `weight`; accuracies and margins are logged without weights.

    Args:
        reward_model: Trained in place.
        preferences: Pairs; one whose longer side does not fit is left out and counted in
            `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        report: Receives the rows that do not fit.
        auxiliary: A module trained beside the model and thrown away after; called as
            `auxiliary(reward_model, step)` it returns a loss to add and metrics to log
            (`refine.multiview.MultiView` is one).
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        reference: (prompts, completions) of the reference policy, on which members are put on
            one scale; without them, the training pairs' own completions serve.

    Raises:
        DataError: No pair fits `max_length`, or a row's weight is negative or not finite.
    """
    if reward_model.head is None:
        raise DataError(
            "This model keeps the head it was published with, which trueward does not train: "
            "start from its backbone with RewardModel.from_backbone."
        )
    if reward_model.has_stds and config.label_smoothing:
        raise ValueError("label_smoothing is for a scalar head: Gaussian heads have stds instead.")
    together = config.member_loss == "mean"
    if together and (reward_model.has_stds or reward_model.members == 1):
        raise ValueError("member_loss='mean' is for several members without stds: a LoRA ensemble.")
    _require_weights(preferences)
    pairs = encode_pairs(reward_model, preferences, config.max_length, report)
    seen = member_subsets(
        [p.group for p in pairs],
        reward_model.members,
        share=1.0 if together else config.subset,
        seed=config.seed,
    )
    weights = seen * torch.tensor([[pair.weight] for pair in pairs])
    batch_size = min(config.batch_size, len(pairs))
    per_epoch = math.ceil(len(pairs) / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    modules: dict[str, nn.Module] = {"reward_model": reward_model}
    if auxiliary is not None:
        modules["auxiliary"] = auxiliary
    loop = Loop(
        config,
        total_steps=total,
        modules=modules,
        stage="reward",
        output_dir=output_dir,
        learning_rate_scales={"auxiliary": config.auxiliary_learning_rate_scale},
        can_shard=reward_model.lora is None and auxiliary is None,
    )
    trained = loop.modules["reward_model"].train()
    assert isinstance(trained, RewardModel)
    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(len(pairs), config.seed, "reward", epoch)
        batch = order[at * batch_size : (at + 1) * batch_size]
        loss, margins, rewards = _accumulate(trained, pairs, batch, weights, loop, config)
        metrics: dict[str, float] = {}
        if auxiliary is not None:
            extra, metrics = auxiliary(reward_model, step)
            # Every process draws the same auxiliary batch; gradients are summed over them.
            loop.backward(extra / loop.accelerator.num_processes)
        norm = loop.update()
        loss = sum(loop.gather([loss]))
        margins, rewards = loop.gather(margins), loop.gather(rewards)
        metrics |= batch_metrics(loss, margins, rewards) | {"grad_norm": norm, "epoch": epoch + 1}
        loop.log(metrics, show=["loss", "accuracy"])
    reward_model.eval()
    reward_model.set_normalisation(*(reference or own_completions(preferences)))
    evaluated = evaluation(reward_model) if evaluation else {}
    reward_model.facts |= {"pairs": len(pairs), **evaluated}
    overlong = len(preferences) - len(pairs)
    summary: dict[str, float] = {"steps": total, "pairs": len(pairs), "overlong_pairs": overlong}
    summary |= {
        "reference/mean": reward_model.reward_mean.mean().item(),
        "reference/std": reward_model.reward_std.mean().item(),
        **evaluated,
    }
    loop.finish(summary, reward_model.save_pretrained)
    return reward_model


def _accumulate(
    reward_model: RewardModel,
    pairs: Sequence[Pair],
    batch: Sequence[int],
    weights: Float[Tensor, "pair member"],
    loop: Loop,
    config: RewardConfig,
) -> tuple[float, list[float], list[float]]:
    """Add this process's part of a batch to the gradient; return its loss, margins and rewards."""
    total = weights[list(batch)].double().sum().item() or 1.0  # 0 where all weights are
    mine = loop.share(batch)
    loss = 0.0
    margins: list[float] = []
    rewards: list[float] = []

    def packed(indices: Sequence[int]) -> list[tuple[list[int], PackedBatch]]:
        batches = packed_batches(
            reward_model.backbone,
            [pairs[i].group for i in indices],
            pad_id=reward_model.tokenizer.pad_token_id,
            max_tokens=max(1, config.max_batch_tokens // reward_model.copies),
            shared_prefix=reward_model.shares_prefixes,
        )
        return [([indices[i] for i in some], micro) for some, micro in batches]

    for (where, micro_batch), counts in loop.rounds(packed(mine), lambda: packed(batch[:1])):
        with loop.accelerator.autocast():
            posterior = reward_model(micro_batch)
        wanted = torch.tensor([pairs[i].margin for i in where], device=reward_model.device)
        losses = pair_losses(posterior, wanted, config)  # [pair, member]
        part = (losses * weights[where].to(losses.device)).sum() / total
        loop.backward(part * counts)
        if not counts:
            continue
        loss += part.item()
        means = posterior.means.detach().mean(1)
        margins += (means[0::2] - means[1::2]).tolist()
        rewards += means.tolist()
    return loss, margins, rewards


def batch_metrics(loss: float, margins: list[float], rewards: list[float]) -> dict[str, float]:
    """Return a batch's numbers under TRL's names; ties count half."""
    return {
        "loss": loss,
        "accuracy": sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(margins),
        "margin": sum(margins) / len(margins),
        "mean_reward": sum(rewards) / len(rewards),
        "min_reward": min(rewards),
        "max_reward": max(rewards),
    }


def pair_losses(posterior: RewardPosterior, margins: Tensor, config: RewardConfig) -> Tensor:
    """Return the loss of each pair under each member, `[pair, member]`.

    `posterior` holds chosen and rejected in turn, as packed pairs come out of the model. Members
    that learn by the mean of their rewards (UP-RLHF, https://arxiv.org/abs/2401.00243, Eq. 12) have
    one loss, given to each.
    """
    chosen, rejected = posterior.means[0::2], posterior.means[1::2]
    if posterior.stds is None:
        sides = chosen, rejected
        if config.member_loss == "mean":
            sides = chosen.mean(1, keepdim=True), rejected.mean(1, keepdim=True)
        losses = bradley_terry_loss(
            *sides,
            margin=margins[:, None].expand_as(sides[0]),
            label_smoothing=config.label_smoothing,
        )
    else:
        loss = GAUSSIAN_LOSSES[config.gaussian_loss]
        losses = loss(
            chosen - margins[:, None], posterior.stds[0::2], rejected, posterior.stds[1::2]
        )
    return losses + config.centring * centring_loss(chosen, rejected)


# What each Gaussian member learns from a pair; draws come from the step's own seed (see Loop).
GAUSSIAN_LOSSES = {"bt_marginal": bt_marginal_loss, "bt_reparam": bt_reparam_loss}


def member_subsets(
    pairs: Sequence[Group], members: int, *, share: float, seed: int
) -> Bool[Tensor, "pair member"]:
    """Return which pairs each member sees: a function of seed and pair, wherever the pair stands.

    A scalar model (one member) sees all. Every pair is seen by someone.
    """
    if members == 1 or share == 1:
        return torch.ones(len(pairs), members, dtype=torch.bool)
    rows = []
    for pair in pairs:
        key = seed_of(seed, "subsets", list(pair.prompt_ids), list(map(list, pair.completions)))
        draws = torch.rand(members, generator=torch.Generator().manual_seed(key))
        rows.append(draws <= draws.min().clamp_min(share))  # whoever drew lowest always sees it
    return torch.stack(rows)


def encode_pairs(
    reward_model: RewardModel,
    preferences: Sequence[PreferenceRow],
    max_length: int,
    report: LoadReport | None = None,
) -> list[Pair]:
    """Tokenise pairs; both sides keep the same part of the prompt, and all of their own text."""
    limit = min(max_length, reward_model.max_length)
    start = start_token_id(reward_model.tokenizer)
    pairs = []
    for row in preferences:
        prompt, chosen = tokenize(reward_model.tokenizer, row.prompt, row.chosen)
        rejected = tokenize(reward_model.tokenizer, row.prompt, row.rejected).completion_ids
        longer = max(chosen, rejected, key=len)
        fitting = truncate_prompt(Tokens(prompt, longer), limit, bos_token_id=start)
        if fitting is not None:
            group = Group(fitting.prompt_ids, [chosen, rejected])
            pairs.append(Pair(group, row.margin or 0.0, row.weight))
        elif report is not None:
            report.add("over-long", row.where, f"a side has {len(longer)} tokens of {limit}")
    if not pairs:
        raise DataError(f"No preference pair fits max_length={limit}: raise it.")
    return pairs


def require_unweighted(preferences: Sequence[PreferenceRow], trainer: str) -> None:
    """Refuse rows with a weight for a trainer that reads none, rather than forget it.

    Raises:
        DataError: Names the first such row, and the trainer.
    """
    for row in preferences:
        if row.weight != 1.0:
            raise DataError(
                f"{row.where or 'A row'} has weight={row.weight:g}, which {trainer} does not read: "
                "train a single head, heads, lora or warm on weighted rows, or balance the rows "
                "themselves (trueward audit --length balance)."
            )


def _require_weights(preferences: Sequence[PreferenceRow]) -> None:
    for row in preferences:
        if not (math.isfinite(row.weight) and row.weight >= 0):
            raise DataError(
                f"{row.where or 'A row'} has weight={row.weight}: it must be a finite number of at "
                "least 0."
            )
    if preferences and all(row.weight == 0 for row in preferences):
        raise DataError("Every row has weight=0, so that nothing can be learnt: raise some.")


def own_completions(
    preferences: Sequence[PreferenceRow], limit: int = 256
) -> tuple[list[Prompt], list[Completion]]:
    """Return prompts and completions of the first pairs, to measure members' scales on."""
    rows = preferences[:limit]
    return [r.prompt for r in rows for _ in "cr"], [c for r in rows for c in (r.chosen, r.rejected)]
