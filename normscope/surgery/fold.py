"""`fold`: normalizers with running statistics go into the weights of the layers next to them."""

from __future__ import annotations

import contextlib
import copy as copies
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from normscope.errors import ArgumentError
from normscope.nn import FrozenBatchNorm
from normscope.parametrizations import bake as bake_all
from normscope.surgery.absorb import Absorber, absorbs, inexact, outputs_of, unfit
from normscope.surgery.accelerate import withdraw
from normscope.surgery.affine import Affine, affine_of, is_plain, keeps_statistics, stand_in
from normscope.surgery.export import export_onnx
from normscope.surgery.find import Found, Select, find, paths
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.fused import unhooked
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.prove import Observation, Proof
from normscope.surgery.replace import obstacle, replace_all
from normscope.surgery.state import reach
from normscope.surgery.wiring import BlockedError, Piece, Wiring

__all__ = ["fold", "refold"]

# Largest difference of an output, over the largest output: in float64, and with weights rounded to float32.
EXACT, ROUNDED = 1e-7, 1e-4
RUNS = 9


def fold(
    model: Module,
    example: Any,
    *,
    forward: Forward | None = None,
    select: Select = None,
    bake: bool = False,
    measure: bool = False,
    onnx: str | os.PathLike[str] | None = None,
    copy: bool = False,
) -> Surgery:
    """Let the layers next to normalizers with running statistics compute what these compute in evaluation.

    In evaluation such a normalizer is y = s·x + t per channel. Behind a convolution, transposed or not, a Linear or an
    Embedding it goes into their weights and bias (W ← s·W, b ← s·b + t); before a convolution or Linear where that is
    exact (W ← W·s, b ← b + ΣW·t: no zeros are padded, or t = 0); behind another normalizer into that one's γ and β. An
    Identity takes its place, or the activation that was part of it; all other names stay. Which layer is next to which
    is read from traces of the forwards, never from the order of definition. For inference: the folded model cannot be
    trained as before.

    Args:
        model: The model, in evaluation mode.
        example: A batch as the loader yields it; the output on it is compared before the edit counts.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        bake: Make parametrized weights plain first, as `normscope.parametrizations.bake` does.
        measure: Note the latency on the example before and after.
        onnx: Write the folded model there, too, and compare it in onnxruntime where that is installed.
        copy: Edit a deep copy.

    Returns:
        A report of the normalizers that were folded, of those that were not and why; its notes say into which layers,
        and how close the outputs are.

    Raises:
        ArgumentError: The model is in training mode, or `select` matches nothing.
        ProofError: The example shows a difference; nothing was changed.
        DependencyError: `onnx` needs a package that is not installed.

    Source: Ioffe & Szegedy 2015, Algorithm 2, step 11; Jacob et al. 2018, eq. 14.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> print(ns.fold(model, torch.randn(4, 3, 8, 8)))
        fold: 1 changed, 0 skipped
          changed  1
          note     1 → 0
                   same output in evaluation mode: ...
    """
    if model.training:
        raise ArgumentError(
            "the model is in training mode, in which its normalizers go by the batch and cannot be folded",
            cure="call model.eval() first; fold is for inference",
        )
    proof = _FoldProof(example, forward, double=True, modes=("evaluation",))
    earlier: list[Module] = []

    def edit(draft: Draft) -> None:
        if measure:
            with contextlib.suppress(Exception):  # some models cannot be copied
                earlier.append(copies.deepcopy(draft.model))
        if bake:
            bake_all(draft.model)
        folding = _Folding(draft, example, forward, select)
        folding.decide()
        folding.apply(draft)
        proof.absorbers.extend(folding.absorbers.values())
        draft.recipe["bake"] = bake
        withdraw(draft.model)

    def finish(draft: Draft) -> None:
        if measure:
            told = (
                _latency(earlier[0], draft.model, example, forward)
                if earlier
                else "unknown: the model cannot be copied"
            )
            draft.notes.append(f"latency on the example: {told}")
        if onnx is not None:
            draft.notes.append(export_onnx(draft.model, example, forward, onnx))

    return operate("fold", model, edit, copy=copy, proof=proof, finish=finish)


