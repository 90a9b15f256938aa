"""The kernels in torch operators: the backend that exists on every device.

Every function sees a tensor through its parts (split axes unfolded) and gets what varies by set, or by parameter,
as tensors that broadcast against it. Nothing here knows the name of a normalizer.

Accuracy off centre: one float32 number cannot hold a mean of 8000 σ, it errs by 5e-4 σ. The mean therefore travels as
`high`, its float32 rounding, and `low`, what is left: d = x − high is exact near the mean (Sterbenz), so the statistics
and x̂ = (d − low)/√(σ² + ε) are as accurate at 8000 σ as at 0.

`own` says that temporaries may be overwritten: true in plain eager, false where torch differentiates these operators
or maps over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.kernels.activations import ACTIVATIONS
from normscope.kernels.formula import Formula

__all__ = [
    "PASSES", "Gradients", "Statistics",
    "apply", "backward_apply", "backward_reduce", "of_moments", "statistics", "sum_to",
]  # fmt: skip

# How often the operators below read or write the whole tensor, forward and backward (affine, no activation; counted by
# tests/test_plan.py).
PASSES = (13, 14)


class Statistics(NamedTuple):
    """Moments of every set, with size one in the averaged parts.

    Attributes:
        high: The mean, rounded to one number.
        low: What is left of the mean; None where the mean was given.
        var: σ²_S.
        rstd: 1/√(σ²_S + ε); None where the formula does not scale.
    """

    high: Tensor
    low: Tensor | None
    var: Tensor
    rstd: Tensor | None

    @property
    def mean(self) -> Tensor:
        """The mean rounded to one number."""
        return self.high if self.low is None else self.high + self.low


def of_moments(high: Tensor, low: Tensor | None, var: Tensor, formula: Formula) -> Statistics:
    """The statistics that moments, the data's or given ones, amount to."""
    if not formula.scale:
        return Statistics(high, low, var, None)
    # One number per set: float64, where the device has it, spares x̂ two of its five roundings.
    wide = var if var.device.type == "mps" else var.double()
    return Statistics(high, low, var, (wide + formula.eps).rsqrt().to(var.dtype))


class Gradients(NamedTuple):
    """The sums that the gradients of a set and of the parameters need.

    Attributes:
        g: The gradient of x̂, or of z where the weight is the same for a whole set.
        d: x − high.
        set_g: Σ_S of the gradient of x̂.
        set_gx: Σ_S of the gradient of x̂ times x̂.
        weight: The gradient of γ, through the parts.
        bias: The gradient of β, through the parts.
    """

    g: Tensor
    d: Tensor
    set_g: Tensor
    set_gx: Tensor
    weight: Tensor | None
    bias: Tensor | None


def statistics(x: Tensor, formula: Formula, mask: Tensor | None) -> Statistics:
    """Mean and biased variance of every set, in x's dtype; differentiable.

    Args:
        x: The tensor in parts, float32 or float64, 0 where masked.
        formula: Which parts are averaged, and whether the mean is subtracted.
        mask: Cells to keep, broadcastable to x, or None for all.
    """
    inside = formula.inside
    count = _count(x, inside, mask)
    if not formula.center:
        zero = x.new_zeros([1 if i in inside else size for i, size in enumerate(x.shape)])
        return of_moments(zero, None, _sum(x.square(), inside) / count, formula)
    # The derivative with respect to the shift is zero: centring removes it again.
    high = (_sum(x, inside) / count).detach()
    d = _kept(x - high, mask)
    low = _sum(d, inside) / count
    # |low| is a rounding error of the mean, so this subtraction loses nothing; a constant set may round below 0.
    var = (_sum(d.square(), inside) / count - low * low).clamp(min=0)
    return of_moments(high, low, var, formula)


def apply(
    x: Tensor,
    s: Statistics,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    own: bool,
) -> Tensor:
    """activation(γ · x̂ + β + residual), 0 where the mask is False; differentiable."""
    z = _z(_shifted(x, s, formula), s, formula, weight, bias, residual, x if own else None)
    if formula.activation is not None:
        z = ACTIVATIONS[formula.activation].forward(z)
    return _kept(x.clone() if z is x else z, mask)


def backward_reduce(
    gy: Tensor,
    x: Tensor,
    s: Statistics,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    own: bool,
) -> tuple[Tensor, Gradients]:
    """The gradient of z, which is the residual's, and the sums of every set and parameter.

    Σ g·x̂ is taken as (Σ g·d − low · Σ g)/√(σ² + ε), so that x̂ is never written.
    """
    d = _shifted(x, s, formula)
    gz = gy
    if formula.activation is not None:
        z = _z(d, s, formula, weight, bias, residual, d if own else None)
        gz = ACTIVATIONS[formula.activation].backward(gy, z)
    gz = _kept(gz, mask)
    # Sum first over the parts where no parameter varies: both kinds of sums go on from there.
    params = [t for t in (weight, bias) if t is not None]
    rest = [i for i in formula.inside if all(t.shape[i] == 1 for t in params)]
    g_sum, gx_sum = _sum(gz, rest), _sum(gz * d, rest)
    gx_sum = gx_sum if s.low is None else gx_sum - s.low * g_sum
    gx_sum = gx_sum if s.rstd is None else gx_sum * s.rstd
    set_g, set_gx = (
        _sum(t if weight is None else t * weight, [i for i in formula.inside if i not in rest]) for t in (g_sum, gx_sum)
    )
    g = gz if weight is None or _per_set(weight, formula) else gz * weight
    return gz, Gradients(
        g, d, set_g, set_gx,
        None if weight is None else sum_to(gx_sum, weight),
        None if bias is None else sum_to(g_sum, bias),
    )  # fmt: skip


