"""Attention in pieces against the square mask: values, gradients, models that cannot, ensembles."""

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trueward.data.packing import Group, PackedBatch, pack, pad, shared_prefix_mask
from trueward.models.attention import (
    Pieces,
    RowLayout,
    attends_in_blocks,
    attends_in_pieces,
    block_mask,
    layouts_of,
    pieces_from,
    shared_prefix_attention,
    use_block_masks,
    use_whole_masks,
)
from trueward.models.backbone import can_share_prefixes, hidden_states, row_room
from trueward.models.lora_ensemble import _Pass
from trueward.testing import random_groups, tiny_backbone

GROUPS = [
    Group(*g) for g in random_groups(300, prompts=[9, 4, 12], completions=[[3, 7], [5], [1, 2, 6]])
]


@pytest.fixture(autouse=True)
def short_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows here are short, which would go through the square mask."""
    monkeypatch.setattr("trueward.models.attention._PIECES_FROM", 0)


def square(backbone: nn.Module, batch: PackedBatch) -> torch.Tensor:
    return backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state


def test_layouts_by_hand():
    assert [tuple(layout) for layout in layouts_of(pack(GROUPS, pad_id=0))] == [
        (9, (3, 7)),
        (4, (5,)),
        (12, (1, 2, 6)),
    ]


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2}])
def test_pieces_give_the_states_and_gradients_of_the_square_mask(options: dict[str, int]):
    backbone = tiny_backbone(**options).double()
    batch = pack(GROUPS, pad_id=0).to("cpu", torch.float64)
    assert attends_in_pieces(backbone)
    own = torch.cat([batch.segments[row] >= 0 for row in range(3)])
    found = {}
    for name, states_of in (("pieces", hidden_states), ("square", square)):
        states = states_of(backbone, batch).flatten(0, 1)[own]
        states.square().sum().backward()
        found[name] = states, {k: p.grad.clone() for k, p in backbone.named_parameters()}
        backbone.zero_grad()
    torch.testing.assert_close(*(states for states, _ in found.values()))
    for name, gradient in found["square"][1].items():
        torch.testing.assert_close(found["pieces"][1][name], gradient, msg=name)
    assert backbone.config._attn_implementation == "sdpa"


def test_pieces_compute_no_square(monkeypatch: pytest.MonkeyPatch):
    """Products of queries and keys: 9 x 9 and 3 x 12, 7 x 16 in the first row, not 19 x 19."""
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object):
        seen.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)

    backbone, batch = tiny_backbone(layers=1), pack(GROUPS[:1], pad_id=0)
    can_share_prefixes(backbone)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    hidden_states(backbone, batch)
    assert seen == [(9, 9), (3, 12), (7, 16)]
    assert "attention_mask" not in vars(batch)  # the square was not even made


def test_a_model_that_touches_its_mask_gets_the_whole_of_it():
    backbone = tiny_backbone()

    def touch(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]):
        if kwargs["attention_mask"] is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"].clone()
        return args, kwargs

    for layer in backbone.layers:
        layer.register_forward_pre_hook(touch, with_kwargs=True)
    assert can_share_prefixes(backbone)
    assert not attends_in_pieces(backbone)
    batch, alone = pack(GROUPS, pad_id=0), pad(GROUPS, pad_id=0)
    packed = hidden_states(backbone, batch)[batch.rows, batch.last]
    torch.testing.assert_close(
        packed, hidden_states(backbone, alone)[alone.rows, alone.last], atol=1e-5, rtol=1e-5
    )


def test_the_probe_s_row_is_long_enough_for_pieces_whatever_the_threads(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("trueward.models.attention._PIECES_FROM", 150)
    for threads, least in ((1, 150), (3, 450), (64, 600)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert pieces_from() == least
        calls = []

        def counted(*args, **kwargs):
            calls.append(1)  # noqa: B023 (called before the next turn)
            return shared_prefix_attention(*args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "trueward_shared_prefix", counted)
        assert can_share_prefixes(tiny_backbone(layers=1))
        assert calls == [1]


def test_autocast_does_not_decide_what_a_model_can():
    """Under it, wide models differ by more than 1e-3 between packed and padded rows."""
    backbone = tiny_backbone(hidden_size=256, intermediate_size=512, layers=6)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_share_prefixes(backbone)
    assert attends_in_pieces(backbone)  # nothing was given up


def test_what_pieces_do_not_know_is_refused():
    query = torch.zeros(1, 2, 4, 8)
    mask = torch.empty(0, 1, 1, 1)
    mask._trueward_pieces = Pieces(layouts_of(pack([Group([5], [[6], [7, 8]])], pad_id=0)), {})
    with pytest.raises(ValueError, match="Linear attends in a way"):
        shared_prefix_attention(nn.Linear(1, 1), query, query, query, mask, s_aux=query)
    with pytest.raises(AttributeError):
        shared_prefix_attention(nn.Linear(1, 1), query, query, query, mask + 0.0)


def test_eager_models_and_whole_masks_stay_as_they_are():
    backbone = tiny_backbone()
    backbone.set_attn_implementation("eager")
    assert not attends_in_pieces(backbone)
    backbone.set_attn_implementation("sdpa")
    assert attends_in_pieces(backbone)
    assert row_room(backbone, max_tokens=1000)(20) == 320
    assert row_room(backbone, max_tokens=100)(20) == 100
    backbone.gradient_checkpointing_enable()
    assert not attends_in_pieces(backbone)
    batch = pack(GROUPS, pad_id=0)
    hidden_states(backbone.train(), batch).sum().backward()
    backbone.gradient_checkpointing_disable()
    use_whole_masks(backbone)
    assert not attends_in_pieces(backbone)
    assert row_room(backbone, max_tokens=1000)(20) == 20 + round((20 * (6 * 32 + 20)) ** 0.5)
    assert row_room(backbone, max_tokens=1000, shared_prefix=False)(20) == 0


def test_dropout_acts_on_the_weights_of_each_piece():
    """Weights that are kept are scaled up, so that the mean stays."""
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4)
    value = torch.ones(1, 1, 40, 4)
    mask = torch.empty(0, 1, 1, 1)
    mask._trueward_pieces = Pieces([RowLayout(20, (10, 10))], {(20, 10): torch.zeros(10, 30)})
    whole, _ = shared_prefix_attention(nn.Linear(1, 1), query, key, value, mask)
    torch.testing.assert_close(whole, torch.ones(1, 40, 1, 4))
    dropped = [
        shared_prefix_attention(nn.Linear(1, 1), query, key, value, mask, dropout=0.5)[0]
        for _ in range(200)
    ]
    assert dropped[0].std() > 0.1
    assert torch.stack(dropped).mean().item() == pytest.approx(1, abs=0.02)


def test_short_rows_go_through_the_square_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trueward.models.attention._PIECES_FROM", 20)
    backbone = tiny_backbone(layers=1)
    can_share_prefixes(backbone)
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object):
        seen.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for group in (GROUPS[0], Group([5] * 9, [[6] * 3, [7] * 8])):  # 19 and 20 tokens
        hidden_states(backbone, pack([group], pad_id=0))
    assert seen == [(19, 19), (9, 9), (3, 12), (8, 17)]


def test_scores_under_inference_mode_leave_training_as_it_was():
    backbone, batch = tiny_backbone(), pack(GROUPS, pad_id=0)
    with torch.inference_mode():
        hidden_states(backbone, batch)
    hidden_states(backbone, batch).sum().backward()
    assert backbone.embed_tokens.weight.grad is not None


def test_layers_that_are_computed_again_by_others_get_no_pieces():
    backbone = tiny_backbone()
    backbone.layers[0].gradient_checkpointing = True
    assert not attends_in_pieces(backbone)


# ---- blocks ------------------------------------------------------------------------------------


def test_a_block_mask_sees_what_the_square_mask_sees():
    batch = pack(GROUPS, pad_id=0)
    rows, seq = batch.segments.shape
    blocks = block_mask(batch)
    expected = shared_prefix_mask(batch.segments) == 0
    seen = create_mask(blocks.mask_mod, rows, None, seq, seq, device="cpu")
    assert torch.equal(seen, expected)
    # Members of an ensemble have the same rows one after the other.
    seen = create_mask(blocks.mask_mod, 2 * rows, None, seq, seq, device="cpu")
    assert torch.equal(seen, expected.repeat(2, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_members_get_a_copy_of_the_blocks():
    long = [Group([5] * 200, [[6] * 90, [7] * 90]), Group([5] * 20, [[6] * 3])]
    blocks = block_mask(pack(long, pad_id=0))
    one = _Pass(members=3, rows=2, seq=380)
    copies = one._repeat(blocks)
    assert one._repeat(blocks) is copies  # made once for all layers
    assert copies.shape == (6, 1, 380, 380)
    assert torch.equal(copies.kv_num_blocks, blocks.kv_num_blocks.repeat(3, 1, 1))
    assert torch.equal(copies.kv_indices, blocks.kv_indices.repeat(3, 1, 1, 1))
    query, key, value = torch.randn(3, 6, 1, 380, 16)
    with torch.no_grad():
        found = flex_attention(query, key, value, block_mask=copies)
    mask = shared_prefix_mask(pack(long, pad_id=0).segments).repeat(3, 1, 1, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_blocks_are_used_where_they_were_asked_for_and_can_be_had(
    monkeypatch: pytest.MonkeyPatch,
):
    backbone, batch = tiny_backbone(), pack(GROUPS, pad_id=0)
    assert can_share_prefixes(backbone)
    expected = hidden_states(backbone, batch)
    use_block_masks(nn.ModuleList([backbone]))
    assert attends_in_blocks(backbone)
    given = []

    def flex(module, query, key, value, attention_mask, scaling, **_):
        given.append(attention_mask)
        rows, seq = query.shape[0], query.shape[2]
        mask = create_mask(attention_mask.mask_mod, rows, None, seq, seq, device="cpu")
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", flex)
    own = batch.segments >= 0
    torch.testing.assert_close(hidden_states(backbone, batch)[own], expected[own])
    assert [type(mask) for mask in given] == [BlockMask] * 2  # one for each layer
    assert backbone.config._attn_implementation == "sdpa"
    assert can_share_prefixes(backbone)  # asked again, of the blocks
    assert len(given) > 2
    use_whole_masks(backbone)
    assert not attends_in_blocks(backbone)
    torch.testing.assert_close(hidden_states(backbone, batch)[own], expected[own])


def test_where_blocks_fail_square_masks_are_used_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(*_: object, **__: object):
        raise RuntimeError("no kernel")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", broken)
    backbone = tiny_backbone()
    use_block_masks(backbone)
    assert can_share_prefixes(backbone)
    assert not attends_in_blocks(backbone)
    assert "FlexAttention refused a packed row (RuntimeError): square masks" in caplog.text


@pytest.mark.slow
def test_compiled_blocks_give_the_states_of_the_square_mask():
    backbone, batch = tiny_backbone().eval(), pack(GROUPS, pad_id=0)
    own = batch.segments >= 0
    with torch.no_grad():
        expected = square(backbone, batch)[own]
        use_block_masks(backbone)
        assert attends_in_blocks(backbone)
        found = hidden_states(backbone, batch)[own]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
