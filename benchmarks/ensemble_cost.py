"""What an ensemble costs beside one reward model: heads, LoRA members, and memory.

`OMP_NUM_THREADS=1 python benchmarks/ensemble_cost.py`: alternating runs on the same batch, the
median of their ratios with its range; each peak of memory is that of a process of its own. Time on
a CPU is the process's own seconds, which other programs on the machine disturb less.

Scoring 5 members on the top quarter of the layers costs `3/4 + 5/4 = 2.0` of one, and on all layers
5.0, where nothing but the layers counts. The queries, keys and values of the first adapted layer
are the base's for all members, so that a little less can be reached. With `--backward` the trunk
has no gradient: `3/4 + 5 (1/4 + 1/4)` of `3/4 + 1/4 + 1/4` is 2.6.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trueward.data.packing import Group, PackedBatch, pad
from trueward.models.reward_model import RewardModel
from trueward.testing import random_groups, tiny_backbone, tiny_tokenizer

VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama", help="a transformers model type")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="with gradients of what is trained")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--peak", help="print the peak memory of one case, in MiB, and nothing else"
    )
    args = parser.parse_args()
    if args.peak:
        print(peak_memory(args))
        return
    batch = made_batch(args)
    print(
        f"{args.model}, {args.layers} layers of width {args.hidden_size}, {args.rows} rows of "
        f"{args.seq} tokens, {args.members} members of rank {args.rank}, {args.device}"
        f"{', with backward' if args.backward else ''}; medians of {args.repeats}\n"
    )
    print(f"{'':46} {'ratio':>6} {'range':>12} {'seconds':>15} {'target':>7}")
    # (what, the ensemble, one, passes of one, target)
    cases = [
        ("Gaussian heads against a scalar head", "heads", "scalar", 1, 1.05),
        ("LoRA, top quarter, against one member", "top", "top_one", 1, 2.2),
        ("LoRA, all layers, to one of separate passes", "all", "all_one", args.members, 5.0),
    ]
    for what, many, one, passes, target in cases:
        runs = [
            (run_of(made_model(args, many), batch, args), 1),
            (run_of(made_model(args, one), batch, args), passes),
        ]
        first, second = alternate(runs, args.repeats, args.device)
        second = [seconds / passes for seconds in second]
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        low, high = min(ratios), max(ratios)
        seconds = f"{statistics.median(first):.3f} / {statistics.median(second):.3f}"
        print(
            f"{what:46} {statistics.median(ratios):6.3f} {f'{low:.3f}-{high:.3f}':>12} "
            f"{seconds:>15} {f'<= {target}':>7}",
            flush=True,
        )
    base = peak_of("scalar")
    print(f"\n{'peak memory, MiB':46} {'ratio':>6} {'MiB':>12}")
    for case, what in [
        ("scalar", "one base, scalar head"),
        ("heads", "Gaussian heads"),
        ("top", "LoRA, top quarter"),
        ("all", "LoRA, all layers"),
    ]:
        peak = base if case == "scalar" else peak_of(case)
        print(f"{what:46} {peak / base:6.3f} {peak:12.0f}")


def made_model(args: argparse.Namespace, case: str) -> RewardModel:
    backbone = tiny_backbone(
        args.model,
        vocab_size=VOCABULARY,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=8,
        max_positions=max(512, args.seq),
    )
    options: dict[str, dict[str, float]] = {
        "scalar": {},
        "heads": {"members": args.members},
        "top": {"lora_members": args.members, "lora_rank": args.rank, "lora_layers": 0.25},
        "top_one": {"lora_members": 1, "lora_rank": args.rank, "lora_layers": 0.25},
        "all": {"lora_members": args.members, "lora_rank": args.rank, "lora_layers": 1.0},
        "all_one": {"lora_members": 1, "lora_rank": args.rank, "lora_layers": 1.0},
    }
    model = RewardModel.from_backbone(backbone, tiny_tokenizer(), **options[case]).eval()
    return model.to(args.device)


def made_batch(args: argparse.Namespace) -> PackedBatch:
    half = args.seq // 2
    groups = random_groups(
        VOCABULARY, prompts=[args.seq - half] * args.rows, completions=[[half]] * args.rows
    )
    return pad([Group(*group) for group in groups], pad_id=0).to(args.device)


def run_of(
    model: RewardModel, batch: PackedBatch, args: argparse.Namespace
) -> Callable[[], object]:
    def run() -> None:
        with torch.set_grad_enabled(args.backward):
            means = model(batch).means
            if args.backward:
                means.sum().backward()
                model.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return run


def alternate(
    runs: list[tuple[Callable[[], object], int]], repeats: int, device: str
) -> list[list[float]]:
    """Seconds of each run, done as many times over as it says, in turns; the first warms up."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for (run, passes), found in zip(runs, seconds, strict=True):
            start = clock()
            for _ in range(passes):
                run()
            if repeat:
                found.append(clock() - start)
    return seconds


def peak_memory(args: argparse.Namespace) -> float:
    """Build one case, compute its batch, and return the most memory held, in MiB."""
    run_of(made_model(args, args.peak), made_batch(args), args)()
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # on Linux a child's ru_maxrss starts from its parent's
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_of(case: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", case]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
