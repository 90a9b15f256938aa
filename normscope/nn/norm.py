"""`Norm`: the layer of any scope."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.errors import ArgumentError, NotationError, ShapeError
from normscope.functional.core import check_degenerate, check_dtype, run, view_of
from normscope.functional.running import update_running
from normscope.kernels.formula import Formula
from normscope.nn.base import Tracking, normalizes
from normscope.scope import parse

__all__ = ["Norm"]


class Norm(Tracking):
    """A normalizer of any scope: y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual).

    Args:
        scope: The notation, e.g. "[n] c [h w]", "n (g [c]) [h w]" with g=32; see `normscope.normalize`.
        size: The size of γ and β: an int, or one size per axis named in params.
        params: The axes of γ and β; any part of a split stands for the whole axis.
        affine: Learn γ and β.
        bias: Learn β; γ alone without it.
        eps: ε.
        center: Subtract the mean.
        scale: Divide by the root.
        activation: Applied last; see `normscope.normalize`.
        running: Keep running statistics of the params' shape, averaged over the other axes outside S, and normalize by
            them in evaluation.
        momentum: Weight of the newest batch in them; None for the cumulative mean of all batches.
        device: As in torch.
        dtype: As in torch.
        **sizes: The sizes of split factors, all but one of each split.

    Raises:
        NotationError: The pattern or params cannot be read, or running statistics are asked for axes inside S.
        ShapeError: The input does not fit.
        DegenerateScopeError: Centring over one cell would return zeros.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.Norm("n (g [c]) [h w]", 64, g=32, activation="silu")
        Norm('n (g [c]) [h w]', 64, g=32, activation='silu')
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        scope: str,
        size: int | Sequence[int],
        *,
        params: str = "c",
        affine: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        center: bool = True,
        scale: bool = True,
        activation: str | None = None,
        running: bool = False,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        self.scope, self.params, self.sizes = scope, params, sizes
        self.size = (size,) if isinstance(size, int) else tuple(size)
        self.affine, self.running, self.momentum = affine, running, momentum
        self.eps, self.center, self.scale = eps, center, scale
        self.set_activation(activation)
        self._check_notation()
        empty = torch.empty(self.size, device=device, dtype=dtype)
        self.weight = Parameter(empty) if affine else None
        self.bias = Parameter(torch.empty_like(empty)) if affine and bias else None
        self.register_buffer("running_mean", torch.empty_like(empty) if running else None)
        self.register_buffer("running_var", torch.empty_like(empty) if running else None)
        self.register_buffer(
            "num_batches_tracked", torch.zeros((), dtype=torch.long, device=device) if running else None
        )
        self.reset_parameters()

    def _check_notation(self) -> None:
        pattern = parse(self.scope)
        scope = pattern.at(pattern.least)
        axes = scope.param_axes(self.params)
        if len(axes) != len(self.size):
            raise ShapeError(
                f"size {self.size} has {len(self.size)} entries, params {self.params!r} names {len(axes)} axes",
                cure="give one size per axis named in params",
            )
        # An input of the stated sizes, as small as it can be otherwise.
        given = [
            math.prod([self.sizes.get(part.name, 1) for part in scope.parts if part.axis == k])
            for k in range(scope.rank)
        ]
        scope.unfold([self.size[axes.index(k)] if k in axes else n for k, n in enumerate(given)], self.sizes)
        if self.eps < 0:
            raise ArgumentError(f"eps must be non-negative, but got {self.eps}", cure="the usual value is 1e-5")
        inside = [part.name for part in scope.parts if part.averaged and part.axis in axes]
        if self.running and inside:
            raise NotationError(
                f"running statistics of {self.params!r} need these axes outside the scope, {inside[0]!r} is averaged",
                pattern=self.scope,
                cure="running=False, or a scope with the params axes outside its brackets, as '[n] c [h w]'",
            )

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, running mean 0 and variance 1."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, no batch seen."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize over the scope, in evaluation by the running statistics where there are any.

        Args:
            input: A tensor that fits the pattern.
            residual: Added before the activation.
            mask: True = keep; input's shape, or without the axis named c.
        """
        check_dtype(input, "Norm")
        view = view_of(input, self.scope, self.sizes, self.params)
        if tuple(input.shape[axis] for axis in view.params) != self.size:
            raise ShapeError(
                f"size {self.size} does not fit an input of shape {tuple(input.shape)}",
                pattern=self.scope,
                params=self.params,
                cure="build the layer with the sizes of the input's params axes",
            )
        keep = view.mask(mask, view.channels)
        running = (self.running_mean, self.running_var)
        by_data = self.training or self.running_mean is None or self.running_var is None
        if by_data and self.center:
            check_degenerate(view)
        formula = Formula(view.scope.inside, self.eps, self.center, self.scale, self.activation)
        mean, var = (None, None) if by_data else (None if t is None else view.param(t) for t in running)
        output, mean, var = run(
            input, view, formula, weight=self.weight, bias=self.bias, residual=residual, mean=mean, var=var, mask=keep
        )
        if self.training and self.num_batches_tracked is not None:
            update_running(running, (mean, var), view, keep, self.batch_weight(True), formula)
            self.count_batch(True)
        return output

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        size = self.size[0] if len(self.size) == 1 else self.size
        defaults = {"params": "c", "affine": True, "eps": 1e-5, "center": True, "scale": True, "running": False}
        shown = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        if self.affine and self.bias is None:
            shown["bias"] = False
        if self.running and self.momentum != 0.1:
            shown["momentum"] = self.momentum
        if self.activation is not None:
            shown["activation"] = self.activation
        return ", ".join(
            [repr(self.scope), str(size), *(f"{name}={value!r}" for name, value in {**self.sizes, **shown}.items())]
        )
