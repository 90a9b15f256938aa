"""Repaired models as files: what a state_dict cannot hold comes back, too, and nothing but data is read."""

import pytest
import torch
from check_records import make_fix
from torch import nn

import normscope as ns
from normscope.doctor import checkpoint
from normscope.doctor.remedies import REMEDIES, Case
from normscope.records import Remedy, Treatment
from normscope.surgery import is_frozen


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.9), nn.Linear(4, 2)).eval()


def treated(*codes, layers=("1",)):
    remedies = [Remedy(code, "S1", f"do {code}", "") for code in codes]
    return make_fix(applied=tuple(Treatment("NRM103", remedy, layers, None, "kept") for remedy in remedies))


def test_statistics_are_in_the_state_dict(tmp_path):
    model = build()
    ns.recalibrate(model, [torch.randn(50, 3) + 2])
    checkpoint.save(model, treated("recal"), tmp_path / "a.pt")
    again = checkpoint.load(build, tmp_path / "a.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("code", ["freeze", "recal-freeze"])
def test_frozen_layers_are_frozen_again(tmp_path, code):
    model = build()
    ns.freeze(model)
    checkpoint.save(model, treated(code), tmp_path / "a.pt")
    again = build()
    assert checkpoint.restore(again, tmp_path / "a.pt") == (f"done again: do {code}",)
    assert is_frozen(again[1])
    assert not again.train()[1].training


def test_momentum_comes_back(tmp_path):
    model = build()
    model[1].momentum = 0.1
    checkpoint.save(model, treated("momentum"), tmp_path / "a.pt")
    assert checkpoint.load(build, tmp_path / "a.pt")[1].momentum == 0.1


def test_the_tracking_flag_comes_back(tmp_path):
    def broken():
        model = build()
        model[1].track_running_stats = False
        return model

    model = broken()
    model[1].track_running_stats = True
    checkpoint.save(model, treated("track-flag"), tmp_path / "a.pt")
    assert checkpoint.load(broken, tmp_path / "a.pt")[1].track_running_stats


def test_given_statistics_come_back(tmp_path):
    def bare():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()

    model = bare()
    case = Case(model, ("1",), [torch.randn(16, 3) for _ in range(3)], None, None, "population")
    assert REMEDIES["give-statistics"].operation(case).changed
    checkpoint.save(model, treated("give-statistics"), tmp_path / "a.pt")
    again, x = checkpoint.load(bare, tmp_path / "a.pt"), torch.randn(5, 3)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again[1].running_mean.any()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda body: body["normscope"].update(format=99), "format 99"),
        (lambda body: body["normscope"]["operations"][0].update(code="dance"), "'dance' is unknown"),
        (lambda body: body["state_dict"].pop("0.weight"), "does not fit the model"),
        (lambda body: body.pop("state_dict"), "holds no state_dict"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, spoil, words):
    checkpoint.save(build(), treated("recal"), tmp_path / "a.pt")
    body = torch.load(tmp_path / "a.pt", weights_only=True)
    spoil(body)
    torch.save(body, tmp_path / "a.pt")
    with pytest.raises(ns.NormscopeError, match=words):
        checkpoint.load(build, tmp_path / "a.pt")


def test_no_code_is_unpickled(tmp_path):
    torch.save({"state_dict": build()}, tmp_path / "a.pt")
    with pytest.raises(ns.DataError, match="cannot be read"):
        checkpoint.load(build, tmp_path / "a.pt")


def test_every_remedy_that_can_be_applied_can_be_stored():
    applied = {code for code, spec in REMEDIES.items() if spec.operation is not None}
    assert applied <= set(checkpoint._REPLAY) | set(checkpoint._STORED)


def test_operations_are_plain_data(tmp_path):
    fix = treated("recal", "freeze", layers=("1", "0"))
    checkpoint.save(build(), fix, tmp_path / "a.pt")
    noted = torch.load(tmp_path / "a.pt", weights_only=True)["normscope"]["operations"]
    assert [(one["code"], one["layers"]) for one in noted] == [("recal", ["1", "0"]), ("freeze", ["1", "0"])]
    assert noted[0]["rule"] == fix.applied[0].rule


def test_what_had_been_done_before_comes_first(tmp_path):
    frozen = ns.freeze(build())
    checkpoint.save(frozen.model, treated("recal"), tmp_path / "a.pt", earlier=[checkpoint.noted(frozen)])
    assert [one["code"] for one in checkpoint.operations(tmp_path / "a.pt")] == ["freeze", "recal"]
    assert is_frozen(checkpoint.load(build, tmp_path / "a.pt")[1])
    torch.save(build().state_dict(), tmp_path / "plain.pt")
    assert checkpoint.operations(tmp_path / "plain.pt") == ()
