"""Every family by its name: what it trains, how it is read again, what its posterior is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trueward.data.formats import DataError, PreferenceRow
from trueward.models.reward_function import Reward, load_reward_models, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_preferences
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.brme import BRMEConfig
from trueward.train.energy import EnergyConfig
from trueward.train.families import (
    FAMILIES,
    FamilyConfig,
    LoRAEnsembleConfig,
    WARMConfig,
    load_family,
    read_ratings,
    train_family,
)
from trueward.train.laplace import LaplaceConfig
from trueward.train.reward import RewardConfig

TOKENIZER = make_tokenizer()
ROWS = [PreferenceRow(*row) for row in tiny_preferences(24)]
TRAIN = RewardConfig(learning_rate=3e-3, batch_size=8, epochs=1.0, progress=False, seed=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "warm": {"warm": WARMConfig(candidates=3, best=2, selection=0.3)},
    "lora": {"lora": LoRAEnsembleConfig(rank=2, layers=0.5)},
    "energy": {"energy": EnergyConfig(epochs=1.0, widths=(16, 8), noise_samples=8)},
    "laplace": {"laplace": LaplaceConfig(held_out=0.3)},
    "brme": {"brme": BRMEConfig(epochs=1.0), "preset": "pairs"},
}
# How many members the posterior has, and whether each has a std of its own.
SHAPES = {
    "single": (1, False),
    "heads": (3, True),
    "brme": (3, True),
    "deep": (3, False),
    "lora": (3, False),
    "warm": (1, False),
    "attributes": (1, True),
    "energy": (1, True),
    "laplace": (3, False),
}


def make(**options: Any) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, **options)


def config(family: str) -> FamilyConfig:
    return FamilyConfig(family=family, members=3, **SETTINGS.get(family, {}))  # type: ignore[arg-type]


def scored(reward: Reward) -> RewardPosterior:
    texts = [(r.prompt, c) for r in ROWS[:6] for c in (r.chosen, r.rejected)]
    return posterior_function(reward)([p for p, _ in texts], [c for _, c in texts])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each family, on the same single head where a family stands on one."""
    root = tmp_path_factory.mktemp("families")
    folders = {}
    for family in FAMILIES:
        made = config(family)
        if family in ("brme", "attributes", "energy", "laplace"):
            made = replace(made, stage1=str(root / "single" / "model"))
        train_family(make, ROWS, made, TRAIN, output_dir=root / family)
        folders[family] = root / family
    return folders


def test_every_family_that_is_named_can_be_trained() -> None:
    assert set(FAMILIES) == set(SHAPES)


@pytest.mark.parametrize("family", list(SHAPES))
def test_a_family_has_the_members_and_stds_that_it_says(
    trained: dict[str, Path], family: str
) -> None:
    posterior = scored(load_family(trained[family]))
    members, has_stds = SHAPES[family]
    assert posterior.members == members
    assert (posterior.stds is not None) == has_stds
    assert bool(posterior.means.isfinite().all())
    if family != "single":  # each is something else than the head that it is compared with
        assert not torch.equal(posterior.mean, scored(load_family(trained["single"])).mean)


