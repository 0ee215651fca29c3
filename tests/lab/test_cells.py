"""Cells: what they measure by hand, and that a killed one ends as an unbroken one."""

import json
import math
from pathlib import Path

import pytest
import torch

from trueward.lab.cells import (
    best_of_n_cell,
    best_of_n_points,
    centred,
    optimise_cell,
    read_evaluation,
    read_result,
    wins,
)
from trueward.lab.grammar import GrammarWorld
from trueward.lab.language import (
    Lab,
    LanguageConfig,
    build_reference,
    build_shared,
    compare_answers,
    draw_pool,
    reward_specs,
    score_pool,
    train_member,
)
from trueward.lab.methods import Method
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior

SMALL = LanguageConfig(
    pairs=24,
    held_out_pairs=12,
    reward_epochs=1.0,
    steps=4,
    prompts_per_step=2,
    completions_per_prompt=2,
    training_prompts=8,
    evaluate_every=2,
    evaluation_prompts=3,
    evaluation_samples=3,
    pool=6,
)
MEAN_OF_2 = Method(members=2)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(
        world=GrammarWorld(demonstrations_count=96, max_new_tokens=16),
        config=SMALL,
        out=tmp_path_factory.mktemp("lab"),
    )
    build_shared(lab)
    build_reference(lab, 0)
    compare_answers(lab, 0)
    draw_pool(lab, 0)
    for spec in reward_specs(MEAN_OF_2):
        train_member(lab, 0, spec)
        score_pool(lab, 0, spec)
    return lab


def test_best_of_n_points_by_hand():
    # The proxy orders the four answers 0 < 1 < 2 < 3; the best by proxy is the worst by gold.
    proxy = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    gold = torch.tensor([[-8.0, 4.0, 2.0, 0.0], [0.0, 2.0, 4.0, -8.0]])
    answers = [["a", "b b", "c c c", "d"], ["d", "c c c", "b b", "a"]]
    posterior = RewardPosterior(torch.stack([proxy.flatten(), proxy.flatten() + 2], dim=1))
    points, picks = best_of_n_points(answers, gold, proxy, posterior)
    assert [p["n"] for p in points] == [1.0, 2.0, 3.0, 4.0]
    # n=2: of six pairs, (0,1) -> 2, (0,2),(1,2) -> 4, three with the best -> -8
    assert [p["gold"] for p in points] == pytest.approx([-0.5, (2 + 8 - 24) / 6, -5.0, -8.0])
    assert [p["proxy"] for p in points] == pytest.approx([1.5, 14 / 6, 2.75, 3.0])
    assert points[-1]["length"] == 1.0
    assert points[0]["spread"] == 1.0  # population std of (x, x + 2)
    assert points[-1]["kl/bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert points[-1]["gold_sem"] == 0.0
    assert picks[0] == [0, 0]
    assert picks[1] == [0, 1]
    assert picks[3] == [0, 3]


def test_wins_are_over_all_pairs_of_answers_to_a_prompt_ties_at_half():
    gold, reference = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 3.0], [0.0, 1.0]])
    # first prompt: 1 loses twice, 3 wins once and ties once; second: two ties and two losses
    assert wins(gold, reference) == pytest.approx((0 + 0 + 1 + 0.5 + 0.5 + 0.5) / 8)
    assert wins(gold, gold) == 0.5


def test_the_proxy_is_counted_from_the_reference():
    assert centred([{"proxy": 2.0, "gold": 1.0}, {"proxy": 5.0, "gold": 0.0}]) == [
        {"proxy": 0.0, "gold": 1.0},
        {"proxy": 3.0, "gold": 0.0},
    ]


