"""What a policy still knows: multiple-choice questions, answered by log-likelihood.

As EleutherAI's lm-evaluation-harness asks them (https://github.com/EleutherAI/
lm-evaluation-harness, `lm_eval/api/task.py`): plain text without a chat template, each choice
continues the query after one space, and the choice with the highest log-likelihood is the answer.
Optimisation against a reward costs knowledge too; the loss shows beside the reference policy's
numbers on the same questions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import DataError, read_jsonl
from trueward.data.sources import json_type
from trueward.data.tokens import Tokens, prompt_ids, start_token_id, truncate_prompt
from trueward.models.policy import Policy
from trueward.sampling import Sample
from trueward.train.policy import sample_batches

DELIMITER = " "  # between query and choice, the harness's `target_delimiter`
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A query, what may continue it, and which continuation is right."""

    query: str
    choices: list[str]
    gold: int  # index into the choices
    where: str = ""  # file and line
    extra: dict[str, Any] = field(default_factory=dict)


def load_questions(source: str | Path) -> list[Question]:
    """Read multiple-choice questions from JSONL.

    A row holds `query`, `choices` and `gold` (an index), or `question`, `choices` and `answer` (an
    index, or a letter from A on). Other columns are kept in `extra`. The query is asked as it
    stands; see `lettered` for questions whose choices are to be shown.

    Raises:
        DataError: A row of another form, with its file and line; or no row at all.
    """
    questions = [_question(row, f"{source}:{line}") for line, row in read_jsonl(source)]
    if not questions:
        raise DataError(f"{source} holds no questions: give rows with query, choices and gold.")
    return questions


def lettered(question: Question) -> Question:
    """The question with its choices shown under letters, which are then the choices.

    As the harness asks MMLU, without examples: the question, a line `A. choice` for each choice,
    and `Answer:`.
    """
    if len(question.choices) > len(LETTERS):
        raise DataError(
            f"{question.where or 'a question'} has {len(question.choices)} choices and there are "
            f"letters for {len(LETTERS)}: ask it without letters."
        )
    shown = zip(LETTERS, question.choices, strict=False)
    lines = [question.query.strip(), *(f"{letter}. {choice}" for letter, choice in shown)]
    return replace(
        question,
        query="\n".join([*lines, "Answer:"]),
        choices=list(LETTERS[: len(question.choices)]),
    )


@dataclass(frozen=True, kw_only=True)
class MultipleChoice:
    """Accuracies on a set of questions; standard errors are `sqrt(p (1 - p) / (n - 1))`."""

    acc: float  # by the summed log-likelihood
    acc_stderr: float  # NaN for a single question
    acc_norm: float  # by the log-likelihood over the choice's characters
    acc_norm_stderr: float
    acc_bytes: float  # over its bytes in UTF-8: the same as acc_norm for ASCII
    acc_bytes_stderr: float
    chance: float  # of a choice at random
    questions: int
    truncated: int  # questions whose query was cut from the left to fit the policy's context
    right: list[bool] = field(repr=False)  # question by question, as `acc` counts: for `retention`


def evaluate_multiple_choice(
    policy: Policy, questions: Sequence[Question], *, max_tokens: int = 16384
) -> MultipleChoice:
    """Accuracy of the choices that a policy holds most likely; the first of equals is taken.

    The harness's `acc`, `acc_norm` (which divides by the number of characters, though it is often
    described as by bytes) and `acc_bytes`; the length is the choice's own, without the space.

    Args:
        policy: Switched to evaluation while it reads.
        questions: From `load_questions`, or made.
        max_tokens: Padded tokens computed at once.

    Raises:
        DataError: No question, or a choice that does not fit the policy's context.
    """
    found, truncated = choice_loglikelihoods(policy, questions, max_tokens=max_tokens)
    hits = choice_hits(questions, found)
    shares = {name: _share(right) for name, right in hits.items()}
    return MultipleChoice(
        acc=shares["acc"][0],
        acc_stderr=shares["acc"][1],
        acc_norm=shares["acc_norm"][0],
        acc_norm_stderr=shares["acc_norm"][1],
        acc_bytes=shares["acc_bytes"][0],
        acc_bytes_stderr=shares["acc_bytes"][1],
        chance=sum(1 / len(q.choices) for q in questions) / len(questions),
        questions=len(questions),
        truncated=truncated,
        right=hits["acc"],
    )


@torch.no_grad()
def choice_loglikelihoods(
    policy: Policy, questions: Sequence[Question], *, max_tokens: int = 16384
) -> tuple[list[Float[Tensor, " choice"]], int]:
    """Summed log-probability of each choice after its query, in nats; and how many were cut.

    Query and choice are encoded together and split where the query's own tokens end, as the harness
    does; white space at the query's end goes to the choice. The choices of a query travel with it
    as one packed row. A string begins with the tokenizer's BOS, where it has one, as everywhere in
    this library; the harness adds one only where its `add_bos_token` says so.
    """
    if not questions:
        raise DataError("there must be at least one question to ask, got none.")
    encoded = [_encoded(policy, question) for question in questions]
    truncated = sum(any(cut for _, cut in choices) for choices in encoded)
    samples = [
        Sample(
            prompt_index=i,
            prompt_ids=tokens.prompt_ids,
            completion_ids=tokens.completion_ids,
            logprobs=[],
            text=choice,
            finished=False,
        )
        for i, (question, choices) in enumerate(zip(questions, encoded, strict=True))
        for choice, (tokens, _) in zip(question.choices, choices, strict=True)
    ]
    sums = torch.zeros(len(samples), dtype=torch.float64)
    was_training = policy.training
    policy.eval()
    for batch, where in sample_batches(policy, samples, range(len(samples)), max_tokens):
        sums[where] = (policy(batch).logprobs * batch.mask).double().sum(dim=1).cpu()
    policy.train(was_training)
    return list(sums.split([len(q.choices) for q in questions])), truncated


