"""URM's two stages: which loss learns a std, what the gates find, what stays as it was."""

import dataclasses
import json
import logging
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from trueward.data.formats import DataError, LoadReport, PreferenceRow
from trueward.losses.preference import bradley_terry_loss
from trueward.losses.uncertainty import gaussian_nll_loss
from trueward.models.attribute_heads import AttributeHeads
from trueward.models.reward_model import RewardModel
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train import loop
from trueward.train.attributes import (
    AttributeConfig,
    GatingConfig,
    RatedRow,
    Sides,
    attribute_metrics,
    completion_states,
    encode_rated,
    gated_rewards,
    gating_metrics,
    rated_by_text,
    rating_losses,
    text_attributes,
    train_attributes,
    train_gating,
    with_attribute_heads,
    with_fresh_gates,
)
from trueward.train.brme import rank_correlation
from trueward.train.loop import LoopConfig

TOKENIZER = make_tokenizer()
QUIET: dict[str, Any] = {"progress": False}


def new_base(seed: int = 0) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER), seed=seed)
    return RewardModel.from_backbone(backbone, TOKENIZER, seed=seed)


def preferences(count: int = 40) -> list[PreferenceRow]:
    """Pairs whose chosen side says "cat" more often; every third has a margin."""
    return [
        PreferenceRow(*row, margin=0.5 if i % 3 == 0 else None, where=f"made:{i}")
        for i, row in enumerate(tiny_preferences(count))
    ]


def rated(count: int = 40) -> list[RatedRow]:
    """Answers with two made ratings; every fourth lacks the second."""
    ratings = torch.randn(count, 2, generator=torch.Generator().manual_seed(0)).tolist()
    return [
        RatedRow(p, c, {"a": a} if i % 4 == 0 else {"a": a, "b": 3 + 2 * b}, where=f"made:{i}")
        for i, (p, c, (a, b)) in enumerate(
            zip(tiny_texts(count), tiny_texts(count, seed=5), ratings, strict=True)
        )
    ]


def small(config: Any, **changes: Any) -> Any:
    return replace(config, **({"batch_size": 8, "epochs": 2.0} | QUIET | changes))


def head_of(model: RewardModel) -> AttributeHeads:
    assert isinstance(model.head, AttributeHeads)
    return model.head


