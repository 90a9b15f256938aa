"""Layers that can absorb an affine map of their input or output channels into weight and bias."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normscope.surgery.affine import Affine, home_of, unshared
from normscope.surgery.fused import unhooked
from normscope.surgery.replace import obstacle

__all__ = ["Absorber", "absorbs", "inexact", "outputs_of", "unfit"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def absorbs(module: Module) -> bool:
    """Whether a module is linear by its class: convolution, transposed or not, Linear, Embedding."""
    return isinstance(module, (*_CONVS, nn.Linear, nn.Embedding))


def outputs_of(module: Module) -> int:
    """How many channels the output of a layer or normalizer has."""
    held = vars(module)
    if absorbs(module):
        return cast(int, next(held[name] for name in ("out_channels", "out_features", "embedding_dim") if name in held))
    return len(cast(Tensor, module.running_mean))


def unfit(module: Module) -> str | None:
    """Why a layer cannot absorb anything, or None."""
    name = type(module).__name__
    reason = obstacle(module)
    if reason is not None:
        return f"{name}: {reason}" + ("; bake=True makes them plain" if "parametrized" in reason else "")
    if not unhooked(module):
        return f"{name} has hooks, which would see other values"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"{name} with max_norm changes its weights whenever it is called"
    weight = module._parameters.get("weight")
    if absorbs(module) and (weight is None or not weight.is_floating_point() or weight.is_meta):
        return f"{name} has no weights that could be scaled"
    return None


def inexact(module: Module, affine: Affine, shape: tuple[int, ...], *, behind: bool) -> str | None:
    """Why a layer would compute something else after it has absorbed a map, or None.

    Args:
        module: The layer.
        affine: The map.
        shape: Of an input.
        behind: Whether the map is of the output channels.
    """
    name = type(module).__name__
    homes = [home_of(module, method) for method in ("forward", "_conv_forward") if hasattr(module, method)]
    if not all(home.startswith("torch.nn.modules.") for home in homes):
        return None if _tried(module, affine, shape, behind) else f"{name} computes more than the class it comes from"
    if behind or not affine.shift.any() or not isinstance(module, _ConvNd):
        return None
    if isinstance(module, _ConvTransposeNd):
        # A constant stays one where every output gets every weight: inside, at stride 1.
        reach = zip(module.padding, module.dilation, module.kernel_size, strict=True)
        inside = all(cast(int, p) >= d * (k - 1) for p, d, k in reach) and not any(module.output_padding)
        constant = inside and all(s == 1 for s in module.stride)
        return None if constant else "a transposed convolution does not keep a constant, and the shift is one"
    padded = any(module._reversed_padding_repeated_twice) and module.padding_mode == "zeros"
    return "the convolution pads with zeros, which the shift would have to pass" if padded else None


def _tried(module: Module, affine: Affine, shape: tuple[int, ...], behind: bool) -> bool:
    """Whether a layer with a forward of its own absorbs a map, by the values of a copy."""
    random = torch.Generator().manual_seed(0)

    def channels(t: Tensor) -> Tensor:
        return t if isinstance(module, nn.Linear) else t.reshape(-1, *[1] * (len(shape) - 2))

    if behind:  # any other map will do, and shows more than one that is nearly an identity
        affine = Affine(*(torch.randn(len(affine.scale), generator=random, dtype=torch.float64) for _ in range(2)))
    try:
        with torch.no_grad():
            probe = unshared(module)
            x = torch.randn((min(2, shape[0]), *shape[1:]), generator=random, dtype=torch.float64)
            scale, shift = map(channels, affine)
            expected = probe(x) * scale + shift if behind else probe(x * scale + shift)
            absorber = Absorber(probe)
            (absorber.behind if behind else absorber.before)(affine)
            absorber.write()
            return bool((probe(x) - expected).abs().max() <= 1e-10 * expected.abs().max())
    except Exception:  # a module that cannot be run by itself
        return False


class Absorber:
    """A layer and what its weight and bias become, in float64; the layer itself changes in `write` alone.

    Maps are absorbed one after the other, and the result is rounded once.

    Args:
        module: A convolution, Linear, Embedding, or a normalizer with running statistics.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        held = {**module._parameters, **module._buffers}
        weight, bias = (held.get(name) for name in ("weight", "bias"))
        self.weight = torch.ones(outputs_of(module), dtype=torch.float64) if weight is None else _wide(weight)
        self.bias = None if bias is None else _wide(bias)

    def behind(self, affine: Affine) -> None:
        """Absorb a map of the output channels: W ← s·W, b ← s·b + t."""
        scale, shift = affine
        self.weight = self.weight * self._over_outputs(scale)
        if isinstance(self.module, nn.Embedding):
            self.weight = self.weight + shift
        else:
            self.bias = shift if self.bias is None else self.bias * scale + shift

    def before(self, affine: Affine) -> None:
        """Absorb a map of the input channels: W ← W·s, b ← b + ΣW·t."""
        scale, shift = affine
        moved = self.weight * self._over_inputs(shift)
        if isinstance(self.module, _ConvTransposeNd):
            groups = self.module.groups
            moved = moved.reshape(groups, -1, *moved.shape[1:]).transpose(1, 2).flatten(0, 1)
        self.weight = self.weight * self._over_inputs(scale)
        if shift.any():
            added = moved.flatten(1).sum(1)
            self.bias = added if self.bias is None else self.bias + added

    def _over_outputs(self, values: Tensor) -> Tensor:
        """One value per output channel, shaped to multiply the weight."""
        if isinstance(self.module, _ConvTransposeNd):  # (in, out ⁄ groups, *kernel)
            return self._grouped(values.reshape(self.module.groups, 1, -1))
        if isinstance(self.module, nn.Embedding):
            return values
        return values.reshape(-1, *[1] * (self.weight.dim() - 1))

    def _over_inputs(self, values: Tensor) -> Tensor:
        """One value per input channel, shaped to multiply the weight."""
        if isinstance(self.module, _ConvTransposeNd):
            return values.reshape(-1, *[1] * (self.weight.dim() - 1))
        if isinstance(self.module, _ConvNd):  # (out, in ⁄ groups, *kernel)
            return self._grouped(values.reshape(self.module.groups, 1, -1))
        return values

    def _grouped(self, values: Tensor) -> Tensor:
        """(groups, 1, channels of a group) for the two first axes of a weight, the first of which is split."""
        first, second = self.weight.shape[:2]
        rows = values.expand(-1, first // len(values), -1).reshape(first, second)
        return rows.reshape(first, second, *[1] * (self.weight.dim() - 2))

    def overflows(self) -> bool:
        """Whether the module's own kind of numbers cannot hold the result."""
        kept = [t.to(self._like(name).dtype) for name, t in self._values()]
        return not all(bool(t.isfinite().all()) for t in kept)

    def write(self) -> list[str]:
        """Give the result to the module: into the tensors it has; returns the names of those that are new."""
        new = []
        for name, value in self._values():
            like = self._like(name)
            held = self.module._parameters.get(name, self.module._buffers.get(name))
            if held is None:
                fresh = value.to(like.device, like.dtype)
                self.module.register_parameter(name, Parameter(fresh, requires_grad=like.requires_grad))
                new.append(name)
            else:
                held.data.copy_(value)
        if new and hasattr(self.module, "affine"):
            self.module.affine = True  # type: ignore[assignment]
        return new

    def _values(self) -> list[tuple[str, Tensor]]:
        return [(name, t) for name, t in (("weight", self.weight), ("bias", self.bias)) if t is not None]

    def _like(self, name: str) -> Tensor:
        held = {**self.module._parameters, **self.module._buffers}
        return next(t for t in (held.get(name), held.get("weight"), held.get("running_mean")) if t is not None)


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64, copy=True)
