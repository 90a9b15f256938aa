"""4xx: where normalizers stand in the network, and what they do to what goes through them."""

from __future__ import annotations

import numpy as np

from normscope.doctor.measurements import Array, Grade, Layer, Measurements, Moments
from normscope.doctor.rules.base import Judgement, alarm, failed, fine, rule, short, unfit
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []

# What torch takes; with less, or none, a variance of nearly 0 is blown up all the more.
USUAL_EPS = 1e-5


@rule("NRM401", "redundant-bias")
def redundant_bias(m: Measurements, _: Thresholds) -> Judgement:
    """A bias that the normalizer behind it subtracts again.

    What it measures: linear layers and convolutions with a bias whose output goes, in one traced forward, into
    BatchNorm or InstanceNorm and nowhere else.
    Why it hurts: a parameter without effect, its gradient noise, its optimizer state; cosmetic (Pytorch-UNet#325).
    Threshold: exact; LayerNorm and GroupNorm keep a bias and are silent.
    Evidence: the layers with the bias.
    Fixes: absorb-bias [S0].
    Intentional when: the convolution is used elsewhere without a normalizer.
    Known false alarms: none; it is information.
    Fixture: defect: convolution with bias before BatchNorm; near-miss: before GroupNorm, or a ReLU between.
    """
    if not m.fed:
        return unfit("no linear layer or convolution feeds a BatchNorm or InstanceNorm")
    names = [norm for norm, (linear, why) in m.fed.items() if why == "" and linear in m.biased]
    if not names:
        return fine("no bias is subtracted again")
    linears = [m.fed[name][0] for name in names]
    facts = {"layers": float(len(names))}
    return alarm(
        "I",
        f"the bias of {short(linears)} does nothing: the normalizer behind subtracts it",
        names,
        facts,
        None,
        ("absorb-bias",),
    )


@rule("NRM402", "norm-erases-signal")
def erases(m: Measurements, t: Thresholds) -> Judgement:
    """A normalizer over one or two values: what goes in does not come out.

    What it measures: the values per statistic at every call of LayerNorm, GroupNorm, InstanceNorm and RMSNorm.
    Why it hurts: of one value the mean is all there is, and the output is β whatever the input; of two the sign of
    their difference is left.
    Threshold: one value is an error, two are a warning.
    Evidence: values per statistic, the shape of the input.
    Fixes: other-axis [S3].
    Intentional when: never.
    Known false alarms: RMSNorm does not subtract a mean and keeps the sign of one value: a warning.
    Fixture: defect: LayerNorm over 1 value, GroupNorm with a group per channel on 1×1 maps; near-miss: 16 values.
    """
    kinds = {x.name: x.kind for x in m.layers if x.kind in ("LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm")}
    sites = [s for s in m.sites if s.layer in kinds]
    if not sites:
        return unfit("no normalizer over parts of one sample was reached")
    tracked = {x.name for x in m.layers if x.kind == "InstanceNorm" and x.running}
    small = {s.layer: s for s in sites if s.values <= t.values_error and s.layer not in tracked}
    if not small:
        return fine("every statistic is over several values", {"fewest values": min(s.values for s in sites)})
    names = sorted(small, key=lambda n: small[n].values)
    site = small[names[0]]
    grade: Grade = "E" if site.values <= 1 and kinds[names[0]] != "RMSNorm" else "W"
    left = "the output is β whatever comes in" if grade == "E" else "only signs come out"
    reason = f"{short(names)} normalizes over {site.values:g} value{'s' * (site.values > 1)}: {left}"
    facts: dict[str, float | str] = {"values": site.values, "input": str(site.shape)}
    return alarm(grade, reason, names, facts, None, ("other-axis",))


