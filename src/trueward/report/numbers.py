"""Numbers as text: in tables, on pages and on the terminal."""

import math
import re
from collections.abc import Sequence

from trueward.evaluate.comparison import Estimate

Cell = str | float | int | None
NO_FIT = "no fit"
_NOTHING = ("", "–", NO_FIT)  # what a column of numbers may hold for want of one


def format_number(value: Cell, decimals: int | None = None) -> str:
    """Return a number as it is printed: 3 decimals or 3 digits unless told, a true minus sign."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        text = str(value)
    elif not math.isfinite(value):
        text = "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    elif value == 0:
        text = "0" if decimals is None else f"{0:.{decimals}f}"  # never -0.000
    elif decimals is not None and abs(value) >= 0.5 * 10**-decimals:
        text = f"{value:.{decimals}f}"
    elif abs(value) < 1e-3 or abs(value) >= 1e6:
        text = f"{value:.2e}"
    else:
        text = f"{value:.{_decimals(abs(value))}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def column_decimals(cells: Sequence[Cell]) -> int | None:
    """Return how many decimals suit all numbers of a column; None where each needs its own.

    The largest number gets about four digits; a column over many orders of magnitude has none.
    """
    sizes = [abs(c) for c in cells if isinstance(c, float) and math.isfinite(c) and c != 0]
    if not sizes or max(sizes) >= 1e6 or max(sizes) < 1e-2 or min(sizes) < max(sizes) * 1e-4:
        return None
    return _decimals(max(sizes))


def is_number_column(cells: Sequence[Cell]) -> bool:
    """Whether all that a column holds are numbers, `0.61 ± 0.02` and `0.61 [0.59, 0.63]` too."""
    held = [c for c in cells if c is not None and c not in _NOTHING]
    return bool(held) and all(not isinstance(c, str) or _NUMBERS.fullmatch(c) for c in held)


def sort_key(cell: Cell, *, numeric: bool) -> str:
    """Return what a cell of a (numeric) column is sorted by; what is empty goes last."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, str):
        if not numeric:
            return cell
        found = _LEADING.match(cell)
        return found[1].replace("\N{MINUS SIGN}", "-") if found else ""
    if isinstance(cell, float) and math.isinf(cell):
        return "Infinity" if cell > 0 else "-Infinity"
    return repr(cell)


def decimal(value: float, decimals: int) -> Cell:
    """Return a number with these decimals, nothing for NaN; never -0.00, and a true minus sign."""
    if abs(value) >= 1e6:
        return value
    if not math.isfinite(value):
        return None
    text = f"{value:.{decimals}f}"
    text = text if float(text) else f"{0:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval_text(estimate: Estimate | None) -> Cell:
    """Return `0.61 ± 0.02`, without the interval where there is none."""
    if estimate is None or math.isnan(estimate.mean):
        return None
    decimals = 2 if abs(estimate.mean) < 100 else 1
    text = decimal(estimate.mean, decimals)
    half = decimal(estimate.half_width, decimals)
    return text if half is None else f"{text} ± {half}"


def share_text(mean: float, low: float, high: float) -> Cell:
    """Return a share in per cent, `63 [55, 71]`, without the interval where there is none."""
    text = decimal(100 * mean, 0)
    if not (math.isfinite(low) and math.isfinite(high)):
        return text
    return f"{text} [{100 * low:.0f}, {100 * high:.0f}]"


_LEADING = re.compile(r"[\s\[(]*([+\-−]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)
_NUMBERS = re.compile(_LEADING.pattern + r"[\d.,;\s±\[\]()%/e+\-–−]*", re.IGNORECASE)


def _decimals(size: float) -> int:
    return 3 if size < 10 else 2 if size < 100 else 1
