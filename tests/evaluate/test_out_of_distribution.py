import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from trueward.data.formats import DataError, text_of
from trueward.evaluate.out_of_distribution import (
    OUT_OF_DISTRIBUTION,
    answers_beside,
    completions_of,
    made_completions,
    mismatched,
    read_answers,
    repeated_text,
    shuffled_words,
    truncated,
)
from trueward.testing import tiny_texts

PROMPTS = [f"question {i}" for i in range(60)]
ANSWERS = tiny_texts(60, seed=3, words=(4, 60))
ALONE = ["shuffled", "repeated", "repeated x4", "truncated"]  # each completion by itself


def conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


# --- One completion at a time -------------------------------------------------------------------


def test_shuffling_keeps_the_words_and_the_white_space_and_changes_the_order() -> None:
    made = shuffled_words(PROMPTS, [f"  {a}\n\nthe end " for a in ANSWERS], seed=0)
    for answer, text in zip(ANSWERS, made, strict=True):
        old = f"  {answer}\n\nthe end "
        assert isinstance(text, str)
        assert sorted(text.split()) == sorted(old.split())
        assert text != old
        assert re.findall(r"\s+", text) == re.findall(r"\s+", old)


def test_two_words_change_places_and_equal_words_stay() -> None:
    assert shuffled_words(["p"], ["yes no"], seed=0) == ["no yes"]
    assert shuffled_words(["p"], ["no no no"], seed=0) == ["no no no"]
    assert shuffled_words(["p"], [" ab\n"], seed=0) == [" ba\n"]
    assert shuffled_words(["p", "p"], ["", "a"], seed=0) == ["", "a"]


@pytest.mark.parametrize("length", [1, 3])
def test_repeated_text_is_the_first_words_over_and_over(length: int) -> None:
    made = repeated_text(PROMPTS, ANSWERS, length=length, seed=0)
    parts = []
    for answer, text in zip(ANSWERS, made, strict=True):
        assert isinstance(text, str)
        old, new = answer.split(), text.split()
        assert len(new) == length * len(old)
        # The shortest part that explains it; a sentence may itself begin with a repetition.
        part = next(k for k in range(1, 17) if new == (old[:k] * len(new))[: len(new)])
        assert part <= len(old) / 2
        parts.append(part)
    assert min(parts) == 1
    assert max(parts) > 8


def test_repeated_text_begins_where_the_completion_begins() -> None:
    assert repeated_text(["p"], [" a b"], seed=0) == [" a a"]
    assert repeated_text(["p"], ["ab"], length=2, seed=0) == ["aaaa"]
    assert repeated_text(["p", "p"], ["", " "], seed=0) == ["", " "]


def test_truncated_text_is_a_beginning_of_a_quarter_to_three_quarters() -> None:
    words = [f"{i} {a}" for i, a in enumerate(tiny_texts(60, seed=1, words=(39, 39)))]
    shares = []
    for old, new in zip(words, truncated(PROMPTS, words, seed=0), strict=True):
        assert isinstance(new, str)
        assert old.startswith(new)
        shares.append(len(new.split()) / 40)
    assert 0.25 <= min(shares) < 0.35
    assert 0.65 < max(shares) <= 0.75
    assert truncated(["p"] * 3, [" yes no\n", "ab", "x"], seed=0) == [" yes", "a", "x"]


@pytest.mark.parametrize("kind", ALONE)
def test_what_is_made_hangs_on_seed_prompt_and_completion_alone(kind: str) -> None:
    maker = OUT_OF_DISTRIBUTION[kind]
    made = maker(PROMPTS, ANSWERS, seed=5)
    assert maker(PROMPTS[7:9], ANSWERS[7:9], seed=5) == made[7:9]
    assert made == maker(PROMPTS, ANSWERS, seed=5)
    assert made != maker(PROMPTS, ANSWERS, seed=6)
    assert made != maker(PROMPTS[::-1], ANSWERS, seed=5)
    assert all(new != old for new, old in zip(made, ANSWERS, strict=True))


