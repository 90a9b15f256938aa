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
    FUNCTIONS,
    LAYERS,
    LAZY,
    Call,
    LayerCase,
    assert_close_to_truth,
    compare_layers,
    evaluate,
    layer_arguments,
    layer_cases,
    module_infos,
    op_infos,
    randomized,
    samples,
    scales,
    step,
    torchs,
    widened,
)

import normscope as ns

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SEED = 11


def ours(function: str) -> Callable[..., Tensor]:
    return getattr(ns.functional, function)


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def sample_params(*, once: bool) -> list[Any]:
    """One parameter set per sample, so that a failure names the sample; `once` leaves out repeated kinds."""
    params, seen = [], set()
    for function in FUNCTIONS:
        for index, call in enumerate(samples(function, torch.float64, reference=not once)):
            if not once or (function, call.kind) not in seen:
                seen.add((function, call.kind))
                params.append(pytest.param(function, index, id=f"{function}-{call.label}"))
    return params


# --- values, gradients, running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("function", "index"), sample_params(once=False))
def test_values_gradients_and_running_statistics(function: str, index: int, dtype: torch.dtype) -> None:
    call = samples(function, dtype)[index]
    mine = evaluate(ours(function), call.fresh(), SEED, dtype)
    peer = evaluate(torchs(function), call.fresh(), SEED, dtype)
    true = evaluate(torchs(function), call.fresh(widened), SEED, dtype)
    scale = scales(function, call.arguments, SEED)
    assert mine.keys() == peer.keys()
    for name, value in mine.items():
        assert_close_to_truth(name, value, peer[name], true[name], scale=scale.get(name, 0.0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_may_be_given_by_position(function: str) -> None:
    for call in samples(function, torch.float64, reference=False):
        got, wanted = ours(function)(*call.positional), torchs(function)(*call.positional)
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
        return op_infos()[f"nn.functional.{call.function}"].gradcheck_wrapper(ours(call.function), **arguments)

    fresh = call.fresh()
    return function, tuple(fresh[name] for name in names)


@TORCH_SCRIPTS
@pytest.mark.parametrize(("function", "index"), sample_params(once=True))
def test_gradcheck(function: str, index: int) -> None:
    """Torch's tolerances (atol 1e-5, rtol 1e-3) for a central difference with step 1e-6 in float64.

    Random projections (fast_mode) where the input has more than 40 cells, as torch's own tests do.
    """
    f, inputs = recomposed(samples(function, torch.float64, reference=False)[index])
    fast = inputs[0].numel() > 40
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=fast)


@TORCH_SCRIPTS
@pytest.mark.parametrize(("function", "index"), sample_params(once=True))
def test_gradgradcheck(function: str, index: int) -> None:
    """Double backward, and forward over backward, which torch's functions support too."""
    f, inputs = recomposed(samples(function, torch.float64, reference=False)[index])
    torch.manual_seed(3)  # gradgradcheck draws the upstream gradients
    fast = inputs[0].numel() > 12
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=fast)
    assert gradgradcheck(f, inputs, gen_non_contig_grad_outputs=True, fast_mode=True)


# --- error inputs ----------------------------------------------------------------------------------------------------


def error_inputs(function: str) -> list[Any]:
    """Torch's error samples; layer_norm has none of its own and takes those of native_layer_norm (same arguments)."""
    op = op_infos()["native_layer_norm" if function == "layer_norm" else f"nn.functional.{function}"]
    return list(op.error_inputs("cpu")) if op.error_inputs_func is not None else []


@pytest.mark.parametrize(
    ("function", "index"),
    [(function, index) for function in FUNCTIONS for index in range(len(error_inputs(function)))],
)
def test_error_inputs(function: str, index: int) -> None:
    case = error_inputs(function)[index]
    sample = case.sample_input
    with pytest.raises(case.error_type, match=case.error_regex) as caught:
        ours(function)(sample.input, *sample.args, **sample.kwargs)
    assert_names_shape_and_cure(caught.value, sample.input)


