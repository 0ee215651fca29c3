"""The embedded world: a small language whose true reward is a formula.

A prompt asks about a topic ("tell me about the cat"); an answer is a few sentences over some forty
words. The gold reward likes an answer that names its topic, is warm, keeps to the grammar and to
two sentences; but each of these can be overdone. Answers of the reference policy rarely overdo
them, so a reward model that learns from comparisons of such answers sees only the rising side,
and extrapolates: the over-optimisation of Gao et al. 2022 (https://arxiv.org/abs/2210.10760) with
a gold reward that costs nothing to ask.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trueward.data.rows import Completion, DemonstrationRow, PreferenceRow, Prompt, text_of
from trueward.models.policy import Policy

TOPICS = ["cat", "dog", "bird", "fish", "horse", "king", "queen", "farmer", "baker", "child"]
THINGS = ["tree", "river", "house", "garden", "road"]
ADJECTIVES = ["big", "small", "old", "young", "red", "green"]
WARM = ["lovely", "kind", "gentle"]
VERBS = ["sees", "likes", "finds", "follows", "helps", "calls"]
ADVERBS = ["slowly", "gladly", "often"]
REQUESTS = ["tell me about the", "describe the"]
_NOUNS = {*TOPICS, *THINGS}
_DESCRIPTIONS = {*ADJECTIVES, *WARM}
_SPECIAL = ["<pad>", "<bos>", "<eos>"]


@dataclass(frozen=True, kw_only=True)
class GrammarWorld:
    """Prompts, answers, gold reward and comparisons of the embedded world.

    Dials: how the annotator errs (`label_noise`, `length_bias`), how often the demonstrations are
    warm or on topic (the coverage of the comparisons).
    """

    warmth: float = 0.12  # chance that a noun in a demonstration has a warm word
    focus: float = 0.35  # chance that a subject in a demonstration is the topic
    label_noise: float = 0.2  # share of comparisons whose label is flipped
    length_bias: float = 0.0  # added to the annotator's utility for each word

    def prompts(self, count: int, *, seed: int) -> list[str]:
        """Return requests about a topic described by up to two adjectives (about 860 differ)."""
        rng = random.Random(f"prompts {seed}")
        out = []
        for _ in range(count):
            adjectives = rng.sample(ADJECTIVES, rng.choice([0, 1, 1, 2, 2]))
            words = [rng.choice(REQUESTS), *adjectives, rng.choice(TOPICS), ":"]
            out.append(" ".join(words))
        return out

    def answer(self, prompt: str, rng: random.Random) -> str:
        """Return an answer as the demonstrations have it: grammatical, sometimes on topic."""
        topic = topic_of(prompt)
        sentences = [self._sentence(topic, rng) for _ in range(rng.choice([1, 1, 2, 2, 3]))]
        return " ".join(sentences)

    def _sentence(self, topic: str, rng: random.Random) -> str:
        subject = topic if rng.random() < self.focus else rng.choice(TOPICS)
        words = [*self._noun_phrase(subject, rng), rng.choice(VERBS)]
        words += self._noun_phrase(rng.choice(TOPICS + THINGS), rng)
        if rng.random() < 0.2:
            words.append(rng.choice(ADVERBS))
        return " ".join([*words, "."])

    def _noun_phrase(self, noun: str, rng: random.Random) -> list[str]:
        phrase = ["the"]
        if rng.random() < self.warmth:
            phrase.append(rng.choice(WARM))
        if rng.random() < 0.3:
            phrase.append(rng.choice(ADJECTIVES))
        return [*phrase, noun]

    def demonstrations(self, count: int, *, seed: int) -> list[DemonstrationRow]:
        """Return prompts with one answer each, for supervised fine-tuning."""
        rng = random.Random(f"demonstrations {seed}")
        return [
            DemonstrationRow(p, self.answer(p, rng), where=f"grammar {i}")
            for i, p in enumerate(self.prompts(count, seed=seed))
        ]

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return the true reward: see `gold_reward`."""
        rewards = [
            gold_reward(text_of(p), text_of(c)) for p, c in zip(prompts, completions, strict=True)
        ]
        return torch.tensor(rewards, dtype=torch.float32)

    def comparisons(
        self, prompts: Sequence[str], completions: Sequence[Sequence[str]], *, seed: int
    ) -> list[PreferenceRow]:
        """Let the annotator compare the first two distinct answers to each prompt.

        The annotator prefers the higher gold reward (plus `length_bias` for each word) and errs in
        `label_noise` of the cases; equal answers are no comparison.
        """
        rng = random.Random(f"comparisons {seed}")
        rows = []
        for i, (prompt, answers) in enumerate(zip(prompts, completions, strict=True)):
            distinct = list(dict.fromkeys(answers))[:2]
            flip = rng.random() < self.label_noise
            if len(distinct) < 2:
                continue
            first, second = (
                gold_reward(prompt, a) + self.length_bias * len(a.split()) for a in distinct
            )
            if first == second:
                continue
            chosen, rejected = distinct if (first > second) != flip else distinct[::-1]
            rows.append(PreferenceRow(prompt, chosen, rejected, where=f"grammar {i}"))
        return rows

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token a word."""
        words = [*_SPECIAL, ".", ":", *["tell", "me", "about", "the", "describe"], *TOPICS, *THINGS]
        words += [*ADJECTIVES, *WARM, *VERBS, *ADVERBS]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )

    def new_policy(self, *, seed: int, hidden_size: int = 96, layers: int = 2) -> Policy:
        """Return an untrained Llama-like policy of about 0.3 M parameters."""
        tokenizer = self.tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
        torch.manual_seed(seed)
        return Policy(LlamaForCausalLM(config), tokenizer)


def topic_of(prompt: str) -> str:
    """Return the noun that a prompt asks about."""
    return next(w for w in reversed(prompt.split()) if w in _NOUNS)


def gold_reward(prompt: str, answer: str) -> float:
    """Return the gold reward of an answer.

    `b2(topic mentions) + 2 b3(warm words) + 1.5 (grammatical share) - 0.4 |sentences - 2|`, where
    `bk(n) = 1 - (n - k)^2 / k^2`, at least -3: k are best, 2k are as good as none. An empty answer
    has the grammatical share 0.
    """
    words = answer.split()
    sentences = " ".join(words).split(" .")
    tail = sentences.pop().strip()  # what follows the last full stop is no sentence
    parts = [s.strip() for s in sentences] + ([tail] if tail else [])
    grammatical = sum(is_sentence(s.split()) for s in sentences) / len(parts) if parts else 0.0
    mentions = words.count(topic_of(prompt))
    warm = sum(w in WARM for w in words)
    return (
        _best_at(2, mentions)
        + 2 * _best_at(3, warm)
        + 1.5 * grammatical
        - 0.4 * abs(len(sentences) - 2)
    )


def _best_at(best: int, count: int) -> float:
    return max(-3.0, 1 - (count - best) ** 2 / best**2)


def is_sentence(words: Sequence[str]) -> bool:
    """Tell whether words (without the full stop) are `phrase verb phrase [adverb]`.

    A phrase is "the", at most one warm word, at most one adjective, and a noun.
    """
    rest = _after_phrase(list(words))
    if not rest or rest[0] not in VERBS:
        return False
    rest = _after_phrase(rest[1:])
    return rest == [] or (rest is not None and len(rest) == 1 and rest[0] in ADVERBS)


def _after_phrase(words: list[str]) -> list[str] | None:
    """Return what follows a leading noun phrase, None where there is none."""
    if not words or words[0] != "the":
        return None
    at = 1
    at += at < len(words) and words[at] in WARM
    at += at < len(words) and words[at] in ADJECTIVES
    return words[at + 1 :] if at < len(words) and words[at] in _NOUNS else None


def same_content(
    prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
) -> list[bool]:
    """Tell of each pair whether both answers say the same: this world's equivalence.

    What an answer says is whether it names the topic, and whether it is warm.
    """
    return [
        _content(text_of(p), a) == _content(text_of(p), b)
        for p, a, b in zip(prompts, firsts, seconds, strict=True)
    ]


def _content(prompt: str, answer: str) -> tuple[bool, bool]:
    words = answer.split()
    return topic_of(prompt) in words, any(w in WARM for w in words)
