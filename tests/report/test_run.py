import dataclasses
import json
import math
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from trueward.data.sources import DataError
from trueward.report.figures import Curve
from trueward.report.html import Table
from trueward.report.run import _by_scale, _gold_figure, _thinned, report_run, rich_table
from trueward.train.run_folder import RunFolder


def write_run(path: Path, command: str, rows: list[dict], *, finish: bool = True) -> None:
    folder = RunFolder(path, command=command, config={"learning_rate": 0.5, "note": "<i>"})
    for step, row in enumerate(rows, start=1):
        folder.log(command, step, row)
    if finish:
        folder.finish({"accuracy": 0.75, "by": {"member": 0.25}, "scales": [1, 2]}, seed=3)


def steps(count: int) -> list[dict]:
    return [{"loss": 1.0 / s, "accuracy": s / 100, "grad_norm": 2.0} for s in range(1, count + 1)]


def titles(page: str) -> list[str]:
    return re.findall(r'role="img" aria-label="([^"]*)"', page)


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page)


def test_a_runs_report_has_its_numbers_curves_and_configuration(tmp_path: Path) -> None:
    write_run(tmp_path / "rm", "reward", steps(10))
    written = report_run(tmp_path / "rm")
    assert written == tmp_path / "rm" / "report.html"
    page = written.read_text("utf-8")
    assert "<h1>reward: rm</h1>" in page
    assert headings(page) == ["Summary", "Training", "Configuration"]
    assert titles(page) == ["loss", "accuracy"]
    assert "The same at every step: <code>grad_norm</code> 2." in page
    assert "learning_rate: 0.5" in page
    assert "note: &lt;i&gt;" in page
    assert '<th scope="row" data-key="by/member">by/member</th>' in page
    assert "seed 3" in page


