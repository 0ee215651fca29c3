"""Supervised fine-tuning: the policy learns to write the demonstrations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trueward.data.formats import DataError, DemonstrationRow, LoadReport
from trueward.data.packing import Group, PackedBatch
from trueward.data.tokens import start_token_id, tokenize, truncate_prompt
from trueward.models.backbone import packed_batches
from trueward.models.policy import Policy
from trueward.train.loop import Loop, LoopConfig, permutation

Evaluation = Callable[[Policy], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LoopConfig):
    """Options of `train_sft`; the defaults are AlpacaFarm's."""

    learning_rate: float = 2e-5
    epochs: float = 3.0
    batch_size: int = 128  # demonstrations for each optimiser step
    max_length: int = 512  # tokens of prompt and completion


def train_sft(
    policy: Policy,
    demonstrations: Sequence[DemonstrationRow],
    config: SFTConfig,
    *,
    output_dir: str | Path | None = None,
    report: LoadReport | None = None,
    evaluation: Evaluation | None = None,
) -> Policy:
    """Minimise the mean negative log-likelihood of the completions' tokens (EOS included).

    Args:
        policy: Trained in place.
        demonstrations: Prompts and completions; a completion that does not fit is left out and
            counted in `report`, a long prompt loses its beginning.
        config: Options.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        report: Receives the rows that do not fit.
        evaluation: Called at the end; its numbers stand in the summary.

    Raises:
        DataError: No demonstration fits `max_length`.
    """
    groups = _encode(policy, demonstrations, config, report)
    batch_size = min(config.batch_size, len(groups))
    per_epoch = math.ceil(len(groups) / batch_size)  # the last batch of an epoch may be short
    total = max(1, round(config.epochs * per_epoch))
    loop = Loop(
        config,
        total_steps=total,
        modules={"policy": policy},
        stage="sft",
        output_dir=output_dir,
        can_shard=True,
    )
    trained = loop.modules["policy"].train()
    window = max(1, total // 10)

    def packed(some: Sequence[Group]) -> list[PackedBatch]:
        pad_id = policy.tokenizer.pad_token_id
        budget = config.max_batch_tokens
        batches = packed_batches(policy.backbone, some, pad_id=pad_id, max_tokens=budget)
        return [micro_batch for _, micro_batch in batches]

    for step in loop.steps():
        epoch, at = divmod(step - 1, per_epoch)
        order = permutation(len(groups), config.seed, "sft", epoch)
        batch = [groups[i] for i in order[at * batch_size : (at + 1) * batch_size]]
        tokens = sum(len(g.completions[0]) for g in batch)
        mine = loop.share(batch)
        loss = 0.0
        for micro_batch, counts in loop.rounds(packed(mine), partial(packed, batch[:1])):
            with loop.accelerator.autocast():
                scores = trained(micro_batch)
            part = -scores.logprobs.sum() / tokens
            loop.backward(part * counts)
            loss += part.item() * counts
        norm = loop.update()
        loss = sum(loop.gather([loss]))
        loop.state = [*(loop.state or []), loss][-window:]  # in checkpoints: see the summary
        loop.log(
            {"loss": loss, "num_tokens": tokens, "grad_norm": norm, "epoch": epoch + 1},
            show=["loss"],
        )
    policy.eval()
    metrics: dict[str, float] = {
        "steps": total,
        "demonstrations": len(groups),
        "overlong_demonstrations": len(demonstrations) - len(groups),
    }
    metrics["loss"] = sum(loop.state) / len(loop.state)  # of the last tenth of the steps
    metrics |= evaluation(policy) if evaluation else {}
    loop.finish(metrics, policy.save_pretrained)
    return policy


def _encode(
    policy: Policy,
    demonstrations: Sequence[DemonstrationRow],
    config: SFTConfig,
    report: LoadReport | None,
) -> list[Group]:
    limit = min(config.max_length, policy.max_length)
    groups = []
    for row in demonstrations:
        tokens = tokenize(policy.tokenizer, row.prompt, row.completion)
        start = start_token_id(policy.tokenizer)
        fitting = truncate_prompt(tokens, limit, bos_token_id=start)
        if fitting is not None:
            groups.append(Group(fitting.prompt_ids, [fitting.completion_ids]))
        elif report is not None:
            length = len(tokens.completion_ids)
            report.add("over-long", row.where, f"the completion has {length} tokens of {limit}")
    if not groups:
        raise DataError(f"No demonstration fits max_length={limit}: raise it.")
    return groups
