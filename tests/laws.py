"""The laws that every implementation obeys, on every scope, layout and dtype.

A law is a function of one `Trial`; it raises AssertionError where it is broken. `test_laws` runs them on normscope,
`test_tests` on broken implementations, each of which some law must catch.

Upstream gradients are random: Σ x̂ over S is constant, so the gradient of a sum is zero even for a broken kernel. A
comparison passes only where `error <= tolerance`, so that NaN fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from cases import LAYOUTS, Case
from torch import Tensor

from normscope import oracle

ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)


class Implementation(Protocol):
    """What is on trial: functions with the signatures of `normscope.normalize` and `normscope.moments`."""

    normalize: Callable[..., Tensor]
    moments: Callable[..., Any]


@dataclass(frozen=True)
class Trial:
    """One implementation, scope, layout and dtype, and the data that they are tried on."""

    on: Implementation
    case: Case
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    @cached_property
    def random(self) -> torch.Generator:
        return self.case.generator()

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def lay(self, x: Tensor) -> Tensor:
        return LAYOUTS[self.layout](x.to(self.dtype))

    def data(self, std: float = 1.5, mean: float = 0.4) -> Tensor:
        return self.lay(self.draw(*self.case.shape) * std + mean * std)

    def grid(self, bits: int) -> Tensor:
        """Standard normal data on multiples of 2^-bits, within ±4: exact in every dtype with bits + 3 bits."""
        x = torch.round(self.draw(*self.case.shape) * 2**bits) / 2**bits
        return self.lay(x.clamp(-4, 4))

    def param(self) -> Tensor:
        return (1 + 0.5 * self.draw(*self.case.param_shape)).to(self.dtype)

    def keep(self) -> Tensor:
        """A mask that keeps two cells of three, all cells of some set and none of another."""
        keep = torch.rand(self.case.shape, generator=self.random) < 0.67
        labels = self.case.labels()
        keep[labels == labels.max()] = False
        keep[labels == labels.min()] = True
        return keep

    @property
    def unit(self) -> float:
        """The rounding unit of the computation, float32 or wider."""
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps

    @property
    def stored(self) -> float:
        """The largest relative error of rounding a result to x's dtype."""
        return torch.finfo(self.dtype).eps / 2

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self.on.normalize(x, self.case.pattern, **{"center": self.case.center, **self.case.sizes, **options})

    def moments(self, x: Tensor, **options: Any) -> Any:
        return self.on.moments(x, self.case.pattern, **{"center": self.case.center, **self.case.sizes, **options})

    def truth(self, x: Tensor, ε: float = 1e-5, **options: Any) -> oracle.Normalization:
        options = {"center": self.case.center, "params": self.case.params, **options}
        return oracle.Normalization(real(x), self.case.pattern, ε=ε, sizes=self.case.sizes, **options)


def real(x: Tensor | None) -> Any:
    return None if x is None else x.detach().double().numpy()


def close(actual: Tensor, expected: Any, tolerance: Any, what: str) -> None:
    """Pass only where the error is at most the tolerance; NaN and a wrong shape fail."""
    got, want = real(actual), np.asarray(expected, np.float64)
    assert got.shape == want.shape, f"{what} has shape {got.shape} instead of {want.shape}"
    error = np.abs(got - want)
    passed = error <= tolerance
    if not passed.all():
        worst = np.unravel_index(np.argmax(np.where(passed, -1, np.nan_to_num(error, nan=np.inf))), error.shape)
        allowed = np.broadcast_to(tolerance, error.shape)[worst]
        raise AssertionError(f"{what}{list(worst)} is {got[worst]} instead of {want[worst]}; tolerance {allowed:.1e}")


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def same(a: Tensor, b: Tensor, what: str) -> None:
    """Bit for bit, NaN and the sign of zero included."""
    bits = _BITS[a.dtype.itemsize]
    a, b = a.detach().contiguous(), b.detach().contiguous()
    differ = int((a.view(bits) != b.view(bits)).sum())
    assert differ == 0, f"{what}: {differ} of {a.numel()} cells differ in some bit"


