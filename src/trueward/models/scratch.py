"""Where a language model comes from: a folder, the hub, or random weights."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trueward.models.policy import Policy

logger = logging.getLogger(__name__)

# AlpacaFarm's wording; the completion follows "### Response:" with no separator.
ALPACA_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "{% else %}### Response:{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}### Response:{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A language model by name, or the shape of a new Llama-like one."""

    path: str = ""  # folder or hub id; empty makes a new model of the shape below
    vocab_size: int = 4096  # of a byte-level BPE tokenizer trained on the texts at hand
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    max_positions: int = 1024  # tokens
    lora_rank: int = 0  # 0 = train all weights; a new model is trained whole before it gets any

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of heads ({self.heads})."
            )


def load_policy(source: ModelSource, texts: Iterable[str], *, seed: int) -> Policy:
    """Load the policy that the source names, or make one with a tokenizer from `texts`."""
    if source.path:
        return Policy.from_pretrained(source.path, lora_rank=source.lora_rank)
    tokenizer = train_bpe_tokenizer(
        texts, vocab_size=source.vocab_size, model_max_length=source.max_positions
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=source.hidden_size,
        intermediate_size=4 * source.hidden_size,
        num_hidden_layers=source.layers,
        num_attention_heads=source.heads,
        num_key_value_heads=source.heads,
        max_position_embeddings=source.max_positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    policy = Policy(LlamaForCausalLM(config), tokenizer)
    logger.info(
        "New model of %.1f M parameters.", sum(p.numel() for p in policy.parameters()) / 1e6
    )
    return policy


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
