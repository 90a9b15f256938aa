"""Records as one self-contained page: no network, light and dark, readable without its script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from normscope.records import (
    CheckRecord,
    Clinic,
    Comparison,
    Figure1,
    Finding,
    FixRecord,
    Interval,
    Remedy,
    Status,
    Verdict,
    to_json,
)
from normscope.report import charts, modules, scatter, words
from normscope.report.charts import Bar, Chart
from normscope.report.figures import Panel
from normscope.report.scatter import ChannelFigure, Decay

__all__ = ["environment", "figure1_page", "render_check", "render_comparison"]


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
    channels: tuple[ChannelFigure, ...]
    elsewhere: str
    decay: Decay | None
    consequences: tuple[_Diagnosis, ...]

    @property
    def codes(self) -> set[str]:
        """Of the finding and of all that follows from it."""
        return {self.finding.code}.union(*(child.codes for child in self.consequences))


@dataclass(frozen=True, slots=True)
class _Decision:
    """A finding in one row: what it costs, what helps first, and what that was seen to gain."""

    finding: Finding
    anchor: str
    bar: Bar | None
    remedy: Remedy | None
    gain: str


def render_check(record: CheckRecord, fix: FixRecord | None = None) -> str:
    """The page of a check, and of the repair that followed; every text is escaped."""
    shown: dict[object, str] = {}
    diagnoses = [_diagnosis(record, finding, shown) for finding in words.causes(record.findings)]
    alarms = [d for d in diagnoses if d.finding.severity != "I"]
    return environment().get_template("check.html.j2").render(
        record=record,
        fix=fix,
        script=_script(),
        verdict=words.verdict(record),
        healthy=not any(f.severity != "I" for f in record.findings),
        cards=_cards(record),
        decisions=[_decision(d, fix) for d in alarms],
        modules=modules.tree_of(record),
        diagnoses=alarms,
        hints=[d for d in diagnoses if d.finding.severity == "I"],
        states=[chart for metric in (True, False) if (chart := charts.states_chart(record, metric))],
        rules=_rules(record),
        typed=words.setting(record, "command"),
        next_step=words.next_step(record),
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


def _diagnosis(record: CheckRecord, finding: Finding, shown: dict[object, str]) -> _Diagnosis:
    """A finding; `shown` says what the page already has, and under which anchor: no figure is drawn twice."""
    anchor, k = finding.code, 1
    while anchor in shown:
        k += 1
        anchor = f"{finding.code}-{k}"
    shown[anchor] = anchor
    drawn = charts.chart_of(record, finding)
    figures: list[Chart | ChannelFigure | None] = [charts.shares_chart(record, finding), drawn]
    figures += scatter.channel_figures(record, finding) if drawn is not None else ()
    places = {figure: shown.setdefault(figure, anchor) for figure in figures if figure is not None}
    new = [figure for figure, place in places.items() if place == anchor]
    return _Diagnosis(
        finding=finding,
        anchor=anchor,
        charts=tuple(figure for figure in new if isinstance(figure, Chart)),
        channels=tuple(figure for figure in new if isinstance(figure, ChannelFigure)),
        elsewhere=next((place for place in places.values() if place != anchor), ""),
        decay=scatter.decay_of(finding),
        consequences=tuple(_diagnosis(record, f, shown) for f in words.consequences(record.findings, finding)),
    )


def _decision(diagnosis: _Diagnosis, fix: FixRecord | None) -> _Decision:
    finding = diagnosis.finding
    bar = None if finding.cost is None else charts.cost_bar(finding.cost)
    remedy = finding.remedies[0] if finding.remedies else None
    gain = "–"
    for treatment in () if fix is None else fix.applied:
        if treatment.rule in diagnosis.codes:
            remedy, gain = treatment.remedy, words.gained(treatment.gain) if treatment.gain else "not measured"
            break
    return _Decision(finding, diagnosis.anchor, bar, remedy, gain)


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


@dataclass(frozen=True, slots=True)
class _Script:
    """The page's script, and the hash by which its policy lets this one run and no other."""

    text: Markup
    policy: str


def _script() -> _Script:
    text = resources.files("normscope.report").joinpath("templates/page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return _Script(Markup(text), f"sha256-{digest}")  # noqa: S704 - a file of this package


# --- two checks ---------------------------------------------------------------------------------------------------


def render_comparison(record: Comparison) -> str:
    """The page of two checks; every text is escaped."""
    return environment().get_template("diff.html.j2").render(
        record=record,
        script=_script(),
        verdict=words.compared_verdict(record),
        worse=any(finding.severity != "I" for finding in record.worse),
        scores=words.score_rows(record),
        differences=words.differences(record),
        json=_embedded(to_json(record)),
    )  # fmt: skip


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
    environment.filters["share"] = lambda value: "–" if value is None else words.percent(value)
    environment.filters["interval"] = words.interval
    environment.filters["gain"] = words.gained
    environment.filters["score"] = words.score
    environment.filters["fold"] = words.fold_layers
    environment.filters["severity"] = words.SEVERITY.__getitem__
    environment.filters["layer"] = words.layer
    environment.filters["path"] = lambda path: Markup(".<wbr>").join(path.split("."))  # long paths break behind a dot
    environment.filters["safety"] = words.SAFETY.__getitem__
    environment.filters["taken"] = lambda treatment, applied: (applied, treatment)
    environment.filters["sentence"] = words.sentence
    environment.globals["consequences"] = words.consequences
    environment.globals["share_of"] = words.share
    environment.globals["status"] = words.status
    environment.globals["plural"] = words.plural
    environment.globals["confirmed"] = words.confirmed
    environment.globals["command_of"] = words.command
    return environment
