"""The fix: remedies are tried one after the other, kept where split B shows that they help, confirmed on split C."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from torch.nn import Module

from normscope.doctor import gates
from normscope.doctor.cache import Batch, Splits
from normscope.doctor.guard import bring_back
from normscope.doctor.measurements import Effect, Outcome
from normscope.doctor.patient import Patient
from normscope.doctor.remedies import REMEDIES, Case
from normscope.doctor.thresholds import Thresholds
from normscope.errors import NormscopeError
from normscope.records import CheckRecord, Finding, FixRecord, Interval, Remedy, Treatment
from normscope.surgery import Snapshot, Surgery
from normscope.surgery.state import uninterrupted

__all__ = ["FixReport", "Ward", "treat"]


@dataclass(frozen=True, slots=True, eq=False)
class Ward:
    """What a fix needs from the check: model, cached splits and the user's callables."""

    model: Module
    splits: Splits
    patient: Patient
    reference: Module | None
    estimator: str
    thresholds: Thresholds
    seed: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FixReport:
    """What `Report.fix` did.

    Attributes:
        model: The model with what was applied, edited in place.
        record: Everything as one frozen record.
    """

    model: Module
    record: FixRecord
    _before: Snapshot = field(repr=False)

    @property
    def applied(self) -> tuple[Treatment, ...]:
        """Remedies that are in the model now."""
        return self.record.applied

    @property
    def skipped(self) -> tuple[Treatment, ...]:
        """Those that are not, each with the reason in `outcome`."""
        return self.record.skipped

    @property
    def before(self) -> Interval | None:
        """The score on split B before; None without metric and loss."""
        return self.record.before

    @property
    def after(self) -> Interval | None:
        """The score on split B now."""
        return self.record.after

    @property
    def gain(self) -> Interval | None:
        """The paired gain on split C, which took no part in choosing."""
        return self.record.gain

    @property
    def confirmed(self) -> bool:
        """Whether split C confirms what was applied."""
        return self.record.confirmed

    def undo(self) -> Module:
        """Take everything back, bit for bit, and return the model."""
        self._before.restore()
        return self.model

    def __repr__(self) -> str:
        return f"FixReport({len(self.applied)} applied, {len(self.skipped)} skipped, confirmed={self.confirmed})"


def treat(ward: Ward, record: CheckRecord, unsafe: bool) -> FixReport:
    """Try the remedies of all findings, causes first; whatever interrupts leaves the model as it was."""
    start = time.monotonic()
    before = Snapshot(ward.model)
    course = _Course(ward, unsafe, before)
    try:
        made = course.run(record.findings)
        with uninterrupted():
            before.keep_changes()
            return FixReport(ward.model, replace(made, seconds=time.monotonic() - start), before)
    except BaseException:
        bring_back(before)
        raise


