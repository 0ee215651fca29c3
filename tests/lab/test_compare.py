"""A comparison end to end at the smallest sizes, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trueward.data.sources import DataError
from trueward.lab.compare import (
    CompareConfig,
    cell_folder,
    cell_tasks,
    check,
    long_steps,
    read_methods,
    run_compare,
)
from trueward.lab.demo import METHODS, DemoConfig, run_demo
from trueward.lab.exact import ExactWorld
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import LanguageConfig
from trueward.lab.methods import Method
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


def test_the_exact_world_compared(tmp_path: Path):
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


def test_the_demo_is_a_comparison_of_one_seed(tmp_path: Path):
    config = DemoConfig(output_dir=str(tmp_path), seed=3, processes=1, world=WORLD, language=TINY)
    summary = run_demo(config)
    assert list(summary["metrics"]) == list(METHODS)
    assert summary["seed"] == 3


def test_a_long_run_is_a_multiple_of_the_steps_at_which_the_baseline_peaks(tmp_path: Path):
    config = CompareConfig(
        output_dir=str(tmp_path),
        methods={"single": Method()},
        seeds=2,
        language=LanguageConfig(steps=20, evaluate_every=5, long=4.0),
    )
    curves = {0: [0.0, 3.0, 2.0, 1.0, 0.0], 1: [0.0, 1.0, 4.0, 1.0, 0.0]}  # mean peaks at 10
    for seed, gold in curves.items():
        _finished_cell(tmp_path / "scout" / "single" / f"seed-{seed}", seed, gold)
    assert long_steps(config, tmp_path) == 40
    assert long_steps(replace(config, language=replace(config.language, long=1.3)), tmp_path) == 15


def test_a_baseline_that_has_not_peaked_leaves_the_length_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = CompareConfig(
        output_dir=str(tmp_path),
        methods={"single": Method()},
        seeds=1,
        language=LanguageConfig(steps=20, evaluate_every=5, long=4.0),
    )
    _finished_cell(tmp_path / "scout" / "single" / "seed-0", 0, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert long_steps(config, tmp_path) == 20
    assert "has not peaked within 20 steps" in caplog.text


def _finished_cell(folder: Path, seed: int, gold: list[float]) -> None:
    folder.mkdir(parents=True)
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
        ({"methods": {"single": Method()}}, "'exact' has no optimiser 'rloo', only closed_form"),
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


def test_every_recipe_of_a_comparison_parses():
    from trueward.config import parse

    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("compare_*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        check(parse(CompareConfig, ["--config", str(recipe)], command="compare"))


def test_a_failing_cell_is_named_and_the_others_are_reported(tmp_path: Path):
    methods = {"single": CLOSED, "many": Method(optimiser="closed_form", members=9)}  # only 5
    config = replace(EXACT, methods=methods, output_dir=str(tmp_path), seeds=1)
    with pytest.raises(DataError, match=r"many/seed-0 failed \(.*failures\.txt has the traces"):
        run_compare(config)
    assert (tmp_path / "report.html").exists()
    assert "Traceback" in (tmp_path / "failures.txt").read_text("utf-8")
    assert not (tmp_path / "summary.json").exists()
