"""Policy optimisation: PPO with a critic, RLOO and GRPO in one visible loop.

Each step draws completions, scores them, pays `score - kl_coef * (log pi - log ref)` (k1, detached,
unclamped; PPO spreads it over the tokens, RLOO and GRPO take its sum from the score), makes
advantages and takes clipped policy-gradient steps. With `kl_in="loss"` the score is paid as it is,
and `kl_coef * (log pi - log ref)^2` stands in the loss. All three average the loss over the tokens
of a minibatch; GRPO as published averages within each completion first and has k3 in the loss.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trueward import objectives
from trueward.console import is_main_process
from trueward.data.formats import Prompt, PromptRow
from trueward.data.packing import (
    Group,
    PackedBatch,
    group_by_prompt,
)
from trueward.losses.policy import (
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    masked_mean,
    masked_whiten,
    ppo_clip_loss,
    squared_kl_loss,
    terminal_rewards,
    value_clip_loss,
)
from trueward.models.backbone import (
    can_share_prefixes,
    layer_list,
    packed_batches,
    row_room,
)
from trueward.models.policy import Policy, ValueModel, energy_losses
from trueward.models.reward_function import Reward, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.posterior import RewardPosterior
from trueward.sampling import Sample, SamplingConfig, sample
from trueward.train.alarm import AlarmConfig, Guard, Snapshots
from trueward.train.loop import Loop, LoopConfig, permutation, seed_of
from trueward.train.signals import Monitor, Seen

logger = logging.getLogger(__name__)

Objective = Callable[[RewardPosterior], Tensor]
Evaluation = Callable[[Policy, int], dict[str, float]]
Refresh = Callable[[Policy, int], Reward]
Whole = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(LoopConfig):
    """Options of `train_policy`."""

    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    steps: int = 100  # rounds of sampling and learning
    prompts_per_step: int = 32
    completions_per_prompt: int = 4  # rloo and grpo need at least 2
    temperature: float = 1.0  # of the samples; log-probabilities and KL are taken at it too
    top_p: float = 1.0  # below 1 the samples leave the distribution whose ratio is taken: biased
    max_new_tokens: int = 256
    # reward: price of a nat of k1, in units of the reward. loss: factor of the squared log-ratio, a
    # token's mean (`losses.squared_kl_loss`).
    kl_coef: float = 0.02
    kl_in: Literal["reward", "loss"] = "reward"
    inner_epochs: int = 1  # passes over a step's completions
    minibatches: int = 1  # optimiser updates for each pass
    clip_range: float = 0.2
    learning_rate: float = 1e-6
    adam_eps: float = 1e-5
    warmup_ratio: float = 0.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_coef: float = 0.5
    value_clip_range: float = 0.2
    value_learning_rate_scale: float = 1.0  # the critic's rate over the policy's
    whiten_rewards: bool = False  # divides by their std without moving the mean
    scale_advantages: bool = True  # ppo: whiten them; grpo: divide by the group's std
    missing_eos_penalty: float = 0.0  # taken from a completion that was cut off
    reward_clip: float = 0.0  # clip scores to [-x, x]; 0 = off
    evaluate_every: int = 0  # steps between calls of `evaluation`; 0 = only at the end
    refresh_every: int = 0  # steps between two rewards, where `refresh` is given; 0 = one reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm != "ppo" and self.completions_per_prompt < 2:
            raise ValueError(
                f"{self.algorithm} compares completions of one prompt: completions_per_prompt must "
                f"be at least 2, got {self.completions_per_prompt}."
            )
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches ({self.minibatches}) cannot exceed prompts_per_step "
                f"({self.prompts_per_step}): a prompt's completions stay together."
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: a greedy policy explores "
                "nothing, and its log-probabilities are not those of its samples."
            )
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every must be at least 0 (off), got {self.refresh_every}.")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must be at least 0, got {self.kl_coef}.")


class Rollouts(NamedTuple):
    """One step's completions with what was true when they were drawn, on the CPU."""

    samples: list[Sample]
    scores: Float[Tensor, " completion"]  # the objective's reward, with penalties; may be NaN
    logprobs: Float[Tensor, "completion token"]
    ref_logprobs: Float[Tensor, "completion token"]
    values: Float[Tensor, "completion token"]  # zero without a critic
    mask: Bool[Tensor, "completion token"]


