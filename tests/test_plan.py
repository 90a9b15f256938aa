"""`ns.plan`: what it prints is what happens."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normscope as ns
from normscope.functional import autograd, shortcut
from normscope.kernels import cpu, eager, triton


class Traffic(TorchDispatchMode):
    """Counts how often operators read or write a tensor of a given size."""

    def __init__(self, cells):
        super().__init__()
        self.cells, self.passes = cells, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = func._schema.returns and any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not view and func.overloadpacket is not torch.ops.aten.detach:
            tensors = [*tree_leaves((args, kwargs)), *tree_leaves(out)]
            self.passes += sum(isinstance(t, torch.Tensor) and t.numel() == self.cells for t in tensors)
        return out


def traffic(shape, scope, **sizes):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    with Traffic(x.numel()) as forward:
        y = ns.normalize(x, scope, weight=weight, bias=bias, **sizes)
    upstream = torch.randn_like(y)
    with Traffic(x.numel()) as backward:
        torch.autograd.grad(y, (x, weight, bias), upstream)
    return forward.passes, backward.passes


@pytest.fixture
def eager_only(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "switched off by a test")
    monkeypatch.setattr(shortcut, "_doors", {})  # where earlier tests have left the compiled way
    monkeypatch.setattr(autograd, "is_plain", lambda: True)  # though a mode counts the operators


def test_bytes_moved_are_counted_not_guessed(eager_only):
    shape = (4, 6, 5, 5)
    assert traffic(shape, "[n] c [h w]") == eager.PASSES
    plan = ns.plan(torch.zeros(shape), "[n] c [h w]")
    assert (plan.bytes_forward, plan.bytes_backward) == tuple(4 * math.prod(shape) * passes for passes in eager.PASSES)


@pytest.mark.parametrize(
    ("x", "scope", "sizes", "order", "integers"),
    [
        (torch.zeros(3, 8, 2, 5), "[n] c [h w]", {}, "along", (1, 0, 8, 10, 3, 80, 10)),
        (
            torch.zeros(3, 8, 2, 5).to(memory_format=torch.channels_last),
            "[n] c [h w]",
            {},
            "across",
            (1, 0, 8, 1, 30, 8, 1),
        ),
        (torch.zeros(3, 8, 2, 5), "n (g [c]) [h w]", {"g": 2}, "along", (1, 0, 6, 40, 1, 0, 40)),
        (torch.zeros(3, 8, 2, 5), "n [c] h w", {}, "across", (3, 80, 10, 1, 8, 10, 1)),
        (torch.zeros(3, 8, 4, 10)[:, :, ::2, ::2], "[n] c [h w]", {}, "strided", None),
    ],
)
def test_plan_of_a_tensor(x, scope, sizes, order, integers):
    plan = ns.plan(x, scope, **sizes)
    assert plan.order == order
    assert plan.integers == integers
    assert plan.kernel.startswith("eager" if order == "strided" or cpu.missing() else "cpu")
    assert all(line in str(plan) for line in (f"{plan.sets} (one per", f"of {plan.cells} cells", order))


def test_backends_say_what_runs_here():
    backends = ns.backends()
    compiled = [name for name, kernels in (("cpu", cpu), ("triton", triton)) if kernels.missing() is None]
    assert [backend.name for backend in backends.usable()] == [*compiled, "eager"]
    assert "torch operators" in str(backends)


def test_backends_say_why_the_compiled_kernels_are_missing(eager_only):
    assert str(ns.backends()).startswith("missing  cpu      cpu    switched off by a test")


def test_a_set_that_exceeds_the_cache_is_read_twice():
    fits, exceeds = (torch.zeros(n, 64, 8, 8).to(memory_format=torch.channels_last) for n in (4, 512))
    floor = (2 * fits.numel() * 4, 3 * fits.numel() * 4)
    plan = ns.plan(fits, "[n] c [h w]")
    if cpu.missing() is None:
        assert (plan.bytes_forward, plan.bytes_backward) == floor
        plan = ns.plan(exceeds, "[n] c [h w]")
        assert (plan.bytes_forward, plan.bytes_backward) == (3 * exceeds.numel() * 4, 5 * exceeds.numel() * 4)
