"""B12: does Batch Normalization need less data?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import available, batches, samples
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, Tuned, classify, columns
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect, slope

__all__ = ["EXPERIMENT", "LessData"]

SIZES: Mapping[ProfileName, tuple[int, ...]] = {
    "quick": (50, 200),
    "cpu": (50, 200, 800, 3200),
    "full": (50, 100, 200, 400, 800, 1600, 3200, 10_000),
}
STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 300, "full": 3000}
NETS = ("mlp3", "cnn")
NORMS = {"none": "without", "BN": "with BN"}


class LessData(Tuned):
    """Nested subsets of a training set, the same number of steps on each."""

    registration = register(
        "B12",
        statement="With Batch Normalization a network needs less data to generalise.",
        source="a tutorial, without a source",
        confirms="test accuracy with − without, the mean over sizes of the training set and both networks, lies above "
        "0",
        refutes="it lies below 0",
        thresholds={"difference": 0},
        design="A perceptron of three layers of 100 units and a network of four convolutions, ReLU; MNIST averaged to "
        "14 × 14; every class equally often, nested subsets drawn by seed, sizes equally spaced in logarithm; the same "
        "number of steps of 32 on each, SGD with momentum 0.9; rates tuned with 2 seeds for every size and network.",
        cuts=("four of eight sizes", "3000 steps down to 300", "10 seeds down to 8, two rates of five"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """With and without on every size."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": net, "norm": norm, "size": size, "steps": STEPS[profile]}
            for net in NETS
            for size in SIZES[profile]
            for norm in NORMS
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train on a subset."""
        labels = samples(task.text("data"), "half", 10_000, 2_000).train_y

        def order(_: int, size: int, seed: int) -> Iterator[Tensor]:
            chosen = _subset(labels, task.whole("size"), seed)
            return (chosen[rows] for rows in batches(len(chosen), size, seed))

        return classify(task, form="half", train_size=10_000, test_size=2_000, batch=32, momentum=0.9, order=order)

    def _gains(self, results: Results, net: str) -> list[list[float]]:
        """With − without: a row per size, a number per seed."""
        pairs = [
            [self.at_best(results, "test", net=net, size=n, norm=k) for k in ("BN", "none")]
            for n in results.wholes("size")
        ]
        return [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Pooled, and whether it shrinks with more data."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, two networks, {task['steps']} steps of 32, tuned"
        sizes = results.wholes("size")
        gains = [columns(self._gains(results, net)) for net in NETS]
        both = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*gains, strict=True)]
        effect = paired_effect([sum(row) / len(row) for row in both])
        listed = "; ".join(
            f"{net} {told({f'{n} images': column for n, column in zip(sizes, columns(rows), strict=True)}, '+.1%')}"
            for net, rows in zip(NETS, gains, strict=True)
        )
        places = [float(k) for k in range(len(sizes))]
        return (
            by_effect(
                ("002-9", "003-5"),
                "does it need less data?",
                effect,
                f"Test accuracy with − without: {listed}",
                valid,
                unit="of accuracy, the mean over sizes",
            ),
            by_effect(
                (),
                "is its gain larger with less data?",
                paired_effect([-value for value in slope(places, both)]),
                "The gain against the size",
                valid,
                unit="of accuracy per step to a smaller size",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Learning curves."""
        sizes, plots = results.wholes("size"), []
        for net in NETS:
            series = [
                s
                for k, (norm, name) in enumerate(NORMS.items())
                for s in spread(
                    name,
                    sizes,
                    columns([self.at_best(results, "test", net=net, size=n, norm=norm) for n in sizes]),
                    k,
                )
            ]
            plots.append(Plot(net, "training images", "test accuracy", tuple(series), x_log=True))
        return Picture("Test accuracy against the size of the training set, mean and range over seeds.", tuple(plots))


def _subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices of images, every class equally often; a smaller subset of the same seed is part of a larger one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(30_000 + seed))
    classes = int(labels.max()) + 1
    parts = [order[labels[order] == c] for c in range(classes)]
    rank = torch.cat([torch.arange(len(part)) for part in parts])
    return torch.cat(parts)[rank.argsort(stable=True)][:size]


EXPERIMENT = LessData()
