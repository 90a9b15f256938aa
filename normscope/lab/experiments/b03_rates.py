"""B03: larger learning rates, and fewer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.samples import available
from normscope.lab.sketch import line, spread
from normscope.lab.training import Arm, classify, first_reaching
from normscope.lab.verdicts import by_effect, by_equivalence, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, median_ratio, paired_effect

__all__ = ["EXPERIMENT", "Rates"]

RATES: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.03, 0.3, 3.0),
    "cpu": tuple(10 ** (k / 2) for k in range(-6, 3)),
    "full": tuple(10 ** (k / 2) for k in range(-6, 4)),
}
NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN"),
    "full": ("none", "BN", "GN", "LN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 400, "full": 4000}


class Rates(Experiment):
    """A small convolutional network at every rate of a grid, with and without."""

    registration = register(
        "B03",
        statement="Batch Normalization allows larger learning rates, and so the same accuracy in fewer steps.",
        source="Ioffe & Szegedy 2015, §3.3 and Figure 3",
        confirms="its largest rate that trains is at least 3 times as large, the interval of the ratio above 1; "
        "and at each network's best "
        "rate it reaches the other's accuracy in fewer steps, the ratio's interval above 1",
        refutes="the interval of the ratio lies at or below 1",
        thresholds={"ratio of rates": 3, "chance plus": 0.02, "target below": 0.01, "same at a small rate": 0.005},
        design="Convolutions of 16, 32, 32, 64 channels, SGD with momentum 0.9, batch 64, MNIST averaged to 14 "
        "× 14, 10 000 "
        "images; every rate from 1e-3 on in half powers of ten, every seed. A rate trains if the test accuracy "
        "ends 2 points above chance. "
        "The best rate of each network is chosen on validation data. Target: the median final accuracy of the network "
        "without, less 1 point.",
        cuts=("GroupNorm and LayerNorm", "rate 10^1.5", "4000 steps down to 400"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Every norm at every rate."""
        name = available("mnist") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "cnn", "steps": STEPS[profile]}
        return [
            Task(self.name, tuple({**fixed, "norm": norm, "rate": rate}.items()), (seed,))
            for seed in seeds
            for norm in NORMS[profile]
            for rate in RATES[profile]
        ]

    def measure(self, task: Task) -> Numbers:
        """Train once."""
        return classify(task, form="half", train_size=10_000, test_size=5_000, batch=64, momentum=0.9)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Largest rates, steps to a target, small rates."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, a network of four convolutions, {task['steps']} steps of 64"
        best = {norm: _best(results, norm) for norm in ("none", "BN")}
        limits = {norm: self._limits(results, norm) for norm in best}
        rates = paired_effect(limits["BN"], limits["none"])
        factor = 10**rates.value
        larger = by_effect(
            ("001-3", "001-27", "000-7"),
            "does it train at larger rates?",
            rates,
            f"The largest rate that trains is {factor:.1f} times as large, "
            f"{10 ** statistics.mean(limits['BN']):.3g} against "
            f"{10 ** statistics.mean(limits['none']):.3g}",
            valid,
            unit="decades of the rate",
        )
        if larger.verdict == "CONFIRMED" and factor < self.threshold("ratio of rates"):
            larger = ruled(
                larger.claims,
                larger.question,
                "UNDECIDED",
                larger.outcome,
                valid,
                effect=larger.effect,
                seeds=rates.n,
                tests=1,
            )
        return (larger, *self._speed(results, best, valid), self._small(results, valid))

    def _limits(self, results: Results, norm: str) -> list[float]:
        """Per seed, the logarithm of the largest rate that trains; half a step below the grid where none does."""
        classes = 10
        bar = 1 / classes + self.threshold("chance plus")
        found: dict[int, float] = {}
        for m in results.where(norm=norm):
            rate, (seed,) = math.log10(m.task.number("rate")), m.task.seeds
            found.setdefault(seed, math.log10(_rates(results)[0]) - 0.5)
            if m.row("test")[0] > bar:
                found[seed] = max(found[seed], rate)
        return [found[seed] for seed in sorted(found)]

    def _speed(self, results: Results, best: Mapping[str, float], valid: str) -> tuple[Judgement, ...]:
        finals = {norm: results.per_seed("test", norm=norm, rate=best[norm]) for norm in best}
        target = statistics.median(finals["none"]) - self.threshold("target below")
        at = {norm: _reached(results, norm, best[norm], target) for norm in best}
        ratio = median_ratio(at["none"], at["BN"])
        same_rate = median_ratio(at["none"], _reached(results, "BN", best["none"], target))
        clocks = [statistics.median(results.per_seed("time", norm=norm, rate=best[norm])) for norm in ("BN", "none")]
        seeds = len(finals["none"])
        verdict: LabVerdict = "UNDECIDED"
        if seeds >= MINIMUM_SEEDS:
            verdict = "CONFIRMED" if ratio[1] > 1 else "REFUTED" if ratio[2] <= 1 else "UNDECIDED"
        outcome = (
            f"To {target:.1%}, each at its best rate ({best['BN']:.3g} with, {best['none']:.3g} without): "
            f"{ratio[0]:.2f} times fewer steps "
            f"({ratio[1]:.2f} to {ratio[2]:.2f}); at the same rate {same_rate[0]:.2f} times. A step takes "
            f"{clocks[0] / clocks[1]:.2f} times as "
            f"long, so in time the factor is {ratio[0] * clocks[1] / clocks[0]:.2f}. The paper's factors are "
            f"2.3 for it alone and 14 with six "
            "further changes."
        )
        effect = Interval(*ratio, "times fewer steps")
        higher = paired_effect(finals["BN"], finals["none"])
        fourteen: LabVerdict = "CONDITIONAL" if verdict == "CONFIRMED" else verdict
        return (
            ruled(
                ("000-4", "002-1", "002-6"),
                "does it need fewer steps?",
                verdict,
                outcome,
                valid,
                effect=effect,
                seeds=seeds,
                tests=1,
            ),
            ruled(
                ("001-6",),
                "14 times less time?",
                fourteen,
                outcome,
                f"fewer steps here, the number 14 is on record only; {valid}",
                effect=effect,
                seeds=seeds,
            ),
            by_effect(
                ("002-22",),
                "does it generalise better?",
                higher,
                f"Final test accuracy {statistics.mean(finals['BN']):.2%} with, "
                f"{statistics.mean(finals['none']):.2%} without",
                valid,
                unit="of accuracy",
            ),
        )

    def _small(self, results: Results, valid: str) -> Judgement:
        """At the smallest rate that trains both, is there still an advantage?"""
        rates = [
            rate
            for rate in _rates(results)
            if all(statistics.mean(results.per_seed("test", norm=norm, rate=rate)) > 0.5 for norm in ("none", "BN"))
        ]
        rate = rates[0] if rates else _rates(results)[-1]
        values = [results.per_seed("test", norm=norm, rate=rate) for norm in ("BN", "none")]
        return by_equivalence(
            (),
            "is the advantage gone at one small rate (Bjorck et al. 2018)?",
            paired_effect(*values),
            f"At rate {rate:.3g}: {statistics.mean(values[0]):.2%} with, {statistics.mean(values[1]):.2%} without",
            valid,
            unit="of accuracy",
            margin=self.threshold("same at a small rate"),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against the rate, and against steps at the best rates."""
        rates, right, curves = _rates(results), list[Series](), list[Series]()
        names = {"none": "without", "BN": "with BN"}
        for k, norm in enumerate(("BN", "none")):
            rows = [results.per_seed("test", norm=norm, rate=rate) for rate in rates]
            right += spread(names[norm], rates, list(zip(*rows, strict=True)), k)
            best = _best(results, norm)
            runs = results.where(norm=norm, rate=best)
            curves += [
                line(f"{names[norm]}, rate {best:.3g}" if i == 0 else "", m.row("steps"), m.row("curve"), k)
                for i, m in enumerate(runs)
            ]
        return Picture(
            "Final test accuracy at every learning rate, mean and range over seeds; accuracy against steps at "
            "each network's "
            "best rate, a line per seed.",
            (
                Plot("final accuracy", "learning rate", "test accuracy", tuple(right), x_log=True),
                Plot("at the best rates", "step", "test accuracy", tuple(curves)),
            ),
        )


def _rates(results: Results) -> list[float]:
    return sorted({m.task.number("rate") for m in results})


def _best(results: Results, norm: str) -> float:
    return max(_rates(results), key=lambda rate: statistics.mean(results.per_seed("valid", norm=norm, rate=rate)))


def _reached(results: Results, norm: str, rate: float, target: float) -> tuple[list[float], list[bool]]:
    runs = sorted(results.where(norm=norm, rate=rate), key=lambda m: m.task.seeds)
    pairs = [first_reaching(m.row("steps"), m.row("curve"), target) for m in runs]
    return [step for step, _ in pairs], [arrived for _, arrived in pairs]


EXPERIMENT = Rates()
