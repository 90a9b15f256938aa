"""The engine of the doctor: it harms nothing, it is deterministic, its gates and rules judge as stated."""

import copy
import dataclasses
import itertools
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normscope import records
from normscope.doctor import (
    RULES,
    Thresholds,
    UnhealthyError,
    assert_healthy,
    check,
    gates,
    known_intents,
    rule_pages,
)
from normscope.doctor import cache as caches
from normscope.doctor.attribution import Coalitions, search, together
from normscope.doctor.checkpoint import load, save
from normscope.doctor.guard import bring_back
from normscope.doctor.judge import findings_of, verdicts_of
from normscope.doctor.measurements import (
    Dependence,
    Drift,
    Effect,
    FunctionalCall,
    Layer,
    Measurements,
    Moments,
    Mutation,
    Outcome,
    Reference,
    RoundTrip,
    Site,
    Steps,
)
from normscope.doctor.remedies import REMEDIES
from normscope.doctor.rules.base import Judgement, Rule, rule
from normscope.errors import ArgumentError, DataError
from normscope.records import CheckRecord, Interval
from normscope.surgery import freeze, recalibrate, state_hash

T = Thresholds()
HARM = Effect(Interval(5.0, 4.0, 6.0, "pp"), None, "E")
GAP = Effect(Interval(21.7, 15.0, 29.0, "pp"), None, "E", 21.7)
NO_HARM = Effect(Interval(0.0, -0.1, 0.1, "pp"), None, "I")


# --- a small patient --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.one, self.bn1 = nn.Linear(6, width), nn.BatchNorm1d(width)
        self.two, self.bn2 = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.one(x)))
        return self.head(self.drop(torch.relu(self.bn2(self.two(x)))))


CENTRES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) * 2


def batches(count=12, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = torch.randint(0, 3, (size,), generator=generator)
        yield CENTRES[y] + torch.randn(size, 6, generator=generator), y


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Net(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(120, 64, seed=5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def stale(trained):
    model = copy.deepcopy(trained)
    model.bn2.running_mean += 2 * model.bn2.running_var.sqrt()
    return model


def per_sample(output, batch):
    return F.cross_entropy(output, batch[1], reduction="none")


def hits(output, batch):
    return (output.argmax(1) == batch[1]).float()


# --- the first law ----------------------------------------------------------------------------------------------------


class Fault:
    """Raises at one call of any of the user's functions, counted together."""

    def __init__(self, error, at):
        self.error, self.at, self.count = error, at, 0

    def __call__(self, function):
        def wrapped(*args):
            self.tick()
            return function(*args)

        return wrapped

    def tick(self):
        self.count += 1
        if self.count == self.at:
            raise self.error("injected")

    def loader(self):
        for batch in batches(6, 8):
            self.tick()
            yield batch


def patient_with_everything():
    torch.manual_seed(3)
    model = Net()
    model.one.weight.requires_grad_(False)
    model.one.bias.requires_grad_(False)
    model.bn1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    model.head.weight.register_hook(lambda grad: grad)
    F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 3).backward()
    model.bn2.eval()
    return model


def step(model, batch, optimizer):
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def examine(model, fault, reference):
    return check(
        model,
        fault.loader(),
        forward=fault(lambda m, batch: m(batch[0])),
        loss=fault(per_sample),
        metric=fault(hits),
        train_step=fault(step),
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9),
        evaluate=fault(lambda m: m.train()(torch.randn(4, 6))),
        predict=fault(lambda m, x: m.train()(x)),
        roundtrip=fault(copy.deepcopy),
        reference=reference,
        budget=20,
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_is_injected_at_any_call_leaves_the_model_bit_identical(error):
    model, reference = patient_with_everything(), patient_with_everything()
    counter = Fault(error, 0)
    examine(model, counter, reference)
    assert counter.count > 40, "the faults below reach every phase"
    before, other = state_hash(model, rng=True), state_hash(reference)
    raised = 0
    for at in range(1, counter.count + 1):
        try:
            examine(model, Fault(error, at), reference)
        except KeyboardInterrupt:
            raised += 1
        except (RuntimeError, ArgumentError, DataError):
            raised += 1
        assert state_hash(model, rng=True) == before, f"call {at} of {counter.count}"
        assert state_hash(reference) == other
    assert raised == counter.count if error is KeyboardInterrupt else raised > 0


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no timer signals here")
def test_ctrl_c_at_any_moment_leaves_the_model_bit_identical():
    model, loader = patient_with_everything(), list(batches(6, 8))
    before = state_hash(model, rng=True)
    check(model, loader)
    start = time.monotonic()
    check(model, loader)
    length = time.monotonic() - start

    def press(*_):
        signal.raise_signal(signal.SIGINT)

    old, interrupted = signal.signal(signal.SIGALRM, press), 0
    try:
        for share in np.linspace(0.02, 1.1, 40):
            signal.setitimer(signal.ITIMER_REAL, share * length)
            try:
                check(model, loader)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert state_hash(model, rng=True) == before
            # Autograd is as it was, too: dropout off, which would draw random numbers.
            F.cross_entropy(copy.deepcopy(model).eval()(loader[0][0]), loader[0][1]).backward()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted > 10


def test_an_interrupt_during_the_restoration_does_not_stop_it():
    class Nervous:
        left, restored = 2, False

        def restore(self):
            self.left -= 1
            if self.left >= 0:
                raise KeyboardInterrupt
            self.restored = True

    first, second = Nervous(), Nervous()
    with pytest.raises(KeyboardInterrupt):
        bring_back(first, second)
    assert first.restored
    assert second.restored


def test_the_injection_above_would_be_seen():
    model = patient_with_everything()
    before = state_hash(model, rng=True)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 6))
    assert state_hash(model, rng=True) != before


def test_a_model_that_is_not_brought_back_is_an_error(monkeypatch, trained):
    from normscope.doctor import StateNotRestoredError
    from normscope.surgery import Snapshot

    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    with pytest.raises(StateNotRestoredError, match="NRM904"):
        check(copy.deepcopy(trained).train(), batches())


def test_the_loaders_generators_come_back(trained):
    generator = torch.Generator().manual_seed(4)
    x, y = next(batches(1, 64))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True, generator=generator)
    before = generator.get_state()
    check(trained, loader)
    assert torch.equal(generator.get_state(), before)


def test_a_forward_that_writes_into_its_input_changes_no_later_pass(trained):
    def forward(model, batch):
        batch[0].mul_(2.0)
        return model(batch[0] / 2)

    clean, written = check(trained, batches()), check(trained, batches(), forward=forward)
    assert clean.record.scores == written.record.scores


# --- the loader is read once ------------------------------------------------------------------------------------------


def test_a_generator_is_read_once_and_serves_everything(stale):
    report = check(stale, batches())
    assert report["NRM103"].status == "fail"
    assert report.fix().confirmed


def test_an_endless_loader_ends(trained):
    assert check(trained, itertools.cycle(list(batches(4))), budget=10).passed("W")


def test_the_cache_is_bounded_and_covers_what_was_read():
    loader = [(torch.full((64, 2), float(k)), torch.zeros(64)) for k in range(400)]
    kept = caches.read(loader, 60).batches
    assert len(kept) <= caches.MOST_BATCHES
    assert kept[0].index == 0
    assert kept[-1].index >= 390
    assert len({b.index - a.index for a, b in itertools.pairwise(kept)}) == 1, "evenly spread"
    assert all(float(batch.data[0][0, 0]) == batch.index for batch in kept)


def test_heavy_batches_are_bounded_by_memory(monkeypatch):
    monkeypatch.setattr(caches, "MOST_BYTES", 10_000)
    kept = caches.read((torch.zeros(10, 100) for _ in range(50)), 60).batches
    assert sum(batch.bytes for batch in kept) <= 10_000 or len(kept) <= caches.FEWEST


