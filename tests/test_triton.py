"""The GPU kernels: the laws against float64, on a GPU or through Triton's interpreter on the CPU.

`make triton` runs this file, by the interpreter where there is no GPU; triton takes 1 GB, so most machines skip it. How
programs share a tensor is Python and tested everywhere.
"""

import copy
import importlib
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_kernels
import test_sync
import test_transforms
import torch
from cases import CASES, RAGGED_CASES, Case
from laws import (
    LAWS,
    Trial,
    a_sample_does_not_depend_on_its_batch,
    adds_the_residual_before_the_activation,
    agrees_under_a_mask,
    agrees_where_epsilon_decides,
    agrees_with_given_moments,
    agrees_with_the_oracle,
    applies_every_activation,
    as_accurate_off_centre,
    constant_input_is_defined,
    leaf,
    nan_and_inf_stay_in_their_set,
    other_sets_do_not_matter,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import normscope as ns
from normscope import oracle
from normscope.functional import graph, view
from normscope.kernels import cpu, triton
from normscope.kernels.triton import geometry

ON_GPU = torch.cuda.is_available()
runs = pytest.mark.skipif(
    triton.missing() is not None or not (ON_GPU or triton.interpreted()),
    reason="needs triton, and a GPU or its interpreter: make triton",
)
LAYOUTS = ("contiguous", "channels_last")
# Tiles so small that the sets of small tensors are split, have ragged ends and rows that no tile holds.
SMALL = geometry.Launch(
    tile=128, packed=64, resident=64, columns=32, least_columns=4, most_columns=8, sweep=2, merged=256, groups=2,
    short_run=6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """The interpreter without what is slow or wrong in it, none of which a GPU does."""
    if not triton.interpreted() or triton.missing():
        return
    from triton.runtime import interpreter

    patched = set()
    patch, run, cast = (
        interpreter._patch_lang,
        interpreter.GridExecutor.__call__,
        interpreter.InterpreterBuilder.cast_impl,
    )

    def patch_once(fn):  # it looks through the whole language at every call of every function, 3 ms each
        if id(fn.__globals__) in patched:
            return SimpleNamespace(restore=lambda: None)
        patched.add(id(fn.__globals__))
        return patch(fn)

    def run_afresh(self, *args, **kwargs):
        patched.clear()
        with np.errstate(all="ignore"):
            return run(self, *args, **kwargs)

    def rounding(self, source, to):  # it truncates float32 to bfloat16, a GPU rounds to the nearest
        if source.dtype.scalar == interpreter.tl.float32 and to.scalar == interpreter.tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16), to.scalar)
        return cast(self, source, to)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_afresh)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)


@pytest.fixture(params=["usual", "small"])
def tiles(request, monkeypatch):
    """Tiles as on a GPU, where every set of a small tensor is resident, and small ones."""
    if request.param == "small":
        monkeypatch.setattr(geometry, "LAUNCH", SMALL)
        triton.layout_of.cache_clear()
        view._kept.cache_clear()
    yield request.param
    triton.layout_of.cache_clear()
    view._kept.cache_clear()


class OnGpu:
    """normscope with tensors of the CPU, computed on a GPU; autograd goes through both ways."""

    @staticmethod
    def there(options):
        return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in options.items()}

    def normalize(self, x, pattern, *, moments=None, **options):
        if moments is not None:
            options["moments"] = tuple(t.cuda() for t in moments[:2])
        return ns.normalize(x.cuda(), pattern, **self.there(options)).cpu()

    def moments(self, x, pattern, **options):
        return ns.Moments(*(t.cpu() for t in ns.moments(x.cuda(), pattern, **self.there(options))))


ON = OnGpu() if ON_GPU else ns
# By the interpreter, where a call takes 0.1 s: what each body has a line for.
CHOSEN = {
    agrees_with_the_oracle: (torch.float32, torch.bfloat16),
    agrees_under_a_mask: (torch.float32,),
    agrees_with_given_moments: (torch.float32,),
    as_accurate_off_centre: (torch.float32,),
    adds_the_residual_before_the_activation: (torch.float16,),
    nan_and_inf_stay_in_their_set: (torch.float32,),
    other_sets_do_not_matter: (torch.float32,),
}
# Sets that small tiles split: parameters by row and by column, along and across, shared by groups of samples.
LARGER = (
    Case("a large layer", "n [c h w]", (5, 4, 5, 7), params="c h w"),
    Case("many channels", "n [c] h w", (2, 20, 3, 5)),
    Case("large groups", "n (g [c]) [h w]", (2, 6, 5, 9), {"g": 2}),
    Case("long rows", "... [c]", (3, 150)),
    Case("two axes of parameters", "n [c h w]", (2, 3, 6, 9), params="c w"),
)
IN_SMALL_TILES = {agrees_under_a_mask, as_accurate_off_centre, other_sets_do_not_matter}
ALL_LAWS = LAWS if ON_GPU else CHOSEN


