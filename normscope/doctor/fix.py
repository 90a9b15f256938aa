"""The fix: remedies are tried one after the other, kept where split B shows that they help, confirmed on split C."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from torch.nn import Module

from normscope.doctor import gates
from normscope.doctor.cache import Batch, Splits
from normscope.doctor.guard import bring_back
from normscope.doctor.measurements import Effect, Outcome
from normscope.doctor.patient import Patient
from normscope.doctor.progress import Progress, Tell
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

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, track_running_stats=False))
        >>> fix = ns.check(model.eval(), [torch.randn(8, 4) for _ in range(6)]).fix()
        >>> [(one.rule, one.remedy.code) for one in fix.applied], model[1].track_running_stats
        ([('NRM210', 'give-statistics')], True)
        >>> fix.undo()[1].track_running_stats
        False
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

    def _repr_html_(self) -> str:
        """For notebooks."""
        from normscope.report.notebook import fix_html  # as in Report.to_html

        return fix_html(self.record)

    def __repr__(self) -> str:
        return f"FixReport({len(self.applied)} applied, {len(self.skipped)} skipped, confirmed={self.confirmed})"


def treat(ward: Ward, record: CheckRecord, unsafe: bool, progress: Tell | None) -> FixReport:
    """Try the remedies of all findings, causes first; whatever interrupts leaves the model as it was."""
    start = time.monotonic()
    ward.patient.progress = Progress(progress)
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
    fruitless: list[tuple[Finding, Remedy]] = field(default_factory=list)

    def run(self, findings: tuple[Finding, ...]) -> FixRecord:
        b, c = self.ward.splits.b, self.ward.splits.c
        self.ward.patient.progress.expect(1, len(b))
        self.ward.patient.progress.expect(2, len(c))
        before_b, before_c = self.score("before (B)", b), self.score("before (C)", c)
        now = before_b
        for finding in findings:
            if finding.severity != "I" and not self.settled(finding, findings):
                now = self.treat(finding, now)
        now = self.together(now)
        after_c = self.score("after (C)", c) if self.applied else before_c
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
        """Whether what was applied has dealt with all layers of this finding: by its cause, or by the same remedy."""
        causes = {f.code: f.explained_by for f in findings}
        above: set[str] = set()
        cause = finding.explained_by
        while cause and cause not in above:
            above.add(cause)
            cause = causes.get(cause, "")
        # What only keeps the function has not mended what its finding caused.
        mended = {
            name
            for t in self.applied
            if t.rule in above and REMEDIES[t.remedy.code].proof == "gain"
            for name in t.layers
        }
        if mended and mended >= set(finding.layers):
            return True
        done = {(t.remedy.code, name) for t in self.applied for name in t.layers}
        return bool(finding.remedies) and any(
            all((remedy.code, name) in done for name in finding.layers) for remedy in finding.remedies
        )

    def treat(self, finding: Finding, now: Outcome) -> Outcome:
        """Try a finding's remedies in order until one is kept."""
        for remedy in finding.remedies:
            spec = REMEDIES[remedy.code]
            if spec.operation is None:
                self.skip(finding, remedy, "an edit of your code")
            elif spec.safety == "S2" and not self.unsafe:
                self.skip(finding, remedy, "changes behaviour; unsafe=True tries it")
            else:
                kept, now = self.attempt(finding, remedy, spec.operation, spec.proof, now)
                if kept:
                    break
        return now

    def together(self, now: Outcome) -> Outcome:
        """Apply what gained nothing alone all at once: two causes may hide each other's cure."""
        # Of every finding the remedy that was tried first.
        pairs = list({finding.code: (finding, remedy) for finding, remedy in reversed(self.fruitless)}.values())[::-1]
        if len(pairs) < 2:
            return now
        done: list[tuple[Finding, Remedy, Surgery]] = []
        for finding, remedy in pairs:
            operation = REMEDIES[remedy.code].operation
            with contextlib.suppress(NormscopeError):
                if operation is not None and (surgery := operation(self.case(finding))).changed:
                    done.append((finding, remedy, surgery))
        name = ", ".join(f"{remedy.code} for {finding.code}" for finding, remedy, _ in done)
        self.ward.patient.progress.expect(1, len(self.ward.splits.b))
        after = self.score(f"together: {name} (B)", self.ward.splits.b)
        gain = self.effect(now, after)
        if len(done) < 2 or self.verdict(gain, "gain"):
            for _, _, surgery in reversed(done):
                surgery.undo()
            return now
        kept = {(finding.code, remedy.code) for finding, remedy, _ in done}
        self.skipped = [t for t in self.skipped if (t.rule, t.remedy.code) not in kept]
        self.applied += [
            Treatment(f.code, r, s.changed, gain.cost, "kept, together with the others") for f, r, s in done
        ]
        return after

    def case(self, finding: Finding) -> Case:
        """What an operation for this finding may use."""
        ward = self.ward
        batches = [batch.fresh(ward.patient.device) for batch in ward.splits.a]
        estimator = cast("Literal['population', 'mean']", ward.estimator)
        return Case(ward.model, finding.layers, batches, ward.patient.forward, ward.reference, estimator)

    def skip(self, finding: Finding, remedy: Remedy, reason: str, gain: Interval | None = None) -> None:
        """Note a remedy that is not in the model, and why."""
        self.skipped.append(Treatment(finding.code, remedy, finding.layers, gain, reason))

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
        name = f"{remedy.code} for {finding.code}"
        ward.patient.progress.expect(1, len(ward.splits.b))
        ward.patient.progress.at(name)
        try:
            surgery = operation(self.case(finding))
        except NormscopeError as error:
            self.skip(finding, remedy, str(error).splitlines()[0])
            return False, now
        if not surgery.changed:
            reason = "; ".join(dict.fromkeys(reason for _, reason in surgery.skipped)) or "nothing to change"
            self.skip(finding, remedy, reason)
            return False, now
        after = self.score(f"{name} (B)", ward.splits.b)
        gain = self.effect(now, after)
        reason = self.verdict(gain, proof)
        if reason:
            surgery.undo()
            self.fruitless.append((finding, remedy))
            self.skip(finding, remedy, reason, gain.cost)
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
            return "split B loses by it" if lost(gain) else ""
        return "" if gained(gain) else "split B shows no gain"

    @property
    def promised(self) -> bool:
        """Whether anything was applied for the sake of a gain."""
        return any(REMEDIES[t.remedy.code].proof == "gain" for t in self.applied)

    def contradicts(self, final: Effect) -> bool:
        """Whether split C shows no gain at all where one was promised, or a clear loss."""
        if final.cost is None:
            return False
        return final.cost.value < 0 if self.promised else lost(final)

    def confirms(self, final: Effect) -> bool:
        """Whether split C shows the gain, or for remedies that promise none, no loss."""
        if final.cost is None:
            return not self.promised
        return gained(final) if self.promised else not lost(final)

    def effect(self, before: Outcome, after: Outcome) -> Effect:
        """What the state before lost against the one after."""
        return gates.effect(before, after, self.ward.thresholds, self.ward.seed)

    def score(self, name: str, batches: tuple[Batch, ...]) -> Outcome:
        """Loss and metric in evaluation mode; the modes come back."""
        patient = self.ward.patient
        if (patient.loss is None and patient.metric is None) or not batches:
            return Outcome()
        with Snapshot(self.ward.model), patient.evaluating():
            return patient.score(name, batches, unfit=[])


def gained(effect: Effect) -> bool:
    """Whether a gain is clear; the loss may speak for a metric of few steps that does not contradict it."""
    cost, loss = effect.cost, effect.loss
    return cost is not None and (cost.low > 0 or (loss is not None and loss.low > 0 and cost.value > 0))


def lost(effect: Effect) -> bool:
    """Whether a loss is, in the same way."""
    cost, loss = effect.cost, effect.loss
    return cost is not None and (cost.high < 0 or (loss is not None and loss.high < 0 and cost.value < 0))


def level(outcome: Outcome) -> Interval | None:
    """The mean of metric, else of the loss, with its 99 % interval."""
    if outcome.metric is not None:
        share = gates.both_shares(outcome.metric, outcome.metric)
        return gates.mean_interval(outcome.metric, "share" if share else "metric")
    return None if outcome.loss is None else gates.mean_interval(outcome.loss, "loss")
