"""`check`, `fix`, `diff`, `rule` and `rules`."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normscope.cli.group import FINDINGS, main, progress
from normscope.errors import ArgumentError
from normscope.records import CheckRecord, FixRecord, to_json

if TYPE_CHECKING:
    from normscope.doctor import Report

__all__ = ["Seconds", "check", "codes", "diff", "fix", "rule", "rules"]

# Options that name a function of the user, in the order of the help.
FUNCTIONS = {
    "loss": "loss(output, batch), one number per sample.",
    "metric": "metric(output, batch), higher is better, one number per sample or per batch.",
    "forward": "forward(model, batch); default: the model gets the first element of the batch.",
    "train-step": "train_step(model, batch, optimizer), run three times on a copy.",
    "evaluate": "evaluate(model), your own evaluation: does it change the model?",
    "predict": "predict(model, inputs), the path used in production.",
    "roundtrip": "roundtrip(model), your save and load: does it keep the buffers?",
}
GROUPS = {
    "1": "running statistics",
    "2": "modes and freezing",
    "3": "batch composition",
    "4": "structure",
    "5": "numerics",
    "6": "training loop, several devices",
    "7": "export and porting",
    "8": "cost",
    "9": "the check itself",
}


class Seconds(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Seconds, with or without the unit: 60, 60s."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """A positive number."""
        try:
            seconds = float(str(value).removesuffix("s"))
        except ValueError:
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        if not seconds > 0:
            self.fail("it must be positive", param, ctx)
        return seconds


def _examination(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options that `check` and `fix` share."""
    options = [
        click.argument("model", metavar="MODEL"),
        click.option("--data", required=True, metavar="TARGET", help="The loader, or a function that builds it."),
        click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to load into the model."),
        *(click.option(f"--{name}", metavar="TARGET", help=text) for name, text in FUNCTIONS.items()),
        click.option("--optimizer", metavar="TARGET", help="optimizer(model), builds the optimizer for --train-step."),
        click.option("--reference", metavar="TARGET", help="Another model: the one this one averages or follows."),
        click.option("--select", multiple=True, metavar="CODES", help="Only these rules: NRM1, NRM203,NRM204."),
        click.option("--ignore", multiple=True, metavar="CODES", help="Not these rules."),
        click.option("--intent", multiple=True, help="What is wanted so, e.g. bn-frozen-throughout."),
        click.option("--deployment", metavar="TARGET", help="A second loader: the data on which the model is used."),
        click.option(
            "--config", type=click.Path(path_type=Path), help="pyproject.toml; default: the next one upwards."
        ),
        click.option("--budget", type=Seconds(), default="60", show_default=True, help="Time for the measurements."),
        click.option("--device", help="Where to run: cpu, cuda:0. Default: where the model is."),
        click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True),
        click.option(
            "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as a page, too."
        ),
        click.option("-v", "--verbose", is_flag=True, help="All layers, all evidence, what was not checked."),
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**given)

    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


@main.command(short_help="What is wrong with a model's normalization, and what it costs.")
@_examination
@click.option(
    "--fail-on",
    type=click.Choice(["E", "W", "I", "never"]),
    default="E",
    show_default=True,
    help="Lowest severity that makes the exit code 1.",
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Page or JSON of an earlier check: only what is new fails."
)
def check(
    fail_on: str, form: str, html: Path | None, verbose: bool, baseline: Path | None, **given: Any
) -> None:  # fmt: skip
    r"""Find normalization trouble in MODEL: which layers, why, what it costs, what helps.

    MODEL and every TARGET are package.module:name or path/to/file.py:name. MODEL names a function without arguments
    that returns the model, or the model itself. A TARGET without colon lies where MODEL does. Your code is used as it
    is.

    \b
    normscope check train.py:build_model --data build_loader --metric accuracy

    The model is bit for bit the same afterwards. Without --loss and --metric, class scores with whole-number labels are
    scored by accuracy. Exit code: 0 fine, 1 findings, 2 usage or loading error, 3 internal error.
    """
    from rich.console import Console

    _check_folder(html, "--html")
    known = None if baseline is None else _earlier(baseline, "--baseline")
    report = _examine(given)
    record = _with_command(report.record, "check", given)
    if html is not None:
        from normscope.report.html import render_check

        _write_page(html, render_check(record))
    if form == "json":
        click.echo(to_json(record), nl=False)
    else:
        from normscope.report import terminal

        terminal.print_check(record, Console(width=80), verbose=verbose)
    if fail_on != "never" and not report.passed(fail_on, known):  # type: ignore[arg-type]
        sys.exit(FINDINGS)


