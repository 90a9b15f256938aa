"""`assert_healthy`: a check inside a test, and a failure that tells what, where, how much and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.nn import Module

from normscope.doctor.configuration import project
from normscope.doctor.examination import check
from normscope.doctor.report import Report
from normscope.errors import DataError, NormscopeError
from normscope.records import CheckRecord, Finding, Severity, from_json

# As in Report: report knows records only, so nothing runs in a circle.
from normscope.report import words

__all__ = ["UnhealthyError", "assert_healthy"]

# Characters for the layers of a finding.
LAYERS = 60


class UnhealthyError(NormscopeError, AssertionError):
    """`assert_healthy` found something at the given severity or above.

    Attributes:
        report: The whole report of the check.
    """

    def __init__(self, sentence: str, *, report: Report, cure: str) -> None:
        super().__init__(sentence, cure=cure)
        self.report = report


def assert_healthy(
    model: Module,
    loader: Iterable[Any],
    *,
    fail_on: Severity = "E",
    baseline: CheckRecord | str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Report:
    """Check a model inside a test: raise where a finding is at this severity or above.

    Args:
        model: The model.
        loader: As in `check`.
        fail_on: "E", "W" or "I".
        baseline: The record of an earlier check, or the path of its JSON: what it found in the same modules is allowed.
        config: A pyproject.toml whose `[tool.normscope]` holds; by default the next one upwards from where the tests
            run. Intents and ignores of the call are added to it, a selection and thresholds replace it.
        **options: As in `check`.

    Raises:
        UnhealthyError: An AssertionError that lists the findings, with `.report`.
        DataError: The baseline or the settings cannot be read.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).eval()
        >>> ns.assert_healthy(model, [torch.randn(16, 3) for _ in range(6)]).passed("W")
        True
    """
    known = _baseline(baseline)
    report = check(model, loader, **project(config).joined(options))
    if not report.passed(fail_on, known):
        alarms = report.failures(fail_on, known)
        raise UnhealthyError(
            "\n".join(_lines(report.record, alarms, fail_on)),
            report=report,
            cure=f"report.fix() repairs; ignore=[{alarms[0].code!r}] or intent= says that it is wanted so",
        )
    return report


def _baseline(given: CheckRecord | str | os.PathLike[str] | None) -> CheckRecord | None:
    if given is None or isinstance(given, CheckRecord):
        return given
    try:
        return from_json(CheckRecord, Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{given} is no JSON of a check: {error}", cure="write it with report.to_json(path)") from None


def _lines(record: CheckRecord, alarms: tuple[Finding, ...], fail_on: str) -> Iterator[str]:
    """The failing findings, each cause followed by what it explains."""
    cost = "" if record.cost is None or record.cost.low <= 0 else f", evaluation loses {words.interval(record.cost)}"
    yield f"{record.model} is not healthy: {words.plural(len(alarms), 'finding')} at {fail_on} or above{cost}"
    shown = {finding.code for finding in alarms}
    for finding in alarms:
        child = finding.explained_by in shown
        price = words.share(record, finding)
        if not price and finding.cost is not None:
            price = f"costs {words.interval(finding.cost)}"
        where = f" in {words.fold_layers(finding.layers, LAYERS)}" if finding.layers else ""
        tail = f"; follows from {finding.explained_by}" if child else f"; {price}" if price else ""
        yield f"  {finding.severity} {finding.code} {finding.name}{where}{tail}"
        yield f"      {finding.message}"
        if finding.remedies and not child:
            first = finding.remedies[0]
            yield f"      fix: {words.remedy_line(first)}"
            yield from (f"      $ {line}" for line in words.command(record, first).splitlines()[:1])
