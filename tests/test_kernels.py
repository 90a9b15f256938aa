"""The compiled kernels at the sizes where their loops change, on every instruction set.

The laws cover small and ragged tensors; here are runs longer than a segment (2048), more columns than a tile (512),
more rows than a block (128), slabs larger than the cache (2¹⁸ cells), more tasks than accumulators (64).
"""

import ctypes
import math
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import normscope as ns
from normscope import oracle
from normscope.functional import compiled, shortcut, view
from normscope.kernels import COMPUTE_DTYPE, cpu
from normscope.kernels.formula import Formula

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"no compiled kernels here: {cpu.missing()}")

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
CASES = {
    "along, rows of one segment and a bit": ("[n] c [h w]", (5, 3, 47, 45), CONTIGUOUS, {}),
    "along, one slab shared by all threads": ("[n] c [h w]", (40, 2, 64, 64), CONTIGUOUS, {}),
    "along, slabs that stay in cache": ("[n] c [h w]", (6, 11, 40, 40), CONTIGUOUS, {}),
    "along, parameters by row": ("n (g [c]) [h w]", (3, 24, 17, 19), CONTIGUOUS, {"g": 4}),
    "along, parameters along the run": ("... [c]", (70, 5, 300), CONTIGUOUS, {}),
    "along, more tasks than accumulators": ("... [c]", (331, 130), CONTIGUOUS, {}),
    "along, a run of many segments": ("... [c]", (2, 140_001), CONTIGUOUS, {}),
    "across, more rows than a block": ("[n] c [h w]", (7, 37, 9, 11), LAST, {}),
    "across, more columns than a tile": ("[n] c", (300, 1301), CONTIGUOUS, {}),
    "across, a slab beyond the cache": ("[n] c [h w]", (24, 65, 20, 20), LAST, {}),
    "across, parameters by row": ("n [c] h w", (4, 33, 29, 31), CONTIGUOUS, {}),
    "across, many samples": ("n c [h w]", (6, 19, 21, 23), LAST, {}),
    "folded groups": ("n (g [c]) [h w]", (3, 66, 13, 15), LAST, {"g": 6}),
    "folded maps": ("[n] c [h w]", (33, 90, 7, 7), CONTIGUOUS, {}),
    "folded rows of few channels": ("... [c]", (211, 7), CONTIGUOUS, {}),
    "ghosts": ("(g [n]) c [h w]", (12, 9, 16, 17), CONTIGUOUS, {"g": 3}),
    "time steps": ("[n] t c", (40, 13, 31), CONTIGUOUS, {}),
}
OPTIONS = {
    "plain": {},
    "activation and residual": {"activation": "silu", "residual": True},
    "relu": {"activation": "relu"},
    "sum": {"residual": True},
    "relu of a sum": {"activation": "relu", "residual": True},
    "not centred": {"center": False},
    "not scaled": {"scale": False},
    "given moments": {"moments": True},
}


def operands(case, dtype, option):
    pattern, shape, layout, sizes = CASES[case]
    axis = (
        -1
        if pattern == "... [c]"
        else pattern.replace("(g [n])", "n")
        .replace("(g [c])", "c")
        .replace("[", "")
        .replace("]", "")
        .split()
        .index("c")
    )
    channels = shape[axis]
    x = (torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=layout)
    tensors = {"weight": torch.randn(channels), "bias": torch.randn(channels)}
    options = dict(OPTIONS[option])
    if options.get("residual"):
        tensors["residual"] = torch.randn(shape).to(dtype)
    if options.pop("moments", False):
        mean, var, _ = ns.moments(x, pattern, **sizes)
        options["moments"] = (mean + 0.5, var * 2)
    options.pop("residual", None)
    return x, pattern, tensors, options, sizes


