"""SyncBatchNorm, `synchronize` and `desynchronize`: four processes on the loopback, and what one process can see."""

import copy
import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normscope as ns
from normscope.functional import compiled
from normscope.nn.syncbatchnorm import synchronized_batch_norm
from normscope.surgery import freeze, state_hash

WORKER = Path(__file__).with_name("sync_worker.py")
CHECKS = re.findall(r"^@check\ndef (\w+)", WORKER.read_text(encoding="utf-8"), re.MULTILINE)
X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1


def torchrun(ranks, folder, *checks):
    """What each of some ranks reports; `torchrun` is this module's other name."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", WORKER]
    run += [*checks, "--reports", folder]
    root = os.pathsep.join([str(Path(ns.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    done = subprocess.run(run, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{k}.json").read_text()) for k in range(ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Every check on four ranks, in one start of the processes, which costs more than all checks together."""
    return torchrun(4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_ranks(ranks, name):
    assert [report[name] for report in ranks] == [""] * 4, next(report[name] for report in ranks if report[name])


def test_on_another_number_of_ranks(tmp_path):
    checks = ("one_process_float64", "one_process_float32", "distributed_data_parallel")
    assert torchrun(3, tmp_path, *checks) == [dict.fromkeys(checks, "")] * 3


def test_one_rank_on_a_cpu_which_torchs_own_refuses(tmp_path):
    checks = ("torchs_own_needs_a_gpu", "one_process_float64", "one_process_float32")
    assert torchrun(1, tmp_path, *checks) == [dict.fromkeys(checks, "")]


def test_the_reports_are_read():
    assert len(CHECKS) > 15


class One:
    """An exchange of one rank."""

    size = 1

    def gather(self, row):
        return row[None]


STEPS = {
    "plain": {},
    "all at once": {"activation": "gelu", "residual": True, "mask": True},
    "no parameters": {"weight": False, "bias": False, "activation": "relu"},
    "γ alone": {"bias": False, "residual": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", STEPS)
def test_the_kernels_in_steps_are_the_kernels_at_once(name, layout, dtype, monkeypatch):
    """Statistics, apply, sums and gradients apart, as between the messages of several ranks."""
    given = {"weight": True, "bias": True, "activation": None, "residual": False, "mask": False} | STEPS[name]
    x, residual, g = (torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    x, g = (
        x + 100 * (dtype == torch.float32),
        g + 30,
    )  # most of which is projected out: rounded before, it would be seen
    tensors = {"x": x, "weight": torch.rand(4) + 0.5, "bias": torch.randn(4), "residual": residual}
    mask = torch.rand(3, 5, 6) > 0.3 if given["mask"] else None
    calls = []
    backend = compiled.backend_of(x)
    if backend is not None:
        statistics = backend.statistics
        monkeypatch.setattr(backend, "statistics", lambda *a: calls.append(1) or statistics(*a))

    def run(function, *args):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items() if k == "x" or given[k]}
        others = {k: t for k, t in leaves.items() if k != "x"}
        y = function(*args[:1], leaves["x"], None, None, *args[1:], mask=mask, activation=given["activation"], **others)
        return [y, *torch.autograd.grad(y, list(leaves.values()), g)]

    mine = run(synchronized_batch_norm, One())
    peer = run(lambda *a, **k: ns.functional.batch_norm(*a, training=True, **k))
    assert len(calls) == (backend is not None)
    for a, b in zip(mine, peer, strict=True):
        # float32: some roundings of what is added up; bfloat16: such numbers, each rounded once more.
        unit, largest = torch.finfo(a.dtype).eps, float(b.detach().abs().max())
        bound = 32 * unit * (largest + 30) if a.dtype == torch.float32 else unit * largest
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
        assert a.stride() == b.stride()


# --- alone ------------------------------------------------------------------------------------------------------------


def test_constructor_state_and_repr_are_torchs():
    mine, peer = (inspect.signature(cls.__init__).parameters for cls in (ns.nn.SyncBatchNorm, nn.SyncBatchNorm))
    assert [(n, p.default, p.kind) for n, p in peer.items()] == [
        (n, p.default, p.kind) for n, p in mine.items() if n != "activation"
    ]
    for options in ({}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}):
        layer, torchs = ns.nn.SyncBatchNorm(4, **options), nn.SyncBatchNorm(4, **options)
        assert repr(layer) == repr(torchs)
        assert list(layer.state_dict()) == list(torchs.state_dict())
        torchs.load_state_dict(layer.state_dict())
        layer.load_state_dict(torchs.state_dict())
    assert not isinstance(layer, nn.SyncBatchNorm)  # which DDP refuses off the GPU
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("training", [True, False])
def test_alone_it_is_batch_norm(training):
    layer, peer = ns.nn.SyncBatchNorm(4).train(training), nn.BatchNorm2d(4).train(training)
    torch.testing.assert_close(layer(X), peer(X))
    torch.testing.assert_close(layer.state_dict(), peer.state_dict())


def test_errors_are_torchs():
    layer = ns.nn.SyncBatchNorm(4)
    with pytest.raises(ns.ShapeError, match=r"expected at least 2D input \(got 1D input\)"):
        layer(torch.zeros(4))
    with pytest.raises(ValueError, match="SyncBatchNorm number of input channels should be non-zero"):
        layer(torch.zeros(4, 0))
    with pytest.raises(ns.ShapeError, match="should contain 3 elements not 4"):
        layer(torch.zeros(4, 3))


def test_copies_and_pickles():
    layer = ns.nn.SyncBatchNorm(4, process_group=object())
    assert copy.deepcopy(layer).process_group is layer.process_group
    assert copy.copy(layer).process_group is layer.process_group
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.process_group is None
    assert torch.equal(loaded(X), ns.nn.SyncBatchNorm(4)(X))


# --- synchronize ------------------------------------------------------------------------------------------------------


class Mine(nn.BatchNorm2d):
    """What others' subclasses do: an argument more, a child, an activation."""

    activation = "none of ours"

    def __init__(self, channels, gain):
        super().__init__(channels)
        self.gain, self.drop = gain, nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x)) * self.gain


