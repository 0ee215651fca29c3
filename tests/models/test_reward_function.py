import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data.formats import DataError
from trueward.models.reward_function import load_reward_models, posterior_function, save_ensemble
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.testing import tiny_backbone, tiny_tokenizer

PROMPTS, COMPLETIONS = ["the cat", "the dog", "a bird"], ["runs", "sees a tree", "sleeps today"]


def reward_model(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, members: int = 0):
    model = RewardModel.from_backbone(tiny_backbone(), tokenizer, members=members, seed=seed)
    model.reward_mean = torch.arange(1.0, 1.0 + model.members)
    model.reward_std = torch.full((model.members,), 2.0)
    return model


@pytest.mark.parametrize("members", [0, 3])
def test_a_reward_model_gives_its_posterior_on_its_saved_scale(
    tokenizer: PreTrainedTokenizerFast, members: int
) -> None:
    model = reward_model(tokenizer, members=members)
    posterior = posterior_function(model)(PROMPTS, COMPLETIONS)
    raw = model.score(PROMPTS, COMPLETIONS, normalise=False)
    torch.testing.assert_close(posterior.means, (raw.means - model.reward_mean) / 2)
    assert (posterior.stds is None) == (members == 0)


def test_several_reward_models_are_the_members_of_one_posterior(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    models = [reward_model(tokenizer, seed=seed) for seed in (0, 1, 2)]
    posterior = posterior_function(models)(PROMPTS, COMPLETIONS)
    assert posterior.means.shape == (3, 3)
    for column, model in enumerate(models):
        alone = model.score(PROMPTS, COMPLETIONS, normalise=True).means[:, 0]
        torch.testing.assert_close(posterior.means[:, column], alone)
    assert posterior.variance.min() > 0
    gaussian = [reward_model(tokenizer, seed=seed, members=2) for seed in (0, 1)]
    assert posterior_function(tuple(gaussian))(PROMPTS, COMPLETIONS).stds.shape == (3, 4)


def test_an_empty_ensemble_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one reward model, got none"):
        posterior_function([])


def test_a_list_with_none_keeps_a_gap() -> None:
    posterior = posterior_function(lambda p, c: [1, None, 2.5])(PROMPTS, COMPLETIONS)
    assert posterior.means.dtype == torch.float32
    first, gap, last = posterior.means[:, 0].tolist()
    assert (first, last) == (1.0, 2.5)
    assert math.isnan(gap)
    assert posterior.stds is None


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3]),
        np.array([1.0, 2.0, 3.0]),
        (1, 2, 3),
        [torch.tensor(1.0), 2, np.float64(3)],
    ],
)
def test_tensors_arrays_and_sequences_are_columns_of_one_member(rewards: object) -> None:
    posterior = posterior_function(lambda p, c: rewards)(PROMPTS, COMPLETIONS)
    assert torch.equal(posterior.means, torch.tensor([[1.0], [2.0], [3.0]]))


def test_a_posterior_passes_as_it_is() -> None:
    given = RewardPosterior(torch.ones(3, 2), torch.ones(3, 2))
    assert posterior_function(lambda p, c: given)(PROMPTS, COMPLETIONS) is given


def lengths(prompts: list, completions: list) -> list[float]:
    return [float(len(p) - len(c)) for p, c in zip(prompts, completions, strict=True)]


def reordered(completions: list, prompts: list) -> list[float]:
    return lengths(prompts, completions)


def keyword_only(*, completions: list, prompts: list, weight: float = 1.0) -> list[float]:
    return lengths(prompts, completions)


def as_trl_writes_them(completions: list, **kwargs: object) -> list[float]:
    return lengths(kwargs["prompts"], completions)


def other_names(questions: list, answers: list) -> list[float]:
    return lengths(questions, answers)


def any_keywords(first: list, second: list, **kwargs: object) -> list[float]:
    return lengths(first, second)


class Callable:
    def __call__(self, prompts: list, completions: list) -> list[float]:
        return lengths(prompts, completions)


@pytest.mark.parametrize(
    "function",
    [
        lengths,
        reordered,
        keyword_only,
        as_trl_writes_them,
        other_names,
        any_keywords,
        Callable(),
    ],
)
def test_parameters_go_by_name_where_they_are_named_as_in_trl(function) -> None:
    posterior = posterior_function(function)(PROMPTS, COMPLETIONS)
    assert posterior.means[:, 0].tolist() == [3.0, -4.0, -6.0]


@pytest.mark.parametrize(
    "rewards",
    [[1.0, 2.0], torch.zeros(4), RewardPosterior(torch.zeros(1, 1)), []],
)
def test_a_wrong_count_is_refused(rewards: object) -> None:
    with pytest.raises(ValueError, match=r"returned \d rewards for 3 completions"):
        posterior_function(lambda p, c: rewards)(PROMPTS, COMPLETIONS)


def test_a_wrong_shape_and_a_missing_return_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for each completion.*\(3, 1\)"):
        posterior_function(lambda p, c: torch.zeros(3, 1))(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="returned None"):
        posterior_function(lambda p, c: None)(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="one number for each completion"):
        posterior_function(lambda p, c: 1.0)(PROMPTS, COMPLETIONS)


def test_a_runs_folder_stands_for_its_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = RewardModel.from_backbone(tiny_backbone(vocab_size=len(tokenizer)), tokenizer)
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").write_text("{}")
    (loaded,) = load_reward_models(tmp_path / "run")
    assert torch.equal(loaded.score(["a"], ["b"]).means, model.score(["a"], ["b"]).means)
    save_ensemble(tmp_path / "both", ["../run/model", "../run/model"])
    assert len(load_reward_models(tmp_path / "both", tmp_path / "run")) == 3
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "ensemble.json").write_text('{"members": []}')
    with pytest.raises(DataError, match="names no members"):
        load_reward_models(tmp_path / "none")
