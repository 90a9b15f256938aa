"""`recalibrate` against float64 NumPy over the concatenated batches, and under every fault."""

# ruff: noqa: NPY002 - the global generator is what must be restored

import contextlib
import copy
import importlib.util
import itertools
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.surgery import freeze, recalibrate, state_hash


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def draw(*shapes, offset=3.0):
    return [
        offset + (1 + torch.rand(shape[1]).view(-1, *[1] * (len(shape) - 2))) * torch.randn(shape) for shape in shapes
    ]


def sets_of(x, kind):
    """Every set of values as rows of (channels, values): one for a batch, one per sample for an instance."""
    x = x.double().numpy()
    rows = [x[None]] if kind == "BatchNorm" else [sample[None, None] for sample in x]
    return [np.moveaxis(r[0], 1, 0).reshape(r[0].shape[1], -1) for r in rows]


def oracle(batches, estimator, kind="BatchNorm"):
    """μ and σ² of the channels from the definition."""
    calls = [sets_of(x, kind) for x in batches]
    if estimator == "population":
        values = np.concatenate([s for call in calls for s in call], axis=1)
        return values.mean(1), values.var(1, ddof=1)
    means = [np.mean([s.mean(1) for s in call], axis=0) for call in calls]
    variances = [np.mean([s.var(1, ddof=1) for s in call], axis=0) for call in calls]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


def close(layer, expected, rtol=2e-6):
    mean, var = expected
    np.testing.assert_allclose(layer.running_mean.double().numpy(), mean, rtol=rtol)
    np.testing.assert_allclose(layer.running_var.double().numpy(), var, rtol=rtol)


LAYERS = {
    "torch 1d": (lambda: nn.BatchNorm1d(4), [(7, 4), (3, 4), (12, 4)]),
    "torch 1d sequence": (lambda: nn.BatchNorm1d(4), [(7, 4, 5), (3, 4, 2), (1, 4, 9)]),
    "torch 2d": (lambda: nn.BatchNorm2d(4), [(5, 4, 3, 2), (2, 4, 3, 2), (8, 4, 3, 2)]),
    "torch 3d": (lambda: nn.BatchNorm3d(4), [(5, 4, 3, 2, 2), (2, 4, 3, 2, 1)]),
    "torch sync": (lambda: nn.SyncBatchNorm(4), [(5, 4, 3), (2, 4, 3)]),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), [(5, 4, 3, 2), (2, 4, 3, 2)]),
    "ours 1d": (lambda: ns.nn.BatchNorm1d(4, activation="relu"), [(7, 4), (3, 4)]),
    "ours 2d": (lambda: ns.nn.BatchNorm2d(4), [(5, 4, 3, 2), (2, 4, 3, 2)]),
    "ours 3d": (lambda: ns.nn.BatchNorm3d(4), [(5, 4, 3, 2, 2), (2, 4, 3, 2, 1)]),
    "Norm": (lambda: ns.nn.Norm("[n] c [h w]", 4, running=True), [(5, 4, 3, 2), (2, 4, 3, 2)]),
    "subclass": (lambda: type("Mine", (nn.BatchNorm2d,), {})(4), [(5, 4, 3, 2), (2, 4, 3, 2)]),
    "instance": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), [(5, 4, 3, 2), (2, 4, 5, 5)]),
    "our instance": (lambda: ns.nn.InstanceNorm1d(4, track_running_stats=True), [(5, 4, 3), (2, 4, 5)]),
}


@pytest.mark.parametrize("estimator", ["population", "mean"])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_the_concatenated_batches(name, estimator):
    build, shapes = LAYERS[name]
    layer, batches = build().eval(), draw(*shapes)
    report = recalibrate(layer, batches, estimator=estimator)
    close(layer, oracle(batches, estimator, "InstanceNorm" if "instance" in name else "BatchNorm"))
    assert report.changed == ("",)
    assert layer.num_batches_tracked == len(batches)
    assert not layer.training


