"""`selftest`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from normscope.cli.doctor import Seconds, codes
from normscope.cli.group import FINDINGS, main, progress
from normscope.records import to_json

__all__ = ["selftest"]


@main.command(short_help="How small a defect the doctor would see in your own model.")
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="TARGET", help="The loader, or a function that builds it.")
@click.option("--weights", type=click.Path(path_type=Path), help="Checkpoint to load into the model.")
@click.option("--loss", metavar="TARGET", help="loss(output, batch), one number per sample.")
@click.option("--metric", metavar="TARGET", help="metric(output, batch), higher is better.")
@click.option("--forward", metavar="TARGET", help="forward(model, batch).")
@click.option("--defect", "defects", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--layer", metavar="PATH", help="Where defects of one layer go; default: the middle normalizer.")
@click.option("--select", multiple=True, metavar="CODES", help="Only these rules, as for check.")
@click.option("--ignore", multiple=True, metavar="CODES", help="Not these rules, as for check.")
@click.option("--intent", multiple=True, help="What is wanted so, as for check.")
@click.option("--config", type=click.Path(path_type=Path), help="pyproject.toml; default: the next one upwards.")
@click.option("--budget", type=Seconds(), default="300", show_default=True, help="Time for all of it.")
@click.option("--check-budget", type=Seconds(), default="60", show_default=True, help="Time for one check.")
@click.option("--device", help="Where to run: cpu, cuda:0. Default: where the model is.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def selftest(form: str, **given: Any) -> None:
    r"""Put known defects into a copy of MODEL and find the smallest of each that "normscope check" sees.

    \b
    normscope selftest train.py:build_model --data build_loader --metric accuracy

    MODEL and every TARGET are named as for "normscope check". The model itself stays bit for bit as it was, and the
    untouched copy is the control. Exit code: 0 every defect that could be put in was seen, 1 one was not even at its
    largest size, 2 usage or loading error, 3 internal error or model not restored.
    """
    from rich.console import Console

    from normscope import doctor
    from normscope.cli import load
    from normscope.doctor import configuration
    from normscope.report import sensitivity

    near = given["model"]
    settings = configuration.project(given["config"])
    with progress("building the model"):
        model = load.build_model(near)
        load.weights(model, given["weights"])
        loader = load.build_loader(given["data"], near)
    functions: dict[str, Any] = {name: load.function(given[name], near) for name in ("loss", "metric", "forward")}
    with progress(f"self-test, ≤ {given['budget']:g} s") as tell, load.their_code():
        report = doctor.selftest(
            model,
            loader,
            **functions,
            **settings.joined(
                {"intent": given["intent"], "select": codes(given["select"]), "ignore": codes(given["ignore"])}
            ),
            defects=given["defects"] or None,
            layer=given["layer"],
            budget=given["budget"],
            check_budget=given["check_budget"],
            device=load.describe(given["device"]),
            progress=tell,
        )
    if form == "json":
        click.echo(to_json(report.record), nl=False)
    else:
        sensitivity.print_selftest(report.record, Console(width=80))
    if not report.passed:
        sys.exit(FINDINGS)
