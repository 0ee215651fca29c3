import csv
import io
import json
import random
from pathlib import Path

import pytest

from trueward.data.formats import DataError, PreferenceRow, read_jsonl
from trueward.evaluate.preferences import wilson_interval
from trueward.refine.review import (
    COLUMNS,
    doubtful_pairs,
    export_for_review,
    import_reviews,
    review_id,
)

SUFFIXES = ["csv", "jsonl"]


def rows_of(count: int = 40, *, right: float = 0.5) -> list[PreferenceRow]:
    """Pairs of a good and a bad text, some of them labelled the wrong way round."""
    rng = random.Random(0)
    rows = []
    for i in range(count):
        sides = [f'good {i}, with\na line, and "quotes"; ümläut', f"bad {i}"]
        chosen, rejected = sides if rng.random() < right else sides[::-1]
        extra = {
            "confidence": 0.5 + 0.1 * (i % 5),
            "chosen_reward": rng.gauss(0, 1),
            "rejected_reward": rng.gauss(0, 1),
        }
        rows.append(PreferenceRow(f"p{i}", chosen, rejected, margin=0.3, extra=extra, weight=2.0))
    return rows


def shown(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".jsonl":
        return [row for _, row in read_jsonl(path)]
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))


def fill(path: Path, records: list[dict[str, str]], *, delimiter: str = ",") -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    path.write_text(out.getvalue(), "utf-8-sig")


