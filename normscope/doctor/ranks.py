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

__all__ = ["compare_ranks", "devices_of"]

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


def compare_ranks(layers: Sequence[Layer], patience: dt.timedelta = PATIENCE) -> tuple[dict[str, float] | None, str]:
    """By normalizer, the largest distance of the ranks' running means in σ, and why there is none.

    Args:
        layers: Of this rank.
        patience: How long to wait for the others; `PATIENCE` by default.
    """
    patience = patience or PATIENCE
    store, world, rank = _store(), torch.distributed.get_world_size(), torch.distributed.get_rank()
    if store is None:
        return None, "the process group has no store"
    tracked = [x for x in layers if x.mean is not None and x.var is not None]
    stem = f"normscope/{next(_checks)}"
    store.set(f"{stem}/{rank}", _packed(tracked))
    keys = [f"{stem}/{k}" for k in range(world)]
    try:
        store.wait(keys, patience)
    except RuntimeError:  # torch's DistStoreError is one
        return None, f"not every rank checks its model: after {patience.seconds} s one is missing"
    theirs = [_unpacked(store.get(key)) for key in keys]
    found = {}
    for k, layer in enumerate(tracked):
        means, variances = zip(*(other[k] for other in theirs if len(other) == len(tracked)), strict=True)
        spread = np.sqrt(np.maximum(np.mean(variances, axis=0), 0) + layer.eps)
        found[layer.name] = float(np.max(np.ptp(means, axis=0) / spread))
    return found, ""


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
