"""Chains: what follows a normalizer in a module's forward, and the program in which the normalizer takes it up.

activation(norm(x) + residual)      norm(x) + residual      activation(norm(x))      norm(a + b), a + b
"""

from __future__ import annotations

import ast
import collections
import contextlib
import importlib
import operator
import types
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import Module

from normscope.nn.base import Layer
from normscope.surgery.activations import activation_of, name_of_function
from normscope.surgery.flow import IN_PLACE, Flow, UntraceableError, options_of, path_of
from normscope.surgery.fused import Path, Program, add_then_norm, adds_first, at, fuse_norm, unhooked
from normscope.surgery.traits import base_of

__all__ = ["programs_from", "reaches", "writes"]


class _Chain(NamedTuple):
    """A normalizer's call with what it can take up.

    Attributes:
        norm: The call.
        add: The addition that follows it, or, with `first`, precedes it.
        residual: What is added.
        activation: The name of the activation that ends it.
        bypassed: Calls that are left out, identities and activation.
        last: The node whose value the chain has.
        first: Whether the sum is normalized.
    """

    norm: fx.Node
    add: fx.Node | None
    residual: fx.Node | None
    activation: str | None
    bypassed: tuple[fx.Node, ...]
    last: fx.Node
    first: bool = False

    def __str__(self) -> str:
        norm = str(self.norm.target)
        if self.first:
            return f"sum → {norm}"
        return norm + (" + residual" if self.add else "") + (f" → {self.activation}" if self.activation else "")


def programs_from(
    flows: list[Flow], norms: Collection[Module], calls: collections.Counter[Module]
) -> tuple[tuple[Program, ...], dict[Module, str]]:
    """Programs for a module in which normalizers take up what follows them.

    Args:
        flows: The paths through its forward.
        norms: The normalizers that may.
        calls: How often each is called in the model.

    Returns:
        The programs, none where nothing can be fused; and the normalizers that something stands in the way of, with
        the reason.
    """
    programs: list[Program] = []
    reasons: dict[Module, str] = {}
    for flow in flows:
        chains: list[_Chain] = []
        for node in list(flow.graph.nodes):
            norm = flow.module(node)
            if norm is None or norm not in norms:
                continue
            chain = _after(flow, node) or _before(flow, node)
            reason = _obstacle(flow, chain, calls[norm]) if chain else _out_of_reach(flow, node)
            if reason is not None:
                reasons[norm] = reason
            elif chain is not None:
                chains.append(chain)
                _rewrite(flow.graph, chain)
        if chains:
            programs.append(_program(flow, chains))
    return _merged(programs), reasons


# --- finding ------------------------------------------------------------------------------------------------------


def _after(flow: Flow, node: fx.Node) -> _Chain | None:
    """What follows a normalizer."""
    if len(node.args) != 1 or node.kwargs:
        return None
    value, bypassed = _through(flow, node)
    add = residual = activation = None
    if (user := _only_user(value)) is not None and (residual := _added(user, value)) is not None:
        add = user
        value, identities = _through(flow, user)
        bypassed += identities
    if (user := _only_user(value)) is not None and (activation := _activation(flow, user, value)) is not None:
        value = user
        bypassed += (user,)
    chained = add is not None or activation is not None
    return _Chain(node, add, residual, activation, bypassed, value) if chained else None


