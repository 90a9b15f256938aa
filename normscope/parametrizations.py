"""Normalizers of weights, as parametrizations: torch's own, weight standardization, and `bake` to leave them behind."""

from __future__ import annotations

import contextlib

from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from normscope.errors import ArgumentError
from normscope.functional.normalize import normalize

__all__ = ["bake", "orthogonal", "spectral_norm", "weight_norm", "weight_standardization"]

# S: all weights of an output channel, which lie on axis 0, or, in a transposed convolution, on axis 1.
_SCOPES = {0: "o [...]", 1: "[i] o [...]"}


class _WeightStandardization(Module):
    """Ŵ of `weight_standardization`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, weight: Tensor) -> Tensor:
        """Ŵ from W."""
        return normalize(weight, _SCOPES[self.dim], eps=self.eps)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight is an original; a standardized one is its own up to ε."""
        return weight

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, eps={self.eps}"


def weight_standardization(module: Module, name: str = "weight", eps: float = 1e-5, dim: int = 0) -> Module:
    """Normalize the weights of every output channel to mean 0 and variance 1 whenever they are used.

    Ŵ_o = (W_o − μ_o)/√(σ²_o + ε), S = the weights that one output channel is computed from. It goes before a
    normalizer that brings the scale back, usually GroupNorm.

    Args:
        module: A layer, changed in place; its parameter becomes `parametrizations.<name>.original`.
        name: The parameter, with two axes or more.
        eps: ε.
        dim: The axis of the output channels: 0, and 1 in a transposed convolution.

    Returns:
        The module.

    Raises:
        ArgumentError: `dim` is neither, or a channel has one weight.

    Source: Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    eq. 4-6.

    Example:
        >>> import torch, normscope as ns
        >>> conv = ns.parametrizations.weight_standardization(torch.nn.Conv2d(3, 8, 3))
        >>> bool(conv.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """
    if dim not in _SCOPES:
        raise ArgumentError(f"dim must be 0 or 1, but got {dim}", cure="0 for all but transposed convolutions")
    weight = getattr(module, name)
    if weight.numel() == weight.shape[dim]:
        raise ArgumentError(
            f"{name} of shape {tuple(weight.shape)} has one weight per channel, which would become zero",
            cure="leave this layer out",
        )
    return parametrize.register_parametrization(module, name, _WeightStandardization(dim, eps))


def bake(model: Module) -> Module:
    """Make every parametrized parameter of a model a plain one that holds the value used in evaluation.

    For after training: the function in evaluation stays, `state_dict` gets its plain keys back, and nothing is computed
    per forward any more. Where a parametrization has one original, that Parameter object stays, so that an optimizer
    could go on with it. Weight and spectral norm of `torch.nn.utils` are baked, too.

    Args:
        model: The model, changed in place.

    Returns:
        The model.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        >>> list(ns.parametrizations.bake(layer).state_dict())
        ['bias', 'weight']
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # spectral norm would take another step of its power iteration
    try:
        for module in list(model.modules()):
            for remove in (remove_weight_norm, remove_spectral_norm):
                with contextlib.suppress(ValueError):  # what they raise where there is none
                    remove(module)
            if parametrize.is_parametrized(module):
                _take_own_class(module)
                for name in list(module.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(module, name)
    finally:
        for module, training in modes:
            module.training = training
    return model


def _take_own_class(module: Module) -> None:
    """torch makes a class per parametrized module and takes the property out of it, which deep copies of it share."""
    cls = type(module)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)