def leaf(t: Tensor | None) -> Tensor | None:
    """A leaf that shares the memory, and so the layout, of t."""
    return None if t is None else t.detach().requires_grad_()


# The statistics.


def output_has_the_moments_of_the_definition(t: Trial) -> None:
    """mean_S x̂ = 0 and var_S x̂ = v/(v + ε), or mean_S x̂² = v/(v + ε) where nothing is centred."""
    for std, ε in ((1.5, 1e-5), (3e-3, 1e-5), (1.5, 2.0)):
        x = t.data(std)
        y = t(x, eps=ε)
        v = t.truth(x).σ2
        got = oracle.moments(real(y), t.case.pattern, center=False, **t.case.sizes)
        mean = oracle.moments(real(y), t.case.pattern, **t.case.sizes).μ
        # x̂ is at most √m; a mean of m rounding errors is at most one of them, plus √m units from the statistics.
        largest = math.sqrt(t.case.cells)
        error = (t.unit * (4 + largest) + t.stored) * largest
        close(torch.as_tensor(got.σ2), t.truth(x).sets(v / (v + ε)), 2 * error, f"mean x̂² at σ = {std}, ε = {ε}")
        if t.case.center:
            close(torch.as_tensor(mean), np.zeros_like(mean), error, f"mean x̂ at σ = {std}, ε = {ε}")


def moments_are_biased_and_wide(t: Trial) -> None:
    """`moments` are those of the definition, float32 or wider whatever x is stored in, and count the kept cells."""
    x, keep = t.data(), t.keep()
    for mask in (None, keep):
        m = t.moments(x, mask=mask)
        truth = oracle.moments(real(x), t.case.pattern, center=t.case.center, mask=mask, **t.case.sizes)
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        assert m.mean.dtype == m.var.dtype == wide, f"moments of {t.dtype} are {m.mean.dtype}"
        # Sums of m numbers below 6: √m units each way, for the variance of numbers below 36.
        error = t.unit * (4 + math.sqrt(t.case.cells))
        close(m.mean, truth.μ, 2 * error, "mean")
        close(m.var, truth.σ2, 4 * error, "variance")
        close(m.count, truth.m, 0, "count")


# Invariances.


_SHIFTS = {
    torch.float64: (20, 2.0**20),
    torch.float32: (10, 2048.0),
    torch.float16: (6, 12.0),
    torch.bfloat16: (4, 8.0),
}


def shifting_changes_nothing(t: Trial) -> None:
    """f(a + c) = f(a). The shift is the largest that leaves x + c exact in x's dtype, 8 in bfloat16."""
    if not t.case.center:
        return
    # x + c, with x in ±4 on multiples of 2^-bits, has log2(c + 4) + bits bits: 41 of 53, 22 of 24, 10 of 11, 8 of 8.
    bits, c = _SHIFTS[t.dtype]
    x = t.grid(bits)
    assert torch.equal((x + c).double(), x.double() + c), "the shift must be exact"
    # Both sides are within √m units of the truth; x̂ is at most √m. One rounding to x's dtype each.
    largest = math.sqrt(t.case.cells)
    error = (2 * t.unit * (4 + largest) + 2 * t.stored) * largest
    close(t(x + c), real(t(x)), error, f"f(a + {c:g})")


def scaling_scales_epsilon(t: Trial) -> None:
    """f(k·a; k²ε) = sign(k)·f(a; ε), ε as large as the variance."""
    x = t.grid(4)
    largest = math.sqrt(t.case.cells)
    error = (2 * t.unit * (4 + largest) + 2 * t.stored) * largest
    for k in (-1, 4, -3):  # 3x needs two bits more than x: exact in bfloat16
        close(t(k * x, eps=0.7 * k * k), np.sign(k) * real(t(x, eps=0.7)), error, f"f({k}a; {k * k}ε)")


