"""A reward head with a density over the reward of each completion: EBRM's energy.

Lochab and Zhang 2025, "Energy-Based Reward Models for Robust Language Model Alignment"
(https://arxiv.org/abs/2504.13134). Written from the paper's equations.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trueward.models.heads import Head, HeadOutput

MIN_STEP = 1e-6  # where an ascent has arrived
_ENERGIES_AT_ONCE = 2**14  # in float64: 0.2 GB with the paper's layers


class EnergyNetwork(nn.Module):
    """`f(e, r)`: the reward through its own small layers, beside the state, through more layers.

    Every layer is followed by tanh and, but for the last of the reward's, by dropout. The defaults
    are the paper's: 1 -> 16 -> 32 -> 64, then `hidden + 64` -> 1024 -> 512 -> 1.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        reward_widths: Sequence[int] = (16, 32, 64),
        widths: Sequence[int] = (1024, 512),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not reward_widths or not widths:
            raise ValueError(
                f"reward_widths and widths need at least one layer each, got "
                f"{list(reward_widths)} and {list(widths)}."
            )
        self.hidden_size = hidden_size
        self.reward_layers = _linear_layers([1, *reward_widths])
        self.layers = _linear_layers([hidden_size + reward_widths[-1], *widths])
        self.last = nn.Linear(widths[-1], 1)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: Float[Tensor, "row hidden"], rewards: Float[Tensor, "row point"]
    ) -> Float[Tensor, "row point"]:
        """Return the energy of every reward under the state of its row; higher is likelier."""
        points = rewards[..., None]
        for i, layer in enumerate(self.reward_layers):
            points = torch.tanh(layer(self.dropout(points) if i else points))
        first, *others = self.layers
        # The layer on [e, r], with the state's part computed once for all rewards of a row.
        of_state, of_reward = first.weight.split(  # type: ignore[operator]
            [self.hidden_size, points.shape[-1]], dim=1
        )
        out = (states @ of_state.T + first.bias)[:, None] + points @ of_reward.T
        out = self.dropout(torch.tanh(out))
        for layer in others:
            out = self.dropout(torch.tanh(layer(out)))
        energies: Tensor = self.last(out)[..., 0]
        return energies


