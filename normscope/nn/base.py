"""What every layer of ours adds to torch's: an activation, errors that name the layer's path, a leaf for fx."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx

from normscope.errors import NormscopeError, RecomputationError, ShapeError
from normscope.functional.core import check_activation
from normscope.functional.running import recomputing
from normscope.kernels import COMPUTE_DTYPE

__all__ = ["Layer", "Lazy", "Tracking", "check_input_dim", "normalizes", "path_of"]

Forward = TypeVar("Forward", bound=Callable[..., Tensor])


class Layer(torch.nn.Module):
    """Mixin of all layers.

    Attributes:
        activation: Applied after γ · x̂ + β + residual; a name of the table in `normscope.normalize`, or None.
    """

    activation: str | None = None

    def set_activation(self, activation: str | None) -> None:
        """Choose the activation; an unknown name raises ArgumentError."""
        check_activation(activation)
        self.activation = activation

    def extra_repr(self) -> str:
        """Show what torch shows, and the activation where there is one."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class Tracking(Layer):
    """Mixin of the layers with running statistics.

    Attributes:
        momentum: Weight of the newest batch; None for the cumulative mean of all batches.
        num_batches_tracked: How many batches have entered; None where nothing is tracked.
    """

    momentum: float | None
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def batch_weight(self, counts: bool) -> float | Tensor:
        """The weight of this batch; a tensor for the cumulative mean, so that compilers follow."""
        if self.momentum is not None:
            return self.momentum
        if not counts or self.num_batches_tracked is None:
            return 0.0
        # As wide as what it multiplies: 1/3 in float32 is wrong by 1e-8.
        dtype = torch.float32 if self.running_mean is None else COMPUTE_DTYPE[self.running_mean.dtype]
        return (self.num_batches_tracked + 1).to(dtype).reciprocal()

    def count_batch(self, counts: bool) -> None:
        """Count a batch once it has entered: not one that raised, nor one that a checkpoint computes again."""
        if counts and self.num_batches_tracked is not None and not recomputing():
            self.num_batches_tracked.add_(1)

    def refuse_recomputing(self) -> None:
        """Refuse to be computed again by a layer whose output in training depends on what this batch has moved."""
        if recomputing():
            raise RecomputationError(
                f"{type(self).__name__} cannot be computed again in backward: this batch has moved the statistics that "
                "its output depends on",
                cure="leave this layer out of activation checkpointing: checkpoint what lies before and behind it",
            )


class Lazy(Tracking):
    """The constructor of the lazy layers: without num_features, which the first input tells.

    Args:
        eps: ε.
        momentum: Weight of the newest batch in the running statistics; None for the mean of all batches.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics.
        device: As in torch.
        dtype: As in torch.
        bias: Learn β; γ alone without it.
        activation: Applied last; see `normscope.normalize`.
    """

    def __init__(
        self,
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
        torch.nn.modules.batchnorm._LazyNormBase.__init__(
            self,  # type: ignore[arg-type]
            eps, momentum, affine, track_running_stats, device, dtype,
        )  # fmt: skip
        if not bias:
            self.register_parameter("bias", None)
        self.set_activation(activation)


def normalizes(forward: Forward) -> Forward:
    """Wrap a layer's forward once at the edge.

    An error leaves with the path of the layer in the model. Under `torch.fx.symbolic_trace` the layer becomes one
    call_module node, as torch's own layers do.
    """

    @functools.wraps(forward)
    def wrapped(self: Layer, input: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        if torch.compiler.is_compiling():
            return forward(self, input, *args, **kwargs)
        if isinstance(input, fx.Proxy):
            tracer = cast(fx.Tracer, input.tracer)
            leaf = tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
            return cast(Tensor, leaf)
        if torch._C._get_tracing_state() is not None:  # sizes are traced too; checks on them are no news to the user
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                return forward(self, input, *args, **kwargs)
        try:
            return forward(self, input, *args, **kwargs)
        except NormscopeError as error:
            error.context = {"layer": path_of(self), **error.context}
            raise

    return cast(Forward, wrapped)


def check_input_dim(layer: torch.nn.Module, input: Tensor, expects: str) -> None:  # noqa: A002
    """Run torch's check of the number of axes (or a subclass's), as our error."""
    try:
        layer._check_input_dim(input)  # type: ignore[operator]
    except ValueError as error:
        raise ShapeError(str(error), shape=tuple(input.shape), cure=f"pass {expects}") from None


def path_of(layer: torch.nn.Module) -> str:
    """The layer's name in the outermost model whose forward is running, with its class."""
    frame: FrameType | None = sys._getframe(1)
    models: list[torch.nn.Module] = []
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, torch.nn.Module) and candidate is not layer:
            models.append(candidate)
        frame = frame.f_back
    for model in reversed(models):
        for name, module in model.named_modules():
            if module is layer:
                return f"{name} ({type(layer).__name__})"
    return type(layer).__name__
