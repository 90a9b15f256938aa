"""A09: parameters and state, counted."""

from __future__ import annotations

import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.verdicts import identity, ruled, tiny
from normscope.records import Interval, Judgement

__all__ = ["EXPERIMENT", "Counts"]

MAPS, BATCHES, KEPT = 7, 12, 0.999  # Caffe keeps 0.999 of its sums at every step


class Counts(Exact):
    """BatchNorm2d over f = 7 maps, with batches of several sizes."""

    registration = register(
        "A09",
        statement="Batch Normalization of a convolution has one γ and one β per feature map, 2m parameters in all.",
        source="Ioffe & Szegedy 2015, §3.2; a tutorial for 2m, m being the batch",
        confirms="there are 2m parameters",
        refutes="their number is 2f, whatever m, w and h",
        # The cumulative mean's factor 1/n is a float32 number.
        thresholds={"agreement": 1e-12, "cumulative": 1e-6},
        design="Parameters and state of the layer for f = 7 and batches of 2, 4, 16; moving averages with a momentum "
        "and cumulative, against their formulas; Caffe's three decayed sums against a weighted mean.",
    )

    def measure(self, task: Task) -> Numbers:
        """Counts and differences."""
        counted, state = [], []
        for m, size in ((2, 3), (4, 5), (16, 2)):
            layer = ns.nn.BatchNorm2d(MAPS)
            layer(torch.randn(m, MAPS, size, size))
            counted.append(float(sum(p.numel() for p in layer.parameters())))
            state.append(float(sum(b.numel() for b in layer.buffers())))
        batches = [torch.randn(16, MAPS, 3, 3, dtype=torch.float64) + k for k in range(BATCHES)]
        means = torch.stack([b.mean((0, 2, 3)) for b in batches])
        return {
            "parameters": counted,
            "state": state,
            "moving": _off(_running(batches, 0.1), _moving(means, 0.1)),
            "cumulative": _off(_running(batches, None), means.mean(0)),
            "caffe": _off(*_caffe(means)),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Against 2f, f + f + 1, and the formulas."""
        run, bar = self.first(results), self.threshold("agreement")
        counted, state = run.row("parameters"), run.row("state")
        f = float(MAPS)
        averages = max(run.number("moving"), run.number("caffe"))
        numbers = (
            f"{counted[0]:.0f} parameters and {state[0]:.0f} values of state for f = {MAPS} maps, at every batch size."
        )
        count = Interval(counted[0], counted[0], counted[0], f"parameters for f = {MAPS}")
        return (
            identity(("001-25", "003-6"), "one pair per feature map?", set(counted) == {2 * f}, numbers),
            ruled(
                ("003-10",),
                "2m parameters?",
                "REFUTED" if set(counted) == {2 * f} else "CONFIRMED",
                f"{numbers} It is 2f; the batch m does not enter.",
                "any layer",
                effect=count,
            ),
            identity(
                ("000-11",),
                "moving averages?",
                averages < bar
                and run.number("cumulative") < self.threshold("cumulative")
                and set(state) == {2 * f + 1},
                f"Running mean and variance and the number of batches; the moving "
                f"average meets its formula to {tiny(averages)}, the cumulative one to "
                f"{tiny(run.number('cumulative'))}.",
            ),
            ruled(
                ("000-12",),
                "three stored values?",
                "CONDITIONAL" if run.number("caffe") < bar else "REFUTED",
                "Caffe's layer stores three decayed sums (of means, of corrected variances, of weights), "
                "whose ratio is "
                f"the weighted mean to {tiny(run.number('caffe'))}; torch's stores {state[0]:.0f} values "
                f"besides γ and β.",
                "true of Caffe, false of torch",
            ),
        )

    def figure(self, results: Results) -> None:
        """Counts need no figure."""


def _running(batches: list[Tensor], momentum: float | None) -> Tensor:
    layer = ns.nn.BatchNorm2d(MAPS, momentum=momentum, dtype=torch.float64)
    for batch in batches:
        layer(batch)
    if layer.running_mean is None:
        raise RuntimeError("a BatchNorm that tracks has a running mean")
    return layer.running_mean


def _moving(means: Tensor, momentum: float) -> Tensor:
    """Σ p(1 − p)^(k − 1 − i)·mean_i: what starts at 0 adds nothing."""
    weights = momentum * (1 - momentum) ** torch.arange(len(means) - 1, -1, -1, dtype=means.dtype)
    return weights @ means


def _caffe(means: Tensor) -> tuple[Tensor, Tensor]:
    """Caffe's ratio of decayed sums, and the weighted mean in closed form."""
    total, count = torch.zeros_like(means[0]), 0.0
    for mean in means:
        total, count = KEPT * total + mean, KEPT * count + 1
    weights = KEPT ** torch.arange(len(means) - 1, -1, -1, dtype=means.dtype)
    return total / count, weights @ means / weights.sum()


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


EXPERIMENT = Counts()