class EnergyHead(Head):
    """The mode and the width of a density over the reward, `p(r|e) = exp f(e, r) / Z(e)`.

    A finished scalar head gives the base reward; `train.energy.train_energy` fits `f` to it. The
    posterior's mean is the density's mode, found by gradient ascent (`ascend`); its std is that of
    the density, by quadrature on a grid. Both are on the scale of the base reward, and neither has
    a gradient. The width is ours: the paper replaces the reward by the mode and uses nothing else.

    What the width says: the base reward follows from the state, so a network that could express it
    everywhere would learn the jitter of the training alone (`beta * s`, see
    `losses.energy.nce_candidates`). The width is that, and what the network, its dropout and the
    regulariser left open for such a state. It knows nothing of annotators' noise.

    Everything is computed in units of `r`, the base reward standardised by `set_base`, then
    multiplied by `reward_scale`; in float64, so that the ascent's comparisons do not stop at
    rounding and a score does not depend on its batch.

    The ascent starts from the base reward where that lies in the trusted range. The paper starts
    elsewhere from a uniform draw; here, since a score must not be random, from the point of the
    grid where `f` is highest. The density lives on a bounded range (`f` is bounded, so `exp f` has
    no integral over the line), and the ascent stops at its ends. Both are ours.

    Args:
        hidden_size: Of the backbone.
        reward_widths: Layers that the reward goes through alone.
        widths: Layers that state and reward go through together.
        dropout: In training, after each layer but the last of the reward's.
        reward_scale: `r` in stds of the base reward. The paper has 4 for one of its bases.
        trusted: Base rewards up to this far from their mean, in stds, are where the ascent starts.
        limit: Half the range of the density, in stds of the base reward.
        grid_points: Of the quadrature.
        steps: Of the ascent, accepted or not.
        step_size: The ascent's first, in units of `r`.
        shrink: What a refused step multiplies it by.
    """

    members = 1
    has_stds = True

    weight: Float[Tensor, " hidden"]
    base_mean: Float[Tensor, ""]
    base_std: Float[Tensor, ""]
    state_mean: Float[Tensor, " hidden"]
    state_std: Float[Tensor, " hidden"]

    def __init__(
        self,
        hidden_size: int,
        *,
        reward_widths: Sequence[int] = (16, 32, 64),
        widths: Sequence[int] = (1024, 512),
        dropout: float = 0.5,
        reward_scale: float = 1.0,
        trusted: float = 2.0,
        limit: float = 8.0,
        grid_points: int = 129,
        steps: int = 50,
        step_size: float = 0.5,
        shrink: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= trusted <= limit:
            raise ValueError(
                f"trusted must lie between 0 and limit, got trusted={trusted} and limit={limit}."
            )
        if not 0 < shrink < 1:
            raise ValueError(f"shrink must lie in (0, 1), got {shrink}.")
        for name, value in (("reward_scale", reward_scale), ("limit", limit)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}.")
        if step_size <= 0 or steps < 0 or grid_points < 3:
            raise ValueError(
                "An ascent needs step_size > 0 and steps >= 0, a quadrature grid_points >= 3, got "
                f"step_size={step_size}, steps={steps} and grid_points={grid_points}."
            )
        self.sizes = {"reward_widths": list(reward_widths), "widths": list(widths)}
        self.dropout = dropout
        self.reward_scale = reward_scale
        self.trusted = trusted
        self.limit = limit
        self.grid_points = grid_points
        self.steps = steps
        self.step_size = step_size
        self.shrink = shrink
        self.network: nn.Module = EnergyNetwork(
            hidden_size, reward_widths=reward_widths, widths=widths, dropout=dropout
        )
        self.register_buffer("weight", torch.zeros(hidden_size))
        self.register_buffer("base_mean", torch.tensor(0.0))
        self.register_buffer("base_std", torch.tensor(1.0))
        self.register_buffer("state_mean", torch.zeros(hidden_size))
        self.register_buffer("state_std", torch.ones(hidden_size))

    @torch.no_grad()
    def set_base(
        self, weight: Float[Tensor, " hidden"], states: Float[Tensor, "example hidden"]
    ) -> "EnergyHead":
        """Take the base's linear reward, and measure it and the states; return the head.

        Args:
            weight: Of the base's scalar head; no gradient reaches it.
            states: Examples, whose base rewards get mean 0 and std 1, as do the states' parts.

        Raises:
            ValueError: The base gives all examples the same reward.
        """
        rewards = states.double() @ weight.double()
        mean, std = rewards.mean(), rewards.std(correction=0)
        if not std > 1e-6 * mean.abs():
            raise ValueError(
                f"The base gives all {len(states)} examples the same reward, {mean.item():.4g}: it "
                "has no scale."
            )
        self.weight.copy_(weight)
        self.base_mean.copy_(mean)
        self.base_std.copy_(std)
        spread = states.double().std(0, correction=0)
        self.state_mean.copy_(states.double().mean(0))
        # A part that hardly varies here must not rule elsewhere.
        self.state_std.copy_(spread.clamp_min(1e-3 * spread.max().item()))
        return self

    def base_rewards(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "..."]:
        """Return the base's reward of each state, on its own scale."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight

    def inputs(
        self, hidden: Float[Tensor, "row hidden"]
    ) -> tuple[Float[Tensor, "row hidden"], Float[Tensor, " row"]]:
        """Return the states and the base rewards as `f` takes them, `e` and `r`."""
        rewards = hidden @ self.weight.to(hidden)
        rewards = (rewards - self.base_mean) / self.base_std * self.reward_scale
        return (hidden - self.state_mean) / self.state_std, rewards

    def forward(self, hidden: Float[Tensor, "... hidden"]) -> HeadOutput:
        """Return the density's mode as the mean, and its width as the std; without gradients."""
        rows = max(1, _ENERGIES_AT_ONCE // self.grid_points)
        flat = hidden.reshape(-1, hidden.shape[-1])
        with _without_gradients(hidden.device):
            network = self._network_in_double()
            found = [self._mode_and_width(network, part) for part in flat.split(rows)]
            modes, widths = (torch.cat(parts) for parts in zip(*found, strict=True))
            means = self.base_mean + modes * self._unit
            stds = widths * self._unit
            shape = (*hidden.shape[:-1], 1)
            return HeadOutput(means.float().reshape(shape), stds.float().reshape(shape))

    def log_density(
        self, hidden: Float[Tensor, "*batch hidden"], rewards: Float[Tensor, " point"]
    ) -> Float[Tensor, "*batch point"]:
        """Return `log p(r|e)` at each reward, without gradients.

        Args:
            hidden: The completions' last states.
            rewards: Where the density is asked for, on the base's own scale; the density is per
                unit of it. Outside the range the answer is -inf.
        """
        rows = max(1, _ENERGIES_AT_ONCE // max(self.grid_points, len(rewards)))
        flat = hidden.reshape(-1, hidden.shape[-1])
        with _without_gradients(hidden.device):
            network = self._network_in_double()
            points = (rewards.to(hidden.device) - self.base_mean) / self._unit
            grid = self._grid(hidden.device)
            found = []
            for part in flat.split(rows):
                states, _ = self.inputs(part.to(grid.dtype, copy=True))
                on_grid = network(states, grid.expand(len(states), -1))
                energies = network(states, points.to(grid).expand(len(states), -1))
                log_z = (on_grid + quadrature_log_weights(grid)).logsumexp(1, keepdim=True)
                found.append(energies - log_z)
            logs = torch.cat(found) - self._unit.log()
            logs[:, points.abs() > grid[-1]] = -math.inf
            return logs.float().reshape(*hidden.shape[:-1], len(rewards))

    def describe(self) -> dict[str, object]:
        """Return what `make_head` needs to build this head again."""
        names = (
            *("dropout", "reward_scale", "trusted", "limit", "grid_points"),
            *("steps", "step_size", "shrink"),
        )
        return {"kind": "energy", **self.sizes, **{name: getattr(self, name) for name in names}}

    @property
    def _unit(self) -> Float[Tensor, ""]:
        """One unit of `r` on the base's scale."""
        return self.base_std.double() / self.reward_scale

    def _grid(self, device: torch.device) -> Float[Tensor, " point"]:
        half = self.limit * self.reward_scale
        return torch.linspace(-half, half, self.grid_points, dtype=torch.float64, device=device)

    def _network_in_double(self) -> nn.Module:
        """Return a frozen copy of `f`, without dropout."""
        return copy.deepcopy(self.network).double().eval().requires_grad_(False)

    def _mode_and_width(
        self, network: nn.Module, hidden: Float[Tensor, "row hidden"]
    ) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
        """Return the mode and the std of the density of each row, in units of `r`."""
        grid = self._grid(hidden.device)
        states, base_rewards = self.inputs(hidden.to(grid.dtype, copy=True))
        on_grid = network(states, grid.expand(len(states), -1))
        trusted = base_rewards.abs() <= self.trusted * self.reward_scale
        modes = ascend(
            lambda rewards: network(states, rewards[:, None])[:, 0],
            torch.where(trusted, base_rewards, grid[on_grid.argmax(1)]),
            limit=grid[-1].item(),
            steps=self.steps,
            step_size=self.step_size,
            shrink=self.shrink,
        )
        return modes, density_std(on_grid, grid)


def ascend(
    energy: Callable[[Float[Tensor, " row"]], Float[Tensor, " row"]],
    start: Float[Tensor, " row"],
    *,
    limit: float = math.inf,
    steps: int = 50,
    step_size: float = 0.5,
    shrink: float = 0.1,
) -> Float[Tensor, " row"]:
    """Gradient ascent on the reward, for each row alone: no row's end depends on another's.

    `r + step * df/dr` is taken if `f` rises, else the row's step is multiplied by `shrink`; a row
    with a step below 1e-6 has arrived. `f` never falls on the way. Lochab and Zhang 2025, the
    inference step; the defaults are those with which they score in RL.

    Args:
        energy: `f` of each row's reward; row by row, for its sum is differentiated.
        start: Where each row begins.
        limit: Steps that would leave `[-limit, limit]` end at its edge.
        steps: At most, refused ones included.
        step_size: The first.
        shrink: Below 1.
    """
    rewards, sizes = start.clamp(-limit, limit), torch.full_like(start, step_size)
    values, slopes = _value_and_slope(energy, rewards)
    for _ in range(steps):
        moving = sizes >= MIN_STEP
        if not bool(moving.any()):
            break
        proposals = (rewards + sizes * slopes).clamp(-limit, limit)
        new_values, new_slopes = _value_and_slope(energy, proposals)
        better = moving & (new_values > values)
        rewards = torch.where(better, proposals, rewards)
        values = torch.where(better, new_values, values)
        slopes = torch.where(better, new_slopes, slopes)
        sizes = torch.where(better, sizes, sizes * shrink)
    return rewards


def density_std(
    energies: Float[Tensor, "row point"], grid: Float[Tensor, " point"]
) -> Float[Tensor, " row"]:
    """The std of `exp f`, normalised over an even grid (the trapezoidal rule)."""
    masses = (energies + quadrature_log_weights(grid)).softmax(1)
    means = (masses * grid).sum(1, keepdim=True)
    return (masses * (grid - means).square()).sum(1).sqrt()


def quadrature_log_weights(grid: Float[Tensor, " point"]) -> Float[Tensor, " point"]:
    """Logarithms of the trapezoidal rule's weights on an even grid: half a step at the ends."""
    weights = (grid[1] - grid[0]).expand(len(grid)).clone()
    weights[[0, -1]] /= 2
    return weights.log()


def _value_and_slope(
    energy: Callable[[Tensor], Tensor], rewards: Float[Tensor, " row"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    with torch.enable_grad():
        rewards = rewards.detach().requires_grad_()
        values = energy(rewards)
        (slopes,) = torch.autograd.grad(values.sum(), rewards)
    return values.detach(), slopes


@contextmanager
def _without_gradients(device: torch.device) -> Iterator[None]:
    """As no_grad, but such that the ascent's own derivative works, in inference mode too."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _linear_layers(sizes: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
