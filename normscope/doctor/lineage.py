"""Lineage: what a tensor has been through since its last normalizer, followed through one traced forward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Lineage", "Mark"]

_CHANNELS_LAST: tuple[type[Module], ...] = (
    torch.nn.Linear, torch.nn.Embedding, torch.nn.RNNBase, torch.nn.MultiheadAttention, torch.nn.LayerNorm,
    torch.nn.RMSNorm,
)  # fmt: skip
_CHANNELS_SECOND = (torch.nn.modules.conv._ConvNd,)
_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.dropout_, torch.feature_dropout,
}  # fmt: skip
# What changes the shape, or nothing: a normalizer's output stays one.
_MOVES = {
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, Tensor.permute, Tensor.transpose, Tensor.squeeze,
    Tensor.unsqueeze, Tensor.to, Tensor.float, Tensor.clone, Tensor.unflatten, torch.flatten, torch.permute,
    torch.transpose, torch.squeeze, torch.unsqueeze, torch.reshape, torch.movedim, Tensor.movedim, torch.clone,
}  # fmt: skip
_RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, torch._C._nn.relu6}
_POINTWISE = {
    *_RECTIFIERS, F.gelu, F.silu, F.elu, F.leaky_relu, torch.tanh, torch.sigmoid, Tensor.tanh, Tensor.sigmoid,
    Tensor.add, Tensor.mul, Tensor.sub, Tensor.add_, Tensor.mul_, Tensor.__add__, Tensor.__mul__, torch.add, torch.mul,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """What is known about a tensor.

    Attributes:
        axis: Where the module that made it put its features, counted from the front.
        norm: The normalizer whose output it is, but for its shape and dropout.
        dropout: Whether dropout lies between the last normalizer and here.
    """

    axis: int | None = None
    norm: str | None = None
    dropout: bool = False


_NOTHING = Mark()


class Lineage:
    """The marks of living tensors: kept beside them, because an attribute of a tensor is part of the model's state."""

    def __init__(self) -> None:
        self._marks = WeakTensorKeyDictionary()
        self.rectified: set[str] = set()

    def of(self, value: Any) -> Mark:
        """The mark of a tensor."""
        known = isinstance(value, Tensor) and value in self._marks
        return cast(Mark, self._marks[value]) if known else _NOTHING

    def norms(self, output: Any) -> tuple[str, ...]:
        """The normalizers whose output is among these tensors."""
        marks = (self.of(leaf) for leaf in pytree.tree_leaves(output))
        return tuple(dict.fromkeys(mark.norm for mark in marks if mark.norm is not None))

    def function(self, function: Any, args: Iterable[Any], output: Any) -> None:
        """A function of torch has run."""
        inputs = [leaf for leaf in pytree.tree_leaves(list(args)) if isinstance(leaf, Tensor)]
        marks = [self.of(x) for x in inputs]
        if function in _RECTIFIERS:
            self.rectified.update(mark.norm for mark in marks if mark.norm is not None)
        first = marks[0] if marks else _NOTHING
        if function in _DROPOUTS:
            made = replace(first, dropout=True)
        elif function in _MOVES:
            made = replace(first, axis=None)
        else:
            axes = {mark.axis for mark in marks} - {None}
            kept = axes.pop() if function in _POINTWISE and len(axes) == 1 else None
            made = Mark(axis=kept, dropout=any(mark.dropout for mark in marks))
        self._put(made, output)

    def module(self, module: Module, norm: str | None, args: Iterable[Any], output: Any) -> None:
        """A module has run; a normalizer is named."""
        if norm is not None:
            last = isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm))
            for leaf in _tensors(output):
                self._put(Mark(axis=leaf.dim() - 1 if last else 1, norm=norm), leaf)
            return
        dropout = any(self.of(x).dropout for x in _tensors(list(args)))
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            first = next((self.of(x) for x in _tensors(list(args))), _NOTHING)
            self._put(replace(first, dropout=first.dropout or module.p > 0), output)
        elif isinstance(module, _CHANNELS_LAST):
            for leaf in _tensors(output):
                self._put(Mark(axis=leaf.dim() - 1, dropout=dropout), leaf)
        elif isinstance(module, _CHANNELS_SECOND):
            self._put(Mark(axis=1, dropout=dropout), output)

    def _put(self, mark: Mark, output: Any) -> None:
        for leaf in _tensors(output):
            self._marks[leaf] = mark


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
