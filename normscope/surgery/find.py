"""Find: the normalizers of a model, every path under which it holds them, and the order in which they are called."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normscope.errors import ArgumentError
from normscope.nn import Norm
from normscope.nn.base import Layer
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.state import Snapshot

__all__ = ["Call", "Found", "Select", "find", "paths", "selected", "trace"]

Select = str | Iterable[str] | Callable[[str, Module], bool] | None

_KINDS: tuple[tuple[type[Module], str], ...] = (
    (_BatchNorm, "BatchNorm"),
    (_InstanceNorm, "InstanceNorm"),
    (torch.nn.GroupNorm, "GroupNorm"),
    (torch.nn.LayerNorm, "LayerNorm"),
    (torch.nn.RMSNorm, "RMSNorm"),
    (torch.nn.LocalResponseNorm, "LocalResponseNorm"),
    (Norm, "Norm"),
)
_NORM_NAME = re.compile("norm", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A normalizer of a model.

    Attributes:
        module: The module.
        paths: Every name under which the model holds it, the first in definition order first; "" is the model itself.
        kind: "BatchNorm", "InstanceNorm", …, the family by class, subclasses included; "custom" for a class that looks
            like a normalizer and is none that is known.
    """

    module: Module
    paths: tuple[str, ...]
    kind: str

    @property
    def name(self) -> str:
        """The first path."""
        return self.paths[0]

    @property
    def running(self) -> bool:
        """Whether it normalizes by running statistics in evaluation."""
        mean, *spread = (
            getattr(self.module, name, None) is not None
            for name in ("running_mean", "running_var", "running_whitening")
        )
        return mean and any(spread) and (self.kind != "InstanceNorm" or bool(self.module.track_running_stats))


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module in a traced forward.

    Attributes:
        module: The module.
        name: Its first path.
        index: How often it had been called before.
        shape: The shape of its first tensor argument, or None.
    """

    module: Module
    name: str
    index: int
    shape: tuple[int, ...] | None


def find(model: Module, select: Select = None) -> tuple[Found, ...]:
    """The normalizers of a model in definition order, each once, however often it is registered.

    Args:
        model: The model; it may be a normalizer itself.
        select: Which of them; see `selected`.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(4)
        >>> [(found.paths, found.kind) for found in find(torch.nn.Sequential(norm, torch.nn.ReLU(), norm))]
        [(('0', '2'), 'BatchNorm')]
    """
    keep = selected(select)
    found = [Found(module, names, kind) for module, names in paths(model) if (kind := _kind(module)) is not None]
    kept = tuple(f for f in found if any(keep(name, f.module) for name in f.paths))
    if select is not None and not kept:
        raise ArgumentError(
            "select matches no normalizer",
            select=select,
            normalizers=", ".join(f.name or "(the model itself)" for f in found[:12]) or "none in this model",
            cure="name modules as model.named_modules() does; 'layer1' takes all below it, 'layer*.bn' is a pattern",
        )
    return kept


def selected(select: Select) -> Callable[[str, Module], bool]:
    """The test behind a selection.

    Args:
        select: None for all; names, each of which takes everything below it, too, or patterns with * and ?; or a
            function of path and module.
    """
    if select is None:
        return lambda *_: True
    if callable(select):
        return select
    names = [select] if isinstance(select, str) else list(select)
    patterns = [pattern for name in names for pattern in ((name, f"{name}.*") if name else ("*",))]
    return lambda path, _: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def paths(model: Module) -> Iterator[tuple[Module, tuple[str, ...]]]:
    """Every module once, in definition order, with all its paths; a module inside itself ends the walk."""
    names: dict[int, tuple[Module, list[str]]] = {}

    def visit(module: Module, path: str, above: tuple[int, ...]) -> None:
        names.setdefault(id(module), (module, []))[1].append(path)
        for name, child in module._modules.items():
            if child is not None and id(child) not in above:
                visit(child, f"{path}.{name}" if path else name, (*above, id(child)))

    visit(model, "", (id(model),))
    return ((module, tuple(found)) for module, found in names.values())


def trace(model: Module, example: Any, forward: Forward | None = None, *, select: Select = None) -> tuple[Call, ...]:
    """The calls of the normalizers in one forward in evaluation mode, in order; the model is left as it was.

    Args:
        model: The model.
        example: A batch.
        forward: `forward(model, batch)`; see `normscope.recalibrate`.
        select: Which normalizers.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(4)
        >>> calls = trace(torch.nn.Sequential(norm, torch.nn.ReLU(), norm), torch.zeros(3, 4))
        >>> [(call.name, call.index, call.shape) for call in calls]
        [('0', 0, (3, 4)), ('0', 1, (3, 4))]
    """
    calls: list[Call] = []
    counts: dict[int, int] = {}

    def watch(found: Found) -> None:
        def note(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            index = counts.get(id(found.module), 0)
            counts[id(found.module)] = index + 1
            calls.append(Call(found.module, found.name, index, None if first is None else tuple(first.shape)))

        found.module.register_forward_pre_hook(note, with_kwargs=True)

    with Snapshot(model), quiet():
        for found in find(model, select):
            if not isinstance(found.module, torch.jit.ScriptModule):
                watch(found)
        model.eval()
        feed(model, example, forward)
    return tuple(calls)


def _kind(module: Module) -> str | None:
    for kind, name in _KINDS:
        if isinstance(module, kind):
            return name
    if isinstance(module, Layer):
        return type(module).__name__
    return "custom" if _looks_like_a_norm(module) else None


def _looks_like_a_norm(module: Module) -> bool:
    """By state of its own and a telling name, or by running statistics: a wrapper around a normalizer is none."""
    name = getattr(module, "original_name", type(module).__name__)  # TorchScript hides the class
    own = {key for key, _ in (*module.named_parameters("", False), *module.named_buffers("", False))}
    return {"running_mean", "running_var"} <= own or (bool(own) and _NORM_NAME.search(name) is not None)