def net():
    torch.manual_seed(0)
    shared = ns.nn.BatchNorm2d(4, activation="relu")
    model = nn.Sequential(
        nn.BatchNorm2d(4), shared, Mine(4, 2.0), nn.Sequential(shared), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.SyncBatchNorm(4), ns.nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False, momentum=None),
    )  # fmt: skip
    model[0].register_forward_hook(noop)
    model[7].eval()
    return model


def noop(*_):
    return None


def test_synchronize_keeps_everything():
    model = net()
    classes, tensors = [type(m) for m in model], [id(t) for t in (*model.parameters(), *model.buffers())]
    repr_before, hash_before, keys = repr(model), state_hash(model), list(model.state_dict())
    report = ns.synchronize(model)
    assert report.changed == ("0", "1", "2", "5", "7")
    assert report.skipped == (("6", "synchronized over this group already"),)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert list(model.state_dict()) == keys
    assert all(isinstance(model[k], ns.nn.SyncBatchNorm) for k in (0, 1, 2, 5, 6, 7))
    assert all(isinstance(model[k], classes[k]) for k in (0, 1, 2, 4, 6, 7))
    assert type(model[5]) is ns.nn.SyncBatchNorm
    assert model[3][0] is model[1]
    assert (model[1].activation, model[2].activation, model[2].gain) == ("relu", "none of ours", 2.0)
    assert not model[7].training
    assert len(model[0]._forward_hooks) == 1
    assert "synchronized" in repr(model[2])
    report.undo()
    assert (repr(model), state_hash(model)) == (repr_before, hash_before)


def test_and_back():
    model = net()
    ns.synchronize(model)
    report = ns.desynchronize(model)
    assert report.changed == ("0", "1", "2", "5", "6", "7")
    assert [type(m) for m in net()][:5] == [type(m) for m in model][:5]
    assert not any(isinstance(m, (ns.nn.SyncBatchNorm, nn.SyncBatchNorm)) for m in model.modules())
    model.eval()
    assert torch.equal(model(X), ns.synchronize(net()).model.eval()(X))
    assert [m.process_group for m in model.modules() if hasattr(m, "process_group")] == []
    with pytest.raises(ns.ShapeError):  # a layer that was built as SyncBatchNorm takes any number of axes, but two
        model[6](torch.zeros(4))
    assert model[6](torch.zeros(2, 4)).shape == (2, 4)


def test_a_root_a_copy_and_a_selection():
    root = nn.SyncBatchNorm(4)
    assert type(ns.synchronize(root).model) is ns.nn.SyncBatchNorm
    model = net()
    hash_before = state_hash(model)
    assert isinstance(ns.synchronize(model, copy=True).model[0], ns.nn.SyncBatchNorm)
    assert state_hash(model) == hash_before
    assert ns.synchronize(model, select="2").changed == ("2",)
    with pytest.raises(ns.ArgumentError, match="select matches no normalizer"):
        ns.synchronize(model, select="nothing")


def test_what_is_not_synchronized_says_why():
    class Other(nn.SyncBatchNorm):
        pass

    class Ours(ns.nn.SyncBatchNorm):
        pass

    with pytest.warns(DeprecationWarning, match="jit.script"):
        scripted = torch.jit.script(nn.BatchNorm2d(4))
    model = nn.Sequential(Other(4), scripted, nn.LazyBatchNorm1d(), nn.LayerNorm(4))
    reasons = dict(ns.synchronize(model).skipped)
    assert list(reasons) == ["0", "1", "2"]
    assert "its own way" in reasons["0"]
    assert "lazy" in reasons["2"]
    assert "subclass" in dict(ns.desynchronize(nn.Sequential(Ours(4))).skipped)["0"]


def test_another_group_is_taken():
    group = object()
    model = ns.synchronize(nn.Sequential(nn.BatchNorm2d(4), ns.nn.SyncBatchNorm(4)), group).model
    assert model[0].process_group is model[1].process_group is group
    assert ns.synchronize(model).changed == ("0", "1")
    assert model[0].process_group is model[1].process_group is None


def test_a_synchronized_model_is_copied_saved_and_frozen():
    model = ns.synchronize(net()).model
    assert isinstance(copy.deepcopy(model)[2], Mine)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert isinstance(loaded[2], ns.nn.SyncBatchNorm)
    torch.testing.assert_close(loaded.eval()(X), copy.deepcopy(model).eval()(X))
    freeze(model)
    model.train()
    assert not model[0].training
    assert isinstance(model[0], ns.nn.SyncBatchNorm)
    ns.desynchronize(model)
    assert not model[0].training
    ns.unfreeze(model)
    assert type(model[0]) is nn.BatchNorm2d
