"""More of 1xx: how running statistics come about: noise, dummy forwards, several populations, the wrong inputs."""

from __future__ import annotations

import math

import numpy as np

from normscope.doctor import gates
from normscope.doctor.measurements import Grade, Layer, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, several, short, unfit
from normscope.doctor.suspects import few_values, jitter
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.trials import populations
from normscope.doctor.user import is_initial
from normscope.records import Interval

__all__: list[str] = []


@rule("NRM105", "ema-too-noisy", causes=("NRM106", "NRM301", "NRM302", "NRM304"), intents=("recalibrating",))
def noisy(m: Measurements, t: Thresholds) -> Judgement:
    """Running statistics that hold so few batches that they are noise.

    What it measures: the jitter √(m/(2 − m)·Var(batch mean)) of a running mean in σ, from the means of these batches;
    and how the score varies over 8 averages of the same batches in other orders.
    Why it hurts: the validation curve goes up and down with the last few batches (pytorch#3869, keras#10666).
    Threshold: a median jitter of 0.1 σ, which is momentum 0.1 with 5 samples per batch, or 0.9 with 96; an error where
    the score varies by 0.3 points (standard deviation) or more.
    Evidence: jitter by layer, the standard deviation of the score.
    Fixes: recal [S1]; lower-momentum [S1]; bigger-batch [S3].
    Intentional when: `recalibrating`.
    Known false alarms: a loader of smaller batches than the training's: in evaluation mode this is information.
    Fixture: defect: momentum 0.9; near-miss: 0.3 with batches of 512.
    """
    layers = [x for x in m.running if not x.held and x.momentum]
    if not layers:
        return unfit("no normalizer averages with a momentum")
    known = {x.name: jitter(x, m.own.get(x.name)) for x in layers}
    high = {name: value for name, value in known.items() if value >= t.jitter}
    if not high:
        return fine("running averages are smooth", {"largest jitter in σ": max(known.values())})
    names = sorted(high, key=lambda name: -high[name])
    facts: dict[str, float | str] = {"jitter in σ": high[names[0]]}
    reason = f"running means of {several(names)} jitter by {high[names[0]]:.2g} σ: {short(names)}"
    spread = None
    if m.noise_of_average is not None:
        # As a share it is a metric, whose standard deviation is one in points.
        outcome = m.outcomes.get("eval")
        is_share = (
            outcome is not None and outcome.metric is not None and gates.both_shares(outcome.metric, outcome.metric)
        )
        spread = float(np.std(m.noise_of_average, ddof=1)) * (100 if is_share else 1)
        facts["standard deviation of the score"] = spread
        spread = spread if is_share else None
        reason += f"; ±{facts['standard deviation of the score']:.2g} of the score is that noise"
    if not m.trains:
        return alarm("I", f"{reason}, if training had such batches", names, facts, None, ("recal", "bigger-batch"))
    grade: Grade = "W" if spread is None else "E" if spread >= t.cost_warning else "W"
    if spread is not None and spread < t.cost_warning / 3:
        grade = "I"
    return alarm(grade, reason, names, facts, None, ("recal", "lower-momentum", "bigger-batch"))


@rule("NRM108", "dummy-forward-pollution")
def dummy_forward(m: Measurements, _: Thresholds) -> Judgement:
    """Running variances that a forward of constant inputs has left behind.

    What it measures: whether nearly all channels of two layers or more share one running variance (1 − momentum)^j,
    which is what j batches without variance make of the initial 1.
    Why it hurts: a forward of zeros that finds out shapes or strides, in training mode, enters the average
    (ultralytics#18149, torchinfo#21).
    Threshold: 90 % of the channels, exact to 1e-6.
    Evidence: j, the share of the initial values that is left.
    Fixes: eval-dummy [S3]; recal [S1].
    Intentional when: never; it is harmless before a training of more than 3/momentum steps.
    Known false alarms: constant data.
    Fixture: defect: zeros in training mode; near-miss: the same, then 300 steps.
    """
    layers = [x for x in m.running if x.momentum and 0 < x.momentum < 1 and x.seen]
    if not layers:
        return unfit("no normalizer counts batches with a momentum")
    powers = {x.name: _power(x) for x in layers}
    polluted = [x for x in layers if powers[x.name]]
    if len(polluted) < min(2, len(layers)):
        return fine("no running variance is that of constant inputs")
    names = [x.name for x in polluted]
    j = powers[names[0]]
    facts = {"dummy forwards": float(j), "batches seen": float(polluted[0].seen or 0)}
    trained = any(x.bias is not None and x.bias.any() for x in layers)
    grade: Grade = "W" if trained else "I"
    reason = f"{j} forward{'s' * (j > 1)} of constant inputs entered the running variances of {short(names)}"
    return alarm(grade, reason, names, facts, None, ("eval-dummy", "recal"))


