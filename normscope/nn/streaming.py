"""Normalizers with a memory of earlier samples or batches: Online Normalization, Cross-Iteration BatchNorm."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from normscope.errors import ArgumentError, ShapeError
from normscope.functional.normalize import Moments, moments, normalize
from normscope.nn.base import normalizes
from normscope.nn.channels import BATCH, INSTANCE, Batch, BatchEstimator, check_positive, spread, widened

__all__ = ["CrossIterationBatchNorm", "OnlineNorm"]

Control = Literal["layer_scaling", "clamp"]
_LAYER = "n [c ...]"


class OnlineNorm(BatchEstimator):
    """Online normalization: every sample by the statistics of the samples before it, with a gradient that is steered.

    Sample t of a stream, per channel, μ_t and σ²_t the moments of its positions, α_f and α_b near 1:

        y_t = (x_t − μ)/√(σ² + ε)        μ ← α_f·μ + (1 − α_f)·μ_t
        σ² ← α_f·σ² + (1 − α_f)·σ²_t + α_f·(1 − α_f)·(μ_t − μ)²        (with the μ before its step)

    Backward, with two errors kept per channel, mean over the positions of the sample:

        g' = g − (1 − α_b)·e_y·y_t        e_y ← e_y + mean(g'·y_t)
        dx = g'/√(σ² + ε) − (1 − α_b)·e_1        e_1 ← e_1 + mean(dx)

    so that over time the gradient becomes orthogonal to 1 and to y, as BatchNorm's is within a batch. It is not the
    derivative of the forward. γ and β follow, then layer scaling z/√(mean(z²) + ε) over the sample, or a clamp, against
    the growth that late statistics allow.

    For training without batches (batch of one, streams, memory for one sample), where BatchNorm has no statistics;
    order matters, so that shuffled data are assumed. With batches of 32 BatchNorm is simpler and as good. The samples
    of a batch are taken one after the other; the statistics need a loop over them. Both errors are buffers that
    backward moves: run one backward per forward. A checkpoint cannot compute the layer again, as its second forward
    would begin where the first ended: it raises.

    Args:
        num_features: C.
        alpha_fwd: α_f.
        alpha_bkw: α_b.
        eps: ε.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        control: "layer_scaling", "clamp" (to ±clamp), or None.
        clamp: The bound.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        ArgumentError: A decay outside [0, 1), or an unknown control.

    Source: Chiley et al. 2019: normalization, control process, layer scaling, activation clamping.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.OnlineNorm(8, alpha_fwd=0.9)
        >>> for _ in range(50):
        ...     y = layer(torch.randn(1, 8, 5, 5) + 3)  # batches of one
        >>> (layer.running_mean - 3).abs().max() < 0.5
        tensor(True)
    """

    error_y: Tensor
    error_1: Tensor

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        control: Control | None = "layer_scaling",
        clamp: float = 5.0,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, 1 - alpha_fwd, affine, True, device, dtype, bias=bias, activation=activation
        )
        for name, value in (("alpha_fwd", alpha_fwd), ("alpha_bkw", alpha_bkw)):
            if not 0 <= value < 1:
                raise ArgumentError(f"{name} must lie in [0, 1), but is {value}", cure="the paper's are 0.999 and 0.99")
        if control not in (None, *get_args(Control)):
            raise ArgumentError(f"control {control!r} is unknown", cure=f"use None or {get_args(Control)}")
        check_positive(clamp=clamp)
        self.alpha_fwd, self.alpha_bkw, self.control, self.clamp = alpha_fwd, alpha_bkw, control, clamp
        for name in ("error_y", "error_1"):
            self.register_buffer(name, torch.zeros(num_features, device=device, dtype=dtype))

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, no error, no sample seen."""
        super().reset_running_stats()
        if hasattr(self, "error_1"):  # torch's constructor calls this before there is one
            self.error_y.zero_()
            self.error_1.zero_()

    def estimate(self, batch: Batch) -> Tensor:
        """A single value per channel is no obstacle: its own statistics are not used."""
        return self.by_batch(batch) if self.training else self.by_running(batch)

    def by_batch(self, batch: Batch) -> Tensor:
        """Sample by sample."""
        self.refuse_recomputing()
        first, var = self.snapshot()
        x = widened(batch.x)
        x = x - spread(first, x)  # the statistics walk from 0: a rounded mean has few digits far from it
        x = x if batch.mask is None else torch.where(batch.mask, x, 0)
        with torch.no_grad():
            mean, var = self._stream(first.to(x.dtype), var.to(x.dtype), moments(x, INSTANCE, mask=batch.mask))
        y = _Online.apply(  # type: ignore[no-untyped-call]
            x, mean, (var + self.eps).rsqrt(), batch.mask, self.error_y, self.error_1, 1 - self.alpha_bkw
        )
        return self._controlled(batch, y)

    def by_running(self, batch: Batch) -> Tensor:
        """By the statistics as they stand."""
        plain = self.batch(widened(batch.x), None, batch.mask)._replace(weight=None, bias=None)
        mean, var = (plain.view.param(t) for t in (self.running_mean, self.running_var) if t is not None)
        y = normalize(plain.x, BATCH, eps=self.eps, mask=plain.mask, moments=(mean.flatten(), var.flatten()))
        return self._controlled(batch, y)

    def _stream(self, first: Tensor, var: Tensor, own: Moments) -> tuple[Tensor, Tensor]:
        """The statistics before every sample, (N, C), means less the first; moves the buffers past the last."""
        assert self.running_mean is not None  # noqa: S101 - the layer always tracks
        assert self.running_var is not None  # noqa: S101
        mean = torch.zeros_like(first)
        means, variances, a = [mean[None][:0]], [var[None][:0]], self.alpha_fwd
        for mean_t, var_t, count in zip(own.mean, own.var, own.count, strict=True):  # type: ignore[arg-type]
            means.append(mean[None])
            variances.append(var[None])
            moved = a * var + (1 - a) * var_t + a * (1 - a) * (mean_t - mean).square()
            var = torch.where(count.bool() & moved.isfinite(), moved, var)
            mean = torch.where(count.bool() & mean_t.isfinite(), mean + (1 - a) * (mean_t - mean), mean)
        if len(means) > 1:
            self.running_mean.copy_(first + mean)
            self.running_var.copy_(var)
            self.count_batch(True)
        return torch.cat(means), torch.cat(variances)

    def _controlled(self, batch: Batch, y: Tensor) -> Tensor:
        z = y if self.weight is None else y * spread(self.weight, y)
        z = z if self.bias is None else z + spread(self.bias, y)
        if self.control == "clamp":
            z = z.clamp(-self.clamp, self.clamp)
        scale = self.control == "layer_scaling"
        return normalize(
            z, _LAYER, eps=self.eps, center=False, scale=scale, mask=batch.mask, activation=self.activation,
            residual=batch.residual,
        ).to(batch.x.dtype)  # fmt: skip


