"""Records as one self-contained page: no scripts, no network, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from normscope.records import Figure1, Interval
from normscope.report.figures import Panel

__all__ = ["figure1_page"]


@dataclass(frozen=True, slots=True)
class _Row:
    rate: str
    without: Interval
    having: Interval
    steps_without: int | None
    steps_having: int | None


def figure1_page(record: Figure1, panels: Sequence[Panel]) -> str:
    """The page of `normscope demo`; text is escaped, only the panels' SVG enters as it is."""
    pictures = [(panel.caption, Markup(panel.svg)) for panel in panels]  # noqa: S704 - drawn by us, text escaped there
    count = len(record.rates)
    return _environment().get_template("figure1.html.j2").render(
        record=record,
        accuracy=pictures[:count],
        bands=pictures[count:],
        rows=[_row(record, rate) for rate in record.rates],
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


def _environment() -> jinja2.Environment:
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
    return environment
