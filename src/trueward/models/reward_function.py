"""Reward functions: (prompts, completions) -> tensor or posterior, whatever is behind them."""

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trueward.data.formats import Completion, DataError, PreferenceRow, Prompt
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior

RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], RewardPosterior | Tensor]
Reward = RewardModel | Sequence[RewardModel] | Callable[..., object]
PosteriorFunction = Callable[[Sequence[Prompt], Sequence[Completion]], RewardPosterior]


ENSEMBLE = "ensemble.json"  # in a folder that holds reward models instead of being one


def save_ensemble(folder: str | Path, members: Sequence[str]) -> None:
    """Write which reward models, as paths inside the folder, are the members of an ensemble."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"members": list(members)}, indent=2)
    (folder / ENSEMBLE).write_text(content, encoding="utf-8")


def load_reward_models(*names: str | Path) -> list[RewardModel]:
    """Load reward models by folder or hub id; a folder saved as an ensemble gives its members.

    A run's folder stands for the `model` in it.

    Raises:
        DataError: One of them cannot be read, or an ensemble names no members.
    """
    models: list[RewardModel] = []
    for name in names:
        if (Path(name) / "summary.json").is_file() and (Path(name) / "model").is_dir():
            name = Path(name) / "model"
        listing = Path(name) / ENSEMBLE
        if not listing.is_file():
            models.append(RewardModel.from_pretrained(name))
            continue
        members = json.loads(listing.read_text(encoding="utf-8")).get("members")
        if not members:
            raise DataError(f"{listing} names no members: train the ensemble again.")
        models += [RewardModel.from_pretrained(Path(name) / member) for member in members]
    return models


def fits_context(reward: Reward) -> Callable[[Prompt, Completion], bool]:
    """Return what tells whether a completion fits the context of every model behind a reward.

    A plain function has no context that could be known: everything fits.
    """
    models = [reward] if isinstance(reward, RewardModel) else reward
    if not isinstance(models, Sequence):
        return lambda _prompt, _completion: True
    return lambda prompt, completion: all(m.fits(prompt, completion) for m in models)


def fitting_rows(reward: Reward, rows: Sequence[PreferenceRow]) -> list[PreferenceRow]:
    """Return the rows whose two sides fit the context of every model behind a reward."""
    fits = fits_context(reward)
    return [r for r in rows if fits(r.prompt, r.chosen) and fits(r.prompt, r.rejected)]


def posterior_function(reward: Reward) -> PosteriorFunction:
    """Return one function for a reward model, several of them, or a plain Python function.

    Reward models score on their saved scale. Several models become the members of one posterior
    (a deep ensemble). A plain function may return a posterior, a tensor `[batch]` or a list with
    one number for each completion, `None` where it has none; it is called by keyword when its
    parameters are named as TRL names them (`prompts`, `completions`).
    """
    if isinstance(reward, RewardModel):
        return lambda prompts, completions: reward.score(prompts, completions, normalise=True)
    if isinstance(reward, Sequence):
        if not reward:
            raise ValueError("An ensemble needs at least one reward model, got none.")
        return lambda prompts, completions: RewardPosterior.stack_members(
            [model.score(prompts, completions, normalise=True) for model in reward]
        )
    return lambda prompts, completions: _as_posterior(
        _call(reward, prompts, completions), len(completions)
    )


def _call(
    function: Callable[..., object], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> object:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C tell nothing
        return function(prompts, completions)
    # TRL's own examples take `(completions, **kwargs)`: they want keywords, and perhaps no prompts.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "completions" in parameters and ("prompts" in parameters or takes_any):
        return function(prompts=prompts, completions=completions)
    return function(prompts, completions)


def _as_posterior(rewards: object, count: int) -> RewardPosterior:
    if not isinstance(rewards, RewardPosterior):
        if isinstance(rewards, Sequence):
            rewards = [float("nan") if r is None else float(r) for r in rewards]
        elif rewards is None:
            raise ValueError("The reward function returned None: it must return the rewards.")
        values = torch.as_tensor(rewards, dtype=torch.float32)
        if values.ndim != 1:
            raise ValueError(
                f"A reward function must return one number for each completion, [batch]; got "
                f"shape {tuple(values.shape)}."
            )
        rewards = RewardPosterior(values[:, None])
    if len(rewards) != count:
        raise ValueError(
            f"The reward function returned {len(rewards)} rewards for {count} completions."
        )
    return rewards
