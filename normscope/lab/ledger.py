"""From stored runs to the ledger: every claim with its verdict, every contradiction with what decided it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

from normscope.errors import DataError
from normscope.lab import registry
from normscope.lab.advice import advice
from normscope.lab.claims import CLAIMS, SOURCES
from normscope.lab.contradictions import contradictions
from normscope.lab.experiment import Exact, Measured, ProfileName, Results, Task, digest
from normscope.lab.facts import CORRECTIONS
from normscope.lab.samples import assuming
from normscope.lab.store import Store, decode_numbers, encode_numbers
from normscope.lab.verdicts import merge
from normscope.records import Claim, Experiment, Ledger, Machine, from_json, to_json

__all__ = ["Run", "best", "compare", "export", "judge", "ledger", "read", "read_folder", "read_notes"]

# The best run of an experiment is the one of the largest profile that is complete.
PROFILES: tuple[ProfileName, ...] = ("quick", "cpu", "full")
# Numbers whose name begins so are clock times: no two runs have the same.
TIMES = "time"
QUICK = "a quick run, too small to decide"


class Run:
    """The runs of one experiment, one profile, and where they come from."""

    def __init__(
        self, name: str, profile: ProfileName, seeds: tuple[int, ...], results: Results, machines: Sequence[Machine],
        commits: Sequence[str],
    ) -> None:  # fmt: skip
        self.experiment = registry.load(name)
        self.name, self.profile, self.seeds = name, profile, seeds
        self.tasks = _planned(name, profile, seeds, results)
        self.results = results.of(self.tasks)
        self.machines, self.commits = tuple(machines), tuple(commits)

    @property
    def complete(self) -> bool:
        """Whether all runs are done."""
        return len(self.results) == len(self.tasks)

    @property
    def command(self) -> str:
        """How to do it again."""
        usual = tuple(range(self.experiment.seeds[self.profile]))
        seeds = "" if self.seeds == usual else f" --seeds {','.join(map(str, self.seeds))}"
        return f"normscope lab run {self.name} --profile {self.profile}{seeds}"


def _planned(name: str, profile: ProfileName, seeds: tuple[int, ...], results: Results) -> list[Task]:
    """What belongs to a profile with the data that its runs were made with, which need not be on this machine."""
    names = results.texts("data")
    with assuming(names) if names else nullcontext():
        return registry.load(name).tasks(profile, seeds, results)


def read(source: Path) -> list[Run]:
    """Everything that a store, or a folder of exported results, holds.

    Raises:
        DataError: there is nothing to read, or it is damaged.
    """
    if source.is_dir():
        return read_folder(source)
    if not source.is_file():
        raise DataError(f"there are no results at {source}", cure='run "normscope lab run NAME" first, or name a store')
    store = Store(source)
    runs = []
    for sweep in store.sweeps():
        results = store.results(sweep.experiment)
        profile = _profile(sweep.profile)
        tasks = _planned(sweep.experiment, profile, sweep.seeds, results)
        machines, commits = store.origin([task.key for task in tasks])
        runs.append(Run(sweep.experiment, profile, sweep.seeds, results, machines, commits))
    store.close()
    return runs


def _profile(name: str) -> ProfileName:
    for profile in PROFILES:
        if profile == name:
            return profile
    raise DataError(f"there is no profile {name!r}", cure=f"one of {', '.join(PROFILES)}")


# --- exported results -------------------------------------------------------------------------------------------------


def export(run: Run, folder: Path) -> Path:
    """Write the runs of an experiment as one JSON file, a line per run."""
    head = {
        "experiment": run.name, "profile": run.profile, "seeds": run.seeds,
        "registration": digest(run.experiment.registration), "commits": run.commits,
        "machines": [json.loads(to_json(machine)) for machine in run.machines],
    }  # fmt: skip
    lines = [json.dumps(head, ensure_ascii=False)]
    lines += [
        json.dumps([dict(m.task.settings), m.task.seeds, m.seconds, encode_numbers(m.numbers)], ensure_ascii=False)
        for m in (run.results[task] for task in run.tasks if task in run.results)
    ]
    path = folder / f"{run.name}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_folder(folder: Path) -> list[Run]:
    """What `export` wrote.

    Raises:
        DataError: a file is damaged, or its experiment has been registered anew since.
    """
    return [_read_file(path) for path in sorted(folder.glob("*.jsonl"))]


def _read_file(path: Path) -> Run:
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        name = head["experiment"]
        results = Results(
            Measured(Task(name, tuple(settings.items()), tuple(seeds)), decode_numbers(numbers), seconds)
            for settings, seeds, seconds, numbers in rows
        )
        machines = [from_json(Machine, json.dumps(machine)) for machine in head["machines"]]
        profile, seeds = _profile(head["profile"]), tuple(head["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path.name} holds no results", cure="export them again", path=path, reason=error) from error
    if head["registration"] != digest(registry.load(name).registration):
        raise DataError(f"{name} was registered anew after the results in {path.name}", cure="run it again", path=path)
    return Run(name, profile, seeds, results, machines, head["commits"])


# --- the ledger -------------------------------------------------------------------------------------------------------


def judge(run: Run) -> Experiment:
    """The record of an experiment; without judgements and figure while runs are missing.

    What a training experiment's quick profile says is no verdict: it shows that the experiment works.
    """
    done = run.complete
    judgements = run.experiment.judge(run.results) if done else ()
    if run.profile == "quick" and not isinstance(run.experiment, Exact):
        judgements = tuple(
            dataclasses.replace(j, verdict="UNDECIDED", validity=f"{j.validity}; {QUICK}") for j in judgements
        )
    return Experiment(
        registration=run.experiment.registration,
        digest=digest(run.experiment.registration),
        profile=run.profile,
        seeds=run.seeds,
        runs=len(run.results),
        planned=len(run.tasks),
        judgements=judgements,
        picture=run.experiment.figure(run.results) if done else None,
        tables=run.experiment.tables(run.results) if done else (),
        seconds=sum(m.seconds for m in run.results),
        machines=run.machines,
        commits=run.commits,
        command=run.command,
    )


def best(runs: Iterable[Run]) -> list[Run]:
    """Of each experiment the run that counts: of the largest complete profile, the last of equals."""
    found: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: (run.complete, PROFILES.index(run.profile))):
        found[run.name] = run
    return [found[name] for name in registry.runnable() if name in found]


def read_notes(folder: Path) -> dict[str, str]:
    """What the file notes.tsv says about runs of the folder, experiment by experiment; nothing where it is absent.

    A line holds the name of the experiment, its profile, its registration, and a sentence, apart by tabs. A note about
    other runs than those that are published is left out.

    Raises:
        DataError: a line is of another form.
    """
    path = folder / "notes.tsv"
    notes: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            name, profile, registration, note = line.split("\t")
        except ValueError as error:
            cure = "write name, profile, registration and note, apart by tabs"
            raise DataError("a line of notes.tsv is no note", cure=cure, line=line) from error
        notes[f"{name} {profile} {registration}"] = note
    return notes


def ledger(runs: Iterable[Run], notes: Mapping[str, str] = MappingProxyType({})) -> Ledger:
    """All claims, judged by the best run of each experiment.

    Args:
        runs: What there is.
        notes: See `read_notes`.
    """
    judged = [judge(run) for run in best(runs)]
    found = [
        dataclasses.replace(e, note=notes.get(f"{e.registration.name} {e.profile} {e.digest}", "")) for e in judged
    ]
    claims = tuple(_claim(entry.id, found) for entry in CLAIMS)
    sources = tuple(SOURCES.items())
    return Ledger(claims, tuple(found), contradictions(found), sources, CORRECTIONS, advice(found))


def _claim(identifier: str, found: Sequence[Experiment]) -> Claim:
    entry = next(entry for entry in CLAIMS if entry.id == identifier)
    said = tuple((e.registration.name, j) for e in found for j in e.judgements if identifier in j.claims)
    undone = tuple(name for name in entry.experiments if name not in {experiment for experiment, _ in said})
    verdict = merge([j.verdict for _, j in said]) if entry.experiments else "RECORD"
    return Claim(entry.id, entry.text, entry.source, verdict, entry.experiments, undone, said, entry.record)


def compare(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Experiment by experiment: its name, whether the numbers agree, whether the verdicts do.

    Clock times are left out of the comparison of numbers.
    """
    rows = []
    other = {(run.name, run.profile): run for run in second}
    for run in first:
        twin = other.get((run.name, run.profile))
        if twin is None:
            continue
        common = [task for task in run.tasks if task in run.results and task in twin.results]
        same = sum(_equal(run.results[task], twin.results[task]) for task in common)
        numbers = f"{same} of {len(common)} runs the same bit for bit"
        verdicts = "not complete"
        if run.complete and twin.complete:
            # Those of the numbers: that a quick profile never decides would make all of them agree.
            said = [[j.verdict for j in r.experiment.judge(r.results)] for r in (run, twin)]
            verdicts = "the same verdicts" if said[0] == said[1] else f"verdicts {said[0]} and {said[1]}"
        rows.append((f"{run.name} {run.profile}", numbers, verdicts))
    return rows


def _equal(a: Measured, b: Measured) -> bool:
    kept = [{k: v for k, v in encode_numbers(m.numbers).items() if not k.startswith(TIMES)} for m in (a, b)]
    return kept[0] == kept[1]
