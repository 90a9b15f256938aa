"""Known defects, put into a copy of a model on purpose: what the self-test and the fixtures of the rules inject."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.doctor.cache import Batch, own, regroup
from normscope.doctor.measurements import Measurements
from normscope.records import Interval, Severity
from normscope.surgery import feed, find, switch
from normscope.surgery.find import Found

__all__ = ["DEFECTS", "Body", "Defect", "Exposure", "as_is", "poison", "scale_variance", "shift_mean"]

# Samples that are dealt out anew where a defect is about the batch's size: enough for the noise of any size.
REGROUPED = 1024
SEED = 0


# --- single injections --------------------------------------------------------------------------------------------


def shift_mean(norm: Any, sigmas: float, channels: slice | Tensor = slice(None)) -> None:
    """Move the running mean by so many of its own standard deviations."""
    norm.running_mean[channels] += sigmas * norm.running_var[channels].sqrt()


def scale_variance(norm: Any, factor: float) -> None:
    """Multiply the running variance."""
    norm.running_var.mul_(factor)


def poison(buffer: Tensor, value: float = math.nan, channel: int = 0) -> None:
    """Put a value that is none into one channel of a buffer."""
    buffer.view(-1)[channel] = value


# --- the table of defects -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A copy of the user's model, about to be harmed.

    Attributes:
        model: The copy.
        sound: The user's own model, for rules that compare.
        trackers: Normalizers of the copy with running statistics that the loader reaches.
        layer: The one that a defect of a single layer goes into.
        batches: What the loader yielded.
        forward: The user's own.
        control: What was measured on the untouched copy.
    """

    model: Module
    sound: Module
    trackers: tuple[Found, ...]
    layer: Found
    batches: tuple[Batch, ...]
    forward: Callable[[Module, Any], Any] | None
    control: Measurements


