"""Completions from a policy: n for each prompt, seeded, finished rows leaving the batch."""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from trueward.data.formats import (
    DataError,
    LoadReport,
    Prompt,
    PromptRow,
    read_jsonl,
    write_jsonl,
)
from trueward.data.tokens import prompt_ids as ids_of_prompt
from trueward.models.backbone import uncompiled
from trueward.models.cache import growing_cache, worth_dropping
from trueward.models.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How completions are drawn."""

    n: int = 1  # completions for each prompt
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    max_new_tokens: int = 256
    max_tokens: int = 65536  # padded tokens of all rows, room for the completions counted in
    seed: int = 0
    engine: str = "transformers"  # or "vllm", where it is installed

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1 completion for each prompt, got {self.n}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.engine not in {"transformers", "vllm"}:
            raise ValueError(f"engine must be 'transformers' or 'vllm', got {self.engine!r}.")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion, as ids and as text, with the log-probability of each of its tokens."""

    prompt_index: int
    prompt_ids: list[int]
    completion_ids: list[int]  # ends with EOS where `finished`
    logprobs: list[float] = field(repr=False)  # at the temperature, before top-p (vLLM: its own)
    text: str
    finished: bool  # False: cut off at max_new_tokens


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    indices: Sequence[int] | None = None,
    progress: bool | None = False,
) -> list[Sample]:
    """Draw `config.n` completions for each prompt, in prompt order.

    Prompts are sorted by length and computed once for their n samples; a row that has ended
    leaves the batch. The noise of a completion depends on the seed, its prompt's position and its
    own index alone, so neither batch size nor early stops change what is drawn.

    Args:
        policy: Switched to evaluation while it writes.
        prompts: Strings or lists of messages.
        config: How many completions, and how they are drawn.
        indices: The prompts' positions where they are a part of a longer list; they key the noise
            and come back as `prompt_index`.
        progress: True for a bar, None for a bar on terminals only.

    Raises:
        DataError: A prompt that leaves no room for a completion.
    """
    names = list(range(len(prompts))) if indices is None else list(indices)
    encoded = []
    for i, prompt in zip(names, prompts, strict=True):
        ids = ids_of_prompt(policy.tokenizer, prompt)
        if not ids:
            raise DataError(f"Prompt {i + 1} is empty: a completion needs something to continue.")
        if len(ids) >= policy.max_length:
            raise DataError(
                f"Prompt {i + 1} has {len(ids)} tokens and the policy reads {policy.max_length}: "
                "shorten it, or leave it out."
            )
        encoded.append(ids)
    if config.engine == "vllm":
        return _sample_with_vllm(policy, names, encoded, config)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    samples: list[Sample] = []
    bar = tqdm(
        total=len(encoded) * config.n,
        desc="sample",
        unit="row",
        disable=None if progress is None else not progress,
    )
    was_training = policy.training
    policy.eval()
    with uncompiled(policy):
        for chunk in _chunks(order, encoded, config):
            samples += _sample_batch(
                policy, [names[i] for i in chunk], [encoded[i] for i in chunk], config
            )
            bar.update(len(chunk) * config.n)
    bar.close()
    policy.train(was_training)
    return sorted(samples, key=lambda s: s.prompt_index)  # stable: samples keep their index


def fitting_prompts(
    policy: Policy, rows: Sequence[PromptRow], report: LoadReport
) -> list[PromptRow]:
    """Return the rows whose prompt leaves room for a completion; report the others by line.

    Raises:
        DataError: No prompt fits.
    """
    kept = []
    for row in rows:
        length = len(ids_of_prompt(policy.tokenizer, row.prompt))
        if length < policy.max_length:
            kept.append(row)
        else:
            detail = f"the prompt has {length} tokens and the policy reads {policy.max_length}"
            report.add("over-long", row.where, detail)
    if rows and not kept:
        raise DataError(f"No prompt can be used: {report.summary()}")
    return kept


