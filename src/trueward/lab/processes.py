"""Tasks over processes: each as soon as what it needs is done, none stopped by another's failure.

Workers are started afresh: a fork would copy the locks of torch's threads without the threads. Each
computes with one thread, so that no number depends on how many there are. They talk to the parent
over a pipe each, not through a `ProcessPoolExecutor`: there, one worker that dies takes the others'
tasks with it.
"""

import contextlib
import graphlib
import heapq
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from trueward.console import main_console
from trueward.data.sources import DataError

logger = logging.getLogger(__name__)
console = main_console()

State = Literal["waiting", "running", "done", "failed", "skipped"]
OnChange = Callable[[Mapping[str, State]], None]

# What a worker finds in its environment, set before it can load a library that reads it.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",  # goes before OMP_NUM_THREADS where both are set
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers too
}
_STILLBORN = 3  # so many workers in a row that die before they can work are no accident


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work: a top-level function that writes its results into files."""

    name: str  # unique; what others name in `needs`
    function: Callable[..., object]
    arguments: tuple[object, ...] = ()
    needs: tuple[str, ...] = ()  # names of tasks that must be done before


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended."""

    state: Literal["done", "failed", "skipped"]  # skipped: a task that it needs is not done
    seconds: float = 0.0  # of its function, with the imports that this needed
    error: str = ""  # one line
    traceback: str = ""  # as Python prints it; empty where the task's process died


