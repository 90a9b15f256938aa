"""What several ranks together must give, whatever one process with the whole batch gives.

torchrun --nproc-per-node 4 tests/sync_worker.py [CHECK …]   rank 0 says what held, and how long it took
                                    … --reports FOLDER        one report per rank, for `test_sync.py`
"""

import argparse
import contextlib
import copy
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope import oracle
from normscope.functional import compiled
from normscope.nn import SyncBatchNorm, collective
from normscope.surgery import keep_float32

BATCHES = (5, 1, 0, 7, 2, 0, 3, 4)[: int(os.environ.get("WORLD_SIZE", 4))]
C = 6
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def rank():
    return dist.get_rank()


def share(t):
    """This rank's samples of a tensor that holds all ranks'."""
    return torch.split(t, list(BATCHES))[rank()]


def whole(*shape, seed=0, dtype=torch.float64, offset=0.0):
    """The same numbers on every rank; small dyadic steps where they are far off centre, so that they are exact."""
    x = torch.randn(sum(BATCHES), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.round(x * 256) / 256 + offset).to(dtype)


def everyone(t):
    """The tensors of all ranks."""
    return everyone_says(t.detach())


def everyone_says(thing):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def put_together(t):
    return torch.cat(everyone(t))


def total(t):
    """In float64: how the ranks' gradients are added up is not ours."""
    return sum(part.double() for part in everyone(t))


def error(mine, truth):
    mine, truth = mine.detach().double().numpy(), np.asarray(truth)
    assert mine.shape == truth.shape
    return float(np.abs(mine - truth).max() / max(np.abs(truth).max(), 1e-300))


