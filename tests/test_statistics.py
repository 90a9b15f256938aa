"""The statistics room against SciPy, against brute force, and against its own promises on known populations."""

import itertools

import numpy as np
import pytest
from scipy import stats

from normscope.statistics import (
    benjamini_hochberg,
    bootstrap_difference,
    empirical_p,
    equivalence_test,
    median_interval,
    permutation_test,
)
from normscope.statistics.paired import _corrected

RNG = np.random.default_rng(0)
A, B = RNG.gamma(1.0, size=40), RNG.gamma(1.0, size=40)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_agrees_with_scipy(method):
    skewed, zeros = A**2, np.zeros(40)  # skewed, so that the two methods differ
    ours = bootstrap_difference(skewed, zeros, method=method, level=0.99, resamples=40_000, seed=1)
    theirs = stats.bootstrap(
        (skewed,), np.mean, confidence_level=0.99, method=method, n_resamples=40_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(skewed.mean())
    # The 0.5 % point of 40 000 draws is known to about 2 % of the interval's length.
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * (theirs.high - theirs.low))
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * (theirs.high - theirs.low))


def test_bca_differs_from_percentile_on_skewed_data_only():
    zeros = np.zeros(40)
    low = [bootstrap_difference(A**2, zeros, method=method).low for method in ("percentile", "bca")]
    assert low[1] > low[0]
    even = np.r_[A, -A]
    low = [bootstrap_difference(even, np.zeros(80), method=method).low for method in ("percentile", "bca")]
    assert low[1] == pytest.approx(low[0], rel=0.05)


def test_bca_corrects_for_bias_by_twice_z0():
    # No skewness, 80 % of the means below the estimate: Φ(2·z₀ + z), Efron 1987, eq. 2.3 with a = 0.
    means, tails = np.arange(10.0), np.array([0.025, 0.975])
    expected = stats.norm.cdf(2 * stats.norm.ppf(0.8) + stats.norm.ppf(tails))
    assert _corrected(tails, means, np.array([-1.0, 1.0]), 7.5) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_covers_the_truth_as_often_as_it_says(method):
    draws = np.random.default_rng(3).normal(0.5, 1.0, size=(300, 60))
    hits = [
        low <= 0.5 <= high
        for _, low, high in (
            bootstrap_difference(x, np.zeros(60), level=0.9, method=method, resamples=400) for x in draws
        )
    ]
    # 300 trials at 0.9: standard deviation 0.017; the bootstrap of 60 samples is slightly too short.
    assert 0.83 <= np.mean(hits) <= 0.95


