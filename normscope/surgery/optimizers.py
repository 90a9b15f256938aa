"""An optimizer after layers have been replaced: it goes on with the parameters that the model now has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module, Parameter

from normscope.errors import ArgumentError
from normscope.surgery.find import find
from normscope.surgery.operation import Draft

__all__ = ["rebind", "watch"]


def watch(draft: Draft, optimizer: Any) -> None:
    """Bring back the optimizer's lists and its state, too, should the edit fail or be undone."""
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise ArgumentError(f"{type(optimizer).__name__} is no optimizer", cure="pass a torch.optim.Optimizer")
    draft.before.watch(_Lists(optimizer))


class _Lists:
    """The parameters and their names in an optimizer's groups, and whose state it keeps."""

    path = "optimizer"

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        lists = [group[key] for group in optimizer.param_groups for key in ("params", "param_names") if key in group]
        self.lists = [(members, list(members)) for members in lists]
        self.state = dict(optimizer.state)

    def changed(self) -> bool:
        """Whether a list has other members."""
        return any(list(map(id, now)) != list(map(id, was)) for now, was in self.lists)

    def restore(self) -> None:
        """Bring back the members; what else the optimizer has learned since about those that stayed, it keeps."""
        for members, was in self.lists:
            members[:] = was
        state, now = self.optimizer.state, dict(self.optimizer.state)
        present = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        state.clear()
        state.update({p: now.get(p, kept) for p, kept in self.state.items()})
        state.update({p: kept for p, kept in now.items() if id(p) in present})


def rebind(draft: Draft, optimizer: Any, replaced: Sequence[tuple[str, Module, Module]]) -> None:
    """Exchange parameters in the optimizer's groups, in their places.

    State (momentum buffers) stays with a parameter that both layers share, moves to a new one of the same name and
    shape, and is dropped otherwise. A parameter without predecessor joins the group of the layer's other parameters,
    else of another normalizer's, else the last group.

    Args:
        draft: The edit.
        optimizer: The optimizer.
        replaced: Name, old and new layer.
    """
    alive = {id(p) for p in draft.model.parameters()}
    for name, old, new in replaced:
        before, after = dict(old.named_parameters()), dict(new.named_parameters())
        home = _group(optimizer, before.values())
        for key, p in before.items():
            place, successor = _group(optimizer, [p]), after.get(key)
            if place is None or successor is p:
                continue
            if successor is not None and _group(optimizer, [successor]) is None:
                _exchange(optimizer, place, p, successor)
            elif id(p) not in alive:
                _remove(optimizer, place, p)
        for key, p in after.items():
            if p.requires_grad and _group(optimizer, [p]) is None:
                norms = [q for found in find(draft.model) for q in found.module.parameters(recurse=False)]
                group = home or _group(optimizer, norms) or optimizer.param_groups[-1]
                group["params"].append(p)
                if "param_names" in group:
                    group["param_names"].append(f"{name}.{key}" if name else key)


def _group(optimizer: Any, parameters: Any) -> Any:
    wanted = {id(p) for p in parameters}
    return next((g for g in optimizer.param_groups if any(id(p) in wanted for p in g["params"])), None)


def _exchange(optimizer: Any, group: Any, old: Parameter, new: Parameter) -> None:
    k = next(k for k, p in enumerate(group["params"]) if p is old)
    group["params"][k] = new
    state = optimizer.state.pop(old, None)
    if state is not None and old.shape == new.shape:
        optimizer.state[new] = state


def _remove(optimizer: Any, group: Any, old: Parameter) -> None:
    k = next(k for k, p in enumerate(group["params"]) if p is old)
    del group["params"][k]
    if "param_names" in group:
        del group["param_names"][k]
    optimizer.state.pop(old, None)