def permuting_a_set_permutes_the_output(t: Trial) -> None:
    """f(a∘π) = f(a)∘π for a permutation π inside S."""
    x = t.data()
    order = torch.randperm(t.case.cells, generator=t.random)

    def permute(a: Tensor) -> Tensor:
        inside = t.case.scope.inside
        front = tuple(range(len(inside)))
        a = a.reshape(t.case.parts).movedim(inside, front)
        a = a.reshape(t.case.cells, -1)[order].reshape(a.shape)
        return a.movedim(front, inside).reshape(t.case.shape)

    largest = math.sqrt(t.case.cells)
    error = (2 * t.unit * (4 + largest) + 2 * t.stored) * largest
    close(t(t.lay(permute(x))), real(permute(t(x))), error, "f(a∘π)")


# Sets do not touch each other.


def _one_set(t: Trial) -> Tensor:
    labels = t.case.labels()
    return labels == labels.max() // 2


def other_sets_do_not_matter(t: Trial) -> None:
    """Changing cells outside S changes nothing in S, bit for bit, forward and backward."""
    inside = _one_set(t)
    if inside.all():
        return
    x, dy = t.data(), t.data()
    changed = t.lay(torch.where(inside, x, (t.draw(*t.case.shape) * 30 - 7).to(t.dtype)))
    outputs = []
    for a in (x, changed):
        a = leaf(a)
        y = t(a)
        (dx,) = torch.autograd.grad(y, a, dy)
        outputs.append((y[inside], dx[inside]))
    same(outputs[0][0], outputs[1][0], "y inside S")
    same(outputs[0][1], outputs[1][1], "dx inside S")


def nan_and_inf_stay_in_their_set(t: Trial) -> None:
    """One NaN or inf makes its set non-finite, with a ReLU behind it too, and leaves every other set bit for bit."""
    inside = _one_set(t)
    x, dy = t.data(), t.data()
    for poison in (float("nan"), float("inf")):
        bad = x.clone()
        bad[tuple(inside.nonzero()[-1])] = poison
        bad = t.lay(bad)
        outputs = []
        for a in (x, bad):
            a = leaf(a)
            y = t(a, activation="relu")
            (dx,) = torch.autograd.grad(y, a, dy)
            outputs.append((y, dx))
        (y, dx), (bad_y, bad_dx) = outputs
        same(y[~inside], bad_y[~inside], f"y of the sets without {poison}")
        same(dx[~inside], bad_dx[~inside], f"dx of the sets without {poison}")
        if t.case.center or math.isnan(poison):
            assert bad_y[inside].isnan().all(), f"{poison} in S vanished"
        else:
            # Not centred: the mean square is inf, x/inf is 0 and inf/inf is NaN.
            assert bad_y[inside].isnan().sum() == 1, "inf in S vanished"


def a_sample_does_not_depend_on_its_batch(t: Trial) -> None:
    """Where no set crosses samples, sample i alone gives what it gives in its batch, bit for bit."""
    first = t.case.scope.factors(0)
    if any(t.case.scope.parts[i].averaged for i in first) or 0 in t.case.scope.param_axes(t.case.params):
        return
    for shape in filter(None, (t.case.shape, t.case.large)):
        u = Trial(t.on, replace(t.case, shape=shape), t.layout, t.dtype)
        x, dy, weight = leaf(u.data()), u.data(), u.param()
        y = u(x, weight=weight, params=u.case.params)
        (dx,) = torch.autograd.grad(y, x, dy)
        for i in {0, shape[0] - 1}:
            alone = leaf(u.lay(x.detach()[i : i + 1]))
            y1 = u(alone, weight=weight, params=u.case.params)
            (dx1,) = torch.autograd.grad(y1, alone, dy[i : i + 1])
            same(y[i], y1[0], f"y of sample {i} of {shape}")
            same(dx[i], dx1[0], f"dx of sample {i} of {shape}")


