"""A10: batches of one and of two."""

from __future__ import annotations

import math

import torch

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import dashes, points
from normscope.lab.verdicts import ruled, tiny
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot

__all__ = ["EXPERIMENT", "Tiny"]

SIZES = (2, 4, 8, 16, 32)
FEATURES = 2000


class Tiny(Exact):
    """BatchNorm of a fully connected layer and of a convolution, float64."""

    registration = register(
        "A10",
        statement="With Batch Normalization a batch of 1 is impossible.",
        source="a tutorial; Luo et al. 2018 for the identity with InstanceNorm",
        confirms="a batch of 1 carries no signal, fully connected and convolutional",
        refutes="in a convolution a batch of 1 works, and equals InstanceNorm",
        thresholds={"identity": 1e-12},
        design="Batch 1 fully connected: the error, and the output and gradient when it is forced by its own moments. "
        "Batch 1 convolutional against InstanceNorm. Largest |x̂| for batches of 2 to 32, 2000 features.",
    )

    def measure(self, task: Task) -> Numbers:
        """What is left of a tiny batch."""
        x = torch.randn(1, 9, dtype=torch.float64)
        layer = ns.nn.BatchNorm1d(9, dtype=torch.float64)
        try:
            layer(x)
            refused = 0.0
        except ValueError:
            refused = 1.0
        planes = torch.randn(1, 4, 6, 6, dtype=torch.float64)
        batch, instance = (ns.normalize(planes, scope) for scope in ("[n] c [h w]", "n c [h w]"))
        rows = [ns.normalize(torch.randn(m, FEATURES, dtype=torch.float64), "[n] c", eps=1e-12) for m in SIZES]
        return {
            "refused": refused,
            "gradient": _forced_gradient(x),
            "instance": float((batch - instance).abs().max()),
            "largest": [float(row.abs().max()) for row in rows],
            "signs only": float((rows[0].abs() - 1).abs().median()),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """No signal fully connected; InstanceNorm in a convolution."""
        run, bar = self.first(results), self.threshold("identity")
        silent = run.number("refused") == 1 and run.number("gradient") < bar
        same = run.number("instance") < bar
        largest = run.row("largest")
        outcome = (
            f"Fully connected: refused, and when forced the gradient is {tiny(run.number('gradient'))}. "
            f"Convolutional: equal to "
            f"InstanceNorm to {tiny(run.number('instance'))}. A fully connected batch of 2 leaves the sign alone "
            f"(|x̂| = 1); the largest "
            f"|x̂| is {largest[0]:.2f} at 2 and {largest[-1]:.2f} at {SIZES[-1]}, at most √(m − 1)."
        )
        verdict: LabVerdict = "CONDITIONAL" if silent and same else "CONFIRMED" if silent else "REFUTED"
        size = Interval(largest[0], largest[0], largest[0], "largest |x̂| at a batch of 2")
        return (
            ruled(
                self.registration.claims,
                "is a batch of 1 impossible?",
                verdict,
                outcome,
                "impossible fully connected; in a convolution it is InstanceNorm",
                effect=size,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """The largest normalized value."""
        largest = self.first(results).row("largest")
        series = (points("measured", SIZES, largest), dashes("√(m − 1)", SIZES, [math.sqrt(m - 1) for m in SIZES], 1))
        plot = Plot("largest normalized value", "batch", "largest |x̂|", series, x_log=True)
        return Picture("A batch of m cannot give values beyond √(m − 1): two samples leave only a sign.", (plot,))


def _forced_gradient(x: torch.Tensor) -> float:
    """The gradient of a fully connected batch of one whose own value is its mean."""
    x = x.clone().requires_grad_()
    y = ns.normalize(x, "[n] c", moments=(x[0], torch.zeros_like(x[0])))
    return float(torch.autograd.grad(y, x, torch.randn_like(y))[0].abs().max())


EXPERIMENT = Tiny()
