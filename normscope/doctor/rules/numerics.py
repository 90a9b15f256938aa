"""5xx: numbers that do not fit: ε, overflow, cancellation, precision of the buffers."""

from __future__ import annotations

import numpy as np

from normscope.doctor.measurements import Grade, Measurements, Moments, Site
from normscope.doctor.rules.base import Judgement, alarm, fine, rule, several, short, unfit
from normscope.doctor.suspects import eps_share
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []

HALVES = ("float16", "bfloat16")


@rule("NRM501", "eps-vanishes-in-dtype")
def vanishing_eps(m: Measurements, _: Thresholds) -> Judgement:
    """ε is 0 in the precision in which the normalizer computes.

    What it measures: an input without variance, in the dtype of the traced call, through every normalizer that gets
    half precision; and whether ε rounds to 0 there.
    Why it hurts: LayerNorm with ε = 1e-12 in float16 gives NaN on constant rows (pytorch#41527, wenet#907).
    Threshold: exact; float16 keeps nothing below 6e-8.
    Evidence: ε, the dtype, whether the output was finite.
    Fixes: float32 [S1]; default-eps [S1].
    Intentional when: never.
    Known false alarms: kernels that compute in float32 inside are asked, and finite: information.
    Fixture: defect: a normalizer written by hand with ε = 1e-12 in float16; near-miss: the same in bfloat16.
    """
    eps = {x.name: x.eps for x in m.layers}
    low = [site for site in m.sites if site.dtype in HALVES and site.layer in eps]
    if not low:
        return unfit("no normalizer computes in half precision")
    small = [s for s in low if eps[s.layer] > 0 and _rounds_to_zero(eps[s.layer], s)]
    broken = [s.layer for s in low if s.finite is False]
    if not small and not broken:
        return fine("ε is a number in every dtype, and constant inputs stay finite")
    names = list(dict.fromkeys((*broken, *(s.layer for s in small))))
    site = next(s for s in low if s.layer == names[0])
    facts: dict[str, float | str] = {"ε": eps[names[0]], "dtype": site.dtype}
    facts["constant input"] = "not finite" if broken else "finite"
    if broken:
        reason = f"a constant input gives NaN or infinity in {short(broken)}: ε = {eps[names[0]]:g} in {site.dtype}"
        return alarm("E", reason, names, facts, None, ("float32", "default-eps"))
    reason = f"ε = {eps[names[0]]:g} is 0 in {site.dtype}; the kernels of {short(names)} compute wider"
    return alarm("I", reason, names, facts, None, ("float32", "default-eps"))


def _rounds_to_zero(eps: float, site: Site) -> bool:
    # bfloat16 has the exponents of float32.
    return bool(np.float16(eps) == 0) if site.dtype == "float16" else bool(np.float32(eps) == 0)


@rule("NRM502", "eps-dominates", causes=("NRM704",))
def dominant_eps(m: Measurements, t: Thresholds) -> Judgement:
    """Channels whose variance is so small that ε decides their scale.

    What it measures: the share of channels with a running variance below 10·ε, those aside that γ switches off; then
    the score with ε × 0.1 and × 10.
    Why it hurts: the model hangs on the value of a constant that conversions and frozen classes change: loss 4e10
    (vision#2599).
    Threshold: 5 % of a layer's channels; measured without an effect it is information.
    Evidence: the share, ε, the effect.
    Fixes: like-origin [S3]; prune [S3].
    Intentional when: never.
    Known false alarms: channels with γ ≈ 0 are left out.
    Fixture: defect: inputs × 1e-3 with ε = 1e-5; near-miss: small variances where γ is 0.
    """
    layers = [x for x in m.layers if x.running and x.var is not None]
    if not layers:
        return unfit("no normalizer keeps running variances")
    shares = {x.name: eps_share(x, t) for x in layers}
    high = sorted((n for n in shares if shares[n] >= t.eps_share), key=lambda n: -shares[n])
    if not high:
        return fine("variances are well above ε", {"largest share of channels": max(shares.values())})
    felt = m.trials.get("eps")
    facts = {"share of channels": shares[high[0]], "ε": m.layer(high[0]).eps}
    moves = felt is not None and felt.cost is not None and (felt.cost.low > 0 or felt.cost.high < 0)
    grade: Grade = "W" if felt is None or felt.grade is None or (moves and _large(felt.cost, t)) else "I"
    reason = f"ε decides the scale of {shares[high[0]]:.0%} of the channels of {short(high)}"
    return alarm(grade, reason, high, facts, None, ("like-origin", "prune"))


