"""The group of all commands: exit codes, messages, progress."""

from __future__ import annotations

import io
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import click

import normscope as ns
from normscope.errors import NormscopeError

__all__ = ["FINDINGS", "INTERNAL_ERROR", "USAGE_ERROR", "main", "progress"]

FINDINGS, USAGE_ERROR, INTERNAL_ERROR, INTERRUPTED = 1, 2, 3, 130


class _Group(click.Group):
    """A group whose commands end with our exit codes instead of a traceback for what the user can mend."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NormscopeError as error:
            click.echo(f"{_their_traceback(error)}error: {error}", err=True)
            ctx.exit(getattr(error, "exit_code", USAGE_ERROR))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            click.echo(f"internal error in normscope {ns.__version__}:\n{traceback.format_exc()}", err=True)
            ctx.exit(INTERNAL_ERROR)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        r"""Read `\b`, which keeps the lines of an example apart: docstrings are raw."""
        cmd.help = (cmd.help or "").replace("\\b\n", "\b\n")
        super().add_command(cmd, name)

    def list_commands(self, _: click.Context) -> list[str]:
        """In the order of use instead of the alphabet."""
        return list(self.commands)


def _their_traceback(error: NormscopeError) -> str:
    """Where the user's own code raised what this error is about, without our frames; "" if it did not."""
    cause = error.__cause__
    if cause is None:
        return ""
    ours = (str(Path(ns.__file__).parent), sysconfig.get_path("stdlib"), "<frozen importlib")
    shown = traceback.TracebackException.from_exception(cause)
    frames = [f for f in shown.stack if not f.filename.startswith(ours)]
    theirs = [f for f in frames if "site-packages" not in f.filename]
    if not theirs and not isinstance(cause, SyntaxError):
        return ""
    # Between their functions lie those of torch; the innermost one may tell more than theirs.
    shown.stack[:] = theirs + [f for f in frames[-1:] if f not in theirs]
    shown.__cause__ = shown.__context__ = None
    return "".join(shown.format(chain=False))


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

    Start with "normscope demo": what Batch Normalization does to a small network, what goes wrong with it, and how that
    is found and mended. Then "normscope check" on a model of yours.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII still gets the numbers


@contextmanager
def progress(title: str, *, still: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, silent where stderr is no terminal; yields `tell(done, total, what)`.

    Time spent, and time left as soon as the total is known, that is, not 0. A still bar is drawn when it is told
    something only: the thread that redraws the others takes time from what is being measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<44}"), BarColumn(12), TimeElapsedColumn(),
        TimeRemainingColumn(compact=True), TextColumn("{task.fields[left]}"),
    )  # fmt: skip

    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown, auto_refresh=not still) as bar:
        task = bar.add_task(title, total=None, left="")

        def tell(done: int, total: int, what: str) -> None:
            left = "left" if total else ""
            bar.update(task, completed=done, total=total or None, description=what, left=left, refresh=still)

        yield tell
