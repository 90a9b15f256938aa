"""`selftest`: known defects in a copy of the user's model, and the smallest of each that the doctor sees there."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from normscope import records
from normscope.doctor.cache import Batch, read
from normscope.doctor.defects import DEFECTS, Body, Defect, Exposure, as_is
from normscope.doctor.examination import StateNotRestoredError, check, check_arguments, unharmed
from normscope.doctor.probe import Callables
from normscope.doctor.progress import Tell
from normscope.doctor.report import Report
from normscope.doctor.thresholds import DEFAULTS, Thresholds
from normscope.errors import ArgumentError, NormscopeError
from normscope.records import CheckRecord, Finding, Machine, SelfTest, Sensitivity, Trial

# As in Report: report knows records only, so nothing runs in a circle.
from normscope.report import sensitivity
from normscope.surgery import Snapshot, find
from normscope.surgery.find import Found
from normscope.surgery.operation import copied

__all__ = ["SelfTestReport", "selftest"]

READING = 0.1
_ORDER = {"E": 0, "W": 1, "I": 2}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SelfTestReport:
    """The result of `normscope.selftest`.

    Attributes:
        record: Everything as one frozen record.

    Example:
        >>> import torch, normscope as ns
        >>> model, loader = torch.nn.BatchNorm1d(8).eval(), [torch.randn(32, 8) for _ in range(12)]
        >>> ns.selftest(model, loader, defects=["non-finite"])["non-finite"].status
        'seen'
    """

    record: SelfTest

    def __getitem__(self, defect: str) -> Sensitivity:
        for found in self.record.sensitivities:
            if found.defect == defect:
                return found
        raise KeyError(f"{defect} was not tried; these were: {', '.join(s.defect for s in self.record.sensitivities)}")

    @property
    def passed(self) -> bool:
        """Whether no defect was missed at its largest size; one without a cost was not."""
        return all(found.status != "not-seen" for found in self.record.sensitivities)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON; `normscope.records.from_json(SelfTest, text)` reads it back without loss."""
        Path(path).write_text(records.to_json(self.record), encoding="utf-8")

    def _repr_html_(self) -> str:
        """For notebooks."""
        from normscope.report.notebook import selftest_html

        return selftest_html(self.record)

    def __repr__(self) -> str:
        seen = sum(found.status == "seen" for found in self.record.sensitivities)
        return f"SelfTestReport({self.record.model}: {seen} of {len(self.record.sensitivities)} defects seen)"

    def __str__(self) -> str:
        return "\n".join(sensitivity.lines(self.record))


def selftest(
    model: Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Any, Any], Any] | None = None,
    defects: Iterable[str] | str | None = None,
    layer: str | None = None,
    intent: Iterable[str] = (),
    select: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str | None = None,
    module_ignores: Mapping[str, Iterable[str]] | None = None,
    thresholds: Thresholds = DEFAULTS,
    budget: float = 300,
    check_budget: float = 60,
    device: str | torch.device | None = None,
    progress: Tell | None = None,
) -> SelfTestReport:
    """Put known defects into a copy of the model and find the smallest of each that `check` would have seen.

    The control is the untouched copy: a defect whose alarm is there already is masked and not tried. Then every defect
    is tried at its largest size, and where it is seen, smaller sizes are searched by halving, all defects in turn, as
    long as the budget lasts. The user's model itself stays bit for bit as it was.

    Args:
        model: The model, in the mode in which it is checked.
        loader: As in `check`; it is read once.
        forward: As in `check`.
        loss: As in `check`; with it or a metric every size has its price.
        metric: As in `check`.
        defects: Names of the defects to try; all by default.
        layer: The normalizer that defects of a single layer go into; by default the middle one of those that keep
            running statistics and are reached.
        intent: As in `check`, like the four that follow: the self-test is of the doctor as it is set up for the model.
        select: Rules that run.
        ignore: Rules that do not.
        module_ignores: Rules that do not count in some modules.
        thresholds: By which the rules judge.
        budget: Seconds for all of it; what did not fit is said.
        check_budget: Seconds for a single check, as its own `budget`.
        device: As in `check`.
        progress: As in `check`; it counts checks.

    Raises:
        ArgumentError: An argument is of the wrong kind, the model cannot be copied, or it cannot run on the batches.
        DataError: The loader is empty or raises before its first batch.
        StateNotRestoredError: The model could not be brought back.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> loader = [torch.randn(32, 4) for _ in range(12)]
        >>> _ = torch.nn.init.uniform_(model[1].bias)  # as after training
        >>> _ = ns.recalibrate(model, loader, progress=False)
        >>> report = ns.selftest(model.eval(), loader, defects=["non-finite", "shifted-mean"])
        >>> report, report["shifted-mean"].seen.size < 1
        (SelfTestReport(Sequential: 2 of 2 defects seen), True)
    """
    start = time.monotonic()
    check_arguments(model, Callables(forward, loss, metric), budget)
    if not check_budget > 0:
        raise ArgumentError(f"check_budget must be positive, but got {check_budget}", cure="seconds; 60 by default")
    chosen = _chosen(defects)
    options = {
        "forward": forward, "loss": loss, "metric": metric, "intent": intent, "select": select, "ignore": ignore,
        "module_ignores": module_ignores, "thresholds": thresholds, "device": device,
    }  # fmt: skip
    with unharmed(model, None, loader) as (before, _):
        cache = read(loader, budget * READING)
        twin = copied(model, "defects go into a copy; let copy.deepcopy(model) work, or test what your builder returns")
        bench = _Bench(model, twin, cache.batches, options, start + budget, check_budget, progress)
        searches = bench.run(chosen, layer)
    control = bench.control(as_is)
    return SelfTestReport(
        SelfTest(
            model=type(model).__name__,
            norms=control.norms,
            layer=bench.layer,
            samples=sum(batch.size for batch in cache.batches),
            control=control.findings,
            sensitivities=tuple(search.result() for search in searches),
            checks=len(bench.spent),
            per_check=statistics.median(bench.spent),
            seconds=time.monotonic() - start,
            budget=float(budget),
            settled=all(search.next() is None for search in searches),
            device=control.device,
            settings=control.settings,
            notes=tuple(dict.fromkeys((*cache.notes, *control.notes))),
            before=before,
            machine=Machine.measure(),
        )
    )