@pytest.mark.parametrize("estimator", ["population", "mean"])
def test_any_scope(estimator):
    batches = draw((6, 3, 4), (2, 3, 4))
    values = torch.cat(batches).double().numpy()
    per_step = ns.nn.Norm("[n] t c", (4, 3), params="c t", running=True)
    recalibrate(per_step, batches, estimator=estimator)
    if estimator == "population":
        close(per_step, (values.mean(0).T, values.var(0, ddof=1).T))
    ghost = ns.nn.Norm("(g [n]) c", 3, g=2, running=True)
    flat = draw((6, 3), (4, 3))
    recalibrate(ghost, flat, estimator=estimator)
    halves = [half.double().numpy() for x in flat for half in x.chunk(2)]
    if estimator == "population":
        whole = np.concatenate(halves)
        close(ghost, (whole.mean(0), whole.var(0, ddof=1)))
    else:
        close(ghost, (np.mean([h.mean(0) for h in halves], 0), np.mean([h.var(0, ddof=1) for h in halves], 0)))
    square = ns.nn.Norm("[n] c", 3, center=False, running=True)
    recalibrate(square, flat, estimator=estimator)
    squares = [(x.double().numpy() ** 2).mean(0) for x in flat]
    expected = np.average(squares, axis=0, weights=[6, 4] if estimator == "population" else [1, 1])
    close(square, (np.zeros(3), expected))


def test_far_off_centre_nothing_is_lost():
    batches = [x.double() for x in draw((64, 3), (32, 3), offset=0.0)]
    far = [x + 1e8 for x in batches]
    layer = nn.BatchNorm1d(3).double()
    recalibrate(layer, far)
    # The means err by 1e8 · 2⁻⁵³, which is 1e-8; E[x²] − E[x]² would err by 1.
    close(layer, oracle(far, "population"), rtol=1e-8)


