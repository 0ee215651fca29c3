"""Gao et al.'s protocol on real text: the gold reward is a reward model of real preferences.

A gold reward model learns from all the real preferences, with a stronger body than the proxies';
the reference policy learns from demonstrations, and the gold model labels pairs of its answers.
Proxies learn from these labels, policies are optimised against the proxies, and the gold model
tells what became of them. Gao et al. 2022 (https://arxiv.org/abs/2210.10760); labels flipped once
for all members as in Coste et al. 2023 (https://arxiv.org/abs/2310.02743).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import load_demonstrations, load_preferences, load_prompts
from trueward.data.rows import (
    Completion,
    DemonstrationRow,
    Loaded,
    LoadReport,
    PreferenceRow,
    Prompt,
    PromptRow,
    as_turn,
    split_by_prompt,
    text_of,
)
from trueward.data.sources import DataError, read_jsonl, write_jsonl
from trueward.data.tokens import prompt_ids
from trueward.evaluate.calibration import spearman
from trueward.lab.worlds import Annotator, answers_of, words_of
from trueward.models.policy import Policy
from trueward.models.reward_model import OverlongError, RewardModel
from trueward.models.scratch import ALPACA_CHAT_TEMPLATE, ModelSource, load_policy
from trueward.pipeline import evaluate_on
from trueward.refine.equivalence import Equivalence
from trueward.refine.spg import SPGConfig
from trueward.train.loop import permutation
from trueward.train.reward import RewardConfig, train_reward
from trueward.train.run_folder import RunFolder, finished_summary, write_text
from trueward.train.sft import SFTConfig, train_sft

logger = logging.getLogger(__name__)
_REFERENCE_PROMPTS = 128  # with two answers each: the sample on which gold has mean 0 and std 1


@dataclass(frozen=True, kw_only=True)
class GoldModelWorld:
    """A world whose gold reward is a reward model of real preferences.

    All seeds share the reference policy and the gold model. What a seed varies is the prompts and
    answers that are compared, the flipped labels, the reward models and the optimisation, so
    intervals over seeds do not cover another SFT run or another gold model.
    """

    demonstrations: str = ""  # for the reference policy: file, folder, or name under data_dir
    demonstrations_count: int = 0  # the first ones of the source; 0 = all
    prompts: str = ""  # what is asked of the policies; empty = the prompts of `demonstrations`
    prompts_count: int = 0  # the first ones of the source; 0 = all
    preferences: dict[str, str] = field(default_factory=dict)  # name -> source; gold learns all
    preferences_count: int = 0  # drawn at random from each source; 0 = all
    data_dir: str = ""  # folder of the named sources; also TRUEWARD_DATA
    held_out: float = 0.1  # share of the prompts, and of the preferences', kept for evaluation
    policy: ModelSource = field(default_factory=ModelSource)
    gold_backbone: ModelSource = field(
        default_factory=lambda: ModelSource(hidden_size=384, layers=6, heads=6)
    )  # a path may be a language model's or an encoder's
    sft: SFTConfig = field(
        default_factory=lambda: SFTConfig(learning_rate=1e-3, batch_size=64, max_length=256)
    )  # of the reference policy, and of a new gold backbone before it learns preferences
    gold: RewardConfig = field(default_factory=lambda: RewardConfig(learning_rate=2e-4))
    max_prompt_tokens: int = 256  # of the policy's; longer prompts are left out and reported
    max_new_tokens: int = 48  # of an answer
    annotator: Annotator = field(default_factory=Annotator)  # compares by gold, 25 % flipped
    seed: int = 0  # of the shared models, splits and draws

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share in (0, 1), got {self.held_out}.")
        for name in ("demonstrations_count", "prompts_count", "preferences_count"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (all), got {getattr(self, name)}.")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def build_shared(self, folder: Path) -> None:
        """Train the reference policy and the gold model; what is finished is not trained again.

        Leaves `reference/`, `prompts/`, `gold_language_model/` (of a new gold backbone) and
        `gold/`, with `gold/evaluation.json`: see `gold_metrics`. Rows that were not used are
        listed in each folder's `data.txt`.

        Raises:
            DataError: A source is missing or holds too little, or the folder is of other dials.
        """
        run = RunFolder(folder / "prompts", command="gold_model", config=self)
        if finished_summary(folder / "gold") is not None:  # the last of them
            return
        data = load_world_data(self)
        policy = _language_model(self, self.policy, data, folder / "reference")
        training = _world_prompts(self, policy, data, run)
        body = self.gold_backbone.path
        if not body:
            body = str(folder / "gold_language_model" / "model")
            _language_model(self, self.gold_backbone, data, folder / "gold_language_model")
        _train_gold(self, body, policy, training, data, folder / "gold")

    def build(self, shared: Path, folder: Path, *, seed: int) -> None:
        """Nothing is a seed's own: seeds vary comparisons, rewards and optimisation, not SFT."""

    def open(self, shared: Path, folder: Path) -> "OpenGoldModel":  # noqa: ARG002
        """Return the world that `build_shared` left; models are read once in a process."""
        if finished_summary(shared / "gold") is None:
            raise DataError(f"{shared} holds no finished gold model: run build_shared there first.")
        # A folder that was removed and built again has another time: no stale models.
        built = _read(shared.resolve(), (shared / "gold" / "summary.json").stat().st_mtime_ns)
        return OpenGoldModel(dials=self, built=built)


