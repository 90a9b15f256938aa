"""What the layers of the field share: description, checks, and batch normalization with the estimate left open."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.errors import ArgumentError, ShapeError
from normscope.functional.core import View, check_degenerate, check_dtype, run, view_of
from normscope.functional.normalize import Moments
from normscope.functional.running import update_running
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.activations import ACTIVATIONS
from normscope.kernels.formula import Formula
from normscope.nn.base import Layer, normalizes
from normscope.nn.batchnorm import _BatchNorm
from normscope.scope import SCOPES

__all__ = [
    "BATCH", "INSTANCE", "Batch", "BatchEstimator", "ChannelLayer", "Described",
    "activated", "check_channels", "check_positive", "merge", "spread", "widened",
]  # fmt: skip

BATCH, INSTANCE = SCOPES["BatchNorm"].pattern, SCOPES["InstanceNorm"].pattern
_PLACES = ("self", "device", "dtype")


class Described(Layer):
    """Mixin: repr shows the arguments of the constructor, those with a default only where they differ from it."""

    def extra_repr(self) -> str:
        """The arguments that build this layer again."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = getattr(self, name, None)
            if name == "bias":
                value = value is not None or not getattr(self, "affine", True)
            if name in _PLACES or value == parameter.default:
                continue
            shown.append(repr(value) if parameter.default is parameter.empty else f"{name}={value!r}")
        return ", ".join(shown)


class ChannelLayer(Described):
    """Base of layers without running statistics over (N, C, *), with γ and β per channel.

    Attributes:
        num_features: C.
        affine: Whether γ and β are learned.
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, num_features: int, *, affine: bool, bias: bool, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_features, self.affine = num_features, affine
        empty = torch.empty(num_features, device=device, dtype=dtype)
        self.weight = Parameter(empty) if affine else None
        self.bias = Parameter(torch.empty_like(empty)) if affine and bias else None

    def reset_parameters(self) -> None:
        """γ = 1, β = 0."""
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)


class Batch(NamedTuple):
    """One input of a layer.

    Attributes:
        x: (N, C, *).
        view: x through the batch's scope, one set per channel.
        weight: γ.
        bias: β.
        params: x through the same scope, and the axes that γ and β run over.
        residual: Added before the activation.
        mask: Cells to keep, broadcastable to x.
    """

    x: Tensor
    view: View
    weight: Tensor | None
    bias: Tensor | None
    params: View
    residual: Tensor | None = None
    mask: Tensor | None = None


class BatchEstimator(Described, _BatchNorm):
    """Batch normalization over (N, C, *) in which a subclass says how a batch in training is normalized.

    Evaluation, running statistics, state and options are those of `BatchNorm2d`.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        check_channels(input, self.num_features)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize; in evaluation by the running statistics where there are any.

        Args:
            input: (N, C, *).
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        return self.estimate(self.batch(input, residual, mask))

    def batch(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Batch:  # noqa: A002
        """Check an input and see it through the batch's scope."""
        self._check_input_dim(input)
        view = view_of(input, BATCH, {}, "c")
        return Batch(input, view, self.weight, self.bias, view, residual, view.mask(mask, (1,)))

    def estimate(self, batch: Batch) -> Tensor:
        """Choose between the two modes."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.by_running(batch)
        check_degenerate(batch.view)
        return self.by_batch(batch)

    def by_batch(self, batch: Batch) -> Tensor:
        """Normalize by the batch and track its moments."""
        output, mean, var = self.normalized(batch)
        self.track(batch, mean, var)
        return output

    def by_running(self, batch: Batch) -> Tensor:
        """Normalize by the running statistics."""
        mean, var = (batch.view.param(t) for t in (self.running_mean, self.running_var) if t is not None)
        return self.normalized(batch, mean=mean, var=var)[0]

    def normalized(
        self, batch: Batch, *, mean: Tensor | None = None, var: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The formula, by the batch's moments or given ones; returns the moments, too."""
        return run(
            batch.x, batch.params, self.formula(batch.view), weight=batch.weight, bias=batch.bias,
            residual=batch.residual, mean=mean, var=var, mask=batch.mask,
        )  # fmt: skip

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """Copies of the running statistics, for what a backward needs after training has moved them.

        torch.compile recomputes cheap operators in backward, from buffers that have moved by then, without a warning
        (torch 2.13). It does not recompute a concatenation.
        """
        running = [t for t in (self.running_mean, self.running_var) if t is not None]
        mean, var = torch.stack(running).unbind()
        return mean, var

    def formula(self, view: View) -> Formula:
        """What is computed over a view."""
        return Formula(view.scope.inside, self.eps, activation=self.activation)

    def track(self, batch: Batch, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards a batch's moments (one per channel) and count it."""
        if self.training and self.track_running_stats:
            running = (self.running_mean, self.running_var)
            moments = batch.view.param(mean.reshape(-1)), batch.view.param(var.reshape(-1))
            update_running(running, moments, batch.view, batch.mask, self.batch_weight(True), self.formula(batch.view))
            self.count_batch(True)


def check_channels(x: Tensor, num_features: int, *, axis: int = 1, least: int = 2) -> None:
    """Refuse an input of too few axes, with other channels, or of no real floating-point numbers."""
    if x.dim() < least:
        raise ShapeError(
            f"expected at least {least}D input (got {x.dim()}D input)",
            shape=tuple(x.shape),
            cure="pass (N, C) or (N, C, *)" if axis == 1 else "pass (*, C)",
        )
    if x.shape[axis] != num_features:
        raise ShapeError(
            f"expected input's size at dim={axis} to match num_features ({num_features}), but got: {x.shape[axis]}.",
            shape=tuple(x.shape),
            cure=f"build the layer with num_features={x.shape[axis]}, or pass an input with {num_features} channels",
        )
    check_dtype(x, "normalize")


def check_positive(**options: float) -> None:
    """Refuse an option that is not above zero."""
    for name, value in options.items():
        if value <= 0:
            raise ArgumentError(f"{name} must be positive, but got {value}", cure=f"pass {name} above 0")


def widened(x: Tensor) -> Tensor:
    """x in the dtype of the computation, float32 or wider."""
    return x.to(COMPUTE_DTYPE[x.dtype])


def spread(t: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C), so that it broadcasts against (N, C, *), in the dtype of the computation."""
    return t.to(COMPUTE_DTYPE[x.dtype]).reshape(*t.shape, *(1,) * (x.dim() - 2))


def merge(moments: Moments, dim: int) -> Moments:
    """The moments of several sets together, without a difference of large sums (after Chan et al. 1983)."""
    mean, var, count = moments
    weight = count.to(mean.dtype)  # type: ignore[union-attr]
    total = weight.sum(dim, keepdim=True)
    share = weight / total.clamp(min=1)
    together = (share * mean).sum(dim, keepdim=True)
    spread_ = (share * (var + (mean - together).square())).sum(dim, keepdim=True)
    return Moments(together, spread_, total.to(torch.int64))


def activated(z: Tensor, activation: str | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """The activation, 0 outside the mask, in the input's dtype."""
    if activation is not None:
        z = ACTIVATIONS[activation].forward(z)
    return (z if mask is None else torch.where(mask, z, 0)).to(like.dtype)
