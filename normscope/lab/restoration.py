"""Pictures to restore, networks that do it, and how well they did: for super-resolution and denoising."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope import data
from normscope.lab.networks import norm_2d
from normscope.lab.samples import available

__all__ = ["TITLES", "Restorer", "Scenes", "available_scenes", "contrast_error", "halved", "patches", "psnr", "scenes"]

CROP = 96
# What a verdict calls the pictures, which need not be on the machine that judges.
TITLES = {"pictures": "BSD68 to train, Set12 to test", "textures": "procedural textures"}


@dataclass(frozen=True, eq=False)
class Scenes:
    """Grey pictures, pixels 0 to 1: some to cut training patches from, others (n, 1, 96, 96) to report on."""

    train: tuple[Tensor, ...]
    valid: Tensor
    test: Tensor


@lru_cache(maxsize=2)
def scenes(name: str) -> Scenes:
    """For "pictures": 60 of BSD68 to train, 8 to choose by, the 11 of Set12 to report on; "textures": procedural ones.

    Textures are sums of random waves and edges: of them everything may be published.
    """
    if name == "pictures":
        berkeley = [torch.tensor(p.pixels).float() / 255 for p in data.load_pictures("BSD68")]
        twelve = [torch.tensor(p.pixels).float() / 255 for p in data.load_pictures("Set12")]
        crops = torch.stack([_middle(p) for p in berkeley[60:]]), torch.stack([_middle(p) for p in twelve])
        return Scenes(tuple(berkeley[:60]), crops[0][:, None], crops[1][:, None])
    drawn = [_texture(seed) for seed in range(40)]
    crops = torch.stack([_middle(p) for p in drawn[24:32]]), torch.stack([_middle(p) for p in drawn[32:]])
    return Scenes(tuple(drawn[:24]), crops[0][:, None], crops[1][:, None])


def available_scenes() -> str:
    """The pictures where the user's folder holds them, else textures."""
    return available("pictures", "restoration/BSD68", "restoration/Set12", instead="textures")


def _texture(seed: int, size: int = 160) -> Tensor:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    total = np.zeros((size, size))
    for _ in range(12):
        turn, rate, phase = rng.uniform(0, math.pi), 2 ** rng.uniform(1, 6), rng.uniform(0, 2 * math.pi)
        wave = np.sin(2 * math.pi * rate * (math.cos(turn) * x + math.sin(turn) * y) + phase)
        total += (np.sign(wave) if rng.random() < 0.5 else wave) / rate**0.5
    total = (total - total.min()) / (total.max() - total.min())
    level, contrast = rng.uniform(0.3, 0.7), rng.uniform(0.2, 1.0)  # pictures differ in brightness and contrast
    return torch.tensor(np.clip(level + contrast * (total - 0.5), 0, 1)).float()


def _middle(picture: Tensor) -> Tensor:
    top, left = ((n - CROP) // 2 for n in picture.shape)
    return picture[top : top + CROP, left : left + CROP]


def patches(pictures: Sequence[Tensor], count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of patches (count, 1, size, size), each of a random picture, flipped at random."""
    g = torch.Generator().manual_seed(seed)
    while True:
        batch = []
        for which in torch.randint(len(pictures), (count,), generator=g).tolist():
            picture = pictures[which]
            top, left = (int(torch.randint(n - size + 1, (1,), generator=g)) for n in picture.shape)
            patch = picture[top : top + size, left : left + size]
            batch.append(patch.flip(1) if int(torch.randint(2, (1,), generator=g)) else patch)
        yield torch.stack(batch)[:, None]


def halved(x: Tensor) -> Tensor:
    """Half the resolution, by means over 2 × 2."""
    return F.avg_pool2d(x, 2)


class Restorer(nn.Module):
    """Residual blocks between two convolutions, and the input added at the end.

    Args:
        norm: See `norm_2d`.
        seed: Of the weights.
        blocks: How many, of two convolutions each.
        channels: Of every layer.
        upscale: The network doubles the resolution; the enlarged input is added.
        residual: The network computes what is to be added to its input; without it, the result itself.
    """

    def __init__(
        self, norm: str, seed: int, *, blocks: int, channels: int = 16, upscale: bool = False, residual: bool = True
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.upscale, self.residual = upscale, residual
        self.first = _conv(1, channels, generator)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _conv(channels, channels, generator), norm_2d(norm, channels), nn.ReLU(),
                _conv(channels, channels, generator), norm_2d(norm, channels),
            )
            for _ in range(blocks)
        )  # fmt: skip
        # Small at the end: a network begins near the enlarged or noisy input.
        self.last = _conv(channels, 4 if upscale else 1, generator, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, h, w) to (n, 1, h, w), or twice as large."""
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        y: Tensor = self.last(h)
        if self.upscale:
            return F.pixel_shuffle(y, 2) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return x + y if self.residual else y


def _conv(a: int, b: int, generator: torch.Generator, gain: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(a, b, 3, padding=1, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        conv.weight.normal_(0, gain * math.sqrt(1 / (9 * a)), generator=generator)
        if conv.bias is not None:
            conv.bias.zero_()
    return conv


def psnr(found: Tensor, target: Tensor) -> list[float]:
    """Of every picture, in dB; 0 where it is not finite."""
    error = (found.clamp(0, 1) - target).square().mean((1, 2, 3)).clamp(min=1e-10)
    values: list[float] = (-10 * error.log10()).nan_to_num(nan=0.0).tolist()
    return values


def contrast_error(found: Tensor, target: Tensor) -> list[float]:
    """|ln(standard deviation / that of the target)| of every picture."""
    ratio = found.std((1, 2, 3)).clamp(min=1e-6) / target.std((1, 2, 3))
    errors: list[float] = ratio.log().abs().nan_to_num(nan=10.0).tolist()
    return errors