def run(x, pattern, tensors, options, sizes, dy):
    leaves = {"x": x, **tensors}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    rest = {name: t for name, t in leaves.items() if name != "x"}
    y = ns.normalize(leaves["x"], pattern, **rest, **options, **sizes)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def truth(x, pattern, tensors, options, sizes, dy):
    names = {"weight": "γ", "bias": "β", "residual": "residual"}
    arrays = {names[name]: t.double().numpy() for name, t in tensors.items()}
    if "moments" in options:
        options = {**options, "moments": tuple(t.double().numpy() for t in options["moments"])}
    n = {**arrays, **options, **sizes}
    g = oracle.backward(dy.double().numpy(), x.double().numpy(), pattern, **n)
    grads = {"x": g.dx, "weight": g.dγ, "bias": g.dβ, "residual": g.dresidual}
    return {
        "y": oracle.normalize(x.double().numpy(), pattern, **n),
        **{k: v for k, v in grads.items() if k == "x" or k in tensors},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, option, dtype):
    x, pattern, tensors, options, sizes = operands(case, dtype, option)
    dy = torch.randn(x.shape).to(dtype)
    if options.get("activation") == "relu":  # at the kink a rounding of z may open or close the gate
        z = truth(x, pattern, tensors, {**options, "activation": None}, sizes, dy)["y"]
        dy[torch.from_numpy(np.abs(z) < 1e-5)] = 0
    got, want = run(x, pattern, tensors, options, sizes, dy), truth(x, pattern, tensors, options, sizes, dy)
    for name, expected in want.items():
        value = got[name].double().numpy()
        largest = np.abs(expected).max()
        # float32: some ten roundings of the largest value; a sum of m products of both signs errs by √m roundings of
        # terms that are as large as its largest. bfloat16 results are rounded once more, by half of 2⁻⁸.
        m = x.numel() / max(value.size, 1)
        tolerance = 2e-6 * largest * (1 + 0.05 * np.sqrt(m))
        if got[name].dtype == torch.bfloat16:
            tolerance = np.maximum(np.abs(expected) * 2**-8, tolerance + 2**-8 * largest * 1e-3)
        worst = np.abs(value - expected) - tolerance
        assert not np.any(~(worst <= 0)), f"{name}: {worst.max():.1e} beyond the tolerance, largest value {largest:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_matter(case):
    x, pattern, tensors, options, sizes = operands(case, torch.float32, "activation and residual")
    dy = torch.randn(x.shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(x, pattern, tensors, options, sizes, dy))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.fixture(params=["C++", "Python"])
