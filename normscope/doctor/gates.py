"""The three gates before an alarm: beyond chance, large enough, and felt in the user's own loss or metric."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from normscope import statistics
from normscope.doctor.measurements import Array, Drift, Effect, Grade, Layer, Moments, Outcome
from normscope.doctor.thresholds import Thresholds
from normscope.records import Interval

__all__ = ["design_effect", "drifts", "effect", "needed", "noise_energy", "reading", "severity"]

Indices = NDArray[np.int64]

RESAMPLES = 4999
REGROUPINGS = 399
# Channels that enter a null distribution; more change nothing but the time.
NULL_CHANNELS = 128
NULL_BATCHES = 64
# Below this many pairs no interval is worth its name.
FEWEST_PAIRS = 5
FEW_PAIRS = 30


# --- gate 1: chance -----------------------------------------------------------------------------------------------


def drift_of(layer: Layer, data: Moments, t: Thresholds) -> Drift:
    """How far a layer's running statistics lie from the data, gate 1 left open."""
    if layer.mean is None or layer.var is None:
        raise ValueError(f"{layer.name} has no running statistics")
    delta, rho = _distance(layer.mean, layer.var, data.mean, data.var, layer.eps)
    return Drift(delta, rho, float(_beyond(delta, rho, t).mean()))


def drifts(layers: tuple[Layer, ...], data: Mapping[str, Moments], t: Thresholds, seed: int) -> dict[str, Drift]:
    """The drift of every layer, tested against healthy averages of the same batches, all layers considered."""
    found: dict[str, Drift] = {}
    for layer in layers:
        if layer.running and layer.name in data and layer.mean is not None:
            drift = drift_of(layer, data[layer.name], t)
            candidate = drift.share >= t.drift_share
            p = _null_p(layer, data[layer.name], drift.share, t, seed) if candidate else 1.0
            found[layer.name] = Drift(drift.delta, drift.rho, drift.share, p)
    if not found:
        return found
    rejected = statistics.benjamini_hochberg([d.p for d in found.values()], t.discovery_rate).rejected
    return {
        name: Drift(d.delta, d.rho, d.share, d.p, bool(reject) and d.p < t.null_point)
        for (name, d), reject in zip(found.items(), rejected, strict=True)
    }


def _distance(mean: Array, var: Array, data_mean: Array, data_var: Array, eps: float) -> tuple[Array, Array]:
    # ε joins both variances: a channel that is constant in both is no drift.
    with np.errstate(all="ignore"):
        delta = (mean - data_mean) / np.sqrt(data_var + eps)
        rho = np.log((var + eps) / (data_var + eps))
    return np.nan_to_num(delta, nan=np.inf), np.nan_to_num(rho, nan=np.inf)


def _beyond(delta: Array, rho: Array, t: Thresholds) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return (np.abs(delta) > t.drift_mean) | (np.abs(rho) > t.drift_var)


def _null_p(layer: Layer, data: Moments, share: float, t: Thresholds, seed: int) -> float:
    """How often a healthy exponential average of these batches lies as far from other draws of them."""
    k, channels = data.means.shape
    if k < 2 or not np.isfinite(data.means).all():
        return 1.0 if k < 2 else 1 / (1 + RESAMPLES)
    rng = np.random.default_rng(seed)
    keep = np.unique(np.linspace(0, channels - 1, min(channels, NULL_CHANNELS)).astype(int))
    means, variances = data.means[:, keep], data.vars[:, keep]
    average = _average_weights(layer.momentum, k, rng)
    again = rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES) / k
    reached = 0
    for a, b in zip(np.array_split(average, 10), np.array_split(again, 10), strict=True):
        mean = b @ means
        var = b @ (variances + means**2) - mean**2
        delta, rho = _distance(a @ means, a @ variances, mean, np.maximum(var, 0), layer.eps)
        reached += int((_beyond(delta, rho, t).mean(axis=1) >= share).sum())
    return (1 + reached) / (1 + RESAMPLES)


