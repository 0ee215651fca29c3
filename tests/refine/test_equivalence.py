import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trueward.data.formats import DataError, Prompt, prompt_key
from trueward.refine.equivalence import (
    EmbeddingEquivalence,
    Equivalence,
    NLIEquivalence,
    NLILabel,
    RoutedEquivalence,
    cluster,
    exact_answer,
    exact_match,
    last_number,
    nli_equivalent,
    nli_label_order,
    normalise_text,
    related_threshold,
    sentence_transformer,
)
from trueward.testing import tiny_config

WORDS = [
    *("sky", "is", "blue", "red", "green", "why", "the", "a", "it"),
    *("not", "because", "of", "light", "what", "colour", "cold", "hot"),
]


@pytest.fixture
def without_annotation_checks() -> Iterator[None]:
    """As users run it: our own errors speak, not the annotation check that tests add."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tokenizer(model_max_length: int = 64) -> PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    made = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]")  # type: ignore[call-arg]
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def nli_model(seed: int = 0, *labels: str) -> PreTrainedModel:
    names = labels or ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    torch.manual_seed(seed)
    config = tiny_config(
        "bert", vocab_size=32, num_labels=len(names), id2label=dict(enumerate(names))
    )
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.eval()
    for parameter in model.parameters():  # BERT's own scale hardly reads the text
        torch.nn.init.normal_(parameter, std=0.5)
    ids = tokenizer()(texts(50), texts(51)[1:], padding=True, return_tensors="pt")
    with torch.no_grad():  # without this one label would win for every text
        model.classifier.bias -= model(**ids).logits.mean(0)
    return model


def texts(count: int, *, longest: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())
        for n in lengths
    ]


class Recorder:
    """An equivalence that remembers what it was asked."""

    def __init__(self, same: Callable[[str, str], bool]) -> None:
        self.same = same
        self.calls: list[list[tuple[Prompt, str, str]]] = []

    def __call__(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        self.calls.append(list(zip(prompts, firsts, seconds, strict=True)))
        return [self.same(a, b) for a, b in zip(firsts, seconds, strict=True)]


# --- cluster -------------------------------------------------------------------------------------


def test_clusters_are_numbered_by_first_appearance() -> None:
    completions = [["Blue.", "red", "blue", "Green", "RED"], ["a", "b"], [], ["x"]]
    ids = cluster(["p", "q", "r", "s"], completions, exact_match)
    assert ids == [[0, 1, 0, 2, 1], [0, 1], [], [0]]


def test_clustering_compares_with_the_first_member_only_so_order_matters() -> None:
    near = Recorder(lambda a, b: abs(int(a) - int(b)) <= 1)
    # 2 joins 1; 3 is near to 2 but not to 1, the cluster's first member.
    assert cluster(["p"], [["1", "2", "3"]], near) == [[0, 0, 1]]
    assert cluster(["p"], [["2", "1", "3"]], near) == [[0, 0, 0]]


def test_of_several_equivalent_clusters_the_first_is_joined() -> None:
    near = Recorder(lambda a, b: abs(int(a) - int(b)) <= 2)
    assert cluster(["p"], [["1", "4", "3"]], near) == [[0, 1, 0]]
    assert cluster(["p"], [["4", "1", "3"]], near) == [[0, 1, 0]]


def test_prompts_go_in_step_and_only_new_texts_are_compared() -> None:
    never = Recorder(lambda a, b: False)
    ids = cluster(["p", "q"], [["a", "b", "a", "c"], ["d", "d", "e"]], never)
    assert ids == [[0, 1, 0, 2], [0, 0, 1]]
    assert never.calls == [
        [("p", "a", "b")],  # q's second completion is its first again
        [("q", "d", "e")],  # p's third is its first again
        [("p", "a", "c"), ("p", "b", "c")],
    ]


def test_a_prompt_is_clustered_as_if_alone() -> None:
    near = Recorder(lambda a, b: abs(int(a) - int(b)) <= 1)
    lists = [["5", "9", "6", "1"], ["1"], ["3", "2", "1", "4", "8"]]
    together = cluster(["p", "q", "r"], lists, near)
    assert together == [cluster(["p"], [one], near)[0] for one in lists]


def test_a_twin_joins_the_cluster_its_text_joined_before() -> None:
    once = Recorder(lambda a, b: b == "b")
    assert cluster(["p"], [["a", "b", "c", "b"]], once) == [[0, 0, 1, 0]]


def test_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 prompts, 1 completions"):
        cluster(["p", "q"], [["a"]], exact_match)
    with pytest.raises(ValueError, match=r"asked about 1, it gave 0 answers"):
        cluster(["p"], [["a", "b"]], lambda prompts, firsts, seconds: [])
    with pytest.raises(ValueError, match="got 1 prompts, 2 firsts, 1 seconds"):
        exact_match(["p"], ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="equally long"):
        exact_answer(["p"], ["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("strict", [0, 1, 2, 3, 4]),
        ("relaxed", [0, 0, 1, 2, 3]),
        ("no_contradiction", [0] * 4 + [1]),
    ],
)
def test_modes_give_the_partitions_of_a_fake_nli(mode: str, expected: list[int]) -> None:
    # Forward and backward label of "seed" with each other text; the rest contradict each other.
    table = {
        "one way": ("entailment", "neutral"),
        "neutral": ("neutral", "neutral"),
        "also neutral": ("neutral", "neutral"),
        "contrary": ("entailment", "contradiction"),
    }

    def equivalent(
        prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[bool]:
        none = ("contradiction", "contradiction")
        labels = [table[b] if a == "seed" else none for a, b in zip(firsts, seconds, strict=True)]
        return nli_equivalent([a for a, _ in labels], [b for _, b in labels], mode=mode)  # type: ignore[arg-type,misc]

    assert cluster(["p"], [["seed", *table]], equivalent) == [expected]


# --- By text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Sky\nis BLUE!! ", "the sky is blue"),
        ("**Paris**.", "paris"),
        ("“Straße”", "strasse"),
        ("ﬁve", "five"),
        ("Ⅳ", "iv"),
        ("-5.", "-5"),
        ("- 5", "5"),
        (".5", ".5"),
        ("... 5", "5"),
        ("5%", "5%"),
        ("C#.", "c#"),
        ("a, b", "a, b"),
        ("?!", "?!"),
        ("   ", ""),
        ("don't", "don't"),
    ],
)
def test_normalised_texts(text: str, expected: str) -> None:
    assert normalise_text(text) == expected


def test_exact_match_ignores_form_but_not_content() -> None:
    firsts = ["Blue!", "a cat", "5", "5", "?"]
    seconds = ["(blue)", "the cat", "-5", "5%", "!"]
    assert exact_match(["p"] * 5, firsts, seconds) == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays 3 * 4 = $1,250.00.", 1250),
        ("#### 42", 42),
        ("The answer is 42.", 42),
        ("so -$5", -5),
        ("so $-5.50", Fraction(-11, 2)),
        ("so −7", -7),
        ("10-4", 4),
        ("10 - 4", 4),
        ("a 3-5", 5),
        (".5", Fraction(1, 2)),
        ("it is 2/3 of it", Fraction(2, 3)),
        ("24 / 2", 12),
        ("5/0", 5),
        ("1e6", 1_000_000),
        ("2.5E-1", Fraction(1, 4)),
        ("1,2,3", 3),
        ("1,000,000 or 1,00,000", 100_000),
        ("(1,234)", 1234),
        ("5kg", 5),
        ("x=7", 7),
        ("答案是9。", 9),
        ("12 H2O", 12),
        ("none", None),
        ("A1", None),
        ("9" * 5000, None),
    ],
)
def test_last_numbers(text: str, expected: Fraction | int | None) -> None:
    assert last_number(text) == expected


def test_exact_answer_compares_numbers_and_falls_back_to_the_text() -> None:
    firsts = ["1 + 1 = 2", "It is $1,000.", "2", "two", "Two!", "2"]
    seconds = ["2.0", "1000", "3", "2", "two", "two"]
    expected = [True, True, False, False, True, False]
    assert exact_answer(["p"] * 6, firsts, seconds) == expected


# --- By embeddings -------------------------------------------------------------------------------


def embed_numbers(seen: list[list[str]]) -> Callable[[list[str]], Float[Tensor, "text dim"]]:
    """Texts are angles in degrees."""

    def embed(some: list[str]) -> Tensor:
        seen.append(some)
        angles = torch.tensor([float(text) for text in some]).deg2rad()
        return 7 * torch.stack([angles.cos(), angles.sin()], dim=1)

    return embed


def test_embeddings_are_compared_by_cosine_and_computed_once() -> None:
    seen: list[list[str]] = []
    near = EmbeddingEquivalence(embed_numbers(seen), threshold=0.5)
    # cos 59 = 0.515, cos 61 = 0.485
    answers = near(["p"] * 4, ["0", "0", "10", "0"], ["59", "61", "69", "180"])
    assert answers == [True, False, True, False]
    assert near(["q"], ["59"], ["0"]) == [True]
    assert near([], [], []) == []
    assert near(["q"], ["59"], ["90"]) == [True]
    assert seen == [["0", "10", "59", "61", "69", "180"], ["90"]]


def test_forgotten_embeddings_are_computed_again() -> None:
    seen: list[list[str]] = []
    near = EmbeddingEquivalence(embed_numbers(seen), threshold=0.5)
    before = near(["p"], ["0"], ["59"])
    near.forget()
    assert near(["p"], ["0"], ["59"]) == before
    assert seen == [["0", "59"]] * 2


def test_default_threshold_is_085() -> None:
    near = EmbeddingEquivalence(embed_numbers([]))
    assert near(["p", "p"], ["0", "0"], ["31", "32"]) == [True, False]  # cos 0.857, 0.848


def test_the_threshold_is_inclusive() -> None:
    axes = EmbeddingEquivalence(lambda some: torch.eye(2)[: len(some)], threshold=0.0)
    assert axes(["p"], ["0"], ["1"]) == [True]  # orthogonal: exactly 0


def test_a_text_is_itself_at_any_threshold() -> None:
    near = EmbeddingEquivalence(lambda some: torch.zeros(len(some), 3), threshold=1.0)
    assert near(["p", "p"], ["0", "0"], ["0", "1"]) == [True, False]


def test_embedding_errors_say_what_came() -> None:
    with pytest.raises(ValueError, match=r"cosine similarity in \[-1, 1\], got 85"):
        EmbeddingEquivalence(embed_numbers([]), threshold=85.0)
    wrong = EmbeddingEquivalence(lambda some: torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"given 2 texts, it returned shape \(1, 3\)"):
        wrong(["p"], ["0"], ["1"])


def test_sentence_transformers_are_used_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class SentenceTransformer:
        def __init__(self, name: str, device: str | None) -> None:
            self.name = name

        def encode(self, some: list[str], **options: object) -> Tensor:
            assert options["convert_to_tensor"]
            return torch.tensor([[float(len(t)), float(len(self.name))] for t in some])

    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    torch.testing.assert_close(
        sentence_transformer("abc")(["a", "bb"]), torch.tensor([[1.0, 3.0], [2.0, 3.0]])
    )


def test_a_missing_sentence_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"install trueward\[embeddings\]"):
        sentence_transformer("some/name")


# --- By entailment -------------------------------------------------------------------------------


def test_nli_rules_on_all_nine_pairs_of_labels() -> None:
    labels = ["contradiction", "neutral", "entailment"]
    forward = [a for a in labels for _ in labels]
    backward = labels * 3
    strict = nli_equivalent(forward, backward, mode="strict")  # type: ignore[arg-type]
    relaxed = nli_equivalent(forward, backward, mode="relaxed")  # type: ignore[arg-type]
    lenient = nli_equivalent(forward, backward, mode="no_contradiction")  # type: ignore[arg-type]
    # Rows: contradiction, neutral, entailment forward; columns the same backward.
    assert torch.tensor(strict).view(3, 3).int().tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert torch.tensor(relaxed).view(3, 3).int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1]]
    assert torch.tensor(lenient).view(3, 3).int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_an_unknown_mode_is_refused(without_annotation_checks: None) -> None:
    with pytest.raises(ValueError, match="strict, no_contradiction, got 'loose'"):
        nli_equivalent([], [], mode="loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'loose'"):
        NLIEquivalence(nli_model(), tokenizer(), mode="loose")  # type: ignore[arg-type]


def test_labels_are_found_by_name() -> None:
    order = nli_label_order({0: "Entailment", 1: "NEUTRAL", 2: "contradiction"})
    assert order == ["entailment", "neutral", "contradiction"]
    assert nli_label_order({"2": "neutral", "0": "contradiction", "1": "entailment"}) == [
        "contradiction",
        "entailment",
        "neutral",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["entailment", "not_entailment"],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["entailment", "entailment", "neutral"],
        ["contradiction", "neutral", "entailment", "other"],
    ],
)
def test_models_of_other_labels_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="must name its labels contradiction, neutral"):
        nli_label_order(dict(enumerate(names)))
    with pytest.raises(ValueError, match=r"set model\.config\.id2label"):
        nli_label_order(None)


def reference_labels(
    model: PreTrainedModel, pairs: list[tuple[str, str]], max_length: int = 64
) -> list[str]:
    """One pair at a time, no padding."""
    names = model.config.id2label
    assert names is not None
    found = []
    for text, text_pair in pairs:
        ids = tokenizer()(
            text, text_pair, return_tensors="pt", truncation=True, max_length=max_length
        )
        with torch.no_grad():
            found.append(names[int(model(**ids).logits.argmax())].lower())  # type: ignore[index]
    return found


def test_labels_are_those_of_single_forward_passes() -> None:
    model = nli_model()
    premises, hypotheses = texts(40)[:20], texts(40)[20:]
    nli = NLIEquivalence(model, tokenizer(), batch_size=7)
    pairs = [(f"what is it {a}", f"what is it {b}") for a, b in zip(premises, hypotheses)]  # noqa: B905
    expected = reference_labels(model, pairs)
    assert len(set(expected)) == 3, "a test of labels needs all of them"
    prompts: list[Prompt] = ["what is it"] * 10
    prompts += [[{"role": "user", "content": "what is it"}]] * 10
    assert nli.labels(prompts, premises, hypotheses) == expected


def test_label_order_comes_from_the_config() -> None:
    model = nli_model()
    before = NLIEquivalence(model, tokenizer()).labels(["it"] * 9, texts(9), texts(10)[1:])
    model.config.id2label = {0: "entailment", 1: "neutral", 2: "contradiction"}
    after = NLIEquivalence(model, tokenizer()).labels(["it"] * 9, texts(9), texts(10)[1:])
    swap = {"contradiction": "entailment", "neutral": "neutral", "entailment": "contradiction"}
    assert after == [swap[label] for label in before]


def test_both_directions_decide() -> None:
    model = nli_model()
    firsts, seconds = texts(60)[:30], texts(60)[30:]
    nli = NLIEquivalence(model, tokenizer(), mode="strict")
    pairs = [(f"why {a}", f"why {b}") for a, b in zip(firsts, seconds, strict=True)]
    forward = reference_labels(model, pairs)
    backward = reference_labels(model, [(b, a) for a, b in pairs])
    for mode in ("strict", "relaxed", "no_contradiction"):
        nli.mode = mode  # type: ignore[assignment]
        expected = nli_equivalent(forward, backward, mode=mode)  # type: ignore[arg-type]
        assert nli(["why"] * 30, firsts, seconds) == expected
        assert nli(["why"] * 30, seconds, firsts) == expected


def count_rows(model: PreTrainedModel) -> list[int]:
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_each_pair_is_computed_once_in_batches() -> None:
    model = nli_model()
    rows = count_rows(model)
    nli = NLIEquivalence(model, tokenizer(), batch_size=4)
    first = nli(["why"] * 4, ["a", "a", "it", "a"], ["it", "red", "a", "it"])
    # a-it, a-red, it-a, red-a: four different directed pairs among eight.
    assert rows == [4]
    assert nli(["why"] * 4, ["a", "a", "it", "a"], ["it", "red", "a", "it"]) == first
    assert rows == [4]
    nli(["what"] * 3, ["a", "a", "it"], ["it", "red", "red"])  # another prompt, six pairs
    assert rows == [4, 4, 2]


def test_the_file_serves_a_second_run_and_its_torn_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "nli.jsonl"
    model = nli_model()
    firsts, seconds = texts(12)[:6], texts(12)[6:]
    expected = NLIEquivalence(model, tokenizer(), cache_path=path)(["why"] * 6, firsts, seconds)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    record = json.loads(lines[0])
    assert set(record) == {"key", "label"}
    assert len(record["key"]) == 64
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40], encoding="utf-8")

    rows = count_rows(model)
    again = NLIEquivalence(model, tokenizer(), cache_path=path)
    assert again(["why"] * 6, firsts, seconds) == expected
    assert rows == [1]  # the torn one
    # What is appended after the torn line starts a line of its own.
    third = NLIEquivalence(model, tokenizer(), cache_path=str(path))
    assert third(["why"] * 6, firsts, seconds) == expected
    assert rows == [1]
    assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_file_of_another_model_or_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "nli.jsonl"
    model = nli_model()
    rows = count_rows(model)
    NLIEquivalence(model, tokenizer(), cache_path=path)(["why"], ["a"], ["it"])
    NLIEquivalence(model, tokenizer(), cache_path=path, max_length=32)(["why"], ["a"], ["it"])
    model.config._name_or_path = "another"
    NLIEquivalence(model, tokenizer(), cache_path=path)(["why"], ["a"], ["it"])
    assert rows == [2, 2, 2]


def read_ids(model: PreTrainedModel) -> list[list[str]]:
    seen: list[list[str]] = []
    made = tokenizer()

    def look(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        seen.extend(made.convert_ids_to_tokens(row) for row in kwargs["input_ids"].tolist())  # type: ignore[misc]

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_a_long_prompt_gives_way_to_the_completions_equally_on_both_sides() -> None:
    model = nli_model()
    seen = read_ids(model)
    nli = NLIEquivalence(model, tokenizer(), max_length=14)
    prompt = "the a it not because why what"
    nli.labels([prompt], ["blue sky"], ["red sky is cold not hot"])
    # 14 - 3 special - 2 - 6 leaves 3: one word of the prompt for each side.
    side = "blue sky"
    other = "red sky is cold not hot"
    assert " ".join(seen[0]) == f"[CLS] what {side} [SEP] what {other} [SEP]"
    assert nli.truncated == 1


def test_completions_that_are_too_long_are_cut_at_the_end_the_longer_first() -> None:
    model = nli_model()
    seen = read_ids(model)
    nli = NLIEquivalence(model, tokenizer(), max_length=9)
    nli.labels(["why the"], ["blue sky is cold not hot"], ["red it"])
    assert " ".join(seen[0]) == "[CLS] blue sky is cold [SEP] red it [SEP]"


def test_pairs_that_fit_are_not_cut() -> None:
    model = nli_model()
    seen = read_ids(model)
    nli = NLIEquivalence(model, tokenizer(), max_length=9)
    nli.labels(["why the"], ["blue"], ["red"])
    assert " ".join(seen[0]) == "[CLS] why the blue [SEP] why the red [SEP]"
    assert nli.truncated == 0


def test_the_lowest_limit_wins() -> None:
    assert NLIEquivalence(nli_model(), tokenizer(64)).max_length == 64
    assert NLIEquivalence(nli_model(), tokenizer(10**30)).max_length == 512
    assert NLIEquivalence(nli_model(), tokenizer(10**30), max_length=20).max_length == 20
    with pytest.raises(ValueError, match="leaves no room for two texts beside 3 special"):
        NLIEquivalence(nli_model(), tokenizer(), max_length=4)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        NLIEquivalence(nli_model(), tokenizer(), batch_size=0)


def test_a_saved_classifier_is_loaded_and_gives_the_same_labels(tmp_path: Path) -> None:
    model = nli_model()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = NLIEquivalence.from_pretrained(tmp_path, mode="strict", batch_size=3)
    assert (loaded.mode, loaded.batch_size) == ("strict", 3)
    prompts = ["why"] * 5
    expected = NLIEquivalence(model, tokenizer()).labels(prompts, texts(5), texts(6)[1:])
    assert loaded.labels(prompts, texts(5), texts(6)[1:]) == expected


def test_a_folder_without_a_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No NLI model could be read from"):
        NLIEquivalence.from_pretrained(tmp_path)


def test_nli_clusters_like_the_reference_procedure() -> None:
    nli = NLIEquivalence(nli_model(), tokenizer(), mode="relaxed")
    lists = [texts(30)[i : i + 6] for i in range(0, 30, 6)]
    expected = []
    for samples in lists:
        groups: list[list[int]] = []
        for i, text in enumerate(samples):
            for group in groups:
                if samples[group[0]] == text or nli(["why"], [samples[group[0]]], [text])[0]:
                    group.append(i)
                    break
            else:
                groups.append([i])
        where = {i: number for number, group in enumerate(groups) for i in group}
        expected.append([where[i] for i in range(len(samples))])
    equivalent: Equivalence = NLIEquivalence(nli_model(), tokenizer(), mode="relaxed")
    found = cluster(["why"] * 5, lists, equivalent)
    assert found == expected
    assert 1 < max(max(ids) for ids in found) + 1 < 6


class LabelTable(NLIEquivalence):
    """An NLI model whose labels are given: entailment of a text in itself, else what is named."""

    def __init__(self, mode: str, **named: NLILabel) -> None:
        super().__init__(nli_model(), tokenizer(), mode=mode)  # type: ignore[arg-type]
        self.named = named

    def labels(
        self, prompts: Sequence[Prompt], premises: Sequence[str], hypotheses: Sequence[str]
    ) -> list[NLILabel]:
        pairs = zip(premises, hypotheses, strict=True)
        return [self.named.get(a + b, "neutral") for a, b in pairs]


def test_the_three_modes_partition_the_same_samples_differently() -> None:
    # a and b entail each other, c is entailed by a alone, d is unrelated, e contradicts a and d.
    table: dict[str, NLILabel] = {
        "ab": "entailment",
        "ba": "entailment",
        "ac": "entailment",
        "ae": "contradiction",
        "ed": "contradiction",
    }
    found = {
        mode: cluster(["p"], [["a", "b", "c", "d", "e"]], LabelTable(mode, **table))[0]
        for mode in ("strict", "relaxed", "no_contradiction")
    }
    assert found == {
        "strict": [0, 0, 1, 2, 3],
        "relaxed": [0, 0, 0, 1, 2],
        "no_contradiction": [0, 0, 0, 0, 1],
    }


def test_entailment_is_not_transitive_so_the_order_of_the_samples_changes_the_clusters() -> None:
    table: dict[str, NLILabel] = {
        "ab": "entailment",
        "ba": "entailment",
        "bc": "entailment",
        "cb": "entailment",
    }
    nli = LabelTable("strict", **table)
    assert cluster(["p"], [["a", "b", "c"]], nli) == [[0, 0, 1]]
    assert cluster(["p"], [["b", "a", "c"]], nli) == [[0, 0, 0]]


def test_the_modes_share_one_file_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "nli.jsonl"
    model = nli_model()
    rows = count_rows(model)
    firsts, seconds = texts(60)[:30], texts(60)[30:]
    answers = [
        NLIEquivalence(model, tokenizer(), mode=mode, cache_path=path)(
            ["why"] * 30, firsts, seconds
        )  # type: ignore[arg-type]
        for mode in ("strict", "relaxed", "no_contradiction")
    ]
    assert sum(rows) == 60  # both directions, once for all three
    assert sum(answers[0]) < sum(answers[1]) < sum(answers[2])


# --- By route ------------------------------------------------------------------------------------


def test_each_prompt_is_compared_by_its_own_route() -> None:
    loose, never = Recorder(lambda a, b: True), Recorder(lambda a, b: False)
    german: Prompt = [{"role": "user", "content": "warum"}]
    routed = RoutedEquivalence(
        {"de": never, "fr": loose, "at": never},
        routes_of={prompt_key(german): "de", prompt_key("wieso"): "at", prompt_key("why"): "en"},
        default=loose,
    )
    prompts: list[Prompt] = ["why", german, "what", "wieso", "why"]
    answers = routed(prompts, list("abcde"), list("vwxyz"))
    assert answers == [True, False, True, False, True]
    # One call for each equivalence, whatever the number of routes to it.
    assert loose.calls == [[("why", "a", "v"), ("what", "c", "x"), ("why", "e", "z")]]
    assert never.calls == [[(german, "b", "w"), ("wieso", "d", "y")]]
    assert routed([], [], []) == []


def test_routes_find_a_string_and_the_same_text_as_a_turn_alike() -> None:
    routed = RoutedEquivalence(
        {"de": lambda p, a, b: [True] * len(a)},
        routes_of={prompt_key("warum"): "de"},
        default=exact_match,
    )
    assert routed([[{"role": "user", "content": "warum"}]], ["a"], ["b"]) == [True]


def test_a_prompt_without_a_route_needs_a_default() -> None:
    routed = RoutedEquivalence({"de": exact_match}, routes_of={}, default=None)
    with pytest.raises(ValueError, match="The prompt 'why' has no route"):
        routed(["why"], ["a"], ["b"])


def test_related_texts_are_told_by_how_alike_completions_of_one_prompt_are() -> None:
    angles = {"a": 0.0, "b": 10.0, "c": 30.0, "d": 0.0, "e": 60.0, "f": 1.0}

    def embed(texts: list[str]) -> torch.Tensor:
        degrees = torch.tensor([angles[text] for text in texts]) * math.pi / 180
        return torch.stack([degrees.cos(), degrees.sin()], dim=1)

    # Pairs within prompts lie 10, 20, 30 and 60 degrees apart; "f" is alone and says nothing.
    completions = [["a", "b", "c", "a"], ["d", "e"], ["f", "f"]]
    by_level = {0.01: 60.0, 0.4: 30.0, 0.7: 20.0, 0.99: 20.0}
    for level, degrees in by_level.items():
        threshold = related_threshold(embed, completions, level=level)
        assert threshold == pytest.approx(math.cos(degrees * math.pi / 180), abs=1e-6)
    with pytest.raises(ValueError, match="two different completions of one prompt"):
        related_threshold(embed, [["a"], ["b", "b"]])
    with pytest.raises(ValueError, match=r"level is a share of pairs in \(0, 1\), got 1"):
        related_threshold(embed, completions, level=1.0)
