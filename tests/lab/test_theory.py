"""Why a cautious reward is a safe one: the statements T1 to T6, on thousands of random cases.

With `pi_r(y|x) ~ ref(y|x) exp(r/beta)`, `s` the reward's span and `G` that of gold:

- T1 A constant reward leaves the policy at the reference, and no advantage anywhere.
- T2 `KL(pi_r || ref) <= s^2 / (8 beta^2)`.
- T3 `|E_pi[gold] - E_ref[gold]| <= G s / (4 beta)`.
- T4 A reward that knows nothing of gold gains nothing in the mean, at more variance and KL.
- T5 Of K members with normal errors the minimum has less noise than one, more than their mean,
  and it is biased down by a multiple of the noise: pessimism where the members know least.
- T6 The minimum over-scores only where every member does: in a share `2^-K` of the cases.

They make precise how reward-robust RLHF (Yan et al. 2024, https://arxiv.org/abs/2409.15360) comes
near the stability of a constant reward. Single cases by hand, and the bounds in the exact world,
are in `test_exact.py`; T5 and T6 for five members also in `tests/test_objectives.py`.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trueward import objectives
from trueward.lab.exact import (
    ExactWorld,
    exact_kl,
    gold_shift_bound,
    kl_bound,
    optimal_policy,
    span,
)
from trueward.losses.policy import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    masked_whiten,
    terminal_rewards,
)
from trueward.posterior import RewardPosterior

CASES = 20_000


class Cases(NamedTuple):
    """Random prompts of one number of responses, which differ in all that a bound depends on."""

    reference: Tensor  # [case, response]
    reward: Tensor  # [case, response]
    gold: Tensor  # [case, response]
    beta: Tensor  # [case]


@cache
def cases(responses: int) -> Cases:
    """Even and lopsided references, smooth, two-valued and heavy-tailed rewards, all prices."""
    g = torch.Generator().manual_seed(responses)
    shape = (CASES, responses)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    sharpness = 3 * torch.rand(CASES, 1, generator=g, dtype=torch.float64)
    reference = (sharpness * normal(*shape)).softmax(-1)
    reference[: CASES // 4] = 1 / responses
    reward = normal(*shape)
    third = CASES // 3
    reward[third : 2 * third] = (reward[third : 2 * third] > 0).double()
    reward[2 * third :] = reward[2 * third :] / normal(CASES - 2 * third, 1)
    # Gold knows the reward, is its opposite, or knows nothing of it.
    gold = torch.where(normal(CASES, 1) > 0, reward, -reward)
    gold[::2] = normal(CASES // 2, responses)
    # Neither so mild that rounding is all there is, nor so sharp that softmax is an argmax.
    beta = span(reward) * 10 ** (3 * torch.rand(CASES, generator=g, dtype=torch.float64) - 1)
    order = torch.randperm(CASES, generator=g)
    order = order[span(reward)[order] > 0]  # T1 has the others
    return Cases(*(part[order] for part in (reference, reward, gold, beta)))


def policy_of(some: Cases) -> Tensor:
    return optimal_policy(some.reward, beta=some.beta[:, None], reference=some.reference)


# ---- T1: a constant reward ---------------------------------------------------------------------

OBJECTIVES: dict[str, Callable[[RewardPosterior], Tensor]] = {
    "mean": objectives.mean,
    "median": objectives.median,
    "nominal": objectives.nominal,
    "worst_case": objectives.worst_case,
    "reward_robust": partial(objectives.reward_robust, nominal_weight=0.4),
    "uncertainty_weighted": partial(objectives.uncertainty_weighted, coef=0.5),
    "lower_confidence_bound": partial(objectives.lower_confidence_bound, coef=1.0),
    "entropic": partial(objectives.entropic, temperature=0.5),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_t1_members_that_see_no_difference_leave_the_policy_at_the_reference(
    objective: str,
) -> None:
    g = torch.Generator().manual_seed(0)
    count, responses, members = 5000, 6, 5
    reference = torch.randn(count, responses, generator=g, dtype=torch.float64).softmax(-1)
    # The members disagree, and state stds, but none tells one response to a prompt from another.
    means = 10 * torch.randn(count, 1, members, generator=g, dtype=torch.float64)
    stds = torch.rand(count, 1, members, generator=g, dtype=torch.float64)
    every = [part.expand(-1, responses, -1).flatten(0, 1) for part in (means, stds)]
    reward = OBJECTIVES[objective](RewardPosterior(*every)).view(count, responses)
    beta = 10 ** (4 * torch.rand(count, 1, generator=g, dtype=torch.float64) - 2)
    policy = optimal_policy(reward, beta=beta, reference=reference)
    torch.testing.assert_close(policy, reference, rtol=1e-9, atol=0)
    assert float(exact_kl(policy, reference).max()) < 1e-10


def test_t1_a_constant_reward_has_no_advantage() -> None:
    # Exactly none, in float32, whatever the constant: a rounding error over a std of 0 is noise
    # that the policy would learn.
    g = torch.Generator().manual_seed(1)
    for size in (2, 3, 7, 16):
        constant = 10 ** (8 * torch.rand(5000, 1, generator=g) - 4)
        constant = constant * torch.randn(5000, 1, generator=g).sign()
        rewards = constant.expand(-1, size).contiguous()
        for advantages in (
            leave_one_out_advantages(rewards),
            group_advantages(rewards),
            group_advantages(rewards, scale=False),
        ):
            assert torch.equal(advantages, torch.zeros_like(rewards))
        everywhere = torch.ones(size, 1000, dtype=torch.bool)
        for value in constant[:20, 0]:
            batch = torch.full((size, 1000), float(value))
            assert torch.equal(masked_whiten(batch, everywhere), torch.zeros_like(batch))


def test_t1_a_critic_that_knows_the_constant_leaves_no_advantage() -> None:
    g = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 9, (5000,), generator=g)
    mask = torch.arange(8) < lengths[:, None]
    constant = 100 * torch.randn(5000, generator=g)
    rewards = terminal_rewards(torch.zeros(5000, 8), constant, mask, kl_coef=0.1)
    values = constant[:, None].expand(-1, 8)
    assert not bool(generalized_advantages(rewards, values, mask).advantages.any())


# ---- T2 and T3: the span bounds everything -----------------------------------------------------


@pytest.mark.parametrize("responses", [2, 3, 8, 32])
def test_t2_the_kl_stays_below_its_bound_and_comes_near_it(responses: int) -> None:
    some = cases(responses)
    assert len(some.beta) > 15_000
    bound = span(some.reward).square() / (8 * some.beta.square())
    # One price for all is the library's form: the bound depends on reward / beta alone.
    torch.testing.assert_close(kl_bound(some.reward / some.beta[:, None], beta=1.0), bound)
    ratio = exact_kl(policy_of(some), some.reference) / bound
    assert 0.99 < float(ratio.max()) <= 1 + 1e-9


@pytest.mark.parametrize("responses", [2, 3, 8, 32])
def test_t3_no_reward_moves_gold_by_more_than_the_bound_and_some_nearly_do(responses: int) -> None:
    some = cases(responses)
    moved = ((policy_of(some) - some.reference) * some.gold).sum(-1)
    bound = gold_shift_bound(some.reward / some.beta[:, None], some.gold, beta=1.0)
    torch.testing.assert_close(bound, span(some.gold) * span(some.reward) / (4 * some.beta))
    ratio = moved / bound
    assert 0.99 < float(ratio.max()) <= 1 + 1e-9  # a reward that is gold itself
    assert -0.99 > float(ratio.min()) >= -1 - 1e-9  # a reward that is its opposite


def test_t2_the_kl_is_the_integral_of_the_variance() -> None:
    # KL = int_0^{1/beta} u Var_u[reward] du, from which the bound follows by Var <= s^2 / 4.
    some = cases(8)
    sharpest = (1 / some.beta)[:, None]
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    integrand = torch.zeros(500, len(u), dtype=torch.float64)
    for i, at in enumerate(u[1:], start=1):
        policy = optimal_policy(
            some.reward[:500], beta=1 / (at * sharpest[:500]), reference=some.reference[:500]
        )
        mean = (policy * some.reward[:500]).sum(-1, keepdim=True)
        variance = (policy * (some.reward[:500] - mean).square()).sum(-1)
        integrand[:, i] = at * variance * sharpest[:500, 0].square()
    kl = exact_kl(policy_of(some), some.reference)[:500]
    torch.testing.assert_close(torch.trapezoid(integrand, u), kl, rtol=1e-4, atol=1e-9)


# ---- T4: a reward that knows nothing of gold ---------------------------------------------------


def test_t4_a_reward_dealt_at_random_gains_nothing_for_any_gold() -> None:
    # Under an even reference, over all turns of the same rewards each response is favoured as
    # often as any other: the mean is that of the constant reward, exactly.
    g = torch.Generator().manual_seed(3)
    reward, gold = torch.randn(2, 5000, 8, generator=g, dtype=torch.float64).unbind()
    even = torch.full_like(reward, 1 / 8)
    beta = 10 ** (2 * torch.rand(5000, 1, generator=g, dtype=torch.float64) - 1.5)
    turns = torch.stack([reward.roll(k, dims=1) for k in range(8)])
    policies = optimal_policy(turns, beta=beta, reference=even)
    values = (policies * gold).sum(-1)  # [turn, case]
    torch.testing.assert_close(values.mean(0), gold.mean(1), rtol=0, atol=1e-12)
    assert bool((values.std(0, correction=0) > 0).all())
    assert bool((exact_kl(policies, even) > 0).all())
    # Not under a lopsided one: there a constant reward is worth another thing than a random one.
    lopsided = torch.tensor([0.65] + [0.05] * 7, dtype=torch.float64).expand_as(reward)
    off = (optimal_policy(turns, beta=beta, reference=lopsided) * gold).sum(-1).mean(0)
    assert float((off - (lopsided * gold).sum(-1)).abs().mean()) > 0.1


@pytest.mark.parametrize("first_seed", [0, 1000])
def test_t4_constant_random_and_adversarial_rewards_in_the_exact_world(first_seed: int) -> None:
    # test_exact.py holds the digits of seeds 0 to 399; here any 400 seeds, by their own errors.
    world = ExactWorld(betas=[])
    tables = [world.open(seed=first_seed + i) for i in range(400)]
    gold = torch.stack([t.gold_table for t in tables])
    noise = torch.stack([t.random_table for t in tables])
    even = torch.full_like(gold, 1 / 8)

    def value(reward: Tensor) -> tuple[Tensor, Tensor]:
        policy = optimal_policy(reward, beta=0.1, reference=even)
        return (policy * gold).sum(-1).mean(1), exact_kl(policy, even).mean(1)

    def within(values: Tensor, expected: float, errors: float = 2.0) -> bool:
        return abs(float(values.mean()) - expected) < errors * float(values.std()) / math.sqrt(400)

    constant, no_kl = value(torch.zeros_like(gold))
    random, kl = value(noise)
    adversarial, _ = value(-gold)
    assert float(no_kl.max()) < 1e-12
    assert within(random - constant, 0.0)
    assert within(constant, 0.0094)
    assert within(random, -0.0073)
    assert within(adversarial, -1.396)
    assert within(kl, 1.83)
    assert float(constant.std()) == pytest.approx(0.127, rel=0.1)
    assert float(random.std()) == pytest.approx(0.326, rel=0.1)


# ---- T5: the minimum of K normal members -------------------------------------------------------


def moments_of_the_minimum(members: int) -> tuple[float, float]:
    """Mean and variance of the least of K standard normals, by quadrature of their density."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    least = members * density * torch.special.ndtr(-x) ** (members - 1)
    assert float(torch.trapezoid(least, x)) == pytest.approx(1, abs=1e-10)
    mean = float(torch.trapezoid(x * least, x))
    return mean, float(torch.trapezoid(x.square() * least, x)) - mean**2