def reach(values: Array, weight: float, t: Thresholds) -> float:
    """How far chance moves a weighted mean of such values, by Student's distribution: gate 1 for one number.

    Args:
        values: One per batch.
        weight: Σ w² of the mean's weights, which add up to 1.
        t: The gate's level.
    """
    if len(values) < 2:
        return 0.0
    band = statistics.equivalence_test(values, np.zeros(len(values)), 1.0, alpha=t.null_point).difference
    return (band.high - band.low) / 2 * math.sqrt(weight * len(values))


def _average_weights(momentum: float | None, k: int, rng: np.random.Generator) -> Array:
    """(RESAMPLES, k) weights with which an exponential average of randomly drawn batches holds each batch."""
    m = momentum if momentum is not None and 0 < momentum < 1 else 0.1
    length = min(NULL_BATCHES, math.ceil(4 / m))
    weights = (1 - m) ** np.arange(length)
    weights /= weights.sum()
    drawn = rng.integers(k, size=(RESAMPLES, length))
    rows = np.repeat(np.arange(RESAMPLES), length)
    flat = np.bincount(rows * k + drawn.ravel(), weights=np.tile(weights, RESAMPLES), minlength=RESAMPLES * k)
    return np.asarray(flat.reshape(RESAMPLES, k))


def design_effect(moments: Mapping[str, Moments], t: Thresholds, seed: int) -> dict[str, tuple[float, float]]:
    """By layer, Kish's design effect of the loader's grouping, D = 1 + (B − 1)·ICC, and its p-value.

    The null regroups the same samples at random, the same regrouping for all layers, and takes the largest D: what the
    search over layers finds by chance is in it.
    """
    usable = {n: m for n, m in moments.items() if m.samples is not None and len(m.means) > 1}
    usable = {
        n: m for n, m in usable.items() if m.samples is not None and m.samples.size and np.isfinite(m.samples).all()
    }
    found = {name: _design(m.samples, m.groups) for name, m in usable.items()}
    found = {name: d for name, d in found.items() if math.isfinite(d)}
    if not found or max(found.values()) < t.design_warning:
        return {name: (d, 1.0) for name, d in found.items()}
    rng = np.random.default_rng(seed)
    null = [_largest([usable[name] for name in found], rng) for _ in range(REGROUPINGS)]
    return {name: (d, float(statistics.empirical_p(d, null))) for name, d in found.items()}


def _largest(moments: list[Moments], rng: np.random.Generator) -> float:
    """The largest design effect after one random regrouping; layers of equally many samples share it."""
    orders: dict[int, Indices] = {}
    found = []
    for m in moments:
        n = 0 if m.groups is None else len(m.groups)
        orders.setdefault(n, rng.permutation(n))
        found.append(_design(m.samples, m.groups, orders[n]))
    return float(np.nanmax(found))


def _design(samples: Array | None, groups: Indices | None, order: Indices | None = None) -> float:
    """The median over channels of the design effect, by one-way analysis of variance."""
    if samples is None or groups is None:
        return math.nan
    x = samples if order is None else samples[order]
    counts = np.bincount(groups).astype(float)
    counts = counts[counts > 0]
    k, n = len(counts), len(x)
    if k < 2 or n <= k:
        return math.nan
    sums = np.add.reduceat(x, np.flatnonzero(np.r_[True, np.diff(groups) != 0]), axis=0)
    total = x.mean(axis=0)
    between = (counts[:, None] * (sums / counts[:, None] - total) ** 2).sum(axis=0) / (k - 1)
    squares = ((x - total) ** 2).sum(axis=0)
    within = (squares - between * (k - 1)) / (n - k)
    size = (n - (counts**2).sum() / n) / (k - 1)
    with np.errstate(all="ignore"):
        icc = (between - within) / (between + (size - 1) * within)
    icc = icc[np.isfinite(icc)]
    return float(1 + (size - 1) * np.median(icc)) if len(icc) else math.nan