def sample_to_file(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    path: str | Path,
    *,
    shard_size: int = 64,
    progress: bool | None = False,
    extras: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, int | float]:
    """Draw completions into a JSONL file, a row for each prompt, and return their statistics.

    Rows hold `prompt`, `completions`, `finished` and `logps` (each completion's summed
    log-probability). Prompts are worked off in shards kept beside the file until all are there, so
    a killed run goes on at its first missing shard and ends with the same file. Shards of other
    prompts, settings or weights are dropped.

    `extras` are further columns of each prompt's row, as its source has them (`lang`, say); a name
    that the row has already is left out.
    """
    path = Path(path)
    shards = path.with_suffix(".shards")
    if config.engine == "vllm":
        shard_size = max(1, len(prompts))  # an engine is started for each shard
    weights = [p.double().sum().item() for p in policy.parameters()]
    made_of = (config, shard_size, list(prompts), weights, *([list(extras)] if extras else []))
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()
    if shards.exists() and not (shards / key).exists():
        shutil.rmtree(shards)
    shards.mkdir(parents=True, exist_ok=True)
    (shards / key).touch()
    files = []
    starts = range(0, len(prompts), shard_size)
    hidden = None if progress is None else not progress
    for start in tqdm(starts, desc="sample", unit="shard", disable=hidden):
        files.append(shards / f"{start:08d}.jsonl")
        if files[-1].exists():
            continue
        some = prompts[start : start + shard_size]
        drawn = sample(policy, some, config, indices=range(start, start + len(some)))
        groups = groupby(drawn, key=lambda s: s.prompt_index)
        own = [(i, _row(prompts[i], list(group))) for i, group in groups]
        write_jsonl(files[-1], [{**(extras[i] if extras else {}), **row} for i, row in own])
    rows = [row for file in files for _, row in read_jsonl(file)]
    write_jsonl(path, rows)
    shutil.rmtree(shards)
    completions = [c for row in rows for c in row["completions"]]
    return {
        "prompts": len(rows),
        "completions": len(completions),
        "finished": sum(f for row in rows for f in row["finished"]) / max(1, len(completions)),
        "mean_characters": sum(map(len, completions)) / max(1, len(completions)),
    }


def read_samples(path: str | Path) -> list[tuple[Prompt, list[str]]]:
    """Return the prompts of a file of `sample_to_file`, each with its completions."""
    return [(row["prompt"], row["completions"]) for _, row in read_jsonl(path)]


def _row(prompt: Prompt, drawn: list[Sample]) -> dict[str, object]:
    return {
        "prompt": prompt,
        "completions": [s.text for s in drawn],
        "finished": [s.finished for s in drawn],
        "logps": [round(sum(s.logprobs), 4) for s in drawn],
    }


def _chunks(order: list[int], encoded: list[list[int]], config: SamplingConfig) -> list[list[int]]:
    """Split prompts (sorted by length) so that n padded rows each stay within the budget."""
    chunks: list[list[int]] = [[]]
    for i in order:
        width = len(encoded[i]) + config.max_new_tokens
        if chunks[-1] and (len(chunks[-1]) + 1) * config.n * width > config.max_tokens:
            chunks.append([])
        chunks[-1].append(i)
    return [c for c in chunks if c]