def assert_names_shape_and_cure(error: BaseException, x: Tensor | None = None) -> None:
    """Our own class, the shape of the culprit as a tuple or list, and a cure on a line of its own."""
    assert isinstance(error, ns.errors.NormscopeError)
    text = str(error)
    assert re.search(r"^  cure: \S.{8,}", text, re.MULTILINE), text
    if x is not None:
        sizes = ", ".join(map(str, x.shape))  # torch prints an unbatched input with the batch axis that it adds
        assert re.search(rf"[\[( ]{sizes},?[\])]", text), text


@pytest.mark.parametrize(
    ("layer", "index"),
    [
        (layer, index)
        for layer in LAYERS
        if module_infos()[layer].module_error_inputs_func is not None
        for index in range(
            len(
                module_infos()[layer].module_error_inputs_func(module_infos()[layer], "cpu", torch.float32, False, True)
            )
        )
    ],
)
def test_module_error_inputs(layer: str, index: int) -> None:
    info = module_infos()[layer]
    case = info.module_error_inputs_func(info, "cpu", torch.float32, False, True)[index]
    construct, call = case.module_error_input.constructor_input, case.module_error_input.forward_input
    built = []

    def run() -> None:
        built.append(getattr(ns.nn, layer)(*construct.args, **construct.kwargs))
        built[0](*call.args, **call.kwargs)

    with pytest.raises(case.error_type, match=case.error_regex) as caught:
        run()
    assert bool(built) == (case.error_on is ModuleErrorEnum.FORWARD_ERROR)
    assert_names_shape_and_cure(caught.value)


# --- errors in plain use ---------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


