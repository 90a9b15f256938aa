"""B02: how stable are distributions?"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from normscope.lab.catalogue import register
from normscope.lab.drift import Drift, gradient_shift
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import available, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, mean_of, train
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture
from normscope.statistics import decide, paired_effect

__all__ = ["EXPERIMENT", "Stability"]

UNITS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("sigmoid",),
    "cpu": ("sigmoid", "relu"),
    "full": ("sigmoid", "tanh", "relu"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 1000, "full": 50_000}
NAMES = {"none": "without", "BN": "with BN"}


class Stability(Tuned):
    """What the activations of a perceptron receive, and how much a layer's step spoils the gradient of the next."""

    registration = register(
        "B02",
        statement="Batch Normalization keeps the distributions of layer inputs stable, and that is why it helps.",
        source="Ioffe & Szegedy 2015, §4.1 and Figure 1b, c; Santurkar et al. 2018 against",
        confirms="what units receive travels less with it; and where it trains faster, the shift of gradients by lower "
        "layers is smaller too",
        refutes="it travels no less; it trains faster though the shift is not smaller",
        thresholds={"difference": 0},
        design="Three layers of 100 units with sigmoid or ReLU, MNIST averaged to 14 × 14, 5 000 images, SGD, batch "
        "60; four rates tuned with 2 seeds for every arm. At 20 marks, on 256 fixed images: the distance (Wasserstein) "
        "of what every unit receives from the mark before, over its standard deviation; and ‖g − g′‖/‖g‖ of the second "
        "and third layer, g′ being the gradient after the layers below have taken their step at the arm's rate. Speed "
        "is the mean test accuracy over the marks.",
        cuts=("tanh", "50 000 steps down to 1000", "the VGG of the paper"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.3,),
        "cpu": (0.03, 0.1, 0.3, 1.0),
        "full": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """With and without."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "mlp3", "norm": norm, "activation": unit, "steps": STEPS[profile]}
            for unit in UNITS[profile]
            for norm in NAMES
        ]

    def measure(self, task: Task) -> Numbers:
        """Train, looking 20 times."""
        data = samples(task.text("data"), "half", 5_000, 2_000).flat
        widths = (data.shape.numel(), 100, 100, 100, data.classes)
        network = Perceptrons(widths, task.seeds, norm=task.text("norm"), activation=task.text("activation"))
        x = data.train_x[:256].expand(len(task.seeds), -1, -1)
        y = data.train_y[:256].expand(len(task.seeds), -1)
        drift, shifts = Drift(network, x), list[torch.Tensor]()

        def look(step: int) -> None:
            drift.look(step)
            shifts.append(gradient_shift(network, x, y, task.number("rate")))

        steps, rate = task.whole("steps"), task.number("rate")
        found = train(network, data, task.seeds, steps=steps, batch=60, rate=rate, on_probe=look)
        return found | {"drift": drift.mean(), "shift": torch.stack(shifts).mean(0).tolist()}

    def _rows(self, results: Results, name: str) -> dict[str, list[float]]:
        """Without and with, per seed, the mean over activations."""
        units = results.texts("activation")
        found = {}
        for norm in NAMES:
            rows = [
                self.along(results, activation=unit, norm=norm)
                if name == "speed"
                else self.at_best(results, name, activation=unit, norm=norm)
                for unit in units
            ]
            found[norm] = mean_of(rows)
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Drift, shift of gradients, and whether the two go together with speed."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, three hidden layers, {task['steps']} steps of 60, tuned"
        drift, shift, speed = (self._rows(results, name) for name in ("drift", "shift", "speed"))
        calmer = paired_effect(drift["none"], drift["BN"])
        smaller = paired_effect(shift["none"], shift["BN"])
        faster = paired_effect(speed["BN"], speed["none"])
        told_speed = f"Mean accuracy while training {told(speed)}; shift of gradients {told(shift, '.3f')}"
        cause: LabVerdict = "UNDECIDED"
        if decide(faster) == "CONFIRMED":
            cause = decide(smaller)
        opposite: dict[LabVerdict, LabVerdict] = {"CONFIRMED": "REFUTED", "REFUTED": "CONFIRMED"}
        effect = interval(smaller, "shift of gradients, without − with")
        return (
            by_effect(
                ("001-26", "002-5"),
                "does what units receive travel less?",
                calmer,
                f"Between marks it travels {told(drift, '.3f')} standard deviations",
                valid,
                unit="standard deviations, without − with",
            ),
            ruled(
                ("001-2", "001-9", "002-2"),
                "is it faster where lower layers disturb less?",
                cause,
                f"{told_speed}.",
                valid,
                effect=effect,
                seeds=smaller.n,
                tests=2,
            ),
            ruled(
                ("004-17",),
                "has it nothing to do with covariate shift?",
                opposite.get(cause, "UNDECIDED"),
                f"{told_speed}.",
                valid,
                effect=effect,
                seeds=smaller.n,
                tests=2,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Three numbers per network."""
        titles = {"drift": "what units receive", "shift": "shift of gradients", "speed": "accuracy while training"}
        axes = {"drift": "distance between marks [σ]", "shift": "‖g − g′‖/‖g‖", "speed": "mean test accuracy"}
        plots = [
            beside(titles[n], axes[n], {"": {NAMES[norm]: row for norm, row in self._rows(results, n).items()}})
            for n in titles
        ]
        return Picture(
            "Stability measured in two ways, and speed; mean and range over seeds, the mean over activations.",
            tuple(plots),
        )


EXPERIMENT = Stability()
