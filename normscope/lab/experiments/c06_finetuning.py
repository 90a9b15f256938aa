"""C06: fine-tuning with tiny batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import Samples, available, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "FineTuning"]

STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 20_000}
SIZES: Mapping[ProfileName, tuple[int, ...]] = {"quick": (2,), "cpu": (2, 32), "full": (2, 4, 8, 32)}
NAMES = {"BN": "updating", "BN frozen": "frozen", "GN": "GroupNorm"}


class FineTuning(Tuned):
    """Trained on half of the classes with large batches, then on the others with tiny ones."""

    registration = register(
        "C06",
        statement="Where batches cannot be large, as in fine-tuning, Batch Normalization loses.",
        source="tutorials; Wu & He 2018, §4.2",
        confirms="fine-tuned with batches of 2, the test accuracy with frozen statistics − with those of the batch "
        "lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16; 300 steps of 64 at rate 0.1 with momentum 0.9 on the "
        "first five classes, then 400 steps of 2 or 32 on the other five, with a new last layer. Batch Normalization "
        "that goes on with the statistics of its batches; frozen, γ and β learning; GroupNorm throughout. Three rates "
        "of the second part tuned with 2 seeds for every arm.",
        cuts=("batches of 4 and 8", "20 000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every way at every batch."""
        name = available("cifar10") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "cnn", "norm": norm, "batch": size, "steps": STEPS[profile]}
            for size in SIZES[profile]
            for norm in NAMES
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train on one half, then on the other."""
        data, seed = samples(task.text("data"), "half", 10_000, 1_000), task.seeds[0]
        first, second = _half(data, 0), _half(data, 1)
        norm, _, frozen = task.text("norm").partition(" ")
        network = Convolutional(data.shape[0], first.classes, seed, norm=norm)
        before = min(300, 2 * task.whole("steps"))
        train(network, first, task.seeds, steps=before, batch=64, rate=0.1, momentum=0.9, probes=1)
        head = nn.Linear(network.head.in_features, second.classes)
        with torch.no_grad():
            head.weight.normal_(0, head.in_features**-0.5, generator=torch.Generator().manual_seed(seed))
            head.bias.zero_()
        network.head = head
        if frozen:
            ns.freeze(network)  # γ and β go on learning
        steps, size = task.whole("steps"), task.whole("batch")
        return train(
            network, second, task.seeds, steps=steps, batch=size, rate=task.number("rate"), momentum=0.9, probes=5
        )

    def _rows(self, results: Results, size: int) -> dict[str, tuple[float, ...]]:
        return {name: self.at_best(results, "test", norm=norm, batch=size) for norm, name in NAMES.items()}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """At the smallest batch, and whether it is the batch."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps, tuned"
        sizes = results.wholes("batch")
        rows = {size: self._rows(results, size) for size in sizes}
        loss = {
            size: [a - b for a, b in zip(found["frozen"], found["updating"], strict=True)]
            for size, found in rows.items()
        }
        listed = "; ".join(f"batches of {size}: {told(found)}" for size, found in rows.items())
        judged = [
            by_effect(
                ("002-12",),
                "does it lose in fine-tuning with batches of 2?",
                paired_effect(loss[sizes[0]]),
                f"Test accuracy on the new classes, {listed}",
                valid,
                unit="of accuracy, frozen − updating",
            )
        ]
        if len(sizes) > 1:
            judged.append(
                by_effect(
                    (),
                    f"more than with batches of {sizes[-1]}?",
                    paired_effect(loss[sizes[0]], loss[sizes[-1]]),
                    listed,
                    valid,
                    unit="of accuracy, loss at 2 less loss at the largest batch",
                )
            )
        return tuple(judged)

    def figure(self, results: Results) -> Picture:
        """Accuracy by way and batch."""
        sizes = results.wholes("batch")
        groups = {f"batches of {size}": self._rows(results, size) for size in sizes}
        return Picture(
            "Test accuracy on the new classes, mean and range over seeds, every arm tuned.",
            (beside("Batch Normalization in fine-tuning", "test accuracy", groups),),
        )


def _half(data: Samples, which: int) -> Samples:
    """The images of the lower or the upper half of the classes, labels from 0."""
    classes = data.classes // 2
    parts = []
    for x, y in ((data.train_x, data.train_y), (data.valid_x, data.valid_y), (data.test_x, data.test_y)):
        chosen = (y // classes) == which
        parts += [x[chosen], y[chosen] - which * classes]
    train_x, train_y, valid_x, valid_y, test_x, test_y = parts
    return replace(
        data, train_x=train_x, train_y=train_y, valid_x=valid_x, valid_y=valid_y, test_x=test_x, test_y=test_y,
        classes=classes,
    )  # fmt: skip


EXPERIMENT = FineTuning()
