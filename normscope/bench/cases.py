"""What is timed: every family of normalizers, as torch and as normscope write it, and the tensors of the suite."""

from __future__ import annotations

import fnmatch
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns

__all__ = [
    "COMPILED", "DTYPES", "FAMILIES", "QUICK", "SUITE", "SWEEP",
    "Case", "Family", "Norm", "State", "liger", "on_gpu", "select",
]  # fmt: skip

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"": torch.contiguous_format, "cl": torch.channels_last}


class State(NamedTuple):
    """What a normalization takes besides x."""

    weight: Tensor
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    training: bool = True


Norm = Callable[[Tensor, State], Tensor]


@dataclass(frozen=True)
class Family:
    """One kind of normalizer.

    Attributes:
        name: As in the names of cases.
        pattern: The scope.
        sizes: Of split axes.
        channels: The axis of weight and bias.
        plain: torch's function, without an activation.
        eager: torch's function with an in-place ReLU behind it.
        ours: Ours with the ReLU fused.
        bias: Whether torch's function has one.
        running: Whether there are running statistics.
        mixed: The devices on which torch takes float32 parameters for a bfloat16 input.
    """

    name: str
    pattern: str
    plain: Norm
    eager: Norm
    ours: Norm
    sizes: Mapping[str, int] = field(default_factory=dict)
    channels: int = 1
    bias: bool = True
    running: bool = False
    mixed: tuple[str, ...] = ("cpu",)


def _family(name: str, pattern: str, call: Callable[..., Tensor], **options: Any) -> Family:
    """A family that torch.nn.functional and normscope.functional write alike."""
    return Family(
        name,
        pattern,
        plain=lambda x, s: call(F, x, s),
        eager=lambda x, s: call(F, x, s).relu_(),
        ours=lambda x, s: call(ns.functional, x, s, activation="relu"),
        **options,
    )


def _batch_norm(api: Any, x: Tensor, s: State, **fused: str) -> Tensor:
    y: Tensor = api.batch_norm(x, s.mean, s.var, s.weight, s.bias, s.training, **fused)
    return y


def _group_norm(api: Any, x: Tensor, s: State, **fused: str) -> Tensor:
    y: Tensor = api.group_norm(x, 32, s.weight, s.bias, **fused)
    return y


def _instance_norm(api: Any, x: Tensor, s: State, **fused: str) -> Tensor:
    y: Tensor = api.instance_norm(x, None, None, s.weight, s.bias, **fused)
    return y


def _layer_norm(api: Any, x: Tensor, s: State, **fused: str) -> Tensor:
    y: Tensor = api.layer_norm(x, s.weight.shape, s.weight, s.bias, **fused)
    return y


def _rms_norm(api: Any, x: Tensor, s: State, **fused: str) -> Tensor:
    y: Tensor = api.rms_norm(x, s.weight.shape, s.weight, **fused)
    return y


def _last(x: Tensor, s: State) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), s.weight.shape, s.weight, s.bias)


FAMILIES = {
    family.name: family
    for family in (
        _family("BN", "[n] c [h w]", _batch_norm, running=True, mixed=("cpu", "cuda")),
        _family("BN1d", "[n] c", _batch_norm, running=True, mixed=("cpu", "cuda")),
        _family("GN", "n (g [c]) [h w]", _group_norm, sizes={"g": 32}),
        _family("IN", "n c [h w]", _instance_norm, mixed=("cpu", "cuda")),
        _family("LN", "... [c]", _layer_norm, channels=-1),
        Family(
            "LN2d",
            "n [c] h w",
            plain=lambda x, s: _last(x, s).permute(0, 3, 1, 2),
            # The ReLU before the way back: in place on a view it would cost autograd a copy, which is not torch's norm.
            eager=lambda x, s: _last(x, s).relu_().permute(0, 3, 1, 2),
            ours=lambda x, s: ns.normalize(x, "n [c] h w", weight=s.weight, bias=s.bias, activation="relu"),
        ),
        _family("RMS", "... [c]", _rms_norm, channels=-1, bias=False, mixed=()),
    )
}


