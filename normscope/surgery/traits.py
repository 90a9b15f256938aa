"""Traits: behaviour added to one module, so that it survives `train()`, `half()`, copying and pickling.

How to make a module behave otherwise? Three ways were weighed:

- *A method on the instance* (`module.train = …`) must hold a reference to the module: `copy.copy` then leaves the copy
  with a method that acts on the original, and `copy.deepcopy` and pickle carry a cycle.
- *A wrapper module around it* renames every key of the state_dict, and `isinstance(m, BatchNorm2d)` fails.
- *A class of its own*, made by mixing the trait into the module's class, and assigned to `module.__class__`: keys,
  attributes, hooks and identity stay, `isinstance` holds for subclasses of any library, and removing the trait assigns
  the old class again. Name and module of the class stay the old ones, so that torch.fx still sees a leaf and tools that
  read class names still find it. Tests of the exact type (`type(m) is BatchNorm2d`) are the price.

Python cannot pickle a class made at run time by its name, so that a trait pickles as (class, traits, state); the class
is made again on loading, once per combination.
"""

from __future__ import annotations

import copyreg
import types
from typing import Any, cast

from torch.nn import Module

__all__ = ["Trait", "add_trait", "has_trait", "remove_trait", "traits_of"]


class Trait(Module):
    """Base of the mixins; subclasses override methods of Module and call super()."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(max(2, int(protocol))))
        if function is not vars(copyreg)["__newobj__"] or arguments[0] is not type(self):
            return (function, arguments, *state)  # the class brings its own way, and with it its own class
        return (_new, (base_of(type(self)), traits_of(type(self)), *arguments[1:]), *state)


def add_trait(module: Module, trait: type[Trait]) -> None:
    """Give a module a trait.

    Raises:
        TypeError: Python cannot change the class of this module.
    """
    traits = traits_of(type(module))
    if trait not in traits:
        module.__class__ = _with_traits(base_of(type(module)), (*traits, trait))


def remove_trait(module: Module, trait: type[Trait]) -> None:
    """Take a trait from a module; without any it has its old class."""
    traits = tuple(t for t in traits_of(type(module)) if t is not trait)
    module.__class__ = _with_traits(base_of(type(module)), traits)


def has_trait(module: Module, trait: type[Trait]) -> bool:
    """Whether a module has a trait."""
    return trait in traits_of(type(module))


def traits_of(cls: type[Module]) -> tuple[type[Trait], ...]:
    """The traits mixed into a class, in the order in which they were added."""
    return cast("tuple[type[Trait], ...]", cls.__dict__.get("_traits", ()))


def base_of(cls: type[Module]) -> type[Module]:
    """A class without its traits."""
    return cast("type[Module]", cls.__dict__.get("_base", cls))


_MADE: dict[tuple[type[Module], tuple[type[Trait], ...]], type[Module]] = {}


def _with_traits(base: type[Module], traits: tuple[type[Trait], ...]) -> type[Module]:
    if not traits:
        return base
    if (base, traits) not in _MADE:
        _MADE[base, traits] = _make(base, traits)
    return _MADE[base, traits]


def _make(base: type[Module], traits: tuple[type[Trait], ...]) -> type[Module]:
    body = {
        "_traits": traits,
        "_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    made = types.new_class(base.__name__, (*reversed(traits), base), exec_body=lambda namespace: namespace.update(body))
    return cast("type[Module]", made)


def _new(base: type[Module], traits: tuple[type[Trait], ...], *arguments: Any) -> Module:
    made = _with_traits(base, traits)
    return made.__new__(made, *arguments)