def _before(flow: Flow, node: fx.Node) -> _Chain | None:
    """A sum that is normalized and used elsewhere, too."""
    add = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not adds_first(cast(Module, flow.module(node))) or not isinstance(add, fx.Node):
        return None
    if add.op != "call_function" or add.target not in (operator.add, torch.add):
        return None
    residual = _added(add, add.args[0])
    return None if residual is None else _Chain(node, add, residual, None, (), node, first=True)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _through(flow: Flow, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Past the identities that follow a node."""
    passed: list[fx.Node] = []
    while (user := _only_user(node)) is not None and type(flow.module(user)) is nn.Identity:
        passed.append(user)
        node = user
    return node, tuple(passed)


def _added(user: fx.Node, value: Any) -> fx.Node | None:
    """The other summand where a node adds two tensors; an addition in place must be into the value."""
    adds = user.target in (("add", "add_") if user.op == "call_method" else (operator.add, operator.iadd, torch.add))
    if user.op == "call_module" or not adds or len(user.args) != 2 or user.kwargs:
        return None
    a, b = user.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
        return None
    if b is value:
        a, b = (b, a) if user.target not in ("add_", operator.iadd) else (a, b)
    return b if a is value else None


def _activation(flow: Flow, user: fx.Node, value: fx.Node) -> str | None:
    if user.all_input_nodes != [value] or not user.args or user.args[0] is not value:
        return None
    module = flow.module(user)
    if module is not None:
        return activation_of(module) if len(user.args) == 1 and not user.kwargs else None
    function = user.target if user.op == "call_function" else getattr(Tensor, str(user.target), None)
    return name_of_function(function, user.args[1:], user.kwargs)


def _out_of_reach(flow: Flow, node: fx.Node) -> str | None:
    """Why a normalizer cannot have what seems to follow it; None where nothing does."""

    def taken(value: fx.Node) -> bool:
        return any(_activation(flow, user, value) or _added(user, value) for user in value.users)

    value, _ = _through(flow, node)
    user = _only_user(value)
    if user is None:
        return "its output is used elsewhere, too" if taken(value) else None
    module = flow.module(user)
    name = type(module).__name__ if module is not None else getattr(user.target, "__name__", "")
    if "drop" in name.lower() and taken(user):
        return f"{name} lies between"
    if module is not None and type(module).__module__ == "torch.nn.modules.activation" and not module._modules:
        return f"{name} has no fused form" if activation_of(module) is None else None
    return None


# --- safety -------------------------------------------------------------------------------------------------------


def _obstacle(flow: Flow, chain: _Chain, calls: int) -> str | None:
    """Why a chain must stay as it is, or None."""
    if calls > 1:
        return f"it is called {calls} times"
    for node in (chain.norm, *chain.bypassed):
        module = flow.module(node)
        if module is not None and not unhooked(module):
            return f"{node.target} has hooks, which would miss a value"
    # The call moves from the normalizer to the end of the chain, or, where it takes up the sum before it, to that sum.
    place = {node: k for k, node in enumerate(flow.graph.nodes)}
    start, end = (chain.add, chain.norm) if chain.first else (chain.norm, chain.last)
    value = chain.add if chain.first else chain.norm.args[0]
    taken = {chain.norm, chain.add, *chain.bypassed}
    writers = [node for node in flow.graph.nodes if node not in taken and writes(flow, node)]
    if any(place[start] < place[node] < place[end] and reaches(flow, node, value) for node in writers):
        return "what it normalizes may be overwritten before its output is used"
    # A fused call keeps the residual for the gradient.
    if chain.residual is not None and not chain.first:
        added = place[cast(fx.Node, chain.add)]
        if any(added < place[node] and reaches(flow, node, chain.residual) for node in writers):
            return "what is added to it may be overwritten later"
    return None


_FRESH_MODULES: tuple[type[Module], ...] = (
    Layer, nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.Embedding,
)  # fmt: skip
_FRESH_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, torch.add, torch.cat, fuse_norm,
    add_then_norm,
}  # fmt: skip


def reaches(flow: Flow, node: fx.Node, value: Any) -> bool:
    """Whether a node that writes may write into the memory of a value: a module into all it gets, a function first."""
    written = node.all_input_nodes[: None if node.op == "call_module" else 1]
    return any(not _sources(flow, each).isdisjoint(_sources(flow, value)) for each in written)


def _sources(flow: Flow, node: fx.Node) -> set[fx.Node]:
    """Nodes whose memory a value may be: its own, and, unless it is known to be new, that of what it is made from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not (isinstance(flow.module(node), _FRESH_MODULES) or node.target in _FRESH_FUNCTIONS):
                stack.extend(node.all_input_nodes)
    return found


_HARMLESS = ("torch", "_operator", "math", "builtins", "normscope")


def writes(flow: Flow, node: fx.Node) -> bool:
    """Whether a node may write into its arguments; what is not known may."""
    module = flow.module(node)
    if module is not None:
        known = isinstance(module, Layer) or type(module).__module__.startswith("torch.nn.modules.")
        return not known or bool(module._modules) or bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method") or node.target in IN_PLACE:
        return node.target in IN_PLACE
    name = str(getattr(node.target, "__name__", node.target))
    home = getattr(node.target, "__module__", None) or "torch"
    flagged = True in (node.kwargs.get("inplace"), *(node.args[1:] if home == "torch.nn.functional" else ()))
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or flagged or not (isinstance(node.target, str) or home.startswith(_HARMLESS))


# --- writing ------------------------------------------------------------------------------------------------------


def _rewrite(graph: fx.Graph, chain: _Chain) -> None:
    position = cast(fx.Node, chain.add) if chain.first else chain.last
    with graph.inserting_before(position):
        norm = graph.create_node("get_attr", chain.norm.target)
        if chain.first:
            both = graph.call_function(add_then_norm, (norm, *position.args))
            normalized, total = (graph.call_function(operator.getitem, (both, k)) for k in (0, 1))
            position.replace_all_uses_with(total)
            chain.norm.replace_all_uses_with(normalized)
        else:
            fused = graph.call_function(fuse_norm, (norm, chain.norm.args[0], chain.residual, chain.activation))
            chain.last.replace_all_uses_with(fused)
    left = {chain.norm, *([chain.add] if chain.add else []), *chain.bypassed}
    for node in reversed(graph.nodes):
        if node in left:
            graph.erase_node(node)


def _program(flow: Flow, chains: list[_Chain]) -> Program:
    norms = dict.fromkeys(path_of(chain.norm) for chain in chains)
    bypassed = dict.fromkeys(path_of(node) for chain in chains for node in chain.bypassed if node.op == "call_module")
    bypassed.update(dict.fromkeys(flow.inlined))
    attributes = dict(flow.attributes)
    for path in bypassed:  # a slope, a kind of GELU
        options = options_of(at(flow.owner, path))
        attributes |= {(path, name): value for name, value in options.items() if name != "inplace"}
    for node in flow.graph.nodes:
        node.type = None
    code = flow.graph.python_code("self")
    used = {node.id for node in ast.walk(ast.parse(code.src)) if isinstance(node, ast.Name)}
    return Program(
        source=code.src,
        imports=tuple((name, *_home(value)) for name, value in code.globals.items() if name in used),
        chains=tuple(map(str, chains)),
        accepts=flow.accepts,
        arguments=tuple(flow.arguments.items()),
        attributes=tuple((*key, value) for key, value in attributes.items()),
        structure=_structure(flow, {path_of(chain.norm) for chain in chains if not chain.first}, [*norms, *bypassed]),
        norms=tuple(norms),
        bypassed=tuple(bypassed),
    )


def _structure(flow: Flow, free: set[Path], paths: list[Path]) -> tuple[Any, ...]:
    """The children of every module that a call goes through."""
    called = [path_of(node) for node in flow.graph.nodes if node.op == "call_module"]
    through: dict[Path, None] = {(): None}
    through.update(dict.fromkeys(path[:k] for path in (*called, *paths) for k in range(len(path))))
    through.update(dict.fromkeys(flow.inlined))
    return tuple(
        (
            path,
            tuple(
                (name, None if child is None else Layer if (*path, name) in free else base_of(type(child)))
                for name, child in at(flow.owner, path)._modules.items()
            ),
        )
        for path in through
    )


def _home(value: Any) -> tuple[str, str]:
    """The module and the name under which a program finds something again."""
    if isinstance(value, types.ModuleType):
        return value.__name__, ""
    if isinstance(value, float):
        return "math", str(value)
    home, name = getattr(value, "__module__", None) or "builtins", getattr(value, "__qualname__", "")
    with contextlib.suppress(Exception):
        if operator.attrgetter(name)(importlib.import_module(home)) is value:
            return home, name
    raise UntraceableError(f"it calls {name or value!r}, which has no name in {home}")


def _merged(programs: list[Program]) -> tuple[Program, ...]:
    """One program where training and evaluation are the same."""
    merged: dict[tuple[Any, ...], Program] = {}
    for program in programs:
        key = (program.source, program.imports, program.accepts, program.arguments, program.structure)
        other = merged.get(key)
        if other is not None:
            mine, theirs = ({(path, name): value for path, name, value in p.attributes} for p in (program, other))
            modes = {key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key] and key[1] == "training"}
            both = {key: value for key, value in (theirs | mine).items() if key not in modes}
            program = replace(program, attributes=tuple((*key, value) for key, value in both.items()))
        merged[key] = program
    return tuple(merged.values())
