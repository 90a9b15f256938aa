"""`adapt`: the formulas by NumPy, the guard on planted shifts and mixes of classes, and under every fault."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import normscope as ns
from normscope.surgery import freeze, state_hash
from normscope.surgery.adapt import Adaptation, judge

CLASSES = 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def oracle(xs, prior, mean, var):
    """The mixture of the definition, one layer."""
    values = np.concatenate([x.double().numpy().swapaxes(0, 1).reshape(x.shape[1], -1) for x in xs], axis=1)
    n = sum(len(x) for x in xs)
    return (prior * mean + n * values.mean(1)) / (prior + n), (prior * var + n * values.var(1, ddof=1)) / (prior + n)


LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "BatchNorm2d": (lambda: ns.nn.BatchNorm2d(4, activation="relu"), (8, 4, 3, 3)),
    "Norm": (lambda: ns.nn.Norm("[n] c [h w]", 4, running=True), (8, 4, 3, 3)),
    "SyncBatchNorm": (lambda: ns.nn.SyncBatchNorm(4), (8, 4, 5)),
}


@pytest.mark.parametrize("prior", [0.0, 16.0, 1e12])
@pytest.mark.parametrize("name", LAYERS)
def test_the_statistics_are_the_papers(name, prior):
    build, shape = LAYERS[name]
    layer = build().eval()
    layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    mean, var = (b.double().numpy().copy() for b in (layer.running_mean, layer.running_var))
    loader = [torch.randn(shape) * 3 + 5 for _ in range(8)]
    report = ns.adapt(layer, loader, prior=prior, guard=False)
    given = [x for k, x in enumerate(loader) if k % 4 != 3]  # every fourth is held out
    expected = oracle(given, prior, mean, var)
    # float32 buffers.
    np.testing.assert_allclose(layer.running_mean.numpy(), expected[0], rtol=2e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), expected[1], rtol=2e-6)
    assert report.details["adaptation"].samples[0] == 48
    assert layer.num_batches_tracked == 0


def test_later_layers_are_measured_on_what_they_will_receive():
    """One pass over one batch: the second layer's statistics are those of its input in the adapted model."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3)).eval()
    x = torch.randn(64, 3) * 5 + 3
    ns.adapt(model, [x, x], prior=16, guard=False)
    with torch.no_grad():
        inner = model[:2](x)
    expected = oracle([inner], 16, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(model[2].running_mean.numpy(), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model[2].running_var.numpy(), expected[1], rtol=1e-5)


# --- a problem with classes -------------------------------------------------------------------------------------------


def draw(labels, seed=5):
    """A bright patch at one of six places: what the channels of a convolution see does not depend on the class."""
    x = 0.3 * torch.randn(len(labels), 1, 8, 11, generator=torch.Generator().manual_seed(seed))
    for k, label in enumerate(labels.tolist()):
        row, column = 1 + 3 * (label // 3), 1 + 3 * (label % 3)
        x[k, 0, row : row + 2, column : column + 2] += 1.5
    return x


def trained():
    """A convolution whose normalizer is blind to the class, and one behind it that is not."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 9, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip
    return fit(model)


def fit(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        labels = torch.randint(CLASSES, (64,))
        loss = nn.functional.cross_entropy(model(draw(labels, seed=step)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ns.recalibrate(model, [draw(torch.arange(600) % CLASSES, seed=9)], progress=False)
    return model.eval()


TRAINED = trained()


def loader(classes, change=lambda x: x, n=240):
    labels = torch.tensor(classes)[torch.randint(len(classes), (n,), generator=torch.Generator().manual_seed(6))]
    x = change(draw(labels))
    return list(zip(x.split(20), labels.split(20), strict=True))


def accuracy(model, batches):
    with torch.no_grad():
        return torch.cat([model.eval()(x).argmax(1) == y for x, y in batches]).double().mean().item()


def shifted(x):
    return x * 0.3 + 4


def hits(output, batch):
    return (output.argmax(1) == batch[1]).double()


EVERY = list(range(CLASSES))


@pytest.mark.parametrize("method", ["statistics", "entropy"])
def test_a_shift_is_adapted_to(method):
    model, data = copy.deepcopy(TRAINED), loader(EVERY, shifted)
    assert accuracy(model, loader(EVERY)) > 0.9
    before, grads, flags = (
        state_hash(model),
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    was = accuracy(model, data)
    report = ns.adapt(model, data, method=method)
    assert accuracy(model, data) > was + 0.3
    assert report.changed == ("1", "5")
    adaptation = report.details["adaptation"]
    assert adaptation.shift[0] > adaptation.shift[1]
    assert adaptation.classes[0] > adaptation.classes[1]
    assert adaptation.samples == (180, 60)
    assert [p.grad for p in model.parameters()] == grads
    assert [m.training for m in model.modules()] == flags
    assert all(p.requires_grad for p in model.parameters())
    report.undo()
    assert state_hash(model) == before


def test_entropy_falls_on_the_part_held_out():
    model = copy.deepcopy(TRAINED)
    data = loader(EVERY, shifted, n=2400)
    only = ns.adapt(model, data, copy=True).details["adaptation"].entropy
    both = ns.adapt(model, data, copy=True, method="entropy").details["adaptation"].entropy
    assert both[0] == only[0]
    assert both[1] < only[1]


@pytest.mark.parametrize("classes", [[0], [1], [2, 5]])
def test_a_mix_of_classes_is_not_taken_for_a_shift(classes):
    """What adapting to the batch does to a healthy model there, as AdaBN does without a guard: it loses."""
    data = loader(classes)
    model = copy.deepcopy(TRAINED)
    before, was = state_hash(model, rng=True), accuracy(model, data)
    assert accuracy(ns.adapt(model, data, prior=0, guard=False, copy=True).model, data) < was - 0.2
    with pytest.raises(ns.ProofError, match=r"mix of classes"):
        ns.adapt(model, data)
    assert state_hash(model, rng=True) == before


def test_nothing_to_adapt_to_is_said():
    with pytest.raises(ns.ProofError, match=r"the first normalizer sees no shift"):
        ns.adapt(copy.deepcopy(TRAINED), loader(EVERY))


@pytest.mark.parametrize("classes", [[0], [3], [2, 5]])
def test_a_mix_of_classes_under_a_shift_is_refused_too(classes):
    with pytest.raises(
        ns.ProofError, match=r"predictions on the part held out fall into [12]\.\d classes, fewer than 2"
    ):
        ns.adapt(copy.deepcopy(TRAINED), loader(classes, shifted))


@pytest.mark.parametrize("classes", [[0], [3], [2, 5]])
def test_the_first_normalizer_alone_gains_there_as_the_refusal_says(classes):
    model, data = copy.deepcopy(TRAINED), loader(classes, shifted)
    with pytest.raises(ns.ProofError, match="select='1' with guard=False adapts the first normalizer alone"):
        ns.adapt(model, data)
    was, adapted = accuracy(model, data), ns.adapt(model, data, guard=False, copy=True).model
    report = ns.adapt(model, data, select="1", guard=False)
    assert report.changed == ("1",)
    assert accuracy(model, data) >= max(was + 0.2, accuracy(adapted, data))


@pytest.mark.parametrize(
    ("first", "all_adapted", "refused"),
    [
        (4.2, 5.6, "spreads the predictions from 4.2 over 5.6 classes, fewer than 6.5"),
        (4.2, 4.2, None),  # few classes, and they stay those
        (4.7, 8.9, None),  # a strong shift, of which one layer undoes half
        (9.7, 9.8, None),
        (3.9, 8.9, "fall into 3.9 classes, fewer than 4.0"),
    ],
)
def test_predictions_that_spread_without_getting_balanced_are_refused(first, all_adapted, refused):
    measured = Adaptation("1", (0.6, 0.1), None, (first, 4.0), (all_adapted, 6.5), (0.5, 0.4), None, (160, 40))
    with pytest.raises(ns.ProofError, match=refused) if refused else contextlib.nullcontext():
        judge(measured)


def test_a_first_layer_that_sees_the_classes_cannot_judge():
    """In a perceptron one class is a shift for the first normalizer already."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(88, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    fit(model)
    data = loader([1])
    was = accuracy(model, data)
    report = ns.adapt(model, data, prior=0, guard=False, copy=True)
    assert accuracy(report.model, data) < was - 0.2
    measured = report.details["adaptation"]
    assert measured.shift[0] > measured.shift[1]
    with pytest.raises(ns.ProofError, match="differ between the predicted classes"):
        ns.adapt(model, data, prior=0)


def test_a_metric_decides_instead():
    model, data = copy.deepcopy(TRAINED), loader([0])
    with pytest.raises(ns.ProofError, match="adaptation would lower the metric from"):
        ns.adapt(model, data, metric=hits, prior=0)
    report = ns.adapt(model, loader(EVERY, shifted), metric=hits)
    before, after, error = report.details["adaptation"].metric
    held = loader(EVERY, shifted)[3::4]
    assert after == pytest.approx(accuracy(model, held))
    assert before == pytest.approx(accuracy(TRAINED, held))
    gains = torch.cat([hits(model(x), (x, y)) - hits(TRAINED(x), (x, y)) for x, y in held])
    assert error == pytest.approx(gains.std().item() / math.sqrt(len(gains)))


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(88, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES))


def test_entropy_adapts_normalizers_of_any_kind():
    model = perceptron()
    linear = model[1].weight.clone()
    data = loader(EVERY)
    report = ns.adapt(model, data, method="entropy", guard=False)
    assert report.changed == ("2",)
    assert (model[2].weight != 1).all()
    assert torch.equal(model[1].weight, linear)
    # Adam's first steps are as long as its rate: nine of them.
    assert (model[2].weight - 1).abs().max() <= 9.5e-3


def test_one_step_of_entropy_is_tents():
    """Against the paper's recipe written out: Adam on γ and β, mean entropy, one step per batch."""
    model = perceptron()
    peer, data = copy.deepcopy(model), loader(EVERY)
    ns.adapt(model, data, method="entropy", guard=False)
    optimizer = torch.optim.Adam(peer[2].parameters(), 1e-3)
    for k, (x, _) in enumerate(data):
        if k % 4 == 3:
            continue
        p = torch.distributions.Categorical(logits=peer(x))
        optimizer.zero_grad()
        p.entropy().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model[2].weight, peer[2].weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(model[2].bias, peer[2].bias, atol=1e-5, rtol=0)


def test_frozen_layers_stay():
    model = copy.deepcopy(TRAINED)
    freeze(model, select="1")
    mean = model[1].running_mean.clone()
    report = ns.adapt(model, loader(EVERY, shifted), guard=False)
    assert dict(report.skipped) == {"1": "frozen"}
    assert report.changed == ("5",)
    assert torch.equal(model[1].running_mean, mean)


@pytest.mark.parametrize(
    ("model", "options", "error", "sentence"),
    [
        (TRAINED, {"prior": -1}, ns.ArgumentError, "prior must be a number of samples"),
        (TRAINED, {"prior": float("nan")}, ns.ArgumentError, "prior must be a number of samples"),
        (TRAINED, {"method": "tent"}, ns.ArgumentError, "method 'tent' is unknown"),
        (TRAINED, {"batches": 1}, ns.ArgumentError, "batches must be at least 2"),
        (TRAINED, {"select": "nothing"}, ns.ArgumentError, "select matches no normalizer"),
        (nn.Linear(11, 3), {}, ns.ArgumentError, "no running statistics"),
        (nn.Linear(11, 3), {"method": "entropy"}, ns.ArgumentError, "no normalizer of this model has γ or β"),
        (nn.BatchNorm2d(1), {"forward": lambda m, b: m(b[0]).sum((1, 2, 3))}, ns.ArgumentError, "no class scores"),
        (nn.BatchNorm2d(1), {"forward": lambda m, b: m(b[0][:1, :, :1, :1])}, ns.DataError, "one value per channel"),
        (nn.BatchNorm2d(1), {"forward": lambda m, b: m(b[0] / 0)}, ns.DataError, "NaN or infinity"),
        (nn.LayerNorm(11), {"method": "entropy", "forward": lambda m, b: m(b[0]).sum(1)}, ns.ArgumentError, "scores"),
    ],
)
def test_errors_leave_the_model_as_it_was(model, options, error, sentence):
    model = copy.deepcopy(model)
    before = state_hash(model, rng=True)
    with pytest.raises(error, match=sentence):
        ns.adapt(model, loader(EVERY, shifted), **options)
    assert state_hash(model, rng=True) == before


def test_loaders():
    with pytest.raises(ns.ArgumentError, match="a tensor is one batch"):
        ns.adapt(TRAINED, torch.zeros(3, 1, 8, 11))
    with pytest.raises(ns.DataError, match="the loader has 1 batches"):
        ns.adapt(TRAINED, loader(EVERY)[:1])
    endless = iter(lambda: loader(EVERY, shifted)[0], None)
    assert ns.adapt(TRAINED, endless, batches=8, copy=True, guard=False).details["adaptation"].samples == (120, 40)
