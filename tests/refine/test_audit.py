import dataclasses
import itertools
import json
import math
from collections.abc import Sequence

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from trueward.data.formats import Completion, DataError, PreferenceRow, Prompt
from trueward.evaluate.judges import function_judge
from trueward.evaluate.preferences import wilson_interval
from trueward.refine.audit import (
    agreement_by_confidence,
    audit_preferences,
    cluster_vectors,
    distinct_n,
    embedding_spread,
    expected_coverage,
    histogram,
    mean_pairwise_cosine,
    rank_correlation_interval,
    self_similarity,
    vendi_score,
    weighted_share,
    words,
)
from trueward.testing import tiny_texts


def rows_of(
    sides: Sequence[tuple[str, str]], *, prompts: Sequence[str] | None = None, **columns: Sequence
) -> list[PreferenceRow]:
    rows = []
    for i, (chosen, rejected) in enumerate(sides):
        prompt = prompts[i] if prompts is not None else f"p{i}"
        extra = {name: values[i] for name, values in columns.items()}
        rows.append(PreferenceRow(prompt, chosen, rejected, where=f"made.jsonl:{i}", extra=extra))
    return rows


def texts_of(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    made = tiny_texts(2 * count, seed=seed, words=(4, 9))
    return list(zip(made[:count], made[count:], strict=True))


# ---- numbers ---------------------------------------------------------------------------------


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b a b"], 3) == 1.0
    assert distinct_n(["a b", "b a", "a b"], 2) == 2 / 3  # none goes over a text's end
    assert distinct_n(["a", ""], 2) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n(["a"], 0)


def test_words_have_one_case_no_punctuation_and_single_characters_where_no_space_parts_them():
    assert words("The cat, the CAT's 2 eyes") == ["the", "cat", "the", "cat", "s", "2", "eyes"]
    assert words("猫と犬 und Straße") == ["猫", "と", "犬", "und", "strasse"]


def test_self_similarity_is_the_mean_cosine_of_all_pairs_of_texts():
    texts = [*tiny_texts(12, seed=3, words=(3, 30)), "cat", "", "cat"]
    sets = []
    for text in texts:
        own = words(text)
        sets.append(set(itertools.pairwise(own)) if len(own) > 1 else {tuple(own)} - {()})
    cosines = [
        len(a & b) / math.sqrt(len(a) * len(b)) if a and b else 0.0
        for a, b in itertools.combinations(sets, 2)
    ]
    assert self_similarity(texts) == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
    assert self_similarity(["the same text"] * 5) == pytest.approx(1.0)
    assert self_similarity(["one text", "another thing"]) == 0.0
    assert self_similarity(["alone here"]) is None


def test_mean_pairwise_cosine_is_that_of_the_matrix():
    vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    units = torch.nn.functional.normalize(vectors, dim=1)
    matrix = (units @ units.T)[~torch.eye(7, dtype=torch.bool)]
    assert mean_pairwise_cosine(vectors) == pytest.approx(matrix.mean().item(), abs=1e-6)
    assert mean_pairwise_cosine(torch.eye(3)) == pytest.approx(0.0)
    assert mean_pairwise_cosine(2 * torch.ones(4, 2)) == pytest.approx(1.0)
    assert mean_pairwise_cosine(torch.ones(1, 2)) is None


def test_spread_is_the_distance_of_directions_from_their_mean():
    assert embedding_spread(torch.eye(2)) == pytest.approx(math.sqrt(0.5))
    assert embedding_spread(torch.tensor([[1.0, 0.0], [-5.0, 0.0]])) == pytest.approx(1.0)
    assert embedding_spread(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(0.0, abs=1e-6)


def test_vendi_score_counts_different_texts_whichever_side_is_longer():
    assert vendi_score(torch.eye(5)) == pytest.approx(5.0)
    assert vendi_score(torch.eye(3).repeat(4, 1)) == pytest.approx(3.0)  # more texts than dims
    assert vendi_score(torch.ones(6, 8)) == pytest.approx(1.0)
    # Shares of 1/4 and 3/4: exp of their entropy.
    uneven = torch.eye(4)[[0, 1, 1, 1]]
    assert vendi_score(uneven) == pytest.approx(4 / 27**0.25)


def test_clusters_are_groups_of_directions_in_any_order():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    groups = torch.tensor([0] * 9 + [1] * 4 + [2] * 6)
    noise = 0.1 * torch.randn(19, 3, generator=generator)
    vectors = (centres[groups] + noise) * torch.rand(19, 1, generator=generator).add(0.1)
    order = torch.randperm(19, generator=generator)
    for some, wanted in ((vectors, groups), (vectors[order], groups[order])):
        ids = cluster_vectors(some, 3)
        assert len(set(zip(ids.tolist(), wanted.tolist(), strict=True))) == 3
        assert sorted(set(ids.tolist())) == [0, 1, 2]


def test_there_are_no_more_clusters_than_directions():
    assert cluster_vectors(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), 3).max() == 1
    with pytest.raises(ValueError, match="clusters need a count"):
        cluster_vectors(torch.ones(2, 2), 0)


def test_expected_coverage_by_hand_and_by_drawing():
    mean, std = expected_coverage([1, 2], 0.5)
    assert mean == 0.5 + 0.75
    assert std == pytest.approx(math.sqrt(0.25 + 0.75 * 0.25))
    assert expected_coverage([3, 9], 1.0) == (2.0, 0.0)
    sizes, generator = [1, 3, 5, 11], torch.Generator().manual_seed(0)
    ids = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    drawn = [len(set(ids[torch.rand(20, generator=generator) < 0.2].tolist())) for _ in range(3000)]
    mean, std = expected_coverage(sizes, 0.2)
    assert sum(drawn) / 3000 == pytest.approx(mean, abs=4 * std / math.sqrt(3000))
    with pytest.raises(ValueError, match="share must lie in"):
        expected_coverage([1], 1.5)


def test_the_interval_of_a_rank_correlation_by_hand():
    found = rank_correlation_interval(0.5, 103)
    assert (found.low, found.high) == pytest.approx((0.3341, 0.6360), abs=5e-4)
    assert (rank_correlation_interval(0.3, 3).low, rank_correlation_interval(1.0, 9).low) == (-1, 1)


def test_a_weighted_share_has_the_interval_of_as_many_pairs_as_count():
    equal = weighted_share([1.0, 0.5, 0.0, 1.0], [2.0] * 4)
    assert (equal.share, equal.pairs) == (0.625, 4)
    assert (equal.low, equal.high) == pytest.approx(wilson_interval(2.5, 4))
    uneven = weighted_share([1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, 1.0])  # 36 / 12 = 3 of them
    assert uneven.share == 0.5
    assert (uneven.low, uneven.high) == pytest.approx(wilson_interval(1.5, 3))


def test_bins_hold_their_lower_edge_and_the_last_one_its_upper():
    found = agreement_by_confidence([0.6, 0.69, 0.7, 1.0, 0.9], [1.0, 0.0, 1.0, 0.5, 1.0])
    assert [(b.low, b.high, b.agreement.share, b.agreement.pairs) for b in found] == [
        (0.6, 0.7, 0.5, 2),
        (0.7, 0.8, 1.0, 1),
        (0.9, 1.0, 0.75, 2),
    ]
    found_in = histogram([0.0, 0.3, 0.6, 9.0, -1.0], low=0.0, high=1.0, bins=10)
    assert found_in.counts == [2, 0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert found_in.edges == pytest.approx([i / 10 for i in range(11)])
    assert histogram([2.0, 2.0], low=2.0, high=2.0, bins=2).counts == [2, 0]


# ---- the report ------------------------------------------------------------------------------


def test_lengths_by_hand_ties_at_half_and_by_weight():
    rows = rows_of([("aaaa", "bb"), ("aa", "bb"), ("a", "bbbb"), ("aaaa", "b")])
    length = audit_preferences(rows).length
    assert (length.longer.share, length.ties) == (2.5 / 4, 1)
    assert length.log_ratio == pytest.approx(math.log(2 * 1 / 4 * 4) / 4)
    assert (length.chosen.mean, length.rejected.mean) == (2.75, 2.25)
    heavy = [
        dataclasses.replace(row, weight=w)
        for row, w in zip(rows, (1.0, 1.0, 6.0, 1.0), strict=True)
    ]
    weighted = audit_preferences(heavy)
    assert weighted.weighted
    assert weighted.length.longer.share == 2.5 / 9
    assert weighted.length.log_ratio == pytest.approx(math.log(2 * 4**-6 * 4) / 9)


def test_the_lengths_of_the_paper_are_found_and_said():
    rows = rows_of([("a" * 510, "b" * 449)] * 60, prompts=[f"p{i}" for i in range(60)])
    audit = audit_preferences(rows)
    assert audit.length.factor == pytest.approx(510 / 449)
    low = wilson_interval(60, 60).low
    assert audit.verdicts[0].startswith(
        f"The chosen side is longer in 100 % [{100 * low:.0f}, 100] of the pairs (1.14 times as "
        "long on average)"
    )
    turned = [dataclasses.replace(r, chosen=r.rejected, rejected=r.chosen) for r in rows]
    assert "shorter is better" in audit_preferences(turned).verdicts[0]
    even = audit_preferences([*rows, *(dataclasses.replace(r, prompt="q") for r in turned)])
    assert not any("of the pairs (" in verdict for verdict in even.verdicts)


def test_a_judge_that_likes_a_place_does_not_pass_for_one_that_agrees():
    rows = rows_of(texts_of(400))
    first = function_judge(lambda _prompt, _one, _two: 1.0)
    share = audit_preferences(rows, judge=first).labels.judge
    assert share is not None
    assert share.agreement.low < 0.5 < share.agreement.high
    # Whatever the label is, the same two texts are shown in the same way.
    shown: list[set[tuple]] = [set(), set()]

    def watched(some: set[tuple]):
        return function_judge(lambda *triple: some.add(triple) or 0.5)  # type: ignore[func-returns-value]

    turned = [dataclasses.replace(r, chosen=r.rejected, rejected=r.chosen) for r in rows]
    for some, own in zip((rows, turned), shown, strict=True):
        audit_preferences(some, judge=watched(own))
    assert shown[0] == shown[1]


def test_agreement_with_a_judge_counts_ties_at_half_and_leaves_out_what_is_not_judged():
    rows = rows_of([("aaaa", "b"), ("a", "bbbb"), ("aa", "bb"), ("aaa", "b")], confidence=[0.5] * 4)

    def longer(
        prompts: Sequence[Prompt], one: Sequence[Completion], two: Sequence[Completion]
    ) -> Float[Tensor, " batch"]:
        found = [0.5 + 0.1 * (len(a) - len(b)) for a, b in zip(one, two, strict=True)]
        return torch.tensor(found).where(torch.tensor([p != "p3" for p in prompts]), torch.nan)

    found = audit_preferences(rows, judge=longer).labels.judge
    assert found is not None
    assert (found.agreement.share, found.agreement.pairs) == (0.5, 3)
    assert (found.ties, found.unanswered) == (1, 1)
    assert found.confidence_correlation is None  # one confidence alone
    with pytest.raises(ValueError, match="one probability in"):
        audit_preferences(rows, judge=lambda *_: torch.full((4,), 2.0))


def test_the_reference_is_found_in_either_order_as_strings_or_messages():
    rows = rows_of([("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("i", "j")])
    said = [{"role": "assistant", "content": "d"}], [{"role": "assistant", "content": "c"}]
    asked = [{"role": "user", "content": "p1"}]
    reference = [
        PreferenceRow("p0", "a", "b"),
        PreferenceRow(asked, *said),
        PreferenceRow("p2", "f", "e"),
        PreferenceRow("p2", "e", "f"),  # people differ: a half
        PreferenceRow("p3", "g", "h", extra={"tie": True}),
        PreferenceRow("p4", "i", "other"),
        PreferenceRow("other", "i", "j"),
    ]
    found = audit_preferences(rows, reference=reference).labels.reference
    assert found is not None
    assert (found.agreement.share, found.agreement.pairs, found.unanswered) == (0.5, 3, 2)
    assert found.ties == 1
    assert audit_preferences(rows, reference=reference[-1:]).labels.reference is None


def test_margins_come_from_the_rows_or_from_a_reward():
    rows = rows_of(
        [("aaaa", "bb"), ("aa", "bbbb"), ("a", "bb"), ("aaaaa", "b")],
        chosen_reward=[1.0, 2.0, 0.0, None],
        rejected_reward=[3.0, 1.0, 0.0, 1.0],
    )
    labels = audit_preferences(rows).labels
    assert labels.margin is not None
    assert labels.negative_margins is not None
    assert (labels.margin.pairs, labels.margin.mean) == (3, -1 / 3)
    assert (labels.margin.smallest, labels.margin.median, labels.margin.largest) == (-2, 0, 1)
    assert labels.negative_margins.share == 1 / 3
    by_length = audit_preferences(rows, reward=lambda prompts, completions: [len(c) for c in completions])  # fmt: skip  # noqa: E501
    assert by_length.labels.margin is not None
    assert by_length.labels.margin.mean == (2 - 2 - 1 + 4) / 4


def test_the_place_of_samples_is_asked_where_it_is_known():
    rows = rows_of(texts_of(4), chosen_index=[0, 1, 5, None], rejected_index=[3, 2, 4, 1])
    position = audit_preferences(rows).position
    assert position is not None
    assert (position.share, position.pairs) == (2 / 3, 3)
    assert audit_preferences(rows_of(texts_of(2))).position is None
    early = rows_of(texts_of(40), chosen_index=[0] * 40, rejected_index=[1] * 40)
    assert any("drawn before" in verdict for verdict in audit_preferences(early).verdicts)


def test_repeats_are_counted_once_each():
    rows = [
        PreferenceRow("p", "a", "b"),
        PreferenceRow("p", "a", "b"),
        PreferenceRow([{"role": "user", "content": "p"}], "a", "b"),
        PreferenceRow("p", "b", "a"),
        PreferenceRow("p", "a", "c"),
        PreferenceRow("q", "b", "a"),
    ]
    found = audit_preferences(rows).repeats
    assert (found.duplicates, found.contradictions) == (2, 1)
    assert (found.prompts, found.repeated_prompts, found.most_pairs) == (2, 1, 5)
    said = " ".join(audit_preferences(rows).verdicts)
    assert "in both orders (once)" in said
    assert "repeat an earlier one (2 times)" in said
    assert "1 of 2 prompts have several pairs, up to 5" in said


def directions(texts: list[str]) -> Float[Tensor, "text dim"]:
    """Each of ten topics is a direction; a text's first letter names it."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.eye(10)[[(ord(text[0]) - ord("a")) % 10 for text in texts]]
    return topics + 0.01 * torch.randn(len(texts), 10, generator=generator)


def test_prompts_without_a_pair_are_found_by_their_cluster():
    prompts = [f"{'abcdefghij'[i % 10]} {i}" for i in range(120)]
    some = [p for p in prompts if p[0] in "abcd"]  # 48 of 120
    rows = rows_of(texts_of(48), prompts=some)
    audit = audit_preferences(rows, embed=directions, prompts=[*prompts, prompts[0]])
    found = audit.coverage
    assert found is not None
    assert (found.prompts, found.covered, found.elsewhere) == (120, 48, 0)
    assert (found.clusters, found.covered_clusters) == (10, 4)
    assert found.expected_clusters == pytest.approx(10 * (1 - 0.6**12))
    assert [cluster.prompts for cluster in found.uncovered] == [12] * 6
    assert {cluster.example[0] for cluster in found.uncovered} == set("efghij")
    said = " ".join(audit.verdicts)
    assert "4 of 10 clusters of prompts have a pair" in said
    assert "nothing was learnt on 72 prompts" in said
    # As many prompts from everywhere leave nothing to say.
    even = audit_preferences(
        rows_of(texts_of(48), prompts=prompts[:48]), embed=directions, prompts=prompts
    )
    assert "clusters of prompts" not in " ".join(even.verdicts)
    # So do few prompts, which leave clusters out by chance.
    few = audit_preferences(
        rows_of(texts_of(8), prompts=[prompts[i] for i in (0, 10, 21, 32, 43, 54, 65, 75)]),
        embed=directions,
        prompts=prompts,
    )
    assert few.coverage is not None
    assert few.coverage.covered_clusters == 6  # 5.6 by chance
    assert "clusters of prompts" not in " ".join(few.verdicts)
    alone = audit_preferences(rows, prompts=["other"]).coverage
    assert alone is not None
    assert (alone.prompts, alone.covered, alone.elsewhere, alone.clusters) == (1, 0, 48, None)
    assert audit_preferences(rows, embed=directions).coverage is None


def test_embeddings_tell_one_kind_of_chosen_side():
    sides = [(f"a {i}", f"{'abcdefghij'[i % 10]} other {i}") for i in range(40)]
    seen: list[list[str]] = []

    def embed(texts: list[str]) -> Float[Tensor, "text dim"]:
        seen.append(texts)
        return directions(texts)

    audit = audit_preferences(rows_of([*sides, sides[0]]), embed=embed)
    assert audit.chosen.mean_cosine == pytest.approx(1.0, abs=0.01)
    assert audit.rejected.mean_cosine == pytest.approx(4 / 40, abs=0.03)
    assert audit.rejected.vendi_score == pytest.approx(10, abs=0.1)
    assert audit.chosen.spread < 0.1 < audit.rejected.spread  # type: ignore[operator]
    assert audit.chosen.repeated == 2 / 41
    assert [len(texts) for texts in seen] == [40, 40]  # each text once
    assert any("The chosen sides are more alike" in verdict for verdict in audit.verdicts)
    with pytest.raises(ValueError, match="one vector for each text"):
        audit_preferences(rows_of(sides), embed=lambda _: torch.ones(3, 2))


# ---- words -----------------------------------------------------------------------------------


def agreeing(rights: Sequence[bool], confidences: Sequence[float]):
    """Rows, and a judge that agrees with those that are right."""
    sides = [("yes", "nay") if right else ("nay", "yes") for right in rights]
    rows = rows_of(sides, confidence=confidences)
    return rows, function_judge(lambda _prompt, one, _two: float(one == "yes"))


def test_labels_no_better_than_a_coin_are_said_to_be_so():
    for right, said in (
        (0.5, "no better than a coin to the judge"),
        (0.2, "prefers the rejected side"),
    ):
        rows, judge = agreeing([i < 100 * right for i in range(100)], [0.5] * 100)
        assert any(said in v for v in audit_preferences(rows, judge=judge).verdicts)
    rows, judge = agreeing([i < 80 for i in range(100)], [0.5] * 100)
    assert not any("judge" in v for v in audit_preferences(rows, judge=judge).verdicts)


def test_a_confidence_that_says_nothing_is_said_to_say_nothing():
    stated = [0.5, 0.6, 0.7, 0.8, 0.9] * 40
    knows, judge = agreeing([c > 0.6 or i % 3 == 0 for i, c in enumerate(stated)], stated)
    found = audit_preferences(knows, judge=judge)
    assert not any("confidence" in verdict for verdict in found.verdicts)
    assert found.labels.judge is not None
    by_confidence = [b.agreement.share for b in found.labels.judge.by_confidence]
    assert by_confidence[2:] == [1.0, 1.0, 1.0]
    assert max(by_confidence[:2]) < 0.5
    blind, judge = agreeing([i % 7 != 0 for i in range(200)], stated)
    said = " ".join(audit_preferences(blind, judge=judge).verdicts)
    assert "The confidence is unrelated to agreement with the judge" in said
    worse, judge = agreeing([c < 0.7 or i % 3 == 0 for i, c in enumerate(stated)], stated)
    said = " ".join(audit_preferences(worse, judge=judge).verdicts)
    assert "The judge agrees less where the confidence is higher" in said


def test_a_confidence_that_is_length_is_said_to_be_so():
    sides = [("a" * (90 - 10 * i), "b" * 50) for i in range(5)] * 4
    stated = [0.5, 0.6, 0.7, 0.8, 0.9] * 4
    audit = audit_preferences(rows_of(sides, confidence=stated))
    assert audit.length.confidence_correlation == pytest.approx(-1.0)
    assert any("keeps shorter answers" in verdict for verdict in audit.verdicts)
    assert audit.labels.confidence is not None
    assert audit.labels.confidence.mean == pytest.approx(0.7)
    assert audit.labels.confidence.histogram.counts[10:] == [4, 0, 4, 0, 4, 0, 4, 0, 4, 0]


def test_negative_margins_are_said_from_a_tenth_on():
    rewards = {"rejected_reward": [0.0] * 100}
    few = rows_of(texts_of(100), chosen_reward=[-1.0] * 12 + [1.0] * 88, **rewards)
    many = rows_of(texts_of(100), chosen_reward=[-1.0] * 30 + [1.0] * 70, **rewards)
    assert not any("prefers the rejected" in v for v in audit_preferences(few).verdicts)
    assert any("rejected side in 30 % [22, 40]" in v for v in audit_preferences(many).verdicts)


def test_one_answer_to_many_prompts_is_said():
    sides = [("I cannot help.", f"b {i}") if i < 4 else (f"a {i}", f"b {i}") for i in range(20)]
    assert any("20 % of the chosen texts" in v for v in audit_preferences(rows_of(sides)).verdicts)


def test_nothing_is_said_of_pairs_without_a_fault():
    lengthy = [sorted(pair, key=len, reverse=i % 2 > 0) for i, pair in enumerate(texts_of(60))]
    sides = [(one, other) for one, other in lengthy]
    rows = rows_of(sides, confidence=[0.5 + 0.1 * (i % 5) for i in range(60)])
    assert audit_preferences(rows).verdicts == []


# ---- forms and errors ------------------------------------------------------------------------


def test_the_report_is_json_and_people_are_counted():
    rows = rows_of(texts_of(30), confidence=[0.5] * 29 + [None], labelled_by=["people", *"x" * 29])
    audit = audit_preferences(
        rows,
        judge=function_judge(lambda *_: 1.0),
        reference=rows,
        embed=lambda texts: torch.eye(len(texts)),
        prompts=["p0", "p1", "q"],
    )
    assert audit.labelled_by_people == 1
    plain = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert plain["length"]["longer"]["share"] == audit.length.longer.share
    assert plain["verdicts"] == audit.verdicts
    assert plain["coverage"]["covered"] == 2
    single = audit_preferences(rows[:1])
    assert single.length.log_ratio_interval is None
    json.dumps(single.to_json(), allow_nan=False)


def test_what_cannot_be_audited_is_refused_by_its_line():
    with pytest.raises(ValueError, match="at least one pair"):
        audit_preferences([])
    with pytest.raises(ValueError, match=r"made.jsonl:1 is a tie"):
        audit_preferences(rows_of(texts_of(2), tie=[False, True]))
    with pytest.raises(ValueError, match="weight 0"):
        audit_preferences([PreferenceRow("p", "a", "b", weight=0.0)])
    for value in ("high", True, math.nan):
        rows = rows_of(texts_of(2), confidence=[0.5, value])
        with pytest.raises(DataError, match=r"made.jsonl:1: 'confidence' must be a finite number"):
            audit_preferences(rows)
