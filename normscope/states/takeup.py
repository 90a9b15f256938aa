"""`take_up`: other libraries' normalizers that torch has no class for become layers of this package.

Which of ours a class corresponds to is suggested by its name and shown by its numbers: copies of both run on random
data, forward and backward, in both modes.
"""

from __future__ import annotations

import copy as copies
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity, Module, Parameter

from normscope import nn
from normscope.nn.base import Layer
from normscope.nn.syncbatchnorm import BatchNormNd
from normscope.surgery import Draft, Proof, Surgery, adopt, find, obstacle, operate, replace
from normscope.surgery.activations import activation_of
from normscope.surgery.find import Select
from normscope.surgery.forward import Forward
from normscope.surgery.traits import base_of

__all__ = ["take_up"]

# Small inputs, so that an ε that is not the right one shows: 1e-5 beside a variance of 1e-6.
SCALE = 1e-3


def take_up(
    model: Module, example: Any = None, *, forward: Forward | None = None, select: Select = None, copy: bool = False
) -> Surgery:
    """Let layers of this package take the places of other libraries' normalizers that torch has no class for.

    By the name of the class: FrozenBatchNorm2d (torchvision, detectron2, and copies of it) and timm's
    FrozenBatchNormAct2d become `FrozenBatchNorm`; in-place ABN's ABN, InPlaceABN and InPlaceABNSync and timm's
    InplaceAbn become BatchNorm with the activation in it; timm's EvoNorm2dB0, EvoNorm2dS0, FilterResponseNormTlu2d,
    FilterResponseNormAct2d and GlobalResponseNorm the layers of those names. Each is shown first to compute the same
    on random numbers: outputs, input gradients and running statistics in both modes. Parameters and buffers are the
    same objects, but for γ = |weight| + ε of in-place ABN. (`ns.accelerate` takes up what torch has a class for.)

    Args:
        model: The model.
        example: A batch as the loader yields it; the model's outputs on it are then compared, too.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Returns:
        A report; it names those that are left, and why.

    Raises:
        ArgumentError: `select` matches nothing.
        ProofError: The example shows a difference; nothing was changed.

    Example:
        >>> import torch, normscope as ns
        >>> class FrozenBatchNorm2d(torch.nn.Module):  # torchvision's, or detectron2's
        ...     def __init__(self):
        ...         super().__init__()
        ...         for name in ("weight", "bias", "running_mean", "running_var"):
        ...             self.register_buffer(name, torch.ones(4))
        ...     def forward(self, x):
        ...         mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        ...         return torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), FrozenBatchNorm2d())
        >>> ns.states.take_up(model).model[1]
        FrozenBatchNorm(4)
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            old = found.module
            if isinstance(old, Layer) or _name(old) not in _BUILDERS:
                continue
            try:
                new = _equal(old)
            except _NoEqualError as error:
                draft.skip(found.name, str(error))
                continue
            replace(draft, old, new)
            draft.change(found.name)
            if new._parameters.get("weight") is not old._parameters.get("weight"):
                draft.notes.append(
                    f"{found.name}: γ = |weight| + ε is a new parameter, for the optimizer to be told of"
                )

    return operate("take_up", model, edit, copy=copy, proof=None if example is None else Proof(example, forward))


class _NoEqualError(Exception):
    """Why there is no layer here that computes the same."""


def _name(module: Module) -> str:
    return base_of(type(module)).__name__


def _equal(old: Module) -> Module:
    """The layer that computes what another library's computes, with its state."""
    reason = obstacle(old)
    if reason is not None:
        raise _NoEqualError(reason)
    try:
        for candidate in range(len(_BUILDERS[_name(old)](old))):
            if _computes_same(old, candidate):
                return _adopted(old, candidate)
    except _NoEqualError:
        raise
    except Exception as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise _NoEqualError(f"{_name(old)} could not be tried out: {message}") from error
    raise _NoEqualError(f"{_name(old)} computes something else than the layer its name suggests")


def _adopted(old: Any, candidate: int) -> Module:
    new = _BUILDERS[_name(old)](old)[candidate]
    magnitude = _name(old) in _IN_PLACE and old.weight is not None
    adopt(old, new, ("act", "drop", *(["weight"] if magnitude else [])))
    if magnitude:
        new.weight = Parameter(old.weight.detach().abs() + old.eps, old.weight.requires_grad)
    return new


# --- proof ------------------------------------------------------------------------------------------------------------


