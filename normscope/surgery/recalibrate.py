"""`recalibrate`: running statistics measured again from data, in one pass."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import Module

from normscope.errors import ArgumentError, DataError, SynchronizationError
from normscope.functional.core import view_of
from normscope.nn import DecorrelatedBatchNorm, FrozenBatchNorm, IterNorm, Norm, RecurrentBatchNorm
from normscope.nn.base import Layer
from normscope.nn.collective import Exchange, Grouped
from normscope.scope import SCOPES
from normscope.surgery.find import Found, Select, find
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.freeze import is_frozen
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.ranks import agree, in_step, ranks_of, tell

__all__ = ["Estimator", "Meter", "OneValueError", "Sums", "measurable", "recalibrate"]

Estimator = Literal["population", "mean"]
Batch = TypeVar("Batch")


def recalibrate(
    model: Module,
    loader: Iterable[Any],
    batches: int | None = 200,
    estimator: Estimator = "population",
    *,
    select: Select = None,
    copy: bool = False,
    forward: Forward | None = None,
    progress: bool | None = None,
    group: Any = None,
) -> Surgery:
    """Measure the running statistics of a model again, from data.

    Every normalizer with running statistics normalizes by the batch, as in training, while its input is measured, so
    that one pass gives all layers the inputs that they will have. Everything else is in evaluation mode: dropout
    changes the variance of what follows it, and is off when the statistics will be used (Li et al. 2019).

    With m values of a channel in all, and batches b of m_b values with mean μ_b and biased variance σ²_b:

        "population":  μ = Σ m_b μ_b / m,   σ² = (Σ m_b σ²_b + Σ m_b (μ_b − μ)²) / (m − 1)
        "mean":        μ = mean of μ_b,     σ² = mean of σ²_b · m_b/(m_b − 1)

    "population" is the moments of all values together, whatever the batches (merged after Chan et al. in float64).
    "mean" is where an exponential average ends up; it lacks the variance between batches. `InstanceNorm` has one b per
    channel of a sample. Masks given to a layer count.

    Left alone: momentum; frozen layers (`freeze`, or in evaluation mode by themselves while the model trains), which
    keep normalizing by what they have; layers without running statistics; layers that the data never reach.
    `num_batches_tracked` becomes the number of batches that a layer has seen, so that momentum=None goes on with a mean
    in which all batches, these included, weigh the same.

    Where `torch.distributed` runs, every rank reads its own share of the data, however much that is, and all end with
    the same statistics, those of all ranks' values together: the sums above run over all ranks' batches, and no rank's
    average is averaged. Synchronized layers normalize over all ranks while every rank has a batch left, and then each
    by its own; torch's own SyncBatchNorm cannot do that and needs as many batches on every rank.

    Args:
        model: The model; its mode does not matter otherwise.
        loader: Any iterable of batches, endless ones too. A batch is a tensor, a tuple whose first element is the
            input, or a dictionary with the names of the model's arguments.
        batches: How many to read at most; None for all.
        estimator: "population" or "mean".
        select: Which layers; the others keep normalizing by what they have. See `freeze`.
        copy: Recalibrate a deep copy.
        forward: `forward(model, batch)` in place of `model(batch)`, for other structures.
        progress: Show a progress bar on stderr; None for only if that is a terminal.
        group: The process group whose ranks measure together and must all call this; None for all ranks, "own" for
            this rank alone.

    Returns:
        A report. Nothing but the statistics has changed, random generators included. A batch with one value per channel
        cannot be normalized; it is left out, which a note says.

    Raises:
        ArgumentError: An option is out of range, or batches have an unknown structure.
        DataError: The loader is empty (on every rank), no batch could be used, or a layer received NaN or infinity. As
            after any error of model or loader, the model is as it was.
        SynchronizationError: Another rank failed, or does not come.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", §3; Chan, Golub & LeVeque 1983 (merging).

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.BatchNorm1d(1)
        >>> report = ns.recalibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])])
        >>> model.running_mean, model.running_var.round(decimals=4)
        (tensor([3.]), tensor([4.6667]))
    """
    if batches is not None and batches < 1:
        raise ArgumentError(f"batches must be at least 1, but got {batches}", cure="None reads the whole loader")
    if estimator not in get_args(Estimator):
        raise ArgumentError(f"estimator {estimator!r} is unknown", cure=f"use one of {', '.join(get_args(Estimator))}")
    if isinstance(loader, Tensor):
        raise ArgumentError("a tensor is one batch, not a loader", shape=tuple(loader.shape), cure="pass [tensor]")

    def edit(draft: Draft) -> None:
        meters = [Meter(found) for found in measurable(draft, select)]
        if not meters:
            return
        ranks = ranks_of(group)
        read, left_out = _measure(draft.model, meters, _shown(loader, batches, progress), forward, ranks)
        draft.before.restore()
        _check(read, left_out)
        for meter in meters:
            if meter.calls:
                meter.write(estimator)
                draft.change(meter.found.name)
            else:
                draft.skip(meter.found.name, "never reached by these batches; it keeps its statistics")
        together = "" if ranks is None else f" of {ranks.size} ranks"
        draft.notes.append(f"{read - left_out} batches{together}, estimator {estimator!r}")
        if left_out:
            draft.notes.append(f"{left_out} batches left out: one value per channel cannot be normalized")

    return operate("recalibrate", model, edit, copy=copy)


def measurable(draft: Draft, select: Select) -> Iterator[Found]:
    """The layers whose running statistics may be measured; the draft notes why others may not."""
    for found in find(draft.model, select):
        reason = _unfit(found, by_hand=select is None and draft.model.training and not found.module.training)
        if reason is None:
            yield found
        elif reason:
            draft.skip(found.name, reason)


def _unfit(found: Found, *, by_hand: bool) -> str | None:
    """Why a layer keeps its statistics; empty where there is nothing to say."""
    if found.kind == "custom":
        known = "keeps running statistics in a way unknown here" if found.running else ""
        return known and f"{type(found.module).__name__} {known}"
    if not found.running:
        return "keeps no running statistics" if found.kind in ("BatchNorm", "InstanceNorm") else ""
    if any(torch.nn.parameter.is_lazy(b) for b in found.module.buffers(recurse=False)):
        return "lazy and not yet initialized: run one forward first"
    if is_frozen(found.module) or isinstance(found.module, FrozenBatchNorm):
        return "frozen"
    if isinstance(found.module, IterNorm | DecorrelatedBatchNorm):
        return "keeps a running whitening matrix, which forwards in training move and this does not measure"
    if isinstance(found.module, RecurrentBatchNorm):
        return "keeps statistics per time step, which only its own recurrence can measure"
    return "in evaluation mode while the model trains, taken for frozen; name it in select= if not" if by_hand else None


def _measure(
    model: Module, meters: list[Meter], loader: Iterable[Any], forward: Forward | None, ranks: Exchange | None
) -> tuple[int, int]:
    """Feed the loader to the model and every meter; returns how many batches were read and left out, on all ranks."""
    model.eval()
    for meter in meters:
        # Not train(): what a normalizer has inside, as the dropout of some libraries, stays in evaluation.
        meter.found.module.training = True
        meter.found.module.register_forward_pre_hook(meter.see, with_kwargs=True)
    if ranks is None:
        return _feed_all(model, meters, loader, forward)
    together = any(isinstance(module, Grouped) for module in model.modules())
    try:
        with contextlib.closing(in_step(loader, ranks if together else None)) as stepped:
            counts = _feed_all(model, meters, stepped, forward)
    except Exception:
        with contextlib.suppress(SynchronizationError):  # the others are at a layer; what happened here says more
            agree(ranks, failed=True)
        raise
    agree(ranks)
    for meter in meters:
        meter.gather(ranks)
    read, left_out = tell(ranks, counts).sum(0).tolist()
    return int(read), int(left_out)


def _feed_all(model: Module, meters: list[Meter], loader: Iterable[Any], forward: Forward | None) -> tuple[int, int]:
    read = left_out = 0
    with quiet():
        for batch in loader:
            read += 1
            try:
                feed(model, batch, forward)
            except OneValueError:
                left_out += 1
                for meter in meters:
                    meter.pending.clear()
            for meter in meters:
                meter.commit(read)
    return read, left_out


def _check(read: int, left_out: int) -> None:
    if read == 0:
        raise DataError(
            "the loader is empty",
            cure="pass one that yields batches; a generator can be read only once, so make it again",
        )
    if read == left_out:
        raise DataError(
            "every batch has one value per channel, which cannot be normalized",
            cure="use batches of two samples or more",
        )


class OneValueError(Exception):
    """The batch being fed cannot be normalized by its own statistics."""


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sums:
    """What several sets of values of every channel amount to; float64, of the buffers' shape.

    Attributes:
        count: m.
        mean: μ.
        square: Σ (x − μ)²; Σ x² where the layer does not centre.
        means: Σ of the sets' means.
        means_of: How many there are.
        vars: Σ of the sets' unbiased variances.
        vars_of: How many there are.
    """

    count: Tensor
    mean: Tensor
    square: Tensor
    means: Tensor
    means_of: Tensor
    vars: Tensor
    vars_of: Tensor

    def merge(self, other: Sums) -> Sums:
        """Both together, by Chan's formula: no difference of large sums is ever taken."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        step = other.mean - self.mean
        return Sums(
            count,
            self.mean + step * share,
            self.square + other.square + step.square() * self.count * share,
            self.means + other.means,
            self.means_of + other.means_of,
            self.vars + other.vars,
            self.vars_of + other.vars_of,
        )