def _large(cost: object, t: Thresholds) -> bool:
    value, unit = getattr(cost, "value", 0.0), getattr(cost, "unit", "")
    return bool(abs(value) >= (t.cost_warning if unit == "pp" else t.loss_warning))


@rule("NRM503", "overflow-risk")
def overflow(m: Measurements, t: Thresholds) -> Judgement:
    """Inputs of a normalizer that come close to the end of float16.

    What it measures: the largest |x| that enters a normalizer in float16, and values that are not finite.
    Why it hurts: one infinity makes running statistics NaN for good, while GradScaler only skips the step
    (pytorch#90342); reductions overflow earlier (TensorRT#2564).
    Threshold: 16,384, two bits below the end; values that are not finite are an error.
    Evidence: the largest value, the layer.
    Fixes: float32 [S1]; bfloat16 [S3].
    Intentional when: never.
    Known false alarms: bfloat16 and float32 have room and are silent.
    Fixture: defect: a convolution × 1e4 before BatchNorm under float16; near-miss: under bfloat16.
    """
    low = {n: x for n, x in m.seen.items() if x.dtype == "float16" and x.low is not None and x.high is not None}
    if not low:
        return unfit("no normalizer with running statistics gets float16")
    largest = {n: _reach(x) for n, x in low.items()}
    infinite = {n: x.infinite for n, x in low.items() if x.infinite}
    close = sorted((n for n in largest if largest[n] > t.overflow), key=lambda n: -largest[n])
    if not close and not infinite:
        return fine("inputs in float16 have room", {"largest value": max(largest.values())})
    names = list(dict.fromkeys((*infinite, *close)))
    facts = {"largest value": max(largest.values()), "not finite": float(sum(infinite.values()))}
    reason = f"inputs of {short(names)} reach {max(largest.values()):.3g} in float16, which ends at 65504"
    return alarm("E" if infinite else "W", reason, names, facts, None, ("float32", "bfloat16"))


def _reach(x: Moments) -> float:
    ends = [np.nan_to_num(np.abs(end), nan=0.0, posinf=65504.0) for end in (x.low, x.high) if end is not None]
    return float(np.max(ends))


@rule("NRM504", "cancellation")
def cancellation(m: Measurements, t: Thresholds) -> Judgement:
    """Channels whose mean is so far from 0 that rounding eats their variation.

    What it measures: |mean|/σ by channel, and the dtype in which it arrives.
    Why it hurts: the input is rounded to a share of its mean before any normalizer sees it: what is left of the
    variation is noise.
    Threshold: 1e3 in float32, 200 in float16, 25 in bfloat16, in 5 % of a layer's channels; constant channels aside.
    Evidence: the ratio, the dtype.
    Fixes: centre-inputs [S3].
    Intentional when: never.
    Known false alarms: a ratio of 5 costs nothing and is silent.
    Fixture: defect: inputs + 5000; near-miss: + 5.
    """
    if not m.seen:
        return unfit("no normalizer with running statistics was reached")
    ends = {"float32": (t.cancellation_float32, 2.0**-23), "float16": (t.cancellation_float16, 2.0**-10),
            "bfloat16": (t.cancellation_bfloat16, 2.0**-7)}  # fmt: skip
    found: dict[str, float] = {}
    for name, x in m.seen.items():
        if x.dtype not in ends:
            continue
        limit, digit = ends[x.dtype]
        with np.errstate(all="ignore"):
            ratio = np.abs(x.mean) / np.sqrt(x.var)
        # Beyond the last digit there is no variation that could be lost.
        hit = np.isfinite(ratio) & (ratio > limit) & (ratio < 1 / digit)
        if hit.mean() >= t.eps_share:
            found[name] = float(np.median(ratio[hit]))
    if not found:
        return fine("means are not far from 0 compared with the variation")
    names = sorted(found, key=lambda n: -found[n])
    facts: dict[str, float | str] = {"|mean|/σ": found[names[0]], "dtype": m.seen[names[0]].dtype}
    far, dtype = found[names[0]], m.seen[names[0]].dtype
    reason = f"the inputs of {short(names)} lie {far:,.0f} σ away from 0, which costs digits in {dtype}"
    return alarm("W", reason, names, facts, None, ("centre-inputs",))


