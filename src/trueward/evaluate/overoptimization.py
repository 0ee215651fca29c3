"""Where does more optimisation of a proxy reward begin to hurt the gold reward?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """KL from the policy to its best-of-n: `log n - (n - 1) / n`, in nats.

    Exact for a continuous reward without ties, an upper bound otherwise. Gao et al. 2022
    (https://arxiv.org/abs/2210.10760); Beirami et al. 2024 (https://arxiv.org/abs/2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    return math.log(n) - (n - 1) / n


def best_of_n_sizes(samples: int) -> list[int]:
    """Return 1, 2, 3, 4, 6, 8, 12, ... and the number of samples itself: where curves are drawn."""
    powers = [2**k for k in range(samples.bit_length())]
    grid = {n for power in powers for n in (power, power * 3 // 2) if n <= samples}
    return sorted(grid | {samples})


def best_of_n_curve(
    proxy: Float[Tensor, "prompt sample"], gold: Float[Tensor, "prompt sample"], ns: Sequence[int]
) -> Float[Tensor, " n"]:
    """Expected gold reward of the proxy's favourite among n samples, averaged over the prompts.

    Args:
        proxy: The reward that picks; tied samples share the pick.
        gold: The reward of the same samples that is reported.
        ns: How many samples to choose from; each between 1 and the number of samples.

    Returns:
        One float64 value per n; see `best_of_n_curves_per_prompt` for the estimator.
    """
    return best_of_n_curves_per_prompt(proxy, gold, ns).mean(dim=0)


def best_of_n_curves_per_prompt(
    proxy: Float[Tensor, "prompt sample"], gold: Float[Tensor, "prompt sample"], ns: Sequence[int]
) -> Float[Tensor, "prompt n"]:
    """`best_of_n_curve` before the mean over prompts; its spread gives the curve's interval.

    The unbiased estimator, which is the exact mean over all subsets of size n of the N samples:
    `sum_{i=n}^N C(i-1, n-1) / C(N, n) gold_(i)`, where gold is in ascending order OF THE PROXY.
    Nakano et al. 2021, WebGPT (https://arxiv.org/abs/2112.09332). Samples with equal
    proxy rewards share the coefficients of their places equally, as if ties were broken by chance.
    """
    _require_rewards(proxy, gold, ns)
    samples = proxy.shape[1]
    order = proxy.argsort(dim=1)
    # Both are reordered: a gold reward left in its old place belongs to another sample.
    sorted_proxy, sorted_gold = proxy.gather(1, order), gold.double().gather(1, order)
    shared = _mean_over_ties(sorted_proxy, sorted_gold)
    coefficients = torch.stack([best_of_n_coefficients(samples, n) for n in ns], dim=1)
    return shared @ coefficients.to(shared.device)


def best_of_n_coefficients(samples: int, n: int) -> Float[Tensor, " sample"]:
    """Chance that each sample, in ascending order, is the best of a random subset of n.

    `C(i-1, n-1) / C(N, n)` for i = 1..N, in float64 through `lgamma`: the binomials themselves
    overflow from N of about 1,000.
    """
    if not 1 <= n <= samples:
        raise ValueError(f"n must lie between 1 and the number of samples {samples}, got {n}.")
    places = torch.arange(n, samples + 1, dtype=torch.float64)
    log_ways = torch.lgamma(places) - math.lgamma(n) - torch.lgamma(places - n + 1)
    # Softmax divides by sum_i C(i-1, n-1) = C(N, n), so that the sum is 1 to the last digit.
    return torch.cat([torch.zeros(n - 1, dtype=torch.float64), log_ways.softmax(dim=0)])


def _mean_over_ties(
    sorted_proxy: Float[Tensor, "prompt sample"], sorted_gold: Float[Tensor, "prompt sample"]
) -> Float[Tensor, "prompt sample"]:
    """Each gold value replaced by the mean over the samples with the same proxy reward."""
    first = torch.ones_like(sorted_proxy, dtype=torch.bool)
    first[:, 1:] = sorted_proxy[:, 1:] != sorted_proxy[:, :-1]
    group = first.cumsum(dim=1) - 1
    sums = torch.zeros_like(sorted_gold).scatter_add(1, group, sorted_gold)
    counts = torch.zeros_like(sorted_gold).scatter_add(1, group, torch.ones_like(sorted_gold))
    return sums.gather(1, group) / counts.gather(1, group)


@dataclass(frozen=True, kw_only=True)
class OveroptimizationSummary:
    """How a curve of gold rewards went: up to a peak, and how far down from there."""

    peak: float
    peak_index: int  # of the first point with the peak value
    final: float
    drop: float  # peak - final, never negative
    kl_at_peak: float


def overoptimization_summary(
    curve_gold: Float[Tensor, " point"], kl: Float[Tensor, " point"]
) -> OveroptimizationSummary:
    """Peak, end and drop of a gold-reward curve whose points are in order of optimisation."""
    _require_curve(kl, curve_gold)
    index = int(curve_gold.argmax())
    peak, final = float(curve_gold[index]), float(curve_gold[-1])
    return OveroptimizationSummary(
        peak=peak, peak_index=index, final=final, drop=peak - final, kl_at_peak=float(kl[index])
    )


@dataclass(frozen=True, kw_only=True)
class OveroptimizationLaw:
    """A law of Gao et al. 2022 fitted to a curve, with the peak that it predicts.

    Without a fall (`beta <= 0` and a rise) the peak lies at infinity; without a rise it is the
    start: `peak_kl = peak_gold = 0`. `peak_gold` counts from the initial policy's gold reward.
    """

    alpha: float
    beta: float
    peak_kl: float
    peak_gold: float
    rms_error: float  # of the fit, in units of the gold reward


def best_of_n_law(
    kl: Float[Tensor, " point"], *, alpha: float, beta: float
) -> Float[Tensor, " point"]:
    """Gold reward of best-of-n against KL: `d (alpha - beta d)`, `d = sqrt(KL)`.

    Gao et al. 2022 (https://arxiv.org/abs/2210.10760); 0 is the initial policy.
    """
    distance = kl.clamp(min=0).sqrt()
    return distance * (alpha - beta * distance)


def rl_law(kl: Float[Tensor, " point"], *, alpha: float, beta: float) -> Float[Tensor, " point"]:
    """Gold reward of reinforcement learning against KL: `d (alpha - beta log d)`, `d = sqrt(KL)`.

    Gao et al. 2022 (https://arxiv.org/abs/2210.10760); 0 is the initial policy.
    """
    distance = kl.clamp(min=0).sqrt()
    return alpha * distance - beta * torch.xlogy(distance, distance)


def fit_best_of_n_law(
    kl: Float[Tensor, " point"], gold: Float[Tensor, " point"], *, initial_gold: float = 0.0
) -> OveroptimizationLaw:
    """Least-squares fit of `gold - initial_gold = d (alpha - beta d)`, `d = sqrt(KL)`.

    Predicted peak: `d = alpha / (2 beta)`, of height `alpha^2 / (4 beta)`.

    Args:
        kl: KL from the initial policy, in nats; slightly negative estimates count as 0.
        gold: Gold reward at each point.
        initial_gold: Gold reward of the initial policy; the law is 0 there.
    """
    alpha, beta, rms = _fit_law(kl, gold, initial_gold, rl=False)
    if alpha <= 0 and beta >= 0:
        peak_distance, peak_gold = 0.0, 0.0
    elif beta <= 0:
        peak_distance, peak_gold = math.inf, math.inf
    else:
        peak_distance, peak_gold = alpha / (2 * beta), alpha**2 / (4 * beta)
    return OveroptimizationLaw(
        alpha=alpha, beta=beta, peak_kl=peak_distance**2, peak_gold=peak_gold, rms_error=rms
    )


def fit_rl_law(
    kl: Float[Tensor, " point"], gold: Float[Tensor, " point"], *, initial_gold: float = 0.0
) -> OveroptimizationLaw:
    """Least-squares fit of `gold - initial_gold = d (alpha - beta log d)`, `d = sqrt(KL)`.

    Predicted peak: `d = exp(alpha / beta - 1)`, of height `beta d`. Arguments as in
    `fit_best_of_n_law`.
    """
    alpha, beta, rms = _fit_law(kl, gold, initial_gold, rl=True)
    if beta > 0:
        peak_distance = _exp(alpha / beta - 1)
        peak_gold = beta * peak_distance
    elif beta == 0 and alpha <= 0:
        peak_distance, peak_gold = 0.0, 0.0
    else:
        peak_distance, peak_gold = math.inf, math.inf
    return OveroptimizationLaw(
        alpha=alpha, beta=beta, peak_kl=peak_distance**2, peak_gold=peak_gold, rms_error=rms
    )


def _fit_law(
    kl: Float[Tensor, " point"], gold: Float[Tensor, " point"], initial_gold: float, *, rl: bool
) -> tuple[float, float, float]:
    """Alpha, beta and the root mean square error; both laws are linear in alpha and beta."""
    _require_curve(kl, gold)
    distance = kl.double().cpu().clamp(min=0).sqrt()
    if torch.unique(distance[distance > 0]).numel() < 2:
        raise ValueError(
            "two parameters need at least two different positive KLs, got "
            f"{kl.tolist() if kl.numel() < 5 else f'{kl.numel()} points without them'}."
        )
    falling = torch.xlogy(distance, distance) if rl else distance.square()
    design = torch.stack([distance, -falling], dim=1)
    target = gold.double().cpu() - initial_gold
    solution = torch.linalg.lstsq(design, target[:, None]).solution[:, 0]
    rms = (design @ solution - target).square().mean().sqrt()
    return float(solution[0]), float(solution[1]), float(rms)


def _exp(value: float) -> float:
    return math.exp(value) if value < 350 else math.inf  # its square must be a float too


def _require_rewards(proxy: Tensor, gold: Tensor, ns: Sequence[int]) -> None:
    if proxy.shape != gold.shape or proxy.numel() == 0:
        raise ValueError(
            "proxy and gold must have the same shape [prompt, sample] and must not be empty, got "
            f"{tuple(proxy.shape)} and {tuple(gold.shape)}."
        )
    if len(ns) == 0:
        raise ValueError("ns must name at least one n, got none.")
    for name, values in (("proxy", proxy), ("gold", gold)):
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"{name} must be finite, got {int((~values.isfinite()).sum())} values that are "
                "NaN or infinite; leave those samples out."
            )


def _require_curve(kl: Tensor, gold: Tensor) -> None:
    if kl.shape != gold.shape or kl.numel() == 0:
        raise ValueError(
            f"KL and gold must have the same length, at least 1; got {kl.numel()} and "
            f"{gold.numel()}."
        )
    if not bool(kl.isfinite().all() and gold.isfinite().all()):
        raise ValueError("KL and gold must be finite, got NaN or an infinity.")
