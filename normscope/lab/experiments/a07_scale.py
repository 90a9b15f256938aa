"""A07: weights of another scale."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import dashes, points
from normscope.lab.verdicts import ruled, tiny
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import slope

__all__ = ["EXPERIMENT", "Scale"]

EPS = 1e-5
SCALES = tuple(10.0**k for k in range(-6, 5))


class Scale(Exact):
    """BN(aWu) for a from 1e-6 to 1e4, float64."""

    registration = register(
        "A07",
        statement="BN(aWu) = BN(Wu), with the same gradient of u, and that of W divided by a.",
        source="Ioffe & Szegedy 2015, §3.3",
        confirms="where aσ is far above √ε the output does not change and log‖∂W‖ falls by 1.000 per log a; "
        "where it is "
        "not, it does change",
        refutes="the output depends on a where aσ is far above √ε",
        thresholds={"slope": 1e-3, "output": 1e-4, "radial": 1e-5, "knee": 0.1},
        design="u normal, 64 samples; W random 8 × 5; random upstream gradient; a from 1e-6 to 1e4; ε = 1e-5.",
    )

    def measure(self, task: Task) -> Numbers:
        """Norms of gradients and changes of the output for every a."""
        u, dy = (torch.randn(64, size, dtype=torch.float64) for size in (8, 5))
        w = torch.randn(8, 5, dtype=torch.float64)
        reference, _, of_u = _layer(u, w, dy)
        found: dict[str, list[float]] = {"output": [], "weight": [], "input": [], "radial": []}
        for a in SCALES:
            y, of_w, gradient = _layer(u, a * w, dy)
            found["output"].append(float((y - reference).norm() / reference.norm()))
            found["weight"].append(float(of_w.norm()))
            found["input"].append(float((gradient - of_u).norm() / of_u.norm()))
            found["radial"].append(abs(float((a * w * of_w).sum() / (a * w).norm() / of_w.norm())))
        return dict(found)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The slope above the knee, and the knee."""
        run = self.first(results)
        weight, above = np.log(run.row("weight")), [k for k, a in enumerate(SCALES) if a >= 1]
        rate = float(slope(np.log(SCALES)[above], weight[above]))
        radial = max(run.row("radial")[k] for k in above)
        output = max(run.row("output")[k] for k in above)
        knee = run.row("output")[SCALES.index(1e-3)]
        holds = abs(rate + 1) < self.threshold("slope") and output < self.threshold("output")
        holds = holds and radial < self.threshold("radial")
        outcome = (
            f"For a from 1 to 1e4 log‖∂W‖ falls by {-rate:.4f} per log a and the output changes by {tiny(output)} "
            f"at most; ∂W is "
            f"orthogonal to W ({tiny(radial)}). At a = 0.001, where aσ meets √ε, the output changes by {knee:.0%}."
        )
        verdict: LabVerdict = (
            "CONDITIONAL" if holds and knee > self.threshold("knee") else "EXACT" if holds else "REFUTED"
        )
        return (
            ruled(
                self.registration.claims,
                "does the scale of W matter?",
                verdict,
                outcome,
                "not while aσ is far above √ε; below, it does",
                effect=Interval(rate, rate, rate, "slope of log‖∂W‖"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """The knee."""
        run = self.first(results)
        weight = run.row("weight")
        theory = [weight[-1] * SCALES[-1] / a for a in SCALES]
        left = Plot(
            "gradient of the weights",
            "a",
            "‖∂W‖",
            (points("measured", SCALES, weight), dashes("∝ 1/a", SCALES, theory, 1)),
            x_log=True,
            y_log=True,
        )
        output = [max(v, 1e-12) for v in run.row("output")]
        right = Plot("output", "a", "relative change", (points("", SCALES, output),), x_log=True, y_log=True)
        return Picture("Weights of any scale give the same output, until aσ comes down to √ε.", (left, right))


def _layer(u: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the weights, gradient of the input."""
    u, w = u.clone().requires_grad_(), w.clone().requires_grad_()
    y = ns.normalize(u @ w, "[n] c", eps=EPS)
    of_w, of_u = torch.autograd.grad(y, (w, u), dy)
    return y.detach(), of_w, of_u


EXPERIMENT = Scale()
