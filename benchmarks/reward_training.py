"""Reward training: `train_reward` beside `trl.RewardTrainer`, on the same pairs, ids and weights.

    python benchmarks/reward_training.py --data_dir DIR

needs TRL (`pip install 'trueward[trl]'`). Each turn takes the same batches of 32 pairs through both
from the same weights, and the losses of all steps must agree; TRL takes batches of like length too.
"""

import copy
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from harness import (
    ON_A_CPU,
    Row,
    alternate,
    body_parameters,
    llama_config,
    parser,
    peak_memory,
    peak_of,
    real_pairs,
    show,
    write,
)
from transformers import AutoModelForSequenceClassification, TrainerCallback

from trueward import RewardModel
from trueward.data.packing import Group, packed_size
from trueward.train.loop import Loop, permutation
from trueward.train.reward import RewardConfig, encode_pairs, train_reward

STEPS = {"1M": 2}  # of 32 pairs, in a turn; larger models take one
BARS = {("hh_helpful", "random"): 3.5, ("hh_helpful", "grouped"): 1.6}
BARS |= {("alpaca_eval_gpt4", "random"): 2.5}
NAMES = {
    "random": "random batches of 32",
    "accumulated": "random batches of 8, accumulated 4 times",
    "grouped": "batches of 32 of like length",
}
BATCH, MAX_LENGTH, RATE, SEED = 32, 1024, 1e-4, 0


