import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from trueward.losses import (
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_mean,
    masked_whiten,
    ppo_clip_loss,
    squared_kl_loss,
    terminal_rewards,
    value_clip_loss,
)

NAN = float("nan")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def double(values: list[float] | list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# KL estimators, against expectations enumerated over a small vocabulary.


def policies(vocab: int = 7) -> tuple[Tensor, Tensor]:
    return normal(vocab, seed=1).log_softmax(0), normal(vocab, seed=2).log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_average_to_the_exact_kl(estimator: str) -> None:
    policy, ref = policies()
    kl = (policy.exp() * (policy - ref)).sum()
    estimate = (policy.exp() * kl_estimate(policy, ref, estimator=estimator)).sum()
    torch.testing.assert_close(estimate, kl)


def test_k2_averages_to_half_the_second_moment_which_is_not_the_kl() -> None:
    policy, ref = policies()
    kl = (policy.exp() * (policy - ref)).sum()
    estimate = (policy.exp() * kl_estimate(policy, ref, estimator="k2")).sum()
    torch.testing.assert_close(estimate, (policy.exp() * (policy - ref) ** 2).sum() / 2)
    assert abs(estimate - kl) > 0.05


def test_k1_summed_over_tokens_averages_to_the_kl_of_whole_sequences() -> None:
    # Two tokens of a vocabulary of 4, the second conditioned on the first.
    vocab = 4
    tables = [(normal(vocab, seed=s), normal(vocab, vocab, seed=s + 1)) for s in (3, 5)]
    (first, second), (ref_first, ref_second) = (
        (one.log_softmax(-1), two.log_softmax(-1)) for one, two in tables
    )
    pairs = list(itertools.product(range(vocab), repeat=2))
    logprobs = torch.stack([torch.stack([first[a], second[a, b]]) for a, b in pairs])
    ref_logprobs = torch.stack([torch.stack([ref_first[a], ref_second[a, b]]) for a, b in pairs])
    probability = logprobs.sum(1).exp()
    kl = (probability * (logprobs - ref_logprobs).sum(1)).sum()
    for estimator in ("k1", "k3"):
        tokens = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
        torch.testing.assert_close((probability * tokens.sum(1)).sum(), kl)


def test_gradients_on_the_policys_own_samples() -> None:
    # E_pi[grad k2] is the gradient of the KL; those of k1 (which is 0) and k3 are not.
    logits, ref = normal(7, seed=1).requires_grad_(), policies()[1]
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)
    gradients = {}
    for estimator in ("k1", "k2", "k3"):
        policy = logits.log_softmax(0)
        estimate = kl_estimate(policy, ref, estimator=estimator)
        (gradients[estimator],) = torch.autograd.grad(
            (policy.detach().exp() * estimate).sum(), logits
        )
    torch.testing.assert_close(gradients["k2"], exact)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(exact))
    # What k3 descends is KL(ref || policy).
    torch.testing.assert_close(gradients["k3"], (logits.softmax(0) - ref.exp()).detach())


def test_kl_estimates_match_hand_calculation() -> None:
    logprobs, ref_logprobs = double([[-1.0, -2.0, -0.5]]), double([[-1.5, -1.0, -0.5]])
    estimate = partial(kl_estimate, logprobs, ref_logprobs)
    torch.testing.assert_close(estimate(estimator="k1"), double([[0.5, -1.0, 0.0]]))
    torch.testing.assert_close(estimate(estimator="k2"), double([[0.125, 0.5, 0.0]]))
    expected = double([[math.exp(-0.5) - 1 + 0.5, math.exp(1) - 1 - 1, 0.0]])
    torch.testing.assert_close(estimate(estimator="k3"), expected)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero() -> None:
    log_ratio = torch.linspace(-5, 5, 1001)
    k3 = kl_estimate(log_ratio, torch.zeros(1001), estimator="k3")
    assert (k3 >= 0).all()
    small = kl_estimate(torch.tensor([1e-3]), torch.zeros(1), estimator="k3")
    assert small.item() == pytest.approx(5e-7, rel=1e-3)  # exp(-l) - 1 + l gives 4.9e-7


def test_k1_is_never_clamped_and_k3_never_overflows() -> None:
    log_ratio = torch.tensor([-500.0, 500.0])
    zero = torch.zeros(2)
    assert kl_estimate(log_ratio, zero, estimator="k1").tolist() == [-500.0, 500.0]
    k3 = kl_estimate(log_ratio, zero, estimator="k3")
    assert k3.tolist() == pytest.approx([math.exp(20) - 501, 499.0])


@pytest.mark.usefixtures("without_annotation_checks")
def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"estimator must be .* got 'kl'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), estimator="kl")  # type: ignore[arg-type]


# Clipped losses.


