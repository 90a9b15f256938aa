"""What helps against what: remedies as data, each with its safety class and, where it can be applied, its operation.

Never offered, because they hide the trouble or make another: skipping a normalizer for a batch of one, averaging the
statistics of unlike domains, evaluating in training mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from normscope import nn
from normscope.errors import ArgumentError
from normscope.records import Remedy
from normscope.surgery import (
    Draft,
    Surgery,
    absorb_bias,
    copy_buffers,
    exchange,
    find,
    freeze,
    keep_float32,
    operate,
    recalibrate,
    set_eps,
    set_momentum,
    trace,
)
from normscope.surgery.find import Found

__all__ = ["REMEDIES", "Case", "Spec", "give", "instance_norm", "momentum", "remedy", "track"]

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
        return Remedy(self.code, self.safety, self.text, self.command.replace("{rule}", rule))


FIX = "normscope fix MODEL --data DATA --rule {rule} -o fixed.pt"
UNSAFE = FIX.replace(" -o", " --unsafe -o")
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
        case.model,
        case.batches,
        None,
        case.estimator,
        select=list(case.layers),
        forward=case.forward,
        progress=False,
        group="own",  # a check runs on one rank
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


def _one_after_the_other(name: str, case: Case, *remedies: Callable[[Case], Surgery]) -> Surgery:
    """Several remedies as one, in their order."""

    def edit(draft: Draft) -> None:
        inner = dataclasses.replace(case, model=draft.model)
        for remedy in remedies:
            for changed in remedy(inner).changed:
                draft.change(changed)

    return operate(name, case.model, edit)


def _recalibrate_and_freeze(case: Case) -> Surgery:
    """In this order: frozen layers are not recalibrated."""
    return _one_after_the_other("recalibrate_and_freeze", case, _recalibrate, _freeze)


def _momentum(case: Case) -> Surgery:
    return momentum(case.model, case.layers)


def momentum(model: Module, layers: Sequence[str]) -> Surgery:
    """Torch's convention."""
    return set_momentum(model, 0.1, select=list(layers))


def _track(case: Case) -> Surgery:
    """The flag back on, and frozen: what was meant by turning it off."""

    def edit(draft: Draft) -> None:
        for name in track(draft.model, case.layers):
            draft.change(name)
        freeze(draft.model, select=list(case.layers))

    return operate("track_flag", case.model, edit)


def _track_again(case: Case) -> Surgery:
    """The flag back on, and statistics of the data: the layer went on learning while nothing was tracked."""

    def edit(draft: Draft) -> None:
        for name in track(draft.model, case.layers):
            draft.change(name)
        _recalibrate(dataclasses.replace(case, model=draft.model))

    return operate("track_again", case.model, edit)


