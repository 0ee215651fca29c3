"""Control rewards: fixed by seed and text, normal, blind to worth."""

import hashlib
import json
from statistics import NormalDist

import pytest
import torch

from trueward.lab.controls import length_reward, random_reward

PROMPTS = [f"prompt {i}" for i in range(5000)]
COMPLETIONS = [f"answer {i % 700}" for i in range(5000)]


def test_noise_is_the_normal_quantile_of_a_hash() -> None:
    digest = hashlib.sha256(json.dumps([3, "p", "c"]).encode()).digest()
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    [reward] = random_reward(["p"], ["c"], seed=3).tolist()
    assert NormalDist().cdf(reward) == pytest.approx(uniform, abs=1e-6)
    # The same on any machine and in any version.
    assert reward == pytest.approx(1.1636767, abs=1e-6)


def test_noise_is_standard_normal() -> None:
    rewards = random_reward(PROMPTS, COMPLETIONS, seed=0)
    assert float(rewards.mean()) == pytest.approx(0, abs=0.05)
    assert float(rewards.std()) == pytest.approx(1, abs=0.03)
    assert float((rewards.abs() < 1).double().mean()) == pytest.approx(0.683, abs=0.02)
    assert len(set(rewards.tolist())) > 4990


def test_equal_texts_tie_and_all_others_are_independent() -> None:
    base = random_reward(PROMPTS, COMPLETIONS, seed=0)
    assert torch.equal(base, random_reward(PROMPTS, COMPLETIONS, seed=0))
    assert torch.equal(base[7:8], random_reward([PROMPTS[7]], [COMPLETIONS[7]], seed=0))
    others = {
        "seed": random_reward(PROMPTS, COMPLETIONS, seed=1),
        "prompt": random_reward([p + " " for p in PROMPTS], COMPLETIONS, seed=0),
        "completion": random_reward(PROMPTS, [c + " " for c in COMPLETIONS], seed=0),
    }
    for name, other in others.items():
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.05, name


def test_prompt_and_completion_do_not_run_together() -> None:
    rewards = random_reward(["ab", "a", "", 'a", "b'], ["c", "bc", "abc", "c"], seed=0)
    assert len(set(rewards.tolist())) == 4


def test_messages_have_the_reward_of_their_text() -> None:
    prompt, completion = ({"role": r, "content": r} for r in ("user", "assistant"))
    assert torch.equal(
        random_reward([[prompt]], [[completion]], seed=0),
        random_reward(["user"], ["assistant"], seed=0),
    )
    assert length_reward([[prompt]], [[completion | {"content": "two words"}]]).tolist() == [2.0]


def test_length_counts_words_of_the_completion_alone() -> None:
    completions = ["", "one", "  two\nwords ", "a b, c"]
    assert length_reward(["many words here"] * 4, completions).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert length_reward([], []).shape == random_reward([], [], seed=0).shape == (0,)
