"""How a plan is cut into programs of a GPU.

Every kernel sees tiles of (tasks, rows, columns): columns are neighbours in memory, rows lie inside S, tasks outside. A
tile that holds whole sets is *resident*: read once, normalized, written. Larger sets are *split*: programs sum pieces
of some rows, one program merges the pieces of each set in a fixed order, and a second sweep applies what was found. All
of this follows from a set's own sizes, never from how many there are, so that a sample's result does not depend on its
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["LAUNCH", "Launch", "Plan", "Tile", "plan_of", "tile_of"]


@dataclass(frozen=True)
class Launch:
    """The sizes of tiles and programs. None of them has been measured on a GPU yet; each says why it was chosen.

    Attributes:
        tile: Cells of a tile of a large set: 16 KB of float32, and two or three such programs fit on a multiprocessor.
            To fill 4.8 TB/s for 700 ns, each of 132 multiprocessors needs 25 KB in flight.
        packed: The same of several small sets, which keep more per cell: x, gradient and sums by parameter.
        resident: Cells of the largest set that one program keeps: with 16 warps 32 cells per thread, 64 registers of x
            and gradient in backward, half of what a thread may have while it is not alone on its multiprocessor.
        columns: Most neighbours that a row of a tile takes where a set has several rows: 4 KB of float32.
        least_columns: Fewest where there are more: 64 bytes of float32, two sectors; of less a part would be wasted.
        most_columns: Most of them in a split sum across: 512 bytes of float32, one access of a warp.
        waste: By what share the tiles of a row may be longer than the row: masked lanes cost instructions only.
        sweep: Tiles that one program of a split sum takes: fewer sums to merge, still some programs for each
            multiprocessor from 10⁷ cells on. Few terms per lane also bound the rounding of a shifted sum.
        merged: Partial sums that one program merges at once, of one set or of a few.
        merged_sets: Most sets of such a program: neighbours share a sector, and 1000 sets still spread over the GPU.
        groups: Programs that share the tasks where each adds up gradients of the same parameters: 8 per multiprocessor.
        cells_per_thread: How many warps a tile gets: two accesses of 16 bytes of float32, one of bfloat16.
        most_warps: Half of what a program may have.
        short_run: Runs inside S that are shorter are columns of an across loop: few of their accesses are aligned, and
            a row of a tile would be empty for the most part.
        short_row: The same where a set is a single run, so that there is nothing to add up row by row.
        compiled: Cells below which torch.compile keeps kernels of its own, which fuse the formula with its neighbours
            and cost the host next to nothing. An operator takes it 200 µs or more a step, in which a GPU normalizes as
            many: twenty bytes each in float32, at 4 TB/s.
    """

    tile: int = 4096
    packed: int = 2048
    resident: int = 16384
    columns: int = 1024
    least_columns: int = 16
    most_columns: int = 128
    waste: float = 1 / 8
    sweep: int = 4
    merged: int = 4096
    merged_sets: int = 16
    groups: int = 1024
    cells_per_thread: int = 8
    most_warps: int = 16
    short_run: int = 64
    short_row: int = 2
    compiled: int = 1 << 25


LAUNCH = Launch()


class Plan(NamedTuple):
    """The order of the loops as the kernels take it, in the words of `cpp/plan.h`: two axes of rows, three of tasks."""

    length: int
    fold: int
    param_outer: int
    param_inner: int
    rows: int
    inner_rows: int
    row0: int
    row1: int
    row0_param: int
    row1_param: int
    tasks: int
    tasks1: int
    tasks2: int
    task0: int
    task1: int
    task2: int
    task0_param: int
    task1_param: int
    task2_param: int


class Tile(NamedTuple):
    """How the programs share a tensor.

    Attributes:
        across: Whether the columns belong to different sets.
        row_params: Whether weight and bias vary from row to row.
        column_params: Whether they vary from column to column.
        shared_params: Whether all tasks have the same, which vary along their single run.
        resident: Whether a tile holds whole sets.
        tasks: Of a tile, a power of two, like the next two.
        rows: Of a tile.
        columns: Of a tile.
        chunk: Rows that one program of a split sum takes.
        group: Tiles of tasks that one program of a backward sum takes.
        align: A power of two, as many cells as an access may take; a tensor is dense, so all strides are multiples of
            its rows' length.
        warps: Of a program.
    """

    across: bool
    row_params: bool
    column_params: bool
    shared_params: bool
    resident: bool
    tasks: int
    rows: int
    columns: int
    chunk: int
    group: int
    align: int
    warps: int


def plan_of(numbers: Sequence[int]) -> tuple[Plan, bool]:
    """The plan behind the twenty integers of `cpp/plan.h`, and whether its loops run across the contiguous axis."""
    across, length, fold, param_outer, param_inner, *axes = numbers
    (rows0, row0, row0_param), (rows1, row1, row1_param), *tasks = (axes[i : i + 3] for i in range(0, 15, 3))
    sizes, strides, params = zip(*tasks, strict=True)
    if not across:  # the columns of a run are neighbours of one set
        param_outer, param_inner = param_inner, 0
    return Plan(
        length, fold, param_outer, param_inner, rows0 * rows1, rows1, row0, row1, row0_param, row1_param,
        math.prod(sizes), *sizes[1:], *strides, *params,
    ), bool(across)  # fmt: skip


@lru_cache(maxsize=4096)
def tile_of(plan: Plan, across: bool, launch: Launch) -> Tile:
    """How programs share a tensor of this plan; neither its dtype nor the number of tasks changes any order of sums."""
    row_params = bool(plan.row0_param or plan.row1_param)
    column_params = bool(plan.param_outer or plan.param_inner)
    tasks_share = not (plan.task0_param or plan.task1_param or plan.task2_param)
    shared = column_params and not row_params and not across and tasks_share
    tasks, rows, columns, resident = _sizes(plan, across, launch)
    task_tiles = -(-plan.tasks // tasks)
    return Tile(
        across, row_params, column_params, shared, resident, tasks, rows, columns,
        chunk=plan.rows if resident else _chunk(plan, across, rows, columns, launch),
        group=-(-task_tiles // launch.groups) if shared else 1,
        align=math.gcd(16, plan.length),
        warps=min(launch.most_warps, max(1, tasks * rows * columns // (32 * launch.cells_per_thread))),
    )  # fmt: skip


def _sizes(plan: Plan, across: bool, launch: Launch) -> tuple[int, int, int, bool]:
    rows, columns = _power(plan.rows), _power(plan.length)
    if across:
        least = min(columns, launch.least_columns)
        if plan.fold == 1 and rows * least <= launch.resident:
            columns = max(least, min(columns, launch.tile // rows))
            return max(1, launch.packed // (rows * columns)), rows, columns, True
        columns = min(columns, launch.most_columns)
    else:
        if rows * columns <= launch.resident:
            return max(1, launch.packed // (rows * columns)), rows, columns, True
        columns = min(columns, launch.tile if plan.rows == 1 else launch.columns)
        while columns > 128 and -(-plan.length // columns) * columns > (1 + launch.waste) * plan.length:
            columns //= 2
    return 1, min(rows, max(1, launch.tile // columns)), columns, False


def _chunk(plan: Plan, across: bool, rows: int, columns: int, launch: Launch) -> int:
    """Rows per program: so many that the partial sums of a set can be merged at once."""
    per_chunk = _power(plan.fold if across else -(-plan.length // columns))
    most = max(1, launch.merged // per_chunk)
    return rows * max(launch.sweep, -(-plan.rows // (rows * most)))


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
