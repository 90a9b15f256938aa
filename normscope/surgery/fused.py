"""Fused forwards: a module runs a program in which normalizers take up what follows them, else its own forward.

Where may `relu(norm(x) + identity)` become one call? Three places were weighed:

- *In the normalizer*, with its activation set and the activation module emptied. A ReLU that a block calls three times
  cannot be emptied for one of the calls, whoever taps the normalizer gets something else, and torch's own
  `convert_sync_batchnorm` then drops the activation without a word.
- *At run time*, by an output that waits for what is done to it. Every operation pays for the question.
- *In the forward of the module that calls both.* All modules stay what they are, and the module's own forward stays
  right: the program is another way to compute the same, to be given up at any time.

The last is done here. A program knows what held when it was written (the kinds of the modules it calls, the plain
attributes that the forward read, its arguments) and runs only while that holds: whoever registers a hook, replaces a
module, sets a flag, compiles or traces gets the module's own forward.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from normscope import nn
from normscope.errors import NormscopeError
from normscope.functional import add_norm
from normscope.kernels.activations import ACTIVATIONS
from normscope.nn.base import Layer, path_of
from normscope.surgery.traits import Trait, base_of, traits_of

__all__ = [
    "Fused",
    "Path",
    "Program",
    "add_then_norm",
    "adds_first",
    "at",
    "fusable",
    "fuse_norm",
    "programs_of",
    "unhooked",
]

Path = tuple[str, ...]


class Fused(Trait):
    """The trait of a module that has programs; they lie in `_programs`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give every class with this trait a forward with the signature of its own."""
        super().__init_subclass__(**kwargs)

        @functools.wraps(base_of(cls).forward)
        def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
            program = _fitting(self, args, kwargs)
            if program is None:
                return super(cls, self).forward(*args, **kwargs)  # type: ignore[misc]
            return program.run(self, *args, **kwargs)

        cls.forward = forward

    def extra_repr(self) -> str:
        """The class's own, and what is fused."""
        chains = dict.fromkeys(chain for program in programs_of(self) for chain in program.chains)
        return ", ".join(filter(None, [super().extra_repr(), f"fused: {', '.join(chains)}" if chains else ""]))


def programs_of(module: Module) -> tuple[Program, ...]:
    """The programs of a module; a slice of a fused Sequential has the trait and none."""
    return cast("tuple[Program, ...]", vars(module).get("_programs", ()))


def norms_of(module: Module) -> list[Module]:
    """The normalizers that take up something in its programs, those that it still holds."""
    found = dict.fromkeys(_find(module, path) for program in programs_of(module) for path in program.norms)
    return [norm for norm in found if norm is not None]


def _find(module: Module, path: Path) -> Module | None:
    try:
        return at(module, path)
    except KeyError:
        return None


