"""Records as one self-contained page: no scripts, no network, light and dark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from normscope.records import CheckRecord, Clinic, Figure1, Finding, FixRecord, Interval, Status, Verdict, to_json
from normscope.report import charts, words
from normscope.report.charts import Bar, Chart
from normscope.report.figures import Panel

__all__ = ["environment", "figure1_page", "render_check"]

SEVERITY = {"E": "error", "W": "warning", "I": "hint"}


# --- a check ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Card:
    """What one number is now, after, and what the difference is."""

    name: str
    now: str
    after: str
    bar: Bar | None


@dataclass(frozen=True, slots=True)
class _Diagnosis:
    """A finding with its figures and what follows from it."""

    finding: Finding
    anchor: str
    charts: tuple[Chart, ...]
    consequences: tuple[_Diagnosis, ...]


def render_check(record: CheckRecord, fix: FixRecord | None = None) -> str:
    """The page of a check, and of the repair that followed; every text is escaped."""
    taken: set[str] = set()
    diagnoses = [_diagnosis(record, finding, taken) for finding in words.causes(record.findings)]
    return environment().get_template("check.html.j2").render(
        record=record,
        fix=fix,
        verdict=words.verdict(record),
        healthy=not any(f.severity != "I" for f in record.findings),
        cards=_cards(record),
        diagnoses=[d for d in diagnoses if d.finding.severity != "I"],
        hints=[d for d in diagnoses if d.finding.severity == "I"],
        states=[chart for metric in (True, False) if (chart := charts.states_chart(record, metric))],
        rules=_rules(record),
        command=words.setting(record, "command"),
        percent=words.is_percent(record.cost) or (fix is not None and words.is_percent(fix.before)),
        json=_embedded(to_json(record)),
    )  # fmt: skip


def _cards(record: CheckRecord) -> list[_Card]:
    cards = []
    for row in words.compared(record):
        cost = record.cost if record.cost is not None and (record.cost.unit == "loss") == row.loss else None
        bar = None if cost is None else charts.cost_bar(cost)
        cards.append(_Card(row.name, words.score(row.now, row.percent), words.score(row.after, row.percent), bar))
    return cards


def _diagnosis(record: CheckRecord, finding: Finding, taken: set[str]) -> _Diagnosis:
    anchor, k = finding.code, 1
    while anchor in taken:
        k += 1
        anchor = f"{finding.code}-{k}"
    taken.add(anchor)
    found = (charts.shares_chart(record, finding), charts.chart_of(record, finding))
    follow = tuple(_diagnosis(record, child, taken) for child in words.consequences(record.findings, finding))
    return _Diagnosis(finding, anchor, tuple(chart for chart in found if chart is not None), follow)


def _rules(record: CheckRecord) -> list[tuple[str, str, list[Verdict]]]:
    """The verdicts that are no alarm, by status: a heading, what it means, and the rules."""
    meaning: dict[Status, str] = {
        "pass": "The rule ran and found nothing.",
        "intentional": "The measured trouble was declared to be wanted.",
        "needs-input": "These rules need more than was passed.",
        "could-not-check": "These rules could not run: they have not passed.",
        "not-applicable": "The model has nothing that these rules look at.",
    }
    groups = [(status, [v for v in record.verdicts if v.status == status]) for status in meaning]
    return [(words.STATUS[status], meaning[status], found) for status, found in groups if found]


def _embedded(text: str) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin another."""
    compact = json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        compact = compact.replace(character, f"\\u{ord(character):04x}")
    return Markup(compact)  # noqa: S704 - no < or & is left


# --- figure 1 -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    rate: str
    without: Interval
    having: Interval
    steps_without: int | None
    steps_having: int | None


def figure1_page(
    record: Figure1, panels: Sequence[Panel], clinic: Clinic | None = None, links: Sequence[str] = ()
) -> str:
    """The page of `normscope demo`; text is escaped, only the panels' SVG enters as it is.

    Args:
        record: The first half.
        panels: Its figure in parts.
        clinic: The second half.
        links: Where the whole report of every patient lies.
    """
    patients = () if clinic is None else clinic.patients
    pictures = [(panel.caption, Markup(panel.svg)) for panel in panels]  # noqa: S704 - drawn by us, text escaped there
    count = len(record.rates)
    return environment().get_template("figure1.html.j2").render(
        record=record,
        accuracy=pictures[:count],
        bands=pictures[count:],
        rows=[_row(record, rate) for rate in record.rates],
        clinic=clinic,
        patients=[(p, charts.patient_chart(p), words.causes(p.check.findings)[:1]) for p in patients],
        links=links,
    )  # fmt: skip


def _row(record: Figure1, rate: float) -> _Row:
    without, having = record.run(rate, normalized=False), record.run(rate, normalized=True)
    return _Row(
        f"{rate:g}",
        without.final,
        having.final,
        without.accuracy.first_reaching(record.target),
        having.accuracy.first_reaching(record.target),
    )


def environment() -> jinja2.Environment:
    """The templates, with everything escaped and every name known."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normscope.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}%"
    environment.filters["hundredths"] = lambda value: f"{100 * value:.1f}"
    environment.filters["steps"] = lambda steps: "never" if steps is None else f"{steps:,}"
    environment.filters["number"] = lambda value: "–" if value is None else words.number(value)
    environment.filters["interval"] = words.interval
    environment.filters["gain"] = words.gained
    environment.filters["score"] = words.score
    environment.filters["fold"] = words.fold_layers
    environment.filters["severity"] = SEVERITY.__getitem__
    environment.filters["safety"] = words.SAFETY.__getitem__
    environment.filters["taken"] = lambda treatment, applied: (applied, treatment)
    environment.filters["sentence"] = words.sentence
    environment.globals["consequences"] = words.consequences
    environment.globals["share_of"] = words.share
    environment.globals["plural"] = words.plural
    environment.globals["confirmed"] = words.confirmed
    environment.globals["command_of"] = words.command
    return environment