def noise_energy(data: Moments, eps: float) -> float:
    """‖y_B − y_∞‖²/‖y_∞‖², median over channels: what normalizing by batches of this size adds.

    With d = μ_B − μ the output differs by (x − μ_B)(1/σ_B − 1/σ) − d/σ, whose mean square is (1 − σ_B/σ)² + d²/σ².
    """
    sigma = np.sqrt(data.var + eps)
    spread = np.sqrt(data.vars + eps)
    energy = ((1 - spread / sigma) ** 2 + (data.means - data.mean) ** 2 / sigma**2).mean(axis=0)
    return float(np.median(energy))


# --- gates 2 and 3: size and consequence --------------------------------------------------------------------------


def effect(now: Outcome, other: Outcome, t: Thresholds, seed: int = 0) -> Effect:
    """What a state loses against another, with a paired interval, and how much that is."""
    loss = cost = None
    if now.loss is not None and other.loss is not None:
        loss = _paired(*_finite(now.loss, other.loss), t, seed, "loss")
    if now.metric is not None and other.metric is not None:
        a, b = other.metric, now.metric
        unit = both_shares(a, b)
        scale = 100.0 if unit else 1.0
        # A metric that is no number counts as none of it.
        cost = _paired(np.nan_to_num(a, nan=0.0) * scale, np.nan_to_num(b, nan=0.0) * scale, t, seed, unit or "metric")
    if cost is None:
        if loss is None or other.loss is None:
            return Effect(loss, loss)
        errors = _share(loss, other.loss) / t.loss_error if loss.low > 0 else 0.0
        return Effect(loss, loss, _loss_grade(loss, other.loss, t), errors)
    scale = 1.0 if cost.unit == "pp" else 100.0 / max(abs(float(np.nanmean(_array(other.metric)))), 1e-12)
    errors = cost.value * scale / t.cost_error if cost.low > 0 else 0.0
    return Effect(cost, loss, _metric_grade(cost, scale, _clear(loss, other, t), t), errors)


def _clear(loss: Interval | None, other: Outcome, t: Thresholds) -> bool:
    """Whether the loss alone is worth an error: then it may speak for a metric of few steps on few samples."""
    return loss is not None and other.loss is not None and _loss_grade(loss, other.loss, t) == "E"


def both_shares(a: Array, b: Array) -> str:
    """Whether a metric is a share, whose differences are percentage points."""
    values = np.concatenate([a[np.isfinite(a)], b[np.isfinite(b)]])
    return "pp" if len(values) and values.min() >= 0 and values.max() <= 1 else ""


def _array(values: Array | None) -> Array:
    return np.zeros(1) if values is None else values


def _finite(a: Array, b: Array) -> tuple[Array, Array]:
    """A loss that is not finite counts as the worst one seen."""
    known = np.concatenate([a[np.isfinite(a)], b[np.isfinite(b)], [0.0]])
    worst = float(known.max())
    return np.where(np.isfinite(a), a, worst), np.where(np.isfinite(b), b, worst)


def _paired(a: Array, b: Array, t: Thresholds, seed: int, unit: str) -> Interval | None:
    if len(a) < FEWEST_PAIRS or len(a) != len(b):
        return None
    found = statistics.bootstrap_difference(a, b, level=t.level, resamples=2000, seed=seed)
    low, high = found.low, found.high
    if len(a) < FEW_PAIRS:
        # Resampling few numbers cannot show the tails that they did not hit; Student's interval allows for them.
        student = statistics.equivalence_test(a, b, 1.0, alpha=(1 - t.level) / 2).difference
        low, high = min(low, student.low), max(high, student.high)
    return Interval(found.value, low, high, unit)


def _metric_grade(cost: Interval, scale: float, proven: bool, t: Thresholds) -> Grade:
    size = cost.value * scale
    if cost.low > 0 and size >= t.cost_error:
        return "E"
    return "W" if (cost.low > 0 or proven) and size >= t.cost_warning else "I"


def _share(loss: Interval, other: Array) -> float:
    finite = other[np.isfinite(other)]
    return loss.value / max(abs(float(finite.mean())) if len(finite) else 0.0, 1e-12)


def _loss_grade(loss: Interval, other: Array, t: Thresholds) -> Grade:
    share = _share(loss, other)
    if loss.low <= 0 or share < t.loss_warning:
        return "I"
    return "E" if share >= t.loss_error else "W"


