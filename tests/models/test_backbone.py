import copy
import logging

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomModel

from trueward.data.packing import Group, pack, pad
from trueward.models.backbone import (
    add_adapters,
    can_share_prefixes,
    compile_layers,
    disable_dropout,
    grow_vocabulary,
    hidden_states,
    make_batch,
    max_positions,
    takes_position_ids,
)
from trueward.models.policy import Policy
from trueward.sampling import SamplingConfig, sample
from trueward.testing import random_groups, tiny_backbone, tiny_language_model, tiny_tokenizer

DECODERS = ["llama", "qwen2", "gpt2", "opt", "gpt_neox"]
# Two prompts; completions of unlike lengths, one of a single token, one prompt of a single token.
GROUPS = [
    Group(prompt, completions)
    for prompt, completions in random_groups(
        320, prompts=[7, 1, 12], completions=[[5, 1, 9], [4], [3, 8]]
    )
]


def states_of_completions(backbone: torch.nn.Module, form) -> torch.Tensor:
    batch = form(GROUPS, pad_id=0)
    states = hidden_states(backbone, batch)
    return states[batch.rows[:, None], batch.target_columns][batch.mask]


@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_states_equal_unpacked_ones(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    assert can_share_prefixes(backbone)
    packed, padded = (states_of_completions(backbone, form) for form in (pack, pad))
    assert packed.shape == (30, 32)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_gradients_equal_unpacked_ones(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    weights = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for form in (pack, pad):
        backbone.zero_grad()
        (states_of_completions(backbone, form) * weights).mean().backward()
        gradients.append({n: p.grad.clone() for n, p in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
def test_a_packed_row_may_be_longer_than_the_positions(model_type: str) -> None:
    backbone = tiny_backbone(model_type, max_positions=16)
    groups = [Group([5] * 8, [[i] * 8 for i in range(3, 15)])]
    states = [
        hidden_states(backbone, batch)[batch.rows, batch.last]
        for batch in (pack(groups, pad_id=0), pad(groups, pad_id=0))
    ]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-5)


def test_another_attention_implementation_reads_packed_rows_too() -> None:
    backbone = tiny_backbone("llama")
    expected = states_of_completions(backbone, pack)
    backbone.set_attn_implementation("eager")
    assert can_share_prefixes(backbone)
    torch.testing.assert_close(states_of_completions(backbone, pack), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_shares_prefixes_without_nan(dtype: torch.dtype) -> None:
    backbone = tiny_backbone("llama").to(dtype)
    assert can_share_prefixes(backbone)
    batch = make_batch(backbone, GROUPS, pad_id=0)
    assert len(batch.input_ids) == 3  # packed
    assert hidden_states(backbone, batch).isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("bert", {}, "lets a prompt's tokens see what follows it"),
        ("roberta", {}, "lets a prompt's tokens see what follows it"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 4}, "sliding window"),
        ("bloom", {}, "takes no position ids"),
        ("gpt_neo", {}, "causal mask of fixed size"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]]}, "without full attention"),
    ],
)
def test_backbones_that_cannot_share_are_told_once_and_read_unpacked(
    model_type: str, overrides: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = tiny_backbone(model_type, **overrides)
    with caplog.at_level(logging.WARNING, logger="trueward"):
        assert not can_share_prefixes(backbone)
        assert not can_share_prefixes(backbone)
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "computed once for each completion" in caplog.text
    batch = make_batch(backbone, GROUPS, pad_id=0)
    assert torch.equal(batch.input_ids, pad(GROUPS, pad_id=0).input_ids)


def test_a_wide_enough_mistral_without_a_window_shares() -> None:
    assert can_share_prefixes(tiny_backbone("mistral", sliding_window=None))


def test_a_backbone_that_mishandles_packed_rows_is_found_by_computing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backbone = tiny_backbone("gpt2")
    inner = backbone.forward

    def ignores_position_ids(input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    backbone.forward = ignores_position_ids
    with caplog.at_level(logging.WARNING, logger="trueward"):
        assert not can_share_prefixes(backbone)
    assert "gives other states for a packed row" in caplog.text


def test_the_check_leaves_mode_and_gradients_alone() -> None:
    backbone = tiny_backbone("llama").train()
    can_share_prefixes(backbone)
    assert backbone.training
    assert all(p.grad is None for p in backbone.parameters())


def test_sharing_can_be_switched_off() -> None:
    batch = make_batch(tiny_backbone(), GROUPS, pad_id=0, shared_prefix=False)
    assert len(batch.input_ids) == 6


def test_decoders_take_position_ids_with_or_without_adapters() -> None:
    assert takes_position_ids(tiny_backbone("llama"))
    assert takes_position_ids(add_adapters(tiny_backbone("llama"), rank=2))
    assert not takes_position_ids(tiny_backbone("bloom"))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "gpt2", "opt", "bloom", "mistral"])
