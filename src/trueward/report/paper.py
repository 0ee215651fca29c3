"""The tables of an evaluation as RLP's paper has them, and its own numbers beside ours.

Lang, Huang, Li, Fine-Tuning Language Models with Reward Learning on Policy, NAACL 2024
(https://arxiv.org/abs/2403.19279). Its judges are gone: text-davinci-003, against which every win
rate is counted, and AlpacaFarm's annotators (GPT-4-0314, gpt-3.5-turbo-0301, text-davinci-003) are
retired, and the reference's answers to LLMBar and Vicuna were never published. So its numbers
cannot be reproduced, and only directions can be compared: which method is ahead of which.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trueward.evaluate.multiple_choice import MultipleChoice, Retention
from trueward.evaluate.winrate import WinRate
from trueward.report.html import Table
from trueward.report.numbers import Cell, decimal

PaperTable = Literal["2", "4", "5", "8"]
Result = WinRate | float | int  # a number is a share between 0 and 1
UNVERIFIED = "[unverified]"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A table as the paper prints it; all numbers in per cent."""

    caption: str
    sets: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]  # by method, a number for each set
    baseline: str  # against whom directions are read
    unverified: frozenset[str] = frozenset()  # methods whose row could not be aligned for certain
    judged: bool = True  # by annotators that are retired
    note: str = ""


PUBLISHED: dict[PaperTable, Published] = {
    "2": Published(
        caption="Table 2: win rate in % against text-davinci-003",
        sets=("AlpacaFarm sim", "AlpacaFarm human", "LLMBar sim", "Vicuna sim"),
        rows={
            "GPT-4": (79.0, 69.8, 74.0, 85.0),
            "ChatGPT": (61.4, 52.9, 59.0, 63.7),
            "PPO": (46.8, 55.1, 47.5, 57.5),
            "Best-of-n": (45.0, 50.7, 43.4, 52.5),
            "SFT": (36.7, 44.3, 42.4, 50.0),
            "LLaMA-7B": (11.3, 6.5, 12.5, 12.8),
            "RLP-UML": (49.1, 56.5, 48.5, 61.3),
            "RLP-SPG": (50.2, 57.4, 50.5, 62.5),
        },
        baseline="PPO",
        note="AlpacaFarm's baselines are Dubois et al.'s, judged at another time; n of Best-of-n "
        "is not given. Of the paper's numbers the binomial standard error at 50 % is 1.8 points on "
        "AlpacaFarm (805 prompts), 5.0 on LLMBar (100) and 5.6 on Vicuna (80).",
    ),
    "4": Published(
        caption="Table 4: losses of RLP-UML, win rate in %",
        sets=("AlpacaFarm sim", "LLMBar sim"),
        rows={
            "InfoMax": (44.4, 46.5),
            "MVI": (48.1, 47.5),
            "CL": (48.2, 46.5),
            "RLP-UML": (49.1, 48.5),
        },
        baseline="RLP-UML",
        note="The binomial standard error at 50 % is 1.8 points on AlpacaFarm and 5.0 on LLMBar.",
    ),
    "5": Published(
        caption="Table 5: ways to make synthetic preferences, in %",
        sets=("preference accuracy", "AlpacaFarm sim"),
        rows={
            "RLAIF": (52.0, 46.0),
            "Reward": (56.0, 48.9),
            "Select-All": (55.0, 48.7),
            "RLP-SPG": (59.0, 50.2),
        },
        baseline="RLP-SPG",
        unverified=frozenset({"RLAIF", "Reward"}),
        note="Preference accuracy is agreement with AlpacaFarm's simulated annotator on the pairs "
        "made; of how many pairs is not given.",
    ),
    "8": Published(
        caption="Table 8: MMLU accuracy in % (InstructEval)",
        sets=("MMLU",),
        rows={
            "GPT-4": (86.4,),
            "ChatGPT": (70.0,),
            "PPO": (36.9,),
            "LLaMA-7B": (35.2,),
            "RLP-UML": (37.6,),
            "RLP-SPG": (37.3,),
        },
        baseline="PPO",
        unverified=frozenset({"GPT-4", "ChatGPT", "PPO", "LLaMA-7B", "RLP-UML", "RLP-SPG"}),
        judged=False,
        note="Ours has no examples before a question unless its query holds them, so the levels "
        "differ by that too.",
    ),
}


