"""Scoring completions of one prompt: packed with a shared prefix against a row for each.

`python benchmarks/packing.py`: alternating runs of the same model on the same tokens; prints the
median of the ratios with their spread, and the largest difference between the two results.
"""

import argparse
import statistics
import time

import torch

from trueward.data.packing import Group, pack, pad
from trueward.models.backbone import hidden_states
from trueward.testing import random_groups, tiny_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama", help="a transformers model type")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--completions", type=int, default=10)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    model = tiny_backbone(
        args.model,
        vocab_size=4096,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=8,
        max_positions=1024,
    )
    made = random_groups(
        4096, prompts=[args.prompt], completions=[[args.completion] * args.completions]
    )
    groups = [Group(*group) for group in made]
    batches = {"packed": pack(groups, pad_id=0), "separate": pad(groups, pad_id=0)}
    for backward in (False, True):
        seconds: dict[str, list[float]] = {"packed": [], "separate": []}
        states = {}
        for repeat in range(args.repeats + 1):
            for name, batch in batches.items():
                start = time.perf_counter()
                with torch.set_grad_enabled(backward):
                    states[name] = hidden_states(model, batch)[batch.rows, batch.last]
                    if backward:
                        states[name].square().sum().backward()
                        model.zero_grad()
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(seconds["packed"], seconds["separate"], strict=True)]
        difference = (states["packed"] - states["separate"]).abs().max().item()
        print(
            f"{args.model}, {'with' if backward else 'without'} backward: "
            f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"largest difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