def test_splits_are_disjoint_complete_and_interleaved():
    cached = caches.read([torch.zeros(4, 2) for _ in range(31)], 60).batches
    splits = caches.split(cached, seed=0)
    places = [[batch.index for batch in part] for part in (splits.a, splits.b, splits.c)]
    assert sorted(itertools.chain(*places)) == list(range(31))
    assert all(max(abs(np.diff(part))) <= 5 for part in places)
    assert max(map(len, places)) - min(map(len, places)) <= 1


def test_the_budget_takes_fewer_samples_and_says_so(trained):
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained

        def forward(self, x):
            time.sleep(0.02)
            return self.net(x)

    start = time.monotonic()
    report = check(Slow().eval(), batches(96), budget=2)
    assert time.monotonic() - start < 3
    assert report.record.samples < 96 * 32
    assert any("budget" in note for note in report.record.notes)


@pytest.mark.parametrize(
    ("loader", "error", "sentence"),
    [
        ([], DataError, "the loader is empty"),
        (torch.zeros(4, 6), ArgumentError, "the loader must be an iterable of batches, but it is a Tensor"),
        (None, ArgumentError, "the loader must be an iterable of batches, but it is a NoneType"),
        ([torch.zeros(4, 5)], ArgumentError, "the model raised RuntimeError on the loader's first batch"),
        (["text"], ArgumentError, "the model raised ArgumentError on the loader's first batch"),
    ],
)
def test_bad_loaders_raise_with_a_cure(trained, loader, error, sentence):
    with pytest.raises(error, match="cure: ") as caught:
        check(trained, loader)
    assert str(caught.value).startswith(sentence)


def test_a_loader_that_raises_midway_is_used_as_far_as_it_goes(trained):
    def broken():
        yield from batches(8)
        raise OSError("disk")

    report = check(trained, broken())
    assert report["NRM103"].status == "pass"
    assert any("raised OSError after 8 batches" in note for note in report.record.notes)
    with pytest.raises(DataError, match="before it yielded a batch"):
        check(trained, (1 / 0 for _ in range(3)))


def test_batches_of_another_structure_or_that_fail_are_left_out_and_said_so(trained):
    odd = [batch if k != 4 else batch[0] for k, batch in enumerate(batches())]
    assert any("another structure" in note for note in check(trained, odd).record.notes)
    unfit = [batch if k not in (4, 5, 6) else (batch[0][:, :3], batch[1]) for k, batch in enumerate(batches())]
    report = check(trained, unfit)
    assert any("left out: 1, among them number" in note for note in report.record.notes)
    assert report["NRM103"].status == "pass"


def test_one_sample_and_one_batch_answer_what_they_can(trained):
    x, y = next(batches(1))
    one = check(trained, [(x[:1], y[:1])])
    assert one["NRM101"].status == "pass"
    assert {one[code].status for code in ("NRM103", "NRM201")} == {"could-not-check"}
    single = check(trained, [(x, y)])
    assert single["NRM902"].status == "needs-input"
    assert any("two are needed" in note for note in single.record.notes)


def test_a_last_batch_of_one_sample_does_not_stop_the_check(stale):
    report = check(stale, [*batches(), next(batches(1, 1))])
    assert report["NRM103"].status == "fail"


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(6, 3),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        lambda: torch.compile(Net(), backend="eager"),
        lambda: nn.DataParallel(Net()),
        lambda: nn.Sequential(nn.BatchNorm1d(6)),
    ],
)
def test_models_of_many_kinds_are_checked(build):
    report = check(build().eval(), batches())
    assert report.passed("E")
    assert not [v for v in report.verdicts if "raised" in v.reason]


def test_models_without_normalizers_are_said_to_have_none():
    report = check(nn.Linear(6, 3), batches())
    assert any("no normalizers" in note for note in report.record.notes)
    assert report["NRM103"].status == "not-applicable"


def test_a_half_precision_model_gets_a_cure_and_runs_with_it(trained):
    half = copy.deepcopy(trained).bfloat16()
    with pytest.raises(ArgumentError, match="half precision"):
        check(half, batches())
    assert check(half, batches(), forward=lambda m, b: m(b[0].bfloat16())).passed("E")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": 0}, "budget must be positive"),
        ({"loss": 3}, "loss must be callable"),
        ({"select": "NRM777"}, "select 'NRM777' matches no rule"),
        ({"intent": "sloppy"}, "intent 'sloppy' is unknown"),
        ({"optimizer": object()}, "without train_step the optimizer's groups are looked at, but it is a object"),
        ({"reference": {}}, "reference must be a torch.nn.Module"),
        ({"loss": lambda o, b: "x"}, r"loss\(output, batch\) returned a str"),
        ({"metric": lambda o, b: 1 / 0}, r"metric\(output, batch\) raised ZeroDivisionError"),
    ],
)
def test_wrong_arguments_raise_with_a_cure(trained, options, sentence):
    with pytest.raises(ArgumentError, match=sentence) as caught:
        check(trained, batches(), **options)
    assert "cure: " in str(caught.value)


# --- determinism and records ------------------------------------------------------------------------------------------


def test_two_checks_agree_whatever_the_global_seed(stale):
    loader = list(batches())
    torch.manual_seed(1)
    one = check(stale, loader).record
    torch.manual_seed(2)
    two = check(stale, loader).record
    same = {"seconds": 0.0, "passes": (), "before": ""}
    assert dataclasses.replace(one, **same) == dataclasses.replace(two, **same)


def test_the_record_survives_json(stale, tmp_path):
    report = check(stale, batches())
    report.to_json(tmp_path / "report.json")
    assert records.from_json(CheckRecord, (tmp_path / "report.json").read_text(encoding="utf-8")) == report.record


def test_the_page_is_written(stale, tmp_path):
    check(stale, batches()).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "NRM103" in page
    assert "bn2" in page


def test_the_record_has_the_channels_of_what_drifts_most():
    x = torch.randn(32, 6) * torch.arange(1.0, 7) + 5
    deep = nn.Sequential(nn.Linear(6, 100), *(nn.BatchNorm1d(100) for _ in range(8))).eval()
    for norm in (*deep[1:4], *deep[6:]):  # 4 and 5 get what has mean 0 and variance 1, as they expect
        norm.running_mean.normal_(std=2)
    found = {c.layer: c for c in check(deep, [(x,)] * 6).record.channels}
    assert set(found) == {"1", "2", "3", "6", "7", "8"}
    # All batches are the same: their moments are those of the data.
    with torch.no_grad():
        y = deep[0](x).double()
    norm, shown, mean = deep[1], found["1"], y.mean(0)
    assert (shown.total, len(shown.data_mean)) == (100, 64)
    order = [int((mean - value).abs().argmin()) for value in shown.data_mean]
    assert len(set(order)) == 64
    for values, true in (
        (shown.data_mean, mean),
        (shown.data_var, y.var(0, unbiased=False) + norm.eps),
        (shown.running_mean, norm.running_mean),
        (shown.running_var, norm.running_var + norm.eps),
    ):
        assert values == pytest.approx(true.double()[order].tolist(), rel=1e-4, abs=1e-6)  # five digits are kept
    # From the least drifted to the most.
    drift = (norm.running_mean - mean).abs() / (y.var(0, unbiased=False) + norm.eps).sqrt()
    drift += (norm.running_var + norm.eps).double().div(y.var(0, unbiased=False) + norm.eps).log().abs()
    assert [order[0], order[-1]] == [int(drift.argmin()), int(drift.argmax())]


def test_every_sample_takes_part_in_at_most_six_passes(trained):
    passes = [p for p in check(trained, batches()).record.passes if "P5" not in p.name]
    for part in "AB":
        assert sum(f"({part})" in p.name for p in passes) <= 6
    assert passes