def _fitting(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
    hooked = torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    if hooked or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    for program in programs_of(module):
        if program.fits(module, args, kwargs):
            return program
    return None


@dataclass
class Program:
    """A forward in Python's own words, and what must hold for it to be the module's.

    Attributes:
        source: The text of a function `forward`.
        imports: For every name that the text takes from elsewhere (name, module, name there).
        chains: What is fused in it, in words.
        accepts: The arguments it can be called with.
        arguments: Arguments that must be a tensor (Tensor), a list (list) or merely not None (object).
        attributes: Plain attributes that the forward read, as (module, name, value).
        structure: The children of the modules that calls go through, the module itself first; `Layer` stands for any
            layer of this package.
        norms: Normalizers that take up what follows.
        bypassed: Modules whose call has been left out.
    """

    source: str
    imports: tuple[tuple[str, str, str], ...]
    chains: tuple[str, ...]
    accepts: tuple[str, ...]
    arguments: tuple[tuple[str, type], ...]
    attributes: tuple[tuple[Path, str, Any], ...]
    structure: tuple[tuple[Path, tuple[tuple[str, type | None], ...]], ...]
    norms: tuple[Path, ...]
    bypassed: tuple[Path, ...]
    run: Callable[..., Any] = field(init=False, repr=False, compare=False)
    _usual: tuple[type, ...] | None = field(init=False, repr=False, compare=False)
    _watch: _Watch | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        self.run = _compiled(self.source, self.imports)
        quick = len(self.accepts) == len(self.arguments) and all(kind is not list for _, kind in self.arguments)
        self._usual = (Tensor,) * len(self.accepts) if quick else None

    def __reduce__(self) -> tuple[Any, ...]:  # for copies, too: what is watched belongs to one module
        return Program, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def fits(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether everything is as it was when the program was written."""
        if not self._takes(args, kwargs):
            return False
        if self._watch is None or not self._watch.holds(module):
            self._watch = self._observed(module)
        return self._watch is not None

    def _takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if not kwargs and tuple(map(type, args)) == self._usual:
            return True
        given = dict(zip(self.accepts, args, strict=False))
        if len(args) > len(self.accepts) or not kwargs.keys() <= set(self.accepts[len(args) :]):
            return False
        given |= kwargs
        return not any(issubclass(type(value), fx.Proxy) for value in given.values()) and all(
            type(value) is list if kind is list else value is not None and isinstance(value, kind)
            for value, kind in ((given.get(name), kind) for name, kind in self.arguments)
        )

    def _observed(self, module: Module) -> _Watch | None:
        """Look at all of it; on success, what to keep an eye on."""
        if not (
            all(_same_children(at(module, path), children) for path, children in self.structure)
            and all(vars(at(module, path)).get(name, _ABSENT) == value for path, name, value in self.attributes)
            and all(fusable(at(module, path)) for path in self.norms)
            and all(unhooked(at(module, path)) for path in (*self.norms, *self.bypassed))
        ):
            return None
        held = [at(module, path)._modules for path, _ in self.structure]
        chained = [at(module, path) for path in (*self.norms, *self.bypassed)]
        # What may be changed in place is compared with what it was, the rest with what it is.
        plain = [(vars(at(module, path)), name, value) for path, name, value in self.attributes]
        switches = [(vars(at(module, path)), "activation") for path in self.norms]
        switches += [(vars(each), "forward") for each in chained]
        plain += [(d, name, d.get(name, _ABSENT)) for d, name in switches]
        return _Watch(
            RemovableHandle.next_id,
            tuple((d, tuple(d.values()), tuple(map(type, d.values()))) for d in held),
            tuple((d, name) for d, name, _ in plain),
            [value for *_, value in plain],
            tuple(hooks for each in chained for hooks in _hooks(each)),
        )


_ABSENT = object()


class _Watch(NamedTuple):
    """What can change behind a program's back, such that a look costs two microseconds and not thirty.

    Attributes:
        handles: How many hooks have been registered in this process.
        children: Dictionaries of children with what they held, and its classes.
        plain: Entries of `__dict__`.
        values: What they were.
        hooks: Dictionaries of hooks, all empty.
    """

    handles: int
    children: tuple[tuple[dict[str, Module | None], tuple[Module | None, ...], tuple[type, ...]], ...]
    plain: tuple[tuple[dict[str, Any], str], ...]
    values: list[Any]
    hooks: tuple[Mapping[int, Any], ...]

    def holds(self, module: Module) -> bool:
        """Whether nothing has changed."""
        if RemovableHandle.next_id != self.handles or module._modules is not self.children[0][0] or any(self.hooks):
            return False
        for held, members, kinds in self.children:
            if tuple(held.values()) != members or tuple(map(type, members)) != kinds:
                return False
        return [held.get(name, _ABSENT) for held, name in self.plain] == self.values


def _same_children(module: Module, children: tuple[tuple[str, type | None], ...]) -> bool:
    held = module._modules
    return len(held) == len(children) and all(
        kind is (None if (child := held.get(name)) is None else base_of(type(child)))
        or (kind is Layer and isinstance(child, Layer))
        for name, kind in children
    )


def at(module: Module, path: Path) -> Module:
    """The module at a path below another."""
    for name in path:
        module = cast(Module, module._modules[name])
    return module


@functools.lru_cache(maxsize=1024)
def _compiled(source: str, imports: tuple[tuple[str, str, str], ...]) -> Callable[..., Any]:
    """Blocks of a network that are alike share one function."""
    names: dict[str, Any] = {}
    for name, module, there in imports:
        names[name] = functools.reduce(getattr, there.split(".") if there else [], importlib.import_module(module))
    file = f"<fused forward {zlib.crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    exec(compile(source, file, "exec"), names)  # noqa: S102 - written by torch.fx
    return cast("Callable[..., Any]", names["forward"])


# --- what programs are made of ------------------------------------------------------------------------------------


def _hooks(module: Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def unhooked(module: Module) -> bool:
    """Whether a call of a module is a call of its class's forward and nothing else."""
    return not any(_hooks(module)) and "forward" not in vars(module)


_LAYERS = frozenset(
    getattr(nn, name)
    for name in (
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
        "LayerNorm", "LayerNorm2d", "Norm", "RMSNorm", "SyncBatchNorm",
    )
)  # fmt: skip


def fusable(module: Module) -> bool:
    """Whether a module is a normalizer that can take up a residual and an activation."""
    return isinstance(module, Layer) and module.activation is None and _takes_up(cast(Any, type(module)))


@functools.lru_cache(maxsize=1024)
def _takes_up(cls: type[Module]) -> bool:
    """A class of the list or, by a trait, of another library, under traits that pass on what they get."""
    if issubclass(base_of(cls), Layer) and base_of(cls) not in _LAYERS:
        return False
    for base in cls.__mro__:
        if "forward" in vars(base):
            parameters = inspect.signature(vars(base)["forward"]).parameters
            if "residual" in parameters or "kwargs" not in parameters:
                return "residual" in parameters
    return False


def fuse_norm(norm: Module, x: Tensor, residual: Any, activation: str | None) -> Tensor:
    """activation(norm(x) + residual) in one pass, where the residual has the shape and dtype of x."""
    if residual is not None and not _alike(x, residual):
        y = cast(Tensor, norm.forward(x)) + residual
        return y if activation is None else ACTIVATIONS[activation].forward(y)
    try:
        return cast(Tensor, _activated(norm, activation).forward(x, residual))
    except NormscopeError as error:
        error.context["layer"] = path_of(norm)
        raise


def _activated(norm: Module, activation: str | None) -> Module:
    """The same normalizer with an activation: another object on the very same `__dict__`, for one call."""
    if activation is None:
        return norm
    cls = _activated_class(cast(Any, type(norm)), activation)
    view = cls.__new__(cls)
    object.__setattr__(view, "__dict__", vars(norm))
    return view


@functools.lru_cache(maxsize=1024)
def _activated_class(cls: type[Module], activation: str) -> type[Module]:
    body = {"activation": property(lambda _: activation), "_base": base_of(cls), "_traits": traits_of(cls)}
    return type(cls.__name__, (cls,), body)


def adds_first(module: Module) -> bool:
    """Whether a normalizer can take up the sum before it: LayerNorm, RMSNorm, and those that know how by themselves."""
    # A layer with a forward of its own may do more.
    return hasattr(module, "add_norm") or type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)


def add_then_norm(norm: Any, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """(norm(a + b), a + b) in one pass, where both have the same shape and dtype."""
    if not _alike(a, b):
        total = a + b
        return cast(Tensor, norm.forward(total)), total
    if hasattr(norm, "add_norm"):
        return cast("tuple[Tensor, Tensor]", norm.add_norm(a, b))
    bias, center = getattr(norm, "bias", None), isinstance(norm, nn.LayerNorm)
    return add_norm(a, b, norm.normalized_shape, norm.weight, bias, norm.eps, center=center)


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
