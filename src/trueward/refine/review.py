"""People as the last word: doubtful pairs go out to a table, and answers come back from it.

The table opens in a spreadsheet. It shows the two completions of a pair in random order and says
nothing of label, confidence or rewards, so that people judge the texts. A pair is known again by
its id alone, a hash of what was shown in this order: rows and columns may be sorted, texts may be
cut or reformatted by the spreadsheet, and several tables may be put together.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trueward.data.formats import DataError, PreferenceRow, read_jsonl, text_of, write_jsonl
from trueward.evaluate.calibration import mean_ranks
from trueward.evaluate.preferences import wilson_interval
from trueward.evaluate.verdicts import Measured
from trueward.refine.gates import (
    LABELLED_BY,
    PEOPLE,
    by_people,
    margin_of,
    number_of,
    pair_key,
)
from trueward.train.run_folder import write_text

COLUMNS = ("id", "prompt", "completion_1", "completion_2", "answer")
_ANSWERS = {"1": "1", "1.0": "1", "2": "2", "2.0": "2", "tie": "tie", "drop": "drop"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class UnknownAnswer:
    """An answer about a pair that is not among the rows."""

    where: str  # file and line
    id: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class ReviewResult:
    """What became of every row, each list in the rows' order.

    `rows` are those to train on: confirmed, relabelled and unanswered.
    """

    rows: list[PreferenceRow]
    confirmed: list[PreferenceRow]  # people gave the label that it had
    relabelled: list[PreferenceRow]  # people gave the other one: the sides have changed places
    ties: list[PreferenceRow]  # with extra["tie"], which `load_preferences` leaves out
    dropped: list[PreferenceRow]
    unanswered: list[PreferenceRow]  # shown or not; as they were
    unknown: list[UnknownAnswer] = field(default_factory=list)

    @property
    def agreement(self) -> Measured | None:
        """How often people gave the label that a pair had, ties at half; None without answers.

        Pairs shown are the doubtful ones, so it is likely no more than what the others deserve.
        """
        right = len(self.confirmed) + len(self.ties) / 2
        asked = len(self.confirmed) + len(self.relabelled) + len(self.ties)
        if not asked:
            return None
        low, high = wilson_interval(right, asked)
        return Measured(value=right / asked, low=low, high=high)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows there are of each kind."""
        kinds = ("confirmed", "relabelled", "ties", "dropped", "unanswered", "unknown")
        return {kind: len(getattr(self, kind)) for kind in kinds}


def doubtful_pairs(
    rows: Sequence[PreferenceRow], *, limit: int, gate: float = 0.5
) -> list[PreferenceRow]:
    """Return the pairs whose labels are least certain, the most doubtful first.

    Each pair has up to two ranks among those that know the number: of `|chosen_reward -
    rejected_reward|`, the smallest first, and of `|confidence - gate|`, the nearest first. It goes
    by their mean as shares of the ranks, or by the one that it has; pairs with neither come last.
    Equals come in the order of their ids. Equal pairs are taken once, those that people labelled
    not at all.

    Args:
        rows: The pairs.
        limit: How many at most.
        gate: The confidence at which pairs are kept or dropped.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1 pair, got {limit}.")
    known = {pair_key(row) for row in rows if by_people(row)}
    fresh = list({pair_key(row): row for row in reversed(rows)}.values())[::-1]
    fresh = [row for row in fresh if pair_key(row) not in known]
    distances = [number_of(row, "confidence") for row in fresh]
    signals = (
        [None if (margin := margin_of(row)) is None else abs(margin) for row in fresh],
        [None if d is None else abs(d - gate) for d in distances],
    )
    ranks = [_rank_shares(signal) for signal in signals]
    doubts = []
    for own in zip(*ranks, strict=True):
        held = [share for share in own if share is not None]
        doubts.append(math.fsum(held) / len(held) if held else math.inf)
    order = sorted(range(len(fresh)), key=lambda i: (doubts[i], review_id(fresh[i])))
    return [fresh[i] for i in order[:limit]]


def _rank_shares(values: Sequence[float | None]) -> list[float | None]:
    """Return each number's rank, smallest first, as a share of how many there are; equals share."""
    held = [round(value, 9) for value in values if value is not None]  # 0.6 - 0.5 is 0.5 - 0.4
    if not held:
        return [None] * len(values)
    ranks = iter((mean_ranks(torch.tensor(held, dtype=torch.float64)) / len(held)).tolist())
    return [None if value is None else next(ranks) for value in values]


