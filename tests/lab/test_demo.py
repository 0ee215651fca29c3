"""The demo end to end, at the smallest sizes: what it writes, not what it finds."""

import json
from pathlib import Path

import pytest

from trueward.lab.demo import DemoConfig, run_demo


@pytest.mark.slow
def test_the_demo_writes_table_curves_and_report(tmp_path: Path):
    config = DemoConfig(
        output_dir=str(tmp_path),
        demonstrations=200,
        pairs=60,
        members=2,
        steps=4,
        refine_after=2,
        prompts_per_step=4,
        refine_prompts=12,
        evaluation_prompts=16,
    )
    summary = run_demo(config)
    table, agreement = json.loads((tmp_path / "table.json").read_text())
    names = [row[0] for row in table["rows"]]
    assert names[0] == "SFT"
    assert {"single reward", "worst case", "ensemble mean", "RLP-SPG", "RLP-UML"} <= set(names)
    sft = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert sft["KL at end"] == 0.0
    assert set(summary["metrics"]["reward_model_accuracy"]) >= {"single reward", "RLP-SPG"}
    assert agreement["columns"] == [
        "reward model",
        "pairs of the SFT policy",
        "pairs of the first policy",
    ]
    assert "<html" in (tmp_path / "report.html").read_text()