def _computes_same(module: Module, candidate: int) -> bool:
    random = torch.Generator().manual_seed(0)
    old = copies.deepcopy(module).to("cpu", torch.float32)
    for name, t in old.state_dict().items():
        if name == "running_var":
            t.copy_((torch.rand(t.shape, generator=random) + 0.5) * SCALE**2)
        elif t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=random) * (SCALE if name == "running_mean" else 1))
    new = _adopted(copies.deepcopy(old), candidate)
    channels = max(t.numel() for t in old.state_dict().values())
    shape = (5, 4, 3, channels) if getattr(old, "channel_dim", 1) == -1 else (5, channels, 4, 3)
    x = (torch.randn(shape, generator=random) + 0.5) * SCALE
    g = torch.randn(shape, generator=random)
    for training in (True, False):
        before, after = (_step(layer.train(training), x, g) for layer in (old, new))
        for key, a in before.items():
            # Rounding is 1e-6 of the largest value; a wrong ε 1e-3 and more.
            if key in after and not (a - after[key]).abs().max() <= 1e-4 * a.abs().max():
                return False
    return True


def _step(layer: Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = layer.forward(x.clone())  # which in-place layers write into
        (dx,) = torch.autograd.grad(y, x, g)
    buffers = {name: b.clone() for name, b in layer.named_buffers() if b.is_floating_point()}
    return {"y": y.detach(), "dx": dx, **buffers}


# --- which class is which ---------------------------------------------------------------------------------------------


def _frozen(old: Any) -> list[Module]:
    if old._parameters:
        raise _NoEqualError(f"it has parameters: {', '.join(old._parameters)}")
    activation = _activation(old) if hasattr(old, "act") else None
    # Copies of it have ε in the formula, or none.
    eps = (old.eps,) if hasattr(old, "eps") else (1e-5, 0.0)
    return [nn.FrozenBatchNorm(old.weight.numel(), e, activation=activation) for e in eps]


def _abn(old: Any) -> list[Module]:
    timm = hasattr(old, "act_name")
    name, slope = (old.act_name, old.act_param) if timm else (old.activation, old.activation_param)
    fused = {
        "identity": (None, slope),
        "relu": ("relu", slope),
        "leaky_relu": ("leaky_relu", 0.01),
        "elu": ("elu", 1.0),
    }
    activation, own = fused.get(name, (None, None))
    if slope != own:
        raise _NoEqualError(f"its activation, {name} with {slope}, has no fused form")
    given = (old.running_mean.numel(), old.eps, old.momentum, old.weight is not None)
    if _name(old) == "InPlaceABNSync":
        return [nn.SyncBatchNorm(*given, process_group=old.group, activation=activation)]
    return [BatchNormNd(*given, activation=activation)]


def _evonorm_b0(old: Any) -> list[Module]:
    _demand_v(old)
    return [nn.EvoNormB0(old.v.numel(), old.eps, old.momentum)]


def _evonorm_s0(old: Any) -> list[Module]:
    _demand_v(old)
    return [nn.EvoNormS0(old.v.numel(), old.groups, old.eps)]


def _demand_v(old: Any) -> None:
    if old.v is None:
        raise _NoEqualError("without its activation it does not normalize at all")


def _frn_tlu(old: Any) -> list[Module]:
    return [nn.FilterResponseNorm(old.weight.numel(), old.eps, activation=None if old.tau is None else "tlu")]


def _frn_act(old: Any) -> list[Module]:
    return [nn.FilterResponseNorm(old.weight.numel(), old.eps, activation=_activation(old))]


def _grn(old: Any) -> list[Module]:
    return [nn.GlobalResponseNorm(old.weight.numel(), old.eps, channels_last=old.channel_dim == -1)]


def _activation(old: Any) -> str | None:
    drop, act = getattr(old, "drop", None), old.act
    if drop is not None and type(drop) is not Identity:
        raise _NoEqualError(f"{type(drop).__name__} lies between it and its activation")
    name = None if type(act) is Identity else activation_of(act)
    if name is None and type(act) is not Identity:
        raise _NoEqualError(f"its {type(act).__name__} has no fused form")
    return name


_IN_PLACE = ("InPlaceABN", "InPlaceABNSync", "InplaceAbn")
_BUILDERS: dict[str, Callable[[Any], list[Module]]] = {
    "FrozenBatchNorm2d": _frozen,
    "FrozenBatchNormAct2d": _frozen,
    "ABN": _abn,
    **dict.fromkeys(_IN_PLACE, _abn),
    "EvoNorm2dB0": _evonorm_b0,
    "EvoNorm2dS0": _evonorm_s0,
    "FilterResponseNormTlu2d": _frn_tlu,
    "FilterResponseNormAct2d": _frn_act,
    "GlobalResponseNorm": _grn,
}
