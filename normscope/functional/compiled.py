"""The door to the compiled kernels.

What a call needs besides its tensors is worked out once per view, strides and formula, and kept with the view. The
steps between the kernels are taken in C++ (`cpp/autograd.cpp`) where that was built for this torch, else by the same
steps in Python, which cost 0.04 ms more for a small tensor and 0.2 ms for one that has emptied the caches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from normscope.functional import running as statistics_policy
from normscope.functional.autograd import Operands, gradients
from normscope.functional.running import Running, recomputing
from normscope.functional.view import View, view_of
from normscope.kernels import COMPUTE_DTYPE, cpu, triton
from normscope.kernels.formula import Formula

__all__ = [
    "Recipe", "Saved", "Steps",
    "backend_of", "backward", "forward", "layout_of", "learns", "normalize", "recipe_of",
]  # fmt: skip

_UNTRACKED = Running(None, None, 0.0)
_KEPT = 64  # recipes per view; a view is one shape, so more means strides that never come back


class Recipe(NamedTuple):
    """How the compiled kernels compute one formula on tensors seen one way.

    Attributes:
        view: How x is seen.
        formula: The switches and the activation.
        backend: The module of kernels that computes.
        layout: The order of its loops.
        natural: Whether weight and bias lie in memory in the order in which the loops meet them.
        number: What the C++ steps know it by, without and with given moments; None where they are taken in Python.
    """

    view: View
    formula: Formula
    backend: Any
    layout: cpu.Layout | triton.Layout
    natural: bool
    number: tuple[int, int] | None

    def ordered(self, t: Tensor | None) -> Tensor | None:
        """A weight or bias in the order in which the loops meet its numbers; differentiable."""
        return t if t is None or self.natural else cpu.flat(self.view.param(t), self.view.sizes, self.layout.params)

    def disordered(self, t: Tensor | None) -> Tensor | None:
        """The other way: numbers in the order of the loops → the params' shape."""
        if t is None or self.natural:
            return t
        return self.view.fold_param(cpu.unflat(t, self.view.sizes, self.layout.params))

    def given(self, t: Tensor) -> Tensor:
        """A given mean or variance, one number per set in the order of the loops."""
        if len(self.layout.sets) <= 1 and t.numel() == self.layout.set_count:
            return t
        return cpu.flat(t.detach(), self.view.sizes, self.layout.sets)

    def dense(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """A mask that broadcasts through the parts, with a number for every cell, in x's memory format."""
        if mask is None:
            return None
        dense = torch.empty_like(x, dtype=torch.bool)
        self.view.unfold(dense).copy_(mask)
        return dense

    def moments(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, size one in the averaged parts."""
        shape, order = self.view.sizes, self.layout.sets
        return cpu.unflat(statistics[0] + statistics[1], shape, order), cpu.unflat(statistics[2], shape, order)

    def tracks(self, x: Tensor, running: Running, mask: Tensor | None) -> bool:
        """Whether the kernels can move the buffers: each set has a number of its own in both."""
        if mask is not None or not isinstance(running.momentum, float):
            return False
        count = self.layout.set_count
        for t in (running.mean, running.var):
            if (
                t is None
                or t.numel() != count
                or t.dtype != COMPUTE_DTYPE[x.dtype]
                or t.device != x.device
                or not t.is_contiguous()
            ):
                return False
        return True

    @property
    def correction(self) -> float:
        """What makes a variance unbiased; a mean square is."""
        cells = self.view.cells
        return cells / (cells - 1) if self.formula.center and cells > 1 else 1.0


def backend_of(x: Tensor) -> Any:
    """The module of compiled kernels for a tensor's device and dtype, or None where the eager ones serve it."""
    return next((backend for backend in (triton, cpu) if backend.serves(x)), None)


def learns(*moments: Tensor | None) -> bool:
    """Whether given moments want a gradient, which these kernels do not compute."""
    return any(t is not None and t.requires_grad for t in moments)


def recipe_of(
    x: Tensor, view: View, formula: Formula, learned: bool, mean: Tensor | None, var: Tensor | None
) -> Recipe | None:
    """The recipe, or None where the eager kernels serve; `learned` says that there is a weight or a bias."""
    backend = backend_of(x)
    if backend is None:
        return None
    if learns(mean, var):
        return None
    key = (backend, x.stride(), formula, learned)
    if key not in view.recipes:
        if len(view.recipes) >= _KEPT:
            view.recipes.clear()
        view.recipes[key] = _recipe(backend, x, view, formula, learned)
    found: Recipe | None = view.recipes[key]
    return found


def _recipe(backend: Any, x: Tensor, view: View, formula: Formula, learned: bool) -> Recipe | None:
    params = view.params if learned else ()
    layout, by_memory = (layout_of(x, view, params, given=given) for given in (False, True))
    if layout is None or by_memory is None:
        return None
    parts = range(len(view.sizes))
    met = [i for axis in view.params for i in parts if view.scope.parts[i].axis == axis and view.sizes[i] != 1]
    recipe = Recipe(view, formula, backend, layout, not learned or met == list(layout.params), None)
    if backend is not cpu or cpu.autograd_missing():
        return recipe
    _library()
    origin = json.dumps([*view.origin, *formula])
    free, given = (
        cpu.recipe(loops, formula, fixed=fixed, correction=recipe.correction, origin=origin)
        for loops, fixed in ((layout, False), (by_memory, True))
    )
    return recipe._replace(number=(free, given))


def layout_of(x: Tensor, view: View, params: tuple[int, ...], *, given: bool = False) -> Any:
    """How the compiled kernels see a tensor, or None where the eager ones serve it."""
    backend = backend_of(x)
    if backend is None or x.numel() == 0:
        return None
    varies = tuple(part.axis in params for part in view.scope.parts)
    return backend.layout_of(view.sizes, view.unfold(x.detach()).stride(), view.inside, varies, given=given)


def normalize(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """y and the statistics; residual of x's shape, mean, var and mask broadcast through the parts.

    Running statistics, of which `Recipe.tracks` must hold, are moved.
    """
    mask = recipe.dense(mask, x)
    weight, bias = recipe.ordered(weight), recipe.ordered(bias)
    if mean is not None and var is not None:
        mean, var = recipe.given(mean), recipe.given(var)
    if running is not None and recomputing():
        running = None
    if recipe.number is not None:
        return cpu.normalize(
            x, weight, bias, residual, mask, mean, var, *(running or _UNTRACKED),  # type: ignore[arg-type]
            statistics_policy.SKIP_NONFINITE, recipe.number[mean is not None],
        )  # fmt: skip
    if torch.is_grad_enabled():
        y, statistics = _Compiled.apply(recipe, x, weight, bias, residual, mean, var, mask)  # type: ignore[no-untyped-call]
    else:
        y, statistics = forward(recipe, x, weight, bias, residual, mean, var, mask)
    if running is not None:
        skip = statistics_policy.SKIP_NONFINITE
        recipe.backend.update(statistics, *running, recipe.correction, skip)
    return y, statistics


def forward(
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the statistics, with no gradient; parameters and moments in the order of the loops."""
    weight, bias, mean, var = (_numbers(t, x) for t in (weight, bias, mean, var))
    found: tuple[Tensor, Tensor] = recipe.backend.forward(
        x, recipe.layout, recipe.formula, weight, bias, _like(residual, x), mask, mean, var
    )
    return found


class Saved(NamedTuple):
    """What the node of a normalization keeps; `cpp/autograd.cpp` has the same list."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    y: Tensor | None
    statistics: Tensor

    @staticmethod
    def needed(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mask: Tensor | None, y: Tensor,
        statistics: Tensor, activation: str | None,
    ) -> Saved:  # fmt: skip
        """A residual serves only to compute z again; for the gate of a ReLU y does, which the next layer keeps anyway.

        (float16 and float64 have one kind of loop for all activations, which reads z.)
        """
        gated = residual is not None and activation == "relu" and x.dtype not in (torch.float16, torch.float64)
        kept = residual if activation is not None and not gated else None
        return Saved(x, weight, bias, kept, mask, y if gated else None, statistics)


def backward(recipe: Recipe, gy: Tensor, saved: Saved, fixed: bool, needs: Sequence[bool]) -> cpu.Gradients:
    """The gradients of x, weight, bias and residual as far as they are needed, with no gradient of their own."""
    x, weight, bias, residual, mask, y, statistics = saved
    weights = _numbers(weight, x), _numbers(bias, x)
    g = recipe.backend.backward(
        _like(gy, x), x, recipe.layout, recipe.formula, *weights, _like(residual, x), y, mask,
        statistics, fixed=fixed, needs_x=needs[0], needs_params=needs[1] or needs[2], needs_residual=needs[3],
    )  # fmt: skip
    dweight, dbias = (
        None if t is None or d is None or not needed else d.view(t.shape).to(t.dtype)
        for d, t, needed in ((g.weight, weight, needs[1]), (g.bias, bias, needs[2]))
    )
    return cpu.Gradients(g.x, dweight, dbias, g.residual)


class Steps:
    """The steps of one normalization for sets that reach beyond this process, weight and bias one number per set.

    Args:
        recipe: How.
        x: Normalized.
        weight: γ, or None.
        bias: β, or None.
        residual: Of x's shape, or None.
        mask: Broadcasts through the parts, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        self.recipe, self.x = recipe, x
        self.weight, self.bias = (None if t is None else _numbers(t.reshape(-1), x) for t in (weight, bias))
        self.residual = _like(residual, x)
        self.mask = recipe.dense(mask, x)

    def statistics(self) -> Tensor:
        """Of the cells that are here: high, low, variance, 1/√(σ² + ε) and count, a row each."""
        r = self.recipe
        found: Tensor = r.backend.statistics(self.x, r.layout, r.formula, self.mask)
        return found

    def apply(self, statistics: Tensor) -> Tensor:
        """y."""
        r = self.recipe
        y: Tensor = r.backend.apply(
            self.x, r.layout, r.formula, self.weight, self.bias, self.residual, self.mask, statistics
        )
        return y

    def sums(self, gy: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Σ g·x̂ and Σ g over the cells of every set that are here, g the gradient of z."""
        r, ones = self.recipe, torch.ones_like(statistics[0])
        weight, bias = (ones if self.weight is None else self.weight), (ones * 0 if self.bias is None else self.bias)
        found = r.backend.backward(
            _like(gy, self.x), self.x, r.layout, r.formula, weight, bias, self.residual, None, self.mask, statistics,
            fixed=True, needs_x=False, needs_params=True, needs_residual=False,
        )  # fmt: skip
        return found.weight, found.bias

    def gradients(
        self, gy: Tensor, statistics: Tensor, slope: Tensor, needs_residual: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Those of x, γ·g/√(σ² + ε) + (x − high)·b + c with b and c of every set in slope, and of the residual."""
        r = self.recipe
        found: tuple[Tensor, Tensor | None] = r.backend.backward_apply(
            _like(gy, self.x), self.x, r.layout, r.formula, self.weight, self.bias, self.residual, self.mask,
            statistics, slope, needs_residual=needs_residual,
        )  # fmt: skip
        return found


class _Compiled(torch.autograd.Function):
    """The formula with its hand-derived gradient, on the compiled kernels; `cpp/autograd.cpp` in Python."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, statistics = forward(recipe, x, weight, bias, residual, mean, var, mask)
        saved = Saved.needed(x, weight, bias, residual, mask, y, statistics, recipe.formula.activation)
        ctx.recipe, ctx.fixed = recipe, mean is not None
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gy = grads[0]
        if gy is None:
            return (None,) * 8
        saved, needs = Saved(*ctx.saved_tensors), ctx.needs_input_grad[1:5]  # unpacked once: checkpoints allow no more
        # Under create_graph the gradient itself must be differentiable; and a batch of gradients is no plain memory.
        if torch.is_grad_enabled() or functorch.is_batchedtensor(gy) or functorch.is_legacy_batchedtensor(gy):
            return None, *_differentiable(ctx.recipe, gy, saved, ctx.fixed, needs), None, None, None
        return None, *backward(ctx.recipe, gy, saved, ctx.fixed, needs), None, None, None


def _differentiable(
    recipe: Recipe, gy: Tensor, saved: Saved, fixed: bool, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of x, weight, bias and residual as functions of x and gy, in torch operators."""
    view, formula, order = recipe.view, recipe.formula, recipe.layout.params
    x, weight, bias, residual, mask, y, statistics = saved
    mean, var = recipe.moments(statistics) if fixed else (None, None)
    through = [None if t is None else cpu.unflat(t.reshape(-1), view.sizes, order) for t in (weight, bias)]
    whole = [None if t is None else view.unfold(t) for t in (residual, mask)]
    operands = Operands(view.unfold(x), through[0], through[1], whole[0], mean, var, whole[1])
    if y is not None:  # the gate has no derivative of its own
        gy = torch.where(y <= 0, 0, gy)
        formula = formula._replace(activation=None)
    wanted = Operands(*[*needs, False, False, False])  # type: ignore[arg-type]
    dx, dweight, dbias, dresidual, *_ = gradients(view.unfold(gy), operands, None, formula, wanted)
    if needs[3] and residual is None:  # it was not kept: without an activation or behind the gate its gradient is gy
        dresidual = view.unfold(gy if mask is None else torch.where(mask, gy, 0))
    params = [
        None if t is None or d is None else cpu.flat(d, view.sizes, order).reshape(t.shape)
        for d, t in ((dweight, weight), (dbias, bias))
    ]
    dx, dresidual = (None if t is None else t.reshape(view.shape) for t in (dx, dresidual))
    return [dx, *params, dresidual]


@lru_cache(maxsize=1)
def _library() -> torch.library.Library:
    """Where the C++ steps call back for a gradient that is itself to be differentiated."""
    library = torch.library.Library("normscope", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(  # type: ignore[no-untyped-call]
        "gradients(Tensor gy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? y, "
        "Tensor statistics, str origin, bool fixed, bool[4] needs) -> Tensor[]"
    )
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):
        library.impl("gradients", _gradients, key)  # type: ignore[no-untyped-call]
    return library


def _gradients(gy: Tensor, *rest: Any) -> list[Tensor | None]:
    *tensors, origin, fixed, needs = rest
    saved = Saved(*tensors)
    pattern, sizes, params, inside, *switches = json.loads(origin)
    view = view_of(saved.x, pattern, dict(sizes), params)
    learned = saved.weight is not None or saved.bias is not None
    recipe = recipe_of(saved.x, view, Formula(tuple(inside), *switches), learned, None, None)
    found = _differentiable(cast(Recipe, recipe), gy, saved, fixed, needs)  # forward found it, too
    return [t for t, needed in zip(found, needs, strict=True) if needed]


def _numbers(t: Tensor | None, x: Tensor) -> Tensor | None:
    """Contiguous, in what x is computed in, as the kernels read weights, biases and moments."""
    return t if t is None else t.detach().to(COMPUTE_DTYPE[x.dtype]).contiguous()


def _like(t: Tensor | None, x: Tensor) -> Any:
    """A tensor with x's dtype and strides."""
    if t is None or (t.stride() == x.stride() and t.dtype == x.dtype):
        return t
    return torch.empty_like(x).copy_(t)
