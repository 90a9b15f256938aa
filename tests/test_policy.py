"""What enters the running statistics, and what does not: recomputed, non-finite, paused and rolled-back batches."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope import oracle
from normscope.functional import running
from normscope.surgery import state_hash

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
LAYERS = {
    "BatchNorm2d": lambda: ns.nn.BatchNorm2d(4),
    "cumulative": lambda: ns.nn.BatchNorm2d(4, momentum=None),
    "InstanceNorm2d": lambda: ns.nn.InstanceNorm2d(4, track_running_stats=True),
    "SyncBatchNorm": lambda: ns.nn.SyncBatchNorm(4),
    "Norm": lambda: ns.nn.Norm("[n] c [h w]", 4, running=True),
}
TORCHS = {
    "torch BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "torch InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
}


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_equal(mine, expected):
    assert mine.keys() == expected.keys()
    for name, b in expected.items():
        assert torch.equal(mine[name].nan_to_num(7e7), b.nan_to_num(7e7)), name


# --- recomputed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_checkpoint_enters_once(layer, reentrant):
    plain = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[layer](), nn.ReLU())
    twice, checkpointed = copy.deepcopy(plain), copy.deepcopy(plain)
    x = X.clone().requires_grad_()
    for _ in range(2):
        plain(x).square().sum().backward()
        checkpoint(checkpointed, x, use_reentrant=reentrant).square().sum().backward()
        twice(x), twice(x)
    assert_equal(buffers(checkpointed), buffers(plain))
    # The comparison can tell: a second update per step would show.
    assert any(not torch.equal(b, buffers(plain)[name]) for name, b in buffers(twice).items())


def test_a_forward_after_the_backward_enters_again():
    layer = ns.nn.BatchNorm2d(4)
    layer(X.clone().requires_grad_()).sum().backward()
    layer(X)
    assert layer.num_batches_tracked == 2


# --- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_not_finite_stays_out(layer, bad, masked):
    layer = LAYERS[layer]()
    layer(X)
    clean, before = copy.deepcopy(layer), buffers(layer)
    x = (X * 3).clone()
    x[:, 2, 1, 1] = bad  # 3e38 is finite, its square is not
    mask = torch.ones(6, 5, 5, dtype=torch.bool) if masked else None
    layer(x, mask=mask)
    clean(X * 3, mask=mask)
    after, expected = buffers(layer), buffers(clean)
    for name in ("running_mean", "running_var"):
        assert torch.equal(after[name][2], before[name][2])
        assert torch.equal(after[name][[0, 1, 3]], expected[name][[0, 1, 3]])
        assert not torch.equal(after[name][0], before[name][0])


def test_a_sample_that_is_not_finite_leaves_the_others_of_instance_norm():
    layer = ns.nn.InstanceNorm2d(4, track_running_stats=True)
    x = X.clone()
    x[3] = float("inf")
    layer(x)
    kept = x[[0, 1, 2, 4, 5]].double().mean((0, 2, 3)) * 0.1
    assert torch.allclose(layer.running_mean.double(), kept, rtol=0, atol=1e-6)


def test_torchs_behaviour_is_an_option(monkeypatch):
    monkeypatch.setattr(running, "SKIP_NONFINITE", False)
    layer, peer = ns.nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    x = X.clone()
    x[0, 1] = float("inf")
    layer(x), peer(x)
    for name in ("running_mean", "running_var"):
        assert torch.equal(buffers(layer)[name].isfinite(), buffers(peer)[name].isfinite())
        assert torch.equal(buffers(layer)[name].isfinite(), torch.tensor([True, False, True, True]))


class NoSync(TorchDispatchMode):
    """Fails where a number leaves the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", LAYERS)
def test_no_number_leaves_the_device(layer):
    layer = LAYERS[layer]()
    with NoSync():
        layer(X)
    assert layer.num_batches_tracked == 1
    with NoSync(), pytest.raises(AssertionError):
        X.sum().item()


