"""The table of families: its rows over seeds, what it costs, what it refuses, what it writes."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trueward.data.formats import DataError, PreferenceRow
from trueward.data.sources import write_jsonl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.lab import families as lab
from trueward.lab.families import (
    FamiliesConfig,
    FamilyMethod,
    calibration,
    cost,
    numbers_of,
    read_results,
    run_families,
    seed_rows,
    split_rows,
)
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource
from trueward.report.families import FamilyRuns, markdown
from trueward.report.html import Table
from trueward.testing import tiny_backbone, tiny_preferences
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.brme import BRMEConfig
from trueward.train.reward import RewardConfig
from trueward.train.sft import SFTConfig


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    for k, name in enumerate(("first", "second")):
        rows = tiny_preferences(40, seed=k)
        write_jsonl(
            folder / f"{name}.jsonl",
            [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows],
        )
    return {name: str(folder / f"{name}.jsonl") for name in ("first", "second")}


def config(sets: dict[str, str], out: Path, **options: Any) -> FamiliesConfig:
    quiet: dict[str, Any] = {"progress": False, "batch_size": 16, "max_length": 64}
    values: dict[str, Any] = {
        "output_dir": str(out),
        "preferences": sets,
        "methods": {
            "single": FamilyMethod(label="single head"),
            "long": FamilyMethod(epochs_scale=2.0),
            "deep": FamilyMethod(family="deep", members=2),
            "brme": FamilyMethod(family="brme", members=2, preset="pairs", brme=BRMEConfig()),
        },
        "pairs": 20,
        "test": 0.3,
        "model": ModelSource(hidden_size=16, layers=1, heads=2, vocab_size=300, max_positions=128),
        "sft": SFTConfig(learning_rate=1e-3, **quiet),
        "train": RewardConfig(learning_rate=1e-3, **quiet),
        "seeds": 2,
        "repeats": 1,
        "processes": 1,
    }
    return FamiliesConfig(**(values | options))


def test_a_table_is_made_of_every_family_over_every_seed_and_goes_on_where_it_was(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(sets, tmp_path)
    summary = run_families(made)
    rows = {row.name: row for row in read_results(made)}
    assert set(rows) == {"single", "long", "deep", "brme"}
    for row in rows.values():
        assert set(row.numbers) == {0, 1}
        accuracy = [n["accuracy"] for n in row.numbers.values()]
        assert summary["metrics"][row.name]["accuracy"] == pytest.approx(sum(accuracy) / 2)
    deep, single = rows["deep"].numbers[0], rows["single"].numbers[0]
    assert deep["passes"] == pytest.approx(2.0)
    assert "AUROC shuffled" in deep
    assert "AUROC shuffled" not in single
    assert "reward AUROC shuffled" in single
    assert rows["long"].numbers[0]["accuracy"] is not None
    table = (tmp_path / "table.md").read_text()
    assert "| single head |" in table
    assert "| deep | uncertainty |" in table
    assert (tmp_path / "figures" / "accuracy_difference.png").exists()
    assert "deep" in (tmp_path / "report.html").read_text()
    # Nothing is trained again, and a row that is added is trained alone.
    trained: list[str] = []
    real = lab.train_family

    def noting(*args: Any, **options: Any) -> Any:
        trained.append(Path(options["output_dir"]).name)
        return real(*args, **options)

    monkeypatch.setattr(lab, "train_family", noting)
    run_families(made)
    assert trained == []
    more = replace(made, methods=made.methods | {"heads": FamilyMethod(family="heads", members=2)})
    run_families(more)
    assert trained == ["heads", "heads"]


def test_no_prompt_stands_on_both_sides_and_every_family_sees_the_same_rows(
    sets: dict[str, str], tmp_path: Path
) -> None:
    made = config(sets, tmp_path)
    split_rows(made, 0)
    training, test = seed_rows(made, 0)
    apart = {row.prompt for rows in test.values() for row in rows}
    assert len(training) + sum(map(len, test.values())) == 40  # 20 of each set
    assert apart
    assert not apart & {row.prompt for row in training}
    split_rows(made, 1)
    assert {row.prompt for row in seed_rows(made, 1)[0]} != {row.prompt for row in training}


def test_cost_counts_the_passes_of_an_ensemble() -> None:
    tokenizer = make_tokenizer()
    models = [
        RewardModel.from_backbone(tiny_backbone(vocab_size=len(tokenizer)), tokenizer, seed=s)
        for s in range(3)
    ]
    rows = [PreferenceRow(*row) for row in tiny_preferences(4)]
    found = cost(models, models[0], rows, repeats=1)
    assert found["passes"] == pytest.approx(3.0)
    assert found["seconds ratio"] > 1.0


def test_calibration_is_that_of_the_models_own_logits_whatever_its_saved_scale() -> None:
    tokenizer = make_tokenizer()
    body = tiny_backbone(vocab_size=len(tokenizer))
    model = RewardModel.from_backbone(body, tokenizer, seed=1).eval()
    model.reward_mean, model.reward_std = torch.tensor([2.0]), torch.tensor([5.0])
    rows = [PreferenceRow(*row) for row in tiny_preferences(20)]
    raw = evaluate_preferences(functools.partial(model.score, normalise=False), rows)
    found = calibration(model, rows)
    assert found["Brier"] == pytest.approx(raw["brier"], abs=1e-5)
    assert found["ECE"] == pytest.approx(raw["ece"], abs=1e-5)


def test_an_estimate_over_seeds_is_paired_and_needs_a_number_of_every_seed() -> None:
    first = FamilyRuns(name="a", label="a", numbers={0: {"x": 1.0, "y": 1.0}, 1: {"x": 3.0}})
    other = FamilyRuns(name="b", label="b", numbers={0: {"x": 2.0}, 1: {"x": 4.5}})
    mean = first.estimate("x")
    assert mean is not None
    assert mean.mean == 2.0
    # Student's t for two values: 12.706 * sqrt(2) / sqrt(2)
    assert mean.high - mean.mean == pytest.approx(12.7062, abs=1e-3)
    difference = other.estimate("x", less=first)
    assert difference is not None
    assert difference.mean == 1.25
    assert difference.high - 1.25 == pytest.approx(12.7062 * 0.25, abs=1e-3)
    assert first.estimate("y") is None
    alone = FamilyRuns(name="a", label="a", numbers={0: {"x": 1.0}}).estimate("x")
    assert alone is not None
    assert math.isnan(alone.high)


def test_the_last_uncertainty_there_is_is_the_tables() -> None:
    def reward(prompts: Any, completions: Any) -> Tensor:
        return torch.tensor([float(len(c)) for c in completions])

    from trueward.evaluate.diagnosis import diagnose

    rows = [PreferenceRow(*row) for row in tiny_preferences(12)]
    numbers = numbers_of(diagnose(reward, rows))
    assert "correlation with error" not in numbers  # one member without a std knows nothing
    assert 0 <= numbers["reward AUROC repeated x4"] <= 1
    assert numbers["reward AUROC repeated x4"] < 0.1  # four times as long: a longer one wins here


def test_a_markdown_table_has_one_line_for_each_row() -> None:
    table = Table(columns=["a\nb", "c"], rows=[["x", None], ["y", 2]])
    assert markdown(table) == "| a b | c |\n| --- | --- |\n| x |  |\n| y | 2 |"


def test_what_cannot_be_compared_is_refused(sets: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give methods and preferences in a file"):
        run_families(FamiliesConfig(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="need one called 'single'"):
        config(sets, tmp_path, methods={"deep": FamilyMethod(family="deep")})
    with pytest.raises(ValueError, match=r"test must lie in \(0, 1\), got 1.0"):
        config(sets, tmp_path, test=1.0)


def test_a_row_that_fails_is_told_and_the_others_are_there(
    sets: dict[str, str], tmp_path: Path
) -> None:
    made = config(sets, tmp_path, seeds=1)
    broken = FamilyMethod(family="brme", members=2, preset="sound")  # these rows have no ratings
    made = replace(made, methods={"single": made.methods["single"], "sound": broken})
    with pytest.raises(DataError, match=r"seed-0/sound failed \(.*score_chosen"):
        run_families(made)
    assert (tmp_path / "failures.txt").exists()
    assert "single head" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "families.json").read_text())["single"]["0"]["accuracy"] >= 0
