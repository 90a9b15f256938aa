"""The ledger of claims as a page and as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from normscope.records import (
    Cell,
    Claim,
    Contradiction,
    Experiment,
    Judgement,
    LabVerdict,
    Ledger,
    Row,
    Table,
)
from normscope.report import advice, words
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
MARKS = "Bold: the best; ≈: not separable from it, by differences paired by seed, their intervals holding together."
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
        effect=words.effect,
        judged=words.judged,
        signs=advice.SIGNS,
        confidence=advice.confidence,
        evidence=advice.evidence,
        missing=missing,
        minutes=ledger.minutes,
        duration=duration,
        decided=decided,
        cell=cell,
        marks=MARKS,
    )  # fmt: skip


def _block(experiment: Experiment, panel: Panel | None) -> _Block:
    if panel is None:
        return _Block(experiment, "", None)
    return _Block(experiment, panel.caption, Markup(panel.svg))  # noqa: S704 - drawn by us, text escaped there


def duration(minutes: float) -> str:
    """Minutes of computing, to a tenth."""
    return f"{minutes:,.1f}" if minutes >= 0.05 else "< 0.1"


def decided(contradiction: Contradiction) -> list[str]:
    """What the experiments said about the claims of a contradiction, or why it is open, in sentences."""
    parts = [
        f"{name} on {', '.join(claims)}: {_said(judgement)}." for name, claims, judgement in contradiction.judgements
    ]
    if contradiction.undone:
        parts.append(f"Not run: {', '.join(contradiction.undone)}.")
    elif contradiction.verdict == "open":
        parts.append(f"{' and '.join(contradiction.experiments)} could not decide at this size.")
    return parts


def cell(row: Row, found: Cell | None) -> tuple[str, str]:
    """A number of a table, with ≈ where it cannot be told from the best of the row, and its interval."""
    if found is None:
        return "–", ""
    value, low, high = (f"{v:.{row.digits}f}" for v in (found.value.value, found.value.low, found.value.high))
    return f"{'≈ ' if found.mark == 'not separable' else ''}{value}", f"({low} to {high})"


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
        f"{ledger.tests} tests were made in all; intervals are of 95 %, paired by seed; minutes are of computing, in "
        "all experiments behind a verdict. What was run with a small profile says so. A verdict holds for the data, "
        "model and budget named with it."
    )
    yield from _contradictions(ledger)
    yield from _corrections(ledger)
    for text in SECTIONS:
        yield from ("", f"## Text {text}", "", "| claim | verdict | measured | minutes |", "|---|---|---|---:|")
        yield from (_row(claim, ledger.minutes(claim)) for claim in ledger.claims if claim.id.startswith(text))
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
        yield f"| {c.code} | {words.in_cell(c.text)} | {c.verdict} | {words.in_cell(' '.join(decided(c)))} |"


def _corrections(ledger: Ledger) -> Iterator[str]:
    yield from ("", "## Errors of fact", "", "| | what a text says | what is so |", "|---|---|---|")
    for c in ledger.corrections:
        source = f" ({c.source})" if c.source else ""
        yield f"| {c.code} | {', '.join(c.claims)}: {words.in_cell(c.said)} | {words.in_cell(c.fact + source)} |"


def _row(claim: Claim, minutes: float) -> str:
    parts = [f"{name}: {_said(j)}" for name, j in claim.judgements]
    parts += [claim.record] if claim.record else []
    parts += [missing(claim)] if claim.undone else []
    source = f" ({claim.source})" if claim.source else ""
    spent = duration(minutes) if claim.judgements else ""
    cells = (f"**{claim.id}** {claim.text}{source}", claim.verdict, "; ".join(parts), spent)
    return f"| {' | '.join(map(words.in_cell, cells))} |"


def _said(judgement: Judgement) -> str:
    return f"{judgement.question} {words.judged(judgement)}"


def _experiment(experiment: Experiment, figures: str) -> Iterator[str]:
    r = experiment.registration
    yield from (f"### {r.name} {r.title}", "", f"{r.statement} Source: {r.source}.", "")
    yield f"- Confirmed if {r.confirms}; refuted if {r.refutes}."
    thresholds = ", ".join(f"{name} {value:g}" for name, value in r.thresholds)
    yield f"- Thresholds: {thresholds}. Registration `{experiment.digest}`."
    yield f"- {r.design}"
    state = f"{experiment.runs:,} of {words.plural(experiment.planned, 'run')}"
    spent = f"{duration(experiment.seconds / 60)} minutes of computing"
    yield f"- Profile {experiment.profile}: {state}, {spent}; `{experiment.command}`."
    yield from (f"- **{j.verdict}** {j.question} {j.outcome} ({j.validity})" for j in experiment.judgements)
    if experiment.note:
        yield f"- Note: {experiment.note}"
    for table in experiment.tables:
        yield from _table(table)
    if experiment.picture is not None:
        yield from ("", f"![{experiment.picture.caption}]({figures}/{r.name}.svg)")
    yield ""


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"{table.caption} {MARKS}", "")
    yield f"| | {' | '.join(table.columns)} |"
    yield f"|---|{'---:|' * len(table.columns)}"
    for row in table.rows:
        told = [" ".join(cell(row, one)).strip() for one in row.cells]
        strong = [
            f"**{text}**" if one and one.mark == "best" else text for one, text in zip(row.cells, told, strict=True)
        ]
        yield f"| {row.name} [{row.unit}] | {' | '.join(strong)} |"
