"""How often the doctor is right: every fixture of every rule, on three kinds of networks and several seeds.

    python scripts/confusion.py [--seeds 5] [--rules NRM103,NRM104] [--jobs 2] [--markdown docs/doctor.md]
    NORMSCOPE_DATA=<folder> python scripts/confusion.py --zoo [--markdown docs/doctor.md]

With --markdown the tables replace what stands between the markers of that file. The exit code is 1 where a promise is
broken: more than 1 miss in 15, an alarm where there is nothing, an unrelated error, less than 90 % restored.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "doctor"))

import fixtures  # noqa: E402
import zoo  # noqa: E402

RESTORED = 0.9


def rows_of(rules, seeds, jobs):
    """All results; a crash is one, too."""
    if jobs == 1:
        parts = [rows_of_rule(rule, seeds) for rule in rules]
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            parts = list(pool.map(rows_of_rule, rules, [seeds] * len(rules)))
    return [r for results, _ in parts for r in results], [c for _, crashes in parts for c in crashes]


def rows_of_rule(rule, seeds):
    results, crashes, start = [], [], time.monotonic()
    for role, kind, seed in itertools.product(fixtures.ROLES, fixtures.KINDS, range(seeds)):
        try:
            results.append(fixtures.examine(rule, role, kind, seed))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else ""
            crashes.append((rule, role, kind, seed, f"{type(error).__name__}: {first}"))
            continue
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
    head = (
        "rule", "missed", "alarms, clean", "alarms, near-miss", "layers in the top three", "unrelated errors",
        "points lost", "restored", "below 90 %",
    )  # fmt: skip
    lines, sound = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], True
    for rule in rules:
        by_role = {role: [r for r in results if r.rule == rule and r.role == role] for role in fixtures.ROLES}
        defects = by_role["defect"]
        wrong = {role: sum(r.wrong for r in rows) for role, rows in by_role.items()}
        placed = [r.placed for r in defects if r.placed is not None]
        unrelated = sum(bool(r.unrelated) for rows in by_role.values() for r in rows)
        lossy = [r for r in defects if r.loss is not None]
        lost, back = sum(r.loss for r in lossy), sum(r.restored for r in lossy)
        restored = f"{back / lost:.0%}" if lossy and lost > 0 else "–"
        low = sum(not r.first or r.restored < RESTORED * r.loss for r in lossy)
        cells = (
            rule,
            f"{wrong['defect']} of {len(defects)}",
            *(f"{wrong[role]} of {len(by_role[role])}" for role in ("clean", "near-miss")),
            f"{sum(placed)} of {len(placed)}" if placed else "–",
            str(unrelated),
            f"{lost / len(lossy):.1f}" if lossy else "–",
            restored,
            f"{low} of {len(lossy)}" if lossy else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
        sound &= wrong["defect"] * 15 <= len(defects) and not wrong["clean"] and not wrong["near-miss"]
        sound &= all(placed) and not unrelated and not low
    return lines, sound


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
        if r.loss is not None and (not r.first or r.restored < RESTORED * r.loss)
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


def healthy():
    """The zoo: every healthy model on every data set that is there."""
    head = ("data", "model", "score", "E", "W", "I", "applied by fix")
    lines, errors, warnings, applied = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], 0, 0, 0
    for data in zoo.data_sets():
        for name in zoo.names_for(data):
            start = time.monotonic()
            r = zoo.examine(data, name)
            errors, warnings, applied = errors + len(r.errors), warnings + len(r.warnings), applied + len(r.applied)
            cells = (
                data,
                name,
                f"{r.score:.1f}",
                *(", ".join(x) or "–" for x in (r.errors, r.warnings, r.infos, r.applied)),
            )
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    lines += ["", f"{errors} E, {warnings} W in all; {applied} remedies applied."]
    return lines, errors == 0 and warnings <= 1 and applied == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes; each trains the networks that it needs")
    parser.add_argument("--rules", default=",".join(fixtures.FIXTURES), help="codes, separated by commas")
    parser.add_argument("--markdown", type=Path, help="a file with markers, whose generated part is replaced")
    parser.add_argument("--zoo", action="store_true", help="healthy models instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.zoo:
        lines, sound = healthy()
        sections = {"zoo": lines}
    else:
        rules = options.rules.split(",")
        results, crashes = rows_of(rules, options.seeds, options.jobs)
        lines, sound = table(results, rules)
        sound = sound and not crashes
        lines += ["", *companions(results, rules), "", "What fails:", "", *failures(results, crashes)]
        sections = {"confusion": lines}
    for name, part in sections.items():
        print("\n".join(part))
        if options.markdown:
            write(options.markdown, name, part)
    raise SystemExit(0 if sound else 1)


if __name__ == "__main__":
    main()