@dataclass(slots=True)
class _Course:
    """A course of treatment in progress."""

    ward: Ward
    unsafe: bool
    start: Snapshot
    applied: list[Treatment] = field(default_factory=list)
    skipped: list[Treatment] = field(default_factory=list)

    def run(self, findings: tuple[Finding, ...]) -> FixRecord:
        before_b, before_c = self.score(self.ward.splits.b), self.score(self.ward.splits.c)
        now = before_b
        for finding in findings:
            if finding.severity != "I" and not self.settled(finding, findings):
                now = self.treat(finding, now)
        after_c = self.score(self.ward.splits.c) if self.applied else before_c
        final = self.effect(before_c, after_c)
        if self.applied and self.contradicts(final):
            # What B took for a gain was chance: nothing may stay in the model on that ground.
            bring_back(self.start)
            outcome = "split C contradicts what split B showed"
            self.skipped += [replace(treatment, outcome=outcome) for treatment in self.applied]
            self.applied.clear()
            now = before_b
        confirmed = bool(self.applied) and self.confirms(final)
        return FixRecord(
            tuple(self.applied), tuple(self.skipped), level(before_b), level(now), final.cost, confirmed, 0.0
        )  # fmt: skip

    def settled(self, finding: Finding, findings: tuple[Finding, ...]) -> bool:
        """Whether what was applied has dealt with this finding: its cause, or the same remedy on its layers."""
        # What only keeps the function has not mended what its finding caused.
        treated = {t.rule for t in self.applied if REMEDIES[t.remedy.code].proof == "gain"}
        causes = {f.code: f.explained_by for f in findings}
        cause = finding.explained_by
        for _ in findings:
            if cause in treated:
                return True
            cause = causes.get(cause, "")
        done = {(t.remedy.code, name) for t in self.applied for name in t.layers}
        return bool(finding.remedies) and any(
            all((remedy.code, name) in done for name in finding.layers) for remedy in finding.remedies
        )

    def treat(self, finding: Finding, now: Outcome) -> Outcome:
        """Try a finding's remedies in order until one is kept."""
        for remedy in finding.remedies:
            spec = REMEDIES[remedy.code]
            reason = self.refusal(remedy)
            if reason or spec.operation is None:
                self.skipped.append(Treatment(finding.code, remedy, finding.layers, None, reason))
                continue
            kept, after = self.attempt(finding, remedy, spec.operation, spec.proof, now)
            if kept:
                return after
        return now

    def refusal(self, remedy: Remedy) -> str:
        """Why a remedy is not even tried."""
        if remedy.safety == "S3":
            return "an edit of your code"
        if REMEDIES[remedy.code].operation is None:
            return "has to be followed by training"
        return "changes behaviour; unsafe=True tries it" if remedy.safety == "S2" and not self.unsafe else ""

    def attempt(
        self,
        finding: Finding,
        remedy: Remedy,
        operation: Callable[[Case], Surgery],
        proof: Literal["gain", "same"],
        now: Outcome,
    ) -> tuple[bool, Outcome]:
        """Apply a remedy, and take it back unless split B approves."""
        ward = self.ward
        batches = [batch.fresh(ward.patient.device) for batch in ward.splits.a]
        estimator = cast("Literal['population', 'mean']", ward.estimator)
        case = Case(ward.model, finding.layers, batches, ward.patient.forward, ward.reference, estimator)
        try:
            surgery = operation(case)
        except NormscopeError as error:
            self.skipped.append(Treatment(finding.code, remedy, finding.layers, None, str(error).splitlines()[0]))
            return False, now
        if not surgery.changed:
            reason = "; ".join(dict.fromkeys(reason for _, reason in surgery.skipped)) or "nothing to change"
            self.skipped.append(Treatment(finding.code, remedy, finding.layers, None, reason))
            return False, now
        after = self.score(ward.splits.b)
        gain = self.effect(now, after)
        reason = self.verdict(gain, proof)
        if reason:
            surgery.undo()
            self.skipped.append(Treatment(finding.code, remedy, finding.layers, gain.cost, reason))
            return False, now
        self.applied.append(Treatment(finding.code, remedy, surgery.changed, gain.cost, "kept"))
        return True, after

    def verdict(self, gain: Effect, proof: Literal["gain", "same"]) -> str:
        """Why split B refuses a remedy; "" if it approves."""
        if gain.cost is None:
            return (
                "" if proof == "same" else "cannot be verified: pass loss= or metric=, and a loader of several batches"
            )
        if proof == "same":
            return "" if gain.cost.high >= 0 else "split B loses by it"
        gained = gain.cost.low > 0 or (gain.loss is not None and gain.loss.low > 0 and gain.cost.value > 0)
        return "" if gained else "split B shows no gain"

    def contradicts(self, final: Effect) -> bool:
        """Whether split C shows no gain at all where one was promised, or a clear loss."""
        if final.cost is None:
            return False
        gains = any(REMEDIES[t.remedy.code].proof == "gain" for t in self.applied)
        return final.cost.value < 0 if gains else final.cost.high < 0

    def confirms(self, final: Effect) -> bool:
        """Whether split C shows the gain, or for remedies that promise none, no loss."""
        gains = any(REMEDIES[t.remedy.code].proof == "gain" for t in self.applied)
        if final.cost is None:
            return not gains
        if not gains:
            return final.cost.high >= 0
        return final.cost.low > 0 or (final.loss is not None and final.loss.low > 0 and final.cost.value > 0)

    def effect(self, before: Outcome, after: Outcome) -> Effect:
        """What the state before lost against the one after."""
        return gates.effect(before, after, self.ward.thresholds, self.ward.seed)

    def score(self, batches: tuple[Batch, ...]) -> Outcome:
        """Loss and metric in evaluation mode; the modes come back."""
        patient = self.ward.patient
        if (patient.loss is None and patient.metric is None) or not batches:
            return Outcome()
        with Snapshot(self.ward.model), patient.evaluating():
            return patient.score("fix", batches, unfit=[])


def level(outcome: Outcome) -> Interval | None:
    """The mean of metric, else of the loss, with its 99 % interval."""
    values: Any = outcome.metric if outcome.metric is not None else outcome.loss
    return None if values is None else gates.mean_interval(values, "metric" if outcome.metric is not None else "loss")
