"""Policy optimisation with an objective that changes over the run, and with the KL in the loss."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trueward import objectives
from trueward.models.policy import Policy, ValueModel
from trueward.models.reward_model import RewardModel
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.sampling import Sample, SamplingConfig, sample
from trueward.testing import tiny_backbone, tiny_language_model, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train import policy as policy_module
from trueward.train.loop import Loop
from trueward.train.policy import (
    PolicyConfig,
    Rollouts,
    advantages_of,
    sample_batches,
    train_policy,
)

TOKENIZER = make_tokenizer()
ALGORITHMS = ("ppo", "rloo", "grpo")
SMALL: dict[str, Any] = {
    "prompts_per_step": 3,
    "completions_per_prompt": 2,
    "max_new_tokens": 5,
    "progress": False,
}
PENALISED = ObjectiveConfig(name="uncertainty_penalised", coef=0.7)
SCHEDULED = ObjectiveConfig(
    name="reward_robust", nominal_weight=1.0, nominal_weight_end=0.2, schedule="cosine"
)


def new_policy(seed: int = 0) -> Policy:
    return Policy(tiny_language_model(vocab_size=len(TOKENIZER), seed=seed), TOKENIZER)


def new_reward_model(members: int = 3) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- objectives that change --------------------------------------------------------------------


def test_a_run_s_objective_sees_every_step_once_and_is_logged(tmp_path: Path) -> None:
    seen: list[RewardPosterior] = []
    model = new_reward_model()

    def reward(prompts: list[str], completions: list[str]) -> RewardPosterior:
        seen.append(model.score(prompts, completions))
        return seen[-1]

    config = PolicyConfig(algorithm="rloo", steps=4, learning_rate=1e-3, **SMALL)
    objective = PENALISED.build()
    train_policy(
        new_policy(), reward, tiny_texts(5), config, objective=objective, output_dir=tmp_path
    )
    running = objectives.RunningMean()
    for row, posterior in zip(metrics_of(tmp_path), seen, strict=True):
        rewards, running = objectives.uncertainty_penalised(posterior, coef=0.7, running=running)
        assert row["objective/running_std"] == pytest.approx(running.mean)
        assert row["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert running.count == 4 * 6
    assert isinstance(objective, objectives.UncertaintyPenalised)
    assert objective.running_count.item() == 0  # the run had a copy of its own


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (SCHEDULED, [1.0, 0.8, 0.4, 0.2]),  # (1 - cos(pi / 3)) / 2 = 1/4
        (ObjectiveConfig(name="reward_robust", nominal_weight=0.3), [0.3] * 4),
    ],
)
def test_the_weight_goes_from_the_first_step_to_the_last(
    tmp_path: Path, config: ObjectiveConfig, weights: list[float]
) -> None:
    train_policy(
        new_policy(),
        new_reward_model(),
        tiny_texts(5),
        PolicyConfig(algorithm="rloo", steps=4, **SMALL),
        objective=config.build(),
        output_dir=tmp_path,
    )
    rows = metrics_of(tmp_path)
    assert [row["objective/nominal_weight"] for row in rows] == pytest.approx(weights)
    for row, weight in zip(rows, weights, strict=True):
        mixed = weight * row["objective/nominal"] + (1 - weight) * row["objective/worst_case"]
        assert row["reward"] == pytest.approx(mixed, abs=1e-5)


def test_a_run_of_one_step_is_at_the_start_of_its_schedule(tmp_path: Path) -> None:
    config = PolicyConfig(algorithm="rloo", steps=1, **SMALL)
    objective = SCHEDULED.build()
    train_policy(
        new_policy(),
        new_reward_model(),
        tiny_texts(3),
        config,
        objective=objective,
        output_dir=tmp_path,
    )
    assert metrics_of(tmp_path)[0]["objective/nominal_weight"] == 1.0


def test_a_plain_objective_logs_nothing_of_its_own(tmp_path: Path) -> None:
    config = PolicyConfig(algorithm="rloo", steps=1, **SMALL)
    train_policy(new_policy(), new_reward_model(), tiny_texts(3), config, output_dir=tmp_path)
    keys = {"objective/running_std", "objective/nominal_weight", "loss/kl"}
    assert not keys & metrics_of(tmp_path)[0].keys()


@pytest.mark.parametrize("objective", [PENALISED, SCHEDULED], ids=["penalised", "scheduled"])
def test_a_killed_run_goes_on_with_what_its_objective_knew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: ObjectiveConfig
) -> None:
    config = PolicyConfig(
        steps=5, learning_rate=1e-3, checkpoint_every=2, kl_in="loss", kl_coef=0.1, **SMALL
    )
    reward = new_reward_model()
    run = partial(train_policy, prompts=tiny_texts(7), config=config)
    whole = run(new_policy(), reward, objective=objective.build(), output_dir=tmp_path / "whole")
    learn, steps = policy_module._learn, 0

    def dying(*args: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == 4:  # two steps after the checkpoint of step 2 was begun
            raise KeyboardInterrupt
        return learn(*args)

    same = objective.build()  # as in a notebook: the object of the killed run is used again
    monkeypatch.setattr(policy_module, "_learn", dying)
    with pytest.raises(KeyboardInterrupt):
        run(new_policy(), reward, objective=same, output_dir=tmp_path / "killed")
    monkeypatch.setattr(policy_module, "_learn", learn)
    resumed = run(new_policy(), reward, objective=same, output_dir=tmp_path / "killed")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")


def test_a_module_that_is_no_run_s_objective_is_a_plain_function(tmp_path: Path) -> None:
    class Lowest(torch.nn.Module):
        def forward(self, posterior: RewardPosterior) -> Tensor:
            return objectives.worst_case(posterior)

    config = PolicyConfig(algorithm="rloo", steps=1, **SMALL)
    train_policy(
        new_policy(),
        new_reward_model(),
        tiny_texts(3),
        config,
        objective=Lowest(),
        output_dir=tmp_path,
    )
    row = metrics_of(tmp_path)[0]
    assert row["reward"] == pytest.approx(row["objective/worst_case"])


# ---- the KL in the loss ------------------------------------------------------------------------


def away_from_its_reference() -> Policy:
    """A policy whose adapter has moved it; the reference is the adapter switched off."""
    policy = new_policy()
    policy.add_lora(4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_kl_in_the_loss_has_the_gradient_of_its_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    rollouts: list[Rollouts] = []
    gradients: dict[str, Tensor] = {}
    policy, observe, update = away_from_its_reference(), policy_module.observe, Loop.update

    def observing(*args: Any, **options: Any) -> Rollouts:
        rollouts.append(observe(*args, **options))
        return rollouts[-1]

    def updating(loop: Loop) -> float:
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()
        return update(loop)

    monkeypatch.setattr(policy_module, "observe", observing)
    monkeypatch.setattr(Loop, "update", updating)
    before = copy.deepcopy(policy)
    config = PolicyConfig(
        algorithm=algorithm,  # type: ignore[arg-type]
        steps=1,
        kl_coef=0.3,
        kl_in="loss",
        temperature=0.8,
        max_grad_norm=0.0,
        max_batch_tokens=40,  # several parts
        **SMALL,
    )
    nothing = [0.0] * 6  # no reward, and a critic that starts at 0: the KL is the whole loss
    train_policy(policy, lambda p, c: nothing, tiny_texts(4), config, output_dir=tmp_path)

    total, count = torch.zeros(()), 0
    for drawn in rollouts[0].samples:
        with before.adapter_off(), torch.no_grad():
            ref_logprobs = logprobs_of(before, drawn)
        ratios = logprobs_of(before, drawn) - ref_logprobs
        total, count = total + ratios.square().sum(), count + len(ratios)
    (0.3 * total / count).backward()
    row = metrics_of(tmp_path)[0]
    assert row["loss/kl"] == pytest.approx((total / count).item(), rel=1e-4)
    assert row["loss/kl"] > 0.01
    assert row["loss/policy"] == pytest.approx(0.0, abs=1e-7)
    wanted = {n: p.grad for n, p in before.named_parameters() if p.grad is not None}
    assert wanted.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-3)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


def logprobs_of(policy: Policy, drawn: Sample) -> Tensor:
    """Log-probabilities of a completion's tokens at temperature .8, one sequence at a time."""
    ids = torch.tensor([drawn.prompt_ids + drawn.completion_ids])
    logits = policy.model(ids).logits[0, len(drawn.prompt_ids) - 1 : -1] / 0.8
    places = torch.arange(len(drawn.completion_ids))
    return logits.log_softmax(-1)[places, torch.tensor(drawn.completion_ids)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_reward_is_paid_as_it_is_where_the_kl_is_in_the_loss(algorithm: str) -> None:
    samples = [
        Sample(
            prompt_index=0,
            prompt_ids=[5],
            completion_ids=[6] * 2,
            logprobs=[0.0] * 2,
            text="x",
            finished=True,
        )
        for _ in range(2)
    ]
    logprobs, mask = -torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)
    far = torch.tensor([[-3.0, -1.0], [-1.5, -9.0]])
    options = {"algorithm": algorithm, "completions_per_prompt": 2, "kl_coef": 0.5}
    found = []
    for kl_in, ref in (("loss", far), ("loss", logprobs), ("reward", logprobs), ("reward", far)):
        rollouts = Rollouts(
            samples, torch.tensor([1.0, 3.0]), logprobs, ref, torch.zeros(2, 2), mask
        )
        found.append(advantages_of(rollouts, PolicyConfig(kl_in=kl_in, **options)))  # type: ignore[arg-type]
    for advantages, returns in found[:2]:
        torch.testing.assert_close(advantages, found[2][0])
        torch.testing.assert_close(returns, found[2][1])
    assert not torch.allclose(found[3][0], found[2][0])