@rule("NRM403", "wrong-axis")
def wrong_axis(m: Measurements, _: Thresholds) -> Judgement:
    """BatchNorm over positions in place of channels.

    What it measures: for BatchNorm and InstanceNorm on inputs of three axes or more, whether the layer that made the
    input put its features on another axis than axis 1.
    Why it hurts: BatchNorm1d(length) on (sample, position, feature) keeps a statistic per position, and mixes the
    features; another length raises.
    Threshold: exact, where the axis is known; equal sizes of both axes do not matter to it.
    Evidence: the input's shape, the axis of the features.
    Fixes: transpose [S3].
    Intentional when: statistics per position are wanted.
    Known false alarms: inputs whose maker is not known are silent.
    Fixture: defect: BatchNorm1d over positions behind a linear layer; near-miss: transposed before.
    """
    kinds = {x.name for x in m.layers if x.kind in ("BatchNorm", "InstanceNorm")}
    sites = [s for s in m.sites if s.layer in kinds and len(s.shape) > 2]
    if not sites:
        return unfit("no BatchNorm or InstanceNorm gets more than two axes")
    if all(s.axis is None for s in sites):
        return failed("which axis holds the features is not known")
    wrong = {s.layer: s for s in sites if s.axis is not None and s.axis != 1}
    if not wrong:
        return fine("features lie on axis 1 where normalizers take them")
    site = next(iter(wrong.values()))
    facts: dict[str, float | str] = {"input": str(site.shape), "features on axis": float(site.axis or 0)}
    reason = f"{short(wrong)} takes axis 1 of its input {site.shape} for the features, which lie on axis {site.axis}"
    return alarm("W", reason, list(wrong), facts, None, ("transpose",))


@rule("NRM404", "dead-channels")
def dead(m: Measurements, t: Thresholds) -> Judgement:
    """Channels that are 0 for every sample.

    What it measures: BatchNorm layers straight before a ReLU: from γ, β, the running statistics and the range of the
    input the largest output of every channel; dead where it is not above 0.
    Why it hurts: width that is paid for and not there; pruning that cuts them must carry the constant on
    (network-slimming#46).
    Threshold: 5 % of a layer's channels; a warning from 20 % on.
    Evidence: how many of how many channels.
    Fixes: prune [S3].
    Intentional when: a pruned network before it is cut; γ = 0 at the start (`zero-init`) is silent.
    Known false alarms: channels that are active in one sample of 200 are alive.
    Fixture: defect: β = −10 in a quarter of the channels; near-miss: γ = 0 with β > 0.
    """
    data = {x.name: (x, m.seen[x.name]) for x in m.layers if x.running and x.name in m.seen and x.name in m.rectified}
    known = {n: share for n, (x, d) in data.items() if (share := _dead_share(x, d)) is not None}
    if not known:
        return unfit("no normalizer with running statistics stands straight before a ReLU")
    high = sorted((n for n in known if known[n] >= t.dead_share), key=lambda n: -known[n])
    if not high:
        return fine("channels are alive", {"largest share of dead channels": max(known.values())})
    grade: Grade = "W" if known[high[0]] >= t.dead_warning else "I"
    channels = {n: len(np.atleast_1d(data[n][1].mean)) for n in high}
    facts = {
        "share of dead channels": known[high[0]],
        "channels": sum(round(known[n] * channels[n]) for n in high) * 1.0,
    }
    reason = f"{known[high[0]]:.0%} of the channels of {short(high)} are 0 for every sample"
    return alarm(grade, reason, high, facts, None, ("prune",))


def _dead_share(layer: Layer, data: Moments) -> float | None:
    if layer.mean is None or layer.var is None or data.low is None or data.high is None or layer.seen == 0:
        return None
    gamma = np.ones_like(layer.mean) if layer.weight is None else layer.weight
    beta = np.zeros_like(layer.mean) if layer.bias is None else layer.bias
    if not gamma.any():
        return 0.0
    scale = gamma / np.sqrt(np.maximum(layer.var, 0) + layer.eps)
    ends: list[Array] = [scale * (end - layer.mean) + beta for end in (data.low, data.high)]
    return float((np.maximum(*ends) <= 0).mean())