def threads_do_not_matter(t: Trial) -> None:
    """One thread and two give the same bits, for y and every gradient."""
    shape = t.case.large
    if not shape:
        return
    u = Trial(t.on, replace(t.case, shape=shape), t.layout, t.dtype)
    x, dy, weight, bias = leaf(u.data()), u.data(), leaf(u.param()), leaf(u.param())
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = u(x, weight=weight, bias=bias, params=u.case.params)
            outputs.append((y, *torch.autograd.grad(y, (x, weight, bias), dy)))
    finally:
        torch.set_num_threads(before)
    for name, one, two in zip(("y", "dx", "dweight", "dbias"), *outputs, strict=True):
        same(one, two, f"{name} with one and two threads")


# Gradients.


def _terms_of_dx(n: oracle.Normalization, g: np.ndarray) -> np.ndarray:
    """r·(|g| + mean|g| + (|x̂| + 1)·mean(|g|·(|x̂| + 1))): what dx is a sum of, for |g| = |γ·dy|, taken absolutely."""
    h = np.abs(n.x̂) + 1
    return n.r * (g + (n.sum_S(g) + h * n.sum_S(g * h)) / n.m)


def gradients_sum_to_zero(t: Trial) -> None:
    """Σ_S dx = 0 where the mean is subtracted, and mean_S(dx·x̂) = mean_S(dy·x̂)·ε/(v + ε)^{3/2}."""
    ε = 0.5
    x, dy = leaf(t.data()), t.data()
    (dx,) = torch.autograd.grad(t(x, eps=ε), x, dy)
    n = t.truth(x, ε)
    g, d = n.unfold(real(dy)), n.unfold(real(dx))
    m, r = t.case.cells, n.r
    error = (t.unit * (4 + math.sqrt(m)) + t.stored) * _terms_of_dx(n, np.abs(g))
    if t.case.center:
        close(torch.as_tensor(n.sum_S(d)), np.zeros_like(n.sum_S(d)), n.sum_S(error), "Σ dx")
    expected = n.sum_S(g * n.x̂) / m * ε * r**3
    close(torch.as_tensor(n.sum_S(d * n.x̂) / m), expected, n.sum_S(error * (1 + np.abs(n.x̂))) / m, "mean dx·x̂")


# Where an activation has a kink, the sign of a rounding error decides its derivative.
KINKS = (-3.0, 0.0, 3.0, 6.0)