@main.command(short_help="Repair a model, and prove the repair on other samples.")
@_examination
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Checkpoint to write.")
@click.option("--rule", "only", multiple=True, metavar="CODES", help="Repair only what these rules find.")
@click.option("--unsafe", is_flag=True, help="Also try remedies that change behaviour (S2).")
@click.option("--dry-run", is_flag=True, help="Measure what a repair would gain, and write nothing.")
def fix(
    out: Path | None, only: tuple[str, ...], unsafe: bool, dry_run: bool, form: str, html: Path | None, verbose: bool,
    **given: Any,
) -> None:  # fmt: skip
    r"""Check MODEL, apply what helps, confirm it on samples that chose nothing, and write a checkpoint.

    \b
    normscope fix train.py:build_model --data build_loader -o fixed.pt

    The checkpoint holds the state_dict and the list of operations; torch.load(path, weights_only=True) reads it, and
    --weights brings it back. The arguments are those of "normscope check". Exit code: 0 nothing to repair, or repaired
    and confirmed; 1 otherwise; 2 and 3 as for check.
    """
    from rich.console import Console

    if out is None and not dry_run:
        raise click.UsageError("name the checkpoint to write with -o PATH, or measure only with --dry-run")
    _check_folder(out, "-o")
    _check_folder(html, "--html")
    report = _examine({**given, "select": (*given["select"], *only)})
    with progress("repairing") as tell:
        result = report.fix(unsafe=unsafe, progress=tell)
    record = _with_command(report.record, "check", given)
    kept = bool(result.applied) and (result.confirmed or result.gain is None)
    if html is not None:
        from normscope.report.html import render_check

        _write_page(html, render_check(record, result.record))
    if form == "json":
        both = {"record": "Repair", "check": json.loads(to_json(record)), "fix": json.loads(to_json(result.record))}
        click.echo(json.dumps(both, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        from normscope.report import terminal

        console = Console(width=80)
        if verbose:
            terminal.print_check(record, console, verbose=True)
        terminal.print_fix(result.record, console, record)
    _save(report, result.record, None if dry_run else out, kept, given, quiet=form == "json")
    if not (kept or (report.passed("E") and not result.applied)):
        sys.exit(FINDINGS)


def _earlier(path: Path, what: str) -> CheckRecord:
    from normscope.report.comparison import read_check

    try:
        return read_check(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path} is no JSON or page of a check: {error}", param_hint=what) from None


def _check_folder(path: Path | None, option: str) -> None:
    """Better now than after a minute of measuring."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}", param_hint=option)


def _save(
    report: Report, record: FixRecord, out: Path | None, kept: bool, given: dict[str, Any], *, quiet: bool
) -> None:
    """Write the checkpoint where something was repaired, and say how to use it."""
    from normscope.doctor import checkpoint

    if out is None or not kept:
        told = (
            "nothing written" if out is None or not record.applied else "nothing written: split C does not confirm it"
        )
        click.echo(told, err=quiet)
        return
    try:
        earlier = () if given["weights"] is None else checkpoint.operations(given["weights"])
        checkpoint.save(report.model, record, out, earlier=earlier)
    except (OSError, RuntimeError) as error:
        raise ArgumentError(f"{out} cannot be written: {error}", cure="name another path with -o") from None
    again = _with_command(report.record, "check", {**given, "weights": out})
    click.echo(f"written: {out}", err=quiet)
    click.echo(f"next: {dict(again.settings)['command']}", err=quiet)


def _examine(given: dict[str, Any]) -> Report:
    """Build what the user named, and check it."""
    from normscope import doctor
    from normscope.cli import load
    from normscope.doctor import configuration

    near = given["model"]
    settings = configuration.project(given["config"])
    with progress("building the model"):
        model = load.build_model(near)
        load.weights(model, given["weights"])
        reference = None if given["reference"] is None else load.build_model(load.beside(given["reference"], near))
        loader = load.build_loader(given["data"], near)
        deployment = None if given["deployment"] is None else load.build_loader(given["deployment"], near)
    functions: dict[str, Any] = {
        name.replace("-", "_"): load.function(given[name.replace("-", "_")], near) for name in FUNCTIONS
    }
    make = load.function(given["optimizer"], near)
    with progress(f"checking, ≤ {given['budget']:g} s") as tell, load.their_code():
        return doctor.check(
            model,
            loader,
            **functions,
            optimizer=None if make is None else make(model),
            reference=reference,
            deployment=deployment,
            **settings.joined(
                {"intent": given["intent"], "select": codes(given["select"]), "ignore": codes(given["ignore"])}
            ),
            budget=given["budget"],
            device=load.describe(given["device"]),
            progress=tell,
        )


def codes(given: tuple[str, ...]) -> list[str] | None:
    """Codes of rules, given one by one or in lists; None for none."""
    return [code.upper() for part in given for code in re.split(r"[,\s]+", part) if code] or None


def _with_command(record: CheckRecord, name: str, given: dict[str, Any]) -> CheckRecord:
    """The record with the command that repeats it, and the names of the user's functions."""
    words = ["normscope", name, given["model"], "--data", given["data"]]
    functions = [option.replace("-", "_") for option in FUNCTIONS]
    named = ["weights", *functions, "optimizer", "reference", "deployment", "config", "device"]
    for option in named:
        if given[option] is not None:
            words += [f"--{option.replace('_', '-')}", str(given[option])]
    for option in ("select", "ignore", "intent"):
        for value in given[option]:
            words += [f"--{option}", value]
    if given["budget"] != 60:
        words += ["--budget", f"{given['budget']:g}"]
    told = tuple((option.replace("_", " "), str(given[option])) for option in named if given[option] is not None)
    return dataclasses.replace(record, settings=(*record.settings, *told, ("command", shlex.join(words))))


def _write_page(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise click.BadParameter(f"cannot write {path}: {error.strerror}", param_hint="--html") from error
    click.echo(f"page: {path}", err=True)


# --- two checks ---------------------------------------------------------------------------------------------------


@main.command(short_help="What is new, gone or changed between two checks.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option(
    "--fail-on",
    type=click.Choice(["E", "W", "I", "never"]),
    default="E",
    show_default=True,
    help="Lowest severity of something new or worse that makes the exit code 1.",
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the comparison as a page, too.")
def diff(before: Path, after: Path, fail_on: str, form: str, html: Path | None) -> None:
    r"""Compare two checks: BEFORE and AFTER are what --html or --format json of "normscope check" wrote.

    \b
    normscope diff monday.html today.html

    A finding that is gone is over only if its rule ran again and passed; otherwise the reason stands beside it. Worse
    is a finding that is more severe, in further layers, or costs more than before by intervals that do not overlap.
    Exit code: 0 nothing new or worse, 1 something, 2 usage or loading error, 3 internal error.
    """
    from rich.console import Console

    from normscope.report.comparison import compare

    _check_folder(html, "--html")
    record = compare(_earlier(before, "BEFORE"), _earlier(after, "AFTER"))
    if html is not None:
        from normscope.report.html import render_comparison

        _write_page(html, render_comparison(record))
    if form == "json":
        click.echo(to_json(record), nl=False)
    else:
        from normscope.report import terminal

        terminal.print_comparison(record, Console(width=80))
    loud = {"E": "E", "W": "EW", "I": "EWI", "never": ""}[fail_on]
    if any(finding.severity in loud for finding in record.worse):
        sys.exit(FINDINGS)


# --- rules --------------------------------------------------------------------------------------------------------


@main.command(short_help="What one rule measures, why, and what helps.")
@click.argument("code", metavar="CODE")
def rule(code: str) -> None:
    """Explain one rule: what it measures, why it hurts, its threshold, its remedies, its false alarms."""
    from normscope.doctor import RULES

    found = RULES.get(code.upper())
    if found is None:
        near = [known for known in sorted(RULES) if known.startswith(code.upper()[:4])]
        raise ArgumentError(f"there is no rule {code}", cure=f"the rules are {', '.join(near or sorted(RULES))}")
    click.echo(click.style(f"{found.code} {found.name}", bold=True))
    for heading, text in sections(found.page):
        if heading:
            click.echo("\n" + click.style(heading, bold=True))
        click.echo(textwrap.fill(text, 80, initial_indent="  " * bool(heading), subsequent_indent="  " * bool(heading)))
    if found.causes:
        click.echo("\n" + click.style("May follow from", bold=True))
        click.echo(textwrap.fill(", ".join(found.causes), 80, initial_indent="  ", subsequent_indent="  "))


@main.command(short_help="All rules in a line each.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def rules(form: str) -> None:
    """List all rules."""
    from normscope.doctor import RULES

    if form == "json":
        listed = [
            {
                "code": r.code,
                "name": r.name,
                "causes": r.causes,
                "intents": r.intents,
                "uses": r.uses,
                "page": dict(sections(r.page)),
            }
            for _, r in sorted(RULES.items())
        ]
        click.echo(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    group = ""
    for code, found in sorted(RULES.items()):
        if code[3] != group:
            group = code[3]
            click.echo(("\n" if code != min(RULES) else "") + click.style(f"{group}xx {GROUPS[group]}", bold=True))
        summary = sections(found.page)[0][1]
        click.echo(f"  {click.style(code, bold=True)} {found.name}")
        click.echo(textwrap.fill(summary, 80, initial_indent=" " * 9, subsequent_indent=" " * 9))
    click.echo('\n"normscope rule CODE" explains one of them.')


def sections(page: str) -> list[tuple[str, str]]:
    """A rule's page as headings and texts; what stands before the first heading has none."""
    parts: list[tuple[str, str]] = [("", "")]
    for line in page.splitlines():
        begins = re.match(r"([A-Z][^:.]{2,24}): (.*)", line)
        if begins:
            parts.append((begins[1], begins[2]))
        else:
            heading, text = parts[-1]
            parts[-1] = (heading, f"{text} {line}".strip())
    return parts
