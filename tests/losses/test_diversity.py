import math

import pytest
import torch
from torch import Tensor

from trueward.losses import nuclear_norm_diversity


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal_rows(rows: int, d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(matrix(d, rows, seed=seed)).Q.T


def test_the_value_of_a_matrix_with_known_singular_values() -> None:
    a = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]])  # singular values 4 and 3
    assert nuclear_norm_diversity(a).item() == pytest.approx(7 / 5)
    turned = orthonormal_rows(2, 2).float() @ a @ orthonormal_rows(3, 3, seed=1).float()
    assert nuclear_norm_diversity(turned).item() == pytest.approx(1.4, rel=1e-5)


def test_orthonormal_rows_reach_the_upper_end_and_one_direction_the_lower() -> None:
    assert nuclear_norm_diversity(orthonormal_rows(6, 9)).item() == pytest.approx(math.sqrt(6))
    assert nuclear_norm_diversity(orthonormal_rows(4, 9).T).item() == pytest.approx(2.0)
    one_direction = matrix(6, 1) @ matrix(1, 9, seed=1)
    assert nuclear_norm_diversity(one_direction).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("rows", "d"), [(1, 7), (5, 7), (12, 7)])
def test_it_lies_between_one_and_the_root_of_the_smaller_side(rows: int, d: int) -> None:
    values = nuclear_norm_diversity(matrix(50, rows, d))
    assert values.min() >= 1 - 1e-12
    assert values.max() <= math.sqrt(min(rows, d)) + 1e-12
    assert rows == 1 or values.min() < values.max()


def test_identical_members_have_the_value_of_one_of_them() -> None:
    a = orthonormal_rows(3, 20)
    assert nuclear_norm_diversity(torch.cat([a] * 5)).item() == pytest.approx(math.sqrt(3))
    b = matrix(3, 20)
    torch.testing.assert_close(
        nuclear_norm_diversity(torch.cat([b] * 5)), nuclear_norm_diversity(b)
    )


def test_members_in_directions_of_their_own_reach_the_root_of_all_ranks() -> None:
    rows = orthonormal_rows(15, 20)
    assert nuclear_norm_diversity(rows).item() == pytest.approx(math.sqrt(5 * 3))


def test_the_members_order_and_the_scale_do_not_count_but_their_likeness_does() -> None:
    members = [orthonormal_rows(2, 12, seed=k) for k in range(4)]
    value = nuclear_norm_diversity(torch.cat(members))
    torch.testing.assert_close(nuclear_norm_diversity(torch.cat(members[::-1])), value)
    torch.testing.assert_close(nuclear_norm_diversity(-1e3 * torch.cat(members)), value)
    nearer = [0.5 * (m + members[0]) for m in members]
    assert nuclear_norm_diversity(torch.cat(nearer)) < value - 0.1


def test_leading_axes_give_one_value_for_each_matrix() -> None:
    stack = matrix(2, 3, 4, 6)
    values = nuclear_norm_diversity(stack)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values[1, 2], nuclear_norm_diversity(stack[1, 2]))


def test_the_gradient_is_that_of_the_quotient() -> None:
    a = matrix(4, 6).requires_grad_()
    nuclear_norm_diversity(a).backward()
    left, values, right = torch.linalg.svd(a.detach(), full_matrices=False)
    norm = values.square().sum().sqrt()
    expected = left @ right / norm - values.sum() / norm**3 * a.detach()
    torch.testing.assert_close(a.grad, expected)


def test_equal_singular_values_and_zeros_have_finite_gradients() -> None:
    for a in (torch.eye(3), torch.cat([torch.eye(3)] * 2), torch.zeros(2, 3)):
        a.requires_grad_()
        value = nuclear_norm_diversity(a)
        value.backward()
        assert a.grad.isfinite().all()
    assert value.item() == 0.0  # the zeros


def test_half_precision_is_computed_in_float32() -> None:
    a = matrix(5, 8).bfloat16()
    value = nuclear_norm_diversity(a)
    assert value.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(nuclear_norm_diversity(a), value)
    torch.testing.assert_close(value, nuclear_norm_diversity(a.double()).float())
