import math
from typing import get_args

import pytest
import torch

from trueward.evaluate.multiple_choice import MultipleChoice, retention
from trueward.evaluate.winrate import WinRate, win_rate
from trueward.report.paper import (
    PUBLISHED,
    PaperTable,
    direction_table,
    multiple_choice_table,
    paper_table,
    win_rate_table,
)


def rate(wins: int, of: int = 100) -> WinRate:
    """A win rate whose winners are as long as their references."""
    outcomes = torch.tensor([1.0] * wins + [0.0] * (of - wins))
    return win_rate(lambda p, a, b: outcomes, ["p"] * of, ["aa"] * of, ["bb"] * of)


def test_the_published_numbers_are_those_of_the_paper() -> None:
    """Lang et al. 2024, Tables 2, 4, 5 and 8."""
    assert set(PUBLISHED) == set(get_args(PaperTable)) == {"2", "4", "5", "8"}
    two = PUBLISHED["2"]
    assert two.sets == ("AlpacaFarm sim", "AlpacaFarm human", "LLMBar sim", "Vicuna sim")
    assert two.rows["RLP-SPG"] == (50.2, 57.4, 50.5, 62.5)
    assert two.rows["RLP-UML"] == (49.1, 56.5, 48.5, 61.3)
    assert two.rows["PPO"] == (46.8, 55.1, 47.5, 57.5)
    assert two.rows["SFT"] == (36.7, 44.3, 42.4, 50.0)
    assert two.rows["Best-of-n"] == (45.0, 50.7, 43.4, 52.5)
    assert two.rows["LLaMA-7B"] == (11.3, 6.5, 12.5, 12.8)
    assert two.rows["GPT-4"] == (79.0, 69.8, 74.0, 85.0)
    assert two.rows["ChatGPT"] == (61.4, 52.9, 59.0, 63.7)
    assert PUBLISHED["4"].rows == {
        "InfoMax": (44.4, 46.5),
        "MVI": (48.1, 47.5),
        "CL": (48.2, 46.5),
        "RLP-UML": (49.1, 48.5),
    }
    assert PUBLISHED["5"].rows == {
        "RLAIF": (52.0, 46.0),
        "Reward": (56.0, 48.9),
        "Select-All": (55.0, 48.7),
        "RLP-SPG": (59.0, 50.2),
    }
    assert {k: v[0] for k, v in PUBLISHED["8"].rows.items()} == {
        "GPT-4": 86.4,
        "ChatGPT": 70.0,
        "PPO": 36.9,
        "LLaMA-7B": 35.2,
        "RLP-UML": 37.6,
        "RLP-SPG": 37.3,
    }
    # The same method has the same number wherever it stands.
    for which, method in (("4", "RLP-UML"), ("5", "RLP-SPG")):
        place = PUBLISHED[which].sets.index("AlpacaFarm sim")
        assert PUBLISHED[which].rows[method][place] == two.rows[method][0]
    for published in PUBLISHED.values():
        assert published.baseline in published.rows
        assert all(len(row) == len(published.sets) for row in published.rows.values())
        assert published.unverified <= set(published.rows)


