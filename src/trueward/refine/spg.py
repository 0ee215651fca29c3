"""RLP-SPG from a configuration, shard by shard: a killed run goes on after its last shard."""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from trueward.data.formats import (
    DataError,
    Prompt,
    PromptRow,
    prompt_key,
    read_jsonl,
    write_jsonl,
)
from trueward.data.functions import is_python_function, python_function
from trueward.evaluate.judges import Judge
from trueward.evaluate.policy_judge import policy_judge
from trueward.models.policy import Policy
from trueward.refine.equivalence import (
    Embed,
    EmbeddingEquivalence,
    Equivalence,
    NLIEquivalence,
    RoutedEquivalence,
    exact_answer,
    exact_match,
    mean_state_embedding,
    sentence_transformer,
    unrelated_threshold,
)
from trueward.refine.outcomes import PromptOutcome, SyntheticResult, result_of
from trueward.refine.synthetic import clustered_outcomes, judged_outcomes, ranked_outcomes
from trueward.train.run_folder import to_plain, write_text

logger = logging.getLogger(__name__)

Drawn = Sequence[tuple[Prompt, list[str]]]  # prompts with their completions from the policy
# Flat lists in, one number for each completion out.
FlatRewards = Callable[[Sequence[Prompt], Sequence[str]], Tensor]
# (prompts, completions, rewards) -> what became of each prompt
_Rule = Callable[
    [Sequence[Prompt], Sequence[Sequence[str]], Sequence[Sequence[float]]], list[PromptOutcome]
]

_NAMED = ("exact", "answer", "policy_states", "embedding", "nli")
_CALIBRATION = 256  # prompts whose first completions are taken for unrelated texts
_FREE = ("progress",)  # changes nothing that is written


