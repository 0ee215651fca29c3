"""What a step costs: operations, bytes and seconds of a policy step or a batch of pairs, predicted.

A roof-line model: a part takes as long as its operations take at the machine's rate, or its bytes
at the memory's or the link's, whichever is longer; parts follow one another. Dense decoders with a
SwiGLU of three matrices; float32 weights with AdamW, computed in bfloat16 where the machine says
so. `docs/scaling.md` holds it against measurements.
"""

from dataclasses import dataclass
from typing import Literal

Family = Literal["single", "heads", "lora", "deep"]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False  # one matrix embeds and reads out

    @property
    def layer_weights(self) -> int:
        """Weights of one layer: queries and output, keys and values, the three of the MLP."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate

    @property
    def layer_sides(self) -> int:
        """Inputs and outputs of a layer's matrices: the weights of adapters of rank 1."""
        kv = self.hidden * self.kv_heads // self.heads
        return 4 * self.hidden + 2 * (self.hidden + kv) + 3 * (self.hidden + self.intermediate)

    @property
    def body(self) -> int:
        """Weights that every token is multiplied with."""
        return self.layers * self.layer_weights

    @property
    def weights(self) -> int:
        """All of them, norms left out."""
        return self.body + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def cache_bytes(self, tokens: float, *, bytes_each: int) -> float:
        """Bytes of the keys and values of so many tokens."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2.0 * self.layers * kv * tokens * bytes_each


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one process has, and how many there are."""

    rate: float  # operations a second that matrix products really reach
    memory_rate: float  # bytes a second, read
    link_rate: float = 0.0  # bytes a second, sent by each process
    processes: int = 1
    compute_bytes: int = 4  # 2 where products are in bfloat16


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A policy step: `prompts` x `samples` completions, all processes together."""

    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def packed_tokens(self) -> int:
        """Tokens of all packed rows: each prompt once."""
        return self.prompts * (self.prompt_tokens + self.samples * self.completion_tokens)

    @property
    def written(self) -> int:
        """Tokens of all completions."""
        return self.prompts * self.samples * self.completion_tokens

    @property
    def attended(self) -> float:
        """Pairs of tokens that attend, in packed rows taken apart into their pieces."""
        prompt, completion = self.prompt_tokens, self.completion_tokens
        row = prompt**2 / 2 + self.samples * completion * (prompt + completion / 2)
        return self.prompts * row


def forward_operations(model: DecoderShape, step: StepShape) -> float:
    """Operations of the body and its attention on a step's packed rows, forward alone."""
    return 2.0 * model.body * step.packed_tokens + 4.0 * model.layers * model.hidden * step.attended


def readout_operations(model: DecoderShape, step: StepShape) -> float:
    """Operations of the logits of all written tokens, forward alone."""
    return 2.0 * model.hidden * model.vocabulary * step.written


def reward_passes(family: Family, members: int, *, adapted: float = 0.25) -> float:
    """Forward passes of one model that a reward of so many members costs.

    `adapted` is the share of the layers that a LoRA ensemble's members do not share.
    """
    passes = {
        "single": 1.0,
        "heads": 1.0,
        "lora": 1 - adapted + members * adapted,
        "deep": float(members),
    }
    return passes[family]


def generation_seconds(model: DecoderShape, step: StepShape, machine: Machine) -> float:
    """Seconds of writing: the prompts' pass, then a pass a token that reads weights and cache.

    Prompts are computed once for their samples; rows are spread over the processes, and all of a
    process's rows are written at once.
    """
    share = 1 / machine.processes
    prompts = 2.0 * model.body * step.prompts * step.prompt_tokens * share / machine.rate
    rows = step.prompts * step.samples * share
    operations = rows * (2.0 * model.body + 2.0 * model.hidden * model.vocabulary)
    mean_context = step.prompt_tokens + step.completion_tokens / 2
    each = machine.compute_bytes
    read = (model.body + model.vocabulary * model.hidden) * each
    read_cache = model.cache_bytes(rows * mean_context, bytes_each=each)
    a_token = max(operations / machine.rate, (read + read_cache) / machine.memory_rate)
    return prompts + step.completion_tokens * a_token


def policy_step_seconds(
    policy: DecoderShape,
    reward: DecoderShape,
    step: StepShape,
    machine: Machine,
    *,
    members: int = 1,
    family: Family = "single",
    critic: bool = False,
    sharded: bool = False,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Seconds of a step's parts: generation, reward, observation, learning, communication.

    Observation is the policy's and the reference's log-probabilities, and the critic's values;
    learning is forward and backward (three forwards) of policy and critic. What travels is that of
    `docs/scaling.md`, over `micro_batches` a process.
    """
    each = machine.rate * machine.processes
    whole = forward_operations(policy, step)
    logits = readout_operations(policy, step)
    scored = reward_passes(family, members) * forward_operations(reward, step)
    trained = policy.weights + (reward.weights if critic else 0)
    ring = (machine.processes - 1) / machine.processes
    if machine.processes == 1:
        sent = 0.0
    elif sharded:  # layers are gathered twice, float32 gradients scattered, weights lent
        body = policy.body + (reward.body if critic else 0)
        layers = 2.0 * machine.compute_bytes * body
        gathered = micro_batches * (layers + 4.0 * (trained - body)) + 4.0 * (
            3 * policy.weights + (reward.weights if critic else 0)
        )
        sent = ring * (gathered + micro_batches * 4.0 * trained)
    else:
        sent = 2 * ring * 4.0 * trained
    return {
        "generation": generation_seconds(policy, step, machine),
        "reward": scored / each,
        "observation": (2 * (whole + logits) + (forward_operations(reward, step) if critic else 0))
        / each,
        "learning": 3
        * (whole + logits + (forward_operations(reward, step) if critic else 0))
        / each,
        "communication": sent / machine.link_rate if sent else 0.0,
    }


def memory_bytes(
    policy: DecoderShape,
    reward: DecoderShape,
    machine: Machine,
    *,
    batch_tokens: int,
    members: int = 1,
    family: Family = "single",
    critic: bool = False,
    sharded: bool = False,
    reward_bytes: int = 2,
    adapted: float = 0.25,
    rank: int = 8,
) -> dict[str, float]:
    """Bytes that each process holds, by what holds them.

    Weights, gradients and AdamW's moments are float32 (16 bytes a weight); the reference 4; sharded
    weights are lent whole, one model at a time. A reward that pays stands whole in each process, in
    `reward_bytes`; a deep ensemble as often as it has members. Activations of a micro-batch of
    `batch_tokens` are 34 x hidden bytes a layer and token in half precision without attention's
    square (Korthikanti et al. 2022, Eq. 2, https://arxiv.org/abs/2205.05198), logits of 2,048
    tokens three float32 numbers each.
    """
    slices = machine.processes if sharded else 1
    trained = policy.weights + (reward.weights if critic else 0)
    lent = 4.0 * max(policy.weights, reward.weights if critic else 0) if sharded else 0.0
    rewards = reward.weights * (members if family == "deep" else 1)
    if family == "lora":
        rewards += int(members * adapted * reward.layers * rank * reward.layer_sides)
    layer = 34.0 * policy.hidden * batch_tokens * machine.compute_bytes / 2
    return {
        "trained": 16.0 * trained / slices,
        "reference": 4.0 * policy.weights / slices,
        "lent": lent,
        "rewards": float(reward_bytes * rewards),
        "activations": policy.layers * layer * (2 if critic else 1),
        "logits": 3.0 * 4 * min(2048, batch_tokens) * policy.vocabulary,
    }
