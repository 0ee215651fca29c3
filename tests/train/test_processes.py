"""Two processes under torchrun are really two, and give the numbers of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from trueward.data.formats import PreferenceRow
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.testing import *
from trueward.train.alarm import AlarmConfig
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from accelerate import PartialState

out = sys.argv[1]
state = PartialState(cpu=True)
open(f"{out}.{state.process_index}.{state.num_processes}", "w").close()
tokenizer = tiny_tokenizer()
size = len(tokenizer)
model = RewardModel.from_backbone(tiny_backbone(vocab_size=size), tokenizer, members=2)
rows = [PreferenceRow(*row) for row in tiny_preferences(24)]
train_reward(
    model,
    rows,
    RewardConfig(learning_rate=1e-3, batch_size=8, progress=False),
    output_dir=out + "/r",
)
for algorithm in ("rloo", "ppo"):
    policy = Policy(tiny_language_model(vocab_size=size), tokenizer)
    config = PolicyConfig(
        algorithm=algorithm, steps=2, prompts_per_step=4, max_new_tokens=6, learning_rate=1e-3,
        progress=False,
    )
    train_policy(
        policy, model, tiny_texts(6), config, output_dir=out + "/" + algorithm,
        alarm=AlarmConfig(action="log"),
    )
"""


def run(folder: Path, processes: int) -> list[str]:
    """Run the script; return the marks that its processes left."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = folder / str(processes)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, str(script), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted(p.name for p in folder.glob(f"{processes}.*"))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path):
    assert run(tmp_path, 1) == ["1.0.1"]
    assert run(tmp_path, 2) == ["2.0.2", "2.1.2"]
    for stage in ("r", "rloo", "ppo"):
        one, two = (
            [
                json.loads(line)
                for line in (tmp_path / n / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for n in ("1", "2")
        )
        assert len(one) == len(two) > 1
        assert stage == "r" or "alarm/drift" in one[0]
        for a, b in zip(one, two, strict=True):
            for key in a.keys() - {"stage"}:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (stage, a["step"], key)
