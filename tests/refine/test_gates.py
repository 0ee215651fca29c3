import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import (
    Completion,
    DataError,
    PreferenceRow,
    Prompt,
    load_preferences,
    write_jsonl,
)
from trueward.evaluate.judges import function_judge
from trueward.refine.gates import (
    GateConfig,
    Reason,
    apply_gates,
    judge_probabilities,
    length_balanced,
    length_balanced_weights,
    log_length_ratio,
    record_of,
)


def row_of(
    chosen: str, rejected: str, prompt: Prompt = "p", *, weight: float = 1.0, **extra: object
) -> PreferenceRow:
    return PreferenceRow(prompt, chosen, rejected, where="made.jsonl:1", extra=extra, weight=weight)


def lengths_row(chosen: int, rejected: int, *, weight: float = 1.0, **extra: object):
    return row_of("a" * chosen, "b" * rejected, weight=weight, **extra)


def reasons(rows: Sequence[PreferenceRow], judge=None, **gates: object) -> list[str | None]:
    """The reason of each row, None where it is kept; nothing may be lost."""
    result = apply_gates(rows, GateConfig(**gates), judge)  # type: ignore[arg-type]
    assert len(result.kept) + len(result.dropped) == len(rows)
    by_text = {row.prompt: reason for row, reason in result.dropped}
    return [by_text.get(row.prompt) for row in rows]


def numbered(*rows: PreferenceRow) -> list[PreferenceRow]:
    return [PreferenceRow(f"p{i}", r.chosen, r.rejected, extra=r.extra) for i, r in enumerate(rows)]


# ---- gates -----------------------------------------------------------------------------------


def test_thresholds_are_inclusive_and_what_is_missing_is_said_to_be_missing():
    rows = numbered(*(row_of("a", "b", confidence=c) for c in (0.5, 0.1 * 3, 0.29, None)))
    assert reasons(rows, min_confidence=0.3) == [
        None,
        None,
        Reason.LOW_CONFIDENCE,
        Reason.NO_CONFIDENCE,
    ]
    rewards = [(1.0, 0.5), (0.5, 1.0), (1.0, None)]
    rows = numbered(
        *(row_of("a", "b", chosen_reward=c, rejected_reward=r) for c, r in rewards),
    )
    assert reasons(rows, min_margin=0.5) == [None, Reason.SMALL_MARGIN, Reason.NO_MARGIN]
    assert reasons(rows, min_margin=-0.5) == [None, None, Reason.NO_MARGIN]
    rows = numbered(lengths_row(6, 3), lengths_row(3, 6), lengths_row(7, 3), lengths_row(3, 7))
    assert reasons(rows, max_length_ratio=2.0) == [None, None, *[Reason.LENGTH_RATIO] * 2]
    assert reasons(rows) == [None] * 4  # all gates are off


def test_the_first_gate_that_fails_is_the_reason_and_reasons_are_counted():
    rows = numbered(
        lengths_row(9, 1, confidence=0.1, chosen_reward=0.0, rejected_reward=1.0),
        lengths_row(9, 1, confidence=0.9, chosen_reward=0.0, rejected_reward=1.0),
        lengths_row(9, 1, confidence=0.9, chosen_reward=2.0, rejected_reward=1.0),
        lengths_row(2, 1, confidence=0.9, chosen_reward=2.0, rejected_reward=1.0),
        lengths_row(9, 1, confidence=0.2, chosen_reward=2.0, rejected_reward=1.0),
    )
    gates = GateConfig(min_confidence=0.5, min_margin=0.0, max_length_ratio=3.0)
    result = apply_gates(rows, gates)
    assert result.kept == [rows[3]]
    assert [row for row, _ in result.dropped] == [rows[0], rows[1], rows[2], rows[4]]
    assert result.counts == {"low confidence": 2, "small margin": 1, "length ratio": 1}


def test_labels_of_people_pass_the_gates_on_what_machines_say():
    people = row_of("a" * 50, "b", confidence=0.1, labelled_by="people")
    gates = GateConfig(
        min_confidence=0.5, min_margin=0.0, max_length_ratio=2.0, min_judge_probability=0.9
    )
    judge = function_judge(lambda *_: 0.5)
    assert apply_gates([people], gates, judge).kept == [people]
    machine = row_of("a", "b", confidence=0.9, chosen_reward=1.0, rejected_reward=0.0)
    assert apply_gates([machine], gates, judge).counts == {"low judge probability": 1}


