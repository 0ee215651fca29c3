import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data.formats import Completion, DataError, PreferenceRow, Prompt, text_of
from trueward.evaluate.judges import function_judge
from trueward.evaluate.shift import (
    ShiftTable,
    agreement,
    energy_distance,
    energy_test,
    judged_pairs,
    last_states,
    length_difference,
    policy_kl,
    samples_of_texts,
    shift_table,
)
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.sampling import SamplingConfig, sample
from trueward.testing import tiny_backbone, tiny_language_model, tiny_texts


def length_reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [float(len(text_of(c))) for c in completions]


def brevity_reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [-float(len(text_of(c))) for c in completions]


def constant_reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
    return [1.0] * len(completions)


# --- pairs ---


def test_pairs_are_ordered_by_gold_and_equal_gold_gives_none():
    found = judged_pairs(["p", "q"], [["a", "bb", "cc"], ["dddd", "e"]], gold=length_reward)
    sides = [(row.prompt, row.chosen, row.rejected, row.margin) for row in found.rows]
    assert sides == [("p", "bb", "a", 1.0), ("p", "cc", "a", 1.0), ("q", "dddd", "e", 3.0)]
    assert (found.equal, found.unjudged) == (1, 0)
    assert found.rows[1].where == "prompt 1, completions 1 and 3"


def test_the_first_pair_alone_leaves_the_other_completions_out():
    found = judged_pairs(["p"], [["a", "bb", "ccc"]], gold=length_reward, pairs="first")
    assert [(row.chosen, row.rejected) for row in found.rows] == [("bb", "a")]


