"""The commands: what they write, and what a user reads after each kind of mistake."""

import copy
import dataclasses
import gzip
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markupsafe import escape

from trueward.cli import COMMANDS, main, usage
from trueward.data.formats import load_preferences
from trueward.evaluate.diagnosis import diagnose
from trueward.evaluate.multiple_choice import (
    evaluate_multiple_choice,
    lettered,
    load_questions,
)
from trueward.evaluate.out_of_distribution import OUT_OF_DISTRIBUTION
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.shift import energy_test, last_states
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.models.weight_averaging import average_weights
from trueward.testing import (
    tiny_backbone,
    tiny_classifier,
    tiny_language_model,
    tiny_preferences,
    tiny_texts,
    tiny_tokenizer,
)
from trueward.train.alarm import Calibration
from trueward.train.reward import own_completions


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
    scalar = RewardModel.from_pretrained(root / "scalar", device="cpu")
    for name, seed in (("near", 1), ("other", 2)):
        moved(scalar, seed).save_pretrained(root / name)
    opposite(scalar).save_pretrained(root / "opposite")
    two = tiny_classifier(vocab_size=size)
    two.config.num_labels = 2
    two.config.save_pretrained(root / "two_labels")
    tokenizer.save_pretrained(root / "two_labels")
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in tiny_preferences(24)]
    write(root / "preferences.jsonl", rows)
    rewards = scalar.score(
        [row["prompt"] for row in rows for _ in "cr"],
        [row[side] for row in rows for side in ("chosen", "rejected")],
    ).mean.tolist()
    turned = [
        row if c > r else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for row, c, r in zip(rows, rewards[0::2], rewards[1::2], strict=True)
    ]
    write(root / "agreed.jsonl", turned)  # with the scalar model
    french = [{"prompt": row["prompt"], "completion": f"le chat {i}"} for i, row in enumerate(rows)]
    write(root / "french.jsonl", french[:20])
    write(root / "away.jsonl", [{"prompt": "elsewhere", "completions": ["who", "goes", "there"]}])
    write(root / "samples.jsonl", [{"prompt": "p", "completions": ["cat", "dog"], "lang": "en"}])
    asked = [{"prompt": p, "lang": "en", "note": "n"} for p in tiny_texts(4)]
    write(root / "prompts.jsonl", asked)
    write(root / "demonstrations.jsonl", [{"prompt": "p", "completion": "cat dog"}] * 2)
    write(
        root / "to_score.jsonl", [{"prompt": p, "completion": c} for p, c, _ in tiny_preferences(6)]
    )
    words = ["cat", "a big dog", "the red bird sees"]
    for name, end in (("before", ""), ("after", " then runs quickly")):
        write(
            root / f"{name}.jsonl",
            [
                {"prompt": p, "completions": [f"{word} {i}{end}" for word in words]}
                for i, p in enumerate(tiny_texts(6))
            ],
        )
    write(
        root / "questions.jsonl",
        [{"query": p, "choices": ["cat", "the dog"], "gold": 1} for p in tiny_texts(5)],
    )
    write(root / "bad_questions.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 5}])
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
    (root / "reward.py").write_text(
        "def length(prompts, completions):\n    return [1.0]\n\n\n"
        "def letters(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    )
    chatless = tiny_tokenizer()
    chatless.chat_template = None
    Policy(tiny_language_model(vocab_size=size), chatless).save_pretrained(root / "chatless")
    return root


def moved(model: RewardModel, seed: int) -> RewardModel:
    """A copy with a little noise on every weight, as training from one start gives."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def opposite(model: RewardModel) -> RewardModel:
    """The same function with the states' sign turned: half way between both there is nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.backbone.norm.weight *= -1
        model.head.linear.weight *= -1
    return model


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
        "a number of members below one",
        "reward --preferences {f}/preferences.jsonl --backbone {f}/policy --output_dir {f}/o "
        "--members -1",
        "members must be at least 1, got -1",
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
        "a method's own option given beside it",
        "refine --method uml --uml.loss mvi --reward_model {f}/scalar --preferences "
        "{f}/preferences.jsonl --samples {f}/samples.jsonl --backbone {f}/policy "
        "--output_dir {f}/o",
        "uml.loss is what the method says",
    ),
    (
        "routes that no sample takes",
        "refine --method spg --spg.routes de exact --reward_model {f}/scalar --preferences "
        "{f}/preferences.jsonl --samples {f}/samples.jsonl --backbone {f}/policy "
        "--output_dir {f}/o",
        "spg.routes go by 'lang', and no row",
    ),
    (
        "a reward to be refreshed by a command that cannot",
        "policy --policy {f}/policy --reward {f}/scalar --prompts {f}/prompts.jsonl "
        "--train.refresh_every 5 --output_dir {f}/o",
        "or run `trueward rlp` with policy.refresh_every",
    ),
    (
        "a warm start of another family",
        "refine --method spg --warm_start True --family.family heads --reward_model {f}/scalar "
        "--preferences {f}/preferences.jsonl --samples {f}/samples.jsonl --backbone {f}/policy "
        "--output_dir {f}/o",
        "whose family and adapters it keeps",
    ),
    (
        "rlaif without the policy that judges",
        "refine --method rlaif --reward_model {f}/scalar --preferences {f}/preferences.jsonl "
        "--samples {f}/samples.jsonl --backbone {f}/policy --output_dir {f}/o",
        "method=rlaif needs it, and no other method reads it",
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
    (
        "a page of a diagnosis that is switched off",
        "evaluate --reward_model {f}/scalar --preferences made {f}/preferences.jsonl "
        "--diagnosis False --page {f}/page.html",
        "--page belongs to the diagnosis",
    ),
    (
        "a page of a diagnosis and of sets together",
        "evaluate --reward_model {f}/scalar --preferences made {f}/preferences.jsonl "
        "--completions {f}/french.jsonl --page {f}/page.html",
        "--page shows either the diagnosis or",
    ),
    (
        "sets of completions and of references under different names",
        "evaluate --completions farm {f}/french.jsonl bar {f}/french.jsonl "
        "--reference_completions farm {f}/french.jsonl vicuna {f}/french.jsonl "
        "--judge {f}/scalar",
        "must have the same names, got farm, bar and farm, vicuna",
    ),
    (
        "samples without anything to judge them",
        "evaluate --reward_model {f}/scalar --samples before {f}/before.jsonl",
        "--samples needs --gold or --judge",
    ),
    (
        "samples without a reward",
        "evaluate --gold {f}/reward.py:letters --samples before {f}/before.jsonl",
        "--samples needs --reward_model or --rewards",
    ),
    (
        "samples with one completion of each prompt",
        "evaluate --reward_model {f}/scalar --gold {f}/scalar --samples before {f}/french.jsonl",
        "french.jsonl has no prompt with two completions to compare",
    ),
    (
        "questions without a policy",
        "evaluate --multiple_choice facts {f}/questions.jsonl",
        "--multiple_choice needs --policy",
    ),
    (
        "a question whose answer is none of its choices",
        "evaluate --policy {f}/policy --multiple_choice facts {f}/bad_questions.jsonl",
        "bad_questions.jsonl:1: 'gold' must be an index from 0 to 1",
    ),
    (
        "a KL to nothing",
        "evaluate --policy {f}/policy --own_samples {f}/before.jsonl",
        "and --against, its reference",
    ),
    (
        "completions outside of the data under a name that is taken",
        "evaluate --reward_model {f}/scalar --preferences made {f}/preferences.jsonl "
        "--out_of_distribution shuffled {f}/french.jsonl",
        "has a name that is taken, 'shuffled'",
    ),
    (
        "completions outside of the data that are none",
        "evaluate --reward_model {f}/scalar --preferences made {f}/preferences.jsonl "
        "--out_of_distribution french {f}/no_answers.jsonl",
        "no_answers.jsonl:1 needs 'prompt' and 'completion'",
    ),
    (
        "an average of one model",
        "average --reward_model {f}/scalar --output_dir {f}/o4",
        "needs two models at least, got one",
    ),
    (
        "one model given twice to an average",
        "average --reward_model {f}/scalar {f}/near {f}/scalar --output_dir {f}/o4",
        "scalar more than once",
    ),
    (
        "the best models by nothing",
        "average --reward_model {f}/scalar {f}/near --best 1 --output_dir {f}/o4",
        "--best and --selection go together",
    ),
    (
        "the one best model as an average",
        "average --reward_model {f}/scalar {f}/near --best 1 --selection {f}/preferences.jsonl "
        "--output_dir {f}/o4",
        "best must be 0 (all) or at least 2 models, got 1",
    ),
    (
        "more of the best than there are models",
        "average --reward_model {f}/scalar {f}/near --best 3 --selection {f}/preferences.jsonl "
        "--output_dir {f}/o4",
        "count must lie between 1 and the 2 models, got 3",
    ),
    (
        "a test of paths on nothing",
        "average --reward_model {f}/scalar {f}/near --test_only True --output_dir {f}/o4",
        "--test_only needs --preferences",
    ),
    (
        "models that have no average",
        "average --reward_model {f}/scalar {f}/near {f}/gaussian --preferences {f}/agreed.jsonl "
        "--output_dir {f}/o5",
        "model 1 and model 3 differ in their heads",
    ),
    (
        "models with a barrier between them",
        "average --reward_model {f}/scalar {f}/opposite --preferences {f}/agreed.jsonl "
        "--output_dir {f}/o6",
        "the accuracy is 0.500 [0.500, 0.500] below the line between the two: average models of "
        "one start, or give --force",
    ),
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


def test_a_policy_stops_at_its_alarm(folder: Path, capsys: pytest.CaptureFixture[str]):
    rules = Calibration(weights={"spread": 1.0}, window=2, threshold=-1e9)
    rules.save(folder / "alarm.json")
    command = (
        "policy --policy {f}/policy --reward {f}/scalar --prompts {f}/prompts.jsonl --output_dir "
        "{f}/alarmed --train.steps 6 --train.prompts_per_step 2 --train.max_new_tokens 4 "
        "--train.progress False --monitor {f}/scalar {f}/near"
    )
    assert run(command, folder) == 2
    assert "A monitor is for the alarm" in capsys.readouterr().err
    command += " --alarm.action stop --alarm.calibration {f}/alarm.json"
    assert run(command.replace("alarm.json", "none.json"), folder) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert run(command, folder) == 0, capsys.readouterr().err
    summary = json.loads((folder / "alarmed" / "summary.json").read_text())["metrics"]
    assert summary["alarm/raised_at"] == 3
    assert summary["alarm/restored"] == 2
    assert "alarm/restored 2" in capsys.readouterr().err


def test_the_commands_run_one_after_another(folder: Path, capsys: pytest.CaptureFixture[str]):
    small = "--train.epochs 1 --train.batch_size 8 --train.progress False"
    steps = [
        "sft --demonstrations {f}/demonstrations.jsonl --model.path {f}/policy "
        "--output_dir {f}/way/sft --train.epochs 1 --train.batch_size 1 --train.progress False",
        "reward --preferences {f}/preferences.jsonl --backbone {f}/way/sft/model "
        f"--output_dir {{f}}/way/reward --family heads --members 2 --held_out 0.2 {small}",
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
        "refine --method spg --spg.gamma 0 --pairs_only True --reward_model {f}/way/reward/model "
        "--preferences {f}/preferences.jsonl --samples {f}/way/samples.jsonl --backbone "
        "{f}/way/sft/model --output_dir {f}/way/pairs",
        "audit --preferences {f}/way/pairs/preferences/preferences.jsonl "
        "--output_dir {f}/way/audit",
        "refine --method spg --synthetic {f}/way/audit/kept.jsonl --warm_start True --reward_model "
        "{f}/way/reward/model --preferences {f}/preferences.jsonl --samples {f}/way/samples.jsonl "
        f"--backbone {{f}}/way/sft/model --output_dir {{f}}/way/warm {small}",
        "refine --method reward --family.family heads --family.members 2 --reward_model "
        "{f}/way/reward/model --preferences {f}/preferences.jsonl --samples {f}/way/samples.jsonl "
        f"--backbone {{f}}/way/sft/model --output_dir {{f}}/way/heads {small}",
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
    assert 0 <= summary["metrics"]["test/accuracy"] <= 1
    drawn = [json.loads(line) for line in (way / "samples.jsonl").read_text().splitlines()]
    assert {row["lang"] for row in drawn} == {"en"}  # kept, for equivalences by language
    assert all("note" not in row for row in drawn)
    scored = [json.loads(line) for line in (way / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == 4
    assert len(scored[0]["reward"]) == len(scored[0]["std"]) == 4
    assert len(scored[0]["members"][0]) == 2
    assert json.loads((way / "win.json").read_text())["win_rate"]["win_rate"] == 0.5
    best = list(json.loads((way / "best.json").read_text())["best_of_n"].values())
    assert best == pytest.approx([3.0, 7 / 3])  # of two: 3 in two of three pairs, 1 in the other
    assert "<html" in (way / "policy" / "report.html").read_text()
    assert not (way / "pairs" / "model").exists()  # pairs alone
    made = (way / "pairs" / "preferences" / "preferences.jsonl").read_text()
    assert (way / "spg" / "preferences" / "preferences.jsonl").read_text() == made
    pairs = [
        json.loads((way / name / "summary.json").read_text())["metrics"]["pairs"]
        for name in ("uml", "spg", "warm", "heads")
    ]
    kept = len((way / "audit" / "kept.jsonl").read_text().splitlines())
    assert kept > 0
    assert pairs[1] == pairs[0] + len(made.splitlines())
    assert pairs[2] == pairs[0] + kept
    assert pairs[3] >= pairs[0]
    for name, heads in (("warm", 2), ("heads", 2), ("uml", 1)):
        assert RewardModel.from_pretrained(way / name / "model").members == heads
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


def numbers_at(folder: Path, file: str) -> dict:
    return json.loads((folder / file).read_text())


def test_evaluate_diagnoses_a_reward_beside_its_numbers(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    command = "evaluate --reward_model {f}/gaussian --preferences made {f}/preferences.jsonl "
    given = "--out_of_distribution french {f}/french.jsonl away {f}/away.jsonl "
    files = "--output {f}/new/diagnosis.json --page {f}/new/page.html"
    assert run(command + given + files, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    found = numbers_at(folder, "new/diagnosis.json")["made"]
    diagnosis = found.pop("diagnosis")
    assert run(command + "--diagnosis False --output {f}/new/quick.json", folder) == 0
    assert found == pytest.approx(numbers_at(folder, "new/quick.json")["made"])
    assert "AUROC" not in capsys.readouterr().err
    # The same from Python, where the rows without an answer are left out by hand.
    rows = load_preferences(folder / "preferences.jsonl").rows
    french: list = [f"le chat {i}" for i in range(20)] + [None] * 4
    model = RewardModel.from_pretrained(folder / "gaussian", device="cpu")
    expected = diagnose(model, rows, out_of_distribution=OUT_OF_DISTRIBUTION | {"french": french})
    kinds = diagnosis["out_of_distribution"]
    assert list(kinds) == [*OUT_OF_DISTRIBUTION, "french", "away"]
    assert kinds["french"] == dataclasses.asdict(expected.out_of_distribution["french"])
    assert (kinds["french"]["missing"], kinds["away"]["missing"]) == (4, 21)
    for name, signal in diagnosis["uncertainties"].items():
        ours = expected.uncertainties[name]
        assert signal["quantiles"] == pytest.approx(ours.quantiles)
        for kind, auroc in ours.auroc.items():
            assert signal["auroc"][kind] == pytest.approx(dataclasses.asdict(auroc))
    assert len(diagnosis["reliability"]) == 15
    remarks = " ".join(diagnosis["remarks"])
    assert "4 of 24 pairs have no completion of french" in remarks
    assert "The completions of away answer other prompts" in remarks
    page = (folder / "new" / "page.html").read_text()
    for sentence in (*diagnosis["verdicts"], *diagnosis["remarks"]):
        assert sentence in printed
        assert escape(sentence) in page
    assert page.count("<svg") == 3  # reliability, AUROC, stds
    assert "AUROC for completions outside of the data." in printed


def test_evaluate_diagnoses_a_python_function_and_one_prompt(folder: Path):
    row = {"prompt": "p", "chosen": "a longer answer", "rejected": "short"}
    write(folder / "one.jsonl", [row])
    command = (
        "evaluate --reward_model {f}/reward.py:letters --preferences made {f}/preferences.jsonl "
        "one {f}/one.jsonl --output {f}/new/letters.json"
    )
    assert run(command, folder) == 0
    found = numbers_at(folder, "new/letters.json")
    diagnosis = found["made"]["diagnosis"]
    assert diagnosis["uncertainties"] == {}
    assert diagnosis["out_of_distribution"]["repeated x4"]["preferred"] == 1.0  # longer
    assert diagnosis["out_of_distribution"]["truncated"]["preferred"] == 0.0
    assert diagnosis["verdicts"][0].startswith("There is one member alone")
    assert found["one"]["accuracy"] == 1.0
    assert "There are no mismatched completions" in found["one"]["diagnosis"]["remarks"][0]


def test_evaluate_diagnoses_as_many_pairs_as_asked(folder: Path):
    command = (
        "evaluate --reward_model {f}/scalar {f}/near --preferences made {f}/preferences.jsonl "
        "--output {f}/new/some.json --diagnosis_rows 10 --seed "
    )
    found = []
    for seed in "003":
        assert run(command + seed, folder) == 0
        found.append(numbers_at(folder, "new/some.json")["made"])
    assert [(f["pairs"], f["diagnosis"]["pairs"]) for f in found] == [(24.0, 10)] * 3
    assert found[0] == found[1]
    assert found[0]["diagnosis"]["member_spread"] != found[2]["diagnosis"]["member_spread"]
    assert found[0]["accuracy"] == found[2]["accuracy"]


def test_evaluate_puts_several_sets_into_one_table_and_onto_a_page(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    command = (
        "evaluate --judge {f}/scalar --completions farm {f}/before.jsonl vicuna {f}/french.jsonl "
        "--reference_completions farm {f}/after.jsonl vicuna {f}/french.jsonl "
        "--output {f}/new/sets.json --page {f}/new/sets.html"
    )
    assert run(command, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    rates = numbers_at(folder, "new/sets.json")["win_rates"]
    assert [rates[name]["pairs"] for name in ("farm", "vicuna")] == [18, 20]
    assert rates["vicuna"]["win_rate"] == 0.5
    assert rates["vicuna"]["ties"] == 20
    page = (folder / "new" / "sets.html").read_text()
    for name, rate in rates.items():
        share = f"{100 * rate['win_rate']:.1f} ±"
        assert share in printed
        assert f"{share} {100 * rate['standard_error']:.1f}" in page
        assert name in page
        assert f"{100 * rate['length_controlled']['win_rate']:.1f} [" in page


def test_evaluate_shows_where_the_policy_went(folder: Path, capsys: pytest.CaptureFixture[str]):
    # A little later, with one prompt more and two prompts fewer than before.
    prompts = [*tiny_texts(6)[:4], "elsewhere"]
    texts = ["dog", "a red cat", "the big bird runs"]
    write(folder / "later.jsonl", [{"prompt": p, "completions": texts} for p in prompts])
    command = (
        "evaluate --reward_model {f}/reward.py:letters --rewards model {f}/scalar "
        "--gold {f}/reward.py:letters --samples before {f}/before.jsonl after {f}/after.jsonl "
        "later {f}/later.jsonl french {f}/away.jsonl --output {f}/new/shift.json "
        "--page {f}/new/shift.html"
    )
    assert run(command, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    found = numbers_at(folder, "new/shift.json")["shift"]
    assert found["rewards"] == ["reward", "model"]
    accuracies = {(a["reward"], a["source"]): a for a in found["accuracies"]}
    gold = accuracies["reward", "after"]
    assert (gold["accuracy"], gold["pairs"], gold["prompts"]) == (1.0, 18, 6)
    # The model by hand: letters order a prompt's three completions.
    model = RewardModel.from_pretrained(folder / "scalar", device="cpu")
    rows = [json.loads(line) for line in (folder / "before.jsonl").read_text().splitlines()]
    right = []
    for row in rows:
        texts = sorted(row["completions"], key=len)
        rewards = model.score([row["prompt"]] * 3, texts).mean
        right += [float(rewards[b] > rewards[a]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert accuracies["model", "before"]["accuracy"] == pytest.approx(sum(right) / 18)
    assert accuracies["model", "french"]["low"] is None  # one prompt, so no interval
    assert set(found["energies"]) == set(found["lengths"]) == {"after", "later", "french"}
    # By hand: of the prompts that both answer, labels within them; else one completion of each.
    sides = {}
    for name in ("before", "after", "later", "away"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        made = sorted((json.loads(line) for line in lines), key=lambda row: row["prompt"])
        sides[name] = [(row["prompt"], row["completions"]) for row in made]
    for name, file in (("after", "after"), ("later", "later"), ("french", "away")):
        both = {p for p, _ in sides[file]} & {p for p, _ in sides["before"]}
        kept = [
            [(p, c) for p, some in sides[side] for c in (some if both else some[:1])
             if not both or p in both]
            for side in (file, "before")
        ]  # fmt: skip
        states = [last_states(model, [p for p, _ in some], [c for _, c in some]) for some in kept]
        groups = ([p for p, _ in kept[0]], [p for p, _ in kept[1]]) if both else None
        expected = dataclasses.asdict(energy_test(states[0], states[1], groups=groups))
        assert found["energies"][name] == pytest.approx(expected)
    assert found["energies"]["after"]["p_value"] <= 0.05  # other words at the end
    means = [sum(len(c) for c in row["completions"]) / 3 for row in rows]
    assert found["lengths"]["after"]["other_mean"] == pytest.approx(sum(means) / 6)
    page = (folder / "new" / "shift.html").read_text()
    assert page.count("<svg") == 1
    assert "How far the completions moved from those of before" in printed
    assert "model less reward" in page
    # A judge in gold's place, that is asked about one pair of each prompt.
    judged = (
        "evaluate --reward_model {f}/scalar --judge {f}/scalar --sample_pairs first --samples "
        "before {f}/before.jsonl --output {f}/new/judged.json"
    )
    assert run(judged, folder) == 0
    (own,) = numbers_at(folder, "new/judged.json")["shift"]["accuracies"]
    assert (own["accuracy"], own["pairs"]) == (1.0, 6)


def test_evaluate_asks_a_policy_beside_its_reference(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    command = "evaluate --policy {f}/policy --multiple_choice facts {f}/questions.jsonl "
    assert run(command + "--output {f}/new/facts.json", folder) == 0, capsys.readouterr().err
    alone = numbers_at(folder, "new/facts.json")["multiple_choice"]["facts"]
    policy = Policy.from_pretrained(folder / "policy", device="cpu")
    questions = load_questions(folder / "questions.jsonl")
    expected = evaluate_multiple_choice(policy, questions)
    assert (alone["acc"], alone["acc_norm"]) == (expected.acc, expected.acc_norm)
    assert "acc_norm in %" in " ".join(capsys.readouterr().err.split())
    more = "--against {f}/policy --own_samples {f}/before.jsonl --lettered True "
    assert run(command + more + "--output {f}/new/facts.json", folder) == 0
    found = numbers_at(folder, "new/facts.json")
    facts = found["multiple_choice"]["facts"]
    assert facts["acc"] == facts["reference"]["acc"]
    assert (facts["retention"]["difference"], facts["retention"]["lost"]) == (0.0, 0)
    assert facts["acc"] == evaluate_multiple_choice(policy, [lettered(q) for q in questions]).acc
    assert found["kl"]["completions"] == 18
    assert found["kl"]["kl/k1"] == pytest.approx(0.0, abs=1e-5)
    assert "kl/k3" in capsys.readouterr().err


def test_average_tests_the_paths_and_saves_the_mean_of_the_best(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    names = ["near", "opposite", "scalar", "other"]
    command = (
        f"average --reward_model {' '.join('{f}/' + name for name in names)} --best 3 --selection "
        "{f}/preferences.jsonl --preferences {f}/agreed.jsonl --force True --output_dir {f}/mean"
    )
    assert run(command, folder) == 0, capsys.readouterr().err
    printed = " ".join(capsys.readouterr().err.split())
    assert "mean of all" in printed
    summary = numbers_at(folder, "mean/summary.json")
    assert summary["command"] == "average"
    numbers = summary["metrics"]
    rows = load_preferences(folder / "preferences.jsonl").rows
    models = {n: RewardModel.from_pretrained(folder / n, device="cpu") for n in names}
    accuracies = {n: evaluate_preferences(models[n], rows)["accuracy"] for n in names}
    assert numbers["selection_accuracy"] == {
        str(folder / n): pytest.approx(a) for n, a in accuracies.items()
    }
    chosen = sorted(names, key=lambda n: -accuracies[n])[:3]
    assert numbers["members"] == [str(folder / n) for n in chosen]
    average = RewardModel.from_pretrained(folder / "mean" / "model", device="cpu")
    expected = average_weights([models[n] for n in chosen])
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], weight, atol=0, rtol=0)
    # Its scale is that of the preferences' own completions.
    agreed = load_preferences(folder / "agreed.jsonl").rows
    rewards = average.score(*own_completions(agreed), normalise=True).mean
    assert (rewards.mean().item(), rewards.std(correction=0).item()) == pytest.approx(
        (0, 1), abs=1e-4
    )
    # A scalar model is evaluated by its logits all the same.
    evaluate = "evaluate --reward_model {f}/mean/model --preferences made {f}/agreed.jsonl "
    assert run(evaluate + "--output {f}/mean/evaluation.json", folder) == 0
    logits = average.score(*own_completions(agreed), normalise=False).mean
    found = numbers_at(folder, "mean/evaluation.json")["made"]
    assert found["margin"] == pytest.approx((logits[0::2] - logits[1::2]).mean().item(), rel=1e-4)
    table = numbers_at(folder, "mean/table.json")
    assert len(table["rows"]) == 2 * 5 + 1
    assert [row[1] for row in table["rows"][:5]] == ["0", "0.25", "0.5", "0.75", "1"]
    assert (folder / "mean" / "paths.png").stat().st_size > 1000
    assert run("report --folder {f}/mean", folder) == 0
    assert "mean of all" in (folder / "mean" / "report.html").read_text()
    assert run(command, folder) == 0
    assert "is finished" in capsys.readouterr().err


def test_a_barrier_is_refused_until_it_is_forced(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = (
        "average --reward_model {f}/scalar {f}/opposite --preferences {f}/agreed.jsonl "
        "--output_dir {f}/apart"
    )
    assert run(command, folder) == 2
    assert (folder / "apart" / "paths.png").exists()
    assert not (folder / "apart" / "model").exists()
    capsys.readouterr()
    assert run(command + " --force True", folder) == 0, capsys.readouterr().err
    assert "There is a barrier between" in " ".join(capsys.readouterr().err.split())
    numbers = numbers_at(folder, "apart/summary.json")["metrics"]
    assert numbers["forced"] is True
    assert "below the line" in numbers["barrier"]
    assert numbers["lowest_gap"] == {str(folder / "opposite"): -0.5}
    assert (numbers["accuracy"], numbers["accuracy_of_members"]) == (0.5, 1.0)
    assert (folder / "apart" / "model" / "config.json").exists()
    tested = command.replace("apart", "tested") + " --test_only True"
    assert run(tested, folder) == 0
    assert numbers_at(folder, "tested/summary.json")["metrics"]["forced"] is False
    assert not (folder / "tested" / "model").exists()


def test_an_average_without_preferences_says_that_it_is_not_tested(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    listing = {"members": ["../near", "../scalar"]}
    (folder / "pair").mkdir()
    (folder / "pair" / "ensemble.json").write_text(json.dumps(listing))
    command = "average --reward_model {f}/pair {f}/other --output_dir {f}/untested"
    assert run(command + " --reference {f}/to_score.jsonl", folder) == 0
    assert "was not tested" in capsys.readouterr().err
    numbers = numbers_at(folder, "untested/summary.json")["metrics"]
    assert numbers["tested"] is False
    assert [Path(name).name for name in numbers["members"]] == ["near", "scalar", "other"]
    average = RewardModel.from_pretrained(folder / "untested" / "model", device="cpu")
    rows = [json.loads(line) for line in (folder / "to_score.jsonl").read_text().splitlines()]
    given = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    assert average.score(*given, normalise=True).mean.mean().item() == pytest.approx(0, abs=1e-5)


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