def test_a_cell_measures_a_policy_from_the_reference_on(lab: Lab, tmp_path: Path):
    optimise_cell(lab, MEAN_OF_2, 0, 4, tmp_path)
    run = read_result(tmp_path)
    assert run is not None
    assert [p["step"] for p in run.points] == [0.0, 2.0, 4.0]
    start, end = run.points[0], run.points[-1]
    for name in ("exact", "k1", "k2", "k3"):
        assert start[f"kl/{name}"] == pytest.approx(0.0, abs=1e-4)
    assert end["kl/exact"] > 0
    assert end["kl/k2"] > 0
    assert start["proxy"] == 0.0
    assert start["spread"] > 0
    assert len(run.final_gold) == 3
    assert len(run.probabilities) == len(run.outcomes) > 0
    assert set(run.outcomes) == {True, False}
    assert all(0 < p < 1 for p in run.probabilities)
    last = read_evaluation(tmp_path, 4)
    assert last["gold"] == list(run.final_gold)
    assert 0 <= end["win_rate"] <= 1
    assert run.agreements == {}  # nothing is refined here
    assert [len(last[key]) for key in ("prompts", "answers", "proxy")] == [3, 3, 3]


def test_the_evaluations_of_all_methods_start_from_the_same_answers(lab: Lab, tmp_path: Path):
    for name, method in {"mean": MEAN_OF_2, "ppo": Method(optimiser="ppo")}.items():
        optimise_cell(lab, method, 0, 2, tmp_path / name)
    firsts = [read_evaluation(tmp_path / name, 0) for name in ("mean", "ppo")]
    assert firsts[0]["answers"] == firsts[1]["answers"]
    assert firsts[0]["gold"] == firsts[1]["gold"]
    assert firsts[0]["proxy"] != firsts[1]["proxy"]


def test_a_killed_cell_ends_as_an_unbroken_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    optimise_cell(lab, Method(), 0, 4, tmp_path / "whole")
    import trueward.lab.cells as cells

    write = cells.write_evaluation

    def killed(folder: Path, place: int, *rest: object, **more: object) -> None:
        if place == 4:
            raise KeyboardInterrupt
        write(folder, place, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(cells, "write_evaluation", killed)
    with pytest.raises(KeyboardInterrupt):
        optimise_cell(lab, Method(), 0, 4, tmp_path / "killed")
    assert read_result(tmp_path / "killed") is None
    assert list((tmp_path / "killed" / "training").glob("checkpoint-*"))
    monkeypatch.setattr(cells, "write_evaluation", write)
    optimise_cell(lab, Method(), 0, 4, tmp_path / "killed")
    whole, resumed = (json.loads((tmp_path / k / "result.json").read_text()) for k in
                      ("whole", "killed"))  # fmt: skip
    assert whole | {"seconds": 0} == resumed | {"seconds": 0}


def test_best_of_n_with_gold_as_the_reward_never_falls(lab: Lab, tmp_path: Path):
    gold = Method(reward="gold", optimiser="best_of_n")
    best_of_n_cell(lab, gold, 0, tmp_path)
    run = read_result(tmp_path)
    assert run is not None
    values = [p["gold"] for p in run.points]
    assert values == sorted(values)
    assert [p["n"] for p in run.points] == [1.0, 2.0, 3.0, 4.0, 6.0]
    best = [max(g) for g in _pool_gold(lab)]
    assert run.points[-1]["gold"] == pytest.approx(sum(best) / 3, abs=1e-5)
    assert list(run.final_gold) == pytest.approx(best, abs=1e-5)


def test_best_of_n_with_members_uses_their_objective(lab: Lab, tmp_path: Path):
    for name in ("mean", "worst_case"):
        method = Method(members=2, optimiser="best_of_n", objective=ObjectiveConfig(name=name))
        best_of_n_cell(lab, method, 0, tmp_path / name)
    mean, worst = (read_evaluation(tmp_path / name, 1) for name in ("mean", "worst_case"))
    assert mean["answers"] == worst["answers"]  # n = 1: the first sample
    assert all(w < m for w, m in zip(worst["proxy"], mean["proxy"], strict=True))


def _pool_gold(lab: Lab) -> list[list[float]]:
    lines = (lab.ground(0) / "pool" / "pool.jsonl").read_text().splitlines()
    return [json.loads(line)["gold"] for line in lines]
