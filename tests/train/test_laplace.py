"""The Laplace posterior of a last layer: its equations, its prior, and the model it makes."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trueward.data.formats import DataError, LoadReport, PreferenceRow
from trueward.models.heads import ScalarHead
from trueward.models.laplace import LaplaceHead, linear_std
from trueward.models.reward_model import RewardModel
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.laplace import (
    Candidate,
    LaplaceConfig,
    PairStates,
    Posterior,
    bradley_terry_hessian,
    candidates,
    centring_hessian,
    covariance_factor,
    effective_parameters,
    fit_laplace,
    held_out_numbers,
    linked_probability,
    log_evidence,
    log_likelihood,
    map_weight,
    search,
)

TOKENIZER = make_tokenizer()


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compared(count: int, weight: Tensor, *, seed: int = 0) -> PairStates:
    """Pairs of normal states, ordered by a Bradley-Terry annotator with the given weights."""
    sides = normal(count, 2, len(weight), seed=seed)
    probability = torch.sigmoid((sides[:, 0] - sides[:, 1]) @ weight)
    generator = torch.Generator().manual_seed(seed + 1)
    first = torch.rand(count, generator=generator, dtype=torch.float64) < probability
    chosen = torch.where(first[:, None], sides[:, 0], sides[:, 1])
    rejected = torch.where(first[:, None], sides[:, 1], sides[:, 0])
    return PairStates(chosen, rejected, torch.zeros(count, dtype=torch.float64))


def eye(size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(size, dtype=torch.float64)


# ---- equations ---------------------------------------------------------------------------------


def test_the_hessian_is_that_of_the_loss_and_the_centring_term() -> None:
    pairs, weight, margins = compared(30, normal(4)), normal(4, seed=2), normal(30, seed=3)

    def loss(w: Tensor) -> Tensor:
        fit = log_likelihood(w, pairs.differences, margins=margins)
        return -fit + 0.03 * ((pairs.chosen + pairs.rejected) @ w).square().sum()

    found = bradley_terry_hessian(weight, pairs.differences, margins=margins)
    found = found + centring_hessian(pairs.chosen, pairs.rejected, centring=0.03)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, weight))


def test_the_likelihood_is_a_sum_by_hand() -> None:
    differences = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64)
    margins = torch.tensor([0.5, 0.0], dtype=torch.float64)
    by_hand = -math.log1p(math.exp(-0.5)) - math.log1p(math.exp(1.0))
    assert log_likelihood(weight, differences, margins=margins).item() == pytest.approx(by_hand)


def test_the_hessian_of_a_sure_comparison_is_small_but_not_rounded_to_zero() -> None:
    weight, differences = torch.full((1,), 60.0).double(), torch.ones(1, 1).double()
    assert bradley_terry_hessian(weight, differences).item() == pytest.approx(math.exp(-60))


@pytest.mark.parametrize("precision", [1e-3, 1.0, 1e3])
def test_the_gradient_is_zero_at_the_maximum(precision: float) -> None:
    pairs, margins = compared(200, 3 * normal(5)), normal(200, seed=4)
    prior = eye(5, precision)
    weight = map_weight(pairs.differences, prior, margins=margins)
    point = weight.clone().requires_grad_()
    loss = point @ prior @ point / 2 - log_likelihood(point, pairs.differences, margins=margins)
    loss.backward()
    assert point.grad is not None
    assert point.grad.norm() < 1e-9
    elsewhere = map_weight(pairs.differences, prior, margins=margins, start=30 * normal(5, seed=7))
    torch.testing.assert_close(elsewhere, weight)


def test_pairs_that_a_plane_separates_still_have_a_maximum() -> None:
    differences = normal(20, 3).abs()
    weight = map_weight(differences, eye(3, 1e-4))
    missing = torch.sigmoid(-differences @ weight)
    torch.testing.assert_close(1e-4 * weight, differences.T @ missing)


def test_the_factor_is_triangular_and_squares_to_the_inverse() -> None:
    pairs = compared(50, normal(6))
    hessian = eye(6, 0.3) + bradley_terry_hessian(normal(6, seed=2), pairs.differences)
    factor = covariance_factor(hessian)
    np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(hessian.numpy()), rtol=1e-10)
    assert torch.equal(factor, factor.triu())


def test_a_precision_that_is_not_positive_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="give a larger one"):
        covariance_factor(eye(2, -1.0))


@pytest.mark.parametrize(("count", "tolerance"), [(20, 0.03), (2000, 1e-3)])
def test_the_evidence_in_one_dimension_is_the_integral(count: int, tolerance: float) -> None:
    pairs = compared(count, torch.tensor([1.5], dtype=torch.float64))
    precision = 0.7
    weight = map_weight(pairs.differences, eye(1, precision))
    found = log_evidence(weight, pairs.differences, eye(1, precision)).item()
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    fits = torch.nn.functional.logsigmoid(pairs.differences * grid).sum(0)
    prior = math.log(precision / (2 * math.pi)) / 2 - precision * grid.square() / 2
    exact = (fits + prior).logsumexp(0).item() + math.log(12 / 4000)
    assert found == pytest.approx(exact, abs=tolerance)


def test_the_evidence_of_an_isotropic_prior_is_the_formula() -> None:
    pairs, weight, tau = compared(40, normal(3)), normal(3, seed=2), 0.2
    hessian = bradley_terry_hessian(weight, pairs.differences) + eye(3, tau)
    by_hand = log_likelihood(weight, pairs.differences) - tau / 2 * weight.square().sum()
    by_hand += 3 / 2 * math.log(tau) - torch.logdet(hessian) / 2
    found = log_evidence(weight, pairs.differences, eye(3, tau))
    torch.testing.assert_close(found, by_hand)


def test_effective_parameters_count_the_directions_that_the_pairs_tell_of() -> None:
    hessian = torch.diag(torch.tensor([1e6, 2.0, 1e-6], dtype=torch.float64))
    found = effective_parameters(covariance_factor(hessian + eye(3, 2.0)), hessian)
    assert found.item() == pytest.approx(1.5, abs=1e-5)  # all, half and none of a direction


def test_the_linked_probability_is_the_expected_one_nearly() -> None:
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    weights = (-z.square() / 2).softmax(0)
    means = torch.linspace(-12, 12, 97, dtype=torch.float64)
    for std in (0.0, 0.5, 2.0, 8.0):
        exact = (torch.sigmoid(means[:, None] + std * z) * weights).sum(1)
        found = linked_probability(means, torch.full_like(means, std))
        torch.testing.assert_close(found, exact, atol=0.02 if std else 1e-12, rtol=0)
    by_hand = 1 / (1 + math.exp(-1 / math.sqrt(1 + math.pi / 2)))
    found = linked_probability(torch.ones(1), torch.full((1,), 2.0))
    assert found.item() == pytest.approx(by_hand)


# ---- what the posterior knows ------------------------------------------------------------------


def posterior_of(pairs: PairStates, precision: float, centring: float = 0.0) -> Posterior:
    prior = eye(pairs.chosen.shape[1], precision)
    prior = prior + centring_hessian(pairs.chosen, pairs.rejected, centring=centring)
    weight = map_weight(pairs.differences, prior)
    hessian = prior + bradley_terry_hessian(weight, pairs.differences)
    return Posterior(weight, covariance_factor(hessian))


def test_the_std_stays_the_priors_along_directions_without_data() -> None:
    pairs = compared(500, normal(4))
    blind = pairs._replace(chosen=pairs.chosen.clone(), rejected=pairs.rejected.clone())
    blind.chosen[:, 3] = blind.rejected[:, 3] = 1.7  # the two sides of a pair never differ there
    posterior = posterior_of(blind, 0.25)
    stds = linear_std(torch.eye(4, dtype=torch.float64), posterior.factor)
    assert stds[3].item() == pytest.approx(2.0)  # 1 / sqrt(.25)
    assert (stds[:3] < 0.2).all()
    assert posterior.weight[3].item() == pytest.approx(0.0, abs=1e-9)
    # The centring term says something of the level: 2 c sum of (1.7 + 1.7)^2, at most.
    centred = linear_std(torch.eye(4, dtype=torch.float64), posterior_of(blind, 0.25, 0.01).factor)
    assert centred[3].item() < 0.15


def test_the_std_falls_like_one_over_the_root_of_the_pairs() -> None:
    state, stds = normal(4, seed=5), []
    for count in (1000, 4000, 16_000):
        posterior = posterior_of(compared(count, normal(4)), 1e-3)
        stds.append(linear_std(state, posterior.factor).item())
    assert stds[0] / stds[1] == pytest.approx(2.0, rel=0.1)
    assert stds[1] / stds[2] == pytest.approx(2.0, rel=0.1)


def test_the_std_is_the_spread_of_the_estimate_over_data_sets() -> None:
    truth, state = normal(3), normal(3, seed=5)
    found = [posterior_of(compared(400, truth, seed=10 * s), 1e-3) for s in range(200)]
    rewards = torch.stack([p.weight @ state for p in found])
    stds = torch.stack([linear_std(state, p.factor) for p in found])
    assert rewards.std().item() == pytest.approx(stds.mean().item(), rel=0.15)
    covered = ((rewards - truth @ state).abs() < 1.96 * stds).double().mean().item()
    assert covered == pytest.approx(0.95, abs=0.04)


# ---- the prior ---------------------------------------------------------------------------------


def test_the_evidence_finds_the_priors_own_scale() -> None:
    # Weights drawn with precision 1/4; with 40 of them the evidence knows it within a factor.
    pairs, start = compared(6000, 2 * normal(40, seed=3)), torch.zeros(40, dtype=torch.float64)
    tried = candidates(pairs, start, LaplaceConfig(centring=0.0))
    best = max(tried, key=lambda one: one.log_evidence)
    assert 0.12 < best.prior_precision < 0.5
    for scale in (0.5, 2.0):
        config = LaplaceConfig(centring=0.0, prior_precision=scale * best.prior_precision)
        (other,) = candidates(pairs, start, config)
        assert other.log_evidence < best.log_evidence


def test_the_search_ends_beside_the_maximum_of_the_evidence() -> None:
    def at(precision: float) -> Candidate:
        return Candidate(precision, torch.zeros(1).double(), -abs(math.log10(precision / 3e-3)))

    tried = search(at, unit=1.0)
    best = max(tried, key=lambda one: one.log_evidence)
    assert abs(math.log10(best.prior_precision / 3e-3)) < 0.05
    assert len(tried) == 20


@pytest.mark.parametrize("edge", [-1.0, 1.0])
def test_a_search_that_ends_at_an_edge_stays_within_it(edge: float) -> None:
    def at(precision: float) -> Candidate:
        return Candidate(precision, torch.zeros(1).double(), edge * math.log(precision))

    tried = search(at, unit=5.0)
    best = max(tried, key=lambda one: one.log_evidence)
    assert best.prior_precision == pytest.approx(5e2 if edge > 0 else 5e-8)


def test_without_the_refit_the_weights_stay_and_the_evidence_is_theirs() -> None:
    pairs, weight = compared(100, normal(3)), normal(3, seed=2)
    config = LaplaceConfig(refit=False, prior_precision=0.5, centring=0.02)
    (found,) = candidates(pairs, weight, config)
    assert torch.equal(found.weight, weight)
    prior = eye(3, 0.5) + centring_hessian(pairs.chosen, pairs.rejected, centring=0.02)
    wanted = log_evidence(weight, pairs.differences, prior)
    assert found.log_evidence == pytest.approx(wanted.item())
    (moved,) = candidates(pairs, weight, replace(config, refit=True))
    assert moved.log_evidence > found.log_evidence
    torch.testing.assert_close(moved.weight, map_weight(pairs.differences, prior))


def test_margins_move_the_maximum() -> None:
    pairs, config = compared(100, normal(3)), LaplaceConfig(prior_precision=0.5)
    start = torch.zeros(3, dtype=torch.float64)
    (plain,) = candidates(pairs, start, config)
    (wide,) = candidates(pairs._replace(margins=torch.ones(100).double()), start, config)
    assert wide.weight.norm() > 1.2 * plain.weight.norm()


# ---- numbers -----------------------------------------------------------------------------------


def test_numbers_on_held_out_pairs_by_hand() -> None:
    chosen = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    rejected = torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    pairs = PairStates(chosen, rejected, torch.zeros(3).double())
    posterior = Posterior(torch.ones(2).double(), torch.diag(torch.tensor([1.0, 0.5])).double())
    before = torch.tensor([0.0, -1.0], dtype=torch.float64)
    metrics = held_out_numbers(posterior, before, pairs)

    def loss(*margins: float) -> float:
        return sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)

    linked = (2 / math.sqrt(1 + math.pi / 2), -1 / math.sqrt(1 + math.pi / 32), 0.0)
    assert metrics == pytest.approx(
        {
            "held_out/accuracy": 0.5,  # margins 2, -1, 0
            "held_out/accuracy_stage1": 2 / 3,  # 0, 1, 0
            "held_out/log_loss": loss(2, -1, 0),
            "held_out/log_loss_stage1": loss(0, 1, 0),
            "held_out/log_loss_linked": loss(*linked),
            "held_out/std": (2 + 0 + 0.5 + 1 + 1 + 1) / 6,
            "held_out/margin_std": (2 + 0.5 + 0) / 3,
            "held_out/spearman": -0.5,  # stds 2, .5, 0; errors .12, .73, .5
        }
    )


# ---- the model ---------------------------------------------------------------------------------


def rows(count: int = 60) -> list[PreferenceRow]:
    return [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(tiny_preferences(count))]


def new_stage1() -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER).eval()


def laplace_head(model: RewardModel) -> LaplaceHead:
    assert isinstance(model.head, LaplaceHead)
    return model.head


def test_a_run_writes_each_prior_tried_and_what_came_of_the_best(tmp_path: Path) -> None:
    model = fit_laplace(
        new_stage1(),
        rows(),
        LaplaceConfig(members=0, held_out=0.3),
        output_dir=tmp_path,
        evaluation=lambda model: {"mine": float(model.members)},
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    metrics = summary["metrics"]
    assert summary["command"] == "laplace"
    assert [line["step"] for line in lines] == list(range(1, 22))
    best = max(lines[:-1], key=lambda line: line["log_evidence"])
    assert metrics["prior_precision"] == best["prior_precision"] == lines[-1]["prior_precision"]
    assert metrics["pairs"] + metrics["held_out_pairs"] == 60
    assert metrics["weight/moved"] > 0.1
    assert -1 <= metrics["weight/cosine"] < 0.99
    assert 0 < metrics["effective_parameters"] < 32
    # Stage 1's head is a fresh one: the refit learns what "chosen" means here.
    assert metrics["held_out/accuracy"] > metrics["held_out/accuracy_stage1"] + 0.1
    assert metrics["mine"] == 1.0
    assert model.facts["pairs"] == metrics["pairs"]


def test_the_model_is_stage_1_with_the_posterior_for_a_head() -> None:
    stage1, data = new_stage1(), rows()
    before = {k: v.clone() for k, v in stage1.state_dict().items()}
    config = LaplaceConfig(members=0, refit=False, prior_precision=0.5, centring=0.0, held_out=0.0)
    model = fit_laplace(stage1, data, config)
    for name, value in stage1.state_dict().items():
        assert torch.equal(value, before[name]), name
    prompts, answers = tiny_texts(9, seed=4), tiny_texts(9, seed=5)
    found = model.score(prompts, answers, normalise=False)
    torch.testing.assert_close(found.means, stage1.score(prompts, answers, normalise=False).means)
    # The same Gaussian from the states, as `score` computes them one by one.
    sides = [[r.chosen for r in data], [r.rejected for r in data]]
    asked = [r.prompt for r in data]
    states = [states_of(stage1, asked, side).double() for side in sides]
    assert isinstance(stage1.head, ScalarHead)
    weight = stage1.head.linear.weight.detach()[0].double()
    hessian = eye(32, 0.5) + bradley_terry_hessian(weight, states[0] - states[1])
    fresh = states_of(stage1, prompts, answers).double()
    wanted = torch.einsum("bi,ij,bj->b", fresh, torch.linalg.inv(hessian), fresh).sqrt()
    assert found.stds is not None
    torch.testing.assert_close(found.stds[:, 0].double(), wanted, rtol=1e-3, atol=0)


def states_of(model: RewardModel, prompts: list[Any], answers: list[Any]) -> Tensor:
    """States through the head that is the identity."""
    head = LaplaceHead(32, 32)
    head.draws.copy_(torch.eye(32))
    model = RewardModel(model.backbone, head, TOKENIZER)
    return model.score(prompts, answers, normalise=False).means


def test_draws_share_one_unit_and_have_each_its_own_level() -> None:
    model = fit_laplace(new_stage1(), rows(), LaplaceConfig(members=5, prior_precision=0.1))
    reference = [r.prompt for r in rows() for _ in "cr"]
    answers = [side for r in rows() for side in (r.chosen, r.rejected)]
    posterior = model.score(reference, answers)
    assert posterior.members == 5
    torch.testing.assert_close(posterior.means.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    assert posterior.mean.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    spreads = posterior.means.std(0, correction=0)
    assert (spreads > 1.0).any()
    assert spreads.max() > 1.02 * spreads.min()
    weight = laplace_head(model).weight
    raw = model.score(reference, answers, normalise=False)
    torch.testing.assert_close(raw.mean, states_of(model, reference, answers) @ weight)


def test_an_evidence_that_the_pairs_leave_open_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    both_ways = [*tiny_preferences(12), *((p, r, c) for p, c, r in tiny_preferences(12))]
    with caplog.at_level(logging.WARNING):
        model = fit_laplace(
            new_stage1(), [PreferenceRow(*row) for row in both_ways], LaplaceConfig(held_out=0.0)
        )
    assert "the pairs tell nothing of it. Set prior_precision" in caplog.text
    assert laplace_head(model).weight.abs().max() < 1e-6


def test_pairs_of_equal_sides_are_refused() -> None:
    same = [PreferenceRow(p, c, c) for p, c, _ in tiny_preferences(12)]
    with pytest.raises(DataError, match="of all 12 pairs have the same states up to rounding"):
        fit_laplace(new_stage1(), same, LaplaceConfig(held_out=0.0))


def test_no_precision_below_the_lowest_is_tried() -> None:
    def at(precision: float) -> Candidate:
        return Candidate(precision, torch.zeros(1).double(), -math.log(precision))

    tried = [one.prior_precision for one in search(at, unit=1.0, lowest=0.5e-3)]
    assert min(tried) == pytest.approx(1e-3)


def test_a_pair_that_does_not_fit_is_counted_by_its_line(tmp_path: Path) -> None:
    report = LoadReport("made")
    long = PreferenceRow("p", "cat " * 400, "dog", where="file.jsonl:17")
    config = LaplaceConfig(max_length=64, prior_precision=1.0)
    fit_laplace(new_stage1(), [*rows(20), long], config, output_dir=tmp_path, report=report)
    assert "file.jsonl:17" in report.summary()
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["overlong_pairs"] == 1


def test_a_killed_run_writes_its_lines_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LaplaceConfig(members=2, held_out=0.2)
    whole = fit_laplace(new_stage1(), rows(), config, output_dir=tmp_path / "whole")
    save = RewardModel.save_pretrained

    def dying(self: RewardModel, path: str | Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardModel, "save_pretrained", dying)
    with pytest.raises(KeyboardInterrupt):
        fit_laplace(new_stage1(), rows(), config, output_dir=tmp_path / "killed")
    monkeypatch.setattr(RewardModel, "save_pretrained", save)
    again = fit_laplace(new_stage1(), rows(), config, output_dir=tmp_path / "killed")
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert torch.equal(laplace_head(whole).draws, laplace_head(again).draws)


LOADING = """
import sys, torch
torch.set_num_threads(1)
from trueward import RewardModel
out = {}
for name in ("gaussian", "draws"):
    model = RewardModel.from_pretrained(f"{sys.argv[1]}/{name}/model")
    posterior = model.score(["the cat", "a dog sees"], ["runs cat cat", "sleeps"])
    out[f"{name}.means"] = posterior.means
    if posterior.stds is not None:
        out[f"{name}.stds"] = posterior.stds
