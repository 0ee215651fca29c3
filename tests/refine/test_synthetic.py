import json
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from trueward.data.formats import PreferenceRow, Prompt, load_preferences, write_jsonl
from trueward.refine.equivalence import exact_match
from trueward.refine.synthetic import (
    Skipped,
    SyntheticPreference,
    confidence,
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
        SyntheticPreference(  # the first "22" has no reward: two of the three that are left agree
            prompt=[{"role": "user", "content": "two?"}],
            chosen=[{"role": "assistant", "content": "22"}],
            rejected=[{"role": "assistant", "content": "3"}],
            confidence=2 / 3,
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
    assert report.mean_confidence == pytest.approx((0.75 + 2 / 3 + 0.25 + 1) / 4)
    assert report.mean_chosen_length == 3.5  # "Blue!" and "22"
    assert report.mean_rejected_length == 2.0  # "red" and "3"


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
