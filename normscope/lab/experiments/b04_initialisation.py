"""B04: the scale of the initial weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import available, samples
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, columns, mean_of, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Initialisation"]

GAINS: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.1, 1.0),
    "cpu": tuple(10 ** (k / 2) for k in range(-4, 4)),
    "full": tuple(10 ** (k / 2) for k in range(-6, 5)),
}
RATES: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.1,),
    "cpu": (0.03, 0.1, 0.3, 1.0),
    "full": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 600, "full": 6000}
UNITS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("sigmoid",),
    "cpu": ("sigmoid", "relu"),
    "full": ("sigmoid", "tanh", "relu"),
}
ARMS = {"none": "without", "BN": "with BN", "BN scaled": "with BN, rate × gain²"}


class Initialisation(Experiment):
    """Perceptrons whose hidden weights start at a hundredth to thirty times the usual scale."""

    registration = register(
        "B04",
        statement="With Batch Normalization the initial weights matter less.",
        source="Ioffe & Szegedy 2015, §3.3; tutorials",
        confirms="the range of initial scales whose accuracy lies within 2 points of the best is wider with it than "
        "without by at least half a decade, each scale at its own best rate",
        refutes="it is not wider by half a decade, or narrower",
        thresholds={"within": 0.02, "decades": 0.5},
        design="Three layers of 100 units with sigmoid, tanh or ReLU; SGD with momentum 0.9, batch 64, MNIST averaged "
        "to 14 × 14, 5 000 images. Gains of 0.01 to 30 on the usual weights of the hidden layers (1/√inputs, for ReLU "
        "√2 of it), in half powers of ten; every gain at four rates, its best chosen on validation data, per network "
        "over all seeds. The width is the number of gains within 2 points of the seed's best, times half a decade. "
        "A third arm has it at rate × gain², which undoes that a weight's scale divides its gradient (see A07).",
        cuts=("tanh", "gains beyond 0.01 and 30", "two of six rates", "6000 steps down to 600"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 10, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Every gain at every rate, all seeds at once."""
        name = available("mnist") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "steps": STEPS[profile]}
        return [
            Task(
                self.name,
                tuple({**fixed, "unit": unit, "norm": norm, "gain": gain, "rate": rate}.items()),
                tuple(seeds),
            )
            for unit in UNITS[profile]
            for norm in ARMS
            for gain in GAINS[profile]
            for rate in RATES[profile]
        ]

    def measure(self, task: Task) -> Numbers:
        """Train."""
        data = samples(task.text("data"), "half", 5_000, 2_000).flat
        widths = (data.shape.numel(), 100, 100, 100, data.classes)
        norm, gain, rate = task.text("norm"), task.number("gain"), task.number("rate")
        unit = task.text("unit")
        network = Perceptrons(widths, task.seeds, norm=norm.split()[0], activation=unit, scale=gain)
        if norm == "BN scaled":
            rate *= gain**2
        return train(network, data, task.seeds, steps=task.whole("steps"), batch=64, rate=rate, momentum=0.9, probes=1)

    def _curve(self, results: Results, unit: str, norm: str) -> list[tuple[float, ...]]:
        """Test accuracy: a row per gain at its best rate, a number per seed."""
        found = []
        for gain in _gains(results):
            runs = results.where(unit=unit, norm=norm, gain=gain)
            best = max(runs, key=lambda m: sum(v for v in m.row("valid") if math.isfinite(v)))
            found.append(best.row("test"))
        return found

    def _widths(self, results: Results, norm: str) -> list[float]:
        """Decades of gains that work, per seed, the mean over activations."""
        gains = _gains(results)
        step = math.log10(gains[1] / gains[0])
        rows = []
        for unit in results.texts("unit"):
            seeds = columns(self._curve(results, unit, norm))
            rows.append([step * sum(v >= max(c) - self.threshold("within") for v in c) for c in seeds])
        return mean_of(rows)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The width, and whether it is the effective rate."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, three hidden layers, {task['steps']} steps of 64, tuned"
        widths = {name: self._widths(results, norm) for norm, name in ARMS.items()}
        plain, normed, scaled = widths.values()
        listed = f"Decades of initial scales that work: {told(widths, '.2f')}, of {len(_gains(results)) / 2:g}"
        return (
            by_effect(
                ("000-5", "001-4", "002-7"),
                "do more initial scales work?",
                paired_effect(normed, plain),
                listed,
                valid,
                unit="decades, with − without",
                least=self.threshold("decades"),
            ),
            by_effect(
                (),
                "is that left to the rate (gain² in its place widens further)?",
                paired_effect(scaled, normed),
                listed,
                valid,
                unit="decades, rate × gain² − rate",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against the gain."""
        plots = []
        for unit in results.texts("unit"):
            series = [
                s
                for k, (norm, name) in enumerate(ARMS.items())
                for s in spread(name, _gains(results), columns(self._curve(results, unit, norm)), k)
            ]
            plots.append(Plot(unit, "scale of the initial weights", "test accuracy", tuple(series), x_log=True))
        return Picture(
            "Test accuracy against the scale of the initial hidden weights, each at its best rate; mean and range over "
            "seeds.",
            tuple(plots),
        )


def _gains(results: Results) -> list[float]:
    return sorted({m.task.number("gain") for m in results})


EXPERIMENT = Initialisation()
