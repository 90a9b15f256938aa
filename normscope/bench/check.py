"""Is it the right result? Ours and eager torch against the same formula in float64, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from normscope.bench.cases import Case, Norm, State
from normscope.errors import ProofError

__all__ = ["check", "gradients"]

# Of the largest value. float32: ten roundings of 2⁻²⁴ and a sum over at most 100,352 cells, whose rounding grows with
# the root of its length; measured up to 2e-6. bfloat16: the result's own rounding, 2⁻⁹, twice.
OURS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
# torch's rounding is not ours to judge, this shows that it computes the same thing. Its bfloat16 LayerNorm adds up the
# gradients of γ and β in bfloat16: measured 8% off over 6,304 rows and 19% over 50,176.
EAGER, EAGER_PARAMS = 0.02, 0.4
# A ReLU's gate may differ from float64's where z is this small; the reference then takes the gate of the result.
GATE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Cells that the reference takes at a time: 32 MB in float64.
CHUNK = 1 << 22


def gradients(norm: Norm, state: State, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Those of x, weight and bias, for the upstream gradient g."""
    return torch.autograd.grad(norm(x, state), _inputs(x, state), g)


def check(case: Case, x: Tensor, g: Tensor, norms: Mapping[str, Norm], states: Mapping[str, State]) -> float:
    """Compare the results of all alternatives with float64, and their running statistics with each other.

    Returns:
        The largest error of ours as a share of the tolerance.

    Raises:
        ProofError: A result is wrong.
    """
    errors = {name: _errors(case, x, g, norm, states[name], name == "ours") for name, norm in norms.items()}
    running = [[t.double() for t in (s.mean, s.var) if t is not None] for s in states.values()]
    for name, moved in zip(states, running, strict=True):
        errors[name] += [_error(a, b, EAGER) for a, b in zip(moved, running[0], strict=True)]
    for name, found in errors.items():
        if not max(found) <= 1:
            raise ProofError(
                f"{case.name}: {name} is wrong by {max(found):.3g} times the tolerance, so it was not timed",
                cure="report it, with the output of: normscope backends",
            )
    return max(errors["ours"])


def _inputs(x: Tensor, state: State) -> list[Tensor]:
    return [t for t in (x, state.weight, state.bias) if t is not None]


def _errors(case: Case, x: Tensor, g: Tensor, norm: Norm, state: State, strict: bool) -> list[float]:
    """Of y and the gradients of x, weight and bias, each as a share of its tolerance."""
    y = norm(x, state)
    results = (y.detach(), *torch.autograd.grad(y, _inputs(x, state), g))
    allowed = [OURS[result.dtype] for result in results] if strict else [EAGER, EAGER, EAGER_PARAMS, EAGER_PARAMS]
    truth = _reference(case, x.detach(), g, state, results[0])
    return [_error(result, true, t) for result, true, t in zip(results, truth, allowed, strict=False)]


def _error(result: Tensor, truth: Tensor, tolerance: float) -> float:
    return float((result.double() - truth).abs().max() / (tolerance * truth.abs().max()))


def _reference(case: Case, x: Tensor, g: Tensor, state: State, y: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias in float64, some sets at a time."""
    parts = max(1, math.ceil(x.numel() / CHUNK))
    axis = 1 if case.family.running else 0  # along which no set extends
    chunks = []
    for k in range(len(x.chunk(parts, axis))):
        xk, gk, yk = (t.chunk(parts, axis)[k].double() for t in (x, g, y))
        params = [t.detach().double() for t in (state.weight, state.bias) if t is not None]
        params = [(t.chunk(parts)[k] if axis == 1 else t).requires_grad_() for t in params]
        xk.requires_grad_()
        z = case.family.plain(xk, State(params[0], params[1] if len(params) > 1 else None))
        gate = torch.where(z.detach().abs() < GATE[x.dtype], yk, z.detach()) > 0
        chunks.append((z.detach() * gate, *torch.autograd.grad(z, (xk, *params), gk * gate)))
    y64, dx, *dparams = zip(*chunks, strict=True)
    return [torch.cat(y64, axis), torch.cat(dx, axis), *(torch.cat(d) if axis == 1 else sum(d) for d in dparams)]
