"""What the callbacks have in common: batches as they pass by, a check at chosen moments, a history of records."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from normscope.doctor import Report, StateNotRestoredError, check
from normscope.doctor.cache import Reader
from normscope.doctor.configuration import project
from normscope.errors import ArgumentError
from normscope.records import CheckRecord
from normscope.surgery import find

__all__ = ["Checkup", "Observer", "several_ranks"]

log = logging.getLogger("normscope")

# With fewer no split of the doctor has two batches.
ENOUGH = 6


@dataclass(frozen=True, slots=True)
class Checkup:
    """One check during a training.

    Attributes:
        moment: "start", "epoch" or "end".
        step: Optimizer steps so far.
        epoch: Epochs so far.
    """

    moment: str
    step: int
    epoch: int
    record: CheckRecord


@dataclass(slots=True)
class Observer:
    """Keeps batches as they pass by and examines the model on them; the training does not notice.

    The batches are copies of what the training was fed: the user's loader is never iterated, so that neither its order
    nor its random numbers change. At most 3,072 samples or 64 MiB of them are kept, evenly spread over what passed by
    since the last check.

    Attributes:
        every: A check after every so many epochs; 0 for none.
        start: Whether one is made as soon as there are enough batches.
        end: Whether one is made when the training ends.
        on_report: Called with every report and its checkup.
        options: Of `check`.
        history: What was found.
    """

    every: int = 1
    start: bool = False
    end: bool = True
    on_report: Callable[[Report, Checkup], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    history: list[Checkup] = field(default_factory=list)
    _reader: Reader = field(default_factory=Reader)
    _checked: int = -1

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ArgumentError(f"every must not be negative, but got {self.every}", cure="epochs; 0 for none")
        if not (self.every or self.start or self.end):
            raise ArgumentError("no moment is left for a check", cure="set every, start or end")

    def begin(self) -> None:
        """A training begins."""
        self._reader, self._checked = Reader(), -1

    def see(self, data: Any) -> None:
        """A batch passes by."""
        self._reader.take(data)

    def is_ready(self) -> bool:
        """Whether the check at the start is due."""
        return self.start and self._checked < 0 and len(self._reader.kept) >= ENOUGH

    def after_epoch(self, model: Module, step: int, epoch: int) -> None:
        """So many epochs are done."""
        if self.every and epoch % self.every == 0:
            self.examine(model, "epoch", step, epoch)

    def after_training(self, model: Module, step: int, epoch: int) -> None:
        """The training ends."""
        if self.end and self._checked != step:
            self.examine(model, "end", step, epoch)

    def examine(self, model: Module, moment: str, step: int, epoch: int) -> None:
        """Check the model now. What goes wrong is logged, because a training is worth more than a check."""
        batches = [batch.data for batch in self._reader.kept]
        if not batches:
            log.warning("normscope: no batch has passed by yet, nothing was checked")
            return
        if several_ranks() and any("Sync" in type(f.module).__name__ for f in find(model)):
            log.warning("normscope: not checked, because synchronized normalizers would wait for the other ranks")
            return
        try:
            report = check(model, batches, **project().joined(self.options))
        except StateNotRestoredError:
            raise
        except Exception as error:  # whatever it is, the model is restored
            log.warning("normscope: step %d could not be checked: %s: %s", step, type(error).__name__, error)
            return
        self._reader, self._checked = Reader(), step
        checkup = Checkup(moment, step, epoch, report.record)
        self.history.append(checkup)
        if not several_ranks() or torch.distributed.get_rank() == 0:
            level = logging.WARNING if report.failures("W") else logging.INFO
            log.log(level, "normscope, step %d, epoch %d: %s", step, epoch, report)
        if self.on_report is not None:
            self.on_report(report, checkup)


def several_ranks() -> bool:
    """Whether other processes take part in this training."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1
