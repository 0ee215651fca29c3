"""The alarm's arithmetic by hand; in the loop: what it logs, stops, puts back, and resumes."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trueward.data.sources import DataError
from trueward.models.policy import Policy
from trueward.models.reward_model import RewardModel
from trueward.testing import tiny_backbone, tiny_language_model, tiny_texts, tiny_tokenizer
from trueward.train import policy as policy_module
from trueward.train.alarm import (
    MOST_SNAPSHOTS,
    SIGNALS,
    STOP,
    WARN,
    Alarm,
    AlarmConfig,
    Calibration,
    Snapshots,
    kept_places,
    standardised,
    unit_of,
)
from trueward.train.policy import PolicyConfig, train_policy

TOKENIZER = tiny_tokenizer()
SMALL: dict[str, Any] = {
    "algorithm": "rloo",
    "prompts_per_step": 3,
    "completions_per_prompt": 2,
    "max_new_tokens": 5,
    "progress": False,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "schedule": "constant",
}
OWN = ["gain", "spread", "gap", "spread_share", "disagreement", "width", "drift", "outlyingness"]


def new_policy() -> Policy:
    return Policy(tiny_language_model(vocab_size=len(TOKENIZER)), TOKENIZER)


def ensemble(members: int = 2) -> RewardModel:
    backbone = tiny_backbone(vocab_size=len(TOKENIZER))
    return RewardModel.from_backbone(backbone, TOKENIZER, members=members)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def saved(path: Path, **options: Any) -> str:
    """Write a calibration that is raised in a known step: the KL exceeds a threshold."""
    Calibration(**({"weights": {"kl": 1.0}, "window": 2, "threshold": -1e9} | options)).save(path)
    return str(path)


# ---- arithmetic --------------------------------------------------------------------------------


def test_a_signal_counts_from_its_first_values_in_their_stds() -> None:
    assert standardised(7.0, [1.0, 3.0]) == pytest.approx(5 / math.sqrt(2))
    assert standardised(7.0, [1.0, 3.0], floor=10.0) == pytest.approx(0.5)
    assert standardised(7.0, [1.0, 3.0], floor=0.1) == pytest.approx(5 / math.sqrt(2))
    assert math.isfinite(standardised(7.0, [2.0, 2.0]))  # never moved
    assert standardised(7.0, [1.0, 3.0], unit="floor", floor=0.1) == pytest.approx(50.0)
    assert standardised(7.0, [1.0, 3.0], unit="raw", floor=10.0) == 7.0
    assert standardised(7.0, [], unit="raw") == 7.0


def test_differences_know_noise_from_trend() -> None:
    # 1, 3, 4: differences 2 and 1, (4 + 1) / 2 / 2; the mean is 8/3.
    assert unit_of([1.0, 3.0, 4.0], unit="differences") == pytest.approx(math.sqrt(1.25))
    assert unit_of([1.0, 3.0, 4.0], unit="differences", floor=3.0) == 3.0
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trend = (noise + torch.arange(4000) * 0.1).tolist()
    assert unit_of(noise.tolist(), unit="differences") == pytest.approx(1.0, abs=0.03)
    assert unit_of(trend, unit="differences") == pytest.approx(1.0, abs=0.03)
    assert unit_of(trend, unit="window") > 100


def test_the_score_is_a_weighted_sum_and_silent_in_its_window() -> None:
    alarm = Alarm(
        Calibration(
            weights={"kl": 1.0, "length": -2.0}, window=2, threshold=1e9, floors={"kl": 4.0}
        )
    )
    steps = [{"kl": 1.0, "length": 10.0}, {"kl": 3.0, "length": 12.0}, {"kl": 6.0, "length": 9.0}]
    found = [alarm.update(i + 1, s) for i, s in enumerate(steps)]
    assert found[:2] == [None, None]
    # kl: (6 - 2) / max(sqrt 2, 4); length: (9 - 11) / sqrt 2
    assert found[2] == pytest.approx(1.0 - 2 * (-2 / math.sqrt(2)))


def raised(scores: list[float], **options: Any) -> int | None:
    """Return when an alarm is raised whose score is given: two values 0 make std and mean 0, 1."""
    alarm = Alarm(Calibration(weights={"kl": 1.0}, window=2, floors={"kl": 1.0}, **options))
    for step, score in enumerate([0.0, 0.0, *scores], start=1):
        alarm.update(step, {"kl": score})
    return alarm.raised_at


def test_patience_asks_for_steps_in_a_row() -> None:
    scores = [5.0, 1.0, 5.0, 5.0, 1.0, 5.0, 5.0, 5.0]  # steps 3 to 10
    assert raised(scores, threshold=4.0) == 3
    assert raised(scores, threshold=4.0, patience=2) == 6
    assert raised(scores, threshold=4.0, patience=3) == 10
    assert raised(scores, threshold=5.0) is None  # above, not at
    assert raised(scores, threshold=4.0, patience=4) is None


def test_a_cusum_sums_what_exceeds_the_slack_and_never_goes_below_zero() -> None:
    alarm = Alarm(
        Calibration(weights={"kl": 1.0}, window=2, floors={"kl": 1.0}, slack=1.0, threshold=2.9)
    )
    scores = [0.0, 0.0, -5.0, 2.0, 2.5, 0.5, 2.0]
    found = [alarm.update(i + 1, {"kl": s}) for i, s in enumerate(scores)]
    assert found[2:] == pytest.approx([0.0, 1.0, 2.5, 2.0, 3.0])
    assert alarm.raised_at == 7


def test_an_alarm_once_raised_keeps_its_step() -> None:
    assert raised([9.0, 0.0, 9.0], threshold=4.0) == 3


def test_an_alarm_that_goes_on_from_its_state_is_the_same() -> None:
    values = [1.0, 2.0, 4.0, 3.0, 9.0, 8.0, 1.0, 9.0]
    rules = Calibration(weights={"kl": 1.0}, window=3, threshold=4.0, patience=2, slack=0.5)
    whole = Alarm(rules)
    expected = [whole.update(i + 1, {"kl": v}) for i, v in enumerate(values)]
    assert whole.raised_at is not None
    for cut in range(1, len(values)):
        first, second = Alarm(rules), Alarm(rules)
        found = [first.update(i + 1, {"kl": v}) for i, v in enumerate(values[:cut])]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [second.update(cut + i + 1, {"kl": v}) for i, v in enumerate(values[cut:])]
        assert found == expected
        assert second.raised_at == whole.raised_at


def test_a_signal_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="reads the signal 'disagreement', which step 1 has not"):
        Alarm(STOP).update(1, {"kl": 1.0})


def test_a_step_with_a_signal_that_is_not_finite_is_as_if_it_had_not_been() -> None:
    rules = Calibration(
        weights={"kl": 1.0, "length": 1.0}, window=3, threshold=2.0, patience=2, slack=0.5
    )
    values = [1.0, 2.0, 4.0, 3.0, 9.0, 8.0]
    plain, holed = Alarm(rules), Alarm(rules)
    found = []
    for step, value in enumerate(values, start=1):
        score = plain.update(step, {"kl": value, "length": value**0.5})
        for odd in ({"kl": math.nan, "length": 1.0}, {"kl": 99.0, "length": math.inf}):
            assert holed.update(step, odd) is None
        found.append((score, holed.update(step, {"kl": value, "length": value**0.5})))
    assert all(ours == theirs for ours, theirs in found)
    assert plain.state_dict() == holed.state_dict()
    assert plain.raised_at is not None


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    rules = Calibration(weights={"kl": 1.0}, threshold=2.0, floors={"kl": 0.1}, slack=1.0)
    rules.save(tmp_path / "deep" / "alarm.json")
    assert Calibration.load(tmp_path / "deep" / "alarm.json") == rules
    assert AlarmConfig(calibration=str(tmp_path / "deep" / "alarm.json")).load() == rules
    assert AlarmConfig(action="warn").load() == WARN
    assert AlarmConfig(action="stop").load() == STOP
    with pytest.raises(DataError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"weights": {"joy": 1.0}, "threshold": 1.0}')
    with pytest.raises(DataError, match="'joy' is no signal"):
        Calibration.load(tmp_path / "other.json")
    (tmp_path / "unit.json").write_text('{"weights": {"kl": 1.0}, "threshold": 1.0, "unit": "ell"}')
    with pytest.raises(DataError, match="unit"):
        Calibration.load(tmp_path / "unit.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="no alarm's calibration"):
        Calibration.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": {}}, "at least one signal"),
        ({"weights": {"kl": 0.0}}, "at least one signal"),
        ({"floors": {"kl": 0.0}}, "floors must be above 0"),
        ({"window": 1}, "window must be at least 2"),
        ({"window": -1, "unit": "raw"}, "window must be at least 2"),
        ({"unit": "floor"}, "needs a floor for each signal"),
        ({"unit": "floor", "floors": {"length": 1.0}}, "needs a floor for each signal"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"rewind": 1.1}, "rewind is a share"),
        ({"threshold": math.inf}, "threshold must be finite"),
    ],
)
def test_a_calibration_that_means_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Calibration(**({"weights": {"kl": 1.0}, "threshold": 1.0} | options))


# ---- snapshots ---------------------------------------------------------------------------------


def test_places_are_kept_from_the_one_needed_and_thinned_where_they_are_many() -> None:
    assert list(kept_places(7, rewind=1.0)) == [6, 7]
    assert list(kept_places(7, rewind=0.5)) == [2, 3, 4, 5, 6, 7]
    assert list(kept_places(9, rewind=0.5, every=3)) == [0, 3, 6, 9]
    assert list(kept_places(40, rewind=0.5)) == [20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40]
    assert list(kept_places(1000, rewind=0.0)) == [0]
    # Whatever the rewind: never too many, each kept from when it was there on, and always one at or
    # before the place that is needed, no further from it than four of the distances.
    for rewind in (0.01, 0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 0.9, 0.99, 1.0):
        for every in (1, 2, 3, 5):
            there: set[int] = set()
            for place in range(700):
                wanted = kept_places(place, rewind=rewind, every=every)
                assert len(wanted) <= MOST_SNAPSHOTS
                there = (there | {place}) & set(wanted)
                needed = math.floor(rewind * place)
                last = max(p for p in there if p <= needed)
                assert needed - last < wanted.step
                assert all(p in there for p in wanted if p > needed)


@pytest.mark.parametrize("on_disk", [False, True])
def test_snapshots_give_back_the_last_place_at_or_before_the_one_asked_for(
    tmp_path: Path, on_disk: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    folder = tmp_path / "snapshots" if on_disk else None
    kept = Snapshots(module, folder, every=2)
    for place in range(15):
        torch.nn.init.constant_(module.weight, float(place))
        kept.keep(place, rewind=0.5)
    assert kept._places() == [4, 6, 8, 10, 12, 14]
    assert [(kept.restore(p), module.weight.item()) for p in (14, 13, 7)] == [
        (14, 14),
        (12, 12),
        (6, 6),
    ]
    if folder is not None:  # another process's, as after a kill
        assert Snapshots(module, folder, every=2).restore(9) == 8
        assert module.weight.item() == 8
    assert not caplog.records
    assert (kept.restore(3), module.weight.item()) == (4, 4)  # none is as early
    assert "the earliest is put back" in caplog.text
    kept.clear()
    assert folder is None or not folder.exists()
    with pytest.raises(DataError, match="No snapshot of the policy is left"):
        kept.restore(3)


def test_parameters_that_are_not_trained_are_not_kept() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    kept = Snapshots(module, None)
    kept.keep(0, rewind=1.0)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.fill_(5.0)
    kept.restore(0)
    assert torch.equal(module.weight, before)
    assert bool((module.bias == 5).all())


# ---- in the loop -------------------------------------------------------------------------------


def test_signals_are_logged_and_change_nothing(tmp_path: Path) -> None:
    config = PolicyConfig(steps=3, **SMALL)
    reward = ensemble()
    plain = train_policy(new_policy(), reward, tiny_texts(6), config, output_dir=tmp_path / "plain")
    watched = train_policy(
        new_policy(),
        reward,
        tiny_texts(6),
        config,
        output_dir=tmp_path / "watched",
        alarm=AlarmConfig(action="log", reference_prompts=4),
    )
    assert same(weights_of(plain), weights_of(watched))
    for before, after in zip(
        metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "watched"), strict=True
    ):
        new = {k.removeprefix("alarm/") for k in after if k not in before}
        assert new == {*OWN, "length", "kl", "logprob", "energy_loss"} == set(SIGNALS)
        assert {k: after[k] for k in before} == before
        assert after["alarm/kl"] == after["kl/k1"]
        assert after["alarm/spread"] == pytest.approx(after["objective/member_std"])


def test_an_ensemble_watches_a_reward_that_is_not_its_own(tmp_path: Path) -> None:
    train_policy(
        new_policy(),
        lambda prompts, completions: [float(len(c)) for c in completions],
        tiny_texts(6),
        PolicyConfig(steps=2, **SMALL),
        output_dir=tmp_path,
        alarm=AlarmConfig(action="log"),
        monitor=ensemble(),
    )
    assert all({f"alarm/{name}" for name in OWN} <= set(row) for row in metrics_of(tmp_path))


def test_a_warning_is_one_line_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alarm = AlarmConfig(action="warn", calibration=saved(tmp_path / "a.json"))
    with caplog.at_level(logging.WARNING, logger="trueward.train.alarm"):
        train_policy(
            new_policy(),
            ensemble(),
            tiny_texts(6),
            PolicyConfig(steps=5, **SMALL),
            output_dir=tmp_path / "run",
            alarm=alarm,
        )
    assert [r.message for r in caplog.records if "Alarm in step 3" in r.message] == [
        r.message for r in caplog.records
    ]
    assert len(caplog.records) == 1
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 5
    assert ["alarm/raised_at" in row for row in rows] == [False, False, True, True, True]
    assert ["alarm/score" in row for row in rows] == [False, False, True, True, True]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert summary["alarm/raised_at"] == 3
    assert "alarm/restored" not in summary
    assert not (tmp_path / "run" / "snapshots").exists()


@pytest.mark.parametrize(
    ("rewind", "keep_every", "place"), [(1, 1, 4), (0.4, 1, 1), (1, 3, 3), (0, 1, 0)]
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_stopped_run_ends_with_the_policy_of_the_place_it_goes_back_to(
    tmp_path: Path, rewind: float, keep_every: int, place: int, on_disk: bool
) -> None:
    path = saved(tmp_path / "a.json", rewind=float(rewind), patience=3)  # raised in step 5
    alarm = AlarmConfig(action="stop", calibration=path, keep_every=keep_every)
    reward, told = ensemble(), []

    def evaluation(policy: Policy, step: int) -> dict[str, float]:
        told.append((step, weights_of(policy)))
        return {"seen": float(step)}

    stopped = train_policy(
        new_policy(),
        reward,
        tiny_texts(6),
        PolicyConfig(steps=9, **SMALL),
        output_dir=tmp_path / "run" if on_disk else None,
        alarm=alarm,
        evaluation=evaluation,
    )
    # Without an alarm, a run of as many steps ends there.
    expected = new_policy()
    if place:
        train_policy(expected, reward, tiny_texts(6), PolicyConfig(steps=place, **SMALL))
    assert same(weights_of(stopped), weights_of(expected))
    assert [step for step, _ in told] == [place]
    assert same(told[0][1], weights_of(expected))
    if on_disk:
        rows = metrics_of(tmp_path / "run")
        assert len(rows) == 5  # the step that raised it learns nothing
        assert "loss/policy" in rows[3]
        assert "loss/policy" not in rows[4]
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
        assert summary["alarm/raised_at"] == 5
        assert summary["alarm/restored"] == place
        assert summary["seen"] == place
        # What else the summary holds is of the step that raised it, and says so.
        own = {"alarm/raised_at", "alarm/restored", "seen"}
        of_step = {k: v for k, v in rows[4].items() if k not in ("stage", "step", *own)}
        assert {k: v for k, v in summary.items() if k not in own} == {
            f"raising_step/{k}": v for k, v in of_step.items()
        }
        again = Policy.from_pretrained(tmp_path / "run" / "model")
        assert same(weights_of(again), weights_of(expected))
        assert not (tmp_path / "run" / "snapshots").exists()


def test_a_run_whose_alarm_is_silent_ends_as_one_without(tmp_path: Path) -> None:
    alarm = AlarmConfig(action="stop", calibration=saved(tmp_path / "a.json", threshold=1e9))
    config, reward = PolicyConfig(steps=4, **SMALL), ensemble()
    ours = train_policy(
        new_policy(), reward, tiny_texts(6), config, output_dir=tmp_path / "run", alarm=alarm
    )
    theirs = train_policy(new_policy(), reward, tiny_texts(6), config)
    assert same(weights_of(ours), weights_of(theirs))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert "alarm/raised_at" not in summary
    assert not (tmp_path / "run" / "snapshots").exists()


class KilledError(Exception):
    pass


@pytest.mark.parametrize("killed_in", [3, 4, 5])
def test_a_resumed_run_raises_the_alarm_in_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    # A negative slack makes the sum grow at every step, so that it crosses in the one wanted.
    config = PolicyConfig(steps=9, checkpoint_every=2, **SMALL)
    reward, prompts = ensemble(), tiny_texts(6)
    options = {"weights": {"kl": 1.0, "drift": 1.0}, "slack": -1e3, "rewind": 0.7}
    never = saved(tmp_path / "never.json", **(options | {"threshold": 1e9}))
    train_policy(
        new_policy(),
        reward,
        prompts,
        config,
        output_dir=tmp_path / "never",
        alarm=AlarmConfig(action="warn", calibration=never),
    )
    scores = [row.get("alarm/score", 0.0) for row in metrics_of(tmp_path / "never")]
    assert scores[4] > max(scores[:4])
    threshold = (scores[4] + max(scores[:4])) / 2
    alarm = AlarmConfig(
        action="stop",
        calibration=saved(tmp_path / "a.json", **(options | {"threshold": threshold})),
    )
    whole = train_policy(
        new_policy(), reward, prompts, config, output_dir=tmp_path / "whole", alarm=alarm
    )
    learn, calls = policy_module._learn, []

    def dies(*arguments: Any) -> dict[str, float]:
        if arguments[-1] == killed_in and not calls:
            calls.append(1)
            raise KilledError
        return learn(*arguments)

    restore = Snapshots.restore

    def dies_late(self: Snapshots, place: int) -> int:
        if killed_in == 5 and not calls:  # the alarm is raised: it learns no more
            calls.append(1)
            raise KilledError
        return restore(self, place)

    monkeypatch.setattr(policy_module, "_learn", dies)
    monkeypatch.setattr(Snapshots, "restore", dies_late)
    with pytest.raises(KilledError):
        train_policy(
            new_policy(), reward, prompts, config, output_dir=tmp_path / "killed", alarm=alarm
        )
    again = train_policy(
        new_policy(), reward, prompts, config, output_dir=tmp_path / "killed", alarm=alarm
    )
    assert same(weights_of(whole), weights_of(again))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
        for name in ("whole", "killed")
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0]["alarm/raised_at"] == 5
    assert summaries[0]["alarm/restored"] == 2  # 0.7 x 4 = 2.8


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_the_step_that_raises_the_alarm_is_logged_whatever_log_every_says(
    tmp_path: Path, action: Any
) -> None:
    train_policy(
        new_policy(),
        ensemble(),
        tiny_texts(6),
        PolicyConfig(steps=5, log_every=4, **SMALL),
        output_dir=tmp_path / "run",
        alarm=AlarmConfig(action=action, calibration=saved(tmp_path / "a.json")),
    )
    steps = [row["step"] for row in metrics_of(tmp_path / "run")]
    assert steps == {"warn": [3, 4, 5], "stop": [3]}[action]


def test_a_run_is_resumed_with_the_alarm_that_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(action: Any, *, threshold: float = 1e9) -> None:
        path = saved(tmp_path / f"{threshold}.json", threshold=threshold)
        train_policy(
            new_policy(),
            ensemble(),
            tiny_texts(6),
            PolicyConfig(steps=4, checkpoint_every=1, **SMALL),
            output_dir=tmp_path / "run",
            alarm=AlarmConfig(action=action, calibration=path, reference_prompts=2),
        )

    def dies(*_: Any) -> dict[str, float]:
        raise KilledError

    learn = policy_module._learn
    monkeypatch.setattr(policy_module, "_learn", lambda *a: dies() if a[-1] == 3 else learn(*a))
    with pytest.raises(KilledError):
        run("warn")
    with pytest.raises(DataError, match="another calibration of its alarm"):
        run("warn", threshold=2e9)
    with pytest.raises(DataError, match="another action of its alarm"):
        run("stop")
    monkeypatch.setattr(policy_module, "_learn", learn)
    run("warn")
    assert len(metrics_of(tmp_path / "run")) == 4


def test_an_alarm_without_a_calibration_says_whose_it_takes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said(action: Any) -> int:
        caplog.clear()
        train_policy(
            new_policy(),
            ensemble(),
            tiny_texts(4),
            PolicyConfig(steps=1, **SMALL),
            alarm=AlarmConfig(action=action, reference_prompts=2),
        )
        return sum("small policies in a made-up world" in r.message for r in caplog.records)

    assert [said(action) for action in ("log", "warn", "stop")] == [0, 1, 1]


@pytest.mark.parametrize("action", ["log", "warn", "stop"])
def test_signals_that_are_not_finite_are_told_once_and_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, action: Any
) -> None:
    rules = {"weights": {"gain": 1.0}, "threshold": 1e9, "window": 2}
    train_policy(
        new_policy(),
        lambda prompts, completions: [float(len(c)) for c in completions],
        tiny_texts(6),
        PolicyConfig(steps=3, **SMALL),
        output_dir=tmp_path / "run",
        alarm=AlarmConfig(
            action=action, calibration=saved(tmp_path / "a.json", **rules), reference_prompts=2
        ),
        monitor=lambda prompts, completions: [math.nan] * len(completions),
    )
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 3
    assert all(math.isnan(row["alarm/gain"]) for row in rows)
    assert not any("alarm/score" in row for row in rows)
    assert sum("Not finite in step 1" in r.message for r in caplog.records) == 1
    assert sum("Not finite" in r.message for r in caplog.records) == 1


def test_an_energy_loss_is_left_out_where_layers_cannot_be_told_and_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: str) -> list[dict[str, float]]:
        train_policy(
            new_policy(),
            ensemble(),
            tiny_texts(4),
            PolicyConfig(steps=2, **SMALL),
            output_dir=tmp_path / folder,
            alarm=AlarmConfig(action="log", reference_prompts=2),
        )
        return metrics_of(tmp_path / folder)

    def refuses(*_: Any, **__: Any) -> Any:
        raise ValueError("no")

    with monkeypatch.context() as patched:
        patched.setattr(policy_module, "layer_list", refuses)
        assert all("alarm/energy_loss" not in row and "alarm/kl" in row for row in run("a"))
    assert sum("energy loss is unknown" in r.message for r in caplog.records) == 1
    monkeypatch.setattr(policy_module, "energy_losses", refuses)
    with pytest.raises(ValueError, match="no"):
        run("b")


def test_an_adapter_is_put_back_and_the_reference_is_the_adapter_off(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json")  # raised in step 3
    policies = []
    for steps, alarm in ((6, AlarmConfig(action="stop", calibration=path)), (2, None)):
        policy = new_policy()
        policy.add_lora(2)
        train_policy(
            policy, ensemble(), tiny_texts(6), PolicyConfig(steps=steps, **SMALL), alarm=alarm
        )
        policies.append(weights_of(policy))
    assert same(*policies)


def test_options_that_cannot_go_together_are_refused() -> None:
    config = PolicyConfig(steps=2, **SMALL)
    with pytest.raises(ValueError, match="A monitor is for an alarm"):
        train_policy(new_policy(), ensemble(), tiny_texts(3), config, monitor=ensemble())
    refreshing = PolicyConfig(steps=2, refresh_every=1, **SMALL)
    with pytest.raises(ValueError, match="cannot watch its own policy"):
        train_policy(
            new_policy(),
            ensemble(),
            tiny_texts(3),
            refreshing,
            refresh=lambda *_: ensemble(),
            alarm=AlarmConfig(action="warn"),
        )
    with pytest.raises(ValueError, match="reference_prompts must be at least 2"):
        AlarmConfig(reference_prompts=1)
    with pytest.raises(ValueError, match="keep_every must be at least 1"):
        AlarmConfig(keep_every=0)


def test_a_monitor_without_the_calibration_s_signals_is_told_at_the_first_step(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "a.json", weights={"drift": 1.0})
    with pytest.raises(ValueError, match="reads the signal 'drift', which step 1 has not"):
        train_policy(
            new_policy(),
            lambda prompts, completions: [1.0 + len(c) for c in completions],
            tiny_texts(4),
            PolicyConfig(steps=2, **SMALL),
            alarm=AlarmConfig(action="warn", calibration=path),
        )
