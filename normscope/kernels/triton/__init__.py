"""The kernels for GPUs, in Triton: the plans and bodies of `cpu`, any scope, one read and one write where a set fits.

Triton is imported when the first tensor on a GPU asks for it. With NORMSCOPE_TRITON=interpret its interpreter serves
tensors of the CPU, slowly: for tests. On a GPU they have not run yet, so there it takes NORMSCOPE_TRITON=on.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.kernels import cpu
from normscope.kernels.cpu import Gradients
from normscope.kernels.formula import Formula
from normscope.kernels.triton import geometry
from normscope.kernels.triton.geometry import LAUNCH, Plan, Tile

__all__ = [
    "DTYPES", "LAUNCH",
    "Layout", "apply", "backward", "backward_apply", "forward", "interpreted", "layout_of", "missing", "passes",
    "serves", "statistics", "update",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if os.environ.get("NORMSCOPE_TRITON") == "interpret" and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported, which torch's compiler does, too


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether the interpreter serves tensors of the CPU."""
    return os.environ.get("NORMSCOPE_TRITON") == "interpret"


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why these kernels cannot run here, or None."""
    if os.environ.get("NORMSCOPE_TRITON") not in ("on", "interpret"):
        return "off, because no GPU has run it yet: NORMSCOPE_TRITON=on switches it on"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'normscope[gpu]'"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device here, or a torch without CUDA"
    return None


def serves(x: Tensor) -> bool:
    """Whether these kernels compute on a tensor's device."""
    return (x.is_cuda or (x.is_cpu and interpreted())) and x.dtype in DTYPES and missing() is None


class Layout(NamedTuple):
    """A dense tensor as the kernels see it.

    Attributes:
        plan: The order of the loops.
        across: Whether they run across the contiguous axis.
        sets: Positions of the parts outside S in memory order, those of size one left out.
        set_count: How many sets there are.
        params: Positions of the parts along which the parameters vary, in memory order.
    """

    plan: Plan
    across: bool
    sets: tuple[int, ...]
    set_count: int
    params: tuple[int, ...]

    @property
    def tile(self) -> Tile:
        """How programs share the tensor."""
        return geometry.tile_of(self.plan, self.across, geometry.LAUNCH)


@lru_cache(maxsize=4096)
def layout_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    inside: tuple[int, ...],
    varies: tuple[bool, ...],
    *,
    given: bool = False,  # noqa: ARG001 # memory is swept in the same order for moments that are given
) -> Layout | None:
    """As `cpu.layout_of`."""
    launch = geometry.LAUNCH
    loops = cpu.loops_of(shape, strides, inside, varies, launch.short_run, launch.short_row)
    if loops is None:
        return None
    plan, across = geometry.plan_of(loops.numbers)
    return Layout(plan, across, loops.sets, loops.set_count, loops.params)


def passes(layout: Layout) -> tuple[int, int]:
    """How often the kernels read or write the whole tensor, forward and backward."""
    return (2, 3) if layout.tile.resident else (3, 5)


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
    """As `cpu.forward`."""
    from normscope.kernels.triton import launches

    return launches.forward(x, layout, formula, weight, bias, residual, mask, mean, var)


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
    """As `cpu.backward`."""
    from normscope.kernels.triton import launches

    dx = torch.empty_like(x) if needs_x else None
    dresidual = torch.empty_like(x) if needs_residual else None
    dweight, dbias = launches.backward(
        gy, x, layout, formula, weight, bias, residual, y, mask, statistics, dx, dresidual, fixed, needs_params
    )
    return Gradients(dx, dweight, dbias, dresidual)


def statistics(x: Tensor, layout: Layout, formula: Formula, mask: Tensor | None) -> Tensor:
    """As `cpu.statistics`."""
    from normscope.kernels.triton import launches

    return launches.statistics(x, layout, formula, mask)


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
    """As `cpu.apply`."""
    from normscope.kernels.triton import launches

    return launches.apply(x, layout, formula, weight, bias, residual, mask, statistics)


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
    """As `cpu.backward_apply`."""
    from normscope.kernels.triton import launches

    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if needs_residual else None
    launches.backward_apply(
        gy, x, layout, formula, weight, bias, residual, None, mask, statistics, slope, dx, dresidual
    )
    return dx, dresidual


def update(
    statistics: Tensor, mean: Tensor, var: Tensor, momentum: float, correction: float, skip_nonfinite: bool
) -> None:
    """As `cpu.update`."""
    from normscope.kernels.triton import launches

    launches.update(statistics, mean, var, momentum, correction, skip_nonfinite)
