"""PyTorch's own test cases for its normalizers, and the comparison of ours with torch's and with the truth.

The samples come from `torch.testing._internal`, so they are what torch tests itself with: empty batches, one value per
set, negative momentum, negative ε. Every comparison has three columns: ours, torch in the same dtype, and the truth,
which is torch in float64. Ours may err as much as torch does, or as the bound says that each caller gives.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FUNCTIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
LAYERS = (
    *(f"{kind}{d}d" for kind in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)),
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
)
LAZY = tuple(f"Lazy{name}" for name in LAYERS if name[-1] == "d")
BUFFERS = ("running_mean", "running_var")

# A sum of M rounded terms in any order errs by about √M ulp of the largest term; the sums of a sample's statistics,
# gradients and the few products around them are worth eight of those together.
ROUNDINGS = 8


@functools.cache
def op_infos() -> dict[str, Any]:
    """Torch's records of its operators by name; the import takes five seconds, so only those pay who ask."""
    with warnings.catch_warnings():
        # The import pulls in every framework that torch tests with, among them deprecated ones; none of it is ours.
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return {op.name: op for op in op_db if not op.variant_test_name}


@functools.cache
def module_infos() -> dict[str, Any]:
    """Torch's records of its layers by the class's name."""
    op_infos()
    from torch.testing._internal.common_modules import module_db

    return {info.module_cls.__name__: info for info in module_db}


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32 for the half-width dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest(tensor: Tensor | None) -> float:
    """The largest finite magnitude; 0 for nothing."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(torch.where(tensor.isfinite(), tensor, 0).detach().double().abs().max())


def clone(value: Any) -> Any:
    """A deep copy that keeps strides, dtype and requires_grad, as a leaf."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    return value


def widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return clone(value)


def random_like(tensor: Tensor, seed: int, rounded: torch.dtype | None = None) -> Tensor:
    """A random upstream gradient: a constant one hides every error of a centred normalizer (Σ x̂ = 0).

    `rounded` is the narrowest dtype of a comparison, so that all its columns get the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(rounded or tensor.dtype)
    return torch.empty_like(tensor, requires_grad=False).copy_(noise)


def assert_close_to_truth(name: str, ours: Any, theirs: Any, truth: Any, *, scale: float) -> None:
    """Ours errs no more than torch does, or than one ulp of the largest value plus `ROUNDINGS` ulp of `scale`.

    One ulp of the result's dtype is the final rounding; `scale` is the largest intermediate, in units of the result,
    whose rounding in the dtype of the arithmetic no algorithm avoids. NaN and infinities must sit in the same cells.
    """
    if truth is None:
        assert ours is None, f"{name}: torch has None here"
        assert theirs is None
        return
    assert isinstance(ours, Tensor), f"{name} is {ours!r}, torch has a tensor of shape {tuple(theirs.shape)}"
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device), name
    mine, peer, true = (t.detach().double() for t in (ours, theirs, truth))
    agree = torch.isfinite(true) & torch.isfinite(peer)
    odd = ~torch.isfinite(peer)
    same = torch.where(odd, (mine == peer) | (mine.isnan() & peer.isnan()), mine.isfinite())
    assert bool(same.all()), f"{name}: NaN or infinity elsewhere than in torch: {mine[~same][:5]} for {peer[~same][:5]}"
    error, allowed = largest((mine - true)[agree]), largest((peer - true)[agree])
    bound = eps_of(ours.dtype) * largest(true) + ROUNDINGS * eps_of(computed_in(ours.dtype)) * scale
    assert error <= max(allowed, bound), (
        f"{name} errs by {error:.2e}; torch errs by {allowed:.2e}, the bound is {bound:.2e} (scale {scale:.2e})"
    )


# --- functions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One sample: the arguments of a function by name, in the order of its signature."""

    function: str
    label: str
    arguments: Mapping[str, Any]

    def fresh(self, change: Callable[[Any], Any] = clone) -> dict[str, Any]:
        return {name: change(value) for name, value in self.arguments.items()}

    @property
    def kind(self) -> str:
        """The label without the index: torch draws some of its samples several times."""
        return self.label.partition("-")[2]

    @property
    def differentiable(self) -> list[str]:
        """The arguments that torch differentiates: all floating ones but the running statistics."""
        return [n for n, v in self.arguments.items() if isinstance(v, Tensor) and v.requires_grad]

    @property
    def positional(self) -> list[Any]:
        """All arguments by position, with torch's defaults in the gaps."""
        parameters = inspect.signature(getattr(F, self.function)).parameters
        return [clone(self.arguments.get(name, p.default)) for name, p in parameters.items()]


