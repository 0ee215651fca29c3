"""A Gaussian over the last layer of a finished reward model: the Laplace approximation.

Stage 1 is one scalar head, `r = w.h`. Given the states `h`, the Bradley-Terry likelihood of the
pairs is that of a logistic regression on `d = h_chosen - h_rejected`, so its posterior over `w` has
one maximum, and the Gaussian there is `N(w, H^-1)` with the Hessian `H` of the negative log
posterior. MacKay 1992, "The Evidence Framework Applied to Classification Networks"
(https://doi.org/10.1162/neco.1992.4.5.720); Daxberger et al. 2021, "Laplace Redux", for the last
layer alone (https://arxiv.org/abs/2106.14806); Yang et al. 2024, "Bayesian Reward Models for LLM
Alignment" (https://arxiv.org/abs/2402.13210), which puts it on the LoRA weights of a reward model
and takes its std or variance off the reward.

What it cannot say: the states are held fixed. Where stage 1's backbone was trained on these very
pairs it orders them better than others, and the posterior is too sure of itself; pairs that the
backbone has not seen give an honest one.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, DataError, LoadReport, PreferenceRow, Prompt
from trueward.data.rows import split_by_prompt
from trueward.models.heads import ScalarHead
from trueward.models.laplace import LaplaceHead, linear_std
from trueward.models.reward_model import RewardModel
from trueward.train.brme import BRMEConfig, encode_examples, pair_states, rank_correlation
from trueward.train.loop import seed_of
from trueward.train.reward import Evaluation, own_completions
from trueward.train.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Prior precisions tried, in units of the mean curvature of the pairs at w = 0: from one that leaves
# w to the pairs to one that holds it at 0. Then golden sections between the best one's neighbours.
_DECADES = range(2, -9, -1)
_ROUNDING = 1e-12  # of the whole curvature: a prior below it is lost in float64
_SECTIONS = 8  # 2 decades * .618^8 = 10 % of the precision, where the evidence is flat
_TOLERANCE = 1e-14  # of Newton's decrement, relative to the objective


@dataclass(frozen=True, kw_only=True)
class LaplaceConfig:
    """Options of `fit_laplace`."""

    members: int = 16  # draws of the weights; 0 = one member, with a mean and a std
    prior_precision: float | None = None  # of each weight, 1 / variance; None: by the evidence
    # Move the weights to the posterior's maximum before the Gaussian is put there: a Laplace
    # approximation about any other point is none.
    refit: bool = True
    # As in stage 1: coefficient of (r_chosen + r_rejected)^2, a pair. 0 leaves the level of the
    # rewards, of which pairs say nothing, as uncertain as the prior does.
    centring: float = 0.01
    max_length: int = 1024  # tokens of prompt and completion
    held_out: float = 0.1  # share of the prompts on which the posterior is judged
    max_batch_tokens: int = 8192  # padded tokens computed at once
    seed: int = 42  # of the held-out share and of the draws

    def __post_init__(self) -> None:
        if self.members < 0:
            raise ValueError(f"members must be at least 0, got {self.members}.")
        if self.prior_precision is not None and not 0 < self.prior_precision < math.inf:
            raise ValueError(
                f"prior_precision must be above 0 and finite, got {self.prior_precision}; leave it "
                "out to choose it by the evidence."
            )
        if not 0 <= self.centring < math.inf:
            raise ValueError(f"centring must be at least 0 and finite, got {self.centring}.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}.")
        for name in ("max_length", "max_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


class Candidate(NamedTuple):
    """One prior, and the weights at its posterior's maximum, in float64."""

    prior_precision: float
    weight: Float[Tensor, " hidden"]
    log_evidence: float  # nats


class Posterior(NamedTuple):
    """A Gaussian over the weights, in float64."""

    weight: Float[Tensor, " hidden"]
    factor: Float[Tensor, "hidden hidden"]  # F, with the covariance F F'


