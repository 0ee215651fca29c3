"""What the training loops share: optimiser, schedule, exact resume, logging, several processes.

Nothing here knows a loss. Everything random in a loop is a function of (seed, step), and the
learning rate is a function of the step, so that weights, optimiser state and a step number are all
that a checkpoint needs for a resumed run to end with the numbers of an unbroken one.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from tqdm.auto import tqdm

from trueward.models.attention import use_block_masks
from trueward.models.backbone import compile_layers, default_device
from trueward.train.processes import Shards, full_tensor, like, process_count, sum_gradients
from trueward.train.run_folder import RunFolder, to_plain

T = TypeVar("T")


# Counts of the loops' own configurations, checked in one place.
_COUNTS = (
    "batch_size",
    "max_length",
    "steps",
    "prompts_per_step",
    "completions_per_prompt",
    "max_new_tokens",
    "inner_epochs",
    "minibatches",
)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options that every training command has."""

    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03  # share of the steps in which the rate rises linearly
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    max_grad_norm: float = 1.0  # of each module (policy, critic, ...); 0 = no clipping
    adam_eps: float = 1e-8
    seed: int = 42
    bf16: bool = False  # autocast; heads and losses stay in float32
    # Both are for a GPU, and for runs long enough to pay for compiling.
    compile_layers: bool = False  # torch.compile
    flex_attention: bool = False  # packed rows through FlexAttention, by blocks
    max_batch_tokens: int = 8192  # padded tokens computed at once; the batch is accumulated
    log_every: int = 1
    checkpoint_every: int = 50  # steps; 0 = only the finished model
    # Over processes (torchrun). none: each keeps all weights, gradients are added up (DDP). full:
    # each keeps a slice of the weights, gradients and optimiser states (FSDP2, as ZeRO-3 does).
    sharding: Literal["none", "full"] = "none"
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    progress: bool | None = None  # None: where there is a terminal

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}.")
        for name in ("log_every", *_COUNTS):
            if getattr(self, name, 1) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if getattr(self, "epochs", 1.0) <= 0:
            raise ValueError(f"epochs must be above 0, got {getattr(self, 'epochs', None)}.")
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {self.max_batch_tokens}.")


def learning_rate_at(step: int, total: int, config: LoopConfig) -> float:
    """Return the rate of the 1-based `step` of `total`: linear warm-up, then the schedule to 0."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, total - warmup)  # 0 at the first step after the warm-up
    factors = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
    }
    return config.learning_rate * factors[config.schedule]


def seed_of(*parts: object) -> int:
    """Return a seed that is a pure function of its parts, such as (seed, "order", epoch)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def permutation(count: int, *parts: object) -> list[int]:
    """Return an order of `count` items, a pure function of the parts."""
    generator = torch.Generator().manual_seed(seed_of(*parts))
    return torch.randperm(count, generator=generator).tolist()


