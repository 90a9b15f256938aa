"""γ and β of new layers, so that what comes out of them has the moments that the old ones gave it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.errors import DataError
from normscope.functional.normalize import Moments, moments
from normscope.kernels.activations import ACTIVATIONS
from normscope.nn.base import Layer
from normscope.nn.channels import merge
from normscope.surgery.find import Found
from normscope.surgery.foreign import Foreign
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.freeze import is_frozen
from normscope.surgery.recalibrate import Meter

__all__ = [
    "Calibration",
    "HeldFit",
    "LayerFit",
    "Observed",
    "Replaced",
    "calibrate",
    "compare",
    "evaluating",
    "observe",
    "outputs_of",
]

Loss = Callable[[Any, Any], Any]

# Widened to float64 at a time: they stay in the cache, which takes 0.22 of the time of all at once (16.8 million).
CELLS = 2**17


@dataclass(frozen=True, slots=True)
class Replaced:
    """A normalizer and what has taken its place.

    Attributes:
        found: The old layer.
        new: The new layer.
        axis: Where the channels lie in its output.
        followed: Whether children `drop` and `act` are called behind the normalization.
    """

    found: Found
    new: Module
    axis: int
    followed: bool


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How far a new layer's output is from the old one's, with no layer's γ and β fitted, and with all.

    Both are root mean squares over the channels, over that of the old σ: a channel that fires for one sample in a
    thousand has a σ of its own that no data give, and counts here for as much as it carries.

    Attributes:
        mean: Of the difference of the means; before and after.
        spread: Of the difference of the standard deviations; before and after.
    """

    mean: tuple[float, float]
    spread: tuple[float, float]

    def __str__(self) -> str:
        (m0, m1), (s0, s1) = self.mean, self.spread
        return f"mean off by {m0:.2f} σ → {m1:.2f} σ, σ by {s0:.0%} → {s1:.0%}"


@dataclass(frozen=True, slots=True)
class HeldFit:
    """How far a layer is off on data that calibrated nothing; mean or spread as in LayerFit, the larger.

    Attributes:
        off: The new layer, calibrated, from the old one.
        sampling: The old layer from itself on the data that calibrated: what the choice of samples does.
    """

    off: float
    sampling: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration did.

    Attributes:
        layers: The fits by layer.
        output: Distance of the model's outputs from those before the conversion, root mean square over their standard
            deviation; before and after the calibration.
        loss: Mean loss of the model before the conversion, before and after the calibration; None without `loss`.
        held: The fits by layer on data held out; empty without such.
        held_loss: Mean loss on data held out, before the conversion and after the calibration; None without both.
    """

    layers: dict[str, LayerFit]
    output: tuple[float, float]
    loss: tuple[float, float, float] | None
    held: dict[str, HeldFit] = field(default_factory=dict)
    held_loss: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What the model did before the conversion: moments by layer, its outputs, its mean loss."""

    moments: dict[str, Moments]
    outputs: list[Tensor]
    loss: float


def observe(
    model: Module, layers: Sequence[Replaced], batches: Sequence[Any], forward: Forward | None, loss: Loss | None
) -> Observed:
    """Run the model in evaluation and note the moments of each layer's output; `new` is the layer itself here."""
    with evaluating(model):
        return _seen(model, layers, batches, forward, loss)


def calibrate(
    model: Module,
    layers: Sequence[Replaced],
    before: Observed,
    batches: Sequence[Any],
    forward: Forward | None,
    loss: Loss | None,
) -> Calibration:
    """Fit the layers one after the other, in the order in which they run: each sees what the ones before it now give.

    With m, v the mean and variance of a channel of the new layer's output and m*, v* those of the old one's:
    γ ← γ·√(v*/v), β ← m* + (β − m)·√(v*/v), the one affine map that gives the output the old moments. One batch is
    fitted in one forward. Several take a pass per layer: fitting all layers at once, again and again, does not
    converge (40 layers, four batches of different contrast: further off after 20 sweeps than after one).
    """
    targets = before.moments
    with evaluating(model):
        naive = _seen(model, layers, batches, forward, loss)
        if len(batches) == 1:
            _fit_on_the_way(model, layers, targets, batches[0], forward)
        else:
            for layer in layers:
                _fit_alone(model, layer, targets[layer.found.name], batches, forward)
        after = _seen(model, layers, batches, forward, loss)
    fits = {}
    for layer in layers:
        name = layer.found.name
        (m0, s0), (m1, s1) = (_distance(x.moments[name], targets[name]) for x in (naive, after))
        fits[name] = LayerFit((m0, m1), (s0, s1))
    far = (_far(naive.outputs, before.outputs), _far(after.outputs, before.outputs))
    return Calibration(fits, far, None if loss is None else (before.loss, naive.loss, after.loss))


