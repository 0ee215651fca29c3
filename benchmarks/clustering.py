"""SPG's clustering of 10 samples a prompt, beside one pair of texts at a time.

    python benchmarks/clustering.py

By entailment (a random BERT of width 128 and 2 layers; 24 prompts), as public code of semantic
entropy asks it: both directions of a pair, the next pair once the answer is there. By the policy's
own states (1,000 prompts), beside one text at a time. Clusters must be the same.
"""

import random
from collections.abc import Sequence

import torch
from harness import (
    VOCABULARY,
    Row,
    alternate,
    llama_config,
    made_tokenizer,
    parser,
    show,
    timed,
    write,
)
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from trueward import Policy
from trueward.refine.equivalence import EmbeddingEquivalence, cluster, mean_state_embedding
from trueward.refine.nli import NLIEquivalence, nli_equivalent

SAMPLES = 10


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=1000)
    options.add_argument("--nli_prompts", type=int, default=24)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = made_tokenizer()
    rows = [by_entailment(tokenizer, args.nli_prompts, args.repeats)]
    show(rows[0])
    rows.append(by_states(tokenizer, args.prompts, args.repeats))
    show(rows[1])
    write(rows, args.output)


def made_answers(tokenizer, prompts: int) -> tuple[list[str], list[list[str]]]:
    """Return prompts, and answers of 4 to 40 tokens, some of them twice."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        ids = [rng.randrange(300, VOCABULARY) for _ in range(rng.randint(low, high))]
        return str(tokenizer.decode(ids)).strip()

    answers = [[text(4, 40) for _ in range(SAMPLES - 2)] for _ in range(prompts)]
    return [text(10, 30) for _ in answers], [[*some, some[0], some[3]] for some in answers]


def by_entailment(tokenizer, prompts: int, repeats: int) -> Row:
    torch.manual_seed(0)
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
        initializer_range=0.2,  # random labels, rather than one for all
    )
    model = BertForSequenceClassification(config).eval()
    asked, answers = made_answers(tokenizer, prompts)
    found: dict[str, list[list[int]]] = {}

    def ours() -> None:
        found["ours"] = cluster(asked, answers, NLIEquivalence(model, tokenizer, mode="strict"))

    def one_at_a_time() -> None:
        one = NLIEquivalence(model, tokenizer, mode="strict", batch_size=1)

        def equivalent(prompt: str, first: str, second: str) -> bool:
            ways = [one.labels([prompt], [a], [b]) for a, b in ((first, second), (second, first))]
            return nli_equivalent(*ways, mode="strict")[0]

        found["theirs"] = []
        for prompt, texts in zip(asked, answers, strict=True):
            firsts: list[str] = []
            ids = []
            for text in texts:
                match = next((i for i, f in enumerate(firsts) if equivalent(prompt, f, text)), None)
                ids.append(len(firsts) if match is None else match)
                if match is None:
                    firsts.append(text)
            found["theirs"].append(ids)

    runs = {"ours": lambda _: timed(ours), "theirs": lambda _: timed(one_at_a_time)}
    seconds = alternate(runs, repeats)
    return Row(
        work="clustering by entailment",
        setting=f"{prompts} prompts, {SAMPLES} samples",
        against="one pair at a time",
        seconds=seconds["ours"],
        other_seconds=seconds["theirs"],
        check=same(found),
    )


def by_states(tokenizer, prompts: int, repeats: int) -> Row:
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(llama_config("1M")).eval(), tokenizer)
    asked, answers = made_answers(tokenizer, prompts)
    embed = mean_state_embedding(policy, reference=[a for some in answers[:20] for a in some])
    found: dict[str, list[list[int]]] = {}

    def one_by_one(texts: Sequence[str]) -> torch.Tensor:
        return torch.cat([embed([text]) for text in texts])

    def run(name: str, by) -> None:
        found[name] = cluster(asked, answers, EmbeddingEquivalence(by, threshold=0.3))

    seconds = alternate(
        {
            "ours": lambda _: timed(lambda: run("ours", embed)),
            "theirs": lambda _: timed(lambda: run("theirs", one_by_one)),
        },
        repeats,
    )
    return Row(
        work="clustering by the policy's states",
        setting=f"1M, {prompts} prompts, {SAMPLES} samples",
        against="one text at a time",
        seconds=seconds["ours"],
        other_seconds=seconds["theirs"],
        check=same(found),
    )


def same(found: dict[str, list[list[int]]]) -> str:
    """Tell how many prompts have the same clusters, and how many clusters there are."""
    equal = sum(a == b for a, b in zip(found["ours"], found["theirs"], strict=True))
    clusters = sum(len(set(ids)) for ids in found["ours"]) / len(found["ours"])
    return f"{equal} of {len(found['ours'])} prompts have the same clusters, {clusters:.1f} each"


if __name__ == "__main__":
    main()
