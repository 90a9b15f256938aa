"""Normalizers as affine maps: in evaluation y = scale · x + shift per channel; and what stays when that has gone."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import Module

from normscope.nn.base import Layer
from normscope.surgery.find import Found
from normscope.surgery.foreign import restore
from normscope.surgery.traits import base_of

__all__ = ["Affine", "affine_of", "home_of", "is_plain", "keeps_statistics", "stand_in", "unshared"]


class Affine(NamedTuple):
    """An affine map of channels, in float64 on the CPU."""

    scale: Tensor
    shift: Tensor

    def then(self, later: Affine) -> Affine:
        """This map, and another one behind it."""
        return Affine(self.scale * later.scale, self.shift * later.scale + later.shift)


_MODULES: dict[str, Callable[[], Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
}
# Classes whose forward is: normalize, then call the children `drop` and `act`.
_ACTIVATED = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
# And of other libraries those called so, which detectors have copied from each other.
_NAMES = (*_ACTIVATED, "FrozenBatchNorm", "FrozenBatchNorm2d")


def keeps_statistics(found: Found) -> bool:
    """Whether a normalizer has running statistics, if only a mean."""
    return found.running or getattr(found.module, "running_mean", None) is not None


def is_plain(module: Module) -> bool:
    """Whether a normalizer does nothing behind its affine map."""
    if isinstance(module, Layer) and module.activation is not None:
        return False
    return all(type(child) is nn.Identity for child in module.children())


def stand_in(module: Module) -> Module:
    """What takes the place of a normalizer that has been folded: an Identity, or its activation."""
    if module._modules:  # their names stay, too
        new: Module = nn.Sequential(collections.OrderedDict(cast("dict[str, Module]", module._modules)))
    elif isinstance(module, Layer) and module.activation is not None:
        new = _MODULES[module.activation]()
    else:
        new = nn.Identity()
    new.training = module.training
    return new


def affine_of(module: Module, rank: int) -> Affine | str:
    """The affine map that a normalizer is in evaluation, found out and checked on a copy; else why it is none.

    Args:
        module: The normalizer.
        rank: How many axes its inputs have.
    """
    name, home = type(module).__name__, home_of(module)
    if not home.startswith(("torch.nn.modules.", "normscope.")) and not home.endswith(_NAMES):
        return f"{name} has a forward of its own, which may do more than normalize"
    if module._modules and home not in _ACTIVATED:
        return f"{name} holds other modules, which may do more than normalize"
    mean = cast(Tensor, module.running_mean)
    if mean.dim() != 1:
        return f"its running statistics have {mean.dim()} axes, not one per channel"
    try:
        probe = _bare(module)
        shape = (1, len(mean), *[3] * (rank - 2))
        spread = (1 + probe.running_mean.abs()).reshape(1, -1, *[1] * (rank - 2))  # type: ignore[operator]
        with torch.no_grad():
            at, below, above = (probe(k * spread.expand(shape)) for k in (0.0, -1.0, 1.0))
            scale, shift = (above - below) / (2 * spread), at
            x = spread * torch.randn((3, *shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            error = (probe(x) - (scale * x + shift)).abs().amax()
            size = (scale.abs() * spread + shift.abs()).amax()
    except Exception as error:
        return f"{name} could not be tried out: {(str(error) or type(error).__name__).splitlines()[0]}"
    scale, shift = (t.transpose(0, 1).reshape(len(mean), -1)[:, 0] for t in (scale, shift))
    if not (scale.isfinite().all() and shift.isfinite().all()):
        return "its statistics or parameters are not finite"
    return Affine(scale, shift) if error <= 1e-10 * size else f"{name} is no affine map of its channels in evaluation"


def home_of(module: Module, method: str = "forward") -> str:
    """The class from which a module has a method."""
    cls = next(cls for cls in base_of(type(module)).__mro__ if method in vars(cls))
    return f"{cls.__module__}.{cls.__qualname__}"


def _bare(module: Module) -> Module:
    """A copy in float64 and evaluation without what follows the affine map."""
    probe = unshared(module)
    restore(probe)
    if isinstance(probe, Layer):
        vars(probe)["activation"] = None
    vars(probe)["_modules"] = {name: nn.Identity() for name in probe._modules}
    return probe.eval()


def unshared(module: Module) -> Module:
    """A copy with parameters and buffers of its own, in float64 on the CPU; a deep copy would take process groups."""
    probe = copy.copy(module)
    for registry in ("_parameters", "_buffers"):
        held = {name: None if t is None else _wide(t) for name, t in vars(module)[registry].items()}
        vars(probe)[registry] = held
    return probe


def _wide(t: Tensor) -> Tensor:
    t = t.detach().to("cpu", copy=True)
    return t.double() if t.is_floating_point() else t