def paper_table(which: PaperTable, ours: Mapping[str, Mapping[str, Result]]) -> Table:
    """The paper's table with our numbers beside its own, all in per cent.

    A win rate has its standard error, and beside it the rate at equal lengths, which the paper does
    not have and without which a longer answer looks like a better one.

    Args:
        which: The number of the table.
        ours: By method, as the paper calls it or a name of our own, and by set: a win rate, or a
            share between 0 and 1.

    Raises:
        ValueError: A table or set that the paper does not have, or a number that is no share.
    """
    published = _published(which)
    for method, results in ours.items():
        for name, result in results.items():
            _require_set(name, published, which)
            _require_share(result, method, name)
    columns = ["method"]
    for name in published.sets:
        columns += [f"{name}\npaper", f"{name}\nours"]
        if _has_win_rates(ours, name):
            columns.append(f"{name}\nours, at equal length")
    rows: list[list[Cell]] = []
    methods = [*published.rows, *(method for method in ours if method not in published.rows)]
    for method in methods:
        mark = f" {UNVERIFIED}" if method in published.unverified else ""
        row: list[Cell] = [method + mark]
        numbers = published.rows.get(method)
        for place, name in enumerate(published.sets):
            found = ours.get(method, {}).get(name)
            row.append(decimal(numbers[place], 1) if numbers else None)
            row.append(_result_text(found))
            if _has_win_rates(ours, name):
                row.append(_length_controlled_text(found))
        rows.append(row)
    return Table(
        columns=columns,
        rows=rows,
        caption=f"{published.caption}; the paper's numbers and ours.",
        notes=" ".join(_notes(published)),
    )


def direction_table(
    which: PaperTable, ours: Mapping[str, Mapping[str, Result]], *, baseline: str = ""
) -> Table:
    """Which methods are ahead of a baseline, in the paper and with us: what can be compared.

    Differences are in points of per cent. Those between our win rates have a 95 % interval from
    both standard errors, as if the two had been judged on different prompts: too wide where the
    prompts are the same.

    Args:
        which: The number of the table.
        ours: As for `paper_table`; methods that the paper lacks, and those without the baseline's
            number on the same set, are left out.
        baseline: A method of the paper; the table's own by default.

    Raises:
        ValueError: As for `paper_table`; or a baseline that the paper does not have.
    """
    published = _published(which)
    base = baseline or published.baseline
    if base not in published.rows:
        raise ValueError(
            f"table {which} has no method {base!r}; it has: {', '.join(published.rows)}."
        )
    rows: list[list[Cell]] = []
    for method, numbers in published.rows.items():
        for place, name in enumerate(published.sets):
            result, other = ours.get(method, {}).get(name), ours.get(base, {}).get(name)
            if method == base or result is None or other is None:
                continue
            _require_share(result, method, name)
            _require_share(other, base, name)
            theirs = numbers[place] - published.rows[base][place]
            difference, half = _difference(result, other)
            mark = f" {UNVERIFIED}" if {method, base} & published.unverified else ""
            text = decimal(difference, 1)
            width = decimal(half, 1)
            rows.append(
                [
                    method + mark,
                    name,
                    decimal(theirs, 1),
                    text if width is None else f"{text} ± {width}",
                    _direction(theirs, difference, half),
                ]
            )
    return Table(
        columns=["method", "set", f"paper, less\n{base}", f"ours, less\n{base}", "direction"],
        rows=rows,
        caption=f"{published.caption}: directions against {base}.",
        notes="Points of per cent; ± is 1.96 standard errors, as of different prompts. Where our "
        "interval holds 0 there is no direction to compare. The paper has no intervals.",
    )


def win_rate_table(rates: Mapping[str, WinRate], *, caption: str = "") -> Table:
    """Win rates of several sets of prompts, with standard errors and at equal length.

    Args:
        rates: By the name of the set.
        caption: Of the table; who won against whom, if it is known.
    """
    rows: list[list[Cell]] = [
        [
            name,
            rate.pairs,
            _result_text(rate),
            _length_controlled_text(rate),
            f"{rate.wins} / {rate.ties} / {rate.losses}",
            decimal(rate.mean_length, 0),
            decimal(rate.mean_reference_length, 0),
        ]
        for name, rate in rates.items()
    ]
    return Table(
        columns=[
            *("set", "prompts", "win rate\nin %", "at equal\nlength"),
            *("won / tied / lost", "characters", "reference's\ncharacters"),
        ],
        rows=rows,
        caption=caption or "Win rate against the reference completions, ties at half.",
        notes="± one binomial standard error; at equal length with its 95 % interval.",
    )


