"""Do the runs of experiments: here, in several processes, or on a Ray cluster; all write into one store.

Only the process that was started writes; the others compute. What they are told is a task, and what they return are
its numbers, so that it makes no difference where a task is computed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import normscope
from normscope.errors import ArgumentError, DependencyError
from normscope.lab import registry
from normscope.lab.experiment import Experiment, Measured, ProfileName, Results, Task, execute
from normscope.lab.store import Store, Sweep

__all__ = ["Asked", "Here", "OnRay", "Processes", "Workers", "commit", "run", "workers"]

Tell = Callable[[float, float, str], None]


class Asked:
    """One experiment with the profile and the seeds that are wanted of it.

    Raises:
        ArgumentError: there is no such experiment, or too few seeds to say anything.
    """

    def __init__(self, name: str, profile: ProfileName, seeds: Sequence[int] | None = None) -> None:
        self.experiment: Experiment = registry.load(name)
        self.results = Results()
        self.profile = profile
        self.seeds = tuple(range(self.experiment.seeds[profile])) if seeds is None else tuple(seeds)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ArgumentError("seeds must be different numbers from 0 on, at least one", seeds=self.seeds)

    def tasks(self) -> list[Task]:
        """What belongs to it, as far as the results at hand determine it."""
        return self.experiment.tasks(self.profile, self.seeds, self.results)


class Workers(Protocol):
    """Where tasks are computed."""

    slots: int

    def submit(self, task: Task) -> Any:
        """Start one; returns a token."""

    def done(self, tokens: list[Any]) -> list[Any]:
        """Wait until at least one is done, or a second has passed."""

    def result(self, token: Any) -> Measured:
        """What a finished one returned, or raise what it raised."""

    def close(self) -> None:
        """Stop."""


def _compute(task: Task, threads: int) -> Measured:
    return execute(registry.load(task.experiment), task, threads)


class Here:
    """In this process, one after the other."""

    slots = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def submit(self, task: Task) -> Any:
        """Nothing yet: the task is its own token."""
        return task

    def done(self, tokens: list[Any]) -> list[Any]:
        """The next."""
        return tokens[:1]

    def result(self, token: Any) -> Measured:
        """Compute."""
        return _compute(token, self._threads)

    def close(self) -> None:
        """Nothing to stop."""


class Processes:
    """In processes of this machine."""

    def __init__(self, slots: int, threads: int) -> None:
        self.slots, self._threads = slots, threads
        # spawn: a forked child would inherit torch's threads half-alive.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(slots, context, initializer=_end_with_parent)

    def submit(self, task: Task) -> Any:
        """Hand it to the next free process."""
        return self._pool.submit(_compute, task, self._threads)

    def done(self, tokens: list[Any]) -> list[Any]:
        """Wait for the first."""
        return list(wait(tokens, timeout=1, return_when=FIRST_COMPLETED).done)

    def result(self, token: Any) -> Measured:
        """From the process."""
        future: Future[Measured] = token
        return future.result()

    def close(self) -> None:
        """Stop the processes; what they were computing is lost."""
        for process in multiprocessing.active_children():
            process.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


class OnRay:
    """On a Ray cluster: the one named in RAY_ADDRESS, else one on this machine.

    Raises:
        DependencyError: ray is not installed.
    """

    def __init__(self, slots: int, threads: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise DependencyError(
                "--on ray needs ray, which is not installed", cure="pip install 'normscope[cluster]'"
            ) from error
        self.slots, self._ray = slots, ray
        self._started = not ray.is_initialized()
        if self._started:
            here = None if os.environ.get("RAY_ADDRESS") else slots * threads
            ray.init(num_cpus=here, include_dashboard=False, log_to_driver=False, logging_level="error")
        self._compute = ray.remote(num_cpus=threads, max_retries=3)(_compute)
        self._threads = threads

    def submit(self, task: Task) -> Any:
        """Hand it to the cluster."""
        return self._compute.remote(task, self._threads)

    def done(self, tokens: list[Any]) -> list[Any]:
        """Wait for the first."""
        ready: list[Any] = self._ray.wait(tokens, timeout=1)[0]
        return ready

    def result(self, token: Any) -> Measured:
        """From the cluster."""
        found: Measured = self._ray.get(token)
        return found

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._started:
            self._ray.shutdown()


def workers(on: str, jobs: int, threads: int) -> Workers:
    """Where to compute: on is "here" or "ray"."""
    if on == "ray":
        return OnRay(jobs, threads)
    return Here(threads) if jobs == 1 else Processes(jobs, threads)


def commit() -> str:
    """The commit of the code that runs, with + where files were changed since; the version outside a checkout."""
    root = Path(normscope.__file__).parents[1]
    try:
        if (root / ".git").exists():
            head, state = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
            return head[:12] + "+" * bool(state)
    except (OSError, subprocess.SubprocessError):  # no git, or not ours to ask
        pass
    return normscope.__version__


def _git(root: Path, *words: str) -> str:
    asked = ["git", "-C", str(root), *words]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()  # noqa: S603


def run(store: Store, asked: Sequence[Asked], on: Workers, *, tell: Tell | None = None) -> int:
    """Do all runs of some experiments that the store does not hold yet; returns how many were done.

    Runs that another process has taken are waited for, and taken over if it dies.

    Args:
        store: After `Store.work`.
        asked: The experiments.
        on: Where to compute.
        tell: Called with the costs done and in all, and the name of what is being computed.
    """
    for one in asked:
        store.register(one.experiment.registration)
        store.ask(Sweep(one.experiment.name, one.profile, one.seeds))
    with store.heart():
        return _work(store, asked, on, tell)


def _work(store: Store, asked: Sequence[Asked], on: Workers, tell: Tell | None) -> int:
    running: dict[Any, Task] = {}
    count = 0
    while True:
        planned, open_ = _plan(store, asked)
        if not open_:
            return count
        if tell:
            whole, left = (sum(task.cost for task in tasks) for tasks in (planned, open_))
            tell(whole - left, whole, open_[0].experiment)
        while len(running) < on.slots and (task := store.take(open_)) is not None:
            running[on.submit(task)] = task
        if not running:
            time.sleep(0.5)  # the rest is in the hands of another process
            continue
        for token in on.done(list(running)):
            _finish(store, on, token, running.pop(token))
            count += 1


def _finish(store: Store, on: Workers, token: Any, task: Task) -> None:
    try:
        measured = on.result(token)
    except BaseException:
        store.give_back(task)
        raise
    store.finish(measured)


def _plan(store: Store, asked: Sequence[Asked]) -> tuple[list[Task], list[Task]]:
    """All runs that are known to be needed, and those not done."""
    planned, undone = [], []
    for one in asked:
        store.results(one.experiment.name, one.results)
        tasks = one.tasks()
        planned += tasks
        undone += [task for task in tasks if task not in one.results]
    return planned, undone
