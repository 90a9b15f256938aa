"""Alternatives timed in one loop: what disturbs the machine disturbs all of them.

Every round takes one sample of every alternative, in an order drawn anew, so that each follows each of the others. A
sample is as many calls as take 200 µs. A round is disturbed, and repeated, if any alternative took more than twice its
own minimum, or if our threads had to wait for a processor: a loop over two threads that shares one of two processors
with something else takes a scheduler's slice of 8 or 16 ms, whatever it computes, and all ratios become 1, 2 or ½. The
garbage collector runs between the rounds only. What is reported are medians over the rounds, and of ratios the median
of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normscope import statistics
from normscope.records import Interval

__all__ = ["Call", "Rounds", "clock_of", "interleave", "steady_heap", "wall_clock"]

Call = Callable[[], object]
Clock = Callable[[Call, int], float]

SAMPLE = 200e-6
# Times its own minimum; and of a round's time. Measured: 0 to 0.02 waiting when alone, 0.4 to 1 with one other process.
SLOWER, WAITING = 2.0, 0.05
# Calm rounds: what is aimed at, what ends a case once its time is over, and what is taken whatever they are like.
MOST_ROUNDS, ENOUGH_ROUNDS, LEAST_ROUNDS = 61, 7, 3


# Cycles that a GPU waits before a sample when the host is to be ahead: some 4 ms, in which it prepares ten steps.
HEAD_START = 8_000_000

# What glibc takes from its heap and not from the system: up to 32 MB less its own bookkeeping.
HEAP_BLOCK, HEAP_BLOCKS = 31 << 20, 16


def steady_heap() -> list[Tensor]:
    """Bring the allocator into the state of a process that has run for a while, as long as the result is kept.

    Whether glibc serves a tensor of a few MB from pages that it has or from new ones, whose page faults cost more than
    the arithmetic, depends on what the process did before: the same case took 5 ms or 37. Here blocks of up to 32 MB
    are there, and cannot be handed back or merged, since small ones that are kept lie between them. Above 32 MB every
    tensor gets new pages, as it does by default.
    """
    torch.empty((32 << 20) - 4096, dtype=torch.uint8)  # freed, it moves the size from which on the system is asked
    between, blocks = [_touched(1 << 20) for _ in range(8)], []
    for _ in range(HEAP_BLOCKS):
        blocks.append(_touched(HEAP_BLOCK))
        between.append(_touched(1 << 20))
    return between


def _touched(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8).zero_()


def wall_clock(call: Call, repeats: int) -> float:
    """Seconds that some calls take."""
    calls = range(repeats)
    start = time.perf_counter()
    for _ in calls:
        call()
    return time.perf_counter() - start


def device_clock(call: Call, repeats: int, *, ahead: bool = False) -> float:
    """Seconds between two events on the CUDA device, around some calls; see `clock_of`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    if ahead:
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_of(device: torch.device, *, ahead: bool = False) -> Clock:
    """The clock for calls on a device; on a GPU it can let the host run ahead, so that only the kernels count."""
    return partial(device_clock, ahead=ahead) if device.type == "cuda" else wall_clock


@dataclass(frozen=True)
class Rounds:
    """Seconds per call of every alternative, in the rounds that were kept.

    Attributes:
        seconds: Equally many per alternative; one index is one round.
        dropped: How many rounds were left out.
        calm: Whether those kept were undisturbed.
    """

    seconds: Mapping[str, Sequence[float]]
    dropped: int
    calm: bool

    @property
    def count(self) -> int:
        """How many rounds were kept."""
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Interval:
        """The median of one alternative, in seconds."""
        return Interval(*statistics.median_interval(self.seconds[name]), "s")

    def ratio(self, over: str, under: str) -> Interval:
        """The median of the rounds' ratios of two alternatives."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return Interval(*statistics.median_interval([a / b for a, b in pairs]))

    def gain(self, before: str, after: str, best: str) -> Interval | None:
        """The median of the rounds' (before − after)/(before − best); None where best is no better for certain."""
        if self.ratio(before, best).low <= 1:
            return None
        triples = zip(*(self.seconds[name] for name in (before, after, best)), strict=True)
        return Interval(*statistics.median_interval([(a - b) / (a - c) for a, b, c in triples if a > c]))


def interleave(alternatives: Mapping[str, Call], seconds: float, clock: Clock = wall_clock) -> Rounds:
    """Time alternatives against each other.

    Args:
        alternatives: What to call, by name.
        seconds: The time to spend; three times as much where the machine is disturbed, and never less than three
            rounds.
        clock: Measures some calls.
    """
    names = list(alternatives)
    generator = torch.Generator().manual_seed(0)
    with _without_collector() as collect:
        repeats = {name: _repeats(call, clock) for name, call in alternatives.items()}
        rounds: list[_Round] = []
        start = time.perf_counter()
        while not _enough(rounds, time.perf_counter() - start, seconds):
            collect()
            order = [names[k] for k in torch.randperm(len(names), generator=generator)]
            before, waited = time.perf_counter(), _waited()
            taken = {name: clock(alternatives[name], repeats[name]) / repeats[name] for name in order}
            waited = _waited() - waited
            rounds.append(_Round(taken, waited / (time.perf_counter() - before)))
    disturbance = _disturbance(rounds)
    calm = [r for r in rounds if disturbance(r) <= 1]
    kept = calm if len(calm) >= LEAST_ROUNDS else sorted(rounds, key=disturbance)[:LEAST_ROUNDS]
    return Rounds({name: [r.seconds[name] for r in kept] for name in names}, len(rounds) - len(kept), kept is calm)


class _Round(NamedTuple):
    """Seconds per call of every alternative, and the share of the time that our threads waited for a processor."""

    seconds: Mapping[str, float]
    waited: float


def _enough(rounds: Sequence[_Round], spent: float, seconds: float) -> bool:
    if len(rounds) < LEAST_ROUNDS:
        return False
    calm = sum(d <= 1 for d in map(_disturbance(rounds), rounds))
    return calm >= MOST_ROUNDS or (spent > seconds and (calm >= ENOUGH_ROUNDS or spent > 3 * seconds))


def _disturbance(rounds: Sequence[_Round]) -> Callable[[_Round], float]:
    """How disturbed a round is among these, above 1 too much."""
    fastest = {name: min(r.seconds[name] for r in rounds) for name in rounds[0].seconds}
    return lambda r: max(r.waited / WAITING, *(r.seconds[name] / fastest[name] / SLOWER for name in fastest))


def _waited() -> float:
    """Seconds that the threads of this process have been ready and without a processor; 0 where Linux is not there."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            total += int(task.read_text(encoding="ascii").split()[1])
    return total / 1e9


def _repeats(call: Call, clock: Clock) -> int:
    """How many calls make a sample; the first call, which may allocate and choose, does not count."""
    clock(call, 1)
    repeats = 1
    while clock(call, repeats) < SAMPLE:
        repeats *= 2
    return repeats


@contextlib.contextmanager
def _without_collector() -> Iterator[Callable[[], int]]:
    """The collector off, and what exists now exempt, so that collecting what came since takes microseconds."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