def test_select_ignore_and_passed(stale):
    report = check(stale, batches(), select=["NRM1"], ignore="NRM103")
    assert {v.code for v in report.verdicts} == {c for c in RULES if c.startswith("NRM1")} - {"NRM103"}
    report = check(stale, batches())
    assert not report.passed()
    assert not report.passed("W")
    with pytest.raises(KeyError, match="did not run"):
        report["NRM000"]
    with pytest.raises(UnhealthyError, match="NRM103"):
        assert_healthy(stale, batches())
    assert issubclass(UnhealthyError, AssertionError)


def test_assert_healthy_returns_the_report(trained):
    assert assert_healthy(trained, batches()).passed()


# --- the main job -----------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.one, self.head = trained.one, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.batch_norm(self.one(x), None, None, training=True))


class Random(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.net = trained

    def forward(self, x):
        return self.net(F.dropout(x, 0.3, training=True))


def frozen_part(model):
    for part in (model.one, model.bn1, model.two, model.bn2):
        part.requires_grad_(False)
    return model.train()


def without_buffers(model):
    fresh = Net(16)
    fresh.load_state_dict(dict(model.named_parameters()), strict=False)
    return fresh.eval()


def bare(model):
    for norm in (model.bn1, model.bn2):
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return model


def changed(model, path, **attributes):
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)
    return model


def grown(model):
    with torch.no_grad():
        for weight in (model.one.weight, model.two.weight):
            weight.mul_(4)
    return model


def by_label():
    x, y = next(batches(1, 768))
    return list(zip(x[y.argsort()].split(64), y.sort().values.split(64), strict=True))


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def plain_step(model, batch, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def careful_step(model, batch, optimizer):
    model.bn1.eval()
    model.bn2.eval()
    plain_step(model, batch, optimizer)


BOTH = ("bn1", "bn2")
# name: (the model made from a trained one, options of check, code, status, layers)
CASES = {
    "one NaN": (lambda m: changed(m, "bn1", running_mean=torch.full((16,), torch.nan)), {}, "NRM101", "fail", ("bn1",)),
    "no buffers loaded": (without_buffers, {}, "NRM102", "fail", BOTH),
    "fresh": (lambda m: Net().eval(), {}, "NRM102", "pass", ()),
    "momentum": (lambda m: changed(m, "bn2", momentum=0.99), {}, "NRM106", "warn", ("bn2",)),
    "weights moved": (grown, {"reference": lambda m: m}, "NRM113", "fail", BOTH),
    "weights stayed": (lambda m: m, {"reference": lambda m: m}, "NRM113", "pass", ()),
    "average without buffers": (without_buffers, {"reference": lambda m: m}, "NRM602", "fail", BOTH),
    "its online model": (lambda m: m, {"reference": without_buffers}, "NRM602", "fail", BOTH),
    "no eval": (lambda m: m.train(), {"predict": lambda m, x: m(x)}, "NRM201", "warn", BOTH),
    "eval": (lambda m: m.train(), {"predict": lambda m, x: m.eval()(x)}, "NRM201", "pass", ()),
    "only dropout left on": (
        lambda m: m.train(), {"predict": lambda m, x: changed(m.eval(), "drop", training=True)(x)}, "NRM201", "pass", ()
    ),
    "functional": (Functional, {}, "NRM210", "warn", ("",)),
    "no statistics": (bare, {}, "NRM210", "warn", BOTH),
    "no statistics, dependent": (bare, {}, "NRM201", "fail", BOTH),
    "half frozen": (frozen_part, {}, "NRM203", "warn", BOTH),
    "half frozen, stepped": (frozen_part, {"train_step": plain_step, "optimizer": sgd}, "NRM203", "warn", BOTH),
    "frozen by the step": (frozen_part, {"train_step": careful_step, "optimizer": sgd}, "NRM203", "pass", ()),
    "frozen once": (lambda m: careful(frozen_part(m)), {}, "NRM204", "warn", BOTH),
    "frozen once, stepped": (
        lambda m: careful(frozen_part(m)), {"train_step": step, "optimizer": sgd}, "NRM204", "warn", BOTH
    ),
    "frozen in every step": (
        lambda m: careful(frozen_part(m)), {"train_step": careful_step, "optimizer": sgd}, "NRM204", "pass", ()
    ),
    "frozen for good": (lambda m: freeze(frozen_part(m)).model, {}, "NRM204", "pass", ()),
    "flag": (lambda m: changed(m, "bn2", track_running_stats=False), {}, "NRM205", "fail", ("bn2",)),
    "evaluates in training mode": (
        lambda m: m.train(), {"evaluate": lambda m: m(torch.randn(9, 6))}, "NRM208", "fail", BOTH
    ),
    "evaluates": (lambda m: m.train(), {"evaluate": lambda m: m.eval()(torch.randn(9, 6))}, "NRM208", "pass", ()),
    "parameters saved": (lambda m: m, {"roundtrip": without_buffers}, "NRM607", "fail", BOTH),
    "all saved": (lambda m: m, {"roundtrip": copy.deepcopy}, "NRM607", "pass", ()),
    "rest of one": (lambda m: m.train(), {"loader": [*batches(), next(batches(1, 1))]}, "NRM301", "fail", BOTH),
    "batches of two": (lambda m: m.train(), {"loader": list(batches(120, 2))}, "NRM302", "fail", BOTH),
    "sorted": (lambda m: m.train(), {"loader": by_label()}, "NRM304", "fail", BOTH),
    "sorted, evaluated": (lambda m: m, {"loader": by_label()}, "NRM304", "info", BOTH),
    "unused layer": (lambda m: m.add_module("extra", nn.BatchNorm1d(3)) or m, {}, "NRM901", "info", ("extra",)),
    "random": (Random, {}, "NRM903", "warn", ()),
}  # fmt: skip


def careful(model):
    model.bn1.eval()
    model.bn2.eval()
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_defect_is_measured_and_judged(trained, name):
    build, options, code, status, layers = CASES[name]
    torch.manual_seed(0)
    model, options = build(copy.deepcopy(trained)), dict(options)
    loader = options.pop("loader", None) or list(batches(24))
    if "reference" in options:
        options["reference"] = options["reference"](copy.deepcopy(trained))
    if "optimizer" in options:
        options["optimizer"] = options["optimizer"](model)
    before = state_hash(model, rng=True)
    report = check(model, loader, **options)
    assert state_hash(model, rng=True) == before
    assert report[code].status == status, report[code].reason
    assert set(report[code].layers) == set(layers)
    assert not [v for v in report.verdicts if v.reason.startswith("the rule raised")]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("one NaN", "recal"),
        ("no buffers loaded", "recal"),
        ("average without buffers", "copy-buffers"),
        ("weights moved", "recal"),
        ("no statistics", "give-statistics"),
        ("half frozen", "freeze"),
        ("frozen once", "freeze"),
        ("flag", "track-flag"),
        ("momentum", "momentum"),
    ],
)
def test_its_remedy_cures_it_and_undo_takes_it_back(trained, name, remedy):
    build, options, code, _, _ = CASES[name]
    model = build(copy.deepcopy(trained))
    reference = options["reference"](copy.deepcopy(trained)) if "reference" in options else None
    before = state_hash(model)
    report = check(model, batches(24), reference=reference)
    fix = report.fix()
    assert remedy in [t.remedy.code for t in fix.applied]
    assert fix.confirmed
    cured = check(fix.model, batches(24, seed=9), reference=reference)
    assert cured[code].status in ("pass", "info", "not-applicable"), cured[code].reason
    assert cured.passed("W")
    fix.undo()
    assert state_hash(model) == before


