"""Normalizers that also decorrelate the channels: batch whitening by eigenvectors or by Newton's iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from normscope.errors import ShapeError
from normscope.functional.core import check_degenerate, view_of
from normscope.functional.running import recomputing
from normscope.functional.torch_named import check_groups
from normscope.nn.base import Tracking, normalizes
from normscope.nn.channels import BATCH, Described, activated, check_channels, check_positive, spread, widened

__all__ = ["DecorrelatedBatchNorm", "IterNorm"]


class _Whitening(Described, Tracking):
    """Base: y = activation(γ · W (x − μ) + β + residual), W = Σ^(−1/2) of every group of channels over the batch.

    Σ = mean over the m positions of the batch of (x − μ)(x − μ)ᵀ, plus ε·I. Subclasses say how W is found.
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor
    running_whitening: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_groups(num_groups)
        check_positive(eps=eps)
        if num_features % num_groups:
            raise ShapeError(
                f"num_channels ({num_features}) must be divisible by num_groups ({num_groups})",
                cure=f"choose num_groups among the divisors of {num_features}",
            )
        self.num_features, self.num_groups, self.eps, self.momentum = num_features, num_groups, eps, momentum
        self.affine = affine
        self.set_activation(activation)
        empty, d = torch.empty(num_features, device=device, dtype=dtype), num_features // num_groups
        self.weight = Parameter(empty) if affine else None
        self.bias = Parameter(torch.empty_like(empty)) if affine and bias else None
        self.register_buffer("running_mean", torch.empty_like(empty))
        self.register_buffer("running_whitening", empty.new_empty(num_groups, d, d))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """γ = 1, β = 0, running mean 0 and whitening matrix I."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def reset_running_stats(self) -> None:
        """Running mean 0 and whitening matrix I, no batch seen."""
        self.running_mean.zero_()
        self.running_whitening.copy_(torch.eye(self.running_whitening.shape[-1]))
        self.num_batches_tracked.zero_()

    @normalizes
    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        """Whiten by the batch, in evaluation by the running mean and matrix.

        Args:
            input: (N, C, *).
            residual: Added before the activation.
            mask: True = keep; (N, *), or input's number of axes and one channel: positions are kept whole.
        """
        check_channels(input, self.num_features)
        view = view_of(input, BATCH, {}, "c")
        keep, added = view.mask(mask, (1,)), view.residual(residual)
        if keep is not None and keep.shape[1] != 1:
            raise ShapeError(
                f"a mask of shape {tuple(keep.shape)} keeps some channels of a position and not others",
                cure="channels are whitened together: pass a mask without the channels axis",
            )
        x = widened(input)
        x = x if keep is None else torch.where(keep, x, 0)
        if self.training:
            check_degenerate(view)
            mean, centered, whitening = self._of_batch(x, keep)
            self._track(x, keep, mean, whitening)
        else:
            centered, whitening = x - spread(self.running_mean, x), self.running_whitening.to(x.dtype)
        z = torch.einsum("gij,ngj...->ngi...", whitening, self._grouped(centered)).reshape(x.shape)
        z = z if self.weight is None else z * spread(self.weight, x)
        z = z if self.bias is None else z + spread(self.bias, x)
        y = activated(z if added is None else z + added, self.activation, keep, input)
        # The product over the channels comes out in a format of its own.
        for memory_format in (torch.channels_last, torch.channels_last_3d):
            if input.is_contiguous(memory_format=memory_format) and not input.is_contiguous():
                y = y.contiguous(memory_format=memory_format)
        return y

    def _of_batch(self, x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """μ, x − μ and W."""
        axes = [0, *range(2, x.dim())]
        m = x[:, :1].numel() if keep is None else keep.expand_as(x[:, :1]).sum()
        m = max(m, 1) if isinstance(m, int) else m.clamp(min=1)
        high = (x.sum(axes) / m).detach()
        centered = x - spread(high, x)
        centered = centered if keep is None else torch.where(keep, centered, 0)
        low = centered.sum(axes) / m  # the rounding of the mean; far from 0 it is not small against σ
        centered = centered - spread(low, x)
        centered = centered if keep is None else torch.where(keep, centered, 0)
        groups = self._grouped(centered).flatten(3) if x.dim() > 2 else self._grouped(centered).unsqueeze(-1)
        sigma = torch.einsum("ngil,ngjl->gij", groups, groups) / m
        return high + low, centered, self.inverse_root(sigma + self.eps * torch.eye(sigma.shape[-1]).to(sigma))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.num_groups, self.num_features // self.num_groups, *x.shape[2:])

    @torch.no_grad()
    def _track(self, x: Tensor, keep: Tensor | None, mean: Tensor, whitening: Tensor) -> None:
        if not x.numel() or recomputing():
            return
        known = mean.isfinite().all() & whitening.isfinite().all()
        known = known if keep is None else known & keep.any()
        for buffer, value in ((self.running_mean, mean), (self.running_whitening, whitening)):
            buffer.copy_(torch.where(known, buffer + self.batch_weight(True) * (value - buffer), buffer))
        self.count_batch(True)

    def inverse_root(self, sigma: Tensor) -> Tensor:
        """Σ^(−1/2) of every group, (g, d, d)."""
        raise NotImplementedError


class IterNorm(_Whitening):
    """Iterative normalization: whitening by Newton's iteration, without eigenvectors.

    y = activation(γ · P_T/√tr Σ · (x − μ) + β + residual), per group of channels and over the batch:
    P_0 = I, P_k = (3·P_{k−1} − P³_{k−1} Σ_N)/2, Σ_N = Σ/tr Σ.

    In the place of BatchNorm where decorrelated features help the optimization, with groups of at most a few dozen
    channels and many more positions than channels in a group, or whitening amplifies the noise of Σ. T iterations
    stretch only the directions with large variance to one: with T = 5 it whitens partly and more stably than
    `DecorrelatedBatchNorm`, which is the limit.

    Args:
        num_features: C.
        num_groups: Groups that the channels are cut into; must divide C.
        iterations: T.
        eps: ε, added to the diagonal of Σ.
        momentum: Weight of the newest batch in the running mean and matrix; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *), or the groups do not divide C.
        DegenerateScopeError: One position in training.

    Source: Huang et al. 2019, Algorithm 1.

    Example:
        >>> import torch, normscope as ns
        >>> mixed = torch.randn(500, 2) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> y = ns.nn.IterNorm(2, affine=False)(mixed)
        >>> torch.allclose(y.T @ y / 500, torch.eye(2), atol=0.01)
        True
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features, num_groups, eps, momentum, affine, device, dtype, bias=bias, activation=activation
        )
        check_positive(iterations=iterations)
        self.iterations = iterations

    def inverse_root(self, sigma: Tensor) -> Tensor:
        """T steps of Newton's iteration on Σ/tr Σ, whose eigenvalues lie where the iteration converges."""
        trace = sigma.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        sigma = sigma / trace
        root = torch.eye(sigma.shape[-1]).to(sigma).expand_as(sigma)
        for _ in range(self.iterations):
            root = (3 * root - root @ root @ root @ sigma) / 2
        return root * trace.rsqrt()