def fit_laplace(
    stage1: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: LaplaceConfig,
    *,
    output_dir: str | Path | None = None,
    report: LoadReport | None = None,
    evaluation: Evaluation | None = None,
    reference: tuple[Sequence[Prompt], Sequence[Completion]] | None = None,
) -> RewardModel:
    """Put a Gaussian over the weights of stage 1's head; return it as a new model.

    The states of all pairs are computed once. Everything after is linear algebra in float64, on the
    states' GPU if there is one: `pairs * hidden^2` operations for each of some tens of Newton
    steps, `8 * (2 * pairs + 4 * hidden) * hidden` bytes.

    Draws (`config.members`) are of one posterior, so they keep one unit: each is centred by its own
    mean on the reference samples, and all are divided by the std there of their mean, the reward
    of the posterior's mean weights.

    Args:
        stage1: A reward model with one scalar head. It is not changed; the new model stands on its
            very backbone, so do not train either on.
        preferences: Pairs; one whose longer side does not fit is left out and counted in
            `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics (a line for each prior precision tried, then one of the result),
            summary, `model/`. It is one step: a killed run starts again.
        report: Receives the rows that do not fit.
        evaluation: Called at the end; its numbers stand in the summary and the model card.
        reference: (prompts, completions) of the reference policy, which give the rewards' scale;
            without them, the training pairs' own completions serve.

    Raises:
        DataError: Stage 1 is no scalar model of ours, no pair fits `max_length`, none is left
            beside the held-out share, or all have two equal sides.
    """
    if not isinstance(stage1.head, ScalarHead):
        raise DataError(
            "A Laplace approximation starts from a reward model with one scalar head: train it "
            "with train_reward on RewardModel.from_backbone(..., members=0)."
        )
    kept, apart = _states(stage1, preferences, config, report)
    process = PartialState()
    folder = RunFolder(output_dir, command="laplace", config=config)
    folder.load_checkpoint()  # there is none; it cuts away the metrics of a killed run
    before = stage1.head.linear.weight.detach()[0].to(kept.chosen)
    tried = candidates(kept, before, config)
    for step, one in enumerate(tried, start=1):
        numbers = {"prior_precision": one.prior_precision, "log_evidence": one.log_evidence}
        folder.log("laplace", step, numbers)
    best = max(tried, key=lambda one: one.log_evidence)
    _warn_of_an_edge(best, tried)
    prior = _prior(kept, best.prior_precision, config)
    hessian = bradley_terry_hessian(best.weight, kept.differences, margins=kept.margins)
    posterior = Posterior(best.weight, covariance_factor(prior + hessian))
    metrics: dict[str, float] = {
        "prior_precision": best.prior_precision,
        "log_evidence": best.log_evidence,
        "effective_parameters": effective_parameters(posterior.factor, hessian).item(),
        **_moved(before, best.weight),
    }
    if len(apart.chosen):
        metrics |= held_out_numbers(posterior, before, apart)
    folder.log("laplace", len(tried) + 1, metrics)
    head = LaplaceHead(len(before), config.members)
    head.set_posterior(*posterior, seed=config.seed)
    model = _with_head(stage1, head)
    _put_on_one_scale(model, reference or own_completions(preferences))
    evaluated = evaluation(model) if evaluation else {}
    model.facts |= {"pairs": len(kept.chosen), **evaluated}
    if folder.path is not None and folder.writes:
        model.save_pretrained(folder.path / "model")
    summary: dict[str, float] = {
        "steps": len(tried) + 1,
        "pairs": len(kept.chosen),
        "held_out_pairs": len(apart.chosen),
        "overlong_pairs": len(preferences) - len(kept.chosen) - len(apart.chosen),
        "reference/mean": model.reward_mean.mean().item(),
        "reference/std": model.reward_std.mean().item(),
        **metrics,
        **evaluated,
    }
    folder.finish(summary, seed=config.seed)
    process.wait_for_everyone()
    return model


# ---- equations ---------------------------------------------------------------------------------


def log_likelihood(
    weight: Float[Tensor, " hidden"],
    differences: Float[Tensor, "pair hidden"],
    *,
    margins: Float[Tensor, " pair"] | float = 0.0,
) -> Float[Tensor, ""]:
    """Log probability of all pairs, `sum_i log sigmoid(w.d_i - margin_i)`: a sum, not a mean."""
    return F.logsigmoid(differences @ weight - margins).sum()


def bradley_terry_hessian(
    weight: Float[Tensor, " hidden"],
    differences: Float[Tensor, "pair hidden"],
    *,
    margins: Float[Tensor, " pair"] | float = 0.0,
) -> Float[Tensor, "hidden hidden"]:
    """Curvature of `-log_likelihood` in the weights, `sum_i p_i (1 - p_i) d_i d_i'`.

    `p_i = sigmoid(w.d_i - margin_i)`; no row adds more than `d_i d_i' / 4`.
    """
    logits = differences @ weight - margins
    curvature = torch.sigmoid(logits) * torch.sigmoid(-logits)  # 1 - p would round to 0
    return differences.T @ (curvature[:, None] * differences)


