"""Gao et al.'s protocol on files: the shared models are trained once, and the gold model judges."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trueward.data.formats import load_preferences
from trueward.data.rows import Completion, prompt_key, text_of
from trueward.data.sources import DataError, write_jsonl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.lab.gold_model import (
    GoldModelWorld,
    OpenGoldModel,
    beginning_that_fits,
    load_world_data,
)
from trueward.lab.worlds import Annotator, LanguageDials, LanguageWorld
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.models.scratch import ModelSource
from trueward.testing import tiny_backbone, tiny_preferences, tiny_texts, tiny_tokenizer
from trueward.train.reward import RewardConfig
from trueward.train.sft import SFTConfig

TINY = ModelSource(vocab_size=300, hidden_size=16, layers=1, heads=2, max_positions=192)
SURE = Annotator(label_noise=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations as strings, preferences as conversations, some rows of no use."""
    root = tmp_path_factory.mktemp("data")
    prompts, answers = tiny_texts(70, seed=1), tiny_texts(70, seed=2)
    demonstrations = [{"prompt": p, "completion": a} for p, a in zip(prompts, answers, strict=True)]
    demonstrations.append({"prompt": "the " * 200, "completion": "cat ."})
    write_jsonl(root / "demos" / "train.jsonl", demonstrations)
    for name, count in (("people", 60), ("machine", 90)):
        rows = [
            {
                "prompt": [{"role": "user", "content": p}],
                "chosen": [{"role": "assistant", "content": c}],
                "rejected": [{"role": "assistant", "content": r}],
            }
            for p, c, r in tiny_preferences(count, seed=count)
        ]
        rows.append({**rows[0], "rejected": rows[1]["rejected"], "tie": True})
        overlong = [{"role": "assistant", "content": "xyz " * 200}]
        rows += [{**rows[i], "chosen": overlong} for i in range(20)]
        write_jsonl(root / name / "train.jsonl", rows)
    return root


@pytest.fixture(scope="module")
def world(files: Path) -> GoldModelWorld:
    return GoldModelWorld(
        demonstrations="demos",
        preferences={"people": "people:train", "machine": "machine:train"},
        data_dir=str(files),
        held_out=0.25,
        policy=TINY,
        gold_backbone=replace(TINY, hidden_size=24),
        sft=SFTConfig(learning_rate=1e-2, epochs=2.0, batch_size=16),
        gold=RewardConfig(learning_rate=2e-2, epochs=3.0, batch_size=16, max_length=128),
        max_prompt_tokens=96,
        max_new_tokens=8,
        annotator=SURE,
    )


