"""Images as tensors for the training experiments, in three parts: to train, to choose by, and to report on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from normscope import data
from normscope.data.folder import folder_of

__all__ = ["Form", "Samples", "assuming", "available", "batches", "samples"]

Form = Literal["flat", "binary", "image", "half"]

# What stands in where the user's folder does not hold a set.
FALLBACK = "digits"


# The sets that count as present whatever the user's folder holds; None: the folder decides.
_ASSUMED: ContextVar[frozenset[str] | None] = ContextVar("assumed", default=None)


@contextmanager
def assuming(names: Iterable[str]) -> Iterator[None]:
    """Within this context these data sets and no others are available: those that stored runs were made with."""
    before = _ASSUMED.set(frozenset(names))
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def available(name: str, *parts: str, instead: str = FALLBACK) -> str:
    """The data set of this name, or the embedded digits where it is absent.

    Args:
        name: Of the set.
        parts: Folders of the user's that it consists of; by default the one of its name.
        instead: What stands in for it.
    """
    assumed = _ASSUMED.get()
    if assumed is not None:
        present = name in assumed
    elif name == "mnist":
        present = data.find_mnist() is not None
    else:
        present = all(folder_of(part) is not None for part in parts or (name,))
    return name if present else instead


@dataclass(frozen=True, eq=False)
class Samples:
    """Images and labels; (n, d) flat or (n, c, h, w), pixels 0 to 1.

    Attributes:
        valid_x: The last part of the source's training images, which is never trained on.
    """

    title: str
    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Samples:
        """The same with every batch of images changed."""
        return replace(self, train_x=f(self.train_x), valid_x=f(self.valid_x), test_x=f(self.test_x))

    @property
    def flat(self) -> Samples:
        """The same as rows of pixels."""
        return self.mapped(lambda x: x.flatten(1))

    @property
    def shape(self) -> torch.Size:
        """Of one image."""
        return self.train_x.shape[1:]


@lru_cache(maxsize=4)
def samples(name: str, form: Form, train: int = 10**9, test: int = 10**9) -> Samples:
    """A data set as tensors.

    Args:
        name: Of the data set.
        form: "flat"; "binary", flat and cut at one half; "image"; "half", averaged over 2×2 if large.
        train: How many images to train on at most, from the start.
        test: How many to report on at most.
    """
    found = data.load(name)
    x, y = _pixels(found.train_x, found.top, form), torch.tensor(found.train_y).long()
    kept = len(y) // 8
    test_x, test_y = _pixels(found.test_x[:test], found.top, form), torch.tensor(found.test_y[:test]).long()
    end = min(train, len(y) - kept)
    valid = slice(len(y) - kept, None)
    return Samples(found.title, x[:end], y[:end], x[valid], y[valid], test_x, test_y, found.classes)


def _pixels(x: object, top: int, form: Form) -> Tensor:
    pixels = torch.tensor(x).float() / top
    if form == "flat":
        return pixels.flatten(1)
    if form == "binary":
        return (pixels.flatten(1) > 0.5).float()
    images = pixels if pixels.dim() == 4 else pixels[:, None]
    if form == "half" and images.shape[-1] > 8:
        images = torch.nn.functional.avg_pool2d(images, 2)
    return images


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches: every epoch in a new order, the same for every arm of a seed."""
    order = torch.Generator().manual_seed(10_000 + seed)
    size = min(size, count)
    while True:
        epoch = torch.randperm(count, generator=order)
        yield from (epoch[k : k + size] for k in range(0, count - size + 1, size))
