"""What the ranks of a process group tell each other, and what happens when one of them is not there."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from normscope.errors import SynchronizationError
from normscope.nn.base import path_of

__all__ = ["Exchange", "Grouped", "alone", "exchange_of"]

# Doubles per message on a CPU, enough for three numbers of 2048 channels and the name. Messages of one size, because
# gloo ends the process where two ranks send different sizes, that is, where they are at different layers; longer rows
# go in several. A full message costs what a short one does (4 ranks, loopback: 4.4 ms for 1.6 KB and for 64 KB).
PACKET = 3 * 2048 + 1

_ALONE = False
_NAMES: weakref.WeakKeyDictionary[Module, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Exchange:
    """One layer's line to the other ranks.

    Attributes:
        group: The process group.
        rank: This process within it.
        size: How many there are.
        layer: Path and class of the layer, the same on every rank.
        timeout: Seconds to wait for the others.
    """

    group: Any
    rank: int
    size: int
    layer: str
    timeout: float

    def gather(self, row: Tensor) -> Tensor:
        """The rows of all ranks, (size, n), from one of n on each; differentiable to any order.

        Raises:
            SynchronizationError: Another rank is at another layer, or does not come.
        """
        return _Gather.apply(row, self)  # type: ignore[no-untyped-call, no-any-return]

    def _gather(self, row: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            gathered = torch.ops._c10d_functional.all_gather_into_tensor(row, self.size, self.group.group_name)
            return torch.ops._c10d_functional.wait_tensor(gathered).view(self.size, -1)  # type: ignore[no-any-return]
        width = PACKET - 1 if row.device.type == "cpu" else max(row.numel(), 1)
        return torch.cat([self._send(part, width)[:, : part.numel()] for part in torch.split(row, width)], dim=1)

    def _send(self, part: Tensor, width: int) -> Tensor:
        message = part.new_zeros(width + 1)
        message[0], message[1 : part.numel() + 1] = _number(self.layer), part
        received = message.new_empty(self.size, width + 1)
        self._wait(dist.all_gather, list(received.unbind()), message)
        self._check(received[:, 0])
        return received[:, 1:]

    def _reduce(self, rows: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            total = torch.ops._c10d_functional.all_reduce(rows, "sum", self.group.group_name)
            return torch.ops._c10d_functional.wait_tensor(total)[self.rank]  # type: ignore[no-any-return]
        rows = rows.contiguous().clone()
        self._wait(dist.all_reduce, rows)
        return rows[self.rank]

    def _wait(self, collective: Callable[..., Any], *tensors: Any) -> None:
        on_cpu = tensors[-1].device.type == "cpu"
        try:
            work = collective(*tensors, group=self.group, async_op=True)
            # Elsewhere the stream waits and the host does not: a limit would make it.
            work.wait(timedelta(seconds=self.timeout)) if on_cpu else work.wait()
        except RuntimeError as error:
            raise SynchronizationError(
                f"rank {self.rank} is alone with the statistics of {self.layer}: {str(error).splitlines()[0]}",
                ranks=dist.get_process_group_ranks(self.group),
                cure="every rank must call this layer, in the same order, with no sample if it has none; "
                f"SyncBatchNorm.timeout ({self.timeout:g} s) is the patience",
            ) from error

    def _check(self, numbers: Tensor) -> None:
        same = numbers == _number(self.layer)
        if numbers.device.type != "cpu":  # without waiting for the device
            torch._assert_async(same.all(), f"other ranks are at other layers than {self.layer}")
        elif not same.all():  # as on every rank
            layers: list[str] = [""] * self.size
            dist.all_gather_object(layers, self.layer, group=self.group)
            raise SynchronizationError(
                "the ranks are at different layers",
                **{f"rank {rank}": layer for rank, layer in enumerate(layers)},
                cure="every rank must call the synchronized layers in the same order, with no sample if it has none",
            )


class _Gather(torch.autograd.Function):
    """The rows of all ranks; backward, what all ranks have for this one's row."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._gather(row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Reduce.apply(grads[0], ctx.exchange), None  # type: ignore[no-untyped-call]


class _Reduce(torch.autograd.Function):
    """The adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._reduce(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grads[0], ctx.exchange), None  # type: ignore[no-untyped-call]


class Grouped(Module):
    """Mixin of the layers that talk to other ranks.

    Attributes:
        process_group: The ranks that share statistics; None for all. Copies of the layer keep it; it cannot be
            pickled, and is None after loading.
    """

    process_group: Any

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "process_group": _Handle(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "process_group": state["process_group"].group})  # type: ignore[no-untyped-call]


class _Handle:
    """A process group on its way into a copy."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return self

    def __reduce__(self) -> tuple[type[_Handle], tuple[()]]:
        return _Handle, ()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block every layer computes by itself: the other ranks may be elsewhere."""
    global _ALONE
    before, _ALONE = _ALONE, True
    try:
        yield
    finally:
        _ALONE = before


def exchange_of(layer: Module, group: Any, timeout: float) -> Exchange | None:
    """A layer's line to the other ranks; None where it is alone, or does not train."""
    if _ALONE or not (layer.training and dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    return None if size < 2 else Exchange(group, dist.get_rank(group), size, _name(layer), timeout)


def _name(layer: Module) -> str:
    """Found once: when a checkpoint computes the layer again, no model's forward is running."""
    if torch.compiler.is_compiling():
        return type(layer).__name__
    if layer not in _NAMES:
        _NAMES[layer] = path_of(layer)
    return _NAMES[layer]


def _number(name: str) -> int:
    return zlib.crc32(name.encode())
