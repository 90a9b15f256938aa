"""Running statistics: the one place where a buffer is written."""

from __future__ import annotations

import torch
from torch import Tensor

from normscope.functional.core import View
from normscope.kernels import eager
from normscope.kernels.formula import Formula

__all__ = ["update_running"]


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
            variance.
        momentum: The weight of the batch; a tensor for the cumulative mean 1/num_batches_tracked.
        formula: A mean square (nothing centred) needs no correction.
    """
    if 0 in view.shape:
        return
    mean, var = moments
    count = view.cells if mask is None else mask.expand(view.sizes).sum(view.scope.inside, keepdim=True)
    if formula.center:
        var = _unbiased(var, count)
    for buffer, value, least in ((running[0], mean, 1), (running[1], var, 1 + formula.center)):
        if buffer is None:
            continue
        if isinstance(count, int) and value.numel() == buffer.numel() and buffer.dtype == value.dtype:
            buffer.lerp_(view.fold_param(value), momentum)
            continue
        old = view.param(buffer).to(value.dtype)
        if isinstance(count, int):
            value = eager.sum_to(value, old) / (value.numel() // old.numel())
        else:
            known = (count >= least).expand_as(value)
            sets = eager.sum_to(known.to(value.dtype), old)
            value = eager.sum_to(torch.where(known, value, 0), old) / sets.clamp(min=1)
            value = torch.where(sets > 0, value, old)
        updated = old + momentum * (value - old)
        buffer.copy_(view.fold_param(updated))


def _unbiased(var: Tensor, count: int | Tensor) -> Tensor:
    if isinstance(count, int):
        return var * (count / (count - 1)) if count > 1 else var
    return var * count.to(var.dtype) / (count - 1).clamp(min=1)
