"""What takes a normalizer's place: read from text, a class or a function, and built to fit the old layer."""

from __future__ import annotations

import ast
import copy as copies
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Identity, Module
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normscope import nn as ours
from normscope.errors import ArgumentError, NormscopeError
from normscope.nn import Norm
from normscope.nn.base import Layer
from normscope.scope import parse
from normscope.surgery.find import Found
from normscope.surgery.foreign import Foreign
from normscope.surgery.traits import Trait, base_of

__all__ = ["Followed", "Source", "Target", "channel_axis", "is_affine", "read_target", "source_of"]

# The constructor's parameter for the number of channels, by any of its names.
CHANNELS = ("num_features", "num_channels", "normalized_shape", "size")
LIBRARIES = ("torch.nn.modules", "normscope.nn")
GROUPS = ("num_groups", "groups")
# Families of one class per number of axes.
FAMILIES = ("BatchNorm", "InstanceNorm")
HOW = 'write e.g. "GroupNorm(32)", "LayerNorm2d" or "Norm(\'n (g [c]) [h w]\', g=8)", or give a class or a function'


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A normalizer that is to be replaced.

    Attributes:
        module: The module.
        channels: C; 0 where it is unknown, which is the business of a function.
        axis: Where the channels lie in its input, 1 or -1.
        followed: Whether its class calls its children `drop` and `act` behind the normalization.
        shapes: Shapes of inputs that it was seen with; empty if nothing was run.
    """

    module: Module
    channels: int
    axis: int
    followed: bool
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def activation(self) -> str | None:
        """The activation fused into a layer of this package."""
        own = isinstance(self.module, Layer) and not isinstance(self.module, Foreign)
        return self.module.activation if own else None  # type: ignore[return-value]

    def tried(self) -> tuple[tuple[int, ...], ...]:
        """Shapes to try a new layer on: those seen, else the smallest that the module may meet."""
        if self.shapes:
            return tuple((min(shape[0], 4), *shape[1:]) for shape in self.shapes)
        if self.axis == -1:
            return ((2, 3, self.channels),)
        digit = _digit(self.module)
        return ((2, self.channels, *(1,) * (int(digit) if digit else 2)),)


class Followed(Trait):
    """The trait of a normalizer that calls its children `drop` and `act` on its output, as timm's classes do."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
        """The class's own, dropped out and activated."""
        if isinstance(input, fx.Proxy):  # one node, so that the children stay with the module
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        children: Any = self._modules
        return children["act"](children["drop"](super().forward(input, *args, **kwargs)))


# --- the old layer ------------------------------------------------------------------------------------------------


def source_of(found: Found, shapes: tuple[tuple[int, ...], ...] = ()) -> Source | str:
    """What must be known of a normalizer to replace it, or why that cannot be known."""
    module = found.module
    name = type(module).__name__
    if found.kind == "custom" and not found.running:
        return f"{name} is no normalizer known here; give a function that builds the new layer from it"
    channels, axis = _channels(module), channel_axis(module)
    if channels is None or axis is None:
        return f"{name} has no single axis of channels; give a function that builds the new layer from it"
    followed = _is_followed(module, found.kind)
    return followed if isinstance(followed, str) else Source(module, channels, axis, followed, shapes)


def channel_axis(module: Module) -> int | None:
    """Where a normalizer's channels lie in its input, 1 or -1; None where it is unknown, or several axes."""
    if isinstance(module, Norm):
        pattern = parse(module.scope)
        axes = pattern.at(pattern.least).param_axes(module.params)
        if len(axes) != 1:
            return None
        # Names count from the front up to the dots, from the back behind them.
        if module.scope.split()[0] in ("...", "[...]"):
            return -1 if axes[0] == pattern.least - 1 else None
        return 1 if axes[0] == 1 else None
    if hasattr(module, "channels_last"):
        return -1 if module.channels_last else 1
    if isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        return -1 if len(module.normalized_shape) == 1 else None
    return -1 if isinstance(module, ours.ScaleNorm) else 1


def _channels(module: Module) -> int | None:
    if isinstance(module, torch.nn.LocalResponseNorm):  # whose size is that of a window
        return None
    for name in CHANNELS:
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
        if isinstance(size, tuple) and len(size) == 1:
            return int(size[0])
    mean = module._buffers.get("running_mean")
    return None if mean is None else mean.numel()


