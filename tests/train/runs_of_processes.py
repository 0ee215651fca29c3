"""What one process and several do alike; run by torchrun, and imported by `test_scale`.

Sizes are uneven on purpose: a batch of one pair and a minibatch of one completion leave the second
process without work, and budgets of few tokens give the processes different numbers of passes.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trueward.data.formats import DemonstrationRow, PreferenceRow
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.testing import (
    tiny_backbone,
    tiny_language_model,
    tiny_preferences,
    tiny_texts,
    tiny_tokenizer,
)
from trueward.train.alarm import AlarmConfig
from trueward.train.loop import Loop
from trueward.train.policy import PolicyConfig, train_policy
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.sft import SFTConfig, train_sft

# A small eps of Adam makes a step of every rounding error of a gradient near zero.
COMMON: dict[str, Any] = {"learning_rate": 1e-2, "adam_eps": 1e-3, "progress": False}
BF16: dict[str, Any] = {"bf16": True, "learning_rate": 1e-3}


class KilledError(Exception):
    """Ends a run as a kill would."""


def new_reward_model(
    members: int = 0, model_type: str = "llama", lora_rank: int = 0
) -> RewardModel:
    tokenizer = tiny_tokenizer()
    backbone = tiny_backbone(model_type, vocab_size=len(tokenizer), hidden_size=16)
    return RewardModel.from_backbone(backbone, tokenizer, members=members, lora_rank=lora_rank)


def new_policy(**config: Any) -> Policy:
    tokenizer = tiny_tokenizer()
    return Policy(
        tiny_language_model(vocab_size=len(tokenizer), hidden_size=16, **config), tokenizer
    )


def reward(
    out: Path | None,
    *,
    members: int = 0,
    model_type: str = "llama",
    lora_rank: int = 0,
    **options: Any,
) -> RewardModel:
    """Four steps on 11 pairs: batches of 5, 5, 1 and 5."""
    config = RewardConfig(
        batch_size=5, epochs=4 / 3, max_batch_tokens=60, checkpoint_every=2, **(COMMON | options)
    )
    rows = [PreferenceRow(*row) for row in tiny_preferences(11)]
    model = new_reward_model(members, model_type, lora_rank)
    return train_reward(model, rows, config, output_dir=out)


def policy(out: Path | None, algorithm: str, **options: Any) -> Policy:
    """Two steps on three prompts each, which make three minibatches, of one completion for PPO."""
    lora = options.pop("lora", 0)
    config = PolicyConfig(
        algorithm=algorithm,  # type: ignore[arg-type]
        steps=2,
        prompts_per_step=3,
        minibatches=3,
        completions_per_prompt=1 if algorithm == "ppo" else 3,
        max_new_tokens=6,
        max_batch_tokens=30,
        kl_coef=0.1,
        checkpoint_every=1,
        **(COMMON | options),
    )
    writer = new_policy(tie_word_embeddings=not lora)
    if lora:
        writer.add_lora(lora)

    def length(policy: Policy, step: int) -> dict[str, float]:
        ids = torch.arange(3, 13, device=policy.device)[None]
        return {"logits": policy.model(ids).logits.abs().mean().item() * step}

    return train_policy(
        writer,
        new_reward_model(),
        tiny_texts(5),
        config,
        output_dir=out,
        evaluation=length,
        # What it logs must be the same numbers too; it does not see sharded weights.
        alarm=AlarmConfig(action="log") if lora and config.sharding == "none" else None,
    )


def sft(out: Path | None, **options: Any) -> Policy:
    rows = [DemonstrationRow(p, c) for p, c, _ in tiny_preferences(5)]
    config = SFTConfig(batch_size=2, epochs=1.0, max_batch_tokens=40, **(COMMON | options))
    return train_sft(new_policy(), rows, config, output_dir=out)


RUNS: dict[str, Callable[..., nn.Module]] = {
    "reward": reward,
    "ppo": lambda out, **options: policy(out, "ppo", **options),
    "rloo": lambda out, **options: policy(out, "rloo", lora=2, **options),
}

# Other architectures, precisions and parts that train: a longer list, for three processes.
MORE: dict[str, Callable[..., nn.Module]] = {
    "sft": sft,
    "heads": lambda out, **options: reward(out, members=2, **options),
    "gpt2": lambda out, **options: reward(out, model_type="gpt2", **options),
    # An encoder: rows apart, and a pooler that nothing reads, which weight decay must not move.
    "bert": lambda out, **options: reward(out, model_type="bert", weight_decay=0.1, **options),
    "adapters": lambda out, **options: reward(out, lora_rank=2, members=2, **options),
    "grpo": lambda out, **options: policy(out, "grpo", kl_in="loss", inner_epochs=2, **options),
    "bf16": lambda out, **options: reward(out, **BF16, **options),
    "ppo_bf16": lambda out, **options: policy(out, "ppo", **BF16, **options),
}


def killed(name: str, out: Path, *, after: int, **options: Any) -> None:
    """Run until the numbers of a step are written, and no further."""
    log = Loop.log

    def stopping(loop: Loop, *args: Any, **kwargs: Any) -> None:
        log(loop, *args, **kwargs)
        if loop.step + 1 == after:
            raise KilledError

    Loop.log = stopping  # type: ignore[method-assign]
    try:
        with contextlib.suppress(KilledError):
            RUNS[name](out, **options)
    finally:
        Loop.log = log  # type: ignore[method-assign]


def local(tensor: Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def held(loop: Loop) -> dict[str, dict[str, int]]:
    """Return how many numbers this process keeps of each module, and how many there are."""
    out = {}
    for name, module in loop.modules.items():
        own = list(module.parameters())
        state = [t for p in own for t in loop.optimizer.state.get(p, {}).values() if t.ndim]
        out[name] = {
            "processes": loop.accelerator.num_processes,
            "all": sum(p.numel() for p in own),
            "kept": sum(map(local, own)),
            "gradients": sum(local(p.grad) for p in own if p.grad is not None),
            "state": sum(map(local, state)),
            "trained": sum(p.numel() for p in own if p.requires_grad),
            "lent": sum(p.numel() for s in loop._shards for p in s.module.parameters()),
        }
    return out


def observed(name: str, out: Path, **options: Any) -> list[dict[str, dict[str, int]]]:
    """Run, and return what was held at each update."""
    seen: list[dict[str, dict[str, int]]] = []
    update = Loop.update

    def updating(loop: Loop) -> float:
        seen.append(held(loop))
        return update(loop)

    Loop.update = updating  # type: ignore[method-assign]
    try:
        (RUNS | MORE)[name](out, **options)
    finally:
        Loop.update = update  # type: ignore[method-assign]
    return seen


def sums() -> list[str]:
    """Compare gradients added up in messages with gradients added up one by one."""
    from trueward.train.processes import sum_gradients

    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(rank)
    shapes = [(3, 4), (7,), (2, 2, 2), (1,), (50,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    parameters.append(nn.Parameter(torch.zeros(5, dtype=torch.float64)))
    wanted: list[Tensor | None] = []
    for i, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if i == 1:  # touched by nobody
            wanted.append(None)
            continue
        if i == 2 and rank == 1:  # touched by one process
            gradient.zero_()
        else:
            parameter.grad = gradient.clone()
        torch.distributed.all_reduce(gradient)
        wanted.append(gradient)
    messages = 0
    all_reduce = torch.distributed.all_reduce

    def counting(tensor: Tensor) -> None:
        nonlocal messages
        messages += 1
        all_reduce(tensor)

    torch.distributed.all_reduce = counting
    sum_gradients(parameters, bucket_numel=21)
    torch.distributed.all_reduce = all_reduce
    wrong = []
    if messages != 4:  # which are touched; 12 + 8 + 1; 50; 5 of another dtype
        wrong.append(f"{messages} messages")
    for i, (parameter, gradient) in enumerate(zip(parameters, wanted, strict=True)):
        same = parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)
        if not same:
            wrong.append(f"parameter {i}")
    return wrong


def command(*arguments: str) -> tuple[int, str]:
    """Run a command of the command line; return its code and what it printed."""
    from trueward.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(arguments)
    return code, said.getvalue()


def in_processes(out: Path) -> None:
    """Do what `test_scale` asks of two processes."""
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    for mode in ("none", "full"):
        for name in RUNS:
            # The second process writes nothing, so its folder is never made.
            folder = out / f"{mode}.{rank}" / name
            found[f"{mode}/{name}"] = observed(name, folder, sharding=mode)[-1]
    killed("reward", out / "killed", after=3, sharding="full")
    killed("ppo", out / "killed_ppo", after=2, sharding="full")
    reward(out / "killed_in_one", sharding="full")
    found["sums"] = sums()
    found["commands"] = {
        name: command(*arguments) for name, arguments in json.loads(sys.argv[2]).items()
    }
    (out / f"found.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def more_in_processes(out: Path) -> None:
    """Do what the slow tests ask of three processes, of which one has nothing to do more often."""
    rank = int(os.environ["RANK"])
    found = {}
    for mode in ("none", "full"):
        for name in RUNS | MORE:
            folder = out / f"{mode}.{rank}" / name
            found[f"{mode}/{name}"] = observed(name, folder, sharding=mode)[-1]
    (out / f"found.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        in_processes(Path(sys.argv[1]))
    else:
        more_in_processes(Path(sys.argv[1]))
