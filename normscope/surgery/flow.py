"""Flows: what a module's forward computes, traced, with all that must hold for the trace to be true.

torch.fx traces one module at a time, with every module that it calls as a leaf (Sequentials are looked into): a
network whose top cannot be traced still has blocks that can. A trace is one path through the code, with all that is no
tensor baked in and every context left out. So it counts only if the code asks for nothing that cannot be recorded: the
trace is repeated under other modes of gradients and autocast, in training and evaluation; the code must change no such
mode, draw no random number and keep no state; plain attributes that it reads and the kinds of its arguments become
conditions. What remains is outside of the model: global variables, and what is printed.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import copy
import enum
import functools
import inspect
import operator
import random
import threading
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import Module

from normscope.surgery.fused import Path, at, unhooked
from normscope.surgery.state import uninterrupted
from normscope.surgery.traits import base_of

__all__ = [
    "IN_PLACE",
    "Flow",
    "UntraceableError",
    "flows_of",
    "has_own_forward",
    "is_plain_sequential",
    "only_holds",
    "options_of",
    "path_of",
]


class UntraceableError(Exception):
    """A forward that a trace cannot represent; the message says why."""


class _DrawnError(UntraceableError):
    """Random numbers were drawn meanwhile: by the forward, or by another thread."""


# A forward that draws random numbers draws them every time, another thread may not.
TRIES = 3
# Times that a forward may choose a branch by a value: each doubles the paths, all of which are traced.
CHOICES = 4

# What every module has, and a module's code reads only through functions of torch.
_REGISTERED = frozenset(vars(Module())) - {"training"}
_CONSTANTS = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    types.FunctionType, types.BuiltinFunctionType, type, enum.Enum,
)  # fmt: skip


def _is_constant(value: Any) -> bool:
    """Whether a program can see that a plain attribute is what it was."""
    if isinstance(value, dict):
        return all(map(_is_constant, (*value, *value.values())))
    return all(map(_is_constant, value)) if isinstance(value, (tuple, list, set)) else isinstance(value, _CONSTANTS)


def options_of(module: Module) -> dict[str, Any]:
    """The plain attributes of a module that are no objects of somebody's class, its mode aside."""
    held = vars(module)
    return {name: held[name] for name in held.keys() - _REGISTERED - {"training"} if _is_constant(held[name])}


def is_plain_sequential(module: Module) -> bool:
    """Whether a module calls its children in order and does nothing else."""
    return base_of(type(module)).forward is nn.Sequential.forward


def only_holds(module: Module) -> bool:
    """Whether a module, as ModuleList, has no forward."""
    return type(module).forward is Module.forward


def has_own_forward(module: Module) -> bool:
    """Whether a module runs the forward of its class, in Python."""
    return not (
        isinstance(module, torch.jit.ScriptModule)
        or only_holds(module)
        or "forward" in vars(module)
        or type(module).__name__ == "OptimizedModule"  # of torch.compile, which fuses in its own way
    )


class _Value(fx.Proxy):
    """A traced value that records x += y, which torch.fx reads as x + y."""

    tracer: _Tracer

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __int__(self) -> NoReturn:
        self.tracer.refuse("it makes a number of Python of a value")

    def __float__(self) -> NoReturn:
        self.tracer.refuse("it makes a number of Python of a value")


