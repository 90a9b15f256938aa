"""Drop-in batch normalization: torch's layers, with the same state, over the scope "[n] c [...]"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normscope.functional import batch_norm
from normscope.nn.base import Lazy, Tracking, check_input_dim, normalizes

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]


class _BatchNorm(Tracking, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization for inputs of any number of axes; the subclasses check it."""

    _expects = "(N, C) or (N, C, *)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.set_activation(activation)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize by the batch when training or without running statistics, else by the running statistics.

        Args:
            input: (N, C) or (N, C, *).
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        check_input_dim(self, input, self._expects)
        tracks = self.training and self.track_running_stats
        has_running = self.running_mean is not None or self.running_var is not None
        use_running = tracks or not self.training
        output = batch_norm(
            input,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            self.training or not has_running,
            self.batch_weight(tracks),
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
        )
        self.count_batch(tracks)
        return output


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over (N, C) or (N, C, L), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of a channel in the batch; in evaluation
    the running estimates of μ and σ² (unbiased) take their place.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C) or (N, C, L), has other than C channels, or one value per channel.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.BatchNorm1d(8, activation="relu")
        >>> layer(torch.randn(20, 8)).min().item()
        0.0
    """

    _expects = "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over (N, C, H, W), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of a channel in the batch; in evaluation
    the running estimates of μ and σ² (unbiased) take their place.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, H, W), has other than C channels, or one value per channel.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.BatchNorm2d(8, activation="relu")
        >>> layer(torch.randn(20, 8, 5, 5)).min().item()
        0.0
    """

    _expects = "(N, C, H, W)"


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over (N, C, D, H, W), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of a channel in the batch; in evaluation
    the running estimates of μ and σ² (unbiased) take their place.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, D, H, W), has other than C channels, or one value per channel.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.BatchNorm3d(8, activation="relu")
        >>> layer(torch.randn(20, 8, 3, 5, 5)).min().item()
        0.0
    """

    _expects = "(N, C, D, H, W)"


class LazyBatchNorm1d(Lazy, _BatchNorm, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C) or (N, C, L)"
    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(Lazy, _BatchNorm, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C, H, W)"
    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(Lazy, _BatchNorm, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C, D, H, W)"
    cls_to_become = BatchNorm3d
