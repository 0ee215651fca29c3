"""The column `weight` of preferences: read, defaulted, refused."""

from pathlib import Path

import pytest

from trueward.data.formats import PreferenceRow, load_preferences, load_prompts, write_jsonl

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def written(path: Path, *weights: object) -> Path:
    rows = [PAIR | {"prompt": f"p{i}", "weight": w} for i, w in enumerate(weights)]
    write_jsonl(path / "rows.jsonl", rows)
    return path / "rows.jsonl"


def test_a_weight_is_a_number_and_one_where_it_is_missing_or_null(tmp_path: Path):
    loaded = load_preferences(written(tmp_path, 2, 0.25, 0, None))
    assert [row.weight for row in loaded.rows] == [2.0, 0.25, 0.0, 1.0]
    assert all(isinstance(row.weight, float) for row in loaded.rows)
    assert all("weight" not in row.extra for row in loaded.rows)
    write_jsonl(tmp_path / "plain.jsonl", [PAIR])
    assert load_preferences(tmp_path / "plain.jsonl").rows[0].weight == 1.0
    assert PreferenceRow("p", "a", "b").weight == 1.0


def test_a_weight_that_is_none_drops_the_row_and_says_where(tmp_path: Path):
    weights = ("1", "-0.5", "NaN", "Infinity", '"2"', "true", "1" + "0" * 400)
    sides = '"chosen": "a", "rejected": "b"'
    lines = [f'{{"prompt": "p{i}", {sides}, "weight": {w}}}' for i, w in enumerate(weights)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    loaded = load_preferences(tmp_path / "rows.jsonl")
    assert [row.prompt for row in loaded.rows] == ["p0"]
    assert loaded.report.counts() == {"bad value": 6}
    assert [problem.where for problem in loaded.report.problems] == [
        f"rows.jsonl:{line}" for line in range(2, 8)
    ]
    assert loaded.report.problems[0].detail == (
        "'weight' must be a finite number of at least 0 or null, got '-0.5'"
    )


def test_prompts_keep_a_column_of_that_name(tmp_path: Path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "weight": "80 kg"}])
    assert load_prompts(tmp_path / "prompts.jsonl").rows[0].extra == {"weight": "80 kg"}


@pytest.mark.parametrize("weight", [0.5, 3])
def test_a_pair_that_differs_in_its_weight_alone_is_a_duplicate(tmp_path: Path, weight: float):
    write_jsonl(tmp_path / "rows.jsonl", [PAIR, PAIR | {"weight": weight}])
    assert load_preferences(tmp_path / "rows.jsonl").report.counts() == {"duplicate": 1}
