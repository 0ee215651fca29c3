import math

import pytest

from trueward.evaluate.comparison import Estimate
from trueward.report.numbers import (
    Cell,
    column_decimals,
    decimal,
    format_number,
    interval_text,
    is_number_column,
    share_text,
    sort_key,
)


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        (None, None, "–"),
        ("as it is", None, "as it is"),
        (True, None, "yes"),
        (12345, None, "12345"),
        (-3, None, "−3"),
        (0.12345, None, "0.123"),
        (12.345, None, "12.35"),
        (1234.56, None, "1234.6"),
        (0.00012, None, "1.20e−04"),
        (2.5e7, None, "2.50e+07"),
        (-0.0, 3, "0.000"),
        (0.0, None, "0"),
        (1.0, 2, "1.00"),
        (0.0001, 3, "1.00e−04"),  # never 0.000 for what is not zero
        (math.nan, 3, "NaN"),
        (-math.inf, None, "−∞"),
    ],
)
def test_numbers_are_printed_for_reading(value: Cell, decimals: int | None, expected: str) -> None:
    assert format_number(value, decimals) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([0.5, -9.0], 3),
        ([0.5, 10.0], 2),
        ([99.5, 100.0], 1),
        ([1, 2], None),  # whole numbers have none
        ([1e-5, 1.0], None),  # too far apart for one
        ([math.nan, None, "a"], None),
    ],
)
def test_the_numbers_of_a_column_share_their_decimals(
    cells: list[Cell], expected: int | None
) -> None:
    assert column_decimals(cells) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([1, 2.5, None], True),
        (["0.61 ± 0.02", "−0.2 [-0.3, -0.1]"], True),
        (["[0.84, 0.86]"], True),
        (["01_sft", "02_reward"], False),
        (["7 methods"], False),
        (["1.5", "no fit", "–"], True),
        (["no fit"], False),
        ([1.0, "none"], False),
        ([None, ""], False),
        ([], False),
    ],
)
def test_a_column_of_numbers_is_told_from_one_of_names(cells: list[Cell], expected: bool) -> None:
    assert is_number_column(cells) is expected


@pytest.mark.parametrize(
    ("cell", "numeric", "expected"),
    [
        ("−0.61 ± 0.02", True, "-0.61"),
        ("63 [55, 71]", True, "63"),
        ("no fit", True, ""),  # goes last
        ("no fit", False, "no fit"),
        (None, True, ""),
        (math.nan, True, ""),
        (math.inf, True, "Infinity"),
        (2, True, "2"),
    ],
)
def test_cells_are_sorted_by_their_leading_number(cell: Cell, numeric: bool, expected: str) -> None:
    assert sort_key(cell, numeric=numeric) == expected


def test_small_negative_numbers_are_zero_and_nan_is_nothing() -> None:
    assert decimal(-0.004, 2) == "0.00"
    assert decimal(-1.5, 1) == "−1.5"
    assert decimal(math.nan, 1) is None
    assert decimal(2e7, 1) == 2e7


def test_an_interval_is_half_its_width_beside_the_mean() -> None:
    assert interval_text(Estimate(mean=-1.0, low=-1.5, high=-0.5)) == "−1.00 ± 0.50"
    assert interval_text(Estimate(mean=150.0, low=148.0, high=152.0)) == "150.0 ± 2.0"
    assert interval_text(Estimate(mean=-0.001)) == "0.00"
    assert interval_text(Estimate(mean=math.nan)) is None
    assert interval_text(None) is None


def test_a_shares_interval_is_written_with_both_ends() -> None:
    assert share_text(0.96, 0.85, 1.0) == "96 [85, 100]"
    assert share_text(0.5, math.nan, math.nan) == "50"
    assert share_text(math.nan, math.nan, math.nan) is None
