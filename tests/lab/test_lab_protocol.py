"""The protocol against SciPy, against brute force, and on populations that are known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from normscope import statistics as ns

RNG = np.random.default_rng(0)


def test_fewer_than_eight_seeds_get_the_t_interval():
    a, b = RNG.normal(size=7), RNG.normal(size=7)
    effect = ns.paired_effect(a, b)
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (effect.low, effect.high) == pytest.approx((theirs.low, theirs.high))
    signs = np.array(list(itertools.product([1, -1], repeat=7)))
    sums = np.abs(signs @ (a - b))
    assert effect.p == pytest.approx((sums >= abs((a - b).sum()) - 1e-12).mean())


def test_eight_seeds_get_the_bootstrap():
    a = RNG.gamma(1.0, size=12)
    theirs = stats.bootstrap((a,), np.mean, method="BCa", n_resamples=10_000, rng=np.random.default_rng(1))
    effect = ns.paired_effect(a)
    # The 2.5 % point of 10 000 draws is known to about 2 % of the interval's length.
    width = effect.high - effect.low
    assert effect.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert effect.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_five_seeds_never_decide():
    assert ns.decide(ns.Effect(9.0, 8.0, 10.0, 0.0625, 5)) == "UNDECIDED"
    assert ns.decide_equivalence(ns.Effect(0.0, 0.0, 0.0, 1.0, 5), margin=1) == "UNDECIDED"


@pytest.mark.parametrize(
    ("low", "high", "least", "verdict"),
    [
        (0.1, 0.5, 0.0, "CONFIRMED"),
        (0.1, 0.5, 0.2, "UNDECIDED"),
        (0.3, 0.5, 0.2, "CONFIRMED"),
        (-0.5, -0.1, 0.2, "REFUTED"),
        (-0.1, 0.1, 0.2, "REFUTED"),  # has no effect of interest
        (-0.1, 0.1, 0.0, "UNDECIDED"),
    ],
)
def test_the_decision_rule(low, high, least, verdict):
    assert ns.decide(ns.Effect((low + high) / 2, low, high, 0.03, 6), least=least) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.4, 0.3, "CONFIRMED"), (0.6, 0.9, "REFUTED"), (-0.9, -0.6, "REFUTED"), (-0.6, 0.2, "UNDECIDED")],
)
def test_equivalence(low, high, verdict):
    assert ns.decide_equivalence(ns.Effect(0.0, low, high, 0.5, 6), margin=0.5) == verdict


def test_the_rule_errs_as_rarely_as_it_says():
    draws = np.random.default_rng(2).normal(size=(400, 10))
    wrong = sum(ns.decide(ns.paired_effect(row)) == "CONFIRMED" for row in draws)
    # 2.5 % of 400, the bootstrap of 10 seeds errs somewhat more often; binomial noise reaches 24.
    assert wrong <= 24


def test_items_drawn_again_widen_the_interval():
    items = 0.5 + RNG.normal(size=6)  # what all seeds share
    difference = items[None, :] + 0.01 * RNG.normal(size=(8, 6))
    zeros = np.zeros_like(difference)
    crossed, seeds_only = ns.crossed_effect(difference, zeros), ns.paired_effect(difference.mean(1))
    assert crossed.value == pytest.approx(difference.mean())
    assert crossed.high - crossed.low > 10 * (seeds_only.high - seeds_only.low)
    error = items.std(ddof=0) / math.sqrt(6)
    assert (crossed.high - crossed.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_holm_against_its_definition():
    p = np.array([0.01, 0.04, 0.03, 0.2])
    found = ns.holm(p)
    # 4·0.01, then 3·0.03, then max(…, 2·0.04), then 0.2: by hand.
    assert found.adjusted.tolist() == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert found.rejected.tolist() == [True, False, False, False]


def test_mcnemar_is_the_sign_test_of_discordant_pairs():
    a, b = RNG.integers(2, size=40), RNG.integers(2, size=40)
    only = int(((a == 1) & (b == 0)).sum())
    assert ns.mcnemar(a, b) == pytest.approx(stats.binomtest(only, int((a != b).sum())).pvalue)
    assert ns.mcnemar([1, 0], [1, 0]) == 1.0


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (977, 1000)])
def test_wilson(count, total):
    theirs = stats.binomtest(count, total).proportion_ci(method="wilson")
    assert ns.wilson(count, total)[1:] == pytest.approx((theirs.low, theirs.high))


def test_kaplan_meier_and_restricted_mean():
    times, arrived = RNG.integers(1, 20, size=40), RNG.random(40) < 0.7
    data = stats.CensoredData.right_censored(times, ~arrived)
    theirs = stats.ecdf(data).sf
    moments, shares = ns.kaplan_meier(times, arrived)
    assert shares == pytest.approx(theirs.evaluate(moments))
    grid = np.arange(20)
    assert ns.restricted_mean(times, arrived, 20) == pytest.approx(theirs.evaluate(grid).sum())
    assert ns.median_time(times, arrived) == grid[theirs.evaluate(grid) <= 0.5][0]


def test_log_rank():
    a, b = RNG.exponential(1.0, size=30), RNG.exponential(2.5, size=30)
    seen = np.ones(30, dtype=bool)
    theirs = stats.logrank(x=a, y=b)
    assert ns.log_rank((a, seen), (b, seen)) == pytest.approx(theirs.pvalue)
    # With every seed its own stratum, only who arrives first counts: the sign test's score.
    seeds = np.tile(np.arange(30), 2)
    wins = int((a < b).sum())
    score = stats.norm.sf(abs(wins - 15) / math.sqrt(30 / 4)) * 2
    assert ns.log_rank((a, seen), (b, seen), seeds) == pytest.approx(score)


def test_a_ratio_of_medians_that_are_never_reached():
    never, ten = ([50.0] * 6, [False] * 6), ([10.0] * 6, [True] * 6)
    assert ns.median_ratio(never, ten) == (math.inf, math.inf, math.inf)
    assert ns.median_ratio(ten, never)[0] == 0
    value, low, high = ns.median_ratio(never, never)
    assert math.isnan(value)
    assert (low, high) == (0, math.inf)


def test_slope():
    x, y = RNG.normal(size=5), RNG.normal(size=(3, 5))
    assert ns.slope(x, y) == pytest.approx([stats.linregress(x, row).slope for row in y])