@dataclass(frozen=True, slots=True, eq=False)
class Exposure:
    """How a harmed copy is handed to the doctor: more arguments of `check`, and other batches than the loader's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[Batch, ...] | None = None


_AS_IS = Exposure()


def as_is(_: Body) -> Exposure:
    """The copy as it is."""
    return _AS_IS


def _in_training(body: Body) -> Exposure:
    switch(body.model, True)
    return _AS_IS


def _beside_sound(body: Body) -> Exposure:
    return Exposure({"reference": body.sound})


def _always(_: Body) -> str:
    return ""


def _unpriced(_: Measurements) -> Interval | None:
    return None


def _recalibrated(m: Measurements) -> Interval | None:
    """What evaluation gains by new statistics."""
    return m.recalibrated.cost


def _on_batches(m: Measurements) -> Interval | None:
    """What normalizing by such batches loses against new statistics."""
    return m.small.cost


@dataclass(frozen=True, slots=True)
class Defect:
    """A defect that comes in sizes.

    Attributes:
        name: In words with hyphens.
        text: What is wrong, in a few words.
        rules: The rules that may see it.
        inject: Harms the copy by a size.
        sizes: From faint to strong; one for a defect that is there or not. A function of the copy where it depends.
        unit: Of the sizes, "" where there is one.
        everywhere: Whether it goes into all normalizers, not into one.
        at: The least severity that counts as seen.
        control: How the untouched copy is handed over for comparison.
        unfit: Why it cannot be put into this model, "" if it can.
        price: What it costs, among the measurements of the harmed copy; None where that is not measured.
    """

    name: str
    text: str
    rules: tuple[str, ...]
    inject: Callable[[Body, float], Exposure]
    sizes: tuple[float, ...] | Callable[[Body], tuple[float, ...]] = (1.0,)
    unit: str = ""
    everywhere: bool = True
    at: Severity = "W"
    control: Callable[[Body], Exposure] = as_is
    unfit: Callable[[Body], str] = _always
    price: Callable[[Measurements], Interval | None] = _unpriced

    def sizes_for(self, body: Body) -> tuple[float, ...]:
        """The sizes for one copy."""
        return self.sizes(body) if callable(self.sizes) else self.sizes


def _grid(low: float, high: float, ratio: float = 1.25) -> tuple[float, ...]:
    """Sizes from low to high, each larger than the last by about the same ratio, two digits each."""
    count = math.ceil(math.log(high / low) / math.log(ratio))
    return tuple(dict.fromkeys(float(f"{low * (high / low) ** (k / count):.2g}") for k in range(count + 1)))


def _shifted(body: Body, size: float) -> Exposure:
    shift_mean(body.layer.module, size)
    return _AS_IS


def _scaled(body: Body, size: float) -> Exposure:
    scale_variance(body.layer.module, size)
    return _AS_IS


def _unconverged(body: Body, size: float) -> Exposure:
    """The statistics as an average leaves them whose initial values still have that weight."""
    momentum = 0.01
    for found in body.trackers:
        norm: Any = found.module
        norm.running_mean.mul_(1 - size)
        norm.running_var.mul_(1 - size).add_(size)
        norm.momentum = momentum
        norm.num_batches_tracked.fill_(round(math.log(size) / math.log(1 - momentum)))
    return _AS_IS


def _counts_batches(body: Body) -> str:
    counting = [isinstance(f.module._buffers.get("num_batches_tracked"), Tensor) for f in body.trackers]
    averaging = [isinstance(getattr(f.module, "momentum", None), float) for f in body.trackers]
    return "" if all(counting) and all(averaging) else "not every normalizer counts batches with a momentum"


def _lost(body: Body, _: float) -> Exposure:
    for found in body.trackers:
        found.module.get_buffer("running_mean").zero_()
        found.module.get_buffer("running_var").fill_(1)
    return _AS_IS


def _non_finite(body: Body, _: float) -> Exposure:
    poison(body.layer.module.get_buffer("running_mean"))
    return _AS_IS


def _half_frozen(body: Body, _: float) -> Exposure:
    body.model.requires_grad_(False)
    _head(body.model).requires_grad_(True)
    return _in_training(body)


def _head(model: Module) -> Module:
    """The last module with floating-point parameters of its own that is no normalizer; the model if there is none."""
    norms = {id(f.module) for f in find(model)}
    own_parameters = [
        module
        for module in model.modules()
        if id(module) not in norms and any(p.is_floating_point() for p in module.parameters(recurse=False))
    ]
    return own_parameters[-1] if own_parameters else model


def _has_head(body: Body) -> str:
    return "" if _head(body.model) is not body.model else "the model has no parameters outside of its normalizers"


def _forgotten_eval(body: Body, _: float) -> Exposure:
    switch(body.model, True)
    return Exposure({"predict": lambda model, inputs: feed(model, inputs, body.forward)})


def _remembered_eval(body: Body) -> Exposure:
    def predict(model: Module, inputs: Any) -> Any:
        switch(model)
        return feed(model, inputs, body.forward)

    switch(body.model, True)
    return Exposure({"predict": predict})


def _predicts(body: Body) -> str:
    tuples = isinstance(body.batches[0].data, (tuple, list))
    return "with forward= only whole batches can be run, not inputs alone" if body.forward and tuples else ""


def _no_momentum(body: Body, _: float) -> Exposure:
    for found in body.trackers:
        found.module.momentum = 0.0  # type: ignore[assignment]
    return _in_training(body)


def _other_eps(body: Body, size: float) -> Exposure:
    for found in body.trackers:
        norm: Any = found.module
        norm.eps = norm.eps * size
    return _beside_sound(body)


def _has_eps(body: Body) -> str:
    known = [isinstance(getattr(f.module, "eps", None), float) and f.module.eps for f in body.trackers]
    return "" if all(known) else "not every normalizer has an ε above 0"


def _changed_weights(body: Body, size: float) -> Exposure:
    generator = torch.Generator().manual_seed(SEED)
    for parameter in body.model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data.add_(noise, alpha=size * float(parameter.detach().float().std(correction=0)))
    return _beside_sound(body)


def _small_batches(body: Body, size: float) -> Exposure:
    cut: list[Batch] = []
    samples = 0
    for batch in body.batches:
        for start in range(0, batch.size - int(size) + 1, int(size)):
            data = regroup(batch.data, batch.size, list(range(start, start + int(size))))
            cut.append(Batch(len(cut), data, int(size)))
        samples += batch.size
        if samples >= REGROUPED:
            break
    switch(body.model, True)
    return Exposure(batches=tuple(cut))


def _batch_sizes(body: Body) -> tuple[float, ...]:
    """Smaller and smaller than the loader's own; two at least, because one alone raises."""
    regular = max(batch.size for batch in body.batches)
    return tuple(float(b) for b in (256, 128, 64, 32, 24, 16, 12, 8, 6, 4, 3, 2) if b < regular)


