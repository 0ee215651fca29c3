"""Which of BRME's second-stage losses leave a head its std? Trained on ratings of known noise.

`python benchmarks/std_collapse.py`: five losses times seeds through `train_brme` on a tiny frozen
backbone. A completion's rating is a linear function of its last state, plus noise whose std, s(x),
depends on another direction of the state; the chosen side of a pair is the one that is rated
higher. The heads can represent both exactly: a loss that does not find s(x) does not look for it.
Writes a figure, the stds of the median head on held-out pairs against the step, and prints a
Markdown table. The median, because a single head at its ceiling would be most of a mean.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from trueward.data.formats import PreferenceRow
from trueward.evaluate.calibration import spearman
from trueward.evaluate.preferences import mean_interval
from trueward.models.heads import LOG_STD_MAX, LOG_STD_MIN
from trueward.models.reward_model import RewardModel
from trueward.report.figures import Curve, curve_figure, save_figure
from trueward.report.svg import INK
from trueward.testing import tiny_backbone, tiny_preferences, tiny_tokenizer
from trueward.train.brme import BRMEConfig, encode_examples, pair_states, train_brme

# Label -> (loss, target), as `BRMEConfig` names them.
LOSSES: dict[str, tuple[str, str]] = {
    "mse_reparam on ratings": ("mse_reparam", "rating"),
    "mse_reparam on pairs (Brier)": ("mse_reparam", "pair_prob"),
    "bt_reparam on pairs": ("bt_reparam", "pair_prob"),
    "bt_marginal on pairs": ("bt_marginal", "pair_prob"),
    "gaussian_nll on ratings": ("gaussian_nll", "rating"),
}
FLOOR, CEILING = math.exp(LOG_STD_MIN), math.exp(LOG_STD_MAX)  # where the heads clamp


class Made(NamedTuple):
    """A stage-1 model with pairs whose ratings have a known noise."""

    stage1: RewardModel
    training: list[PreferenceRow]
    fresh: list[PreferenceRow]  # none of their prompts is trained on
    noise: Tensor  # [2 * fresh]: s(x) of chosen and rejected in turn


def make(pairs: int, fresh: int, *, noise: float, spread: float, seed: int) -> Made:
    """Return ratings `a(x) + s(x) z`: a and log s linear in the states, along two of their axes.

    Args:
        pairs: To train on, held-out ones included.
        fresh: Further pairs.
        noise: Median of s(x), in units of the std of a(x).
        spread: Std of log s(x).
        seed: Of everything: backbone, texts and noise.
    """
    tokenizer = tiny_tokenizer()
    backbone = tiny_backbone(vocab_size=len(tokenizer), seed=seed)
    stage1 = RewardModel.from_backbone(backbone, tokenizer, members=0, seed=seed)
    rows = [PreferenceRow(*row) for row in tiny_preferences(pairs + fresh, seed=seed)]
    states = pair_states(stage1, encode_examples(stage1, rows, BRMEConfig()), max_tokens=8192)
    flat = states.flatten(0, 1)  # [2 * row, hidden]
    centred = flat - flat.mean(0)
    # The two widest axes of the states, each at unit variance.
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    worth, roughness = (centred @ axes.T / (centred @ axes.T).std(0)).unbind(1)
    stds = noise * (spread * roughness).exp()
    generator = torch.Generator().manual_seed(seed)
    ratings = (worth + stds * torch.randn(stds.shape, generator=generator)).view(-1, 2)
    made, sides = [], []
    for row, (first, second), both in zip(rows, ratings.tolist(), stds.view(-1, 2), strict=True):
        texts, scores = (row.chosen, row.rejected), (first, second)
        best = 0 if first > second else 1
        made.append(
            PreferenceRow(
                row.prompt,
                texts[best],
                texts[1 - best],
                extra={"score_chosen": scores[best], "score_rejected": scores[1 - best]},
            )
        )
        sides.append(both[[best, 1 - best]])
    return Made(stage1, made[:pairs], made[pairs:], torch.cat(sides[pairs:]))


def train(made: Made, label: str, *, every: int, seed: int, **options: Any) -> dict[str, Any]:
    """Return the median head's mean std at each step, and what the stds are at the end."""
    loss, target = LOSSES[label]
    config = BRMEConfig(
        loss=loss,  # type: ignore[arg-type]
        target=target,  # type: ignore[arg-type]
        held_out=0.2,
        evaluate_every=every,
        log_every=every,
        checkpoint_every=0,
        seed=seed,
        progress=False,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = train_brme(made.stage1, made.training, config, output_dir=folder)
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    judged = [row for row in map(json.loads, lines) if "held_out/std" in row]
    medians = {
        row["step"]: statistics.median(row[f"held_out/std_{k}"] for k in range(config.members))
        for row in judged
    }
    prompts = [row.prompt for row in made.fresh for _ in range(2)]
    completions = [text for row in made.fresh for text in (row.chosen, row.rejected)]
    stds = model.score(prompts, completions, normalise=False).stds
    assert stds is not None
    # Constant stds have no ranks: they say nothing of the noise.
    ranks = [spearman(column, made.noise) for column in stds.T]
    known = sum(0.0 if math.isnan(rank) else rank for rank in ranks) / len(ranks)
    last = judged[-1]
    return {
        "stds": medians,  # by step
        "std": medians[last["step"]],
        "at_floor": last["held_out/at_floor"],
        "at_ceiling": (stds > 0.999 * CEILING).float().mean().item(),
        "error": last["held_out/spearman"],
        "noise": known,
        "accuracy": last["held_out/accuracy"],
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table: means over the seeds with 95 % intervals.

    The error is each loss's own (see `held_out_metrics`); noise is s(x) on pairs of fresh prompts.
    """
    lines = [
        "| loss | target | std at the end, median head | at the floor | at the ceiling | "
        "Spearman(std, error) | Spearman(std, true noise) | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, found in runs.items():
        keys = ("std", "at_floor", "at_ceiling", "error", "noise", "accuracy")
        cells = [interval([run[key] for run in found]) for key in keys]
        lines.append(f"| {' | '.join([*LOSSES[label], *cells])} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    """Return `mean ± half width` of Student's 95 % interval; the mean alone of one seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    low, high = mean_interval(torch.tensor(values))
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Write the figure as PNG: the geometric mean over seeds, and the range of the seeds."""
    curves = []
    every = [run for found in runs.values() for run in found]
    # Seeds hold out different numbers of pairs, and so differ in their number of steps.
    steps = sorted(set.intersection(*(set(run["stds"]) for run in every)))
    for label, found in runs.items():
        logs = torch.tensor([[run["stds"][step] for step in steps] for run in found]).log()
        curves.append(
            Curve(
                name=label,
                x=steps,
                y=logs.mean(0).exp().tolist(),
                low=logs.amin(0).exp().tolist(),
                high=logs.amax(0).exp().tolist(),
            )
        )
    ends = [0, steps[-1] // 2, steps[-1]]
    curves.append(
        Curve(name="the heads' floor, exp(-5)", x=ends, y=[FLOOR] * 3, dashed=True, color=INK)
    )
    figure = curve_figure(
        curves,
        title="What becomes of the heads' stds",
        x_label="optimiser step",
        y_label="mean std of the median head",
        size=(4.5, 3.6),
    )
    figure.axes[0].set_yscale("log")
    with tempfile.TemporaryDirectory() as folder:
        png, _ = save_figure(figure, Path(folder) / "figure")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png.read_bytes())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--fresh", type=int, default=300, help="pairs that tell std against s(x)")
    parser.add_argument("--noise", type=float, default=0.6, help="median of s(x)")
    parser.add_argument("--spread", type=float, default=0.7, help="std of log s(x)")
    parser.add_argument("--epochs", type=float, default=60.0)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--schedule", default="constant", help="of the learning rate")
    parser.add_argument("--centring", type=float, default=0.01, help="BRMEConfig's, for pairs")
    parser.add_argument("--every", type=int, default=50, help="steps between points")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/std_collapse.png"))
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    start = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in LOSSES}
    options = {
        name: getattr(args, name) for name in ("learning_rate", "schedule", "centring", "epochs")
    }
    for seed in range(args.seeds):
        made = make(args.pairs, args.fresh, noise=args.noise, spread=args.spread, seed=seed)
        for label, found in runs.items():
            found.append(train(made, label, every=args.every, seed=seed, **options))
    print(table(runs))
    written = draw(runs, args.figure)
    seconds = time.perf_counter() - start
    print(f"\n{args.seeds} seeds, {seconds:.0f} s; {written}")


if __name__ == "__main__":
    main()
