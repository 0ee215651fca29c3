"""The recorded world: answers and gold scores that stand in a file, and best-of-n among them.

The policy was sampled and its answers judged once, by people, a judge or a large reward model;
nothing new is written here. What a reward picks from n answers, and what gold says of the pick, is
exact over all subsets of the recorded answers.
"""

import hashlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.rows import (
    Completion,
    LoadReport,
    PreferenceRow,
    Prompt,
    as_turn,
    canonical,
    prompt_key,
    text_of,
)
from trueward.data.sources import (
    BrokenRecord,
    DataError,
    json_type,
    record_streams,
    resolve_source,
)
from trueward.evaluate.comparison import SeedRun
from trueward.evaluate.overoptimization import (
    best_of_n_curves_per_prompt,
    best_of_n_kl,
    best_of_n_sizes,
)
from trueward.lab.controls import length_reward, random_reward
from trueward.lab.methods import Method
from trueward.lab.worlds import Annotator, words_of
from trueward.models.reward_function import posterior_function
from trueward.models.reward_model import OverlongError, RewardModel
from trueward.posterior import RewardPosterior
from trueward.train.loop import seed_of

# Scores of reward models by folder, its last change, and the texts: the methods of a comparison
# ask for the same ones, and scoring is what takes long.
_SCORED: dict[tuple[str, int, str], RewardPosterior] = {}


@dataclass(frozen=True, kw_only=True)
class RecordedWorld:
    """Where the answers are, what the columns are called, and whose reward picks.

    Each row holds a prompt, a list of completions, and a list with the gold score of each
    completion, null where there is none. What `trueward sample` and `trueward score` write fits,
    with a gold column beside it and `scores=members`. A set of another make names its columns: the
    16 answers of Tulu-2 to each AlpacaFarm prompt, of which GPT-4 judged the first 11, are read
    with `gold=gpt4_preference_vs_reference`.
    """

    file: str = ""  # a file, a folder, or a name as for preferences
    prompt: str = "prompt"  # name of a column, as are the next two
    completions: str = "completions"
    gold: str = "gold"
    # Columns of proxy scores: a number for each completion (one member) or a list (several).
    scores: list[str] = field(default_factory=list)
    # Or folders of reward models, the members in order; {seed} stands for the cell's seed.
    reward_models: list[str] = field(default_factory=list)
    min_answers: int = 2  # prompts with fewer usable answers are left out, and listed
    annotator: Annotator = field(default_factory=lambda: Annotator(label_noise=0.0))

    def __post_init__(self) -> None:
        if self.scores and self.reward_models:
            raise ValueError(
                f"Proxy rewards come from scores ({', '.join(self.scores)}) or from reward_models "
                f"({', '.join(self.reward_models)}), not from both: leave one of them out."
            )
        if self.min_answers < 2:
            raise ValueError(f"min_answers must be at least 2, got {self.min_answers}.")

    def open(self, *, seed: int) -> "Recordings":
        """Read the file.

        Raises:
            DataError: A row lacks a column, its lists differ in length, or too little is left.
        """
        if not self.file:
            raise DataError("The recorded world needs its file: give the answers' JSONL as `file`.")
        report = LoadReport(self.file)
        rows, left_out = _read(self, report)
        if len(rows) < 2:
            raise DataError(
                f"A recorded world needs at least 2 prompts with {self.min_answers} usable "
                f"answers each, got {len(rows)} of {report.summary()}"
            )
        return Recordings(world=self, seed=seed, rows=rows, load_report=report, left_out=left_out)


@dataclass(frozen=True)
class Recording:
    """One prompt with its usable answers."""

    prompt: Prompt
    completions: list[Completion]
    gold: list[float]
    scores: list[list[float]]  # of each completion, by member; without scores, empty lists
    where: str  # file and line