@runs
@pytest.mark.parametrize("case", CASES if ON_GPU else CASES[::2], ids=str)
@pytest.mark.parametrize("law", ALL_LAWS, ids=lambda law: law.__name__)
def test_law(law, case, tiles):
    if not ON_GPU and law is not agrees_with_the_oracle and (tiles == "usual") == (law in IN_SMALL_TILES):
        return
    for dtype in ALL_LAWS[law]:
        for layout in LAYOUTS:
            law(Trial(ON, case, layout, dtype))


@runs
@pytest.mark.parametrize("case", [*CASES[1::2], *LARGER], ids=str)
def test_scope(case, tiles):
    for layout in LAYOUTS:
        agrees_with_the_oracle(Trial(ON, case, layout, torch.float32))


@runs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_neither_an_offset_nor_an_outlier_costs_precision_in_a_large_set(layout):
    grid = (torch.randn(16, 2, 64, 64) * 1024).round() / 1024
    # Four roundings of values below 5.
    for offset in (0, 8000):
        x = (grid + offset).contiguous(memory_format=layout)
        error = (ON.normalize(x, "[n] c [h w]").double() - truth(x)).abs().max()
        assert error < 4 * 5 * 2**-24
    x = grid.contiguous(memory_format=layout)
    x[0, :, 0] = 1e4  # the cells by which the first lanes are shifted
    # Sixteen roundings of values up to 50: by the interpreter, 2048 rows are added one after the other.
    assert (ON.normalize(x, "[n] c [h w]").double() - truth(x)).abs().max() < 16 * 50 * 2**-24


def truth(x):
    return torch.from_numpy(oracle.normalize(x.double().numpy(), "[n] c [h w]"))


@runs
@pytest.mark.parametrize("case", RAGGED_CASES if ON_GPU else RAGGED_CASES[::4], ids=str)
def test_ragged_sizes(case, tiles):
    agrees_where_epsilon_decides(Trial(ON, case, "contiguous", torch.float32))


@runs
@pytest.mark.parametrize("law", [applies_every_activation, constant_input_is_defined], ids=lambda law: law.__name__)
def test_law_on_one_scope(law):
    law(Trial(ON, CASES[7], "contiguous", torch.float32))


@runs
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["InstanceNorm2d", "GroupNorm", "LayerNorm2d"])
def test_a_sample_does_not_depend_on_its_batch(name, layout):
    (case,) = (case for case in CASES if case.name == name)
    a_sample_does_not_depend_on_its_batch(Trial(ON, case, layout, torch.float32))


def device():
    return "cuda" if ON_GPU else "cpu"


@runs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", test_kernels.STEPS)
def test_first_and_second_gradients(case, layout, monkeypatch):
    with torch.device(device()):
        test_kernels.test_first_and_second_gradients(None, case, layout, monkeypatch)


@runs
def test_running_statistics_move_as_torchs():
    layer, peer = (module.to(device()) for module in (ns.nn.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3)))
    version = layer.running_mean._version
    for _ in range(2):
        x = torch.randn(6, 3, 4, 5, device=device(), requires_grad=True)
        layer(x).backward(torch.randn_like(x))
        peer(x)
    # Two units of numbers below 2.
    torch.testing.assert_close(dict(layer.named_buffers()), dict(peer.named_buffers()), rtol=0, atol=5e-7)
    assert layer.running_mean._version == version + 2  # autograd notices
    with torch.no_grad():
        x[0, 0] = torch.inf
        before = layer.running_mean.clone()
        layer(x)
    assert layer.running_mean[0] == before[0]
    assert not torch.equal(layer.running_mean[1:], before[1:])
    layer.eval(), peer.eval()
    x = torch.randn(2, 3, 4, 5, device=device())
    peer.load_state_dict(layer.state_dict())
    # Four roundings of numbers below 8.
    torch.testing.assert_close(layer(x), peer(x).relu(), rtol=0, atol=4 * 8 * 2**-24)