def test_stale_statistics_are_found_priced_repaired_and_confirmed(stale, trained):
    loader = list(batches(30))
    report = check(stale, loader)
    finding = report.findings[0]
    assert (finding.code, finding.severity, finding.layers) == ("NRM103", "E", ("bn2",))
    assert finding.cost.unit == "pp"
    assert finding.cost.low > 1
    assert finding.explains > 0.9
    before = state_hash(stale)
    fix = report.fix()
    assert fix.confirmed
    assert fix.model is stale
    assert [t.remedy.code for t in fix.applied] == ["recal"]
    assert fix.gain.value > 0.9 * finding.cost.value
    assert fix.after.value > fix.before.value
    assert state_hash(stale) != before
    assert fix.undo() is stale
    assert state_hash(stale) == before


def test_a_healthy_model_is_not_improved(trained):
    model = copy.deepcopy(trained)
    before = state_hash(model)
    fix = check(model, batches(30)).fix()
    assert not fix.applied
    assert not fix.confirmed
    assert state_hash(model) == before


def test_a_remedy_without_gain_on_b_is_taken_back(stale):
    report = check(stale, batches(30))
    # Scored by something that recalibration cannot improve.
    report._ward.patient.loss = report._ward.patient.metric = None
    report._ward.patient.metric = lambda output, batch: torch.zeros(len(output))
    before = state_hash(stale)
    fix = report.fix()
    assert not fix.applied
    assert not fix.confirmed
    assert [t.outcome for t in fix.skipped] == ["split B shows no gain"]
    assert state_hash(stale) == before


def test_a_gain_that_split_c_contradicts_is_taken_back(stale):
    report = check(stale, batches(30))
    splits = report._ward.splits
    foul = [(batch.data[0], (report.model(batch.data[0]).argmax(1))) for batch in splits.c]
    worse = tuple(dataclasses.replace(b, data=data) for b, data in zip(splits.c, foul, strict=True))
    ward = dataclasses.replace(report._ward, splits=dataclasses.replace(splits, c=worse))
    before = state_hash(stale)
    fix = dataclasses.replace(report, _ward=ward).fix()
    assert not fix.applied
    assert not fix.confirmed
    assert fix.skipped[-1].outcome == "split C contradicts what split B showed"
    assert state_hash(stale) == before


@pytest.mark.parametrize("at", range(1, 30, 3))
def test_an_interrupted_fix_leaves_the_model_as_it_was(stale, at):
    fault = Fault(KeyboardInterrupt, 0)
    report = check(stale, batches(), forward=fault(lambda m, batch: m(batch[0])))
    fault.count, fault.at = 0, at
    before = state_hash(stale, rng=True)
    try:
        report.fix()
    except KeyboardInterrupt:
        assert state_hash(stale, rng=True) == before
    else:
        assert at > 12, "a fix has fewer calls than that"


def test_the_search_for_layers_ends_with_the_budget(stale, monkeypatch):
    monkeypatch.setattr("normscope.doctor.probe.ATTRIBUTION_ENDS", 0.0)
    report = check(stale, batches())
    assert any("search for the layers" in note for note in report.record.notes)
    assert report.findings[0].explains is None


class Slow(nn.Module):
    """A forward takes 8 ms per sample, by a clock of its own."""

    now = 0.0

    def __init__(self):
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        Slow.now += 0.008 * len(x)
        return self.head(self.bn(x))


@pytest.mark.parametrize("size", [32, 128, 192])
def test_a_check_ends_with_the_budget_and_a_quarter_and_says_what_it_left_out(size, monkeypatch):
    monkeypatch.setattr(Slow, "now", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: Slow.now)
    loader, budget = list(batches(12, size)), 5
    report = check(Slow().eval(), loader, reference=Slow(), deployment=loader, budget=budget)
    assert Slow.now < 1.25 * budget
    notes = " / ".join(report.record.notes)
    assert "samples; a larger one sees smaller effects" in notes
    assert ("batches were cut to" in notes) == (size > 32)
    assert ("the deployment loader was left out" in notes) == (size > 32)
    assert "was left out: the budget is spent" in notes
    if size > 32:
        assert report["NRM302"].status == "could-not-check"


def coalitions(*worth):
    """A game of four layers, of which these sets are worth everything, and all that contain them."""
    winning = [frozenset(some) for some in worth]
    return Coalitions(lambda layers: float(any(some <= layers for some in winning)), frozenset("abcd"), 0.0, 1.0)


@pytest.mark.parametrize(
    ("game", "shares"),
    [
        (coalitions("a"), {"a": 1.0}),
        (coalitions("b"), {"a": 0.0, "b": 1.0}),
        (coalitions("ab"), {"a": 0.5, "b": 0.5}),
        (coalitions("a", "b"), {"a": 0.5, "b": 0.5}),
        (coalitions("bc"), {"a": 0.0, "b": 0.5, "c": 0.5}),
        (coalitions("a", "c"), {"a": 0.5, "b": 0.0, "c": 0.5}),
        (coalitions("abcd"), {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}),
    ],
    ids=["one", "the second", "both or nothing", "either", "both, later", "either, later", "all or nothing"],
)
def test_the_search_blames_layers_by_what_they_give_back_and_by_what_is_missing_without_them(game, shares):
    assert search(game, "abcd", 0.9, lambda _: True) == shares
    assert together(game.shares, shares) == 1.0


def test_the_search_stops_when_time_is_up():
    assert search(coalitions("ab"), "abcd", 0.9, lambda k: k < 1) == {"a": 0.5}


def test_a_joint_share_is_that_of_the_best_measured_part():
    known = {frozenset(): 0.0, frozenset("a"): 0.3, frozenset("ab"): 0.8, frozenset("c"): 1.2, frozenset("d"): -0.1}
    assert together(known, "ab") == 0.8
    assert together(known, "axy") == 0.3
    assert together(known, "bcd") == 1.0
    assert together(known, "d") == 0.0
    assert together(known, "x") is None


class Twins(nn.Module):
    """Two networks that know the same; the one that is surer decides."""

    def __init__(self, trained):
        super().__init__()
        self.left, self.right = copy.deepcopy(trained), copy.deepcopy(trained)

    def forward(self, x):
        return torch.maximum(self.left(x).log_softmax(1), self.right(x).log_softmax(1))


@pytest.mark.parametrize(
    ("build", "damaged", "suffices"),
    [(Twins, ("left.bn2", "right.bn2"), True), (copy.deepcopy, ("bn1", "bn2"), False)],
    ids=["either suffices", "either spoils everything"],
)
def test_two_damaged_layers_that_stand_in_for_each_other_are_both_blamed(trained, build, damaged, suffices):
    model = build(trained).eval()
    for name in damaged:
        model.get_submodule(name).running_mean += 1e3  # nothing gets through the ReLU behind it
    report = check(model, list(batches(30)))
    shares, known = report.measurements.shares, report.measurements.coalitions
    assert {name: share for name, share in shares.items() if share > 0.1} == pytest.approx(
        dict.fromkeys(damaged, 0.5), abs=0.1
    )
    finding = report.findings[0]
    assert set(finding.layers) == set(damaged)
    assert finding.explains > 0.9
    alone = [known[frozenset([name])] for name in damaged]
    assert alone == pytest.approx([1.0, 1.0] if suffices else [0.0, 0.0], abs=0.1)


def test_progress_counts_passes_layers_and_batches(stale):
    told = []
    report = check(stale, list(batches(30)), progress=lambda *now: told.append(now))
    counted = [(done, total) for done, total, _ in told]
    assert all(done <= total or total == 0 for done, total in counted)
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    assert counted[-1][0] == sum(p.batches for p in report.record.passes)
    names = [what for _, _, what in told]
    assert "reading the loader" in names
    assert "pass 2 of 5: P4 batch statistics (A)" in names
    assert any("layer 1 of 1" in name for name in names)
    told.clear()
    report.fix(progress=lambda *now: told.append(now))
    assert told[-1] == (30 + 10, 30 + 10, "pass 4 of 4: after (C)")
    assert "recal for NRM103" in [what for _, _, what in told]