@dataclass(frozen=True, kw_only=True, eq=False)
class Recordings:
    """The recorded world, opened for one seed; gold in its own units."""

    world: RecordedWorld
    seed: int
    rows: list[Recording]
    load_report: LoadReport
    left_out: int  # answers without gold or without a score

    @property
    def largest_n(self) -> int:
        """The fewest usable answers of a prompt: up to here every prompt has its best-of-n."""
        return min(len(row.completions) for row in self.rows)

    @property
    def report(self) -> str:
        """What was read and left out, and which prompt sets the largest n."""
        answers = sum(len(row.completions) for row in self.rows)
        shortest = min(self.rows, key=lambda row: len(row.completions))
        most = max(len(row.completions) for row in self.rows)
        said = (
            f"{self.load_report.summary()} {answers:,} answers in use, {self.left_out:,} without "
            f"gold or score left out; n goes up to {self.largest_n}"
        )
        if most > self.largest_n:
            said += (
                f", the fewest answers that a prompt has ({shortest.where}; the most are {most}): "
                "a higher min_answers leaves out the prompts with few"
            )
        return f"{said}."

    def prompts(self, count: int, *, seed: int) -> list[Prompt]:
        """Return a draw of recorded prompts, each at most once."""
        if count > len(self.rows):
            raise ValueError(
                f"{self.world.file} has {len(self.rows)} usable prompts, {count} were asked for."
            )
        return [row.prompt for row in random.Random(f"prompts {seed}").sample(self.rows, count)]

    def answers(self, prompts: Sequence[Prompt], *, n: int, seed: int) -> list[list[Completion]]:
        """Return n recorded answers to each prompt, drawn without replacement.

        The order in the file is not kept: samplers, truncation and judges leave their marks on it.
        A prompt's draw depends on the seeds and the prompt alone, and that of a smaller n is its
        beginning.
        """
        drawn = []
        for prompt in prompts:
            row = self._row(prompt)
            if n > len(row.completions):
                raise ValueError(
                    f"{n} answers were asked for where {row.where} has {len(row.completions)} "
                    "usable ones."
                )
            drawn.append([row.completions[i] for i in self._order(row, seed)[:n]])
        return drawn

    def gold(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        """Return the recorded gold of each answer, found by its text.

        Raises:
            ValueError: The answer is not recorded, or is so twice with different gold.
        """
        return torch.tensor(
            [self._gold(p, c) for p, c in zip(prompts, completions, strict=True)],
            dtype=torch.float64,
        )

    def comparisons(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], *, seed: int
    ) -> list[PreferenceRow]:
        """Let the world's annotator compare the first two distinct answers to each prompt."""
        utilities = [
            self.gold([p] * len(a), a).tolist() for p, a in zip(prompts, answers, strict=True)
        ]
        return self.world.annotator.compare(prompts, answers, utilities, seed=seed)

    def proxy(
        self, method: Method
    ) -> tuple[Float[Tensor, " answer"], Float[Tensor, " answer"] | None]:
        """Return the reward that picks, row by row, and the std between its members (ddof 0).

        The std is None for one member and for controls. An objective that looks at a batch gets
        all answers as one.
        """
        require_known(method)
        prompts = [row.prompt for row in self.rows for _ in row.completions]
        completions = [c for row in self.rows for c in row.completions]
        if method.reward == "gold":
            return self._flat_gold, None
        if method.reward == "random":
            return random_reward(prompts, completions, seed=self.seed), None
        if method.reward == "length":
            return length_reward(prompts, completions), None
        posterior = self._posterior(prompts, completions, members=method.members)
        spread = posterior.std if posterior.members > 1 else None
        return method.objective.build()(posterior), spread

    def run(self, method: Method) -> SeedRun:
        """Return a method's cell.

        Each prompt's curve is the mean over all subsets of its own answers, so that prompts with
        more answers than others use them all; `proxy` counts from n = 1. The annotator's pairs
        for accuracy and calibration are each prompt's first two answers in the order of the seed.
        """
        start = time.perf_counter()
        proxy, spread = self.proxy(method)
        gold, ns = self._flat_gold, best_of_n_sizes(self.largest_n)
        length = [float(words_of(c)) for row in self.rows for c in row.completions]
        values = {"gold": gold, "proxy": proxy, "length": torch.tensor(length)}
        if spread is not None:
            values["spread"] = spread
        curves = {name: self._curves(proxy, value, ns) for name, value in values.items()}
        means = {name: curve.mean(dim=0) for name, curve in curves.items()}
        means["proxy"] = means["proxy"] - means["proxy"][0]
        means["gold_sem"] = curves["gold"].std(dim=0, correction=1) / math.sqrt(len(self.rows))
        points = [
            {"n": float(n), "kl/bound": best_of_n_kl(n)}
            | {name: mean[i].item() for name, mean in means.items()}
            for i, n in enumerate(ns)
        ]
        probabilities, outcomes = self._reliability(proxy)
        return SeedRun(
            seed=self.seed,
            points=points,
            final_gold=self._picks(proxy, gold),
            probabilities=probabilities,
            outcomes=outcomes,
            seconds=time.perf_counter() - start,
        )

    def _curves(
        self, proxy: Float[Tensor, " answer"], value: Float[Tensor, " answer"], ns: Sequence[int]
    ) -> Float[Tensor, "prompt n"]:
        """What the pick is expected to have of a value; prompts with as many answers at once."""
        counts = [len(row.completions) for row in self.rows]
        proxies, parts = proxy.split(counts), value.split(counts)
        curves = torch.empty(len(counts), len(ns), dtype=torch.float64)
        for count in set(counts):
            some = [i for i, c in enumerate(counts) if c == count]
            curves[some] = best_of_n_curves_per_prompt(
                torch.stack([proxies[i] for i in some]), torch.stack([parts[i] for i in some]), ns
            )
        return curves

    def _picks(
        self, proxy: Float[Tensor, " answer"], gold: Float[Tensor, " answer"]
    ) -> list[float]:
        """Return the gold of each prompt's pick among as many answers as every prompt has."""
        at, found = 0, []
        for row in self.rows:
            some = [at + k for k in self._order(row, self.seed)[: self.largest_n]]
            found.append(gold[some[int(proxy[some].argmax())]].item())
            at += len(row.completions)
        return found

    def _reliability(self, proxy: Float[Tensor, " answer"]) -> tuple[list[float], list[bool]]:
        """Return the reward's chances and the annotator's choices, by place: texts may recur."""
        at, probabilities, outcomes = 0, [], []
        for i, row in enumerate(self.rows):
            places = self._order(row, self.seed)[:2]
            # The annotator sees places, not texts: equal texts may have different gold.
            compared = self.world.annotator.compare(
                [row.prompt],
                [[row.completions[k] for k in places]],
                [[row.gold[k] for k in places]],
                seed=seed_of(self.seed, i),
            )
            first, second = (proxy[at + k] for k in places)
            at += len(row.completions)
            if compared:
                probabilities.append((first - second).sigmoid().item())
                outcomes.append(compared[0].chosen == row.completions[places[0]])
        return probabilities, outcomes

    def _order(self, row: Recording, seed: int) -> list[int]:
        places = range(len(row.completions))
        rng = random.Random(f"answers {self.seed} {seed} {prompt_key(row.prompt)}")
        return rng.sample(places, len(places))

    @cached_property
    def _flat_gold(self) -> Float[Tensor, " answer"]:
        return torch.tensor([g for row in self.rows for g in row.gold], dtype=torch.float64)

    def _posterior(
        self, prompts: list[Prompt], completions: list[Completion], *, members: int
    ) -> RewardPosterior:
        if self.world.reward_models:
            posterior = self._models_posterior(prompts, completions, members)
        elif self.world.scores:
            scores = [s for row in self.rows for s in row.scores]
            posterior = RewardPosterior(torch.tensor(scores, dtype=torch.float64))
        else:
            raise ValueError(
                "A learned reward needs scores (columns of the file) or reward_models (folders): "
                "the recorded world was given neither."
            )
        if posterior.members < members:
            raise ValueError(
                f"The method wants {members} members where the recorded world has "
                f"{posterior.members}: name more scores or reward_models."
            )
        stds = posterior.stds
        return RewardPosterior(
            posterior.means[:, :members], stds[:, :members] if stds is not None else None
        )

    def _models_posterior(
        self, prompts: list[Prompt], completions: list[Completion], members: int
    ) -> RewardPosterior:
        """Score with as many models as it takes; no more than one is in memory at a time."""
        posteriors: list[RewardPosterior] = []
        for name in self.world.reward_models:
            if sum(p.members for p in posteriors) >= members:
                break
            folder = name.replace("{seed}", str(self.seed))
            places = [row.where for row in self.rows for _ in row.completions]
            posteriors.append(_scored(folder, prompts, completions, places))
        return RewardPosterior.stack_members(posteriors)

    @cached_property
    def _by_prompt(self) -> dict[str, Recording]:
        return {prompt_key(row.prompt): row for row in self.rows}

    @cached_property
    def _gold_by_text(self) -> dict[tuple[str, str], set[float]]:
        found: dict[tuple[str, str], set[float]] = {}
        for row in self.rows:
            key = prompt_key(row.prompt)
            for completion, gold in zip(row.completions, row.gold, strict=True):
                found.setdefault((key, _completion_key(completion)), set()).add(gold)
        return found

    def _row(self, prompt: Prompt) -> Recording:
        row = self._by_prompt.get(prompt_key(prompt))
        if row is None:
            raise ValueError(
                f"{self.world.file} has no usable row for the prompt {text_of(prompt)[:60]!r}."
            )
        return row

    def _gold(self, prompt: Prompt, completion: Completion) -> float:
        row = self._row(prompt)
        found = self._gold_by_text.get((prompt_key(prompt), _completion_key(completion)), set())
        if len(found) == 1:
            return next(iter(found))
        said = text_of(completion)[:60]
        if not found:
            raise ValueError(
                f"{row.where} has no usable answer {said!r}: the recorded world knows the gold of "
                "recorded answers alone."
            )
        raise ValueError(
            f"{row.where} has the answer {said!r} several times with different gold "
            f"({', '.join(f'{g:g}' for g in sorted(found))}), so its text does not tell its gold: "
            "keep one of them."
        )


