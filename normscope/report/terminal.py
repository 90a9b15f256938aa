"""Records as text for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normscope.records import Figure1, Interval

__all__ = ["print_figure1"]

VERDICT_STYLE = {"agrees": "bold green", "contradicts": "bold red", "open": "bold yellow"}


def print_figure1(record: Figure1, console: Console) -> None:
    """Final accuracies in a table, then each claim with what was measured."""
    console.print(Text(f"Figure 1 of the Batch Normalization paper, measured on {record.data.title}", style="bold"))
    console.print(_accuracies(record))
    findings = Table.grid(padding=(0, 2), pad_edge=False)
    findings.add_column(no_wrap=True)
    findings.add_column(ratio=1)
    for statement in record.statements:
        text = Text.assemble((statement.claim, "bold"), " ", statement.outcome)
        findings.add_row(Text(statement.verdict, style=VERDICT_STYLE[statement.verdict]), text)
    console.print(findings)
    console.print(Text(record.caveat, style="dim"))


def _accuracies(record: Figure1) -> Table:
    caption = f"Test accuracy with its 95% interval; steps: the first measured one at {100 * record.target:.1f}%."
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("learning rate", justify="right", no_wrap=True)
    for name in ("without BN", "with BN"):
        table.add_column(name, justify="right")
        table.add_column("steps", justify="right")
    for rate in record.rates:
        cells = [f"{rate:g}"]
        for normalized in (False, True):
            run = record.run(rate, normalized=normalized)
            steps = run.accuracy.first_reaching(record.target)
            cells += [_accuracy(run.final), "never" if steps is None else f"{steps:,}"]
        table.add_row(*cells)
    return table


def _accuracy(interval: Interval) -> str:
    return f"{100 * interval.value:.1f}% ({100 * interval.low:.1f} – {100 * interval.high:.1f})"
