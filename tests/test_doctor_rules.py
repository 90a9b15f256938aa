"""The rules beyond the first set: judged on measurements made by hand, and their passes on small models."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_doctor_engine import (
    FIRES as FIRST_FIRES,
)
from test_doctor_engine import (
    HARM,
    NO_HARM,
    NOISY,
    TRAINING,
    T,
    assert_fires,
    batches,
    drift,
    layer,
    measured,
    moments,
    outcome,
    reference,
)
from test_doctor_engine import (
    SILENT as FIRST_SILENT,
)
from test_doctor_engine import (
    Net as Small,
)
from test_surgery import interrupted_at
from torch import nn
from torch.nn import functional as F

from normscope.doctor import RULES, check, checkpoint, configure
from normscope.doctor import cache as caches
from normscope.doctor.checkpoint import load, save
from normscope.doctor.configuration import nearest
from normscope.doctor.costs import _held as held_by
from normscope.doctor.judge import known_intents, verdicts_of
from normscope.doctor.lineage import Lineage
from normscope.doctor.measurements import (
    Change,
    Costs,
    Effect,
    FunctionalCall,
    Layer,
    Leak,
    Optimized,
    Padding,
    Rescaled,
    Site,
    Steps,
)
from normscope.doctor.remedies import REMEDIES, Case
from normscope.doctor.trials import lengths_of, map_first, populations
from normscope.errors import ArgumentError, DataError
from normscope.records import FixRecord, Interval, Treatment
from normscope.surgery import Snapshot, fed_by, state_hash

MILD = Effect(Interval(0.5, 0.4, 0.6, "pp"), None, "W")
SEQUENCE = (Site("bn", 0, (32, 10, 16), 512.0),)


def steps(**options):
    options = {"moved": {"bn": 0.1}, "trained": ("bn",), "updates": {"bn": 1.0}, "called": ("bn",), **options}
    return Steps(3, learning=options.pop("learning", ("bn",)), **{"forwards": 1.0, "backwards": 1.0, **options})


def sites(*pairs):
    """Moments of a layer whose calls have these means and variances."""
    calls = tuple(moments(mean=mean, var=var, seed=k) for k, (mean, var) in enumerate(pairs))
    return dataclasses.replace(moments(), sites=calls)


def ranged(low, high, **options):
    return dataclasses.replace(moments(), low=np.full(10, low), high=np.full(10, high), **options)


def ranks(**spread):
    return {"parallel": "distributed", "devices": 4, "ranks": spread}


def group(name="bn", kind="GroupNorm", **options):
    return Layer(name, kind, running=False, tracks=None, **options)


VARIANCES = {name: np.array([1e-7] * share + [1.0] * (10 - share)) for name, share in (("some", 3), ("none", 0))}
HALF = Site("bn", 0, (32, 10), 32.0, dtype="float16")
IMAGE = Rescaled("× 255", 6.5e4, HARM)
EPS = Change("bn", "eps", "1e-05", "0.1", 0.05)
COSTS = Costs(10.0, Interval(2.0, 1.5, 2.5, "ms"), 0.05, {"bn": 4 << 20}, ("bn",))
SYNCED = dataclasses.replace(COSTS, synced=Interval(4.0, 3.5, 4.5, "ms"))
FOLDED = dataclasses.replace(COSTS, inference=5.0, folded=("bn",), folding=Interval(1.0, 0.8, 1.2, "ms"))
LEAK = Leak(256, 0.25, 15 / 255, Interval(10.0, 5.0, 15.0, "pp"), ("bn",))

FIRES = [
    ("NRM105", measured(layer(momentum=0.9, training=True), own={"bn": moments(n=16)}), "warn"),
    (
        "NRM105",
        measured(
            layer(momentum=0.9, training=True),
            own={"bn": moments(n=16)},
            outcomes={"eval": outcome([1.0, 0.0])},
            noise_of_average=np.array([0.9, 0.8, 0.7]),
        ),
        "fail",
    ),
    ("NRM105", measured(layer(momentum=0.9), own={"bn": moments(n=16)}), "info"),
    ("NRM107", measured(own={"bn": sites((0.0, 1.0), (3.0, 1.0))}, trials={"sites": HARM}), "fail"),
    ("NRM107", measured(own={"bn": sites((0.0, 1.0), (0.0, 5.0))}), "warn"),
    ("NRM108", measured(layer(var=0.81, seen=2), layer("b", var=0.81, seen=2)), "warn"),
    ("NRM109", measured(layer(mean=0.5), drift={"bn": drift()}, rescaled=IMAGE), "fail"),
    ("NRM110", measured(deployment={"bn": drift()}, shift=HARM), "fail"),
    ("NRM111", measured(deployment={"bn": drift()}, shift=MILD, same_samples=True), "warn"),
    ("NRM112", measured(batch_size=3, trials={"bessel": MILD}), "warn"),
    ("NRM112", measured(batch_size=3), "info"),
    ("NRM202", measured(steps=steps(trained=())), "warn"),
    ("NRM202", measured(steps=steps(trained=()), drift={"bn": drift()}, recalibrated=HARM), "fail"),
    ("NRM206", measured(layer(held=True, bias=np.zeros(10)), recalibrated=Effect()), "warn"),
    ("NRM207", measured(TRAINING, layer("b")), "info"),
    ("NRM209", measured(layer(kind="InstanceNorm"), batch=HARM), "fail"),
    ("NRM209", measured(layer(kind="InstanceNorm")), "warn"),
    ("NRM211", measured(steps=steps(apart=("bn",))), "warn"),
    ("NRM211", measured(steps=steps(apart=("bn",), moved={})), "info"),
    ("NRM303", measured(TRAINING, loader=caches.LoaderFacts(samples=66, batch=32, drop_last=False)), "warn"),
    (
        "NRM305",
        measured(layer(kind="GroupNorm"), sites=SEQUENCE, padding=Padding(0.4, "mask", {"bn": 0.2}, HARM)),
        "fail",
    ),
    ("NRM305", measured(TRAINING, sites=SEQUENCE, padding=Padding(0.4, "tail", {"bn": 0.2})), "warn"),
    (
        "NRM306",
        measured(TRAINING, seen={"bn": dataclasses.replace(moments(), dominated=0.9, culprit="batch 3")}),
        "warn",
    ),
    ("NRM308", measured(TRAINING, **NOISY, steps=steps(forwards=16.0, optimizer=3)), "warn"),
    ("NRM309", measured(TRAINING, own={"bn": moments(n=64)}, parallel="DataParallel", devices=16), "warn"),
    ("NRM401", measured(fed={"bn": ("conv", "")}, biased=("conv",)), "info"),
    ("NRM402", measured(group(), sites=(Site("bn", 0, (32, 10), 1.0),)), "fail"),
    ("NRM402", measured(group(), sites=(Site("bn", 0, (32, 10), 2.0),)), "warn"),
    ("NRM402", measured(group(kind="RMSNorm"), sites=(Site("bn", 0, (32, 10), 1.0),)), "warn"),
    ("NRM403", measured(sites=(Site("bn", 0, (32, 10, 16), 512.0, axis=2),)), "warn"),
    ("NRM404", measured(layer(bias=np.full(10, -5.0)), seen={"bn": ranged(-3.0, 3.0)}, rectified=("bn",)), "warn"),
    (
        "NRM404",
        measured(layer(bias=np.r_[-5.0, np.ones(9)]), seen={"bn": ranged(-3.0, 3.0)}, rectified=("bn",)),
        "info",
    ),
    (
        "NRM405",
        measured(dataclasses.replace(layer(), var=VARIANCES["some"]), own={"bn": moments()}, recalibrated=HARM),
        "fail",
    ),
    (
        "NRM406",
        measured(layer(var=2.0), sites=(Site("bn", 0, (32, 10), 32.0, dropout=True),), seen={"bn": moments()}),
        "info",
    ),
    (
        "NRM406",
        measured(
            layer(var=2.0),
            sites=(Site("bn", 0, (32, 10), 32.0, dropout=True),),
            seen={"bn": moments()},
            recalibrated=HARM,
        ),
        "warn",
    ),
    ("NRM407", measured(last=("bn",)), "info"),
    ("NRM409", measured(unreached=("bn",), steps=steps(called=())), "info"),
    ("NRM410", measured(sites=(Site("bn", 0, (32, 10), 32.0), Site("bn", 1, (32, 10), 32.0))), "info"),
    ("NRM411", measured(sites=(Site("bn", 0, (32, 10), 32.0, after="other"),)), "info"),
    ("NRM501", measured(layer(eps=1e-12), sites=(dataclasses.replace(HALF, finite=False),)), "fail"),
    ("NRM501", measured(layer(eps=1e-12), sites=(dataclasses.replace(HALF, finite=True),)), "info"),
    ("NRM502", measured(dataclasses.replace(layer(), var=VARIANCES["some"]), trials={"eps": HARM}), "warn"),
    ("NRM502", measured(dataclasses.replace(layer(), var=VARIANCES["some"]), trials={"eps": NO_HARM}), "info"),
    ("NRM503", measured(seen={"bn": ranged(-2e4, 1.0, dtype="float16")}), "warn"),
    ("NRM503", measured(seen={"bn": ranged(-2e4, 1.0, dtype="float16", infinite=3)}), "fail"),
    ("NRM504", measured(seen={"bn": moments(mean=5000.0)}), "warn"),
    ("NRM504", measured(seen={"bn": dataclasses.replace(moments(mean=50.0), dtype="bfloat16")}), "warn"),
    ("NRM505", measured(layer(var=2e5)), "info"),
    ("NRM505", measured(dataclasses.replace(layer(), var=np.array([1e-3] + [1e4] * 9))), "info"),
    ("NRM506", measured(layer(dtype="bfloat16", training=True)), "fail"),
    ("NRM506", measured(layer(dtype="float16", var=np.inf)), "warn"),
    ("NRM506", measured(layer(dtype="float16")), "info"),
    ("NRM601", measured(steps=steps(updates={"bn": 2.0})), "info"),
    ("NRM601", measured(steps=steps(updates={"bn": 2.0}), drift={"bn": drift()}, recalibrated=HARM), "warn"),
    ("NRM604", measured(optimized=Optimized(("bn",), (), 1e-4)), "info"),
    (
        "NRM604",
        measured(layer(weight=np.full(10, 0.01)), optimized=Optimized(("bn",), (), 1.0), rectified=("bn",)),
        "warn",
    ),
    ("NRM605", measured(**ranks(bn=0.5)), "warn"),
    ("NRM606", measured(reference=reference(same_weights=True, equal=("bn",), difference=0.1, changes=(EPS,))), "fail"),
    (
        "NRM606",
        measured(
            reference=reference(
                same_weights=True, equal=("bn",), difference=0.0, changes=(Change("bn", "training", "True", "False"),)
            )
        ),
        "warn",
    ),
    ("NRM608", measured(optimized=Optimized((), ("bn",))), "warn"),
    ("NRM610", measured(steps=steps(forwards=2.0, updates={"bn": 2.0})), "info"),
    ("NRM612", measured(TRAINING, declared=("per-sample-gradients",)), "fail"),
    ("NRM701", measured(reference=reference(gone=("bn",), folded=True, difference=0.1)), "fail"),
    ("NRM703", measured(exported=("batch_norm",)), "fail"),
    ("NRM704", measured(reference=reference(changes=(EPS,))), "warn"),
    ("NRM704", measured(reference=reference(changes=(dataclasses.replace(EPS, scale=1e-6),))), "info"),
    ("NRM705", measured(ranges={"bn": 100.0}), "info"),
    ("NRM705", measured(ranges={"bn": 100.0}, declared=("per-tensor-quantization",)), "warn"),
    ("NRM801", measured(costs=COSTS), "info"),
    ("NRM802", measured(costs=COSTS), "info"),
    ("NRM307", measured(leak=LEAK, declared=("contrastive-loss",)), "warn"),
    ("NRM702", measured(costs=FOLDED), "info"),
    ("NRM803", measured(costs=dataclasses.replace(COSTS, moved={"bn": 0.5})), "info"),
    ("NRM804", measured(layer(cls="SyncBatchNorm"), devices=2, costs=SYNCED), "info"),
    ("NRM900", measured(layer(kind="custom", cls="MyNorm")), "info"),
    ("NRM905", measured(functional=(FunctionalCall("batch_norm", "block", False, "bn"),)), "info"),
    ("NRM905", measured(layer(script=True)), "info"),
]

SILENT = [
    ("NRM307", measured(leak=LEAK), "not-applicable"),
    ("NRM307", measured(declared=("contrastive-loss",)), "could-not-check"),
    ("NRM307", measured(leak=dataclasses.replace(LEAK, betrayed=0.1), declared=("contrastive-loss",)), "pass"),
    (
        "NRM307",
        measured(leak=dataclasses.replace(LEAK, gain=Interval(1.0, -1.0, 3.0, "pp")), declared=("contrastive-loss",)),
        "pass",
    ),
    ("NRM702", measured(), "needs-input"),
    ("NRM702", measured(costs=COSTS), "needs-input"),
    ("NRM702", measured(costs=dataclasses.replace(COSTS, fold_problem="OutOfMemoryError")), "could-not-check"),
    ("NRM702", measured(costs=dataclasses.replace(FOLDED, folded=())), "pass"),
    ("NRM702", measured(costs=dataclasses.replace(FOLDED, inference=50.0)), "pass"),
    (
        "NRM702",
        measured(costs=dataclasses.replace(FOLDED, folding=Interval(1.0, -0.1, 2.1, "ms"))),
        "could-not-check",
    ),
    ("NRM803", measured(costs=COSTS), "pass"),
    ("NRM803", measured(costs=dataclasses.replace(COSTS, moved={"bn": 0.2})), "pass"),
    ("NRM803", measured(costs=Costs(problem="no")), "could-not-check"),
    ("NRM804", measured(layer(cls="SyncBatchNorm"), costs=SYNCED), "not-applicable"),
    ("NRM804", measured(devices=2, costs=SYNCED), "not-applicable"),
    ("NRM804", measured(layer(cls="SyncBatchNorm"), devices=2, costs=Costs(problem="no")), "could-not-check"),
    (
        "NRM804",
        measured(layer(cls="SyncBatchNorm"), devices=2, costs=dataclasses.replace(SYNCED, spread=0.3)),
        "could-not-check",
    ),
    (
        "NRM804",
        measured(
            layer(cls="SyncBatchNorm"),
            devices=2,
            costs=dataclasses.replace(SYNCED, synced=Interval(0.1, 0.05, 0.2, "ms")),
        ),
        "pass",
    ),
    ("NRM105", measured(layer(momentum=0.3, training=True), own={"bn": moments(n=512)}), "pass"),
    ("NRM105", measured(layer(momentum=None)), "not-applicable"),
    ("NRM105", measured(layer(held=True, momentum=0.9), own={"bn": moments(n=16)}), "not-applicable"),
    ("NRM107", measured(own={"bn": sites((0.0, 1.0), (0.0, 1.1))}), "pass"),
    ("NRM107", measured(own={"bn": sites((0.0, 1.0), (3.0, 1.0))}, trials={"sites": NO_HARM}), "info"),
    ("NRM107", measured(own={"bn": moments()}), "not-applicable"),
    ("NRM108", measured(layer(var=0.83, seen=2), layer("b", var=0.83, seen=2)), "pass"),
    ("NRM108", measured(layer(var=1.0), layer("b", var=1.0)), "pass"),
    ("NRM109", measured(drift={"bn": drift()}), "pass"),
    ("NRM109", measured(drift={"bn": drift()}, rescaled=dataclasses.replace(IMAGE, effect=NO_HARM)), "pass"),
    (
        "NRM109",
        measured(
            layer(mean=0.5), drift={"bn": drift()}, rescaled=dataclasses.replace(IMAGE, effect=MILD), recalibrated=HARM
        ),
        "pass",
    ),
    ("NRM110", measured(), "needs-input"),
    ("NRM110", measured(deployment={"bn": drift(beyond=False)}, shift=HARM), "pass"),
    ("NRM110", measured(deployment={"bn": drift()}, drift={"bn": drift()}, shift=HARM), "could-not-check"),
    ("NRM110", measured(deployment={"bn": drift()}, shift=HARM, same_samples=True), "not-applicable"),
    ("NRM111", measured(deployment={"bn": drift()}, shift=HARM), "not-applicable"),
    ("NRM112", measured(), "pass"),
    ("NRM112", measured(batch_size=3, sites=(Site("bn", 0, (32, 10, 16, 16), 8192.0),)), "pass"),
    ("NRM202", measured(steps=steps()), "pass"),
    ("NRM202", measured(layer(held=True), steps=steps(trained=())), "not-applicable"),
    ("NRM202", measured(steps=steps(trained=(), learning=())), "not-applicable"),
    ("NRM206", measured(layer(held=True)), "pass"),
    ("NRM206", measured(layer(held=True, bias=np.zeros(10)), learns=False), "pass"),
    ("NRM207", measured(TRAINING, layer("b", held=True)), "pass"),
    ("NRM209", measured(layer(kind="InstanceNorm"), batch=NO_HARM), "info"),
    ("NRM209", measured(group(kind="InstanceNorm")), "pass"),
    ("NRM211", measured(steps=steps()), "pass"),
    ("NRM211", measured(), "needs-input"),
    ("NRM303", measured(TRAINING, loader=caches.LoaderFacts(samples=80, batch=32, drop_last=False)), "pass"),
    ("NRM303", measured(layer(), loader=caches.LoaderFacts(samples=66, batch=32, drop_last=False)), "not-applicable"),
    ("NRM305", measured(), "not-applicable"),
    ("NRM305", measured(sites=SEQUENCE), "pass"),
    ("NRM305", measured(sites=SEQUENCE, padding=Padding(0.4, "mask", {"bn": 1e-6})), "pass"),
    ("NRM306", measured(seen={"bn": dataclasses.replace(moments(), dominated=0.4)}), "pass"),
    ("NRM308", measured(TRAINING, **NOISY, steps=steps(optimizer=3)), "pass"),
    ("NRM308", measured(group(), steps=steps(forwards=16.0, optimizer=3)), "not-applicable"),
    ("NRM308", measured(TRAINING, own={"bn": moments(n=512)}, steps=steps(forwards=16.0, optimizer=3)), "pass"),
    ("NRM309", measured(TRAINING, own={"bn": moments(n=64)}), "not-applicable"),
    (
        "NRM309",
        measured(
            layer(training=True, cls="SyncBatchNorm"), own={"bn": moments(n=64)}, parallel="DataParallel", devices=16
        ),
        "pass",
    ),
    ("NRM401", measured(fed={"bn": ("conv", "its output is used elsewhere, too")}, biased=("conv",)), "pass"),
    ("NRM401", measured(fed={"bn": ("conv", "")}), "pass"),
    ("NRM402", measured(group(), sites=(Site("bn", 0, (32, 10), 16.0),)), "pass"),
    ("NRM403", measured(sites=(Site("bn", 0, (32, 10, 16), 512.0, axis=1),)), "pass"),
    ("NRM403", measured(sites=SEQUENCE), "could-not-check"),
    (
        "NRM404",
        measured(layer(weight=np.r_[0.0, np.ones(9)]), seen={"bn": ranged(-3.0, 3.0)}, rectified=("bn",)),
        "pass",
    ),
    ("NRM404", measured(layer(bias=np.full(10, -5.0)), seen={"bn": ranged(-3.0, 3.0)}), "not-applicable"),
    (
        "NRM404",
        measured(layer(weight=np.zeros(10), bias=np.zeros(10)), seen={"bn": ranged(-3.0, 3.0)}, rectified=("bn",)),
        "pass",
    ),
    ("NRM405", measured(layer(var=1e-9), own={"bn": moments(var=1e-9)}, recalibrated=HARM), "pass"),
    ("NRM405", measured(layer(var=-1e-6), own={"bn": moments()}, recalibrated=HARM), "pass"),
    (
        "NRM406",
        measured(layer(var=1.1), sites=(Site("bn", 0, (32, 10), 32.0, dropout=True),), seen={"bn": moments()}),
        "pass",
    ),
    ("NRM406", measured(layer(var=2.0), seen={"bn": moments()}), "not-applicable"),
    ("NRM407", measured(), "pass"),
    ("NRM409", measured(unreached=("bn",)), "needs-input"),
    ("NRM409", measured(unreached=("bn",), steps=steps()), "pass"),
    ("NRM410", measured(), "pass"),
    ("NRM411", measured(), "pass"),
    ("NRM501", measured(layer(eps=1e-12), sites=(dataclasses.replace(HALF, dtype="bfloat16", finite=True),)), "pass"),
    ("NRM501", measured(layer(eps=1e-12)), "not-applicable"),
    ("NRM502", measured(), "pass"),
    ("NRM502", measured(layer(var=-1e-6)), "pass"),
    ("NRM502", measured(layer(var=1e-7, weight=np.zeros(10))), "pass"),
    ("NRM503", measured(seen={"bn": ranged(-2e4, 1.0, dtype="bfloat16")}), "not-applicable"),
    ("NRM503", measured(seen={"bn": ranged(-200.0, 1.0, dtype="float16")}), "pass"),
    ("NRM504", measured(seen={"bn": moments(mean=5.0)}), "pass"),
    ("NRM504", measured(seen={"bn": moments(mean=5.0, var=1e-30)}), "pass"),
    ("NRM505", measured(layer(var=900.0)), "pass"),
    ("NRM506", measured(layer(dtype="float32")), "pass"),
    ("NRM506", measured(layer(dtype="bfloat16", training=True, held=True)), "info"),
    ("NRM601", measured(steps=steps(forwards=4.0, updates={"bn": 4.0})), "pass"),
    ("NRM601", measured(steps=steps(forwards=0.0)), "could-not-check"),
    ("NRM604", measured(optimized=Optimized()), "pass"),
    ("NRM604", measured(), "needs-input"),
    ("NRM605", measured(**ranks(bn=0.01)), "pass"),
    ("NRM605", measured(), "not-applicable"),
    ("NRM605", measured(parallel="distributed", devices=4, rank_problem="one is missing"), "could-not-check"),
    ("NRM606", measured(reference=reference(same_weights=True, equal=("bn",), difference=1e-6)), "pass"),
    ("NRM606", measured(reference=reference(difference=0.1)), "not-applicable"),
    ("NRM608", measured(optimized=Optimized()), "pass"),
    ("NRM610", measured(steps=steps()), "pass"),
    ("NRM610", measured(steps=steps(forwards=2.0, updates={"bn": 1.0})), "pass"),
    ("NRM612", measured(TRAINING), "not-applicable"),
    ("NRM612", measured(layer(), declared=("per-sample-gradients",)), "pass"),
    ("NRM701", measured(reference=reference(gone=("bn",), folded=True, difference=1e-6)), "pass"),
    ("NRM701", measured(reference=reference(gone=("bn",), difference=1.0)), "not-applicable"),
    ("NRM703", measured(exported=()), "pass"),
    ("NRM703", measured(), "not-applicable"),
    ("NRM704", measured(reference=reference()), "pass"),
    ("NRM705", measured(ranges={"bn": 3.0}, declared=("per-tensor-quantization",)), "pass"),
    ("NRM801", measured(), "needs-input"),
    ("NRM801", measured(costs=dataclasses.replace(COSTS, saved=Interval(0.1, -0.1, 0.3, "ms"))), "pass"),
    ("NRM801", measured(costs=dataclasses.replace(COSTS, spread=0.9)), "could-not-check"),
    ("NRM802", measured(costs=dataclasses.replace(COSTS, held={"bn": 1000})), "pass"),
    ("NRM900", measured(), "pass"),
    ("NRM905", measured(), "pass"),
]


@pytest.mark.parametrize(("code", "m", "status"), FIRES, ids=[f"{c}-{s}-{k}" for k, (c, _, s) in enumerate(FIRES)])
def test_a_rule_fires(code, m, status):
    assert_fires(code, m, status)


@pytest.mark.parametrize(("code", "m", "status"), SILENT, ids=[f"{c}-{s}-{k}" for k, (c, _, s) in enumerate(SILENT)])
def test_a_rule_is_silent_on_a_near_miss(code, m, status):
    judgement = RULES[code].judge(m, T)
    assert judgement.status == status, judgement.reason


def test_every_rule_has_been_seen_to_fire_and_to_be_silent():
    assert {code for code, _, _ in (*FIRST_FIRES, *FIRES)} == set(RULES)
    assert {code for code, _, _ in (*FIRST_SILENT, *SILENT)} == set(RULES)


@pytest.mark.parametrize("code", sorted({code for code, _, _ in FIRES} & {c for c in RULES if RULES[c].intents}))
def test_an_intent_turns_alarms_into_intentions(code):
    for m in (m for fired, m, status in FIRES if fired == code and status in ("fail", "warn")):
        for intent in RULES[code].intents:
            ((_, judgement),) = verdicts_of(m, [RULES[code]], (intent,), T)
            assert judgement.status == "intentional"
            assert f"`{intent}`" in RULES[code].page.partition("Intentional when: ")[2].partition("Known false")[0]


def test_a_use_asks_and_does_not_excuse():
    assert {"per-sample-gradients", "per-tensor-quantization"} <= set(known_intents())
    m = measured(TRAINING, declared=("per-sample-gradients",))
    ((_, judgement),) = verdicts_of(m, [RULES["NRM612"]], ("per-sample-gradients",), T)
    assert judgement.status == "fail"


# What would hide the trouble, or make another; by rule.
FORBIDDEN = {
    "NRM103": {"train-mode"},
    "NRM107": {"recal", "copy-buffers", "adapt"},
    "NRM201": {"train-mode"},
    "NRM210": {"train-mode"},
    "NRM301": {"remove-norm"},
    "NRM302": {"recal"},
    "NRM308": {"recal", "remove-norm"},
}


@pytest.mark.parametrize(("code", "m", "status"), [*FIRST_FIRES, *FIRES])
def test_no_alarm_offers_what_is_forbidden_or_ranks_another_behaviour_first(code, m, status):
    offered = RULES[code].judge(m, T).remedies
    assert not FORBIDDEN.get(code, set()) & set(offered)
    assert REMEDIES[offered[0]].safety != "S2"


# --- passes on small models -------------------------------------------------------------------------------------------


def test_the_lineage_knows_dropout_axes_and_normalizers():
    class Branchy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            x = self.b(self.a(x).view(-1, 4))
            return self.c(self.linear(self.drop(torch.relu(x))))

    m = check(Branchy().eval(), [torch.randn(16, 4) for _ in range(6)]).measurements
    a, b, c = m.sites
    assert (a.after, b.after, c.after) == ("", "a", "")
    assert (a.dropout, b.dropout, c.dropout) == (False, False, True)
    assert (a.axis, c.axis) == (None, 1)
    assert (m.rectified, m.last) == (("b",), ("c",))
    assert dict(m.fed) == {"c": ("linear", "")}


def test_marks_are_no_attributes_of_tensors():
    lineage, x = Lineage(), torch.zeros(2)
    lineage.module(nn.BatchNorm1d(2), "bn", (), x)
    assert lineage.of(x).norm == "bn"
    assert vars(x) == {}


def test_ranges_sites_and_dominance_are_those_of_the_data():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.bn(x) + self.bn(3 * x + 1)

    torch.manual_seed(0)
    loader = [torch.randn(16, 5) for _ in range(6)]
    loader[2][3] = 1000.0
    m = check(Twice().eval(), loader).measurements
    seen = m.seen["bn"]
    first, second = seen.sites
    # Split A has some of the batches; whichever these are, the second call's values are 3x + 1.
    assert np.all(seen.high >= 3 * first.mean + 1)
    assert np.all(seen.low <= first.mean)
    assert np.all(seen.high <= 3001 + 1e-3)
    np.testing.assert_allclose(second.mean, 3 * first.mean + 1, rtol=1e-5)
    np.testing.assert_allclose(second.var, 9 * first.var, rtol=1e-4)
    dominated = [k for k in range(len(seen.means)) if abs(seen.means[k]).max() > 10]
    assert (seen.dominated > 0.9) == bool(dominated)


def test_populations_are_the_variance_between_calls():
    near, far = sites((0.0, 1.0), (0.05, 1.0)), sites((0.0, 1.0), (2.0, 9.0))
    assert populations(near)[0] < 0.05
    share, ratio = populations(far)
    assert share == pytest.approx(1 / (1 + 5), abs=0.06)  # means 0 and 2: variance 1; variances 1 and 9: mean 5
    assert ratio == pytest.approx(9, rel=0.4)


@pytest.mark.parametrize("tail", [0.0, -1.0])
def test_lengths_come_from_equal_tails(tail):
    x = torch.randn(6, 3, 12)
    lengths = torch.tensor([4, 12, 7, 5, 9, 3])
    x[(torch.arange(12) >= lengths[:, None])[:, None].expand_as(x)] = tail
    found, known = lengths_of((x, torch.arange(6)), 6, 12)
    assert (found.tolist(), known) == (lengths.tolist(), "tail")


def test_lengths_come_from_a_mask_first():
    x, lengths = torch.randn(4, 9, 5), torch.tensor([9, 2, 4, 8])
    mask = (torch.arange(9) < lengths[:, None]).long()
    assert lengths_of({"x": x, "attention_mask": mask}, 4, 9)[0].tolist() == lengths.tolist()


def test_no_lengths_where_nothing_is_filled_up():
    x = torch.randn(6, 3, 12)
    assert lengths_of((x, torch.arange(6)), 6, 12) is None
    x[2, :, -2:] = 0.0
    assert lengths_of((x, torch.arange(6)), 6, 12) is None


def test_labels_that_end_in_zeros_fill_nothing_up():
    x, y = torch.randn(12, 3, 10), F.one_hot(torch.arange(12) % 10, 10)
    assert lengths_of((x, y), 12, 10) is None
    assert lengths_of({"x": x, "labels": y}, 12, 10) is None


def test_only_the_first_floating_point_tensor_is_mapped():
    ids, x, y = torch.arange(3), torch.ones(3, 2), torch.ones(3)
    mapped = map_first([ids, {"x": x, "y": y}], lambda t: t * 2)
    assert mapped[1]["x"].tolist() == [[2.0, 2.0]] * 3
    assert mapped[1]["y"] is y
    assert map_first([ids], lambda t: t) is None


def test_a_layer_is_fed_by_the_linear_layer_before_it():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4))
    before = state_hash(model)
    assert fed_by(model, torch.randn(8, 6)) == (("1", "0", ""),)
    assert state_hash(model) == before


def everything(model, **options):
    def step(m, batch, optimizer):
        optimizer.zero_grad()
        F.cross_entropy(m(batch[0]), batch[1]).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return check(
        model, list(batches(12)), train_step=step, optimizer=optimizer, reference=copy.deepcopy(model),
        deployment=list(batches(6, seed=9)), **options,
    )  # fmt: skip


@pytest.mark.parametrize("select", [None, "NRM8"])
def test_with_everything_that_can_be_passed_the_model_is_left_alone(select):
    torch.manual_seed(0)
    model = Small()
    loader = list(batches(6, seed=9))
    before = state_hash(model, rng=True)
    report = everything(model, select=select)
    assert state_hash(model, rng=True) == before
    assert not [v for v in report.verdicts if v.reason.startswith("the rule raised")]
    assert all(torch.equal(x, y) for x, y in zip(loader[0], next(batches(1, seed=9)), strict=True))


def test_costs_are_measured_where_they_are_asked_for():
    torch.manual_seed(0)
    assert everything(Small()).measurements.costs is None
    costs = everything(Small(), select="NRM8").measurements.costs
    assert set(costs.held) == {"bn1", "bn2"}
    # What a BatchNorm keeps of (32, 8) floats: its input, which nobody kept before; statistics are a few bytes.
    assert 32 * 8 * 4 <= costs.held["bn1"] <= 3 * 32 * 8 * 4
    assert costs.saved is not None or costs.problem


def test_what_folding_saves_is_measured_on_a_folded_copy():
    torch.manual_seed(0)
    costs = everything(Small().eval(), select="NRM702").measurements.costs
    assert costs.folded == ("bn1", "bn2")
    assert costs.folding is not None
    assert costs.inference > 0
    lonely = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU())
    verdict = check(lonely, list(batches(6)), select="NRM702")["NRM702"]
    assert (verdict.status, verdict.reason) == ("pass", "no normalizer can be folded")


def test_copies_into_another_order_are_found_by_strides():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.keeps = nn.LayerNorm(4), nn.GroupNorm(2, 4)

        def forward(self, x):
            return self.norm(self.keeps(x).transpose(1, 2)).transpose(1, 2)

    costs = check(Moves(), [torch.randn(8, 4, 64) for _ in range(6)], select="NRM8").measurements.costs
    assert set(costs.moved) == {"norm"}
    assert costs.moved["norm"] > 0


def saved_tensors_hooks():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_an_interrupt_at_any_line_leaves_no_hooks_on_what_autograd_saves():
    model, batch = Small(), caches.Batch(0, (torch.randn(4, 6),), 4)
    ours = (str(Path("doctor") / "costs.py"), str(Path("torch") / "autograd" / "graph.py"))

    def measure():
        with Snapshot(model):
            held_by(model, batch, None, None)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # the user's own stay
        home, line = saved_tensors_hooks(), 0
        while interrupted_at(line, measure, lambda name: name.endswith(ours)):
            assert saved_tensors_hooks() == home, f"line {line}"
            line += 1
    assert line > 30
    assert saved_tensors_hooks() is None


def test_snapshots_take_modes_of_torch_functions_off_the_stack_that_came_later():
    class Mode(torch.overrides.BaseTorchFunctionMode):
        pass

    with Mode():
        depth = torch._C._len_torch_function_stack()
        home = Snapshot(nn.Linear(1, 1))
        for _ in range(2):
            Mode().__enter__()
        home.restore()
        assert torch._C._len_torch_function_stack() == depth
    assert torch._C._len_torch_function_stack() == depth - 1


# --- the fix ----------------------------------------------------------------------------------------------------------


def doubly_ill():
    """Two layers that each spoil everything, found by two rules."""
    torch.manual_seed(0)
    model = Small(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(120, 64, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for bn in (model.bn1, model.bn2):
        bn.running_mean += 1000 * bn.running_var.sqrt()
    report = check(model.eval(), list(batches(24)))
    (found,) = (f for f in report.findings if f.code == "NRM103")
    parts = (dataclasses.replace(found, layers=("bn1",)), dataclasses.replace(found, code="NRM113", layers=("bn2",)))
    return model, dataclasses.replace(report, record=dataclasses.replace(report.record, findings=parts))


def test_causes_that_hide_each_others_cure_are_cured_together():
    model, report = doubly_ill()
    ill = state_hash(model)
    fix = report.fix()
    assert [(t.rule, t.outcome) for t in fix.applied] == [
        ("NRM103", "kept, together with the others"),
        ("NRM113", "kept, together with the others"),
    ]
    assert fix.confirmed
    assert all(t.remedy.code != "recal" for t in fix.skipped)
    fix.undo()
    assert state_hash(model) == ill


def test_what_gains_nothing_together_is_taken_back(monkeypatch):
    model, report = doubly_ill()
    ill = state_hash(model)
    monkeypatch.setattr("normscope.doctor.fix.gained", lambda effect: False)
    fix = report.fix()
    assert fix.applied == ()
    assert len([t for t in fix.skipped if t.outcome == "split B shows no gain"]) >= 2
    assert state_hash(model) == ill


# --- settings ---------------------------------------------------------------------------------------------------------


def test_ignores_by_module_take_layers_out_and_say_what_was_not_needed(tmp_path):
    _, report = doubly_ill()
    model, loader = report.model, list(batches(24))
    ignores = {"bn1": ["NRM103"], "bn2": ["NRM1"], "head.*": ["NRM203"]}
    some = check(model, loader, module_ignores={"bn1": ["NRM103"]})["NRM103"]
    assert (some.status, some.layers) == ("fail", ("bn2",))
    every = check(model, loader, module_ignores=ignores)
    assert every["NRM103"].status == "intentional"
    assert "the ignore of NRM203 for 'head.*' is not needed" in every.record.notes
    with pytest.raises(ArgumentError, match="matches no rule"):
        check(model, loader, module_ignores={"bn1": ["NRM777"]})


def test_ignores_and_intents_that_nothing_needs_are_noted():
    _, report = doubly_ill()
    notes = check(report.model, list(batches(24)), ignore=["NRM203", "NRM103"], intent="supernet").record.notes
    assert "ignore NRM203 is not needed: it raises nothing" in notes
    assert "intent supernet is not needed: no alarm is about it" in notes
    assert not any("NRM103" in note for note in notes)


def test_thresholds_are_those_that_were_given():
    _, report = doubly_ill()
    lax = dataclasses.replace(T, drift_mean=1e6, drift_var=1e6)
    found = check(report.model, list(batches(24)), thresholds=lax)
    assert found["NRM103"].status == "pass"
    assert {row.name: row.value for row in found.record.thresholds}["drift_mean"] == 1e6


def test_a_baseline_forgives_what_it_knows():
    _, report = doubly_ill()
    again = check(report.model, list(batches(24)))
    assert not again.passed("E")
    assert again.passed("E", baseline=again.record)
    less = dataclasses.replace(again.record, findings=tuple(f for f in again.findings if f.code != "NRM103"))
    assert not again.passed("E", baseline=less)


def test_settings_come_from_the_next_pyproject(tmp_path):
    text = """