def train_policy(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[PromptRow | Prompt],
    config: PolicyConfig,
    *,
    objective: Objective = objectives.mean,
    critic: ValueModel | None = None,
    output_dir: str | Path | None = None,
    evaluation: Evaluation | None = None,
    refresh: Refresh | None = None,
    alarm: AlarmConfig | None = None,
    monitor: Reward | Monitor | None = None,
) -> Policy:
    """Optimise the policy against a reward, less a KL penalty to where it started.

    Args:
        policy: Trained in place; with an adapter, the reference is the adapter switched off, else
            a frozen copy.
        reward: A reward model, several of them (their members become one posterior), or a
            function of (prompts, completions).
        prompts: Strings, lists of messages, or rows that hold them.
        config: Options.
        objective: Turns the reward's posterior into the number to optimise. A
            `objectives.RunObjective` is told the run's progress, 0 at the first step and 1 at the
            last; its buffers stand in checkpoints and its metrics in the log. The run has a copy of
            its own, so that the one given stays as it was.
        critic: For ppo; None starts it from the reward model where it reads the policy's tokens,
            else from the policy.
        output_dir: Metrics, checkpoints, `model/`; a killed run given the same folder goes on.
        evaluation: Called with (policy, step) every `evaluate_every` steps and at the end.
        refresh: Called with (policy, step) after every `refresh_every` steps but the last; what it
            returns is the reward from then on. A resumed run asks once more for the last step's,
            with a policy that has moved on: what was made must stand in a folder of that step.
        alarm: Watches the run without a gold reward, and may stop it; None watches nothing.
        monitor: The reward that the alarm looks through; None for the one that is optimised.

    Raises:
        ValueError: A step in which no completion got a finite reward.
    """
    watched = alarm is not None and alarm.action != "off"
    if monitor is not None and not watched:
        raise ValueError("A monitor is for an alarm: set the alarm's action, or leave it out.")
    if watched and config.sharding != "none":
        raise ValueError(
            "An alarm reads the policy's layers and keeps snapshots of them, which sharded weights "
            "do not allow: leave sharding at none, or the alarm off."
        )
    if watched and monitor is None and refresh is not None:
        raise ValueError(
            "A reward that is refreshed cannot watch its own policy, as its scale moves: give the "
            "alarm a monitor of its own."
        )
    if (refresh is None) != (config.refresh_every == 0):
        raise ValueError(
            "A reward that is refreshed needs both: `refresh`, which makes it, and refresh_every."
        )
    posterior_of, refreshed = posterior_function(reward), 0
    texts = [p.prompt if isinstance(p, PromptRow) else p for p in prompts]
    if not texts:
        raise ValueError("Policy optimisation needs prompts, got none.")
    if isinstance(objective, objectives.RunObjective):
        objective = copy.deepcopy(objective)
    can_share_prefixes(policy.backbone)  # found out once, and copied with the reference
    ref = None if policy.has_adapter else policy.frozen_copy()
    modules: dict[str, nn.Module] = {"policy": policy}
    if config.algorithm == "ppo":
        critic = critic or _critic(reward, policy)
        modules["critic"] = critic
    if ref is not None:
        modules["ref"] = ref
    loop = Loop(
        config,
        total_steps=config.steps,
        modules=modules,
        stage="policy",
        output_dir=output_dir,
        learning_rate_scales={"critic": config.value_learning_rate_scale},
        can_shard=True,
    )
    metrics: dict[str, float] = {}
    guard, last_layer, asks_twice = None, None, True
    if alarm is not None and watched:
        watcher = monitor if isinstance(monitor, Monitor) else Monitor(monitor or reward)
        asks_twice = monitor is not None and watcher.posterior is not reward
        guard = _guard(alarm, watcher, policy, ref, texts, loop, config)
        last_layer = _last_layer(policy)
    if refresh is not None and loop.accelerator.num_processes > 1:
        raise ValueError("A reward is refreshed in one process: leave refresh_every at 0.")
    for step in loop.steps():
        if guard is not None and step > 1:
            guard.load_state_dict((loop.state or {}).get("alarm", {}))
        due = (step - 1) // config.refresh_every * config.refresh_every if refresh else 0
        if refresh is not None and due > refreshed:
            posterior_of, refreshed = posterior_function(refresh(policy, due)), due
            loop.reseed()  # whatever was trained in between drew random numbers
        chosen = _prompts_of_step(len(texts), config, step)
        mine = loop.share(list(range(len(chosen))))
        sampling = SamplingConfig(
            n=config.completions_per_prompt,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            max_tokens=4 * config.max_batch_tokens,  # no gradients: rows are cheap
            seed=seed_of(config.seed, "sample", step),
        )
        drawn = _drawn(loop, policy, [texts[chosen[i]] for i in mine], sampling, indices=mine)
        asked = [texts[chosen[s.prompt_index]] for s in drawn]
        answers = [_as_completion(p, s) for p, s in zip(asked, drawn, strict=True)]
        with loop.accelerator.autocast():
            scored = posterior_of(asked, answers)
        samples, posterior = _gathered(loop, drawn, scored)
        rewards, told = _rewards(objective, posterior, loop)
        scores = penalised(rewards.float(), samples, config)
        if not scores.isfinite().any():
            raise ValueError(f"No completion of step {step} got a finite reward.")
        own = [i for i, s in enumerate(samples) if s.prompt_index in set(mine)]
        with loop.accelerator.autocast():
            observed = observe(
                *(policy, ref, critic, [samples[i] for i in own], scores[own], config),
                whole=loop.whole,
            )
        rollouts = _merged(loop, observed, own, samples, scores)
        advantages, returns = advantages_of(rollouts, config)

        metrics = rollout_metrics(rollouts) | objectives.robust_diagnostics(posterior)
        if refresh is not None:
            told["refreshed_at"] = float(refreshed)
        metrics |= told
        if guard is not None:
            with loop.accelerator.autocast():
                seen = guard.monitor.see(asked, answers, posterior=None if asks_twice else scored)
            others = _unmonitored_signals(policy, last_layer, rollouts, metrics, config)
            per_prompt = config.completions_per_prompt
            metrics |= guard.look(
                step, _gathered_seen(loop, drawn, seen), others, samples=per_prompt
            )
            loop.state = (loop.state or {}) | {"alarm": guard.state_dict()}
            if guard.stops:
                loop.log(metrics, always=True)
                break
        metrics |= _learn(rollouts, advantages, returns, loop, config, step)
        every = config.evaluate_every
        if evaluation and (step == config.steps or (every and step % every == 0)):
            with loop.whole(policy):
                metrics |= evaluation(policy, step)
        raised = guard is not None and guard.raised_at == step
        loop.log(metrics, show=["reward", "kl/k1", "length"], always=raised)
    policy.eval()
    if guard is not None and guard.stops:
        loop.accelerator.wait_for_everyone()  # the one that writes snapshots has written them
        place = guard.go_back()
        # The summary is of the policy that the run ends with, which is not that of its last step.
        metrics = {f"{_RAISING_STEP}{k}": v for k, v in metrics.items()}
        metrics["alarm/raised_at"] = metrics.pop(f"{_RAISING_STEP}alarm/raised_at")
        metrics["alarm/restored"] = float(place)
        if evaluation is not None:
            metrics |= evaluation(policy, place)
    loop.finish(metrics, policy.save_pretrained)
    if guard is not None:
        guard.snapshots.clear()
    return policy


