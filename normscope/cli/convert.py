"""`convert`."""

from __future__ import annotations

from pathlib import Path

import click

from normscope import convert as convert_model
from normscope.cli.group import FINDINGS, main, progress
from normscope.cli.surgery import keep
from normscope.errors import ArgumentError

__all__ = ["convert"]


class _Rule(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A class, family or module pattern, and what takes its place."""

    name = "FROM=TO"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | None]:
        """Split at the first equals sign."""
        key, sign, target = value.partition("=")
        if not (sign and key and target):
            self.fail(f"{value!r} is no rule; write BatchNorm=GroupNorm(32)", param, ctx)
        return key.strip(), None if target.strip() == "None" else target.strip()


@main.command(short_help="Replace a model's normalizers by others.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--rule", "rules", type=_Rule(), multiple=True, required=True, help="What becomes what; the first that fits."
)
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to load into the model.")
@click.option("--data", metavar="TARGET", help="The loader, or a function that builds it, for the calibration.")
@click.option("--held", metavar="TARGET", help="Other data, on which the calibration is judged.")
@click.option(
    "--within", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True,
    help="How far moments may be off there; beyond it nothing is written.",
)  # fmt: skip
@click.option(
    "--batches", type=click.IntRange(1), default=8, show_default=True, help="How many batches of a loader to use."
)
@click.option("--nearest", is_flag=True, help="Take the nearest number of groups where one does not fit.")
@click.option("--forward", metavar="TARGET", help="forward(model, batch); default: the first element of the batch.")
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Checkpoint to write."
)
def convert(
    model: str, rules: tuple[tuple[str, str | None], ...], weights: Path | None, data: str | None, held: str | None,
    within: float, batches: int, nearest: bool, forward: str | None, out: Path,
) -> None:  # fmt: skip
    r"""Replace normalizers of MODEL by rule, calibrate them on data, and write a checkpoint.

    \b
    normscope convert train.py:build_model --rule "BatchNorm=GroupNorm(32)" --data build_loader -o gn.pt

    A rule's left side is a class, a family or a pattern for module names, its right side a layer of normscope.nn
    without its number of channels, or None. The checkpoint holds the state_dict and the list of operations;
    torch.load(path, weights_only=True) reads it, and ns.load(build_model, path) builds the converted model. Exit code:
    0 all that the rules name is converted, 1 some of it is not, and nothing is written if nothing is; 2 and 3 as for
    check.
    """
    from normscope.cli import load

    if not out.parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="-o")
    with progress("building the model"):
        built = load.build_model(model)
        load.weights(built, weights)
        loader, other = (None if target is None else load.build_loader(target, model) for target in (data, held))
    with progress("converting"), load.their_code():
        report = convert_model(
            built, rules, calibrate=loader, held=other, within=within, batches=batches, nearest=nearest,
            forward=load.function(forward, model),
        )  # fmt: skip
    if report.model is not built:
        raise ArgumentError("the model is a normalizer itself", cure="name a model that has normalizers in it")
    click.echo(str(report))
    if report.changed:
        layers = report.details["layers"]
        operation = {
            "code": "convert",
            "text": ", ".join(f"{key} → {target}" for key, target in rules),
            "affine": loader is not None,
            "layers": list(layers),
            "to": [text for text, _ in layers.values()],
            "shapes": [list(shape) for _, shapes in layers.values() for shape in shapes or ((),)],
        }
        keep(report.model, operation, weights, out)
        click.echo(f"written: {out}")
    if report.skipped or not report.changed:
        raise click.exceptions.Exit(FINDINGS)