def weights_of(model: RewardModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


# ---- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AttributeConfig, {"held_out": 1.0}, "held_out must lie"),
        (AttributeConfig, {"evaluate_every": -1}, "evaluate_every must be at least 0"),
        (GatingConfig, {"held_out": -0.1}, "held_out must lie"),
        (GatingConfig, {"gate_width": -1}, "gate_width must be at least 0"),
        (GatingConfig, {"centring": -1.0}, "centring must be at least 0"),
        (GatingConfig, {"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind: type, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_default_is_the_loss_that_learns_a_std():
    assert AttributeConfig().loss == "mle"


# Beside the loop's own options, which have their own tests: one run, and one with another value.
STAGE_1: dict[str, tuple[dict[str, Any], Any]] = {
    "loss": ({}, "mse"),
    "attributes": ({}, ("b",)),
    "standardise": ({}, False),
    "freeze_backbone": ({}, False),
    "learning_rate": ({}, 1e-2),
    "epochs": ({}, 1.0),
    "batch_size": ({}, 4),
    "max_length": ({}, 20),
    "held_out": ({}, 0.4),
    "seed": ({}, 1),
}
STAGE_2: dict[str, tuple[dict[str, Any], Any]] = {
    "softmax": ({}, True),
    "gate_width": ({}, 3),
    "centring": ({}, 1.0),
    "learning_rate": ({}, 1e-2),
    "epochs": ({}, 1.0),
    "batch_size": ({}, 4),
    "max_length": ({}, 32),
    "held_out": ({}, 0.4),
    "seed": ({}, 1),
}


@pytest.mark.parametrize("name", STAGE_1)
def test_each_option_of_stage_1_changes_the_result(name: str):
    common, value = STAGE_1[name]
    config = small(AttributeConfig(), epochs=0.4, **common)
    outcomes = [
        weights_of(train_attributes(new_base(), rated(), some))
        for some in (config, replace(config, **{name: value}))
    ]
    assert outcomes[0].shape != outcomes[1].shape or not torch.equal(*outcomes)


@pytest.mark.parametrize("name", STAGE_2)
def test_each_option_of_stage_2_changes_the_result(name: str):
    common, value = STAGE_2[name]
    config = small(GatingConfig(), epochs=0.8, **common)
    stage1 = with_attribute_heads(new_base(), ("a", "b"), AttributeConfig())
    outcomes = [
        weights_of(train_gating(stage1, preferences(), some))
        for some in (config, replace(config, **{name: value}))
    ]
    assert outcomes[0].shape != outcomes[1].shape or not torch.equal(*outcomes)


@pytest.mark.parametrize(("kind", "tested"), [(AttributeConfig, STAGE_1), (GatingConfig, STAGE_2)])
def test_no_option_is_left_untested(kind: type, tested: dict):
    own = {f.name for f in dataclasses.fields(kind)}
    inherited = {f.name for f in dataclasses.fields(LoopConfig)} - {"learning_rate", "seed"}
    assert own - inherited - set(tested) == {"evaluate_every"}  # see the test of the log


# ---- text as a stand-in for ratings ------------------------------------------------------------


def test_text_attributes_by_hand():
    prompt = "Please list three great cities, ok?"
    answer = "1. Rome is great\n2. Rome is great fun\n\n- it's three"
    # words: 1 rome is great 2 rome is great fun it's three = 11; different ones 8
    # trigrams: 9, of which "rome is great" comes twice; lines: 3, all of a list
    made = text_attributes(prompt, answer)
    assert made == pytest.approx(
        {
            "log_words": math.log(12),
            "distinct_words": 8 / 11,
            "word_letters": (1 + 4 + 2 + 5 + 1 + 4 + 2 + 5 + 3 + 4 + 5) / 11,
            "repeated_trigrams": 1 / 9,
            "lines_per_100_words": 300 / 11,
            "list_items_per_100_words": 300 / 11,
            "prompt_words": 2 / 5,  # please, list, three, great, cities: three and great recur
        }
    )


def test_text_attributes_of_next_to_nothing():
    empty = text_attributes("Why?", "")
    assert math.isnan(empty.pop("prompt_words"))  # no word of four letters
    assert set(empty.values()) == {0.0}
    assert text_attributes("Why?", "So so so so")["repeated_trigrams"] == 0.5
    assert text_attributes("Why?", "3.5 - 2 = 1.5")["list_items_per_100_words"] == 0


def test_messages_are_measured_by_their_text():
    prompt = [{"role": "user", "content": "Where do elephants live?"}]
    answer = [{"role": "assistant", "content": "Elephants live in Africa."}]
    assert text_attributes(prompt, answer) == text_attributes(
        "Where do elephants live?", "Elephants live in Africa."
    )


def test_both_sides_of_a_pair_are_rated_on_one_scale():
    pairs = preferences(30)
    rows = rated_by_text(pairs)
    assert [r.completion for r in rows] == [c for p in pairs for c in (p.chosen, p.rejected)]
    assert rows[3].where == "made:1, rejected"
    for name in ("log_words", "distinct_words", "word_letters"):
        values = torch.tensor([r.ratings[name] for r in rows])
        assert values.mean().item() == pytest.approx(0, abs=1e-5)
        assert values.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        raw = torch.tensor([text_attributes(r.prompt, r.completion)[name] for r in rows])
        assert rank_correlation(values, raw) == pytest.approx(1)


def test_what_is_the_same_for_all_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        rows = rated_by_text(preferences(10))
    assert "list_items_per_100_words is the same for all" in caplog.text
    assert all("list_items_per_100_words" not in r.ratings for r in rows)


def test_a_reward_models_score_is_a_further_attribute_but_not_of_pairs_that_do_not_fit():
    base, pairs = new_base(), preferences(12)
    pairs[4] = replace(pairs[4], rejected="cat " * 600)
    rows = rated_by_text(pairs, {"score": base, "length": lambda p, c: [len(x) for x in c]})
    scores = [r.ratings["score"] for r in rows]
    assert [i for i, s in enumerate(scores) if math.isnan(s)] == [8, 9]
    kept = [r for i, r in enumerate(rows) if i not in (8, 9)]
    raw = base.score([r.prompt for r in kept], [r.completion for r in kept]).mean
    expected = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(torch.tensor([r.ratings["score"] for r in kept]), expected)
    lengths = torch.tensor([float(len(r.completion)) for r in rows])
    made = torch.tensor([r.ratings["length"] for r in rows])
    torch.testing.assert_close(made, (lengths - lengths.mean()) / lengths.std(correction=0))


def test_an_extra_attribute_needs_a_name_of_its_own():
    with pytest.raises(ValueError, match="'log_words' is an attribute of the text"):
        rated_by_text(preferences(4), {"log_words": new_base()})


# ---- stage 1: what a loss learns ---------------------------------------------------------------

COUNT = 700


@cache
def made_ratings() -> tuple[list[RatedRow], Tensor, Tensor, Tensor]:
    """Ratings of linear mean and log std in the states: rows, means, stds, ratings."""
    base = new_base()
    texts = tiny_texts(COUNT, words=(1, 4)), tiny_texts(COUNT, seed=7, words=(2, 9))
    tokens = [base.tokenize(p, c) for p, c in zip(*texts, strict=True)]
    states = completion_states(base, tokens, max_tokens=4096)
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(32, 4, generator=generator)
    made = (states - states.mean(0)) @ directions
    made = made / made.std(0)
    means, stds = made[:, :2], (-0.5 + 0.7 * made[:, 2:]).exp()
    ratings = means + stds * torch.randn(COUNT, 2, generator=generator)
    rows = [
        RatedRow(p, c, {"first": r[0], "second": r[1]})
        for p, c, r in zip(*texts, ratings.tolist(), strict=True)
    ]
    return rows, means, stds, ratings


@cache
def learned(loss: str) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    """Train on the made ratings; return means and stds, and the lines with held-out numbers."""
    rows = made_ratings()[0]
    config = AttributeConfig(
        loss=loss,  # type: ignore[arg-type]
        standardise=False,
        epochs=60.0 if loss == "mle" else 15.0,
        learning_rate=2e-2,
        max_grad_norm=0.0,
        evaluate_every=100,
        **QUIET,
    )
    with TemporaryDirectory() as folder:
        model = train_attributes(new_base(), rows, config, output_dir=folder)
        lines = metrics_of(Path(folder))
    tokens = [e.tokens for e in encode_rated(model, rows, ("first", "second"), 512)]
    with torch.no_grad():
        states = completion_states(model, tokens, max_tokens=4096)
        means, stds = head_of(model).attributes(states)
    return means, stds, [row for row in lines if "held_out/std" in row]


def test_the_likelihood_recovers_which_ratings_are_noisy():
    _, true_means, true_stds, _ = made_ratings()
    means, stds, lines = learned("mle")
    for k, name in enumerate(("first", "second")):
        assert rank_correlation(stds[:, k], true_stds[:, k]) > 0.8
        assert rank_correlation(means[:, k], true_means[:, k]) > 0.9
        ratio = (stds[:, k].log() - true_stds[:, k].log()).mean().exp().item()
        assert ratio == pytest.approx(1.0, abs=0.2)
        assert lines[-1][f"held_out/spearman_std_{name}"] > 0.3
        assert lines[-1][f"held_out/spearman_mean_{name}"] > 0.6


def test_the_squared_error_of_draws_collapses_every_std():
    true_means = made_ratings()[1]
    means, stds, lines = learned("mse")
    for k in range(2):
        assert rank_correlation(means[:, k], true_means[:, k]) > 0.9
    assert all(line["held_out/std"] < 0.02 for line in lines)
    assert stds.mean() < 0.02 < 0.5 < learned("mle")[1].mean()  # the made ones' mean is about .75


def test_losses_of_ratings_by_hand_and_none_where_nobody_rated():
    means = torch.tensor([[1.0, 2.0]], requires_grad=True)
    stds = torch.tensor([[0.5, 3.0]], requires_grad=True)
    ratings = torch.tensor([[2.0, math.nan]])
    losses = rating_losses(means, stds, ratings, loss="mle")
    assert losses.tolist() == [[pytest.approx(math.log(0.5) + 1 / (2 * 0.25)), 0.0]]
    losses.sum().backward()
    torch.testing.assert_close(means.grad, torch.tensor([[-1 / 0.25, 0.0]]))
    torch.testing.assert_close(stds.grad, torch.tensor([[1 / 0.5 - 1 / 0.125, 0.0]]))


def test_the_squared_error_of_draws_has_its_expectation():
    shape = (200_000, 1)
    losses = rating_losses(
        torch.full(shape, 1.0), torch.full(shape, 0.6), torch.full(shape, 1.5), loss="mse"
    )
    assert losses.mean().item() == pytest.approx(0.25 + 0.36, abs=0.01)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_first_loss_is_that_of_the_standardised_ratings_there_are(tmp_path: Path, frozen: bool):
    rows = rated(12)
    config = small(AttributeConfig(freeze_backbone=frozen), held_out=0.0, batch_size=12, epochs=1.0)
    model = with_attribute_heads(new_base(), ("a", "b"), config)
    tokens = [model.tokenize(r.prompt, r.completion) for r in rows]
    means, stds = head_of(model).attributes(completion_states(model, tokens, max_tokens=999))
    total = count = 0
    for k, name in enumerate("ab"):
        there = [i for i, r in enumerate(rows) if name in r.ratings]
        raw = torch.tensor([rows[i].ratings[name] for i in there])
        targets = (raw - raw.mean()) / raw.std(correction=0)
        columns = means[there, k : k + 1], stds[there, k : k + 1]
        total += gaussian_nll_loss(*columns, targets).sum().item()
        count += len(there)
    assert count == 21
    trained = train_attributes(new_base(), rows, config, output_dir=tmp_path)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    b = torch.tensor([r.ratings["b"] for r in rows if "b" in r.ratings])
    assert trained.facts["rating means"]["b"] == pytest.approx(b.mean().item())
    assert trained.facts["rating stds"]["b"] == pytest.approx(b.std(correction=0).item())


def test_an_unrated_attribute_teaches_nothing():
    # Only `a` of row 0 and `b` of the others are rated: row 0 must not move the outputs of b.
    rows = [replace(r, ratings={"b": float(i)}) for i, r in enumerate(rated(6))]
    texts = rows[0].completion, "bird " * 9
    outcomes = []
    for text in texts:
        odd = RatedRow("tree", text, {"a": 1.0, "b": math.nan})
        other = RatedRow("house", "red", {"a": 2.0})
        config = small(AttributeConfig(attributes=("a", "b")), held_out=0.0, max_grad_norm=0.0)
        outcomes.append(
            head_of(train_attributes(new_base(), [odd, other, *rows], config)).linear.weight
        )
    # Batches are cut by length, so that the last bits may differ.
    torch.testing.assert_close(outcomes[0][2:], outcomes[1][2:], atol=1e-6, rtol=0)
    assert (outcomes[0][:2] - outcomes[1][:2]).abs().max() > 1e-3


# ---- stage 1: rows -----------------------------------------------------------------------------


def test_rows_that_cannot_be_used_are_reported():
    rows = rated(6)
    rows[1] = replace(rows[1], completion="cat " * 400)
    rows[3] = replace(rows[3], ratings={"a": math.nan, "c": 1.0})
    report = LoadReport("made")
    examples = encode_rated(new_base(), rows, ("b", "a"), 64, report)
    assert report.counts() == {"over-long": 1, "unrated": 1}
    assert [p.where for p in report.problems] == ["made:1", "made:3"]
    assert [e.prompt for e in examples] == [rows[i].prompt for i in (0, 2, 4, 5)]
    assert math.isnan(examples[0].ratings[0])
    assert examples[0].ratings[1] == rows[0].ratings["a"]


@pytest.mark.parametrize("value", [math.inf, True, "7", None])
def test_a_rating_that_is_no_number_is_named(value: Any):
    rows = [replace(r, ratings={**r.ratings}) for r in rated(4)]
    rows[2].ratings["a"] = value  # type: ignore[index]
    with pytest.raises(DataError, match=r"made:2: the rating 'a' must be a finite number"):
        encode_rated(new_base(), rows, ("a",), 64)


def test_an_attribute_without_anything_to_learn_is_named():
    same = [replace(r, ratings={**r.ratings, "c": 4.0}) for r in rated(8)]
    with pytest.raises(DataError, match="ratings of 'c' are all the same or absent"):
        train_attributes(new_base(), same, small(AttributeConfig()))
    with pytest.raises(DataError, match="ratings of 'd' are all the same or absent"):
        train_attributes(new_base(), rated(8), small(AttributeConfig(attributes=("a", "d"))))
    with pytest.raises(DataError, match="None of 8 answers can be used: they need a rating of e"):
        train_attributes(new_base(), rated(8), small(AttributeConfig(attributes=("e",))))


def test_numbers_on_held_out_answers_by_hand():
    nan = math.nan
    metrics = attribute_metrics(
        torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 5.0, 0.0]]),
        torch.tensor([[0.1, 0.3, 1.0], [0.2, 0.2, 1.0], [0.3, 0.1, 1.0]]),
        torch.tensor([[1.5, nan, nan], [4.0, 1.0, nan], [2.0, 7.0, nan]]),
        ("x", "y", "z"),
    )
    # x: errors .5, 2, 1 against stds in order: 1 - 6 * (1 + 1) / (3 * 8) = .5; y: 1, 2 against -
    assert metrics == pytest.approx(
        {
            "held_out/spearman_mean": 0.75,
            "held_out/spearman_std": -0.25,
            "held_out/error": (3.5 / 3 + 1.5) / 2,
            "held_out/std": (0.2 + 0.15) / 2,
            "held_out/spearman_mean_x": 0.5,
            "held_out/spearman_std_x": 0.5,
            "held_out/error_x": 3.5 / 3,
            "held_out/std_x": 0.2,
            "held_out/spearman_mean_y": 1.0,
            "held_out/spearman_std_y": -1.0,
            "held_out/error_y": 1.5,
            "held_out/std_y": 0.15,
        }
    )


