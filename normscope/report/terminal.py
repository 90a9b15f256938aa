"""Records as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normscope.records import CheckRecord, Clinic, Comparison, Figure1, Finding, FixRecord, Interval, Treatment
from normscope.report import words

__all__ = ["print_check", "print_clinic", "print_comparison", "print_figure1", "print_fix", "print_lessons"]

VERDICT_STYLE = {"agrees": "bold green", "contradicts": "bold red", "open": "bold yellow"}
SEVERITY_STYLE = {"E": "bold red", "W": "bold yellow", "I": "bold cyan"}
WIDTH = 80
# Characters for the layers of a finding.
LEAST_LAYERS = 16
# A report that is longer than a terminal is not read.
MOST_LINES = 25
# Of a list of differences, in which the findings would be lost.
MOST_ROWS = 12
# What a terminal that knows only ASCII gets instead.
ASCII = str.maketrans({"–": "-", "—": "-", "…": "...", "└": "`", "·": "-", "×": "x", "±": "+-", "→": "->", "≥": ">=",
                       "≤": "<=", "δ": "d", "ρ": "rho", "σ": "sd", "μ": "mean", "γ": "gamma", "β": "beta", "√": "sqrt",
                       "²": "2", "ε": "eps", "−": "-", "’": "'", "“": '"', "”": '"'})  # fmt: skip


# --- a check ------------------------------------------------------------------------------------------------------


def print_check(record: CheckRecord, console: Console, *, verbose: bool = False) -> None:
    """The report of a check: at most 25 lines, or everything."""
    lines = list(_everything(record) if verbose else _short(record))
    _print(lines, console)


def _print(lines: list[Text], console: Console) -> None:
    plain = not console.encoding.lower().startswith("utf")
    for line in lines:
        if plain:
            spans, line = line.spans, Text(line.plain.translate(ASCII))
            line.stylize(spans[0].style, 0) if spans else None
        console.print(line, soft_wrap=True, highlight=False)


def _short(record: CheckRecord) -> Iterator[Text]:
    alarms = [f for f in words.causes(record.findings) if f.severity != "I"]
    head = [*_header(record), *_notes(record, 2, 2), Text(), *_scores(record)]
    foot = list(_footer(record, hints=True))
    room = MOST_LINES - len(head) - len(foot)
    yield from head
    for done, finding in enumerate(alarms):
        block = _block(record, finding)
        rest = len(alarms) - done - 1
        if len(block) + (1 if rest else 0) > room:
            yield Text(f"… {words.plural(rest + 1, 'more trouble')}: --verbose or the page shows them", style="bold")
            break
        yield from block
        room -= len(block)
    yield from foot


def _header(record: CheckRecord) -> Iterator[Text]:
    norms = ", ".join(f"{count} {kind}" for kind, count in record.norms)
    total = words.plural(sum(count for _, count in record.norms), "normalizer")
    name = f"normscope {words.version(record)}".rstrip()
    first = f"{name}   {record.model}: {total}" + (f" ({norms})" if norms else "")
    second = f"{words.plural(record.samples, 'sample')}   {record.seconds:.1f} s   seed {record.seed}   {record.device}"
    restored = f"model restored: {'yes' if record.restored else 'NO'} (hash {record.before[:8]})"
    yield Text(_cut(first, WIDTH), style="bold")
    yield Text(_cut(f"{second}   {restored}", WIDTH), style="dim")
    if record.noise_floor:
        yield Text(f"two evaluations of one batch differ by {words.number(record.noise_floor)} (relative)", style="dim")


def _notes(record: CheckRecord, most: int, lines: int) -> Iterator[Text]:
    for note in record.notes[:most]:
        wrapped = textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="  ", max_lines=lines, placeholder=" …")
        yield from (Text(line, style="dim") for line in wrapped)


def _scores(record: CheckRecord) -> Iterator[Text]:
    """What the decision table compares, in one line per number."""
    rows = words.compared(record)
    if not rows:
        yield Text("  cost not measured: pass --metric or --loss", style="yellow")
        yield Text()
        return
    heading = f"{record.splits[1]:,} samples of split B"
    yield Text(f"  {heading:28}{'now':>10}{'recalibrated':>16}   lost now [99%]", style="dim")
    for row in rows:
        numbers = f"{words.score(row.now, row.percent):>10}{words.score(row.after, row.percent):>16}"
        yield Text(f"  {_cut(row.name, 28):28}{numbers}   {_lost(record, row.loss)}".rstrip())
    yield Text()


def _lost(record: CheckRecord, loss: bool) -> str:
    cost = record.cost
    return words.interval(cost) if cost is not None and (cost.unit == "loss") == loss else ""


def _block(record: CheckRecord, finding: Finding) -> list[Text]:
    """One trouble: where, how much, what was seen, what to do, and what follows from it."""
    lines = [_headline(record, finding)]
    lines += [Text(f"    {part}") for part in _wrap(finding.message, 2)]
    lines += [Text(f"    {line}", style="green") for line in _fix_lines(finding)]
    for child in words.descendants(record.findings, finding):
        text = f"      └ consequence: {child.code} {child.name} in {words.fold_layers(child.layers, 32)}"
        lines.append(Text(_cut(text, WIDTH), style="dim"))
    return lines


def _headline(record: CheckRecord, finding: Finding, indent: str = "") -> Text:
    right = _share(record, finding)
    left = _cut(f"{indent}{finding.severity} {finding.code} {finding.name}", WIDTH - len(right) - LEAST_LAYERS - 4)
    layers = words.fold_layers(finding.layers, max(LEAST_LAYERS, WIDTH - len(left) - len(right) - 4))
    gap = max(2, WIDTH - len(left) - len(layers) - len(right) - 2)
    return Text.assemble((left, SEVERITY_STYLE[finding.severity]), "  ", layers, " " * gap, (right, "bold"))


def _share(record: CheckRecord, finding: Finding) -> str:
    explained = words.share(record, finding)
    if explained or finding.cost is None:
        return explained or "cost not measured"
    if finding.cost.high <= 0:
        return "costs nothing"
    cost = words.interval(finding.cost)
    # The interval of the whole cost stands in the table above.
    return f"costs {cost.partition(' [')[0] if finding.cost == record.cost else cost}"


def _fix_lines(finding: Finding) -> list[str]:
    if not finding.remedies:
        return []
    remedy = finding.remedies[0]
    return _wrap(f"fix: {words.remedy_line(remedy)}", 2)


def _footer(record: CheckRecord, hints: bool) -> Iterator[Text]:
    if not any(f.severity != "I" for f in record.findings):
        yield from (Text(part, style="bold green") for part in textwrap.wrap(words.verdict(record), WIDTH))
    more = [f"{f.code} {f.name}" for f in words.causes(record.findings) if f.severity == "I"]
    if hints and more:
        yield Text.assemble(("I", SEVERITY_STYLE["I"]), _cut(f" {len(more)} more: {', '.join(more)}", WIDTH - 1))
    if record.reading:
        for part in textwrap.wrap(f"reading: {record.reading}", WIDTH, subsequent_indent="  ", max_lines=2):
            yield Text(part)
    counts = "   ".join(f"{words.STATUS[status]} {count}" for status, count in words.counts(record))
    yield Text(counts, style="dim")
    follow = words.next_step(record)
    if follow:
        yield Text(_cut(f"next: {follow}", WIDTH * 2), style="bold")


def _everything(record: CheckRecord) -> Iterator[Text]:
    yield from _header(record)
    yield from _notes(record, len(record.notes), 9)
    yield Text()
    yield from _scores(record)
    for finding in words.causes(record.findings):
        yield from _full_block(record, finding)
        yield Text()
    yield from _layers(record)
    yield from _unchecked(record)
    yield from _footer(record, hints=False)


def _full_block(record: CheckRecord, finding: Finding, indent: str = "    ") -> Iterator[Text]:
    yield _headline(record, finding, indent[4:])
    yield from (Text(f"{indent}{part}") for part in _wrap(finding.message, 20, len(indent) - 4))
    for name in finding.layers:
        yield Text(f"{indent}layer {words.layer(name)}", style="dim")
    for fact in finding.facts:
        value = fact.text if fact.value is None else f"{words.number(fact.value)} {fact.text}".rstrip()
        yield from (Text(f"{indent}{part}", style="dim") for part in _wrap(f"{fact.name}: {value}", 4, len(indent) - 4))
    shown = ""
    for remedy in finding.remedies:
        yield from (
            Text(f"{indent}{part}", style="green")
            for part in _wrap(f"fix: {words.remedy_line(remedy)}", 9, len(indent) - 4)
        )
        if remedy.command != shown:  # one command tries the remedies of a rule one after the other
            yield from (Text(f"{indent}  {line}", style="green") for line in words.command(record, remedy).splitlines())
        shown = remedy.command
    for child in words.consequences(record.findings, finding):
        yield Text(f"{indent}└ consequence:", style="dim")
        yield from _full_block(record, child, indent + "    ")


def _layers(record: CheckRecord) -> Iterator[Text]:
    if not record.layers:
        return
    names = [words.layer(row.name) for row in record.layers]
    width = min(34, max(map(len, names)) + 1)
    yield Text(f"{'layer':{width}}{'mode':>7}{'n':>9}{'δ':>8}{'ρ':>8}{'noise':>8}{'D':>7}  rules", style="bold")
    for name, row in zip(names, record.layers, strict=True):
        numbers = (row.delta, row.rho, row.noise, row.design_effect)
        delta, rho, noise, design = ("–" if value is None else words.number(value) for value in numbers)
        values = "–" if row.values is None else words.number(row.values)
        shown = name if len(name) < width else f"…{name[len(name) - width + 2 :]}"
        cells = f"{shown:{width}}{row.mode:>7}{values:>9}{delta:>8}{rho:>8}{noise:>8}{design:>7}  {' '.join(row.codes)}"
        yield Text(cells)
    yield Text()


def _unchecked(record: CheckRecord) -> Iterator[Text]:
    shown = [v for v in record.verdicts if v.status in ("needs-input", "could-not-check", "intentional")]
    for verdict in shown:
        text = f"{verdict.code} {verdict.name}: {words.STATUS[verdict.status]}: {verdict.reason}"
        yield from (Text(line, style="dim") for line in textwrap.wrap(text, WIDTH, subsequent_indent="    "))
    if shown:
        yield Text()


def _wrap(text: str, lines: int, indent: int = 0) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH - 4 - indent, max_lines=lines, placeholder=" …")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


# --- a repair -----------------------------------------------------------------------------------------------------


def print_fix(record: FixRecord, console: Console, check: CheckRecord | None = None) -> None:
    """What was applied, what not and why, and what it gained on samples that chose nothing."""
    lines = [*_header(check), Text()] if check is not None else []
    for treatment in record.applied:
        lines += _treatment("applied", treatment, "bold green")
    for treatment in record.skipped:
        lines += _treatment("skipped", treatment, "bold yellow")
    if not record.applied and not record.skipped:
        lines.append(Text("nothing to repair", style="bold green"))
    if record.applied:
        lines += [Text(), *_proof(record, check)]
    _print(lines, console)


def _proof(record: FixRecord, check: CheckRecord | None) -> Iterator[Text]:
    name = words.metric_name(check) if check is not None else "metric"
    if record.gain is None:
        yield Text("not verified: pass --metric or --loss", style="yellow")
        return
    if record.gain.unit == "loss":
        name = "loss"
    if record.before is not None and record.after is not None:
        percent = words.is_percent(record.gain) or words.is_percent(record.before)
        change = f"{words.score(record.before, percent)} → {words.score(record.after, percent)}"
        yield Text(f"{name} on split B, which chose the remedies:  {change}")
    judged = (words.confirmed(record), "bold green" if record.confirmed else "bold red")
    yield Text.assemble(f"gain on split C, which chose nothing:  {words.gained(record.gain)} (99%)  ", judged)


def _treatment(word: str, treatment: Treatment, style: str) -> list[Text]:
    gain = f"  {words.gained(treatment.gain)}" if treatment.gain is not None else ""
    head = f" {treatment.rule} {treatment.remedy.code} [{treatment.remedy.safety}]  "
    head += words.fold_layers(treatment.layers, max(LEAST_LAYERS, min(30, WIDTH - len(word + head + gain)))) + gain
    lines = [Text.assemble((word, style), _cut(head, WIDTH - len(word)))]
    remedy = treatment.remedy
    if remedy.safety == "S3":  # nothing that was tried, but something to do: the text, and the patch
        lines += [Text(f"    {part}") for part in _wrap(f"{treatment.outcome}: {remedy.text}", 2)]
        return lines + [Text(f"    {part}", style="green") for part in remedy.command.splitlines()]
    reason = treatment.outcome if word == "skipped" else remedy.text
    return lines + [Text(f"    {part}") for part in _wrap(reason, 2)]


# --- two checks ---------------------------------------------------------------------------------------------------


def print_comparison(record: Comparison, console: Console) -> None:
    """What the later check says otherwise than the earlier one."""
    lines = [Text(_cut(words.compared_verdict(record), 2 * WIDTH), style="bold"), Text()]
    for row in words.score_rows(record):
        lines.append(Text(f"  {_cut(row.name, 28):28}{row.before} → {row.after}"))
    for finding in record.new:
        lines += _line(f"new      {_called(finding)}", SEVERITY_STYLE[finding.severity])
        if finding.explained_by:
            lines.append(Text(f"    └ consequence of {finding.explained_by}", style="dim"))
            continue
        lines += [Text(f"    {part}") for part in _wrap(finding.message, 2)]
        lines += [Text(f"    {line}", style="green") for line in _fix_lines(finding)]
    for changed in record.changed:
        lines += _line(f"{'worse' if changed.worse else 'changed':9}{_called(changed.after)}", "bold")
        lines += [Text(f"    {part}") for change in changed.changes for part in _wrap(change, 2)]
    for gone in record.gone:
        lines += _line(f"gone     {_called(gone.finding)}", "bold green" if gone.over else "bold yellow")
        lines += [Text(f"    {part}") for part in _wrap(f"{words.status(gone.status)}: {gone.reason}", 2)]
    if record.same:
        lines += _line(f"same     {', '.join(f.code for f in record.same)}", "dim")
    for title, rows in words.differences(record):
        lines += [Text(), Text(title, style="bold")]
        lines += [line for row in rows[:MOST_ROWS] for line in _line(f"  {words.difference(row)}", "")]
        if len(rows) > MOST_ROWS:
            lines.append(Text(f"  … {len(rows) - MOST_ROWS} more: --format json or the page has them", style="dim"))
    _print(lines, console)


def _called(finding: Finding) -> str:
    where = f" in {words.fold_layers(finding.layers, 30)}" if finding.layers else ""
    cost = f", costs {words.interval(finding.cost)}" if finding.cost is not None else ""
    return f"{finding.severity} {finding.code} {finding.name}{where}{cost}"


def _line(text: str, style: str) -> list[Text]:
    return [Text(part, style=style) for part in textwrap.wrap(text, WIDTH, subsequent_indent=" " * 9, max_lines=3)]


# --- the demo's second half ---------------------------------------------------------------------------------------


def print_clinic(record: Clinic, console: Console) -> None:
    """What was broken, what was found, and what became of it."""
    lines = [Text(f"Two ways to break a normalized network, on {record.data.title}", style="bold")]
    for patient in record.patients:
        lines += [Text(), Text(_cut(patient.title, WIDTH), style="bold")]
        for finding in words.causes(patient.check.findings)[:1]:
            lines.append(_headline(patient.check, finding))
            for child in words.consequences(patient.check.findings, finding):
                lines.append(Text(_cut(f"      └ consequence: {child.code} {child.name}", WIDTH), style="dim"))
        for treatment in patient.fix.applied:
            text = f"fix: {words.remedy_line(treatment.remedy)}"
            lines += [Text(f"    {part}", style="green") for part in _wrap(text, 2)]
        trained, ill, cured = (words.score(i, percent=True) for i in (patient.trained, patient.ill, patient.cured))
        judged = ("confirmed", "bold green") if patient.fix.confirmed else ("not confirmed", "bold red")
        path = f"    test accuracy {trained} → broken {ill} → repaired {cured}   "
        lines.append(Text.assemble(path, judged))
    _print(lines, console)


def print_lessons(lessons: Sequence[str], console: Console) -> None:
    """What was learned, a line each."""
    lines = [Text("What was learned", style="bold")]
    for k, lesson in enumerate(lessons, 1):
        lines += [Text(part) for part in textwrap.wrap(f"{k}. {lesson}", WIDTH, subsequent_indent="   ")]
    _print(lines, console)


# --- figure 1 -----------------------------------------------------------------------------------------------------


def print_figure1(record: Figure1, console: Console) -> None:
    """Final accuracies in a table, then each claim with what was measured."""
    console.print(Text(f"Figure 1 of the Batch Normalization paper, measured on {record.data.title}", style="bold"))
    console.print(_accuracies(record))
    findings = Table.grid(padding=(0, 2), pad_edge=False)
    findings.add_column(no_wrap=True)
    findings.add_column(ratio=1)
    for statement in record.statements:
        text = Text.assemble((statement.claim, "bold"), " ", statement.outcome)
        findings.add_row(Text(statement.verdict, style=VERDICT_STYLE[statement.verdict]), text)
    console.print(findings)
    console.print(Text(record.caveat, style="dim"))


def _accuracies(record: Figure1) -> Table:
    caption = f"Test accuracy with its 95% interval; steps: the first measured one at {100 * record.target:.1f}%."
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("learning rate", justify="right", no_wrap=True)
    for name in ("without BN", "with BN"):
        table.add_column(name, justify="right")
        table.add_column("steps", justify="right")
    for rate in record.rates:
        cells = [f"{rate:g}"]
        for normalized in (False, True):
            run = record.run(rate, normalized=normalized)
            steps = run.accuracy.first_reaching(record.target)
            cells += [_accuracy(run.final), "never" if steps is None else f"{steps:,}"]
        table.add_row(*cells)
    return table


def _accuracy(interval: Interval) -> str:
    return f"{100 * interval.value:.1f}% ({100 * interval.low:.1f} – {100 * interval.high:.1f})"
