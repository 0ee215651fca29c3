import pytest
import torch
from transformers import AutoModelForSequenceClassification

from trueward.testing import (
    random_groups,
    tiny_backbone,
    tiny_classifier,
    tiny_config,
    tiny_language_model,
    tiny_preferences,
    tiny_texts,
    tiny_tokenizer,
)

MODEL_TYPES = ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neo", "opt", "gpt_neox"]


def test_the_tokenizer_has_distinct_special_tokens_and_reads_any_text() -> None:
    tokenizer = tiny_tokenizer()
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)  # as in tiny_config
    assert len(tokenizer) == 320 == tiny_config().vocab_size
    for text in ("the cat sees", "Ünïcode ☂ \n\t<x>", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("the cat").input_ids) < len("the cat")


def test_the_tokenizer_is_the_same_each_time() -> None:
    assert tiny_tokenizer().get_vocab() == tiny_tokenizer().get_vocab()


def test_the_chat_template_appends_and_closes_with_eos() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "s\n\n### Instruction:\nq\n\n### Response:"
    answered = [*messages, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt}a<eos>"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_takes_the_common_names(model_type: str) -> None:
    config = tiny_config(model_type, hidden_size=16, layers=1, heads=2, max_positions=40)
    assert config.hidden_size == 16
    assert config.num_hidden_layers == 1
    assert config.num_attention_heads == 2
    assert config.max_position_embeddings == 40
    model = tiny_language_model(model_type, hidden_size=16, layers=1, heads=2, max_positions=40)
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 320)
    assert sum(p.numel() for p in model.parameters()) < 40_000
    assert not model.training


def test_models_depend_on_their_seed_alone() -> None:
    for make in (tiny_language_model, tiny_backbone, tiny_classifier):
        torch.manual_seed(1)
        first = make(seed=3).state_dict()
        torch.manual_seed(2)
        again, other = make(seed=3).state_dict(), make(seed=4).state_dict()
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_classifier_has_one_label(model_type: str) -> None:
    classifier = tiny_classifier(model_type)
    assert classifier.config.num_labels == 1
    assert type(classifier) in AutoModelForSequenceClassification._model_mapping.values()
    assert classifier(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 1)


def test_texts_have_the_lengths_asked_for() -> None:
    texts = tiny_texts(200, words=(2, 4))
    assert {len(t.split()) for t in texts} == {2, 3, 4}
    assert texts == tiny_texts(200, words=(2, 4))
    assert texts != tiny_texts(200, words=(2, 4), seed=1)


def test_the_chosen_side_says_cat_more_often() -> None:
    rows = tiny_preferences(50)
    assert len(rows) == 50
    assert rows == tiny_preferences(50)
    counts = [(c.split().count("cat"), r.split().count("cat")) for _, c, r in rows]
    assert sum(c for c, _ in counts) >= sum(r for _, r in counts) + 60
    assert all(c >= 2 for c, _ in counts)


def test_groups_have_the_lengths_asked_for_and_no_special_ids() -> None:
    groups = random_groups(8, prompts=[4, 1], completions=[[2, 3], [1]])
    assert [(len(p), [len(c) for c in cs]) for p, cs in groups] == [(4, [2, 3]), (1, [1])]
    many = random_groups(8, prompts=[500], completions=[[500]])
    assert set(many[0][0]) == {3, 4, 5, 6, 7}
    with pytest.raises(ValueError, match="argument"):
        random_groups(8, prompts=[4], completions=[[1], [1]])
