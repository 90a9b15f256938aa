"""8xx: what normalizers cost in time and memory; measured where these rules are selected."""

from __future__ import annotations

from normscope.doctor.measurements import Costs, Measurements
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, short, unfit
from normscope.doctor.thresholds import Thresholds
from normscope.records import Interval

__all__ = ["costs_of_model"]


def costs_of_model(m: Measurements) -> Costs | Judgement:
    """What was timed, or why nothing was."""
    if not m.layers:
        return unfit("the model has no normalizers")
    return (
        absent("select=['NRM8', 'NRM702']: timing takes a while, and is done when asked for")
        if m.costs is None
        else m.costs
    )


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
    costs = costs_of_model(m)
    if isinstance(costs, Judgement):
        return costs
    return _share(costs, costs.saved, "normalizers", costs.layers, "fuse", t)


def _share(
    costs: Costs, spent: Interval | None, who: str, names: tuple[str, ...], remedy: str, t: Thresholds
) -> Judgement:
    """What a difference of times says about its share of a step."""
    if spent is None:
        return failed(costs.problem)
    if costs.spread > t.cost_noise:
        return failed(f"the machine is busy: steps scatter by {costs.spread:.0%}")
    share = spent.value / costs.step
    facts = {"step in ms": costs.step, f"{who} in ms": spent.value, "share of the step": share}
    if spent.low <= 0 or share < t.cost_share:
        return fine(f"{who} take little of a training step", facts)
    reason = f"{who} take {share:.0%} of a training step, {spent.value:.3g} of {costs.step:.3g} ms: {short(names)}"
    return Judgement("info", reason, names, facts, spent, (remedy,))


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
    costs = costs_of_model(m)
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


@rule("NRM803", "layout-conversions")
def conversions(m: Measurements, t: Thresholds) -> Judgement:
    """Normalizers whose output lies in memory in another order than their input.

    What it measures: the strides of what goes in and comes out in one forward in training mode; where they differ, the
    time of copying such a tensor into the other order and its gradient back, 12 times each, the median.
    Why it hurts: a layer that loses channels_last makes the next convolution convert, and LayerNorm behind a permute
    copies first (pytorch#111824).
    Threshold: 3 % of a training step for all copies together.
    Evidence: milliseconds, their share, the layers by time.
    Fixes: keep-layout [S3].
    Intentional when: the next layer wants the other order.
    Known false alarms: none; it is information. A copy that a following layer would make in any case is counted here.
    Fixture: none, because a busy machine would break it; measurements made by hand, and a LayerNorm between transposes.
    """
    costs = costs_of_model(m)
    if isinstance(costs, Judgement):
        return costs
    if not costs.step:
        return failed(costs.problem)
    total = sum(costs.moved.values())
    facts = {"step in ms": costs.step, "copies in ms": total, "share of the step": total / costs.step}
    if total / costs.step < t.cost_share:
        return fine("normalizers leave tensors in their order" if not costs.moved else "copies take little", facts)
    names = sorted(costs.moved, key=lambda n: -costs.moved[n])
    reason = f"copies into another memory order take {total:.3g} of {costs.step:.3g} ms, most by {short(names)}"
    return alarm("I", reason, names, facts, None, ("keep-layout",))


@rule("NRM804", "sync-cost")
def synchronization(m: Measurements, t: Thresholds) -> Judgement:
    """What share of a training step synchronized normalizers wait for the other ranks.

    What it measures: training steps with SyncBatchNorm and with BatchNorm in its place, in turns, 12 times each, on all
    ranks at once; the 99 % interval of the difference. The ranks first agree on it in the store of torch.distributed.
    Why it hurts: one report counted 25 % of the time (BEVDet#147), another 59 minutes for 40 (pytorch#50549).
    Threshold: 3 % of the step with an interval above 0; a machine on which the step scatters by a fifth says nothing.
    Evidence: milliseconds, the share.
    Fixes: desync [S3], where NRM302 finds a rank's own batch large enough.
    Intentional when: batches of one device are too small.
    Known false alarms: none; it is information.
    Fixture: none, because a busy machine would break it; measurements made by hand, and two processes that are timed.
    """
    costs = costs_of_model(m)
    if isinstance(costs, Judgement):
        return costs
    names = [x.name for x in m.layers if "SyncBatchNorm" in x.cls]
    if not names or m.devices < 2:
        return unfit("no normalizer waits for other ranks")
    return _share(costs, costs.synced, "synchronized normalizers", tuple(names), "desync", t)