def layer_of(cls, dtype, **options):
    layer = cls(C, dtype=dtype, **options)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        for p in layer.parameters():
            p.copy_(torch.rand(C, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def step(layer, x, residual, mask, gy):
    """Output, gradients and buffers of one training step."""
    x, residual = x.clone().requires_grad_(), None if residual is None else residual.clone().requires_grad_()
    y = layer(x, residual, mask)
    y.backward(gy)
    gradients = {"input": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    if residual is not None:
        gradients["residual"] = residual.grad
    return {"y": y, **gradients, **dict(layer.named_buffers())}


def truth_of(x, residual, mask, gy, layer, activation):
    """The same by the oracle, in float64."""
    options = {"activation": activation, "mask": None if mask is None else mask.numpy()}
    if residual is not None:
        options["residual"] = residual.double().numpy()
    args = (x.double().numpy(), "[n] c h w" if x.dim() != 4 else "[n] c [h w]")
    γβ = {"γ": layer.weight.detach().double().numpy(), "β": layer.bias.detach().double().numpy()}
    g = oracle.backward(gy.double().numpy(), *args, **γβ, **options)
    E, Var = oracle.running(np.zeros(C), np.ones(C), oracle.moments(*args, mask=options["mask"]))
    truth = {"y": oracle.normalize(*args, **γβ, **options), "input": g.dx, "weight": g.dγ, "bias": g.dβ}
    if residual is not None:
        truth["residual"] = g.dresidual
    return {**truth, "running_mean": E, "running_var": Var, "num_batches_tracked": np.asarray(1)}


def compare(dtype, masked, activation, residual, offset=0.0, memory_format=torch.contiguous_format):
    """Largest error of every tensor: of the ranks together, and of one process with all samples."""
    x, gy = whole(C, 3, 2, seed=1, dtype=dtype, offset=offset), whole(C, 3, 2, seed=2, dtype=dtype)
    r = whole(C, 3, 2, seed=3, dtype=dtype) if residual else None
    mask = whole(3, 2, seed=4) > -0.3 if masked else None
    if masked:
        mask[:5] = False  # rank 0 has samples and no cell
        x[~mask[:, None].expand_as(x)] = float("nan")
    alone = layer_of(ns.nn.BatchNorm2d, dtype, activation=activation)
    sync = layer_of(SyncBatchNorm, dtype, activation=activation)
    parts = [None if t is None else share(t).contiguous(memory_format=memory_format) for t in (x, r)]
    mine = step(sync, *parts, None if mask is None else share(mask), share(gy))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert all(torch.equal(mine[name], other) for other in everyone(mine[name])), "ranks disagree"
    together = {
        name: put_together(t) if name in ("y", "input", "residual") else total(t) if name in ("weight", "bias") else t
        for name, t in mine.items()
    }
    single, truth = step(alone, x, r, mask, gy), truth_of(x, r, mask, gy, alone, activation)
    return {name: (error(together[name], truth[name]), error(single[name], truth[name])) for name in truth}


def fold(errors, bound):
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= bound(pair[1])}
    assert not bad, bad


CASES = {
    "plain": (False, None, False),
    "masked": (True, None, False),
    "all at once": (True, "silu", True),
}


@check
def one_process_float64():
    for case in CASES.values():
        fold(compare(torch.float64, *case), lambda single: 1e-12)
    fold(compare(torch.float64, False, "relu", True, memory_format=torch.channels_last), lambda single: 1e-12)


@check
def one_process_float32():
    # Twice the error of one process, or two roundings where that one happens to have none.
    for case in CASES.values():
        fold(compare(torch.float32, *case), lambda single: 2 * max(single, 2**-23))


@check
def as_accurate_at_8000_sigma():
    for masked in (False, True):
        at_0 = compare(torch.float32, masked, None, False)
        away = compare(torch.float32, masked, None, False, offset=8000.0)
        for name in ("y", "input", "weight", "bias"):
            assert away[name][0] <= 2 * max(at_0[name][0], 2**-23), (name, away[name], at_0[name])
        assert away["running_var"][0] < 1e-6


@check
def bfloat16_and_half():
    for dtype in (torch.bfloat16, torch.float16):
        x, gy = whole(C, 3, seed=1, dtype=dtype), whole(C, 3, seed=2, dtype=dtype)
        alone, sync = layer_of(ns.nn.BatchNorm1d, torch.float32), layer_of(SyncBatchNorm, torch.float32)
        mine, single = step(sync, share(x), None, None, share(gy)), step(alone, x, None, None, gy)
        assert mine["y"].dtype == dtype
        for name, of in (("y", put_together), ("input", put_together), ("weight", total)):
            # The same float32 numbers, each rounded once more to the narrow type.
            assert error(of(mine[name]), single[name].detach().double().numpy()) <= torch.finfo(dtype).eps


@check
def kernels_on_some_ranks():
    """Between the messages the compiled kernels compute what torch's operators do; each rank chooses for itself."""
    recipe_of, used = compiled.recipe_of, []

    def chosen(which):
        def recipe(*args):
            found = recipe_of(*args) if which(rank()) else None
            used.append(found)
            return found

        return recipe

    for dtype, masked, activation, residual in (
        (torch.float32, False, None, False), (torch.float32, True, "silu", True), (torch.bfloat16, True, "relu", True)
    ):  # fmt: skip
        x, gy, r = (whole(C, 3, 2, seed=k, dtype=dtype, offset=3.0) for k in (1, 2, 3))
        mask = whole(3, 2, seed=4) > -0.3 if masked else None
        parts = share(x), share(r) if residual else None, None if mask is None else share(mask), share(gy)
        results = []
        for which in (lambda k: False, lambda k: True, lambda k: k % 2 == 0):
            compiled.recipe_of = chosen(which)
            try:
                results.append(step(layer_of(SyncBatchNorm, torch.float32, activation=activation), *parts))
            finally:
                compiled.recipe_of = recipe_of
        # Some roundings each, and one to the narrow type.
        unit = 2**-20 if dtype == torch.float32 else torch.finfo(dtype).eps
        for name, t in results[0].items():
            for other in results[1:]:
                assert t.numel() == 0 or error(other[name], t.detach().double().numpy()) <= unit, (dtype, name)
    assert compiled.backend_of(x) is None or any(used) == (BATCHES[rank()] > 0)


@check
def nothing_anywhere():
    layer = SyncBatchNorm(C)
    y = layer(torch.zeros(2, C, 3), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(2, C, 3))
    assert torch.equal(layer.running_mean, torch.zeros(C))
    assert torch.equal(layer.running_var, torch.ones(C))
    # One cell in all: its own mean, no variance.
    x = torch.full((int(rank() == 0), C), 3.0)
    assert torch.equal(layer(x), torch.zeros_like(x))
    assert torch.allclose(layer.running_mean, torch.full((C,), 0.3))
    assert torch.equal(layer.running_var, torch.ones(C))


@check
def wider_than_one_message():
    width = collective.PACKET // 3 + 5
    x = whole(width, seed=5)
    y = SyncBatchNorm(width, dtype=torch.float64)(share(x))
    assert error(put_together(y), oracle.normalize(x.numpy(), "[n] c")) < 1e-12


@check
def one_message_each_way():
    sent = []
    send, collective.Exchange._send = collective.Exchange._send, lambda *a: sent.append(1) or send(*a)
    try:
        x = share(whole(2048, seed=5)).requires_grad_()
        y = SyncBatchNorm(2048, dtype=torch.float64)(x)
        forward = len(sent)
        y.sum().backward()
    finally:
        collective.Exchange._send = send
    assert (forward, len(sent)) == (1, 2)


@check
def subgroups():
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    group = groups[rank() in (1, 2)]
    x = whole(C, 4, seed=6)
    layer = copy.deepcopy(SyncBatchNorm(C, dtype=torch.float64, process_group=group))
    assert layer.process_group is group
    y = layer(share(x))
    parts = torch.split(x, list(BATCHES))
    pair = (0, 3) if rank() in (0, 3) else (1, 2)
    truth = oracle.normalize(torch.cat([parts[k] for k in pair]).numpy(), "[n] c [l]")
    k = BATCHES[0] if rank() == 3 else BATCHES[1] if rank() == 2 else 0
    assert error(y, truth[k : k + len(y)]) < 1e-12 if len(y) else y.shape == (0, C, 4)


@check
def evaluation_is_local():
    layer = layer_of(SyncBatchNorm, torch.float64).eval()
    if rank() == 1:  # the others do not take part
        x = whole(C, 3)
        layer(x)
    untracked = SyncBatchNorm(C, track_running_stats=False, dtype=torch.float64)
    x = whole(C, 3)
    y = untracked(share(x))
    assert error(put_together(y), oracle.normalize(x.numpy(), "[n] c [l]")) < 1e-12
    if rank() == 3:
        assert error(untracked.eval()(share(x)), oracle.normalize(share(x).numpy(), "[n] c [l]")) < 1e-12


@check
def double_backward():
    def penalty(layer, x, weights):
        x = x.clone().requires_grad_()
        y = layer(x)
        gradient = torch.autograd.grad((y.sin() * weights).sum(), x, create_graph=True)[0]
        gradient.square().sum().backward()
        return x.grad, layer.weight.grad

    x, weights = whole(C, 3, seed=7), whole(C, 3, seed=8)
    alone, sync = layer_of(ns.nn.BatchNorm1d, torch.float64), layer_of(SyncBatchNorm, torch.float64)
    dx, dweight = penalty(sync, share(x), share(weights))
    truth = penalty(alone, x, weights)
    assert error(put_together(dx), truth[0].numpy()) < 1e-12
    assert error(total(dweight), truth[1].numpy()) < 1e-12


class Net(nn.Sequential):
    """A sequence whose normalizers get the mask."""

    def forward(self, x, mask):
        for layer in self:
            x = layer(x, mask=mask) if isinstance(layer, nn.modules.batchnorm._BatchNorm) else layer(x)
        return x


def network(sync):
    torch.manual_seed(0)
    norm = SyncBatchNorm if sync else ns.nn.BatchNorm2d
    return Net(
        nn.Conv2d(3, 8, 3), norm(8, activation="relu"), nn.Conv2d(8, 4, 1), norm(4), nn.Flatten(), nn.Linear(64, 5)
    ).double()


def references():
    """Two steps of the network in one process with all samples: parameters and buffers."""
    net = network(sync=False)
    train(net, lambda t: t, scale=1.0)
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def train(net, part, scale):
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for k in range(2):
        x, target, mask = whole(3, 6, 6, seed=10 + k), whole(5, seed=20 + k), whole(4, 4, seed=30 + k) > -0.5
        mask[1:3] = False  # samples without a cell
        loss = net(part(x), part(mask)).sub(part(target)).square().sum() * scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def matches(net, get=lambda t: t):
    truth = references()
    state = {name.removeprefix("module."): get(t) for name, t in net.state_dict().items()}
    assert state.keys() == truth.keys()
    for name, t in truth.items():
        # 1e-12 on one layer; two steps through two of them and a loss that grows with the batch
        assert error(state[name], t.numpy()) < 1e-11, name


@check
def distributed_data_parallel():
    net = DistributedDataParallel(network(sync=True))
    train(net, share, scale=len(BATCHES))  # DDP averages over the ranks
    matches(net)


@check
def fully_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network(sync=True)
    mesh = init_device_mesh("cpu", (len(BATCHES),))
    for k in (0, 1, 2, 3, 5):
        fully_shard(net[k], mesh=mesh)
    fully_shard(net, mesh=mesh)
    train(net, share, scale=len(BATCHES))
    matches(net, lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t)


class Checkpointed(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x, mask):
        return self.net[4:](checkpoint(self.net[:4], x.requires_grad_(), mask, use_reentrant=self.reentrant), mask)


@check
def activation_checkpointing():
    for reentrant in (False, True):
        net = network(sync=True)
        train(DistributedDataParallel(Checkpointed(net, reentrant)), share, scale=len(BATCHES))
        matches(net)  # buffers, too: what is computed again does not enter again


@check
def what_is_not_finite_on_one_rank_stays_out_on_all():
    layer, clean = SyncBatchNorm(C, dtype=torch.float64), SyncBatchNorm(C, dtype=torch.float64)
    x = whole(C, 3)
    clean(share(x))
    x[-1, 2, 0] = float("inf")  # rank 3
    layer(share(x))
    assert (layer.running_mean[2], layer.running_var[2]) == (0, 1)
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(layer.running_mean[rest], clean.running_mean[rest])
    assert torch.equal(layer.running_var[rest], clean.running_var[rest])
    with ns.pause_statistics(layer):
        layer(share(x))
    assert layer.num_batches_tracked == 1


class Mine(ns.nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 1.0


@check
def synchronize_and_back():
    class Tanh(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).tanh() * 2

    torch.manual_seed(0)
    net = nn.Sequential(
        ns.nn.BatchNorm2d(C, activation="relu"), nn.BatchNorm2d(C), Tanh(C), nn.SyncBatchNorm(C), nn.InstanceNorm2d(C)
    ).double()
    x = whole(C, 3, 2, seed=9)
    as_batch_norm = copy.deepcopy(net)
    as_batch_norm[3] = nn.BatchNorm2d(C).double()
    truth = as_batch_norm(x)
    report = ns.synchronize(net)
    y = report.model(share(x))
    assert error(put_together(y), truth.detach().numpy()) < 1e-12
    for name, t in net.state_dict().items():
        assert torch.allclose(t, as_batch_norm.state_dict()[name], rtol=0, atol=1e-12), name
    ns.desynchronize(net)
    if rank() == 3:  # alone
        net(share(x))


@check
def in_float32_inside_a_narrow_model():
    x = whole(C, 3, dtype=torch.bfloat16)
    for first, second in ((keep_float32, ns.synchronize), (ns.synchronize, keep_float32)):
        net = nn.Sequential(nn.BatchNorm1d(C))
        first(net), second(net)
        net.bfloat16()
        y = net(share(x))
        assert (y.dtype, net[0].weight.dtype) == (torch.bfloat16, torch.float32)
        truth = oracle.normalize(x.double().numpy(), "[n] c [l]")
        assert error(put_together(y), truth) < torch.finfo(torch.bfloat16).eps


@check
def a_subclass_that_does_not_call_batch_norm():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return x - x.mean(0)

    net = nn.Sequential(Own(C))
    ns.synchronize(net)
    with raises("0 (Own)"):
        net(torch.randn(4, C))
    net.eval()
    net(torch.randn(4, C))


@contextlib.contextmanager
def raises(*words):
    with pytest.raises(ns.SynchronizationError) as caught:
        yield
    assert all(word in str(caught.value) for word in words), str(caught.value)


class Skips(nn.Module):
    def __init__(self, skip, group):
        super().__init__()
        self.first, self.second = SyncBatchNorm(C, process_group=group), SyncBatchNorm(2 * C, process_group=group)
        self.skip = skip

    def forward(self, x):
        if not self.skip:
            x = self.first(x)
        return self.second(torch.cat([x, x], 1))


@check
def a_rank_that_is_at_another_layer():
    net = Skips(rank() == 2, dist.new_group())
    with raises("different layers", "rank 0: first (SyncBatchNorm)", "rank 2: second (SyncBatchNorm)", "cure"):
        net(torch.randn(3, C))


@check
def a_rank_that_does_not_come():
    group = dist.new_group()
    layer = nn.Sequential(SyncBatchNorm(C, process_group=group))
    SyncBatchNorm.timeout, before = 0.5, SyncBatchNorm.timeout
    try:
        if rank() == 2:
            time.sleep(1.5)
            return
        start = time.monotonic()
        with raises("0 (SyncBatchNorm)", "alone", "cure"):
            layer(torch.randn(3, C))
        assert time.monotonic() - start < 10  # far below the process group's own limit
    finally:
        SyncBatchNorm.timeout = before


@check
def torchs_own_needs_a_gpu():
    """It asks for the device before it asks how many ranks there are: one alone fails, too."""
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        nn.SyncBatchNorm(C)(torch.ones(2, C, 3))


@check
def compiled_in_one_graph():
    import torch._dynamo

    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    if rank() in (1, 2):  # two ranks show it, and two processors compile twice as fast as for four
        return
    x, gy = whole(C, 3, seed=1), whole(C, 3, seed=2)
    outcomes = []
    for compiling in (False, True):
        layer = layer_of(SyncBatchNorm, torch.float64, process_group=groups[0], activation="gelu")
        mine = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiling else layer
        inputs = share(x).clone().requires_grad_()
        y = mine(inputs)
        y.backward(share(gy))
        outcomes.append([y, inputs.grad, layer.weight.grad, layer.running_var])
    for cls in (ns.nn.BatchNorm1d, Mine):  # a subclass breaks the graph, and is computed right
        layer = layer_of(cls, torch.float64, activation="gelu")
        ns.synchronize(layer, groups[0])
        inputs = share(x).clone().requires_grad_()
        y = torch.compile(layer, backend="eager", fullgraph=cls is not Mine)(inputs)
        y.backward(share(gy))
        outcomes.append([y, inputs.grad, layer.weight.grad, layer.running_var])
    for eager, *others in zip(*outcomes, strict=True):
        assert all(error(other, eager.detach().numpy()) < 1e-12 for other in others)


# --- recalibrate ------------------------------------------------------------------------------------------------------


def two_layers(build):
    torch.manual_seed(1)
    model = nn.Sequential(build(C), nn.Linear(4, 4), nn.Tanh(), build(C)).double()
    for layer in (model[0], model[3]):
        nn.init.uniform_(layer.weight, 0.5, 1.5)
    return model


def batches_of(counts):
    """As many batches as a rank has in `counts`, of its own sizes; all ranks know them all."""
    generator = torch.Generator().manual_seed(3)
    drawn = [
        [torch.randn(2 + k + r, C, 4, generator=generator, dtype=torch.float64) * (r + 1) + 10 * r for k in range(n)]
        for r, n in enumerate(counts)
    ]
    return drawn[rank()], [x for own in drawn for x in own], drawn


def pooled(xs):
    values = np.concatenate([x.detach().numpy().transpose(1, 0, 2).reshape(C, -1) for x in xs], axis=1)
    return values.mean(1), values.var(1, ddof=1)


def by_batch(layer, x):
    """One batch through the first three layers, by the definition."""
    v = x.numpy()
    n = (v - v.mean((0, 2), keepdims=True)) / np.sqrt(v.var((0, 2), keepdims=True) + 1e-5)
    affine = layer[0].weight.detach().numpy()[:, None], layer[0].bias.detach().numpy()[:, None]
    return torch.tanh(layer[1](torch.from_numpy(affine[0] * n + affine[1])))


@check
def recalibrated_by_count_on_uneven_ranks():
    for estimator in ("population", "mean"):
        own, everything, _ = batches_of((3, 1, 0, 2))
        model = two_layers(nn.BatchNorm1d)
        report = ns.recalibrate(model, own, estimator=estimator)
        assert "6 batches of 4 ranks" in report.notes[0], report.notes
        inputs = {0: everything, 3: [by_batch(model, x) for x in everything]}
        for k, xs in inputs.items():
            if estimator == "population":
                mean, var = pooled(xs)
            else:
                mean, var = (np.mean([pooled([x])[i] for x in xs], axis=0) for i in (0, 1))
            assert error(model[k].running_mean, mean) < 1e-12
            assert error(model[k].running_var, var) < 1e-12
            assert model[k].num_batches_tracked == 6
        for buffer in model.buffers():
            assert all(torch.equal(buffer, other) for other in everyone(buffer)), "ranks disagree"
        # The averages of the ranks' own statistics are something else: ranks with many values would count too little.
        if estimator == "population":
            alone = two_layers(nn.BatchNorm1d)
            if own:
                ns.recalibrate(alone, own, group="own")
            averaged = sum(everyone(alone[0].running_var)) / 4
            assert error(averaged, pooled(everything)[1]) > 0.1


@check
def recalibrated_alone_where_asked():
    own, _, _ = batches_of((1, 2, 1, 2))
    model = two_layers(nn.BatchNorm1d)
    if rank() < 2:  # the others do not even call it
        ns.recalibrate(model, own, group="own")
        assert error(model[0].running_mean, pooled(own)[0]) < 1e-12


@check
def recalibrated_with_synchronized_layers_and_uneven_ranks():
    counts = (2, 3, 1, 1)
    own, everything, drawn = batches_of(counts)
    model = two_layers(SyncBatchNorm)
    ns.recalibrate(model, own)
    assert error(model[0].running_mean, pooled(everything)[0]) < 1e-12
    assert error(model[0].running_var, pooled(everything)[1]) < 1e-12
    # In the first step all ranks have a batch and normalize together, later each by itself.
    together = by_batch(model, torch.cat([batches[0] for batches in drawn]))
    later = [by_batch(model, x) for batches in drawn for x in batches[1:]]
    mean, var = pooled([together, *later])
    assert error(model[3].running_mean, mean) < 1e-12
    assert error(model[3].running_var, var) < 1e-12
    assert not collective._ALONE


@check
def recalibration_fails_on_all_ranks_or_none():
    own, _, _ = batches_of((1, 2, 0, 1))
    bad = [torch.full((4, C, 4), float("nan"), dtype=torch.float64)] if rank() == 1 else own
    for build in (nn.BatchNorm1d, SyncBatchNorm):
        model = two_layers(build)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ns.DataError if rank() == 1 else (ns.SynchronizationError, ns.DataError)):
            ns.recalibrate(model, bad)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert not collective._ALONE
    with pytest.raises(ns.DataError, match="the loader is empty"):
        ns.recalibrate(two_layers(nn.BatchNorm1d), [])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checks", nargs="*", metavar="CHECK")
    parser.add_argument("--reports", type=Path)
    arguments = parser.parse_args()
    names = [function.__name__ for function in CHECKS]
    if not set(arguments.checks) <= set(names):
        parser.error(f"the checks are {', '.join(names)}")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for text in (".*deprecated.*", ".*should not be instantiated.*"):  # torch's own code: fully_shard, the compiler
        warnings.filterwarnings("ignore", text)
    SyncBatchNorm.timeout = 20.0
    dist.init_process_group("gloo")
    outcome = {}
    for function in CHECKS:
        if function.__name__ not in (arguments.checks or names):
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            function()
            outcome[function.__name__] = ""
        except BaseException:
            outcome[function.__name__] = traceback.format_exc()
        failed = {k: report for k, report in enumerate(everyone_says(outcome[function.__name__])) if report}
        if arguments.reports is None and rank() == 0:
            verdict = "\n".join(f"fails on rank {k}\n{report}" for k, report in failed.items()) or "holds"
            sys.stdout.write(f"{function.__name__:55} {time.monotonic() - start:4.1f} s  {verdict}\n")
    if arguments.reports is not None:
        (arguments.reports / f"{rank()}.json").write_text(json.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
    return int(arguments.reports is None and any(outcome.values()))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Gloo's threads outlive `destroy_process_group`. One that touches a Python object while the interpreter is taken
    # down is ended in the middle of C++: "terminate called without an active exception", once in some hundred runs.
    os._exit(status)