def _power(layer: Layer) -> int:
    """The j for which nearly all running variances are (1 − momentum)^j; 0 for none."""
    var = layer.var if layer.var is not None else np.ones(0)
    middle = float(np.median(var)) if len(var) else 0.0
    if not 0 < middle < 1 or np.mean(np.abs(var - middle) <= 1e-6 * middle) < 0.9:
        return 0
    j = math.log(middle) / math.log(1 - (layer.momentum or 0.1))
    return round(j) if round(j) >= 1 and abs(j - round(j)) < 1e-4 * max(1, round(j)) else 0


@rule("NRM107", "mixed-populations", intents=("supernet", "split-bn", "gan-batchstats-test"))
def mixed(m: Measurements, t: Thresholds) -> Judgement:
    """One normalizer is called several times, on inputs that are not alike.

    What it measures: by channel, the share of the variance that lies between the means of the calls, and the ratio of
    their variances, every call on its own batch's statistics; then the score with one statistic for every call against
    one for all.
    Why it hurts: a pooled statistic fits neither: branches, domains, real and generated samples (DomainBed#9,
    ganhacks#52, mixmatch#5).
    Threshold: a share of 0.2 or a ratio of 2 in a tenth of the channels, and statistics by call gain on split B.
    Evidence: share, ratio, the gain.
    Fixes: separate-statistics [S3]; replace-norm [S2].
    Intentional when: `supernet`, `split-bn`; `gan-batchstats-test`: batch statistics of each call are used.
    Known false alarms: two halves of one batch through one layer are alike and silent.
    Fixture: defect: two branches, the second with other inputs; near-miss: two halves of a batch.
    """
    data = {name: x for name, x in m.own.items() if x.sites}
    if not data:
        return unfit("no normalizer with running statistics is called twice in one forward")
    measured = {name: populations(x) for name, x in data.items()}
    apart = {n: p for n, p in measured.items() if p[0] > t.population_share or p[1] > t.population_ratio}
    if not apart:
        worst = max(measured.values())
        return fine("all calls bring alike inputs", {"largest share between calls": worst[0]})
    names = sorted(apart, key=lambda name: -apart[name][0])
    felt = m.trials.get("sites")
    facts = {"share between calls": apart[names[0]][0], "ratio of variances": apart[names[0]][1]}
    reason = f"calls of one normalizer bring different inputs: {short(names)}"
    if felt is None or felt.grade is None:
        return alarm("W", reason, names, facts, None, ("separate-statistics", "replace-norm"))
    tail = "" if felt.harmful else "; statistics by call gain nothing"
    return alarm(felt.grade, reason + tail, names, facts, felt, ("separate-statistics", "replace-norm"))


@rule("NRM109", "input-scale-mismatch", causes=("NRM305",))
def input_scale(m: Measurements, _: Thresholds) -> Judgement:
    """Inputs in another scale or order of channels than those of the training.

    What it measures: the statistics of the first normalizer against its data under a short list of input maps: × 255,
    ÷ 255, 2x − 1 and back, standardized, ImageNet's constants and back, channels reversed; the best one counts if it
    halves the divergence and the model gains by it on split B.
    Why it hurts: a forgotten ToTensor or Normalize: every layer behind sees other data than it was trained on
    (mmaction#1054).
    Threshold: half the divergence, and a gain whose interval excludes 0 and that is not less than new statistics give.
    Evidence: the map, the ratio of the variances, the gain.
    Fixes: scale-inputs [S3]; recal [S1] only where the transform cannot be mended.
    Intentional when: never.
    Known false alarms: data of another camera: see NRM110.
    Fixture: defect: inputs ÷ 255, or without their standardization; near-miss: 20 % brighter.
    """
    if not m.drift:
        return unfit("no normalizer with running statistics was watched")
    found = m.rescaled
    if found is None:
        return fine("no known map of the inputs explains the first normalizer's statistics better")
    first = next((site.layer for site in m.sites if site.layer in m.drift), "")
    facts: dict[str, float | str] = {"map": found.name, "variance ratio": found.ratio}
    reason = f"the first normalizer expects inputs {found.name}: variance ratio {found.ratio:.3g}"
    if found.effect.grade is None:
        return alarm("W", reason, (first,), facts, None, ("scale-inputs", "recal"))
    if is_initial(m.layer(first)) or _less(found.effect.cost, m.recalibrated.cost):
        return fine(
            f"inputs {found.name} gain less than new statistics: these are stale, the inputs are not wrong", facts
        )
    if not found.effect.harmful:
        return fine(f"inputs {found.name} would fit the first normalizer better, and gain nothing", facts)
    return alarm(found.effect.grade, reason, (first,), facts, found.effect, ("scale-inputs", "recal"))


def _less(gain: Interval | None, other: Interval | None) -> bool:
    """Whether a gain is clearly less than another one in the same unit."""
    if gain is None or other is None or gain.unit != other.unit or other.low <= 0:
        return False
    return gain.value < 0.8 * other.value


