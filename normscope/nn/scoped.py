"""Normalizers whose novelty is their set: `Norm` with the scope fixed, under the names of the literature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.functional.normalize import Moments, moments, normalize
from normscope.nn.base import normalizes
from normscope.nn.channels import BATCH, ChannelLayer, Described, check_channels, check_positive
from normscope.nn.norm import Norm
from normscope.scope import SCOPES

__all__ = ["LayerNorm2d", "MeanOnlyBatchNorm", "PositionalNorm", "ScaleNorm"]

POSITIONAL = "n [c] ..."


class LayerNorm2d(Described, Norm):
    """Layer normalization over the channels of every position of (N, C, *), without a permutation.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = the C channels at one position of one sample.

    In place of permute → LayerNorm → permute in convolutional networks of the ConvNeXt kind: the same numbers and
    parameters, one pass. It does not depend on the batch. Not for the classical normalization of a whole layer (C, H
    and W together): that is `GroupNorm(1, C)`.

    Args:
        num_features: C.
        eps: ε.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: C = 1.

    Source: Liu et al. 2022 (ConvNeXt); Ba et al. 2016, §3.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.LayerNorm2d(8)(torch.randn(2, 8, 5, 5)).mean(1).abs().max() < 1e-5
        tensor(True)
    """

    _pattern = POSITIONAL

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        self.num_features = num_features
        super().__init__(
            self._pattern, num_features, eps=eps, affine=affine, bias=bias, activation=activation, device=device,
            dtype=dtype,
        )  # fmt: skip


class PositionalNorm(LayerNorm2d):
    """Normalization over the channels of every position, whose moments can be carried to a later layer.

    y = γ · (x − μ_S)/√(σ²_S + ε) + β, S = the C channels at one position of one sample: the set of `LayerNorm2d`. What
    the paper adds is that μ and σ hold the structure of an image: `moments` gives them, and `inject` puts them back
    after a decoder, as β and γ of the same position (the moment shortcut).

    For generators of the U-Net and encoder–decoder kind; without the shortcut the structure is lost, and
    `LayerNorm2d` with γ and β is the layer to take.

    Args:
        num_features: C.
        eps: ε.
        affine: Learn γ and β, of size C; the paper does not.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: C = 1.

    Source: Li et al. 2019 (PONO), and its moment shortcut.

    Example:
        >>> import torch, normscope as ns
        >>> norm, x = ns.nn.PositionalNorm(8), torch.randn(2, 8, 5, 5)
        >>> torch.allclose(norm.inject(norm(x), norm.moments(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype, bias=bias, activation=activation)

    def moments(self, input: Tensor) -> Moments:  # noqa: A002
        """μ and σ² of every position, (N, *)."""
        return moments(input, self.scope)

    def inject(self, input: Tensor, moments: Moments) -> Tensor:  # noqa: A002
        """The moment shortcut: σ · input + μ at every position, with σ = √(σ² + ε)."""
        mean, std = moments.mean.unsqueeze(1), (moments.var + self.eps).sqrt().unsqueeze(1)
        return (input * std + mean).to(input.dtype)


class MeanOnlyBatchNorm(Described, Norm):
    """Batch normalization that only removes the mean, the partner of weight normalization.

    y = activation(x − μ_S + β + residual), S = every cell of a channel in the batch; in evaluation the running mean.

    With `torch.nn.utils.parametrizations.weight_norm` on the layer before it, which keeps the scale of x in check at
    lower cost and with less noise than dividing by the batch's σ. Alone it controls no scale: do not put it in the
    place of `BatchNorm2d` in a network without weight normalization. The running variance is kept for the tools that
    look at it (`normscope.check`); the output does not use it.

    Args:
        num_features: C.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β, of size C.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel in training.

    Source: Salimans & Kingma 2016, §4.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.MeanOnlyBatchNorm(1)(torch.tensor([[1.0], [5.0]])).tolist()
        [[-2.0], [2.0]]
    """

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        self.num_features = num_features
        super().__init__(
            BATCH, num_features, eps=0.0, scale=False, running=True, momentum=momentum, bias=bias,
            activation=activation, device=device, dtype=dtype,
        )  # fmt: skip
        self.weight = None


class ScaleNorm(ChannelLayer):
    """One learned length for every vector: y = activation(g · x/√(‖x‖² + ε²) + residual), ‖x‖ over the last axis.

    `RMSNorm` with a single number in the place of γ: fewer parameters, and every output lies on one sphere. For
    pre-norm transformers in low-resource translation, where the paper saw gains over LayerNorm; for large language
    models RMSNorm has the evidence. The paper's code takes max(‖x‖, ε) for the root; both agree to ε²/(2‖x‖²).

    Args:
        num_features: d, the size of the last axis; g starts as √d, so that the layer starts as RMSNorm.
        eps: ε.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The last axis has another size.

    Source: Nguyen & Salazar 2019 (ScaleNorm).

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.ScaleNorm(2)(torch.tensor([3.0, 4.0])).norm().round(decimals=4)
        tensor(1.4142, grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, affine=False, bias=False, device=device, dtype=dtype)
        check_positive(eps=eps)
        self.eps = eps
        self.set_activation(activation)
        self.g = Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """G = √d."""
        torch.nn.init.constant_(self.g, math.sqrt(self.num_features))

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Scale every vector of the last axis.

        Args:
            input: (*, d).
            residual: Added before the activation.
            mask: True = keep; input's shape, or its leading axes.
        """
        check_channels(input, self.num_features, axis=-1, least=1)
        d = self.num_features
        # g · x/√(‖x‖² + ε²) = (g/√d) · x/√(mean(x²) + ε²/d): the kernels of RMSNorm.
        weight = (self.g / math.sqrt(d)).repeat(d)
        return normalize(
            input, SCOPES["RMSNorm"].pattern, weight=weight, eps=self.eps**2 / d, center=False, mask=mask,
            activation=self.activation, residual=residual,
        )  # fmt: skip