def _agrees_with_the_oracle(
    t: Trial,
    x: Tensor,
    ε: float = 1e-5,
    *,
    params: bool = True,
    mask: Tensor | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    **options: Any,
) -> None:
    """y and the gradients of every tensor, with a random upstream gradient, against float64.

    The bounds follow the formula term by term: each term errs by √m units from the sums in the statistics and by a few
    units of its own; y and the gradients are rounded once to the dtype of what they belong to.
    """
    x, residual = leaf(x), leaf(residual)
    weight, bias = (leaf(t.param()), leaf(t.param())) if params else (None, None)
    mean, var = (None, None) if moments is None else map(leaf, moments)
    y = t(
        x, weight=weight, bias=bias, params=t.case.params, eps=ε, mask=mask,
        moments=None if moments is None else (mean, var), residual=residual, **options,
    )  # fmt: skip
    assert y.dtype == t.dtype, f"y is {y.dtype}"
    n = t.truth(
        x, ε, γ=real(weight), β=real(bias), mask=mask, residual=real(residual),
        moments=None if moments is None else (real(mean), real(var)), **options,
    )  # fmt: skip

    γ = np.abs(n.spread(real(weight))) if params else 1.0
    units = t.unit * (4 + math.sqrt(t.case.cells))
    # x − μ is exact near the mean, so x̂ errs by units of itself and of 1.
    z_error = 4 * units * (γ * (np.abs(n.x̂) + 1) + np.abs(n.z))
    # No activation is steeper than 1.5.
    y_error = 1.5 * z_error + t.stored * np.abs(n.unfold(n.y))
    close(y, n.y, y_error.reshape(t.case.shape), "y")

    dy = t.data()
    if n.activation is not None:
        near = np.min([np.abs(n.z - kink) for kink in KINKS], axis=0) <= 2 * z_error
        dy = t.lay(torch.where(torch.as_tensor(near.reshape(t.case.shape)), 0, dy))
    wanted = {"x": x, "γ": weight, "β": bias, "residual": residual}
    if moments is not None:
        wanted |= {"μ": mean if n.center else None, "σ2": var if n.scale else None}
    wanted = {letter: tensor for letter, tensor in wanted.items() if tensor is not None}
    got = torch.autograd.grad(y, list(wanted.values()), dy)
    truth = n.backward(real(dy))

    # What each gradient is a sum of, taken absolutely: an error of a few units in every term cannot exceed it.
    slope = 1.5 + (0 if n.activation is None else 2 * np.abs(n.z) + 2 * γ * (np.abs(n.x̂) + 1))  # |φ″| ≤ 1
    dz = np.where(n.k, np.abs(n.unfold(real(dy))) * slope, 0)
    dx̂ = γ * dz
    size = {
        "x": _terms_of_dx(n, dx̂),
        "γ": n.gather(dz * (np.abs(n.x̂) + 1)),
        "β": n.gather(dz),
        "residual": dz,
        "μ": n.sets(n.sum_S(dx̂) * n.r),
        "σ2": n.sets(n.sum_S(dx̂ * (np.abs(n.x̂) + 1)) * n.r**2),
    }
    for (letter, tensor), gradient in zip(wanted.items(), got, strict=True):
        assert gradient.dtype == tensor.dtype, f"d{letter} is {gradient.dtype}"
        expected = getattr(truth, f"d{letter}")
        error = 4 * units * size[letter].reshape(expected.shape) + torch.finfo(tensor.dtype).eps * np.abs(expected)
        close(gradient, expected, error, f"d{letter}")


def _moments_given(t: Trial) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if t.dtype == torch.float64 else torch.float32
    mean, var = t.draw(*t.case.sets_shape), t.draw(*t.case.sets_shape) ** 2 + 0.3
    return mean.to(wide), var.to(wide)


def agrees_with_the_oracle(t: Trial) -> None:
    """y, dx, dγ and dβ on ordinary data."""
    _agrees_with_the_oracle(t, t.data())


def agrees_without_params(t: Trial) -> None:
    """y and dx with neither weight nor bias, ε of the size of the variance."""
    _agrees_with_the_oracle(t, t.data(), 2.0, params=False)


def agrees_where_epsilon_decides(t: Trial) -> None:
    """Variances of 1e-6 under an ε of 1e-5."""
    _agrees_with_the_oracle(t, t.data(1e-3))


def agrees_under_a_mask(t: Trial) -> None:
    """Cells outside the mask enter nothing, get no gradient and come out 0, whatever they hold."""
    keep = t.keep()
    x = t.lay(torch.where(keep, t.data(), float("nan")))
    residual = t.lay(torch.where(keep, t.data(), float("inf")))
    _agrees_with_the_oracle(t, x, mask=keep, residual=residual)


def agrees_under_a_mask_that_broadcasts(t: Trial) -> None:
    """A mask of the input without the axis c, where the scope names one."""
    axis = t.case.scope.axis_of("c")
    if axis is None or len(t.case.shape) < 2:
        return
    _agrees_with_the_oracle(t, t.data(), mask=t.keep().select(axis, 0))


def agrees_with_given_moments(t: Trial) -> None:
    """Given moments replace the data's, and get gradients of their own."""
    _agrees_with_the_oracle(t, t.data(), moments=_moments_given(t))
    _agrees_with_the_oracle(t, t.data(), moments=_moments_given(t), mask=t.keep(), residual=t.data(), activation="silu")


def agrees_without_scale(t: Trial) -> None:
    """Only the mean is removed."""
    _agrees_with_the_oracle(t, t.data(), scale=False)
    _agrees_with_the_oracle(t, t.data(), scale=False, mask=t.keep())


