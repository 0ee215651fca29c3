"""URM: Gaussian heads that learn people's ratings of attributes, then gates that weigh them.

Lou et al. 2024, "Uncertainty-aware Reward Model" (https://arxiv.org/abs/2410.00847; known to us
from the model cards and secondary sources). Stage 1, `train_attributes`, gives each attribute of an
answer a mean and a std; stage 2, `train_gating`, freezes these and learns from comparisons how to
weigh them. Several URMs of different seeds are the paper's ensemble URME: hand a list of them to
whatever takes a reward.

Ratings by people, such as HelpSteer2's, are what the method is made for. Where there are
comparisons only, `rated_by_text` rates answers by what can be counted in their text (length,
variety, repetition, ...). These are no judgements of quality: they stand in for people's ratings so
that the machinery can be run and compared, and what a gate makes of them is a model of style.
"""

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.data.packing import (
    PackedBatch,
    group_by_prompt,
)
from trueward.data.rows import split_by_prompt, text_of
from trueward.data.tokens import Tokens, start_token_id, tokenize, truncate_prompt
from trueward.losses.preference import bradley_terry_loss, centring_loss
from trueward.losses.uncertainty import gaussian_nll_loss, mse_reparam_loss
from trueward.models.attribute_heads import AttributeHeads, weighted_mean
from trueward.models.backbone import packed_batches, row_room
from trueward.models.reward_function import Reward, fitting_rows, posterior_function
from trueward.models.reward_model import RewardModel, merged
from trueward.train.brme import BRMEConfig, Example, encode_examples, pair_states, rank_correlation
from trueward.train.loop import Loop, LoopConfig, permutation, seed_of
from trueward.train.reward import Evaluation, batch_metrics, own_completions

logger = logging.getLogger(__name__)

Reference = tuple[Sequence[Prompt], Sequence[Completion]]


# ---- configuration -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(LoopConfig):
    """Options of `train_attributes`.

    The paper trains the whole backbone with the heads for one epoch of HelpSteer2, at a rate of
    2e-6, a weight decay of 1e-3 and 64 answers a batch (secondary source).
    """

    # mle is the likelihood of the ratings. mse is the squared error of drawn scores
    # `mu + z exp(log s)`, whose expectation is `(mu - rating)^2 + s^2`: every std falls to the
    # floor, whatever the ratings' noise. The paper prefers mse for accuracy and mle for
    # uncertainty, so mse is for a comparison with its numbers only.
    loss: Literal["mle", "mse"] = "mle"
    attributes: tuple[str, ...] = ()  # which of the rows' ratings, in order; empty: all of them
    standardise: bool = True  # learn each attribute in units of its std over the training rows
    freeze_backbone: bool = True  # True: states are computed once; False: it learns too
    learning_rate: float = 1e-3  # for heads alone; take 2e-6 where the backbone learns
    epochs: float = 5.0
    batch_size: int = 64  # answers for each optimiser step
    max_length: int = 1024  # tokens of prompt and completion
    held_out: float = 0.1  # share of the prompts kept from training, on which stds are judged
    evaluate_every: int = 50  # steps between judgements; 0 = only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_judging(self.held_out, self.evaluate_every)
        if self.loss not in RATING_LOSSES:
            raise ValueError(f"loss must be {' or '.join(RATING_LOSSES)}, got {self.loss!r}.")


