"""The cells of a comparison in a world of language: a policy optimised, or the best of n chosen."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trueward.data.rows import Completion, Prompt
from trueward.evaluate.comparison import Point, SeedRun
from trueward.evaluate.overoptimization import (
    best_of_n_curves_per_prompt,
    best_of_n_kl,
    best_of_n_sizes,
)
from trueward.evaluate.shift import agreement, policy_kl
from trueward.lab.language import (
    Lab,
    RewardOf,
    evaluation_prompts,
    held_out_rows,
    load_member,
    monitor_specs,
    policy_config,
    pool_posterior,
    read_pool,
    reward_of,
    reward_specs,
    scale_of,
    told_of,
)
from trueward.lab.methods import Method
from trueward.lab.worlds import stated_and_chosen, words_of
from trueward.models.policy import Policy
from trueward.posterior import RewardPosterior
from trueward.sampling import SamplingConfig, sample
from trueward.train.alarm import AlarmConfig
from trueward.train.loop import seed_of
from trueward.train.policy import train_policy
from trueward.train.run_folder import RunFolder, finished_summary, write_text
from trueward.train.signals import Monitor

Objective = Callable[[RewardPosterior], Tensor]


class Judged(NamedTuple):
    """Answers to the evaluation prompts, flat, with what they are worth."""

    prompts: list[Prompt]
    answers: list[Completion]
    gold: Tensor  # [answer], in its unit
    proxy: Tensor  # [answer], what the method optimises


def optimise_cell(lab: Lab, method: Method, seed: int, steps: int, folder: Path) -> None:
    """Optimise a policy against the method's reward, and measure it as it goes.

    PPO's critic starts from the reference policy with a zero head, whatever the reward is.
    """
    watched = {"monitor": lab.monitor} if lab.monitor else {}  # cells without one stay as they were
    run = lab.start(folder, config={"method": method, "steps": steps} | watched)
    if run is None:
        return
    world, config = lab.open(seed), lab.config
    reward, objective = reward_of(lab, world, method, seed), method.objective.build()
    scale, prompts = scale_of(lab, seed), evaluation_prompts(world, config, seed)
    # The same noise at every evaluation and for every method: differences are the policies'. The
    # reference policy's answers, which theirs are held against, are drawn with another.
    sampling = SamplingConfig(
        n=config.evaluation_samples,
        max_new_tokens=world.max_new_tokens,
        seed=seed_of(seed, "evaluation"),
    )

    against = scale(
        world.gold(
            [p for p in prompts for _ in range(sampling.n)],
            [
                s.text
                for s in sample(
                    world.policy, prompts, replace(sampling, seed=seed_of(seed, "win rate"))
                )
            ],
        )
    )

    def evaluate(policy: Policy, step: int) -> dict[str, float]:
        drawn = sample(policy, prompts, sampling)
        asked = [prompts[s.prompt_index] for s in drawn]
        answers: list[Completion] = [s.text for s in drawn]
        posterior = reward.posterior(asked, answers)
        gold = scale(world.gold(asked, answers))
        judged = Judged(asked, answers, gold, objective(posterior))
        point = {"step": float(step)} | measures(judged, posterior, samples=sampling.n)
        point["win_rate"] = wins(gold.view(-1, sampling.n), against.view(-1, sampling.n))
        point |= policy_kl(policy, world.policy, drawn, max_tokens=config.max_batch_tokens)
        write_evaluation(folder, step, point, judged, every=sampling.n)
        return {f"evaluation/{key}": value for key, value in point.items()}

    probabilities, outcomes = held_out_reliability(lab, seed, reward, objective)
    if finished_summary(folder / "training") is None:
        policy = Policy(copy.deepcopy(world.policy.model), world.policy.tokenizer)
        if not (folder / "training").exists():
            evaluate(policy, 0)
        train_policy(
            policy,
            reward.posterior,
            world.prompts(config.training_prompts, seed=seed_of(seed, "training")),
            policy_config(lab, world, seed, method, steps=steps),
            objective=objective,
            output_dir=folder / "training",
            evaluation=evaluate,
            alarm=AlarmConfig(action="log") if lab.monitor else None,
            monitor=monitor_of(lab, method, seed, reward) if lab.monitor else None,
        )
    trained = finished_summary(folder / "training")
    assert trained is not None
    result = SeedRun(
        seed=seed,
        points=centred(read_points(folder)),
        seconds=trained["seconds"],
        final_gold=read_evaluation(folder, steps)["gold"],
        probabilities=probabilities,
        outcomes=outcomes,
        agreements=told_of(lab, seed, reward, objective),
    )
    write_result(run, folder, result)


def monitor_of(lab: Lab, method: Method, seed: int, reward: RewardOf) -> Monitor:
    """Return the ensemble that watches a seed's policies; it may be what is optimised."""
    specs = monitor_specs(lab)
    models = [load_member(lab, seed, spec) for spec in specs]
    same = reward_specs(method) == specs
    return Monitor(models, posterior=reward.posterior if same else None)


