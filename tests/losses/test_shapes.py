import pytest
import torch

from trueward.losses.shapes import require_same_shape


def test_equal_shapes_pass() -> None:
    require_same_shape()
    require_same_shape(left=torch.zeros(2, 3), right=torch.ones(2, 3, dtype=torch.bool))


def test_the_error_names_every_tensor_and_its_shape() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got left \(3,\), right \(3, 1\)\."):
        require_same_shape(left=torch.zeros(3), right=torch.zeros(3, 1))
