"""What commands that train do beside the training."""

from pathlib import Path

import pytest

from trueward.commands.training import _samples_apart
from trueward.data.formats import PreferenceRow
from trueward.data.sources import write_jsonl


def test_samples_of_prompts_that_are_reported_on_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "samples.jsonl"
    messages = [{"role": "user", "content": "held out"}]
    rows = [{"prompt": p, "completions": ["a", "b"]} for p in ("seen", "held out", messages)]
    write_jsonl(file, rows)
    kept = _samples_apart(str(file), {"test": [PreferenceRow("held out", "a", "b")]})
    assert kept == [("seen", ["a", "b"])]  # a string and its one user turn are the same prompt
    assert "2 of 3 prompts are in an evaluation set" in " ".join(capsys.readouterr().err.split())
    assert len(_samples_apart(str(file), {})) == 3
