"""The formulas, once, in float64 and in the letters of the papers: what every kernel is compared with.

    y = φ(γ·x̂ + β + residual)        x̂ = (x − μ)/√(σ² + ε)        μ, σ²: mean and biased variance over the set S

Normalizers differ only in S, which a pattern names (`normscope.scope`). Nothing here is fast and nothing is shared
with a kernel. Arrays are unfolded to the *parts* of the pattern, so that S is a tuple of array axes. Besides the
papers' letters: k says which cells are kept, c = x − μ, r = 1/√(σ² + ε), z = γ·x̂ + β + residual.
"""

# ruff: noqa: D102, N802, N803, N806 - the letters are explained above, and S, E and Var are capitals in every paper

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normscope.oracle.activations import ACTIVATIONS
from normscope.scope import Scope, parse

__all__ = [
    "Caffe", "Gradients", "Moments", "Normalization",
    "backward", "fold", "moments", "normalize", "running", "unbiased",
]  # fmt: skip

Array = NDArray[np.float64]


class Moments(NamedTuple):
    """μ, σ² and m = |S| of every set; shape: the parts outside S, in the order of the pattern."""

    μ: Array
    σ2: Array
    m: Array


class Gradients(NamedTuple):
    """The gradients of Σ dy·y; None for what was not given."""

    dx: Array
    dγ: Array | None
    dβ: Array | None
    dresidual: Array
    dμ: Array | None
    dσ2: Array | None


@dataclass(frozen=True)
class Normalization:
    """One normalization; every letter of the formula is a property, with S kept as axes of size 1.

    Shapes: x any; γ, β: the axes named in `params`, in that order; mask: x's, or x's without the axis c; residual: x's;
    moments: the parts outside S.

    Source: Ioffe & Szegedy 2015, Algorithm 1 and the gradients of §3; S as in Wu & He 2018, eq. 1-2.
    """

    x: ArrayLike
    pattern: str
    γ: ArrayLike | None = None
    β: ArrayLike | None = None
    params: str = "c"
    ε: float = 1e-5
    center: bool = True
    scale: bool = True
    mask: ArrayLike | None = None
    moments: tuple[ArrayLike, ArrayLike] | None = None
    activation: str | None = None
    residual: ArrayLike | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    # How arrays are seen: unfolded to the parts, or one number per set.

    @cached_property
    def scope(self) -> Scope:
        return parse(self.pattern).at(np.ndim(self.x))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        return self.scope.unfold(np.shape(self.x), self.sizes)

    def unfold(self, a: ArrayLike) -> Array:
        return np.broadcast_to(np.asarray(a, np.float64), np.shape(self.x)).reshape(self.parts)

    def spread(self, γ: ArrayLike) -> Array:
        """Lay γ along its axes of x; `gather` is the adjoint."""
        γ, axes = np.asarray(γ, np.float64), self.scope.param_axes(self.params)
        ones = (1,) * (np.ndim(self.x) - γ.ndim)
        return self.unfold(np.moveaxis(γ.reshape(γ.shape + ones), range(γ.ndim), axes))

    def gather(self, a: Array) -> Array:
        axes = self.scope.param_axes(self.params)
        a = np.moveaxis(a.reshape(np.shape(self.x)), axes, range(len(axes)))
        return np.asarray(a.sum(axis=tuple(range(len(axes), a.ndim))))

    def per_set(self, a: ArrayLike) -> Array:
        sizes = [1 if part.averaged else size for part, size in zip(self.scope.parts, self.parts, strict=True)]
        return np.asarray(a, np.float64).reshape(sizes)

    def sets(self, a: Array) -> Array:
        return a.reshape([self.parts[i] for i in self.scope.outside])

    # The formula.

    @cached_property
    def S(self) -> tuple[int, ...]:
        return self.scope.inside

    @cached_property
    def k(self) -> NDArray[np.bool_]:
        """The cells kept."""
        mask = np.asarray(True if self.mask is None else self.mask)
        c = self.scope.axis_of("c")
        if c is not None and 0 < mask.ndim < np.ndim(self.x):
            mask = np.expand_dims(mask, c)
        return self.unfold(mask) > 0

    def sum_S(self, a: Array) -> Array:
        return np.asarray(np.where(self.k, a, 0).sum(axis=self.S, keepdims=True))

    @cached_property
    def m(self) -> Array:
        """|S|, counting kept cells; 1 where none is, so that its moments are 0."""
        return np.maximum(self.sum_S(np.ones(self.parts)), 1)

    @cached_property
    def μ(self) -> Array:
        if not self.center:
            return np.zeros_like(self.m)
        return self.sum_S(self.unfold(self.x)) / self.m if self.moments is None else self.per_set(self.moments[0])

    @cached_property
    def σ2(self) -> Array:
        return self.sum_S(self.c**2) / self.m if self.moments is None else self.per_set(self.moments[1])

    @cached_property
    def c(self) -> Array:
        return np.where(self.k, self.unfold(self.x) - self.μ, 0)

    @cached_property
    def r(self) -> Array:
        return 1 / np.sqrt(self.σ2 + self.ε) if self.scale else np.ones_like(self.m)

    @cached_property
    def x̂(self) -> Array:
        return self.c * self.r

    @cached_property
    def z(self) -> Array:
        γ = 1 if self.γ is None else self.spread(self.γ)
        β = 0 if self.β is None else self.spread(self.β)
        return γ * self.x̂ + β + (0 if self.residual is None else self.unfold(self.residual))

    @cached_property
    def y(self) -> Array:
        φ, _ = ACTIVATIONS[self.activation]
        return np.where(self.k, φ(self.z), 0).reshape(np.shape(self.x))

    def backward(self, dy: ArrayLike) -> Gradients:
        """The chain rule from y back to the inputs.

        μ moves σ² too, but ∂σ²/∂μ = −2·mean_S(x − μ) = 0, so the two paths to x through the moments simply add.
        """
        _, dφ = ACTIVATIONS[self.activation]
        dz = np.where(self.k, self.unfold(dy) * dφ(self.z), 0)
        dx̂ = dz if self.γ is None else dz * self.spread(self.γ)
        dμ = -self.sum_S(dx̂ * self.r) * self.center
        dσ2 = -self.sum_S(dx̂ * self.c) * self.r**3 / 2 * self.scale
        dx = dx̂ * self.r
        if self.moments is None:
            dx = np.where(self.k, dx + (dμ + 2 * self.c * dσ2) / self.m, 0)
        return Gradients(
            dx=dx.reshape(np.shape(self.x)),
            dγ=None if self.γ is None else self.gather(dz * self.x̂),
            dβ=None if self.β is None else self.gather(dz),
            dresidual=dz.reshape(np.shape(self.x)),
            dμ=None if self.moments is None else self.sets(dμ),
            dσ2=None if self.moments is None else self.sets(dσ2),
        )