def _drawn(
    loop: Loop,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    indices: list[int],
) -> list[Sample]:
    """Let the policy write; with bf16, on an accelerator, a rounded copy of it does.

    Writing a token reads every weight, so that half of the bytes are half of the time. What the
    policy learns from are log-probabilities of its own (`observe`), whoever wrote.
    """
    with loop.whole(policy):
        if not (loop.config.bf16 and _on_accelerator(policy)):
            return sample(policy, prompts, sampling, indices=indices)
        writer = policy.rounded_copy(torch.bfloat16)
    return sample(writer, prompts, sampling, indices=indices)


def _on_accelerator(policy: Policy) -> bool:
    return policy.device.type != "cpu"


def _guard(
    alarm: AlarmConfig,
    monitor: Monitor,
    policy: Policy,
    ref: Policy | None,
    texts: Sequence[Prompt],
    loop: Loop,
    config: PolicyConfig,
) -> Guard:
    """Return the alarm's guard, who has seen what the reference policy writes.

    It is drawn from the reference itself, so that a resumed run sees the same.
    """
    some = permutation(len(texts), config.seed, "alarm")[: alarm.reference_prompts]
    asked = [texts[i] for i in some]
    sampling = SamplingConfig(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        max_tokens=4 * config.max_batch_tokens,
        seed=seed_of(config.seed, "alarm"),
    )
    with policy.adapter_off() if ref is None else contextlib.nullcontext(ref) as reference:
        drawn = sample(reference, asked, sampling)
    answers = [_as_completion(p, s) for p, s in zip(asked, drawn, strict=True)]
    folder = loop.folder.path
    snapshots = Snapshots(
        policy,
        None if folder is None else folder / "snapshots",
        every=alarm.keep_every,
        writes=is_main_process(),
    )
    with loop.accelerator.autocast():
        seen = monitor.see(asked, answers)
    return Guard(alarm, monitor, seen, snapshots)


