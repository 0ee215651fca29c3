import itertools
import math
import random

import pytest
import torch

from trueward.data.packing import (
    Group,
    group_by_prompt,
    pack,
    packed_size,
    pad,
    padded_size,
    row_tokens,
    shared_prefix_mask,
    token_budget_batches,
)

GROUPS = [Group([5, 6, 7], [[8, 9, 10], [11, 12]]), Group([13], [[14]])]


def test_a_packed_row_holds_the_prompt_once_and_positions_continue_from_it() -> None:
    batch = pack(GROUPS, pad_id=0)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 10, 11, 12],
        [13, 14, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.prompt_ends.tolist() == [2, 2, 0]
    assert batch.starts.tolist() == [3, 6, 1]
    assert batch.lengths.tolist() == [3, 2, 1]
    assert batch.last.tolist() == [5, 7, 1]
    assert len(batch) == 3


def test_a_padded_batch_gives_each_completion_its_own_row() -> None:
    batch = pad(GROUPS, pad_id=0)
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 8, 9, 10],
        [5, 6, 7, 11, 12, 0],
        [13, 14, 0, 0, 0, 0],
    ]
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0], [1] * 2 + [0] * 4]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 4, 4]
    assert batch.rows.tolist() == [0, 1, 2]
    assert batch.last.tolist() == [5, 4, 1]


def test_the_mask_follows_lengths_though_pad_ids_occur_inside() -> None:
    batch = pad([Group([0, 0], [[0, 2, 0]]), Group([0], [[2]])], pad_id=0)
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.last.tolist() == [4, 1]


@pytest.mark.parametrize("form", [pack, pad])
def test_targets_are_the_completions_and_predictors_stand_one_before(form) -> None:
    batch = form(GROUPS, pad_id=0)
    assert batch.mask.tolist() == [[True] * 3, [True, True, False], [True, False, False]]
    assert batch.targets[batch.mask].tolist() == [8, 9, 10, 11, 12, 14]
    predictors = batch.input_ids[batch.rows[:, None], batch.predictor_columns]
    # The prompt's end predicts the first token of EVERY completion, also of the second in a row.
    assert predictors[batch.mask].tolist() == [7, 8, 9, 7, 11, 13]