def refold(model: Module, layers: Sequence[str], recipe: Mapping[str, Any]) -> Surgery:
    """Give a model the form that `fold` gave another one, for a checkpoint of that to be loaded.

    Args:
        model: The model as it was built.
        layers: Names of the normalizers that were folded.
        recipe: Of the report.

    Raises:
        ArgumentError: The model has no modules of these names.

    Example:
        >>> import torch
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.BatchNorm1d(2)).eval()
        >>> report = fold(build(), torch.randn(4, 2))
        >>> refold(build(), report.changed, report.recipe).model
        Sequential(
          (0): Linear(in_features=2, out_features=2, bias=True)
          (1): Identity()
        )
    """

    def edit(draft: Draft) -> None:
        if recipe["bake"]:
            bake_all(draft.model)
        modules = dict(draft.model.named_modules(remove_duplicate=False))
        absent = [name for name in (*layers, *recipe["new"]) if name not in modules]
        if absent:
            raise ArgumentError(
                f"the model has no {', '.join(absent[:5])}", cure="build the model with which the checkpoint was saved"
            )
        for name in recipe["new"]:
            absorber = Absorber(modules[name])
            width = outputs_of(modules[name])
            absorber.behind(Affine(torch.ones(width), torch.zeros(width)))
            absorber.write()
        replace_all(draft, {modules[name]: stand_in(modules[name]) for name in layers})
        for name in layers:
            draft.change(name)

    return operate("fold", model, edit)


class _Folding:
    """What goes where: decided on a model that stays as it is, then done.

    Attributes:
        absorbers: The layers that take something up, with what becomes of them.
    """

    def __init__(self, draft: Draft, example: Any, forward: Forward | None, select: Select) -> None:
        model = draft.model
        self.found = [f for f in find(model, select) if keeps_statistics(f) or f.kind in ("BatchNorm", "InstanceNorm")]
        norms = {f.module for f in find(model) if keeps_statistics(f)}
        self.wiring = Wiring(model, norms, example, forward)
        self.names = self.wiring.names
        self.shared = _shared_memory(model)
        self.affines: dict[Module, Affine] = {}
        self.reasons: dict[Module, str] = {}
        self.pieces: dict[Module, list[Piece]] = {}
        self.absorbers: dict[Module, Absorber] = {}

    def decide(self) -> None:
        """Find out for every normalizer where it can go.

        One that has gone is an identity to those behind it, so that a pass can make another one worth while; only what
        then is left goes into a normalizer.
        """
        waiting = []
        for found in self.found:
            try:
                self.affines[found.module] = self._map_of(found)
                waiting.append(found.module)
            except BlockedError as error:
                self.reasons[found.module] = str(error)
        into_norms = False
        while True:
            left = [norm for norm in waiting if not self._place(norm, into_norms)]
            stuck = len(left) == len(waiting)
            if stuck and into_norms:
                return
            waiting, into_norms = left, stuck

    def _map_of(self, found: Found) -> Affine:
        module = found.module
        if not keeps_statistics(found):
            raise BlockedError("keeps no running statistics")
        if module.training:
            raise BlockedError("it is in training mode, in which it goes by the batch")
        reason = obstacle(module)
        if reason is None and not unhooked(module):
            reason = "it has hooks, which would miss a value"
        if reason is not None:
            raise BlockedError(reason)
        self.wiring.reach(module)
        affine = affine_of(module, self.wiring.rank(module))
        if isinstance(affine, str):
            raise BlockedError(affine)
        return affine

    def _place(self, norm: Module, into_norms: bool) -> bool:
        """Let the layers behind or before a normalizer absorb it, where they can."""
        reasons = []
        for look, behind in ((self.wiring.behind, True), (self.wiring.before, False)):
            try:
                if not behind and not is_plain(norm):
                    raise BlockedError("its activation lies before what follows")
                pieces = look(norm)
                self._absorb(norm, pieces, behind, into_norms)
            except BlockedError as error:
                reasons.append(str(error))
            else:
                self.pieces[norm] = pieces
                self.reasons.pop(norm, None)
                if is_plain(norm):
                    self.wiring.gone.add(norm)
                return True
        self.reasons[norm] = "; ".join(dict.fromkeys(reasons))
        return False

    def _absorb(self, norm: Module, pieces: list[Piece], behind: bool, into_norms: bool) -> None:
        absorbers, affines = {}, {}
        for piece in pieces:
            module, name = piece.module, self.names[piece.module]
            part = Affine(*(t[piece.start : piece.stop].repeat_interleave(piece.repeat) for t in self.affines[norm]))
            reason = self._unable(module, into_norms) or unfit(module)
            reason = reason or inexact(module, part, self.wiring.shape(module), behind=behind)
            if reason is not None:
                raise BlockedError(f"{name}: {reason}")
            absorber = copies.copy(self.absorbers.get(module) or Absorber(module))
            (absorber.behind if behind else absorber.before)(part)
            if absorber.overflows():
                raise BlockedError(f"{name}: its weights would overflow")
            absorbers[module] = absorber
            if module in self.affines:
                affines[module] = self.affines[module].then(part)
        self.absorbers |= absorbers
        self.affines |= affines

    def _unable(self, module: Module, into_norms: bool) -> str | None:
        if module in self.shared:
            return f"its weights are shared with {self.shared[module]}"
        if absorbs(module):
            return None
        if not into_norms or module not in self.affines:
            return "it stays what it is"
        known = isinstance(module, (_BatchNorm, FrozenBatchNorm)) and is_plain(module)
        return None if known else "it cannot take up another normalizer"

    def apply(self, draft: Draft) -> None:
        """Do it."""
        new = {self.names[module]: absorber.write() for module, absorber in self.absorbers.items()}
        draft.recipe["new"] = [name for name, added in new.items() if added]
        replace_all(draft, {norm: stand_in(norm) for norm in self.pieces})
        for found in self.found:
            norm = found.module
            if norm not in self.pieces:
                draft.skip(found.name, self.reasons[norm])
                continue
            draft.change(found.name)
            draft.notes.append(f"{found.name} → {', '.join(self.names[piece.module] for piece in self.pieces[norm])}")