@rule("NRM505", "statistics-span")
def span(m: Measurements, t: Thresholds) -> Judgement:
    """Running variances that span many orders of magnitude within one layer.

    What it measures: the largest over the smallest running variance of a layer, channels below 10·ε aside; the largest.
    Why it hurts: mostly an input feature that was not scaled; the layers behind see it alone.
    Threshold: a ratio of 1e6, or a variance of 1e5; information.
    Evidence: ratio, largest variance.
    Fixes: scale-inputs [S3].
    Intentional when: features of very different scale that the first normalizer is there to equalize.
    Known false alarms: a ratio of 1e3 is common and silent.
    Fixture: defect: one input feature × 1e4; near-miss: × 20.
    """
    layers = [x for x in m.layers if x.running and x.var is not None and np.isfinite(x.var).all() and len(x.var)]
    if not layers:
        return unfit("no normalizer keeps running variances")
    found: dict[str, tuple[float, float]] = {}
    for x in layers:
        var = np.asarray(x.var)
        live = var[var > t.eps_times * x.eps]
        ratio = float(live.max() / live.min()) if len(live) else 1.0
        if ratio > t.span or float(var.max()) > t.span_variance:
            found[x.name] = (ratio, float(var.max()))
    if not found:
        return fine("running variances are of comparable size")
    names = sorted(found, key=lambda n: -found[n][0])
    facts = {"largest over smallest": found[names[0]][0], "largest variance": found[names[0]][1]}
    reason = f"running variances of {short(names)} span a factor of {found[names[0]][0]:.2g}"
    return alarm("I", reason, names, facts, None, ("scale-inputs",))


@rule("NRM506", "low-precision-buffers")
def low_precision(m: Measurements, t: Thresholds) -> Judgement:
    """Running statistics in half precision.

    What it measures: the dtype of running mean and variance.
    Why it hurts: an average stands still once a step is smaller than half a digit: in bfloat16 with momentum 0.01 the
    running mean stops at 0.84 for a true mean of 1; a variance above 65504 is infinite in float16 (apex#144).
    Threshold: float16 or bfloat16; an error while they move in training, a warning in evaluation where recalibration
    gains or a variance is infinite, else information.
    Evidence: the dtype, the stall 1/(2·momentum) digits.
    Fixes: float32-recal [S1]; float32 [S1].
    Intentional when: never while training; for inference it costs little.
    Known false alarms: buffers of frozen layers that were rounded once: information.
    Fixture: defect: model.half() in training; near-miss: the same frozen.
    """
    layers = [x for x in m.layers if x.running and x.var is not None]
    if not layers:
        return unfit("no normalizer keeps running statistics")
    low = [x for x in layers if x.dtype in HALVES]
    if not low:
        return fine("running statistics are in float32 or wider")
    names = [x.name for x in low]
    trains = [x for x in low if x.training and not x.held and x.momentum != 0]
    infinite = any(x.var is not None and not (x.var <= t.half_stall).all() for x in low)
    drifted = m.recalibrated.harmful and any(m.drift[n].beyond for n in names if n in m.drift)
    grade: Grade = "E" if trains else "W" if infinite or drifted else "I"
    digit = 2.0**-11 if low[0].dtype == "float16" else 2.0**-8
    facts: dict[str, float | str] = {"dtype": low[0].dtype, "layers": float(len(low))}
    facts["an average stalls within"] = digit / (low[0].momentum or 0.1)
    reason = f"running statistics of {several(low)} are in {low[0].dtype}: {short(names)}"
    return alarm(grade, reason, names, facts, m.recalibrated if drifted else None, ("float32-recal", "float32"))