def test_the_kl_in_the_loss_holds_the_policy_back(tmp_path: Path) -> None:
    ends = {}
    for kl_coef in (0.0, 100.0):
        train_policy(
            new_policy(),
            lambda prompts, completions: [float(len(set(c))) for c in completions],
            tiny_texts(6),
            PolicyConfig(
                algorithm="rloo",
                steps=8,
                learning_rate=1e-2,
                kl_in="loss",
                kl_coef=kl_coef,
                inner_epochs=2,
                **SMALL,
            ),
            output_dir=tmp_path / str(kl_coef),
        )
        ends[kl_coef] = metrics_of(tmp_path / str(kl_coef))[-1]["kl/k2"]
    assert ends[0.0] > 2 * ends[100.0] > 0


# ---- a reward that is made anew within the run ---------------------------------------------------


def test_what_a_refresh_draws_at_random_does_not_move_the_run_that_it_is_part_of() -> None:
    def noise_after(draws: int) -> list[float]:
        seen: list[float] = []

        def reward(prompts: list[str], completions: list[str]) -> Tensor:
            seen.append(torch.rand(()).item())  # what the global state gives at this step
            return torch.tensor([float(len(c)) for c in completions])

        def refresh(policy: Policy, step: int) -> Any:
            torch.rand(draws)  # as training a reward does
            return reward

        config = PolicyConfig(algorithm="rloo", steps=3, refresh_every=2, **SMALL)
        train_policy(new_policy(), reward, tiny_texts(4), config, refresh=refresh)
        return seen

    assert noise_after(1) == noise_after(1000)


