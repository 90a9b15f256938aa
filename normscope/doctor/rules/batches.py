"""3xx: what the batches are made of."""

from __future__ import annotations

import numpy as np

from normscope.doctor import gates
from normscope.doctor.measurements import Grade, Measurements, Moments
from normscope.doctor.rules.base import Judgement, alarm, failed, fine, lower, rule, short, unfit
from normscope.doctor.thresholds import Thresholds

__all__: list[str] = []


def _training_layers(m: Measurements) -> set[str]:
    """Normalizers that use batch statistics in training."""
    if m.steps is not None and not m.steps.problem:
        return {x.name for x in m.layers if x.name in m.steps.trained and x.kind in ("BatchNorm", "InstanceNorm")}
    return {x.name for x in m.layers if x.training and not x.held and x.kind in ("BatchNorm", "InstanceNorm")}


@rule("NRM301", "too-few-values", intents=("bn-frozen-throughout",))
def too_few(m: Measurements, t: Thresholds) -> Judgement:
    """A statistic over one, two or four values.

    What it measures: the values per statistic at every call of a normalizer in training mode, for the regular batch
    and for the last one.
    Why it hurts: one value raises "Expected more than 1 value per channel" at the end of an epoch (pytorch#7716);
    of two only the order survives: the output is ±γ.
    Threshold: 1 and 2 are errors, up to 4 a warning.
    Evidence: layer, values, which batch.
    Fixes: drop-last [S3]; bigger-batch [S3]; replace-norm [S2], a normalizer without batch axis.
    Intentional when: `bn-frozen-throughout`: training does not normalize by the batch, whatever the flags say.
    Known false alarms: a model in evaluation mode is silent; so is a small batch with large maps.
    Fixture: defect: 65 samples in batches of 64, pooling to 1×1 at batch 2; near-miss: the same in evaluation mode.
    """
    layers = _training_layers(m)
    if not layers:
        return unfit("no normalizer uses batch statistics in training mode")
    sites = [site for site in m.sites if site.layer in layers and site.shape]
    if not sites:
        return unfit("no normalizer in training mode was reached")
    last = _last_batch(m)
    sizes = [(float(max(m.batch_size, 1)), "every batch")] + ([(float(last), "the last batch")] if last else [])
    batch_norms = {x.name for x in m.layers if x.kind == "BatchNorm"}
    found: dict[str, tuple[float, str]] = {}
    for site in sites:
        for size, which in sizes:
            n = site.values * (size / max(m.traced_size, 1) if site.layer in batch_norms else 1)
            if n <= t.values_warning and n < found.get(site.layer, (np.inf, ""))[0]:
                found[site.layer] = (n, which)
    if not found:
        return fine("every statistic has enough values")
    names = sorted(found, key=lambda name: found[name][0])
    n, which = found[names[0]]
    grade: Grade = "E" if n <= t.values_error else "W"
    harms = (
        (1, "which raises an error in training"),
        (2, "of which only the order survives"),
        (np.inf, "which is noise"),
    )
    harm = next(text for most, text in harms if n <= most)
    reason = f"{which} brings {n:g} value{'' if n == 1 else 's'} per statistic to {short(names)}, {harm}"
    facts: dict[str, float | str] = {"values": n, "batch": which, "batch size": float(m.batch_size)}
    if last is not None:
        facts["last batch"] = float(last)
    remedies = ("drop-last", "replace-norm") if which == "the last batch" else ("bigger-batch", "replace-norm")
    return alarm(grade, reason, names, facts, None, remedies)


def _last_batch(m: Measurements) -> int | None:
    """Samples in the incomplete last batch; None where there is none or it cannot be known."""
    loader = m.loader
    if loader.samples is not None and loader.batch and loader.drop_last is not None:
        rest = loader.samples % loader.batch
        return None if loader.drop_last or rest == 0 else rest
    return loader.last if loader.last is not None and loader.last < m.batch_size else None


