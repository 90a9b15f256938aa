"""The normalizers of the field in NumPy float64, each from its paper's equations and in its letters.

x is (N, C, *) unless a docstring says otherwise; k says which cells are kept (all, if None), with x's number of axes.
E and Var are the running mean and variance; λ is the weight of the newest batch. Functions with running statistics
return y and what becomes of these. Nothing is shared with `formulas`, so that the two check each other.
"""

# ruff: noqa: N803, N806 - the papers' letters; each function's docstring is its formula

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CBN",
    "Running",
    "adain",
    "batch_norm",
    "batch_renorm",
    "cross_iteration",
    "dyt",
    "eval_norm",
    "evonorm_b0",
    "evonorm_s0",
    "frn",
    "ghost",
    "grn",
    "iterative",
    "mean_only",
    "online",
    "online_backward",
    "positional",
    "renorm_correction",
    "scale_norm",
    "spade_maps",
    "switch",
    "whiten",
    "zca",
]  # fmt: skip

Array = NDArray[np.float64]
Mask = NDArray[np.bool_] | None


class Running(NamedTuple):
    """E and Var per channel."""

    E: Array
    Var: Array


def _mean(a: Array, axes: tuple[int, ...], k: Mask) -> Array:
    """The mean over the kept cells, 0 where there is none."""
    kept = np.ones(a.shape, bool) if k is None else np.broadcast_to(k, a.shape)
    count = kept.sum(axes, keepdims=True)
    return np.asarray(np.where(kept, a, 0).sum(axes, keepdims=True) / np.maximum(count, 1))


def _moments(x: Array, axes: tuple[int, ...], k: Mask) -> tuple[Array, Array]:
    μ = _mean(x, axes, k)
    return μ, _mean((x - μ) ** 2, axes, k)


