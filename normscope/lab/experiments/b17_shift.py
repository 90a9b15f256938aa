"""B17: shifted test data, and contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import Samples, available, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, accuracies, mean_of, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Shift"]

NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN", "IN"),
    "cpu": ("none", "BN", "LN", "IN"),
    "full": ("none", "BN", "LN", "GN", "IN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 300, "full": 10_000}
SHIFTS = ("brighter", "paler", "noise", "blur")
# Contrasts that the second task is to tell apart.
LEVELS = (0.25, 0.5, 0.75, 1.0)
BATCH = 64


class Shift(Tuned):
    """Networks that name what an image shows, tested on changed images; and networks that name its contrast."""

    registration = register(
        "B17",
        statement="A difference between the distributions of training and test ruins generalisation, and normalizing "
        "helps; in classification removing contrast helps, where contrast is the answer it harms.",
        source="tutorials; Schneider et al. 2020; Benz et al. 2021",
        confirms="the mean test accuracy lost by brightness, contrast, noise and blur, without − with it, lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0},
        design="Four convolutions, MNIST averaged to 14 × 14, 5 000 images, SGD with momentum 0.9, batch 64; three "
        "rates tuned with 2 seeds for every arm. Task 1: the digit; test images as they are, brighter by 0.4, at 0.3 "
        "of their contrast around 0.5, with noise of 0.3, blurred (means over 3 × 3); with running statistics, with "
        "those of test batches of 64, and as a control with those of batches of one class. Task 2: which of the "
        "contrasts 0.25, 0.5, 0.75, 1 an image has been multiplied by, in training and test.",
        cuts=("GroupNorm", "10 000 steps down to 300", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Both tasks with every normalizer."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "cnn", "task": task, "norm": norm, "steps": STEPS[profile]}
            for task in ("digit", "contrast")
            for norm in NORMS[profile]
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train, and test on changed images."""
        data = samples(task.text("data"), "half", 5_000, 2_000)
        if task.text("task") == "contrast":
            data = _by_contrast(data)
        network = Convolutional(data.shape[0], data.classes, task.seeds[0], norm=task.text("norm"))
        steps, rate = task.whole("steps"), task.number("rate")
        found = train(network, data, task.seeds, steps=steps, batch=BATCH, rate=rate, momentum=0.9)
        if task.text("task") == "digit" and task.text("stage") == "test":
            for shift in SHIFTS:
                x = _shifted(data.test_x, shift)
                found[shift] = accuracies(network, x, data.test_y, 1)
                if task.text("norm") == "BN":
                    found[f"{shift} batch"] = [_by_batches(network, x, data.test_y)]
                    order = data.test_y.argsort(stable=True)
                    found[f"{shift} class"] = [_by_batches(network, x[order], data.test_y[order])]
        return found

    def _shifted(self, results: Results, norm: str, how: str = "") -> list[float]:
        """Accuracy on changed images, the mean over changes, per seed."""
        rows = [self.at_best(results, f"{s}{how}", task="digit", norm=norm) for s in SHIFTS]
        return mean_of(rows)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """What changes cost, test statistics, and contrast as a nuisance and as the answer."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, four convolutions, {task['steps']} steps of 64, tuned"
        norms = results.texts("norm")
        digit = {n: self.at_best(results, "test", task="digit", norm=n) for n in norms}
        contrast = {n: self.at_best(results, "test", task="contrast", norm=n) for n in norms}
        pale = {n: self.at_best(results, "paler", task="digit", norm=n) for n in norms}
        lost = {n: [a - b for a, b in zip(digit[n], self._shifted(results, n), strict=True)] for n in norms}
        running, own, single = (self._shifted(results, "BN", how) for how in ("", " batch", " class"))
        interaction = [[a - b for a, b in zip(rows["none"], rows["IN"], strict=True)] for rows in (contrast, digit)]
        return (
            by_effect(
                ("003-1", "003-5", "001-9"),
                "does it lose less where test images differ?",
                paired_effect(lost["none"], lost["BN"]),
                f"Accuracy {told(digit)}; lost by changed images {told(lost)}",
                valid,
                unit="of accuracy lost, without − with",
            ),
            by_effect(
                ("002-17",),
                "do statistics of the test set help there?",
                paired_effect(own, running),
                "On changed images, "
                + told({"running statistics": running, "test batches'": own, "of batches of one class": single}),
                valid,
                unit="of accuracy, test batches' − running statistics",
            ),
            by_effect(
                ("000-18",),
                "does removing contrast help to see pale images?",
                paired_effect(pale["IN"], pale["none"]),
                f"At 0.3 of the contrast: {told(pale)}",
                valid,
                unit="of accuracy, InstanceNorm − none",
            ),
            by_effect(
                ("000-19", "000-25"),
                "does it harm where contrast is the answer, more than where it is not?",
                paired_effect(*interaction),
                f"Naming the contrast: {told(contrast)}; the digit: {told(digit)}",
                valid,
                unit="of accuracy, (none − InstanceNorm) for contrast less that for digits",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy by change; both tasks."""
        norms = results.texts("norm")
        shifts = {
            norm: {"test": self.at_best(results, "test", task="digit", norm=norm)}
            | {shift: self.at_best(results, shift, task="digit", norm=norm) for shift in SHIFTS}
            for norm in norms
        }
        tasks = {
            what: {norm: self.at_best(results, "test", task=what, norm=norm) for norm in norms}
            for what in ("digit", "contrast")
        }
        return Picture(
            "Accuracy on changed images with running statistics; and of naming the digit or the contrast. Mean and "
            "range over seeds, every arm tuned.",
            (beside("changed test images", "accuracy", shifts), beside("what is asked", "accuracy", tasks)),
        )


def _by_contrast(data: Samples) -> Samples:
    """Images multiplied by a contrast, whose number is the label."""
    levels = torch.tensor(LEVELS)

    def which(x: Tensor) -> Tensor:
        return torch.randint(len(LEVELS), (len(x),), generator=torch.Generator().manual_seed(len(x)))

    scaled = data.mapped(lambda x: x * levels[which(x)].reshape(-1, 1, 1, 1))
    train_y, valid_y, test_y = (which(x) for x in (data.train_x, data.valid_x, data.test_x))
    return replace(scaled, classes=len(LEVELS), train_y=train_y, valid_y=valid_y, test_y=test_y)


def _shifted(x: Tensor, how: str) -> Tensor:
    if how == "brighter":
        return x + 0.4
    if how == "paler":
        return 0.5 + 0.3 * (x - 0.5)
    if how == "noise":
        return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(x, 3, 1, 1)


@torch.no_grad()
def _by_batches(network: Convolutional, x: Tensor, y: Tensor) -> float:
    """Accuracy with the statistics of test batches; the running ones stay."""
    network.train()
    with ns.pause_statistics(network):
        scores = torch.cat([network(part) for part in torch.split(x, BATCH)])
    network.eval()
    return float((scores.argmax(1) == y).float().mean())


EXPERIMENT = Shift()
