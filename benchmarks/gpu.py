"""The same questions on a GPU: models of 0.1 to 1 billion random weights in bfloat16, nine minutes.

    python benchmarks/gpu.py                         (--device cpu --sizes 1M tries it anywhere)

Reward training, scoring, a policy step and sampling, each beside the plain way (a padded row for
each completion; `generate`), in turns. MFU is the operations of the tokens that had to be computed,
forward and backward, over the card's dense bfloat16 rate as its sheet has it (`--peak_tflops`), and
over the rate that a large product reaches here. Parts that no longer fit `--budget` seconds are
named, not dropped in silence.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from generation import Bench as Sampling
from harness import (
    SIZES,
    Row,
    alternate,
    body_parameters,
    llama_config,
    made_tokenizer,
    matrix_rate,
    parser,
    show,
    text_of,
    timed,
    write,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trueward import Policy, RewardModel
from trueward.data.packing import Group, PackedBatch, pad
from trueward.losses.preference import bradley_terry_loss
from trueward.models.attention import use_block_masks
from trueward.models.backbone import compile_layers, packed_batches
from trueward.models.reward_model import ScalarHead
from trueward.testing import random_groups
from trueward.train.policy import PolicyConfig, train_policy

SIZES |= {"350M": (1024, 24), "1B": (1792, 26)}
# Prompts as in hh_helpful, of which lengths differ by a factor of ten; completions too.
PROMPTS, COMPLETIONS = (40, 80, 120, 160, 220, 300, 400, 520), (30, 60, 90, 140)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(sizes=["110M", "350M", "1B"], repeats=5)
    options.add_argument("--device", default="cuda")
    options.add_argument("--compile_layers", action="store_true", help="rewards, torch.compile")
    options.add_argument("--flex_attention", action="store_true", help="rewards, by blocks")
    options.add_argument("--budget", type=float, default=500.0, help="seconds of the whole")
    options.add_argument("--peak_tflops", type=float, default=989.0, help="dense bfloat16")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    started, rows, left_out = time.perf_counter(), [], []
    print(f"{device_name(args.device)}, torch {torch.__version__}; {matrix_text(args.device)}")
    for size in args.sizes:
        for part in (training, scoring, policy_step, sampling):
            if time.perf_counter() - started > args.budget:
                left_out.append(f"{part.__name__} {size}")
                continue
            row = part(size, args)
            rows.append(row)
            show(row)
            if row.operations is not None:
                rate = row.operations / median(row.seconds)
                print(f"    MFU {rate / args.peak_tflops / 1e12:.1%}, {rate / 1e12:.1f} TFLOP/s")
            write(rows, args.output)
    if left_out:
        print(f"Left out for want of time: {', '.join(left_out)}.")
    print(f"{time.perf_counter() - started:.0f} s")


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def matrix_text(device: str) -> str:
    if device != "cuda":
        return f"products at {matrix_rate() / 1e9:.0f} GFLOP/s in float32"
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    seconds = min(timed(lambda: a @ b, device=device) for _ in range(8))
    return f"products at {2 * 8192**3 / seconds / 1e12:.0f} TFLOP/s in bfloat16"


def reward_model(size: str, args) -> RewardModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(llama_config(size))
    head = ScalarHead(model.config.hidden_size)
    head.linear.weight = model.score.weight
    made = RewardModel(model.model, head, made_tokenizer()).to(args.device)
    if args.flex_attention:
        use_block_masks(made)
    if args.compile_layers:
        compile_layers(made)
    return made


def pairs(copies: int = 4) -> list[Group]:
    """Pairs of all prompts, each with two completions of the lengths in turn."""
    prompts = [p for p in PROMPTS for _ in range(copies)]
    sides = [
        [COMPLETIONS[i % len(COMPLETIONS)], COMPLETIONS[(i + 1) % len(COMPLETIONS)]]
        for i in range(len(prompts))
    ]
    return [Group(*g) for g in random_groups(4096, prompts=prompts, completions=sides)]


def training(size: str, args) -> Row:
    """A batch of 32 pairs, forward and backward: packed by tokens, or padded to the longest."""
    model, groups = reward_model(size, args).train(), pairs()

    def step(batches: Callable[[], Sequence[PackedBatch]]) -> None:
        for batch in batches():
            with torch.autocast(args.device, dtype=torch.bfloat16):
                means = model(batch).means
            bradley_terry_loss(means[0::2, 0], means[1::2, 0]).sum().backward()
        model.zero_grad()

    def packed() -> list[PackedBatch]:
        found = packed_batches(model.backbone, groups, pad_id=0, max_tokens=16384)
        return [batch for _, batch in found]

    def padded() -> list[PackedBatch]:
        return [pad(groups[i : i + 8], pad_id=0).to(args.device) for i in range(0, len(groups), 8)]

    cost = alternate(
        {
            "ours": lambda _: timed(lambda: step(packed), device=args.device),
            "plain": lambda _: timed(lambda: step(padded), device=args.device),
        },
        args.repeats,
    )
    tokens = sum(len(g.prompt_ids) + sum(map(len, g.completions)) for g in groups)
    return Row(
        work="reward training",
        setting=f"{size}, {len(groups)} pairs",
        against="rows padded to the longest",
        seconds=cost["ours"],
        other_seconds=cost["plain"],
        operations=6.0 * body_parameters(model.backbone) * tokens,
    )


def scoring(size: str, args) -> Row:
    """16 prompts of 256 tokens, 10 completions of 64 each."""
    model = reward_model(size, args).eval()
    made = random_groups(4096, prompts=[256] * 16, completions=[[64] * 10] * 16)
    groups, found = [Group(*g) for g in made], {}

    @torch.no_grad()
    def run(name: str, batches: Callable[[], Sequence[tuple[list[int], PackedBatch]]]) -> None:
        scores: dict[int, Tensor] = {}
        for some, batch in batches():
            with torch.autocast(args.device, dtype=torch.bfloat16):
                means = model(batch).means[:, 0].view(len(some), -1)
            scores |= dict(zip(some, means, strict=True))
        found[name] = torch.stack([scores[i] for i in range(len(groups))]).float()

    def packed() -> list[tuple[list[int], PackedBatch]]:
        return list(packed_batches(model.backbone, groups, pad_id=0, max_tokens=16384))

    def padded() -> list[tuple[list[int], PackedBatch]]:
        parts = [list(range(i, i + 4)) for i in range(0, len(groups), 4)]
        return [(p, pad([groups[i] for i in p], pad_id=0).to(args.device)) for p in parts]

    cost = alternate(
        {
            "ours": lambda _: timed(lambda: run("ours", packed), device=args.device),
            "plain": lambda _: timed(lambda: run("plain", padded), device=args.device),
        },
        args.repeats,
    )
    difference = (found["ours"] - found["plain"]).abs().max() / found["plain"].std()
    return Row(
        work="scoring 10 completions",
        setting=f"{size}, prompts of 256, completions of 64",
        against="a row for each",
        seconds=cost["ours"],
        other_seconds=cost["plain"],
        operations=2.0 * body_parameters(model.backbone) * 16 * (256 + 640),
        check=f"scores differ by at most {difference.item():.3f} of their std",
    )


def policy_step(size: str, args) -> Row:
    """RLOO with a reward model of the policy's size, 8 prompts of 256, 8 x 64; beside PPO."""
    tokenizer = made_tokenizer()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(llama_config(size))
    reward = reward_model(size, args).eval()
    prompts = [text_of(tokenizer, 256, seed=i) for i in range(8)]

    def step(algorithm: str, turn: int) -> float:
        policy = Policy(plain, tokenizer).to(args.device)
        config = PolicyConfig(
            algorithm=algorithm,  # type: ignore[arg-type]
            steps=1,
            prompts_per_step=8,
            completions_per_prompt=8,
            max_new_tokens=64,
            max_batch_tokens=16384,
            bf16=True,
            seed=turn,
            progress=False,
        )
        return timed(lambda: train_policy(policy, reward, prompts, config), device=args.device)

    cost = alternate(
        {"rloo": lambda turn: step("rloo", turn), "ppo": lambda turn: step("ppo", turn)},
        args.repeats,
    )
    tokens = 8 * (256 + 8 * 64)
    return Row(
        work="policy step, rloo",
        setting=f"{size}, 8 prompts of 256, 8 x 64",
        against="PPO's, with a critic",
        seconds=cost["rloo"],
        other_seconds=cost["ppo"],
        operations=(2 + 2 + 2 + 2 + 6.0) * body_parameters(plain) * tokens,
    )


def sampling(size: str, args) -> Row:
    """Ragged prompts, early stops, 8 a prompt, beside `generate`."""
    bench = Sampling(size)
    bench.model.to(args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    cost = alternate(bench.runs(), args.repeats)
    return Row(
        work="sampling, 8 a prompt",
        setting=f"{size}, ragged prompts, early stops",
        against="generate",
        seconds=cost["trueward"],
        other_seconds=cost["generate"],
        unit="1,000 tokens written",
        operations=bench.operations,
    )


if __name__ == "__main__":
    main()