@pytest.fixture(scope="module")
def shared(world: GoldModelWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    world.build_shared(folder)
    return folder


@pytest.fixture(scope="module")
def opened(world: GoldModelWorld, shared: Path) -> OpenGoldModel:
    world.build(shared, shared / "unused", seed=0)
    assert not (shared / "unused").exists()  # all seeds share the policy
    return world.open(shared, shared / "unused")


def test_it_is_a_world_of_language_and_its_dials_have_defaults(opened: OpenGoldModel):
    assert isinstance(GoldModelWorld(), LanguageDials)
    assert isinstance(opened, LanguageWorld)
    assert isinstance(opened.policy, Policy)
    assert opened.max_new_tokens == 8
    assert GoldModelWorld().annotator.label_noise == 0.25


def test_prompts_are_drawn_without_replacement_and_held_out_ones_apart(
    opened: OpenGoldModel, shared: Path
):
    counts = json.loads((shared / "prompts" / "summary.json").read_text())["metrics"]
    assert counts["training"] + counts["held_out"] == 70  # the long one is left out
    assert 8 <= counts["held_out"] <= 28
    sides = {}
    for held_out, name in ((False, "training"), (True, "held_out")):
        drawn = opened.prompts(counts[name], seed=1, held_out=held_out)
        sides[name] = {prompt_key(p) for p in drawn}
        assert len(sides[name]) == counts[name]
        some = opened.prompts(5, seed=1, held_out=held_out)
        assert some == opened.prompts(5, seed=1, held_out=held_out)
        assert some != opened.prompts(5, seed=2, held_out=held_out)
    assert not sides["training"] & sides["held_out"]
    with pytest.raises(ValueError, match=f"999 held-out prompts .* there are {counts['held_out']}"):
        opened.prompts(999, seed=0, held_out=True)
    with pytest.raises(ValueError, match=f"999 training prompts .* are {counts['training']}"):
        opened.prompts(999, seed=0)


def test_the_policy_has_learned_no_demonstration_of_a_held_out_prompt(
    world: GoldModelWorld, opened: OpenGoldModel
):
    data = load_world_data(world)
    learned = {prompt_key(row.prompt) for row in data.demonstrations.rows}
    held_out = {prompt_key(p) for p in opened.built.held_out}
    assert held_out
    assert not learned & held_out
    assert data.demonstrations.report.counts()["held out"] >= len(held_out)
    assert data.demonstrations.report.kept == len(data.demonstrations.rows)


def test_the_gold_model_learns_no_preference_that_it_is_measured_on(world: GoldModelWorld):
    data = load_world_data(world)
    for name, count in (("people", 60), ("machine", 90)):
        training, held_out = (
            {prompt_key(row.prompt) for row in side[name]}
            for side in (data.preferences, data.held_out)
        )
        assert training
        assert held_out
        assert not training & held_out
        assert len(data.preferences[name]) + len(data.held_out[name]) == count + 20


def test_a_count_draws_preferences_at_random(world: GoldModelWorld):
    data = load_world_data(replace(world, preferences_count=12))
    for name, report in zip(("people", "machine"), data.reports, strict=True):
        rows = [*data.preferences[name], *data.held_out[name]]
        lines = sorted(int(row.where.rpartition(":")[2]) for row in rows)
        assert len(lines) == 12
        assert lines[-1] > 30  # not the first twelve
        assert "(12 of the usable rows are drawn)" in report.source


def test_gold_is_standardised_on_the_references_answers(opened: OpenGoldModel):
    model = opened.built.gold_model
    prompts = opened.built.training[:128]
    answers = opened.answers(prompts, n=2, seed=opened.dials.seed)
    gold = opened.gold([p for p in prompts for _ in "ab"], [a for some in answers for a in some])
    assert gold.shape == (2 * len(prompts),)
    assert gold.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert gold.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    raw = model.score([prompts[0]], [answers[0][0]], normalise=False).means[0]
    scaled = (raw - model.reward_mean) / model.reward_std
    assert gold[0].item() == pytest.approx(scaled.item(), abs=1e-4)


def test_the_gold_model_knows_the_real_preferences_and_the_file_says_how_well(
    world: GoldModelWorld, opened: OpenGoldModel, shared: Path
):
    found = json.loads((shared / "gold" / "evaluation.json").read_text())
    held_out = load_world_data(world).held_out
    model = opened.built.gold_model
    fitting = [
        row for rows in held_out.values() for row in rows if model.fits(row.prompt, row.chosen)
    ]
    expected = evaluate_preferences(model.score, fitting)
    assert found["all/pairs"] == len(fitting) == found["people/pairs"] + found["machine/pairs"]
    assert found["all/overlong"] == sum(map(len, held_out.values())) - len(fitting) > 0
    for key in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_longer"):
        assert found[f"all/{key}"] == pytest.approx(expected[key], abs=1e-6)
    # The chosen side says "cat cat": a model sees that, and so does its length.
    assert found["all/accuracy"] > 0.8
    assert 0.5 < found["all/accuracy_longer"] <= 1.0
    assert -1 <= found["reference/length_spearman"] <= 1


def test_rows_of_no_use_are_listed(shared: Path):
    told = (shared / "gold" / "data.txt").read_text()
    assert told.count("1 tie (") == 2
    assert "over-long" in told
    pairs = json.loads((shared / "gold" / "summary.json").read_text())["metrics"]
    assert (
        pairs["overlong_pairs"]
        + json.loads((shared / "gold" / "evaluation.json").read_text())["all/overlong"]
        == 40
    )
    assert "1 over-long" in (shared / "prompts" / "data.txt").read_text()
    assert "held out" in (shared / "reference" / "data.txt").read_text()


def test_comparisons_without_noise_are_golds_and_can_be_read_from_a_file(
    opened: OpenGoldModel, tmp_path: Path
):
    prompts = opened.prompts(24, seed=0)
    answers = opened.answers(prompts, n=2, seed=0)
    rows = opened.comparisons(prompts, answers, seed=0)
    assert len(rows) >= 20
    for row in rows:
        chosen, rejected = opened.gold([row.prompt] * 2, [row.chosen, row.rejected]).tolist()
        assert chosen > rejected
    file = tmp_path / "rows.jsonl"
    write_jsonl(
        file,
        [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows],
    )
    loaded = load_preferences(file)
    assert [r.prompt for r in loaded.rows] == [r.prompt for r in rows]
    # As messages or as text, an answer is worth the same.
    texts = opened.gold([r.prompt for r in rows], [text_of(r.chosen) for r in rows])
    torch.testing.assert_close(
        texts, opened.gold([r.prompt for r in rows], [r.chosen for r in rows])
    )


def test_a_quarter_of_the_labels_is_flipped_once_for_all(opened: OpenGoldModel):
    prompts = [*opened.built.training, *opened.built.held_out] * 4
    rng = random.Random(0)
    texts = tiny_texts(2 * len(prompts), seed=7)
    answers = [rng.sample(texts, 2) for _ in prompts]
    noisy = replace(opened, dials=replace(opened.dials, annotator=Annotator(label_noise=0.25)))

    def chosen(world: OpenGoldModel, seed: int) -> list[Completion]:
        return [row.chosen for row in world.comparisons(prompts, answers, seed=seed)]

    sure, first = chosen(opened, 3), chosen(noisy, 3)
    assert first == chosen(noisy, 3) != chosen(noisy, 4)
    assert sure == chosen(opened, 4)
    flipped = sum(a != b for a, b in zip(sure, first, strict=True)) / len(sure)
    assert flipped == pytest.approx(0.25, abs=0.08)  # 280 pairs: three standard errors


def test_nothing_is_to_compare_in_no_answers(opened: OpenGoldModel):
    assert opened.comparisons([], [], seed=0) == []


def test_an_answer_too_long_for_the_gold_model_is_scored_by_its_beginning(opened: OpenGoldModel):
    model = opened.built.gold_model
    prompt = opened.prompts(1, seed=0)[0]
    long = "xyz " * 400
    assert not model.fits(prompt, long)
    beginning = beginning_that_fits(model, prompt, long)
    assert long.startswith(beginning)
    assert len(beginning) > 100
    assert model.fits(prompt, beginning)
    short = "the cat ."
    assert beginning_that_fits(model, prompt, short) == short
    expected = opened.gold([prompt] * 2, [beginning, short])
    torch.testing.assert_close(opened.gold([prompt] * 2, [long, short]), expected)


def test_equivalence_is_calibrated_on_unrelated_answers(opened: OpenGoldModel):
    prompts = opened.prompts(30, seed=0)
    answers = [[text] for text in tiny_texts(30, seed=5)]
    equivalent = opened.equivalence(answers)
    firsts = [some[0] for some in answers]
    assert equivalent(prompts, firsts, firsts) == [True] * 30
    pairs = [(i, j) for i in range(30) for j in range(i)]
    close = equivalent(
        [prompts[0]] * len(pairs), [firsts[i] for i, _ in pairs], [firsts[j] for _, j in pairs]
    )
    assert sum(close) / len(close) == pytest.approx(0.05, abs=0.02)


def test_what_is_trained_is_not_trained_again(world: GoldModelWorld, shared: Path):
    def times() -> dict[Path, int]:
        files = [f for f in shared.rglob("*") if f.is_file() and "prompts" not in f.parts]
        return {f: f.stat().st_mtime_ns for f in files}

    before = times()
    assert {"reference", "gold_language_model", "gold"} <= {
        f.relative_to(shared).parts[0] for f in before
    }
    world.build_shared(shared)
    assert times() == before
    with pytest.raises(DataError, match=r"held_out=0\.25, this one has held_out=0\.5"):
        replace(world, held_out=0.5).build_shared(shared)


def test_a_build_that_was_killed_goes_on_after_its_last_stage(
    world: GoldModelWorld, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class KilledError(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("trueward.lab.gold_model.train_reward", killed)
        with pytest.raises(KilledError):
            world.build_shared(tmp_path)
    weights = tmp_path / "reference" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    with pytest.raises(DataError, match="holds no finished gold model: run build_shared there"):
        world.open(tmp_path, tmp_path)
    world.build_shared(tmp_path)
    assert weights.stat().st_mtime_ns == before
    for name in ("reference", "gold"):  # with the weights of an unbroken build
        one, other = (
            (folder / name / "model" / "model.safetensors").read_bytes()
            for folder in (tmp_path, shared)
        )
        assert one == other


def test_models_are_read_once_and_again_once_built_anew(
    world: GoldModelWorld, shared: Path, opened: OpenGoldModel
):
    assert world.open(shared, shared).built is opened.built
    summary = shared / "gold" / "summary.json"
    summary.write_text(summary.read_text())
    assert world.open(shared, shared).built is not opened.built


def test_a_pretrained_gold_body_is_trained_without_a_language_model_before(
    world: GoldModelWorld, tmp_path: Path
):
    body = tmp_path / "encoder"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None  # encoders have none
    tiny_backbone("bert", vocab_size=len(tokenizer), max_positions=128).save_pretrained(body)
    tokenizer.save_pretrained(body)
    dials = replace(world, gold_backbone=ModelSource(path=str(body)))
    dials.build_shared(tmp_path / "shared")
    assert not (tmp_path / "shared" / "gold_language_model").exists()
    model = RewardModel.from_pretrained(tmp_path / "shared" / "gold" / "model")
    assert model.backbone.config.model_type == "bert"
    opened = dials.open(tmp_path / "shared", tmp_path)
    gold = opened.gold(opened.prompts(2, seed=0), ["the cat .", "the dog ."])
    assert gold.isfinite().all()


def test_prompts_may_come_from_another_source(world: GoldModelWorld, tmp_path: Path):
    write_jsonl(tmp_path / "asked.jsonl", [{"prompt": t} for t in tiny_texts(40, seed=9)])
    dials = replace(world, prompts=str(tmp_path / "asked.jsonl"), prompts_count=30)
    data = load_world_data(dials)
    assert [text_of(r.prompt) for r in data.prompts.rows] == tiny_texts(40, seed=9)[:30]
    assert (
        len(data.demonstrations.rows)
        + len([p for p in data.demonstrations.report.problems if p.kind == "held out"])
        == 71
    )
    assert len(load_world_data(replace(world, demonstrations_count=20)).demonstrations.rows) <= 20


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"demonstrations": ""}, "gold_model.demonstrations names no data: give a file"),
        ({"preferences": {}}, "gold_model.preferences names no data: give a file"),
        ({"demonstrations": "absent"}, "'absent' is neither a path that exists nor a hub name"),
        ({"preferences": {"a": "people:test"}}, "people has no such split"),
        ({"data_dir": "nowhere"}, "data_dir names 'nowhere', which is not a folder"),
        ({"held_out": 1e-9}, r"no held-out pair is left at held_out=1e-09"),
        ({"max_new_tokens": 150}, "are more than the 192 tokens that the model reads"),
        ({"max_prompt_tokens": 1}, "Of 0 usable prompts 0 are for training"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(
    world: GoldModelWorld, tmp_path: Path, dials: dict, message: str
):
    with pytest.raises(DataError, match=message) as error:
        replace(world, **dials).build_shared(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"held_out": 0.0}, r"held_out is a share in \(0, 1\), got 0.0"),
        ({"prompts_count": -1}, r"prompts_count must be at least 0 \(all\), got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_dials_that_mean_nothing_are_refused(dials: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GoldModelWorld(**dials)