def test_t5_by_quadrature() -> None:
    assert moments_of_the_minimum(1) == pytest.approx((0, 1), abs=1e-9)
    # Of two: -1/sqrt(pi) and 1 - 1/pi.
    assert moments_of_the_minimum(2) == pytest.approx((-(math.pi**-0.5), 1 - 1 / math.pi))
    assert moments_of_the_minimum(5) == pytest.approx((-1.16296, 0.44753), abs=5e-6)


@pytest.mark.parametrize("members", [1, 2, 5, 8])
def test_t5_the_objective_has_these_moments_at_any_reward_and_noise(members: int) -> None:
    g = torch.Generator().manual_seed(members)
    count = 100_000
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    true, noise = 3 * normal(count), normal(count).exp()
    posterior = RewardPosterior(true[:, None] + noise[:, None] * normal(count, members))
    least = (objectives.worst_case(posterior) - true) / noise
    average = (objectives.mean(posterior) - true) / noise
    mean, variance = moments_of_the_minimum(members)
    assert float(least.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert float(least.var()) == pytest.approx(variance, rel=0.025)
    assert float(average.mean()) == pytest.approx(0, abs=4 / math.sqrt(members * count))
    assert float(average.var()) == pytest.approx(1 / members, rel=0.025)
    if members > 1:  # less noise than one member has, more than the mean of all
        assert float(average.var()) < float(least.var()) < 1


def test_t5_the_minimum_need_not_narrow_the_span() -> None:
    # Two responses of equal worth; all five know the first, none knows the second.
    known = [0.0] * 5
    unknown = [0.4, -3.0, 0.2, 1.0, -0.6]
    posterior = RewardPosterior(torch.tensor([known, unknown]))
    assert float(span(posterior.means[:, 0])) == pytest.approx(0.4)  # one member
    assert float(span(objectives.mean(posterior))) == pytest.approx(0.4)
    assert float(span(objectives.worst_case(posterior))) == pytest.approx(3.0)

    # Nor on average, where the noise varies: E|z| = .7979 grows to about 1.17. Where the noise is
    # the same everywhere, it does narrow.
    g = torch.Generator().manual_seed(4)
    errors = torch.randn(20_000, 2, 5, generator=g, dtype=torch.float64)

    def spans(noise: Tensor) -> tuple[float, float]:
        posterior = RewardPosterior((noise[:, None] * errors).flatten(0, 1))
        rewards = objectives.worst_case(posterior).view(-1, 2)
        single = posterior.means[:, 0].view(-1, 2)
        return float(span(single).mean()), float(span(rewards).mean())

    single, least = spans(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert single == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    assert least > 1.1
    single, least = spans(torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert single == pytest.approx(2 / math.sqrt(math.pi), abs=0.03)
    assert least < 0.8


# ---- T6: who over-scores -----------------------------------------------------------------------


def symmetric_errors(members: int, count: int) -> Tensor:
    """Independent errors, each member's of another symmetric kind and another size."""
    g = torch.Generator().manual_seed(members)
    normal = partial(torch.randn, count, generator=g, dtype=torch.float64)
    uniform = 2 * torch.rand(count, members, generator=g, dtype=torch.float64) - 1
    kinds = [normal(), normal() / normal(), uniform[:, 2 % members], normal() ** 3]
    columns = [(k + 1) * kinds[k % 4] for k in range(min(members, 4))]
    columns += [10.0**-k * normal() for k in range(4, members)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("members", [1, 2, 3, 5, 8])
def test_t6_the_minimum_over_scores_in_one_case_of_two_to_the_members(members: int) -> None:
    count = 200_000
    errors = symmetric_errors(members, count)
    true = 5 * torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    over = objectives.worst_case(RewardPosterior(true[:, None] + errors)) > true
    # One honest member is enough, whatever the errors are.
    assert not bool(over[(errors < 0).any(1)].any())
    expected = 2.0**-members
    error = math.sqrt(expected * (1 - expected) / count)
    assert float(over.double().mean()) == pytest.approx(expected, abs=4 * error)


def test_t6_five_members_err_together_in_three_cases_of_a_hundred() -> None:
    over = objectives.worst_case(RewardPosterior(symmetric_errors(5, 200_000))) > 0
    assert float(over.double().mean()) == pytest.approx(0.031, abs=0.002)


def test_t6_errors_that_members_share_are_not_undone() -> None:
    # The caveat: an error that all have stays, however many they are.
    g = torch.Generator().manual_seed(5)
    shared = torch.randn(20_000, 1, generator=g, dtype=torch.float64)
    errors = shared + 0.1 * torch.randn(20_000, 5, generator=g, dtype=torch.float64)
    over = objectives.worst_case(RewardPosterior(errors)) > 0
    assert float(over.double().mean()) > 0.4
