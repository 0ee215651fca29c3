"""Each trainer's protocol, called as that trainer calls it."""

import math

import pytest
import torch

from trueward import objectives
from trueward.data.formats import DataError
from trueward.integrations.openrlhf import openrlhf_reward_function
from trueward.integrations.trl import trl_reward_function
from trueward.integrations.verl import verl_compute_score
from trueward.posterior import RewardPosterior


def posterior_of(prompts: list, completions: list) -> RewardPosterior:
    lengths = torch.tensor([float(len(c)) for c in completions])
    return RewardPosterior(torch.stack([lengths, lengths + 2], 1))


def test_trl_gets_a_list_of_floats_and_the_spread():
    logged: dict[str, float] = {}
    function = trl_reward_function(posterior_of, objective=objectives.worst_case)
    rewards = function(
        prompts=["a", "b"],
        completions=["xy", "z"],
        completion_ids=[[1], [2]],
        log_metric=logged.__setitem__,
    )
    assert rewards == [2.0, 1.0]
    assert logged == {"reward_member_std": 1.0}


def test_openrlhf_gets_the_response_without_its_prompt_and_only_finite_numbers():
    seen: list[str] = []

    def reward(prompts: list, completions: list) -> list[float]:
        seen.extend(completions)
        return [3.0, math.nan, 5.0]

    answer = openrlhf_reward_function(reward)(["p one", "q two", "r three"], ["p ", "q ", "r "], [])
    assert seen == ["one", "two", "three"]
    assert answer["rewards"].tolist() == [3.0, 3.0, 5.0]


def test_verl_scores_one_sample_with_the_prompt_from_extra_info():
    score = verl_compute_score(posterior_of)
    assert score("s", "four", None, {"prompt": "p"}) == {"score": 5.0, "reward_member_std": 1.0}
    with pytest.raises(DataError, match="extra_info"):
        score("s", "four", None)
