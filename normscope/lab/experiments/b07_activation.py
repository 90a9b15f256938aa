"""B07: sigmoid or ReLU under Batch Normalization."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import available
from normscope.lab.sketch import points
from normscope.lab.training import Arm, Tuned, classify
from normscope.lab.verdicts import by_effect
from normscope.records import Interval, Judgement, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Activation"]

NETS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("mlp8", "cnn"),
    "cpu": ("mlp3", "mlp8", "cnn"),
    "full": ("mlp3", "mlp8", "cnn"),
}
UNITS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("sigmoid", "relu"),
    "cpu": ("sigmoid", "relu"),
    "full": ("sigmoid", "tanh", "relu"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 600, "full": 6000}


class Activation(Tuned):
    """Three networks with sigmoid, tanh or ReLU, with and without Batch Normalization."""

    registration = register(
        "B07",
        statement="With Batch Normalization, sigmoid units do better than ReLU.",
        source="a tutorial; Ioffe & Szegedy 2015 found 69.8 % with sigmoid and 73.0 % with ReLU",
        confirms="sigmoid − ReLU in test accuracy, both with it and both tuned, lies above 0 in the "
        "convolutional network",
        refutes="it lies below 0",
        thresholds={"difference": 0, "trains": 0.5},
        design="A perceptron of 3 and one of 8 layers of 100 units, and a network of four convolutions; SGD "
        "with momentum 0.9, batch 64, "
        "MNIST averaged to 14 × 14, 10 000 images; five rates from 0.003 to 0.3, tuned with 2 seeds for every "
        "combination.",
        cuts=("tanh", "6000 steps down to 600", "10 seeds down to 8"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.003, 0.01, 0.03, 0.1, 0.3),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every combination."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": net, "norm": norm, "activation": unit, "steps": STEPS[profile]}
            for net in NETS[profile]
            for norm in ("none", "BN")
            for unit in UNITS[profile]
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate; there is no rate to share between activations."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train."""
        return classify(task, form="half", train_size=10_000, test_size=5_000, batch=64, momentum=0.9)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Sigmoid against ReLU, with it in a convolutional network and without it in a deep one."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, {task['steps']} steps of 64, tuned"

        def compare(net: str, norm: str) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
            a, b = (self.at_best(results, "test", net=net, norm=norm, activation=unit) for unit in ("sigmoid", "relu"))
            return f"{net}: sigmoid {statistics.mean(a):.2%}, ReLU {statistics.mean(b):.2%}", a, b

        text, sigmoid, relu = compare("cnn", "BN")
        cured = [self.at_best(results, "test", net="mlp8", norm=norm, activation="sigmoid") for norm in ("BN", "none")]
        deep, saturated, rectified = compare("mlp8", "none")
        return (
            by_effect(
                ("000-10",),
                "is sigmoid better than ReLU with it?",
                paired_effect(sigmoid, relu),
                f"With it, {text}; the paper found 69.8 % and 73.0 %",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                ("001-11",),
                "is ReLU a cure for saturation?",
                paired_effect(rectified, saturated),
                f"Without it, 8 layers, {deep}",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                (),
                "does it make a deep sigmoid network trainable?",
                paired_effect(*cured),
                f"8 layers of sigmoids: {statistics.mean(cured[0]):.2%} with, {statistics.mean(cured[1]):.2%} without",
                valid,
                unit="of accuracy",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy of every combination."""
        nets = list(dict.fromkeys(str(m.task["net"]) for m in results))
        units = [u for u in ("sigmoid", "tanh", "relu") if results.where(activation=u)]
        plots = []
        for net in nets:
            series = []
            for k, norm in enumerate(("BN", "none")):
                rows = [self.at_best(results, "test", net=net, norm=norm, activation=unit) for unit in units]
                within = [Interval(statistics.mean(r), min(r), max(r)) for r in rows]
                name = "with BN" if norm == "BN" else "without"
                series.append(
                    points(
                        name,
                        [i + 0.12 * (k - 0.5) for i in range(len(units))],
                        [i.value for i in within],
                        k,
                        within=within,
                    )
                )
            plots.append(Plot(net, "", "test accuracy", tuple(series), ticks=tuple(units)))
        return Picture("Test accuracy of tuned networks by activation, mean and range over seeds.", tuple(plots))


EXPERIMENT = Activation()
