import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from trueward.data.formats import DataError
from trueward.evaluate.multiple_choice import (
    Question,
    choice_hits,
    choice_loglikelihoods,
    evaluate_multiple_choice,
    lettered,
    load_questions,
    retention,
)
from trueward.models.policy import Policy
from trueward.testing import tiny_language_model, tiny_texts


@pytest.fixture
def policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    model = tiny_language_model(vocab_size=len(tokenizer), max_positions=64)
    return Policy(model, tokenizer)


def asked(count: int = 12) -> list[Question]:
    texts = tiny_texts(4 * count, seed=2, words=(1, 5))
    return [
        Question(texts[4 * i], texts[4 * i + 1 : 4 * i + 4], i % 3, where=f"q.jsonl:{i + 1}")
        for i in range(count)
    ]


def by_the_whole_model(policy: Policy, query: str, choice: str) -> float:
    """One text at a time through transformers, encoded as the harness does."""
    context = policy.tokenizer(query).input_ids
    whole = policy.tokenizer(f"{query} {choice}").input_ids
    ids = torch.tensor([context + whole[len(context) :]])
    with torch.no_grad():
        logprobs = policy.model(ids).logits[0].log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    return sum(float(logprobs[at, ids[0, at + 1]]) for at in places)


def test_loglikelihoods_are_those_of_one_text_at_a_time(policy: Policy):
    questions = asked()
    found, truncated = choice_loglikelihoods(policy, questions, max_tokens=60)
    assert truncated == 0
    for question, sums in zip(questions, found, strict=True):
        expected = [by_the_whole_model(policy, question.query, c) for c in question.choices]
        assert sums.tolist() == pytest.approx(expected, abs=1e-4)


def test_white_space_at_the_querys_end_goes_to_the_choice(policy: Policy):
    """As in the harness, where `Answer: ` and `yes` become `Answer:` and `  yes`."""
    (found,), _ = choice_loglikelihoods(policy, [Question("the cat ", ["sees", "runs"], 0)])
    expected = [by_the_whole_model(policy, "the cat", f" {c}") for c in ("sees", "runs")]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_token_across_the_seam_belongs_to_the_choice_as_the_harness_splits_it():
    pieces = ["<pad>", "</s>", "x", "a", " ", "b", "c", "a "]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    seam = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocab, merges=[("a", " ")])),
        eos_token="</s>",
        pad_token="<pad>",
    )
    # "xa" is x, a; "xa b" is x, "a ", b, of which the first two are held to be the query's.
    assert seam("xa b").input_ids[2:] == [5] != seam(" b").input_ids
    policy = Policy(tiny_language_model(vocab_size=len(pieces)), seam)
    (found,), _ = choice_loglikelihoods(policy, [Question("xa", ["b", "c"], 0)])
    expected = [by_the_whole_model(policy, "xa", choice) for choice in ("b", "c")]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_hits_weigh_length_by_characters_and_by_bytes():
    questions = [Question("q", ["a", "bbbb"], 1), Question("q", ["éé", "bbb"], 0)]
    sums = [torch.tensor([-2.0, -4.0]), torch.tensor([-4.4, -6.0])]
    hits = choice_hits(questions, [s.double() for s in sums])
    assert hits["acc"] == [False, True]  # -2 > -4; -4.4 > -6
    assert hits["acc_norm"] == [True, False]  # -2 < -1; -2.2 < -2
    assert hits["acc_bytes"] == [True, True]  # -1.1 > -2


def test_the_first_of_equal_choices_is_taken():
    hits = choice_hits([Question("q", ["a", "a"], 0)], [torch.tensor([-1.0, -1.0]).double()])
    assert hits["acc"] == [True]


def test_accuracies_and_their_standard_errors(policy: Policy):
    questions = asked()
    found = evaluate_multiple_choice(policy, questions)
    sums, _ = choice_loglikelihoods(policy, questions)
    right = [int(s.argmax()) == q.gold for s, q in zip(sums, questions, strict=True)]
    assert found.right == right
    assert found.acc == sum(right) / 12
    assert 0 < found.acc < 1
    assert found.acc_stderr == pytest.approx(math.sqrt(found.acc * (1 - found.acc) / 11))
    # The sample standard deviation of zeros and ones over sqrt(n), as the harness computes it.
    zeros_and_ones = torch.tensor(right).double()
    assert found.acc_stderr == pytest.approx(float(zeros_and_ones.std()) / math.sqrt(12))
    assert found.chance == pytest.approx(1 / 3)
    assert (found.questions, found.truncated) == (12, 0)
    assert found.acc_norm == found.acc_bytes  # all of it ASCII
    assert math.isnan(evaluate_multiple_choice(policy, questions[:1]).acc_stderr)


