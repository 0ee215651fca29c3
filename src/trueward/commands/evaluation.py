"""Commands that judge and show: evaluate and report."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm.auto import tqdm

from trueward.commands.shared import (
    DataOptions,
    completions_of_rows,
    console,
    load_reward,
    numbers_text,
)
from trueward.data.formats import (
    Completion,
    DataError,
    PreferenceRow,
    Prompt,
    load_preferences,
    prompt_key,
    read_jsonl,
    text_of,
)
from trueward.evaluate.diagnosis import Diagnosis, diagnose
from trueward.evaluate.judges import ChatJudge, Judge, reward_judge
from trueward.evaluate.multiple_choice import (
    MultipleChoice,
    evaluate_multiple_choice,
    lettered,
    load_questions,
    retention,
)
from trueward.evaluate.out_of_distribution import (
    OUT_OF_DISTRIBUTION,
    OutOfDistribution,
    answers_beside,
    made_completions,
    read_answers,
)
from trueward.evaluate.overoptimization import best_of_n_curve, best_of_n_kl
from trueward.evaluate.preferences import evaluate_preferences
from trueward.evaluate.shift import (
    EnergyTest,
    LengthDifference,
    energy_test,
    judged_pairs,
    last_states,
    length_difference,
    policy_kl,
    samples_of_texts,
    shift_table,
)
from trueward.evaluate.winrate import WinRate, win_rate
from trueward.models.policy import Policy
from trueward.models.reward_function import (
    PosteriorFunction,
    Reward,
    fits_context,
    fitting_rows,
    posterior_function,
)
from trueward.models.reward_model import RewardModel
from trueward.options import ObjectiveConfig
from trueward.posterior import RewardPosterior
from trueward.refine.equivalence import sentence_transformer
from trueward.report.diagnosis import diagnosis_report, result_tables
from trueward.report.html import Section, Table, render_report
from trueward.report.paper import multiple_choice_table, win_rate_table
from trueward.report.run import configuration_details, report_run, rich_table, versions_line
from trueward.report.shift import shift_section
from trueward.train.loop import permutation
from trueward.train.run_folder import environment, to_plain, write_text

_MOST_STATES = 2000  # of each source; an energy distance holds the square of all at once
_CHUNK = 512  # completions scored between two moves of the bar; even, so that pairs stay together


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """A reward on preferences or where the policy went; a policy's answers and its knowledge."""

    reward_model: list[str] = field(default_factory=list)  # several make an ensemble; or FILE.py:F
    preferences: dict[str, str] = field(default_factory=dict)  # name -> file, folder or hub name
    # Whether the uncertainty is diagnosed too, which scores about five more kinds of completions.
    diagnosis: bool = True
    diagnosis_rows: int = 0  # pairs of each set diagnosed at most, drawn by the seed; 0 = all
    # More completions that the data did not cover, for the diagnosis: name -> JSONL with prompt and
    # completion(s), as another policy's answers, or answers in another language.
    out_of_distribution: dict[str, str] = field(default_factory=dict)
    seed: int = 0  # of the pairs drawn, and of the completions made for the diagnosis
    # JSONL with prompt and completion(s), for a win rate; or NAME FILE for each of several sets.
    completions: str | dict[str, str] = ""
    # The same prompts, answered by another policy; of several sets under the same names.
    reference_completions: str | dict[str, str] = ""
    # Completions of the policy on its way, first of the reference: name -> JSONL with prompt and
    # completions (see `trueward sample`). Tells how accurate the reward is on pairs of each.
    samples: dict[str, str] = field(default_factory=dict)
    gold: str = ""  # orders those pairs: a reward model's folder, or FILE.py:F; else the judge does
    sample_pairs: Literal["all", "first"] = "all"  # of a prompt's completions; first = one pair
    rewards: dict[str, str] = field(default_factory=dict)  # more rewards to compare on those pairs
    embeddings: str = (
        ""  # sentence-transformers model, for how far samples moved; else the reward's
    )
    policy: str = ""  # a language model's folder, for --multiple_choice and --own_samples
    against: str = ""  # the reference policy's, to compare it with
    multiple_choice: dict[str, str] = field(
        default_factory=dict
    )  # name -> JSONL: query, choices, gold
    lettered: bool = False  # whether choices are shown as A, B, ... and the letter is asked for
    own_samples: str = ""  # JSONL of what --policy wrote, for its KL to --against
    judge: str = ""  # a reward model's folder, or chat:MODEL for an OpenAI-compatible endpoint
    base_url: str = "https://api.openai.com/v1"  # of the chat judge; its key is OPENAI_API_KEY
    best_of_n: str = ""  # JSONL with the lists `proxy` and `gold` of a prompt's samples
    output: str = ""  # a .json file for the numbers
    page: str = ""  # a .html file for the diagnosis, or for samples, sets and questions
    data: DataOptions = field(default_factory=DataOptions)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        diagnosed = bool(self.preferences) and self.diagnosis
        sectioned = bool(self.completions or self.samples or self.multiple_choice)
        for name, fitting in (
            ("page", diagnosed or sectioned),
            ("out_of_distribution", diagnosed),
        ):
            if getattr(self, name) and not fitting:
                raise ValueError(
                    f"--{name} belongs to the diagnosis: give --preferences NAME FILE, and leave "
                    "--diagnosis on."
                )
        if self.page and diagnosed and sectioned:
            raise ValueError(
                "--page shows either the diagnosis or samples, sets and questions: ask for the two "
                "in two calls."
            )
        if self.diagnosis_rows < 0:
            raise ValueError(f"diagnosis_rows must be at least 0, got {self.diagnosis_rows}.")
        taken = [name for name in self.out_of_distribution if name in OUT_OF_DISTRIBUTION]
        if taken:
            raise ValueError(
                f"--out_of_distribution has a name that is taken, {taken[0]!r}: give it another."
            )