def test_ppo_loss_matches_hand_calculation() -> None:
    ratio = double([1.1, 1.5, 0.5, 1.5, 0.5, 0.9])
    advantages = double([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss = ppo_clip_loss(ratio.log(), torch.zeros(6).double(), advantages)
    torch.testing.assert_close(loss, double([-2.2, -2.4, -1.0, 3.0, 1.6, 1.8]))
    wider = ppo_clip_loss(ratio.log(), torch.zeros(6).double(), advantages, clip_range=0.5)
    torch.testing.assert_close(wider, double([-2.2, -3.0, -1.0, 3.0, 1.0, 1.8]))


def test_ppo_gradient_is_that_of_the_policy_gradient_until_the_ratio_leaves_the_range() -> None:
    old = normal(4)
    advantages = double([2.0, -1.0, 2.0, -1.0])
    logprobs = (old + double([0.0, 0.0, 0.5, -0.5])).requires_grad_()
    ppo_clip_loss(logprobs, old, advantages).sum().backward()
    torch.testing.assert_close(logprobs.grad, double([-2.0, 1.0, 0.0, 0.0]))


def test_ppo_loss_is_finite_at_extreme_ratios() -> None:
    logprobs = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = ppo_clip_loss(logprobs, torch.zeros(1, 2), -torch.ones(1, 2))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_value_loss_matches_hand_calculation() -> None:
    values = double([1.0, 1.0, 0.1, -1.0])
    returns = double([2.0, 0.0, 1.0, 1.0])
    loss = value_clip_loss(values, torch.zeros(4).double(), returns)
    # Clipped values .2, .2, .1, -.2; the larger error counts.
    torch.testing.assert_close(loss, double([1.8**2, 1.0, 0.9**2, 2.0**2]) / 2)
    unclipped = value_clip_loss(values, torch.zeros(4).double(), returns, clip_range=math.inf)
    torch.testing.assert_close(unclipped, double([1.0, 1.0, 0.81, 4.0]) / 2)


def test_a_value_that_has_moved_far_enough_gets_no_gradient() -> None:
    values = double([0.5, -0.5]).requires_grad_()
    value_clip_loss(values, torch.zeros(2).double(), double([1.0, 1.0])).sum().backward()
    torch.testing.assert_close(values.grad, double([0.0, -1.5]))


@pytest.mark.parametrize("clip_range", [0.0, -0.2, NAN])
@pytest.mark.parametrize("loss", [ppo_clip_loss, value_clip_loss])
def test_clip_range_must_be_positive(loss: Callable[..., Tensor], clip_range: float) -> None:
    with pytest.raises(ValueError, match="clip_range must be positive"):
        loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip_range=clip_range)


# Advantages.


def rollout(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    return normal(3, 6, seed=seed), normal(3, 6, seed=seed + 1), mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.8, 1.0)])
def test_generalized_advantages_match_the_brute_force_sum(gamma: float, lam: float) -> None:
    rewards, values, mask = rollout()
    result = generalized_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(6):
            expected = sum(
                (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
                for k in range(t, length)
            )
            assert result.advantages[row, t].item() == pytest.approx(expected)
            expected_return = expected + v[t] if t < length else 0.0
            assert result.returns[row, t].item() == pytest.approx(expected_return)


def test_the_default_is_gamma_1_and_lambda_095() -> None:
    rewards, values, mask = rollout()
    result = generalized_advantages(rewards, values, mask)
    expected = generalized_advantages(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(result.advantages, expected.advantages)


def test_gamma_and_lambda_of_one_give_returns_to_go_less_values() -> None:
    rewards, values, mask = rollout()
    result = generalized_advantages(rewards, values, mask, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(result.returns, to_go)
    torch.testing.assert_close(result.advantages, (to_go - values) * mask)


def test_lambda_of_zero_gives_the_temporal_difference() -> None:
    rewards, values, mask = rollout()
    result = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(3, 1)], dim=1)
    torch.testing.assert_close(result.advantages, (rewards + 0.9 * following - values) * mask)


def test_a_perfect_value_model_leaves_no_advantage() -> None:
    rewards, _, mask = rollout()
    values = (rewards * mask).flip(1).cumsum(1).flip(1)
    result = generalized_advantages(rewards, values, mask)
    torch.testing.assert_close(result.advantages, torch.zeros(3, 6).double())


def test_padding_is_never_read() -> None:
    rewards, values, mask = rollout()
    clean = generalized_advantages(rewards, values, mask)
    dirty = generalized_advantages(
        rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, math.inf), mask
    )
    torch.testing.assert_close(dirty.advantages, clean.advantages)
    torch.testing.assert_close(dirty.returns, clean.returns)
    longer = generalized_advantages(
        *(torch.cat([part, torch.ones(3, 2).double()], dim=1) for part in (rewards, values)),
        torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1),
    )
    torch.testing.assert_close(longer.advantages[:, :6], clean.advantages)
    assert (longer.advantages[:, 6:] == 0).all()


