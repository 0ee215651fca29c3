"""Several processes: who writes, gradients added up, and weights spread over them.

Training is data-parallel: each process takes its share of a batch (`Loop.share`). Either every
process keeps all weights and gradients are added up once for each update (what
`DistributedDataParallel` does, but for steps in which processes accumulate different numbers of
micro-batches, where its hooks would wait for each other), or each keeps a slice of the weights,
gradients and optimiser states (FSDP2), as ZeRO-3 does (https://arxiv.org/abs/1910.02054).
"""

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trueward.models.backbone import can_share_prefixes, layer_list
from trueward.models.policy import Policy, ValueModel
from trueward.models.reward_model import RewardModel


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sum_gradients(parameters: Sequence[nn.Parameter], *, bucket_numel: int = 2**25) -> None:
    """Add up the processes' gradients in place, in few large messages.

    A parameter that no process has touched keeps its gradient of None, as in one process, where
    AdamW then leaves it alone; one that some have touched gets it in all.

    Args:
        parameters: The same ones, in the same order, in every process.
        bucket_numel: Numbers in a message at most, unless one parameter alone has more.
    """
    if not parameters:
        return
    device = parameters[0].device
    touched = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32).to(device)
    dist.all_reduce(touched)
    gradients = []
    for parameter, times in zip(parameters, touched.tolist(), strict=True):
        if times and parameter.grad is None:  # a process whose share did not touch it
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients, bucket_numel):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: Sequence[Tensor], numel: int) -> Iterator[list[Tensor]]:
    """Split the tensors, in order, into runs of one dtype with at most so many numbers."""
    for _, same in groupby(tensors, key=lambda t: t.dtype):
        bucket: list[Tensor] = []
        for tensor in same:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > numel:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered where it is sharded: then all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor as the example is: on its device, and sharded where that is."""
    if isinstance(example, DTensor):
        return distribute_tensor(
            tensor.to(example.device_mesh.device_type), example.device_mesh, example.placements
        )
    return tensor.to(example.device)


class Shards:
    """A module whose weights are spread over processes, and the module itself, lent in whole.

    `sharded` is a copy on FSDP2: each layer of its backbone is gathered for its part of a forward
    or backward pass and dropped again; embeddings, final norm and heads stay from a forward pass to
    its backward. All processes must call it equally often (`Loop.rounds`), and through its own
    `forward`, whose hooks do the gathering. Its gradients are means over the processes.

    The module itself has no weights but within `whole`: there it is the plain module that
    generation (of different lengths in each process), evaluation and saving need.

    Args:
        module: A policy, critic or reward model, the same in every process.
        mesh: The processes, along one axis.
        bf16: Gather the layers, which hold most of the weights, in bfloat16, half the bytes; for
            passes under autocast, which would round them alike. The slices, the reduction of
            gradients, and all outside the layers stay in float32.
    """

    def __init__(self, module: nn.Module, mesh: DeviceMesh, *, bf16: bool = False) -> None:
        self.module = module
        # What is found out by running a model: while it is whole, and the copy remembers it too.
        if isinstance(module, Policy | RewardModel | ValueModel):
            can_share_prefixes(module.backbone)
        if isinstance(module, Policy):
            module.readout()
        # The copy shares the weights until each group of them is cut: never two of them in memory.
        self.sharded = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        precision = MixedPrecisionPolicy()
        if bf16:
            # Inputs are left to autocast: the residual stream stays in float32, as without shards.
            precision = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        backbone = getattr(self.sharded, "backbone", None)
        for layer in layer_list(backbone) if backbone is not None else ():
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(self.sharded, mesh=mesh)
        self._pairs = list(zip(module.parameters(), self.sharded.parameters(), strict=True))
        self._release()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Lend the module its weights; all processes must enter."""
        self.fill()
        try:
            yield
        finally:
            self._release()

    @torch.no_grad()
    def fill(self) -> None:
        """Give the module all its weights, for good; all processes must ask."""
        for parameter, shard in self._pairs:
            parameter.data = full_tensor(shard.detach())

    def _release(self) -> None:
        for parameter, _ in self._pairs:
            parameter.data = parameter.data.new_empty(0)