class _Online(torch.autograd.Function):
    """(x − μ)·r with given statistics of every sample, and the control process in the place of a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        mask: Tensor | None,
        error_y: Tensor,
        error_1: Tensor,
        rate: float,
    ) -> Tensor:
        """y."""
        y = (x - spread(mean, x)) * spread(rstd, x)
        y = y if mask is None else torch.where(mask, y, 0)
        ctx.save_for_backward(y, rstd, mask)
        ctx.errors, ctx.rate = (error_y, error_1), rate
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The controlled gradient; moves the two errors."""
        y, rstd, mask = ctx.saved_tensors
        error_y, error_1 = ctx.errors
        g = grads[0] if mask is None else torch.where(mask, grads[0], 0)
        inside = tuple(range(2, y.dim()))
        cells: Any = math.prod(y.shape[2:]) if mask is None else mask.expand_as(y).sum(inside)
        cells = max(cells, 1) if isinstance(cells, int) else cells.clamp(min=1)
        mean_g, mean_gy, mean_y, mean_yy = ((t.sum(inside) if inside else t) / cells for t in (g, g * y, y, y * y))
        e_y, e_1, rate = error_y.to(y.dtype), error_1.to(y.dtype), ctx.rate
        before_y, before_1 = torch.empty_like(rstd), torch.empty_like(rstd)
        for t in range(y.shape[0]):
            before_y[t], before_1[t] = e_y, e_1
            mean_dx = (mean_g[t] - rate * e_y * mean_y[t]) * rstd[t] - rate * e_1
            e_y = e_y + mean_gy[t] - rate * e_y * mean_yy[t]
            e_1 = e_1 + mean_dx
        error_y.copy_(e_y)
        error_1.copy_(e_1)
        dx = (g - rate * spread(before_y, y) * y) * spread(rstd, y) - rate * spread(before_1, y)
        return dx if mask is None else torch.where(mask, dx, 0), None, None, None, None, None, None


