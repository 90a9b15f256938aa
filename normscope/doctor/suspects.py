"""Which trials to run: those that one rule needs, and only where its cheaper measurements give ground for suspicion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from normscope.doctor.cache import Batch, few_of, thin
from normscope.doctor.measurements import Drift, Effect, Layer, Moments, Outcome, Site
from normscope.doctor.patient import Patient, Statistics
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.trials import Trials, padding, populations
from normscope.errors import NormscopeError
from normscope.surgery import fed_by

__all__ = ["Suspects", "eps_share", "few_values", "folded_ranges", "jitter", "linear_before"]

# Batches of split B that a trial scores on.
TRIAL_BATCHES = 8


def jitter(layer: Layer, data: Moments | None) -> float:
    """The predicted jitter of a running mean, √(m/(2 − m)·Var(batch mean)) in σ, median over channels."""
    if data is None or layer.momentum is None or not 0 < layer.momentum <= 1:
        return 0.0
    means = data.means[data.sizes >= data.sizes.max() / 2]  # an incomplete last batch is another rule's
    if len(means) < 2:
        return 0.0
    spread = np.sqrt(layer.momentum / (2 - layer.momentum) * means.var(axis=0, ddof=1) / (data.var + layer.eps))
    return float(np.median(spread))


def linear_before(patient: Patient, batch: Batch) -> dict[str, tuple[str, str]]:
    """By normalizer, the layer that feeds it, and what keeps that one's bias in use ("" for nothing)."""
    try:
        data = few_of(batch).fresh(patient.device)
        return {norm: (linear, why) for norm, linear, why in fed_by(patient.model, data, forward=patient.forward)}
    except (NormscopeError, RuntimeError, ValueError, TypeError):
        return {}


def folded_ranges(model: Module, layers: Sequence[Layer], fed: Mapping[str, tuple[str, str]]) -> dict[str, float]:
    """By normalizer, the largest over the median range of the output channels of the layer before it, once folded."""
    found = {}
    for layer in layers:
        if layer.name not in fed or layer.var is None or layer.weight is None or not layer.running:
            continue
        linear = model.get_submodule(fed[layer.name][0])
        weight = linear._parameters.get("weight")
        if not isinstance(weight, Tensor) or not np.isfinite(layer.var).all():
            continue
        rows = weight.detach().double().abs()
        if getattr(linear, "transposed", False):
            groups = cast("torch.nn.ConvTranspose2d", linear).groups
            rows = rows.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
        if len(rows) != len(layer.weight):
            continue
        reach = rows.flatten(1).amax(1).cpu().numpy() * np.abs(layer.weight) / np.sqrt(layer.var + layer.eps)
        middle = float(np.median(reach))
        if middle > 0:
            found[layer.name] = float(reach.max()) / middle
    return found


@dataclass(slots=True)
class Suspects:
    """The passes so far, and what the trials add to them.

    Attributes:
        patient: The model.
        found: The measurements.
        a: Split A.
        b: Split B.
        pooled: Recalibrated statistics.
        has_time: Whether the budget allows another trial.
    """

    patient: Patient
    found: dict[str, Any]
    a: tuple[Batch, ...]
    b: tuple[Batch, ...]
    pooled: Statistics
    thresholds: Thresholds
    seed: int
    has_time: Callable[[], bool]

    def run(self) -> bool:
        """All trials for which there is ground; False where time was too short for all."""
        self.found["trials"] = {}
        outcome: Outcome | None = self.found.get("outcomes", {}).get("eval")
        if not self.has_time():
            return False
        self._padding()
        if outcome is None or not self.b:
            return True
        part = thin(self.b, TRIAL_BATCHES)
        if len(part) < len(self.b):
            with self.patient.evaluating():
                outcome = self.patient.score("evaluation (B, part)", part)
        trials = Trials(self.patient, self.a, part, outcome, self.thresholds, self.seed)
        for trial in (self._inputs, self._sites, self._eps, self._bessel, self._averages):
            if not self.has_time():
                return False
            trial(trials)
        return True

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All normalizers."""
        return cast("tuple[Layer, ...]", self.found["layers"])

    def _note(self, name: str, effect: Effect) -> None:
        self.found["trials"][name] = effect

    def _bessel(self, trials: Trials) -> None:
        size = max(batch.size for batch in self.a or self.b)
        values = few_values(self.layers, self.found["sites"], size, self.found["traced"], self.thresholds)
        if values:
            self._note("bessel", trials.biased(values))

    def _eps(self, trials: Trials) -> None:
        names = [x.name for x in self.layers if eps_share(x, self.thresholds) >= self.thresholds.eps_share]
        if names:
            both = [trials.other_eps(names, factor) for factor in (0.1, 10.0)]
            worst = max(both, key=lambda e: abs(e.cost.value) if e.cost is not None else -math.inf)
            self._note("eps", worst)

    def _averages(self, trials: Trials) -> None:
        own = self.found.get("own", {})
        noisy = [x for x in self.layers if x.running and jitter(x, own.get(x.name)) >= self.thresholds.jitter]
        if noisy:
            self.found["noise_of_average"] = trials.averages(noisy, own)

    def _sites(self, trials: Trials) -> None:
        # As every call normalizes by its own batch here, what differs before a layer is not counted again behind it.
        data = {n: m for n, m in self.found.get("own", {}).items() if m.sites}
        t = self.thresholds
        mixed = {}
        for name, m in data.items():
            share, ratio = populations(m)
            if share > t.population_share or ratio > t.population_ratio:
                mixed[name] = m
        if mixed and self.pooled:
            self._note("sites", trials.by_site(self.pooled, mixed))

    def _inputs(self, trials: Trials) -> None:
        sites: tuple[Site, ...] = self.found["sites"]
        drift: Mapping[str, Drift] = self.found["drift"]
        first = next((s.layer for s in sites if s.layer in drift), None)
        if first is not None and drift[first].beyond:
            layer = next(x for x in self.layers if x.name == first)
            self.found["rescaled"] = trials.rescaled(layer, drift[first])

    def _padding(self) -> None:
        if any(len(site.shape) == 3 for site in self.found["sites"]):
            part = thin(self.b, TRIAL_BATCHES // 2)
            self.found["padding"] = padding(self.patient, self.found["sites"], self.a, part, self.thresholds, self.seed)


def few_values(
    layers: Sequence[Layer], sites: Sequence[Site], size: int, traced: int, t: Thresholds
) -> dict[str, float]:
    """By BatchNorm layer with running statistics, the values per statistic of a batch, where these are few."""
    kinds = {x.name for x in layers if x.kind == "BatchNorm" and x.running and not x.held}
    values: dict[str, float] = {}
    for site in sites:
        if site.layer in kinds:
            n = site.values * size / max(traced, 1)
            values[site.layer] = max(n, values.get(site.layer, 0.0))
    return {name: n for name, n in values.items() if 1 < n <= t.bessel_values}


def eps_share(layer: Layer, t: Thresholds) -> float:
    """The share of channels whose variance is less than a few ε, those aside that γ switches off."""
    if layer.var is None or not layer.running:
        return 0.0
    weight = np.ones_like(layer.var) if layer.weight is None else np.abs(layer.weight)
    live = weight > t.gamma_zero * max(float(weight.max(initial=0.0)), 1e-30)
    # A variance below 0 is none that ε could dominate.
    return float(((layer.var >= 0) & (layer.var < t.eps_times * layer.eps) & live).mean())
