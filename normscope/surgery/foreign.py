"""Normalizers of other libraries, which become layers of this package and stay what they are.

A class of timm or transformers is mixed with ours: the module keeps its class, keys, children and attributes, and
computes with our kernels. Which of ours a class corresponds to is suggested by its name and shown by its numbers: a
copy of the module runs before and after on random data, forward and backward, in both modes and in half precision.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Identity, Module

from normscope.functional import add_norm, rms_norm
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.activations import ACTIVATIONS
from normscope.nn import BatchNorm2d, GroupNorm, LayerNorm
from normscope.nn.base import Layer, normalizes
from normscope.surgery.activations import activation_of
from normscope.surgery.fused import unhooked
from normscope.surgery.traits import Trait, add_trait, base_of, remove_trait, traits_of

__all__ = ["Foreign", "adapt", "restore"]


class Foreign(Trait):
    """The trait of another library's normalizer that computes as a layer of this package."""

    def extra_repr(self) -> str:
        """The class's own."""
        return base_of(type(self)).extra_repr(self)

    def as_before(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """What the class itself computes, with a residual and an activation behind it."""
        y = cast(Tensor, base_of(type(self)).forward(self, x))
        y = y if residual is None else y + residual
        later = cast("str | None", self.activation) if vars(self).get("activation") is None else None
        return y if later is None else ACTIVATIONS[later].forward(y)


class ChannelsFirst(Foreign):
    """Over axis 1 of (N, C, H, W): the layer over the last axis, through permuted views."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize the channels of every position.

        The output is channels_last whatever the input is, as that of the classes themselves: the layers behind it then
        are, too, and a network of depthwise convolutions otherwise trains at 0.8 of its speed.
        """
        x, *others = (t if t is None or t.dim() != 4 else t.permute(0, 2, 3, 1) for t in (input, residual, mask))
        return cast(Tensor, super().forward(cast(Tensor, x).contiguous(), *others)).permute(0, 3, 1, 2)


class Activated(Foreign):
    """A normalizer with children `drop` and `act`, which are not called while they do nothing else."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize and activate."""
        drop, act = self._modules["drop"], self._modules["act"]
        if (type(drop), type(act)) != self.kinds or not (unhooked(drop) and unhooked(act)):  # type: ignore[arg-type]
            return self.as_before(input, residual)
        return cast(Tensor, super().forward(input, residual, mask))


class BatchNormAct2d(Activated, BatchNorm2d):
    """timm's BatchNormAct2d."""


class GroupNormAct(Activated, GroupNorm):
    """timm's GroupNormAct and GroupNorm1Act."""


class LayerNormAct(Activated, LayerNorm):
    """timm's LayerNormAct."""


class LayerNormAct2d(Activated, ChannelsFirst, LayerNorm):
    """timm's LayerNormAct2d."""


class GroupNormLike(Foreign, GroupNorm):
    """timm's GroupNorm, whose constructor takes the channels first."""


class LayerNormLike(Foreign, LayerNorm):
    """timm's LayerNorm."""


class LayerNorm2d(ChannelsFirst, LayerNorm):
    """timm's LayerNorm2d, and torchvision's."""


class RMSNormLike(Foreign, Layer):
    """An RMSNorm with `weight` and `variance_epsilon` or `eps`, as in transformers and timm."""

    offset = 0.0

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize the last axis."""
        if mask is None and self._mixes(input):
            return self.as_before(input, residual)
        weight = self._weight()
        return rms_norm(
            input, weight.shape, weight, self._eps(), activation=self.activation, residual=residual, mask=mask
        )

    def add_norm(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(normalized a + b, a + b)."""
        if self._mixes(a):
            return self.as_before(a + b, None), a + b
        weight = self._weight()
        return add_norm(a, b, weight.shape, weight, None, self._eps(), center=False)

    def _mixes(self, x: Tensor) -> bool:
        """Where the weight has another dtype, and under autocast, the classes differ in the dtype that comes out."""
        return cast(Tensor, self.weight).dtype != x.dtype or torch.is_autocast_enabled(x.device.type)

    def _weight(self) -> Tensor:
        weight = cast(Tensor, self.weight)
        return weight.to(COMPUTE_DTYPE[weight.dtype]) + self.offset if self.offset else weight

    def _eps(self) -> float:
        held = vars(self)
        return cast(float, next(held[name] for name in ("variance_epsilon", "eps", "epsilon") if name in held))


class OffsetRMSNorm(RMSNormLike):
    """An RMSNorm that multiplies by 1 + weight, as Gemma's."""

    offset = 1.0


# --- which class is which -----------------------------------------------------------------------------------------

_KNOWN: dict[str, type[Foreign]] = {
    "timm.layers.norm_act.BatchNormAct2d": BatchNormAct2d,
    "timm.layers.norm_act.GroupNormAct": GroupNormAct,
    "timm.layers.norm_act.GroupNorm1Act": GroupNormAct,
    "timm.layers.norm_act.LayerNormAct": LayerNormAct,
    "timm.layers.norm_act.LayerNormAct2d": LayerNormAct2d,
    "timm.layers.norm.GroupNorm": GroupNormLike,
    "timm.layers.norm.GroupNorm1": GroupNormLike,
    "timm.layers.norm.LayerNorm": LayerNormLike,
    "timm.layers.norm.LayerNorm2d": LayerNorm2d,
    "torchvision.models.convnext.LayerNorm2d": LayerNorm2d,
}


def adapt(module: Module) -> str | None:
    """Let a normalizer of another library compute as a layer of this package.

    Returns:
        Why not, where it is left as it was.
    """
    cls = base_of(type(module))
    candidates = _candidates(cls)
    if not candidates:
        return f"{cls.__name__} is no normalizer known here"
    reason = _unfit(module)
    for trait in candidates:
        reason = reason or _differs(module, trait)
        if reason is None:
            _mix(module, trait)
            return None
        if trait is not candidates[-1]:
            reason = None
    return reason


def restore(module: Module) -> None:
    """Take back `adapt`."""
    for trait in traits_of(type(module)):
        if issubclass(trait, Foreign):
            remove_trait(module, trait)
    for name in ("activation", "kinds"):
        vars(module).pop(name, None)


def _candidates(cls: type[Module]) -> tuple[type[Foreign], ...]:
    known = _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    if known is not None:
        return (known,)
    rms = cls.__name__.lower().endswith("rmsnorm") or cls.__name__ == "T5LayerNorm"
    return (RMSNormLike, OffsetRMSNorm) if rms else ()


def _unfit(module: Module) -> str | None:
    name = type(module).__name__
    if getattr(module, "_fast_norm", False):
        return f"{name} has its fast path on, which goes around autocast"
    drop, act = module._modules.get("drop"), module._modules.get("act")
    if drop is not None and type(drop) is not Identity:
        return f"{type(drop).__name__} lies between normalizer and activation of {name}"
    if act is not None and type(act) is not Identity and activation_of(act) is None:
        return f"{type(act).__name__} has no fused form"
    if not all(unhooked(child) for child in module.children()):
        return f"{name} has hooks on its children, which would miss a value"
    return None


def _mix(module: Module, trait: type[Foreign]) -> None:
    add_trait(module, trait)
    if issubclass(trait, Activated):
        drop, act = module._modules["drop"], cast(Module, module._modules["act"])
        vars(module).update(activation=activation_of(act), kinds=(type(drop), type(act)))


def _differs(module: Module, trait: type[Foreign]) -> str | None:
    """How the module would compute something else with a trait, found out on copies; None where it would not."""
    name = type(module).__name__
    try:
        random = torch.Generator().manual_seed(0)
        old = copy.deepcopy(module).to("cpu", torch.float32)
        for t in (*old.parameters(), *old.buffers()):
            if t.is_floating_point():
                t.data.copy_(torch.rand(t.shape, generator=random) + 0.5)
        shape = _input_shape(old, trait)
        for training in (True, False):
            # Half precision: two roundings more or less are 2⁻⁷ of a value.
            for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2**-6)):
                x, g = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
                new = copy.deepcopy(old)
                _mix(new, trait)
                before, after = (_step(copy.deepcopy(m).to(dtype).train(training), x, g) for m in (old, new))
                for a, b in zip(before, after, strict=True):
                    if a.dtype != b.dtype or a.shape != b.shape:
                        return f"{name} returns {a.dtype} {tuple(a.shape)}, not as ours {b.dtype} {tuple(b.shape)}"
                    if (a - b).abs().max() > tolerance * a.abs().max():
                        return f"{name} computes something else than the layer its name suggests"
    except Exception as error:
        return f"{name} could not be tried out: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None


def _step(module: Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output, in float32 also gradients, and running statistics."""
    x = x.clone().requires_grad_()
    y = cast(Tensor, module.forward(x))
    if x.dtype != torch.float32:
        return [y.detach()]
    y.backward(g)  # type: ignore[no-untyped-call]
    grads = [p.grad for p in (x, *module.parameters()) if p.grad is not None]
    return [y.detach(), *grads, *(b for b in module.buffers() if b.is_floating_point())]


def _input_shape(module: Any, trait: type[Foreign]) -> tuple[int, ...]:
    if issubclass(trait, BatchNorm2d):
        return 5, module.num_features, 4, 3
    if issubclass(trait, GroupNorm):
        return 5, module.num_channels, 4, 3
    trailing = tuple(module.weight.shape if issubclass(trait, RMSNormLike) else module.normalized_shape)
    return (5, *trailing, 4, 3) if issubclass(trait, ChannelsFirst) else (5, 3, *trailing)
