"""Ids to batches: the completions of one prompt travel as one packed sequence.

A packed row holds the prompt once and then each completion::

    tokens     p0 p1 p2 | a0 a1 a2 | b0 b1
    positions   0  1  2 |  3  4  5 |  3  4

Position ids continue from the prompt for every completion, and a 4-D mask lets a completion see
the prompt and itself only. An unmodified transformers decoder (rotary or learned positions) then
gives each token the hidden state that it would have in a row of its own. The unpacked form, one
row for each completion with right padding, carries the same fields, so that nothing downstream
knows which of the two it reads.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Group(NamedTuple):
    """One prompt and the completions to compute on it (a pair, or n samples)."""

    prompt_ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Token rows, and where in them each completion lies.

    Shapes: row = token rows, completion = completions in all rows, in the order of the groups
    handed in. Columns count along `seq`.
    """

    input_ids: Int[Tensor, "row seq"]
    position_ids: Int[Tensor, "row seq"]
    segments: Int[Tensor, "row seq"]  # 0 in prompts, 1, 2, ... in completions, -1 in padding
    packed: bool  # rows may hold several completions, which must not see each other
    rows: Int[Tensor, " completion"]  # the row that holds the completion
    prompt_ends: Int[Tensor, " completion"]  # column of the prompt's last token
    starts: Int[Tensor, " completion"]  # column of the completion's first token
    lengths: Int[Tensor, " completion"]  # tokens in the completion
    dtype: torch.dtype = torch.float32  # of the model, whose additive mask must have it

    @property
    def attention_mask(self) -> Float[Tensor, "row 1 seq seq"] | Int[Tensor, "row seq"]:
        """The additive mask of packed rows; ones and zeros of rows with one completion each.

        Made when it is asked for, and not kept: attention in pieces (`models.attention`) does
        without, and squares of a step's batches would fill the memory.
        """
        if self.packed:
            return shared_prefix_mask(self.segments, dtype=self.dtype)
        return (self.segments >= 0).long()

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def last(self) -> Int[Tensor, " completion"]:
        """Column of each completion's last token: where a reward head reads."""
        return self.starts + self.lengths - 1

    @property
    def mask(self) -> Bool[Tensor, "completion token"]:
        """True at the tokens of each completion, right padded to the longest."""
        offsets = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return offsets[None, :] < self.lengths[:, None]

    @property
    def target_columns(self) -> Int[Tensor, "completion token"]:
        """Column of each completion token (clamped to the last one beyond its end)."""
        offsets = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return torch.minimum(self.starts[:, None] + offsets[None, :], self.last[:, None])

    @property
    def predictor_columns(self) -> Int[Tensor, "completion token"]:
        """Column whose hidden state predicts each token: the prompt's end for the first one."""
        targets = self.target_columns
        first = targets == self.starts[:, None]
        return torch.where(first, self.prompt_ends[:, None], targets - 1)

    @property
    def targets(self) -> Int[Tensor, "completion token"]:
        """The completions' own ids, right padded with repeats of the last one (see `mask`)."""
        return self.input_ids[self.rows[:, None], self.target_columns]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PackedBatch":
        """Move to a device; `dtype` is for the additive 4-D mask, which follows the model's."""
        return PackedBatch(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segments=self.segments.to(device),
            packed=self.packed,
            rows=self.rows.to(device),
            prompt_ends=self.prompt_ends.to(device),
            starts=self.starts.to(device),
            lengths=self.lengths.to(device),
            dtype=dtype or self.dtype,
        )


@no_type_check  # at run time: FlexAttention's compiler would trace the check
def sees(
    segment: Int[Tensor, "..."],
    other: Int[Tensor, "..."],
    column: Int[Tensor, "..."],
    other_column: Int[Tensor, "..."],
) -> Bool[Tensor, "..."]:
    """Tell whether a token looks at another, from their segments and columns (broadcast)."""
    inside = (segment >= 0) & (other >= 0) & ((other == 0) | (other == segment))
    return (inside & (other_column <= column)) | (other_column == column)


def shared_prefix_mask(
    segments: Int[Tensor, "row seq"], *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "row 1 seq seq"]:
    """Return the additive mask of packed rows: 0 where a token may look, else the lowest float.

    `segments` holds 0 at prompt tokens, 1, 2, ... at the completions' tokens and -1 at padding. A
    token sees earlier tokens of the prompt and of its own segment. Padding sees itself, because a
    row that sees nothing would be NaN; so would one of -inf, which float32's lowest is in float16.
    """
    columns = torch.arange(segments.shape[1], device=segments.device)
    visible = sees(segments[:, :, None], segments[:, None, :], columns[:, None], columns)
    mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def pack(groups: Sequence[Group], *, pad_id: int) -> PackedBatch:
    """Pack each group into one row: the prompt once, then each completion (right padded)."""
    rows = [[*g.prompt_ids, *(t for c in g.completions for t in c)] for g in groups]
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_id)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), -1)
    where: list[tuple[int, int, int, int]] = []
    for i, group in enumerate(groups):
        size = len(group.prompt_ids)
        input_ids[i, : len(rows[i])] = torch.tensor(rows[i])
        position_ids[i, :size] = torch.arange(size)
        segments[i, :size] = 0
        column = size
        for k, completion in enumerate(group.completions, start=1):
            end = column + len(completion)
            position_ids[i, column:end] = torch.arange(size, size + len(completion))
            segments[i, column:end] = k
            where.append((i, size - 1, column, len(completion)))
            column = end
    return _batch(input_ids, position_ids, segments, where, packed=True)


