import re
from collections.abc import Sequence

import pytest

from trueward.data.formats import Completion, PreferenceRow, Prompt, text_of
from trueward.evaluate.shift import EnergyTest, ShiftTable, length_difference, shift_table
from trueward.report.html import render_report
from trueward.report.shift import shift_figure, shift_section, shift_tables
from trueward.report.svg import SERIES_LIGHT, to_svg


def long(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [float(len(text_of(c))) for c in completions]


def short(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [-float(len(text_of(c))) for c in completions]


def made(rewards: int = 2) -> ShiftTable:
    """Length is right on 3 of 4 pairs at first and on 1 of 4 afterwards."""
    sources = {}
    for name, right in (("SFT", 3), ("PPO, 40 steps", 1), ("refined", 2)):
        sources[name] = [
            PreferenceRow(f"prompt {i}", *(("aa", "b") if i < right else ("b", "aa")))
            for i in range(4)
        ]
    some = {"before": long, "after": short} if rewards == 2 else {"before": long}
    return shift_table(some, sources, resamples=200)


def test_the_figure_draws_each_accuracy_at_its_source_with_its_interval() -> None:
    table = made()
    axes = shift_figure(table).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["SFT", "PPO, 40 steps", "refined"]
    lines = {line.get_color(): line for line in axes.lines if len(line.get_xdata()) == 3}
    before, after = (lines[color] for color in SERIES_LIGHT[:2])
    assert list(before.get_ydata()) == [0.75, 0.25, 0.5]
    assert list(after.get_ydata()) == [0.25, 0.75, 0.5]
    # Side by side about the source's place, so that one does not hide the other.
    for line, side in ((before, -1), (after, 1)):
        offsets = [float(x) - place for place, x in enumerate(line.get_xdata())]
        assert offsets == pytest.approx([side * 0.045] * 3)
    ends = [
        tuple(segment[:, 1]) for collection in axes.collections for segment in
        collection.get_segments()
    ]  # fmt: skip
    found = table.accuracy("before", "PPO, 40 steps")
    assert (found.low, found.high) in ends
    assert len(ends) == 6


def test_one_reward_has_no_legend_and_no_differences() -> None:
    table = made(rewards=1)
    assert not shift_figure(table).legends
    assert len(shift_figure(made()).legends) == 1
    assert len(shift_tables(table)) == 1


def test_tables_hold_the_numbers_with_their_intervals() -> None:
    table = made()
    accuracy, difference = shift_tables(table)
    assert accuracy.columns == ["reward", "SFT", "PPO, 40 steps", "refined"]
    found = table.accuracy("before", "SFT")
    assert accuracy.rows[0][:2] == [
        "before",
        f"0.750 [{found.low:.3f}, {found.high:.3f}]",
    ]
    assert "SFT: 4 of 4 prompts" in accuracy.notes
    row = [str(cell) for cell in difference.rows[0]]
    assert row[0] == "after less before"
    assert row[1].startswith("\N{MINUS SIGN}0.500 [")
    assert row[2].startswith("0.500 [")


def test_how_far_the_completions_moved_stands_beside_the_accuracies() -> None:
    lengths = {"refined": length_difference(["p", "q"], ["aaaa", "bb"], ["p", "q"], ["a", "b"])}
    energies = {
        "refined": EnergyTest(distance=2.0, coefficient=0.25, p_value=0.012, permutations=999)
    }
    *_, moved = shift_tables(made(), lengths=lengths, energies=energies)
    assert moved.caption == "How far the completions moved from those of SFT."
    assert [row[0] for row in moved.rows] == ["PPO, 40 steps", "refined"]
    assert moved.rows[0][1:] == [None] * 4
    assert moved.rows[1][1] == "3"
    assert str(moved.rows[1][2]).startswith("2 [")
    assert moved.rows[1][3:] == ["0.250", "0.012"]
    *_, alone = shift_tables(made(), lengths=lengths)
    assert "p" not in alone.columns


def test_the_section_is_a_part_of_a_page() -> None:
    section = shift_section(made())
    page = render_report(title="t", lead="l", sections=[section])
    assert page.count("<svg") == 1
    assert "after less before" in page
    assert "95 % intervals over prompts" in page


def test_pairs_that_were_left_out_are_told() -> None:
    table = made(rewards=1)
    table.left_out["refined"] = 7
    (accuracy,) = shift_tables(table)
    assert "7 pairs of refined are longer" in accuracy.notes
    assert not re.search(r"pairs of SFT are longer", accuracy.notes)


def test_a_sources_name_is_no_formula() -> None:
    row = PreferenceRow("p", "aa", "b")
    table = shift_table({"r": long}, {"$x$ or $y$": [row]}, resamples=1)
    assert "$x$ or $y$" in to_svg(shift_figure(table)).replace("&#36;", "$")
