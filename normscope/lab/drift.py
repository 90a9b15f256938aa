"""How steady the distributions within a network are while it trains, measured in two ways."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.lab.networks import Perceptrons

__all__ = ["Drift", "gradient_shift"]


class Drift:
    """How far the inputs of activations travel between two looks, on fixed images, in their own standard deviations.

    Of every unit: Wasserstein's distance of what it receives at two looks, over its standard deviation at the first.

    Args:
        network: Looked at in training mode; its running statistics stay.
        probe: Images for all seeds, (s, n, inputs).
    """

    def __init__(self, network: Perceptrons, probe: Tensor) -> None:
        self._network, self._probe = network, probe
        self._before: list[Tensor] = []
        self._found: list[Tensor] = []

    @torch.no_grad()
    def look(self, _: int = 0) -> None:
        """Once more."""
        self._network.train()
        with ns.pause_statistics(self._network):
            now = [received.sort(1).values for received in self._network.hidden(self._probe)]
        if self._before:
            pairs = zip(now, self._before, strict=True)
            moved = [(a - b).abs().mean(1) / b.std(1).clamp(min=1e-6) for a, b in pairs]
            self._found.append(torch.cat(moved, 1).mean(1))
        self._before = now

    def mean(self) -> list[float]:
        """Per seed, over units, layers and looks."""
        values: list[float] = torch.stack(self._found).mean(0).tolist()
        return values


def gradient_shift(network: Perceptrons, x: Tensor, y: Tensor, rate: float) -> Tensor:
    """‖g − g′‖/‖g‖ per seed, the mean over hidden layers but the first.

    g is a layer's gradient, g′ the same after the layers below it have taken their step and no other has.

    Args:
        network: In training mode; its running statistics stay.
        x: (s, n, inputs).
        y: (s, n).
        rate: Of the step.

    Source: Santurkar et al. 2018, definition 2.1.
    """
    weights = [block[0].weight for block in network.trunk]  # type: ignore[index]
    lower = [list(block.parameters()) for block in network.trunk]
    every = list(network.parameters())
    with ns.pause_statistics(network):
        before = dict(zip(every, _gradients(network, x, y, every), strict=True))
        shifts = []
        for k in range(1, len(weights)):
            below = [p for part in lower[:k] for p in part]
            kept = [p.detach().clone() for p in below]
            with torch.no_grad():
                for p in below:
                    p.sub_(rate * before[p])
            (after,) = _gradients(network, x, y, [weights[k]])
            with torch.no_grad():
                for p, old in zip(below, kept, strict=True):
                    p.copy_(old)
            own = before[weights[k]].flatten(1)
            shifts.append((after.flatten(1) - own).norm(dim=1) / own.norm(dim=1).clamp(min=1e-30))
    return torch.stack(shifts).mean(0)


def _gradients(network: Perceptrons, x: Tensor, y: Tensor, of: list[torch.nn.Parameter]) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(network(x).flatten(0, 1), y.flatten()) * len(x)
    return torch.autograd.grad(loss, of)
