"""The exact world: a table of rewards, in which the best policy against a reward has a closed form.

A few prompts with a few responses each; the gold reward of every response is a draw from a normal
distribution. The members of a reward model err by a little on the responses that their data
covered and by much on the others, and state how much, roughly. Nothing is trained or sampled: a
cell takes milliseconds, so that hundreds of seeds settle what is luck. The responses have no
likeness to each other, so nothing here generalises, rightly or wrongly.

With eight responses a bad reward costs gold but seldom turns the curve down. It does so where few
of very many responses are uncovered, and worse than the rest: `response_count=1024`,
`coverage=0.95`, `covered_std=0.6`, `uncovered_std=3`, `uncovered_gold=-1`.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.rows import Completion, PreferenceRow, Prompt, text_of
from trueward.evaluate.comparison import Point, SeedRun
from trueward.lab.methods import REFINED, Method
from trueward.lab.worlds import Annotator, stated_and_chosen, words_of
from trueward.posterior import RewardPosterior

_MILDER_BETAS = (8.0, 5.6, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.13)


def optimal_policy(
    reward: Float[Tensor, "... response"],
    *,
    beta: Float[Tensor, "..."] | float,
    reference: Float[Tensor, "... response"],
) -> Float[Tensor, "... response"]:
    """The policy that maximises `E[reward] - beta KL(policy || reference)`, for each prompt.

    `pi(y) ~ reference(y) exp(reward(y) / beta)`, the maximiser of Yan et al. 2024, Eq. 4
    (https://arxiv.org/abs/2409.15360); derived in Rafailov et al. 2023, App. A.1
    (https://arxiv.org/abs/2305.18290).

    Args:
        reward: Of each response.
        beta: Price of a nat of KL in units of the reward, positive; infinity gives the reference.
            A tensor is broadcast against the rewards, the response's axis included.
        reference: Probability of each response; 0 stays 0.
    """
    if not bool((torch.as_tensor(beta) > 0).all()):
        raise ValueError(f"beta must be positive, got {beta}.")
    return (reference.log() + reward / beta).softmax(dim=-1)


def exact_kl(
    policy: Float[Tensor, "... response"], reference: Float[Tensor, "... response"]
) -> Float[Tensor, "..."]:
    """`KL(policy || reference) = sum_y pi(y) log(pi(y) / ref(y))` of each prompt, in nats.

    It is also what the estimators k1 and k3 are expected to give on the policy's own samples.
    """
    terms = torch.xlogy(policy, policy) - torch.xlogy(policy, reference)
    # Never negative (Gibbs), but for the last digits.
    return terms.sum(dim=-1).clamp(min=0)


def expected_k2(
    policy: Float[Tensor, "... response"], reference: Float[Tensor, "... response"]
) -> Float[Tensor, "..."]:
    """What the estimator k2 is expected to give, `E_pi[log(pi(y) / ref(y))^2] / 2`.

    Above the KL where the policy is far away; Schulman 2020 (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = policy.log() - reference.log()
    # 0 log^2 0 = 0: what the policy never says does not count.
    return torch.where(policy > 0, policy * log_ratio.square() / 2, 0.0).sum(dim=-1)


def expected_agreement(
    policy: Float[Tensor, "*point prompt response"],
    proxy: Float[Tensor, "prompt response"],
    gold: Float[Tensor, "prompt response"],
) -> Float[Tensor, "*point"]:
    """Chance that the proxy orders two of the policy's answers to a prompt as gold does.

    The two are independent draws; those of equal gold do not count, and a tied proxy counts half.
    NaN where the policy is so sure that its second answer underflows.
    """
    wanted = (gold[:, :, None] - gold[:, None, :]).sign()
    said = (proxy[:, :, None] - proxy[:, None, :]).sign()
    # One product for all points of a curve: their pairs would not fit in memory.
    by_prompt = policy.reshape(-1, *gold.shape).transpose(0, 1)
    differ, balance = (
        ((by_prompt @ signs) * by_prompt).sum(dim=(0, 2)) for signs in (wanted.abs(), wanted * said)
    )
    return ((1 + balance / differ) / 2).view(policy.shape[:-2])


def span(reward: Float[Tensor, "... response"]) -> Float[Tensor, "..."]:
    """Largest less smallest reward of each prompt's responses."""
    return reward.amax(dim=-1) - reward.amin(dim=-1)


def kl_bound(reward: Float[Tensor, "... response"], *, beta: float) -> Float[Tensor, "..."]:
    """How far `optimal_policy` can go at most: `KL <= span(reward)^2 / (8 beta^2)`.

    `KL = int_0^{1/beta} u Var_u[reward] du`, and a variance is at most a quarter of the squared
    span (Popoviciu).
    """
    return span(reward).square() / (8 * beta**2)


def gold_shift_bound(
    reward: Float[Tensor, "... response"], gold: Float[Tensor, "... response"], *, beta: float
) -> Float[Tensor, "..."]:
    """How much expected gold `optimal_policy` can win or lose at most, whatever the reward's error.

    `|E_pi[gold] - E_ref[gold]| <= span(gold) span(reward) / (4 beta)`: Pinsker's inequality on
    `kl_bound`. A reward of small span is a reward that can do little harm.
    """
    return span(gold) * span(reward) / (4 * beta)


@dataclass(frozen=True, kw_only=True)
class ExactWorld:
    """The dials of the table; the defaults are those of the golden numbers in its tests."""

    prompt_count: int = 8
    response_count: int = 8  # to each prompt
    members: int = 5  # of the reward model
    coverage: float = 0.5  # share of the responses that the reward model's data covered
    covered_std: float = 0.15  # of a member's error on a covered response; gold has std 1
    uncovered_std: float = 1.0  # of a member's error on any other
    uncovered_gold: float = 0.0  # added to gold there: below 0, what nobody wrote is mostly worse
    std_error: float = 0.2  # std of the stated stds about the true ones, relative to these
    beta: float = 0.1  # price of a nat of KL at the end of the curve
    # Milder prices, which come before `beta` in the curve; those not above it are left out.
    betas: list[float] = field(default_factory=lambda: list(_MILDER_BETAS))
    annotator: Annotator = field(default_factory=lambda: Annotator(label_noise=0.0))

    def __post_init__(self) -> None:
        # Two prompts for a standard error over prompts, two responses for a choice.
        for name, least in (("prompt_count", 2), ("response_count", 2), ("members", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"coverage is a share in [0, 1], got {self.coverage}.")
        if not math.isfinite(self.uncovered_gold):
            raise ValueError(f"uncovered_gold must be finite, got {self.uncovered_gold}.")
        for name in ("covered_std", "uncovered_std", "std_error"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and at least 0, got {getattr(self, name)}."
                )
        for beta in (self.beta, *self.betas):
            if not 0 < beta < math.inf:
                raise ValueError(f"beta and betas must be positive and finite, got {beta}.")

    def open(self, *, seed: int) -> "ExactTable":
        """Draw the table of a seed."""
        rng = np.random.default_rng(seed)
        # The order of the draws is what the golden numbers stand on.
        table = (self.prompt_count, self.response_count)
        gold = rng.normal(size=table)
        covered = rng.random(table) < self.coverage
        gold = gold + np.where(covered, 0.0, self.uncovered_gold)
        scale = np.where(covered, self.covered_std, self.uncovered_std)
        means = gold + scale * rng.normal(size=(self.members, *table))
        error = 1 + self.std_error * rng.normal(size=(self.members, *table))
        stds = np.abs(scale * error) + 1e-3
        noise = rng.normal(size=table)
        return ExactTable(
            world=self,
            seed=seed,
            gold_table=torch.from_numpy(gold),
            means=torch.from_numpy(means).permute(1, 2, 0),
            stds=torch.from_numpy(stds).permute(1, 2, 0),
            random_table=torch.from_numpy(noise),
        )

    def curve_betas(self) -> list[float]:
        """The prices along the curve: none too high to move (infinity), falling to `beta`."""
        milder = sorted({b for b in self.betas if b > self.beta}, reverse=True)
        return [math.inf, *milder, self.beta]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactTable:
    """The exact world of one seed; rewards are in float64, gold in its own units (std 1)."""

    world: ExactWorld
    seed: int
    gold_table: Float[Tensor, "prompt response"]
    means: Float[Tensor, "prompt response member"]
    stds: Float[Tensor, "prompt response member"]
    random_table: Float[Tensor, "prompt response"]  # noise that knows nothing of gold

    @property
    def reference(self) -> Float[Tensor, "prompt response"]:
        """The reference policy: every response is as likely as any other."""
        return torch.full_like(self.gold_table, 1 / self.world.response_count)

    def prompts(self, count: int, *, seed: int) -> list[Prompt]:
        """Return draws with replacement from `prompt 0`, `prompt 1`, ..."""
        names: list[Prompt] = [f"prompt {i}" for i in range(self.world.prompt_count)]
        return random.Random(f"prompts {seed}").choices(names, k=count)

    def answers(self, prompts: Sequence[Prompt], *, n: int, seed: int) -> list[list[Completion]]:
        """Return n draws from the reference policy for each prompt: `response 0`, ..."""
        _places(prompts, "prompt", self.world.prompt_count)
        rng = random.Random(f"answers {seed}")
        names: list[Completion] = [f"response {i}" for i in range(self.world.response_count)]
        return [rng.choices(names, k=n) for _ in prompts]

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return what the table says."""
        return self.gold_table[self._cells(prompts, completions)]

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], *, seed: int
    ) -> list[PreferenceRow]:
        """Let the world's annotator compare the first two distinct answers to each prompt."""
        utilities = [
            self.gold([p] * len(a), a).tolist() for p, a in zip(prompts, answers, strict=True)
        ]
        return self.world.annotator.compare(prompts, answers, utilities, seed=seed)

    def posterior(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> RewardPosterior:
        """Return what the members believe of each response, with the stds that they state."""
        cells = self._cells(prompts, completions)
        return RewardPosterior(self.means[cells], self.stds[cells])

    def _cells(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[Tensor, Tensor]:
        if len(prompts) != len(completions):
            raise ValueError(
                f"There must be one prompt for each completion, got {len(prompts)} and "
                f"{len(completions)}."
            )
        rows = _places(prompts, "prompt", self.world.prompt_count)
        return rows, _places(completions, "response", self.world.response_count)

    def proxy(
        self, method: Method
    ) -> tuple[Float[Tensor, "prompt response"], Float[Tensor, "prompt response"] | None]:
        """Return the reward that a method optimises, and the std between its members (ddof 0).

        The std is None for one member and for controls. An objective that looks at a batch gets
        the whole table as one.
        """
        require_known(self.world, method)
        if method.reward == "gold":
            return self.gold_table, None
        if method.reward == "random":
            return self.random_table, None
        posterior = RewardPosterior(
            self.means[..., : method.members].flatten(0, 1),
            self.stds[..., : method.members].flatten(0, 1),
        )
        shape = self.gold_table.shape
        spread = posterior.std.view(shape) if method.members > 1 else None
        return method.objective.build()(posterior).view(shape), spread

    def curve(
        self,
        proxy: Float[Tensor, "prompt response"],
        *,
        spread: Float[Tensor, "prompt response"] | None = None,
    ) -> list[Point]:
        """Return the points of the optimal policies against a reward, from the reference on.

        The place is `1/beta`. `proxy` counts from the reference policy; `kl/k2` is that
        estimator's expectation (those of k1 and k3 are the exact KL).
        """
        betas = torch.tensor(self.world.curve_betas(), dtype=torch.float64)
        reference = self.reference
        policies = optimal_policy(proxy, beta=betas[:, None, None], reference=reference)
        gold = _expected(policies, self.gold_table)  # [beta, prompt]
        worth = _expected(policies, proxy).mean(dim=1)
        kl = exact_kl(policies, reference).mean(dim=1)
        columns = {
            "1/beta": 1 / betas,
            "gold": gold.mean(dim=1),
            "gold_sem": gold.std(dim=1, correction=1) / math.sqrt(self.world.prompt_count),
            "proxy": worth - worth[0],
            "length": torch.full_like(betas, words_of("response 0")),
            "kl/exact": kl,
            "kl/k2": expected_k2(policies, reference).mean(dim=1),
            "agreement": expected_agreement(policies, proxy, self.gold_table),
        }
        if spread is not None:
            columns["spread"] = _expected(policies, spread).mean(dim=1)
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, point, strict=True)) for point in values]

    def run(self, method: Method) -> SeedRun:
        """Return a method's cell.

        The annotator's pairs for accuracy and calibration are each prompt's responses 0 and 1, 2
        and 3, ...
        """
        start = time.perf_counter()
        proxy, spread = self.proxy(method)
        final = optimal_policy(proxy, beta=self.world.beta, reference=self.reference)
        count = self.world.response_count // 2
        prompts: list[Prompt] = [
            f"prompt {i}" for i in range(self.world.prompt_count) for _ in range(count)
        ]
        pair_of: list[list[Completion]] = [
            [f"response {2 * k}", f"response {2 * k + 1}"] for k in range(count)
        ]
        pairs = pair_of * self.world.prompt_count
        rows = self.comparisons(prompts, pairs, seed=self.seed)
        probabilities, outcomes = stated_and_chosen(rows, lambda p, c: proxy[self._cells(p, c)])
        return SeedRun(
            seed=self.seed,
            points=self.curve(proxy, spread=spread),
            final_gold=self._one_answer(final),
            probabilities=probabilities,
            outcomes=outcomes,
            seconds=time.perf_counter() - start,
        )

    def _one_answer(self, policy: Float[Tensor, "prompt response"]) -> list[float]:
        """Return the gold of one answer to each prompt; the noise is the same for any policy."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(len(policy), 1, generator=generator, dtype=policy.dtype)
        drawn = torch.searchsorted(policy.cumsum(dim=1), noise).clamp(max=policy.shape[1] - 1)
        return self.gold_table.gather(1, drawn)[:, 0].tolist()


def run_cell(world: ExactWorld, method: Method, seed: int) -> SeedRun:
    """Compute one cell: a method's curve under a seed, in closed form.

    Raises:
        ValueError: The method is not one for a table.
    """
    require_known(world, method)
    return world.open(seed=seed).run(method)


def _expected(
    policies: Float[Tensor, "*beta prompt response"], value: Float[Tensor, "prompt response"]
) -> Float[Tensor, "*beta prompt"]:
    return (policies * value).sum(dim=-1)


def _places(texts: Sequence[Prompt], kind: str, count: int) -> Tensor:
    known = {f"{kind} {i}": i for i in range(count)}
    try:
        return torch.tensor([known[text_of(text)] for text in texts], dtype=torch.long)
    except KeyError as error:
        raise ValueError(
            f"{error.args[0]!r} is not in the table, which has '{kind} 0' to '{kind} {count - 1}'."
        ) from error


def require_known(world: ExactWorld, method: Method) -> None:
    """Refuse what a table has no answer to, rather than leave it without effect."""
    if method.optimiser != "closed_form":
        raise ValueError(
            "The exact world is optimised in closed form: give the method "
            f"optimiser=closed_form, not {method.optimiser}."
        )
    reasons = {
        "length": "all responses of the exact world have the same length",
    } | dict.fromkeys(REFINED, "nothing is trained in the exact world, so nothing can be refined")
    if method.reward in reasons:
        raise ValueError(
            f"reward={method.reward}: {reasons[method.reward]}; it has learned, gold and random."
        )
    if method.epochs_scale != 1 or method.family != "deep":
        raise ValueError(
            "Nothing is trained in the exact world: leave epochs_scale at 1 and family at deep, "
            f"got {method.epochs_scale:g} and {method.family}."
        )
    if method.members > world.members:
        raise ValueError(
            f"The method wants {method.members} members where the exact world has "
            f"{world.members}: raise the world's members."
        )