def review_id(row: PreferenceRow, *, turned: bool = False) -> str:
    """Return the id under which a pair is shown: of the prompt, the first and the second text.

    Args:
        row: The pair.
        turned: Whether the rejected side is shown first.
    """
    prompt, chosen, rejected = pair_key(row)
    sides = [rejected, chosen] if turned else [chosen, rejected]
    return hashlib.sha256(json.dumps([prompt, *sides]).encode()).hexdigest()[:20]


def export_for_review(
    rows: Sequence[PreferenceRow],
    path: str | Path,
    *,
    limit: int,
    seed: int,
    gate: float = 0.5,
) -> int:
    """Write the most doubtful pairs to a table that people fill in; return how many.

    Columns: `id`, `prompt`, `completion_1`, `completion_2`, and `answer`: 1 or 2 for the better
    completion, `tie`, `drop` for a pair to throw away, or nothing. Which side is shown first hangs
    on the seed and the pair. In a CSV, a text that a spreadsheet would take for a formula has an
    apostrophe before it.

    Args:
        rows: The pairs; `doubtful_pairs` says which are taken, and in which order.
        path: A `.csv` (opens in a spreadsheet) or a `.jsonl` file.
        limit: How many pairs at most.
        seed: Of the order in which the two sides are shown.
        gate: The confidence at which pairs are kept or dropped.

    Raises:
        DataError: The file is there and holds answers, or has another ending.
    """
    target = _require_table(path)
    if target.exists() and any(answer for _, _, answer in _answers(target)):
        raise DataError(
            f"{target} holds answers: read them in first, and write to another file, or remove it."
        )
    shown = []
    for row in doubtful_pairs(rows, limit=limit, gate=gate):
        turned = _is_turned(row, seed)
        first, second = (row.rejected, row.chosen) if turned else (row.chosen, row.rejected)
        texts = [text_of(text) for text in (row.prompt, first, second)]
        shown.append(dict(zip(COLUMNS, [review_id(row, turned=turned), *texts, ""], strict=True)))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".jsonl":
        write_jsonl(target, shown)
        return len(shown)
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in shown:
        writer.writerow({name: _as_text(cell) for name, cell in line.items()})
    write_text(target, "\ufeff" + table.getvalue())  # a spreadsheet takes it for UTF-8 by the mark
    return len(shown)


def import_reviews(path: str | Path, rows: Sequence[PreferenceRow]) -> ReviewResult:
    """Read people's answers and give them to the rows that they are about, wherever these stand.

    A label that people gave is marked as theirs (`extra["labelled_by"] = "people"`), and so holds
    for gates. Where they preferred the rejected side, the sides change places, the columns of the
    sides (`chosen_reward`, ...) with them; `confidence` and margin spoke for the other label and
    become None.

    Args:
        path: A table from `export_for_review`, sorted, cut or added to as one likes: its columns
            `id` and `answer` are read, separated by commas, semicolons or tabs.
        rows: The rows that pairs were taken from, in any order, with others or without some.

    Raises:
        DataError: The table cannot be read, an answer is none, or one pair has several; the
            message names file and line.
    """
    given: dict[str, tuple[str, str]] = {}  # id -> (answer, where)
    for where, shown_id, answer in _answers(_require_table(path)):
        if not answer:
            continue
        before = given.setdefault(shown_id, (answer, where))
        if before[0] != answer:
            raise DataError(
                f"{where}: the pair {shown_id} is answered with {answer!r} here and with "
                f"{before[0]!r} at {before[1]}: leave one of them."
            )
    lists: dict[str, list[PreferenceRow]] = {
        kind: [] for kind in ("rows", "confirmed", "relabelled", "ties", "dropped", "unanswered")
    }
    used: set[str] = set()
    for row in rows:
        ids = review_id(row), review_id(row, turned=True)
        used.update(ids)
        kind, answered = _answered(row, _verdict(ids, given))
        lists[kind].append(answered)
        if kind not in ("ties", "dropped"):
            lists["rows"].append(answered)
    unknown = [UnknownAnswer(w, i, a) for i, (a, w) in given.items() if i not in used]
    return ReviewResult(**lists, unknown=unknown)