def steps(request, monkeypatch):
    """The steps between the kernels, each of the two."""
    if request.param == "Python":
        monkeypatch.setattr(cpu, "autograd_missing", lambda: "switched off by a test")
    elif (reason := cpu.autograd_missing()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(shortcut, "_doors", {})
    view._kept.cache_clear()
    yield request.param
    view._kept.cache_clear()


STEPS = {
    "plain": ("[n] c [h w]", {}),
    "residual alone": ("n (g [c]) [h w]", {"residual": True, "g": 2}),
    "residual behind a gate": ("[n] c [h w]", {"residual": True, "activation": "relu"}),
    "residual before a curve": ("n c [h w]", {"residual": True, "activation": "silu"}),
    "masked": ("[n] c [h w]", {"residual": True, "activation": "relu", "mask": True}),
    "masked residual alone": ("n [c h w]", {"residual": True, "mask": True}),
    "parameters in another order": ("n [c h w]", {"params": "h c w", "activation": "gelu"}),
    "given moments": ("[n] c [h w]", {"moments": True, "activation": "tanh"}),
    "given moments of two axes": ("n c [h w]", {"moments": True, "residual": True}),
}


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", STEPS)
def test_first_and_second_gradients(steps, case, layout, monkeypatch):
    """As those of float64 by the eager kernels."""
    pattern, options = STEPS[case]
    options = dict(options)
    shape = (3, 4, 5, 6)
    sizes = {"c": 4, "h": 5, "w": 6}
    params = [sizes[name] for name in options.get("params", "c").split()]
    leaves = {"x": torch.randn(shape).contiguous(memory_format=layout)}
    leaves |= {name: torch.randn(params) for name in ("weight", "bias")}
    if options.pop("residual", False):
        leaves["residual"] = torch.randn(shape)
    if options.pop("mask", False):
        options["mask"] = torch.rand(shape) > 0.3
    moments = options.pop("moments", False)
    upstream, direction = torch.randn(shape), torch.randn(shape)

    def gradients(dtype):
        tensors = {name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in leaves.items()}
        more = dict(options)
        if moments:
            mean, var, _ = ns.moments(leaves["x"], pattern)
            more["moments"] = (mean.to(dtype) + 0.5, var.to(dtype) * 2)
        x, *rest = tensors.values()
        y = ns.normalize(x, pattern, **dict(zip(list(tensors)[1:], rest, strict=True)), **more)
        gy = upstream.to(dtype, copy=True).requires_grad_()
        first = torch.autograd.grad(y, [x, *rest], gy, create_graph=True)
        second = torch.autograd.grad((first[0] * direction.to(dtype)).sum(), [x, *rest, gy], allow_unused=True)
        once = torch.autograd.grad(ns.normalize(x, pattern, **dict(zip(list(tensors)[1:], rest, strict=True)), **more),
                                   [x, *rest], upstream.to(dtype))  # fmt: skip
        return [torch.zeros(()) if t is None else t for t in (*first, *once, *second)]

    single, double = gradients(torch.float32), gradients(torch.float64)
    monkeypatch.setattr(compiled, "backend_of", lambda _: None)
    monkeypatch.setattr(shortcut, "enter", lambda *_: None)
    for found, eps in ((single, 2e-5), (double, 2e-14)):  # some sixty cells per sum, three sums deep
        for got, want in zip(found, gradients(torch.float64), strict=True):
            assert (got.double() - want).abs().max() <= eps * (1 + want.abs().max())


def test_the_steps_move_running_statistics_alike(steps):
    x = torch.randn(6, 3, 4, 5, requires_grad=True)
    layer, peer = ns.nn.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3)
    versions = layer.running_mean._version, layer.running_var._version
    layer(x), peer(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(peer.named_buffers()))
    if steps == "C++":  # autograd notices, as with torch's layer
        assert (layer.running_mean._version, layer.running_var._version) == (versions[0] + 1, versions[1] + 1)
    with torch.no_grad():
        x[0, 0] = torch.inf
        before = layer.running_mean.clone()
        layer(x)
    assert layer.running_mean[0] == before[0]
    assert not torch.equal(layer.running_mean[1:], before[1:])


def test_bfloat16_parameters_get_bfloat16_gradients(steps):
    layer = ns.nn.RMSNorm(48, dtype=torch.bfloat16)
    x = torch.randn(5, 48, dtype=torch.bfloat16, requires_grad=True)
    layer(x).backward(torch.randn_like(x))
    assert layer.weight.grad.dtype == x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.isfinite().all()


