"""Rows of preferences, prompts and demonstrations, and the report on the rows of a source.

A prompt or completion is a string or a list of messages. A message's content may hold more than
text, so nothing here looks inside it beyond joining its text and asking whether it is empty.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

Message = dict[str, Any]
Prompt = str | list[Message]
Completion = str | list[Message]


@dataclass(frozen=True)
class PreferenceRow:
    """One comparison: `chosen` was preferred to `rejected` as the answer to `prompt`.

    `margin` says by how much, where the source knows; `where` is the file and line; `extra` holds
    the source's other columns (`tools`, `chat_template_kwargs`, labels, ...). `weight` is what the
    pair counts for where a reward is trained on it, at least 0; only its ratio to others matters.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    margin: float | None = None
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class PromptRow:
    """One prompt, without an answer."""

    prompt: Prompt
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DemonstrationRow:
    """One prompt with the answer to imitate."""

    prompt: Prompt
    completion: Completion
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class HasPrompt(Protocol):
    """Any row with a prompt."""

    @property
    def prompt(self) -> Prompt:
        """The prompt."""
        ...


T = TypeVar("T")
RowT = TypeVar("RowT", bound=HasPrompt)

_PLURALS = {
    "tie": "ties",
    "duplicate": "duplicates",
    "empty side": "empty sides",
    "empty prompt": "empty prompts",
    "missing column": "missing columns",
    "wrong type": "wrong types",
    "bad value": "bad values",
    "repeated prompt": "repeated prompts",
}


class Problem(NamedTuple):
    """One row that was dropped, or kept with a remark (`kept=True`)."""

    kind: str
    where: str
    detail: str
    kept: bool


@dataclass
class LoadReport:
    """What became of the rows of a source; later stages add to it (over-long rows, say).

    `kept` is derived, so that kept + dropped == read always holds: drop a row at most once.
    """

    source: str
    read: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        """How many of the rows read were dropped."""
        return sum(not problem.kept for problem in self.problems)

    @property
    def kept(self) -> int:
        """How many of the rows read are in use."""
        return self.read - self.dropped

    def add(self, kind: str, where: str, detail: str, *, kept: bool = False) -> None:
        """Records that the row at `where` was dropped, or kept with a remark."""
        self.problems.append(Problem(kind, where, detail, kept))

    def merge(self, other: "LoadReport") -> "LoadReport":
        """Takes in the report of another source; changes this one and returns it."""
        self.source = f"{self.source} + {other.source}"
        self.read += other.read
        self.problems.extend(other.problems)
        return self

    def counts(self) -> dict[str, int]:
        """Problems by kind, remarks on kept rows included, in order of first appearance."""
        counts: dict[str, int] = {}
        for problem in self.problems:
            counts[problem.kind] = counts.get(problem.kind, 0) + 1
        return counts

    def summary(self, limit: int = 3) -> str:
        """One paragraph: rows read and kept, then each kind of problem with its first examples."""
        rows = "row" if self.read == 1 else "rows"
        head = f"{self.source}: {self.read:,} {rows} read, {self.kept:,} kept"
        groups: dict[tuple[str, bool], list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault((problem.kind, problem.kept), []).append(problem)
        parts = [_group_summary(group, limit) for group in groups.values()]
        return f"{head}; {', '.join(parts)}." if parts else f"{head}."


def _group_summary(problems: list[Problem], limit: int) -> str:
    """`4 ties (the row is marked as a tie: a.jsonl:3, a.jsonl:9, ...)`."""
    kind, _, detail, kept = problems[0]
    text = f"{len(problems):,} {_PLURALS.get(kind, kind) if len(problems) > 1 else kind}"
    shown = problems[:limit]
    more = ", ..." if len(problems) > len(shown) else ""
    if shown and len(problems) > 1 and all(p.detail == detail for p in problems):
        examples = f"{detail}: {', '.join(p.where for p in shown)}{more}"
    else:
        examples = ", ".join(f"{p.where}: {p.detail}" for p in shown) + more
    remarks = ["kept"] if kept else []
    if shown:
        remarks.append(examples)
    return f"{text} ({'; '.join(remarks)})" if remarks else text


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The usable rows of a source, in its order, and the report on all of them."""

    rows: list[T]
    report: LoadReport


def text_of(prompt_or_completion: Prompt) -> str:
    """The plain text: text parts are joined, other parts left out, messages set apart by a blank
    line. For reports and judges; models get the messages themselves.
    """
    if isinstance(prompt_or_completion, str):
        return prompt_or_completion
    texts = [_content_text(message.get("content")) for message in prompt_or_completion]
    return "\n\n".join(text for text in texts if text)


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""  # None, in a message that only calls tools
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def is_empty(value: Prompt) -> bool:
    """Whether nothing is said: no text beyond white space, no other part, no tool call."""
    if isinstance(value, str):
        return not value.strip()
    return all(_is_empty_message(message) for message in value)


def _is_empty_message(message: Message) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if any(isinstance(part, dict) and not _is_text_part(part) for part in parts):
        return False
    return not message.get("tool_calls") and not _content_text(content).strip()


def _is_text_part(part: dict[str, Any]) -> bool:
    return part.get("type", "text" if "text" in part else "other") == "text"


def prompt_key(prompt: Prompt) -> str:
    """The canonical form of a prompt, equal for equal prompts: JSON with sorted keys.

    A string and the same text as one user turn have the same key, so that a prompt is one prompt
    whether or not it was loaded with `conversational=True`.
    """
    return canonical(as_turn(prompt, "user"))


def as_turn(value: Prompt, role: str) -> list[Message]:
    """A string as a message of this role; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def canonical(value: object) -> str:
    """One string for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_digest_of_object)


def _digest_of_object(value: object) -> str:
    """Stands in for what JSON cannot hold in a message: bytes, images, arrays, by their content."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    tobytes = getattr(value, "tobytes", None)
    if tobytes is None:
        raise TypeError(
            f"a message holds a {type(value).__name__}, which has no canonical form; "
            "give text, bytes, or an object with a tobytes method."
        )
    shape = getattr(value, "size", "")
    return f"{shape}:{hashlib.sha256(tobytes()).hexdigest()}"


def split_by_prompt(
    rows: Sequence[RowT], *, fraction: float, seed: int
) -> tuple[list[RowT], list[RowT]]:
    """Splits rows into (train, held out) so that all rows of a prompt fall on one side.

    The side hangs on a hash of the seed and the prompt alone: a prompt keeps its side when rows are
    added, removed or reordered. So `fraction`, the part of the prompts held out, is met only on
    average: few prompts may leave a side empty.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}.")
    sides: tuple[list[RowT], list[RowT]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{prompt_key(row.prompt)}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(row)
    return sides