def pad(groups: Sequence[Group], *, pad_id: int) -> PackedBatch:
    """Give each completion a row of its own, after its prompt, right padded (no sharing)."""
    pairs = [(g.prompt_ids, c) for g in groups for c in g.completions]
    width = max(len(p) + len(c) for p, c in pairs)
    input_ids = torch.full((len(pairs), width), pad_id)
    segments = torch.full((len(pairs), width), -1)
    where = []
    for i, (prompt, completion) in enumerate(pairs):
        size = len(prompt) + len(completion)
        input_ids[i, :size] = torch.tensor([*prompt, *completion])
        segments[i, : len(prompt)] = 0
        segments[i, len(prompt) : size] = 1
        where.append((i, len(prompt) - 1, len(prompt), len(completion)))
    position_ids = ((segments >= 0).cumsum(1) - 1).clamp_min(0)
    return _batch(input_ids, position_ids, segments, where, packed=False)


def _batch(
    input_ids: Tensor,
    position_ids: Tensor,
    segments: Tensor,
    where: list[tuple[int, int, int, int]],
    *,
    packed: bool,
) -> PackedBatch:
    rows, prompt_ends, starts, lengths = torch.tensor(where).unbind(1)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segments=segments,
        packed=packed,
        rows=rows,
        prompt_ends=prompt_ends,
        starts=starts,
        lengths=lengths,
    )


def group_by_prompt(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int | Callable[[int], int],
    max_completions: int | None = None,
) -> tuple[list[Group], list[list[int]]]:
    """Collect completions of the same prompt into groups that fit `max_tokens` each.

    `max_tokens` may be a function of the prompt's tokens (see `row_tokens`); a single completion
    always fits. `max_completions` bounds the completions of a group too.

    Returns the groups, and for each the indices of its completions in the lists handed in.
    """
    open_groups: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> (its open group, tokens)
    members: list[list[int]] = []
    for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        key = tuple(prompt)
        room = max_tokens(len(key)) if callable(max_tokens) else max_tokens
        at, used = open_groups.get(key, (-1, room))
        full = max_completions is not None and at >= 0 and len(members[at]) >= max_completions
        if at < 0 or full or used + len(completion) > room:
            at, used = len(members), len(key)
            members.append([])
        members[at].append(i)
        open_groups[key] = (at, used + len(completion))
    groups = [Group(prompt_ids[m[0]], [completion_ids[i] for i in m]) for m in members]
    return groups, members


def row_tokens(prompt_tokens: int, *, hidden_size: int) -> int:
    """Length of a packed row at which a completion is cheapest.

    A row of the prompt (P tokens) and k completions (C each) costs `(P + kC) (24 h^2 + 4 h (P +
    kC))` operations a layer: sharing divides the prompt by k, but every token's attention spans the
    whole row. For each completion that is least at `kC = sqrt(P (6 h + P))`, whatever C is.
    """
    return prompt_tokens + round(math.sqrt(prompt_tokens * (6 * hidden_size + prompt_tokens)))


def packed_size(group: Group) -> int:
    """Tokens of a group's packed row."""
    return len(group.prompt_ids) + sum(map(len, group.completions))


def padded_size(group: Group) -> tuple[int, int]:
    """Rows and longest row of a group without sharing."""
    return len(group.completions), len(group.prompt_ids) + max(map(len, group.completions))


def token_budget_batches(
    groups: Sequence[Group],
    *,
    max_tokens: int,
    call_tokens: int,
    shared_prefix: bool = True,
) -> Iterator[list[int]]:
    """Yield lists of group indices, sorted by length, each within `max_tokens` padded tokens.

    Of all ways to cut the sorted groups into batches, the one with the fewest padded tokens and
    calls, where a call costs as much as `call_tokens` tokens do (as many as `max_tokens`: batches
    are as full as can be). A group larger than the budget travels alone. The caller puts results
    back in order, so a score never depends on the batch it happened to travel in.
    """
    if not groups:
        return
    sizes = [(1, packed_size(g)) if shared_prefix else padded_size(g) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: sizes[i][1])
    rows = np.concatenate([[0], np.cumsum([sizes[i][0] for i in order])])
    # least[k]: tokens and calls of the first k groups at their cheapest; the last of their batches
    # starts at starts[k]. A batch is as wide as its last group.
    least = np.zeros(len(order) + 1)
    starts = np.zeros(len(order) + 1, dtype=np.int64)
    for end, i in enumerate(order, start=1):
        width = sizes[i][1]
        first = int(np.searchsorted(rows, rows[end] - max_tokens // max(1, width)))
        first = min(first, end - 1)
        costs = least[first:end] + (rows[end] - rows[first:end]) * width
        best = int(costs.argmin())
        starts[end], least[end] = first + best, costs[best] + call_tokens
    ends = [len(order)]
    while ends[-1]:
        ends.append(int(starts[ends[-1]]))
    for end, start in itertools.pairwise(ends):  # longest first: a batch that does not fit memory
        yield order[start:end]  # fails at once