def test_gold_is_asked_once_for_each_completion():
    asked = []

    def gold(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        asked.extend(completions)
        return [float(len(text_of(c))) for c in completions]

    assert len(judged_pairs(["p"], [["a", "bb", "ccc", "dddd"]], gold=gold).rows) == 6
    assert asked == ["a", "bb", "ccc", "dddd"]


def test_completions_without_a_gold_reward_are_counted():
    def gold(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        return [None if c == "bad" else float(len(text_of(c))) for c in completions]

    found = judged_pairs(["p"], [["bad", "a", "bb"]], gold=gold)
    assert [row.chosen for row in found.rows] == ["bb"]
    assert (found.equal, found.unjudged) == (0, 2)


def test_a_judge_orders_pairs_and_is_not_asked_about_equal_texts():
    asked = []

    def verdict(prompt: Prompt, first: Completion, second: Completion) -> float:
        asked.append((first, second))
        return 0.5 if "t" in f"{first}{second}" else float(str(first) < str(second))

    found = judged_pairs(["p"], [["b", "a", "b", "t"]], judge=function_judge(verdict))
    assert [(row.chosen, row.rejected) for row in found.rows] == [("a", "b"), ("a", "b")]
    assert all(row.margin is None for row in found.rows)
    assert found.equal == 4  # the two b, and three verdicts of one half
    assert ("b", "b") not in asked


def test_pairs_need_two_completions_and_one_order():
    with pytest.raises(ValueError, match="prompt 2 has 1"):
        judged_pairs(["p", "q"], [["a", "b"], ["c"]], gold=length_reward)
    with pytest.raises(ValueError, match="give one of them"):
        judged_pairs(["p"], [["a", "b"]])
    with pytest.raises(ValueError, match="probability in"):
        judged_pairs(["p"], [["a", "b"]], judge=lambda p, a, b: torch.tensor([1.5]))


# --- agreement ---


def test_agreement_counts_ties_half_and_leaves_equal_gold_out():
    gold = torch.tensor([[1.0, 2.0, 2.0]])  # two pairs that differ
    assert agreement(torch.tensor([[0.0, 1.0, 2.0]]), gold) == 1.0
    assert agreement(torch.tensor([[1.0, 1.0, 0.0]]), gold) == 0.25
    assert math.isnan(agreement(torch.zeros(1, 2), torch.ones(1, 2)))


def test_agreement_is_the_accuracy_on_all_judged_pairs():
    generator = torch.Generator().manual_seed(0)
    gold = torch.randint(4, (6, 5), generator=generator).double()
    proxy = torch.randint(4, (6, 5), generator=generator).double()
    prompts = [f"prompt {i}" for i in range(6)]
    answers = [[f"answer {i} {k}" for k in range(5)] for i in range(6)]
    table = {a: (i, k) for i, some in enumerate(answers) for k, a in enumerate(some)}

    def looked_up(values: torch.Tensor):
        return lambda prompts, completions: [float(values[table[c]]) for c in completions]

    rows = judged_pairs(prompts, answers, gold=looked_up(gold)).rows
    found = shift_table({"proxy": looked_up(proxy)}, {"samples": rows}, resamples=1)
    assert found.accuracy("proxy", "samples").accuracy == pytest.approx(agreement(proxy, gold))


# --- the table ---


def rows_of(prompt: str, *pairs: tuple[str, str]) -> list[PreferenceRow]:
    return [PreferenceRow(prompt, chosen, rejected) for chosen, rejected in pairs]


def both_sources() -> dict[str, list[PreferenceRow]]:
    return {
        "before": [*rows_of("p", ("aa", "b"), ("c", "dd")), *rows_of("q", ("ee", "f"))],
        "after": [*rows_of("p", ("a", "bb")), *rows_of("q", ("c", "dd"), ("ff", "g"))],
    }


def both_rewards(resamples: int = 200, seed: int = 0) -> ShiftTable:
    return shift_table(
        {"long": length_reward, "short": brevity_reward, "blind": constant_reward},
        both_sources(),
        resamples=resamples,
        seed=seed,
    )


def test_accuracies_and_differences_by_hand():
    table = both_rewards()
    assert table.rewards == ["long", "short", "blind"]
    assert table.sources == ["before", "after"]
    assert table.accuracy("long", "before").accuracy == pytest.approx(2 / 3)
    assert table.accuracy("long", "after").accuracy == pytest.approx(1 / 3)
    assert table.accuracy("short", "after").accuracy == pytest.approx(2 / 3)
    blind = table.accuracy("blind", "before")
    assert (blind.accuracy, blind.ties, blind.pairs, blind.prompts) == (0.5, 3, 3, 2)
    assert (blind.low, blind.high) == (0.5, 0.5)
    found = table.difference("short", "long", "after")
    assert found.difference == pytest.approx(1 / 3)
    turned = table.difference("long", "short", "after")
    assert (turned.difference, turned.low, turned.high) == (
        -found.difference,
        -found.high,
        -found.low,
    )
    with pytest.raises(KeyError, match="no reward"):
        table.accuracy("long", "nowhere")


def test_the_interval_is_a_bootstrap_over_prompts():
    # Two prompts: p has 1 of 2 right, q 1 of 1. Draws: pp 1/2, pq and qp 2/3, qq 1.
    found = both_rewards(resamples=2000).accuracy("long", "before")
    assert (found.low, found.high) == (0.5, 1.0)
    rows = both_sources()["before"]
    middle = shift_table({"long": length_reward}, {"before": rows}, confidence=0.4)
    inner = middle.accuracy("long", "before")
    assert (inner.low, inner.high) == pytest.approx((2 / 3, 2 / 3))  # all pairs weigh the same
    same = both_rewards(resamples=2000)
    assert same == both_rewards(resamples=2000)
    assert same != both_rewards(resamples=3, seed=1)


def test_pairs_of_one_prompt_do_not_narrow_the_interval():
    """Ten copies of each prompt's pairs say no more about other prompts than one."""
    generator = torch.Generator().manual_seed(3)
    sides = [
        ("aa", "b") if torch.rand(1, generator=generator) < 0.6 else ("b", "aa") for _ in range(60)
    ]
    once = [row for i, pair in enumerate(sides) for row in rows_of(f"p{i}", pair)]
    often = [row for i, pair in enumerate(sides) for row in rows_of(f"p{i}", *[pair] * 10)]
    table = shift_table({"long": length_reward}, {"once": once, "often": often})
    one, many = table.accuracy("long", "once"), table.accuracy("long", "often")
    assert (one.accuracy, one.low, one.high) == pytest.approx((many.accuracy, many.low, many.high))
    share = sum(pair == ("aa", "b") for pair in sides) / 60
    half = 1.96 * math.sqrt(share * (1 - share) / 60)
    assert one.high - one.low == pytest.approx(2 * half, rel=0.15)


def test_a_paired_difference_is_narrower_than_two_accuracies_apart():
    """Rewards that err on nearly the same prompts differ by little, however unsure both are."""
    rows = [
        row for i in range(80) for row in rows_of(f"p{i}", ("aa", "b") if i % 2 else ("b", "aa"))
    ]

    def nearly(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        turned = {"p0", "p2"}
        return [
            -float(len(str(c))) if p in turned else float(len(str(c)))
            for p, c in zip(prompts, completions, strict=True)
        ]

    table = shift_table({"long": length_reward, "nearly": nearly}, {"samples": rows})
    found = table.difference("nearly", "long", "samples")
    assert found.difference == pytest.approx(2 / 80)
    assert 0 <= found.low < found.high < 0.08
    apart = table.accuracy("long", "samples")
    assert apart.high - apart.low > 0.2


def test_one_prompt_has_no_interval():
    table = shift_table({"long": length_reward}, {"one": rows_of("p", ("aa", "b"))})
    found = table.accuracy("long", "one")
    assert found.accuracy == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_completion_of_several_pairs_is_scored_once():
    scored = []

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        scored.extend(completions)
        return length_reward(prompts, completions)

    rows = judged_pairs(["p", "q"], [["a", "bb", "ccc"]] * 2, gold=length_reward).rows
    assert len(rows) == 6
    shift_table({"long": reward}, {"samples": rows}, resamples=1)
    assert sorted(scored) == ["a", "a", "bb", "bb", "ccc", "ccc"]  # of each prompt


def test_all_rewards_are_judged_on_the_pairs_that_all_can_read(
    tokenizer: PreTrainedTokenizerFast,
):
    backbone = tiny_backbone(vocab_size=len(tokenizer), max_positions=64)
    model = RewardModel.from_backbone(backbone, tokenizer, max_length=24)
    rows = [*rows_of("the cat", ("big dog", "red")), *rows_of("the dog", ("cat " * 60, "red"))]
    table = shift_table({"long": length_reward, "model": model}, {"samples": rows}, resamples=1)
    assert table.left_out == {"samples": 1}
    assert table.accuracy("long", "samples").pairs == 1
    with pytest.raises(ValueError, match="'samples' has no pair"):
        shift_table({"model": model}, {"samples": rows[1:]})


def test_a_reward_that_is_not_finite_is_named_with_its_row():
    def broken(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return [math.nan] * len(completions)

    rows = judged_pairs(["p"], [["a", "bb"]], gold=length_reward).rows
    with pytest.raises(ValueError, match=r"of 'broken' are missing.*prompt 1, completions 1 and 2"):
        shift_table({"broken": broken}, {"samples": rows})


# --- the energy distance ---


@pytest.mark.parametrize(
    ("x", "y", "squared"),
    [
        # Examples of scipy.stats.energy_distance's documentation, whose value is the square root.
        ([0.0], [2.0], 2.0000000000000004),
        ([0.0] * 3 + [8.0], [0.0] * 2 + [8.0] * 2, 1.0000000000000002),
        (
            [0.7] * 21 + [7.4] * 42 + [2.4] * 74 + [6.8] * 80,
            [1.4] * 76 + [8.0] * 88,
            0.88003340976158217,
        ),
    ],
)
def test_energy_distance_in_one_dimension_is_the_square_of_scipys(
    x: list[float], y: list[float], squared: float
):
    found = energy_distance(torch.tensor(x)[:, None].double(), torch.tensor(y)[:, None].double())
    assert found == pytest.approx(squared**2, rel=1e-7)


def test_energy_distance_agrees_with_its_definition_in_any_dimension():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 7))

    def mean(a: torch.Tensor, b: torch.Tensor, pairs: list[tuple[int, int]]) -> float:
        return float(np.mean([np.linalg.norm(a[i].numpy() - b[k].numpy()) for i, k in pairs]))

    every = [list(itertools.product(range(n), range(m))) for n, m in ((5, 7), (5, 5), (7, 7))]
    v_form = 2 * mean(x, y, every[0]) - mean(x, x, every[1]) - mean(y, y, every[2])
    assert energy_distance(x, y) == pytest.approx(v_form, rel=1e-6)
    apart = [[(i, k) for i, k in pairs if i != k] for pairs in every[1:]]
    u_form = 2 * mean(x, y, every[0]) - mean(x, x, apart[0]) - mean(y, y, apart[1])
    assert energy_distance(x, y, unbiased=True) == pytest.approx(u_form, rel=1e-6)


def test_the_same_sample_has_no_distance_and_the_unbiased_form_no_bias():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 3, generator=generator)  # more than a slice
    assert energy_distance(x, x) == pytest.approx(0.0, abs=1e-12)
    assert energy_distance(x, x[torch.randperm(600)]) == pytest.approx(0.0, abs=1e-10)
    draws = [
        [energy_distance(a, b, unbiased=form) for form in (False, True)]
        for a, b in (torch.randn(2, 12, 3, generator=generator) for _ in range(200))
    ]
    biased, unbiased = torch.tensor(draws).T
    assert bool((biased > 0).all())
    assert float(unbiased.mean()) == pytest.approx(0.0, abs=3 * float(unbiased.std()) / 200**0.5)
    assert float(unbiased.min()) < 0


def test_energy_distance_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="at least 2 rows"):
        energy_distance(torch.zeros(1, 2), torch.zeros(3, 2), unbiased=True)
    with pytest.raises(ValueError, match="finite"):
        energy_distance(torch.full((2, 2), math.nan), torch.zeros(2, 2))


