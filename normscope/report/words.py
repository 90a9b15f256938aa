"""Numbers, layers and verdicts as words: the same in the terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normscope.records import (
    CheckRecord,
    Comparison,
    Difference,
    Finding,
    FixRecord,
    Interval,
    Judgement,
    Remedy,
    Status,
)

__all__ = [
    "SAFETY",
    "SEVERITIES",
    "SEVERITY",
    "STATUS",
    "causes",
    "command",
    "compared",
    "compared_verdict",
    "confirmed",
    "consequences",
    "counts",
    "descendants",
    "difference",
    "differences",
    "effect",
    "fold_layers",
    "gained",
    "in_cell",
    "interval",
    "is_percent",
    "judged",
    "layer",
    "level",
    "metric_name",
    "next_step",
    "number",
    "percent",
    "plural",
    "rank",
    "remedy_line",
    "score",
    "score_rows",
    "sentence",
    "setting",
    "share",
    "status",
    "verdict",
    "version",
]

SAFETY = {
    "S0": "keeps the function",
    "S1": "statistics and flags, no weights",
    "S2": "changes behaviour, needs --unsafe",
    "S3": "your code",
}
STATUS: dict[str, str] = {
    "fail": "failed",
    "warn": "warned",
    "info": "noted",
    "pass": "passed",
    "intentional": "intentional",
    "not-applicable": "not applicable",
    "needs-input": "needs input",
    "could-not-check": "could not check",
}
SEVERITIES = "EWI"
SEVERITY = {"E": "error", "W": "warning", "I": "hint"}
# Characters of a name that still tell something.
LEAST_NAME = 12
# Of the cost; less is no explanation.
LEAST_SHARE = 0.5


def number(value: float) -> str:
    """Three significant digits, without exponents where a reader would not write one."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size < 1000 and value == round(value):
        return f"{value:.0f}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
    if size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def effect(found: Interval | None) -> str:
    """An effect of the lab with its interval and unit; "" where there is none."""
    if found is None:
        return ""
    value = "undetermined" if math.isnan(found.value) else number(found.value)
    if found.low != found.high:
        value += f" ({number(found.low)} to {number(found.high)})"
    return f"{value} {found.unit}".strip()


def judged(judgement: Judgement) -> str:
    """The verdict of an experiment with its effect and the number of seeds."""
    seeds = plural(judgement.seeds, "seed") if judgement.seeds else ""
    return ", ".join(filter(None, (judgement.verdict, effect(judgement.effect), seeds)))


def in_cell(text: str) -> str:
    """Text within a table of a document."""
    return text.replace("|", "\\|").replace("\n", " ")


def percent(value: float) -> str:
    """A share in whole percent."""
    return f"{100 * value:.0f}%" if not abs(value) < 0.005 else "0%"


def interval(found: Interval) -> str:
    """A cost or a gain with its interval: '5.5 pp [4.6, 6.4]'."""
    if found.unit == "pp":
        return f"{found.value:.1f} pp [{found.low:.1f}, {found.high:.1f}]"
    unit = f" {found.unit}" if found.unit and found.unit not in ("loss", "metric") else ""
    return f"{number(found.value)}{unit} [{number(found.low)}, {number(found.high)}]"


def score(found: Interval | None, percent: bool = False) -> str:
    """The value of a metric or a loss: '71.4%' for a share, else three digits."""
    if found is None:
        return "–"
    return f"{100 * found.value:.1f}%" if percent else number(found.value)


def level(found: Interval, percent: bool = False) -> str:
    """A value with its interval: '71.4% [68.0, 75.0]'."""
    low, high = (f"{100 * v:.1f}" if percent else number(v) for v in (found.low, found.high))
    return f"{score(found, percent)} [{low}, {high}]"


def is_percent(found: Interval | None) -> bool:
    """Whether a metric is a share of one, whose differences are percentage points."""
    return found is not None and found.unit in ("pp", "share")


def gained(found: Interval) -> str:
    """A gain with its sign: '+5.5 pp [4.6, 6.4]'."""
    return f"+{interval(found)}" if found.value > 0 else interval(found)


def confirmed(fix: FixRecord) -> str:
    """What split C says about a repair."""
    if not fix.confirmed:
        return "not confirmed"
    return "confirmed" if fix.gain is None or fix.gain.value > 0 else "no clear loss"


