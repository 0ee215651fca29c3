"""What a laboratory asks of a world, and the annotator that all worlds share."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from trueward.data.rows import Completion, PreferenceRow, Prompt, text_of
from trueward.models.policy import Policy
from trueward.refine.equivalence import Equivalence
from trueward.sampling import SamplingConfig, sample


@runtime_checkable
class World(Protocol):
    """A world with a known gold reward, opened for one seed."""

    def prompts(self, count: int, *, seed: int) -> list[Prompt]:
        """Return what is asked; the same for the same seed."""
        ...

    def answers(self, prompts: Sequence[Prompt], *, n: int, seed: int) -> list[list[Completion]]:
        """Return n answers of the reference policy to each prompt."""
        ...

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return what each answer is truly worth."""
        ...

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], *, seed: int
    ) -> list[PreferenceRow]:
        """Return what an annotator says of two answers to each prompt."""
        ...


@runtime_checkable
class LanguageWorld(World, Protocol):
    """A world whose reference policy is a language model that can be optimised."""

    @property
    def policy(self) -> Policy:
        """The reference policy."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        ...

    def prompts(self, count: int, *, seed: int, held_out: bool = False) -> list[Prompt]:
        """Return what is asked in training, or in evaluation."""
        ...

    def equivalence(self, answers: Sequence[Sequence[str]]) -> Equivalence:
        """Return when two answers say the same; thresholds may be calibrated on `answers`."""
        ...


@runtime_checkable
class LanguageDials(Protocol):
    """The configuration of a world of language: builds what the world needs, and opens it."""

    def build_shared(self, folder: Path) -> None:
        """Train what all seeds have in common; resumable."""
        ...

    def build(self, shared: Path, folder: Path, *, seed: int) -> None:
        """Train what a seed has of its own; resumable."""
        ...

    def open(self, shared: Path, folder: Path) -> LanguageWorld:
        """Return the world from what the two left."""
        ...


def answers_of(
    policy: Policy, prompts: Sequence[Prompt], *, n: int, max_new_tokens: int, seed: int
) -> list[list[Completion]]:
    """Return n answers of a policy to each prompt, at temperature 1."""
    config = SamplingConfig(n=n, max_new_tokens=max_new_tokens, seed=seed)
    drawn = sample(policy, prompts, config)
    return [[s.text for s in drawn[i * n : (i + 1) * n]] for i in range(len(prompts))]


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Compares answers by their utility, and errs.

    The utility is the gold reward plus the biases; the label of a share of the pairs is flipped
    once, so that every reward model learns the same mistakes (Coste et al. 2023,
    https://arxiv.org/abs/2310.02743: 25 %).
    """

    label_noise: float = 0.25  # share of comparisons whose label is flipped
    length_bias: float = 0.0  # added to the utility of an answer for each of its words
    position_bias: float = 0.0  # added to the utility of the answer that is shown first

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise is a share in [0, 1], got {self.label_noise}.")

    def compare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Completion]],
        utilities: Sequence[Sequence[float]],
        *,
        seed: int,
    ) -> list[PreferenceRow]:
        """Compare the first two distinct answers to each prompt; equal ones are no comparison.

        Whether a pair is flipped depends on the seed and its place alone, not on its utilities.
        """
        rng = random.Random(f"comparisons {seed}")
        rows = []
        for i, (prompt, some, worth) in enumerate(zip(prompts, answers, utilities, strict=True)):
            flip = rng.random() < self.label_noise
            first_seen = {text_of(a): k for k, a in reversed(list(enumerate(some)))}
            shown = sorted(first_seen.values())[:2]
            if len(shown) < 2:
                continue
            first, second = (worth[k] + self.length_bias * words_of(some[k]) for k in shown)
            first += self.position_bias
            if first == second:
                continue
            chosen, rejected = shown if (first > second) != flip else shown[::-1]
            rows.append(
                PreferenceRow(prompt, some[chosen], some[rejected], where=f"comparison {i}")
            )
        return rows


def stated_and_chosen(
    rows: Sequence[PreferenceRow],
    reward: Callable[[Sequence[Prompt], Sequence[Completion]], Float[Tensor, " batch"]],
    *,
    scale: float = 1.0,
) -> tuple[list[float], list[bool]]:
    """Return the chance that a reward gives to the first answer of each pair, and who was chosen.

    Bradley-Terry's `sigmoid(scale (r_1 - r_2))`. Every other pair is turned round, so that both
    outcomes occur.
    """
    if not rows:
        return [], []
    turned = [i % 2 == 1 for i in range(len(rows))]
    sides = [
        (r.rejected, r.chosen) if t else (r.chosen, r.rejected)
        for r, t in zip(rows, turned, strict=True)
    ]
    prompts = [r.prompt for r in rows for _ in range(2)]
    rewards = reward(prompts, [side for pair in sides for side in pair]).double()
    chances = ((rewards[0::2] - rewards[1::2]) * scale).sigmoid()
    return chances.tolist(), [not t for t in turned]


def words_of(completion: Completion) -> int:
    """Return how many words a completion has."""
    return len(text_of(completion).split())
