import dataclasses
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
from trueward.report.comparison import comparison_report, rich_comparison_table
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
                kl = {"kl/bound": 1.0 * i * i} if place == "n" else kl
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
    head = [unescape(h).replace("\n", " ") for h in head]
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
        method("one", label="single <reward>", reward="shared", weight=1.0),
        method("two", label="mix", golds=[0.0, 1.0, 2.0, 2.5], weight=0.0),
        method("three", optimiser="ppo"),
        method("bon", optimiser="best_of_n", reward="shared"),
        method("bon_mix", optimiser="best_of_n", golds=[0.0, 0.5, 0.75, 1.0]),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trueward.report.keeper.save_figure", keep)  # its files take seconds
        page = report(folder, methods, samples=[SampleRow(prompt="a dog ?", completions=[answer])])
    return folder, page


def test_the_sections_stand_in_their_order(whole: tuple[Path, str]) -> None:
    assert headings(whole[1]) == [
        "Results",
        "Answers side by side",
        "Gold and proxy reward: trained policies",
        "Gold and proxy reward: best-of-n",
        "Gold over the course of optimisation",
        "Peak and end",
        "The weight of the nominal reward",
        "Spread between the members",
        "Agreement of the proxy with gold",
        "Reliability of the rewards",
        "Win rates",
        "Fitted laws",
        "Estimators of the KL",
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
        "gold_best_of_n",
        "gold_and_proxy_best_of_n",
        "gold_over_step_trained_policies",
        "gold_over_n_best_of_n",
        "kl_estimators_one",
        "kl_estimators_three",
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
    assert head == [
        "method",
        "gold at the end",
        "difference to the baseline",
        "gold at its peak",
        "peak at step",
        "drop",
        "KL at end",
        "proxy at end",
    ]  # everyone writes nine words and takes a minute
    # Two seeds at 0.5 and 0.7: t is 12.706, s / sqrt 2 is 0.1.
    end, peak = "0.60 ± 1.27", "2.10 ± 1.27"
    assert rows[0] == [
        "single <reward>", end, "–", peak, "20", "1.50 ± 0.00", "9.0", "9.00"
    ]  # fmt: skip
    assert rows[1][:6] == ["mix", "2.60 ± 1.27", "2.00 ± 0.00", "2.60 ± 1.27", "40", "–"]
    assert "Where it is the last place there is no drop" in whole[1]


def test_a_family_without_the_baseline_has_its_own_table_and_is_compared_with_its_first(
    whole: tuple[Path, str],
) -> None:
    head, rows = table(whole[1], 2)
    assert head[4] == "peak at n"
    assert [row[:6] for row in rows] == [
        ["bon", "0.60 ± 1.27", "–", "2.10 ± 1.27", "21", "1.50 ± 0.00"],
        ["bon_mix", "1.10 ± 1.27", "0.50 ± 0.00", "1.10 ± 1.27", "41", "–"],
    ]
    notes = re.findall(r'<div class="notes"><p>(.*?)</p>', whole[1])
    assert "The baseline is single &lt;reward&gt;; differences to it" in notes[0]
    assert notes[0].endswith("KL in nats a completion (exact).")
    assert notes[1] == (
        "The baseline is not among these: bon serves in its place; differences to it and drops are "
        "paired. KL in nats a completion (bound)."
    )


def test_the_glossary_stands_before_the_first_section(whole: tuple[Path, str]) -> None:
    head = whole[1].split("<section")[0]
    assert "<summary>What the words mean</summary>" in head
    assert len(re.findall(r"<dt>", head)) == 10


def test_axes_say_which_kl_and_captions_what_the_bands_are(whole: tuple[Path, str]) -> None:
    page = whole[1]
    # Panels of three and two methods, and the overviews.
    assert page.count(">KL (nats, exact)</text>") == 3 + 1
    assert page.count(">KL (nats, bound)</text>") == 2 + 1
    assert "Solid: gold reward; band: the lowest to the highest seed." in page
    assert "Dot: the end; line: the lowest to the highest seed." in page
    assert "gold is about d (α − β log d), with d = √KL" in page
    assert "gold is about d (α − β d), with d = √KL" in page


def test_a_shared_reward_is_drawn_once_with_its_methods_named(whole: tuple[Path, str]) -> None:
    _, rows = table(whole[1], 3)
    names = ["single <reward>; bon", "mix", "three", "bon_mix"]
    assert [row[0] for row in rows] == names
    assert [row[-1] for row in rows] == ["6"] * 4
    # p = 0.3, 0.2, 0.6 for true, false, false: one of three is right.
    assert rows[0][1] == "0.33 ± 0.00"


def test_win_rates_are_a_table_of_row_against_column(whole: tuple[Path, str]) -> None:
    part = whole[1].split("<summary>The win rates as a table</summary>")[1]
    number = int(re.findall(r"Table (\d+)", part)[0])
    head, rows = table(whole[1], number)
    assert head == ["row against column", "1", "2", "3", "4", "5"]
    # Two of three answers tie, and a longer name has more gold in the third; of two seeds there is
    # no interval.
    assert rows[0] == ["1  single <reward>", "–", "50", "33", "50", "33"]
    assert rows[2][1] == "67"


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
    assert (first["fit"]["describes"], second["fit"]["describes"]) == (False, True)
    assert (first["gold_end"]["lowest"], first["gold_end"]["highest"]) == (0.5, 0.7)
    assert found["methods"][4]["compared_with"] == "bon"
    assert found["methods"][4]["family"] == "best-of-n"
    assert found["win_rates"]["names"] == ["one", "two", "three", "bon", "bon_mix"]
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
    assert head == [
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
    rising = printed([method("a", golds=[0.0, 1.0, 2.0, 3.0])], "a")
    row = next(line for line in rising.splitlines() if "3.10" in line)
    assert row.split("│")[5].strip() == "–"
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

    monkeypatch.setattr("trueward.report.keeper.save_figure", keep)
    report(tmp_path, [method("a")])
    axes = drawn["kl_estimators_a"].axes[0]
    assert axes.get_ylim()[1] == pytest.approx(3 * 9.9)
    assert [len(line.get_ydata()) for line in axes.lines] == [4, 4, 4]
    assert [line.is_dashed() for line in axes.lines] == [False, False, True]  # the exact one on top
    assert axes.lines[-1].get_ydata().tolist() == [0.0, 1.0, 4.0, 9.0]
    assert not math.isnan(axes.get_ylim()[0])


def test_refined_rewards_have_a_table_of_whose_answers_they_tell_apart(tmp_path: Path):
    def told(name: str, share: float) -> MethodRuns:
        made = method(name)
        runs = [
            dataclasses.replace(run, agreements={"reference": share, "moved": share - 0.1})
            for run in made.runs
        ]
        return dataclasses.replace(made, runs=runs)

    page = report(tmp_path, [told("first", 0.8), told("second", 0.85)], baseline="first")
    assert "Whose answers a reward can tell apart" in page
    assert "on answers of<br>the moved policy" in page or "the moved policy" in page
    assert "85.0" in page
    assert "5.0" in page  # the second less the first
    assert (tmp_path / "figures" / "agreement_by_policy.png").exists()
    assert "Whose answers" not in report(tmp_path / "o", [method("first")], baseline="first")
