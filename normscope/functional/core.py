"""From what a user passes to what a kernel takes: checks, the view of a tensor through its parts, dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normscope.errors import ArgumentError, DegenerateScopeError, DtypeError, ShapeError
from normscope.functional.autograd import Operands, normalize_parts
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.activations import ACTIVATIONS
from normscope.kernels.formula import Formula
from normscope.scope import Part, Scope, parse

__all__ = ["View", "check_activation", "check_degenerate", "check_dtype", "run", "scope_of", "view_of"]

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


def scope_of(pattern: str, rank: int) -> Scope:
    """The scope that a pattern means for tensors of a rank."""
    if torch.compiler.is_compiling():  # the compiler takes only plain tuples for constants
        return Scope(pattern, tuple(Part(*fields) for fields in _parts(pattern, rank)))
    return parse(pattern).at(rank)


def _parts(pattern: str, rank: int) -> tuple[tuple[str, int, bool, int], ...]:
    return tuple((part.name, part.axis, part.averaged, part.column) for part in parse(pattern).at(rank).parts)


# What torch.compiler.assume_constant_result does, without importing the compiler (1 s) for those who never compile.
_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


@dataclass(frozen=True)
class View:
    """A tensor seen through the parts of a scope.

    Attributes:
        scope: The scope at x's rank.
        shape: The sizes of x's axes.
        sizes: The sizes of the parts.
        params: The axes that weight and bias run over, in their order.
    """

    scope: Scope
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    params: tuple[int, ...] = field(default=())

    @property
    def cells(self) -> int:
        """|S|."""
        return math.prod([self.sizes[i] for i in self.scope.inside])

    def unfold(self, t: Tensor) -> Tensor:
        """A tensor of x's shape through its parts."""
        return t.reshape(self.sizes) if self.scope.splits else t

    def outside(self, t: Tensor) -> Tensor:
        """A tensor with one number per set, so that it broadcasts against x through its parts."""
        return t.reshape([1 if part.averaged else n for part, n in zip(self.scope.parts, self.sizes, strict=True)])

    def sets(self, t: Tensor) -> Tensor:
        """The other way: size one in the averaged parts → the axes outside S in pattern order."""
        return t.reshape([self.sizes[i] for i in self.scope.outside])

    def param(self, t: Tensor) -> Tensor:
        """A weight or bias, so that it broadcasts against x through its parts."""
        if tuple(self.params) != tuple(sorted(self.params)):
            t = t.permute(sorted(range(len(self.params)), key=self.params.__getitem__))
        return t.reshape(
            [n if part.axis in self.params else 1 for part, n in zip(self.scope.parts, self.sizes, strict=True)]
        )

    def fold_param(self, t: Tensor) -> Tensor:
        """The other way: broadcasting through the parts → the params' shape."""
        ordered = t.reshape([self.shape[axis] for axis in sorted(self.params)])
        if tuple(self.params) != tuple(sorted(self.params)):
            ordered = ordered.permute([sorted(self.params).index(axis) for axis in self.params])
        return ordered

    @property
    def channels(self) -> tuple[int, ...] | None:
        """The axis named c, which a mask may leave out; None where the pattern names none."""
        axis = self.scope.axis_of("c")
        return None if axis is None else (axis,)

    def mask(self, mask: Tensor | None, insert: Sequence[int] | None) -> Tensor | None:
        """A mask that broadcasts against x through its parts.

        Args:
            mask: Boolean, with x's number of axes, or without the axes in `insert`.
            insert: Axes that the mask may leave out; None where the pattern names no axis c.
        """
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            raise DtypeError(f"mask must be boolean, not {mask.dtype}", cure="pass mask != 0; True keeps a cell")
        given, rank = tuple(mask.shape), len(self.shape)
        if insert is not None and mask.dim() == rank - len(insert):
            for axis in sorted(insert):
                mask = mask.unsqueeze(axis)
        if mask.dim() != rank or any(m not in (1, n) for m, n in zip(mask.shape, self.shape, strict=True)):
            short = None if insert is None else tuple(n for k, n in enumerate(self.shape) if k not in insert)
            raise ShapeError(
                f"a mask of shape {given} does not fit an input of shape {self.shape}",
                pattern=self.scope.pattern,
                cure=f"pass a mask that broadcasts to {self.shape}" + (f", or one of shape {short}" if short else ""),
            )
        if not self.scope.splits:
            return mask
        folded = [mask.shape[part.axis] != 1 or self.shape[part.axis] == 1 for part in self.scope.parts]
        return mask.reshape([n if whole else 1 for whole, n in zip(folded, self.sizes, strict=True)])

    def residual(self, residual: Tensor | None) -> Tensor | None:
        """A residual through its parts."""
        if residual is None:
            return None
        if residual.shape != self.shape:
            try:
                residual = residual.expand(self.shape)
            except RuntimeError:
                raise ShapeError(
                    f"a residual of shape {tuple(residual.shape)} does not fit an input of shape {self.shape}",
                    cure="pass a residual of the input's shape",
                ) from None
        return self.unfold(residual)


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
    """Normalize; weight and bias have the params' shape, mask, mean and var already broadcast through the parts.

    Returns:
        y, and the mean and variance of every set with size one in the averaged parts.
    """
    check_activation(formula.activation)
    operands = Operands(
        view.unfold(x),
        None if weight is None else view.param(weight),
        None if bias is None else view.param(bias),
        view.residual(residual),
        mean,
        var,
        mask,
    )
    y, mean, var = normalize_parts(operands, formula)
    return (y.reshape(view.shape) if view.scope.splits else y), mean, var


def view_of(x: Tensor, pattern: str, sizes: Mapping[str, int], params: str | None = None) -> View:
    """See x through the parts of a pattern."""
    scope = scope_of(pattern, x.dim())
    axes = () if params is None else scope.param_axes(params)
    return View(scope, tuple(x.shape), scope.unfold(tuple(x.shape), sizes), axes)
