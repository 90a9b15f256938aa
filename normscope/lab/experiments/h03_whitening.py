"""H03: whitening inside the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Network, renew
from normscope.lab.samples import available
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, classify
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Whitening"]

STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 300, "full": 40_000}
# Channels that are whitened together.
SIZE = 8
MAKE: Mapping[str, Callable[[int], nn.Module]] = {
    "BN ZCA": lambda channels: ns.nn.DecorrelatedBatchNorm(channels, channels // SIZE),
    "BN Newton": lambda channels: ns.nn.IterNorm(channels, channels // SIZE),
}
NAMES = {"BN": "BatchNorm", "BN ZCA": "whitened by eigenvectors", "BN Newton": "whitened by Newton's iteration"}


class Whitening(Tuned):
    """Channels decorrelated in groups of eight, beside Batch Normalization."""

    registration = register(
        "H03",
        statement="Decorrelated inputs of layers train faster, but full whitening is expensive.",
        source="Ioffe & Szegedy 2015, §3; Huang et al. 2018 and 2019",
        confirms="the mean test accuracy while training, whitened by eigenvectors − Batch Normalization, lies above 0; "
        "and a run takes longer",
        refutes="the difference lies below 0",
        thresholds={"difference": 0},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9, batch 64; Batch "
        "Normalization, ZCA whitening by eigenvectors, the same by five Newton iterations, in groups of eight "
        "channels; three rates tuned with 2 seeds for every arm. Speed is the mean test accuracy over 20 marks.",
        cuts=("40 000 steps down to 300", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """All three."""
        name = available("cifar10") if profile != "quick" else "digits"
        return [{"data": name, "net": "cnn", "norm": norm, "steps": STEPS[profile]} for norm in NAMES]

    def baseline(self, arm: Arm) -> Arm:
        """Batch Normalization."""
        return dict(arm) | {"norm": "BN"}

    def measure(self, task: Task) -> Numbers:
        """Train."""

        def change(network: Network) -> None:
            make = MAKE.get(task.text("norm"))
            if make:
                renew(network, lambda norm: make(norm.get_parameter("weight").numel()))

        return classify(task, form="half", train_size=5_000, test_size=1_000, batch=64, momentum=0.9, change=change)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Steps, time, and the cheaper way."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps of 64, tuned"
        speed = {name: self.along(results, norm=norm) for norm, name in NAMES.items()}
        test = {name: self.at_best(results, "test", norm=norm) for norm, name in NAMES.items()}
        clocks = {norm: [math.log(v) for v in self.at_best(results, "time", norm=norm)] for norm in NAMES}
        plain, zca, newton = speed.values()
        longer = paired_effect(clocks["BN ZCA"], clocks["BN"])
        listed = f"Mean accuracy while training: {told(speed)}; at the end {told(test)}"
        return (
            by_effect(
                ("001-13",),
                "do decorrelated layer inputs train faster?",
                paired_effect(zca, plain),
                listed,
                valid,
                unit="of mean accuracy, whitened − BatchNorm",
            ),
            by_effect(
                ("001-16",),
                "is whitening expensive?",
                longer,
                f"A run whitened by eigenvectors takes {math.exp(longer.value):.2f} times as long as with BatchNorm, "
                f"by Newton's iteration {math.exp(paired_effect(clocks['BN Newton'], clocks['BN']).value):.2f} times",
                valid,
                unit="ln of the times' ratio",
            ),
            by_effect(
                (),
                "is Newton's iteration as good as eigenvectors, or better?",
                paired_effect(newton, zca),
                listed,
                valid,
                unit="of mean accuracy, Newton − eigenvectors",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Speed and time."""
        speed = {name: self.along(results, norm=norm) for norm, name in NAMES.items()}
        clock = {name: self.at_best(results, "time", norm=norm) for norm, name in NAMES.items()}
        return Picture(
            "Mean test accuracy while training, and seconds of a run; mean and range over seeds.",
            (beside("per step", "mean test accuracy", {"": speed}), beside("per run", "seconds", {"": clock})),
        )


EXPERIMENT = Whitening()
