"""The compiled kernels in a compiler's graph: one operator forward, one backward, nothing mutated.

What torch.compile makes of the formula itself takes 11 to 19 times as long as these kernels on a CPU, and longer than
eager torch (docs/benchmarks.md). On a GPU it fuses the formula with its neighbours, but reads x once more than these
kernels. Exported programs keep torch's own operators, so that a reader needs no normscope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normscope.functional import compiled
from normscope.functional.autograd import Operands, normalize_parts
from normscope.functional.compiled import Saved
from normscope.functional.view import View, view_of
from normscope.kernels import COMPUTE_DTYPE, cpu, triton
from normscope.kernels.formula import Formula

__all__ = ["normalize", "serves"]

# By device, the cells below which the compiler's loops serve. On a CPU what surrounds the operators in Python costs
# more than they gain there. A step of BatchNorm with a ReLU apart: 770 µs against 560 at 2¹⁵ cells, 2320 against 2270
# at 2¹⁸, 7600 against 8200 at 2²⁰. On a GPU see `Launch.compiled`.
LEAST_CELLS = {"cpu": 1 << 17, "cuda": triton.LAUNCH.compiled}


def _least_cells(device: str, dtype: torch.dtype) -> int | None:
    """Cells from which on a tensor becomes an operator; None where no compiled kernels serve it."""
    backend: Any = {"cpu": cpu, "cuda": triton}.get(device)
    if backend is None or dtype not in backend.DTYPES or backend.missing() is not None:
        return None
    return LEAST_CELLS[device]


_least_cells._dynamo_marked_constant = True  # type: ignore[attr-defined]


def serves(x: Tensor, mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether a normalization becomes an operator here: under torch.compile, on a device with kernels, large enough."""
    if (
        not torch.compiler.is_dynamo_compiling()
        or torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or compiled.learns(mean, var)
    ):
        return False
    least = _least_cells(x.device.type, x.dtype)
    return least is not None and x.numel() >= least


