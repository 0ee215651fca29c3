import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trueward.data.formats import (
    Completion,
    DataError,
    Prompt,
    PromptRow,
    load_preferences,
    prompt_key,
)
from trueward.models.policy import Policy
from trueward.refine import spg
from trueward.refine.equivalence import (
    EmbeddingEquivalence,
    RoutedEquivalence,
    exact_answer,
    exact_match,
)
from trueward.refine.spg import SPGConfig, prompt_routes, write_synthetic
from trueward.refine.synthetic import (
    KindReport,
    SyntheticResult,
    judged_pairs,
    reward_ranked_pairs,
    synthetic_preferences,
)
from trueward.testing import tiny_language_model, tiny_texts

Drawn = list[tuple[Prompt, list[str]]]


def drawn_samples(count: int = 23) -> Drawn:
    """Prompts of both forms, lists of several lengths, blanks, twins, and a prompt without any."""
    noise = torch.Generator().manual_seed(2)
    out: Drawn = []
    for i in range(count):
        n = 3 + i % 4
        letters = torch.randint(0, 3, (n,), generator=noise).tolist()
        texts = [["blue", "Blue!", "the sky is red today"][k] for k in letters]
        if i == 5:
            texts = []
        if i % 7 == 3:
            texts[0] = " "
        prompt: Prompt = f"prompt {i}"
        out.append(([{"role": "user", "content": prompt}] if i % 3 == 0 else prompt, texts))
    return out


class Scorer:
    """Rewards that hang on the prompt and the text alone, and remember how often they were asked.

    Every eleventh text has none, unless `complete`.
    """

    def __init__(self, scale: float = 1.0, dies_at: int = -1, *, complete: bool = False) -> None:
        self.scale = scale
        self.complete = complete
        self.dies_at = dies_at
        self.calls: list[int] = []

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        if len(self.calls) == self.dies_at:
            raise KilledError
        self.calls.append(len(completions))
        keys = [sum(map(ord, prompt_key(p) + t)) for p, t in zip(prompts, completions, strict=True)]
        return torch.tensor(
            [
                math.nan if key % 11 == 0 and not self.complete else self.scale * math.sin(key)
                for key in keys
            ]
        )


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def ragged(scorer: Scorer, drawn: Drawn) -> list[list[float]]:
    return [scorer([p] * len(texts), texts).double().tolist() for p, texts in drawn]


def written(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "preferences.jsonl").read_bytes(), (folder / "report.json").read_bytes()


def quiet(**options: object) -> SPGConfig:
    return SPGConfig(**({"equivalence": "exact", "progress": False} | options))  # type: ignore[arg-type]


# --- SPGConfig -----------------------------------------------------------------------------------