def choice_hits(
    questions: Sequence[Question], loglikelihoods: Sequence[Float[Tensor, " choice"]]
) -> dict[str, list[bool]]:
    """Whether the likeliest choice is the right one, by each of the three ways to weigh length."""
    hits: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question, sums in zip(questions, loglikelihoods, strict=True):
        characters = torch.tensor([float(len(c)) for c in question.choices]).double()
        bytes_ = torch.tensor([float(len(c.encode())) for c in question.choices]).double()
        weighed = {"acc": sums, "acc_norm": sums / characters, "acc_bytes": sums / bytes_}
        for name, values in weighed.items():
            hits[name].append(_first_largest(values) == question.gold)
    return hits


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What a policy answers rightly less what its reference does, on the same questions."""

    difference: float  # of `acc`
    stderr: float  # of the paired difference; NaN for a single question
    lost: int  # questions that only the reference answers rightly
    gained: int  # that only the policy does


def retention(right: Sequence[bool], ref_right: Sequence[bool]) -> Retention:
    """Compare two policies question by question, which is finer than two accuracies.

    The standard error is that of the mean of differences in {-1, 0, 1} (ddof 1).
    """
    if len(right) != len(ref_right) or not right:
        raise ValueError(
            "retention compares the same questions, at least one, got "
            f"{len(right)} and {len(ref_right)} answers."
        )
    pairs = list(zip(right, ref_right, strict=True))
    differences = torch.tensor([float(ours) - float(ref) for ours, ref in pairs])
    several = len(pairs) > 1
    return Retention(
        difference=float(differences.mean()),
        stderr=float(differences.double().std() / math.sqrt(len(pairs))) if several else math.nan,
        lost=sum(ref and not ours for ours, ref in pairs),
        gained=sum(ours and not ref for ours, ref in pairs),
    )


def _share(right: Sequence[bool]) -> tuple[float, float]:
    """Return a share and its standard error."""
    n, p = len(right), sum(right) / len(right)
    return p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


def _first_largest(values: Float[Tensor, " choice"]) -> int:
    listed = values.tolist()  # torch's argmax does not say which of equals it takes
    return listed.index(max(listed))


def _encoded(policy: Policy, question: Question) -> list[tuple[Tokens, bool]]:
    """Return the ids of query and choice for each choice, and whether the query was cut."""
    tokenizer = policy.tokenizer
    query = question.query.rstrip()
    trailing = question.query[len(query) :]
    where = question.where or f"the question {question.query[:40]!r}"
    before = prompt_ids(tokenizer, query)
    if not query or not before:
        raise DataError(f"{where}: the query is empty: a choice needs something to continue.")
    encoded = []
    for choice in question.choices:
        whole = prompt_ids(tokenizer, query + trailing + DELIMITER + choice)
        tokens = Tokens(before, whole[len(before) :])
        if not tokens.completion_ids:
            raise DataError(f"{where}: the choice {choice!r} has no token of its own.")
        start = start_token_id(tokenizer)
        fitting = truncate_prompt(tokens, policy.max_length, bos_token_id=start)
        if fitting is None:
            raise DataError(
                f"{where}: a choice of {len(tokens.completion_ids)} tokens does not fit into the "
                f"policy's context of {policy.max_length}: leave the question out."
            )
        encoded.append((fitting, len(fitting.prompt_ids) < len(before)))
    return encoded


def _question(row: Mapping[str, Any], where: str) -> Question:
    names = ("query", "gold") if "query" in row else ("question", "answer")
    missing = [name for name in (*names, "choices") if name not in row]
    if missing:
        raise DataError(
            f"{where} needs 'query', 'choices' and 'gold', or 'question', 'choices' and 'answer', "
            f"has {', '.join(row) or 'nothing'}."
        )
    query, choices, gold = row[names[0]], row["choices"], row[names[1]]
    if not isinstance(query, str) or not query.strip():
        raise DataError(f"{where}: '{names[0]}' must be a text that is not empty.")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(
            f"{where}: 'choices' must be a list of at least two texts, got {json_type(choices)}"
            f"{f' of {len(choices)}' if isinstance(choices, list) else ''}."
        )
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise DataError(f"{where}: 'choices' must hold texts that are not empty.")
    extra = {k: v for k, v in row.items() if k not in (*names, "choices")}
    return Question(query, list(choices), _index(gold, names[1], len(choices), where), where, extra)


def _index(gold: object, name: str, count: int, where: str) -> int:
    """Return which choice is right, from an index or a letter."""
    if isinstance(gold, str) and len(gold.strip()) == 1 and gold.strip().upper() in LETTERS:
        gold = LETTERS.index(gold.strip().upper())
    elif isinstance(gold, str) and gold.strip().isdecimal():
        gold = int(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
        raise DataError(
            f"{where}: '{name}' must be an index from 0 to {count - 1}, or a letter from A to "
            f"{LETTERS[min(count, len(LETTERS)) - 1]}, got {gold!r}."
        )
    return gold
