"""The activations φ and their derivatives φ′ as torch defines them, the derivative at a kink included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTIVATIONS"]

Array = NDArray[np.float64]
Elementwise = Callable[[Array], NDArray[Any]]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -z)))


def _normal(z: Array) -> Array:
    return np.asarray((1 + _erf(z / math.sqrt(2))) / 2)


def _gelu_tanh(z: Array) -> Array:
    return np.asarray(np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _d_gelu_tanh(z: Array) -> Array:
    t, du = _gelu_tanh(z), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)
    return (1 + t) / 2 + z / 2 * (1 - t**2) * du


def _d_mish(z: Array) -> Array:
    t = np.tanh(np.logaddexp(0, z))
    return np.asarray(t + z * (1 - t**2) * _sigmoid(z))


ACTIVATIONS: dict[str | None, tuple[Elementwise, Elementwise]] = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: z > 0),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: (z > 0) & (z < 6)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))), lambda z: np.exp(np.minimum(z, 0))),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * _sigmoid(-z))),
    "gelu": (lambda z: z * _normal(z), lambda z: _normal(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)),
    "gelu_tanh": (lambda z: z / 2 * (1 + _gelu_tanh(z)), _d_gelu_tanh),
    "mish": (lambda z: z * np.tanh(np.logaddexp(0, z)), _d_mish),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "hardswish": (lambda z: z * np.clip(z / 6 + 0.5, 0, 1), lambda z: np.where(z >= 3, 1, (z > -3) * (z / 3 + 0.5))),
    "hardsigmoid": (lambda z: np.clip(z / 6 + 0.5, 0, 1), lambda z: ((z > -3) & (z < 3)) / 6),
}