def test_ours_stand_beside_the_papers_in_per_cent() -> None:
    table = paper_table("2", {"PPO": {"LLMBar sim": rate(40)}, "control": {"Vicuna sim": 0.5}})
    cells = {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(cells) == [*PUBLISHED["2"].rows, "control"]
    assert cells["PPO"]["LLMBar sim\npaper"] == "47.5"
    assert cells["PPO"]["LLMBar sim\nours"] == "40.0 ± 4.9"  # sqrt(.4 .6 / 100)
    assert str(cells["PPO"]["LLMBar sim\nours, at equal length"]).startswith("40.0 [")
    assert cells["control"]["Vicuna sim\nours"] == "50.0"
    assert cells["control"]["Vicuna sim\npaper"] is None
    assert cells["SFT"]["LLMBar sim\nours"] is None
    assert "Vicuna sim\nours, at equal length" not in table.columns  # a share has none
    assert "only directions can be compared" in table.notes


def test_rows_of_uncertain_place_are_marked() -> None:
    names = [str(row[0]) for row in paper_table("5", {}).rows]
    assert names == ["RLAIF [unverified]", "Reward [unverified]", "Select-All", "RLP-SPG"]
    assert all("[unverified]" in str(row[0]) for row in paper_table("8", {}).rows)
    assert "could not be verified" in paper_table("5", {}).notes
    assert "[unverified]" not in paper_table("2", {}).notes
    assert "retired" not in paper_table("8", {}).notes  # nobody judges MMLU


def test_directions_are_compared_where_ours_show_one() -> None:
    ours = {
        "PPO": {"AlpacaFarm sim": rate(400, 800), "LLMBar sim": rate(50)},
        "RLP-SPG": {"AlpacaFarm sim": rate(480, 800), "LLMBar sim": rate(52)},
        "SFT": {"AlpacaFarm sim": rate(480, 800), "Vicuna sim": rate(10)},
        "control": {"AlpacaFarm sim": rate(10)},
    }
    table = direction_table("2", ours)
    found = {(row[0], row[1]): row[2:] for row in table.rows}
    assert set(found) == {
        ("RLP-SPG", "AlpacaFarm sim"),
        ("RLP-SPG", "LLMBar sim"),
        ("SFT", "AlpacaFarm sim"),
    }
    half = 196 * math.sqrt(0.25 / 800 + 0.24 / 800)
    assert found["RLP-SPG", "AlpacaFarm sim"] == ["3.4", f"10.0 ± {half:.1f}", "the same"]
    assert found["RLP-SPG", "LLMBar sim"][2] == "none shown"  # 2 points of 100 prompts
    assert found["SFT", "AlpacaFarm sim"][0] == "\N{MINUS SIGN}10.1"
    assert found["SFT", "AlpacaFarm sim"][2] == "the opposite"


def test_directions_of_shares_have_no_interval() -> None:
    table = direction_table("8", {"PPO": {"MMLU": 0.3}, "RLP-UML": {"MMLU": 0.31}})
    assert [list(row) for row in table.rows] == [
        ["RLP-UML [unverified]", "MMLU", "0.7", "1.0", "the same"]
    ]
    other = direction_table("8", {"PPO": {"MMLU": 0.3}, "RLP-UML": {"MMLU": 0.31}}, baseline="PPO")
    assert other == table


@pytest.mark.parametrize(
    ("which", "ours", "says"),
    [
        ("2", {"PPO": {"MMLU": 0.5}}, "table 2 has no set 'MMLU'; it has: AlpacaFarm sim"),
        ("2", {"PPO": {"Vicuna sim": 57.5}}, "PPO on Vicuna sim must be a share"),
    ],
)
def test_what_the_paper_does_not_have_is_refused(which: PaperTable, ours: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        paper_table(which, ours)


def test_a_baseline_that_the_paper_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no method 'DPO'; it has: GPT-4"):
        direction_table("2", {}, baseline="DPO")


def test_several_sets_stand_in_one_table() -> None:
    table = win_rate_table({"AlpacaFarm": rate(483, 805), "LLMBar": rate(40)})
    assert [row[:3] for row in table.rows] == [
        ["AlpacaFarm", 805, "60.0 ± 1.7"],
        ["LLMBar", 100, "40.0 ± 4.9"],
    ]
    assert table.rows[1][4:] == ["40 / 0 / 60", "2", "2"]


def test_knowledge_stands_beside_the_references() -> None:
    def found(acc: float, right: list[bool]) -> MultipleChoice:
        return MultipleChoice(
            acc=acc, acc_stderr=0.1, acc_norm=0.5, acc_norm_stderr=math.nan, acc_bytes=0.5,
            acc_bytes_stderr=0.1, chance=0.25, questions=2, truncated=3, right=right,
        )  # fmt: skip

    ours, ref = found(0.5, [True, False]), found(1.0, [True, True])
    kept = retention(ours.right, ref.right)
    (row,) = multiple_choice_table({"a": ours}, ref={"a": ref}, kept={"a": kept}).rows
    assert row[:5] == ["a", 2, "50.0 ± 10.0", "50.0", "25.0"]
    assert row[5:] == ["100.0 ± 10.0", "\N{MINUS SIGN}50.0 ± 50.0", "1 / 0"]
    alone = multiple_choice_table({"a": ours})
    assert len(alone.columns) == 5
    assert "3 queries of a were cut" in alone.notes
