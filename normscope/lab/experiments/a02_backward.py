"""A02: the gradients, by the six formulas, by autograd and by differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import bars
from normscope.lab.verdicts import identity
from normscope.records import Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Backward"]

SAMPLES, FEATURES, EPS, STEP = 16, 5, 1e-5, 1e-6
TERMS = ("through x̂ alone", "through the variance", "through the mean")


class Backward(Exact):
    """A batch of 16 with 5 features, random upstream gradient, float64."""

    registration = register(
        "A02",
        statement="The gradients of Batch Normalization follow six formulas, in which mean and variance take part.",
        source="Ioffe & Szegedy 2015, §3",
        confirms="the formulas agree with autograd and with central differences, and leaving out either "
        "statistic shows",
        refutes="they differ, or leaving out a statistic makes no difference",
        thresholds={"autograd": 1e-10, "differences": 1e-7, "omission": 1e-2},
        design="y = γx̂ + β over a batch with offset; gradients of x, γ, β by the formulas, by Caffe's compact form, by "
        "autograd of ns.normalize, by central differences with step 1e-6; then with the mean's or the variance's term "
        "left out.",
    )

    def measure(self, task: Task) -> Numbers:
        """Relative errors, and the sizes of the three terms of ∂x."""
        g = torch.Generator().manual_seed(task.seeds[0])
        x, dy = (torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=g) for _ in range(2))
        x = 2 * x + 1
        weight, bias = (torch.randn(FEATURES, dtype=torch.float64, generator=g) for _ in range(2))
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ns.normalize(leaves[0], "[n] c", weight=leaves[1], bias=leaves[2], eps=EPS)
        auto = torch.autograd.grad(y, leaves, dy)
        terms, *parameters = _six(x, weight, dy)
        ours = (sum(terms, torch.zeros(())), *parameters)

        def loss(*tensors: Tensor) -> Tensor:
            value: Tensor = (ns.normalize(tensors[0], "[n] c", weight=tensors[1], bias=tensors[2], eps=EPS) * dy).sum()
            return value

        numeric = _differences(loss, (x, weight, bias))
        return {
            "autograd": max(_error(a, b) for a, b in zip(ours, auto, strict=True)),
            "compact": _error(_compact(x, weight, dy), auto[0]),
            "differences": max(_error(a, b) for a, b in zip(ours, numeric, strict=True)),
            "without variance": _error(terms[0] + terms[2], auto[0]),
            "without mean": _error(terms[0] + terms[1], auto[0]),
            "sizes": [float(term.norm() / ours[0].norm()) for term in terms],
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Agreement, and whether omissions are seen."""
        run = self.first(results)
        exact, numeric, compact = (run.number(name) for name in ("autograd", "differences", "compact"))
        omitted = min(run.number("without variance"), run.number("without mean"))
        holds = max(exact, compact) < self.threshold("autograd") and numeric < self.threshold("differences")
        outcome = (
            f"Relative error against autograd {exact:.1e} (compact form {compact:.1e}), against central differences "
            f"{numeric:.1e}. Without the variance's term ∂x is off by {run.number('without variance'):.0%}, "
            f"without the "
            f"mean's by {run.number('without mean'):.0%}: both statistics take part. γ and β have gradients of "
            f"their own."
        )
        return (
            identity(
                self.registration.claims,
                "do the six formulas hold?",
                holds and omitted > self.threshold("omission"),
                outcome,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """How large the three terms are."""
        sizes = self.first(results).row("sizes")
        plot = Plot("terms of ∂L/∂x", "", "norm, as a share of ∂L/∂x", (bars("", range(3), sizes),), ticks=TERMS)
        return Picture("The three terms of the gradient: what flows through the statistics is not small.", (plot,))


def _six(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """The six formulas in the paper's letters; ∂x as the three terms of its sum."""
    m = len(x)
    mu, var = x.mean(0), x.var(0, unbiased=False)
    root = (var + EPS).sqrt()
    xhat = (x - mu) / root
    d_xhat = dy * weight
    d_var = (d_xhat * (x - mu)).sum(0) * -0.5 * root**-3
    d_mu = -(d_xhat / root).sum(0) + d_var * (-2 * (x - mu)).mean(0)
    terms = (d_xhat / root, d_var * 2 * (x - mu) / m, (d_mu / m).expand_as(x))
    return terms, (dy * xhat).sum(0), dy.sum(0)


def _compact(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """∂x = (g − mean(g) − x̂·mean(g·x̂))/√(σ² + ε) with g = γ·∂y."""
    root = (x.var(0, unbiased=False) + EPS).sqrt()
    xhat, g = (x - x.mean(0)) / root, dy * weight
    return (g - g.mean(0) - xhat * (g * xhat).mean(0)) / root


def _differences(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    found = []
    for k, tensor in enumerate(tensors):
        gradient = torch.empty_like(tensor)
        for i in range(tensor.numel()):
            nudge = torch.zeros_like(tensor)
            nudge.view(-1)[i] = STEP
            ends = [loss(*tensors[:k], tensor + sign * nudge, *tensors[k + 1 :]) for sign in (1, -1)]
            gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * STEP)
        found.append(gradient)
    return found


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


EXPERIMENT = Backward()
