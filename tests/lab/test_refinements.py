"""Rewards refined on recorded samples: folds, choices, rows, and what is written."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from trueward.data.formats import DataError
from trueward.data.sources import write_jsonl
from trueward.lab import refinements as lab
from trueward.lab.refinements import (
    Recorded,
    RefinementMethod,
    RefinementsConfig,
    choices,
    fold_of,
    prepare,
    read_fold,
    read_results,
    run_refinements,
)
from trueward.options import ObjectiveConfig
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.spg import SPGConfig
from trueward.report.refinements import RefinementRuns
from trueward.testing import tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.reward import RewardConfig

UML = MultiViewConfig(latent=4, width=8, prompts_per_batch=2)
METHODS = {
    "first": RefinementMethod(label="the first"),
    "mean": RefinementMethod(members=2),
    "control": RefinementMethod(method="control"),
    "spg": RefinementMethod(method="spg", spg=SPGConfig(gamma=0.25, progress=False)),
    "uml": RefinementMethod(method="uml", uml=UML),
    "longest": RefinementMethod(method="length"),
    "gold": RefinementMethod(method="gold"),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=160,
    )
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts, four answers to each, three of them judged; and pairs of the same prompts."""
    root = tmp_path_factory.mktemp("recorded")
    prompts = [[{"role": "user", "content": text}] for text in tiny_texts(12)]
    answers, pairs = [], []
    for i, prompt in enumerate(prompts):
        texts = tiny_texts(4, seed=100 + i)
        answers.append({"prompt": prompt, "completions": texts, "gold": [0.0, 1.0, 2.0, None]})
        sides = [[{"role": "assistant", "content": text}] for text in texts[:2]]
        pairs.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
        pairs.append({"prompt": prompt, "chosen": sides[1], "rejected": sides[0]})
    write_jsonl(root / "answers.jsonl", answers)
    write_jsonl(root / "pairs.jsonl", pairs)
    return root


def config(files: Path, encoder: Path, out: Path, **options: Any) -> RefinementsConfig:
    values: dict[str, Any] = {
        "output_dir": str(out),
        "preferences": str(files / "pairs.jsonl"),
        "answers": [str(files / "answers.jsonl")],
        "encoder": str(encoder),
        "hidden_size": 8,
        "answer_tokens": 40,
        "methods": METHODS,
        "samples": 3,
        "folds": 2,
        "seeds": 2,
        "processes": 1,
        "train": RewardConfig(learning_rate=1e-2, batch_size=8, max_length=96, progress=False),
    }
    return RefinementsConfig(**(values | options))


def test_every_prompt_is_asked_once_by_rewards_that_have_not_seen_it(
    files: Path, encoder: Path, tmp_path: Path
):
    made = config(files, encoder, tmp_path)
    prepare(made)
    asked: list[str] = []
    for fold in range(2):
        data = read_fold(made, 0, fold)
        own = {str(r.prompt) for r in data.asked}
        assert own
        assert not own & {str(r.prompt) for r in data.training}
        assert not own & {str(p) for p, _ in data.samples}
        assert own >= {str(r.prompt) for r in data.held_out}
        assert all(len(texts) == 3 for _, texts in data.samples)
        assert all(r.gold == [0.0, 1.0, 2.0] for r in data.asked)  # the fourth has no gold
        asked += own
    assert len(asked) == len(set(asked)) == 12
    one, other = (read_fold(made, seed, 0).samples for seed in (0, 1))
    assert one != other  # drawn by the seed


def test_a_choice_is_worth_what_gold_says_of_it():
    row = Recorded("p", ["a", "b", "c"], [1, 5, 9], [0.0, 1.0, 2.0])
    found = choices([row], torch.tensor([0.1, 0.3, 0.2]))
    assert found["gold"] == [1.0]
    assert found["length"] == [5.0]
    assert found["agreement"] == [pytest.approx(2 / 3)]  # b above c is the one mistake
    assert found["gold of 1"] == [pytest.approx(1.0)]  # any answer
    assert found["gold of 2"] == [pytest.approx((1 + 2 + 1) / 3)]  # of ab: b, ac: c, bc: b
    few = Recorded("q", ["a", "b"], [1, 2], [3.0, 4.0])
    uneven = choices([row, few], torch.tensor([0.1, 0.3, 0.2, 0.0, 1.0]))
    assert uneven["gold"] == [1.0, 4.0]
    assert uneven["gold of 1"] == [pytest.approx(1.0), pytest.approx(3.5)]
    assert [len(column) for column in uneven.values()] == [2] * len(uneven)  # null, not left out
    tied = choices([row], torch.zeros(3))
    assert tied["gold"] == [pytest.approx(1.0)]
    equal = Recorded("p", ["a", "b"], [1, 1], [1.0, 1.0])
    assert choices([equal], torch.tensor([0.0, 1.0]))["agreement"] == [None]


