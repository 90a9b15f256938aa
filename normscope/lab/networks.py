"""The networks of the training experiments, with every normalizer as an arm.

Weights come from one generator per seed, layer by layer; normalizers start at γ = 1 and β = 0 and draw nothing. So two
arms of one seed begin with the same weights, and an arm whose normalizer is the identity stays the same bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.errors import ArgumentError

__all__ = ["ACTIVATIONS", "Convolutional", "Network", "Perceptrons", "norm_2d", "renew", "stacked_norm"]

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


def stacked_norm(name: str, seeds: int, width: int) -> nn.Module:
    """A normalizer for (seeds, n, width), each seed for itself: none, noop, BN, LN, ghostB with statistics over B."""
    if name in ("none", "noop"):
        return nn.Identity()
    if name == "BN":
        return ns.nn.Norm("s [n] c", (seeds, width), params="s c", running=True)
    if name == "LN":
        return ns.nn.Norm("s n [c]", (seeds, width), params="s c")
    if name.startswith("ghost"):
        return _Parts(ns.nn.Norm("s [n] c", (seeds, width), params="s c", running=True), int(name[5:]), 1)
    raise ArgumentError(f"there is no normalizer {name!r} for stacked networks")


class _Parts(nn.Module):
    """In training a normalizer sees parts of some samples, one after the other; in evaluation the whole batch."""

    def __init__(self, norm: nn.Module, size: int, axis: int) -> None:
        super().__init__()
        self.norm, self.size, self.axis = norm, size, axis

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; samples lie along the axis."""
        if not self.training:
            y: Tensor = self.norm(x)
            return y
        return torch.cat([self.norm(part) for part in torch.split(x, self.size, self.axis)], self.axis)


def norm_2d(name: str, channels: int) -> nn.Module:
    """A normalizer for (n, c, h, w): those above, GN, IN, Sync, Online, groupsG, BRNB (Batch Renormalization)."""
    if name in ("none", "noop"):
        return nn.Identity()
    if name == "BN":
        return ns.nn.BatchNorm2d(channels)
    if name == "LN":
        return ns.nn.GroupNorm(1, channels)
    if name == "GN":
        return ns.nn.GroupNorm(4, channels)
    if name.startswith("groups"):
        return ns.nn.GroupNorm(int(name[6:]), channels)
    if name == "IN":
        return ns.nn.InstanceNorm2d(channels, affine=True)
    if name == "Sync":
        return ns.nn.SyncBatchNorm(channels)
    if name == "Online":
        return ns.nn.OnlineNorm(channels)
    if name.startswith("BRN"):
        # A tenth of the published schedule, which counts parts: 16 are made of a batch of 32 with 2 in each.
        return _Parts(ns.nn.BatchRenorm(channels, schedule=(500, 4000, 2500)), int(name[3:]), 0)
    if name.startswith("ghost"):
        return ns.nn.GhostBatchNorm(channels, int(name[5:]))
    raise ArgumentError(f"there is no normalizer {name!r} for images")


class _Linears(nn.Module):
    """One linear map per seed: (s, n, a) to (s, n, b)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(len(weight), 1, weight.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        """Map."""
        return torch.baddbmm(self.bias, x, self.weight)


class Perceptrons(nn.Module):
    """Multilayer perceptrons of several seeds, trained at once and independent of each other.

    Args:
        widths: From the input to the classes.
        seeds: One network each.
        norm: See `stacked_norm`.
        activation: Of the hidden layers.
        place: The normalizer "before" or "after" the activation, or at "both" places.
        deviation: Of the initial weights; 0 for gain/√(inputs), the gain being √2 for ReLU and 1 otherwise.
        scale: What the initial weights of the hidden layers are multiplied by.
    """

    def __init__(
        self, widths: Sequence[int], seeds: Sequence[int], *, norm: str, activation: str, place: str = "before",
        deviation: float = 0.0, scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if place not in ("before", "after", "both"):
            raise ArgumentError(f"the normalizer stands before, after or both, not {place!r}")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        gain = math.sqrt(2) if activation == "relu" else 1.0
        maps = [
            _Linears(
                torch.stack([(deviation or gain / math.sqrt(a)) * torch.randn(a, b, generator=g) for g in generators])
            )
            for a, b in itertools.pairwise(widths)
        ]
        with torch.no_grad():
            for linear in maps[:-1]:
                linear.weight.mul_(scale)
        self.trunk = nn.ModuleList()
        for linear, width in zip(maps[:-1], widths[1:-1], strict=True):
            before = stacked_norm(norm if place != "after" else "none", len(seeds), width)
            after = stacked_norm(norm if place != "before" else "none", len(seeds), width)
            self.trunk.append(nn.Sequential(linear, before, ACTIVATIONS[activation](), after))
        self.head = maps[-1]

    def hidden(self, x: Tensor) -> list[Tensor]:
        """What the activation of every hidden layer receives, (s, n, width) each."""
        found = []
        for block in self.trunk:
            received = block[1](block[0](x))  # type: ignore[index]
            found.append(received)
            x = block[3](block[2](received))  # type: ignore[index]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(s, n, inputs) to class scores (s, n, classes)."""
        for block in self.trunk:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


class Convolutional(nn.Module):
    """Four convolutions of 16, 32, 32 and 64 channels, two of stride 2, the mean over the image, a linear classifier.

    Args:
        channels: Of the images.
        classes: How many.
        seed: Of the weights.
        norm: See `norm_2d`.
        activation: After each convolution.
        place: The normalizer before or after the activation.
        residual: Add a convolution's input where its shape allows.
    """

    WIDTHS, STRIDES = (16, 32, 32, 64), (1, 2, 1, 2)

    def __init__(
        self, channels: int, classes: int, seed: int, *, norm: str, activation: str = "relu", place: str = "before",
        residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        gain = 2.0 if activation == "relu" else 1.0
        self.residual = residual
        self.blocks = nn.ModuleList()
        for width, stride in zip(self.WIDTHS, self.STRIDES, strict=True):
            conv = nn.Conv2d(channels, width, 3, stride, 1, device="meta").to_empty(device="cpu")
            _draw(conv, math.sqrt(gain / (9 * channels)), generator)
            before = norm_2d(norm if place == "before" else "none", width)
            after = norm_2d(norm if place == "after" else "none", width)
            self.blocks.append(nn.Sequential(conv, before, ACTIVATIONS[activation](), after))
            channels = width
        self.head = nn.Linear(channels, classes, device="meta").to_empty(device="cpu")
        _draw(self.head, channels**-0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to class scores (n, classes)."""
        for block in self.blocks:
            y = block(x)
            x = x + y if self.residual and x.shape == y.shape else y
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@torch.no_grad()
def _draw(layer: nn.Conv2d | nn.Linear, deviation: float, generator: torch.Generator) -> None:
    layer.weight.normal_(0, deviation, generator=generator)
    if layer.bias is not None:
        layer.bias.zero_()


Network = Perceptrons | Convolutional


def renew(network: Network, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put `make(normalizer)` in place of every normalizer in front of an activation."""
    for block in network.trunk if isinstance(network, Perceptrons) else network.blocks:
        block[1] = make(block[1])  # type: ignore[index, operator]