def best_of_n_cell(lab: Lab, method: Method, seed: int, folder: Path) -> None:
    """Choose the reward's favourite among n of the reference policy's answers, for all n."""
    run = lab.start(folder, config={"method": method})
    if run is None:
        return
    world, pool = lab.open(seed), read_pool(lab, seed)
    posterior = pool_posterior(lab, seed, method, pool)
    objective = method.objective.build()
    proxy = objective(posterior).view(pool.gold.shape)
    points, picks = best_of_n_points(pool.answers, pool.gold, proxy, posterior)
    for point, pick in zip(points, picks, strict=True):
        rows = range(len(pool.prompts))
        judged = Judged(
            pool.prompts,
            [pool.answers[i][pick[i]] for i in rows],
            pool.gold[rows, pick],
            proxy[rows, pick],
        )
        write_evaluation(folder, int(point["n"]), point, judged, every=1)
    reward = reward_of(lab, world, method, seed)
    probabilities, outcomes = held_out_reliability(lab, seed, reward, objective)
    result = SeedRun(
        seed=seed,
        points=centred(points),
        seconds=run.seconds,
        final_gold=pool.gold[range(len(pool.prompts)), picks[-1]].tolist(),
        probabilities=probabilities,
        outcomes=outcomes,
        agreements=told_of(lab, seed, reward, objective),
    )
    write_result(run, folder, result)


# --- measures ---


def measures(judged: Judged, posterior: RewardPosterior, *, samples: int) -> Point:
    """Return what an evaluation says of a policy; `samples` answers to each prompt, in a row."""
    gold, proxy = judged.gold.double().view(-1, samples), judged.proxy.double().view(-1, samples)
    point = {
        "gold": gold.mean().item(),
        "gold_sem": gold.mean(1).std().item() / len(gold) ** 0.5,
        "proxy": proxy.mean().item(),
        "length": sum(map(words_of, judged.answers)) / len(judged.answers),
        "agreement": agreement(proxy, gold),
    }
    if posterior.means.shape[1] > 1:
        point["spread"] = posterior.std.mean().item()
    return point


def wins(gold: Tensor, reference: Tensor) -> float:
    """Share of the pairs of a policy's and the reference's answers in which the policy's has more.

    Args:
        gold: [prompt, sample] of the policy's.
        reference: [prompt, sample] of the reference policy's; ties count half.
    """
    sign = (gold[:, :, None] - reference[:, None, :]).sign()
    return ((sign + 1) / 2).mean().item()


