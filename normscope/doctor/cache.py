"""The loader, read once: a bounded cache of whole batches, and the splits that diagnose, verify and confirm.

A batch stays whole, because which samples meet in it is part of what is measured. While the cache is full every second
batch is dropped and the step doubles, so that what is kept covers evenly what was read, however long the loader is.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normscope.errors import ArgumentError, DataError

__all__ = ["Batch", "Cache", "LoaderFacts", "Reader", "Splits", "few_of", "generators", "read", "regroup", "split"]

# 96 batches make three splits of 32, the depth at which null distributions are smooth; of small batches more are kept,
# because costs are measured by samples.
MOST_BATCHES = 96
MOST_SAMPLES = 3072
MOST_BYTES = 64 << 20
# An endless loader ends here; a finite one rarely is longer than this many batches per epoch.
MOST_READ = 4096
FEWEST = 6


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch as the loader yielded it.

    Attributes:
        index: Its place in the loader.
        data: Its structure with tensors of its own memory.
        size: The number of samples.
    """

    index: int
    data: Any
    size: int

    def fresh(self, device: torch.device | None = None) -> Any:
        """A copy: what a forward does to its input in place must not reach the next pass."""
        return own(self.data, device)

    @property
    def bytes(self) -> int:
        """The memory of its tensors."""
        return sum(t.nbytes for t in pytree.tree_leaves(self.data) if isinstance(t, Tensor))


@dataclass(frozen=True, slots=True)
class LoaderFacts:
    """What a loader tells about itself; None where it does not.

    Attributes:
        samples: Length of its data set.
        batch: Its batch size.
        drop_last: Whether it leaves out an incomplete last batch.
        read: Batches read.
        ended: Whether it ended by itself.
        last: Samples in the last batch read, if it ended.
    """

    samples: int | None = None
    batch: int | None = None
    drop_last: bool | None = None
    read: int = 0
    ended: bool = False
    last: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """What was kept of the loader."""

    batches: tuple[Batch, ...]
    facts: LoaderFacts
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """Disjoint sets of batches: A diagnoses, B verifies, C confirms."""

    a: tuple[Batch, ...]
    b: tuple[Batch, ...]
    c: tuple[Batch, ...]

    @property
    def samples(self) -> tuple[int, int, int]:
        """How many samples each has."""
        a, b, c = (sum(batch.size for batch in part) for part in (self.a, self.b, self.c))
        return a, b, c


