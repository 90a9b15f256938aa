"""The oracle against a loop over cells, finite differences and numbers computed by hand."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normscope import oracle

RNG = np.random.default_rng(0)

# Row: pattern, sizes, shape, params, set of a cell, index into γ and β of a cell. The last two are written by hand, so
# that they share nothing with the notation.
ROWS = {
    "BatchNorm2d": ("[n] c [h w]", {}, (3, 2, 2, 3), "c", lambda n, c, h, w: c, lambda n, c, h, w: c),
    "BatchNorm1d": ("[n] c", {}, (7, 3), "c", lambda n, c: c, lambda n, c: c),
    "LayerNorm": ("... [c]", {}, (2, 3, 7), "c", lambda n, t, c: (n, t), lambda n, t, c: c),
    "LayerNorm of a map": (
        "n [c h w]", {}, (3, 2, 3, 2), "c h w", lambda n, c, h, w: n, lambda n, c, h, w: (c, h, w),
    ),
    "LayerNorm2d": ("n [c] h w", {}, (2, 5, 3, 2), "c", lambda n, c, h, w: (n, h, w), lambda n, c, h, w: c),
    "InstanceNorm": ("n c [h w]", {}, (2, 3, 4, 3), "c", lambda n, c, h, w: (n, c), lambda n, c, h, w: c),
    "GroupNorm": ("n (g [c]) [h w]", {"g": 2}, (2, 6, 3, 1), "c", lambda n, c, h, w: (n, c // 3), lambda n, c, h, w: c),
    "GhostBatchNorm": (
        "(g [n]) c [h]", {"g": 3}, (6, 2, 4), "c", lambda n, c, h: (n // 2, c), lambda n, c, h: c,
    ),
    "per time step": ("[n] t c", {}, (5, 3, 2), "c", lambda n, t, c: (t, c), lambda n, t, c: c),
    "interleaved": ("n ([c] g)", {"g": 2}, (3, 8), "c", lambda n, c: (n, c % 2), lambda n, c: c),
    "params out of order": ("n [c h] w", {}, (2, 3, 4, 2), "w c", lambda n, c, h, w: (n, w), lambda n, c, h, w: (w, c)),
    "everything": ("[n c]", {}, (4, 3), "c", lambda n, c: 0, lambda n, c: c),
}  # fmt: skip

row = pytest.mark.parametrize("name", ROWS)


def draw(name):
    pattern, sizes, shape, params, _, index = ROWS[name]
    cells = list(product(*map(range, shape)))
    last = np.atleast_1d(index(*cells[-1]))
    γ, β = (RNG.normal(size=last + 1) for _ in range(2))
    return pattern, sizes, RNG.normal(1.5, 2, size=shape), params, γ, β


def loop(x, label, index, *, γ, β, ε, center, mask, residual):
    """The definition, one cell at a time: `math.fsum` is exact up to its last rounding."""
    cells = list(product(*map(range, x.shape)))
    sets = {}
    for cell in cells:
        if mask[cell]:
            sets.setdefault(label(*cell), []).append(float(x[cell]))
    y = np.zeros_like(x)
    for cell in cells:
        if mask[cell]:
            values = sets[label(*cell)]
            mean = math.fsum(values) / len(values) if center else 0.0
            var = math.fsum((v - mean) ** 2 for v in values) / len(values)
            xhat = (x[cell] - mean) / math.sqrt(var + ε)
            y[cell] = γ[index(*cell)] * xhat + β[index(*cell)] + residual[cell]
    return y, sets


@row
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_a_loop_over_cells(name, center, masked):
    pattern, sizes, x, params, γ, β = draw(name)
    label, index = ROWS[name][4:]
    mask = RNG.random(x.shape) < 0.6 if masked else np.ones(x.shape, bool)
    residual = RNG.normal(size=x.shape)
    y = oracle.normalize(
        x, pattern, γ=γ, β=β, params=params, ε=0.03, center=center, mask=mask if masked else None, residual=residual,
        **sizes,
    )  # fmt: skip
    expected, sets = loop(x, label, index, γ=γ, β=β, ε=0.03, center=center, mask=mask, residual=residual)
    # A sum of 60 float64 values of size 3 errs by less than 60 · 2^-53 · 3 ≈ 2e-14.
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)
    m = oracle.moments(x, pattern, center=center, mask=mask, **sizes)
    assert m.m.sum() == mask.sum()
    assert sorted(m.m[m.m > 0]) == sorted(len(values) for values in sets.values())


def test_moments_have_the_axes_outside_in_pattern_order():
    x = RNG.normal(size=(2, 6, 3, 5))
    assert oracle.moments(x, "n (g [c]) [h w]", g=3).μ.shape == (2, 3)
    assert oracle.moments(x, "n [c] h w").σ2.shape == (2, 3, 5)
    assert oracle.moments(x, "[n c h w]").m.shape == ()


def test_numbers_by_hand():
    # S = {1, 3}: μ = 2, σ² = 1; with ε = 3 the root is 2.
    x = np.array([[1.0, 3.0]])
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", ε=3.0), [[-0.5, 0.5]])
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", ε=3.0, γ=[2, 4], β=[1, 1]), [[0, 3]])
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", ε=3.0, activation="relu"), [[0, 0.5]])
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", scale=False), [[-1, 1]])
    # Mean of squares 5, ε = 4: the root is 3.
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", center=False, ε=4.0), [[1 / 3, 1]])
    # Given moments 5 and 12.
    np.testing.assert_array_equal(oracle.normalize(x, "n [c]", moments=([5], [12]), ε=4.0), [[-1, -0.5]])
    # The residual is added before the activation.
    np.testing.assert_array_equal(
        oracle.normalize(x, "n [c]", ε=3.0, residual=[[1, -1]], activation="relu"), [[0.5, 0]]
    )
    mean, var, count = oracle.moments(x, "n [c]")
    assert (mean, var, count) == (2, 1, 2)
    # g = (1, 0) at x̂ = ∓1/2, r = 1/2: dx = r·(g − mean g − x̂·mean(g·x̂)) = ½·((1, 0) − ½ − (∓½)·(−¼))
    g = oracle.backward([[1.0, 0.0]], x, "n [c]", ε=3.0, γ=[1, 1], β=[0, 0])
    np.testing.assert_array_equal(g.dx, [[0.1875, -0.1875]])
    np.testing.assert_array_equal(g.dγ, [-0.5, 0])
    np.testing.assert_array_equal(g.dβ, [1, 0])


# Every option of the formula at least once with every other kind of option.
OPTIONS = {
    "plain": {},
    "rms": {"center": False},
    "centre only": {"scale": False},
    "neither": {"center": False, "scale": False},
    "masked": {"mask": True},
    "masked rms": {"mask": True, "center": False},
    "residual": {"residual": True, "activation": "silu"},
    "given": {"moments": True},
    "given, no scale": {"moments": True, "scale": False},
    "given rms": {"moments": True, "center": False},
    "given, masked": {"moments": True, "mask": True, "residual": True, "activation": "tanh"},
    "all": {"mask": True, "residual": True, "activation": "mish"},
    "all, centre only": {"mask": True, "residual": True, "activation": "gelu", "scale": False},
}


def slopes(f, a, h=1e-5):
    """Central differences, one element at a time."""
    slope = np.zeros(np.shape(a))
    for cell in product(*map(range, np.shape(a))):
        up, down = np.array(a, float), np.array(a, float)
        up[cell] += h
        down[cell] -= h
        slope[cell] = (f(up) - f(down)) / (2 * h)
    return slope


# Every scope with the options that touch all terms, every option with two scopes that use all of the notation.
SLOPES = [(name, option) for name in ROWS for option in ("plain", "given, masked", "all")]
SLOPES += [(name, option) for name in ("GroupNorm", "params out of order") for option in OPTIONS]


@pytest.mark.parametrize(("name", "option"), dict.fromkeys(SLOPES))
def test_backward_is_the_slope(name, option):
    pattern, sizes, x, params, γ, β = draw(name)
    options = dict(OPTIONS[option])
    given = {"x": x, "γ": γ, "β": β}
    if options.pop("mask", False):
        options["mask"] = RNG.random(x.shape) < 0.7
    if options.pop("residual", False):
        given["residual"] = RNG.normal(size=x.shape)
    if options.pop("moments", False):
        shape = oracle.moments(x, pattern, **sizes).μ.shape
        given |= {"μ": RNG.normal(size=shape), "σ2": RNG.random(shape) + 0.5}
    dy = RNG.normal(size=x.shape)

    def call(name, value, f):
        tensors = given | {name: value}
        moments = (tensors.pop("μ"), tensors.pop("σ2")) if "μ" in tensors else None
        return f(tensors.pop("x"), pattern, params=params, ε=0.1, moments=moments, **tensors, **options, **sizes)

    g = call("x", x, lambda x, *a, **k: oracle.backward(dy, x, *a, **k))
    for letter, value in given.items():
        slope = slopes(lambda v, letter=letter: (dy * call(letter, v, oracle.normalize)).sum(), value)
        # h² · third derivative ≈ 1e-10 · 60, and the rounding of a sum of 60 over 2h: 2e-14 / 2e-5 = 1e-9.
        np.testing.assert_allclose(getattr(g, "d" + letter), slope, rtol=1e-6, atol=2e-7)
    if "μ" not in given:
        assert g.dμ is None
        assert g.dσ2 is None


def test_masks_lacking_the_channel_axis_are_broadcast_over_it():
    x = RNG.normal(size=(2, 3, 4, 5))
    keep = RNG.random((2, 4, 5)) < 0.5
    for pattern in ("[n] c [h w]", "n [c h w]", "n c [h w]"):
        np.testing.assert_array_equal(
            oracle.normalize(x, pattern, mask=keep),
            oracle.normalize(x, pattern, mask=np.broadcast_to(keep[:, None], x.shape)),
        )
    leading = RNG.random((2, 3, 4)) < 0.5
    np.testing.assert_array_equal(
        oracle.normalize(x, "... [c]", mask=leading), oracle.normalize(x, "... [c]", mask=leading[..., None])
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_sets_of_no_cell_and_of_one(kept):
    x, mask = RNG.normal(size=(2, 4)), np.zeros((2, 4), bool)
    mask[0, :kept] = True
    mask[1] = True
    y = oracle.normalize(x, "n [c]", mask=mask, β=np.full(4, 3.0), residual=np.full((2, 4), 2.0))
    np.testing.assert_array_equal(y[0], [5.0 * kept, 0, 0, 0])  # x̂ = 0 leaves β + residual where a cell is kept
    assert oracle.moments(x, "n [c]", mask=mask).m.tolist() == [kept, 4]
    g = oracle.backward(np.ones((2, 4)), x, "n [c]", mask=mask)
    np.testing.assert_array_equal(g.dx[0], 0)


def test_masked_cells_hold_anything():
    x = RNG.normal(size=(2, 5))
    mask = np.array([[1, 1, 1, 0, 1]] * 2, bool)
    y = oracle.normalize(x, "n [c]", mask=mask)
    wild = np.where(mask, x, np.nan)
    np.testing.assert_array_equal(oracle.normalize(wild, "n [c]", mask=mask), y)
    np.testing.assert_allclose(y[:, mask[0]], oracle.normalize(x[:, mask[0]], "n [c]"), rtol=1e-14)


def test_empty_input():
    assert oracle.normalize(np.zeros((0, 3)), "[n] c").shape == (0, 3)
    assert oracle.backward(np.zeros((0, 3)), np.zeros((0, 3)), "[n] c", γ=np.ones(3)).dγ.tolist() == [0, 0, 0]


# Running statistics.


def test_the_running_variance_is_unbiased():
    x = np.array([[1.0], [3.0], [8.0]])  # mean 4, squares 9 + 1 + 16 = 26, unbiased variance 13
    E, Var = oracle.running(np.zeros(1), np.ones(1), oracle.moments(x, "[n] c"), 0.1)
    np.testing.assert_allclose([E[0], Var[0]], [0.4, 0.9 + 1.3], rtol=1e-15)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_are_torchs(momentum):
    layer = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    E, Var = np.zeros(3), np.ones(3)
    for step in range(1, 4):
        x = RNG.normal(size=(4, 3, 2, 2))
        layer(torch.tensor(x))
        E, Var = oracle.running(E, Var, oracle.moments(x, "[n] c [h w]"), momentum, step)
    np.testing.assert_allclose(E, layer.running_mean.numpy(), rtol=1e-13)
    np.testing.assert_allclose(Var, layer.running_var.numpy(), rtol=1e-13)


def test_running_statistics_stay_where_a_set_is_too_small():
    mask = np.array([[1, 1, 0], [1, 0, 0]], bool)  # sets of 2, 1 and 0 cells
    batch = oracle.moments(np.array([[1.0, 5, 9], [3, 5, 9]]), "[n] c", mask=mask)
    E, Var = oracle.running(np.zeros(3), np.ones(3), batch, 0.5)
    assert E.tolist() == [1.0, 2.5, 0.0]
    assert Var.tolist() == [1.5, 1.0, 1.0]


def test_caffes_accumulators_are_an_average_without_the_start():
    λ, batches = 0.9, [RNG.normal(size=(5, 2)) for _ in range(4)]
    caffe = oracle.Caffe(np.zeros(2), np.zeros(2))
    assert caffe.statistics()[1].tolist() == [0, 0]
    E, Var = np.zeros(2), np.zeros(2)
    for x in batches:
        batch = oracle.moments(x, "[n] c")
        caffe = caffe.step(batch, λ)
        E, Var = oracle.running(E, Var, batch, 1 - λ)
    # An average that starts at 0 still has the weight λ^T on that 0; Caffe divides by what is left.
    left = 1 - λ**4
    np.testing.assert_allclose(caffe.s, left / (1 - λ), rtol=1e-14)
    mean, var = caffe.statistics()
    np.testing.assert_allclose(mean, E / left, rtol=1e-13)
    np.testing.assert_allclose(var, Var / left, rtol=1e-13)
    means, variances = ([f(x, axis=0) for x in batches] for f in (np.mean, lambda x, axis: np.var(x, axis, ddof=1)))
    weights = λ ** np.arange(3, -1, -1)
    np.testing.assert_allclose(mean, np.average(means, axis=0, weights=weights), rtol=1e-13)
    np.testing.assert_allclose(var, np.average(variances, axis=0, weights=weights), rtol=1e-13)


def test_caffe_does_not_correct_one_cell():
    caffe = oracle.Caffe(np.zeros(1), np.zeros(1)).step(oracle.moments(np.ones((1, 1)), "[n] c"))
    assert (caffe.mean[0], caffe.variance[0], caffe.s) == (1, 0, 1)


def test_folded_is_unfolded():
    x = RNG.normal(size=(3, 4, 2, 2))
    γ, β, E, Var = RNG.normal(size=(4, 4))
    Var = Var**2
    a, b = oracle.fold(γ, β, E, Var, 0.01)
    y = oracle.normalize(x, "[n] c [h w]", γ=γ, β=β, moments=(E, Var), ε=0.01)
    np.testing.assert_allclose(a[:, None, None] * x + b[:, None, None], y, rtol=1e-12, atol=1e-13)


# Activations.

TORCH = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
}


def test_every_activation_is_tested():
    assert set(oracle.ACTIVATIONS) == set(TORCH) | {None}


@pytest.mark.parametrize("name", TORCH)
def test_activations_are_torchs_at_the_kinks_too(name):
    z = torch.linspace(-8, 8, 321, dtype=torch.float64).requires_grad_()  # the kinks −3, 0, 3, 6 are among them
    y = TORCH[name](z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    φ, dφ = oracle.ACTIVATIONS[name]
    z = z.detach().numpy()
    np.testing.assert_allclose(φ(z), y.detach().numpy(), rtol=1e-12, atol=1e-14)
    # torch's hardsigmoid divides by 6 in float32: 1/6 with an error of 5e-9.
    np.testing.assert_allclose(dφ(z), slope.numpy(), rtol=1e-12, atol=1e-8 if name == "hardsigmoid" else 1e-13)
