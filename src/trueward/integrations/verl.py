"""Our rewards inside verl: `reward.custom_reward_function.{path,name}`."""

from collections.abc import Callable, Mapping

from torch import Tensor

from trueward import objectives
from trueward.data.formats import DataError, Prompt
from trueward.models.reward_function import Reward, posterior_function
from trueward.posterior import RewardPosterior


def verl_compute_score(
    reward: Reward, *, objective: Callable[[RewardPosterior], Tensor] = objectives.mean
) -> Callable[..., dict[str, float]]:
    """Return `compute_score(data_source, solution_str, ground_truth, extra_info)`.

    verl scores one sample a call and hands no prompt: put it into the data's `extra_info` under
    `prompt`, as a string or as messages.

    Args:
        reward: A reward model, several, or a plain function.
        objective: Turns their posterior into the reward.
    """
    posterior_of = posterior_function(reward)

    def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: object,
        extra_info: Mapping[str, Prompt] | None = None,
    ) -> dict[str, float]:
        del data_source, ground_truth  # ours needs neither
        if not extra_info or "prompt" not in extra_info:
            raise DataError("verl's row has no extra_info['prompt']: add it to the parquet data.")
        posterior = posterior_of([extra_info["prompt"]], [solution_str])
        return {
            "score": objective(posterior).item(),
            "reward_member_std": posterior.std.item(),
        }

    return compute_score
