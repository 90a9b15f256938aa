"""Replace: put another module in a module's place, with all that the model and others hold of it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normscope.surgery.find import Found, Select, find
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.prove import Proof
from normscope.surgery.state import REGISTRIES, reach
from normscope.surgery.traits import Trait, add_trait, traits_of

__all__ = ["adopt", "exchange", "obstacle", "replace", "replace_all"]


def exchange(
    operation: str,
    model: Module,
    build: Callable[[Found], Module | str | None],
    *,
    copy: bool = False,
    select: Select = None,
    without: Collection[str] = (),
    proof: Proof | None = None,
) -> Surgery:
    """Replace normalizers: the body of every conversion.

    Args:
        operation: Its name in the report.
        model: The model.
        build: What takes a normalizer's place: a new module, which then adopts the old one's state; a string, the
            reason to leave it; or None to leave it without a word.
        copy: Edit a deep copy.
        select: Which normalizers.
        without: Names of parameters and buffers that the new modules do not take over.
        proof: For a conversion that claims to keep the function.
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            reason = obstacle(found.module)
            new = reason if reason is not None else build(found)
            if isinstance(new, str):
                draft.skip(found.name, new)
            elif new is not None:
                adopt(found.module, new, without)
                replace(draft, found.module, new)
                draft.change(found.name)

    return operate(operation, model, edit, copy=copy, proof=proof)


def obstacle(module: Module) -> str | None:
    """Why a module cannot be replaced, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: its code cannot be exchanged"
    if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
        return "lazy and not yet initialized: run one forward first"
    if "forward" in vars(module):
        return "its forward has been overridden on the instance"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized"
    return None


def adopt(
    old: Module, new: Module, without: Collection[str] = (), *, traits: Collection[type[Trait]] | None = None
) -> None:
    """Give a new module what the old one has, by reference, so that optimizers, handles and references stay valid.

    Parameters and buffers (the objects themselves, in the old order), submodules, hooks, `training`, traits such as
    being frozen, and attributes that the new class does not set itself. Parameters and buffers that only the new module
    has move to the old one's device and dtype.

    Args:
        old: The module to take from; it keeps everything, too.
        new: The module to give to.
        without: Names that are not taken over.
        traits: Which of the old one's traits are; None for all.
    """
    like = next((t for t in (*old.parameters(), *old.buffers()) if t.is_floating_point()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    for registry in REGISTRIES:
        _take(getattr(old, registry), getattr(new, registry), without)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set - set(without)
    for name, value in vars(old).items():
        # The very dictionaries of hooks: a RemovableHandle given out earlier must still remove its hook.
        if name.endswith("_hooks") or "_hooks_" in name or name in ("training", "_is_full_backward_hook"):
            vars(new)[name] = value
            _rebind(value, old, new)
        elif name not in vars(new) and name not in without:
            vars(new)[name] = value
    for trait in traits_of(type(old)) if traits is None else traits:
        add_trait(new, trait)


def _take(old: dict[str, Any], new: dict[str, Any], without: Collection[str]) -> None:
    own = dict(new)
    new.clear()
    new.update({name: value for name, value in old.items() if name not in without})
    for name, value in own.items():
        new.setdefault(name, value)


def _rebind(hooks: object, old: Module, new: Module) -> None:
    """State-dict hooks that ask for their module carry a reference to it."""
    if isinstance(hooks, dict):
        for key, hook in hooks.items():
            if isinstance(hook, torch_module._WrappedHook) and hook.with_module and hook.module() is old:
                hooks[key] = torch_module._WrappedHook(hook.hook, new)


def replace(draft: Draft, old: Module, new: Module) -> None:
    """Put `new` wherever the model holds `old`: under every name, in plain containers, as the model itself."""
    replace_all(draft, {old: new})


def replace_all(draft: Draft, pairs: Mapping[Module, Module]) -> None:
    """`replace` many modules in one walk through the model, and through the new ones, which may hold others of them."""

    def taken(value: Any) -> Any:
        return pairs.get(value, value) if isinstance(value, Module) else value

    for _, holder in [*reach(draft.model), *(entry for new in pairs.values() for entry in reach(new))]:
        if isinstance(holder, dict):
            for key, value in holder.items():
                if (new := taken(value)) is not value:
                    holder[key] = new  # keeps its place in the order
        elif isinstance(holder, (list, collections.deque)):
            for k, value in enumerate(holder):
                if (new := taken(value)) is not value:
                    holder[k] = new
    draft.model = taken(draft.model)
