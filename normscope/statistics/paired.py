"""How sure are we? Intervals, permutation and equivalence tests, false discovery: thin, over NumPy and SciPy.

Everything is paired: two models are scored on the same samples, and only the differences carry information. Every
random draw comes from a generator with the given seed, so that a report can be made again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

__all__ = [
    "Alternative",
    "BootstrapMethod",
    "Discoveries",
    "Equivalence",
    "Interval",
    "benjamini_hochberg",
    "bootstrap_difference",
    "empirical_p",
    "equivalence_test",
    "median_interval",
    "permutation_test",
]

Alternative = Literal["two-sided", "greater", "less"]
BootstrapMethod = Literal["percentile", "bca"]
Array = NDArray[np.float64]

# Numbers drawn at a time: 32 MB of indices, however many samples and resamples there are.
CHUNK = 1 << 22


class Interval(NamedTuple):
    """An estimate and the interval that should hold the true value."""

    value: float
    low: float
    high: float


class Equivalence(NamedTuple):
    """The result of an equivalence test.

    Attributes:
        equivalent: Whether a difference beyond the margin is excluded.
        p: The larger p-value of the two one-sided tests.
        difference: The mean difference with its 1 − 2·alpha interval, which lies within the margin iff equivalent.
    """

    equivalent: bool
    p: float
    difference: Interval


class Discoveries(NamedTuple):
    """Which of many hypotheses are rejected.

    Attributes:
        rejected: One truth value per p-value.
        adjusted: The smallest rate at which each would be rejected.
    """

    rejected: NDArray[np.bool_]
    adjusted: Array


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    level: float = 0.99,
    method: BootstrapMethod = "percentile",
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of a − b over paired samples, with a bootstrap interval.

    "percentile" reads the interval off the resampled means; "bca" corrects it for bias and for skewness, with
    z₀ = Φ⁻¹(share of means below the estimate) and the acceleration Σ d³ / 6(Σ d²)^{3/2}, d = the deviations: read at
    Φ(z₀ + (z₀ + z)/(1 − a(z₀ + z))) in place of Φ(z).

    Args:
        a: (n,), one number per sample.
        b: (n,), of the same samples.
        level: The probability with which the interval should hold the true mean.
        method: "percentile" or "bca".
        resamples: How often the samples are drawn again.
        seed: Of the draws.

    Returns:
        The mean and its interval; of one point where all differences are equal.

    Raises:
        ValueError: Fewer than two pairs, unequal lengths, numbers that are not finite, or an option out of range.

    Source: Efron 1987, "Better Bootstrap Confidence Intervals", eq. 2.3 and 6.6 (skewness of a mean: §6).

    Example:
        >>> interval = bootstrap_difference([1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0])
        >>> interval.value, interval.low > 0
        (2.0, True)
    """
    difference = _differences(a, b)
    _check_share(level, "level")
    if method not in get_args(BootstrapMethod):
        raise ValueError(f"method {method!r} is unknown: use one of {', '.join(get_args(BootstrapMethod))}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, but got {resamples}")
    mean = float(difference.mean())
    if np.ptp(difference) == 0:
        return Interval(mean, mean, mean)
    rng = np.random.default_rng(seed)
    n = len(difference)
    means = np.concatenate([difference[rng.integers(n, size=(k, n))].mean(axis=1) for k in _chunks(resamples, n)])
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _corrected(tails, means, difference - mean, mean)
    low, high = np.quantile(means, tails)
    return Interval(mean, float(low), float(high))


def _corrected(tails: Array, means: Array, deviations: Array, mean: float) -> Array:
    # Half of the ties count as below; kept off 0 and 1, where z₀ would be infinite.
    below = ((means < mean).mean() + (means <= mean).mean()) / 2
    z0 = special.ndtri(np.clip(below, 0.5 / len(means), 1 - 0.5 / len(means)))
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    z = z0 + special.ndtri(tails)
    corrected: Array = special.ndtr(z0 + z / (1 - acceleration * z))
    return corrected