def test_every_family_gives_the_same_posterior_in_another_process(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    texts = [(r.prompt, c) for r in ROWS[:6] for c in (r.chosen, r.rejected)]
    (tmp_path / "job.json").write_text(
        json.dumps({"folders": {k: str(v) for k, v in trained.items()}, "texts": texts})
    )
    script = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from trueward.models.reward_function import posterior_function
from trueward.train.families import load_family
torch.set_num_threads(1)
job = json.loads((Path(sys.argv[1]) / "job.json").read_text())
prompts, completions = [t[0] for t in job["texts"]], [t[1] for t in job["texts"]]
for name, folder in job["folders"].items():
    posterior = posterior_function(load_family(folder))(prompts, completions)
    found = {"means": posterior.means}
    if posterior.stds is not None:
        found["stds"] = posterior.stds
    found = {k: v.contiguous() for k, v in found.items()}
    save_file(found, Path(sys.argv[1]) / f"{name}.safetensors")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    for family, folder in trained.items():
        here = scored(load_family(folder))
        there = load_file(tmp_path / f"{family}.safetensors")
        assert torch.equal(there["means"], here.means), family
        if here.stds is not None:
            assert torch.equal(there["stds"], here.stds), family


def test_the_members_of_a_deep_ensemble_differ_in_their_seed_and_the_first_is_the_single_head(
    trained: dict[str, Path],
) -> None:
    members = load_reward_models(trained["deep"] / "model")
    means = [scored(member).means for member in members]
    assert torch.equal(means[0], scored(load_family(trained["single"])).means)
    assert not torch.allclose(means[0], means[1])
    assert not torch.allclose(means[1], means[2])


def test_what_is_finished_is_not_trained_again(trained: dict[str, Path]) -> None:
    def refuse(**options: Any) -> RewardModel:
        raise AssertionError(f"trained again with {options}")

    for family, folder in trained.items():
        made = config(family)
        if family in ("brme", "attributes", "energy", "laplace"):
            made = replace(made, stage1=str(trained["single"] / "model"))
        again = train_family(refuse, ROWS, made, TRAIN, output_dir=folder)
        assert torch.equal(scored(again).means, scored(load_family(folder)).means)


def test_another_familys_folder_does_not_pass_for_this_ones(trained: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"holds a run with family\.family='single'"):
        train_family(make, ROWS, config("heads"), TRAIN, output_dir=trained["single"])


def test_a_killed_deep_ensemble_trains_the_missing_members_alone(tmp_path: Path) -> None:
    made: list[int] = []

    def counting(**options: Any) -> RewardModel:
        made.append(options["seed"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(**options)

    with pytest.raises(KeyboardInterrupt):
        train_family(counting, ROWS, config("deep"), TRAIN, output_dir=tmp_path)
    train_family(counting, ROWS, config("deep"), TRAIN, output_dir=tmp_path)
    assert len(made) == 4  # two, the one that was killed, and that one again
    assert made[2] == made[3]


def test_warm_averages_the_members_that_are_best_on_the_selection(trained: dict[str, Path]) -> None:
    summary = json.loads((trained["warm"] / "summary.json").read_text())["metrics"]
    by_member = [summary[f"selection/member_{k}"] for k in range(3)]
    members = [
        RewardModel.from_pretrained(trained["warm"] / f"members/{k}/model") for k in range(3)
    ]
    best = sorted(range(3), key=lambda k: -by_member[k])[:2]
    weights = [members[k].state_dict()["backbone.norm.weight"] for k in best]
    (average,) = load_reward_models(trained["warm"] / "model")
    torch.testing.assert_close(average.state_dict()["backbone.norm.weight"], sum(weights) / 2)


def test_rows_held_out_with_the_same_seed_leave_some_to_hold_out_within(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    # A second draw by the same hash would find no prompt of the first draw's other side.
    from trueward.data.rows import split_by_prompt

    rows, apart = split_by_prompt(ROWS, fraction=0.3, seed=TRAIN.seed)
    assert apart
    made = replace(config("brme"), stage1=str(trained["single"] / "model"))
    made = replace(made, brme=replace(made.brme, held_out=0.3))
    train_family(make, rows, made, TRAIN, output_dir=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["metrics"]["held_out_pairs"] > 0


def test_ratings_are_read_as_attributes(tmp_path: Path) -> None:
    source = tmp_path / "ratings.jsonl"
    row = {"prompt": "p", "completion": "c", "helpfulness": 3, "verbosity": 1.5, "source": "s"}
    source.write_text(json.dumps(row) + "\n")
    (read,) = read_ratings(source)
    assert read.ratings == {"helpfulness": 3.0, "verbosity": 1.5}
    source.write_text(json.dumps({"prompt": "p"}) + "\n")
    with pytest.raises(DataError, match=r"ratings.jsonl, line 1: needs 'prompt' and 'completion'"):
        read_ratings(source)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="stage1 is what brme"):
        FamilyConfig(family="deep", stage1="somewhere")
    with pytest.raises(ValueError, match="preset is for family=brme"):
        FamilyConfig(family="single", preset="sound")
    with pytest.raises(ValueError, match="ratings is for family=attributes, got family=deep"):
        FamilyConfig(family="deep", ratings="file")
    with pytest.raises(ValueError, match=r"preset=pairs sets brme\.loss and brme\.target"):
        FamilyConfig(
            family="brme", preset="pairs", brme=BRMEConfig(loss="mse_reparam", target="rating")
        )
    with pytest.raises(ValueError, match=r"lora\. options are for family=lora, got family=heads"):
        FamilyConfig(family="heads", lora=LoRAEnsembleConfig(rank=2)).require_own_options()
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        FamilyConfig(members=0)
    with pytest.raises(ValueError, match=r"best must lie between 1 and candidates \(2\), got 3"):
        WARMConfig(candidates=2, best=3)


def test_weights_are_refused_where_a_second_stage_would_forget_them(tmp_path: Path):
    rows = [PreferenceRow(*texts, weight=2.0) for texts in tiny_preferences(4)]
    with pytest.raises(DataError, match="weight=2, which family=laplace does not read"):
        train_family(
            make, rows, FamilyConfig(family="laplace"), RewardConfig(), output_dir=tmp_path
        )
