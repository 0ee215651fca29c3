"""The cost model: counts by hand, limits, and the sizes of a published model."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from trueward.report.cost import (
    DecoderShape,
    Machine,
    StepShape,
    forward_operations,
    generation_seconds,
    memory_bytes,
    packed,
    policy_step_seconds,
    readout_operations,
    reward_passes,
    rows_at_once,
    sent_bytes,
)

TINY = DecoderShape(layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, vocabulary=10)
CPU = Machine(rate=1e6, memory_rate=1e30)
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
    rows = packed(TINY, STEP, CPU)
    assert rows.tokens == 3 * (4 + 12)
    assert rows.attended == 3 * (8 + 2 * 6 * (4 + 3))
    assert forward_operations(TINY, rows) == 2 * TINY.body * 48 + 4 * 2 * 8 * rows.attended
    assert readout_operations(TINY, STEP) == 2 * 8 * 10 * 36


def test_squares_are_of_rows_of_the_length_that_is_cheapest():
    # row_tokens(4) at width 8 is 4 + sqrt(4 * 52) = 18 tokens: two completions of 6 in a row.
    three = replace(STEP, samples=3)
    rows = packed(TINY, three, replace(CPU, in_pieces=False))
    assert rows.tokens == 3 * (2 * 4 + 3 * 6)
    assert rows.attended == 3 * (16**2 + 10**2)
    assert packed(TINY, three, CPU).tokens == 3 * (4 + 18)


def test_passes_of_ensembles():
    assert reward_passes("heads", 5) == 1
    assert reward_passes("lora", 5) == 2
    assert reward_passes("lora", 5, adapted=1.0) == 5
    assert reward_passes("deep", 5) == 5


def test_rows_are_written_in_chunks_of_four_micro_batches():
    assert rows_at_once(STEP, CPU) == (6, 1)
    small = replace(STEP, batch_tokens=10)  # 40 tokens: two prompts' rows of 2 x 10
    assert rows_at_once(small, CPU) == (4, 2)
    assert rows_at_once(replace(STEP, batch_tokens=1), CPU) == (2, 3)  # a prompt at least
    assert rows_at_once(STEP, replace(CPU, processes=2)) == (4, 1)


def test_writing_is_bound_by_operations_or_by_reading():
    prompts = 2 * TINY.body * 12 / 1e6
    tokens = 5 * 6 * (2 * TINY.body + 2 * 80) / 1e6
    assert generation_seconds(TINY, STEP, CPU) == pytest.approx(prompts + tokens)
    cache = 2 * 2 * 4 * 6 * (4 + 3) * 4
    reading = 5 * ((TINY.body + 80) * 4 + cache) / 1e6
    fast_products = replace(CPU, rate=1e30, memory_rate=1e6)
    assert generation_seconds(TINY, STEP, fast_products) == pytest.approx(reading)
    halved = replace(fast_products, compute_bytes=2)
    assert generation_seconds(TINY, STEP, halved) == pytest.approx(reading / 2)
    in_chunks = replace(STEP, batch_tokens=1)
    cache = 2 * 2 * 4 * 2 * (4 + 3) * 4
    reading = 3 * 5 * ((TINY.body + 80) * 4 + cache) / 1e6
    assert generation_seconds(TINY, in_chunks, fast_products) == pytest.approx(reading)


def test_parts_of_a_step_by_hand():
    machine = replace(CPU, link_rate=1e3, processes=2)
    parts = policy_step_seconds(TINY, TINY, STEP, machine, members=5, family="deep", critic=True)
    body = forward_operations(TINY, packed(TINY, STEP, CPU))
    logits = readout_operations(TINY, STEP)
    assert parts["reward"] == pytest.approx(5 * body / 2e6)
    assert parts["observation"] == pytest.approx((3 * body + 2 * logits) / 2e6)
    assert parts["learning"] == pytest.approx(3 * (2 * body + logits) / 2e6)
    assert parts["communication"] == pytest.approx(2 * 0.5 * 4 * 2 * TINY.weights / 1e3)
    assert policy_step_seconds(TINY, TINY, STEP, CPU)["communication"] == 0
    long = StepShape(prompts=1, samples=4, prompt_tokens=4, completion_tokens=600)
    body = forward_operations(TINY, packed(TINY, long, CPU))
    learning = policy_step_seconds(TINY, TINY, long, CPU)["learning"]
    assert learning == pytest.approx((3 * body + 4 * readout_operations(TINY, long)) / 1e6)


def test_what_is_sent_by_hand():
    machine = replace(CPU, processes=2)
    outside = TINY.weights - TINY.body
    for compute_bytes, layers in ((4, 8), (2, 4)):
        found = sent_bytes(
            TINY, None, replace(machine, compute_bytes=compute_bytes), sharded=True, micro_batches=3
        )
        a_micro_batch = layers * TINY.body + 4 * outside + 4 * TINY.weights
        assert found == pytest.approx(0.5 * (3 * a_micro_batch + 12 * TINY.weights))
    with_critic = sent_bytes(TINY, TINY, machine, sharded=True, micro_batches=1)
    a_micro_batch = 2 * (8 * TINY.body + 4 * outside + 4 * TINY.weights)
    assert with_critic == pytest.approx(0.5 * (a_micro_batch + 16 * TINY.weights))
    assert sent_bytes(TINY, None, CPU, sharded=True, micro_batches=3) == 0


def test_memory_by_hand():
    machine = replace(CPU, processes=4, compute_bytes=2)
    step = replace(STEP, batch_tokens=100)
    held = memory_bytes(TINY, TINY, step, machine, sharded=True, critic=True)
    assert held["trained"] == 16 * 2 * TINY.weights / 4
    assert held["reference"] == TINY.weights
    assert held["rewards"] == 2 * TINY.weights
    gathered = TINY.weights - TINY.body + TINY.layer_weights
    assert held["learning"] == 2 * 2 * 34 * 8 * 100 + 12 * 100 * 10 + 4 * gathered
    assert "writing" not in held
    few = replace(STEP, batch_tokens=1)
    deep = memory_bytes(TINY, TINY, few, machine, members=5, family="deep", sharded=True)
    assert deep["rewards"] == 5 * 2 * TINY.weights
    assert deep["copying"] == (4 + 2) * TINY.weights  # lent, and the copy that writes
    whole = memory_bytes(TINY, TINY, few, CPU, sharded=True)
    assert whole["writing"] == 4 * TINY.weights + 2 * 2 * 4 * 2 * 10 * 4  # lent, two rows' cache
    many = replace(few, samples=100, batch_tokens=1)  # no gradients: the cache is all
    copied = memory_bytes(TINY, TINY, many, machine, sharded=True)
    assert copied["writing"] == 2 * TINY.weights + 2 * 2 * 4 * 100 * 10 * 2
    assert memory_bytes(TINY, TINY, few, machine)["trained"] == 16 * TINY.weights
    lora = memory_bytes(TINY, TINY, few, machine, members=5, family="lora", adapted=0.5, rank=1)
    # Queries and output 8 + 8 each, keys and values 8 + 4, the MLP's 8 + 16; half of 2 layers.
    assert lora["rewards"] == 2 * (TINY.weights + 5 * (2 * 16 + 2 * 12 + 3 * 24))
