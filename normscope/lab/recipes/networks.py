"""The networks of the full-size recipes, with every normalizer as an arm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normscope as ns
from normscope.lab.networks import ACTIVATIONS, norm_2d

__all__ = ["BNInception", "Detector", "DnCNN", "Pixels", "ResNet50"]


def _unit(a: int, b: int, kernel: int, norm: str, activation: str, stride: int = 1) -> nn.Sequential:
    """Convolution, normalizer, activation."""
    conv = nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm_2d(norm, b), ACTIVATIONS[activation]())


# Figure 5 of the paper: 1 × 1; 3 × 3 reduced, 3 × 3; double 3 × 3 reduced, double 3 × 3; the pool and its projection.
# With no 1 × 1 the module has stride 2 and hands its pooled input on. The pools of 4c and 4d are projected to 96 maps,
# with which the 576 of the figure come out.
INCEPTION: tuple[tuple[str, int, tuple[int, int], tuple[int, int], str, int], ...] = (
    ("3a", 64, (64, 64), (64, 96), "avg", 32),
    ("3b", 64, (64, 96), (64, 96), "avg", 64),
    ("3c", 0, (128, 160), (64, 96), "max", 0),
    ("4a", 224, (64, 96), (96, 128), "avg", 128),
    ("4b", 192, (96, 128), (96, 128), "avg", 128),
    ("4c", 160, (128, 160), (128, 160), "avg", 96),
    ("4d", 96, (128, 192), (160, 192), "avg", 96),
    ("4e", 0, (128, 192), (192, 256), "max", 0),
    ("5a", 352, (192, 320), (160, 224), "avg", 128),
    ("5b", 352, (192, 320), (192, 224), "max", 128),
)


class _Module(nn.Module):
    """One Inception module."""

    def __init__(
        self, inputs: int, one: int, three: tuple[int, int], double: tuple[int, int], pool: str, projection: int,
        norm: str, activation: str,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = 1 if one else 2

        def unit(a: int, b: int, kernel: int, stride: int = 1) -> nn.Sequential:
            return _unit(a, b, kernel, norm, activation, stride)

        pooling: nn.Module = nn.MaxPool2d(3, stride, 1) if pool == "max" else nn.AvgPool2d(3, stride, 1)
        branches = [
            nn.Sequential(unit(inputs, three[0], 1), unit(three[0], three[1], 3, stride)),
            nn.Sequential(
                unit(inputs, double[0], 1), unit(double[0], double[1], 3), unit(double[1], double[1], 3, stride)
            ),
            nn.Sequential(pooling, unit(inputs, projection, 1)) if projection else pooling,
        ]
        if one:
            branches.insert(0, unit(inputs, one, 1))
        self.branches = nn.ModuleList(branches)
        self.outputs = one + three[1] + double[1] + (projection or inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h, w), or half of that."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class BNInception(nn.Module):
    """The network of the Batch Normalization paper's ImageNet experiments.

    Args:
        classes: How many.
        norm: See `norm_2d`; "none" for the Inception it is compared with.
        activation: "relu" or "sigmoid".
        responses: Local response normalization around the first convolutions, which the paper takes out.
        dropout: In front of the classifier, which the paper takes out.

    Source: Ioffe & Szegedy 2015, §4.2 and Figure 5.
    """

    def __init__(
        self, classes: int, *, norm: str = "BN", activation: str = "relu", responses: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        # A separable convolution of depth multiplier 8: each colour by eight filters of its own, then mixed.
        apart = nn.Conv2d(3, 24, 7, 2, 3, groups=3, bias=False)
        layers: list[nn.Module] = [apart, _unit(24, 64, 1, norm, activation), nn.MaxPool2d(3, 2, 1)]
        layers += [_unit(64, 64, 1, norm, activation), _unit(64, 192, 3, norm, activation)]
        if responses:
            layers.insert(3, nn.LocalResponseNorm(5))
            layers.append(nn.LocalResponseNorm(5))
        layers.append(nn.MaxPool2d(3, 2, 1))
        maps = 192
        for _, one, three, double, pool, projection in INCEPTION:
            module = _Module(maps, one, three, double, pool, projection, norm, activation)
            layers.append(module)
            maps = module.outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(maps, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to class scores; h and w of 224 in the paper, at least 32."""
        scores: Tensor = self.head(self.features(x).mean((2, 3)))
        return scores


