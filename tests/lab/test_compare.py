"""A comparison end to end at the smallest sizes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trueward.data.sources import DataError
from trueward.evaluate.comparison import SeedRun
from trueward.lab import exact
from trueward.lab.compare import long_steps, read_methods, run_compare
from trueward.lab.demo import METHODS, DemoConfig, run_demo
from trueward.lab.exact import ExactWorld
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import LanguageConfig
from trueward.lab.methods import Method
from trueward.lab.plan import CompareConfig, cell_folder, cell_tasks, check, scouting_tasks
from trueward.lab.recorded import RecordedWorld
from trueward.options import ObjectiveConfig

CLOSED = Method(optimiser="closed_form")
EXACT = CompareConfig(
    world="exact",
    processes=1,
    methods={
        "single": CLOSED,
        "mean": Method(optimiser="closed_form", members=5),
        "mix_4": Method(
            optimiser="closed_form",
            members=5,
            objective=ObjectiveConfig(name="reward_robust", nominal_weight=0.4),
        ),
    },
)
TINY = LanguageConfig(
    pairs=24,
    held_out_pairs=12,
    reward_epochs=1.0,
    steps=4,
    prompts_per_step=2,
    completions_per_prompt=2,
    training_prompts=8,
    evaluate_every=2,
    evaluation_prompts=3,
    evaluation_samples=2,
    pool=4,
    refine_after=1,
    refine_prompts=6,
    refine_samples=4,
)
WORLD = GrammarWorld(demonstrations_count=64, max_new_tokens=12)


@pytest.fixture(autouse=True)
def plain_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Drawing a page takes ten seconds: one test does, the others write what they were given."""
    if "draws" in request.fixturenames:
        return

    def write(folder: str, methods: list, *, samples: list, **_: object) -> Path:
        page = Path(folder) / "report.html"
        cards = [c.label for row in samples for c in row.completions]
        page.write_text(" ".join([*(m.name for m in methods if m.runs), *cards]))
        return page

    monkeypatch.setattr("trueward.lab.compare.comparison_report", write)


@pytest.fixture
def draws() -> None:
    """Ask for the real page."""


def test_the_exact_world_compared(tmp_path: Path, draws: None):
    summary = run_compare(replace(EXACT, output_dir=str(tmp_path)))
    assert list(summary["metrics"]) == ["single", "mean", "mix_4"]
    assert summary["metrics"]["mean"]["gold"] > summary["metrics"]["single"]["gold"]
    for name in ("single", "mean", "mix_4"):
        for seed in range(3):
            folder = cell_folder(tmp_path, name, seed)
            assert {"config.yaml", "result.json", "summary.json", "environment.json"} <= {
                f.name for f in folder.iterdir()
            }
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<html" in page
    assert "mix_4" in page
    golds = [json.loads((cell_folder(tmp_path, "single", k) / "result.json").read_text())
             ["points"][-1]["gold"] for k in range(3)]  # fmt: skip
    assert f"and ends at {sum(golds) / 3:.2f}" in page or f"to {sum(golds) / 3:.2f} at" in page
    assert list((tmp_path / "figures").glob("*.png"))
    assert list((tmp_path / "figures").glob("*.pdf"))


def test_what_is_finished_is_not_done_again_and_more_methods_add_cells(tmp_path: Path):
    config = replace(EXACT, output_dir=str(tmp_path), seeds=2)
    run_compare(config)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    assert len(before) == 6
    more = replace(
        config, seeds=3, methods=config.methods | {"gold": replace(CLOSED, reward="gold")}
    )
    run_compare(more)
    after = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    assert len(after) == 12
    assert {f: after[f] for f in before} == before
    with pytest.raises(DataError, match=r"exact\.beta=0\.1, this one has exact\.beta=0\.2"):
        run_compare(replace(config, exact=ExactWorld(beta=0.2)))


def test_a_world_of_language_compared_resumes_to_the_same_numbers(tmp_path: Path):
    methods = {
        "single": Method(),
        "mean": Method(members=2),
        "bon": Method(optimiser="best_of_n"),
        "random": Method(reward="random"),
    }
    config = CompareConfig(methods=methods, seeds=1, processes=1, grammar=WORLD, language=TINY)
    run_compare(replace(config, output_dir=str(tmp_path / "whole")))
    broken = replace(config, output_dir=str(tmp_path / "broken"))
    tasks = {t.name: t for t in cell_tasks(broken, TINY.steps)}
    for name in ("shared", "ground/seed-0/reference", "ground/seed-0/comparisons"):
        tasks[name].function(*tasks[name].arguments)
    (cell_folder(tmp_path / "broken", "single", 0) / "evaluations").mkdir(parents=True)
    run_compare(broken)
    whole, resumed = (
        {m.name: m.runs[0] for m in read_methods(config, tmp_path / k)} for k in ("whole", "broken")
    )
    for name in methods:
        assert replace(whole[name], seconds=0.0) == replace(resumed[name], seconds=0.0)
    page = (tmp_path / "broken" / "report.html").read_text("utf-8")
    assert "at its peak" in page


@pytest.mark.slow
def test_the_demo_is_a_comparison_of_one_seed(tmp_path: Path):
    config = DemoConfig(output_dir=str(tmp_path), seed=3, processes=1, world=WORLD, language=TINY)
    summary = run_demo(config)
    assert list(summary["metrics"]) == list(METHODS)
    assert summary["seed"] == 3


def test_a_long_run_is_a_multiple_of_the_steps_at_which_the_baseline_peaks(tmp_path: Path):
    curves = {0: [0.0, 3.0, 2.0, 1.0, 0.0], 1: [0.0, 1.0, 4.0, 1.0, 0.0]}  # mean peaks at 10
    config = scouted(tmp_path, curves)
    assert long_steps(config, tmp_path) == 40
    # Found once: seeds and methods that come later run as long as the others.
    assert long_steps(replace(config, seeds=1, baseline="other"), tmp_path) == 40


