import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from trueward.evaluate.overoptimization import (
    best_of_n_coefficients,
    best_of_n_curve,
    best_of_n_curves_per_prompt,
    best_of_n_kl,
    best_of_n_law,
    best_of_n_sizes,
    fit_best_of_n_law,
    fit_rl_law,
    overoptimization_summary,
    rl_law,
)

GOLDEN_KL = {
    1: 0.0,
    2: 0.193147,
    4: 0.636294,
    8: 1.204442,
    16: 1.835089,
    64: 3.174508,
    256: 4.549084,
    1000: 5.908755,
    12500: 8.433564,
    60000: 10.002117,
}


@pytest.mark.parametrize(("n", "kl"), GOLDEN_KL.items())
def test_best_of_n_kl_golden(n: int, kl: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(kl, abs=5e-7)


def by_brute_force(proxy: list[float], gold: list[float], n: int) -> float:
    """Mean over every subset of size n of the mean gold of its proxy-best members."""
    picks = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        tied = [gold[i] for i in subset if proxy[i] == best]
        picks.append(sum(tied) / len(tied))
    return sum(picks) / len(picks)


@pytest.mark.parametrize(
    "proxy",
    [
        [0.3, -1.0, 2.5, 0.7, -0.2, 1.1, 0.0],
        [1.0, 0.0, 1.0, 2.0, 2.0, 0.0, 1.0],  # ties below and at the top
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [5.0, 5.0, 5.0, 1.0, 2.0, 3.0, 4.0],
    ],
)
def test_curve_is_the_mean_over_all_subsets(proxy: list[float]) -> None:
    gold = [0.5, -2.0, 1.0, 3.0, -1.5, 0.25, 0.5]
    ns = list(range(1, 8))
    curve = best_of_n_curve(torch.tensor([proxy]), torch.tensor([gold]), ns)
    expected = [by_brute_force(proxy, gold, n) for n in ns]
    assert curve.tolist() == pytest.approx(expected, abs=1e-12)


def test_two_samples_by_hand() -> None:
    proxy, gold = torch.tensor([[2.0, 1.0]]), torch.tensor([[10.0, 20.0]])
    assert best_of_n_curve(proxy, gold, [1, 2]).tolist() == [15.0, 10.0]
    assert best_of_n_curve(torch.ones(1, 2), gold, [2]).tolist() == [15.0]


def test_gold_follows_the_order_of_the_proxy() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(3, 50, generator=generator)
    gold = torch.randn(3, 50, generator=generator)
    curves = best_of_n_curves_per_prompt(proxy, gold, [1, 50])
    torch.testing.assert_close(curves[:, 0], gold.double().mean(dim=1))
    torch.testing.assert_close(curves[:, 1], gold.double()[torch.arange(3), proxy.argmax(dim=1)])


def test_order_of_the_samples_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    proxy = torch.randn(2, 30, generator=generator).round()
    gold = torch.randn(2, 30, generator=generator)
    places = torch.randperm(30, generator=generator)
    torch.testing.assert_close(
        best_of_n_curve(proxy, gold, [1, 4, 16]),
        best_of_n_curve(proxy[:, places], gold[:, places], [1, 4, 16]),
    )


def test_curve_is_the_mean_of_the_prompts_curves() -> None:
    generator = torch.Generator().manual_seed(2)
    proxy, gold = torch.randn(2, 5, 20, generator=generator)
    per_prompt = best_of_n_curves_per_prompt(proxy, gold, [1, 3, 20])
    assert per_prompt.shape == (5, 3)
    for i in range(5):
        alone = best_of_n_curve(proxy[i : i + 1], gold[i : i + 1], [1, 3, 20])
        torch.testing.assert_close(per_prompt[i], alone)
    torch.testing.assert_close(best_of_n_curve(proxy, gold, [1, 3, 20]), per_prompt.mean(dim=0))


@pytest.mark.parametrize("samples", [1, 5, 4096, 12600, 60000])
def test_coefficients_sum_to_one_and_never_fall(samples: int) -> None:
    for n in {1, (samples + 1) // 2, samples}:
        coefficients = best_of_n_coefficients(samples, n)
        assert float(coefficients.sum()) == pytest.approx(1.0, abs=1e-12)
        assert bool((coefficients.diff() >= 0).all())
        assert bool((coefficients[: n - 1] == 0).all())


def test_coefficients_by_hand() -> None:
    # C(i-1, 1) / C(4, 2): 0, 1, 2, 3 of 6.
    assert best_of_n_coefficients(4, 2).tolist() == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2])
    # The best of all 4096 has chance n / N of being among n.
    assert float(best_of_n_coefficients(4096, 100)[-1]) == pytest.approx(100 / 4096, rel=1e-9)