def centring_hessian(
    chosen: Float[Tensor, "pair hidden"],
    rejected: Float[Tensor, "pair hidden"],
    *,
    centring: float,
) -> Float[Tensor, "hidden hidden"]:
    """Curvature of the centring term, `2 c sum_i s_i s_i'` with `s_i = h_chosen + h_rejected`.

    `c (r_chosen + r_rejected)^2` is minus the logarithm of a Gaussian in `w.s_i`: no likelihood of
    any comparison, but a part of the prior.
    """
    sums = chosen + rejected
    return 2 * centring * sums.T @ sums


def map_weight(
    differences: Float[Tensor, "pair hidden"],
    prior: Float[Tensor, "hidden hidden"],
    *,
    margins: Float[Tensor, " pair"] | float = 0.0,
    start: Float[Tensor, " hidden"] | None = None,
    max_steps: int = 200,
) -> Float[Tensor, " hidden"]:
    """The weights at the posterior's maximum, `argmax log p(pairs | w) - w'Aw / 2`.

    Newton's method with a line search; the problem is convex, so the start decides only how long it
    takes.

    Args:
        differences: `h_chosen - h_rejected`, in float64.
        prior: `A`, the precision of the prior.
        margins: By how much chosen should win.
        start: None for 0.
        max_steps: Of Newton.

    Raises:
        ValueError: No maximum was found: the prior leaves a direction to rounding.
    """

    def loss_at(point: Tensor) -> float:
        fit = log_likelihood(point, differences, margins=margins)
        return float(point @ prior @ point / 2 - fit)

    weight = torch.zeros_like(prior[0]) if start is None else start.clone()
    last = math.inf  # decrement
    for _ in range(max_steps):
        missing = torch.sigmoid(margins - differences @ weight)  # 1 - p
        gradient = prior @ weight - differences.T @ missing
        hessian = prior + bradley_terry_hessian(weight, differences, margins=margins)
        move = torch.cholesky_solve(gradient[:, None], _cholesky(hessian))[:, 0]
        decrement = float(gradient @ move)  # about twice what is still to be gained
        loss = loss_at(weight)
        slack = 100 * _TOLERANCE * (1 + abs(loss))  # of rounding
        # Newton's decrement squares from step to step; what no longer falls is rounding.
        if decrement <= _TOLERANCE * (1 + abs(loss)) or last / 2 <= decrement <= slack:
            return weight - move
        last = decrement
        size = 1.0
        while loss_at(weight - size * move) > loss - 1e-4 * size * decrement + slack:
            size /= 2
        weight = weight - size * move
    raise ValueError(
        f"The weights' maximum was not found in {max_steps} steps: give a larger prior_precision."
    )


def log_evidence(
    weight: Float[Tensor, " hidden"],
    differences: Float[Tensor, "pair hidden"],
    prior: Float[Tensor, "hidden hidden"],
    *,
    margins: Float[Tensor, " pair"] | float = 0.0,
) -> Float[Tensor, ""]:
    """Laplace's approximation of `log p(pairs | A)`, the likelihood with the weights integrated.

    `log p(pairs | w) - w'Aw / 2 + log det A / 2 - log det H / 2`, with `H = A +
    bradley_terry_hessian` and `w` the maximum; for `A = tau I` the second and third terms are
    `-tau |w|^2 / 2 + hidden / 2 log tau`. MacKay 1992; Daxberger et al. 2021.
    """
    hessian = prior + bradley_terry_hessian(weight, differences, margins=margins)
    occam = _cholesky(prior).diagonal().log().sum() - _cholesky(hessian).diagonal().log().sum()
    fit = log_likelihood(weight, differences, margins=margins)
    return fit - weight @ prior @ weight / 2 + occam


