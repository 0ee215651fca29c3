"""The one check that every loss makes."""

from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse tensors whose shapes differ: `[n]` with `[n, 1]` would silently become `[n, n]`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        came = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these must have one shape, got {came}.")
