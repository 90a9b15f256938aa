"""Pass P7: what normalizers cost: time of a training step with and without them, and the memory that they hold."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope import statistics
from normscope.doctor.cache import Batch
from normscope.doctor.measurements import Costs
from normscope.records import Interval
from normscope.surgery import feed, find

__all__ = ["costs_of"]

WARM_UP, ROUNDS = 2, 12


class Affine(nn.Module):
    """A normalizer with identity statistics: what is left is γ·x + β."""

    def __init__(self, norm: Module) -> None:
        super().__init__()
        self.weight, self.bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        last = isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
        self.last, self.running_mean, self.running_var = last, None, None

    def forward(self, x: Tensor) -> Tensor:
        """γ·x + β along the axis where the normalizer has them."""
        shape = self.weight.shape if self.last and self.weight is not None else (-1, *(1,) * (x.dim() - 2))
        if self.weight is not None:
            x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


def costs_of(
    model: Module,
    batch: Batch,
    forward: Callable[[Module, Any], Any] | None,
    device: torch.device | None,
    seconds: float,
) -> Costs:
    """Time of a training step as it is and without normalization, in turns, and the bytes kept for backward.

    Args:
        model: The model; copies of it run.
        batch: Of the loader.
        forward: The user's forward.
        device: Where to run.
        seconds: What this may take.
    """
    try:
        twin, bare = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        names = _strip(bare)
        held = _held(twin, batch, forward, device)
        start = time.perf_counter()
        _step(twin, batch, forward, device)
        once = time.perf_counter() - start
        rounds = min(ROUNDS, int(seconds / max(4 * once, 1e-9)))
        if rounds < 10:
            return Costs(held=held, problem=f"one step takes {once:.2g} s: the budget has no room for ten of each")
        for _ in range(WARM_UP):
            _step(bare, batch, forward, device)
        with_norms: list[float] = []
        without: list[float] = []
        for k in range(rounds):
            for kind in ((0, 1), (1, 0))[k % 2]:
                start = time.perf_counter()
                _step((twin, bare)[kind], batch, forward, device)
                (with_norms, without)[kind].append(time.perf_counter() - start)
    except Exception as error:
        return Costs(problem=f"a training step could not be timed: {type(error).__name__}: {error}".splitlines()[0])
    a, b = (1000 * np.array(values) for values in (with_norms, without))
    saved = statistics.bootstrap_difference(a, b, level=0.99, resamples=2000, seed=0)
    spread = float(np.subtract(*np.percentile(a, [75, 25])) / np.median(a))
    return Costs(
        step=float(np.median(a)),
        saved=Interval(saved.value, saved.low, saved.high, "ms"),
        spread=spread,
        held=held,
        layers=tuple(names),
    )


def _strip(model: Module) -> list[str]:
    """Put identity statistics in place of all normalizers that are no root."""
    names = []
    for found in find(model):
        if found.kind == "custom" or "" in found.paths or isinstance(found.module, torch.jit.ScriptModule):
            continue
        for path in found.paths:
            parent, _, own = path.rpartition(".")
            setattr(model.get_submodule(parent), own, Affine(found.module))
        names.append(found.name)
    return names


def _step(model: Module, batch: Batch, forward: Callable[[Module, Any], Any] | None, device: Any) -> None:
    model.zero_grad()
    with torch.enable_grad():
        output = feed(model, batch.fresh(device), forward)
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()


def _held(model: Module, batch: Batch, forward: Any, device: Any) -> dict[str, int]:
    """Bytes that autograd keeps because of each normalizer: what it saves and nothing before it has saved."""
    held: dict[str, int] = {}
    running: list[str] = []
    seen: set[int] = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        place = t.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            kept.append(t.detach())
            if running:
                held[running[-1]] = held.get(running[-1], 0) + t.untyped_storage().nbytes()
        return t

    handles = []
    for found in find(model):
        if not isinstance(found.module, torch.jit.ScriptModule):
            handles.append(found.module.register_forward_pre_hook(lambda *_, name=found.name: running.append(name)))
            handles.append(found.module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            feed(model, batch.fresh(device), forward)
    finally:
        for handle in handles:
            handle.remove()
    return held
