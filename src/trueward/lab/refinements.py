"""Rewards refined on a policy's recorded samples, cross-validated by prompt.

Somebody sampled a policy and judged its answers once; the policy is optimised by best-of-n, so
nothing need be written anew. In each fold a reward learns from preferences about the other folds'
prompts, is refined without labels on the recorded answers to them, and then chooses among the
answers to the fold's own prompts, of which it has seen nothing. What the recorded gold says of its
choice, before and after, is what RLP promises to raise (Lang et al. 2024,
https://arxiv.org/abs/2403.19279). Rewards stand on a frozen sentence encoder, so that every text is
embedded once.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from trueward import objectives
from trueward.console import main_console
from trueward.data.formats import load_preferences
from trueward.data.rows import Completion, PreferenceRow, Prompt, prompt_key, text_of
from trueward.data.sources import (
    BrokenRecord,
    DataError,
    json_type,
    read_jsonl,
    record_streams,
    resolve_source,
    write_jsonl,
)
from trueward.evaluate.overoptimization import best_of_n_curves_per_prompt, best_of_n_sizes
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.shift import agreement
from trueward.lab.controls import random_reward
from trueward.lab.processes import Task, only_one, run_tasks, teller
from trueward.models.reward_function import Reward, posterior_function
from trueward.models.reward_model import RewardModel
from trueward.models.sentence_backbone import (
    SentenceBackbone,
    sentence_backbone,
    sentence_embedding,
)
from trueward.options import ObjectiveConfig
from trueward.refine.equivalence import EmbeddingEquivalence, related_threshold
from trueward.refine.multiview import MultiViewConfig
from trueward.refine.refinement import (
    METHODS,
    RefineMethod,
    refine_reward,
    require_own_options,
    rewards_of,
)
from trueward.refine.spg import SPGConfig
from trueward.report.refinements import RefinementRuns, refinements_report
from trueward.train.families import FamilyConfig, load_family, train_family
from trueward.train.loop import permutation, seed_of
from trueward.train.reward import RewardConfig
from trueward.train.run_folder import (
    RunFolder,
    environment,
    finished_summary,
    keep_config,
    to_plain,
    write_text,
)

console = main_console()
FIRST = "first"  # the row that is refined, and that all others are compared with
_ANSWER_TOKENS = 128  # of an answer's beginning: what clusters are made of


@dataclass(frozen=True, kw_only=True)
class RefinementMethod:
    """A row of the table: how the reward that chooses was made."""

    label: str = ""  # as the table names it; empty: its key
    # `first` is trained on the preferences alone; gold, random and length are what they say.
    method: RefineMethod | Literal["first", "gold", "random", "length"] = "first"
    members: int = 1  # several: a deep ensemble, each member refined
    # Name of another row whose trained reward this one asks, with an objective of its own.
    shares: str = ""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    epochs_scale: float = 1.0  # training this many times as long: the control at equal cost
    spg: SPGConfig = field(default_factory=lambda: SPGConfig(progress=False))
    uml: MultiViewConfig = field(default_factory=MultiViewConfig)

    def __post_init__(self) -> None:
        if self.members < 1:
            raise ValueError(f"members must be at least 1, got {self.members}.")
        refined: list[RefineMethod] = [name for name in METHODS if name == self.method]
        if refined:
            require_own_options(self.spg, self.uml, refined)
        equivalence = (self.spg.equivalence, self.spg.routes, self.spg.level)
        if equivalence != (SPGConfig().equivalence, {}, SPGConfig().level):
            raise ValueError(
                "Recorded answers are clustered by the encoder: leave spg.equivalence, spg.routes "
                "and spg.level out, and set level (of all rows) or spg.threshold."
            )
        if self.method == "rlaif":
            raise ValueError(
                "RLAIF asks the policy which answer is better, and of a recorded policy there is "
                "nobody to ask: leave the row out."
            )


@dataclass(frozen=True, kw_only=True)
class RefinementsConfig:
    """Which rewards are refined on which samples, over how many folds and seeds.

    Rows come from a file: `trueward refinements --config recipes/refine_recorded.yaml`.
    """

    output_dir: str = "runs/refinements"
    title: str = "Rewards refined on recorded samples"
    preferences: str = ""  # file, folder or hub name: what the first reward learns from
    answers: list[str] = field(default_factory=list)  # JSONL: prompt, a list of answers, their gold
    completions: str = "completions"  # name of a column, as is the next
    gold: str = "gold"  # null where an answer has none: it is refined on and never chosen
    data_dir: str = ""  # folder that holds the data instead of the hub; also TRUEWARD_DATA
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"  # folder or hub id; kept frozen
    hidden_size: int = 256  # of the trunk on the encoder
    layers: int = 1  # of that trunk
    answer_tokens: int = 192  # an answer is cut behind so many; the prompt gets what is left
    methods: dict[str, RefinementMethod] = field(default_factory=dict)
    pairs: int = 5000  # preferences drawn, of all folds together; 0 = all
    prompts: int = 0  # recorded prompts in use, drawn once; 0 = all
    samples: int = 10  # answers to each prompt that refinement sees, drawn by the seed
    level: float = (
        0.5  # share of pairs of answers to one prompt that are less alike than equivalent
    )
    folds: int = 5
    seeds: int = 3
    first_seed: int = 0
    train: RewardConfig = field(default_factory=RewardConfig)
    processes: int = 0  # 0 = as many as there are cores

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}.")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}.")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2 to a prompt, got {self.samples}.")
        first = self.methods.get(FIRST)
        if self.methods and (
            first is None or first != replace(RefinementMethod(), label=first.label)
        ):
            raise ValueError(
                f"The methods need one called {FIRST!r} with nothing but a label: it is what is "
                "refined, and what the others are compared with."
            )
        if not 0 < self.level < 1:
            raise ValueError(f"level is a share of pairs in (0, 1), got {self.level}.")
        for name, method in self.methods.items():
            owner = self.methods.get(method.shares) if method.shares else None
            if method.shares and (owner is None or owner.shares or method.shares == name):
                raise ValueError(
                    f"methods.{name}.shares must name another row with a reward of its own, got "
                    f"{method.shares!r}."
                )
            if owner is not None and replace(
                method, shares="", label="", objective=ObjectiveConfig()
            ) != replace(owner, label="", objective=ObjectiveConfig()):
                raise ValueError(
                    f"methods.{name} shares the reward of {method.shares!r}: it must be the same "
                    "but for label and objective."
                )
        if self.answer_tokens >= self.train.max_length:
            raise ValueError(
                f"answer_tokens ({self.answer_tokens}) must leave room for the prompt in "
                f"train.max_length ({self.train.max_length})."
            )

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Every (seed, fold)."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [(seed, fold) for seed in seeds for fold in range(self.folds)]


def run_refinements(config: RefinementsConfig) -> dict[str, Any]:
    """Train and judge whatever is not finished, and write the report.

    Raises:
        DataError: There is nothing to compare, a file cannot be read, or a row failed.
    """
    if not config.methods or not config.preferences or not config.answers:
        raise DataError(
            "Refinements need methods, preferences and recorded answers: give them in a file, as "
            "recipes/refine_recorded.yaml does."
        )
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out):
        folder = RunFolder(out, command="refinements", config=config, free=MAY_CHANGE)
        for stale in ("summary.json", "failures.txt"):  # of a run before this one
            (out / stale).unlink(missing_ok=True)
        outcomes = run_tasks(_tasks(config), processes=config.processes, on_change=teller())
        failed = {name: o for name, o in outcomes.items() if o.state == "failed"}
        results = read_results(config)
        if any(row.values for row in results if row.name == FIRST):
            page = refinements_report(
                out,
                results,
                baseline=FIRST,
                controls=[n for n, m in config.methods.items() if m.method == "control"],
                title=config.title,
                config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
                environment=environment(),
            )
            console.print(f"Report: {page}", highlight=False)
        if failed:
            name, first = next(iter(failed.items()))
            traces = "\n\n".join(f"{n}\n{o.traceback}" for n, o in failed.items())
            write_text(out / "failures.txt", traces)
            raise DataError(
                f"{name} and {len(failed) - 1} more failed ({first.error.rstrip('.')}); "
                f"{out / 'failures.txt'} has the traces, and running it again tries them again."
            )
        metrics = {row.name: {"gold": row.estimate("gold").mean} for row in results}
        return folder.finish(metrics, seed=config.first_seed)


MAY_CHANGE = ("methods", "seeds", "processes", "title", "label", "data_dir")


def _tasks(config: RefinementsConfig) -> list[Task]:
    tasks = [Task(name="data", function=prepare, arguments=(config,))]
    for seed, fold in config.cells:
        at = f"seed-{seed}/fold-{fold}"
        for name, method in config.methods.items():
            needs = ["data"]
            if method.method in METHODS:
                needs += [f"{at}/{FIRST}"]
            if method.shares:
                needs += [f"{at}/{method.shares}"]
            arguments = (config, seed, fold, name)
            tasks.append(
                Task(
                    name=f"{at}/{name}", function=judge_row, arguments=arguments, needs=tuple(needs)
                )
            )
    return tasks


# --- data ---


class Recorded(NamedTuple):
    """One prompt with the policy's recorded answers."""

    prompt: Prompt
    answers: list[str]  # as the encoder reads them
    words: list[int]  # of each as it was written
    gold: list[float | None]


