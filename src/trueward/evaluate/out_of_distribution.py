"""Completions that a reward's data did not cover, made from those that it did.

Each maker is a pure function of prompts, completions and a seed, and keeps a completion's form: a
string stays a string; in a list of messages the texts change and all else (roles, images, tool
calls) stays. What it makes of a completion hangs on the seed, the prompt and the completion alone,
so the order of the rows does not matter; only `mismatched` looks at the others.

None of this is what a policy writes once it has learned to please a reward: where there are
answers of such a policy, give those too (see `answers_beside`).
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueward.data.formats import Completion, Prompt, prompt_key, text_of
from trueward.data.rows import as_turn, canonical
from trueward.data.sources import DataError, json_type, read_jsonl

Maker = Callable[..., Sequence[Completion]]  # (prompts, completions, *, seed) -> completions
OutOfDistribution = Maker | Sequence[Completion | None]
Change = Callable[[str, random.Random], str]

LONGEST_REPEATED_PART = 16  # words: from one word over and over to a sentence over and over


def shuffled_words(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, seed: int
) -> list[Completion]:
    """Return each completion with its words in a random order, its white space in place.

    Words and length stay, order goes; a text of one word has its characters shuffled. A text whose
    words are all the same comes back as it was.
    """
    return _changed(prompts, completions, seed, _shuffled)


def repeated_text(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, length: int = 1, seed: int
) -> list[Completion]:
    """Return the first words of each completion over and over, as a policy that has collapsed.

    Args:
        prompts: One for each completion.
        completions: What is changed.
        length: How many times as many words as the completion; 1 is the same length.
        seed: Of how many of the first words are repeated: 1 to 16, at most half of all.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 (the same length), got {length}.")
    change = functools.partial(_repeated, length=length)
    return _changed(prompts, completions, seed, change)


def truncated(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, seed: int
) -> list[Completion]:
    """Return each completion cut off after a random quarter to three quarters of its words."""
    return _changed(prompts, completions, seed, _truncated)


def mismatched(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, seed: int
) -> list[Completion]:
    """Return for each prompt the completion of another one, every completion once.

    The completions as such are the same; only what they answer is not. Raises ValueError where more
    than half of the completions answer one prompt.
    """
    _require_one_for_each(prompts, completions)
    keys = [prompt_key(prompt) for prompt in prompts]
    drawn = {key: _random(seed, key).random() for key in keys}
    # Completions of one prompt stand together: a shift by the largest group leaves every group.
    order = sorted(
        range(len(keys)), key=lambda i: (drawn[keys[i]], keys[i], canonical(completions[i]))
    )
    shift = max(Counter(keys).values(), default=0)
    if 2 * shift > len(keys):
        raise ValueError(
            f"{shift} of {len(keys)} completions answer one prompt, so that not all can be given "
            "to another one; use more prompts."
        )
    result = list(completions)
    for place, i in enumerate(order):
        result[i] = completions[order[(place + shift) % len(order)]]
    return result


OUT_OF_DISTRIBUTION: dict[str, Maker] = {
    "shuffled": shuffled_words,
    "repeated": repeated_text,
    "repeated x4": functools.partial(repeated_text, length=4),
    "mismatched": mismatched,
    "truncated": truncated,
}