def _chosen(names: Iterable[str] | str | None) -> tuple[Defect, ...]:
    wanted = [names] if isinstance(names, str) else None if names is None else list(names)
    known = {defect.name: defect for defect in DEFECTS}
    for name in wanted or ():
        if name not in known:
            raise ArgumentError(f"there is no defect {name!r}", cure=f"the defects are {', '.join(known)}")
    return tuple(defect for defect in DEFECTS if wanted is None or defect.name in wanted)


# --- searches -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Search:
    """The smallest size of one defect that is seen, by halving between sizes that were not and that were.

    Attributes:
        low: Place of the largest size that was not seen, -1 where none was tried.
        high: Place of the smallest that was.
    """

    defect: Defect
    layers: tuple[str, ...]
    sizes: tuple[float, ...]
    reason: str = ""
    status: str = ""
    low: int = -1
    high: int | None = None
    trials: dict[int, Trial] = field(default_factory=dict)

    def next(self) -> int | None:
        """The size to try now; None at the end."""
        last = len(self.sizes) - 1
        if self.status or self.low == last:
            return None
        if self.high is None:
            return last
        return (self.low + self.high) // 2 if self.high - self.low > 1 else None

    @property
    def left(self) -> int:
        """About how many trials are left."""
        if self.next() is None:
            return 0
        high = len(self.sizes) if self.high is None else self.high
        return math.ceil(math.log2(max(2, high - self.low)))

    def note(self, place: int, trial: Trial, reason: str) -> None:
        """One size was tried."""
        self.trials[place] = trial
        if trial.severity is None:
            self.low, self.reason = place, reason
        else:
            self.high = place

    def result(self) -> Sensitivity:
        """What came out."""
        tried = tuple(self.trials[k] for k in sorted(self.trials))
        seen = None if self.high is None else self.trials[self.high]
        status = self.status or ("seen" if seen else "not-seen" if tried else "not-tried")
        return Sensitivity(
            defect=self.defect.name,
            text=self.defect.text,
            rules=self.defect.rules,
            unit=self.defect.unit,
            layers=self.layers,
            status=status,  # type: ignore[arg-type]
            seen=seen,
            missed=self.trials.get(self.low),
            trials=tried,
            reason="" if seen else self.reason or "the budget is spent",
        )


