import math

import pytest
import torch

from trueward.models.card import _KINDS
from trueward.models.head_kinds import KINDS, make_head
from trueward.models.heads import LOG_STD_MAX, LOG_STD_MIN, GaussianHeads, ScalarHead


def test_the_scalar_head_is_one_bias_free_linear_map() -> None:
    head = ScalarHead(3)
    head.linear.weight.data = torch.tensor([[1.0, -2.0, 0.5]])
    means, stds = head(torch.tensor([[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]]))
    assert means.tolist() == [[0.0], [0.0]]
    assert stds is None
    assert head(torch.tensor([[3.0, 1.0, 0.0]])).means.item() == 1.0
    assert head.linear.bias is None


def test_gaussian_heads_by_hand() -> None:
    heads = GaussianHeads(1, members=2)
    # Per member: a mean, then a log std.
    heads.linear.weight.data = torch.tensor([[1.0], [0.5], [-1.0], [0.0]])
    heads.linear.bias.data = torch.tensor([0.0, 0.0, 3.0, math.log(2.0)])
    means, stds = heads(torch.tensor([[2.0]]))
    assert means.tolist() == [[2.0, 1.0]]
    torch.testing.assert_close(stds, torch.tensor([[math.e, 2.0]]))


def test_stds_stay_between_their_floor_and_ceiling() -> None:
    heads = GaussianHeads(1, members=1)
    heads.linear.weight.data = torch.tensor([[0.0], [1.0]])
    stds = heads(torch.tensor([[-1e4], [1e4]])).stds
    assert (LOG_STD_MIN, LOG_STD_MAX) == (-5.0, 2.0)
    torch.testing.assert_close(stds[:, 0], torch.tensor([-5.0, 2.0]).exp())


def test_rewards_of_unit_variance_states_start_with_unit_variance_and_stds_near_one() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2000, 256)
    assert ScalarHead(256)(hidden).means.std().item() == pytest.approx(1.0, abs=0.15)
    means, stds = GaussianHeads(256, members=8)(hidden)
    assert means.std().item() == pytest.approx(1.0, abs=0.1)
    assert 0.6 < stds.min() < 1 < stds.max() < 1.7
    weight = torch.cat([ScalarHead(255).linear.weight for _ in range(40)])
    assert weight.std().item() == pytest.approx(1 / 16, rel=0.05)  # 1 / sqrt(d + 1)


def test_members_start_apart() -> None:
    torch.manual_seed(0)
    means = GaussianHeads(16, members=4)(torch.randn(8, 16)).means
    assert torch.corrcoef(means.T).fill_diagonal_(0).abs().max() < 0.95


def test_heads_compute_in_float32_under_bf16_states_and_autocast() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 64).bfloat16()
    for head in (ScalarHead(64), GaussianHeads(64, 3)):
        expected = head(hidden.float()).means
        with torch.autocast("cpu", torch.bfloat16):
            means, stds = head(hidden)
        assert means.dtype == torch.float32
        assert stds is None or stds.dtype == torch.float32
        assert torch.equal(means, expected)


def test_heads_take_any_leading_axes() -> None:
    heads = GaussianHeads(8, members=3)
    assert heads(torch.zeros(2, 5, 8)).means.shape == (2, 5, 3)
    assert ScalarHead(8)(torch.zeros(2, 5, 8)).means.shape == (2, 5, 1)


def test_head_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    heads = GaussianHeads(32, members=2, dropout=0.5)
    hidden = torch.ones(1, 32)
    assert not torch.equal(heads.train()(hidden).means, heads(hidden).means)
    assert torch.equal(heads.eval()(hidden).means, heads(hidden).means)


@pytest.mark.parametrize("members", [0, -1])
def test_gaussian_heads_without_members_are_refused(members: int) -> None:
    with pytest.raises(ValueError, match=f"at least one member, got members={members}"):
        GaussianHeads(8, members=members)


@pytest.mark.parametrize("head", [ScalarHead(8), GaussianHeads(8, 3, dropout=0.25)])
def test_a_head_is_built_again_from_its_description(head: torch.nn.Module) -> None:
    again = make_head(head.describe(), 8)
    assert again.describe() == head.describe()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in head.state_dict().items()
    }


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown reward head 'wooden'"):
        make_head({"kind": "wooden"}, 8)


def test_the_card_of_a_saved_model_has_words_for_every_kind_of_head() -> None:
    assert set(_KINDS) == set(KINDS)