@rule("NRM302", "small-batch-noise", causes=("NRM301", "NRM304"), intents=("bn-frozen-throughout", "ghost-bn"))
def small_batches(m: Measurements, t: Thresholds) -> Judgement:
    """Batches so small that their statistics are noise.

    What it measures: the energy ‖y_B − y_∞‖²/‖y_∞‖² that normalizing by batches of this size adds, median over
    channels, by layer; and the effective number of values, σ²/Var(batch mean), in which correlated pixels count
    less.
    Why it hurts: at batch 2 BatchNorm costs 10.6 points on ImageNet (Wu & He 2018); detectors at batch 4 fail
    (Yet-Another-EfficientDet-Pytorch#675).
    Threshold: 5 % (about 30 effective values) and 20 % (8); then the loss on batch statistics against recalibrated
    ones.
    Evidence: noise and effective values by layer.
    Fixes: bigger-batch [S3], SyncBatchNorm; freeze-norms [S2] if pretrained; replace-norm [S2]. New statistics alone do
    not help: the weights have adapted to the noise.
    Intentional when: `bn-frozen-throughout`: training does not normalize by the batch, whatever the flags say;
    `ghost-bn`: the noise is wanted.
    Known false alarms: a model in evaluation mode only evaluates in small batches: information.
    Fixture: defect: batches of 2 from scratch; near-miss: batches of 2 with 128×128 maps, or fully frozen.
    """
    kinds = {x.name: x for x in m.layers if x.kind == "BatchNorm" and x.running and not x.held}
    data = {name: m.own[name] for name in kinds if name in m.own and len(m.own[name].means) > 2}
    if not kinds:
        return unfit("no batch normalization with running statistics")
    if not data:
        return failed(m.batch_problem or "fewer than three batches")
    noise = {name: gates.noise_energy(x, kinds[name].eps) for name, x in data.items()}
    high = {name: e for name, e in noise.items() if e >= t.noise_warning}
    if not high:
        return fine("batches are large enough", {"largest noise": max(noise.values())})
    names = sorted(high, key=lambda name: -high[name])
    effective = _effective(data[names[0]])
    facts = {"noise": high[names[0]], "effective values": effective, "batch size": float(m.batch_size)}
    reason = (
        f"the statistics of a batch add noise of {high[names[0]]:.0%} of the signal in {short(names)}: "
        f"they are worth those of {effective:.0f} independent values"
    )
    trains = bool(_training_layers(m) & set(high))
    if not trains:
        return alarm("I", f"{reason}; harmless in evaluation mode", names, facts, m.small, ("bigger-batch",))
    grade = gates.severity(True, True, m.small) or "I"
    if high[names[0]] < t.noise_error:
        grade = lower(grade, "W")
    return alarm(grade, reason + _priced(m), names, facts, m.small, ("bigger-batch", "freeze-norms", "replace-norm"))


def _priced(m: Measurements) -> str:
    """What the cost of such batches is, which evaluation may not show."""
    proven = m.small.cost is not None and m.small.cost.low > 0
    return "; the cost is that of normalizing by such batches, as training does" if proven else ""


def _effective(data: Moments) -> float:
    spread = data.means.var(axis=0, ddof=1)
    with np.errstate(all="ignore"):
        ratio = data.var / spread
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else 0.0


@rule("NRM304", "non-iid-batches", intents=("bn-frozen-throughout", "tta-bn/adabn"))
def grouped(m: Measurements, t: Thresholds) -> Judgement:
    """Samples of a batch resemble each other more than samples of different batches.

    What it measures: Kish's design effect D = 1 + (B − 1)·ICC of the samples' channel means across the loader's
    batches, median over channels, largest over layers; the null regroups the same samples at random.
    Why it hurts: a batch of one class or video has the statistics of that class; running averages hold the last
    ones (openpifpaf#308).
    Threshold: p < 0.005 and D ≥ 1.3; an error from 2 on, where the effective batch is halved. Shuffled loaders:
    0.89–1.11.
    Evidence: D by layer.
    Fixes: shuffle [S3]; recal [S1] with shuffled batches; separate-statistics [S3] where batches are domains.
    Intentional when: `bn-frozen-throughout`: training does not normalize by the batch, whatever the flags say;
    `tta-bn/adabn`: every batch is a domain of its own.
    Known false alarms: an ordered evaluation loader with the model in evaluation mode: information, unless evaluation
    loses against the statistics of each batch.
    Fixture: defect: sorted by label, shuffle=False; near-miss: stratified batches.
    """
    known = {name: d for name, d in m.design.items() if np.isfinite(d[0])}
    if not m.seen:
        return unfit("no normalizer with running statistics was reached")
    if not known:
        return failed("fewer than two batches, or one sample per batch")
    names = sorted(
        (n for n, (d, p) in known.items() if d >= t.design_warning and p < t.design_p), key=lambda n: -known[n][0]
    )
    if not names:
        return fine("batches are mixed like random ones", {"largest design effect": max(d for d, _ in known.values())})
    d, p = known[names[0]]
    facts = {"design effect": d, "p": p, "effective batch": m.batch_size / d}
    reason = f"samples of a batch belong together: design effect {d:.1f} in {short(names)}"
    if m.trains:
        grade = gates.severity(True, True, m.small) or "I"
        # In training the grouping enters every update, whatever this pass could show of it.
        grade = "W" if grade == "I" else grade
        grade = grade if d >= t.design_error else lower(grade, "W")
        return alarm(grade, reason + _priced(m), names, facts, m.small, ("shuffle", "recal"))
    drifted = m.recalibrated.harmful and any(x.beyond for x in m.drift.values())
    if drifted:
        return alarm(
            "W", f"{reason}, and running statistics are off", names, facts, m.recalibrated, ("shuffle", "recal")
        )
    if m.batch.harmful and not m.recalibrated.harmful:
        tail = "evaluation loses against the statistics of each batch"
        return alarm(
            m.batch.grade or "W", f"{reason}; {tail}", names, facts, m.batch, ("separate-statistics", "shuffle")
        )
    return alarm("I", f"{reason}; harmless in evaluation mode", names, facts, None, ("shuffle",))


