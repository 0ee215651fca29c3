"""EBRM: which pairs it learns from, what it learns, exact resume, and the model it makes."""

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trueward.data.formats import DataError, LoadReport, PreferenceRow
from trueward.losses.energy import nce_candidates, nce_loss, noise_log_density
from trueward.models.energy import EnergyHead
from trueward.models.heads import ScalarHead
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train import loop
from trueward.train.energy import (
    PRESETS,
    EnergyConfig,
    agreeing,
    held_out_metrics,
    train_energy,
)
from trueward.train.loop import LoopConfig, seed_of

TOKENIZER = make_tokenizer()
SMALL: dict[str, Any] = {
    "progress": False,
    "reward_widths": (4, 8),
    "widths": (32, 16),
    "noise_samples": 16,
    "batch_size": 16,
    "epochs": 1.0,
}


def new_base(*, members: int = 0) -> RewardModel:
    """A random model, whose head orders the made pairs at random; its weights are not small."""
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members).eval()


def rows(count: int = 40, *, seed: int = 0) -> list[PreferenceRow]:
    made = tiny_preferences(count, seed=seed)
    return [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(made)]


def small(**changes: Any) -> EnergyConfig:
    return EnergyConfig(**(SMALL | changes))


def margins_of(base: RewardModel, data: list[PreferenceRow]) -> Tensor:
    prompts = [r.prompt for r in data]
    chosen, rejected = ([getattr(r, side) for r in data] for side in ("chosen", "rejected"))
    return base.score(prompts, chosen).mean - base.score(prompts, rejected).mean


def weights_of(model: RewardModel) -> Tensor:
    assert isinstance(model.head, EnergyHead)
    return torch.cat([v.flatten() for v in model.head.state_dict().values()])


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


# ---- configuration -----------------------------------------------------------------------------


def test_the_papers_values() -> None:
    paper = EnergyConfig.paper()
    assert (paper.reward_widths, paper.widths, paper.dropout) == ((16, 32, 64), (1024, 512), 0.5)
    assert (paper.noise_stds, paper.noise_samples, paper.beta) == ((3.5,), 768, 0.1)
    assert (paper.regularisation, paper.epochs, paper.batch_size) == (0.05, 5.0, 256)
    assert (paper.learning_rate, paper.weight_decay) == (9e-5, 1e-2)
    assert (paper.schedule, paper.warmup_ratio, paper.max_grad_norm) == ("constant", 0.0, 0.0)
    assert (paper.ascent_steps, paper.step_size, paper.shrink) == (50, 0.5, 0.1)
    assert (paper.trusted, paper.reward_scale) == (2.0, 1.0)
    defaults = EnergyConfig()
    differing = {
        f.name
        for f in dataclasses.fields(EnergyConfig)
        if getattr(paper, f.name) != getattr(defaults, f.name)
    }
    assert differing == set(PRESETS["paper"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_stds": ()}, "noise_stds needs at least one"),
        ({"noise_stds": (1.0, 0.0)}, "noise_stds needs at least one std, all above 0"),
        ({"noise_samples": 0}, "noise_samples must be at least 1"),
        ({"beta": -0.1}, "beta must be at least 0"),
        ({"regularisation": -1.0}, "regularisation must be at least 0"),
        ({"held_out": 1.0}, "held_out must lie"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"trusted": 9.0}, "trusted must lie between 0 and limit"),
        ({"reward_scale": 0.0}, "reward_scale must be above 0"),
        ({"widths": ()}, "at least one layer each"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyConfig(**options)


# Beside the loop's own options, which have their own tests.
CHANGES: dict[str, Any] = {
    "reward_widths": (4, 9),
    "widths": (32, 17),
    "dropout": 0.3,
    "reward_scale": 2.0,
    "noise_stds": (1.0, 3.5),
    "noise_samples": 5,
    "beta": 0.5,
    "regularisation": 0.5,
    "trusted": 0.0,
    "limit": 5.0,
    "ascent_steps": 1,
    "step_size": 0.5,
    "learning_rate": 1e-2,
    "weight_decay": 0.5,
    "warmup_ratio": 0.9,
    "schedule": "linear",
    "epochs": 2.0,
    "batch_size": 8,
    "max_length": 24,
    "held_out": 0.4,
    "seed": 1,
}


SHORT = {"ascent_steps": 3, "step_size": 5.0}  # an ascent that has not arrived


@pytest.fixture(scope="module")
def untouched() -> list[Tensor]:
    return outcome(small(**SHORT))


def outcome(config: EnergyConfig) -> list[Tensor]:
    model = train_energy(new_base(), rows(), config)
    posterior = model.score(tiny_texts(20, seed=3), tiny_texts(20, seed=4))
    assert posterior.stds is not None
    return [weights_of(model), posterior.means, posterior.stds]


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_the_result(name: str, untouched: list[Tensor]) -> None:
    found = outcome(small(**(SHORT | {name: CHANGES[name]})))
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, untouched, strict=True)]
    assert not all(same)


