"""torch.nn.functional's normalizers, argument for argument, plus activation=, residual= and mask=."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from normscope.errors import ArgumentError, ShapeError
from normscope.functional import shortcut
from normscope.functional.autograd import is_plain
from normscope.functional.core import View, apply, check_dtype, view_of
from normscope.functional.running import Running
from normscope.kernels import COMPUTE_DTYPE
from normscope.kernels.formula import Formula
from normscope.scope import SCOPES

__all__ = ["add_norm", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization over "[n] c [...]", as `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C) or (N, C, *).
        running_mean: (C,), updated in place when training, used when not.
        running_var: (C,), as running_mean; holds the unbiased variance.
        weight: γ, (C,).
        bias: β, (C,).
        training: Normalize by the batch, or by the running statistics.
        momentum: Weight of the batch in the running statistics.
        eps: ε, positive when training.
        activation: See `normscope.normalize`.
        residual: Added before the activation, of input's shape.
        mask: True = keep; input's shape, or (N, *) without the channels.

    Raises:
        ShapeError: Wrong sizes, or one value per channel when training.
        ArgumentError: eps out of range.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Example:
        >>> import torch, normscope as ns
        >>> ns.functional.batch_norm(torch.tensor([[0.0], [2.0]]), None, None, training=True).round(decimals=3)
        tensor([[-1.],
                [ 1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight=weight, bias=bias, training=training,
            momentum=momentum, eps=eps, activation=activation, residual=residual, mask=mask,
        )  # fmt: skip
    way = (batch_norm, training, eps, activation)
    if (
        mask is None
        and (y := shortcut.enter(way, input, weight, bias, residual, running_mean, running_var, momentum)) is not None
    ):
        return y
    check_dtype(input, "batch_norm")
    if input.dim() == 1 and input.numel() == 0:  # torch's one exception to (N, C, *)
        return input.clone()
    if training:
        _verify_batch_size(input.shape, tuple(input.shape))
    if eps < 0 or (training and eps == 0):
        wants = "positive during training" if training else "non-negative"
        raise ArgumentError(f"batch_norm eps must be {wants}, but got {eps}", cure="the usual value is 1e-5")
    view = _channel_view(input, SCOPES["BatchNorm"].pattern)
    _check_channels(view, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_running(running_mean, running_var, needed=not training)
    return _with_running(
        input, view, (running_mean, running_var), training, momentum,
        Formula(view.inside, eps, activation=activation), weight, bias, residual, mask, way,
    )  # fmt: skip


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Instance normalization over "n c [...]", as `torch.nn.functional.instance_norm`.

    Args:
        input: (N, C, *).
        running_mean: (C,), updated in place with the mean over the batch when input statistics are used.
        running_var: (C,), as running_mean; holds the unbiased variance.
        weight: γ, (C,).
        bias: β, (C,).
        use_input_stats: Normalize by the input, or by the running statistics.
        momentum: Weight of the batch in the running statistics.
        eps: ε.
        activation: See `normscope.normalize`.
        residual: Added before the activation, of input's shape.
        mask: True = keep; input's shape, or (N, *) without the channels.

    Raises:
        ShapeError: Wrong sizes, or one value per channel.

    Source: Ulyanov et al. 2016, eq. 5.

    Example:
        >>> import torch, normscope as ns
        >>> ns.functional.instance_norm(torch.tensor([[[0.0, 2.0]]])).round(decimals=3)
        tensor([[[-1.,  1.]]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            instance_norm, tensors, input, running_mean, running_var, weight=weight, bias=bias,
            use_input_stats=use_input_stats, momentum=momentum, eps=eps, activation=activation, residual=residual,
            mask=mask,
        )  # fmt: skip
    way = (instance_norm, use_input_stats, eps, activation)
    if (
        mask is None
        and (y := shortcut.enter(way, input, weight, bias, residual, running_mean, running_var, momentum)) is not None
    ):
        return y
    check_dtype(input, "batch_norm")
    if use_input_stats and math.prod(input.shape[2:]) == 1:
        raise ShapeError(
            f"Expected more than 1 spatial element when training, got input size {input.shape}",
            shape=tuple(input.shape),
            cure="pass (N, C, *) with more than one cell per channel, or use running statistics",
        )
    view = _channel_view(input, SCOPES["InstanceNorm"].pattern)
    _check_channels(view, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if not use_input_stats and (running_mean is None or running_var is None):
        raise ShapeError(
            "Expected running_mean and running_var to be defined when use_input_stats is false",
            cure="pass both, or use_input_stats=True",
        )
    _check_running(running_mean, running_var, needed=False)
    return _with_running(
        input, view, (running_mean, running_var), use_input_stats, momentum,
        Formula(view.inside, eps, activation=activation), weight, bias, residual, mask, way,
    )  # fmt: skip


def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Layer normalization over "... [c]", the trailing axes, as `torch.nn.functional.layer_norm`.

    Args:
        input: (*, *normalized_shape).
        normalized_shape: Sizes of the trailing axes.
        weight: γ, of normalized_shape.
        bias: β, of normalized_shape.
        eps: ε.
        activation: See `normscope.normalize`.
        residual: Added before the activation, of input's shape.
        mask: True = keep; input's shape, or its leading axes.

    Raises:
        ShapeError: Wrong sizes.

    Source: Ba et al. 2016, eq. 3 and 4.

    Example:
        >>> import torch, normscope as ns
        >>> ns.functional.layer_norm(torch.tensor([0.0, 2.0]), (2,)).round(decimals=3)
        tensor([-1.,  1.])
    """
    tensors = (input, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            layer_norm, tensors, input, normalized_shape, weight=weight, bias=bias, eps=eps, activation=activation,
            residual=residual, mask=mask,
        )  # fmt: skip
    return _trailing(
        input, normalized_shape, weight, bias, eps, True, activation, residual, mask, "expected input with shape [*, "
    )


def rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Root-mean-square normalization over "... [c]" without centring, as `torch.nn.functional.rms_norm`.

    Args:
        input: (*, *normalized_shape).
        normalized_shape: Sizes of the trailing axes.
        weight: γ, of normalized_shape.
        eps: ε; None for the machine epsilon of the computation.
        activation: See `normscope.normalize`.
        residual: Added before the activation, of input's shape.
        mask: True = keep; input's shape, or its leading axes.

    Raises:
        ShapeError: Wrong sizes.

    Source: Zhang & Sennrich 2019, eq. 4.

    Example:
        >>> import torch, normscope as ns
        >>> ns.functional.rms_norm(torch.tensor([3.0, 3.0]), (2,)).round(decimals=3)
        tensor([1., 1.])
    """
    tensors = (input, weight, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            rms_norm, tensors, input, normalized_shape, weight=weight, eps=eps, activation=activation,
            residual=residual, mask=mask,
        )  # fmt: skip
    check_dtype(input, "rms_norm")
    if eps is None:
        eps = torch.finfo(COMPUTE_DTYPE[input.dtype]).eps
    return _trailing(
        input, normalized_shape, weight, None, eps, False, activation, residual, mask, "expected input with shape [*"
    )


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Group normalization over "n (g [c]) [...]", as `torch.nn.functional.group_norm`.

    Args:
        input: (N, C, *).
        num_groups: Groups that the channels are cut into; must divide C.
        weight: γ, (C,).
        bias: β, (C,).
        eps: ε.
        activation: See `normscope.normalize`.
        residual: Added before the activation, of input's shape.
        mask: True = keep; input's shape, or (N, *) without the channels.

    Raises:
        ShapeError: Wrong sizes, or channels that the groups do not divide.

    Source: Wu & He 2018, eq. 7.

    Example:
        >>> import torch, normscope as ns
        >>> ns.functional.group_norm(torch.tensor([[0.0, 2.0, 5.0, 7.0]]), 2).round(decimals=3)
        tensor([[-1.,  1., -1.,  1.]])
    """
    tensors = (input, weight, bias, residual, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            group_norm, tensors, input, num_groups, weight=weight, bias=bias, eps=eps, activation=activation,
            residual=residual, mask=mask,
        )  # fmt: skip
    way = (group_norm, num_groups, eps, activation)
    if mask is None and (y := shortcut.enter(way, input, weight, bias, residual)) is not None:
        return y
    check_dtype(input, "GroupNormKernelImpl")
    shape = tuple(input.shape)
    if len(shape) < 2:
        raise ShapeError(
            f"Expected at least 2 dimensions for input tensor but received {len(shape)}",
            shape=shape,
            cure="pass (N, C) or (N, C, *)",
        )
    check_groups(num_groups)
    if shape[1] % num_groups:
        raise ShapeError(
            "Expected number of channels in input to be divisible by num_groups, "
            f"but got input of shape {list(shape)} and num_groups={num_groups}",
            cure=f"choose num_groups among the divisors of {shape[1]}",
        )
    _verify_batch_size([shape[0] * shape[1] // num_groups, num_groups, *shape[2:]], shape)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (shape[1],):
            raise ShapeError(
                f"Expected {name} to be a vector of size equal to the number of channels in input, "
                f"but got {name} of shape {list(tensor.shape)} and input of shape {list(shape)}",
                cure=f"pass {name} of shape ({shape[1]},), or an input with {tensor.numel()} channels",
            )
    x = _autocast(input)
    view = view_of(x, SCOPES["GroupNorm"].pattern, {"g": num_groups}, "c")
    formula = Formula(view.inside, eps, activation=activation)
    keep = view.mask(mask, (1,))
    return apply(x, view, formula, weight=weight, bias=bias, residual=residual, mask=keep, way=way).y


def add_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    center: bool = True,
    activation: str | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x and residual, and return the sum with its layer normalization, as between two transformer blocks.

    Args:
        x: (*, *normalized_shape).
        residual: Of x's shape, or one that broadcasts to it.
        normalized_shape: Sizes of the trailing axes.
        weight: γ, of normalized_shape.
        bias: β, of normalized_shape.
        eps: ε; None for 1e-5, or for RMSNorm the machine epsilon of the computation.
        center: Whether to subtract the mean; without it this is RMSNorm.
        activation: See `normscope.normalize`.
        mask: True = keep; x's shape, or its leading axes. It masks the normalization; the sum is whole.

    Returns:
        The normalized sum, and the sum that the next block adds to.

    Raises:
        ShapeError: Wrong sizes.

    Example:
        >>> import torch, normscope as ns
        >>> normalized, total = ns.functional.add_norm(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), (2,))
        >>> total
        tensor([1., 3.])
    """
    tensors = (x, residual, weight, bias, mask)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            add_norm, tensors, x, residual, normalized_shape, weight=weight, bias=bias, eps=eps, center=center,
            activation=activation, mask=mask,
        )  # fmt: skip
    check_dtype(x, "add_norm")
    if eps is None:
        eps = 1e-5 if center else torch.finfo(COMPUTE_DTYPE[torch.result_type(x, residual)]).eps
    way = _way(normalized_shape, eps, center, activation)
    if mask is None and x.is_contiguous() and (pair := shortcut.enter_sum(way, x, residual, weight, bias)) is not None:
        return pair
    try:
        total = x + residual.expand_as(x)
    except RuntimeError:
        raise ShapeError(
            f"a residual of shape {tuple(residual.shape)} does not fit an input of shape {tuple(x.shape)}",
            cure="pass a residual of the input's shape",
        ) from None
    normalized = _trailing(
        total, normalized_shape, weight, bias, eps, center, activation, None, mask, "expected input with shape [*, "
    )
    return normalized, total


def _way(normalized_shape: Sequence[int], eps: float, center: bool, activation: str | None) -> Hashable:
    return (_trailing, tuple(normalized_shape), eps, center, activation)


def _trailing(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    expected: str,
) -> Tensor:
    if not x.is_contiguous():
        x = _in_format(x)
    way = _way(normalized_shape, eps, center, activation)
    if mask is None and (y := shortcut.enter(way, x, weight, bias, residual)) is not None:
        return y
    check_dtype(x, "LayerNormKernelImpl")
    sizes = list(normalized_shape)
    if not sizes:
        raise ShapeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, "
            "but got normalized_shape = []",
            shape=tuple(x.shape),
            cure=f"name the trailing sizes to normalize over, e.g. {list(x.shape[-1:])}",
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and list(tensor.shape) != sizes:
            raise ShapeError(
                f"Expected {name} to be of same shape as normalized_shape, "
                f"but got {name} of shape {list(tensor.shape)} and normalized_shape = {sizes}",
                shape=tuple(x.shape),
                cure=f"pass {name} of shape {tuple(sizes)}",
            )
    if list(x.shape[-len(sizes) :]) != sizes:
        raise ShapeError(
            f"Given normalized_shape={sizes}, {expected}{', '.join(map(str, sizes))}], "
            f"but got input of size{list(x.shape)}",
            shape=tuple(x.shape),
            cure="the trailing sizes of the input must equal normalized_shape",
        )
    x = _autocast(x)
    names = " ".join(f"c{k}" for k in range(len(sizes))) if len(sizes) > 1 else "c"
    view = view_of(x, SCOPES["LayerNorm"].pattern.replace("c", names), {}, names)
    formula = Formula(view.inside, eps, center, activation=activation)
    keep = view.mask(mask, view.params)
    return apply(x, view, formula, weight=weight, bias=bias, residual=residual, mask=keep, way=way).y


def _in_format(x: Tensor) -> Tensor:
    """x where it lies in torch's other memory format, else a contiguous copy.

    Behind the norm of a permuted map stands a Linear, which would copy the result every time; so torch copies x.
    """
    if not (torch.compiler.is_compiling() or is_plain()):  # transformations and tracers cannot tell how x lies
        return x
    if x.dim() in _FORMATS and x.is_contiguous(memory_format=_FORMATS[x.dim()]):
        return x
    return x.contiguous()


def _with_running(
    x: Tensor,
    view: View,
    running: tuple[Tensor | None, Tensor | None],
    from_input: bool,
    momentum: float | Tensor,
    formula: Formula,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    way: Hashable,
) -> Tensor:
    """Normalize by the input and update the running statistics, or by the running statistics."""
    keep = view.mask(mask, view.params)
    mean = var = None
    if not from_input:
        mean, var = (None if t is None else view.param(t.detach()) for t in running)
    tracks = from_input and (running[0] is not None or running[1] is not None)
    moved = Running(*running, momentum) if tracks else None
    return apply(
        x, view, formula, weight=weight, bias=bias, residual=residual, mean=mean, var=var, mask=keep, running=moved,
        way=way,
    ).y  # fmt: skip


def _channel_view(x: Tensor, pattern: str) -> View:
    if x.dim() < 2:
        raise ShapeError(
            f"expected at least 2D input (got {x.dim()}D input)", shape=tuple(x.shape), cure="pass (N, C) or (N, C, *)"
        )
    return view_of(x, pattern, {}, "c")


def _check_channels(view: View, **tensors: Tensor | None) -> None:
    channels = view.shape[1]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel() != channels:
            raise ShapeError(
                f"{name} should contain {channels} elements not {tensor.numel()}",
                shape=view.shape,
                cure=f"the input has {channels} channels (axis 1); a layer for it has num_features={channels}",
            )


def _check_running(running_mean: Tensor | None, running_var: Tensor | None, *, needed: bool) -> None:
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if needed and tensor is None:
            raise ShapeError(
                f"{name} must be defined in evaluation mode", cure="pass running statistics, or training=True"
            )
    if (running_mean is None) != (running_var is None):
        raise ShapeError(
            "running_mean and running_var must either both be None or neither be None", cure="pass both or none"
        )


def check_groups(num_groups: int) -> None:
    """Refuse zero or fewer groups."""
    if num_groups < 1:
        raise ShapeError(
            f"Expected num groups to be greater than 0, got {num_groups}", cure="use 1 group or more; the usual is 32"
        )


def _verify_batch_size(size: Sequence[int], shape: tuple[int, ...]) -> None:
    if size and math.prod(size[2:]) * size[0] == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got input size {size}",
            shape=shape,
            cure="use a larger batch (drop_last=True drops a last batch of one), eval mode, or GroupNorm or LayerNorm",
        )


def _autocast(x: Tensor) -> Tensor:
    """Where autocast is on, accelerators compute LayerNorm, GroupNorm and RMSNorm in float32; the CPU leaves dtypes."""
    device = x.device.type
    return x.float() if device != "cpu" and x.dtype.itemsize < 4 and torch.is_autocast_enabled(device) else x