def covariance_factor(
    hessian: Float[Tensor, "hidden hidden"],
) -> Float[Tensor, "hidden hidden"]:
    """A triangular `F` with `F F' = H^-1`: the inverse of the transposed Cholesky factor of `H`."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(_cholesky(hessian), eye, upper=False).T


def effective_parameters(
    factor: Float[Tensor, "hidden hidden"], hessian: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, ""]:
    """How many directions of the weights the pairs tell more of than the prior does.

    MacKay's `gamma = tr(B H^-1)`, with the pairs' own curvature `B` and `H^-1 = F F'`; between 0
    and the number of weights.
    """
    return (factor * (hessian @ factor)).sum()


def linked_probability(
    mean: Float[Tensor, "*batch"], std: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Probability of a preference whose margin is `N(mean, std^2)`, `E sigmoid(margin)`, nearly.

    `sigmoid(mean / sqrt(1 + pi std^2 / 8))`: the sigmoid is taken for the probit of equal slope at
    0, for which the expectation is exact; off by less than .02. MacKay 1992, section 3.
    """
    return torch.sigmoid(mean / (1 + math.pi * std.square() / 8).sqrt())


# ---- the prior ---------------------------------------------------------------------------------


class PairStates(NamedTuple):
    """The states of pairs, in float64."""

    chosen: Float[Tensor, "pair hidden"]
    rejected: Float[Tensor, "pair hidden"]
    margins: Float[Tensor, " pair"]

    @property
    def differences(self) -> Float[Tensor, "pair hidden"]:
        """`h_chosen - h_rejected`."""
        return self.chosen - self.rejected


def candidates(
    pairs: PairStates, weight: Float[Tensor, " hidden"], config: LaplaceConfig
) -> list[Candidate]:
    """Return the maximum under the prior asked for, or under every prior tried.

    Args:
        pairs: What is learned from.
        weight: Stage 1's, where Newton starts, or stays with `refit=False`.
        config: Options.
    """
    differences = pairs.differences
    flat = _prior(pairs, 0.0, config)  # the centring term alone
    start = weight

    def candidate_at(precision: float) -> Candidate:
        nonlocal start
        prior = flat.diagonal_scatter(flat.diagonal() + precision)
        if config.refit:
            start = map_weight(differences, prior, margins=pairs.margins, start=start)
        evidence = log_evidence(start, differences, prior, margins=pairs.margins)
        return Candidate(precision, start, evidence.item())

    if config.prior_precision is not None:
        return [candidate_at(config.prior_precision)]
    curvature = differences.square().sum().item() / 4  # summed over directions
    lowest = _ROUNDING * (curvature + flat.trace().item())
    if curvature / len(weight) * 10 ** _DECADES[0] < lowest:
        raise DataError(
            f"The two sides of all {len(differences)} pairs have the same states up to rounding: "
            "there is nothing to learn from them."
        )
    return search(candidate_at, unit=curvature / len(weight), lowest=lowest)


def search(
    candidate_at: Callable[[float], Candidate], *, unit: float, lowest: float = 0.0
) -> list[Candidate]:
    """Try prior precisions by decades, then by golden sections beside the best; return all.

    Args:
        candidate_at: The posterior's maximum under a prior precision.
        unit: The precision about which the decades lie, `1e2` to `1e-8` of it.
        lowest: None below it is tried.
    """
    decades = [unit * 10.0**decade for decade in _DECADES]
    tried = [candidate_at(precision) for precision in decades if precision >= lowest]
    at = max(range(len(tried)), key=lambda i: tried[i].log_evidence)
    high, low = (
        math.log(tried[i].prior_precision) for i in (max(at - 1, 0), min(at + 1, len(tried) - 1))
    )
    golden = (math.sqrt(5) - 1) / 2

    def section(point: float) -> tuple[float, float]:
        tried.append(candidate_at(math.exp(point)))
        return point, tried[-1].log_evidence

    left, right = section(high - golden * (high - low)), section(low + golden * (high - low))
    for _ in range(_SECTIONS - 1):
        if left[1] > right[1]:
            high, right = right[0], left
            left = section(high - golden * (high - low))
        else:
            low, left = left[0], right
            right = section(low + golden * (high - low))
    return tried


def _prior(
    pairs: PairStates, precision: float, config: LaplaceConfig
) -> Float[Tensor, "hidden hidden"]:
    centring = centring_hessian(pairs.chosen, pairs.rejected, centring=config.centring)
    return centring.diagonal_scatter(centring.diagonal() + precision)


def _warn_of_an_edge(best: Candidate, tried: Sequence[Candidate]) -> None:
    precisions = sorted(one.prior_precision for one in tried)
    if len(tried) > 1 and best.prior_precision in (precisions[0], precisions[-1]):
        logger.warning(
            "The evidence is highest at the edge of the prior precisions tried, %.3g: the pairs "
            "tell nothing of it. Set prior_precision.",
            best.prior_precision,
        )