@runs
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", test_sync.STEPS)
def test_synchronized_layers_take_their_steps(name, layout, tiles, monkeypatch):
    with torch.device(device()):
        for dtype in (torch.float32, torch.bfloat16):
            with monkeypatch.context() as patch:
                test_sync.test_the_kernels_in_steps_are_the_kernels_at_once(name, layout, dtype, patch)


@runs
@pytest.mark.skipif(ON_GPU, reason="gloo's tensors are those of the CPU")
def test_two_ranks_share_their_statistics(tmp_path):
    checks = ("kernels_on_some_ranks",)
    assert test_sync.torchrun(2, tmp_path, *checks) == [dict.fromkeys(checks, "")] * 2


@runs
def test_the_plan_says_which_kernels_run():
    small, large = (torch.zeros(n, 64, 8, 8, device=device()) for n in (4, 512))
    for x, forward, backward in ((small, 2, 3), (large, 3, 5)):
        plan = ns.plan(x, "[n] c [h w]")
        assert plan.kernel.startswith("triton: ")
        assert (plan.bytes_forward, plan.bytes_backward) == (forward * x.nbytes, backward * x.nbytes)


@runs
def test_tensors_on_two_devices_are_refused():
    x = torch.randn(2, 3, 4, 4, device=device())
    with pytest.raises(ns.ArgumentError, match="same device"):
        ns.normalize(x, "[n] c [h w]", weight=torch.ones(3, device="meta"))


# Captured and compiled.

on_gpu = pytest.mark.skipif(triton.missing() is not None or not ON_GPU, reason="needs a GPU and NORMSCOPE_TRITON=on")


class Residual(torch.nn.Module):
    """Resident and split sets, running statistics, a residual, a mask and two activations."""

    def __init__(self):
        super().__init__()
        self.batch, self.group = ns.nn.BatchNorm2d(8, activation="relu"), ns.nn.GroupNorm(2, 8, activation="silu")
        self.cumulative = ns.nn.BatchNorm2d(8, momentum=None)

    def forward(self, x, mask):
        return self.cumulative(self.group(self.batch(x, residual=x * 2), mask=mask), residual=x)


def residual_step(call, module, x, mask, g):
    y = call(x, mask)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), g)]


@on_gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_cuda_graph_replays_a_step_with_other_inputs(layout):
    def draw():
        x, g = (torch.randn(64, 8, 32, 32, device="cuda").contiguous(memory_format=layout) for _ in range(2))
        return x, torch.rand(64, 32, 32, device="cuda") > 0.3, g

    module = Residual().cuda()
    peer = copy.deepcopy(module)
    x, mask, g = draw()
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled before they can be captured
        residual_step(module, module, x, mask, g)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = residual_step(module, module, x, mask, g)
    module.load_state_dict(peer.state_dict())
    for _ in range(3):
        inputs = draw()
        with torch.no_grad():
            for t, new in zip((x, mask, g), inputs, strict=True):
                t.copy_(new)
        graph.replay()
        expected = residual_step(peer, peer, inputs[0].requires_grad_(), *inputs[1:])
        for a, b in zip((*found, *module.buffers()), (*expected, *peer.buffers()), strict=True):
            assert torch.equal(a, b)


@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_calls_these_kernels_on_a_gpu(mode, monkeypatch):
    monkeypatch.setitem(graph.LEAST_CELLS, "cuda", 1)
    torch.compiler.reset()
    module = Residual().cuda()
    peer = copy.deepcopy(module)
    call = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(3):  # the second call is recorded, the third replayed
        x, g = (torch.randn(64, 8, 32, 32, device="cuda") for _ in range(2))
        mask = torch.rand(64, 32, 32, device="cuda") > 0.3
        found = [t.clone() for t in residual_step(call, module, x.clone().requires_grad_(), mask, g)]
        expected = residual_step(peer, peer, x.requires_grad_(), mask, g)
        for a, b in zip((*found, *module.buffers()), (*expected, *peer.buffers()), strict=True):
            # Sums of 65,536 cells in another order, of numbers below 64.
            torch.testing.assert_close(a, b, rtol=2**-18, atol=256 * 64 * 2**-24)
    torch.compiler.reset()


