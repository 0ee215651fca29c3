"""What papers claim, and what would have to be seen here: contrasts, each with its bound.

They stand here, apart from what measures them (`lab.evidence`), so that they can be read (and
dated) before the numbers are there.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A number for each seed, and where its mean is claimed to lie.

    `kind`: `end` is gold at the end of `method`, less that of `less` where it is given; `drop` is
    how far gold at the end lies below gold at the peak, the peak's place being that of the mean
    over the other seeds, so that it is not chosen by the seed's own luck; `agreement` is that of
    the reward with gold on the answers of `whose[0]`, less that on those of `whose[1]`.
    """

    words: str
    results: str  # name of the stored comparison
    kind: Literal["end", "drop", "agreement"]
    method: str
    less: str = ""
    whose: tuple[str, str] = ("", "")
    above: float | None = None  # the claim: the mean lies above; or `below`
    below: float | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says, and what would have to be seen here."""

    name: str
    claim: str
    source: str
    contrasts: tuple[Contrast, ...]


# A drop is claimed above 0 of what is said to fall, below a quarter of a standard deviation of what
# is said not to: between the two either holds, in the papers' favour.
_FALLS, _NO_FALL = 0.0, 0.25
GRAMMAR, _NOISY, _RLP = "compare_grammar", "compare_noisy", "compare_rlp"
_COSTE = "Coste et al. 2024 ([2310.02743](https://arxiv.org/abs/2310.02743))"
_GAO = "Gao et al. 2022 ([2210.10760](https://arxiv.org/abs/2210.10760))"
_ROBUST = "Yan et al. 2024 ([2409.15360](https://arxiv.org/abs/2409.15360))"
_WARM = "Ramé et al. 2024 ([2401.12187](https://arxiv.org/abs/2401.12187))"
_LANG = "Lang et al. 2024 ([2403.19279](https://arxiv.org/abs/2403.19279))"


def _end(words: str, method: str, less: str, results: str = GRAMMAR) -> Contrast:
    return Contrast(words=words, results=results, kind="end", method=method, less=less, above=0.0)


def _drop(
    words: str,
    method: str,
    results: str = GRAMMAR,
    *,
    above: float | None = None,
    below: float | None = None,
) -> Contrast:
    return Contrast(
        words=words, results=results, kind="drop", method=method, above=above, below=below
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="single falls",
        claim="A single reward is over-optimised",
        source=f"{_GAO}; {_COSTE}",
        contrasts=(
            _drop("trained without a KL penalty, from the peak", "single", above=_FALLS),
            _drop("best of 256, from the peak", "bon_single", above=_FALLS),
            _drop("trained, noisy labels", "single", _NOISY, above=_FALLS),
            _drop("best of 256, noisy labels", "bon_single", _NOISY, above=_FALLS),
        ),
    ),
    Claim(
        name="gold does not",
        claim="Gold itself as the reward is not over-optimised (control)",
        source="by definition",
        contrasts=(
            _drop("trained without a KL penalty", "gold", below=_NO_FALL),
            _drop("best of 256", "bon_gold", below=_NO_FALL),
        ),
    ),
    Claim(
        name="minima, best of n",
        claim="The worst case, UWO and the mix are not over-optimised in best-of-n, and beat a "
        "single reward",
        source=f"{_COSTE} for the worst case and UWO; {_ROBUST} for the mix, there in PPO",
        contrasts=(
            _drop("drop of the worst case", "bon_mix_0", below=_NO_FALL),
            _drop("drop of UWO", "bon_uwo", below=_NO_FALL),
            _drop("drop of the mix of weight 0.4", "bon_mix_4", below=_NO_FALL),
            _end("the worst case less a single reward", "bon_mix_0", "bon_single"),
            _end("UWO less a single reward", "bon_uwo", "bon_single"),
            _end("the mix 0.4 less a single reward", "bon_mix_4", "bon_single"),
        ),
    ),
    Claim(
        name="minima, trained",
        claim="Trained without a KL penalty, the worst case, UWO and the mix beat a single reward",
        source=f"{_COSTE} for the worst case and UWO; {_ROBUST} for the mix",
        contrasts=(
            _end("the worst case less a single reward", "worst_case", "single"),
            _end("UWO less a single reward", "uwo", "single"),
            _end("the mix 0.4 less a single reward", "mix_4", "single"),
            _end("the mix 0.4 less a single reward, noisy labels", "mix_4", "single", _NOISY),
            _drop("drop of the mix 0.4", "mix_4", below=_NO_FALL),
        ),
    ),
    Claim(
        name="noise",
        claim="Under label noise an ensemble's mean is over-optimised in best-of-n, and ends below "
        "its worst case and UWO",
        source=f"{_COSTE}, in best-of-n",
        contrasts=(
            _drop("drop of the mean, best of 256", "bon_mean", _NOISY, above=_FALLS),
            _end("worst case less mean, best of 256", "bon_worst", "bon_mean", _NOISY),
            _end("UWO less mean, best of 256", "bon_uwo", "bon_mean", _NOISY),
            _end("worst case less mean, trained", "worst_case", "mean", _NOISY),
            _end("UWO less mean, trained", "uwo", "mean", _NOISY),
        ),
    ),
    Claim(
        name="small KL",
        claim="With an ensemble a small KL coefficient is enough",
        source=f"{_COSTE}; there KL 0.01, PPO and UWO 0.1",
        contrasts=(
            _drop("drop of the worst case at KL 0.02", "worst_kl_small", below=_NO_FALL),
            _drop("drop of UWO at KL 0.02", "uwo_kl_small", below=_NO_FALL),
            _end("worst case less single, both at 0.02", "worst_kl_small", "single_kl_small"),
            _end("UWO less single, both at 0.02", "uwo_kl_small", "single_kl_small"),
        ),
    ),
    Claim(
        name="mix",
        claim="Nominal weights of 0.2 and 0.4 beat both ends: the worst case, and the nominal "
        "reward or the mean",
        source=f"{_ROBUST}, of training by PPO; both ends are our reading of its Eq. 7",
        contrasts=(
            _end("0.2 less the worst case, best of 256", "bon_mix_2", "bon_mix_0"),
            _end("0.2 less the nominal reward, best of 256", "bon_mix_2", "bon_mix_10"),
            _end("0.4 less the worst case, best of 256", "bon_mix_4", "bon_mix_0"),
            _end("0.4 less the nominal reward, best of 256", "bon_mix_4", "bon_mix_10"),
            _end("0.4 less the worst case, trained", "mix_4", "worst_case"),
            _end("0.4 less the mean, trained", "mix_4", "mean"),
        ),
    ),
    Claim(
        name="ensembles",
        claim="An ensemble beats a single reward that was trained five times as long (equal cost "
        "of training)",
        source="no paper: the compute-matched control of all of these",
        contrasts=(
            _end("mean of 5, trained", "mean", "single_5x"),
            _end("worst case of 5, trained", "worst_case", "single_5x"),
            _end("mean of 5, best of 256", "bon_mean", "bon_single_5x"),
            _end("mean of 5, trained, noisy labels", "mean", "single_5x", _NOISY),
        ),
    ),
    Claim(
        name="WARM",
        claim="A weight average (WARM) beats a single reward, with right and with noisy labels, "
        "and under noise an ensemble",
        source=f"{_WARM}; here its members are scalar heads, the single reward is a Gaussian one",
        contrasts=(
            _end("trained", "warm", "single"),
            _end("best of 256", "bon_warm", "bon_single"),
            _end("trained, noisy labels", "warm", "single", _NOISY),
            _end("best of 256, noisy labels", "bon_warm", "bon_single", _NOISY),
            _end("less the mean of 5, trained, noisy labels", "warm", "mean", _NOISY),
            _end("less the mean of 5, best of 256, noisy labels", "bon_warm", "bon_mean", _NOISY),
        ),
    ),
    Claim(
        name="shift",
        claim="A reward tells less of the answers of a policy that has moved",
        source=f"{_LANG}, its premise, not measured there",
        contrasts=(
            Contrast(
                words="pairs of the reference's answers less the moved policy's",
                results=_RLP,
                kind="agreement",
                method="ppo",
                whose=("reference", "moved"),
                above=0.0,
            ),
            Contrast(
                words="pairs of the reference's answers less those of the policy that ends with it",
                results=_RLP,
                kind="agreement",
                method="ppo",
                whose=("reference", "own"),
                above=0.0,
            ),
        ),
    ),
    Claim(
        name="RLP",
        claim="Reward learning on policy (UML, SPG) beats PPO and, our control, a reward trained "
        "again",
        source=_LANG,
        contrasts=(
            _end("SPG less PPO", "spg", "ppo", _RLP),
            _end("UML less PPO", "uml", "ppo", _RLP),
            _end("SPG less the control", "spg", "control", _RLP),
            _end("UML less the control", "uml", "control", _RLP),
        ),
    ),
)
