"""The pipeline on made data: every stage in its folder, and a killed run like an unbroken one."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trueward.pipeline.inputs as inputs_of
import trueward.pipeline.stages as stages
import trueward.refine.spg as spg
from trueward import objectives
from trueward.lab.grammar import GrammarWorld
from trueward.lab.worlds import Annotator
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource
from trueward.options import ObjectiveConfig
from trueward.pipeline import RLPConfig, RLPData, StopConfig, run_rlp
from trueward.posterior import RewardPosterior
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.spg import SPGConfig
from trueward.report.run import report_run
from trueward.sampling import SamplingConfig
from trueward.train.alarm import AlarmConfig
from trueward.train.families import FamilyConfig
from trueward.train.policy import PolicyConfig
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import RunFolder
from trueward.train.sft import SFTConfig

WORLD = GrammarWorld(annotator=Annotator(label_noise=0.0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, preferences, gold and test comparisons of the embedded world, as files."""
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def write(name: str, rows: list[dict]) -> None:
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def comparisons(seed: int, count: int) -> list[dict]:
        prompts = WORLD.prompts(count, seed=seed)
        rows = WORLD.comparisons(
            prompts, [[WORLD.answer(p, rng) for _ in range(2)] for p in prompts], seed=seed
        )
        return [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]

    demonstrations = WORLD.demonstrations(60, seed=1)
    write(
        "demonstrations.jsonl",
        [{"prompt": r.prompt, "completion": r.completion} for r in demonstrations],
    )
    write("preferences.jsonl", comparisons(2, 30))
    write("gold.jsonl", comparisons(3, 30))
    write("test.jsonl", comparisons(4, 12))
    write("prompts.jsonl", [{"prompt": p} for p in WORLD.prompts(40, seed=5)])
    return root


def config_for(files: Path, out: Path) -> RLPConfig:
    return RLPConfig(
        output_dir=str(out),
        data=RLPData(
            demonstrations=str(files / "demonstrations.jsonl"),
            preferences=str(files / "preferences.jsonl"),
            prompts=str(files / "prompts.jsonl"),
            gold_preferences=[str(files / "gold.jsonl")],
            evaluation={"test": str(files / "test.jsonl")},
            evaluation_prompts=6,
        ),
        model=ModelSource(vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=256),
        family=FamilyConfig(family="heads", members=2),
        objective=ObjectiveConfig(name="reward_robust"),
        sft=SFTConfig(learning_rate=1e-2, epochs=2.0, batch_size=16, checkpoint_every=1),
        reward=RewardConfig(learning_rate=1e-2, batch_size=8, max_length=256, checkpoint_every=1),
        policy=PolicyConfig(
            steps=3,
            prompts_per_step=4,
            completions_per_prompt=2,
            max_new_tokens=8,
            learning_rate=1e-3,
            checkpoint_every=1,
        ),
        samples=SamplingConfig(n=4, max_new_tokens=8),
        spg=SPGConfig(gamma=0.25),
        uml=MultiViewConfig(latent=4, width=8, prompts_per_batch=2),
    )


