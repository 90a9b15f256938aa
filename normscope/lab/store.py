"""Results in one SQLite file: every finished run is committed at once, and several processes may work on it.

A process takes a run by writing its name beside it, and shows every few seconds that it lives. A run is free again when
its process is gone, so that killing one loses only what it had not finished. A second result for the same run is never
written: the first stays.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from normscope.errors import DataError
from normscope.lab.experiment import Measured, Numbers, Results, Task, digest
from normscope.records import Machine, Registration, from_json, to_json

__all__ = ["Store", "Sweep", "decode_numbers", "encode_numbers"]

FORMAT = 1
# A process that has not written for so long is taken for gone; a live one writes every BEAT seconds.
BEAT, GONE = 2.0, 30.0

SCHEMA = """
CREATE TABLE registration (
    experiment TEXT PRIMARY KEY, digest TEXT NOT NULL, text TEXT NOT NULL, fixed TEXT NOT NULL
);
CREATE TABLE worker (
    id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, beat REAL NOT NULL, started TEXT NOT NULL,
    command TEXT NOT NULL, threads INTEGER NOT NULL, commit_id TEXT NOT NULL, machine TEXT NOT NULL
);
CREATE TABLE lease (task TEXT PRIMARY KEY, worker TEXT NOT NULL REFERENCES worker (id));
CREATE TABLE run (
    task TEXT PRIMARY KEY, experiment TEXT NOT NULL, settings TEXT NOT NULL, seeds TEXT NOT NULL,
    numbers TEXT NOT NULL, seconds REAL NOT NULL, finished TEXT NOT NULL, worker TEXT NOT NULL REFERENCES worker (id)
);
CREATE INDEX run_of_experiment ON run (experiment);
CREATE TABLE sweep (
    experiment TEXT NOT NULL, profile TEXT NOT NULL, seeds TEXT NOT NULL, asked TEXT NOT NULL,
    PRIMARY KEY (experiment, profile)
);
"""


class Sweep:
    """What was asked for last of an experiment and profile."""

    def __init__(self, experiment: str, profile: str, seeds: tuple[int, ...]) -> None:
        self.experiment, self.profile, self.seeds = experiment, profile, seeds


class Store:
    """A file of results.

    Args:
        path: The file; created if absent.

    Raises:
        DataError: the file is no store, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.worker = ""
        try:
            # Autocommit: transactions are written out. Half a minute of patience with other processes.
            self._db = self._connect()
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")  # a finished run survives the machine's crash too
            with self._transaction() as db:
                version: int = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {FORMAT}")
        except sqlite3.Error as error:
            raise DataError(
                f"{path.name} is no store of results", cure="name another file", path=path, reason=error
            ) from error
        if version not in (0, FORMAT):
            raise DataError(
                f"{path.name} has format {version}, this version reads {FORMAT}", cure="name another file", path=path
            )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30, isolation_level=None)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # IMMEDIATE: whoever reads in order to write must not be overtaken in between.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Give back what is leased, and close."""
        if self.worker:
            self._db.execute("DELETE FROM lease WHERE worker = ?", (self.worker,))
        self._db.close()

    def damage(self) -> str:
        """What SQLite finds wrong with the file; "" if nothing."""
        found: str = self._db.execute("PRAGMA integrity_check").fetchone()[0]
        return "" if found == "ok" else found

    # --- before the runs ----------------------------------------------------------------------------------------------

    def register(self, registration: Registration) -> None:
        """Fix what was decided before the first run.

        Raises:
            DataError: there are runs already that were registered with other words or thresholds.
        """
        name, print_ = registration.name, digest(registration)
        with self._transaction() as db:
            row = db.execute("SELECT digest FROM registration WHERE experiment = ?", (name,)).fetchone()
            runs = db.execute("SELECT count(*) FROM run WHERE experiment = ?", (name,)).fetchone()[0]
            if row and row[0] != print_ and runs:
                raise DataError(
                    f"{name} was registered differently before its {runs} runs",
                    cure="thresholds are fixed before running: start a new store for the changed experiment",
                    path=self.path,
                )
            if not row or row[0] != print_:
                values = (name, print_, to_json(registration), _now())
                db.execute("INSERT OR REPLACE INTO registration VALUES (?, ?, ?, ?)", values)

    def work(self, *, command: str, threads: int, commit: str) -> None:
        """Enter this process into the store, with the machine and the code that it runs."""
        self.worker = uuid.uuid4().hex
        machine = to_json(Machine.measure())
        row = (self.worker, socket.gethostname(), os.getpid(), time.time(), _now(), command, threads, commit, machine)
        self._db.execute("INSERT INTO worker VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def heart(self) -> Iterator[None]:
        """Show that this process lives, from a thread: a run may take longer than other processes wait."""
        stop = threading.Event()

        def beat() -> None:
            db = self._connect()  # a connection belongs to one thread
            while not stop.wait(BEAT):
                db.execute("UPDATE worker SET beat = ? WHERE id = ?", (time.time(), self.worker))
            db.close()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def ask(self, sweep: Sweep) -> None:
        """Note what was asked for, so that a report knows which runs belong together."""
        row = (sweep.experiment, sweep.profile, json.dumps(sweep.seeds), _now())
        self._db.execute("INSERT OR REPLACE INTO sweep VALUES (?, ?, ?, ?)", row)

    # --- the runs -----------------------------------------------------------------------------------------------------

    def take(self, tasks: Sequence[Task]) -> Task | None:
        """Lease the first of the tasks that is neither done nor in work; None if there is none."""
        with self._transaction() as db:
            gone = [row[0] for row in db.execute("SELECT id, host, pid, beat FROM worker") if _is_gone(*row[1:])]
            db.executemany("DELETE FROM lease WHERE worker = ?", [(worker,) for worker in gone])
            for task in tasks:
                busy = "SELECT 1 FROM run WHERE task = :key UNION ALL SELECT 1 FROM lease WHERE task = :key"
                if db.execute(busy, {"key": task.key}).fetchone() is None:
                    db.execute("INSERT INTO lease VALUES (?, ?)", (task.key, self.worker))
                    return task
        return None

    def finish(self, measured: Measured) -> None:
        """Commit one finished run."""
        task = measured.task
        body = (json.dumps(dict(task.settings)), json.dumps(task.seeds), json.dumps(encode_numbers(measured.numbers)))
        row = (task.key, task.experiment, *body, measured.seconds, _now(), self.worker)
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO run VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            db.execute("DELETE FROM lease WHERE task = ?", (task.key,))

    def give_back(self, task: Task) -> None:
        """Free a run that failed."""
        self._db.execute("DELETE FROM lease WHERE task = ? AND worker = ?", (task.key, self.worker))

    # --- reading ------------------------------------------------------------------------------------------------------

    def results(self, experiment: str, known: Results | None = None) -> Results:
        """All finished runs of an experiment; those that are known already are not read again."""
        found = Results() if known is None else known
        keys = [row[0] for row in self._db.execute("SELECT task FROM run WHERE experiment = ?", (experiment,))]
        for key in found.missing(keys):
            row = self._db.execute("SELECT settings, seeds, numbers, seconds FROM run WHERE task = ?", (key,))
            settings, seeds, numbers, seconds = row.fetchone()
            task = Task(experiment, tuple(json.loads(settings).items()), tuple(json.loads(seeds)))
            found.add(Measured(task, decode_numbers(json.loads(numbers)), seconds))
        return found

    def sweeps(self) -> list[Sweep]:
        """What was asked for, by experiment."""
        rows = self._db.execute("SELECT experiment, profile, seeds FROM sweep ORDER BY experiment, profile")
        return [Sweep(experiment, profile, tuple(json.loads(seeds))) for experiment, profile, seeds in rows]

    def origin(self, keys: Sequence[str]) -> tuple[tuple[Machine, ...], tuple[str, ...]]:
        """The machines and the commits that these runs come from."""
        marks = {
            row
            for key in keys
            for row in self._db.execute(
                "SELECT machine, commit_id FROM run JOIN worker ON worker.id = run.worker WHERE task = ?", (key,)
            )
        }
        return (
            tuple(from_json(Machine, text) for text in sorted({machine for machine, _ in marks})),
            tuple(sorted({commit for _, commit in marks})),
        )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _is_gone(host: str, pid: int, beat: float) -> bool:
    if time.time() - beat > GONE:
        return True
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def encode_numbers(numbers: Numbers) -> dict[str, Any]:
    """For JSON, which has no NaN and no infinity."""
    return {
        name: _encode(value) if isinstance(value, float | int) else [_encode(v) for v in value]
        for name, value in numbers.items()
    }


def _encode(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def decode_numbers(body: dict[str, Any]) -> Numbers:
    """What `encode_numbers` wrote, the same to the last bit."""
    return {
        name: tuple(float(v) for v in value) if isinstance(value, list) else float(value)
        for name, value in body.items()
    }