def test_completions_of_one_prompt_have_draws_of_their_own() -> None:
    answers = [f"{i} " + "word " * 39 for i in range(30)]
    lengths = {len(text_of(made).split()) for made in truncated(["p"] * 30, answers, seed=0)}
    assert len(lengths) > 8


# --- Mismatched ---------------------------------------------------------------------------------


def test_mismatched_gives_each_answer_once_and_none_to_its_own_prompt() -> None:
    prompts = [f"p{i // 3}" for i in range(30)] + ["often"] * 15
    answers = [f"{prompt} answer {i}" for i, prompt in enumerate(prompts)]
    made = mismatched(prompts, answers, seed=0)
    assert sorted(map(text_of, made)) == sorted(answers)
    assert not [1 for prompt, text in zip(prompts, made, strict=True) if prompt in text]
    assert made != mismatched(prompts, answers, seed=1)


def test_mismatched_does_not_depend_on_the_order_of_the_rows() -> None:
    places = [(7 * i) % 60 for i in range(60)]
    made = mismatched(PROMPTS, ANSWERS, seed=0)
    moved = mismatched([PROMPTS[i] for i in places], [ANSWERS[i] for i in places], seed=0)
    assert moved == [made[i] for i in places]


def test_half_of_the_completions_may_answer_one_prompt_and_no_more() -> None:
    answers = ["a", "b", "c", "d"]
    made = mismatched(["p", "q", "p", "r"], answers, seed=0)
    assert {made[0], made[2]} == {"b", "d"}
    with pytest.raises(ValueError, match="3 of 4 completions answer one prompt"):
        mismatched(["p", "q", "p", "p"], answers, seed=0)
    with pytest.raises(ValueError, match="1 of 1 completions"):  # a turn and a string are one
        mismatched(["p"], ["a"], seed=0)
    with pytest.raises(ValueError, match="2 of 2 completions"):
        mismatched(["p", [{"role": "user", "content": "p"}]], ["a", "b"], seed=0)


# --- Forms and sources --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ALONE, "mismatched"])
def test_messages_keep_their_form_and_are_not_written_to(kind: str) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [conversation(answer) for answer in ANSWERS]
    before = copy.deepcopy(completions)
    made = OUT_OF_DISTRIBUTION[kind](prompts, completions, seed=0)
    assert completions == before
    for old, new in zip(completions, made, strict=True):
        assert isinstance(new, list)
        assert [message["role"] for message in new] == ["assistant"]
        assert text_of(new) != text_of(old)


@pytest.mark.parametrize("kind", ALONE)
def test_images_tool_calls_and_other_keys_stay(kind: str) -> None:
    image = {"type": "image", "image": b"\x00\x01"}
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    completion = [
        call,
        {"role": "tool", "content": None, "name": "look"},
        {
            "role": "assistant",
            "content": [image, {"type": "text", "text": "one two three four"}, "five six"],
        },
    ]
    [made] = OUT_OF_DISTRIBUTION[kind](["p"], [completion], seed=0)
    assert made[:2] == completion[:2]
    assert made[2]["role"] == "assistant"
    picture, text, plain = made[2]["content"]
    assert picture == image
    assert (text["type"], text["text"] != "one two three four") == ("text", True)
    assert plain != "five six"


def test_given_completions_are_taken_as_they_are() -> None:
    given = ["oui", conversation("non")]
    assert completions_of(given, ["p", "q"], ["yes", "no"], seed=0) == given
    made = completions_of(shuffled_words, PROMPTS, ANSWERS, seed=4)
    assert made == shuffled_words(PROMPTS, ANSWERS, seed=4)


def test_makers_that_the_rows_are_too_few_for_are_left_out_with_their_reason() -> None:
    made = made_completions(["p", "p"], ["one two", "three four"], seed=1)
    assert list(made.completions) == [*ALONE[:3], "truncated"]
    assert made.completions["truncated"] == truncated(["p"] * 2, ["one two", "three four"], seed=1)
    assert list(made.left_out) == ["mismatched"]
    assert "2 of 2 completions answer one prompt" in made.left_out["mismatched"]