def _digit(module: Module | type[Module]) -> str:
    """The number of space axes that the class is for, as in its name; empty where it takes any."""
    cls = module if isinstance(module, type) else base_of(type(module))
    names = [c.__name__ for c in cls.__mro__ if c.__module__.startswith(LIBRARIES)]
    return next((name[-2] for name in names if name.endswith(("1d", "2d", "3d")) and name[:-2] in FAMILIES), "")


def _is_followed(module: Module, kind: str) -> bool | str:
    """Whether a class of others normalizes, or normalizes, drops out and activates; or that it does something else.

    A forward that is torch's or this package's is known. Others are run on random numbers, all parameters random, next
    to what they should compute.
    """
    cls = base_of(type(module))
    known = [c for c in cls.__mro__ if c.__module__.startswith(LIBRARIES) and c is not Module]
    if known and cls.forward is known[0].forward:  # type: ignore[attr-defined]
        return False
    plain = _frozen_batch_norm if kind == "custom" else known[0].forward  # type: ignore[attr-defined]
    for followed in (False, True):
        if (not followed or {"drop", "act"} <= set(module._modules)) and _computes(module, plain, followed):
            return followed
    return f"{cls.__name__} computes something besides, which would be lost; give a function that builds the new layer"


def _frozen_batch_norm(module: Any, x: Tensor) -> Tensor:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return F.batch_norm(x, module.running_mean, module.running_var, weight, bias, False, 0.0, module.eps)


def _computes(module: Module, plain: Callable[..., Any], followed: bool) -> bool:
    """Whether a module computes what a function does, with dropout and activation behind it."""
    random = torch.Generator().manual_seed(0)
    channels, axis = _channels(module) or 1, channel_axis(module)
    ranks = (int(_digit(module)),) if _digit(module) else (2, 1, 3)
    for training in (False, True):
        try:
            copy = _bare_copy(module)
            for t in (*copy.parameters(), *copy.buffers()):
                if t.is_floating_point():
                    t.data.copy_(torch.rand(t.shape, generator=random) + 0.5)
            copy.train(training)
            rank = next(r for r in ranks if _accepts(copies.deepcopy(copy), (4, channels, *(3,) * r)))
            shape = (4, channels, *(3,) * rank) if axis == 1 else (4, *(3,) * rank, channels)
            x = torch.randn(shape, generator=random)
            other: Any = copies.deepcopy(copy)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                mine = base_of(type(copy)).forward(copy, x)
                torch.manual_seed(0)
                theirs = plain(other, x)
                theirs = other.act(other.drop(theirs)) if followed else theirs
        except Exception:
            return False
        # Rounding in another order; a gain or an activation left out changes whole digits.
        if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5):
            return False
    return True


def _bare_copy(module: Module) -> Module:
    """A copy on the CPU, in float32, without hooks."""
    copy = copies.deepcopy(module).to("cpu", torch.float32)
    for part in copy.modules():
        for name, value in vars(part).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
    return copy


def _accepts(module: Module, shape: tuple[int, ...]) -> bool:
    try:
        with torch.no_grad():
            module(torch.zeros(shape))
    except Exception:
        return False
    return True