def test_the_judge_is_asked_about_pairs_that_passed_and_its_answer_is_kept():
    rows = numbered(
        row_of("good", "bad", confidence=0.9),
        row_of("bad", "good", confidence=0.9),
        row_of("good", "bad", confidence=0.1),
        row_of("unclear", "bad", confidence=0.9),
        row_of("mute", "bad", confidence=0.9),
    )
    asked: list[Prompt] = []

    def judge(
        prompts: Sequence[Prompt], one: Sequence[Completion], two: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        asked.extend(prompts)
        values = {"good": 1.0, "bad": 0.0, "unclear": 0.2, "mute": math.nan}
        gaps = [values[str(a)] - values[str(b)] for a, b in zip(one, two, strict=True)]
        return torch.tensor([0.5 + g / 2 for g in gaps])

    result = apply_gates(rows, GateConfig(min_confidence=0.5, min_judge_probability=0.6), judge)
    assert asked == ["p0", "p1", "p3", "p4"]
    assert [row.extra["judge_probability"] for row in result.kept] == pytest.approx([1.0, 0.6])
    assert result.counts == {
        "low confidence": 1,
        "no judgement": 1,
        "low judge probability": 1,
    }
    wrong = next(row for row, reason in result.dropped if reason == Reason.JUDGED_WRONG)
    assert wrong.extra == {"confidence": 0.9, "judge_probability": 0.0}
    assert "judge_probability" not in rows[0].extra
    with pytest.raises(ValueError, match="needs a judge"):
        apply_gates(rows, GateConfig(min_judge_probability=0.6))


def test_a_judge_is_asked_in_turns_and_its_answers_are_turned_back():
    rows = [row_of(f"a{i}", f"b{i}") for i in range(60)]
    firsts: list[bool] = []
    judge = function_judge(lambda _p, one, _two: firsts.append(one[0] == "a") or 0.75)
    found = judge_probabilities(rows, judge)
    assert 15 < sum(firsts) < 45
    assert found == [0.75 if first else 0.25 for first in firsts]
    assert judge_probabilities([], judge) == []


# ---- repeats ---------------------------------------------------------------------------------


def test_both_orders_of_two_texts_go_unless_people_decided():
    pairs = [row_of("a", "b"), row_of("b", "a"), row_of("a", "c"), row_of("b", "a", "q")]
    result = apply_gates(pairs, GateConfig())
    assert result.kept == pairs[2:]
    assert result.counts == {"contradiction": 2}
    people = row_of("b", "a", labelled_by="people")
    assert apply_gates([pairs[0], people], GateConfig()).kept == [people]
    other = row_of("a", "b", labelled_by="people")
    assert apply_gates([people, other, pairs[0]], GateConfig()).kept == []
    assert apply_gates(pairs, GateConfig(drop_contradictions=False)).kept == pairs


def test_the_wrong_one_of_two_orders_may_be_gone_before():
    sure, unsure = row_of("a", "b", confidence=0.9), row_of("b", "a", confidence=0.2)
    assert apply_gates([sure, unsure], GateConfig(min_confidence=0.5)).kept == [sure]


def test_of_equal_pairs_one_is_kept_that_of_people_first():
    first, again = row_of("a", "b", confidence=0.5), row_of("a", "b", confidence=0.9)
    said = PreferenceRow(
        [{"role": "user", "content": "p"}],
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "b"}],
        extra={"labelled_by": "people"},
    )
    assert apply_gates([first, again], GateConfig()).kept == [first]
    assert apply_gates([first, again, said], GateConfig()).counts == {"duplicate": 2}
    assert apply_gates([first, again, said], GateConfig()).kept == [said]
    assert apply_gates([first, again], GateConfig(drop_duplicates=False)).kept == [first, again]
    # One that failed a gate does not take the other with it.
    assert apply_gates([first, again], GateConfig(min_confidence=0.8)).kept == [again]


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ({"min_confidence": 1.5}, "min_confidence must lie in"),
        ({"min_judge_probability": -0.1}, "min_judge_probability must lie in"),
        ({"min_margin": math.nan}, "min_margin must be a finite number"),
        ({"max_length_ratio": 0.5}, "at least 1"),
        ({"max_length_ratio": math.nan}, "at least 1"),
    ],
)
def test_gates_that_make_no_sense_are_refused(gates: dict[str, float], says: str):
    with pytest.raises(ValueError, match=says):
        GateConfig(**gates)  # type: ignore[arg-type]


def test_a_number_that_is_none_is_named_by_its_line():
    with pytest.raises(DataError, match=r"made.jsonl:1: 'confidence' must be a finite number"):
        apply_gates([row_of("a", "b", confidence="0.9")], GateConfig(min_confidence=0.5))


# ---- lengths ---------------------------------------------------------------------------------


