"""B16: batches of unequal distribution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import Samples, available, batches, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Order, Tuned, build, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "UnequalBatches"]

NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "GN"),
    "full": ("none", "BN", "GN", "LN", "Online"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 300, "full": 3000}
# Brightness and contrast of the four domains: x ↦ level + contrast · (x − 1/2).
DOMAINS = ((0.5, 1.0), (0.2, 0.5), (0.8, 0.5), (0.5, 0.25))
KINDS = {"mixed": "mixed", "domains": "a domain per batch", "classes": "two classes per batch"}
BATCH = 32


class UnequalBatches(Tuned):
    """The same images, put together into batches in three ways."""

    registration = register(
        "B16",
        statement="Batches of different distributions slow down learning.",
        source="tutorials; Ioffe 2017 (Batch Renormalization), §4.2",
        confirms="without a normalizer, the mean test accuracy while training on mixed batches − that on unequal "
        "batches, the mean of both kinds, lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0},
        design="Four convolutions, MNIST averaged to 14 × 14, 5 000 images, each in one of four domains of brightness "
        "and contrast; SGD with momentum 0.9, batch 32; batches drawn from all, from one domain, from two classes. "
        "Test images of all domains. Three rates tuned with 2 seeds for every arm; speed is the mean test accuracy "
        "over 20 marks, denser at the beginning.",
        cuts=("LayerNorm and Online Normalization", "3000 steps down to 300", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer on every kind of batches."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "cnn", "norm": norm, "batches": kind, "steps": STEPS[profile]}
            for kind in KINDS
            for norm in NORMS[profile]
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train."""
        data = _in_domains(samples(task.text("data"), "half", 5_000, 2_000))
        return train(
            build(task, data),
            data,
            task.seeds,
            steps=task.whole("steps"),
            batch=BATCH,
            rate=task.number("rate"),
            momentum=0.9,
            order=_order(task.text("batches"), data.train_y),
        )

    def _losses(self, results: Results, norm: str, *, speed: bool) -> list[float]:
        """On mixed batches less on unequal ones, per seed."""
        rows = [
            self.along(results, norm=norm, batches=kind)
            if speed
            else self.at_best(results, "test", norm=norm, batches=kind)
            for kind in KINDS
        ]
        return [mixed - sum(unequal) / len(unequal) for mixed, *unequal in zip(*rows, strict=True)]

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Speed without, and whether Batch Normalization suffers less."""
        task = next(iter(results)).task
        valid = (
            f"{task['data']} of 14 × 14 or less in four domains, four convolutions, {task['steps']} steps of 32, tuned"
        )
        slowed = {norm: self._losses(results, norm, speed=True) for norm in ("none", "BN")}
        lost = {norm: self._losses(results, norm, speed=False) for norm in results.texts("norm")}
        finals = "; ".join(
            f"{name} {told({n: self.at_best(results, 'test', norm=n, batches=kind) for n in results.texts('norm')})}"
            for kind, name in KINDS.items()
        )
        return (
            by_effect(
                ("003-2",),
                "do unequal batches slow down learning?",
                paired_effect(slowed["none"]),
                "Mean accuracy while training on mixed batches less that on unequal ones, without a normalizer",
                valid,
                unit="of mean accuracy",
            ),
            by_effect(
                (),
                "does Batch Normalization lose less by unequal batches?",
                paired_effect(lost["none"], lost["BN"]),
                f"Final test accuracy: {finals}",
                valid,
                unit="of accuracy lost, without − with",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy by normalizer and batches."""
        groups = {
            name: {norm: self.at_best(results, "test", norm=norm, batches=kind) for norm in results.texts("norm")}
            for kind, name in KINDS.items()
        }
        plot = beside("how batches are put together", "test accuracy", groups)
        return Picture("Test accuracy by normalizer, mean and range over seeds, every arm tuned.", (plot,))


def _in_domains(data: Samples) -> Samples:
    """Image k in domain k mod 4."""
    levels, contrasts = torch.tensor(DOMAINS).T

    def shift(x: Tensor) -> Tensor:
        which = torch.arange(len(x)) % len(DOMAINS)
        level, contrast = (row[which].reshape(-1, 1, 1, 1) for row in (levels, contrasts))
        shifted: Tensor = level + contrast * (x - 0.5)
        return shifted

    return data.mapped(shift)


def _order(kind: str, labels: Tensor) -> Order:
    """All images equally often in the long run, in batches of one kind."""
    if kind == "mixed":
        return batches
    domains = torch.arange(len(labels)) % len(DOMAINS)

    def order(_: int, size: int, seed: int) -> Iterator[Tensor]:
        g = torch.Generator().manual_seed(20_000 + seed)
        parts = domains if kind == "domains" else labels
        sources = [torch.nonzero(parts == k)[:, 0] for k in range(int(parts.max()) + 1)]
        taken = 1 if kind == "domains" else 2
        while True:
            pool = torch.cat([sources[k] for k in torch.randperm(len(sources), generator=g)[:taken]])
            yield pool[torch.randint(len(pool), (size,), generator=g)]

    return order


EXPERIMENT = UnequalBatches()