def test_judgements_stand_in_the_log_and_the_last_in_the_summary(tmp_path: Path):
    config = small(AttributeConfig(), evaluate_every=2, epochs=1.0, held_out=0.2)
    train_attributes(
        new_base(), rated(), config, output_dir=tmp_path, evaluation=lambda model: {"mine": 7.0}
    )
    lines, summary = metrics_of(tmp_path), summary_of(tmp_path)
    assert [r["step"] for r in lines if "held_out/spearman_std_b" in r] == [2, 4]
    assert summary["held_out/std"] == lines[-1]["held_out/std"]
    assert summary["mine"] == 7.0
    assert summary["rows"] + summary["held_out_rows"] == 40
    assert summary["held_out_rows"] > 0


# ---- stage 2 -----------------------------------------------------------------------------------


@cache
def knows_cats() -> RewardModel:
    """A model whose attribute `cats` tells the two sides apart, beside one that does not."""
    pairs = preferences(120)
    noises = torch.randn(120, 2, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        RatedRow(p.prompt, c, {"cats": float(str(c).split().count("cat")), "noise": n})
        for p, noise in zip(pairs, noises, strict=True)
        for c, n in zip((p.chosen, p.rejected), noise, strict=True)
    ]
    config = AttributeConfig(epochs=30.0, learning_rate=2e-2, **QUIET)
    return train_attributes(new_base(), rows, config)


