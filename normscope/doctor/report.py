"""What a check returns: findings, verdicts, the record that pages are made of, and the fix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch.nn import Module

from normscope import records
from normscope.doctor.fix import FixReport, Ward, treat
from normscope.doctor.measurements import Measurements
from normscope.doctor.progress import Tell
from normscope.errors import ArgumentError
from normscope.records import CheckRecord, Finding, Severity, Verdict
from normscope.report import words

__all__ = ["Report"]

_ORDER = {"E": 0, "W": 1, "I": 2}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Report:
    """The result of `normscope.check`.

    Attributes:
        record: Everything as one frozen record, which text, page and JSON are made of.
        measurements: The numbers that the rules judged; not part of the JSON.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
        >>> report = ns.check(model, [torch.randn(8, 4) for _ in range(6)])
        >>> report, report.passed("W"), report["NRM101"].reason
        (Report(Sequential: 0 E, 0 W, ... I), True, 'all statistics and affine parameters are finite')
    """

    record: CheckRecord
    measurements: Measurements
    _ward: Ward = field(repr=False)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The alarms, worst first, every cause before what it explains."""
        return self.record.findings

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """What every rule says, passes included."""
        return self.record.verdicts

    @property
    def model(self) -> Module:
        """The checked model."""
        return self._ward.model

    def __getitem__(self, code: str) -> Verdict:
        for verdict in self.verdicts:
            if verdict.code == code:
                return verdict
        raise KeyError(f"{code} did not run; these did: {', '.join(v.code for v in self.verdicts)}")

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def passed(self, fail_on: Severity = "E", baseline: CheckRecord | None = None) -> bool:
        """Whether no finding is at this severity or above.

        Args:
            fail_on: "E", "W" or "I".
            baseline: The record of an earlier check: what it found in the same modules does not count.
        """
        return not self.failures(fail_on, baseline)

    def failures(self, fail_on: Severity = "E", baseline: CheckRecord | None = None) -> tuple[Finding, ...]:
        """The findings for which `passed` says no, in the order of `findings`."""
        if fail_on not in _ORDER:
            raise ArgumentError(f"fail_on {fail_on!r} is no severity", cure="use one of E, W, I")
        known = set() if baseline is None else {one for f in baseline.findings for one in f.fingerprints}
        new = [finding for finding in self.findings if not finding.fingerprints <= known]
        return tuple(finding for finding in new if _ORDER[finding.severity] <= _ORDER[fail_on])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON; `normscope.records.from_json(CheckRecord, text)` reads it back without loss."""
        Path(path).write_text(records.to_json(self.record), encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the record as one self-contained page."""
        # The one import against the order of the rooms: report knows records only, so nothing runs in a circle, and who
        # asks for no page does not pay for drawing. A registry would hide the same arrow.
        from normscope.report.html import render_check

        Path(path).write_text(render_check(self.record), encoding="utf-8")

    def fix(self, unsafe: bool = False, *, progress: Tell | None = None) -> FixReport:
        """Apply what helps, in place: each remedy is kept only if split B shows that it helps, C confirms the whole.

        Args:
            unsafe: Also try remedies that change behaviour (S2).
            progress: As in `check`.
        """
        return treat(self._ward, self.record, unsafe, progress)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from normscope.report.notebook import check_html

        return check_html(self.record)

    def __repr__(self) -> str:
        count = {s: sum(f.severity == s for f in self.findings) for s in "EWI"}
        return f"Report({self.record.model}: {count['E']} E, {count['W']} W, {count['I']} I)"

    def __str__(self) -> str:
        lines = [repr(self), self.record.reading]
        for finding in self.findings:
            indent = "    └ " if finding.explained_by else "  "
            cost = "" if finding.cost is None else f"; {_cost(finding.cost)}"
            lines.append(f"{indent}{finding.severity} {finding.code} {finding.name}: {finding.message}{cost}")
        return "\n".join(line for line in lines if line)


def _cost(cost: records.Interval) -> str:
    return f"costs {words.interval(cost)}" if cost.high > 0 else "costs nothing"
