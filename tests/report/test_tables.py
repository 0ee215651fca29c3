import pytest

from trueward.evaluate.comparison import MethodRuns, SeedRun
from trueward.report.curves import by_family, shown_methods
from trueward.report.html import Table
from trueward.report.tables import fits_section, results_section


def method(
    name: str,
    golds: list[float] | None = None,
    *,
    optimiser: str = "rloo",
    words: float | None = 9.0,
    seconds: float = 60.0,
) -> MethodRuns:
    """A method at the KLs 0, 1, 4, ... under two seeds that lie 0.2 apart."""
    place = "n" if optimiser == "best_of_n" else "step"
    known = {} if words is None else {"length": words}
    runs = [
        SeedRun(
            seed=seed,
            points=[
                {place: i + 1.0, "gold": gold + 0.2 * seed, "kl/exact": 1.0 * i * i} | known
                for i, gold in enumerate(golds or [0.0, 1.0, 2.0, 0.5])
            ],
            seconds=seconds,
        )
        for seed in range(2)
    ]
    return MethodRuns(name=name, label="", optimiser=optimiser, runs=runs)


def results(methods: list[MethodRuns], baseline: str) -> list[Table]:
    groups = by_family(shown_methods(methods, baseline))
    return list(results_section(groups, methods, baseline, "").tables)


def column(table: Table, name: str) -> list[object]:
    return [row[list(table.columns).index(name)] for row in table.rows]


def test_words_and_seconds_stay_where_they_differ_anywhere() -> None:
    slow = method("s", optimiser="best_of_n", seconds=120.0)
    first, second = results([method("a"), slow], "a")
    assert "words" not in [*first.columns, *second.columns]
    # One value in each table, yet not the same in both.
    assert column(first, "seconds\na cell") == ["60"]
    assert column(second, "seconds\na cell") == ["120"]
    (both,) = results([method("a"), method("b", words=12.5)], "a")
    assert column(both, "words") == ["9.0", "12.5"]
    assert "seconds\na cell" not in both.columns
    (alone,) = results([method("a")], "a")
    assert alone.columns[-2:] == ["words", "seconds\na cell"]
    first, second = results([method("a", words=None), slow], "a")
    assert "words" not in first.columns
    assert column(second, "words") == ["9.0"]


def test_the_baseline_stands_first_of_its_family_wherever_it_was_given() -> None:
    methods = [method("n", optimiser="best_of_n"), method("a"), method("b")]
    first, second = results(methods, "b")
    assert column(first, "method") == ["b", "a"]
    assert column(second, "method") == ["n"]
    assert first.caption.startswith("Trained policies: ")
    assert "The baseline is b;" in first.notes
    assert "baseline" not in second.notes  # it stands alone
    assert [t.columns[2] for t in (first, second)] == [
        "difference to\nthe baseline",
        "gold at\nits peak",
    ]


def test_there_is_no_drop_where_the_peak_is_the_last_place() -> None:
    (table,) = results([method("a"), method("b", [0.0, 1.0, 2.0, 3.0])], "a")
    assert column(table, "drop") == ["1.50 ± 0.00", None]
    assert column(table, "difference to\nthe baseline") == [None, "2.50 ± 0.00"]
    assert column(table, "peak\nat step") == ["3", "4"]


def test_a_law_that_does_not_describe_its_curve_has_no_peak() -> None:
    methods = [method("zigzag", [0.0, 2.0, 0.0, 2.0]), method("law", [0.0, 1.0, 1.5, 1.7])]
    shown = shown_methods(methods, "zigzag")
    section = fits_section(shown)
    assert section is not None
    (table,) = section.tables
    law = shown[1].fit
    assert law is not None
    assert column(table, "predicted\npeak KL") == ["no fit", f"{law.law.peak_kl:.1f}"]
    assert column(table, "predicted\npeak gold") == ["no fit", f"{law.peak_gold:.2f}"]
    assert column(table, "observed\npeak gold") == ["2.10", "1.80"]
    assert column(table, "in % of\nthe range")[1] == f"{100 * law.law.rms_error / 1.7:.0f}"
    assert column(table, "rms\nerror")[1] == pytest.approx(law.law.rms_error)
    assert "at most 20 % of the curve's range" in table.notes
    assert fits_section(shown_methods([method("a", [0.0])], "a")) is None