def evaluate(config: EvaluateCommand) -> None:
    """Print the numbers, and write them where asked."""
    found: dict[str, Any] = {}
    sections: list[Section] = []
    for path in (config.output, config.page):  # not after an hour of scoring
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if config.preferences:
        found |= _evaluate_preferences(config)
    if config.completions:
        rates = _win_rates(config)
        plain = {name: dataclasses.asdict(rate) for name, rate in rates.items()}
        single = isinstance(config.completions, str)
        found |= {"win_rate": plain["completions"]} if single else {"win_rates": plain}
        sections.append(Section(title="Win rates", tables=[win_rate_table(rates)]))
    if config.samples:
        numbers, section = _shift(config)
        found["shift"] = numbers
        sections.append(section)
    if config.multiple_choice:
        numbers, table = _multiple_choice(config)
        found["multiple_choice"] = numbers
        sections.append(Section(title="What the policy knows", tables=[table]))
    if config.own_samples:
        found["kl"] = _kl(config)
    if config.best_of_n:
        found["best_of_n"] = _best_of_n(config.best_of_n)
    if not found:
        raise DataError(
            "Nothing to evaluate: give --preferences NAME FILE, --completions FILE, --samples NAME "
            "FILE, --multiple_choice NAME FILE, --own_samples FILE or --best_of_n FILE."
        )
    if config.output:
        write_text(Path(config.output), json.dumps(_without_nan(found), indent=2))
    if config.page and sections:
        _write_page(config, sections)
    for section in sections:
        for table in section.tables:
            console.print(rich_table(table))
        for sentence in filter(None, section.text.split("\n\n")):
            console.print(f"  - {sentence}", highlight=False, markup=False)
    for name, numbers in found.items():
        if name in ("win_rates", "shift", "multiple_choice"):  # its table says it
            continue
        shown = {key: value for key, value in numbers.items() if key != "diagnosis"}
        console.print(f"{name}: {numbers_text(shown)}", highlight=False)
        for sentence in _said(numbers.get("diagnosis", {})):
            console.print(f"  - {sentence}", highlight=False, markup=False)


