"""Methods of refinement: their ingredients, what they train on, and what they compose with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trueward import objectives
from trueward.data.formats import PreferenceRow
from trueward.evaluate.judges import function_judge
from trueward.models.reward_function import posterior_function
from trueward.models.reward_model import RewardModel
from trueward.refine import refinement
from trueward.refine.equivalence import exact_match
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    LABELS,
    METHODS,
    RefineMethod,
    refine_reward,
    require_own_options,
    rewards_of,
    warm_start,
)
from trueward.refine.spg import SPGConfig
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.families import FamilyConfig, train_family
from trueward.train.reward import RewardConfig

TRAIN = RewardConfig(
    learning_rate=1e-2, batch_size=8, epochs=1.0, max_length=96, progress=False, seed=3
)
ROWS = [PreferenceRow(*texts) for texts in tiny_preferences(16)]
# Three of four samples agree, so that every prompt has a confidence of 3/4.
DRAWN: list[tuple[Any, list[str]]] = [
    (prompt, [first, first, first, second])
    for prompt, first, second in zip(
        tiny_texts(6, seed=1), tiny_texts(6, seed=2), tiny_texts(6, seed=3), strict=True
    )
]
UML = MultiViewConfig(latent=4, width=8, prompts_per_batch=2)


def make(**options: Any) -> RewardModel:
    return RewardModel.from_backbone(
        tiny_backbone(), make_tokenizer(), max_length=96, **({"seed": 0} | options)
    )


def refine(method: RefineMethod, out: Path, **options: Any) -> Any:
    own: dict[str, Any] = {
        "rewards": lambda prompts, answers: torch.tensor([float(len(a)) for a in answers]),
        "train": TRAIN,
        "output_dir": out,
        "spg": SPGConfig(progress=False),
        "uml": UML,
        "equivalent": exact_match,
    }
    return refine_reward(method, make, ROWS, DRAWN, **(own | options))


def weights(model: RewardModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def same(one: RewardModel, other: RewardModel) -> bool:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_every_method_has_a_label_and_no_two_the_same_ingredients():
    assert set(LABELS) == set(METHODS)
    assert len(set(METHODS.values())) == len(METHODS)
    assert METHODS["spg_uml"] == ("spg", "uml")


def test_the_control_is_training_on_d_alone_bit_for_bit(tmp_path: Path):
    control = refine("control", tmp_path / "control")
    plain = train_family(make, ROWS, FamilyConfig(), TRAIN, output_dir=tmp_path / "plain")
    assert same(control, plain)


def test_without_weight_and_pairs_every_method_is_the_control(tmp_path: Path):
    # Eq. 1 with lambda = 0 and no synthetic preference is L_R.
    control = refine("control", tmp_path / "control")
    for loss in ("uml", "infomax", "mvi", "contrastive"):
        weightless = MultiViewConfig(
            latent=4, width=8, prompts_per_batch=2, weight=0.0, loss="uml", seed=0
        )
        assert same(control, refine(loss, tmp_path / loss, uml=weightless))
    unsure = SPGConfig(gamma=0.8, progress=False)  # above the samples' 3/4
    assert same(control, refine("spg", tmp_path / "spg", spg=unsure))


@pytest.mark.parametrize("method", ["reward", "select_all", "spg", "uml", "spg_uml", "infomax"])
def test_what_a_method_takes_from_the_samples_moves_the_reward(
    method: RefineMethod, tmp_path: Path
):
    control = refine("control", tmp_path / "control")
    assert not same(control, refine(method, tmp_path / method))
    logged = (tmp_path / method / "metrics.jsonl").read_text()
    assert ("uml/loss" in logged) == bool(METHODS[method].views)
    made = tmp_path / method / "preferences" / "preferences.jsonl"
    assert made.exists() == bool(METHODS[method].pairs)
    if METHODS[method].pairs:
        assert len(made.read_text().splitlines()) == 6
        assert (
            json.loads((tmp_path / method / "summary.json").read_text())["metrics"]["pairs"] == 22
        )


def test_rlaif_asks_the_judge_it_is_given(tmp_path: Path):
    shortest = function_judge(lambda prompt, one, two: float(len(one) < len(two)))
    refine("rlaif", tmp_path, judge=shortest)
    lines = (tmp_path / "preferences" / "preferences.jsonl").read_text().splitlines()
    assert len(lines) == 6
    for row in map(json.loads, lines):
        assert len(row["chosen"]) <= len(row["rejected"])
    with pytest.raises(ValueError, match="RLAIF needs the policy that judges, or a judge"):
        refine("rlaif", tmp_path / "other")


@pytest.mark.parametrize("family", ["heads", "deep", "warm", "brme"])
def test_both_ingredients_compose_with_bayesian_ensembles(family: str, tmp_path: Path):
    preset = {"preset": "pairs"} if family == "brme" else {}
    config = FamilyConfig(family=family, members=2, **preset)  # type: ignore[arg-type]
    if family == "warm":
        config = FamilyConfig(family="warm")
    reward = refine("spg_uml", tmp_path, family=config)
    posterior = posterior_function(reward)([p for p, _ in DRAWN], [a[0] for _, a in DRAWN])
    assert posterior.members == (1 if family == "warm" else 2)
    logs = [f for f in tmp_path.rglob("metrics.jsonl") if "uml/loss" in f.read_text()]
    # deep: each member beside its own views; brme: its single head; warm: each candidate.
    assert len(logs) == {"heads": 1, "deep": 2, "brme": 1, "warm": 10}[family]


def test_views_are_refused_where_there_is_no_single_last_state(tmp_path: Path):
    with pytest.raises(ValueError, match="members of a LoRA ensemble have states of their own"):
        refine("uml", tmp_path, family=FamilyConfig(family="lora", members=2))
    finished = FamilyConfig(family="laplace", stage1=str(tmp_path / "head"))
    with pytest.raises(ValueError, match=r"family.stage1 is a finished one: leave stage1 out"):
        refine("uml", tmp_path, family=finished)


def test_members_of_an_ensemble_have_views_of_their_own(tmp_path: Path):
    refine("uml", tmp_path, family=FamilyConfig(family="deep", members=2))
    files = [tmp_path / "model" / f"member_{k}" / "metrics.jsonl" for k in (0, 1)]
    logs = [json.loads(file.read_text().splitlines()[0]) for file in files]
    assert logs[0]["uml/jsd"] != logs[1]["uml/jsd"]


def test_a_completion_that_the_reward_cannot_read_is_left_out_and_counted():
    model = make()
    long = "word " * 200
    rewards = rewards_of(model, objectives.mean)(["p", "p"], ["short", long])
    assert rewards[0].isfinite()
    assert rewards[1].isnan()


def test_options_of_one_method_do_not_stop_another(tmp_path: Path):
    # One configuration serves a table of ablations: what a loss or rule does not read is left out.
    tuned = MultiViewConfig(latent=4, width=8, prompts_per_batch=2, skl_coef=0.5, temperature=0.2)
    assert same(refine("mvi", tmp_path / "mvi", uml=tuned), refine("mvi", tmp_path / "as-is"))
    matched = SPGConfig(rejected="length_matched", progress=False)
    drawn = refine("reward", tmp_path / "reward", spg=matched)
    assert same(drawn, refine("reward", tmp_path / "uniform"))


@pytest.mark.parametrize(
    ("spg", "uml", "methods", "said"),
    [
        (SPGConfig(), MultiViewConfig(seed=1), ["uml"], r"uml\.seed is the training's seed"),
        (
            SPGConfig(),
            MultiViewConfig(temperature=0.2),
            ["uml"],
            r"uml\.temperature would do nothing",
        ),
        (SPGConfig(), MultiViewConfig(latent=8), ["spg"], r"A uml\. option would do nothing"),
        (SPGConfig(gamma=0.9), MultiViewConfig(), ["select_all"], r"spg\.gamma would do nothing"),
        (
            SPGConfig(rejected="length_matched"),
            MultiViewConfig(),
            ["reward", "uml"],
            r"spg\.rejected would do nothing with the methods reward, uml",
        ),
    ],
)
def test_options_that_no_method_reads_are_refused(
    spg: SPGConfig, uml: MultiViewConfig, methods: list[RefineMethod], said: str
):
    with pytest.raises(ValueError, match=said):
        require_own_options(spg, uml, methods)


def test_options_that_one_of_the_methods_reads_are_taken():
    uml = MultiViewConfig(temperature=0.2, skl_coef=0.5)
    require_own_options(SPGConfig(gamma=0.9), uml, ["spg", "uml", "contrastive"])


def test_preferences_that_were_gated_are_trained_on_instead_of_new_ones(tmp_path: Path):
    kept = [PreferenceRow(*texts) for texts in tiny_preferences(3, seed=9)]
    gated = refine("spg", tmp_path / "gated", synthetic=kept)
    assert not (tmp_path / "gated" / "preferences").exists()
    by_hand = train_family(
        make, [*ROWS, *kept], FamilyConfig(), TRAIN, output_dir=tmp_path / "by_hand"
    )
    assert same(gated, by_hand)


def test_a_warm_start_trains_the_current_model_on_and_leaves_it_alone(tmp_path: Path):
    current = train_family(make, ROWS, FamilyConfig(), TRAIN, output_dir=tmp_path / "first")
    assert isinstance(current, RewardModel)
    before = {k: v.clone() for k, v in weights(current).items()}
    warm = refine_reward(
        "control",
        warm_start(current),
        ROWS,
        [],
        rewards=len,
        train=TRAIN,
        output_dir=tmp_path / "warm",
    )
    assert all(torch.equal(before[k], v) for k, v in weights(current).items())
    cold = refine("control", tmp_path / "cold")
    assert isinstance(warm, RewardModel)
    assert not same(warm, cold)
    with pytest.raises(ValueError, match="A warm start needs one reward model"):
        warm_start([current, current])


def test_a_finished_refinement_is_loaded_and_its_pairs_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = refine("spg", tmp_path)
    monkeypatch.setattr(refinement, "write_synthetic", None)
    assert same(first, refine("spg", tmp_path))
