"""2xx: training and evaluation mode, freezing."""

from __future__ import annotations

from normscope.doctor.measurements import Grade, Layer, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, several, short, unfit
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.user import is_initial

__all__: list[str] = []

_TRACKING = ("BatchNorm", "Norm", "InstanceNorm")


@rule("NRM201", "batch-dependent-inference", causes=("NRM210",), intents=("gan-batchstats-test", "transductive-meta"))
def batch_dependent(m: Measurements, t: Thresholds) -> Judgement:
    """The answer about a sample changes with the samples around it.

    What it measures: the output of samples with others around them, in another order, in halves of the batch and
    alone, through `predict` as it is used, else in evaluation mode; and which normalizers used batch statistics
    there.
    Why it hurts: a forgotten eval(): results depend on batch size and order (ganomaly#83).
    Threshold: more than 10 times the model's own repeat noise and 1e-3 (half precision: 1e-2).
    Evidence: the change, flipped classes, the normalizers, the cost against evaluation mode.
    Fixes: eval-mode [S3]: eval() in predict; where evaluation mode is worse, see NRM103; give-statistics [S1] where
    evaluation mode itself uses the batch.
    Intentional when: `gan-batchstats-test`, `transductive-meta`.
    Known false alarms: dropout left on is random, not dependent: its modules are silenced for this measurement.
    Fixture: defect: predict without eval(); near-miss: dropout left on.
    """
    d = m.dependence
    if d is None:
        return failed("not measured")
    if d.problem:
        return failed(d.problem)
    limit = max(t.dependence_half if d.half else t.dependence, t.dependence_noise * d.noise)
    functional = [call.where for call in m.functional if call.batch]
    facts: dict[str, float | str] = {"relative change": d.change, "repeat noise": d.noise, "path": d.path}
    if d.flips is not None:
        facts["share of changed classes"] = d.flips
    dependent = d.change > limit or (bool(d.alone) and bool(d.layers))
    if not dependent:
        return fine(f"answers do not depend on the batch ({d.path})", facts)
    layers = (*d.layers, *functional)
    if not layers:
        return fine("outputs depend on the batch, but no normalizer used batch statistics", facts)
    if d.alone:
        facts["a sample alone"] = d.alone
    grade = m.predicted.grade if m.predicted.harmful and m.predicted.grade is not None else "W"
    reason = f"in {d.path} the answer about a sample changes by {d.change:.1%} with its batch: {short(layers)}"
    remedies = ("eval-mode", "give-statistics") if d.path == "predict" else ("give-statistics",)
    return alarm(grade, reason, layers, facts, m.predicted, remedies)


