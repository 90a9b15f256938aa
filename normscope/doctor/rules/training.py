"""3xx that need training steps, and 6xx: the training loop, the optimizer, several devices."""

from __future__ import annotations

from normscope.doctor import gates
from normscope.doctor.measurements import Grade, Measurements, Steps
from normscope.doctor.rules.base import Judgement, absent, alarm, failed, fine, rule, several, short, unfit
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []


def _steps(m: Measurements) -> Steps | Judgement:
    """The training steps, or why there are none."""
    if m.steps is None:
        return absent("train_step=: the body of your training loop")
    return failed(m.steps.problem) if m.steps.problem else m.steps


def _noise(m: Measurements) -> dict[str, float]:
    """By BatchNorm layer in training, the energy of the noise of batch statistics."""
    kinds = {x.name: x for x in m.layers if x.kind == "BatchNorm" and x.running and not x.held}
    return {n: gates.noise_energy(m.own[n], x.eps) for n, x in kinds.items() if n in m.own and len(m.own[n].means) > 2}


@rule("NRM308", "accumulation-does-not-help", causes=("NRM302",), intents=("ghost-bn", "bn-frozen-throughout"))
def accumulation(m: Measurements, t: Thresholds) -> Judgement:
    """Gradients are accumulated over small batches, and statistics are not.

    What it measures: forwards per step of the optimizer in the training steps; the noise of batch statistics, and what
    it would be over the accumulated batch.
    Why it hurts: accumulation makes the gradient's batch larger, not the normalizer's: 8 points were lost so
    (mmcv#1869).
    Threshold: noise of 5 % as it is and less over the accumulated batch.
    Evidence: forwards per step, the noise of both.
    Fixes: bigger-batch [S3]; freeze-norms [S2]; replace-norm [S2].
    Intentional when: `ghost-bn`: the noise is wanted; `bn-frozen-throughout`: nothing is normalized by the batch.
    Known false alarms: models without batch axis in their normalizers are silent.
    Fixture: defect: batches of 4, 8 of them per step; near-miss: LayerNorm with accumulation.
    """
    steps = _steps(m)
    if isinstance(steps, Judgement):
        return steps
    if steps.optimizer is None:
        return absent("optimizer=: its steps are counted")
    times = steps.accumulated if steps.optimizer else steps.forwards * steps.count
    if times <= 1.5:
        return fine("gradients are not accumulated", {"forwards per step": times})
    noise = {n: e for n, e in _noise(m).items() if n in steps.trained}
    if not noise:
        return unfit("no normalizer uses batch statistics in training")
    high = sorted((n for n in noise if noise[n] >= t.noise_warning > noise[n] / times), key=lambda n: -noise[n])
    if not high:
        return fine("the accumulated batch is no less noisy where it matters", {"largest noise": max(noise.values())})
    facts = {"forwards per step": times, "noise": noise[high[0]], "noise of all": noise[high[0]] / times}
    reason = f"{times:g} batches per step are accumulated, each normalized by itself with {noise[high[0]]:.0%} noise"
    remedies = ("bigger-batch", "freeze-norms", "replace-norm")
    return alarm("W", f"{reason}: {short(high)}", high, facts, None, remedies)


@rule("NRM309", "per-device-batch", causes=("NRM302",), intents=("ghost-bn", "bn-frozen-throughout"))
def per_device(m: Measurements, t: Thresholds) -> Judgement:
    """Every device normalizes its own share of the batch.

    What it measures: over how many devices the model is spread, and the noise of batch statistics of one share.
    Why it hurts: DataParallel cuts the batch and keeps the first device's statistics only (pytorch#1051); 1 image per
    device cost 1.1 points (BEVFormer#136).
    Threshold: noise of 5 % in a share and less over all devices.
    Evidence: devices, noise of a share and of the whole.
    Fixes: sync [S3], which cost 25 % of the time in one report; distributed [S3]; freeze-norms [S2].
    Intentional when: `ghost-bn`, `bn-frozen-throughout`.
    Known false alarms: synchronized normalizers are silent.
    Fixture: defect: 16 devices that share a batch of 64; near-miss: synchronized.
    """
    if not m.parallel or m.devices < 2:
        return unfit("the model runs on one device")
    plain = {x.name for x in m.layers if "Sync" not in x.cls and x.training and not x.held}
    noise = {n: e for n, e in _noise(m).items() if n in plain}
    if not noise:
        return fine("no normalizer uses the statistics of its device alone")
    # DataParallel cuts what the loader yields; every process of a distributed training has a loader of its own.
    cut = m.devices if m.parallel == "DataParallel" else 1
    whole = cut / m.devices
    high = sorted((n for n in noise if noise[n] * cut >= t.noise_warning > noise[n] * whole), key=lambda n: -noise[n])
    if not high:
        return fine("a device's share is large enough", {"largest noise": cut * max(noise.values())})
    facts = {
        "devices": float(m.devices),
        "noise of a share": noise[high[0]] * cut,
        "noise of all": noise[high[0]] * whole,
    }
    reason = f"each of {m.devices} devices normalizes by itself with {noise[high[0]] * cut:.0%} noise: {short(high)}"
    first = "distributed" if m.parallel == "DataParallel" else "sync"
    return alarm("W", reason, high, facts, None, (first, "freeze-norms"))


