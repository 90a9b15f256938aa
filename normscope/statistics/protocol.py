"""From measurements to a verdict: the one protocol of all training experiments.

Runs are paired by seed: the same data split, order of the batches, initial weights and noise. Only differences within a
seed count. A decision needs six seeds, because an exact sign-flip test of n pairs cannot go below p = 2/2ⁿ, which is
0.0625 for five and 0.031 for six.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from normscope.statistics.paired import Discoveries, Interval, bootstrap_difference, permutation_test

__all__ = [
    "MINIMUM_SEEDS",
    "Decision",
    "Effect",
    "crossed_effect",
    "decide",
    "decide_equivalence",
    "holm",
    "mcnemar",
    "paired_effect",
    "slope",
    "wilson",
]

MINIMUM_SEEDS = 6
# From this many pairs on the bootstrap covers as it should; below, the t interval does (it knows that σ is estimated).
BOOTSTRAP_SEEDS = 8

Decision = Literal["CONFIRMED", "REFUTED", "UNDECIDED"]
Array = NDArray[np.float64]


class Effect(NamedTuple):
    """A mean paired difference.

    Attributes:
        value: The mean over seeds.
        low: Lower end of its interval.
        high: Upper end.
        p: Of the exact sign-flip test that nothing differs.
        n: How many seeds.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


def paired_effect(a: ArrayLike, b: ArrayLike | None = None, *, level: float = 0.95, seed: int = 0) -> Effect:
    """The mean of a − b over seeds: BCa bootstrap from eight seeds on, a t interval below, and a sign-flip p-value.

    Args:
        a: (n,), one number per seed.
        b: (n,), of the same seeds; None where `a` already holds differences.
        level: The probability with which the interval should hold the true mean.
        seed: Of the resamples.

    Raises:
        ValueError: Fewer than two pairs, unequal lengths, or numbers that are not finite.

    Example:
        >>> effect = paired_effect([3.0, 4.0, 5.0, 4.0, 3.0, 5.0], [1.0, 2.0, 2.0, 2.0, 1.0, 3.0])
        >>> round(effect.value, 2), effect.low > 1.5, effect.p
        (2.17, True, 0.03125)
    """
    first = np.asarray(a, dtype=np.float64)
    second = np.zeros_like(first) if b is None else np.asarray(b, dtype=np.float64)
    p = permutation_test(first, second, seed=seed)
    n = len(first)
    if n >= BOOTSTRAP_SEEDS:
        return Effect(*bootstrap_difference(first, second, level=level, method="bca", seed=seed), p, n)
    return Effect(*_t_interval(first - second, level), p, n)


def _t_interval(difference: Array, level: float) -> Interval:
    n, mean = len(difference), float(difference.mean())
    reach = -float(special.stdtrit(n - 1, (1 - level) / 2)) * float(difference.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - reach, mean + reach)