def _space(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _batch(x: Array) -> tuple[int, ...]:
    return (0, *_space(x))


def _lay(v: ArrayLike, x: Array) -> Array:
    """(C,) or (N, C) against (N, C, *)."""
    v = np.asarray(v, np.float64)
    return v.reshape(v.shape + (1,) * (x.ndim - 2))


def _keep(y: Array, k: Mask) -> Array:
    return y if k is None else np.where(k, y, 0)


def _move(running: Running, x: Array, k: Mask, λ: float) -> Running:
    """(1 − λ)·old + λ·batch, the variance unbiased; a channel without cells moves nothing, one cell no variance."""
    if not x.size:
        return running
    μ, σ2 = (np.ravel(a) for a in _moments(x, _batch(x), k))
    m = (np.ones(x.shape, bool) if k is None else np.broadcast_to(k, x.shape)).sum(_batch(x))
    E = np.where(m > 0, (1 - λ) * running.E + λ * μ, running.E)
    return Running(E, np.where(m > 1, (1 - λ) * running.Var + λ * σ2 * m / np.maximum(m - 1, 1), running.Var))


# --- statistics of the batch --------------------------------------------------------------------------------------


def batch_norm(
    x: Array, running: Running, training: bool, *, γ: ArrayLike = 1.0, β: ArrayLike = 0.0, ε: float, λ: float, k: Mask
) -> tuple[Array, Running]:
    """γ·(x − μ)/√(σ² + ε) + β; γ and β (C,), (N, C) or x's shape. Ioffe & Szegedy 2015, Algorithms 1 and 2."""
    μ, σ2 = _moments(x, _batch(x), k) if training else (_lay(running.E, x), _lay(running.Var, x))
    y = _affine(γ, x) * (x - μ) / np.sqrt(σ2 + ε) + _affine(β, x)
    return _keep(y, k), _move(running, x, k, λ) if training else running


def _affine(a: ArrayLike, x: Array) -> Array:
    a = np.asarray(a, np.float64)
    return a if a.ndim in (0, x.ndim) and a.shape in ((), x.shape) else _lay(a, x)


def mean_only(x: Array, running: Running, training: bool, *, b: ArrayLike, λ: float, k: Mask) -> tuple[Array, Running]:
    """t − μ[t] + b. Salimans & Kingma 2016, §4."""
    μ = _mean(x, _batch(x), k) if training else _lay(running.E, x)
    return _keep(x - μ + _lay(b, x), k), _move(running, x, k, λ) if training else running


def ghost(
    x: Array, running: Running, sizes: list[int], *, γ: ArrayLike, β: ArrayLike, ε: float, λ: float, k: Mask
) -> tuple[Array, Running]:
    """Every ghost X_l of the batch by itself; each moves the statistics in turn. Hoffer et al. 2017, Algorithm 1."""
    ys, start = [np.empty((0, *x.shape[1:]))], 0
    for size in sizes:
        X_l = x[start : start + size]
        k_l = None if k is None else np.broadcast_to(k, x.shape)[start : start + size]
        y, running = batch_norm(X_l, running, True, γ=γ, β=β, ε=ε, λ=λ, k=k_l)
        ys.append(y)
        start += size
    return np.concatenate(ys), running


def renorm_correction(x: Array, running: Running, rmax: float, dmax: float, ε: float, k: Mask) -> tuple[Array, Array]:
    """r = clip(σ_B/σ), d = clip((μ_B − μ)/σ), both constants to the gradient. Ioffe 2017, Algorithm 1."""
    μ_B, σ2_B = (np.ravel(a) for a in _moments(x, _batch(x), k))
    σ_B, σ = np.sqrt(σ2_B + ε), np.sqrt(running.Var + ε)
    return np.clip(σ_B / σ, 1 / rmax, rmax), np.clip((μ_B - running.E) / σ, -dmax, dmax)


def batch_renorm(
    x: Array, r: Array, d: Array, running: Running, *, γ: ArrayLike, β: ArrayLike, ε: float, λ: float, k: Mask
) -> tuple[Array, Running]:
    """x̂ = (x − μ_B)/σ_B · r + d, y = γ·x̂ + β. Ioffe 2017, Algorithm 1."""
    μ, σ2 = _moments(x, _batch(x), k)
    x̂ = (x - μ) / np.sqrt(σ2 + ε) * _lay(r, x) + _lay(d, x)
    return _keep(_lay(γ, x) * x̂ + _lay(β, x), k), _move(running, x, k, λ)


def eval_norm(
    x: Array, running: Running, α: Array, β_: Array, *, γ: ArrayLike, β: ArrayLike, ε: float, k: Mask
) -> Array:
    """The moments of a mixture: the sample with weight α (β_ in the variance), the population with the rest.

    The variance of a mixture is the mean of the variances plus the variance of the means: Singh & Shrivastava 2019.
    """
    μ_s, σ2_s = _moments(x, _space(x), k)
    μ, σ2, α, β_ = (_lay(a, x) for a in (running.E, running.Var, α, β_))
    μ̂ = α * μ_s + (1 - α) * μ
    mixed = β_ * μ_s + (1 - β_) * μ
    σ̂2 = β_ * (σ2_s + (μ_s - mixed) ** 2) + (1 - β_) * (σ2 + (μ - mixed) ** 2)
    return _keep(_lay(γ, x) * (x - μ̂) / np.sqrt(σ̂2 + ε) + _lay(β, x), k)


def switch(
    x: Array, running: Running, training: bool, λ_: Array, λ_v: Array, *, γ: ArrayLike, β: ArrayLike, ε: float,
    λ: float, k: Mask,
) -> tuple[Array, Running]:  # fmt: skip
    """γ·(h − Σ w_k μ_k)/√(Σ w'_k σ²_k + ε) + β, k ∈ {in, ln, bn}, w = softmax(λ_). Luo et al. 2019."""
    w, w_ = np.exp(λ_) / np.exp(λ_).sum(), np.exp(λ_v) / np.exp(λ_v).sum()
    IN, LN = _moments(x, _space(x), k), _moments(x, (1, *_space(x)), k)
    BN = _moments(x, _batch(x), k) if training else (_lay(running.E, x), _lay(running.Var, x))
    μ, σ2 = w[0] * IN[0] + w[1] * LN[0] + w[2] * BN[0], w_[0] * IN[1] + w_[1] * LN[1] + w_[2] * BN[1]
    y = _lay(γ, x) * (x - μ) / np.sqrt(σ2 + ε) + _lay(β, x)
    return _keep(y, k), _move(running, x, k, λ) if training else running


def evonorm_b0(
    x: Array, running: Running, training: bool, v: Array, *, γ: ArrayLike, β: ArrayLike, ε: float, λ: float, k: Mask
) -> tuple[Array, Running]:
    """x/max(√s²_{b,w,h}(x), v·x + √s²_{w,h}(x))·γ + β. Liu et al. 2020."""
    s2_B = _moments(x, _batch(x), k)[1] if training else _lay(running.Var, x)
    s2_I = _moments(x, _space(x), k)[1]
    y = x / np.maximum(np.sqrt(s2_B + ε), _lay(v, x) * x + np.sqrt(s2_I + ε)) * _lay(γ, x) + _lay(β, x)
    return _keep(y, k), _move(running, x, k, λ) if training else running


# --- statistics of a sample, or none ------------------------------------------------------------------------------


def positional(x: Array, *, γ: ArrayLike = 1.0, β: ArrayLike = 0.0, ε: float, k: Mask) -> Array:
    """(x − μ_{b,h,w})/σ_{b,h,w}, over the channels. Li et al. 2019; ConvNeXt's LayerNorm with γ and β."""
    μ, σ2 = _moments(x, (1,), k)
    return _keep(_affine(γ, x) * (x - μ) / np.sqrt(σ2 + ε) + _affine(β, x), k)


def scale_norm(x: Array, g: float, ε: float, k: Mask) -> Array:
    """g·x/‖x‖ over the last axis, ‖x‖ guarded as √(‖x‖² + ε²). Nguyen & Salazar 2019."""
    return np.asarray(g * _keep(x, k) / np.sqrt((_keep(x, k) ** 2).sum(-1, keepdims=True) + ε**2))


def frn(
    x: Array, *, γ: ArrayLike, β: ArrayLike, ε: float, ε_l: ArrayLike = 0.0, τ: ArrayLike | None = None, k: Mask
) -> Array:
    """ν² = Σ x²/N, y = γ·x/√(ν² + ε + |ε_l|) + β, z = max(y, τ). Singh & Krishnan 2020, §3."""
    ν2 = _mean(x**2, _space(x), k)
    y = _lay(γ, x) * x / np.sqrt(ν2 + ε + np.abs(_affine(ε_l, x))) + _lay(β, x)
    return _keep(y if τ is None else np.maximum(y, _lay(τ, x)), k)


def grn(x: Array, γ: Array, β: Array, ε: float, k: Mask) -> Array:
    """G(X)_i = ‖X_i‖, N = G/(mean G + ε), γ·(X·N) + β + X. Woo et al. 2023; channels first."""
    G = np.sqrt((_keep(x, k) ** 2).sum(_space(x), keepdims=True))
    N = G / (G.mean(1, keepdims=True) + ε)
    return _keep(_lay(γ, x) * (x * N) + _lay(β, x) + x, k)


def dyt(x: Array, α: float, γ: Array, β: Array) -> Array:
    """γ·tanh(αx) + β over the last axes. Zhu et al. 2025, §4."""
    return np.asarray(γ * np.tanh(α * x) + β)


def evonorm_s0(x: Array, groups: int, v: Array, *, γ: ArrayLike, β: ArrayLike, ε: float, k: Mask) -> Array:
    """x·σ(v·x)/√s²_{w,h,c/g}(x)·γ + β. Liu et al. 2020."""
    parts = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    kept = None if k is None else np.broadcast_to(k, x.shape).reshape(parts)
    _, s2 = _moments(x.reshape(parts), tuple(range(2, len(parts))), kept)
    s2 = np.repeat(s2.reshape(x.shape[0], groups), x.shape[1] // groups, axis=1)
    return _keep(x / (1 + np.exp(-_lay(v, x) * x)) / np.sqrt(_lay(s2, x) + ε) * _lay(γ, x) + _lay(β, x), k)


def spade_maps(m: Array, space: tuple[int, ...], weights: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """γ(m) and β(m): m at the nearest position, a convolution with ReLU, one each. Park et al. 2019, Figure 3.

    `weights` are (w, b) of the shared convolution, of γ's and of β's.
    """
    for axis, size in enumerate(space, start=2):
        m = np.take(m, np.arange(size) * m.shape[axis] // size, axis)
    h = np.maximum(_convolved(m, *weights[0]), 0)
    return _convolved(h, *weights[1]), _convolved(h, *weights[2])


def _convolved(x: Array, w: Array, b: Array) -> Array:
    """Σ over channels and offsets of w·x + b, zeros beyond the edge."""
    x = np.pad(x, [(0, 0), (0, 0), *((s // 2, s // 2) for s in w.shape[2:])])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=_space(x))
    axes = (1, *range(x.ndim, windows.ndim))
    y = np.tensordot(windows, w, (axes, tuple(range(1, w.ndim))))
    return np.moveaxis(y, -1, 1) + _lay(b, x)


def adain(x: Array, y: Array, ε: float, k: Mask) -> Array:
    """σ(y)·(x − μ(x))/σ(x) + μ(y). Huang & Belongie 2017, eq. 8."""
    (μ_x, σ2_x), (μ_y, σ2_y) = _moments(x, _space(x), k), _moments(y, _space(y), None)
    lay = (*μ_y.shape[:2], *(1,) * (x.ndim - 2))
    return _keep(np.sqrt(σ2_y + ε).reshape(lay) * (x - μ_x) / np.sqrt(σ2_x + ε) + μ_y.reshape(lay), k)


# --- whitening ------------------------------------------------------------------------------------------------------


def zca(Σ: Array) -> Array:
    """D Λ^(−1/2) Dᵀ. Huang et al. 2018."""
    Λ, D = np.linalg.eigh(Σ)
    return np.asarray(D @ np.diag(Λ**-0.5) @ D.T)


def iterative(Σ: Array, T: int) -> Array:
    """P_k = (3·P − P³ Σ_N)/2 from P_0 = I, Σ_N = Σ/tr Σ; P_T/√tr Σ. Huang et al. 2019, Algorithm 1."""
    tr = np.trace(Σ)
    P = np.eye(len(Σ))
    for _ in range(T):
        P = (3 * P - np.linalg.matrix_power(P, 3) @ (Σ / tr)) / 2
    return np.asarray(P / np.sqrt(tr))


def whiten(
    x: Array, E: Array, U: Array, training: bool, root: Any, *, γ: ArrayLike, β: ArrayLike, ε: float, λ: float,
    k: Mask,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """γ·Σ^(−1/2)(X − μ1ᵀ) + β per group of channels, Σ = (X − μ1ᵀ)(X − μ1ᵀ)ᵀ/m + εI; U holds the groups' matrices.

    `root` gives Σ^(−1/2). Returns y, E and U. Huang et al. 2018, Algorithm 1; Huang et al. 2019, Algorithm 1.
    """
    C, d = x.shape[1], U.shape[-1]
    kept = np.broadcast_to(np.ones((1,) * x.ndim, bool) if k is None else k, x.shape)[:, 0].ravel()
    X = np.moveaxis(x, 1, 0).reshape(C, -1)
    X̂, E_new, U_new = np.zeros_like(X), E.copy(), U.copy()
    for g in range(C // d):
        rows = slice(g * d, (g + 1) * d)
        if training:
            m = max(int(kept.sum()), 1)
            μ = X[rows][:, kept].sum(1) / m
            X_c = X[rows][:, kept] - μ[:, None]
            W = root(X_c @ X_c.T / m + ε * np.eye(d))
            if kept.any():
                E_new[rows], U_new[g] = (1 - λ) * E[rows] + λ * μ, (1 - λ) * U[g] + λ * W
        else:
            μ, W = E[rows], U[g]
        X̂[rows] = W @ (X[rows] - μ[:, None])
    x̂ = np.moveaxis(X̂.reshape(C, x.shape[0], *x.shape[2:]), 0, 1)
    return _keep(_lay(γ, x) * x̂ + _lay(β, x), k), E_new, U_new


# --- streams ----------------------------------------------------------------------------------------------------------


def online(x: Array, μ: Array, σ2: Array, α_f: float, ε: float, k: Mask) -> tuple[Array, Array, Array, Array]:
    """y_t = (x_t − μ_{t−1})/σ_{t−1}, then μ_t and σ²_t; returns y, the σ_{t−1}, μ and σ². Chiley et al. 2019."""
    y, σ = np.zeros_like(x), np.zeros(x.shape[:2])
    for t in range(len(x)):
        σ[t] = np.sqrt(σ2 + ε)
        y[t] = (x[t] - _lay(μ, x)) / _lay(σ[t], x)
        k_t = None if k is None else np.broadcast_to(k, x.shape)[t : t + 1]
        m_t, v_t = (np.ravel(a) for a in _moments(x[t : t + 1], _space(x), k_t))
        seen = np.ones(len(μ), bool) if k_t is None else np.asarray(np.any(k_t, _space(x)))[0]
        σ2 = np.where(seen, α_f * σ2 + (1 - α_f) * v_t + α_f * (1 - α_f) * (m_t - μ) ** 2, σ2)
        μ = np.where(seen, α_f * μ + (1 - α_f) * m_t, μ)
    return _keep(y, k), σ, μ, σ2


def online_backward(
    g: Array, y: Array, σ: Array, ε_y: Array, ε_1: Array, α_b: float, k: Mask
) -> tuple[Array, Array, Array]:
    """The control process, sample by sample; returns x' and the two errors. Chiley et al. 2019."""
    dx = np.zeros_like(g)
    for t in range(len(g)):
        k_t = None if k is None else np.broadcast_to(k, g.shape)[t : t + 1]
        x̃ = g[t] - (1 - α_b) * _lay(ε_y, g) * y[t]
        ε_y = ε_y + np.ravel(_mean((x̃ * y[t])[None], _space(g), k_t))
        dx[t] = x̃ / _lay(σ[t], g) - (1 - α_b) * _lay(ε_1, g)
        ε_1 = ε_1 + np.ravel(_mean(dx[t][None], _space(g), k_t))
    return _keep(dx, k), ε_y, ε_1


class CBN(NamedTuple):
    """What is remembered of one batch: its weights θ (C, F), μ, ν = mean(x²), and ∂μ_c/∂θ_c, ∂ν_c/∂θ_c (C, F)."""

    θ: Array
    μ: Array
    ν: Array
    dμ: Array
    dν: Array


def cross_iteration(
    x: Array, θ: Array, past: list[CBN], *, γ: ArrayLike, β: ArrayLike, ε: float, k: Mask
) -> tuple[Array, Array, Array]:
    """The window's moments at the present weights; returns y, μ̄ and σ̄². Yao et al. 2021, §3."""
    μ_t, ν_t = np.ravel(_mean(x, _batch(x), k)), np.ravel(_mean(x**2, _batch(x), k))
    μs, νs = [μ_t], [ν_t]
    for old in past:
        μ = old.μ + (old.dμ * (θ - old.θ)).sum(1)
        ν = old.ν + (old.dν * (θ - old.θ)).sum(1)
        μs.append(μ)
        νs.append(np.maximum(ν, μ**2))
    μ̄ = np.mean(μs, axis=0)
    σ̄2 = np.mean(νs, axis=0) - μ̄**2
    y = _lay(γ, x) * (x - _lay(μ̄, x)) / np.sqrt(_lay(σ̄2, x) + ε) + _lay(β, x)
    return _keep(y, k), μ̄, σ̄2