class Watch(TrainerCallback):
    """Keeps the loss of every step, and the seconds of training without what stands around it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


@contextmanager
def clock_of_steps() -> Iterator[list[float]]:
    """Collect the seconds that training loops take, without what stands around them."""
    seconds: list[float] = []
    original = Loop.steps

    def steps(self: Loop) -> Iterator[int]:
        start = time.perf_counter()
        yield from original(self)
        seconds.append(time.perf_counter() - start)

    Loop.steps = steps
    try:
        yield seconds
    finally:
        Loop.steps = original


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data_dir", type=Path, required=True, help="holds hh_helpful, ...")
    options.add_argument("--sets", nargs="+", default=["hh_helpful", "alpaca_eval_gpt4"])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    importlib.import_module("trl")  # so that peaks of memory hold it on both sides
    if args.peak:
        case, name, size = args.peak
        bench = Bench(args.data_dir, name, size, args.repeats)
        bench.runs()[case](1)
        print(peak_memory())
        return
    rows = []
    for name in args.sets:
        for size in args.sizes:
            bench = Bench(args.data_dir, name, size, args.repeats)
            seconds = alternate(bench.runs(), args.repeats)
            peaks = {case: peak_of(case, name, size) for case in bench.runs()}
            for case, words in NAMES.items():
                check = ""
                if case in bench.losses:  # the same batches
                    pairs = zip(bench.losses["trueward"], bench.losses[case], strict=True)
                    check = f"losses differ by at most {max(abs(a - b) for a, b in pairs):.0e}"
                rows.append(
                    Row(
                        work=f"reward training, {name}",
                        setting=f"{size}, batches of {BATCH} pairs",
                        against=f"trl.RewardTrainer, {words}",
                        seconds=seconds["trueward"],
                        other_seconds=seconds[case],
                        unit="1,000 tokens",
                        bar=BARS.get((name, case)),
                        memory=peaks["trueward"],
                        other_memory=peaks[case],
                        memory_bar=0.5 if (name, case) == ("hh_helpful", "random") else None,
                        operations=bench.operations,
                        rate=median(seconds["rate"]),
                        check=check,
                    )
                )
                show(rows[-1])
                write(rows, args.output)


class Bench:
    """The same pairs, ids and weights for both sides.

    A turn takes batches of its own, so that the mix of lengths is averaged over. What is compared
    is the time for a token of prompts and completions (the prompt counted twice for a pair), since
    a batch that was grouped by length has others than a random one.
    """

    def __init__(self, folder: Path, name: str, size: str, repeats: int) -> None:
        found, self.tokenizer = real_pairs(folder, name)
        torch.manual_seed(0)
        self.model = AutoModelForSequenceClassification.from_config(llama_config(size))
        self.folder = tempfile.TemporaryDirectory()
        self.model.save_pretrained(self.folder.name)
        self.tokenizer.save_pretrained(self.folder.name)
        whole = encode_pairs(self.reward_model(), found, MAX_LENGTH)
        # TRL leaves out what is too long, we cut the prompt: neither happens here.
        kept = [i for i, pair in enumerate(whole) if longest(pair.group) < MAX_LENGTH]
        self.rows = [found[i] for i in kept]
        self.groups = [whole[i].group for i in kept]
        self.a_turn = STEPS.get(size, 1) * BATCH
        self.repeats = repeats
        if len(kept) < (repeats + 1) * self.a_turn:
            raise SystemExit(f"{name} has {len(kept)} pairs, too few for {repeats} turns.")
        # Operations of the body for a token of both sides, where each prompt is computed once.
        shared = sum(map(packed_size, self.groups)) / sum(map(tokens, self.groups))
        self.operations = 6e3 * body_parameters(self.model) * shared
        self.losses: dict[str, list[float]] = {"trueward": [], "random": [], "accumulated": []}

    def runs(self) -> dict[str, Callable[[int], float]]:
        return {
            "trueward": self.ours,
            "random": self.trl,
            "accumulated": partial(self.trl, accumulated=4),
            "grouped": self.trl_grouped,
        }

    def reward_model(self) -> RewardModel:
        return RewardModel.from_pretrained(self.folder.name, device="cpu")

    def pairs_of_turn(self, turn: int) -> list[int]:
        return list(range(turn * self.a_turn, (turn + 1) * self.a_turn))

    def ours(self, turn: int) -> float:
        """Both clocks run from before the first step to after the last one."""
        config = RewardConfig(
            learning_rate=RATE,
            batch_size=BATCH,
            max_length=MAX_LENGTH,
            centring=0.0,
            schedule="linear",
            warmup_ratio=0.0,
            seed=SEED,
            progress=False,
        )
        chosen = self.pairs_of_turn(turn)
        rows = [self.rows[i] for i in chosen]
        reference = [r.prompt for r in rows[:2]], [r.chosen for r in rows[:2]]
        model = self.reward_model()
        with tempfile.TemporaryDirectory() as out, clock_of_steps() as seconds:
            train_reward(model, rows, config, output_dir=out, reference=reference)
            lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
        self.losses["trueward"] += [float(json.loads(line)["loss"]) for line in lines]
        return sum(seconds) / sum(tokens(self.groups[i]) for i in chosen) * 1000

    def trl(self, turn: int, *, accumulated: int = 1) -> float:
        """Random batches, here in the order that ours draws; 8 pairs at once are TRL's default."""
        chosen = self.pairs_of_turn(turn)
        order = permutation(len(chosen), SEED, "reward", 0)
        groups = [self.groups[chosen[i]] for i in order]
        seconds, losses = self.train_trl(groups, accumulated=accumulated)
        self.losses["random" if accumulated == 1 else "accumulated"] += losses
        return seconds / sum(tokens(self.groups[i]) for i in chosen) * 1000

    def trl_grouped(self, turn: int) -> float:
        """TRL's best: batches of like length, from the long ones to the short as turns go on."""
        ordered = sorted(self.groups, key=longest, reverse=True)
        batches = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
        # Batches spread evenly over the order of lengths, so that all turns together are its epoch.
        steps = self.a_turn // BATCH
        every = len(batches) / (steps * self.repeats)
        first = (turn - 1) * steps if turn else 0
        some = [batches[int((k + 0.5) * every)] for k in range(first, first + steps)]
        groups = [group for batch in some for group in batch]
        return self.train_trl(groups)[0] / sum(map(tokens, groups)) * 1000

    def train_trl(
        self, groups: Sequence[Group], *, accumulated: int = 1
    ) -> tuple[float, list[float]]:
        from trl import RewardConfig as TRLConfig
        from trl import RewardTrainer

        sides = [[[*g.prompt_ids, *completion] for completion in g.completions] for g in groups]
        watch = Watch()
        with tempfile.TemporaryDirectory() as out:
            trainer = RewardTrainer(
                model=copy.deepcopy(self.model),
                processing_class=self.tokenizer,
                train_dataset=Dataset.from_dict(
                    {"chosen_ids": [c for c, _ in sides], "rejected_ids": [r for _, r in sides]}
                ),
                args=TRLConfig(
                    output_dir=out,
                    learning_rate=RATE,
                    max_length=MAX_LENGTH,
                    per_device_train_batch_size=BATCH // accumulated,
                    gradient_accumulation_steps=accumulated,
                    num_train_epochs=1,
                    train_sampling_strategy="sequential",
                    logging_steps=1,
                    **ON_A_CPU,
                ),
                callbacks=[watch],
            )
            trainer.train()
        return watch.seconds, watch.losses


def tokens(group: Group) -> int:
    """Count the tokens of both sides, the prompt with each."""
    return sum(len(group.prompt_ids) + len(c) for c in group.completions)


def longest(group: Group) -> int:
    return len(group.prompt_ids) + max(map(len, group.completions))


if __name__ == "__main__":
    main()