def compare(fitted: Observed, old: Observed, new: Observed) -> dict[str, HeldFit]:
    """How far layers are off on data held out.

    Args:
        fitted: What the old layers gave on the data that calibrated.
        old: What they gave on those held out.
        new: What the new layers give there.

    Raises:
        DataError: The data held out do not reach a layer.
    """
    held = {}
    for name, here in fitted.moments.items():
        if name not in old.moments or name not in new.moments:
            raise DataError("the data held out never reach a layer that was calibrated", layer=name)
        there = old.moments[name]
        held[name] = HeldFit(max(_distance(new.moments[name], there)), max(_distance(here, there)))
    return held


@contextlib.contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Every module in evaluation mode, by its flag: `train()` may be overridden, and a frozen module remembers it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with quiet():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def outputs_of(
    model: Module, batches: Sequence[Any], forward: Forward | None, loss: Loss | None
) -> tuple[list[Tensor], float]:
    """The first tensor of the model's output on every batch, and the mean loss."""
    outputs, losses = [], []
    for batch in batches:
        output = feed(model, batch, forward)
        outputs += [t.detach().clone() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)][:1]
        if loss is not None:
            losses.append(float(torch.as_tensor(loss(output, batch)).double().mean()))
    return outputs, sum(losses) / max(len(losses), 1)


def _seen(
    model: Module, layers: Sequence[Replaced], batches: Sequence[Any], forward: Forward | None, loss: Loss | None
) -> Observed:
    """What the model does as it is."""
    seen: dict[str, list[Moments]] = {layer.found.name: [] for layer in layers}

    def note(layer: Replaced, y: Tensor) -> None:
        seen[layer.found.name].append(_moments(layer, y))

    with contextlib.ExitStack() as stack:
        for layer in layers:
            tap(stack, layer, functools.partial(note, layer))
        outputs, mean_loss = outputs_of(model, batches, forward, loss)
    return Observed({name: _together(parts) for name, parts in seen.items() if parts}, outputs, mean_loss)


