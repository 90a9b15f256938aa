"""The compiled kernels for the CPU: one read and one write where a set fits in cache (C++ in `cpp/`).

The library is found beside this file, built for the torch that was there at installation; without it everything works
through the eager kernels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.formula import Formula

__all__ = [
    "DTYPES",
    "FUSED",
    "Door",
    "Layout",
    "Loops",
    "apply",
    "autograd_missing",
    "backward",
    "backward_apply",
    "door",
    "flat",
    "forward",
    "isa",
    "layout_of",
    "loops_of",
    "missing",
    "normalize",
    "passes",
    "recipe",
    "serves",
    "statistics",
    "unflat",
    "update",
]

# The activations by their number in the kernels' table.
_TABLE = "relu relu6 leaky_relu elu silu gelu gelu_tanh mish sigmoid tanh hardswish hardsigmoid"
FUSED: dict[str | None, int] = {None: 0} | {name: number for number, name in enumerate(_TABLE.split(), 1)}

# Runs inside S that are shorter are columns of an across loop, folded into their sets: a 7×7 map along its 49 cells ran
# at 0.12 of the copy, as columns at 0.2 to 0.7; 14×14 maps from memory at 0.29 and 0.32.
SHORT_RUN = 256
GIVEN_SHORT_RUN = 128  # the same where moments are given: there is nothing to sum, and memory is swept in its order
TINY_RUN = 8  # the same where a set is a single run, so that there is nothing to add up row by row
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = Path(__file__).with_name("cpp") / "libnormscope.so"
_AUTOGRAD = _LIBRARY.with_name(f"libnormscope_autograd-{torch.__version__.partition('+')[0]}.so")
_INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the compiled kernels cannot run here, or None."""
    if os.environ.get("NORMSCOPE_ISA") == "none":
        return "switched off by NORMSCOPE_ISA=none"
    if not _LIBRARY.exists():
        return "not compiled: install torch and a C++20 compiler (g++), then reinstall normscope"
    try:
        torch.ops.load_library(_LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"built for another torch ({error}): reinstall normscope"
    return None


def serves(x: Tensor) -> bool:
    """Whether these kernels compute tensors like this one."""
    return x.is_cpu and x.dtype in DTYPES and missing() is None


def autograd_missing() -> str | None:
    """Why the steps between the kernels are taken in Python, or None where C++ takes them."""
    return missing() or _autograd_failure()


@lru_cache(maxsize=1)
def _autograd_failure() -> str | None:
    if os.environ.get("NORMSCOPE_AUTOGRAD") == "python":
        return "switched off by NORMSCOPE_AUTOGRAD=python"
    if not _AUTOGRAD.exists():
        return f"not compiled for torch {torch.__version__}: reinstall normscope beside it"
    try:
        torch.ops.load_library(_AUTOGRAD)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"built for another torch ({error}): reinstall normscope"
    return None


def isa() -> str:
    """The instruction set that the kernels use; the environment variable NORMSCOPE_ISA forces one."""
    return _INSTRUCTION_SETS[torch.ops.normscope.isa()]


def passes(layout: Layout) -> tuple[int, int]:
    """How often the kernels read or write the whole tensor, forward and backward."""
    return (2, 3) if torch.ops.normscope.fused(layout.plan) else (3, 5)


class Layout(NamedTuple):
    """A dense tensor as the kernels see it.

    Attributes:
        plan: The number that the library keeps the twenty integers of plan.h under.
        sets: Positions of the parts outside S in memory order, those of size one left out.
        set_count: How many sets there are.
        params: Positions of the parts along which the parameters vary, in memory order.
    """

    plan: int
    sets: tuple[int, ...]
    set_count: int
    params: tuple[int, ...]


class Loops(NamedTuple):
    """The order of the loops for a dense tensor.

    Attributes:
        numbers: The twenty integers of plan.h.
        sets: As in `Layout`, like the others.
        set_count: How many sets there are.
        params: Positions of the parts along which the parameters vary.
    """

    numbers: tuple[int, ...]
    sets: tuple[int, ...]
    set_count: int
    params: tuple[int, ...]


class _Axis(NamedTuple):
    size: int
    stride: int
    inside: bool
    varies: bool
    param: int


_ONE = _Axis(1, 0, False, False, 0)


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    inside: tuple[int, ...],
    varies: tuple[bool, ...],
    *,
    given: bool = False,
) -> Layout | None:
    """The order of the loops for a tensor, or None when it is not dense or its scope is too ragged for them.

    Args:
        shape: Sizes of the parts.
        strides: Strides of the parts.
        inside: Positions of the averaged parts.
        varies: Whether weight or bias vary along each part.
        given: Whether it is for moments that are given; only the order of the loops differs.
    """
    loops = loops_of(shape, strides, inside, varies, GIVEN_SHORT_RUN if given else SHORT_RUN, TINY_RUN)
    return None if loops is None else Layout(torch.ops.normscope.plan(loops.numbers), *loops[1:])


