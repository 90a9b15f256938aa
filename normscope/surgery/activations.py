"""Which activation a module or a function is, by its values."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from normscope.kernels.activations import ACTIVATIONS
from normscope.surgery.traits import base_of

__all__ = ["activation_of", "name_of_function"]

# Beyond these an activation of the table is linear or constant to the last digit; kinks at ±3 and 6 are on the grid.
_GRID = torch.linspace(-40, 40, 1601, dtype=torch.float64)
# Where a class without parameters is a function, whatever mode it is in.
_HOMES = ("torch.nn.modules.activation", "timm.layers", "transformers.activations")
_FUNCTIONS: tuple[Any, ...] = (
    torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_,
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.silu, F.gelu, F.mish, F.sigmoid, F.tanh,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_,
    Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_,
)  # fmt: skip


def activation_of(module: Module) -> str | None:
    """The name under which a normalizer can take up an activation module; None for any other module."""
    cls = base_of(type(module))
    if not cls.__module__.startswith(_HOMES) or module._modules or module._parameters or module._buffers:
        return None
    return _named(lambda x: cls.forward(module, x))


def name_of_function(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The same of a function of torch with its further arguments."""
    return _named(lambda x: function(x, *args, **kwargs)) if function in _FUNCTIONS else None


def _named(function: Callable[[Tensor], Any]) -> str | None:
    with torch.no_grad(), warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        y = function(_GRID.clone())
        for name, activation in ACTIVATIONS.items():
            # Some write the constants of their formula with ten digits.
            if torch.allclose(y, activation.forward(_GRID), rtol=1e-8, atol=1e-8):
                return name
    return None
