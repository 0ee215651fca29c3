"""The annotator that all worlds share."""

import pytest

from trueward.lab.worlds import Annotator, words_of

SURE = Annotator(label_noise=0.0)
PAIRS = [[f"good {i}", f"bad {i} and long"] for i in range(2000)]
PROMPTS = [f"prompt {i}" for i in range(2000)]
WORTH = [[1.0, 0.0]] * 2000


def test_a_sure_annotator_chooses_the_worthier_answer():
    rows = SURE.compare(["p", "q"], [["a", "b"], ["c", "d"]], [[0.0, 1.0], [2.0, 1.0]], seed=0)
    assert [(r.prompt, r.chosen, r.rejected) for r in rows] == [("p", "b", "a"), ("q", "c", "d")]


def test_a_quarter_of_the_labels_is_flipped_and_the_same_ones_whatever_the_worth():
    first = Annotator().compare(PROMPTS, PAIRS, WORTH, seed=4)
    flipped = [r.chosen.startswith("bad") for r in first]
    assert sum(flipped) / 2000 == pytest.approx(0.25, abs=0.02)
    turned = Annotator().compare(PROMPTS, PAIRS, [[0.0, 5.0]] * 2000, seed=4)
    assert [r.chosen.startswith("good") for r in turned] == flipped
    other = Annotator().compare(PROMPTS, PAIRS, WORTH, seed=5)
    assert [r.chosen.startswith("bad") for r in other] != flipped


def test_biases_are_added_to_the_utility():
    long = Annotator(label_noise=0.0, length_bias=0.5)  # 4 words against 2: as good as 1
    assert long.compare(["p"], [PAIRS[0]], [[1.0, 0.0]], seed=0) == []
    assert long.compare(["p"], [PAIRS[0]], [[0.9, 0.0]], seed=0)[0].chosen == "bad 0 and long"
    first = Annotator(label_noise=0.0, position_bias=2.0)
    assert first.compare(["p"], [["worse", "better"]], [[0.0, 1.9]], seed=0)[0].chosen == "worse"
    assert first.compare(["p"], [["worse", "better"]], [[0.0, 2.1]], seed=0)[0].chosen == "better"


def test_the_first_two_distinct_answers_are_compared():
    rows = SURE.compare(["p"], [["a", "a", "b", "c"]], [[0.0, 0.0, 1.0, 9.0]], seed=0)
    assert (rows[0].chosen, rows[0].rejected) == ("b", "a")
    assert SURE.compare(["p"], [["a", "a"]], [[0.0, 1.0]], seed=0) == []
    assert SURE.compare(["p"], [["a", "b"]], [[1.0, 1.0]], seed=0) == []


def test_noise_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"label_noise is a share in \[0, 1\], got 1\.5"):
        Annotator(label_noise=1.5)


def test_words_of_messages_and_strings():
    assert words_of("two words") == 2
    assert words_of([{"role": "assistant", "content": "now three words"}]) == 3
