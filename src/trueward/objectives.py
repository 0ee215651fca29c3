"""What to optimise: plain functions from a `RewardPosterior` to one reward per row.

Each objective is defined once, here, and states its ddof where it uses a variance. None is meant
to be differentiated into the reward model: the policy sees the number alone. An objective that
changes over a run is a `RunObjective` around such a function.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trueward.posterior import RewardPosterior


def mean(posterior: RewardPosterior) -> Float[Tensor, " batch"]:
    """The members' mean, `1/K sum_k r_k`."""
    return posterior.mean


def median(posterior: RewardPosterior) -> Float[Tensor, " batch"]:
    """The members' median; of an even number of members, the average of the middle two.

    Eisenstein et al. 2023 (https://arxiv.org/abs/2312.09244).
    """
    # torch.median would give the lower of the middle two.
    return quantile(posterior, level=0.5)


def quantile(posterior: RewardPosterior, *, level: float) -> Float[Tensor, " batch"]:
    """The members' quantile, linear between order statistics: 0 is the minimum, 1 the maximum.

    A dial between `worst_case` and `median`; from `1 / (members - 1)` on, one bad member cannot
    turn it.

    Args:
        posterior: The rewards of the members.
        level: In [0, 1].
    """
    if not 0.0 <= level <= 1.0:
        raise ValueError(f"level must lie in [0, 1], got {level}.")
    if len(posterior) == 0:  # torch.quantile refuses an empty tensor
        return posterior.mean
    return torch.quantile(posterior.means, level, dim=1)


def nominal(posterior: RewardPosterior) -> Float[Tensor, " batch"]:
    """The mean of the member with the lowest std, row by row; without stds, the members' mean.

    `mu_k*` with `k* = argmin_k std_k`. Yan et al. 2024, BRME
    (https://arxiv.org/abs/2409.15360). The first member wins a tie, so that stds which have all
    collapsed to one floor make this a single member's reward: watch `robust_diagnostics`.
    """
    if posterior.stds is None:
        return posterior.mean
    return posterior.means.gather(1, _nominal_member(posterior.stds)[:, None])[:, 0]


def worst_case(posterior: RewardPosterior) -> Float[Tensor, " batch"]:
    """The members' minimum, row by row (WCO). Coste et al. 2023 (https://arxiv.org/abs/2310.02743)."""
    return posterior.means.amin(dim=1)