def test_a_refresh_and_how_often_belong_together() -> None:
    config = PolicyConfig(algorithm="rloo", steps=2, **SMALL)
    with pytest.raises(ValueError, match="needs both: `refresh`, which makes it, and refresh_ev"):
        train_policy(new_policy(), len, tiny_texts(4), config, refresh=lambda *_: len)


def test_a_critic_that_cannot_read_packed_rows_gets_rows_of_their_own():
    tokenizer = make_tokenizer()
    policy = Policy(tiny_language_model(vocab_size=len(tokenizer)), tokenizer)
    windowed = tiny_backbone("mistral", vocab_size=len(tokenizer), sliding_window=4)
    reward = RewardModel.from_backbone(windowed, tokenizer)
    config = PolicyConfig(
        steps=1, prompts_per_step=2, completions_per_prompt=2, max_new_tokens=6, progress=False
    )
    train_policy(policy, reward, tiny_texts(4), config)
    critic = ValueModel.from_reward_model(reward)
    drawn = sample(policy, tiny_texts(2), SamplingConfig(n=2, max_new_tokens=6))
    together = sample_batches(policy, drawn, range(4), 1000)
    apart = sample_batches(policy, drawn, range(4), 1000, critic=critic)
    assert any(batch.packed for batch, _ in together)
    assert not any(batch.packed for batch, _ in apart)
    found = {tuple(where): policy(batch).logprobs.sum(1) for batch, where in (*together, *apart)}
    flat = [
        torch.cat([found[tuple(w)] for _, w in some])[
            torch.tensor([i for _, w in some for i in w]).argsort()
        ]
        for some in (together, apart)
    ]
    torch.testing.assert_close(*flat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("bf16", "rounded"), [(True, True), (True, False), (False, True)])
def test_a_rounded_copy_writes_with_bf16_on_an_accelerator(
    bf16: bool, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none here: the question whether there is one is answered for it."""
    writers, scored = [], []

    def seen(policy: Policy, *args: Any, **kwargs: Any) -> list[Sample]:
        writers.append(policy)
        return sample(policy, *args, **kwargs)

    def paid(prompts: list[Any], completions: list[Any]) -> Tensor:
        scored.append(torch.is_autocast_enabled("cpu"))
        return torch.tensor([float(len(str(c))) for c in completions])

    monkeypatch.setattr(policy_module, "sample", seen)
    monkeypatch.setattr(policy_module, "_on_accelerator", lambda _: rounded)
    policy = new_policy()
    config = PolicyConfig(
        algorithm="rloo",
        steps=1,
        prompts_per_step=2,
        completions_per_prompt=2,
        max_new_tokens=4,
        bf16=bf16,
        progress=False,
    )
    train_policy(policy, paid, tiny_texts(2), config)
    dtypes = {p.dtype for writer in writers for p in writer.parameters()}
    assert dtypes == {torch.bfloat16 if bf16 and rounded else torch.float32}
    assert scored == [bf16]
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
