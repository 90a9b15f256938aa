"""The whole bench in one run, within its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

import normscope as ns
from normscope.bench import architectures, suite, timing
from normscope.bench.architectures import ARCHITECTURES, LAYOUTS, Architecture
from normscope.bench.cases import COMPILED, QUICK, SUITE, SWEEP, Case, Norm, liger, on_gpu, select
from normscope.bench.targets import judge, judge_gpu
from normscope.errors import ArgumentError, ProofError
from normscope.records import Benchmark, Machine, ModelSpeed, NormSpeed

__all__ = ["FULL_SECONDS", "QUICK_SECONDS", "Settings", "run"]

Tell = Callable[[int, int, str], None]

# Of the 15 minutes and of the one minute that a run may take, what the last case and the imports need is left.
FULL_SECONDS, QUICK_SECONDS = 810.0, 45.0
# More rounds would not narrow the intervals by much.
CASE_SECONDS, MODEL_SECONDS = 5.0, 25.0
# Of the time, where there are architectures to measure, too.
CASES_SHARE = 0.5
# The least that x has in the suite on a GPU, in bytes: more than its cache holds.
GPU_BYTES = 64 << 20
# What the first case that torch.compile takes is expected to cost.
COMPILE_SECONDS = 10.0


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        patterns: Names of cases and architectures, with wildcards; empty for all.
        quick: A spread of cases, and nothing compiled.
        architectures: Whether to measure whole models, too.
        device: "cpu" or "cuda".
        threads: Of torch; None for what it has.
        seconds: The time for everything.
    """

    patterns: tuple[str, ...] = ()
    quick: bool = False
    architectures: bool = True
    device: str = "cpu"
    threads: int | None = None
    seconds: float = FULL_SECONDS


