"""The pipeline on made data: every stage in its folder, and a killed run like an unbroken one."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

import trueward.options as options
import trueward.pipeline as pipeline
from trueward import objectives
from trueward.lab.grammar import GrammarWorld
from trueward.lab.worlds import Annotator
from trueward.models.scratch import ModelSource
from trueward.options import ObjectiveConfig, SPGConfig
from trueward.pipeline import RLPConfig, RLPData, run_rlp
from trueward.posterior import RewardPosterior
from trueward.refine.multiview import MultiViewConfig
from trueward.sampling import SamplingConfig
from trueward.train.policy import PolicyConfig
from trueward.train.reward import RewardConfig
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
        members=2,
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
    assert "uml/jsd" in (unbroken / "05_reward_uml_1" / "metrics.jsonl").read_text()
    assert "test.jsonl" in (unbroken / "data.txt").read_text()


def test_a_finished_run_is_loaded_not_done_again(
    files: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pipeline, "train_sft", None)
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

    monkeypatch.setattr(options, "sentence_transformer", lambda name: embed)
    SPGConfig(equivalence="embedding").build(None, [["a cat", "a dog"], ["a bird"], []])
    assert seen == [["a cat", "a bird"]]


def test_held_out_prompts_are_in_no_training_data(files: Path, tmp_path: Path):
    config = config_for(files, tmp_path)
    shared = dataclasses.replace(
        config.data, prompts=str(files / "demonstrations.jsonl"), evaluation_prompts=6
    )
    inputs = pipeline._load(dataclasses.replace(config, data=shared))
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