@dataclass(frozen=True, kw_only=True)
class SPGConfig:
    """Synthetic preference generation."""

    # The paper's, and its ablations (Table 5). select_all: gamma is 0. reward, rlaif: no clusters,
    # a random pair, ordered by the reward or by a judge (the policy itself).
    rule: Literal["spg", "select_all", "reward", "rlaif"] = "spg"
    gamma: float = 0.5  # smallest confidence, inclusive; 0 = Select-All
    # exact, answer, policy_states, embedding, nli; embedding:MODEL and nli:MODEL name a model of
    # their own, FILE.py:FUNCTION a function (prompts, firsts, seconds) -> list of bools.
    equivalence: str = "policy_states"
    nli_model: str = "microsoft/deberta-large-mnli"
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    mode: Literal["relaxed", "strict", "no_contradiction"] = "relaxed"  # nli
    threshold: float | None = None  # cosine similarity, for policy_states and embedding
    level: float = 0.95  # without a threshold: the quantile of unrelated completions' cosines
    routes: dict[str, str] = field(default_factory=dict)  # value of `route_by` -> equivalence
    route_by: str = "lang"  # field of the prompts' rows; acceptance is reported by it too
    # length_matched is ours, against the bias towards long answers; see `select_pair`.
    rejected: Literal["uniform", "length_matched"] = "uniform"
    shard: int = 64  # prompts done at once, and kept when the run is killed
    progress: bool = True  # a bar where there is a terminal

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is a confidence in [0, 1], got {self.gamma}.")
        if not 0 < self.level < 1:
            raise ValueError(f"level is a share of pairs in (0, 1), got {self.level}.")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold is a cosine in [-1, 1], got {self.threshold}.")
        if self.shard < 1:
            raise ValueError(f"shard must be at least 1 prompt, got {self.shard}.")
        if self.rejected != "uniform" and self.rule in ("reward", "rlaif"):
            raise ValueError(
                f"rule={self.rule} draws both sides of a pair at random: rejected={self.rejected} "
                "is for rule=spg and rule=select_all."
            )
        names = {"equivalence": self.equivalence}
        names |= {f"routes.{route}": name for route, name in self.routes.items()}
        for where, name in names.items():
            kind, _, model = name.partition(":")
            with_model = kind in ("embedding", "nli") and model
            if not (name in _NAMED or with_model or is_python_function(name)):
                raise ValueError(
                    f"{where} must be one of {', '.join(_NAMED)}, embedding:MODEL, nli:MODEL or "
                    f"FILE.py:FUNCTION, got {name!r}."
                )

    def build(
        self,
        policy: Policy | None,
        completions: Sequence[Sequence[str]],
        cache: Path | None = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        routes_of: Mapping[str, str] | None = None,
        thresholds: Mapping[str, float] | None = None,
    ) -> Equivalence:
        """Return the equivalence test, a `RoutedEquivalence` where there are routes.

        Args:
            policy: Whose states embed the texts, for `policy_states`.
            completions: By prompt; the first of each calibrates the embeddings' thresholds, each
                on the prompts that it will serve where those have two different texts.
            cache: File in which `nli` keeps its labels.
            prompts: Of the completions; needed with routes.
            routes_of: From a prompt's `prompt_key` to its value of `route_by`; needed with routes.
            thresholds: Of embedding equivalences by name, where they are known already.
        """
        known = thresholds or {}
        if not self.routes:
            return self._one(self.equivalence, policy, completions, cache, known)
        if prompts is None or routes_of is None:
            raise ValueError(
                "Routes need the prompts, and which of them has which route: give prompts= and "
                "routes_of=, or leave spg.routes empty."
            )
        served: dict[str, list[Sequence[str]]] = {}
        for prompt, texts in zip(prompts, completions, strict=True):
            route = routes_of.get(prompt_key(prompt), "")
            served.setdefault(self.routes.get(route, self.equivalence), []).append(texts)
        made = {}
        for name, some in served.items():
            enough = len(set(_unrelated(some))) > 1
            made[name] = self._one(name, policy, some if enough else completions, cache, known)
        return RoutedEquivalence(
            {route: made[name] for route, name in self.routes.items() if name in made},
            routes_of=routes_of,
            default=made.get(self.equivalence),
        )

    def _one(
        self,
        name: str,
        policy: Policy | None,
        completions: Sequence[Sequence[str]],
        cache: Path | None,
        thresholds: Mapping[str, float],
    ) -> Equivalence:
        """Return the equivalence of a name."""
        if name == "exact":
            return exact_match
        if name == "answer":
            return exact_answer
        if is_python_function(name):
            return cast(Equivalence, python_function(name, what="equivalence"))
        kind, _, model = name.partition(":")
        if kind == "nli":
            return NLIEquivalence.from_pretrained(
                model or self.nli_model, mode=self.mode, cache_path=cache
            )
        unrelated = _unrelated(completions)
        embed: Embed
        if kind == "embedding":
            embed = sentence_transformer(model or self.embedding_model)
        elif policy is None:
            raise ValueError("equivalence=policy_states needs a policy to embed with.")
        else:
            embed = mean_state_embedding(policy, reference=unrelated)
        threshold = self.threshold if self.threshold is not None else thresholds.get(name)
        if threshold is None:
            threshold = unrelated_threshold(embed, unrelated, level=self.level)
            logger.info("Completions count as equivalent from a cosine of %.3f.", threshold)
        return EmbeddingEquivalence(embed, threshold=threshold)


def _unrelated(completions: Sequence[Sequence[str]]) -> list[str]:
    """Return one completion of each of the first prompts; blank ones are never compared."""
    spoken = [[text for text in texts if text.strip()] for texts in completions[:_CALIBRATION]]
    return [texts[0] for texts in spoken if texts]


def prompt_routes(rows: Sequence[PromptRow], *, route_by: str) -> dict[str, str]:
    """Return each row's value of a field by its prompt's key; rows without it are left out.

    Raises:
        DataError: One prompt comes with two values.
    """
    routes: dict[str, str] = {}
    for row in rows:
        value = row.extra.get(route_by)
        if value is None:
            continue
        known = routes.setdefault(prompt_key(row.prompt), str(value))
        if known != str(value):
            raise DataError(
                f"{row.where or 'a row'}: {route_by} is {str(value)!r}, but an earlier row has the "
                f"same prompt with {known!r}: give each prompt one {route_by}."
            )
    return routes


