"""8xx: what normalizers cost in time and memory; measured where these rules are selected."""

from __future__ import annotations

from normscope.doctor.measurements import Costs, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, short, unfit
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []


def _costs(m: Measurements) -> Costs | Judgement:
    if not m.layers:
        return unfit("the model has no normalizers")
    return absent("select=['NRM8']: timing takes a while, and is done when asked for") if m.costs is None else m.costs


@rule("NRM801", "time-share")
def time_share(m: Measurements, t: Thresholds) -> Judgement:
    """What share of a training step the normalizers take.

    What it measures: forward and backward on one batch, with the normalizers and with γ·x + β in their place, in turns,
    12 times each; the 99 % interval of the difference.
    Why it hurts: GroupNorm took three times as long as BatchNorm, and lost channels_last (apex#602, pytorch#111824).
    Threshold: 3 % of the step with an interval above 0; a machine on which the step scatters by a fifth says nothing.
    Evidence: milliseconds, the share.
    Fixes: fuse [S3].
    Intentional when: normalization is worth its price.
    Known false alarms: none; it is information.
    Fixture: defect: BatchNorm after every cheap layer; near-miss: one behind large products.
    """
    costs = _costs(m)
    if isinstance(costs, Judgement):
        return costs
    if costs.saved is None:
        return failed(costs.problem)
    if costs.spread > t.cost_noise:
        return failed(f"the machine is busy: steps scatter by {costs.spread:.0%}")
    share = costs.saved.value / costs.step
    facts = {"step in ms": costs.step, "normalizers in ms": costs.saved.value, "share of the step": share}
    if costs.saved.low <= 0 or share < t.cost_share:
        return fine("normalizers take little of a training step", facts)
    reason = f"normalizers take {share:.0%} of a training step: {costs.saved.value:.3g} of {costs.step:.3g} ms"
    return Judgement("info", reason, costs.layers, facts, costs.saved, ("fuse",))


@rule("NRM802", "activation-memory")
def memory(m: Measurements, _: Thresholds) -> Judgement:
    """How much memory is held for the backward pass of normalizers alone.

    What it measures: what autograd saves inside normalizers and nothing before them has saved, in bytes, for one batch.
    Why it hurts: activations are most of the memory of training; in-place and recomputing normalizers free these.
    Threshold: none; information from one MiB on.
    Evidence: MiB, the layers that hold most.
    Fixes: fuse [S3].
    Intentional when: there is enough memory.
    Known false alarms: what another operation saves as well is counted for the normalizer if it comes first.
    Fixture: defect: BatchNorm behind convolutions on large maps; near-miss: frozen layers on small ones.
    """
    costs = _costs(m)
    if isinstance(costs, Judgement):
        return costs
    if not costs.held and costs.problem:
        return failed(costs.problem)
    total = sum(costs.held.values()) / 2**20
    facts = {"MiB": total, "layers": float(len(costs.held))}
    if total < 1:
        return fine("normalizers hold little for the backward pass", facts)
    names = sorted(costs.held, key=lambda n: -costs.held[n])
    reason = f"{total:.3g} MiB are held for the backward pass of normalizers, most by {short(names)}"
    return alarm("I", reason, names, facts, None, ("fuse",))