def tap(stack: contextlib.ExitStack, layer: Replaced, see: Callable[[Tensor], Tensor | None]) -> None:
    """Show a layer's output before its activation, while the stack is open.

    Args:
        stack: Takes the hook out again.
        layer: Whose output.
        see: Receives it; a tensor that it returns takes its place.
    """
    module = layer.new
    if layer.followed:

        def enter(_: Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            y = see(args[0])
            return None if y is None else (y, *args[1:])

        child = cast(Module, module._modules["drop"])
        stack.callback(child.register_forward_pre_hook(enter).remove)
        return
    fused = module.activation if isinstance(module, Layer) and not isinstance(module, Foreign) else None

    def leave(_: Module, __: Any, y: Tensor) -> Tensor | None:
        other = see(y)
        return other if fused is None else ACTIVATIONS[fused].forward(y if other is None else other)

    if fused is not None:
        module.activation = None  # type: ignore[assignment]
        stack.callback(setattr, module, "activation", fused)
    # Before the user's own hooks: they see what they always saw.
    stack.callback(module.register_forward_hook(leave, prepend=True).remove)


def _moments(layer: Replaced, y: Tensor) -> Moments:
    """Those of one call, in float64."""
    pattern = "[n] c [...]" if layer.axis == 1 or y.dim() == 2 else "[...] c"
    y = y.detach().cpu() if y.device.type == "mps" else y.detach()
    parts = torch.split(y, max(1, CELLS * len(y) // max(1, y.numel())))
    return _together([moments(part.double(), pattern) for part in parts])


def _fit_on_the_way(
    model: Module, layers: Sequence[Replaced], targets: dict[str, Moments], batch: Any, forward: Forward | None
) -> None:
    """Fit every layer where a forward first reaches it, and go on with the output that it then has."""
    fitted: set[Module] = set()

    def measure(layer: Replaced, _: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.new not in fitted:
            meter = Meter(Found(layer.new, layer.found.paths, "BatchNorm"))
            meter.see(layer.new, args, kwargs)
            meter.commit(1)
            meter.write("population")

    def fit(layer: Replaced, y: Tensor) -> Tensor | None:
        if layer.new in fitted:
            return None
        fitted.add(layer.new)
        scale, shift = _fit(layer, _moments(layer, y), targets[layer.found.name])
        shape = [-1 if k == layer.axis % y.dim() else 1 for k in range(y.dim())]
        return y * scale.to(y).view(shape) + shift.to(y).view(shape)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            if _tracks(layer.new):
                hook = functools.partial(measure, layer)
                stack.callback(layer.new.register_forward_pre_hook(hook, with_kwargs=True).remove)
            tap(stack, layer, functools.partial(fit, layer))
        feed(model, batch, forward)


def _tracks(module: Module) -> bool:
    running = isinstance(module._buffers.get("running_var"), Tensor) and "num_batches_tracked" in module._buffers
    return running and not is_frozen(module)


class _ReachedError(Exception):
    """The layer that a pass is for has run; what follows it does not matter."""


def _fit_alone(
    model: Module, layer: Replaced, target: Moments, batches: Sequence[Any], forward: Forward | None
) -> None:
    """Fit one layer, with a pass over all batches that ends there."""
    parts: list[Moments] = []

    def note(y: Tensor) -> None:
        parts.append(_moments(layer, y))
        raise _ReachedError

    if _tracks(layer.new):
        _measure(model, layer, batches, forward)
    with contextlib.ExitStack() as stack:
        tap(stack, layer, note)
        for batch in batches:
            with contextlib.suppress(_ReachedError):
                feed(model, batch, forward)
    _fit(layer, _together(parts), target)


def _measure(model: Module, layer: Replaced, batches: Sequence[Any], forward: Forward | None) -> None:
    """Running statistics of what the new layer receives."""
    meter = Meter(Found(layer.new, layer.found.paths, "BatchNorm"))

    def see(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        meter.see(module, args, kwargs)
        raise _ReachedError

    with contextlib.ExitStack() as stack:
        stack.callback(layer.new.register_forward_pre_hook(see, with_kwargs=True).remove)
        for k, batch in enumerate(batches):
            with contextlib.suppress(_ReachedError):
                feed(model, batch, forward)
            meter.commit(k + 1)
    meter.write("population")


def _together(parts: list[Moments]) -> Moments:
    stacked = Moments(*(torch.stack([getattr(m, name) for m in parts]) for name in ("mean", "var", "count")))
    mean, var, count = merge(stacked, 0)
    return Moments(mean[0], var[0], count[0])  # type: ignore[index]


def _fit(layer: Replaced, found: Moments, target: Moments) -> tuple[Tensor, Tensor]:
    """Give the layer the γ and β that turn the moments found into those wanted; returns the map, scale and shift."""
    if not (found.mean.isfinite().all() and found.var.isfinite().all() and target.var.isfinite().all()):
        raise DataError(
            "NaN or infinity comes out of a normalizer, whose γ and β it would destroy",
            layer=layer.found.name or "(the model itself)",
            cure="remove such samples, or look for an overflow before this layer (half precision?)",
        )
    # A channel that is constant now cannot be stretched.
    ratio = torch.where(found.var > 0, target.var / found.var.clamp(min=torch.finfo(found.var.dtype).tiny), 1).sqrt()
    weight, bias = layer.new.weight, getattr(layer.new, "bias", None)
    with torch.no_grad():
        if isinstance(weight, Tensor):
            weight.copy_(weight.double() * ratio.to(weight.device))
        if isinstance(bias, Tensor):
            mean, wanted, by = (t.to(bias.device) for t in (found.mean, target.mean, ratio))
            bias.copy_(wanted + (bias.double() - mean) * by)
    return ratio, target.mean - found.mean * ratio


def _distance(found: Moments, target: Moments) -> tuple[float, float]:
    sigma = target.var.sqrt()
    unit = sigma.norm()
    if unit == 0:  # a constant has no σ to measure by
        return 0.0, 0.0
    return ((found.mean - target.mean).norm() / unit).item(), ((found.var.sqrt() - sigma).norm() / unit).item()


def _far(outputs: list[Tensor], before: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (outputs, before))
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=torch.finfo(torch.float64).tiny))
