import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pytest
import torch

from trueward.data.formats import Completion, PreferenceRow, Prompt
from trueward.evaluate.diagnosis import Diagnosis, diagnose
from trueward.evaluate.verdicts import LABELS
from trueward.posterior import RewardPosterior
from trueward.report.diagnosis import BY_REWARD, auroc_figure, diagnosis_report, result_tables
from trueward.testing import tiny_texts


def found_of(members: int, *, stds: bool = False, pairs: int = 30) -> Diagnosis:
    """The diagnosis of a reward that hangs on the texts' letters."""

    def reward(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            letters = sum(ord(c) * (i + 1) for i, c in enumerate(f"{prompt}|{completion}"))
            generator = torch.Generator().manual_seed(letters)
            rows.append(torch.randn(2 * members, generator=generator))
        values = torch.stack(rows)
        own = values[:, members:].abs() if stds else None
        return RewardPosterior(values[:, :members], own)

    texts = tiny_texts(3 * pairs, seed=9, words=(4, 12))
    rows = [
        PreferenceRow(prompt=texts[3 * i], chosen=texts[3 * i + 1], rejected=texts[3 * i + 2])
        for i in range(pairs)
    ]
    french = [f"le chat {i}" for i in range(pairs - 5)]
    return diagnose(
        reward,
        rows,
        out_of_distribution={"french": [*french, *[None] * 5], "none": [None] * pairs},
    )


def test_tables_hold_the_numbers_of_the_diagnosis() -> None:
    found = found_of(2, stds=True)
    accuracy, members, error, auroc = result_tables({"held out": found})
    low, high = found.accuracy.low, found.accuracy.high
    told = f"{found.accuracy.value:.2f} [{low:.2f}, {high:.2f}]"
    assert list(accuracy.rows) == [["held out", 30, told, found.ece, found.brier, 2]]
    assert found.member_spread is not None
    assert dict(zip(members.columns, members.rows[0], strict=True))["spread of\nmembers"] == (
        f"{found.member_spread:.2f}"
    )
    assert [row[:2] for row in error.rows] == [["held out", label] for label in LABELS.values()]
    signal = found.uncertainties["own"].wrong_correlation
    assert signal is not None
    numbers = re.findall(r"-?\d\.\d\d", str(error.rows[1][3]).replace("\N{MINUS SIGN}", "-"))
    assert [float(n) for n in numbers] == pytest.approx(
        [signal.value, signal.low, signal.high], abs=0.0051
    )
    assert auroc.columns == ["set", "kind", *LABELS.values(), BY_REWARD]
    preferred = found.out_of_distribution["french"].preferred
    assert preferred is not None
    told = [f"{found.uncertainties[key].auroc['french'].value:.2f}" for key in LABELS]
    assert list(auroc.rows[0]) == ["held out", "french", *told, f"{1 - preferred:.2f}"]
    assert list(auroc.rows[1]) == ["held out", "none", None, None, None, None]


def test_tables_leave_out_what_a_reward_does_not_have() -> None:
    scalar = result_tables({"a": found_of(1), "b": found_of(1)})
    assert [table.columns for table in scalar] == [
        ["set", "pairs", "accuracy", "ECE", "Brier\nscore", "members"],
        ["set", "kind", BY_REWARD],
    ]
    assert [row[0] for row in scalar[1].rows] == ["a", "a", "b", "b"]
    ensemble = result_tables({"a": found_of(3)})
    assert list(ensemble[1].columns) == [
        "set",
        "correlation\nof members",
        "of their\nerrors",
        "spread of\nmembers",
    ]
    assert ensemble[3].columns == ["set", "kind", LABELS["between"], BY_REWARD]


def test_the_auroc_figure_has_a_dot_at_each_number_and_its_interval() -> None:
    found = found_of(2, stds=True)
    figure = auroc_figure(found, title="t")
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["french"]  # of two kinds
    drawn = {round(float(line.get_xdata()[0]), 9) for line in axes.lines if len(line.get_xdata())}
    preferred = found.out_of_distribution["french"].preferred
    assert preferred is not None
    wanted = [signal.auroc["french"].value for signal in found.uncertainties.values()]
    assert {round(x, 9) for x in (*wanted, 1 - preferred)} <= drawn
    segments = [segment for c in axes.collections for segment in c.get_segments() if len(segment)]
    spans = [(segment[0][0], segment[1][0]) for segment in segments]
    for signal in found.uncertainties.values():
        auroc = signal.auroc["french"]
        assert any(span == pytest.approx((auroc.low, auroc.high)) for span in spans)


def test_the_page_is_one_file_with_everything_said(tmp_path: Path) -> None:
    diagnoses = {"help": found_of(2, stds=True), "<safety>": found_of(2, stds=True, pairs=20)}
    page = diagnosis_report(
        tmp_path / "new" / "page.html",
        diagnoses,
        title="Diagnosis: gaussian",
        remarks={"help": ["5 of 30 pairs have no completion of french."]},
        config_text="seed: 0\n",
        environment={"trueward": "1.0", "torch": "2.0"},
    )
    text = page.read_text()
    assert page == tmp_path / "new" / "page.html"
    assert "A reward of 2 members, each with a std of its own, on 50 pairs in 2 sets." in text
    assert text.count("<svg") == 6
    for name, found in diagnoses.items():
        assert f"Verdicts: {name}" in unescape(text)
        for sentence in found.verdicts:
            assert sentence in unescape(text)
    assert "5 of 30 pairs have no completion of french." in text
    assert "<safety>" not in text
    assert "seed: 0" in text
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", page]


def test_a_single_reward_has_a_page_without_stds(tmp_path: Path) -> None:
    page = diagnosis_report(
        tmp_path / "page.html",
        {"made": found_of(1)},
        title="Diagnosis",
        remarks={},
        config_text="",
        environment={},
    )
    text = page.read_text()
    assert "A reward of one member, on 30 pairs." in text
    assert "How large the stds are" not in text
    assert "Configuration" not in text
    assert text.count("<svg") == 2
    with_std = diagnosis_report(
        tmp_path / "page.html",
        {"made": found_of(1, stds=True)},
        title="Diagnosis",
        remarks={},
        config_text="",
        environment={},
    )
    assert "A reward of one member, with a std of its own, on 30 pairs." in with_std.read_text()