@dataclass(frozen=True, kw_only=True)
class GatingConfig(LoopConfig):
    """Options of `train_gating`.

    The paper takes 4000 steps of 256 pairs on 80K pairs, about 13 epochs, and gives no rate
    (secondary source).
    """

    softmax: bool = False  # gates that are positive and sum to 1; published ones do not
    gate_width: int = 0  # of the gating network's two hidden layers; 0 = the states' width
    centring: float = 0.01  # coefficient of (r_chosen + r_rejected)^2; removes a free constant
    learning_rate: float = 1e-3
    epochs: float = 5.0
    batch_size: int = 256  # pairs for each optimiser step
    max_length: int = 1024  # tokens of prompt and completion
    held_out: float = 0.1  # share of the prompts kept from training, on which gates are judged
    evaluate_every: int = 50  # steps between judgements; 0 = only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_judging(self.held_out, self.evaluate_every)
        for name in ("gate_width", "centring"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")


def _check_judging(held_out: float, evaluate_every: int) -> None:
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}.")
    if evaluate_every < 0:
        raise ValueError(f"evaluate_every must be at least 0, got {evaluate_every}.")


# ---- rated rows --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatedRow:
    """An answer with ratings of its attributes; one that is absent or NaN was not rated."""

    prompt: Prompt
    completion: Completion
    ratings: Mapping[str, float] = field(default_factory=dict)
    where: str = ""


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LIST_ITEM = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+\S", re.MULTILINE)


def text_attributes(prompt: Prompt, completion: Completion) -> dict[str, float]:
    """Measure an answer's text: a stand-in for people's ratings, not a judgement of quality.

    Words are runs of letters and digits, so the numbers mean little in languages that do not part
    words by spaces.

    Returns:
        `log_words` (log(1 + words)), `distinct_words` (different words by words), `word_letters`
        (mean letters a word), `repeated_trigrams` (share of three-word runs that occurred before),
        `lines_per_100_words` and `list_items_per_100_words`, `prompt_words` (share of the prompt's
        words of four letters or more that recur; NaN where it has none).
    """
    text = text_of(completion)
    words = _WORD.findall(text.lower())
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    asked = {word for word in _WORD.findall(text_of(prompt).lower()) if len(word) > 3}
    lines = sum(bool(line.strip()) for line in text.splitlines())
    count = max(1, len(words))
    return {
        "log_words": math.log1p(len(words)),
        "distinct_words": len(set(words)) / count,
        "word_letters": sum(map(len, words)) / count,
        "repeated_trigrams": 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0,
        "lines_per_100_words": 100 * lines / count,
        "list_items_per_100_words": 100 * len(_LIST_ITEM.findall(text)) / count,
        "prompt_words": len(asked & set(words)) / len(asked) if asked else math.nan,
    }


def rated_by_text(
    preferences: Sequence[PreferenceRow], extra: Mapping[str, Reward] | None = None
) -> list[RatedRow]:
    """Rate both sides of every pair by their text, where nobody rated them.

    Each attribute is standardised over all the rows returned; one that is the same for all is left
    out, with a warning. Nothing counted has noise: the std learned from it is what the head cannot
    read off the state. Stage 1's score as an extra attribute, on stage 1's own frozen backbone, can
    be read off exactly, so that its std falls to the floor.

    Args:
        preferences: Pairs; which side was chosen is not used.
        extra: Further attributes by name, each the mean reward of a reward model (stage 1's score,
            say), of several, or of a function of prompts and completions. A pair that does not
            fit a model's context is not rated by it.

    Returns:
        Chosen and rejected in turn.
    """
    prompts, completions = own_completions(preferences, limit=len(preferences))
    pairs = zip(prompts, completions, strict=True)
    columns = _transposed([text_attributes(prompt, completion) for prompt, completion in pairs])
    for name, reward in (extra or {}).items():
        if name in columns:
            raise ValueError(f"{name!r} is an attribute of the text: name the extra one otherwise.")
        columns[name] = _rewards(reward, preferences)
    for name, values in list(columns.items()):
        made = _standardised(values)
        if made is None:
            logger.warning("The attribute %s is the same for all answers, and is left out.", name)
            del columns[name]
        else:
            columns[name] = made
    sides = [f"{row.where}, {side}".lstrip(", ") for row in preferences for side in _SIDES]
    return [
        RatedRow(
            prompt, completion, {name: column[i].item() for name, column in columns.items()}, w
        )
        for i, (prompt, completion, w) in enumerate(zip(prompts, completions, sides, strict=True))
    ]


