"""Running statistics: the one place where a buffer is written."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.functional.view import View
from normscope.kernels import eager
from normscope.kernels.formula import Formula

__all__ = ["Running", "recomputing", "update_running"]

# A set whose mean or variance is not finite stays out of the buffers: an exponential average never loses infinity
# again, while a gradient scaler just skips the step. False is torch's behaviour.
SKIP_NONFINITE = True


class Running(NamedTuple):
    """The buffers that a batch moves.

    Attributes:
        mean: Or None, which is left alone.
        var: As mean.
        momentum: The weight of the batch; a tensor for the cumulative mean 1/num_batches_tracked.
    """

    mean: Tensor | None
    var: Tensor | None
    momentum: float | Tensor


def recomputing() -> bool:
    """Whether this forward runs inside a backward: a checkpoint computes it again, its batch has entered already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def update_running(
    running: tuple[Tensor | None, Tensor | None],
    moments: tuple[Tensor, Tensor],
    view: View,
    mask: Tensor | None,
    momentum: float | Tensor,
    formula: Formula,
) -> None:
    """Move the buffers: (1 − momentum) · old + momentum · batch, the variance with the correction m/(m − 1).

    Args:
        running: The mean and variance buffers, of the params' shape; None is left alone.
        moments: μ_S and σ²_S of the batch, through the parts.
        view: How the batch was seen; axes outside S that are no params are averaged.
        mask: Cells that were kept, through the parts; a set without cells moves nothing, one with a single cell no
            variance. Nor does a set that is not finite.
        momentum: The weight of the batch; a tensor for the cumulative mean 1/num_batches_tracked.
        formula: A mean square (nothing centred) needs no correction.
    """
    if 0 in view.shape or recomputing():
        return
    mean, var = moments
    count = view.cells if mask is None else _kept(mask, view)
    if formula.center:
        var = _unbiased(var, count)
    finite = (mean + var).isfinite() if SKIP_NONFINITE else None
    for buffer, value, least in ((running[0], mean, 1), (running[1], var, 1 + formula.center)):
        if buffer is None:
            continue
        known = finite
        if not isinstance(count, int):
            known = count >= least if finite is None else finite & (count >= least)
        one_weight = not isinstance(momentum, Tensor) or momentum.dim() == 0
        if value.numel() == buffer.numel() and buffer.dtype == value.dtype and one_weight:
            value = view.fold_param(value)
            buffer.lerp_(value if known is None else torch.where(view.fold_param(known), value, buffer), momentum)
            continue
        old = view.param(buffer).to(value.dtype)
        known = torch.ones_like(value, dtype=torch.bool) if known is None else known
        sets = eager.sum_to(known.to(value.dtype), old)
        value = eager.sum_to(torch.where(known, value, 0), old) / sets.clamp(min=1)
        value = torch.where(sets > 0, value, old)
        buffer.copy_(view.fold_param(old + momentum * (value - old)))


def _kept(mask: Tensor, view: View) -> Tensor:
    """The cells of every set that a mask keeps; axes along which it does not vary are not read."""
    alike = math.prod([n for i, n in enumerate(view.sizes) if i in view.inside and mask.shape[i] == 1])
    kept = mask.sum(view.inside, keepdim=True) * alike
    return kept.expand([1 if i in view.inside else n for i, n in enumerate(view.sizes)])


def _unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    if isinstance(count, int):
        return var * (count / (count - 1)) if count > 1 else var
    return var * count.to(var.dtype) / (count - 1).clamp(min=1)
