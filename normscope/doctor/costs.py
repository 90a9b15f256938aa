"""Pass P7: what normalizers cost: time with and without them, memory, copies into another layout, waiting for ranks."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope import statistics
from normscope.doctor.cache import Batch
from normscope.doctor.measurements import Costs
from normscope.doctor.ranks import agreed, devices_of
from normscope.records import Interval
from normscope.surgery import desynchronize, feed, find, fold, quiet, switch

__all__ = ["costs_of"]

WARM_UP, ROUNDS, LEAST = 2, 12, 10

Action = Callable[[], object]
Forward = Callable[[Module, Any], Any]


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
    forward: Forward | None,
    device: torch.device | None,
    seconds: float,
    folding: bool = False,
) -> Costs:
    """Time of a training step as it is and without normalization, in turns, and the bytes kept for backward.

    Args:
        model: The model; copies of it run.
        batch: Of the loader.
        forward: The user's forward.
        device: Where to run.
        seconds: What this may take.
        folding: Time inference with and without folding, too.
    """
    clock = _Clock(batch, forward, device, seconds)
    try:
        costs = clock.training(model)
    except Exception as error:
        costs = Costs(problem=f"a training step could not be timed: {_told(error)}")
    if not folding:
        return costs
    try:
        return replace(costs, **clock.inference(model))
    except Exception as error:
        return replace(costs, fold_problem=f"a forward could not be timed: {_told(error)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True, slots=True)
class _Clock:
    """Times copies of a model on one batch."""

    batch: Batch
    forward: Forward | None
    device: torch.device | None
    seconds: float

    def training(self, model: Module) -> Costs:
        """A training step with its normalizers, without them, and with those synchronized that wait for nobody."""
        twin, bare = copy.deepcopy(model).train(), copy.deepcopy(model).train()
        names = _strip(bare)
        synced = devices_of(model)[1] > 1 and any("SyncBatchNorm" in type(f.module).__name__ for f in find(model))
        if synced and agreed(1) is None:
            return Costs(problem="not every rank times its model, and synchronized normalizers wait for all")
        held = _held(twin, self.batch, self.forward, self.device)
        moves = _moves(twin, self.batch, self.forward, self.device)
        rounds, once = self._rounds(lambda: self._step(twin))
        if synced:  # every rank has to take as many steps as the others
            rounds = agreed(rounds) or 0
        if rounds < LEAST:
            return Costs(held=held, problem=f"one step takes {once:.2g} s: the budget has no room for ten of each")
        moved: dict[str, list[float]] = {name: [] for name in moves}
        a, b, _ = self._turns(
            rounds, lambda: self._step(twin), lambda: self._step(bare), lambda: self._copies(moves, moved)
        )
        costs = Costs(
            step=float(np.median(a)),
            saved=_saving(a, b),
            spread=float(np.subtract(*np.percentile(a, [75, 25])) / np.median(a)),
            held=held,
            layers=tuple(names),
            moved={name: 1000 * float(np.median(spent)) for name, spent in moved.items()},
        )
        if not synced:
            return costs
        apart = desynchronize(copy.deepcopy(model).train()).model
        a, b = self._turns(rounds, lambda: self._step(twin), lambda: self._step(apart))
        return replace(costs, synced=_saving(a, b))

    def inference(self, model: Module) -> dict[str, Any]:
        """A forward in evaluation mode, with normalizers folded and as it is."""
        twin = copy.deepcopy(model)
        switch(twin)
        report = fold(twin, self.batch.fresh(self.device), forward=self.forward, copy=True)
        if not report.changed:
            return {"folding": Interval(0.0, 0.0, 0.0, "ms")}
        with quiet():
            rounds, once = self._rounds(lambda: self._pass(twin))
            if rounds < LEAST:
                return {"fold_problem": f"one forward takes {once:.2g} s: the budget has no room for ten of each"}
            a, b = self._turns(rounds, lambda: self._pass(twin), lambda: self._pass(report.model))
        return {"inference": float(np.median(a)), "folded": report.changed, "folding": _saving(a, b)}

    def _rounds(self, action: Action) -> tuple[int, float]:
        """How many turns of two actions the time allows, and the seconds of one."""
        start = time.perf_counter()
        action()
        once = time.perf_counter() - start
        return min(ROUNDS, int(self.seconds / max(4 * once, 1e-9))), once

    def _turns(self, rounds: int, *actions: Action) -> list[Any]:
        """Milliseconds of some actions in turns, each of them as often the first of a turn as the others."""
        for _ in range(WARM_UP):
            for action in actions:
                action()
        spent: list[list[float]] = [[] for _ in actions]
        for k in range(rounds):
            for place in range(len(actions)):
                kind = (k + place) % len(actions)
                start = time.perf_counter()
                actions[kind]()
                spent[kind].append(time.perf_counter() - start)
        return [1000 * np.array(each) for each in spent]

    def _step(self, model: Module) -> None:
        model.zero_grad()
        with torch.enable_grad():
            output = feed(model, self.batch.fresh(self.device), self.forward)
            tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors])
        self._wait()

    def _pass(self, model: Module) -> None:
        feed(model, self.batch.fresh(self.device), self.forward)
        self._wait()

    def _copies(self, moves: dict[str, Any], spent: dict[str, list[float]]) -> None:
        """Note the seconds that copying such a tensor into the other order takes, and its gradient back."""
        for name, (shape, here, there, dtype) in moves.items():
            x = torch.empty_strided(shape, here, dtype=dtype, device=self.device).fill_(1)
            start = time.perf_counter()
            y = torch.empty_strided(shape, there, dtype=dtype, device=self.device).copy_(x)
            torch.empty_strided(shape, here, dtype=dtype, device=self.device).copy_(y)
            self._wait()
            spent[name].append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize()


def _saving(a: Any, b: Any) -> Interval:
    saved = statistics.bootstrap_difference(a, b, level=0.99, resamples=2000, seed=0)
    return Interval(saved.value, saved.low, saved.high, "ms")


def _moves(model: Module, batch: Batch, forward: Forward | None, device: torch.device | None) -> dict[str, Any]:
    """By normalizer whose output lies otherwise than its input: shape, both strides, dtype."""
    found: dict[str, Any] = {}

    def see(name: str) -> Callable[[Module, Any, Any], None]:
        def compare(_: Module, args: Any, y: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.stride() != y.stride():
                rows = zip(x.shape, x.stride(), y.stride(), strict=True)
                if _dense(x) and _dense(y) and any(a != b for n, a, b in rows if n > 1):
                    found[name] = (x.shape, x.stride(), y.stride(), x.dtype)

        return compare

    norms = [f for f in find(model) if not isinstance(f.module, torch.jit.ScriptModule)]
    handles = [f.module.register_forward_hook(see(f.name)) for f in norms]
    try:
        with quiet():
            feed(model, batch.fresh(device), forward)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _dense(t: Tensor) -> bool:
    """Whether its cells fill one piece of memory, in whatever order."""
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) == t.numel()


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