@pytest.mark.parametrize("softmax", [True, False])
def test_gates_find_the_attribute_that_decides(tmp_path: Path, softmax: bool):
    model = knows_cats()
    config = GatingConfig(softmax=softmax, epochs=40.0, batch_size=64, held_out=0.2, **QUIET)
    gated = train_gating(model, preferences(120), config, output_dir=tmp_path)
    last, first = metrics_of(tmp_path)[-1], metrics_of(tmp_path)[0]
    assert first["loss"] > last["loss"]
    assert last["held_out/gate_cats"] > 0.9
    assert last["held_out/gate_cats"] > 1.5 * abs(last["held_out/gate_noise"])
    assert last["held_out/accuracy_cats"] > 0.8 > 0.7 > last["held_out/accuracy_noise"]
    assert last["held_out/accuracy"] > 0.8
    assert summary_of(tmp_path)["held_out/gate_cats"] == last["held_out/gate_cats"]
    assert head_of(gated).softmax is softmax


def test_free_gates_turn_an_attribute_round():
    model = knows_cats()
    worse = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in preferences(120)]
    config = GatingConfig(epochs=40.0, batch_size=64, **QUIET)
    gated = train_gating(model, worse, config)
    prompts, sides = (
        [p.prompt for p in worse],
        ([p.chosen for p in worse], [p.rejected for p in worse]),
    )
    chosen, rejected = (gated.score(prompts, side).mean for side in sides)
    assert (chosen > rejected).float().mean() > 0.9
    before = [model.score(prompts, side).mean for side in sides]
    assert (before[0] > before[1]).float().mean() < 0.1


