"""Watched paths in the exact world: closed forms, and signals that a hand can follow."""

import math
from dataclasses import replace

import pytest
import torch

from trueward.evaluate.alarm import true_peak
from trueward.lab.exact import ExactWorld, exact_kl, optimal_policy
from trueward.lab.exact_path import METHODS, ExactPaths, exact_runs, path_of

SMALL = ExactPaths(seeds=2, steps=6, strongest=3.0, world=ExactWorld())


def test_gold_of_a_path_is_that_of_the_closed_form() -> None:
    table = SMALL.world.open(seed=1)
    run = path_of(SMALL, table, "mean", world="exact")
    proxy, _ = table.proxy(METHODS["mean"])
    assert run.places == list(range(7))
    assert run.gold[0] == pytest.approx(float(table.gold_table.mean()))
    for place in (1, 4, 6):
        policy = optimal_policy(proxy, beta=2 / place, reference=table.reference)
        assert run.gold[place] == pytest.approx(float((policy * table.gold_table).sum(1).mean()))


def test_signals_are_of_answers_of_the_place_s_policy() -> None:
    many = replace(SMALL, samples=400)
    table = many.world.open(seed=0)
    run = path_of(many, table, "single", world="exact")
    assert run.signals["kl"][0] == pytest.approx(0.0, abs=1e-9)  # the reference itself
    proxy, _ = table.proxy(METHODS["single"])
    for place in (2, 5):
        policy = optimal_policy(proxy, beta=2 / place, reference=table.reference)
        nats = float(exact_kl(policy, table.reference).mean())
        assert run.signals["kl"][place] == pytest.approx(nats, abs=0.07)
        entropy = float(torch.special.entr(policy).sum(1).mean())
        assert run.signals["logprob"][place] == pytest.approx(-entropy, abs=0.07)
        std = table.means.std(-1, correction=0)
        assert run.signals["spread"][place] == pytest.approx(
            float((policy * std).sum(1).mean()), abs=0.03
        )


def test_runs_are_of_all_methods_and_seeds_and_the_same_each_time() -> None:
    runs = exact_runs(SMALL)
    assert [(r.method, r.seed) for r in runs] == [(m, s) for m in METHODS for s in (0, 1)]
    assert [r.method for r in runs if r.gold_is_reward] == ["gold", "gold"]
    assert runs == exact_runs(SMALL)
    assert len(runs[0].signals["spread"]) == 6
    assert set(runs[0].signals) == set(runs[-1].signals)


def test_the_default_world_turns_a_single_reward_down_and_gold_never() -> None:
    config = ExactPaths(seeds=1)
    table = config.world.open(seed=0)
    single, gold = (path_of(config, table, m, world="w") for m in ("single", "gold"))
    assert true_peak(single).falls
    assert 4 <= true_peak(single).place <= 16
    assert not true_peak(gold).falls
    assert gold.gold == sorted(gold.gold)


def test_paths_that_mean_nothing_are_refused() -> None:
    for options in ({"steps": 0}, {"samples": 1}, {"strongest": 0.0}, {"strongest": math.inf}):
        with pytest.raises(ValueError, match="exact needs at least"):
            ExactPaths(**options)  # type: ignore[arg-type]
