"""Trials: small experiments on a part of split B that only suspects get, each of which one rule asks for."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.doctor import gates
from normscope.doctor.cache import Batch, few_of, regroup
from normscope.doctor.measurements import (
    Array,
    Drift,
    Effect,
    Layer,
    Moments,
    Outcome,
    Padding,
    Rescaled,
    Site,
)
from normscope.doctor.patient import Patient, Watch
from normscope.doctor.thresholds import Thresholds

__all__ = ["Trials", "lengths_of", "map_first", "padded_changes", "populations"]

# End points of running averages that are drawn, and the batches of each.
DRAWS = 8
REACH = 64
# Samples of a batch that are run one by one.
MOST_ALONE = 32


@dataclass(slots=True)
class Trials:
    """What the experiments need.

    Attributes:
        patient: The model.
        a: Batches to measure on.
        b: Batches to score on.
        now: The score in evaluation mode on `b`.
    """

    patient: Patient
    a: tuple[Batch, ...]
    b: tuple[Batch, ...]
    now: Outcome
    thresholds: Thresholds
    seed: int

    def against(self, outcome: Outcome) -> Effect:
        """What the model loses now against another state."""
        return gates.effect(self.now, outcome, self.thresholds, self.seed)

    # --- 112, 502 -------------------------------------------------------------------------------------------------

    def biased(self, values: Mapping[str, float]) -> Effect:
        """Against running variances times (n − 1)/n, which is what normalized the batches in training."""
        changed = {}
        for found in self.patient.trackers:
            n = values.get(found.name, 0.0)
            if n > 1:
                mean, var = (found.module.get_buffer(name).detach() for name in ("running_mean", "running_var"))
                changed[found.name] = (mean.clone(), var * ((n - 1) / n))
        with self.patient.with_statistics(changed):
            return self.against(self.patient.score("variances as in training (B, part)", self.b))

    def other_eps(self, names: Sequence[str], factor: float) -> Effect:
        """Against another ε in some layers."""
        held: list[tuple[Any, Any]] = [(f.module, f.module.eps) for f in self.patient.layers if f.name in names]
        try:
            for module, eps in held:
                module.eps = float(eps) * factor
            with self.patient.evaluating():
                return self.against(self.patient.score(f"ε × {factor:g} (B, part)", self.b))
        finally:
            for module, eps in held:
                module.eps = eps

    # --- 105 ------------------------------------------------------------------------------------------------------

    def averages(self, layers: Sequence[Layer], own: Mapping[str, Moments]) -> Array | None:
        """The mean score at end points of exponential averages over the batches of `own` in random orders."""
        rng = np.random.default_rng(self.seed)
        scores = []
        for _ in range(DRAWS):
            statistics = {}
            order: dict[int, np.ndarray[Any, Any]] = {}
            for layer in layers:
                m, data = layer.momentum or 0.1, own[layer.name]
                k = len(data.means)
                weights = m * (1 - m) ** np.arange(REACH)
                drawn = order.setdefault(k, rng.integers(k, size=REACH))
                weights /= weights.sum()
                mean, var = weights @ data.means[drawn], weights @ data.vars[drawn]
                statistics[layer.name] = (torch.from_numpy(mean), torch.from_numpy(var))
            with self.patient.with_statistics(statistics):
                outcome = self.patient.score("end points of running averages (B, part)", self.b)
            values = outcome.metric if outcome.metric is not None else outcome.loss
            if values is None:
                return None
            scores.append(float(np.nan_to_num(values).mean()))
        return np.array(scores)

    # --- 107 ------------------------------------------------------------------------------------------------------

    def by_site(self, pooled: Mapping[str, tuple[Tensor, Tensor]], data: Mapping[str, Moments]) -> Effect:
        """What statistics of all calls together lose against statistics of each call, all other layers pooled."""
        with self.patient.with_statistics(pooled):
            together = self.patient.score("one statistic for all calls (B, part)", self.b)
        with self.patient.with_statistics(pooled), self._switching(data):
            apart = self.patient.score("a statistic for every call (B, part)", self.b)
        return gates.effect(together, apart, self.thresholds, self.seed)

    @contextlib.contextmanager
    def _switching(self, data: Mapping[str, Moments]) -> Iterator[None]:
        counts = dict.fromkeys(data, 0)

        def switch(name: str) -> Callable[[Module, Any], None]:
            def before(module: Module, _: Any) -> None:
                site = data[name].sites[counts[name] % len(data[name].sites)]
                counts[name] += 1
                for buffer, value in (("running_mean", site.mean), ("running_var", site.var)):
                    module.get_buffer(buffer).copy_(torch.from_numpy(value).view_as(module.get_buffer(buffer)))

            return before

        handles = [f.module.register_forward_pre_hook(switch(f.name)) for f in self.patient.trackers if f.name in data]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- 109 ------------------------------------------------------------------------------------------------------

    def rescaled(self, first: Layer, drift: Drift) -> Rescaled | None:
        """The input map under which the first normalizer's data fit its statistics best, if the model gains by it."""
        if not self.a or first.mean is None or first.var is None:
            return None
        here = self._fit(first, None)
        fits = {name: self._fit(first, change) for name, change in _MAPS.items()}
        fits = {name: fit for name, fit in fits.items() if np.isfinite(fit)}
        if not fits:
            return None
        best = min(fits, key=lambda name: fits[name])
        if not fits[best] < here / 2:
            return None
        mapped = tuple(replace(batch, data=map_first(batch.data, _MAPS[best])) for batch in self.b)
        with self.patient.evaluating():
            outcome = self.patient.score(f"inputs {best} (B, part)", mapped)
        return Rescaled(best, float(np.exp(np.median(drift.rho))), self.against(outcome))

    def _fit(self, first: Layer, change: Callable[[Tensor], Tensor | None] | None) -> float:
        """The mean over channels of the divergence between normal distributions, data from statistics."""
        found = [f for f in self.patient.trackers if f.name == first.name]
        mapped = []
        for batch in self.a[:2]:
            data = batch.data if change is None else map_first(batch.data, change)
            if data is None:
                return np.inf
            mapped.append(replace(batch, data=data))
        with self.patient.evaluating(), Watch(found, False) as watch:
            for batch in mapped:
                try:
                    self.patient.run(batch)
                except Exception:
                    return np.inf
                watch.commit(batch.size)
        data = watch.moments().get(first.name)
        if data is None or first.mean is None or first.var is None:
            return np.inf
        with np.errstate(all="ignore"):
            ratio = (data.var + first.eps) / (first.var + first.eps)
            shift = (data.mean - first.mean) ** 2 / (first.var + first.eps)
            divergence = 0.5 * (ratio + shift - 1 - np.log(ratio))
        return float(np.median(divergence[np.isfinite(divergence)])) if np.isfinite(divergence).any() else np.inf


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _per_channel(x: Tensor, numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=x.dtype, device=x.device).view(1, 3, *(1,) * (x.dim() - 2))


