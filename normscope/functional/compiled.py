"""The door to the compiled kernels.

What a call needs besides its tensors is worked out once per view, strides and formula, and kept with the view. Between
two kernels lie a few short Python steps and one operator each way: on small tensors they cost more than the sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normscope.functional.autograd import Operands, gradients
from normscope.functional.view import View
from normscope.kernels import cpu
from normscope.kernels.formula import Formula

__all__ = ["Recipe", "layout_of", "normalize", "recipe_of"]

_KEPT = 64  # recipes per view; a view is one shape, so more means strides that never come back


class Recipe(NamedTuple):
    """How the compiled kernels compute one formula on tensors seen one way.

    Attributes:
        view: How x is seen.
        formula: The switches and the activation.
        layout: The order of the loops.
        natural: Whether weight and bias lie in memory in the order in which the loops meet them.
    """

    view: View
    formula: Formula
    layout: cpu.Layout
    natural: bool

    def param(self, t: Tensor | None) -> Tensor | None:
        """A weight or bias as the kernels read it."""
        if t is None or (self.natural and t.dtype == torch.float32 and t.is_contiguous()):
            return t
        return cpu.flat(self.view.param(t), self.view.sizes, self.layout.params)

    def param_gradient(self, gradient: Tensor | None, t: Tensor | None) -> Tensor | None:
        """The other way, for the gradient of t."""
        if gradient is None or t is None:
            return None
        if not self.natural:
            gradient = self.view.fold_param(cpu.unflat(gradient, self.view.sizes, self.layout.params))
        if t.dim() > 1:
            gradient = gradient.view(t.shape)
        return gradient if t.dtype == torch.float32 else gradient.to(t.dtype)

    def moments(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, size one in the averaged parts."""
        shape, order = self.view.sizes, self.layout.sets
        return cpu.unflat(statistics[0] + statistics[1], shape, order), cpu.unflat(statistics[2], shape, order)


def recipe_of(
    x: Tensor, view: View, formula: Formula, learned: bool, mean: Tensor | None, var: Tensor | None
) -> Recipe | None:
    """The recipe, or None where the eager kernels serve; `learned` says that there is a weight or a bias."""
    if not x.is_cpu or x.dtype not in cpu.DTYPES or cpu.missing():
        return None
    if (mean is not None and mean.requires_grad) or (var is not None and var.requires_grad):
        return None
    key = (x.stride(), formula, learned)
    if key not in view.recipes:
        if len(view.recipes) >= _KEPT:
            view.recipes.clear()
        view.recipes[key] = _recipe(x, view, formula, learned)
    found: Recipe | None = view.recipes[key]
    return found


def _recipe(x: Tensor, view: View, formula: Formula, learned: bool) -> Recipe | None:
    layout = layout_of(x, view, view.params if learned else ())
    if layout is None:
        return None
    parts = range(len(view.sizes))
    met = [i for axis in view.params for i in parts if view.scope.parts[i].axis == axis and view.sizes[i] != 1]
    return Recipe(view, formula, layout, not learned or met == list(layout.params))


def layout_of(x: Tensor, view: View, params: tuple[int, ...]) -> cpu.Layout | None:
    """How the compiled kernels see a tensor, or None where the eager ones serve it."""
    if not x.is_cpu or x.dtype not in cpu.DTYPES or x.numel() == 0 or cpu.missing():
        return None
    varies = tuple(part.axis in params for part in view.scope.parts)
    return cpu.layout_of(view.sizes, view.unfold(x.detach()).stride(), view.inside, varies)


def normalize(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the statistics; residual of x's shape, mean, var and mask broadcast through the parts."""
    if mask is not None:
        dense = torch.empty_like(x, dtype=torch.bool)
        recipe.view.unfold(dense).copy_(mask)
        mask = dense
    if torch.is_grad_enabled():
        result: tuple[Tensor, Tensor] = _Compiled.apply(recipe, x, weight, bias, residual, mean, var, mask)  # type: ignore[no-untyped-call]
        return result
    return _forward(recipe, x, weight, bias, residual, mean, var, mask)


def _forward(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if mean is None or var is None:
        mean = var = None
    else:
        mean, var = (cpu.flat(t, recipe.view.sizes, recipe.layout.sets) for t in (mean, var))
    return cpu.forward(
        x, recipe.layout, recipe.formula, recipe.param(weight), recipe.param(bias), _like(residual, x), mask, mean, var
    )


class _Compiled(torch.autograd.Function):
    """The formula with its hand-derived gradient, on the compiled kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, statistics = _forward(recipe, x, weight, bias, residual, mean, var, mask)
        # A residual serves only to compute z again; for the gate of a ReLU y does, which the next layer keeps anyway.
        # (float16 has one kind of loop for all activations, which reads z.)
        gated = residual is not None and recipe.formula.activation == "relu" and x.dtype != torch.float16
        kept = residual if recipe.formula.activation is not None and not gated else None
        ctx.recipe = recipe
        ctx.save_for_backward(x, weight, bias, kept, mean, var, mask, y if gated else None, statistics)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gy = grads[0]
        if gy is None:
            return (None,) * 8
        recipe: Recipe = ctx.recipe
        x, weight, bias, residual, mean, var, mask, y, statistics = ctx.saved_tensors  # once: checkpoints allow no more
        _, needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # under create_graph the gradient itself must be differentiable
            needs = Operands(*ctx.needs_input_grad[1:])
            return None, *_differentiable(recipe, gy, (x, weight, bias, residual, mean, var, mask), y, needs)
        g = cpu.backward(
            _like(gy, x), x, recipe.layout, recipe.formula, recipe.param(weight), recipe.param(bias),
            _like(residual, x), y, mask, statistics, fixed=mean is not None, needs_x=needs_x,
            needs_params=needs_weight or needs_bias, needs_residual=needs_residual,
        )  # fmt: skip
        dweight, dbias = recipe.param_gradient(g.weight, weight), recipe.param_gradient(g.bias, bias)
        return None, g.x, dweight, dbias, g.residual, None, None, None


def _differentiable(
    recipe: Recipe, gy: Tensor, saved: tuple[Any, ...], y: Tensor | None, needs: Operands
) -> list[Tensor | None]:
    """The gradients as functions of x and gy, in torch operators."""
    view, formula = recipe.view, recipe.formula
    x, weight, bias, residual, mean, var, mask = saved
    keep = None if mask is None else view.unfold(mask)
    operands = Operands.seen(view, x, weight, bias, residual, mean, var, keep)
    if y is not None:  # the gate has no derivative of its own
        gy = torch.where(y <= 0, 0, gy)
        formula = formula._replace(activation=None)
    dx, dweight, dbias, dresidual, dmean, dvar, _ = gradients(view.unfold(gy), operands, None, formula, needs)
    if y is not None and needs.residual:
        dresidual = view.unfold(gy if mask is None else torch.where(mask, gy, 0))
    whole = [None if t is None else t.reshape(view.shape) for t in (dx, dresidual)]
    params = [None if t is None else view.fold_param(t) for t in (dweight, dbias)]
    return [whole[0], *params, whole[1], dmean, dvar, None]


def _like(t: Tensor | None, x: Tensor) -> Any:
    """A tensor with x's dtype and strides."""
    if t is None or (t.stride() == x.stride() and t.dtype == x.dtype):
        return t
    return torch.empty_like(x).copy_(t)