def test_no_option_is_left_untested() -> None:
    own = {f.name for f in dataclasses.fields(EnergyConfig)}
    inherited = {f.name for f in dataclasses.fields(LoopConfig)}
    assert own - inherited - set(CHANGES) == {
        "evaluate_every",  # see the test of the log
        "shrink",  # see the next
    }


def test_the_head_has_the_options_of_the_configuration() -> None:
    options = {
        "reward_widths": (5, 3),
        "widths": (9,),
        "dropout": 0.2,
        "reward_scale": 3.0,
        "trusted": 1.0,
        "limit": 4.0,
        "step_size": 0.3,
        "shrink": 0.4,
    }
    described = EnergyConfig(ascent_steps=7, **options).head(6).describe()
    wanted = options | {"reward_widths": [5, 3], "widths": [9], "steps": 7}
    assert described.items() >= wanted.items()


# ---- which pairs -------------------------------------------------------------------------------


def test_a_pair_is_kept_where_the_chosen_side_has_the_higher_reward() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -2.0]])
    assert agreeing(rewards).tolist() == [True, False, False, True]


def test_conflicts_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    base, data = new_base(), rows(60)
    data[7] = replace(data[7], rejected="cat " * 400)
    fitting = [r for r in data if r is not data[7]]
    wrong = {r.where for r, m in zip(fitting, margins_of(base, fitting), strict=True) if m <= 0}
    assert 10 < len(wrong) < 50
    report = LoadReport("made")
    config = small(held_out=0.0, max_length=256)
    train_energy(base, data, config, output_dir=tmp_path, report=report)
    listed = {
        kind: {p.where for p in report.problems if p.kind == kind} for kind in report.counts()
    }
    assert listed == {"over-long": {"made:7"}, "conflict": wrong}
    summary = summary_of(tmp_path)
    assert summary["pairs"] == 59 - len(wrong)
    assert summary["conflicting_pairs"] == len(wrong)
    assert (summary["held_out_pairs"], summary["overlong_pairs"]) == (0, 1)
    assert summary["steps"] == math.ceil(2 * (59 - len(wrong)) / 16)


def test_held_out_pairs_are_judged_conflicts_and_all(tmp_path: Path) -> None:
    report, data = LoadReport("made"), rows(80)
    train_energy(new_base(), data, small(held_out=0.4), output_dir=tmp_path, report=report)
    summary = summary_of(tmp_path)
    assert 15 < summary["held_out_pairs"] < 50
    assert summary["pairs"] + summary["conflicting_pairs"] + summary["held_out_pairs"] == 80
    assert report.counts() == {"conflict": summary["conflicting_pairs"]}
    assert 0.2 < summary["held_out/accuracy_base"] < 0.8  # of the pairs that agree it would be 1


def test_nothing_but_the_pairs_that_agree_is_learned_from() -> None:
    base, data = new_base(), rows(40)
    agreed = [r for r, m in zip(data, margins_of(base, data), strict=True) if m > 0]
    config = small(held_out=0.0, epochs=2.0)
    one, other = (train_energy(base, some, config) for some in (data, agreed))
    assert torch.equal(weights_of(one), weights_of(other))
    assert isinstance(one.head, EnergyHead)
    prompts = [r.prompt for r in agreed]
    sides = [base.score(prompts, [getattr(r, s) for r in agreed]) for s in ("chosen", "rejected")]
    rewards = RewardPosterior.cat(sides).mean
    torch.testing.assert_close(one.head.base_mean, rewards.mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.head.base_std, rewards.std(correction=0), rtol=1e-3, atol=1e-4)


def test_pairs_that_are_all_conflicts_or_all_held_out_are_refused() -> None:
    base, data = new_base(), rows(40)
    wrong = [r for r, m in zip(data, margins_of(base, data), strict=True) if m < 0]
    with pytest.raises(DataError, match=rf"orders all {len(wrong)} training pairs wrongly"):
        train_energy(base, wrong, small(held_out=0.0))
    with pytest.raises(DataError, match="All 3 pairs are held out: lower held_out"):
        train_energy(base, data[:3], small(held_out=1 - 1e-9))


def test_a_base_without_a_scalar_head_is_refused() -> None:
    with pytest.raises(DataError, match="one scalar head"):
        train_energy(new_base(members=2), rows(8), small())


# ---- what is learned ---------------------------------------------------------------------------