@rule("NRM405", "near-constant-channel-amplified", causes=("NRM102", "NRM103"))
def amplified(m: Measurements, t: Thresholds) -> Judgement:
    """A channel that was constant in training and is not any more.

    What it measures: channels whose running variance is below 10·ε, or 1e-4 where ε is less than 1e-5, while the data's
    is 100 times larger and more.
    Why it hurts: dividing by a deviation of nearly 0 blows up what varies now: a loss of 4e10 (vision#2599).
    Threshold: any such channel that γ does not switch off; an error where recalibration gains as much.
    Evidence: the channels, the ratio of the variances.
    Fixes: recal [S1]; prune [S3].
    Intentional when: never.
    Known false alarms: a channel that is constant in both is silent; a variance below 0 is told by NRM101.
    Fixture: defect: a feature that was constant in training; near-miss: it still is.
    """
    layers = [x for x in m.layers if x.running and x.var is not None and x.name in m.own]
    if not layers:
        return unfit("no normalizer with running statistics was watched")
    found = {}
    for x in layers:
        var, data = np.asarray(x.var), m.own[x.name].var
        weight = np.ones_like(var) if x.weight is None else np.abs(x.weight)
        live = weight > t.gamma_zero * max(float(weight.max(initial=0.0)), 1e-30)
        small = t.eps_times * max(x.eps, USUAL_EPS)
        hit = live & (var >= 0) & (var < small) & (data > t.constant_times * (var + x.eps))
        if hit.any():
            found[x.name] = float(np.max(data[hit] / np.maximum(var[hit] + x.eps, 1e-30)))
    if not found:
        return fine("no channel was constant in training and varies now")
    names = sorted(found, key=lambda n: -found[n])
    felt = m.recalibrated
    grade: Grade = "W" if felt.grade is None else felt.grade
    facts = {"layers": float(len(names)), "data over running variance": found[names[0]]}
    reason = f"channels of {short(names)} vary {found[names[0]]:.2g} times more than their running variance"
    return alarm(grade, reason, names, facts, felt, ("recal", "prune"))


@rule("NRM406", "dropout-before-norm")
def dropout_before(m: Measurements, t: Thresholds) -> Judgement:
    """Dropout before a normalizer: training and evaluation have other variances.

    What it measures: normalizers with dropout and no other normalizer before them in the traced forward, and the ratio
    of running to evaluation variance, median over channels.
    Why it hurts: dropout scales what it keeps: the variance grows in training only, and running statistics keep that
    (arXiv 1801.05134).
    Threshold: a ratio of 1.25; a warning where recalibrated statistics gain on split B.
    Evidence: the ratio, the gain.
    Fixes: recal [S1], with dropout off; dropout-last [S3].
    Intentional when: never; it often costs nothing measurable.
    Known false alarms: small dropout rates stay below the ratio.
    Fixture: defect: dropout 0.5 between ReLU and the next layer; near-miss: 0.05.
    """
    fed = {s.layer for s in m.sites if s.dropout}
    layers = [x for x in m.layers if x.name in fed and x.running and x.var is not None and x.name in m.seen]
    if not layers:
        return unfit("no dropout stands before a normalizer with running statistics")
    with np.errstate(all="ignore"):
        ratio = {x.name: float(np.median((np.asarray(x.var) + x.eps) / (m.seen[x.name].var + x.eps))) for x in layers}
    high = sorted((n for n in ratio if ratio[n] >= t.dropout_ratio), key=lambda n: -ratio[n])
    if not high:
        return fine("dropout before normalizers changes their variances little", {"largest ratio": max(ratio.values())})
    grade: Grade = "W" if m.recalibrated.harmful else "I"
    facts = {"running over evaluation variance": ratio[high[0]]}
    reason = f"dropout before {short(high)}: running variances are {ratio[high[0]]:.2g} times those of evaluation"
    return alarm(grade, reason, high, facts, m.recalibrated, ("recal", "dropout-last"))


