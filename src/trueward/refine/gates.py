"""Which preferences to train on: gates that say what they drop, and lengths brought into balance.

Beside them is what everything about a set of pairs shares: what stands in a row, and how a judge is
asked about it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from trueward.data.formats import (
    Completion,
    DataError,
    PreferenceRow,
    prompt_key,
    text_of,
)
from trueward.data.rows import as_turn, canonical
from trueward.evaluate.judges import Judge
from trueward.train.loop import permutation

LABELLED_BY, PEOPLE = "labelled_by", "people"  # in `extra`, where a person gave the label


class Reason(StrEnum):
    """Why a pair was dropped."""

    NO_CONFIDENCE = "no confidence"  # where one is asked for; so with the other two
    LOW_CONFIDENCE = "low confidence"
    NO_MARGIN = "no margin"
    SMALL_MARGIN = "small margin"
    LENGTH_RATIO = "length ratio"
    NO_JUDGEMENT = "no judgement"
    JUDGED_WRONG = "low judge probability"
    CONTRADICTION = "contradiction"
    DUPLICATE = "duplicate"
    LENGTH_BALANCE = "length balance"  # a fine pair without a partner of the other sign
    PEOPLE_TIE = "a tie to people"
    PEOPLE_DROP = "dropped by people"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a pair must have to be kept; rows that people labelled pass all but the last two."""

    min_confidence: float = 0.0  # inclusive; 0 = off
    min_margin: float | None = None  # inclusive, of chosen_reward - rejected_reward; None = off
    max_length_ratio: float = 0.0  # of the longer side to the shorter, in characters; 0 = off
    min_judge_probability: float = 0.0  # inclusive, that the chosen side is better; 0 = off
    drop_contradictions: bool = True  # texts in both orders: all pairs of them go
    drop_duplicates: bool = True  # of equal pairs the first is kept

    def __post_init__(self) -> None:
        for name in ("min_confidence", "min_judge_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        if self.min_margin is not None and not math.isfinite(self.min_margin):
            raise ValueError(f"min_margin must be a finite number, got {self.min_margin}.")
        if self.max_length_ratio and not self.max_length_ratio >= 1:
            raise ValueError(
                "max_length_ratio is the longer side over the shorter, so at least 1 (or 0, for "
                f"any), got {self.max_length_ratio}."
            )


class Dropped(NamedTuple):
    """A pair that was dropped, and why."""

    row: PreferenceRow
    reason: Reason


@dataclass(frozen=True)
class GateResult:
    """Every pair on one of two sides, each in the order in which they came in."""

    kept: list[PreferenceRow]
    dropped: list[Dropped]

    @property
    def counts(self) -> dict[str, int]:
        """How many were dropped, by reason."""
        counts = Counter(reason for _, reason in self.dropped)
        return {reason.value: counts[reason] for reason in Reason if counts[reason]}


def apply_gates(
    rows: Sequence[PreferenceRow], config: GateConfig, judge: Judge | None = None
) -> GateResult:
    """Keep the pairs that pass, and say of every other the first gate that it failed.

    Gates come in the order of `GateConfig`. So the judge, which may cost money, is asked about
    pairs alone that passed those before it, and contradictions and duplicates are looked for among
    pairs that passed it: the wrong one of two orders may be gone by then. Where people labelled one
    of two equal or contrary pairs, theirs stays; contrary labels of people all go.

    Args:
        rows: The pairs.
        config: The gates.
        judge: One that had no part in the labels, for `min_judge_probability`. Its answer is kept
            as `extra["judge_probability"]`.

    Raises:
        ValueError: A judge is needed and there is none.
        DataError: A row's confidence or reward is no number.
    """
    if config.min_judge_probability and judge is None:
        raise ValueError("min_judge_probability needs a judge: give one, or leave it at 0.")
    reasons: dict[int, Reason] = {}
    for i, row in enumerate(rows):
        reason = None if by_people(row) else _failed_gate(row, config)
        if reason is not None:
            reasons[i] = reason
    judged = list(rows)
    if config.min_judge_probability and judge is not None:
        asked = [i for i in _left(rows, reasons) if not by_people(rows[i])]
        found = judge_probabilities([rows[i] for i in asked], judge)
        for i, probability in zip(asked, found, strict=True):
            judged[i] = _with_extra(rows[i], judge_probability=probability)
            if probability is None:
                reasons[i] = Reason.NO_JUDGEMENT
            elif probability < config.min_judge_probability:
                reasons[i] = Reason.JUDGED_WRONG
    if config.drop_contradictions:
        left = _left(rows, reasons)
        reasons |= dict.fromkeys(_contradictions(rows, left), Reason.CONTRADICTION)
    if config.drop_duplicates:
        left = _left(rows, reasons)
        reasons |= dict.fromkeys(_duplicates(rows, left), Reason.DUPLICATE)
    return _result(judged, reasons)


def length_balanced(
    rows: Sequence[PreferenceRow], seed: int = 0, *, bin_width: float = 0.25
) -> GateResult:
    """Keep a subset in which the chosen side is as often longer as shorter, by as much.

    Pairs are put into bins of `|log(chosen length / rejected length)|`, and of each bin as many
    are kept of one sign as of the other, those that people labelled before others and else drawn
    by the seed; pairs of equal lengths all stay. So length says nothing about the label any more,
    at the price of the pairs without a partner; of the rows' weights nothing is read.

    Args:
        rows: The pairs.
        seed: Of the draw.
        bin_width: Of a bin; 0.25 holds ratios that differ by a factor of 1.28.
    """
    if not bin_width > 0:
        raise ValueError(f"bin_width must be above 0, got {bin_width}.")
    bins: dict[int, tuple[list[int], list[int]]] = {}
    for i, row in enumerate(rows):
        ratio = log_length_ratio(row)
        if ratio:
            bins.setdefault(int(abs(ratio) / bin_width), ([], []))[ratio < 0].append(i)
    reasons: dict[int, Reason] = {}
    for place, sides in bins.items():
        keep = min(map(len, sides))
        for sign, members in enumerate(sides):
            drawn = [members[k] for k in permutation(len(members), seed, "balance", place, sign)]
            drawn.sort(key=lambda i: not by_people(rows[i]))  # theirs stay before others
            reasons |= dict.fromkeys(drawn[keep:], Reason.LENGTH_BALANCE)
    return _result(rows, reasons)


def length_balanced_weights(
    rows: Sequence[PreferenceRow], *, max_weight: float = 10.0
) -> list[float]:
    """Return weights by which the chosen side is longer in half of the pairs, and none is dropped.

    `(P + M) / (2 P)` where it is longer, `(P + M) / (2 M)` where it is shorter, 1 where both sides
    are equally long, with P and M the weights that the longer and the shorter ones have; times the
    row's own weight. The mean weight stays what it is (1 for rows without weights). Pairs of
    opposite sign are not matched by how much they differ: `length_balanced` does that.

    Args:
        rows: The pairs.
        max_weight: Largest factor. Where the rare sign would need a larger one (it has less than
            1 / (2 max_weight) of the weight) it gets this, the other sign what keeps the mean, and
            the share stays away from a half. A sign that is not there at all leaves all at 1.
    """
    if not max_weight >= 1:
        raise ValueError(f"max_weight must be at least 1, got {max_weight}.")
    ratios = [log_length_ratio(row) for row in rows]
    pairs = list(zip(rows, ratios, strict=True))
    longer = math.fsum(row.weight for row, ratio in pairs if ratio > 0)
    shorter = math.fsum(row.weight for row, ratio in pairs if ratio < 0)
    if not longer or not shorter:
        return [row.weight for row in rows]
    rare = min(longer, shorter)
    common = max(longer, shorter)
    rare_factor = min(max_weight, (longer + shorter) / (2 * rare))
    common_factor = (longer + shorter - rare_factor * rare) / common
    up, down = (rare_factor, common_factor) if longer <= shorter else (common_factor, rare_factor)
    return [row.weight * (up if x > 0 else down if x < 0 else 1.0) for row, x in pairs]


# --- what rows hold ---


def number_of(row: PreferenceRow, name: str) -> float | None:
    """Return a number of `extra`, None where it is absent or null.

    Raises:
        DataError: It is something else, or not finite.
    """
    value = row.extra.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{row.where or 'A row'}: '{name}' must be a finite number or null, got "
            f"{str(value)[:40]!r}: mend it, or call the column something else."
        )
    return float(value)


