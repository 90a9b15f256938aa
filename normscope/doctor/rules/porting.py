"""606 and 7xx: conversions, folding, export, other conventions."""

from __future__ import annotations

from normscope.doctor.measurements import Change, Measurements, Reference
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, several, short, unfit
from normscope.doctor.rules.prices import costs_of_model
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []

_NEEDS = "reference=: the model before the conversion"


def _reference(m: Measurements) -> Reference | Judgement:
    if m.reference is None:
        return absent(_NEEDS)
    return failed(m.reference.problem) if m.reference.problem else m.reference


def _told(changes: list[Change]) -> str:
    return "; ".join(f"{c.attribute} of {c.layer} is {c.here}, was {c.there}" for c in changes[:2])


@rule("NRM606", "conversion-changed-function", causes=("NRM704",))
def conversion(m: Measurements, t: Thresholds) -> Judgement:
    """The same weights and statistics, and other outputs: a conversion of normalizers lost something.

    What it measures: with a reference of the same weights and buffers, the relative difference of the outputs in
    evaluation mode, and which attributes of normalizers differ: class, ε, momentum, mode.
    Why it hurts: converters that go by inheritance turn InstanceNorm into SyncBatchNorm (apex#437), lose ε or the mode
    of frozen layers (mmengine#1624); 37 dB became 25 (bias_free_denoising#3).
    Threshold: 1e-4, or 1e-2 in half precision.
    Evidence: the difference, the attributes.
    Fixes: convert-again [S3].
    Intentional when: another normalizer is wanted: then the weights have to be trained on.
    Known false alarms: other kernels round otherwise, by 1e-6.
    Fixture: defect: ε lost, or InstanceNorm with tracked statistics from BatchNorm; near-miss: only the momentum is
    another.
    """
    r = _reference(m)
    if isinstance(r, Judgement):
        return r
    changes = [c for c in r.changes if c.attribute != "momentum"]
    if not r.same_weights or set(r.equal) != set(r.matched) or r.gone:
        return unfit("the reference has other weights or statistics")
    if r.difference is None:
        return failed("the outputs cannot be compared")
    facts = {"relative difference": r.difference, "attributes changed": float(len(changes))}
    if r.difference <= (t.dependence_half if r.half else t.conversion):
        lost = [c for c in changes if c.attribute == "training"]
        if lost:
            reason = f"modes changed in the conversion: {_told(lost)}"
            return alarm("W", reason, [c.layer for c in lost], facts, None, ("convert-again",))
        return fine("the same weights give the same outputs", facts)
    names = list(dict.fromkeys(c.layer for c in changes if c.attribute != "training")) or [c.layer for c in changes]
    reason = f"the same weights and statistics give outputs that differ by {r.difference:.2g}"
    return alarm("E", f"{reason}; {_told(changes)}" if changes else reason, names, facts, None, ("convert-again",))


@rule("NRM701", "fold-mismatch")
def fold_mismatch(m: Measurements, t: Thresholds) -> Judgement:
    """Normalizers were folded into the layers before them, and the outputs are others.

    What it measures: with the model before folding as reference: normalizers that are gone, and the relative
    difference of the outputs in evaluation mode.
    Why it hurts: a fold that adds the bias without scaling it goes unnoticed while convolutions have none
    (yolov3#807).
    Threshold: 1e-4 relative to the norm, never a sum over elements; 1e-2 in half precision.
    Evidence: the difference, the layers that are gone.
    Fixes: fold-again [S3].
    Intentional when: never.
    Known false alarms: none known.
    Fixture: defect: bias added unscaled; clean: folded right; near-miss: folded right in another order of operations.
    """
    r = _reference(m)
    if isinstance(r, Judgement):
        return r
    if not r.gone or not r.folded:
        return unfit("the reference has no normalizer that the model lacks")
    if r.difference is None:
        return failed("the outputs cannot be compared")
    facts = {"relative difference": r.difference, "normalizers gone": float(len(r.gone))}
    if r.difference <= (t.dependence_half if r.half else t.conversion):
        return fine("folding kept the function", facts)
    reason = f"outputs of the model with {several(r.gone)} folded differ by {r.difference:.2g}: {short(r.gone)}"
    return alarm("E", reason, r.gone, facts, None, ("fold-again",))