def _last_layer(policy: Policy) -> nn.Module | None:
    """Return the last layer of the policy; None for a body whose list of layers cannot be told."""
    try:
        return layer_list(policy.backbone)[-1]
    except ValueError:
        logger.warning("The policy's layers cannot be told, so that its energy loss is unknown.")
        return None


def _unmonitored_signals(
    policy: Policy,
    last_layer: nn.Module | None,
    rollouts: Rollouts,
    metrics: dict[str, float],
    config: PolicyConfig,
) -> dict[str, float]:
    """Return the signals that no monitor is needed for."""
    found = {name: metrics[key] for name, key in _UNMONITORED.items()}
    if last_layer is None:
        return found
    losses, every = torch.zeros(len(rollouts.samples)), range(len(rollouts.samples))
    for batch, where in sample_batches(policy, rollouts.samples, every, config.max_batch_tokens):
        losses[where] = energy_losses(policy, batch, last_layer=last_layer).cpu()
    return found | {"energy_loss": losses.mean().item()}


_UNMONITORED = {"length": "length", "kl": "kl/k1", "logprob": "logprob"}  # signal -> metric
_RAISING_STEP = "raising_step/"  # prefix, in a stopped run's summary, of that step's numbers


def _rewards(
    objective: Objective, posterior: RewardPosterior, loop: Loop
) -> tuple[Tensor, dict[str, float]]:
    """Return the objective's rewards of this step, and what it wants to have logged.

    What a `RunObjective` remembers is in the loop's state before and after each step, so that a
    resumed run goes on from its checkpoint.
    """
    if not isinstance(objective, objectives.RunObjective):
        return objective(posterior), {}
    if loop.state is not None:
        known = objective.state_dict()
        objective.load_state_dict(
            {k: torch.tensor(v, dtype=known[k].dtype) for k, v in loop.state["objective"].items()}
        )
    rewards = objective(posterior, progress=loop.step / max(1, loop.total_steps - 1))
    state = {k: v.tolist() for k, v in objective.state_dict().items()}
    loop.state = (loop.state or {}) | {"objective": state}
    return rewards, objective.metrics()


