"""Pass P6 and the user's other callables: steps on a copy, evaluation, prediction, the other model."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.doctor.cache import Batch, regroup
from normscope.doctor.measurements import (
    Array,
    Change,
    Dependence,
    Layer,
    Mutation,
    Optimized,
    Reference,
    RoundTrip,
    Steps,
)
from normscope.doctor.patient import Patient
from normscope.doctor.scan import difference, layers_of
from normscope.surgery import Snapshot, feed, find, quiet, switch

__all__ = ["dependence", "evaluate_once", "input_of", "optimized", "reference_facts", "round_trip", "take_steps"]

STEPS = 3
# Samples that are also looked at alone.
ALONE = 3


def take_steps(
    model: Module, batches: Sequence[Batch], step: Callable[[Module, Any, Any], Any], optimizer: Any, device: Any
) -> Steps:
    """Training steps on a copy of the model, the optimizer rebound to the copy's parameters."""
    try:
        twin, twin_optimizer = copy.deepcopy((model, optimizer))
    except Exception as error:
        return Steps(problem=f"model and optimizer cannot be copied: {type(error).__name__}: {error}")
    before = _statistics(twin)
    watch = _StepWatch(twin, twin_optimizer)
    batches = list(itertools.islice(itertools.cycle(batches), STEPS))
    for done, batch in enumerate(batches):
        try:
            step(twin, batch.fresh(device), twin_optimizer)
        except Exception as error:
            return Steps(done, problem=f"train_step raised {type(error).__name__}: {error}")
    after = _statistics(twin)
    moved = {name: _moved(before[name], after[name]) for name in before if name in after}
    updates = {name: (after[name][2] - before[name][2]) / STEPS for name in before if name in after}
    return Steps(
        STEPS,
        moved,
        tuple(sorted(watch.trained)),
        updates,
        called=tuple(sorted(watch.called)),
        learning=tuple(sorted(watch.learning)),
        apart=tuple(sorted(watch.trained & (watch.called - watch.learning))),
        forwards=watch.forwards / STEPS,
        backwards=max(watch.backwards.values(), default=0) / STEPS,
        optimizer=watch.steps if isinstance(twin_optimizer, torch.optim.Optimizer) else None,
    )


class _StepWatch:
    """Counts what happens in training steps on a copy, which is thrown away with its hooks."""

    def __init__(self, twin: Module, optimizer: Any) -> None:
        self.trained: set[str] = set()
        self.called: set[str] = set()
        self.learning: set[str] = set()
        self.forwards = self.steps = 0
        self.backwards: collections.Counter[int] = collections.Counter()
        for found in find(twin):
            if not isinstance(found.module, torch.jit.ScriptModule):
                found.module.register_forward_pre_hook(self._note(found.name))
        if not isinstance(twin, torch.jit.ScriptModule):
            twin.register_forward_pre_hook(self._forward)
        for parameter in twin.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                parameter.register_post_accumulate_grad_hook(self._backward)  # type: ignore[no-untyped-call]
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_step_post_hook(self._step)

    def _note(self, name: str) -> Callable[[Module, Any], None]:
        def note(module: Module, _: Any) -> None:
            self.called.add(name)
            if module.training:
                self.trained.add(name)
            if torch.is_grad_enabled():
                self.learning.add(name)

        return note

    def _forward(self, *_: Any) -> None:
        self.forwards += 1

    def _backward(self, parameter: Tensor) -> None:
        self.backwards[id(parameter)] += 1

    def _step(self, *_: Any) -> None:
        self.steps += 1


def optimized(model: Module, optimizer: Any) -> Optimized | None:
    """What an optimizer does with γ and β; None for one that is unknown."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    decays = {id(p): (float(g.get("weight_decay", 0.0)), g.get("lr", 1.0)) for g in optimizer.param_groups
              for p in g["params"]}  # fmt: skip
    decayed, missing, most = [], [], 0.0
    for f in find(model):
        own = [p for p in f.module.parameters(recurse=False) if p.requires_grad]
        decay = max((decays[id(p)][0] for p in own if id(p) in decays and decays[id(p)][1] != 0), default=0.0)
        if decay > 0:
            decayed.append(f.name)
            most = max(most, decay)
        if any(id(p) not in decays for p in own):
            missing.append(f.name)
    return Optimized(tuple(decayed), tuple(missing), most)


def _statistics(model: Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    found = {}
    for f in find(model):
        mean, var = f.module._buffers.get("running_mean"), f.module._buffers.get("running_var")
        if mean is not None and var is not None:
            count = getattr(f.module, "num_batches_tracked", None)
            seen = float(count) if isinstance(count, Tensor) else 0.0
            found[f.name] = (mean.detach().double().clone(), var.detach().double().clone(), seen)
    return found


def _moved(before: tuple[Tensor, Tensor, float], after: tuple[Tensor, Tensor, float]) -> float:
    if torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]):
        return 0.0
    step = (after[0] - before[0]).abs() / (before[1].clamp(min=0) + 1e-5).sqrt()
    # Any movement counts, also one too small for the median.
    return max(float(step.median()), 1e-12)


def evaluate_once(model: Module, evaluate: Callable[[Module], Any], home: Snapshot) -> Mutation:
    """Run the user's evaluation with the modes as they are, and see what it leaves behind; the model comes back."""
    modes = [m.training for m in model.modules()]
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    with home:
        try:
            evaluate(model)
        except Exception as error:
            return Mutation(problem=f"evaluate raised {type(error).__name__}: {error}")
        changed = tuple(path for path in home.changed() if path in names)
        flipped = sum(m.training != was for m, was in zip(model.modules(), modes, strict=False))
    return Mutation(changed, flipped)


