"""Two processes under torchrun are really two, and give the numbers of one, sharded or not."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trueward.testing import tiny_preferences, tiny_texts
from trueward.train.families import FamilyConfig, train_family
from trueward.train.loop import Loop, LoopConfig
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import write_text

SCRIPT = Path(__file__).with_name("runs_of_processes.py")
runs = SimpleNamespace(**runpy.run_path(str(SCRIPT)))

# Sums in another order differ by rounding, and a step of Adam passes some of that on.
NUMBERS: dict[str, float] = {"rel": 1e-4, "abs": 1e-5}
WEIGHTS = 1e-5


class Two(NamedTuple):
    """What two processes left."""

    folder: Path
    found: list[dict[str, Any]]


def torchrun(*arguments: str, processes: int = 2) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def files_of_commands(folder: Path) -> tuple[Path, Path, Path]:
    """Write what the commands read: a policy, preferences and prompts."""
    folder.mkdir()
    runs.new_policy().save_pretrained(folder / "policy")
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, row, strict=True)) for row in tiny_preferences(9)]
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": text} for text in tiny_texts(4)]
    write_text(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in asked))
    return folder / "policy", folder / "pairs.jsonl", folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """One start of two processes, which costs most of these tests' time."""
    out = tmp_path_factory.mktemp("two")
    writer, pairs, prompts = map(str, files_of_commands(out / "inputs"))
    runs.killed("reward", out / "killed_in_one", after=3)
    reward = ["reward", "--preferences", pairs, "--backbone", writer]
    reward += ["--train.batch_size", "3", "--train.progress", "False"]
    policy = ["policy", "--policy", writer, "--reward", str(out / "r"), "--prompts", prompts]
    policy += ["--train.steps", "1", "--train.prompts_per_step", "3"]
    policy += ["--train.max_new_tokens", "4", "--train.progress", "False"]
    sharded = ["--train.sharding", "full"]
    commands = {
        "reward": [*reward, *sharded, "--output_dir", str(out / "r")],
        "policy": [*policy, *sharded, "--output_dir", str(out / "p")],
        "deep": [*reward, "--family", "deep", "--output_dir", str(out / "d")],
        "sample": ["sample", "--policy", writer, "--prompts", prompts, "--output", str(out / "s")],
    }
    torchrun(str(SCRIPT), str(out), json.dumps(commands))
    return Two(out, [json.loads((out / f"found.{rank}.json").read_text()) for rank in (0, 1)])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in this process."""
    out = tmp_path_factory.mktemp("one")
    for name, run in runs.RUNS.items():
        run(out / name)
    return out


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(
    found: Path, wanted: Path, *, close: dict[str, float] = NUMBERS, weight: float = WEIGHTS
) -> None:
    numbers, expected = metrics(found), metrics(wanted)
    assert len(numbers) == len(expected) > 1
    for a, b in zip(numbers, expected, strict=True):
        # Where weights are sharded there is no alarm.
        watched = any(key.startswith("alarm/") for key in a)
        assert a.keys() == {key for key in b if watched or not key.startswith("alarm/")}
        for key in a.keys() - {"stage"}:
            assert a[key] == pytest.approx(b[key], **close), (a["step"], key)
    saved, right = weights(found), weights(wanted)
    assert saved.keys() == right.keys()
    for name in saved:
        torch.testing.assert_close(saved[name], right[name], atol=weight, rtol=0, msg=name)


def test_two_processes_are_really_two_and_only_the_first_writes(two: Two):
    for found in two.found:
        held = [found[f"{mode}/ppo"]["policy"] for mode in ("none", "full")]
        assert [h["processes"] for h in held] == [2, 2]
    assert (two.folder / "full.0").is_dir()
    assert not (two.folder / "full.1").exists()


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", runs.RUNS)
def test_two_processes_give_the_numbers_and_weights_of_one(
    two: Two, one: Path, mode: str, name: str
):
    assert_same_run(two.folder / f"{mode}.0" / name, one / name)
    watched = (mode, name) == ("none", "rloo")
    assert ("alarm/drift" in metrics(two.folder / f"{mode}.0" / name)[0]) == watched


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three")
    torchrun(str(SCRIPT), str(out), processes=3)
    return out


@pytest.fixture(scope="module")
def more_in_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("more")
    for name, run in runs.MORE.items():
        run(out / name)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("name", runs.RUNS | runs.MORE)
def test_three_processes_give_the_numbers_of_one(
    three: Path, one: Path, more_in_one: Path, mode: str, name: str
):
    wanted = (one if name in runs.RUNS else more_in_one) / name
    if "bf16" in name:  # sharded layers hold their norms' weights in bfloat16 while they compute
        close = {"rel": 0.05, "abs": 0.05}
        assert_same_run(three / f"{mode}.0" / name, wanted, close=close, weight=1e-3)
    else:
        assert_same_run(three / f"{mode}.0" / name, wanted)


def test_the_tolerance_of_weights_is_far_below_what_training_moves(one: Path):
    start = dict(runs.new_policy(tie_word_embeddings=True).model.named_parameters())
    moved = [(w - start[k]).abs().max().item() for k, w in weights(one / "ppo").items()]
    assert min(moved) > 100 * WEIGHTS


@pytest.mark.parametrize("name", runs.RUNS)
def test_each_process_keeps_half_of_weights_gradients_and_optimiser_states(two: Two, name: str):
    for rank in (0, 1):
        for module, held in two.found[rank][f"full/{name}"].items():
            # An odd number of rows, a vector of one number: not to the last number.
            assert held["kept"] == pytest.approx(held["all"] / 2, rel=0.02), module
            assert held["gradients"] == pytest.approx(held["trained"] / 2, rel=0.02)
            assert held["state"] == pytest.approx(held["trained"], rel=0.02)  # two moments
            assert held["lent"] == 0
    for held in two.found[0][f"none/{name}"].values():
        assert held["kept"] == held["all"]
        assert held["state"] == 2 * held["trained"]


def test_the_reference_and_the_critic_are_sharded_too(two: Two):
    assert set(two.found[0]["full/ppo"]) == {"policy", "critic", "ref"}
    assert two.found[0]["full/ppo"]["ref"]["trained"] == 0
    lora = two.found[0]["full/rloo"]
    assert set(lora) == {"policy"}
    assert 0 < lora["policy"]["trained"] < lora["policy"]["all"] / 2


@pytest.mark.parametrize(("name", "folder"), [("reward", "killed"), ("ppo", "killed_ppo")])
def test_one_process_goes_on_from_a_checkpoint_of_two_sharded_ones(
    two: Two, one: Path, name: str, folder: str
):
    assert not (two.folder / folder / "summary.json").exists()
    assert len(list((two.folder / folder).glob("checkpoint-*"))) == 1
    runs.RUNS[name](two.folder / folder)  # sharding=none: it may change until the resume
    assert_same_run(two.folder / folder, one / name)


def test_two_sharded_processes_go_on_from_a_checkpoint_of_one(two: Two, one: Path):
    assert_same_run(two.folder / "killed_in_one", one / "reward")


def test_gradients_are_added_up_in_few_messages_to_the_last_bit(two: Two):
    assert [found["sums"] for found in two.found] == [[], []]


def test_the_commands_run_in_two_processes_of_which_the_first_speaks(two: Two):
    first, second = (found["commands"] for found in two.found)
    for name in ("reward", "policy"):
        assert first[name][0] == second[name][0] == 0, (first[name], second[name])
        assert first[name][1] != ""
        assert second[name][1] == ""
    assert "9 rows read" in first["reward"][1]
    assert weights(two.folder / "r")["score.weight"].shape == (1, 16)
    assert "lm_head.weight" in weights(two.folder / "p")


def test_what_cannot_run_in_several_processes_says_so(two: Two):
    code, said = two.found[0]["commands"]["sample"]
    assert code == 2
    assert "sample runs in one process, and torchrun started 2" in said
    code, said = two.found[0]["commands"]["deep"]
    assert code == 2
    assert "family=deep is trained in one process" in said


def test_a_family_that_cannot_be_sharded_is_refused_before_it_is_trained(tmp_path: Path):
    config = RewardConfig(sharding="full")
    with pytest.raises(ValueError, match="sharding=full is for family=single or heads"):
        train_family(lambda **_: None, [], FamilyConfig(family="brme"), config, output_dir=tmp_path)  # type: ignore[arg-type,return-value]
    assert not list(tmp_path.iterdir())


def test_a_loop_that_was_not_made_for_it_refuses_to_shard():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="of the stage 'line': leave sharding out"):
        Loop(LoopConfig(sharding="full"), total_steps=1, modules={"m": model}, stage="line")
