"""Ranks: how far the running statistics of the processes of one training lie apart.

They meet in the store that torch.distributed was started with, not in a collective: a rank that does not check is named
after a while, where a collective would hang for good.
"""

from __future__ import annotations

import datetime as dt
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from normscope.doctor.measurements import Layer

__all__ = ["agreed", "compare_ranks", "devices_of"]

# Ranks reach the same check at about the same time; reading their loaders may differ by this.
PATIENCE = dt.timedelta(seconds=30)
_checks = itertools.count()


def devices_of(model: torch.nn.Module) -> tuple[str, int]:
    """How a model is spread: "DataParallel" or "distributed" and over how many, ("", 1) for one process."""
    if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
        return "DataParallel", len(model.device_ids)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "distributed", torch.distributed.get_world_size()
    return "", 1


def compare_ranks(layers: Sequence[Layer]) -> tuple[dict[str, float] | None, str]:
    """By normalizer of this rank, the largest distance of the ranks' running means in σ, and why there is none."""
    if _store() is None:
        return None, "the process group has no store"
    tracked = [x for x in layers if x.mean is not None and x.var is not None]
    packed = _gathered(_packed(tracked))
    if packed is None:
        return None, f"not every rank checks its model: after {PATIENCE.seconds} s one is missing"
    theirs = [_unpacked(data) for data in packed]
    found = {}
    for k, layer in enumerate(tracked):
        means, variances = zip(*(other[k] for other in theirs if len(other) == len(tracked)), strict=True)
        spread = np.sqrt(np.maximum(np.mean(variances, axis=0), 0) + layer.eps)
        found[layer.name] = float(np.max(np.ptp(means, axis=0) / spread))
    return found, ""


def agreed(number: int) -> int | None:
    """The smallest of the numbers that the ranks bring here; None where one of them does not come in time."""
    theirs = _gathered(str(number).encode())
    return None if theirs is None else min(int(each) for each in theirs)


def _gathered(mine: bytes) -> list[bytes] | None:
    """What every rank has put into the store; None where one does not."""
    store, world, rank = _store(), torch.distributed.get_world_size(), torch.distributed.get_rank()
    if store is None:
        return None
    stem = f"normscope/{next(_checks)}"
    store.set(f"{stem}/{rank}", mine)
    keys = [f"{stem}/{k}" for k in range(world)]
    try:
        store.wait(keys, PATIENCE)
    except RuntimeError:  # torch's DistStoreError is one
        return None
    return [store.get(key) for key in keys]


def _store() -> Any:
    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        return None


def _packed(layers: Sequence[Layer]) -> bytes:
    buffer = io.BytesIO()
    arrays = {f"{k}{name}": values for k, x in enumerate(layers) for name, values in (("m", x.mean), ("v", x.var))}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(data: bytes) -> list[tuple[Any, Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return [(arrays[f"{k}m"], arrays[f"{k}v"]) for k in range(len(arrays.files) // 2)]