def run_cell(world: RecordedWorld, method: Method, seed: int) -> SeedRun:
    """Compute one cell: the best-of-n curve of a method's reward under a seed.

    Raises:
        DataError: The file does not fit.
        ValueError: The method is not one for recorded answers.
    """
    require_known(method)
    return world.open(seed=seed).run(method)


def inputs_of(world: object, seed: int) -> list[list[object]]:
    """Return name, size and time of change of the files that a recorded cell rests on."""
    if not isinstance(world, RecordedWorld):
        return []
    folders = [Path(name.replace("{seed}", str(seed))) for name in world.reward_models]
    files = [Path(world.file), *(f for folder in folders for f in sorted(folder.glob("*")))]
    stats = [(f, f.stat()) for f in files if f.exists()]
    return [[str(f), found.st_size, found.st_mtime_ns] for f, found in stats]


def require_known(method: Method) -> None:
    """Refuse what recorded answers cannot tell, rather than leave it without effect."""
    if method.optimiser != "best_of_n":
        raise ValueError(
            "The recorded world has no policy to train, only answers to choose from: give the "
            f"method optimiser=best_of_n, not {method.optimiser}."
        )
    if method.reward not in ("learned", "gold", "random", "length"):
        raise ValueError(
            f"reward={method.reward}: nothing is trained in the recorded world, so nothing can be "
            "refined; it has learned, gold, random and length."
        )
    if method.epochs_scale != 1 or method.family != "deep":
        raise ValueError(
            "Nothing is trained in the recorded world: leave epochs_scale at 1 and family at deep, "
            f"got {method.epochs_scale:g} and {method.family}."
        )