def test_rows_are_judged_over_folds_and_seeds_and_go_on_where_they_were(
    files: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = config(files, encoder, tmp_path)
    summary = run_refinements(made)
    rows = {row.name: row for row in read_results(made)}
    assert rows["gold"].estimate("gold").mean == 2.0
    assert rows["gold"].estimate("agreement").mean == 1.0
    for row in rows.values():
        assert set(row.values) == {0, 1}
        assert len(row.by_prompt("gold")) == 12
        assert row.estimate("gold of 1").mean == pytest.approx(1.0)  # exact, whoever chooses
        assert summary["metrics"][row.name]["gold"] == pytest.approx(row.estimate("gold").mean)
    assert 0 < rows["spg"].made["accepted"] <= rows["spg"].made["prompts"]
    assert 0 <= rows["first"].number("pair accuracy").mean <= 1
    table = (tmp_path / "table.md").read_text()
    assert "| the first |" in table
    assert "less the control's" in table
    assert (tmp_path / "figures" / "gold_difference.png").exists()
    numbers = json.loads((tmp_path / "refinements.json").read_text())
    assert {row["name"] for row in numbers} == set(METHODS)
    calls: list[str] = []
    monkeypatch.setattr(lab, "make_reward", lambda *a: calls.append(a[3]))
    run_refinements(made)
    assert calls == []
    (tmp_path / "seed-0" / "fold-0" / "uml" / "result.json").unlink()
    with pytest.raises(DataError, match="failed"):  # it alone is tried again
        run_refinements(made)
    assert calls == ["uml"]


def test_texts_are_cut_to_what_the_encoder_reads(files: Path, encoder: Path, tmp_path: Path):
    made = config(
        files, encoder, tmp_path, answer_tokens=3, train=RewardConfig(max_length=24, progress=False)
    )
    prepare(made)
    rows = [json.loads(x) for x in (tmp_path / "data" / "answers.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer(a, add_special_tokens=False).input_ids) for a in rows[0]["answers"]]
    assert max(lengths) <= 4  # a cut in the middle of a word may be read as one piece more
    whole = json.loads((files / "answers.jsonl").read_text().splitlines()[0])["completions"]
    by_first = {r["prompt"][0]["content"]: r for r in rows}
    assert sum(r["words"][0] for r in by_first.values()) > 0
    assert any(r["words"] == [len(a.split()) for a in whole] for r in rows)  # as it was written


def test_estimates_are_over_prompts_not_over_prompts_times_seeds():
    values = {s: {"gold": {"a": 0.0 + s, "b": 1.0 + s, "c": 2.0 + s}} for s in (0, 1)}
    row = RefinementRuns(name="x", label="x", values=values, numbers={}, made={})
    found = row.estimate("gold")
    assert found.mean == pytest.approx(1.5)
    assert found.seeds == 3  # prompts
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # std 1, df 2
    assert row.over_seeds("gold") == [1.0, 2.0]
    shifted = {s: {"gold": {k: v - 0.5 for k, v in c["gold"].items()}} for s, c in values.items()}
    other = RefinementRuns(name="y", label="y", values=shifted, numbers={}, made={})
    less = row.estimate("gold", other)
    assert (less.mean, less.half_width) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 1}, "folds must be at least 2"),
        ({"samples": 1}, "samples must be at least 2"),
        ({"answer_tokens": 96}, "must leave room for the prompt"),
        ({"methods": {"spg": RefinementMethod(method="spg")}}, "need one called 'first'"),
    ],
)
def test_what_cannot_be_run_is_refused(
    files: Path, encoder: Path, tmp_path: Path, options: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said):
        config(files, encoder, tmp_path, **options)


def test_a_recorded_policy_cannot_be_asked_to_judge():
    with pytest.raises(ValueError, match="there is nobody to ask"):
        RefinementMethod(method="rlaif")


def test_a_row_without_gold_for_each_answer_is_named(files: Path, encoder: Path, tmp_path: Path):
    broken = tmp_path / "broken.jsonl"
    write_jsonl(broken, [{"prompt": "p", "completions": ["a", "b"], "gold": [1.0]}])
    with pytest.raises(DataError, match=r"broken.jsonl:1: 'gold' must be a list with one number"):
        prepare(config(files, encoder, tmp_path / "run", answers=[str(broken)]))


def test_folds_hang_on_the_prompt_alone():
    prompts = tiny_texts(40)
    found = [fold_of(p, 5) for p in prompts]
    assert found == [fold_of(p, 5) for p in prompts]
    assert set(found) == set(range(5))


def test_an_objective_chooses_for_its_row(files: Path, encoder: Path, tmp_path: Path):
    rows = {"first": METHODS["first"], "mean": RefinementMethod(members=2)}
    objective = ObjectiveConfig(name="worst_case")
    rows["worst"] = RefinementMethod(members=2, objective=objective, shares="mean")
    made = config(files, encoder, tmp_path, methods=rows, seeds=1)
    run_refinements(made)
    assert not (tmp_path / "seed-0" / "fold-0" / "worst" / "reward").exists()
    found = {row.name: row.by_prompt("agreement") for row in read_results(made)}
    assert found["worst"] != found["mean"]  # the same members, asked otherwise
    for other, said in (("none", "must name another row"), ("first", "must be the same but for")):
        wrong = {"worst": replace(rows["worst"], shares=other)}
        with pytest.raises(ValueError, match=said):
            replace(made, methods=rows | wrong)
