"""The architectures that are measured, in plain torch: as published, to the last parameter, with nothing to install.

Normalizers and activations are modules, as in torchvision and timm, so that both can be left out. Images of any size
that is a multiple of 32 go in, scores of 1000 classes come out; the U-Net gives 21 maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "convnext",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "unet",
    "vision_transformer",
]

CLASSES = 1000


def _convolved(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> Iterator[nn.Module]:
    """Convolution, BatchNorm, activation in place."""
    yield nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    yield nn.BatchNorm2d(outputs)
    if act is not None:
        yield act(inplace=True)


def _head(width: int, dropout: float = 0.0) -> Iterator[nn.Module]:
    yield nn.AdaptiveAvgPool2d(1)
    yield nn.Flatten()
    if dropout:
        yield nn.Dropout(dropout)
    yield nn.Linear(width, CLASSES)


# --- ResNet (He et al. 2015), and a U-Net on it -------------------------------------------------------------------


class _Residual(nn.Module):
    """Two 3×3 convolutions, or one between two of 1×1, and the input added before the last ReLU."""

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [
                *_convolved(inputs, width, 1), *_convolved(width, width, 3, stride),
                *_convolved(width, outputs, 1, act=None),
            ]  # fmt: skip
        else:
            layers = [*_convolved(inputs, width, 3, stride), *_convolved(width, width, act=None)]
        self.body = nn.Sequential(*layers)
        same = (inputs, stride) == (outputs, 1)
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolved(inputs, outputs, 1, stride, act=None))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def _resnet(depths: Sequence[int], *, bottleneck: bool) -> Iterator[nn.Module]:
    """The stem and the four stages."""
    yield nn.Sequential(*_convolved(3, 64, 7, 2))
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        blocks: list[nn.Module] = [] if stage else [nn.MaxPool2d(3, 2, 1)]
        for k in range(depth):
            blocks.append(_Residual(inputs, width, 2 if stage and not k else 1, bottleneck=bottleneck))
            inputs = 4 * width if bottleneck else width
        yield nn.Sequential(*blocks)


def resnet18() -> nn.Module:
    """11,689,512 parameters."""
    return nn.Sequential(*_resnet((2, 2, 2, 2), bottleneck=False), *_head(512))


def resnet50() -> nn.Module:
    """25,557,032 parameters."""
    return nn.Sequential(*_resnet((3, 4, 6, 3), bottleneck=True), *_head(2048))


class _UNet(nn.Module):
    """Upsample, join, convolve twice, four times."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.encoder = nn.ModuleList(_resnet((2, 2, 2, 2), bottleneck=False))
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.decoder = nn.ModuleList(
            nn.Sequential(*_convolved(deep + skip, skip), *_convolved(skip, skip)) for deep, skip in pairs
        )
        self.head = nn.Conv2d(widths[0], 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
        for block, skip in zip(self.decoder, maps[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1))
        y: Tensor = self.head(x)
        return y


def unet() -> nn.Module:
    """A U-Net (Ronneberger et al. 2015) on the stages of ResNet-18."""
    return _UNet()


# --- MobileNetV2 (Sandler et al. 2018) and EfficientNet (Tan and Le 2019) ---------------------------------------------


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, squeezed, 1), nn.SiLU(inplace=True),
            nn.Conv2d(squeezed, width, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.scale(x)
        return y


class _Inverted(nn.Module):
    """Expand, convolve each channel by itself, project; the input is added where the shapes allow it."""

    def __init__(
        self, inputs: int, outputs: int, expand: int, kernel: int, stride: int, act: type[nn.Module], *, excite: bool
    ) -> None:
        super().__init__()
        wide = expand * inputs
        self.body = nn.Sequential(
            *(_convolved(inputs, wide, 1, act=act) if expand > 1 else ()),
            *_convolved(wide, wide, kernel, stride, wide, act),
            *((_SqueezeExcite(wide, inputs // 4),) if excite else ()),
            *_convolved(wide, outputs, 1, act=None),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def _inverted(
    rows: Sequence[tuple[int, int, int, int, int]], last: int, act: type[nn.Module], *, excite: bool
) -> nn.Module:
    """From the rows of a table: expansion, outputs, blocks, kernel, stride of the first block."""
    layers = [*_convolved(3, 32, 3, 2, act=act)]
    inputs = 32
    for expand, outputs, blocks, kernel, stride in rows:
        for k in range(blocks):
            layers.append(_Inverted(inputs, outputs, expand, kernel, 1 if k else stride, act, excite=excite))
            inputs = outputs
    return nn.Sequential(*layers, *_convolved(inputs, last, 1, act=act), *_head(last, 0.2))


def mobilenet_v2() -> nn.Module:
    """3,504,872 parameters."""
    rows = (
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 32, 3, 3, 2), (6, 64, 4, 3, 2), (6, 96, 3, 3, 1), (6, 160, 3, 3, 2),
        (6, 320, 1, 3, 1),
    )  # fmt: skip
    return _inverted(rows, 1280, nn.ReLU6, excite=False)


def efficientnet_b0() -> nn.Module:
    """5,288,548 parameters."""
    rows = (
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    )  # fmt: skip
    return _inverted(rows, 1280, nn.SiLU, excite=True)


# --- DenseNet (Huang et al. 2016) -------------------------------------------------------------------------------------


def _activated(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(width), nn.ReLU(inplace=True)


class _Dense(nn.Module):
    """Layers whose output is put beside their input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121() -> nn.Module:
    """7,978,856 parameters."""
    growth, width = 32, 64
    layers: list[nn.Module] = [*_convolved(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            narrow = nn.Conv2d(width, width // 2, 1, bias=False)
            layers += [*_activated(width), narrow, nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            middle = 4 * growth
            first, second = nn.Conv2d(width, middle, 1, bias=False), nn.Conv2d(middle, growth, 3, padding=1, bias=False)
            layers.append(_Dense(*_activated(width), first, *_activated(middle), second))
            width += growth
    return nn.Sequential(*layers, *_activated(width), *_head(width))


# --- ConvNeXt (Liu et al. 2022) ---------------------------------------------------------------------------------------


class _ChannelsFirst(nn.Module):
    """LayerNorm over the channels of maps, through permuted views."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(self.spread(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


def convnext(depths: Sequence[int], widths: Sequence[int]) -> nn.Module:
    """28,589,128 parameters with depths 3, 3, 9, 3 and widths 96, 192, 384, 768 (tiny)."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ChannelsFirst(widths[0])]
    for k, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if k:
            layers += [_ChannelsFirst(widths[k - 1]), nn.Conv2d(widths[k - 1], width, 2, 2)]
        layers += [_ConvNeXtBlock(width) for _ in range(depth)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], CLASSES)
    return nn.Sequential(*layers, *head)


# --- Vision Transformer (Dosovitskiy et al. 2020) ---------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        return x + y


class _VisionTransformer(nn.Module):
    def __init__(self, side: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(0.02 * torch.randn(1, (side // 16) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.place
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


def vision_transformer(side: int, width: int, depth: int, heads: int) -> nn.Module:
    """5,717,416 parameters for images of 224² with width 192, depth 12 and 3 heads (tiny)."""
    return _VisionTransformer(side, width, depth, heads)
