"""The exact world with a policy that has to learn: a small network instead of a closed form.

`optimal_policy` is where optimisation would end if nothing stood in its way. Here a network from
prompts to responses, 8 -> 64 -> 64 -> 8 in the 8x8 world, starts at the uniform reference and
climbs `E[reward] - beta KL(policy || reference)` by REINFORCE on answers that it draws itself. The
toy of Yan et al. 2024 (https://arxiv.org/abs/2409.15360; known to us from secondary sources) has
this form: 8 prompts, 8 responses, an MLP of three layers. All seeds and rewards are trained at
once, as one batch of networks.

The question is which reward brings the policy to the optimal policy of gold, the oracle.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trueward.evaluate.preferences import Interval, mean_interval
from trueward.lab.exact import ExactTable, ExactWorld, exact_kl, optimal_policy
from trueward.lab.methods import Method
from trueward.losses.policy import kl_estimate, leave_one_out_advantages, ppo_clip_loss
from trueward.options import ObjectiveConfig
from trueward.train.loop import seed_of


@dataclass(frozen=True, kw_only=True)
class MLPPolicyConfig:
    """How the networks are made and trained; the price of KL is the world's `beta`."""

    hidden: int = 64  # width of both hidden layers
    updates: int = 2000
    samples: int = 16  # answers to each prompt in an update, drawn anew each time
    learning_rate: float = 3e-3  # Adam's at the start; falls linearly to 0
    seed: int = 0  # of the networks and of what they draw

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("updates", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate must be positive and finite, got {self.learning_rate}."
            )


def _method(objective: str = "mean", members: int = 5, **settings: float) -> Method:
    chosen = ObjectiveConfig(name=objective, **settings)  # type: ignore[arg-type]
    return Method(optimiser="closed_form", members=members, objective=chosen)


# The rewards that are compared; None is the constant reward, which no method of a table has.
REWARDS: dict[str, Method | None] = {
    "gold": Method(optimiser="closed_form", reward="gold"),
    "single": _method(members=1),
    "nominal": _method("nominal"),
    "worst case": _method("worst_case"),
    "reward-robust 0.2": _method("reward_robust", nominal_weight=0.2),
    "reward-robust 0.4": _method("reward_robust", nominal_weight=0.4),
    "reward-robust 0.6": _method("reward_robust", nominal_weight=0.6),
    "reward-robust 0.8": _method("reward_robust", nominal_weight=0.8),
    "mean": _method("mean"),
    "uncertainty-weighted 0.5": _method("uncertainty_weighted", coef=0.5),
    "constant": None,
}


class Networks(NamedTuple):
    """A batch of networks of three layers, each over the one-hot prompts.

    A layer's weights on a one-hot input are a table, `first[prompt]`.
    """

    first: Float[Tensor, "network prompt hidden"]
    second: Float[Tensor, "network hidden hidden"]
    second_bias: Float[Tensor, "network 1 hidden"]
    third: Float[Tensor, "network hidden response"]
    third_bias: Float[Tensor, "network 1 response"]

    def logits(self) -> Float[Tensor, "network prompt response"]:
        """Return each network's logits at every prompt."""
        state = torch.tanh(self.first)
        state = torch.tanh(torch.baddbmm(self.second_bias, state, self.second))
        return torch.baddbmm(self.third_bias, state, self.third)


def new_networks(count: int, prompts: int, responses: int, *, hidden: int, seed: int) -> Networks:
    """Return the same network `count` times, uniform over the responses at every prompt.

    One start for all: what parts two networks is their reward and what they happened to draw.
    """
    g = torch.Generator().manual_seed(seed)
    shapes = [(prompts, hidden), (hidden, hidden), (1, hidden)]
    weights = [torch.randn(*shapes[0], generator=g)]
    weights += [torch.randn(*shapes[1], generator=g) / math.sqrt(hidden), torch.zeros(shapes[2])]
    # A last layer of zeros makes the policy the reference: KL 0, as if it had been copied from it.
    weights += [torch.zeros(hidden, responses), torch.zeros(1, responses)]
    return Networks(*(w.repeat(count, 1, 1).requires_grad_() for w in weights))


