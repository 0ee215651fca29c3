"""The recorded world: what is read and what is left out, best-of-n by hand, members and gold."""

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trueward.data.sources import DataError, write_jsonl
from trueward.evaluate.comparison import SeedRun
from trueward.evaluate.overoptimization import best_of_n_kl
from trueward.lab.controls import random_reward
from trueward.lab.methods import Method
from trueward.lab.recorded import RecordedWorld, Recordings, run_cell
from trueward.lab.worlds import Annotator, World
from trueward.models.reward_model import RewardModel
from trueward.options import ObjectiveConfig
from trueward.testing import tiny_backbone

Row = dict[str, Any]


def row(prompt: str, gold: list[object], **columns: object) -> Row:
    answers = [f"{prompt} {'word ' * i}" for i in range(len(gold))]
    return {"prompt": prompt, "completions": answers, "gold": gold} | columns


ROWS = [
    row("a", [1.0, 2.0, 3.0, 4.0], rm=[0.4, 0.3, 0.2, 0.1], other=[1.0, 2.0, 5.0, 3.0]),
    row("b", [0.0, 1.0, 0.0, 5.0], rm=[0.0, 9.0, 1.0, 2.0], other=[3.0, 1.0, 2.0, 0.0]),
]


def written(folder: Path, rows: list[Row], name: str = "answers.jsonl") -> str:
    write_jsonl(folder / name, rows)
    return str(folder / name)


def method(reward: str = "learned", objective: str = "mean", members: int = 1) -> Method:
    return Method(
        reward=reward,
        members=members,
        optimiser="best_of_n",
        objective=ObjectiveConfig(name=objective),
    )


def column(run: SeedRun, key: str) -> list[float]:
    return [point[key] for point in run.points]


def by_subsets(proxy: list[float], value: list[float], n: int) -> float:
    """Mean over all subsets of size n of the value of its proxy-best; ties are shared."""
    picks = []
    for some in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in some)
        tied = [value[i] for i in some if proxy[i] == best]
        picks.append(sum(tied) / len(tied))
    return sum(picks) / len(picks)


# Best of n


def test_best_of_n_by_hand(tmp_path: Path) -> None:
    world = RecordedWorld(file=written(tmp_path, ROWS), scores=["rm"])
    run = run_cell(world, method(), 0)
    assert column(run, "n") == [1.0, 2.0, 3.0, 4.0]
    # Prompt a: rm is upside down, so that of n the first is chosen: gold 1 with n/4, ...
    a = [2.5, (3 * 1 + 2 * 2 + 1 * 3) / 6, (3 * 1 + 1 * 2) / 4, 1.0]
    # Prompt b: rm orders 0, 2, 3, 1 by place, so gold 0, 0, 5, 1: of two, 1/6 0, 2/6 5, 3/6 1.
    b = [1.5, (0 + 2 * 5 + 3 * 1) / 6, (1 * 5 + 3 * 1) / 4, 1.0]
    assert column(run, "gold") == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    assert run.final_gold == [1.0, 1.0]
    # Of two values x and y the standard error of the mean is |x - y| / 2.
    assert column(run, "gold_sem") == pytest.approx(
        [abs(x - y) / 2 for x, y in zip(a, b, strict=True)]
    )
    assert column(run, "kl/bound") == pytest.approx([best_of_n_kl(n) for n in (1, 2, 3, 4)])
    # Proxy at n = 1: means .25 and 3; at n = 4: maxima .4 and 9.
    assert column(run, "proxy")[0] == 0.0
    assert column(run, "proxy")[-1] == pytest.approx((0.4 + 9) / 2 - (0.25 + 3) / 2)
    # Answer i has i words after its prompt's; the picks are answers 0 and 1.
    assert column(run, "length")[0] == pytest.approx(2.5)
    assert column(run, "length")[-1] == pytest.approx((1 + 2) / 2)
    assert "spread" not in run.points[0]


def test_every_point_is_the_mean_over_all_subsets(tmp_path: Path) -> None:
    scores = [[3.0, 1.0, 3.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 2.0, 0.0]]  # with ties
    golds = [[0.1, 0.9, -0.5, 0.3, 0.7, 1.1], [5.0, 0.0, 1.0, 2.0, 3.0, 4.0]]
    rows = [row(p, g, rm=s) for p, g, s in zip("ab", golds, scores, strict=True)]
    run = run_cell(RecordedWorld(file=written(tmp_path, rows), scores=["rm"]), method(), 0)
    assert column(run, "n") == [1.0, 2.0, 3.0, 4.0, 6.0]
    for point in run.points:
        n = int(point["n"])
        expected = [by_subsets(s, g, n) for s, g in zip(scores, golds, strict=True)]
        assert point["gold"] == pytest.approx(sum(expected) / 2)