def write_synthetic(
    config: SPGConfig,
    rewards: FlatRewards,
    drawn: Drawn,
    folder: str | Path,
    *,
    policy: Policy | None = None,
    judge: Judge | None = None,
    equivalent: Equivalence | None = None,
    seed: int,
    routes_of: Mapping[str, str] | None = None,
) -> SyntheticResult:
    """Make synthetic preferences of the policy's samples, shard by shard.

    Into `folder` go `preferences.jsonl` (TRL's format, with the confidence, cluster sizes and
    rewards of each pair), `report.json`, and `shards/`: what became of every prompt, and why. A
    shard appears only when it is whole, and is never made again, so that a killed run ends with the
    bytes of an unbroken one, as long as the rewards give the same numbers again. Thresholds of
    embeddings are found once, over all prompts, and kept there too. Shards of other samples,
    settings, seeds, weights of the policy, or rewards (asked again about the first prompt) are made
    again; another judge is not noticed.

    Args:
        config: The rule, the equivalence, the shards.
        rewards: Flat lists of prompts and completions -> one number for each, from the current
            reward model. Not finite leaves a completion out.
        drawn: Prompts with their completions from the policy; the lists may differ in length.
        folder: Where all of it goes (and the labels of an NLI model, which are kept).
        policy: Embeds the texts for `policy_states`; the judge of `rlaif` where none is given.
        judge: For `rule=rlaif`.
        equivalent: Which samples say the same, instead of what the configuration names; another
            function is not noticed when a run is resumed.
        seed: Of the rejected sides, or of the pairs.
        routes_of: From a prompt's `prompt_key` to its value of `config.route_by`, such as
            `prompt_routes` returns.

    Raises:
        ValueError: Something that the rule or the equivalence needs was not given.
    """
    if config.rule == "rlaif" and judge is None:
        if policy is None:
            raise ValueError("rule=rlaif needs a judge, or the policy that is to judge.")
        judge = policy_judge(policy)
    folder = Path(folder)
    prompts = [prompt for prompt, _ in drawn]
    completions = [texts for _, texts in drawn]
    shards = folder / "shards"
    _open_shards(shards, _fingerprint(config, drawn, policy, seed, routes_of), rewards, drawn)
    starts = range(0, len(drawn), config.shard)
    files = {start: shards / f"{start:08d}.jsonl" for start in starts}
    rule: _Rule | None = None
    hidden = None if config.progress else True
    with tqdm(total=len(drawn), desc="spg", unit="prompt", disable=hidden) as bar:
        for start, file in files.items():
            some = slice(start, start + config.shard)
            if not file.exists():
                if rule is None:  # models are loaded only where there is something to do
                    rule = _rule(
                        config,
                        prompts,
                        completions,
                        folder,
                        policy,
                        judge,
                        equivalent,
                        seed,
                        routes_of,
                    )
                made = rule(
                    prompts[some],
                    completions[some],
                    _scores(rewards, prompts[some], completions[some]),
                )
                rows = [o.as_row(p) for o, p in zip(made, prompts[some], strict=True)]
                write_jsonl(file, rows)
            bar.update(len(prompts[some]))
    # All are read back, so that a resumed run writes from the same numbers as an unbroken one.
    rows = [row for file in files.values() for _, row in read_jsonl(file)]
    result = result_of(
        [PromptOutcome.from_row(row, prompt) for row, prompt in zip(rows, prompts, strict=True)],
        kinds=None
        if routes_of is None
        else [routes_of.get(prompt_key(prompt), "") for prompt in prompts],
        thresholds=_read_thresholds(shards),
    )
    write_jsonl(folder / "preferences.jsonl", result.to_rows())
    write_text(folder / "report.json", json.dumps(result.report.as_dict(), indent=2) + "\n")
    return result


def _rule(
    config: SPGConfig,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    folder: Path,
    policy: Policy | None,
    judge: Judge | None,
    equivalent: Equivalence | None,
    seed: int,
    routes_of: Mapping[str, str] | None,
) -> _Rule:
    """Return what makes the outcomes of a shard."""
    if config.rule == "reward":
        return partial(ranked_outcomes, seed=seed)
    if config.rule == "rlaif":
        assert judge is not None
        return partial(judged_outcomes, judge=judge, seed=seed)
    shards = folder / "shards"
    embeddings: dict[str, EmbeddingEquivalence] = {}
    if equivalent is None:
        equivalent = config.build(
            policy,
            completions,
            folder / "nli_cache.jsonl",
            prompts=prompts,
            routes_of=routes_of,
            thresholds=_read_thresholds(shards),
        )
        embeddings = _embeddings(config, equivalent)
    thresholds = {name: e.threshold for name, e in embeddings.items()}
    write_text(shards / "thresholds.json", json.dumps(thresholds))

    def of_shard(
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[str]],
        rewards: Sequence[Sequence[float]],
    ) -> list[PromptOutcome]:
        made = clustered_outcomes(
            prompts,
            completions,
            rewards,
            equivalent=equivalent,
            gamma=0.0 if config.rule == "select_all" else config.gamma,
            seed=seed,
            rejected=config.rejected,
        )
        # Embeddings are those of the shard alone: a resumed run has no others either.
        for embedding in embeddings.values():
            embedding.forget()
        return made

    return of_shard


