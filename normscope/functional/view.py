"""A tensor seen through the parts of a scope: where the sets, the parameters, a mask and a residual lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normscope.errors import DtypeError, ShapeError
from normscope.scope import Part, Scope, parse

__all__ = ["View", "scope_of", "view_of"]


def scope_of(pattern: str, rank: int) -> Scope:
    """The scope that a pattern means for tensors of a rank."""
    if torch.compiler.is_compiling():  # the compiler takes only plain tuples for constants
        return Scope(pattern, tuple(Part(*fields) for fields in _parts(pattern, rank)))
    return parse(pattern).at(rank)


def _parts(pattern: str, rank: int) -> tuple[tuple[str, int, bool, int], ...]:
    return tuple((part.name, part.axis, part.averaged, part.column) for part in parse(pattern).at(rank).parts)


# What torch.compiler.assume_constant_result does, without importing the compiler (1 s) for those who never compile.
_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class View:
    """A tensor seen through the parts of a scope.

    Attributes:
        scope: The scope at x's rank.
        shape: The sizes of x's axes.
        sizes: The sizes of the parts.
        params: The axes that weight and bias run over, in their order.
        inside: The averaged parts.
        cells: |S|.
        origin: What `view_of` was called with besides the shape.
        recipes: What the compiled kernels need for a tensor seen so, by its strides and formula.
    """

    scope: Scope
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    params: tuple[int, ...]
    inside: tuple[int, ...]
    cells: int
    origin: tuple[str, tuple[tuple[str, int], ...], str | None]
    recipes: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

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
        """A residual of x's shape."""
        if residual is None or residual.shape == self.shape:
            return residual
        try:
            return residual.expand(self.shape)
        except RuntimeError:
            raise ShapeError(
                f"a residual of shape {tuple(residual.shape)} does not fit an input of shape {self.shape}",
                cure="pass a residual of the input's shape",
            ) from None


def view_of(x: Tensor, pattern: str, sizes: Mapping[str, int], params: str | None = None) -> View:
    """See x through the parts of a pattern."""
    if not torch.compiler.is_compiling():
        try:
            return _kept(pattern, tuple(x.shape), tuple(sizes.items()), params)
        except TypeError:  # symbolic sizes, which tracers put in, have no hash
            pass
    return _view(pattern, tuple(x.shape), tuple(sizes.items()), params)


def _view(pattern: str, shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...], params: str | None) -> View:
    scope = scope_of(pattern, len(shape))
    axes = () if params is None else scope.param_axes(params)
    parts, inside = scope.unfold(shape, dict(sizes)), scope.inside
    origin = (pattern, sizes, params)
    return View(scope, shape, parts, axes, inside, math.prod([parts[i] for i in inside]), origin)


_kept = lru_cache(maxsize=4096)(_view)
