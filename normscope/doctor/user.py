"""Pass P6 and the user's other callables: steps on a copy, evaluation, prediction, the other model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.doctor.cache import Batch, regroup
from normscope.doctor.measurements import Dependence, Layer, Mutation, Reference, RoundTrip, Steps
from normscope.doctor.patient import Patient
from normscope.doctor.scan import difference, layers_of
from normscope.surgery import Snapshot, feed, find, quiet

__all__ = ["dependence", "evaluate_once", "input_of", "reference_facts", "round_trip", "take_steps"]

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
    trained: set[str] = set()
    for found in find(twin):
        if not isinstance(found.module, torch.jit.ScriptModule):
            found.module.register_forward_pre_hook(_note_mode(found.name, trained))
    batches = list(itertools.islice(itertools.cycle(batches), STEPS))
    for done, batch in enumerate(batches):
        try:
            step(twin, batch.fresh(device), twin_optimizer)
        except Exception as error:
            return Steps(done, problem=f"train_step raised {type(error).__name__}: {error}")
    after = _statistics(twin)
    moved = {name: _moved(before[name], after[name]) for name in before if name in after}
    updates = {name: (after[name][2] - before[name][2]) / STEPS for name in before if name in after}
    return Steps(STEPS, moved, tuple(sorted(trained)), updates)


def _note_mode(name: str, trained: set[str]) -> Callable[[Module, Any], None]:
    def note(module: Module, _: Any) -> None:
        if module.training:
            trained.add(name)

    return note


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
            return Mutation("evaluate", problem=f"evaluate raised {type(error).__name__}: {error}")
        changed = tuple(path for path in home.changed() if path in names)
        flipped = sum(m.training != was for m, was in zip(model.modules(), modes, strict=False))
    return Mutation("evaluate", changed, flipped)


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
            back.eval()
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
            patient.model.eval()
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
    """How the other model's parameters and buffers relate to this one's; scores are added later."""
    mine, theirs = ({bare(n): p for n, p in m.named_parameters()} for m in (model, other))
    shared = [n for n in mine if n in theirs and mine[n].shape == theirs[n].shape]
    pairs = [(a, b) for a in layers for b in others if bare(a.name) == bare(b.name) and _alike(a, b)]
    if not shared or not pairs:
        return Reference(problem="the reference has no parameters and normalizers of the same names and shapes")
    names = tuple(a.name for a, _ in pairs)
    return Reference(
        follows=_correlation([mine[n] for n in shared], [theirs[n] for n in shared]),
        same_weights=all(torch.equal(mine[n].detach().cpu(), theirs[n].detach().cpu()) for n in shared),
        matched=names,
        equal=tuple(a.name for a, b in pairs if _equal(a, b)),
        initial=tuple(a.name for a, b in pairs if is_initial(a) and not is_initial(b)),
        initial_there=tuple(a.name for a, b in pairs if is_initial(b) and not is_initial(a)),
        older=tuple(a.name for a, b in pairs if (a.seen or 0) < (b.seen or 0)),
        older_there=tuple(a.name for a, b in pairs if (b.seen or 0) < (a.seen or 0)),
    )


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