def test_bootstrap_is_deterministic_paired_and_chunked(monkeypatch):
    whole = bootstrap_difference(A, B, seed=5)
    assert whole == bootstrap_difference(A, B, seed=5) != bootstrap_difference(A, B, seed=6)
    assert bootstrap_difference(A + 100 * B, 100 * B + A - 1).value == pytest.approx(1)
    monkeypatch.setattr("normscope.statistics.paired.CHUNK", 997)
    pieces = bootstrap_difference(A, B, resamples=1000, seed=5)
    assert pieces.low < pieces.value < pieces.high
    assert bootstrap_difference([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_small_permutation_tests_are_exact(alternative):
    a, b = A[:9], B[:9]
    d = a - b
    sums = np.array([np.dot(signs, d) for signs in itertools.product([1, -1], repeat=9)])
    key = {"two-sided": np.abs, "greater": lambda s: s, "less": lambda s: -s}[alternative]
    expected = np.mean(key(sums) >= key(d.sum()) - 1e-9)
    assert permutation_test(a, b, alternative=alternative) == expected
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", alternative=alternative,
        vectorized=True, n_resamples=10_000,
    ).pvalue  # fmt: skip
    # SciPy doubles the smaller tail, which is not the same for skewed sums.
    assert permutation_test(a, b, alternative=alternative) == pytest.approx(theirs, abs=0.05)


def test_sampled_permutation_test_agrees_with_scipy_and_is_never_zero():
    theirs = stats.ttest_rel(A, B + 0.3).pvalue
    assert permutation_test(A, B + 0.3, seed=1) == pytest.approx(theirs, abs=0.05)
    assert permutation_test(A + 50, B, resamples=999) == 1 / 1000
    assert permutation_test(A, B, seed=3) == permutation_test(A, B, seed=3)


def test_permutation_p_values_are_uniform_under_the_null():
    draws = np.random.default_rng(4).normal(size=(300, 2, 20))
    p = [permutation_test(a, b, resamples=300) for a, b in draws]
    assert stats.kstest(p, "uniform").pvalue > 0.001


def test_equivalence_is_two_one_sided_t_tests():
    margin = 0.4
    lower = stats.ttest_1samp(A - B, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(A - B, margin, alternative="less").pvalue
    result = equivalence_test(A, B, margin)
    assert result.p == pytest.approx(max(lower, upper))
    interval = stats.ttest_1samp(A - B, 0).confidence_interval(0.9)
    assert result.difference[1:] == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("shift", [0.0, 0.2, -0.2, 1.0])
def test_equivalent_means_that_the_interval_lies_within_the_margin(shift):
    for margin in (0.05, 0.3, 0.6, 2.0):
        result = equivalence_test(A + shift, B, margin)
        assert result.equivalent == (-margin < result.difference.low and result.difference.high < margin)
    assert equivalence_test(B + 0.25, B, 0.3).equivalent
    assert not equivalence_test([1.5, 2.5], [1.0, 2.0], 0.5).equivalent


def test_noise_is_not_called_equivalent_more_often_than_alpha():
    draws = np.random.default_rng(5).normal(0.5, 1.0, size=(1000, 20))  # truth on the edge of the margin
    called = np.mean([equivalence_test(x, np.zeros(20), 0.5).equivalent for x in draws])
    assert called <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_benjamini_hochberg_is_the_step_up_procedure():
    for seed in range(50):
        p = np.random.default_rng(seed).uniform(size=12) ** 3
        order = np.argsort(p)
        passing = [k for k in range(1, 13) if p[order[k - 1]] <= k * 0.1 / 12]
        expected = np.zeros(12, bool)
        expected[order[: max(passing, default=0)]] = True
        result = benjamini_hochberg(p, 0.1)
        assert (result.rejected == expected).all()
        assert ((result.adjusted <= 0.1) == expected).all()
    assert benjamini_hochberg([]).rejected.shape == (0,)


def test_empirical_p_counts_ties_and_never_is_zero():
    null = np.array([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]])
    assert empirical_p([2.0, 100.0], null).tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: bootstrap_difference([1.0], [2.0]), "at least two pairs"),
        (lambda: bootstrap_difference([1.0, 2.0], [1.0, 2.0, 3.0]), "equal length"),
        (lambda: bootstrap_difference([1.0, np.nan], [1.0, 2.0]), "not finite"),
        (lambda: bootstrap_difference(A, B, level=99), "level must lie between 0 and 1"),
        (lambda: bootstrap_difference(A, B, method="bayes"), "use one of percentile, bca"),
        (lambda: bootstrap_difference(A, B, resamples=0), "resamples must be at least 1"),
        (lambda: permutation_test(A, B, alternative="up"), "use one of two-sided, greater, less"),
        (lambda: permutation_test(A, B, resamples=0), "resamples must be at least 1"),
        (lambda: equivalence_test(A, B, margin=-1), "margin must be positive"),
        (lambda: equivalence_test(A, B, 1.0, alpha=0.5), "alpha must lie"),
        (lambda: benjamini_hochberg([0.5, 1.5]), "in \\[0, 1\\]"),
        (lambda: benjamini_hochberg([0.5, np.nan]), "in \\[0, 1\\]"),
        (lambda: empirical_p(1.0, []), "null must have the shape|must not"),
        (lambda: empirical_p(np.nan, [1.0]), "NaN"),
    ],
)
def test_wrong_input_says_what_is_wrong(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("n", [1, 5, 6, 9, 16, 61])
def test_the_interval_of_a_median_is_the_narrowest_that_covers(n):
    low, high = median_interval(RNG.permutation(n) + 1.0)[1:]
    k = int(low)
    assert high == n + 1 - k
    binomial = stats.binom(n, 0.5)
    if n >= 6:
        assert binomial.sf(k - 1) - binomial.sf(n - k) >= 0.95  # P(k ≤ B ≤ n − k)
    assert binomial.sf(k) - binomial.sf(n - k - 1) < 0.95


def test_the_interval_of_a_median_covers_as_often_as_it_says():
    draws = np.random.default_rng(4).exponential(size=(2000, 15))
    hits = [low <= np.log(2) <= high for _, low, high in map(median_interval, draws)]
    assert np.mean(hits) == pytest.approx(0.965, abs=0.015)  # exact for 15; 2000 trials: standard deviation 0.004


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0, 2.0]]])
def test_medians_of_nothing(values):
    with pytest.raises(ValueError, match="one row of finite numbers"):
        median_interval(values)