def test_a_mode_sees_torchs_operators():
    """Whoever watches the operators (a counter of FLOPs, fake tensors, a tracer) finds none of ours."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.namespace)
            return function(*args, **(kwargs or {}))

    names = set()
    layer, x = ns.nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    with Names():
        layer(x).backward(torch.randn_like(x))
    assert names == {"aten"}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ns.nn.GroupNorm(1, 3)(mode.from_tensor(x.detach())).shape == x.shape


def test_an_offset_costs_nothing_in_a_shared_slab():
    grid = (torch.randn(40, 2, 64, 64) * 1024).round() / 1024
    for layout in (CONTIGUOUS, LAST):
        for offset in (0, 8000):
            x = (grid + offset).contiguous(memory_format=layout)
            error = np.abs(
                ns.normalize(x, "[n] c [h w]").double().numpy() - oracle.normalize(x.double().numpy(), "[n] c [h w]")
            ).max()
            assert error < 9e-7  # four roundings of values up to 4.6


def test_a_bad_first_guess_of_the_mean_is_mended():
    # The first 64 cells, from which the shift is guessed, lie 10⁴ away from all others: around that guess the squares
    # are 2500 times the variance, so the sums are taken again around the mean found.
    x = torch.randn(40, 2, 64, 64)
    x[0, :, 0] = 1e4
    expected = oracle.normalize(x.double().numpy(), "[n] c [h w]")
    for layout in (CONTIGUOUS, LAST):
        error = np.abs(ns.normalize(x.contiguous(memory_format=layout), "[n] c [h w]").double().numpy() - expected)
        # Four roundings of values up to 50.
        assert error.max() < 4 * 50 * 2**-24


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=["along", "across"])
def test_nothing_of_an_infinite_gradient_passes_a_closed_gate(layout, masked, dtype):
    x = torch.randn(3, 4, 17, 19).to(dtype).contiguous(memory_format=layout).requires_grad_()
    mask = torch.rand(3, 1, 17, 19) < 0.8 if masked else None
    y = ns.normalize(x, "[n] c [h w]", activation="relu", mask=mask)
    (dx,) = torch.autograd.grad(y, x, torch.where(y > 0, 1.0, torch.inf).to(dtype))
    assert dx.isfinite().all()


def test_a_tensor_that_does_not_match_its_plan_is_refused():
    x = torch.randn(4, 6)
    layout = cpu.layout_of((4, 6), (6, 1), (0,), (False, False))
    with pytest.raises(RuntimeError, match="plan does not match"):
        torch.ops.normscope.forward.default(
            x[:3].contiguous(), None, None, x, None, None, None, None, torch.empty(5, 6), layout.plan, 3, 1e-5
        )
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16 only"):
        torch.ops.normscope.forward.default(
            x.int(), None, None, x.int(), None, None, None, None, torch.empty(5, 6), layout.plan, 3, 1e-5
        )


def up_to_a_guard(shape, dtype):
    """A tensor whose last cell is the last of a page; the pages before and behind it may not be touched."""
    count, page = math.prod(shape), mmap.PAGESIZE
    size = count * dtype.itemsize
    pages = -(-size // page) + 2
    memory = mmap.mmap(-1, pages * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (0, (pages - 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + at), page, 0) == 0
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=(pages - 1) * page - size).view(shape)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("... [c]", (3, 9)),
        ("... [c]", (331, 40)),
        ("... [c]", (37, 257)),
        ("[n] c [h w]", (3, 5, 17, 19)),
        ("[n h w] c", (3, 5, 7, 37)),
        ("[n] c [h w]", (5, 9, 7, 7)),
        ("n g [c h w]", (2, 3, 20, 5, 5)),
    ],
)
def test_no_cell_beyond_the_ends_is_touched(pattern, shape, activation, dtype):
    """A read or write outside would end the process; where tensors begin is as odd as their sizes."""
    x, gy, residual, y, dx, dresidual = (up_to_a_guard(shape, dtype) for _ in range(6))
    for t in (x, gy, residual):
        t.normal_()
    channels = view.view_of(x, pattern, {}, "c")
    formula = Formula(channels.inside, 1e-5, activation=activation)
    layout = compiled.layout_of(x, channels, channels.params)
    count = shape[channels.params[0]]
    weight, bias, dweight, dbias = (up_to_a_guard((count,), COMPUTE_DTYPE[dtype]).fill_(1) for _ in range(4))
    statistics = up_to_a_guard((5, layout.set_count), COMPUTE_DTYPE[dtype])
    flags = cpu._flags(formula, False)
    torch.ops.normscope.forward(
        x, residual, None, y, weight, bias, None, None, statistics, layout.plan, flags, formula.eps
    )
    torch.ops.normscope.backward(
        gy, x, residual, None, None, dx, dresidual, weight, bias, statistics, dweight, dbias, layout.plan, flags
    )
    assert all(t.isfinite().all() for t in (y, dx, dresidual, dweight, dbias))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(isa):
    def python(*arguments):
        environment = {**os.environ, "NORMSCOPE_ISA": isa, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    used = python("-c", "from normscope.kernels import cpu; cpu.missing(); print(cpu.isa())").stdout.strip()
    if used != isa or isa == cpu.isa():
        return  # this machine lacks it, or the other tests of this file have just run it
    chosen = (
        "test_against_the_oracle and (plain or silu) or test_an_offset or test_a_bad_first_guess or beyond_the_ends"
    )
    result = python("-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen)
    assert result.returncode == 0, result.stdout[-3000:]
