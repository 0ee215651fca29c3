"""Weights of rows in reward training: a weighted mean of the pairs' losses, and nothing else."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from trueward.data.formats import DataError, PreferenceRow
from trueward.models.reward_model import RewardModel
from trueward.testing import tiny_backbone, tiny_preferences, tiny_tokenizer
from trueward.train.reward import (
    RewardConfig,
    encode_pairs,
    member_subsets,
    pair_losses,
    require_unweighted,
    train_reward,
)

TOKENIZER = tiny_tokenizer()


def new_model(members: int = 0) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members)


def rows_of(weights: list[float]) -> list[PreferenceRow]:
    made = tiny_preferences(len(weights))
    return [
        PreferenceRow(*row, where=f"made.jsonl:{i}", weight=w)
        for i, (row, w) in enumerate(zip(made, weights, strict=True), start=1)
    ]


def config_of(rows: int, **options: object) -> RewardConfig:
    options = {"learning_rate": 1e-3, "batch_size": rows, "progress": False} | options
    return RewardConfig(**options)  # type: ignore[arg-type]


def trained(rows: list[PreferenceRow], config: RewardConfig, members: int = 0) -> RewardModel:
    return train_reward(new_model(members), rows, config)


def first_loss(rows: list[PreferenceRow], folder: Path, *, members: int = 0) -> float:
    train_reward(new_model(members), rows, config_of(len(rows), subset=0.5), output_dir=folder)
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])


def same_weights(one: RewardModel, other: RewardModel) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("members", [0, 3])
def test_the_loss_is_the_weighted_mean_over_the_pairs_that_a_member_sees(
    members: int, tmp_path: Path
):
    rows = rows_of([0.25, 3.0, 1.0, 0.0, 2.0, 0.5])
    model = new_model(members)
    posterior = model.score(
        [r.prompt for r in rows for _ in "cr"], [t for r in rows for t in (r.chosen, r.rejected)]
    )
    losses = pair_losses(posterior, torch.zeros(6), config_of(6))
    pairs = [p.group for p in encode_pairs(model, rows, 512)]
    seen = member_subsets(pairs, model.members, share=0.5, seed=42).double()
    weights = seen * torch.tensor([[r.weight] for r in rows], dtype=torch.float64)
    expected = float((weights * losses).sum() / weights.sum())
    assert first_loss(rows, tmp_path, members=members) == pytest.approx(expected, rel=1e-5)


def test_only_the_ratio_of_weights_matters():
    config = config_of(4, epochs=3.0)  # two batches an epoch
    ones, twos = ([w] * 7 for w in (1.0, 2.0))
    assert same_weights(trained(rows_of(ones), config), trained(rows_of(twos), config))
    uneven = trained(rows_of([1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]), config)
    assert not same_weights(trained(rows_of(ones), config), uneven)


def test_a_pair_of_weight_two_counts_as_one_that_is_there_twice(tmp_path: Path):
    rows = rows_of([1.0, 2.0, 1.0])
    doubled = [dataclasses.replace(row, weight=1.0) for row in [*rows, rows[1]]]
    assert first_loss(rows, tmp_path / "a") == pytest.approx(
        first_loss(doubled, tmp_path / "b"), rel=1e-6
    )


def test_a_weight_below_one_is_not_held_against_a_whole_pair(tmp_path: Path):
    alone = first_loss(rows_of([0.01]), tmp_path / "a")
    assert alone == pytest.approx(first_loss(rows_of([1.0]), tmp_path / "b"), rel=1e-6)


def test_a_batch_whose_weights_are_all_zero_has_no_loss_and_no_gradient(tmp_path: Path):
    train_reward(new_model(), rows_of([0.0, 0.0, 1.0, 0.0]), config_of(1), output_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["loss"] == 0 for line in lines) == [False, True, True, True]
    assert all((line["loss"] == 0) == (line["grad_norm"] == 0) for line in lines)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_by_its_line(weight: float):
    with pytest.raises(DataError, match=r"made.jsonl:2 has weight=.*at least 0"):
        trained(rows_of([1.0, weight]), config_of(2))


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(DataError, match="Every row has weight=0"):
        trained(rows_of([0.0, 0.0]), config_of(2))


def test_a_trainer_without_weights_can_refuse_them():
    require_unweighted(rows_of([1.0, 1.0]), "brme")
    with pytest.raises(DataError, match=r"made.jsonl:2 has weight=0.5, which brme does not read"):
        require_unweighted(rows_of([1.0, 0.5]), "brme")
