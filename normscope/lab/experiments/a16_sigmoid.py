"""A16: where the sigmoid has a gradient."""

from __future__ import annotations

import numpy as np

from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import line, points
from normscope.lab.verdicts import identity, ruled
from normscope.records import Interval, Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Sigmoid"]

MARKS = (1.0, 2.0, 3.0, 4.0, 5.0)


class Sigmoid(Exact):
    """σ′(x) = σ(x)(1 − σ(x)), as a share of its largest value σ′(0) = ¼."""

    registration = register(
        "A16",
        statement="The gradient of the sigmoid is large within [−5, 5].",
        source="a tutorial; the function itself",
        confirms="the gradient at ±5 is at least 0.1 of that at 0",
        refutes="it is less",
        thresholds={"share at 5": 0.1, "share at 1": 0.5},
        design="The derivative at 1 to 5, and how much of a standard normal lies where it is above a tenth.",
    )

    def measure(self, task: Task) -> Numbers:
        """Shares of the largest gradient."""
        wide = float(np.arccosh(np.sqrt(10)) * 2)  # 4σ′(x) = 1/cosh²(x/2) = 0.1
        return {"share": [_share(x) for x in MARKS], "a tenth at": wide}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Against the registered shares."""
        run = self.first(results)
        shares, wide = run.row("share"), run.number("a tenth at")
        listed = ", ".join(f"{s:.1%} at {x:g}" for x, s in zip(MARKS, shares, strict=True))
        outcome = f"Of σ′(0) are left {listed}; a tenth at ±{wide:.2f}."
        five = Interval(shares[-1], shares[-1], shares[-1], "share of σ′(0) at 5")
        return (
            ruled(
                ("001-28",),
                "large within [−5, 5]?",
                "CONFIRMED" if shares[-1] >= self.threshold("share at 5") else "REFUTED",
                outcome,
                "the function",
                effect=five,
            ),
            identity(
                ("001-10", "003-12"),
                "does it saturate, and does variance 1 stay clear of that?",
                shares[-1] < self.threshold("share at 5") and shares[0] > self.threshold("share at 1"),
                f"{outcome} Inputs of mean 0 and variance 1 lie where most of the gradient is left.",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """The curve with marks."""
        x = np.linspace(-8, 8, 161)
        marks = [-m for m in reversed(MARKS)] + list(MARKS)
        series = (line("", x, [_share(v) for v in x]), points("", marks, [_share(m) for m in marks], 1))
        plot = Plot("gradient of the sigmoid", "x", "σ′(x) / σ′(0)", series, levels=(("a tenth", 0.1),))
        return Picture("Within [−5, 5] the gradient of the sigmoid falls to 2.7 % of its largest value.", (plot,))


def _share(x: float) -> float:
    return float(1 / np.cosh(x / 2) ** 2)


EXPERIMENT = Sigmoid()