def run(settings: Settings, *, command: str = "", tell: Tell = lambda *_: None) -> Benchmark:
    """Measure what the settings ask for.

    Args:
        settings: What to measure.
        command: How to repeat it, for the record.
        tell: Gets (done, total, what) before every case.

    Raises:
        ArgumentError: Nothing has such a name, or there is no such device.
        ProofError: A result is wrong; on a GPU that is a note, like whatever else fails there.
    """
    started, start = datetime.now(timezone.utc), time.perf_counter()
    device = _device(settings.device)
    cases, models = _chosen(settings)
    share = CASES_SHARE if models else 1.0
    bench = _Bench(device, len(cases) + len(models), tell)
    heap = timing.steady_heap()
    with _threads(settings.threads) as threads:
        norms = tuple(bench.cases(cases, start + share * settings.seconds, not settings.quick))
        nets = tuple(bench.models(models, start + settings.seconds))
    del heap
    return Benchmark(
        cases=norms,
        models=nets,
        targets=(judge_gpu if device.type == "cuda" else judge)(norms, nets),
        notes=bench.all_notes(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=threads,
        kernels=tuple(f"{backend.name}: {backend.reason}" for backend in ns.backends().usable()),
        command=command,
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - start,
        machine=Machine.measure(("normscope", "torch")),
    )


def _chosen(settings: Settings) -> tuple[list[Case], list[tuple[Architecture, str]]]:
    table = _table(settings.device)
    norms = {case.name: case for case in table.values()}
    # One layout after the other: if the time is short, every architecture has been measured in one.
    nets = {a.label(layout): (a, layout) for layout in LAYOUTS for a in ARCHITECTURES if layout in a.layouts}
    names = [table[name].name for name in QUICK] if settings.quick and not settings.patterns else list(norms)
    names += nets if settings.architectures else []
    chosen = select(names, settings.patterns)
    if not chosen:
        raise ArgumentError(
            f"nothing is named like {' or '.join(settings.patterns)}",
            cure=f'names look like "{names[0]}" or "{names[-1]}"; * stands for anything',
        )
    return [norms[n] for n in chosen if n in norms], [nets[n] for n in chosen if n in nets]


def _table(device: str) -> Mapping[str, Case]:
    """The cases of a device, by their names on a CPU."""
    cases = *SUITE, *SWEEP
    return {case.name: on_gpu(case, GPU_BYTES) if device == "cuda" else case for case in cases}


class _Bench:
    """What is under way: how far it is, and what had to be left out."""

    def __init__(self, device: torch.device, total: int, tell: Tell) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self.notes: list[str] = []
        if self._on_gpu and not (kernels := ns.backends().named("triton")).usable:
            self.notes.append(f"the kernels for GPUs were not used: {kernels.reason}")
        self._late: list[str] = []
        self._tell = tell
        self._done, self._total = 0, total

    def cases(self, chosen: Sequence[Case], end: float, compiles: bool) -> Iterator[NormSpeed]:
        """Every case, the time that is left divided among those that are left."""
        compiled_names = {case.name for name, case in _table(self.device.type).items() if name in COMPILED}
        to_compile = [case for case in chosen if case.name in compiled_names] if compiles else []
        reserve = COMPILE_SECONDS
        for k, case in enumerate(chosen):
            if not self._begin(case.name, end):
                continue
            others: dict[str, Norm] = {}
            if case in to_compile:
                before = time.perf_counter()
                others |= self._other("compiled", case, lambda case: suite.compile_eager(case, self.device))
                reserve = max(reserve, time.perf_counter() - before)
                # On a CPU it is most often the C++ compiler that is missing, for all cases.
                to_compile = to_compile[1:] if others or self._on_gpu else []
            if self._on_gpu:
                others |= self._other("liger", case, lambda case: liger(case.family))
            left = end - time.perf_counter() - reserve * len(to_compile)
            measured = self._measured(case, min(CASE_SECONDS, left / (len(chosen) - k)), others)
            if measured is not None:
                yield measured

    def _other(self, name: str, case: Case, build: Callable[[Case], Norm | None]) -> dict[str, Norm]:
        """One more alternative, if there is one; whatever a compiler or a library raises is a note."""
        try:
            norm = build(case)
        except Exception as error:
            self._leave_out("torch.compile" if name == "compiled" else name, error)
            return {}
        return {} if norm is None else {name: norm}

    def _measured(self, case: Case, seconds: float, others: dict[str, Norm]) -> NormSpeed | None:
        """A case; one of the others that fails is left out, and on a GPU the case itself."""
        while True:
            try:
                return suite.measure(case, seconds, self.device, others)
            except Exception as error:
                if not (others or self._on_gpu):
                    raise
                last = others.popitem()[0] if others else None
                self._leave_out(case.name if last is None else f"{case.name}: {last}", error)
                if last is None:
                    return None

    def _leave_out(self, what: str, error: Exception) -> None:
        reason, _, _ = str(error).partition("\n")
        note = f"{what} was not measured: {type(error).__name__}: {reason}"
        if note not in self.notes:
            self.notes.append(note)

    def models(self, chosen: Sequence[tuple[Architecture, str]], end: float) -> Iterator[ModelSpeed]:
        """Every architecture in every layout."""
        for k, (architecture, layout) in enumerate(chosen):
            name = architecture.label(layout)
            if not self._begin(name, end):
                continue
            seconds = min(MODEL_SECONDS, (end - time.perf_counter()) / (len(chosen) - k))
            try:
                yield architectures.measure(architecture, layout, seconds, self.device)
            except ProofError as error:  # it was left as it is, so there is nothing to time
                self.notes.append(f"{name}: not accelerated: {error.sentence}")
            except Exception as error:
                if not self._on_gpu:
                    raise
                self._leave_out(name, error)

    def _begin(self, name: str, end: float) -> bool:
        self._tell(self._done, self._total, name)
        self._done += 1
        if time.perf_counter() < end:
            return True
        self._late.append(name)
        return False

    def all_notes(self) -> tuple[str, ...]:
        """What was left out and why, a line each."""
        if not self._late:
            return tuple(self.notes)
        names = self._late[0] if len(self._late) == 1 else f"{self._late[0]} … {self._late[-1]}"
        return (*self.notes, f"{len(self._late)} of {self._total} not measured, the time was over: {names}")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("there is no CUDA device here", cure="use --device cpu, or install a torch with CUDA")
    return torch.device(name)


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
