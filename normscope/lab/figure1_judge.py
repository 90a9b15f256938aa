"""What the runs of figure 1 say about the paper's claims: pure functions of the records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from normscope.records import Agreement, Interval, Statement, TrainingRun
from normscope.statistics import wilson

__all__ = ["accuracy_interval", "judge", "lessons", "shown_rate", "target_accuracy"]

# A run has trained when it comes this close to the best final accuracy of all runs, chance being far below.
TARGET = 0.9
# Two drifts that differ by less than this factor are called equal: units of one layer differ by more.
NOTICEABLE = 1.25
# Below this multiple of chance nothing was learned that could be compared.
LEARNED = 2
CLAIMS = (
    "BN allows much higher learning rates.",
    "BN trains in fewer steps.",
    "BN ends at a higher accuracy.",
    "BN keeps the inputs of the units steadier.",
)


def accuracy_interval(accuracy: float, samples: int) -> Interval:
    """The accuracy with its 95 % Wilson score interval over test samples."""
    share = wilson(round(accuracy * samples), samples)
    return Interval(accuracy, share.low, share.high, "fraction")


def target_accuracy(runs: Sequence[TrainingRun]) -> float:
    """The accuracy at which a run counts as trained."""
    return TARGET * max(run.final.value for run in runs)


def shown_rate(runs: Sequence[TrainingRun]) -> float:
    """The learning rate whose percentiles are drawn: the one at which the network *without* BN ends best."""
    return max((run for run in runs if not run.normalized), key=lambda run: run.final.value).learning_rate


def judge(runs: Sequence[TrainingRun], steps: int, chance: float) -> tuple[Statement, ...]:
    """Four claims of the paper, each with what was measured and whether it agrees.

    Args:
        runs: One per learning rate and network, with and without BN.
        steps: The length of the runs.
        chance: The accuracy of guessing.
    """
    if not max(run.final.value for run in runs) > LEARNED * chance:
        outcome = f"No network learned more than guessing within {steps:,} steps, so these settings say nothing."
        return tuple(Statement(claim, outcome, "open") for claim in CLAIMS)
    plain = [run for run in runs if not run.normalized]
    normed = [run for run in runs if run.normalized]
    target = target_accuracy(runs)
    return (
        _rates(plain, normed, target, steps),
        _speed(plain, normed, target),
        _accuracy(plain, normed, target, steps),
        _drift(runs),
    )


def lessons(runs: Sequence[TrainingRun]) -> tuple[str, str]:
    """The first two claims in a short line each, numbers only."""
    target = target_accuracy(runs)
    highest, steps = [], []
    for normalized in (True, False):
        mine = [run for run in runs if run.normalized == normalized]
        trained = [run.learning_rate for run in mine if run.final.value >= target]
        highest.append(f"up to {max(trained):g}" if trained else "at none")
        steps.append(_steps(_first(mine, target)))
    return (
        f"Learning rate: with Batch Normalization the network trained {highest[0]}, without it {highest[1]}.",
        f"Speed: to {target:.1%} accuracy {steps[0]} with it, {steps[1]} without.",
    )


def _rates(plain: Sequence[TrainingRun], normed: Sequence[TrainingRun], target: float, steps: int) -> Statement:
    def trained(runs: Sequence[TrainingRun]) -> list[float]:
        return sorted(run.learning_rate for run in runs if run.final.value >= target)

    without, having = trained(plain), trained(normed)
    return Statement(
        claim=CLAIMS[0],
        outcome=f"Of {len(normed)} learning rates, the network with BN trained at {_listed(having)}, the one without "
        f"at {_listed(without)}. Trained means {target:.1%} of the test set right after {steps:,} steps, which is "
        f"{TARGET:.0%} of the best result.",
        verdict=_sign(max(having, default=0.0) - max(without, default=0.0)),
    )


def _speed(plain: Sequence[TrainingRun], normed: Sequence[TrainingRun], target: float) -> Statement:
    without, having = _first(plain, target), _first(normed, target)
    outcome = f"To {target:.1%} accuracy, each at its fastest rate: {_steps(having)} with BN, {_steps(without)} without"
    ratio = without[0] / max(1.0, having[0]) if math.isfinite(without[0]) and math.isfinite(having[0]) else math.nan
    if math.isfinite(ratio):
        outcome += f", {_times(ratio)} as many"
    return Statement(
        claim=CLAIMS[1],
        outcome=outcome + ".",
        verdict=_sign(without[0] - having[0]) if math.isnan(ratio) else _factor(ratio),
    )


def _accuracy(plain: Sequence[TrainingRun], normed: Sequence[TrainingRun], target: float, steps: int) -> Statement:
    without = max(plain, key=lambda run: run.final.value)
    having = max(normed, key=lambda run: run.final.value)
    low, high = _difference(having.final, without.final)
    verdict: Agreement = "agrees" if low > 0 else "contradicts" if high < 0 else "open"
    ending = ", so this test set cannot tell them apart." if verdict == "open" else "."
    if min(without.final.value, having.final.value) < target:
        verdict, ending = "open", ", but one of them is still far from the end: train longer."
    return Statement(
        claim=CLAIMS[2],
        outcome=f"After {steps:,} steps, each at its best rate: {having.final.value:.1%} with BN "
        f"(rate {having.learning_rate:g}), {without.final.value:.1%} without (rate {without.learning_rate:g}). "
        f"The difference lies between {100 * low:+.1f} and {100 * high:+.1f} percentage points{ending}",
        verdict=verdict,
    )


def _drift(runs: Sequence[TrainingRun]) -> Statement:
    rate = shown_rate(runs)
    at_rate = {run.normalized: _median(run.drift) for run in runs if run.learning_rate == rate}
    without, having = at_rate[False], at_rate[True]
    ratio = without / having if having else math.inf
    return Statement(
        claim=CLAIMS[3],
        outcome=f"At rate {rate:g}, where the network without BN ends best, the median input of the median unit of the "
        f"last hidden layer travelled {having:.2f} with BN and {without:.2f} without, {_times(ratio)} as far.",
        verdict=_factor(ratio),
    )


def _first(runs: Sequence[TrainingRun], target: float) -> tuple[float, float]:
    """Fewest steps to the target over all rates, infinite if never, and the rate."""
    steps = [(run.accuracy.first_reaching(target), run.learning_rate) for run in runs]
    return min((math.inf if s is None else float(s), rate) for s, rate in steps)


def _steps(first: tuple[float, float]) -> str:
    steps, rate = first
    return f"{steps:,.0f} steps (rate {rate:g})" if math.isfinite(steps) else "never"


def _difference(a: Interval, b: Interval) -> tuple[float, float]:
    """Newcombe's 95 % interval of a − b for two proportions, from their Wilson intervals (his method 10)."""
    gap = a.value - b.value
    return gap - math.hypot(a.value - a.low, b.high - b.value), gap + math.hypot(a.high - a.value, b.value - b.low)


def _median(drift: Sequence[float]) -> float:
    return statistics.median(math.inf if math.isnan(d) else d for d in drift)


def _factor(ratio: float) -> Agreement:
    return "agrees" if ratio > NOTICEABLE else "contradicts" if ratio < 1 / NOTICEABLE else "open"


def _sign(difference: float) -> Agreement:
    return "agrees" if difference > 0 else "contradicts" if difference < 0 else "open"


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:,.0f} times"


def _listed(rates: Sequence[float]) -> str:
    words = [f"{rate:g}" for rate in rates]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0] if words else "none"
