import re
from pathlib import Path

import pytest

from trueward.evaluate.comparison import MethodRuns, SeedRun
from trueward.report.curves import shown_methods
from trueward.report.html import PanelsHtml
from trueward.report.keeper import Keeper
from trueward.report.reliability import distinct_rewards, reliability_section


def method(name: str, chance: float) -> MethodRuns:
    run = SeedRun(
        seed=0,
        points=[{"step": 0.0, "gold": 1.0}],
        seconds=1.0,
        probabilities=[chance, 0.2],
        outcomes=[True, False],
    )
    return MethodRuns(name=name, label="", optimiser="rloo", runs=[run])


def test_six_rewards_have_panels_the_baselines_first_and_all_are_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trueward.report.keeper.save_figure", lambda *_: None)
    methods = [method(f"m{i}", 0.1 + 0.1 * i) for i in range(8)]
    shared = method("shared", 0.1 + 0.1 * 7)
    rewards = distinct_rewards(shown_methods([*methods, shared], "m7"))
    names = [["m7", "shared"], *([f"m{i}"] for i in range(7))]
    assert [r.names for r in rewards] == names
    section = reliability_section(Keeper(tmp_path), rewards)
    assert section is not None
    (panels,) = section.figures
    assert isinstance(panels, PanelsHtml)
    assert list(panels.svgs) == ["m7 and 1 more", "m0", "m1", "m2", "m3", "m4"]
    assert "The first 6 of 8 rewards" in panels.caption
    assert [row[0] for row in section.tables[0].rows] == ["; ".join(n) for n in names]
    few = reliability_section(Keeper(tmp_path), rewards[:2])
    assert few is not None
    assert not re.search("The first", few.figures[0].caption)
    assert reliability_section(Keeper(tmp_path), []) is None
