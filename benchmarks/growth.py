"""How cost grows with members, samples of a prompt, lengths and the model: slopes on log scales.

    python benchmarks/growth.py

A slope of 1 is proportional growth. Scoring runs without gradients, training with them; the sizes
of the model go from 1 to 110 million parameters.
"""

import json
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from harness import SIZES, alternate, body_parameters, llama_config, parser, timed
from transformers import AutoModel

from trueward.data.packing import group_by_prompt
from trueward.models.backbone import packed_batches, row_room
from trueward.models.reward_model import RewardModel
from trueward.testing import random_groups, tiny_tokenizer


def main() -> None:
    options = parser(__doc__)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name, (what, case, xs) in CASES.items():
        made = {str(x): case(x) for x in xs}
        runs = {x: lambda _, r=run: timed(r) for x, (run, _) in made.items()}
        seconds = alternate(runs, args.repeats)
        rate = median(seconds.pop("rate"))
        ys = [median(seconds[str(x)]) for x in xs]
        floors = [operations / rate for _, operations in made.values()]
        slope = float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
        floor_slope = float(np.polyfit(np.log(xs), np.log(floors), 1)[0])
        found[name] = {
            "what": what,
            "x": list(xs),
            "seconds": ys,
            "floor": floors,
            "slope": slope,
            "floor_slope": floor_slope,
        }
        print(f"{what}: slope {slope:.2f}, of operations alone {floor_slope:.2f}", flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")


Case = tuple[Callable[[], object], float]


def scoring(
    size: str = "5M", *, prompt: int = 256, completion: int = 64, samples: int = 4, members: int = 1
) -> Case:
    torch.manual_seed(0)
    backbone = AutoModel.from_config(llama_config(size, positions=2048))
    options = {"members": members} if members > 1 else {}
    model = RewardModel.from_backbone(backbone, tiny_tokenizer(), **options).eval()
    return work(model, prompt, completion, samples, backward=False)


def lora(members: int) -> Case:
    torch.manual_seed(0)
    backbone = AutoModel.from_config(llama_config("5M"))
    options = {"lora_members": members, "lora_rank": 8, "lora_layers": 0.25}
    model = RewardModel.from_backbone(backbone, tiny_tokenizer(), **options).eval()
    run, operations = work(model, 256, 64, 4, backward=False)
    layers = llama_config("5M").num_hidden_layers
    top = max(1, round(layers / 4)) / layers
    return run, operations * (1 - top + members * top)


def training(parameters: float) -> Case:
    """A pair of 128 + 64 + 64 tokens through a model of so many parameters without embeddings."""
    size = min(SIZES, key=lambda name: abs(body_of(name) - parameters))
    torch.manual_seed(0)
    backbone = AutoModel.from_config(llama_config(size))
    model = RewardModel.from_backbone(backbone, tiny_tokenizer()).train()
    return work(model, 128, 64, 2, backward=True)


def body_of(size: str) -> int:
    hidden, layers = SIZES[size]
    return layers * 16 * hidden**2  # four projections and three matrices of 4 x the width


def work(model: RewardModel, prompt: int, completion: int, samples: int, *, backward: bool) -> Case:
    ((ids, completions),) = random_groups(
        4096, prompts=[prompt], completions=[[completion] * samples]
    )
    groups, _ = group_by_prompt(
        [ids] * samples, completions, max_tokens=row_room(model.backbone, max_tokens=16384)
    )

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for _, batch in packed_batches(model.backbone, groups, pad_id=0, max_tokens=16384):
                means = model(batch).means
                if backward:
                    means.sum().backward()
        model.zero_grad()

    tokens = prompt + samples * completion
    return run, (6.0 if backward else 2.0) * body_parameters(model.backbone) * tokens


CASES = {
    "model": (
        "training, parameters of the model",
        training,
        [body_of(size) for size in SIZES],
    ),
    "heads": (
        "scoring, Gaussian heads",
        lambda members: scoring(members=members),
        [1, 2, 5, 10, 20],
    ),
    "lora": ("scoring, LoRA members on the top quarter", lora, [1, 2, 5, 10, 20]),
    "samples": (
        "scoring, samples of one prompt of 256 tokens",
        lambda samples: scoring(samples=samples),
        [1, 2, 4, 8, 16, 32, 64],
    ),
    "prompt": (
        "scoring, tokens of the prompt of 4 samples",
        lambda prompt: scoring(prompt=prompt),
        [64, 128, 256, 512, 1024],
    ),
    "sequence": (
        "scoring, tokens of a completion",
        lambda completion: scoring(prompt=16, completion=completion, samples=2),
        [64, 128, 256, 512, 1024],
    ),
}


if __name__ == "__main__":
    main()
