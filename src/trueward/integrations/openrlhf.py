"""Our rewards inside OpenRLHF: `--reward.remote_url reward.py`, a file with `reward_func`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trueward import objectives
from trueward.models.reward_function import Reward, posterior_function
from trueward.posterior import RewardPosterior


def openrlhf_reward_function(
    reward: Reward, *, objective: Callable[[RewardPosterior], Tensor] = objectives.mean
) -> Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, object]]:
    """Return `reward_func(queries, prompts, labels)` for a reward file.

    Queries are prompt and response as one decoded text. The executor does not survive a missing
    reward, so one that is not finite becomes the batch's lowest finite one (0 if there is none).

    Args:
        reward: A reward model, several, or a plain function.
        objective: Turns their posterior into the reward.
    """
    posterior_of = posterior_function(reward)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]
    ) -> dict[str, object]:
        del labels  # the dataset's answers: ours needs none
        completions = [q.removeprefix(p) for q, p in zip(queries, prompts, strict=True)]
        posterior = posterior_of(list(prompts), completions)
        rewards = objective(posterior)
        finite = rewards.isfinite()
        lowest = rewards[finite].min() if finite.any() else torch.tensor(0.0)
        rewards = torch.where(finite, rewards, lowest)
        return {
            "rewards": rewards,
            "scores": rewards,
            "extra_logs": {"reward_member_std": posterior.std},
        }

    return reward_func
