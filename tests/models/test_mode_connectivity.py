"""The path between two models, and an average against what it was made of."""

import copy
import dataclasses
import math

import pytest
import torch

from trueward.data.formats import DataError, PreferenceRow
from trueward.models.mode_connectivity import (
    AveragePoint,
    LinearPath,
    PathPoint,
    compare_with_models,
    linear_mode_connectivity,
    proven_barrier,
    simultaneous_confidence,
)
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import (
    MemberSettings,
    average_weights,
    diverse_members,
    probe_head,
    start_member,
)
from trueward.testing import tiny_backbone, tiny_preferences, tiny_tokenizer
from trueward.train.reward import RewardConfig, train_reward

TOKENIZER = tiny_tokenizer()


def made(seed: int = 0, *, members: int = 0) -> RewardModel:
    backbone = tiny_backbone(seed=seed, vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members, seed=seed).eval()


def shaken(model: RewardModel, seed: int, scale: float = 0.01) -> RewardModel:
    """A copy with noise on every weight, as training from one start gives."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def rows(count: int, seed: int = 0) -> list[PreferenceRow]:
    made_rows = tiny_preferences(count, seed=seed)
    return [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(made_rows)]


def with_margins(start: RewardModel, data: list[PreferenceRow], margins: list[float]):
    """The start with a head that gives the rows exactly these margins (fewer rows than states)."""
    prompts = [row.prompt for row in data for _ in "cr"]
    sides = [side for row in data for side in (row.chosen, row.rejected)]
    states = []
    for prompt, side in zip(prompts, sides, strict=True):
        ids = torch.tensor([[i for part in start.tokenize(prompt, side) for i in part]])
        states.append(start.backbone(input_ids=ids).last_hidden_state[0, -1].detach())
    differences = torch.stack(states[0::2]).double() - torch.stack(states[1::2]).double()
    model = copy.deepcopy(start)
    weight = torch.linalg.pinv(differences) @ torch.tensor(margins, dtype=torch.float64)
    with torch.no_grad():
        model.head.linear.weight.copy_(weight[None])
    return model


def test_a_path_by_hand() -> None:
    """Heads on one backbone: margins between are `(1-l) m_1 + l m_2`, so all is known."""
    start, data = made(), rows(5)
    ends = [[1.0, -3.0, 2.0, 2.0, -1.0], [-3.0, 1.0, 2.0, 1.0, 2.0]]
    models = [with_margins(start, data, margins) for margins in ends]
    path = linear_mode_connectivity(*models, data)
    assert (path.pairs, path.left_out) == (5, 0)
    assert [p.weight for p in path.points] == [0, 0.25, 0.5, 0.75, 1]
    assert [p.line for p in path.points] == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8])
    # The middle's margins are -1, -1, 2, 1.5, 0.5: the first two pairs are lost, the last won.
    middle = path.points[2]
    assert (middle.accuracy, middle.gap) == pytest.approx((0.6, -0.1))

    def loss(margins: list[float]) -> float:
        return sum(math.log1p(math.exp(-m)) for m in margins) / 5

    assert middle.loss == pytest.approx(loss([-1.0, -1.0, 2.0, 1.5, 0.5]), abs=1e-4)
    losses = [loss(margins) for margins in ends]
    expected = [(1 - w) * losses[0] + w * losses[1] for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert [p.loss_line for p in path.points] == pytest.approx(expected, abs=1e-4)
    assert [path.points[i].loss for i in (0, 4)] == pytest.approx(losses, abs=1e-4)
    # The pairs' gaps are -1/2, -1/2, 0, 0, 1/2: s^2 = (3/4 - 5/100) / 4 = 0.175.
    half = 1.959964 * math.sqrt(0.175 / 5)
    assert (middle.low, middle.high) == pytest.approx((-0.1 - half, -0.1 + half), abs=1e-6)
    for end, accuracy in ((path.points[0], 0.6), (path.points[4], 0.8)):
        assert end.accuracy == pytest.approx(accuracy)
        assert (end.low, end.high) == pytest.approx((0, 0), abs=1e-12)
    assert not middle.holds
    assert not path.refuted  # five pairs cannot tell
    narrow = linear_mode_connectivity(*models, data, weights=(0.5,), confidence=0.2)
    assert narrow.points[0].high == pytest.approx(-0.1 + half * 0.253347 / 1.959964, abs=1e-6)
    assert narrow.refuted


def test_ties_are_half_right_on_a_path() -> None:
    silent = made()
    torch.nn.init.zeros_(silent.head.linear.weight)
    path = linear_mode_connectivity(silent, silent, rows(4), weights=(0.0, 0.5))
    assert [p.accuracy for p in path.points] == [0.5, 0.5]
    assert path.points[1].loss == pytest.approx(math.log(2))


def test_a_path_above_the_line_holds() -> None:
    start, data = made(), rows(2)
    model_1 = with_margins(start, data, [3.0, -1.0])
    model_2 = with_margins(start, data, [-1.0, 3.0])
    path = linear_mode_connectivity(model_1, model_2, data)
    assert [p.accuracy for p in path.points][0::2] == [0.5, 1.0, 0.5]
    assert path.points[2].gap == 0.5
    assert path.loss_barrier < 0
    assert not path.refuted


def test_a_path_reads_the_same_from_its_other_end() -> None:
    models = [shaken(made(), seed, 0.1) for seed in (1, 2)]
    data = rows(12)
    there = linear_mode_connectivity(*models, data, weights=(0.0, 0.3, 1.0))
    back = linear_mode_connectivity(*reversed(models), data, weights=(1.0, 0.7, 0.0))
    for p, q in zip(there.points, back.points, strict=True):
        numbers = [dataclasses.astuple(point)[1:] for point in (p, q)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)


def test_the_verdict_on_a_path_by_hand() -> None:
    def point(weight: float, accuracy: float, high: float, loss: float = 0.5) -> PathPoint:
        return PathPoint(
            weight=weight,
            accuracy=accuracy,
            line=0.7,
            low=-1.0,
            high=high,
            loss=loss,
            loss_line=0.6,
        )

    ends = (point(0.0, 0.1, -1.0, 9.0), point(1.0, 0.1, -1.0, 9.0))  # count for nothing
    good = LinearPath(points=(*ends, point(0.5, 0.7, 0.1)), pairs=9, left_out=0)
    assert (good.holds, good.refuted) == (True, False)
    assert good.loss_barrier == pytest.approx(-0.1)
    chance = LinearPath(points=(*good.points, point(0.3, 0.69, 0.01, 0.9)), pairs=9, left_out=0)
    assert (chance.holds, chance.refuted) == (False, False)
    assert chance.loss_barrier == pytest.approx(0.3)
    bad = LinearPath(points=(*good.points, point(0.3, 0.6, -0.01)), pairs=9, left_out=0)
    assert (bad.holds, bad.refuted) == (False, True)
    assert LinearPath(points=ends, pairs=9, left_out=0).loss_barrier == 0.0


def test_a_path_counts_what_it_leaves_out_and_needs_two_pairs() -> None:
    data = rows(3)
    unusable = [
        dataclasses.replace(data[0], extra={"tie": True}),
        dataclasses.replace(data[1], chosen="big dog " * 600),
    ]
    path = linear_mode_connectivity(made(), made(), [*unusable, *data], weights=(1.0,))
    assert (path.pairs, path.left_out) == (3, 2)
    with pytest.raises(DataError, match="at least two preference rows, got one"):
        linear_mode_connectivity(made(), made(), [*unusable, data[0]])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        linear_mode_connectivity(made(), made(), data, confidence=1.0)
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\]"):
            linear_mode_connectivity(made(), made(), data, weights=(weight,))


def test_members_of_a_head_are_on_one_scale_whatever_their_own() -> None:
    """The rewards of one member in other units change nothing, of the accuracies and losses."""
    start, data = made(members=2), rows(12)
    models = [shaken(start, seed, 0.1) for seed in (1, 2)]
    stretched = copy.deepcopy(models)
    with torch.no_grad():
        for model in stretched:
            model.head.linear.weight.view(2, 2, -1)[1, 0] *= 100.0
    paths = [linear_mode_connectivity(*pair, data) for pair in (models, stretched)]
    for p, q in zip(paths[0].points, paths[1].points, strict=True):
        assert dataclasses.astuple(p) == pytest.approx(dataclasses.astuple(q), abs=1e-5)
    # The accuracy is that of the model with its statistics measured on these very pairs.
    sides = (
        [row.prompt for row in data for _ in "cr"],
        [c for r in data for c in (r.chosen, r.rejected)],
    )
    stretched[0].set_normalisation(*sides)
    rewards = stretched[0].score(*sides).mean
    accuracy = (rewards[0::2] > rewards[1::2]).double().mean().item()
    assert paths[1].points[0].accuracy == accuracy


def test_an_average_against_its_models_by_hand() -> None:
    start, data = made(), rows(5)
    ends = [
        [1.0, -3.0, 2.0, 2.0, -1.0],
        [-3.0, 1.0, 2.0, 1.0, 2.0],
        [-1.0, -1.0, -1.0, 3.0, 2.0],
    ]  # their mean: -1, -1, 1, 2, 1
    models = [with_margins(start, data, margins) for margins in ends]
    found = compare_with_models(average_weights(models), iter(models), data)
    assert found.accuracies == pytest.approx((0.6, 0.8, 0.4))
    assert (found.accuracy, found.mean, found.gap) == pytest.approx((0.6, 0.6, 0.0))
    # Each pair's own gap: -1/3, -1/3, 1/3, 0, 1/3, whose s^2 is (4/9) / 4.
    half = 1.959964 * math.sqrt(1 / 9 / 5)
    assert (found.low, found.high) == pytest.approx((-half, half), abs=1e-6)

    def loss(margins: list[float]) -> float:
        return sum(math.log1p(math.exp(-m)) for m in margins) / 5

    assert found.loss == pytest.approx(loss([-1.0, -1.0, 1.0, 2.0, 1.0]), abs=1e-4)
    assert found.loss_mean == pytest.approx(sum(map(loss, ends)) / 3, abs=1e-4)
    assert (found.pairs, found.left_out, found.refuted) == (5, 0, False)
    assert dataclasses.replace(found, high=-0.001).refuted


def test_an_average_of_two_is_the_middle_of_their_path() -> None:
    models = [shaken(made(), seed, 0.1) for seed in (1, 2)]
    tie = dataclasses.replace(rows(1)[0], extra={"tie": True})
    data = [tie, *rows(12)]
    middle = linear_mode_connectivity(*models, data, weights=(0.5,), confidence=0.8).points[0]
    found = compare_with_models(average_weights(models), models, data, confidence=0.8)
    ours = (found.accuracy, found.mean, found.low, found.high, found.loss, found.loss_mean)
    assert ours == pytest.approx(dataclasses.astuple(middle)[1:], abs=1e-6)
    assert (found.pairs, found.left_out) == (12, 1)
    with pytest.raises(ValueError, match="compared with the models it was made of"):
        compare_with_models(models[0], [], data)
    with pytest.raises(DataError, match="at least two preference rows"):
        compare_with_models(models[0], models, data[:2])


def test_several_intervals_hold_together() -> None:
    assert simultaneous_confidence(0.95, 1) == 0.95
    assert simultaneous_confidence(0.95, 10) == pytest.approx(0.995)
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\)"):
        simultaneous_confidence(1.0, 2)


def test_a_proven_barrier_is_told_with_its_worst_point() -> None:
    def point(weight: float, accuracy: float, high: float) -> PathPoint:
        return PathPoint(
            weight=weight,
            accuracy=accuracy,
            line=0.75,
            low=-0.5,
            high=high,
            loss=0.0,
            loss_line=0.0,
        )

    chance = LinearPath(points=(point(0.5, 0.5, 0.01),), pairs=9, left_out=0)
    bad = LinearPath(
        points=(*chance.points, point(0.25, 0.5, -0.125), point(0.75, 0.25, -0.0625)),
        pairs=9,
        left_out=0,
    )
    found = AveragePoint(
        accuracy=0.5,
        mean=0.75,
        low=-0.375,
        high=-0.125,
        loss=0.0,
        loss_mean=0.0,
        accuracies=(0.75, 0.75, 0.75),
        pairs=9,
        left_out=0,
    )
    fine = dataclasses.replace(found, high=0.0)
    assert proven_barrier("a", {"b": chance}, fine) == proven_barrier("a", {}, None) == ""
    told = proven_barrier("a", {"b": chance, "c": bad}, fine)
    assert told == (
        "There is a barrier between a and c: with the weight 0.25 on the second the accuracy is "
        "0.250 [0.125, 0.500] below the line between the two"
    )
    assert proven_barrier("a", {"b": chance}, found) == (
        "The average of 3 models has an accuracy 0.250 [0.125, 0.375] below their mean"
    )


def test_members_from_one_start_are_connected_and_models_from_two_are_not() -> None:
    data, held_out = rows(64), rows(100, seed=77)
    starts = [probe_head(made(seed), data) for seed in (0, 1)]
    settings = diverse_members(2, learning_rates=(3e-4, 1.5e-4))
    config = RewardConfig(epochs=3.0, batch_size=16, progress=False)

    def trained(start: RewardModel, own: MemberSettings) -> RewardModel:
        options = dataclasses.replace(config, learning_rate=own.learning_rate, seed=own.seed)
        return train_reward(start_member(start, own), data, options)

    first, second = (trained(starts[0], own) for own in settings)
    stranger = trained(starts[1], settings[0])
    together, apart = (
        linear_mode_connectivity(first, other, held_out, weights=(0.0, 0.5, 1.0))
        for other in (second, stranger)
    )
    assert min(p.accuracy for p in (*together.points, apart.points[2])) > 0.9
    assert together.holds
    assert together.loss_barrier < 0  # the average is better than the two on average
    assert apart.refuted
    assert apart.points[1].gap < -0.2
    assert apart.loss_barrier > 0.4
