"""PyTorch's own test cases (OpInfo and ModuleInfo), run on our drop-in functions and layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.testing._internal.common_modules import ModuleErrorEnum
from torch_cases import (
    BUFFERS,
    FUNCTIONS,
    LAYERS,
    MODULES,
    OPS,
    Call,
    LayerCase,
    assert_close_to_truth,
    clone,
    compare_layers,
    evaluate,
    layer_arguments,
    layer_cases,
    random_like,
    samples,
    scales,
    step,
    widened,
)

import normscope as ns

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SEED = 11


def ours(function: str) -> Callable[..., Tensor]:
    return getattr(ns.functional, function)


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sample_params(*, reference: bool) -> list[Any]:
    """One parameter set per sample, so that a failure names the sample."""
    return [
        pytest.param(function, index, id=f"{function}-{call.label}")
        for function in FUNCTIONS
        for index, call in enumerate(samples(function, torch.float64, reference=reference))
    ]


# --- values, gradients, running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("function", "index"), sample_params(reference=True))
def test_values_gradients_and_running_statistics(function: str, index: int, dtype: torch.dtype) -> None:
    call = samples(function, dtype)[index]
    mine = evaluate(ours(function), call.fresh(), SEED)
    peer = evaluate(getattr(F, function), call.fresh(), SEED)
    true = evaluate(getattr(F, function), call.fresh(widened), SEED)
    scale = scales(function, call.arguments, SEED)
    assert mine.keys() == peer.keys()
    for name, value in mine.items():
        assert_close_to_truth(name, value, peer[name], true[name], scale=scale.get(name, 0.0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_may_be_given_by_position(function: str) -> None:
    for call in samples(function, torch.float64, reference=False):
        got, wanted = ours(function)(*call.positional), getattr(F, function)(*call.positional)
        scale = scales(function, call.arguments, SEED)
        assert_close_to_truth(call.label, got, wanted, wanted, scale=scale["output"])


# --- derivatives of first and second order, backward and forward -----------------------------------------------------

# Torch compiles some of its own forward-mode formulas with torch.jit.script when the first dual tensor is made.
TORCH_SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def recomposed(call: Call) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function of the differentiable arguments alone, as torch's own gradient tests build it.

    The running statistics are copied for every call, because a numerical derivative calls many times.
    """
    names = call.differentiable

    def function(*values: Tensor) -> Tensor:
        arguments = call.fresh() | dict(zip(names, values, strict=True))
        return OPS[f"nn.functional.{call.function}"].gradcheck_wrapper(
            lambda input, **rest: ours(call.function)(input, **rest), **arguments
        )

    fresh = call.fresh()
    return function, tuple(fresh[name] for name in names)


@TORCH_SCRIPTS
@pytest.mark.parametrize(("function", "index"), sample_params(reference=False))
def test_gradcheck(function: str, index: int) -> None:
    """Torch's tolerances (atol 1e-5, rtol 1e-3) for a central difference with step 1e-6 in float64.

    Random projections (fast_mode) where the full Jacobian has more than 100 × 100 cells, as torch's own tests do.
    """
    f, inputs = recomposed(samples(function, torch.float64, reference=False)[index])
    fast = inputs[0].numel() > 100
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=fast)


@TORCH_SCRIPTS
@pytest.mark.parametrize(("function", "index"), sample_params(reference=False))
def test_gradgradcheck(function: str, index: int) -> None:
    """Double backward, and forward over backward, which torch's functions support too."""
    f, inputs = recomposed(samples(function, torch.float64, reference=False)[index])
    torch.manual_seed(3)  # gradgradcheck draws the upstream gradients
    fast = inputs[0].numel() > 20
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=fast)
    assert gradgradcheck(f, inputs, gen_non_contig_grad_outputs=True, fast_mode=True)
