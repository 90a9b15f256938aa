"""From what a user passes to what a kernel takes: checks, the view through the parts, the choice of a door."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from normscope.errors import ArgumentError, DegenerateScopeError, DtypeError
from normscope.functional import compiled, graph, shortcut
from normscope.functional.autograd import Operands, is_plain, normalize_parts
from normscope.functional.running import Running, update_running
from normscope.functional.view import View, scope_of, view_of
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.activations import ACTIVATIONS
from normscope.kernels.formula import Formula

__all__ = [
    "Normalized",
    "View",
    "apply",
    "check_activation",
    "check_degenerate",
    "check_dtype",
    "run",
    "scope_of",
    "view_of",
]

# The names that torch's own messages give the kinds of numbers it cannot normalize.
_SCALAR_NAMES = {
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.complex32: "ComplexHalf",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def check_dtype(x: Tensor, what: str) -> None:
    """Refuse tensors that hold no real floating-point numbers, in torch's words."""
    if x.dtype not in COMPUTE_DTYPE:
        name = _SCALAR_NAMES.get(x.dtype, str(x.dtype))
        raise DtypeError(
            f"\"{what}\" not implemented for '{name}'",
            shape=tuple(x.shape),
            cure=f"convert the input first, e.g. x.float(); it is {x.dtype}",
        )


def check_activation(activation: str | None) -> None:
    """Refuse an activation that is not in the table."""
    if activation is not None and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ArgumentError(f"activation {activation!r} is unknown", cure=f"use None or one of {known}")


def check_degenerate(view: View) -> None:
    """Refuse to centre over sets of one cell."""
    if view.cells == 1:
        raise DegenerateScopeError(
            f"every set of {view.scope.pattern!r} holds one cell, so x − mean is zero everywhere",
            shape=view.shape,
            cure="average over more axes, pass a larger batch or map, or give moments=",
        )


class Normalized(NamedTuple):
    """What `apply` returns.

    Attributes:
        y: The result.
        view: How x was seen.
        recipe: What the compiled kernels followed, or None where the eager ones ran.
        statistics: Of the compiled kernels five rows, of the eager ones mean and variance.
    """

    y: Tensor
    view: View
    recipe: compiled.Recipe | None
    statistics: Tensor | tuple[Tensor, Tensor]

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of every set, size one in the averaged parts, in the dtype of the computation."""
        return self.statistics if isinstance(self.statistics, tuple) else self.recipe.moments(self.statistics)  # type: ignore[union-attr]


def apply(
    x: Tensor,
    view: View,
    formula: Formula,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    mask: Tensor | None = None,
    running: Running | None = None,
    way: Hashable = None,
) -> Normalized:
    """Normalize, and move the running statistics by what was found.

    weight and bias have the params' shape, mask, mean and var already broadcast through the parts; `way` is what
    `shortcut.enter` will find this call by.
    """
    check_activation(formula.activation)
    residual = view.residual(residual)
    recipe = None
    if is_plain():
        recipe = compiled.recipe_of(x, view, formula, weight is not None or bias is not None, mean, var)
    if recipe is not None:
        moved = running if running is not None and recipe.tracks(x, running, mask) else None
        y, statistics = compiled.normalize(recipe, x, weight, bias, residual, mean, var, mask, moved)
        done = Normalized(y, view, recipe, statistics)
        if way is not None and mask is None and (running is None or moved is not None):
            shortcut.learn(way, recipe, x, weight, bias, moved, mean)
    elif graph.serves(x, mean, var):
        moved = None
        y, mean, var = graph.normalize(view, formula, x, weight, bias, residual, mean, var, mask)
        done = Normalized(y, view, None, (mean, var))
    else:
        moved = None
        y, mean, var = normalize_parts(Operands.seen(view, x, weight, bias, residual, mean, var, mask), formula)
        done = Normalized(y.reshape(view.shape) if view.scope.splits else y, view, None, (mean, var))
    if running is not None and moved is None:
        update_running(running[:2], done.moments, view, mask, running.momentum, formula)
    return done


def run(
    x: Tensor,
    view: View,
    formula: Formula,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`apply` for who needs y, and the mean and variance of every set with size one in the averaged parts."""
    done = apply(x, view, formula, weight=weight, bias=bias, residual=residual, mean=mean, var=var, mask=mask)
    return done.y, *done.moments
