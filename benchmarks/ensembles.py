"""What an ensemble of K members costs: heads and LoRA members in one pass, beside K passes.

    python benchmarks/ensembles.py

Scoring 5 LoRA members on the top quarter of the layers costs `3/4 + 5/4 = 2.0` of one where nothing
but the layers counts, on all layers 5.0; with gradients, of which the trunk has none,
`(3/4 + 5 (1/4 + 1/4)) / (3/4 + 1/4 + 1/4) = 2.6`. Public ensemble code makes K passes.
"""

from statistics import median

import torch
from harness import (
    Row,
    alternate,
    body_parameters,
    llama_config,
    parser,
    peak_memory,
    peak_of,
    show,
    timed,
    write,
)
from transformers import AutoModel

from trueward.data.packing import Group, pad
from trueward.models.reward_model import RewardModel
from trueward.testing import random_groups, tiny_tokenizer

ROWS, TOKENS, RANK = 8, 256, 8
# (kind, members, with gradients): at most so many times one member's seconds.
BARS = {("heads", 5, False): 1.05, ("top", 5, False): 2.2, ("all", 5, False): 5.0}
NAMES = {"heads": "Gaussian heads", "top": "LoRA, top quarter", "all": "LoRA, all layers"}
NAMES |= {"deep": "deep ensemble"}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--members", type=int, nargs="+", default=[5, 20])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    batch = made_batch()
    if args.peak:
        size, kind, members = args.peak
        run(models_of(size, kind, int(members)), batch, backward=False)
        print(peak_memory())
        return
    rows = []
    for size in args.sizes:
        base = peak_of(size, "deep", "1")
        for kind in NAMES:
            peaks = {k: peak_of(size, kind, str(k)) for k in args.members}
            for members in args.members:
                for backward in (False, True):
                    if members > 5 and (backward or kind == "deep"):
                        continue  # minutes, and nothing to learn: passes add up
                    if kind == "deep" and backward:
                        continue
                    many, one = (models_of(size, kind, k) for k in (members, 1))
                    seconds = alternate(
                        {
                            "many": lambda _, m=many, b=backward: timed(lambda: run(m, batch, b)),
                            "one": lambda _, m=one, b=backward: timed(lambda: run(m, batch, b)),
                        },
                        args.repeats,
                    )
                    rows.append(
                        Row(
                            work=f"{NAMES[kind]}, {members} members"
                            + (", with gradients" if backward else ""),
                            setting=f"{size}, {ROWS} rows of {TOKENS} tokens",
                            against="one member",
                            seconds=seconds["many"],
                            other_seconds=seconds["one"],
                            bar=BARS.get((kind, members, backward)),
                            at_most=True,
                            rate=median(seconds["rate"]),
                            memory=None if backward else peaks[members],
                            other_memory=base,
                            operations=None
                            if backward
                            else 2.0
                            * ROWS
                            * TOKENS
                            * body_parameters(one[0].backbone)
                            * floor_of(kind, members, size),
                        )
                    )
                    show(rows[-1])
                    write(rows, args.output)


def floor_of(kind: str, members: int, size: str) -> float:
    """Passes of one model that so many members cannot do without."""
    layers = llama_config(size).num_hidden_layers
    top = max(1, round(layers / 4)) / layers
    return {"heads": 1.0, "top": 1 - top + members * top, "all": members, "deep": members}[kind]


def models_of(size: str, kind: str, members: int) -> list[RewardModel]:
    options: dict[str, dict[str, float]] = {
        "deep": {},
        "heads": {"members": members},
        "top": {"lora_members": members, "lora_rank": RANK, "lora_layers": 0.25},
        "all": {"lora_members": members, "lora_rank": RANK, "lora_layers": 1.0},
    }
    models = []
    for seed in range(members if kind == "deep" else 1):
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(llama_config(size))
        made = RewardModel.from_backbone(backbone, tiny_tokenizer(), **options[kind])
        models.append(made.eval())
    return models


def made_batch():
    half = TOKENS // 2
    groups = random_groups(4096, prompts=[half] * ROWS, completions=[[TOKENS - half]] * ROWS)
    return pad([Group(*group) for group in groups], pad_id=0)


def run(models: list[RewardModel], batch, backward: bool) -> None:
    for model in models:
        with torch.set_grad_enabled(backward):
            means = model(batch).means
            if backward:
                means.sum().backward()
                model.zero_grad()


if __name__ == "__main__":
    main()