def _recorded_in_place(function: Callable[..., Any]) -> Callable[[_Value, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


IN_PLACE = {getattr(operator, name) for name in fx.graph.inplace_methods}
for _function in IN_PLACE - {operator.setitem}:
    setattr(_Value, f"__{_function.__name__}__", _recorded_in_place(_function))


# Of tensors they make a tensor.
_OPERATORS = {operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, torch.cat}


# Held while anything is patched: a second trace would take the first one's patches for the original.
_PATCHING = threading.RLock()


class _Tracer(fx.Tracer):
    """Traces one module's forward, every module that it calls a leaf.

    Args:
        owner: The module.
        looked_into: Modules that are no leaves, besides Sequentials.
        kind: What an argument answers to isinstance: Tensor or list.
        optional: Trace arguments that have a default, too; without it they have the default.
        tensors: Modules known to return tensors. Where they are given, the path is that of the model as it is now: the
            code may read any object, go through parameters, ask for the types of what these modules return, and choose
            branches by values.
        answers: How the first choices between branches fall; the others fall for the first branch.
    """

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(
        self,
        owner: Module,
        looked_into: Collection[Module],
        kind: type,
        *,
        optional: bool = False,
        tensors: Collection[Module] | None = None,
        answers: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self.looked_into, self.optional, self.kind, self.tensors = looked_into, optional, kind, tensors
        self.answers = answers
        self.chosen: tuple[bool, ...] = ()
        self.names = {module: tuple(name.split(".")) if name else () for name, module in owner.named_modules()}
        self.reads: dict[tuple[Path, str], Any] = {}
        self.defaults: dict[str, Any] = {}
        self.accepts: list[str] = []
        self.asked: set[str] = set()
        self.inlined: dict[Path, None] = {}
        self.refused: UntraceableError | None = None
        self.modes, self.inside, self.thread = _modes(), False, threading.get_ident()
        self.open: dict[int, tuple[Any, Any]] = {}
        try:
            with _PATCHING, self._reading():
                self.trace(owner)
        finally:
            kept = [_bring_back(value, was) for value, was in self.open.values()]
        if any(kept):
            raise UntraceableError("it keeps a state of its own")
        if self.refused is not None:  # and the code has caught it
            raise self.refused

    def refuse(self, reason: str) -> NoReturn:
        """Give up."""
        self.refused = self.refused or UntraceableError(reason)
        raise self.refused

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Note every plain attribute of a module that is read; for all modules, as torch.fx does it with calls.

        `isinstance` answers for traced values what it would for tensors. Nothing less than the builtin will do: a
        `__class__` of the values is also believed by torch's own parser of arguments, which then reads the Python
        object as a tensor and crashes; and a forward may ask through functions of any module. To all but traced values
        the patched one answers as the original, and other threads' modules are read and called as ever.
        """

        def getattribute(module: Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if threading.get_ident() != self.thread:
                return value
            if name in ("_parameters", "_buffers"):
                if self.tensors is None and not self.inside:  # a parameter's dtype, say, which half() changes
                    self.refuse("it goes through its parameters")
            elif name not in _REGISTERED and name in object.__getattribute__(module, "__dict__"):
                self._read(module, name, value)
            return value

        def isinstance_(value: Any, kinds: Any) -> bool:
            if type(value) is _Value:
                return issubclass(_Value, kinds) or issubclass(self.kind_of(value.node), kinds)
            return original(value, kinds)

        original = builtins.isinstance
        try:
            Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
            builtins.isinstance = isinstance_
            yield
        finally:
            with uninterrupted():
                builtins.isinstance = original
                if "__getattribute__" in vars(Module):
                    del Module.__getattribute__

    def _read(self, module: Module, name: str, value: Any) -> None:
        self._watch(value)
        if self.tensors is not None and not (module in self.names and _is_constant(value)):
            return
        if not _is_constant(value):
            self.refuse(f"it reads {name!r}, a {type(value).__name__}, which may change without notice")
        if module not in self.names:
            self.refuse(f"it reads {name!r} of a module that it does not hold")
        self.reads.setdefault((self.names[module], name), copy.deepcopy(value))

    def _watch(self, value: Any, depth: int = 2) -> None:
        """Keep what the code could change in it: its members, and those of the containers that an object holds."""
        if isinstance(value, (dict, list, set)):
            if id(value) not in self.open:
                self.open[id(value)] = value, copy.copy(value)
        elif (
            depth
            and hasattr(value, "__dict__")
            and not isinstance(value, (Module, Tensor, types.ModuleType, *_CONSTANTS))
        ):
            self._watch(vars(value), 0)
            for member in list(vars(value).values()):
                self._watch(member, depth - 1)

    def create_args_for_root(self, root_fn: Any, *_: Any) -> tuple[Any, list[Any]]:
        """Make the arguments that have no default, or all."""
        values = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                self.refuse("it takes positional-only arguments")
            required = parameter.default is parameter.empty
            if required or self.optional:
                default = () if required else (parameter.default,)
                values.append(self.create_proxy("placeholder", parameter.name, default, {}))
                self.accepts.append(parameter.name)
            if not required:
                self.defaults[parameter.name] = parameter.default
        names = tuple(self.accepts)
        return lambda *traced: root_fn(self.root, **dict(zip(names, traced, strict=True))), values

    def is_leaf_module(self, m: Module, _: str) -> bool:
        """Look into Sequentials and into those that were named."""
        if not (is_plain_sequential(m) or m in self.looked_into) or not unhooked(m):
            return True
        self.inlined[self.names[m]] = None
        return False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wrap a node."""
        return _Value(node, self)

    def kind_of(self, node: fx.Node) -> type:
        """What a value answers to isinstance."""
        if node.op == "call_module" and self.root.get_submodule(str(node.target)) in (self.tensors or ()):
            return Tensor
        if node.op == "call_function" and node.target in _OPERATORS and self.tensors is not None:
            return Tensor
        if node.op != "placeholder":
            self.refuse("it asks for the type of a value that it has computed")
        self.asked.add(cast(str, node.target))
        return self.kind

    def create_arg(self, a: Any) -> Any:
        """As in torch.fx, without asking a traced value for its type."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        with self._torch_inside():
            return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As in torch.fx, which looks for the name of a parameter."""
        if threading.get_ident() != self.thread:
            return attr_val
        with self._torch_inside():
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """As in torch.fx, which takes the calls of other threads for this one's."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    @contextlib.contextmanager
    def _torch_inside(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before

    def get_fresh_qualname(self, _: str) -> str:
        """Refuse where torch.fx would store a tensor in the module."""
        self.refuse("it makes a tensor from nothing but numbers or parameters")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what runs in a context, of which a trace knows nothing."""
        if _modes() != self.modes:
            self.refuse("a part of it runs under modes of its own: gradients, autocast or checkpointing")
        return super().create_node(*args, **kwargs)

    def to_bool(self, _: fx.Proxy) -> bool:
        """Choose a branch, or refuse where that would take more than can be told of a value."""
        if self.tensors is None or len(self.chosen) == CHOICES:
            self.refuse("it chooses between branches by the value of a tensor")
        self.chosen += (len(self.chosen) >= len(self.answers) or self.answers[len(self.chosen)],)
        return self.chosen[-1]


def _bring_back(value: Any, was: Any) -> bool:
    """Undo what was done to a list, dictionary or set; whether it was."""
    now, then = ([*v.items()] if isinstance(v, dict) else [(each,) for each in v] for v in (value, was))
    if len(now) == len(then) and all(a is b for x, y in zip(now, then, strict=True) for a, b in zip(x, y, strict=True)):
        return False
    value.clear()
    value.extend(was) if isinstance(value, list) else value.update(was)
    return True


def _modes() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks


@contextlib.contextmanager
def _other_modes() -> Iterator[None]:
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    with torch.no_grad():
        try:
            for device, enabled in before.items():
                torch.set_autocast_enabled(device, not enabled)
            yield
        finally:
            for device, enabled in before.items():
                torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def _held(owner: Module) -> Iterator[None]:
    """Refuse a forward that changes modules or draws random numbers while it is traced; take back what it did."""
    modules = [module for module in owner.modules() if not isinstance(module, torch.jit.ScriptModule)]
    training = [module.training for module in modules]
    parts = [part for m in modules for part in (vars(m), m._parameters, m._buffers, m._modules)]
    before, drawn = [dict(part) for part in parts], _random_states()
    error: UntraceableError | None = None
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            vars(module)["training"] = mode
        for part, was in zip(parts, before, strict=True):
            if part.keys() != was.keys() or any(part[key] is not was[key] for key in was):
                error = UntraceableError("it keeps a state of its own")
                part.clear()
                part.update(was)
        if _random_states() != drawn:
            error = _DrawnError("it draws random numbers to decide what it does")
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002
            torch.set_rng_state(torch.frombuffer(bytearray(drawn[2]), dtype=torch.uint8))
    if error is not None:
        raise error


def _random_states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (name, tuple(keys), *rest), torch.get_rng_state().numpy().tobytes()


@dataclass(eq=False)
class Flow:
    """One path through a module's forward.

    Attributes:
        owner: The module.
        graph: What it computes.
        accepts: The arguments it can be called with.
        arguments: What arguments must be.
        attributes: What plain attributes must be.
        inlined: The modules that were looked into.
    """

    owner: Module
    graph: fx.Graph
    accepts: tuple[str, ...]
    arguments: dict[str, type]
    attributes: dict[tuple[Path, str], Any]
    inlined: tuple[Path, ...]

    def module(self, node: fx.Node) -> Module | None:
        """The module that a node calls."""
        return at(self.owner, path_of(node)) if node.op == "call_module" else None

    def last(self) -> Module | None:
        """The module whose output the path returns, past identities."""
        value = next(node for node in reversed(self.graph.nodes) if node.op == "output").args[0]
        while isinstance(value, fx.Node) and type(self.module(value)) is nn.Identity:
            value = value.args[0]
        return self.module(value) if isinstance(value, fx.Node) else None

    def calls(self) -> collections.Counter[Module]:
        """How often each module is called."""
        return collections.Counter(m for node in self.graph.nodes if (m := self.module(node)) is not None)


def path_of(node: fx.Node) -> Path:
    """The path of the module that a node calls."""
    return tuple(cast(str, node.target).split("."))


def flows_of(
    owner: Module,
    looked_into: Collection[Module] = (),
    *,
    modes: tuple[bool | None, ...] = (True, False),
    tensors: Collection[Module] | None = None,
) -> list[Flow]:
    """The paths through a forward: in training and evaluation, and for tensors and lists where it asks what it got.

    Args:
        owner: The module.
        looked_into: Modules to trace through, besides Sequentials.
        modes: Values of `training`; None for those that the modules have.
        tensors: Modules known to return tensors; where they are given, the paths are those of the model as it is now.

    Raises:
        UntraceableError: They cannot be known.
    """
    for _ in range(TRIES - 1):
        with contextlib.suppress(_DrawnError):
            return _flows(owner, looked_into, modes, tensors)
    return _flows(owner, looked_into, modes, tensors)


def _flows(
    owner: Module,
    looked_into: Collection[Module],
    modes: tuple[bool | None, ...],
    tensors: Collection[Module] | None,
) -> list[Flow]:
    flows = []
    with _held(owner), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in modes:
            for module in owner.modules() if training is not None else ():
                vars(module)["training"] = training
            found, asked = _branches(owner, looked_into, Tensor, tensors)
            flows += found
            if asked:
                flows += _branches(owner, looked_into, list, tensors)[0]
    return flows


def _branches(
    owner: Module, looked_into: Collection[Module], kind: type, tensors: Collection[Module] | None
) -> tuple[list[Flow], bool]:
    """The paths by every answer to what the code asks of values; whether it asks for the kinds of its arguments."""
    flows, kinds = [], False
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        answers = waiting.pop()
        flow, tracer = _flow(owner, looked_into, kind, tensors, answers)
        flows.append(flow)
        kinds |= bool(tracer.asked)
        waiting += [(*tracer.chosen[:k], False) for k in range(len(answers), len(tracer.chosen))]
    return flows, kinds


def _flow(
    owner: Module,
    looked_into: Collection[Module],
    kind: type,
    tensors: Collection[Module] | None,
    answers: tuple[bool, ...],
) -> tuple[Flow, _Tracer]:
    trace = functools.partial(_Tracer, owner, looked_into, kind, tensors=tensors, answers=answers)
    try:
        with torch.enable_grad():
            tracer = trace()
        with _other_modes():
            other = trace()
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError((str(error) or type(error).__name__).splitlines()[0].split(". ")[0]) from error
    if _signature(other) != _signature(tracer):
        raise UntraceableError("it asks whether gradients or autocast are on")
    reads = tracer.reads | other.reads
    if tracer.defaults:
        # Arguments with a default that are merely passed on may have any value.
        with contextlib.suppress(Exception), torch.enable_grad():
            other = trace(optional=True)
            if _signature(other) == _signature(tracer) and not other.asked - tracer.asked:
                tracer, reads = other, reads | other.reads
    required = [name for name in tracer.accepts if name not in tracer.defaults]
    arguments = {name: kind if name in tracer.asked else object for name in required}
    return Flow(owner, tracer.graph, tuple(tracer.accepts), arguments, reads, tuple(tracer.inlined)), tracer


def _signature(tracer: _Tracer) -> list[Any]:
    """A graph without the names of its nodes, arguments at their defaults, and its branches."""
    numbers: dict[fx.Node, Any] = {}
    rows: list[Any] = [tracer.chosen]
    for node in tracer.graph.nodes:
        if node.op == "placeholder":
            numbers[node] = tracer.defaults.get(node.target, ("argument", node.target))
        else:
            numbers[node] = ("value", len(rows))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)
            rows.append((node.op, node.target, args, kwargs))
    return rows
