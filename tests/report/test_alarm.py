"""The tables of an alarm, cell by cell."""

import dataclasses
from typing import Any

from trueward.evaluate.alarm import Outcome, WatchedRun
from trueward.report.alarm import gold_table, groups_of, rules_table, run_table, when_table


def outcome(world: str, method: str, seed: int, **options: Any) -> Outcome:
    base: dict[str, Any] = {
        "gold_is_reward": method == "gold",
        "falls": method != "gold",
        "peak": 10,
        "raised_at": None if method == "gold" else 11,
        "kept": 10,
        "gold_start": 0.0,
        "gold_raised": 1.9,
        "gold_kept": 1.0,
        "gold_none": -3.0,
        "gold_oracle": 2.0,
    }
    return Outcome(world=world, method=method, seed=seed, **(base | options))


OUTCOMES = [
    outcome("a", "single", 0),
    outcome("a", "single", 1, gold_kept=2.0, kept=5),
    outcome("a", "mean", 0, raised_at=30),
    outcome("a", "gold", 0),
    outcome("b", "single", 0, raised_at=None),
    outcome("b", "gold", 0, raised_at=7),
]


STOPS = {
    "alarm": OUTCOMES,
    "KL budget": [dataclasses.replace(o, gold_kept=0.0) for o in OUTCOMES],
    "KL budget, no bound": [dataclasses.replace(o, gold_kept=0.5) for o in OUTCOMES],
    "fixed steps": [dataclasses.replace(o, gold_kept=1.5, raised_at=9) for o in OUTCOMES],
}


def test_rows_are_worlds_and_methods_with_sums_of_learned_rewards() -> None:
    assert list(groups_of(OUTCOMES)) == [
        ("a", "single"),
        ("a", "mean"),
        ("a", "gold"),
        ("a", "all learned rewards"),
        ("b", "single"),
        ("b", "gold"),
        ("all embedded worlds", "all learned rewards"),
        ("all embedded worlds", "gold as reward"),
    ]


def test_the_alarm_s_times_are_counted() -> None:
    rows = {tuple(row[:2]): row[2:] for row in when_table(OUTCOMES).rows}
    two = [f"{n} of 2" for n in (0, 2, 0, 0)]
    assert rows["a", "single"] == [2, 2, *two, "100 ± 0", "2 of 2", None, None]
    assert rows["a", "mean"][2:7] == ["0 of 1", "0 of 1", "1 of 1", "0 of 1", "0"]
    assert rows["b", "gold"] == [1, 0, *[None] * 6, "1 of 1", "100"]
    pooled = rows["all embedded worlds", "all learned rewards"]
    # By seed: half of a/0, all of a/1, none of b/0.
    assert pooled[:7] == [4, 4, "0 of 4", "2 of 4", "1 of 4", "1 of 4", "50 ± 124"]
    assert pooled[7:] == ["3 of 4", None, None]
    assert rows["all embedded worlds", "gold as reward"][-2:] == ["1 of 2", "50 ± 635"]


def test_every_rule_has_a_row_and_so_has_gold_of_half_of_the_answers() -> None:
    warns = {kind: STOPS["fixed steps" if kind == "fixed steps" else "alarm"] for kind in STOPS}
    hill = [0.0, 0.6, 1.2, 0.6, -2.0, -6.0]
    run = WatchedRun(
        world="a",
        method="single",
        seed=0,
        gold_is_reward=False,
        signals={},
        places=[0, 2, 4, 6, 8, 10],
        gold=hill,
        halves=list(zip(hill, hill, strict=True)),
    )
    calm = dataclasses.replace(run, gold_is_reward=True, halves=[(0.0, g) for g in hill])
    table = rules_table({"warn": warns, "stop": STOPS}, [run, calm])
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert list(rows) == [*STOPS, "gold of half the answers"]
    alarm = ["0 of 4", "2 of 4", "1 of 4", "1 of 4", "50 ± 124", "67 ± 143", "1 of 2"]
    # Gold of the seeds a/0, a/1, b/0: 1, 2, 1.
    assert rows["alarm"] == [*alarm, "1.33 ± 1.43", None, "1 of 2"]
    assert rows["KL budget, no bound"][7:] == ["0.50 ± 0.00", "−0.83 ± 1.43", "1 of 2"]
    assert rows["fixed steps"][:4] == ["0 of 4", "4 of 4", "0 of 4", "0 of 4"]
    assert rows["fixed steps"][6:] == ["2 of 2", "1.50 ± 0.00", "0.17 ± 1.43", "2 of 2"]
    assert rows["gold of half the answers"] == [*[None] * 4, "100", "100", *[None] * 4]


def test_gold_of_every_rule_stands_beside_the_alarm_s() -> None:
    table = gold_table(STOPS)
    rows = {tuple(row[:2]): list(row[2:]) for row in table.rows}
    one = rows["a", "mean"]
    assert one[:6] == ["−3.00", "1.00", "2.00", "0.00", "0.50", "1.50"]
    assert one[6:] == ["4.00", "1.00", "0.50", "−0.50", "−1.00", "50"]
    two = rows["a", "single"]
    assert two[1] == "1.50 ± 6.35"  # 12.706 x 0.7071 / sqrt 2
    assert two[-1] == "75"
    assert len(table.columns) == 14
    without = gold_table({"alarm": OUTCOMES, "fixed steps": STOPS["fixed steps"]})
    assert without.columns[5:8] == [
        "fixed steps",
        "alarm less\nno alarm",
        "alarm less\nfixed steps",
    ]


def test_every_run_has_a_row() -> None:
    table = run_table({"warn": {"alarm": OUTCOMES}, "stop": STOPS})
    rows = table.rows
    assert len(rows) == 6
    assert rows[0][:9] == ["a", "single", 0, 10, 11, "hit", "yes", 11, 10]
    assert rows[0][9:] == ["−3.00", "1.00", "0.00", "0.50", "1.50", "2.00", "50"]
    assert rows[3][:8] == ["a", "gold", 0, "none", None, None, None, None]
    assert rows[4][4:7] == [None, "never", None]
    low = [outcome("a", "single", 0, gold_oracle=0.05)]
    flat = run_table({"warn": {"alarm": low}, "stop": {"alarm": low}}).rows[0]
    assert flat[-1] is None  # nothing to keep
