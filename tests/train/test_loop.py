"""The loop's bookkeeping: schedule, seeds, and runs that end as unbroken ones do."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from trueward.data.formats import DataError
from trueward.train.loop import Loop, LoopConfig, learning_rate_at, permutation, seed_of


def test_warm_up_is_linear_and_reaches_the_rate_at_its_end():
    config = LoopConfig(learning_rate=1.0, warmup_ratio=0.5)
    assert [learning_rate_at(s, 8, config) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]


def test_cosine_starts_at_the_rate_and_is_half_of_it_midway():
    config = LoopConfig(learning_rate=2.0, warmup_ratio=0.0)
    assert learning_rate_at(1, 10, config) == 2.0
    assert learning_rate_at(6, 10, config) == pytest.approx(1.0)
    assert learning_rate_at(10, 10, config) == pytest.approx(1 + math.cos(0.9 * math.pi))


def test_linear_and_constant_schedules():
    linear = LoopConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="linear")
    constant = LoopConfig(learning_rate=1.0, warmup_ratio=0.0, schedule="constant")
    assert learning_rate_at(4, 4, linear) == pytest.approx(0.25)
    assert learning_rate_at(4, 4, constant) == 1.0


@pytest.mark.parametrize(
    ("field", "value"), [("learning_rate", 0.0), ("warmup_ratio", 1.0), ("max_batch_tokens", 0)]
)
def test_options_out_of_range_are_refused(field: str, value: float):
    with pytest.raises(ValueError, match=field):
        LoopConfig(**{field: value})


def test_seeds_and_orders_are_functions_of_their_parts():
    assert seed_of(1, "a") == seed_of(1, "a") != seed_of(1, "b")
    assert permutation(20, 3, "x") == permutation(20, 3, "x") != permutation(20, 4, "x")
    assert sorted(permutation(20, 3, "x")) == list(range(20))


def train(folder: Path | None, *, stop_after: int = 99, checkpoint_every: int = 2) -> nn.Module:
    """Fit a line in 7 steps with dropout noise; stop as a kill would, without a goodbye."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    config = LoopConfig(
        learning_rate=0.1, checkpoint_every=checkpoint_every, progress=False, max_grad_norm=0.5
    )
    loop = Loop(config, total_steps=7, modules={"m": model}, stage="line", output_dir=folder)
    for step in loop.steps():
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loop.backward(loss)
        loop.log({"loss": loss.item(), "grad_norm": loop.update()})
        if step == stop_after:
            return model
    loop.finish({"loss": loss.item()})
    return model


@pytest.mark.parametrize("killed_at", [1, 2, 3, 5, 6])
def test_a_killed_run_ends_with_the_weights_and_metrics_of_an_unbroken_one(
    tmp_path: Path, killed_at: int
):
    whole = train(tmp_path / "whole")
    train(tmp_path / "killed", stop_after=killed_at)
    resumed = train(tmp_path / "killed")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_torn_last_line_of_metrics_is_dropped_on_resuming(tmp_path: Path):
    train(tmp_path, stop_after=5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "line", "st')
    train(tmp_path)
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4, 5, 6, 7]


def test_a_half_written_checkpoint_is_not_read(tmp_path: Path):
    whole = train(None)
    train(tmp_path, stop_after=5)
    (tmp_path / "checkpoint.tmp").mkdir()
    (tmp_path / "checkpoint.tmp" / "state.json").write_text("{")
    resumed = train(tmp_path)
    assert torch.equal(next(whole.parameters()), next(resumed.parameters()))


def test_the_summary_is_written_last_and_checkpoints_go(tmp_path: Path):
    train(tmp_path, stop_after=5)
    assert not (tmp_path / "summary.json").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    train(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"] == "line"
    assert summary["seed"] == 42
    assert set(summary) == {"command", "seed", "seconds", "metrics"}
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_folder_with_another_configuration_is_refused_by_the_field(tmp_path: Path):
    train(tmp_path, stop_after=3)
    config = LoopConfig(learning_rate=0.2, checkpoint_every=2, progress=False, max_grad_norm=0.5)
    with pytest.raises(DataError, match=r"learning_rate=0\.1, this one has learning_rate=0\.2"):
        Loop(config, total_steps=7, modules={"m": nn.Linear(1, 1)}, stage="s", output_dir=tmp_path)


def test_how_often_to_checkpoint_may_change_between_runs(tmp_path: Path):
    whole = train(None)
    train(tmp_path, stop_after=5)
    resumed = train(tmp_path, checkpoint_every=3)
    assert torch.equal(next(whole.parameters()), next(resumed.parameters()))


def test_clipping_bounds_the_step_and_returns_the_norm_before_it():
    model = nn.Linear(1, 1, bias=False)
    config = LoopConfig(learning_rate=1.0, warmup_ratio=0.0, max_grad_norm=1.0, progress=False)
    loop = Loop(config, total_steps=1, modules={"m": model}, stage="s")
    for _ in loop.steps():
        loop.backward(100 * model.weight.sum())
        assert loop.update() == pytest.approx(100.0)


def test_parts_of_a_batch_accumulate_to_the_gradient_of_the_whole():
    weights = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        loop = Loop(
            LoopConfig(learning_rate=0.1, warmup_ratio=0.0, progress=False),
            total_steps=1,
            modules={"m": model},
            stage="s",
        )
        x = torch.arange(8.0).view(4, 2)
        for _ in loop.steps():
            for part in parts:
                loop.backward(model(x[part]).square().sum() / 4)
            loop.update()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1])


def test_tensorboard_tracker_receives_the_metrics(tmp_path: Path):
    pytest.importorskip("tensorboard")
    model = nn.Linear(1, 1)
    config = LoopConfig(learning_rate=0.1, tracker="tensorboard", progress=False)
    loop = Loop(config, total_steps=1, modules={"m": model}, stage="s", output_dir=tmp_path)
    for _ in loop.steps():
        loop.backward(model.weight.sum())
        loop.update()
        loop.log({"loss": 1.0})
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_flex_attention_is_for_a_gpu():
    with pytest.raises(ValueError, match="no gradients on a CPU"):
        Loop(LoopConfig(flex_attention=True), total_steps=1, modules={}, stage="line")


def test_sharded_layers_are_not_compiled():
    config = LoopConfig(compile_layers=True, sharding="full")
    with pytest.raises(ValueError, match="compile_layers is not for sharded weights"):
        Loop(config, total_steps=1, modules={}, stage="line", can_shard=True)