# --- the new layer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What takes a normalizer's place.

    Attributes:
        text: How a checkpoint writes it; empty where nothing but Python code says it.
        cls: A class, or the name of a family with one class per number of axes; None for a function.
        options: Arguments of the constructor by name, without the number of channels.
        function: Builds the new layer from the old one.
    """

    text: str
    cls: type[Module] | str | None = None
    options: dict[str, Any] | None = None
    function: Callable[[Module], Module] | None = None

    def build(self, source: Source, *, affine: bool, nearest: bool) -> tuple[Module, str] | str:
        """The new layer and its text, or why there is none.

        Args:
            source: The old layer.
            affine: Learn γ and β even where the old layer has none.
            nearest: Where the number of groups does not fit, take the nearest that does.
        """
        if self.function is not None:
            new = self.function(source.module)
            if not isinstance(new, Module):
                raise ArgumentError(f"the function gave {type(new).__name__}, not a module", cure=HOW)
            return _misfit(source, new) or (new, "")
        cls = _family(self.cls, source) if isinstance(self.cls, str) else self.cls
        if cls is None:
            return f"how many axes its input has is unknown; write {self.cls}2d, or pass example="
        options = {**_inherited(cls, source, affine), **(self.options or {})}
        key = next((name for name in GROUPS if name in options), "")
        wanted = options.get(key)
        reason = "", self.text
        for groups in (wanted,) if not nearest or wanted is None else _by_distance(source.channels, wanted):
            given = options if wanted is None else {**options, key: groups}
            built = self._one(cls, given, source)
            if isinstance(built, Module):
                name, _, arguments = self.text.partition("(")
                return built, f"{name}({arguments.replace(str(wanted), str(groups), 1)}" if arguments else name
            reason = reason if reason[0] else (built, "")
        return reason[0]

    def _one(self, cls: type[Module], options: dict[str, Any], source: Source) -> Module | str:
        groups, channels = next((options[name] for name in GROUPS if name in options), None), source.channels
        if groups is not None and channels % groups:
            closest = _by_distance(channels, groups)[0]
            return f"{channels} channels do not divide into {groups} groups; nearest=True takes {closest}"
        try:
            new = cls(**{_channel_parameter(cls): channels}, **options)
        except (NormscopeError, ValueError) as error:
            return str(error).splitlines()[0]
        return _misfit(source, new) or new


def read_target(target: str | type[Module] | Callable[[Module], Module]) -> Target:
    """Understand a target before any model is touched.

    Raises:
        ArgumentError: It cannot be read, or has options that the layer does not take.
    """
    if isinstance(target, str):
        return _read_text(target)
    if isinstance(target, type) and issubclass(target, Module):
        named = getattr(ours, target.__name__, None) is target
        _check_options(target, target.__name__, {}, target.__name__)
        return Target(target.__name__ if named else "", target, {})
    if callable(target) and not isinstance(target, type):
        return Target("", function=target)
    raise ArgumentError(f"a target of type {type(target).__name__} is none", cure=HOW)


def _read_text(text: str) -> Target:
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ArgumentError(f"the target cannot be read: {error.msg}", target=text, cure=HOW) from None
    name_of = call.func if isinstance(call, ast.Call) else call
    if not isinstance(name_of, ast.Name):
        raise ArgumentError("the target is no name of a layer", target=text, cure=HOW)
    name = name_of.id
    if name not in _names():
        raise ArgumentError(f"there is no normalizer {name!r}", target=text, cure=f"one of {', '.join(_names())}")
    cls = getattr(ours, f"{name}2d" if name in FAMILIES else name)
    options: dict[str, Any] = {}
    if isinstance(call, ast.Call):
        places = [p for p in _parameters(cls) if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(call.args) > len(places):
            raise ArgumentError(f"{name} takes at most {len(places)} arguments", target=text, cure=HOW)
        pairs = [(place.name, node) for place, node in zip(places, call.args, strict=False)]
        pairs += [(keyword.arg or "**", keyword.value) for keyword in call.keywords]
        for key, node in pairs:
            if key in options:
                raise ArgumentError(f"{key} is given twice", target=text, cure=HOW)
            try:
                options[key] = ast.literal_eval(node)
            except ValueError:
                raise ArgumentError(
                    f"{ast.unparse(node)} is no plain value", target=text, cure="write numbers, text, True or None"
                ) from None
    _check_options(cls, name, options, text)
    return Target(ast.unparse(call), name if name in FAMILIES else cls, options)


def _check_options(cls: type[Module], name: str, options: dict[str, Any], text: str) -> None:
    try:
        _channel_parameter(cls)
    except StopIteration:
        raise ArgumentError(
            f"{name} does not say which of its arguments is the number of channels",
            cure=f"give a function: lambda old: {name}(…)",
        ) from None
    parameters = _parameters(cls)
    names = [p.name for p in parameters]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in options:
            if key not in names:
                raise ArgumentError(
                    f"{name} has no option {key!r}", target=text, cure=f"its options are {', '.join(names)}"
                )
    for p in parameters:
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in options:
            raise ArgumentError(f"{name} needs {p.name}", target=text, cure=f"write {name}({p.name}=…)")


@functools.cache
def _names() -> tuple[str, ...]:
    """The layers that a text can name: those that a number of channels and plain values build."""
    layers = [n for n in ours.__all__ if any(c in inspect.signature(getattr(ours, n)).parameters for c in CHANNELS)]
    return tuple(sorted([*FAMILIES, *layers]))


def _parameters(cls: type[Module]) -> list[inspect.Parameter]:
    """The constructor's, without the number of channels, device and dtype."""
    own = inspect.signature(cls).parameters
    return [p for p in own.values() if p.name not in (_channel_parameter(cls), "device", "dtype")]


