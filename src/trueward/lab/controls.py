"""Rewards that know nothing of worth: what any learned one must beat."""

import hashlib
import json
from collections.abc import Sequence
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.rows import Completion, Prompt, text_of
from trueward.lab.worlds import words_of

_STANDARD_NORMAL = NormalDist()


def random_reward(
    prompts: Sequence[Prompt], completions: Sequence[Completion], *, seed: int
) -> Float[Tensor, " batch"]:
    """Standard normal noise, a fixed function of seed, prompt text and completion text.

    Equal texts tie, in any batch, process and machine; texts that differ at all have independent
    rewards.
    """
    return torch.tensor(
        [_noise(seed, p, c) for p, c in zip(prompts, completions, strict=True)],
        dtype=torch.float32,
    )


def length_reward(
    prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Float[Tensor, " batch"]:
    """How many words each completion has; the prompts are not looked at."""
    return torch.tensor(
        [float(words_of(c)) for _, c in zip(prompts, completions, strict=True)],
        dtype=torch.float32,
    )


def _noise(seed: int, prompt: Prompt, completion: Completion) -> float:
    # As a JSON list, so that no two triples run together into the same bytes.
    text = json.dumps([seed, text_of(prompt), text_of(completion)])
    digest = hashlib.sha256(text.encode()).digest()
    # 52 bits and a half: never 0 and, unlike 64 bits rounded to a float, never 1.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return _STANDARD_NORMAL.inv_cdf(uniform)
