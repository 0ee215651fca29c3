"""The cost model beside measurements, and what it says of a 7 B policy on 8 and 64 GPUs.

    python benchmarks/cost_model.py

Measures policy steps at the sizes that can be run here, predicts them from the machine's own matrix
and copy rates, and writes both, with the prediction that cannot be checked here, into
docs/scaling.md, between its two marks.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from harness import (
    SIZES,
    VOCABULARY,
    alternate,
    copy_rate,
    llama_config,
    parser,
    peak_memory,
    peak_of,
)
from policy_step import COMPLETION, PROMPT, PROMPTS, SAMPLES, Bench

from trueward.report.cost import (
    DecoderShape,
    Family,
    Machine,
    StepShape,
    memory_bytes,
    policy_step_seconds,
)

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
MARKS = "<!-- cost model: benchmarks/cost_model.py -->", "<!-- end of the cost model -->"
STEP = StepShape(
    prompts=PROMPTS, samples=SAMPLES, prompt_tokens=PROMPT, completion_tokens=COMPLETION
)
SEVEN_B = DecoderShape(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, vocabulary=32000
)
LARGE = StepShape(prompts=128, samples=8, prompt_tokens=512, completion_tokens=512)
# An H100's sheet: 989 TFLOP/s of bfloat16, 3.35 TB/s; 450 GB/s within a machine of
# 8, 50 GB/s between. What is taken of it: 40 % of products, 60 % of memory, 70 % of links. Assumed.
H100 = Machine(
    rate=0.4 * 989e12,
    memory_rate=0.6 * 3.35e12,
    link_rate=0.7 * 450e9,
    processes=8,
    compute_bytes=2,
    in_pieces=False,
)
GPUS = {8: H100, 64: replace(H100, processes=64, link_rate=0.7 * 50e9)}
REWARDS: list[tuple[str, int, Family]] = [
    ("one reward", 1, "single"),
    ("5 heads", 5, "heads"),
    ("5 LoRA members, top quarter", 5, "lora"),
    ("5 models", 5, "deep"),
]


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        size, algorithm = args.peak
        Bench(size, algorithm).ours(0)
        print(peak_memory())
        return
    lines = [MARKS[0], "", *measured(args), "", *predicted(), "", MARKS[1]]
    text = PAGE.read_text()
    start, end = text.index(MARKS[0]), text.index(MARKS[1]) + len(MARKS[1])
    PAGE.write_text(text[:start] + "\n".join(lines) + text[end:])
    print("\n".join(lines))


def measured(args) -> list[str]:
    rows, ratios = [], []
    idle = float(
        subprocess.run(
            [sys.executable, "-c", "import policy_step, harness; print(harness.peak_memory())"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout
    )
    for algorithm in ("rloo", "ppo"):
        for size in args.sizes:
            bench = Bench(size, algorithm)
            found = alternate({"step": bench.ours}, args.repeats)
            machine = Machine(rate=median(found["rate"]), memory_rate=copy_rate())
            shape = shape_of(size)
            parts = policy_step_seconds(shape, shape, STEP, machine, critic=algorithm == "ppo")
            seconds = median(found["step"]) * STEP.written / 1000
            held = memory_bytes(
                *(shape, shape, STEP, machine), critic=algorithm == "ppo", reward_bytes=4
            )
            # Beside the step's own models the benchmark keeps those that it copies from.
            held["benchmark"] = 8.0 * shape.weights
            memory, peak = sum(held.values()) / 2**20, peak_of(size, algorithm) - idle
            ratios.append(seconds / sum(parts.values()))
            rows.append(
                f"| {algorithm}, {size} | {seconds:.2f} | {sum(parts.values()):.2f} | "
                f"{ratios[-1]:.2f} | {peak:.0f} | {memory:.0f} | {peak / memory:.2f} |"
            )
            print(rows[-1], flush=True)
    return [
        "### Held against measurements",
        f"A step of {PROMPTS} prompts of {PROMPT} tokens with {SAMPLES} completions of",
        f"{COMPLETION}, on {args.threads} threads in float32, the reward of the policy's size:",
        "seconds measured, and predicted from the matrix and copy rates measured beside it; MiB at",
        "the peak above an idle Python with its libraries, and predicted. Medians of "
        f"{args.repeats} turns.",
        "",
        "| step | seconds | predicted | ratio | MiB | predicted | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"A step takes {min(ratios):.2f} to {max(ratios):.2f} times what the model says.",
    ]


def shape_of(size: str) -> DecoderShape:
    hidden, layers = SIZES[size]
    config = llama_config(size)
    return DecoderShape(
        layers=layers,
        hidden=hidden,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=VOCABULARY,
    )


def predicted() -> list[str]:
    lines = [
        "### A 7 B policy with a 7 B reward (predicted, not measured)",
        f"RLOO, {LARGE.prompts} prompts of {LARGE.prompt_tokens} tokens with {LARGE.samples} "
        f"completions of {LARGE.completion_tokens}, sharded weights, {LARGE.batch_tokens} tokens a",
        "micro-batch;",
        "H100s of which 40 % of the products, 60 % of memory's rate and 70 % of the links are",
        "reached (assumed), all in bfloat16 but the optimiser. Seconds of a step and its parts; GB",
        "that each process holds at its peak, of which the reward. A card has 80.",
        "",
        "| GPUs | reward | step | write | reward | observe | learn | send | GB | of the reward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, machine in GPUS.items():
        for name, members, family in REWARDS:
            parts = policy_step_seconds(
                SEVEN_B,
                SEVEN_B,
                LARGE,
                machine,
                members=members,
                family=family,
                sharded=True,
            )
            held = memory_bytes(
                SEVEN_B,
                SEVEN_B,
                LARGE,
                machine,
                members=members,
                family=family,
                sharded=True,
            )
            cells = [f"{sum(parts.values()):.0f}", *(f"{v:.1f}" for v in parts.values())]
            cells += [f"{sum(held.values()) / 1e9:.0f}", f"{held['rewards'] / 1e9:.0f}"]
            lines.append(f"| {count} | {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
