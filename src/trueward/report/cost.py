"""What a step costs: operations, bytes and seconds of a policy step or a batch of pairs, predicted.

A roof-line model: a part takes as long as its operations take at the machine's rate, or its bytes
at the memory's or the link's, whichever is longer; parts follow one another. Dense decoders with a
SwiGLU of three matrices; float32 weights with AdamW, computed in bfloat16 where the machine says
so. `docs/scaling.md` holds it against measurements.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from trueward.data.packing import row_tokens

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

    rate: float  # operations a second that matrix products reach in training and scoring
    memory_rate: float  # bytes a second, read
    link_rate: float = 0.0  # bytes a second, sent by each process
    processes: int = 1
    compute_bytes: int = 4  # 2 where products are in bfloat16
    in_pieces: bool = True  # attention of packed rows: a CPU's way; else the square of each row


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A policy step: `prompts` x `samples` completions, all processes together."""

    prompts: int
    samples: int
    prompt_tokens: int
    completion_tokens: int
    batch_tokens: int = 8192  # of a micro-batch (`max_batch_tokens`)

    @property
    def written(self) -> int:
        """Tokens of all completions."""
        return self.prompts * self.samples * self.completion_tokens


class Packed(NamedTuple):
    """What a step's completions are as packed rows."""

    tokens: int  # of all rows, each with its prompt
    attended: float  # pairs of tokens whose products are computed

    def micro_batches(self, step: StepShape, machine: Machine) -> int:
        """Return how many micro-batches each process has, padding left out."""
        return math.ceil(self.tokens / machine.processes / step.batch_tokens)


