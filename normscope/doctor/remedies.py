"""What helps against what: remedies as data, each with its safety class and, where it can be applied, its operation.

Never offered, because they hide the trouble or make another: skipping a normalizer for a batch of one, averaging the
statistics of unlike domains, evaluating in training mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from normscope.errors import ArgumentError
from normscope.records import Remedy
from normscope.surgery import Draft, Surgery, copy_buffers, find, freeze, operate, recalibrate, set_momentum

__all__ = ["REMEDIES", "Case", "Spec", "remedy"]

Proof = Literal["gain", "same"]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """What an operation may use.

    Attributes:
        model: The model, edited in place.
        layers: The layers of the finding.
        batches: Split A.
        forward: The user's forward.
        reference: The other model.
        estimator: The better one of recalibrate's estimators.
    """

    model: Module
    layers: tuple[str, ...]
    batches: Sequence[Any]
    forward: Callable[[Module, Any], Any] | None
    reference: Module | None
    estimator: Literal["population", "mean"]


@dataclass(frozen=True, slots=True)
class Spec:
    """A remedy and how it is applied.

    Attributes:
        proof: "gain": kept only if split B gains; "same": if split B does not lose.
        operation: The edit; None for what only the user can do.
    """

    code: str
    safety: Literal["S0", "S1", "S2", "S3"]
    text: str
    command: str
    proof: Proof = "gain"
    operation: Callable[[Case], Surgery] | None = None

    def record(self, rule: str) -> Remedy:
        """As a record, for a finding of this rule."""
        return Remedy(self.code, self.safety, self.text, self.command.format(rule=rule))


FIX = "normscope fix MODEL --data DATA --rule {rule} -o fixed.pt"
REMEDIES: dict[str, Spec] = {}


def remedy(spec: Spec) -> Spec:
    """Register a remedy."""
    REMEDIES[spec.code] = spec
    return spec


# --- operations -------------------------------------------------------------------------------------------------------


def _recalibrate(case: Case) -> Surgery:
    for name in case.layers:
        _finite_buffers(case.model, name)
    return recalibrate(
        case.model, case.batches, None, case.estimator, select=list(case.layers), forward=case.forward, progress=False
    )


def _finite_buffers(model: Module, name: str) -> None:
    module = model.get_submodule(name)
    for parameter in module.parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ArgumentError(
                f"γ or β of {name} is not finite", cure="recalibration cannot mend weights; load an earlier checkpoint"
            )


def _copy(case: Case) -> Surgery:
    if case.reference is None:
        raise ArgumentError("no reference to copy from", cure="pass reference= to check")
    return copy_buffers(case.model, case.reference, select=list(case.layers))


def _freeze(case: Case) -> Surgery:
    return freeze(case.model, select=list(case.layers))


def _recalibrate_and_freeze(case: Case) -> Surgery:
    """In this order: frozen layers are not recalibrated."""

    def edit(draft: Draft) -> None:
        inner = dataclasses.replace(case, model=draft.model)
        for surgery in (_recalibrate(inner), _freeze(inner)):
            for name in surgery.changed:
                draft.change(name)

    return operate("recalibrate_and_freeze", case.model, edit)


def _momentum(case: Case) -> Surgery:
    return set_momentum(case.model, 0.1, select=list(case.layers))


def _track(case: Case) -> Surgery:
    """The flag back on, and frozen: what was meant by turning it off."""

    def edit(draft: Draft) -> None:
        for found in find(draft.model, list(case.layers)):
            cast(_BatchNorm, found.module).track_running_stats = True
            draft.change(found.name)
        freeze(draft.model, select=list(case.layers))

    return operate("track_flag", case.model, edit)


def _track_again(case: Case) -> Surgery:
    """The flag back on, and statistics of the data: the layer went on learning while nothing was tracked."""

    def edit(draft: Draft) -> None:
        for found in find(draft.model, list(case.layers)):
            cast(_BatchNorm, found.module).track_running_stats = True
            draft.change(found.name)
        recalibrate(
            draft.model,
            case.batches,
            None,
            case.estimator,
            select=list(case.layers),
            forward=case.forward,
            progress=False,
        )

    return operate("track_again", case.model, edit)


def _give(case: Case) -> Surgery:
    """Buffers for layers built without, filled from split A."""

    def edit(draft: Draft) -> None:
        for found in find(draft.model, list(case.layers)):
            module = found.module
            if not isinstance(module, _BatchNorm) or module.running_mean is not None:
                draft.skip(found.name, "no BatchNorm without buffers")
                continue
            like = module.weight if module.weight is not None else next(draft.model.parameters(), torch.empty(0))
            module.track_running_stats = True
            module.running_mean = torch.zeros(module.num_features, device=like.device, dtype=like.dtype)
            module.running_var = torch.ones(module.num_features, device=like.device, dtype=like.dtype)
            module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
            draft.change(found.name)
        if draft.changed:
            recalibrate(
                draft.model, case.batches, None, select=list(draft.changed), forward=case.forward, progress=False
            )

    return operate("give_statistics", case.model, edit)


# --- the remedies -----------------------------------------------------------------------------------------------------

for _spec in (
    Spec("recal", "S1", "measure the running statistics of these layers again, from your data", FIX,
         operation=_recalibrate),
    Spec("copy-buffers", "S1", "copy the running statistics from the reference", FIX + " --reference REFERENCE",
         operation=_copy),
    Spec("recal-freeze", "S1", "measure these statistics again and keep them for good, also through train()", FIX,
         operation=_recalibrate_and_freeze),
    Spec("freeze", "S1", "keep these layers in evaluation mode for good, also through train()", FIX,
         proof="same", operation=_freeze),
    Spec("momentum", "S1", "set momentum to 0.1, torch's convention", FIX, proof="same", operation=_momentum),
    Spec("track-flag", "S1", "set track_running_stats back and freeze these layers, which is what was meant", FIX,
         proof="same", operation=_track),
    Spec("track-again", "S1", "set track_running_stats back and measure these layers' statistics again", FIX,
         operation=_track_again),
    Spec("give-statistics", "S1", "give these layers running statistics, measured from your data", FIX,
         proof="same", operation=_give),
    Spec("freeze-norms", "S3", "if the weights are pretrained: train with frozen statistics",
         "ns.freeze(model)  # before training"),
    Spec("replace-norm", "S2", "replace by a normalizer without a batch axis, then train on; it may be worse",
         "ns.convert(model, {{'BatchNorm': 'GroupNorm(32)'}}, calibrate=loader)"),
    Spec("load-buffers", "S3", "save and load the whole state_dict, which holds the buffers",
         "torch.save(model.state_dict(), path)  # not dict(model.named_parameters())"),
    Spec("fix-reference", "S3", "update the follower's buffers with its weights",
         "AveragedModel(model, use_buffers=True)  # or ns.recalibrate(follower, loader)"),
    Spec("skip-bad-batches", "S3", "leave out batches that are not finite before the forward",
         "if not torch.isfinite(x).all(): continue"),
    Spec("eval-mode", "S3", "evaluate in evaluation mode and go back afterwards; no_grad is not enough",
         "was = model.training; model.eval(); ...; model.train(was)"),
    Spec("functional-batch-norm", "S3", "let the call follow the mode, with running statistics",
         "F.batch_norm(x, self.running_mean, self.running_var, training=self.training)"),
    Spec("drop-last", "S3", "leave out the incomplete last batch", "DataLoader(..., drop_last=True)"),
    Spec("bigger-batch", "S3", "use larger batches per device, or SyncBatchNorm over devices",
         "DataLoader(..., batch_size=32)  # or torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"),
    Spec("shuffle", "S3", "mix the batches", "DataLoader(..., shuffle=True)"),
    Spec("reach", "S3", "pass a forward and a loader that reach these layers", "ns.check(model, loader, forward=...)"),
    Spec("more-samples", "S3", "give the check more samples or more time", "ns.check(model, loader, budget=300)"),
    Spec("dropout", "S3", "let dropout follow the mode", "F.dropout(x, p, training=self.training)"),
):  # fmt: skip
    remedy(_spec)
