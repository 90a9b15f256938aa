"""A benchmark as text for a terminal, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from normscope.records import Benchmark, Interval, ModelSpeed, NormSpeed, Target
from normscope.report import words
from normscope.report.html import environment

__all__ = ["WIDTH", "draw_benchmark", "print_benchmark"]

# Characters that the table takes.
WIDTH = 120
VERDICT_STYLE = {"met": "bold green", "missed": "bold red", "open": "dim"}
CASES_CAPTION = (
    "Forward + backward with a ReLU behind. ×: how often faster than eager torch (norm, then ReLU in place). Floor: "
    "clone + add in the same loop / ours. Plan: the same for the bytes that the plan must move. GB/s: five times the "
    "tensor / ours. Eval: forward alone, against clone and eager torch."
)
MODELS_CAPTION = (
    "A step is forward, backward and SGD. ×: as it is / accelerated. Share: gain of accelerate / gain of leaving out "
    "normalizers and activations. Saved for backward and peak: accelerated, of as it is."
)


def print_benchmark(record: Benchmark, console: Console) -> None:
    """The table of cases, the architectures, what was left out, and the targets."""
    console.print(Text(_about(record), style="bold"), soft_wrap=True)
    tables: list[RenderableType] = []
    if record.cases:
        tables.append(_cases(record.cases))
    if any(case.compiled for case in record.cases):
        tables.append(_compiled(record.cases))
    if any(_liger(case) for case in record.cases):
        tables.append(_against_liger(record.cases))
    if record.models:
        tables.append(_models(record.models))
    disturbed = sum(not case.calm for case in record.cases) + sum(not model.calm for model in record.models)
    if disturbed:
        text = f"!: {disturbed} measured on a busy machine. Their figures mean nothing; run with nothing else running."
        tables.append(Text(text, style="bold red"))
    tables += [Text(f"note: {note}", style="dim") for note in record.notes]
    for table in (*tables, _targets(record.targets)):
        console.print(table)
    console.print(Text(f"{record.seconds:.0f} seconds", style="dim"))


def _about(record: Benchmark) -> str:
    device = record.machine.cpu if record.device == "cpu" else record.device
    version = dict(record.machine.versions)["torch"]
    kernel = record.kernels[0].split(", ")[0]
    return f"{device}, {words.plural(record.threads, 'thread')}, torch {version}, {kernel}"


def _table(caption: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cases(cases: Sequence[NormSpeed]) -> Table:
    columns = ("bytes", "µs", "×", "floor", "95%", "plan", "GB/s", "eval floor", "eval ×")
    table = _table(CASES_CAPTION, "case", columns)
    for case in cases:
        table.add_row(
            _name(case),
            _bytes(case.size),
            f"{case.time('ours') * 1e6:,.0f}",
            _faster(case.speedup),
            *_figure(case.share),
            f"{case.plan_share.value:.2f}",
            f"{case.rate / 1e9:.1f}",
            f"{case.eval_share.value:.2f}",
            _faster(case.eval_speedup),
        )
    return table


def _compiled(cases: Sequence[NormSpeed]) -> Table:
    table = _table("torch.compile of norm and ReLU / ours, forward + backward.", "against torch.compile", ("×", "95%"))
    for case in cases:
        if case.compiled is not None:
            table.add_row(_name(case), *_figure(case.compiled))
    return table


def _liger(case: NormSpeed) -> bool:
    return any(timing.name == "liger" for timing in case.timings)


def _against_liger(cases: Sequence[NormSpeed]) -> Table:
    table = _table("Liger's norm and ReLU in place / ours, forward + backward.", "against Liger", ("×",))
    for case in filter(_liger, cases):
        table.add_row(_name(case), f"{case.time('liger') / case.time('ours'):.2f}")
    return table


def _models(models: Sequence[ModelSpeed]) -> Table:
    columns = ("step ms", "×", "95%", "share", "eval ms", "×", "share", "saved", "peak")
    table = _table(MODELS_CAPTION, "architecture", columns)
    for model in models:
        times = {timing.name: timing.time.value for timing in model.timings}
        before, after, _ = model.memory
        table.add_row(
            _name(model),
            f"{times['accelerated'] * 1e3:,.0f}",
            _faster(model.step),
            _figure(model.step)[1],
            _figure(model.step_share)[0],
            f"{times['accelerated, eval'] * 1e3:,.0f}",
            _faster(model.evaluation),
            _figure(model.evaluation_share)[0],
            f"{after.saved / before.saved:.2f} of {_bytes(before.saved)}",
            f"{after.peak / before.peak:.2f} of {_bytes(before.peak)}",
        )
    return table


def _targets(targets: Sequence[Target]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("target", no_wrap=True)
    for name in ("goal", "measured", "95%"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("over")
    for target in targets:
        goal = "" if target.goal is None else f"≥ {target.goal:g}"
        word = "no goal" if target.goal is None and target.measured else target.verdict
        verdict = Text(word, style=VERDICT_STYLE[target.verdict])
        table.add_row(target.text, goal, *_figure(target.measured), verdict, target.detail)
    return table


def _name(measured: NormSpeed | ModelSpeed) -> Text:
    return Text(measured.name) if measured.calm else Text(f"{measured.name} !", style="red")


def _faster(ratio: Interval) -> Text:
    """Red where it is slower beyond its interval."""
    return Text(f"{ratio.value:.2f}", style="bold red" if ratio.high < 1 else "")


def _figure(interval: Interval | None) -> tuple[str, str]:
    """A number and its interval; a count has none."""
    if interval is None:
        return "–", ""
    if interval.unit:
        return f"{interval.value:g}", ""
    to = "–" if interval.low >= 0 else " to "
    return f"{interval.value:.2f}", f"{interval.low:.2f}{to}{interval.high:.2f}"


def _bytes(count: int) -> str:
    for unit, size in (("MB", 1 << 20), ("KB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


# --- the picture --------------------------------------------------------------------------------------------------

FAMILIES = {
    "BN": "BatchNorm",
    "BN1d": "BatchNorm of (N, C)",
    "GN": "GroupNorm, 32 groups",
    "IN": "InstanceNorm",
    "LN": "LayerNorm",
    "LN2d": "Channels-first LayerNorm",
    "RMS": "RMSNorm",
}
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
# In user units of the picture.
LABEL, PANEL, GAP, ROW, HEAD = 206, 330, 24, 26, 24


@dataclass(frozen=True, slots=True)
class _Bar:
    """One case: where it lies, and how long its bars and their interval are."""

    x: float
    y: float
    ours: float
    low: float
    high: float
    eager: float
    text: str
    eager_text: str


def draw_benchmark(record: Benchmark) -> str:
    """The suite as SVG: the share of the floor that ours and eager torch reach, families below each other.

    It takes the reader's light or dark colours and needs no script, no font and no network.
    """
    suite = [case for case in record.cases if case.part == "suite"]
    shown = [dtype for dtype in DTYPES if any(case.dtype == dtype for case in suite)]
    top = max([1.0, *(case.share.high for case in suite)]) * 1.12
    scale = PANEL / top
    panels = {dtype: LABEL + k * (PANEL + GAP) for k, dtype in enumerate(shown)}
    families, rows, bars, y = [], [], [], 84
    for family, members in groupby(suite, key=lambda case: case.family):
        families.append((y + 16, FAMILIES[family]))
        y += HEAD
        for (_, shape, channels_last), same in groupby(sorted(members, key=_row), key=_row):
            rows.append((y + 15, f"{shape}{' channels_last' if channels_last else ''}"))
            bars += [_bar(case, panels[case.dtype], y, scale) for case in same]
            y += ROW
    return environment().get_template("benchmark.svg.j2").render(
        about=_about(record),
        width=LABEL + len(shown) * (PANEL + GAP),
        height=y + 40,
        bottom=y,
        panels=[(x, DTYPES[dtype]) for dtype, x in panels.items()],
        ticks=[(tick, tick * scale) for tick in (0.0, 0.25, 0.5, 0.75, 1.0)],
        families=families,
        rows=rows,
        bars=bars,
    )  # fmt: skip


def _row(case: NormSpeed) -> tuple[int, str, bool]:
    """Cases of one row differ in dtype alone; larger tensors come first."""
    return -math.prod(case.shape), "×".join(map(str, case.shape)), case.layout == "cl"


def _bar(case: NormSpeed, x: float, y: float, scale: float) -> _Bar:
    share = case.share
    lengths = [round(value * scale, 1) for value in (share.value, share.low, share.high, case.eager_share.value)]
    ours, low, high, eager = lengths
    return _Bar(x, y, ours, low, high, eager, f"{share.value:.2f}", f"{case.eager_share.value:.2f}")