# ---- the model ---------------------------------------------------------------------------------


def _states(
    stage1: RewardModel,
    preferences: Sequence[PreferenceRow],
    config: LaplaceConfig,
    report: LoadReport | None,
) -> tuple[PairStates, PairStates]:
    """Return the states of the pairs that are learned from, and of those held out."""
    pairs = BRMEConfig(loss="bt_marginal", target="pair_prob", max_length=config.max_length)
    examples = encode_examples(stage1, preferences, pairs, report)
    split_seed = seed_of(config.seed, "laplace", "held_out")  # its own draw, as in train_brme
    sides = split_by_prompt(examples, fraction=config.held_out, seed=split_seed)
    if not sides[0]:
        raise DataError(
            f"All {len(examples)} pairs are held out: lower held_out, or give pairs of more "
            "prompts."
        )
    if config.held_out and not sides[1]:
        logger.warning("No prompt fell into the held-out share: the posterior is not judged.")
    device = stage1.device if stage1.device.type == "cuda" else torch.device("cpu")
    found = []
    for side in sides:
        states = pair_states(stage1, side, max_tokens=config.max_batch_tokens).double().to(device)
        margins = torch.tensor([e.margin for e in side], dtype=torch.float64, device=device)
        found.append(PairStates(states[:, 0], states[:, 1], margins))
    return found[0], found[1]


def _with_head(stage1: RewardModel, head: LaplaceHead) -> RewardModel:
    model = RewardModel(stage1.backbone, head, stage1.tokenizer, max_length=stage1.max_length)
    model.facts = {k: v for k, v in stage1.facts.items() if k in ("base", "training data")}
    return model.to(stage1.device).eval()


def _put_on_one_scale(
    model: RewardModel, reference: tuple[Sequence[Prompt], Sequence[Completion]]
) -> None:
    prompts, completions = reference
    fitting = [i for i, p in enumerate(prompts) if model.fits(p, completions[i])]
    some = [prompts[i] for i in fitting], [completions[i] for i in fitting]
    model.set_normalisation(*some)
    if model.members > 1:
        # A std for each draw would shrink the draws that are far out to the size of the others.
        std = model.score(*some, normalise=False).mean.std(correction=0).clamp_min(1e-6)
        model.reward_std = std.to(model.device).repeat(model.members)


# ---- numbers -----------------------------------------------------------------------------------


def _moved(before: Float[Tensor, " hidden"], after: Float[Tensor, " hidden"]) -> dict[str, float]:
    """Return how far the weights went from stage 1's, in lengths of those, and how they turned."""
    return {
        "weight/moved": ((after - before).norm() / before.norm().clamp_min(1e-12)).item(),
        "weight/cosine": F.cosine_similarity(after, before, dim=0).item(),
    }


def held_out_numbers(
    posterior: Posterior, before: Float[Tensor, " hidden"], pairs: PairStates
) -> dict[str, float]:
    """Is the posterior right about pairs that it has not seen?

    Returns:
        `held_out/` `accuracy` (of the mean weights; ties count half) and `log_loss` (nats a pair),
        both also of stage 1 (`..._stage1`); `log_loss_linked`, with the uncertainty counted in
        (`linked_probability`); `std` (mean, of a completion), `margin_std` (of a pair's margin) and
        `spearman`, the rank correlation of that with the error `1 - sigmoid(margin)`.
    """
    differences = pairs.differences
    metrics = {}
    for name, weight in (("", posterior.weight), ("_stage1", before)):
        margins = differences @ weight
        metrics[f"held_out/accuracy{name}"] = ((margins.sign() + 1) / 2).mean().item()
        metrics[f"held_out/log_loss{name}"] = -F.logsigmoid(margins).mean().item()
    margins = differences @ posterior.weight
    stds = linear_std(differences, posterior.factor)
    both = torch.cat([pairs.chosen, pairs.rejected])
    return metrics | {
        "held_out/log_loss_linked": -linked_probability(margins, stds).log().mean().item(),
        "held_out/std": linear_std(both, posterior.factor).mean().item(),
        "held_out/margin_std": stds.mean().item(),
        "held_out/spearman": rank_correlation(stds, 1 - torch.sigmoid(margins)),
    }


def _cholesky(matrix: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed):
        raise ValueError(
            "The weights' precision is not positive definite in float64: a prior_precision this "
            "small leaves directions to rounding; give a larger one."
        )
    return factor