@dataclass(slots=True)
class _Bench:
    """The copy, and what is done with it."""

    model: Module
    twin: Module
    batches: tuple[Batch, ...]
    options: dict[str, Any]
    deadline: float
    check_budget: float
    tell: Tell | None
    layer: str = ""
    body: Body = field(init=False)
    spent: list[float] = field(default_factory=list)
    controls: dict[Callable[[Body], Exposure], CheckRecord] = field(default_factory=dict)

    def run(self, defects: tuple[Defect, ...], layer: str | None) -> list[_Search]:
        """The control, then all defects at their strongest, then smaller ones in turn, as long as there is time."""
        trackers = self._trackers(layer)
        if not trackers:
            why = "the loader reaches no normalizer with running statistics"
            return [_Search(defect, (), (1.0,), why, "not-applicable") for defect in defects]
        searches = [self._search(defect) for defect in defects]
        while waiting := [search for search in searches if search.next() is not None]:
            for search in waiting:
                if time.monotonic() + statistics.median(self.spent) > self.deadline:
                    return searches
                if not search.trials and not self._is_open(search):
                    continue
                self._say(f"{search.defect.name} {search.sizes[search.next() or 0]:g}", searches)
                self._try(search)
        return searches

    def _trackers(self, layer: str | None) -> tuple[Found, ...]:
        """Those that the control reaches; sets the copy up for defects."""
        self._say("the untouched copy", [])
        report = self._examine(Exposure())
        self.controls[as_is] = report.record
        found = find(self.twin)
        names = {f.name for f in found}
        if layer is not None and layer not in names:
            raise ArgumentError(f"layer {layer!r} is no normalizer of the model", cure=f"one of {', '.join(names)}")
        reached = tuple(f for f in found if f.running and f.name in report.measurements.own)
        if layer is not None and layer not in {f.name for f in reached}:
            raise ArgumentError(
                f"layer {layer!r} keeps no running statistics, or the loader does not reach it",
                cure=f"one of {', '.join(f.name for f in reached) or 'none'}",
            )
        if reached:
            place = next((f for f in reached if f.name == layer), reached[len(reached) // 2])
            self.layer = place.name
            forward = self.options["forward"]
            self.body = Body(self.twin, self.model, reached, place, self.batches, forward, report.measurements)
        return reached

    def _search(self, defect: Defect) -> _Search:
        names = tuple(f.name for f in self.body.trackers) if defect.everywhere else (self.layer,)
        run = {verdict.code for verdict in self.controls[as_is].verdicts}
        why = defect.unfit(self.body)
        if not why and not run & set(defect.rules):
            why = f"{' and '.join(defect.rules)} are not among the rules that run"
        if why:
            return _Search(defect, names, (1.0,), why, "not-applicable")
        sizes = defect.sizes_for(self.body)
        return _Search(defect, names, sizes) if sizes else _Search(
            defect, names, (1.0,), "the loader's own batches are as small", "not-applicable"
        )  # fmt: skip

    def _is_open(self, search: _Search) -> bool:
        """Whether the untouched copy, handed over in the same way, keeps silent about this defect."""
        there = _loud(self.control(search.defect.control), search)
        if there is not None:
            search.status = "masked"
            search.reason = f"the untouched model raises it: {there.severity} {there.code} {there.message}"
        return there is None

    def control(self, expose: Callable[[Body], Exposure]) -> CheckRecord:
        """What the check says about the untouched copy, handed over in this way; checked once."""
        if expose not in self.controls:
            with Snapshot(self.twin):
                self.controls[expose] = self._examine(expose(self.body)).record
        return self.controls[expose]

    def _try(self, search: _Search) -> None:
        place = search.next()
        if place is None:
            return
        size, begun = search.sizes[place], time.monotonic()
        try:
            with Snapshot(self.twin), torch.no_grad():
                exposure = search.defect.inject(self.body, size)
                with torch.enable_grad():
                    report = self._examine(exposure)
        except StateNotRestoredError:
            raise
        except NormscopeError as error:
            search.status, search.reason = "not-applicable", f"the harmed copy cannot be checked: {error.sentence}"
            return
        alarm = _loud(report.record, search)
        known = {f.code for f in self.control(search.defect.control).findings}
        codes = tuple(f.code for f in report.findings if f.code not in known)
        verdicts = [v for v in report.verdicts if v.code in search.defect.rules]
        cost = search.defect.price(report.measurements)
        silent = (cost is not None and cost.low <= 0) or any(v.status == "info" for v in verdicts)
        if alarm is None and not search.trials and silent and not self._is_felt(search, report):
            search.status = "no-cost"
        spent = time.monotonic() - begun
        cost = cost or (None if alarm is None else alarm.cost)
        trial = Trial(size, None if alarm is None else alarm.severity, codes, cost, spent)
        search.note(place, trial, f"{verdicts[0].code}: {verdicts[0].reason}")

    def _is_felt(self, search: _Search, report: Report) -> bool:
        """Whether evaluation lost, by a plain comparison with the untouched copy, what the doctor has to see.

        The same samples are in both splits B. The doctor's own price is what may be broken.
        """
        before, after = (m.outcomes.get("eval") for m in (self.body.control, report.measurements))
        if search.defect.control is not as_is or before is None or after is None:
            return False
        t: Thresholds = self.options["thresholds"]
        if before.metric is not None and after.metric is not None:
            level, lost, share = before.metric.mean(), (before.metric.mean() - after.metric.mean()), t.cost_error / 100
        elif before.loss is not None and after.loss is not None:
            level, lost, share = before.loss.mean(), (after.loss.mean() - before.loss.mean()), t.loss_error
        else:
            return False
        return bool(lost > t.gap * share * abs(level))

    def _examine(self, exposure: Exposure) -> Report:
        begun = time.monotonic()
        batches = self.batches if exposure.batches is None else exposure.batches
        # The least that a check can do with its time is one batch of each split.
        left = max(self.deadline - begun, 1.0)
        options = {**self.options, **exposure.options}
        report = check(self.twin, [b.data for b in batches], budget=min(self.check_budget, left), **options)
        self.spent.append(time.monotonic() - begun)
        return report

    def _say(self, what: str, searches: list[_Search]) -> None:
        if self.tell is not None:
            done = len(self.spent)
            self.tell(done, done + sum(search.left for search in searches) if searches else 0, what)


def _loud(record: CheckRecord, search: _Search) -> Finding | None:
    """The first finding of the defect's rules that is severe enough, where the defect was put."""
    for finding in record.findings:
        there = not finding.layers or set(finding.layers) & set(search.layers)
        if finding.code in search.defect.rules and there and _ORDER[finding.severity] <= _ORDER[search.defect.at]:
            return finding
    return None
