"""Scoring n completions of a prompt: `RewardModel.score` beside a plain sequence classifier.

    python benchmarks/scoring.py

Both read the same saved weights and the same texts' ids; the classifier computes a row for each
completion, in right-padded batches of 6 sorted by length (faster here than 16).
"""

import math
import tempfile
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
from transformers import AutoModelForSequenceClassification

from trueward import RewardModel
from trueward.data.packing import Group, group_by_prompt
from trueward.models.backbone import packed_batches, row_room
from trueward.testing import random_groups, tiny_tokenizer

BARS = {10: 2.7}
PROMPT, COMPLETION, ROWS, MAX_TOKENS = 256, 64, 6, 16384


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--completions", type=int, nargs="+", default=[1, 2, 10, 64])
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        size, n, case = args.peak
        Bench(size, int(n)).runs()[case](0)
        print(peak_memory())
        return
    rows = []
    for size in args.sizes:
        for n in args.completions:
            bench = Bench(size, n)
            seconds = alternate(bench.runs(), args.repeats)
            peaks = {case: peak_of(size, str(n), case) for case in bench.runs()}
            difference = (bench.found["trueward"] - bench.found["plain"]).abs().max().item()
            rows.append(
                Row(
                    work=f"scoring {n} completions a prompt",
                    setting=f"{size}, prompts of {PROMPT} tokens, completions of {COMPLETION}",
                    against="AutoModelForSequenceClassification, sorted batches",
                    seconds=seconds["trueward"],
                    other_seconds=seconds["plain"],
                    bar=BARS.get(n),
                    memory=peaks["trueward"],
                    other_memory=peaks["plain"],
                    operations=bench.operations,
                    rate=median(seconds["rate"]),
                    check=f"scores differ by at most {difference:.0e}",
                )
            )
            show(rows[-1])
            write(rows, args.output)


class Bench:
    """The same weights and ids for both sides; some 20 completions in all, or one prompt's."""

    def __init__(self, size: str, n: int) -> None:
        torch.manual_seed(0)
        self.plain_model = AutoModelForSequenceClassification.from_config(llama_config(size)).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.plain_model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            self.model = RewardModel.from_pretrained(folder, device="cpu")
        prompts = math.ceil(20 / n)
        made = random_groups(
            4096, prompts=[PROMPT] * prompts, completions=[[COMPLETION] * n] * prompts
        )
        self.groups = [Group(*group) for group in made]
        self.tokens = [(p, c) for p, completions in self.groups for c in completions]
        shared = prompts * (PROMPT + n * COMPLETION)
        self.operations = 2.0 * body_parameters(self.plain_model) * shared
        self.found: dict[str, torch.Tensor] = {}

    def runs(self):
        return {
            "trueward": lambda _: timed(self.ours),
            "plain": lambda _: timed(self.plain),
        }

    @torch.no_grad()
    def ours(self) -> None:
        """What `score` does with ids: random ids are no text, so it cannot be asked itself."""
        groups, members = group_by_prompt(
            [p for p, _ in self.tokens],
            [c for _, c in self.tokens],
            max_tokens=row_room(self.model.backbone, max_tokens=MAX_TOKENS),
        )
        scores = torch.zeros(len(self.tokens))
        for some, batch in packed_batches(
            self.model.backbone, groups, pad_id=0, max_tokens=MAX_TOKENS
        ):
            scores[[i for g in some for i in members[g]]] = self.model(batch).means[:, 0]
        self.found["trueward"] = scores

    @torch.no_grad()
    def plain(self) -> None:
        ids = [[*p, *c] for p, c in self.tokens]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = torch.zeros(len(ids))
        for start in range(0, len(order), ROWS):
            some = order[start : start + ROWS]
            width = max(len(ids[i]) for i in some)
            input_ids = torch.zeros(len(some), width, dtype=torch.long)
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(some):
                input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            logits = self.plain_model(input_ids=input_ids, attention_mask=mask).logits
            scores[some] = logits[:, 0]
        self.found["plain"] = scores


if __name__ == "__main__":
    main()