@rule("NRM303", "last-batch-outlier", causes=("NRM301",), intents=("bn-frozen-throughout",))
def last_outlier(m: Measurements, t: Thresholds) -> Judgement:
    """A small last batch has the last word in the running averages of every epoch.

    What it measures: the samples in the last batch, b, and its shift of the average, momentum/√b in σ.
    Why it hurts: the newest batch weighs most, and evaluation follows right behind it.
    Threshold: 0.05 σ, which is 4 samples at momentum 0.1; large maps count as more samples.
    Evidence: b, the shift.
    Fixes: drop-last [S3]; recal [S1].
    Intentional when: `bn-frozen-throughout`: statistics do not move.
    Known false alarms: a model in evaluation mode is silent.
    Fixture: defect: 66 samples in batches of 64; near-miss: a rest of 48.
    """
    layers = {x.name: x for x in m.layers if x.name in _training_layers(m) and x.kind == "BatchNorm" and x.momentum}
    if not layers:
        return unfit("no normalizer averages in training mode")
    last = _last_batch(m)
    if last is None:
        return fine("there is no incomplete last batch, or it is not known")
    shifts = {}
    for name, layer in layers.items():
        known = m.own.get(name)
        # σ of a batch mean, from batches as they are: pixels of one sample count as far as they differ.
        one = np.sqrt(m.batch_size / _effective(known)) if known is not None and len(known.means) > 2 else 1.0
        shifts[name] = (layer.momentum or 0.0) * float(min(one, 1.0)) / np.sqrt(last)
    names = sorted((n for n in shifts if shifts[n] >= t.last_shift), key=lambda n: -shifts[n])
    facts = {"last batch": float(last), "shift in σ": max(shifts.values())}
    if not names:
        return fine(f"the last batch of {last} moves the averages little", facts)
    size = f"{last} sample{'s' * (last > 1)}"
    reason = f"the last batch has {size} and moves running means by {max(shifts.values()):.2g} σ: {short(names)}"
    return alarm("W", reason, names, facts, None, ("drop-last", "recal"))


@rule("NRM305", "padding-in-statistics")
def padding(m: Measurements, t: Thresholds) -> Judgement:
    """Positions that only fill up a batch enter the statistics.

    What it measures: padded positions, by a mask in the batch or by equal tails; for every normalizer over positions,
    how much its output at the other positions changes without them; for those without batch axis, what the model loses
    on samples in a padded batch against the same samples alone.
    Why it hurts: the answer about a sample depends on how long its batch mates are: 22.6 % word errors alone, 35 % in
    a batch (fairseq#3227).
    Threshold: 1 % of the output; where the score could be compared, its loss.
    Evidence: the share of padding, the change by layer, the loss.
    Fixes: mask [S3]; bucket [S3].
    Intentional when: never.
    Known false alarms: LayerNorm over features alone does not see positions; signals that really end in zeros.
    Fixture: defect: sequences of 4 to 16 positions filled up with 0; near-miss: equal lengths.
    """
    if not any(len(site.shape) == 3 for site in m.sites):
        return unfit("no normalizer gets sequences")
    if m.padding is None:
        return fine("no padding was found, by a mask or by equal tails")
    changed = {n: c for n, c in m.padding.changes.items() if c > t.padding}
    trained = {n for n in changed if m.layer(n).kind != "BatchNorm" or m.layer(n).training}
    facts: dict[str, float | str] = {"share of padding": m.padding.share, "known by": m.padding.known}
    if not changed:
        return fine("padding does not change what normalizers put out", facts)
    names = sorted(changed, key=lambda n: -changed[n])
    facts["largest change"] = changed[names[0]]
    reason = f"{m.padding.share:.0%} of the positions are padding and change the output of {short(names)}"
    felt = m.padding.effect
    if felt.grade is not None:
        return alarm(felt.grade, f"{reason} by {changed[names[0]]:.0%}", names, facts, felt, ("mask", "bucket"))
    grade: Grade = "W" if trained else "I"
    return alarm(grade, f"{reason} by {changed[names[0]]:.0%}", names, facts, None, ("mask", "bucket"))