@rule("NRM110", "test-distribution-shift", causes=("NRM109", "NRM111"), intents=("tta-bn/adabn",))
def shifted(m: Measurements, _: Thresholds) -> Judgement:
    """The statistics describe the training's data, and not those of the place where the model is used.

    What it measures: NRM103's distances against the deployment loader, and the gain of its statistics there.
    Why it hurts: another camera, site or season: re-estimated statistics give back a part of the loss
    (Schneider et al. 2020; QAConv#16).
    Threshold: as NRM103, and a gain on the deployment loader; a model whose statistics fit the first loader.
    Evidence: layers, share of channels, the gain.
    Fixes: adapt [S3]: ns.recalibrate on unlabelled data of that place; retraining.
    Intentional when: `tta-bn/adabn`: statistics are measured at test time anyway.
    Known false alarms: a handful of samples scatter; chance is in the threshold.
    Fixture: defect: half the contrast; near-miss: 64 samples of the same data.
    """
    verdict = _elsewhere(m)
    if isinstance(verdict, Judgement):
        return verdict
    if m.same_samples:
        return unfit("the deployment loader has the same samples: see NRM111")
    names, facts = verdict
    grade = gates.severity(True, True, m.shift) or "I"
    reason = f"running statistics of {several(names)} are not those of the deployment loader's data: {short(names)}"
    return alarm(grade, f"{reason}; a shift, not a bug", names, facts, m.shift, ("adapt",))


@rule("NRM111", "transform-mismatch")
def transforms(m: Measurements, _: Thresholds) -> Judgement:
    """The same samples have other statistics in evaluation than in training: the transforms differ.

    What it measures: NRM103's distances against a second loader of the same samples, known by its labels.
    Why it hurts: crops, resolution and augmentation change what layers see (FixRes; pytorch#58986).
    Threshold: as NRM103, and a gain there.
    Evidence: layers, share of channels, the gain.
    Fixes: align-transforms [S3].
    Intentional when: augmentation is meant to be harder than evaluation.
    Known false alarms: flips of things that look like their mirror images change nothing and are silent.
    Fixture: defect: another contrast and brightness; near-miss: mild noise.
    """
    verdict = _elsewhere(m)
    if isinstance(verdict, Judgement):
        return verdict
    if not m.same_samples:
        return unfit("the deployment loader has other samples: see NRM110")
    names, facts = verdict
    grade = gates.severity(True, True, m.shift) or "I"
    reason = f"the same samples have other statistics in the second loader, in {several(names)}: {short(names)}"
    return alarm(grade, reason, names, facts, m.shift, ("align-transforms",))


def _elsewhere(m: Measurements) -> Judgement | tuple[list[str], dict[str, float | str]]:
    """The layers whose statistics fit the first loader and not the second, or what there is to say instead."""
    if not m.deployment:
        return absent("deployment=: a loader of the data on which the model is used")
    beyond = {n: d for n, d in m.deployment.items() if d.beyond}
    here = [n for n in beyond if n in m.drift and m.drift[n].beyond]
    if not beyond:
        worst = max(d.share for d in m.deployment.values())
        return fine("running statistics describe the data of both loaders", {"worst share of channels": worst})
    if len(here) == len(beyond):
        return failed("the statistics do not describe the first loader either: see NRM103")
    names = sorted(beyond, key=lambda n: -beyond[n].share)
    return names, {"layers": float(len(names)), "largest share of channels": beyond[names[0]].share}


@rule("NRM112", "bessel-gap", causes=("NRM301",))
def bessel(m: Measurements, t: Thresholds) -> Judgement:
    """Stored variances are larger than those that normalized the batches, because these hold few values.

    What it measures: n/(n − 1) by layer, n values per statistic; the score with running variances times (n − 1)/n.
    Why it hurts: a batch is normalized by its biased variance and the average keeps the unbiased one: with few values
    training and evaluation differ in scale (pytorch#3122, by design).
    Threshold: n ≤ 10; a warning only where the smaller variances gain on split B.
    Evidence: n, the ratio, the gain.
    Fixes: recal [S1]; bigger-batch [S3].
    Intentional when: never; it is torch's definition.
    Known false alarms: none: without a measured gain it is information.
    Fixture: defect: batches of 3; near-miss: batches of 3 with 16×16 maps.
    """
    layers = [x for x in m.layers if x.kind == "BatchNorm" and x.running and not x.held]
    if not layers:
        return unfit("no batch normalization with running statistics")
    found = few_values(m.layers, m.sites, m.batch_size, m.traced_size, t)
    if not found:
        return fine("batches hold enough values per statistic")
    names = sorted(found, key=lambda name: found[name])
    n = found[names[0]]
    facts = {"values": n, "n/(n − 1)": n / (n - 1)}
    felt = m.trials.get("bessel")
    grade: Grade = "W" if felt is not None and felt.harmful else "I"
    reason = f"with {n:g} values per statistic stored variances are {n / (n - 1) - 1:.0%} too large: {short(names)}"
    return alarm(grade, reason, names, facts, felt, ("recal", "bigger-batch"))
