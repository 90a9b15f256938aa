"""The plan: where the cells of every set lie in memory.

In every common layout the sets of Batch, Layer, Instance, Group and positional normalization are

    S(i, j) = { i·si + j·sj + p·sp + q : p < P, q < Q },   i < I, j < J

so a kernel needs seven integers and one of two loop orders, never the name of a normalizer: *along* (Q > 1: a set is P
runs of Q contiguous cells) and *across* (Q = 1: neighbours in memory belong to different sets).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from normscope.scope.notation import Scope

__all__ = ["Integers", "Plan", "make_plan"]


class Integers(NamedTuple):
    """S(i, j) = { i·si + j·sj + p·sp + q }, in elements from the first cell of the tensor."""

    I: int  # noqa: E741
    si: int
    J: int
    sj: int
    P: int
    sp: int
    Q: int


@dataclass(frozen=True)
class Plan:
    """What normalizing one tensor means: its sets, where they lie, which kernel runs and what it moves.

    Attributes:
        scope: The notation, fitted to the tensor's rank.
        shape: Sizes of the axes.
        strides: Strides of the axes, in elements.
        sizes: Sizes of the parts (split axes unfolded).
        integers: The seven integers, or None when the tensor's strides do not reduce to them.
        itemsize: Bytes per element.
        kernel: The name of the kernel that runs, and why.
        passes: How often that kernel reads or writes the whole tensor, forward and backward.
    """

    scope: Scope
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    integers: Integers | None
    itemsize: int = 4
    kernel: str = "none chosen"
    passes: tuple[int, int] = (2, 3)

    @property
    def sets(self) -> int:
        """The number of sets."""
        return math.prod(self.sizes[i] for i in self.scope.outside)

    @property
    def cells(self) -> int:
        """|S|, the number of cells in each set."""
        return math.prod(self.sizes[i] for i in self.scope.inside)

    @property
    def order(self) -> str:
        """The loop order: "along" or "across" the contiguous axis, or "strided" when neither fits."""
        if self.integers is None:
            return "strided"
        return "along" if self.integers.Q > 1 or self.cells <= 1 else "across"

    @property
    def bytes_forward(self) -> int:
        """Bytes that the forward kernel reads and writes."""
        return self.passes[0] * self.sets * self.cells * self.itemsize

    @property
    def bytes_backward(self) -> int:
        """Bytes that the backward kernel reads and writes."""
        return self.passes[1] * self.sets * self.cells * self.itemsize

    def __str__(self) -> str:
        floor = self.sets * self.cells * self.itemsize
        outside = " ".join(self.scope.parts[i].name for i in self.scope.outside) or "nothing: one set"
        return "\n".join(
            [
                f"normalize {self.scope.pattern!r} over {self.shape}",
                f"  sets    {self.sets} (one per {outside}) of {self.cells} cells",
                f"  memory  {self._memory()}",
                f"  loop    {self._loop()}",
                f"  kernel  {self.kernel}",
                f"  bytes   forward {_bytes(self.bytes_forward)} (floor {_bytes(2 * floor)}), "
                f"backward {_bytes(self.bytes_backward)} (floor {_bytes(3 * floor)})",
            ]
        )

    def _memory(self) -> str:
        if self.integers is None:
            return f"strides {self.strides} do not reduce to runs of cells"
        i, si, j, sj, p, sp, q = self.integers
        return f"S(i, j) = {{i·{si} + j·{sj} + p·{sp} + q}}, i < {i}, j < {j}, p < {p}, q < {q}"

    def _loop(self) -> str:
        if self.integers is None:
            return "strided"
        if self.order == "along":
            return f"along: {self.integers.P} runs of {self.integers.Q} contiguous cells per set"
        return f"across: {self.integers.P} rows; neighbours in memory belong to different sets"


class _Run(NamedTuple):
    inside: bool
    size: int
    stride: int


def make_plan(scope: Scope, shape: Sequence[int], strides: Sequence[int], sizes: Mapping[str, int]) -> Plan:
    """Find the sets of a scope in a tensor's memory.

    Args:
        scope: The notation at the tensor's rank.
        shape: Sizes of the axes.
        strides: Strides of the axes, in elements.
        sizes: Sizes of split factors by name.

    Example:
        >>> from normscope.scope import parse
        >>> make_plan(parse("[n] c [h w]").at(4), (3, 8, 2, 5), (80, 10, 5, 1), {}).integers
        Integers(I=1, si=0, J=8, sj=10, P=3, sp=80, Q=10)
    """
    unfolded = scope.unfold(shape, sizes)
    inner = [math.prod(unfolded[k] for k in scope.factors(part.axis) if k > i) for i, part in enumerate(scope.parts)]
    runs = [
        _Run(part.averaged, size, strides[part.axis] * step)
        for part, size, step in zip(scope.parts, unfolded, inner, strict=True)
    ]
    return Plan(scope, tuple(shape), tuple(strides), unfolded, _seven(_merge(runs)))


def _merge(runs: Sequence[_Run]) -> list[_Run]:
    """Join neighbours in memory that lie on the same side of the scope; axes of size one vanish."""
    joined: list[_Run] = []
    for run in sorted((run for run in runs if run.size != 1), key=lambda run: -run.stride):
        if joined and joined[-1].inside == run.inside and joined[-1].stride == run.stride * run.size:
            joined[-1] = _Run(run.inside, joined[-1].size * run.size, run.stride)
        else:
            joined.append(run)
    return joined


def _seven(runs: Sequence[_Run]) -> Integers | None:
    sides = {side: list(group) for side, group in groupby(sorted(runs, key=lambda run: run.inside), lambda r: r.inside)}
    outside, inside = sides.get(False, []), sides.get(True, [])
    run_length = inside.pop().size if inside and inside[-1].stride == 1 else 1
    if len(outside) > 2 or len(inside) > 1:
        return None
    i, j = [_Run(False, 1, 0)] * (2 - len(outside)) + outside
    p = inside[0] if inside else _Run(True, 1, 0)
    return Integers(i.size, i.stride, j.size, j.stride, p.size, p.stride, run_length)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