def _other_scale(body: Body, size: float) -> Exposure:
    return Exposure(batches=tuple(Batch(b.index, _divided(b.data, size), b.size) for b in body.batches))


def _divided(data: Any, divisor: float) -> Any:
    """The first floating-point tensor of a batch divided, everything else as it is."""
    leaves, spec = pytree.tree_flatten(own(data))
    place = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    leaves[place] = leaves[place] / divisor
    return pytree.tree_unflatten(leaves, spec)


def _has_numbers(body: Body) -> str:
    leaves = pytree.tree_leaves(body.batches[0].data)
    numbers = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
    return "" if numbers else "the batches hold no floating-point tensor"


def _dead(body: Body, size: float) -> Exposure:
    norm: Any = body.layer.module
    count = max(1, round(size * norm.bias.numel()))
    norm.bias.data[:count] = -10 * norm.weight.detach()[:count].abs() - 1
    return _AS_IS


def _rectified(body: Body) -> str:
    norm: Any = body.layer.module
    if not all(isinstance(getattr(norm, name, None), Tensor) for name in ("weight", "bias")):
        return "it has no γ and β"
    return "" if body.layer.name in body.control.rectified else "no ReLU follows it"


DEFECTS: tuple[Defect, ...] = (
    Defect(
        "shifted-mean", "running mean moved", ("NRM103",), _shifted, _grid(0.02, 4), "σ", False, price=_recalibrated,
    ),
    Defect(
        "scaled-variance", "running variance multiplied", ("NRM103",), _scaled, _grid(1.05, 100), "×", False,
        price=_recalibrated,
    ),
    Defect(
        "unconverged", "averages still hold their initial values", ("NRM104", "NRM103"), _unconverged,
        _grid(0.005, 0.95), "of the weight", unfit=_counts_batches, price=_recalibrated,
    ),
    Defect("lost-buffers", "statistics left out of the checkpoint", ("NRM102",), _lost, price=_recalibrated),
    Defect("non-finite", "one NaN in a running mean", ("NRM101",), _non_finite, everywhere=False, price=_recalibrated),
    Defect(
        "changed-weights", "weights changed, statistics not", ("NRM113",), _changed_weights, _grid(0.01, 1),
        "of their deviation", control=_beside_sound, price=_recalibrated,
    ),
    Defect(
        "small-batches", "training on smaller batches", ("NRM301", "NRM302"), _small_batches, _batch_sizes,
        "samples", control=_in_training, price=_on_batches,
    ),
    Defect(
        "half-frozen", "weights frozen, statistics not", ("NRM203",), _half_frozen, control=_in_training,
        unfit=_has_head,
    ),
    Defect(
        "forgotten-eval", "prediction without eval()", ("NRM201",), _forgotten_eval, control=_remembered_eval,
        unfit=_predicts,
    ),
    Defect(
        "other-eps", "ε of another library", ("NRM704", "NRM606"), _other_eps, _grid(1.25, 1e6, 2), "× ε",
        control=_beside_sound, unfit=_has_eps,
    ),
    Defect(
        "no-momentum", "momentum 0, statistics stand still", ("NRM106",), _no_momentum, control=_in_training,
        unfit=_counts_batches,
    ),
    Defect(
        "other-scale", "inputs divided by 255", ("NRM109", "NRM103"), _other_scale, (255.0,), unfit=_has_numbers,
        price=_recalibrated,
    ),
    Defect(
        "dead-channels", "channels switched off by β", ("NRM404",), _dead, _grid(0.02, 1), "of its channels", False,
        at="I", unfit=_rectified,
    ),
)  # fmt: skip
