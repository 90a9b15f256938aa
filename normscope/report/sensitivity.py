"""The record of a self-test as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from normscope.records import SelfTest, Sensitivity, Trial
from normscope.report import words
from normscope.report.terminal import ASCII

__all__ = ["lines", "print_selftest", "row"]

WIDTH = 80
STYLE = {
    "seen": "green", "no-cost": "green", "not-seen": "bold red", "masked": "yellow", "not-tried": "yellow",
    "not-applicable": "dim",
}  # fmt: skip


def print_selftest(record: SelfTest, console: Console) -> None:
    """The table of defects, coloured where the terminal can."""
    plain = not console.encoding.lower().startswith("utf")
    styles = {_head(found): STYLE[found.status] for found in record.sensitivities}
    for line in lines(record):
        shown = Text(line.translate(ASCII) if plain else line, style=styles.get(line, ""))
        console.print(shown, soft_wrap=True, highlight=False)


def lines(record: SelfTest) -> Iterator[str]:
    """What was tried, how small a defect was seen, what that one costs, and what was missed."""
    norms = ", ".join(f"{count} {kind}" for kind, count in record.norms) or "no normalizers"
    price = f"{record.checks} checks of {record.per_check:.2g} s"
    yield f"selftest   {record.model} ({norms})   {words.plural(record.samples, 'sample')}   {price}"
    yield f"known defects in a copy; those of one layer in {record.layer or 'none'}; model restored: yes"
    for note in record.notes:
        yield from textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="  ")
    yield ""
    for found in record.sensitivities:
        yield _head(found)
        yield from (f"    {line}" for line in _body(found))
    yield ""
    known = ", ".join(f"{f.severity} {f.code}" for f in record.control) or "nothing"
    yield from textwrap.wrap(f"control, the untouched copy: {known}", WIDTH, subsequent_indent="  ")
    counts = {name: sum(s.status == name for s in record.sensitivities) for name in STYLE}
    yield "   ".join(f"{name.replace('-', ' ')} {count}" for name, count in counts.items() if count)
    if not record.settled:
        yield f"the budget of {record.budget:g} s ended the search; a larger one finds smaller sizes"


def _head(found: Sensitivity) -> str:
    if found.status != "seen" or found.seen is None:
        return f"{found.defect:17}{found.status.replace('-', ' ')}"
    size = f"from {_size(found, found.seen)}" if found.unit else "seen"
    return f"{found.defect:17}{size:32}{found.seen.severity} {', '.join(_at_work(found, found.seen))}".rstrip()


def row(found: Sensitivity) -> tuple[str, str, str, str, str, str]:
    """A defect as cells: name, what is wrong, smallest size seen, rules, its cost, largest size missed."""
    if found.seen is None:
        return found.defect, found.text, found.status.replace("-", " "), "", "", found.reason
    size = f"from {_size(found, found.seen)}" if found.unit else "yes"
    cost = "" if found.seen.cost is None else words.interval(found.seen.cost)
    missed = "" if found.missed is None else _size(found, found.missed)
    return found.defect, found.text, size, ", ".join(_at_work(found, found.seen)), cost, missed


def _at_work(found: Sensitivity, trial: Trial) -> list[str]:
    """The rules that were to see it and did; others may have spoken, too."""
    return [code for code in trial.codes if code in found.rules]


def _size(found: Sensitivity, trial: Trial) -> str:
    number = f"{trial.size:g}"
    return f"{found.unit} {number}" if found.unit == "×" else f"{number} {found.unit}"


def _body(found: Sensitivity) -> list[str]:
    text = [found.text]
    if found.seen is None:
        text.append(found.reason)
    elif found.seen.cost is not None:
        text.append(f"costs {words.interval(found.seen.cost)}")
    if found.missed is not None and found.seen is not None:
        cost = "" if found.missed.cost is None else f", which costs {words.interval(found.missed.cost)}"
        text.append(f"missed: {_size(found, found.missed)}{cost}")
    return textwrap.wrap("; ".join(text), WIDTH - 4)