def test_time_folded_into_the_batch_is_no_grouping_by_the_loader():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            n, steps, c = x.shape
            return self.head(self.bn(x.reshape(n * steps, c)).reshape(n, steps, c).mean(1))

    generator = torch.Generator().manual_seed(0)
    loader = [
        torch.randn(16, 1, 6, generator=generator) + 0.1 * torch.randn(16, 10, 6, generator=generator)
        for _ in range(30)
    ]
    assert check(Folded().train(), loader)["NRM304"].status == "pass"


def test_scores_are_inferred_for_classification_only_and_said_so(trained):
    report = check(trained, batches())
    assert any("inferred" in note for note in report.record.notes)
    plain = check(trained, [x for x, _ in batches()])
    assert plain.record.scores == ()
    assert plain.record.cost is None
    assert any("no cost could be measured" in note for note in plain.record.notes)


def test_without_a_score_a_wrong_state_is_a_warning(stale):
    report = check(stale, [x for x, _ in batches()])
    assert report["NRM103"].status == "warn"
    fix = report.fix()
    assert not fix.applied
    assert "cannot be verified" in fix.skipped[0].outcome


def test_a_declared_intent_keeps_its_numbers(stale):
    verdict = check(stale, batches(), intent="tta-bn/adabn")["NRM103"]
    assert verdict.status == "intentional"
    assert verdict.cost is not None
    assert verdict.cost.value > 1
    assert not check(stale, batches(), intent=("supernet",), select="NRM103").findings


# --- gates ------------------------------------------------------------------------------------------------------------


def moments(k=20, c=10, n=32, mean=0.0, var=1.0, spread=None, seed=0):
    """Of batches of n values, as independent samples give them."""
    rng = np.random.default_rng(seed)
    spread = np.sqrt(var / n) if spread is None else spread
    return Moments(
        np.full(k, float(n)), mean + spread * rng.standard_normal((k, c)), var * rng.chisquare(n - 1, (k, c)) / n
    )


def layer(name="bn", c=10, mean=0.0, var=1.0, **options):
    options = {"kind": "BatchNorm", "seen": 1000, "bias": np.ones(c), "weight": np.ones(c), **options}
    return Layer(name, mean=np.full(c, mean), var=np.full(c, var), **options)


def test_gate_1_passes_healthy_averages_and_stops_at_shifted_ones():
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        healthy = dataclasses.replace(layer(c=50), mean=0.06 * rng.standard_normal(50))
        alarms += gates.drifts((healthy,), {"bn": moments(c=50, seed=seed)}, T, 0)["bn"].beyond
    assert alarms == 0
    shifted = dataclasses.replace(layer(c=50), mean=np.full(50, 0.5))
    assert gates.drifts((shifted,), {"bn": moments(c=50)}, T, 0)["bn"].beyond


def test_gate_1_does_not_alarm_where_the_batches_themselves_scatter_as_much():
    one_batch = layer(c=50, mean=0.5, momentum=0.9)
    found = gates.drifts((one_batch,), {"bn": moments(c=50, k=8, spread=1.0)}, T, 0)["bn"]
    assert found.share > T.drift_share
    assert not found.beyond


def test_gate_1_counts_all_layers():
    data = {f"bn{k}": moments(seed=k) for k in range(30)}
    layers = tuple(layer(f"bn{k}", mean=0.5 if k == 7 else 0.0) for k in range(30))
    assert [name for name, d in gates.drifts(layers, data, T, 0).items() if d.beyond] == ["bn7"]


def test_drift_ignores_channels_that_are_constant_in_both():
    dead = Moments(np.full(4, 8.0), np.zeros((4, 3)), np.zeros((4, 3)))
    drift = gates.drifts((layer(c=3, var=0.0),), {"bn": dead}, T, 0)["bn"]
    assert drift.share == 0
    assert np.isfinite(drift.delta).all()


def test_the_design_effect_tells_sorted_from_shuffled_batches():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(8), 32)
    x = rng.standard_normal((256, 12)) + 0.8 * rng.standard_normal((8, 12))[labels]
    groups = np.repeat(np.arange(8), 32)
    d, p = gates.design_effect({"bn": Moments(np.full(8, 32.0), np.zeros((8, 12)), np.ones((8, 12)), x, groups)}, T, 0)[
        "bn"
    ]
    assert d > T.design_error
    assert p < T.design_p
    mixed = x[rng.permutation(256)]
    d, p = gates.design_effect(
        {"bn": Moments(np.full(8, 32.0), np.zeros((8, 12)), np.ones((8, 12)), mixed, groups)}, T, 0
    )["bn"]
    assert 0.7 < d < T.design_warning


@pytest.mark.parametrize(("n", "low", "high"), [(4, 0.35, 0.6), (16, 0.08, 0.14), (64, 0.018, 0.032)])
def test_the_noise_energy_of_gaussian_batches_is_known(n, low, high):
    assert low < gates.noise_energy(moments(k=400, n=n), 1e-5) < high


def outcome(metric=None, loss=None):
    values = [v for v in (metric, loss) if v is not None]
    return Outcome(
        None if loss is None else np.asarray(loss, float),
        None if metric is None else np.asarray(metric, float),
        len(values[0]),
    )


def test_gate_3_grades_by_size_and_interval():
    rng = np.random.default_rng(0)
    good = (rng.random(4000) < 0.95).astype(float)
    bad = good * (rng.random(4000) < 0.97)
    assert gates.effect(outcome(bad), outcome(good), T).grade == "E"
    assert gates.effect(outcome(good), outcome(bad), T).grade == "I", "the other way round it is a gain"
    assert gates.effect(outcome(good), outcome(good), T).grade == "I"
    slightly = good * (rng.random(4000) < 0.994)
    assert gates.effect(outcome(slightly), outcome(good), T).grade == "W"
    few = gates.effect(outcome(bad[:20]), outcome(good[:20]), T)
    assert few.grade == "I"
    assert few.cost.low <= 0
    assert gates.effect(outcome(bad[:3]), outcome(good[:3]), T).grade is None


def test_gate_3_does_not_trust_a_handful_of_numbers():
    lost = np.array([0.1, 0.2, 0.9, 0.3, 0.8, 0.2])
    felt = gates.effect(outcome(1 - lost), outcome(np.ones(6)), T)
    assert felt.cost.low < 0
    assert felt.grade == "I"


def test_gate_3_without_a_metric_goes_by_the_share_of_the_loss():
    rng = np.random.default_rng(0)
    loss = rng.random(500)
    assert gates.effect(outcome(loss=loss * 1.2), outcome(loss=loss), T).grade == "E"
    assert gates.effect(outcome(loss=loss * 1.02), outcome(loss=loss), T).grade == "W"
    assert gates.effect(outcome(loss=loss * 1.001), outcome(loss=loss), T).grade == "I"


def test_gate_3_bears_losses_that_are_not_finite():
    loss = np.ones(50)
    found = gates.effect(outcome(loss=np.where(np.arange(50) < 25, np.nan, 2.0)), outcome(loss=loss), T)
    assert found.grade == "E"
    assert np.isfinite(found.cost.high)


def test_severity_needs_the_gates_that_are_stated():
    assert gates.severity(True, True, HARM) == "E"
    assert gates.severity(True, True, NO_HARM) == "I"
    assert gates.severity(True, True, Effect()) == "W"
    assert gates.severity(False, True, HARM) is None
    assert gates.severity(True, False, HARM) is None


GOOD, BAD = np.tile([1.0] * 19 + [0.0], 40), np.tile([1.0, 0.0], 400)


