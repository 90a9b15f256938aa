"""What the bench is to show, judged by what it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from normscope import statistics
from normscope.records import Interval, ModelMemory, ModelSpeed, NormSpeed, Target

__all__ = ["geometric_mean", "judge"]

# Below it a call costs more than its arithmetic.
SMALL = 64 << 10
# How many architectures there should be.
MODELS = 8


def geometric_mean(intervals: Sequence[Interval]) -> Interval:
    """The geometric mean of independently measured ratios, their errors added in squares on the scale of logarithms."""
    n = len(intervals)
    middle = sum(math.log(i.value) for i in intervals) / n
    below, above = (
        math.sqrt(sum(math.log(end / i.value) ** 2 for i, end in zip(intervals, ends, strict=True))) / n
        for ends in ([i.low for i in intervals], [i.high for i in intervals])
    )
    return Interval(math.exp(middle), math.exp(middle - below), math.exp(middle + above))


def judge(cases: Sequence[NormSpeed], models: Sequence[ModelSpeed]) -> tuple[Target, ...]:
    """The targets, each with its figure; "open" where nothing was measured for it, or it sets no goal."""
    suite = [case for case in cases if case.part == "suite"]

    def faster(text: str, goal: float, family: str, wanted: Callable[[NormSpeed], bool]) -> Target:
        chosen = [case.speedup for case in suite if case.family == family and wanted(case)]
        return _mean(f"{text}: × eager torch", goal, chosen)

    return (
        _mean("forward + backward: share of the ideal floor", 0.6, [case.share for case in suite], _eager(suite)),
        _mean("forward + backward: share of the plan's floor", 0.8, [case.plan_share for case in suite]),
        _mean("forward in evaluation: share of clone", 0.8, [case.eval_share for case in suite]),
        _every("every case: × eager torch", [(c.name, c.speedup, _least(c)) for c in cases]),
        faster("RMSNorm bfloat16", 30, "RMS", lambda case: case.dtype == "bf16"),
        faster("GroupNorm bfloat16 channels_last", 7, "GN", lambda case: (case.dtype, case.layout) == ("bf16", "cl")),
        faster("channels-first LayerNorm", 8, "LN2d", lambda case: case.layout == "contiguous"),
        faster("InstanceNorm channels_last", 6, "IN", lambda case: case.layout == "cl"),
        faster(
            "BatchNorm float32 contiguous", 3, "BN", lambda case: (case.dtype, case.layout) == ("f32", "contiguous")
        ),
        _every("every training step: × as it was", [(m.name, m.step, 1.0) for m in models]),
        _middle("training step: share of the possible gain", [m.step_share for m in models if m.step_share]),
        _middle("evaluation: share of the possible gain", [m.evaluation_share for m in models if m.evaluation_share]),
        _middle("saved for backward: share of what it was", [_kept(m, lambda memory: memory.saved) for m in models]),
        _middle("peak memory: share of what it was", [_kept(m, lambda memory: memory.peak) for m in models]),
        _count("architectures measured", MODELS, {m.name.removesuffix(" cl") for m in models}),
    )


def _least(case: NormSpeed) -> float:
    return 0.9 if case.size < SMALL else 1.0


def _kept(model: ModelSpeed, what: Callable[[ModelMemory], int]) -> Interval:
    before, after, _ = (what(memory) for memory in model.memory)
    return Interval(after / before, after / before, after / before)


def _verdict(met: bool) -> Literal["met", "missed"]:
    return "met" if met else "missed"


def _eager(suite: Sequence[NormSpeed]) -> str:
    return f"; eager torch {geometric_mean([case.eager_share for case in suite]).value:.2f}" if suite else ""


def _mean(text: str, goal: float, intervals: Sequence[Interval], more: str = "") -> Target:
    if not intervals:
        return Target(text, goal, None, "open")
    mean = geometric_mean(intervals)
    detail = f"geometric mean of {len(intervals)} cases" if len(intervals) > 1 else "one case"
    return Target(text, goal, mean, _verdict(mean.value >= goal), detail + more)


def _every(text: str, measured: Sequence[tuple[str, Interval, float]]) -> Target:
    """None may lie below its least beyond its interval; the figure is that of the worst."""
    if not measured:
        return Target(text, 1.0, None, "open")
    failing = [row for row in measured if row[1].high < row[2]]
    name, interval, _ = min(failing or measured, key=lambda row: row[1].value)
    which = (
        f"{len(failing)} of {len(measured)} slower, most: {name}" if failing else f"least of {len(measured)}: {name}"
    )
    return Target(text, 1.0, interval, _verdict(not failing), which)


def _middle(text: str, intervals: Sequence[Interval]) -> Target:
    """The median over the architectures; no goal is set."""
    if not intervals:
        return Target(text, None, None, "open")
    values = [i.value for i in intervals]
    detail = f"median of {len(values)}, from {min(values):.2f} to {max(values):.2f}"
    return Target(text, None, Interval(*statistics.median_interval(values)), "open", detail)


def _count(text: str, goal: int, names: set[str]) -> Target:
    if not names:
        return Target(text, goal, None, "open")
    n = float(len(names))
    return Target(text, goal, Interval(n, n, n, "architectures"), _verdict(n >= goal))
