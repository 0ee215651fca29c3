import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from trueward.data import DataError
from trueward.data.packing import Group, pack, pad
from trueward.models.heads import GaussianHeads, ScalarHead
from trueward.models.reward_model import RewardModel
from trueward.testing import (
    random_groups,
    tiny_backbone,
    tiny_classifier,
    tiny_language_model,
    tiny_preferences,
    tiny_texts,
)

DECODERS = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]
GROUPS = [
    Group(prompt, completions)
    for prompt, completions in random_groups(
        320, prompts=[7, 1, 12], completions=[[5, 1, 9], [4], [3, 8]]
    )
]
TEXTS = tiny_texts(6, seed=3)
PROMPTS = [TEXTS[0]] * 3 + [TEXTS[1]] + [TEXTS[0]] + [TEXTS[2]]
COMPLETIONS = [*tiny_texts(5, seed=4), "."]


def made(tokenizer: PreTrainedTokenizerFast, model_type: str = "llama", **options) -> RewardModel:
    return RewardModel.from_backbone(tiny_backbone(model_type), tokenizer, **options).eval()


def bert_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(" ".join(tiny_texts(99)).split()))]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def rows_of(model: RewardModel, prompts: list, completions: list) -> list[list[int]]:
    tokens = [model.tokenize(p, c) for p, c in zip(prompts, completions, strict=True)]
    return [[*t.prompt_ids, *t.completion_ids] for t in tokens]


def means_and_stds(posterior) -> torch.Tensor:
    parts = [posterior.means] + ([] if posterior.stds is None else [posterior.stds])
    return torch.cat(parts, 1)


