"""The embedded world: a small language whose true reward is a formula.

A prompt asks about a topic ("tell me about the cat"); an answer is a few sentences over some forty
words. The gold reward likes an answer that names its topic, is warm, keeps to the grammar and to
two sentences; but each of these can be overdone. Answers of the reference policy rarely overdo
them, so a reward model that learns from comparisons of such answers sees only the rising side,
and extrapolates: the over-optimisation of Gao et al. 2022 (https://arxiv.org/abs/2210.10760) with
a gold reward that costs nothing to ask.
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trueward.data.rows import Completion, DemonstrationRow, PreferenceRow, Prompt, text_of
from trueward.lab.worlds import Annotator, answers_of
from trueward.models.policy import Policy
from trueward.refine.equivalence import Equivalence
from trueward.train.loop import seed_of
from trueward.train.run_folder import finished_summary
from trueward.train.sft import SFTConfig, train_sft

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

    Dials: how the annotator errs, what of it is not what gold wants (`misspecification`), and how
    much of the answers that a policy may come to write the comparisons know of (`coverage`; also
    `warmth` and `focus` of the demonstrations).
    """

    warmth: float = 0.12  # chance that a noun in a demonstration has a warm word
    focus: float = 0.35  # chance that a subject in a demonstration is the topic
    coverage: float = 0.0  # share of the comparisons between answers of any warmth and length
    misspecification: float = 0.0  # share of the annotator's utility: warm words without end
    annotator: Annotator = field(default_factory=lambda: Annotator(label_noise=0.2))
    demonstrations_count: int = 3000  # for the reference policy
    max_new_tokens: int = 40  # of an answer; those of the demonstrations end by 30

    def __post_init__(self) -> None:
        for name in ("warmth", "focus", "coverage", "misspecification"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], got {getattr(self, name)}.")

    def prompts(self, count: int, *, seed: int) -> list[str]:
        """Return requests about a topic described by up to two adjectives (740 differ)."""
        rng = random.Random(f"prompts {seed}")
        out = []
        for _ in range(count):
            adjectives = rng.sample(ADJECTIVES, rng.choice([0, 1, 1, 2, 2]))
            words = [rng.choice(REQUESTS), *adjectives, rng.choice(TOPICS), ":"]
            out.append(" ".join(words))
        return out

    def build_shared(self, folder: Path) -> None:
        """Nothing is common to the seeds: each has a reference policy of its own."""

    def build(self, shared: Path, folder: Path, *, seed: int) -> None:  # noqa: ARG002
        """Train the reference policy of a seed into `folder/model`."""
        if finished_summary(folder) is not None:
            return
        policy = self.new_policy(seed=seed)
        rows = self.demonstrations(self.demonstrations_count, seed=seed)
        config = SFTConfig(learning_rate=3e-3, batch_size=64, epochs=4.0, seed=seed, progress=False)
        train_sft(policy, rows, config, output_dir=folder)

    def open(self, shared: Path, folder: Path) -> "OpenGrammar":  # noqa: ARG002
        """Return the world with the reference policy that `build` left."""
        return OpenGrammar(dials=self, policy=Policy.from_pretrained(folder / "model"))

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
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]], *, seed: int
    ) -> list[PreferenceRow]:
        """Let the annotator compare two answers to each prompt.

        In a share `coverage` of the prompts the two answers are replaced by ones of any warmth and
        length, as no reference policy writes them.
        """
        rng = random.Random(f"coverage {seed}")
        compared = [
            [self._any_answer(p, rng), self._any_answer(p, rng)]
            if rng.random() < self.coverage
            else list(some)
            for p, some in zip(prompts, answers, strict=True)
        ]
        utilities = [
            [self.utility(p, a) for a in some] for p, some in zip(prompts, compared, strict=True)
        ]
        return self.annotator.compare(prompts, compared, utilities, seed=seed)

    def utility(self, prompt: str, answer: str) -> float:
        """Return what the annotator means to prefer: gold, mixed with warmth without end."""
        warm = sum(w in WARM for w in answer.split())
        m = self.misspecification
        return (1 - m) * gold_reward(prompt, answer) + m * warm

    def _any_answer(self, prompt: str, rng: random.Random) -> str:
        wide = dataclasses.replace(self, warmth=rng.random(), focus=rng.random())
        topic = topic_of(prompt)
        return " ".join(wide._sentence(topic, rng) for _ in range(rng.randint(1, 4)))

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


@dataclass(frozen=True, kw_only=True)
class OpenGrammar:
    """The embedded world with its reference policy: a `lab.worlds.LanguageWorld`."""

    dials: GrammarWorld
    policy: Policy

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return self.dials.max_new_tokens

    def prompts(self, count: int, *, seed: int, held_out: bool = False) -> list[Prompt]:
        """Return requests; held-out ones are fresh draws of the same few hundred."""
        return list(self.dials.prompts(count, seed=seed_of(seed, held_out)))

    def answers(self, prompts: Sequence[Prompt], *, n: int, seed: int) -> list[list[Completion]]:
        """Return n answers of the reference policy to each prompt."""
        return answers_of(self.policy, prompts, n=n, max_new_tokens=self.max_new_tokens, seed=seed)

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return the true reward: see `gold_reward`."""
        return self.dials.gold(prompts, completions)

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], *, seed: int
    ) -> list[PreferenceRow]:
        """Return what the annotator says: see `GrammarWorld.comparisons`."""
        texts = [[text_of(a) for a in some] for some in answers]
        return self.dials.comparisons([text_of(p) for p in prompts], texts, seed=seed)

    def equivalence(self, answers: Sequence[Sequence[str]]) -> Equivalence:  # noqa: ARG002
        """Return when two answers say the same: see `same_content`."""
        return same_content


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
