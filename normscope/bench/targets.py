"""What the bench is to show, judged by what it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from normscope import statistics
from normscope.records import Interval, ModelSpeed, NormSpeed, Target

__all__ = ["geometric_mean", "judge", "judge_gpu"]

# Below it a call costs more than its arithmetic.
SMALL = 64 << 10
# Activations whose input torch keeps, and the layer behind them their output: fused, only what went into the norm is.
CURVES = {"silu", "gelu", "gelu_tanh"}
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
    """The targets, each with its figure."""
    suite = [case for case in cases if case.part == "suite"]
    calm = [model for model in models if model.calm]
    evaluations = [(m.name, m.evaluation_share) for m in calm if m.evaluation_share]
    curved, plain = ([m for m in models if bool(CURVES & {*m.fused}) is curves] for curves in (True, False))

    def faster(text: str, goal: float, family: str, dtype: str = "", layout: str = "") -> Target:
        wanted = [c for c in suite if c.family == family and dtype in ("", c.dtype) and layout in ("", c.layout)]
        return _mean(f"{text}: × eager torch", goal, wanted, lambda case: case.speedup)

    return (
        _mean("forward + backward: share of the ideal floor", 0.6, suite, lambda case: case.share, _eager(suite)),
        _mean("forward + backward: share of the plan's floor", 0.8, suite, lambda case: case.plan_share),
        _mean("forward in evaluation: share of clone", 0.8, suite, lambda case: case.eval_share),
        _every("every case: × eager torch", [_Row(c.name, c.speedup, c.calm, _least(c)) for c in cases]),
        faster("RMSNorm bfloat16", 30, "RMS", "bf16"),
        faster("GroupNorm bfloat16 channels_last", 7, "GN", "bf16", "cl"),
        faster("channels-first LayerNorm", 8, "LN2d", layout="contiguous"),
        faster("InstanceNorm channels_last", 6, "IN", layout="cl"),
        faster("BatchNorm float32 contiguous", 3, "BN", "f32", "contiguous"),
        _every("every training step: × as it was", [_Row(m.name, m.step, m.calm) for m in models]),
        _each("training step: share of the possible gain", 0.8, [(m.name, m.step_share) for m in calm if m.step_share]),
        _each("evaluation: share of the possible gain", None, evaluations),
        _each("saved for backward, SiLU or GELU fused: share spared", 0.2, [_spared(m, "saved") for m in curved]),
        _each("saved for backward, the others: share spared", None, [_spared(m, "saved") for m in plain]),
        _each("peak memory: share spared", 0.0, [_spared(m, "peak") for m in models]),
        _count("architectures measured", MODELS, {model.name.removesuffix(" cl") for model in calm}),
    )


def judge_gpu(cases: Sequence[NormSpeed], models: Sequence[ModelSpeed]) -> tuple[Target, ...]:
    """The targets on a GPU, each with its figure."""
    suite = [case for case in cases if case.part == "suite"]
    compiled = [_Row(c.name, c.compiled, c.calm) for c in suite if c.compiled is not None]
    return (
        _mean(
            "forward + backward: share of the plan's floor", 0.85, suite, lambda case: case.plan_share, _eager(suite)
        ),
        _every("every case of the suite: × eager torch", [_Row(c.name, c.speedup, c.calm) for c in suite]),
        _every("every compiled case: × torch.compile", compiled),
        _every("every training step: × as it was", [_Row(m.name, m.step, m.calm) for m in models]),
        _each("peak memory: share spared", 0.0, [_spared(m, "peak") for m in models]),
    )


def _least(case: NormSpeed) -> float:
    return 0.9 if case.size < SMALL else 1.0


def _spared(model: ModelSpeed, what: Literal["saved", "peak"]) -> tuple[str, Interval]:
    """To a hundredth: some numbers more or less per channel are not what is asked."""
    before, after, _ = (getattr(memory, what) for memory in model.memory)
    spared = round(1 - after / before, 2) + 0.0  # no −0
    return model.name, Interval(spared, spared, spared)


def _verdict(met: bool) -> Literal["met", "missed"]:
    return "met" if met else "missed"


def _eager(suite: Sequence[NormSpeed]) -> str:
    return f"; eager torch {geometric_mean([case.eager_share for case in suite]).value:.2f}" if suite else ""


def _busy(count: int, of: int) -> str:
    return f"{count} of {of} on a busy machine"


def _mean(
    text: str, goal: float, cases: Sequence[NormSpeed], what: Callable[[NormSpeed], Interval], more: str = ""
) -> Target:
    """A geometric mean; open where a figure in it means nothing."""
    if not cases:
        return Target(text, goal, None, "open")
    mean = geometric_mean([what(case) for case in cases])
    disturbed = sum(not case.calm for case in cases)
    if disturbed:
        return Target(text, goal, mean, "open", _busy(disturbed, len(cases)))
    detail = f"geometric mean of {len(cases)} cases" if len(cases) > 1 else "one case"
    return Target(text, goal, mean, _verdict(mean.value >= goal), detail + more)


class _Row(NamedTuple):
    """One of those that must all be fast enough."""

    name: str
    ratio: Interval
    calm: bool
    least: float = 1.0

    @property
    def fails(self) -> bool:
        """Whether it lies below its least beyond its interval."""
        return self.calm and self.ratio.high < self.least


def _every(text: str, rows: Sequence[_Row]) -> Target:
    """The figure is that of the worst."""
    if not rows:
        return Target(text, 1.0, None, "open")
    slow = [row for row in rows if row.fails]
    disturbed = sum(not row.calm for row in rows)
    worst = min(slow or rows, key=lambda row: row.ratio.value)
    if slow:
        return Target(text, 1.0, worst.ratio, "missed", f"{len(slow)} of {len(rows)} slower, most: {worst.name}")
    if disturbed:
        return Target(text, 1.0, worst.ratio, "open", _busy(disturbed, len(rows)))
    return Target(text, 1.0, worst.ratio, "met", f"least of {len(rows)}: {worst.name}")


def _each(text: str, goal: float | None, rows: Sequence[tuple[str, Interval]]) -> Target:
    """The figure is the median over the architectures; a goal is met where none lies below it beyond its interval."""
    if not rows:
        return Target(text, goal, None, "open")
    values = [figure.value for _, figure in rows]
    middle = Interval(*statistics.median_interval(values))
    name, least = min(rows, key=lambda row: row[1].value)
    detail = f"median of {len(rows)}, from {least.value:.2f} ({name}) to {max(values):.2f}"
    if goal is None:
        return Target(text, None, middle, "open", detail)
    short = sum(figure.high < goal for _, figure in rows)
    return Target(text, goal, middle, _verdict(not short), f"{short} below it; {detail}" if short else detail)


def _count(text: str, goal: int, names: set[str]) -> Target:
    if not names:
        return Target(text, goal, None, "open")
    n = float(len(names))
    return Target(text, goal, Interval(n, n, n, "architectures"), _verdict(n >= goal))
