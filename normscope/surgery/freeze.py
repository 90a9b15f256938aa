"""`freeze` and `unfreeze`: normalizers that keep to their running statistics, whatever `train()` says."""

from __future__ import annotations

import warnings
from typing import NamedTuple, cast

import torch
from torch.nn import Module

from normscope.surgery.find import Found, Select, find
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.traits import Trait, add_trait, has_trait, remove_trait

__all__ = ["Frozen", "freeze", "hold", "is_frozen", "unfreeze"]


class _Thawed(NamedTuple):
    """What a frozen module goes back to: its mode, as last asked for, and the parameters that stopped learning."""

    training: bool
    learned: tuple[str, ...]


class Frozen(Trait):
    """The trait of a module that stays in evaluation mode; its children follow `train()`."""

    def train(self, mode: bool = True) -> Frozen:
        """Remember the mode for `unfreeze` and stay in evaluation."""
        super().train(mode)
        self.training = False
        _keep(self, _thawed(self)._replace(training=mode))
        return self

    def reset_running_stats(self) -> None:
        """Keep them, and warn: torch's `update_bn` resets every BatchNorm, and a frozen one measures nothing anew."""
        warnings.warn(
            "a frozen normalizer keeps its running statistics; to reset or measure them, ns.unfreeze(model) first",
            stacklevel=2,
        )

    def extra_repr(self) -> str:
        """The class's own, and that it is frozen."""
        return f"{super().extra_repr()}, frozen"


def freeze(model: Module, *, affine: bool = False, select: Select = None, copy: bool = False) -> Surgery:
    """Make normalizers with running statistics keep to them: in evaluation mode for good, through every `train()`.

    BatchNorm, SyncBatchNorm and InstanceNorm of any number of axes, of torch, of this package, and subclasses of them,
    and `Norm(running=True)`. Keys of the state_dict, parameters, optimizers, hooks and `isinstance` stay as they are;
    the model can be copied, pickled, compiled and traced. Modules inside a normalizer (the dropout of some libraries)
    follow `train()`. What would reset the statistics, as torch's `update_bn` does, gets a warning and they stay.

    Args:
        model: The model.
        affine: Stop γ and β from learning, too.
        select: Which normalizers: names ("layer1" takes all below it), patterns, or a function of name and module.
        copy: Freeze a deep copy.

    Returns:
        A report; `.undo()` or `unfreeze` takes it back exactly.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> print(ns.freeze(model))
        freeze: 1 changed, 0 skipped
          changed  1
        >>> model.train()[1].training
        False
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            reason = _unfit(found, affine)
            if reason is None:
                hold(found.module, affine)
                draft.change(found.name)
            elif reason:
                draft.skip(found.name, reason)

    return operate("freeze", model, edit, copy=copy)


def unfreeze(model: Module, *, select: Select = None, copy: bool = False) -> Surgery:
    """Take back `freeze`: classes, modes as last asked for by `train()` or `eval()`, and what γ and β had learned by.

    Args:
        model: The model.
        select: Which normalizers, as in `freeze`.
        copy: Unfreeze a deep copy.

    Returns:
        A report of the modules that were frozen.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch, normscope as ns
        >>> model = ns.freeze(torch.nn.BatchNorm1d(3)).model
        >>> ns.unfreeze(model).model.training
        True
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            if is_frozen(found.module):
                _thaw(found.module)
                draft.change(found.name)
            elif select is not None:
                draft.skip(found.name, "not frozen")

    return operate("unfreeze", model, edit, copy=copy)


def is_frozen(module: Module) -> bool:
    """Whether `freeze` holds a module in evaluation mode."""
    return has_trait(module, Frozen)


def _unfit(found: Found, affine: bool) -> str | None:
    """Why a normalizer is not frozen; empty where there is nothing to say."""
    if found.kind == "custom":
        known = "keeps running statistics in a way unknown here" if found.running else ""
        return known and f"{type(found.module).__name__} {known}"
    if isinstance(found.module, torch.jit.ScriptModule):
        return "TorchScript: its code cannot be exchanged"
    if not found.running:
        return "keeps no running statistics" if found.kind in ("BatchNorm", "InstanceNorm") else ""
    if is_frozen(found.module) and not (affine and _learning(found.module)):
        return "already frozen"
    return None


def _learning(module: Module) -> tuple[str, ...]:
    return tuple(name for name, p in module._parameters.items() if p is not None and p.requires_grad)


def hold(module: Module, affine: bool) -> None:
    """Freeze one module."""
    if not isinstance(module, Frozen):
        mode = module.training
        add_trait(module, Frozen)
        _keep(module, _Thawed(mode, ()))
        module.training = False
    if affine:
        learned = _learning(module)
        for name in learned:
            module.get_parameter(name).requires_grad_(False)
        _keep(module, _thawed(module)._replace(learned=(*_thawed(module).learned, *learned)))


def _thaw(module: Module) -> None:
    thawed = _thawed(module)
    del vars(module)["_thawed"]
    remove_trait(module, Frozen)
    module.training = thawed.training
    for name in thawed.learned:
        module.get_parameter(name).requires_grad_(True)


# Without a declaration in the class: torch.jit.script would refuse its type.
def _thawed(module: Module) -> _Thawed:
    return cast(_Thawed, vars(module)["_thawed"])


def _keep(module: Module, thawed: _Thawed) -> None:
    vars(module)["_thawed"] = thawed
