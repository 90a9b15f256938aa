"""The self-test: defects in a copy, the smallest that is seen, the untouched copy as the control."""

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normscope as ns
from normscope import cli, records
from normscope.doctor import defects, examination, gates, probe, sensitivity
from normscope.doctor.defects import DEFECTS
from normscope.doctor.measurements import Effect
from normscope.doctor.patient import Patient
from normscope.doctor.rules import base
from normscope.errors import ArgumentError, DataError
from normscope.records import Interval, SelfTest
from normscope.surgery import state_hash

CENTRES = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.bn1 = nn.Linear(6, 16), nn.BatchNorm1d(16)
        self.two, self.bn2 = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.one(x)))
        return self.head(torch.relu(self.bn2(self.two(x))))


def batches(count=12, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        y = torch.randint(0, 4, (size,), generator=generator)
        made.append((CENTRES[y] + 1.5 * torch.randn(size, 6, generator=generator), y))
    return made


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for x, y in batches(60, seed=1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    ns.recalibrate(net, batches(seed=2), progress=False)
    return net.eval()


@pytest.fixture(scope="module")
def whole(trained):
    return ns.selftest(trained, batches())


# --- what it says -------------------------------------------------------------------------------------------------


def test_every_defect_is_seen_in_a_sound_model(whole):
    assert whole.passed
    status = {s.defect: s.status for s in whole.record.sensitivities}
    assert {name for name in status if status[name] != "seen"} <= FREE
    assert set(status.values()) <= {"seen", "no-cost"}
    assert list(status) == [d.name for d in DEFECTS]
    assert not [f for f in whole.record.control if f.severity != "I"]
    assert whole.record.settled
    assert whole.record.layer == "bn2"  # the middle of two is the second


def test_what_was_missed_is_the_next_smaller_size(whole):
    for found in (s for s in whole.record.sensitivities if s.status == "seen"):
        sizes = [trial.size for trial in found.trials]
        assert found.seen in found.trials
        assert found.seen.severity is not None
        assert set(found.seen.codes) & set(found.rules)
        if found.missed is not None:
            assert found.missed.severity is None
            between = [
                s
                for s in sizes
                if min(found.seen.size, found.missed.size) < s < max(found.seen.size, found.missed.size)
            ]
            assert not between


def test_the_shift_that_is_seen_is_worth_a_threshold(whole):
    """By construction 0.25 σ in a tenth of the channels is the least that NRM103 calls a drift."""
    found = whole["shifted-mean"]
    assert 0.2 < found.seen.size < 1.0
    assert found.missed.size < found.seen.size


def test_a_size_that_is_seen_is_seen_by_a_check_of_ones_own(trained, whole):
    """The oracle: the same defect made by hand, without the self-test."""
    size = whole["shifted-mean"].seen.size
    for sigmas, expected in ((size, True), (whole["shifted-mean"].missed.size, False)):
        twin = copy.deepcopy(trained)
        twin.bn2.running_mean += sigmas * twin.bn2.running_var.sqrt()
        report = ns.check(twin, batches())
        assert any(f.code == "NRM103" and f.severity in "EW" for f in report.findings) == expected


def test_the_model_and_the_generators_stay_bit_for_bit(trained):
    before = state_hash(trained, rng=True)
    ns.selftest(trained, batches(), defects=["half-frozen", "changed-weights", "small-batches"])
    assert state_hash(trained, rng=True) == before


def test_a_defect_that_is_there_already_is_masked(trained):
    ill = copy.deepcopy(trained)
    ill.bn2.running_mean += 2 * ill.bn2.running_var.sqrt()
    report = ns.selftest(ill, batches(), defects=["shifted-mean", "non-finite"])
    assert report["shifted-mean"].status == "masked"
    assert "NRM103" in report["shifted-mean"].reason
    assert not report["shifted-mean"].trials
    assert report["non-finite"].status == "seen"


def test_another_layer_may_be_named(trained):
    report = ns.selftest(trained, batches(), defects="shifted-mean", layer="bn1")
    assert report["shifted-mean"].layers == ("bn1",)
    assert report["shifted-mean"].seen is not None


def test_a_rule_that_does_not_run_sees_nothing(trained):
    report = ns.selftest(trained, batches(), defects=["shifted-mean", "non-finite"], ignore="NRM103")
    assert report["shifted-mean"].status == "not-applicable"
    assert "not among the rules" in report["shifted-mean"].reason


def test_what_no_rule_sees_is_not_seen(trained, monkeypatch):
    """Thresholds out of reach: the strongest size is tried, missed, and the reason said."""
    blind = ns.Thresholds(drift_share=1.1)
    report = ns.selftest(trained, batches(), defects="shifted-mean", thresholds=blind)
    found = report["shifted-mean"]
    assert (found.status, len(found.trials), report.passed) == ("not-seen", 1, False)
    assert found.missed.size == max(DEFECTS[0].sizes)
    assert found.reason.startswith("NRM103: ")


# --- a doctor that is broken --------------------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch):
    """Put another judge into rules: replace({"NRM103": judge})."""
    known = ns.doctor.RULES

    def replace(judges):
        for code, judge in judges.items():
            monkeypatch.setitem(known, code, dataclasses.replace(known[code], judge=judge))

    return replace


SEEING = {code for defect in DEFECTS for code in defect.rules}
# What costs nothing in so small a network is noticed as information at most.
FREE = {"unconverged", "changed-weights", "lost-buffers"}


def silent(m, t):
    return base.fine("all is well")


def raising(m, t):
    raise ZeroDivisionError


def elsewhere(m, t):
    return base.alarm("E", "something else", ("one",))


@pytest.mark.parametrize("judge", [silent, raising, elsewhere], ids=lambda judge: judge.__name__)
def test_rules_that_see_nothing_or_blame_others_are_found_out(trained, rules, judge):
    rules(dict.fromkeys(SEEING, judge))
    report = ns.selftest(trained, batches())
    status = {s.defect: s.status for s in report.record.sensitivities}
    assert {name for name in status if status[name] != "not-seen"} <= FREE
    assert len([name for name in status if status[name] == "not-seen"]) >= len(DEFECTS) - len(FREE)
    assert not report.passed


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.name not in FREE], ids=lambda d: d.name)
def test_one_silent_rule_is_found_out_where_no_other_can_see(trained, rules, defect):
    rules(dict.fromkeys(defect.rules, silent))
    assert ns.selftest(trained, batches(), defects=defect.name)[defect.name].status == "not-seen"