def _learn(
    rollouts: Rollouts,
    advantages: Tensor,
    returns: Tensor,
    loop: Loop,
    config: PolicyConfig,
    step: int,
) -> dict[str, float]:
    """Take the step's clipped policy-gradient (and value) updates; return their mean numbers."""
    policy, critic = loop.modules["policy"].train(), loop.modules.get("critic")
    assert isinstance(policy, Policy)
    assert critic is None or isinstance(critic, ValueModel)
    pack = partial(
        sample_batches,
        policy,
        rollouts.samples,
        max_tokens=config.max_batch_tokens,
        critic=critic,
    )
    totals: dict[str, float] = {}
    updates = 0
    for epoch in range(config.inner_epochs):
        order = permutation(config.prompts_per_step, config.seed, "minibatch", step, epoch)
        for part in range(config.minibatches):
            in_part = set(order[part :: config.minibatches])
            rows = [i for i, s in enumerate(rollouts.samples) if s.prompt_index in in_part]
            tokens = int(rollouts.mask[rows].sum())
            numbers = {
                "loss/policy": 0.0,
                "loss/value": 0.0,
                "clip_fraction": 0.0,
                "kl/update": 0.0,
            }
            if config.kl_in == "loss":
                numbers["loss/kl"] = 0.0
            spare = partial(pack, rows[:1])
            for (batch, where), counts in loop.rounds(pack(loop.share(rows)), spare):
                old = _rows(rollouts.logprobs, where, batch)
                with loop.accelerator.autocast():
                    logprobs = policy(batch, temperature=config.temperature).logprobs
                losses = ppo_clip_loss(
                    logprobs, old, _rows(advantages, where, batch), clip_range=config.clip_range
                )
                mask = batch.mask
                loss = losses[mask].sum() / tokens
                numbers["loss/policy"] += loss.item() * counts
                if config.kl_in == "loss":
                    ref_logprobs = _rows(rollouts.ref_logprobs, where, batch)
                    kl_loss = squared_kl_loss(logprobs, ref_logprobs)[mask].sum() / tokens
                    numbers["loss/kl"] += kl_loss.item() * counts
                    loss = loss + config.kl_coef * kl_loss
                if critic is not None:
                    with loop.accelerator.autocast():
                        values = critic(batch)
                    value_losses = value_clip_loss(
                        values,
                        _rows(rollouts.values, where, batch),
                        _rows(returns, where, batch),
                        clip_range=config.value_clip_range,
                    )
                    value_loss = value_losses[mask].sum() / tokens
                    numbers["loss/value"] += value_loss.item() * counts
                    loss = loss + config.value_coef * value_loss
                loop.backward(loss * counts)
                ratio = (logprobs.detach() - old)[mask].exp()
                clipped = (ratio - 1).abs() > config.clip_range
                numbers["clip_fraction"] += clipped.sum().item() / tokens * counts
                moved = (old - logprobs.detach())[mask].sum().item()
                numbers["kl/update"] += moved / tokens * counts
            numbers = {k: sum(n[k] for n in loop.gather([numbers])) for k in numbers}
            numbers["grad_norm"] = loop.update()
            updates += 1
            for key, value in numbers.items():
                totals[key] = totals.get(key, 0.0) + value
    policy.eval()
    return {key: value / updates for key, value in totals.items()}


def _as_it_is(_module: nn.Module) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@torch.no_grad()
def observe(
    policy: Policy,
    ref: Policy | None,
    critic: ValueModel | None,
    samples: list[Sample],
    scores: Tensor,
    config: PolicyConfig,
    *,
    whole: Whole = _as_it_is,
) -> Rollouts:
    """Compute log-probabilities under policy and reference, and values, of a step's completions.

    The policy's own are computed again as training computes them, so that the first ratio is 1 up
    to rounding whatever engine wrote the completions. `ref=None`: the adapter is switched off.
    `whole` lends a module its weights (`Loop.whole`), for one module after the other.
    """
    width = max((len(s.completion_ids) for s in samples), default=0)
    logprobs, ref_logprobs, values = (torch.zeros(len(samples), width) for _ in range(3))
    mask = torch.zeros(len(samples), width, dtype=torch.bool)
    every = range(len(samples))
    batches = sample_batches(policy, samples, list(every), config.max_batch_tokens, critic=critic)

    def fill(out: Tensor, model: Policy) -> None:
        for batch, where in batches:
            scored = model(batch, temperature=config.temperature).logprobs
            out[where, : batch.mask.shape[1]] = scored.cpu()

    with whole(policy):
        fill(logprobs, policy)
        if ref is None:
            with policy.adapter_off():
                fill(ref_logprobs, policy)
    if ref is not None:
        with whole(ref):
            fill(ref_logprobs, ref)
    if critic is not None:
        with whole(critic):
            for batch, where in batches:
                values[where, : batch.mask.shape[1]] = critic(batch).cpu()
    for batch, where in batches:
        mask[where, : batch.mask.shape[1]] = batch.mask.cpu()
    return Rollouts(samples, scores.cpu(), logprobs, ref_logprobs, values, mask)


