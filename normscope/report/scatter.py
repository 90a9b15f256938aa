"""Figures of single channels and of an average's memory, as points in a small square that the templates draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normscope.records import ChannelStatistics, CheckRecord, Finding
from normscope.report import words

__all__ = ["SIDE", "ChannelFigure", "Decay", "Scatter", "channel_figures", "decay_of"]

# Units of the drawing.
SIDE = 120.0
# Normalizers of a finding that are drawn; the others look alike, and the chart above them has all.
MOST_LAYERS = 3
# What lies farther, or is larger, is not drawn: beside it, everything else would be one point.
TOO_FAR, TOO_LARGE = 1e6, 1e30
# Of the initial values, below which an average counts as converged.
CONVERGED = 0.01


@dataclass(frozen=True, slots=True)
class Scatter:
    """Running against data statistics, one mark per channel, on equal axes: where they agree, it lies on the diagonal.

    Attributes:
        quantity: What is shown.
        healthy: Dots within the threshold, as an SVG path.
        beyond: Crosses beyond it.
        band: Half the width of the healthy band around the diagonal.
        ends: The numbers at both ends of the axes.
        summary: The figure in words.
    """

    quantity: str
    healthy: str
    beyond: str
    band: float
    ends: tuple[str, str]
    summary: str


@dataclass(frozen=True, slots=True)
class ChannelFigure:
    """The channels of one normalizer."""

    layer: str
    scatters: tuple[Scatter, ...]
    note: str


def channel_figures(record: CheckRecord, finding: Finding) -> tuple[ChannelFigure, ...]:
    """The channels of the finding's normalizers, as far as the record has them."""
    limits = {t.name: t.value for t in record.thresholds}
    if not {"drift_mean", "drift_var"} <= set(limits):
        return ()
    wanted = [c for c in record.channels if c.layer in finding.layers][:MOST_LAYERS]
    return tuple(_figure(c, limits["drift_mean"], limits["drift_var"]) for c in wanted)


def _figure(c: ChannelStatistics, most_mean: float, most_var: float) -> ChannelFigure:
    deviations = [math.sqrt(v) if v > 0 else math.nan for v in c.data_var]
    means, running_means = ([m / s for m, s in zip(v, deviations, strict=True)] for v in (c.data_mean, c.running_mean))
    variances, running_vars = ([_log(v) for v in values] for values in (c.data_var, c.running_var))
    shown = len(c.data_mean)
    scatters = (
        _scatter("mean, in σ of the data", means, running_means, most_mean, words.number, f"{most_mean:g} σ"),
        _scatter("variance, logarithmic", variances, running_vars, most_var,
                 lambda v: words.number(math.exp(v)), f"a factor of {math.exp(most_var):.2g}"),
    )  # fmt: skip
    note = f"{shown} of {c.total} channels, from the least to the most drifted" if shown < c.total else ""
    return ChannelFigure(words.layer(c.layer), scatters, note)


def _log(value: float) -> float:
    return math.log(value) if 0 < value < TOO_LARGE else math.nan


def _scatter(
    quantity: str,
    data: Sequence[float],
    running: Sequence[float],
    limit: float,
    label: Callable[[float], str],
    reach: str,
) -> Scatter:
    pairs = [(x, y) for x, y in zip(data, running, strict=True) if abs(x) < TOO_FAR and abs(y) < TOO_FAR]
    low, high = min((min(p) for p in pairs), default=0.0), max((max(p) for p in pairs), default=1.0)
    # Never so close that the band of health fills the picture.
    room = max(0.06 * (high - low), 3 * limit - (high - low) / 2, 1e-9)
    low, high = low - room, high + room
    scale = SIDE / (high - low)
    places = [(abs(y - x) > limit, (x - low) * scale, SIDE - (y - low) * scale) for x, y in pairs]
    beyond = sum(out for out, _, _ in places)
    summary = f"{beyond} of {words.plural(len(pairs), 'channel')} off by more than {reach}"
    if len(pairs) < len(data):
        summary += f", {len(data) - len(pairs)} too far off to be drawn, or not finite"
    return Scatter(
        quantity,
        "".join(f"M{x:.1f} {y:.1f}h0" for out, x, y in places if not out),
        "".join(f"M{x - 2:.1f} {y - 2:.1f}l4 4m0-4l-4 4" for out, x, y in places if out),
        round(limit * scale, 2),
        (label(low), label(high)),
        summary,
    )


@dataclass(frozen=True, slots=True)
class Decay:
    """How the weight of the initial values in a running average falls with every batch.

    Attributes:
        curve: An SVG path in a square of SIDE, the top is 1.
        now: Where the average is.
        batches: How many it has seen, and how many it takes to be converged.
        weight: What the initial values weigh now.
    """

    curve: str
    now: tuple[float, float]
    batches: tuple[float, float]
    weight: float


def decay_of(finding: Finding) -> Decay | None:
    """The weight of the initial values over the batches seen; None for findings that are not about it."""
    facts = {fact.name: fact.value for fact in finding.facts}
    momentum, seen = facts.get("momentum"), facts.get("batches seen")
    if finding.code != "NRM104" or momentum is None or seen is None or not 0 < momentum < 1:
        return None
    needed = math.ceil(math.log(CONVERGED) / math.log1p(-momentum))
    end = 1.05 * max(seen, needed, 1)

    def place(batches: float) -> tuple[float, float]:
        return round(SIDE * batches / end, 1), round(SIDE * (1 - (1 - momentum) ** batches), 1)

    points = [place(end * k / 40) for k in range(41)]
    return Decay("M" + "L".join(f"{x} {y}" for x, y in points), place(seen), (seen, needed), (1 - momentum) ** seen)