def biased(count: int = 200) -> list[PreferenceRow]:
    """Four in five chosen sides are longer, by all kinds of factors; some are equally long."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        short = 20 + int(torch.randint(60, (), generator=generator))
        long = short + int(torch.randint(80, (), generator=generator)) * (i % 11 > 0)
        turned = bool(torch.rand((), generator=generator) < 0.2)
        rows.append(lengths_row(*((short, long) if turned else (long, short)), at=i))
    return rows


def test_a_balanced_subset_is_as_often_longer_as_shorter_by_as_much():
    rows = biased()
    result = length_balanced(rows, 3)
    assert len(result.kept) + len(result.dropped) == len(rows)
    assert set(result.counts) == {"length balance"}
    bins: dict[int, list[int]] = {}
    for row in result.kept:
        ratio = log_length_ratio(row)
        if ratio:
            bins.setdefault(int(abs(ratio) / 0.25), []).append(1 if ratio > 0 else -1)
    assert len(bins) > 3
    assert all(sum(signs) == 0 for signs in bins.values())
    # No pair was dropped that had a partner.
    gone = {(int(abs(x) / 0.25), x > 0) for x in (log_length_ratio(r) for r, _ in result.dropped)}
    assert not any((place, not longer) in gone for place, longer in gone)
    assert [row for row in rows if not log_length_ratio(row)] == [
        row for row in result.kept if not log_length_ratio(row)
    ]
    places = [row.extra["at"] for row in result.kept]
    assert places == sorted(places)


def test_the_subset_hangs_on_its_seed():
    rows = biased()
    assert length_balanced(rows, 3).kept == length_balanced(rows, 3).kept
    assert length_balanced(rows, 3).kept != length_balanced(rows, 4).kept
    assert len(length_balanced(rows, 3).kept) == len(length_balanced(rows, 4).kept)
    unlike = [lengths_row(40, 20), lengths_row(10, 11)]
    assert length_balanced(unlike).kept == []
    assert length_balanced(unlike, bin_width=1.0).kept == unlike
    with pytest.raises(ValueError, match="bin_width must be above 0"):
        length_balanced(rows, bin_width=0.0)


def test_labels_of_people_stay_in_the_subset_before_others():
    rows = [lengths_row(20, 10, at=i) for i in range(20)] + [lengths_row(10, 20)] * 2
    for i in (7, 13):
        rows[i] = lengths_row(20, 10, at=i, labelled_by="people")
    kept = length_balanced(rows, 0).kept
    assert [row.extra["at"] for row in kept[:2]] == [7, 13]


def test_weights_by_hand():
    rows = [*[lengths_row(2, 1)] * 3, lengths_row(1, 2), lengths_row(1, 1)]
    assert length_balanced_weights(rows) == pytest.approx([2 / 3] * 3 + [2.0, 1.0])
    turned = [lengths_row(1, 2)] * 3 + [lengths_row(2, 1)]
    assert length_balanced_weights(turned) == pytest.approx([2 / 3] * 3 + [2.0])
    assert length_balanced_weights(rows[:3]) == [1.0] * 3  # nothing to balance with
    assert length_balanced_weights([]) == []


def test_weights_give_a_half_and_keep_the_mean():
    rows = biased()
    weights = length_balanced_weights(rows)
    signs = [(x > 0) + 0.5 * (x == 0) for x in map(log_length_ratio, rows)]
    share = math.fsum(w * s for w, s in zip(weights, signs, strict=True)) / math.fsum(weights)
    assert share == pytest.approx(0.5)
    assert math.fsum(weights) / len(rows) == pytest.approx(1.0)


def test_a_factor_stays_below_its_maximum_and_the_mean_stays_one():
    rows = [lengths_row(2, 1)] * 19 + [lengths_row(1, 2)]
    weights = length_balanced_weights(rows, max_weight=4.0)
    assert weights == pytest.approx([16 / 19] * 19 + [4.0])
    assert length_balanced_weights(rows, max_weight=1.0) == pytest.approx([1.0] * 20)
    with pytest.raises(ValueError, match="max_weight must be at least 1"):
        length_balanced_weights(rows, max_weight=0.5)


def test_weights_multiply_those_that_rows_have():
    rows = [lengths_row(2, 1, weight=6.0), lengths_row(2, 1, weight=0.0), lengths_row(1, 2)]
    assert length_balanced_weights(rows) == pytest.approx([7 / 12 * 6, 0.0, 7 / 2])
    rows = [lengths_row(2, 1, weight=0.0), lengths_row(1, 2)]
    assert length_balanced_weights(rows) == [0.0, 1.0]


def test_a_record_is_read_back_as_the_row_it_was(tmp_path: Path):
    rows = [
        PreferenceRow("p", "a", "b", margin=0.5, extra={"confidence": None, "x": [1]}, weight=0.25),
        PreferenceRow(
            [{"role": "user", "content": "q"}],
            [{"role": "assistant", "content": "a"}],
            [{"role": "assistant", "content": "b"}],
        ),
    ]
    write_jsonl(tmp_path / "rows.jsonl", map(record_of, rows))
    for row, found in zip(rows, load_preferences(tmp_path / "rows.jsonl").rows, strict=True):
        assert found == PreferenceRow(
            row.prompt, row.chosen, row.rejected, row.margin, found.where, row.extra, row.weight
        )
