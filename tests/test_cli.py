"""The commands: what they write, and what a user reads after each kind of mistake."""

import gzip
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trueward.cli import COMMANDS, main, usage
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.testing import (
    tiny_backbone,
    tiny_classifier,
    tiny_language_model,
    tiny_preferences,
    tiny_texts,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models and files, good and broken."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    Policy(tiny_language_model(vocab_size=size, max_positions=64), tokenizer).save_pretrained(
        root / "policy"
    )
    for name, members in (("scalar", 0), ("gaussian", 3)):
        backbone = tiny_backbone(vocab_size=size, max_positions=64)
        RewardModel.from_backbone(backbone, tokenizer, members=members).save_pretrained(root / name)
    two = tiny_classifier(vocab_size=size)
    two.config.num_labels = 2
    two.config.save_pretrained(root / "two_labels")
    tokenizer.save_pretrained(root / "two_labels")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in tiny_preferences(24)]
    write(root / "preferences.jsonl", rows)
    write(root / "prompts.jsonl", [{"prompt": p} for p in tiny_texts(4)])
    write(root / "demonstrations.jsonl", [{"prompt": "p", "completion": "cat dog"}] * 2)
    write(
        root / "to_score.jsonl", [{"prompt": p, "completion": c} for p, c, _ in tiny_preferences(6)]
    )
    write(root / "gold.jsonl", [{"proxy": [1.0, 2.0, 3.0], "gold": [5.0, 1.0, 3.0]}] * 2)
    write(root / "wrong_columns.jsonl", [{"question": "q", "answer": "a"}] * 3)
    write(root / "no_answers.jsonl", [{"prompt": "p"}])
    write(root / "long.jsonl", [{"prompt": "p", "completion": "cat " * 200}])
    write(root / "long_prompts.jsonl", [{"prompt": "cat " * 200}])
    write(root / "mixed.jsonl", [{"prompt": "p", "chosen": ["a"], "rejected": "b"}])
    write(root / "chat.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    write(root / "empty.jsonl", [])
    lines = [json.dumps(row) for row in rows]
    lines[16] = '{"prompt": "p", "chosen": '
    (root / "line17.jsonl").write_text("\n".join(lines))
    (root / "corrupt.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    (root / "unknown_key.yaml").write_text("train:\n  learning_rte: 1e-4\n")
    (root / "bad_value.yaml").write_text("train:\n  learning_rate: fast\n")
    (root / "reward.py").write_text("def length(prompts, completions):\n    return [1.0]\n")
    chatless = tiny_tokenizer()
    chatless.chat_template = None
    Policy(tiny_language_model(vocab_size=size), chatless).save_pretrained(root / "chatless")
    return root


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# (mistake, arguments with {f} for the folder, what the sentence says)
MISTAKES: list[tuple[str, str, str]] = [
    ("an unknown command", "rewrad", "unknown command 'rewrad'; did you mean 'reward'?"),
    (
        "a file that is not there",
        "reward --preferences {f}/nowhere.jsonl --backbone {f}/policy --output_dir {f}/o",
        "nowhere.jsonl",
    ),
    (
        "columns of another format",
        "reward --preferences {f}/wrong_columns.jsonl --backbone {f}/policy --output_dir {f}/o",
        "question",
    ),
    (
        "every row unusable",
        "reward --preferences {f}/mixed.jsonl --backbone {f}/policy --output_dir {f}/o",
        "mixed.jsonl",
    ),
    (
        "an empty file",
        "sft --demonstrations {f}/empty.jsonl --output_dir {f}/o",
        "empty.jsonl",
    ),
    (
        "a cut-off .gz file",
        "sft --demonstrations {f}/corrupt.jsonl.gz --output_dir {f}/o",
        "corrupt.jsonl.gz",
    ),
    (
        "a broken line 17 where every row is needed",
        "score --reward_model {f}/scalar --input {f}/line17.jsonl --output {f}/s.jsonl",
        "line17.jsonl:17",
    ),
    (
        "rows without a completion",
        "score --reward_model {f}/scalar --input {f}/no_answers.jsonl --output {f}/s.jsonl",
        "needs 'prompt' and 'completion'",
    ),
    (
        "an unknown key in YAML",
        "sft --config {f}/unknown_key.yaml --demonstrations d --output_dir o",
        "unknown_key.yaml:2: unknown key 'train.learning_rte'",
    ),
    (
        "a value of the wrong type in YAML",
        "sft --config {f}/bad_value.yaml --demonstrations d --output_dir o",
        "bad_value.yaml:2: 'train.learning_rate' must be a number, got 'fast'",
    ),
    (
        "a YAML file that is not there",
        "sft --config {f}/none.yaml",
        "none.yaml cannot be read",
    ),
    (
        "a number of members below zero",
        "reward --preferences {f}/preferences.jsonl --backbone {f}/policy --output_dir {f}/o "
        "--members -1",
        "members must be 0 (scalar) or at least 1, got -1",
    ),
    (
        "a completion longer than the context",
        "score --reward_model {f}/scalar --input {f}/long.jsonl --output {f}/s.jsonl",
        "does not fit into the model's 64",
    ),
    (
        "a prompt longer than the context",
        "sample --policy {f}/policy --prompts {f}/long_prompts.jsonl --output {f}/s.jsonl",
        "the policy reads 64",
    ),
    (
        "a language model where a reward model belongs",
        "score --reward_model {f}/policy --input {f}/to_score.jsonl --output {f}/s.jsonl",
        "is no reward model: train one with `trueward reward`",
    ),
    (
        "a classifier with two labels",
        "policy --policy {f}/policy --reward {f}/two_labels --prompts {f}/prompts.jsonl "
        "--output_dir {f}/o",
        "has 2 labels",
    ),
    (
        "a folder without a model",
        "sample --policy {f} --prompts {f}/prompts.jsonl --output {f}/s.jsonl",
        "No language model could be read",
    ),
    (
        "messages for a tokenizer without a chat template",
        "sample --policy {f}/chatless --prompts {f}/chat.jsonl --output {f}/s.jsonl",
        "has no chat template",
    ),
    (
        "a reward function that does not exist",
        "policy --policy {f}/policy --reward {f}/reward.py:size --prompts {f}/prompts.jsonl "
        "--output_dir {f}/o",
        "has no function 'size'",
    ),
    (
        "a reward function that returns too few numbers",
        "policy --policy {f}/policy --reward {f}/reward.py:length --prompts {f}/prompts.jsonl "
        "--output_dir {f}/o2 --train.max_new_tokens 4 --train.progress False",
        "returned 1 rewards for",
    ),
    (
        "groups of one for RLOO",
        "policy --policy {f}/policy --reward {f}/scalar --prompts {f}/prompts.jsonl "
        "--output_dir {f}/o3 --train.algorithm rloo --train.completions_per_prompt 1",
        "completions_per_prompt must be at least 2, got 1",
    ),
    (
        "vLLM asked for and not installed",
        "sample --policy {f}/policy --prompts {f}/prompts.jsonl --output {f}/s.jsonl "
        "--sampling.engine vllm",
        "engine=vllm needs vLLM",
    ),
    (
        "a disk that fills up",
        "sample --policy {f}/policy --prompts {f}/prompts.jsonl --output {f}/full.jsonl "
        "--sampling.max_new_tokens 8",
        "free some space and run it again, it goes on where it was",
    ),
    (
        "an output below a file",
        "sample --policy {f}/policy --prompts {f}/prompts.jsonl --output {f}/prompts.jsonl/s.jsonl",
        "prompts.jsonl/s.shards",
    ),
    (
        "a reward model where a language model belongs",
        "sample --policy {f}/scalar --prompts {f}/prompts.jsonl --output {f}/s.jsonl",
        "lacks the weights lm_head.weight",
    ),
    (
        "a report of a folder that holds no run",
        "report --folder {f}/policy",
        "holds no run",
    ),
    ("nothing to evaluate", "evaluate", "Nothing to evaluate"),
]


@pytest.mark.parametrize(("mistake", "arguments", "says"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_sentence_and_exit_code_two(
    mistake: str, arguments: str, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(arguments, folder) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message
    last = message.strip().splitlines()[-1]
    assert last.startswith("trueward"), last


def run(arguments: str, folder: Path) -> int:
    """Run a command; one that writes full.jsonl meets a file system that takes no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if "full.jsonl" in arguments:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
        return main(arguments.format(f=folder).split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_unknown_argument_ends_with_exit_code_two(folder: Path):
    assert run("report --fodler x", folder) == 2


def test_help_lists_every_command():
    assert all(name in usage() for name in COMMANDS)
    assert main(["--help"]) == main([]) == 0


def test_the_commands_run_one_after_another(folder: Path, capsys: pytest.CaptureFixture[str]):
    small = "--train.epochs 1 --train.batch_size 8 --train.progress False"
    steps = [
        "sft --demonstrations {f}/demonstrations.jsonl --model.path {f}/policy "
        "--output_dir {f}/way/sft --train.epochs 1 --train.batch_size 1 --train.progress False",
        "reward --preferences {f}/preferences.jsonl --backbone {f}/way/sft/model "
        f"--output_dir {{f}}/way/reward --members 2 --held_out 0.2 {small}",
        "policy --policy {f}/way/sft/model --reward {f}/way/reward/model --prompts "
        "{f}/prompts.jsonl --output_dir {f}/way/policy --objective.name reward_robust "
        "--train.steps 2 --train.prompts_per_step 2 --train.max_new_tokens 4 "
        "--train.progress False",
        "sample --policy {f}/way/policy/model --prompts {f}/prompts.jsonl --output "
        "{f}/way/samples.jsonl --sampling.n 4 --sampling.max_new_tokens 6",
        "score --reward_model {f}/way/reward/model --input {f}/way/samples.jsonl --output "
        "{f}/way/scores.jsonl",
        "refine --method uml --reward_model {f}/way/reward/model --preferences "
        "{f}/preferences.jsonl --samples {f}/way/samples.jsonl --backbone {f}/way/sft/model "
        "--output_dir {f}/way/uml --uml.latent 4 --uml.width 8 --uml.prompts_per_batch 2 " + small,
        "refine --method spg --spg.gamma 0 --reward_model {f}/way/reward/model --preferences "
        "{f}/preferences.jsonl --samples {f}/way/samples.jsonl --backbone {f}/way/sft/model "
        f"--output_dir {{f}}/way/spg {small}",
        "evaluate --reward_model {f}/way/reward/model --preferences made {f}/preferences.jsonl "
        "--output {f}/way/evaluation.json",
        "evaluate --completions {f}/way/samples.jsonl --reference_completions "
        "{f}/way/samples.jsonl --judge {f}/way/reward/model --output {f}/way/win.json",
        "evaluate --best_of_n {f}/gold.jsonl --output {f}/way/best.json",
        "report --folder {f}/way/policy",
    ]
    for step in steps:
        assert run(step, folder) == 0, capsys.readouterr().err
    way = folder / "way"
    summary = json.loads((way / "reward" / "summary.json").read_text())
    assert 0 <= summary["metrics"]["held_out/accuracy"] <= 1
    scored = [json.loads(line) for line in (way / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == 4
    assert len(scored[0]["reward"]) == len(scored[0]["std"]) == 4
    assert len(scored[0]["members"][0]) == 2
    assert json.loads((way / "win.json").read_text())["win_rate"]["win_rate"] == 0.5
    best = list(json.loads((way / "best.json").read_text())["best_of_n"].values())
    assert best == pytest.approx([3.0, 7 / 3])  # of two: 3 in two of three pairs, 1 in the other
    assert "<html" in (way / "policy" / "report.html").read_text()
    capsys.readouterr()
    assert run(steps[0], folder) == 0  # a finished run is never done again
    assert "is finished" in capsys.readouterr().err
    assert run(steps[1] + " --train.centring 0.5", folder) == 2  # another run's folder is refused
    assert "train.centring=0.01" in capsys.readouterr().err
    config = (way / "reward" / "config.yaml").read_text()
    assert "preferences:" in config
    assert "members: 2" in config


def test_score_gives_the_numbers_of_plain_transformers(folder: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [{"prompt": p, "completion": c} for p, c, _ in tiny_preferences(6)]
    write(folder / "to_score.jsonl", rows)
    assert (
        run(
            "score --reward_model {f}/scalar --input {f}/to_score.jsonl --output {f}/scored.jsonl",
            folder,
        )
        == 0
    )
    found = [
        json.loads(line)["reward"] for line in (folder / "scored.jsonl").read_text().splitlines()
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "scalar").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "scalar")
    for row, reward in zip(rows, found, strict=True):
        ids = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
        with torch.no_grad():
            logit = model(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits.item()
        assert reward == pytest.approx(logit, abs=1e-5)


def messages_page(folder: Path, capture: Callable[[], str]) -> str:
    """Return `docs/messages.md`: every mistake of this module with what the user reads."""
    lines = [
        "# What a user reads after a mistake",
        "",
        "Each is one sentence on standard error and exit code 2. Made by "
        "`python tests/test_cli.py`.",
        "",
    ]
    for mistake, arguments, _ in MISTAKES:
        run(arguments, folder)
        message = capture().strip().splitlines()[-1].replace(str(folder), "DIR")
        command = arguments.replace("{f}", "DIR")
        lines += [f"**{mistake[0].upper()}{mistake[1:]}**", "", f"    $ trueward {command}"]
        lines += [f"    {message}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    import contextlib
    import io
    import tempfile

    os.environ["HF_HUB_OFFLINE"] = "1"
    error = io.StringIO()

    def taken() -> str:
        text = error.getvalue()
        error.seek(0)
        error.truncate()
        return text

    class Factory:
        """Stands in for pytest's."""

        def mktemp(self, name: str) -> Path:
            return Path(tempfile.mkdtemp(prefix=name))

    with contextlib.redirect_stderr(error):
        made = folder.__wrapped__(Factory())  # type: ignore[attr-defined]
        taken()
        page = messages_page(made, taken)
    Path(sys.argv[1] if len(sys.argv) > 1 else "docs/messages.md").write_text(page)
