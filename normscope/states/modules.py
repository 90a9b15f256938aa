"""Models: put a state into one, and change frozen layers into others and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from normscope import nn
from normscope.errors import ShapeError, StateError
from normscope.nn.base import Layer
from normscope.nn.syncbatchnorm import BatchNormNd
from normscope.states.convert import read
from normscope.states.systems import known, options
from normscope.surgery import Draft, Proof, Surgery, adopt, find, obstacle, operate, paths, replace
from normscope.surgery.find import Found, Select
from normscope.surgery.forward import Forward
from normscope.surgery.freeze import Frozen, hold
from normscope.surgery.prove import Observation
from normscope.surgery.traits import base_of, remove_trait, traits_of

__all__ = ["load", "to_batch_norm", "to_frozen"]


def load(
    model: Module,
    state: Mapping[str, Any],
    system: str,
    names: Mapping[str, str] | None = None,
    *,
    kind: str = "BatchNorm",
    eps: float | None = None,
    momentum: float | None = None,
    copy: bool = False,
) -> Surgery:
    """Put the state of another system's normalizers into those of a model, and their ε and momentum with it.

    `read`, then every named layer gets all of its state or nothing is changed. Where a layer here has γ or β and theirs
    has not, it becomes 1 or 0; the report says so.

    Args:
        model: The model.
        state: Theirs; see `read`.
        system: A name of `SYSTEMS`.
        names: Their layer's path → the module's in the model; see `read`.
        kind: Which layer.
        eps: Their ε; None for their default.
        momentum: Their momentum, in their convention; None for their default.
        copy: Load into a deep copy.

    Raises:
        StateError: As in `read`; or the model lacks a module, or a module a key.
        ShapeError: A value has not the module's shape.
        ArgumentError: An unknown name, or a momentum out of range.

    Example:
        >>> import numpy as np, torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        >>> keras = {"bn/beta": np.ones(2), "bn/moving_mean": np.zeros(2), "bn/moving_variance": np.ones(2)}
        >>> print(ns.states.load(model, keras, "keras", {"bn": "1"}))
        load: 1 changed, 0 skipped
          changed  1
        >>> model[1]
        BatchNorm2d(2, eps=0.001, momentum=0.01, affine=True, bias=True, track_running_stats=True)
    """
    chosen = options(system, kind=kind, eps=eps, momentum=momentum)
    values = read(state, system, names, kind=kind, eps=eps if known(system, kind)[1].by_eps else None)
    parts: dict[str, dict[str, Tensor]] = {}
    for path, value in values.items():
        layer, _, key = path.rpartition(".")
        parts.setdefault(layer, {})[key] = value

    def edit(draft: Draft) -> None:
        modules = {name: module for module, names in paths(draft.model) for name in names}
        for layer, part in parts.items():
            if layer not in modules:
                raise StateError(
                    f"the model has no module {layer!r}", cure="names maps their layers to names of named_modules()"
                )
            _fill(draft, modules[layer], layer, part)
            _load(modules[layer], layer, part)
            for name, value in chosen.items():
                if hasattr(modules[layer], name):
                    setattr(modules[layer], name, value)
            draft.change(layer)

    return operate("load", model, edit, copy=copy)


def _fill(draft: Draft, module: Module, layer: str, part: dict[str, Tensor]) -> None:
    """γ = 1 and β = 0 where the layer here has them and theirs has not."""
    for key, neutral in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        own = {**module._parameters, **module._buffers}.get(key)
        if own is not None and key not in part:
            part[key] = neutral(own.detach())
            draft.notes.append(f"{layer or 'the layer'}: {key} = {neutral(torch.empty(())):.0f}, theirs has none")


def _load(module: Module, layer: str, part: dict[str, Tensor]) -> None:
    own = module.state_dict()
    for key, value in part.items():
        if key in own and own[key].shape != value.shape:
            raise ShapeError(
                f"{key} has shape {tuple(value.shape)} there and {tuple(own[key].shape)} here", layer=layer,
                cure="the layers that names puts together have different numbers of channels",
            )  # fmt: skip
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        raise StateError(
            " ".join(str(error).split()), layer=f"{layer} ({type(module).__name__})",
            cure="build the layer with the options of theirs: affine=, bias=, track_running_stats=, and choose kind=",
        ) from error  # fmt: skip


# --- frozen layers ----------------------------------------------------------------------------------------------------


def to_batch_norm(
    model: Module, example: Any = None, *, forward: Forward | None = None, select: Select = None, copy: bool = False
) -> Surgery:
    """Make BatchNorm of FrozenBatchNorm, held by `freeze` with its γ and β; `ns.unfreeze` then lets it train.

    The function stays the same in both modes until then. γ and β become parameters, in the memory of the buffers; the
    new layer takes any number of axes. Those of torchvision and detectron2 go through `take_up` first.

    Args:
        model: The model.
        example: A batch as the loader yields it, on which the outputs are compared.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: `select` matches nothing.
        ProofError: The example shows a difference; nothing was changed.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), ns.nn.FrozenBatchNorm(4))
        >>> _ = ns.states.to_batch_norm(model, torch.randn(2, 3, 5, 5))
        >>> ns.unfreeze(model).model[1].weight.requires_grad
        True
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            old = found.module
            if isinstance(old, nn.FrozenBatchNorm):
                new = BatchNormNd(old.num_features, old.eps, activation=old.activation)
                adopt(old, new, ("weight", "bias"))
                new.weight, new.bias = Parameter(old.weight), Parameter(old.bias)
                hold(new, affine=True)
                replace(draft, old, new)
                draft.change(found.name)
            elif type(old).__name__.startswith("FrozenBatchNorm"):
                draft.skip(found.name, "of another library: ns.states.take_up(model) first")

    proof = None if example is None else Proof(example, forward)
    return operate("to_batch_norm", model, edit, copy=copy, proof=proof)