class CrossIterationBatchNorm(BatchEstimator):
    """Batch normalization over the last k batches, their moments carried to the present weights by Taylor's formula.

    For the batch τ steps ago, with θ the weight of the layer before (one row θ_c per channel):

        μ_{t−τ|t} = μ_{t−τ} + ∂μ_{t−τ}/∂θ · (θ_t − θ_{t−τ})        ν_{t−τ|t} likewise, ν = mean(x²)
        μ̄ = mean_τ μ_{t−τ|t}        σ̄² = mean_τ max(ν_{t−τ|t}, μ²_{t−τ|t}) − μ̄²

    and y = activation(γ · (x − μ̄)/√(σ̄² + ε) + β + residual). The gradient flows through the present batch's moments.

    For detection and other training with a few samples per device, as a cheaper SyncBatchNorm in time instead of
    space. What is approximate: only the weight directly before the layer is followed, not those further back (the
    paper finds their part small); the expansion is of first order, so that it holds for small steps: begin it after
    the first epochs (`burn_in`). It keeps three copies of that weight per remembered batch, and asks autograd for two
    gradients of it per forward: there torch.compile breaks the graph, and needs
    `torch._dynamo.config.trace_autograd_ops = True` for fullgraph=True. A checkpoint cannot compute the layer again, as
    the window has moved on: it raises. Without gradients, as when statistics are measured again, it is BatchNorm.

    Args:
        num_features: C.
        fan_in: Numbers in one row of the weight: weight[0].numel().
        window: k.
        burn_in: Batches normalized by themselves at first.
        eps: ε.
        momentum: Weight of the newest window in the running statistics; None for the mean of all.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *), or the weight has not fan_in numbers per channel.
        DegenerateScopeError: One value per channel in training.

    Source: Yao et al. 2021, §3. We carry σ² = ν − μ² in the place of ν, which is the same number with fewer
    digits lost.

    Example:
        >>> import torch, normscope as ns
        >>> conv = torch.nn.Conv2d(3, 8, 3, bias=False)
        >>> norm = ns.nn.CrossIterationBatchNorm(8, fan_in=conv.weight[0].numel(), window=4)
        >>> norm(conv(torch.randn(2, 3, 9, 9)), conv.weight).shape
        torch.Size([2, 8, 7, 7])
    """

    past_mean: Tensor
    past_var: Tensor
    past_dmean: Tensor
    past_dvar: Tensor
    past_weight: Tensor
    remembered: Tensor

    def __init__(
        self,
        num_features: int,
        fan_in: int,
        window: int = 8,
        burn_in: int = 0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias, activation=activation)
        check_positive(fan_in=fan_in, window=window)
        self.fan_in, self.window, self.burn_in = fan_in, window, burn_in
        for name in ("past_mean", "past_var"):
            self.register_buffer(name, torch.zeros(window - 1, num_features, device=device, dtype=dtype))
        for name in ("past_dmean", "past_dvar", "past_weight"):
            self.register_buffer(name, torch.zeros(window - 1, num_features, fan_in, device=device, dtype=dtype))
        self.register_buffer("remembered", torch.zeros((), dtype=torch.long, device=device))

    def reset_running_stats(self) -> None:
        """Running mean 0 and variance 1, nothing remembered."""
        super().reset_running_stats()
        if hasattr(self, "remembered"):  # torch's constructor calls this before there is one
            self.remembered.zero_()

    @normalizes
    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize by the window; in evaluation by the running statistics.

        Args:
            input: (N, C, *), what the layer before made with `weight`.
            weight: (C, *), that layer's.
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        batch = self.batch(input, residual, mask)
        if weight.shape[:1] != (self.num_features,) or weight[0].numel() != self.fan_in:
            raise ShapeError(
                f"a weight of shape {tuple(weight.shape)} has not {self.num_features} rows of {self.fan_in} numbers",
                cure="pass the weight of the layer that made the input, and build with fan_in=weight[0].numel()",
            )
        learns = torch.is_grad_enabled() and weight.requires_grad and input.requires_grad
        if self.training and learns and input.numel():
            return self._by_window(batch, weight)
        return self.estimate(batch)

    def _by_window(self, batch: Batch, weight: Tensor) -> Tensor:
        self.refuse_recomputing()
        # Less a number per channel near the means, whose average has few digits far from 0.
        shift = moments(batch.x.detach(), BATCH, mask=batch.mask).mean
        x = widened(batch.x)
        x = x - spread(shift, x)
        mean, var, _ = moments(x, BATCH, mask=batch.mask)
        rows = widened(weight.detach()).flatten(1)
        # Concatenated, because that torch.compile saves: see `snapshot`.
        past_mean, past_var, known = self._carried(rows, shift)
        means, variances = torch.cat([mean[None], past_mean]), torch.cat([var[None], past_var])
        share = torch.cat([mean.new_ones(1, 1), known])
        share = share / share.sum()
        mean_all = (share * means).sum(0)
        var_all = (share * (variances + (means - mean_all).square())).sum(0)
        output = normalize(
            x, BATCH, weight=batch.weight, bias=batch.bias, eps=self.eps, mask=batch.mask,
            moments=(mean_all, var_all), activation=self.activation, residual=batch.residual,
        ).to(batch.x.dtype)  # fmt: skip
        slopes = [torch.autograd.grad(t.sum(), weight, retain_graph=True)[0].flatten(1) for t in (mean, var)]
        self._remember(mean.detach() + shift, var.detach(), *slopes, rows)
        self.track(batch, mean_all.detach() + shift, var_all.detach())
        return output

    def _carried(self, rows: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moments of the remembered batches at the present weights, means less the shift, and which count."""
        past = (self.past_mean, self.past_var, self.past_dmean, self.past_dvar, self.past_weight)
        mean, var, dmean, dvar, weight = (t.to(shift.dtype) for t in past)
        step = rows - weight
        moved = (dmean * step).sum(-1)
        # ν + ∂ν·step − (μ + ∂μ·step)², with ν = σ² + μ²
        var = (var + (dvar * step).sum(-1) - moved.square()).clamp(min=0)
        known = torch.arange(self.window - 1, device=shift.device) < self.remembered
        return mean - shift + moved, var, known.unsqueeze(1).to(shift.dtype)

    def _remember(self, *newest: Tensor) -> None:
        past = (self.past_mean, self.past_var, self.past_dmean, self.past_dvar, self.past_weight)
        for buffer, value in zip(past, newest, strict=True):
            buffer.copy_(torch.cat([value.unsqueeze(0).to(buffer.dtype), buffer])[: self.window - 1])
        if self.num_batches_tracked is not None:
            begun = self.num_batches_tracked >= self.burn_in
            self.remembered.copy_((self.remembered + begun).clamp(max=self.window - 1))