def test_defaults_are_the_papers_rule() -> None:
    config = SPGConfig()
    assert (config.rule, config.gamma, config.rejected) == ("spg", 0.5, "uniform")
    assert (config.equivalence, config.mode, config.level) == ("policy_states", "relaxed", 0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"gamma is a confidence in \[0, 1\], got 1.5"),
        ({"level": 1.0}, r"level is a share of pairs in \(0, 1\)"),
        ({"threshold": 85.0}, r"threshold is a cosine in \[-1, 1\]"),
        ({"shard": 0}, "shard must be at least 1 prompt"),
        ({"equivalence": "same"}, "equivalence must be one of exact, answer.* got 'same'"),
        ({"equivalence": "nli:"}, "equivalence must be one of"),
        ({"equivalence": "file.py"}, "equivalence must be one of"),
        ({"routes": {"de": "exakt"}}, r"routes\.de must be one of .*, got 'exakt'"),
        ({"rule": "rlaif", "rejected": "length_matched"}, "rule=rlaif draws both sides"),
        ({"rule": "reward", "rejected": "length_matched"}, "rule=reward draws both sides"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPGConfig(**options)  # type: ignore[arg-type]


def test_equivalences_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SPGConfig(equivalence="exact").build(None, []) is exact_match
    assert SPGConfig(equivalence="answer").build(None, []) is exact_answer
    loaded: list[tuple[str, object]] = []
    monkeypatch.setattr(
        spg.NLIEquivalence,
        "from_pretrained",
        lambda name, **options: loaded.append((name, options)) or exact_match,
    )
    SPGConfig(equivalence="nli", mode="strict").build(None, [], Path("labels"))
    SPGConfig(equivalence="nli:some/model").build(None, [])
    assert loaded == [
        ("microsoft/deberta-large-mnli", {"mode": "strict", "cache_path": Path("labels")}),
        ("some/model", {"mode": "relaxed", "cache_path": None}),
    ]
    with pytest.raises(ValueError, match="needs a policy to embed with"):
        SPGConfig().build(None, [["a"], ["b"]])


def test_a_python_function_is_an_equivalence(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def first_letter(prompts, firsts, seconds):\n"
        "    return [a[0] == b[0] for a, b in zip(firsts, seconds)]\n",
        encoding="utf-8",
    )
    config = quiet(equivalence=f"{file}:first_letter")
    result = write_synthetic(
        config, Scorer(complete=True), [("p", ["ab", "ac", "b"])], tmp_path / "out", seed=0
    )
    assert result.preferences[0].cluster_sizes == (2, 1)
    with pytest.raises(DataError, match="has no function 'other'"):
        quiet(equivalence=f"{file}:other").build(None, [])


def fake_embedding(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Sentence embeddings whose directions hang on the texts' letters; calls are remembered."""
    seen: list[tuple[str, list[str]]] = []

    def made(name: str) -> Callable[[list[str]], Tensor]:
        def embed(texts: list[str]) -> Tensor:
            seen.append((name, texts))
            vectors = [
                [math.sin(3 * sum(map(ord, t)) + d) + len(t) for d in range(4)] for t in texts
            ]
            return torch.tensor(vectors)

        return embed

    monkeypatch.setattr(spg, "sentence_transformer", made)
    return seen


def test_the_threshold_is_calibrated_on_one_spoken_completion_of_each_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = fake_embedding(monkeypatch)
    completions = [["a cat", "a dog"], [" ", "a bird"], [], ["  "], ["a cow"]]
    built = SPGConfig(equivalence="embedding:some/model").build(None, completions)
    assert seen == [("some/model", ["a cat", "a bird", "a cow"])]
    assert isinstance(built, EmbeddingEquivalence)
    fixed = SPGConfig(equivalence="embedding", threshold=0.25).build(None, completions)
    assert isinstance(fixed, EmbeddingEquivalence)
    assert fixed.threshold == 0.25
    assert len(seen) == 1


def test_routes_are_calibrated_on_the_prompts_that_they_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = fake_embedding(monkeypatch)
    config = SPGConfig(
        equivalence="embedding", routes={"de": "exact", "fr": "embedding:fr", "it": "answer"}
    )
    prompts: list[Prompt] = ["a", "b", "c", "d", "e"]
    completions = [["one"], ["zwei"], ["trois"], ["quatre"], ["five"]]
    routes_of = {prompt_key(p): r for p, r in zip("bcde", ["de", "fr", "fr", "en"], strict=True)}
    built = config.build(None, completions, prompts=prompts, routes_of=routes_of)
    assert isinstance(built, RoutedEquivalence)
    assert set(built.routes) == {"de", "fr"}  # nothing is loaded for "it"
    assert built.equivalence_of("b") is exact_match
    assert built.equivalence_of("e") is built.default
    assert seen == [
        (config.embedding_model, ["one", "five"]),
        ("fr", ["trois", "quatre"]),
    ]
    # A single text cannot be compared with others: then all prompts calibrate.
    seen.clear()
    few = {prompt_key("a"): "fr"} | {prompt_key(p): "de" for p in "bcde"}
    built = config.build(None, completions, prompts=prompts, routes_of=few)
    assert seen == [("fr", ["one", "zwei", "trois", "quatre", "five"])]
    assert isinstance(built, RoutedEquivalence)
    assert built.default is None
    with pytest.raises(ValueError, match="Routes need the prompts"):
        config.build(None, completions)


def test_routes_come_from_a_field_of_the_rows() -> None:
    rows = [
        PromptRow("a", extra={"lang": "de"}),
        PromptRow([{"role": "user", "content": "b"}], extra={"lang": 7}),
        PromptRow("c", extra={"kind": "x"}),
        PromptRow("a", extra={"lang": "de"}),
    ]
    assert prompt_routes(rows, route_by="lang") == {prompt_key("a"): "de", prompt_key("b"): "7"}
    rows.append(PromptRow("a", where="rows.jsonl:5", extra={"lang": "fr"}))
    with pytest.raises(DataError, match=r"rows\.jsonl:5: lang is 'fr', .* same prompt with 'de'"):
        prompt_routes(rows, route_by="lang")


# --- write_synthetic -----------------------------------------------------------------------------


def in_memory(rule: str, drawn: Drawn) -> SyntheticResult:
    prompts, completions = [p for p, _ in drawn], [t for _, t in drawn]
    rewards = ragged(Scorer(), drawn)
    if rule == "reward":
        return reward_ranked_pairs(prompts, completions, rewards, seed=4)
    if rule == "rlaif":
        return judged_pairs(prompts, completions, rewards, judge=shorter, seed=4)
    return synthetic_preferences(
        prompts,
        completions,
        rewards,
        equivalent=exact_match,
        gamma=0.0 if rule == "select_all" else 0.5,
        seed=4,
    )


def shorter(
    prompts: Sequence[Prompt], one: Sequence[Completion], other: Sequence[Completion]
) -> Tensor:
    lengths = torch.tensor([[len(a), len(b)] for a, b in zip(one, other, strict=True)])
    return (lengths[:, 0] < lengths[:, 1]).double() * 0.5 + 0.3


@pytest.mark.parametrize("rule", ["spg", "select_all", "reward", "rlaif"])
def test_shards_of_any_size_give_what_all_prompts_give_at_once(tmp_path: Path, rule: str) -> None:
    drawn = drawn_samples()
    expected = in_memory(rule, drawn)
    assert expected.report.accepted > 5
    bytes_ = set()
    for shard in (1, 4, 1000):
        config = quiet(rule=rule, shard=shard)
        out = tmp_path / str(shard)
        assert write_synthetic(config, Scorer(), drawn, out, judge=shorter, seed=4) == expected
        assert len(list((out / "shards").glob("*.jsonl"))) == math.ceil(23 / shard)
        bytes_.add(written(out))
    assert len(bytes_) == 1


def test_select_all_is_gamma_zero_and_accepts_more(tmp_path: Path) -> None:
    drawn = drawn_samples()
    made = {
        name: write_synthetic(config, Scorer(), drawn, tmp_path / name, seed=0)
        for name, config in (
            ("select_all", quiet(rule="select_all", gamma=0.9)),
            ("zero", quiet(gamma=0.0)),
            ("half", quiet()),
        )
    }
    assert made["select_all"] == made["zero"]
    assert made["half"].report.accepted < made["zero"].report.accepted


def test_files_hold_preferences_a_report_and_every_prompts_outcome(tmp_path: Path) -> None:
    drawn: Drawn = [
        ("sky?", ["blue", "red", "Blue."]),
        ([{"role": "user", "content": "life?"}], ["a", "b", "c", "a"]),
        ("same?", ["yes", "Yes"]),
        ("none?", [" ", ""]),
    ]
    config = quiet(gamma=0.6)
    result = write_synthetic(config, Scorer(complete=True), drawn, tmp_path, seed=0)
    loaded = load_preferences(tmp_path / "preferences.jsonl").rows
    assert [(r.prompt, r.rejected) for r in loaded] == [("sky?", "red")]
    assert loaded[0].extra["confidence"] == pytest.approx(2 / 3)
    assert loaded[0].extra["cluster_sizes"] == [2, 1]
    assert loaded[0].extra["chosen_reward"] == result.preferences[0].chosen_reward
    lines = (tmp_path / "shards" / "00000000.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["outcome"] for row in rows] == [
        "accepted",
        "low confidence",
        "single cluster",
        "no completions",
    ]
    assert (rows[1]["clusters"], rows[1]["duplicates"]) == ([0, 1, 2, 0], 1)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == result.report.as_dict()
    assert (report["accepted"], report["left_out"], report["acceptance_rate"]) == (1, 2, 0.25)


@pytest.mark.parametrize("deaths", [[2], [3, 1, 4]])
def test_a_killed_run_goes_on_after_its_last_shard_and_ends_with_the_same_bytes(
    tmp_path: Path, deaths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = fake_embedding(monkeypatch)
    drawn = drawn_samples()
    config = quiet(equivalence="embedding", shard=3)
    unbroken = write_synthetic(config, Scorer(), drawn, tmp_path / "unbroken", seed=1)
    assert len(set(unbroken.report.cluster_counts)) > 1, "a test of clusters needs several"
    calls = list(seen)
    shards_done = 0
    for death in deaths:
        scorer = Scorer(dies_at=death)
        with pytest.raises(KilledError):
            write_synthetic(config, scorer, drawn, tmp_path / "killed", seed=1)
        shards_done += death - 1  # the first call asks for the fingerprint
        assert len(list((tmp_path / "killed" / "shards").glob("0*.jsonl"))) == shards_done
        assert not (tmp_path / "killed" / "preferences.jsonl").exists()
    seen.clear()
    last = Scorer()
    assert write_synthetic(config, last, drawn, tmp_path / "killed", seed=1) == unbroken
    assert len(last.calls) == 1 + 8 - shards_done
    assert written(tmp_path / "killed") == written(tmp_path / "unbroken")
    # The threshold was kept, and the shards that were left are embedded as they always are.
    assert 0 < len(seen) < len(calls)
    assert seen == calls[-len(seen) :]


def test_a_finished_folder_is_read_and_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = drawn_samples()
    before = write_synthetic(quiet(), Scorer(), drawn, tmp_path, seed=0)
    files = written(tmp_path)
    monkeypatch.setattr(SPGConfig, "build", None)
    scorer = Scorer()
    assert write_synthetic(quiet(), scorer, drawn, tmp_path, seed=0) == before
    assert len(scorer.calls) == 1
    assert written(tmp_path) == files


def test_the_threshold_is_that_of_all_prompts_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_embedding(monkeypatch)
    drawn = drawn_samples()
    results = [
        write_synthetic(
            quiet(equivalence="embedding", shard=shard),
            Scorer(),
            drawn,
            tmp_path / str(shard),
            seed=0,
        )
        for shard in (1, 5, 1000)
    ]
    assert results[0] == results[1] == results[2]
    expected = SPGConfig(equivalence="embedding").build(None, [texts for _, texts in drawn])
    assert isinstance(expected, EmbeddingEquivalence)
    assert results[0].report.thresholds == {"embedding": expected.threshold}
    assert 0.5 < expected.threshold < 1


def test_policy_states_do_not_hang_on_the_shards(tmp_path: Path, trained_tokenizer: object) -> None:
    policy = Policy(tiny_language_model(), trained_tokenizer)  # type: ignore[arg-type]
    texts = tiny_texts(14)
    drawn: Drawn = [
        (f"p{i}", [texts[i], texts[i] + " .", texts[i] + " !", texts[i + 7]]) for i in range(7)
    ]
    config = quiet(equivalence="policy_states", level=0.95, gamma=0.25)
    whole, parts = (
        write_synthetic(
            dataclasses.replace(config, shard=shard),
            Scorer(),
            drawn,
            tmp_path / str(shard),
            policy=policy,
            seed=0,
        )
        for shard in (1000, 2)
    )
    assert whole.preferences == parts.preferences
    assert whole.report == parts.report
    assert whole.report.accepted > 0
    assert set(whole.report.thresholds) == {"policy_states"}


@pytest.mark.parametrize(
    "change",
    ["drawn", "seed", "gamma", "rewards", "shard", "routes", "policy", "function", "form"],
)
def test_shards_of_another_run_are_made_again(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture, trained_tokenizer: object
) -> None:
    mine = tmp_path / "mine.py"
    same = (
        "def same(prompts, firsts, seconds):\n    return [a == b for a, b in zip(firsts, seconds)]"
    )
    mine.write_text(same, encoding="utf-8")
    policy = Policy(tiny_language_model(), trained_tokenizer)  # type: ignore[arg-type]
    config, drawn = quiet(equivalence=f"{mine}:same", shard=5), drawn_samples()
    options: dict[str, object] = {"policy": policy, "seed": 0}
    out = tmp_path / "out"
    write_synthetic(config, Scorer(), drawn, out, **options)  # type: ignore[arg-type]
    scorer = Scorer()
    if change == "drawn":
        drawn = [*drawn[:-1], (drawn[-1][0], ["other", "texts"])]
    elif change == "form":
        drawn[1] = ([{"role": "user", "content": drawn[1][0]}], drawn[1][1])
    elif change == "seed":
        options["seed"] = 1
    elif change == "gamma":
        config = dataclasses.replace(config, gamma=0.4)
    elif change == "shard":
        config = dataclasses.replace(config, shard=6)
    elif change == "rewards":
        scorer = Scorer(scale=1.01)
    elif change == "routes":
        options["routes_of"] = {prompt_key("prompt 1"): "de"}
    elif change == "policy":
        options["policy"] = Policy(tiny_language_model(seed=1), trained_tokenizer)  # type: ignore[arg-type]
    else:
        mine.write_text(same.replace("a == b", "a[:1] == b[:1]"), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        again = write_synthetic(config, scorer, drawn, out, **options)  # type: ignore[arg-type]
    assert "they are made again" in caplog.text
    assert len(scorer.calls) == 1 + len(list((out / "shards").glob("0*.jsonl")))
    fresh = write_synthetic(config, scorer, drawn, tmp_path / "fresh", **options)  # type: ignore[arg-type]
    assert again == fresh


def test_a_stale_result_does_not_outlive_its_shards(tmp_path: Path) -> None:
    drawn = drawn_samples()
    write_synthetic(quiet(), Scorer(), drawn, tmp_path, seed=0)
    with pytest.raises(KilledError):
        write_synthetic(quiet(), Scorer(dies_at=1), drawn, tmp_path, seed=1)
    assert not (tmp_path / "preferences.jsonl").exists()
    assert not (tmp_path / "report.json").exists()


def test_rewards_that_rounding_changes_are_the_same_rewards(tmp_path: Path) -> None:
    drawn = drawn_samples()
    write_synthetic(quiet(), Scorer(), drawn, tmp_path, seed=0)
    scorer = Scorer(scale=1 + 1e-6)
    write_synthetic(dataclasses.replace(quiet(), progress=True), scorer, drawn, tmp_path, seed=0)
    assert len(scorer.calls) == 1


def test_the_policy_judges_where_no_judge_is_given(
    tmp_path: Path, trained_tokenizer: object
) -> None:
    policy = Policy(tiny_language_model(), trained_tokenizer)  # type: ignore[arg-type]
    drawn = drawn_samples(4)
    config = quiet(rule="rlaif")
    made = write_synthetic(config, Scorer(), drawn, tmp_path / "a", policy=policy, seed=0)
    same = write_synthetic(
        config, Scorer(), drawn, tmp_path / "b", judge=spg.policy_judge(policy), seed=0
    )
    assert made == same
    assert made.report.accepted > 0
    with pytest.raises(ValueError, match="rule=rlaif needs a judge"):
        write_synthetic(config, Scorer(), drawn, tmp_path / "c", seed=0)


def test_acceptance_is_reported_by_route_and_routes_decide(tmp_path: Path) -> None:
    drawn: Drawn = [("a", ["1.0", "1", "2"]), ("b", ["1.0", "1", "2"]), ("c", ["x", "x", "y"])]
    routes_of = {prompt_key("a"): "number", prompt_key("b"): "text"}
    config = quiet(gamma=0.6, routes={"number": "answer"})
    report = write_synthetic(
        config, Scorer(complete=True), drawn, tmp_path, seed=0, routes_of=routes_of
    ).report
    assert report.by_kind == {
        "": KindReport(prompts=1, accepted=1, acceptance_rate=1.0, mean_confidence=2 / 3),
        "number": KindReport(prompts=1, accepted=1, acceptance_rate=1.0, mean_confidence=2 / 3),
        "text": KindReport(prompts=1, accepted=0, acceptance_rate=0.0, mean_confidence=1 / 3),
    }
    with pytest.raises(ValueError, match="Routes need the prompts"):
        write_synthetic(config, Scorer(), drawn, tmp_path / "none", seed=0)


def test_length_matching_reaches_the_pairs(tmp_path: Path) -> None:
    drawn: Drawn = [
        (f"p{i}", ["12345678", "12345678", "a", "1234567890", "b", "c"]) for i in range(20)
    ]
    config = quiet(gamma=0.3, rejected="length_matched")
    made = write_synthetic(config, Scorer(complete=True), drawn, tmp_path / "matched", seed=0)
    assert {p.rejected for p in made.preferences if p.chosen == "12345678"} == {"1234567890"}
    loose = write_synthetic(
        quiet(gamma=0.3), Scorer(complete=True), drawn, tmp_path / "uniform", seed=0
    )
    assert len({p.rejected for p in loose.preferences}) > 2


def test_no_prompts_and_wrong_rewards(tmp_path: Path) -> None:
    empty = write_synthetic(quiet(), Scorer(), [], tmp_path / "empty", seed=0)
    assert (empty.report.prompts, empty.report.acceptance_rate) == (0, None)
    assert (tmp_path / "empty" / "preferences.jsonl").read_bytes() == b""

    def column(prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        return torch.zeros(len(completions), 1)

    with pytest.raises(ValueError, match=r"one number for each completion.* shape \(2, 1\)"):
        write_synthetic(quiet(), column, [("p", ["a", "b"])], tmp_path / "x", seed=0)