def reward_robust(
    posterior: RewardPosterior,
    *,
    nominal_weight: float,
    min_level: Literal["sample", "batch"] = "sample",
    nominal_reward: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """The reward-robust mix, `a * nominal + (1 - a) * worst case`, with `a = nominal_weight`.

    Yan et al. 2024, Eq. 7 (https://arxiv.org/abs/2409.15360; known to us from secondary sources,
    which differ on the weight's direction: here 1 is nominal), which takes the minimum over
    members outside the expectation. `"sample"` takes it inside, row by row, which is never above
    Eq. 7; `"batch"` finds the member with the lowest mean over the batch and uses it for every
    row: our reading of Eq. 7 with the batch for the expectation.

    Args:
        posterior: The rewards of the members.
        nominal_weight: In [0, 1]: 1 is `nominal` alone, 0 the worst case alone.
        min_level: Where the minimum over members is taken.
        nominal_reward: Instead of `nominal(posterior)`: the members' mean, say, or the score of
            the single-head model that BRME started from, on the members' scale. Needed where
            `posterior` is an uncertainty set (`lower_bounds`, `sampled`), whose nominal reward is
            that of the posterior it was made from.
    """
    if not 0.0 <= nominal_weight <= 1.0:
        raise ValueError(f"nominal_weight must lie in [0, 1], got {nominal_weight}.")
    if min_level == "sample":
        lowest = worst_case(posterior)
    elif min_level == "batch":
        # nanmean: one row that could not be scored must not choose the member for all others.
        member = posterior.means.nanmean(dim=0).argmin()
        lowest = posterior.means[:, member]
    else:
        raise ValueError(f'min_level must be "sample" or "batch", got {min_level!r}.')
    if nominal_reward is None:
        nominal_reward = nominal(posterior)
    elif nominal_reward.shape != lowest.shape:
        raise ValueError(
            f"nominal_reward must be one reward for each of the {len(posterior)} rows, got the "
            f"shape {tuple(nominal_reward.shape)}."
        )
    return nominal_weight * nominal_reward.to(lowest) + (1 - nominal_weight) * lowest


def lower_bounds(posterior: RewardPosterior, *, coef: float) -> RewardPosterior:
    """The uncertainty set of lower bounds: each member at `mean_k - coef * std_k`, stds kept.

    A posterior like any other, so that `worst_case(lower_bounds(posterior, coef=1.0))` is
    `min_k (mean_k - std_k)`. One of three readings of the set in Yan et al. 2024
    (https://arxiv.org/abs/2409.15360), beside the means themselves and `sampled`. Unlike
    `lower_confidence_bound`, it counts each member's own std, not that between members.

    Args:
        posterior: The rewards of members that have stds.
        coef: At least 0; 0 is the set of means.
    """
    _require_coef(coef)
    stds = _required_stds(posterior, "lower_bounds")
    return RewardPosterior(posterior.means - coef * stds, stds)


def sampled(
    posterior: RewardPosterior, *, generator: torch.Generator | None = None
) -> RewardPosterior:
    """The uncertainty set of draws: each member at one draw from its Gaussian, stds kept.

    See `lower_bounds`. An objective of it is noisy: the same row gets another reward each time.

    Args:
        posterior: The rewards of members that have stds.
        generator: Source of the draws, on the posterior's device.
    """
    return RewardPosterior(posterior.rsample(generator), _required_stds(posterior, "sampled"))


def uncertainty_weighted(posterior: RewardPosterior, *, coef: float) -> Float[Tensor, " batch"]:
    """Mean less the variance between members, `mean - coef * variance` (UWO), with ddof 0.

    Coste et al. 2023 (https://arxiv.org/abs/2310.02743): 0.5 was best for best-of-n, 0.1 in PPO.

    Args:
        posterior: The rewards of the members.
        coef: At least 0; 0 is the plain mean.
    """
    _require_coef(coef)
    return posterior.mean - coef * posterior.variance


def lower_confidence_bound(posterior: RewardPosterior, *, coef: float) -> Float[Tensor, " batch"]:
    """Mean less the std between members, `mean - coef * std`, with ddof 0.

    MEAN_MINUS_STD in Eisenstein et al. 2023 (https://arxiv.org/abs/2312.09244).

    Args:
        posterior: The rewards of the members.
        coef: At least 0; 0 is the plain mean.
    """
    _require_coef(coef)
    return posterior.mean - coef * posterior.std


class RunningMean(NamedTuple):
    """The mean of everything seen so far, and how many numbers that were."""

    mean: float = 0.0
    count: int = 0  # type: ignore[assignment]  # hides tuple.count


def uncertainty_penalised(
    posterior: RewardPosterior, *, coef: float, running: RunningMean
) -> tuple[Float[Tensor, " batch"], RunningMean]:
    """Mean less the std between members, counted from its running mean: UP-RLHF.

    `mean - coef * (u - ubar)`, with `u` the std between members (ddof 0, Eq. 13) and `ubar` the
    mean of `u` over all samples seen so far (Eq. 14). Zhai et al. 2024
    (https://arxiv.org/abs/2401.00243). Here this batch is counted into `ubar` before it is used,
    so that the first batch is penalised by 0 on average and not by all of its uncertainty.

    Within a batch this is `lower_confidence_bound`, moved by a constant: advantages against other
    completions of the prompt (RLOO, GRPO) are the same, PPO's critic is spared the offset.

    Args:
        posterior: The rewards of the members. Rows with a reward that is not finite do not enter
            `ubar`.
        coef: At least 0; 0 is the plain mean.
        running: What the last call returned; `RunningMean()` at first.

    Returns:
        The rewards, and the running mean with this batch in it.
    """
    _require_coef(coef)
    seen = posterior.std[posterior.means.isfinite().all(dim=1)]
    count = running.count + len(seen)
    change = (seen.double() - running.mean).sum().item() / max(1, count)
    running = RunningMean(running.mean + change, count)
    return posterior.mean - coef * (posterior.std - running.mean), running


def entropic(posterior: RewardPosterior, *, temperature: float) -> Float[Tensor, " batch"]:
    """The entropic risk of the members, `-b log mean_k exp(-r_k / b)`, with `b = temperature`.

    The mean as `b` grows, the minimum as it goes to 0; to second order in `1/b` it is
    `uncertainty_weighted` with `coef = 1/(2b)`, but it never falls below the minimum.
    https://arxiv.org/abs/2606.09073.

    Args:
        posterior: The rewards of the members.
        temperature: Positive, in units of reward.
    """
    if not (0.0 < temperature < math.inf):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature}; "
            "its limits are worst_case (0) and mean (infinity)."
        )
    # From the minimum up, in expm1 and log1p: exact for tiny temperatures, where exp overflows,
    # and for huge ones, where logsumexp loses every digit to the factor b.
    lowest = posterior.means.amin(dim=1)
    excess = torch.expm1(-(posterior.means - lowest[:, None]) / temperature)
    return lowest - temperature * torch.log1p(excess.mean(dim=1))


