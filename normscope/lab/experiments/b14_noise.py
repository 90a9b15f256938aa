"""B14: noise after the normalization: is covariate shift the cause?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from normscope.lab.catalogue import register
from normscope.lab.drift import Drift
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons, renew
from normscope.lab.samples import available, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture
from normscope.statistics import decide, paired_effect

__all__ = ["EXPERIMENT", "NoisyNormalization"]

LEVELS: Mapping[ProfileName, tuple[int, ...]] = {"quick": (4,), "cpu": (1, 4), "full": (1, 2, 4)}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 1000, "full": 10_000}


class NoisyNormalization(Tuned):
    """Batch Normalization whose output is shifted and stretched anew in every step."""

    registration = register(
        "B14",
        statement="Covariate shift has nothing to do with why Batch Normalization helps: with shifting noise behind it "
        "it trains as fast.",
        source="Santurkar et al. 2018, §2.1 and Figure 2; Ioffe & Szegedy 2015 against",
        confirms="with noise that makes distributions travel further than without a normalizer, more than half of the "
        "gain in speed stays",
        refutes="less than half of it stays",
        thresholds={"share": 0.5, "slower": 0.01},
        design="Three layers of 100 units with sigmoid, MNIST averaged to 14 × 14, 5 000 images, SGD, batch 60; four "
        "rates tuned with 2 seeds for every arm. Noise behind the normalizer, per unit and step, the same for all "
        "images: y ↦ s·y + m, m from U(−0.5, 0.5) and s from U(1, 1.25), or 2 or 4 times that; none in evaluation. "
        "Speed is the mean test accuracy over 20 marks; how far what units receive travels between marks is measured "
        "as in B02. The verdict is that of the smallest noise under which it travels further than without.",
        cuts=("twice the noise", "10 000 steps down to 1000", "the VGG of the paper"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.3,),
        "cpu": (0.03, 0.1, 0.3, 1.0),
        "full": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """None, plain, and noisy."""
        name = available("mnist") if profile != "quick" else "digits"
        norms = ("none", "BN", *(f"BN noisy {level}" for level in LEVELS[profile]))
        return [{"data": name, "net": "mlp3", "norm": norm, "steps": STEPS[profile]} for norm in norms]

    def measure(self, task: Task) -> Numbers:
        """Train, looking 20 times."""
        data = samples(task.text("data"), "half", 5_000, 2_000).flat
        widths = (data.shape.numel(), 100, 100, 100, data.classes)
        norm, _, level = task.text("norm").partition(" noisy ")
        network = Perceptrons(widths, task.seeds, norm=norm, activation="sigmoid")
        if level:
            renew(network, lambda norm: nn.Sequential(norm, _Noise(int(level))))
        drift = Drift(network, data.train_x[:256].expand(len(task.seeds), -1, -1))
        steps, rate = task.whole("steps"), task.number("rate")
        found = train(network, data, task.seeds, steps=steps, batch=60, rate=rate, on_probe=drift.look)
        return found | {"drift": drift.mean()}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """What stays of the gain under noise that unsettles more than no normalizer."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, three layers of sigmoids, {task['steps']} steps of 60, tuned"
        norms = results.texts("norm")
        speed = {norm: self.along(results, norm=norm) for norm in norms}
        drift = {norm: self.at_best(results, "drift", norm=norm) for norm in norms}
        noisy = norms[2:]
        unsettled = [n for n in noisy if decide(paired_effect(drift[n], drift["none"])) == "CONFIRMED"]
        judged = unsettled[0] if unsettled else noisy[-1]
        share = self.threshold("share")
        halfway = [(1 - share) * a + share * b for a, b in zip(speed["none"], speed["BN"], strict=True)]
        stays = paired_effect(speed[judged], halfway)
        gained = decide(paired_effect(speed["BN"], speed["none"])) == "CONFIRMED"
        verdict: LabVerdict = decide(stays) if unsettled and gained else "UNDECIDED"
        listed = f"Mean accuracy while training: {told(speed)}; travelled between marks [σ]: {told(drift, '.3f')}"
        return (
            ruled(
                ("004-17",),
                "does it help though distributions shift?",
                verdict,
                f"{listed}. Judged by {judged.replace('BN ', '')}.",
                valid,
                effect=interval(stays, "of mean accuracy, noisy − half of the gain"),
                seeds=stays.n,
                tests=len(noisy) + 2,
            ),
            by_effect(
                ("001-2", "002-2", "003-4"),
                "do shifting distributions slow it down?",
                paired_effect(speed["BN"], speed[judged]),
                listed,
                valid,
                unit="of mean accuracy, plain − noisy",
                least=self.threshold("slower"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Speed and drift."""
        norms = results.texts("norm")
        speed = {norm: self.along(results, norm=norm) for norm in norms}
        drift = {norm: self.at_best(results, "drift", norm=norm) for norm in norms}
        return Picture(
            "Mean test accuracy while training, and how far what units receive travels; mean and range over seeds.",
            (
                beside("speed", "mean test accuracy", {"": speed}),
                beside("unrest", "distance between marks [σ]", {"": drift}),
            ),
        )


class _Noise(nn.Module):
    """y ↦ s·y + m for (seeds, n, width), s and m drawn per seed and unit in every training step."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        """Shift and stretch."""
        if not self.training:
            return x
        shape = (x.shape[0], 1, x.shape[2])
        stretch, shift = 1 + 0.25 * self.level * torch.rand(shape), self.level * (torch.rand(shape) - 0.5)
        return x * stretch + shift


EXPERIMENT = NoisyNormalization()
