"""A policy step with a reward model: `train_policy` beside TRL's trainers and its own parts.

    python benchmarks/policy_step.py

needs TRL (`pip install 'trueward[trl]'`). Prompts of 256 tokens, 8 completions of at most 64 each;
the same policy, reference, reward model, KL penalty and learning rate. What is compared is the time
for a token of the completions: sampling, reward, reference, gradients and update together.
"""

import copy
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Callable
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
    made_tokenizer,
    parser,
    peak_memory,
    peak_of,
    show,
    text_of,
    timed,
    write,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)

from trueward import Policy, RewardModel
from trueward.models.policy import ValueModel
from trueward.sampling import Sample, SamplingConfig, sample
from trueward.train.policy import PolicyConfig, observe, sample_batches, train_policy

PROMPTS, SAMPLES, PROMPT, COMPLETION, KL, RATE = 8, 8, 256, 64, 0.05, 1e-5
BARS = {"rloo": 2.0}


class Clock(TrainerCallback):
    """Keeps the seconds of training without what stands around it."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter()


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    importlib.import_module("trl")  # so that peaks of memory hold it on both sides
    if args.peak:
        size, algorithm, case = args.peak
        Bench(size, algorithm).runs()[case](0)
        print(peak_memory())
        return
    rows = []
    for size in args.sizes:
        for algorithm in ("rloo", "grpo", "ppo") if size == "5M" else ("rloo",):
            bench = Bench(size, algorithm)
            cost = alternate(bench.runs(), args.repeats)
            against = "its parts added up" if algorithm == "ppo" else f"TRL's {algorithm} trainer"
            other = "parts" if algorithm == "ppo" else "trl"
            peaks = {case: peak_of(size, algorithm, case) for case in ("trueward", other)}
            rows.append(
                Row(
                    work=f"policy step, {algorithm}",
                    setting=f"{size}, {PROMPTS} prompts of {PROMPT}, {SAMPLES} x {COMPLETION}",
                    against=against,
                    seconds=cost["trueward"],
                    other_seconds=cost[other],
                    unit="1,000 tokens written",
                    bar=BARS.get(algorithm),
                    at_most=algorithm == "ppo",
                    memory=peaks["trueward"],
                    other_memory=peaks[other],
                    operations=bench.operations,
                    rate=median(cost["rate"]),
                    check=bench.check,
                )
            )
            show(rows[-1])
            write(rows, args.output)


class Bench:
    """The same models and prompts for both sides."""

    def __init__(self, size: str, algorithm: str) -> None:
        self.algorithm = algorithm
        self.tokenizer = made_tokenizer()
        torch.manual_seed(0)
        config = llama_config(size)
        self.language_model = AutoModelForCausalLM.from_config(config)
        self.classifier = AutoModelForSequenceClassification.from_config(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.classifier.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.reward = RewardModel.from_pretrained(folder, device="cpu")
        self.folder = tempfile.TemporaryDirectory()  # where TRL reads policy and reference
        self.language_model.save_pretrained(self.folder.name)
        self.tokenizer.save_pretrained(self.folder.name)
        self.prompts = [text_of(self.tokenizer, PROMPT, seed=i) for i in range(PROMPTS)]
        # For a token written: generation, reward, policy and reference, gradients; the prompt
        # computed once for its samples in each. PPO's critic adds one pass and one with gradients.
        body = body_parameters(self.language_model)
        passes = 2 + 2 + 2 + 2 + 6 + (2 + 6 if algorithm == "ppo" else 0)
        self.operations = 1e3 * passes * body * (1 + PROMPT / (SAMPLES * COMPLETION))
        self.check = ""

    def runs(self) -> dict[str, Callable[[int], float]]:
        return {
            "trueward": self.ours,
            **({"parts": self.parts} if self.algorithm == "ppo" else {"trl": self.trl}),
        }

    def config(self, turn: int) -> PolicyConfig:
        return PolicyConfig(
            algorithm=self.algorithm,  # type: ignore[arg-type]
            steps=1,
            prompts_per_step=PROMPTS,
            completions_per_prompt=SAMPLES,
            max_new_tokens=COMPLETION,
            kl_coef=KL,
            learning_rate=RATE,
            schedule="constant",
            seed=turn,
            progress=False,
        )

    def policy(self) -> Policy:
        return Policy(copy.deepcopy(self.language_model), self.tokenizer)

    def ours(self, turn: int) -> float:
        policy = self.policy()
        critic = ValueModel.from_policy(policy) if self.algorithm == "ppo" else None
        with tempfile.TemporaryDirectory() as out:
            seconds = timed(
                lambda: train_policy(
                    policy,
                    self.reward,
                    self.prompts,
                    self.config(turn),
                    critic=critic,
                    output_dir=out,
                )
            )
            length = json.loads((Path(out) / "metrics.jsonl").read_text())["length"]
        return seconds * 1000 / (PROMPTS * SAMPLES * length)

    def trl(self, turn: int) -> float:
        import trl

        name = self.algorithm.upper()
        shared = {
            "num_generations": SAMPLES,
            "per_device_train_batch_size": PROMPTS * SAMPLES,
            "max_completion_length": COMPLETION,
            "max_steps": 1,
            "beta": KL,
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "seed": turn,
            "logging_steps": 1,
            **ON_A_CPU,
        }
        clock = Clock()
        with tempfile.TemporaryDirectory() as out:
            trainer = getattr(trl, f"{name}Trainer")(
                model=self.folder.name,
                reward_funcs=self.classifier,
                reward_processing_classes=self.tokenizer,
                processing_class=self.tokenizer,
                train_dataset=Dataset.from_dict({"prompt": self.prompts}),
                args=getattr(trl, f"{name}Config")(output_dir=out, **shared),
                callbacks=[clock],
            )
            trainer.train()
            logs = trainer.state.log_history[0]
        self.check = f"TRL's completions had {logs['completions/mean_length']:.1f} tokens"
        return clock.seconds * 1000 / (PROMPTS * SAMPLES * logs["completions/mean_length"])

    def parts(self, turn: int) -> float:
        """Sampling, reward, observation, and one pass with gradients of policy and critic."""
        policy, config = self.policy(), self.config(turn)
        ref, critic = policy.frozen_copy(), ValueModel.from_policy(policy)
        drawn: list[Sample] = []
        sampling = SamplingConfig(n=SAMPLES, max_new_tokens=COMPLETION, seed=turn)

        def draw() -> None:
            drawn.extend(sample(policy, self.prompts, sampling))

        def score() -> None:
            self.reward.score(
                [self.prompts[s.prompt_index] for s in drawn], [s.text for s in drawn]
            )

        def look() -> None:
            observe(policy, ref, critic, drawn, torch.zeros(len(drawn)), config)

        def learn() -> None:
            rows = range(len(drawn))
            for batch, _ in sample_batches(policy, drawn, rows, config.max_batch_tokens):
                policy(batch).logprobs.sum().backward()
                critic(batch).sum().backward()

        parts = {p.__name__: timed(p) for p in (draw, score, look, learn)}
        total = sum(parts.values())
        self.check = "of the parts, " + ", ".join(f"{k} {v / total:.0%}" for k, v in parts.items())
        return total * 1000 / sum(len(s.completion_ids) for s in drawn)


if __name__ == "__main__":
    main()