def test_a_long_query_is_cut_from_the_left_and_counted(policy: Policy):
    long = Question("cat " * 100 + "the dog", ["sees", "runs"], 0)
    (found,), truncated = choice_loglikelihoods(policy, [long])
    assert truncated == 1
    ids = policy.tokenizer(long.query).input_ids
    choice = policy.tokenizer(f"{long.query} sees").input_ids[len(ids) :]
    bos = [ids[0]] if ids[0] == policy.tokenizer.bos_token_id else []
    kept = bos + ids[-(64 - len(choice) - len(bos)) :]
    assert len(kept) + len(choice) == 64
    whole = torch.tensor([kept + choice])
    with torch.no_grad():
        logprobs = policy.model(whole).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[len(kept) - 1 + i, c]) for i, c in enumerate(choice))
    assert float(found[0]) == pytest.approx(expected, abs=1e-4)


def test_a_choice_that_cannot_be_read_is_named_with_its_line(policy: Policy):
    with pytest.raises(DataError, match=r"q.jsonl:7: a choice of \d+ tokens does not fit"):
        choice_loglikelihoods(policy, [Question("q", ["a", "cat " * 90], 0, where="q.jsonl:7")])
    with pytest.raises(DataError, match="at least one question"):
        evaluate_multiple_choice(policy, [])


def test_letters_show_the_choices_as_the_harness_asks_mmlu():
    found = lettered(Question(" What purrs? ", ["a cat", "a dog"], 1, where="q.jsonl:1"))
    assert found.query == "What purrs?\nA. a cat\nB. a dog\nAnswer:"
    assert found.choices == ["A", "B"]
    assert (found.gold, found.where) == (1, "q.jsonl:1")
    with pytest.raises(DataError, match="letters for 10"):
        lettered(Question("q", ["x"] * 11, 0))


def test_both_forms_of_rows_are_read(tmp_path: Path):
    rows = [
        {"query": "q", "choices": ["a", "b"], "gold": 1, "subject": "cats"},
        {"question": "q", "choices": ["a", "b", "c"], "answer": 2},
        {"question": "q", "choices": ["a", "b", "c"], "answer": "b"},
        {"question": "q", "choices": ["a", "b"], "answer": "1"},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_questions(tmp_path / "q.jsonl")
    assert [q.gold for q in found] == [1, 2, 1, 1]
    assert found[0].extra == {"subject": "cats"}
    assert found[2].where == f"{tmp_path}/q.jsonl:3"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q"}, r"q.jsonl:2 needs 'query', 'choices' and 'gold', or .*, has prompt"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "'query' must be a text"),
        ({"query": "q", "choices": ["a"], "gold": 0}, "at least two texts, got .* of 1"),
        ({"query": "q", "choices": "ab", "gold": 0}, "at least two texts, got a string"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "must hold texts that are not empty"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "index from 0 to 1, .* A to B, got 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": -1}, "got -1"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "got True"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "'answer' must .* got 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "yes"}, "got 'yes'"),
    ],
)
def test_a_row_of_another_form_is_named_with_its_line(row: dict, says: str, tmp_path: Path):
    good = {"query": "q", "choices": ["a", "b"], "gold": 1}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=says) as caught:
        load_questions(tmp_path / "q.jsonl")
    assert "q.jsonl:2" in str(caught.value)


def test_retention_compares_question_by_question():
    found = retention([True, False, False, True], [True, True, True, False])
    assert (found.difference, found.lost, found.gained) == (-0.25, 2, 1)
    differences = torch.tensor([0.0, -1.0, -1.0, 1.0]).double()
    assert found.stderr == pytest.approx(float(differences.std()) / 2)
    assert retention([True, False], [True, False]).stderr == 0.0
    with pytest.raises(ValueError, match="same questions"):
        retention([True], [])