def test_an_alarm_whatever_comes_proves_nothing(trained, rules):
    rules(dict.fromkeys(SEEING, lambda m, t: base.alarm("E", "trouble", [x.name for x in m.layers])))
    report = ns.selftest(trained, batches())
    assert {s.status for s in report.record.sensitivities} == {"masked"}
    assert {f.code for f in report.record.control if f.severity == "E"} >= SEEING


def test_a_doctor_that_prices_everything_at_nothing_is_found_out(trained, monkeypatch):
    """Its rules then call information what costs dozens of points; a plain comparison with the untouched copy tells."""
    nothing = Effect(Interval(0.0, -0.1, 0.1, "pp"), None, "I")
    monkeypatch.setattr(gates, "effect", lambda *_, **__: nothing)
    report = ns.selftest(trained, batches(), defects=["shifted-mean", "scaled-variance"])
    assert [s.status for s in report.record.sensitivities] == ["not-seen"] * 2


def test_recalibration_that_does_nothing_is_found_out(trained, monkeypatch):
    """The state to compare with is the harmed one itself, so that nothing seems to be lost."""
    monkeypatch.setattr(Patient, "with_statistics", lambda self, *_: self.evaluating())
    report = ns.selftest(trained, batches(), defects=["shifted-mean", "scaled-variance"])
    assert [s.status for s in report.record.sensitivities] == ["not-seen"] * 2


