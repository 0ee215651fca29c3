"""A reward head with a Gaussian over its weights: the Laplace posterior of a last layer."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.models.heads import Head, HeadOutput


class LaplaceHead(Head):
    """One linear reward whose weights are known only up to a Gaussian, `N(w, F F')`.

    `train.laplace.fit_laplace` makes one. What is saved is a factor `F` of the covariance, so that
    the std of a reward, `|F' h| = sqrt(h' F F' h)`, is never negative. The posterior is read in one
    of two ways, by `members`:

    - 0: one member with mean `w.h` and that std. It is exact for one completion, but it says
      nothing about two: both share `w`, so that the uncertainty of a difference is
      `sqrt((h1 - h2)' F F' (h1 - h2))` (`difference_std`), which lies anywhere between
      `|std1 - std2|` and `std1 + std2`. Two copies of a text have a difference without any
      uncertainty, however large the std of each.
    - K >= 1: K draws of the weights, fixed with the model, and no stds. A member is one possible
      reward for all completions, so members correlate over the completions of a prompt as the
      weights do: what an objective over members needs. See `posterior_draws`.

    Args:
        hidden_size: Of the backbone.
        members: 0, or how many draws.
    """

    weight: Float[Tensor, " hidden"]
    factor: Float[Tensor, "hidden hidden"]
    draws: Float[Tensor, "member hidden"]

    def __init__(self, hidden_size: int, members: int = 0) -> None:
        super().__init__()
        if members < 0:
            raise ValueError(
                f"members must be 0 (a mean and a std) or the number of draws, got {members}."
            )
        self.members = max(1, members)
        self.has_stds = members == 0
        self.register_buffer("weight", torch.zeros(hidden_size))
        self.register_buffer("factor", torch.zeros(hidden_size, hidden_size))
        if members:
            self.register_buffer("draws", torch.zeros(members, hidden_size))

    @torch.no_grad()
    def set_posterior(
        self,
        weight: Float[Tensor, " hidden"],
        factor: Float[Tensor, "hidden hidden"],
        *,
        seed: int = 0,
    ) -> "LaplaceHead":
        """Take a posterior, and draw the members' weights where there are any; return the head.

        Args:
            weight: Its mean.
            factor: `F`, with the covariance `F F'`.
            seed: Of the draws, which are a function of it and of the posterior.
        """
        self.weight.copy_(weight)
        self.factor.copy_(factor)
        if not self.has_stds:
            generator = torch.Generator().manual_seed(seed)
            self.draws.copy_(
                posterior_draws(
                    weight.double().cpu(), factor.double().cpu(), self.members, generator=generator
                )
            )
        return self

    def read_as(self, members: int, *, seed: int = 0) -> "LaplaceHead":
        """Return the same posterior in the other reading, or with other draws."""
        head = LaplaceHead(len(self.weight), members).to(self.weight.device)
        return head.set_posterior(self.weight, self.factor, seed=seed)

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return means, and stds in the reading that has them; float32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            if not self.has_stds:
                return HeadOutput(hidden @ self.draws.T, None)
            means = (hidden @ self.weight)[..., None]
            return HeadOutput(means, linear_std(hidden, self.factor)[..., None])

    def difference_std(
        self, hidden_1: Float[Tensor, "... hidden"], hidden_2: Float[Tensor, "... hidden"]
    ) -> Float[Tensor, "..."]:
        """Return the std of the reward of one completion less that of another."""
        return linear_std(hidden_1.float() - hidden_2.float(), self.factor)

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build this head again."""
        return {"kind": "laplace", "members": 0 if self.has_stds else self.members}


def linear_std(
    states: Float[Tensor, "... hidden"], factor: Float[Tensor, "hidden hidden"]
) -> Float[Tensor, "..."]:
    """The std of `w.h` for weights of covariance `F F'`: `|F' h|`, never negative."""
    return torch.linalg.vector_norm(states @ factor, dim=-1)


def posterior_draws(
    weight: Float[Tensor, " hidden"],
    factor: Float[Tensor, "hidden hidden"],
    members: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "member hidden"]:
    """Draws of the weights whose mean is the posterior's mean, `w + sqrt(K / (K-1)) F (z - zbar)`.

    `z` are K standard normal vectors and `zbar` is their mean. Taking the mean away makes the
    members' mean reward that of `w` itself (up to rounding), whatever K is; the factor gives back
    the variance that it took, so that each draw alone has the posterior's distribution, and the
    variance over members (ddof 0) of a reward has the expectation `h' F F' h`, with a relative
    standard error of `sqrt(2 / (K-1))`. A single draw (K = 1) is `w`, without any variance.
    """
    if members < 1:
        raise ValueError(f"members must be at least 1, got {members}.")
    z = torch.randn(members, len(weight), generator=generator, dtype=weight.dtype)
    z = (z - z.mean(0)) * math.sqrt(members / max(1, members - 1))
    return weight + z @ factor.T
