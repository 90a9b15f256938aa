"""`accelerate` and `to_torch`: every normalizer one of this package's, with what follows it taken up; and back."""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope import nn as ours
from normscope.kernels import backends
from normscope.nn.base import Layer
from normscope.surgery.chains import programs_from
from normscope.surgery.find import Found, Select, find, paths
from normscope.surgery.flow import (
    Flow,
    UntraceableError,
    flows_of,
    has_own_forward,
    is_plain_sequential,
    only_holds,
)
from normscope.surgery.foreign import Foreign, adapt, restore
from normscope.surgery.forward import Forward, feed
from normscope.surgery.fused import Fused, Program, at, fusable, norms_of, programs_of
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.prove import DrawnInOrder, Observation, Proof
from normscope.surgery.replace import obstacle
from normscope.surgery.state import Snapshot
from normscope.surgery.traits import add_trait, base_of, has_trait, remove_trait, traits_of

__all__ = ["StepProof", "accelerate", "to_torch", "withdraw"]

_OURS: dict[type[Module], type[Module]] = {
    getattr(nn, name): getattr(ours, name)
    for name in (
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
        "LayerNorm", "RMSNorm",
    )
}  # fmt: skip
_TORCH = {mine: theirs for theirs, mine in _OURS.items()}


def accelerate(
    model: Module,
    example: Any = None,
    *,
    forward: Forward | None = None,
    select: Select = None,
    copy: bool = False,
) -> Surgery:
    """Let every normalizer compute with this package's kernels, and take up the activation and addition next to it.

    A normalizer of torch becomes the layer of the same name in `normscope.nn`: the same object with another class. The
    normalizers of timm and transformers keep their class. Then the forward of every module that calls normalizers is
    traced, and where it provably computes activation(norm(x) + residual), activation(norm(x)), norm(x) + residual or,
    for LayerNorm and RMSNorm, norm(a + b), the module gets a program that does this in one call. All modules stay in
    place, and the module's own forward runs whenever a condition of the program does not hold: a hook, a replaced
    module, a changed attribute, a compiler.

    Args:
        model: The model.
        example: A batch as the loader yields it; outputs in both modes, gradients and running statistics of a training
            step are then compared before the edit counts.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Returns:
        A report of the normalizers that changed, of those left as they are or without their activation and why, and, in
        its notes, of what is fused.

    Raises:
        ArgumentError: `select` matches nothing.
        ProofError: The example shows a difference; nothing was changed.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> print(ns.accelerate(model, torch.randn(16, 3)))
        accelerate: 1 changed, 0 skipped
          changed  1
          note     1 → relu
                   same output in ...
    """

    def edit(draft: Draft) -> None:
        found = find(draft.model, select)
        for each in found:
            _take_over(draft, each)
        norms = {each.module: each.name for each in found if fusable(each.module) and obstacle(each.module) is None}
        _fuse(draft, norms)
        _note_device(draft)

    proof = None if example is None else StepProof(example, forward, double=True)
    return operate("accelerate", model, edit, copy=copy, proof=proof)


