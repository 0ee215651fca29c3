import json
import math
import re
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from trueward.evaluate.comparison import MethodRuns, SeedRun
from trueward.report.comparison import (
    _law,
    _shown,
    _x_range,
    _y_range,
    comparison_report,
    rich_comparison_table,
)
from trueward.report.figures import Curve
from trueward.report.html import (
    Completion,
    FigureHtml,
    PanelsHtml,
    SampleRow,
    Section,
    render_report,
)

STEPS = [0.0, 10.0, 20.0, 40.0]


def method(
    name: str,
    *,
    label: str = "",
    golds: list[float] | None = None,
    seeds: int = 2,
    optimiser: str = "rloo",
    weight: float | None = None,
    reward: str | None = None,
    full: bool = True,
) -> MethodRuns:
    """A method whose seeds lie 0.2 apart; `full` has everything that a point may have."""
    place = "n" if optimiser == "best_of_n" else "step"
    runs = []
    for seed in range(seeds):
        rows = []
        for i, gold in enumerate(golds or [0.0, 1.0, 2.0, 0.5]):
            row = {place: STEPS[i] + (place == "n"), "gold": gold + 0.2 * seed, "gold_sem": 0.1}
            if full:
                kl = {"kl/exact": 1.0 * i * i, "kl/k1": 1.1 * i * i, "kl/k3": 1e9 * i}
                row |= kl | {"proxy": 3.0 * i, "spread": 0.1 * i, "agreement": 0.8, "length": 9.0}
            rows.append(row)
        shift = 0.1 * len(reward or name)
        pairs = {"probabilities": [0.9 - shift, 0.2, 0.6], "outcomes": [True, False, False]}
        final = {"final_gold": [1.0, 2.0, 3.0 + len(name)]}
        runs.append(
            SeedRun(seed=seed, points=rows, seconds=60.0, **(pairs | final if full else {}))
        )
    return MethodRuns(name=name, label=label, optimiser=optimiser, runs=runs, nominal_weight=weight)


def report(folder: Path, methods: list[MethodRuns], **changes: object) -> str:
    settings = {
        "title": "Three & more",
        "lead": "The mix keeps its gold.",
        "baseline": methods[0].name,
        "samples": [],
        "notes": "One world.\n\nTwo seeds.",
        "config_text": "seeds: 2\n",
        "environment": {"trueward": "0.1.0", "device": "cpu"},
    }
    path = comparison_report(folder, methods, **(settings | changes))
    assert path == folder / "report.html"
    return path.read_text("utf-8")


def headings(page: str) -> list[str]:
    return [unescape(h) for h in re.findall(r"<h2[^>]*>([^<]*)</h2>", page)]


