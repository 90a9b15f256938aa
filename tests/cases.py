"""The cases that tests and benchmarks share: every published scope, and the sizes at which kernels break.

Ragged sizes follow a rule, not taste: with N = 16 floats in the widest vector register, a run of cells has each of the
lengths 1, 3, 7, N/2, N, N + 1, 4N/3, 3N, 8N + 2, so that every tail and every number of full vectors occurs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from normscope.scope import Scope, parse

N = 16
RAGGED = (1, 3, 7, N // 2, N, N + 1, 4 * N // 3, 3 * N, 8 * N + 2)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One scope on one shape.

    Attributes:
        name: Unique; also the seed of the data.
        pattern: The notation.
        shape: Sizes of x.
        sizes: Sizes of split factors.
        params: The axes of weight and bias.
        center: Whether the mean is subtracted.
        large: The shape with a larger batch or map, above the size from which torch uses several threads.
    """

    name: str
    pattern: str
    shape: tuple[int, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: str = "c"
    center: bool = True
    large: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def scope(self) -> Scope:
        return parse(self.pattern).at(len(self.shape))

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.scope.param_axes(self.params))

    @property
    def parts(self) -> tuple[int, ...]:
        return self.scope.unfold(self.shape, self.sizes)

    @property
    def cells(self) -> int:
        """|S|."""
        return math.prod(self.parts[i] for i in self.scope.inside)

    @property
    def sets_shape(self) -> tuple[int, ...]:
        return tuple(self.parts[i] for i in self.scope.outside)

    def labels(self) -> torch.Tensor:
        """The number of the set of every cell, with x's shape."""
        scope, parts = self.scope, self.parts
        ids = torch.arange(math.prod(self.sets_shape)).reshape(
            [1 if p.averaged else n for p, n in zip(scope.parts, parts, strict=True)]
        )
        return ids.expand(parts).reshape(self.shape)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))


# Every named scope, every construct of the notation.
CASES = (
    Case("BatchNorm2d", "[n] c [h w]", (4, 6, 5, 7), large=(8, 6, 40, 40)),
    Case("BatchNorm1d", "[n] c", (9, 5), large=(2048, 40)),
    Case("BatchNorm3d", "[n] c [...]", (2, 3, 2, 3, 5), large=(4, 3, 16, 20, 20)),
    Case("BatchNorm per time step", "[n] t c", (8, 3, 5), large=(512, 8, 24)),
    Case("GhostBatchNorm", "(g [n]) c [h w]", (4, 3, 2, 5), {"g": 2}, large=(8, 3, 64, 60)),
    Case("InstanceNorm2d", "n c [h w]", (3, 5, 4, 7), large=(4, 5, 64, 65)),
    Case("GroupNorm", "n (g [c]) [h w]", (3, 6, 5, 3), {"g": 3}, large=(4, 6, 60, 64)),
    Case("LayerNorm", "... [c]", (3, 5, 17), large=(40, 40, 50)),
    Case("LayerNorm over a CNN layer", "n [c h w]", (3, 4, 3, 5), params="c h w", large=(4, 8, 50, 50)),
    Case("LayerNorm2d", "n [c] h w", (3, 7, 4, 5), large=(4, 7, 50, 52)),
    Case("RMSNorm", "... [c]", (3, 5, 17), center=False, large=(40, 40, 50)),
    Case("one set", "[n c]", (6, 9), large=(300, 300)),
    Case("interleaved groups", "n ([c] g) h", (3, 6, 4), {"g": 2}, large=(30, 6, 400)),
    Case("params out of order", "n [c h] w", (3, 4, 5, 2), params="w c", large=(40, 4, 20, 24)),
)

# Sizes of one, two cells per set, one set, one group, as many groups as channels.
EDGES = (
    Case("BN: one channel", "[n] c [h w]", (4, 1, 3, 2)),
    Case("BN: batch of one", "[n] c [h w]", (1, 3, 4, 4)),
    Case("BN: map of one", "[n] c [h w]", (5, 3, 1, 1)),
    Case("BN: two cells", "[n] c", (2, 3)),
    Case("BN: one column", "[n] c [h w]", (2, 3, 5, 1)),
    Case("IN: two cells", "n c [l]", (2, 3, 2)),
    Case("IN: one image, one channel", "n c [h w]", (1, 1, 3, 3)),
    Case("GN: one group", "n (g [c]) [h w]", (2, 4, 3, 2), {"g": 1}),
    Case("GN: a group per channel", "n (g [c]) [h w]", (2, 4, 3, 2), {"g": 4}),
    Case("GN: no space", "n (g [c]) [...]", (3, 8), {"g": 2}),
    Case("LN: one row", "... [c]", (1, 8)),
    Case("LN: a vector", "... [c]", (7,)),
    Case("LN: four axes in front", "... [c]", (2, 1, 3, 1, 4)),
    Case("LN2d: one position", "n [c] h w", (2, 5, 1, 1)),
    Case("RMS: one cell", "... [c]", (4, 1), center=False),
    Case("ghost: ghosts of two", "(g [n]) c", (8, 3), {"g": 4}),
)

RAGGED_CASES = (
    *(Case(f"LN: runs of {k}", "... [c]", (3, k)) for k in RAGGED if k > 1),
    *(Case(f"RMS: runs of {k}", "... [c]", (3, k), center=False) for k in RAGGED),
    *(Case(f"BN: runs of {k}", "[n] c [l]", (2, 3, k)) for k in RAGGED),
    *(Case(f"BN: {k} columns", "[n] c", (5, k)) for k in RAGGED),
    *(Case(f"GN: runs of {k}", "n (g [c]) [l]", (2, 4, k), {"g": 2}) for k in RAGGED),
    *(Case(f"LN2d: {k} columns", "n [c] l", (2, 5, k)) for k in RAGGED),
)


# Layouts: the same numbers elsewhere in memory.


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.contiguous()


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Every second element of a larger tensor that starts one element off any alignment."""
    wide = x.new_full((x.numel() * 2 + 1,), float("nan"))[1:].view(*x.shape, 2)[..., 0]
    return wide.copy_(x)


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": _channels_last, "strided": _strided}