def backward_apply(
    sums: Gradients,
    s: Statistics,
    formula: Formula,
    weight: Tensor | None,
    mask: Tensor | None,
    *,
    fixed: bool,
    own: bool,
) -> Tensor:
    """The gradient of x: (g − mean_S g − x̂ · mean_S(g·x̂))/√(σ²_S + ε), as A·g + B·d + C with three numbers per set.

    Args:
        sums: What `backward_reduce` returned.
        s: The statistics of the forward.
        formula: Leaves out the first mean where nothing was centred, the second and the root where nothing was scaled.
        weight: γ.
        mask: Cells to keep, or None for all.
        fixed: Whether the moments were given, so that only A·g is left.
        own: Whether temporaries may be overwritten.
    """
    dx = sums.g * _product(s.rstd, weight if weight is not None and _per_set(weight, formula) else None)
    if fixed:
        return _kept(dx, mask)
    count = _count(dx, formula.inside, mask)
    c = sums.set_g / count if formula.center else None
    if s.rstd is not None:
        b = sums.set_gx / count * s.rstd * s.rstd
        dx = dx.addcmul_(sums.d, -b) if own else dx - sums.d * b
        c = None if c is None else c * s.rstd if s.low is None else c * s.rstd - b * s.low
    if c is not None:
        dx = dx.sub_(c) if own else dx - c
    return _kept(dx, mask)


def sum_to(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the parts along which `like` has size one."""
    return _sum(x, [i for i, (size, kept) in enumerate(zip(x.shape, like.shape, strict=True)) if size != kept == 1])


def _shifted(x: Tensor, s: Statistics, formula: Formula) -> Tensor:
    return x - s.high if formula.center else x


def _z(
    d: Tensor,
    s: Statistics,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """γ · x̂ + β + residual, with one multiplication where γ is the same for a whole set.

    Nothing is overwritten where `keep` is None; else everything but `keep`.
    """
    low = s.low if formula.center else None
    factor: Tensor | float | None = s.rstd
    if weight is not None and _per_set(weight, formula):
        factor, weight = _product(s.rstd, weight), None
    shift = None if low is None else -low if factor is None else -low * factor
    if weight is None and bias is not None and _per_set(bias, formula):
        shift, bias = (bias if shift is None else shift + bias), None
    z = d
    for operation, operand in (("mul", factor), ("add", shift), ("mul", weight), ("add", bias), ("add", residual)):
        if operand is not None:
            overwrite = keep is not None and z is not keep
            z = getattr(z, operation + "_" if overwrite else operation)(operand)
    return z


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | float:
    if a is None:
        return 1.0 if b is None else b
    return a if b is None else a * b


def _per_set(param: Tensor, formula: Formula) -> bool:
    return all(param.shape[i] == 1 for i in formula.inside)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0)


def _count(x: Tensor, inside: Sequence[int], mask: Tensor | None) -> int | Tensor:
    if mask is None:
        return max(math.prod([x.shape[i] for i in inside]), 1)  # an empty set has mean 0 and variance 0
    return mask.expand(x.shape).sum(tuple(inside), keepdim=True).clamp(min=1)


def _sum(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum over dims, kept with size one; on a CPU the result depends neither on the layout's loops nor on the batch.

    torch adds pairwise only inside one run of memory, and what several runs hold one after the other (5 times the
    error, for channels_last groups): so each run has a sum of its own. It also cuts the sum of a *single* output into
    one piece per thread, in another order than the same row of a batch: seen twice through a stride of zero, the row
    takes the path of a batch of two.
    """
    if not dims:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.sum(tuple(dims), keepdim=True)
    if not _dense(x):  # torch's loops over gaps depend on the threads
        x = x.contiguous()
    for run in _runs(x, dims):
        if all(i in run or size == 1 for i, size in enumerate(x.shape)):
            x = x.expand(2, *x.shape).sum([d + 1 for d in run], keepdim=True)[0]
        else:
            x = x.sum(run, keepdim=True)
    return x


def _dense(x: Tensor) -> bool:
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


def _runs(x: Tensor, dims: Sequence[int]) -> list[list[int]]:
    """The dims, those that follow each other in memory together, the outermost first."""
    strides = x.stride()
    runs: list[list[int]] = []
    for d in sorted(dims, key=lambda d: -strides[d]):
        if runs and (x.shape[d] == 1 or strides[runs[-1][-1]] == strides[d] * x.shape[d]):
            runs[-1].append(d)
        else:
            runs.append([d])
    return runs