def plural(count: int, noun: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def layer(name: str) -> str:
    """A module path as it is shown."""
    return name or "(the model itself)"


def status(found: str) -> str:
    """A rule's answer as it is shown."""
    return STATUS.get(found, found)


def fold_layers(names: Sequence[str], width: int = 40) -> str:
    """Module paths in at most so many characters: all of them, else their common path and how many there are."""
    shown = [layer(name) for name in names]
    every = ", ".join(shown)
    if len(every) <= width:
        return every
    if len(shown) == 1:
        return f"…{every[len(every) - width + 1 :]}"  # the end of a path tells more than its beginning
    count = f"({len(shown)} layers)"
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in shown), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if common and len(".".join(common)) + len(count) + 3 <= width:
        return f"{'.'.join(common)}.* {count}"
    room = width - len(count) - 3
    if room < LEAST_NAME:
        return plural(len(shown), "layer")
    first = shown[0] if len(shown[0]) <= room else f"…{shown[0][len(shown[0]) - room + 1 :]}"
    return f"{first}, … {count}"


def rank(finding: Finding) -> tuple[int, float]:
    """The order of findings: by severity, then by cost."""
    return SEVERITIES.index(finding.severity), -(finding.cost.value if finding.cost is not None else -math.inf)


def causes(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that no other one explains, worst first."""
    codes = {finding.code for finding in findings}
    return sorted((f for f in findings if f.explained_by not in codes - {f.code}), key=rank)


def consequences(findings: Sequence[Finding], cause: Finding) -> list[Finding]:
    """The findings that one finding explains."""
    return sorted((f for f in findings if f.explained_by == cause.code and f.code != cause.code), key=rank)


def descendants(findings: Sequence[Finding], cause: Finding) -> list[Finding]:
    """The findings that one finding explains, each followed by those that it explains."""
    return [f for child in consequences(findings, cause) for f in (child, *descendants(findings, child))]


def counts(record: CheckRecord) -> list[tuple[Status, int]]:
    """How many rules passed, do not apply, need more input or could not be checked."""
    quiet: tuple[Status, ...] = ("pass", "intentional", "not-applicable", "needs-input", "could-not-check")
    found = [(status, sum(v.status == status for v in record.verdicts)) for status in quiet]
    return [(status, count) for status, count in found if count or status != "intentional"]


def setting(record: CheckRecord, name: str, default: str = "") -> str:
    """One of the record's settings."""
    return dict(record.settings).get(name, default)


def metric_name(record: CheckRecord) -> str:
    """The name of the user's metric, if it is one."""
    name = setting(record, "metric").rpartition(":")[2].rpartition(".")[2]
    if name.isidentifier() and name != "None":
        return name.replace("_", " ")
    return "accuracy" if "accuracy" in setting(record, "scored by") else "metric"


def share(record: CheckRecord, finding: Finding) -> str:
    """How much of the whole cost a finding's layers explain; "" where that was not found out."""
    if finding.explains is None or finding.explains < LEAST_SHARE or record.cost is None or record.cost.low <= 0:
        return ""
    cost = record.cost
    whole = f"{cost.value:.1f} pp" if cost.unit == "pp" else number(cost.value)
    return f"explains {100 * min(1.0, finding.explains):.0f}% of {whole}"


def version(record: CheckRecord) -> str:
    """The version of normscope that made the record; "" where it runs without being installed."""
    found = dict(record.machine.versions).get("normscope", "")
    return found if found[:1].isdigit() else ""


def command(record: CheckRecord, remedy: Remedy) -> str:
    """A remedy's command with the user's own arguments in it."""
    given = setting(record, "command")
    head, tail = "normscope fix MODEL --data DATA", "-o fixed.pt"
    if not given or not remedy.command.startswith(head):
        return remedy.command
    options = remedy.command.removeprefix(head).replace(tail, "").strip()
    return " ".join(part for part in (given.replace(" check ", " fix ", 1), options, tail) if part)


def next_step(record: CheckRecord) -> str:
    """What to type next: the repair, where a remedy can be applied; "" where none can."""
    given = setting(record, "command")
    if not any(r.safety in ("S0", "S1") for f in record.findings for r in f.remedies if f.severity != "I"):
        return ""
    return f"{given.replace(' check ', ' fix ', 1)} -o fixed.pt" if given else "report.fix()"


@dataclass(frozen=True, slots=True)
class Compared:
    """A metric or a loss of the model as it is and with recalibrated statistics."""

    name: str
    loss: bool
    percent: bool
    now: Interval
    after: Interval | None


def compared(record: CheckRecord) -> list[Compared]:
    """The metric and the loss, as far as they were measured."""
    now = next((s for s in record.scores if s.state == "eval"), None)
    after = next((s for s in record.scores if s.state.startswith("recalibrated")), None)
    rows = []
    if now is not None and now.metric is not None:
        best = None if after is None else after.metric
        percent = is_percent(record.cost) or is_percent(now.metric)
        rows.append(Compared(metric_name(record), False, percent, now.metric, best))
    if now is not None and now.loss is not None:
        rows.append(Compared("loss", True, False, now.loss, None if after is None else after.loss))
    return rows


def verdict(record: CheckRecord) -> str:
    """The report in one sentence."""
    if not record.layers:
        return "The model has no normalizers that normscope knows: nothing was checked."
    alarms = [f for f in record.findings if f.severity != "I"]
    passed = sum(v.status == "pass" for v in record.verdicts)
    unchecked = sum(v.status in ("needs-input", "could-not-check") for v in record.verdicts)
    if not alarms:
        hints = f", {plural(len(record.findings), 'hint')}" if record.findings else ""
        return f"No normalization trouble was found: {plural(passed, 'rule')} passed{hints}, {unchecked} not checked."
    cause = causes(record.findings)[0]
    place = f"{cause.code} {cause.name}" + (f" in {fold_layers(cause.layers)}" if cause.layers else "")
    if record.cost is not None and record.cost.low > 0:
        unit = {"loss": " of loss", "pp": f" of {metric_name(record)}"}.get(record.cost.unit, "")
        return f"Normalization trouble costs {interval(record.cost)}{unit}; the first cause is {place}."
    troubles = plural(len(causes(alarms)), "trouble")
    if cause.cost is not None and cause.cost.low > 0:
        return f"{troubles}; the first costs {interval(cause.cost)}: {place}."
    felt = "without a measured cost" if record.cost is not None else "whose cost was not measured"
    return f"{troubles} {felt}; the first is {place}."


def compared_verdict(record: Comparison) -> str:
    """Two checks in one sentence."""
    over, open_ = (sum(gone.over == wanted for gone in record.gone) for wanted in (True, False))
    parts = [
        f"{len(record.new)} new" if record.new else "",
        f"{sum(c.worse for c in record.changed)} worse" if any(c.worse for c in record.changed) else "",
        f"{sum(not c.worse for c in record.changed)} changed" if any(not c.worse for c in record.changed) else "",
        f"{over} over" if over else "",
        f"{open_} gone without a pass" if open_ else "",
        f"{len(record.same)} as before" if record.same else "",
    ]
    told = ", ".join(part for part in parts if part)
    if not told:
        return "Neither run found anything."
    if not record.new and not record.gone and not record.changed:
        return f"Nothing changed: {plural(len(record.same), 'finding')} as before."
    return f"Findings: {told}."


def score_rows(record: Comparison) -> list[Difference]:
    """Metric, loss and cost of two runs."""
    rows = []
    for pair in record.scores:
        percent = is_percent(pair.before) or is_percent(pair.after)
        before, after = ("–" if i is None else level(i, percent) for i in (pair.before, pair.after))
        rows.append(Difference(pair.name, before, after))
    if any(record.cost):
        rows.append(Difference("cost of the trouble", *("–" if i is None else interval(i) for i in record.cost)))
    return rows


def differences(record: Comparison) -> list[tuple[str, tuple[Difference, ...]]]:
    """What differs besides findings, each with a heading."""
    groups = (
        ("Normalizers", record.layers),
        ("Rules that answered in one run only", record.unchecked),
        ("What else differs", record.circumstances),
    )
    return [(title, rows) for title, rows in groups if rows]


def difference(row: Difference) -> str:
    """One difference in a line."""
    if not row.before:
        return f"{row.name}: new, {row.after}"
    return f"{row.name}: {row.before} → {row.after}" if row.after else f"{row.name}: gone, was {row.before}"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text.strip()
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}" if text else ""


def remedy_line(remedy: Remedy) -> str:
    """What a remedy does, with its class of safety."""
    return f"{remedy.text} [{remedy.safety}: {SAFETY[remedy.safety]}]"