def answer(record: dict[str, str]) -> dict[str, str]:
    """What someone says who sees the two texts alone."""
    return record | {"answer": "1" if record["completion_1"].startswith("good") else "2"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_answers_come_back_to_their_pairs_whatever_became_of_the_table(suffix: str, tmp_path: Path):
    rows, path = rows_of(), tmp_path / f"review.{suffix}"
    assert export_for_review(rows, path, limit=40, seed=1) == 40
    records = shown(path)
    assert list(records[0]) == list(COLUMNS)
    firsts = [record["completion_1"].startswith("good") for record in records]
    assert 8 < sum(firsts) < 32  # both orders are there
    random.Random(2).shuffle(records)
    answers = [dict(reversed(answer(r | {"completion_2": "cut"}).items())) for r in records]
    fill(path, answers, delimiter=";")
    again = rows[::-1]  # the rows stand in another order
    found = import_reviews(path, again)
    assert len(found.rows) == 40
    assert all(row.chosen.startswith("good") for row in found.rows)
    assert [row.prompt for row in found.rows] == [row.prompt for row in again]
    wrong = sum(row.chosen.startswith("bad") for row in rows)
    assert found.counts == {
        "confirmed": 40 - wrong,
        "relabelled": wrong,
        "ties": 0,
        "dropped": 0,
        "unanswered": 0,
        "unknown": 0,
    }
    assert found.agreement is not None
    assert found.agreement.value == (40 - wrong) / 40
    assert (found.agreement.low, found.agreement.high) == wilson_interval(40.0 - wrong, 40)


def test_a_relabelled_row_changes_all_that_belongs_to_its_sides(tmp_path: Path):
    extra = {"confidence": 0.6, "chosen_reward": 1.0, "rejected_reward": 2.0, "chosen_index": 3}
    row = PreferenceRow("p", "a", "b", 0.5, "f:1", extra, 0.25)
    path = tmp_path / "review.csv"
    for turned, word in ((False, "2"), (True, "1")):
        path.write_text(f"id,answer\n{review_id(row, turned=turned)},{word}\n")
        found = import_reviews(path, [row])
        assert (
            found.relabelled
            == found.rows
            == [
                PreferenceRow(
                    "p",
                    "b",
                    "a",
                    None,
                    "f:1",
                    {
                        "confidence": None,
                        "rejected_reward": 1.0,
                        "chosen_reward": 2.0,
                        "rejected_index": 3,
                        "labelled_by": "people",
                    },
                    0.25,
                )
            ]
        )


def test_every_kind_of_answer_has_its_list_and_nothing_is_lost(tmp_path: Path):
    rows = rows_of(7)
    words = ["1", " TIE ", "drop", "", "2.0", "Drop"]
    lines = [f"{review_id(row)},{word}" for row, word in zip(rows, words, strict=False)]
    path = tmp_path / "review.csv"
    path.write_text("id,answer\n" + "\n".join([*lines, "feed,1", "beef,", ""]))
    found = import_reviews(path, rows)
    assert [row.prompt for row in found.confirmed] == ["p0"]
    assert found.confirmed[0].extra == rows[0].extra | {"labelled_by": "people"}
    assert found.confirmed[0].margin == 0.3
    assert [row.prompt for row in found.relabelled] == ["p4"]
    assert [row.prompt for row in found.ties] == ["p1"]
    assert found.ties[0].extra["tie"] is True
    assert [row.prompt for row in found.dropped] == ["p2", "p5"]
    assert found.unanswered == [rows[3], rows[6]]
    assert [row.prompt for row in found.rows] == ["p0", "p3", "p4", "p6"]
    assert [(a.where, a.id, a.answer) for a in found.unknown] == [(f"{path}:8", "feed", "1")]
    assert found.agreement is not None
    assert found.agreement.value == 1.5 / 3
    nothing = import_reviews(path, rows[6:])
    assert nothing.agreement is None
    assert len(nothing.unknown) == 6


def test_the_order_of_doubt_by_hand():
    def row(name: str, margin: float | None, confidence: float | None) -> PreferenceRow:
        reward = None if margin is None else 0.0
        extra = {"chosen_reward": margin, "rejected_reward": reward, "confidence": confidence}
        return PreferenceRow(name, "a", "b", extra=extra)

    rows = [
        row("sure", 3.0, 0.9),  # ranks 4 of 4 and 4 of 4
        row("near", -0.1, 0.6),  # 1 and 2.5
        row("below", 0.5, 0.4),  # 2 and 2.5: as near to the gate from below
        row("gate", -2.0, 0.5),  # 3 and 1
        row("nothing", None, None),
    ]
    assert [r.prompt for r in doubtful_pairs(rows, limit=9)] == [
        "near",
        "gate",
        "below",
        "sure",
        "nothing",
    ]
    by_margin = [row(r.prompt, m, None) for r, m in zip(rows, (4.0, -3.0, 2.0, -1.0, None), strict=True)]  # fmt: skip  # noqa: E501
    assert [r.prompt for r in doubtful_pairs(by_margin, limit=3)] == ["gate", "below", "near"]
    assert [r.prompt for r in doubtful_pairs(rows, limit=1, gate=0.9)] == ["near"]
    high = [row(str(c), None, c) for c in (0.5, 0.7, 0.9)]
    assert [r.prompt for r in doubtful_pairs(high, limit=3, gate=0.9)] == ["0.9", "0.7", "0.5"]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        doubtful_pairs(rows, limit=0)


def test_a_pair_is_shown_once_and_one_that_people_labelled_never():
    rows = rows_of(4)
    people = PreferenceRow(
        rows[0].prompt, rows[0].chosen, rows[0].rejected, extra={"labelled_by": "people"}
    )
    shown_rows = doubtful_pairs([*rows, rows[1], people], limit=9)
    assert sorted(row.prompt for row in shown_rows) == ["p1", "p2", "p3"]


def test_what_is_shown_first_hangs_on_seed_and_texts_and_not_on_the_label(tmp_path: Path):
    rows = rows_of()
    turned = [PreferenceRow(r.prompt, r.rejected, r.chosen, extra=r.extra) for r in rows]
    tables = []
    for i, (some, seed) in enumerate(((rows, 1), (turned, 1), (rows, 2))):
        export_for_review(some, tmp_path / f"{i}.csv", limit=40, seed=seed)
        tables.append({r["prompt"]: r["completion_1"] for r in shown(tmp_path / f"{i}.csv")})
    assert tables[0] == tables[1] != tables[2]
    text = (tmp_path / "0.csv").read_text()
    assert "confidence" not in text
    assert "reward" not in text


def test_a_text_that_looks_like_a_formula_is_shown_as_a_text(tmp_path: Path):
    row = PreferenceRow("=1+1", "@SUM(A1)", "-5", extra={})
    export_for_review([row], tmp_path / "review.csv", limit=1, seed=0)
    (record,) = shown(tmp_path / "review.csv")
    assert record["prompt"] == "'=1+1"
    assert {record["completion_1"], record["completion_2"]} == {"'@SUM(A1)", "'-5"}
    fill(tmp_path / "review.csv", [record | {"answer": "tie"}])
    assert import_reviews(tmp_path / "review.csv", [row]).counts["ties"] == 1


def test_answers_are_not_written_over(tmp_path: Path):
    rows, path = rows_of(3), tmp_path / "new" / "review.csv"
    export_for_review(rows, path, limit=3, seed=0)
    export_for_review(rows, path, limit=2, seed=0)  # no answer yet
    records = shown(path)
    assert len(records) == 2
    fill(path, [records[0], answer(records[1])])
    before = path.read_bytes()
    with pytest.raises(DataError, match="holds answers"):
        export_for_review(rows, path, limit=3, seed=0)
    assert path.read_bytes() == before


def test_a_completion_longer_than_a_cell_of_the_csv_module_is_read(tmp_path: Path):
    row = PreferenceRow("p", "a" * 200_000, "b")
    export_for_review([row], tmp_path / "review.csv", limit=1, seed=0)
    assert import_reviews(tmp_path / "review.csv", [row]).unanswered == [row]


ERRORS = [
    ('id,answer\n"a\nb",1\nx,maybe\n', "csv", ":4: an answer must be 1, 2, tie or drop"),
    ("id,answer\nx,1\ny,2\nx,2\n", "csv", ":4: the pair x is answered with '2' here and with '1'"),
    ("id,answer\n,1\n", "csv", ":2: an answer without an id"),
    ("id,label\nx,1\n", "csv", ":1 must name the columns id and answer, has id, label"),
    ("", "csv", ":1 must name the columns id and answer, has nothing"),
    ('id,answer\nx,"1"2\n', "csv", ":2 is broken CSV"),
    ('{"id": "x", "answer": 3}\n', "jsonl", ":1: an answer must be 1, 2, tie or drop"),
    ('{"id": "x"}\n', "jsonl", ":1 needs 'id' and 'answer', has id"),
    ("id,answer\n", "txt", "must be a .csv or a .jsonl file"),
]


@pytest.mark.parametrize(("text", "suffix", "says"), ERRORS)
def test_a_mistake_is_named_by_file_and_line(text: str, suffix: str, says: str, tmp_path: Path):
    path = tmp_path / f"review.{suffix}"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        import_reviews(path, rows_of(2))
    assert str(error.value).startswith(f"{path}")
    assert says in str(error.value)


def test_two_orders_of_one_pair_must_say_the_same(tmp_path: Path):
    row, path = rows_of(1)[0], tmp_path / "review.csv"
    both = [review_id(row), review_id(row, turned=True)]
    path.write_text(f"id,answer\n{both[0]},1\n{both[1]},2\n")
    assert import_reviews(path, [row]).counts["confirmed"] == 1
    path.write_text(f"id,answer\n{both[0]},1\n{both[1]},1\n")
    with pytest.raises(DataError, match=r"review.csv:3: this pair has another answer at .*csv:2"):
        import_reviews(path, [row])


def test_numbers_of_json_are_answers_too(tmp_path: Path):
    row, path = rows_of(1)[0], tmp_path / "review.jsonl"
    path.write_text(json.dumps({"id": review_id(row), "answer": 1}))
    assert import_reviews(path, [row]).counts["confirmed"] == 1
    path.write_bytes("id,ä\n".encode("latin-1"))
    latin = path.rename(tmp_path / "latin.csv")
    with pytest.raises(DataError, match="save it as CSV UTF-8"):
        import_reviews(latin, [row])
