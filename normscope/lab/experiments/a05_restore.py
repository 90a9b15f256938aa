"""A05: can γ and β restore what was normalized?"""

from __future__ import annotations

import numpy as np
import torch

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import dashes, points
from normscope.lab.verdicts import identity, ruled, tiny
from normscope.records import Interval, Judgement, Picture, Plot
from normscope.statistics import slope

__all__ = ["EXPERIMENT", "Restore"]

SIZES = (8, 32, 128, 512, 2048)
MEAN, DEVIATION, EPS = 500.0, 120.0, 1e-5


class Restore(Exact):
    """A feature of mean 500 and deviation 120, γ = √(Var + ε), β = E."""

    registration = register(
        "A05",
        statement="With γ = √(Var + ε) and β = E, Batch Normalization gives back what came in.",
        source="Ioffe & Szegedy 2015, §3",
        confirms="with the population's statistics the output is the input, and so it is with a batch's",
        refutes="with the population's it is not",
        thresholds={"inference": 1e-6, "slope from": -0.6, "slope to": -0.4},
        design="Normal values, γ and β of the population; normalized by the population's moments and by those of "
        "batches of 8 to 2048, float64; the residual's slope against the batch size, both logarithmic.",
    )

    def measure(self, task: Task) -> Numbers:
        """Residuals as shares of the deviation."""
        g = torch.Generator().manual_seed(task.seeds[0])
        weight, bias = (torch.tensor([v], dtype=torch.float64) for v in ((DEVIATION**2 + EPS) ** 0.5, MEAN))
        population = torch.tensor([MEAN], dtype=torch.float64), torch.tensor([DEVIATION**2], dtype=torch.float64)
        residuals = []
        for m in SIZES:
            x = MEAN + DEVIATION * torch.randn(max(1, 65536 // m), m, 1, generator=g, dtype=torch.float64)
            y = ns.normalize(x, "b [m] c", weight=weight, bias=bias, eps=EPS)
            residuals.append(float(((y - x) ** 2).mean() ** 0.5) / DEVIATION)
        restored = ns.normalize(x[0], "[m] c", weight=weight, bias=bias, eps=EPS, moments=population)
        shown = ns.normalize(torch.tensor([[560.0]], dtype=torch.float64), "[m] c", eps=EPS, moments=population)
        return {
            "inference": float((restored - x[0]).abs().max()) / DEVIATION,
            "training": residuals,
            "normalized": float(shown),
            "back": float(shown * weight + bias),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Exact with the population's statistics, 1/√m with a batch's."""
        run = self.first(results)
        residuals, exact = run.row("training"), run.number("inference")
        rate = float(slope(np.log(SIZES), np.log(residuals)))
        restores = exact < self.threshold("inference")
        shrinks = self.threshold("slope from") < rate < self.threshold("slope to")
        outcome = (
            f"With the population's statistics the residual is {tiny(exact)} σ. With a batch's it is "
            f"{residuals[0]:.1%} "
            f"of σ at 8 values and {residuals[-1]:.1%} at 2048, falling as m to the power {rate:.2f}."
        )
        size = Interval(residuals[0], residuals[0], residuals[0], "residual / σ at a batch of 8")
        return (
            ruled(
                ("001-18", "003-8"),
                "is the input restored?",
                "CONDITIONAL" if restores and shrinks else "REFUTED" if not restores else "UNDECIDED",
                outcome,
                "exact with the population's statistics, up to 1/√m with a batch's",
                effect=size,
            ),
            identity(
                ("001-29",),
                "does 560 come back?",
                abs(run.number("back") - 560) < 1e-9,
                f"560 becomes {run.number('normalized'):.3f} and {run.number('back'):.6f} again.",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """The residual against the batch."""
        residuals = self.first(results).row("training")
        theory = [residuals[0] * (SIZES[0] / m) ** 0.5 for m in SIZES]
        series = (points("measured", SIZES, residuals), dashes("∝ 1/√m", SIZES, theory, 1))
        plot = Plot(
            "restored from batch statistics", "values in the batch", "residual / σ", series, x_log=True, y_log=True
        )
        return Picture("γ and β restore the input exactly at inference, and up to 1/√m in training.", (plot,))


EXPERIMENT = Restore()
