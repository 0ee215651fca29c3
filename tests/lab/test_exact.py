"""The exact world: its golden numbers, its bounds, its closed forms against independent ones."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trueward.evaluate.comparison import SeedRun
from trueward.lab.exact import (
    ExactTable,
    ExactWorld,
    exact_kl,
    expected_agreement,
    expected_k2,
    gold_shift_bound,
    kl_bound,
    optimal_policy,
    run_cell,
)
from trueward.lab.methods import Method
from trueward.lab.worlds import Annotator, World
from trueward.losses.policy import kl_estimate
from trueward.options import ObjectiveConfig

WORLD = ExactWorld()
SEEDS = 400


def method(objective: str = "mean", members: int = 5, **settings: float) -> Method:
    return Method(
        optimiser="closed_form",
        members=members,
        objective=ObjectiveConfig(name=objective, **settings),
    )


def mix(nominal_weight: float) -> Method:
    return method("reward_robust", nominal_weight=nominal_weight)


ORACLE = Method(optimiser="closed_form", reward="gold")
RANDOM = Method(optimiser="closed_form", reward="random")
METHODS = {
    "oracle": ORACLE,
    "single": method(members=1),
    "nominal": method("nominal"),
    "worst case": method("worst_case"),
    "mean": method(),
    "uncertainty-weighted": method("uncertainty_weighted", coef=0.5),
    "random": RANDOM,
}


@cache
def end_tables() -> list[ExactTable]:
    """Tables of all seeds whose curves have the reference and the end alone."""
    world = ExactWorld(betas=[])
    return [world.open(seed=seed) for seed in range(SEEDS)]


def final_golds(some: Method) -> list[float]:
    return [table.run(some).points[-1]["gold"] for table in end_tables()]


GOLDEN = {
    "oracle": 1.418,
    "single": 1.160,
    "nominal": 1.154,
    "worst case": 1.263,
    "mean": 1.352,
    "uncertainty-weighted": 1.336,
    "random": -0.0073,
}


@pytest.mark.parametrize(("name", "value"), GOLDEN.items())
def test_golden_gold_at_the_end_over_400_seeds(name: str, value: float) -> None:
    digits = 4 if name == "random" else 3
    assert round(float(np.mean(final_golds(METHODS[name]))), digits) == value


def test_golden_sweep_of_the_nominal_weight_is_best_inside() -> None:
    sweep = [float(np.mean(final_golds(mix(a)))) for a in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert [round(v, 3) for v in sweep] == [1.263, 1.289, 1.301, 1.287, 1.241, 1.154]


def test_golden_adversarial_reward() -> None:
    ends = [table.curve(-table.gold_table)[-1]["gold"] for table in end_tables()]
    assert round(float(np.mean(ends)), 3) == -1.396


def test_golden_constant_reward_against_a_random_one() -> None:
    starts, ends, kls = [], [], []
    for table in end_tables():
        start, end = table.run(RANDOM).points
        starts.append(start["gold"])
        ends.append(end["gold"])
        kls.append(end["kl/exact"])
    # The constant reward leaves the reference policy as it is; both means are the same but for
    # luck, and the random reward's has the wider spread.
    assert (round(float(np.mean(starts)), 4), round(float(np.std(starts)), 3)) == (0.0094, 0.127)
    assert (round(float(np.std(ends)), 3), round(float(np.mean(kls)), 2)) == (0.326, 1.83)
    gains = np.array(ends) - np.array(starts)
    assert abs(gains.mean()) < 3 * gains.std(ddof=1) / math.sqrt(SEEDS)


def test_a_curve_ends_where_a_world_without_milder_betas_ends() -> None:
    whole, short = WORLD.open(seed=3).run(mix(0.4)), end_tables()[3].run(mix(0.4))
    assert whole.points[-1] == pytest.approx(short.points[-1], abs=1e-12)
    assert whole.final_gold == pytest.approx(short.final_gold, abs=1e-12)


def test_final_gold_is_that_of_answers_drawn_from_the_policy_with_common_noise() -> None:
    tables = end_tables()[:200]
    drawn = np.array([np.mean(table.run(mix(0.4)).final_gold) for table in tables])
    expected = np.array([table.run(mix(0.4)).points[-1]["gold"] for table in tables])
    difference = drawn - expected
    assert 0 < abs(difference.mean()) < 3 * difference.std(ddof=1) / math.sqrt(len(tables))
    # The same noise for every policy: equal policies have equal answers.
    assert tables[0].run(mix(0.4)).final_gold == tables[0].run(mix(0.4)).final_gold


def by_loops(seed: int, nominal_weight: float, beta: float) -> tuple[float, float, float]:
    """Gold, KL and k2 of the mix in plain numpy, prompt by prompt."""
    r = np.random.default_rng(seed)
    gold = r.normal(size=(8, 8))
    s = np.where(r.random((8, 8)) < 0.5, 0.15, 1.0)
    mu = gold + s * r.normal(size=(5, 8, 8))
    std = np.abs(s * (1 + 0.2 * r.normal(size=(5, 8, 8)))) + 1e-3
    out = []
    for p in range(8):
        members = std[:, p].argmin(0)
        nominal = np.array([mu[members[y], p, y] for y in range(8)])
        reward = nominal_weight * nominal + (1 - nominal_weight) * mu[:, p].min(0)
        weights = np.exp((reward - reward.max()) / beta)
        pi = weights / weights.sum()
        log_ratio = np.log(8 * pi)
        out.append((pi @ gold[p], pi @ log_ratio, pi @ log_ratio**2 / 2))
    return tuple(float(v) for v in np.mean(out, axis=0))


@pytest.mark.parametrize("beta", [8.0, 0.5, 0.1])
def test_points_agree_with_plain_loops(beta: float) -> None:
    points = run_cell(replace(WORLD, beta=beta, betas=[]), mix(0.2), 7).points
    gold, kl, k2 = by_loops(7, 0.2, beta)
    assert points[-1]["gold"] == pytest.approx(gold, abs=1e-12)
    assert points[-1]["kl/exact"] == pytest.approx(kl, abs=1e-12)
    assert points[-1]["kl/k2"] == pytest.approx(k2, abs=1e-12)


def test_points_go_from_the_reference_to_beta() -> None:
    run = run_cell(WORLD, METHODS["mean"], 0)
    points = run.points
    table = WORLD.open(seed=0)
    assert points[0]["1/beta"] == points[0]["kl/exact"] == points[0]["proxy"] == 0.0
    assert points[0]["gold"] == pytest.approx(float(table.gold_table.mean()))
    assert points[-1]["1/beta"] == pytest.approx(10.0)
    for key in ("1/beta", "kl/exact", "proxy"):  # a lower price buys more reward at more KL
        assert all(a[key] < b[key] for a, b in pairwise(points)), key
    sem = float(table.gold_table.mean(dim=1).std(correction=1)) / math.sqrt(8)
    assert points[0]["gold_sem"] == pytest.approx(sem)
    assert points[0]["spread"] == pytest.approx(float(table.means.std(2, correction=0).mean()))
    assert {p["length"] for p in points} == {2.0}  # "response 5"
    assert (run.seed, len(run.final_gold), len(run.outcomes)) == (0, 8, 32)


def test_milder_betas_are_sorted_and_those_not_above_beta_left_out() -> None:
    world = ExactWorld(beta=0.5, betas=[0.25, 1.0, 4.0, 0.5, 1.0])
    assert world.curve_betas() == [math.inf, 4.0, 1.0, 0.5]


def test_optimising_gold_itself_never_hurts_it() -> None:
    for seed in range(100):
        run = run_cell(WORLD, ORACLE, seed)
        golds = [p["gold"] for p in run.points]
        assert all(a < b for a, b in pairwise(golds)), seed
        assert {p["agreement"] for p in run.points} == {1.0}
        assert golds[-1] - golds[0] == pytest.approx(run.points[-1]["proxy"], abs=1e-12)
        assert all(p > 0.5 for p, o in zip(run.probabilities, run.outcomes, strict=True) if o)


def test_few_uncovered_responses_among_many_make_a_single_member_fall() -> None:
    world = ExactWorld(
        response_count=1024, coverage=0.95, covered_std=0.6, uncovered_std=3.0, uncovered_gold=-1.0
    )
    tables = [world.open(seed=seed) for seed in range(3)]

    def gold(some: Method) -> list[float]:
        return np.mean([[p["gold"] for p in t.run(some).points] for t in tables], axis=0).tolist()

    single, worst = gold(METHODS["single"]), gold(METHODS["worst case"])
    assert max(single) > single[0] + 0.4  # it rises
    assert single[-1] < max(single) - 0.4  # and falls
    assert all(a < b for a, b in pairwise(worst))
    assert worst[-1] > max(single) + 1


def test_one_member_has_no_spread_and_several_have() -> None:
    for name, has in {"single": False, "oracle": False, "random": False, "mean": True}.items():
        points = run_cell(WORLD, METHODS[name], 0).points
        assert [("spread" in p) for p in points] == [has] * len(points), name


def test_agreement_falls_where_the_policy_goes() -> None:
    points = [run_cell(WORLD, METHODS["single"], seed).points for seed in range(50)]
    at_start, at_end = (float(np.mean([p[i]["agreement"] for p in points])) for i in (0, -1))
    assert at_start > at_end + 0.02


def test_the_random_reward_depends_on_the_seed_and_not_on_gold() -> None:
    table = WORLD.open(seed=5)
    r = np.random.default_rng(5)
    for shape in ((8, 8), None, (5, 8, 8), (5, 8, 8)):
        r.random((8, 8)) if shape is None else r.normal(size=shape)
    assert torch.equal(table.random_table, torch.from_numpy(r.normal(size=(8, 8))))


# The bounds of section "theory": T1 to T3


@pytest.mark.parametrize("name", METHODS)
def test_kl_and_gold_shift_stay_within_their_bounds(name: str) -> None:
    largest = {"kl": 0.0, "shift": 0.0}
    for seed in range(30):
        table = WORLD.open(seed=seed)
        proxy, _ = table.proxy(METHODS[name])
        for beta in (8.0, 1.0, 0.3, 0.1, 0.02):
            policy = optimal_policy(proxy, beta=beta, reference=table.reference)
            kl = exact_kl(policy, table.reference) / kl_bound(proxy, beta=beta)
            moved = ((policy - table.reference) * table.gold_table).sum(1).abs()
            shift = moved / gold_shift_bound(proxy, table.gold_table, beta=beta)
            largest = {
                "kl": max(largest["kl"], float(kl.max())),
                "shift": max(largest["shift"], float(shift.max())),
            }
    assert 0.3 < largest["kl"] <= 1  # a bound that nothing comes near would show nothing
    assert largest["shift"] <= 1


def test_bounds_are_nearly_met_by_two_responses() -> None:
    # Two equally likely responses, the reward 0 and 1: Var = 1/4 at the start.
    reward, half = torch.tensor([[0.0, 1.0]]).double(), torch.full((1, 2), 0.5).double()
    policy = optimal_policy(reward, beta=20.0, reference=half)
    kl = float(exact_kl(policy, half))
    assert kl / float(kl_bound(reward, beta=20.0)) == pytest.approx(1, abs=1e-3)
    moved = float(((policy - half) * reward).sum())
    assert moved / float(gold_shift_bound(reward, reward, beta=20.0)) == pytest.approx(1, abs=1e-3)


def test_a_constant_reward_leaves_the_policy_alone() -> None:
    reference = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64)
    policy = optimal_policy(torch.full((1, 3), 3.0).double(), beta=0.1, reference=reference)
    torch.testing.assert_close(policy, reference)
    assert float(exact_kl(policy, reference)) == pytest.approx(0, abs=1e-15)


# Closed forms


def test_optimal_policy_by_hand() -> None:
    reward = torch.tensor([0.0, math.log(3.0)]).double()
    reference = torch.tensor([0.6, 0.4]).double()
    # 0.6 * 1 and 0.4 * 3, over 1.8; at beta = 1/2 the odds of the reward are squared.
    assert optimal_policy(reward, beta=1.0, reference=reference).tolist() == pytest.approx(
        [1 / 3, 2 / 3]
    )
    assert optimal_policy(reward, beta=0.5, reference=reference).tolist() == pytest.approx(
        [0.6 / 4.2, 3.6 / 4.2]
    )
    assert optimal_policy(reward, beta=math.inf, reference=reference).tolist() == pytest.approx(
        [0.6, 0.4]
    )


def test_no_other_policy_has_more_reward_less_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(8, generator=generator, dtype=torch.float64)
    reference = torch.rand(8, generator=generator, dtype=torch.float64).softmax(0)

    def value(policy: Tensor) -> float:
        return float(policy @ reward - 0.3 * exact_kl(policy, reference))

    best = optimal_policy(reward, beta=0.3, reference=reference)
    for _ in range(200):
        nudge = 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
        assert value((best.log() + nudge).softmax(0)) < value(best)


def test_an_impossible_response_stays_impossible() -> None:
    reference = torch.tensor([0.5, 0.5, 0.0]).double()
    policy = optimal_policy(torch.tensor([0.0, 1.0, 9.0]).double(), beta=0.1, reference=reference)
    assert float(policy[2]) == 0.0
    for value in (exact_kl(policy, reference), expected_k2(policy, reference)):
        assert bool(value.isfinite())
    assert float(exact_kl(reference, torch.tensor([1.0, 0.0, 0.0]).double())) == math.inf


def test_kl_by_hand() -> None:
    policy, reference = torch.tensor([[0.75, 0.25]]).double(), torch.full((1, 2), 0.5).double()
    up, down = math.log(1.5), math.log(0.5)
    assert exact_kl(policy, reference).tolist() == pytest.approx([0.75 * up + 0.25 * down])
    assert expected_k2(policy, reference).tolist() == pytest.approx(
        [(0.75 * up**2 + 0.25 * down**2) / 2]
    )


@pytest.mark.parametrize(
    ("estimator", "expectation"), [("k1", exact_kl), ("k2", expected_k2), ("k3", exact_kl)]
)
def test_expectations_of_the_kl_estimators(
    estimator: str, expectation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    table = WORLD.open(seed=0)
    for beta in (2.0, 0.5):
        policy = optimal_policy(table.gold_table, beta=beta, reference=table.reference)
        estimate = kl_estimate(policy.log(), table.reference.log(), estimator=estimator)
        torch.testing.assert_close((policy * estimate).sum(1), expectation(policy, table.reference))


def test_agreement_by_hand() -> None:
    gold = torch.tensor([[0.0, 1.0, 2.0]])
    even = torch.full((1, 3), 1 / 3)

    def agreement(policy: Tensor, proxy: list[float], worth: Tensor = gold) -> float:
        return float(expected_agreement(policy, torch.tensor([proxy]), worth))

    assert agreement(even, [0.0, 5.0, 9.0]) == 1.0
    assert agreement(even, [9.0, 5.0, 0.0]) == 0.0
    assert agreement(even, [5.0, 0.0, 9.0]) == pytest.approx(2 / 3)
    assert agreement(even, [0.0, 0.0, 1.0]) == pytest.approx(2.5 / 3)  # a tie is half right
    # Pairs of weights .5*.4, .5*.1, .4*.1, the first of which is wrong.
    weights = torch.tensor([[0.5, 0.4, 0.1]])
    assert agreement(weights, [5.0, 0.0, 9.0]) == pytest.approx(0.09 / 0.29)
    # Equal gold does not count.
    level = torch.tensor([[0.0, 0.0, 2.0]])
    assert agreement(even, [1.0, 0.0, 0.5], level) == 0.5


# The table as a world


def test_the_table_answers_as_a_world() -> None:
    table = WORLD.open(seed=2)
    assert isinstance(table, World)
    prompts = table.prompts(2000, seed=0)
    assert prompts == table.prompts(2000, seed=0) != table.prompts(2000, seed=1)
    assert set(prompts) == {f"prompt {i}" for i in range(8)}
    answers = table.answers(prompts, n=2, seed=0)
    assert answers == table.answers(prompts, n=2, seed=0) != table.answers(prompts, n=2, seed=1)
    share = sum(a == "response 3" for pair in answers for a in pair) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)


def test_gold_and_posterior_are_those_of_the_named_cell() -> None:
    table = WORLD.open(seed=2)
    prompts, completions = ["prompt 1", "prompt 7"], ["response 4", "response 0"]
    assert table.gold(prompts, completions).tolist() == [
        float(table.gold_table[1, 4]),
        float(table.gold_table[7, 0]),
    ]
    posterior = table.posterior(prompts, completions)
    assert torch.equal(posterior.means[1], table.means[7, 0])
    assert posterior.stds is not None
    assert torch.equal(posterior.stds[0], table.stds[1, 4])
    assert posterior.means.dtype == torch.float64
    message = [{"role": "user", "content": "prompt 1"}]
    assert table.gold([message], ["response 4"]).tolist() == [float(table.gold_table[1, 4])]


def test_members_state_their_errors_about_right() -> None:
    world = ExactWorld(prompt_count=400, response_count=50, coverage=0.3, uncovered_gold=-2.0)
    table = world.open(seed=1)
    errors = table.means - table.gold_table[..., None]
    covered = table.stds.mean(dim=2) < 0.5
    assert float(covered.double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(errors[covered].std()) == pytest.approx(0.15, abs=0.002)
    assert float(errors[~covered].std()) == pytest.approx(1.0, abs=0.02)
    assert float(table.stds[covered].mean()) == pytest.approx(0.151, abs=0.001)
    assert float(table.stds[~covered].std()) == pytest.approx(0.2, abs=0.01)
    assert float(table.gold_table[~covered].mean()) == pytest.approx(-2.0, abs=0.03)
    assert float(table.gold_table[covered].mean()) == pytest.approx(0.0, abs=0.04)


def test_the_annotator_prefers_by_the_table_and_errs_as_told() -> None:
    def wrong(annotator: Annotator) -> float:
        table = ExactWorld(annotator=annotator).open(seed=0)
        prompts = table.prompts(2000, seed=1)
        rows = table.comparisons(prompts, table.answers(prompts, n=2, seed=1), seed=1)
        assert 1500 < len(rows) < 2000  # equal answers are no comparison
        chosen = table.gold([r.prompt for r in rows], [r.chosen for r in rows])
        rejected = table.gold([r.prompt for r in rows], [r.rejected for r in rows])
        return float((chosen < rejected).double().mean())

    assert wrong(WORLD.annotator) == 0.0
    assert wrong(Annotator(label_noise=0.25)) == pytest.approx(0.25, abs=0.03)


def test_a_cell_depends_on_its_seed_and_method_alone() -> None:
    def numbers(run: SeedRun) -> tuple[object, ...]:
        return run.points, run.final_gold, run.probabilities, run.outcomes

    first = numbers(run_cell(WORLD, mix(0.4), 11))
    assert numbers(run_cell(ExactWorld(), mix(0.4), 11)) == first
    assert numbers(run_cell(WORLD, mix(0.4), 12)) != first
    assert numbers(run_cell(WORLD, mix(0.2), 11)) != first


def test_fewer_members_are_the_first_ones() -> None:
    table = WORLD.open(seed=4)
    proxy, spread = table.proxy(method("worst_case", members=2))
    assert torch.equal(proxy, torch.minimum(table.means[..., 0], table.means[..., 1]))
    assert spread is not None
    gap = (table.means[..., 0] - table.means[..., 1]).abs() / 2
    torch.testing.assert_close(spread, gap)
    assert torch.equal(table.proxy(method(members=1))[0], table.means[..., 0])
    nominal, _ = table.proxy(method("nominal", members=2))
    surer = torch.where(table.stds[..., 1] < table.stds[..., 0], 1, 0)[..., None]
    assert torch.equal(nominal, table.means.gather(2, surer)[..., 0])


def test_pairs_are_neighbouring_responses() -> None:
    table = replace(WORLD, response_count=5).open(seed=0)  # the fifth is left over
    run = table.run(method(members=1))
    gap = table.means[2, 3, 0] - table.means[2, 2, 0]
    place = 2 * 2 + 1  # two pairs a prompt
    assert len(run.probabilities) == 16
    assert run.probabilities[place] == pytest.approx(1 - float(gap.sigmoid()))
    assert run.outcomes[place] == bool(table.gold_table[2, 2] > table.gold_table[2, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": "rloo"}, "optimiser=closed_form, not rloo"),
        ({"reward": "length"}, "reward=length: all responses .* same length"),
        ({"reward": "control"}, "reward=control: nothing is trained"),
        ({"reward": "spg"}, "reward=spg: .* nothing can be refined"),
        ({"reward": "uml"}, "reward=uml: .* nothing can be refined"),
        ({"epochs_scale": 2.0}, "leave epochs_scale at 1 .* got 2"),
        ({"family": "heads"}, "family at deep, got 1 and heads"),
        ({"members": 6}, "wants 6 members where the exact world has 5"),
    ],
)
def test_what_a_table_cannot_do_is_refused(settings: dict[str, object], message: str) -> None:
    refused = Method(**({"optimiser": "closed_form"} | settings))
    with pytest.raises(ValueError, match=message):
        run_cell(WORLD, refused, 0)
    with pytest.raises(ValueError, match=message):
        WORLD.open(seed=0).run(refused)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_count": 1}, "prompt_count must be at least 2, got 1"),
        ({"response_count": 1}, "response_count must be at least 2"),
        ({"members": 0}, "members must be at least 1"),
        ({"coverage": 1.5}, r"coverage is a share in \[0, 1\], got 1.5"),
        ({"covered_std": -0.1}, "covered_std must be finite and at least 0, got -0.1"),
        ({"uncovered_gold": math.inf}, "uncovered_gold must be finite, got inf"),
        ({"std_error": math.nan}, "std_error must be finite"),
        ({"beta": 0.0}, "positive and finite, got 0.0"),
        ({"betas": [1.0, math.inf]}, "positive and finite, got inf"),
    ],
)
def test_impossible_dials_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactWorld(**settings)


def test_unknown_texts_and_prices_are_refused() -> None:
    table = WORLD.open(seed=0)
    with pytest.raises(ValueError, match=r"'prompt 8' is not in the table.* to 'prompt 7'"):
        table.gold(["prompt 8"], ["response 0"])
    with pytest.raises(ValueError, match="'no' is not in the table, which has 'response 0'"):
        table.posterior(["prompt 0"], ["no"])
    with pytest.raises(ValueError, match="one prompt for each completion, got 1 and 2"):
        table.gold(["prompt 0"], ["response 0", "response 1"])
    with pytest.raises(ValueError, match="'x' is not in the table"):
        table.answers(["x"], n=1, seed=0)
    with pytest.raises(ValueError, match=r"beta must be positive, got 0\.0"):
        optimal_policy(table.gold_table, beta=0.0, reference=table.reference)