def test_the_permutation_test_gives_the_exact_p_of_few_points():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [11.0]])
    # Of the six ways to label four points, two (this one and its mirror) reach the distance.
    found = energy_test(x, y, permutations=1500)
    assert found.p_value == pytest.approx(1 / 3, abs=0.04)
    assert found.distance == pytest.approx(energy_distance(x, y))
    assert found.distance == pytest.approx(2 * 10 - 0.5 - 0.5)
    assert found.coefficient == pytest.approx(19 / 20)
    assert found == energy_test(x, y, permutations=1500)


def test_the_permutation_test_holds_its_level_and_sees_a_shift():
    generator = torch.Generator().manual_seed(2)
    p_values = []
    for _ in range(120):
        x, y = torch.randn(2, 10, 2, generator=generator)
        p_values.append(energy_test(x, y, permutations=39).p_value)
    assert 0.02 <= sum(p <= 0.1 for p in p_values) / 120 <= 0.18
    x, y = torch.randn(2, 30, 2, generator=generator)
    assert energy_test(x, y + 1.5, permutations=99).p_value == 0.01


def test_prompts_alone_are_no_shift_when_labels_stay_within_them():
    """Ten samples a prompt, far apart by prompt: sources of other prompts differ by them alone."""
    generator = torch.Generator().manual_seed(4)
    centres = 20 * torch.randn(6, 2, generator=generator)
    x = (centres[:, None] + torch.randn(6, 10, 2, generator=generator)).flatten(0, 1)
    y = (centres[:, None] + torch.randn(6, 10, 2, generator=generator)).flatten(0, 1)
    names = [f"p{i}" for i in range(6) for _ in range(10)]
    assert energy_test(x, y, groups=(names, names), permutations=99).p_value > 0.05
    moved = energy_test(x, y + 1.0, groups=(names, names), permutations=99)
    assert moved.p_value == 0.01
    # Spread between prompts hides the same shift from labels that cross prompts.
    assert energy_test(x, y + 1.0, permutations=99).p_value > 0.3
    with pytest.raises(ValueError, match="no prompt in common"):
        energy_test(x, y, groups=(names, [f"other {n}" for n in names]))
    with pytest.raises(ValueError, match="name the prompt of each row"):
        energy_test(x, y, groups=(names, names[:3]))