@pytest.mark.parametrize(
    ("evaluation", "batch", "recalibrated", "reading"),
    [
        (BAD, GOOD, GOOD, "stale, unconverged, polluted or were not copied"),
        (BAD, GOOD, BAD, "no single statistics fit"),
        (BAD, BAD, GOOD, "stale, and the batches too small"),
        (GOOD, BAD, GOOD, "too small or too ordered to evaluate on"),
        (GOOD, GOOD, GOOD, "healthy: running, batch and recalibrated statistics do equally well"),
        (GOOD, GOOD, BAD, "worse than the model's own"),
    ],
)
def test_the_decision_table(evaluation, batch, recalibrated, reading):
    states = {"eval": evaluation, "batch statistics": batch, "recalibrated": recalibrated}
    assert reading in gates.reading({name: outcome(v) for name, v in states.items()}, None, T)


def test_bad_everywhere_is_not_normalization():
    states = {name: outcome(BAD) for name in ("eval", "batch statistics", "recalibrated")}
    assert gates.reading(states, 0.6, T) == gates.NOT_NORMALIZATION
    assert "healthy" in gates.reading(states, 0.1, T)
    assert gates.reading({}, None, T) == ""


# --- rules on measurements made by hand -------------------------------------------------------------------------------


def drift(share=0.5, beyond=True, c=10):
    return Drift(np.full(c, 0.5), np.zeros(c), share, 0.0002, beyond)


def measured(*layers, **options):
    layers = layers or (layer(),)
    options = {"recalibrated": NO_HARM, "batch_size": 32, "traced_size": 32, **options}
    options.setdefault("sites", tuple(Site(x.name, 0, (32, 10), 32.0) for x in layers))
    return Measurements(layers=layers, **options)


def steps(moved, trained=("bn",)):
    return Steps(3, {"bn": moved}, trained, {"bn": 1.0})


def reference(**options):
    return Reference(**{"follows": 0.999, "matched": ("bn",), **options})


DESIGN = {"design": {"bn": (2.5, 0.002)}, "seen": {"bn": moments()}}
NOISY, LARGE = {"own": {"bn": moments(n=4)}}, {"own": {"bn": moments(n=256)}}
TRAINING = layer(training=True)
FROZEN = layer(training=True, learns=False, fed_frozen=True)
HELD = layer(training=False, learns=False, keeps_mode=False)
NAN = dataclasses.replace(layer(), mean=np.array([np.nan] * 10))
OTHER = layer("other", mean=0.3)

FIRES = [
    ("NRM101", measured(NAN, recalibrated=HARM), "fail"),
    ("NRM101", measured(layer(var=-1e-6)), "fail"),
    ("NRM102", measured(layer(seen=0), OTHER, recalibrated=HARM), "fail"),
    ("NRM102", measured(layer(seen=0), recalibrated=Effect()), "warn"),
    ("NRM103", measured(layer(mean=0.5), drift={"bn": drift()}, recalibrated=HARM), "fail"),
    ("NRM103", measured(layer(mean=0.5), drift={"bn": drift()}, recalibrated=Effect()), "warn"),
    ("NRM104", measured(layer(seen=300, momentum=0.001), drift={"bn": drift()}, recalibrated=HARM), "fail"),
    ("NRM104", measured(layer(seen=3000, momentum=0.001), drift={"bn": drift()}, recalibrated=HARM), "warn"),
    (
        "NRM104",
        measured(
            layer(mean=0.5, var=1.5, seen=300, momentum=0.001),
            own={"bn": moments(mean=2.0, var=3.0)},
            drift={"bn": drift()},
            recalibrated=HARM,
        ),
        "fail",
    ),
    ("NRM106", measured(layer(momentum=0.99), seen={"bn": moments(n=16)}), "warn"),
    ("NRM106", measured(layer(momentum=0.0, training=True)), "warn"),
    ("NRM106", measured(layer(momentum=-0.1)), "warn"),
    ("NRM113", measured(layer(mean=0.5), reference=reference(equal=("bn",)), recalibrated=HARM), "fail"),
    ("NRM113", measured(average="AveragedModel(use_buffers=False)", recalibrated=HARM), "fail"),
    ("NRM114", measured(drift={"bn": drift(0.03, False)}, recalibrated=GAP, shares={"bn": 0.9}), "fail"),
    ("NRM114", measured(batch=GAP, batch_shares={"bn": 0.9}), "fail"),
    ("NRM114", measured(TRAINING, **LARGE, small=GAP), "warn"),
    ("NRM201", measured(dependence=Dependence("predict", 0.4, 0.0, layers=("bn",)), predicted=HARM), "fail"),
    ("NRM201", measured(dependence=Dependence("predict", 0.4, 0.0, layers=("bn",))), "warn"),
    ("NRM201", measured(dependence=Dependence("predict", alone="Expected more", layers=("bn",))), "warn"),
    ("NRM203", measured(FROZEN), "warn"),
    ("NRM203", measured(FROZEN, steps=steps(0.2)), "warn"),
    ("NRM203", measured(FROZEN, drift={"bn": drift()}, recalibrated=HARM), "fail"),
    ("NRM204", measured(HELD, training=True), "warn"),
    ("NRM204", measured(HELD, training=True, steps=steps(0.1)), "warn"),
    ("NRM205", measured(layer(tracks=False)), "fail"),
    ("NRM208", measured(mutation=Mutation(("bn.running_mean",))), "fail"),
    ("NRM210", measured(Layer("bn", "BatchNorm", running=False)), "warn"),
    ("NRM210", measured(functional=(FunctionalCall("batch_norm", "block", True),)), "warn"),
    ("NRM301", measured(TRAINING, sites=(Site("bn", 0, (32, 10), 32.0),), batch_size=2), "fail"),
    ("NRM301", measured(TRAINING, batch_size=4), "warn"),
    ("NRM301", measured(TRAINING, loader=caches.LoaderFacts(samples=65, batch=32, drop_last=False)), "fail"),
    ("NRM302", measured(TRAINING, **NOISY, small=HARM), "fail"),
    ("NRM302", measured(TRAINING, **NOISY, small=Effect()), "warn"),
    ("NRM304", measured(TRAINING, **DESIGN, small=HARM), "fail"),
    ("NRM304", measured(TRAINING, **DESIGN, small=NO_HARM), "warn"),
    ("NRM304", measured(**DESIGN, drift={"bn": drift()}, recalibrated=HARM), "warn"),
    ("NRM304", measured(**DESIGN, batch=HARM), "fail"),
    ("NRM602", measured(reference=reference(initial=("bn",)), recalibrated=HARM), "fail"),
    ("NRM602", measured(reference=reference(initial_there=("bn",), theirs=HARM)), "fail"),
    ("NRM607", measured(roundtrip=RoundTrip(("bn",), 0.3)), "fail"),
    ("NRM901", measured(unreached=("bn",)), "info"),
    ("NRM902", measured(outcomes={"eval": outcome(GOOD), "recalibrated": outcome(GOOD)}, needed=9999), "info"),
    ("NRM903", measured(repeat=0.3), "warn"),
    ("NRM903", measured(repeat=1e-4), "info"),
]

