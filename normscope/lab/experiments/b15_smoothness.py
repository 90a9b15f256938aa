"""B15: smoothness of the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Measured, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import available, samples
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, train
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import decide, paired_effect

__all__ = ["EXPERIMENT", "Smoothness"]

NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "GN"),
    "full": ("none", "BN", "GN", "LN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 300, "full": 15_000}
RATE, LOOKS = 0.03, 8
# Steps along the gradient as it is, and as shares of every parameter tensor's own norm.
RAW = (0.01, 0.03, 0.1, 0.3)
RELATIVE = (0.003, 0.01, 0.03, 0.1)


class Smoothness(Experiment):
    """How much the gradient changes along itself, while a network trains."""

    registration = register(
        "B15",
        statement="Batch Normalization makes the loss smoother by reparametrising it.",
        source="Santurkar et al. 2018, Figure 4",
        confirms="the largest change of the gradient along itself, per length and per step relative to the weights, is "
        "smaller with it than without, both intervals above 0",
        refutes="it is not smaller per length; conditional if it is smaller per length alone",
        thresholds={"difference": 0},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9 and rate 0.03 for "
        "all, batch 64. At 8 marks, on 256 fixed training images with their own statistics: g at θ and at θ − ηg for η "
        "= 0.01 to 0.3, the largest ‖g − g′‖/(η‖g‖); and the same at steps that move every parameter tensor by 0.3 to "
        "10 % of its norm along −g, the largest ‖g − g′‖/‖g‖ over the share. The mean logarithm over the marks.",
        cuts=("LayerNorm", "15 000 steps down to 300", "10 seeds down to 6", "the Hessian's top eigenvalue"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Every normalizer and seed."""
        name = available("cifar10") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "steps": STEPS[profile]}
        return [
            Task(self.name, tuple({**fixed, "norm": norm}.items()), (seed,))
            for seed in seeds
            for norm in NORMS[profile]
        ]

    def measure(self, task: Task) -> Numbers:
        """Train, looking along the gradient."""
        data = samples(task.text("data"), "half", 5_000, 1_000)
        network = Convolutional(data.shape[0], data.classes, task.seeds[0], norm=task.text("norm"))
        x, y = data.train_x[:256], data.train_y[:256]
        found: dict[str, list[float]] = {"raw": [], "relative": []}

        def look(_: int) -> None:
            network.train()
            with ns.pause_statistics(network):
                for name, value in _roughness(network, x, y).items():
                    found[name].append(value)

        steps = task.whole("steps")
        trained = train(
            network, data, task.seeds, steps=steps, batch=64, rate=RATE, momentum=0.9, probes=LOOKS, on_probe=look
        )
        return trained | found

    def _means(self, results: Results, name: str) -> dict[str, list[float]]:
        """Normalizer → the mean over marks of every seed."""
        return {
            norm: [sum(m.row(name)) / len(m.row(name)) for m in _runs(results, norm)] for norm in results.texts("norm")
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Per length, per relative step."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps of 64, rate {RATE}"
        raw, relative = self._means(results, "raw"), self._means(results, "relative")
        length, share = (paired_effect(rows["none"], rows["BN"]) for rows in (raw, relative))
        verdict: LabVerdict = decide(length)
        if verdict == "CONFIRMED" and decide(share) != "CONFIRMED":
            verdict = "CONDITIONAL" if decide(share) == "REFUTED" else "UNDECIDED"
        return (
            ruled(
                ("004-18",),
                "is the loss smoother?",
                verdict,
                f"ln of the gradient's largest change, per length: {told(raw, '.2f')}; per relative step: "
                f"{told(relative, '.2f')}.",
                f"per length: {decide(length)}, relative to the weights: {decide(share)}; {valid}",
                effect=interval(length, "ln, without − with, per length"),
                seeds=length.n,
                tests=2,
            ),
            by_effect(
                (),
                "relative to the weights?",
                share,
                "Per relative step, without − with",
                valid,
                unit="ln, without − with",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Roughness while training."""
        plots = []
        for name, what in (("raw", "per length"), ("relative", "per relative step")):
            series: list[Series] = []
            for k, norm in enumerate(self._means(results, name)):
                runs = _runs(results, norm)
                series += spread(norm, runs[0].row("steps"), [m.row(name) for m in runs], k)
            plots.append(Plot(what, "step", "ln of the gradient's largest change", tuple(series)))
        return Picture("How much the gradient changes along itself, mean and range over seeds.", tuple(plots))


def _runs(results: Results, norm: str) -> list[Measured]:
    return sorted(results.where(norm=norm), key=lambda m: m.task.seeds)


def _roughness(network: Convolutional, x: Tensor, y: Tensor) -> dict[str, float]:
    """ln of the largest change of the gradient along itself, per length and per relative step."""
    parameters = list(network.parameters())

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(network(x), y), parameters))

    def change(step: Sequence[Tensor]) -> float:
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, d in zip(parameters, step, strict=True):
                p.sub_(d)
        moved = gradient()
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        return float(_norm([a - b for a, b in zip(moved, own, strict=True)]) / _norm(own))

    own = gradient()
    scaled = [g * p.detach().norm() / g.norm().clamp(min=1e-12) for g, p in zip(own, parameters, strict=True)]
    raw = max(change([eta * g for g in own]) / eta for eta in RAW)
    relative = max(change([share * g for g in scaled]) / share for share in RELATIVE)
    return {"raw": math.log(raw), "relative": math.log(relative)}


def _norm(parts: Sequence[Tensor]) -> Tensor:
    whole: Tensor = torch.stack([part.norm() for part in parts]).norm()
    return whole


EXPERIMENT = Smoothness()