def _verdict(ids: tuple[str, str], given: dict[str, tuple[str, str]]) -> str:
    """Return `chosen`, `rejected`, `tie`, `drop` or nothing, however the pair was shown."""
    words = ({"1": "chosen", "2": "rejected"}, {"1": "rejected", "2": "chosen"})
    said = []
    for shown, word in zip(ids, words, strict=True):
        if shown in given:
            answer, where = given[shown]
            said.append((word.get(answer, answer), where))
    if len(said) == 2 and said[0][0] != said[1][0]:
        raise DataError(
            f"{said[1][1]}: this pair has another answer at {said[0][1]}, where it is shown in the "
            "other order: leave one of them."
        )
    return said[0][0] if said else ""


def _answered(row: PreferenceRow, verdict: str) -> tuple[str, PreferenceRow]:
    """Return the list that a row belongs to by people's verdict, and the row as it is then."""
    if not verdict:
        return "unanswered", row
    labelled = replace(row, extra=row.extra | {LABELLED_BY: PEOPLE})
    if verdict == "chosen":
        return "confirmed", labelled
    if verdict == "tie":
        return "ties", replace(labelled, extra=labelled.extra | {"tie": True})
    if verdict == "drop":
        return "dropped", labelled
    extra = {_other_side(name): value for name, value in labelled.extra.items()}
    if "confidence" in extra:
        extra["confidence"] = None
    return "relabelled", replace(
        labelled, chosen=row.rejected, rejected=row.chosen, margin=None, extra=extra
    )


def _other_side(name: str) -> str:
    """Return `rejected_reward` for `chosen_reward`, and so on; other columns stay."""
    for one, other in (("chosen_", "rejected_"), ("rejected_", "chosen_")):
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def _is_turned(row: PreferenceRow, seed: int) -> bool:
    prompt, *sides = pair_key(row)
    digest = hashlib.sha256(json.dumps([seed, prompt, *sorted(sides)]).encode()).digest()
    # By the texts, not by the label: the same pair is shown in one way whatever its label is.
    return bool(digest[0] % 2) != (sides[0] > sides[1])


def _as_text(cell: str) -> str:
    """Keep a spreadsheet from reading a text as a formula; only `id` and `answer` are read back."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


# --- reading ---


def _require_table(path: str | Path) -> Path:
    found = Path(path)
    if found.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path} must be a .csv or a .jsonl file: name it so.")
    return found


def _answers(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield where each line stands, its id and its answer in one form."""
    records = _jsonl_records(path) if path.suffix == ".jsonl" else _csv_records(path)
    for line, record in records:
        where = f"{path}:{line}"
        shown_id = str(record.get("id") or "").strip()
        answer = str("" if record.get("answer") is None else record["answer"]).strip().casefold()
        if answer and answer not in _ANSWERS:
            raise DataError(
                f"{where}: an answer must be 1, 2, tie or drop, or empty, got {answer[:40]!r}."
            )
        if not shown_id and answer:
            raise DataError(f"{where}: an answer without an id, so nobody knows about which pair.")
        if shown_id:
            yield where, shown_id, _ANSWERS[answer] if answer else ""


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, record in read_jsonl(path):
        if not {"id", "answer"} <= set(record):
            raise DataError(f"{path}:{line} needs 'id' and 'answer', has {', '.join(record)}.")
        yield line, record


def _csv_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the records with the number of the line on which each begins."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: save it as CSV UTF-8.") from error
    head = text.partition("\n")[0]
    # A spreadsheet separates by what its language has no other use for.
    separator = max(",;\t", key=head.count)
    begins, lines = 1, []
    limit = csv.field_size_limit(max(len(text), 1))  # completions may be longer than its own
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        for cells in reader:
            lines.append((begins, cells))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{begins} is broken CSV ({error}): save it as CSV again."
        ) from error
    finally:
        csv.field_size_limit(limit)
    names = [cell.strip() for cell in lines[0][1]] if lines else []
    if not {"id", "answer"} <= set(names):
        found = ", ".join(names) or "nothing"
        raise DataError(f"{path}:1 must name the columns id and answer, has {found}.")
    return [(n, dict(zip(names, cells, strict=False))) for n, cells in lines[1:] if any(cells)]