def test_last_states_are_what_the_head_reads(tokenizer: PreTrainedTokenizerFast):
    model = RewardModel.from_backbone(tiny_backbone(vocab_size=len(tokenizer)), tokenizer)
    prompts, completions = tiny_texts(5, seed=1), tiny_texts(5, seed=2)
    states = last_states(model, prompts, completions, max_tokens=40)
    assert model.head is not None
    rewards = model.head(states).means[:, 0]
    torch.testing.assert_close(rewards, model.score(prompts, completions).mean, atol=1e-5, rtol=0)
    many = RewardModel.from_backbone(
        tiny_backbone(vocab_size=len(tokenizer)), tokenizer, lora_members=2, lora_rank=2
    )
    with pytest.raises(ValueError, match="no single state"):
        last_states(many, prompts, completions)


# --- lengths and the KL ---


def test_lengths_are_compared_prompt_by_prompt():
    found = length_difference(
        ["p", "p", "q", "r"], ["aaaa", "aa", "bbbbb", "c" * 9], ["p", "q"], ["a", "bb"]
    )
    assert (found.mean, found.other_mean) == (5.0, 1.5)
    assert (found.difference, found.prompts) == (2.5, 2)  # 3 - 1 and 5 - 2
    half = 12.7062 * 0.5 / math.sqrt(0.5) / math.sqrt(2)  # Student's t with one degree
    assert found.high - found.difference == pytest.approx(half, rel=1e-4)
    apart = length_difference(["p"], ["aaaa"], ["q"], ["a"])
    assert (apart.difference, apart.prompts) == (3.0, 0)
    assert math.isnan(apart.low)


