"""`demo` and `backends`."""

from __future__ import annotations

from pathlib import Path

import click

import normscope as ns
from normscope.cli.group import main, progress

__all__ = ["backends", "demo"]


@main.command(short_help="What Batch Normalization does, and how it breaks, in a minute.")
@click.option("--quick", is_flag=True, help="Fewer steps and learning rates, auto means digits: under 20 seconds.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("normscope-demo"),
    show_default=True,
    help="Folder for the figure, the page and the numbers; created if absent.",
)
@click.option(
    "--data",
    "data_name",
    type=click.Choice(["auto", "digits", "mnist"]),
    default="auto",
    show_default=True,
    help="digits are built in; mnist is read from $NORMSCOPE_DATA; auto is mnist where present, else digits.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights and batches.")
def demo(quick: bool, out: Path, data_name: str, seed: int) -> None:
    """Measure what Batch Normalization does, break it, find the trouble and mend it.

    First half: figure 1 of the Batch Normalization paper, measured on this machine. A sigmoid network learns
    handwritten digits with and without Batch Normalization, at every learning rate shown. Second half: a small
    convolutional network is broken in two ways that many projects have met; "check" finds each, "fix" repairs it.

    Writes index.html, the figure as figure1.png and figure1.svg, a report per broken network, and all numbers as JSON.
    """
    from rich.console import Console

    from normscope import data
    from normscope.lab import clinic, figure1
    from normscope.lab.figure1_judge import lessons
    from normscope.records import to_json
    from normscope.report import figures, html, terminal

    figures.require_matplotlib()  # now rather than after a minute of training
    samples = data.load("digits" if quick and data_name == "auto" else data_name)
    _make_folder(out)
    command = f"normscope demo{' --quick' if quick else ''} --data {samples.name} --seed {seed}"
    settings = figure1.Settings.quick(seed) if quick else figure1.Settings(seed=seed)
    ward = clinic.Settings.quick(seed) if quick else clinic.Settings(seed=seed)
    with progress("training") as on_step:
        record = figure1.run(samples, settings, command=command, on_step=on_step)
        second = clinic.run(samples, ward, on_step=on_step)
    links = [f"patient{k}.html" for k in range(1, len(second.patients) + 1)]
    figures.save_figure1(record, out)
    pages = {"index.html": html.figure1_page(record, figures.figure1_panels(record), second, links)}
    pages |= {link: html.render_check(p.check, p.fix) for link, p in zip(links, second.patients, strict=True)}
    for name, text in (pages | {"results.json": to_json(record), "clinic.json": to_json(second)}).items():
        (out / name).write_text(text, encoding="utf-8")
    console = Console()
    terminal.print_figure1(record, console)
    click.echo()
    terminal.print_clinic(second, console)
    click.echo()
    terminal.print_lessons((*lessons(record.runs), *second.lessons), console)
    click.echo(f"\n{record.seconds + second.seconds:.1f} seconds. Open {out / 'index.html'}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot create {folder}: {error.strerror}", param_hint="--out") from error


@main.command(short_help="Which kernels run here, and why the others do not.")
def backends() -> None:
    """Show which kernels can run on this machine, and why the others cannot."""
    click.echo(str(ns.backends()))