def run_tasks(
    tasks: Sequence[Task], *, processes: int = 0, on_change: OnChange | None = None
) -> dict[str, Outcome]:
    """Run every task once what it needs is done; among those that can run, in the order given.

    A task that fails stops only those that need it. An interrupt kills what is running and is
    raised again. Workers outlive neither this call nor this process, whatever kills it.

    Args:
        tasks: Functions must be importable by name and arguments picklable, unless `processes` is
            1.
        processes: How many at once; 0 = as many as this process has cores, 1 = in this process.
        on_change: Called here with the state of every task, live and read-only, after changes;
            those that come at once make one call. Tasks wait for it when they end, so it must be
            quick.

    Returns:
        How each task ended, in the order given.

    Raises:
        ValueError: A name comes twice, a need is unknown, or tasks need each other in a circle.
        RuntimeError: No worker can be started.
    """
    if processes < 0:
        raise ValueError(f"processes must be at least 0, got {processes}.")
    schedule = _Schedule(tasks)
    states = MappingProxyType(schedule.states)
    report = (lambda: on_change(states)) if on_change else (lambda: None)
    processes = processes or _cores()
    if processes == 1:
        _run_here(schedule, report)
    else:
        _run_in_workers(schedule, processes, report)
    report()
    return {task.name: schedule.outcomes[task.name] for task in tasks}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Schedule:
    """Which task comes next, and what became of the others."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._places = {task.name: i for i, task in enumerate(tasks)}
        for i, task in enumerate(tasks):
            if self._places[task.name] != i:
                raise ValueError(f"two tasks have the name {task.name!r}: give each its own.")
            for need in task.needs:
                if need not in self._places:
                    raise ValueError(f"task {task.name!r} needs {need!r}, which is no task.")
        self._order = graphlib.TopologicalSorter({task.name: task.needs for task in tasks})
        try:
            self._order.prepare()
        except graphlib.CycleError as error:
            circle = " -> ".join(error.args[1])
            raise ValueError(f"tasks need each other in a circle: {circle}.") from None
        self.states: dict[str, State] = {task.name: "waiting" for task in tasks}
        self.outcomes: dict[str, Outcome] = {}
        self._ready: list[int] = []  # a heap of places
        self._release()

    @property
    def ready(self) -> int:
        """How many tasks could run now."""
        return len(self._ready)

    def start_next(self) -> Task | None:
        """Return the first task that can run, now as running; None where none can."""
        if not self._ready:
            return None
        task = self._tasks[heapq.heappop(self._ready)]
        self.states[task.name] = "running"
        return task

    def finish(self, task: Task, outcome: Outcome) -> None:
        """Write down how a running task ended; what waited for it may run, or is skipped."""
        self._end(task.name, outcome)
        self._release()

    def _end(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name], self.states[name] = outcome, outcome.state
        self._order.done(name)

    def _release(self) -> None:
        while names := self._order.get_ready():  # skipped ones release others in turn
            for name in names:
                needs = self._tasks[self._places[name]].needs
                lost = next((need for need in needs if self.states[need] != "done"), None)
                if lost is None:
                    heapq.heappush(self._ready, self._places[name])
                else:
                    error = f"it needs {lost!r}, which is {self.states[lost]}."
                    self._end(name, Outcome(state="skipped", error=error))


def _run_here(schedule: _Schedule, report: Callable[[], None]) -> None:
    import torch  # not above: the parent of workers and they themselves may do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while (task := schedule.start_next()) is not None:
            report()
            schedule.finish(task, _attempt(task.function, *task.arguments))
    finally:
        torch.set_num_threads(threads)


def _run_in_workers(schedule: _Schedule, processes: int, report: Callable[[], None]) -> None:
    workers: list[_Worker] = []
    stillborn = 0
    try:
        while True:
            for worker in workers:
                while worker.is_free and (task := schedule.start_next()) is not None:
                    try:
                        job = pickle.dumps((task.function, task.arguments))
                    except Exception as error:  # noqa: BLE001  (arguments may raise what they like)
                        schedule.finish(task, _failure(error, 0.0))
                    else:
                        worker.give(task, job)
            starting = sum(not worker.is_up for worker in workers)
            for _ in range(min(schedule.ready - starting, processes - len(workers))):
                workers.append(_Worker())
                workers[-1].start()
            if not schedule.ready and all(worker.task is None for worker in workers):
                break
            report()  # here, while all work that there is has been given out
            for pipe in wait([worker.pipe for worker in workers]):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                task, outcome = worker.task, worker.receive()
                if outcome is not None and task is not None:
                    schedule.finish(task, outcome)
                stillborn = 0 if worker.is_up else stillborn + 1
                if worker.process.exitcode is not None:
                    workers.remove(worker)
                if stillborn == _STILLBORN:
                    raise RuntimeError(
                        f"{stillborn} worker processes in a row ended before they could take a "
                        "task: stderr says why. A script that calls this must do so under "
                        "`if __name__ == '__main__':`."
                    )
        for worker in workers:
            worker.pipe.close()  # no more tasks: it ends
        for worker in workers:
            worker.process.join(timeout=5)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that runs tasks one after another, as the parent sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, self._its_end = context.Pipe()
        # No daemon, which must not have children: a task may want loaders of data.
        self.process = context.Process(target=_work, args=(self._its_end,))
        self.task: Task | None = None
        self.is_up = False  # from when it says that it can take tasks
        self._given_at = 0.0

    @property
    def is_free(self) -> bool:
        """Whether a task can be given."""
        return self.is_up and self.task is None

    def start(self) -> None:
        """Start the process."""
        with _heritage():
            self.process.start()
        self._its_end.close()  # the last one is now the worker's: the pipe ends when it dies

    def give(self, task: Task, job: bytes) -> None:
        """Let it run a task."""
        self.task, self._given_at = task, time.monotonic()
        with contextlib.suppress(ConnectionError):  # it is dead, as `receive` will find
            self.pipe.send_bytes(job)

    def receive(self) -> Outcome | None:
        """Return how its task ended, by its word or by its death; None where it had none."""
        try:
            outcome: Outcome | None = self.pipe.recv()
            self.is_up = True
        except (EOFError, ConnectionError):
            self.process.join()
            seconds = time.monotonic() - self._given_at
            error = f"the process that ran it {_death(self.process.exitcode or 0)}"
            outcome = Outcome(state="failed", seconds=seconds, error=error)
        self.task = None
        return outcome

    def kill(self) -> None:
        """End the process now, whatever it does."""
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()
        self.pipe.close()


def _death(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed; where memory ran out, run fewer processes at once."
    if exit_code < 0:
        return f"died of signal {-exit_code} ({signal.strsignal(-exit_code)})."
    return f"ended itself with exit code {exit_code}."


@contextlib.contextmanager
def _heritage() -> Iterator[None]:
    """Let a process that starts now inherit `_ENVIRONMENT`, and be deaf to Ctrl-C.

    A terminal sends Ctrl-C to all; the parent alone shall act on it, and kill the workers.
    """
    resource_tracker.ensure_running()  # were it to start with the worker, it would end the deafness
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    before = {key: os.environ.get(key) for key in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # last: a Ctrl-C that waited is raised


# --- in a worker ---


def _work(pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(logging.INFO)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has no more tasks
        pipe.send(None)
        while True:
            pipe.send(_attempt(_run_pickled, pipe.recv_bytes()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns also where the parent was killed and could tell nobody
    os._exit(1)


def _run_pickled(job: bytes) -> None:
    function, arguments = pickle.loads(job)  # loads the function's module, and mostly torch
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # also where a module has set another number
    function(*arguments)


def _attempt(function: Callable[..., object], *arguments: object) -> Outcome:
    started = time.monotonic()
    try:
        function(*arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the other tasks go on)
        return _failure(error, time.monotonic() - started)
    return Outcome(state="done", seconds=time.monotonic() - started)


def _failure(error: BaseException, seconds: float) -> Outcome:
    """Return an error as text: not every exception can be pickled."""
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    if not isinstance(error, ValueError):  # these are written to be read by themselves
        first_line = f"{kind}: {first_line}" if first_line else kind
    return Outcome(
        state="failed",
        seconds=seconds,
        error=first_line or kind,
        traceback="".join(traceback.format_exception(error)),
    )


# --- one run at a time ---


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, through a lock on its file `.lock`.

    The system drops the lock when this process ends, whatever ends it; the file stays. Where the
    platform or the file system has no `flock`, nothing is locked.

    Raises:
        DataError: Another run has the folder; the message names its process.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DataError(
                f"{folder} is in use by another run (process {file.read().strip() or 'unknown'}): "
                "wait for it, or stop it."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run there.", folder, error)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def teller() -> Callable[[Mapping[str, State]], None]:
    """Return what tells the progress: a line whenever a stage ends."""
    told: set[str] = set()

    def say(states: Mapping[str, State]) -> None:
        over = {name for name, state in states.items() if state in ("done", "failed", "skipped")}
        for name in sorted(over - told):
            console.print(f"{len(over)} of {len(states)}: {name} {states[name]}", highlight=False)
        told.update(over)

    return say