def crossed_effect(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Effect:
    """The mean of a − b over seeds and test items, both drawn again: the items are the same for every seed and arm.

    Args:
        a: (n, m), a number per seed and item.
        b: (n, m), of the same seeds and items.
        level: The probability with which the interval should hold the true mean.
        resamples: How often seeds, and within them items, are drawn again.
        seed: Of the draws.

    Raises:
        ValueError: The shapes differ or hold fewer than two seeds or items.

    Source: Owen 2007, "The pigeonhole bootstrap", §1.

    Example:
        >>> crossed_effect([[1.0, 2.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], resamples=100).value
        1.5
    """
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if difference.ndim != 2 or min(difference.shape) < 2:
        raise ValueError(f"two seeds and two items are the least, but got the shape {difference.shape}")
    n, m = difference.shape
    rng = np.random.default_rng(seed)
    # Multiplicities instead of indices: two small matrices per chunk in place of (resamples, n, m) numbers.
    rows = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    columns = rng.multinomial(m, np.full(m, 1 / m), size=resamples)
    means = np.einsum("rn,nm,rm->r", rows, difference, columns, optimize=True) / (n * m)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    seeds = difference.mean(axis=1)
    return Effect(float(difference.mean()), float(low), float(high), permutation_test(seeds, np.zeros(n)), n)


def decide(effect: Effect, *, least: float = 0.0) -> Decision:
    """Whether an effect is there, in the direction of larger numbers.

    CONFIRMED: the whole interval lies above `least`. REFUTED: it lies below 0, or, where a least effect is set, within
    (−least, least). Otherwise, and with fewer than six seeds, UNDECIDED.

    Args:
        effect: Signed so that the claim says "greater than 0".
        least: The smallest effect of interest, fixed before the run.

    Example:
        >>> decide(Effect(2.0, 1.0, 3.0, 0.03, 6)), decide(Effect(2.0, 1.0, 3.0, 0.06, 5))
        ('CONFIRMED', 'UNDECIDED')
        >>> decide(Effect(0.1, -0.2, 0.4, 0.5, 6), least=0.5)
        'REFUTED'
    """
    if effect.n < MINIMUM_SEEDS:
        return "UNDECIDED"
    if effect.low > least:
        return "CONFIRMED"
    if effect.high < 0 or (-least < effect.low and effect.high < least):
        return "REFUTED"
    return "UNDECIDED"


def decide_equivalence(effect: Effect, *, margin: float) -> Decision:
    """Whether there is no effect that matters: never concluded from a difference that is merely not significant.

    CONFIRMED: the whole interval lies within (−margin, margin). REFUTED: it lies outside. Otherwise UNDECIDED. With the
    95 % interval this is stricter than two one-sided tests at 5 %, which would use the 90 % interval.

    Args:
        effect: A difference.
        margin: The smallest difference that matters.

    Example:
        >>> decide_equivalence(Effect(0.1, -0.2, 0.4, 0.5, 6), margin=0.5)
        'CONFIRMED'
    """
    if effect.n < MINIMUM_SEEDS:
        return "UNDECIDED"
    if -margin < effect.low and effect.high < margin:
        return "CONFIRMED"
    return "REFUTED" if effect.low > margin or effect.high < -margin else "UNDECIDED"


def holm(p: ArrayLike, rate: float = 0.05) -> Discoveries:
    """Reject hypotheses of one family so that the risk of even one false rejection stays below the rate.

    Args:
        p: (m,) p-values, however dependent.
        rate: The risk.

    Raises:
        ValueError: A p-value is outside [0, 1].

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".

    Example:
        >>> holm([0.01, 0.04, 0.03]).adjusted.tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p must be one row of numbers in [0, 1]")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return Discoveries(adjusted <= rate, adjusted)


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """The exact two-sided p-value that two yes-or-no outcomes of the same runs have equal chances.

    Args:
        a: (n,) truth values.
        b: (n,) truth values of the same runs.

    Source: McNemar 1947; exact by the binomial distribution of the discordant pairs.

    Example:
        >>> mcnemar([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0])
        0.03125
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs need two rows of equal length, but got shapes {first.shape} and {second.shape}")
    only, total = int((first & ~second).sum()), int((first != second).sum())
    return min(1.0, 2 * float(special.bdtr(min(only, total - only), total, 0.5))) if total else 1.0


def wilson(count: int, total: int, *, level: float = 0.95) -> Interval:
    """A share with its Wilson score interval.

    Args:
        count: How many.
        total: Of how many, at least one.
        level: The probability with which the interval should hold the true share.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> interval = wilson(8, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.49, 0.943)
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"{count} of {total} is no share")
    z, share = float(special.ndtri((1 + level) / 2)), count / total
    shrink = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def slope(x: ArrayLike, y: ArrayLike) -> Array:
    """The least-squares slope of every row of y against x.

    Args:
        x: (k,) places, at least two of them different.
        y: (..., k).

    Example:
        >>> slope([0, 1, 2], [[0, 2, 4], [1, 1, 1]]).tolist()
        [2.0, 0.0]
    """
    places, values = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    centred = places - places.mean()
    if not np.any(centred):
        raise ValueError("a slope needs two different places")
    found: Array = values @ centred / (centred @ centred)
    return found