def test_mean_is_what_torch_calls_update_bn():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    batches = draw((8, 5), (3, 5), (6, 5))
    theirs = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, theirs)
    recalibrate(model, batches, estimator="mean")
    for ours, other in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    """Dropout, a layer used twice, one never used, one frozen and one on a side path."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.twice = ns.nn.BatchNorm2d(4, activation="relu")
        self.unused, self.group = nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.cold = nn.BatchNorm2d(4)
        self.head, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None)
        self.seen = []

    def forward(self, image):
        self.seen.append(image.shape)
        y = self.drop(self.bn(self.conv(image)))
        y = self.group(self.twice(self.twice(y) + 1))
        return self.last(self.head(self.cold(y).mean((2, 3))))


def net():
    model = Net()
    for buffer in model.buffers():
        buffer.data = torch.rand_like(buffer) + 0.5 if buffer.is_floating_point() else buffer + 7
    freeze(model, select="cold")
    y = model(torch.randn(4, 3, 6, 6))
    (y * torch.randn_like(y)).sum().backward()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def inputs(model, batches):
    """What the layers receive with normalization by the batch and everything else in evaluation, seen from outside."""
    model, seen = copy.deepcopy(model).eval(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = name != "cold"
            module.register_forward_hook(lambda m, a, o, name=name: seen.setdefault(name, []).append(a[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return seen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ["population", "mean"])
def test_a_network_in_one_pass(estimator, training):
    model, batches = net().train(training), draw((4, 3, 6, 6), (2, 3, 5, 5), (7, 3, 6, 6))
    seen = inputs(model, batches)
    kept = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in ("unused", "cold")}
    report = recalibrate(model, batches, estimator=estimator)
    for name in ("bn", "twice", "last"):
        close(model.get_submodule(name), oracle(seen[name], estimator), rtol=1e-4)
    assert report.changed == ("bn", "twice", "last")
    assert [name for name, _ in report.skipped] == ["cold", "unused"]
    assert dict(report.skipped)["cold"] == "frozen"
    assert dict(report.skipped)["unused"].startswith("never reached")
    for name, state in kept.items():
        assert all(torch.equal(state[key], value) for key, value in model.get_submodule(name).state_dict().items())
    assert model.bn.num_batches_tracked == 3
    assert model.twice.num_batches_tracked == 6


def test_nothing_but_the_statistics_changes():
    model = net()
    rng = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def loader():
        for _ in range(3):
            np.random.rand(), random.random()
            yield torch.randn(4, 3, 6, 6)

    report = recalibrate(model, loader())
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"{n}.{b}" for n in report.changed for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert len(model.seen) == 1
    assert torch.equal(torch.get_rng_state(), rng[2])
    assert random.getstate() == rng[0]
    assert (np.random.get_state()[1] == rng[1]).all()
    assert model.last.momentum is None
    assert model.bn.momentum == 0.1


def test_undo_and_copy():
    model, batches = net(), draw((4, 3, 6, 6))
    before = state_hash(model)
    report = recalibrate(model, batches)
    assert state_hash(model) != before
    assert report.undo() is model
    assert state_hash(model) == before
    duplicate = recalibrate(model, batches, copy=True)
    assert state_hash(model) == before
    assert duplicate.model is not model
    assert not torch.equal(duplicate.model.bn.running_mean, model.bn.running_mean)


def test_undo_keeps_what_was_trained_since():
    model = net()
    mean = model.bn.running_mean.clone()
    report = recalibrate(model, draw((4, 3, 6, 6)))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    trained = model.conv.weight.detach().clone()
    report.undo()
    assert torch.equal(model.conv.weight, trained)
    assert torch.equal(model.bn.running_mean, mean)


def test_momentum_none_goes_on_counting():
    layer, batches = nn.BatchNorm1d(3, momentum=None), draw((5, 3), (5, 3), (5, 3))
    recalibrate(layer, batches[:2], estimator="mean")
    layer.train()(batches[2])
    close(layer, oracle(batches, "mean"))


# --- which layers -------------------------------------------------------------------------------------------------


def test_evaluated_by_hand_counts_as_frozen_while_the_model_trains():
    model, batches = net().train(), draw((4, 3, 6, 6))
    model.bn.eval()
    before = model.bn.running_mean.clone()
    report = recalibrate(model, batches)
    assert dict(report.skipped)["bn"].startswith("in evaluation mode while the model trains")
    assert torch.equal(model.bn.running_mean, before)
    assert recalibrate(model, batches, select="bn").changed == ("bn",)


def test_unselected_layers_normalize_by_what_they_have():
    model, batches = net().eval(), draw((4, 3, 6, 6), (2, 3, 6, 6))
    other = copy.deepcopy(model)
    recalibrate(model, batches, select=lambda name, module: name == "last")
    seen = []
    other.last.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            other(batch)
    close(model.last, oracle(seen, "population"), rtol=1e-5)
    with pytest.raises(ns.ArgumentError, match="select matches no normalizer"):
        recalibrate(model, batches, select="nothing.*")


def test_layers_that_cannot_be_recalibrated_are_named():
    class PowerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x):
            return (x - self.running_mean) / self.running_var.sqrt()

    model = nn.Sequential(
        PowerNorm(),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.LayerNorm(3),
        nn.LazyBatchNorm1d(),
        nn.InstanceNorm1d(1),
    )
    report = recalibrate(model, [])
    assert dict(report.skipped) == {
        "0": "PowerNorm keeps running statistics in a way unknown here",
        "1": "keeps no running statistics",
        "3": "lazy and not yet initialized: run one forward first",
        "4": "keeps no running statistics",
    }
    assert report.changed == ()


def test_children_of_a_normalizer_stay_in_evaluation():
    class WithDropout(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(super().forward(x))

    model, batches = nn.Sequential(WithDropout(), nn.BatchNorm1d(3)), draw((64, 3))
    recalibrate(model, batches)
    # With dropout the variance would be doubled.
    torch.testing.assert_close(model[1].running_var, torch.full((3,), 64 / 63), rtol=1e-4, atol=0)


def test_unbatched_instances():
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    x = torch.randn(3, 5, 5)
    recalibrate(layer, [x], forward=lambda model, batch: model(batch))
    close(layer, oracle([x[None]], "population"))


def test_masked_cells_do_not_count():
    layer = ns.nn.BatchNorm1d(3)
    x, mask = draw((6, 3, 5))[0], torch.rand(6, 5) < 0.5
    x = torch.where(mask[:, None], x, torch.nan)
    for estimator in ("population", "mean"):
        recalibrate(
            layer, [(x, mask)], estimator=estimator, forward=lambda model, batch: model(batch[0], mask=batch[1])
        )
        values = x.movedim(1, -1)[mask].double().numpy()
        close(layer, (values.mean(0), values.var(0, ddof=1)))
    kept = layer.running_mean.clone()
    nothing = torch.zeros(6, 5, dtype=torch.bool)
    recalibrate(layer, [x], forward=lambda model, batch: model(batch, None, nothing))
    assert torch.equal(layer.running_mean, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float64(dtype):
    layer = nn.BatchNorm2d(3).to(dtype)
    batches = [x.to(dtype) for x in draw((8, 3, 16, 16), (3, 3, 16, 16))]
    recalibrate(layer, batches)
    mean, var = oracle(batches, "population")
    assert torch.equal(layer.running_mean, torch.tensor(mean).to(dtype))
    assert torch.equal(layer.running_var, torch.tensor(var).to(dtype))


def test_compiled_models_are_measured_too():
    model, batches = net().eval(), draw((4, 3, 6, 6), (2, 3, 6, 6))
    plain = recalibrate(model, batches, copy=True).model
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    report = recalibrate(compiled, batches)
    assert "_orig_mod.bn" in report.changed
    assert torch.equal(model.bn.running_mean, plain.bn.running_mean)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batches[0]), plain(batches[0]))


# --- loaders ------------------------------------------------------------------------------------------------------


def test_reads_no_batch_more_than_asked():
    endless, read = itertools.count(), []

    def loader():
        for k in endless:
            read.append(k)
            yield torch.randn(4, 3, 6, 6)

    report = recalibrate(net(), loader(), batches=5)
    assert read == [0, 1, 2, 3, 4]
    assert report.notes == ("5 batches, estimator 'population'",)
    assert recalibrate(net(), draw(*[(2, 3, 6, 6)] * 3), batches=None).notes[0].startswith("3 batches")


def test_batches_of_every_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, pixels, *, scale):
            return self.bn(pixels * scale)

    x = draw((8, 3))[0]
    two = Two()
    recalibrate(two, [{"label": torch.zeros(8), "scale": torch.tensor(2.0), "pixels": x}])
    close(two.bn, oracle([2 * x], "population"))
    for batch in ((x, torch.zeros(8)), [x, "name"], {"image": x, "label": torch.zeros(8)}, x):
        layer = nn.BatchNorm1d(3)
        recalibrate(layer, [batch])
        close(layer, oracle([x], "population"))
    layer = nn.BatchNorm1d(3)
    recalibrate(layer, [{"deep": {"x": x}}], forward=lambda model, batch: model(batch["deep"]["x"]))
    close(layer, oracle([x], "population"))


class Angry:
    """A loader whose length is not to be had."""

    def __iter__(self):
        return iter(draw((4, 3)))

    def __len__(self):
        raise TypeError


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_progress_goes_to_stderr_on_request(capsys, progress, shown):
    recalibrate(nn.BatchNorm1d(3), Angry(), progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("recalibrate" in err) == shown


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (([],), ns.DataError, "the loader is empty"),
        ((iter(()),), ns.DataError, "the loader is empty"),
        (([torch.zeros(4, 3)], 0), ns.ArgumentError, "batches must be at least 1"),
        (([torch.zeros(4, 3)], 1, "median"), ns.ArgumentError, "estimator 'median' is unknown"),
        ((torch.zeros(4, 3),), ns.ArgumentError, "a tensor is one batch"),
        (([{"a": "text"}],), ns.ArgumentError, "a batch of type str holds no input"),
        (([None],), ns.ArgumentError, "a batch of type NoneType"),
        (([()],), ns.ArgumentError, "a batch of type tuple"),
        (([torch.zeros(1, 3)],), ns.DataError, "every batch has one value per channel"),
        (([torch.randn(4, 3), torch.full((4, 3), torch.nan)],), ns.DataError, "batch 2 brings NaN or infinity"),
        (([torch.full((4, 3), torch.inf)],), ns.DataError, "batch 1 brings NaN or infinity"),
    ],
)
def test_bad_input_is_named_and_leaves_the_model_alone(arguments, error, sentence):
    layer = nn.BatchNorm1d(3)
    before = state_hash(layer)
    with pytest.raises(error, match=sentence) as caught:
        recalibrate(layer, *arguments)
    assert "cure:" in str(caught.value)
    assert state_hash(layer) == before


def test_a_last_batch_of_one_sample_is_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    batches = draw((8, 3), (1, 3), (4, 3))
    other = copy.deepcopy(model)
    report = recalibrate(model, batches)
    recalibrate(other, [batches[0], batches[2]])
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert report.notes[1].startswith("1 batches left out")


def test_a_batch_left_out_counts_in_no_layer():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    batches = draw((4, 3, 5, 5), (1, 3, 5, 5))  # of one sample the first layer could make something
    recalibrate(model, batches)
    close(model[0], oracle(batches[:1], "population"))
    assert model[0].num_batches_tracked == 1


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", ["loader", "forward", "hook", "layer"])
@pytest.mark.parametrize("k", range(4))
def test_a_fault_at_any_batch_leaves_no_trace(place, k, error):
    model = net()
    count = itertools.count()

    def fail(*_):
        if next(count) == k:
            raise error("injected")

    def loader():
        for _ in range(4):
            if place == "loader":
                fail()
            yield torch.randn(4, 3, 6, 6)

    def forward(model, batch):
        if place == "forward":
            fail()
        return model(batch)

    if place == "hook":
        model.last.register_forward_hook(fail)
    if place == "layer":
        model.twice.register_forward_pre_hook(fail)
    before = state_hash(model, rng=True)
    with pytest.raises((error, RuntimeError)):
        recalibrate(model, loader(), forward=forward)
    assert state_hash(model, rng=True) == before


def test_a_copy_that_fails_leaves_the_model_alone():
    model = net()
    model.generator = (k for k in range(3))  # cannot be copied
    before = state_hash(model)
    with pytest.raises(ns.ArgumentError, match="cannot be copied"):
        recalibrate(model, draw((4, 3, 6, 6)), copy=True)
    assert state_hash(model) == before


def test_inference_mode_is_fine():
    layer, batches = nn.BatchNorm1d(3), draw((4, 3))
    with torch.inference_mode():
        recalibrate(layer, batches)
    close(layer, oracle(batches, "population"))
    with contextlib.suppress(KeyError):
        layer.train()(batches[0]).sum().backward()


def test_layers_whose_statistics_are_not_theirs_to_measure():
    model = nn.ModuleDict(
        {"steps": ns.nn.RecurrentBatchNorm(4, 3), "frozen": ns.nn.FrozenBatchNorm(4), "plain": nn.BatchNorm1d(4)}
    )
    call = lambda m, x: [m["steps"](x[None]), m["frozen"](x), m["plain"](x)]  # noqa: E731
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("plain")}
    report = ns.recalibrate(model, [torch.randn(8, 4)] * 2, forward=call)
    assert report.changed == ("plain",)
    assert dict(report.skipped).keys() >= {"frozen", "steps"}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


# --- what torch's update_bn does instead ------------------------------------------------------------------------------


def test_update_bn_resets_frozen_layers_but_not_ours():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].running_mean.fill_(2)
    theirs, batches = copy.deepcopy(model), draw((8, 3), (8, 3))
    theirs[0].train = lambda mode=True: theirs[0]  # frozen by hand, as the usual recipes do
    theirs[0].training = False
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert torch.equal(theirs[0].running_mean, torch.zeros(3))  # reset, and never measured

    freeze(model, select="0")
    ours = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"ns\.unfreeze\(model\) first"):
        torch.optim.swa_utils.update_bn(batches, ours)
    assert torch.equal(ours[0].running_mean, model[0].running_mean)
    assert torch.equal(ours[0].running_var, model[0].running_var)
    # The other layer has been measured, on what the frozen one gives it.
    torch.testing.assert_close(ours[1].running_mean, torch.cat([ours[0](b) for b in batches]).mean(0))
    assert dict(recalibrate(model, batches).skipped) == {"0": "frozen"}
    assert torch.equal(model[0].running_mean, torch.full((3,), 2.0))


def test_dropout_widens_what_update_bn_measures_and_not_here():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).eval()
    theirs, batches = copy.deepcopy(model), draw((4000, 3), offset=0.0)
    torch.optim.swa_utils.update_bn(batches, theirs)
    recalibrate(model, batches)
    truth = batches[0].var(0)
    torch.testing.assert_close(model[1].running_var, truth)
    # Half of the values zero, the others doubled: twice the variance, to a tenth with 4000 samples.
    torch.testing.assert_close(theirs[1].running_var, 2 * truth, rtol=0.1, atol=0)


def test_a_failing_loader_leaves_update_bn_without_momentum_and_this_as_it_was():
    def failing():
        yield torch.randn(8, 3)
        raise OSError("disk gone")

    model = nn.BatchNorm1d(3)
    theirs, before = copy.deepcopy(model), state_hash(model)
    for call in (lambda: torch.optim.swa_utils.update_bn(failing(), theirs), lambda: recalibrate(model, failing())):
        with pytest.raises(OSError, match="disk gone"):
            call()
    assert theirs.momentum is None
    assert state_hash(model) == before


def test_instance_statistics_are_ignored_by_update_bn_and_not_here():
    model = nn.InstanceNorm1d(3, track_running_stats=True)
    theirs, batches = copy.deepcopy(model), draw((8, 3, 5))
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert torch.equal(theirs.running_mean, torch.zeros(3))
    recalibrate(model, batches)
    torch.testing.assert_close(model.running_mean, batches[0].mean((0, 2)))


def test_uneven_batches_weigh_the_same_in_update_bn_and_by_count_here():
    batches = [torch.zeros(2, 3) + torch.tensor([[-1.0], [1.0]]), torch.randn(1000, 3) + 10]
    model, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torch.optim.swa_utils.update_bn(batches, theirs)
    recalibrate(model, batches)
    torch.testing.assert_close(model.running_mean, torch.cat(batches).mean(0))
    assert (theirs.running_mean - 5).abs().max() < 0.1


def test_update_bn_forgets_the_modes_of_parts_and_this_does_not():
    model, batches = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), draw((8, 3))
    model[1].eval()  # on purpose, in a model that trains
    theirs = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, theirs)
    recalibrate(model, batches)
    assert (theirs[1].training, model[1].training) == (True, False)


def test_update_bn_loses_the_variance_between_batches():
    batches = [torch.randn(500, 3) - 5, torch.randn(500, 3) + 5]
    model, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torch.optim.swa_utils.update_bn(batches, theirs)
    recalibrate(model, batches)
    torch.testing.assert_close(model.running_var, torch.cat(batches).var(0))
    assert (theirs.running_var < 2).all()  # 1 within each batch, 25 between them


def test_instance_statistics_without_momentum_stand_still_in_torch_and_not_here():
    theirs, model = (nn.InstanceNorm1d(3, momentum=None, track_running_stats=True) for _ in range(2))
    theirs.train()(torch.randn(8, 3, 5) + 7)
    assert torch.equal(theirs.running_mean, torch.zeros(3))
    assert theirs.num_batches_tracked == 0
    assert dict(ns.accelerate(copy.deepcopy(model)).skipped)[""].startswith("torch's InstanceNorm never moves")
    (batch,) = draw((8, 3, 5))
    recalibrate(model, [batch])
    torch.testing.assert_close(model.running_mean, batch.mean((0, 2)))


# --- what fvcore does instead -----------------------------------------------------------------------------------------


def test_a_short_loader_leaves_fvcore_with_hooks_and_momentum_and_this_as_it_was():
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    model, batches = nn.Sequential(nn.BatchNorm1d(3)), draw((8, 3), (8, 3))
    theirs, before = copy.deepcopy(model), state_hash(model)
    with pytest.raises(AssertionError, match="meant to run for 4 iterations"):
        precise.update_bn_stats(theirs, batches, num_iters=4)
    assert theirs[0].momentum == 1.0
    assert theirs[0]._forward_pre_hooks
    report = recalibrate(model, batches, 4)  # what there is, and the report says how much that was
    assert "2 batches" in report.notes[0]
    assert model[0].momentum == 0.1
    assert state_hash(report.undo()) == before


def test_off_centre_the_variance_of_fvcore_is_negative_and_not_here():
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    batches = [torch.randn(64, 3) * 1e-3 + 1000 for _ in range(4)]
    model, theirs = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    precise.update_bn_stats(theirs, batches, num_iters=4)
    assert theirs[0].running_var.min() < 0
    recalibrate(model, batches)
    torch.testing.assert_close(model[0].running_var.double(), torch.cat(batches).double().var(0))


# --- what mmpretrain does instead -------------------------------------------------------------------------------------


def mmpretrains(monkeypatch):
    """The module of its PreciseBNHook; the packages above it would import torchvision and the rest of OpenMMLab."""
    pytest.importorskip("mmengine", exc_type=ImportError)
    spec = importlib.util.find_spec("mmpretrain") or pytest.skip("needs mmpretrain")
    for name in ("mmpretrain", "mmpretrain.engine", "mmpretrain.engine.hooks"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("mmpretrain.engine.hooks.precise_bn_hook")


class Preprocessed(nn.Sequential):
    """A model as mmengine has them."""

    def data_preprocessor(self, batch, training):
        return {"input": batch}


class Failing:
    """A loader whose second batch cannot be read."""

    batch_size = 8

    def __len__(self):
        return 2

    def __iter__(self):
        yield torch.randn(8, 3) + 5
        raise OSError("disk gone")


@pytest.mark.filterwarnings("ignore:.*")  # of what mmengine imports
def test_a_failing_loader_leaves_mmpretrain_with_momentum_one_and_this_as_it_was(monkeypatch, capsys):
    update_bn_stats = mmpretrains(monkeypatch).update_bn_stats
    model = Preprocessed(nn.BatchNorm1d(3))
    theirs, before = copy.deepcopy(model), state_hash(model)
    for call in (lambda: update_bn_stats(theirs, Failing()), lambda: recalibrate(model, Failing())):
        with pytest.raises(OSError, match="disk gone"):
            call()
    assert theirs[0].momentum == 1.0
    assert (theirs[0].running_mean > 3).all()  # those of the one batch that it has seen, 5 ± 0.4
    assert state_hash(model) == before
