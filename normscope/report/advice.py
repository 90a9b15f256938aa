"""Practical advice as a document: every sentence beside what was measured."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping

from normscope.records import Advice, Judgement, Ledger, Point
from normscope.report import words

__all__ = ["SIGNS", "confidence", "evidence", "markdown"]

SIGNS: Mapping[str, str] = {"for": "✓", "against": "✗", "note": "·", "unknown": "?"}
KEPT = ("Ll", "Lo", "Lm", "Mn", "Nd")
# What the calls of the page are made with.
SETTING = """\
>>> import torch, normscope as ns
>>> def network():
...     return torch.nn.Sequential(
...         torch.nn.Conv2d(3, 64, 3),
...         torch.nn.BatchNorm2d(64),
...         torch.nn.ReLU(),
...         torch.nn.AdaptiveAvgPool2d(1),
...         torch.nn.Flatten(),
...         torch.nn.Linear(64, 10),
...     )
>>> images = torch.randn(64, 3, 9, 9) + 3 * torch.randn(64, 3, 1, 1)
>>> loader = [images[:32], images[32:]]
"""


def confidence(advice: Advice) -> str:
    """How sure an advice is by what was measured here, in words."""
    stances = {point.stance for point in advice.points}
    part = ", in part" if "unknown" in stances else ""
    if {"for", "against"} <= stances:
        return f"measured both ways{part}"
    if "against" in stances:
        return f"what we measured speaks against it{part}"
    if "for" in stances:
        return f"measured here{part}"
    unsure = [point for point in advice.points if point.stance == "unknown"]
    if advice.points and not unsure:
        return "measured here, to be weighed"
    return "not decided here" if any(point.judgement for point in unsure) else "not measured here"


def evidence(judgement: Judgement) -> str:
    """Verdict, effect, seeds, and where it holds."""
    return f"{words.judged(judgement)}; {judgement.validity}"


def markdown(ledger: Ledger, claims: str = "claims.md") -> str:
    """The page of advice.

    Args:
        ledger: With the advice.
        claims: The document of the claims, as this one links it.
    """
    return "\n".join(_lines(ledger, claims)) + "\n"


def _lines(ledger: Ledger, claims: str) -> Iterator[str]:
    points = [point for one in ledger.advice for point in one.points]
    unrun = sum(point.judgement is None for point in points)
    unsure = sum(point.stance == "unknown" for point in points) - unrun
    titles = {e.registration.name: e.registration.title for e in ledger.experiments}
    links = {name: f"{claims}#{_slug(f'{name} {title}')}" for name, title in titles.items()}
    yield "# Which normalizer, in which situation"
    yield ""
    yield (
        "This page is written by `normscope lab report`. The sentences in its tables are chosen by the verdicts of "
        f"stored runs: of {len(points)}, {len(points) - unrun - unsure} are decided, {unsure} are measured and not "
        f"decided, {unrun} are not run. The networks are small and trained for minutes; what others published at full "
        "size stands beside them, and counts for more where your network is large."
    )
    yield ""
    yield (
        "✓ speaks for the advice, ✗ against it, · is to be weighed, ? is not known. Intervals are of 95 %, paired by "
        f"seed; figures and designs are in [the ledger]({claims})."
    )
    yield from ("", "| situation | advice | how sure |", "|---|---|---|")
    for one in ledger.advice:
        yield f"| [{one.situation}](#{_slug(one.situation)}) | {one.use} | {confidence(one)} |"
    yield from ("", "The calls below are run with this network and these images:", "", "```pycon")
    yield SETTING
    yield "```"
    notes = {e.registration.name: e.note for e in ledger.experiments if e.note}
    for one in ledger.advice:
        yield from _situation(one, links, notes)
    cited = {key for one in ledger.advice for key in re.findall(r"[A-Z]{2,3}\d{0,2}", one.published)}
    yield from ("", "## Sources", "")
    yield from (f"- {key}: {source}" for key, source in ledger.sources if key in cited)


def _situation(advice: Advice, links: Mapping[str, str], notes: Mapping[str, str]) -> Iterator[str]:
    yield from ("", f"## {advice.situation}", "", f"{advice.use} **How sure:** {confidence(advice)}.", "", "```pycon")
    yield from (f">>> {line}" for line in advice.call)
    yield from ("", "```", "", f"**Cost:** {advice.cost}")
    if advice.published:
        yield from ("", f"**Published:** {advice.published}")
    yield from ("", "| | measured here | evidence |", "|---|---|---|")
    yield from (
        f"| {SIGNS[point.stance]} | {words.in_cell(point.text)} | {_evidence(point, links)} |"
        for point in advice.points
    )
    for name in dict.fromkeys(point.experiment for point in advice.points if point.experiment in notes):
        yield from ("", f"**On {name}:** {notes[name]}")


def _evidence(point: Point, links: Mapping[str, str]) -> str:
    if point.judgement is None:
        return f"{point.experiment} is not run"
    return f"[{point.experiment}]({links[point.experiment]}): {words.in_cell(evidence(point.judgement))}"


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading: letters, decimal digits, - and _ are kept; γ is one, ₀ is not."""
    kept = (c for c in heading.lower() if c in "-_ " or unicodedata.category(c) in KEPT)
    return "".join(kept).replace(" ", "-")
