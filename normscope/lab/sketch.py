"""Figures and tables as records: what to draw, not how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from normscope.lab.verdicts import among_best, interval
from normscope.records import Cell, Interval, Plot, Row, Series
from normscope.statistics import paired_effect

__all__ = ["band", "bars", "beside", "dashes", "line", "points", "row", "spread"]


def _row(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def line(name: str, x: Iterable[float], y: Iterable[float], colour: int = 0) -> Series:
    """Measured values in order."""
    return Series("line", name, _row(x), _row(y), colour=colour)


def dashes(name: str, x: Iterable[float], y: Iterable[float], colour: int = 0) -> Series:
    """What theory says."""
    return Series("dashes", name, _row(x), _row(y), colour=colour)


def points(
    name: str, x: Iterable[float], y: Iterable[float], colour: int = 0, *, within: Sequence[Interval] = ()
) -> Series:
    """Single values, with their intervals where there are any."""
    low, high = _row(i.low for i in within), _row(i.high for i in within)
    return Series("points", name, _row(x), _row(y), low, high, colour)


def bars(name: str, x: Iterable[float], y: Iterable[float], colour: int = 0) -> Series:
    """Sizes to compare."""
    return Series("bars", name, _row(x), _row(y), colour=colour)


def band(name: str, x: Iterable[float], low: Iterable[float], high: Iterable[float], colour: int = 0) -> Series:
    """What lies between two lines."""
    return Series("band", name, _row(x), (), _row(low), _row(high), colour)


def spread(name: str, x: Sequence[float], rows: Sequence[Sequence[float]], colour: int = 0) -> tuple[Series, Series]:
    """A line through the means over seeds, and the band from the lowest to the highest seed; a row per seed."""
    columns = list(zip(*rows, strict=True))
    return (
        line(name, x, [sum(c) / len(c) for c in columns], colour),
        band("", x, [min(c) for c in columns], [max(c) for c in columns], colour),
    )


def beside(title: str, y: str, groups: Mapping[str, Mapping[str, Sequence[float]]], x: str = "") -> Plot:
    """Arms side by side, mean and range over seeds: group → arm → a number per seed; every arm is a tick."""
    ticks = list(dict.fromkeys(arm for arms in groups.values() for arm in arms))
    series = []
    for k, (group, arms) in enumerate(groups.items()):
        within = [Interval(sum(r) / len(r), min(r), max(r)) for r in arms.values()]
        places = [ticks.index(arm) + 0.15 * (k - (len(groups) - 1) / 2) for arm in arms]
        series.append(points(group, places, [i.value for i in within], k, within=within))
    return Plot(title, x, y, tuple(series), ticks=tuple(ticks))


def row(
    name: str, arms: Mapping[str, Sequence[float]], columns: Sequence[str], *, unit: str, least: bool = False
) -> Row:
    """Arms side by side, each with the interval of its mean and a mark if none is surely better.

    Args:
        name: Of the row.
        arms: Column → a number per seed; shares, or decibels.
        columns: Of the table.
        unit: "%" of shares, or "dB".
        least: The smallest number is the best, not the largest.
    """
    scale, digits = (100, 1) if unit == "%" else (1, 2)
    scaled = {arm: [scale * v for v in values] for arm, values in arms.items()}
    ranked = {arm: [-v if least else v for v in values] for arm, values in scaled.items()}
    best, good = max(ranked, key=lambda arm: sum(ranked[arm])), among_best(ranked)

    def cell(arm: str) -> Cell | None:
        if arm not in scaled:
            return None
        value = interval(paired_effect(scaled[arm]))
        return Cell(value, "best" if arm == best else "not separable" if arm in good else "")

    return Row(name, unit, digits, tuple(cell(arm) for arm in columns))