@functools.cache
def samples(function: str, dtype: torch.dtype, *, reference: bool = True) -> tuple[Call, ...]:
    """Torch's samples for a function; `reference` adds the larger ones that it keeps for comparisons of values."""
    op = op_infos()[f"nn.functional.{function}"]
    signature = inspect.signature(getattr(F, function))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20)
        make = op.reference_inputs if reference else op.sample_inputs
        drawn = list(make("cpu", dtype, requires_grad=True))
    calls = []
    for index, sample in enumerate(drawn):
        bound = signature.bind(sample.input, *sample.args, **sample.kwargs).arguments
        words = [f"{index:02d}", "x".join(map(str, sample.input.shape))]
        for name, value in bound.items():
            if isinstance(value, Tensor):
                words += [name] if name != "input" else []
            elif name != "input" and value is not None:
                words.append(f"{name}={value}".replace(" ", ""))
        calls.append(Call(function, "-".join(words), bound))
    return (*calls, *without_parameters(calls[0]))


def without_parameters(call: Call) -> Iterator[Call]:
    """The call without γ, without β, without both: torch means to sample these, but its loop overwrites the None."""
    present = [name for name in ("weight", "bias") if name in call.arguments]
    for count in range(1, len(present) + 1):
        for names in itertools.combinations(present, count):
            yield Call(
                call.function,
                "-".join((call.label, "without", *names)),
                {k: None if k in names else v for k, v in call.arguments.items()},
            )


def torchs(function: str) -> Callable[..., Tensor]:
    """Torch's function; where it cannot differentiate, the same call written so that it can.

    torch 2.13 raises "tensor does not have a device" in the backward of group_norm(weight=None, bias=β) on the CPU.
    """
    original: Callable[..., Tensor] = getattr(F, function)

    def with_ones(input, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def] # noqa: A002
        weight = torch.ones_like(bias, requires_grad=False) if weight is None and bias is not None else weight
        return original(input, num_groups, weight, bias, eps)

    return with_ones if function == "group_norm" else original


def evaluate(
    function: Callable[..., Tensor], arguments: dict[str, Any], seed: int, rounded: torch.dtype
) -> dict[str, Any]:
    """The output, the gradient of every argument that wants one, and all tensors after the call (mutation shows)."""
    y = function(**arguments)
    wanted = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = backward(y, list(wanted.values()), random_like(y, seed, rounded))
    result: dict[str, Any] = {"output": y.detach()}
    result |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    result |= {f"{name} after the call": v.detach() for name, v in arguments.items() if isinstance(v, Tensor)}
    return result