def _merged(
    loop: Loop, observed: Rollouts, own: list[int], samples: list[Sample], scores: Tensor
) -> Rollouts:
    """Return the rollouts of all processes, of which each has observed its own rows."""
    numbers = (observed.logprobs, observed.ref_logprobs, observed.values, observed.mask)
    parts = loop.gather([(own, numbers)])
    width = max(mask.shape[1] for _, (*_, mask) in parts)
    whole = [torch.zeros(len(samples), width, dtype=some.dtype) for some in numbers]
    for rows, some in parts:
        for out, values in zip(whole, some, strict=True):
            out[rows, : values.shape[1]] = values
    return Rollouts(samples, scores.cpu(), *whole)


def advantages_of(
    rollouts: Rollouts, config: PolicyConfig
) -> tuple[Float[Tensor, "completion token"], Float[Tensor, "completion token"]]:
    """Return advantages and value targets of each token; zero where the reward is not finite.

    PPO pays k1 at every token and the score at the last, then GAE. RLOO and GRPO compare whole
    completions of a prompt by `score - kl_coef * sum of k1`, and give all tokens one advantage.
    With `kl_in="loss"` no KL enters.
    """
    kl_coef = config.kl_coef if config.kl_in == "reward" else 0.0
    valid = rollouts.scores.isfinite()
    mask = rollouts.mask & valid[:, None]
    kl = kl_estimate(rollouts.logprobs, rollouts.ref_logprobs, estimator="k1")
    if config.algorithm == "ppo":
        scores = rollouts.scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        rewards = terminal_rewards(kl, scores, rollouts.mask, kl_coef=kl_coef)
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = generalized_advantages(
            rewards, rollouts.values, rollouts.mask, gamma=config.gamma, lam=config.gae_lambda
        )
        # A completion without a reward teaches neither policy nor critic.
        returns = torch.where(mask, returns, rollouts.values)
        advantages = torch.where(mask, advantages, 0.0)
        if config.scale_advantages:
            advantages = masked_whiten(advantages, mask)
        return advantages, returns
    whole = rollouts.scores - kl_coef * (kl * rollouts.mask).sum(1)
    groups = whole.view(-1, config.completions_per_prompt)  # prompts in order, samples within
    if config.algorithm == "rloo":
        each = leave_one_out_advantages(groups)
    else:
        each = group_advantages(groups, scale=config.scale_advantages)
    advantages = each.reshape(-1, 1) * mask
    return advantages, torch.zeros_like(advantages)


def penalised(
    scores: Float[Tensor, " completion"], samples: Sequence[Sample], config: PolicyConfig
) -> Float[Tensor, " completion"]:
    """Clip scores, then take the penalty from completions that were cut off before their EOS."""
    if config.reward_clip:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    cut_off = torch.tensor([not s.finished for s in samples], device=scores.device)
    return scores - config.missing_eos_penalty * cut_off


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Return the numbers of a step's completions; KL in nats for each completion."""
    scores = rollouts.scores[rollouts.scores.isfinite()]
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "reward_nonfinite": float(len(rollouts.scores) - len(scores)),
        "length": rollouts.mask.sum(1).float().mean().item(),
        "finished": sum(s.finished for s in rollouts.samples) / len(rollouts.samples),
        "logprob": masked_mean(rollouts.logprobs, rollouts.mask).item(),
    }
    for estimator in ("k1", "k2", "k3"):
        kl = kl_estimate(rollouts.logprobs, rollouts.ref_logprobs, estimator=estimator)
        metrics[f"kl/{estimator}"] = (kl * rollouts.mask).sum(1).mean().item()
    return metrics


