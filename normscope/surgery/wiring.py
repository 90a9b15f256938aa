"""Wiring: which layer feeds which normalizer, in every call that a model makes of either.

Forwards are traced in evaluation (`flow`), the whole model where that can be done, else the largest modules of it that
can. One run on the example adds what a trace has not: numbers of axes, which modules are called at all, and whether
somebody outside of what has been traced calls them, too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import Module

from normscope.surgery.absorb import absorbs, outputs_of
from normscope.surgery.chains import reaches, writes
from normscope.surgery.find import paths
from normscope.surgery.flow import Flow, UntraceableError, flows_of, has_own_forward, is_plain_sequential, path_of
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.fused import at, unhooked
from normscope.surgery.state import Snapshot

__all__ = ["BlockedError", "Piece", "Wiring"]


class BlockedError(Exception):
    """A normalizer whose map cannot go where it would have to; the message says why."""


class Piece(NamedTuple):
    """One call of a layer whose channels a normalizer scales.

    Attributes:
        module: The layer.
        node: The call.
        start: The first of the normalizer's channels that are the layer's.
        stop: The end of them.
        repeat: How many channels of the layer in a row each of them is.
    """

    module: Module
    node: fx.Node
    start: int
    stop: int
    repeat: int = 1


class _Axis(NamedTuple):
    """Where the channels lie: the axis, of how many, and whether other axes have been merged into it."""

    axis: int
    rank: int
    merged: bool = False


@dataclass
class _Run:
    """What one forward on the example has shown.

    Attributes:
        inputs: Shapes of what a module got.
        ranks: Numbers of axes of what it returned.
        callers: Modules that were running when it was called, the innermost last.
        others: Modules that returned something else than a tensor.
    """

    inputs: dict[Module, set[tuple[int, ...]]] = field(default_factory=dict)
    ranks: dict[Module, set[int]] = field(default_factory=dict)
    callers: dict[Module, set[tuple[Module, ...]]] = field(default_factory=dict)
    others: set[Module] = field(default_factory=set)


class Wiring:
    """How the normalizers of a model lie among its layers.

    Args:
        model: The model, in evaluation.
        norms: The normalizers in question.
        example: A batch.
        forward: `forward(model, batch)`.
    """

    def __init__(self, model: Module, norms: Collection[Module], example: Any, forward: Forward | None) -> None:
        self.names = {module: names[0] for module, names in paths(model)}
        self.norms = norms
        self.parts = {*norms, *(module for module in self.names if absorbs(module))}
        self.gone: set[Module] = set()  # folded, and without an activation: an identity from now on
        self.run = self._observed(model, example, forward)
        self.flows, self.failures = self._traced(model)
        self.strays = self._strays(model)
        self.calls: dict[Module, list[tuple[Flow, fx.Node]]] = {}
        self.obstacles: dict[Module, str] = {}
        for flows in self.flows.values():
            for flow in flows:
                self._read(flow)

    # --- tracing ------------------------------------------------------------------------------------------------------

    def _traced(self, model: Module) -> tuple[dict[Module, list[Flow]], dict[Module, str]]:
        """The paths through the outermost modules that can be traced, and why others cannot."""
        owners = [module for module in self.names if self._may_own(module)]
        trace = functools.partial(flows_of, modes=(None,), tensors={*self.names} - self.run.others)
        flows: dict[Module, list[Flow]] = {}
        failures: dict[Module, str] = {}
        with contextlib.suppress(UntraceableError):
            if model in owners:
                flows[model] = trace(model, {*owners} - {model})
        inlined = {at(model, path) for flow in flows.get(model, ()) for path in flow.inlined}
        for module in reversed(owners):  # what is called before what calls it
            if module in flows or module in inlined:
                continue
            for inside in ({*flows} - {model}, ()):
                try:
                    flows[module] = trace(module, inside)
                    failures.pop(module, None)
                    break
                except UntraceableError as error:
                    failures[module] = str(error)
        for module in owners:
            for flow in flows.get(module, ()):
                for path in flow.inlined:
                    flows.pop(at(module, path), None)
        return flows, failures

    def _may_own(self, module: Module) -> bool:
        """Whether a module has a forward worth tracing."""
        return (
            module not in self.parts
            and has_own_forward(module)
            and (is_plain_sequential(module) or not type(module).__module__.startswith("torch.nn.modules."))
            and any(child in self.parts for child in module.modules())
        )

    def _read(self, flow: Flow) -> None:
        """Note the calls in a path, and what it takes from modules without calling them."""
        who = self.names[flow.owner] or "the model"
        for node in flow.graph.nodes:
            module = flow.module(node)
            if module is not None and module in self.parts:
                self.calls.setdefault(module, []).append((flow, node))
            elif node.op == "get_attr" and len(path_of(node)) > 1:
                module = at(flow.owner, path_of(node)[:-1])
                self.obstacles[module] = f"{who} reads its {path_of(node)[-1]}"
        for path, name in flow.attributes:
            if (module := at(flow.owner, path)) in self.norms:
                self.obstacles[module] = f"{who} reads its {name}"

    # --- running ------------------------------------------------------------------------------------------------------

    def _observed(self, model: Module, example: Any, forward: Forward | None) -> _Run:
        run = _Run()
        stack: list[Module] = []

        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in self.parts:
                first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None)
                run.inputs.setdefault(module, set()).add(() if first is None else tuple(first.shape))
                run.callers.setdefault(module, set()).add(tuple(stack))
            stack.append(module)

        def leave(module: Module, _: Any, output: Any) -> None:
            stack.pop()
            if not isinstance(output, Tensor):
                run.others.add(module)
            elif module in self.parts:
                run.ranks.setdefault(module, set()).add(output.dim())

        with Snapshot(model), quiet():
            for module in self.names:
                if not isinstance(module, torch.jit.ScriptModule):
                    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
                    module.register_forward_hook(leave, always_call=True)
            feed(model, example, forward)
        return run

    def _strays(self, model: Module) -> dict[Module, Module]:
        """Modules that were called by something that has not been traced, with that."""
        inlined = {at(m, path) for m, flows in self.flows.items() for flow in flows for path in flow.inlined}
        called = {m: {c for flow in flows for c in flow.calls()} for m, flows in self.flows.items()}
        strays = {}
        for module, stacks in self.run.callers.items():
            for stack in stacks:
                caller = next((m for m in reversed(stack) if m not in inlined), model)
                if module not in called.get(caller, ()):
                    strays[module] = caller
        return strays

    # --- asking -------------------------------------------------------------------------------------------------------

    def rank(self, module: Module) -> int:
        """The number of axes of what a normalizer gets."""
        return self._one({len(shape) for shape in self.run.inputs.get(module, ())})

    def shape(self, module: Module) -> tuple[int, ...]:
        """The shape of what a layer has got."""
        return min(self.run.inputs[module])

    def reach(self, module: Module) -> None:
        """Make sure that all calls of a module are known.

        Raises:
            BlockedError: They are not.
        """
        if module in self.obstacles:
            raise BlockedError(self.obstacles[module])
        if module not in self.run.inputs:
            raise BlockedError("the example does not reach it")
        if module in self.strays:
            caller = self.strays[module]
            where = f"the forward of {self.names.get(caller) or 'the model'} ({type(caller).__name__})"
            reason = self.failures.get(caller, "it calls what its trace does not show")
            raise BlockedError(f"{where} cannot be traced: {reason}")

    def behind(self, norm: Module) -> list[Piece]:
        """The layers whose output a normalizer gets, in all its calls.

        Raises:
            BlockedError: It gets something else, or somebody else gets that, too.
        """
        pieces = []
        for flow, node in self.calls[norm]:
            found, place = self._back(flow, self._input(node), node)
            if place[:2] != (1, self.rank(norm)):
                raise BlockedError(f"its channels are not those of {self._named(found[0].module)}")
            pieces += found
        return self._complete(pieces)

    def before(self, norm: Module) -> list[Piece]:
        """The layers that get the output of a normalizer, in all its calls.

        Raises:
            BlockedError: Something else gets it, too, or they get something else.
        """
        pieces: list[Piece] = []
        for flow, node in self.calls[norm]:
            value = self._input(node)
            found = self._on(flow, node, _Axis(1, self.rank(norm)), norm)
            # Until now the layers got a tensor of their own; then they get the one that went into the normalizer.
            nodes = list(flow.graph.nodes)
            later = nodes[nodes.index(node) + 1 : max(nodes.index(piece.node) for piece in found)]
            if any(writes(flow, each) and reaches(flow, each, value) for each in later):
                raise BlockedError("what it gets may be overwritten before it is used")
            pieces += found
        return self._complete(pieces)

    def _complete(self, pieces: list[Piece]) -> list[Piece]:
        """One piece per layer, each of whose calls must be among them."""
        found: dict[Module, Piece] = {}
        for piece in pieces:
            module, name = piece.module, self._named(piece.module)
            self.reach(module)
            if found.setdefault(module, piece)[2:] != piece[2:]:
                raise BlockedError(f"{name} gives it different channels in different calls")
            nodes = {each.node for each in pieces if each.module is module}
            calls = {node for _, node in self.calls[module]}
            if nodes != calls:
                raise BlockedError(f"{name} is called {len(calls)} times, {len(calls - nodes)} of them without it")
        return list(found.values())

    # --- following values ---------------------------------------------------------------------------------------------

    def _back(self, flow: Flow, value: Any, user: fx.Node) -> tuple[list[Piece], _Axis]:
        """What a value is made of: calls of layers, and where their channels lie in it."""
        if not isinstance(value, fx.Node) or value.op == "placeholder":
            raise BlockedError("its input is that of " + (self.names[flow.owner] or "the model"))
        others = [other for other in value.users if other is not user and not _asks_for_form(other, value)]
        module = flow.module(value)
        if others:
            raise BlockedError(f"{self._described(flow, value)} is used elsewhere, too")
        if module is not None and module in self.parts and module not in self.gone:
            return self._source(value, module)
        if self._passes(flow, value):
            return self._back(flow, value.args[0], value)
        if _is_concatenation(value):
            return self._joined(flow, value)
        found = _view(module, value)
        if found is None:
            raise BlockedError(f"its input is {self._described(flow, value)}")
        pieces, place = self._back(flow, value.args[0], value)
        place = found(place)
        if place.merged:
            raise BlockedError("its channels are other axes, too")
        return pieces, place

    def _source(self, node: fx.Node, module: Module) -> tuple[list[Piece], _Axis]:
        self._input(node)
        self.reach(module)
        rank = self._one(self.run.ranks.get(module, set()))
        width = outputs_of(module)
        if module in self.norms:
            place = _Axis(1, rank)
        elif isinstance(module, nn.modules.conv._ConvNd):
            place = _Axis(rank - len(module.kernel_size) - 1, rank)
        else:
            place = _Axis(rank - 1, rank)
        return [Piece(module, node, 0, width)], place

    def _joined(self, flow: Flow, node: fx.Node) -> tuple[list[Piece], _Axis]:
        """Tensors side by side, along their channels."""
        parts, dim = _concatenated(node)
        pieces: list[Piece] = []
        places = set()
        start = 0
        for part in parts:
            found, place = self._back(flow, part, node)
            pieces += [p._replace(start=p.start + start, stop=p.stop + start) for p in found]
            start = max(p.stop for p in pieces)
            places.add(place)
        place = places.pop()
        if places or dim % place.rank != place.axis:
            raise BlockedError("its input is made of tensors that do not lie side by side along their channels")
        return pieces, place

    def _on(self, flow: Flow, value: fx.Node, place: _Axis, norm: Module) -> list[Piece]:
        """The layers that get a value, all of them."""
        pieces: list[Piece] = []
        for user in value.users:
            if _asks_for_form(user, value):
                continue
            module = flow.module(user)
            view = _view(module, user)
            if self._passes(flow, user):
                pieces += self._on(flow, user, place, norm)
            elif view is not None and user.args[0] is value:
                pieces += self._on(flow, user, view(place), norm)
            elif module is not None and absorbs(module) and not isinstance(module, nn.Embedding):
                self._input(user)
                pieces.append(self._sink(user, module, place, outputs_of(norm)))
            else:
                raise BlockedError(f"its output goes to {self._described(flow, user)}")
        if not pieces:
            raise BlockedError("its output goes nowhere else")
        return pieces

    def _sink(self, node: fx.Node, module: Module, place: _Axis, width: int) -> Piece:
        if isinstance(module, nn.modules.conv._ConvNd):
            axis, channels = place.rank - len(module.kernel_size) - 1, module.in_channels
        else:
            axis, channels = place.rank - 1, cast(int, module.in_features)
        if axis != place.axis or channels % width or (channels != width and not place.merged):
            raise BlockedError(f"its channels are not those that {self._named(module)} sums over")
        return Piece(module, node, 0, width, channels // width)

    def _passes(self, flow: Flow, node: fx.Node) -> bool:
        """Whether a node returns what it gets."""
        if len(node.args) != 1 or node.kwargs:
            return False
        module = flow.module(node)
        if module is not None:
            idle = type(module) is nn.Identity or (isinstance(module, _DROPOUTS) and not module.training)
            return module in self.gone or (idle and unhooked(module))
        return node.op == "call_method" and node.target == "contiguous"

    def _input(self, node: fx.Node) -> Any:
        """What a module is called with, where that is one tensor."""
        if len(node.args) + len(node.kwargs) != 1:
            raise BlockedError("it is called with more than one argument")
        return next(iter((*node.args, *node.kwargs.values())))

    @staticmethod
    def _one(ranks: Collection[int]) -> int:
        if len(ranks) != 1:
            raise BlockedError("it gets tensors with different numbers of axes")
        return next(iter(ranks))

    def _named(self, module: Module) -> str:
        return self.names[module] or "the model itself"

    def _described(self, flow: Flow, node: fx.Node) -> str:
        module = flow.module(node)
        if module is not None:
            return f"the output of {self._named(module)} ({type(module).__name__})"
        if node.op == "output":
            return "the output of " + (self.names[flow.owner] or "the model")
        return f"the result of {getattr(node.target, '__name__', node.target)}"


_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_FORM = {"size", "dim", "numel", "ndimension", "get_device", "is_floating_point", "element_size"}


def _asks_for_form(user: fx.Node, value: fx.Node) -> bool:
    """Whether a node asks for nothing but shape, dtype or device of a value."""
    if user.op == "call_method":
        like = user.target in ("reshape_as", "view_as", "expand_as", "type_as") and user.args[0] is not value
        return user.target in _FORM or like
    return (
        user.op == "call_function" and user.target is getattr and user.args[1] in ("shape", "dtype", "device", "ndim")
    )


def _is_concatenation(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (torch.cat, torch.concat, torch.concatenate)


def _concatenated(node: fx.Node) -> tuple[Collection[Any], int]:
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    parts, dim = given.get("tensors"), given.get("dim", given.get("axis", 0))
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int):
        raise BlockedError("its input is a concatenation of unknown parts")
    return parts, dim


def _view(module: Module | None, node: fx.Node) -> Callable[[_Axis], _Axis] | None:
    """How a node moves axes, where it does nothing else, as a function of where the channels lie."""
    if type(module) is nn.Flatten and unhooked(module):
        return functools.partial(_flatten, start_dim=module.start_dim, end_dim=module.end_dim)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if (
        module is not None
        or name not in _VIEWS
        or (node.op == "call_function" and node.target is not getattr(torch, name))
    ):
        return None

    def moved(place: _Axis) -> _Axis:
        try:
            return _VIEWS[name](place, *node.args[1:], **node.kwargs)
        except (TypeError, ValueError, ZeroDivisionError):
            raise BlockedError(f"{name} moves its channels in a way unknown here") from None

    return moved


def _transpose(place: _Axis, dim0: int, dim1: int) -> _Axis:
    pair = dim0 % place.rank, dim1 % place.rank
    return place._replace(axis=pair[1 - pair.index(place.axis)] if place.axis in pair else place.axis)


def _permute(place: _Axis, *dims: Any) -> _Axis:
    order = [dim % place.rank for dim in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)]
    return place._replace(axis=order.index(place.axis))


def _flatten(place: _Axis, start_dim: int = 0, end_dim: int = -1) -> _Axis:
    start, end = start_dim % place.rank, end_dim % place.rank
    if start < place.axis <= end:
        raise BlockedError("its channels are merged with other axes")
    axis = place.axis - (end - start) if place.axis > end else place.axis
    return _Axis(axis, place.rank - (end - start), place.merged or start == place.axis < end)


_VIEWS: dict[str, Callable[..., _Axis]] = {"transpose": _transpose, "permute": _permute, "flatten": _flatten}