def permutation_test(
    a: ArrayLike,
    b: ArrayLike,
    *,
    alternative: Alternative = "two-sided",
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """The p-value of "swapping a and b within pairs makes no difference", by the mean of a − b.

    Exact over all 2ⁿ swaps where these are no more than `resamples`; else p = (1 + k)/(1 + resamples) with k random
    swaps at least as extreme, which is never 0.

    Args:
        a: (n,), one number per sample.
        b: (n,), of the same samples.
        alternative: "greater" asks whether a is greater.
        resamples: How many swaps are drawn.
        seed: Of the draws.

    Raises:
        ValueError: As in `bootstrap_difference`.

    Source: Fisher 1935, The Design of Experiments, §21; Phipson & Smyth 2010, eq. 2.

    Example:
        >>> permutation_test([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0], alternative="greater")
        0.0625
    """
    difference = _differences(a, b)
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative {alternative!r} is unknown: use one of {', '.join(get_args(Alternative))}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, but got {resamples}")
    n = len(difference)
    exact = n < 63 and 2**n <= resamples
    observed = _extreme(np.array([difference.sum()]), alternative)[0]
    # A sum in another order may differ in its last digits and still be the same swap.
    bar = observed - 1e-12 * np.abs(difference).sum()
    extreme = total = 0
    for signs in _all_signs(n) if exact else _random_signs(n, resamples, np.random.default_rng(seed)):
        extreme += int((_extreme(signs @ difference, alternative) >= bar).sum())
        total += len(signs)
    return extreme / total if exact else (1 + extreme) / (1 + total)


def _extreme(sums: Array, alternative: Alternative) -> Array:
    return np.abs(sums) if alternative == "two-sided" else sums if alternative == "greater" else -sums


def _all_signs(n: int) -> Iterator[Array]:
    numbers = np.arange(2**n)
    for part in np.array_split(numbers, max(1, len(numbers) * n // CHUNK)):
        yield np.where(part[:, None] >> np.arange(n) & 1, -1.0, 1.0)


def _random_signs(n: int, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    for k in _chunks(resamples, n):
        yield np.where(rng.integers(2, size=(k, n)), -1.0, 1.0)


def equivalence_test(a: ArrayLike, b: ArrayLike, margin: float, *, alpha: float = 0.05) -> Equivalence:
    """Whether paired samples are the same up to a margin: two one-sided t-tests of |mean(a − b)| ≥ margin.

    Not finding a difference is no proof of sameness; this is.

    Args:
        a: (n,), one number per sample.
        b: (n,), of the same samples.
        margin: The smallest difference that matters, greater than 0.
        alpha: The risk of calling different things equivalent.

    Raises:
        ValueError: As in `bootstrap_difference`, or the margin is not positive.

    Source: Schuirmann 1987, "A Comparison of the Two One-Sided Tests Procedure".

    Example:
        >>> equivalence_test([1.0, 2.0, 3.0], [1.001, 2.0, 2.999], margin=0.1).equivalent
        True
    """
    difference = _differences(a, b)
    _check_share(2 * alpha, "2 * alpha")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin must be positive, but got {margin}")
    n, mean = len(difference), float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Equivalence(abs(mean) < margin, 0.0 if abs(mean) < margin else 1.0, Interval(mean, mean, mean))
    # scipy.stats would give the same by name, and 45 MB of memory to every check with it.
    p = float(max(special.stdtr(n - 1, -(mean + margin) / error), special.stdtr(n - 1, (mean - margin) / error)))
    reach = -float(special.stdtrit(n - 1, alpha)) * error
    return Equivalence(p < alpha, p, Interval(mean, mean - reach, mean + reach))


def benjamini_hochberg(p: ArrayLike, rate: float = 0.05) -> Discoveries:
    """Reject as many of m hypotheses as the rate of false ones among the rejected allows.

    With p₍₁₎ ≤ … ≤ p₍ₘ₎: reject the k smallest, k the largest with p₍ₖ₎ ≤ k·rate/m.

    Args:
        p: (m,), independent or positively dependent p-values.
        rate: The expected share of false discoveries allowed.

    Raises:
        ValueError: A p-value or the rate is outside [0, 1], or not a number.

    Source: Benjamini & Hochberg 1995, procedure 1.

    Example:
        >>> benjamini_hochberg([0.001, 0.04, 0.03, 0.8]).rejected.tolist()
        [True, False, False, False]
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p must be one row of numbers in [0, 1]")
    _check_share(rate, "rate")
    falling = np.argsort(-values, kind="stable")
    ranks = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[falling] = np.minimum(np.minimum.accumulate(values[falling] * len(values) / ranks), 1)
    return Discoveries(adjusted <= rate, adjusted)


def empirical_p(observed: ArrayLike, null: ArrayLike) -> Array:
    """The p-value of an observation against a resampled null: (1 + how many reach it)/(1 + how many there are).

    Args:
        observed: (...), large values being extreme.
        null: (r, ...), r draws of each under the null.

    Raises:
        ValueError: There are no draws, the shapes do not fit, or a number is not a number.

    Source: Phipson & Smyth 2010, eq. 2.

    Example:
        >>> float(empirical_p(3.0, [0.0, 1.0, 4.0]))
        0.5
    """
    value, draws = np.asarray(observed, dtype=np.float64), np.asarray(null, dtype=np.float64)
    if draws.ndim != value.ndim + 1 or draws.shape[1:] != value.shape or len(draws) == 0:
        raise ValueError(f"null must have the shape (draws, *{value.shape}), but got {draws.shape}")
    if np.isnan(value).any() or np.isnan(draws).any():
        raise ValueError("observed and null must not hold NaN")
    return np.asarray((1 + (draws >= value).sum(axis=0)) / (1 + len(draws)))


def median_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The median, between two of the values that hold the true one with at least the given probability.

    [x₍ₖ₎, x₍ₙ₊₁₋ₖ₎] with the largest k for which 1 − 2·P(B < k) ≥ level, B binomial with n and ½: exact, whatever the
    distribution. Fewer values than that takes (6 for 0.95) give their whole range.

    Args:
        values: (n,), independent.
        level: The probability with which the interval should hold the true median.

    Raises:
        ValueError: There are no values, one is not finite, or the level is out of range.

    Source: David & Nagaraja 2003, Order Statistics, §7.1.

    Example:
        >>> median_interval([3.0, 1.0, 2.0, 4.0, 6.0, 5.0, 7.0])
        Interval(value=4.0, low=1.0, high=7.0)
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError("a median needs one row of finite numbers")
    _check_share(level, "level")
    n = len(x)
    fewer = special.bdtr(np.arange((n + 1) // 2), n, 0.5)  # P(B ≤ j) = P(B < j + 1)
    k = max(1, int((1 - 2 * fewer >= level).sum()))
    return Interval(float(np.median(x)), float(x[k - 1]), float(x[n - k]))


def _differences(a: ArrayLike, b: ArrayLike) -> Array:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs need two rows of equal length, but got shapes {first.shape} and {second.shape}")
    if len(first) < 2:
        raise ValueError(f"at least two pairs are needed, but got {len(first)}")
    difference: Array = first - second
    if not np.isfinite(difference).all():
        raise ValueError("the samples hold numbers that are not finite")
    return difference


def _check_share(share: float, name: str) -> None:
    if not 0 < share < 1:
        raise ValueError(f"{name} must lie between 0 and 1, but got {share}")


def _chunks(resamples: int, n: int) -> Iterator[int]:
    """How many resamples to draw at a time."""
    step = max(1, CHUNK // n)
    return itertools.chain(itertools.repeat(step, resamples // step), [resamples % step] if resamples % step else [])