def _embeddings(config: SPGConfig, equivalent: Equivalence) -> dict[str, EmbeddingEquivalence]:
    """Return the embedding equivalences by their names in the configuration."""
    named = {config.equivalence: equivalent}
    if isinstance(equivalent, RoutedEquivalence):
        named = {config.routes[route]: one for route, one in equivalent.routes.items()}
        if equivalent.default is not None:
            named[config.equivalence] = equivalent.default
    return {name: one for name, one in named.items() if isinstance(one, EmbeddingEquivalence)}


def _scores(
    rewards: FlatRewards, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]
) -> list[list[float]]:
    """Return the rewards of each prompt's completions, from one call."""
    flat = [text for texts in completions for text in texts]
    if not flat:
        return [[] for _ in completions]
    asked = [p for p, texts in zip(prompts, completions, strict=True) for _ in texts]
    found: Float[Tensor, " batch"] = rewards(asked, flat)
    if found.shape != (len(flat),):
        raise ValueError(
            f"The rewards must be one number for each completion, [batch]: asked about "
            f"{len(flat)}, they have shape {tuple(found.shape)}."
        )
    values = iter(found.double().tolist())
    return [[next(values) for _ in texts] for texts in completions]


# --- The folder of shards ------------------------------------------------------------------------


def _fingerprint(
    config: SPGConfig,
    drawn: Drawn,
    policy: Policy | None,
    seed: int,
    routes_of: Mapping[str, str] | None,
) -> str:
    """Return one string for equal inputs, the files of Python functions read in."""
    settings = {k: v for k, v in to_plain(config).items() if k not in _FREE}
    names = [config.equivalence, *config.routes.values()]
    files = [Path(n.rpartition(":")[0]) for n in names if is_python_function(n)]
    digest = hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode())
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    for prompt, texts in drawn:
        key = prompt_key(prompt)
        route = (routes_of or {}).get(key)
        digest.update(json.dumps([key, isinstance(prompt, str), texts, route]).encode())
    for parameter in policy.parameters() if policy is not None else ():
        digest.update(repr(parameter.detach().double().sum().item()).encode())
    return digest.hexdigest()


def _open_shards(shards: Path, fingerprint: str, rewards: FlatRewards, drawn: Drawn) -> None:
    """Keep the shards in the folder if they are this very run's, else begin with none."""
    asked = next(((prompt, texts) for prompt, texts in drawn if texts), None)
    sample = _scores(rewards, [asked[0]], [asked[1]])[0] if asked is not None else []
    found = [r if math.isfinite(r) else None for r in sample]
    file = shards / "made_of.json"
    if shards.exists():
        if file.exists() and _same(json.loads(file.read_text("utf-8")), fingerprint, found):
            return
        logger.warning(
            "%s holds shards of other samples, settings, weights or rewards: they are made again.",
            shards,
        )
        shutil.rmtree(shards)
        for stale in ("preferences.jsonl", "report.json"):
            (shards.parent / stale).unlink(missing_ok=True)
    shards.mkdir(parents=True)
    write_text(file, json.dumps({"inputs": fingerprint, "first_rewards": found}))


def _same(before: dict[str, Any], fingerprint: str, rewards: list[float | None]) -> bool:
    """Tell whether inputs are the same, and rewards the same up to what hardware rounds."""
    known = before["first_rewards"]
    if before["inputs"] != fingerprint or len(known) != len(rewards):
        return False
    return all(
        a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4)
        for a, b in zip(known, rewards, strict=True)
    )


def _read_thresholds(shards: Path) -> dict[str, float]:
    file = shards / "thresholds.json"
    if not file.exists():
        return {}
    found: dict[str, float] = json.loads(file.read_text("utf-8"))
    return found