def multiple_choice_table(
    found: Mapping[str, MultipleChoice],
    *,
    ref: Mapping[str, MultipleChoice] | None = None,
    kept: Mapping[str, Retention] | None = None,
) -> Table:
    """What a policy knows, and with the reference's answers what of that it has kept.

    Args:
        found: By the name of the set of questions.
        ref: The reference policy's, on the same questions.
        kept: Both compared question by question, from `evaluate.retention`.
    """
    columns = ["questions of", "questions", "acc in %", "acc_norm in %", "chance\nin %"]
    if ref is not None:
        columns.append("reference's\nacc in %")
    if kept is not None:
        columns += ["difference", "lost / gained"]
    rows: list[list[Cell]] = []
    for name, result in found.items():
        row: list[Cell] = [
            name,
            result.questions,
            _with_error(result.acc, result.acc_stderr),
            _with_error(result.acc_norm, result.acc_norm_stderr),
            decimal(100 * result.chance, 1),
        ]
        if ref is not None:
            row.append(_with_error(ref[name].acc, ref[name].acc_stderr))
        if kept is not None:
            row.append(_with_error(kept[name].difference, kept[name].stderr))
            row.append(f"{kept[name].lost} / {kept[name].gained}")
        rows.append(row)
    notes = "± one standard error. acc_norm divides a choice's log-likelihood by its characters."
    cut = {name: result.truncated for name, result in found.items() if result.truncated}
    if kept is not None:
        notes += " The difference is of acc, question by question."
    for name, count in cut.items():
        notes += f" {count} queries of {name} were cut from the left to fit the context."
    return Table(columns=columns, rows=rows, caption="Multiple-choice questions.", notes=notes)


def _published(which: str) -> Published:
    for name, published in PUBLISHED.items():
        if name == which:
            return published
    raise ValueError(f"which must be one of the tables {', '.join(PUBLISHED)}, got {which!r}.")


def _notes(published: Published) -> list[str]:
    notes = ["Paper: Lang et al. 2024 (arXiv 2403.19279)."]
    if published.judged:
        notes.append(
            "Its reference text-davinci-003 and its annotators are retired, so only directions can "
            "be compared, not the numbers."
        )
    notes += [
        published.note,
        "Ours: ± one standard error; at equal length with its 95 % interval.",
    ]
    if published.unverified:
        notes.append(f"{UNVERIFIED}: which row the number stands in could not be verified.")
    return notes


def _has_win_rates(ours: Mapping[str, Mapping[str, Result]], name: str) -> bool:
    return any(isinstance(results.get(name), WinRate) for results in ours.values())


def _result_text(result: Result | None) -> Cell:
    if result is None:
        return None
    if isinstance(result, WinRate):
        return _with_error(result.win_rate, result.standard_error)
    return decimal(100 * result, 1)


def _with_error(share: float, error: float) -> Cell:
    text, width = decimal(100 * share, 1), decimal(100 * error, 1)
    return text if width is None else f"{text} ± {width}"


def _length_controlled_text(result: Result | None) -> Cell:
    if not isinstance(result, WinRate):
        return None
    found = result.length_controlled
    rate, low, high = (decimal(100 * v, 1) for v in (found.win_rate, found.low, found.high))
    return f"{rate} [{low}, {high}]"


def _difference(result: Result, other: Result) -> tuple[float, float]:
    """Return the difference in points and half of its 95 % interval, NaN where none is known."""
    difference = 100 * (_share(result) - _share(other))
    if not (isinstance(result, WinRate) and isinstance(other, WinRate)):
        return difference, math.nan
    return difference, 196 * math.hypot(result.standard_error, other.standard_error)


def _direction(theirs: float, difference: float, half: float) -> str:
    if abs(difference) <= half or difference == 0:  # false for an unknown half
        return "none shown"
    return "the same" if (theirs > 0) == (difference > 0) and theirs != 0 else "the opposite"


def _share(result: Result) -> float:
    return result.win_rate if isinstance(result, WinRate) else result


def _require_set(name: str, published: Published, which: str) -> None:
    if name not in published.sets:
        raise ValueError(f"table {which} has no set {name!r}; it has: {', '.join(published.sets)}.")


def _require_share(result: Result, method: str, name: str) -> None:
    if not 0 <= _share(result) <= 1:
        raise ValueError(
            f"{method} on {name} must be a share between 0 and 1, as 0.491 for 49.1 %, got "
            f"{_share(result)}."
        )
