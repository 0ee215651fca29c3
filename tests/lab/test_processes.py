"""Tasks over processes: order, failures, deaths, interrupts, orphans, locks."""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trueward.data.sources import DataError
from trueward.lab.processes import Outcome, State, Task, only_one, run_tasks

# Workers import what they run by its name, and pytest has none for this file.
WORK = '''
import os, signal, sys, time
from pathlib import Path

def note(file, text):
    with Path(file).open("a") as log:
        log.write(text + " ")

def wait_for(file):
    while not Path(file).exists():
        time.sleep(0.005)

def meet(folder, own, other):
    """Ends only where both run at the same time."""
    Path(folder, own).touch()
    wait_for(Path(folder, other))

def refuse(message):
    raise ValueError(message)

def divide():
    return 1 / 0

def leave():
    sys.exit("enough")

def killed_by(number):
    os.kill(os.getpid(), number)

class Stubborn(Exception):
    """Cannot be unpickled: it wants two arguments, and pickle gives one."""
    def __init__(self, one, two):
        super().__init__(one)

def stubborn():
    raise Stubborn("no", "way")

def pid_and_sleep(folder, number):
    Path(folder, f"{number}.tmp").write_text(str(os.getpid()))
    Path(folder, f"{number}.tmp").rename(Path(folder, f"{number}.pid"))
    time.sleep(60)
'''

SETTINGS = """
import logging, os
from pathlib import Path
import torch
from transformers.utils import logging as transformers_logging

at_first = torch.get_num_threads()
torch.set_num_threads(2)
logging.getLogger("trueward").setLevel(logging.INFO)

def settings(file):
    logger = logging.getLogger("trueward")
    found = {
        "threads": (at_first, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]),
        "levels": [logger.isEnabledFor(level) for level in (logging.INFO, logging.WARNING)],
        "transformers": transformers_logging.get_verbosity() == transformers_logging.ERROR,
        "bars": transformers_logging.is_progress_bar_enabled(),
    }
    Path(file).write_text(repr(found))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that workers can import: they get this process's `sys.path`."""
    name = f"work_{tmp_path.name}"  # another one in each test
    (tmp_path / f"{name}.py").write_text(WORK)
    (tmp_path / f"settings_{name}.py").write_text(SETTINGS)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def states_of(outcomes: Mapping[str, Outcome]) -> dict[str, State]:
    return {name: outcome.state for name, outcome in outcomes.items()}


# --- in this process ---


def test_tasks_run_after_what_they_need_and_else_in_the_order_given() -> None:
    ran: list[str] = []
    needs = {"e": ("c",), "b": (), "d": ("b", "a"), "c": ("b",), "a": (), "f": ()}
    tasks = [Task(name=n, function=ran.append, arguments=(n,), needs=v) for n, v in needs.items()]
    outcomes = run_tasks(tasks, processes=1)
    # After b, c can run and stands before a and f; after c, e stands before all.
    assert ran == ["b", "c", "e", "a", "d", "f"]
    assert list(outcomes) == list(needs)
    assert set(states_of(outcomes).values()) == {"done"}


def fail(message: str) -> None:
    raise DataError(message)


def test_a_failure_skips_what_needs_it_and_nothing_else() -> None:
    ran: list[str] = []
    tasks = [
        Task(name="bad", function=fail, arguments=("The file is empty: fill it.\nReally.",)),
        Task(name="child", function=ran.append, arguments=("child",), needs=("good", "bad")),
        Task(name="grandchild", function=ran.append, arguments=("grandchild",), needs=("child",)),
        Task(name="good", function=ran.append, arguments=("good",)),
        Task(name="other", function=ran.append, arguments=("other",), needs=("good",)),
    ]
    outcomes = run_tasks(tasks, processes=1)
    assert ran == ["good", "other"]
    assert list(states_of(outcomes).values()) == ["failed", "skipped", "skipped", "done", "done"]
    assert outcomes["bad"].error == "The file is empty: fill it."
    assert outcomes["bad"].traceback.startswith("Traceback (most recent call last):")
    assert "in fail\n" in outcomes["bad"].traceback
    assert outcomes["child"].error == "it needs 'bad', which is failed."
    assert outcomes["grandchild"].error == "it needs 'child', which is skipped."
    assert outcomes["good"].error == outcomes["good"].traceback == ""


