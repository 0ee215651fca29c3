"""What the benchmarks share: runs in turns, ratios with their range, peak memory, rows on disk.

A machine's speed changes from minute to minute, so the things compared run in turns in one process,
and what counts is the ratio of each turn. The first turn warms up and is not counted.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from trueward.data.formats import PreferenceRow, load_preferences
from trueward.models.scratch import train_bpe_tokenizer

VOCABULARY = 4096
# Millions of parameters by name, embeddings counted in: (hidden size, layers).
SIZES = {"1M": (96, 4), "5M": (256, 4), "20M": (384, 8), "50M": (640, 8), "110M": (768, 12)}

# What TRL's trainers need on a CPU, and no more.
ON_A_CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables: something of ours beside something else."""

    work: str
    setting: str
    against: str
    seconds: list[float]  # ours, of each turn, for a `unit`
    other_seconds: list[float]
    bar: float | None = None  # least ratio of the other's seconds to ours; `at_most` turns it round
    at_most: bool = False  # the bar bounds our seconds over the other's
    memory: float | None = None  # MiB at the peak, ours
    other_memory: float | None = None
    memory_bar: float | None = None  # most of ours over the other's
    unit: str = "run"
    operations: float | None = None  # floating-point operations of a unit that cannot be saved
    rate: float | None = None  # of matrix products, operations a second, measured in the same turns
    check: str = ""  # how far the two results agree

    @property
    def ratios(self) -> list[float]:
        """The other's seconds over ours (ours over the other's with `at_most`), turn by turn."""
        pairs = zip(self.seconds, self.other_seconds, strict=True)
        return [a / b if self.at_most else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def limit_reached(self) -> float | None:
        """The machine's seconds for the operations that cannot be saved, over ours."""
        if self.operations is None or self.rate is None:
            return None
        return self.operations / self.rate / statistics.median(self.seconds)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--sizes", nargs="+", default=["1M", "5M", "20M"], choices=list(SIZES))
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--output", type=Path, help="JSON file for the rows")
    made.add_argument("--peak", nargs="+", help="print the peak memory of one case, nothing else")
    return made


def alternate(runs: Mapping[str, Callable[[int], float]], repeats: int) -> dict[str, list[float]]:
    """Return what each run says it cost, in turns; the first turn warms up.

    A run is given the number of its turn and returns its seconds (see `timed`), of the whole or for
    a unit of work where turns differ in their work. `rate` holds the machine's matrix products, in
    operations a second, measured in the same turns: the best of three each.
    """
    costs: dict[str, list[float]] = {name: [] for name in [*runs, "rate"]}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            cost = run(turn)
            if turn:
                costs[name].append(cost)
        if turn:
            costs["rate"].append(matrix_rate())
    return costs


def matrix_rate(size: int = 1024, *, tries: int = 3, dtype: torch.dtype = torch.float32) -> float:
    """Return operations a second of the product of two square matrices, the best of some tries."""
    a, b = torch.randn(2, size, size).to(dtype)
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(tries))


def copy_rate(megabytes: int = 256) -> float:
    """Return bytes a second, read and written, of copying a tensor that no cache holds."""
    source = torch.zeros(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source)) for _ in range(3))


def timed(run: Callable[[], object], *, units: float = 1.0, device: str = "cpu") -> float:
    """Return the wall-clock seconds of a run for a unit of its work."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / units


def peak_memory() -> float:
    """Return the most memory that this process ever held, in MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def peak_of(*case: str) -> float:
    """Run this very script in a process of its own for the peak memory of one case."""
    command = [sys.executable, *sys.argv, "--peak", *case]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return float(found.stdout.split()[-1])


def show(row: Row) -> None:
    """Print one line."""
    low, high = min(row.ratios), max(row.ratios)
    bar = f"{'<=' if row.at_most else '>='} {row.bar}" if row.bar else ""
    memory = f", memory {row.memory / row.other_memory:.2f}" if row.memory else ""
    print(
        f"{row.work}, {row.setting}, against {row.against}: {row.ratio:.3f} ({low:.3f} to "
        f"{high:.3f}) {bar}; {statistics.median(row.seconds):.3f} s against "
        f"{statistics.median(row.other_seconds):.3f} s{memory}; {row.check}",
        flush=True,
    )


def write(rows: Sequence[Row], output: Path | None) -> None:
    """Keep the rows."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def llama_config(size: str, *, positions: int = 1024) -> LlamaConfig:
    """Return a Llama of a size in `SIZES`, with heads of 32 or 64 dimensions."""
    hidden, layers = SIZES[size]
    head = 32 if hidden < 256 else 64
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
        head_dim=head,
        max_position_embeddings=positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )


def made_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 4,096 tokens, trained on made words of one to four syllables."""
    rng = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(2000)]
    return train_bpe_tokenizer(texts, vocab_size=VOCABULARY)


def text_of(tokenizer: PreTrainedTokenizerFast, length: int, *, seed: int) -> str:
    """Return a made text that has `length` tokens, also when it is read again."""
    rng = random.Random(seed)
    ids = [rng.randrange(300, VOCABULARY) for _ in range(length)]
    while True:
        text = str(tokenizer.decode(ids)).strip()
        found = tokenizer(text, add_special_tokens=False).input_ids
        if len(found) == length:
            return text
        ids = found[:length]
        ids += [rng.randrange(300, VOCABULARY) for _ in range(length - len(ids))]


def body_parameters(model: nn.Module) -> int:
    """Count the weights that every token is multiplied with: no embeddings, no language head."""
    outside = ("embed_tokens", "lm_head")
    return sum(
        p.numel() for name, p in model.named_parameters() if not any(o in name for o in outside)
    )


def real_pairs(
    folder: Path, name: str, *, split: str = "train"
) -> tuple[list[PreferenceRow], PreTrainedTokenizerFast]:
    """Return a set's pairs in a fixed random order, and a tokenizer trained on their words."""
    rows = load_preferences(folder / name / f"{split}.jsonl.gz").rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [rows[i] for i in order[:2000]]
    texts = [m["content"] for row in rows for m in [*row.prompt, *row.chosen]]
    return rows, train_bpe_tokenizer(texts, vocab_size=VOCABULARY)