def test_a_policys_kl_is_zero_to_itself_and_the_sum_of_its_estimators(
    tokenizer: PreTrainedTokenizerFast,
):
    policy, ref = (
        Policy(tiny_language_model(vocab_size=len(tokenizer), seed=seed), tokenizer)
        for seed in (0, 1)
    )
    drawn = sample(policy, tiny_texts(3, seed=5), SamplingConfig(n=2, max_new_tokens=6))
    for value in policy_kl(policy, policy, drawn).values():
        assert value == pytest.approx(0.0, abs=1e-5)
    found = policy_kl(policy, ref, drawn, max_tokens=30)
    log_ratios = []
    for one in drawn:
        whole = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        start = len(one.prompt_ids)
        with torch.no_grad():
            logps = [m.model(whole).logits[0].log_softmax(-1) for m in (policy, ref)]
        targets = whole[0, start:]
        at = torch.arange(start - 1, whole.shape[1] - 1)
        log_ratios.append(logps[0][at, targets] - logps[1][at, targets])
    k1 = sum(float(r.sum()) for r in log_ratios) / len(drawn)
    k3 = sum(float((torch.expm1(-r) + r).sum()) for r in log_ratios) / len(drawn)
    assert found["kl/k1"] == pytest.approx(k1, abs=1e-4)
    assert found["kl/k3"] == pytest.approx(k3, abs=1e-4)
    assert found["kl/exact"] > 0
    with pytest.raises(ValueError, match="got none"):
        policy_kl(policy, ref, [])


def test_texts_read_back_are_the_samples_that_were_written(tokenizer: PreTrainedTokenizerFast):
    policy = Policy(tiny_language_model(vocab_size=len(tokenizer), max_positions=64), tokenizer)
    prompts = tiny_texts(2, seed=3)
    read = samples_of_texts(policy, prompts, ["the cat", "a dog"], finished=[True, False])
    end = tokenizer.eos_token_id
    assert [one.completion_ids[-1] == end for one in read] == [True, False]
    assert [tokenizer.decode(one.completion_ids, skip_special_tokens=True) for one in read] == [
        "the cat",
        "a dog",
    ]
    with pytest.raises(DataError, match="Completion 1 has"):
        samples_of_texts(policy, ["p"], ["cat " * 100])
