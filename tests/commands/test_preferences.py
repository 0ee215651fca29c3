"""The command `audit`: from synthetic pairs to those to train on, with people in between."""

import csv
import io
import json
import sys
import types
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import torch

from trueward.cli import main
from trueward.data.formats import load_preferences
from trueward.models.reward_model import RewardModel
from trueward.refine.audit import audit_preferences
from trueward.testing import tiny_backbone, tiny_texts, tiny_tokenizer
from trueward.train.reward import RewardConfig, train_reward

ANSWERED = ["1", "2", "tie", "drop"]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs as `trueward refine` writes them; of five chosen sides four are longer."""
    rows, reference = [], []
    for i in range(60):
        short, long = sorted(tiny_texts(2, seed=i, words=(4, 12)), key=len)
        sides = [long, short] if i % 5 else [short, long]
        row = {"prompt": f"p{i}", "chosen": sides[0], "rejected": sides[1]}
        reference.append(row if i % 3 else row | {"chosen": sides[1], "rejected": sides[0]})
        confidence = {"confidence": 0.5 + 0.1 * (i % 4), "cluster_sizes": [6, 4]}
        rewards = {"chosen_reward": (i % 9) / 9, "rejected_reward": 0.3}
        rows.append(row | confidence | rewards)
    turned = rows[7] | {"chosen": rows[7]["rejected"], "rejected": rows[7]["chosen"]}
    write(tmp_path / "pairs.jsonl", [*rows, rows[0], turned, {"prompt": "p", "chosen": "a"}])
    write(tmp_path / "people.jsonl", reference[:30])
    write(
        tmp_path / "prompts.jsonl", [{"prompt": f"p{i}", "completions": ["a"]} for i in range(80)]
    )
    (tmp_path / "judge.py").write_text(
        "def length(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    )
    return tmp_path


def run(arguments: str, folder: Path) -> int:
    return main(f"audit {arguments}".format(f=folder).split())


def numbers(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text())


BASE = "--preferences {f}/pairs.jsonl --output_dir {f}/out "


def test_an_audit_says_what_is_wrong_and_writes_what_is_right(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    command = BASE + (
        "--reference {f}/people.jsonl --prompts {f}/prompts.jsonl --judge {f}/judge.py:length "
        "--gates.min_confidence 0.6 --length balance --review 5 --seed 3"
    )
    assert run(command, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    out = folder / "out"
    found = numbers(out, "audit.json")
    rows = load_preferences(folder / "pairs.jsonl").rows
    people = load_preferences(folder / "people.jsonl").rows
    expected = audit_preferences(rows, reference=people, prompts=[f"p{i}" for i in range(80)])
    plain = json.loads(json.dumps(expected.to_json()))
    assert found["read"]["length"] == plain["length"]
    assert found["read"]["coverage"] == plain["coverage"]
    assert found["read"]["labels"]["reference"] == plain["labels"]["reference"]
    # The judge agrees wherever the chosen side is longer.
    longer = found["read"]["length"]["longer"]
    assert found["read"]["labels"]["judge"]["agreement"] == longer
    page = unescape((out / "audit.html").read_text())
    for sentence in found["read"]["verdicts"]:
        assert sentence in page
        assert sentence in printed
    assert "The chosen side is longer in 7" in printed
    kept = load_preferences(out / "kept.jsonl").rows
    assert all(row.extra["confidence"] >= 0.6 for row in kept)
    assert found["kept"]["length"]["longer"]["share"] == 0.5
    dropped = read(out / "dropped.jsonl")
    assert len(kept) + len(dropped) == 63  # every line of the file is in one of the two
    assert {row["reason"] for row in dropped} == {
        "low confidence",
        "contradiction",
        "length balance",
        "duplicate",
        "missing column",
    }
    assert [r["where"] for r in dropped if r["reason"] == "contradiction"] == [
        "pairs.jsonl:8",
        "pairs.jsonl:62",
    ]
    counts = found["dropped"]
    assert sum(counts.values()) == 61 - len(kept)
    assert found["problems"] == {"duplicate": 1, "missing column": 1}
    summary = numbers(out, "summary.json")
    assert summary["command"] == "audit"
    assert summary["metrics"]["kept"] == len(kept)
    assert len(list(csv.reader(io.StringIO((out / "review.csv").read_text("utf-8-sig"))))) == 6
    # Long lines are broken wherever the folder's name ends.
    assert "review.csv:5doubtfulpairs" in "".join(printed.split())


def test_answers_of_people_are_read_into_the_same_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(BASE + "--review 4", folder) == 0
    path = folder / "out" / "review.csv"
    table = list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))
    for line, word in zip(table[1:], ANSWERED, strict=True):
        line[4] = word
    out = io.StringIO()
    csv.writer(out).writerows([*table, ["feed", "p", "a", "b", "1"]])
    path.write_text(out.getvalue(), "utf-8-sig")
    capsys.readouterr()
    # Forgetting them does not cost them.
    assert run(BASE + "--review 4", folder) == 2
    assert "review.csv holds answers" in capsys.readouterr().err
    answered = BASE + "--review 4 --reviewed {f}/out/review.csv --gates.min_confidence 0.95"
    assert run(answered, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    assert "is being read, so no new one is written" in printed
    assert "1 of people's answers are about no pair" in printed
    assert path.read_text("utf-8-sig").splitlines() == out.getvalue().splitlines()
    kept = load_preferences(folder / "out" / "kept.jsonl").rows
    # No machine's pair passes the gate, people's labels all do, as they said.
    assert {row.prompt for row in kept} == {line[1] for line in table[1:3]}
    wanted = {table[1][1]: table[1][2], table[2][1]: table[2][3]}
    assert {row.prompt: row.chosen for row in kept} == wanted
    assert all(row.extra["labelled_by"] == "people" for row in kept)
    review = numbers(folder / "out", "audit.json")["review"]
    assert review["confirmed"] + review["relabelled"] == 2
    assert (review["ties"], review["dropped"], review["unknown"]) == (1, 1, 1)
    assert review["unknown_answers"][0]["id"] == "feed"
    reasons = [row["reason"] for row in read(folder / "out" / "dropped.jsonl")]
    assert reasons[:2] == ["a tie to people", "dropped by people"]


def test_weights_keep_every_pair_and_a_reward_trains_on_them(folder: Path):
    assert run(BASE + "--length weights", folder) == 0
    rows = load_preferences(folder / "out" / "kept.jsonl").rows
    assert len(rows) == 59
    longer = sum(row.weight for row in rows if len(row.chosen) > len(row.rejected))
    shorter = sum(row.weight for row in rows if len(row.chosen) < len(row.rejected))
    assert longer == pytest.approx(shorter)
    assert sum(row.weight for row in rows) == pytest.approx(59)
    tokenizer = tiny_tokenizer()
    model = RewardModel.from_backbone(tiny_backbone(vocab_size=len(tokenizer)), tokenizer)
    config = RewardConfig(batch_size=16, progress=False)
    train_reward(model, rows, config, output_dir=folder / "trained")
    assert numbers(folder / "trained", "summary.json")["metrics"]["pairs"] == 59


def test_a_judge_that_gates_does_not_praise_what_it_chose(folder: Path):
    tokenizer = tiny_tokenizer()
    backbone = tiny_backbone(vocab_size=len(tokenizer), max_positions=32)
    RewardModel.from_backbone(backbone, tokenizer).save_pretrained(folder / "judge")
    command = BASE + "--judge {f}/judge --gates.min_judge_probability 0.9"
    assert run(command, folder) == 0
    found = numbers(folder / "out", "audit.json")
    judge = found["read"]["labels"]["judge"]
    assert judge["unanswered"] > 0  # longer than its context
    assert found["dropped"]["no judgement"] == judge["unanswered"]
    assert found["kept"]["labels"]["judge"] is None
    kept = read(folder / "out" / "kept.jsonl")
    assert kept
    assert all(row["judge_probability"] == 1.0 for row in kept)
    model = RewardModel.from_pretrained(folder / "judge", device="cpu")
    chosen, rejected = (
        model.score([r["prompt"] for r in kept], [r[side] for r in kept]).mean
        for side in ("chosen", "rejected")
    )
    assert bool((chosen > rejected).all())


def test_embeddings_are_made_once_for_each_text(folder: Path, monkeypatch: pytest.MonkeyPatch):
    embedded: list[str] = []

    class Model:
        def __init__(self, name: str, device: str | None = None) -> None:
            assert name == "toy/model"

        def encode(self, texts: list[str], **_: object) -> torch.Tensor:
            embedded.extend(texts)
            return torch.tensor([[1.0, len(text) / 10] for text in texts])

    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    command = BASE + "--embedding_model toy/model --prompts {f}/prompts.jsonl"
    assert run(command, folder) == 0
    assert len(embedded) == len(set(embedded)) > 150
    read_audit = numbers(folder / "out", "audit.json")["read"]
    assert 0.9 < read_audit["chosen"]["mean_cosine"] <= 1
    assert read_audit["coverage"]["clusters"] >= 1


def test_no_pair_left_is_said_and_everything_else_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(BASE + "--gates.min_confidence 1", folder) == 0
    assert "No pair is left to train on" in " ".join(capsys.readouterr().err.split())
    assert (folder / "out" / "kept.jsonl").read_text() == ""
    assert "kept" not in numbers(folder / "out", "audit.json")
    assert "No pair is left" in (folder / "out" / "audit.html").read_text()


def odd_confidence(folder: Path) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "confidence": "high"}
    write(folder / "odd.jsonl", [row])


def odd_answer(folder: Path) -> None:
    (folder / "review.csv").write_text("id,answer\nx,yes\n")


def other_run(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "config.yaml").write_text("method: spg\n")


MISTAKES: list[tuple[str, Callable[[Path], None] | None, str]] = [
    ("--preferences {f}/none.jsonl --output_dir {f}/out", None, "none.jsonl"),
    (BASE + "--review -1", None, "review must be at least 0 pairs, got -1"),
    (BASE + "--max_weight 0.5", None, "max_weight must be at least 1, got 0.5"),
    (BASE + "--gates.min_judge_probability 0.5", None, "needs a --judge"),
    (BASE + "--gates.min_confidence 2", None, "min_confidence must lie in [0, 1], got 2"),
    (BASE + "--reviewed {f}/none.csv", None, "none.csv does not exist"),
    (
        BASE + "--reviewed {f}/review.csv",
        odd_answer,
        "review.csv:2: an answer must be 1, 2, tie or drop",
    ),
    (BASE + "--judge {f}/judge.py:width", None, "has no function 'width'"),
    (
        "--preferences {f}/odd.jsonl --output_dir {f}/out",
        odd_confidence,
        "odd.jsonl:1: 'confidence' must be a finite number or null, got 'high'",
    ),
    (BASE, other_run, "give another --output_dir"),
]


@pytest.mark.parametrize(("arguments", "before", "says"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_exit_code_two(
    arguments: str,
    before: Callable[[Path], None] | None,
    says: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    if before is not None:
        before(folder)
    assert run(arguments, folder) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    assert message.strip().splitlines()[-1].startswith("trueward audit:")