def loops_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    inside: tuple[int, ...],
    varies: tuple[bool, ...],
    short_run: int,
    tiny_run: int,
) -> Loops | None:
    """The loops for a tensor, or None when it is not dense or its scope is too ragged.

    Args:
        shape: Sizes of the parts.
        strides: Strides of the parts.
        inside: Positions of the averaged parts.
        varies: Whether weight or bias vary along each part.
        short_run: Runs inside S that are shorter are columns of an across loop.
        tiny_run: The same where a set is a single run.
    """
    order = sorted((i for i, size in enumerate(shape) if size != 1), key=lambda i: -strides[i])
    params = tuple(i for i in order if varies[i])
    step, param, axes = 1, 1, []
    for i in reversed(order):
        if strides[i] != step:
            return None
        axes.append(_Axis(shape[i], step, i in inside, varies[i], param if varies[i] else 0))
        step *= shape[i]
        param *= shape[i] if varies[i] else 1
    numbers = _plan(_merged(axes[::-1]), short_run, tiny_run)
    if numbers is None:
        return None
    sets = tuple(i for i in order if i not in inside)
    return Loops(numbers, sets, math.prod(shape[i] for i in sets), params)


def _merged(axes: Sequence[_Axis]) -> list[_Axis]:
    merged: list[_Axis] = []
    for axis in axes:
        if merged and (merged[-1].inside, merged[-1].varies) == (axis.inside, axis.varies):
            merged[-1] = axis._replace(size=merged[-1].size * axis.size)
        else:
            merged.append(axis)
    return merged


def _plan(axes: list[_Axis], short_run: int, tiny_run: int) -> tuple[int, ...] | None:
    if not axes:
        return None
    *outer, inner = axes
    fold, column = 1, _ONE
    across = not inner.inside
    if across:
        column, inner = inner, _ONE
    elif not (outer and outer[-1].inside):
        across = inner.size < (short_run if any(axis.inside for axis in outer) else tiny_run)
        if across:
            fold = inner.size
            column = outer.pop() if outer else _ONE
    rows = [axis for axis in outer if axis.inside]
    tasks = [axis for axis in outer if not axis.inside]
    if len(rows) > 2 or len(tasks) > 3 or (across and any(row.param for row in rows) and (column.param or inner.param)):
        return None
    length = column.size * fold if across else inner.size
    head = [int(across), length, fold, column.param, inner.param]
    padded = [_ONE] * (2 - len(rows)) + rows + [_ONE] * (3 - len(tasks)) + tasks
    return (*head, *(number for axis in padded for number in (axis.size, axis.stride, axis.param)))


def forward(
    x: Tensor,
    layout: Layout,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """activation(γ · x̂ + β + residual), and the statistics: high, low, variance, 1/√(σ² + ε) and count, a row each.

    Args:
        x: Of one of `DTYPES`, dense; only its memory matters, not its shape.
        layout: What `layout_of` returned.
        formula: The switches and the activation.
        weight: Contiguous in the order of `flat`; float64 for float64, else float32.
        bias: As weight.
        residual: Of x's dtype and strides.
        mask: Boolean, of x's strides: the cells that count.
        mean: Given in place of x's own, like weight; with var.
        var: As mean.
    """
    y, statistics = torch.empty_like(x), torch.empty(5, layout.set_count, dtype=COMPUTE_DTYPE[x.dtype])
    torch.ops.normscope.forward.default(
        x, residual, mask, y, weight, bias, mean, var, statistics, layout.plan, _flags(formula, mean is not None),
        formula.eps,
    )  # fmt: skip
    return y, statistics


def recipe(layout: Layout, formula: Formula, *, fixed: bool, correction: float, origin: str) -> int:
    """The number by which the C++ steps know how to compute one formula on tensors seen one way.

    Args:
        layout: What `layout_of` returned.
        formula: The switches and the activation.
        fixed: The moments are given.
        correction: What makes a variance unbiased.
        origin: What the Python side needs to find view and formula again.
    """
    number: int = torch.ops.normscope.recipe(
        layout.plan, layout.set_count, _flags(formula, fixed), formula.eps, correction, origin
    )
    return number


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    skip_nonfinite: bool,
    number: int,
) -> tuple[Tensor, Tensor]:
    """`forward` with its gradient and `update` in one step; tensors of any floating dtype, `number` of `recipe`."""
    result: tuple[Tensor, Tensor] = torch.ops.normscope.normalize.default(
        x, weight, bias, residual, mask, mean, var, running_mean, running_var, momentum, skip_nonfinite, number
    )
    return result