def _completion_key(completion: Completion) -> str:
    return canonical(as_turn(completion, "assistant"))


def _scored(
    folder: str, prompts: list[Prompt], completions: list[Completion], places: list[str]
) -> RewardPosterior:
    """Return a saved reward model's posterior of all answers, from memory where it is known."""
    path = Path(folder)
    changed = [p.stat().st_mtime_ns for p in path.iterdir()] if path.is_dir() else [0]
    texts = hashlib.sha256(canonical([prompts, completions]).encode()).hexdigest()
    key = (folder, max(changed, default=0), texts)
    if key not in _SCORED:
        model = RewardModel.from_pretrained(folder)
        try:
            _SCORED[key] = posterior_function(model)(prompts, completions)
        except OverlongError as error:
            asked = zip(places, prompts, completions, strict=True)
            where = next(w for w, p, c in asked if not model.fits(p, c))
            raise DataError(
                f"{where} has an answer that is too long for {folder}, whose context is "
                f"{model.max_length} tokens: leave its row out, or give a model with more."
            ) from error
    return _SCORED[key]


# --- the file ---


def _read(world: RecordedWorld, report: LoadReport) -> tuple[list[Recording], int]:
    """Return the usable rows and how many answers were left out; the report takes note of both."""
    rows: list[Recording] = []
    first_seen: dict[str, str] = {}
    left_out = 0
    for _, records in record_streams(resolve_source(world.file)):
        for where, record in records:
            report.read += 1
            row, total = _recording(world, where, record)
            usable = len(row.completions)
            left_out += total - usable
            first = first_seen.setdefault(prompt_key(row.prompt), where)
            if first != where:
                report.add("duplicate", where, f"the same prompt as {first}")
                continue
            if usable < world.min_answers:
                detail = f"{usable} of {total} answers are usable, at least {world.min_answers} "
                report.add("with too few answers", where, detail + "are needed")
                continue
            if usable < total:
                detail = f"{total - usable} of {total} answers have no gold or no score"
                report.add("with answers left out", where, detail, kept=True)
            _require_members(rows, row)
            rows.append(row)
    return rows, left_out