class Meter:
    """Watches the input of one layer.

    Attributes:
        found: The layer.
        pending: The calls within the batch being fed; they count when that has gone through.
        calls: How many calls counted.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.pending: list[Sums] = []
        self.calls = 0
        self._total: Sums | None = None

    def see(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:  # else the layer itself will say what is wrong
            mask = kwargs.get("mask", args[2] if len(args) > 2 else None) if isinstance(module, Layer) else None
            self.pending.append(_sums(self.found, x, mask))

    def commit(self, batch: int) -> None:
        """Count the pending calls.

        Raises:
            DataError: One of them held NaN or infinity.
        """
        for sums in self.pending:
            if not (sums.mean.isfinite().all() and sums.square.isfinite().all()):
                raise DataError(
                    f"batch {batch} brings NaN or infinity to a normalizer, whose statistics it would destroy",
                    layer=self.found.name or "(the model itself)",
                    cure="remove such samples, or look for an overflow before this layer (half precision?)",
                )
            self._total = sums if self._total is None else self._total.merge(sums)
            self.calls += 1
        self.pending.clear()

    def gather(self, ranks: Exchange) -> None:
        """Take in what the other ranks have counted, merged in the order of the ranks: all get the same bits."""
        shape = self.found.module.get_buffer("running_mean").shape
        own = self._total or Sums(*(torch.zeros(shape, dtype=torch.float64) for _ in fields(Sums)))
        parts = [getattr(own, field.name).cpu().reshape(-1) for field in fields(Sums)]
        rows = tell(ranks, torch.cat([torch.tensor([self.calls], dtype=torch.float64), *parts]))
        totals = [Sums(*(t.reshape(shape) for t in row[1:].chunk(len(parts)))) for row in rows]
        self.calls = int(rows[:, 0].sum())
        self._total = functools.reduce(Sums.merge, totals) if self.calls else None

    def mix(self, share: float, source: tuple[Tensor, Tensor]) -> None:
        """Write a mixture of given statistics, weighing `share`, and those of all calls, the pending included."""
        total = functools.reduce(Sums.merge, self.pending if self._total is None else [self._total, *self.pending])
        for (name, new, where), old in zip(self._population(total), source, strict=True):
            buffer = self.found.module.get_buffer(name)
            mixed = torch.lerp(new.to(buffer.device), old.to(buffer.device, new.dtype), share)
            buffer.copy_(torch.where(where.to(buffer.device), mixed, old.to(mixed)))

    def _population(self, total: Sums) -> tuple[tuple[str, Tensor, Tensor], ...]:
        """What "population" writes: name, values, and for which channels they are known."""
        freedom = total.count - 1 if _centers(self.found.module) else total.count
        return (
            ("running_mean", total.mean, total.count >= 1),
            ("running_var", total.square / freedom.clamp(min=1), freedom >= 1),
        )

    def write(self, estimator: Estimator) -> None:
        """Write the layer's buffers; channels of which a mask has left nothing keep what they have."""
        total, module = self._total, self.found.module
        if total is None:
            return
        averages = (
            ("running_mean", total.means / total.means_of.clamp(min=1), total.means_of >= 1),
            ("running_var", total.vars / total.vars_of.clamp(min=1), total.vars_of >= 1),
        )
        for name, value, where in self._population(total) if estimator == "population" else averages:
            buffer = module.get_buffer(name)
            value, where = value.to(buffer.device), where.to(buffer.device)
            buffer.copy_(torch.where(where, value, buffer.to(value)))
        if getattr(module, "num_batches_tracked", None) is not None:
            module.get_buffer("num_batches_tracked").fill_(self.calls)


