"""The growing cache against transformers' own, and when rows are taken out of it."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from trueward.models.cache import GrowingLayer, growing_cache, worth_dropping
from trueward.testing import tiny_config, tiny_language_model


def test_every_operation_gives_what_transformers_layer_gives():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = GrowingLayer(), DynamicLayer()
    rows = 3
    for new in (5, 1, 1, 70, 1, 200, 1):
        states = torch.randn(2, rows, 2, new, 4, generator=generator)
        for one, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        if new == 70:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
                layer.batch_select_indices(torch.tensor([0, 3, 4, 5]))
                layer.reorder_cache(torch.tensor([2, 1, 0, 3]))
            rows = 4
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    assert ours.keys.shape == (4, 2, 279, 4)


def test_tokens_are_written_into_room_and_copied_once_a_block():
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 2, 1, 10, 4))
    places = []
    for _ in range(130):
        keys, _ = layer.update(*torch.randn(2, 2, 1, 1, 4))
        places.append(keys.data_ptr())
    assert len(set(places)) == 3  # 54 columns of the first room are left, then two blocks of 64


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_continues_from_it_as_from_its_own(model_type: str):
    model = tiny_language_model(model_type)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for cache in (growing_cache(model.config), DynamicCache(config=model.config)):
        with torch.no_grad():
            model(input_ids=ids[:, :7], past_key_values=cache, use_cache=True)
            out = [
                model(input_ids=ids[:, [i]], past_key_values=cache, use_cache=True).logits
                for i in (7, 8)
            ]
        logits.append(torch.cat(out, 1))
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)


def test_layers_of_another_kind_stay():
    config = tiny_config("mistral", sliding_window=4)
    kinds = {type(layer) for layer in growing_cache(config).layers}
    assert GrowingLayer not in kinds
    assert len(kinds) == 1


def test_rows_are_dropped_when_one_in_eight_has_ended():
    going = torch.ones(16, dtype=torch.bool)
    assert not worth_dropping(going)
    going[3] = False
    assert not worth_dropping(going)
    going[7] = False
    assert worth_dropping(going)
    assert worth_dropping(torch.tensor([True, False]))