def completions_of(
    source: OutOfDistribution,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    *,
    seed: int,
    name: str = "out_of_distribution",
) -> list[Completion | None]:
    """Return what a maker makes, or the given completions as they are, one for each prompt.

    Args:
        source: A function `(prompts, completions, *, seed)`, or the completions themselves:
            another policy's answers to the same prompts, or answers in another language; None
            where there is none for a prompt.
        prompts: What is answered.
        completions: The answers in the data.
        seed: For the maker.
        name: What an error calls the source.
    """
    if isinstance(source, str):
        raise ValueError(
            f"{name} must be a function or a list with one completion for each prompt, got the "
            f"string {source[:40]!r}; the functions by name are in OUT_OF_DISTRIBUTION."
        )
    made = source(prompts, completions, seed=seed) if callable(source) else source
    if len(made) != len(prompts):
        raise ValueError(
            f"{name} must give one completion for each of {len(prompts)} prompts, got {len(made)}."
        )
    return list(made)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What makers made, and in words why others could not."""

    completions: Mapping[str, Sequence[Completion]]  # by the maker's name, one for each prompt
    left_out: Mapping[str, str]


def made_completions(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    makers: Mapping[str, Maker] = OUT_OF_DISTRIBUTION,
    *,
    seed: int,
) -> Made:
    """Run all makers, and leave out those that these rows are too few or too alike for."""
    made, left_out = {}, {}
    for name, maker in makers.items():
        try:
            made[name] = maker(prompts, completions, seed=seed)
        except ValueError as error:
            left_out[name] = str(error)
    return Made(completions=made, left_out=left_out)


@dataclass(frozen=True, kw_only=True)
class AnswersBeside:
    """Completions from elsewhere, put beside the prompts of the data."""

    completions: Sequence[Completion | None]  # one for each prompt; None: there is none for it
    other_prompts: bool  # no prompt is common to both, so that they answer other prompts
    unused: int  # completions that stand beside no prompt


def answers_beside(
    prompts: Sequence[Prompt],
    answered: Sequence[Prompt],
    answers: Sequence[Completion],
    *,
    seed: int,
) -> AnswersBeside:
    """Put another policy's answers, or those of another language, beside the prompts of the data.

    A prompt has the answer to it; where it has several, they go round over the rows of that prompt,
    the first one first. Prompts without an answer have None. If no prompt is common to both, the
    answers are dealt out to the prompts in random order, each at most once: what they answer is
    then wrong too, as with `mismatched`. They take the form of the prompt, string or messages.

    Args:
        prompts: Of the data, one for each row.
        answered: One for each answer.
        answers: The completions.
        seed: Of the dealing.
    """
    _require_one_for_each(answered, answers)
    by_prompt: dict[str, list[Completion]] = {}
    for prompt, answer in zip(answered, answers, strict=True):
        by_prompt.setdefault(prompt_key(prompt), []).append(answer)
    beside: list[Completion | None] = []
    seen: Counter[str] = Counter()
    for prompt in prompts:
        key = prompt_key(prompt)
        own = by_prompt.get(key, [])
        beside.append(_in_form_of(prompt, own[seen[key] % len(own)]) if own else None)
        seen[key] += 1
    if any(answer is not None for answer in beside):
        used = sum(min(count, len(by_prompt.get(key, []))) for key, count in seen.items())
        return AnswersBeside(completions=beside, other_prompts=False, unused=len(answers) - used)
    rng = _random(seed, "dealt")
    places, dealt = list(range(len(prompts))), list(answers)
    rng.shuffle(places)
    rng.shuffle(dealt)
    for place, answer in zip(places, dealt, strict=False):
        beside[place] = _in_form_of(prompts[place], answer)
    return AnswersBeside(
        completions=beside, other_prompts=True, unused=max(0, len(answers) - len(prompts))
    )


def read_answers(source: str | Path) -> tuple[list[Prompt], list[Completion]]:
    """Read prompts and the answers to them from JSONL rows with `prompt` and `completion(s)`.

    A row with several `completions` gives its prompt as often as it has them.

    Raises:
        DataError: A row lacks one of them, or holds neither text nor messages; or there are none.
    """
    prompts: list[Prompt] = []
    answers: list[Completion] = []
    for line, row in read_jsonl(source):
        one = [row["completion"]] if "completion" in row else None
        some = row.get("completions", one)
        if "prompt" not in row or not isinstance(some, list):
            raise DataError(
                f"{source}:{line} needs 'prompt' and 'completion' (or a list of 'completions'), "
                f"has {', '.join(row) or 'nothing'}."
            )
        for value in (row["prompt"], *some):
            if not _is_text_or_messages(value):
                raise DataError(
                    f"{source}:{line}: prompt and completion must each be a string or a list of "
                    f"messages, got {json_type(value)}."
                )
        prompts += [row["prompt"]] * len(some)
        answers += some
    if not answers:
        raise DataError(f"{source} holds no completions: give rows with prompt and completion.")
    return prompts, answers


def _is_text_or_messages(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(message, dict) for message in value)
    return isinstance(value, str)


def _in_form_of(prompt: Prompt, completion: Completion) -> Completion:
    """The completion as text to a string, as messages to messages: a model reads no other pair."""
    return text_of(completion) if isinstance(prompt, str) else as_turn(completion, "assistant")


def _shuffled(text: str, rng: random.Random) -> str:
    pieces = re.split(r"(\s+)", text)
    places = [i for i in range(0, len(pieces), 2) if pieces[i]]
    if len(places) == 1:
        pieces = list(text)
        places = [i for i, character in enumerate(text) if not character.isspace()]
    words = [pieces[i] for i in places]
    shuffled = list(words)
    while shuffled == words and len(set(words)) > 1:
        rng.shuffle(shuffled)
    for place, word in zip(places, shuffled, strict=True):
        pieces[place] = word
    return "".join(pieces)


def _repeated(text: str, rng: random.Random, *, length: int) -> str:
    words = _words(text)
    if not words:
        return text
    part = rng.randint(1, max(1, min(len(words) // 2, LONGEST_REPEATED_PART)))
    return _lead(text) + "".join(words[i % part] for i in range(length * len(words))).rstrip()


def _truncated(text: str, rng: random.Random) -> str:
    words = _words(text)
    if len(words) < 2:
        return text
    kept = round(rng.uniform(0.25, 0.75) * len(words))
    return _lead(text) + "".join(words[: min(max(kept, 1), len(words) - 1)]).rstrip()


def _words(text: str) -> list[str]:
    """Words with the white space behind them; the characters of a lone word."""
    words = re.findall(r"\S+\s*", text)
    return words if len(words) > 1 else list(text.strip())


def _lead(text: str) -> str:
    """The white space that a completion to a string begins with."""
    return text[: len(text) - len(text.lstrip())]


def _changed(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    seed: int,
    change: Change,
) -> list[Completion]:
    _require_one_for_each(prompts, completions)
    result = []
    for prompt, completion in zip(prompts, completions, strict=True):
        rng = _random(seed, prompt_key(prompt), canonical(completion))
        result.append(_with_texts(completion, change, rng))
    return result


def _with_texts(completion: Completion, change: Change, rng: random.Random) -> Completion:
    """The completion with each of its texts changed; messages are copied, never written to."""
    if isinstance(completion, str):
        return change(completion, rng)
    messages = []
    for message in completion:
        content = message.get("content")
        if isinstance(content, str):
            content = change(content, rng)
        elif isinstance(content, list):
            content = [_part_with_text(part, change, rng) for part in content]
        messages.append({**message, "content": content} if "content" in message else dict(message))
    return messages


def _part_with_text(part: Any, change: Change, rng: random.Random) -> Any:
    if isinstance(part, str):
        return change(part, rng)
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return {**part, "text": change(part["text"], rng)}
    return part


def _random(seed: int, *parts: str) -> random.Random:
    return random.Random(canonical([seed, *parts]))  # strings seed it the same in every process


def _require_one_for_each(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
    if len(prompts) != len(completions):
        raise ValueError(
            f"there must be one prompt for each completion, got {len(prompts)} prompts and "
            f"{len(completions)} completions."
        )
