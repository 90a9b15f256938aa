"""The model under examination: how it is fed, put into a state, watched and scored. It is always brought back."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from normscope.doctor.cache import Batch
from normscope.doctor.measurements import Array, Moments, Outcome
from normscope.doctor.progress import Progress
from normscope.errors import ArgumentError
from normscope.records import PassCost
from normscope.surgery import feed, find, quiet, switch
from normscope.surgery.find import Found

__all__ = ["Patient", "Statistics", "Watch"]

# Channels of which sample-level means are kept: enough for a median, and little memory in wide models.
KEPT_CHANNELS = 64
# Fewer samples or channels say nothing about who has most of the variance.
FEW_SAMPLES, FEW_CHANNELS = 8, 4

Statistics = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Patient:
    """A model with the user's callables.

    Attributes:
        model: The model.
        forward: `forward(model, batch)`.
        loss: `loss(output, batch)`, one number per sample.
        metric: The same, higher is better, or one number per batch.
        device: Where batches go.
        passes: What has been run, for the report.
        progress: Whom to tell how far this is.
        problem: The last error on a batch that was left out.
        inferred: What was guessed about loss and metric, "" for nothing.
    """

    model: Module
    forward: Callable[[Module, Any], Any] | None
    loss: Callable[[Any, Any], Any] | None
    metric: Callable[[Any, Any], Any] | None
    device: torch.device | None = None
    passes: list[PassCost] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    inferred: str = ""
    problem: str = ""

    def run(self, batch: Batch) -> tuple[Any, Any]:
        """The output on a batch, and the batch as the user's loss may see it."""
        data = batch.fresh(self.device)
        return feed(self.model, data, self.forward), data

    @property
    def layers(self) -> tuple[Found, ...]:
        """The normalizers."""
        return find(self.model)

    @property
    def trackers(self) -> tuple[Found, ...]:
        """Those with running statistics over channels on axis 1, which can be watched and recalibrated."""
        return tuple(f for f in self.layers if _watchable(f))

    # --- states ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, whatever the model's own `train` makes of it."""
        switch(self.model)
        with quiet():
            yield

    @contextlib.contextmanager
    def on_batches(self, only: Collection[str] | None = None) -> Iterator[None]:
        """Normalizers on batch statistics, everything else, dropout above all, in evaluation mode."""
        with self.keeping(), self.evaluating():
            changed: list[tuple[Any, bool, Any]] = []
            try:
                for found in self.trackers:
                    if only is None or found.name in only:
                        module: Any = found.module
                        changed.append((module, module.training, getattr(module, "momentum", None)))
                        module.training = True
                        if hasattr(module, "momentum"):
                            module.momentum = 0.0
                yield
            finally:
                for module, training, momentum in changed:
                    module.training = training
                    if hasattr(module, "momentum"):
                        module.momentum = momentum

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Bring back the statistics afterwards."""
        kept = [(b, b.detach().clone()) for f in self.trackers for b in f.module.buffers(recurse=False)]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)

    @contextlib.contextmanager
    def with_statistics(self, statistics: Statistics, only: Collection[str] | None = None) -> Iterator[None]:
        """Evaluation mode with other running statistics."""
        with self.keeping(), self.evaluating():
            for found in self.trackers:
                if found.name in statistics and (only is None or found.name in only):
                    mean, var = statistics[found.name]
                    found.module.get_buffer("running_mean").copy_(mean.view_as(found.module.get_buffer("running_mean")))
                    found.module.get_buffer("running_var").copy_(var.view_as(found.module.get_buffer("running_var")))
            yield

    # --- passes ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def noting(self, name: str, batches: Sequence[Batch]) -> Iterator[None]:
        """Note a pass for the report."""
        self.progress.begin(name)
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self.passes.append(PassCost(name, len(batches), sum(batch.size for batch in batches), spent))

    def measure(
        self, name: str, batches: Sequence[Batch], *, samples: bool = False, unfit: list[Batch] | None = None
    ) -> dict[str, Moments]:
        """The inputs of all trackers over these batches, in the state that the caller has put the model into.

        Args:
            name: Of the pass.
            batches: Over which.
            samples: Keep the means of every sample, too.
            unfit: Takes the batches on which the model fails; without it that raises.
        """
        with self.noting(name, batches), Watch(self.trackers, samples) as watch:
            for batch in batches:
                if self._runs(batch, unfit) is None:
                    watch.pending.clear()
                watch.commit(batch.size)
                self.progress.step()
        return watch.moments()

    def score(self, name: str, batches: Sequence[Batch], *, unfit: list[Batch] | None = None) -> Outcome:
        """Loss and metric over these batches, in the state that the caller has put the model into."""
        sheet = ScoreSheet(self.loss, self.metric)
        with self.noting(name, batches):
            for batch in batches:
                result = self._runs(batch, unfit)
                if result is not None:
                    sheet.add(*result, batch.size)
                self.progress.step()
        return sheet.outcome()

    def _runs(self, batch: Batch, unfit: list[Batch] | None) -> tuple[Any, Any] | None:
        try:
            return self.run(batch)
        except Exception as error:
            if unfit is None:
                raise
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
            unfit.append(batch)
            return None


def _watchable(found: Found) -> bool:
    if not found.running or isinstance(found.module, torch.jit.ScriptModule):
        return False
    buffers = [found.module._buffers.get(name) for name in ("running_mean", "running_var")]
    return all(buffer is not None and not is_lazy(buffer) for buffer in buffers)


class ScoreSheet:
    """Losses and metrics as the user's functions give them.

    Raises:
        ArgumentError: A function returns something else than numbers.
    """

    def __init__(self, loss: Callable[[Any, Any], Any] | None, metric: Callable[[Any, Any], Any] | None) -> None:
        self.functions = {"loss": loss, "metric": metric}
        self.values: dict[str, list[Array]] = {"loss": [], "metric": []}
        self.samples = 0
        self.outputs = self.infinite = 0

    def add(self, output: Any, data: Any, size: int) -> None:
        """Score one batch."""
        self.samples += size
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.outputs += leaf.numel()
                self.infinite += int((~torch.isfinite(leaf)).sum())
        for name, function in self.functions.items():
            if function is not None:
                self.values[name].append(_numbers(name, _call(name, function, output, data), size))

    def outcome(self) -> Outcome:
        """All of it; where one batch gave a single number, every batch counts once."""
        joined = {name: _joined(values, self.samples) for name, values in self.values.items()}
        return Outcome(joined["loss"], joined["metric"], self.samples, self.infinite / max(1, self.outputs))


def _call(name: str, function: Callable[[Any, Any], Any], output: Any, data: Any) -> Any:
    try:
        return function(output, data)
    except Exception as error:
        raise ArgumentError(
            f"{name}(output, batch) raised {type(error).__name__}: {error}",
            cure="it gets the model's output and the whole batch as the loader yields it",
        ) from error


def _numbers(name: str, value: Any, size: int) -> Array:
    try:
        numbers = torch.as_tensor(value).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"{name}(output, batch) returned a {type(value).__name__}, not numbers: {error}",
            cure="return a tensor with one number per sample, e.g. cross_entropy(…, reduction='none')",
        ) from error
    if numbers.dim() > 1 and numbers.shape[0] == size:
        numbers = numbers.flatten(1).mean(dim=1)
    return np.asarray(numbers.reshape(-1).numpy() if numbers.numel() == size else numbers.mean().reshape(1).numpy())


def _joined(values: list[Array], samples: int) -> Array | None:
    if not values:
        return None
    if sum(map(len, values)) == samples:
        return np.concatenate(values)
    return np.array([v.mean() for v in values])


@dataclass(slots=True)
class _Call:
    """The moments of one call: by sample and channel."""

    mean: Tensor
    var: Tensor
    count: int
    dtype: str
    low: Tensor | None = None
    high: Tensor | None = None


@dataclass(slots=True)
class _Notes:
    """What was noted about one normalizer, batch by batch."""

    batches: list[tuple[float, Array, Array]] = field(default_factory=list)
    sites: dict[int, list[tuple[float, Array, Array]]] = field(default_factory=dict)
    samples: list[Array] = field(default_factory=list)
    infinite: int = 0
    dtype: str = "float32"
    low: Array | None = None
    high: Array | None = None
    dominated: float = 0.0
    culprit: str = ""

    def moments(self) -> Moments:
        samples = self.samples
        return dataclasses.replace(
            _moments(self.batches),
            samples=np.concatenate(samples).astype(np.float64) if samples else None,
            groups=np.repeat(np.arange(len(samples)), [len(s) for s in samples]) if samples else None,
            infinite=self.infinite,
            low=self.low,
            high=self.high,
            dtype=self.dtype,
            sites=tuple(_moments(rows) for _, rows in sorted(self.sites.items())) if len(self.sites) > 1 else (),
            dominated=self.dominated,
            culprit=self.culprit,
        )


def _moments(rows: list[tuple[float, Array, Array]]) -> Moments:
    return Moments(
        sizes=np.array([row[0] for row in rows]),
        means=np.stack([row[1] for row in rows]),
        vars=np.stack([row[2] for row in rows]),
    )


class Watch:
    """Notes the moments of what enters normalizers; nothing of the activations is kept."""

    def __init__(self, layers: Sequence[Found], samples: bool) -> None:
        self.layers = layers
        self.keep_samples = samples
        self.pending: dict[str, list[_Call]] = {}
        self.notes: dict[str, _Notes] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for found in self.layers:
            self._handles.append(found.module.register_forward_pre_hook(self._hook(found), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, found: Found) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        channels = found.module.get_buffer("running_mean").numel()

        def see(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is None or x.dim() < 2 or x.shape[1] != channels or x.numel() == 0:
                return
            dtype = str(x.dtype).removeprefix("torch.")
            x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
            flat = x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)
            if x.dim() == 2:
                mean, var = x, torch.zeros_like(x)
            else:
                var, mean = torch.var_mean(flat, dim=2, correction=0)
            call = _Call(mean.double(), var.double(), flat.shape[2], dtype)
            if self.keep_samples:
                call.low, call.high = (v.amin(0) for v in (flat.amin(2), -flat.amax(2)))
            self.pending.setdefault(found.name, []).append(call)

        return see

    def commit(self, size: int) -> None:
        """Close a batch of this many samples: all calls of a layer in it count as one."""
        for found in self.layers:
            calls = self.pending.pop(found.name, [])
            if not calls:
                continue
            notes = self.notes.setdefault(found.name, _Notes())
            notes.dtype = calls[0].dtype
            # One bad value makes its mean bad: no need to look at every value again.
            notes.infinite += sum(int((~torch.isfinite(call.mean)).sum()) for call in calls)
            instances = found.kind == "InstanceNorm"
            notes.batches.append(_row(calls, instances))
            if len(calls) > 1:
                for k, call in enumerate(calls):
                    notes.sites.setdefault(k, []).append(_row([call], instances))
            if self.keep_samples:
                notes.samples.append(_by_sample(calls[0].mean, size).float().cpu().numpy())
                _note_range(notes, calls)
                if not instances and calls[0].mean.shape[0] == size:
                    _note_dominance(notes, calls[0])

    def moments(self) -> dict[str, Moments]:
        """What was noted, by layer."""
        return {name: notes.moments() for name, notes in self.notes.items()}


def _row(calls: Sequence[_Call], instances: bool) -> tuple[float, Array, Array]:
    """How many values there are per channel, their mean and their variance."""
    mean = torch.cat([call.mean for call in calls])
    var = torch.cat([call.var for call in calls]).mean(dim=0)
    centre = mean.mean(dim=0)
    if not instances:
        var = var + (mean - centre).square().mean(dim=0)
    count = float(sum(call.mean.shape[0] * call.count for call in calls))
    return count / (mean.shape[0] if instances else 1), centre.cpu().numpy(), var.cpu().numpy()


def _note_range(notes: _Notes, calls: Sequence[_Call]) -> None:
    for call in calls:
        if call.low is not None and call.high is not None:
            low, high = call.low.double().cpu().numpy(), -call.high.double().cpu().numpy()
            notes.low = low if notes.low is None else np.fmin(notes.low, low)
            notes.high = high if notes.high is None else np.fmax(notes.high, high)


def _note_dominance(notes: _Notes, call: _Call) -> None:
    """In how many channels one and the same sample has more than half of the batch's variance."""
    samples, channels = call.mean.shape
    if samples < FEW_SAMPLES or channels < FEW_CHANNELS:
        return
    parts = call.var + (call.mean - call.mean.mean(dim=0)).square()
    shares = parts / parts.sum(dim=0).clamp(min=1e-300)
    leads = (shares > 0.5).double().mean(dim=1)
    most = float(leads.max())
    if most > notes.dominated:
        notes.dominated = most
        notes.culprit = f"batch {len(notes.batches) - 1}, sample {int(leads.argmax())}"


def _by_sample(rows: Tensor, size: int) -> Tensor:
    """One row per sample, of some channels; none where the rows are no samples.

    A model that folds time into the batch, or stacks two views, gives several rows per sample: they belong together,
    and taken for samples of their own would look like a loader that groups. Whether they follow each other or lie a
    batch apart is told by the data: rows of one sample are alike, so that the right means differ most.
    """
    if rows.shape[0] % size:
        return rows[:0]
    step = max(1, rows.shape[1] // KEPT_CHANNELS)
    few, times = rows[:, ::step], rows.shape[0] // size
    if times == 1:
        return few
    both = (few.reshape(size, times, -1).mean(dim=1), few.reshape(times, size, -1).mean(dim=0))
    return max(both, key=lambda means: float(means.var(dim=0).sum().nan_to_num()))
