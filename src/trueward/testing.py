"""Tiny offline models, tokenizers and preferences, for our tests and for yours.

Nothing here is downloaded: the tokenizer is trained on the spot, the models have random weights.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trueward.models.scratch import train_bpe_tokenizer

_WORDS = (  # noqa: SIM905
    "the a red blue green big small cat dog bird house tree sees likes finds runs sleeps and but "
    "then quickly slowly today never always why what how tell me about please explain . ? !"
).split()


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of about 320 tokens, trained on a few made sentences."""
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(_WORDS, k=12)) for _ in range(50)]
    return train_bpe_tokenizer(sentences, vocab_size=vocab_size)


def tiny_config(
    model_type: str = "llama",
    *,
    vocab_size: int = 320,
    hidden_size: int = 32,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 512,
    pad_token_id: int | None = 0,
    bos_token_id: int = 1,
    eos_token_id: int = 2,
    **overrides: Any,
) -> PreTrainedConfig:
    """Return a small configuration of any model type, under the names that the type uses."""
    # The configuration classes map the common names onto their own (n_embd, n_layer, ...).
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max_positions,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
    config_class = CONFIG_MAPPING[model_type]
    if model_type not in {"gpt2", "gpt_neo"}:
        values["intermediate_size"] = 4 * hidden_size
    if model_type in {"llama", "qwen2", "qwen3", "mistral", "gemma"}:
        values["num_key_value_heads"] = heads
        values["head_dim"] = hidden_size // heads
    if model_type == "gpt_neo":
        values |= {"attention_types": [[["global"], layers]]}
    if model_type == "opt":
        values |= {"ffn_dim": 4 * hidden_size, "word_embed_proj_dim": hidden_size}
    return config_class(**(values | overrides))


def tiny_language_model(
    model_type: str = "llama", *, seed: int = 0, **config: object
) -> PreTrainedModel:
    """Return a random causal language model, by default a 2-layer Llama of width 32."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type, **config))  # type: ignore[arg-type]
    return model.eval()


def tiny_backbone(model_type: str = "llama", *, seed: int = 0, **config: object) -> PreTrainedModel:
    """Return a random backbone without a head."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModel.from_config(tiny_config(model_type, **config))  # type: ignore[arg-type]
    return model.eval()


def tiny_classifier(
    model_type: str = "llama", *, seed: int = 0, **config: object
) -> PreTrainedModel:
    """Return a random one-label sequence classifier, as public reward models are published."""
    torch.manual_seed(seed)
    made = tiny_config(model_type, num_labels=1, **config)  # type: ignore[arg-type]
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(made)
    return model.eval()


def tiny_texts(count: int, *, seed: int = 0, words: tuple[int, int] = (3, 12)) -> list[str]:
    """Return made sentences of `words[0]` to `words[1]` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(*words))) for _ in range(count)]


def tiny_preferences(count: int, *, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return (prompt, chosen, rejected) triples; the chosen side says "cat" more often."""
    rng = random.Random(seed)
    rows = []
    for prompt in tiny_texts(count, seed=seed + 1):
        sides = [" ".join(rng.choices(_WORDS, k=8)) for _ in range(2)]
        rows.append((prompt, sides[0] + " cat cat", sides[1]))
    return rows


def random_groups(
    vocab_size: int, *, prompts: Sequence[int], completions: Sequence[Sequence[int]], seed: int = 0
) -> list[tuple[list[int], list[list[int]]]]:
    """Return (prompt ids, completions' ids) with the given lengths and random ids above 3."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(n)]

    return [
        (ids(p), [ids(n) for n in lengths]) for p, lengths in zip(prompts, completions, strict=True)
    ]
