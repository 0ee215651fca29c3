import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from trueward.data import (
    DataError,
    DemonstrationRow,
    HubName,
    LoadReport,
    PreferenceRow,
    PromptRow,
    load_demonstrations,
    load_preferences,
    load_prompts,
    prompt_key,
    read_jsonl,
    resolve_source,
    split_by_prompt,
    text_of,
    write_jsonl,
)

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.fixture(autouse=True)
def _no_data_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "data" not in request.keywords:
        monkeypatch.delenv("TRUEWARD_DATA", raising=False)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def jsonl(path: Path, *rows: Any) -> Path:
    """Rows as JSON lines; a string stands for itself, so that lines can be blank or broken."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return path


def pairs(number: int) -> list[dict[str, Any]]:
    return [PAIR | {"prompt": f"Why {i}?"} for i in range(number)]


def only_problem(loaded: Any) -> tuple[str, str, str, bool]:
    (problem,) = loaded.report.problems
    return tuple(problem)


def one_bad_row(tmp_path: Path, row: Any, **options: Any) -> tuple[str, str]:
    """Kind and detail of what is wrong with a preference row that stands beside a good one."""
    loaded = load_preferences(jsonl(tmp_path / "a.jsonl", PAIR, row), **options)
    kind, where, detail, kept = only_problem(loaded)
    assert (len(loaded.rows), where, kept) == (1, "a.jsonl:2", False)
    return kind, detail


# Preference rows -----------------------------------------------------------------------------


def test_a_standard_preference_row_keeps_its_strings_margin_and_other_columns(tmp_path):
    row = PAIR | {"margin": 2, "tie": False, "tools": [1], "source": "x"}
    loaded = load_preferences(jsonl(tmp_path / "a.jsonl", row))
    assert loaded.rows == [
        PreferenceRow("Why?", "Because.", "No.", 2.0, "a.jsonl:1", {"tools": [1], "source": "x"})
    ]
    assert isinstance(loaded.rows[0].margin, float)


def test_a_conversational_row_passes_unchanged_with_and_without_conversational(tmp_path):
    parts = [{"type": "image", "url": "u"}, {"type": "text", "text": "What is it?"}]
    row = {"prompt": [user(parts)], "chosen": [assistant("A cat.")], "rejected": [assistant("?")]}
    path = jsonl(tmp_path / "a.jsonl", row)
    for conversational in (False, True):
        loaded = load_preferences(path, conversational=conversational).rows[0]
        assert {c: getattr(loaded, c) for c in row} == row


def test_conversational_makes_strings_into_turns(tmp_path):
    row = load_preferences(jsonl(tmp_path / "a.jsonl", PAIR), conversational=True).rows[0]
    assert row.prompt == [user("Why?")]
    assert row.chosen == [assistant("Because.")]
    assert row.rejected == [assistant("No.")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # TRL's own example: cut where the sides differ, the space with the answers ...
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        # ... and never inside a word.
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("H: Hi\n\nA: Hello", "H: Hi\n\nA: Help", ("H: Hi\n\nA:", " Hello", " Help")),
        ("Is it?\nYes", "Is it?\nYet", ("Is it?\n", "Yes", "Yet")),
        # A shared word that ends for both sides before white space is whole.
        ("Is it? Yes", "Is it?\nNo", ("Is it?", " Yes", "\nNo")),
        # One side is the beginning of the other, but inside a word.
        ("Is it? Yes", "Is it? Yes, sir", ("Is it?", " Yes", " Yes, sir")),
    ],
)
def test_a_prompt_inside_both_strings_is_cut_at_a_words_edge(tmp_path, chosen, rejected, expected):
    path = jsonl(tmp_path / "a.jsonl", {"chosen": chosen, "rejected": rejected})
    row = load_preferences(path).rows[0]
    assert (row.prompt, row.chosen, row.rejected) == expected
    assert row.prompt + row.chosen == chosen
    mirrored = jsonl(tmp_path / "b.jsonl", {"chosen": rejected, "rejected": chosen})
    row = load_preferences(mirrored).rows[0]
    assert (row.prompt, row.rejected, row.chosen) == expected


def test_an_answer_cut_from_a_string_loses_its_leading_space_as_a_turn(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"chosen": "A? Yes", "rejected": "A? No"})
    row = load_preferences(path, conversational=True).rows[0]
    assert (row.prompt, row.chosen, row.rejected) == (
        [user("A?")],
        [assistant("Yes")],
        [assistant("No")],
    )


def test_a_string_side_that_ends_with_the_shared_prompt_is_empty(tmp_path):
    full, bare = "H: Hi\n\nA: Hello", "H: Hi\n\nA:"
    detail = "has nothing after the beginning that both sides share"
    for row, name in (
        ({"chosen": bare, "rejected": full}, "chosen"),
        ({"chosen": full, "rejected": bare + " "}, "rejected"),
    ):
        assert one_bad_row(tmp_path, row) == ("empty side", f"'{name}' {detail}")


def test_a_prompt_inside_both_conversations_is_their_common_messages(tmp_path):
    shared = [user("Hi"), assistant("Hello"), user("Why?")]
    row = {"chosen": [*shared, assistant("A")], "rejected": [*shared, assistant("B"), user("?")]}
    loaded = load_preferences(jsonl(tmp_path / "a.jsonl", row)).rows[0]
    assert loaded.prompt == shared
    assert loaded.chosen == [assistant("A")]
    assert loaded.rejected == [assistant("B"), user("?")]


def test_a_null_prompt_column_means_a_prompt_inside_both(tmp_path):
    row = {"prompt": None, "chosen": "A? Yes", "rejected": "A? No"}
    assert load_preferences(jsonl(tmp_path / "a.jsonl", row)).rows[0].prompt == "A?"


@pytest.mark.parametrize(("preference", "chosen"), [(1, "first"), (2, "second"), (2.0, "second")])
def test_alpaca_farm_columns_become_a_preference(tmp_path, preference, chosen):
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output_1": "first",
        "output_2": "second",
        "preference": preference,
        "id": 7,
    }
    loaded = load_preferences(jsonl(tmp_path / "a.jsonl", row)).rows[0]
    assert loaded.prompt == "Add.\n\n1 2"
    assert (loaded.chosen, {loaded.chosen, loaded.rejected}) == (chosen, {"first", "second"})
    assert loaded.extra == {"id": 7}


def test_alpaca_farms_draws_are_ties_and_other_preferences_are_refused(tmp_path):
    row = {"instruction": "Add.", "input": "", "output_1": "1", "output_2": "2"}
    assert one_bad_row(tmp_path, row | {"preference": 1.5}) == ("tie", "marked as a tie")
    assert one_bad_row(tmp_path, row | {"preference": 0})[0] == "tie"
    for value in (3, True, "1", None):
        expected = ("bad value", f"'preference' must be 1 or 2, got {value!r}")
        assert one_bad_row(tmp_path, row | {"preference": value}) == expected
    assert one_bad_row(tmp_path, row) == ("missing column", "there is no 'preference'")


def test_an_empty_alpaca_input_adds_nothing_to_the_instruction(tmp_path):
    row = {"instruction": "Add.", "input": " ", "output": "3"}
    assert load_demonstrations(jsonl(tmp_path / "a.jsonl", row)).rows[0].prompt == "Add."
    del row["input"]
    assert load_demonstrations(jsonl(tmp_path / "a.jsonl", row)).rows[0].prompt == "Add."


def test_messages_of_the_prompt_repeated_in_both_sides_are_taken_once_and_noted(tmp_path):
    prompt = [user("Why?")]
    row = {
        "prompt": prompt,
        "chosen": [*prompt, assistant("A")],
        "rejected": [*prompt, assistant("B")],
    }
    loaded = load_preferences(jsonl(tmp_path / "a.jsonl", row))
    assert (loaded.rows[0].chosen, loaded.rows[0].rejected) == ([assistant("A")], [assistant("B")])
    assert only_problem(loaded)[0::3] == ("repeated prompt", True)
    assert (loaded.report.read, loaded.report.kept, loaded.report.dropped) == (1, 1, 0)
    assert "1 repeated prompt (kept; a.jsonl:1: both sides begin" in loaded.report.summary()


# What is dropped, and why --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "detail"),
    [
        ('{"prompt": "a", ', "broken JSON", "at column 17"),
        ('{"prompt": "\\ud83d"}', "broken JSON", "half of a surrogate pair"),
        ([1, 2], "not an object", "a list, not an object"),
        (3, "not an object", "a number, not an object"),
        ("null", "not an object", "null, not an object"),
        ({"prompt": "a", "chosen": "b"}, "missing column", "there is no 'rejected'"),
        (PAIR | {"chosen": None}, "missing column", "'chosen' is null"),
        (PAIR | {"chosen": 3}, "wrong type", "'chosen' must be a string or a list of messages, g"),
        (PAIR | {"chosen": {}}, "wrong type", "got an object"),
        (PAIR | {"chosen": ["a"]}, "wrong type", "message 1 of 'chosen' is a string, not an obje"),
        (
            PAIR | {"chosen": [{"content": "a"}]},
            "wrong type",
            "message 1 of 'chosen' has no 'role'",
        ),
        (PAIR | {"chosen": [user("a"), {"role": "user"}]}, "wrong type", "message 2 of 'chosen' h"),
        (PAIR | {"chosen": [user(3)]}, "wrong type", "the content of message 1 of 'chosen' must"),
        (
            PAIR | {"chosen": [assistant("b")]},
            "wrong type",
            "'prompt' and 'rejected' as a string but 'chosen' as messages",
        ),
        (PAIR | {"prompt": [user("b")]}, "wrong type", "but 'prompt' as messages"),
        (PAIR | {"rejected": " \n"}, "empty side", "'rejected' is empty"),
        (PAIR | {"chosen": ""}, "empty side", "'chosen' is empty"),
        ({"chosen": "", "rejected": "a"}, "empty side", "'chosen' is empty"),
        (PAIR | {"prompt": "\t"}, "empty prompt", "the prompt is empty"),
        ({"chosen": "Yes", "rejected": "No"}, "empty prompt", "the prompt is empty"),
        (PAIR | {"rejected": "Because."}, "identical sides", "are the same"),
        (PAIR | {"tie": True}, "tie", "marked as a tie"),
        (PAIR | {"tie": 1}, "bad value", "'tie' must be true or false, got '1'"),
        (PAIR | {"margin": "2"}, "bad value", "'margin' must be a finite number or null, got '2'"),
        (PAIR | {"margin": float("nan")}, "bad value", "got 'nan'"),
        (PAIR | {"margin": float("-inf")}, "bad value", "got '-inf'"),
        (PAIR | {"margin": 10**400}, "bad value", "'margin' must be a finite number"),
        (PAIR | {"margin": True}, "bad value", "'margin' must be a finite number"),
        (PAIR, "duplicate", "the same as a.jsonl:1"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_says_why(tmp_path, row, kind, detail):
    found_kind, found_detail = one_bad_row(tmp_path, row)
    assert found_kind == kind
    assert detail in found_detail


def test_empty_messages_are_empty_sides_and_other_parts_are_not(tmp_path):
    base = {"prompt": [user("a")], "chosen": [assistant("b")]}
    for content in ("", " ", [], [{"type": "text", "text": " "}]):
        kind, detail = one_bad_row(tmp_path, base | {"rejected": [assistant(content)]})
        assert (kind, detail) == ("empty side", "'rejected' is empty")
    assert one_bad_row(tmp_path, base | {"rejected": []})[0] == "empty side"
    for message in (
        assistant([{"type": "image", "url": "u"}]),
        assistant([{"image": "u"}]),
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        assistant(None) | {"tool_calls": [{"name": "f"}]},
    ):
        path = jsonl(tmp_path / "b.jsonl", base | {"rejected": [message]})
        assert load_preferences(path).rows[0].rejected == [message]


def test_a_duplicate_needs_prompt_and_both_sides_and_ignores_the_order_of_keys(tmp_path):
    mirrored = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    other_prompt = PAIR | {"prompt": "How?"}
    turned = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
    same = turned | {"prompt": [{"content": "a", "role": "user"}], "margin": 1.0}
    path = jsonl(tmp_path / "a.jsonl", PAIR, mirrored, other_prompt, turned, same)
    loaded = load_preferences(path)
    assert [row.where for row in loaded.rows] == [f"a.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert only_problem(loaded) == ("duplicate", "a.jsonl:5", "the same as a.jsonl:4", False)


def test_ties_are_kept_on_request_and_marked(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR | {"tie": True}, PAIR | {"prompt": "b"})
    loaded = load_preferences(path, keep_ties=True)
    assert [row.extra for row in loaded.rows] == [{"tie": True}, {}]
    assert loaded.report.problems == []


def test_line_numbers_are_exact_after_blank_lines_and_a_byte_order_mark(tmp_path):
    rows = ["\ufeff" + json.dumps(PAIR), "", "  ", "{", "", PAIR | {"prompt": "b"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        loaded = load_preferences(jsonl(tmp_path / name, *rows))
        assert [row.where for row in loaded.rows] == [f"{name}:1", f"{name}:6"]
        assert loaded.report.problems[0].where == f"{name}:4"
        assert loaded.report.read == 3


def test_line_numbers_ignore_separators_that_are_not_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(PAIR | {"chosen": "a\u2028b\x85c"}, ensure_ascii=False)
    path.write_bytes(f"{line}\r\n{{\r\n".encode())
    loaded = load_preferences(path)
    assert loaded.rows[0].chosen == "a\u2028b\x85c"
    assert loaded.report.problems[0].where == "a.jsonl:2"


def messy_rows() -> list[Any]:
    return [
        *pairs(5),
        PAIR | {"prompt": "Tied?", "tie": True},
        "{",
        PAIR | {"chosen": " "},
        [1],
        PAIR,
        PAIR,
        PAIR | {"rejected": None},
        PAIR | {"margin": "x"},
        PAIR | {"rejected": "Because."},
        PAIR | {"prompt": ""},
        PAIR | {"prompt": [user("a")]},
        {
            "prompt": [user("a")],
            "chosen": [user("a"), user("b")],
            "rejected": [user("a"), user("c")],
        },
    ]


@pytest.mark.parametrize("keep_ties", [False, True])
@pytest.mark.parametrize("shift", [0, 3, 8, 12])
def test_kept_and_dropped_rows_add_up_to_the_rows_read(tmp_path, shift, keep_ties):
    rows = messy_rows()
    path = jsonl(tmp_path / "a.jsonl", *rows[shift:], *rows[:shift])
    loaded = load_preferences(path, keep_ties=keep_ties)
    report = loaded.report
    dropped = [problem.where for problem in report.problems if not problem.kept]
    assert report.read == len(rows)
    assert len(loaded.rows) == report.kept == 7 + keep_ties
    assert len(dropped) == len(set(dropped)) == report.dropped == 10 - keep_ties
    every_line = {f"a.jsonl:{i}" for i in range(1, len(rows) + 1)}
    assert {row.where for row in loaded.rows} | set(dropped) == every_line


# Reports -------------------------------------------------------------------------------------


def test_the_summary_counts_and_gives_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ties = [PAIR | {"tie": True}] * 4
    rows = [*pairs(1200), *ties, PAIR | {"rejected": ""}, PAIR | {"chosen": ""}, "{"]
    jsonl(tmp_path / "a.jsonl", *rows)
    report = load_preferences("a.jsonl").report
    assert report.counts() == {"tie": 4, "empty side": 2, "broken JSON": 1}
    assert report.summary() == (
        "a.jsonl: 1,207 rows read, 1,200 kept; "
        "4 ties (marked as a tie: a.jsonl:1201, a.jsonl:1202, a.jsonl:1203, ...), "
        "2 empty sides (a.jsonl:1205: 'rejected' is empty, a.jsonl:1206: 'chosen' is empty), "
        "1 broken JSON (a.jsonl:1207: "
        "Expecting property name enclosed in double quotes at column 2)."
    )
    assert report.summary(limit=1).count("a.jsonl:12") == 3
    assert report.summary(limit=0) == (
        "a.jsonl: 1,207 rows read, 1,200 kept; 4 ties, 2 empty sides, 1 broken JSON."
    )


def test_a_clean_report_is_one_plain_sentence():
    assert LoadReport("a", read=1).summary() == "a: 1 row read, 1 kept."
    assert LoadReport("a", read=2).summary() == "a: 2 rows read, 2 kept."


def test_later_stages_add_their_own_kinds():
    report = LoadReport("a", read=3)
    report.add("over-long", "a:1", "12 tokens")
    report.add("over-long", "a:2", "13 tokens")
    report.add("truncated", "a:3", "14 tokens", kept=True)
    assert (report.kept, report.dropped) == (1, 2)
    assert report.summary() == (
        "a: 3 rows read, 1 kept; 2 over-long (a:1: 12 tokens, a:2: 13 tokens), "
        "1 truncated (kept; a:3: 14 tokens)."
    )


def test_merge_adds_up_two_sources():
    first, second = LoadReport("a", read=3), LoadReport("b", read=4)
    first.add("tie", "a:1", "x")
    second.add("tie", "b:1", "x")
    merged = first.merge(second)
    assert merged is first
    assert (merged.source, merged.read, merged.kept) == ("a + b", 7, 5)
    assert merged.summary() == "a + b: 7 rows read, 5 kept; 2 ties (x: a:1, b:1)."
    assert (second.source, second.read, len(second.problems)) == ("b", 4, 1)


def test_max_rows_counts_usable_rows_stops_reading_and_says_so(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR | {"tie": True}, *pairs(5), "{")
    loaded = load_preferences(path, max_rows=2)
    assert [row.where for row in loaded.rows] == ["a.jsonl:2", "a.jsonl:3"]
    assert (loaded.report.read, loaded.report.kept) == (3, 2)
    assert "(as far as usable row 2): 3 rows read, 2 kept; 1 tie" in loaded.report.summary()
    assert load_preferences(path, max_rows=6).report.summary().startswith(f"{path}: 7 rows read")
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        load_preferences(path, max_rows=0)


# Prompts and demonstrations ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Why?"}, "Why?"),
        ({"prompt": [user("Why?")], "completions": ["a"]}, [user("Why?")]),
        (PAIR | {"margin": 1, "tie": True}, "Why?"),
        ({"chosen": "Why? Yes", "rejected": "Why? No"}, "Why?"),
        ({"chosen": "Why? Yes", "rejected": "Why? No", "tie": True}, "Why?"),
        ({"prompt": "Why?", "completion": "a"}, "Why?"),
        (
            {"messages": [user("a"), assistant("b"), user("c")]},
            [user("a"), assistant("b"), user("c")],
        ),
        ({"messages": [user("a"), assistant("b")]}, [user("a")]),
        ({"instruction": "Add.", "input": "1", "output": "2"}, "Add.\n\n1"),
        ({"instruction": "Add.", "output_1": "1", "output_2": "2", "preference": 1}, "Add."),
    ],
)
def test_a_prompt_is_taken_from_any_format_that_has_one(tmp_path, row, prompt):
    path = jsonl(tmp_path / "a.jsonl", row | {"id": 3})
    left = {"id": 3} | ({"completions": ["a"]} if "completions" in row else {})
    assert load_prompts(path).rows == [PromptRow(prompt, "a.jsonl:1", left)]


def test_a_prompt_is_loaded_once_and_its_repeats_are_counted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR, PAIR | {"chosen": "x"}, {"prompt": "b"}, PAIR)
    loaded = load_prompts(path, conversational=True)
    assert [row.prompt for row in loaded.rows] == [[user("Why?")], [user("b")]]
    assert loaded.report.counts() == {"duplicate": 2}


@pytest.mark.parametrize("row", [{"prompt": " "}, {"prompt": []}, {"messages": [assistant("a")]}])
def test_an_empty_prompt_is_dropped(tmp_path, row):
    loaded = load_prompts(jsonl(tmp_path / "a.jsonl", {"prompt": "a"}, row))
    assert only_problem(loaded)[:2] == ("empty prompt", "a.jsonl:2")


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, [user("a")], [assistant("b")]),
        (
            {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
            [user("a"), assistant("b"), user("c")],
            [assistant("d")],
        ),
        ({"instruction": "Add.", "input": "1", "output": "2"}, "Add.\n\n1", "2"),
    ],
)
def test_demonstrations_come_from_each_format(tmp_path, row, prompt, completion):
    path = jsonl(tmp_path / "a.jsonl", row | {"id": 3})
    expected = DemonstrationRow(prompt, completion, "a.jsonl:1", {"id": 3})
    assert load_demonstrations(path).rows == [expected]


def test_conversational_demonstrations_are_turns(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    row = load_demonstrations(path, conversational=True).rows[0]
    assert (row.prompt, row.completion) == ([user("a")], [assistant("b")])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [user("a")]}, "no answer"),
        ({"messages": "a"}, "wrong type"),
        ({"messages": [assistant("a")]}, "empty prompt"),
        ({"prompt": "a", "completion": [assistant("b")]}, "wrong type"),
        ({"prompt": "a", "completion": " "}, "empty side"),
        ({"prompt": "a"}, "missing column"),
        ({"completion": "a"}, "missing column"),
        ({"instruction": "a", "output": 3}, "wrong type"),
        ({"instruction": "a"}, "missing column"),
        ({"prompt": "good", "completion": "good"}, "duplicate"),
    ],
)
def test_a_demonstration_that_cannot_be_used_is_dropped(tmp_path, row, kind):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "good", "completion": "good"}, row)
    loaded = load_demonstrations(path)
    assert len(loaded.rows) == 1
    assert only_problem(loaded)[0::3] == (kind, False)


def test_turns_after_the_last_answer_and_repeated_prompts_are_left_out_and_noted(tmp_path):
    first = {"messages": [user("a"), assistant("b"), user("thanks")]}
    second = {"prompt": [user("c")], "completion": [user("c"), assistant("d")]}
    loaded = load_demonstrations(jsonl(tmp_path / "a.jsonl", first, second))
    assert [row.completion for row in loaded.rows] == [[assistant("b")], [assistant("d")]]
    assert loaded.report.counts() == {"trailing turns": 1, "repeated prompt": 1}
    assert loaded.report.kept == 2


# Files ---------------------------------------------------------------------------------------


def test_json_and_parquet_give_the_rows_of_json_lines(tmp_path):
    rows = [
        {
            "prompt": [user("a")],
            "chosen": [assistant("b")],
            "rejected": [assistant("c")],
            "margin": None,
        },
        {
            "prompt": [user([{"type": "image", "url": "u"}, {"type": "text", "text": "d"}])],
            "chosen": [assistant([{"type": "text", "text": "e"}])],
            "rejected": [assistant([{"type": "text", "text": " "}])],
        },
        {
            "prompt": [user("a") | {"name": "Ann"}],
            "chosen": [assistant("b")],
            "rejected": [assistant("c")],
            "margin": 1.5,
        },
    ]
    text_rows = [rows[0], rows[2]]  # a column of arrow cannot mix strings and lists
    part_rows = [rows[1], rows[1] | {"rejected": rows[1]["chosen"], "chosen": rows[1]["prompt"]}]
    for number, some in enumerate((text_rows, part_rows)):
        expected = load_preferences(jsonl(tmp_path / f"{number}.jsonl", *some))
        as_json = tmp_path / f"{number}.json"
        as_json.write_text(json.dumps(some, indent=1))
        as_parquet = tmp_path / f"{number}.parquet"
        datasets.Dataset.from_list(some).to_parquet(as_parquet)
        for path in (as_json, as_parquet):
            loaded = load_preferences(path)
            assert [(r.prompt, r.chosen, r.rejected, r.margin) for r in loaded.rows] == [
                (r.prompt, r.chosen, r.rejected, r.margin) for r in expected.rows
            ]
            assert loaded.report.counts() == expected.report.counts()
            places = {r.where for r in loaded.rows} | {p.where for p in loaded.report.problems}
            assert places == {f"{path.name} row 1", f"{path.name} row 2"}


def test_a_parquet_file_is_read_past_its_first_batch(tmp_path):
    datasets.Dataset.from_list(pairs(2100)).to_parquet(tmp_path / "a.parquet")
    loaded = load_preferences(tmp_path / "a.parquet")
    assert [row.where for row in loaded.rows] == [f"a.parquet row {i}" for i in range(1, 2101)]


def test_a_folders_files_are_read_in_order_and_duplicates_found_across_them(tmp_path):
    jsonl(tmp_path / "b.jsonl", PAIR, PAIR | {"prompt": "b"})
    jsonl(tmp_path / "a.jsonl.gz", PAIR)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    loaded = load_preferences(tmp_path)
    assert [row.where for row in loaded.rows] == ["a.jsonl.gz:1", "b.jsonl:2"]
    expected = ("duplicate", "b.jsonl:1", "the same as a.jsonl.gz:1", False)
    assert only_problem(loaded) == expected


def test_a_folder_of_several_splits_is_never_mixed(tmp_path):
    jsonl(tmp_path / "d" / "train.jsonl", PAIR)
    jsonl(tmp_path / "d" / "test-00000-of-00001.jsonl", PAIR)
    with pytest.raises(DataError, match=r"several splits \(test, train\).*name one.*d:train"):
        load_preferences(tmp_path / "d")
    assert len(load_preferences(f"{tmp_path / 'd'}:train").rows) == 1
    with pytest.raises(DataError, match="holds no split 'dev': it has test-00000"):
        load_preferences(f"{tmp_path / 'd'}:dev")


def test_columns_that_do_not_fit_name_what_was_found_and_what_is_wanted(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b"}, {"question": "c", "id": 1})
    for load, wanted in (
        (load_preferences, "wanted 'prompt', 'chosen' and 'rejected', or"),
        (load_prompts, "wanted 'prompt', 'messages', 'instruction', or 'chosen'"),
        (load_demonstrations, "wanted 'prompt' and 'completion', or 'messages', or"),
    ):
        with pytest.raises(DataError) as caught:
            load(path)
        message = str(caught.value)
        assert f"a.jsonl do not fit: found 'question', 'answer', 'id'; {wanted}" in message
        assert "\n" not in message


def test_one_misfit_file_of_a_folder_is_an_error_too(tmp_path):
    jsonl(tmp_path / "a.jsonl", PAIR)
    jsonl(tmp_path / "b.jsonl", {"question": "a"})
    with pytest.raises(DataError, match=r"b\.jsonl do not fit: found 'question'"):
        load_preferences(tmp_path)


def test_a_file_without_a_usable_row_is_an_error_with_the_summary(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR | {"tie": True}, PAIR | {"chosen": ""})
    with pytest.raises(DataError, match=r"no row can be used of .*2 rows read, 0 kept; 1 tie \("):
        load_preferences(path)


def test_empty_files_and_folders_are_errors(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    (tmp_path / "b.json").write_text("")
    (tmp_path / "c.jsonl.gz").write_bytes(b"")
    datasets.Dataset.from_dict({"prompt": []}).to_parquet(tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet"):
        with pytest.raises(DataError, match=rf"{name} is empty: it holds no rows\."):
            load_prompts(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder is a folder without data: it has no \.jsonl\.gz"):
        load_prompts(tmp_path / "folder")


def test_broken_files_are_one_clear_sentence(tmp_path):
    whole = gzip.compress(json.dumps(PAIR).encode() * 50)
    damaged = whole[:10] + b"\xff" * 8 + whole[18:]
    cases = {
        "a.jsonl.gz": (whole[:-12], r"a\.jsonl\.gz is a broken gzip file"),
        "b.jsonl.gz": (b"plain text\n", r"b\.jsonl\.gz is a broken gzip file.*Not a gzipped"),
        "c.jsonl.gz": (damaged, r"c\.jsonl\.gz is a broken gzip file.*decompressing data"),
        "d.jsonl": (
            json.dumps(PAIR).encode() + b'\n{"prompt": "caf\xe9"}\n',
            r"d\.jsonl:2 is not UTF-8 text \(byte 15 of the line is 0xe9\)",
        ),
        "e.json": (b'{"a": 1}\n{"a": 2}\n', r"Extra data at line 2.*name it \.jsonl"),
        "f.json": (b'{"a": 1}', "must hold a list of objects, got an object"),
        "g.parquet": (b"not parquet at all", r"g\.parquet cannot be read as parquet"),
        "h.csv": (b"prompt\na\n", r"h\.csv is not a data file; wanted one of \.jsonl\.gz"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_prompts(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_a_data_error(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", PAIR)
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        load_prompts(path)


# Names ---------------------------------------------------------------------------------------


def test_an_existing_path_wins_over_every_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "owner" / "name" / "train.jsonl", PAIR)
    jsonl(tmp_path / "store" / "owner" / "name" / "train.jsonl", PAIR)
    assert resolve_source("owner/name", data_dir="store") == Path("owner/name")
    assert resolve_source("owner/name:train", data_dir="store") == Path("owner/name/train.jsonl")


def test_names_are_found_under_the_data_folder(tmp_path, monkeypatch):
    train = jsonl(tmp_path / "hh" / "train.jsonl.gz", PAIR)
    test = jsonl(tmp_path / "hh" / "test.jsonl.gz", PAIR)
    full = jsonl(tmp_path / "owner" / "hh" / "train.jsonl", PAIR)
    only = jsonl(tmp_path / "bench" / "bench.jsonl", PAIR)
    single = jsonl(tmp_path / "v1.5.jsonl", PAIR)
    config = jsonl(tmp_path / "farm" / "human" / "train.jsonl", PAIR)
    names = {"tatsu/farm:train": "hh:test", "gone/gone": "nowhere:train", "o/hh": "bench"}
    for source, expected in {
        "hh": train,
        "hh:train": train,
        "hh:test": test,
        "hh/test.jsonl.gz": test,
        "owner/hh": full,
        "other/hh:test": test,
        "bench": only,
        "bench:bench": only,
        "x/bench:test": only,  # the only file, and not named after another split
        "v1.5": single,
        "x/v1.5:train": single,
        "farm@human": config,
        "x/farm@human:train": config,
        "tatsu/farm:train": test,
        "tatsu/farm": test,
        "o/hh": only,  # what local_names says goes before a folder of the same name
        # What must not be found: another split, another config, a file that has no splits.
        "owner/hh:test": test,  # not in owner/hh, but in hh
        "x/v1.5:test": HubName("x/v1.5", None, "test"),
        "x/farm@robot": HubName("x/farm", "robot", "train"),
        "gone/gone": HubName("gone/gone", None, "train"),
    }.items():
        assert resolve_source(source, data_dir=tmp_path, local_names=names) == expected, source
    monkeypatch.setenv("TRUEWARD_DATA", str(tmp_path))
    assert resolve_source("hh:test") == test
    assert resolve_source("hh:test", data_dir=None) == test


def test_a_training_file_never_stands_in_for_a_test_set(tmp_path):
    jsonl(tmp_path / "alpaca" / "train.jsonl.gz", PAIR)
    jsonl(tmp_path / "shards" / "train-00000-of-00001.jsonl", PAIR)
    for name in ("alpaca", "shards"):
        assert resolve_source(f"{name}:train", data_dir=tmp_path).parent == tmp_path / name
        assert resolve_source(f"o/{name}:test", data_dir=tmp_path) == HubName(
            f"o/{name}", None, "test"
        )
        with pytest.raises(DataError, match=f"{name} has no such split: it has train"):
            resolve_source(f"{name}:test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", HubName("owner/name", None, "train")),
        ("owner/name:test", HubName("owner/name", None, "test")),
        ("owner/name@config", HubName("owner/name", "config", "train")),
        (
            "owner/na-me_1.0@con-fig:train[:10%]",
            HubName("owner/na-me_1.0", "con-fig", "train[:10%]"),
        ),
    ],
)
def test_other_names_with_an_owner_are_hub_names(source, expected):
    assert resolve_source(source) == expected
    assert resolve_source(str(expected)) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "data/train.jsonl",
            "'data/train.jsonl' is neither a path that exists nor a hub name, and no",
        ),
        ("./owner/name", "'./owner/name' does not exist"),
        ("/nowhere/name", "'/nowhere/name' does not exist"),
        (Path("owner/name"), "'owner/name' does not exist"),
        ("name", "no data_dir or TRUEWARD_DATA says where else to look"),
        ("a/b/c", "neither a path that exists nor a hub name"),
    ],
)
def test_a_source_that_is_nowhere_names_what_was_tried(source, message):
    with pytest.raises(DataError, match=message):
        resolve_source(source)


def test_a_missing_name_or_data_folder_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=f"and {tmp_path} has no name; give a path"):
        resolve_source("name", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"data_dir names '.*gone', which is not a folder"):
        resolve_source("owner/name", data_dir=tmp_path / "gone")
    monkeypatch.setenv("TRUEWARD_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"TRUEWARD_DATA names '.*gone', which is not a folder"):
        resolve_source("owner/name")


def test_a_hub_dataset_is_loaded_by_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        asked.append((args, options))
        rows = [
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            {"prompt": [user("a") | {"name": "x"}], "chosen": [assistant(" ")], "rejected": []},
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_preferences("owner/name@config:test")
    assert asked == [(("owner/name", "config"), {"split": "test"})]
    assert loaded.rows == [
        PreferenceRow(
            [user("a")],
            [assistant("b")],
            [assistant("c")],
            None,
            "owner/name@config:test row 1",
        )
    ]
    assert only_problem(loaded)[:2] == ("empty side", "owner/name@config:test row 2")


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Unknown split")])
def test_a_hub_dataset_that_cannot_be_had_is_a_data_error(monkeypatch, error):
    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=f"owner/name:train cannot be loaded .* hub: {error}"):
        load_preferences("owner/name")


# Texts, keys, splits -------------------------------------------------------------------------


def test_text_of_joins_text_and_leaves_other_parts_out():
    assert text_of(" a ") == " a "
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image", "url": "u"},
        {"type": "text", "text": "b"},
    ]
    assert text_of([user(parts)]) == "ab"
    assert text_of([user("a"), assistant(None) | {"tool_calls": [1]}, assistant("b")]) == "a\n\nb"
    assert text_of([]) == ""


def test_prompt_key_is_canonical():
    assert prompt_key([{"role": "user", "content": "a"}]) == prompt_key(
        [{"content": "a", "role": "user"}]
    )
    assert prompt_key("a") == prompt_key([user("a")]) == '[{"content":"a","role":"user"}]'
    assert len({prompt_key(p) for p in ("a", "a ", [assistant("a")], [user("a"), user("a")])}) == 4


def test_prompt_key_takes_bytes_and_images_by_their_content():
    def image(pixels: bytes) -> list[dict[str, Any]]:
        return [user([{"type": "image", "image": memoryview(pixels)}])]

    assert prompt_key(image(b"ab")) == prompt_key(image(b"ab")) != prompt_key(image(b"ac"))
    as_bytes = [user([{"type": "image", "image": b"ab"}])]
    assert prompt_key(as_bytes) != prompt_key([user([{"type": "image", "image": b"ac"}])])
    with pytest.raises(TypeError, match="a message holds a set"):
        prompt_key([user([{"type": "image", "image": {1}}])])


def prompt_rows(number: int) -> list[PromptRow]:
    return [PromptRow(f"prompt {i % number}", f"{i}") for i in range(3 * number)]


def test_a_split_keeps_each_prompt_on_one_side_and_every_row_in_order():
    rows = prompt_rows(500)
    train, held_out = split_by_prompt(rows, fraction=0.2, seed=0)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert sorted(train + held_out, key=lambda row: int(row.where)) == rows
    assert [int(row.where) for row in train] == sorted(int(row.where) for row in train)
    # 500 draws at 0.2: 100 expected, standard deviation 8.9; five of them either way.
    assert 55 < len({row.prompt for row in held_out}) < 145


def test_a_prompt_keeps_its_side_when_rows_come_or_change_their_form():
    few = split_by_prompt(prompt_rows(50), fraction=0.3, seed=1)
    many = split_by_prompt(prompt_rows(500)[::-1], fraction=0.3, seed=1)
    turned = split_by_prompt(
        [PromptRow([user(row.prompt)]) for row in prompt_rows(50)], fraction=0.3, seed=1
    )
    assert {row.prompt for row in few[1]} <= {row.prompt for row in many[1]}
    assert {row.prompt for row in few[0]} <= {row.prompt for row in many[0]}
    assert [text_of(row.prompt) for row in turned[1]] == [row.prompt for row in few[1]]


def test_a_larger_fraction_holds_out_more_of_the_same_and_the_seed_matters():
    rows = prompt_rows(200)
    small, large, other = (
        {row.prompt for row in split_by_prompt(rows, fraction=fraction, seed=seed)[1]}
        for fraction, seed in ((0.1, 0), (0.3, 0), (0.3, 1))
    )
    assert small < large
    assert large != other
    assert split_by_prompt(rows, fraction=0.0, seed=0) == (rows, [])
    assert split_by_prompt(rows, fraction=1.0, seed=0) == ([], rows)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"fraction must lie in \[0, 1\]"):
            split_by_prompt(rows, fraction=fraction, seed=0)


def test_the_split_of_known_prompts_does_not_change_between_versions():
    rows = [PreferenceRow(f"prompt {i}", "a", "b") for i in range(20)]
    held_out = split_by_prompt(rows, fraction=0.25, seed=0)[1]
    # The SHA-256 of '0\n[{"content":"prompt 3","role":"user"}]' begins with less than 0x40.
    assert [row.prompt for row in held_out] == [f"prompt {i}" for i in (3, 4, 5, 9, 11, 12, 16)]


# JSON lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_written_are_read_back_with_their_line_numbers(tmp_path, name):
    rows = [{"text": "é\u2028\n", "n": 1}, {"n": None}]
    path = tmp_path / "new" / name
    assert write_jsonl(path, iter(rows)) == 2
    assert list(read_jsonl(path)) == [(1, rows[0]), (2, rows[1])]
    first = path.read_bytes()
    assert not name.endswith(".gz") or first[4:8] == bytes(4)  # no time of writing
    write_jsonl(path, rows)
    assert path.read_bytes() == first
    other = tmp_path / f"other-{name}"
    write_jsonl(other, rows)
    assert other.read_bytes() == first


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, name):
    path = tmp_path / name
    write_jsonl(path, [{"n": 1}])
    for bad in ({"n": {1}}, {"n": float("nan")}, {"n": "\ud83d"}):
        with pytest.raises(DataError, match=f"row 2 for .*{name} cannot be written as JSON"):
            write_jsonl(path, [{"n": 2}, bad])
    assert list(read_jsonl(path)) == [(1, {"n": 1})]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.jsonl"
    seen = []

    def rows():
        yield {"n": 1}
        seen.append(path.exists())

    write_jsonl(path, rows())
    assert (seen, path.exists()) == ([False], True)


def test_read_jsonl_skips_blank_lines_and_names_a_broken_one(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"n": 1}, "", {"n": 2}, "[1]")
    lines = read_jsonl(path)
    assert [next(lines), next(lines)] == [(1, {"n": 1}), (3, {"n": 2})]
    with pytest.raises(DataError, match=r"a\.jsonl:4 must hold an object, got a list"):
        next(lines)
    with pytest.raises(DataError, match=r"b\.jsonl:1 is broken JSON: .* at column 2"):
        list(read_jsonl(jsonl(tmp_path / "b.jsonl", "{oops")))
    with pytest.raises(DataError, match=r"c\.jsonl cannot be read: No such file"):
        list(read_jsonl(tmp_path / "c.jsonl"))


# Real data -----------------------------------------------------------------------------------

DATA = os.environ.get("TRUEWARD_DATA", "")
needs_data = pytest.mark.skipif(
    not Path(DATA, "hh_helpful").is_dir() or not DATA,
    reason="TRUEWARD_DATA does not name the folder with the real data sets",
)


@pytest.mark.data
@needs_data
def test_real_preferences_load_with_their_known_empty_sides():
    report = load_preferences("hh_helpful:train").report
    assert (report.read, report.kept) == (1919, 1916)
    assert report.counts() == {"empty side": 3}


@pytest.mark.data
@needs_data
def test_real_demonstrations_are_found_by_their_hub_name():
    loaded = load_demonstrations("tatsu-lab/alpaca:train", max_rows=300)
    assert (loaded.report.read, loaded.report.counts()) == (301, {"empty side": 1})
