"""Attention in pieces against the square mask: values, gradients, models that cannot, ensembles."""

import pytest
import torch
from torch import nn

from trueward.data.packing import Group, PackedBatch, pack, pad
from trueward.models.attention import (
    Pieces,
    RowLayout,
    attends_in_pieces,
    layouts_of,
    shared_prefix_attention,
    use_whole_masks,
)
from trueward.models.backbone import can_share_prefixes, hidden_states, row_room
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
