"""Files and hub datasets to rows, in TRL's formats, with a report of every row that was not used.

Whatever form went in, three kinds of rows come out: preferences (prompt, chosen, rejected), prompts
and demonstrations (prompt, completion). A row that cannot be used is dropped, counted and listed
with its file and line. Where the files are and how they are read is in `sources`; the rows, and the
report on them, in `rows`. All of their public names can be had from here.
"""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from trueward.data.rows import (
    Completion,
    DemonstrationRow,
    Loaded,
    LoadReport,
    Message,
    PreferenceRow,
    Problem,
    Prompt,
    PromptRow,
    as_turn,
    canonical,
    is_empty,
    prompt_key,
    split_by_prompt,
    text_of,
)
from trueward.data.sources import (
    BrokenRecord,
    DataError,
    HubName,
    json_type,
    read_jsonl,
    record_streams,
    resolve_source,
    write_jsonl,
)

__all__ = [
    "Completion",
    "DataError",
    "DemonstrationRow",
    "HubName",
    "LoadReport",
    "Loaded",
    "Message",
    "PreferenceRow",
    "Problem",
    "Prompt",
    "PromptRow",
    "load_demonstrations",
    "load_preferences",
    "load_prompts",
    "prompt_key",
    "read_jsonl",
    "resolve_source",
    "split_by_prompt",
    "text_of",
    "write_jsonl",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Notes = list[tuple[str, str]]  # (kind, detail) of remarks on a row that is kept


def load_preferences(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    local_names: Mapping[str, str] | None = None,
    conversational: bool = False,
    max_rows: int | None = None,
    keep_ties: bool = False,
) -> Loaded[PreferenceRow]:
    """Loads comparisons from a file, a folder or the hub.

    Columns: `prompt`, `chosen`, `rejected` (all strings, or all lists of messages); or `chosen` and
    `rejected` that begin with the same prompt; or AlpacaFarm's `instruction`, `input`, `output_1`,
    `output_2`, `preference`. Optional: `margin`, a finite number or null; `weight`, a finite number
    of at least 0 or null, for 1; `tie`, true or false.

    Args:
        source: A file, a folder, or a name; see `resolve_source`.
        data_dir: Where names are looked up first; the environment's TRUEWARD_DATA if None.
        local_names: What a source is called under `data_dir`.
        conversational: Make string rows into one user turn and one assistant turn.
        max_rows: Stop once this many rows are kept.
        keep_ties: Keep rows without a meaningful order, with `extra["tie"] = True`.

    Returns:
        The usable rows, and a report of all rows read.
    """

    def convert(record: dict[str, Any], where: str, notes: Notes) -> PreferenceRow:
        return _preference(record, where, notes, conversational, keep_ties)

    wanted = (
        "'prompt', 'chosen' and 'rejected', or 'chosen' and 'rejected' with the prompt inside "
        "both, or 'instruction', 'output_1', 'output_2' and 'preference'"
    )
    return _load(source, data_dir, local_names, max_rows, convert, _preference_parts, wanted)


def load_prompts(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    local_names: Mapping[str, str] | None = None,
    conversational: bool = False,
    max_rows: int | None = None,
) -> Loaded[PromptRow]:
    """Loads the prompts of prompt, preference or demonstration rows, each prompt once.

    The answers are left out; other columns go to `extra`. Arguments as in `load_preferences`.
    """

    def convert(record: dict[str, Any], where: str, _: Notes) -> PromptRow:
        return _prompt(record, where, conversational)

    wanted = "'prompt', 'messages', 'instruction', or 'chosen' and 'rejected'"
    return _load(source, data_dir, local_names, max_rows, convert, _prompt_parts, wanted)


def load_demonstrations(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    local_names: Mapping[str, str] | None = None,
    conversational: bool = False,
    max_rows: int | None = None,
) -> Loaded[DemonstrationRow]:
    """Loads prompts with the answer to imitate.

    Columns: `prompt` and `completion`; or `messages`, whose last assistant turn is the completion;
    or Alpaca's `instruction`, `input`, `output`. Arguments as in `load_preferences`.
    """

    def convert(record: dict[str, Any], where: str, notes: Notes) -> DemonstrationRow:
        return _demonstration(record, where, notes, conversational)

    wanted = "'prompt' and 'completion', or 'messages', or 'instruction' and 'output'"
    return _load(source, data_dir, local_names, max_rows, convert, _demonstration_parts, wanted)


class _UnusableRowError(Exception):
    """Raised while a row is converted, caught where rows are counted."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


def _load(
    source: str | Path,
    data_dir: str | Path | None,
    local_names: Mapping[str, str] | None,
    max_rows: int | None,
    convert: Callable[[dict[str, Any], str, Notes], T],
    parts: Callable[[T], list[Prompt]],
    wanted: str,
) -> Loaded[T]:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1 (or None for all rows), got {max_rows}.")
    rows: list[T] = []
    report = LoadReport(str(source))
    first_seen: dict[bytes, str] = {}
    for name, records in record_streams(
        resolve_source(source, data_dir=data_dir, local_names=local_names)
    ):
        columns: dict[str, None] = {}
        read_before, problems_before = report.read, len(report.problems)
        for where, record in records:
            report.read += 1
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
            notes: Notes = []
            try:
                row = convert(_as_record(record), where, notes)
                _refuse_duplicate(parts(row), where, first_seen)
            except _UnusableRowError as problem:
                report.add(problem.kind, where, problem.detail)
                continue
            for kind, detail in notes:
                report.add(kind, where, detail, kept=True)
            rows.append(row)
            if len(rows) == max_rows:
                report.source += f" (as far as usable row {max_rows:,})"
                return Loaded(rows, report)
        if report.read == read_before:
            raise DataError(f"{name} is empty: it holds no rows.")
        missing = [p for p in report.problems[problems_before:] if p.kind == "missing column"]
        if len(missing) == report.read - read_before:
            found = ", ".join(map(repr, columns)) or "none"
            raise DataError(f"the columns of {name} do not fit: found {found}; wanted {wanted}.")
    if not rows:
        raise DataError(f"no row can be used of {report.summary()}")
    if report.problems:
        logger.info("%s", report.summary())
    return Loaded(rows, report)


def _as_record(value: object) -> dict[str, Any]:
    if isinstance(value, BrokenRecord):
        raise _UnusableRowError(value.kind, value.detail)
    if not isinstance(value, dict):
        raise _UnusableRowError("not an object", f"{json_type(value)}, not an object")
    return value


def _refuse_duplicate(parts: list[Prompt], where: str, first_seen: dict[bytes, str]) -> None:
    key = hashlib.blake2b(canonical(parts).encode(), digest_size=16).digest()
    first = first_seen.setdefault(key, where)
    if first != where:
        raise _UnusableRowError("duplicate", f"the same as {first}")


def _preference_parts(row: PreferenceRow) -> list[Prompt]:
    return [row.prompt, row.chosen, row.rejected]


def _prompt_parts(row: PromptRow) -> list[Prompt]:
    return [row.prompt]


def _demonstration_parts(row: DemonstrationRow) -> list[Prompt]:
    return [row.prompt, row.completion]


_PAIR_COLUMNS = {"prompt", "chosen", "rejected", "margin", "tie"}
_WEIGHT = "weight"  # of a pair; a prompt keeps a column of this name
_ALPACA_FARM_COLUMNS = {"instruction", "input", "output_1", "output_2", "preference"}
_ANSWER_COLUMNS = {"completion", "messages", "output"}


def _preference(
    record: dict[str, Any], where: str, notes: Notes, conversational: bool, keep_ties: bool
) -> PreferenceRow:
    if "output_1" in record and "chosen" not in record:
        record = _from_alpaca_farm(record)
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    prompt = _text(record, "prompt") if record.get("prompt") is not None else None
    margin, tie = _margin(record.get("margin")), _tie(record.get("tie"))
    weight = _weight(record.get(_WEIGHT))
    _refuse_mixed({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if tie and not keep_ties:
        raise _UnusableRowError("tie", "marked as a tie")
    _refuse_empty({"chosen": chosen, "rejected": rejected})
    if chosen == rejected:
        raise _UnusableRowError("identical sides", "'chosen' and 'rejected' are the same")
    if prompt is None:
        prompt, chosen, rejected = _split_common_prompt(chosen, rejected)
        if conversational and isinstance(chosen, str) and isinstance(rejected, str):
            # The space that parted answer from prompt; a chat template brings its own.
            chosen, rejected = chosen.lstrip(), rejected.lstrip()
    elif _repeats_prompt(prompt, chosen) and _repeats_prompt(prompt, rejected):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        notes.append(("repeated prompt", "both sides begin with the prompt's messages again"))
        _refuse_empty({"chosen": chosen, "rejected": rejected})
    _refuse_empty_prompt(prompt)
    if conversational:
        prompt = as_turn(prompt, "user")
        chosen, rejected = as_turn(chosen, "assistant"), as_turn(rejected, "assistant")
    extra = _others(record, {*_PAIR_COLUMNS, _WEIGHT}) | ({"tie": True} if tie else {})
    return PreferenceRow(prompt, chosen, rejected, margin, where, extra, weight)


def _prompt(record: dict[str, Any], where: str, conversational: bool) -> PromptRow:
    used = _PAIR_COLUMNS | _ANSWER_COLUMNS
    if record.get("prompt") is not None:
        prompt = _text(record, "prompt")
    elif record.get("messages") is not None:
        messages = _messages(record)
        ends_with_answer = bool(messages) and messages[-1]["role"] == "assistant"
        prompt = messages[:-1] if ends_with_answer else messages
    elif record.get("instruction") is not None:
        used = used | _ALPACA_FARM_COLUMNS
        prompt = _instruction(record)
    elif record.get("chosen") is not None:
        pair = _preference(record, where, [], conversational=False, keep_ties=True)
        prompt = pair.prompt
    else:
        raise _UnusableRowError("missing column", _absent(record, "prompt"))
    _refuse_empty_prompt(prompt)
    if conversational:
        prompt = as_turn(prompt, "user")
    return PromptRow(prompt, where, _others(record, used))


def _demonstration(
    record: dict[str, Any], where: str, notes: Notes, conversational: bool
) -> DemonstrationRow:
    prompt: Prompt
    completion: Completion
    if record.get("completion") is not None:
        used = {"prompt", "completion"}
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        _refuse_mixed({"prompt": prompt, "completion": completion})
        if _repeats_prompt(prompt, completion):
            completion = completion[len(prompt) :]
            notes.append(("repeated prompt", "'completion' begins with the prompt's messages"))
    elif record.get("messages") is not None:
        used = {"prompt", "messages"}
        messages = _messages(record)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise _UnusableRowError("no answer", "'messages' has no assistant turn")
        prompt, completion = messages[: answers[-1]], messages[answers[-1] : answers[-1] + 1]
        if answers[-1] + 1 < len(messages):
            notes.append(("trailing turns", "'messages' goes on after the last assistant turn"))
    elif record.get("instruction") is not None:
        used = {"instruction", "input", "output"}
        prompt, completion = _instruction(record), _string(record, "output")
    else:
        raise _UnusableRowError("missing column", _absent(record, "completion"))
    _refuse_empty_prompt(prompt)
    _refuse_empty({"completion": completion})
    if conversational:
        prompt, completion = as_turn(prompt, "user"), as_turn(completion, "assistant")
    return DemonstrationRow(prompt, completion, where, _others(record, used))


def _from_alpaca_farm(record: dict[str, Any]) -> dict[str, Any]:
    """AlpacaFarm's columns as `prompt`, `chosen`, `rejected`.

    AlpacaEval writes a draw as 0 or 1.5 in the same column: those become ties.
    """
    outputs = [_string(record, "output_1"), _string(record, "output_2")]
    preference = record.get("preference")
    if "preference" not in record:
        raise _UnusableRowError("missing column", _absent(record, "preference"))
    if isinstance(preference, bool) or preference not in (0, 1, 1.5, 2):
        raise _UnusableRowError("bad value", f"'preference' must be 1 or 2, got {preference!r}")
    chosen, rejected = reversed(outputs) if preference == 2 else outputs
    sides = {"prompt": _instruction(record), "chosen": chosen, "rejected": rejected}
    ties = {"tie": True} if preference in (0, 1.5) else {}
    return _others(record, _ALPACA_FARM_COLUMNS) | sides | ties


def _instruction(record: dict[str, Any]) -> str:
    """Alpaca's instruction, with its input below where there is one."""
    instruction = _string(record, "instruction")
    context = _string(record, "input") if record.get("input") is not None else ""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _split_common_prompt(
    chosen: Completion, rejected: Completion
) -> tuple[Prompt, Completion, Completion]:
    """Parts the prompt that both sides begin with from the answers that differ.

    Messages are compared whole. Strings, as TRL's `extract_prompt` does it, are cut where they
    first differ, but at a word's edge: the space goes with the answers, a line's end with the
    prompt. A side that is the whole beginning of the other has no answer of its own.
    """
    common = _common_length(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        tails = chosen[common:], rejected[common:]
        # Both go on with white space: the beginnings end with a whole word.
        if not all(tail[:1].isspace() for tail in tails):
            for name, tail, other in (("chosen", *tails), ("rejected", *reversed(tails))):
                at_edge = other[:1].isspace() or chosen[common - 1 : common].isspace()
                if at_edge and not tail.strip():
                    detail = f"'{name}' has nothing after the beginning that both sides share"
                    raise _UnusableRowError("empty side", detail)
            common = max((m.start() + 1 for m in re.finditer(r"\s", chosen[:common])), default=0)
            if chosen[common - 1 : common] == " ":
                common -= 1
    _refuse_empty({"chosen": chosen[common:], "rejected": rejected[common:]})
    return chosen[:common], chosen[common:], rejected[common:]


def _common_length(first: Completion, second: Completion) -> int:
    """How many leading characters (of strings) or messages (of lists) are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _repeats_prompt(prompt: Prompt, completion: Completion) -> bool:
    """Whether a list of messages starts with all of the prompt's; strings may by accident."""
    return isinstance(prompt, list) and completion[: len(prompt)] == prompt


def _text(record: dict[str, Any], column: str) -> Prompt:
    """A column that must hold a string or a list of messages."""
    value = record.get(column)
    if value is None:
        raise _UnusableRowError("missing column", _absent(record, column))
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        detail = f"'{column}' must be a string or a list of messages, got {json_type(value)}"
        raise _UnusableRowError("wrong type", detail)
    for number, message in enumerate(value, 1):
        _check_message(message, f"message {number} of '{column}'")
    return value


def _check_message(message: object, name: str) -> None:
    """A role, and content: a string, a list of parts, or a tool call in its place."""
    if not isinstance(message, dict):
        raise _UnusableRowError("wrong type", f"{name} is {json_type(message)}, not an object")
    if not isinstance(message.get("role"), str):
        raise _UnusableRowError("wrong type", f"{name} has no 'role' that is a string")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise _UnusableRowError("wrong type", f"{name} has no 'content'")
    if content is not None and not isinstance(content, str | list):
        detail = f"the content of {name} must be a string or a list, got {json_type(content)}"
        raise _UnusableRowError("wrong type", detail)


def _messages(record: dict[str, Any]) -> list[Message]:
    value = _text(record, "messages")
    if isinstance(value, str):
        raise _UnusableRowError("wrong type", "'messages' must be a list of messages, got a string")
    return value


def _string(record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        raise _UnusableRowError("missing column", _absent(record, column))
    if not isinstance(value, str):
        detail = f"'{column}' must be a string, got {json_type(value)}"
        raise _UnusableRowError("wrong type", detail)
    return value


def _margin(value: object) -> float | None:
    if value is None:
        return None
    margin = _number(value)
    if margin is not None:
        return margin
    detail = f"'margin' must be a finite number or null, got {str(value)[:40]!r}"
    raise _UnusableRowError("bad value", detail)


def _weight(value: object) -> float:
    weight = 1.0 if value is None else _number(value)
    if weight is not None and weight >= 0:
        return weight
    detail = f"'weight' must be a finite number of at least 0 or null, got {str(value)[:40]!r}"
    raise _UnusableRowError("bad value", detail)


def _number(value: object) -> float | None:
    """Return a finite number as a float, None for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _tie(value: object) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _UnusableRowError("bad value", f"'tie' must be true or false, got {str(value)[:40]!r}")


def _refuse_mixed(columns: dict[str, Prompt | None]) -> None:
    strings = [repr(name) for name, value in columns.items() if isinstance(value, str)]
    lists = [repr(name) for name, value in columns.items() if isinstance(value, list)]
    if strings and lists:
        detail = (
            f"{' and '.join(strings)} as a string but {' and '.join(lists)} as messages; "
            "a row must keep to one form"
        )
        raise _UnusableRowError("wrong type", detail)


def _refuse_empty(sides: dict[str, Completion]) -> None:
    for name, side in sides.items():
        if is_empty(side):
            raise _UnusableRowError("empty side", f"'{name}' is empty")


def _refuse_empty_prompt(prompt: Prompt) -> None:
    if is_empty(prompt):
        raise _UnusableRowError("empty prompt", "the prompt is empty")


def _others(record: dict[str, Any], used: set[str]) -> dict[str, Any]:
    return {column: value for column, value in record.items() if column not in used}


def _absent(record: dict[str, Any], column: str) -> str:
    return f"'{column}' is null" if column in record else f"there is no '{column}'"
