"""Normalizers that are told something: a domain, a class, a style, a map of labels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, Conv2d, Conv3d, Module, ModuleList, Parameter

from normscope.errors import ArgumentError, ShapeError
from normscope.functional.core import check_degenerate, run, view_of
from normscope.functional.normalize import moments
from normscope.kernels.formula import Formula
from normscope.nn.base import normalizes
from normscope.nn.channels import BATCH, INSTANCE, BatchEstimator, Described, check_channels, check_positive

__all__ = ["SPADE", "AdaIN", "ConditionalBatchNorm", "SplitBatchNorm"]


class SplitBatchNorm(Described):
    """Batch normalization with separate statistics for every domain, or for every place where it is called.

    y as in `BatchNorm2d` of the domain that the input belongs to. Each domain is a normalizer of its own in `domains`,
    so that `ns.freeze`, `ns.recalibrate` and `ns.check` see them one by one.

    For data from several sources whose statistics differ (domains, clean and adversarial images, real and generated
    batches of a discriminator), which one running mean would average to none of them; for a module that is called at
    several places. Useless where the domain is unknown at inference.

    Args:
        num_features: C.
        num_domains: How many.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C, per domain.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        share_affine: Learn one γ and β for all domains.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Attributes:
        domain: The domain of inputs that come without one; set it before the forward of a model that cannot pass it on.

    Raises:
        ShapeError: The input is not (N, C, *), or the domains are not one per sample.
        ArgumentError: There is no such domain.

    Source: Chang et al. 2019 (domain-specific BN); Xie et al. 2020 (AdvProp); Li et al. 2017 (AdaBN).

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.SplitBatchNorm(8, num_domains=2)
        >>> _ = layer(torch.randn(4, 8) + 5, domain=1)
        >>> layer.domains[0].running_mean.sum(), layer.domains[1].num_batches_tracked
        (tensor(0.), tensor(1))
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        share_affine: bool = False,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_domains=num_domains)
        self.num_features, self.num_domains, self.share_affine = num_features, num_domains, share_affine
        self.domain = 0
        self.set_activation(activation)
        self.domains = ModuleList(
            BatchEstimator(
                num_features,
                eps,
                momentum,
                affine,
                track_running_stats,
                device,
                dtype,
                bias=bias,
                activation=activation,
            )
            for _ in range(num_domains)
        )
        if share_affine:
            first = self.domains[0]
            for other in self.domains[1:]:
                other.weight, other.bias = first.weight, first.bias

    @normalizes
    def forward(
        self,
        input: Tensor,  # noqa: A002
        domain: int | Tensor | None = None,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize by the domain's statistics.

        Args:
            input: (N, C, *).
            domain: Of the batch, or int64 (N,), one per sample: then the samples of each domain are normalized, and
                counted, together; None for the attribute.
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        domain = self.domain if domain is None else domain
        if isinstance(domain, Tensor) and domain.dim():
            return self._mixed(input, domain, residual, mask)
        index = int(domain)
        if not 0 <= index < self.num_domains:
            raise ArgumentError(
                f"domain {index} is not one of the {self.num_domains}", cure=f"pass 0 to {self.num_domains - 1}"
            )
        output: Tensor = self.domains[index](input, residual, mask)
        return output

    def _mixed(self, input: Tensor, domain: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:  # noqa: A002
        """Masked cells come out 0, so that the domains' outputs add up."""
        check_channels(input, self.num_features)
        if domain.shape != input.shape[:1]:
            raise ShapeError(
                f"domains of shape {tuple(domain.shape)} do not fit an input of shape {tuple(input.shape)}",
                cure=f"pass one domain per sample, shape ({input.shape[0]},)",
            )
        if mask is not None and mask.dim() < input.dim():
            mask = mask.unsqueeze(1)
        outputs = []
        for index, norm in enumerate(self.domains):
            own = (domain == index).reshape(-1, *(1,) * (input.dim() - 1))
            outputs.append(norm(input, residual, own if mask is None else own & mask))
        together: Tensor = functools.reduce(torch.add, outputs)  # a sum over a new axis would lose the memory format
        return together

    def extra_repr(self) -> str:
        """Sizes; the options are shown by the domains."""
        return f"{self.num_features}, {self.num_domains}" + (", share_affine=True" if self.share_affine else "")


class ConditionalBatchNorm(BatchEstimator):
    """Batch normalization whose γ and β depend on a condition of every sample.

    y = activation(γ(k) · (x − μ_S)/√(σ²_S + ε) + β(k) + residual), S as in `BatchNorm2d`; k is a class, and γ, β rows
    of two learned tables, or the caller's network has made γ and β.

    For class-conditional generators, and to steer a visual network by language. The statistics are still those of the
    whole batch, so that its composition of classes matters; where that hurts, `AdaIN`.

    Args:
        num_features: C.
        num_classes: Rows of the tables; None where γ and β are always passed.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *), or the condition does not fit it.
        DegenerateScopeError: One value per channel in training.

    Source: Dumoulin et al. 2017 (tables); de Vries et al. 2017 (predicted γ + Δγ, β + Δβ).

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.ConditionalBatchNorm(8, num_classes=10)
        >>> layer(torch.randn(4, 8, 5, 5), torch.tensor([3, 1, 4, 1])).shape
        torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int | None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, False, track_running_stats, device, dtype, activation=activation)
        self.num_classes = num_classes
        if num_classes is not None:
            self.weight = Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
            self.bias = Parameter(torch.empty(num_classes, num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1 and β = 0 for every class, running mean 0 and variance 1."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
            torch.nn.init.zeros_(self.bias)

    @normalizes
    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002
        condition: Tensor | tuple[Tensor, Tensor],
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize by the batch, then scale and shift every sample by its condition.

        Args:
            input: (N, C, *).
            condition: Classes, int64 (N,); or γ and β, each (N, C).
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        batch = self.batch(input, residual, mask)
        if isinstance(condition, tuple):
            weight, bias = condition
        elif self.weight is None:
            raise ArgumentError("a layer without classes was given classes", cure="pass γ and β, each (N, C)")
        else:
            weight, bias = self.weight[condition], self.bias[condition]
        params = view_of(input, BATCH, {}, "n c")
        weight, bias = _rows(input, weight, bias)
        return self.estimate(batch._replace(params=params, weight=weight, bias=bias))


class AdaIN(Described):
    """Adaptive instance normalization: the content takes on the moments of the style.

    y = activation(σ(style) · (x − μ_S)/√(σ²_S + ε) + μ(style) + residual), S = every cell of a channel of a sample, as
    in `InstanceNorm2d`. Nothing is learned: the style is another feature map, or a network has made γ and β from it.

    For style transfer in a layer deep inside a generator; for GANs, generators modulate weights instead where the
    normalization's blobs disturb. Not for recognition: it removes what tells images apart by contrast.

    Args:
        num_features: C.
        eps: ε.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: Content or style do not fit.
        DegenerateScopeError: The content has one value per channel.

    Source: Huang & Belongie 2017, eq. 8.

    Example:
        >>> import torch, normscope as ns
        >>> content, style = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 5, 5) * 3 + 1
        >>> y = ns.nn.AdaIN(8)(content, style)
        >>> torch.allclose(y.mean((2, 3)), style.mean((2, 3)), atol=1e-4)
        True
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, activation: str | None = None) -> None:
        super().__init__()
        check_positive(eps=eps)
        self.num_features, self.eps = num_features, eps
        self.set_activation(activation)

    @normalizes
    def forward(
        self,
        input: Tensor,  # noqa: A002
        style: Tensor | tuple[Tensor, Tensor],
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize the content and give it the style.

        Args:
            input: The content, (N, C, *).
            style: A feature map (N, C, *) of any size, or γ and β, each (N, C).
            residual: Added before the activation.
            mask: True = keep, in the content; input's shape, or (N, *) without the channels.
        """
        check_channels(input, self.num_features)
        if isinstance(style, Tensor):
            check_channels(style, self.num_features)
            mean, var, _ = moments(style, INSTANCE)
            style = (var + self.eps).sqrt(), mean
        view = view_of(input, INSTANCE, {}, "n c")
        check_degenerate(view)
        formula = Formula(view.scope.inside, self.eps, activation=self.activation)
        weight, bias = _rows(input, *style)
        keep = view.mask(mask, (1,))
        return run(input, view, formula, weight=weight, bias=bias, residual=residual, mask=keep)[0]


class SPADE(BatchEstimator):
    """Spatially adaptive normalization: γ and β are maps, made from a map of labels.

    y = activation((1 + γ(m)) · (x − μ_S)/√(σ²_S + ε) + β(m) + residual), S as in `BatchNorm2d`; m is resized to the
    positions of x (nearest) and goes through a convolution with ReLU and one convolution for each of γ and β.

    For image synthesis from semantic layouts, whose information a plain normalizer washes out where a label is
    uniform. It adds three convolutions per layer.

    Args:
        num_features: C.
        label_channels: Channels of m.
        hidden: Channels between the convolutions.
        kernel_size: Of the convolutions; odd.
        dims: Spatial axes of x, 1 to 3.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        track_running_stats: Keep running statistics; without them evaluation normalizes by the batch, too.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: Input or map do not fit.
        ArgumentError: dims or kernel_size is out of range.
        DegenerateScopeError: One value per channel in training.

    Source: Park et al. 2019, eq. 1, and Figure 3; 1 + γ as in the published code.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.SPADE(8, label_channels=3, hidden=16)
        >>> layer(torch.randn(2, 8, 6, 6), torch.rand(2, 3, 24, 24)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        num_features: int,
        label_channels: int,
        hidden: int = 128,
        kernel_size: int = 3,
        dims: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, False, track_running_stats, device, dtype, activation=activation)
        check_positive(label_channels=label_channels, hidden=hidden)
        if dims not in _CONVOLUTIONS or kernel_size % 2 != 1:
            raise ArgumentError(
                f"dims must be 1, 2 or 3 and kernel_size odd, but got {dims} and {kernel_size}",
                cure="dims=2 for images",
            )
        self.label_channels, self.hidden, self.kernel_size, self.dims = label_channels, hidden, kernel_size, dims
        conv, same = _CONVOLUTIONS[dims], kernel_size // 2
        self.shared = conv(label_channels, hidden, kernel_size, padding=same, device=device, dtype=dtype)
        self.gamma = conv(hidden, num_features, kernel_size, padding=same, device=device, dtype=dtype)
        self.beta = conv(hidden, num_features, kernel_size, padding=same, device=device, dtype=dtype)

    @normalizes
    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002
        labels: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize by the batch, then scale and shift every cell by the map.

        Args:
            input: (N, C, *), `dims` spatial axes.
            labels: m, (N, label_channels, *), of any size.
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        batch = self.batch(input, residual, mask)
        if input.dim() != self.dims + 2 or labels.dim() != input.dim() or labels.shape[1] != self.label_channels:
            raise ShapeError(
                f"labels of shape {tuple(labels.shape)} do not fit an input of shape {tuple(input.shape)}",
                cure=f"pass (N, {self.num_features}, *), (N, {self.label_channels}, *), {self.dims} spatial axes",
            )
        space = input.shape[2:]
        hidden = torch.relu(self.shared(torch.nn.functional.interpolate(labels, tuple(space), mode="nearest")))
        names = " ".join(f"s{k}" for k in range(self.dims))
        params = view_of(input, f"[n] c [{names}]", {}, f"n c {names}")
        return self.estimate(batch._replace(params=params, weight=1 + self.gamma(hidden), bias=self.beta(hidden)))


_CONVOLUTIONS: dict[int, type[Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


def _rows(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """γ and β with one row per sample."""
    for name, tensor in (("γ", weight), ("β", bias)):
        if tensor.shape != x.shape[:2]:
            raise ShapeError(
                f"{name} of shape {tuple(tensor.shape)} does not fit an input of shape {tuple(x.shape)}",
                cure=f"one row per sample, {tuple(x.shape[:2])}; classes are one integer per sample",
            )
    return weight, bias
