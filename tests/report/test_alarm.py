"""The tables of an alarm, cell by cell."""

from typing import Any

from trueward.evaluate.alarm import Outcome
from trueward.report.alarm import gold_table, groups_of, run_table, when_table


def outcome(world: str, method: str, seed: int, **options: Any) -> Outcome:
    base: dict[str, Any] = {
        "gold_is_reward": method == "gold",
        "falls": method != "gold",
        "peak": 10,
        "raised_at": None if method == "gold" else 11,
        "kept": 10,
        "gold_start": 0.0,
        "gold_alarm": 1.0,
        "gold_none": -3.0,
        "gold_oracle": 2.0,
        "gold_budget": 0.5,
        "gold_fixed": 1.5,
        "budget": 6,
    }
    return Outcome(world=world, method=method, seed=seed, **(base | options))


OUTCOMES = [
    outcome("a", "single", 0),
    outcome("a", "single", 1, gold_alarm=2.0, kept=5),
    outcome("a", "mean", 0, raised_at=30),
    outcome("a", "gold", 0),
    outcome("b", "single", 0, raised_at=None),
    outcome("b", "gold", 0, raised_at=7),
]


def test_rows_are_worlds_and_methods_with_sums_of_learned_rewards() -> None:
    assert list(groups_of(OUTCOMES)) == [
        ("a", "single"),
        ("a", "mean"),
        ("a", "gold"),
        ("a", "all learned rewards"),
        ("b", "single"),
        ("b", "gold"),
        ("all worlds", "all learned rewards"),
        ("all worlds", "gold as reward"),
    ]


def test_the_alarm_s_times_are_counted() -> None:
    rows = {tuple(row[:2]): row[2:] for row in when_table(OUTCOMES).rows}
    assert rows["a", "single"] == [2, 2, "2 of 2", "2 of 2", "1 of 2", "0 of 2", None]
    assert rows["a", "mean"] == [1, 1, "1 of 1", "0 of 1", "1 of 1", "0 of 1", None]
    assert rows["b", "gold"] == [1, 0, None, None, None, None, "1 of 1"]
    assert rows["all worlds", "all learned rewards"] == [
        4,
        4,
        "3 of 4",
        "2 of 4",
        "2 of 4",
        "0 of 4",
        None,
    ]
    assert rows["all worlds", "gold as reward"] == [2, 0, None, None, None, None, "1 of 2"]


def test_gold_of_every_rule_stands_beside_the_alarm_s() -> None:
    table = gold_table(OUTCOMES)
    rows = {tuple(row[:2]): list(row[2:]) for row in table.rows}
    one = rows["a", "mean"]
    assert one == ["−3.00", "1.00", "2.00", "0.50", "1.50", "4.00", "0.50", "−0.50", "−1.00", "50"]
    two = rows["a", "single"]
    assert two[1] == "1.50 ± 6.35"  # 12.706 x 0.7071 / sqrt 2
    assert two[-1] == "75"
    assert len(table.columns) == 12


def test_every_run_has_a_row() -> None:
    rows = run_table(OUTCOMES).rows
    assert len(rows) == 6
    assert rows[0][:7] == ["a", "single", 0, 10, 11, "yes", 10]
    assert rows[0][-1] == "50"
    assert rows[3][:6] == ["a", "gold", 0, "none", None, None]
    assert rows[4][4:6] == [None, None]
    flat = run_table([outcome("a", "single", 0, gold_oracle=0.05)]).rows[0]
    assert flat[-1] is None  # nothing to keep
