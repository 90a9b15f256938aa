"""B10: what regularises: normalizing, noise, dropout."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional, renew
from normscope.lab.samples import available, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, by_equivalence, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Regularisation"]

STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 300, "full": 5000}
IMAGES, REFERENCE = 1000, 128
DROPOUT: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.0, 0.5),
    "cpu": (0.0, 0.3),
    "full": (0.0, 0.1, 0.3, 0.5),
}
# Norm, and the samples its statistics are taken over: a batch of 32, parts of 8 of it, a fixed reference.
NAMES = {"none": "none", "BN": "BN", "ghost8": "BN over parts of 8", "BN fixed": "BN over fixed images"}


class Regularisation(Tuned):
    """Few images; statistics of the batch, of parts of it, of images that never change; and dropout."""

    registration = register(
        "B10",
        statement="Batch Normalization regularises by the noise of its statistics, and replaces dropout.",
        source="Ioffe & Szegedy 2015, §3.4 and §4.2.1; Luo et al. 2018",
        confirms="training − test accuracy is smaller with the batch's statistics than with those of fixed images; and "
        "test accuracy with it and no dropout is at most half a point below that without it at its best dropout",
        refutes="the gap is not smaller",
        thresholds={"difference": 0, "not worse": 0.005, "same": 0.005},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 1 000 images, SGD with momentum 0.9, batch 32. None; "
        "Batch Normalization; over parts of 8; with the statistics of 128 fixed training images that go through the "
        "network with every batch, gradient included, so that no sample depends on its companions. Each without and "
        "with dropout in front of the classifier; two rates tuned with 2 seeds for every arm. Gap: accuracy on the "
        "training images less that on test images, evaluated with running (or the fixed images') statistics.",
        cuts=("dropout of 0.1 and 0.5", "5000 steps down to 300", "10 seeds down to 6", "equal training loss"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every kind of statistics with every dropout."""
        name = available("cifar10") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "cnn", "steps": STEPS[profile]}
        return [
            {**fixed, "norm": norm, "dropout": share}
            for norm in NAMES
            for share in DROPOUT[profile]
            if norm in ("none", "BN") or not share
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train."""
        data, seed = samples(task.text("data"), "half", IMAGES, 1_000), task.seeds[0]
        norm, _, fixed = task.text("norm").partition(" ")
        kind = _Anchored if fixed else Convolutional
        network = kind(data.shape[0], data.classes, seed, norm=norm)
        if isinstance(network, _Anchored):
            network.anchor(data.train_x[:REFERENCE])
        if task.number("dropout"):
            network.head = nn.Sequential(nn.Dropout(task.number("dropout")), network.head)  # type: ignore[assignment]
        steps, rate = task.whole("steps"), task.number("rate")
        return train(network, data, task.seeds, steps=steps, batch=32, rate=rate, momentum=0.9, probes=5)

    def _gap(self, results: Results, norm: str) -> list[float]:
        train, test = (self.at_best(results, name, norm=norm, dropout=0.0) for name in ("train", "test"))
        return [a - b for a, b in zip(train, test, strict=True)]

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Noise, size of the noise, and dropout."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, {IMAGES} images, four convolutions, {task['steps']} steps, tuned"
        shares = sorted({m.task.number("dropout") for m in results})
        gaps = {name: self._gap(results, norm) for norm, name in NAMES.items()}
        test = {name: self.at_best(results, "test", norm=norm, dropout=0.0) for norm, name in NAMES.items()}
        dropped = {
            (norm, share): self.at_best(results, "test", norm=norm, dropout=share)
            for norm in ("none", "BN")
            for share in shares
        }
        best = {n: max((sum(row), s) for (m, s), row in dropped.items() if m == n and s)[1] for n in ("none", "BN")}
        without = [max(a, b) for a, b in zip(test["none"], dropped["none", best["none"]], strict=True)]
        listed = f"Training − test accuracy: {told(gaps)}; test {told(test)}"
        drops = told({f"{NAMES[n]}, dropout {s:g}": row for (n, s), row in dropped.items()})
        return (
            by_effect(
                ("000-1", "000-6", "001-27", "003-5", "003-13"),
                "does the noise of batch statistics regularise?",
                paired_effect(gaps["BN over fixed images"], gaps["BN"]),
                listed,
                valid,
                unit="of accuracy, gap over fixed images − over the batch",
            ),
            by_effect(
                ("000-6",),
                "does more noise regularise more?",
                paired_effect(gaps["BN"], gaps["BN over parts of 8"]),
                listed,
                valid,
                unit="of accuracy, gap over 32 − over 8",
            ),
            by_effect(
                ("001-5", "003-11"),
                "does it replace dropout?",
                paired_effect([v + self.threshold("not worse") for v in test["BN"]], without),
                f"Test accuracy: {drops}",
                valid,
                unit="of accuracy, BN without dropout + half a point − the better of none with and without",
            ),
            by_equivalence(
                ("003-11",),
                "is dropout needless with it?",
                paired_effect(dropped["BN", best["BN"]], test["BN"]),
                f"Test accuracy: {drops}",
                valid,
                unit="of accuracy, with − without dropout",
                margin=self.threshold("same"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Training and test accuracy; dropout."""
        parts = {
            what: {name: self.at_best(results, what, norm=norm, dropout=0.0) for norm, name in NAMES.items()}
            for what in ("train", "test")
        }
        shares = sorted({m.task.number("dropout") for m in results})
        drops = {
            NAMES[norm]: {f"{s:g}": self.at_best(results, "test", norm=norm, dropout=s) for s in shares}
            for norm in ("none", "BN")
        }
        return Picture(
            "Accuracy on training and test images by what the statistics are taken over; test accuracy by dropout.",
            (beside("statistics", "accuracy", parts), beside("dropout", "test accuracy", drops, "share dropped")),
        )


class _Anchored(Convolutional):
    """Every batch is normalized by fixed images, which go through the network in front of it."""

    def anchor(self, images: Tensor) -> None:
        """Choose the images; call it once, before training."""
        self.images = images
        renew(self, lambda norm: _ByFirst(norm, len(images)))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to class scores (n, classes)."""
        scores: Tensor = super().forward(torch.cat([self.images, x]))
        return scores[len(self.images) :]


class _ByFirst(nn.Module):
    """Normalize all samples by the statistics of the first ones."""

    def __init__(self, norm: nn.Module, count: int) -> None:
        super().__init__()
        self.norm, self.count = norm, count

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, the same in training and evaluation."""
        first = ns.moments(x[: self.count], "[n] c [h w]")
        weight, bias = self.norm.get_parameter("weight"), self.norm.get_parameter("bias")
        return ns.normalize(x, "[n] c [h w]", moments=first, weight=weight, bias=bias)


EXPERIMENT = Regularisation()
