"""The cost model: counts by hand, limits, and the sizes of a published model."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from trueward.report.cost import (
    DecoderShape,
    Machine,
    StepShape,
    forward_operations,
    generation_seconds,
    memory_bytes,
    policy_step_seconds,
    readout_operations,
    reward_passes,
)

TINY = DecoderShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, vocabulary=10)
STEP = StepShape(prompts=3, samples=2, prompt_tokens=4, completion_tokens=6)
LLAMA = DecoderShape(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocabulary=32000
)


def test_weights_are_those_of_a_model_of_these_sizes():
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert TINY.weights == sum(p.numel() for p in model.parameters()) - norms
    assert LLAMA.weights == pytest.approx(6.738e9, rel=1e-3)  # Llama 2 7B


def test_operations_by_hand():
    assert TINY.body == 2 * (2 * 64 + 2 * 8 * 4 + 3 * 128)
    assert STEP.packed_tokens == 3 * (4 + 12)
    assert STEP.attended == 3 * (8 + 2 * 6 * (4 + 3))
    assert forward_operations(TINY, STEP) == 2 * TINY.body * 48 + 4 * 2 * 8 * STEP.attended
    assert readout_operations(TINY, STEP) == 2 * 8 * 10 * 36


def test_passes_of_ensembles():
    assert reward_passes("heads", 5) == 1
    assert reward_passes("lora", 5) == 2
    assert reward_passes("lora", 5, adapted=1.0) == 5
    assert reward_passes("deep", 5) == 5


def test_writing_is_bound_by_operations_or_by_reading():
    fast_memory = Machine(rate=1e6, memory_rate=1e30)
    prompts = 2 * TINY.body * 12 / 1e6
    tokens = 6 * 6 * (2 * TINY.body + 2 * 80) / 1e6
    assert generation_seconds(TINY, STEP, fast_memory) == pytest.approx(prompts + tokens)
    fast_products = Machine(rate=1e30, memory_rate=1e6)
    cache = 2 * 2 * 4 * 6 * (4 + 3) * 4
    reading = 6 * ((TINY.body + 80) * 4 + cache) / 1e6
    assert generation_seconds(TINY, STEP, fast_products) == pytest.approx(reading)


def test_parts_of_a_step_by_hand():
    machine = Machine(rate=1e6, memory_rate=1e30, link_rate=1e3, processes=2)
    parts = policy_step_seconds(TINY, TINY, STEP, machine, members=5, family="deep", critic=True)
    body, logits = forward_operations(TINY, STEP), readout_operations(TINY, STEP)
    assert parts["reward"] == pytest.approx(5 * body / 2e6)
    assert parts["observation"] == pytest.approx((3 * body + 2 * logits) / 2e6)
    assert parts["learning"] == pytest.approx(3 * (2 * body + logits) / 2e6)
    assert parts["communication"] == pytest.approx(2 * 0.5 * 4 * 2 * TINY.weights / 1e3)
    sharded = policy_step_seconds(TINY, TINY, STEP, machine, sharded=True, micro_batches=3)
    outside = TINY.weights - TINY.body
    travels = 3 * (8 * TINY.body + 4 * outside) + 12 * TINY.weights + 3 * 4 * TINY.weights
    assert sharded["communication"] == pytest.approx(0.5 * travels / 1e3)
    alone = Machine(rate=1e6, memory_rate=1e30)
    assert policy_step_seconds(TINY, TINY, STEP, alone)["communication"] == 0


def test_memory_by_hand():
    machine = Machine(rate=1.0, memory_rate=1.0, processes=4, compute_bytes=2)
    held = memory_bytes(TINY, TINY, machine, batch_tokens=100, sharded=True, critic=True)
    assert held["trained"] == 16 * 2 * TINY.weights / 4
    assert held["reference"] == TINY.weights
    assert held["lent"] == 4 * TINY.weights
    assert held["rewards"] == 2 * TINY.weights
    assert held["activations"] == 2 * 2 * 34 * 8 * 100
    assert held["logits"] == 12 * 100 * 10
    deep = memory_bytes(TINY, TINY, machine, batch_tokens=1, members=5, family="deep")
    assert deep["rewards"] == 5 * 2 * TINY.weights
    assert deep["trained"] == 16 * TINY.weights
    assert deep["lent"] == 0
    lora = memory_bytes(
        TINY, TINY, machine, batch_tokens=1, members=5, family="lora", adapted=0.5, rank=1
    )
    # Queries and output 8 + 8 each, keys and values 8 + 4, the MLP's 8 + 16; half of 2 layers.
    assert lora["rewards"] == 2 * (TINY.weights + 5 * (2 * 16 + 2 * 12 + 3 * 24))