@pytest.mark.parametrize("members", [0, 3])
@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_equals_unpacked_forward_and_gradients(
    tokenizer: PreTrainedTokenizerFast, model_type: str, members: int
) -> None:
    model = made(tokenizer, model_type, members=members)
    weights = torch.randn(6, 2 * members or 1, generator=torch.Generator().manual_seed(0))
    results = []
    for form in (pack, pad):
        model.zero_grad()
        out = means_and_stds(model(form(GROUPS, pad_id=0)))
        (out * weights).mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.detach(), gradients))
    (packed, packed_gradients), (padded, padded_gradients) = results
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    assert packed_gradients.keys() == padded_gradients.keys()
    assert len(packed_gradients) == len(list(model.parameters()))
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_score_is_the_head_on_the_last_tokens_state_of_the_plain_model(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type)
    expected = []
    for ids in rows_of(model, PROMPTS, COMPLETIONS):
        state = model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        expected.append(model.head.linear.weight[0] @ state)
    scores = model.score(PROMPTS, COMPLETIONS).means[:, 0]
    torch.testing.assert_close(scores, torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "overrides"), [("bert", {}), ("roberta", {}), ("mistral", {"sliding_window": 8})]
)
def test_backbones_that_cannot_share_prefixes_score_right(
    tokenizer: PreTrainedTokenizerFast,
    model_type: str,
    overrides: dict,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = RewardModel.from_backbone(tiny_backbone(model_type, **overrides), tokenizer)
    with caplog.at_level(logging.WARNING, logger="trueward"):
        scores = model.score(PROMPTS, COMPLETIONS).means[:, 0]
    assert "computed once for each completion" in caplog.text
    expected = [
        model.head.linear.weight[0]
        @ model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        for ids in rows_of(model, PROMPTS, COMPLETIONS)
    ]
    torch.testing.assert_close(scores, torch.stack(expected).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_score_does_not_depend_on_its_batch(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type, members=2)
    expected = means_and_stds(model.score(PROMPTS, COMPLETIONS))
    assert expected[:, 0].std() > 0.05  # the rows differ at all
    for options in (
        {"batch_size": 1},
        {"batch_size": 2},
        {"max_tokens": 1},
        {"max_tokens": 60},
        {"shared_prefix": False},
        {"shared_prefix": False, "batch_size": 4},
    ):
        again = means_and_stds(model.score(PROMPTS, COMPLETIONS, **options))
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5, msg=str(options))
    order = [4, 0, 5, 2, 1, 3]
    shuffled = model.score([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order])
    torch.testing.assert_close(means_and_stds(shuffled), expected[order], atol=1e-5, rtol=1e-5)
    alone = means_and_stds(model.score(PROMPTS[3:4], COMPLETIONS[3:4]))
    torch.testing.assert_close(alone, expected[3:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_a_score_does_not_depend_on_the_side_or_the_id_of_padding(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type)
    scores = model.score(PROMPTS, COMPLETIONS).means
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"
    torch.testing.assert_close(model.score(PROMPTS, COMPLETIONS).means, scores)
    tokenizer.pad_token = "cat"
    torch.testing.assert_close(model.score(PROMPTS, COMPLETIONS).means, scores)


def test_batches_stay_within_batch_size_and_max_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer)
    model.score(PROMPTS, COMPLETIONS)  # the check of the backbone is not counted
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.score(PROMPTS, COMPLETIONS, batch_size=2)
    assert sum(map(len, seen)) == 6
    assert max(map(len, seen)) == 2
    seen.clear()
    model.score(PROMPTS, COMPLETIONS, max_tokens=100)
    assert len(seen) > 1
    assert max(b.input_ids.numel() for b in seen) <= 100
    seen.clear()
    model.score(PROMPTS, COMPLETIONS)
    assert len(seen) == 2  # the longest row by itself: on a CPU padding costs more than a call
    assert sum(b.input_ids.shape[0] for b in seen) < 6  # completions of a prompt share a row


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_pooling_reads_the_last_real_token_though_pad_or_eos_ids_occur_inside(
    tokenizer: PreTrainedTokenizerFast, shared_prefix: bool
) -> None:
    model = made(tokenizer)
    prompts = ["the <pad> cat", "the <eos> cat", "the cat " * 9]
    completions = ["a <pad>", "a <eos> b", "a"]
    rows = rows_of(model, prompts, completions)
    assert [r[-1] for r in rows] == [tokenizer.eos_token_id] * 3
    assert rows[0][-2] == tokenizer.pad_token_id
    scores = model.score(prompts, completions, shared_prefix=shared_prefix).means[:, 0]
    for ids, score in zip(rows, scores, strict=True):
        state = model.backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(score, (model.head.linear.weight[0] @ state).detach())


def test_pad_is_made_distinct_from_eos_and_the_embeddings_grow(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    model = made(tokenizer)
    assert tokenizer.pad_token_id == 320
    assert model.backbone.get_input_embeddings().num_embeddings == 321
    assert model.score(["a"], ["b"]).means.isfinite().all()


def test_embeddings_wider_than_the_tokenizer_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    backbone = tiny_backbone(vocab_size=400)
    assert RewardModel.from_backbone(backbone, tokenizer)
    assert backbone.get_input_embeddings().num_embeddings == 400


def test_truncation_cuts_the_prompt_and_keeps_the_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer, max_length=12)
    prompt, completion = "red blue green big small " * 5, "dog bird"
    whole = RewardModel.from_backbone(tiny_backbone(), tokenizer).tokenize(prompt, completion)
    tokens = model.tokenize(prompt, completion)
    assert tokens.completion_ids == whole.completion_ids
    assert len(tokens.prompt_ids) + len(tokens.completion_ids) == 12
    assert tokens.prompt_ids == whole.prompt_ids[-len(tokens.prompt_ids) :]
    assert model.score([prompt], [completion]).means.isfinite().all()


def test_truncation_keeps_the_bos_and_an_encoders_cls(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    long = "red blue green big small " * 9
    assert made(tokenizer, max_length=12).tokenize(long, "dog").prompt_ids[0] == 1
    bert = RewardModel(
        tiny_classifier("bert", vocab_size=64), None, bert_tokenizer(), max_length=12
    )
    ids = bert.tokenize(long, "dog")
    assert ids.prompt_ids[0] == bert.tokenizer.cls_token_id
    assert bert.tokenizer.convert_ids_to_tokens(ids.completion_ids) == ["dog", "[SEP]"]


def test_a_completion_above_the_context_names_its_row(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer, max_length=8)
    with pytest.raises(DataError, match=r"^Row 2: a completion of \d+ tokens does not fit.* 8:"):
        model.score(["a", "a"], ["b", "red blue green " * 9])


def test_max_length_cannot_exceed_the_backbones_positions(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert made(tokenizer, max_length=9999).max_length == 512
    assert made(tokenizer, max_length=100).max_length == 100
    assert made(tokenizer).max_length == 512


def test_score_refuses_lists_of_different_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="1 prompts and 2 completions"):
        made(tokenizer).score(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        made(tokenizer).score(["a"], ["b"], batch_size=0)


@pytest.mark.parametrize("members", [0, 3])
def test_no_rows_give_an_empty_posterior_of_the_same_kind(
    tokenizer: PreTrainedTokenizerFast, members: int
) -> None:
    posterior = made(tokenizer, members=members).score([], [])
    assert posterior.means.shape == (0, max(members, 1))
    assert (posterior.stds is None) == (members == 0)


def test_messages_and_the_text_they_render_to_score_the_same(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer)
    message = [{"role": "user", "content": "what is the cat"}]
    answer = [{"role": "assistant", "content": "a dog"}]
    text = "### Instruction:\nwhat is the cat\n\n### Response:"
    scores = model.score([message, message, text], [answer, "a dog", "a dog"]).means[:, 0]
    assert scores.tolist() == pytest.approx([scores[0].item()] * 3, abs=1e-6)


def test_scoring_keeps_the_mode_and_makes_no_gradients(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer, members=2, head_dropout=0.5).train()
    first = model.score(PROMPTS, COMPLETIONS).means
    assert model.training
    assert not first.requires_grad
    assert torch.equal(first, model.score(PROMPTS, COMPLETIONS).means)  # no dropout in scores


def test_the_seed_alone_determines_the_head(tokenizer: PreTrainedTokenizerFast) -> None:
    weights = []
    for seed, noise in ((1, 5), (1, 6), (2, 6)):
        backbone = tiny_backbone()
        torch.manual_seed(noise)
        weights.append(
            RewardModel.from_backbone(backbone, tokenizer, members=2, seed=seed).head.linear.weight
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("members", [0, 2])
def test_head_and_rewards_are_float32_under_a_bf16_backbone(
    tokenizer: PreTrainedTokenizerFast, members: int
) -> None:
    backbone = tiny_backbone().bfloat16()
    model = RewardModel.from_backbone(backbone, tokenizer, members=members)
    assert model.head.linear.weight.dtype == torch.float32
    posterior = model(pack(GROUPS, pad_id=0).to("cpu", torch.bfloat16))
    assert posterior.means.dtype == torch.float32
    # A bf16 head would give bf16 numbers: its mantissa has 8 bits.
    assert not torch.equal(posterior.means, posterior.means.bfloat16().float())
    scores = model.score(PROMPTS, COMPLETIONS, normalise=False).means
    float32 = made(tokenizer, members=members).score(PROMPTS, COMPLETIONS, normalise=False).means
    torch.testing.assert_close(scores, float32, atol=0.05, rtol=0.05)


def test_negative_members_and_a_missing_tokenizer_are_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match=r"members must be 0 .scalar. or at least 1, got -1"):
        made(tokenizer, members=-1)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        RewardModel.from_backbone(tiny_backbone())


def test_normalisation_puts_members_on_one_scale(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer, members=3)
    raw = model.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(raw.means, model.score(PROMPTS, COMPLETIONS, normalise=False).means)
    model.set_normalisation(PROMPTS, COMPLETIONS)
    scaled = model.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(scaled.means.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.means.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(scaled.stds, raw.stds / raw.means.std(0, correction=0))
    # Measuring again measures the raw scores, not the scaled ones.
    before = model.reward_mean.clone()
    model.set_normalisation(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(model.reward_mean, before)


def test_a_scalar_model_gives_its_raw_logit_unless_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = made(tokenizer)
    raw = model.score(PROMPTS, COMPLETIONS).means
    model.set_normalisation(PROMPTS, COMPLETIONS)
    assert torch.equal(model.score(PROMPTS, COMPLETIONS).means, raw)
    scaled = model.score(PROMPTS, COMPLETIONS, normalise=True).means
    torch.testing.assert_close(scaled, (raw - raw.mean()) / raw.std(correction=0))


def test_a_scale_needs_two_samples(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="at least two reference samples that fit, got 1 of 1"):
        made(tokenizer).set_normalisation(["a"], ["b"])


def test_a_scalar_model_learns_to_prefer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = made(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    groups = []
    for prompt, chosen, rejected in tiny_preferences(16):
        tokens = [model.tokenize(prompt, side) for side in (chosen, rejected)]
        groups.append(Group(tokens[0].prompt_ids, [t.completion_ids for t in tokens]))
    batch = pack(groups, pad_id=0)
    for _ in range(15):
        chosen, rejected = model(batch).means[:, 0].unflatten(0, (16, 2)).unbind(1)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (chosen > rejected).all()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lora_trains_adapters_and_the_head_only(
    tokenizer: PreTrainedTokenizerFast, model_type: str
) -> None:
    model = made(tokenizer, model_type, members=2, lora_rank=2)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"head.linear.weight", "head.linear.bias"} <= trainable
    assert all("lora_" in n or n.startswith("head.") for n in trainable)
    assert any("lora_" in n for n in trainable)


# --- on disk -------------------------------------------------------------------------------------

IN_ANOTHER_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
from trueward.models.reward_model import RewardModel

root, job = sys.argv[1], json.loads(sys.argv[2])
scores = {}
for name in job["scalar"]:
    model = AutoModelForSequenceClassification.from_pretrained(f"{root}/{name}", num_labels=1)
    rows = job["ids"]
    width = max(map(len, rows))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape[1] == 1
    scores["transformers/" + name] = logits[:, 0].tolist()
for name in job["scalar"] + job["ours"]:
    model = RewardModel.from_pretrained(f"{root}/{name}")
    posterior = model.score(job["prompts"], job["completions"], normalise=False)
    scores["means/" + name] = posterior.means.tolist()
    if posterior.stds is not None:
        scores["stds/" + name] = posterior.stds.tolist()
        scores["scaled/" + name] = model.score(job["prompts"], job["completions"]).means.tolist()
    scores["max_length/" + name] = model.max_length
print(json.dumps(scores))
"""


def perturbed(model: RewardModel) -> RewardModel:
    """Move every trainable weight: fresh adapters and zero biases would hide a loss."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(trained_tokenizer, tmp_path_factory) -> tuple[Path, dict[str, RewardModel], dict]:
    """Models saved here, and what another process reads of them."""
    root = tmp_path_factory.mktemp("saved")
    made_of = {f"scalar-{m}": (m, {}) for m in DECODERS}
    made_of["lora"] = ("llama", {"lora_rank": 2})
    made_of["lora-gpt2"] = ("gpt2", {"lora_rank": 2})
    made_of["bf16"] = ("llama", {})
    made_of["gaussian"] = ("llama", {"members": 3, "head_dropout": 0.1, "max_length": 77})
    made_of["gaussian-one"] = ("gpt2", {"members": 1})
    made_of["gaussian-lora"] = ("opt", {"members": 2, "lora_rank": 2})
    made_of["scalar-bert"] = ("bert", {})
    kept = {}
    for name, (model_type, options) in made_of.items():
        backbone = tiny_backbone(model_type)
        if name == "bf16":
            backbone = backbone.bfloat16()
        model = RewardModel.from_backbone(backbone, trained_tokenizer, **options)
        kept[name] = perturbed(model).eval()
        kept[name].set_normalisation(PROMPTS, COMPLETIONS)
        kept[name].facts = {"training data": "made | up", "accuracy": 0.75}
        kept[name].save_pretrained(root / name)
    ours = [n for n in kept if n.startswith("gaussian") or n == "scalar-bert"]
    job = {
        "scalar": [n for n in kept if n not in ours],
        "ours": ours,
        "ids": rows_of(kept["lora"], PROMPTS, COMPLETIONS),
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(root), json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, kept, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", [f"scalar-{m}" for m in DECODERS] + ["lora", "lora-gpt2"])
def test_transformers_alone_reads_a_scalar_model_in_another_process(saved, name: str) -> None:
    _, models_, read = saved
    scores = models_[name].score(PROMPTS, COMPLETIONS).means
    for reader in ("transformers", "means"):
        theirs = torch.tensor(read[f"{reader}/{name}"]).view(6, 1)
        # Merging adds the adapter to the weights once, which rounds differently.
        tolerance = 1e-5 if name.startswith("lora") else 1e-6
        torch.testing.assert_close(theirs, scores, atol=tolerance, rtol=1e-6, msg=reader)


def test_a_bf16_backbone_is_read_with_the_same_scores(saved) -> None:
    _, models_, read = saved
    scores = models_["bf16"].score(PROMPTS, COMPLETIONS).means
    torch.testing.assert_close(torch.tensor(read["means/bf16"]), scores, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-one", "gaussian-lora", "scalar-bert"])
def test_other_heads_give_the_same_posterior_in_another_process(saved, name: str) -> None:
    _, models_, read = saved
    raw = models_[name].score(PROMPTS, COMPLETIONS, normalise=False)
    torch.testing.assert_close(torch.tensor(read[f"means/{name}"]), raw.means, atol=1e-6, rtol=1e-6)
    assert (f"stds/{name}" in read) == (raw.stds is not None)
    if raw.stds is not None:
        torch.testing.assert_close(
            torch.tensor(read[f"stds/{name}"]), raw.stds, atol=1e-6, rtol=1e-6
        )


def test_the_scale_of_the_members_survives(saved) -> None:
    root, models_, read = saved
    scaled = models_["gaussian"].score(PROMPTS, COMPLETIONS).means
    assert scaled.mean().abs() < 1e-5
    torch.testing.assert_close(torch.tensor(read["scaled/gaussian"]), scaled, atol=1e-5, rtol=1e-5)
    for name in ("gaussian", "scalar-llama"):
        again = RewardModel.from_pretrained(root / name)
        assert torch.equal(again.reward_mean, models_[name].reward_mean)
        assert torch.equal(again.reward_std, models_[name].reward_std)


def test_length_limit_facts_and_head_survive(saved) -> None:
    root, models_, read = saved
    assert read["max_length/gaussian"] == 77
    again = RewardModel.from_pretrained(root / "gaussian")
    assert again.facts == models_["gaussian"].facts
    assert isinstance(again.head, GaussianHeads)
    assert again.head.dropout.p == 0.1
    assert not again.training
    assert isinstance(RewardModel.from_pretrained(root / "lora").head, ScalarHead)


def test_a_folder_holds_safetensors_tokenizer_and_card_and_no_pickle(saved) -> None:
    root, _, _ = saved
    names = {p.name for p in (root / "scalar-llama").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not any(n.endswith((".bin", ".pt", ".pth", ".pkl")) for n in names)
    assert not any("adapter" in n for n in {p.name for p in (root / "lora").iterdir()})
    config = json.loads((root / "scalar-llama" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 0
    card = (root / "gaussian" / "README.md").read_text()
    assert "Gaussian heads (3)" in card
    assert "| accuracy | 0.75 |" in card
    assert "made \\| up" in card
    assert "Gaussian heads (1)" in (root / "gaussian-one" / "README.md").read_text()
    assert "One scalar reward" in (root / "scalar-llama" / "README.md").read_text()


def test_saving_leaves_the_model_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    model = perturbed(made(tokenizer, lora_rank=2))
    before = model.score(PROMPTS, COMPLETIONS).means
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    assert torch.equal(model.score(PROMPTS, COMPLETIONS).means, before)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_loaded_model_is_saved_and_loaded_again(saved, tmp_path) -> None:
    root, models_, _ = saved
    for name in ("scalar-gpt2", "gaussian", "scalar-bert"):
        RewardModel.from_pretrained(root / name).save_pretrained(tmp_path / name)
        again = RewardModel.from_pretrained(tmp_path / name)
        expected = models_[name].score(PROMPTS, COMPLETIONS).means
        torch.testing.assert_close(
            again.score(PROMPTS, COMPLETIONS).means, expected, atol=1e-5, rtol=1e-5
        )


def test_gaussian_heads_are_read_from_shards(tokenizer, tmp_path, monkeypatch) -> None:
    model = made(tokenizer, members=2)
    whole = type(model.backbone).save_pretrained
    monkeypatch.setattr(
        type(model.backbone),
        "save_pretrained",
        lambda self, path, **kw: whole(self, path, max_shard_size="40KB", **kw),
    )
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = RewardModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        again.score(PROMPTS, COMPLETIONS).means, model.score(PROMPTS, COMPLETIONS).means
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_a_published_decoder_classifier_scores_as_transformers_does(
    tokenizer: PreTrainedTokenizerFast, tmp_path, model_type: str
) -> None:
    theirs = tiny_classifier(model_type)
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = RewardModel.from_pretrained(tmp_path)
    expected = [
        theirs(input_ids=torch.tensor([ids])).logits[0]
        for ids in rows_of(ours, PROMPTS, COMPLETIONS)
    ]
    scores = ours.score(PROMPTS, COMPLETIONS).means
    torch.testing.assert_close(scores, torch.stack(expected).detach(), atol=1e-6, rtol=1e-5)


def test_a_published_encoder_classifier_scores_as_transformers_does(tmp_path) -> None:
    theirs = tiny_classifier("bert", vocab_size=64)
    theirs.save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    ours = RewardModel.from_pretrained(tmp_path)
    assert ours.head is None
    # One segment, closed by one [SEP]: what its own tokenizer makes of the joined text.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    joined = [f"{p} {c}" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = tokenizer(joined, padding=True, return_tensors="pt")
    expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for options in ({}, {"batch_size": 1}, {"max_tokens": 40}):
        scores = ours.score(PROMPTS, COMPLETIONS, **options).means
        torch.testing.assert_close(scores, expected.detach(), atol=1e-6, rtol=1e-5)
    ours.set_normalisation(PROMPTS, COMPLETIONS)
    ours.save_pretrained(tmp_path / "again")
    again = RewardModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.score(PROMPTS, COMPLETIONS).means, expected.detach())
    assert torch.equal(again.reward_std, ours.reward_std)


def test_a_published_classifier_without_a_pad_token_gets_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path
) -> None:
    theirs = tiny_classifier(pad_token_id=None)
    theirs.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    ours = RewardModel.from_pretrained(tmp_path)
    assert ours.tokenizer.pad_token_id not in (None, ours.tokenizer.eos_token_id)
    expected = [
        theirs(input_ids=torch.tensor([ids])).logits[0]
        for ids in rows_of(ours, PROMPTS, COMPLETIONS)
    ]
    torch.testing.assert_close(
        ours.score(PROMPTS, COMPLETIONS).means, torch.stack(expected).detach(), atol=1e-6, rtol=1e-5
    )


def test_a_published_pad_that_is_the_eos_is_told(
    tokenizer: PreTrainedTokenizerFast, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_classifier(pad_token_id=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="trueward"):
        RewardModel.from_pretrained(tmp_path)
    assert "pad token is its EOS" in caplog.text


def one_sentence(error: pytest.ExceptionInfo, path: Path) -> str:
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    return message


def test_two_labels_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    made_with_two = AutoModelForSequenceClassification.from_config(
        tiny_classifier().config.__class__(
            **(tiny_classifier().config.to_dict() | {"id2label": {0: "a", 1: "b"}})
        )
    )
    made_with_two.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has 2 labels where a reward model has one") as error:
        RewardModel.from_pretrained(tmp_path)
    one_sentence(error, tmp_path)


@pytest.mark.parametrize("overrides", [{}, {"num_labels": 1}])
def test_a_causal_language_model_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path, overrides: dict
) -> None:
    tiny_language_model(**overrides).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="reward model") as error:
        RewardModel.from_pretrained(tmp_path)
    assert "from_backbone" in one_sentence(error, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="No reward model could be read") as error:
        RewardModel.from_pretrained(tmp_path)
    one_sentence(error, tmp_path)
    with pytest.raises(DataError, match="No reward model could be read"):
        RewardModel.from_pretrained(tmp_path / "absent")


def test_from_backbone_reads_the_body_of_a_language_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path
) -> None:
    language_model = tiny_language_model(seed=5)
    language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.from_backbone(tmp_path, members=2)
    for name, weight in language_model.model.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    assert model.members == 2
