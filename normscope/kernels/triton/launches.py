"""The launches of each pass: which bodies, on how many programs, with which scratch memory.

Nothing here waits for the device or looks into a tensor, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normscope.errors import ArgumentError, DependencyError
from normscope.kernels.formula import Formula
from normscope.kernels.triton import geometry, interpreted
from normscope.kernels.triton.geometry import Plan, Tile

if TYPE_CHECKING:
    from normscope.kernels.triton import Layout

if interpreted():  # read by Triton when it is imported
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise DependencyError(
            "triton was imported before normscope could ask for its interpreter",
            cure="set TRITON_INTERPRET=1 in the environment, too",
        )
    os.environ["TRITON_INTERPRET"] = "1"
from normscope.kernels.triton import bodies

__all__ = ["backward", "forward", "update"]

_SETS = 256  # of a program that works on numbers per set


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
    """y and the statistics, see `cpu.forward`."""
    plan, tile, sets = layout.plan, layout.tile, layout.set_count
    _check_devices(x, weight, bias, residual, mask, mean, var)
    y, statistics = torch.empty_like(x), x.new_empty((5, sets), dtype=torch.float32)
    tensors = x, residual, mask, y, weight, bias, statistics
    switches = {
        "CENTER": formula.center,
        "ACT": formula.activation,
        **_axes(tile),
        **_sizes(tile, x, residual, mask, y),
    }
    with _on(x):
        if tile.resident and mean is None:
            _launch(
                bodies.forward_resident, _tiles(plan, tile), tile.warps,
                *tensors, plan, sets, formula.eps, SCALE=formula.scale, **switches,
            )  # fmt: skip
            return y, statistics
        if mean is None:
            _moments(x, mask, statistics, layout, formula)
        else:
            cells = x.numel() // sets
            _launch(
                bodies.given, -(-sets // _SETS), 4,
                mean, var, statistics, sets, cells, formula.eps, SCALE=formula.scale, C=_SETS,
            )  # fmt: skip
        _launch(bodies.apply, _tiles(plan, tile), tile.warps, *tensors, plan, sets, **switches)
    return y, statistics


def _moments(x: Tensor, mask: Tensor | None, statistics: Tensor, layout: Layout, formula: Formula) -> None:
    plan, tile, sets = layout.plan, layout.tile, layout.set_count
    units = _units(plan, tile)
    partials = x.new_empty((4, units), dtype=torch.float32)
    _launch(
        bodies.partial_moments, plan.tasks * _pieces(plan, tile), tile.warps,
        x, mask, partials, plan, units, tile.chunk,
        CENTER=formula.center, ACROSS=tile.across, R=tile.rows, C=tile.columns, ALIGN=_align(tile, x, mask),
    )  # fmt: skip
    merging, programs = _merging(plan, tile, sets)
    _launch(
        bodies.merge_moments, programs, 8, partials, statistics, plan, units, sets, tile.chunk, formula.eps,
        CENTER=formula.center, SCALE=formula.scale, **merging,
    )  # fmt: skip


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
    dx: Tensor | None,
    dresidual: Tensor | None,
    fixed: bool,
    needs_params: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dx and dresidual, returns the gradients of weight and bias; see `cpu.backward`."""
    plan, tile, sets = layout.plan, layout.tile, layout.set_count
    _check_devices(x, gy, weight, bias, residual, y, mask, statistics)
    needs_params = needs_params and (weight is not None or bias is not None)
    params = x.new_empty((2, _places(plan, tile)), dtype=torch.float32) if needs_params else None
    half = 0 if params is None else params.shape[1]
    tensors = gy, x, residual, y, mask
    switches = {"CENTER": formula.center, "ACT": None if y is not None else formula.activation, **_axes(tile)}
    sizes = _sizes(tile, *tensors, dx, dresidual)
    with _on(x):
        if tile.resident:
            column_blocks = -(-plan.length // tile.columns)
            programs = _groups(plan, tile) * column_blocks
            _launch(
                bodies.backward_resident, programs, tile.warps,
                *tensors, dx, dresidual, weight, bias, statistics, params, plan, sets, half, tile.group,
                SCALE=formula.scale, FIXED=fixed, SHARED_PARAMS=tile.shared_params, **switches, **sizes,
            )  # fmt: skip
        else:
            slope = None
            if params is not None or (dx is not None and not fixed):
                partials = x.new_empty((2, _units(plan, tile)), dtype=torch.float32)
                _launch(
                    bodies.backward_sums, _groups(plan, tile) * _pieces(plan, tile), tile.warps,
                    *tensors, weight, bias, statistics, partials, params, plan, sets, partials.shape[1], half,
                    tile.chunk, tile.group, SHARED_PARAMS=tile.shared_params, R=tile.rows, C=tile.columns,
                    ALIGN=sizes["ALIGN"], **switches,
                )  # fmt: skip
                if dx is not None and not fixed:
                    slope = x.new_empty((2, sets), dtype=torch.float32)
                    merging, programs = _merging(plan, tile, sets)
                    _launch(
                        bodies.backward_merge, programs, 8,
                        partials, statistics, slope, plan, partials.shape[1], sets, tile.chunk,
                        CENTER=formula.center, SCALE=formula.scale, **merging,
                    )  # fmt: skip
            if dx is not None or dresidual is not None:
                _launch(
                    bodies.backward_apply, _tiles(plan, tile), tile.warps,
                    *tensors, dx, dresidual, weight, bias, statistics, slope, plan, sets, **switches, **sizes,
                )  # fmt: skip
    if params is None:
        return None, None
    dweight, dbias = _param_sums(params, plan, tile)
    return None if weight is None else dweight, None if bias is None else dbias


def update(
    statistics: Tensor, mean: Tensor, var: Tensor, momentum: float, correction: float, skip_nonfinite: bool
) -> None:
    """Move running buffers; see `cpu.update`."""
    sets = statistics.shape[1]
    with _on(statistics):
        _launch(
            bodies.update, -(-sets // _SETS), 4, statistics, mean, var, sets, momentum, correction,
            SKIP_NONFINITE=skip_nonfinite, C=_SETS,
        )  # fmt: skip
    torch.autograd.graph.increment_version((mean, var))


# How many programs, and how much scratch.


def _pieces(plan: Plan, tile: Tile) -> int:
    """Programs per task of a split sum."""
    return -(-plan.rows // tile.chunk) * -(-plan.length // tile.columns)


def _units(plan: Plan, tile: Tile) -> int:
    """Partial sums of all sets: one per program along, one per column of a program across."""
    if tile.across:
        return plan.tasks * -(-plan.rows // tile.chunk) * plan.length
    return plan.tasks * _pieces(plan, tile)


def _tiles(plan: Plan, tile: Tile) -> int:
    """All tiles."""
    return -(-plan.tasks // tile.tasks) * -(-plan.rows // tile.rows) * -(-plan.length // tile.columns)


def _groups(plan: Plan, tile: Tile) -> int:
    return -(-plan.tasks // (tile.tasks * tile.group))


def _place_sizes(plan: Plan, tile: Tile) -> tuple[list[int], list[int]]:
    """The sizes of the partial gradients of weight and bias by place, and how far apart their parameters are."""
    groups = [_groups(plan, tile)]
    sizes, steps = groups, [0]
    if not tile.shared_params:
        sizes = [plan.tasks // (plan.tasks1 * plan.tasks2), plan.tasks1, plan.tasks2]
        steps = [plan.task0_param, plan.task1_param, plan.task2_param]
    if tile.row_params:
        row_sizes, row_steps = [plan.rows // plan.inner_rows, plan.inner_rows], [plan.row0_param, plan.row1_param]
        pieces = 1
    else:
        row_sizes, row_steps, pieces = [1], [0], -(-plan.rows // tile.chunk)
    if tile.column_params:
        column_sizes, column_steps = [plan.length // plan.fold, plan.fold], [plan.param_outer, plan.param_inner]
        blocks = 1
    else:
        column_sizes, column_steps, blocks = [1], [0], -(-plan.length // tile.columns)
    return [*sizes, pieces, blocks, *row_sizes, *column_sizes], [*steps, 0, 0, *row_steps, *column_steps]


def _places(plan: Plan, tile: Tile) -> int:
    return math.prod(_place_sizes(plan, tile)[0])


def _param_sums(params: Tensor, plan: Plan, tile: Tile) -> Tensor:
    """The gradients of weight and bias, by parameter, from the partial ones."""
    sizes, steps = _place_sizes(plan, tile)
    kept = sorted((i for i, step in enumerate(steps) if step and sizes[i] > 1), key=lambda i: -steps[i])
    dropped = [1 + i for i in range(len(sizes)) if i not in kept]
    # There are few of them, and their errors would be those of the whole sum.
    sums = params.view(2, *sizes).sum(dropped, keepdim=True, dtype=torch.float64)
    order = [0, *(1 + i for i in kept), *dropped]
    return sums.permute(order).reshape(2, -1).float()


def _merging(plan: Plan, tile: Tile, sets: int) -> tuple[dict[str, Any], int]:
    """Sizes of a merging program's tile, and how many programs there are."""
    rows, columns = -(-plan.rows // tile.chunk), plan.fold
    if not tile.across:
        rows, columns = 1, _pieces(plan, tile)
    r, c = (1 << (n - 1).bit_length() for n in (rows, columns))
    s = max(1, min(geometry.LAUNCH.merged_sets, geometry.LAUNCH.merged // (r * c)))
    return {"ACROSS": tile.across, "S": s, "R": r, "C": c, "TC": tile.columns}, -(-sets // s)


# The call.


def _axes(tile: Tile) -> Mapping[str, Any]:
    return {"ACROSS": tile.across, "ROW_PARAMS": tile.row_params, "COLUMN_PARAMS": tile.column_params}


def _sizes(tile: Tile, *tensors: Tensor | None) -> Mapping[str, Any]:
    return {"T": tile.tasks, "R": tile.rows, "C": tile.columns, "ALIGN": _align(tile, *tensors)}


def _align(tile: Tile, *tensors: Tensor | None) -> int:
    """The tile's, or less where a tensor begins in between."""
    return math.gcd(tile.align, *(t.data_ptr() // t.element_size() for t in tensors if t is not None))


def _launch(body: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
    body[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and t.device != x.device:
            raise ArgumentError(
                "Expected all tensors to be on the same device, "
                f"but found at least two devices, {x.device} and {t.device}!",
                cure="move the parameters and all other tensors to the input's device",
            )