def test_a_doctor_that_leaves_traces_is_found_out(trained, monkeypatch):
    examined = probe.Probe.run

    def run(self):
        found = examined(self)
        self.patient.model.bn1.running_mean += 1
        return found

    monkeypatch.setattr(probe.Probe, "run", run)
    monkeypatch.setattr(examination, "bring_back", lambda *_: None)
    before = state_hash(trained)
    with pytest.raises(ns.StateNotRestoredError):
        ns.selftest(trained, batches(), defects="shifted-mean")
    assert state_hash(trained) == before  # only the copy was harmed


def test_what_costs_nothing_is_said_to(trained):
    """Noise of 1 % in the weights: statistics no longer belong to them, and evaluation does not feel it."""
    only = dataclasses.replace(next(d for d in DEFECTS if d.name == "changed-weights"), sizes=(0.01,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "DEFECTS", (only,))
        report = ns.selftest(trained, batches())
    found = report["changed-weights"]
    assert (found.status, report.passed) == ("no-cost", True)
    assert found.reason.startswith("NRM113: weights differ from the reference")


def test_models_without_running_statistics_have_nothing_to_harm():
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    report = ns.selftest(model, batches())
    assert {s.status for s in report.record.sensitivities} == {"not-applicable"}
    assert report.passed


def test_a_short_budget_says_what_it_left_out(trained, monkeypatch):
    times = iter(np.arange(0, 1e6, 0.5))  # every look at the clock takes half a second
    monkeypatch.setattr(sensitivity.time, "monotonic", lambda: float(next(times)))
    report = ns.selftest(trained, batches(6, 16), budget=20)
    assert not report.record.settled
    assert "not-tried" in {s.status for s in report.record.sensitivities}
    assert "the budget of 20 s ended the search" in str(report)


def test_progress_counts_checks(trained):
    told = []
    report = ns.selftest(
        trained, batches(), defects=["non-finite", "lost-buffers"], progress=lambda *now: told.append(now)
    )
    assert told[0] == (0, 0, "the untouched copy")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (report.record.checks - 1, report.record.checks)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_sizes_go_from_faint_to_strong(defect):
    sizes = (16.0, 8.0, 2.0) if callable(defect.sizes) else defect.sizes
    steps = np.diff(np.log(sizes))
    assert (steps < 0).all() if callable(defect.sizes) else (steps > 0).all()
    assert all(rule in ns.doctor.RULES for rule in defect.rules)


def test_a_forward_of_ones_own_and_dictionaries(trained):
    data = [{"pixels": x, "label": y} for x, y in batches()]

    def forward(model, batch):
        return model(batch["pixels"])

    def metric(output, batch):
        return (output.argmax(1) == batch["label"]).float()

    names = ["forgotten-eval", "other-scale", "small-batches", "lost-buffers"]
    report = ns.selftest(trained, data, forward=forward, metric=metric, defects=names)
    assert report.passed, report
    assert [report[name].status for name in names[:3]] == ["seen"] * 3


# --- arguments ----------------------------------------------------------------------------------------------------


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no copies of me")


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"defects": "shifted"}, ArgumentError, "no defect 'shifted'"),
        ({"layer": "bn9"}, ArgumentError, "layer 'bn9' is no normalizer"),
        ({"budget": 0}, ArgumentError, "budget must be positive"),
        ({"check_budget": -1}, ArgumentError, "check_budget must be positive"),
        ({"loss": 3}, ArgumentError, "loss must be callable"),
        ({"loader": []}, DataError, "the loader is empty"),
        ({"model": "net"}, ArgumentError, "must be a torch.nn.Module"),
        ({"model": nn.Sequential(Uncopied(6, 4))}, ArgumentError, "cannot be copied"),
        ({"model": nn.Linear(5, 4)}, ArgumentError, "raised RuntimeError on the loader's first batch"),
    ],
)
def test_bad_arguments_are_refused(trained, given, error, sentence):
    given = {"model": trained, "loader": batches(6, 16), **given}
    before = state_hash(trained, rng=True)
    with pytest.raises(error, match=sentence):
        ns.selftest(given.pop("model"), given.pop("loader"), **given)
    assert state_hash(trained, rng=True) == before


