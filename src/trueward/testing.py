"""Tiny offline models, tokenizers and preferences, for our tests and for yours.

Nothing here is downloaded: the tokenizer is trained on the spot, the models have random weights.
"""

import random
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# One turn per line; the completion follows "### Response:" with no separator, as in AlpacaFarm.
ALPACA_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:{% endif %}"
)

_WORDS = (
    "the a red blue green big small cat dog bird house tree sees likes finds runs sleeps and but "
    "then quickly slowly today never always why what how tell me about please explain . ? !"
).split()


def train_bpe_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 4096, model_max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with distinct BOS, EOS and PAD tokens and a chat template.

    Pad and EOS differ on purpose: where they coincide, masks made from ids hide the EOS
    (https://arxiv.org/abs/2403.17031).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=model_max_length,
    )
    fast.chat_template = ALPACA_CHAT_TEMPLATE
    return fast


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
    pad_token_id: int = 0,
    bos_token_id: int = 1,
    eos_token_id: int = 2,
    **overrides: object,
) -> PreTrainedConfig:
    """Return a small configuration of any model type, under the names that the type uses."""
    # The configuration classes map the common names onto their own (n_embd, n_layer, ...).
    values: dict[str, object] = {
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