def margin_of(row: PreferenceRow) -> float | None:
    """Return the chosen reward less the rejected one, None where a row lacks one of them."""
    chosen, rejected = number_of(row, "chosen_reward"), number_of(row, "rejected_reward")
    return None if chosen is None or rejected is None else chosen - rejected


def lengths_of(row: PreferenceRow) -> tuple[int, int]:
    """Return the characters of the chosen and the rejected side, at least 1 each."""
    return max(1, len(text_of(row.chosen))), max(1, len(text_of(row.rejected)))


def pair_key(row: PreferenceRow) -> tuple[str, str, str]:
    """Return (prompt, chosen, rejected), each equal for equal ones, as strings or as messages."""
    return prompt_key(row.prompt), text_key(row.chosen), text_key(row.rejected)


def text_key(completion: Completion) -> str:
    """Return the canonical form of a completion; a string is one message of the assistant."""
    return canonical(as_turn(completion, "assistant"))


def judge_probabilities(rows: Sequence[PreferenceRow], judge: Judge) -> list[float | None]:
    """Return the judge's probability that the chosen side is the better one; None where NaN.

    A judge that likes the first place must not pass for one that agrees: which side is shown first
    hangs on a hash of the prompt and the two texts, so the sides take turns.
    """
    if not rows:
        return []
    turned = [_chosen_comes_second(row) for row in rows]
    first = [row.rejected if t else row.chosen for row, t in zip(rows, turned, strict=True)]
    second = [row.chosen if t else row.rejected for row, t in zip(rows, turned, strict=True)]
    found = judge([row.prompt for row in rows], first, second).detach().double().cpu()
    if found.shape != (len(rows),) or bool(((found < 0) | (found > 1)).any()):
        raise ValueError(
            f"the judge must give one probability in [0, 1] for each of {len(rows)} pairs, got "
            f"{found.tolist() if found.numel() < 5 else f'shape {tuple(found.shape)}'}."
        )
    return [
        None if math.isnan(p) else 1 - p if t else p
        for p, t in zip(found.tolist(), turned, strict=True)
    ]


