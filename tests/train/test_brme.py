"""BRME's second stage: which losses learn a std, whose pairs a member sees, exact resume."""

import dataclasses
import json
import logging
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from trueward import evaluate
from trueward.data.formats import DataError, LoadReport, PreferenceRow
from trueward.losses.uncertainty import gaussian_nll_loss
from trueward.models.heads import GaussianHeads
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train import brme, loop
from trueward.train.brme import (
    BRMEConfig,
    brier_reparam_loss,
    encode_examples,
    example_losses,
    held_out_metrics,
    rank_correlation,
    train_brme,
    with_gaussian_heads,
)
from trueward.train.loop import LoopConfig
from trueward.train.reward import member_subsets

TOKENIZER = make_tokenizer()
QUIET: dict[str, Any] = {"progress": False, "members": 3}


def new_stage1(seed: int = 0, members: int = 0) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER), seed=seed)
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members, seed=seed)


def rated(count: int = 24, seed: int = 0) -> list[PreferenceRow]:
    """Pairs with made ratings between 0 and 10; every third has a margin."""
    generator = torch.Generator().manual_seed(seed)
    ratings = (10 * torch.rand(count, 2, generator=generator)).tolist()
    return [
        PreferenceRow(
            *row,
            margin=0.5 if i % 3 == 0 else None,
            where=f"made:{i}",
            extra={"score_chosen": max(r), "score_rejected": min(r)},
        )
        for i, (row, r) in enumerate(zip(tiny_preferences(count), ratings, strict=True))
    ]


def small(config: BRMEConfig, **changes: Any) -> BRMEConfig:
    return replace(config, **({"batch_size": 8, "epochs": 2.0} | QUIET | changes))


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def head_of(model: RewardModel) -> GaussianHeads:
    assert isinstance(model.head, GaussianHeads)
    return model.head


