"""The one check that every equivalence makes."""

from collections.abc import Sequence


def require_one_each(**columns: Sequence[object]) -> None:
    """Refuse lists of different lengths: `zip` would silently drop the longer one's end."""
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise ValueError(f"The lists must be equally long, got {got}.")