def test_a_long_chain_is_skipped_to_its_end() -> None:
    tasks = [Task(name="0", function=fail, arguments=("no",))]
    tasks += [Task(name=str(i), function=fail, needs=(str(i - 1),)) for i in range(1, 3000)]
    outcomes = run_tasks(tasks, processes=1)
    assert [o.state for o in outcomes.values()].count("skipped") == 2999


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ([("a", ()), ("b", ()), ("a", ())], r"two tasks have the name 'a'"),
        ([("a", ("b", "x")), ("b", ())], r"task 'a' needs 'x', which is no task"),
        ([("a", ()), ("b", ("c",)), ("c", ("a", "b"))], r"in a circle: (b -> c -> b|c -> b -> c)"),
        ([("a", ("a",))], r"in a circle: a -> a"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    needs: list[tuple[str, tuple[str, ...]]], message: str
) -> None:
    ran: list[str] = []
    tasks = [Task(name=n, function=ran.append, arguments=(n,), needs=v) for n, v in needs]
    with pytest.raises(ValueError, match=message):
        run_tasks(tasks, processes=1)
    assert ran == []


def test_fewer_than_no_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="processes must be at least 0, got -1"):
        run_tasks([], processes=-1)


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_no_tasks_no_outcomes(processes: int) -> None:
    assert run_tasks([], processes=processes) == {}


def test_in_this_process_one_thread_computes_and_the_number_comes_back() -> None:
    seen: list[object] = []
    torch.set_num_threads(2)
    try:
        tasks = [
            Task(name="threads", function=lambda: seen.append(torch.get_num_threads())),
            Task(name="where", function=lambda: seen.append(os.getpid())),
        ]
        run_tasks(tasks, processes=1)
        assert seen == [1, os.getpid()]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_an_interrupt_is_raised_again_and_a_task_that_exits_has_failed() -> None:
    ran: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    tasks = [
        Task(name="exit", function=sys.exit, arguments=("enough",)),
        Task(name="ctrl-c", function=interrupt),
        Task(name="never", function=ran.append, arguments=("never",)),
    ]
    assert run_tasks(tasks[:1], processes=1)["exit"].error == "SystemExit: enough"
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, processes=1)
    assert ran == []


def test_every_state_is_reported() -> None:
    seen: list[dict[str, State]] = []
    tasks = [
        Task(name="a", function=time.sleep, arguments=(0.02,)),
        Task(name="b", function=fail, arguments=("no",), needs=("a",)),
        Task(name="c", function=fail, arguments=("no",), needs=("b",)),
    ]
    outcomes = run_tasks(tasks, processes=1, on_change=lambda states: seen.append(dict(states)))
    assert seen == [
        {"a": "running", "b": "waiting", "c": "waiting"},
        {"a": "done", "b": "running", "c": "waiting"},
        {"a": "done", "b": "failed", "c": "skipped"},
    ]
    assert 0.02 <= outcomes["a"].seconds < 2


# --- over processes ---