@rule("NRM306", "one-sample-dominates")
def dominated(m: Measurements, t: Thresholds) -> Judgement:
    """One sample has most of a batch's variance.

    What it measures: in how many channels of a batch one and the same sample has more than half of the variance.
    Why it hurts: an outlier flattens all others of its batch and moves the running variance for long.
    Threshold: half of the channels, in batches of 8 samples or more; heavy tails hit another sample in every channel.
    Evidence: the share of channels, which batch and sample.
    Fixes: inspect-sample [S3].
    Intentional when: never.
    Known false alarms: layers of fewer than 4 channels are left out.
    Fixture: defect: one image × 100; near-miss: inputs with Student's tails.
    """
    if not m.seen:
        return unfit("no normalizer with running statistics was reached")
    high = {n: x for n, x in m.seen.items() if x.dominated > t.dominated}
    if not high:
        return fine("no sample dominates", {"largest share of channels": max(x.dominated for x in m.seen.values())})
    names = sorted(high, key=lambda n: -high[n].dominated)
    worst = high[names[0]]
    facts: dict[str, float | str] = {"share of channels": worst.dominated, "sample": worst.culprit}
    where = f"{worst.dominated:.0%} of the channels of {short(names)}"
    reason = f"one sample has most of its batch's variance in {where}: {worst.culprit} of split A, which diagnoses"
    return alarm("W" if m.trains else "I", reason, names, facts, None, ("inspect-sample",))


@rule("NRM307", "cross-sample-leak", uses=("contrastive-loss",))
def cross_sample_leak(m: Measurements, t: Thresholds) -> Judgement:
    """Embeddings that are compared with each other tell the batch in which they were normalized.

    What it measures: samples are dealt at random into groups as large as the loader's batches and normalized by them,
    twice. How often the nearest embedding of another sample is one of the same group; and how many more samples find
    their second embedding if both come from one group than if they come from two.
    Why it hurts: positives share a batch and negatives do not, so that batch statistics give the answer away: the
    pretext task is solved and nothing is learned (moco#137).
    Threshold: 5 standard errors above chance, twice chance, and a gain whose 99 % interval is above 0.
    Evidence: the share of strangers of the same group, chance, the gain in points.
    Fixes: shuffle-keys [S3]; sync [S3]; no-batch-axis [S3].
    Intentional when: never. Declare the use `contrastive-loss` to have it measured: a loss that compares no samples has
    nothing to gain from it.
    Known false alarms: a network that was trained with keys in another order has nothing to tell, and is silent.
    Fixture: defect: instances told apart with query and key in one batch of 8; near-miss: keys in another order.
    """
    if "contrastive-loss" not in m.declared:
        return unfit("no loss was declared that compares samples: intent=['contrastive-loss']")
    if m.leak is None or m.leak.problem:
        return failed("nothing was embedded" if m.leak is None else m.leak.problem)
    found = m.leak
    error = np.sqrt(found.chance * (1 - found.chance) / max(found.samples, 1))
    gain = 0.0 if found.gain is None else found.gain.value
    facts = {"nearest in the same group": found.betrayed, "chance": found.chance, "gain in points": gain}
    clear = found.betrayed > max(found.chance + t.leak_errors * error, t.leak_times * found.chance)
    if not clear or found.gain is None or found.gain.low <= 0:
        return fine("embeddings do not tell their batch", facts)
    reason = (
        f"{found.betrayed:.0%} of the embeddings lie next to a stranger of their batch, by chance {found.chance:.0%}"
    )
    return Judgement("warn", reason, found.layers, facts, found.gain, ("shuffle-keys", "sync", "no-batch-axis"))