def train_mlp_policies(
    rewards: Float[Tensor, "network prompt response"],
    *,
    beta: float,
    config: MLPPolicyConfig,
) -> Float[Tensor, "network prompt response"]:
    """Train a network against each table of rewards; return the policies, in float64.

    All draw with the same noise, so that equal rewards make equal policies, and none depends on
    what is trained beside it (but for rounding).

    Args:
        rewards: Of each response to each prompt; the reference is uniform.
        beta: Price of a nat of KL, in units of the reward.
        config: Options.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}.")
    count, prompts, responses = rewards.shape
    networks = new_networks(count, prompts, responses, hidden=config.hidden, seed=config.seed)
    optimiser = torch.optim.Adam(networks, lr=config.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed_of(config.seed, "answers"))
    tables = rewards.float()
    for update in range(config.updates):
        optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - update / config.updates)
        logprobs = networks.logits().log_softmax(-1)
        answers = draw(logprobs.detach(), samples=config.samples, generator=generator)
        # The sum over networks: each has its own weights, so none feels another's loss.
        loss = policy_gradient_losses(logprobs, tables, answers, beta=beta).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return networks.logits().double().softmax(-1)


def draw(
    logprobs: Float[Tensor, "network prompt response"],
    *,
    samples: int,
    generator: torch.Generator,
) -> Int[Tensor, "network prompt sample"]:
    """Return answers drawn from each policy at each prompt, all networks with the same noise."""
    prompts = logprobs.shape[1]
    noise = torch.rand(prompts, samples, generator=generator).expand(len(logprobs), -1, -1)
    cumulative = logprobs.exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, noise.contiguous())
    return drawn.clamp(max=logprobs.shape[2] - 1)  # the sum may be a rounding error below 1


def policy_gradient_losses(
    logprobs: Float[Tensor, "network prompt response"],
    rewards: Float[Tensor, "network prompt response"],
    answers: Int[Tensor, "network prompt sample"],
    *,
    beta: float,
) -> Float[Tensor, " network"]:
    """REINFORCE's loss, whose expected gradient is that of `-(E[reward] - beta KL)`.

    The reward of an answer is `r - beta k1`, less the mean of the prompt's other answers (RLOO,
    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740): `ppo_clip_loss` at the policy that drew
    them, where its gradient is the policy gradient. The mean is over prompts and answers.

    Args:
        logprobs: Of every response, under the policy that is trained.
        rewards: Of every response.
        answers: Drawn from the policy, at least two to a prompt.
        beta: Price of a nat of KL to the uniform reference.
    """
    chosen = logprobs.gather(2, answers)
    reference = torch.full_like(chosen, -math.log(logprobs.shape[2]))
    kl = kl_estimate(chosen.detach(), reference, estimator="k1")
    penalised = rewards.gather(2, answers) - beta * kl
    advantages = leave_one_out_advantages(penalised.flatten(0, 1)).view_as(penalised)
    return ppo_clip_loss(chosen, chosen.detach(), advantages).mean(dim=(1, 2))


# ---- what became of them -----------------------------------------------------------------------


def total_variation(
    policy: Float[Tensor, "*batch response"], other: Float[Tensor, "*batch response"]
) -> Float[Tensor, "*batch"]:
    """`1/2 sum_y |p(y) - q(y)|`: the most by which two policies differ on any set of responses."""
    return (policy - other).abs().sum(-1) / 2


def favourite_agreement(
    policy: Float[Tensor, "*batch response"], other: Float[Tensor, "*batch response"]
) -> Float[Tensor, "*batch"]:
    """Whether two policies' likeliest responses are the same: 1 or 0, a tie drawn by lot.

    A uniform policy has no favourite, and agrees with any other in one case of as many as there
    are responses.
    """
    return (_favourite(policy) * _favourite(other)).sum(-1)


def _favourite(policy: Float[Tensor, "*batch response"]) -> Float[Tensor, "*batch response"]:
    likeliest = (policy == policy.amax(dim=-1, keepdim=True)).double()
    return likeliest / likeliest.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyOutcome:
    """What a reward made of the policies; every number is a seed's mean over its prompts."""

    gold: Float[Tensor, " seed"]  # expected gold reward
    closed_form_gold: Float[Tensor, " seed"]  # of the optimal policy against the same reward
    agreement: Float[Tensor, " seed"]  # share of prompts with the oracle's favourite
    distance: Float[Tensor, " seed"]  # total variation from the oracle
    shortfall: Float[Tensor, " seed"]  # total variation from the reward's own optimal policy
    kl: Float[Tensor, " seed"]  # to the reference, nats