def _channel_parameter(cls: type[Module]) -> str:
    return next(name for name in CHANNELS if name in inspect.signature(cls).parameters)


def _family(name: str, source: Source) -> type[Module] | None:
    digit = _digit(source.module)
    ranks = {len(shape) for shape in source.shapes}
    if not digit and len(ranks) == 1:
        digit = str(max(1, ranks.pop() - 2))
    found = getattr(ours, f"{name}{digit}d", None)
    return found if isinstance(found, type) else None


def _inherited(cls: type[Module], source: Source, affine: bool) -> dict[str, Any]:
    """The options of the old layer that the new one has, too."""
    old: Any = source.module
    learned = getattr(old, "weight", None) is not None
    have: dict[str, Any] = {
        "affine": learned or affine,
        "elementwise_affine": learned or affine,
        "channels_last": source.axis == -1,
    }
    if learned or not affine:
        have["bias"] = getattr(old, "bias", None) is not None
    for name in ("eps", "momentum"):
        if isinstance(getattr(old, name, None), float):
            have[name] = getattr(old, name)
    if source.activation is not None:
        have["activation"] = source.activation
    # InstanceNorm keeps none, whatever BatchNorm does: per sample there is nothing to remember.
    if issubclass(cls, _BatchNorm) and isinstance(old, _BatchNorm):
        have.update(momentum=old.momentum, track_running_stats=old.running_mean is not None)
    names = [p.name for p in _parameters(cls)]
    return {name: value for name, value in have.items() if name in names}


def _by_distance(channels: int, groups: int) -> list[int]:
    """The divisors of C, nearest first; of two as near, the smaller."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return sorted(divisors, key=lambda d: (abs(d - groups), d))


def _misfit(source: Source, new: Module) -> str | None:
    """Why a new layer cannot take the old one's place, found out on a copy of it."""
    name = type(new).__name__
    if source.activation is not None and getattr(new, "activation", None) != source.activation:
        return f"{name} would lose the activation {source.activation!r} that is fused into this layer"
    known = isinstance(
        new, (Layer, _BatchNorm, _InstanceNorm, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm)
    )
    flat = bool(source.shapes) and all(len(shape) == 2 for shape in source.shapes)
    if source.channels and known and not flat and channel_axis(new) != source.axis:
        here, there = ("the last axis" if axis == -1 else "axis 1" for axis in (source.axis, channel_axis(new)))
        hint = "LayerNorm2d and GroupNorm(1) are for axis 1" if source.axis == 1 else "LayerNorm and RMSNorm are for it"
        return f"its channels are on {here}, {name} looks for them on {there}; {hint}"
    unseen = not (source.channels or source.shapes)
    return None if unseen or isinstance(new, Identity) else _tried(source, new)


def is_affine(new: Module, source: Source) -> bool:
    """Whether the last thing that a layer does, its activation aside, is γ · … + β."""
    outputs = []
    for gain, offset in ((1.0, 0.0), (2.0, 1.0)):
        copy: Any = _bare_copy(new).eval()
        if source.activation is not None:
            copy.activation = None
        copy.weight.data.fill_(gain)
        if getattr(copy, "bias", None) is not None:
            copy.bias.data.fill_(offset)
        else:
            offset = 0.0
        x = torch.randn(source.tried()[0], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outputs.append((copy(x) - offset) / gain)
    return torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def _tried(source: Source, new: Module) -> str | None:
    """A set of one value shows in that the output does not depend on the input."""
    random = torch.Generator().manual_seed(0)
    for shape in source.tried():
        for training in (True, False):
            copy = _bare_copy(new).train(training)
            for key, p in copy.named_parameters():
                p.data.fill_(1.0 if key == "weight" else 0.5)
            try:
                with torch.no_grad():
                    one, two = (copies.deepcopy(copy)(torch.randn(shape, generator=random)) for _ in range(2))
            except Exception as error:
                return (
                    f"{type(new).__name__} cannot take {shape}: {(str(error) or type(error).__name__).splitlines()[0]}"
                )
            if not isinstance(one, Tensor) or one.shape != torch.Size(shape):
                return f"{type(new).__name__} does not keep the shape {shape}"
            # 0.01: one value minus itself, and the rounding of β.
            if (one - two).abs().max() < 0.01:
                seen = "" if source.shapes else ", which its input may have; pass example= to show what it has"
                return f"{type(new).__name__} would normalize single values of {shape[1:]}{seen}"
    return None
