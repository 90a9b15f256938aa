"""How often the doctor is right: every fixture of every rule, on three kinds of networks and several seeds.

    python scripts/confusion.py [--seeds 5] [--select NRM103,NRM4] [--jobs 2] [--markdown docs/doctor.md]
    python scripts/confusion.py --cases [--markdown docs/doctor.md]
    NORMSCOPE_DATA=<folder> python scripts/confusion.py --zoo [--markdown docs/doctor.md]
    NORMSCOPE_DATA=<folder> python scripts/confusion.py --timm [--markdown docs/doctor.md]

Every result is stored in --store as soon as it is there, with a fingerprint of the doctor and the fixtures: what was
run with the same code is not run again, so that a run may be stopped at any time and goes on where it was.
--any-version accepts the results of older code, too. With --markdown the tables replace what stands between the markers
of that file. The exit code is 1 where a promise is broken: more than 1 miss in 15, an alarm where there is nothing, an
unrelated error, less than 90 % restored, or a pooled bound missed: 95 % of defects found, 1 % of the others alarmed.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from scipy.stats import beta
from torch.nn import functional as F

import normscope as ns
from normscope.doctor import check

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "doctor"))

import fixtures  # noqa: E402
import fixtures_loops  # noqa: E402, F401 - they register themselves
import fixtures_models  # noqa: E402, F401
import reported  # noqa: E402
import zoo  # noqa: E402

RESTORED = 0.9
PICTURES = 16
# Of scripts/zoo.py, one of every family, those that a check in 120 s sees whole.
ARCHITECTURES = (
    "resnet18", "resnext50_32x4d", "seresnet50", "regnetx_002", "vgg11_bn", "densenet121", "dla34", "efficientnet_b0",
    "mobilenetv2_050", "mobilenetv3_small_050", "ghostnet_050", "hrnet_w18_small", "cspresnet50", "repvgg_a0",
    "levit_128s", "mobilevit_xxs", "convnext_atto", "xcit_nano_12_p16_224", "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
)  # fmt: skip


def fingerprint():
    """Of everything that a result depends on, the versions of torch and Python aside."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("normscope/doctor", "normscope/surgery", "normscope/nn", "tests/doctor"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class Store:
    """Results as lines of JSON, one file per rule, so that processes do not meet."""

    def __init__(self, folder, version, any_version, closed):
        self.folder, self.version, self.any_version, self.closed = folder, version, any_version, closed
        folder.mkdir(parents=True, exist_ok=True)

    def known(self, rule, kind=fixtures.Result):
        """By fixture, the newest result that counts."""
        path, found = self.folder / f"{rule}.jsonl", {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            row = json.loads(line)
            if self.any_version or row.pop("version") == self.version:
                row.pop("version", None)
                row |= {
                    name: tuple(row[name])
                    for name in ("unrelated", "treatments", "errors", "warnings", "infos", "applied")
                    if name in row
                }
                found[row["role"], row["kind"], row["seed"]] = kind(**row)
        return found

    def versions(self):
        """Fingerprints of what counts."""
        if not self.any_version:
            return [self.version]
        rows = (row for path in self.folder.glob("NRM*.jsonl") for row in path.read_text(encoding="utf-8").splitlines())
        return sorted({json.loads(row)["version"] for row in rows})

    def keep(self, result):
        row = {"version": self.version, **dataclasses.asdict(result)}
        with (self.folder / f"{result.rule}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def keep_networks(folder):
    """Let the fixtures' networks be trained once for all runs, as long as the fixtures are the same."""
    version = hashlib.blake2b(Path(fixtures.__file__).read_bytes(), digest_size=8).hexdigest()
    train = fixtures.trained.__wrapped__
    if train.__name__ == "kept":
        return

    @functools.cache
    def kept(kind, seed, size=fixtures.BATCH):
        path = folder / f"{kind}-{seed}-{size}-{version}.pt"
        if path.exists():
            return fixtures.Trained(**torch.load(path, weights_only=True))
        made = train(kind, seed, size)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save({field.name: getattr(made, field.name) for field in dataclasses.fields(made)}, part)
        part.replace(path)
        return made

    fixtures.trained = kept


def rows_of(rules, seeds, roles, jobs, store):
    """All results; a crash is one, too."""
    if jobs == 1:
        parts = [rows_of_rule(rule, seeds, roles, store) for rule in rules]
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            parts = list(pool.map(rows_of_rule, rules, *([x] * len(rules) for x in (seeds, roles, store))))
    return [r for results, _ in parts for r in results], [c for _, crashes in parts for c in crashes]


def rows_of_rule(rule, seeds, roles, store):
    keep_networks(store.folder)
    results, crashes, start, known = [], [], time.monotonic(), store.known(rule)
    for role, kind, seed in itertools.product(roles, fixtures.KINDS, range(seeds)):
        if (role, kind, seed) in known:
            results.append(known[role, kind, seed])
        if (role, kind, seed) in known or store.closed:
            continue
        try:
            results.append(fixtures.examine(rule, role, kind, seed))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else ""
            crashes.append((rule, role, kind, seed, f"{type(error).__name__}: {first}"))
            continue
        store.keep(results[-1])
        say(results[-1])
    wrong = sum(r.wrong for r in results)
    took = time.monotonic() - start
    print(f"{rule}: {len(results)} fixtures, {wrong} wrong, {len(crashes)} crashed, {took:.0f} s", file=sys.stderr)
    return results, crashes


def say(result):
    if result.wrong or result.unrelated or result.placed is False:
        print(f"  {describe(result)}", file=sys.stderr)


def describe(r):
    """One line about what went wrong."""
    parts = [f"{r.rule} {r.role}, {r.kind}, seed {r.seed}:"]
    if r.wrong:
        parts.append(f"{'missed' if r.role == 'defect' else f'alarm {r.severity}'} ({r.status}: {r.reason})")
    if r.placed is False:
        parts.append("injected layers are not among the top three")
    if r.unrelated:
        parts.append(f"unrelated {', '.join(r.unrelated)}")
    return " ".join(parts)


def table(results, rules):
    """The table by rule and what fails, as Markdown; the second value says whether every promise is kept."""
    head = ("rule", "missed", "alarms, clean", "alarms, near-miss", "layers in the top three", "unrelated errors")
    lines, sound = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], True
    for rule in rules:
        by_role = {role: [r for r in results if r.rule == rule and r.role == role] for role in fixtures.ROLES}
        defects = by_role["defect"]
        wrong = {role: sum(r.wrong for r in rows) for role, rows in by_role.items()}
        placed = [r.placed for r in defects if r.placed is not None]
        unrelated = sum(bool(r.unrelated) for rows in by_role.values() for r in rows)
        cells = (
            rule,
            f"{wrong['defect']} of {len(defects)}",
            *(f"{wrong[role]} of {len(by_role[role])}" for role in ("clean", "near-miss")),
            f"{sum(placed)} of {len(placed)}" if placed else "–",
            str(unrelated),
        )
        lines.append(f"| {' | '.join(cells)} |")
        sound &= wrong["defect"] * 15 <= len(defects) and not wrong["clean"] and not wrong["near-miss"]
        sound &= all(placed) and not unrelated
    return lines, sound


def fell_short(r):
    """Whether `fix` did not do what it promises."""
    return r.loss is not None and (not r.first or r.restored < RESTORED * r.loss)


def repairs(results, rules):
    """What `fix` gives back of what the defects cost, by rule."""
    head = ("rule", "remedy", "repaired", "points lost", "restored", "least in one fixture", "below 90 %")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for rule in rules:
        lossy = [r for r in results if r.rule == rule and r.loss is not None]
        if not lossy:
            continue
        lost, back = sum(r.loss for r in lossy), sum(r.restored for r in lossy)
        kept = sorted({t.split(":")[0].split()[1] for r in lossy for t in r.treatments if t.startswith(f"{rule} ")})
        least = min(r.restored / r.loss for r in lossy if r.loss > 0)
        cells = (
            rule, ", ".join(kept), str(len(lossy)), f"{lost / len(lossy):.1f}", f"{back / lost:.0%}", f"{least:.0%}",
            f"{sum(map(fell_short, lossy))} of {len(lossy)}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines, not any(map(fell_short, results))


def pooled(results):
    """Detection and false alarms over all rules, with the one-sided 95 % bounds of Clopper and Pearson."""
    defects = [r for r in results if r.role == "defect"]
    others = [r for r in results if r.role != "defect"]
    loud = [r for r in others if r.severity in ("E", "W")]
    found, alarms = sum(not r.wrong for r in defects), len(loud)
    low = beta.ppf(0.05, found, len(defects) - found + 1) if found else 0.0
    high = beta.ppf(0.95, alarms + 1, len(others) - alarms) if alarms < len(others) else 1.0
    lines = [
        f"Over all rules {found} of {len(defects)} defects were found: at least {low:.1%} at 95 %. "
        f"{alarms} of {len(others)} clean models and near-misses raised a warning or an error of the rule in question: "
        f"at most {high:.1%} at 95 %."
    ]
    return lines, low >= 0.95 and high <= 0.01


def companions(results, rules):
    """Which other rules speak up at W or above beside each defect."""
    lines = ["| defect | also at W or above |", "|---|---|"]
    for rule in rules:
        rows = [r for r in results if r.rule == rule and r.role == "defect"]
        others = Counter(code for r in rows for code, severity in r.others.items() if severity in ("E", "W"))
        text = ", ".join(f"{code} ({count})" for code, count in sorted(others.items())) or "none"
        lines.append(f"| {rule} | {text} |")
    return lines


def failures(results, crashes):
    found = [describe(r) for r in results if r.wrong or r.unrelated or r.placed is False]
    found += [
        f"{r.rule} {r.kind}, seed {r.seed}: {r.restored:.1f} of {r.loss:.1f} points restored; "
        + "; ".join(r.treatments)
        for r in results
        if fell_short(r)
    ]
    found += [f"{rule} {role}, {kind}, seed {seed}: raised {what}" for rule, role, kind, seed, what in crashes]
    return [f"- {line}" for line in found] or ["- nothing"]


def write(path, name, lines):
    """Replace what stands between the markers of this name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{path} lacks the markers {begin} and {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}", encoding="utf-8")


def told_of_reports(store):
    """What the doctor says about cases of public reports, acted out, and whether that is right."""
    lines, told = ["| case | report | cause | the doctor says | right |", "|---|---|---|---|---|"], []
    for case in reported.CASES:
        said = next(iter(store.known(case.rule, reported.Said).values()), None)
        if said is None and store.closed:
            continue
        if said is None:
            said = reported.examine(case)
            store.keep(said)
        told.append(said)
        cells = (case.name, case.report, case.cause, said.said.replace("|", "\\|"), "no" if said.wrong else "yes")
        lines.append(f"| {' | '.join(cells)} |")
        if said.wrong:
            print(f"  {case.name}: {said.said}; expected {', '.join(case.expected) or 'silence'}", file=sys.stderr)
    right, entries = sum(not said.wrong for said in told), len({case.name.rstrip("b") for case in reported.CASES})
    lines += ["", f"Right in {right} of {len(told)}; they stand for {entries} entries of the collection."]
    return lines, right == len(reported.CASES)


@dataclasses.dataclass
class Healthy:
    """What the doctor says about a model of the zoo; a row of the store."""

    rule: str
    score: float
    errors: tuple
    warnings: tuple
    infos: tuple
    applied: tuple
    role: str = "clean"
    kind: str = "zoo"
    seed: int = 0


def healthy(store):
    """The zoo: every healthy model on every data set that is there."""
    head = ("data", "model", "score", "E", "W", "I", "applied by fix")
    lines, found = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], []
    for data, name in [(one, name) for one in zoo.data_sets() for name in zoo.names_for(one)]:
        key = f"zoo-{data}-{name.replace(' ', '-')}"
        one = next(iter(store.known(key, Healthy).values()), None)
        if one is None and store.closed:
            continue
        if one is None:
            r = zoo.examine(data, name)
            one = Healthy(key, r.score, r.errors, r.warnings, r.infos, r.applied)
            store.keep(one)
        found.append(one)
        said = (", ".join(x) or "–" for x in (one.errors, one.warnings, one.infos, one.applied))
        score = "–" if math.isnan(one.score) else f"{one.score:.1f}"
        lines.append(f"| {' | '.join((data, name, score, *said))} |")
        print(lines[-1], file=sys.stderr)
    errors, warnings, applied = (sum(len(getattr(x, n)) for x in found) for n in ("errors", "warnings", "applied"))
    lines += ["", f"{errors} E, {warnings} W in {len(found)} models; {applied} remedies applied."]
    return lines, errors == 0 and warnings <= 1 and applied == 0


@dataclasses.dataclass
class Sound:
    """What the doctor says about an architecture whose statistics have just been measured; a row of the store."""

    rule: str
    norms: str
    errors: tuple
    warnings: tuple
    infos: tuple
    role: str = "clean"
    kind: str = "timm"
    seed: int = 0


def examined(name):
    """An architecture of timm with random weights and statistics of pictures, checked on other pictures."""
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "scripts" / "zoo.py")
    architectures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architectures)
    torch.manual_seed(0)
    model, x = architectures.of_timm(name)
    pictures = zoo.load("CIFAR-10")[1].tensors[0][: 16 * PICTURES]
    batches = [F.interpolate(part, size=x.shape[-1], mode="bilinear") for part in pictures.split(PICTURES)]
    ns.recalibrate(model, batches[8:], progress=False)
    report = check(model, batches[:8], budget=120)
    by = {s: tuple(f.code for f in report.findings if f.severity == s) for s in "EWI"}
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.record.norms)
    return Sound(f"timm-{name}", kinds, by["E"], by["W"], by["I"])


def of_timm(store):
    """Twenty architectures of timm."""
    lines, found = ["| architecture | normalizers | E | W | I |", "|---|---|---|---|---|"], []
    for name in ARCHITECTURES:
        one = next(iter(store.known(f"timm-{name}", Sound).values()), None)
        if one is None and not store.closed:
            one = examined(name)
            store.keep(one)
        if one is not None:
            found.append(one)
            said = (", ".join(x) or "–" for x in (one.errors, one.warnings, one.infos))
            lines.append(f"| {' | '.join((name, one.norms, *said))} |")
            print(lines[-1], file=sys.stderr)
    errors, warnings = sum(len(x.errors) for x in found), sum(len(x.warnings) for x in found)
    lines += ["", f"{errors} E, {warnings} W in {len(found)} architectures."]
    return lines, errors == 0 and warnings <= 2 and len(found) == len(ARCHITECTURES)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes; each trains the networks that it needs")
    parser.add_argument("--select", default="NRM", help="codes or their beginnings, separated by commas")
    parser.add_argument("--roles", default=",".join(fixtures.ROLES), help="which to run, separated by commas")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "confusion", help="folder of the results")
    parser.add_argument("--any-version", action="store_true", help="take results of older code for what they are")
    parser.add_argument("--markdown", type=Path, help="a file with markers, whose generated part is replaced")
    parser.add_argument("--stored", action="store_true", help="run nothing: tables of what is in the store")
    parser.add_argument("--cases", action="store_true", help="cases of public reports instead")
    parser.add_argument("--timm", action="store_true", help="architectures of timm instead")
    parser.add_argument("--zoo", action="store_true", help="healthy models instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(options.store, fingerprint(), options.any_version, options.stored)
    if options.zoo:
        lines, sound = healthy(store)
        sections = {"zoo": lines}
    elif options.timm:
        lines, sound = of_timm(store)
        sections = {"timm": lines}
    elif options.cases:
        lines, sound = told_of_reports(store)
        sections = {"cases": lines}
    else:
        rules = [code for code in sorted(fixtures.FIXTURES) if code.startswith(tuple(options.select.split(",")))]
        results, crashes = rows_of(rules, options.seeds, options.roles.split(","), options.jobs, store)
        lines, sound = table(results, rules)
        overall, bounded = pooled(results)
        repaired, restored = repairs(results, rules)
        sound = sound and bounded and restored and not crashes
        seeds = f"seeds 0 to {max((r.seed for r in results), default=0)}"
        told = f"{seeds}, torch {torch.__version__}, fingerprint of doctor, surgery, layers and fixtures"
        lines = [*overall, "", f"{told}: {', '.join(store.versions())}.".capitalize(), "", *lines]
        lines += ["", *companions(results, rules), "", "What fails:", "", *failures(results, crashes)]
        sections = {"confusion": lines, "repairs": repaired}
    for name, part in sections.items():
        print("\n".join(part))
        if options.markdown:
            write(options.markdown, name, part)
    raise SystemExit(0 if sound else 1)


if __name__ == "__main__":
    main()