@rule("NRM407", "norm-on-output")
def on_output(m: Measurements, _: Thresholds) -> Judgement:
    """The model's output is a normalizer's.

    What it measures: whether the last operation before the output is a normalizer, in the traced forward.
    Why it hurts: scores of fixed mean and variance over the batch cannot say how sure they are.
    Threshold: exact; information.
    Evidence: the layer.
    Fixes: remove-norm [S3].
    Intentional when: embeddings and necks before a classifier that is not part of the model.
    Known false alarms: feature extractors.
    Fixture: defect: BatchNorm behind the classifier; near-miss: before it.
    """
    if not m.sites:
        return unfit("no normalizer was reached")
    if not m.last:
        return fine("the output is no normalizer's")
    facts = {"layers": float(len(m.last))}
    return alarm("I", f"the output comes straight out of {short(m.last)}", m.last, facts, None, ("remove-norm",))


@rule("NRM409", "norm-never-called")
def never_called(m: Measurements, _: Thresholds) -> Judgement:
    """Normalizers that neither evaluation nor training calls.

    What it measures: normalizers without a call in all batches of split A and in the training steps.
    Why it hurts: parameters that are stored, decayed and never used; often a layer that a refactoring forgot.
    Threshold: exact.
    Evidence: the layers.
    Fixes: remove-norm [S3]; reach [S3].
    Intentional when: heads for another task.
    Known false alarms: without train_step nothing is said: a layer may be for training only.
    Fixture: defect: a registered layer that forward does not use; near-miss: one used in training only.
    """
    steps = m.steps
    if not m.unreached:
        return fine("every normalizer was called") if m.layers else unfit("the model has no normalizers")
    if steps is None or steps.problem:
        return Judgement("needs-input", "train_step=: some may be for training only")
    names = [name for name in m.unreached if name not in steps.called]
    if not names:
        return fine("normalizers that evaluation does not call are used in training")
    reason = f"neither evaluation nor training calls {short(names)}"
    return alarm("I", reason, names, {"layers": float(len(names))}, None, ("remove-norm", "reach"))


@rule("NRM410", "norm-called-repeatedly")
def repeated(m: Measurements, _: Thresholds) -> Judgement:
    """One normalizer is called several times in a forward.

    What it measures: the calls per forward.
    Why it hurts: by itself it does not: running statistics are of all calls together, and move once per call. Whether
    the calls are alike, NRM107 says; whether they are more than meant, NRM601.
    Threshold: two calls; information.
    Evidence: the calls.
    Fixes: separate-statistics [S3].
    Intentional when: siamese networks, recurrences.
    Known false alarms: none; it is information.
    Fixture: defect: one BatchNorm for two branches; near-miss: a LayerNorm, which has no statistics.
    """
    running = {x.name for x in m.layers if x.running}
    calls = {name: sum(s.layer == name for s in m.sites) for name in running}
    if not running:
        return unfit("no normalizer keeps running statistics")
    many = sorted((n for n in calls if calls[n] > 1), key=lambda n: -calls[n])
    if not many:
        return fine("every normalizer is called once")
    facts = {"calls": float(calls[many[0]])}
    reason = f"{short(many)} is called {calls[many[0]]} times in a forward"
    return alarm("I", reason, many, facts, None, ("separate-statistics",))


@rule("NRM411", "norm-after-norm")
def after_norm(m: Measurements, _: Thresholds) -> Judgement:
    """A normalizer straight behind another.

    What it measures: inputs that are another normalizer's output, but for their shape and dropout.
    Why it hurts: the second undoes the first's γ and β or does nothing; twice the time.
    Threshold: exact; information.
    Evidence: the pair.
    Fixes: remove-norm [S3].
    Intentional when: they normalize over other axes.
    Known false alarms: pairs over different scopes are meant sometimes: information.
    Fixture: defect: BatchNorm behind BatchNorm; near-miss: a ReLU between.
    """
    if not m.sites:
        return unfit("no normalizer was reached")
    pairs = {s.layer: s.after for s in m.sites if s.after and s.after != s.layer}
    if not pairs:
        return fine("something lies between any two normalizers")
    first = next(iter(pairs))
    facts: dict[str, float | str] = {"layers": float(len(pairs)), "behind": pairs[first]}
    return alarm("I", f"{short(pairs)} normalizes what {pairs[first]} has", list(pairs), facts, None, ("remove-norm",))