def _image(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] == 3


_MAPS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "× 255": lambda x: x * 255,
    "÷ 255": lambda x: x / 255,
    "2x − 1": lambda x: 2 * x - 1,
    "(x + 1)/2": lambda x: (x + 1) / 2,
    "standardized": lambda x: (x - x.mean()) / x.std().clamp(min=1e-12),
    "standardized by channel": lambda x: (
        None if x.dim() < 3 else (x - x.mean((0, *range(2, x.dim())), keepdim=True))
        / x.std((0, *range(2, x.dim())), keepdim=True).clamp(min=1e-12)
    ),
    "standardized as for ImageNet": lambda x: (
        (x - _per_channel(x, _MEAN)) / _per_channel(x, _STD) if _image(x) else None
    ),
    "with ImageNet's standardization undone": lambda x: (
        x * _per_channel(x, _STD) + _per_channel(x, _MEAN) if _image(x) else None
    ),
    "with channels reversed": lambda x: x.flip(1) if _image(x) else None,
}  # fmt: skip


def map_first(data: Any, change: Callable[[Tensor], Tensor | None]) -> Any:
    """A batch whose first floating-point tensor is mapped; None where the map does not fit it."""
    leaves, structure = pytree.tree_flatten(data)
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0:
            mapped = change(leaf)
            return None if mapped is None else pytree.tree_unflatten([*leaves[:k], mapped, *leaves[k + 1 :]], structure)
    return None


# --- 107: several populations -------------------------------------------------------------------------------------


