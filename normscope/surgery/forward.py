"""How a batch of the user's loader goes into the user's model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.errors import ArgumentError

__all__ = ["Forward", "feed", "quiet", "switch"]

Forward = Callable[[Module, Any], Any]


def feed(model: Module, batch: Any, forward: Forward | None = None) -> Any:
    """The model's output on a batch.

    Args:
        model: The model.
        batch: A tensor; a tuple or list, whose first element is the input; or a dictionary, of which the entries that
            `model.forward` names are passed by name, or, where it names none, the first.
        forward: What to call instead, as `forward(model, batch)`; without it tensors are moved to the model's device.

    Raises:
        ArgumentError: The batch is none of these.
    """
    if forward is not None:
        return forward(model, batch)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if device is not None:
        batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
    if isinstance(batch, dict):
        named = _named(model, batch)
        if named:
            return model(**named)
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise ArgumentError(
            f"a batch of type {type(batch).__name__} holds no input where one is expected",
            cure="let the loader yield tensors, tuples or dictionaries of them, or pass forward=lambda model, batch: …",
        )
    return model(batch)


def _named(model: Module, batch: dict[Any, Any]) -> dict[str, Any]:
    target = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
    parameters = inspect.signature(target.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in batch.items() if key in names}


def switch(model: Module, training: bool = False) -> None:
    """Evaluation or training mode; a graph of torch.export has its mode built in and refuses both."""
    with contextlib.suppress(NotImplementedError):
        model.train(training)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without gradients, and compiled code step by step: it would be compiled again for hooks that soon go."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
