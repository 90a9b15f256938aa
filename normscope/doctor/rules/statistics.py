"""1xx and 602: running statistics that do not describe the data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from normscope.doctor import gates
from normscope.doctor.measurements import Array, Drift, Effect, Grade, Layer, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, lower, rule, several, short, unfit
from normscope.doctor.suspects import jitter
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.user import is_initial

__all__: list[str] = []

# Of a gap: layers that carry less are not named.
LEAST_SHARE = 0.1


@rule("NRM101", "non-finite-or-negative-statistics")
def non_finite(m: Measurements, _: Thresholds) -> Judgement:
    """Running statistics or affine parameters that are NaN, infinite, or a negative variance.

    What it measures: NaN or infinity in running mean, running variance, γ, β; running variance below 0.
    Why it hurts: one overflow in one batch enters the average and never leaves it, while the loss may recover:
    after one infinite value and 200 good batches the variance is still NaN (pytorch#90342). Evaluation then answers
    NaN.
    Threshold: exact; a variance of exactly 0 or of 1e6 is silent.
    Evidence: layers and channels; the share of output values that are not finite.
    Fixes: recal [S1], refused while weights are not finite; skip the update on bad batches [S3].
    Intentional when: never.
    Known false alarms: none known.
    Fixture: defect: one NaN, one infinity, or −1e-6 in a buffer; near-miss: variance 0 or 1e6.
    """
    bad: dict[str, int] = {}
    for layer in m.layers:
        broken = [~np.isfinite(v) for v in (layer.mean, layer.var, layer.weight, layer.bias) if v is not None]
        negative = [] if layer.var is None else [layer.var < 0]
        count = int(sum(np.count_nonzero(mask) for mask in (*broken, *negative)))
        if count:
            bad[layer.name] = count
    if not m.layers:
        return unfit("the model has no normalizers")
    if not bad:
        return fine("all statistics and affine parameters are finite")
    outcome = m.outcomes.get("eval")
    facts = {"values": float(sum(bad.values())), "layers": float(len(bad))}
    if outcome is not None:
        facts["share of outputs not finite"] = outcome.infinite
    remedies = ("skip-bad-batches",) if m.infinite_weights else ("recal", "skip-bad-batches")
    names = sorted(bad, key=lambda name: -bad[name])
    reason = f"{sum(bad.values())} values that are not finite, or variances below 0, in {short(names)}"
    return alarm("E", reason, names, facts, m.recalibrated, remedies)


@rule(
    "NRM102",
    "statistics-never-tracked",
    causes=("NRM113", "NRM602", "NRM606"),
    intents=("caffe-folded-frozenbn", "split-bn"),
)
def never_tracked(m: Measurements, _: Thresholds) -> Judgement:
    """Running statistics that still are what the constructor wrote, in a model that was trained.

    What it measures: running mean 0 and variance 1 in every channel, bit for bit, while other normalizers have
    counted batches or β shows training.
    Why it hurts: a checkpoint of `named_parameters()` has no buffers; evaluation then normalizes by nothing
    (torch/nn#1165).
    Threshold: exact for all channels; a chance coincidence is impossible.
    Evidence: the layers; what evaluation costs against recalibrated statistics.
    Fixes: load the state_dict with its buffers [S3]; copy-buffers [S1] with a reference; recal [S1].
    Intentional when: `caffe-folded-frozenbn`: identity statistics whose scale lives in γ and β; `split-bn`: those of a
    domain that has not been trained on.
    Known false alarms: a fresh network is silent; one whose β was initialized by hand is told apart by the measured
    cost.
    Fixture: defect: reload only `dict(model.named_parameters())`; near-miss: a fresh network, a folded
    FrozenBatchNorm.
    """
    layers = [layer for layer in m.running if not (layer.held and layer.seen is None)]
    if not layers:
        return unfit("no normalizer keeps running statistics")
    initial = [layer for layer in layers if is_initial(layer)]
    if not initial or not _was_trained(layers):
        return fine("every normalizer has statistics of its own" if not initial else "the model has not been trained")
    names = [layer.name for layer in initial]
    grade = gates.severity(True, True, m.recalibrated) or "W"
    reason = f"{len(names)} of {several(layers)} still hold mean 0 and variance 1: {short(names)}"
    facts = {"layers": float(len(names)), "of": float(len(layers))}
    return alarm(grade, reason, names, facts, m.recalibrated, ("copy-buffers", "recal", "load-buffers"))


def _was_trained(layers: tuple[Layer, ...] | list[Layer]) -> bool:
    """Whether anything shows training: batches that were counted, or a β that moved."""
    return any(layer.seen for layer in layers) or any(_trained(layer) for layer in layers)


def _trained(layer: Layer) -> bool:
    if layer.bias is not None:
        return bool(layer.bias.any())
    return layer.weight is not None and bool(np.ptp(layer.weight) > 0)


# What leaves running statistics behind that are not those of the data.
_SPOILS = (
    "NRM101", "NRM102", "NRM104", "NRM105", "NRM106", "NRM107", "NRM108", "NRM109", "NRM112", "NRM113", "NRM202",
    "NRM203", "NRM205", "NRM206", "NRM209", "NRM302", "NRM304", "NRM305", "NRM405", "NRM406", "NRM506", "NRM602",
    "NRM606", "NRM704",
)  # fmt: skip


@rule(
    "NRM103",
    "stale-statistics",
    causes=_SPOILS,
    intents=("tta-bn/adabn", "supernet", "recalibrating", "gan-batchstats-test", "bn-frozen-throughout"),
)
def stale(m: Measurements, t: Thresholds) -> Judgement:
    """Running statistics that do not describe the activations of the model as it is.

    What it measures: per channel δ = (running mean − data mean)/σ and ρ = ln(running variance/data variance), the
    data seen with every other normalizer on batch statistics, so that a layer answers for itself only; a layer's
    score is the share of channels with |δ| > 0.25 or |ρ| > ln 1.5. Then the model's loss against itself
    recalibrated, on split B.
    Why it hurts: evaluation computes another function than training did; losses of 3 to 66 points are on record
    (discuss.pytorch.org/t/7146).
    Threshold: 10 % of the channels; a healthy average jitters by √(m/(2−m)/B) σ, 0.041 at momentum 0.1 and batch
    32. Beyond resampled healthy averages (99.9 %, false discoveries 1 %), and felt on split B (99 % interval).
    Evidence: δ and ρ by layer, the cost, the few layers that explain 90 % of it.
    Fixes: recal [S1]; then the cause, which 102, 104, 106, 113, 203 or 602 names.
    Intentional when: `tta-bn/adabn`, `supernet`, `recalibrating`, `gan-batchstats-test`; `bn-frozen-throughout`:
    statistics of the pretraining, to which the weights have adapted.
    Known false alarms: a loader of other data than the model will meet: that is a shift, not a bug; a model that was
    not trained yet, whose loss says nothing, gets information.
    Fixture: defect: running mean of one layer + 0.5 σ; near-miss: + 0.05 σ, or 5 σ where γ ≈ 0.
    """
    if not m.running:
        return unfit("no normalizer keeps running statistics")
    if not m.drift:
        return failed(m.batch_problem or "no normalizer could be watched")
    large = {n: d for n, d in m.drift.items() if d.share >= t.drift_share}
    beyond = {n: d for n, d in large.items() if d.beyond}
    if not beyond:
        worst = max(m.drift.values(), key=lambda d: d.share)
        return fine("running statistics describe the data", {"worst share of channels": worst.share})
    if all(is_initial(m.layer(n)) for n in beyond) and not _was_trained(m.running):
        return fine("the model has not been trained")
    names = sorted(beyond, key=lambda n: (-m.shares.get(n, 0.0), -beyond[n].share, -_mean(beyond[n].delta)))
    grade = gates.severity(True, True, m.recalibrated) or "I"
    facts = _drift_facts(beyond, m)
    felt = m.recalibrated.grade is not None and not m.recalibrated.harmful
    tail = "; no measurable effect" if felt else ""
    if m.recalibrated.grade is None and _untouched(m):
        grade, tail = "I", "; γ and β are initial: the model seems to be untrained"
    reason = (
        f"running statistics of {len(names)} of {several(m.drift)} do not describe what they get: {short(names)}{tail}"
    )
    return alarm(grade, reason, names, facts, m.recalibrated, ("recal",))


def _untouched(m: Measurements) -> bool:
    """Whether there are γ and β, and all of them are as they were made."""
    affine = [x for x in m.layers if x.weight is not None or x.bias is not None]
    return bool(affine) and not any(_trained(x) for x in affine)


def _mean(values: Array) -> float:
    known = np.abs(values[np.isfinite(values)])
    return float(known.mean()) if len(known) else math.inf


def _drift_facts(drifts: dict[str, Drift], m: Measurements) -> dict[str, float | str]:
    delta = np.concatenate([d.delta for d in drifts.values()])
    rho = np.concatenate([d.rho for d in drifts.values()])
    facts: dict[str, float | str] = {
        "layers": float(len(drifts)),
        "median |δ|": gates.median_size(delta),
        "median |ρ|": gates.median_size(rho),
        "largest share of channels": max(d.share for d in drifts.values()),
    }
    top = sorted(m.shares.items(), key=lambda item: -item[1])[:3]
    facts |= {f"share of {name or '(the model itself)'}": share for name, share in top}
    if m.estimators > 0.01:
        facts["estimators differ by"] = m.estimators
    return facts


@rule(
    "NRM104", "ema-not-converged", causes=("NRM106", "NRM113", "NRM203", "NRM205", "NRM602"), intents=("recalibrating",)
)
def not_converged(m: Measurements, t: Thresholds) -> Judgement:
    """Running statistics that still hold much of their initial values.

    What it measures: r = (1 − momentum)^k, the weight of the initial mean 0 and variance 1 after k batches.
    Why it hurts: with a small momentum and few steps evaluation normalizes by a mixture of data and constants
    (keras#10666).
    Threshold: r > 1 % and > 10 %, both only if recalibration gains on split B; 44 batches reach 1 % at momentum
    0.1, 459 at 0.01, 4603 at 0.001.
    The statistics have to lie on about that share of the way to the initial values, beyond the noise of such averages:
    momentum may have been changed meanwhile, or the statistics measured again.
    Evidence: k, momentum, r, how many batches are missing.
    Fixes: recal [S1]; momentum [S1] to 0.1.
    Intentional when: `recalibrating`.
    Known false alarms: none: without a measured cost it is information.
    Fixture: defect: momentum 0.001, 300 steps; near-miss: the same with data of mean 0 and variance 1.
    """
    known = [x for x in m.running if x.seen and x.momentum is not None and 0 < x.momentum < 1]
    if not known:
        return unfit("no normalizer counts batches with a momentum")
    residual = {x.name: (1 - (x.momentum or 0.0)) ** (x.seen or 0) for x in known}
    high = {x.name: residual[x.name] for x in known if residual[x.name] > t.residual_warning}
    # Where momentum was changed or statistics were measured again the count says too much: they themselves tell.
    high = {name: r for name, r in high.items() if _holds_initial(m.layer(name), r, m, t)}
    if not high:
        return fine("the initial values have left the averages", {"largest residual": max(residual.values())})
    names = sorted(high, key=lambda name: -high[name])
    worst = m.layer(names[0])
    missing = math.ceil(math.log(t.residual_warning) / math.log(1 - (worst.momentum or 0.1))) - (worst.seen or 0)
    # A layer that drifts by its initial values, and for no other reason, is what this rule is about.
    drifted = any(m.drift[name].beyond for name in names if name in m.drift)
    grade = (gates.severity(True, drifted, m.recalibrated) or "I") if m.recalibrated.grade is not None else "I"
    if max(high.values()) <= t.residual_error:
        grade = lower(grade, "W")
    facts = {"residual": high[names[0]], "batches seen": float(worst.seen or 0), "momentum": worst.momentum or 0.0}
    facts["batches missing"] = float(missing)
    reason = f"initial values still weigh {high[names[0]]:.0%} in {short(names)} after {worst.seen} batches"
    return alarm(grade, reason, names, facts, m.recalibrated, ("recal", "momentum"))


def _holds_initial(layer: Layer, residual: float, m: Measurements, t: Thresholds) -> bool:
    """Whether the statistics lie on the way from the data's to mean 0 and variance 1 by about that share of it.

    The share is the slope of (running − data) over (initial − data), means in units of σ and variances in units of σ².
    It has to be more than the noise of averages, which the same projection of single batches shows: the running one
    holds about 2/momentum of them, or all that it has seen, and the data's moments k.
    """
    data = m.own.get(layer.name)
    if data is None or layer.mean is None or layer.var is None:
        return True
    spread = data.var + layer.eps

    def units(mean: Array, var: Array) -> Array:
        return np.concatenate([mean / np.sqrt(spread), var / spread], axis=-1)

    way = units(-data.mean, 1 - data.var)
    way /= max(float(way @ way), 1e-12)
    share = float(units(layer.mean - data.mean, layer.var - data.var) @ way)
    momentum, k = layer.momentum or 0.1, len(data.means)
    noise = max(momentum / (2 - momentum), 1 / max(1, layer.seen or 1)) + 1 / k
    # Of two or three batches Student's distribution allows everything; a tenth of the way is more than noise.
    reach = min(gates.reach(units(data.means, data.vars) @ way, noise, t), t.residual_error)
    return share >= max(residual / 2, reach)


@rule("NRM106", "momentum-out-of-convention", intents=("momentum-none", "recalibrating"))
def momentum(m: Measurements, t: Thresholds) -> Judgement:
    """A momentum that means the opposite here, or nothing.

    What it measures: momentum ≥ 0.5, = 0 or < 0 in normalizers that keep statistics and are not frozen.
    Why it hurts: in torch momentum weighs the new batch; 0.99 from Keras keeps one batch and forgets all others
    (tacotron_pytorch#19), 0 never moves (pretrained-models.pytorch#5).
    Threshold: 0.5; a warning only if the predicted jitter √(m/(2−m)·Var(batch mean)) is 0.1 σ or more, if
    evaluation gains by recalibration, or if statistics never move in training; else information.
    Evidence: the value, torch's equivalent 1 − m, the jitter.
    Fixes: momentum [S1], after recal [S1] where evaluation gains by it.
    Intentional when: `momentum-none`, `recalibrating`.
    Known false alarms: a wrong convention is not always costly (pix2pix-tensorflow#126): then it is information.
    Fixture: defect: 0.99; near-miss: None.
    """
    layers = [x for x in m.running if not x.held and not _frozen(x)]
    odd = [x for x in layers if x.momentum is not None and (x.momentum >= t.momentum_high or x.momentum <= 0)]
    if not layers:
        return unfit("no normalizer updates running statistics")
    if not odd:
        return fine("every momentum is in torch's convention")
    names = [x.name for x in odd]
    spread = max((jitter(x, m.seen.get(x.name)) for x in odd), default=0.0)
    drifted = m.recalibrated.harmful and any(m.drift[n].beyond for n in names if n in m.drift)
    still = any((x.momentum or 0.0) == 0 and x.training for x in odd)
    serious = spread >= t.jitter or drifted or still or any((x.momentum or 0.0) < 0 for x in odd)
    value = odd[0].momentum or 0.0
    facts = {"momentum": value, "1 − momentum": 1 - value, "predicted jitter in σ": spread}
    meant = f"torch weighs the new batch, so that {1 - value:g} may be meant" if value > 0 else "statistics never move"
    reason = f"momentum {value:g} in {short(names)}; {meant}"
    # Only new statistics give back what the wrong momentum has cost; the right one keeps it from happening again.
    remedies = ("recal", "momentum") if m.recalibrated.harmful else ("momentum", "recal")
    return alarm("W" if serious else "I", reason, names, facts, m.recalibrated, remedies)


def _frozen(layer: Layer) -> bool:
    return layer.learns is False and (not layer.training or layer.momentum == 0)


@rule("NRM113", "weights-changed-after-statistics", causes=("NRM602",), intents=("supernet",))
def weights_changed(m: Measurements, _: Thresholds) -> Judgement:
    """Weights were averaged, pruned, quantized or merged, and the statistics are those of the weights before.

    What it measures: buffers equal bit for bit to a reference model's while the weights differ; or a weight average
    that leaves buffers out. Then the gain of recalibration on split B.
    Why it hurts: MobileNetV2 with 4-bit weights: 14 % top-1 with the old statistics, 65 % with new ones (nncf#46).
    Threshold: exact; the severity is the measured cost.
    Evidence: which reference, how many layers.
    Fixes: recal [S1]: 10 to 200 batches suffice.
    Intentional when: `supernet`.
    Known false alarms: two neighbouring checkpoints at a vanishing learning rate: no cost, hence information.
    Fixture: defect: the mean of two checkpoints with the buffers of one; near-miss: checkpoints of neighbouring
    steps.
    """
    if m.average:
        names = [x.name for x in m.running]
        grade = gates.severity(True, True, m.recalibrated) or "W"
        reason = f"{m.average}: weights are averages, running statistics are the first model's"
        return alarm(grade, reason, names, {"layers": float(len(names))}, m.recalibrated, ("recal",))
    if m.reference is None:
        return absent("reference=: the model before its weights were changed")
    if m.reference.problem:
        return failed(m.reference.problem)
    equal = [n for n in m.reference.equal if not is_initial(m.layer(n))]
    if m.reference.same_weights or not equal or m.reference.follows > 1 - 1e-12:
        return fine("weights and statistics belong together, as far as the reference tells")
    grade = gates.severity(True, True, m.recalibrated) or "W"
    reason = f"weights differ from the reference, statistics of {several(equal)} are the reference's: {short(equal)}"
    facts = {"layers": float(len(equal)), "correlation of the weights": m.reference.follows}
    return alarm(grade, reason, equal, facts, m.recalibrated, ("recal",))


@rule(
    "NRM114",
    "train-eval-gap",
    causes=(*_SPOILS, "NRM103", "NRM301", "NRM303", "NRM306"),
    intents=(
        "gan-batchstats-test", "transductive-meta", "tta-bn/adabn", "bn-frozen-throughout", "ghost-bn", "split-bn",
        "instance-running-stats",
    ),
)  # fmt: skip
def gap(m: Measurements, t: Thresholds) -> Judgement:
    """Training and evaluation differ by much, and no single normalizer's figures say why.

    What it measures: the score in evaluation mode, with new running statistics, and with the statistics of each batch
    as in training; layers go from one state into another, alone and all but each, to see which carry the gap.
    Why it hurts: every layer alone may lie below its threshold: one channel of 32 is enough, or a little noise in many
    layers (Yet-Another-EfficientDet-Pytorch#675).
    Threshold: 5 times what is worth an error, with an interval above 0; of training, in a metric only. What running
    statistics cost where a layer has drifted (NRM103), or batches whose noise shows (NRM302), is left to those rules.
    Evidence: the cost, the share of the layers that carry most of it.
    Fixes: recal [S1] where new statistics help; else separate-statistics [S3], shuffle [S3]; bigger-batch [S3] where
    training is what loses, freeze-norms [S2], replace-norm [S2].
    Intentional when: `gan-batchstats-test`, `transductive-meta`, `tta-bn/adabn`, `split-bn`: batch statistics are what
    is used; `bn-frozen-throughout`, `ghost-bn`: training does not normalize by these batches; `instance-running-stats`.
    Known false alarms: a loader of much smaller batches than the training's, with the model in training mode.
    Fixture: defect: one channel of a layer off by 30 σ, every batch with a contrast of its own, batches of 4 through
    ten normalizers; near-miss: samples of many contrasts in every batch.
    """
    if m.recalibrated.grade is None:
        return failed(m.score_problem or "evaluation, recalibrated and batch statistics could not be compared")
    if m.recalibrated.errors >= t.gap:
        if any(drift.beyond for drift in m.drift.values()):
            return fine("normalizers have drifted, which tells what evaluation loses")
        reason = "new running statistics gain {}, although no normalizer has drifted beyond its threshold"
        return _gap("E", reason, m.recalibrated, m.shares, ("recal",))
    if m.batch.errors >= t.gap:
        reason = (
            "evaluation loses {} against the statistics of each batch, and new running statistics do not give that back"
        )
        remedies = ("separate-statistics", "shuffle", "replace-norm")
        return _gap(m.batch.grade or "W", reason, m.batch, m.batch_shares, remedies)
    noise = max((gates.noise_energy(x, m.layer(n).eps) for n, x in m.own.items()), default=0.0)
    # A loss near 0 grows by half where healthy networks are normalized by batches of 32: only a metric tells.
    felt = m.small.errors >= t.gap and m.small.cost is not None and m.small.cost.unit != "loss"
    if m.trains and felt and noise < t.noise_warning:
        reason = "training mode loses {} against evaluation, although no normalizer alone is noisy"
        return _gap("W", reason, m.small, m.batch_shares, ("bigger-batch", "freeze-norms", "replace-norm"))
    return fine("training and evaluation mode do about equally well, or other rules say why not")


def _gap(grade: Grade, reason: str, felt: Effect, shares: Mapping[str, float], remedies: tuple[str, ...]) -> Judgement:
    """The alarm, with the layers that carry most of it."""
    names = sorted(shares, key=lambda name: -shares[name])
    names = [name for name in names if shares[name] >= LEAST_SHARE] or names[:1]
    lost = "much" if felt.cost is None else f"{felt.cost.value:.1f} {felt.cost.unit}".rstrip()
    facts: dict[str, float | str] = {"times an error": felt.errors}
    facts |= {f"share of {name or '(the model itself)'}": shares[name] for name in names[:3]}
    where = f"; most of it: {short(names)}" if names else ""
    return alarm(grade, reason.format(lost) + where, names, facts, felt, remedies)


@rule("NRM602", "follower-lacks-buffers", intents=("teacher-train-mode",))
def follower(m: Measurements, t: Thresholds) -> Judgement:
    """A second model follows the parameters of the first and has buffers that are initial, frozen or foreign.

    What it measures: the correlation of the parameters of model and reference, and which of them has buffers that
    are initial or have counted fewer batches; then that one's loss against itself with the other's buffers.
    Why it hurts: an average over `parameters()` has no statistics; F1 40 in place of 60 (ignite#2590).
    Threshold: correlation above 0.99; the severity is the measured cost.
    Evidence: the correlation, the layers, the cost.
    Fixes: copy-buffers [S1]; recal [S1].
    Intentional when: `teacher-train-mode`: the follower is only used on batch statistics.
    Known false alarms: a reference that is no relative of the model is silent.
    Fixture: defect: an average over parameters(); clean: over the state_dict.
    """
    r = m.reference
    if r is None:
        return absent("reference=: the model that this one follows, or its follower")
    if r.problem:
        return failed(r.problem)
    if r.follows < t.follows:
        return fine(f"neither model follows the other (correlation {r.follows:.3f})")
    here, there = r.initial or r.older, r.initial_there or r.older_there
    lags = [n for n in here if n not in r.equal]
    if lags:
        gain = m.recalibrated if m.recalibrated.grade is not None else r.copied
        grade = gates.severity(True, True, gain) or "W"
        facts = {"correlation": r.follows, "layers": float(len(lags))}
        reason = f"the weights follow the reference, the statistics do not: {short(lags)}"
        return alarm(grade, reason, lags, facts, gain, ("copy-buffers", "recal"))
    behind = [n for n in there if n not in r.equal]
    if behind and r.theirs.grade is not None:
        reason = f"the reference follows this model and lacks its statistics: {short(behind)}"
        facts = {"correlation": r.follows, "layers": float(len(behind))}
        return alarm(gates.severity(True, True, r.theirs) or "W", reason, behind, facts, r.theirs, ("fix-reference",))
    return fine("the follower has buffers of its own")


@rule("NRM607", "buffers-not-in-checkpoint")
def not_saved(m: Measurements, _: Thresholds) -> Judgement:
    """Running statistics do not survive the user's save and load.

    What it measures: the statistics of every normalizer before and after `roundtrip`, and the outputs.
    Why it hurts: a checkpoint of the parameters only looks complete and evaluates at chance (torch/nn#1165).
    Threshold: exact.
    Evidence: the layers, the relative difference of the outputs.
    Fixes: load-buffers [S3].
    Intentional when: statistics are measured again after loading.
    Known false alarms: a conversion to half precision on saving changes digits; the difference tells.
    Fixture: defect: save `dict(model.named_parameters())`; clean: the state_dict.
    """
    trip = m.roundtrip
    if trip is None:
        return absent("roundtrip=: your save and load as one function")
    if trip.problem:
        return failed(trip.problem)
    if not trip.changed:
        return fine("running statistics survive saving and loading")
    facts = {"layers": float(len(trip.changed)), "relative difference": trip.difference or 0.0}
    reason = f"statistics of {several(trip.changed)} do not survive saving and loading: {short(trip.changed)}"
    return alarm("E", reason, trip.changed, facts, None, ("load-buffers",))
