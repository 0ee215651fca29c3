"""A frozen encoder under a trained trunk: what is computed once, shared, trained and saved."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from trueward.data.formats import DataError, PreferenceRow
from trueward.models.reward_model import RewardModel
from trueward.models.sentence_backbone import (
    SentenceBackbone,
    sentence_backbone,
    sentence_embedding,
)
from trueward.testing import tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.reward import RewardConfig, train_reward

PROMPTS = [[{"role": "user", "content": text}] for text in tiny_texts(4)]
ANSWERS = tiny_texts(4, seed=9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
    )
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make(encoder: Path, **options: int) -> RewardModel:
    backbone, tokenizer = sentence_backbone(encoder, hidden_size=8, **options)
    return RewardModel.from_backbone(backbone, tokenizer)


def inner(model: RewardModel) -> SentenceBackbone:
    assert isinstance(model.backbone, SentenceBackbone)
    return model.backbone


def test_without_a_trunk_the_state_is_the_normalised_mean_of_the_encoders_states(
    encoder: Path,
) -> None:
    model = make(encoder, layers=0)
    reward = model.score(PROMPTS, ANSWERS, normalise=False).means[:, 0]
    bert = BertModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = model.tokenize(prompt, answer)
        whole = torch.tensor([[*ids.prompt_ids, *ids.completion_ids]])
        with torch.no_grad():
            mean = bert(whole).last_hidden_state[0].mean(0)
        state = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
        assert model.head is not None
        expected = model.head(state).means.item()
        assert reward[i].item() == pytest.approx(expected, abs=1e-5)


def test_a_text_is_embedded_once_whatever_batch_it_stands_in(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(encoder)
    first = model.score(PROMPTS, ANSWERS).means

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(inner(model).encoder, "forward", refuse)
    # Equal up to the trunk's rounding, which does depend on the batch.
    torch.testing.assert_close(model.score(PROMPTS, ANSWERS, batch_size=1).means, first)


def test_embeddings_are_kept_in_a_file_for_other_models(encoder: Path, tmp_path: Path) -> None:
    model = make(encoder)
    before = model.score(PROMPTS, ANSWERS).means
    inner(model).save_embeddings(tmp_path / "store", name="some")
    again = make(encoder)
    inner(again).load_embeddings(tmp_path / "store")
    assert inner(again).embeddings.keys() == inner(model).embeddings.keys()
    inner(again).encoder.forward = None  # type: ignore[method-assign, assignment]
    assert torch.equal(again.score(PROMPTS, ANSWERS).means, before)


def test_the_trunk_learns_and_the_encoder_does_not(encoder: Path) -> None:
    model = make(encoder)
    frozen = copy.deepcopy(inner(model).encoder.state_dict())
    trunk = inner(model).trunk[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    model.train()
    assert not inner(model).encoder.training
    rows = [PreferenceRow(*row) for row in tiny_preferences(8)]
    train_reward(model, rows, RewardConfig(learning_rate=1e-2, batch_size=4, progress=False))
    after = inner(model).encoder.state_dict()
    assert all(torch.equal(after[key], frozen[key]) for key in frozen)
    assert not torch.equal(inner(model).trunk[0].weight, trunk)
    inner(model).requires_grad_(True)
    assert not any(p.requires_grad for p in inner(model).encoder.parameters())


def test_copies_share_encoder_and_embeddings_and_own_their_trunk(encoder: Path) -> None:
    model = make(encoder)
    twin = copy.deepcopy(model)
    assert inner(twin).encoder is inner(model).encoder
    assert inner(twin).embeddings is inner(model).embeddings
    assert inner(twin).trunk[0] is not inner(model).trunk[0]
    with torch.no_grad():
        inner(twin).trunk[0].weight.zero_()  # type: ignore[union-attr, operator]
    assert not torch.equal(twin.score(PROMPTS, ANSWERS).means, model.score(PROMPTS, ANSWERS).means)


def test_a_saved_model_is_read_again_with_its_encoder(encoder: Path, tmp_path: Path) -> None:
    model = make(encoder)
    model.save_pretrained(tmp_path / "model")
    again = RewardModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.score(PROMPTS, ANSWERS).means, model.score(PROMPTS, ANSWERS).means)


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No sentence encoder could be read from"):
        sentence_backbone(tmp_path)


def test_texts_are_embedded_alone_and_kept_with_the_others(encoder: Path) -> None:
    backbone, tokenizer = sentence_backbone(encoder, layers=0)
    embed = sentence_embedding(backbone, tokenizer, max_length=16)
    texts = [*ANSWERS, ANSWERS[0]]
    found = embed(texts)
    bert = BertModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=16).input_ids
        with torch.no_grad():
            wanted = bert(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-5)
    assert len(backbone.embeddings) == len(set(ANSWERS))


def test_members_of_a_lora_ensemble_have_adapters_on_the_trunk(
    encoder: Path, tmp_path: Path
) -> None:
    backbone, tokenizer = sentence_backbone(encoder, hidden_size=8, layers=2)
    model = RewardModel.from_backbone(
        backbone, tokenizer, lora_members=3, lora_rank=2, lora_layers=1.0
    )
    assert model.lora is not None
    assert len(model.lora.adapters) == 2  # both layers of the trunk, none of the encoder
    frozen = copy.deepcopy(inner(model).trunk.state_dict())
    rows = [PreferenceRow(*row) for row in tiny_preferences(8)]
    train_reward(model, rows, RewardConfig(learning_rate=1e-2, batch_size=4, progress=False))
    assert all(torch.equal(frozen[k], v) for k, v in inner(model).trunk.state_dict().items())
    means = model.score(PROMPTS, ANSWERS, normalise=False).means
    assert means.shape == (4, 3)
    # Each member by hand: the trunk with its low-rank part merged, then its own head.
    for member in range(3):
        alone = make(encoder, layers=0)
        ids = [model.tokenize(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        for i, one in enumerate(ids):
            whole = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
            state = inner(alone).norm(inner(alone).embed(whole, torch.ones_like(whole)))
            adapters = model.lora.adapters.values()
            for layer, adapter in zip(inner(model).trunk, adapters, strict=True):
                low = adapter.scale * adapter.b[member] @ adapter.a[member]  # type: ignore[operator, index]
                state = torch.nn.functional.gelu(state @ (layer.weight + low).T + layer.bias)  # type: ignore[union-attr, operator]
            reward = (state[0] * model.head.weight[member]).sum()  # type: ignore[union-attr, index]
            torch.testing.assert_close(means[i, member], reward, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "model")
    again = RewardModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.score(PROMPTS, ANSWERS, normalise=False).means, means)