# (layer, its arguments, eval mode?, input). Torch raises for each of them; the test asks it what.
LAYER_ERRORS: dict[str, tuple[str, dict[str, Any], bool, Tensor]] = {
    "BatchNorm1d-4D": ("BatchNorm1d", {"num_features": 3}, False, zeros(2, 3, 4, 5)),
    "BatchNorm1d-1D": ("BatchNorm1d", {"num_features": 3}, False, zeros(3)),
    "BatchNorm2d-3D": ("BatchNorm2d", {"num_features": 3}, False, zeros(2, 3, 4)),
    "BatchNorm2d-3D-eval": ("BatchNorm2d", {"num_features": 3}, True, zeros(2, 3, 4)),
    "BatchNorm3d-4D": ("BatchNorm3d", {"num_features": 3}, False, zeros(2, 3, 4, 4)),
    "LazyBatchNorm2d-3D": ("LazyBatchNorm2d", {}, False, zeros(2, 3, 4)),
    "BatchNorm1d-one-value": ("BatchNorm1d", {"num_features": 3}, False, zeros(1, 3)),
    "BatchNorm1d-one-value-3D": ("BatchNorm1d", {"num_features": 3}, False, zeros(1, 3, 1)),
    "BatchNorm2d-one-value": ("BatchNorm2d", {"num_features": 3}, False, zeros(1, 3, 1, 1)),
    "BatchNorm3d-one-value": ("BatchNorm3d", {"num_features": 3}, False, zeros(1, 3, 1, 1, 1)),
    "BatchNorm2d-channels": ("BatchNorm2d", {"num_features": 3}, False, zeros(2, 4, 5, 5)),
    "BatchNorm2d-channels-eval": ("BatchNorm2d", {"num_features": 3}, True, zeros(2, 4, 5, 5)),
    "BatchNorm2d-channels-no-running": (
        "BatchNorm2d",
        {"num_features": 3, "track_running_stats": False},
        False,
        zeros(2, 4, 5, 5),
    ),
    "BatchNorm2d-channels-not-affine": ("BatchNorm2d", {"num_features": 3, "affine": False}, False, zeros(2, 4, 5, 5)),
    "BatchNorm2d-eps-0": ("BatchNorm2d", {"num_features": 3, "eps": 0.0}, False, zeros(2, 3, 5, 5)),
    "BatchNorm2d-eps-negative": ("BatchNorm2d", {"num_features": 3, "eps": -1e-5}, False, zeros(2, 3, 5, 5)),
    "BatchNorm2d-eps-negative-eval": ("BatchNorm2d", {"num_features": 3, "eps": -1e-5}, True, zeros(2, 3, 5, 5)),
    "BatchNorm2d-integers": ("BatchNorm2d", {"num_features": 3}, False, zeros(2, 3, 5, 5, dtype=torch.int64)),
    "BatchNorm2d-booleans-eval": ("BatchNorm2d", {"num_features": 3}, True, zeros(2, 3, 5, 5, dtype=torch.bool)),
    "BatchNorm1d-complex": ("BatchNorm1d", {"num_features": 3}, False, zeros(2, 3, dtype=torch.complex64)),
    "InstanceNorm1d-4D": ("InstanceNorm1d", {"num_features": 3}, False, zeros(2, 3, 4, 5)),
    "InstanceNorm2d-2D": ("InstanceNorm2d", {"num_features": 3}, False, zeros(3, 5)),
    "InstanceNorm3d-3D": ("InstanceNorm3d", {"num_features": 3}, True, zeros(3, 5, 5)),
    "InstanceNorm1d-unbatched-channels": ("InstanceNorm1d", {"num_features": 3, "affine": True}, False, zeros(4, 5)),
    "InstanceNorm1d-channels": ("InstanceNorm1d", {"num_features": 3, "affine": True}, False, zeros(2, 4, 5)),
    "InstanceNorm2d-one-cell": ("InstanceNorm2d", {"num_features": 3}, False, zeros(2, 3, 1, 1)),
    "InstanceNorm2d-one-cell-eval": ("InstanceNorm2d", {"num_features": 3}, True, zeros(2, 3, 1, 1)),
    "InstanceNorm1d-unbatched-one-cell": ("InstanceNorm1d", {"num_features": 3}, False, zeros(3, 1)),
    "InstanceNorm2d-integers": ("InstanceNorm2d", {"num_features": 3}, False, zeros(2, 3, 5, 5, dtype=torch.int32)),
    "GroupNorm-1D": ("GroupNorm", {"num_groups": 2, "num_channels": 6}, False, zeros(6)),
    "GroupNorm-channels": ("GroupNorm", {"num_groups": 2, "num_channels": 6}, False, zeros(2, 4, 5)),
    "GroupNorm-indivisible": ("GroupNorm", {"num_groups": 2, "num_channels": 6}, False, zeros(2, 7, 5)),
    "GroupNorm-one-value": ("GroupNorm", {"num_groups": 6, "num_channels": 6}, False, zeros(1, 6)),
    "GroupNorm-one-value-eval": ("GroupNorm", {"num_groups": 6, "num_channels": 6}, True, zeros(1, 6, 1, 1)),
    "LayerNorm-shape": ("LayerNorm", {"normalized_shape": 5}, False, zeros(2, 4)),
    "LayerNorm-too-few-axes": ("LayerNorm", {"normalized_shape": (2, 3, 4)}, False, zeros(3, 4)),
    "RMSNorm-shape": ("RMSNorm", {"normalized_shape": 5}, False, zeros(2, 4)),
    "RMSNorm-two-axes": ("RMSNorm", {"normalized_shape": (3, 5)}, False, zeros(2, 3, 4)),
    "RMSNorm-integers": ("RMSNorm", {"normalized_shape": 4}, False, zeros(2, 4, dtype=torch.int64)),
    "LayerNorm-integers": (
        "LayerNorm",
        {"normalized_shape": 4, "elementwise_affine": False},
        False,
        zeros(2, 4, dtype=torch.int64),
    ),
    "GroupNorm-integers": (
        "GroupNorm",
        {"num_groups": 2, "num_channels": 4, "affine": False},
        False,
        zeros(2, 4, 3, dtype=torch.int64),
    ),
}


