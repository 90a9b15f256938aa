"""Which batches enter the running statistics: pause them, or take back what has entered.

Two kinds of batches keep themselves out without a word, in this package's layers: one that activation checkpointing
computes a second time, and, channel by channel, one whose mean or variance is not finite.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from normscope.errors import ArgumentError
from normscope.surgery.find import Select, find

__all__ = ["Provisional", "pause_statistics", "provisional_statistics"]


@contextlib.contextmanager
def pause_statistics(model: Module, *, select: Select = None) -> Iterator[None]:
    """Within the block no running statistic moves; batches are normalized as ever.

    For forwards that are not the training data: a second view, an attack, a probe, all micro-batches but one. Every
    normalizer of a model counts, of any library: its forward writes into copies of its buffers. Code that
    `torch.compile` has made runs step by step within the block, as it would not see that.

    Args:
        model: The model.
        select: Which normalizers; see `freeze`.

    Raises:
        ArgumentError: `select` matches nothing, or a layer is lazy and not initialized, or TorchScript.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.BatchNorm1d(2)
        >>> with ns.pause_statistics(model):
        ...     _ = model(torch.randn(8, 2))
        >>> model.running_mean, model.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """
    kept: dict[int, dict[str, Tensor | None]] = {}

    def enter(module: Module, _: object) -> None:
        kept[id(module)] = dict(module._buffers)
        module._buffers.update({name: None if b is None else b.detach().clone() for name, b in module._buffers.items()})

    def leave(module: Module, *_: object) -> None:
        module._buffers.update(kept.pop(id(module), {}))

    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it would take a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, _ in _tracked(model, select):
            if isinstance(module, torch.jit.ScriptModule):
                raise ArgumentError("TorchScript cannot be paused", cure="use provisional_statistics and roll back")
            # The outermost of the hooks: what the user's own see is what the forward sees.
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class Provisional:
    """Running statistics that can still be taken back; made by `provisional_statistics`."""

    def __init__(self, tracked: list[tuple[Module, dict[str, Tensor]]]) -> None:
        self._tracked = tracked
        self.commit()

    def commit(self) -> None:
        """Keep what has entered so far: a later `rollback` goes back to here."""
        self._before = [(m, {name: b.detach().clone() for name, b in buffers.items()}) for m, buffers in self._tracked]

    def rollback(self) -> None:
        """Take back what has entered since the beginning, or the last `commit`."""
        with torch.no_grad():
            for module, buffers in self._before:
                for name, buffer in buffers.items():
                    module.get_buffer(name).copy_(buffer)


@contextlib.contextmanager
def provisional_statistics(model: Module, *, select: Select = None) -> Iterator[Provisional]:
    """Within the block batches enter the running statistics on approval.

    They stay when the block ends well, are taken back when it ends by an exception, and by `.rollback()` at any time in
    it, for a step that a gradient scaler skips. `.commit()` makes what has entered so far final.

    Args:
        model: The model.
        select: Which normalizers; see `freeze`.

    Raises:
        ArgumentError: `select` matches nothing, or a layer is lazy and not initialized.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.BatchNorm1d(2)
        >>> with ns.provisional_statistics(model) as statistics:
        ...     loss = model(torch.tensor([[1.0, 2.0], [3.0, float("inf")]])).sum()
        ...     if not loss.isfinite():
        ...         statistics.rollback()
        >>> model.running_mean
        tensor([0., 0.])
    """
    statistics = Provisional(list(_tracked(model, select)))
    try:
        yield statistics
    except BaseException:
        statistics.rollback()
        raise


def _tracked(model: Module, select: Select) -> Iterator[tuple[Module, dict[str, Any]]]:
    """The normalizers with state that batches move, and their buffers."""
    for found in find(model, select):
        buffers = dict(found.module.named_buffers(recurse=False))
        if any(map(is_lazy, buffers.values())):
            raise ArgumentError("a lazy layer has no statistics yet", layer=found.name, cure="run one forward first")
        if buffers:
            yield found.module, buffers