def test_a_length_is_rounded_up_to_a_whole_number_of_evaluations(tmp_path: Path):
    config = scouted(tmp_path, {0: [0.0, 1.0, 4.0, 1.0, 0.0]}, long=1.3)
    assert long_steps(config, tmp_path) == 15


@pytest.mark.parametrize("gold", [[0.0, 1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 2.0, 3.0, 3.0]])
def test_without_a_peak_there_is_no_length_to_measure(tmp_path: Path, gold: list[float]):
    with pytest.raises(DataError, match=r"highest at step (20|0) of 20.*language\.learning_rate"):
        long_steps(scouted(tmp_path, {0: gold}), tmp_path)
    assert not (tmp_path / "scout" / "steps.json").exists()


def scouted(out: Path, curves: dict[int, list[float]], *, long: float = 4.0) -> CompareConfig:
    """A comparison whose scouting cells are finished, with the given gold at steps 0, 5, ..."""
    config = CompareConfig(
        output_dir=str(out),
        methods={"single": Method()},
        seeds=len(curves),
        grammar=WORLD,
        language=replace(TINY, steps=20, evaluate_every=5, long=long),
        processes=1,
    )
    for task in scouting_tasks(config):
        if not task.name.startswith("scout/"):
            continue
        lab, method, seed, steps, folder = task.arguments
        lab.start(folder, config={"method": method, "steps": steps})
        _finished_cell(folder, seed, curves[seed])
    return config


def _finished_cell(folder: Path, seed: int, gold: list[float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    points = [{"step": 5.0 * i, "gold": g, "gold_sem": 0.1, "proxy": 0.0, "length": 1.0}
              for i, g in enumerate(gold)]  # fmt: skip
    (folder / "result.json").write_text(
        json.dumps({"seed": seed, "points": points, "seconds": 1.0})
    )
    (folder / "summary.json").write_text("{}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {}}, "name at least one method"),
        ({"baseline": "absent"}, "The baseline 'absent' is none of the methods: single, mean"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"grammar": GrammarWorld(warmth=0.5)}, "`grammar` sets dials of another world"),
        ({"language": LanguageConfig(pairs=7)}, "`language` is for worlds of language"),
        (
            {"methods": {"single": Method()}},
            "methods.single: The exact world is optimised",
        ),
        ({"processes": -1}, "processes must be at least 0"),
        ({"methods": {"single": replace(CLOSED, members=9)}}, "methods.single: "),
        ({"methods": {"a/b": CLOSED}, "baseline": "a/b"}, "must do as a folder's"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    changes: dict, message: str, tmp_path: Path
):
    with pytest.raises(DataError) as error:
        run_compare(replace(EXACT, output_dir=str(tmp_path / "out"), **changes))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_long_runs_need_a_baseline_that_trains():
    bon = Method(optimiser="best_of_n")
    config = CompareConfig(methods={"single": bon}, language=LanguageConfig(long=4.0))
    with pytest.raises(DataError, match="trains no policy"):
        check(config)


@pytest.mark.parametrize("broken", ["mean", "single"])  # `single` is the baseline
def test_a_failing_cell_is_named_and_the_others_are_reported(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
):
    run_cell = exact.run_cell

    def breaks(world: ExactWorld, method: Method, seed: int) -> SeedRun:
        if method == EXACT.methods[broken]:
            raise RuntimeError("no luck")
        return run_cell(world, method, seed)

    monkeypatch.setattr(exact, "run_cell", breaks)
    config = replace(EXACT, output_dir=str(tmp_path), seeds=1)
    message = rf"{broken}/seed-0 failed \(RuntimeError: no luck\).*failures\.txt has the traces"
    with pytest.raises(DataError, match=message):
        run_compare(config)
    assert "mix_4" in (tmp_path / "report.html").read_text("utf-8")
    assert "Traceback" in (tmp_path / "failures.txt").read_text("utf-8")
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(exact, "run_cell", run_cell)
    run_compare(config)
    assert (tmp_path / "summary.json").exists()
    assert not (tmp_path / "failures.txt").exists()


def test_a_method_that_became_another_is_refused_not_shown_with_old_numbers(tmp_path: Path):
    config = replace(EXACT, output_dir=str(tmp_path), seeds=1)
    run_compare(config)
    relabelled = config.methods | {"mean": replace(config.methods["mean"], label="another name")}
    run_compare(replace(config, methods=relabelled))
    redefined = config.methods | {"mean": replace(CLOSED, reward="random")}
    with pytest.raises(DataError, match=r"mean/seed-0 failed .*method\.reward='learned'"):
        run_compare(replace(config, methods=redefined))


def test_recorded_answers_that_change_are_not_compared_with_old_ones(tmp_path: Path):
    file = tmp_path / "answers.jsonl"

    def write(gold: list[float]) -> None:
        rows = [{"prompt": f"p{i}", "completions": ["a", "b b"], "gold": gold} for i in range(3)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write([0.0, 1.0])
    config = CompareConfig(
        output_dir=str(tmp_path / "out"),
        world="recorded",
        recorded=RecordedWorld(file=str(file)),
        methods={"single": Method(reward="length", optimiser="best_of_n")},
        seeds=1,
        processes=1,
    )
    assert run_compare(config)["metrics"] == {"single": {"gold": 1.0}}
    write([0.0, 0.25])
    with pytest.raises(DataError, match=r"single/seed-0 failed .*inputs"):
        run_compare(config)
    with pytest.raises(DataError, match="Seeds change nothing about recorded answers"):
        run_compare(replace(config, seeds=2))
