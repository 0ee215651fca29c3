"""WARM: several reward models become one, whose weights are the mean of theirs.

Ramé et al. 2024, "WARM: On the Benefits of Weight Averaged Reward Models"
(https://arxiv.org/abs/2401.12187). The recipe: probe a head on the frozen start (`probe_head`),
fine-tune members from that one start, each with its own rate, dropout and order of the data
(`diverse_members`, `start_member`, `train.reward.train_reward`), keep those that are best on
shifted data (`select_best`), make sure that they are linearly connected
(`models.mode_connectivity`), and average (`average_weights`).
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.losses.preference import bradley_terry_loss, centring_loss
from trueward.models.backbone import disable_dropout
from trueward.models.heads import Head, HeadOutput, ScalarHead
from trueward.models.reward_model import RewardModel, merged

T = TypeVar("T")

# What the paper's members differ in, beside the order of their data.
LEARNING_RATES = (1e-5, 4e-5, 1e-4)
DROPOUTS = (0.05, 0.1)

# Entries of a configuration that say nothing of how the backbone computes its states.
_BOOKKEEPING = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("trueward", "use_cache", "num_labels", "id2label", "label2id", "problem_type"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),  # the tokenizers' are compared
}


# Kinds of heads whose parts have no mean entry by entry, and what to do in its place.
_NOT_AVERAGED = {
    "laplace": "A Laplace posterior belongs to the states that it was fitted on: average the "
    "single heads below it, and fit it again on their average.",
    "member": "A low-rank ensemble has no mean of its factors that adds the mean of what they "
    "add: average single heads, or make averages the members of an ensemble.",
}


# --- the average ---


def average_weights(
    models: Iterable[RewardModel],
    *,
    reference: tuple[Sequence[Prompt], Sequence[Completion]] | None = None,
) -> RewardModel:
    """Return the model whose weights are the mean of the models': `phi = 1/M sum_i phi_i`.

    Backbone and head alike, summed in float64, one model after the other: with a generator that
    loads them, one is in memory at a time. Low-rank adapters are merged first, because the mean of
    the factors is not the mean of what they add. The models must come from one start with one head;
    others of the same architecture average to noise, which `models.mode_connectivity` shows.

    The result is an ordinary reward model, as fast as one and with as many members as each of the
    models has: for scalar models one, so no disagreement is left to be uncertain by (the
    limitation that the paper states). To keep some, average within groups and make the averages
    the members of an ensemble.

    The statistics of the models do not carry over: an average varies less than they do wherever
    they disagree, by how much only its own scores tell. They are measured anew on `reference`, and
    are the identity without it; several averages have no common scale until then.

    Args:
        models: At least one; they are left as they are.
        reference: Prompts and completions of the reference policy (see
            `RewardModel.set_normalisation`).

    Returns:
        A copy without adapters or dropout, with the shortest of the models' `max_length`. Its
        facts tell what was averaged, and what was known of each.

    Raises:
        ValueError: No model, one whose head has no mean, or two that differ in architecture, head,
            tokenizer or dtype.
    """
    average: RewardModel | None = None
    sums: dict[str, Tensor] = {}
    facts: list[dict[str, Any]] = []
    for number, model in enumerate(models, start=1):
        _require_averageable(model)
        plain = _without_adapters(model)
        facts.append(model.facts)
        if average is None:
            average = _bare_copy(plain)
            sums = {name: _wide(weight) for name, weight in plain.state_dict().items()}
            continue
        _require_alike(average, plain, number)
        _require_same_frozen(average, plain, number)
        average.max_length = min(average.max_length, model.max_length)
        for name, weight in plain.state_dict().items():
            if weight.is_floating_point():
                sums[name] += _wide(weight)
    if average is None:
        raise ValueError("average_weights needs at least one model, got none.")
    # Sum first, then divide: float64 holds the sum of a few float32 exactly, whatever the order.
    _load(average, {k: v / len(facts) if v.is_floating_point() else v for k, v in sums.items()})
    average.facts = _facts_of_average(facts)
    if reference is not None:
        average.set_normalisation(*reference)
    return average


def interpolate_weights(model_1: RewardModel, model_2: RewardModel, weight: float) -> RewardModel:
    """Return the model with the weights `(1 - weight) phi_1 + weight phi_2`.

    As `average_weights` in what must agree and what comes back; the statistics are the identity.
    """
    require_share("weight", weight)
    for model in (model_1, model_2):
        _require_averageable(model)
    first, second = _without_adapters(model_1), _without_adapters(model_2)
    mixed = _bare_copy(first)
    _require_alike(mixed, second, 2)
    _require_same_frozen(mixed, second, 2)
    mixed.max_length = min(model_1.max_length, model_2.max_length)
    ends = second.state_dict()
    weights = {name: _wide(value) for name, value in first.state_dict().items()}
    for name, value in weights.items():
        if value.is_floating_point():
            weights[name] = (1 - weight) * value + weight * _wide(ends[name])
    _load(mixed, weights)
    mixed.facts = {"weights": f"{1 - weight:.3g} and {weight:.3g} of two models'"}
    return mixed


def _without_adapters(model: RewardModel) -> RewardModel:
    """Return the model itself, or one with its adapters merged into a copy of the backbone."""
    if not isinstance(model.backbone, PeftModel):
        return model
    plain = RewardModel(
        merged(model.backbone), model.head, model.tokenizer, max_length=model.max_length
    )
    return plain.to(model.device)


def _bare_copy(model: RewardModel) -> RewardModel:
    """Return a copy as if just loaded: trainable, without dropout, statistics and facts."""
    bare = copy.deepcopy(model).requires_grad_(True).eval()
    bare.backbone.requires_grad_(True)  # its own method, which leaves a frozen encoder frozen
    disable_dropout(bare)
    bare.reward_mean.zero_()
    bare.reward_std.fill_(1.0)
    bare.facts = {}
    return bare


def _wide(weight: Tensor) -> Tensor:
    """Return a copy in float64 (integers as they are) on the CPU, which all devices share."""
    weight = weight.detach().to("cpu", copy=True)
    return weight.double() if weight.is_floating_point() else weight


def _load(model: RewardModel, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():  # the tensors themselves, not copies
            value.copy_(weights[name])


def _facts_of_average(facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the card's facts: texts that all share (data, base), the rest for each model.

    Numbers are never shared: two members with the same accuracy do not make it the average's.
    """
    shared = {
        key: value
        for key, value in facts[0].items()
        if key != "weights" and isinstance(value, str) and all(f.get(key) == value for f in facts)
    }
    own = [{k: v for k, v in f.items() if k not in shared} for f in facts]
    members = {f"model {i}": fact for i, fact in enumerate(own, start=1) if fact}
    return shared | {"weights": f"mean of {len(facts)} models' (WARM)"} | members


