"""B01: MNIST with three layers of sigmoids, figure 1 of the paper at full size."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import available, samples
from normscope.lab.sketch import band, line, spread
from normscope.lab.training import Arm, Tuned, first_reaching, train
from normscope.lab.verdicts import by_effect, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, log_rank, median_ratio, paired_effect, restricted_mean

__all__ = ["EXPERIMENT", "Mnist"]

HIDDEN = (100, 100, 100)
BATCH = 60
LEVELS = (0.15, 0.5, 0.85)
NORMS = ("none", "BN")
STEPS: Mapping[ProfileName, int] = {"quick": 300, "cpu": 50_000, "full": 50_000}
DEVIATIONS: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.0,),
    "cpu": (0.0, 0.05),
    "full": (0.0, 0.01, 0.05, 0.1),
}


class Mnist(Tuned):
    """784-100-100-100-10 sigmoid units, with and without Batch Normalization, each at its own best settings."""

    registration = register(
        "B01",
        statement="On MNIST, a network of three layers of 100 sigmoid units trains faster and ends higher with Batch "
        "Normalization, and its units' inputs are steadier.",
        source="Ioffe & Szegedy 2015, §4.1 and Figure 1",
        confirms="with each network at its own best rate and initial deviation, it needs fewer steps to 95 %, "
        "the whole "
        "interval of the ratio above 1, and does not end lower",
        refutes="the ratio's interval lies at or below 1; true at the shared settings only: conditional",
        thresholds={"target": 0.95, "ratio": 1, "final": 0},
        design="Binary MNIST, Gaussian initial weights, cross-entropy, plain SGD, batch 60, 50 000 steps, "
        "constant rate. "
        "Rates 0.03 to 3 and initial deviations tuned on validation data with 2 seeds and a tenth of the steps; "
        "10 seeds "
        "at each network's best settings and at the best rate of the one without. Test accuracy 100 times; "
        "percentiles 15, 50, 85 of "
        "what every unit of the last hidden layer receives. Running statistics in evaluation.",
        cuts=("initial deviation 0.1", "initial deviation 0.01", "50 seeds down to 10"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 6, "cpu": 10, "full": 50}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.3, 3.0),
        "cpu": (0.03, 0.1, 0.3, 1.0, 3.0),
        "full": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    }
    # As many as share the overhead and still leave two processes something each.
    together = 5

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Both networks at every initial deviation."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "norm": norm, "deviation": deviation, "steps": STEPS[profile]}
            for deviation in DEVIATIONS[profile]
            for norm in NORMS
        ]

    def tuning(self, arm: Arm) -> Arm:
        """A tenth of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Tune all; then train each network at its own best settings, and at the other's best without."""
        arms = self.arms(profile)
        tuning = [task for arm in arms for task in self._tuning(arm, profile)]
        if any(task not in results for task in tuning):
            return tuning
        own = {norm: _choice(results.of(tuning), norm) for norm in NORMS}
        runs = []
        for norm in NORMS:
            for rate, deviation in dict.fromkeys((own[norm], own["none"])):
                arm = dict(arms[0]) | {"norm": norm, "deviation": deviation}
                runs += self._runs(arm, rate, seeds)
        return tuning + runs

    def measure(self, task: Task) -> Numbers:
        """Train networks of several seeds at once."""
        data = samples(task.text("data"), "binary")
        widths = (*data.shape, *HIDDEN, data.classes)
        network = Perceptrons(
            widths, task.seeds, norm=task.text("norm"), activation="sigmoid", deviation=task.number("deviation")
        )
        history: list[Tensor] = []

        def on_probe(_: int) -> None:
            history.append(_percentiles(network, data.test_x[:500], len(task.seeds)))

        tuning = task.text("stage") == "tune"
        found = train(
            network,
            data,
            task.seeds,
            steps=task.whole("steps"),
            batch=BATCH,
            rate=task.number("rate"),
            probes=4 if tuning else 100,
            on_probe=None if tuning else on_probe,
        )
        return found if tuning else found | _drift(torch.stack(history))

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Steps to the target, final accuracy, drift."""
        own = {norm: _choice(results, norm) for norm in NORMS}
        title = str(next(iter(results)).task["data"])
        steps = next(iter(results.where(stage="test"))).task["steps"]
        valid = f"{title}, binary, 3 × 100 sigmoid units, {steps:,} steps of {BATCH}, plain SGD"
        at = {norm: self._reached(results, norm, own[norm]) for norm in NORMS}
        ratio = median_ratio(at["none"], at["BN"])
        shared = median_ratio(at["none"], self._reached(results, "BN", own["none"]))
        finals = [
            results.per_seed("test", stage="test", norm=n, rate=own[n][0], deviation=own[n][1]) for n in ("BN", "none")
        ]
        final = paired_effect(*finals)
        seeds = len(finals[0])
        target = self.threshold("target")
        means = [restricted_mean(*at[norm], budget=float(steps)) for norm in NORMS]
        reached = [sum(at[norm][1]) for norm in NORMS]
        curves_differ = log_rank(at["none"], at["BN"], 2 * list(range(seeds)))
        fast = (
            f"To {target:.0%}: {means[1]:,.0f} steps with (rate {own['BN'][0]:g}), {means[0]:,.0f} without "
            f"(rate {own['none'][0]:g}), "
            f"each at its best; {reached[1]} and {reached[0]} of {seeds} seeds arrived. The medians' ratio is "
            f"{_span(ratio)}; at the "
            f"settings best without it, {_span(shared)}; log-rank p = {curves_differ:.2g}, stratified by seed"
        )
        speed = Judgement(
            ("000-4", "002-1", "002-6", "003-4"),
            "fewer steps, each network tuned?",
            _speed(ratio, shared, final.low, seeds),
            Interval(*ratio, "times fewer steps"),
            f"{fast}.",
            valid,
            seeds,
            2,
        )
        drift = paired_effect(*(_log_drift(results, n, own[n]) for n in ("none", "BN")))
        higher = f"Final test accuracy {statistics.mean(finals[0]):.2%} with, {statistics.mean(finals[1]):.2%} without"
        steadier = (
            f"Median travel of a last hidden unit's median input, logarithm of the ratio without/with {drift.value:.2f}"
        )
        parts = (
            by_effect(("001-26",), "does it end higher?", final, higher, valid, unit="of accuracy"),
            by_effect(
                ("001-26",), "are the units' inputs steadier?", drift, steadier, valid, unit="ln ratio of travel"
            ),
            ruled(("001-26",), "is it faster?", speed.verdict, speed.outcome, valid, effect=speed.effect, seeds=seeds),
        )
        return (speed, *parts)

    def figure(self, results: Results) -> Picture:
        """The paper's three panels."""
        own = {norm: _choice(results, norm) for norm in NORMS}
        curves: list[Series] = []
        bands: list[Plot] = []
        names = {"none": "without BN", "BN": "with BN"}
        for k, norm in enumerate(("BN", "none")):
            rate, deviation = own[norm]
            steps, rows = self.curves(results, norm=norm, rate=rate, deviation=deviation)
            curves += spread(f"{names[norm]}, rate {rate:g}", steps, rows, k)
            m = results.where(stage="test", norm=norm, rate=rate, deviation=deviation)[0]
            low, middle, high = (m.row(f"band {level:g}") for level in LEVELS)
            series = (band("15th to 85th percentile", steps, low, high, k), line("median", steps, middle, k))
            title = f"{'c' if norm == 'BN' else 'b'}  input of a typical unit, {names[norm]}"
            bands.append(Plot(title, "step", "input of the sigmoid", series))
        limits = [v for plot in bands for s in plot.series for v in (*s.low, *s.high)]
        bands = [dataclasses.replace(plot, y_limits=(min(limits), max(limits))) for plot in bands]
        accuracy = Plot("a  test accuracy", "step", "share right", tuple(curves))
        return Picture(
            "The paper's figure 1: (a) shows accuracy against steps with and without Batch Normalization, (b, "
            "c) the percentiles of one "
            "typical unit's input. Here: every network at its own best rate, "
            "the mean of the "
            "seeds and their range.",
            (accuracy, *reversed(bands)),
        )

    def _reached(self, results: Results, norm: str, settings: tuple[float, float]) -> tuple[list[float], list[bool]]:
        steps, rows = self.curves(results, norm=norm, rate=settings[0], deviation=settings[1])
        pairs = [first_reaching(steps, row, self.threshold("target")) for row in rows]
        return [step for step, _ in pairs], [arrived for _, arrived in pairs]


