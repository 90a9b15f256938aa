"""Two checks side by side: what is new, what is gone and why, what changed, and what else differs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from normscope.records import (
    Changed,
    CheckRecord,
    Comparison,
    Difference,
    Finding,
    Gone,
    NormRow,
    ScorePair,
    Verdict,
    from_json,
)
from normscope.report import words

__all__ = ["compare", "read_check"]

CARRIED = re.compile(r'<script type="application/json" id="record">(.*?)</script>', re.DOTALL)
NOT_RUN = "not run"
ANSWERED = ("pass", "fail", "warn", "info", "intentional")


def read_check(text: str) -> CheckRecord:
    """A check from its JSON, or from the page that carries it.

    Raises:
        ValueError: The text is neither.
    """
    carried = CARRIED.search(text)
    return from_json(CheckRecord, carried[1] if carried else text)


def compare(before: CheckRecord, after: CheckRecord) -> Comparison:
    """What the later check says otherwise than the earlier one.

    A finding is the same where its code, severity and normalizers are, and the intervals of its cost overlap: texts and
    figures differ from run to run.
    """
    old, new = ({f.code: f for f in record.findings} for record in (before, after))
    both = [_changed(old[code], new[code]) for code in new if code in old]
    verdicts = {v.code: v for v in after.verdicts}
    return Comparison(
        model=(before.model, after.model),
        scores=_scores(before, after),
        cost=(before.cost, after.cost),
        new=tuple(sorted((f for f in after.findings if f.code not in old), key=words.rank)),
        gone=tuple(_gone(f, verdicts) for f in sorted(before.findings, key=words.rank) if f.code not in new),
        changed=tuple(pair for pair in both if pair.changes),
        same=tuple(pair.after for pair in both if not pair.changes),
        unchecked=_unchecked(before, after),
        layers=_layers(before, after),
        circumstances=_circumstances(before, after),
    )


def _changed(before: Finding, after: Finding) -> Changed:
    more = [name for name in after.layers if name not in before.layers]
    fewer = [name for name in before.layers if name not in after.layers]
    harder = words.SEVERITIES.index(after.severity) < words.SEVERITIES.index(before.severity)
    dearer, cheaper = _apart(before, after), _apart(after, before)
    changes = []
    if after.severity != before.severity:
        changes.append(f"{words.SEVERITY[before.severity]} → {words.SEVERITY[after.severity]}")
    if more:
        changes.append(f"also in {words.fold_layers(more)}")
    if fewer:
        changes.append(f"no longer in {words.fold_layers(fewer)}")
    if (dearer or cheaper) and before.cost is not None and after.cost is not None:
        changes.append(f"costs {words.interval(after.cost)}, was {words.interval(before.cost)}")
    return Changed(before, after, tuple(changes), worse=harder or bool(more) or dearer)


def _apart(less: Finding, more: Finding) -> bool:
    """Whether the interval of one cost lies below that of the other."""
    a, b = less.cost, more.cost
    return a is not None and b is not None and a.unit == b.unit and a.high < b.low


def _gone(finding: Finding, verdicts: Mapping[str, Verdict]) -> Gone:
    verdict = verdicts.get(finding.code)
    if verdict is None:
        return Gone(finding, NOT_RUN, "the rule did not run: ignored, or not selected")
    return Gone(finding, verdict.status, verdict.reason)


def _unchecked(before: CheckRecord, after: CheckRecord) -> tuple[Difference, ...]:
    """Rules that gave an answer in one run only; findings that are gone tell their own story."""
    alarms = {f.code for f in before.findings}
    told = [{v.code: v for v in record.verdicts} for record in (before, after)]
    names = {code: v.name for verdicts in told for code, v in verdicts.items()}
    rows = []
    for code, name in sorted(names.items()):
        old, new = (verdicts[code].status if code in verdicts else NOT_RUN for verdicts in told)
        if (old in ANSWERED) != (new in ANSWERED) and code not in alarms:
            rows.append(Difference(f"{code} {name}", words.status(old), words.status(new)))
    return tuple(rows)


def _layers(before: CheckRecord, after: CheckRecord) -> tuple[Difference, ...]:
    old, new = ({row.name: row for row in record.layers} for record in (before, after))
    rows = [Difference(words.layer(name), _trait(old.get(name)), _trait(new.get(name))) for name in {**old, **new}]
    return tuple(row for row in rows if row.before != row.after)


def _trait(row: NormRow | None) -> str:
    return "" if row is None else f"{row.kind}, {row.mode}, {words.plural(row.calls, 'call')}"


def _scores(before: CheckRecord, after: CheckRecord) -> tuple[ScorePair, ...]:
    old, new = ({row.name: row.now for row in words.compared(record)} for record in (before, after))
    return tuple(ScorePair(name, old.get(name), new.get(name)) for name in {**old, **new})


def _circumstances(before: CheckRecord, after: CheckRecord) -> tuple[Difference, ...]:
    """What else is not the same in both runs."""
    old, new = _facts(before), _facts(after)
    rows = [Difference(name, old.get(name, ""), new.get(name, "")) for name in {**old, **new}]
    return tuple(row for row in rows if row.before != row.after)


def _facts(record: CheckRecord) -> dict[str, str]:
    machine = record.machine
    facts = {
        "model": record.model,
        "weights and statistics": record.before[:16],
        "samples": f"{record.samples:,}",
        "seed": str(record.seed),
        "budget": f"{record.budget:g} s",
        "device": record.device,
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.system}",
        "Python": machine.python,
    }
    facts |= dict(machine.versions)
    facts |= {name: value for name, value in record.settings if name != "command"}
    return facts | {f"threshold {t.name}": words.number(t.value) for t in record.thresholds}