def _require_alike(first: RewardModel, other: RewardModel, number: int) -> None:
    difference = next(_differences(first, other), None)
    if difference is not None:
        raise ValueError(
            f"Weights are averaged between models of one architecture, head and tokenizer; model 1 "
            f"and model {number} differ in {difference}. Fine-tune all of them from one start."
        )


def _require_averageable(model: RewardModel) -> None:
    kind = model.head.describe()["kind"] if model.head is not None else None
    if kind in _NOT_AVERAGED:
        raise ValueError(_NOT_AVERAGED[str(kind)])


def _require_same_frozen(average: RewardModel, other: RewardModel, number: int) -> None:
    """Refuse another frozen encoder: an average shares it with model 1, whose it would change."""
    theirs = dict(other.named_parameters())
    for name, weight in average.named_parameters():
        if not weight.requires_grad and not torch.equal(weight.cpu(), theirs[name].cpu()):
            raise ValueError(
                f"Model 1 and model {number} read the states of different frozen encoders ({name} "
                "differs): average models on the same one."
            )


def _differences(first: RewardModel, other: RewardModel) -> Iterator[str]:
    """Yield in words what keeps the weights of two models apart."""
    heads = [_describe(model.head) for model in (first, other)]
    if heads[0] != heads[1]:
        yield f"their heads, {heads[0]} and {heads[1]}"
    kinds = [type(model.backbone).__name__ for model in (first, other)]
    if kinds[0] != kinds[1]:
        yield f"their backbones, {kinds[0]} and {kinds[1]}"
    configs = [model.backbone.config.to_dict() for model in (first, other)]
    for key in sorted({*configs[0], *configs[1]} - _BOOKKEEPING):
        values = [config.get(key) for config in configs]
        # Dropout is what members may differ in; it is no part of what is averaged.
        if values[0] != values[1] and "drop" not in key:
            yield f"the configuration's {key}, {values[0]} and {values[1]}"
    yield from _tokenizer_differences(first.tokenizer, other.tokenizer)
    states = [model.state_dict() for model in (first, other)]
    for name in [*states[0], *(n for n in states[1] if n not in states[0])]:
        values = [_shape(state.get(name)) for state in states]
        if values[0] != values[1]:
            yield f"the weight {name}, {values[0]} and {values[1]}"
        elif not _same_integers(*(state[name] for state in states)):
            yield f"the buffer {name}, whose integers have no mean"


