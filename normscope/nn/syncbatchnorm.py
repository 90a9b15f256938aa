"""Batch normalization over the batches of all ranks together.

The local moments (m_r, μ_r, M_r = m_r σ²_r) of every rank travel in one message, in float64, and are merged by Chan's
formula:

    m = Σ m_r,   μ = Σ m_r μ_r / m,   M = Σ (M_r + m_r (μ_r − μ)²),   σ² = M / m

so that ranks count by their cells, however uneven, masked or empty, and all of them hold the same bits. The backward
adds up the two sums of the gradient, in a second message. What lies between the messages is computed by the compiled
kernels where they serve, else by torch's operators, and one rank need not do as the others.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normscope.errors import ArgumentError, ShapeError
from normscope.functional import compiled
from normscope.functional.autograd import is_plain
from normscope.functional.compiled import Recipe, Steps
from normscope.functional.core import View, check_activation, check_dtype, view_of
from normscope.functional.running import update_running
from normscope.kernels import COMPUTE_DTYPE, eager
from normscope.kernels.formula import Formula
from normscope.nn.base import Layer, Tracking, check_input_dim, normalizes
from normscope.nn.batchnorm import _BatchNorm
from normscope.nn.collective import Exchange, Grouped, exchange_of
from normscope.scope import SCOPES

__all__ = ["BatchNormNd", "SyncBatchNorm", "synchronized_batch_norm", "synchronized_forward"]


class BatchNormNd(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, *), whatever the number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")


class SyncBatchNorm(Grouped, BatchNormNd, metaclass=ABCMeta):
    """`torch.nn.SyncBatchNorm` on every device: batch normalization over the batches of all ranks together.

    y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual), S = every cell of a channel in the batches of the process
    group. Ranks may bring different numbers of samples, none at all, or masks; each cell counts the same. One message
    per forward and one per backward. The gradients of γ and β are this rank's own, as everywhere, for DDP or FSDP to
    add up. Alone (without a process group, with one rank, in evaluation) it is BatchNorm.

    Args:
        num_features: C.
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        track_running_stats: Keep running statistics, the same on all ranks.
        process_group: The ranks that share statistics; None for all.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Attributes:
        timeout: Seconds that a rank on a CPU waits for the others; a class attribute. On a GPU the process group's own
            timeout holds, and the error names the layer if TORCH_NCCL_BLOCKING_WAIT=1.

    Raises:
        ShapeError: The input is not (N, C, *), has other than C channels, or, alone, one value per channel.
        SynchronizationError: Another rank is at another layer, or does not come.

    Source: Peng et al. 2018, "MegDet"; Chan, Golub & LeVeque 1983 (merging).

    Example:
        >>> import torch, normscope as ns
        >>> layer = ns.nn.SyncBatchNorm(8, activation="relu")
        >>> layer(torch.randn(20, 8, 5)).min().item()
        0.0
    """

    timeout: float = 600.0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, activation=activation
        )
        self.process_group = process_group

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Normalize by the batches of all ranks when training, else as BatchNorm does.

        Args:
            input: (N, C) or (N, C, *); N may be 0.
            residual: Added before the activation.
            mask: True = keep; input's shape, or (N, *) without the channels.
        """
        exchange = exchange_of(self, self.process_group, self.timeout)
        if exchange is None:
            return super().forward(input, residual, mask)
        return synchronized_forward(self, exchange, input, residual, mask)