def test_a_pipelines_report_has_a_table_of_stages_and_a_section_for_each(tmp_path: Path) -> None:
    write_run(tmp_path / "02_reward", "reward", steps(3))
    write_run(tmp_path / "01_sft", "sft", [{"loss": 2.0}, {"loss": 1.0}])
    write_run(tmp_path / "03_policy", "policy", [{"reward": 1.0}, {"reward": 2.0}], finish=False)
    summary = {"command": "rlp", "seed": 3, "seconds": 3725.0, "metrics": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = report_run(tmp_path).read_text("utf-8")
    assert headings(page) == ["Stages", "01_sft", "02_reward", "03_policy"]
    assert "3 stages, 2 finished in 1 h 2 min, seed 3." in page
    stages = page.split("<tbody>")[1].split("</tbody>")[0]
    assert re.findall(r'scope="row" data-key="([^"]*)"', stages) == [
        "01_sft",
        "02_reward",
        "03_policy",
    ]
    assert stages.count(">0.750<") == 2
    assert "not finished" in stages
    assert "Not finished: these are the numbers so far." in page


def test_a_folder_without_a_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="holds no run") as caught:
        report_run(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(DataError, match="is no folder"):
        report_run(tmp_path / "nowhere")


def test_lines_that_cannot_be_read_are_counted_and_named(tmp_path: Path) -> None:
    write_run(tmp_path, "sft", [{"loss": 2.0}, {"loss": 1.0}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"stage": "sft", "loss": 1}\n{"stage": "sft", "step": 4, "lo')
    page = report_run(tmp_path).read_text("utf-8")
    assert (
        "Left out: 3 lines of <code>metrics.jsonl</code> that cannot be read (line 3, 4, 5)" in page
    )
    assert titles(page) == ["loss"]


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"command": ')
    with pytest.raises(DataError, match=r"summary\.json cannot be read as JSON"):
        report_run(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(DataError, match=r"must hold a JSON object, got list"):
        report_run(tmp_path)


def test_metrics_are_grouped_by_what_they_measure_and_split_by_scale(tmp_path: Path) -> None:
    rows = [
        {
            "objective/nominal": s + 1.0,
            "kl/k3": s * 1.0,
            "kl/k1": s * 1.1,
            "kl/update": s * 0.1,
            "length": s + 9,
            "loss/policy": s * 1e-3,
            "loss/value": s * 1.0,
            "mean_reward": s * 0.1,
            "min_reward": s * 0.1 - 1,
            "max_reward": s * 0.1 + 1,
            "epoch": s,
            "entropy": -s,
            "diverged": math.nan,
        }
        for s in range(1, 5)
    ]
    write_run(tmp_path, "policy", rows)
    assert titles(report_run(tmp_path).read_text("utf-8")) == [
        "loss/policy",
        "loss/value",
        "mean_reward, min to max",
        "KL",
        "kl/update",
        "length",
        "objective/nominal",
        "entropy",
    ]


def test_lines_of_one_scale_share_axes_and_others_do_not() -> None:
    members = {"a": [(1.0, 1.0)], "b": [(1.0, -19.0)], "c": [(1.0, 21.0)], "zero": [(1.0, 0.0)]}
    assert [sorted(part) for part in _by_scale(members)] == [["a", "b"], ["c"], ["zero"]]


def test_long_lines_become_means_in_the_band_of_what_they_stand_for() -> None:
    points = [(float(s), float(s % 2)) for s in range(1000)]
    points[3] = (3.0, math.nan)
    curve = _thinned("a", points, most=250)
    assert len(curve.x) == 250
    assert curve.x[1] == 5.5  # steps 4, 5, 6 and 7
    assert curve.y[0] == pytest.approx(1 / 3)  # 0, 1 and 0
    assert curve.y[1] == 0.5
    assert curve.low is not None
    assert curve.high is not None
    assert (curve.low[1], curve.high[1]) == (0.0, 1.0)
    assert _thinned("a", points[:250], most=250).low is None


def test_gold_is_drawn_against_the_kl_of_the_same_steps() -> None:
    series = {
        "kl/k1": [(1.0, 0.0), (2.0, 4.0), (3.0, 9.0)],
        "reward": [(1.0, 0.0), (2.0, 1.0), (3.0, 2.0)],
        "eval/gold": [(1.0, 0.0), (3.0, 0.5), (4.0, 7.0)],
    }
    drawn = _gold_figure(series)
    assert drawn is not None
    assert 'aria-label="Gold and proxy reward"' in drawn.svg
    assert ">9<" not in drawn.svg  # ticks are 1, 2, 3 and 5
    assert _gold_figure({"reward": series["reward"], "kl/k1": series["kl/k1"]}) is None


def test_results_of_a_demo_are_shown_first(tmp_path: Path) -> None:
    table = {"columns": ["method", "gold"], "rows": [["mean", 1.5]], "caption": "Both methods."}
    curve = Curve(name="mean", x=[0.0, 1.0, 4.0], y=[0.0, math.nan, 1.0])
    sample = {
        "prompt": "Say <b>",
        "completions": [{"text": "well", "label": "PPO", "scores": {"gold": 1.5, "proxy": None}}],
    }
    write_run(tmp_path, "demo", [{"loss": 2.0}, {"loss": 1.0}])
    (tmp_path / "table.json").write_text(json.dumps(table))
    written = dataclasses.asdict(curve) | {"y": [0.0, None, 1.0]}
    curves = {
        "Gold against KL": [written],
        "Other": {"curves": [written], "x_label": "how far", "x_scale": "log", "caption": "Far."},
    }
    curves["Other"]["curves"] = [written | {"x": [1, 2, 3]}]
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    page = report_run(tmp_path).read_text("utf-8")
    assert headings(page)[0] == "Results"
    assert "Both methods." in page
    assert titles(page) == ["Gold against KL", "Other", "loss"]
    assert "KL from the reference policy (nats)" in page
    assert ">0.1<" in page  # a tick that only the square root has
    assert "how far" in page
    assert "Far." in page
    assert "Say &lt;b&gt;" in page


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.json", {"columns": ["a"]}, "misses 'rows'"),
        ("table.json", {"columns": ["a"], "rows": [[1, 2]]}, "2 cells under 1 columns"),
        ("curves.json", {"t": [{"name": "a", "x": [1], "y": [1, 2]}]}, "as many x as y"),
        ("curves.json", {"t": [{"name": "a", "x": [1], "z": [1]}]}, "a curve has no 'z'"),
        ("curves.json", ["t"], "cannot be shown"),
        ("samples.json", [{"prompt": "p"}], "misses 'completions'"),
    ],
)
def test_results_that_cannot_be_shown_are_named(
    tmp_path: Path, name: str, content: object, message: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        report_run(tmp_path)
    assert name in str(caught.value)


def test_checkpoints_are_no_stages_and_the_report_can_be_written_again(tmp_path: Path) -> None:
    write_run(tmp_path, "sft", [{"loss": 2.0}, {"loss": 1.0}])
    (tmp_path / "checkpoint-000002").mkdir()
    (tmp_path / "checkpoint-000002" / "config.yaml").write_text("a: 1")
    first = report_run(tmp_path).read_bytes()
    assert "Stages" not in first.decode()
    assert report_run(tmp_path).read_bytes() == first


def test_the_console_table_has_the_reports_numbers_and_keeps_brackets() -> None:
    table = Table(
        columns=["[bold]method", "gold"],
        rows=[["mean [0.5]", -0.5], ["[red]wco", 10.0]],
        caption="Results [1]",
    )
    out = StringIO()
    drawn = rich_table(table)
    Console(file=out, width=80).print(drawn)
    text = out.getvalue()
    for expected in ("[bold]method", "mean [0.5]", "[red]wco", "−0.50", "10.00", "Results [1]"):
        assert expected in text
    assert [column.justify for column in drawn.columns] == ["left", "right"]
