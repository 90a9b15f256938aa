"""`lab list | run | report | compare`."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normscope.cli.group import FINDINGS, main, progress

if TYPE_CHECKING:
    from normscope.lab.experiment import ProfileName

__all__ = ["lab"]

PROFILES = ("quick", "cpu", "full")
# What a process that SIGTERM ended tells its shell.
TERMINATED = 143
STORE = click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("normscope-lab.sqlite"),
    show_default=True,
    help="File of results; created if absent, shared with other processes.",
)


@main.group(short_help="Contradictory claims about Batch Normalization, settled by experiment.")
def lab() -> None:
    r"""Run experiments about published claims, and publish a ledger of verdicts.

    \b
    normscope lab list
    normscope lab run A01 B06 --profile quick
    normscope lab report --out normscope-lab
    """


@lab.command("list", short_help="The experiments, and which claims each is about.")
@click.option("--claims", is_flag=True, help="The claims instead, each with its experiments.")
def list_(claims: bool) -> None:
    """List the experiments; one without * is open: it cannot be run yet."""
    from normscope.lab import registry
    from normscope.lab.catalogue import CATALOGUE
    from normscope.lab.claims import CLAIMS, claims_of

    if claims:
        for claim in CLAIMS:
            click.echo(f"{claim.id:>7}  {' '.join(claim.experiments) or 'on record':<16} {claim.text}")
        return
    runnable = registry.runnable()
    for name, title in CATALOGUE.items():
        mark = "*" if name in runnable else " "
        click.echo(f"{name} {mark} {title}  [{len(claims_of(name))} claims]")
    click.echo(f"\n* {len(runnable)} of {len(CATALOGUE)} can be run; all of them: normscope lab run all")


@lab.command(short_help="Do the runs of experiments; a killed command goes on where it was.")
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default="quick",
    show_default=True,
    help="quick shows that it works, cpu fits a laptop (20 minutes each at most), full is the paper's size.",
)
@click.option("--seeds", metavar="LIST", help='Evaluation seeds, e.g. "0-9" or "0,1,2". Default: the profile\'s.')
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="How many runs at a time.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of each run. With 1 the numbers come out the same bit for bit on the same machine.",
)
@click.option(
    "--on",
    "place",
    type=click.Choice(["here", "ray"]),
    default="here",
    show_default=True,
    help="ray: the cluster named in RAY_ADDRESS, else one on this machine.",
)
@STORE
def run(
    names: tuple[str, ...], profile: ProfileName, seeds: str | None, jobs: int, threads: int, place: str, store: Path
) -> None:
    """Run experiments NAME…, e.g. A01; "exact" stands for A01 to A17, "all" for all that can be run.

    Every finished run is kept at once. Several commands may work on one store at the same time.
    """
    from normscope.lab import ledger, runner
    from normscope.lab.store import Store

    asked = [runner.Asked(name, profile, _seeds(seeds)) for name in _names(names)]
    results = Store(store)
    results.work(command=shlex.join(["normscope", *sys.argv[1:]]), threads=threads, commit=runner.commit())
    on = runner.workers(place, jobs, threads)
    try:
        with progress("lab") as tell:
            count = runner.run(results, asked, on, tell=lambda done, total, what: tell(round(done), round(total), what))
    finally:
        on.close()
        results.close()
    found = [r for r in ledger.read(store) if r.profile == profile and r.name in {a.experiment.name for a in asked}]
    for one in found:
        for judgement in ledger.judge(one).judgements:
            click.echo(f"{one.name}  {judgement.verdict:<11} {' '.join(judgement.claims)}: {judgement.question}")
            click.echo(f"     {judgement.outcome}")
    click.echo(f"{count} runs done, the rest was there; {store}")


def _names(names: tuple[str, ...]) -> list[str]:
    from normscope.lab import registry

    groups = {"all": registry.runnable(), "exact": tuple(n for n in registry.runnable() if n.startswith("A"))}
    return list(dict.fromkeys(n for name in names for n in groups.get(name, (name.upper(),))))


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if match is None:
            raise click.BadParameter(f'{text!r} is no list of seeds such as "0-9" or "0,1,2"', param_hint="--seeds")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= first + 999:
            raise click.BadParameter(f"{part} holds no seeds, or more than 1000", param_hint="--seeds")
        found += range(first, last + 1)
    return found


@lab.command(short_help="The ledger: every claim with its verdict, as a page, figures and numbers.")
@click.argument("sources", nargs=-1, metavar="[SOURCE]…", type=click.Path(path_type=Path))
@STORE
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("normscope-lab"),
    show_default=True,
    help="Folder; created if absent.",
)
@click.option(
    "--document",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the claims, and advice.md beside them; the figures are linked from there. [OUT/claims.md]",
)
@click.option("--figures/--no-figures", default=True, help="Draw the figures.")
def report(sources: tuple[Path, ...], store: Path, out: Path, document: Path | None, figures: bool) -> None:
    """Write index.html, claims.md, advice.md beside it, ledger.json, results/*.jsonl and figures/*.svg.

    Each SOURCE is a store or a folder of exported results; without one, --store is read. Of each experiment the run of
    the largest complete profile counts, the last of equals. OUT/notes.tsv, if there is one, holds notes on runs: lines
    of experiment, profile, registration and a sentence, apart by tabs.
    """
    from normscope.lab import ledger
    from normscope.records import to_json
    from normscope.report import advice, plots
    from normscope.report import claims as pages

    runs = ledger.best(run for source in sources or (store,) for run in ledger.read(source))
    record = ledger.ledger(runs, ledger.read_notes(out))
    _make_folders(out, out / "results", out / "figures")
    for one in runs:
        ledger.export(one, out / "results")
    pictures = {}
    for experiment in record.experiments if figures else ():
        if experiment.picture is not None:
            name = experiment.registration.name
            pictures[name] = plots.draw(experiment.picture, name)
            (out / "figures" / f"{name}.svg").write_text(plots.as_file(experiment.picture), encoding="utf-8")
    document = document or out / "claims.md"
    linked = Path(os.path.relpath(out / "figures", document.parent)).as_posix()
    for path, text in (
        (out / "index.html", pages.page(record, pictures)),
        (document, pages.markdown(record, linked)),
        (document.with_name("advice.md"), advice.markdown(record, document.name)),
        (out / "ledger.json", to_json(record)),
    ):
        path.write_text(text, encoding="utf-8")
    counts = {v: record.count(v) for v in pages.VERDICTS}
    click.echo(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count))
    click.echo(f"{len(record.experiments)} experiments, {record.tests} tests. Open {out / 'index.html'}")


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"cannot create {folder}: {error.strerror}", param_hint="--out") from error


@lab.command(short_help="Whether two sets of results agree: bit for bit, and in their verdicts.")
@click.argument("first", type=click.Path(exists=True, path_type=Path))
@click.argument("second", type=click.Path(exists=True, path_type=Path))
@click.pass_context
def compare(ctx: click.Context, first: Path, second: Path) -> None:
    """Compare two stores or folders of exported results; exit code 1 where verdicts differ."""
    from normscope.lab import ledger

    rows = ledger.compare(ledger.read(first), ledger.read(second))
    for name, numbers, verdicts in rows:
        click.echo(f"{name}: {numbers}; {verdicts}")
    if not rows:
        click.echo("no experiment was run in both with the same profile")
    if not rows or any(verdicts != "the same verdicts" for _, _, verdicts in rows):
        ctx.exit(FINDINGS)


@lab.command(short_help="A published experiment at its size: train, stop, resume.")
@click.argument("name", required=False)
@click.option("--arm", metavar="ARM", help="Which of the recipe's; without it they are listed.")
@click.option(
    "--data", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder with the parts train and val."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Of checkpoint and result. Default: NAME-ARM."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--every", type=click.IntRange(1), default=1000, show_default=True, help="Steps between checkpoints.")
@click.option("--report", type=click.IntRange(1), default=5000, show_default=True, help="Steps between evaluations.")
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read images.")
@click.option("--half", is_flag=True, help="Autocast to bfloat16.")
@click.option(
    "--weights", type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of a finished run whose features a new run starts from.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), help="Fewer than the recipe's, for a trial.")
@click.option("--batch", type=click.IntRange(1), help="Another number of items per process, for a trial.")
@click.option("--edge", type=click.IntRange(1), help="Another size of the pictures in pixels, for a trial.")
@click.option(
    "--ensemble",
    multiple=True,
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of a finished run of this arm; given several times, their mean probabilities are judged instead.",
)
@click.pass_context
def recipe(
    ctx: click.Context, name: str | None, arm: str | None, data: Path | None, out: Path | None, seed: int, every: int,
    report: int, workers: int, half: bool, weights: Path | None, steps: int | None, batch: int | None, edge: int | None,
    ensemble: tuple[Path, ...],
) -> None:  # fmt: skip
    r"""Train an arm of a recipe; the same command goes on after a kill, and ends with the same numbers.

    \b
    normscope lab recipe
    normscope lab recipe resnet50
    torchrun --nproc-per-node 8 -m normscope lab recipe resnet50 --arm BN-2 --data imagenet --half
    """
    from normscope.lab.recipes import catalogue, engine

    if name is None or arm is None:
        _list_recipes(name)
        return
    job = catalogue.resized(catalogue.find(name, arm), steps=steps, batch=batch, edge=edge)
    if data is None:
        raise click.UsageError(f"--data is needed: a folder with {catalogue.RECIPES[name].layout}")
    if ensemble:
        click.echo(json.dumps(engine.together(job, [folder / engine.CHECKPOINT for folder in ensemble], data)))
        return
    out = out or Path(f"{name}-{arm}")
    settings = engine.Settings(out, seed=seed, every=every, report=report, workers=workers, half=half, weights=weights)
    try:
        result = engine.train(job, f"{name} {arm}", data, settings)
    except engine.Stopped as stopped:
        click.echo(f"{stopped}; the same command goes on", err=True)
        ctx.exit(TERMINATED)
    click.echo(json.dumps(result["history"][-1]))


def _list_recipes(name: str | None) -> None:
    from normscope.lab.recipes.catalogue import RECIPES, named

    for key, one in RECIPES.items() if name is None else [(name, named(name))]:
        click.echo(f"{key}: {one.title}\n  data: {one.layout}\n  arms: {', '.join(one.arms)}\n  {one.source}")