@rule("NRM702", "foldable-not-folded")
def unfolded(m: Measurements, t: Thresholds) -> Judgement:
    """Inference computes normalizers that the layers beside them could compute.

    What it measures: a forward in evaluation mode as it is and of a folded copy, in turns, 12 times each; the 99 %
    interval of the difference. The copy is proven equal before it is timed.
    Why it hurts: in evaluation BatchNorm is s·x + t, which the layer next to it does for nothing.
    Threshold: 3 % of the forward with an interval above 0.
    Evidence: milliseconds, the share, how many can be folded.
    Fixes: fold [S3].
    Intentional when: training goes on: a folded model cannot be trained as before.
    Known false alarms: none; it is information, and asked for by select.
    Fixture: none, because a busy machine would break it; measurements made by hand, and a layer that cannot be folded.
    """
    costs = costs_of_model(m)
    if isinstance(costs, Judgement):
        return costs
    if costs.folding is None:
        return failed(costs.fold_problem) if costs.fold_problem else absent("select=['NRM702']: it takes a while")
    if not costs.folded:
        return fine("no normalizer can be folded")
    share = costs.folding.value / costs.inference
    facts = {"forward in ms": costs.inference, "folding saves in ms": costs.folding.value, "share": share}
    if share < t.cost_share:
        return fine("folding would save little", facts)
    if costs.folding.low <= 0:
        return failed("the machine is too busy to tell what folding saves")
    reason = f"folding saves {share:.0%} of a forward: {costs.folding.value:.3g} of {costs.inference:.3g} ms"
    return Judgement("info", reason, costs.folded, facts, costs.folding, ("fold",))


@rule("NRM703", "exported-in-train-mode")
def exported(m: Measurements, _: Thresholds) -> Judgement:
    """An exported graph that normalizes by the batch.

    What it measures: batch normalizations in the graph of torch.export, torch.fx or TorchScript whose flag for
    training is a constant True.
    Why it hurts: answers depend on the batch, one sample raises or is all zeros, and no eval() changes that
    (onnxruntime#3873).
    Threshold: exact.
    Evidence: the nodes.
    Fixes: export-eval [S3].
    Intentional when: on-device training.
    Known false alarms: none known.
    Fixture: defect: torch.export of a model in training mode; near-miss: in evaluation mode.
    """
    if m.exported is None:
        return unfit("the model is no exported graph")
    if not m.exported:
        return fine("the graph normalizes by running statistics")
    reason = f"{len(m.exported)} batch normalizations of the graph use the batch: {short(m.exported)}"
    return alarm("E", reason, m.exported, {"nodes": float(len(m.exported))}, None, ("export-eval",))


@rule("NRM704", "eps-momentum-differ-from-origin")
def origin(m: Measurements, t: Thresholds) -> Judgement:
    """ε or momentum are not those with which the weights were trained.

    What it measures: both against a reference, and the relative change of the output's scale that the other ε makes,
    median over channels.
    Why it hurts: a port with ε = 1e-5 of weights that were trained with 1e-3 answers otherwise (Torch-Pruning#147,
    transformers#18597); a momentum in the other convention shows once training goes on.
    Threshold: 1 % of the scale; less, or another momentum, is information.
    Evidence: the values, the change of scale.
    Fixes: like-origin [S3].
    Intentional when: both were changed on purpose.
    Known false alarms: another ε beside large variances changes nothing: information.
    Fixture: defect: ε 1e-5 for 0.1; near-miss: 1e-5 for 1e-6.
    """
    r = _reference(m)
    if isinstance(r, Judgement):
        return r
    changes = sorted((c for c in r.changes if c.attribute in ("eps", "momentum")), key=lambda c: -c.scale)
    if not changes:
        return fine("ε and momentum are the reference's")
    large = [c for c in changes if c.scale > t.eps_scale]
    names = list(dict.fromkeys(c.layer for c in (large or changes)))
    facts: dict[str, float | str] = {"change of scale": changes[0].scale, "first": _told(changes[:1])}
    reason = f"{_told(changes)}: the scale changes by {changes[0].scale:.2g}"
    return alarm("W" if large else "I", reason, names, facts, None, ("like-origin",))


@rule("NRM705", "fold-range-explosion", uses=("per-tensor-quantization",))
def fold_range(m: Measurements, t: Thresholds) -> Judgement:
    """Once folded, a few channels have so large weights that a common scale leaves the others few bits.

    What it measures: by layer, the largest over the median range of the output channels of the convolution or linear
    layer, after γ/σ was multiplied in.
    Why it hurts: with 8 bits per tensor the median channel keeps 3: 65 % became 61 % (nn-quantization-pytorch#3).
    Threshold: 30; a warning where `per-tensor-quantization` is declared, else information.
    Evidence: the ratio by layer.
    Fixes: per-channel [S3].
    Intentional when: never, once declared.
    Known false alarms: irrelevant for weights in floating point or quantized per channel: information.
    Fixture: defect: one channel with a running variance of 1e-6; near-miss: ratios of 3.
    """
    if not m.ranges:
        return unfit("no normalizer with running statistics stands behind a linear layer or convolution")
    wide = sorted((n for n in m.ranges if m.ranges[n] > t.fold_range), key=lambda n: -m.ranges[n])
    if not wide:
        return fine("folded channels are of comparable range", {"largest ratio": max(m.ranges.values())})
    facts = {"largest over median range": m.ranges[wide[0]], "layers": float(len(wide))}
    declared = "per-tensor-quantization" in m.declared
    reason = f"folded, one channel of {short(wide)} is {m.ranges[wide[0]]:.3g} times the median"
    return alarm("W" if declared else "I", reason, wide, facts, None, ("per-channel",))