def normalize(
    view: View,
    formula: Formula,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and variance of every set, size one in the averaged parts."""
    if mask is not None:
        mask = mask.expand(view.sizes).reshape(view.shape)
    sets = math.prod([view.sizes[i] for i in view.scope.outside])
    pattern, sizes, params = view.origin
    names, numbers = [name for name, _ in sizes], [number for _, number in sizes]
    y, _, moments = torch.ops.normscope.norm.default(
        x, weight, bias, residual, mask, mean, var, sets, pattern, names, numbers, params,
        list(formula.inside), formula.eps, formula.center, formula.scale, formula.activation,
    )  # fmt: skip
    mean, var = moments.detach().unbind()  # else a buffer would carry the graph of its last step into the next
    return y, view.outside(mean), view.outside(var)


_ORIGIN = (
    "str pattern, str[] names, int[] numbers, str? params, int[] inside, float eps, bool center, bool scale, "
    "str? activation"
)
_OPERANDS = "Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? mean, Tensor? var"
_library = torch.library.Library("normscope", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    f"norm({_OPERANDS}, SymInt sets, {_ORIGIN}) -> (Tensor, Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    f"norm_backward(Tensor gy, {_OPERANDS}, Tensor statistics, bool[] needs, {_ORIGIN}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class _Call:
    """One call of an operator: how x is seen, and the recipe, or None for what the kernels do not serve."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        origin: Sequence[Any],
    ) -> None:
        self.x, self.weight, self.bias, self.residual, self.mean, self.var = x, weight, bias, residual, mean, var
        self.mask = None if mask is None else torch.empty_like(x, dtype=torch.bool).copy_(mask)
        pattern, names, numbers, params, inside, *switches = origin
        self.view = view_of(x, pattern, dict(zip(names, numbers, strict=True)), params)
        self.formula = Formula(tuple(inside), *switches)
        learned = weight is not None or bias is not None
        self.recipe = compiled.recipe_of(x, self.view, self.formula, learned, None, None)

    def operators(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and variance by torch's operators."""
        mask = None if self.mask is None else self.view.unfold(self.mask)
        operands = Operands.seen(self.view, x, weight, bias, residual, self.mean, self.var, mask)
        y, mean, var = normalize_parts(operands, self.formula)
        return y.reshape(self.view.shape), mean, var


def _forward(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, residual, mask, mean, var, sets = call[:8]
    c = _Call(x, weight, bias, residual, mask, mean, var, call[8:])
    r = c.recipe
    if r is None:
        z, mean, var = c.operators(c.x, c.weight, c.bias, c.residual)
        y, statistics = torch.empty_like(c.x).copy_(z), x.new_zeros((5, sets), dtype=COMPUTE_DTYPE[x.dtype])
    else:
        weight, bias = r.ordered(weight), r.ordered(bias)
        mean, var = (None if t is None else r.given(t) for t in (mean, var))
        y, statistics = compiled.forward(r, c.x, weight, bias, c.residual, mean, var, c.mask)
        mean, var = r.moments(statistics)
    return y, statistics, torch.stack([c.view.sets(t).reshape(-1) for t in (mean, var)])


def _backward(gy: Tensor, *call: Any) -> tuple[Tensor, ...]:
    x, weight, bias, residual, mask, mean, var, statistics, needs = call[:9]
    c = _Call(x, weight, bias, residual, mask, mean, var, call[9:])
    r = c.recipe
    found: Sequence[Tensor | None]
    if r is None:
        leaves = [None if t is None else t.detach().requires_grad_() for t in (c.x, c.weight, c.bias, c.residual)]
        with torch.enable_grad():
            z, _, _ = c.operators(*leaves)  # type: ignore[arg-type]
        wanted = [t for t, needed in zip(leaves, needs, strict=True) if t is not None and needed]
        grads = iter(torch.autograd.grad(z, wanted, gy))
        found = [next(grads) if needed else None for needed in needs]
    else:
        residual = c.residual if c.formula.activation else None
        saved = Saved(c.x, r.ordered(c.weight), r.ordered(c.bias), residual, c.mask, None, statistics)
        g = compiled.backward(r, gy, saved, c.mean is not None, needs)
        found = g.x, r.disordered(g.weight), r.disordered(g.bias), g.residual
    return tuple(
        c.x.new_empty(0) if t is None or d is None else d if d.stride() == t.stride() else torch.empty_like(t).copy_(d)
        for d, t in zip(found, (c.x, c.weight, c.bias, c.x), strict=True)
    )


def _sizes_forward(x: Tensor, *call: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics, moments = (x.new_empty((rows, call[6]), dtype=COMPUTE_DTYPE[x.dtype]) for rows in (5, 2))
    return torch.empty_like(x), statistics, moments


def _sizes_backward(_: Tensor, x: Tensor, weight: Any, bias: Any, *call: Any) -> tuple[Tensor, ...]:
    like, needs = (x, weight, bias, x), call[5]
    return tuple(torch.empty_like(t) if needed else x.new_empty(0) for t, needed in zip(like, needs, strict=True))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.origin = inputs[8:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, gy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    needs = list(ctx.needs_input_grad[:4])
    if gy is not None and any(needs):
        *tensors, statistics = ctx.saved_tensors
        grads = torch.ops.normscope.norm_backward.default(gy, *tensors, statistics, needs, *ctx.origin)
        found[:4] = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    return tuple(found)


for _device in ("CPU", "CUDA"):
    _library.impl("norm", _forward, _device)  # type: ignore[no-untyped-call]
    _library.impl("norm_backward", _backward, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("normscope::norm", _sizes_forward, lib=_library)
torch.library.register_fake("normscope::norm_backward", _sizes_backward, lib=_library)
torch.library.register_autograd("normscope::norm", _gradient, setup_context=_keep, lib=_library)