def test_order_of_the_answers_does_not_matter(tmp_path: Path) -> None:
    def turned(some: Row) -> Row:
        return {k: v[::-1] if isinstance(v, list) else v for k, v in some.items()}

    there = RecordedWorld(file=written(tmp_path, ROWS), scores=["rm", "other"])
    back = RecordedWorld(
        file=written(tmp_path, [turned(r) for r in ROWS], "back.jsonl.gz"), scores=["rm", "other"]
    )
    some = method("learned", "worst_case", members=2)
    points = [run_cell(world, some, 0).points for world in (there, back)]
    for one, other in zip(*points, strict=True):
        assert one == pytest.approx(other)


def test_members_stay_with_their_answers_and_gold_with_both(tmp_path: Path) -> None:
    world = RecordedWorld(file=written(tmp_path, ROWS), scores=["rm", "other"])
    run = run_cell(world, method("learned", "worst_case", members=2), 0)
    minima = [[min(p) for p in zip(r["rm"], r["other"], strict=True)] for r in ROWS]
    assert minima == [[0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 1.0, 0.0]]
    for point in run.points:
        n = int(point["n"])
        gold = [by_subsets(m, r["gold"], n) for m, r in zip(minima, ROWS, strict=True)]
        assert point["gold"] == pytest.approx(sum(gold) / 2), n
        spreads = [[abs(x - y) / 2 for x, y in zip(r["rm"], r["other"], strict=True)] for r in ROWS]
        spread = [by_subsets(m, s, n) for m, s in zip(minima, spreads, strict=True)]
        assert point["spread"] == pytest.approx(sum(spread) / 2), n


def test_a_column_of_lists_is_several_members(tmp_path: Path) -> None:
    pairs = [
        r | {"members": [list(p) for p in zip(r["rm"], r["other"], strict=True)]} for r in ROWS
    ]
    path = written(tmp_path, pairs)
    apart = RecordedWorld(file=path, scores=["rm", "other"])
    joined = RecordedWorld(file=path, scores=["members"])
    some = method("learned", "uncertainty_weighted", members=2)
    assert run_cell(joined, some, 0).points == run_cell(apart, some, 0).points
    assert run_cell(joined, method(), 0).points == run_cell(apart, method(), 0).points
    three = RecordedWorld(file=path, scores=["members", "rm"])
    run_cell(three, method(members=3), 0)
    with pytest.raises(ValueError, match="wants 4 members where the recorded world has 3"):
        run_cell(three, method(members=4), 0)