SILENT = [
    ("NRM114", measured(drift={"bn": drift(0.03, False)}, recalibrated=HARM), "pass"),
    ("NRM114", measured(drift={"bn": drift()}, recalibrated=GAP), "pass"),
    ("NRM114", measured(layer(), **LARGE, small=GAP), "pass"),
    ("NRM114", measured(TRAINING, **NOISY, small=GAP), "pass"),
    ("NRM114", measured(TRAINING, **LARGE, small=Effect(Interval(0.2, 0.1, 0.3, "loss"), None, "E", 9.0)), "pass"),
    ("NRM114", measured(recalibrated=Effect(), score_problem="neither loss nor metric was passed"), "could-not-check"),
    ("NRM101", measured(layer(var=0.0)), "pass"),
    ("NRM101", measured(layer(var=1e6)), "pass"),
    ("NRM102", measured(layer(seen=0, bias=np.zeros(10))), "pass"),
    ("NRM102", measured(layer(held=True, seen=None)), "not-applicable"),
    ("NRM102", measured(layer(seen=0), OTHER, recalibrated=NO_HARM), "info"),
    ("NRM103", measured(drift={"bn": drift(0.05, False)}, recalibrated=HARM), "pass"),
    ("NRM103", measured(drift={"bn": drift(beyond=False)}, recalibrated=HARM), "pass"),
    ("NRM103", measured(layer(mean=0.5), drift={"bn": drift()}), "info"),
    ("NRM103", measured(layer(seen=0, bias=np.zeros(10)), drift={"bn": drift()}, recalibrated=Effect()), "pass"),
    ("NRM104", measured(layer(seen=300)), "pass"),
    ("NRM104", measured(layer(seen=300, momentum=0.001), drift={"bn": drift(0.0, False)}), "info"),
    ("NRM104", measured(layer(seen=300, momentum=None)), "not-applicable"),
    (
        "NRM104",  # the momentum was made smaller at the end: the statistics are the data's
        measured(layer(mean=2.0, var=3.0, seen=300, momentum=0.001), own={"bn": moments(mean=2.0, var=3.0)}),
        "pass",
    ),
    ("NRM106", measured(layer(momentum=None)), "pass"),
    ("NRM106", measured(layer(momentum=0.99), seen={"bn": moments(n=4096)}), "info"),
    ("NRM106", measured(layer(momentum=0.0, learns=False, training=True)), "not-applicable"),
    ("NRM113", measured(), "needs-input"),
    ("NRM113", measured(layer(mean=0.5), reference=reference(equal=("bn",)), recalibrated=NO_HARM), "info"),
    ("NRM113", measured(layer(mean=0.5), reference=reference(equal=("bn",), same_weights=True)), "pass"),
    ("NRM201", measured(dependence=Dependence("predict", 1e-6, layers=("bn",))), "pass"),
    ("NRM201", measured(dependence=Dependence("predict", 0.4, 0.3, layers=("bn",))), "pass"),
    ("NRM201", measured(dependence=Dependence("predict", 0.4)), "pass"),
    ("NRM201", measured(dependence=Dependence("predict", problem="no axis of samples")), "could-not-check"),
    ("NRM203", measured(layer(training=True, learns=True, fed_frozen=True)), "pass"),
    ("NRM203", measured(layer(training=False, learns=False, fed_frozen=True)), "pass"),
    ("NRM203", measured(layer(training=True, learns=False, fed_frozen=True, momentum=0.0)), "pass"),
    ("NRM203", measured(FROZEN, steps=steps(0.0)), "pass"),
    ("NRM203", measured(FROZEN, learns=False), "info"),
    ("NRM204", measured(dataclasses.replace(HELD, keeps_mode=True), training=True), "pass"),
    ("NRM204", measured(HELD, training=True, steps=steps(0.0, ())), "pass"),
    ("NRM204", measured(HELD, training=False), "info"),
    ("NRM204", measured(HELD, training=True, learns=False), "not-applicable"),
    ("NRM205", measured(layer()), "pass"),
    ("NRM208", measured(mutation=Mutation((), 3)), "pass"),
    ("NRM208", measured(), "needs-input"),
    ("NRM210", measured(functional=(FunctionalCall("batch_norm", "block", False),)), "pass"),
    ("NRM301", measured(layer(), batch_size=2), "not-applicable"),
    ("NRM301", measured(TRAINING, loader=caches.LoaderFacts(samples=65, batch=32, drop_last=True)), "pass"),
    ("NRM301", measured(TRAINING, sites=(Site("bn", 0, (32, 10, 32, 32), 32768.0),), batch_size=1), "pass"),
    ("NRM302", measured(TRAINING, **LARGE, small=HARM), "pass"),
    ("NRM302", measured(layer(), **NOISY, small=HARM), "info"),
    ("NRM302", measured(TRAINING, **NOISY, small=NO_HARM), "info"),
    ("NRM304", measured(TRAINING, design={"bn": (1.1, 0.2)}, seen={"bn": moments()}), "pass"),
    ("NRM304", measured(TRAINING, design={"bn": (1.5, 0.2)}, seen={"bn": moments()}), "pass"),
    ("NRM304", measured(**DESIGN), "info"),
    ("NRM602", measured(reference=reference(follows=0.5, initial=("bn",)), recalibrated=HARM), "pass"),
    ("NRM602", measured(reference=reference(), recalibrated=HARM), "pass"),
    ("NRM602", measured(), "needs-input"),
    ("NRM607", measured(roundtrip=RoundTrip()), "pass"),
    ("NRM901", measured(), "pass"),
    ("NRM902", measured(score_problem="neither loss nor metric was passed"), "needs-input"),
    ("NRM903", measured(repeat=1e-7), "pass"),
]


@pytest.mark.parametrize(("code", "m", "status"), FIRES, ids=[f"{c}-{s}-{k}" for k, (c, _, s) in enumerate(FIRES)])
def test_a_rule_fires(code, m, status):
    assert_fires(code, m, status)


def assert_fires(code, m, status):
    judgement = RULES[code].judge(m, T)
    assert judgement.status == status, judgement.reason
    assert judgement.remedies
    assert set(judgement.remedies) <= set(REMEDIES)
    assert judgement.facts


@pytest.mark.parametrize(("code", "m", "status"), SILENT, ids=[f"{c}-{s}-{k}" for k, (c, _, s) in enumerate(SILENT)])
def test_a_rule_is_silent_on_a_near_miss(code, m, status):
    judgement = RULES[code].judge(m, T)
    assert judgement.status == status, judgement.reason


def test_a_layer_that_went_on_learning_without_tracking_is_measured_again():
    kept, learnt = (measured(layer(tracks=False), drift={"bn": drift()}, recalibrated=x) for x in (NO_HARM, HARM))
    assert RULES["NRM205"].judge(kept, T).remedies == ("track-flag",)
    assert RULES["NRM205"].judge(learnt, T).remedies == ("track-again",)


def test_what_only_keeps_the_function_does_not_settle_what_its_finding_caused(trained):
    model = changed(copy.deepcopy(trained), "bn2", track_running_stats=False)
    model.bn2.running_mean += 2 * model.bn2.running_var.sqrt()
    fix = check(model, batches(24)).fix()
    assert fix.confirmed
    assert fix.model.bn2.track_running_stats
    assert check(fix.model, batches(24, seed=9)).passed("W")


def test_a_consequence_in_layers_that_its_causes_remedy_did_not_reach_is_treated_itself(trained):
    model = changed(copy.deepcopy(trained), "bn1", track_running_stats=False)
    for norm in (model.bn1, model.bn2):
        norm.running_mean += 2 * norm.running_var.sqrt()
    report = check(model, batches(30))
    assert {f.code: (f.layers, f.explained_by) for f in report.findings if f.severity == "E"} == {
        "NRM205": (("bn1",), ""),
        "NRM103": (report["NRM103"].layers, "NRM205"),
    }
    assert set(report["NRM103"].layers) == {"bn1", "bn2"}
    fix = report.fix()
    assert [(t.rule, t.remedy.code) for t in fix.applied] == [("NRM205", "track-again"), ("NRM103", "recal")]
    assert check(fix.model, batches(24, seed=9)).passed("W")


# --- remedies that change behaviour -----------------------------------------------------------------------------------


def test_freezing_for_small_batches_is_tried_only_when_asked_for(stale):
    report = check(stale.train(), list(batches(120, 6)))
    assert report.findings[0].code == "NRM302"
    safe = report.fix()
    assert ("freeze-norms", "changes behaviour; unsafe=True tries it") in [
        (t.remedy.code, t.outcome) for t in safe.skipped
    ]
    assert "S2" not in [t.remedy.safety for t in safe.applied]
    safe.undo()
    fix = report.fix(unsafe=True)
    assert [(t.rule, t.remedy.code, t.remedy.safety) for t in fix.applied] == [("NRM302", "freeze-norms", "S2")]
    assert fix.confirmed
    assert fix.gain.low > 0
    assert not fix.model.train().bn2.training