def _without_nan(value: Any) -> Any:
    """Return what JSON can hold: None where there is no number."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_page(config: EvaluateCommand, sections: Sequence[Section]) -> None:
    made_with = environment()
    details = configuration_details(yaml.safe_dump(to_plain(config), sort_keys=False), made_with)
    page = render_report(
        title="Evaluation",
        lead=", ".join(section.title for section in sections) + ".",
        sections=[*sections, Section(title="How it was made", details=details)],
        footer=versions_line(made_with),
    )
    write_text(Path(config.page), page)


def _evaluate_preferences(config: EvaluateCommand) -> dict[str, Any]:
    """Return the numbers by set, with the diagnosis beside them; print its tables, write its page.

    A scalar model is asked for its raw rewards, whose margins are the logits that it was trained
    on; several members are put on one scale.
    """
    if not config.reward_model:
        raise DataError("--preferences needs --reward_model: which model shall be evaluated?")
    sources = {name: read_answers(file) for name, file in config.out_of_distribution.items()}
    model = load_reward(config.reward_model)
    function = model.score if isinstance(model, RewardModel) else posterior_function(model)
    fits = fits_context(model) if isinstance(model, RewardModel | Sequence) else None
    objective = config.objective.build()
    found: dict[str, Any] = {}
    diagnoses: dict[str, Diagnosis] = {}
    remarks: dict[str, list[str]] = {}
    for name, source in config.preferences.items():
        loaded = load_preferences(source, keep_ties=True, **config.data.arguments())
        console.print(loaded.report.summary(), highlight=False)
        rows = fitting_rows(model, loaded.rows)
        if not rows:
            raise DataError("No row fits the reward model's context.")
        found[name] = {"overlong": float(len(loaded.rows) - len(rows))}
        drawn = _drawn(rows, config) if config.diagnosis else []
        if drawn:
            kinds, remarks[name] = _outside_of(drawn, sources, seed=config.seed)
            total = len(drawn) * (2 + len(kinds))
            with tqdm(total=total, desc=name, unit="text", disable=None) as bar:
                diagnoses[name] = diagnose(
                    _moving(function, bar, size=_CHUNK if fits is not None else None),
                    drawn,
                    out_of_distribution=kinds,
                    objective=objective,
                    fits=fits,
                    seed=config.seed,
                )
            remarks[name] += _overlong(diagnoses[name])
        if len(drawn) == len(rows):
            found[name] |= diagnoses[name].metrics
        else:
            found[name] |= evaluate_preferences(function, rows, objective=objective)
        if drawn:
            found[name]["diagnosis"] = _plain(diagnoses[name], remarks[name])
    if diagnoses:
        for table in result_tables(diagnoses):
            console.print(rich_table(table))
    if config.page:
        diagnosis_report(
            config.page,
            diagnoses,
            title=f"Diagnosis: {', '.join(config.reward_model)}",
            remarks=remarks,
            config_text=yaml.safe_dump(to_plain(config), sort_keys=False),
            environment=environment(),
        )
    return found


def _drawn(rows: list[PreferenceRow], config: EvaluateCommand) -> list[PreferenceRow]:
    """Return the rows to diagnose, in their order; some of those with an order, if not all."""
    if not 0 < config.diagnosis_rows < len(rows):
        return rows
    ordered = [row for row in rows if not row.extra.get("tie")]
    kept = permutation(len(ordered), config.seed, "diagnosis")[: config.diagnosis_rows]
    return [ordered[i] for i in sorted(kept)]


def _outside_of(
    rows: Sequence[PreferenceRow],
    sources: Mapping[str, tuple[list[Prompt], list[Completion]]],
    *,
    seed: int,
) -> tuple[dict[str, OutOfDistribution], list[str]]:
    """Return completions that the data did not cover, by kind, and what is to be said of them."""
    prompts = [row.prompt for row in rows]
    made = made_completions(prompts, [row.chosen for row in rows], seed=seed)
    kinds: dict[str, OutOfDistribution] = dict(made.completions)
    remarks = [f"There are no {name} completions: {why}" for name, why in made.left_out.items()]
    for name, (answered, answers) in sources.items():
        beside = answers_beside(prompts, answered, answers, seed=seed)
        kinds[name] = beside.completions
        missing = sum(answer is None for answer in beside.completions)
        if beside.other_prompts:
            remarks.append(
                f"The completions of {name} answer other prompts: none of theirs is among those of "
                "the preferences, so they were dealt out at random."
            )
        if missing:
            remarks.append(
                f"{missing} of {len(rows)} pairs have no completion of {name}, so its AUROC is "
                "over the others."
            )
    return kinds, remarks


def _overlong(found: Diagnosis) -> list[str]:
    return [
        f"{about.overlong} completions of the kind {kind} are longer than the reward's context, so "
        f"its AUROC is over {about.completions} others."
        for kind, about in found.out_of_distribution.items()
        if about.overlong
    ]


def _moving(
    function: Callable[..., RewardPosterior], bar: "tqdm[Any]", *, size: int | None
) -> PosteriorFunction:
    """Return the function, scoring `size` completions at a time so that the bar can move.

    None scores all that it is given at once, as a user's own function may look at all of them.
    """

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> RewardPosterior:
        parts = []
        step = size or len(prompts)
        for start in range(0, len(prompts), step):
            some = slice(start, start + step)
            parts.append(function(prompts[some], completions[some]))
            bar.update(len(parts[-1]))
        return RewardPosterior.cat(parts)

    return score


def _plain(found: Diagnosis, remarks: list[str]) -> dict[str, Any]:
    """Return a diagnosis as JSON holds it; the metrics stand beside it."""
    plain = dataclasses.asdict(found)
    del plain["metrics"]
    return plain | {"verdicts": found.verdicts, "remarks": remarks}


def _said(diagnosis: Mapping[str, Any]) -> list[str]:
    return [*diagnosis.get("verdicts", []), *diagnosis.get("remarks", [])]


def _best_of_n(source: str) -> dict[str, float]:
    """Return the expected gold reward of the proxy's pick among n, for n in powers of two."""
    rows = [row for _, row in read_jsonl(source)]
    for line, row in enumerate(rows, start=1):
        if not {"proxy", "gold"} <= set(row):
            raise DataError(f"{source}, row {line}: needs the lists 'proxy' and 'gold'.")
    size = min(len(row["proxy"]) for row in rows)
    ns = [2**k for k in range(size.bit_length()) if 2**k <= size]
    proxy = torch.tensor([row["proxy"][:size] for row in rows], dtype=torch.float64)
    gold = torch.tensor([row["gold"][:size] for row in rows], dtype=torch.float64)
    curve = best_of_n_curve(proxy, gold, ns).tolist()
    return {f"n={n} (KL {best_of_n_kl(n):.2f})": g for n, g in zip(ns, curve, strict=True)}


