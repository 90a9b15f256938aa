"""Two doors to one formula.

*Plain eager* goes through the compiled kernels (`compiled.py`) or, where these do not serve, through `_Normalize`: both
save x and a few numbers per set, and compute the gradient from the hand-derived formula. *Everything else*
(torch.compile, torch.export, torch.func, forward mode, tracing) sees the same formula as plain torch operators, so that
every transformation works and nothing of ours is left in an exported graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normscope.functional.view import View
from normscope.kernels import COMPUTE_DTYPE, eager
from normscope.kernels.formula import Formula

__all__ = ["Operands", "gradients", "is_plain", "normalize_parts"]


class Operands(NamedTuple):
    """The tensors of one normalization; all broadcast against x seen through its parts.

    Attributes:
        x: The tensor to normalize.
        weight: γ.
        bias: β.
        residual: Added before the activation.
        mean: Given μ_S instead of the data's.
        var: Given σ²_S.
        mask: Cells to keep.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    mask: Tensor | None

    @staticmethod
    def seen(
        view: View,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        mask: Tensor | None,
    ) -> Operands:
        """From tensors of x's and the params' shape; mean, var and mask broadcast through the parts already."""
        return Operands(
            view.unfold(x),
            None if weight is None else view.param(weight),
            None if bias is None else view.param(bias),
            None if residual is None else view.unfold(residual),
            mean,
            var,
            mask,
        )

    def computed(self) -> Operands:
        """The operands in the dtype of the computation."""
        dtype = COMPUTE_DTYPE[self.x.dtype]
        return Operands(*(t if t is None or t.dtype == torch.bool else t.to(dtype) for t in self))  # type: ignore[arg-type]


def normalize_parts(operands: Operands, formula: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """The formula on a tensor seen through its parts.

    Returns:
        y in x's dtype, and the mean and variance that were used, in the dtype of the computation, with size one in
        the averaged parts; these two are without gradient.
    """
    plain = is_plain()
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if plain and learns:
        y, mean, var = _Normalize.apply(formula, *operands)  # type: ignore[no-untyped-call]
    else:
        y, stats = _forward(operands, formula, own=plain and not torch.is_grad_enabled())
        mean, var = stats.mean.detach(), stats.var.detach()
    return y, mean, var


def is_plain() -> bool:
    """Whether nothing watches the operators: no compiler, no functorch, no forward mode, no tracer, no mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _forward(operands: Operands, formula: Formula, own: bool) -> tuple[Tensor, eager.Statistics]:
    o = _clean(operands.computed())
    stats = _statistics(o, formula)
    y = eager.apply(o.x, stats, formula, o.weight, o.bias, o.residual, o.mask, own)
    return y.to(operands.x.dtype), stats


def _statistics(o: Operands, formula: Formula) -> eager.Statistics:
    if o.mean is not None and o.var is not None:
        return eager.of_moments(o.mean, None, o.var, formula)
    return eager.statistics(o.x, formula, o.mask)


def _clean(o: Operands) -> Operands:
    """Whatever lies outside the mask, NaN included, must not reach a gradient: 0 · NaN is NaN."""
    if o.mask is None:
        return o
    residual = None if o.residual is None else torch.where(o.mask, o.residual, 0)
    return o._replace(x=torch.where(o.mask, o.x, 0), residual=residual)


class _Normalize(torch.autograd.Function):
    """The formula with its hand-derived gradient, in torch operators."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        operands = Operands(*tensors)  # type: ignore[arg-type]
        y, stats = _forward(operands, formula, own=True)
        ctx.formula = formula
        ctx.save_for_backward(*operands, *stats)
        ctx.set_materialize_grads(False)
        mean, var = stats.mean.detach(), stats.var.detach()
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * (1 + len(Operands._fields))
        saved = ctx.saved_tensors  # unpacked once: checkpoints allow no more
        operands, needs = Operands(*saved[:7]), Operands(*ctx.needs_input_grad[1:])
        stats = None if torch.is_grad_enabled() else eager.Statistics(*saved[7:])
        return None, *gradients(grads[0], operands, stats, ctx.formula, needs)


def gradients(
    gy: Tensor, operands: Operands, stats: eager.Statistics | None, formula: Formula, needs: Operands
) -> tuple[Tensor | None, ...]:
    """The gradients in torch operators; without statistics these become functions of x again, as create_graph needs."""
    o = _clean(operands.computed())
    found = _backward(gy.to(o.x.dtype), o, stats or _statistics(o, formula), formula, needs)
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, operands, strict=True))


def _backward(gy: Tensor, o: Operands, stats: eager.Statistics, f: Formula, needs: Operands) -> Operands:
    own = not torch.is_grad_enabled()
    gz, sums = eager.backward_reduce(gy, o.x, stats, f, o.weight, o.bias, o.residual, o.mask, own)
    dx = dmean = dvar = None
    if needs.x:
        dx = eager.backward_apply(sums, stats, f, o.weight, o.mask, fixed=o.mean is not None, own=own)
    if o.mean is not None:
        rstd = 1.0 if stats.rstd is None else stats.rstd
        dmean = eager.sum_to(-rstd * sums.set_g, stats.high) if f.center else None
        dvar = eager.sum_to(-0.5 * rstd * rstd * sums.set_gx, stats.var) if f.scale else None
    return Operands(dx, sums.weight, sums.bias, gz if needs.residual else None, dmean, dvar, None)  # type: ignore[arg-type]
