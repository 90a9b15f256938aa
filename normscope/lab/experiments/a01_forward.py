"""A01: does every normalizer compute the formula?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import bars
from normscope.lab.verdicts import identity
from normscope.records import Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Forward"]

SHAPE, EPS = (6, 8, 5, 4), 1e-5
# Scope, its sizes, and torch's function.
NORMS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "BatchNorm": ("[n] c [h w]", {}, lambda x: F.batch_norm(x, None, None, training=True)),
    "LayerNorm": ("n [c h w]", {}, lambda x: F.layer_norm(x, SHAPE[1:])),
    "InstanceNorm": ("n c [h w]", {}, F.instance_norm),
    "GroupNorm": ("n (g [c]) [h w]", {"g": 2}, lambda x: F.group_norm(x, 2)),
}


class Forward(Exact):
    """Random and extreme inputs, in float64."""

    registration = register(
        "A01",
        statement="A normalizer gives its set S mean 0 and variance σ²/(σ² + ε), which is 1 where σ² is far above ε.",
        source="Ioffe & Szegedy 2015, Algorithm 1",
        confirms="mean and variance meet the formula, and the layers of torch agree, on random and extreme inputs",
        refutes="any of them differs by more",
        thresholds={"mean": 1e-12, "variance": 1e-10, "torch": 1e-12},
        design="Normal inputs at scales 1e-6, 1 and 1e6 and with constant channels, float64, ε = 1e-5, no γ and β; "
        "BatchNorm, LayerNorm, InstanceNorm and GroupNorm through ns.normalize.",
    )

    def measure(self, task: Task) -> Numbers:
        """Worst errors per normalizer."""
        found: dict[str, list[float]] = {"mean": [], "variance": [], "torch": []}
        inputs = _inputs(task.seeds[0])
        for scope, sizes, theirs in NORMS.values():
            errors = [_errors(x, scope, sizes, theirs) for x in inputs]
            for name, column in zip(found, zip(*errors, strict=True), strict=True):
                found[name].append(max(column))
        return dict(found)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Every error against its threshold."""
        run = self.first(results)
        worst = {name: max(run.row(name)) for name in ("mean", "variance", "torch")}
        outcome = (
            f"Largest |mean| {worst['mean']:.1e}, largest error of the variance against σ²/(σ² + ε) "
            f"{worst['variance']:.1e}, largest difference from torch {worst['torch']:.1e}. The variance is "
            f"σ²/(σ² + ε), "
            "not 1: a channel far below √ε keeps almost none."
        )
        holds = all(error < self.threshold(name) for name, error in worst.items())
        return (identity(self.registration.claims, "mean 0 and variance σ²/(σ² + ε)?", holds, outcome),)

    def figure(self, results: Results) -> Picture:
        """The errors."""
        run = self.first(results)
        places = range(len(NORMS))
        series = tuple(
            bars(name, places, [max(v, 1e-18) for v in run.row(name)], k) for k, name in enumerate(run.numbers)
        )
        plot = Plot("worst error, float64", "", "absolute error", series, y_log=True, ticks=tuple(NORMS))
        return Picture(
            "Largest errors over random and extreme inputs: of the mean, of the variance, against torch.", (plot,)
        )


def _inputs(seed: int) -> list[Tensor]:
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    constant = x.clone()
    constant[:, 1] = 3.0
    return [x, 1e6 * x, 1e-6 * x, constant]


def _errors(
    x: Tensor, scope: str, sizes: dict[str, Any], theirs: Callable[[Tensor], Tensor]
) -> tuple[float, float, float]:
    y = ns.normalize(x, scope, eps=EPS, **sizes)
    before, after = ns.moments(x, scope, **sizes), ns.moments(y, scope, **sizes)
    expected = before.var / (before.var + EPS)
    return (
        float(after.mean.abs().max()),
        float((after.var - expected).abs().max()),
        float((y - theirs(x)).abs().max()),
    )


EXPERIMENT = Forward()
