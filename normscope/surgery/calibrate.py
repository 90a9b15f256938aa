"""γ and β of new layers, so that what comes out of them has the moments that the old ones gave it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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

__all__ = ["Calibration", "LayerFit", "Replaced", "calibrate", "evaluating", "observe", "outputs_of"]

Loss = Callable[[Any, Any], Any]


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
    """How far a new layer's output was from the old one's, before and after the fit of γ and β.

    Attributes:
        mean: Root mean square over the channels of the difference of the means, in standard deviations of the old
            output; before and after.
        spread: Root mean square over the channels of ln(new σ/old σ); before and after.
    """

    mean: tuple[float, float]
    spread: tuple[float, float]

    def __str__(self) -> str:
        (m0, m1), (s0, s1) = self.mean, self.spread
        return f"mean off by {m0:.2f} σ → {m1:.2f} σ, σ by a factor {math.exp(s0):.2f} → {math.exp(s1):.2f}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration did.

    Attributes:
        layers: The fits by layer.
        output: Distance of the model's outputs from those before the conversion, root mean square over their standard
            deviation; before and after the calibration.
        loss: Mean loss of the model before the conversion, before and after the calibration; None without `loss`.
    """

    layers: dict[str, LayerFit]
    output: tuple[float, float]
    loss: tuple[float, float, float] | None


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
    seen: dict[str, list[Moments]] = {layer.found.name: [] for layer in layers}
    with evaluating(model), contextlib.ExitStack() as stack:
        for layer in layers:
            tap(stack, layer, seen[layer.found.name].append)
        outputs, mean_loss = outputs_of(model, batches, forward, loss)
    return Observed({name: _together(parts) for name, parts in seen.items() if parts}, outputs, mean_loss)


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
    γ ← γ·√(v*/v), β ← m* + (β − m)·√(v*/v), the one affine map that gives the output the old moments.
    """
    fitted, after = {}, {}
    with evaluating(model):
        naive, naive_loss = outputs_of(model, batches, forward, loss)
        for layer in layers:
            target = before.moments[layer.found.name]
            if _tracks(layer.new) and not is_frozen(layer.new):
                _measure(model, layer, batches, forward)
            found = _moments(model, layer, batches, forward)
            _fit(layer, found, target)
            fitted[layer.found.name] = found
        seen: dict[str, list[Moments]] = {name: [] for name in fitted}
        with contextlib.ExitStack() as stack:
            for layer in layers:
                tap(stack, layer, seen[layer.found.name].append)
            outputs, after_loss = outputs_of(model, batches, forward, loss)
        after = {name: _together(parts) for name, parts in seen.items()}
    fits = {}
    for name, found in fitted.items():
        (m0, s0), (m1, s1) = (_distance(x, before.moments[name]) for x in (found, after[name]))
        fits[name] = LayerFit((m0, m1), (s0, s1))
    far = (_far(naive, before.outputs), _far(outputs, before.outputs))
    return Calibration(fits, far, None if loss is None else (before.loss, naive_loss, after_loss))


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


class _ReachedError(Exception):
    """The layer that a pass is for has run; what follows it does not matter."""


def tap(stack: contextlib.ExitStack, layer: Replaced, tell: Callable[[Moments], None], *, end: bool = False) -> None:
    """Tell the moments of a layer's output before its activation, while the stack is open.

    Args:
        stack: Takes the hook out again.
        layer: Whose output.
        tell: Receives them.
        end: Stop the pass there.
    """

    def note(y: Tensor) -> None:
        pattern = "[n] c [...]" if layer.axis == 1 or y.dim() == 2 else "[...] c"
        tell(moments(y.detach().to("cpu" if y.device.type == "mps" else y.device, torch.float64), pattern))
        if end:
            raise _ReachedError

    module = layer.new
    if layer.followed:
        child = module._modules["drop"]
        stack.callback(child.register_forward_pre_hook(lambda _, args: note(args[0])).remove)  # type: ignore[union-attr]
        return
    fused = module.activation if isinstance(module, Layer) and not isinstance(module, Foreign) else None

    def leave(_: Module, __: Any, y: Tensor) -> Tensor | None:
        note(y)
        return None if fused is None else ACTIVATIONS[fused].forward(y)

    if fused is not None:
        module.activation = None  # type: ignore[assignment]
        stack.callback(setattr, module, "activation", fused)
    # Before the user's own hooks: they see what they always saw.
    stack.callback(module.register_forward_hook(leave, prepend=True).remove)


def _moments(model: Module, layer: Replaced, batches: Sequence[Any], forward: Forward | None) -> Moments:
    parts: list[Moments] = []
    with contextlib.ExitStack() as stack:
        tap(stack, layer, parts.append, end=True)
        for batch in batches:
            with contextlib.suppress(_ReachedError):
                feed(model, batch, forward)
    return _together(parts)


def _tracks(module: Module) -> bool:
    return isinstance(module._buffers.get("running_var"), Tensor) and "num_batches_tracked" in module._buffers


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


def _fit(layer: Replaced, found: Moments, target: Moments) -> None:
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


def _distance(found: Moments, target: Moments) -> tuple[float, float]:
    alive = (target.var > 0) & (found.var > 0)
    if not alive.any():
        return 0.0, 0.0
    mean = ((found.mean - target.mean)[alive].square() / target.var[alive]).mean().sqrt()
    spread = (found.var[alive] / target.var[alive]).log().div(2).square().mean().sqrt()
    return mean.item(), spread.item()


def _far(outputs: list[Tensor], before: list[Tensor]) -> float:
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (outputs, before))
    return float((a - b).square().mean().sqrt() / b.std().clamp(min=torch.finfo(torch.float64).tiny))
