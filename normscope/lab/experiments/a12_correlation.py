"""A12: does normalizing remove correlation?"""

from __future__ import annotations

import torch
from torch import Tensor

import normscope as ns
from normscope import data
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import dashes, points
from normscope.lab.verdicts import ruled, tiny
from normscope.records import Interval, Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Correlation"]

FEATURES = 16


class Correlation(Exact):
    """Random projections of the embedded digits."""

    registration = register(
        "A12",
        statement="Batch Normalization controls means and variances of features, not what they have in common.",
        source="Ioffe & Szegedy 2015, §3, after LeCun et al. 1998",
        confirms="all correlations between features are as before",
        refutes="a correlation changes",
        thresholds={"change": 1e-9, "present": 0.1},
        design="16 random projections of the digits, float64: the correlation matrix before and after BatchNorm.",
    )

    def measure(self, task: Task) -> Numbers:
        """Correlations before and after."""
        x = torch.tensor(data.load_digits().train_x).flatten(1).double() / 16
        z = x @ torch.randn(x.shape[1], FEATURES, dtype=torch.float64)
        pairs = torch.triu_indices(FEATURES, FEATURES, 1)
        before, after = (torch.corrcoef(t.T)[pairs[0], pairs[1]] for t in (z, _normalized(z)))
        return {"before": before.tolist(), "after": after.tolist()}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The largest change of a correlation."""
        run = self.first(results)
        before, after = run.row("before"), run.row("after")
        change = max(abs(a - b) for a, b in zip(before, after, strict=True))
        typical = sum(map(abs, before)) / len(before)
        same = change < self.threshold("change") and typical > self.threshold("present")
        outcome = f"{len(before)} correlations, {typical:.2f} on average in size, change by {tiny(change)} at most."
        size = Interval(change, change, change, "largest change of a correlation")
        return (
            ruled(
                ("001-17",),
                "does it leave correlations?",
                "EXACT" if same else "REFUTED",
                outcome,
                "any data: an identity",
                effect=size,
            ),
            ruled(
                ("002-4",),
                "does it set the covariance?",
                "CONDITIONAL" if same else "CONFIRMED",
                f"{outcome} γ sets each feature's scale, β its mean; the covariance's other half is untouched.",
                "true of mean and variance, false of covariances",
                effect=size,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Every correlation, before and after."""
        run = self.first(results)
        series = (points("", run.row("before"), run.row("after")), dashes("unchanged", (-1, 1), (-1, 1), 1))
        return Picture(
            "Every correlation between two features is the same after normalizing.",
            (Plot("correlations", "before", "after", series),),
        )


def _normalized(z: Tensor) -> Tensor:
    return ns.normalize(z, "[n] c")


EXPERIMENT = Correlation()