def round_trip(
    patient: Patient, layers: tuple[Layer, ...], trip: Callable[[Module], Module], batch: Batch
) -> RoundTrip:
    """Save and load as the user does, and compare statistics and outputs; the caller brings the model back."""
    try:
        back: Any = trip(patient.model)
        if not isinstance(back, Module):
            return RoundTrip(problem=f"roundtrip returned a {type(back).__name__}, not a model")
        theirs = {bare(layer.name): layer for layer in layers_of(back)}
        changed = tuple(
            x.name for x in layers if x.mean is not None and not _same_statistics(x, theirs.get(bare(x.name)))
        )
        with Snapshot(back), patient.evaluating():
            before, _ = patient.run(batch)
            switch(back)
            after = feed(back, batch.fresh(patient.device), patient.forward)
            return RoundTrip(changed, difference(before, after))
    except Exception as error:
        return RoundTrip(problem=f"roundtrip raised {type(error).__name__}: {error}")


def _same_statistics(a: Layer, b: Layer | None) -> bool:
    return b is not None and _alike(a, b) and _equal(a, b)


# --- does an answer depend on its batch? --------------------------------------------------------------------------


def input_of(data: Any) -> Any:
    """What goes into `predict`: the first element of a tuple or list, else the batch itself."""
    return data[0] if isinstance(data, (tuple, list)) and data else data


def dependence(patient: Patient, batch: Batch, predict: Callable[[Module, Any], Any] | None) -> Dependence:
    """The answer about a few samples with other samples around them, in another order, and alone."""
    path = "predict" if predict is not None else "evaluation mode"
    size = batch.size
    if size < 2:
        return Dependence(path, problem="the batch has one sample")
    used: set[str] = set()
    handles = [
        f.module.register_forward_pre_hook(_note_use(f.name, used))
        for f in patient.layers
        if not isinstance(f.module, torch.jit.ScriptModule)
    ]

    def answer(order: list[int]) -> Any:
        data = regroup(batch.fresh(patient.device), size, order)
        with quiet():
            return (
                feed(patient.model, data, patient.forward)
                if predict is None
                else predict(patient.model, input_of(data))
            )

    # Dropout left on is random: it would hide what the batch does, and is no trouble of this rule.
    dropouts = [(m, m.p) for m in patient.model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    try:
        for module, _ in dropouts:
            module.p = 0.0
        if predict is None:
            switch(patient.model)
        return _compare(path, answer, size, used)
    except Exception as error:
        return Dependence(path, problem=f"{path} raised {type(error).__name__}: {error}")
    finally:
        for module, p in dropouts:
            module.p = p
        for handle in handles:
            handle.remove()


def _note_use(name: str, used: set[str]) -> Callable[[Module, Any], None]:
    def note(module: Module, _: Any) -> None:
        batchless = isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm))
        bare = isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        if (module.training and not batchless) or bare:
            used.add(name)

    return note


