"""The store: nothing lost, nothing doubled, whoever dies or joins."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from normscope.errors import DataError
from normscope.lab import runner
from normscope.lab.experiment import Measured, Task
from normscope.lab.registry import load
from normscope.lab.store import Store, Sweep, decode_numbers, encode_numbers

TASKS = [Task("A16", (("k", k),)) for k in range(3)]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "lab.sqlite")
    store.work(command="test", threads=1, commit="none")
    yield store
    store.close()


def second(store, **changes):
    other = Store(store.path)
    other.work(command="other", threads=1, commit="none")
    return other


def test_a_run_comes_back_to_the_last_bit(store):
    numbers = {"a": 0.1 + 0.2, "b": [float("nan"), float("inf"), -float("inf"), 5e-324, -0.0]}
    store.finish(Measured(TASKS[0], numbers, 1.5))
    (found,) = store.results("A16")
    assert found.task == TASKS[0]
    assert repr(found.numbers) == repr({"a": 0.1 + 0.2, "b": tuple(numbers["b"])})
    assert repr(decode_numbers(encode_numbers(numbers))) == repr(found.numbers)


def test_two_processes_never_hold_the_same_run(store):
    other = second(store)
    taken = [store.take(TASKS), other.take(TASKS), store.take(TASKS), other.take(TASKS)]
    assert [task and task["k"] for task in taken] == [0, 1, 2, None]
    other.close()  # gives back
    assert store.take(TASKS)["k"] == 1


def test_the_run_of_a_dead_process_is_free_again(store):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    other = second(store)
    other.take(TASKS)
    other._db.execute("UPDATE worker SET pid = ? WHERE id = ?", (int(gone.stdout), other.worker))
    assert store.take(TASKS)["k"] == 0


def test_the_run_of_a_process_that_shows_no_life_is_free_again(store):
    other = second(store)
    other.take(TASKS)
    assert store.take(TASKS)["k"] == 1
    other._db.execute("UPDATE worker SET beat = beat - 60, host = 'elsewhere' WHERE id = ?", (other.worker,))
    assert store.take(TASKS)["k"] == 0


def test_the_first_of_two_results_stays(store):
    for value in (1.0, 2.0):
        store.finish(Measured(TASKS[0], {"a": value}, 0.0))
    (found,) = store.results("A16")
    assert found.number("a") == 1.0


def test_a_heart_beats(store, monkeypatch):
    monkeypatch.setattr("normscope.lab.store.BEAT", 0.01)

    def beat():
        return store._db.execute("SELECT beat FROM worker").fetchone()[0]

    before = beat()
    with store.heart():
        time.sleep(0.1)
    assert beat() > before


def test_thresholds_cannot_be_changed_after_the_first_run(store):
    import dataclasses

    registration = load("A16").registration
    store.register(registration)
    other = dataclasses.replace(registration, thresholds=(("share at 5", 0.01),))
    store.register(other)  # no run yet
    store.register(registration)
    store.finish(Measured(TASKS[0], {"a": 1.0}, 0.0))
    store.register(registration)
    with pytest.raises(DataError, match="registered differently before its 1 runs"):
        store.register(other)


def test_what_is_no_store_is_refused(tmp_path):
    path = tmp_path / "text"
    path.write_text("no database, but long enough to look at" * 100)
    with pytest.raises(DataError, match="no store"):
        Store(path)
    newer = tmp_path / "newer"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(DataError, match="format 99"):
        Store(newer)


def test_a_failing_run_is_given_back(store, monkeypatch):
    asked = runner.Asked("A16", "quick")
    monkeypatch.setattr(type(asked.experiment), "measure", lambda self, task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.run(store, [asked], runner.workers("here", 1, 1))
    assert store._db.execute("SELECT count(*) FROM lease").fetchone()[0] == 0


def counts(path):
    with sqlite3.connect(path) as db:
        rows = Counter(row[0] for row in db.execute("SELECT task FROM run"))
    db.close()
    return rows


def start(path, *options):
    command = [
        sys.executable,
        "-m",
        "normscope",
        "lab",
        "run",
        "A11",
        "--seeds",
        "0-11",
        "--store",
        str(path),
        *options,
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(path, runs, process):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.exists():
            try:
                if len(counts(path)) >= runs:
                    return
            except sqlite3.OperationalError:  # not created yet
                pass
        time.sleep(0.01)
    raise AssertionError(f"{len(counts(path))} runs, process ended with {process.poll()}")


def workers_of(pid):
    """The processes that a process has started, where /proc tells; the one that tracks shared memory ends by itself."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_kill_9_in_the_middle_then_resume(tmp_path):
    path = tmp_path / "lab.sqlite"
    killed = start(path, "--jobs", "2")
    wait_for(path, 2, killed)
    children = workers_of(killed.pid)
    killed.kill()
    killed.wait()
    before = counts(path)
    assert 2 <= len(before) < 12
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/stat").exists() for pid in children):
        assert time.monotonic() < end, "processes outlive the one that started them"
        time.sleep(0.05)
    # Two at once take up what is left.
    both = [start(path), start(path)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    after = counts(path)
    assert before.keys() <= after.keys()
    assert len(after) == 12
    assert set(after.values()) == {1}
    store = Store(path)
    assert store.damage() == ""
    workers = {row[0] for row in store._db.execute("SELECT DISTINCT worker FROM run")}
    assert len(workers) >= 2
    store.close()


def test_a_sweep_is_remembered(store):
    store.ask(Sweep("A16", "cpu", (0, 1)))
    store.ask(Sweep("A16", "cpu", (0, 1, 2)))
    (found,) = store.sweeps()
    assert (found.experiment, found.profile, found.seeds) == ("A16", "cpu", (0, 1, 2))


def test_the_commit_of_this_checkout():
    root = Path(runner.normscope.__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert runner.commit().rstrip("+") == head[:12]
