import json
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trueward.data.formats import Completion, PreferenceRow, Prompt, load_preferences, write_jsonl
from trueward.refine.equivalence import exact_match
from trueward.refine.synthetic import (
    KindReport,
    PromptOutcome,
    Skipped,
    SyntheticPreference,
    clustered_outcomes,
    confidence,
    judged_outcomes,
    judged_pairs,
    result_of,
    reward_ranked_pairs,
    select_pair,
    synthetic_preferences,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def names(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def pick(
    rewards: Sequence[float], clusters: Sequence[int], *, gamma: float = 0.5, seed: int = 0
) -> tuple[int, int] | Skipped:
    return select_pair(
        names(len(rewards)), rewards, clusters, gamma=gamma, generator=generator(seed)
    )


# --- confidence and select_pair ------------------------------------------------------------------


def test_confidence_is_the_largest_clusters_part() -> None:
    assert confidence([0, 1, 0, 2]) == 0.5
    assert confidence(range(10)) == 0.1
    assert confidence([3, 3, 3]) == 1.0
    with pytest.raises(ValueError, match="at least one completion"):
        confidence([])


def test_chosen_is_the_best_of_the_largest_cluster_even_if_another_scores_higher() -> None:
    rewards = [1.0, 9.0, 3.0, 2.0]
    for seed in range(10):
        assert pick(rewards, [0, 1, 0, 0], seed=seed) == (2, 1)


def test_confidence_counts_the_samples_that_were_left_out() -> None:
    assert confidence([0, 0, 1], samples=10) == 0.2
    # 2 of 4 is exactly gamma; 2 of 5 is not, though 2 of the 3 in the list would be.
    for samples, accepted in ((4, True), (5, False)):
        pair = select_pair(
            names(3), [1.0] * 3, [0, 0, 1], gamma=0.5, generator=generator(), samples=samples
        )
        assert isinstance(pair, tuple) is accepted


def test_exactly_gamma_is_accepted_and_less_is_not() -> None:
    assert isinstance(pick([1.0] * 4, [0, 0, 1, 2], gamma=0.5), tuple)
    assert pick([1.0] * 5, [0, 0, 1, 2, 3], gamma=0.5) is Skipped.LOW_CONFIDENCE
    assert pick([1.0] * 4, [0, 0, 1, 2], gamma=0.500001) is Skipped.LOW_CONFIDENCE


@pytest.mark.parametrize(("size", "n", "gamma"), [(7, 25, 0.28), (7, 100, 0.07), (3, 10, 0.3)])
def test_inclusion_survives_floats(size: int, n: int, gamma: float) -> None:
    clusters = [0] * size + [1 + i // size for i in range(n - size)]
    assert Counter(clusters).most_common(1)[0][1] == size
    assert isinstance(pick([0.0] * n, clusters, gamma=gamma), tuple)


def test_samples_that_all_agree_have_no_pair() -> None:
    assert pick([1.0, 2.0], [0, 0]) is Skipped.SINGLE_CLUSTER
    assert pick([1.0, 2.0], [0, 0], gamma=0.0) is Skipped.SINGLE_CLUSTER
    assert pick([1.0], [0]) is Skipped.SINGLE_CLUSTER
    assert pick([], []) is Skipped.NO_COMPLETIONS


def test_of_equally_large_clusters_the_one_with_the_highest_reward_wins() -> None:
    assert pick([1.0, 2.0, 0.0, 5.0], [0, 0, 1, 1])[0] == 3  # type: ignore[index]
    assert pick([5.0, 2.0, 0.0, 1.0], [0, 0, 1, 1])[0] == 0  # type: ignore[index]
    # Size goes before reward, appearance decides the rest.
    assert pick([1.0, 1.0, 9.0, 1.0, 9.0], [0, 0, 1, 0, 1])[0] == 0  # type: ignore[index]
    assert pick([3.0, 2.0, 2.0, 3.0], [5, 5, 4, 4])[0] == 0  # type: ignore[index]


def test_rejected_is_uniform_over_the_other_clusters() -> None:
    clusters = [0, 0, 0, 1, 2, 1]
    drawn = Counter()
    noise = generator(1)
    for _ in range(3000):
        chosen, rejected = select_pair(  # type: ignore[misc]
            names(6), [0.0, 1.0, 2.0, 9.0, -9.0, 0.0], clusters, gamma=0.5, generator=noise
        )
        assert chosen == 2
        drawn[rejected] += 1
    assert set(drawn) == {3, 4, 5}
    # Standard deviation of a count is 26.
    assert all(abs(count - 1000) < 105 for count in drawn.values())


def test_rejected_is_uniform_over_seeds_with_twins_counted_one_by_one() -> None:
    letters = ["a", "a", "a", "a", "b", "b", "c", "d"]
    count = 800
    drawn = Counter(
        synthetic_preferences(["p"], [letters], torch.zeros(1, 8), equivalent=exact_match, seed=s)
        .preferences[0]
        .rejected_index
        for s in range(count)
    )
    assert set(drawn) == {4, 5, 6, 7}
    expected = count / 4
    chi_square = sum((drawn[i] - expected) ** 2 / expected for i in (4, 5, 6, 7))
    assert chi_square < 16.27  # 0.999 quantile at three degrees of freedom


def test_length_matched_takes_the_nearest_length_outside_the_cluster() -> None:
    texts = ["x" * 10, "x" * 10 + ".", "y" * 4, "y" * 24, "y" * 30, "y" * 2]
    for seed in range(10):  # 24 is 2.4 times as long, 4 is 2.5 times as short
        pair = select_pair(
            texts,
            [1.0, 0.0, 5.0, 4.0, 3.0, 2.0],
            [0, 0, 1, 2, 3, 4],
            gamma=0.0,
            generator=generator(seed),
            rejected="length_matched",
        )
        assert pair == (0, 3)


def test_length_matched_draws_among_equally_near_ones() -> None:
    texts = [
        "x" * 6,
        "x" * 6,
        "y" * 3,
        "y" * 12,
        "y" * 20,
        "z" * 12,
    ]  # 3 and 12 are both a factor 2
    drawn = Counter(
        select_pair(
            texts,
            [0.0] * 6,
            [0, 0, 1, 2, 3, 4],
            gamma=0.0,
            generator=generator(seed),
            rejected="length_matched",
        )
        for seed in range(300)
    )
    assert set(drawn) == {(0, 2), (0, 3), (0, 5)}
    assert all(abs(count - 100) < 40 for count in drawn.values())  # five standard deviations


def test_length_matched_narrows_the_difference_in_length() -> None:
    noise = generator(3)
    lengths = torch.randint(1, 60, (200, 10), generator=noise).tolist()
    completions = [
        ["same"] * 5 + [f"{'y' * n} {i}" for i, n in enumerate(row[:5])] for row in lengths
    ]
    prompts: list[Prompt] = [f"p{i}" for i in range(200)]
    rewards = torch.randn(200, 10, generator=noise)
    gaps = []
    for rejected in ("uniform", "length_matched"):
        report = synthetic_preferences(
            prompts, completions, rewards, equivalent=exact_match, rejected=rejected
        ).report
        assert report.accepted == 200
        gaps.append(abs(report.mean_rejected_length - report.mean_chosen_length))  # type: ignore[operator]
    assert gaps[1] < gaps[0] / 2


def test_the_generator_decides() -> None:
    rewards, clusters = [0.0] * 60, [0] * 30 + list(range(1, 31))
    assert pick(rewards, clusters, seed=3) == pick(rewards, clusters, seed=3)
    assert len({pick(rewards, clusters, seed=seed) for seed in range(20)}) > 5


def test_the_chosen_text_itself_is_never_rejected() -> None:
    # Cluster ids that part twins, as no `cluster` of ours does.
    for seed in range(10):
        pair = select_pair(
            ["a", "a", "a", "b"],
            [2.0, 1.0, 0.0, 0.0],
            [0, 0, 1, 2],
            gamma=0.0,
            generator=generator(seed),
        )
        assert pair == (0, 3)
    pair = select_pair(["a", "a"], [1.0, 0.0], [0, 1], gamma=0.0, generator=generator())
    assert pair is Skipped.SINGLE_CLUSTER


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"confidence in \[0, 1\], got 50.0"):
        pick([1.0, 2.0], [0, 1], gamma=50.0)
    with pytest.raises(ValueError, match="got 2 completions, 2 rewards and 1 clusters"):
        pick([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="must be finite"):
        pick([1.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="got -1"):
        synthetic_preferences([], [], torch.zeros(0, 2), equivalent=exact_match, gamma=-1.0)


# --- synthetic_preferences -----------------------------------------------------------------------

PROMPTS: list[Prompt] = [
    "sky?",
    [{"role": "user", "content": "two?"}],
    "life?",
    "all agree?",
    "broken?",
]
COMPLETIONS = [
    ["blue", "Blue!", "red", "blue."],
    ["22", "3", "22", "22"],
    ["a", "b", "c", "d"],
    ["yes", "Yes", "YES", "yes."],
    ["x", "y", "z", "x"],
]
NAN = math.nan
REWARDS = torch.tensor(
    [
        [0.0, 3.0, 9.0, 1.0],
        [NAN, 4.0, 1.0, 2.0],
        [1.0, 2.0, 3.0, 4.0],
        [1.0, 2.0, 3.0, 4.0],
        [NAN, math.inf, -math.inf, NAN],
    ]
)


def test_preferences_and_report_by_hand() -> None:
    result = synthetic_preferences(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match)
    assert result.preferences == [
        SyntheticPreference(
            prompt="sky?",
            chosen="Blue!",
            rejected="red",
            confidence=0.75,
            cluster_sizes=(3, 1),
            chosen_reward=3.0,
            rejected_reward=9.0,
            chosen_index=1,
            rejected_index=2,
        ),
        SyntheticPreference(  # the first "22" has no reward: two of all four count as agreeing
            prompt=[{"role": "user", "content": "two?"}],
            chosen=[{"role": "assistant", "content": "22"}],
            rejected=[{"role": "assistant", "content": "3"}],
            confidence=0.5,
            cluster_sizes=(1, 2),
            chosen_reward=2.0,
            rejected_reward=4.0,
            chosen_index=3,
            rejected_index=1,
        ),
    ]
    report = result.report
    assert (report.prompts, report.accepted) == (5, 2)
    assert (report.low_confidence, report.single_cluster, report.no_completions) == (1, 1, 1)
    assert (report.tied_rewards, report.left_out) == (0, 5)
    assert report.cluster_counts == {1: 1, 2: 2, 4: 1}
    assert report.mean_confidence == pytest.approx((0.75 + 0.5 + 0.25 + 1) / 4)
    assert report.mean_chosen_length == 3.5  # "Blue!" and "22"
    assert report.mean_rejected_length == 2.0  # "red" and "3"
    assert report.acceptance_rate == 0.4
    assert report.chosen_longer == 1.0
    assert report.duplicates == 1  # the third "22": the first one is left out
    assert report.confidence_counts == {"0.2": 1, "0.5": 1, "0.7": 1, "1.0": 1}
    assert (report.by_kind, report.thresholds) == ({}, {})
    assert json.loads(json.dumps(report.as_dict()))["cluster_counts"] == {"1": 1, "2": 2, "4": 1}


def test_left_out_completions_count_against_the_confidence() -> None:
    for others, accepted in (([" ", "b"], 1), ([" ", "", "b"], 0)):  # 2 of 4, 2 of 5
        texts = ["a", "a", *others]
        report = synthetic_preferences(
            ["p"], [texts], torch.zeros(1, len(texts)), equivalent=exact_match
        ).report
        assert (report.accepted, report.low_confidence) == (accepted, 1 - accepted)
        assert report.mean_confidence == 2 / len(texts)


def test_gamma_zero_selects_all_that_have_a_pair() -> None:
    result = synthetic_preferences(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match, gamma=0.0)
    assert [p.prompt for p in result.preferences] == PROMPTS[:3]
    assert result.report.low_confidence == 0
    life = result.preferences[2]
    assert (life.chosen, life.confidence) == ("d", 0.25)


def test_nothing_accepted_leaves_means_open() -> None:
    result = synthetic_preferences(["p"], [["a"]], torch.zeros(1, 1), equivalent=exact_match)
    assert result.preferences == []
    assert result.report.mean_chosen_length is None
    assert result.report.mean_confidence == 1.0
    empty = synthetic_preferences([], [], torch.zeros(0, 3), equivalent=exact_match)
    assert empty.report.mean_confidence is None


def many(count: int) -> tuple[list[Prompt], list[list[str]], torch.Tensor]:
    prompts: list[Prompt] = [f"prompt {i}" for i in range(count)]
    letters = "aaaaabcdef"
    rewards = torch.randn(count, 10, generator=generator(5))
    return prompts, [list(letters) for _ in prompts], rewards


def test_shards_give_what_the_whole_gives() -> None:
    prompts, completions, rewards = many(30)
    whole = synthetic_preferences(prompts, completions, rewards, equivalent=exact_match, seed=4)
    parts = [
        synthetic_preferences(
            prompts[s], completions[s], rewards[s], equivalent=exact_match, seed=4
        ).preferences
        for s in (slice(20, 30), slice(0, 7), slice(7, 20))
    ]
    assert parts[1] + parts[2] + parts[0] == whole.preferences
    assert len({p.rejected for p in whole.preferences}) == 5  # prompts draw differently


def test_the_seed_changes_rejected_sides_only() -> None:
    prompts, completions, rewards = many(30)
    one, two = (
        synthetic_preferences(prompts, completions, rewards, equivalent=exact_match, seed=seed)
        for seed in (0, 1)
    )
    assert [p.chosen_index for p in one.preferences] == [p.chosen_index for p in two.preferences]
    assert [p.rejected for p in one.preferences] != [p.rejected for p in two.preferences]


def test_the_global_random_state_is_neither_read_nor_changed() -> None:
    prompts, completions, rewards = many(5)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(synthetic_preferences(prompts, completions, rewards, equivalent=exact_match))
        assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]


def test_low_precision_rewards_are_ranked() -> None:
    half = REWARDS.to(torch.bfloat16)
    result = synthetic_preferences(PROMPTS, COMPLETIONS, half, equivalent=exact_match)
    assert [p.chosen_index for p in result.preferences] == [1, 3]


def test_mismatched_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 prompts, 1 lists and 2 rows"):
        synthetic_preferences(["p"], [["a"]], torch.zeros(2, 1), equivalent=exact_match)
    with pytest.raises(ValueError, match="Prompt 2 has 1 completions and 2 rewards"):
        reward_ranked_pairs(["p", "q"], [["a", "b"], ["a"]], torch.zeros(2, 2))


# --- rows ----------------------------------------------------------------------------------------


def test_rows_are_trl_preferences_that_our_loader_reads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = synthetic_preferences(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match)
    rows = result.to_rows()
    assert rows[0] == {
        "prompt": "sky?",
        "chosen": "Blue!",
        "rejected": "red",
        "confidence": 0.75,
        "cluster_sizes": [3, 1],
        "chosen_reward": 3.0,
        "rejected_reward": 9.0,
        "chosen_index": 1,
        "rejected_index": 2,
    }
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    loaded = load_preferences(tmp_path / "pairs.jsonl").rows
    made = result.to_preferences()
    for one, other in zip(loaded, made, strict=True):
        assert (one.prompt, one.chosen, one.rejected) == (
            other.prompt,
            other.chosen,
            other.rejected,
        )
        assert one.extra == json.loads(json.dumps(other.extra))
        # Neither carries a margin: the rejected reward may be the higher one.
        assert one.margin is None
        assert other.margin is None


def test_preference_rows_say_where_they_come_from() -> None:
    result = synthetic_preferences(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match)
    row = result.preferences[0].as_preference(where="round 1")
    assert isinstance(row, PreferenceRow)
    assert row.where == "round 1"
    assert result.to_preferences()[0].where == "synthetic"
    assert row.extra["confidence"] == 0.75


# --- reward_ranked_pairs -------------------------------------------------------------------------


def test_reward_ranked_pairs_by_hand() -> None:
    prompts: list[Prompt] = ["p", [{"role": "user", "content": "q"}], "same", "tied", "none"]
    completions = [["a", "b"], ["c", "d"], ["e", "e"], ["f", "g"], ["h", "i"]]
    rewards = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [3.0, 3.0], [NAN, NAN]])
    result = reward_ranked_pairs(prompts, completions, rewards)
    first, second = result.preferences
    assert (first.chosen, first.rejected, first.chosen_index) == ("b", "a", 1)
    assert second.chosen == [{"role": "assistant", "content": "c"}]
    assert (first.chosen_reward, first.rejected_reward) == (2.0, 1.0)
    report = result.report
    assert (report.prompts, report.accepted, report.left_out) == (5, 2, 2)
    assert (report.single_cluster, report.tied_rewards, report.no_completions) == (1, 1, 1)
    assert report.mean_confidence is None
    assert report.cluster_counts == {}


def test_reward_ranked_pairs_share_the_schema_of_synthetic_preferences() -> None:
    prompts, completions, rewards = many(3)
    ranked = reward_ranked_pairs(prompts, completions, rewards).to_rows()
    clustered = synthetic_preferences(
        prompts, completions, rewards, equivalent=exact_match
    ).to_rows()
    assert list(ranked[0]) == list(clustered[0])
    assert (ranked[0]["confidence"], ranked[0]["cluster_sizes"]) == (None, [])


def test_reward_ranked_pairs_are_uniform_over_pairs_of_different_texts() -> None:
    count = 3000
    prompts: list[Prompt] = [f"prompt {i}" for i in range(count)]
    rewards = torch.tensor([[1.0, 2.0, 3.0]]).expand(count, 3)
    result = reward_ranked_pairs(prompts, [["a", "b", "b"]] * count, rewards)
    drawn = Counter((p.chosen_index, p.rejected_index) for p in result.preferences)
    assert set(drawn) == {(1, 0), (2, 0)}
    assert abs(drawn[1, 0] - 1500) < 110  # four standard deviations
    again = reward_ranked_pairs(prompts, [["a", "b", "b"]] * count, rewards)
    other = reward_ranked_pairs(prompts, [["a", "b", "b"]] * count, rewards, seed=1)
    assert again == result
    assert other != result


# --- judged_pairs --------------------------------------------------------------------------------


class Alphabetical:
    """A judge that prefers the earlier letter, with probability 3/4, and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[Prompt, Completion, Completion]]] = []

    def __call__(
        self, prompts: Sequence[Prompt], one: Sequence[Completion], other: Sequence[Completion]
    ) -> Tensor:
        self.calls.append(list(zip(prompts, one, other, strict=True)))
        found = [0.5 if "=" in a + b else 0.75 if a < b else 0.25 for _, a, b in self.calls[-1]]
        return torch.tensor(found, dtype=torch.float64)


def test_a_judge_orders_random_pairs_and_the_rewards_do_not() -> None:
    prompts: list[Prompt] = ["p", [{"role": "user", "content": "q"}], "same", "tied", "none"]
    completions = [["b", "a"], ["c", "d"], ["e", "e"], ["=", "g"], ["h", " "]]
    rewards = [[9.0, 1.0], [1.0, 9.0], [1.0, 2.0], [3.0, 4.0], [NAN, 1.0]]
    judge = Alphabetical()
    result = judged_pairs(prompts, completions, rewards, judge=judge)
    first, second = result.preferences
    assert (first.chosen, first.rejected) == ("a", "b")
    assert (first.chosen_reward, first.rejected_reward) == (1.0, 9.0)
    assert second.chosen == [{"role": "assistant", "content": "c"}]
    report = result.report
    assert (report.accepted, report.single_cluster, report.no_completions) == (2, 1, 1)
    assert (report.tied_judgements, report.tied_rewards, report.left_out) == (1, 0, 2)
    assert judge.calls == [[("p", "b", "a"), (prompts[1], "c", "d"), ("tied", "=", "g")]]
    outcomes = judged_outcomes(prompts, completions, rewards, judge=judge)
    assert [o.judgement for o in outcomes] == [0.25, 0.75, None, 0.5, None]


def test_judged_and_ranked_pairs_are_the_same_pairs_for_a_seed() -> None:
    prompts, completions, rewards = many(40)
    judged = judged_pairs(prompts, completions, rewards, judge=Alphabetical(), seed=3)
    ranked = reward_ranked_pairs(prompts, completions, rewards, seed=3)
    sides = [
        [{p.chosen_index, p.rejected_index} for p in made.preferences] for made in (judged, ranked)
    ]
    assert sides[0] == sides[1]
    assert list(judged.to_rows()[0]) == list(ranked.to_rows()[0])
    assert [p.chosen for p in judged.preferences] != [p.chosen for p in ranked.preferences]
    assert all(p.chosen < p.rejected for p in judged.preferences)  # type: ignore[operator]


def test_a_judge_that_gives_no_probabilities_is_refused() -> None:
    for bad in (torch.tensor([1.5]), torch.tensor([NAN]), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match="one probability for each pair: asked about 1"):
            judged_pairs(["p"], [["a", "b"]], [[1.0, 2.0]], judge=lambda *texts, bad=bad: bad)


# --- outcomes ------------------------------------------------------------------------------------


def test_lists_of_different_lengths_are_taken() -> None:
    completions = [["a", "a", "b"], ["c"], [], ["d", "e"]]
    rewards = [[1.0, 2.0, 3.0], [1.0], [], [1.0, 2.0]]
    result = synthetic_preferences(
        ["p", "q", "r", "s"], completions, rewards, equivalent=exact_match
    )
    assert [(p.prompt, p.chosen_index, p.confidence) for p in result.preferences] == [
        ("p", 1, 2 / 3),
        ("s", 1, 0.5),
    ]
    assert result.report.no_completions == 1
    assert result.report.mean_confidence == pytest.approx((2 / 3 + 1 + 0.5) / 3)


def test_outcomes_keep_all_that_was_decided_on_and_survive_json() -> None:
    outcomes = clustered_outcomes(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match)
    second, third = outcomes[1], outcomes[2]
    assert second.clusters == (None, 0, 1, 1)
    assert second.rewards == (None, 4.0, 1.0, 2.0)
    assert (second.cluster_sizes, second.confidence) == ((1, 2), 0.5)
    row = third.as_row("life?")
    assert (row["outcome"], row["confidence"]) == ("low confidence", 0.25)
    assert row["cluster_sizes"] == [1, 1, 1, 1]
    assert outcomes[0].as_row("sky?")["outcome"] == "accepted"
    for outcome, prompt in zip(outcomes, PROMPTS, strict=True):
        kept = json.loads(json.dumps(outcome.as_row(prompt), allow_nan=False))
        assert PromptOutcome.from_row(kept, prompt) == outcome


def test_acceptance_is_reported_by_kind() -> None:
    outcomes = clustered_outcomes(PROMPTS, COMPLETIONS, REWARDS, equivalent=exact_match)
    report = result_of(outcomes, kinds=["en", "de", "de", "", "en"]).report
    assert report.by_kind == {
        "": KindReport(prompts=1, accepted=0, acceptance_rate=0.0, mean_confidence=1.0),
        "de": KindReport(prompts=2, accepted=1, acceptance_rate=0.5, mean_confidence=0.375),
        "en": KindReport(prompts=2, accepted=1, acceptance_rate=0.5, mean_confidence=0.75),
    }


def test_confidences_are_counted_by_whole_tenths() -> None:
    for agree, n, tenth in ((1, 10, "0.1"), (5, 10, "0.5"), (7, 25, "0.2"), (19, 20, "0.9")):
        texts = ["same"] * agree + [f"other {i}" for i in range(n - agree)]
        report = synthetic_preferences(
            ["p"], [texts], torch.zeros(1, n), equivalent=exact_match
        ).report
        assert report.confidence_counts == {tenth: 1}


def test_equal_lengths_count_as_half() -> None:
    completions = [["aa", "b"], ["a", "bb"], ["a", "b"], ["aaa", "b"]]
    result = reward_ranked_pairs(["p", "q", "r", "s"], completions, [[2.0, 1.0]] * 4)
    assert result.report.chosen_longer == (1 + 0 + 0.5 + 1) / 4