def _compare(path: str, answer: Callable[[list[int]], Any], size: int, used: set[str]) -> Dependence:
    everyone = list(range(size))
    whole = _rows(answer(everyone), size)
    if not whole:
        return Dependence(path, problem="the output has no axis of samples")
    noise = difference(whole, _rows(answer(everyone), size)) or 0.0
    flips: list[float] = []
    changes, alone_error = [], ""
    half = everyone[: max(1, size // 2)]
    for order in (everyone[::-1], half, everyone[size // 2 :]):
        changes.append(_change(whole, _rows(answer(order), len(order)), order, flips))
    for k in np.unique(np.linspace(0, size - 1, ALONE).astype(int)).tolist():
        try:
            changes.append(_change(whole, _rows(answer([k]), 1), [k], flips))
        except (ValueError, RuntimeError) as error:
            alone_error = str(error).splitlines()[0]
    known = [change for change in changes if change is not None]
    if not known:
        return Dependence(path, problem="outputs for parts of a batch have other shapes")
    low = any(t.dtype in (torch.float16, torch.bfloat16) for t in whole)
    share = float(np.mean(flips)) if flips else None
    return Dependence(path, max(known), noise, low, share, alone_error, tuple(sorted(used)))


def _rows(output: Any, size: int) -> list[Tensor]:
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [t for t in leaves if t.is_floating_point() and t.dim() > 0 and t.shape[0] == size]


def _change(whole: list[Tensor], part: list[Tensor], order: list[int], flips: list[float]) -> float | None:
    """The relative change per sample, largest over samples and tensors."""
    if len(whole) != len(part) or any(a[order].shape != b.shape for a, b in zip(whole, part, strict=True)):
        return None
    worst = 0.0
    for a, b in zip(whole, part, strict=True):
        x, y = a[order].double().flatten(1), b.double().flatten(1)
        scale = x.norm(dim=1).clamp(min=1e-12)
        worst = max(worst, float(((x - y).norm(dim=1) / scale).nan_to_num(0.0).max()))
        if a.dim() == 2 and a.shape[1] > 1:
            flips.append(float((x.argmax(1) != y.argmax(1)).double().mean()))
    return worst


# --- the other model ----------------------------------------------------------------------------------------------


def reference_facts(model: Module, layers: tuple[Layer, ...], other: Module, others: tuple[Layer, ...]) -> Reference:
    """How the other model's parameters, buffers and normalizers relate to this one's; scores are added later."""
    mine, theirs = ({bare(n): p for n, p in m.named_parameters()} for m in (model, other))
    shared = [n for n in mine if n in theirs and mine[n].shape == theirs[n].shape]
    same = [(a, b) for a in layers for b in others if bare(a.name) == bare(b.name)]
    pairs = [(a, b) for a, b in same if _alike(a, b)]
    here = {bare(layer.name) for layer in layers}
    facts = Reference(
        changes=tuple(change for a, b in same for change in _changes(a, b)),
        gone=tuple(b.name for b in others if bare(b.name) not in here),
        folded=all(n in theirs or n.endswith("bias") for n in mine),
    )
    if not shared or not (pairs or facts.gone or facts.changes):
        return Reference(problem="the reference has no parameters and normalizers of the same names and shapes")
    return dataclasses.replace(
        facts,
        follows=_correlation([mine[n] for n in shared], [theirs[n] for n in shared]),
        same_weights=all(torch.equal(mine[n].detach().cpu(), theirs[n].detach().cpu()) for n in shared),
        matched=tuple(a.name for a, _ in pairs),
        equal=tuple(a.name for a, b in pairs if _equal(a, b)),
        initial=tuple(a.name for a, b in pairs if is_initial(a) and not is_initial(b)),
        initial_there=tuple(a.name for a, b in pairs if is_initial(b) and not is_initial(a)),
        older=tuple(a.name for a, b in pairs if (a.seen or 0) < (b.seen or 0)),
        older_there=tuple(a.name for a, b in pairs if (b.seen or 0) < (a.seen or 0)),
    )


def _changes(a: Layer, b: Layer) -> Iterator[Change]:
    """Attributes in which two normalizers of one name differ."""
    if a.kind != b.kind:
        yield Change(a.name, "class", a.cls, b.cls)
    if a.eps != b.eps:
        yield Change(a.name, "eps", f"{a.eps:g}", f"{b.eps:g}", _scale(a.var, a.eps, b.eps))
    if a.momentum != b.momentum:
        yield Change(a.name, "momentum", str(a.momentum), str(b.momentum))
    if a.training != b.training:
        yield Change(a.name, "training", str(a.training), str(b.training))


def _scale(var: Array | None, here: float, there: float) -> float:
    """The relative change of the output's scale, median over channels; by ε alone where there is no variance."""
    if var is None or not np.isfinite(var).all():
        return 0.0
    return float(np.median(np.abs(np.sqrt((var + there) / np.maximum(var + here, 1e-300)) - 1)))


def bare(name: str) -> str:
    """A name without what DataParallel, torch.compile and AveragedModel put before it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def is_initial(layer: Layer) -> bool:
    """Whether the running statistics are bit for bit what the constructor wrote."""
    return (
        layer.mean is not None
        and layer.var is not None
        and layer.mean.size > 0
        and not layer.mean.any()
        and bool((layer.var == 1).all())
    )


def _alike(a: Layer, b: Layer) -> bool:
    return a.mean is not None and b.mean is not None and a.mean.shape == b.mean.shape


def _equal(a: Layer, b: Layer) -> bool:
    same = (np.array_equal(x, y) for x, y in ((a.mean, b.mean), (a.var, b.var)) if x is not None and y is not None)
    return all(same)


def _correlation(a: list[Tensor], b: list[Tensor]) -> float:
    """Of all parameters at once, as one long vector each."""
    products = np.zeros(3)
    for x, y in zip(a, b, strict=True):
        u, v = (t.detach().to("cpu", torch.float64).flatten() for t in (x, y))
        products += [float(u @ v), float(u @ u), float(v @ v)]
    return float(products[0] / np.sqrt(products[1] * products[2])) if products[1:].all() else 0.0