def test_the_shared_prefix_mask_by_hand() -> None:
    mask = shared_prefix_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))
    lowest = torch.finfo(torch.float32).min
    assert mask.shape == (1, 1, 6, 6)
    assert set(mask.unique().tolist()) == {0.0, lowest}
    visible = (mask[0, 0] == 0).int().tolist()
    assert visible == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_every_completion_sees_as_many_tokens_as_in_a_row_of_its_own() -> None:
    rng = random.Random(0)
    for _ in range(20):
        sizes = [rng.randint(1, 6) for _ in range(rng.randint(1, 5))]
        prompt = rng.randint(1, 7)
        batch = pack([Group([3] * prompt, [[4] * n for n in sizes])], pad_id=0)
        seen = (batch.attention_mask[0, 0] == 0).sum(-1)
        assert seen.tolist() == [p + 1 for p in batch.position_ids[0].tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_in_half_precision_stays_finite(dtype: torch.dtype) -> None:
    batch = pack(GROUPS, pad_id=0).to("cpu", dtype)
    assert batch.attention_mask.dtype == dtype
    assert batch.attention_mask.isfinite().all()
    assert batch.attention_mask.min() == torch.finfo(dtype).min
    assert batch.input_ids.dtype == torch.int64
    padded = pad(GROUPS, pad_id=0).to("cpu", dtype)
    assert padded.attention_mask.dtype == torch.int64


def test_completions_of_one_prompt_are_grouped_wherever_they_stand() -> None:
    prompts = [[1, 2], [3], [1, 2], [3], [1, 2]]
    completions = [[10], [11], [12], [13], [14]]
    groups, members = group_by_prompt(prompts, completions, max_tokens=100)
    assert groups == [Group([1, 2], [[10], [12], [14]]), Group([3], [[11], [13]])]
    assert members == [[0, 2, 4], [1, 3]]


def test_a_group_stays_within_its_tokens_and_its_completions() -> None:
    prompts = [[1, 2]] * 5
    completions = [[10, 11]] * 5
    groups, members = group_by_prompt(prompts, completions, max_tokens=6)
    assert members == [[0, 1], [2, 3], [4]]
    assert max(map(packed_size, groups)) == 6
    _, members = group_by_prompt(prompts, completions, max_tokens=1)
    assert members == [[0], [1], [2], [3], [4]]  # none is lost where one alone is too large
    _, members = group_by_prompt(prompts, completions, max_tokens=100, max_completions=3)
    assert members == [[0, 1, 2], [3, 4]]


def test_grouping_refuses_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        group_by_prompt([[1], [2]], [[3]], max_tokens=10)


def test_sizes_by_hand() -> None:
    assert packed_size(GROUPS[0]) == 8
    assert padded_size(GROUPS[0]) == (2, 6)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_batches_hold_every_group_once_within_the_budget(shared_prefix: bool) -> None:
    rng = random.Random(1)
    groups = [
        Group([3] * rng.randint(1, 9), [[4] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))])
        for _ in range(40)
    ]
    form = pack if shared_prefix else pad
    batches = list(
        token_budget_batches(groups, max_tokens=80, call_tokens=80, shared_prefix=shared_prefix)
    )
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    sizes = [form([groups[i] for i in b], pad_id=0).input_ids.numel() for b in batches]
    assert max(sizes) <= 80
    assert 1 < len(batches) < 25  # and they are not needlessly small


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("call_tokens", [0, 5, 60])
def test_of_all_cuts_into_batches_the_cheapest_is_taken(shared_prefix: bool, call_tokens: int):
    rng = random.Random(2)
    groups = [
        Group([3] * rng.randint(1, 9), [[4] * rng.randint(1, 9) for _ in range(rng.randint(1, 3))])
        for _ in range(10)
    ]
    form = pack if shared_prefix else pad

    def cost(batches: list[list[int]]) -> float:
        sizes = [form([groups[i] for i in b], pad_id=0).input_ids.numel() for b in batches]
        return math.inf if max(sizes) > 60 else sum(sizes) + call_tokens * len(sizes)

    found = list(
        token_budget_batches(
            groups, max_tokens=60, shared_prefix=shared_prefix, call_tokens=call_tokens
        )
    )
    ordered = [i for batch in reversed(found) for i in batch]
    cuts = itertools.product([False, True], repeat=len(ordered) - 1)
    costs = []
    for cut in cuts:
        batches = [[ordered[0]]]
        for i, new in zip(ordered[1:], cut, strict=True):
            if new:
                batches.append([i])
            else:
                batches[-1].append(i)
        costs.append(cost(batches))
    assert cost(found) == min(costs)
    assert len({c for c in costs if c < math.inf}) > 5


def test_free_calls_leave_no_padding_and_dear_ones_no_room():
    groups = [Group([3] * n, [[4]]) for n in (1, 2, 3, 1, 2, 3)]
    free = list(token_budget_batches(groups, max_tokens=100, call_tokens=0))
    assert sorted(map(sorted, free)) == [[0, 3], [1, 4], [2, 5]]
    assert len(list(token_budget_batches(groups, max_tokens=100, call_tokens=100))) == 1


def test_a_group_above_the_budget_travels_alone() -> None:
    groups = [Group([3] * 50, [[4] * 50]), Group([3], [[4]]), Group([3], [[4]])]
    assert list(token_budget_batches(groups, max_tokens=10, call_tokens=10)) == [[0], [1, 2]]
    assert list(token_budget_batches([], max_tokens=10, call_tokens=10)) == []


@pytest.mark.parametrize(("prompt", "hidden_size"), [(8, 96), (256, 256), (300, 4096)])
def test_a_row_of_row_tokens_is_the_cheapest_for_a_completion(prompt: int, hidden_size: int):
    """Operations for each completion, counted for every row length and divided among its k."""

    def cost(row: int, completion: float) -> float:
        k = (row - prompt) / completion
        return row * (24 * hidden_size**2 + 4 * hidden_size * row) / k

    best = row_tokens(prompt, hidden_size=hidden_size)
    for completion in (1.0, 37.5):
        searched = min(range(prompt + 1, 20 * best), key=lambda row: cost(row, completion))
        assert abs(searched - best) <= 1


def test_groups_ask_the_room_of_each_prompt():
    prompts, completions = [[1], [1], [2, 2], [2, 2]], [[5], [6], [7], [8]]
    _, members = group_by_prompt(prompts, completions, max_tokens=lambda size: 1 + 2 * (size == 1))
    assert members == [[0, 1], [2], [3]]