# ---- completions against others' ----------------------------------------------------------------


def _win_rates(config: EvaluateCommand) -> dict[str, WinRate]:
    """Return the win rate of each set; of a single file under the name `completions`."""
    if not (config.reference_completions and config.judge):
        raise DataError("--completions needs --reference_completions and --judge.")
    files, references = (
        {"completions": given} if isinstance(given, str) else given
        for given in (config.completions, config.reference_completions)
    )
    if set(files) != set(references):
        raise DataError(
            "--completions and --reference_completions must have the same names, got "
            f"{', '.join(files)} and {', '.join(references)}."
        )
    judge = _judge(config)
    return {name: _win_rate(judge, file, references[name]) for name, file in files.items()}


def _win_rate(judge: Judge, file: str, reference_file: str) -> WinRate:
    prompts, completions, _ = completions_of_rows([row for _, row in read_jsonl(file)], file)
    reference_prompts, references, _ = completions_of_rows(
        [row for _, row in read_jsonl(reference_file)], reference_file
    )
    if prompts != reference_prompts:
        raise DataError(
            f"{file} and {reference_file} must answer the same prompts in the same order."
        )
    return win_rate(judge, prompts, completions, references)


def _judge(config: EvaluateCommand) -> Judge:
    if config.judge.startswith("chat:"):
        return ChatJudge(base_url=config.base_url, model=config.judge.removeprefix("chat:"))
    return reward_judge(RewardModel.from_pretrained(config.judge))


# ---- a reward where the policy went -------------------------------------------------------------

Samples = tuple[list[Prompt], list[list[Completion]]]  # prompts, and the completions of each