def test_answers_stand_beside_their_prompts_and_go_round_where_prompts_come_again() -> None:
    turn = [{"role": "user", "content": "p"}]
    found = answers_beside(
        ["p", "q", "p", turn, "r"],
        ["x", "p", "r", turn],
        ["of x", "first", [{"role": "assistant", "content": "of r"}], "second"],
        seed=0,
    )
    # The fourth prompt is messages: so is its answer.
    again = [{"role": "assistant", "content": "first"}]
    assert found.completions == ["first", None, "second", again, "of r"]
    assert (found.other_prompts, found.unused) == (False, 1)
    unused = answers_beside(["p"], ["p"] * 3, ["a", "b", "c"], seed=0)
    assert (unused.completions, unused.unused) == (["a"], 2)


@pytest.mark.parametrize("answers", [20, 60, 100])
def test_answers_to_other_prompts_are_dealt_out_each_at_most_once(answers: int) -> None:
    texts = [f"answer {i}" for i in range(answers)]
    found = answers_beside(PROMPTS, [f"other {i}" for i in range(answers)], texts, seed=3)
    given = [text for text in found.completions if text is not None]
    assert (len(found.completions), len(given)) == (60, min(answers, 60))
    assert len(set(map(str, given))) == len(given)
    assert set(map(str, given)) <= set(texts)
    assert (found.other_prompts, found.unused) == (True, max(0, answers - 60))
    assert found.completions[: len(given)] != texts[: len(given)]  # neither side keeps its order
    again, other = (
        answers_beside(PROMPTS, [f"other {i}" for i in range(answers)], texts, seed=seed)
        for seed in (3, 4)
    )
    assert again == found
    assert other.completions != found.completions


def test_answers_are_read_one_or_several_a_row(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "q"}]
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "completion": "a", "reward": 1.0},
        {"prompt": turn, "completions": ["b", conversation("c")]},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_answers(file) == (["p", turn, turn], ["a", "b", conversation("c")])
    for row, told in (
        ('{"completion": "a"}', r"answers.jsonl:2 needs 'prompt' and .* has completion"),
        ('{"prompt": "p", "completions": "a"}', r"answers.jsonl:2 needs"),
        ('{"prompt": "p", "completion": 3}', r"answers.jsonl:2: prompt and .*, got a number"),
        ('{"prompt": ["p"], "completion": "a"}', r"answers.jsonl:2: prompt and .*, got"),
        ('{"prompt": "p"}', r"answers.jsonl:2 needs 'prompt' and .* has prompt"),
        ('{"prompt": "p", "completion": null}', r"answers.jsonl:2: prompt and .*, got null"),
    ):
        file.write_text(f'{{"prompt": "p", "completion": "a"}}\n{row}\n')
        with pytest.raises(DataError, match=told):
            read_answers(file)
    file.write_text('{"prompt": "p", "completions": []}\n')
    with pytest.raises(DataError, match="holds no completions"):
        read_answers(file)


def test_one_common_prompt_is_enough_not_to_deal() -> None:
    found = answers_beside(["p", "q"], ["q", "x"], ["of q", "of x"], seed=0)
    assert found.completions == [None, "of q"]
    assert (found.other_prompts, found.unused) == (False, 1)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"french must give one completion for each of 2 .* got 1"):
        completions_of(["oui"], ["p", "q"], ["yes", "no"], seed=0, name="french")
    with pytest.raises(ValueError, match="got the string 'shuffled'"):
        completions_of("shuffled", ["p"] * 8, ["yes"] * 8, seed=0)
    with pytest.raises(ValueError, match="length must be at least 1"):
        repeated_text(["p"], ["a"], length=0, seed=0)
    for maker in OUT_OF_DISTRIBUTION.values():
        with pytest.raises(ValueError, match="got 2 prompts and 1 completions"):
            maker(["p", "q"], ["a"], seed=0)
