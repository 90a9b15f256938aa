"""A full-size training as data: network, pictures, loss, scores and schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Draw", "Items", "Job", "Schedule"]


@dataclass(frozen=True, slots=True)
class Draw:
    """Which item, and the seed of whatever is random about it."""

    index: int
    seed: int

    def generator(self) -> torch.Generator:
        """For crops, flips and noise."""
        return torch.Generator().manual_seed(self.seed)


class Items(Protocol):
    """What a network learns from: `items[draw]` is a pair of tensors, the same in every process and every time."""

    classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, at which rate, in which batches.

    Attributes:
        steps: Of the optimizer.
        batch: Per process.
        rate: At the beginning.
        optimizer: "sgd" with momentum 0.9, "adam" or "rmsprop".
        decay: Weight decay; normalizers and biases are spared.
        falls: Steps, as shares of the whole, at which the rate falls to `factor` of what it was; with none of them it
            falls by that factor over the whole training, exponentially.
        factor: See `falls`.
        clip: The largest norm of the whole gradient.
    """

    steps: int
    batch: int
    rate: float
    optimizer: str = "sgd"
    decay: float = 0.0
    falls: tuple[float, ...] = ()
    factor: float = 1.0
    clip: float = float("inf")

    def rate_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        share = step / self.steps
        falls = float(sum(share >= fall for fall in self.falls)) if self.falls else share
        return self.rate * math.pow(self.factor, falls)


@dataclass(frozen=True)
class Job:
    """One arm of a recipe.

    Attributes:
        network: From the number of classes and the edge.
        training: Items to train on, from the folder and the edge of a picture in pixels.
        testing: Items to report on.
        loss: Of the network's output and the second of the pair, in training.
        scores: Name → a number per item, from the output in evaluation and the second of the pair.
        edge: Of a picture, in pixels.
        size: Items that evaluation takes at once, per process.
    """

    network: Callable[[int, int], nn.Module]
    training: Callable[[Path, int], Items]
    testing: Callable[[Path, int], Items]
    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], Mapping[str, Tensor]]
    schedule: Schedule
    edge: int
    size: int = field(default=64)

    def fingerprint(self, *rest: object) -> str:
        """Of everything that a checkpoint must agree with, this job and what is given besides."""
        said = (self.edge, dataclasses.astuple(self.schedule), *rest)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]
