"""What a reward model believes: the seam between models and objectives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RewardPosterior:
    """The rewards that the members of a reward model give to a batch of completions.

    Every reward model returns one and every objective takes one; it knows no model and no
    tokenizer. A member may be a head, a LoRA adapter or a whole model. Means that are not finite
    are kept, so that the loop that asked for the scores can count them and decide.

    Args:
        means: Each member's reward.
        stds: Each member's own standard deviation, where members have one; zero is allowed.
    """

    means: Float[Tensor, "batch member"]
    stds: Float[Tensor, "batch member"] | None = None

    def __post_init__(self) -> None:
        _require_batch_of_members("means", self.means)
        if self.stds is None:
            return
        _require_batch_of_members("stds", self.stds)
        if self.stds.shape != self.means.shape:
            raise ValueError(
                f"stds must have the shape of means, {tuple(self.means.shape)}, "
                f"got {tuple(self.stds.shape)}."
            )
        if not bool((self.stds >= 0).all()):  # false for NaN too
            raise ValueError(
                f"stds must not be negative or NaN, got a smallest value of "
                f"{self.stds.min().item()}; pass standard deviations, not their logarithms."
            )

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def members(self) -> int:
        """How many members scored the batch."""
        return self.means.shape[1]

    @property
    def mean(self) -> Float[Tensor, " batch"]:
        """The members' mean."""
        return self.means.mean(dim=1)

    @property
    def variance(self) -> Float[Tensor, " batch"]:
        """Variance between the members' means: of the population, ddof 0, so 0 for one member."""
        # Not Tensor.var, which warns of an empty batch.
        return (self.means - self.mean[:, None]).square().mean(dim=1)

    @property
    def std(self) -> Float[Tensor, " batch"]:
        """Square root of `variance` (ddof 0)."""
        return self.variance.sqrt()

    @property
    def total_variance(self) -> Float[Tensor, " batch"]:
        """Variance of a draw from a random member: `variance` plus the mean of `stds ** 2`.

        The law of total variance for the equal mixture of the members' Gaussians; the first term
        is what members disagree on (epistemic), the second what each holds to be noise.
        """
        if self.stds is None:
            return self.variance
        return self.variance + self.stds.square().mean(dim=1)

    def rsample(self, generator: torch.Generator | None = None) -> Float[Tensor, "batch member"]:
        """One reparameterised draw per member, `means + stds * eps`; `means` without stds."""
        if self.stds is None:
            return self.means
        eps = torch.randn(
            self.means.shape,
            generator=generator,
            dtype=self.means.dtype,
            device=self.means.device,
        )
        return self.means + self.stds * eps

    def __getitem__(self, index: int | slice | Tensor) -> "RewardPosterior":
        """Rows of the batch by slice, index tensor or boolean mask; an int gives a batch of one."""
        if isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool:
            index = int(index)
        if isinstance(index, int):
            # IndexError past the end is also what ends `for row in posterior`.
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for a batch of {len(self)}.")
            index = slice(index % len(self), index % len(self) + 1)
        return RewardPosterior(
            self.means[index], self.stds[index] if self.stds is not None else None
        )

    @staticmethod
    def cat(posteriors: "Sequence[RewardPosterior]") -> "RewardPosterior":
        """The rows of several posteriors of the same members, one after the other."""
        return _concatenated(posteriors, dim=0)

    @staticmethod
    def stack_members(posteriors: "Sequence[RewardPosterior]") -> "RewardPosterior":
        """The members of several posteriors over the same rows, as one ensemble."""
        return _concatenated(posteriors, dim=1)

    def to(self, *args: torch.device | torch.dtype | str | int) -> "RewardPosterior":
        """The same posterior on another device or in another floating dtype, as `Tensor.to`."""
        return RewardPosterior(
            self.means.to(*args),  # type: ignore[call-overload]
            self.stds.to(*args) if self.stds is not None else None,  # type: ignore[call-overload]
        )

    def standardised(
        self,
        mean: Float[Tensor, " member"] | float,
        std: Float[Tensor, " member"] | float,
    ) -> "RewardPosterior":
        """Each member on the scale of a reference set: `(means - mean) / std` and `stds / std`.

        Without it a minimum or a variance over members is ruled by whichever has the widest scale
        or the lowest offset.

        Args:
            mean: Each member's mean reward on the reference set, or one for all.
            std: Each member's standard deviation there, or one for all.
        """
        mean = torch.as_tensor(mean).to(self.means)
        std = torch.as_tensor(std).to(self.means)
        for name, value in (("mean", mean), ("std", std)):
            if value.shape not in (torch.Size([]), torch.Size([self.members])):
                raise ValueError(
                    f"{name} must be one number or one per member ({self.members}), "
                    f"got the shape {tuple(value.shape)}."
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite, got {value.tolist()}.")
        if not bool((std > 0).all()):
            raise ValueError(
                f"std must be positive, got {std.tolist()}; a member whose reward does not vary "
                "on the reference set cannot be put on its scale."
            )
        return RewardPosterior(
            (self.means - mean) / std, self.stds / std if self.stds is not None else None
        )


def _require_batch_of_members(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.ndim != 2 or value.shape[1] < 1:
        raise ValueError(
            f"{name} must have the shape [batch, member] with at least one member, got "
            f"{tuple(value.shape)}; give a single reward per row as rewards[:, None]."
        )
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}; call .float() on it.")


def _concatenated(posteriors: Sequence[RewardPosterior], *, dim: int) -> RewardPosterior:
    if len(posteriors) == 0:
        raise ValueError("there must be at least one posterior, got none.")
    across, kept = ("rows", "members") if dim == 0 else ("members", "rows")
    sizes = [posterior.means.shape[1 - dim] for posterior in posteriors]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"joining the {across} of posteriors needs the same number of {kept} in each, "
            f"got {sizes}."
        )
    stds = [posterior.stds for posterior in posteriors if posterior.stds is not None]
    if len(stds) not in (0, len(posteriors)):
        raise ValueError(
            f"either all posteriors must have stds or none, got them on {len(stds)} of "
            f"{len(posteriors)}; drop them with RewardPosterior(posterior.means)."
        )
    return RewardPosterior(
        torch.cat([posterior.means for posterior in posteriors], dim=dim),
        torch.cat(stds, dim=dim) if stds else None,
    )