def weights_of(model: RewardModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- configuration -----------------------------------------------------------------------------


def test_the_faithful_preset_is_the_papers_and_the_sound_one_can_learn_a_std():
    faithful, sound = BRMEConfig.faithful(), BRMEConfig.sound()
    assert (faithful.loss, faithful.target) == ("mse_reparam", "stage1_score")
    assert (sound.loss, sound.target) == ("gaussian_nll", "rating")
    assert faithful.members == sound.members == 5
    assert 0 < sound.subset < 1
    assert math.log(faithful.std_floor) == pytest.approx(-5.0)
    assert faithful.freeze_backbone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bt_marginal"}, "loss=bt_marginal cannot learn from target=stage1_score"),
        ({"loss": "bt_reparam", "target": "rating"}, "need target=pair_prob"),
        ({"loss": "gaussian_nll", "target": "pair_prob"}, "gaussian_nll needs stage1_score or"),
        ({"std_floor": 1e-3}, "std_floor must lie in"),
        ({"std_floor": 8.0}, "std_floor must lie in"),
        ({"freeze_backbone": False, "lora_rank": 2}, "lora_rank=0"),
        ({"members": 0}, "members must be at least 1"),
        ({"subset": 0.0}, "subset must lie"),
        ({"held_out": 1.0}, "held_out must lie"),
        ({"head_dropout": 1.0}, "head_dropout must lie"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        BRMEConfig(**options)


# Beside the loop's own options, which have their own tests: one run, and one with another value.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "members": ({}, 2),
    "loss": ({"target": "rating"}, "gaussian_nll"),
    "target": ({}, "rating"),
    "rating_columns": ({"target": "rating"}, ("score_rejected", "score_chosen")),
    "subset": ({}, 0.4),
    "head_dropout": ({}, 0.3),
    "std_floor": ({}, 1.5),
    "freeze_backbone": ({}, False),
    "lora_rank": ({}, 2),
    "centring": ({"target": "pair_prob"}, 1.0),
    "learning_rate": ({}, 1e-2),
    "epochs": ({}, 1.0),
    "batch_size": ({}, 4),
    "max_length": ({}, 20),
    "held_out": ({}, 0.4),
    "seed": ({}, 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_the_result(name: str):
    common, value = CHANGES[name]
    config = small(BRMEConfig(), **{"batch_size": 8, "epochs": 0.4} | common)
    outcomes = [
        weights_of(train_brme(new_stage1(), rated(), some))
        for some in (config, replace(config, **{name: value}))
    ]
    assert outcomes[0].shape != outcomes[1].shape or not torch.equal(*outcomes)


def test_no_option_is_left_untested():
    own = {f.name for f in dataclasses.fields(BRMEConfig)}
    inherited = {f.name for f in dataclasses.fields(LoopConfig)} - {"learning_rate", "seed"}
    assert own - inherited - set(CHANGES) == {"evaluate_every"}  # see the test of the log


# ---- stds --------------------------------------------------------------------------------------

NOISE = {"cat": 0.3, "dog": 1.2}  # of the rating, by the word that a completion repeats


def noisily_rated(count: int = 400) -> list[PreferenceRow]:
    """Cats are worth 1 and dogs -1, but annotators agree on cats far better than on dogs."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(0)).tolist()
    sides = " ".join(["cat"] * 6), " ".join(["dog"] * 6)
    return [
        PreferenceRow(
            prompt,
            *sides,
            extra={
                "score_chosen": 5 + 2 * (1 + NOISE["cat"] * cat),
                "score_rejected": 5 + 2 * (-1 + NOISE["dog"] * dog),
            },
        )
        for prompt, (cat, dog) in zip(tiny_texts(count, words=(1, 2)), noise, strict=True)
    ]


@cache
def learned(loss: str, std_floor: float = math.exp(-5)) -> tuple[RewardModel, list[dict]]:
    """Train on the noisy ratings; return the model and the lines with numbers on held-out pairs."""
    config = BRMEConfig(
        loss=loss,  # type: ignore[arg-type]
        target="rating",
        std_floor=std_floor,
        epochs=32.0,
        learning_rate=1e-2,
        max_grad_norm=0.0,
        evaluate_every=88,
        log_every=88,
        **QUIET,
    )
    with TemporaryDirectory() as folder:
        model = train_brme(new_stage1(), noisily_rated(), config, output_dir=folder)
        rows = metrics_of(Path(folder))
    return model, [row for row in rows if "held_out/std" in row]


def test_the_likelihood_learns_the_noise_of_the_ratings():
    model, rows = learned("gaussian_nll")
    ratings = torch.tensor(
        [[r.extra["score_chosen"], r.extra["score_rejected"]] for r in noisily_rated()]
    )
    prompts = tiny_texts(40, seed=9, words=(1, 2))
    for side, word in enumerate(NOISE):
        made = (ratings - ratings.mean()) / ratings.std(correction=0)
        posterior = model.score(prompts, [" ".join([word] * 6)] * 40, normalise=False)
        std, mean = made[:, side].std().item(), made[:, side].mean().item()
        for member in range(3):
            assert posterior.stds[:, member].mean().item() == pytest.approx(std, rel=0.15)
            assert posterior.means[:, member].mean().item() == pytest.approx(mean, abs=0.15)
    assert all(row["held_out/at_floor"] == 0 for row in rows)
    assert rows[-1]["held_out/spearman"] > 0.5
    assert all(rows[-1][f"held_out/spearman_{k}"] > 0.5 for k in range(3))
    assert rows[-1]["held_out/std"] == pytest.approx(0.6, abs=0.1)


def test_the_reparameterised_error_drives_every_std_down_whatever_the_noise():
    rows = learned("mse_reparam")[1]
    stds = [[row[f"held_out/std_{k}"] for row in rows] for k in range(3)]
    for falling in stds:
        assert all(after < before for before, after in pairwise(falling))
        assert falling[-1] < 0.05  # the noise is .22 and .88 in these units


def test_nothing_pushes_a_collapsed_std_further_once_it_is_below_the_floor():
    rows = learned("mse_reparam", 0.25)[1]
    assert rows[-1]["held_out/at_floor"] == 1.0
    assert rows[-1]["held_out/std"] == rows[-2]["held_out/std"] > 0.03
    assert rows[-1]["held_out/std"] > 1.3 * learned("mse_reparam")[1][-1]["held_out/std"]


def test_members_learn_stage_1s_score_exactly_so_that_no_std_is_left(
    caplog: pytest.LogCaptureFixture,
):
    config = small(BRMEConfig(loss="gaussian_nll"), epochs=60.0, learning_rate=1e-2, batch_size=32)
    stage1, rows = new_stage1(), rated(120)
    with caplog.at_level(logging.WARNING):
        model = train_brme(stage1, rows, config)
    assert "Stage 1's score has no noise" in caplog.text
    fresh = rated(40, seed=3)
    prompts, answers = [r.prompt for r in fresh], [r.chosen for r in fresh]
    posterior, wanted = model.score(prompts, answers), stage1.score(prompts, answers).mean
    for member in range(3):
        assert torch.corrcoef(torch.stack([posterior.means[:, member], wanted]))[0, 1] > 0.97
    assert posterior.stds.mean() < 0.2


def test_the_marginal_likelihood_of_comparisons_needs_no_ratings(tmp_path: Path):
    rows = [replace(r, extra={}) for r in rated(96)]
    config = small(
        BRMEConfig(loss="bt_marginal", target="pair_prob"), epochs=10.0, learning_rate=2e-2
    )
    train_brme(new_stage1(), rows, config, output_dir=tmp_path)
    last = metrics_of(tmp_path)[-1]
    assert last["held_out/accuracy"] > 0.8
    assert last["held_out/at_floor"] == 0


# ---- losses ------------------------------------------------------------------------------------


def test_the_squared_error_of_a_probability_by_hand():
    means, none = torch.tensor([[1.0, 0.0, -1.0]]), torch.zeros(1, 3)
    loss = brier_reparam_loss(means, none, none, none)
    # (sigmoid(1) - 1)^2 = .2689414^2; 1/4 for a coin; (sigmoid(-1) - 1)^2 = .7310586^2
    torch.testing.assert_close(loss, torch.tensor([[0.0723295, 0.25, 0.5344466]]))


def test_the_squared_error_of_a_drawn_probability_has_the_expectation_of_its_margin():
    shape = (200_000, 1)
    loss = brier_reparam_loss(
        torch.full(shape, 0.5),
        torch.full(shape, 0.6),
        torch.full(shape, -0.2),
        torch.full(shape, 0.8),
        generator=torch.Generator().manual_seed(0),
    )
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)  # margin N(.7, .36 + .64)
    density = (-z.square() / 2).softmax(0)
    expected = (density * (torch.sigmoid(0.7 + z) - 1).square()).sum().item()
    assert loss.mean().item() == pytest.approx(expected, abs=1e-3)


def test_a_pairs_loss_is_the_mean_of_its_sides_with_stds_no_smaller_than_the_floor():
    posterior = RewardPosterior(torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [0.1]]))
    config = BRMEConfig(loss="gaussian_nll", target="rating", std_floor=0.4)
    loss = example_losses(posterior, torch.tensor([[2.0, -2.0]]), torch.zeros(1), config)
    by_hand = ((math.log(0.5) + 1 / (2 * 0.25)) + math.log(0.4)) / 2
    assert loss.item() == pytest.approx(by_hand)


def test_margins_and_centring_enter_the_losses_of_comparisons():
    posterior = RewardPosterior(torch.tensor([[2.0], [1.0]]), torch.full((2, 1), 0.01))
    config = BRMEConfig(loss="bt_marginal", target="pair_prob", centring=0.1)
    loss = example_losses(posterior, None, torch.tensor([0.4]), config)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.6)) + 0.1 * 9, abs=1e-4)
    brier = replace(config, loss="mse_reparam", centring=0.0)
    loss = example_losses(posterior, None, torch.tensor([0.4]), brier)
    assert loss.item() == pytest.approx((1 / (1 + math.exp(0.6))) ** 2, abs=5e-3)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("target", ["rating", "stage1_score"])
def test_the_first_loss_is_that_of_standardised_targets_over_the_pairs_that_members_see(
    tmp_path: Path, target: str, frozen: bool
):
    rows, stage1 = rated(12), new_stage1()
    config = small(
        BRMEConfig(loss="gaussian_nll", target=target),  # type: ignore[arg-type]
        held_out=0.0,
        subset=0.5,
        batch_size=12,
        epochs=1.0,
        freeze_backbone=frozen,
    )
    prompts = [r.prompt for r in rows for _ in "cr"]
    answers = [c for r in rows for c in (r.chosen, r.rejected)]
    start = with_gaussian_heads(stage1, config).score(prompts, answers, normalise=False)
    if target == "rating":
        columns = ("score_chosen", "score_rejected")
        raw = torch.tensor([r.extra[name] for r in rows for name in columns])
    else:
        raw = stage1.score(prompts, answers).mean
    targets = (raw - raw.mean()) / raw.std(correction=0)
    sides = gaussian_nll_loss(start.means, start.stds, targets)
    groups = [e.group for e in encode_examples(stage1, rows, config)]
    seen = member_subsets(groups, 3, share=0.5, seed=config.seed).float()
    assert 0 < seen.sum() < seen.numel()
    expected = (sides.unflatten(0, (-1, 2)).mean(1) * seen).sum() / seen.sum()
    train_brme(stage1, rows, config, output_dir=tmp_path)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


# ---- examples ----------------------------------------------------------------------------------


def test_members_keep_their_pairs_whatever_the_order_of_the_rows():
    # Every step sees all pairs, so that only the members' own pairs and the split can matter.
    config = small(BRMEConfig.sound(), batch_size=24, epochs=3.0, subset=0.4, held_out=0.3)
    rows = rated()
    forward, backward = (
        head_of(train_brme(new_stage1(), some, config)).linear.weight for some in (rows, rows[::-1])
    )
    torch.testing.assert_close(forward, backward, atol=1e-5, rtol=0)


def test_a_member_learns_nothing_from_the_pairs_of_others():
    config = small(
        BRMEConfig.sound(),
        batch_size=24,
        epochs=20.0,
        learning_rate=1e-2,
        subset=0.4,
        held_out=0.0,
        max_grad_norm=0.0,
    )
    rows = rated()
    groups = [e.group for e in encode_examples(new_stage1(), rows, config)]
    seen = member_subsets(groups, 3, share=0.4, seed=config.seed)
    first, second = (~seen[:, 0] & seen[:, 1]).nonzero().flatten()[:2].tolist()
    swapped = list(rows)  # the targets' mean and std stay
    swapped[first] = replace(rows[first], extra=rows[second].extra)
    swapped[second] = replace(rows[second], extra=rows[first].extra)
    one, other = (
        head_of(train_brme(new_stage1(), some, config)).linear.weight.view(3, 2, -1)
        for some in (rows, swapped)
    )
    torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=0)
    assert (one[1] - other[1]).abs().max() > 1e-4


def test_ratings_and_margins_stay_with_their_rows_when_one_does_not_fit():
    rows = rated(5)
    rows[1] = replace(rows[1], rejected="cat " * 400)
    report = LoadReport("made")
    config = replace(BRMEConfig.sound(), max_length=64)
    examples = encode_examples(new_stage1(), rows, config, report)
    assert report.counts() == {"over-long": 1}
    assert report.problems[0].where == "made:1"
    kept = [rows[i] for i in (0, 2, 3, 4)]
    assert [e.prompt for e in examples] == [r.prompt for r in kept]
    assert [e.ratings[0] for e in examples] == [r.extra["score_chosen"] for r in kept]
    assert [e.margin for e in examples] == [0.5, 0.0, 0.5, 0.0]


def test_a_row_without_its_rating_is_named_with_the_remedy():
    rows = rated(4)
    for value in (None, "7", True, math.inf):
        rows[2] = replace(rows[2], extra={"score_chosen": 1, "score_rejected": value})
        with pytest.raises(DataError, match=r"made:2: .* 'score_rejected', .*rating_columns"):
            train_brme(new_stage1(), rows, BRMEConfig.sound())
    rows[2] = replace(rows[2], extra={"score_chosen": 1, "score_rejected": 0})
    assert encode_examples(new_stage1(), rows, BRMEConfig.sound())[2].ratings == (1.0, 0.0)


def test_targets_that_are_all_the_same_are_refused():
    same = [replace(r, extra={"score_chosen": 5.0, "score_rejected": 5.0}) for r in rated(8)]
    with pytest.raises(DataError, match=r"rating\) of all \d pairs|training pairs are the same"):
        train_brme(new_stage1(), same, small(BRMEConfig.sound()))


def test_held_out_targets_are_in_units_of_the_training_pairs():
    training, held_out = torch.tensor([[1.0, 5.0]]), torch.tensor([[7.0, 3.0]])  # mean 3, std 2
    made = brme._standardised([training, held_out], "rating")
    assert [t.tolist() for t in made] == [[[-1.0, 1.0]], [[2.0, 0.0]]]


def test_every_epoch_has_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch):
    orders: dict[str, list[int]] = {}

    def recorded(*parts: Any) -> list[int]:
        orders[str(parts)] = loop.permutation(*parts)
        return orders[str(parts)]

    monkeypatch.setattr(brme, "permutation", recorded)
    train_brme(new_stage1(), rated(), small(BRMEConfig.sound(), epochs=3.0))
    assert len(orders) == len({str(order) for order in orders.values()}) == 3


def test_stage_1_must_have_one_scalar_head():
    with pytest.raises(DataError, match="one scalar head"):
        train_brme(new_stage1(members=2), rated(8), BRMEConfig.faithful())


# ---- the model ---------------------------------------------------------------------------------


def test_a_frozen_backbone_and_stage_1_stay_as_they_were_to_the_last_bit():
    stage1, before = new_stage1(), new_stage1()
    model = train_brme(stage1, rated(), small(BRMEConfig.sound()))
    for (name, was), now in zip(
        before.backbone.named_parameters(), model.backbone.parameters(), strict=True
    ):
        assert torch.equal(was, now), name
    start = with_gaussian_heads(before, small(BRMEConfig.sound()))
    assert not torch.equal(head_of(model).linear.weight, head_of(start).linear.weight)
    tuned = train_brme(stage1, rated(), small(BRMEConfig.sound(), freeze_backbone=False))
    moved = [
        not torch.equal(was, now)
        for was, now in zip(before.backbone.parameters(), tuned.backbone.parameters(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert torch.equal(weights_of(stage1), weights_of(before))


def test_states_of_a_frozen_backbone_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    calls = 0
    computed = RewardModel.hidden

    def counted(self: RewardModel, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return computed(self, batch)

    monkeypatch.setattr(RewardModel, "hidden", counted)
    counts = []
    for epochs in (1.0, 8.0):
        calls = 0
        train_brme(new_stage1(), rated(), small(BRMEConfig.sound(), epochs=epochs))
        counts.append(calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_saved_model_gives_the_same_posterior(tmp_path: Path, lora_rank: int):
    config = small(BRMEConfig.sound(), lora_rank=lora_rank)
    model = train_brme(new_stage1(), rated(), config, output_dir=tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path / "model")
    texts = tiny_texts(12), tiny_texts(12, seed=4)
    one, other = model.score(*texts), loaded.score(*texts)
    tolerance = 0.0 if lora_rank == 0 else 1e-5  # adapters are merged into the saved weights
    torch.testing.assert_close(one.means, other.means, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(one.stds, other.stds, atol=tolerance, rtol=tolerance)


def test_members_are_on_one_scale_on_the_reference_samples():
    reference = (tiny_texts(20), tiny_texts(20, seed=3))
    model = train_brme(new_stage1(), rated(), small(BRMEConfig.sound()), reference=reference)
    means = model.score(*reference).means
    torch.testing.assert_close(means.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(means.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"head_dropout": 0.2},
        {"lora_rank": 2, "target": "stage1_score"},
        {"freeze_backbone": False, "target": "pair_prob"},
    ],
    ids=["heads", "lora", "whole"],
)
def test_a_killed_run_goes_on_as_if_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
):
    config = small(BRMEConfig(), checkpoint_every=3, evaluate_every=2, **options)
    whole = train_brme(new_stage1(), rated(), config, output_dir=tmp_path / "whole")
    saved = loop.Loop.checkpoint

    def dying(self: loop.Loop) -> None:
        saved(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_brme(new_stage1(), rated(), config, output_dir=tmp_path / "killed")
    monkeypatch.setattr(loop.Loop, "checkpoint", saved)
    resumed = train_brme(new_stage1(), rated(), config, output_dir=tmp_path / "killed")
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert torch.equal(whole.reward_mean, resumed.reward_mean)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


def test_evaluations_stand_in_the_log_and_the_last_in_the_summary(tmp_path: Path):
    config = small(BRMEConfig.sound(), evaluate_every=2, epochs=1.0, batch_size=4, held_out=0.2)
    train_brme(
        new_stage1(), rated(), config, output_dir=tmp_path, evaluation=lambda model: {"mine": 7.0}
    )
    rows = metrics_of(tmp_path)
    assert [r["step"] for r in rows if "held_out/spearman_2" in r] == [2, 4, 5]
    summary = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert summary["held_out/std"] == rows[-1]["held_out/std"]
    assert summary["mine"] == 7.0
    assert summary["pairs"] + summary["held_out_pairs"] == 24
    assert summary["held_out_pairs"] > 0


# ---- judging stds ------------------------------------------------------------------------------


def test_numbers_on_held_out_pairs_by_hand():
    means = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 0.5]])
    stds = torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.3, 0.2], [0.4, 0.1]])
    targets = torch.tensor([[1.0, 0.5], [4.0, 3.0]])
    metrics = held_out_metrics(RewardPosterior(means, stds), targets, std_floor=0.1)
    # errors of member 0: 0, .5, 1, 2, as its stds; of member 1: 1, 1.5, 3, 2.5, against its stds
    assert metrics == pytest.approx(
        {
            "held_out/error": (3.5 + 8.0) / 8,
            "held_out/std": 0.25,
            "held_out/std_0": 0.25,
            "held_out/std_1": 0.25,
            "held_out/spearman": (1.0 - 0.8) / 2,
            "held_out/spearman_0": 1.0,
            "held_out/spearman_1": -0.8,
            "held_out/at_floor": 0.25,
            "held_out/accuracy": 0.5,
        }
    )


def test_comparisons_are_judged_by_the_std_of_their_margin():
    means = torch.tensor([[1.0], [0.0], [0.0], [1.0], [2.0], [0.0]])  # margins 1, -1, 2
    stds = torch.tensor([[0.1], [0.1], [0.1], [0.5], [0.2], [0.1]])
    metrics = held_out_metrics(RewardPosterior(means, stds), None)
    wrong = [1 / (1 + math.exp(m)) for m in (1, -1, 2)]
    assert metrics["held_out/error"] == pytest.approx(sum(wrong) / 3)
    # margin stds .02, .26, .05 (squared) against the errors' order 2, 3, 1
    assert metrics["held_out/spearman"] == pytest.approx(0.5)
    assert metrics["held_out/accuracy"] == pytest.approx(2 / 3)


def test_the_rank_correlation_is_that_of_the_evaluation_and_0_for_collapsed_stds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 9, (60,), generator=generator).float()  # with ties
    y = x + 3 * torch.randn(60, generator=generator)
    assert rank_correlation(x, y) == pytest.approx(evaluate.spearman(x, y))
    assert 0.3 < rank_correlation(x, y) < 0.95
    assert rank_correlation(torch.ones(60), y) == 0.0
