"""Time to a threshold, where some runs never get there: they are right-censored at the end of their budget.

A run is a pair: the step at which it was seen to arrive, or the last step at which it had not, and whether it arrived.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from normscope.statistics.paired import Interval

__all__ = ["kaplan_meier", "log_rank", "median_ratio", "median_time", "restricted_mean"]

Array = NDArray[np.float64]


def _runs(times: ArrayLike, arrived: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    steps, events = np.asarray(times, dtype=np.float64), np.asarray(arrived, dtype=bool)
    if steps.ndim != 1 or steps.shape != events.shape or len(steps) == 0:
        raise ValueError(f"need a time and an outcome per run, but got shapes {steps.shape} and {events.shape}")
    if not np.isfinite(steps).all():
        raise ValueError("times must be finite: give the end of the budget where a run did not arrive")
    return steps, events


def kaplan_meier(times: ArrayLike, arrived: ArrayLike) -> tuple[Array, Array]:
    """The share of runs still under way after each time at which one arrived.

    Args:
        times: (n,) steps.
        arrived: (n,) truth values; False where the run ended without.

    Returns:
        Times, ascending, and shares.

    Source: Kaplan & Meier 1958, "Nonparametric Estimation from Incomplete Observations".

    Example:
        >>> [a.tolist() for a in kaplan_meier([1, 2, 3, 3], [True, True, False, True])]
        [[1.0, 2.0, 3.0], [0.75, 0.5, 0.25]]
    """
    steps, events = _runs(times, arrived)
    moments = np.unique(steps[events])
    at_risk = (steps[None, :] >= moments[:, None]).sum(axis=1)
    ended = ((steps[None, :] == moments[:, None]) & events[None, :]).sum(axis=1)
    return moments, np.cumprod(1 - ended / at_risk)


def median_time(times: ArrayLike, arrived: ArrayLike) -> float:
    """The first time at which half of the runs have arrived; infinite where they do not.

    Example:
        >>> median_time([1, 2, 3, 9], [True, True, True, False]), median_time([9, 9], [False, False])
        (2.0, inf)
    """
    moments, under_way = kaplan_meier(times, arrived)
    reached = moments[under_way <= 0.5 + 1e-12]
    return float(reached[0]) if len(reached) else float("inf")


def restricted_mean(times: ArrayLike, arrived: ArrayLike, budget: float) -> float:
    """The mean time under way within the budget: the area below the Kaplan–Meier curve.

    Example:
        >>> restricted_mean([2, 10], [True, False], budget=10)
        6.0
    """
    moments, under_way = kaplan_meier(times, arrived)
    inside = moments < budget
    edges = np.concatenate(([0.0], moments[inside], [budget]))
    heights = np.concatenate(([1.0], under_way[inside]))
    return float((np.diff(edges) * heights).sum())


def median_ratio(
    slow: tuple[ArrayLike, ArrayLike], fast: tuple[ArrayLike, ArrayLike], *, level: float = 0.95,
    resamples: int = 2_000, seed: int = 0,
) -> Interval:  # fmt: skip
    """The ratio of two median times, slow / fast, over paired seeds, with a bootstrap interval.

    Where a median is never reached, the ratio is infinite or 0; where neither is, it may be anything.

    Args:
        slow: Times and outcomes, (n,) each.
        fast: Those of the same seeds.
        level: The probability with which the interval should hold the true ratio.
        resamples: How often the seeds are drawn again.
        seed: Of the draws.

    Example:
        >>> arrived = [True] * 6
        >>> median_ratio(([20, 20, 22, 18, 20, 20], arrived), ([10, 10, 11, 9, 10, 10], arrived)).value
        2.0
    """
    a, b = _runs(*slow), _runs(*fast)
    if len(a[0]) != len(b[0]):
        raise ValueError("the runs must be of the same seeds")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(a[0]), size=(resamples, len(a[0])))
    ratios = [_ratio(median_time(a[0][i], a[1][i]), median_time(b[0][i], b[1][i])) for i in draws]
    lows = np.sort([0.0 if np.isnan(r) else r for r in ratios])
    highs = np.sort([np.inf if np.isnan(r) else r for r in ratios])
    # No interpolation: between a number and infinity there is none.
    k = round(resamples * (1 - level) / 2)
    return Interval(_ratio(median_time(*a), median_time(*b)), float(lows[k]), float(highs[resamples - 1 - k]))


def _ratio(a: float, b: float) -> float:
    return float("nan") if np.isinf(a) and np.isinf(b) else float("inf") if np.isinf(a) else a / max(b, 1e-300)


def log_rank(
    first: tuple[ArrayLike, ArrayLike], second: tuple[ArrayLike, ArrayLike], strata: ArrayLike | None = None
) -> float:
    """The p-value that two groups of runs arrive at the same rate, within strata.

    Args:
        first: Times and outcomes, (n,) each.
        second: The same of the other group.
        strata: (n + m,) labels of both groups, e.g. seeds; None for one stratum.

    Source: Mantel 1966, "Evaluation of survival data and two new rank order statistics".

    Example:
        >>> log_rank(([1, 2, 3, 4], [True] * 4), ([11, 12, 13, 14], [True] * 4)) < 0.02
        True
    """
    a, b = _runs(*first), _runs(*second)
    steps, events = np.concatenate((a[0], b[0])), np.concatenate((a[1], b[1]))
    in_first = np.arange(len(steps)) < len(a[0])
    labels = np.zeros(len(steps)) if strata is None else np.asarray(strata)
    excess = variance = 0.0
    for label in np.unique(labels):
        here = labels == label
        for moment in np.unique(steps[here & events]):
            risk = here & (steps >= moment)
            n, ours = risk.sum(), (risk & in_first).sum()
            d = (risk & events & (steps == moment)).sum()
            excess += (risk & events & in_first & (steps == moment)).sum() - d * ours / n
            variance += d * ours / n * (1 - ours / n) * (n - d) / (n - 1) if n > 1 else 0.0
    return float(special.chdtrc(1, excess**2 / variance)) if variance > 0 else 1.0