def fold_of(prompt: Prompt, folds: int) -> int:
    """Return the fold of a prompt, whatever stands around it."""
    digest = hashlib.sha256(f"fold {prompt_key(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % folds


def prepare(config: RefinementsConfig) -> None:
    """Read, cut and embed everything once."""
    out = Path(config.output_dir) / "data"
    run = RunFolder(out, command="refinements", config=_data_of(config))
    if finished_summary(out) is not None:
        return
    backbone, tokenizer = sentence_backbone(config.encoder, layers=0)
    backbone.load_embeddings(Path(config.output_dir) / "embeddings")
    model = RewardModel.from_backbone(backbone, tokenizer, max_length=config.train.max_length)
    cut = _Cutter(tokenizer, answer=config.answer_tokens, length=config.train.max_length)
    counts = {"pairs left out": 0, "prompts left out": 0}
    recorded = _read_answers(config, cut, counts)
    loaded = load_preferences(config.preferences, data_dir=config.data_dir or None)
    order = permutation(len(loaded.rows), "refinements", "pairs")[: config.pairs or None]
    kept: list[dict[str, Any]] = []
    for row in (loaded.rows[i] for i in order):
        chosen, rejected = cut.answer(text_of(row.chosen)), cut.answer(text_of(row.rejected))
        if chosen != rejected and chosen.strip() and rejected.strip():
            sides = {"chosen": chosen, "rejected": rejected}
            # Without a margin: one in the source says how sure a judge was, on a scale of its own.
            kept.append({"prompt": cut.prompt(row.prompt), **sides})
        else:
            counts["pairs left out"] += 1  # equal or blank once they are cut
    write_jsonl(out / "preferences.jsonl", [_as_turns(row) for row in kept])
    write_jsonl(out / "answers.jsonl", [r._asdict() for r in recorded])
    pairs: list[tuple[Prompt, Completion]] = [
        (r["prompt"], r[side]) for r in kept for side in ("chosen", "rejected")
    ]
    texts = [*pairs, *((r.prompt, a) for r in recorded for a in r.answers)]
    embed = sentence_embedding(backbone, tokenizer, max_length=_ANSWER_TOKENS)
    with tqdm(total=len(texts), desc="embedding", unit="text", disable=None) as bar:
        for start in range(0, len(texts), 256):
            some = texts[start : start + 256]
            model.score([p for p, _ in some], [c for _, c in some])
            if start >= len(pairs):  # answers stand alone too: clusters are made of them
                embed([text_of(c) for _, c in some])
            bar.update(len(some))
            backbone.save_embeddings(Path(config.output_dir) / "embeddings", name="all")
    console.print(
        f"{loaded.report.summary()} {len(kept)} pairs in use, {counts['pairs left out']} equal or "
        f"blank after the cut; {len(recorded)} prompts in use, {counts['prompts left out']} with "
        "fewer than two judged answers or the same as another after the cut.",
        highlight=False,
    )
    run.finish({"pairs": len(kept), "prompts": len(recorded), **counts}, seed=0)


def _data_of(config: RefinementsConfig) -> dict[str, Any]:
    """Return what the data hang on."""
    names = ["preferences", "answers", "completions", "gold", "encoder", "answer_tokens"]
    names += ["pairs", "prompts"]
    return {name: getattr(config, name) for name in names} | {"length": config.train.max_length}


def _as_turns(row: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(row["prompt"], str):
        return dict(row)
    sides = {s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")}
    return dict(row) | sides


def _read_answers(
    config: RefinementsConfig, cut: "_Cutter", counts: dict[str, int]
) -> list[Recorded]:
    """Read recorded answers; blank ones, and prompts with fewer than two of gold, are left out.

    Raises:
        DataError: A row lacks a column, or its lists differ in length.
    """
    found: dict[str, Recorded] = {}
    for source in config.answers:
        place = resolve_source(source, data_dir=config.data_dir or None)
        for _, records in record_streams(place):
            for where, row in records:
                if isinstance(row, BrokenRecord):
                    raise DataError(f"{where} is {row.kind}: {row.detail}.")
                if not isinstance(row, dict):
                    raise DataError(f"{where} must hold an object, got {json_type(row)}.")
                answers, gold = row.get(config.completions), row.get(config.gold)
                if "prompt" not in row or not isinstance(answers, list):
                    raise DataError(f"{where}: needs 'prompt' and the list '{config.completions}'.")
                if not isinstance(gold, list) or len(gold) != len(answers):
                    raise DataError(
                        f"{where}: '{config.gold}' must be a list with one number, or null, for "
                        f"each of {len(answers)} answers."
                    )
                texts = [cut.answer(text_of(a)) for a in answers]
                usable = [i for i, text in enumerate(texts) if text.strip()]
                kept = Recorded(
                    cut.prompt(row["prompt"]),
                    [texts[i] for i in usable],
                    [len(text_of(answers[i]).split()) for i in usable],
                    [gold[i] for i in usable],
                )
                judged = sum(g is not None for g in kept.gold) >= 2
                if judged and prompt_key(kept.prompt) not in found:
                    found[prompt_key(kept.prompt)] = kept
                else:
                    counts["prompts left out"] += 1
    keys = list(found)
    order = permutation(len(keys), "refinements", "prompts")[: config.prompts or None]
    return [found[keys[i]] for i in sorted(order)]


class _Cutter:
    """Cuts texts to what the encoder reads, so that a text has the same ids wherever it stands."""

    def __init__(self, tokenizer: Any, *, answer: int, length: int) -> None:
        self.tokenizer = tokenizer
        self.answer_tokens = answer
        self.prompt_tokens = max(1, length - answer - 16)  # of roles and special tokens

    def answer(self, text: str) -> str:
        """Return the beginning of an answer."""
        spans = self._spans(text)
        return (
            text if len(spans) <= self.answer_tokens else text[: spans[self.answer_tokens - 1][1]]
        )

    def prompt(self, prompt: Prompt) -> Prompt:
        """Return the end of a prompt of one turn, as reward models read a long one."""
        if not isinstance(prompt, str) and len(prompt) > 1:
            return prompt
        text = text_of(prompt)
        spans = self._spans(text)
        if len(spans) <= self.prompt_tokens:
            return prompt
        end = text[spans[-self.prompt_tokens][0] :]
        return end if isinstance(prompt, str) else [dict(prompt[0], content=end)]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        spans: list[tuple[int, int]] = found["offset_mapping"]
        return spans


class Fold(NamedTuple):
    """What a fold's rewards may see, and what they are asked afterwards."""

    training: list[PreferenceRow]
    held_out: list[PreferenceRow]
    samples: list[tuple[Prompt, list[str]]]  # of the training prompts, without labels
    asked: list[Recorded]  # the fold's own prompts, with judged answers alone


def read_fold(config: RefinementsConfig, seed: int, fold: int) -> Fold:
    """Part the data by prompt; draw the samples that refinement sees."""
    out = Path(config.output_dir) / "data"
    rows = load_preferences(out / "preferences.jsonl").rows
    apart = [fold_of(row.prompt, config.folds) == fold for row in rows]
    samples, asked = [], []
    for _, raw in read_jsonl(out / "answers.jsonl"):
        row = Recorded(**raw)
        if fold_of(row.prompt, config.folds) != fold:
            # Shuffled: an answer's place in the file is not without meaning.
            order = permutation(len(row.answers), seed, "samples", prompt_key(row.prompt))
            samples.append((row.prompt, [row.answers[i] for i in order[: config.samples]]))
            continue
        judged = [i for i, g in enumerate(row.gold) if g is not None]
        asked.append(
            Recorded(
                row.prompt,
                [row.answers[i] for i in judged],
                [row.words[i] for i in judged],
                [row.gold[i] for i in judged],
            )
        )
    if not asked or not samples:
        raise DataError(
            f"Fold {fold} of {config.folds} is empty: give more prompts or fewer folds."
        )
    return Fold(
        [r for r, a in zip(rows, apart, strict=True) if not a],
        [r for r, a in zip(rows, apart, strict=True) if a],
        samples,
        asked,
    )


# --- rows ---


def row_folder(config: RefinementsConfig, seed: int, fold: int, name: str) -> Path:
    """Where a row writes for a seed and fold."""
    return Path(config.output_dir) / f"seed-{seed}" / f"fold-{fold}" / name


def judge_row(config: RefinementsConfig, seed: int, fold: int, name: str) -> None:
    """Make one row's reward in one fold, let it choose, and write what gold says of its choices."""
    method = config.methods[name]
    folder = row_folder(config, seed, fold, name)
    keep_config(folder / "row.yaml", to_plain({"method": replace(method, label="")}))
    if (folder / "result.json").exists():
        return
    data = read_fold(config, seed, fold)
    prompts = [r.prompt for r in data.asked for _ in r.answers]
    answers: list[Completion] = [a for r in data.asked for a in r.answers]
    objective, found = method.objective.build(), {}
    if method.method == "gold":
        proxy = torch.tensor([float(g or 0) for r in data.asked for g in r.gold])
    elif method.method == "random":
        proxy = random_reward(prompts, answers, seed=seed_of(seed, fold))
    elif method.method == "length":
        proxy = torch.tensor([float(w) for r in data.asked for w in r.words])
    else:
        reward = _remembering(config, make_reward(config, seed, fold, method.shares or name, data))
        posterior_of = posterior_function(reward)
        proxy = objective(posterior_of(prompts, answers))
        measured = evaluate_preferences(posterior_of, data.held_out, objective=objective)
        found["pair accuracy"] = measured["accuracy"]
    result = {"numbers": found, "by_prompt": choices(data.asked, proxy)}
    write_text(folder / "result.json", json.dumps(result))


def make_reward(config: RefinementsConfig, seed: int, fold: int, name: str, data: Fold) -> Reward:
    """Train the first reward of a fold, or refine it."""
    method, folder = config.methods[name], row_folder(config, seed, fold, name)
    train = replace(
        config.train,
        # The control differs from the first reward in its seed alone; all refined ones share one.
        seed=seed_of(seed, fold, "first" if method.method == "first" else "refined") % 2**31,
        epochs=config.train.epochs * method.epochs_scale,
        progress=False,
    )
    family = FamilyConfig(family="deep", members=method.members) if method.members > 1 else None

    def make(**options: Any) -> RewardModel:
        own: dict[str, Any] = {"max_length": config.train.max_length, **options}
        backbone, tokenizer = sentence_backbone(
            config.encoder,
            hidden_size=config.hidden_size,
            layers=config.layers,
            seed=own.get("seed", 0),
        )
        _share(config, backbone)
        return RewardModel.from_backbone(backbone, tokenizer, **own)

    if method.method not in METHODS:
        return train_family(
            make, data.training, family or FamilyConfig(), train, output_dir=folder / "reward"
        )
    first = _remembering(config, load_family(row_folder(config, seed, fold, FIRST) / "reward"))
    return refine_reward(
        method.method,
        make,
        data.training,
        data.samples,
        rewards=rewards_of(first, objectives.mean),
        train=train,
        output_dir=folder / "reward",
        family=family,
        spg=method.spg,
        uml=method.uml,
        equivalent=_equivalence(config, method.spg, data.samples),
        pairs_dir=folder / "preferences",
    )


def _equivalence(
    config: RefinementsConfig, spg: SPGConfig, samples: Sequence[tuple[Prompt, list[str]]]
) -> EmbeddingEquivalence:
    """Answers say the same where they are closer than `level` of all answers to one prompt are.

    An encoder of topics puts all answers to a prompt closer together than those to two prompts, so
    that the threshold of unrelated texts would see one cluster everywhere.
    """
    backbone, tokenizer = sentence_backbone(config.encoder, layers=0)
    _share(config, backbone)
    embed = sentence_embedding(backbone, tokenizer, max_length=_ANSWER_TOKENS)
    threshold = spg.threshold
    if threshold is None:
        threshold = related_threshold(embed, [a for _, a in samples], level=config.level)
    return EmbeddingEquivalence(embed, threshold=threshold)


def choices(asked: Sequence[Recorded], proxy: Float[Tensor, " answer"]) -> dict[str, list[Any]]:
    """Return for each prompt what the proxy's choice is worth, and how it orders the answers.

    Keys: `key` of the prompt; `gold` and `length` (words) of the choice among all judged answers,
    tied ones sharing it; `gold of N` in the mean over all subsets of N answers (null for prompts
    with fewer); `agreement`, the share of pairs of answers ordered as gold does (null where no pair
    differs).
    """
    found: dict[str, list[Any]] = {"key": [prompt_key(r.prompt) for r in asked]}
    grid = best_of_n_sizes(max(len(r.answers) for r in asked))
    at = 0
    for row in asked:
        own = proxy[at : at + len(row.answers)].double()[None]
        at += len(row.answers)
        gold = torch.tensor([row.gold], dtype=torch.float64)
        words = torch.tensor([row.words], dtype=torch.float64)
        ns = [*(n for n in grid if n < len(row.answers)), len(row.answers)]
        curve = best_of_n_curves_per_prompt(own, gold, ns)[0].tolist()
        length = best_of_n_curves_per_prompt(own, words, ns)[0].tolist()
        told = agreement(own, gold)
        found.setdefault("gold", []).append(curve[-1])
        found.setdefault("length", []).append(length[-1])
        found.setdefault("agreement", []).append(None if math.isnan(told) else told)
        by_n = dict(zip(ns, curve, strict=True))
        for n in grid:
            found.setdefault(f"gold of {n}", []).append(by_n.get(n))
    return found


# --- embeddings ---

_KNOWN: dict[str, dict[tuple[int, ...], Tensor]] = {}  # by store, within a process


def _share(config: RefinementsConfig, backbone: SentenceBackbone) -> None:
    """Let a backbone look up what was embedded, which a process reads once."""
    store = Path(config.output_dir) / "embeddings"
    if str(store) not in _KNOWN:
        backbone.load_embeddings(store)
        _KNOWN[str(store)] = backbone.embeddings
    backbone.embeddings = _KNOWN[str(store)]


def _remembering(config: RefinementsConfig, reward: Reward) -> Reward:
    models = [reward] if isinstance(reward, RewardModel) else reward
    assert isinstance(models, Sequence)
    for model in models:
        assert isinstance(model.backbone, SentenceBackbone)
        _share(config, model.backbone)
    return reward


# --- results ---


def read_results(config: RefinementsConfig) -> list[RefinementRuns]:
    """Return every row with what is finished, in the configuration's order."""
    found = []
    for name, method in config.methods.items():
        values: dict[int, dict[str, dict[str, float]]] = {}
        numbers: dict[int, dict[int, dict[str, float]]] = {}
        made: dict[str, list[float]] = {}
        for seed, fold in config.cells:
            file = row_folder(config, seed, fold, name) / "result.json"
            if not file.exists():
                continue
            result = json.loads(file.read_text("utf-8"))
            by_prompt = result["by_prompt"]
            keys = by_prompt.pop("key")
            for column, cells in by_prompt.items():
                own = values.setdefault(seed, {}).setdefault(column, {})
                own |= {k: v for k, v in zip(keys, cells, strict=True) if v is not None}
            numbers.setdefault(seed, {})[fold] = result["numbers"]
            pairs = finished_summary(file.parent / "preferences")
            for key in ("accepted", "prompts", "chosen_longer"):
                if pairs is not None and isinstance(pairs["metrics"].get(key), int | float):
                    made.setdefault(key, []).append(float(pairs["metrics"][key]))
        found.append(
            RefinementRuns(
                name=name,
                label=method.label or name,
                values=values,
                numbers=numbers,
                made={key: sum(v) / len(v) for key, v in made.items()},
            )
        )
    return found