def robust_diagnostics(posterior: RewardPosterior) -> dict[str, float]:
    """What to log beside a robust reward, as means over the rows whose rewards are all finite.

    `gap` is nominal less worst case, never negative; `nominal_member_k` is the share of rows in
    which member `k` has the lowest std (only with stds): equal shares from stds that differ by
    noise alone mean that `nominal` is a random member's reward.

    Returns:
        `objective/` `nominal`, `worst_case`, `gap`, `member_variance` and `member_std` (between
        members, ddof 0), `nonfinite` (the share of rows left out) and `nominal_member_0`...
    """
    finite = posterior.means.isfinite().all(dim=1)
    rows = posterior[finite]
    metrics = {
        "objective/nominal": nominal(rows).mean().item(),
        "objective/worst_case": worst_case(rows).mean().item(),
        "objective/gap": (nominal(rows) - worst_case(rows)).mean().item(),
        "objective/member_variance": rows.variance.mean().item(),
        "objective/member_std": rows.std.mean().item(),
        "objective/nonfinite": (~finite).float().mean().item(),
    }
    if rows.stds is not None:
        chosen = _nominal_member(rows.stds)
        for member in range(rows.members):
            share = (chosen == member).float().mean().item()
            metrics[f"objective/nominal_member_{member}"] = share
    return metrics


def _nominal_member(stds: Float[Tensor, "batch member"]) -> Int[Tensor, " batch"]:
    return stds.argmin(dim=1)


def _required_stds(posterior: RewardPosterior, name: str) -> Float[Tensor, "batch member"]:
    if posterior.stds is None:
        raise ValueError(
            f"{name} needs members with stds, as Gaussian heads have them: these have means alone, "
            "which are the set to use."
        )
    return posterior.stds


def _require_coef(coef: float) -> None:
    if not 0.0 <= coef < math.inf:
        raise ValueError(
            f"coef must be finite and at least 0, got {coef}; a negative one would pay the policy "
            "for uncertainty."
        )


Schedule = Literal["constant", "linear", "cosine"]


