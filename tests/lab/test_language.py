"""The stages that cells share: done once, seeded, and what each leaves."""

import json
from dataclasses import replace

import pytest
import torch

from trueward import objectives
from trueward.data.formats import load_preferences
from trueward.data.sources import DataError
from trueward.lab.grammar import GrammarWorld, gold_reward
from trueward.lab.language import (
    FIRST,
    Lab,
    LanguageConfig,
    RewardSpec,
    build_reference,
    build_shared,
    compare_answers,
    draw_pool,
    draw_shift,
    load_member,
    policy_config,
    pool_posterior,
    read_pool,
    refined_from,
    refined_spec,
    reward_of,
    reward_specs,
    sample_optimised,
    scale_of,
    score_pool,
    told_of,
    train_member,
)
from trueward.lab.methods import MemberFamily, Method
from trueward.lab.worlds import Annotator, LanguageDials, LanguageWorld
from trueward.refine.spg import SPGConfig

SMALL = LanguageConfig(
    pairs=40,
    held_out_pairs=12,
    reward_epochs=1.0,
    prompts_per_step=2,
    completions_per_prompt=2,
    training_prompts=8,
    evaluate_every=2,
    evaluation_prompts=3,
    pool=4,
    refine_after=1,
    refine_prompts=8,
    refine_samples=4,
    spg=SPGConfig(gamma=0.1, progress=False),
)
WORLD = GrammarWorld(
    demonstrations_count=96, max_new_tokens=16, annotator=Annotator(label_noise=0.0)
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(world=WORLD, config=SMALL, out=tmp_path_factory.mktemp("lab"))
    build_shared(lab)
    build_reference(lab, 0)
    compare_answers(lab, 0)
    train_member(lab, 0, RewardSpec("deep-0", 0))
    return lab


def test_the_embedded_world_is_a_world_of_language(lab: Lab):
    assert isinstance(WORLD, LanguageDials)
    world = lab.open(0)
    assert isinstance(world, LanguageWorld)
    prompts = world.prompts(3, seed=1)
    assert prompts == world.prompts(3, seed=1) != world.prompts(3, seed=2)
    assert prompts != world.prompts(3, seed=1, held_out=True)
    answers = world.answers(prompts, n=2, seed=0)
    assert [len(a) for a in answers] == [2, 2, 2]
    gold = world.gold(prompts, [a[0] for a in answers])
    assert gold.tolist() == pytest.approx(
        [gold_reward(p, a[0]) for p, a in zip(prompts, answers, strict=True)]
    )


def test_methods_that_need_the_same_reward_model_share_it():
    assert [s.name for s in reward_specs(Method(members=3))] == ["deep-0", "deep-1", "deep-2"]
    assert reward_specs(Method()) == [RewardSpec("deep-0", 0)]
    assert reward_specs(Method(epochs_scale=5.0)) == [
        RewardSpec("deep-0-epochs-5x", 0, epochs_scale=5.0)
    ]
    assert reward_specs(Method(members=5, family="heads")) == [RewardSpec("heads-5", 0, heads=5)]
    refined = {r: reward_specs(Method(reward=r))[0] for r in ("control", "spg", "uml")}
    assert len({spec.seed for spec in refined.values()}) == 1  # told apart by method alone
    assert [spec.refine for spec in refined.values()] == ["control", "spg", "uml"]
    for control in ("gold", "random", "length"):
        assert reward_specs(Method(reward=control)) == []


def test_every_family_is_one_spec_of_its_own_name():
    assert reward_specs(Method(family="laplace", members=8)) == [
        RewardSpec("laplace-8", 0, heads=8, family="laplace")
    ]
    assert reward_specs(Method(family="warm"))[0].name == "warm-1"
    with pytest.raises(ValueError, match="family warm has one member, got members=5"):
        Method(family="warm", members=5)


@pytest.mark.parametrize(
    ("family", "members", "has_stds"),
    [("brme_pairs", 3, True), ("lora", 2, False), ("laplace", 4, False), ("energy", 1, True)],
)
def test_a_method_may_optimise_any_family(
    lab: Lab, family: MemberFamily, members: int, has_stds: bool
):
    method = Method(family=family, members=members)
    (spec,) = reward_specs(method)
    train_member(lab, 0, spec)
    draw_pool(lab, 0)
    score_pool(lab, 0, spec)
    posterior = pool_posterior(lab, 0, method, read_pool(lab, 0))
    assert posterior.members == members
    assert (posterior.stds is not None) == has_stds
    reward = reward_of(lab, lab.open(0), method, 0)
    prompts, answers = read_pool(lab, 0).flat
    again = reward.posterior(prompts[:4], answers[:4])
    torch.testing.assert_close(again.means, posterior.means[:4], atol=1e-4, rtol=1e-4)


def test_comparisons_are_kept_apart_and_agree_with_gold_without_noise(lab: Lab):
    folder = lab.ground(0) / "comparisons"
    rows, held_out = (
        load_preferences(folder / f"{name}.jsonl").rows for name in ("preferences", "held_out")
    )
    assert 0 < len(rows) <= 40
    assert 0 < len(held_out) <= 12
    for row in [*rows, *held_out]:
        assert gold_reward(row.prompt, row.chosen) > gold_reward(row.prompt, row.rejected)
    assert not {(r.prompt, r.chosen) for r in rows} & {(r.prompt, r.chosen) for r in held_out}


def test_gold_is_counted_in_standard_deviations_of_the_reference(lab: Lab):
    scale = scale_of(lab, 0)
    assert scale(torch.tensor([scale.mean, scale.mean + 2 * scale.std])).tolist() == pytest.approx(
        [0.0, 2.0], abs=1e-6
    )
    assert scale.std > 0.1


def test_a_stage_is_done_once(lab: Lab):
    files = [f for f in lab.out.rglob("*") if f.name in ("summary.json", "preferences.jsonl")]
    before = {f: f.stat().st_mtime_ns for f in files}
    assert len(before) >= 4
    build_shared(lab)
    build_reference(lab, 0)
    compare_answers(lab, 0)
    train_member(lab, 0, RewardSpec("deep-0", 0))
    assert before == {f: f.stat().st_mtime_ns for f in files}


def test_another_configuration_in_the_same_folder_is_refused(lab: Lab):
    with pytest.raises(DataError, match=r"pairs=40, this one has .*pairs=41"):
        compare_answers(replace(lab, config=replace(SMALL, pairs=41)), 0)


def test_the_pool_is_scored_as_the_reward_model_scores(lab: Lab):
    draw_pool(lab, 0)
    spec = RewardSpec("deep-0", 0)
    score_pool(lab, 0, spec)
    pool = read_pool(lab, 0)
    posterior = pool_posterior(lab, 0, Method(), pool)
    direct = load_member(lab, 0, spec).score(*pool.flat, normalise=True)
    torch.testing.assert_close(posterior.means, direct.means)
    gold = pool_posterior(lab, 0, Method(reward="gold"), pool)
    torch.testing.assert_close(gold.means[:, 0], pool.gold.flatten(), rtol=0, atol=1e-6)
    length = pool_posterior(lab, 0, Method(reward="length"), pool)
    assert length.means[:, 0].tolist() == [float(len(a.split())) for a in pool.flat[1]]


def test_the_logit_scale_undoes_the_members_standardisation(lab: Lab):
    world, member = lab.open(0), load_member(lab, 0, RewardSpec("deep-0", 0))
    reward = reward_of(lab, world, Method(), 0)
    prompts, answers = ["tell me about the cat :"] * 2, ["the cat .", "the kind dog sees the cat ."]
    scaled = reward.posterior(prompts, answers).means[:, 0]
    raw = member.score(prompts, answers, normalise=False).means[:, 0]
    assert ((scaled[0] - scaled[1]) * reward.logit_scale).item() == pytest.approx(
        (raw[0] - raw[1]).item(), rel=1e-4
    )


def test_a_later_round_stands_on_the_one_before():
    specs = reward_specs(Method(reward="spg", rounds=3))
    assert [s.name for s in specs] == ["spg-3"]
    assert refined_from(specs[0]) == refined_spec("spg", 2)
    assert refined_from(refined_spec("spg", 1)) == FIRST
    assert len({FIRST.seed, *(refined_spec("spg", k).seed for k in (1, 2, 3))}) == 4
    together = reward_specs(Method(reward="spg", rounds=2, ensemble_rounds=True))
    assert [s.name for s in together] == ["deep-0", "spg", "spg-2"]
    with pytest.raises(ValueError, match="rounds are for refined rewards, not for reward=learned"):
        Method(rounds=2)


def test_refinement_uses_samples_of_the_first_policy(lab: Lab):
    sample_optimised(lab, 0, FIRST)
    rows = (lab.ground(0) / "sampled" / "deep-0" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 8
    assert len(json.loads(rows[0])["completions"]) == 4
    weights = {}
    for name in ("control", "spg", "uml"):
        spec = reward_specs(Method(reward=name))[0]
        train_member(lab, 0, spec)
        weights[name] = load_member(lab, 0, spec).head.state_dict()
    summary = lab.ground(0) / "rewards" / "spg" / "preferences" / "summary.json"
    found = json.loads(summary.read_text())["metrics"]
    assert 0 < found["accepted"] <= found["prompts"] == 8
    key = next(iter(weights["spg"]))
    for one, other in (("control", "spg"), ("control", "uml"), ("spg", "uml")):
        assert not torch.equal(weights[one][key], weights[other][key])


def test_rewards_are_held_against_gold_on_the_answers_they_started_from(lab: Lab):
    world, method = lab.open(0), Method(reward="gold")
    gold = reward_of(lab, world, method, 0)
    assert told_of(lab, 0, gold, objectives.mean) == {}  # nobody has drawn the answers yet
    sample_optimised(lab, 0, FIRST)
    draw_shift(lab, 0)
    told = told_of(lab, 0, gold, objectives.mean)
    assert told == {"reference": 1.0, "moved": 1.0}  # gold orders all pairs as gold does
    noise = told_of(lab, 0, reward_of(lab, world, Method(reward="random"), 0), objectives.mean)
    assert all(0.3 < share < 0.7 for share in noise.values())


def test_members_differ_in_what_they_see_and_start_from(lab: Lab):
    train_member(lab, 0, RewardSpec("deep-1", 1))
    first, second = (load_member(lab, 0, RewardSpec(f"deep-{k}", k)) for k in (0, 1))
    keys = first.head.state_dict()
    assert any(not torch.equal(v, second.head.state_dict()[k]) for k, v in keys.items())


def test_a_members_training_time_is_scaled_for_the_control_at_equal_cost(lab: Lab):
    train_member(lab, 0, RewardSpec("deep-0-epochs-3x", 0, epochs_scale=3.0))
    steps = [
        len((lab.ground(0) / "rewards" / n / "metrics.jsonl").read_text().splitlines())
        for n in ("deep-0", "deep-0-epochs-3x")
    ]
    assert steps[1] == 3 * steps[0] > 0


def test_the_optimiser_of_a_method_reaches_the_training(lab: Lab):
    world = lab.open(0)
    config = policy_config(lab, world, 7, Method(optimiser="grpo", kl_coef=0.5), steps=9)
    assert (config.algorithm, config.kl_coef, config.steps, config.seed) == ("grpo", 0.5, 9, 7)
    with pytest.raises(ValueError, match="best_of_n trains no policy"):
        policy_config(lab, world, 0, Method(optimiser="best_of_n"), steps=9)


def test_sizes_that_compare_nothing_are_refused():
    with pytest.raises(ValueError, match="pool must be at least 2, got 1"):
        LanguageConfig(pool=1)
    with pytest.raises(ValueError, match="evaluate_every must be at least 1, got 0"):
        LanguageConfig(evaluate_every=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"reward": "gold", "members": 5}, "reward=gold has none of them"),
        ({"reward": "gold", "family": "heads"}, "reward=gold has none of them"),
        ({"optimiser": "best_of_n", "kl_coef": 0.1}, "kl_coef is for trained policies"),
        ({"epochs_scale": 0.0}, "epochs_scale must be above 0"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
    ],
)
def test_a_method_that_means_nothing_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Method(**options)
