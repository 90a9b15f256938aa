"""Drop-in instance normalization: torch's layers, with the same state, over the scope "n c [...]"."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from normscope.errors import ShapeError
from normscope.functional import instance_norm
from normscope.nn.base import Lazy, Tracking, check_input_dim, normalizes

__all__ = [
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
]


class _InstanceNorm(Tracking, torch.nn.modules.instancenorm._InstanceNorm):
    """Instance normalization for inputs of any number of axes; the subclasses check it."""

    _expects = "(N, C, *) or (C, *)"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)  # type: ignore[arg-type]
        if not bias:
            self.register_parameter("bias", None)
        self.set_activation(activation)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize every channel of every sample.

        Args:
            input: (N, C, *), or (C, *) without the batch axis.
            residual: Added before the activation.
            mask: True = keep; input's shape, or without the channels.
        """
        check_input_dim(self, input, self._expects)
        unbatched = input.dim() == self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        self._check_features(input, 0 if unbatched else 1)
        if not unbatched:
            return self._normalize(input, residual, mask)
        residual, mask = (t if t is None else t.unsqueeze(0) for t in (residual, mask))
        return self._normalize(input.unsqueeze(0), residual, mask).squeeze(0)

    def _check_features(self, input: Tensor, axis: int) -> None:  # noqa: A002
        size = input.size(axis)
        if size == self.num_features:
            return
        if self.affine:
            raise ShapeError(
                f"expected input's size at dim={axis} to match num_features ({self.num_features}), but got: {size}.",
                shape=tuple(input.shape),
                cure=f"build the layer with num_features={size}, or pass {self._expects} with C={self.num_features}",
            )
        warnings.warn(
            f"input's size at dim={axis} does not match num_features. You can silence this warning by not passing in "
            "num_features, which is not used because affine=False",
            stacklevel=4,
        )

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:  # noqa: A002
        tracks = self.training and self.track_running_stats
        output = instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.batch_weight(tracks),
            self.eps,
            activation=self.activation,
            residual=residual,
            mask=mask,
        )
        self.count_batch(tracks)
        return output


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` over (N, C, L) or (C, L), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of one channel of one sample. Unlike
    torch's, momentum=None keeps the cumulative mean, and num_batches_tracked counts.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics and normalize by them in evaluation.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, L) or (C, L), has other than C channels, or one value per channel.

    Source: Ulyanov et al. 2016.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.InstanceNorm1d(8)(torch.randn(4, 8, 9)).shape == torch.randn(4, 8, 9).shape
        True
    """

    _expects = "(N, C, L) or (C, L)"


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` over (N, C, H, W) or (C, H, W), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of one channel of one sample. Unlike
    torch's, momentum=None keeps the cumulative mean, and num_batches_tracked counts.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics and normalize by them in evaluation.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, H, W) or (C, H, W), has other than C channels, or one value per channel.

    Source: Ulyanov et al. 2016.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.InstanceNorm2d(8)(torch.randn(4, 8, 5, 5)).shape == torch.randn(4, 8, 5, 5).shape
        True
    """

    _expects = "(N, C, H, W) or (C, H, W)"


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` over (N, C, D, H, W) or (C, D, H, W), with activation, residual and masks.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of one channel of one sample. Unlike
    torch's, momentum=None keeps the cumulative mean, and num_batches_tracked counts.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics and normalize by them in evaluation.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, D, H, W) or (C, D, H, W), has other channels, or one value each.

    Source: Ulyanov et al. 2016.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.InstanceNorm3d(8)(torch.randn(4, 8, 3, 5, 5)).shape == torch.randn(4, 8, 3, 5, 5).shape
        True
    """

    _expects = "(N, C, D, H, W) or (C, D, H, W)"


class LazyInstanceNorm1d(Lazy, _InstanceNorm, torch.nn.LazyInstanceNorm1d):
    """`InstanceNorm1d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C, L) or (C, L)"
    cls_to_become = InstanceNorm1d


class LazyInstanceNorm2d(Lazy, _InstanceNorm, torch.nn.LazyInstanceNorm2d):
    """`InstanceNorm2d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C, H, W) or (C, H, W)"
    cls_to_become = InstanceNorm2d


class LazyInstanceNorm3d(Lazy, _InstanceNorm, torch.nn.LazyInstanceNorm3d):
    """`InstanceNorm3d` that learns num_features from its first input; its arguments otherwise."""

    _expects = "(N, C, D, H, W) or (C, D, H, W)"
    cls_to_become = InstanceNorm3d
