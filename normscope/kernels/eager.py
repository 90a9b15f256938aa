"""The kernels in torch operators: the backend that exists on every device.

Every function sees a tensor through its parts (split axes unfolded) and gets what varies by set, or by parameter,
as tensors that broadcast against it. Nothing here knows the name of a normalizer.

Accuracy off centre: one float32 number cannot hold a mean of 8000 σ, it errs by 5e-4 σ. The mean therefore travels as
`high`, its float32 rounding, and `low`, what is left: x − high is exact near the mean (Sterbenz), so the statistics
and x̂ are as accurate at 8000 σ as at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.kernels.activations import ACTIVATIONS
from normscope.kernels.formula import Formula

__all__ = ["PASSES", "Statistics", "apply", "backward_apply", "backward_reduce", "sum_to", "statistics", "xhat"]

# How often the operators below read or write the whole tensor, forward and backward (BatchNorm, affine, no
# activation; counted by tests/test_plan.py).
PASSES = (23, 24)


class Statistics(NamedTuple):
    """Moments of every set, with size one in the averaged parts.

    The mean is `high + low`; `low` is None where the mean was given and is one number.
    """

    high: Tensor
    low: Tensor | None
    var: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean rounded to one number."""
        return self.high if self.low is None else self.high + self.low


def statistics(x: Tensor, formula: Formula, mask: Tensor | None) -> Statistics:
    """Mean and biased variance of every set, in x's dtype; differentiable.

    Args:
        x: The tensor in parts, float32 or float64.
        formula: Which parts are averaged, and whether the mean is subtracted.
        mask: Cells to keep, broadcastable to x, or None for all.
    """
    keep = None if mask is None else mask.expand_as(x)
    count = _count(x, formula.inside, keep)
    if not formula.center:
        zero = x.new_zeros([1 if i in formula.inside else size for i, size in enumerate(x.shape)])
        return Statistics(zero, None, _sum(_kept(x * x, keep), formula.inside) / count)
    # The derivative with respect to the shift is zero: centring removes it again.
    high = (_sum(_kept(x, keep), formula.inside) / count).detach()
    shifted = _kept(x - high, keep)
    low = _sum(shifted, formula.inside) / count
    centred = _kept(shifted - low, keep)
    return Statistics(high, low, _sum(centred * centred, formula.inside) / count)


def xhat(x: Tensor, s: Statistics, formula: Formula) -> Tensor:
    """(x − μ_S)/√(σ²_S + ε), without the parts that the formula switches off."""
    if formula.center:
        x = x - s.high
        if s.low is not None:
            x = x - s.low
    return x * (s.var + formula.eps).rsqrt() if formula.scale else x


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """γ · x̂ + β + residual, the input z of the activation."""
    z = xhat
    if weight is not None:
        z = z * weight
    if bias is not None:
        z = z + bias
    return z if residual is None else z + residual


def apply(
    x: Tensor,
    s: Statistics,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """activation(γ · x̂ + β + residual), 0 where the mask is False; differentiable."""
    z = affine(xhat(x, s, formula), weight, bias, residual)
    if formula.activation is not None:
        z = ACTIVATIONS[formula.activation].forward(z)
    return _kept(z, mask)


def backward_reduce(g: Tensor, xhat: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """Σ_S g and Σ_S g·x̂, the two sums that every gradient of a set needs."""
    return _sum(g, formula.inside), _sum(g * xhat, formula.inside)


def backward_apply(
    g: Tensor, xhat: Tensor, s: Statistics, formula: Formula, sums: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """The gradient of x: (g − mean_S g − x̂ · mean_S(g·x̂)) / √(σ²_S + ε).

    Args:
        g: The gradient of x̂.
        xhat: The normalized tensor.
        s: The statistics of the forward.
        formula: Leaves out the first mean where nothing was centred, the second and the root where nothing was scaled.
        sums: What `backward_reduce` returned.
        mask: Cells to keep, or None for all.
    """
    count = _count(g, formula.inside, None if mask is None else mask.expand_as(g))
    if formula.center:
        g = g - sums[0] / count
    if formula.scale:
        g = (g - xhat * (sums[1] / count)) * (s.var + formula.eps).rsqrt()
    return _kept(g, mask)


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the parts along which `like` has size one."""
    return _sum(x, [i for i, (size, kept) in enumerate(zip(x.shape, like.shape, strict=True)) if size != kept == 1])


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)


def _count(x: Tensor, inside: Sequence[int], keep: Tensor | None) -> int | Tensor:
    if keep is None:
        return math.prod([x.shape[i] for i in inside])
    return keep.sum(inside, keepdim=True).clamp(min=1)


def _sum(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum over dims, kept with size one; the result depends neither on the number of threads nor on the batch.

    torch cuts the sum of a *single* output into one piece per thread, and sums it in another order than the same row
    of a batch. Seen twice through a stride of zero, the row takes the path of a batch of two.
    """
    if not dims:
        return x
    single = all(i in dims or size == 1 for i, size in enumerate(x.shape))
    if single and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.expand(2, *x.shape).sum([d + 1 for d in dims], keepdim=True)[0]
    return x.sum(dims, keepdim=True)