class _Bottleneck(nn.Module):
    """1 × 1, 3 × 3 with the stride, 1 × 1 to four times the width, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        outputs = 4 * width
        last = nn.Sequential(*list(_unit(width, outputs, 1, norm, "relu"))[:2])
        for weight in last[1].parameters():
            nn.init.zeros_(weight)  # γ and β: a block begins as its shortcut
        self.body = nn.Sequential(
            _unit(inputs, width, 1, norm, "relu"), _unit(width, width, 3, norm, "relu", stride), last
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*list(_unit(inputs, outputs, 1, norm, "relu", stride))[:2])
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add and rectify."""
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with the stride in the 3 × 3 convolutions.

    Args:
        classes: How many; 0 for the last maps in place of scores.
        norm: See `norm_2d`.
        width: Maps of the first convolution.

    Source: He et al. 2016, Table 1; Goyal et al. 2017, §5.1.
    """

    def __init__(self, classes: int, *, norm: str, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(3, width, 7, norm, "relu", 2), nn.MaxPool2d(3, 2, 1)]
        inputs = width
        for k, blocks in enumerate((3, 4, 6, 3)):
            for b in range(blocks):
                layers.append(_Bottleneck(inputs, width * 2**k, 2 if k and not b else 1, norm))
                inputs = 4 * width * 2**k
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes) if classes else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to class scores (n, classes)."""
        maps: Tensor = self.features(x)
        return maps if self.head is None else self.head(maps.mean((2, 3)))


class Detector(nn.Module):
    """ResNet-50 and a head that tells of every cell of 32 × 32 pixels which object it lies in, and where that ends.

    Args:
        classes: How many.
        norm: See `norm_2d`.
        width: See `ResNet50`.
    """

    def __init__(self, classes: int, *, norm: str, width: int = 64) -> None:
        super().__init__()
        self.features = ResNet50(0, norm=norm, width=width).features
        self.head = nn.Sequential(_unit(32 * width, 256, 3, norm, "relu"), nn.Conv2d(256, classes + 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) to (n, 1 + classes + 4, h/32, w/32).

        Background first, then the classes; then the logarithms of the distances to the left, top, right and bottom side
        in pictures' edges.
        """
        found: Tensor = self.head(self.features(x))
        return found


class DnCNN(nn.Module):
    """Seventeen convolutions of 64 channels that compute the noise of a grey picture.

    Args:
        norm: Of the layers between the first and the last.
        depth: How many convolutions.

    Source: Zhang et al. 2017, §III.
    """

    def __init__(self, norm: str, depth: int = 17) -> None:
        super().__init__()
        between = [_unit(64, 64, 3, norm, "relu") for _ in range(depth - 2)]
        self.layers = nn.Sequential(_unit(1, 64, 3, "none", "relu"), *between, nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, h, w), the noise taken away."""
        cleaned: Tensor = x - self.layers(x)
        return cleaned


class Pixels(nn.Module):
    """An LSTM over pixels one by one, and a linear classifier on its last state.

    Args:
        classes: How many.
        length: Of the sequences.
        norm: "none", "BN" or "LN".
        units: Of the state.

    Source: Cooijmans et al. 2016, §5.1.
    """

    def __init__(self, classes: int, length: int, *, norm: str, units: int = 100) -> None:
        super().__init__()
        if norm == "BN":
            self.lstm: nn.Module = ns.nn.BatchNormLSTM(1, units, batch_first=True, max_length=length)
        else:
            self.lstm = (ns.nn.LayerNormLSTM if norm == "LN" else nn.LSTM)(1, units, batch_first=True)
        for name, weight in self.lstm.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(weight)
        self.head = nn.Linear(units, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, T, 1) to class scores."""
        states, _ = self.lstm(x)
        scores: Tensor = self.head(states[:, -1])
        return scores