def test_workers_run_side_by_side_and_survive_every_kind_of_failure(
    tmp_path: Path, work: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    settings = importlib.import_module(f"settings_{work.__name__}").settings
    torch.set_num_threads(1)  # what the module has set is meant for the workers
    logging.getLogger("trueward").setLevel(logging.NOTSET)
    log, seen = tmp_path / "log", set()

    def task(
        name: str, function: Callable[..., object], *arguments: object, needs: str = ""
    ) -> Task:
        return Task(name=name, function=function, arguments=arguments, needs=tuple(needs.split()))

    tasks = [
        task("late", work.note, log, "late", needs="one two"),
        task("one", work.meet, tmp_path, "1", "2"),
        task("two", work.meet, tmp_path, "2", "1"),
        task("refuse", work.refuse, "The dial is too high: lower it."),
        task("divide", work.divide),
        task("exit", work.leave),
        task("stubborn", work.stubborn),
        task("lambda", lambda: None),
        # A worker that dies takes nobody with it: this one waits until another is dead and buried.
        task("beside", work.wait_for, tmp_path / "after"),
        task("killed", work.killed_by, signal.SIGKILL),
        task("aborted", work.killed_by, signal.SIGABRT),
        task("gone", os._exit, 3),
        task("orphan", work.note, log, "orphan", needs="killed"),
        task("after", (tmp_path / "after").touch),
        task("settings", settings, tmp_path / "settings"),
    ]
    outcomes = run_tasks(tasks, processes=2, on_change=lambda states: seen.update(states.items()))
    assert list(outcomes) == [t.name for t in tasks]
    failed = {name: o.error for name, o in outcomes.items() if o.state != "done"}
    assert "pickle" in failed.pop("lambda").lower()
    assert failed == {
        "refuse": "The dial is too high: lower it.",
        "divide": "ZeroDivisionError: division by zero",
        "exit": "SystemExit: enough",
        "stubborn": "Stubborn: no",
        "killed": "the process that ran it was killed; where memory ran out, run fewer processes "
        "at once.",
        "aborted": "the process that ran it died of signal 6 (Aborted).",
        "gone": "the process that ran it ended itself with exit code 3.",
        "orphan": "it needs 'killed', which is failed.",
    }
    assert outcomes["orphan"].state == "skipped"
    assert "return 1 / 0" in outcomes["divide"].traceback
    assert log.read_text() == "late "
    assert (tmp_path / "settings").read_text() == repr(
        {"threads": (1, 1, "1"), "levels": [False, True], "transformers": True, "bars": False}
    )
    assert os.environ["OMP_NUM_THREADS"] == "2"  # of this process: as it was
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    assert {("late", "waiting"), ("one", "running"), ("one", "done"), ("killed", "failed")} <= seen
    assert outcomes["settings"].seconds > outcomes["refuse"].seconds > 0


SCRIPT = """
import sys
from pathlib import Path
from trueward.lab.processes import Task, only_one, run_tasks
from {module} import note, pid_and_sleep
{guard}:
    folder = Path(sys.argv[1])
    tasks = [Task(name=str(i), function=pid_and_sleep, arguments=(folder, i)) for i in range(2)]
    tasks.append(Task(name="3", function=note, arguments=(folder / "log", "ran")))
    with only_one(folder):
        run_tasks(tasks, processes=2)
"""


def start(tmp_path: Path, work: ModuleType, guard: str) -> "subprocess.Popen[str]":
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(module=work.__name__, guard=guard))
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        # A shell starts what runs in the background with interrupts ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def pids_of(tmp_path: Path) -> list[int]:
    """The workers' process ids, once both have begun to sleep."""
    deadline = time.monotonic() + 30
    while len(found := list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(file.read_text()) for file in found]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_a_run_ends_its_workers_and_frees_its_folder(
    tmp_path: Path, work: ModuleType, by: signal.Signals
) -> None:
    process = start(tmp_path, work, "if __name__ == '__main__'")
    try:
        workers = pids_of(tmp_path)
        assert len({*workers, process.pid}) == 3
        message = rf"{tmp_path} is in use by another run \(process {process.pid}\): wait for it"
        with pytest.raises(DataError, match=message), only_one(tmp_path):
            pass
        if by == signal.SIGINT:
            for pid in workers:  # a terminal sends it to all: it must mean nothing to them
                os.kill(pid, by)
            time.sleep(0.3)
            assert process.poll() is None
            os.killpg(process.pid, by)
        else:
            process.send_signal(by)
        # The workers hold their ends of stdout and stderr: all of it is read when they are gone.
        _, errors = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -by
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == (by == signal.SIGINT)
    assert not (tmp_path / "log").exists()
    with only_one(tmp_path):
        pass


def test_a_script_without_the_main_guard_is_told_so(tmp_path: Path, work: ModuleType) -> None:
    process = start(tmp_path, work, "if True")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "RuntimeError: 3 worker processes in a row ended before they could take" in errors
    assert "under `if __name__ == '__main__':`" in errors


# --- one run at a time ---


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with only_one(folder):
        message = rf"new is in use by another run \(process {os.getpid()}\): wait for it, or stop"
        with pytest.raises(DataError, match=message), only_one(folder):
            pass
        with only_one(tmp_path):  # another folder is free
            pass
        with pytest.raises(DataError, match="in use"), only_one(folder):  # a refusal frees nothing
            pass
    with only_one(folder):
        assert (folder / ".lock").read_text() == str(os.getpid())