def test_the_first_loss_is_the_equation_on_the_standardised_base_reward(tmp_path: Path) -> None:
    base, data = new_base(), rows(16)
    agreed = [r for r, m in zip(data, margins_of(base, data), strict=True) if m > 0]
    config = small(
        held_out=0.0, dropout=0.0, batch_size=100, reward_scale=2.0, noise_stds=(1.0, 3.5)
    )
    train_energy(base, data, config, output_dir=tmp_path)
    prompts = [r.prompt for r in agreed for _ in "cr"]
    sides = [c for r in agreed for c in (r.chosen, r.rejected)]
    raw = base.score(prompts, sides).mean
    rewards = 2 * (raw - raw.mean()) / raw.std(correction=0)
    states = torch.stack([states_of(base, p, c) for p, c in zip(prompts, sides, strict=True)])
    inputs = (states - states.mean(0)) / states.std(0, correction=0)
    order = loop.permutation(len(sides), config.seed, "energy", 0)
    rewards, inputs = rewards[order], inputs[order]
    generator = torch.Generator().manual_seed(seed_of(config.seed, "energy", "noise", 1))
    candidates = nce_candidates(
        rewards, stds=config.noise_stds, beta=0.1, samples=16, generator=generator
    )
    with torch.no_grad():  # the untrained network of the seed
        energies = config.head(32).network(inputs, candidates)
    log_noise = noise_log_density(candidates, rewards, stds=config.noise_stds)
    wanted = nce_loss(energies, log_noise, regularisation=0.05).mean().item()
    first = metrics_of(tmp_path)[0]
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)
    assert first["nce"] == pytest.approx(nce_loss(energies, log_noise).mean().item(), rel=1e-4)
    assert first["mean_f"] == pytest.approx(energies.mean().item(), rel=1e-3)


def states_of(model: RewardModel, prompt: str, completion: str) -> Tensor:
    found = []
    hidden = model.hidden

    def kept(batch: Any) -> Tensor:
        found.append(hidden(batch))
        return found[-1]

    model.hidden = kept  # type: ignore[method-assign]
    model.score([prompt], [completion])
    del model.hidden
    return found[0][0]


def test_the_mode_follows_the_base_and_the_width_grows_off_the_data() -> None:
    base, data = new_base(), rows(120)
    config = small(epochs=30.0, noise_samples=32, batch_size=32, learning_rate=1e-2, dropout=0.0)
    model = train_energy(base, data, config)
    assert isinstance(model.head, EnergyHead)
    fresh = rows(60, seed=5)
    prompts, sides = [r.prompt for r in fresh], [r.chosen for r in fresh]
    found, wanted = model.score(prompts, sides), base.score(prompts, sides).mean
    assert found.stds is not None
    assert torch.corrcoef(torch.stack([found.means[:, 0], wanted]))[0, 1] > 0.9
    error = (found.means[:, 0] - wanted).abs().mean() / model.head.base_std
    assert error < 0.35
    states = torch.stack([states_of(base, p, c) for p, c in zip(prompts, sides, strict=True)])
    centre = states.mean(0)
    near, far = (model.head(centre + by * (states - centre)).stds.mean() for by in (1, 6))
    assert near < 2 * model.head.base_std < far


def test_the_base_stays_as_it_was_to_the_last_bit() -> None:
    base, before = new_base(), new_base()
    model = train_energy(base, rows(), small(epochs=4.0))
    for (name, was), now in zip(before.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(was, now), name
        assert now.requires_grad
    assert model.backbone is base.backbone
    assert isinstance(model.head, EnergyHead)
    assert isinstance(before.head, ScalarHead)
    assert torch.equal(model.head.weight, before.head.linear.weight[0])
    start = small().head(32).network.parameters()
    moved = [
        not torch.equal(a, b) for a, b in zip(start, model.head.network.parameters(), strict=True)
    ]
    assert all(moved)


def test_examples_computed_in_parts_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(dropout=0.0, epochs=1.0)
    whole = train_energy(new_base(), rows(), config)
    monkeypatch.setattr("trueward.train.energy._ENERGIES_AT_ONCE", 3 * 17)
    parts = train_energy(new_base(), rows(), config)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), atol=1e-4, rtol=1e-3)


def test_every_epoch_has_an_order_and_every_step_a_noise_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders, seeds = [], []
    permutation = loop.permutation
    monkeypatch.setattr(
        "trueward.train.energy.permutation",
        lambda n, *parts: orders.append(permutation(n, *parts)) or orders[-1],
    )
    monkeypatch.setattr(
        "trueward.train.energy.seed_of",
        lambda *parts: seeds.append(parts) or seed_of(*parts),
    )
    train_energy(new_base(), rows(), small(epochs=3.0))
    assert len({str(order) for order in orders}) == 3
    noise = [parts for parts in seeds if "noise" in parts]
    assert len(noise) == len(set(noise)) == len(orders) > 3