# --- paused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", {**LAYERS, **TORCHS})
def test_pause(layer):
    model = nn.Sequential({**LAYERS, **TORCHS}[layer](), nn.ReLU())
    model(X)
    before, hash_before = buffers(model), state_hash(model)
    expected = copy.deepcopy(model)(X * 3)
    with ns.pause_statistics(model):
        assert torch.equal(model(X * 3), expected)
        model(X * 5)
        model.eval()
        evaluated = model(X)
        model.train()
    assert_equal(buffers(model), before)
    assert state_hash(model) == hash_before
    model.eval()
    assert torch.equal(model(X), evaluated)
    model.train()(X * 3)
    assert not torch.equal(buffers(model)["0.running_mean"], before["0.running_mean"])


def test_pause_survives_errors_and_nests():
    model = nn.Sequential(ns.nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    hash_before = state_hash(model)
    with contextlib.suppress(ValueError), ns.pause_statistics(model):
        with ns.pause_statistics(model):
            model(X)
        with contextlib.suppress(RuntimeError, ValueError):
            model(torch.randn(2, 3, 5, 5))  # a wrong number of channels
        model(X)
        raise ValueError
    assert state_hash(model) == hash_before


def test_pause_of_some():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    with ns.pause_statistics(model, select="1"):
        model(X)
    assert (model[0].num_batches_tracked, model[1].num_batches_tracked) == (1, 0)
    with pytest.raises(ns.ArgumentError, match="select matches no normalizer"), ns.pause_statistics(model, select="x"):
        pass
    with pytest.raises(ns.ArgumentError, match="lazy"), ns.pause_statistics(nn.LazyBatchNorm1d()):
        pass


def test_pause_of_compiled_code():
    model = nn.Sequential(nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    before = buffers(model)
    with ns.pause_statistics(compiled):
        compiled(X * 2)
    assert_equal(buffers(model), before)
    compiled(X * 2)
    assert model[0].num_batches_tracked == model[1].num_batches_tracked == 2


def test_one_update_per_step_with_two_views_and_accumulation():
    model, single = ns.nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4)
    for k in range(3):
        model(X * (k + 1))
        with ns.pause_statistics(model):
            model(X * 9 + k)
        single(X * (k + 1))
    assert_equal(buffers(model), buffers(single))


# --- provisional ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", {**LAYERS, **TORCHS})
def test_provisional(layer):
    model = nn.Sequential({**LAYERS, **TORCHS}[layer]())
    model(X)
    start, identities = buffers(model), [id(b) for b in model.buffers()]
    with ns.provisional_statistics(model) as statistics:
        model(X * 3)
        statistics.rollback()
    assert_equal(buffers(model), start)
    with ns.provisional_statistics(model) as statistics:
        model(X * 3)
        entered = buffers(model)
        statistics.commit()
        model(X * 4)
        statistics.rollback()
    assert_equal(buffers(model), entered)
    with contextlib.suppress(KeyboardInterrupt), ns.provisional_statistics(model):
        model(X * 3)
        raise KeyboardInterrupt
    assert_equal(buffers(model), entered)
    with ns.provisional_statistics(model):
        model(X * 3)
    assert not torch.equal(buffers(model)["0.running_mean"], entered["0.running_mean"])
    assert [id(b) for b in model.buffers()] == identities


def test_a_step_that_the_gradient_scaler_skips():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    clean = copy.deepcopy(model)
    x = torch.randn(3, 8, 4)
    for k in range(3):
        with ns.provisional_statistics(model) as statistics:
            loss = model(x[k]).square().sum() * (float("inf") if k == 1 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() < before:
                statistics.rollback()
    other = torch.optim.SGD(clean.parameters(), 0.1)
    for k in (0, 2):
        other.zero_grad()
        clean(x[k]).square().sum().backward()
        other.step()
    for mine, expected in zip(model.state_dict().values(), clean.state_dict().values(), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-7)  # the scale is a power of two


def test_the_buffers_are_the_oracles_after_all_of_it():
    """One batch enters, of five forwards: paused, rolled back, recomputed, not finite, plain."""
    layer = ns.nn.BatchNorm2d(4).double()
    x = X.double()
    with ns.pause_statistics(layer):
        layer(x * 2)
    with ns.provisional_statistics(layer) as statistics:
        layer(x * 3)
        statistics.rollback()
    layer(x * float("inf"))
    checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    batch = oracle.moments(x.numpy(), "[n] c [h w]")
    E, Var = oracle.running(np.zeros(4), np.ones(4), batch)
    np.testing.assert_allclose(layer.running_mean.numpy(), E, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var.numpy(), Var, rtol=1e-13)
