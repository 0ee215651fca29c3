"""Sampling 8 completions a prompt: `trueward.sampling.sample` beside transformers' `generate`.

    python benchmarks/generation.py

Prompts of 20 to 400 tokens; completions stop early, after 32 tokens in the mean and 96 at most. A
bias on the end token's logit makes them, since a model of random weights would never stop. What is
compared is the time for a token written; greedy completions of both must be the same.
"""

import math
from collections.abc import Callable
from statistics import median

import torch
from harness import (
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
from torch import nn
from transformers import AutoModelForCausalLM

from trueward import Policy
from trueward.sampling import SamplingConfig, sample

LENGTHS = [20, 28, 36, 48, 64, 80, 100, 120, 140, 160, 190, 220, 260, 300, 350, 400]
SAMPLES, NEW, MEAN = 8, 96, 32


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        size, case = args.peak
        Bench(size).runs()[case](0)
        print(peak_memory())
        return
    rows = []
    for size in args.sizes:
        bench = Bench(size)
        seconds = alternate(bench.runs(), args.repeats)
        peaks = {case: peak_of(size, case) for case in bench.runs()}
        rows.append(
            Row(
                work=f"sampling, {SAMPLES} a prompt",
                setting=f"{size}, ragged prompts, early stops",
                against="generate",
                seconds=seconds["trueward"],
                other_seconds=seconds["generate"],
                unit="1,000 tokens written",
                bar=1.5,
                memory=peaks["trueward"],
                other_memory=peaks["generate"],
                operations=bench.operations,
                rate=median(seconds["rate"]),
                check=bench.greedy_check(),
            )
        )
        show(rows[-1])
        write(rows, args.output)


class Bench:
    """The same model and prompts for both sides."""

    def __init__(self, size: str) -> None:
        self.tokenizer = made_tokenizer()
        self.eos = int(self.tokenizer.eos_token_id)
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(llama_config(size)).eval()
        head = nn.Linear(self.model.config.hidden_size, self.model.config.vocab_size, bias=True)
        head.weight = self.model.lm_head.weight
        with torch.no_grad():
            head.bias.zero_()
            head.bias[self.eos] = math.log(self.model.config.vocab_size / MEAN)
        self.model.set_output_embeddings(head)
        self.policy = Policy(self.model, self.tokenizer)
        self.prompts = [text_of(self.tokenizer, n, seed=i) for i, n in enumerate(LENGTHS)]
        body = body_parameters(self.model)
        self.operations = 1e3 * 2 * body * (1 + sum(LENGTHS) / (len(LENGTHS) * SAMPLES * MEAN))

    def runs(self) -> dict[str, Callable[[int], float]]:
        return {"trueward": self.ours, "generate": self.generate}

    def ours(self, turn: int) -> float:
        config = SamplingConfig(n=SAMPLES, max_new_tokens=NEW, seed=turn)
        found: list[int] = []
        seconds = timed(
            lambda: found.extend(
                len(s.completion_ids) for s in sample(self.policy, self.prompts, config)
            )
        )
        return seconds * 1000 / sum(found)

    def generate(self, turn: int) -> float:
        torch.manual_seed(turn)
        found: list[list[int]] = []
        seconds = timed(lambda: found.extend(self.generated(SAMPLES, do_sample=True, top_k=0)))
        return seconds * 1000 / sum(map(len, found))

    @torch.no_grad()
    def generated(self, n: int, **options: object) -> list[list[int]]:
        """Left-padded prompts, each `n` times, as TRL's trainers ask `generate`."""
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(self.prompts, return_tensors="pt", padding=True)
        out = self.model.generate(
            input_ids=batch.input_ids.repeat_interleave(n, 0).to(self.model.device),
            attention_mask=batch.attention_mask.repeat_interleave(n, 0).to(self.model.device),
            max_new_tokens=NEW,
            eos_token_id=self.eos,
            pad_token_id=int(self.tokenizer.pad_token_id),
            **options,
        )[:, batch.input_ids.shape[1] :]
        rows = out.tolist()
        return [row[: row.index(self.eos) + 1] if self.eos in row else row for row in rows]

    def greedy_check(self) -> str:
        drawn = sample(self.policy, self.prompts, SamplingConfig(temperature=0, max_new_tokens=16))
        theirs = self.generated(1, do_sample=False)
        same = sum(s.completion_ids == row[:16] for s, row in zip(drawn, theirs, strict=True))
        return f"{same} of {len(drawn)} greedy completions are the same"


if __name__ == "__main__":
    main()