def adds_the_residual_before_the_activation(t: Trial) -> None:
    """y = activation(γ·x̂ + β + residual)."""
    _agrees_with_the_oracle(t, t.data(), residual=t.data())
    for activation in ("relu", "tanh"):
        _agrees_with_the_oracle(t, t.data(), residual=t.data(), activation=activation)


def applies_every_activation(t: Trial) -> None:
    """Every name in the table, alone and with everything else."""
    for activation in filter(None, oracle.ACTIVATIONS):
        _agrees_with_the_oracle(t, t.data(), activation=activation)
        _agrees_with_the_oracle(t, t.data(2.5), activation=activation, residual=t.data(), mask=t.keep())


def moments_of_the_data_are_the_default(t: Trial) -> None:
    """Passing x's own moments gives the same y, and the same dx through them."""
    x, dy = leaf(t.data()), t.data()
    y = t(x)
    given = t(x, moments=t.moments(x))
    (dx,), (dgiven,) = (torch.autograd.grad(out, x, dy) for out in (y, given))
    n = t.truth(x)
    size = _terms_of_dx(n, np.abs(n.unfold(real(dy))))
    # A mean handed over as one number of the computation's dtype errs by half a unit of itself.
    units = 8 * t.unit * (4 + math.sqrt(t.case.cells))
    weigh = 1 + np.abs(n.μ) * n.r
    close(given, real(y), (units * weigh * (np.abs(n.x̂) + 1) + 2 * t.stored * np.abs(n.x̂)).reshape(t.case.shape), "y")
    # The two parts of dx are added in x's dtype by autograd, each rounded on its own.
    close(dgiven, real(dx), ((units * weigh + 8 * t.stored) * size).reshape(t.case.shape), "dx")


# Accuracy.


def as_accurate_off_centre(t: Trial) -> None:
    """At a mean of 100 and 8000 σ, y and dx err by at most 1.5 times what they err at 0.

    The data lie on a grid of 2^-10, so that float32 holds x + offset exactly (13 + 10 bits). bfloat16 and float16
    cannot hold such data at all: what can be asked of them is `shifting_changes_nothing`. Errors are counted in units
    of the largest value, for dx before its terms cancel; 2 units are granted to luck, because the largest error of few
    cells is anywhere between a half and two.
    """
    if not t.case.center:
        return
    x, dy = t.grid(10), t.data()
    n = t.truth(x)  # of x itself: float64 errs at 8000 σ as well
    truth = (n.y, n.backward(real(dy)).dx)
    scale = (np.abs(n.y).max(), _terms_of_dx(n, np.abs(n.unfold(real(dy)))).max())
    errors = []
    for offset in (0.0, 100.0, 8000.0):
        a = leaf(t.lay(x + offset))
        assert torch.equal(a.double() - offset, x.double()), "the offset must be exact"
        y = t(a)
        got = (y, *torch.autograd.grad(y, a, dy))
        errors.append([np.abs(real(g) - w).max() / s / t.unit for g, w, s in zip(got, truth, scale, strict=True)])
        for what, error, at_zero in zip(("y", "dx"), errors[-1], errors[0], strict=True):
            allowed = 1.5 * max(at_zero, 2.0)
            assert error <= allowed, f"{what} at {offset:g} σ errs by {error:.1f} units, by {at_zero:.1f} at 0"


# Memory.