def test_gates_alone_change_in_stage_2():
    base = new_base()
    model = train_attributes(base, rated(), small(AttributeConfig()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gated = train_gating(model, preferences(), small(GatingConfig()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for key, value in gated.state_dict().items():
        if "gating" not in key:
            assert torch.equal(value, before[key]), key
    fresh = head_of(with_fresh_gates(model, small(GatingConfig()))).gating.state_dict()
    for key, value in head_of(gated).gating.state_dict().items():
        assert not torch.equal(value, fresh[key]), key
    assert all(
        torch.equal(was, now)
        for was, now in zip(
            new_base().backbone.parameters(), gated.backbone.parameters(), strict=True
        )
    )


def test_stage_1_leaves_its_base_and_a_frozen_backbone_as_they_were():
    base = new_base()
    frozen = train_attributes(base, rated(), small(AttributeConfig()))
    tuned = train_attributes(base, rated(), small(AttributeConfig(freeze_backbone=False)))
    assert torch.equal(weights_of(base), weights_of(new_base()))
    parts = [list(m.backbone.parameters()) for m in (base, frozen, tuned)]
    assert all(torch.equal(was, now) for was, now in zip(parts[0], parts[1], strict=True))
    moved = [not torch.equal(was, now) for was, now in zip(parts[0], parts[2], strict=True)]
    assert sum(moved) > len(moved) / 2
    gates = head_of(frozen).gates(torch.randn(3, 32))
    torch.testing.assert_close(gates, torch.full((3, 2), 0.5))


def test_the_first_loss_of_the_gates_is_that_of_equal_ones(tmp_path: Path):
    model = with_attribute_heads(new_base(), ("a", "b"), AttributeConfig())
    pairs = preferences(12)
    config = small(GatingConfig(), held_out=0.0, batch_size=12, epochs=1.0, centring=0.3)
    train_gating(model, pairs, config, output_dir=tmp_path)
    prompts = [p.prompt for p in pairs]
    chosen, rejected = (
        model.score(prompts, side).mean
        for side in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    margins = torch.tensor([p.margin or 0.0 for p in pairs])
    losses = bradley_terry_loss(chosen, rejected, margin=margins) + 0.3 * (chosen + rejected) ** 2
    assert margins.sum() == 2.0
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_numbers_on_held_out_pairs_by_hand():
    head = AttributeHeads(1, ("x", "y"))
    head.gating[4].bias.data = torch.tensor([1.0, -2.0])
    # chosen, then rejected: x leads in one pair of two, y in none and one is a tie
    means = torch.tensor([[[3.0, 0.0], [1.0, 1.0]], [[0.0, 2.0], [4.0, 2.0]]])
    sides = Sides(torch.ones(2, 2, 1), means, torch.zeros(2))
    assert gated_rewards(head, sides, [1, 0]).tolist() == [[-4.0, 0.0], [3.0, -1.0]]
    assert gating_metrics(head, sides) == {
        "held_out/accuracy": 0.5,
        "held_out/accuracy_x": 0.5,
        "held_out/gate_x": 1.0,
        "held_out/accuracy_y": 0.25,
        "held_out/gate_y": -2.0,
    }


def test_gates_need_attributes():
    with pytest.raises(DataError, match="train_attributes first"):
        train_gating(new_base(), preferences(4), GatingConfig())


# ---- both --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["mle", "mse", "whole", "gating"])
def test_a_killed_run_goes_on_as_if_unbroken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
):
    options: dict[str, Any] = {"checkpoint_every": 3, "evaluate_every": 2}

    def run(folder: Path) -> RewardModel:
        if stage == "gating":
            model = with_attribute_heads(new_base(), ("a", "b"), AttributeConfig())
            config = small(GatingConfig(), **options)
            return train_gating(model, preferences(), config, output_dir=folder)
        config = small(AttributeConfig(), **options)
        config = replace(config, loss="mse" if stage == "mse" else "mle")
        config = replace(config, freeze_backbone=stage != "whole")
        return train_attributes(new_base(), rated(), config, output_dir=folder)

    whole = run(tmp_path / "whole")
    saved = loop.Loop.checkpoint

    def dying(self: loop.Loop) -> None:
        saved(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.setattr(loop.Loop, "checkpoint", saved)
    resumed = run(tmp_path / "killed")
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert torch.equal(whole.reward_mean, resumed.reward_mean)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


def test_states_of_a_frozen_backbone_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    calls = 0
    computed = RewardModel.hidden

    def counted(self: RewardModel, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return computed(self, batch)

    monkeypatch.setattr(RewardModel, "hidden", counted)
    model = with_attribute_heads(new_base(), ("a", "b"), AttributeConfig())
    for train in (
        lambda e: train_attributes(new_base(), rated(), small(AttributeConfig(), epochs=e)),
        lambda e: train_gating(model, preferences(), small(GatingConfig(), epochs=e)),
    ):
        counts = []
        for epochs in (1.0, 6.0):
            calls = 0
            train(epochs)
            counts.append(calls)
        assert counts[0] == counts[1] > 0


def test_a_state_is_the_plain_models_whatever_its_batch():
    model = new_base()
    texts = ["tell me"] * 3 + tiny_texts(3), tiny_texts(6, seed=4)
    tokens = [model.tokenize(p, c) for p, c in zip(*texts, strict=True)]
    for budget in (1, 60, 4096):
        states = completion_states(model, tokens, max_tokens=budget)
        for state, (prompt, completion) in zip(states, tokens, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            expected = model.backbone(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


def test_both_stages_leave_a_model_that_is_read_again(tmp_path: Path):
    rows = rated_by_text(preferences(), {"score": new_base(1)})
    model = train_attributes(new_base(), rows, small(AttributeConfig()), output_dir=tmp_path / "1")
    reference = tiny_texts(20), tiny_texts(20, seed=3)
    gated = train_gating(
        model, preferences(), small(GatingConfig()), output_dir=tmp_path / "2", reference=reference
    )
    texts = tiny_texts(12), tiny_texts(12, seed=4)
    for made, name in ((model, "1"), (gated, "2")):
        again = RewardModel.from_pretrained(tmp_path / name / "model")
        one, other = made.score(*texts), again.score(*texts)
        assert torch.equal(one.means, other.means)
        assert torch.equal(one.stds, other.stds)
        assert again.facts["attributes"].endswith(", score")
    scaled = gated.score(*reference, normalise=True)
    assert scaled.means.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.means.std(correction=0).item() == pytest.approx(1, abs=1e-4)