def severity(statistical: bool, large: bool, felt: Effect) -> Grade | None:
    """The three gates: E needs all, W the first two, and a cost that was measured and is none leaves at most I."""
    if not (statistical and large):
        return None
    return "W" if felt.grade is None else felt.grade


def needed(now: Outcome, other: Outcome, t: Thresholds) -> int | None:
    """Samples needed to see an effect of the stated size with 80 % power at the level of the intervals."""
    if now.metric is None or other.metric is None or len(now.metric) < 2 or not both_shares(now.metric, other.metric):
        return None
    differences = np.nan_to_num(now.metric) - np.nan_to_num(other.metric)
    # Differences that n samples did not show may still be as frequent as about 1 in n.
    spread = math.sqrt(max(float(np.var(differences, ddof=1)), 1 / len(differences)))
    # 2.576 and 0.842: the normal quantiles of a two-sided 99 % interval and of 80 %.
    per_unit = max(1, now.samples / len(now.metric))
    return math.ceil(per_unit * ((2.576 + 0.842) * spread * 100 / t.power_effect) ** 2)


# --- the decision table -------------------------------------------------------------------------------------------

_READINGS: dict[tuple[bool, ...], str] = {
    # (evaluation, batch statistics, recalibrated): True is good
    (False, True, True): "the running statistics are stale, unconverged, polluted or were not copied",
    (False, True, False): "no single statistics fit: several populations, or answers depend on the rest of the batch",
    (False, False, True): "the running statistics are stale, and the batches too small or too odd to evaluate on",
    (True, False, True): "healthy; these batches are too small or too ordered to evaluate on batch statistics",
    (True, True, True): "healthy: running, batch and recalibrated statistics do equally well",
    (True, True, False): "healthy; statistics of these data would be worse than the model's own",
    (True, False, False): "healthy; statistics of these data would be worse than the model's own",
}
NOT_NORMALIZATION = (
    "bad whatever the statistics: the trouble is not in them, or the weights have adapted to bad batches"
)


def reading(outcomes: Mapping[str, Outcome], chance: float | None, t: Thresholds) -> str:
    """What the decision table says; "" where the three states were not scored."""
    states = [outcomes.get(name) for name in ("eval", "batch statistics", "recalibrated")]
    known = [s for s in states if s is not None and (s.loss is not None or s.metric is not None)]
    if len(known) < 3:
        return ""
    best = max(known, key=_quality)
    if chance is not None and best.metric is not None and np.mean(best.metric) <= chance:
        return NOT_NORMALIZATION
    good = tuple(not _clearly_worse(effect(state, best, t)) for state in known)
    return _READINGS.get(good, NOT_NORMALIZATION)


def _clearly_worse(felt: Effect) -> bool:
    # Against the best of three, which is lucky by choice, less than an error says nothing.
    return felt.grade == "E"


def _quality(outcome: Outcome) -> float:
    if outcome.metric is not None:
        return float(np.nan_to_num(outcome.metric, nan=0.0).mean())
    loss = _array(outcome.loss)
    return -float(np.where(np.isfinite(loss), loss, np.inf).mean())


def quality(outcome: Outcome, by_metric: bool = False) -> float:
    """One number, higher is better; by default the loss, which sees more than a metric of few steps."""
    if outcome.loss is not None and not by_metric:
        return -float(np.where(np.isfinite(outcome.loss), outcome.loss, 1e9).mean())
    return _quality(outcome)


def mean_interval(values: Array, unit: str, level: float = 0.99) -> Interval | None:
    """A mean with its interval."""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return None if len(known) == 0 else Interval(float(known[0]), float(known[0]), float(known[0]), unit)
    found = statistics.bootstrap_difference(known, np.zeros(len(known)), level=level, resamples=2000)
    return Interval(found.value, found.low, found.high, unit)


def median_size(values: Array) -> float:
    """The median of the absolute values, of which some may be infinite."""
    with np.errstate(all="ignore"):
        return float(np.median(np.abs(values))) if len(values) else 0.0
