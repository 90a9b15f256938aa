"""Our layers under what torch does to a model: compilers, exporters, tracers, torch.func, autocast, hooks."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch_cases import eps_of, largest, random_like, randomized

import normscope as ns
from normscope.functional import graph
from normscope.kernels import cpu

# Torch compiles some of its own forward-mode formulas with torch.jit.script when the first dual tensor is made.
TORCH_SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
# torch.jit.trace announces its own end.
TORCH_TRACES = pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
# Inductor scripts a module of its own when it is imported.
TORCH_INDUCTOR = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# torch.export asks its own tree specifications a deprecated question.
TORCH_EXPORTS = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")


def convnet(namespace: Any = ns.nn, momentum: float | None = 0.1) -> nn.Sequential:
    """Every kind of layer between two convolutions and a classifier; running statistics in three of them.

    No parameter has the gradient zero: no bias stands before a centring layer, none of these before another.
    """
    torch.manual_seed(1)
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(3, 8, 3, bias=False))
    net.add_module("batch", namespace.BatchNorm2d(8, momentum=momentum))
    net.add_module("act", nn.ReLU())
    net.add_module("conv2", nn.Conv2d(8, 8, 3, bias=False))
    net.add_module("group", namespace.GroupNorm(2, 8))
    net.add_module("act2", nn.SiLU())
    net.add_module("instance", namespace.InstanceNorm2d(8, affine=True, track_running_stats=True))
    net.add_module("act3", nn.Tanh())
    net.add_module("flat", nn.Flatten(2))
    net.add_module("layer", namespace.LayerNorm(16))
    net.add_module("rms", namespace.RMSNorm(16))
    net.add_module("act4", nn.SiLU())
    net.add_module("batch1", namespace.BatchNorm1d(8, momentum=momentum))
    net.add_module("out", nn.Flatten())
    net.add_module("head", nn.Linear(128, 4))
    return randomized_statistics(net)


def mlp(namespace: Any = ns.nn, norm: str = "BatchNorm1d") -> nn.Sequential:
    torch.manual_seed(2)
    second = {"GroupNorm": (2, 6), "LayerNorm": (6,), "RMSNorm": (6,), "BatchNorm1d": (6,)}[norm]
    return randomized_statistics(
        nn.Sequential(nn.Linear(5, 6, bias=False), getattr(namespace, norm)(*second), nn.Tanh(), nn.Linear(6, 2))
    )


def randomized_statistics(net: nn.Sequential) -> nn.Sequential:
    for index, module in enumerate(net):
        if "Norm" in type(module).__name__:
            randomized(module, index)
    return net


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.5).to(dtype)


class Block(nn.Module):
    """All three added arguments at once: a residual block with padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, 6)
        self.norm = ns.nn.LayerNorm(6, activation="gelu")
        self.batch = ns.nn.BatchNorm1d(6, activation="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.linear(x), residual=x, mask=mask)
        return self.batch(x.transpose(1, 2), residual=x.transpose(1, 2), mask=mask)


def one_step(call: Callable[..., Tensor], net: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients of the first input and all parameters, buffers after the call."""
    first = inputs[0].detach().requires_grad_()
    y = call(first, *inputs[1:])
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [first, *parameters], random_like(y.detach(), 7), allow_unused=True)
    result = {"output": y.detach()} | dict(zip(("gradient of input", *names), grads, strict=True))
    return result | {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_same(mine: dict[str, Tensor], expected: dict[str, Tensor], ulp: float = 2000) -> None:
    """Equal to `ulp` ulp of the largest value.

    A net of ten float32 layers amplifies the roundings of its first ones by its normalizers' (σ² + ε)^−½; the
    compiled and the eager net differ in the order of their sums.
    """
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert mine[name] is None, name
        elif value.is_floating_point():
            bound = ulp * eps_of(value.dtype) * largest(value)
            torch.testing.assert_close(mine[name], value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(mine[name], value), name


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["torch's operators", "the kernels' operators"])
def fresh_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that knows nothing yet; small tensors are normalized by torch's operators, then by the kernels."""
    if "kernels" in request.param:
        if (reason := cpu.missing()) is not None:
            pytest.skip(reason)
        monkeypatch.setitem(graph.LEAST_CELLS, "cpu", 1)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("training", "momentum"), [(True, 0.1), (True, None), (False, 0.1)], ids=["train", "train-cumulative", "eval"]
)
def test_compile_in_one_graph(training: bool, momentum: float | None) -> None:
    """One graph, compiled once: neither the counter of batches nor eps or momentum may become a guard that fails.

    momentum=None breaks the graph of torch's own layer, which reads its counter as a Python number.
    """
    eager = convnet(momentum=momentum).train(training)
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=counter, fullgraph=True)
    for seed in range(3):
        x = data(4, 3, 8, 8, seed=seed)
        assert_same(one_step(call, compiled, x), one_step(eager, eager, x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_dynamic_shapes() -> None:
    """A new batch size does not compile again."""
    eager = convnet()
    compiled = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(compiled, backend=counter, fullgraph=True, dynamic=True)
    for size in (4, 6, 3):
        x = data(size, 3, 8, 8, seed=size)
        assert_same(one_step(call, compiled, x), one_step(eager, eager, x))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_residual_activation_and_mask() -> None:
    eager = Block()
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        x, mask = data(3, 5, 6, seed=seed), data(3, 5, seed=seed) > 0
        assert_same(one_step(call, compiled, x, mask), one_step(eager, eager, x, mask))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", ["batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"])
def test_compile_functions_in_bfloat16_and_channels_last(function: str) -> None:
    x = data(3, 4, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    arguments: tuple[Any, ...] = {
        "batch_norm": (None, None, None, None, True),
        "layer_norm": ((5, 5),),
        "rms_norm": ((5,),),
        "group_norm": (2,),
        "instance_norm": (),
    }[function]
    f = getattr(ns.functional, function)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(x, *arguments)
    eager = f(x, *arguments)
    # bfloat16 is rounded once, from float32 results that may differ in the last bits
    torch.testing.assert_close(compiled, eager, rtol=0, atol=eps_of(torch.bfloat16) * largest(eager))
    assert compiled.stride() == eager.stride()


NODES = {
    "sets in another order than the axes": lambda x: ns.normalize(x, "[n] c h w", activation="gelu"),
    "given moments": lambda x: ns.normalize(x, "[n] c [h w]", moments=(x[0, :, 0, 0] * 0 + 1, x[0, :, 0, 0] * 0 + 2)),
    "too ragged a scope": lambda x: ns.normalize(x.reshape(3, 2, 2, 2, 2, 2, 2), "[a] b [c] d [e] f [g]"),
    "not dense": lambda x: ns.functional.group_norm(x[:, :, ::2], 2, activation="relu"),
    "parameters in another order": lambda x: ns.normalize(
        x, "[n] c h [w]", weight=x[0, :, :, 0].T * 2, bias=x[1, :, :, 1].T, params="h c", residual=x, activation="relu"
    ),
    "a mask": lambda x: ns.normalize(x, "n (g [c]) [h w]", g=2, mask=x[:, :1] > 0, residual=x * 2, activation="silu"),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NODES)
def test_compile_what_the_kernels_see_otherwise(name: str, layout: torch.memory_format) -> None:
    inputs = [data(3, 4, 4, 4, seed=5).contiguous(memory_format=layout).requires_grad_() for _ in range(2)]
    calls = NODES[name], torch.compile(NODES[name], backend="aot_eager", fullgraph=True)
    expected, y = (call(x) for call, x in zip(calls, inputs, strict=True))
    assert y.stride() == expected.stride()
    found = [
        torch.autograd.grad(t, x, random_like(t.detach(), 3))[0] for t, x in zip((expected, y), inputs, strict=True)
    ]
    for one, other in ((expected, y), found):
        # Sums of 48 cells at most, in another order.
        torch.testing.assert_close(one, other, rtol=0, atol=100 * eps_of(torch.float32) * largest(one))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layer", [ns.nn.BatchRenorm(4), ns.nn.SwitchNorm(4)], ids=lambda layer: type(layer).__name__)
def test_compile_layers_that_need_the_moments(layer: nn.Module) -> None:
    """In evaluation, too, where nothing is moved."""
    for training in (True, False):
        mine, compiled = (copy.deepcopy(layer).train(training) for _ in range(2))
        x = data(3, 4, 4, 4)
        call = torch.compile(compiled, backend="aot_eager")
        assert_same(one_step(call, compiled, x), one_step(mine, mine, x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_functions_under_functorch_take_torchs_operators() -> None:
    def per_sample(w: Tensor, x: Tensor) -> Tensor:
        loss = lambda w, x: ns.functional.layer_norm(x, (4,), w).square().sum()  # noqa: E731
        return vmap(grad(loss), in_dims=(None, 0))(w, x)

    w, x = data(4), data(3, 5, 4, seed=1)
    torch.testing.assert_close(torch.compile(per_sample, backend="aot_eager", fullgraph=True)(w, x), per_sample(w, x))


@TORCH_INDUCTOR
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_inductor() -> None:
    """Generated C++ code; needs a C++ compiler, as torch.compile itself does."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler here")
    eager = mlp()
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    with config.patch(compile_threads=1):  # a pool of compiling processes does not pay for two kernels
        for seed in range(2):
            x = data(7, 5, seed=seed)
            assert_same(one_step(call, compiled, x), one_step(eager, eager, x))


# --- torch.export ---------------------------------------------------------------------------------------------------


def operators(graph: fx.Graph) -> set[str]:
    """The namespaces of all operators called in a graph."""
    return {
        target.namespace if isinstance(target, torch._ops.OpOverload) else repr(target)
        for target in (node.target for node in graph.nodes if node.op == "call_function")
        if "getitem" not in repr(target)
    }


@functools.cache
def export_once(training: bool, momentum: float | None, strict: bool, decompose: bool) -> Any:
    if decompose:
        return export_once(training, momentum, strict, False).run_decompositions()
    net = convnet(momentum=momentum).train(training)
    return torch.export.export(net, (data(4, 3, 8, 8),), strict=strict)


def exported(training: bool, momentum: float | None, strict: bool, decompose: bool) -> tuple[nn.Module, Any]:
    net = convnet(momentum=momentum).train(training)
    return net, copy.deepcopy(export_once(training, momentum, strict, decompose))


EXPORTS = [
    pytest.param(True, 0.1, True, id="train-strict"),
    pytest.param(True, None, False, id="train-cumulative-non-strict"),
    pytest.param(False, 0.1, True, id="eval-strict"),
    pytest.param(False, 0.1, False, id="eval-non-strict"),
]


@TORCH_EXPORTS
@pytest.mark.parametrize(("training", "momentum", "strict"), EXPORTS)
def test_export_leaves_aten_operators_only(training: bool, momentum: float | None, strict: bool) -> None:
    """Before and after decomposition, as torch's layers do, so that a reader of the program needs no normscope."""
    net, program = exported(training, momentum, strict, False)
    assert "normscope" not in str(program.graph)
    assert operators(program.graph) == {"aten"}
    _, decomposed = exported(training, momentum, strict, True)
    assert operators(decomposed.graph) == {"aten"}
    mutated = set(decomposed.graph_signature.buffers_to_mutate.values())
    assert mutated == ({name for name, _ in net.named_buffers()} if training else set())


@TORCH_EXPORTS
@pytest.mark.parametrize("decompose", [False, True], ids=["program", "decomposed"])
@pytest.mark.parametrize(("training", "momentum", "strict"), EXPORTS)
def test_exported_program_runs(training: bool, momentum: float | None, strict: bool, decompose: bool) -> None:
    """Outputs and running statistics over two batches, as the net's own."""
    net, program = exported(training, momentum, strict, decompose)
    module = program.module()
    for seed in range(2):
        x = data(4, 3, 8, 8, seed=seed)
        assert_same({"output": module(x)}, {"output": net(x)})
    buffers = dict(module.named_buffers())
    assert_same(buffers, {name: b for name, b in net.named_buffers() if name in buffers})
    if training:
        assert len(buffers) == 9


@TORCH_EXPORTS
def test_export_with_dynamic_batch() -> None:
    net = convnet().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(net, (data(4, 3, 8, 8),), dynamic_shapes={"input": {0: batch}})
    for size in (2, 7):
        x = data(size, 3, 8, 8)
        assert_same({"output": program.module()(x)}, {"output": net(x)})


@TORCH_EXPORTS
def test_export_with_residual_activation_and_mask() -> None:
    net = Block().eval()
    x, mask = data(3, 5, 6), data(3, 5) > 0
    program = torch.export.export(net, (x, mask))
    assert operators(program.graph) == {"aten"}
    assert_same({"output": program.module()(x, mask)}, {"output": net(x, mask)})


# --- torch.fx and torch.jit -------------------------------------------------------------------------------------------


def test_symbolic_trace_keeps_layers_as_leaves() -> None:
    """As torch's layers: one call_module node each, so that fx passes find them by type."""
    net = convnet()
    traced, reference = fx.symbolic_trace(net), fx.symbolic_trace(convnet(nn))
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [(n.op, str(n.target)) for n in reference.graph.nodes]
    x = data(4, 3, 8, 8)
    twin = fx.symbolic_trace(copy.deepcopy(net))
    assert_same(one_step(twin, twin, x), one_step(net, net, x))


def test_symbolic_trace_of_added_arguments() -> None:
    net = Block().eval()
    traced = fx.symbolic_trace(net)
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    assert [node.target for node in calls] == ["linear", "norm", "batch"]
    assert set(calls[1].kwargs) == {"residual", "mask"}
    x, mask = data(3, 5, 6), data(3, 5) > 0
    assert torch.equal(traced(x, mask), net(x, mask))


@pytest.mark.parametrize("function", ["batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"])
def test_symbolic_trace_of_functions(function: str) -> None:
    """One call_function node whose target is our function, as `F.layer_norm` gives."""
    f = getattr(ns.functional, function)
    arguments: tuple[Any, ...] = {
        "batch_norm": (None, None, None, None, True),
        "layer_norm": ((5,),),
        "rms_norm": ((5,),),
        "group_norm": (2,),
        "instance_norm": (),
    }[function]
    traced = fx.symbolic_trace(lambda x: f(x, *arguments, activation="relu"))
    nodes = [node for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
    assert [(node.op, node.target) for node in nodes] == [("call_function", f)]
    x = data(3, 4, 5)
    assert torch.equal(traced(x), f(x, *arguments, activation="relu"))


def test_make_fx() -> None:
    """Tracing by dispatch; whatever operators it meets, the graph computes the same for other numbers."""
    from torch.fx.experimental.proxy_tensor import make_fx

    net = convnet().eval()
    traced = make_fx(lambda x: net(x))(data(4, 3, 8, 8))
    x = data(4, 3, 8, 8, seed=1)
    assert_same({"output": traced(x)}, {"output": net(x)})


@TORCH_TRACES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # see the next test
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit_trace(training: bool) -> None:
    """The trace also holds for another batch size, as that of torch's layers does."""
    net = convnet().train(training)
    traced = torch.jit.trace(copy.deepcopy(net), (data(4, 3, 8, 8),), check_trace=False)
    if training:  # tracing ran the net once
        net(data(4, 3, 8, 8))
    for seed, size in enumerate((4, 7)):
        x = data(size, 3, 8, 8, seed=seed)
        assert_same({"output": traced(x)}, {"output": net(x)})
    assert_same(dict(traced.named_buffers()), dict(net.named_buffers()))


@TORCH_TRACES
def test_jit_trace_is_as_quiet_as_with_torchs_layers() -> None:
    """Torch drops the TracerWarnings that its own library causes; a user of our layers should not see more."""
    counts = []
    for namespace in (nn, ns.nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.TracerWarning.ignore_lib_warnings()
            torch.jit.trace(convnet(namespace), (data(4, 3, 8, 8),), check_trace=False)
        counts.append(sum(issubclass(w.category, torch.jit.TracerWarning) for w in caught))
    assert counts[1] == counts[0]


# --- torch.func -----------------------------------------------------------------------------------------------------

INDEPENDENT = ("LayerNorm", "RMSNorm", "GroupNorm")


@pytest.mark.parametrize("norm", INDEPENDENT)
def test_per_sample_gradients(norm: str) -> None:
    """vmap(grad) over the batch equals a loop over the samples."""
    net = mlp(norm=norm).double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    x, target = data(7, 5, dtype=torch.float64), data(7, 2, seed=1, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, parameters, (x[None],)), target[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        alone = torch.autograd.grad(F.mse_loss(net(x[i : i + 1]), target[i : i + 1]), list(net.parameters()))
        for name, expected in zip(parameters, alone, strict=True):
            # float64 sums of at most six terms in two orders
            torch.testing.assert_close(together[name][i], expected, rtol=1e-10, atol=1e-12)


def test_per_sample_gradients_of_an_ensemble_with_batch_norm() -> None:
    """vmap over models: each normalizes by its own batch, after torch.func took the running statistics away."""
    nets = [torch.func.replace_all_batch_norm_modules_(mlp().double()) for _ in range(3)]
    for seed, net in enumerate(nets):
        randomized(net, seed)
    parameters, _ = torch.func.stack_module_state(nets)  # type: ignore[arg-type]
    x = data(7, 5, dtype=torch.float64)
    upstream = random_like(torch.zeros(7, 2, dtype=torch.float64), 4)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(nets[0], parameters, (x,)) * upstream).sum()

    together = vmap(grad(loss), in_dims=(0, None))(parameters, x)
    for i, net in enumerate(nets):
        alone = torch.autograd.grad((net(x) * upstream).sum(), list(net.parameters()))
        for name, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(together[name][i], expected, rtol=1e-10, atol=1e-12)


def test_vmap_over_samples_with_frozen_batch_norm() -> None:
    net = convnet().double().eval()
    x = data(3, 2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(vmap(net)(x), torch.stack([net(part) for part in x]), rtol=1e-10, atol=1e-12)


@TORCH_SCRIPTS
@pytest.mark.parametrize("norm", [*INDEPENDENT, "BatchNorm1d"])
def test_jvp_and_hessian(norm: str) -> None:
    """Against torch's layers, in float64; jvp also against a central difference."""
    mine, peer = (mlp(namespace, norm).double().eval() for namespace in (ns.nn, nn))
    x, tangent = data(4, 5, dtype=torch.float64), data(4, 5, seed=1, dtype=torch.float64)
    for a, b in zip(jvp(mine, (x,), (tangent,)), jvp(peer, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    step = 1e-6
    difference = (mine(x + step * tangent) - mine(x - step * tangent)) / (2 * step)
    # the error of a central difference: the third derivative times step², and eps / step
    torch.testing.assert_close(jvp(mine, (x,), (tangent,))[1], difference, rtol=1e-5, atol=1e-7)
    upstream = random_like(peer(x).detach(), 5)
    second = [hessian(lambda x, net=net: (net(x) * upstream).sum())(x) for net in (mine, peer)]
    torch.testing.assert_close(second[0], second[1], rtol=1e-8, atol=1e-9)


@TORCH_SCRIPTS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_dual_numbers(training: bool) -> None:
    """Tangents in input and parameters at once, through a whole net, against backward mode: ⟨g, J t⟩ = ⟨Jᵀ g, t⟩."""
    net = convnet().double().train(training)
    names, values = zip(*net.named_parameters(), strict=True)
    x = data(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
    tangents = [random_like(v, i) for i, v in enumerate((x, *values))]
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v.detach(), t) for v, t in zip((x, *values), tangents, strict=True)]
        out = functional_call(net, dict(zip(names, duals[1:], strict=True)) | buffers, (duals[0],))
        y, tangent = forward_ad.unpack_dual(out)
    plain = net(x)
    torch.testing.assert_close(y, plain, rtol=1e-9, atol=1e-11)
    upstream = random_like(plain, 9)
    grads = torch.autograd.grad(plain, [x, *values], upstream)
    left = (upstream * tangent).sum()
    right = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


# --- higher derivatives, checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradient_penalty(training: bool) -> None:
    """(‖∂y/∂x‖ − 1)² trained through, as in WGAN-GP: double backward through every kind of layer."""
    results = []
    for namespace in (ns.nn, nn):
        net = convnet(namespace).double().train(training)
        x = data(4, 3, 8, 8, dtype=torch.float64).requires_grad_()
        y = net(x)
        (dx,) = torch.autograd.grad(y, x, random_like(y, 1), create_graph=True)
        penalty = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        results.append([penalty, *torch.autograd.grad(penalty, [x, *net.parameters()], allow_unused=True)])
    for mine, expected in zip(*results, strict=True):
        zero = torch.zeros(()) if mine is None or expected is None else None  # biases behind the last normalizer
        if zero is not None:
            assert not largest(mine), "torch has no gradient here"
            assert not largest(expected), "ours has no gradient here"
        else:
            # second derivatives of a deep net amplify float64 roundings by (σ² + ε)^−½ per layer, three times over
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9 * max(largest(expected), 1.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    """Everything as without: the running statistics move once, where torch's layers' move twice."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for namespace in (ns.nn, nn):
        net = convnet(namespace)
        results.append(
            one_step(lambda x, net=net: checkpoint(net, x, use_reentrant=reentrant), net, data(4, 3, 8, 8))
            if not reentrant
            else reentrant_step(net, data(4, 3, 8, 8))
        )
    mine, expected = results
    plain = convnet()
    for name, value in one_step(plain, plain, data(4, 3, 8, 8)).items():
        assert torch.equal(mine[name], value), name
    assert (int(mine["batch.num_batches_tracked"]), int(expected["batch.num_batches_tracked"])) == (1, 2)
    moved = [name for name in mine if "running" in name or "tracked" in name]
    assert_same({**mine, **{name: expected[name] for name in moved}}, expected)


def reentrant_step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Reentrant checkpoints work with .backward() only."""
    from torch.utils.checkpoint import checkpoint

    x.requires_grad_()
    y = checkpoint(net, x, use_reentrant=True)
    y.backward(random_like(y.detach(), 7))
    grads = {"gradient of input": x.grad} | {name: p.grad for name, p in net.named_parameters()}
    return {"output": y.detach()} | grads | {name: b.clone() for name, b in net.named_buffers()}


# --- modes of torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        ("BatchNorm2d", (8,)),
        ("InstanceNorm2d", (8,)),
        ("GroupNorm", (2, 8)),
        ("LayerNorm", (6,)),
        ("RMSNorm", (6,)),
    ],
)
def test_autocast(layer: str, arguments: tuple[int, ...], input_dtype: torch.dtype, training: bool) -> None:
    """Output and gradients have torch's dtypes, and float64 truth within one rounding to each of them."""
    mine, peer = (randomized(getattr(namespace, layer)(*arguments).train(training), 4) for namespace in (ns.nn, nn))
    truth = copy.deepcopy(peer).double()
    columns = []
    for module in (mine, peer, truth):
        x = data(4, 8, 6, 6, dtype=input_dtype).to(torch.float64 if module is truth else input_dtype).requires_grad_()
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=module is not truth):
            if module is peer:  # torch's RMSNorm says that it has no kernel for mixed dtypes
                warnings.simplefilter("ignore")
            y = module(x)
        y.backward(random_like(y.detach(), 2, rounded=torch.bfloat16))
        columns.append((y.detach(), x.grad, *(p.grad for p in module.parameters())))
    assert [t.dtype for t in columns[0]] == [t.dtype for t in columns[1]]
    for a, b in zip(columns[0], columns[2], strict=True):
        # one rounding to the result's dtype; before it float32, where γ's gradient is a sum of 144 terms
        assert largest(a - b) <= (eps_of(a.dtype) + 50 * eps_of(torch.float32)) * largest(b)


def test_autocast_of_a_net() -> None:
    outputs = []
    for namespace in (ns.nn, nn):
        net = convnet(namespace)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(net(data(4, 3, 8, 8)))
    assert outputs[0].dtype == outputs[1].dtype
    # bfloat16 convolutions in between: 2⁻⁸ per layer, five layers, amplified by the normalizers
    assert largest(outputs[0] - outputs[1]) <= 0.1 * largest(outputs[1])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(mode: Callable[[], Any], training: bool) -> None:
    """The same numbers and the same running statistics as with gradients, and no graph."""
    net = convnet().train(training)
    other = copy.deepcopy(net)
    x = data(4, 3, 8, 8)
    with mode():
        y = net(x)
    assert not y.requires_grad
    assert y.is_inference() == (mode is torch.inference_mode)
    expected = other(x)
    assert torch.equal(y, expected.detach())
    for (name, mine), (_, theirs) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
        assert not mine.is_inference()
    net(x).backward(random_like(expected.detach(), 1))  # the buffers still serve a training step


def test_hooks_see_what_passes() -> None:
    """Feature extraction and gradient hooks on our layers, as on torch's."""
    seen: dict[str, list[tuple[int, ...]]] = {"ours": [], "torch": []}
    for key, namespace in (("ours", ns.nn), ("torch", nn)):
        net = convnet(namespace)
        log = seen[key]
        for module in net:
            if "Norm" in type(module).__name__:
                module.register_forward_pre_hook(lambda m, args, log=log: log.append(tuple(args[0].shape)))
                module.register_forward_hook(lambda m, args, y, log=log: log.append(tuple(y.shape)))
                module.register_full_backward_hook(
                    lambda m, dx, dy, log=log: log.extend([tuple(dx[0].shape), tuple(dy[0].shape)])
                )
        y = net(data(4, 3, 8, 8).requires_grad_())
        y.backward(random_like(y.detach(), 1))
    assert seen["ours"] == seen["torch"]
    assert len(seen["ours"]) == 4 * 6


def test_in_place_after_and_before_our_layers() -> None:
    """In-place ReLU on our output must not spoil the gradient, nor pass unnoticed where torch refuses."""
    for name, arguments in (("BatchNorm1d", (6,)), ("LayerNorm", (6,)), ("GroupNorm", (2, 6))):
        results = []
        for namespace in (ns.nn, nn):
            torch.manual_seed(0)
            net = nn.Sequential(
                nn.Linear(5, 6, bias=False), randomized(getattr(namespace, name)(*arguments), 1), nn.ReLU(inplace=True)
            )
            results.append(one_step(net, net, data(4, 5)))
        assert_same(*results)
        norm = getattr(ns.nn, name)(*arguments)
        x = data(4, 6).requires_grad_() * 1.0
        y = norm(x)
        x.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(random_like(y.detach(), 1))


def test_two_calls_before_one_backward() -> None:
    """A shared layer called twice, as in siamese nets: each call keeps its own statistics for its gradient."""
    results = []
    for namespace in (ns.nn, nn):
        net = mlp(namespace)
        x, other = data(4, 5).requires_grad_(), data(6, 5, seed=1)
        y, z = net(x), net(other)
        grads = torch.autograd.grad(
            [y, z], [x, *net.parameters()], [random_like(y.detach(), 1), random_like(z.detach(), 2)]
        )
        results.append({str(i): g for i, g in enumerate(grads)} | dict(net.named_buffers()))
    assert_same(*results)
