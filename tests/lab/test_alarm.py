"""`trueward alarm` on stored runs, and cells that are watched."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from trueward.cli import main
from trueward.config import parse
from trueward.data.sources import DataError
from trueward.evaluate.alarm import judge, summarise_outcomes, true_peak
from trueward.lab.alarm import AlarmStudyConfig, WatchedWorld, read_runs, read_world, run_alarm
from trueward.lab.exact_path import ExactPaths
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import LanguageConfig
from trueward.lab.methods import Method
from trueward.lab.plan import MAY_CHANGE, CompareConfig, cell_tasks, check
from trueward.train.alarm import SIGNALS, STOP, WARN, Calibration
from trueward.train.run_folder import RunFolder


def write_cell(
    out: Path, method: str, seed: int, *, reward: str = "learned", optimiser: str = "rloo"
) -> None:
    """Write a cell as `compare` leaves it: gold that falls from place 20 on unless it is reward."""
    cell = out / "cells" / method / f"seed-{seed}"
    (cell / "training").mkdir(parents=True)
    falls = reward != "gold"
    made_of = {"stage": {"method": {"reward": reward, "optimiser": optimiser}}}
    (cell / "config.yaml").write_text(yaml.safe_dump(made_of))
    gold = [0.05 * p if p <= 20 or not falls else 1.0 - 0.5 * (p - 20) for p in range(0, 41, 2)]
    points = [{"step": 2.0 * i, "gold": g} for i, g in enumerate(gold)]
    (cell / "result.json").write_text(json.dumps({"points": points}))
    (cell / "evaluations").mkdir()
    for point in points:  # two answers to each of two prompts, of which the first ones are kept
        found = {"point": point, "gold": [point["gold"] + 0.2, point["gold"]]}
        (cell / "evaluations" / f"{int(point['step']):06d}.json").write_text(json.dumps(found))
    rows = []
    for p in range(40):
        wiggle = 0.1 * ((7 * p + seed) % 5)
        jump = wiggle + (3.0 if falls and p >= 18 else 0.0)
        row = {
            "step": p + 1,
            "reward": 1.0,
            "alarm/spread": jump,
            "alarm/kl": float(p * (1 + seed % 3)),
        }
        rows.append(json.dumps(row | {"alarm/gain": 0.1 * p} if p else row))
    (cell / "training" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (cell / "summary.json").write_text("{}")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    out = tmp_path / "runs"
    out.mkdir()
    (out / "config.yaml").write_text(
        yaml.safe_dump(
            {"methods": {"single": {}, "gold": {}}, "language": {"evaluation_samples": 2}},
            sort_keys=False,
        )
    )
    for seed in range(5):
        write_cell(out, "single", seed)
        write_cell(out, "gold", seed, reward="gold")
    write_cell(out, "bon", 0, optimiser="best_of_n")
    write_cell(out, "earlier", 0)  # of a call with other methods
    return out


def test_runs_are_read_from_finished_cells_of_trained_policies(stored: Path) -> None:
    (stored / "cells" / "single" / "seed-4" / "summary.json").unlink()
    runs = read_runs("w", stored)
    assert [(r.method, r.seed) for r in runs] == [
        *[("single", s) for s in range(4)],
        *[("gold", s) for s in range(5)],
        ("earlier", 0),
    ]
    assert [r.gold_is_reward for r in runs] == [False] * 4 + [True] * 5 + [False]
    assert set(runs[0].signals) == {"spread", "kl"}  # `gain` is not there at every step
    assert runs[1].signals["kl"][:3] == [0, 2, 4]
    assert true_peak(runs[0]).place == 18
    # The others' gold is what is left of the mean over two: m + 0.1 for the first, m - 0.1.
    assert runs[0].halves[2] == pytest.approx((0.3, 0.1))
    assert len(runs[0].halves) == 21


def test_a_signal_that_is_not_finite_is_held_at_its_last_value(
    stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = stored / "cells" / "single" / "seed-0" / "training" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["alarm/kl"], rows[5]["alarm/kl"], rows[6]["alarm/kl"] = math.nan, math.inf, math.nan
    file.write_text("\n".join(map(json.dumps, rows)))
    run = read_runs("w", stored)[0]
    assert run.signals["kl"][:8] == [0, 1, 2, 3, 4, 4, 4, 7]
    assert "'kl' is not finite at every step" in caplog.text


def test_the_study_calibrates_on_some_seeds_and_judges_the_others(
    stored: Path, tmp_path: Path
) -> None:
    worlds = {"w": WatchedWorld(folder=str(stored), calibration_seeds=[0, 1])}
    config = AlarmStudyConfig(output_dir=str(tmp_path / "study"), worlds=worlds)
    summary = run_alarm(config)["metrics"]
    assert summary["runs"] == 6
    assert summary["falling"] == summary["warn/hit"] == 3
    assert summary["warn/early"] == summary["warn/late"] == summary["warn/never"] == 0
    assert summary["gold_as_reward"] == 3
    assert summary["warn/false_alarms"] == summary["stop/false_alarms"] == 0
    study = tmp_path / "study"
    for name in ("warn", "stop"):
        assert list(Calibration.load(study / f"{name}.json").weights) == ["spread"]
    found = json.loads((study / "outcomes.json").read_text())
    kinds = ["alarm", "alarm, KL alone", "alarm, members alone", "KL budget"]
    kinds += ["KL budget, no bound", "fixed steps"]
    for aim in ("warn", "stop"):
        assert list(found["judged"][aim]) == kinds
        assert list(found["rules"]["w"][aim]) == kinds
        for kind in kinds:
            assert {(o["method"], o["seed"]) for o in found["judged"][aim][kind]} == {
                (m, s) for m in ("single", "gold") for s in (2, 3, 4)
            }
            assert len(found["calibration"][aim][kind]) == 5
        rules = {kind: found["rules"]["w"][aim][kind]["rule"] for kind in kinds}
        assert rules["KL budget"]["unit"] == rules["KL budget, no bound"]["unit"] == "raw"
        assert rules["alarm, KL alone"]["weights"] == {"kl": 1.0}
        assert rules["alarm, KL alone"]["unit"] != "raw"
    assert rules["fixed steps"] == 18
    # Of two gold runs a bound of a tenth allows none; without one the budget is free to stop both.
    budgets = [found["rules"]["w"]["stop"][k]["false_alarms"] for k in kinds[3:5]]
    assert budgets[0] == 0
    assert budgets[1] > 0
    table = (study / "table.md").read_text()
    three = "0 of 3 | 3 of 3 | 0 of 3 | 0 of 3 | 100 ± 0 "
    assert f"| alarm | {three}| 100 ± 0 | 0 of 3 |" in table
    assert f"| w | single | 3 | 3 | {three}| 3 of 3 |" in table
    assert "gold of half the answers |  |  |  |  | 100 ± 0 | 100 ± 0 |" in table
    assert (study / "figures" / "gold_and_alarm.png").stat().st_size > 1000
    page = (study / "report.html").read_text()
    assert "<svg" in page
    assert "in the calibration: 2. A bound of 10 % on false alarms allows none" in page
    run_alarm(config)  # the same folder again


def test_stored_runs_give_the_same_study_and_its_page(stored: Path, tmp_path: Path) -> None:
    for seed in range(5):  # a stage within a stage is not counted twice
        cell = stored / "cells" / "single" / f"seed-{seed}"
        (cell / "summary.json").write_text('{"seconds": 30.0}')
        (cell / "training" / "summary.json").write_text('{"seconds": 29.0}')
    (stored / "environment.json").write_text('{"revision": "0123456789"}')
    world = WatchedWorld(folder=str(stored), calibration_seeds=[0, 1], command="make them")
    kept, page = tmp_path / "docs" / "kept", tmp_path / "docs" / "alarm.md"
    first = AlarmStudyConfig(
        output_dir=str(tmp_path / "a"), worlds={"w": world}, store=str(kept), page=str(page)
    )
    found = run_alarm(first)
    text = page.read_text()
    assert "| w | make them | 0 to 4 | 11 | 2 | 0123456 |" in text  # minutes: 5 x 30 s
    three = "0 of 3 | 3 of 3 | 0 of 3 | 0 of 3 | 100 ± 0 "
    assert f"| alarm | {three}| 100 ± 0 | 0 of 3 |" in text
    assert "Gold falls where it ends more than 0.25 below" in text
    assert (page.parent / "figures" / "alarm.png").stat().st_size > 1000
    again = AlarmStudyConfig(
        output_dir=str(tmp_path / "b"),
        worlds={"w": replace(world, folder=str(kept / "w.json"))},
        page=str(page),
    )
    assert run_alarm(again)["metrics"] == found["metrics"]
    assert page.read_text() == text
    assert (tmp_path / "a" / "runs.md").read_text() == (tmp_path / "b" / "runs.md").read_text()


def test_a_file_that_holds_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.json cannot be read"):
        read_world("w", tmp_path / "nowhere.json")
    for text in ("[]", "{}", '{"runs": [{"method": "a"}]}', "no JSON"):
        (tmp_path / "w.json").write_text(text)
        with pytest.raises(DataError, match=r"w.json holds no watched runs"):
            read_world("w", tmp_path / "w.json")


def test_the_exact_world_is_in_no_row_with_others(stored: Path, tmp_path: Path) -> None:
    worlds = {"w": WatchedWorld(folder=str(stored), calibration_seeds=[0, 1])}
    config = AlarmStudyConfig(
        output_dir=str(tmp_path / "study"),
        worlds=worlds,
        exact=ExactPaths(seeds=1, steps=12),
        signals=["spread", "kl"],
    )
    alone = AlarmStudyConfig(output_dir=str(tmp_path / "alone"), worlds=worlds)
    assert run_alarm(config)["metrics"] | {"candidates": 0} == (
        run_alarm(alone)["metrics"] | {"candidates": 0}
    )
    inside, outside = (tmp_path / "study" / "table.md").read_text().split("Tables of another kind")
    assert inside.strip() == (tmp_path / "alone" / "table.md").read_text().strip()
    assert "| exact | single | 1 |" in outside
    assert "KL and the log-probability are of one response among all" in outside
    assert "all embedded worlds" not in outside
    assert "half the answers" not in outside


def test_a_study_without_either_part_is_refused(stored: Path, tmp_path: Path) -> None:
    def study(**options: Any) -> None:
        worlds = {"w": WatchedWorld(folder=str(stored), **options)}
        run_alarm(AlarmStudyConfig(output_dir=str(tmp_path / "study"), worlds=worlds))

    with pytest.raises(DataError, match="0 runs are for the calibration and 11 for the judgement"):
        study()
    with pytest.raises(DataError, match="11 runs are for the calibration and 0"):
        study(calibration_seeds=list(range(5)))
    with pytest.raises(DataError, match="nothing to read"):
        run_alarm(AlarmStudyConfig(output_dir=str(tmp_path / "study")))
    with pytest.raises(DataError, match="holds no comparison"):
        read_runs("w", tmp_path / "nowhere")
    shutil.rmtree(stored / "cells")
    with pytest.raises(DataError, match="no finished cell whose training was watched"):
        read_runs("w", stored)


def test_a_world_that_lacks_the_chosen_signal_gets_an_alarm_of_its_own(
    stored: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(stored, other)
    for file in other.glob("cells/*/*/training/metrics.jsonl"):
        file.write_text(file.read_text().replace("alarm/spread", "alarm/width"))
    worlds = {
        "w": WatchedWorld(folder=str(stored), calibration_seeds=[0, 1]),
        "v": WatchedWorld(folder=str(other)),
    }
    config = AlarmStudyConfig(output_dir=str(tmp_path / "study"), worlds=worlds)
    run_alarm(config)
    assert list(Calibration.load(tmp_path / "study" / "stop.json").weights) == ["spread"]
    # All that both have is the KL, which knows little: it is used all the same, and said.
    for aim in ("warn", "stop"):
        own = Calibration.load(tmp_path / "study" / f"{aim}_v.json")
        assert list(own.weights) == ["kl"]
    found = json.loads((tmp_path / "study" / "outcomes.json").read_text())
    assert found["rules"]["v"]["stop"]["alarm"]["rule"]["weights"] == {"kl": 1.0}
    assert found["rules"]["w"]["stop"]["alarm"]["rule"]["weights"] == {"spread": 1.0}
    # A kind that a world has nothing for is not judged there.
    kinds = found["judged"]["stop"]
    assert {o["world"] for o in kinds["alarm"]} == {"w", "v"}
    assert {o["world"] for o in kinds["alarm, members alone"]} == {"w"}
    assert "In v: " in (tmp_path / "study" / "report.html").read_text()
    alone = AlarmStudyConfig(output_dir=str(tmp_path / "b"), worlds=worlds, signals=["spread"])
    with pytest.raises(DataError, match="No alarm can be calibrated"):
        run_alarm(alone)


def test_options_of_the_study_are_checked() -> None:
    with pytest.raises(ValueError, match="'joy' is no signal"):
        AlarmStudyConfig(signals=["joy"])
    with pytest.raises(ValueError, match="max_false_alarms is a share"):
        AlarmStudyConfig(max_false_alarms=1.5)
    with pytest.raises(ValueError, match="window must be at least 2"):
        AlarmStudyConfig(window=1)


def test_the_recipes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    monkeypatch.chdir(tmp_path)
    runs = str(recipes / "alarm_runs.yaml")
    kinds = ["calibration", "main", "more", "noisy", "lengthy", "misspecified", "covered"]
    kinds += ["slower", "faster"]
    seeds: dict[str, set[int]] = {}
    for kind in kinds:
        config = parse(CompareConfig, ["--config", runs, "--setting", kind], command="compare")
        check(config)
        assert config.monitor == 5
        assert {"single", "mix", "gold"} <= set(config.methods)
        seeds[kind] = set(config.all_seeds)
    study = parse(
        AlarmStudyConfig,
        ["--config", str(recipes / "alarm.yaml"), "--setting", "full"],
        command="alarm",
    )
    assert set(study.worlds["default"].calibration_seeds) == seeds["calibration"]
    assert set(study.worlds["noisy"].calibration_seeds) < seeds["noisy"]
    assert not seeds["calibration"] & seeds["main"]
    assert seeds["slower"] == {700, 701, 702}
    assert seeds["faster"] == {800, 801, 802}
    judged_alone = {"lengthy", "misspecified", "covered", "slower", "faster"}
    assert set(study.worlds) == {"default", "noisy", *judged_alone}
    for name, world in study.worlds.items():
        assert world.folder == f"runs/alarm/{name}"
        assert bool(world.calibration_seeds) == (name not in judged_alone)
    # Read whole, then refused for want of runs: exit code 2 and one sentence.
    assert main(["alarm", "--config", str(recipes / "alarm.yaml"), "--setting", "full"]) == 2


# ---- watched cells -----------------------------------------------------------------------------


def config_of(out: Path, **options: Any) -> CompareConfig:
    sizes = LanguageConfig(
        pairs=30,
        held_out_pairs=10,
        reward_epochs=0.5,
        steps=2,
        prompts_per_step=3,
        completions_per_prompt=2,
        training_prompts=6,
        evaluate_every=1,
        evaluation_prompts=4,
        max_batch_tokens=2048,
    )
    methods = {
        "single": Method(),
        "mean": Method(members=2),
        "gold": Method(reward="gold"),
    }
    chosen: dict[str, Any] = {
        "output_dir": str(out),
        "seeds": 1,
        "processes": 1,
        "methods": methods,
        "grammar": GrammarWorld(demonstrations_count=40, max_new_tokens=8),
        "language": sizes,
    }
    return CompareConfig(**(chosen | options))


def test_a_monitor_s_models_are_trained_for_policies_alone() -> None:
    def members(config: CompareConfig) -> set[str]:
        names = {task.name for task in cell_tasks(config, 2)}
        return {n.split("/")[-1] for n in names if "/rewards/" in n}

    gold = {"gold": Method(reward="gold")}
    assert members(config_of(Path("x"), methods=gold)) == set()
    assert members(config_of(Path("x"), methods=gold, monitor=3)) == {"deep-0", "deep-1", "deep-2"}
    chooses = {"bon": Method(optimiser="best_of_n")}
    assert members(config_of(Path("x"), methods=chooses, monitor=3)) == {"deep-0"}


def test_a_monitor_is_for_worlds_of_language() -> None:
    closed = {"single": Method(optimiser="closed_form")}
    with pytest.raises(DataError, match="monitor is a number of reward models"):
        check(CompareConfig(world="exact", methods=closed, monitor=2))
    with pytest.raises(DataError, match="monitor is a number of reward models"):
        check(config_of(Path("x"), monitor=-1))


def finish(config: CompareConfig) -> None:
    """Do every task of a comparison here, without its page."""
    for task in cell_tasks(config, config.language.steps):
        task.function(*task.arguments)


def test_watched_cells_log_every_signal_and_are_otherwise_the_same(tmp_path: Path) -> None:
    watched, plain = (config_of(tmp_path / n, monitor=m) for n, m in (("watched", 2), ("plain", 0)))
    finish(watched)
    (tmp_path / "watched" / "config.yaml").write_text("methods: {}")
    shutil.copytree(tmp_path / "watched" / "ground", tmp_path / "plain" / "ground")
    shutil.copytree(tmp_path / "watched" / "shared", tmp_path / "plain" / "shared")
    finish(plain)  # on the same ground, as the stages before the cells know no monitor
    runs = {r.method: r for r in read_runs("w", tmp_path / "watched")}
    assert set(runs) == {"single", "mean", "gold"}
    for name, run in runs.items():
        assert set(run.signals) == set(SIGNALS)
        points = [
            json.loads((tmp_path / kind / "cells" / name / "seed-0" / "result.json").read_text())
            for kind in ("plain", "watched")
        ]
        assert points[0]["points"] == points[1]["points"]
    # The mean's own reward is the monitor: what it is optimised by is what is seen.
    file = tmp_path / "watched" / "cells" / "mean" / "seed-0" / "training" / "metrics.jsonl"
    for row in map(json.loads, file.read_text().splitlines()):
        assert row["alarm/spread"] == pytest.approx(row["objective/member_std"])
    assert runs["single"].signals["spread"][0] == pytest.approx(runs["mean"].signals["spread"][0])
    # Cells without a monitor are what they were: no key of it stands in their configuration.
    made_of = (tmp_path / "plain" / "cells" / "gold" / "seed-0" / "config.yaml").read_text()
    assert "monitor" not in made_of
    # Finished cells are not watched afterwards: that is told, not done in silence.
    with pytest.raises(DataError, match="monitor"):
        finish(config_of(tmp_path / "plain", monitor=2))


def test_a_comparison_of_before_monitors_goes_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    RunFolder(tmp_path, command="compare", config=config, free=MAY_CHANGE)
    saved = tmp_path / "config.yaml"
    before = yaml.safe_load(saved.read_text())
    assert before.pop("monitor") == 0
    saved.write_text(yaml.safe_dump(before))
    RunFolder(tmp_path, command="compare", config=config, free=MAY_CHANGE)


def test_the_rules_that_ship_do_on_the_stored_runs_what_the_page_says() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "alarm.md").read_text("utf-8")
    runs = [
        run
        for file in sorted((docs / "evidence" / "alarm").glob("*.json"))
        for run in read_world(file.stem, file).runs
        if not run.gold_is_reward and run.seed not in (100, 101, 102, 103, 300, 301)
    ]
    warned = summarise_outcomes([judge(run, WARN) for run in runs])
    stopped = summarise_outcomes([judge(run, STOP) for run in runs])
    t = warned.timings
    assert (
        f"On {len(runs)} runs of learned rewards that it was not calibrated on, gold falls in "
        f"{warned.falling}: the alarm warns within 20 % of the true peak in {t['hit']} of these, "
        f"early in {t['early']}, late in {t['late']}, never in {t['never']}."
    ) in page
    assert f"leaves gold at {stopped.gold_kept.mean:.2f}; without one" in page
