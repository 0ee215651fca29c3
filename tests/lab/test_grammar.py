"""The embedded world: its gold reward by hand, its annotator, its language."""

import random
from dataclasses import replace

import pytest

from trueward.lab.grammar import (
    WARM,
    GrammarWorld,
    gold_reward,
    is_sentence,
    same_content,
    topic_of,
)
from trueward.lab.worlds import Annotator

WORLD = GrammarWorld()
SURE = Annotator(label_noise=0.0)
PROMPT = "tell me about the old cat :"


def test_the_topic_is_the_noun_asked_about():
    assert topic_of(PROMPT) == "cat"


@pytest.mark.parametrize(
    ("words", "right"),
    [
        ("the cat sees the dog", True),
        ("the kind old cat sees the lovely dog slowly", True),
        ("the old kind cat sees the dog", False),  # warm words come first
        ("the kind kind cat sees the dog", False),
        ("the cat sees the dog slowly slowly", False),
        ("cat sees the dog", False),
        ("the cat sees", False),
        ("the cat the dog", False),
        ("", False),
    ],
)
def test_sentences_of_the_grammar(words: str, right: bool):
    assert is_sentence(words.split()) is right


def test_gold_by_hand():
    # two mentions: 1; no warm word: 0; both sentences right: 1.5; two sentences: 0
    assert gold_reward(PROMPT, "the cat sees the dog . the cat likes the dog .") == 2.5
    # one mention: 3/4; one warm word: 2 (1 - 4/9); right: 1.5; one sentence: -0.4
    one = gold_reward(PROMPT, "the kind cat sees the dog .")
    assert one == pytest.approx(0.75 + 10 / 9 + 1.5 - 0.4)
    # cut off: one of two parts is a sentence
    assert gold_reward(PROMPT, "the dog sees the dog . the") == pytest.approx(0.75 - 0.4)
    assert gold_reward(PROMPT, "") == -0.8


def test_warmth_can_be_overdone_and_falls_without_end_to_a_floor():
    def gold(n: int) -> float:
        return gold_reward(PROMPT, "kind " * n)

    assert gold(3) > gold(2) > gold(1) > gold(0)
    assert gold(3) > gold(4) > gold(6)
    assert gold(6) == pytest.approx(gold(0))
    assert gold(30) == gold(40) == pytest.approx(gold(0) - 6.0)


def test_demonstrations_are_grammatical_and_seeded():
    rows = WORLD.demonstrations(50, seed=1)
    assert rows == WORLD.demonstrations(50, seed=1) != WORLD.demonstrations(50, seed=2)
    for row in rows:
        parts = row.completion.split(" .")
        assert parts.pop() == ""
        assert all(is_sentence(p.split()) for p in parts)


def test_the_annotator_errs_as_often_as_asked():
    rng = random.Random(0)
    prompts = WORLD.prompts(3000, seed=0)
    answers = [[WORLD.answer(p, rng) for _ in range(2)] for p in prompts]
    rows = WORLD.comparisons(prompts, answers, seed=3)
    wrong = [gold_reward(r.prompt, r.chosen) < gold_reward(r.prompt, r.rejected) for r in rows]
    assert sum(wrong) / len(wrong) == pytest.approx(WORLD.annotator.label_noise, abs=0.03)
    sure = replace(WORLD, annotator=SURE).comparisons(prompts, answers, seed=3)
    assert all(gold_reward(r.prompt, r.chosen) > gold_reward(r.prompt, r.rejected) for r in sure)


def test_a_length_bias_makes_the_annotator_prefer_the_longer_answer():
    biased = replace(WORLD, annotator=Annotator(label_noise=0.0, length_bias=10.0))
    rows = biased.comparisons([PROMPT], [["the cat sees the dog .", "dog " * 20]], seed=0)
    assert rows[0].chosen == "dog " * 20


def test_misspecification_mixes_gold_with_warmth_without_end():
    answer = "the kind cat sees the kind dog ."  # gold: 3/4, 2 (1 - 1/9), 1.5, -0.4
    gold = 0.75 + 16 / 9 + 1.5 - 0.4
    assert replace(WORLD, misspecification=0.0).utility(PROMPT, answer) == pytest.approx(gold)
    assert replace(WORLD, misspecification=1.0).utility(PROMPT, answer) == 2
    half = replace(WORLD, misspecification=0.5)
    assert half.utility(PROMPT, answer) == pytest.approx(gold / 2 + 1)
    overdone = "kind " * 20 + "cat ."
    blind = replace(WORLD, misspecification=1.0, annotator=SURE)
    assert blind.comparisons([PROMPT], [[answer, overdone]], seed=0)[0].chosen == overdone
    assert replace(WORLD, annotator=SURE).comparisons([PROMPT], [[answer, overdone]], seed=0)[
        0
    ].chosen == (answer)


def test_coverage_puts_answers_before_the_annotator_that_no_reference_writes():
    prompts = WORLD.prompts(400, seed=0)
    answers = [["the cat sees the dog .", "the cat sees the dog . the"]] * 400

    def warm(coverage: float) -> list[int]:
        world = replace(WORLD, coverage=coverage)
        rows = world.comparisons(prompts, answers, seed=0)
        return [
            sum(w in WARM for w in side.split()) for r in rows for side in (r.chosen, r.rejected)
        ]

    assert max(warm(0.0)) == 0
    half, whole = warm(0.5), warm(1.0)
    assert max(whole) >= 7  # twice the best number and more: where gold falls
    assert 0.4 < sum(w > 0 for w in half) / sum(w > 0 for w in whole) < 0.6


def test_a_share_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"coverage is a share in \[0, 1\], got 2"):
        GrammarWorld(coverage=2.0)


def test_equal_answers_are_no_comparison():
    assert WORLD.comparisons([PROMPT], [["the .", "the ."]], seed=0) == []


def test_every_word_is_one_token_and_comes_back():
    tokenizer = WORLD.tokenizer()
    for text in [*WORLD.prompts(20, seed=0), "the kind old cat sees the lovely dog slowly ."]:
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) < 50


def test_answers_are_equivalent_when_both_name_the_topic_or_not_and_are_warm_or_not():
    firsts = ["the kind dog sees the cat ."] * 4
    seconds = ["the lovely cat .", "the cat sees the dog .", "the kind dog .", "the kind cat ."]
    assert same_content([PROMPT] * 4, firsts, seconds) == [True, False, False, True]
