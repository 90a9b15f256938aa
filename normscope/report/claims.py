"""The ledger of claims as a page and as a document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from normscope.records import Claim, Experiment, Interval, Judgement, LabVerdict, Ledger
from normscope.report import words
from normscope.report.figures import Panel
from normscope.report.html import environment

__all__ = ["VERDICTS", "markdown", "page"]

VERDICTS: tuple[LabVerdict, ...] = (
    "EXACT", "CONFIRMED", "REFUTED", "CONDITIONAL", "UNDECIDED", "RECORD", "open",
)  # fmt: skip
MEANING = {
    "EXACT": "an identity, checked to the precision of the arithmetic",
    "CONFIRMED": "the whole interval lies where the claim says",
    "REFUTED": "the whole interval lies on the other side",
    "CONDITIONAL": "true in one regime and false in another, both named",
    "UNDECIDED": "measured, and the interval spans the threshold",
    "RECORD": "cannot be measured here: the citation is all there is",
    "open": "the experiment has not been run",
}
STYLE = {"EXACT": "agrees", "CONFIRMED": "agrees", "REFUTED": "contradicts"}
SECTIONS = ("000", "001", "002", "003", "004")


@dataclass(frozen=True, slots=True)
class _Block:
    """An experiment with its figure."""

    experiment: Experiment
    caption: str
    svg: Markup | None


def page(ledger: Ledger, pictures: Mapping[str, Panel]) -> str:
    """One self-contained page; every text is escaped, only the pictures' SVG enters as it is.

    Args:
        ledger: The claims and experiments.
        pictures: The figure of each experiment that has one, by name.
    """
    blocks = [_block(e, pictures.get(e.registration.name)) for e in ledger.experiments]
    return environment().get_template("claims.html.j2").render(
        ledger=ledger,
        blocks=blocks,
        counts=[(v, ledger.count(v), MEANING[v], STYLE.get(v, "open")) for v in VERDICTS],
        sections=[(text, [c for c in ledger.claims if c.id.startswith(text)]) for text in SECTIONS],
        style=lambda verdict: STYLE.get(verdict, "open"),
        effect=effect,
        missing=missing,
    )  # fmt: skip


def _block(experiment: Experiment, panel: Panel | None) -> _Block:
    if panel is None:
        return _Block(experiment, "", None)
    return _Block(experiment, panel.caption, Markup(panel.svg))  # noqa: S704 - drawn by us, text escaped there


def effect(interval: Interval | None) -> str:
    """An effect with its interval and unit; "" where there is none."""
    if interval is None:
        return ""
    value = "undetermined" if math.isnan(interval.value) else words.number(interval.value)
    if interval.low != interval.high:
        value += f" ({words.number(interval.low)} to {words.number(interval.high)})"
    return f"{value} {interval.unit}".strip()


def missing(claim: Claim) -> str:
    """Which experiments a verdict still waits for."""
    return f"not run: {', '.join(claim.undone)}" if claim.undone else ""


# --- the document -----------------------------------------------------------------------------------------------------


def markdown(ledger: Ledger, figures: str = "figures") -> str:
    """The same as a document.

    Args:
        ledger: The claims and experiments.
        figures: The folder of the figures, as the document links it.
    """
    return "\n".join(_lines(ledger, figures)) + "\n"


def _lines(ledger: Ledger, figures: str) -> Iterator[str]:
    yield "# Claims about Batch Normalization, and what was measured"
    yield ""
    yield (
        f"Five texts make {len(ledger.claims)} claims. Each is put to experiments whose thresholds were fixed "
        f"before they "
        "ran. This page is written by `normscope lab report` from stored runs; `normscope lab run NAME` repeats them."
    )
    yield ""
    yield "| verdict | claims | meaning |"
    yield "|---|---|---|"
    yield from (f"| {v} | {ledger.count(v)} | {MEANING[v]} |" for v in VERDICTS)
    yield ""
    yield (
        f"{ledger.partial} of these verdicts rest on some of the claim's experiments, the others being open. "
        f"{ledger.tests} tests were made in all; intervals are of 95 %, paired by seed. What was run with a "
        f"small profile "
        "says so. A verdict holds for the data, model and budget named with it."
    )
    yield from _contradictions(ledger)
    yield from _corrections(ledger)
    for text in SECTIONS:
        yield from ("", f"## Text {text}", "", "| claim | verdict | measured |", "|---|---|---|")
        yield from (_row(claim) for claim in ledger.claims if claim.id.startswith(text))
    yield from ("", "## Experiments", "")
    for experiment in ledger.experiments:
        yield from _experiment(experiment, figures)
    yield from ("## Sources", "")
    yield from (f"- {key}: {source}" for key, source in ledger.sources)


def _contradictions(ledger: Ledger) -> Iterator[str]:
    yield from (
        "",
        "## Contradictions",
        "",
        "| | contradiction | state | what decided it, or why it is open |",
        "|---|---|---|---|",
    )
    for c in ledger.contradictions:
        yield f"| {c.code} | {_cell(c.text)} | {c.verdict} | {_cell(c.outcome)} |"


def _corrections(ledger: Ledger) -> Iterator[str]:
    yield from ("", "## Errors of fact", "", "| | what a text says | what is so |", "|---|---|---|")
    for c in ledger.corrections:
        source = f" ({c.source})" if c.source else ""
        yield f"| {c.code} | {', '.join(c.claims)}: {_cell(c.said)} | {_cell(c.fact + source)} |"


def _row(claim: Claim) -> str:
    parts = [f"{name}: {_said(j)}" for name, j in claim.judgements]
    parts += [claim.record] if claim.record else []
    parts += [missing(claim)] if claim.undone else []
    source = f" ({claim.source})" if claim.source else ""
    return f"| **{claim.id}** {_cell(claim.text + source)} | {claim.verdict} | {_cell('; '.join(parts))} |"


def _said(judgement: Judgement) -> str:
    size = effect(judgement.effect)
    return f"{judgement.question} {judgement.verdict}{', ' + size if size else ''}"


def _experiment(experiment: Experiment, figures: str) -> Iterator[str]:
    r = experiment.registration
    yield from (f"### {r.name} {r.title}", "", f"{r.statement} Source: {r.source}.", "")
    yield f"- Confirmed if {r.confirms}; refuted if {r.refutes}."
    thresholds = ", ".join(f"{name} {value:g}" for name, value in r.thresholds)
    yield f"- Thresholds: {thresholds}. Registration `{experiment.digest}`."
    yield f"- {r.design}"
    state = f"{experiment.runs} of {experiment.planned} runs, {words.number(experiment.seconds)} s of computing"
    yield f"- Profile {experiment.profile}: {state}; `{experiment.command}`."
    yield from (f"- **{j.verdict}** {j.question} {j.outcome} ({j.validity})" for j in experiment.judgements)
    if experiment.note:
        yield f"- Note: {experiment.note}"
    if experiment.picture is not None:
        yield from ("", f"![{experiment.picture.caption}]({figures}/{r.name}.svg)")
    yield ""


def _cell(text: str) -> str:
    """Text in a table."""
    return text.replace("|", "\\|").replace("\n", " ")