def test_unpacked_states_are_those_of_the_model_called_by_itself(model_type: str) -> None:
    backbone = tiny_backbone(model_type)
    batch = pad(GROUPS, pad_id=0)
    states = hidden_states(backbone, batch)[batch.rows, batch.last]
    pairs = [([*g.prompt_ids, *c]) for g in GROUPS for c in g.completions]
    alone = [backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids in pairs]
    torch.testing.assert_close(states, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_max_positions_by_hand() -> None:
    assert max_positions(tiny_backbone("llama", max_positions=64)) == 64
    assert max_positions(tiny_backbone("gpt2", max_positions=64)) == 64
    assert max_positions(tiny_backbone("opt", max_positions=64)) == 64
    assert max_positions(tiny_backbone("bert", max_positions=64)) == 64
    config = BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=1)
    assert max_positions(BloomModel(config)) is None


def test_every_position_of_the_limit_can_be_used() -> None:
    # RoBERTa counts from pad + 1: its table of 64 rows holds 63 positions with a pad id of 0.
    for model_type, limit in (("roberta", 63), ("opt", 64), ("gpt2", 64)):
        backbone = tiny_backbone(model_type, max_positions=64)
        assert max_positions(backbone) == limit
        batch = pad([Group([5] * 4, [[6] * (limit - 4)])], pad_id=0)
        assert hidden_states(backbone, batch).isfinite().all()


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "bert", "gpt_neox", "llama"])
def test_no_dropout_is_left(model_type: str) -> None:
    rates = {
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "opt": {"dropout": 0.5, "attention_dropout": 0.5},
        "bert": {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
        "llama": {"attention_dropout": 0.5},
    }[model_type]
    backbone = tiny_backbone(model_type, **rates).train()
    batch = pad(GROUPS, pad_id=0)
    assert not torch.equal(hidden_states(backbone, batch), hidden_states(backbone, batch))
    disable_dropout(backbone)
    training = hidden_states(backbone, batch)
    assert torch.equal(training, hidden_states(backbone.eval(), batch))


def test_the_vocabulary_grows_but_never_shrinks() -> None:
    model = tiny_language_model("llama", vocab_size=320)
    grow_vocabulary(model, 300)
    assert model.get_output_embeddings().weight.shape[0] == 320
    grow_vocabulary(model, 322)
    assert model.get_output_embeddings().weight.shape[0] == 322
    assert model.config.vocab_size == 322


@pytest.mark.parametrize("model_type", DECODERS)
def test_fresh_adapters_change_nothing_and_share_prefixes(model_type: str) -> None:
    plain = tiny_backbone(model_type)
    disable_dropout(plain)
    expected = states_of_completions(plain, pack)
    adapted = add_adapters(plain, rank=2)
    assert can_share_prefixes(adapted)
    torch.testing.assert_close(states_of_completions(adapted, pack), expected)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_adapters_on_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(add_adapters(tiny_backbone(), rank=2), rank=2)


# ---- compiled layers ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # Dynamo asks tensors for gradients
def test_compiled_layers_compute_the_same_forward_and_backward():
    plain = tiny_backbone()
    compiled = copy.deepcopy(plain)
    compile_layers(nn.ModuleList([compiled]), backend="aot_eager")
    groups = random_groups(320, prompts=[7, 3], completions=[[5, 2], [4, 6]])
    batch = pack([Group(*g) for g in groups], pad_id=0)
    found = {}
    for name, model in (("plain", plain), ("compiled", compiled)):
        states = hidden_states(model, batch)
        states.square().sum().backward()
        found[name] = [states, *(p.grad for p in model.parameters())]
    assert all(layer._compiled_call_impl is not None for layer in compiled.layers)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # Dynamo asks tensors for gradients
def test_writing_leaves_compiled_layers_alone():
    graphs = []

    def counted(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph.forward

    tokenizer = tiny_tokenizer()
    policy = Policy(tiny_language_model(vocab_size=len(tokenizer)), tokenizer)
    compile_layers(policy, backend=counted)
    sample(policy, ["one", "two"], SamplingConfig(max_new_tokens=4))
    assert graphs == []
    hidden_states(policy.backbone, pack([Group([1, 2], [[3], [4]])], pad_id=0))
    assert graphs