def sample_batches(
    policy: Policy,
    samples: Sequence[Sample],
    rows: Sequence[int],
    max_tokens: int,
    *,
    critic: ValueModel | None = None,
) -> list[tuple[PackedBatch, list[int]]]:
    """Pack completions by prompt within the token budget; return batches and their rows.

    A critic that reads the same batches must be able to read packed rows too; else none are.
    """
    if not rows:  # a process without a share
        return []
    share = critic is None or can_share_prefixes(critic.backbone)
    groups: list[Group]
    groups, members = group_by_prompt(
        [samples[i].prompt_ids for i in rows],
        [samples[i].completion_ids for i in rows],
        max_tokens=row_room(policy.backbone, max_tokens=max_tokens, shared_prefix=share),
    )
    out = []
    for some, batch in packed_batches(
        policy.backbone,
        groups,
        pad_id=policy.tokenizer.pad_token_id,
        max_tokens=max_tokens,
        shared_prefix=share,
    ):
        out.append((batch, [rows[i] for g in some for i in members[g]]))
    return out


def _gathered(
    loop: Loop, drawn: list[Sample], posterior: RewardPosterior
) -> tuple[list[Sample], RewardPosterior]:
    """Return the completions of all processes in prompt order, and the posterior of each."""
    means = posterior.means.tolist()
    stds = posterior.stds.tolist() if posterior.stds is not None else [None] * len(drawn)
    rows = loop.gather(list(zip(drawn, means, stds, strict=True)))
    rows = sorted(rows, key=lambda row: row[0].prompt_index)
    gathered_stds = None if rows[0][2] is None else torch.tensor([row[2] for row in rows])
    return [row[0] for row in rows], RewardPosterior(
        torch.tensor([row[1] for row in rows]), gathered_stds
    )


def _gathered_seen(loop: Loop, drawn: list[Sample], seen: Seen) -> Seen:
    """Return what the monitor sees of the completions of all processes, in prompt order."""
    if loop.accelerator.num_processes == 1:
        return seen
    _, posterior = _gathered(loop, drawn, seen.posterior)
    if seen.states is None:
        return Seen(posterior, None)
    rows = loop.gather(list(zip(drawn, seen.states.tolist(), strict=True)))
    rows = sorted(rows, key=lambda row: row[0].prompt_index)
    return Seen(posterior, torch.tensor([row[1] for row in rows]))


def _rows(values: Tensor, where: list[int], batch: PackedBatch) -> Tensor:
    """Pick a batch's rows and columns of a step's tensor."""
    width = batch.mask.shape[1]
    return values[where, :width].to(batch.rows.device)


def _prompts_of_step(count: int, config: PolicyConfig, step: int) -> list[int]:
    """Return the step's prompts: a seeded order without repeats, pass after pass."""
    first = (step - 1) * config.prompts_per_step
    out: list[int] = []
    for position in range(first, first + config.prompts_per_step):
        epoch, at = divmod(position, count)
        if not out or at == 0:
            order = permutation(count, config.seed, "prompts", epoch)
        out.append(order[at])
    return out


def _as_completion(prompt: Prompt, drawn: Sample) -> str | list[dict[str, str]]:
    """Give messages to rewards that get messages, text to those that get text."""
    if isinstance(prompt, str):
        return drawn.text
    return [{"role": "assistant", "content": drawn.text}]


def _critic(reward: Reward, policy: Policy) -> ValueModel:
    """Start from the (first) reward model where it reads the policy's tokens, else the policy."""
    first = reward[0] if isinstance(reward, Sequence) else reward
    if (
        isinstance(first, RewardModel)
        and first.head is not None
        and first.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    ):
        return ValueModel.from_reward_model(first)
    return ValueModel.from_policy(policy)