@rule("NRM203", "half-frozen", intents=("tta-bn/adabn",))
def half_frozen(m: Measurements, _: Thresholds) -> Judgement:
    """Weights are frozen and statistics are not.

    What it measures: normalizers in training mode whose γ, β and all weights before them require no gradient; with
    train_step, whether their buffers move in three steps on a copy.
    Why it hurts: `requires_grad=False` does not stop running statistics; a feature extractor taken for frozen
    drifts with every batch (lightly#1438).
    Threshold: any movement; without train_step the flags alone.
    Evidence: layers, movement in σ.
    Fixes: recal-freeze [S1] where they have drifted; freeze [S1], which survives train().
    Intentional when: `tta-bn/adabn`: statistics are meant to follow the data.
    Known false alarms: a momentum of 0 moves nothing and is silent.
    Fixture: defect: requires_grad_(False) on the backbone, train(); near-miss: the same with momentum 0.
    """
    layers = [x for x in m.layers if x.running and x.kind in _TRACKING and not x.held]
    if not layers:
        return unfit("no normalizer updates running statistics")
    first = m.sites[0].layer if m.sites else ""
    # A first layer without parameters normalizes the input: nothing before it could be frozen.
    frozen = [x for x in layers if x.fed_frozen and (x.learns is False or (x.learns is None and x.name != first))]
    if not frozen:
        return fine("no normalizer lies in a frozen part")
    steps = m.steps if m.steps is not None and not m.steps.problem else None
    if steps is not None:
        names = [x.name for x in frozen if steps.moved.get(x.name, 0.0) > 0]
    else:
        names = [x.name for x in frozen if x.training and x.momentum != 0 and x.tracks is not False]
    if not names:
        return fine("the statistics of the frozen part stand still")
    moved = sorted((steps.moved[n] for n in names), reverse=True) if steps is not None else []
    facts: dict[str, float | str] = {"layers": float(len(names))}
    if moved:
        facts["median movement in σ"] = moved[len(moved) // 2]
    tail = f", they moved {moved[len(moved) // 2]:.2g} σ in 3 steps" if moved else ""
    reason = f"weights are frozen, statistics of {several(names)} are not{tail}: {short(names)}"
    # In a model without any trainable weight nothing is being trained: the state is odd, and harmless so far.
    grade: Grade = "W" if m.learns or steps is not None else "I"
    drifted = any(m.drift[n].beyond for n in names if n in m.drift)
    if drifted and grade == "W" and m.recalibrated.grade == "E":
        grade = "E"
    remedies = ("recal-freeze", "freeze") if drifted else ("freeze",)
    return alarm(grade, reason, names, facts, m.recalibrated if drifted else None, remedies)


@rule("NRM204", "freeze-does-not-survive-train", causes=("NRM203",), intents=("bn-frozen-throughout",))
def freeze_undone(m: Measurements, _: Thresholds) -> Judgement:
    """Frozen normalizers that the next train() puts back into training mode.

    What it measures: normalizers in evaluation mode, without gradients, that are in training mode after
    model.train().
    Why it hurts: freezing sets eval once, the loop calls train() every epoch, and the status still says frozen
    (chemprop#952).
    Threshold: exact.
    Evidence: the layers.
    Fixes: freeze [S1], which survives train().
    Intentional when: `bn-frozen-throughout`: the loop puts them back itself.
    Known false alarms: a loop that sets the modes itself: pass train_step, which is then asked in place of the
    flags.
    Fixture: defect: eval once in __init__; clean: an override of train(); near-miss: a loop that restores the
    modes.
    """
    layers = [x for x in m.layers if x.running and x.kind in _TRACKING and x.learns is not True]
    held = [x for x in layers if not x.training]
    if not held or not m.learns:
        return unfit("no normalizer is frozen in evaluation mode while other weights learn")
    names = [x.name for x in held if not x.keeps_mode and not x.held]
    if not names:
        return fine("frozen normalizers stay in evaluation mode when the model trains")
    if m.steps is not None and not m.steps.problem:
        trained = [n for n in names if n in m.steps.trained]
        if not trained:
            return fine("the training step keeps frozen normalizers in evaluation mode")
        names = trained
    reason = f"the next train() puts frozen normalizers back into training mode: {short(names)}"
    return alarm("W" if m.training else "I", reason, names, {"layers": float(len(names))}, None, ("freeze",))


@rule("NRM205", "track-flag-toggled")
def track_flag(m: Measurements, _: Thresholds) -> Judgement:
    """track_running_stats is off while the running statistics are there.

    What it measures: track_running_stats False with running_mean present.
    Why it hurts: training then normalizes by the batch and evaluation by the old buffers: on the same input a
    "frozen" layer puts out mean 0 and deviation 1 in one mode, mean 5 and deviation 3 in the other
    (pytorch-lightning#15062).
    Threshold: exact.
    Evidence: the layers.
    Fixes: track-flag [S1], the flag back and frozen; track-again [S1] where the layer went on learning: recalibrated.
    Intentional when: never; a layer built with False has no buffers, see NRM210.
    Known false alarms: none known.
    Fixture: defect: set the flag on a trained layer; clean: build the layer with it.
    """
    layers = [x for x in m.layers if x.kind in ("BatchNorm", "InstanceNorm") and x.tracks is not None]
    if not layers:
        return unfit("no normalizer has the flag")
    # For InstanceNorm the flag also decides evaluation: both modes then agree.
    names = [x.name for x in layers if x.tracks is False and x.mean is not None and x.kind == "BatchNorm"]
    if not names:
        return fine("flags and buffers agree")
    learnt_on = m.recalibrated.harmful and any(m.drift[n].beyond for n in names if n in m.drift)
    remedies = ("track-again",) if learnt_on else ("track-flag",)
    reason = f"track_running_stats is off and the buffers are there: training and evaluation differ in {short(names)}"
    return alarm("E", reason, names, {"layers": float(len(names))}, m.recalibrated, remedies)


@rule("NRM208", "evaluation-mutates-state")
def evaluation_mutates(m: Measurements, _: Thresholds) -> Judgement:
    """The user's evaluation changes buffers of the model.

    What it measures: every buffer before and after evaluate(model), with the modes as the model was handed over.
    Why it hurts: a forward in training mode under no_grad moves running statistics; a model summary cost 3 % of
    top-1 (torchinfo#21).
    Threshold: any change.
    Evidence: the buffers.
    Fixes: eval-mode [S3]: eval() before, the old mode after; no_grad is not enough.
    Intentional when: never.
    Known false alarms: counters kept in buffers of the model.
    Fixture: defect: evaluate under no_grad in training mode; clean: with eval().
    """
    if m.mutation is None:
        return absent("evaluate=: the function that evaluates the model")
    if m.mutation.problem:
        return failed(m.mutation.problem)
    if not m.mutation.buffers:
        return fine("evaluation leaves all buffers alone", {"modules left in another mode": float(m.mutation.modes)})
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in m.mutation.buffers))
    facts: dict[str, float | str] = {"buffers": float(len(m.mutation.buffers)), "first": m.mutation.buffers[0]}
    reason = f"evaluate() changed {len(m.mutation.buffers)} buffers: {short(layers)}"
    return alarm("E", reason, layers, facts, None, ("eval-mode",))