def track(model: Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Set the flag back; the names of the layers."""
    found = find(model, list(layers))
    for each in found:
        cast(_BatchNorm, each.module).track_running_stats = True
    return tuple(each.name for each in found)


def _give(case: Case) -> Surgery:
    """Buffers for layers built without, filled from split A."""

    def edit(draft: Draft) -> None:
        given = give(draft.model, case.layers)
        for found in find(draft.model, list(case.layers)):
            draft.change(found.name) if found.name in given else draft.skip(found.name, "no BatchNorm without buffers")
        if given:
            _recalibrate(dataclasses.replace(case, model=draft.model, layers=given))

    return operate("give_statistics", case.model, edit)


def give(model: Module, layers: Sequence[str]) -> tuple[str, ...]:
    """Initial buffers for BatchNorm layers built without; the names of those that had none."""
    given = []
    for found in find(model, list(layers)):
        module = found.module
        if not isinstance(module, _BatchNorm) or module.running_mean is not None:
            continue
        like = module.weight if module.weight is not None else next(model.parameters(), torch.empty(0))
        module.track_running_stats = True
        module.running_mean = torch.zeros(module.num_features, device=like.device, dtype=like.dtype)
        module.running_var = torch.ones(module.num_features, device=like.device, dtype=like.dtype)
        module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)
        given.append(found.name)
    return tuple(given)


def _instance_norm(case: Case) -> Surgery:
    calls = trace(case.model, case.batches[0], case.forward, select=list(case.layers))
    flat = {call.name for call in calls if call.shape is None or math.prod(call.shape[2:]) < 2}
    return instance_norm(case.model, case.layers, flat)


def instance_norm(model: Module, layers: Sequence[str], flat: Collection[str] = ()) -> Surgery:
    """InstanceNorm in place of BatchNorm: the same function where the model was trained with one sample per batch.

    Args:
        model: The model.
        layers: Where.
        flat: Layers that see one value per sample and channel, of which there is no variance.
    """

    def build(found: Found) -> Module | str:
        old: Any = found.module
        if "" in found.paths:
            return "the model itself cannot be exchanged under its name"
        if type(old) not in _OF_INSTANCES or getattr(old, "activation", None) is not None:
            return f"{type(old).__name__} has no counterpart without a batch axis here"
        if found.name in flat:
            return "one value per sample and channel"
        return _OF_INSTANCES[type(old)](old.num_features, old.eps, affine=old.affine)

    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return exchange("instance_norm", model, build, select=list(layers), without=buffers)


_OF_INSTANCES: dict[type[Module], Callable[..., Module]] = {
    getattr(home, f"BatchNorm{d}d"): getattr(home, f"InstanceNorm{d}d") for home in (torch.nn, nn) for d in (1, 2, 3)
}


def _lower_momentum(case: Case) -> Surgery:
    return lower_momentum(case.model, case.layers)


def lower_momentum(model: Module, layers: Sequence[str]) -> Surgery:
    """A tenth of torch's default: ten times as many batches are averaged."""
    return set_momentum(model, 0.01, select=list(layers))


def _own_statistics(case: Case) -> Surgery:
    return own_statistics(case.model, case.layers)


def own_statistics(model: Module, layers: Sequence[str]) -> Surgery:
    """InstanceNorm by its instance in both modes, without buffers."""

    def edit(draft: Draft) -> None:
        for found in find(draft.model, list(layers)):
            module: Any = found.module
            if found.kind != "InstanceNorm" or not module.track_running_stats:
                draft.skip(found.name, "no InstanceNorm with running statistics")
                continue
            module.track_running_stats = False
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                module._buffers[name] = None
            draft.change(found.name)

    return operate("own_statistics", model, edit)


def _absorb(case: Case) -> Surgery:
    if not case.batches:
        raise ArgumentError("absorbing a bias needs a batch to prove it on", cure="pass a loader of several batches")
    names = [name for name in case.layers if name in {found.name for found in find(case.model)}]
    return absorb_bias(case.model, case.batches[0], forward=case.forward, drop=False, select=names or None)


def _float32(case: Case) -> Surgery:
    return widen(case.model, case.layers)


def widen(model: Module, layers: Sequence[str]) -> Surgery:
    """These layers in float32, whatever the rest is in."""
    return keep_float32(model, select=list(layers))


def _float32_recal(case: Case) -> Surgery:
    """First the room for the digits, then the digits."""
    return _one_after_the_other("float32_recal", case, _float32, _recalibrate)


def _eps(case: Case) -> Surgery:
    return default_eps(case.model, case.layers)


def default_eps(model: Module, layers: Sequence[str]) -> Surgery:
    """Torch's default, which no dtype rounds to 0."""
    return set_eps(model, 1e-5, select=list(layers))


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
    Spec("freeze-norms", "S2", "if the weights are pretrained: measure these statistics again and train on with them "
         "frozen", UNSAFE, operation=_recalibrate_and_freeze),
    Spec("replace-norm", "S2", "replace by InstanceNorm, which is BatchNorm with a batch of one; any other normalizer "
         "without a batch axis has to be trained on", UNSAFE, operation=_instance_norm),
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
         "DataLoader(..., batch_size=32)  # or ns.synchronize(model)"),
    Spec("shuffle", "S3", "mix the batches", "DataLoader(..., shuffle=True)"),
    Spec("lower-momentum", "S1", "set momentum to 0.01: statistics then average ten times as many batches", FIX,
         proof="same", operation=_lower_momentum),
    Spec("own-statistics", "S1", "normalize every instance by itself in both modes, without running statistics", FIX,
         operation=_own_statistics),
    Spec("absorb-bias", "S0", "set these biases to 0 and subtract them from the running mean", FIX,
         proof="same", operation=_absorb),
    Spec("float32", "S1", "let these layers compute in float32", FIX, proof="same", operation=_float32),
    Spec("float32-recal", "S1", "keep the statistics of these layers in float32 and measure them again", FIX,
         operation=_float32_recal),
    Spec("default-eps", "S1", "set ε to 1e-5", FIX, proof="same", operation=_eps),
    Spec("separate-statistics", "S3", "keep statistics for every call or domain, γ and β in common",
         "ns.nn.SplitBatchNorm(channels, num_domains=2)  # or one normalizer per branch"),
    Spec("eval-dummy", "S3",
         "run dummy forwards (shapes, summaries) in evaluation mode, or reset the statistics before "
         "training", "was = model.training; model.eval(); model(dummy); model.train(was)"),
    Spec("scale-inputs", "S3", "give the model inputs in the scale of its training",
         "transforms.Normalize(mean, std)  # the same in training, evaluation and production"),
    Spec("adapt", "S3", "measure the statistics again on unlabelled data of the place where the model is used",
         "ns.recalibrate(model, deployment_loader)"),
    Spec("align-transforms", "S3",
         "evaluate in the resolution and crop of the training, or measure the statistics again "
         "with the evaluation's transform", "ns.recalibrate(model, loader_with_evaluation_transform)"),
    Spec("train-mode", "S3", "switch to training mode where an epoch begins", "model.train()"),
    Spec("live-norms", "S3", "load pretrained weights and statistics, or train with a normalizer that is not frozen",
         "norm_layer=torch.nn.BatchNorm2d  # in place of the frozen class"),
    Spec("bucket", "S3", "batch samples of similar length together", "sampler that sorts by length within chunks"),
    Spec("mask", "S3", "leave padding out of the statistics", "ns.nn.BatchNorm1d(...)(x, mask=mask)"),
    Spec("inspect-sample", "S3", "look at this sample; clip or rescale inputs", "x = x.clamp(-limit, limit)"),
    Spec("sync", "S3", "normalize over the batches of all devices", "ns.synchronize(model)"),
    Spec("distributed", "S3",
         "train with DistributedDataParallel and synchronized normalizers in place of DataParallel",
         "DistributedDataParallel(ns.synchronize(model).model)"),
    Spec("other-axis", "S3", "normalize over more values: fewer groups, another axis, or no normalizer here",
         "torch.nn.GroupNorm(groups, channels)  # with several values per group"),
    Spec("transpose", "S3", "bring the channels to axis 1 before, and back after",
         "self.norm(x.transpose(1, 2)).transpose(1, 2)"),
    Spec("prune", "S3", "prune these channels and carry the constants that they put out into the next layer's bias",
         "next.bias += next.weight[:, dead].flatten(2).sum(2) @ constant"),
    Spec("dropout-last", "S3",
         "move dropout behind the last normalizer", "nn.Sequential(norm, act, nn.Dropout(p), head)"),
    Spec("remove-norm", "S3", "leave this normalizer out, if that is not what was meant", "nn.Identity()"),
    Spec("bfloat16", "S3", "use bfloat16, which has the range of float32",
         "torch.autocast(device, dtype=torch.bfloat16)"),
    Spec("centre-inputs", "S3",
         "subtract the mean before the precision is lowered", "x = (x.float() - mean).to(dtype)"),
    Spec("one-update", "S3", "let statistics move once per step: leave out what checkpointing computes again and "
         "auxiliary forwards", "ns.accelerate(model)  # or with ns.pause_statistics(model): around the second forward"),
    Spec("param-groups", "S3",
         "do not decay γ and β", "torch.optim.SGD(ns.optim.decay_groups(model, weight_decay=1e-4), lr=0.1)"),
    Spec("optimize", "S3", "hand γ and β to the optimizer, or freeze them", "optimizer(model.parameters(), ...)"),
    Spec("broadcast", "S3", "bring the ranks' statistics together before evaluating or saving",
         "ns.synchronize(model)  # or torch.distributed.all_reduce on the buffers"),
    Spec("convert-again", "S3", "convert with a tool that keeps class, ε, momentum and mode; or give them back",
         "ns.surgery.set_eps(model, eps, select=layers)"),
    Spec("like-origin", "S3", "set ε and momentum to the values with which the weights were trained",
         "ns.surgery.set_eps(model, eps, select=layers)"),
    Spec("export-eval", "S3", "export in evaluation mode", "torch.export.export(model.eval(), args)"),
    Spec("fold-again", "S3",
         "fold with the bias of the layer before: (b − μ)·γ/√(σ² + ε) + β", "ns.fold(model, example)"),
    Spec("per-channel", "S3", "quantize weights per channel, or equalize the layers' ranges first",
         "torch.per_channel_affine"),
    Spec("private-norm", "S3", "for per-sample gradients: a normalizer without batch axis, or all BatchNorm in "
         "evaluation mode", "ns.freeze(model)"),
    Spec("fold", "S3", "fold normalizers into the layers beside them, for inference: the same function",
         "ns.fold(model, example)"),
    Spec("keep-layout", "S3", "normalize over channels where they are, or keep one memory order throughout",
         "ns.nn.LayerNorm2d(channels)  # in place of permute, LayerNorm, permute"),
    Spec("desync", "S3", "normalize by every rank's own batch", "ns.desynchronize(model)"),
    Spec("shuffle-keys", "S3", "mix the keys before their forward and bring them into order behind it, so that no "
         "positive shares its batch",
         "order = torch.randperm(len(keys)); z = encoder(keys[order])[order.argsort()]  # over all ranks"),
    Spec("no-batch-axis", "S3", "train with a normalizer that sees one sample at a time",
         "ns.convert(model, {'BatchNorm': 'GroupNorm(32)'})"),
    Spec("fuse", "S3", "use fused normalizers, the same numbers", "ns.accelerate(model)"),
    Spec("call-modules", "S3", "call modules, not their forward methods, so that hooks see them", "module(x)"),
    Spec("see-list", "S3",
         "judge these classes by their own documentation", "ns.check(model, loader, ignore=['NRM900'])"),
    Spec("reach", "S3", "pass a forward and a loader that reach these layers", "ns.check(model, loader, forward=...)"),
    Spec("more-samples", "S3", "give the check more samples or more time", "ns.check(model, loader, budget=300)"),
    Spec("dropout", "S3", "let dropout follow the mode", "F.dropout(x, p, training=self.training)"),
):  # fmt: skip
    remedy(_spec)