_OPTIONS = frozenset(Normalization.__dataclass_fields__)


def _describe(x: ArrayLike, pattern: str, options: Mapping[str, Any]) -> Normalization:
    sizes = {name: size for name, size in options.items() if name not in _OPTIONS}
    return Normalization(x, pattern, **{k: v for k, v in options.items() if k in _OPTIONS}, sizes=sizes)


def normalize(x: ArrayLike, pattern: str, **options: Any) -> Array:
    """Return y; options are the fields of `Normalization` and the sizes of split factors, e.g. g=32."""
    return _describe(x, pattern, options).y


def backward(dy: ArrayLike, x: ArrayLike, pattern: str, **options: Any) -> Gradients:
    """Return the gradients of Σ dy·normalize(x, pattern, **options)."""
    return _describe(x, pattern, options).backward(dy)


def moments(x: ArrayLike, pattern: str, **options: Any) -> Moments:
    """Return mean, biased variance (center=False: mean 0, mean of squares) and number of kept cells of every set."""
    n = _describe(x, pattern, options)
    return Moments(n.sets(n.μ), n.sets(n.σ2), n.sets(n.sum_S(np.ones(n.parts))))


def unbiased(batch: Moments) -> Array:
    """Return σ²·m/(m − 1), and σ² = 0 where there is one cell."""
    return batch.σ2 * batch.m / np.maximum(batch.m - 1, 1)


def running(E: Array, Var: Array, batch: Moments, λ: float | None = 0.1, step: int = 1) -> tuple[Array, Array]:
    """Move running statistics towards a batch: new = (1 − λ)·old + λ·batch, the variance unbiased by m/(m − 1).

    λ None averages all batches alike, λ = 1/step. A set with no cell moves nothing, one with one cell no variance.

    Source: Ioffe & Szegedy 2015, Algorithm 2, step 10; momentum as torch means it.
    """
    λ = 1 / step if λ is None else λ
    E = np.where(batch.m > 0, (1 - λ) * E + λ * batch.μ, E)
    return E, np.where(batch.m > 1, (1 - λ) * Var + λ * unbiased(batch), Var)


class Caffe(NamedTuple):
    """Caffe's three accumulators: sums that fade by λ, divided by their weight s when they are used.

    Source: Caffe's BatchNorm layer, λ = moving_average_fraction.
    """

    mean: Array
    variance: Array
    s: float = 0.0

    def step(self, batch: Moments, λ: float = 0.999) -> Caffe:
        """Add one batch."""
        return Caffe(λ * self.mean + batch.μ, λ * self.variance + unbiased(batch), λ * self.s + 1)

    def statistics(self) -> tuple[Array, Array]:
        """E and Var for inference; 0 before the first batch."""
        s = 1 / self.s if self.s else 0.0
        return self.mean * s, self.variance * s


def fold(γ: Array, β: Array, E: Array, Var: Array, ε: float = 1e-5) -> tuple[Array, Array]:
    """Return a and b of the inference form y = a·x + b. Source: Ioffe & Szegedy 2015, Algorithm 2, step 11."""
    a = γ / np.sqrt(Var + ε)
    return a, β - a * E
