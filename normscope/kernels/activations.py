"""The activations that can follow a normalizer, each with its derivative.

The derivatives are torch's own backward operators where these differentiate further, and are written out for
silu, mish and hardsigmoid, where they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation"]

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function, and its (gradient of the output, input) → gradient of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(g: Tensor, z: Tensor, sigmoid: Tensor) -> Tensor:
    return g * sigmoid * (1 + z * (1 - sigmoid))


def _mish_backward(g: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return g * (t + z * (1 - t * t) * torch.sigmoid(z))


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda g, z: _aten.threshold_backward(g, z, 0)),
    "relu6": Activation(F.relu6, lambda g, z: _aten.hardtanh_backward(g, z, 0, 6)),
    "leaky_relu": Activation(F.leaky_relu, lambda g, z: _aten.leaky_relu_backward(g, z, 0.01, False)),
    "elu": Activation(F.elu, lambda g, z: _aten.elu_backward(g, 1, 1, 1, False, z)),
    "silu": Activation(F.silu, lambda g, z: _silu_backward(g, z, torch.sigmoid(z))),
    "gelu": Activation(F.gelu, lambda g, z: _aten.gelu_backward(g, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"), lambda g, z: _aten.gelu_backward(g, z, approximate="tanh")
    ),
    "mish": Activation(F.mish, lambda g, z: _mish_backward(g, z, torch.tanh(F.softplus(z)))),
    "sigmoid": Activation(torch.sigmoid, lambda g, z: _aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": Activation(torch.tanh, lambda g, z: _aten.tanh_backward(g, torch.tanh(z))),
    "hardswish": Activation(F.hardswish, lambda g, z: _aten.hardswish_backward(g, z)),
    "hardsigmoid": Activation(F.hardsigmoid, lambda g, z: torch.where((z > -3) & (z < 3), g / 6, 0)),
}