def error_of(run: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is what the test compares
        run()
    return caught.value


@pytest.mark.parametrize("label", LAYER_ERRORS)
def test_layer_errors(label: str) -> None:
    """Torch's sentence in the first line, torch's class among the bases, then our shape, cure and layer path."""
    layer, arguments, evaluating, x = LAYER_ERRORS[label]

    def run(namespace: Any) -> Tensor:
        norm = getattr(namespace, layer)(**arguments).train(not evaluating)
        model = nn.Sequential()
        model.add_module("stem", nn.Sequential())
        model.stem.add_module("norm", norm)
        return model(x)

    theirs, mine = error_of(lambda: run(nn)), error_of(lambda: run(ns.nn))
    assert isinstance(mine, type(theirs)), f"{type(mine).__mro__} is no {type(theirs).__name__}: {mine}"
    assert str(theirs).splitlines()[0] in str(mine).splitlines()[0]
    assert_names_shape_and_cure(mine, x if "eps" not in label else None)
    assert "stem.norm" in str(mine)


@pytest.mark.parametrize("layer", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LayerNorm"])
def test_integers_in_an_affine_layer(layer: str) -> None:
    """Torch says of two of these that "all inputs must share same datatype"; we name the dtype that is wrong."""
    arguments = {"GroupNorm": (2, 4), "LayerNorm": (5,)}.get(layer, (4,))
    x = zeros(2, 4, 5, 5, dtype=torch.int64)
    theirs = error_of(lambda: getattr(nn, layer)(*arguments)(x))
    mine = error_of(lambda: getattr(ns.nn, layer)(*arguments)(x))
    assert isinstance(mine, type(theirs))
    assert "Long" in str(mine).splitlines()[0] or "int64" in str(mine)
    assert_names_shape_and_cure(mine, x)


def test_a_layer_alone_raises_the_same_sentence() -> None:
    error = error_of(lambda: ns.nn.BatchNorm2d(3)(zeros(8, 3)))
    assert str(error).splitlines()[0] == "expected 4D input (got 2D input)"


FUNCTION_ERRORS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "batch_norm-no-running-mean": ("batch_norm", (zeros(2, 3, 4), None, None), {}),
    "batch_norm-no-running-var": ("batch_norm", (zeros(2, 3, 4), zeros(3), None), {}),
    "batch_norm-bias": ("batch_norm", (zeros(2, 3, 4), None, None, None, zeros(4)), {"training": True}),
    "batch_norm-running-var": ("batch_norm", (zeros(2, 3, 4), zeros(3), zeros(4)), {"training": True}),
    "batch_norm-eps-0": ("batch_norm", (zeros(2, 3), None, None), {"training": True, "eps": 0.0}),
    "batch_norm-one-value": ("batch_norm", (zeros(1, 3), None, None), {"training": True}),
    "instance_norm-2D": ("instance_norm", (zeros(2, 3),), {}),
    "instance_norm-1D": ("instance_norm", (zeros(2),), {}),
    "instance_norm-no-running": ("instance_norm", (zeros(2, 3, 4),), {"use_input_stats": False}),
    "instance_norm-one-running": ("instance_norm", (zeros(2, 3, 4), zeros(3)), {}),
    "instance_norm-weight": ("instance_norm", (zeros(2, 3, 4),), {"weight": zeros(2)}),
    "layer_norm-no-axes": ("layer_norm", (zeros(2, 4), ()), {}),
    "layer_norm-weight": ("layer_norm", (zeros(2, 4), (4,), zeros(3)), {}),
    "layer_norm-bias": ("layer_norm", (zeros(2, 4), (4,), zeros(4), zeros(3)), {}),
    "rms_norm-weight": ("rms_norm", (zeros(2, 4), (4,), zeros(3)), {}),
    "group_norm-bias": ("group_norm", (zeros(2, 4, 3), 2, zeros(4), zeros(2)), {}),
    "group_norm-negative": ("group_norm", (zeros(2, 4, 3), -1), {}),
    "group_norm-one-value": ("group_norm", (zeros(1, 4), 4), {}),
}

# Torch counts N·C channels in instance_norm, and prints the weight's shape as the bias's; ours says the true numbers.
WRONG_NUMBERS = ("instance_norm-weight", "group_norm-bias")


@pytest.mark.parametrize("label", FUNCTION_ERRORS)
def test_function_errors(label: str) -> None:
    function, arguments, keywords = FUNCTION_ERRORS[label]
    theirs = error_of(lambda: getattr(F, function)(*arguments, **keywords))
    mine = error_of(lambda: ours(function)(*arguments, **keywords))
    assert isinstance(mine, type(theirs)), f"{type(mine).__mro__} is no {type(theirs).__name__}: {mine}"
    sentences = [str(error).splitlines()[0] for error in (theirs, mine)]
    if label in WRONG_NUMBERS:
        sentences = [re.sub(r"\d+", "#", sentence) for sentence in sentences]
    assert sentences[0] in sentences[1]
    assert_names_shape_and_cure(mine)


def test_one_axis_has_no_channels() -> None:
    """Torch reads (3,) as an input of 0 channels: "running_mean should contain 0 elements not 3"."""
    error = error_of(lambda: ns.functional.batch_norm(zeros(3), zeros(3), zeros(3), training=True))
    assert isinstance(error, RuntimeError)
    assert_names_shape_and_cure(error, zeros(3))


def test_zero_groups_is_an_error_with_a_sentence() -> None:
    """Torch: ZeroDivisionError("integer modulo by zero"). Nobody catches that on purpose; ours says what is wrong."""
    for run in (lambda: ns.nn.GroupNorm(0, 10), lambda: ns.functional.group_norm(zeros(2, 4, 3), 0)):
        assert_names_shape_and_cure(error_of(run))


# --- layers ----------------------------------------------------------------------------------------------------------


def layer_params(layers: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(layer, index, id=f"{layer}-{case.label}")
        for layer in layers
        for index, case in enumerate(layer_cases(layer, torch.float64))
    ]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize(("layer", "index"), layer_params(LAYERS))
def test_layers(layer: str, index: int, dtype: torch.dtype, training: bool) -> None:
    case = layer_cases(layer, dtype)[index]
    mine, peer = (case.build(namespace, dtype).train(training) for namespace in (ns.nn, nn))
    compare_layers(mine, peer, case.input)
    compare_layers(mine, peer, case.input)  # the second call sees what the first one left in the buffers


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layer", "index"), layer_params(LAZY))
def test_lazy_layers(layer: str, index: int, training: bool) -> None:
    """The first call creates the parameters; then the layer is the ordinary one."""
    case = layer_cases(layer, torch.float32)[index]
    mine, peer = (case.build(namespace, torch.float32).train(training) for namespace in (ns.nn, nn))
    compare_layers_after_first_call(mine, peer, case)
    assert type(mine) is getattr(ns.nn, layer.removeprefix("Lazy"))
    assert repr(mine) == repr(peer)


def compare_layers_after_first_call(mine: nn.Module, peer: nn.Module, case: LayerCase) -> None:
    first = [step(module, case.input, SEED) for module in (mine, peer)]
    assert list(first[0]) == list(first[1])
    truth = copy.deepcopy(peer)
    function, arguments = layer_arguments(truth, case.input)
    scale = scales(function, arguments, SEED)
    for name, value in first[0].items():
        if value is not None and value.is_floating_point():
            wide = first[1][name].double()
            assert_close_to_truth(name, value, first[1][name], wide, scale=2 * scale.get(name, 0.0))
    compare_layers(randomized(mine, 5), randomized(peer, 5), case.input)


# --- memory formats --------------------------------------------------------------------------------------------------

FORMATS = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format, torch.channels_last_3d)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("layer", "index"),
    [p for p in layer_params(LAYERS) if layer_cases(p.values[0], torch.float64)[p.values[1]].input.dim() in FORMATS],
)
def test_memory_format(layer: str, index: int, training: bool) -> None:
    """Torch's test_memory_format, also for the layers which torch leaves out because it loses the format there."""
    case = layer_cases(layer, torch.float32)[index]
    formats = FORMATS[case.input.dim()]
    unbatched = layer.startswith("InstanceNorm") and case.input.dim() == 2 + int(layer[-2]) - 1
    for input_format in formats:
        for module_format in formats:
            mine, peer = (case.build(namespace, torch.float32).train(training) for namespace in (ns.nn, nn))
            x = case.input.detach().to(memory_format=input_format).requires_grad_()
            y = compare_layers(mine.to(memory_format=module_format), peer, x)
            if not unbatched:
                assert y.numel() == 0 or y.is_contiguous(memory_format=input_format), y.stride()