@dataclass(frozen=True)
class Case:
    """One family on one tensor."""

    family: Family
    shape: tuple[int, ...]
    dtype: str = "f32"
    layout: str = ""
    part: Literal["suite", "sweep"] = "suite"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What --select matches."""
        words = [self.family.name, "x".join(map(str, self.shape)), self.dtype, self.layout]
        return " ".join(["sweep"] * (self.part == "sweep") + [word for word in words if word])

    @property
    def size(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def params(self) -> str:
        """The dtype of weight and bias: float32 wherever torch takes that."""
        return "f32" if self.device in self.family.mixed else self.dtype

    def tensor(self, generator: torch.Generator, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """A random tensor of this case's shape, dtype, layout and device."""
        x = torch.randn(self.shape, generator=generator, device=generator.device).mul_(scale).add_(shift)
        return x.to(DTYPES[self.dtype]).contiguous(memory_format=LAYOUTS[self.layout])

    def state(self, generator: torch.Generator, *, training: bool) -> State:
        """Random parameters, and running statistics where the family has them."""
        channels, device = self.shape[self.family.channels], generator.device

        def row(dtype: torch.dtype, low: float, high: float) -> Tensor:
            return torch.empty(channels, device=device).uniform_(low, high, generator=generator).to(dtype)

        dtype = DTYPES[self.params]
        weight = row(dtype, 0.5, 1.5).requires_grad_(training)
        bias = row(dtype, -0.5, 0.5).requires_grad_(training) if self.family.bias else None
        if not self.family.running:
            return State(weight, bias, training=training)
        return State(weight, bias, row(torch.float32, -0.5, 0.5), row(torch.float32, 0.5, 1.5), training)


def _cases(family: str, *shapes: tuple[int, ...]) -> list[Case]:
    """Every shape in both dtypes, tensors of four axes in both layouts."""
    return [
        Case(FAMILIES[family], shape, dtype, layout)
        for shape in shapes
        for dtype in DTYPES
        for layout in (LAYOUTS if len(shape) == 4 else [""])
    ]


SUITE = (
    *_cases("BN", (32, 64, 56, 56), (128, 64, 28, 28), (8, 256, 56, 56), (32, 256, 14, 14), (64, 512, 7, 7)),
    *_cases("BN1d", (512, 1024)),
    *_cases("GN", (8, 256, 32, 32), (4, 128, 64, 64)),
    *_cases("IN", (4, 64, 128, 128)),
    *_cases("LN", (32, 197, 768), (8, 1024, 1024)),
    *_cases("LN2d", (16, 96, 56, 56)),
    *_cases("RMS", (8, 1024, 1024)),
)
# From 1 KB to 256 MB in steps of four.
_MAPS = [(1, 2), (4, 2), (4, 4), (16, 4), (16, 8), (16, 16), (16, 32), (64, 32), (64, 64), (256, 64)]
SWEEP = tuple(
    Case(FAMILIES[family], shape, part="sweep")
    for n, side in _MAPS
    for family, shape in (
        ("BN", (n, 64, side, side)),
        ("GN", (n, 64, side, side)),
        ("LN", (n * side * side // 4, 256)),
    )
)
QUICK = (
    "BN 32x64x56x56 f32",
    "BN 32x256x14x14 bf16 cl",
    "BN 64x512x7x7 f32",
    "GN 8x256x32x32 f32",
    "GN 8x256x32x32 bf16 cl",
    "IN 4x64x128x128 f32 cl",
    "LN 32x197x768 f32",
    "LN2d 16x96x56x56 f32",
    "RMS 8x1024x1024 bf16",
    "sweep LN 64x256 f32",
)
COMPILED = (
    "BN 32x64x56x56 f32",
    "BN 32x256x14x14 f32 cl",
    "GN 8x256x32x32 f32",
    "GN 8x256x32x32 bf16 cl",
    "IN 4x64x128x128 f32",
    "LN 32x197x768 f32",
    "LN2d 16x96x56x56 f32",
    "RMS 8x1024x1024 bf16",
)


def on_gpu(case: Case, least: int) -> Case:
    """The case on a GPU; one of the suite with so many more samples, times a power of two, that x has some bytes."""
    times = 1 << max(0, math.ceil(math.log2(least / case.size))) if case.part == "suite" else 1
    return replace(case, shape=(case.shape[0] * times, *case.shape[1:]), device="cuda")


def liger(family: Family) -> Norm | None:
    """The family by Liger's kernels, a ReLU in place behind; None where they are not installed or have none."""
    if family.name not in ("LN", "RMS") or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    if family.name == "LN":
        return lambda x, s: functional.liger_layer_norm(x, s.weight, s.bias, 1e-5).relu_()
    # In place it would overwrite the upstream gradient, which all alternatives share.
    return lambda x, s: functional.liger_rms_norm(x, s.weight, torch.finfo(x.dtype).eps, in_place=False).relu_()


def select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that contain one of the patterns, which may hold the wildcards * and ?; all without patterns."""
    globs = [f"*{pattern.lower()}*" for pattern in patterns or ("",)]
    return [name for name in names if any(fnmatch.fnmatchcase(name.lower(), glob) for glob in globs)]