_SIDES = ("chosen", "rejected")


def _transposed(rows: Sequence[dict[str, float]]) -> dict[str, Tensor]:
    names = rows[0] if rows else {}
    return {name: torch.tensor([row[name] for row in rows]) for name in names}


def _rewards(reward: Reward, preferences: Sequence[PreferenceRow]) -> Float[Tensor, " row"]:
    """Return the mean reward of both sides of each pair, NaN where the pair does not fit."""
    fitting = {id(row) for row in fitting_rows(reward, preferences)}
    rewards = torch.full((len(preferences), 2), math.nan)
    kept = [i for i, row in enumerate(preferences) if id(row) in fitting]
    sides = own_completions([preferences[i] for i in kept], limit=len(kept))
    rewards[kept] = posterior_function(reward)(*sides).mean.float().cpu().view(-1, 2)
    return rewards.flatten()


def _standardised(values: Float[Tensor, " row"]) -> Float[Tensor, " row"] | None:
    """Return values in units of their std, from their mean; None where they do not vary."""
    mean, std = _mean_and_std(values)
    return (values - mean) / std if std > 1e-6 * (1 + abs(mean)) else None


def _mean_and_std(values: Float[Tensor, " row"]) -> tuple[float, float]:
    """Return mean and std (ddof 0) of the values that are not NaN; zeros where all are."""
    known = values[values.isfinite()].double()
    if not len(known):
        return 0.0, 0.0
    return known.mean().item(), known.std(correction=0).item()


# ---- stage 1 -----------------------------------------------------------------------------------


class Rated(NamedTuple):
    """One answer as ids, with its ratings in the order of the attributes (NaN: not rated)."""

    prompt: Prompt
    tokens: Tokens
    ratings: tuple[float, ...]


class Split(NamedTuple):
    """The training or the held-out answers, with what was computed of them once."""

    examples: Sequence[Rated]
    ratings: Float[Tensor, "row attribute"]
    states: Float[Tensor, "row hidden"] | None  # None where the backbone learns