def to_frozen(
    model: Module, example: Any = None, *, forward: Forward | None = None, select: Select = None, copy: bool = False
) -> Surgery:
    """Make FrozenBatchNorm of BatchNorm: four buffers, no parameters, as in torchvision's and detectron2's checkpoints.

    Evaluation stays the same; training then computes what evaluation does. γ and β leave the parameters, so build the
    optimizer afterwards. To freeze layers and keep their class, `ns.freeze`.

    Args:
        model: The model.
        example: A batch as the loader yields it, on which the outputs in evaluation are compared.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: `select` matches nothing.
        ProofError: The example shows a difference; nothing was changed.

    Example:
        >>> import torch, normscope as ns
        >>> ns.states.to_frozen(torch.nn.BatchNorm2d(4)).model
        FrozenBatchNorm(4)
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            if found.kind != "BatchNorm":
                continue
            reason = _unfit(found)
            if reason is None:
                replace(draft, found.module, _frozen(cast(_BatchNorm, found.module)))
                draft.change(found.name)
            else:
                draft.skip(found.name, reason)

    proof = None if example is None else _InEvaluation(example, forward)
    return operate("to_frozen", model, edit, copy=copy, proof=proof)


@dataclass(frozen=True)
class _InEvaluation(Proof):
    def _observe(self, model: Module, *, double: bool) -> Observation:
        seen = super()._observe(model, double=double)
        return replaced(seen, outputs={"evaluation": seen.outputs["evaluation"]})


_PLAIN = (
    torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormNd,
)  # fmt: skip


def _unfit(found: Found) -> str | None:
    module = found.module
    if base_of(type(module)) not in _PLAIN:
        return f"{type(module).__name__} may do more than normalize by four buffers"
    if any(trait is not Frozen for trait in traits_of(type(module))):
        return "something else was done to it before: undo that first"
    return obstacle(module) if found.running else "keeps no running statistics"


def _frozen(old: _BatchNorm) -> nn.FrozenBatchNorm:
    activation = old.activation if isinstance(old, Layer) else None
    new = nn.FrozenBatchNorm(old.num_features, old.eps, activation=activation)
    own = {**old._parameters, **old._buffers}
    adopt(old, new, (*own, "_thawed", "process_group"))
    for name in new._buffers:
        t = own[name]
        if t is not None:
            new._buffers[name] = t.detach()
    for trait in traits_of(type(new)):
        remove_trait(new, trait)
    return new
