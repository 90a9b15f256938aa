"""Records of checks made by hand, for tests of the reports: no model runs."""

from normscope import records
from normscope.records import (
    ChannelStatistics,
    Fact,
    Finding,
    Interval,
    NormRow,
    PassCost,
    Remedy,
    Score,
    Threshold,
    Verdict,
)

MACHINE = records.Machine("a CPU", 2, "Linux x86_64", "3.12.1", (("normscope", "0.1.0"), ("torch", "2.13.0")))


def make_finding(code="NRM203", severity="E", words="half-frozen", layers=("encoder.bn1", "encoder.bn2"), **changes):
    values = dict(
        code=code,
        name=words,
        severity=severity,
        layers=tuple(layers),
        message="The weights are frozen, the statistics are not: 2 buffers moved 0.41 σ (median) in 3 steps.",
        facts=(Fact("steps", 3.0), Fact("moved", 0.41, "median over channels, σ"), Fact("who", None, words)),
        cost=Interval(5.5, 4.6, 6.4, "pp"),
        remedies=(
            Remedy("recal", "S1", "measure the statistics again", f"normscope fix … --select {code}"),
            Remedy("code", "S3", "freeze the statistics, too", "ns.freeze(model.encoder)"),
        ),
        explained_by="",
        explains=0.93,
    )
    return Finding(**(values | changes))


def make_row(name, k=0, codes=()):
    return NormRow(
        name=name,
        kind="BatchNorm2d",
        mode="train" if k % 2 else "eval",
        calls=1,
        values=3136.0 / (k + 1),
        delta=0.1 * k,
        rho=0.05 * k,
        drifted=min(1.0, 0.1 * k),
        noise=0.01,
        design_effect=1.02,
        explains=0.5 if codes else None,
        codes=tuple(codes),
    )


def make_channels(layer, total=5):
    """Five channels: two healthy, one off by 1 σ, one with four times the variance, one that is not finite."""
    return ChannelStatistics(
        layer=layer,
        total=total,
        running_mean=(0.0, 2.1, 3.0, 0.0, float("nan")),
        running_var=(1.0, 4.0, 4.0, 4.0, 1.0),
        data_mean=(0.0, 2.0, 1.0, 0.0, 0.0),
        data_var=(1.0, 4.0, 4.0, 1.0, 1.0),
    )


def make_check(findings=None, layers=6, words="SegNet", **changes):
    if findings is None:
        findings = (
            make_finding(),
            make_finding("NRM103", "E", "stale-statistics", ("encoder.bn2",), explained_by="NRM203", explains=None),
            make_finding("NRM301", "W", "too-few-values", ("head.bn",), cost=None, explains=None),
            make_finding("NRM106", "I", "momentum-out-of-convention", ("encoder.bn1",), cost=None, explains=None),
        )
    by_layer = {name: [f.code for f in findings if name in f.layers] for f in findings for name in f.layers}
    names = [*by_layer, *(f"layer{k}.bn" for k in range(layers))][: max(layers, len(by_layer))]
    status = {"E": "fail", "W": "warn", "I": "info"}
    verdicts = [
        *(Verdict(f.code, f.name, status[f.severity], f.message, f.layers, f.facts, f.cost) for f in findings),
        *(Verdict(f"NRM9{k:02}", words, "pass", words) for k in range(10)),
        Verdict("NRM201", words, "not-applicable", words),
        Verdict("NRM208", words, "needs-input", words),
        Verdict("NRM305", words, "could-not-check", words),
    ]
    values = dict(
        model=words,
        norms=(("BatchNorm", len(names)),),
        samples=1920,
        splits=(640, 640, 640),
        batches_read=30,
        batches_used=30,
        seconds=38.4,
        budget=60.0,
        seed=0,
        device="cpu",
        noise_floor=0.0,
        scores=(
            Score("eval", Interval(0.714, 0.68, 0.75, "share"), Interval(0.93, 0.85, 1.01, "loss"), 640),
            Score("batch statistics", Interval(0.765, 0.73, 0.8, "share"), Interval(0.72, 0.66, 0.79, "loss"), 640),
            Score("recalibrated", Interval(0.769, 0.74, 0.8, "share"), Interval(0.71, 0.65, 0.78, "loss"), 640),
        ),
        reading="the running statistics are stale, unconverged, polluted or were not copied",
        cost=Interval(5.5, 4.6, 6.4, "pp"),
        findings=tuple(findings),
        verdicts=tuple(verdicts),
        layers=tuple(make_row(name, k, by_layer.get(name, ())) for k, name in enumerate(names)),
        passes=(PassCost("P2 evaluation (B)", 10, 640, 1.25), PassCost("P3 batch statistics (B)", 10, 640, 1.5)),
        thresholds=(Threshold("drift_mean", 0.25, words), Threshold("drift_var", 0.405, words)),
        settings=(("metric", "accuracy"), ("command", f"normscope check {words} --data {words}")),
        notes=(words,),
        before="9f3c1a2b" * 8,
        restored=True,
        machine=MACHINE,
    )
    return records.CheckRecord(**(values | changes))


def make_fix(**changes):
    remedy = Remedy("recal", "S1", "measure the statistics again", "normscope fix … --select NRM103")
    patch = Remedy("code", "S3", "shuffle the loader", "DataLoader(..., shuffle=True)")
    values = dict(
        applied=(records.Treatment("NRM103", remedy, ("encoder.bn1",), Interval(5.4, 4.5, 6.3, "pp"), "better on B"),),
        skipped=(records.Treatment("NRM304", patch, ("encoder.bn1",), None, "an edit of your code"),),
        before=Interval(0.714, 0.68, 0.75, "share"),
        after=Interval(0.769, 0.74, 0.8, "share"),
        gain=Interval(5.1, 4.2, 6.0, "pp"),
        confirmed=True,
        seconds=3.5,
    )
    return records.FixRecord(**(values | changes))
