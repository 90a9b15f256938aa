"""G01: adversarial and noise robustness."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Measured, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import available, samples
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, Tuned, accuracies, train
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, decide, paired_effect

__all__ = ["EXPERIMENT", "Attacks"]

NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "GN"),
    "full": ("none", "BN", "GN", "LN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 10_000}
ITERATIONS: Mapping[ProfileName, int] = {"quick": 3, "cpu": 20, "full": 100}
SIZES = (0.02, 0.05, 0.1, 0.2)
# Of the network that transferred attacks are made for, the same for every arm.
SOURCE_RATE = 0.03


class Attacks(Tuned):
    """Networks under attacks that follow their gradient, under those made for other networks, and under noise."""

    registration = register(
        "G01",
        statement="Batch Normalization makes networks vulnerable to adversarial examples.",
        source="a tutorial; Galloway et al. 2019; Benz et al. 2021",
        confirms="the share of its clean accuracy that a network keeps under attack, the mean over sizes, is lower "
        "with it than without by more than 2 points, and lower under transferred attacks too",
        refutes="it is not lower by 2 points, or higher",
        thresholds={"points": 0.02},
        design="Four convolutions, MNIST averaged to 14 × 14, 5 000 images, SGD with momentum 0.9, batch 64; three "
        "rates tuned with 2 seeds for every arm; evaluation mode. On 200 test images: projected gradient ascent of the "
        "loss within ±ε, 20 steps of ε/8 from a random start, ε = 0.02 to 0.2; the same images attacked for a network "
        "without normalizer of another seed, trained at 0.03; uniform noise in ±2ε. Accuracies are divided by "
        "the clean one of the same images.",
        cuts=("LayerNorm", "100 iterations down to 20", "10 000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer."""
        name = available("mnist") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "cnn", "steps": STEPS[profile], "iterations": ITERATIONS[profile]}
        return [{**fixed, "norm": norm} for norm in NORMS[profile]]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train and attack."""
        data = samples(task.text("data"), "half", 5_000, 2_000)
        steps, seed = task.whole("steps"), task.seeds[0]

        def trained(norm: str, seed: int, rate: float) -> tuple[Convolutional, dict[str, list[float]]]:
            network = Convolutional(data.shape[0], data.classes, seed, norm=norm)
            found = train(network, data, (seed,), steps=steps, batch=64, rate=rate, momentum=0.9, probes=1)
            return network.eval().requires_grad_(False), found

        network, found = trained(task.text("norm"), seed, task.number("rate"))
        if task.text("stage") == "tune":
            return found
        other, _ = trained("none", seed + 50, SOURCE_RATE)
        x, y = data.test_x[:200], data.test_y[:200]
        found["clean"] = accuracies(network, x, y, 1)
        g = torch.Generator().manual_seed(seed)
        for name, attacked in (("attack", network), ("transfer", other)):
            made = [_attacked(attacked, x, y, size, task.whole("iterations"), g) for size in SIZES]
            found[name] = [accuracies(network, images, y, 1)[0] for images in made]
        noisy = [x + 2 * size * (2 * torch.rand(x.shape, generator=g) - 1) for size in SIZES]
        found["noise"] = [accuracies(network, images, y, 1)[0] for images in noisy]
        return found

    def _kept(self, results: Results, name: str, norm: str) -> list[float]:
        """Share of the clean accuracy, the mean over sizes, per seed."""
        return [statistics.mean(m.row(name)) / max(m.row("clean")[0], 0.01) for m in self._tested(results, norm)]

    def _tested(self, results: Results, norm: str) -> list[Measured]:
        runs = results.where(stage="test", norm=norm, rate=self.best_rate(results, norm=norm))
        return sorted(runs, key=lambda m: m.task.seeds)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Own attacks and transferred ones together; noise."""
        task = results.where(stage="test")[0].task
        valid = (
            f"{task['data']} of 14 × 14 or less, four convolutions, {task['steps']} steps of 64, tuned; attacks of "
            f"{task['iterations']} steps"
        )
        norms = results.texts("norm")
        kept = {name: {n: self._kept(results, name, n) for n in norms} for name in ("attack", "transfer", "noise")}
        own, transfer, noise = (paired_effect(rows["none"], rows["BN"]) for rows in kept.values())
        verdict: LabVerdict = decide(own, least=self.threshold("points"))
        if verdict == "CONFIRMED" and not transfer.low > 0:
            verdict = "CONDITIONAL" if transfer.n >= MINIMUM_SEEDS and transfer.high < 0 else "UNDECIDED"
        clean = {n: self.at_best(results, "clean", norm=n) for n in norms}
        return (
            ruled(
                ("002-20",),
                "is it more vulnerable?",
                verdict,
                f"Share of the clean accuracy kept under attack: {told(kept['attack'])}; under attacks made for "
                f"another network: {told(kept['transfer'])}; clean accuracy {told(clean)}.",
                f"own attacks: {decide(own)}, transferred: {decide(transfer)}; {valid}",
                effect=interval(own, "share kept, without − with"),
                seeds=own.n,
                tests=2,
            ),
            by_effect(
                (),
                "and to noise?",
                noise,
                f"Share kept under noise: {told(kept['noise'])}",
                valid,
                unit="share kept, without − with",
                least=self.threshold("points"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against the size of the change."""
        plots = []
        for name, title in (("attack", "own attacks"), ("transfer", "transferred"), ("noise", "noise")):
            series: list[Series] = []
            for k, norm in enumerate(results.texts("norm")):
                rows = [(m.row("clean")[0], *m.row(name)) for m in self._tested(results, norm)]
                series += spread(norm, (0.0, *SIZES), rows, k)
            plots.append(Plot(title, "ε", "accuracy", tuple(series)))
        return Picture("Test accuracy against the size of the change, mean and range over seeds.", tuple(plots))


def _attacked(network: Convolutional, x: Tensor, y: Tensor, size: float, iterations: int, g: torch.Generator) -> Tensor:
    """Images within ±size of x, pixels 0 to 1, moved along the sign of the loss's gradient (Madry et al. 2018)."""
    low, high = (x - size).clamp(min=0), (x + size).clamp(max=1)
    moved = x + size * (2 * torch.rand(x.shape, generator=g) - 1)
    for _ in range(iterations):
        moved = moved.clamp(low, high).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), y), [moved])
        moved = moved.detach() + size / 8 * gradient.sign()
    return moved.clamp(low, high)


EXPERIMENT = Attacks()