def _choice(results: Results, norm: str) -> tuple[float, float]:
    """The rate and the deviation of the best mean validation accuracy; the smaller of two equals."""
    found = results.where(stage="tune", norm=norm)
    scores = {(m.task.number("rate"), m.task.number("deviation")): statistics.mean(m.row("valid")) for m in found}
    return max(sorted(scores), key=lambda key: scores[key])


def _speed(ratio: Sequence[float], shared: Sequence[float], final: float, seeds: int) -> LabVerdict:
    if seeds < MINIMUM_SEEDS:
        return "UNDECIDED"
    if ratio[1] > 1:
        return "CONFIRMED" if final >= 0 else "CONDITIONAL"
    if ratio[2] <= 1:
        return "CONDITIONAL" if shared[1] > 1 else "REFUTED"
    return "CONDITIONAL" if shared[1] > 1 else "UNDECIDED"


def _span(ratio: Sequence[float]) -> str:
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"


def _log_drift(results: Results, norm: str, settings: tuple[float, float]) -> list[float]:
    values = results.per_seed("drift", stage="test", norm=norm, rate=settings[0], deviation=settings[1])
    return torch.tensor(values).clamp(min=1e-6).log().tolist()


@torch.no_grad()
def _percentiles(network: Perceptrons, x: Tensor, seeds: int) -> Tensor:
    """(3, seeds, units): percentiles over the samples of what the last hidden units receive."""
    received = network.hidden(x.expand(seeds, *x.shape))[-1]
    return received.quantile(torch.tensor(LEVELS), dim=1)


def _drift(history: Tensor) -> dict[str, list[float]]:
    """Of the second half of the measurements: the median unit's travel; of the first seed its bands throughout."""
    medians = history[len(history) // 2 :, 1]  # early running statistics still hold their initial values
    travel = medians.amax(0) - medians.amin(0)
    unit = int(travel[0].argsort()[travel.shape[1] // 2])
    bands = {f"band {level:g}": history[:, k, 0, unit].tolist() for k, level in enumerate(LEVELS)}
    return {"drift": travel.nan_to_num(nan=1e6).median(1).values.tolist()} | bands


EXPERIMENT = Mnist()
