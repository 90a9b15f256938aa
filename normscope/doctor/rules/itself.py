"""9xx: the check itself."""

from __future__ import annotations

from normscope.doctor.measurements import Grade, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, several, short, unfit
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []


@rule("NRM900", "unknown-norm-class")
def unknown(m: Measurements, _: Thresholds) -> Judgement:
    """Classes that look like normalizers and are none that is known here.

    What it measures: modules with state of their own whose class has "norm" in its name, or that hold running
    statistics, and that derive from no known normalizer.
    Why it hurts: only their buffers and calls are looked at; a passed check says less there.
    Threshold: exact; information.
    Evidence: the classes.
    Fixes: see-list [S3].
    Intentional when: normalizers of one's own.
    Known false alarms: a class named so that does something else.
    Fixture: defect: a normalizer written by hand; near-miss: a subclass of torch's.
    """
    if not m.layers:
        return unfit("the model has no normalizers")
    odd = [x for x in m.layers if x.kind == "custom"]
    if not odd:
        return fine("every normalizer is of a known class")
    classes = sorted({x.cls for x in odd})
    facts: dict[str, float | str] = {"layers": float(len(odd)), "classes": ", ".join(classes)}
    reason = f"{several(odd)} of classes that are unknown here: {short(classes)}"
    return alarm("I", reason, [x.name for x in odd], facts, None, ("see-list",))


@rule("NRM905", "hooks-bypassed")
def bypassed(m: Measurements, _: Thresholds) -> Judgement:
    """Normalizers that run where hooks do not see them.

    What it measures: normalization functions that use a normalizer's buffers outside of its call, and normalizers that
    TorchScript has compiled.
    Why it hurts: their inputs were not measured; a passed check says nothing there (fastai#2850).
    Threshold: exact; information.
    Evidence: the layers.
    Fixes: call-modules [S3].
    Intentional when: compiled for inference.
    Known false alarms: none. Models of torch.compile are run step by step and seen.
    Fixture: defect: self.norm.forward(x); near-miss: self.norm(x).
    """
    if not m.layers:
        return unfit("the model has no normalizers")
    names = [x.name for x in m.layers if x.script]
    names += [c.bypassed for c in m.functional if c.bypassed is not None and c.bypassed not in names]
    if not names:
        return fine("hooks see every normalizer that runs")
    reason = f"{several(names)} where hooks do not see the call: {short(names)}"
    return alarm("I", reason, names, {"layers": float(len(names))}, None, ("call-modules",))


@rule("NRM901", "layer-not-reached", causes=("NRM409", "NRM905"))
def not_reached(m: Measurements, _: Thresholds) -> Judgement:
    """Normalizers that this loader and forward never call.

    What it measures: normalizers without a call in the traced forward and in all batches of split A.
    Why it hurts: nothing was measured about them; a passed check says nothing there.
    Threshold: exact.
    Evidence: the layers.
    Fixes: pass a forward= and a loader that reach them [S3].
    Intentional when: auxiliary heads are off in evaluation.
    Known false alarms: modules called by their forward method go unseen by hooks.
    Fixture: defect: a registered layer that forward does not use.
    """
    if not m.layers:
        return unfit("the model has no normalizers")
    if not m.unreached:
        return fine("every normalizer was reached")
    reason = f"{len(m.unreached)} of {several(m.layers)} were never called: {short(m.unreached)}"
    return alarm("I", reason, m.unreached, {"layers": float(len(m.unreached))}, None, ("reach",))


@rule("NRM902", "too-few-samples")
def few_samples(m: Measurements, t: Thresholds) -> Judgement:
    """Too few samples to see a loss of one point.

    What it measures: the spread of paired differences on split B, and from it how many samples show a loss of 1 pp
    with 80 % power at the 99 % level.
    Why it hurts: no alarm then means little.
    Threshold: fewer samples than needed.
    Evidence: samples there and needed.
    Fixes: more-samples [S3]: a longer loader or a larger budget.
    Intentional when: a quick look is all that is wanted.
    Known false alarms: none; it is information.
    Fixture: defect: 60 samples; clean: 10 000.
    """
    if m.score_problem:
        return absent(m.score_problem)
    outcome = m.outcomes.get("eval")
    if outcome is None or "recalibrated" not in m.outcomes:
        return unfit("no other state of the model to compare with")
    if m.needed is None:
        return absent("metric=: one number between 0 and 1 per sample")
    facts = {"samples": float(outcome.samples), "needed": float(m.needed)}
    if outcome.samples >= m.needed:
        return fine(f"{outcome.samples:,} samples show a loss of {t.power_effect:g} pp; {m.needed:,} are needed", facts)
    reason = f"{outcome.samples:,} samples were scored; {m.needed:,} are needed to see a loss of {t.power_effect:g} pp"
    return alarm("I", reason, (), facts, None, ("more-samples",))


@rule("NRM903", "model-not-deterministic")
def random_model(m: Measurements, t: Thresholds) -> Judgement:
    """Two evaluations of one batch differ.

    What it measures: the relative difference of two outputs in evaluation mode with different random numbers.
    Why it hurts: every comparison then carries this noise; often dropout was called as a function with
    training=True.
    Threshold: 1e-3 is a warning; rounding by threads stays near 1e-6.
    Evidence: the difference.
    Fixes: dropout [S3].
    Intentional when: Monte Carlo dropout.
    Known false alarms: models that sample by design.
    Fixture: defect: F.dropout(x) without training=self.training.
    """
    if m.repeat is None:
        return failed("the output holds no floating-point tensors")
    facts = {"relative difference": m.repeat}
    if m.repeat < 1e-5:
        return fine("two evaluations agree", facts)
    grade: Grade = "W" if m.repeat >= t.random_output else "I"
    reason = f"two evaluations of one batch differ by {m.repeat:.2g}"
    return alarm(grade, reason, (), facts, None, ("dropout",))
