"""Normalizers that divide without centring, and those that are one with their activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.errors import ShapeError
from normscope.functional.core import check_dtype, run, view_of
from normscope.functional.normalize import moments, normalize
from normscope.functional.torch_named import check_groups
from normscope.kernels.formula import Formula
from normscope.nn.base import normalizes
from normscope.nn.channels import (
    BATCH,
    INSTANCE,
    Batch,
    BatchEstimator,
    ChannelLayer,
    Described,
    activated,
    check_channels,
    check_positive,
    spread,
    widened,
)
from normscope.scope import SCOPES

__all__ = ["DynamicTanh", "EvoNormB0", "EvoNormS0", "FilterResponseNorm", "GlobalResponseNorm"]


class FilterResponseNorm(ChannelLayer):
    """Filter response normalization with its thresholded linear unit: neither the batch nor a mean.

    y = max(γ · x/√(ν² + |ε|) + β, τ), ν² = the mean of x² over the positions of one channel of one sample.

    For convolutional networks at any batch size, in the place of BatchNorm *and* ReLU: without a mean the
    activations may drift from zero, which the learned τ corrects, so that a plain ReLU behind it loses accuracy. The
    paper needs a slow start of the learning rate. Where a channel has one position (fully connected, 1×1 maps) it is
    sign(x) unless ε is learned.

    Args:
        num_features: C.
        eps: ε.
        learn_eps: Learn ε = eps + |ε_l|, one per channel, ε_l starting at 1e-4; for layers with few positions.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: "tlu" for the learned threshold τ; or as in `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        ArgumentError: ε is not positive, or the activation unknown.

    Source: Singh & Krishnan 2020, §3.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.FilterResponseNorm(4)(torch.randn(2, 4, 8, 8)).min() >= 0  # τ starts at 0
        tensor(True)
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        learn_eps: bool = False,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = "tlu",
    ) -> None:
        super().__init__(num_features, affine=affine, bias=bias, device=device, dtype=dtype)
        check_positive(eps=eps)
        self.eps, self.learn_eps = eps, learn_eps
        self.set_activation(activation)
        empty = torch.empty(num_features, device=device, dtype=dtype)
        self.eps_l = Parameter(empty) if learn_eps else None
        self.tau = Parameter(torch.empty_like(empty)) if activation == "tlu" else None
        self.reset_parameters()

    def set_activation(self, activation: str | None) -> None:
        """Choose "tlu" or an activation of the table."""
        super().set_activation(None if activation == "tlu" else activation)
        self.activation = activation

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, τ = 0, ε_l = 1e-4."""
        super().reset_parameters()
        if self.tau is not None:
            torch.nn.init.zeros_(self.tau)
        if self.eps_l is not None:
            torch.nn.init.constant_(self.eps_l, 1e-4)

    @normalizes
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize every channel of every sample.

        Args:
            input: (N, C, *).
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        check_channels(input, self.num_features)
        given = None
        if self.eps_l is not None:
            mean, var, _ = moments(input, INSTANCE, center=False, mask=mask)
            given = mean, var + self.eps_l.abs().to(var.dtype)
        y = normalize(
            input, INSTANCE, weight=self.weight, bias=self.bias, eps=self.eps, center=False, mask=mask, moments=given,
            activation=None if self.activation == "tlu" else self.activation,
        )  # fmt: skip
        if self.tau is None:
            return y
        y = torch.maximum(widened(y), spread(self.tau, y)).to(y.dtype)
        return y if mask is None else _kept(y, mask)


class GlobalResponseNorm(ChannelLayer):
    """Contrast between channels: y = γ · (x · n) + β + x, n = ‖x_c‖/mean_c ‖x_c‖, norms over the positions of a sample.

    Made for ConvNeXt V2, after the activation inside the block, where channels otherwise collapse into copies in
    masked pre-training. γ and β start at 0, the layer as the identity. It is no replacement for a layer that controls
    scale: the block keeps its LayerNorm.

    Args:
        num_features: C.
        eps: ε, added to the mean of the norms.
        channels_last: The input is (N, *, C), as inside ConvNeXt blocks; else (N, C, *).
        device: As in torch.
        dtype: As in torch.

    Raises:
        ShapeError: The input has other than C channels.

    Source: Woo et al. 2023 (ConvNeXt V2); the mean in the place of its eq. 2's sum is that equation's footnote, and the
    published code's.

    Example:
        >>> import torch, normscope as ns
        >>> x = torch.randn(2, 5, 5, 8)
        >>> torch.equal(ns.nn.GlobalResponseNorm(8)(x), x)
        True
    """

    def __init__(
        self, num_features: int, eps: float = 1e-6, channels_last: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(num_features, affine=True, bias=True, device=device, dtype=dtype)
        check_positive(eps=eps)
        self.eps, self.channels_last = eps, channels_last
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 0, β = 0."""
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    @normalizes
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Weigh the channels of every sample against each other.

        Args:
            input: (N, *, C), or (N, C, *) with channels_last=False.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        last = self.channels_last
        check_channels(input, self.num_features, axis=-1 if last else 1)
        view = view_of(input, "n [...] c" if last else INSTANCE, {}, "c")
        keep = view.mask(mask, view.params)
        x = widened(input)
        x = x if keep is None else torch.where(keep, x, 0)
        # vector_norm has the subgradient 0 where a channel is 0 everywhere; the root of a mean square has NaN.
        inside = view.scope.inside
        norm = torch.linalg.vector_norm(x, dim=inside, keepdim=True) if inside else x.abs()
        n = norm / (norm.mean(view.params, keepdim=True) + self.eps)
        weight, bias = (view.param(widened_to(t, x)) for t in (self.weight, self.bias) if t is not None)
        return activated(weight * (x * n) + bias + x, None, keep, input)


class DynamicTanh(Described):
    """No statistics at all: y = γ · tanh(α · x) + β.

    In the place of LayerNorm or RMSNorm in transformers, where the paper matches them after tuning α (for language
    models α₀ depends on width and place; the paper's appendix has the table). It does not correct a scale that grows
    during training, and is no replacement for BatchNorm in classical ConvNets, where the paper reports a clear loss.

    Args:
        normalized_shape: The size of the channels axis, or the sizes of the trailing axes.
        channels_last: γ and β run over the trailing axes; else over axis 1, and normalized_shape is one size.
        alpha_init_value: α₀.
        device: As in torch.
        dtype: As in torch.

    Raises:
        ShapeError: The input has other sizes there.

    Source: Zhu et al. 2025, §4.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.DynamicTanh(3)(torch.tensor([-100.0, 0.0, 100.0]))
        tensor([-1.,  0.,  1.], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        channels_last: bool = True,
        alpha_init_value: float = 0.5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not channels_last and len(sizes) != 1:
            raise ShapeError(
                f"channels first, normalized_shape has one size, not {len(sizes)}", cure="pass the number of channels"
            )
        self.normalized_shape = sizes
        self.channels_last, self.alpha_init_value = channels_last, alpha_init_value
        self.alpha = Parameter(torch.empty(1, device=device, dtype=dtype))
        self.weight = Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self.bias = Parameter(torch.empty(sizes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """α = α₀, γ = 1, β = 0."""
        torch.nn.init.constant_(self.alpha, self.alpha_init_value)
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    @normalizes
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Squash every cell.

        Args:
            input: (*, *normalized_shape), or (N, C, *) with channels_last=False.
        """
        if self.channels_last and input.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise ShapeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size{list(input.shape)}",
                cure="the trailing sizes of the input must equal normalized_shape",
            )
        if not self.channels_last:
            check_channels(input, self.normalized_shape[0])
        check_dtype(input, "normalize")
        x = widened(input)
        weight, bias = (widened_to(t, x) if self.channels_last else spread(t, x) for t in (self.weight, self.bias))
        return (weight * torch.tanh(widened_to(self.alpha, x) * x) + bias).to(input.dtype)


class EvoNormS0(ChannelLayer):
    """Evolved normalization and activation in one, by the sample: y = γ · x · sigmoid(v · x)/√(σ²_S + ε) + β.

    S = the channels of one group of one sample, as in `GroupNorm`; v is learned per channel. In the place of
    GroupNorm → SiLU in convolutional networks; found by search on image classification, and reported to keep its
    accuracy down to one image per device. Do not add an activation behind it.

    Args:
        num_features: C.
        groups: Groups that the channels are cut into; must divide C.
        eps: ε.
        device: As in torch.
        dtype: As in torch.

    Raises:
        ShapeError: The input is not (N, C, *), or the groups do not divide C.

    Source: Liu et al. 2020, EvoNorm-S0.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.EvoNormS0(8, groups=4)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, num_features: int, groups: int = 32, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(num_features, affine=True, bias=True, device=device, dtype=dtype)
        check_groups(groups)
        check_positive(eps=eps)
        if num_features % groups:
            raise ShapeError(
                f"num_channels ({num_features}) must be divisible by num_groups ({groups})",
                cure=f"choose groups among the divisors of {num_features}",
            )
        self.groups, self.eps = groups, eps
        self.v = Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, v = 1."""
        super().reset_parameters()
        torch.nn.init.ones_(self.v)

    @normalizes
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize and activate.

        Args:
            input: (N, C, *).
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        check_channels(input, self.num_features)
        view = view_of(input, SCOPES["GroupNorm"].pattern, {"g": self.groups}, "c")
        keep = view.mask(mask, (1,))
        var = view.outside(moments(input, SCOPES["GroupNorm"].pattern, mask=mask, g=self.groups).var)
        x = widened(input)
        if mask is not None:
            x = _kept(x, mask)
        swish = x * torch.sigmoid(spread(self.v, x) * x)
        formula = Formula(view.scope.inside, self.eps, center=False)
        y, _, _ = run(
            swish, view, formula, weight=self.weight, bias=self.bias, mean=torch.zeros_like(var), var=var, mask=keep
        )
        return y.to(input.dtype)


class EvoNormB0(BatchEstimator):
    """Evolved normalization and activation in one, by batch and sample.

    y = γ · x/max(√(σ²_B + ε), v·x + √(σ²_I + ε)) + β; σ²_B is the variance of a channel in the batch (in evaluation the
    running one), σ²_I that of a channel of one sample; v is learned per channel.

    In the place of BatchNorm → ReLU in convolutional networks with batches that are large enough for BatchNorm, too; at
    small batches `EvoNormS0`. Do not add an activation behind it. The running mean is kept for the tools that look at
    it (`normscope.check`); the output does not use it.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        device: As in torch.
        dtype: As in torch.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel in training.

    Source: Liu et al. 2020, EvoNorm-B0.

    Example:
        >>> import torch, normscope as ns
        >>> ns.nn.EvoNormB0(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        check_positive(eps=eps)
        self.v = Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, v = 1, running mean 0 and variance 1."""
        super().reset_parameters()
        if hasattr(self, "v"):  # torch's constructor calls this before there is one
            torch.nn.init.ones_(self.v)

    @normalizes
    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:  # type: ignore[override] # noqa: A002
        """Normalize and activate.

        Args:
            input: (N, C, *).
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        return self.estimate(self.batch(input, None, mask))

    def by_batch(self, batch: Batch) -> Tensor:
        """By the variance of the batch."""
        # Not merged from the samples': their means are single float32 numbers, too few digits at 8000 σ.
        mean, var, _ = moments(batch.x, BATCH, mask=batch.mask)
        self.track(batch, mean.detach(), var.detach())
        return self._evolved(batch, moments(batch.x, INSTANCE, mask=batch.mask).var, var)

    def by_running(self, batch: Batch) -> Tensor:
        """By the running variance."""
        assert self.running_var is not None  # noqa: S101 - estimate() has asked
        return self._evolved(batch, moments(batch.x, INSTANCE, mask=batch.mask).var, self.running_var)

    def _evolved(self, batch: Batch, own: Tensor, var: Tensor) -> Tensor:
        x = widened(batch.x)
        x = x if batch.mask is None else torch.where(batch.mask, x, 0)
        by_batch, by_sample = ((spread(t, x) + self.eps).sqrt() for t in (var, own))
        y = x / torch.maximum(by_batch, spread(self.v, x) * x + by_sample)
        weight, bias = (spread(t, x) for t in (self.weight, self.bias))
        return activated(weight * y + bias, None, batch.mask, batch.x)


def widened_to(t: Tensor, x: Tensor) -> Tensor:
    """A parameter in x's dtype."""
    return t.to(x.dtype)


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask if mask.dim() == x.dim() else mask.unsqueeze(1), x, 0)