@rule("NRM210", "no-inference-statistics", intents=("transductive-meta", "gan-batchstats-test"))
def no_statistics(m: Measurements, _: Thresholds) -> Judgement:
    """Batch normalization that has nothing to normalize by in evaluation.

    What it measures: BatchNorm without buffers, or a functional batch_norm that uses batch statistics in
    evaluation.
    Why it hurts: eval() changes nothing, answers depend on the batch, and one sample raises (pytorch#156051).
    Threshold: exact.
    Evidence: the layers and calls.
    Fixes: give-statistics [S1]; replace-norm [S2] where it was trained with one sample per batch.
    Intentional when: `transductive-meta`, `gan-batchstats-test`.
    Known false alarms: none: declare the intent.
    Fixture: defect: track_running_stats=False at construction; near-miss: the same with the intent.
    """
    layers = [x for x in m.layers if x.kind == "BatchNorm"]
    calls = [call for call in m.functional if call.function == "batch_norm"]
    if not layers and not calls:
        return unfit("no batch normalization")
    names = [x.name for x in layers if x.mean is None]
    bad = list(dict.fromkeys(call.where for call in calls if call.batch))
    if not names and not bad:
        return fine("batch normalization has statistics for evaluation")
    where = (*names, *bad)
    reason = f"evaluation uses batch statistics: {short(where)}"
    facts = {"layers": float(len(names)), "functional calls": float(len(bad))}
    remedies = ("give-statistics", "replace-norm") if names else ("functional-batch-norm",)
    return alarm("W", reason, where, facts, m.predicted, remedies)