def own(data: Any, device: torch.device | None = None) -> Any:
    """The same structure with tensors copied; other leaves are copied where they can be."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            copied = value.detach().clone()
            return copied if device is None else copied.to(device)
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        try:
            return copy.deepcopy(value)
        except Exception:
            return value

    return pytree.tree_map(leaf, data)


def size_of(data: Any) -> int:
    """The number of samples: the length of the first tensor that has one."""
    for leaf in pytree.tree_leaves(data):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    with contextlib.suppress(TypeError):
        return len(data)
    return 1


@dataclass(slots=True)
class Reader:
    """What was kept of the batches that passed by so far: bounded, and evenly spread over all of them."""

    kept: list[Batch] = field(default_factory=list)
    bytes: int = 0
    samples: int = 0
    step: int = 1
    read: int = 0
    odd: int = 0
    shape: Any = None
    last: int = 0

    def take(self, data: Any) -> None:
        """Keep a batch, or not."""
        shape = pytree.tree_structure(data)
        self.shape = self.shape or shape
        self.last = size_of(data)
        if shape != self.shape:
            self.odd += 1
        elif self.read % self.step == 0:
            self._keep(Batch(self.read, own(data), self.last))
        self.read += 1

    def _keep(self, batch: Batch) -> None:
        self.kept.append(batch)
        self.bytes, self.samples = self.bytes + batch.bytes, self.samples + batch.size
        full = len(self.kept) > MOST_BATCHES and self.samples > MOST_SAMPLES
        if full or (len(self.kept) > FEWEST and self.bytes > MOST_BYTES):
            self.kept, self.step = self.kept[::2], self.step * 2
            self.bytes, self.samples = (sum(getattr(b, name) for b in self.kept) for name in ("bytes", "size"))


def read(loader: Iterable[Any], seconds: float) -> Cache:
    """Read a loader once, as long as time allows.

    Args:
        loader: Any iterable of batches.
        seconds: When to stop, at least six batches provided.

    Raises:
        ArgumentError: The loader is no iterable of batches.
        DataError: It is empty, or raises before the first batch.
    """
    _check(loader)
    reader, ended, notes = Reader(), True, []
    deadline = time.monotonic() + seconds
    try:
        for data in loader:
            reader.take(data)
            late = time.monotonic() > deadline and len(reader.kept) >= FEWEST
            if late or reader.read >= MOST_READ:
                ended = False
                break
    except Exception as error:
        if not reader.kept:
            raise DataError(
                f"the loader raised {type(error).__name__} before it yielded a batch: {error}",
                cure="iterate over it once by hand: it has to run without a model",
            ) from error
        ended = False
        notes.append(f"the loader raised {type(error).__name__} after {reader.read} batches: {error}; these were used")
    if not reader.kept:
        raise DataError("the loader is empty", cure="pass one that yields batches; a generator can be read only once")
    if reader.odd:
        notes.append(f"{reader.odd} of {reader.read} batches have another structure than the first and were left out")
    if not ended and not any("raised" in note for note in notes):
        notes.append(f"{reader.read} batches were read; the loader has more")
    if reader.step > 1:
        notes.append(f"{len(reader.kept)} of {reader.read} batches were kept, evenly spread")
    return Cache(tuple(reader.kept), _facts(loader, reader, ended), tuple(notes))


def _check(loader: Any) -> None:
    if isinstance(loader, (Tensor, Mapping, str)) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise ArgumentError(
            f"the loader must be an iterable of batches, but it is a {type(loader).__name__}",
            cure="pass a DataLoader, a generator or a list of batches: one batch alone is [batch]",
        )


def _facts(loader: Any, reader: Reader, ended: bool) -> LoaderFacts:
    samples = None
    with contextlib.suppress(Exception):
        samples = len(loader.dataset)
    batch, drop = getattr(loader, "batch_size", None), getattr(loader, "drop_last", None)
    return LoaderFacts(
        samples=samples,
        batch=batch if isinstance(batch, int) else None,
        drop_last=drop if isinstance(drop, bool) else None,
        read=reader.read,
        ended=ended,
        last=reader.last if ended else None,
    )


def split(batches: tuple[Batch, ...], seed: int) -> Splits:
    """Deal batches out to A, B and C: one of every three neighbours each, in random order.

    Neighbours, so that a loader in some order gives all three the same mixture; random, so that no period of the loader
    falls in step with the deal.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[Batch], list[Batch], list[Batch]] = ([], [], [])
    for start in range(0, len(batches), 3):
        group = batches[start : start + 3]
        order = rng.permutation(3) if len(group) == 3 else np.arange(3)
        for place, batch in zip(order, group, strict=False):
            parts[place].append(batch)
    return Splits(*(tuple(part) for part in parts))


def thin(batches: tuple[Batch, ...], count: int) -> tuple[Batch, ...]:
    """That many of the batches, evenly spread."""
    if count >= len(batches):
        return batches
    places = np.unique(np.linspace(0, len(batches) - 1, max(1, count)).round().astype(int))
    return tuple(batches[k] for k in places)


def regroup(data: Any, size: int, order: list[int]) -> Any:
    """A batch of chosen samples of a batch: every tensor whose first axis counts samples is indexed."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size:
            return value[torch.tensor(order, device=value.device)]
        return value

    return pytree.tree_map(leaf, data)


def few_of(batch: Batch, most: int = 8) -> Batch:
    """The first samples of a batch, for questions that need no more."""
    if batch.size <= most:
        return batch
    return Batch(batch.index, regroup(batch.data, batch.size, list(range(most))), most)


@contextlib.contextmanager
def generators(loader: Any) -> Iterator[None]:
    """Bring back the random generators that a DataLoader and its sampler draw from."""
    found = [getattr(holder, "generator", None) for holder in (loader, getattr(loader, "sampler", None))]
    states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