# ---- the run and the model ---------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_killed_run_goes_on_as_if_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    config = small(checkpoint_every=3, evaluate_every=2, epochs=3.0, dropout=dropout, held_out=0.2)
    whole = train_energy(new_base(), rows(), config, output_dir=tmp_path / "whole")
    saved = loop.Loop.checkpoint

    def dying(self: loop.Loop) -> None:
        saved(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_energy(new_base(), rows(), config, output_dir=tmp_path / "killed")
    monkeypatch.setattr(loop.Loop, "checkpoint", saved)
    resumed = train_energy(new_base(), rows(), config, output_dir=tmp_path / "killed")
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert torch.equal(whole.reward_mean, resumed.reward_mean)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


def test_evaluations_stand_in_the_log_and_the_last_in_the_summary(tmp_path: Path) -> None:
    config = small(evaluate_every=2, epochs=3.0, batch_size=16, held_out=0.3)
    model = train_energy(
        new_base(), rows(), config, output_dir=tmp_path, evaluation=lambda model: {"mine": 7.0}
    )
    lines, summary = metrics_of(tmp_path), summary_of(tmp_path)
    last = len(lines)
    judged = [line["step"] for line in lines if "held_out/width" in line]
    assert judged == sorted({*range(2, last + 1, 2), last})
    for name in ("accuracy_base", "accuracy", "moved", "move", "width", "spearman"):
        assert summary[f"held_out/{name}"] == lines[-1][f"held_out/{name}"]
    assert {"loss", "nce", "mean_f", "grad_norm", "epoch"} < set(lines[0])
    assert summary["mine"] == 7.0
    assert model.facts["pairs"] == summary["pairs"]


def test_the_scale_is_that_of_the_modes_on_the_reference_samples() -> None:
    reference = (tiny_texts(20), tiny_texts(20, seed=3))
    model = train_energy(new_base(), rows(), small(), reference=reference)
    means = model.score(*reference, normalise=False).means
    torch.testing.assert_close(model.reward_mean, means.mean(0))
    torch.testing.assert_close(model.reward_std, means.std(0, correction=0))
    assert not model.training


def test_a_score_does_not_depend_on_its_batch() -> None:
    model = train_energy(new_base(), rows(), small(epochs=3.0))
    prompts, answers = tiny_texts(12, seed=4), tiny_texts(12, seed=5)
    whole = model.score(prompts, answers)
    for options in ({"batch_size": 1}, {"shared_prefix": False}, {"max_tokens": 64}):
        other = model.score(prompts, answers, **options)
        torch.testing.assert_close(other.means, whole.means, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.stds, whole.stds, atol=1e-4, rtol=1e-4)
    backwards = model.score(prompts[::-1], answers[::-1])
    torch.testing.assert_close(backwards.means.flip(0), whole.means, atol=1e-4, rtol=1e-4)


LOADING = """
import sys, torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from trueward import RewardModel
model = RewardModel.from_pretrained(sys.argv[1] + "/model")
posterior = model.score(["the cat", "a dog sees"], ["runs cat cat", "sleeps"])
found = {"means": posterior.means, "stds": posterior.stds}
save_file(found, sys.argv[1] + "/found.safetensors")
"""


def test_another_process_reads_the_same_posterior(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = train_energy(new_base(), rows(), small(epochs=3.0), output_dir=tmp_path)
    wanted = model.score(["the cat", "a dog sees"], ["runs cat cat", "sleeps"])
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    torch.testing.assert_close(found["means"], wanted.means, rtol=1e-5, atol=1e-5)
    assert wanted.stds is not None
    torch.testing.assert_close(found["stds"], wanted.stds, rtol=1e-5, atol=1e-5)


# ---- numbers -----------------------------------------------------------------------------------


def test_numbers_on_held_out_pairs_by_hand() -> None:
    base_rewards = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    means = torch.tensor([[3.0], [1.1], [2.0], [1.9], [1.0], [4.0]])  # margins 1.9, .1, -3
    stds = torch.tensor([[3.0], [4.0], [0.6], [0.8], [0.0], [2.0]])  # of the margins 5, 1, 2
    metrics = held_out_metrics(RewardPosterior(means, stds), base_rewards, base_std=2.0)
    assert metrics == pytest.approx(
        {
            "held_out/accuracy_base": 0.5,  # 2, -2, 0
            "held_out/accuracy": 2 / 3,
            "held_out/moved": 2 / 6,  # moves 0, .05, 1, .05, 0, 1.5 of a std
            "held_out/move": 2.6 / 6,
            "held_out/width": 10.4 / 12,
            "held_out/spearman": -0.5,  # errors' order 1, 2, 3 against stds' 3, 1, 2
        }
    )