@rule("NRM601", "updates-per-step")
def updates(m: Measurements, _: Thresholds) -> Judgement:
    """Running statistics move more often than the model is called.

    What it measures: updates of num_batches_tracked per forward of the whole model in training steps on a copy, against
    the calls of the layer in one forward.
    Why it hurts: activation checkpointing computes a part again and averages the same batch twice: the momentum is
    another than it says (pytorch#62471).
    Threshold: exact; a warning where statistics drift or jitter besides.
    Evidence: updates per call, the momentum that this makes.
    Fixes: one-update [S3].
    Intentional when: never, though it is mostly harmless: the same batch counts twice.
    Known false alarms: accumulation is one update per forward, and silent.
    Fixture: defect: checkpointing around a block; near-miss: 4 accumulated batches.
    """
    steps = _steps(m)
    if isinstance(steps, Judgement):
        return steps
    if not steps.forwards:
        return failed("the step does not call the model itself, so that forwards could not be counted")
    calls = {x.name: max(1, sum(s.layer == x.name for s in m.sites)) for x in m.layers}
    ratio = {n: u / steps.forwards / calls.get(n, 1) for n, u in steps.updates.items() if u > 0}
    if not ratio:
        return unfit("no normalizer counts batches in training")
    often = sorted((n for n in ratio if ratio[n] > 1.01), key=lambda n: -ratio[n])
    if not often:
        return fine("running statistics move once per call")
    u = ratio[often[0]]
    momentum = m.layer(often[0]).momentum or 0.0
    facts = {"updates per call": u, "momentum": momentum, "momentum that this makes": 1 - (1 - momentum) ** u}
    drifted = m.recalibrated.harmful and any(m.drift[n].beyond for n in often if n in m.drift)
    reason = f"statistics move {u:g} times per call: momentum {momentum:g} acts as {1 - (1 - momentum) ** u:.2g}"
    grade: Grade = "W" if drifted else "I"
    return alarm(grade, f"{reason} in {short(often)}", often, facts, None, ("one-update",))


@rule("NRM604", "decay-on-norm")
def decay(m: Measurements, _: Thresholds) -> Judgement:
    """Weight decay on γ or β.

    What it measures: the parameter groups of the optimizer.
    Why it hurts: decay pulls γ to 0 and β with it; the literature does not agree whether that matters (autrainer#166).
    Threshold: any decay with a learning rate above 0; a warning only where channels have died of it: a median |γ| below
    a tenth, and NRM404's dead channels.
    Evidence: the decay, the layers.
    Fixes: param-groups [S3].
    Intentional when: the recipe decays everything.
    Known false alarms: it is information: many good recipes do so.
    Fixture: defect: SGD over all parameters with decay; near-miss: a group of their own without.
    """
    if m.optimized is None:
        return absent("optimizer=: its parameter groups")
    names = list(m.optimized.decayed)
    if not names:
        return fine("γ and β are not decayed")
    shrunk = [n for n in names if _shrunk(m, n)]
    grade: Grade = "W" if shrunk else "I"
    facts = {"weight decay": m.optimized.decay, "layers": float(len(names)), "with γ below a tenth": float(len(shrunk))}
    reason = f"weight decay {m.optimized.decay:g} acts on γ and β of {several(names)}: {short(names)}"
    return alarm(grade, reason, [*shrunk, *(n for n in names if n not in shrunk)], facts, None, ("param-groups",))


def _shrunk(m: Measurements, name: str) -> bool:
    weight = m.layer(name).weight
    return weight is not None and weight.size > 0 and float(abs(weight).mean()) < 0.1 and name in m.rectified


@rule("NRM605", "rank-statistics-differ")
def ranks(m: Measurements, t: Thresholds) -> Judgement:
    """The processes of one training hold different running statistics.

    What it measures: the largest distance of the ranks' running means in σ, by layer; every rank has to check.
    Why it hurts: the score depends on the rank that evaluates or saves: 0.1 points and more (timm#110).
    Threshold: 0.1 σ.
    Evidence: the distance by layer.
    Fixes: broadcast [S3]; sync [S3].
    Intentional when: statistics per rank are wanted, as in federated training.
    Known false alarms: buffers that DDP broadcasts at the next forward.
    Fixture: defect: two processes with data of other means; near-miss: the same buffers.
    """
    if m.parallel != "distributed" or m.devices < 2:
        return unfit("one process")
    if m.ranks is None:
        return failed(m.rank_problem)
    far = sorted((n for n, d in m.ranks.items() if d > t.rank_spread), key=lambda n: -(m.ranks or {})[n])
    if not far:
        return fine("all ranks hold the same statistics", {"largest distance in σ": max(m.ranks.values(), default=0.0)})
    facts = {"distance in σ": m.ranks[far[0]], "layers": float(len(far)), "ranks": float(m.devices)}
    reason = f"running means of the ranks lie {m.ranks[far[0]]:.2g} σ apart in {short(far)}"
    return alarm("W", reason, far, facts, None, ("broadcast", "sync"))