def _shift(config: EvaluateCommand) -> tuple[dict[str, Any], Section]:
    """Return the accuracy of each reward on each source's pairs, and how far the sources lie."""
    if not (config.gold or config.judge):
        raise DataError(
            "--samples needs --gold or --judge: a reward model's folder that says which of two "
            "completions is better."
        )
    rewards = _rewards(config)
    gold = load_reward([config.gold]) if config.gold else None
    judge = None if gold is not None else _judge(config)
    remarks: list[str] = []
    samples: dict[str, Samples] = {}
    sources: dict[str, list[PreferenceRow]] = {}
    for name, file in config.samples.items():
        prompts, completions, lonely = _read_samples(file)
        samples[name] = prompts, completions
        pairs = judged_pairs(
            prompts, completions, gold=gold, judge=judge, pairs=config.sample_pairs
        )
        if not pairs.rows:
            raise DataError(f"{file} has no two completions that differ in gold: sample more.")
        sources[name] = pairs.rows
        counts = {
            "prompts with fewer than two completions": lonely,
            "pairs without an order": pairs.equal,
            "pairs without a finite gold reward": pairs.unjudged,
        }
        remarks += [f"{name}: {n} {what} left out." for what, n in counts.items() if n]
    table = shift_table(rewards, sources, objective=config.objective.build(), seed=config.seed)
    lengths = _lengths(samples)
    energies, remark = _energies(config, samples, [*rewards.values(), gold])
    section = shift_section(table, lengths=lengths, energies=energies)
    told = [*remarks, remark] if remark else remarks
    numbers = dataclasses.asdict(table) | {
        "lengths": {name: dataclasses.asdict(found) for name, found in lengths.items()},
        "energies": {name: dataclasses.asdict(found) for name, found in energies.items()},
        "remarks": told,
    }
    return numbers, dataclasses.replace(section, text="\n\n".join(told))


def _rewards(config: EvaluateCommand) -> dict[str, Reward]:
    """Return the rewards to compare, that of --reward_model first."""
    found: dict[str, Reward] = {}
    if config.reward_model:
        found["reward"] = load_reward(config.reward_model)
    for name, file in config.rewards.items():
        if name in found:
            raise DataError("--rewards has the name 'reward', which --reward_model has.")
        found[name] = load_reward([file])
    if not found:
        raise DataError("--samples needs --reward_model or --rewards NAME FOLDER: whose accuracy?")
    return found


def _read_samples(file: str) -> tuple[list[Prompt], list[list[Completion]], int]:
    """Return the prompts with two completions or more, these, and how many had fewer."""
    by_prompt: dict[str, tuple[Prompt, list[Completion]]] = {}
    for prompt, answer in zip(*read_answers(file), strict=True):
        by_prompt.setdefault(prompt_key(prompt), (prompt, []))[1].append(answer)
    several = [(prompt, some) for prompt, some in by_prompt.values() if len(some) > 1]
    if not several:
        raise DataError(
            f"{file} has no prompt with two completions to compare: draw them with --sampling.n 2 "
            "or more."
        )
    prompts, completions = [p for p, _ in several], [some for _, some in several]
    return prompts, completions, len(by_prompt) - len(several)


def _lengths(samples: Mapping[str, Samples]) -> dict[str, LengthDifference]:
    """Return the lengths of each source but the first beside the first's."""
    (first, *others) = samples
    return {
        name: length_difference(*_flat(samples[name]), *_flat(samples[first])) for name in others
    }


def _energies(
    config: EvaluateCommand, samples: Mapping[str, Samples], rewards: Sequence[Reward | None]
) -> tuple[dict[str, EnergyTest], str]:
    """Return how far each source's states lie from the first's, and what is to be said of it."""
    if len(samples) < 2:
        return {}, ""
    embed, fits = _embedding(config, rewards)
    if embed is None:
        return {}, (
            "No energy distance: no reward has a state for each completion; --embeddings would "
            "give one."
        )
    (first, *others) = samples
    found = {}
    capped = False
    for name in others:
        known = {prompt_key(p) for p in samples[name][0]} & {
            prompt_key(p) for p in samples[first][0]
        }
        sides, cuts = zip(
            *(_for_energy(samples[side], known, fits) for side in (name, first)), strict=True
        )
        capped |= any(cuts)
        states = [embed(prompts, completions) for prompts, completions in sides]
        # Completions of one prompt resemble each other, so labels are exchanged among them alone.
        groups = tuple([prompt_key(p) for p in prompts] for prompts, _ in sides)
        found[name] = energy_test(
            states[0],
            states[1],
            groups=(groups[0], groups[1]) if known else None,
            seed=config.seed,
        )
    remark = f"Energy distances are of {_MOST_STATES} completions of each." if capped else ""
    return found, remark