def packed(model: DecoderShape, step: StepShape, machine: Machine) -> Packed:
    """Return tokens and attended pairs of a step, in pieces or over squares.

    In pieces a prompt attends to itself (half of a square) and each completion to both. Over
    squares a row is as long as `data.packing.row_tokens` makes a completion cheapest, and all of
    its square is computed.
    """
    prompt, completion, samples = step.prompt_tokens, step.completion_tokens, step.samples
    if machine.in_pieces:
        row = prompt**2 / 2 + samples * completion * (prompt + completion / 2)
        return Packed(step.prompts * (prompt + samples * completion), step.prompts * row)
    room = row_tokens(prompt, hidden_size=model.hidden)
    each = min(samples, max(1, (room - prompt) // completion))
    rows = [each] * (samples // each) + [samples % each] * (samples % each > 0)
    squares = sum((prompt + k * completion) ** 2 for k in rows)
    tokens = len(rows) * prompt + samples * completion
    return Packed(step.prompts * tokens, float(step.prompts * squares))


def forward_operations(model: DecoderShape, rows: Packed) -> float:
    """Operations of the body and its attention on packed rows, forward alone."""
    return 2.0 * model.body * rows.tokens + 4.0 * model.layers * model.hidden * rows.attended


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


def rows_at_once(step: StepShape, machine: Machine) -> tuple[int, int]:
    """Return how many rows a process writes at once, and in how many chunks it writes its share.

    `train_policy` gives sampling four times the tokens of a micro-batch, room for the completions
    counted in, and keeps the samples of a prompt together.
    """
    width = step.prompt_tokens + step.completion_tokens
    share = math.ceil(step.prompts / machine.processes)
    prompts = min(share, max(1, 4 * step.batch_tokens // (step.samples * width)))
    return prompts * step.samples, math.ceil(share / prompts)


def generation_seconds(model: DecoderShape, step: StepShape, machine: Machine) -> float:
    """Seconds of writing: the prompts' pass, then passes that read weights and cache.

    Prompts are computed once for their samples; the first token comes from the prompts' pass.
    """
    rate, bytes_each = machine.rate, machine.compute_bytes
    share = math.ceil(step.prompts / machine.processes)
    prompts = 2.0 * model.body * share * step.prompt_tokens / rate
    rows, chunks = rows_at_once(step, machine)
    readout = model.hidden * model.vocabulary
    operations = rows * 2.0 * (model.body + readout)
    mean_context = step.prompt_tokens + step.completion_tokens / 2
    read = float(bytes_each * (model.body + readout))
    read += model.cache_bytes(rows * mean_context, bytes_each=bytes_each)
    a_pass = max(operations / rate, read / machine.memory_rate)
    return prompts + chunks * (step.completion_tokens - 1) * a_pass


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
) -> dict[str, float]:
    """Seconds of a step's parts: generation, reward, observation, learning, communication.

    Observation is the policy's and the reference's log-probabilities, and the critic's values;
    learning is forward and backward (three forwards; logits once more where a micro-batch has more
    than 2,048 of them) of policy and critic. What travels is that of `docs/scaling.md`.
    """
    each = machine.rate * machine.processes
    rows = packed(policy, step, machine)
    whole, logits = forward_operations(policy, rows), readout_operations(policy, step)
    of_reward = forward_operations(reward, packed(reward, step, machine))
    of_critic = of_reward if critic else 0.0
    micro_batches = rows.micro_batches(step, machine)
    a_micro_batch = step.written / machine.processes / micro_batches
    logit_passes = 4 if a_micro_batch > 2048 else 3
    return {
        "generation": generation_seconds(policy, step, machine),
        "reward": reward_passes(family, members) * of_reward / each,
        "observation": (2 * (whole + logits) + of_critic) / each,
        "learning": (3 * (whole + of_critic) + logit_passes * logits) / each,
        "communication": sent_bytes(
            policy,
            reward if critic else None,
            machine,
            sharded=sharded,
            micro_batches=micro_batches,
        )
        / (machine.link_rate or 1.0),
    }


def sent_bytes(
    policy: DecoderShape,
    critic: DecoderShape | None,
    machine: Machine,
    *,
    sharded: bool,
    micro_batches: int,
) -> float:
    """Bytes that each process sends in a step, over a ring.

    Replicated: gradients once, there and back. Sharded, for each micro-batch: layers gathered twice
    and the rest once, gradients scattered; and models lent, the policy twice, reference and critic
    once.
    """
    if machine.processes == 1:
        return 0.0
    trained = [policy] if critic is None else [policy, critic]
    weights = sum(model.weights for model in trained)
    ring = (machine.processes - 1) / machine.processes
    if not sharded:
        return 2 * ring * 4.0 * weights
    body = sum(model.body for model in trained)
    gathered = 2.0 * machine.compute_bytes * body + 4.0 * (weights - body)
    lent = 4.0 * (2 * policy.weights + weights)
    return ring * (micro_batches * (gathered + 4.0 * weights) + lent)


def memory_bytes(
    policy: DecoderShape,
    reward: DecoderShape,
    step: StepShape,
    machine: Machine,
    *,
    members: int = 1,
    family: Family = "single",
    critic: bool = False,
    sharded: bool = False,
    reward_bytes: int = 2,
    adapted: float = 0.25,
    rank: int = 8,
) -> dict[str, float]:
    """Bytes that each process holds at its peak, by what holds them.

    Weights, gradients and AdamW's moments are float32 (16 bytes a weight), the reference 4. A
    reward that pays stands whole in each process, in `reward_bytes`, a deep ensemble as often as it
    has members. Beside these stands what the hungriest phase needs. `copying`, in half precision:
    the policy that writes, with the lent one where weights are sharded. `writing`: the cache of the
    rows at once, and that copy, or the lent policy where there is none. `learning`: a
    micro-batch's activations, 34 bytes for each unit of width, layer and token in half precision,
    without attention's square (Korthikanti et al. 2022, Eq. 2, https://arxiv.org/abs/2205.05198),
    logits of 2,048 tokens, three float32 numbers each, and where weights are sharded what is
    gathered at a time: a layer, and all that is outside of layers.
    """
    slices = machine.processes if sharded else 1
    weights = policy.weights + (reward.weights if critic else 0)
    rewards = reward.weights * (members if family == "deep" else 1)
    if family == "lora":
        rewards += int(members * adapted * reward.layers * rank * reward.layer_sides)
    rows, _ = rows_at_once(step, machine)
    width = step.prompt_tokens + step.completion_tokens
    cache = policy.cache_bytes(float(rows * width), bytes_each=machine.compute_bytes)
    lent = 4.0 * policy.weights if sharded else 0.0
    copied = 2.0 * policy.weights if machine.compute_bytes == 2 else 0.0
    per_token = 17.0 * machine.compute_bytes
    activations = per_token * step.batch_tokens * policy.layers * policy.hidden
    if critic:
        activations += per_token * step.batch_tokens * reward.layers * reward.hidden
    logits = 3.0 * 4 * min(2048, step.batch_tokens) * policy.vocabulary
    gathered = policy.layer_weights + policy.weights - policy.body if sharded else 0
    phases = {
        "copying": lent + copied,
        "writing": cache + (copied or lent),
        "learning": activations + logits + 4.0 * gathered,
    }
    phase = max(phases, key=lambda name: phases[name])
    return {
        "trained": 16.0 * weights / slices,
        "reference": 4.0 * policy.weights / slices,
        "rewards": float(reward_bytes * rewards),
        phase: phases[phase],
    }