class Built(NamedTuple):
    """What `build_shared` left, read."""

    policy: Policy
    gold_model: RewardModel
    training: list[Prompt]
    held_out: list[Prompt]


@dataclass(frozen=True, kw_only=True)
class OpenGoldModel:
    """The world with its models: a `lab.worlds.LanguageWorld`."""

    dials: GoldModelWorld
    built: Built

    @property
    def policy(self) -> Policy:
        """The reference policy."""
        return self.built.policy

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return self.dials.max_new_tokens

    def prompts(self, count: int, *, seed: int, held_out: bool = False) -> list[Prompt]:
        """Draw prompts without replacement, from those kept for evaluation or from the others.

        Raises:
            ValueError: More are asked for than there are.
        """
        some = self.built.held_out if held_out else self.built.training
        kind = "held-out" if held_out else "training"
        if count > len(some):
            raise ValueError(
                f"{count} {kind} prompts are asked for and there are {len(some)}: ask for fewer, "
                "or raise gold_model.prompts_count" + (" or held_out." if held_out else ".")
            )
        return [some[i] for i in permutation(len(some), seed, kind)[:count]]

    def answers(self, prompts: Sequence[Prompt], *, n: int, seed: int) -> list[list[Completion]]:
        """Return n answers of the reference policy to each prompt."""
        return answers_of(self.policy, prompts, n=n, max_new_tokens=self.max_new_tokens, seed=seed)

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return the gold model's scores, in standard deviations of the reference's answers.

        Of an answer longer than the gold model's context the beginning that fits is scored.
        """
        model = self.built.gold_model
        try:
            return model.score(prompts, completions, normalise=True).mean
        except OverlongError:
            pairs = zip(prompts, completions, strict=True)
            fitting = [beginning_that_fits(model, p, c) for p, c in pairs]
            return model.score(prompts, fitting, normalise=True).mean

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], *, seed: int
    ) -> list[PreferenceRow]:
        """Return what the annotator, who goes by the gold model, says; as conversations."""
        flat = self.gold(
            [p for p, some in zip(prompts, answers, strict=True) for _ in some],
            [a for some in answers for a in some],
        )
        utilities = [part.tolist() for part in flat.split([len(some) for some in answers])]
        rows = self.dials.annotator.compare(prompts, answers, utilities, seed=seed)
        # A file's row must keep to one form, and these prompts are messages.
        return [
            replace(
                row,
                prompt=as_turn(row.prompt, "user"),
                chosen=as_turn(row.chosen, "assistant"),
                rejected=as_turn(row.rejected, "assistant"),
            )
            for row in rows
        ]

    def equivalence(self, answers: Sequence[Sequence[str]]) -> Equivalence:
        """Return whether two answers' mean states in the reference policy are close.

        Close is what 95 % of unrelated answers (the first to each prompt) are not.
        """
        return SPGConfig(equivalence="policy_states").build(self.policy, answers)


# --- stages ---


class WorldData(NamedTuple):
    """All rows of the world, with the reports on what was left out."""

    demonstrations: Loaded[DemonstrationRow]
    prompts: Loaded[PromptRow]
    preferences: dict[str, list[PreferenceRow]]  # for training the gold model
    held_out: dict[str, list[PreferenceRow]]  # for its evaluation
    reports: list[LoadReport]  # on the preferences


def load_world_data(world: GoldModelWorld) -> WorldData:
    """Load every source before anything is trained.

    Demonstrations of held-out prompts are left out. Preferences are split by prompt, all sources
    alike.

    Raises:
        DataError: A source is missing, or too small for both sides of the split.
    """
    if not world.demonstrations or not world.preferences:
        missing = "preferences" if world.demonstrations else "demonstrations"
        raise DataError(
            f"gold_model.{missing} names no data: give a file, a folder, or a name under "
            "gold_model.data_dir."
        )
    common: dict[str, Any] = {"data_dir": world.data_dir or None, "conversational": True}
    split: dict[str, Any] = {"fraction": world.held_out, "seed": world.seed}
    demonstrations = load_demonstrations(
        world.demonstrations, max_rows=world.demonstrations_count or None, **common
    )
    kept, others = split_by_prompt(demonstrations.rows, **split)
    for row in others:
        demonstrations.report.add("held out", row.where, "its prompt is kept for evaluation")
    prompts = load_prompts(
        world.prompts or world.demonstrations, max_rows=world.prompts_count or None, **common
    )
    training: dict[str, list[PreferenceRow]] = {}
    held_out: dict[str, list[PreferenceRow]] = {}
    reports = []
    for name, source in world.preferences.items():
        loaded = load_preferences(source, **common)
        rows = loaded.rows
        if 0 < world.preferences_count < len(rows):
            # At random, because files often hold a prompt's many pairs in a row.
            order = permutation(len(rows), world.seed, "preferences", name)
            rows = [rows[i] for i in order[: world.preferences_count]]
            loaded.report.source += f" ({len(rows):,} of the usable rows are drawn)"
        training[name], held_out[name] = split_by_prompt(rows, **split)
        reports.append(loaded.report)
    sides = {"training": training, "held-out": held_out}
    for side, found in sides.items():
        if not any(found.values()):
            raise DataError(
                f"Of the preferences ({', '.join(world.preferences.values())}) no {side} pair is "
                f"left at held_out={world.held_out:g}: give more, or another share."
            )
    usable = Loaded(kept, demonstrations.report)
    return WorldData(usable, prompts, training, held_out, reports)


def _language_model(
    world: GoldModelWorld, source: ModelSource, data: WorldData, out: Path
) -> Policy:
    """Train a language model on the demonstrations."""
    rows, loaded = data.demonstrations.rows, data.demonstrations.report
    if not rows:
        raise DataError(f"No demonstration is left: {loaded.summary()}")
    if finished_summary(out) is None:
        texts = (text_of(t) for row in rows for t in (row.prompt, row.completion))
        model = load_policy(source, texts, seed=world.seed)
        _require_room(world, model)
        _ensure_template(model.tokenizer)
        report = LoadReport("demonstrations", read=len(rows))

        def write_report(_: Policy) -> dict[str, float]:
            _write_reports(out, [loaded, report])
            return {}

        train_sft(
            model,
            rows,
            replace(world.sft, seed=world.seed, progress=False),
            output_dir=out,
            report=report,
            evaluation=write_report,
        )
    return Policy.from_pretrained(out / "model")


def _require_room(world: GoldModelWorld, model: Policy) -> None:
    if world.max_prompt_tokens + world.max_new_tokens > model.max_length:
        raise DataError(
            f"gold_model.max_prompt_tokens={world.max_prompt_tokens} and max_new_tokens="
            f"{world.max_new_tokens} are more than the {model.max_length} tokens that the model "
            "reads: lower one of them."
        )


def _world_prompts(
    world: GoldModelWorld, policy: Policy, data: WorldData, run: RunFolder
) -> list[Prompt]:
    """Write the prompts of both sides; return those for training."""
    assert run.path is not None
    rows, report = data.prompts.rows, data.prompts.report
    if finished_summary(run.path) is None:
        fitting = []
        for row in rows:
            length = len(prompt_ids(policy.tokenizer, row.prompt))
            if length <= world.max_prompt_tokens:
                fitting.append(row)
            else:
                detail = f"the prompt has {length} tokens of {world.max_prompt_tokens}"
                report.add("over-long", row.where, detail)
        training, held_out = split_by_prompt(fitting, fraction=world.held_out, seed=world.seed)
        if not training or not held_out:
            raise DataError(
                f"Of {len(fitting)} usable prompts {len(training)} are for training and "
                f"{len(held_out)} are held out: give more, or another gold_model.held_out."
            )
        for name, side in (("training", training), ("held_out", held_out)):
            write_jsonl(run.path / f"{name}.jsonl", [{"prompt": row.prompt} for row in side])
        _write_reports(run.path, [report])
        run.finish({"training": len(training), "held_out": len(held_out)}, seed=world.seed)
    return _read_prompts(run.path / "training.jsonl")


def _train_gold(
    world: GoldModelWorld,
    body: str,
    policy: Policy,
    training: Sequence[Prompt],
    data: WorldData,
    out: Path,
) -> None:
    """Train the gold model from a body on all preferences, and measure it."""
    model = RewardModel.from_backbone(
        body,
        lora_rank=world.gold_backbone.lora_rank,
        max_length=world.gold.max_length,
        seed=world.seed,
    )
    _ensure_template(model.tokenizer)
    model.facts = {"training data": ", ".join(world.preferences.values()), "stage": "gold"}
    prompts = [p for p in training[:_REFERENCE_PROMPTS] for _ in range(2)]
    drawn = answers_of(
        policy,
        training[:_REFERENCE_PROMPTS],
        n=2,
        max_new_tokens=world.max_new_tokens,
        seed=world.seed,
    )
    answers = [a for some in drawn for a in some]
    pairs = [row for rows in data.preferences.values() for row in rows]
    report = LoadReport("preference pairs", read=len(pairs))

    def evaluation(trained: RewardModel) -> dict[str, float]:
        metrics = gold_metrics(trained, data.held_out, prompts, answers)
        # Before the summary, whose presence says that all is there.
        write_text(out / "evaluation.json", json.dumps(metrics, indent=2))
        _write_reports(out, [*data.reports, report])
        return metrics

    train_reward(
        model,
        pairs,
        replace(world.gold, seed=world.seed, progress=False),
        output_dir=out,
        report=report,
        evaluation=evaluation,
        reference=(prompts, answers),
    )


def gold_metrics(
    model: RewardModel,
    held_out: dict[str, list[PreferenceRow]],
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
) -> dict[str, float]:
    """Return how good a gold model is, and how far it measures length alone.

    Args:
        model: The gold model.
        held_out: Real preferences by source, that it has not learned from.
        prompts: One for each answer.
        answers: Of the reference policy.

    Returns:
        `NAME/accuracy`, its Wilson interval `NAME/accuracy_low` and `NAME/accuracy_high`, the
        accuracy of the longer answer `NAME/accuracy_longer`, and what else `evaluate_preferences`
        measures, for each source and for `all` of them; `NAME/overlong` pairs are left out.
        `reference/length_spearman`: rank correlation of the score with the words of an answer.
    """
    pooled = [row for rows in held_out.values() for row in rows]
    metrics = evaluate_on(model, {**held_out, "all": pooled})
    fits = [i for i, p in enumerate(prompts) if model.fits(p, answers[i])]
    scores = model.score([prompts[i] for i in fits], [answers[i] for i in fits]).mean
    words = torch.tensor([float(words_of(answers[i])) for i in fits])
    if scores.unique().numel() > 1 and words.unique().numel() > 1:
        metrics["reference/length_spearman"] = spearman(scores, words)
    if metrics.get("all/accuracy_low", 0.0) <= metrics.get("all/accuracy_longer", 1.0):
        logger.warning(
            "The gold model is right in %.1f %% of the held-out preferences, choosing the longer "
            "answer in %.1f %%: it may know little but length.",
            100 * metrics.get("all/accuracy", 0.0),
            100 * metrics.get("all/accuracy_longer", 0.0),
        )
    return metrics


def beginning_that_fits(model: RewardModel, prompt: Prompt, completion: Completion) -> Completion:
    """Return a completion, its text cut at the end by quarters until it fits a model's context."""
    while text_of(completion) and not model.fits(prompt, completion):
        text = text_of(completion)
        completion = text[: len(text) * 3 // 4]
    return completion


def _ensure_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template (a pretrained encoder's, say) a plain one."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = ALPACA_CHAT_TEMPLATE


def _write_reports(out: Path, reports: Sequence[LoadReport]) -> None:
    write_text(out / "data.txt", "\n\n".join(r.summary(limit=20) for r in reports) + "\n")


def _read_prompts(file: Path) -> list[Prompt]:
    return [row["prompt"] for _, row in read_jsonl(file)]


@lru_cache(maxsize=2)
def _read(shared: Path, built_at: int) -> Built:  # noqa: ARG001  (part of the cache's key)
    return Built(
        Policy.from_pretrained(shared / "reference" / "model"),
        RewardModel.from_pretrained(shared / "gold" / "model"),
        _read_prompts(shared / "prompts" / "training.jsonl"),
        _read_prompts(shared / "prompts" / "held_out.jsonl"),
    )
