"""`bench`."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normscope.cli.group import main, progress
from normscope.records import Benchmark, to_json

if TYPE_CHECKING:
    from normscope.bench import Settings

__all__ = ["bench"]


@main.command(short_help="How fast it is here, against eager torch and against copying the tensor.")
@click.option("--quick", is_flag=True, help="Ten cases in a minute; nothing compiled, no architectures.")
@click.option(
    "--select",
    multiple=True,
    metavar="PATTERN",
    help='Only what is named like this, e.g. "GN*bf16*", "ResNet". Repeat.',
)
@click.option("--architectures/--no-architectures", default=None, help="Whole models, too. Default: unless --quick.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of torch. Default: what torch chooses.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for bench.txt, bench.json and bench.svg; created if absent.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def bench(
    quick: bool, select: tuple[str, ...], architectures: bool | None, device: str, threads: int | None,
    output: Path | None, form: str,
) -> None:  # fmt: skip
    r"""Time every normalizer with a ReLU behind it, forward + backward, and compare.

    \b
    normscope bench --quick
    normscope bench --select "GN*bf16*"

    The floor is what copying costs: x.clone() forward, x + g backward, timed in the same loop. Results are compared
    with float64 before anything is timed. A full run takes up to 15 minutes; nothing else should run meanwhile.
    """
    from rich.console import Console

    from normscope.bench import FULL_SECONDS, QUICK_SECONDS, Settings, run
    from normscope.report import benchmarks

    if output is not None:
        _make_folder(output)
    if architectures is None:
        architectures = not quick
    seconds = QUICK_SECONDS if quick else FULL_SECONDS
    settings = Settings(select, quick, architectures, device, threads, seconds)
    with progress("timing", still=True) as tell:
        record = run(settings, command=_command(settings), tell=tell)
    if output is not None:
        _write(record, output)
    if form == "json":
        click.echo(to_json(record), nl=False)
    else:
        benchmarks.print_benchmark(record, Console(width=benchmarks.WIDTH))


def _command(settings: Settings) -> str:
    """How to repeat the run."""
    words = ["normscope", "bench", *["--quick"] * settings.quick]
    for pattern in settings.patterns:
        words += ["--select", pattern]
    if settings.architectures == settings.quick:
        words.append("--architectures" if settings.architectures else "--no-architectures")
    words += ["--device", settings.device] if settings.device != "cpu" else []
    words += ["--threads", str(settings.threads)] if settings.threads is not None else []
    return shlex.join(words)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot create {folder}: {error.strerror}", param_hint="--output") from error


def _write(record: Benchmark, folder: Path) -> None:
    from rich.console import Console

    from normscope.report import benchmarks

    table = io.StringIO()
    benchmarks.print_benchmark(record, Console(file=table, width=benchmarks.WIDTH))
    picture = benchmarks.draw_benchmark(record)
    for name, text in (("bench.txt", table.getvalue()), ("bench.json", to_json(record)), ("bench.svg", picture)):
        (folder / name).write_text(text, encoding="utf-8")
    click.echo(f"written: {', '.join(str(folder / f'bench.{end}') for end in ('txt', 'json', 'svg'))}", err=True)
