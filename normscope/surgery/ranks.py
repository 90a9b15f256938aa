"""Several processes that measure one model together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from normscope.errors import ArgumentError, SynchronizationError
from normscope.nn.collective import Exchange, alone

__all__ = ["agree", "in_step", "ranks_of", "tell"]

Batch = TypeVar("Batch")
# Seconds to wait for the others, which may have much more data; one that has died is noticed at once.
PATIENCE = 1800.0


def ranks_of(group: Any) -> Exchange | None:
    """The line to the other ranks of a group; None where this process is alone or wants to be.

    Raises:
        ArgumentError: The group is a text other than "own".
    """
    if isinstance(group, str) and group != "own":
        raise ArgumentError(f"group {group!r} is unknown", cure='pass a process group, None for all ranks, or "own"')
    if group == "own" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    size = dist.get_world_size(group)
    return None if size < 2 else Exchange(group, dist.get_rank(group), size, "recalibrate", PATIENCE)


def tell(ranks: Exchange, numbers: Tensor | Sequence[float]) -> Tensor:
    """The numbers of all ranks, (size, n), in float64 on the CPU."""
    device = "cuda" if dist.get_backend(ranks.group) == "nccl" else "cpu"
    return ranks.gather(torch.as_tensor(numbers, dtype=torch.float64, device=device)).cpu()


def agree(ranks: Exchange, *, failed: bool = False) -> None:
    """Wait until all ranks have measured.

    Raises:
        SynchronizationError: One of the others failed.
    """
    states = tell(ranks, [failed])[:, 0]
    if states.any() and not failed:
        raise SynchronizationError(
            "another rank could not measure, so that the statistics of all ranks together are unknown",
            ranks=states.nonzero()[:, 0].tolist(),
            cure="see the error on that rank; the model is as it was on every rank",
        )


def in_step(loader: Iterable[Batch], ranks: Exchange | None) -> Generator[Batch]:
    """Batch by batch with the other ranks: layers synchronize only while every rank has one; None for no waiting."""
    everyone, rest = ranks is not None, iter(loader)
    while True:
        batch = next(rest, _END)
        if everyone and ranks is not None:
            everyone = bool(tell(ranks, [batch is not _END]).all())
        if isinstance(batch, _End):
            return
        with contextlib.nullcontext() if everyone else alone():
            yield batch


class _End:
    """What comes behind the last batch."""


_END = _End()