@rule("NRM608", "norm-params-not-optimized")
def not_optimized(m: Measurements, _: Thresholds) -> Judgement:
    """γ or β require a gradient, and no optimizer steps them.

    What it measures: the parameters of normalizers in the groups of the optimizer.
    Why it hurts: they stay at their first values: layers added after the optimizer was made, or a filter by name.
    Threshold: exact.
    Evidence: the layers.
    Fixes: optimize [S3].
    Intentional when: another optimizer has them.
    Known false alarms: a training with several optimizers of which one was passed.
    Fixture: defect: an optimizer over the weights of convolutions only; near-miss: γ and β frozen.
    """
    if m.optimized is None:
        return absent("optimizer=: its parameter groups")
    names = m.optimized.missing
    if not names:
        return fine("the optimizer has every γ and β that learns")
    reason = (
        f"γ or β of {several(names)}: a gradient is required, and no group of the optimizer has them: {short(names)}"
    )
    return alarm("W", reason, names, {"layers": float(len(names))}, None, ("optimize",))


@rule("NRM610", "auxiliary-forward-updates", intents=("teacher-train-mode",))
def auxiliary(m: Measurements, _: Thresholds) -> Judgement:
    """Forwards that train nothing move the running statistics.

    What it measures: forwards of the model per training step, and backwards that reach its parameters; updates of the
    statistics beyond these.
    Why it hurts: adversarial examples, regularizers and probes are other data than the training's, and enter its
    statistics; where it was measured the effect was small (cifar10_challenge#22).
    Threshold: more updates than backwards; information.
    Evidence: forwards, backwards and updates per step.
    Fixes: one-update [S3].
    Intentional when: `teacher-train-mode`.
    Known false alarms: losses that are summed over several forwards before one backward.
    Fixture: defect: an attack in training mode in every step; near-miss: the attack in evaluation mode.
    """
    steps = _steps(m)
    if isinstance(steps, Judgement):
        return steps
    if not steps.backwards or not steps.forwards:
        return failed("the step calls no forward of the whole model, or no backward")
    calls = {x.name: max(1, sum(s.layer == x.name for s in m.sites)) for x in m.layers}
    more = {n: u / calls.get(n, 1) for n, u in steps.updates.items() if u / calls.get(n, 1) > steps.backwards + 0.01}
    extra = steps.forwards > steps.backwards + 0.01
    if not extra or not more:
        return fine("only forwards that train move the statistics")
    facts = {"forwards": steps.forwards, "backwards": steps.backwards, "updates": max(more.values())}
    reason = (
        f"{steps.forwards - steps.backwards:g} forwards per step train nothing and move statistics of {short(more)}"
    )
    return alarm("I", reason, list(more), facts, None, ("one-update",))


@rule("NRM612", "per-sample-gradients-undefined", uses=("per-sample-gradients",))
def per_sample(m: Measurements, _: Thresholds) -> Judgement:
    """Gradients of single samples are asked of a model whose samples meet in batch statistics.

    What it measures: with `per-sample-gradients` declared (DP-SGD, vmap, BackPACK): normalizers on batch statistics.
    Why it hurts: a sample's gradient then contains its batch mates: privacy accounting and curvature are wrong, or
    vmap raises (opacus#319, functorch#384).
    Threshold: exact.
    Evidence: the layers.
    Fixes: private-norm [S3]; freeze-norms [S2]; replace-norm [S2].
    Intentional when: never, once declared.
    Known false alarms: frozen normalizers and those in evaluation mode are fine, and silent.
    Fixture: defect: BatchNorm in training mode; near-miss: frozen.
    """
    if "per-sample-gradients" not in m.declared:
        return unfit("per-sample-gradients was not declared as an intent")
    layers = [x for x in m.layers if x.kind == "BatchNorm"]
    names = [x.name for x in layers if (x.training and not x.held) or x.mean is None]
    if not names:
        return fine("no normalizer mixes samples")
    reason = f"samples meet in the batch statistics of {several(names)}: {short(names)}"
    remedies = ("private-norm", "freeze-norms", "replace-norm")
    return alarm("E", reason, names, {"layers": float(len(names))}, None, remedies)
