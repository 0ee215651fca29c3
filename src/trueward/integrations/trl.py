"""Our rewards inside TRL's GRPO and RLOO trainers."""

from collections.abc import Callable, Sequence

from torch import Tensor

from trueward import objectives
from trueward.data.formats import Completion, Prompt
from trueward.models.reward_function import Reward, posterior_function
from trueward.posterior import RewardPosterior


def trl_reward_function(
    reward: Reward, *, objective: Callable[[RewardPosterior], Tensor] = objectives.mean
) -> Callable[..., list[float]]:
    """Return a `reward_funcs` entry: `fn(prompts=, completions=, **columns) -> list[float]`.

    Where the trainer hands a `log_metric` function, the mean spread between members is logged.

    Args:
        reward: A reward model, several, or a plain function.
        objective: Turns their posterior into the reward.
    """
    posterior_of = posterior_function(reward)

    def trueward_reward(
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        log_metric: Callable[[str, float], object] | None = None,
        **columns: object,
    ) -> list[float]:
        del columns  # the dataset's other columns: ours needs none
        posterior = posterior_of(prompts, completions)
        if log_metric is not None and posterior.members > 1:
            log_metric("reward_member_std", posterior.std.mean().item())
        rewards: list[float] = objective(posterior).tolist()
        return rewards

    return trueward_reward