@pytest.mark.parametrize("mask", [[[False, True, True]], [[True, False, True]]])
def test_left_padding_and_gaps_are_refused(mask: list[list[bool]]) -> None:
    zeros = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="pad completions on the right"):
        generalized_advantages(zeros, zeros, torch.tensor(mask))


@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_discounts_out_of_range_are_refused(name: str) -> None:
    rewards, values, mask = rollout()
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got 1.1"):
        generalized_advantages(rewards, values, mask, **{name: 1.1})


def test_leave_one_out_matches_hand_calculation() -> None:
    rewards = double([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = double([[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]])
    torch.testing.assert_close(leave_one_out_advantages(rewards), expected)


def test_leave_one_out_baseline_holds_nothing_of_its_own_reward() -> None:
    rewards = normal(1, 5).requires_grad_()
    advantages = leave_one_out_advantages(rewards)
    for k in range(5):
        (slope,) = torch.autograd.grad(advantages[0, k], rewards, retain_graph=True)
        expected = torch.full((1, 5), -0.25).double()
        expected[0, k] = 1.0
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_rewards_that_are_not_finite_leave_the_baseline(bad: float) -> None:
    rewards = double([[1.0, bad, 2.0, 6.0], [bad, bad, bad, 5.0], [bad, bad, bad, bad]])
    kept = rewards[:1, [0, 2, 3]]
    for advantages_of in (leave_one_out_advantages, group_advantages):
        advantages = advantages_of(rewards)
        torch.testing.assert_close(advantages[:1, [0, 2, 3]], advantages_of(kept))
        assert advantages[0, 1] == 0
        assert (advantages[1:] == 0).all()


def test_group_advantages_match_hand_calculation() -> None:
    rewards = double([[1.0, 2.0, 6.0]])
    std = math.sqrt((4 + 1 + 9) / 2)  # ddof 1
    centred = double([[-2.0, -1.0, 3.0]])
    torch.testing.assert_close(group_advantages(rewards), centred / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, eps=1.0), centred / (std + 1.0))
    torch.testing.assert_close(group_advantages(rewards, scale=False), centred)
    torch.testing.assert_close(
        group_advantages(normal(4, 6)),
        (normal(4, 6) - normal(4, 6).mean(1, keepdim=True))
        / (normal(4, 6).std(1, keepdim=True) + 1e-4),
    )


@pytest.mark.parametrize(
    "advantages_of",
    [leave_one_out_advantages, group_advantages, partial(group_advantages, scale=False)],
)
@pytest.mark.parametrize("reward", [0.1, -3.3, 12345.678, 0.0])
def test_a_constant_reward_gives_exactly_no_advantage(
    advantages_of: Callable[[Tensor], Tensor], reward: float
) -> None:
    # T1: nothing to learn from a constant reward, not even rounding errors divided by a std of 0.
    assert (advantages_of(torch.full((4, 7), reward)) == 0).all()
    assert (masked_whiten(torch.full((4, 7), reward), torch.ones(4, 7).bool()) == 0).all()


@pytest.mark.parametrize("advantages_of", [leave_one_out_advantages, group_advantages])
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(
    advantages_of: Callable[[Tensor], Tensor],
) -> None:
    rewards = normal(5, 4)
    advantages = advantages_of(rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5).double())
    torch.testing.assert_close(advantages_of(rewards + 100), advantages)


@pytest.mark.parametrize("advantages_of", [leave_one_out_advantages, group_advantages])
def test_a_group_of_one_is_refused(advantages_of: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"at least 2, got \(3, 1\)"):
        advantages_of(torch.zeros(3, 1))


def test_group_eps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="eps must be positive"):
        group_advantages(torch.zeros(3, 2), eps=0.0)


# Rewards per token, and statistics under a mask.


