"""The folder of a run: its configuration, environment, metrics, checkpoints and summary."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from trueward.console import is_main_process
from trueward.data.formats import DataError

# Where a run is written, how much it says, and where its weights lie do not change its numbers.
_FREE_FIELDS = {"output_dir", "log_every", "checkpoint_every", "tracker", "progress", "sharding"}


class RunFolder:
    """Where one command or one stage writes; `path=None` keeps nothing (a run inside a program).

    Files: `config.yaml` (resolved), `environment.json`, `metrics.jsonl` (a line per step),
    `summary.json` (written last: its presence says that the stage is finished) and, until then,
    one `checkpoint-NNNNNN/` of safetensors and JSON. A folder whose `config.yaml` says something
    else is refused, but for `free` fields (at any depth), which may change until the resume. Of
    several processes the first one writes.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        command: str,
        config: object = None,
        free: Collection[str] = (),
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.writes = path is not None and is_main_process()
        self.command = command
        self.config = config
        self._started = time.monotonic()
        self._seconds_before = 0.0
        if self.path is None or not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        resolved = to_plain(config)
        saved = self.path / "config.yaml"
        if saved.exists() and "output_dir" in resolved_keys(saved) - set(resolved or {}):
            saved = (
                self.path / "train.yaml"
            )  # config.yaml is the command's, of which this is a part
        if saved.exists():
            _refuse_other_config(saved, resolved, _FREE_FIELDS.union(free))
        write_text(saved, yaml.safe_dump(resolved, sort_keys=False))
        if not (self.path / "summary.json").exists():  # else the numbers are another revision's
            found = environment() | {"threads": torch.get_num_threads()}
            write_text(self.path / "environment.json", json.dumps(found, indent=2))

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        if self.path is not None and self.writes:
            row = {"stage": stage, "step": step, **metrics}
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def finish(
        self, metrics: dict[str, Any], *, seed: int, seconds: float | None = None
    ) -> dict[str, Any]:
        """Write `summary.json` and remove the checkpoints: the models are saved beside it.

        `seconds` is for a run made of stages, whose own clock starts again at every resume.
        """
        summary = {
            "command": self.command,
            "seed": seed,
            "seconds": round(self.seconds if seconds is None else seconds, 2),
            "metrics": metrics,
        }
        if self.path is not None and self.writes:
            write_text(self.path / "summary.json", json.dumps(summary, indent=2))
            for old in self.path.glob("checkpoint-*"):
                shutil.rmtree(old)
        return summary

    @property
    def seconds(self) -> float:
        """Time spent, the runs before a resume counted in."""
        return self._seconds_before + time.monotonic() - self._started

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor], state: object) -> None:
        """Write a checkpoint so that a kill at any moment leaves a whole one behind."""
        if self.path is None or not self.writes:
            return
        draft, final = self.path / "checkpoint.tmp", self.path / f"checkpoint-{step:06d}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        kept = {k: t.detach().contiguous().cpu() for k, t in tensors.items()}
        save_file(kept, draft / "tensors.safetensors")
        plain = {"step": step, "seconds": self.seconds, "state": state}
        write_text(draft / "state.json", json.dumps(plain))
        if final.exists():
            shutil.rmtree(final)
        draft.rename(final)
        for old in sorted(self.path.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor], Any] | None:
        """Return (step, tensors, state) of the last checkpoint, and cut later metrics away."""
        if self.path is None:
            return None
        found = sorted(self.path.glob("checkpoint-*"))
        step, tensors, state = 0, {}, None
        if found:
            plain = json.loads((found[-1] / "state.json").read_text("utf-8"))
            step, state = plain["step"], plain["state"]
            tensors = load_file(found[-1] / "tensors.safetensors")
            self._seconds_before = plain["seconds"]
        if self.writes:
            self._cut_metrics(step)
        return (step, tensors, state) if found else None

    def _cut_metrics(self, step: int) -> None:
        """Drop lines after `step`, and a line that the kill tore: they will be written again."""
        assert self.path is not None
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        kept = []
        for line in file.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step and step > 0:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue
        write_text(file, "".join(line + "\n" for line in kept))


def keep_config(path: Path, config: object) -> None:
    """Write a configuration to a file of its own, or refuse one that differs from what is there.

    Raises:
        DataError: Names what differs.
    """
    if not is_main_process():
        return
    resolved = to_plain(config)
    if path.exists():
        _refuse_other_config(path, resolved, _FREE_FIELDS)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(resolved, sort_keys=False))


def resolved_keys(saved: Path) -> set[str]:
    """Return the top-level keys of a saved configuration."""
    return set(yaml.safe_load(saved.read_text("utf-8")) or {})


def finished_summary(path: str | Path) -> dict[str, Any] | None:
    """Return the summary of the finished run in a folder, None where there is none."""
    file = Path(path) / "summary.json"
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one move, so that no reader sees half of it."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def to_plain(value: object) -> Any:
    """Return dataclasses, paths and tuples as what YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", str(value))


@lru_cache  # git and the packages' metadata are asked once a process
def environment() -> dict[str, object]:
    """Return the versions, the code's revision and the device that a run's numbers rest on."""
    packages = ("trueward", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "revision": _revision(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the git revision of this code where it runs from a checkout."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return out.stdout.strip() or None


def _refuse_other_config(saved: Path, resolved: Any, free: Collection[str]) -> None:
    before = yaml.safe_load(saved.read_text("utf-8"))
    differing = _first_difference(before, resolved, free)
    if differing is not None:
        name, old, new = differing
        raise DataError(
            f"{saved.parent} holds a run with {name}={old!r}, this one has {name}={new!r}: give "
            "another --output_dir, or remove that folder to start afresh."
        )


def _first_difference(
    old: Any, new: Any, free: Collection[str], name: str = ""
) -> tuple[str, object, object] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            if key in free:
                continue
            found = _first_difference(old.get(key), new.get(key), free, f"{name}.{key}".lstrip("."))
            if found:
                return found
        return None
    return None if old == new else (name or "config", old, new)
