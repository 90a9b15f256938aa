"""Drop-in layer, group and root-mean-square normalization: torch's layers, with the same state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normscope.errors import ShapeError
from normscope.functional import group_norm, layer_norm, rms_norm
from normscope.functional.torch_named import check_groups
from normscope.nn.base import Layer, normalizes

__all__ = ["GroupNorm", "LayerNorm", "RMSNorm"]


class LayerNorm(Layer, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over the trailing axes, with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = the trailing axes of one sample.

    Args:
        normalized_shape: Sizes of the trailing axes.
        eps: ε.
        elementwise_affine: Learn γ and β, of normalized_shape.
        bias: Learn β; γ alone without it.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The trailing sizes of the input are not normalized_shape.

    Source: Ba et al. 2016, §3.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.LayerNorm(8, activation="gelu")(torch.randn(4, 3, 8)).shape
        torch.Size([4, 3, 8])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.set_activation(activation)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize the trailing axes.

        Args:
            input: (*, *normalized_shape).
            residual: Added before the activation.
            mask: True = keep; input's shape, or its leading axes.
        """
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            activation=self.activation, residual=residual, mask=mask,
        )  # fmt: skip


class GroupNorm(Layer, torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` over (N, C, *), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = the channels of one group of one sample.

    Args:
        num_groups: Groups that the channels are cut into; must divide num_channels.
        num_channels: C.
        eps: ε.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The groups do not divide C, or the input has other than C channels.

    Source: Wu & He 2018, the set S_i of Group Norm.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.GroupNorm(4, 8, activation="silu")(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_groups(num_groups)
        if num_channels % num_groups:
            raise ShapeError(
                f"num_channels ({num_channels}) must be divisible by num_groups ({num_groups})",
                cure=f"choose num_groups among the divisors of {num_channels}",
            )
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.set_activation(activation)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize every group of channels.

        Args:
            input: (N, C, *).
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            activation=self.activation, residual=residual, mask=mask,
        )  # fmt: skip


class RMSNorm(Layer, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` over the trailing axes, with activation, residual and masks.

    y = activation(γ · x/√(mean_S(x²) + ε) + residual), S = the trailing axes of one sample.

    Args:
        normalized_shape: Sizes of the trailing axes.
        eps: ε; None for the machine epsilon of the computation (float32's for half precision).
        elementwise_affine: Learn γ, of normalized_shape.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The trailing sizes of the input are not normalized_shape.

    Source: Zhang & Sennrich 2019.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.RMSNorm(8)(torch.full((2, 8), 3.0)).mean().round(decimals=3)
        tensor(1., grad_fn=<RoundBackward1>)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.set_activation(activation)

    @normalizes
    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize the trailing axes.

        Args:
            x: (*, *normalized_shape).
            residual: Added before the activation.
            mask: True = keep; x's shape, or its leading axes.
        """
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps, activation=self.activation, residual=residual, mask=mask
        )