class Loop:
    """The bookkeeping around a visible training loop.

    Args:
        config: The loop's options.
        total_steps: Optimiser steps of the whole run.
        modules: What is trained, by name; parameters that need no gradient are left out.
        stage: Names the lines in `metrics.jsonl`.
        output_dir: None keeps no files (then there is nothing to resume).
        learning_rate_scales: Factors on the rate of single modules, by name.
        can_shard: Whether the caller trains what `modules` of this loop holds, in `rounds`, and
            reads its own modules only within `whole` until the last step is done.

    Attributes:
        modules: What to call for a gradient: those given, or with `sharding="full"` and several
            processes their sharded copies.

    Raises:
        ValueError: Weights are to be sharded where the caller cannot.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        total_steps: int,
        modules: dict[str, nn.Module],
        stage: str,
        output_dir: str | Path | None = None,
        learning_rate_scales: dict[str, float] | None = None,
        can_shard: bool = False,
    ) -> None:
        if config.sharding == "full" and config.compile_layers:
            raise ValueError(
                "compile_layers is not for sharded weights: give sharding=none, or leave it out."
            )
        if config.sharding == "full" and not can_shard:
            raise ValueError(
                "sharding=full is for sft, policy, and reward with family single or heads, trained "
                f"alone; this is another training, of the stage '{stage}': leave sharding out."
            )
        self.config = config
        self.total_steps = total_steps
        self.stage = stage
        AcceleratorState._reset_state()  # stages of one program may differ in precision
        self.accelerator = Accelerator(
            # Unless told so, accelerate takes torchrun's processes on CPUs for unrelated ones.
            cpu=process_count() > 1 and default_device().type == "cpu",
            mixed_precision="bf16" if config.bf16 else "no",
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(output_dir) if output_dir is not None else None,
        )
        self.folder = RunFolder(output_dir, command=stage, config=config)
        if config.tracker != "none":
            self.accelerator.init_trackers("trueward", config=_flat(to_plain(config)))
        device, count = self.accelerator.device, self.accelerator.num_processes
        if config.flex_attention and device.type == "cpu":
            raise ValueError("flex_attention has no gradients on a CPU: leave it out there.")
        self.modules = {k: m.to(device) for k, m in modules.items()}
        for module in self.modules.values():
            if config.flex_attention:
                use_block_masks(module)
            if config.compile_layers:
                compile_layers(module)
        self._shards: list[Shards] = []
        if config.sharding == "full" and count > 1:
            mesh = init_device_mesh(device.type, (count,))
            for name, module in self.modules.items():
                self._shards.append(Shards(module, mesh, bf16=config.bf16))
                self.modules[name] = self._shards[-1].sharded
        scales = learning_rate_scales or {}
        self.groups = [
            {
                "params": [p for p in m.parameters() if p.requires_grad],
                "scale": scales.get(name, 1.0),
            }
            for name, m in self.modules.items()
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in self.groups if g["params"]],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eps=config.adam_eps,
        )
        self.step = 0  # steps done
        self.state: Any = None  # whatever else the loop must remember, as JSON
        self._bar: Any = None

    # ---- steps -----------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps still to do, 1-based; checkpoints are written between them."""
        self._resume()
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=self.stage,
            unit="step",
            disable=self._hides_progress(),
        )
        try:  # a loop may end before its last step
            while self.step < self.total_steps:
                self.reseed()
                yield self.step + 1
                self.step += 1
                self._bar.update()
                every = self.config.checkpoint_every
                if every and self.step % every == 0 and self.step < self.total_steps:
                    self.checkpoint()
        finally:
            self._bar.close()
            if self.config.tracker != "none":
                self.accelerator.end_training()
        for shards in self._shards:
            if any(p.requires_grad for p in shards.module.parameters()):  # what was trained, whole
                shards.fill()

    def _hides_progress(self) -> bool | None:
        if not self.accelerator.is_main_process:
            return True
        return None if self.config.progress is None else not self.config.progress

    def reseed(self) -> None:
        """Set the random state (of dropout, say) to that of the step to come."""
        torch.manual_seed(seed_of(self.config.seed, self.stage, self.step + 1))

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part of the batch; parts are scaled to sum to the batch."""
        if self._shards:  # their gradients are means over processes, and ours are sums
            loss = loss * self.accelerator.num_processes
        self.accelerator.backward(loss)

    def update(self) -> float:
        """Sum gradients over processes, clip, set the rate, step; return the gradient's norm."""
        rate = learning_rate_at(self.step + 1, self.total_steps, self.config)
        groups = self.optimizer.param_groups
        if self.accelerator.num_processes > 1 and not self._shards:
            sum_gradients([p for group in groups for p in group["params"]])
        norms = []
        for group in groups:
            limit = self.config.max_grad_norm or math.inf
            norm = nn.utils.clip_grad_norm_(group["params"], limit)
            norms.append(float(full_tensor(norm)))  # of the whole module, sharded or not
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return math.hypot(*norms)

    # ---- several processes -----------------------------------------------------------------

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of the items (every n-th one)."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def rounds(
        self, mine: Sequence[T], spare: Callable[[], Sequence[T]]
    ) -> Iterator[tuple[T, bool]]:
        """Yield this process's micro-batches, each with whether it counts.

        Sharded modules run in all processes at once: one that has fewer micro-batches than another
        gets the first of `spare()` until they are even. Those do not count: multiply their loss by
        the flag, and leave out their numbers.
        """
        passes = max(self.gather([len(mine)])) if self._shards else len(mine)
        for item in mine:
            yield item, True
        for _ in range(passes - len(mine)):
            yield spare()[0], False

    def whole(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Lend one of the modules given its weights, which are elsewhere where they are sharded.

        All processes must enter; within, each may call the module as often as it likes.
        """
        for shards in self._shards:
            if shards.module is module:
                return shards.whole()
        return contextlib.nullcontext()

    def gather(self, values: Sequence[T]) -> list[T]:
        """Return the values of all processes, in one list."""
        if self.accelerator.num_processes == 1:
            return list(values)
        gathered: list[T] = gather_object(list(values))
        return gathered

    # ---- numbers ---------------------------------------------------------------------------

    def log(
        self, metrics: dict[str, float], *, show: Sequence[str] = (), always: bool = False
    ) -> None:
        """Write the step's metrics; `show` names those beside the progress bar.

        Every `log_every`-th step and the last one are written, and what `always` says.
        """
        step = self.step + 1
        if step % self.config.log_every and step != self.total_steps and not always:
            return
        self.folder.log(self.stage, step, metrics)
        if self._bar is not None:
            self._bar.set_postfix({k: f"{metrics[k]:.3g}" for k in show if k in metrics})
        if self.config.tracker != "none":
            self.accelerator.log({f"{self.stage}/{k}": v for k, v in metrics.items()}, step=step)

    def finish(self, metrics: dict[str, Any], save: Callable[[Path], object] | None = None) -> None:
        """Save what was trained, then write the summary: its presence says that all is there."""
        if self.folder.path is not None and self.folder.writes and save is not None:
            save(self.folder.path / "model")
        self.folder.finish(metrics, seed=self.config.seed)
        self.accelerator.wait_for_everyone()

    # ---- checkpoints -----------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write weights, optimiser state and step: the same files from any number of processes."""
        if self.folder.path is None:
            return
        tensors: dict[str, Tensor] = dict(self._named_parameters())
        for i, state in enumerate(self._optimizer_states()):
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        kept = {}
        for name, tensor in tensors.items():
            whole = full_tensor(tensor.detach())  # one after the other, by all processes
            if self.folder.writes:
                kept[name] = whole.cpu()
        self.folder.save_checkpoint(self.step, kept, self.state)

    def _resume(self) -> None:
        found = self.folder.load_checkpoint()
        if found is None:
            return
        self.step, tensors, self.state = found
        with torch.no_grad():
            for name, parameter in self._named_parameters():
                parameter.copy_(like(tensors[name], parameter))
        flat = [p for g in self.optimizer.param_groups for p in g["params"]]
        for i, parameter in enumerate(flat):
            prefix = f"optimizer.{i}."
            self.optimizer.state[parameter] = {
                # AdamW counts its steps in a CPU tensor, whatever the device
                k.removeprefix(prefix): t if k.endswith(".step") else like(t, parameter)
                for k, t in tensors.items()
                if k.startswith(prefix)
            }

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.modules.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    def _optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield self.optimizer.state.get(parameter, {})


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration as trackers want it: one level, plain values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