def toy_rewards() -> tuple[dict[str, Tensor], Tensor]:
    generator = np.random.default_rng(0)
    golds, mus, stds = [], [], []
    for _ in range(64):
        ood = generator.random(4096) < 0.05
        gold = generator.normal(size=4096) + np.where(ood, -1.0, 0)
        s = np.where(ood, 3.0, 0.6)
        mus.append(gold + s * generator.normal(size=(5, 4096)))
        stds.append(np.abs(s * (1 + 0.2 * generator.normal(size=(5, 4096)))))
        golds.append(gold)
    mu, std = torch.tensor(np.stack(mus, axis=1)), torch.tensor(np.stack(stds, axis=1))
    nominal = mu.gather(0, std.argmin(dim=0, keepdim=True))[0]
    minimum = mu.amin(dim=0)
    proxies = {
        "single": mu[0],
        "nominal": nominal,
        "mean": mu.mean(dim=0),
        "min": minimum,
        "uwo": mu.mean(dim=0) - 0.5 * mu.var(dim=0, correction=0),
        "mix .2": 0.2 * nominal + 0.8 * minimum,
        "mix .4": 0.4 * nominal + 0.6 * minimum,
    }
    return proxies, torch.tensor(np.stack(golds))


TOY = {
    "single": [-0.048, 0.792, 1.256, 1.258, 0.635, -0.111, -0.233],
    "nominal": [-0.048, 0.792, 1.254, 1.245, 0.573, -0.109, -0.097],
    "mean": [-0.048, 0.944, 1.633, 2.132, 2.463, 2.604, 2.617],
    "min": [-0.048, 0.923, 1.625, 2.179, 2.647, 3.063, 3.449],
    "uwo": [-0.048, 0.954, 1.671, 2.230, 2.696, 3.091, 3.472],
    "mix .2": [-0.048, 0.930, 1.635, 2.188, 2.653, 3.065, 3.490],
    "mix .4": [-0.048, 0.924, 1.620, 2.159, 2.594, 2.933, 3.175],
}


def test_best_of_n_over_optimisation_toy() -> None:
    proxies, gold = toy_rewards()
    ns = [1, 4, 16, 64, 256, 1024, 4000]
    curves = {name: best_of_n_curve(proxy, gold, ns) for name, proxy in proxies.items()}
    for name, curve in curves.items():
        assert curve.tolist() == pytest.approx(TOY[name], abs=6e-4), name
    kl = torch.tensor([best_of_n_kl(n) for n in ns])
    single = overoptimization_summary(curves["single"], kl)
    assert single.kl_at_peak == pytest.approx(3.17, abs=0.01)
    assert single.drop == pytest.approx(1.258 + 0.233, abs=2e-3)
    for name in ("min", "uwo", "mix .2", "mix .4"):
        assert bool((curves[name].diff() > 0).all()), name
        assert overoptimization_summary(curves[name], kl).drop == 0.0


def test_summary_by_hand() -> None:
    summary = overoptimization_summary(
        torch.tensor([0.0, 2.0, 3.0, 3.0, -1.0]), torch.tensor([0.0, 0.5, 1.5, 2.0, 4.0])
    )
    assert (summary.peak, summary.peak_index, summary.final) == (3.0, 2, -1.0)
    assert (summary.drop, summary.kl_at_peak) == (4.0, 1.5)


def test_laws_by_hand() -> None:
    kl = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert best_of_n_law(kl, alpha=3.0, beta=0.5).tolist() == [0.0, 2 * (3 - 1)]
    assert rl_law(kl, alpha=3.0, beta=0.5).tolist() == pytest.approx([0, 2 * (3 - math.log(2) / 2)])


KL = torch.tensor([0.0, 0.2, 0.6, 1.2, 1.8, 3.2, 4.5, 5.9], dtype=torch.float64)


