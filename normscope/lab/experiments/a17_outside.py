"""A17: normalizing outside the gradient step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import line
from normscope.lab.verdicts import ruled, tiny
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import slope

__all__ = ["EXPERIMENT", "Outside"]

STEPS, SAMPLES, RATE = 200, 256, 0.1
# Name → (statistics detached, also the deviation, a learnable β behind).
ARMS = {
    "mean detached": (True, False, False),
    "mean detached, β behind": (True, False, True),
    "mean and σ detached": (True, True, False),
    "in the gradient": (False, False, False),
}


class Outside(Exact):
    """x = u + b, or a·u + b, normalized and fitted to 1.5u + 2 by gradient descent."""

    registration = register(
        "A17",
        statement="If normalization stands outside the gradient step, the bias grows without bound at a constant loss.",
        source="Ioffe & Szegedy 2015, §2",
        confirms="statistics detached: the loss stays constant and b grows linearly, also with a learnable β behind",
        refutes="b stays bounded with detached statistics",
        thresholds={"loss range": 1e-10, "R²": 0.999, "bounded": 3, "grown": 10},
        design="256 values u ~ N(0.3, 1), target 1.5u + 2, squared loss, 200 steps of rate 0.1, float64; the "
        "mean (and the "
        "deviation) detached or not, with or without β behind.",
    )

    def measure(self, task: Task) -> Numbers:
        """b, a and the loss against the step, for every arm."""
        found: dict[str, list[float]] = {}
        for name, arm in ARMS.items():
            b, a, loss = _descend(*arm, task.seeds[0])
            found |= {f"b {name}": b, f"a {name}": a, f"loss {name}": loss}
        return dict(found)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Linear growth without β, none with."""
        run = self.first(results)
        b, loss = run.row("b mean detached"), run.row("loss mean detached")
        fit = _linearity(b)
        flat = max(loss) - min(loss)
        grows = (
            flat < self.threshold("loss range") and fit > self.threshold("R²") and abs(b[-1]) > self.threshold("grown")
        )
        behind = run.row("b mean detached, β behind")[-1]
        bounded = abs(behind) < self.threshold("bounded")
        both = run.row("a mean and σ detached")
        inside = max(abs(v) for v in run.row("b in the gradient"))
        outcome = (
            f"Mean detached, no β: after {STEPS} steps b = {b[-1]:.2f}, linear (R² = {fit:.5f}), while the loss "
            f"moved by "
            f"{tiny(flat)}. With β behind, b stops at {behind:.2f}. With σ detached too, the weight grows from "
            f"{both[0]:.2f} to {both[-1]:.2f}. Inside the gradient b never moves ({tiny(inside)})."
        )
        verdict: LabVerdict = "CONDITIONAL" if grows and bounded else "CONFIRMED" if grows else "REFUTED"
        size = Interval(b[-1], b[-1], b[-1], f"b after {STEPS} steps")
        return (
            ruled(
                ("001-14",),
                "does b grow for ever?",
                verdict,
                outcome,
                "true where nothing behind can absorb a shift, false with a learnable β",
                effect=size,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """b and the loss against the step."""
        run = self.first(results)
        x = range(STEPS + 1)
        left = Plot("bias", "step", "b", tuple(line(name, x, run.row(f"b {name}"), k) for k, name in enumerate(ARMS)))
        right = Plot(
            "loss",
            "step",
            "squared error",
            tuple(line("", x, run.row(f"loss {name}"), k) for k, name in enumerate(ARMS)),
        )
        return Picture(
            "Without a gradient through the mean, the bias runs away, unless β can take the shift.", (left, right)
        )


def _linearity(b: Sequence[float]) -> float:
    """R² of b against the step; 0 where b does not move."""
    values, steps = np.array(b), np.arange(len(b))
    total = float(((values - values.mean()) ** 2).sum())
    rest = values - values.mean() - slope(steps, values) * (steps - steps.mean())
    return 1 - float((rest**2).sum()) / total if total > 0 else 0.0


def _descend(detached: bool, deviation: bool, behind: bool, seed: int) -> tuple[list[float], list[float], list[float]]:
    u = 0.3 + torch.randn(SAMPLES, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    target = 1.5 * u + 2
    a, b, beta = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, 0.0, 0.0))
    trail: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(STEPS + 1):
        x = (a * u if deviation else u) + b
        y = _normalized(x, detached=detached, deviation=deviation) + (beta if behind else 0)
        loss = ((y - target) ** 2).mean()
        for row, value in zip(trail, (b, a, loss), strict=True):
            row.append(float(value.detach()))
        learned = [b] + [a] * deviation + [beta] * behind
        with torch.no_grad():
            for p, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                p.sub_(RATE * gradient)
    return trail


def _normalized(x: Tensor, *, detached: bool, deviation: bool) -> Tensor:
    """Centred, and where asked divided by σ; statistics that are detached count as constants in the gradient."""
    if not detached:
        return ns.normalize(x, "[n] c", scale=deviation)
    mean, var, _ = ns.moments(x.detach(), "[n] c")
    return ns.normalize(x, "[n] c", scale=deviation, moments=(mean, var))


EXPERIMENT = Outside()