@runs
@pytest.mark.parametrize("name", test_transforms.NODES)
def test_the_compilers_operators_are_these_kernels(name, monkeypatch):
    monkeypatch.setitem(graph.LEAST_CELLS, device(), 1)
    torch.compiler.reset()
    calls = test_transforms.NODES[name], torch.compile(test_transforms.NODES[name], backend="aot_eager", fullgraph=True)
    data, g = torch.randn(3, 4, 4, 4, device=device()), None
    found, ran, forward = [], [], triton.forward
    for call in calls:
        x = data.clone().requires_grad_()
        y = call(x)
        g = torch.randn_like(y) if g is None else g
        found.append((y.detach(), *torch.autograd.grad(y, x, g)))
        monkeypatch.setattr(triton, "forward", lambda *a: ran.append(1) or forward(*a))
    torch.compiler.reset()
    assert len(ran) == (name not in ("given moments", "too ragged a scope", "not dense"))
    # Sums of 48 cells at most, in another order, of numbers below 8.
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=48 * 8 * 2**-24)


def test_the_compiler_sees_the_same_operators_on_a_gpu(monkeypatch):
    """By tensors that only claim to be there."""
    for name in ("norm", "norm_backward"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normscope::{name}", key)
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert graph._least_cells("cuda", torch.float64) is None
    graphs = []

    def compiled(x, weight):
        torch.compiler.reset()
        call = torch.compile(
            lambda x, weight: ns.functional.group_norm(x, 4, weight, activation="relu"),
            backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True,
        )  # fmt: skip
        return call(x, weight)

    n = triton.LAUNCH.compiled // (8 * 64)
    with FakeTensorMode():
        for cells, dtype in ((n, torch.bfloat16), (n - 1, torch.bfloat16), (n, torch.float64)):
            x = torch.empty(cells, 8, 8, 8, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            y = compiled(x, torch.empty(8, device="cuda", dtype=dtype))
            assert (y.device, y.dtype, y.shape, y.stride()) == (x.device, x.dtype, x.shape, x.stride())
    torch.compiler.reset()
    targets = [{node.target for node in gm.graph.nodes} for gm in graphs]
    assert [torch.ops.normscope.norm.default in found for found in targets] == [True, False, False]


@runs
@pytest.mark.skipif(ON_GPU, reason="counted by the interpreter")
@pytest.mark.parametrize(
    ("shape", "pattern", "layout"),
    [
        ((40, 50), "... [c]", torch.contiguous_format),
        ((3, 20, 7, 9), "n [c] h w", torch.contiguous_format),
        ((64, 3, 20, 20), "[n] c [h w]", torch.contiguous_format),
        ((64, 3, 20, 20), "[n] c [h w]", torch.channels_last),
        ((6, 40, 7, 7), "[n] c [h w]", torch.contiguous_format),
    ],
    ids=["resident along", "resident across", "split along", "split across", "split and folded"],
)
def test_the_kernels_move_what_the_plan_says(shape, pattern, layout, monkeypatch):
    x, g = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    plan = ns.plan(x, pattern)
    moved = count_accesses(monkeypatch)
    a, weight = leaf(x), leaf(torch.ones(shape[-1 if pattern == "... [c]" else 1]))
    y = ns.normalize(a, pattern, weight=weight)
    dx, _ = torch.autograd.grad(y, (a, weight), g)
    cells, sweeps = x.numel(), (plan.passes[0] - 1, (plan.passes[1] - 1) // 2)
    # Every cell is written once. In a sum of its moments, the first of its at most four tiles is looked at twice.
    assert moved(y, "stored") == moved(dx, "stored") == cells
    assert moved(g, "loaded") == sweeps[1] * cells
    more = moved(x, "loaded") - sum(sweeps) * cells
    assert 0 <= more <= (sweeps[0] == 2) * cells
    assert (more > 0) == (sweeps[0] == 2)


def count_accesses(monkeypatch):
    """How often cells of a tensor are loaded or stored from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"loaded": [], "stored": []}

    def counting(name, what):
        original = getattr(InterpreterBuilder, name)

        def wrapped(self, pointers, *rest):
            mask = next(t for t in rest if t is not None and t.data.dtype == np.bool_)
            seen[what].append(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].ravel())
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, wrapped)

    counting("create_masked_load", "loaded")
    counting("create_masked_store", "stored")

    def moved(t, what):
        first = t.data_ptr()
        return sum(int(((a >= first) & (a < first + t.nbytes)).sum()) for a in seen[what])

    return moved


# Broken bodies, each with a law that it breaks; only the interpreter reads them anew.

FLAWS = {
    "the squares around 0": (
        "        shift = read(x, at, fits, ALIGN)\n", "        shift = read(x, at, fits, ALIGN) * 0.0\n",
        as_accurate_off_centre, "BatchNorm2d",
    ),
    "the remainder of the mean dropped": (
        "shift = -low * factor", "shift = 0.0 * factor", as_accurate_off_centre, "LayerNorm over a CNN layer",
    ),
    "the mean held in one number": (
        "tl.store(statistics + sets + s, low, mask=fits)", "tl.store(statistics + sets + s, low * 0.0, mask=fits)",
        as_accurate_off_centre, "BatchNorm2d",
    ),
    "means not merged": (
        "total(m2 + n * (away - mean) * (away - mean), ACROSS)", "total(m2, ACROSS)",
        agrees_with_the_oracle, "BatchNorm2d",
    ),
    "unbiased variance": (
        "tl.div_rn(m2, tl.maximum(count, 1.0))", "tl.div_rn(m2, tl.maximum(count - 1.0, 1.0))",
        agrees_with_the_oracle, "GroupNorm",
    ),
    "the ragged end of a row counted": (
        "tl.where(exist, plan.rows * plan.length, 0)", "tl.where(exist, R * C, 0)",
        agrees_with_the_oracle, "LayerNorm",
    ),
    "masked cells summed": (
        "d = tl.where(keep, v - shift, 0.0)", "d = v - shift", agrees_under_a_mask, "BatchNorm2d",
    ),
    "masked cells come out as β": (
        "z = tl.where(keep, z, 0.0)", "z = z + 0.0", agrees_under_a_mask, "LayerNorm",
    ),
    "masked cells get the mean's gradient": (
        "value = tl.where(kept(mask, at, fits, ALIGN), value, 0.0)", "value = value + 0.0",
        agrees_under_a_mask, "BatchNorm1d",
    ),
    "the residual after the activation": (
        "        z = z + read(residual, at, fits, ALIGN)\n    z = activate(z, ACT)\n",
        "        z = activate(z, ACT) + read(residual, at, fits, ALIGN)\n    z = z + 0.0\n",
        adds_the_residual_before_the_activation, "LayerNorm",
    ),
    "NaN swallowed by a ReLU": (
        "z = tl.where(z < 0.0, 0.0, z)", "z = tl.where(z > 0.0, z, 0.0)", nan_and_inf_stay_in_their_set, "LayerNorm",
    ),
    "the remainder missing in the gradient": (
        "b = -(set_gd - low * set_g) * rstd", "b = -set_gd * rstd", as_accurate_off_centre, "BatchNorm2d",
    ),
    "the mean of the gradient forgotten": (
        "c = -set_g * each * rstd - b * low", "c = -b * low", agrees_with_the_oracle, "GroupNorm",
    ),
    "only the last group's parameters": (
        "lane + task_group * chunks + piece", "lane + piece", agrees_with_the_oracle, "a large layer",
    ),
    "the first row's parameters for all": (
        "index = index + (r // plan.inner_rows) * plan.row0_param + (r % plan.inner_rows) * plan.row1_param",
        "index = index + r * 0", agrees_with_the_oracle, "GroupNorm",
    ),
}  # fmt: skip


@runs
@pytest.mark.skipif(ON_GPU, reason="compiled code is kept")
@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("tiles", ["small"], indirect=True)
def test_a_broken_body_is_seen(flaw, tiles, tmp_path, monkeypatch):
    from normscope.kernels.triton import bodies, launches

    sound, flawed, law, name = FLAWS[flaw]
    source = Path(bodies.__file__).read_text(encoding="utf-8")
    assert sound in source
    path = tmp_path / f"broken_{list(FLAWS).index(flaw)}.py"
    path.write_text(source.replace(sound, flawed), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(launches, "bodies", importlib.import_module(path.stem))
    (case,) = (case for case in (*CASES, *LARGER) if case.name == name)
    trials = [Trial(ns, case, layout, torch.float32) for layout in LAYOUTS]
    with pytest.raises(AssertionError):
        [law(trial) for trial in trials]


# How programs share a tensor: Python, tested everywhere.

SHAPES = {
    "BN": ((32, 64, 56, 56), "[n] c [h w]", {}, ("split", "split")),
    "BN, small maps": ((64, 512, 7, 7), "[n] c [h w]", {}, ("split", "split")),
    "BN, 14x14": ((32, 256, 14, 14), "[n] c [h w]", {}, ("resident", "split")),
    "GN": ((8, 256, 32, 32), "n (g [c]) [h w]", {"g": 32}, ("resident", "split")),
    "IN": ((4, 64, 128, 128), "n c [h w]", {}, ("resident", "split")),
    "LN2d": ((16, 96, 56, 56), "n [c] h w", {}, ("resident", "resident")),
    "LN, a layer": ((3, 8, 70, 70), "n [c h w]", {}, ("split", "split")),
}


def tile_for(shape, pattern, sizes, layout, launch=geometry.LAUNCH):
    x = torch.empty(shape, device="meta").contiguous(memory_format=layout)
    seen = view.view_of(x, pattern, sizes, "c")
    varies = tuple(part.axis in seen.params for part in seen.scope.parts)
    strides = seen.unfold(x).stride()
    loops = cpu.loops_of(seen.sizes, strides, seen.inside, varies, launch.short_run, launch.short_row)
    plan, across = geometry.plan_of(loops.numbers)
    return plan, geometry.tile_of(plan, across, launch)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("launch", [geometry.LAUNCH, SMALL], ids=["usual", "small"])
def test_tiles_are_within_their_bounds(name, launch):
    shape, pattern, sizes, kinds = SHAPES[name]
    for kind, layout in zip(kinds, (torch.contiguous_format, torch.channels_last), strict=True):
        plan, tile = tile_for(shape, pattern, sizes, layout, launch)
        assert launch is SMALL or ("resident" if tile.resident else "split") == kind
        for n in (tile.tasks, tile.rows, tile.columns, tile.warps):
            assert n & (n - 1) == 0
        assert math.prod(tile[5:8]) <= max(launch.tile, launch.packed, launch.resident)
        assert plan.tasks * plan.rows * plan.length == math.prod(shape)
        assert not tile.resident or (tile.rows >= plan.rows and (tile.across or tile.columns >= plan.length))
        assert tile.resident or tile.chunk % tile.rows == 0
        pieces = -(-plan.rows // tile.chunk) * (1 if tile.across else -(-plan.length // tile.columns))
        assert tile.resident or pieces * plan.fold <= 2 * launch.merged
        steps = [plan.row0 * (plan.rows > plan.inner_rows), plan.row1 * (plan.inner_rows > 1), plan.length]
        steps += [plan.task1 * (plan.tasks1 > 1), plan.task2 * (plan.tasks2 > 1)]
        assert all(step % tile.align == 0 for step in steps)


@pytest.mark.parametrize("name", ["GN", "IN", "LN2d", "LN, a layer"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_tiles_do_not_depend_on_the_batch(name, layout):
    shape, pattern, sizes, _ = SHAPES[name]
    one, many = (tile_for((n, *shape[1:]), pattern, sizes, layout)[1] for n in (1, 1000))
    assert one._replace(group=1, shared_params=many.shared_params) == many._replace(group=1)


def test_odd_rows_and_tensors_that_begin_in_between_are_not_called_aligned():
    _, tile = tile_for((4, 3, 5, 9), "[n] c [h w]", {}, torch.contiguous_format)
    assert tile.align == 1
    _, tile = tile_for((4, 3, 14, 14), "[n] c [h w]", {}, torch.contiguous_format)
    assert tile.align == 4
    if triton.missing() is None:
        launches = importlib.import_module("normscope.kernels.triton.launches")
        x = torch.empty(32, device=device())
        assert [launches._align(tile, x[k:], x) for k in (0, 1, 2, 4)] == [4, 1, 2, 4]


# The code of a GPU, compiled without one.


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton: pip install 'normscope[gpu]'")
def test_every_access_to_a_tensor_takes_16_bytes():
    script = Path(__file__).parents[1] / "scripts" / "triton_code.py"
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    done = subprocess.run(
        [sys.executable, script, "--check"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
