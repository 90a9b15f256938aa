"""`fold`, and what the commands that edit a model have in common."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import normscope as ns
from normscope.cli.group import main, progress
from normscope.errors import ArgumentError

if TYPE_CHECKING:
    from torch.nn import Module

    from normscope.surgery import Surgery

__all__ = ["Patient", "admitted", "discharge", "edits", "fold", "keep"]


class Patient(NamedTuple):
    """What a command that edits a model starts from.

    Attributes:
        model: The model, its checkpoint loaded.
        loader: Its data.
        forward: The user's forward.
    """

    model: Module
    loader: Any
    forward: Callable[..., Any] | None


def edits(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options that commands which edit a model share."""
    options = [
        click.argument("model", metavar="MODEL"),
        click.option("--data", required=True, metavar="TARGET", help="The loader, or a function that builds it."),
        click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to load into the model."),
        click.option("--forward", metavar="TARGET", help="forward(model, batch); default: the batch's first element."),
        click.option("--select", multiple=True, metavar="PATTERN", help="Only normalizers of these names. Repeat."),
        click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Checkpoint to write."),
        click.option("--device", help="Where to run: cpu, cuda:0. Default: where the model is."),
        click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True),
        click.option("-v", "--verbose", is_flag=True, help="All names, however many."),
    ]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**given)

    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped


def admitted(given: dict[str, Any]) -> Patient:
    """Build what the user named."""
    from normscope.cli import load

    out, near = given["out"], given["model"]
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="-o")
    with progress("building the model"):
        model = load.build_model(near)
        load.weights(model, given["weights"])
        loader = load.build_loader(given["data"], near)
    return Patient(model.to(load.describe(given["device"])), loader, load.function(given["forward"], near))


def keep(model: Module, operation: Mapping[str, Any], weights: Path | None, out: Path) -> None:
    """Write the checkpoint: the operation behind those that the loaded weights had seen."""
    from normscope.doctor import checkpoint

    earlier = () if weights is None else checkpoint.operations(weights)
    try:
        checkpoint.write(model, [*earlier, operation], out)
    except (OSError, RuntimeError) as error:
        raise ArgumentError(f"{out} cannot be written: {error}", cure="name another path with -o") from None


def discharge(surgery: Surgery, given: dict[str, Any]) -> None:
    """Write the checkpoint, with what had been done to the model before, and print the report."""
    from normscope.doctor import checkpoint

    out = given["out"]
    if out is not None:
        keep(surgery.model, checkpoint.noted(surgery), given["weights"], out)
    if given["form"] == "json":
        record = {
            "operation": surgery.operation,
            "changed": surgery.changed,
            "skipped": [{"name": name, "reason": reason} for name, reason in surgery.skipped],
            "notes": surgery.notes,
            "written": None if out is None else str(out),
        }
        click.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    click.echo(surgery.table(sys.maxsize) if given["verbose"] else str(surgery))
    if out is not None:
        click.echo(f"written: {out}")
        click.echo(f"next: normscope.load({given['model'].rpartition(':')[2]}, {str(out)!r})")


@main.command(short_help="Let convolutions and linear layers compute what normalizers do in evaluation.")
@edits
@click.option("--bake", is_flag=True, help="Make parametrized weights plain first.")
@click.option("--onnx", type=click.Path(dir_okay=False, path_type=Path), help="Write the folded model as ONNX, too.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Latency before and after.")
def fold(bake: bool, onnx: Path | None, measure: bool, **given: Any) -> None:
    r"""Fold the normalizers of MODEL that go by running statistics into the layers next to them, for inference.

    \b
    normscope fold train.py:build_model --data build_loader -o folded.pt

    MODEL and every TARGET are package.module:name or path/to/file.py:name, as for "normscope check". The first batch
    must give the same output before and after. The checkpoint holds the state_dict and the list of operations:
    normscope.load(build_model, "folded.pt") does them again. Exit code: 0 done, what cannot be folded included; 2 usage
    or loading error, or the outputs differ; 3 internal error.
    """
    from normscope.cli import load

    model, loader, forward = admitted(given)
    with progress("folding"), load.their_code():
        example = next(iter(loader), None)
        if example is None:
            raise ArgumentError(f"{given['data']} yields no batch", cure="fold compares outputs on one")
        surgery = ns.fold(
            model.eval(),
            example,
            forward=forward,
            select=given["select"] or None,
            bake=bake,
            measure=measure,
            onnx=onnx,
        )
    discharge(surgery, given)