def compare_mlp_policies(
    world: ExactWorld,
    seeds: Sequence[int],
    *,
    rewards: Mapping[str, Method | None] = REWARDS,
    config: MLPPolicyConfig | None = None,
) -> dict[str, PolicyOutcome]:
    """Train a policy for every seed and reward; return how near each came to the oracle.

    Args:
        world: Its table of each seed is drawn as everywhere else.
        seeds: Of the tables; the networks start the same for all.
        rewards: By name; None is a constant reward.
        config: Options; None for the defaults.
    """
    tables = [world.open(seed=seed) for seed in seeds]
    proxies = torch.stack([_proxy(table, some) for some in rewards.values() for table in tables])
    policies = train_mlp_policies(proxies, beta=world.beta, config=config or MLPPolicyConfig())
    gold = torch.stack([table.gold_table for table in tables])
    reference = torch.stack([table.reference for table in tables])
    oracle = optimal_policy(gold, beta=world.beta, reference=reference)
    outcomes = {}
    for name, policy, proxy in zip(
        rewards, policies.split(len(tables)), proxies.split(len(tables)), strict=True
    ):
        best = optimal_policy(proxy, beta=world.beta, reference=reference)
        outcomes[name] = PolicyOutcome(
            gold=(policy * gold).sum(-1).mean(1),
            closed_form_gold=(best * gold).sum(-1).mean(1),
            agreement=favourite_agreement(policy, oracle).mean(1),
            distance=total_variation(policy, oracle).mean(1),
            shortfall=total_variation(policy, best).mean(1),
            kl=exact_kl(policy, reference).mean(1),
        )
    return outcomes


def _proxy(table: ExactTable, method: Method | None) -> Float[Tensor, "prompt response"]:
    return torch.zeros_like(table.gold_table) if method is None else table.proxy(method)[0]


class SignTest(NamedTuple):
    """In how many seeds one is below the other, and how likely that is by chance."""

    below: int
    seeds: int  # that differ
    p_value: float  # of as many or more, if each way were equally likely


def sign_test(values: Float[Tensor, " seed"], others: Float[Tensor, " seed"]) -> SignTest:
    """One-sided sign test of `values < others`, paired by seed; equal pairs are left out."""
    below, above = int((values < others).sum()), int((values > others).sum())
    n = below + above
    return SignTest(below, n, sum(math.comb(n, k) for k in range(below, n + 1)) / 2**n)


def mlp_policy_table(outcomes: Mapping[str, PolicyOutcome], *, baseline: str = "single") -> str:
    """Return a Markdown table: means over seeds with 95 % intervals, distances as medians too.

    The last columns hold the seeds in which a reward's policy is nearer to the oracle than the
    baseline's, and the sign test's p-value. Intervals need two seeds.
    """
    lines = [
        "| reward | gold | closed form | oracle's favourite | TV to the oracle | median TV | "
        f"TV to its own optimum | KL | nearer than {baseline} | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    against = outcomes[baseline].distance
    for name, found in outcomes.items():
        test = sign_test(found.distance, against)
        nearer = ["", ""] if name == baseline else [f"{test.below}/{test.seeds}", _p(test.p_value)]
        cells = [
            _text(found.gold),
            f"{float(found.closed_form_gold.mean()):.3f}",
            _text(found.agreement),
            _text(found.distance),
            f"{float(found.distance.quantile(0.5)):.3f}",
            f"{float(found.shortfall.mean()):.3f}",
            _text(found.kl),
            *nearer,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(values: Float[Tensor, " seed"]) -> str:
    interval: Interval = mean_interval(values)
    return f"{float(values.mean()):.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"