class Door(NamedTuple):
    """Where calls of one kind leave what they have led to, and the next ones enter.

    Attributes:
        learn: (x, weight, bias, tracked, given, number): remember the recipe for these sizes, strides and dtype, and
            what becomes of running statistics.
        enter: (x, weight, bias, residual, running_mean, running_var, momentum, skip_nonfinite): y by what was learned,
            or None.
        enter_sum: (x, addend, weight, bias): y of their sum, and the sum; or nothing.
    """

    learn: Callable[[Tensor, Tensor | None, Tensor | None, bool, bool, int], None]
    enter: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, bool], Tensor | None
    ]
    enter_sum: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], list[Tensor]]


def door() -> Door:
    """A new one."""
    operators = torch.ops.normscope
    number = operators.door()
    return Door(*(partial(way.default, number) for way in (operators.learn, operators.enter, operators.enter_sum)))


class Gradients(NamedTuple):
    """What `backward` returns; None where it was not asked for."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def backward(
    gy: Tensor,
    x: Tensor,
    layout: Layout,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    *,
    fixed: bool,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
) -> Gradients:
    """The gradients; gy has x's dtype and strides, `fixed` says that the moments were given, y may gate a ReLU."""
    dx = torch.empty_like(x) if needs_x else None
    dresidual = torch.empty_like(x) if needs_residual else None
    dweight = torch.empty_like(weight) if needs_params and weight is not None else None
    dbias = torch.empty_like(bias) if needs_params and bias is not None else None
    torch.ops.normscope.backward.default(
        gy, x, residual, y, mask, dx, dresidual, weight, bias, statistics, dweight, dbias, layout.plan,
        _flags(formula, fixed),
    )  # fmt: skip
    return Gradients(dx, dweight, dbias, dresidual)


# The steps by themselves, for sets that reach beyond this process.


def statistics(x: Tensor, layout: Layout, formula: Formula, mask: Tensor | None) -> Tensor:
    """The five rows of `forward`; its y is written and dropped."""
    return forward(x, layout, formula, None, None, None, mask, None, None)[1]


def apply(
    x: Tensor,
    layout: Layout,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
) -> Tensor:
    """y by statistics that are known; parameters, if any, one number per set."""
    high, low, var, rstd, _ = statistics
    shift = -low * rstd if weight is None else -low * rstd * weight  # a given mean is one number
    bias = shift if bias is None else bias + shift
    return forward(x, layout, formula, weight, bias, residual, mask, high, var)[0]


def backward_apply(
    gy: Tensor,
    x: Tensor,
    layout: Layout,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    statistics: Tensor,
    slope: Tensor,
    *,
    needs_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """γ·g/√(σ² + ε) + (x − high)·b + c, slope holding b and c of every set, and g, the gradient of the residual.

    The library does it in two steps; what lies between them must not be rounded to a narrow dtype.
    """
    gy, x, residual = (None if t is None else t.to(COMPUTE_DTYPE[t.dtype]) for t in (gy, x, residual))  # type: ignore[assignment]
    first = backward(
        gy, x, layout, formula, weight, bias, residual, None, mask, statistics,
        fixed=True, needs_x=True, needs_params=False, needs_residual=needs_residual,
    )  # fmt: skip
    line = formula._replace(scale=False, activation=None)
    high, _, var, *_ = statistics
    return forward(x, layout, line, slope[0], slope[1], first.x, mask, high, var)[0], first.residual


def update(
    statistics: Tensor, mean: Tensor, var: Tensor, momentum: float, correction: float, skip_nonfinite: bool
) -> None:
    """Move running buffers, one number per set, towards the statistics that `forward` returned."""
    torch.ops.normscope.update.default(statistics, mean, var, momentum, correction, skip_nonfinite)


def _flags(formula: Formula, fixed: bool) -> int:
    return formula.center | formula.scale << 1 | fixed << 2 | FUSED[formula.activation] << 3


def flat(t: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """A tensor that broadcasts through the parts, as numbers in memory order over some of them."""
    if any(t.shape[i] != shape[i] for i in order):
        t = t.expand([shape[i] if i in order else n for i, n in enumerate(t.shape)])
    if list(order) != sorted(order):
        t = t.permute(*order, *(i for i in range(t.dim()) if i not in order))
    return t.reshape(-1)


def unflat(t: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """The other way: one number per combination of the parts in `order`, size one elsewhere."""
    if list(order) != sorted(order):
        t = t.reshape([shape[i] for i in order]).permute([list(order).index(i) for i in sorted(order)])
    return t.reshape([n if i in order else 1 for i, n in enumerate(shape)])