def table(page: str, number: int) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the page's n-th table, as text."""
    part = page.split(f'id="table-{number}"')[1].split("</table>")[0]
    head = re.findall(r"<button[^>]*>([^<]*)<", part)
    body = part.split("<tbody>")[1].split("</tr>")[:-1]
    cells = [[unescape(c) for c in re.findall(r"<t[hd][^>]*>([^<]*)<", row)] for row in body]
    return head, cells


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report with all sections, and the names of its figures in place of the files."""
    folder = tmp_path_factory.mktemp("whole")
    kept = folder / "kept.txt"

    def keep(figure: Figure, path: Path) -> None:
        with kept.open("a") as file:
            file.write(f"{path.relative_to(folder)}\n")

    answer = Completion(text="the dog runs .", label="before", scores={"gold": 1.0})
    methods = [
        method("one", label="single <reward>", reward="shared"),
        method("two", label="mix", golds=[0.0, 1.0, 2.0, 2.5], weight=0.0),
        method("three", weight=0.5),
        method("bon", optimiser="best_of_n", reward="shared"),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trueward.report.comparison.save_figure", keep)  # its files take seconds
        page = report(folder, methods, samples=[SampleRow(prompt="a dog ?", completions=[answer])])
    return folder, page


def test_the_sections_stand_in_their_order(whole: tuple[Path, str]) -> None:
    assert headings(whole[1]) == [
        "Results",
        "Gold and proxy reward: trained policies",
        "Gold and proxy reward: best-of-n",
        "Fitted laws",
        "Gold over the course of optimisation",
        "Estimators of the KL",
        "Peak and end",
        "Spread between the members",
        "Agreement of the proxy with gold",
        "Reliability of the rewards",
        "The weight of the nominal reward",
        "Win rates",
        "Answers side by side",
        "Configuration",
    ]


def test_the_page_is_one_file_that_needs_nothing_else(whole: tuple[Path, str]) -> None:
    page = whole[1]
    assert "<reward>" not in page
    assert "single &lt;reward&gt;" in page
    addresses = set(re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", page))
    assert addresses == set()
    assert len(re.findall(r'\sid="([^"]+)"', page)) == len(set(re.findall(r'\sid="([^"]+)"', page)))
    assert "the dog runs ." in page
    assert "seeds: 2" in page


def test_every_figure_of_the_page_is_kept(whole: tuple[Path, str]) -> None:
    kept = (whole[0] / "kept.txt").read_text().splitlines()
    assert {path.removeprefix("figures/") for path in kept} == {
        "gold_trained_policies",
        "gold_and_proxy_trained_policies",
        "gold_and_proxy_best_of_n",
        "gold_over_step_trained_policies",
        "gold_over_n_best_of_n",
        "kl_estimators",
        "peak_and_end",
        "spread_over_step_trained_policies",
        "spread_over_n_best_of_n",
        "agreement_over_step_trained_policies",
        "agreement_over_n_best_of_n",
        "reliability",
        "nominal_weight_rloo",
        "win_rates",
    }


def test_the_table_has_means_intervals_and_paired_differences(whole: tuple[Path, str]) -> None:
    head, rows = table(whole[1], 1)
    assert [h.replace("\n", " ") for h in head] == [
        "method",
        "gold at the end",
        "less the baseline",
        "gold at its peak",
        "peak at",
        "drop",
        "KL at end",
        "proxy at end",
        "words",
        "seconds a cell",
    ]
    # Two seeds at 0.5 and 0.7: t is 12.706, s / sqrt 2 is 0.1.
    end, peak = "0.60 ± 1.27", "2.10 ± 1.27"
    assert rows[0] == [
        "single <reward>", end, "–", peak, "20", "1.50 ± 0.00", "9.0", "9.00", "9.0", "60"
    ]  # fmt: skip
    assert rows[1][:6] == ["mix", "2.60 ± 1.27", "2.00 ± 0.00", "2.60 ± 1.27", "40", "0.00 ± 0.00"]
    assert "Highest at the end, so perhaps not yet at its peak: mix." in whole[1]


def test_a_shared_reward_is_drawn_once_with_its_methods_named(whole: tuple[Path, str]) -> None:
    _, rows = table(whole[1], 3)
    assert [row[0] for row in rows] == ["single <reward>; bon", "mix", "three"]
    assert [row[-1] for row in rows] == ["6", "6", "6"]
    # p = 0.3, 0.2, 0.6 for true, false, false: one of three is right.
    assert rows[0][1] == "0.33 ± 0.00"


def test_win_rates_are_a_table_of_row_against_column(whole: tuple[Path, str]) -> None:
    head, rows = table(whole[1], 4)
    assert head == ["row against column", "1", "2", "3", "4"]
    # Two of three answers tie, and a longer name has more gold in the third.
    assert rows[0] == ["1  single <reward>", "–", "50 ± 0", "33 ± 0", "50 ± 0"]
    assert rows[2][1] == "67 ± 0"


def test_the_numbers_can_be_read_by_a_machine(whole: tuple[Path, str]) -> None:
    text = (whole[0] / "comparison.json").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    found = json.loads(text)
    assert found["baseline"] == "one"
    first, second = found["methods"][:2]
    assert (first["name"], first["peak_place"], first["less_baseline"]) == ("one", 20.0, None)
    assert second["less_baseline"]["mean"] == pytest.approx(2.0)
    assert first["drop"]["mean"] == pytest.approx(1.5)
    assert [p["gold"]["mean"] for p in first["curve"]] == pytest.approx([0.1, 1.1, 2.1, 0.6])
    assert first["fit"]["law"]["beta"] > 0
    assert found["win_rates"]["names"] == ["one", "two", "three", "bon"]
    assert found["win_rates"]["mean"][2][0] == pytest.approx(2 / 3)
    assert found["reliability"][0]["methods"] == ["single <reward>", "bon"]


def test_sections_without_data_are_left_out_and_methods_without_runs_named(
    tmp_path: Path,
) -> None:
    empty = MethodRuns(name="e", label="not yet", optimiser="ppo", runs=[])
    page = report(tmp_path, [method("a", seeds=1, full=False), empty], environment={})
    assert headings(page) == [
        "Results",
        "Gold over the course of optimisation",
        "Peak and end",
        "Configuration",
    ]
    head, rows = table(page, 1)
    assert [h.replace("\n", " ") for h in head] == [
        "method",
        "gold at the end",
        "gold at its peak",
        "peak at step",
        "drop",
        "seconds a cell",
    ]
    assert rows == [["a", "0.50 ± 0.20", "2.00 ± 0.20", "20", "1.50", "60"]]  # 1.96 * 0.1
    assert "With one seed (a) there is no interval over seeds" in page
    assert "Without runs: not yet." in page
    kept = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = ("gold_over_step_trained_policies", "peak_and_end")
    assert kept == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}


def test_an_unknown_baseline_or_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="baseline 'x' is none of the methods a"):
        report(tmp_path, [method("a")], baseline="x")
    with pytest.raises(ValueError, match="none of 1 methods has a run"):
        report(tmp_path, [MethodRuns(name="a", label="", optimiser="ppo", runs=[])])


def test_methods_of_one_label_are_told_apart() -> None:
    methods = [method("a", label="mix"), method("b", label="mix"), method("c")]
    assert [s.name for s in _shown(methods, methods[0])] == ["mix (a)", "mix (b)", "c"]


def test_colours_come_again_dashed_and_each_family_has_the_palette_to_itself() -> None:
    methods = [method(f"m{i}", full=False) for i in range(9)]
    shown = _shown([*methods, method("n", optimiser="best_of_n")], methods[0])
    assert [s.dashed for s in shown] == [False] * 8 + [True, False]
    assert shown[8].color == shown[0].color == shown[9].color
    assert len({s.color for s in shown[:8]}) == 8


def test_axes_leave_gold_readable_whatever_the_proxy_does() -> None:
    gold = Curve(name="g", x=[0.0, 4.0], y=[0.0, 2.0], low=[0.0, -90.0], high=[0.0, 90.0])
    calm = Curve(name="p", x=[0.0, 4.0], y=[0.0, 2.5])
    wild = Curve(name="p", x=[0.0, 4.0], y=[0.0, 50.0])
    alone = Curve(name="g", x=[0.0, 4.0], y=[0.0, 2.0])
    (low, high), cut = _y_range([(alone, calm)])
    assert (low, high, cut) == (pytest.approx(-0.1), pytest.approx(2.6), False)
    (low, high), cut = _y_range([(gold, wild)])
    assert cut
    assert (low, high) == (pytest.approx(-0.5 - 0.14), pytest.approx(3.0 + 0.14))
    assert _x_range([gold]) == (0.0, pytest.approx(4 * 1.03**2))
    assert _x_range([Curve(name="g", x=[-1.0, 0.0], y=[0.0, 0.0])]) == (-1.0, 1.0)


def test_the_law_is_drawn_on_to_a_predicted_peak_in_sight_alone() -> None:
    methods = [method("a", golds=[0.0, 1.0, 1.5, 1.7])]
    (one,) = _shown(methods, methods[0])
    assert one.fit is not None
    peak = one.fit.law.peak_kl
    assert 9 < peak < 40
    seen = _law(one, (0.0, 100.0), (-1.0, 3.0))
    assert seen is not None
    assert seen[1] == (peak, one.fit.peak_gold)
    assert max(seen[0].x) == pytest.approx(1.1 * peak)
    assert max(seen[0].y) == pytest.approx(one.fit.peak_gold, abs=1e-3)
    hidden = _law(one, (0.0, 9.5), (-1.0, 3.0))
    assert hidden is not None
    assert hidden[1] is None
    assert max(hidden[0].x) == pytest.approx(9.0)


# --- the terminal ---


def printed(methods: list[MethodRuns], baseline: str) -> str:
    out = StringIO()
    Console(file=out, width=140).print(rich_comparison_table(methods, baseline))
    return out.getvalue()


def test_the_terminals_table_bears_methods_that_are_not_there_yet() -> None:
    ragged = method("r", seeds=2)
    object.__setattr__(ragged, "runs", [ragged.runs[0], method("r").runs[1]])
    ragged.runs[1].points.pop()
    waiting = MethodRuns(name="w", label="[bold]waiting", optimiser="ppo", runs=[])
    text = printed([method("a", label="single"), waiting, ragged], "a")
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    cells = [cell.strip() for cell in lines["single"].split("│")[1:-1]]
    assert cells == ["single", "2", "0.60 ± 1.27", "2.10 ± 1.27", "1.50 ± 0.00", "9.0", "60.0"]
    assert [c.strip() for c in lines["[bold]waiting"].split("│")[2:-1]] == ["0", *["–"] * 5]
    assert [c.strip() for c in lines["r"].split("│")[2:-1]] == ["2", *["–"] * 5]
    assert "method 'r' has other places in seed 1 than in seed 0" in " ".join(text.split())


def test_the_baseline_is_bold_in_the_terminal() -> None:
    drawn = rich_comparison_table([method("a"), method("b")], "b")
    assert [row.style for row in drawn.rows] == [None, "bold"]


# --- panels on the page ---


def test_panels_share_a_caption_and_no_id() -> None:
    svg = '<svg viewBox="0 0 100 50"><path id="a"/><use href="#a"/></svg>'
    figures = [PanelsHtml(svgs={"one <b>": svg, "two": svg}, caption="Both."), FigureHtml(svg=svg)]
    page = render_report(title="t", lead="l", sections=[Section(title="s", figures=figures)])
    ids = re.findall(r'\sid="(figure-1[^"]*)"', page)
    assert ids == ["figure-1-panel-0-a", "figure-1-panel-1-a"]
    assert re.findall(r'href="#(figure-1[^"]*)"', page) == ids
    assert "<p>one &lt;b&gt;</p>" in page
    assert page.count("<b>Figure 1.</b>") == 1
    assert "Figure 2." not in page


def test_a_kl_that_explodes_does_not_flatten_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn = {}

    def keep(figure: Figure, path: Path) -> None:
        drawn[path.name] = figure

    monkeypatch.setattr("trueward.report.comparison.save_figure", keep)
    report(tmp_path, [method("a")])
    axes = drawn["kl_estimators"].axes[0]
    assert axes.get_ylim()[1] == pytest.approx(3 * 9.9)
    assert [len(line.get_ydata()) for line in axes.lines] == [4, 4, 4]
    assert not math.isnan(axes.get_ylim()[0])
