import math

import pytest
import torch
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from trueward.evaluate.calibration import (
    brier_score,
    expected_calibration_error,
    mean_ranks,
    reliability_curve,
    scaled_margins,
    spearman,
    uncertainty_auroc,
)


def sample(seed: int, size: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(size, generator=generator)
    outcomes = torch.randint(2, (size,), generator=generator)
    return probabilities, outcomes


def test_calibration_error_by_hand() -> None:
    # Bin [0, .5): mean .2, frequency 0; bin [.5, 1]: mean .8, frequency 2/3.
    probabilities = torch.tensor([0.1, 0.3, 0.7, 0.8, 0.9], dtype=torch.float64)
    outcomes = torch.tensor([0, 0, 1, 0, 1])
    error = expected_calibration_error(probabilities, outcomes, bins=2)
    assert error == pytest.approx((2 * 0.2 + 3 * (0.8 - 2 / 3)) / 5)


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_error_agrees_with_torchmetrics(bins: int, seed: int) -> None:
    probabilities, outcomes = sample(seed)
    theirs = float(binary_calibration_error(probabilities, outcomes, n_bins=bins, norm="l1"))
    assert expected_calibration_error(probabilities, outcomes, bins=bins) == pytest.approx(
        theirs, abs=1e-5
    )


def test_calibration_error_uses_fifteen_bins_unless_told() -> None:
    probabilities, outcomes = sample(3)
    default = expected_calibration_error(probabilities, outcomes)
    assert default == expected_calibration_error(probabilities, outcomes, bins=15)
    assert default != expected_calibration_error(probabilities, outcomes, bins=14)


def test_honest_probabilities_have_almost_no_calibration_error() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200_000, generator=generator)
    outcomes = torch.rand(200_000, generator=generator) < probabilities
    assert expected_calibration_error(probabilities, outcomes) < 0.005
    assert expected_calibration_error(1 - probabilities, outcomes) > 0.4


def test_chosen_against_ones_is_one_minus_the_mean_probability() -> None:
    # The trap in the docstring: in this framing calibration is not measured at all.
    probabilities, _ = sample(0)
    error = expected_calibration_error(probabilities, torch.ones_like(probabilities))
    assert error == pytest.approx(1 - float(probabilities.mean()), abs=1e-6)


def test_every_bin_holds_its_lower_edge_and_the_last_one_holds_one() -> None:
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    curve = reliability_curve(edges, torch.zeros(11), bins=10)
    assert curve.count.tolist() == [1] * 9 + [2]
    assert curve.centres.tolist() == pytest.approx([0.05 + 0.1 * i for i in range(10)])


def test_reliability_curve_by_hand() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.9], dtype=torch.float64)
    curve = reliability_curve(probabilities, torch.tensor([0.5, 1.0, 0.0]), bins=3)
    assert curve.count.tolist() == [2, 0, 1]
    assert curve.confidence[[0, 2]].tolist() == pytest.approx([0.15, 0.9])
    assert curve.frequency[[0, 2]].tolist() == pytest.approx([0.75, 0.0])
    assert curve.confidence[1].isnan()
    assert curve.frequency[1].isnan()


def test_brier_score_by_hand() -> None:
    score = brier_score(torch.tensor([0.8, 0.5]), torch.tensor([True, False]))
    assert score == pytest.approx((0.04 + 0.25) / 2)


def test_largest_scaled_margin_has_the_confidence_asked_for() -> None:
    scaled = scaled_margins(torch.tensor([1.0, -4.0, 0.0]))
    assert float(scaled[1].sigmoid()) == pytest.approx(0.01, abs=1e-6)
    assert scaled.tolist() == pytest.approx([math.log(99) / 4, -math.log(99), 0.0], abs=1e-5)
    other = scaled_margins(torch.tensor([1.0, -4.0]), largest_confidence=0.9)
    assert float(other[1]) == pytest.approx(-math.log(9), abs=1e-5)
    assert scaled_margins(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_ties_share_the_mean_of_their_ranks() -> None:
    ranks = mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0]))
    assert ranks.tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_spearman_agrees_with_torchmetrics_with_and_without_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator)
    y = x + torch.randn(200, generator=generator)
    for a, b in ((x, y), (x.round(), y.round()), (x, -(y**3))):
        assert spearman(a, b) == pytest.approx(float(spearman_corrcoef(a, b)), abs=1e-5)


def test_spearman_is_one_for_any_increasing_map_and_nan_for_a_constant() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.1])
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert math.isnan(spearman(x, torch.ones(4)))


def test_auroc_by_hand_with_a_tie() -> None:
    # Pairs (in, out): 1<2 1<3 2=2 2<3 -> 3.5 of 4.
    assert uncertainty_auroc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == 0.875
    assert uncertainty_auroc(torch.zeros(3), torch.ones(2)) == 1.0
    assert uncertainty_auroc(torch.ones(2), torch.zeros(3)) == 0.0
    assert uncertainty_auroc(torch.zeros(3), torch.zeros(2)) == 0.5


def test_auroc_agrees_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    inside, outside = (
        torch.rand(80, generator=generator),
        torch.rand(50, generator=generator) ** 0.7,
    )
    labels = torch.cat([torch.zeros(80), torch.ones(50)]).int()
    theirs = float(binary_auroc(torch.cat([inside, outside]), labels))
    assert uncertainty_auroc(inside, outside) == pytest.approx(theirs, abs=1e-6)


def test_bad_input_is_named() -> None:
    half, nan = torch.tensor([0.5]), torch.tensor([0.5, math.nan])
    with pytest.raises(ValueError, match="same length"):
        expected_calibration_error(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\].*1\.5"):
        expected_calibration_error(torch.tensor([1.5]), half)
    with pytest.raises(ValueError, match="outcomes must lie"):
        brier_score(half, torch.tensor([-1]))
    with pytest.raises(ValueError, match="probabilities must lie"):
        brier_score(nan, torch.zeros(2))
    with pytest.raises(ValueError, match="bins"):
        reliability_curve(half, half, bins=0)
    with pytest.raises(ValueError, match="finite"):
        spearman(nan, torch.zeros(2))
    with pytest.raises(ValueError, match="length"):
        spearman(half, half)
    with pytest.raises(ValueError, match="at least one example"):
        uncertainty_auroc(half, torch.zeros(0))
    with pytest.raises(ValueError, match="finite"):
        uncertainty_auroc(half, nan)
    with pytest.raises(ValueError, match="largest_confidence"):
        scaled_margins(half, largest_confidence=0.5)