def layouts_agree(t: Trial) -> None:
    """The same numbers elsewhere in memory give the same results, and y keeps x's memory format."""
    x, dy = t.data(), t.data()
    plain = x.contiguous()
    a, b = leaf(x), leaf(plain)
    weight = t.param()
    y, expected = t(a, weight=weight, params=t.case.params), t(b, weight=weight, params=t.case.params)
    (dx,), (dexpected,) = torch.autograd.grad(y, a, dy), torch.autograd.grad(expected, b, dy.contiguous())
    n = t.truth(x, γ=real(weight))
    γ = np.abs(n.spread(real(weight)))
    size = _terms_of_dx(n, γ * np.abs(n.unfold(real(dy))))
    units = 2 * t.unit * (4 + math.sqrt(t.case.cells))
    close(y, real(expected), ((units + 2 * t.stored) * γ * (np.abs(n.x̂) + 1)).reshape(t.case.shape), "y")
    close(dx, real(dexpected), ((units + 2 * t.stored) * size).reshape(t.case.shape), "dx")
    assert x.shape == y.shape
    if t.layout != "strided":
        sized = [axis for axis, n in enumerate(x.shape) if n > 1]
        assert [y.stride(k) for k in sized] == [x.stride(k) for k in sized], f"strides {x.stride()} became {y.stride()}"


# The ends of the range.


def empty_input_is_defined(t: Trial) -> None:
    """No samples: an empty y and zero gradients of the parameters."""
    if any(part.axis == 0 for part in t.case.scope.parts) and len(t.case.scope.factors(0)) > 1:
        return  # a split of nothing: the size that is left out cannot be told
    if 0 in t.case.scope.param_axes(t.case.params):
        return
    shape = (0, *t.case.shape[1:])
    x = t.lay(torch.zeros(shape)).requires_grad_()
    weight, bias = leaf(t.param()), leaf(t.param())
    y = t(x, weight=weight, bias=bias, params=t.case.params)
    assert y.shape == shape
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.zeros_like(y))
    assert dx.shape == shape
    close(dweight, np.zeros(weight.shape), 0, "dweight of nothing")
    close(dbias, np.zeros(bias.shape), 0, "dbias of nothing")


def constant_input_is_defined(t: Trial) -> None:
    """A constant set has x̂ = 0 exactly, whatever the constant, and a finite gradient."""
    if not t.case.center:
        return
    for constant in (0.0, 3.0, 1000 / 3):
        x = leaf(t.lay(torch.full(t.case.shape, constant)))
        dy, bias = t.data(), t.param()
        y = t(x, bias=bias, params=t.case.params)
        n = t.truth(x, β=real(bias))
        # The mean of m equal numbers is off by √m units at most, and x̂ = (x − mean)/√ε magnifies that; the remainder
        # that travels with the mean takes it back to units of units.
        error = (t.unit * (4 + math.sqrt(t.case.cells))) ** 2 * constant / math.sqrt(1e-5)
        close(y, n.y, error + (t.unit + t.stored) * np.abs(n.y), f"y of the constant {constant:g}")
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.isfinite().all(), f"dx of the constant {constant:g}"


LAWS: dict[Callable[[Trial], None], tuple[torch.dtype, ...]] = {
    output_has_the_moments_of_the_definition: ALL,
    moments_are_biased_and_wide: ALL,
    shifting_changes_nothing: ALL,
    scaling_scales_epsilon: ALL,
    permuting_a_set_permutes_the_output: ALL,
    other_sets_do_not_matter: ALL,
    nan_and_inf_stay_in_their_set: (torch.float32, torch.bfloat16),
    a_sample_does_not_depend_on_its_batch: (torch.float32, torch.bfloat16),
    threads_do_not_matter: (torch.float32,),
    gradients_sum_to_zero: ALL,
    agrees_with_the_oracle: ALL,
    agrees_without_params: ALL,
    agrees_where_epsilon_decides: ALL,
    agrees_under_a_mask: ALL,
    agrees_under_a_mask_that_broadcasts: (torch.float32,),
    agrees_with_given_moments: ALL,
    agrees_without_scale: (torch.float64, torch.float32),
    adds_the_residual_before_the_activation: ALL,
    applies_every_activation: (torch.float64, torch.bfloat16),
    moments_of_the_data_are_the_default: ALL,
    as_accurate_off_centre: WIDE,
    layouts_agree: ALL,
    empty_input_is_defined: ALL,
    constant_input_is_defined: ALL,
}