def best_of_n_points(
    answers: Sequence[Sequence[Completion]],
    gold: Tensor,
    proxy: Tensor,
    posterior: RewardPosterior,
) -> tuple[list[Point], list[list[int]]]:
    """Return a point for each n, and which of the first n samples of each prompt is chosen.

    The points are means over all subsets of size n (`evaluate.best_of_n_curve`); the choices, one
    example of it, are for reading.

    Args:
        answers: By prompt, as many to each.
        gold: [prompt, sample].
        proxy: [prompt, sample].
        posterior: Of prompt times sample, in the same order.
    """
    ns = best_of_n_sizes(gold.shape[1])
    columns = {"gold": gold, "proxy": proxy}
    columns["length"] = torch.tensor([[float(words_of(a)) for a in some] for some in answers])
    if posterior.means.shape[1] > 1:
        columns["spread"] = posterior.std.view(gold.shape)
    curves = {k: best_of_n_curves_per_prompt(proxy, v, ns) for k, v in columns.items()}
    points, picks = [], []
    for i, n in enumerate(ns):
        point = {"n": float(n), "kl/bound": best_of_n_kl(n)}
        point |= {key: curve[:, i].mean().item() for key, curve in curves.items()}
        point["gold_sem"] = curves["gold"][:, i].std().item() / len(gold) ** 0.5
        points.append(point)
        picks.append(proxy[:, :n].argmax(1).tolist())
    return points, picks


def held_out_reliability(
    lab: Lab, seed: int, reward: RewardOf, objective: Objective
) -> tuple[list[float], list[bool]]:
    """Return the chances that a reward gives to the annotator's held-out choices, and what came.

    The annotator errs there as in training: a calibrated reward is as unsure as it should be.
    """
    return stated_and_chosen(
        held_out_rows(lab, seed),
        lambda prompts, completions: objective(reward.posterior(prompts, completions)),
        scale=reward.logit_scale,
    )


def centred(points: Sequence[Point]) -> list[Point]:
    """Return the points with the proxy counted from the reference policy's, the first point's."""
    start = points[0]["proxy"]
    return [point | {"proxy": point["proxy"] - start} for point in points]


# --- files ---


def write_evaluation(folder: Path, place: int, point: Point, judged: Judged, *, every: int) -> None:
    """Write `evaluations/PLACE.json`: the point, and one answer to each prompt (of `every`)."""
    (folder / "evaluations").mkdir(exist_ok=True)
    found = {
        "point": point,
        "prompts": judged.prompts[::every],
        "answers": judged.answers[::every],
        "gold": judged.gold[::every].tolist(),
        "proxy": judged.proxy[::every].tolist(),
    }
    write_text(folder / "evaluations" / f"{place:06d}.json", json.dumps(found))


def read_evaluation(folder: Path, place: int) -> dict[str, Any]:
    """Return what `write_evaluation` wrote."""
    found: dict[str, Any] = json.loads(
        (folder / "evaluations" / f"{place:06d}.json").read_text("utf-8")
    )
    return found


def read_points(folder: Path) -> list[Point]:
    """Return the points of all evaluations, in order."""
    files = sorted((folder / "evaluations").glob("*.json"))
    return [json.loads(file.read_text("utf-8"))["point"] for file in files]


def write_result(run: RunFolder, folder: Path, result: SeedRun) -> None:
    """Write `result.json`, and the summary that ends the cell."""
    write_text(folder / "result.json", json.dumps(asdict(result)))
    end = {k: v for k, v in result.points[-1].items() if k != "gold_sem"}
    run.finish(
        end | {"gold_peak": max(p["gold"] for p in result.points)},
        seed=result.seed,
        seconds=result.seconds,
    )


def stage_seconds(folder: Path) -> float:
    """Return what all finished stages in a comparison's folder took together, each once.

    By their own clocks, so that a busy machine counts for more, and of a policy's cell its training
    alone. The comparison's own seconds know nothing of a killed call.
    """
    stages = [file.parent for file in folder.glob("*/**/summary.json")]
    inner = {stage for stage in stages if any(other in stage.parents for other in stages)}
    return sum(
        json.loads((stage / "summary.json").read_text("utf-8")).get("seconds", 0.0)
        for stage in stages
        if stage not in inner
    )


def read_result(folder: Path) -> SeedRun | None:
    """Return a finished cell's result, None where it is not finished."""
    if finished_summary(folder) is None:
        return None
    return SeedRun(**json.loads((folder / "result.json").read_text("utf-8")))