def _same_integers(first: Tensor, other: Tensor) -> bool:
    return first.is_floating_point() or torch.equal(first.cpu(), other.cpu())


def _tokenizer_differences(
    first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> Iterator[str]:
    vocabularies = [first.get_vocab(), other.get_vocab()]
    for token in sorted({*vocabularies[0], *vocabularies[1]}):
        ids = [vocabulary.get(token) for vocabulary in vocabularies]
        if ids[0] != ids[1]:
            yield f"their vocabularies, where the token {token!r} is {ids[0]} and {ids[1]}"
    for name in ("pad_token", "bos_token", "eos_token", "sep_token", "cls_token"):
        special = [getattr(tokenizer, name, None) for tokenizer in (first, other)]
        if special[0] != special[1]:
            yield f"the tokenizer's {name}, {special[0]} and {special[1]}"
    if first.chat_template != other.chat_template:
        yield "the tokenizer's chat template"


def _describe(head: Head | None) -> str:
    if head is None:
        return "the one it was published with"
    told = {k: v for k, v in head.describe().items() if k != "dropout"}
    return " ".join(str(value) for value in told.values())


def _shape(weight: Tensor | None) -> str:
    return "none" if weight is None else f"{weight.dtype} of shape {tuple(weight.shape)}"


# --- the recipe ---


@dataclass(frozen=True, kw_only=True)
class MemberSettings:
    """What one member is trained with, where it differs from the others."""

    learning_rate: float
    dropout: float
    seed: int  # of the order of the data and of dropout's draws


def diverse_members(
    count: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    dropouts: Sequence[float] = DROPOUTS,
    seed: int = 0,
) -> list[MemberSettings]:
    """Return settings for `count` members that differ as widely as the values allow.

    Rates and dropouts go round together, every combination comes once before any comes again, and
    all seeds differ. The values are the paper's, which trains 10 members with Adafactor for
    10,000 steps of 128 pairs.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 member, got {count}.")
    if not learning_rates or not dropouts:
        raise ValueError("diverse_members needs at least one learning rate and one dropout.")
    around = math.lcm(len(learning_rates), len(dropouts))
    rounds = math.gcd(len(learning_rates), len(dropouts))
    return [
        MemberSettings(
            learning_rate=learning_rates[k % len(learning_rates)],
            # 2 x 2 values would come round after two: each round starts one dropout further.
            dropout=dropouts[(k + k // around % rounds) % len(dropouts)],
            seed=seed + k,
        )
        for k in range(count)
    ]


def start_member(
    start: RewardModel, settings: MemberSettings, *, backbone: PreTrainedModel | None = None
) -> RewardModel:
    """Return a copy of the start, head included, that trains with the settings' dropout.

    Rate and seed are for the training: `train_reward(member, rows, replace(config,
    learning_rate=settings.learning_rate, seed=settings.seed))`.

    Args:
        start: What all members start from, with its head probed (`probe_head`).
        settings: The member's own.
        backbone: Replaces the start's: another checkpoint of the same supervised fine-tuning
            (the paper's "Baklava"). It is copied; the head stays the shared one.

    Raises:
        ValueError: The backbone is not like the start's, replaces one with adapters, or has no
            dropout to set.
    """
    if backbone is not None and isinstance(start.backbone, PeftModel):
        raise ValueError("Another backbone replaces the start's adapters: add those afterwards.")
    member = copy.deepcopy(start)
    if backbone is not None:
        member.backbone = copy.deepcopy(backbone)
        _require_alike(start, member, 2)
        member.to(start.device)
    set_dropout(member, settings.dropout)
    return member


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model, as layers or as numbers of the attention.

    `RewardModel.from_backbone` switches dropout off. Many decoders have it in attention only.

    Raises:
        ValueError: The probability is not in [0, 1), or the model has no place for it.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {probability}.")
    places = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
            places += 1
        for name in ("attention_dropout", "attn_pdrop", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
                places += 1
    if probability and not places:
        raise ValueError(
            f"{type(model).__name__} has no dropout to set to {probability}: leave it at 0."
        )


def select_best(models: Sequence[T], accuracies: Sequence[float], count: int) -> list[T]:
    """Return the `count` models of highest accuracy, best first, ties in the order given.

    The paper selects by accuracy on data unlike the training data. The models may be anything, such
    as the paths of saved ones; the accuracy that selects is too high to report for the selected.

    Raises:
        ValueError: Not one finite accuracy for each model, or `count` is not among 1..models.
    """
    if len(models) != len(accuracies):
        raise ValueError(
            f"select_best needs one accuracy for each model, got {len(accuracies)} accuracies of "
            f"{len(models)} models."
        )
    unknown = [i for i, accuracy in enumerate(accuracies, start=1) if not math.isfinite(accuracy)]
    if unknown:
        raise ValueError(f"The accuracy of model {unknown[0]} is not finite: evaluate it again.")
    if not 1 <= count <= len(models):
        raise ValueError(f"count must lie between 1 and the {len(models)} models, got {count}.")
    best = sorted(range(len(models)), key=lambda i: -accuracies[i])  # stable
    return [models[i] for i in best[:count]]


def probe_head(
    reward_model: RewardModel,
    preferences: Sequence[PreferenceRow],
    *,
    l2: float = 1e-3,
    centring: float = 0.01,
    report: LoadReport | None = None,
) -> RewardModel:
    """Fit the scalar head on the frozen backbone: the start that all members share.

    Members that start from one random head move the states to fit it, each its own way; from a
    head that fits the states already they stay close enough for their mean to work (Kumar
    et al. 2022, https://arxiv.org/abs/2202.10054). The states are computed
    once, then `mean_i [-log sigmoid(w.d_i - margin_i) + centring (w.s_i)^2] + l2/2 |scale w|^2` is
    minimised to convergence, with `d_i` and `s_i` the difference and sum of a pair's two states,
    and `scale` the root mean square of the `d_i`, so that rewards do not depend on the states'
    unit. It is convex: there is one solution, without seed, steps or rate.

    Args:
        reward_model: Its head and statistics (on these pairs) are set, its backbone is not touched.
        preferences: Rows marked as ties are left out; so are those with a side beyond the model's
            context.
        l2: Above 0, for pairs that a plane separates have no best head otherwise.
        centring: Coefficient of `(r_chosen + r_rejected)^2`, as in training.
        report: Receives the rows that do not fit.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no scalar head of its own.
        DataError: No row can be used.
    """
    if not isinstance(reward_model.head, ScalarHead):
        raise ValueError(
            f"probe_head fits a scalar head, got {_describe(reward_model.head)}: make the model "
            "with RewardModel.from_backbone(..., members=0)."
        )
    if l2 <= 0:
        raise ValueError(f"l2 must be above 0, got {l2}.")
    rows = usable_rows([reward_model], preferences, report)
    states = _states(reward_model, rows)
    chosen, rejected = states[0::2], states[1::2]
    margins = torch.tensor([row.margin or 0.0 for row in rows], dtype=torch.float64)
    weight = _fit_probe(chosen, rejected, margins, l2=l2, centring=centring)
    rewards = states @ weight
    with torch.no_grad():
        reward_model.head.linear.weight.copy_(weight[None])
        reward_model.reward_mean.copy_(rewards.mean(0, keepdim=True))
        reward_model.reward_std.copy_(rewards.std(0, correction=0, keepdim=True).clamp_min(1e-6))
    reward_model.facts |= {"head started from": f"a linear probe on {len(rows)} pairs"}
    return reward_model


def _fit_probe(
    chosen: Float[Tensor, "pair hidden"],
    rejected: Float[Tensor, "pair hidden"],
    margins: Float[Tensor, " pair"],
    *,
    l2: float,
    centring: float,
) -> Float[Tensor, " hidden"]:
    """Minimise the convex objective of `probe_head`; float64 in, float64 out."""
    scale = (chosen - rejected).square().mean().sqrt().clamp_min(1e-12)
    chosen, rejected = chosen / scale, rejected / scale
    pairs, hidden = chosen.shape
    # States are far from isotropic, and the solver crawls along their narrow directions. In the
    # coordinates in which the curvature at 0 is the identity it takes some tens of steps.
    difference, total = chosen - rejected, chosen + rejected
    curvature = difference.T @ difference / 4 + 2 * centring * total.T @ total
    factor = torch.linalg.cholesky(curvature / pairs + l2 * torch.eye(hidden).to(chosen))
    point = torch.zeros(hidden, 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [point], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def weight() -> Tensor:
        return torch.linalg.solve_triangular(factor.T, point, upper=True)[:, 0]

    def objective() -> Tensor:
        solver.zero_grad()
        w = weight()
        rewards = chosen @ w, rejected @ w
        losses = bradley_terry_loss(*rewards, margin=margins) + centring * centring_loss(*rewards)
        loss = losses.mean() + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weight().detach() / scale


class _StatesAsRewards(ScalarHead):
    """Passes the states on, so that `RewardModel.score` batches and returns them."""

    def __init__(self, hidden_size: int) -> None:
        nn.Module.__init__(self)  # not ScalarHead's: it would draw weights from the global seed
        self.members = hidden_size

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        return HeadOutput(hidden.float(), None)


def _states(
    model: RewardModel, rows: Sequence[PreferenceRow]
) -> Float[Tensor, "completion hidden"]:
    """Return the state that the head reads, of chosen and rejected in turn, in float64."""
    width = model.backbone.config.get_text_config().hidden_size
    reader = RewardModel(
        model.backbone, _StatesAsRewards(width), model.tokenizer, max_length=model.max_length
    )
    # `score` puts the mode back to what it finds, and the backbone is the model's own.
    reader.train(model.training)
    return reader.score(*sides_of(rows), normalise=False).means.double()


def sides_of(rows: Sequence[PreferenceRow]) -> tuple[list[Prompt], list[Completion]]:
    """Return prompts and completions, chosen and rejected in turn, so that both share a prompt."""
    return [r.prompt for r in rows for _ in "cr"], [c for r in rows for c in (r.chosen, r.rejected)]


def usable_rows(
    models: Sequence[RewardModel],
    preferences: Sequence[PreferenceRow],
    report: LoadReport | None = None,
) -> list[PreferenceRow]:
    """Return the rows that have an order and fit every model's context."""
    rows = []
    for row in preferences:
        if row.extra.get("tie"):
            continue
        if all(m.fits(row.prompt, side) for m in models for side in (row.chosen, row.rejected)):
            rows.append(row)
        elif report is not None:
            report.add("over-long", row.where, "a side does not fit the model's context")
    if not rows:
        raise DataError(
            f"None of {len(preferences)} preference rows has an order and fits the model's context."
        )
    return rows


def require_share(name: str, value: float) -> None:
    """Raise ValueError for a weight outside of [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}.")