@torch.no_grad()
def _sample_batch(
    policy: Policy, indices: list[int], encoded: list[list[int]], config: SamplingConfig
) -> list[Sample]:
    tokenizer, device, n = policy.tokenizer, policy.device, config.n
    # A row's room depends on its own prompt, not on the longest in the batch.
    room = [
        min(config.max_new_tokens, policy.max_length - len(p)) for p in encoded for _ in range(n)
    ]
    steps, budget = max(room), torch.tensor(room, device=device)
    noise = _noise(indices, n=n, steps=steps, seed=config.seed).to(device)  # [row, step]

    # Left padding: every row's next token stands in the same column. Positions come from the mask.
    width = max(map(len, encoded))
    input_ids = torch.full((len(encoded), width), int(tokenizer.pad_token_id), device=device)
    mask = torch.zeros(len(encoded), width, dtype=torch.long, device=device)
    for row, ids in enumerate(encoded):
        input_ids[row, width - len(ids) :] = torch.tensor(ids, device=device)
        mask[row, width - len(ids) :] = 1
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = growing_cache(policy.model.config)
    out = policy.model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1].float().repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)  # each prompt is computed once for its n samples
    mask = mask.repeat_interleave(n, 0)
    positions = position_ids[:, -1].repeat_interleave(n, 0)

    rows = torch.arange(len(encoded) * n, device=device)  # rows in the cache
    going = torch.ones_like(rows, dtype=torch.bool)  # those of them that still write
    drawn = torch.full((len(rows), steps), -1, device=device)
    logprobs = torch.zeros(len(rows), steps, device=device)
    for step in range(steps):
        token, logprob = draw(
            logits, noise[rows, step], temperature=config.temperature, top_p=config.top_p
        )
        drawn[rows[going], step], logprobs[rows[going], step] = token[going], logprob[going]
        going &= (token != tokenizer.eos_token_id) & (budget[rows] > step + 1)
        if not going.any():
            break
        if worth_dropping(going):
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, positions = rows[keep], token[keep], mask[keep], positions[keep]
            going = going[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        positions = positions + going  # a row that has ended may have no position left
        out = policy.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1].float()
    return [
        _sample(policy, indices[row // n], encoded[row // n], row_ids, row_logprobs)
        for row, (row_ids, row_logprobs) in enumerate(
            zip(drawn.tolist(), logprobs.tolist(), strict=True)
        )
    ]


def _sample(
    policy: Policy, index: int, prompt: list[int], ids: list[int], logprobs: list[float]
) -> Sample:
    length = ids.index(-1) if -1 in ids else len(ids)
    ids = ids[:length]
    return Sample(
        prompt_index=index,
        prompt_ids=prompt,
        completion_ids=ids,
        logprobs=logprobs[:length],
        text=str(policy.tokenizer.decode(ids, skip_special_tokens=True)),
        finished=bool(ids) and ids[-1] == policy.tokenizer.eos_token_id,
    )


def _noise(indices: Sequence[int], *, n: int, steps: int, seed: int) -> Float[Tensor, "row step"]:
    """Uniform numbers for each completion, from the seed, its prompt's index and its own alone."""
    rows = []
    for index in indices:
        for k in range(n):
            key = ((seed * 1_000_003 + index) * 10_007 + k) % 2**63
            rows.append(torch.rand(steps, generator=torch.Generator().manual_seed(key)))
    return torch.stack(rows)


def draw(
    logits: Float[Tensor, "row vocab"],
    uniform: Float[Tensor, " row"],
    *,
    temperature: float,
    top_p: float,
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """Draw a token for each row by inverting the cumulative distribution at `uniform`.

    Returns the tokens, and their log-probabilities under the temperature before top-p cuts.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    probabilities, order = logprobs.exp(), None
    if top_p < 1:
        probabilities, order = probabilities.sort(-1, descending=True)
        # Keep tokens until their sum reaches top_p; the first one always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    cumulative = probabilities.cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Rounding can leave the threshold at the very top: take the last token with any mass.
    last = (probabilities > 0).int().cumsum(-1).argmax(-1)
    token = torch.minimum(token, last)
    if order is not None:
        token = order.gather(-1, token[:, None])[:, 0]
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def _sample_with_vllm(
    policy: Policy, indices: list[int], encoded: list[list[int]], config: SamplingConfig
) -> list[Sample]:
    """Let vLLM write: the policy is handed over through a temporary folder."""
    import tempfile

    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise DataError("engine=vllm needs vLLM: pip install 'trueward[vllm]'.") from error
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        engine = LLM(model=folder, seed=config.seed, enable_prefix_caching=True)
        parameters = [
            SamplingParams(
                n=config.n,
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=min(config.max_new_tokens, policy.max_length - len(ids)),
                logprobs=0,  # the drawn token's own
                seed=(config.seed * 1_000_003 + index) % 2**31,
            )
            for index, ids in zip(indices, encoded, strict=True)
        ]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in encoded], parameters)
    samples = []
    for index, ids_in, output in zip(indices, encoded, outputs, strict=True):
        for completion in output.outputs:
            ids = list(completion.token_ids)
            logprobs = [d[t].logprob for d, t in zip(completion.logprobs, ids, strict=True)]
            samples.append(_sample(policy, index, ids_in, ids, logprobs))
    return samples