def backward(y: Tensor, wanted: list[Tensor], upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients; a backward pass that writes into the gradient it is given would spoil that of its siblings."""
    before = upstream.clone()
    grads = torch.autograd.grad(y, wanted, upstream, allow_unused=True)
    assert torch.equal(upstream, before), "the backward pass changed the upstream gradient"
    return grads


def variance(function: str, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(x − μ, σ²) of the call in float64, broadcastable against each other; for RMSNorm μ = 0."""
    x = arguments["input"].detach().double()
    if function in ("layer_norm", "rms_norm"):
        axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    elif function == "group_norm":
        x = x.reshape(*x.shape[:1], arguments["num_groups"], math.prod(x.shape[1:]) // arguments["num_groups"])
        axes = (2,)
    elif function == "instance_norm":
        axes = tuple(range(2, x.dim()))
    else:
        axes = tuple(a for a in range(x.dim()) if a != 1)
    given = arguments.get("running_var")
    from_input = arguments.get("use_input_stats", True) if function == "instance_norm" else arguments.get("training")
    if given is not None and not from_input:
        shape = [-1 if axis == min(1, x.dim() - 1) else 1 for axis in range(x.dim())]
        return (x - arguments["running_mean"].detach().double().reshape(shape)), given.detach().double().reshape(shape)
    centred = x if function == "rms_norm" else x - x.mean(axes, keepdim=True)
    return centred, centred.square().mean(axes, keepdim=True)


def scales(function: str, arguments: Mapping[str, Any], seed: int) -> dict[str, float]:
    """The largest intermediate behind each result, from the formulas of the forward and backward pass.

    With r = (σ² + ε)^−½ and h = max |x̂|: y = γ·x̂ + β, dx = r·γ·(g − mean g − x̂·mean(g·x̂)), dγ = Σ g·x̂, dβ = Σ g.
    """
    centred, var = variance(function, arguments)
    eps = arguments.get("eps", 1e-5)
    rstd = (var + (1e-16 if eps is None else eps)).rsqrt()
    h, r = largest(centred * rstd), largest(rstd)
    weight, bias = arguments.get("weight"), arguments.get("bias")
    w, b = (1.0 if weight is None else largest(weight)), largest(bias)
    x = arguments["input"]
    if x.dtype == torch.float64:  # here the truth is rounded too: torch's kernels keep the mean as one number
        h += r * largest(x)
    g = largest(random_like(x, seed))
    terms = math.sqrt(max(x.numel() / max(weight.numel() if weight is not None else 1, 1), 1))
    momentum = abs(arguments.get("momentum", 0.1))
    return {
        "output": h * w + b,
        "gradient of input": r * w * g * (2 + h * h),
        "gradient of weight": terms * g * h,
        "gradient of bias": terms * g,
        "running_mean after the call": (1 + momentum) * largest(x),
        "running_var after the call": (1 + momentum) * (largest(var) + largest(arguments.get("running_var"))),
    }


# --- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerCase:
    """One of torch's module inputs: how to build the layer, and what to feed it."""

    layer: str
    label: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    input: Tensor

    def build(self, namespace: Any, dtype: torch.dtype, seed: int = 5) -> nn.Module:
        """The layer with parameters and buffers away from their initial values, equal for equal seeds."""
        layer: nn.Module = getattr(namespace, self.layer)(*self.arguments, **self.keywords).to(dtype)
        return randomized(layer, seed)


def randomized(layer: nn.Module, seed: int) -> nn.Module:
    """Parameters and running statistics drawn at random, so that forgetting one of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if tensor.is_floating_point() and not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else noise)
    return layer


@functools.cache
def layer_cases(layer: str, dtype: torch.dtype) -> tuple[LayerCase, ...]:
    lazy = layer.startswith("Lazy")
    info = module_infos()[layer.removeprefix("Lazy")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(30)
        drawn = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    cases = []
    for index, one in enumerate(drawn):
        arguments = one.constructor_input.args[1:] if lazy else one.constructor_input.args
        if lazy and "no_batch_dim" in one.desc:
            continue  # torch's lazy layers take axis 1 for the channels and then refuse, or warn about, axis 0
        cases.append(
            LayerCase(
                layer,
                f"{index:02d}-{one.desc or 'plain'}",
                arguments,
                one.constructor_input.kwargs,
                one.forward_input.args[0],
            )
        )
    return tuple(cases)


def layer_arguments(layer: nn.Module, x: Tensor) -> tuple[str, dict[str, Any]]:
    """The function that a layer computes and its arguments, from which `scales` takes its magnitudes."""
    state = {name: getattr(layer, name, None) for name in ("weight", "bias", *BUFFERS)}
    common: dict[str, Any] = {"input": x, "eps": layer.eps} | state
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        momentum = 1.0 if layer.momentum is None else layer.momentum
        return "batch_norm", common | {
            "training": layer.training or layer.running_var is None,
            "momentum": momentum,
        }
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        unbatched = x.dim() == layer._get_no_batch_dim()
        return "instance_norm", common | {
            "input": x.unsqueeze(0) if unbatched else x,
            "use_input_stats": layer.training or not layer.track_running_stats,
            "momentum": layer.momentum or 0.0,
        }
    if isinstance(layer, nn.GroupNorm):
        return "group_norm", common | {"num_groups": layer.num_groups}
    name = "layer_norm" if isinstance(layer, nn.LayerNorm) else "rms_norm"
    return name, common | {"normalized_shape": layer.normalized_shape}


def step(layer: nn.Module, x: Tensor, seed: int, rounded: torch.dtype | None = None, **extra: Any) -> dict[str, Any]:
    """One forward and backward pass: the output, all gradients, and the state dict after it."""
    x = clone(x)
    y = layer(x, **extra)
    result: dict[str, Any] = {"output": y.detach()}
    parameters = dict(layer.named_parameters())
    grads = backward(y, [x, *parameters.values()], random_like(y, seed, rounded))
    result["input after the call"] = x.detach()
    result |= {f"gradient of {n}": grad for n, grad in zip(("input", *parameters), grads, strict=True)}
    return result | {f"{n} after the call": t.detach().clone() for n, t in layer.state_dict().items()}


def compare_layers(ours: nn.Module, theirs: nn.Module, x: Tensor, seed: int = 7, **extra: Any) -> Tensor:
    """One step of both layers, which hold the same state, against torch's layer in float64; returns our output."""
    truth = copy.deepcopy(theirs).double()
    counted = ours.state_dict().get("num_batches_tracked", torch.tensor(0)).clone()
    function, arguments = layer_arguments(theirs, x)
    scale = scales(function, arguments, seed)
    mine, peer = step(ours, x, seed, **extra), step(theirs, x, seed)
    true = step(truth, widened(x), seed, x.dtype)
    assert list(mine) == list(peer)
    for name, value in mine.items():
        if name.startswith("num_batches_tracked"):
            # torch's InstanceNorm never counts its batches, so that momentum=None never learns; ours counts.
            counts = isinstance(ours, nn.modules.instancenorm._InstanceNorm)
            expected = counted + (ours.training and ours.track_running_stats) if counts else peer[name]
            assert torch.equal(value, expected), f"{value} batches counted, not {expected}"
            continue
        assert_close_to_truth(name, value, peer[name], true[name], scale=scale.get(name, 0.0))
    output: Tensor = mine["output"]
    return output


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