from safetensors.torch import save_file
save_file(out, sys.argv[1] + "/found.safetensors")
"""


def test_another_process_reads_the_same_posterior(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    wanted = {}
    for name, members in (("gaussian", 0), ("draws", 3)):
        config = LaplaceConfig(members=members, prior_precision=0.3)
        model = fit_laplace(new_stage1(), rows(), config, output_dir=tmp_path / name)
        posterior = model.score(["the cat", "a dog sees"], ["runs cat cat", "sleeps"])
        wanted[f"{name}.means"] = posterior.means
        if posterior.stds is not None:
            wanted[f"{name}.stds"] = posterior.stds
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == wanted.keys() == {"gaussian.means", "gaussian.stds", "draws.means"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": -1}, "members must be at least 0, got -1"),
        ({"prior_precision": 0.0}, "prior_precision must be above 0"),
        ({"prior_precision": math.inf}, "leave it out to choose it"),
        ({"centring": -0.1}, "centring must be at least 0"),
        ({"held_out": 1.0}, "held_out must lie in"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaplaceConfig(**options)


def test_a_stage_1_without_a_scalar_head_is_refused() -> None:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    heads = RewardModel.from_backbone(backbone, TOKENIZER, members=2)
    with pytest.raises(DataError, match="one scalar head"):
        fit_laplace(heads, rows(), LaplaceConfig())