[tool.normscope]
ignore = ["NRM4"]
intent = ["supernet"]
[tool.normscope.thresholds]
cost_error = 2
[tool.normscope.per-module-ignores]
"encoder.*" = ["NRM202"]
"""
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert nearest(tmp_path / "a" / "b") == tmp_path / "pyproject.toml"
    found = configure(tmp_path / "pyproject.toml")
    assert (found.ignore, found.intent, found.thresholds.cost_error) == (("NRM4",), ("supernet",), 2.0)
    assert dict(found.module_ignores) == {"encoder.*": ("NRM202",)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[tool.normscope.thresholds]\ncosterror = 2", "threshold 'costerror' is unknown"),
        ("[tool.normscope.thresholds]\ncost_error = 'x'", "must be a number"),
        ("[tool.normscope]\nignored = []", "unknown entries: ignored"),
        ("[tool.normscope]\nignore = 'NRM4'", "must be a list of text"),
        ("[tool.normscope", "cannot be read"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, text, sentence):
    (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
    with pytest.raises((ArgumentError, DataError), match=sentence):
        configure(tmp_path / "pyproject.toml")


def test_the_pages_in_the_documentation_are_those_of_the_rules():
    script = Path(__file__).parents[1] / "scripts" / "rule_pages.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0, "run scripts/rule_pages.py"


def test_trials_end_with_the_budget(monkeypatch):
    _, report = doubly_ill()
    monkeypatch.setattr("normscope.doctor.probe.Probe._has_time", lambda self: False)
    notes = check(report.model, list(batches(24))).record.notes
    assert "some trials of single suspicions were left out: the budget is spent" in notes


# --- new remedies -----------------------------------------------------------------------------------------------------


def layered():
    torch.manual_seed(0)
    conv, bn, inst = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, eps=1e-3), nn.InstanceNorm1d(4, track_running_stats=True)
    model = nn.Sequential(conv, bn, nn.ReLU(), inst, nn.Flatten(), nn.Linear(24, 2))
    for _ in range(3):
        model(torch.randn(16, 3, 8))
    return model.eval()


@pytest.mark.parametrize(
    ("code", "layer", "done"),
    [
        ("lower-momentum", "1", lambda m: m[1].momentum == 0.01),
        ("own-statistics", "3", lambda m: m[3].running_mean is None and not m[3].track_running_stats),
        ("absorb-bias", "1", lambda m: not m[0].bias.any()),
        ("float32", "1", lambda m: m[1].weight.dtype == torch.float32),
        ("float32-recal", "1", lambda m: int(m[1].num_batches_tracked) == 4),
        ("default-eps", "1", lambda m: m[1].eps == 1e-5),
    ],
)
def test_a_remedy_does_what_it_says_survives_a_checkpoint_and_is_undone(code, layer, done, tmp_path):
    model, batches_of_a = layered(), [torch.randn(16, 3, 8) for _ in range(4)]
    ill, x, spec = state_hash(model), torch.randn(5, 3, 8), REMEDIES[code]
    before = model(x)
    assert not done(model) or code == "float32"
    surgery = spec.operation(Case(model, (layer,), batches_of_a, None, None, "population"))
    assert surgery.changed
    assert done(model)
    if spec.safety == "S0":
        torch.testing.assert_close(model(x), before)
    treatment = Treatment("NRM999", spec.record("NRM999"), (layer,), None, "kept")
    save(model, FixRecord((treatment,), (), None, None, None, False, 0.0), tmp_path / "fixed.pt")
    again = load(layered, tmp_path / "fixed.pt")
    assert done(again)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    surgery.undo()
    assert state_hash(model) == ill


def test_every_operation_can_be_done_again_from_a_checkpoint():
    applied = {code for code, spec in REMEDIES.items() if spec.operation is not None}
    assert applied == set(checkpoint._REPLAY) | set(checkpoint._STORED)
