"""The command line: arguments in, exit code out.

Exit codes: 0 fine, 1 findings, 2 usage or loading error, 3 internal error. Results go to stdout, progress and errors to
stderr.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import normscope as ns
from normscope.errors import NormscopeError

__all__ = ["main"]

USAGE_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 3, 130


class _Group(click.Group):
    """A group whose commands end with our exit codes instead of a traceback for what the user can mend."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NormscopeError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(USAGE_ERROR)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            click.echo(f"internal error in normscope {ns.__version__}:\n{traceback.format_exc()}", err=True)
            ctx.exit(INTERNAL_ERROR)


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"normscope {ns.__version__} (torch {metadata.version('torch')}, Python {sys.version.split()[0]})")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print the versions of normscope, torch and Python.",
)
def main() -> None:
    """Normalization for PyTorch as one idea.

    Start with "normscope demo": what Batch Normalization does to a small network, on real data, in a minute.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII still gets the numbers


@main.command(short_help="Which kernels run here, and why the others do not.")
def backends() -> None:
    """Show which kernels can run on this machine, and why the others cannot."""
    click.echo(str(ns.backends()))


@main.command(short_help="What Batch Normalization does, measured in a minute.")
@click.option("--quick", is_flag=True, help="Fewer steps and learning rates, auto means digits: under ten seconds.")
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
    """Measure figure 1 of the Batch Normalization paper on this machine.

    Trains a sigmoid network on handwritten digits with and without Batch Normalization, at every learning rate shown,
    and writes figure1.png, figure1.svg, index.html and results.json.
    """
    from rich.console import Console

    from normscope import data
    from normscope.lab import figure1
    from normscope.records import to_json
    from normscope.report import figures, html, terminal

    figures.require_matplotlib()  # now rather than after a minute of training
    samples = data.load("digits" if quick and data_name == "auto" else data_name)
    settings = figure1.Settings.quick(seed) if quick else figure1.Settings(seed=seed)
    _make_folder(out)
    command = f"normscope demo{' --quick' if quick else ''} --data {samples.name} --seed {seed}"
    with _progress("training") as on_step:
        record = figure1.run(samples, settings, command=command, on_step=on_step)
    figures.save_figure1(record, out)
    (out / "index.html").write_text(html.figure1_page(record, figures.figure1_panels(record)), encoding="utf-8")
    (out / "results.json").write_text(to_json(record), encoding="utf-8")
    terminal.print_figure1(record, Console())
    click.echo(f"\n{record.seconds:.1f} seconds. Open {out / 'index.html'}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"cannot create {folder}: {error.strerror}", param_hint="--out") from error


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, silent where stderr is no terminal; yields `tell(done, total, what)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