@rule("NRM202", "norm-in-eval-while-training", intents=("bn-frozen-throughout",))
def evaluates_in_training(m: Measurements, _: Thresholds) -> Judgement:
    """Normalizers that learn stay in evaluation mode while the model trains.

    What it measures: normalizers whose γ or β require a gradient, that are called with gradients in the training steps
    and are in evaluation mode in all of them.
    Why it hurts: `from_pretrained` returns a model in evaluation mode, and a loop without train() leaves it there:
    dropout is off, statistics stand still (pytorch-lightning#19820).
    Threshold: exact; an error where recalibrated statistics gain as much.
    Evidence: the layers, the gain.
    Fixes: train-mode [S3]; recal [S1] afterwards.
    Intentional when: `bn-frozen-throughout`: statistics of the pretraining are kept on purpose.
    Known false alarms: frozen classes and normalizers frozen for good are silent.
    Fixture: defect: eval() and a loop without train(); near-miss: frozen normalizers.
    """
    if m.steps is None:
        return absent("train_step=: the body of your training loop")
    if m.steps.problem:
        return failed(m.steps.problem)
    layers = [x for x in m.layers if x.running and x.learns and not x.held and x.name in m.steps.learning]
    if not layers:
        return unfit("no normalizer that learns was called in training")
    names = [x.name for x in layers if x.name not in m.steps.trained]
    if not names:
        return fine("normalizers that learn are in training mode")
    drifted = m.recalibrated.harmful and any(m.drift[n].beyond for n in names if n in m.drift)
    grade: Grade = "E" if drifted and m.recalibrated.grade == "E" else "W"
    reason = f"γ and β learn and statistics stand still in {several(names)}: {short(names)}"
    cost = m.recalibrated if drifted else None
    return alarm(grade, reason, names, {"layers": float(len(names))}, cost, ("train-mode", "recal"))


@rule("NRM206", "frozen-at-init", intents=("caffe-folded-frozenbn",))
def frozen_at_init(m: Measurements, _: Thresholds) -> Judgement:
    """Frozen normalizers that hold what their constructor wrote.

    What it measures: normalizers that are frozen by class or for good, with mean 0, variance 1, γ = 1 and β = 0 in
    every channel, in a model that learns.
    Why it hurts: a detector trained from scratch with frozen normalizers has none: they compute nothing (vision#5443).
    Threshold: exact.
    Evidence: the layers.
    Fixes: live-norms [S3]; recal-freeze [S1].
    Intentional when: `caffe-folded-frozenbn`.
    Known false alarms: folded statistics whose γ and β hold the scale are silent.
    Fixture: defect: frozen classes without pretrained weights; near-miss: identity statistics with γ and β.
    """
    frozen = [x for x in m.layers if x.held and x.mean is not None and x.var is not None]
    if not frozen:
        return unfit("no normalizer with running statistics is frozen")
    names = [x.name for x in frozen if _does_nothing(x)]
    if not names:
        return fine("frozen normalizers hold statistics or γ and β")
    if not m.learns:
        return fine("nothing learns")
    grade: Grade = m.recalibrated.grade or "W"
    reason = f"{len(names)} frozen normalizers hold mean 0, variance 1, γ = 1 and β = 0: {short(names)}"
    facts = {"layers": float(len(names))}
    return alarm(grade, reason, names, facts, m.recalibrated, ("live-norms", "recal-freeze"))


def _does_nothing(x: Layer) -> bool:
    one = x.weight is None or bool((x.weight == 1).all())
    return is_initial(x) and one and (x.bias is None or not x.bias.any())


