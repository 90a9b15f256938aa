"""The launches of each pass: which bodies, on how many programs, with which scratch memory.

Nothing here waits for the device or looks into a tensor, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normscope.errors import ArgumentError, DependencyError
from normscope.kernels.formula import Formula
from normscope.kernels.triton import geometry, interpreted
from normscope.kernels.triton.geometry import Plan, Tile

if TYPE_CHECKING:
    from normscope.kernels.triton import Layout

if interpreted() and os.environ.get("TRITON_INTERPRET") != "1":
    raise DependencyError(
        "triton was imported before normscope could ask for its interpreter",
        cure="set TRITON_INTERPRET=1 in the environment, too",
    )
from normscope.kernels.triton import bodies

__all__ = ["apply", "backward", "backward_apply", "forward", "statistics", "update"]

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
    if mean is None and not tile.resident:
        rows = statistics(x, layout, formula, mask)
        return apply(x, layout, formula, weight, bias, residual, mask, rows), rows
    rows = x.new_empty((5, sets), dtype=torch.float32)
    if mean is not None:
        with _on(x):
            _launch(
                bodies.given, -(-sets // _SETS), 4,
                mean, var, rows, sets, x.numel() // sets, formula.eps, SCALE=formula.scale, C=_SETS,
            )  # fmt: skip
        return apply(x, layout, formula, weight, bias, residual, mask, rows), rows
    y = torch.empty_like(x)
    with _on(x):
        _launch(
            bodies.forward_resident, _tiles(plan, tile), tile.warps,
            x, residual, mask, y, weight, bias, rows, plan, sets, formula.eps,
            CENTER=formula.center, SCALE=formula.scale, ACT=formula.activation,
            **_axes(tile), **_sizes(tile, x, residual, mask, y),
        )  # fmt: skip
    return y, rows


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
    """y by statistics that are known; see `cpu.apply`."""
    plan, tile = layout.plan, layout.tile
    _check_devices(x, weight, bias, residual, mask, statistics)
    y = torch.empty_like(x)
    with _on(x):
        _launch(
            bodies.apply, _tiles(plan, tile), tile.warps,
            x, residual, mask, y, weight, bias, statistics, plan, layout.set_count,
            CENTER=formula.center, ACT=formula.activation, **_axes(tile), **_sizes(tile, x, residual, mask, y),
        )  # fmt: skip
    return y


def statistics(x: Tensor, layout: Layout, formula: Formula, mask: Tensor | None) -> Tensor:
    """The statistics alone; see `cpu.statistics`."""
    plan, tile, sets = layout.plan, layout.tile, layout.set_count
    units = _units(plan, tile)
    partials, rows = (x.new_empty((n, m), dtype=torch.float32) for n, m in ((4, units), (5, sets)))
    merging, programs = _merging(plan, tile, sets)
    with _on(x):
        _launch(
            bodies.partial_moments, plan.tasks * _pieces(plan, tile), tile.warps,
            x, mask, partials, plan, units, tile.chunk,
            CENTER=formula.center, ACROSS=tile.across, R=tile.rows, C=tile.columns, ALIGN=_align(tile, x, mask),
        )  # fmt: skip
        _launch(
            bodies.merge_moments, programs, 8, partials, rows, plan, units, sets, tile.chunk, formula.eps,
            CENTER=formula.center, SCALE=formula.scale, **merging,
        )  # fmt: skip
    return rows


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
    places = _places(plan, tile)
    params = x.new_empty((2, math.prod(places.sizes)), dtype=torch.float32) if needs_params else None
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
                backward_apply(
                    gy, x, layout, formula, weight, bias, residual, y, mask, statistics, slope, dx, dresidual
                )
    if params is None:
        return None, None
    dweight, dbias = _param_sums(params, places)
    return None if weight is None else dweight, None if bias is None else dbias


def backward_apply(
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
    slope: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
) -> None:
    """Fills dx and dresidual by sums that are known; see `cpu.backward_apply`."""
    plan, tile = layout.plan, layout.tile
    tensors = gy, x, residual, y, mask, dx, dresidual
    with _on(x):
        _launch(
            bodies.backward_apply, _tiles(plan, tile), tile.warps,
            *tensors, weight, bias, statistics, slope, plan, layout.set_count,
            CENTER=formula.center, ACT=None if y is not None else formula.activation,
            **_axes(tile), **_sizes(tile, *tensors),
        )  # fmt: skip


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


class _Places(NamedTuple):
    """Where the partial gradients of weight and bias lie.

    Attributes:
        sizes: Of the axes of places.
        summed: Which axes are added up, counted behind that of weight and bias.
        order: The axes as parameters lie in memory, those summed last.
    """

    sizes: tuple[int, ...]
    summed: tuple[int, ...]
    order: tuple[int, ...]


@lru_cache(maxsize=4096)
def _places(plan: Plan, tile: Tile) -> _Places:
    sizes, steps = [_groups(plan, tile)], [0]
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
    sizes += [pieces, blocks, *row_sizes, *column_sizes]
    steps += [0, 0, *row_steps, *column_steps]
    kept = sorted((i for i, step in enumerate(steps) if step and sizes[i] > 1), key=lambda i: -steps[i])
    summed = tuple(1 + i for i in range(len(sizes)) if i not in kept)
    return _Places(tuple(sizes), summed, (0, *(1 + i for i in kept), *summed))


def _param_sums(params: Tensor, places: _Places) -> Tensor:
    """The gradients of weight and bias, by parameter, from the partial ones."""
    # There are few of them, and their errors would be those of the whole sum.
    sums = params.view(2, *places.sizes).sum(places.summed, keepdim=True, dtype=torch.float64)
    return sums.permute(places.order).reshape(2, -1).float()


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