def test_terminal_rewards_match_hand_calculation() -> None:
    kl = double([[1.0, 2.0, 3.0], [1.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = terminal_rewards(kl, double([10.0, 20.0]), mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, double([[-0.1, -0.2, 9.7], [19.9, 0.0, 0.0]]))


def test_terminal_rewards_sum_to_the_penalised_score() -> None:
    kl, _, mask = rollout()
    scores = normal(3, seed=9)
    rewards = terminal_rewards(kl, scores, mask, kl_coef=0.05)
    torch.testing.assert_close(rewards.sum(1), scores - 0.05 * (kl * mask).sum(1))
    free = terminal_rewards(kl, scores, mask, kl_coef=0.0)
    assert (free != 0).sum(1).tolist() == [1, 1, 1]


def test_a_score_that_is_nan_stays_in_its_row() -> None:
    kl, _, mask = rollout()
    rewards = terminal_rewards(kl, double([NAN, 1.0, 2.0]), mask, kl_coef=0.1)
    assert rewards.isnan().nonzero().tolist() == [[0, 5]]


def test_terminal_rewards_refuse_what_they_cannot_place() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match="row 1 has none"):
        terminal_rewards(torch.zeros(2, 2), torch.zeros(2), mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef must be finite and at least 0, got -0\.1"):
        terminal_rewards(torch.zeros(2, 2), torch.zeros(2), mask, kl_coef=-0.1)


def test_masked_mean_reads_only_the_mask() -> None:
    values = double([[1.0, 2.0, NAN], [6.0, math.inf, NAN]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    mean = masked_mean(values, mask)
    assert mean.item() == pytest.approx(3.0)
    mean.backward()
    torch.testing.assert_close(values.grad, mask.double() / 3)


def test_masked_mean_of_nothing_is_zero() -> None:
    assert masked_mean(torch.tensor([NAN]), torch.tensor([False])).item() == 0.0


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask() -> None:
    values, _, mask = rollout()
    whitened = masked_whiten(values.masked_fill(~mask, NAN), mask)
    kept = whitened[mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.var(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    assert (whitened[~mask] == 0).all()
    kept_values = values[mask]
    expected = (kept_values - kept_values.mean()) / kept_values.std(correction=0)
    torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-6)


def test_whitening_without_shift_keeps_the_mean() -> None:
    values, _, mask = rollout()
    shifted = masked_whiten(values + 5, mask)
    kept = masked_whiten(values + 5, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], shifted[mask] + (values[mask] + 5).mean())
    assert (kept[~mask] == 0).all()


def test_whitening_nothing_gives_zeros() -> None:
    whitened = masked_whiten(torch.full((2, 2), NAN), torch.zeros(2, 2, dtype=torch.bool))
    assert (whitened == 0).all()


# The squared log-ratio as a loss.


def test_the_squared_log_ratio_by_hand_is_twice_k2() -> None:
    policy, ref = double([-1.0, -2.0, -3.0]), double([-1.5, -2.0, -1.0])
    assert squared_kl_loss(policy, ref).tolist() == [0.25, 0.0, 4.0]
    torch.testing.assert_close(
        squared_kl_loss(policy, ref), 2 * kl_estimate(policy, ref, estimator="k2")
    )


def test_its_gradient_is_on_average_twice_that_of_the_kl_and_a_k1_loss_has_none() -> None:
    logits, (_, ref) = normal(7, seed=1).requires_grad_(), policies()

    def gradient(values: Tensor) -> Tensor:
        return torch.autograd.grad(values, logits)[0]

    policy = logits.log_softmax(0)
    kl = gradient((policy.exp() * (policy - ref)).sum())
    # On the policy's own samples, the drawing of which is not differentiated.
    weights = logits.log_softmax(0).exp().detach()
    squared = gradient((weights * squared_kl_loss(logits.log_softmax(0), ref)).sum())
    torch.testing.assert_close(squared, 2 * kl)
    assert kl.abs().max() > 0.05
    k1 = kl_estimate(logits.log_softmax(0), ref, estimator="k1")
    torch.testing.assert_close(gradient((weights * k1).sum()), torch.zeros_like(kl))


def test_each_token_pays_for_its_own_log_ratio_alone() -> None:
    policy = double([[-1.0, -2.0], [-0.5, -4.0]]).requires_grad_()
    ref = double([[-2.0, -1.0], [-0.5, -1.0]])
    squared_kl_loss(policy, ref).sum().backward()
    torch.testing.assert_close(policy.grad, double([[2.0, -2.0], [0.0, -6.0]]))


@pytest.mark.usefixtures("without_annotation_checks")
@pytest.mark.parametrize(
    "call",
    [
        partial(kl_estimate, torch.zeros(3), torch.zeros(3, 1), estimator="k1"),
        partial(squared_kl_loss, torch.zeros(3), torch.zeros(3, 1)),
        partial(ppo_clip_loss, torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1)),
        partial(value_clip_loss, torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1)),
        partial(
            generalized_advantages,
            torch.zeros(3, 2),
            torch.zeros(3, 1),
            torch.ones(3, 2, dtype=torch.bool),
        ),
        partial(
            terminal_rewards,
            torch.zeros(3, 2),
            torch.zeros(3, 1),
            torch.ones(3, 2, dtype=torch.bool),
            kl_coef=0.1,
        ),
        partial(masked_mean, torch.zeros(3, 2), torch.ones(3, 1, dtype=torch.bool)),
        partial(masked_whiten, torch.zeros(3, 2), torch.ones(3, 1, dtype=torch.bool)),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must have one shape.*\(3, 1\)"):
        call()