def populations(data: Moments) -> tuple[float, float]:
    """How far the calls of one layer lie apart: share of the variance between their means, ratio of their variances.

    Both by channel, and of these the 90th percentile: one tenth of the channels is what a rule looks at.
    """
    means = np.stack([site.mean for site in data.sites])
    variances = np.stack([site.var for site in data.sites])
    between, within = means.var(axis=0), variances.mean(axis=0)
    with np.errstate(all="ignore"):
        share = np.nan_to_num(between / (between + within))
        ratio = np.nan_to_num(variances.max(axis=0) / variances.min(axis=0), nan=1.0, posinf=1.0)
    return float(np.quantile(share, 0.9)), float(np.quantile(ratio, 0.9))


# --- 305: padding -------------------------------------------------------------------------------------------------


def lengths_of(data: Any, size: int, time: int) -> tuple[np.ndarray[Any, Any], str] | None:
    """How many positions of every sample are filled, and how that is known: by a mask, or by what its tail looks like.

    Args:
        data: A batch.
        size: Its samples.
        time: Positions along the axis in question.
    """
    for t in _of_samples(data, size):
        if t.shape == (size, time) and (t.dtype == torch.bool or _zeros_and_ones(t)):
            found = t.bool().sum(1)
            if bool((t.bool().cumprod(1).sum(1) == found).all()) and bool((found > 0).all()):
                return found.cpu().numpy(), "mask"
    for t in _of_samples(_inputs(data), size):
        if t.dim() >= 2 and time in t.shape[1:]:
            axis = 1 + list(t.shape[1:]).index(time) if t.dim() == 2 else _time_axis(t, time)
            moved = t.movedim(axis, 1).reshape(size, time, -1)
            same = (moved == moved[:, -1:]).all(2)
            tail = same.flip(1).long().cumprod(1).sum(1)
            # What fills up is the same everywhere, mostly 0; a last value that happens to repeat is none.
            ends = moved[tail > 1, -1]
            if len(ends) >= max(2, size // 4) and bool((ends == ends[0]).all()):
                filled = torch.where(tail > 1, time - tail, torch.full_like(tail, time))
                return filled.clamp(min=1).cpu().numpy(), "tail"
            return None
    return None


def _of_samples(data: Any, size: int) -> list[Tensor]:
    leaves = (t for t in pytree.tree_leaves(data) if isinstance(t, Tensor))
    return [t for t in leaves if t.dim() > 0 and t.shape[0] == size]


def _inputs(data: Any) -> Any:
    """A batch without its labels, which may end in zeros for other reasons."""
    if isinstance(data, Mapping):
        return [value for key, value in data.items() if not _LABEL.search(str(key))]
    return data[0] if isinstance(data, (tuple, list)) and data else data


_LABEL = re.compile("label|target", re.IGNORECASE)


def _zeros_and_ones(t: Tensor) -> bool:
    return not t.is_floating_point() and bool(((t == 0) | (t == 1)).all()) and bool((t[:, 0] == 1).all())


def _time_axis(t: Tensor, time: int) -> int:
    return max(k for k in range(1, t.dim()) if t.shape[k] == time)


def padded_changes(
    patient: Patient, layers: Sequence[tuple[Module, Site, str]], batch: Batch, filled: np.ndarray[Any, Any], time: int
) -> dict[str, float]:
    """By normalizer, how much its output at filled positions changes when the others leave its statistics.

    Args:
        patient: The model, in evaluation mode.
        layers: Module, traced call and kind.
        batch: Whose input is padded.
        filled: (n,) filled positions per sample.
        time: Positions in all.
    """
    found: dict[str, float] = {}

    def hook(site: Site, kind: str) -> Callable[[Module, Any], None]:
        def see(module: Module, args: Any) -> None:
            x = args[0].detach().float() if args and isinstance(args[0], Tensor) else None
            if x is None or x.dim() != 3 or x.shape[0] != len(filled):
                return
            keep = torch.arange(x.shape[2], device=x.device) < _scaled(filled, x.shape[2], time).to(x.device)[:, None]
            groups = int(getattr(module, "num_groups", x.shape[1]))
            change = _change(x, keep, kind, groups)
            found[site.layer] = max(found.get(site.layer, 0.0), change)

        return see

    handles = [module.register_forward_pre_hook(hook(site, kind)) for module, site, kind in layers]
    try:
        patient.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _scaled(filled: np.ndarray[Any, Any], here: int, time: int) -> Tensor:
    """Filled positions after strides have made the axis shorter."""
    return torch.from_numpy(np.ceil(filled * (here / time)).clip(1, here))


def _change(x: Tensor, keep: Tensor, kind: str, groups: int) -> float:
    """‖y_all − y_filled‖/‖y_all‖ over the filled positions of x, (n, c, t)."""
    n, c, t = x.shape
    grouped = x.reshape(n, groups, c // groups, t) if kind != "BatchNorm" else x.reshape(n, c, 1, t)
    axes = (0, 2, 3) if kind == "BatchNorm" else (2, 3)
    weight = keep.reshape(n, 1, 1, t).to(x.dtype).expand_as(grouped)

    def normalized(w: Tensor) -> Tensor:
        count = w.sum(axes, keepdim=True).clamp(min=1)
        mean = (grouped * w).sum(axes, keepdim=True) / count
        var = ((grouped - mean).square() * w).sum(axes, keepdim=True) / count
        return (grouped - mean) * (var + 1e-5).rsqrt() * weight

    every = normalized(torch.ones_like(weight))
    return float((every - normalized(weight)).norm() / every.norm().clamp(min=1e-12))


def alone(patient: Patient, batches: Sequence[Batch], time: int) -> tuple[Outcome, Outcome] | None:
    """Scores of the samples in their padded batches and of the same samples alone, cut to their length."""
    whole, single = [], []
    for batch in batches:
        found = lengths_of(batch.data, batch.size, time)
        if found is None:
            continue
        # The rest of the batch has no part in it but by the length to which all are filled up.
        batch = few_of(batch, MOST_ALONE)
        for k, length in enumerate(found[0][: batch.size].tolist()):
            data = regroup(batch.data, batch.size, [k])
            cut = pytree.tree_map_only(Tensor, functools.partial(_cut, time=time, length=int(length)), data)
            single.append(Batch(batch.index, cut, 1))
        whole.append(batch)
    if not whole:
        return None
    try:
        with patient.evaluating():
            return patient.score("padded (B, part)", whole), patient.score("alone, cut (B, part)", single)
    except Exception:
        return None


def _cut(t: Tensor, time: int, length: int) -> Tensor:
    if t.dim() >= 2 and time in t.shape[1:]:
        return t.narrow(_time_axis(t, time), 0, length)
    return t


def padding(
    patient: Patient, sites: Sequence[Site], a: Sequence[Batch], b: Sequence[Batch], t: Thresholds, seed: int
) -> Padding | None:
    """What padding does to the normalizers over positions; None where nothing pads, or none normalizes over positions.

    Args:
        patient: The model.
        sites: The traced calls.
        a: Batches whose layers are looked at.
        b: Batches that are scored.
        t: Of the gates.
        seed: Of the intervals.
    """
    kinds = {f.name: f for f in patient.layers if f.kind in ("BatchNorm", "GroupNorm", "InstanceNorm")}
    over = [(kinds[s.layer].module, s, kinds[s.layer].kind) for s in sites if s.layer in kinds and len(s.shape) == 3]
    if not over:
        return None
    changes: dict[str, float] = {}
    shares, known, time = [], "", 0
    for batch in a[:4]:
        for candidate in _lengths(batch):
            found = lengths_of(batch.data, batch.size, candidate)
            if found is not None and found[0].min() < candidate:
                filled, known, time = found[0], found[1], candidate
                shares.append(1 - float(filled.mean()) / candidate)
                with patient.evaluating():
                    part = padded_changes(patient, over, batch, filled, candidate)
                changes = {name: max(changes.get(name, 0.0), change) for name, change in part.items()}
                break
    if not shares:
        return None
    batchless = [name for name, change in changes.items() if change > t.padding and kinds[name].kind != "BatchNorm"]
    effect = Effect()
    if batchless and (patient.loss is not None or patient.metric is not None):
        scores = alone(patient, b, time)
        if scores is not None and scores[0].samples == scores[1].samples:
            effect = gates.effect(*scores, t, seed)
    return Padding(float(np.mean(shares)), known, changes, effect)


def _lengths(batch: Batch) -> list[int]:
    """Lengths of axes that may count positions, the longest first."""
    leaves = (t for t in _of_samples(_inputs(batch.data), batch.size) if t.dim() <= 3)
    return sorted({int(s) for t in leaves for s in t.shape[1:] if s > 3}, reverse=True)
