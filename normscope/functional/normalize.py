"""`normalize`, `moments` and `plan`: the notation applied to tensors."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normscope import kernels
from normscope.errors import ArgumentError, ShapeError
from normscope.functional import compiled, shortcut
from normscope.functional.core import View, apply, check_degenerate, check_dtype, view_of
from normscope.kernels import COMPUTE_DTYPE, eager
from normscope.kernels.formula import Formula
from normscope.scope import Plan, make_plan

__all__ = ["Moments", "moments", "normalize", "plan"]


class Moments(NamedTuple):
    """Mean and variance of every set of a scope.

    Attributes:
        mean: μ_S, in float32 or wider, with the axes outside S in pattern order; zeros where nothing is centred.
        var: σ²_S, biased (divided by the count), in the units of x squared; the mean square where nothing is centred.
        count: The number of cells that entered each set, int64; not needed where moments are passed to `normalize`.
    """

    mean: Tensor
    var: Tensor
    count: Tensor | None = None  # type: ignore[assignment] # shadows tuple.count on purpose


def normalize(
    x: Tensor,
    scope: str,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    params: str = "c",
    eps: float = 1e-5,
    center: bool = True,
    scale: bool = True,
    mask: Tensor | None = None,
    moments: Moments | tuple[Tensor, Tensor] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    **sizes: int,
) -> Tensor:
    """Normalize over any scope: y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual).

    Not `torch.nn.functional.normalize`, which divides by a norm to give vectors of unit length.

    Args:
        x: Any floating-point tensor; its axes are those that the pattern names.
        scope: The notation: axes in order, brackets around those averaged over, e.g. "[n] c [h w]" (see DESIGN).
        weight: γ, with the sizes of the `params` axes in the order named.
        bias: β, of the same shape.
        params: The axes of weight and bias; any part of a split stands for the whole axis.
        eps: ε, added to the variance.
        center: Subtract the mean; without it the variance is the mean square (RMSNorm).
        scale: Divide by the root; without it only the mean is removed.
        mask: Boolean, True = keep; of x's rank, or without the axis named c. Other cells enter no statistic, get no
            gradient and come out 0, residual included.
        moments: Given (mean, variance) with the axes outside S in pattern order, in place of the data's.
        activation: None, relu, relu6, leaky_relu, elu, silu, gelu, gelu_tanh, mish, sigmoid, tanh, hardswish or
            hardsigmoid.
        residual: A tensor of x's shape, added before the activation.
        **sizes: The sizes of split factors, all but one of each split, e.g. g=32.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        NotationError: The pattern cannot be read.
        ShapeError: A tensor does not fit the pattern.
        DegenerateScopeError: Centring over one cell would return zeros.

    Example:
        >>> import torch, normscope as ns
        >>> x = torch.arange(12.0).reshape(2, 6)
        >>> ns.normalize(x, "n (g [c])", g=3).round(decimals=3)
        tensor([[-1.,  1., -1.,  1., -1.,  1.],
                [-1.,  1., -1.,  1., -1.,  1.]])
    """
    tensors = (x, weight, bias, mask, residual, *(() if moments is None else moments[:2]))
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            normalize, tensors, x, scope, weight=weight, bias=bias, params=params, eps=eps, center=center, scale=scale,
            mask=mask, moments=moments, activation=activation, residual=residual, **sizes,
        )  # fmt: skip
    way = (scope, params, eps, center, scale, activation, *sizes.items())
    if mask is None and moments is None and (y := shortcut.enter(way, x, weight, bias, residual)) is not None:
        return y
    check_dtype(x, "normalize")
    if eps < 0:
        raise ArgumentError(f"eps must be non-negative, but got {eps}", cure="the usual value is 1e-5")
    needs_params = weight is not None or bias is not None or params != "c"
    view = view_of(x, scope, sizes, params if needs_params else None)
    _check_params(view, params, weight=weight, bias=bias)
    if moments is None and center:
        check_degenerate(view)
    mean, var = (None, None) if moments is None else _given(view, moments)
    formula = Formula(view.inside, eps, center, scale, activation)
    return apply(
        x, view, formula, weight=weight, bias=bias, residual=residual, mean=mean, var=var,
        mask=view.mask(mask, view.channels), way=None if moments is not None else way,
    ).y  # fmt: skip


def moments(x: Tensor, scope: str, *, center: bool = True, mask: Tensor | None = None, **sizes: int) -> Moments:
    """Mean, biased variance and count of every set of a scope; differentiable.

    Args:
        x: Any floating-point tensor.
        scope: The notation, as in `normalize`.
        center: Without it the mean is 0 and the variance is the mean square.
        mask: As in `normalize`; a set with no cell kept has mean 0, variance 0 and count 0.
        **sizes: The sizes of split factors.

    Returns:
        Three tensors with the axes outside S in pattern order, e.g. (n, g) for "n (g [c]) [h w]".

    Example:
        >>> import torch, normscope as ns
        >>> ns.moments(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), "n [c]")
        Moments(mean=tensor([2., 2.]), var=tensor([1., 0.]), count=tensor([2, 2]))
    """
    if has_torch_function_variadic(x, mask):
        return handle_torch_function(moments, (x, mask), x, scope, center=center, mask=mask, **sizes)
    check_dtype(x, "moments")
    view = view_of(x, scope, sizes)
    parts = view.unfold(x).to(COMPUTE_DTYPE[x.dtype])
    keep = view.mask(mask, view.channels)
    if keep is not None:
        parts = torch.where(keep, parts, 0)
    stats = eager.statistics(parts, Formula(view.inside, 0.0, center), keep)
    mean = view.sets(stats.mean)
    if keep is None:
        count = torch.full_like(mean, view.cells, dtype=torch.int64)
    else:
        count = view.sets(keep.expand(view.sizes).sum(view.inside, keepdim=True))
    return Moments(mean, view.sets(stats.var), count)


def plan(x: Tensor, scope: str, **sizes: int) -> Plan:
    """How a tensor will be normalized: the sets, where they lie, the loop order, the kernel, the bytes moved.

    Args:
        x: The tensor; only its sizes, strides, dtype and device matter.
        scope: The notation, as in `normalize`.
        **sizes: The sizes of split factors.

    Example:
        >>> import torch, normscope as ns
        >>> print(ns.plan(torch.zeros(32, 64, 56, 56), "[n] c [h w]"))
        normalize '[n] c [h w]' over (32, 64, 56, 56)
          sets    64 (one per c) of 100352 cells
          memory  S(i, j) = {i·0 + j·3136 + p·200704 + q}, i < 1, j < 64, p < 32, q < 3136
          loop    along: 32 runs of 3136 contiguous cells per set
          kernel  cpu: compiled loops (...), float64, float32, bfloat16 and float16, dense tensors
          bytes   forward 51.4 MB (floor 51.4 MB), backward 77.1 MB (floor 77.1 MB)
    """
    check_dtype(x, "plan")
    view = view_of(x, scope, sizes)
    layout = compiled.layout_of(x, view, view.channels or ())
    module = eager if layout is None else compiled.backend_of(x)
    backend = kernels.backends().named(module.__name__.rpartition(".")[2])
    passes = eager.PASSES if layout is None else module.passes(layout)
    return dataclasses.replace(
        make_plan(view.scope, tuple(x.shape), x.stride(), sizes),
        itemsize=x.element_size(),
        kernel=f"{backend.name}: {backend.reason}",
        passes=passes,
    )


def _check_params(view: View, params: str, **tensors: Tensor | None) -> None:
    expected = tuple(view.shape[axis] for axis in view.params)
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)} does not fit an input of shape {view.shape}",
                pattern=view.scope.pattern,
                params=params,
                cure=f"{name} runs over the axes {params!r} and must have the shape {expected}",
            )


def _given(view: View, moments: Moments | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if len(moments) < 2:
        raise ArgumentError(
            "moments must be a mean and a variance", cure="pass (mean, var), or what ns.moments returned"
        )
    expected = tuple(view.sizes[i] for i in view.scope.outside)
    for name, tensor in zip(("mean", "variance"), moments[:2], strict=False):
        if tuple(tensor.shape) != expected:
            raise ShapeError(
                f"a given {name} of shape {tuple(tensor.shape)} does not fit an input of shape {view.shape}",
                pattern=view.scope.pattern,
                cure=f"give one number per set: the axes outside S in pattern order, shape {expected}",
            )
    return view.outside(moments[0]), view.outside(moments[1])
