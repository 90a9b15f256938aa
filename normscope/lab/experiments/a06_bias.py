"""A06: the bias in front of Batch Normalization."""

from __future__ import annotations

import torch
from torch import nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.verdicts import identity, tiny
from normscope.records import Judgement

__all__ = ["EXPERIMENT", "Bias"]


class Bias(Exact):
    """A linear layer with bias in front of BatchNorm1d, float64."""

    registration = register(
        "A06",
        statement="A bias in front of Batch Normalization does nothing: the mean takes it away.",
        source="Ioffe & Szegedy 2015, §3.2",
        confirms="in training the output does not depend on it and its gradient is 0",
        refutes="it does, or is not",
        thresholds={"gradient": 1e-6, "output": 1e-10, "stale": 1e-2},
        design="Random data, weights, γ, β and upstream gradient; the bias set to 0, 1 and −7. As a counter-example, "
        "inference with running statistics from before a change of the bias.",
    )

    def measure(self, task: Task) -> Numbers:
        """How much the bias moves, in training and in inference."""
        x, dy = torch.randn(32, 7, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
        linear = nn.Linear(7, 5, dtype=torch.float64)
        norm = ns.nn.BatchNorm1d(5, dtype=torch.float64)
        outputs, shares = [], []
        for value in (0.0, 1.0, -7.0):
            nn.init.constant_(linear.bias, value)
            y = norm(linear(x))
            of_weight, of_bias = torch.autograd.grad(y, (linear.weight, linear.bias), dy)
            outputs.append(y.detach())
            shares.append(float(of_bias.norm() / of_weight.norm()))
        norm.eval()
        before = norm(linear(x)).detach()
        nn.init.constant_(linear.bias, 1.0)
        return {
            "gradient": max(shares),
            "output": max(float((y - outputs[0]).abs().max()) for y in outputs),
            "stale": float((norm(linear(x)) - before).abs().max().detach()),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Nothing in training; something with stale statistics."""
        run = self.first(results)
        gradient, output, stale = (run.number(name) for name in ("gradient", "output", "stale"))
        holds = gradient < self.threshold("gradient") and output < self.threshold("output")
        outcome = (
            f"‖∂L/∂b‖ is {tiny(gradient)} of ‖∂L/∂W‖, and the output moves by {tiny(output)}. A bias changed after "
            f"training, "
            f"with the old running mean, moves the inference output by {stale:.1f}."
        )
        return (
            identity(self.registration.claims, "is it redundant?", holds and stale > self.threshold("stale"), outcome),
        )

    def figure(self, results: Results) -> None:
        """Three numbers need no figure."""


EXPERIMENT = Bias()
