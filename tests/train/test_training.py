"""SFT, reward and policy training on tiny models: they learn, and resume exactly."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from trueward import objectives
from trueward.data.formats import DataError, DemonstrationRow, LoadReport, PreferenceRow
from trueward.data.packing import Group
from trueward.losses.policy import kl_estimate
from trueward.models.policy import Policy, ValueModel
from trueward.models.reward_model import RewardModel
from trueward.sampling import Sample
from trueward.testing import tiny_backbone, tiny_language_model, tiny_preferences, tiny_texts
from trueward.testing import tiny_tokenizer as make_tokenizer
from trueward.train.policy import (
    PolicyConfig,
    Rollouts,
    advantages_of,
    observe,
    penalised,
    rollout_metrics,
    train_policy,
)
from trueward.train.reward import RewardConfig, encode_pairs, member_subsets, train_reward
from trueward.train.sft import SFTConfig, train_sft

TOKENIZER = make_tokenizer()


def new_policy(seed: int = 0) -> Policy:
    return Policy(tiny_language_model(vocab_size=len(TOKENIZER), seed=seed), TOKENIZER)


def new_reward_model(members: int = 0, seed: int = 0) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER), seed=seed)
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members, seed=seed)


def preferences(count: int = 64) -> list[PreferenceRow]:
    return [PreferenceRow(*row, where=f"made:{i}") for i, row in enumerate(tiny_preferences(count))]


DEMONSTRATIONS = [
    DemonstrationRow(p, c, where=f"made:{i}")
    for i, (p, c) in enumerate(zip(tiny_texts(32), tiny_texts(32, seed=5), strict=True))
]


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- SFT -----------------------------------------------------------------------------------


def test_the_first_sft_loss_is_the_mean_negative_log_likelihood_of_the_completions(tmp_path: Path):
    policy = new_policy()
    rows = DEMONSTRATIONS[:4]
    total = count = 0.0
    for row in rows:
        prompt = TOKENIZER(row.prompt).input_ids
        answer = [*TOKENIZER(row.completion).input_ids, TOKENIZER.eos_token_id]
        logits = policy.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        count += len(answer)
    config = SFTConfig(learning_rate=1e-3, epochs=1.0, batch_size=4, progress=False)
    train_sft(policy, rows, config, output_dir=tmp_path)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_lowers_the_loss(tmp_path: Path):
    config = SFTConfig(learning_rate=5e-3, epochs=4.0, batch_size=8, progress=False)
    train_sft(new_policy(), DEMONSTRATIONS, config, output_dir=tmp_path)
    rows = metrics_of(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_a_demonstration_that_does_not_fit_is_counted_by_its_line():
    report = LoadReport("made")
    long = DemonstrationRow("p", "cat " * 400, where="file.jsonl:17")
    config = SFTConfig(learning_rate=1e-3, epochs=1.0, batch_size=4, max_length=64, progress=False)
    train_sft(new_policy(), [*DEMONSTRATIONS[:4], long], config, report=report)
    assert report.counts() == {"over-long": 1}
    assert "file.jsonl:17" in report.summary()


def test_nothing_that_fits_is_an_error_with_the_remedy():
    with pytest.raises(DataError, match="max_length=2"):
        train_sft(new_policy(), DEMONSTRATIONS[:2], SFTConfig(max_length=2, progress=False))


def test_a_resumed_sft_reports_the_loss_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from trueward.train import loop

    config = SFTConfig(
        learning_rate=1e-3, epochs=15.0, batch_size=16, checkpoint_every=29, progress=False
    )  # 30 steps: the summary's loss is the mean of the last three
    train_sft(new_policy(), DEMONSTRATIONS, config, output_dir=tmp_path / "whole")
    saved = loop.Loop.checkpoint

    def dying(self: loop.Loop) -> None:
        saved(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        train_sft(new_policy(), DEMONSTRATIONS, config, output_dir=tmp_path / "killed")
    train_sft(new_policy(), DEMONSTRATIONS, config, output_dir=tmp_path / "killed")
    losses = [
        json.loads((tmp_path / n / "summary.json").read_text())["metrics"]["loss"]
        for n in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    last = [m["loss"] for m in metrics_of(tmp_path / "whole")[-3:]]
    assert losses[0] == pytest.approx(sum(last) / 3)


# ---- reward --------------------------------------------------------------------------------


def test_the_first_reward_loss_is_bradley_terry_plus_centring(tmp_path: Path):
    model = new_reward_model()
    rows = preferences(8)
    chosen = model.score([r.prompt for r in rows], [r.chosen for r in rows]).means[:, 0]
    rejected = model.score([r.prompt for r in rows], [r.rejected for r in rows]).means[:, 0]
    expected = torch.nn.functional.softplus(rejected - chosen) + 0.1 * (chosen + rejected) ** 2
    config = RewardConfig(learning_rate=1e-3, batch_size=8, centring=0.1, progress=False)
    train_reward(model, rows, config, output_dir=tmp_path)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_margins_of_rows_enter_inside_the_sigmoid(tmp_path: Path):
    rows = [dataclasses.replace(r, margin=3.0) for r in preferences(8)]
    config = RewardConfig(learning_rate=1e-3, batch_size=8, centring=0.0, progress=False)
    for name, some in (("with", rows), ("without", preferences(8))):
        train_reward(new_reward_model(), some, config, output_dir=tmp_path / name)
    losses = [metrics_of(tmp_path / n)[0]["loss"] for n in ("with", "without")]
    assert losses[0] > losses[1] + 2


@pytest.mark.parametrize("members", [0, 3])
def test_a_reward_model_learns_a_clear_preference(members: int):
    model = new_reward_model(members)
    config = RewardConfig(learning_rate=3e-3, batch_size=16, epochs=6.0, progress=False)
    train_reward(model, preferences(96), config)
    fresh = [PreferenceRow(*row) for row in tiny_preferences(40, seed=77)]
    chosen = model.score([r.prompt for r in fresh], [r.chosen for r in fresh]).mean
    rejected = model.score([r.prompt for r in fresh], [r.rejected for r in fresh]).mean
    assert (chosen > rejected).float().mean() > 0.9


def test_members_are_on_one_scale_on_the_reference_samples():
    model = new_reward_model(3)
    reference = (tiny_texts(20), tiny_texts(20, seed=3))
    config = RewardConfig(learning_rate=3e-3, batch_size=16, progress=False)
    train_reward(model, preferences(32), config, reference=reference)
    means = model.score(*reference).means
    torch.testing.assert_close(means.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(means.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_a_row_longer_than_the_limit_is_counted_and_a_long_prompt_is_cut_from_the_left():
    model, report = new_reward_model(), LoadReport("made")
    rows = [
        PreferenceRow("dog " * 300, "cat", "bird", where="f:1"),
        PreferenceRow("p", "cat " * 300, "bird", where="f:2"),
    ]
    pairs = encode_pairs(model, rows, 40, report)
    assert len(pairs) == 1
    prompt, (chosen, rejected) = pairs[0].group
    assert len(prompt) + max(len(chosen), len(rejected)) == 40
    assert chosen[-1] == rejected[-1] == TOKENIZER.eos_token_id
    assert report.counts() == {"over-long": 1}
    assert report.problems[0].where == "f:2"


def test_subsets_are_fixed_by_seed_and_leave_no_pair_unseen():
    pairs = [Group([i, i + 1], [[i], [2 * i]]) for i in range(4000)]
    seen = member_subsets(pairs, 5, share=0.5, seed=1)
    # keyed by the pair, not by where it stands
    assert torch.equal(seen.flip(0), member_subsets(pairs[::-1], 5, share=0.5, seed=1))
    assert seen.any(1).all()
    assert seen.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert member_subsets(pairs[:10], 1, share=0.5, seed=1).all()


def test_a_row_too_long_for_the_model_does_not_stop_training_without_reference_samples():
    model = new_reward_model()
    rows = [PreferenceRow("p", "cat " * 600, "bird", where="f:1"), *preferences(8)]
    report = LoadReport("made")
    config = RewardConfig(learning_rate=1e-3, batch_size=8, progress=False)
    train_reward(model, rows, config, report=report)
    assert report.counts() == {"over-long": 1}
    assert model.reward_std.item() != 1.0


def test_every_pair_is_seen_in_an_epoch_also_those_of_a_short_last_batch(tmp_path: Path):
    config = RewardConfig(learning_rate=1e-3, batch_size=16, epochs=1.0, progress=False)
    train_reward(new_reward_model(), preferences(20), config, output_dir=tmp_path)
    assert len(metrics_of(tmp_path)) == 2
    summary = json.loads((tmp_path / "summary.json").read_text())["metrics"]
    assert summary["pairs"] == 20
    assert summary["reference/std"] > 0


def test_options_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match="label_smoothing is for a scalar head"):
        train_reward(new_reward_model(2), preferences(8), RewardConfig(label_smoothing=0.1))
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    with pytest.raises(ValueError, match="head_dropout is for Gaussian heads"):
        RewardModel.from_backbone(backbone, TOKENIZER, head_dropout=0.1)


class StopHereError(Exception):
    """Stands for the kill."""


@pytest.mark.parametrize("members", [0, 2])
def test_reward_training_resumes_exactly(tmp_path: Path, members: int):
    config = RewardConfig(learning_rate=1e-3, batch_size=8, checkpoint_every=2, progress=False)
    whole = train_reward(new_reward_model(members), preferences(48), config)
    calls = 0

    class Killer(torch.nn.Module):
        """A helper that weighs nothing and dies in step 4."""

        def forward(self, reward_model: RewardModel, step: int) -> tuple[torch.Tensor, dict]:
            nonlocal calls
            calls += 1
            if step == 4:
                raise StopHereError
            return 0 * reward_model.head.linear.weight.sum(), {}

    with pytest.raises(StopHereError):
        train_reward(
            new_reward_model(members),
            preferences(48),
            config,
            output_dir=tmp_path,
            auxiliary=Killer(),
        )
    resumed = train_reward(new_reward_model(members), preferences(48), config, output_dir=tmp_path)
    assert calls == 4
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = RewardModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.head.linear.weight, whole.head.linear.weight)


# ---- policy --------------------------------------------------------------------------------


def word_reward(prompts: list, completions: list) -> list[float]:
    return [float(c.split().count("cat")) for c in completions]


def test_each_algorithm_raises_a_plain_function_s_reward(tmp_path: Path):
    for algorithm in ("ppo", "rloo", "grpo"):
        policy = new_policy()
        train_policy(
            policy,
            lambda prompts, completions: [float(len(set(c))) for c in completions],
            tiny_texts(8),
            PolicyConfig(
                algorithm=algorithm,
                steps=12,
                prompts_per_step=8,
                completions_per_prompt=4,
                max_new_tokens=8,
                learning_rate=1e-2,
                kl_coef=0.0,
                progress=False,
            ),
            output_dir=tmp_path / algorithm,
        )
        rewards = [m["reward"] for m in metrics_of(tmp_path / algorithm)]
        assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1, algorithm


def test_the_first_update_starts_from_ratio_one_and_kl_zero(tmp_path: Path):
    config = PolicyConfig(
        steps=1, prompts_per_step=4, max_new_tokens=6, learning_rate=1e-3, progress=False
    )
    train_policy(new_policy(), new_reward_model(), tiny_texts(6), config, output_dir=tmp_path)
    first = metrics_of(tmp_path)[0]
    assert first["kl/k1"] == first["kl/k3"] == 0.0
    assert abs(first["kl/update"]) < 1e-6
    assert first["clip_fraction"] == 0.0


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_policy_training_resumes_exactly(tmp_path: Path, algorithm: str):
    config = PolicyConfig(
        algorithm=algorithm,
        steps=5,
        prompts_per_step=4,
        completions_per_prompt=2,
        inner_epochs=2,
        minibatches=2,
        max_new_tokens=6,
        learning_rate=1e-3,
        checkpoint_every=2,
        progress=False,
    )
    reward = new_reward_model(2)
    whole = train_policy(new_policy(), reward, tiny_texts(9), config, output_dir=tmp_path / "whole")
    seen = 0

    def dying(prompts: list, completions: list) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise StopHereError
        return reward.score(prompts, completions).mean

    critic = None if algorithm == "rloo" else ValueModel.from_reward_model(reward)
    with pytest.raises(StopHereError):
        train_policy(
            new_policy(),
            dying,
            tiny_texts(9),
            config,
            critic=copy.deepcopy(critic),
            output_dir=tmp_path / "killed",
        )
    resumed = train_policy(
        new_policy(), reward, tiny_texts(9), config, output_dir=tmp_path / "killed"
    )
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    # The wrapped function has one member, so diagnostics differ before the kill, not after.
    last = [metrics_of(tmp_path / n)[-1] for n in ("whole", "killed")]
    assert last[0] == last[1]


def test_with_an_adapter_the_reference_is_the_adapter_switched_off(tmp_path: Path):
    policy = new_policy()
    before = copy.deepcopy(policy.model.state_dict())
    policy.add_lora(4)
    config = PolicyConfig(
        algorithm="rloo",
        steps=3,
        prompts_per_step=4,
        max_new_tokens=6,
        learning_rate=3e-2,
        progress=False,
    )
    train_policy(policy, word_reward_or_length, tiny_texts(6), config, output_dir=tmp_path)
    assert metrics_of(tmp_path)[-1]["kl/k2"] > 0
    with policy.adapter_off():
        base = policy.model.get_base_model().state_dict()
    for name, value in before.items():
        assert torch.equal(base[name.replace("_proj.", "_proj.base_layer.")], value)
    assert Policy.from_pretrained(tmp_path / "model").device.type == "cpu"


def word_reward_or_length(prompts: list, completions: list) -> list[float]:
    return [float(len(c)) for c in completions]


def made_rollouts(scores: list[float], *, group: int = 2) -> Rollouts:
    """Completions of 2 and 1 tokens with log-ratios 0.5 a token."""
    lengths = [2, 1] * (len(scores) // 2)
    samples = [
        Sample(
            prompt_index=i // group,
            prompt_ids=[5],
            completion_ids=[6] * n,
            logprobs=[0.0] * n,
            text="x",
            finished=True,
        )
        for i, n in enumerate(lengths)
    ]
    mask = torch.tensor([[True, n > 1] for n in lengths])
    logprobs = torch.where(mask, -1.0, 0.0)
    return Rollouts(
        samples, torch.tensor(scores), logprobs, logprobs * 1.5, torch.zeros(len(scores), 2), mask
    )


def test_rloo_compares_rewards_less_the_whole_completion_s_k1():
    rollouts = made_rollouts([1.0, 3.0])
    config = PolicyConfig(algorithm="rloo", completions_per_prompt=2, kl_coef=0.1)
    advantages, _ = advantages_of(rollouts, config)
    # 1 - 0.1 * 2 * 0.5 = 0.9 and 3 - 0.1 * 0.5 = 2.95: differences of 2.05 to each other
    torch.testing.assert_close(advantages, torch.tensor([[-2.05, -2.05], [2.05, 0.0]]))


def test_ppo_pays_k1_by_token_and_the_score_at_the_last():
    rollouts = made_rollouts([1.0, 3.0])
    config = PolicyConfig(kl_coef=0.1, gae_lambda=1.0, scale_advantages=False)
    advantages, returns = advantages_of(rollouts, config)
    expected = torch.tensor([[0.90, 0.95], [2.95, 0.0]])  # no values: returns to go
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected)


def test_a_constant_reward_gives_no_advantage_and_no_change_of_the_policy():
    rollouts = made_rollouts([2.0, 2.0])
    for algorithm in ("rloo", "grpo"):
        config = PolicyConfig(algorithm=algorithm, completions_per_prompt=2, kl_coef=0.0)
        advantages, _ = advantages_of(rollouts, config)
        assert not advantages.any()
    policy = new_policy()
    before = copy.deepcopy(policy.state_dict())
    config = PolicyConfig(
        algorithm="rloo", steps=2, prompts_per_step=2, max_new_tokens=5, kl_coef=0.0, progress=False
    )
    train_policy(policy, lambda p, c: [1.0] * len(c), tiny_texts(4), config)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_reward_that_is_not_finite_leaves_baseline_loss_and_metrics():
    rollouts = made_rollouts([1.0, math.nan, 3.0, 1.0], group=2)
    for algorithm in ("ppo", "rloo", "grpo"):
        config = PolicyConfig(algorithm=algorithm, completions_per_prompt=2, kl_coef=0.0)
        advantages, _ = advantages_of(rollouts, config)
        assert advantages.isfinite().all()
        assert not advantages[1].any()
    metrics = rollout_metrics(rollouts)
    assert metrics["reward"] == pytest.approx(5 / 3)
    assert metrics["reward_nonfinite"] == 1


def test_no_finite_reward_at_all_stops_with_a_sentence():
    config = PolicyConfig(steps=1, prompts_per_step=2, max_new_tokens=3, progress=False)
    with pytest.raises(ValueError, match="No completion of step 1 got a finite reward"):
        train_policy(new_policy(), lambda p, c: [None] * len(c), tiny_texts(3), config)


def test_clipping_comes_before_the_penalty_for_a_missing_eos():
    rollouts = made_rollouts([1.0, 9.0])
    samples = [rollouts.samples[0], dataclasses.replace(rollouts.samples[1], finished=False)]
    config = PolicyConfig(reward_clip=2.0, missing_eos_penalty=0.5)
    assert penalised(rollouts.scores, samples, config).tolist() == [1.0, 1.5]


def test_observed_values_and_kl_match_separate_forwards():
    policy, reward = new_policy(), new_reward_model()
    other = new_policy(seed=1)
    critic = ValueModel.from_reward_model(reward)
    samples = [
        Sample(
            prompt_index=i,
            prompt_ids=[7 + i, 8],
            completion_ids=[9, 10 + i, 2][: 2 + i],
            logprobs=[],
            text="",
            finished=True,
        )
        for i in range(2)
    ]
    rollouts = observe(policy, other, critic, samples, torch.zeros(2), PolicyConfig())
    for i, drawn in enumerate(samples):
        ids = torch.tensor([drawn.prompt_ids + drawn.completion_ids])
        n = len(drawn.completion_ids)
        for model, found in ((policy, rollouts.logprobs), (other, rollouts.ref_logprobs)):
            logits = model.model(ids).logits[0, 1:-1].log_softmax(-1)
            expected = logits[range(n), drawn.completion_ids]
            torch.testing.assert_close(found[i, :n], expected, atol=1e-5, rtol=0)
        states = critic.backbone(ids).last_hidden_state[0, 1:-1]
        expected = critic.head(states).means[:, 0] + critic.bias
        torch.testing.assert_close(rollouts.values[i, :n], expected, atol=1e-5, rtol=0)
    kl = kl_estimate(rollouts.logprobs, rollouts.ref_logprobs, estimator="k1")
    assert kl[0].abs().sum() > 0


def test_the_critic_starts_with_the_reward_model_s_values():
    reward = new_reward_model()
    reward.reward_std.fill_(2.0)
    reward.reward_mean.fill_(3.0)
    critic = ValueModel.from_reward_model(reward)
    assert critic.bias.item() == -1.5  # -mean / std: the rewards' own scale
    torch.testing.assert_close(critic.head.linear.weight, reward.head.linear.weight / 2)
    assert critic.backbone is not reward.backbone
    assert not ValueModel.from_reward_model(new_reward_model(2)).head.linear.weight.any()


def test_several_reward_models_are_one_ensemble_under_any_objective(tmp_path: Path):
    models = [new_reward_model(seed=s) for s in range(3)]
    config = PolicyConfig(
        algorithm="rloo", steps=1, prompts_per_step=2, max_new_tokens=4, progress=False
    )
    train_policy(
        new_policy(),
        models,
        tiny_texts(3),
        config,
        objective=objectives.worst_case,
        output_dir=tmp_path,
    )
    row = metrics_of(tmp_path)[0]
    assert row["reward"] == pytest.approx(row["objective/worst_case"])
    assert row["objective/member_std"] > 0


def test_evaluation_is_called_every_so_many_steps_and_at_the_end():
    called: list[int] = []

    def evaluation(policy: Policy, step: int) -> dict[str, float]:
        called.append(step)
        return {}

    config = PolicyConfig(
        algorithm="rloo",
        steps=5,
        prompts_per_step=2,
        max_new_tokens=3,
        evaluate_every=2,
        progress=False,
    )
    train_policy(new_policy(), word_reward, tiny_texts(3), config, evaluation=evaluation)
    assert called == [2, 4, 5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"algorithm": "rloo", "completions_per_prompt": 1}, "at least 2, got 1"),
        ({"minibatches": 40}, "cannot exceed prompts_per_step"),
        ({"kl_coef": -1.0}, "kl_coef must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"inner_epochs": 0}, "inner_epochs must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        PolicyConfig(**options)