def _shared_memory(model: Module) -> dict[Module, str]:
    """Modules whose parameters or buffers others hold or look into, with the name of one of these."""
    holders: dict[int, list[tuple[Module | None, str]]] = {}
    members = {id(t) for module, _ in paths(model) for t in (*module._parameters.values(), *module._buffers.values())}
    for module, names in paths(model):
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None and t.numel() and not t.is_meta:
                holders.setdefault(_memory(t), []).append((module, f"{names[0]}.{key}".lstrip(".")))
    for path, thing in reach(model):
        if isinstance(thing, Tensor) and id(thing) not in members and _memory(thing) in holders:
            holders[_memory(thing)].append((None, path))
    shared: dict[Module, str] = {}
    for users in holders.values():
        for holder, name in users if len(users) > 1 else ():
            if holder is not None:
                shared.setdefault(holder, next(other for _, other in users if other != name))
    return shared


def _memory(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, lazy and wrapped tensors have none of their own
        return -id(t)


# --- proof and cost -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FoldProof(Proof):
    """A proof of the wiring in float64, with weights that have not been rounded, and of the model as it has become.

    Attributes:
        absorbers: The layers with their weights in float64.
    """

    absorbers: list[Absorber] = field(default_factory=list)

    def compare(self, reference: Observation, model: Module, operation: str) -> str:
        """Run the folded model and say how close it is."""
        note = "same output in evaluation mode: "
        if reference.double:
            # The tolerances are given as the square of what _worst takes the root of.
            exact = self._worst(reference, self._observe(model, double=True), EXACT**2, operation) * EXACT
            note += f"{exact:.0e} of the largest in float64, "
        tolerance = max(ROUNDED, reference.eps**0.5) if reference.eps > torch.finfo(torch.float32).eps else ROUNDED
        rounded = replaced(self, absorbers=[])._observe(model, double=reference.double)
        worst = self._worst(reference, rounded, tolerance**2, operation) * tolerance
        dtypes = [absorber.module.weight.dtype for absorber in self.absorbers]
        kinds = dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return note + f"{worst:.0e} with weights rounded to {' and '.join(kinds) or 'nothing'}"

    def _widen(self, model: Module) -> None:
        super()._widen(model)
        for absorber in self.absorbers:
            absorber.write()


def _latency(before: Module, after: Module, example: Any, forward: Forward | None) -> str:
    """Medians of interleaved runs."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with quiet():
        for _ in range(RUNS + 1):
            for model, taken in zip((before, after), seconds, strict=True):
                start = time.perf_counter()
                feed(model, example, forward)
                _wait(model)
                taken.append(time.perf_counter() - start)
    old, new = (statistics.median(taken[1:]) * 1e3 for taken in seconds)  # the first run warms up
    return f"{old:.3g} ms before, {new:.3g} ms after (medians of {RUNS} interleaved runs)"


def _wait(model: Module) -> None:
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