def _chosen_comes_second(row: PreferenceRow) -> bool:
    prompt, chosen, rejected = pair_key(row)
    first, second = sorted((chosen, rejected))
    digest = hashlib.sha256("\n".join((prompt, first, second)).encode()).digest()
    return bool(digest[0] % 2) != (chosen == second)


def log_length_ratio(row: PreferenceRow) -> float:
    """Return `log(chosen length / rejected length)`: above 0 where the chosen side is longer."""
    chosen, rejected = lengths_of(row)
    return math.log(chosen / rejected)


def by_people(row: PreferenceRow) -> bool:
    """Tell whether a person gave the label."""
    return row.extra.get(LABELLED_BY) == PEOPLE


def record_of(row: PreferenceRow) -> dict[str, Any]:
    """Return a row as `load_preferences` reads it: TRL's columns, weight, margin and the others."""
    record: dict[str, Any] = {
        "prompt": row.prompt,
        "chosen": row.chosen,
        "rejected": row.rejected,
        "weight": row.weight,
    }
    if row.margin is not None:
        record["margin"] = row.margin
    return record | row.extra


# --- gates ---


def _failed_gate(row: PreferenceRow, config: GateConfig) -> Reason | None:
    """Return the first gate of a row's own numbers that it fails."""
    if config.min_confidence:
        confidence = number_of(row, "confidence")
        if confidence is None:
            return Reason.NO_CONFIDENCE
        if confidence < config.min_confidence - 1e-9:  # 0.1 * 3 is above 0.3
            return Reason.LOW_CONFIDENCE
    if config.min_margin is not None:
        margin = margin_of(row)
        if margin is None:
            return Reason.NO_MARGIN
        if margin < config.min_margin:
            return Reason.SMALL_MARGIN
    sides = lengths_of(row)
    if config.max_length_ratio and max(sides) > config.max_length_ratio * min(sides):
        return Reason.LENGTH_RATIO
    return None


def _contradictions(rows: Sequence[PreferenceRow], among: Iterable[int]) -> list[int]:
    """Return those whose texts stand there in the other order too; people have the last word."""
    places: dict[tuple[str, str, str], list[int]] = {}
    for i in among:
        places.setdefault(pair_key(rows[i]), []).append(i)
    found = []
    for (prompt, chosen, rejected), own in places.items():
        others = places.get((prompt, rejected, chosen), [])
        ours, theirs = (any(by_people(rows[i]) for i in some) for some in (own, others))
        if others and chosen != rejected and (theirs or not ours):
            found += own
    return found


def _duplicates(rows: Sequence[PreferenceRow], among: Iterable[int]) -> list[int]:
    """Return all but one of equal pairs: people's first label is kept, else the first one."""
    places: dict[tuple[str, str, str], list[int]] = {}
    for i in among:
        places.setdefault(pair_key(rows[i]), []).append(i)
    kept = {next((i for i in own if by_people(rows[i])), own[0]) for own in places.values()}
    return [i for own in places.values() for i in own if i not in kept]


def _left(rows: Sequence[PreferenceRow], reasons: dict[int, Reason]) -> list[int]:
    return [i for i in range(len(rows)) if i not in reasons]


def _result(rows: Sequence[PreferenceRow], reasons: dict[int, Reason]) -> GateResult:
    return GateResult(
        kept=[row for i, row in enumerate(rows) if i not in reasons],
        dropped=[Dropped(row, reasons[i]) for i, row in enumerate(rows) if i in reasons],
    )


def _with_extra(row: PreferenceRow, **values: object) -> PreferenceRow:
    return replace(row, extra=row.extra | values)