def test_gold_as_the_proxy_only_rises_and_tops_every_other(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [row(f"p{i}", torch.randn(12, generator=generator).tolist()) for i in range(10)]
    world = RecordedWorld(file=written(tmp_path, rows))
    gold = column(run_cell(world, method("gold"), 0), "gold")
    assert all(a < b for a, b in itertools.pairwise(gold))
    assert gold[-1] == pytest.approx(sum(max(r["gold"]) for r in rows) / 10)
    for control in ("random", "length"):
        other = column(run_cell(world, method(control), 0), "gold")
        assert other[0] == pytest.approx(gold[0])
        assert all(o < g for o, g in zip(other[1:], gold[1:], strict=True))


def test_length_chooses_the_longest_and_random_by_seed(tmp_path: Path) -> None:
    world = RecordedWorld(file=written(tmp_path, ROWS))
    run = run_cell(world, method("length"), 0)
    assert run.final_gold == [4.0, 5.0]
    assert column(run, "length")[-1] == 4.0
    finals = []
    for seed in range(8):
        run = run_cell(world, method("random"), seed)
        rewards = [random_reward(["a"] * 4, ROWS[0]["completions"], seed=seed)]
        assert run.final_gold[0] == ROWS[0]["gold"][int(rewards[0].argmax())]
        finals.append(run.final_gold[0])
    assert len(set(finals)) > 1


def test_equal_answers_share_the_pick_of_noise(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completions": ["x", "x"], "gold": [0.0, 1.0]} for p in "ab"]
    run = run_cell(RecordedWorld(file=written(tmp_path, rows)), method("random"), 0)
    assert column(run, "gold") == [0.5, 0.5]


def test_prompts_with_more_answers_use_them_all(tmp_path: Path) -> None:
    long = row("long", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    world = RecordedWorld(file=written(tmp_path, [*ROWS, long]))
    opened = world.open(seed=0)
    assert opened.largest_n == 4
    assert "n goes up to 4, the fewest answers that a prompt has (answers.jsonl:1" in opened.report
    run = opened.run(method("gold"))
    golds: list[list[float]] = [r["gold"] for r in (*ROWS, long)]
    for point in run.points:
        expected = [by_subsets(g, g, int(point["n"])) for g in golds]
        assert point["gold"] == pytest.approx(sum(expected) / 3)
    with pytest.raises(DataError, match="at least 2 prompts with 5 usable answers each, got 1"):
        RecordedWorld(file=world.file, min_answers=5).open(seed=0)


def test_pairs_are_the_first_two_drawn_and_without_ties(tmp_path: Path) -> None:
    tied = row("c", [1.0, 1.0], rm=[0.0, 1.0], other=[0.0, 0.0])
    world = RecordedWorld(file=written(tmp_path, [*ROWS, tied]), scores=["rm"])
    seen = set()
    for seed in range(30):
        opened = world.open(seed=seed)
        run = opened.run(method())
        assert len(run.outcomes) in (1, 2)  # b has two answers of gold 0
        first, second = opened.answers(["a"], n=2, seed=seed)[0]
        places = [ROWS[0]["completions"].index(t) for t in (first, second)]
        gap = [0.4, 0.3, 0.2, 0.1][places[0]] - [0.4, 0.3, 0.2, 0.1][places[1]]
        assert run.probabilities[0] == pytest.approx(1 / (1 + math.exp(-gap)))
        assert run.outcomes[0] is (places[0] > places[1])
        seen.add(run.outcomes[0])
    assert seen == {True, False}


# As a world


def test_recordings_answer_as_a_world(tmp_path: Path) -> None:
    rows = [row(f"p{i}", [float(j) for j in range(8)]) for i in range(30)]
    opened = RecordedWorld(file=written(tmp_path, rows)).open(seed=0)
    assert isinstance(opened, World)
    prompts = opened.prompts(30, seed=1)
    assert sorted(map(str, prompts)) == sorted(f"p{i}" for i in range(30))
    assert opened.prompts(5, seed=1) == opened.prompts(5, seed=1) != opened.prompts(5, seed=2)
    answers = opened.answers(prompts, n=8, seed=0)
    assert [a[:3] for a in answers] == opened.answers(prompts, n=3, seed=0)
    assert answers[4:5] == opened.answers(prompts[4:5], n=8, seed=0)
    assert answers != opened.answers(prompts, n=8, seed=1)
    golds = torch.stack([opened.gold([p] * 8, a) for p, a in zip(prompts, answers, strict=True)])
    assert torch.equal(golds.sort(dim=1).values, torch.arange(8.0).double().expand(30, 8))
    # The first drawn is any of the eight: their mean is 3.5, with a standard error of .42.
    assert 2.2 < float(golds[:, 0].mean()) < 4.8
    assert len(set(golds[:, 0].tolist())) > 4
    rows_made = opened.comparisons(prompts, answers, seed=0)
    chosen = opened.gold([r.prompt for r in rows_made], [r.chosen for r in rows_made])
    rejected = opened.gold([r.prompt for r in rows_made], [r.rejected for r in rows_made])
    assert len(rows_made) == 30
    assert bool((chosen > rejected).all())
    noisy = RecordedWorld(file=opened.world.file, annotator=Annotator(label_noise=1.0))
    turned = noisy.open(seed=0).comparisons(prompts, answers, seed=0)
    assert [(r.chosen, r.rejected) for r in turned] == [(r.rejected, r.chosen) for r in rows_made]


def test_too_much_is_not_made_up(tmp_path: Path) -> None:
    opened = RecordedWorld(file=written(tmp_path, ROWS)).open(seed=0)
    with pytest.raises(ValueError, match="has 2 usable prompts, 3 were asked for"):
        opened.prompts(3, seed=0)
    with pytest.raises(ValueError, match=r"5 answers .* answers\.jsonl:2 has 4 usable ones"):
        opened.answers(["b"], n=5, seed=0)
    with pytest.raises(ValueError, match="no usable row for the prompt 'c'"):
        opened.answers(["c"], n=1, seed=0)
    with pytest.raises(ValueError, match=r"answers\.jsonl:1 has no usable answer 'new'"):
        opened.gold(["a"], ["new"])


def test_equal_answers_with_equal_gold_are_found_and_with_different_gold_are_not(
    tmp_path: Path,
) -> None:
    rows = [
        {"prompt": "a", "completions": ["x", "x", "y"], "gold": [2.0, 2.0, 0.0]},
        {"prompt": "b", "completions": ["x", "y", "x"], "gold": [2.0, 7.0, 1.0]},
    ]
    opened = RecordedWorld(file=written(tmp_path, rows)).open(seed=0)
    assert opened.gold(["a", "b"], ["x", "y"]).tolist() == [2.0, 7.0]
    with pytest.raises(ValueError, match=r"answers\.jsonl:2 has the answer 'x' .*\(1, 2\)"):
        opened.gold(["b"], ["x"])
    # By place there is no doubt: the curve knows each answer's own gold.
    assert opened.run(method("gold")).final_gold == [2.0, 7.0]


def test_messages_and_strings_name_the_same_prompt_and_answer(tmp_path: Path) -> None:
    messages = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completions": [[{"role": "assistant", "content": c}] for c in r["completions"]],
            "gold": r["gold"],
        }
        for r in ROWS
    ]
    opened = RecordedWorld(file=written(tmp_path, messages)).open(seed=0)
    assert opened.gold(["a"], [ROWS[0]["completions"][2]]).tolist() == [3.0]
    assert opened.gold([messages[1]["prompt"]], [messages[1]["completions"][3]]).tolist() == [5.0]
    assert opened.run(method("length")).final_gold == [4.0, 5.0]


# What is read


def usable(opened: Recordings) -> list[tuple[str, list[float], list[list[float]]]]:
    return [(str(r.prompt), r.gold, r.scores) for r in opened.rows]


def test_answers_without_gold_or_score_are_left_out_counted_and_listed(tmp_path: Path) -> None:
    rows = [
        row("a", [1.0, None, 3.0, 4.0], rm=[1.0, 2.0, None, 4.0]),
        row("b", [True, False, 7], rm=[1, 2, 3]),
        row("c", [1.0, None, None], rm=[1.0, 2.0, 3.0]),
        row("b", [1.0, 2.0], rm=[1.0, 2.0]),
    ]
    path = Path(written(tmp_path, rows))
    path.write_text(path.read_text() + json.dumps(row("d", [math.nan, 1, 2], rm=[1, 2, 3])))
    opened = RecordedWorld(file=str(path), scores=["rm"]).open(seed=0)
    assert usable(opened) == [
        ("a", [1.0, 4.0], [[1.0], [4.0]]),
        ("b", [1.0, 0.0, 7.0], [[1.0], [2.0], [3.0]]),
        ("d", [1.0, 2.0], [[2.0], [3.0]]),
    ]
    assert [opened.rows[0].completions[i] for i in (0, 1)] == [
        rows[0]["completions"][i] for i in (0, 3)
    ]
    assert opened.left_out == 2 + 2 + 1
    assert (opened.load_report.read, opened.load_report.kept) == (5, 3)
    for part in (
        "5 rows read, 3 kept",
        "2 with answers left out (kept; answers.jsonl:1: 2 of 4 answers have no gold or no score",
        "1 with too few answers (answers.jsonl:3: 1 of 3 answers are usable, at least 2 are needed",
        "1 duplicate (answers.jsonl:4: the same prompt as answers.jsonl:2)",
        "7 answers in use, 5 without gold or score left out; n goes up to 2",
    ):
        assert part in opened.report


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"q": r["prompt"], "a": r["completions"], "worth": r["gold"]} for r in ROWS]
    world = RecordedWorld(file=written(tmp_path, rows), prompt="q", completions="a", gold="worth")
    assert [r.gold for r in world.open(seed=0).rows] == [r["gold"] for r in ROWS]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gold": [1.0]}, r"answers\.jsonl:2: 'gold' has 1 values for 4 completions"),
        ({"rm": [1.0] * 5}, r"answers\.jsonl:2: 'rm' has 5 values for 4 completions"),
        ({"gold": 1.0}, r"answers\.jsonl:2: 'gold' must be a list, got a number"),
        ({"gold": ["1"] * 4}, r"answers\.jsonl:2: 'gold' must hold a number or null .* a string"),
        ({"gold": [[1.0]] * 4}, r"answers\.jsonl:2: 'gold' must hold a number .* got a list"),
        ({"rm": [{}] * 4}, r"answers\.jsonl:2: 'rm' must hold a number .* got an object"),
        ({"rm": [[1.0, 2.0]] * 4}, r"answers\.jsonl:2 .* 2 members where answers\.jsonl:1 has 1"),
        ({"completions": [1] * 4}, r"answers\.jsonl:2: answer 1 of 'completions' must be a string"),
        ({"completions": "abcd"}, r"answers\.jsonl:2: 'completions' must be a list, got a string"),
        ({"prompt": None}, r"answers\.jsonl:2: 'prompt' must be a string or a list of messages"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, bad: Row, message: str) -> None:
    path = written(tmp_path, [ROWS[0], ROWS[1] | bad])
    with pytest.raises(DataError, match=message):
        RecordedWorld(file=path, scores=["rm"]).open(seed=0)


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"answers\.jsonl:1 has no column 'score' .* as `gold`"):
        RecordedWorld(file=path, gold="score").open(seed=0)
    with pytest.raises(DataError, match=r"no column 'scores' \(it has 'prompt', .* as `scores`"):
        RecordedWorld(file=path, scores=["scores"]).open(seed=0)
    with pytest.raises(DataError, match="needs its file"):
        RecordedWorld().open(seed=0)
    with pytest.raises(DataError, match="does not exist"):
        RecordedWorld(file=str(tmp_path / "gone.jsonl")).open(seed=0)
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n[1]\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1 is broken JSON"):
        RecordedWorld(file=str(tmp_path / "broken.jsonl")).open(seed=0)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"list\.jsonl:1 must hold an object, got a list"):
        RecordedWorld(file=str(tmp_path / "list.jsonl")).open(seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": "ppo"}, "optimiser=best_of_n, not ppo"),
        ({"reward": "uml"}, "reward=uml: nothing is trained"),
        ({"epochs_scale": 3.0}, "leave epochs_scale at 1 .* got 3"),
        ({"family": "heads"}, "family at deep"),
        ({"members": 2}, "wants 2 members where the recorded world has 1"),
    ],
)
def test_what_recordings_cannot_do_is_refused(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    world = RecordedWorld(file=written(tmp_path, ROWS), scores=["rm"])
    with pytest.raises(ValueError, match=message):
        run_cell(world, Method(**({"optimiser": "best_of_n"} | settings)), 0)


def test_a_learned_reward_needs_one_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was given neither"):
        run_cell(RecordedWorld(file=written(tmp_path, ROWS)), method(), 0)
    with pytest.raises(ValueError, match=r"scores \(rm\) .* reward_models \(m\), not from both"):
        RecordedWorld(scores=["rm"], reward_models=["m"])
    with pytest.raises(ValueError, match="min_answers must be at least 2, got 1"):
        RecordedWorld(min_answers=1)


# Reward models


@pytest.fixture
def folders(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    for seed in (0, 1):
        model = RewardModel.from_backbone(tiny_backbone(seed=seed), tokenizer, members=2, seed=seed)
        model.set_normalisation(["a", "b", "c"], ["the cat", "sees", "a house runs"])
        model.save_pretrained(tmp_path / f"model_{seed}")
    return tmp_path


def test_saved_reward_models_are_the_members_in_order(folders: Path) -> None:
    path = written(folders, ROWS)
    names = [str(folders / "model_1"), str(folders / "model_0")]
    opened = RecordedWorld(file=path, reward_models=names).open(seed=0)
    some = method("learned", "nominal", members=3)
    proxy, spread = opened.proxy(some)
    prompts = [r["prompt"] for r in ROWS for _ in range(4)]
    texts = [c for r in ROWS for c in r["completions"]]
    first, second = (RewardModel.from_pretrained(n).score(prompts, texts) for n in names)
    means = torch.cat([first.means, second.means[:, :1]], dim=1)
    assert first.stds is not None
    assert second.stds is not None
    stds = torch.cat([first.stds, second.stds[:, :1]], dim=1)
    torch.testing.assert_close(proxy, means.gather(1, stds.argmin(1, keepdim=True))[:, 0])
    assert spread is not None
    torch.testing.assert_close(spread, means.std(dim=1, correction=0))
    run = opened.run(method("learned", members=2))
    assert run.final_gold == [
        ROWS[i]["gold"][int(first.mean[4 * i : 4 * i + 4].argmax())] for i in range(2)
    ]


def test_the_seed_chooses_the_model(folders: Path) -> None:
    path = written(folders, ROWS)
    by_seed = RecordedWorld(file=path, reward_models=[str(folders / "model_{seed}")])
    for seed in (0, 1):
        fixed = RecordedWorld(file=path, reward_models=[str(folders / f"model_{seed}")])
        assert torch.equal(
            by_seed.open(seed=seed).proxy(method())[0], fixed.open(seed=seed).proxy(method())[0]
        )
    proxies = [by_seed.open(seed=seed).proxy(method())[0] for seed in (0, 1)]
    assert not torch.allclose(*proxies)
    with pytest.raises(DataError, match=r"No reward model could be read from .*model_2"):
        run_cell(by_seed, method(), 2)


def test_a_changed_model_or_file_is_scored_anew_and_the_same_one_is_not(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = RewardModel.from_pretrained

    def counted(path: str) -> RewardModel:
        loads.append(path)
        return load(path)

    monkeypatch.setattr(RewardModel, "from_pretrained", counted)
    folder = str(folders / "model_0")
    world = RecordedWorld(file=written(folders, ROWS), reward_models=[folder])
    first = run_cell(world, method(), 0)
    run_cell(world, method("learned", "worst_case", members=2), 1)
    assert loads == [folder]
    other = RecordedWorld(
        file=written(folders, [*ROWS, row("c", [1.0, 2.0])], "more.jsonl"), reward_models=[folder]
    )
    run_cell(other, method(), 0)
    assert len(loads) == 2
    load(folders / "model_1").save_pretrained(folder)
    os.utime(Path(folder, "model.safetensors"), (2e9, 2e9))
    assert column(run_cell(world, method(), 0), "proxy") != column(first, "proxy")
    assert len(loads) == 3


def test_an_answer_that_is_too_long_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = RewardModel.from_backbone(tiny_backbone(), tokenizer, max_length=12)
    model.save_pretrained(tmp_path / "short")
    rows = [row("a", [1.0, 2.0]), row("b", [1.0] * 40)]
    world = RecordedWorld(file=written(tmp_path, rows), reward_models=[str(tmp_path / "short")])
    with pytest.raises(DataError, match=r"answers\.jsonl:2 has an answer .* 12 tokens"):
        run_cell(world, method(), 0)


# Real data

DATA = os.environ.get("TRUEWARD_DATA", "")
needs_data = pytest.mark.skipif(
    not DATA or not Path(DATA, "tulu2_bon16").is_dir(),
    reason="TRUEWARD_DATA does not name the folder with the real data sets",
)


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(("split", "prompts"), [("test", 79), ("train", 662)])
def test_real_answers_judged_by_gpt_4(split: str, prompts: int) -> None:
    world = RecordedWorld(file=f"tulu2_bon16:{split}", gold="gpt4_preference_vs_reference")
    opened = world.open(seed=0)
    assert (len(opened.rows), opened.largest_n, opened.left_out) == (prompts, 11, 5 * prompts)
    runs = {name: opened.run(method(name)) for name in ("gold", "length", "random")}
    golds = {name: column(run, "gold") for name, run in runs.items()}
    mean = float(torch.tensor([r.gold for r in opened.rows], dtype=torch.float64).mean())
    for curve in golds.values():
        assert curve[0] == pytest.approx(mean)  # one answer at random
    # Noise gains nothing: over seeds, the mean of its picks is the mean of all.
    finals = torch.tensor(
        [run_cell(world, method("random"), s).points[-1]["gold"] for s in range(10)]
    )
    assert abs(float(finals.mean()) - mean) < 4 * float(finals.std()) / math.sqrt(10)
    # The longest answer is a little better, the best one is as good as the file has it.
    best = sum(max(r.gold) for r in opened.rows) / prompts
    assert golds["gold"][-1] == pytest.approx(best)
    assert mean + 0.02 < golds["length"][-1] < mean + 0.1 < best - 0.1
    assert column(runs["length"], "length")[-1] > 1.25 * column(runs["length"], "length")[0]