def _centers(module: Module) -> bool:
    return module.center if isinstance(module, Norm) else True


def _sums(found: Found, x: Tensor, mask: Tensor | None) -> Sums:
    """The moments of one call.

    Raises:
        OneValueError: The call has one value per set, and the layer centres.
    """
    module = found.module
    params, sizes = "c", {}
    if isinstance(module, Norm):
        pattern, params, sizes = module.scope, module.params, module.sizes
    else:
        pattern = SCOPES["InstanceNorm" if found.kind == "InstanceNorm" else "BatchNorm"].pattern
    if found.kind == "InstanceNorm" and x.dim() == module._get_no_batch_dim():  # type: ignore[operator]
        x, mask = x.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
    # MPS has no float64.
    wide = (x.cpu() if x.device.type == "mps" else x).detach().to(torch.float64)
    view = view_of(wide, pattern, sizes, params)
    if view.cells == 1 and _centers(module):
        raise OneValueError
    inside = view.scope.inside
    channel = view.scope.axis_of("c")
    keep = view.mask(mask, None if channel is None else (channel,))
    parts = view.unfold(wide)
    kept = None if keep is None else keep.to(wide.device).expand(view.sizes)
    if kept is not None:
        parts = torch.where(kept, parts, 0)

    # First the moments of every set …
    count = torch.full_like(parts.sum(inside, keepdim=True), view.cells)
    if kept is not None:
        count = kept.sum(inside, keepdim=True).to(parts)
    mean = parts.sum(inside, keepdim=True) / count.clamp(min=1) if _centers(module) else torch.zeros_like(count)
    away = parts - mean if kept is None else torch.where(kept, parts - mean, 0)
    square = away.square().sum(inside, keepdim=True)
    freedom = count - 1 if _centers(module) else count
    var = square / freedom.clamp(min=1)

    # … then of the sets that share an entry of the buffers.
    apart = [k for k, part in enumerate(view.scope.parts) if not part.averaged and part.axis not in view.params]

    def total(t: Tensor) -> Tensor:
        return t.sum(apart, keepdim=True) if apart else t

    all_count = total(count)
    all_mean = total(count * mean) / all_count.clamp(min=1)
    all_square = total(square + count * (mean - all_mean).square())
    # One call is one step of an exponential average, which first averages the sets of the call.
    known, known_var = (count >= 1).to(count), (freedom >= 1).to(count)
    means_of, vars_of = total(known), total(known_var)
    means, vars_ = total(mean * known) / means_of.clamp(min=1), total(var * known_var) / vars_of.clamp(min=1)
    stepped = (means, means_of.clamp(max=1), vars_, vars_of.clamp(max=1))
    return Sums(*(view.fold_param(t) for t in (all_count, all_mean, all_square, *stepped)))


# --- progress -----------------------------------------------------------------------------------------------------


def _shown(loader: Iterable[Batch], batches: int | None, progress: bool | None) -> Iterator[Batch]:
    """The first batches, with a progress bar; no batch is read beyond them."""
    read = itertools.islice(loader, batches)
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from read
        return
    # Here, because `import normscope` should not pay for it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=progress is None) as bar:
        yield from bar.track(read, total=_length(loader, batches), description="recalibrate")


def _length(loader: object, batches: int | None) -> int | None:
    length = None
    with contextlib.suppress(TypeError, NotImplementedError, AttributeError):
        length = len(loader)  # type: ignore[arg-type]
    return batches if length is None else length if batches is None else min(length, batches)
