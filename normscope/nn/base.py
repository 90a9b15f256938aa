"""What every layer of ours adds to torch's: an activation, errors that name the layer's path, and being a leaf for fx."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx

from normscope.errors import NormscopeError, ShapeError
from normscope.functional.core import check_activation

__all__ = ["Layer", "normalizes"]

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
        """torch's own, and the activation where there is one."""
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


def normalizes(forward: Forward) -> Forward:
    """Wrap a layer's forward once at the edge.

    An error leaves with the path of the layer in the model. Under `torch.fx.symbolic_trace` the layer becomes one
    call_module node, as torch's own layers do.
    """

    @functools.wraps(forward)
    def wrapped(self: Layer, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        if torch.compiler.is_compiling():
            return forward(self, input, *args, **kwargs)
        if isinstance(input, fx.Proxy):
            tracer = cast(fx.Tracer, input.tracer)
            leaf = tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
            return cast(Tensor, leaf)
        try:
            return forward(self, input, *args, **kwargs)
        except NormscopeError as error:
            error.context = {"layer": path_of(self), **error.context}
            raise

    return cast(Forward, wrapped)


def check_input_dim(layer: torch.nn.Module, input: Tensor, expects: str) -> None:  # noqa: A002
    """torch's check of the number of axes (or a subclass's), as our error."""
    try:
        layer._check_input_dim(input)  # type: ignore[operator]
    except ValueError as error:
        raise ShapeError(str(error), shape=tuple(input.shape), cure=f"pass {expects}") from None


def path_of(layer: torch.nn.Module) -> str:
    """The layer's name in the outermost model whose forward is running, with its class."""
    frame, models = sys._getframe(1), []
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, torch.nn.Module) and candidate is not layer:
            models.append(candidate)
        frame = frame.f_back  # type: ignore[assignment]
    for model in reversed(models):
        for name, module in model.named_modules():
            if module is layer:
                return f"{name} ({type(layer).__name__})"
    return type(layer).__name__
