import math
from dataclasses import replace

import pytest

from trueward.evaluate.comparison import MethodRuns, SeedRun
from trueward.report.curves import (
    band_words,
    by_family,
    kl_label,
    shown_methods,
    x_range,
    y_range,
)
from trueward.report.figures import Curve


def method(
    name: str,
    *,
    label: str = "",
    golds: list[float] | None = None,
    seeds: int = 2,
    optimiser: str = "rloo",
    kl: str = "kl/exact",
) -> MethodRuns:
    """A method at the KLs 0, 1, 4, ..., whose seeds lie 0.2 apart."""
    place = "n" if optimiser == "best_of_n" else "step"
    curve = golds or [0.0, 1.0, 2.0, 0.5]
    runs = [
        SeedRun(
            seed=seed,
            points=[
                {place: i + 1.0, "gold": gold + 0.2 * seed, "gold_sem": 0.1, kl: 1.0 * i * i}
                for i, gold in enumerate(curve)
            ],
            seconds=1.0,
        )
        for seed in range(seeds)
    ]
    return MethodRuns(name=name, label=label, optimiser=optimiser, runs=runs)


def test_methods_of_one_label_are_told_apart() -> None:
    methods = [method("a", label="mix"), method("b", label="mix"), method("c")]
    assert [s.name for s in shown_methods(methods, "a")] == ["mix (a)", "mix (b)", "c"]


def test_colours_come_again_dashed_and_each_family_has_the_palette_to_itself() -> None:
    methods = [method(f"m{i}") for i in range(9)]
    shown = shown_methods([*methods, method("n", optimiser="best_of_n")], "a")
    assert [s.dashed for s in shown] == [False] * 8 + [True, False]
    assert shown[8].color == shown[0].color == shown[9].color
    assert len({s.color for s in shown[:8]}) == 8


def test_axes_leave_gold_readable_whatever_the_proxy_does() -> None:
    gold = Curve(name="g", x=[0.0, 4.0], y=[0.0, 2.0], low=[0.0, -90.0], high=[0.0, 90.0])
    calm = Curve(name="p", x=[0.0, 4.0], y=[0.0, 2.5])
    wild = Curve(name="p", x=[0.0, 4.0], y=[0.0, 50.0])
    alone = Curve(name="g", x=[0.0, 4.0], y=[0.0, 2.0])
    (low, high), cut = y_range([(alone, calm)])
    assert (low, high, cut) == (pytest.approx(-0.1), pytest.approx(2.6), False)
    (low, high), cut = y_range([(gold, wild)])
    assert cut
    assert (low, high) == (pytest.approx(-0.5 - 0.14), pytest.approx(3.0 + 0.14))
    assert x_range([gold]) == (0.0, pytest.approx(4 * 1.03**2))
    assert x_range([Curve(name="g", x=[-1.0, 0.0], y=[0.0, 0.0])]) == (-1.0, 1.0)


def test_the_law_is_drawn_on_to_a_predicted_peak_in_sight_alone() -> None:
    methods = [method("a", golds=[0.0, 1.0, 1.5, 1.7])]
    (one,) = shown_methods(methods, "a")
    assert one.fit is not None
    peak = one.fit.law.peak_kl
    assert 9 < peak < 40
    seen = one.law((0.0, 100.0), (-1.0, 3.0))
    assert seen is not None
    assert seen[1] == (peak, one.fit.peak_gold)
    assert max(seen[0].x) == pytest.approx(1.1 * peak)
    assert max(seen[0].y) == pytest.approx(one.fit.peak_gold, abs=1e-3)
    hidden = one.law((0.0, 9.5), (-1.0, 3.0))
    assert hidden is not None
    assert hidden[1] is None
    assert max(hidden[0].x) == pytest.approx(9.0)


def test_a_law_that_does_not_describe_the_curve_is_not_drawn() -> None:
    (zigzag,) = shown_methods([method("a", golds=[0.0, 2.0, 0.0, 2.0])], "a")
    assert zigzag.fit is not None
    assert zigzag.law((0.0, 100.0), (-1.0, 3.0)) is None
    (rising,) = shown_methods([method("a", golds=[0.0, 1.0, 2.5, 5.0])], "a")
    assert rising.fit is not None
    assert rising.fit.law.beta < 0
    assert rising.law((0.0, 100.0), (-1.0, 9.0)) is None


def test_families_stay_together_and_the_baseline_leads() -> None:
    given = [
        method("n1", optimiser="best_of_n"),
        method("p", optimiser="ppo"),
        method("o", optimiser="closed_form"),
        method("r"),
        method("n2", optimiser="best_of_n", golds=[0.0, 1.0, 2.0, 1.5]),
    ]
    shown = shown_methods(given, "r")
    assert [s.name for s in shown] == ["r", "p", "n1", "n2", "o"]
    assert [s.compared_with for s in shown] == ["r", "r", "n1", "n1", "o"]
    assert list(by_family(shown)) == ["trained policies", "best-of-n", "optimal policies"]
    differences = [s.summary.less_baseline for s in shown]
    assert [d is None for d in differences] == [True, False, True, False, True]
    assert differences[3] is not None
    assert differences[3].mean == pytest.approx(1.0)
    # A baseline without runs leaves its place to the first.
    waiting = MethodRuns(name="w", label="", optimiser="ppo", runs=[])
    assert [s.compared_with for s in shown_methods([method("a"), method("b"), waiting], "w")] == [
        "a",
        "a",
    ]


def test_bands_are_ranges_of_few_seeds_and_said_to_be() -> None:
    few, many, one = (method(str(n), seeds=n) for n in (2, 5, 1))
    by_seeds = {s.name: s for s in shown_methods([few, many, one], "2")}
    curve = by_seeds["2"].gold(by_seeds["2"].kl())
    assert (curve.low, curve.high) == ([0.0, 1.0, 2.0, 0.5], [0.2, 1.2, 2.2, 0.7])
    curve = by_seeds["5"].gold(by_seeds["5"].kl())
    assert curve.low is not None
    # 0, 0.2, ..., 0.8: mean 0.4, s = sqrt 0.1, t 2.776
    assert curve.low[0] == pytest.approx(0.4 - 2.776445 * math.sqrt(0.1 / 5), rel=1e-4)
    assert by_seeds["5"].gold(by_seeds["5"].kl(), band=False).low is None
    assert band_words([by_seeds["2"]]) == "the lowest to the highest seed"
    assert band_words([by_seeds["5"]]) == "the 95 % interval over seeds"
    assert band_words([by_seeds["1"]]) == "of one seed the 95 % interval over prompts"
    assert band_words([by_seeds["2"], by_seeds["5"]]) == (
        "the 95 % interval over seeds, of fewer than 5 the lowest to the highest seed"
    )
    bare = replace(one, runs=[replace(one.runs[0], points=[{"step": 0.0, "gold": 1.0}])])
    assert band_words(shown_methods([bare], "1")) == ""


def test_an_axis_names_the_kls_that_it_shows() -> None:
    methods = [method("a"), method("b", kl="kl/k1"), method("c", kl="kl/bound")]
    shown = shown_methods(methods, "a")
    assert kl_label(shown[:1]) == "KL (nats, exact)"
    assert kl_label(shown) == "KL (nats, exact or bound or k1)"