@pytest.fixture(scope="module")
def unbroken(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    run_rlp(config_for(files, out))
    return out


def numbers(out: Path) -> dict:
    """A run's metrics without the seconds."""
    metrics = json.loads((out / "summary.json").read_text())["metrics"]
    for stage in metrics["stages"].values():
        del stage["seconds"]
    return metrics


def test_every_stage_has_its_folder_summary_and_numbers(unbroken: Path):
    metrics = numbers(unbroken)
    assert set(metrics["policies"]) == {"SFT", "PPO", "control", "RLP-SPG", "RLP-UML"}
    assert metrics["policies"]["SFT"]["win_rate"] == 0.5
    for stage in ("01_sft", "02_gold", "02_reward", "03_policy", "05_reward_uml_1"):
        assert (unbroken / stage / "model" / "config.json").exists()
        assert stage in metrics["stages"]
    shift = metrics["reward_models_on_policy_samples"]
    assert set(shift) == {f"reward model of {p}" for p in ("PPO", "control", "RLP-SPG", "RLP-UML")}
    assert json.loads((unbroken / "table.json").read_text())["columns"][0] == "policy"
    table = json.loads((unbroken / "shift.json").read_text())
    assert {a["source"] for a in table["accuracies"]} <= set(metrics["policies"])
    assert all(0 <= a["low"] <= a["accuracy"] <= a["high"] <= 1 for a in table["accuracies"])
    page = report_run(unbroken).read_text()
    assert "Where the policy went" in page
    assert metrics["stopped"] == {}
    assert "uml/jsd" in (unbroken / "05_reward_uml_1" / "metrics.jsonl").read_text()
    assert "test.jsonl" in (unbroken / "data.txt").read_text()


def test_a_finished_run_is_loaded_not_done_again(
    files: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "train_sft", None)
    summary = run_rlp(config_for(files, unbroken))
    assert summary["command"] == "rlp"


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_runs_killed_in_every_kind_of_stage_end_with_the_numbers_of_an_unbroken_one(
    files: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trueward.train import loop

    saved = loop.Loop.checkpoint
    deaths = iter([1, 4, 9, 11, 16])  # checkpoints after which the run dies
    count, death = 0, next(deaths)

    def dying(self: loop.Loop) -> None:
        nonlocal count, death
        saved(self)
        count += 1
        if count == death:
            death = next(deaths, 10**9)
            raise KilledError

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    kills = 0
    while True:
        try:
            run_rlp(config_for(files, tmp_path))
            break
        except KilledError:
            kills += 1
    assert kills == 5
    assert numbers(tmp_path) == numbers(unbroken)


def test_the_embedding_is_calibrated_on_one_whole_completion_of_each_prompt(
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[list[str]] = []

    def embed(texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.eye(8)[: len(texts)]

    monkeypatch.setattr(spg, "sentence_transformer", lambda name: embed)
    SPGConfig(equivalence="embedding").build(None, [["a cat", "a dog"], ["a bird"], []])
    assert seen == [["a cat", "a bird"]]


def seed_of_stage(out: Path, stage: str) -> int:
    found: int = json.loads((out / stage / "summary.json").read_text())["seed"]
    return found


def test_methods_differ_by_method_alone_and_rounds_by_their_seed(unbroken: Path, rounds: Path):
    refined = {seed_of_stage(unbroken, f"05_reward_{m}_1") for m in ("control", "spg", "uml")}
    assert len(refined) == 1
    seeds = [seed_of_stage(rounds, f"05_reward_spg_uml_{k}") for k in (1, 2)]
    within = seed_of_stage(rounds, "06_policy_spg_uml_1/refreshed/000002/reward")
    assert len({seed_of_stage(rounds, "02_reward"), *seeds, within}) == 4


def rounds_config(files: Path, out: Path) -> RLPConfig:
    config = config_for(files, out)
    return dataclasses.replace(
        config,
        family=FamilyConfig(),
        methods=["spg_uml"],
        rounds=2,
        data=dataclasses.replace(config.data, gold_preferences=[]),
        policy=dataclasses.replace(config.policy, steps=4, refresh_every=2),
        refresh_prompts=4,
    )


@pytest.fixture(scope="module")
def rounds(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounds")
    run_rlp(rounds_config(files, out))
    return out


def test_rounds_go_from_policy_to_samples_to_reward_to_policy(rounds: Path):
    metrics = numbers(rounds)
    assert set(metrics["policies"]) == {
        "SFT",
        "PPO",
        "RLP-SPG + UML round 1",
        "RLP-SPG + UML round 2",
    }
    for stage in ("04_samples_1", "04_samples_spg_uml_2", "05_preferences_spg_uml_2"):
        assert (rounds / stage / "summary.json").exists()
    logged = (rounds / "05_reward_spg_uml_2" / "metrics.jsonl").read_text()
    assert "uml/jsd" in logged  # both ingredients


def test_the_rewards_of_all_rounds_are_one_ensemble(files: Path, rounds: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(rounds, run)
    for made in [*run.glob("06_*"), *run.glob("07_*"), *run.glob("0[45]_*_2")]:
        shutil.rmtree(made)  # what hangs on the policies' rewards
    for file in ("summary.json", "config.yaml"):
        (run / file).unlink()
    config = rounds_config(files, run)
    policy = dataclasses.replace(config.policy, refresh_every=0)
    with pytest.raises(ValueError, match="cannot watch its own policy"):
        dataclasses.replace(config, alarm=AlarmConfig(action="log"))
    config = dataclasses.replace(config, policy=policy, refresh_prompts=0, ensemble_rounds=True)
    run_rlp(dataclasses.replace(config, alarm=AlarmConfig(action="log")))
    assert "alarm/spread" in (run / "06_policy_spg_uml_1" / "metrics.jsonl").read_text()

    def gap(stage: str) -> float:
        line = (run / stage / "metrics.jsonl").read_text().splitlines()[0]
        return json.loads(line)["objective/gap"]

    # One member has no gap between nominal and worst case; several models have.
    assert gap("03_policy") == 0.0
    assert gap("06_policy_spg_uml_1") > 0.0
    assert gap("06_policy_spg_uml_2") > 0.0


def test_what_is_reported_after_refreshes_is_the_last_reward(rounds: Path):
    config = yaml.safe_load((rounds / "config.yaml").read_text())
    assert config["policy"]["refresh_every"] == 2
    preferences = rounds / "05_preferences_spg_uml_2" / "preferences.jsonl"
    row = json.loads(preferences.read_text().splitlines()[0])
    # The second round's pairs are scored by what the first round's policy ended with.
    folder = rounds / "06_policy_spg_uml_1" / "refreshed" / "000002" / "reward" / "model"
    reward = RewardModel.from_pretrained(folder)
    scored = reward.score([row["prompt"]], [row["chosen"]], normalise=True).mean.item()
    assert scored == pytest.approx(row["chosen_reward"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["uml"], "family": FamilyConfig(family="lora")}, "method=uml learns on one"),
        ({"spg": SPGConfig(rule="reward")}, "spg.rule is what the method says"),
        ({"uml": MultiViewConfig(loss="mvi")}, "uml.loss is what the method says"),
        ({"refresh_prompts": 4}, "refresh_prompts is for policy.refresh_every"),
        ({"samples": SamplingConfig(n=1)}, "samples.n must be at least 2"),
        ({"reward": RewardConfig(seed=7)}, "reward.seed is the run's: set seed"),
        ({"methods": ["uml"], "stop": StopConfig(min_accepted=0.1)}, "none of the methods makes"),
        ({"warm_start": True, "family": FamilyConfig(family="deep")}, "warm_start trains one"),
    ],
)
def test_what_would_fail_or_be_ignored_late_is_refused_early(
    files: Path, tmp_path: Path, changes: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config_for(files, tmp_path), **changes)


def test_ensembles_of_rounds_and_refreshed_rewards_are_alternatives(files: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="choose one of them"):
        dataclasses.replace(rounds_config(files, tmp_path), ensemble_rounds=True)


def test_a_reward_is_refreshed_within_a_policys_run(rounds: Path):
    folder = rounds / "06_policy_spg_uml_1"
    assert (folder / "refreshed" / "000002" / "reward" / "model" / "config.json").exists()
    assert not (folder / "refreshed" / "000004").exists()  # nothing is optimised after the end
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["refreshed_at"] for line in lines] == [0.0, 0.0, 2.0, 2.0]
    assert not (rounds / "03_policy" / "refreshed").exists()  # the first policy is plain PPO


def test_a_run_killed_around_a_refresh_ends_with_the_numbers_of_an_unbroken_one(
    files: Path, rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trueward.train import loop

    saved, kills = loop.Loop.checkpoint, 0

    def dying(self: loop.Loop) -> None:
        nonlocal kills
        saved(self)
        place = (str(self.folder.path).split(str(tmp_path))[-1].strip("/"), self.step)
        deaths = [
            ("06_policy_spg_uml_1/refreshed/000002/reward", 1),  # while the reward is trained
            ("06_policy_spg_uml_1", 3),  # after it, with a policy that has moved on
        ]
        if place in deaths[kills : kills + 1]:
            kills += 1
            raise KilledError

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    for _ in range(3):
        try:
            run_rlp(rounds_config(files, tmp_path))
        except KilledError:
            continue
    assert kills == 2
    assert numbers(tmp_path) == numbers(rounds)


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (StopConfig(min_accepted=0.5), "0.100 of the prompts gave a pair, fewer than 0.5"),
        (StopConfig(max_agreement=0.01), "of the sampled pairs as the last reward did"),
    ],
)
def test_rounds_stop_by_their_rules(
    files: Path, rounds: Path, tmp_path: Path, stop: StopConfig, reason: str
):
    shutil.copytree(rounds, tmp_path / "run")
    for file in ("summary.json", "config.yaml"):
        (tmp_path / "run" / file).unlink()
    pairs = tmp_path / "run" / "05_preferences_spg_uml_1" / "summary.json"
    told = json.loads(pairs.read_text())
    told["metrics"] |= {"accepted": 1, "prompts": 10}
    pairs.write_text(json.dumps(told))
    config = dataclasses.replace(rounds_config(files, tmp_path / "run"), stop=stop)
    run_rlp(config)
    metrics = numbers(tmp_path / "run")
    assert metrics["stopped"]["spg_uml"].startswith("round 1: ")
    assert reason in metrics["stopped"]["spg_uml"]
    assert set(metrics["policies"]) == {"SFT", "PPO"}


def test_agreement_is_that_of_two_rewards_on_the_samples(files: Path, tmp_path: Path):
    # Two of three pairs have the same order; one completion is beyond what a reward can read.
    drawn = [("p", ["a", "bb", "ccc"]), ("q", ["a", "bb", "ccc"])]
    ranks = {"a": 0.0, "bb": 2.0, "ccc": 1.0}

    def reason(limit: float) -> str:
        stop = StopConfig(max_agreement=limit)
        config = dataclasses.replace(
            config_for(files, tmp_path), stop=stop, objective=ObjectiveConfig()
        )

        def lengths(prompts: list, completions: list) -> list[float]:
            return [float(len(c)) for c in completions]

        def other(prompts: list, completions: list) -> list[float | None]:
            pairs = zip(prompts, completions, strict=True)
            return [None if (p, c) == ("q", "a") else ranks[c] for p, c in pairs]

        return stages.reason_to_stop(config, lengths, other, drawn, tmp_path, "spg_1")

    assert reason(0.6) == "it orders 0.667 of the sampled pairs as the last reward did"
    assert reason(0.7) == ""


def test_accuracy_that_falls_stops_the_rounds(files: Path, tmp_path: Path):
    for name, accuracy in (("02_reward", 0.8), ("05_reward_spg_1", 0.7)):
        numbers = {"test/accuracy": accuracy, "held_out/accuracy": 0.0}  # the second a family's own
        RunFolder(tmp_path / name, command="reward").finish(numbers, seed=0)

    def reason(loss: float) -> str:
        stop = StopConfig(max_accuracy_loss=loss)
        config = dataclasses.replace(config_for(files, tmp_path), stop=stop)
        return stages.reason_to_stop(config, len, len, [], tmp_path, "spg_1")

    assert reason(0.05) == (
        "accuracy on the evaluation sets fell from 0.800 to 0.700, by more than 0.05"
    )
    assert reason(0.11) == ""


def test_held_out_prompts_are_in_no_training_data(files: Path, tmp_path: Path):
    config = config_for(files, tmp_path)
    shared = dataclasses.replace(
        config.data, prompts=str(files / "demonstrations.jsonl"), evaluation_prompts=6
    )
    inputs = inputs_of.load_inputs(dataclasses.replace(config, data=shared))
    held_out = {row.prompt[0]["content"] for row in inputs.unlabelled[:6]}
    trained = {row.prompt[0]["content"] for row in inputs.demonstrations}
    assert len(held_out) == 6
    assert not held_out & trained
    assert inputs.reports[0].counts()["in an evaluation set"] >= 6


def test_nothing_is_trained_on_that_is_reported_on(files: Path, tmp_path: Path):
    config = config_for(files, tmp_path)
    leaking = dataclasses.replace(config.data, preferences=str(files / "test.jsonl"))
    with pytest.raises(ValueError, match="preference"):
        run_rlp(dataclasses.replace(config, data=leaking))


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_can_be_named(name: str):
    posterior = RewardPosterior(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, 0.2, 0.1]]))
    reward = ObjectiveConfig(name=name).build()(posterior)  # type: ignore[arg-type]
    known = {"mean": 7 / 3, "median": 2.0, "nominal": 4.0, "worst_case": 1.0}
    known |= {"reward_robust": 0.4 * 4 + 0.6 * 1}
    assert reward.shape == (1,)
    if name in known:
        assert reward.item() == pytest.approx(known[name])