def to_torch(model: Module, *, select: Select = None, copy: bool = False) -> Surgery:
    """Take back `accelerate`: every layer of this package that torch has becomes torch's.

    Args:
        model: The model.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Returns:
        A report. Layers that torch does not have are left and named: those built with an activation of their own,
        `Norm`, and whatever else `normscope.nn` offers beyond torch.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(ns.nn.LayerNorm(8), ns.nn.LayerNorm(8, activation="gelu"))
        >>> print(ns.to_torch(model))
        to_torch: 1 changed, 1 skipped
          changed  0
          skipped  1  its activation 'gelu' is part of it; torch has no such layer
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            if isinstance(found.module, Layer):
                reason = _give_back(found.module)
                if reason is None:
                    draft.change(found.name)
                else:
                    draft.skip(found.name, reason)
        withdraw(draft.model)

    return operate("to_torch", model, edit, copy=copy)


def withdraw(model: Module) -> None:
    """Take away the programs of modules whose normalizers have become something else."""
    for module, _ in paths(model):
        if has_trait(module, Fused) and not all(map(fusable, norms_of(module))):
            _install(module, ())


# --- classes ------------------------------------------------------------------------------------------------------


def _take_over(draft: Draft, found: Found) -> None:
    module, cls = found.module, base_of(type(found.module))
    if isinstance(module, Layer):
        return
    reason = obstacle(module) or _unlike(module)
    if reason is None and cls in _OURS:
        _become(module, _OURS[cls])
    elif reason is None:
        reason = adapt(module)
    if reason is not None:
        draft.skip(found.name, reason)
        return
    draft.change(found.name)
    if isinstance(module, Foreign) and module.activation is not None:
        draft.notes.append(f"{found.name} → {module.activation}")


def _unlike(module: Module) -> str | None:
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm is the business of ns.synchronize"
    if (
        isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and module.momentum is None
        and module.running_mean is not None
    ):
        return "torch's InstanceNorm never moves its statistics with momentum=None; ours takes their mean"
    return None


def _become(module: Module, cls: type[Module]) -> None:
    """Give a module another class; all who hold it hold the same object."""
    traits = traits_of(type(module))
    module.__class__ = cls
    for trait in traits:
        add_trait(module, trait)


def _give_back(module: Layer) -> str | None:
    cls = base_of(type(module))
    if isinstance(module, Foreign):
        restore(module)
    elif cls not in _TORCH:
        return f"torch has no {cls.__name__}"
    elif module.activation is not None:
        return f"its activation {module.activation!r} is part of it; torch has no such layer"
    else:
        _become(module, _TORCH[cls])
        vars(module).pop("activation", None)
    return None


# --- programs -----------------------------------------------------------------------------------------------------


def _fuse(draft: Draft, norms: dict[Module, str]) -> None:
    modules = [(module, names[0]) for module, names in paths(draft.model)]
    flows, failures = _flows(modules, norms)
    calls: collections.Counter[Module] = collections.Counter()
    owners: list[Module] = []
    inlined: set[Module] = set()
    for module, name in modules:
        if module in failures:
            draft.skip(name, f"nothing is fused in it, because its forward cannot be traced: {failures[module]}")
        if module in flows and module not in inlined:
            owners.append(module)
            inlined.update(at(module, path) for flow in flows[module] for path in flow.inlined)
            calls += functools.reduce(operator.or_, (flow.calls() for flow in flows[module]))
    names = dict(modules)
    for module in owners:
        _fuse_one(draft, flows[module], norms.keys(), calls, names)


def _flows(
    modules: list[tuple[Module, str]], norms: Collection[Module]
) -> tuple[dict[Module, list[Flow]], dict[Module, UntraceableError]]:
    """What the forwards of the modules around normalizers compute, and why that of others cannot be known.

    A module that ends in a normalizer is looked into by those that call it: what follows is with them.
    """
    flows: dict[Module, list[Flow]] = {}
    failures: dict[Module, UntraceableError] = {}
    ends: set[Module] = set()
    for module, _ in reversed(modules):  # what is called before what calls it
        near = [direct for norm, direct in _near(module, ends) if norm in norms]
        if not near or isinstance(module, Layer) or not has_own_forward(module):
            continue
        try:
            flows[module] = _traced(module, ends)
        except UntraceableError as error:
            if any(near):
                failures[module] = error
        else:
            if flows[module][0].last() in norms:
                ends.add(module)
    return flows, failures


def _traced(module: Module, ends: Collection[Module]) -> list[Flow]:
    if isinstance(module, fx.GraphModule):  # which makes its classes itself, and cannot copy them with a trait
        raise UntraceableError("torch.fx has written it, which is better done with the accelerated model")
    try:
        return flows_of(module, ends)
    except UntraceableError:
        return flows_of(module)


def _fuse_one(
    draft: Draft,
    flows: list[Flow],
    norms: Collection[Module],
    calls: collections.Counter[Module],
    names: dict[Module, str],
) -> None:
    owner = flows[0].owner
    before = norms_of(owner)
    try:
        programs, reasons = programs_from(flows, {*norms, *before}, calls)
        if programs != programs_of(owner):
            _install(owner, programs)
    except (UntraceableError, TypeError) as error:  # TypeError: Python cannot change the class of the module
        draft.skip(names[owner], f"nothing is fused in it: {error}")
        return
    for norm, reason in reasons.items():
        draft.skip(names[norm], f"nothing is fused into it: {reason}")
    for norm in norms_of(owner):
        if norm not in before:
            draft.change(names[norm])
    for chain in dict.fromkeys(chain for program in programs for chain in program.chains):
        draft.notes.append(f"{names[owner]}: {chain}" if names[owner] else chain)


def _install(module: Module, programs: tuple[Program, ...]) -> None:
    if programs:
        add_trait(module, Fused)
        vars(module)["_programs"] = programs
    elif has_trait(module, Fused):
        remove_trait(module, Fused)
        vars(module).pop("_programs", None)


def _near(module: Module, ends: Collection[Module]) -> Iterator[tuple[Module, bool]]:
    """What a module may call without a module in between that has a forward of its own, and whether it alone does."""
    for child in module.children():
        if only_holds(child):
            yield from _near(child, ends)
        elif is_plain_sequential(child) or child in ends:
            yield from ((norm, False) for norm, _ in _near(child, ends))
        else:
            yield child, True


def _note_device(draft: Draft) -> None:
    served = {backend.devices for backend in backends().usable() if backend.devices != "any"}
    devices = {p.device.type for p in draft.model.parameters()} - served
    if draft.changed and devices:
        draft.notes.append(f"no compiled kernels for {', '.join(sorted(devices))} here: torch operators do the work")


# --- proof --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepProof(Proof):
    """A proof that also compares the gradients and running statistics of one training step."""

    def compare(self, reference: Observation, model: Module, operation: str) -> str:
        """As of outputs."""
        return super().compare(reference, model, operation) + ", gradients and running statistics included"

    def _observe(self, model: Module, *, double: bool) -> Observation:
        observation = super()._observe(model, double=double)
        if "training" in observation.outputs:
            with contextlib.suppress(Exception):  # a model that cannot be trained has its outputs compared
                observation.outputs["training"] += self._step(model, double)
        return observation

    def _step(self, model: Module, double: bool) -> list[Tensor]:
        inputs: list[Tensor] = []

        def learning(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            inputs.append(t.detach().to(torch.float64 if double else t.dtype).requires_grad_())
            return inputs[-1].clone()  # which may be written into

        with Snapshot(model), torch.enable_grad(), torch.compiler.set_stance("force_eager"), DrawnInOrder():
            if double:
                model.double()
            model.train().zero_grad(set_to_none=True)
            torch.manual_seed(0)
            output = feed(model, pytree.tree_map_only(Tensor, learning, self.example), self.forward)
            outputs = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            # Not randn_like, whose numbers depend on the memory format.
            torch.autograd.backward(outputs, [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs])
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (*inputs, *model.parameters())]
            # Some gradients are nothing but rounding, as of a bias before a normalizer: a number that all tensors get
            # keeps the tolerance from following them down.
            least = 1e-3 * max((g.abs().max() for g in grads if g.numel()), default=torch.zeros(()))
            grads = [torch.cat([g.flatten(), least.to(g).reshape(1)]) for g in grads]
            return [*grads, *(b.clone() for b in model.buffers() if b.is_floating_point())]
