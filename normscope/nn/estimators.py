"""Batch normalization with another estimate of the moments: frozen, by ghosts, renormalized, corrected, switched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.errors import ArgumentError
from normscope.functional import batch_norm
from normscope.functional.core import run, view_of
from normscope.functional.normalize import Moments, moments, normalize
from normscope.nn.base import normalizes
from normscope.nn.channels import (
    BATCH,
    INSTANCE,
    Batch,
    BatchEstimator,
    Described,
    check_channels,
    check_positive,
    merge,
    spread,
    widened,
)
from normscope.scope import SCOPES

__all__ = ["BatchRenorm", "EvalNorm", "FrozenBatchNorm", "GhostBatchNorm", "SwitchNorm"]


class FrozenBatchNorm(Described):
    """Batch normalization that never learns: y = activation(γ · (x − μ)/√(σ² + ε) + β + residual), all four buffers.

    For the backbone of a detector or any pretrained part trained with tiny batches, and to load torchvision's and
    detectron2's checkpoints of such layers. A BatchNorm in a model is frozen by `ns.freeze`, which can be undone; this
    class is for models that are built frozen.

    Args:
        num_features: C.
        eps: ε.
        device: As in torch.
        dtype: As in torch.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).

    Source: Ioffe & Szegedy 2015, Algorithm 2, step 11; frozen: He et al. 2016, appendix A.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.FrozenBatchNorm(8)
        >>> [*layer.parameters()], [name for name, _ in layer.named_buffers()]
        ([], ['weight', 'bias', 'running_mean', 'running_var'])
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.set_activation(activation)
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A BatchNorm's checkpoint brings a counter, which nothing here needs."""
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Apply the fixed affine map.

        Args:
            input: (N, C, *).
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        check_channels(input, self.num_features)
        return batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps,
            activation=self.activation, residual=residual, mask=mask,
        )  # fmt: skip