@pytest.mark.parametrize("start", [0.0, -2.5])
def test_fit_finds_the_best_of_n_law_again(start: float) -> None:
    gold = best_of_n_law(KL, alpha=1.4, beta=0.35) + start
    law = fit_best_of_n_law(KL, gold, initial_gold=start)
    assert (law.alpha, law.beta) == (pytest.approx(1.4), pytest.approx(0.35))
    assert law.peak_kl == pytest.approx(4.0)  # (1.4 / .7)^2
    assert law.peak_gold == pytest.approx(1.4)  # 1.96 / 1.4
    assert law.rms_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_fit_finds_the_rl_law_again(start: float) -> None:
    gold = rl_law(KL, alpha=0.9, beta=0.6) + start
    law = fit_rl_law(KL, gold, initial_gold=start)
    assert (law.alpha, law.beta) == (pytest.approx(0.9), pytest.approx(0.6))
    assert law.peak_kl == pytest.approx(math.exp(0.5) ** 2)
    assert law.peak_gold == pytest.approx(0.6 * math.exp(0.5))
    assert law.rms_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("law", "fit"), [(best_of_n_law, fit_best_of_n_law), (rl_law, fit_rl_law)])
def test_predicted_peak_is_the_law_s_maximum(
    law: Callable[..., Tensor], fit: Callable[..., object]
) -> None:
    grid = torch.linspace(0.001, 20, 20001, dtype=torch.float64)
    values = law(grid, alpha=1.1, beta=0.5)
    fitted = fit(KL, law(KL, alpha=1.1, beta=0.5))
    assert float(values.max()) == pytest.approx(fitted.peak_gold, abs=1e-6)
    assert float(grid[values.argmax()]) == pytest.approx(fitted.peak_kl, abs=2e-3)


def test_rms_error_is_in_units_of_gold() -> None:
    # Residuals (1, -1, 1, -1) * .1, made orthogonal to nothing: the fit can only make them less.
    noise = 0.1 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1], dtype=torch.float64)
    law = fit_best_of_n_law(KL, best_of_n_law(KL, alpha=1.4, beta=0.35) + noise)
    assert 0.05 < law.rms_error <= 0.1


def test_a_law_without_a_fall_peaks_at_infinity() -> None:
    rising = fit_best_of_n_law(KL, best_of_n_law(KL, alpha=1.0, beta=-0.1))
    assert (rising.peak_kl, rising.peak_gold) == (math.inf, math.inf)
    rising = fit_rl_law(KL, rl_law(KL, alpha=1.0, beta=-0.1))
    assert (rising.peak_kl, rising.peak_gold) == (math.inf, math.inf)


def test_a_law_without_a_rise_peaks_at_the_start() -> None:
    falling = fit_best_of_n_law(KL, best_of_n_law(KL, alpha=-1.0, beta=0.1))
    assert (falling.peak_kl, falling.peak_gold) == (0.0, 0.0)


def test_an_rl_law_that_hardly_bends_does_not_overflow() -> None:
    law = fit_rl_law(KL, rl_law(KL, alpha=1.0, beta=1e-5))
    assert (law.peak_kl, law.peak_gold) == (math.inf, math.inf)


def test_bad_input_is_named() -> None:
    ones = torch.ones(1, 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n_kl(0)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"number of samples 3, got {n}"):
            best_of_n_curve(ones, ones, [n])
    with pytest.raises(ValueError, match="at least one n"):
        best_of_n_curve(ones, ones, [])
    with pytest.raises(ValueError, match="gold must be finite, got 1"):
        best_of_n_curve(ones, torch.tensor([[1.0, math.nan, 0.0]]), [1])
    with pytest.raises(ValueError, match="must not be empty"):
        best_of_n_curve(torch.ones(1, 0), torch.ones(1, 0), [1])
    with pytest.raises(ValueError, match="two different positive KLs"):
        fit_best_of_n_law(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        overoptimization_summary(torch.tensor([math.nan]), torch.zeros(1))
    with pytest.raises(ValueError, match="same length"):
        fit_rl_law(torch.zeros(0), torch.zeros(0))


def test_the_sizes_of_a_curve_end_with_all_samples() -> None:
    assert best_of_n_sizes(2) == [1, 2]
    assert best_of_n_sizes(11) == [1, 2, 3, 4, 6, 8, 11]
    assert best_of_n_sizes(16) == [1, 2, 3, 4, 6, 8, 12, 16]