class DecorrelatedBatchNorm(_Whitening):
    """Decorrelated batch normalization: ZCA whitening by the eigenvectors of the covariance.

    y = activation(γ · D Λ^(−1/2) Dᵀ (x − μ) + β + residual), per group of channels and over the batch, Σ = D Λ Dᵀ.
    Of all whitening matrices this one stays nearest to x: no axes are swapped from batch to batch, which ruins PCA.

    In the place of BatchNorm where decorrelated features help the optimization, with groups of at most a few dozen
    channels and many more positions than channels in a group. The decomposition is slow on GPUs; `IterNorm` is not.

    Its gradient is finite where eigenvalues coincide: the derivative of Σ^(−1/2) in the basis D is
    −dΣ_ij/(√λ_i √λ_j (√λ_i + √λ_j)), in which no difference of eigenvalues appears. It can be taken once.

    Args:
        num_features: C.
        num_groups: Groups that the channels are cut into; must divide C.
        eps: ε, added to the diagonal of Σ.
        momentum: Weight of the newest batch in the running mean and matrix; None for the mean of all batches.
        affine: Learn γ and β, of size C.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.

    Raises:
        ShapeError: The input is not (N, C, *), or the groups do not divide C.
        DegenerateScopeError: One position in training.

    Source: Huang et al. 2018, Algorithm 1.

    Example:
        >>> import torch, normscope as ns
        >>> y = ns.nn.DecorrelatedBatchNorm(4, affine=False)(torch.randn(500, 4) @ torch.randn(4, 4))
        >>> torch.allclose(y.T @ y / 500, torch.eye(4), atol=0.01)
        True
    """

    def inverse_root(self, sigma: Tensor) -> Tensor:
        """By eigenvalues and eigenvectors."""
        root: Tensor = _InverseRoot.apply(sigma)  # type: ignore[no-untyped-call]
        return root


class _InverseRoot(torch.autograd.Function):
    """Σ^(−1/2) of symmetric positive definite matrices."""

    @staticmethod
    def forward(ctx: Any, sigma: Tensor) -> Tensor:
        """D Λ^(−1/2) Dᵀ."""
        values, vectors = torch.linalg.eigh(sigma)
        roots = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
        ctx.save_for_backward(roots, vectors)
        root: Tensor = (vectors / roots.unsqueeze(-2)) @ vectors.mT
        return root

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Daleckii and Krein's formula for λ^(−1/2), its divided difference written without the difference."""
        roots, vectors = ctx.saved_tensors
        a, b = roots.unsqueeze(-1), roots.unsqueeze(-2)
        inner = vectors.mT @ grads[0] @ vectors
        gradient: Tensor = -vectors @ (inner / (a * b * (a + b))) @ vectors.mT
        symmetric: Tensor = (gradient + gradient.mT) / 2
        return symmetric