def test_a_remedy_that_changes_behaviour_and_gains_nothing_is_taken_back(trained):
    model = copy.deepcopy(trained).train()
    before = state_hash(model)
    report = check(model, list(batches(240, 2)))
    assert report["NRM302"].status == "fail"
    fix = report.fix(unsafe=True)
    tried = {t.remedy.code: t.outcome for t in fix.skipped}
    assert tried["freeze-norms"] == "split B shows no gain"
    assert tried["replace-norm"] == "one value per sample and channel"
    assert not fix.applied
    assert state_hash(model) == before


class OneByOne(nn.Module):
    """Its brightness and contrast differ so much from sample to sample that it was trained with one per batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(144, 3)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


def photos(count, size, seed):
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = torch.randint(3, (size,), generator=generator)
        x = patterns[y] + 0.7 * torch.randn(size, 1, 8, 8, generator=generator)
        contrast, brightness = torch.randn(2, size, 1, 1, 1, generator=generator)
        yield x * contrast.exp() + 6 * brightness, y


def test_a_model_trained_with_one_sample_per_batch_gets_instance_norm_when_asked_for(tmp_path):
    torch.manual_seed(0)
    model = OneByOne()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x, y in photos(60, 32, seed=1):
        optimizer.zero_grad()
        F.cross_entropy(torch.cat([model(one[None]) for one in x]), y).backward()
        optimizer.step()
    weights = dict(model.named_parameters())
    report = check(model.eval(), list(photos(150, 4, seed=9)))
    assert report["NRM210"].status == "warn"
    assert not report.fix().applied, "statistics of all samples do worse than those of four"
    fix = report.fix(unsafe=True)
    assert [t.remedy.code for t in fix.applied] == ["replace-norm"]
    assert fix.confirmed
    assert type(model.bn) is nn.InstanceNorm2d
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    assert check(model, list(photos(60, 8, seed=10))).passed("W")
    save(model, fix.record, tmp_path / "fixed.pt")
    x, again = next(photos(1, 5, seed=11))[0], load(lambda: OneByOne().eval(), tmp_path / "fixed.pt")
    assert torch.equal(again(x), model(x))
    fix.undo()
    assert type(model.bn) is nn.BatchNorm2d


def test_every_page_has_the_eight_headings():
    headings = [
        "What it measures", "Why it hurts", "Threshold", "Evidence", "Fixes", "Intentional when",
        "Known false alarms", "Fixture",
    ]  # fmt: skip
    for code, page in rule_pages().items():
        assert page.startswith(f"{code} {RULES[code].name}\n")
        assert [h for h in headings if f"\n{h}: " in page] == headings, code
        for remedy in REMEDIES:
            assert f"{remedy} [" not in page or f"{remedy} [{REMEDIES[remedy].safety}]" in page, (code, remedy)


def test_statistics_measured_again_hold_no_initial_values(trained):
    """40 batches at momentum 0.1 would leave 1.5 % of them, of which the count alone knows nothing."""
    for seed in range(5):
        model = copy.deepcopy(trained)
        recalibrate(model, batches(40, 64, seed=100 + seed), progress=False)
        assert int(model.bn1.num_batches_tracked) == 40
        assert check(model, batches(30, 64))["NRM104"].status == "pass"


def test_averages_of_few_batches_hold_initial_values(trained):
    model = copy.deepcopy(trained).train()
    for norm in (model.bn1, model.bn2):
        norm.reset_running_stats()
    with torch.no_grad():
        for x, _ in batches(20, 64, seed=100):
            model(x)
    verdict = check(model.eval(), batches(30, 64))["NRM104"]
    assert (verdict.status, set(verdict.layers)) == ("info", {"bn1", "bn2"})
    assert verdict.evidence["residual"] == pytest.approx(0.9**20)


def test_forbidden_remedies_are_not_offered():
    texts = " ".join(f"{spec.text} {spec.command}".lower() for spec in REMEDIES.values())
    assert "evaluate in train" not in texts
    assert "skip the norm" not in texts
    assert {spec.safety for spec in REMEDIES.values() if spec.operation} <= {"S0", "S1", "S2"}
    assert all((spec.operation is None) == (spec.safety == "S3") for spec in REMEDIES.values())


# --- cause before symptom ---------------------------------------------------------------------------------------------


def test_a_symptom_follows_its_cause():
    m = measured(layer(mean=0.5, seen=300, momentum=0.001), drift={"bn": drift()}, recalibrated=HARM)
    run = [RULES["NRM103"], RULES["NRM104"], RULES["NRM901"]]
    found = findings_of(verdicts_of(m, run, (), T), m)
    assert [(f.code, f.explained_by) for f in found] == [("NRM104", ""), ("NRM103", "NRM104")]


def test_a_cause_elsewhere_explains_nothing():
    m = measured(
        layer("a", mean=0.5), layer("b", momentum=0.001, seen=10), drift={"a": drift(), "b": drift()}, recalibrated=HARM
    )
    alone = [
        (RULES["NRM104"], Judgement("fail", "", ("b",))),
        (RULES["NRM103"], Judgement("fail", "", ("a", "c", "d"))),
    ]
    assert {f.explained_by for f in findings_of(alone, m)} == {""}


def test_a_rule_that_raises_takes_no_other_with_it():
    def broken(m, t):
        raise ZeroDivisionError("oh")

    run = [Rule("NRM999", "broken", broken), RULES["NRM901"]]
    first, second = (j for _, j in verdicts_of(measured(), run, (), T))
    assert (first.status, second.status) == ("could-not-check", "pass")
    assert "ZeroDivisionError" in first.reason


def test_codes_are_never_used_twice():
    with pytest.raises(ArgumentError, match="registered twice"):
        rule("NRM103", "another")
    with pytest.raises(ArgumentError, match="no rule code"):
        rule("N103", "another")


def test_every_threshold_has_a_reason():
    table = T.table()
    assert len(table) == len(dataclasses.fields(T))
    assert all(len(row.reason) > 20 for row in table)


INTENTS = sorted((code, intent) for code, rule in RULES.items() for intent in rule.intents)


FIRST_INTENTS = [(code, intent) for code, intent in INTENTS if code in {fired for fired, _, _ in FIRES}]


@pytest.mark.parametrize(("code", "intent"), FIRST_INTENTS, ids=[f"{c}-{i}" for c, i in FIRST_INTENTS])
def test_an_intent_turns_the_alarms_of_its_rules_into_intentions(code, intent):
    for m in (m for fired, m, status in FIRES if fired == code and status in ("fail", "warn")):
        ((_, judgement),) = verdicts_of(m, [RULES[code]], (intent,), T)
        assert judgement.status == "intentional"
        assert judgement.facts
    assert f"`{intent}`" in RULES[code].page.partition("Intentional when: ")[2].partition("Known false")[0]


def test_an_intent_that_no_rule_reads_is_refused(trained):
    assert set(known_intents()) == {intent for _, intent in INTENTS} | {use for r in RULES.values() for use in r.uses}
    with pytest.raises(ArgumentError, match="bn-frozen-throughout, caffe-folded-frozenbn") as caught:
        check(trained, batches(), intent="zero-init-residual")
    assert str(caught.value).startswith("intent 'zero-init-residual' is unknown")


@pytest.mark.parametrize(("seconds", "budget", "few"), [(0.0, 60, 8), (0.01, 2, 2)])
def test_questions_to_a_few_samples_take_fewer_where_forwards_are_slow(seconds, budget, few):
    """Sixteen forwards of 8 samples at 10 ms each would be most of 2 s."""
    sizes = []

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            sizes.append(len(x))
            time.sleep(seconds * len(x))
            return self.norm(x)

    check(Slow().eval(), [torch.randn(16, 6) for _ in range(6)], budget=budget)
    asked = [size for size in sizes if size < 16]
    assert max(asked[:4]) == few