def _for_energy(
    samples: Samples, known: Set[str], fits: Callable[[Prompt, Completion], bool]
) -> tuple[tuple[list[Prompt], list[Completion]], bool]:
    """Return completions of the prompts that both answer, else one of each prompt; and if cut."""
    chosen = [
        (prompt, completion)
        for prompt, some in sorted(zip(*samples, strict=True), key=lambda row: prompt_key(row[0]))
        if not known or prompt_key(prompt) in known
        for completion in (some if known else some[:1])
        if fits(prompt, completion)
    ]
    kept = chosen[:_MOST_STATES]
    return ([p for p, _ in kept], [c for _, c in kept]), len(kept) < len(chosen)


Embed = Callable[[Sequence[Prompt], Sequence[Completion]], torch.Tensor]


def _embedding(
    config: EvaluateCommand, rewards: Sequence[Reward | None]
) -> tuple[Embed | None, Callable[[Prompt, Completion], bool]]:
    """Return what gives completions their states, and which it can read.

    That is a sentence model where one is asked for, else the first reward model.
    """
    if config.embeddings:
        sentences = sentence_transformer(config.embeddings)
        return lambda _, completions: sentences([text_of(c) for c in completions]), _any
    for reward in rewards:
        if isinstance(reward, RewardModel) and reward.head is not None and reward.lora is None:
            return partial(last_states, reward), reward.fits
    return None, _any


def _any(_prompt: Prompt, _completion: Completion) -> bool:
    return True


def _flat(samples: Samples) -> tuple[list[Prompt], list[Completion]]:
    pairs = [(p, c) for p, some in zip(*samples, strict=True) for c in some]
    return [p for p, _ in pairs], [c for _, c in pairs]


# ---- a policy's knowledge, and its distance -----------------------------------------------------


def _multiple_choice(config: EvaluateCommand) -> tuple[dict[str, Any], Table]:
    """Return the accuracies of each set of questions, beside the reference's where it is given."""
    if not config.policy:
        raise DataError("--multiple_choice needs --policy: a language model's folder.")
    sets = {name: load_questions(file) for name, file in config.multiple_choice.items()}
    if config.lettered:
        sets = {name: [lettered(q) for q in questions] for name, questions in sets.items()}
    answered: list[dict[str, MultipleChoice]] = []
    for folder in filter(None, (config.policy, config.against)):
        policy = Policy.from_pretrained(folder)
        answered.append({n: evaluate_multiple_choice(policy, q) for n, q in sets.items()})
    found, ref = answered[0], answered[1] if config.against else None
    kept = {n: retention(found[n].right, ref[n].right) for n in found} if ref is not None else None
    numbers: dict[str, Any] = {}
    for name, result in found.items():
        numbers[name] = dataclasses.asdict(result)
        del numbers[name]["right"]
        if ref is not None and kept is not None:
            numbers[name]["reference"] = dataclasses.asdict(ref[name])
            del numbers[name]["reference"]["right"]
            numbers[name]["retention"] = dataclasses.asdict(kept[name])
    return numbers, multiple_choice_table(found, ref=ref, kept=kept)


def _kl(config: EvaluateCommand) -> dict[str, float]:
    """Return the KL of a policy to its reference on completions that it wrote."""
    if not (config.policy and config.against):
        raise DataError(
            "--own_samples needs --policy, which wrote them, and --against, its reference."
        )
    rows = [row for _, row in read_jsonl(config.own_samples)]
    prompts, completions, counts = completions_of_rows(rows, config.own_samples)
    ended = [
        row.get("finished", [True] * n if "completions" in row else True)
        for row, n in zip(rows, counts, strict=True)
    ]
    finished = [e for some in ended for e in (some if isinstance(some, list) else [some])]
    policy, ref = (Policy.from_pretrained(f).eval() for f in (config.policy, config.against))
    samples = samples_of_texts(policy, prompts, completions, finished=finished)
    return policy_kl(policy, ref, samples) | {"completions": float(len(samples))}


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write the HTML report of a run's folder."""

    folder: str


def report(config: ReportCommand) -> None:
    """Write `report.html` into the folder."""
    console.print(str(report_run(config.folder)), highlight=False)