class GhostBatchNorm(BatchEstimator):
    """Batch normalization in which every ghost, a slice of the batch, is normalized by itself.

    y as in `BatchNorm2d`, S = every cell of a channel in one ghost of consecutive samples. Each ghost moves the running
    statistics as a batch of its own would. A batch that ghost_size does not divide is cut into ghosts whose sizes
    differ by one at most, none larger than ghost_size.

    To train with large batches and keep the noise, and with it the generalization, of small ones; also to imitate on
    one device what several devices without synchronization compute. Not with ghosts of a few samples per channel: the
    paper's sizes are 32 and more.

    Args:
        num_features: C.
        ghost_size: Samples per ghost.
        eps: ε.
        momentum: Weight of the newest ghost in the running statistics; None for the mean of all ghosts.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics; without them evaluation normalizes by ghosts, too.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel and ghost.

    Source: Hoffer et al. 2017, Algorithm 1 (with variances in the running statistics, where the paper averages σ).

    Example:
        >>> import torch, normscope as ns
        >>> layer, x = ns.nn.GhostBatchNorm(8, ghost_size=16), torch.randn(64, 8)
        >>> torch.allclose(layer(x)[:16], ns.nn.BatchNorm1d(8)(x[:16]), atol=1e-6)
        True
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
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
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, activation=activation
        )
        check_positive(ghost_size=ghost_size)
        self.ghost_size = ghost_size

    def by_batch(self, batch: Batch) -> Tensor:
        """By ghosts of two sizes at most: the first n mod g of the g ghosts have one sample more."""
        n = batch.x.shape[0]
        ghosts = max(-(-n // self.ghost_size), 1)
        larger, size = n % ghosts, n // ghosts
        if not larger:
            return self._ghosts(batch, ghosts)
        cut = larger * (size + 1)
        x, residual, mask = (
            (t, t) if t is None else (t.expand(n, *t.shape[1:])[:cut], t.expand(n, *t.shape[1:])[cut:])
            for t in (batch.x, batch.residual, batch.mask)
        )
        halves = (self.batch(x[i], residual[i], mask[i]) for i in (0, 1))  # type: ignore[arg-type]
        return torch.cat([self._ghosts(half, g) for half, g in zip(halves, (larger, ghosts - larger), strict=True)])

    def _ghosts(self, batch: Batch, ghosts: int) -> Tensor:
        view = view_of(batch.x, SCOPES["GhostBatchNorm"].pattern, {"g": ghosts}, "c")
        formula, mask = self.formula(view), view.mask(batch.mask, (1,))
        output, mean, var = run(
            batch.x, view, formula, weight=self.weight, bias=self.bias, residual=batch.residual, mask=mask
        )
        if batch.x.shape[0]:
            one = view_of(batch.x[: batch.x.shape[0] // ghosts], BATCH, {}, "c")
            for i in range(ghosts):
                ghost = batch._replace(view=one, mask=None if mask is None else mask[i % mask.shape[0]])
                self.track(ghost, mean[i], var[i])
        return output


class BatchRenorm(BatchEstimator):
    """Batch renormalization: in training as in evaluation the output depends on the running statistics.

    y = activation(γ · ((x − μ_B)/√(σ²_B + ε) · r + d) + β + residual), with r = √(σ²_B + ε)/√(σ² + ε) clipped to
    [1/rmax, rmax] and d = (μ_B − μ)/√(σ² + ε) to [−dmax, dmax], both taken as constants by the gradient; μ and σ² are
    the running statistics before this batch. Unclipped, x̂·r + d is what evaluation computes.

    For small batches and batches whose samples depend on each other, where BatchNorm's training and evaluation drift
    apart. It needs the slow start: until the running statistics have settled, bounds that are wide let it diverge. At
    batches of one, where every σ²_B over a vector is 0, it does not help. It reads the input twice more than BatchNorm.
    A checkpoint cannot compute the layer again, as the running statistics have moved on: it raises.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics, the paper's α.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        rmax: Final bound of r; plain and settable, as dmax.
        dmax: Final bound of d.
        schedule: Batches after which the bounds leave (1, 0), r's has reached rmax, d's has reached dmax, linearly in
            between; None where the bounds hold from the first batch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel in training.
        ArgumentError: A bound is out of range.

    Source: Ioffe 2017, Algorithm 1; schedule §4.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.BatchRenorm(8, schedule=None, rmax=100.0, dmax=100.0)
        >>> x = torch.randn(4, 8)
        >>> expected = layer.eval()(x)
        >>> torch.allclose(layer.train()(x), expected, atol=1e-5)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
        schedule: tuple[int, int, int] | None = (5000, 40000, 25000),
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias, activation=activation)
        if rmax < 1 or dmax < 0:
            raise ArgumentError(
                f"rmax must be 1 or more and dmax 0 or more, but got {rmax} and {dmax}", cure="(1, 0) is BatchNorm"
            )
        if schedule is not None and not 0 <= schedule[0] < min(schedule[1:]):
            raise ArgumentError(
                f"schedule {schedule} must be (start, r reaches rmax, d reaches dmax) with start before both",
                cure="the paper's is (5000, 40000, 25000)",
            )
        self.rmax, self.dmax, self.schedule = rmax, dmax, schedule

    def bounds(self) -> tuple[Tensor | float, Tensor | float]:
        """The bounds of r and d for the next batch."""
        if self.schedule is None or self.num_batches_tracked is None:
            return self.rmax, self.dmax
        start, r_at, d_at = self.schedule
        r, d = (((self.num_batches_tracked - start) / (end - start)).clamp(0, 1) for end in (r_at, d_at))
        return 1 + (self.rmax - 1) * r, self.dmax * d

    def by_batch(self, batch: Batch) -> Tensor:
        """The formula with γ·r for γ and β + γ·d for β."""
        if self.running_mean is None or self.running_var is None:
            return super().by_batch(batch)
        self.refuse_recomputing()
        r, d = self._correction(batch, *self.snapshot())
        if batch.weight is not None:
            r, d = r * batch.weight, d * batch.weight
        return super().by_batch(batch._replace(weight=r, bias=d if batch.bias is None else d + batch.bias))

    def _correction(self, batch: Batch, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        x = widened(batch.x.detach())
        now = moments(x - spread(mean, x), BATCH, mask=batch.mask)  # μ_B − μ of two rounded means has few digits
        rmax, dmax = self.bounds()
        root = (var.to(x.dtype) + self.eps).sqrt()
        r = ((now.var + self.eps).sqrt() / root).clamp(1 / rmax, rmax)  # type: ignore[arg-type]
        d = (now.mean / root).clamp(-dmax, dmax)  # type: ignore[arg-type]
        return r, d


class _Auxiliary(torch.autograd.Function):
    """y, to whose backward a loss is attached: its gradient is 1, whatever becomes of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        """Return y."""
        ctx.loss = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of y and of the loss."""
        return grads[0], grads[0].new_ones((), dtype=ctx.loss)


class EvalNorm(BatchEstimator):
    """Batch normalization whose evaluation corrects the running statistics by the sample's own.

    In training BatchNorm. In evaluation each sample is normalized by the moments of a batch that consists of it, with
    the weights α and β, and of the population:

        μ̂ = α·μ_s + (1 − α)·μ        σ̂² = β·σ²_s + (1 − β)·σ² + β·(1 − β)·(μ_s − μ)²

    μ_s and σ²_s are the moments of a channel of the sample, μ and σ² the running ones. The last term is the variance
    between the two parts. α and β are learned in training by L = mean (y_train − y_eval)², which moves nothing else:
    its gradient joins theirs in backward, with the weight 1 (and, with a gradient scaler, without its scale).

    For models trained with small batches, whose normalized activations contain the sample itself by 1/N, which the
    running statistics ignore; with large batches α and β go to 0 and this is BatchNorm. Results are those of the
    sample alone: evaluation stays independent of the batch.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        alpha_init_value: Where α and β of every channel start; 1/N for batches of N is their expectation.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Attributes:
        loss: L of the newest batch.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel in training.

    Source: Singh & Shrivastava 2019: the corrected moments and their online estimation. One α and one β per
    channel, and the term between the parts, are our reading.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.EvalNorm(8, alpha_init_value=0.0).eval()
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.allclose(layer(x), ns.nn.BatchNorm2d(8).eval()(x), atol=1e-6)
        True
    """

    loss: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        alpha_init_value: float = 0.0,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias, activation=activation)
        if not 0 <= alpha_init_value <= 1:
            raise ArgumentError(f"alpha_init_value must lie in [0, 1], but is {alpha_init_value}", cure="1/N, or 0")
        self.alpha_init_value = alpha_init_value
        self.mean_weight = Parameter(torch.full((num_features,), alpha_init_value, device=device, dtype=dtype))
        self.var_weight = Parameter(torch.full((num_features,), alpha_init_value, device=device, dtype=dtype))
        # A result of the forward: what only a backward needs, torch.compile computes there, from moved buffers.
        self.register_buffer("loss", torch.zeros((), device=device, dtype=torch.float32), persistent=False)

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, the weights of the sample as at the start, running mean 0 and variance 1."""
        super().reset_parameters()
        if hasattr(self, "var_weight"):  # torch's constructor calls this before there is one
            torch.nn.init.constant_(self.mean_weight, self.alpha_init_value)
            torch.nn.init.constant_(self.var_weight, self.alpha_init_value)

    def by_batch(self, batch: Batch) -> Tensor:
        """As BatchNorm; α and β learn from the running statistics that this batch has entered."""
        output = super().by_batch(batch)
        if self.training and torch.is_grad_enabled():
            loss = self._loss(batch)
            self.loss.copy_(loss.detach())
            output = _Auxiliary.apply(output, loss)  # type: ignore[no-untyped-call]
        return output

    def by_running(self, batch: Batch) -> Tensor:
        """By the corrected moments."""
        return self._corrected(batch.x, batch, self.weight, self.bias, self.activation).to(batch.x.dtype)

    def _corrected(
        self,
        x: Tensor,
        batch: Batch,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        # Within [0, 1], or a variance could turn negative; the gradient passes, so that a weight finds its way back.
        a, b = (w + (w.clamp(0, 1) - w).detach() for w in (self.mean_weight, self.var_weight))
        mean, var = self.snapshot()
        x = widened(x)
        x = x - spread(mean, x)  # from here μ = 0; a difference of two rounded means has few digits
        own = moments(x, INSTANCE, mask=batch.mask)
        corrected = a * own.mean, var + b * (own.var - var) + b * (1 - b) * own.mean.square()
        return normalize(
            x, INSTANCE, weight=weight, bias=bias, eps=self.eps, mask=batch.mask, moments=corrected,
            activation=activation, residual=batch.residual,
        )  # fmt: skip

    def _loss(self, batch: Batch) -> Tensor:
        x = batch.x.detach()
        corrected = self._corrected(x, batch._replace(residual=None))
        by_batch = normalize(x, BATCH, eps=self.eps, mask=batch.mask)
        total = widened(corrected - by_batch).square().sum()
        if batch.mask is None:
            return total / max(x.numel(), 1)
        return total / batch.mask.expand_as(x).sum().clamp(min=1)


class SwitchNorm(BatchEstimator):
    """Switchable normalization: learned mixtures of the moments of instance, layer and batch.

    y = activation(γ · (x − Σ_k w_k μ_k)/√(Σ_k w'_k σ²_k + ε) + β + residual), k ∈ {IN, LN, BN}; w and w' are the
    softmax of three parameters each. In evaluation the batch's moments are the running ones.

    To learn which normalizer a layer wants, or where the batch size differs between training runs: at small batches
    the weight of BN falls. With w on BN it shares BatchNorm's weaknesses, and costs more than each of the three.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches (the paper's
            batch average).
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *).
        DegenerateScopeError: One value per channel in training.

    Source: Luo et al. 2019. The moments are biased, as in the paper; its code has the unbiased ones, NaN for
    maps of one cell.

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.SwitchNorm(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, layer.mean_weight.softmax(0)
        (torch.Size([4, 8, 5, 5]), tensor([0.3333, 0.3333, 0.3333], grad_fn=<SoftmaxBackward0>))
    """

    def __init__(
        self,
        num_features: int,
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
        self.mean_weight = Parameter(torch.ones(3, device=device, dtype=dtype))
        self.var_weight = Parameter(torch.ones(3, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, equal mixtures, running mean 0 and variance 1."""
        super().reset_parameters()
        if hasattr(self, "var_weight"):  # torch's constructor calls this before there is one
            torch.nn.init.ones_(self.mean_weight)
            torch.nn.init.ones_(self.var_weight)

    def by_batch(self, batch: Batch) -> Tensor:
        """With the batch's own moments for BN."""
        shift = moments(batch.x.detach(), BATCH, mask=batch.mask).mean
        shift = torch.where(shift.isfinite(), shift, 0)  # a channel that is not stays the only one
        x, own = self._shifted(batch, shift)
        mean, var, _ = merge(own, 0)
        self.track(batch, mean.detach() + shift, var.detach())
        return self._switched(batch, x, shift, own, mean, var)

    def by_running(self, batch: Batch) -> Tensor:
        """With the running statistics for BN."""
        shift, var = self.snapshot()
        x, own = self._shifted(batch, shift)
        return self._switched(batch, x, shift.to(x.dtype), own, torch.zeros_like(own.mean[:1]), var.to(x.dtype))

    def _shifted(self, batch: Batch, shift: Tensor) -> tuple[Tensor, Moments]:
        """x less a number per channel near its mean, for a mixture of means has few digits far from 0; its moments."""
        x = widened(batch.x)
        x = x - spread(shift, x)
        return x, moments(x, INSTANCE, mask=batch.mask)

    def _switched(self, batch: Batch, x: Tensor, shift: Tensor, own: Moments, mean: Tensor, var: Tensor) -> Tensor:
        apart = shift - shift[:1]  # of the channels, whose means the layer's moments compare
        layer = merge(own._replace(mean=own.mean + apart), 1)
        w, w_ = (t.to(x.dtype).softmax(0) for t in (self.mean_weight, self.var_weight))
        mixed = (
            w[0] * own.mean + w[1] * (layer.mean - apart) + w[2] * mean,
            w_[0] * own.var + w_[1] * layer.var + w_[2] * var,
        )
        return normalize(
            x, INSTANCE, weight=self.weight, bias=self.bias, eps=self.eps, mask=batch.mask, moments=mixed,
            activation=self.activation, residual=batch.residual,
        ).to(batch.x.dtype)  # fmt: skip
