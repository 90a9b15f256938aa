"""Records as short pieces of HTML for notebooks: no scripts, nothing from outside, light and dark, all text escaped."""

from __future__ import annotations

from normscope.records import CheckRecord, FixRecord, SelfTest
from normscope.report import sensitivity, words
from normscope.report.html import environment

__all__ = ["check_html", "fix_html", "selftest_html"]


def check_html(record: CheckRecord) -> str:
    """A check: the verdict, what the states score, the findings, hints folded away."""
    causes = words.causes(record.findings)
    return environment().get_template("notebook.html.j2").render(
        kind="check",
        record=record,
        verdict=words.verdict(record),
        rows=words.compared(record),
        alarms=[f for f in causes if f.severity != "I"],
        hints=[f for f in causes if f.severity == "I"],
        counts=[(words.STATUS[status], count) for status, count in words.counts(record)],
    )  # fmt: skip


def fix_html(record: FixRecord) -> str:
    """A repair: what was applied, what not and why, and what it gained."""
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(kind="fix", fix=record, percent=words.is_percent(record.gain) or words.is_percent(record.before))
    )


def selftest_html(record: SelfTest) -> str:
    """A self-test: a row per defect."""
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(kind="selftest", record=record, rows=[sensitivity.row(found) for found in record.sensitivities])
    )