def test_a_normalizer_without_statistics_is_no_place(trained):
    model = nn.Sequential(trained, nn.LayerNorm(4)).eval()
    with pytest.raises(ArgumentError, match="keeps no running statistics"):
        ns.selftest(model, batches(6, 16), layer="1")


# --- as text, JSON and from the command line ----------------------------------------------------------------------


def test_json_loses_nothing(whole, tmp_path):
    whole.to_json(tmp_path / "self.json")
    assert records.from_json(SelfTest, (tmp_path / "self.json").read_text(encoding="utf-8")) == whole.record


def test_the_text_has_a_line_per_defect_and_fits(whole):
    lines = str(whole).splitlines()
    assert all(any(line.startswith(d.name) for line in lines) for d in DEFECTS)
    assert max(map(len, lines[1:])) <= 80
    assert "control, the untouched copy" in str(whole)
    assert (
        repr(whole)
        == f"SelfTestReport(Net: {sum(s.status == 'seen' for s in whole.record.sensitivities)} of 13 defects seen)"
    )
    with pytest.raises(KeyError, match="nonsense was not tried"):
        whole["nonsense"]


CODE = """
import torch, normscope as ns
from torch import nn
def build_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    ns.recalibrate(model, [x for x, _ in build_loader()], progress=False)
    print("built")
    return model.eval()
def build_loader():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 4, generator=g), torch.randint(0, 2, (32,), generator=g)) for _ in range(9)]
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "their_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda *words: CliRunner().invoke(cli.main, ["selftest", "their_code.py:build_model", *words])
    sys.modules.pop("their_code", None)


def test_the_command(run):
    result = run("--data", "build_loader", "--defect", "non-finite", "--defect", "lost-buffers")
    assert result.exit_code == 0, result.output
    assert "built" not in result.stdout
    assert "non-finite       seen" in result.stdout
    found = run("--data", "build_loader", "--defect", "non-finite", "--format", "json")
    assert json.loads(found.stdout)["record"] == "SelfTest"


def test_the_exit_codes(run, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.normscope.thresholds]\ndrift_share = 1.5\n")
    assert run("--data", "build_loader", "--defect", "shifted-mean").exit_code == 1
    assert run("--data", "absent").exit_code == 2
    assert run("--data", "build_loader", "--defect", "absent").exit_code == 2
    assert run("--data", "build_loader", "--budget", "soon").exit_code == 2
    assert run().exit_code == 2


def test_a_model_that_is_not_restored_ends_with_3(run, monkeypatch):
    def spoiled(*_, **__):
        raise ns.StateNotRestoredError("NRM904: not restored", cure="report it")

    monkeypatch.setattr(ns.doctor, "selftest", spoiled)
    assert run("--data", "build_loader").exit_code == 3


# --- single injections --------------------------------------------------------------------------------------------


def test_the_injections_do_what_they_say():
    norm = nn.BatchNorm1d(4)
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    defects.shift_mean(norm, 0.5, slice(2))
    assert norm.running_mean.tolist() == [0.5, 1.0, 0.0, 0.0]
    defects.scale_variance(norm, 2.0)
    assert norm.running_var.tolist() == [2.0, 8.0, 18.0, 32.0]
    defects.poison(norm.running_mean, float("inf"), 3)
    assert norm.running_mean.tolist() == [0.5, 1.0, 0.0, float("inf")]