def synchronized_forward(
    layer: torch.nn.modules.batchnorm._BatchNorm,
    exchange: Exchange,
    input: Tensor,  # noqa: A002
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The forward of a batch normalizer, torch's or ours, in training over the batches of all ranks."""
    check_input_dim(layer, input, getattr(layer, "_expects", "the axes of the layer's name"))
    tracks = layer.track_running_stats
    output = synchronized_batch_norm(
        exchange,
        input,
        layer.running_mean if tracks else None,
        layer.running_var if tracks else None,
        layer.weight,
        layer.bias,
        momentum=Tracking.batch_weight(layer, tracks),  # type: ignore[arg-type]
        eps=layer.eps,
        activation=layer.activation if isinstance(layer, Layer) else None,
        residual=residual,
        mask=mask,
    )
    Tracking.count_batch(layer, tracks)  # type: ignore[arg-type]
    return output


def synchronized_batch_norm(
    exchange: Exchange,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`normscope.functional.batch_norm` in training, over the batches of all ranks.

    Args:
        exchange: The line to the other ranks.
        input: (N, C) or (N, C, *).
        running_mean: (C,), updated in place.
        running_var: (C,), updated in place.
        weight: γ, (C,).
        bias: β, (C,).
        momentum: Weight of the batch in the running statistics.
        eps: ε.
        activation: See `normscope.normalize`.
        residual: Added before the activation.
        mask: True = keep.
    """
    check_dtype(input, "batch_norm")
    check_activation(activation)
    if not eps > 0:
        raise ArgumentError(f"batch_norm eps must be positive during training, but got {eps}", cure="1e-5 is usual")
    view = view_of(input, SCOPES["BatchNorm"].pattern, {}, "c")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight)):
        if tensor is not None and tensor.numel() != view.shape[1]:
            raise ShapeError(
                f"{name} should contain {view.shape[1]} elements not {tensor.numel()}",
                shape=view.shape,
                cure="num_features of the layer must be the channels (axis 1) of its input",
            )
    formula = Formula(view.scope.inside, eps, activation=activation)
    recipe = compiled.recipe_of(input, view, formula, True, None, None) if is_plain() else None
    how = _How(exchange, view, formula, recipe)
    weight, bias = (None if t is None else view.param(t) for t in (weight, bias))
    operands = _Operands(input, weight, bias, view.residual(residual), view.mask(mask, view.params))
    if torch.compiler.is_compiling():
        o = operands.computed()
        pool, stats = _statistics(how, _moments(how, o), o.x.dtype)
        y = eager.apply(o.x, stats, how.formula, o.weight, o.bias, o.residual, o.mask, own=False).to(input.dtype)
    else:
        y, *pool = _Synchronized.apply(how, *operands)  # type: ignore[no-untyped-call]
    _track((running_mean, running_var), _Pool(*pool), momentum)
    return y


class _How(NamedTuple):
    exchange: Exchange
    view: View
    formula: Formula
    recipe: Recipe | None


class _Operands(NamedTuple):
    """The tensors of one normalization; all broadcast against x."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None

    def computed(self) -> _Operands:
        """In the dtype of the computation, and 0 where masked: 0 · NaN is NaN."""
        dtype = COMPUTE_DTYPE[self.x.dtype]
        x, weight, bias, residual = (None if t is None else t.to(dtype) for t in self[:4])
        if self.mask is not None:
            x, residual = (None if t is None else torch.where(self.mask, t, 0) for t in (x, residual))
        return _Operands(x, weight, bias, residual, self.mask)  # type: ignore[arg-type]


class _Pool(NamedTuple):
    """The moments of every channel over all ranks, (C,), float64.

    Attributes:
        share: The cells of this rank per cell of all of them; a rank without any counts as one, as the kernels do.
        cells: m.
        mean: μ.
        var: σ², biased.
    """

    share: Tensor
    cells: Tensor
    mean: Tensor
    var: Tensor


def _moments(how: _How, o: _Operands) -> tuple[Tensor, ...]:
    """Count, mean and variance of this rank's cells, (C,), float64; differentiable."""
    own = eager.statistics(o.x, how.formula, o.mask)
    mean = own.high.double() + (0.0 if own.low is None else own.low.double())
    if o.mask is None:
        count = torch.full_like(mean, how.view.cells)
    else:
        count = o.mask.expand(o.x.shape).sum(how.formula.inside, keepdim=True).double()
    return tuple(t.reshape(-1) for t in (count, mean, own.var.double()))


def _statistics(how: _How, own: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[_Pool, eager.Statistics]:
    """The moments over all ranks from those of each; one message; differentiable."""
    count, mean, var = own
    row = torch.cat([count, mean, var * count])
    counts, means, squares = how.exchange.gather(row).reshape(how.exchange.size, 3, -1).unbind(1)
    total = counts.sum(0)
    kept = total.clamp(min=1)
    mean = (counts * means).sum(0) / kept
    var = (squares + counts * (means - mean).square()).sum(0) / kept
    pool = _Pool(count.clamp(min=1) / kept, total, mean, var)
    high = mean.detach().to(dtype)
    low = (mean - high.double()).to(dtype)
    high, low, var = (how.view.param(t) for t in (high, low, var.to(dtype)))
    return pool, eager.of_moments(high, low, var, how.formula)


def _shared(how: _How, set_g: Tensor, set_gx: Tensor, share: Tensor) -> Tensor:
    """Both sums of every channel over all ranks, (2, C): divided by this rank's cells, the means; one message."""
    row = torch.cat([set_g, set_gx]).double().reshape(-1)
    return (how.exchange.gather(row).sum(0).reshape(2, -1) * share).to(set_g.dtype)


class _Synchronized(torch.autograd.Function):
    """The formula with its hand-derived gradient; x and a few numbers per channel are saved."""

    @staticmethod
    def forward(ctx: Any, how: _How, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        operands = _Operands(*tensors)  # type: ignore[arg-type]
        if how.recipe is None:
            o = operands.computed()
            pool, stats = _statistics(how, _moments(how, o), o.x.dtype)
            y = eager.apply(o.x, stats, how.formula, o.weight, o.bias, o.residual, o.mask, own=True)
            kept: tuple[Tensor | None, ...] = stats
        else:
            steps = Steps(how.recipe, *operands)
            own = steps.statistics()
            high, low, var, _, count = own.double()
            pool, stats = _statistics(how, (count, high + low, var), own.dtype)
            rows = torch.stack([*(t.reshape(-1) for t in stats if t is not None), own[4].clamp(min=1)])
            y = steps.apply(rows)
            kept = (rows,)
        ctx.how = how
        ctx.save_for_backward(*operands, *kept, pool.share)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*pool)
        return y.to(operands.x.dtype), *pool

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, share = ctx.saved_tensors  # unpacked once: checkpoints allow no more
        operands = _Operands(*saved[:5])
        # An output that nobody used is no reason to leave the other ranks waiting.
        gy = torch.zeros_like(operands.x) if grads[0] is None else grads[0]
        needs_x, needs_residual = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        if ctx.how.recipe is None or torch.is_grad_enabled():
            found = _backward(ctx.how, operands.computed(), saved[5:], share, gy, needs_x)
        else:
            steps = Steps(ctx.how.recipe, *operands)
            found = _compiled_backward(ctx.how, steps, saved[5], share, gy, needs_x, needs_residual)
        gradients = (*found[:3], found[3] if needs_residual else None)
        shaped = (
            None if g is None or t is None else g.reshape(t.shape).to(t.dtype)
            for g, t in zip(gradients, operands[:4], strict=True)
        )
        return None, *shaped, None


def _backward(
    how: _How, o: _Operands, stats: Sequence[Tensor], share: Tensor, gy: Tensor, needs_x: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of x, γ, β and the residual in torch's operators; one message, if x needs one."""
    own = not torch.is_grad_enabled()
    gy = gy.to(o.x.dtype)
    # Under create_graph the statistics must be functions of x again, which takes a message more.
    s = eager.Statistics(*stats) if own else _statistics(how, _moments(how, o), o.x.dtype)[1]
    gz, sums = eager.backward_reduce(gy, o.x, s, how.formula, o.weight, o.bias, o.residual, o.mask, own)
    dx = None
    if needs_x:
        set_g, set_gx = (how.view.param(t) for t in _shared(how, sums.set_g, sums.set_gx, share))
        sums = sums._replace(set_g=set_g, set_gx=set_gx)
        dx = eager.backward_apply(sums, s, how.formula, o.weight, o.mask, fixed=False, own=own)
    return dx, sums.weight, sums.bias, gz


def _compiled_backward(
    how: _How, steps: Steps, rows: Tensor, share: Tensor, gy: Tensor, needs_x: bool, needs_residual: bool
) -> tuple[Tensor | None, ...]:
    """The same by the compiled kernels, from what `Steps.statistics` told, completed by the other ranks."""
    dweight, dbias = steps.sums(gy, rows)
    slope = torch.zeros_like(rows[:2])
    if needs_x:
        weight = 1.0 if steps.weight is None else steps.weight
        set_g, set_gx = _shared(how, weight * dbias, weight * dweight, share)
        _, low, _, rstd, count = rows
        b = -set_gx * rstd * rstd / count
        slope = torch.stack([b, -set_g * rstd / count - b * low])
    elif not needs_residual:
        return None, dweight, dbias, None
    dx, dresidual = steps.gradients(gy, rows, slope, needs_residual)
    return dx if needs_x else None, dweight, dbias, dresidual


def _track(running: tuple[Tensor | None, Tensor | None], pool: _Pool, momentum: float | Tensor) -> None:
    """Update the buffers by the moments of all ranks, as if they were those of one cell per channel."""
    mean, unbiased = pool.mean[None], (pool.var * pool.cells / (pool.cells - 1).clamp(min=1))[None]
    view = view_of(mean, SCOPES["BatchNorm"].pattern, {}, "c")
    plain = Formula(view.scope.inside, 0.0, center=False)  # the correction m/(m − 1) is in it already
    for pair, least in (((running[0], None), 1), ((None, running[1]), 2)):
        update_running(pair, (mean, unbiased), view, (pool.cells >= least)[None], momentum, plain)
