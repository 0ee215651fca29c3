"""Claims held against stored comparisons: arithmetic by hand, verdicts, storing, the page."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from trueward.data.sources import DataError
from trueward.evaluate.comparison import SeedRun, estimate_of
from trueward.lab.claims import CLAIMS, Contrast
from trueward.lab.evidence import (
    EvidenceConfig,
    Finding,
    Stored,
    StoredMethod,
    drops,
    measure,
    read_stored,
    run_evidence,
    side_of,
    store,
    values_of,
    verdict_of,
)

RECIPES = Path(__file__).parents[2] / "recipes"
ENDS = Contrast(words="w", results="r", kind="end", method="a", less="b", above=0.0)


def stored(**gold: list[list[float]]) -> Stored:
    return Stored(
        title="t",
        command="c",
        commit="abc",
        date="2026-01-01",
        seeds=[0, 1, 2],
        seconds=60.0,
        methods={
            name: StoredMethod(label=name, places=[0.0, 1.0, 2.0], gold=curves)
            for name, curves in gold.items()
        },
    )


def test_a_difference_is_paired_by_seed():
    found = stored(a=[[0.0, 0.0, 3.0], [0.0, 0.0, 4.0]], b=[[0.0, 0.0, 1.0], [0.0, 0.0, 1.5]])
    assert values_of(ENDS, found) == [2.0, 2.5]
    assert values_of(replace(ENDS, less=""), found) == [3.0, 4.0]


def test_a_drop_is_read_where_the_other_seeds_are_highest():
    # Means of the others: (0, 4, .5), (4.5, 3.5, .5) and (4.5, 2.5, 1).
    gold = [[9.0, 2.0, 1.0], [0.0, 3.0, 1.0], [0.0, 5.0, 0.0]]
    assert drops(gold) == [2.0 - 1.0, 0.0 - 1.0, 0.0 - 0.0]


def test_where_nothing_falls_the_drop_is_not_above_0_by_luck():
    import torch

    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(300):
        gold = torch.randn(10, 8, generator=generator).tolist()
        means.append(sum(drops(gold)) / 10)
    assert sum(means) / 300 == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize(
    ("values", "above", "below", "side"),
    [
        ([1.0, 1.1, 1.2], 0.0, None, 1),
        ([-1.0, -1.1, -1.2], 0.0, None, -1),
        ([-1.0, 1.0, 0.1], 0.0, None, 0),
        ([0.0, 0.1, 0.05], None, 0.25, 1),
        ([0.5, 0.6, 0.55], None, 0.25, -1),
        ([0.1, 0.3, 0.2], None, 0.25, 0),
    ],
)
def test_sides_are_those_of_the_whole_interval(
    values: list[float], above: float | None, below: float | None, side: int
):
    assert side_of(replace(ENDS, above=above, below=below), estimate_of(values)) == side


def test_verdicts():
    def finding(side: int, seen: bool = True) -> Finding:
        return Finding(contrast=ENDS, estimate=estimate_of([1.0, 2.0]) if seen else None, side=side)

    assert verdict_of([finding(1), finding(1)]) == "holds"
    assert verdict_of([finding(1), finding(-1)]) == "holds in part"
    assert verdict_of([finding(0), finding(-1)]) == "does not hold here"
    assert verdict_of([finding(1), finding(0, seen=False)]) == "not measured"


def test_what_is_not_stored_is_not_measured():
    found = stored(a=[[0.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    assert measure(ENDS, {}).estimate is None
    assert measure(ENDS, {"r": found}).estimate is None  # b is not there
    told = measure(replace(ENDS, less=""), {"r": found})
    assert told.estimate is not None
    assert told.estimate.mean == 3.5


def test_every_contrast_names_methods_of_its_recipe_and_one_bound():
    for claim in CLAIMS:
        assert claim.contrasts
        for contrast in claim.contrasts:
            recipe = yaml.safe_load((RECIPES / f"{contrast.results}.yaml").read_text("utf-8"))
            assert {contrast.method, contrast.less or contrast.method} <= recipe["methods"].keys()
            assert recipe["seeds"] >= 10
            assert (contrast.above is None) != (contrast.below is None)
            if contrast.kind == "agreement":
                assert set(contrast.whose) <= {"reference", "moved", "own"}
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    methods: dict[str, Any] = {"spg": {"label": "SPG"}, "ppo": {"label": ""}}
    config = {"title": "A world", "first_seed": 3, "seeds": 2, "methods": methods}
    for name in methods:
        for seed in (3, 4):
            cell = folder / "cells" / name / f"seed-{seed}"
            cell.mkdir(parents=True)
            gold = [0.0, 1.23456, seed / 10 + (name == "spg")]
            points = [{"step": float(i), "gold": g, "agreement": 0.6} for i, g in enumerate(gold)]
            run = SeedRun(
                seed=seed, points=points, seconds=1.0, agreements={"reference": 0.8, "moved": 0.7}
            )
            (cell / "result.json").write_text(json.dumps(asdict(run)))
            (cell / "summary.json").write_text(json.dumps({"seconds": 1.0}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"seconds": 120.0}))
    (folder / "environment.json").write_text(json.dumps({"revision": "0123456789"}))
    return folder


def test_a_comparison_is_stored_seed_by_seed_and_read_again(comparison: Path, tmp_path: Path):
    found = store("compare_rlp", comparison)
    assert found.command == "trueward compare --config recipes/compare_rlp.yaml"
    assert (found.commit, found.seeds, found.seconds) == ("0123456", [3, 4], 4.0)  # four cells
    assert found.methods["spg"].gold == [[0.0, 1.2346, 1.3], [0.0, 1.2346, 1.4]]
    assert found.methods["ppo"].label == "ppo"
    assert found.methods["ppo"].agreements == {
        "reference": [0.8, 0.8],
        "moved": [0.7, 0.7],
        "own": [0.6, 0.6],
    }
    config = EvidenceConfig(
        add={"compare_rlp": str(comparison)},
        results=str(tmp_path / "docs" / "evidence"),
        page=str(tmp_path / "docs" / "evidence.md"),
    )
    verdicts = run_evidence(config)
    assert read_stored(tmp_path / "docs" / "evidence" / "compare_rlp.json") == found
    assert verdicts["single falls"] == "not measured"
    page = (tmp_path / "docs" / "evidence.md").read_text("utf-8")
    assert "| SPG less PPO | compare_rlp | above 0 | 1.00 ± 0.00 | ✓ |" in page
    assert "not measured" in page
    assert (tmp_path / "docs" / "figures" / "evidence.png").exists()
    again = run_evidence(replace(config, add={}))  # from the stored results alone
    assert again == verdicts
    assert (tmp_path / "docs" / "evidence.md").read_text("utf-8") == page


def test_what_cannot_be_stored_is_told(comparison: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no finished comparison"):
        store("compare_rlp", tmp_path)
    (comparison / "cells" / "spg" / "seed-4" / "summary.json").unlink()
    with pytest.raises(DataError, match="has 1 of 2 seeds of spg: run the comparison again"):
        store("compare_rlp", comparison)
    with pytest.raises(DataError, match="holds no results"):
        run_evidence(EvidenceConfig(results=str(tmp_path / "none"), page=str(tmp_path / "p.md")))


def test_nan_is_not_as_claimed():
    estimate = estimate_of([math.nan, math.nan])
    assert side_of(ENDS, estimate) == 0


def test_gold_of_the_policies_is_drawn_where_the_grid_is_stored(tmp_path: Path):
    results, page = tmp_path / "docs" / "evidence", tmp_path / "docs" / "evidence.md"
    results.mkdir(parents=True)
    curves = [[0.0, 0.5, -1.0], [0.0, 0.6, -2.0], [0.0, 0.4, -1.5]]
    grid = asdict(stored(single=curves, gold=[[0.0, 1.0, 2.0]] * 3, other=curves))
    (results / "compare_grammar.json").write_text(json.dumps(grid))
    config = EvidenceConfig(results=str(results), page=str(page))
    run_evidence(config)
    assert "(figures/gold_by_reward.png)" in page.read_text("utf-8")
    assert (page.parent / "figures" / "gold_by_reward.png").stat().st_size > 1000
    (results / "compare_grammar.json").rename(results / "compare_other.json")
    run_evidence(config)
    assert "gold_by_reward" not in page.read_text("utf-8")