@rule("NRM207", "mixed-modes")
def mixed_modes(m: Measurements, _: Thresholds) -> Judgement:
    """Some normalizers are in training mode and some in evaluation mode.

    What it measures: the modes of normalizers with running statistics, those frozen for good aside.
    Why it hurts: by itself it does not: partial fine-tuning looks so. It is the state behind NRM202 to 204.
    Threshold: both modes; information.
    Evidence: how many are in which mode.
    Fixes: freeze [S1], which says what is meant.
    Intentional when: a part is frozen.
    Known false alarms: none; it is information.
    Fixture: defect: eval() on half of the layers; near-miss: half of them frozen for good.
    """
    layers = [x for x in m.layers if x.running and x.kind in _TRACKING]
    if not layers:
        return unfit("no normalizer keeps running statistics")
    live = [x for x in layers if not x.held]
    counts = {
        "training": float(sum(x.training for x in live)),
        "evaluation": float(sum(not x.training for x in live)),
        "frozen": float(len(layers) - len(live)),
    }
    names = [x.name for x in live if not x.training]
    if not counts["training"] or not names:
        return fine("all normalizers are in one mode", counts)
    reason = f"{counts['training']:.0f} normalizers train and {len(names)} evaluate: {short(names)}"
    return alarm("I", reason, names, counts, None, ("freeze",))


@rule("NRM209", "instance-norm-with-running-stats", intents=("instance-running-stats",))
def instance_running(m: Measurements, _: Thresholds) -> Judgement:
    """InstanceNorm that evaluates by running statistics.

    What it measures: InstanceNorm with track_running_stats; what evaluation costs against the instances' own
    statistics, with which it was trained.
    Why it hurts: in evaluation it is a BatchNorm: contrast and style of an instance are no longer taken out
    (CycleGAN#395, pytorch#58843).
    Threshold: exact; the severity is the measured cost, where there is one.
    Evidence: the layers, the cost.
    Fixes: own-statistics [S1].
    Intentional when: `instance-running-stats`: a benchmark that trained and evaluated so.
    Known false alarms: without a measured cost it is information.
    Fixture: defect: track_running_stats=True; near-miss: the same declared, or without.
    """
    layers = [x for x in m.layers if x.kind == "InstanceNorm"]
    if not layers:
        return unfit("no InstanceNorm")
    names = [x.name for x in layers if x.running and x.tracks]
    if not names:
        return fine("InstanceNorm normalizes every instance by itself")
    only = all(x.kind == "InstanceNorm" for x in m.layers if x.running)
    felt = m.batch if only else None
    grade: Grade = "W" if felt is None or felt.grade is None else felt.grade
    reason = f"InstanceNorm evaluates by running statistics in {short(names)}"
    return alarm(grade, reason, names, {"layers": float(len(names))}, felt, ("own-statistics",))


@rule("NRM211", "reference-network-live", intents=("teacher-train-mode",))
def live_reference(m: Measurements, _: Thresholds) -> Judgement:
    """A part of the model never learns, and its statistics move: a teacher or target network in training mode.

    What it measures: normalizers in training mode that the training steps call without gradients only, and whether
    their buffers move.
    Why it hurts: no_grad does not stop running statistics: the teacher drifts with the student's data
    (unbiased-teacher#47).
    Threshold: any movement is a warning; training mode alone is information.
    Evidence: the layers, the movement in σ.
    Fixes: eval-mode [S3]; freeze [S1].
    Intentional when: `teacher-train-mode`: one distillation does better so (overhaul-distillation#37).
    Known false alarms: activation checkpointing calls a part twice, once with gradients, and is silent.
    Fixture: defect: a teacher under no_grad in training mode; near-miss: in evaluation mode.
    """
    if m.steps is None:
        return absent("train_step=: the body of your training loop")
    if m.steps.problem:
        return failed(m.steps.problem)
    apart = [x.name for x in m.layers if x.name in m.steps.apart and x.running]
    if not apart:
        return fine("every normalizer in training mode takes part in the gradient")
    moved = [name for name in apart if m.steps.moved.get(name, 0.0) > 0]
    facts = {"layers": float(len(apart)), "movement in σ": max((m.steps.moved[n] for n in moved), default=0.0)}
    reason = f"called without gradients and in training mode: {short(moved or apart)}"
    return alarm("W" if moved else "I", reason, moved or apart, facts, None, ("freeze", "eval-mode"))
