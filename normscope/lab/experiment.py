"""What an experiment is: a registration, the runs it needs, how to measure one, and how to judge them all.

The runs are planned in rounds: `tasks` is asked with all results there are, and asked again when what it named is done,
until it names nothing new. So a learning rate can be tuned in a first round and used in a second.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from normscope.errors import ArgumentError
from normscope.lab.threads import threads
from normscope.records import Judgement, Picture, Registration, Table, to_json

__all__ = ["Exact", "Experiment", "Measured", "Numbers", "ProfileName", "Results", "Task", "digest", "execute"]

ProfileName = Literal["quick", "cpu", "full"]
Scalar = str | int | float | bool
# What a run measured: numbers, and rows of numbers, by name.
Numbers = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Task:
    """One run: everything that its numbers depend on, apart from the code and the data.

    Attributes:
        experiment: The name of the experiment.
        settings: Names and values, e.g. the arm, the learning rate, the number of steps.
        seeds: Those trained together in this run.
        cost: How long it should take, in any unit common to the experiment; it only steers the display.
    """

    experiment: str
    settings: tuple[tuple[str, Scalar], ...]
    seeds: tuple[int, ...] = (0,)
    cost: float = field(default=1.0, compare=False)

    def __getitem__(self, name: str) -> Scalar:
        return dict(self.settings)[name]

    def number(self, name: str) -> float:
        """A setting that is a number."""
        return float(self[name])

    def whole(self, name: str) -> int:
        """A setting that is a whole number."""
        return int(self[name])

    def text(self, name: str) -> str:
        """A setting that is a word."""
        return str(self[name])

    @cached_property
    def key(self) -> str:
        """The same for the same run, in every process and version of Python."""
        body = [self.experiment, sorted(self.settings), list(self.seeds)]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:24]


@dataclass(frozen=True, eq=False)
class Measured:
    """A run that is done."""

    task: Task
    numbers: Numbers
    seconds: float

    def number(self, name: str) -> float:
        """One number."""
        value = self.numbers[name]
        if not isinstance(value, float | int):
            raise ArgumentError(f"{name} is a row of numbers", experiment=self.task.experiment)
        return float(value)

    def row(self, name: str) -> tuple[float, ...]:
        """A row of numbers, usually one per seed."""
        value = self.numbers[name]
        return (float(value),) if isinstance(value, float | int) else tuple(map(float, value))


class Results:
    """The runs of one experiment that are done."""

    def __init__(self, measured: Iterable[Measured] = ()) -> None:
        self._done = {m.task.key: m for m in measured}

    def __contains__(self, task: Task) -> bool:
        return task.key in self._done

    def __getitem__(self, task: Task) -> Measured:
        return self._done[task.key]

    def __len__(self) -> int:
        return len(self._done)

    def __iter__(self) -> Iterator[Measured]:
        return iter(self._done.values())

    def add(self, measured: Measured) -> None:
        """One more; the first of two with the same key stays."""
        self._done.setdefault(measured.task.key, measured)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are not here."""
        return [key for key in keys if key not in self._done]

    def of(self, tasks: Iterable[Task]) -> Results:
        """Those of the given tasks that are done."""
        return Results(self[task] for task in tasks if task in self)

    def where(self, **settings: Scalar) -> list[Measured]:
        """Those whose settings have these values."""
        wanted = settings.items()
        return [m for m in self._done.values() if wanted <= dict(m.task.settings).items()]

    def texts(self, name: str) -> list[str]:
        """The words that a setting has, in the order of their first runs; of the runs that have it."""
        return list(dict.fromkeys(str(m.task[name]) for m in self._done.values() if name in dict(m.task.settings)))

    def wholes(self, name: str) -> list[int]:
        """The whole numbers that a setting has, ascending; of the runs that have it."""
        return sorted({m.task.whole(name) for m in self._done.values() if name in dict(m.task.settings)})

    def per_seed(self, name: str, **settings: Scalar) -> tuple[float, ...]:
        """A number per seed of the runs with these settings, in the order of the seeds."""
        pairs = [pair for m in self.where(**settings) for pair in zip(m.task.seeds, m.row(name), strict=True)]
        return tuple(value for _, value in sorted(pairs))


class Experiment(ABC):
    """One published claim as a runnable experiment.

    Attributes:
        registration: The claim, its source, thresholds and design, fixed before the first run.
        seeds: How many evaluation seeds each profile has.
    """

    registration: Registration
    seeds: Mapping[ProfileName, int]

    @property
    def name(self) -> str:
        """Its name in the catalogue, e.g. "B01"."""
        return self.registration.name

    def threshold(self, name: str) -> float:
        """A number of the registration."""
        return dict(self.registration.thresholds)[name]

    @abstractmethod
    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """All runs that the profile needs, as far as the results at hand determine them."""

    @abstractmethod
    def measure(self, task: Task) -> Numbers:
        """Do one run."""

    @abstractmethod
    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """What the runs of one profile say."""

    @abstractmethod
    def figure(self, results: Results) -> Picture | None:
        """What they look like."""

    def tables(self, results: Results) -> tuple[Table, ...]:
        """What is to be looked up in them; nothing as a rule."""
        return ()

    def run(self, profile: ProfileName = "quick", seeds: Sequence[int] | None = None) -> Results:
        """Do all runs of a profile in this process and keep them in memory."""
        chosen = tuple(range(self.seeds[profile])) if seeds is None else tuple(seeds)
        results = Results()
        while undone := [task for task in self.tasks(profile, chosen, results) if task not in results]:
            for task in undone:
                results.add(execute(self, task))
        return results


class Exact(Experiment):
    """An experiment without training: one run of a second or so decides an identity or a deterministic number."""

    seeds: Mapping[ProfileName, int] = {"quick": 1, "cpu": 1, "full": 1}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """One run per seed; the quick profile draws less where that is all it can do."""
        return [Task(self.name, (("size", "small" if profile == "quick" else "whole"),), (seed,)) for seed in seeds]

    def first(self, results: Results) -> Measured:
        """The run of the lowest seed, on which an exact verdict rests."""
        return min(results, key=lambda m: m.task.seeds)


def digest(registration: Registration) -> str:
    """The fingerprint of what was fixed before the run."""
    return hashlib.sha256(to_json(registration).encode()).hexdigest()[:16]


def execute(experiment: Experiment, task: Task, count: int = 1) -> Measured:
    """Do one run on a fixed number of threads, with random state of its own.

    The caller's random state and number of threads stay as they are.
    """
    clock = time.perf_counter()
    with threads(count), torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seeds[0])
        numbers = experiment.measure(task)
    return Measured(task, numbers, time.perf_counter() - clock)