def train_attributes(
    base: RewardModel,
    rated_rows: Sequence[RatedRow],
    config: AttributeConfig,
    *,
    output_dir: str | Path | None = None,
    reference: Reference | None = None,
    evaluation: Evaluation | None = None,
    report: LoadReport | None = None,
) -> RewardModel:
    """Learn a mean and a std of each attribute's rating on a copy of the backbone (stage 1).

    The model returned weighs the attributes equally until `train_gating`; with `standardise` they
    are in units of the training rows, whose means and stds stand in the model's facts.

    Args:
        base: A fresh model on a backbone, or one that has learned from comparisons, as in the
            paper; its head is not used, and it is not changed.
        rated_rows: Answers; one that does not fit or has no rating is left out and counted in
            `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        reference: (prompts, completions) of the reference policy, on which the reward's scale is
            measured; without them, the rated answers themselves serve.
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        report: Receives the rows that are left out.

    Raises:
        DataError: A rating is no number, an attribute has none or all the same, or nothing fits.
    """
    if base.head is None:
        raise DataError(
            "This model keeps the head it was published with, so its states cannot be read: start "
            "from its backbone with RewardModel.from_backbone."
        )
    names = config.attributes or attribute_names(rated_rows)
    examples = encode_rated(base, rated_rows, names, config.max_length, report)
    split_seed = seed_of(config.seed, "attributes", "held_out")  # its own draw, as in train_brme
    kept, apart = split_by_prompt(examples, fraction=config.held_out, seed=split_seed)
    _check_split(kept, apart, examples, config.held_out, "answers")
    sides, scale = _targets((kept, apart), names, standardise=config.standardise)
    model = with_attribute_heads(base, names, config)
    assert isinstance(model.head, AttributeHeads)
    modules: dict[str, nn.Module] = {"attributes": model.head.linear}  # gates stay as they are
    if not config.freeze_backbone:
        modules["backbone"] = model.backbone
    batch_size = min(config.batch_size, len(kept))
    per_epoch = math.ceil(len(kept) / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    loop = Loop(
        config, total_steps=total, modules=modules, stage="attributes", output_dir=output_dir
    )
    model.to(loop.accelerator.device)
    states: list[Tensor | None] = [None, None]
    if config.freeze_backbone:
        with loop.accelerator.autocast():
            states = [
                completion_states(
                    model, [e.tokens for e in side], max_tokens=config.max_batch_tokens
                )
                for side in (kept, apart)
            ]
    training, held_out = (
        Split(side, ratings, some)
        for side, ratings, some in zip((kept, apart), sides, states, strict=True)
    )
    judged: dict[str, float] = {}
    model.train()
    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(len(kept), config.seed, "attributes", epoch)
        batch = order[at * batch_size : (at + 1) * batch_size]
        sums = _accumulate(model, training, batch, loop, config)
        norm = loop.update()
        gathered = loop.gather([sums])
        loss, error, std = (sum(part[i] for part in gathered) for i in range(3))
        metrics = {"loss": loss, "error": error, "std": std, "grad_norm": norm, "epoch": epoch + 1}
        if apart and _judges(step, total, config.evaluate_every):
            judged = _judge_attributes(model, held_out, loop)
            metrics |= judged
        loop.log(metrics, show=["loss", "error", "std"])
    model.facts |= {"rated answers": len(kept), "attributes": ", ".join(names), **scale}
    summary: dict[str, int | float] = {
        "steps": total,
        "rows": len(kept),
        "held_out_rows": len(apart),
        "unused_rows": len(rated_rows) - len(examples),
        **judged,
    }
    own = [r.prompt for r in rated_rows[:512]], [r.completion for r in rated_rows[:512]]
    return _finished(model, summary, loop, reference or own, evaluation)


def attribute_names(rated_rows: Sequence[RatedRow]) -> tuple[str, ...]:
    """Return the attributes that the rows rate, in order of first appearance."""
    return tuple({name: None for row in rated_rows for name in row.ratings})


def encode_rated(
    model: RewardModel,
    rated_rows: Sequence[RatedRow],
    names: Sequence[str],
    max_length: int,
    report: LoadReport | None = None,
) -> list[Rated]:
    """Tokenise the answers that fit and have a rating; prompts are cut from the left.

    Raises:
        DataError: A rating is no number, or no answer can be used.
    """
    limit = min(max_length, model.max_length)
    start = start_token_id(model.tokenizer)
    examples = []
    for row in rated_rows:
        ratings = tuple(_rating(row, name) for name in names)
        tokens = tokenize(model.tokenizer, row.prompt, row.completion)
        fitting = truncate_prompt(tokens, limit, bos_token_id=start)
        if all(map(math.isnan, ratings)):
            if report is not None:
                report.add("unrated", row.where, "none of the attributes is rated")
        elif fitting is not None:
            examples.append(Rated(row.prompt, fitting, ratings))
        elif report is not None:
            length = len(tokens.completion_ids)
            report.add("over-long", row.where, f"the answer has {length} tokens of {limit}")
    if not examples:
        raise DataError(
            f"None of {len(rated_rows)} answers can be used: they need a rating of "
            f"{', '.join(names) or 'some attribute'}, and to fit max_length={limit}."
        )
    return examples


def _rating(row: RatedRow, name: str) -> float:
    value = row.ratings.get(name, math.nan)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise DataError(
            f"{row.where or 'A row'}: the rating {name!r} must be a finite number (NaN or absent "
            f"where nobody rated), got {str(value)[:40]!r}."
        )
    return float(value)


def with_attribute_heads(
    base: RewardModel, names: Sequence[str], config: AttributeConfig
) -> RewardModel:
    """Return a model with fresh attribute heads on a copy of the backbone.

    The base's adapters, if it has any, are merged first. The heads depend on the seed alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = AttributeHeads(_width(base), names)
    backbone = copy.deepcopy(merged(base.backbone))
    backbone.requires_grad_(not config.freeze_backbone)
    model = RewardModel(backbone, head, base.tokenizer, max_length=base.max_length)
    model.facts = {k: v for k, v in base.facts.items() if k in ("base", "training data")}
    return model.to(base.device)


def _width(model: RewardModel) -> int:
    width: int = model.backbone.config.get_text_config().hidden_size
    return width


def _targets(
    sides: Sequence[Sequence[Rated]], names: Sequence[str], *, standardise: bool
) -> tuple[list[Float[Tensor, "row attribute"]], dict[str, dict[str, float]]]:
    """Return ratings in units of the training rows' stds, and those means and stds by name."""
    raw = [torch.tensor([e.ratings for e in side]).view(-1, len(names)) for side in sides]
    moments = [_mean_and_std(column) for column in raw[0].T]
    for name, (mean, std) in zip(names, moments, strict=True):
        if not std > 1e-6 * (1 + abs(mean)):
            raise DataError(
                f"The training rows' ratings of {name!r} are all the same or absent: there is "
                "nothing to learn from them; leave it out of `attributes`."
            )
    if not standardise:
        return raw, {}
    means, stds = torch.tensor(moments).T
    scale = {
        "rating means": dict(zip(names, means.tolist(), strict=True)),
        "rating stds": dict(zip(names, stds.tolist(), strict=True)),
    }
    return [(ratings - means) / stds for ratings in raw], scale


@torch.no_grad()
def completion_states(
    model: RewardModel, tokens: Sequence[Tokens], *, max_tokens: int
) -> Float[Tensor, "completion hidden"]:
    """Return the last state of each completion, in float32 on the CPU."""
    states = torch.zeros(len(tokens), _width(model))
    was_training = model.training
    model.eval()
    for some, packed in _packed(model, tokens, max_tokens=max_tokens):
        states[some] = model.hidden(packed).float().cpu()
    model.train(was_training)
    return states


def _packed(
    model: RewardModel, tokens: Sequence[Tokens], *, max_tokens: int
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yield batches of at most `max_tokens` padded tokens, with their completions' indices."""
    share = model.shares_prefixes
    groups, members = group_by_prompt(
        [t.prompt_ids for t in tokens],
        [t.completion_ids for t in tokens],
        max_tokens=row_room(model.backbone, max_tokens=max_tokens, shared_prefix=share),
    )
    pad_id = model.tokenizer.pad_token_id
    for some, packed in packed_batches(
        model.backbone, groups, pad_id=pad_id, max_tokens=max_tokens, shared_prefix=share
    ):
        yield [i for g in some for i in members[g]], packed


def _attributes(
    model: RewardModel, split: Split, wanted: Sequence[int], loop: Loop
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the wanted answers' attributes, part by part: indices, means, stds."""
    assert isinstance(model.head, AttributeHeads)
    if not wanted:  # a process may have no share of a short batch
        return
    if split.states is not None:
        yield list(wanted), *model.head.attributes(split.states[list(wanted)].to(model.device))
        return
    tokens = [split.examples[i].tokens for i in wanted]
    for some, packed in _packed(model, tokens, max_tokens=loop.config.max_batch_tokens):
        with loop.accelerator.autocast():
            states = model.hidden(packed)
        yield [wanted[i] for i in some], *model.head.attributes(states)


def _accumulate(
    model: RewardModel,
    training: Split,
    batch: Sequence[int],
    loop: Loop,
    config: AttributeConfig,
) -> tuple[float, float, float]:
    """Add this process's part of a batch to the gradient; return its loss, error and std.

    Each is a sum over this process's ratings, by the number of ratings in the whole batch.
    """
    count = training.ratings[list(batch)].isfinite().sum().clamp_min(1).item()
    loss = error = std = 0.0
    for some, means, stds in _attributes(model, training, loop.share(batch), loop):
        ratings = training.ratings[some].to(means.device)
        part = rating_losses(means, stds, ratings, loss=config.loss).sum() / count
        loop.backward(part)
        loss += part.item()
        with torch.no_grad():
            rated = ratings.isfinite()
            error += ((means - ratings).abs()[rated].sum() / count).item()
            std += (stds[rated].sum() / count).item()
    return loss, error, std


# What each attribute learns from a rating; draws come from the step's own seed (see Loop).
RATING_LOSSES = {"mle": gaussian_nll_loss, "mse": mse_reparam_loss}


def rating_losses(
    means: Float[Tensor, "row attribute"],
    stds: Float[Tensor, "row attribute"],
    ratings: Float[Tensor, "row attribute"],
    *,
    loss: str,
) -> Float[Tensor, "row attribute"]:
    """Loss of each rating, 0 where there is none (NaN): Lou et al. 2024, Eq. 2 and 3.

    `mle`: `-log N(R_i; mu_i, s_i^2)` less a constant; `mse`: `(mu_i + z s_i - R_i)^2` with
    `z ~ N(0, 1)`.

    Args:
        means: Of each attribute.
        stds: Of each attribute.
        ratings: NaN where an attribute was not rated.
        loss: A name in `RATING_LOSSES`.
    """
    rated = ratings.isfinite()
    targets = torch.where(rated, ratings, means.detach())  # no NaN reaches a gradient
    return torch.where(rated, RATING_LOSSES[loss](means, stds, targets), 0.0)


@torch.no_grad()
def _judge_attributes(model: RewardModel, held_out: Split, loop: Loop) -> dict[str, float]:
    assert isinstance(model.head, AttributeHeads)
    model.eval()
    means, stds = torch.zeros_like(held_out.ratings), torch.zeros_like(held_out.ratings)
    for some, mean, std in _attributes(model, held_out, range(len(held_out.examples)), loop):
        means[some], stds[some] = mean.float().cpu(), std.float().cpu()
    model.train()
    return attribute_metrics(means, stds, held_out.ratings, model.head.attribute_names)


def attribute_metrics(
    means: Float[Tensor, "row attribute"],
    stds: Float[Tensor, "row attribute"],
    ratings: Float[Tensor, "row attribute"],
    names: Sequence[str],
) -> dict[str, float]:
    """Do means follow the ratings, and stds the errors? Numbers on answers kept from training.

    Args:
        means: Of each attribute.
        stds: Of each attribute.
        ratings: NaN where an attribute was not rated.
        names: The attributes'; one without a rating here has no numbers.

    Returns:
        `held_out/` `spearman_mean_NAME` (rank correlation of mean and rating),
        `spearman_std_NAME` (of std and `|mean - rating|`), `error_NAME` and `std_NAME` (means), and
        each without a name: its mean over the attributes.
    """
    found: dict[str, list[float]] = {
        "spearman_mean": [],
        "spearman_std": [],
        "error": [],
        "std": [],
    }
    metrics: dict[str, float] = {}
    for i, name in enumerate(names):
        rated = ratings[:, i].isfinite()
        if not rated.any():
            continue
        mean, std, rating = means[rated, i], stds[rated, i], ratings[rated, i]
        error = (mean - rating).abs()
        numbers = {
            "spearman_mean": rank_correlation(mean, rating),
            "spearman_std": rank_correlation(std, error),
            "error": error.mean().item(),
            "std": std.mean().item(),
        }
        for key, value in numbers.items():
            metrics[f"held_out/{key}_{name}"] = value
            found[key].append(value)
    return {f"held_out/{k}": sum(v) / len(v) for k, v in found.items() if v} | metrics


# ---- stage 2 -----------------------------------------------------------------------------------


class Sides(NamedTuple):
    """States and attribute means of pairs: all that gates learn from, computed once."""

    states: Float[Tensor, "pair side hidden"]
    means: Float[Tensor, "pair side attribute"]
    margins: Float[Tensor, " pair"]


def train_gating(
    model: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: GatingConfig,
    *,
    output_dir: str | Path | None = None,
    reference: Reference | None = None,
    evaluation: Evaluation | None = None,
    report: LoadReport | None = None,
) -> RewardModel:
    """Learn from comparisons how to weigh the attributes (stage 2); all else stays as it is.

    New gates, equal at first, minimise the Bradley-Terry loss of `sum_i w_i mu_i`. States are
    computed once and kept in memory, `2 * pairs * hidden * 4` bytes.

    Args:
        model: With `AttributeHeads`; it is not changed, and the model returned shares its backbone.
        preferences: Pairs; one whose longer side does not fit is left out and counted in
            `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        reference: (prompts, completions) of the reference policy, on which the reward's scale is
            measured; without them, the training pairs' own completions serve.
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        report: Receives the rows that do not fit.

    Raises:
        DataError: The model has no attribute heads, or no pair fits `max_length`.
    """
    if not isinstance(model.head, AttributeHeads):
        raise DataError(
            "Gates weigh attributes, and this model has none: train it with train_attributes first."
        )
    # Margins and prompts as BRME reads them; its targets are not used.
    pairs = encode_examples(model, preferences, BRMEConfig(max_length=config.max_length), report)
    split_seed = seed_of(config.seed, "gating", "held_out")  # its own draw, as in train_brme
    kept, apart = split_by_prompt(pairs, fraction=config.held_out, seed=split_seed)
    _check_split(kept, apart, pairs, config.held_out, "pairs")
    gated = with_fresh_gates(model, config)
    head = gated.head
    assert isinstance(head, AttributeHeads)
    batch_size = min(config.batch_size, len(kept))
    per_epoch = math.ceil(len(kept) / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    loop = Loop(
        config,
        total_steps=total,
        modules={"gating": head.gating},
        stage="gating",
        output_dir=output_dir,
    )
    gated.to(loop.accelerator.device)
    training, held_out = (_sides(gated, side, loop) for side in (kept, apart))
    judged: dict[str, float] = {}
    head.train()
    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(len(kept), config.seed, "gating", epoch)
        batch = order[at * batch_size : (at + 1) * batch_size]
        mine = loop.share(batch)
        loss, margins, rewards = 0.0, [], []
        if mine:  # a process may have no share of a short batch
            made = gated_rewards(head, training, mine)  # [pair, side]
            wanted = training.margins[mine].to(made.device)
            losses = bradley_terry_loss(made[:, 0], made[:, 1], margin=wanted)
            losses = losses + config.centring * centring_loss(made[:, 0], made[:, 1])
            part = losses.sum() / len(batch)
            loop.backward(part)
            loss, margins = part.item(), (made[:, 0] - made[:, 1]).tolist()
            rewards = made.flatten().tolist()
        norm = loop.update()
        loss = sum(loop.gather([loss]))
        margins, rewards = loop.gather(margins), loop.gather(rewards)
        metrics = batch_metrics(loss, margins, rewards) | {"grad_norm": norm, "epoch": epoch + 1}
        if apart and _judges(step, total, config.evaluate_every):
            judged = gating_metrics(head, held_out)
            metrics |= judged
        loop.log(metrics, show=["loss", "accuracy"])
    gated.facts |= {"pairs": len(kept)}
    summary: dict[str, int | float] = {
        "steps": total,
        "pairs": len(kept),
        "held_out_pairs": len(apart),
        "overlong_pairs": len(preferences) - len(pairs),
        **judged,
    }
    return _finished(gated, summary, loop, reference or own_completions(preferences), evaluation)


def with_fresh_gates(model: RewardModel, config: GatingConfig) -> RewardModel:
    """Return the model with the same attributes under new, equal gates, on the same backbone."""
    old = model.head
    assert isinstance(old, AttributeHeads)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        head = AttributeHeads(
            _width(model),
            old.attribute_names,
            softmax=config.softmax,
            gate_width=config.gate_width,
            log_std_range=old.log_std_range,
        )
    head.linear.load_state_dict(old.linear.state_dict())
    gated = RewardModel(model.backbone, head, model.tokenizer, max_length=model.max_length)
    gated.facts = dict(model.facts)
    return gated.to(model.device)


@torch.no_grad()
def _sides(model: RewardModel, pairs: Sequence[Example], loop: Loop) -> Sides:
    assert isinstance(model.head, AttributeHeads)
    with loop.accelerator.autocast():
        states = pair_states(model, pairs, max_tokens=loop.config.max_batch_tokens)
    means = model.head.attributes(states.to(model.device))[0].cpu()
    return Sides(states, means, torch.tensor([pair.margin for pair in pairs]))


def gated_rewards(
    head: AttributeHeads, sides: Sides, wanted: Sequence[int]
) -> Float[Tensor, "pair side"]:
    """Return the rewards of the wanted pairs, with gradients for the gates alone."""
    device = head.linear.weight.device
    gates = head.gates(sides.states[list(wanted)].to(device))
    return weighted_mean(gates, sides.means[list(wanted)].to(device))


@torch.no_grad()
def gating_metrics(head: AttributeHeads, held_out: Sides) -> dict[str, float]:
    """What the gates do, on pairs kept from training.

    Returns:
        `held_out/` `accuracy` (ties count half), `accuracy_NAME` (of the attribute alone; well
        below one half where less of it is preferred), `gate_NAME` (mean weight).
    """
    everything = range(len(held_out.states))
    rewards = gated_rewards(head, held_out, everything).cpu()
    gates = head.gates(held_out.states.to(head.linear.weight.device)).cpu().flatten(0, 1).mean(0)
    metrics = {"held_out/accuracy": _accuracy(rewards)}
    for i, name in enumerate(head.attribute_names):
        metrics[f"held_out/accuracy_{name}"] = _accuracy(held_out.means[..., i])
        metrics[f"held_out/gate_{name}"] = gates[i].item()
    return metrics


def _accuracy(rewards: Float[Tensor, "pair side"]) -> float:
    """Share of the pairs whose first side has the higher reward; ties count half."""
    return ((rewards[:, 0] - rewards[:, 1]).sign() + 1).mean().item() / 2


# ---- both --------------------------------------------------------------------------------------


def _check_split(
    kept: Sequence[object],
    apart: Sequence[object],
    examples: Sequence[object],
    held_out: float,
    what: str,
) -> None:
    if not kept:
        raise DataError(
            f"All {len(examples)} {what} are held out: lower held_out, or give {what} of more "
            "prompts."
        )
    if held_out and not apart:
        logger.warning("No prompt fell into the held-out share: nothing is judged.")


def _judges(step: int, total: int, every: int) -> bool:
    return step == total or bool(every and step % every == 0)


def _finished(
    model: RewardModel,
    summary: dict[str, int | float],
    loop: Loop,
    reference: Reference,
    evaluation: Evaluation | None,
) -> RewardModel:
    """Measure the reward's scale, evaluate, write the summary and the model."""
    model.eval()
    model.set_normalisation(*reference)
    evaluated = evaluation(model) if evaluation else {}
    model.facts |= evaluated
    summary |= {
        "reference/mean": model.reward_mean.mean().item(),
        "reference/std": model.reward_std.mean().item(),
        **evaluated,
    }
    loop.finish(summary, model.save_pretrained)
    return model