def scheduled(start: float, end: float, *, progress: float, schedule: Schedule) -> float:
    """A number on its way over a run: `start` at progress 0, `end` at progress 1.

    `linear` goes evenly; `cosine`, as `(1 - cos(pi progress)) / 2`, leaves and arrives slowly;
    `constant` stays at `start`.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must lie in [0, 1], got {progress}.")
    ways = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
    }
    if schedule not in ways:
        raise ValueError(f"schedule must be one of {', '.join(ways)}, got {schedule!r}.")
    done = ways[schedule]
    return (1 - done) * start + done * end


class RunObjective(nn.Module):
    """An objective that changes over a run, by the run's progress or by what it has seen.

    `train_policy` calls it with `progress`, and puts its buffers into checkpoints. Called as a
    plain objective, without, it is one fixed function: nothing is remembered, and it is the same
    before, during and after a run.
    """

    def forward(
        self, posterior: RewardPosterior, *, progress: float | None = None
    ) -> Float[Tensor, " batch"]:
        """Return the rewards.

        Args:
            posterior: The rewards of the members.
            progress: 0 at a run's first step, 1 at its last; None outside a run.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Return what to log of the last call within a run."""
        raise NotImplementedError


class ScheduledRewardRobust(RunObjective):
    """`reward_robust` with a weight that moves over the run; without progress, at its start.

    Args:
        nominal_weight: At the first step.
        end: At the last step; None for a weight that stays.
        schedule: The way there.
        mix: `reward_robust` with other options, called as `mix(posterior, nominal_weight=...)`.
    """

    def __init__(
        self,
        *,
        nominal_weight: float,
        end: float | None = None,
        schedule: Schedule = "constant",
        mix: Callable[..., Tensor] = reward_robust,
    ) -> None:
        super().__init__()
        self.start = self.weight = nominal_weight
        self.end = nominal_weight if end is None else end
        self.schedule: Schedule = schedule
        self.mix = mix

    def forward(
        self, posterior: RewardPosterior, *, progress: float | None = None
    ) -> Float[Tensor, " batch"]:
        """Return the mix at the weight of this moment."""
        if progress is None:
            return self.mix(posterior, nominal_weight=self.start)
        self.weight = scheduled(self.start, self.end, progress=progress, schedule=self.schedule)
        return self.mix(posterior, nominal_weight=self.weight)

    def metrics(self) -> dict[str, float]:
        """Return the weight of the last step."""
        return {"objective/nominal_weight": self.weight}


class UncertaintyPenalised(RunObjective):
    """`uncertainty_penalised`, its running mean kept in buffers.

    Without progress it is `lower_confidence_bound`, that is, `ubar = 0`: a score must not depend on
    what was scored before it, and a constant changes no comparison.

    Args:
        coef: At least 0.
        uncertainty_set: Makes of the posterior the one that counts (`lower_bounds`, say).
    """

    running_mean: Float[Tensor, ""]
    running_count: Int[Tensor, ""]

    def __init__(
        self,
        *,
        coef: float,
        uncertainty_set: Callable[[RewardPosterior], RewardPosterior] | None = None,
    ) -> None:
        super().__init__()
        _require_coef(coef)
        self.coef = coef
        self.uncertainty_set = uncertainty_set
        self.register_buffer("running_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("running_count", torch.zeros((), dtype=torch.int64))

    def forward(
        self, posterior: RewardPosterior, *, progress: float | None = None
    ) -> Float[Tensor, " batch"]:
        """Return the rewards; within a run, count the batch into the running mean first."""
        if self.uncertainty_set is not None:
            posterior = self.uncertainty_set(posterior)
        if progress is None:
            return lower_confidence_bound(posterior, coef=self.coef)
        before = RunningMean(self.running_mean.item(), int(self.running_count.item()))
        rewards, running = uncertainty_penalised(posterior, coef=self.coef, running=before)
        self.running_mean.fill_(running.mean)
        self.running_count.fill_(running.count)
        return rewards

    def metrics(self) -> dict[str, float]:
        """Return the running mean of the std between members."""
        return {"objective/running_std": self.running_mean.item()}


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "mean": mean,
    "median": median,
    "quantile": quantile,
    "nominal": nominal,
    "worst_case": worst_case,
    "reward_robust": reward_robust,
    "uncertainty_weighted": uncertainty_weighted,
    "lower_confidence_bound": lower_confidence_bound,
    "entropic": entropic,
}  # without `uncertainty_penalised`, which returns what it remembers too
