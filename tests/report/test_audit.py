import re
from html import unescape
from pathlib import Path

import pytest
import torch

from trueward.data.formats import PreferenceRow
from trueward.evaluate.judges import function_judge
from trueward.refine.audit import Histogram, PreferenceAudit, audit_preferences
from trueward.refine.review import ReviewResult, UnknownAnswer
from trueward.report.audit import AuditPage, audit_report, audit_tables, histogram_figure


def rows_of(count: int = 40) -> list[PreferenceRow]:
    return [
        PreferenceRow(
            f"<p{i}>",
            f"a longer answer {i} " * (1 + i % 3),
            f"short {i}",
            extra={
                "confidence": 0.5 + 0.1 * (i % 5),
                "chosen_reward": 0.1 * (i % 7) - 0.3,
                "rejected_reward": 0.0,
            },
        )
        for i in range(count)
    ]


def audits_of() -> dict[str, PreferenceAudit]:
    rows = rows_of()
    judge = function_judge(lambda _prompt, one, two: float(len(one) > len(two)))
    prompts = [row.prompt for row in rows] + ["<q>", "r"]

    def embed(texts: list[str]) -> torch.Tensor:
        return torch.eye(2)[[int(text in ("<q>", "r")) for text in texts]]

    read = audit_preferences(rows, judge=judge, reference=rows[:9], prompts=prompts, embed=embed)
    return {"read": read, "kept": audit_preferences(rows[:12])}


def test_tables_hold_the_numbers_of_the_audit() -> None:
    audits = audits_of()
    lengths, labels, diversity = audit_tables(audits)
    read = audits["read"]
    share = read.length.longer
    told = f"100 [{100 * share.low:.0f}, 100]"
    assert list(lengths.rows[0]) == [
        "read",
        40,
        40,
        told,
        f"{read.length.factor:.2f}",
        f"{read.length.chosen.mean:.0f}",
        f"{read.length.rejected.mean:.0f}",
    ]
    assert "In the reference the chosen side is longer in 100 [" in lengths.notes
    assert labels.columns == [
        "set",
        "mean\nconfidence",
        "negative\nmargins",
        "judge\nagrees",
        "reference\nagrees",
    ]
    assert labels.rows[0][1] == "0.70"
    assert str(labels.rows[0][2]).startswith("45 [")  # 18 of 40 are below 0
    assert labels.rows[0][3] == told
    assert str(labels.rows[0][4]).startswith("100 [70,")
    assert labels.rows[1][3:] == [None, None]
    assert [row[:2] for row in diversity.rows] == [
        ["read", "chosen"],
        ["read", "rejected"],
        ["kept", "chosen"],
        ["kept", "rejected"],
    ]
    assert diversity.rows[0][2] == f"{read.chosen.distinct_1:.3f}"
    assert diversity.rows[0][-1] == "1.0"  # all in one direction


def test_pairs_without_confidence_and_rewards_have_no_table_of_labels() -> None:
    plain = audit_preferences([PreferenceRow("p", "a", "b"), PreferenceRow("q", "c", "d")])
    assert [table.caption for table in audit_tables({"read": plain})] == [
        "How long the sides are.",
        "How far the texts differ.",
    ]


def test_a_histogram_is_drawn_as_shares_between_its_edges() -> None:
    found = Histogram(edges=[0.0, 1.0, 2.0], counts=[1, 3])
    other = Histogram(edges=[0.0, 4.0], counts=[5])
    figure = histogram_figure({"chosen": found, "rejected": other}, title="t", x_label="characters")
    lines = [
        line
        for line in figure.axes[0].lines
        if len(line.get_xdata()) > 2  # type: ignore[arg-type]
    ]
    assert list(lines[0].get_xdata()) == [0, 0, 1, 1, 2, 2]  # type: ignore[arg-type]
    assert list(lines[0].get_ydata()) == [0, 25, 25, 75, 75, 0]  # type: ignore[arg-type]
    assert list(lines[1].get_ydata()) == [0, 100, 100, 0]  # type: ignore[arg-type]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chosen", "rejected"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_the_page_is_one_file_with_everything_said(tmp_path: Path) -> None:
    audits, rows = audits_of(), rows_of()
    review = ReviewResult(
        rows=rows,
        confirmed=rows[:3],
        relabelled=rows[3:4],
        ties=[],
        dropped=[],
        unanswered=rows[4:],
        unknown=[UnknownAnswer("review.csv:9", "feed", "1")],
    )
    page = audit_report(
        tmp_path / "new" / "audit.html",
        AuditPage(
            audits=audits,
            dropped={"low confidence": 28},
            review=review,
            doubtful=rows[:2],
            remarks=["Not all lines are pairs."],
            config_text="seed: 0\n",
            environment={"trueward": "1.0"},
        ),
    )
    text = page.read_text()
    said = unescape(text)
    assert page == tmp_path / "new" / "audit.html"
    found = len(audits["read"].verdicts)
    assert found > 2
    assert f"40 pairs of 40 prompts read; {found} things stand out. 12 pairs kept." in text
    for audit in audits.values():
        for sentence in audit.verdicts:
            assert sentence in said
    for sentence in (
        "Not all lines are pairs.",
        "People agree with 75 [30, 95] % of the labels",
        "Clusters of prompts without a pair",
        "low confidence",
        "0.5 to 0.6",
        "seed: 0",
    ):
        assert sentence in said
    assert text.count("<svg") == 4  # lengths of each, confidence of both, margin as read
    assert "<p0>" in said
    assert "<p0>" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert list(tmp_path.rglob("*")) == [tmp_path / "new", page]


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_plain_pairs_have_a_page(count: int, tmp_path: Path) -> None:
    rows = [PreferenceRow(f"p{i}", "aa bb", "cc dd") for i in range(count)]
    audit = audit_preferences(rows)
    text = audit_report(tmp_path / "audit.html", AuditPage(audits={"read": audit})).read_text()
    assert text.count("<svg") == 1
    assert "Labels, prompts, decisions" not in text
    assert ("Nothing stands out." in text) == (not audit.verdicts)