def _recording(world: RecordedWorld, where: str, record: object) -> tuple[Recording, int]:
    """Return a row with its usable answers, and how many it had."""
    if isinstance(record, BrokenRecord):
        raise DataError(f"{where} is {record.kind}: {record.detail}.")
    if not isinstance(record, dict):
        raise DataError(f"{where} must hold an object, got {json_type(record)}.")
    prompt = _column(record, world.prompt, "prompt", where)
    if not _is_text(prompt):
        raise DataError(f"{where}: '{world.prompt}' must be a string or a list of messages.")
    completions = _list(record, world.completions, "completions", where)
    for i, completion in enumerate(completions, 1):
        if not _is_text(completion):
            raise DataError(
                f"{where}: answer {i} of '{world.completions}' must be a string or a list of "
                f"messages, got {json_type(completion)}."
            )
    columns = [(world.gold, "gold"), *((name, "scores") for name in world.scores)]
    numbers = []
    for name, option in columns:
        values = _list(record, name, option, where)
        if len(values) != len(completions):
            raise DataError(
                f"{where}: '{name}' has {len(values)} values for {len(completions)} completions, "
                "so which belong together is not known: give one for each, null where there is "
                "none."
            )
        several = option == "scores"
        numbers.append([_numbers(v, name, where, several=several) for v in values])
    kept = [
        i
        for i in range(len(completions))
        if all(n is not None and math.isfinite(n) for column in numbers for n in column[i])
    ]
    gold, *scores = numbers
    row = Recording(
        prompt=prompt,
        completions=[completions[i] for i in kept],
        gold=[float(gold[i][0] or 0) for i in kept],
        scores=[[float(n or 0) for column in scores for n in column[i]] for i in kept],
        where=where,
    )
    return row, len(completions)


def _require_members(rows: list[Recording], row: Recording) -> None:
    """Every answer must have as many members as the file's first."""
    wanted = len((rows[0] if rows else row).scores[0])
    for scores in row.scores:
        if len(scores) != wanted:
            raise DataError(
                f"{row.where} has an answer with scores of {len(scores)} members where "
                f"{rows[0].where if rows else 'its first answer'} has {wanted}: score all answers "
                "with the same members."
            )


def _column(record: dict[str, Any], name: str, option: str, where: str) -> Any:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where} has no column '{name}' (it has {found}): name the right one as `{option}`."
        )
    return record[name]


def _list(record: dict[str, Any], name: str, option: str, where: str) -> list[Any]:
    value = _column(record, name, option, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: '{name}' must be a list, got {json_type(value)}.")
    return value


def _numbers(value: object, name: str, where: str, *, several: bool) -> list[float | None]:
    """Return one number or (`several`) a list of them; None where there is none."""
    numbers: list[float | None] = []
    for number in value if several and isinstance(value, list) else [value]:
        if number is not None and not isinstance(number, int | float):
            raise DataError(
                f"{where}: '{name}' must hold a number or null for each completion, got "
                f"{json_type(number)}."
            )
        numbers.append(None if number is None else float(number))
    return numbers


def _is_text(value: object) -> bool:
    messages = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return isinstance(value, str) or messages
