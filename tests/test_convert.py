"""`convert` and `split_statistics`: by rule, calibrated, nothing lost, and nothing built that could not work."""

import copy
import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import normscope as ns
from normscope import cli
from normscope.surgery import freeze, is_frozen, state_hash, use_domain
from normscope.surgery.targets import Followed

X = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def net(first=24):
    model = nn.Sequential(
        nn.Conv2d(3, first, 3), nn.BatchNorm2d(first), nn.ReLU(),
        nn.Conv2d(first, 32, 3), ns.nn.BatchNorm2d(32, activation="relu"),
        nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    for layer in (model[1], model[4], model[6]):
        nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias)
    for _ in range(5):
        model(X + torch.randn_like(X))
    return model


LOADER = [X[:6], X[6:8], X[8:]]


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "changed"),
    [
        ({"BatchNorm": "LayerNorm2d"}, ("1", "4", "6")),
        ({"BatchNorm2d": "LayerNorm2d"}, ("1", "4", "6")),
        ({"[14]": "LayerNorm2d"}, ("1", "4")),
        ({nn.BatchNorm2d: "LayerNorm2d"}, ("1", "4", "6")),
        ({ns.nn.BatchNorm2d: ns.nn.LayerNorm2d}, ("4",)),
        ([(lambda name, module: name == "6", "LayerNorm2d")], ("6",)),
        ({"1": None, "BatchNorm": "LayerNorm2d"}, ("4", "6")),  # the first that fits counts
        ({"1": "GroupNorm(4)", "BatchNorm": "LayerNorm2d"}, ("1", "4", "6")),
    ],
)
def test_rules(rules, changed):
    model = net()
    assert ns.convert(model, rules).changed == changed
    first = "1" in rules and rules["1"]
    assert first is False or type(model[1]) is (ns.nn.GroupNorm if first else nn.BatchNorm2d)


def test_rules_that_leave_everything():
    assert ns.convert(net(), {"BatchNorm": None}, calibrate=LOADER).changed == ()


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ({"LayerNorm": "GroupNorm(2)"}, "'LayerNorm' fits no normalizer"),
        ({"BatchNorm": "GroupNorm(2)", "head": None}, "'head' fits no normalizer"),
        ({"BatchNorm": "GroupNorm("}, "the target cannot be read"),
        ({"BatchNorm": "Grouped(2)"}, "there is no normalizer 'Grouped'"),
        ({"BatchNorm": "GroupNorm"}, "GroupNorm needs num_groups"),
        ({"BatchNorm": "GroupNorm(2, epsilon=1)"}, "no option 'epsilon'"),
        ({"BatchNorm": "GroupNorm(2, num_groups=4)"}, "num_groups is given twice"),
        ({"BatchNorm": "GroupNorm(n)"}, "n is no plain value"),
        ({"BatchNorm": "GroupNorm(2) if 1 else 0"}, "the target is no name of a layer"),
        ({"BatchNorm": "__import__('os')"}, "there is no normalizer '__import__'"),
        ({"BatchNorm": "GroupNorm(1, 2, 3, 4, 5, 6)"}, "takes at most"),
        ({"BatchNorm": 3}, "a target of type int"),
        ({"BatchNorm": nn.Linear}, "does not say which of its arguments"),
        ({"BatchNorm": lambda old: "text"}, "the function gave str"),
        ({3: "LayerNorm2d"}, "3 selects nothing"),
        ({}, "rules are pairs"),
        ("BatchNorm", "rules are pairs"),
    ],
)
def test_a_rule_that_makes_no_sense_is_an_error_and_changes_nothing(rules, sentence):
    model = net()
    before = state_hash(model, rng=True)
    with pytest.raises(ns.ArgumentError, match=sentence.replace("(", r"\(")):
        ns.convert(model, rules)
    assert state_hash(model, rng=True) == before


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_nothing_is_lost():
    model = net().double().eval()
    norm, seen = model[1], []
    outer = nn.Module()
    outer.net, outer.again, outer.aside = model, norm, [norm]
    handle = norm.register_forward_hook(lambda module, *_: seen.append(module))
    norm.color, norm.weight.no_decay = "red", True
    norm.bias.requires_grad_(False)
    before = state_hash(outer)
    report = ns.convert(outer, {"net.1": "GroupNorm(6)"})
    new = model[1]
    assert type(new) is ns.nn.GroupNorm
    assert (new.num_groups, new.eps) == (6, norm.eps)
    assert new is outer.again is outer.aside[0]
    assert new.weight is norm.weight
    assert new.bias is norm.bias
    assert new.color == "red"
    assert not new.training
    assert list(new.state_dict()) == ["weight", "bias"]
    assert not {"num_features", "momentum", "track_running_stats"} & set(vars(new))
    model(X.double())
    assert seen == [new]
    expected = F.group_norm(model[0](X.double()), 6, norm.weight, norm.bias)
    torch.testing.assert_close(new(model[0](X.double())), expected)
    report.undo()
    assert model[1] is norm
    assert state_hash(outer) == before
    handle.remove()


def test_options_of_the_old_layer_are_kept_and_those_of_the_rule_win():
    old = nn.BatchNorm2d(8, eps=1e-3, affine=False)
    model = nn.Sequential(old, nn.BatchNorm2d(8, bias=False), ns.nn.BatchNorm2d(8, activation="gelu"))
    ns.convert(model, {"BatchNorm": "GroupNorm(2)"})
    assert [repr(m) for m in model] == [
        "GroupNorm(2, 8, eps=0.001, affine=False, bias=False)",
        "GroupNorm(2, 8, eps=1e-05, affine=True, bias=False)",
        "GroupNorm(2, 8, eps=1e-05, affine=True, bias=True, activation='gelu')",
    ]
    assert (model[0].eps, model[0].weight, model[0].bias) == (1e-3, None, None)
    assert ns.convert(model, {"2": "GroupNorm(2, eps=0.5)"}).model[2].eps == 0.5
    assert ns.convert(nn.InstanceNorm2d(4), {"InstanceNorm": "GroupNorm(2, affine=True)"}).model.weight is not None


def test_running_statistics_go_along_where_both_have_them():
    model = net()
    mean = model[1].running_mean
    x = model[0](X)
    expected = copy.deepcopy(model[1]).eval()(x)
    for target in ("SyncBatchNorm", "BatchRenorm", "GhostBatchNorm(4)", "FrozenBatchNorm"):
        report = ns.convert(model, {"1": target})
        torch.testing.assert_close(model[1].eval()(x), expected)  # the same function in evaluation
        assert model[1].running_mean is mean
        report.undo()
    assert "running statistics begin anew" in str(
        ns.convert(nn.Sequential(nn.GroupNorm(2, 4)), {"GroupNorm": "BatchNorm2d"})
    )


def test_a_frozen_batch_norm_learns_nothing_and_goes_back():
    model = net()
    weight = model[1].weight
    ns.convert(model, {"1": "FrozenBatchNorm"})
    assert not list(model[1].parameters())
    assert torch.equal(model[1].weight, weight)
    ns.convert(model, {"1": "BatchNorm2d"})
    assert isinstance(model[1].weight, nn.Parameter)
    assert torch.equal(model[1].weight, weight)


def test_traits_stay_where_they_mean_something():
    model = net()
    freeze(model, select="1")
    ns.convert(model, {"1": "SyncBatchNorm"})
    assert is_frozen(model[1])
    ns.convert(model, {"1": "GroupNorm(2)"})
    assert not is_frozen(model[1])
    synchronized = ns.synchronize(net()).model
    ns.convert(synchronized, {"BatchNorm": "GroupNorm(2)"}, example=X)
    assert type(synchronized[1]) is ns.nn.GroupNorm
    assert not hasattr(synchronized[1], "process_group")


@pytest.mark.parametrize(
    ("layer", "target", "shape", "reason"),
    [
        (nn.BatchNorm2d(32), "GroupNorm(32)", (4, 32, 1, 1), "would normalize single values"),
        (nn.BatchNorm2d(32), "GroupNorm(32)", None, "pass example="),
        (nn.BatchNorm1d(32), "GroupNorm(32)", (4, 32), "would normalize single values"),
        (nn.BatchNorm2d(8), "InstanceNorm", (4, 8, 1, 1), "Expected more than 1 spatial element"),
        (nn.BatchNorm2d(1), "LayerNorm2d", (4, 1, 5, 5), "one cell|would normalize|single|each set|every set"),
        (nn.BatchNorm2d(8), "Norm('n (g [c]) [h w]', g=8)", (4, 8, 1, 1), "."),
        (
            nn.BatchNorm2d(48),
            "GroupNorm(32)",
            (4, 48, 3, 3),
            "48 channels do not divide into 32 groups; nearest=True takes 24",
        ),
        (
            nn.BatchNorm2d(8),
            "LayerNorm",
            (4, 8, 3, 3),
            "its channels are on axis 1, LayerNorm looks for them on the last",
        ),
        (nn.LayerNorm(8), "GroupNorm(2)", (4, 3, 8), "its channels are on the last axis"),
        (nn.LayerNorm((8, 3)), "GroupNorm(2)", (4, 8, 3), "no single axis of channels"),
        (nn.BatchNorm2d(8), "BatchNorm1d", (4, 8, 3, 3), "expected 2D or 3D input"),
        (nn.BatchNorm2d(8), "AdaIN", (4, 8, 3, 3), "missing 1 required positional argument"),
        (nn.GroupNorm(2, 8), "BatchNorm", None, "how many axes its input has is unknown"),
        (ns.nn.BatchNorm2d(32, activation="relu"), "EvoNormS0", (4, 32, 3, 3), "would lose the activation 'relu'"),
        (ns.nn.BatchNorm2d(8, activation="relu"), lambda old: nn.GroupNorm(2, 8), (4, 8, 3, 3), "lose the activation"),
        (nn.BatchNorm2d(8), lambda old: nn.Conv2d(8, 4, 1), (4, 8, 3, 3), "does not keep the shape"),
        (nn.BatchNorm2d(8), "BatchNorm2d", (4, 8, 3, 3), None),
        (nn.LocalResponseNorm(2), "GroupNorm(2)", (4, 8, 3, 3), "no single axis of channels"),
    ],
)
def test_what_cannot_work_is_skipped_with_a_reason(layer, target, shape, reason):
    model = nn.Sequential(layer)
    before = state_hash(model)
    example = None if shape is None else torch.randn(shape)
    report = ns.convert(model, {"0": target}, example=example)
    if reason is None:
        assert report.changed == ("0",)
        return
    assert report.changed == ()
    assert re.search(reason, report.skipped[0][1]), report.skipped
    assert state_hash(model) == before


def test_no_degenerate_scope_is_ever_built():
    """What the swap by hand gives: β everywhere, whatever the input; here the groups are fewer, or none."""
    x = torch.randn(4, 32, 1, 1)
    by_hand = nn.GroupNorm(32, 32)
    assert by_hand(x).abs().max() < 1e-3  # rounding
    report = ns.convert(nn.Sequential(nn.BatchNorm2d(32)), {"0": "GroupNorm(32)"}, example=x, nearest=True)
    assert report.model[0].num_groups == 16
    assert report.notes == ("0: GroupNorm(16) in place of GroupNorm(32), for 32 channels",)
    assert report.model(x).std() > 0.1


def test_a_zero_gamma_does_not_pass_for_a_degenerate_scope():
    model = nn.Sequential(nn.BatchNorm2d(8))
    nn.init.zeros_(model[0].weight)
    assert ns.convert(model, {"0": "GroupNorm(2)"}).changed == ("0",)
    assert not model[0].weight.any()


def test_the_last_axis_of_two_is_axis_one():
    model = nn.Sequential(nn.BatchNorm1d(8))
    assert ns.convert(model, {"0": "LayerNorm"}, copy=True).changed == ()
    assert ns.convert(model, {"0": "LayerNorm"}, example=torch.randn(4, 8)).changed == ("0",)
    transformer = nn.Sequential(nn.LayerNorm(8))
    ns.convert(transformer, {"LayerNorm": "RMSNorm"}, example=torch.randn(4, 3, 8))
    assert type(transformer[0]) is ns.nn.RMSNorm


def test_dynamic_tanh_finds_the_channels():
    model = nn.Sequential(nn.BatchNorm2d(8))
    assert not ns.convert(model, {"0": "DynamicTanh"}, example=X[:, :1].expand(-1, 8, -1, -1)).model[0].channels_last


def test_the_root_itself_and_functions():
    root = nn.BatchNorm2d(8)
    report = ns.convert(root, {"BatchNorm": lambda old: nn.GroupNorm(2, old.num_features)})
    assert type(report.model) is nn.GroupNorm
    assert report.model.weight is root.weight
    assert report.undo() is root
    model = nn.Sequential(root, nn.GroupNorm(2, 8))
    with pytest.raises(ns.ArgumentError, match="a module that the model has already"):
        ns.convert(model, {"BatchNorm": lambda old: model[1]})


# --- classes of others ------------------------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: batch_norm, drop, act."""

    def __init__(self, channels, act=None):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.PReLU(init=0.1)

    def forward(self, x):
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(y))


class Gained(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.gain


class Renamed(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.randn(channels))

    def forward(self, x):
        w, b, v, m = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var, self.running_mean))
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale)


def test_children_behind_the_normalization_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8))
    act = model[1].act
    report = ns.convert(model, {"BatchNorm": "GroupNorm(2)"})
    assert report.changed == ("1",)
    assert isinstance(model[1], Followed)
    assert type(model[1])._base is ns.nn.GroupNorm
    assert model[1].act is act
    assert set(model[1].state_dict()) == {"weight", "bias", "act.weight"}
    x = model[0](X)
    expected = F.prelu(F.group_norm(x, 2, model[1].weight, model[1].bias), act.weight)
    torch.testing.assert_close(model[1](x), expected)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again[1](x), expected)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(X), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected)


def test_a_normalizer_inside_a_normalizer_is_converted_too():
    model = nn.Sequential(BatchNormAct2d(8, nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    assert ns.convert(model, {"BatchNorm": "GroupNorm(2)"}).changed == ("0", "0.act.0")
    assert [type(m) for m in (model[0].act[0], ns.surgery.find(model)[1].module)] == [ns.nn.GroupNorm] * 2


def test_the_naive_swap_loses_the_activation_of_such_classes():
    """What torch's own converter does to a subclass with an activation: pytorch/pytorch#187298."""
    model = nn.Sequential(BatchNormAct2d(8, nn.ReLU())).eval()
    x = torch.randn(4, 8, 3, 3)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert (theirs(x) < 0).any()
    ours = ns.convert(model, {"BatchNorm": "SyncBatchNorm"}, copy=True).model
    assert (ours(x) >= 0).all()
    torch.testing.assert_close(ours(x), model(x))


def test_torchs_conversion_loses_hooks_and_attributes():
    """It builds a new module from the arguments of the old one."""
    model, seen = nn.Sequential(nn.BatchNorm2d(3)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model[0].mine = "mine"
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not theirs[0]._forward_hooks
    assert not hasattr(theirs[0], "mine")
    ours = ns.synchronize(model, copy=True).model
    assert ours[0].mine == "mine"
    torch.testing.assert_close(ours(X), model(X))
    assert len(seen) == 2


def test_going_back_from_synchronized_others_lose_the_dimensions():
    """What Lightning and mmengine put in the place of SyncBatchNorm accepts any number of axes."""

    class AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input):  # noqa: A002
            pass

    assert AnyBatchNorm(3)(torch.randn(4, 3, 2)).shape == (4, 3, 2)
    model = ns.desynchronize(ns.synchronize(nn.Sequential(nn.BatchNorm2d(3))).model).model
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(4, 3, 2))


def test_a_subclass_that_does_something_else_is_left():
    model = nn.Sequential(Gained(8), Renamed(8), FrozenBatchNorm2d(8))
    report = ns.convert(model, {"BatchNorm": "GroupNorm(2)", "FrozenBatchNorm2d": "FrozenBatchNorm"})
    assert report.changed == ("1", "2")
    assert "Gained computes something besides" in dict(report.skipped)["0"]
    x = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(model[2](x), FrozenBatchNorm2d.forward(model[2], x))


# --- calibration ------------------------------------------------------------------------------------------------------


def moments(y):
    v = y.detach().double().transpose(0, 1).reshape(y.shape[1], -1).numpy()
    return v.mean(1), v.std(1)


def before_activation(model, loader, names):
    """Outputs of layers, all batches together, with the fused activation off: an account independent of the package."""
    model, outputs = copy.deepcopy(model).eval(), {name: [] for name in names}
    for name in names:
        layer = model.get_submodule(name)
        activation = getattr(layer, "activation", None)

        def keep(_, __, y, name=name, activation=activation):
            outputs[name].append(y)
            return y if activation is None else F.relu(y)

        if activation is not None:
            layer.activation = None
        layer.register_forward_hook(keep)
    with torch.no_grad():
        for x in loader:
            model(x)
    return {name: moments(torch.cat(ys)) for name, ys in outputs.items()}


@pytest.mark.parametrize(
    "target", ["GroupNorm(4)", "LayerNorm2d", "Norm('n (g [c]) [h w]', g=2)", "BatchRenorm", "SwitchNorm"]
)
@pytest.mark.parametrize(("training", "loader"), [(True, LOADER), (False, LOADER), (False, [X])])
def test_calibration_gives_the_outputs_their_old_moments(target, training, loader):
    model = net().train(training)
    wanted = before_activation(model, loader, ("1", "4", "6"))
    modes = [m.training for m in model.modules()]
    report = ns.convert(model, {"BatchNorm": target}, calibrate=loader)
    assert report.changed == ("1", "4", "6")
    assert [m.training for m in model.modules()] == modes
    assert model[4].activation == "relu"
    assert all(not hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))
    found = before_activation(model, loader, ("1", "4", "6"))
    for name, (mean, std) in wanted.items():
        # float32 parameters and outputs against float64 moments.
        np.testing.assert_allclose(found[name][0], mean, atol=2e-5 * std.max())
        np.testing.assert_allclose(found[name][1], std, atol=2e-5 * std.max())
    fits = report.details["calibration"].layers
    assert set(fits) == {"1", "4", "6"}
    assert all(fit.mean[1] < 1e-4 and fit.spread[1] < 1e-4 for fit in fits.values())


def test_one_batch_is_calibrated_in_one_forward():
    def forwards(loader, depth):
        model, count = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(depth))), []
        ns.convert(model, {"BatchNorm": "GroupNorm(1)"}, calibrate=loader, forward=lambda m, x: count.append(1) or m(x))
        return len(count)

    assert forwards([X], 12) == forwards([X], 2)
    assert forwards(LOADER, 12) - forwards(LOADER, 2) == 10 * len(LOADER)


def test_calibration_goes_in_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.late(self.conv(self.early(x)).relu())

    model = Backwards()
    for _ in range(5):
        model(X * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1))
    for loader in (LOADER, [X]):
        wanted = before_activation(model, loader, ("early", "late"))
        report = ns.convert(model, {"BatchNorm": "GroupNorm(1)"}, calibrate=loader)
        assert list(report.details["calibration"].layers) == ["early", "late"]
        found = before_activation(model, loader, ("early", "late"))
        for name in wanted:
            np.testing.assert_allclose(found[name][1], wanted[name][1], rtol=1e-4)
        report.undo()


def test_the_losses_and_outputs_reported_are_those_of_the_models():
    model, y = net().eval(), torch.arange(16) % 5
    loader = [(X[:8], y[:8]), (X[8:], y[8:])]
    loss = lambda output, batch: F.cross_entropy(output, batch[1], reduction="none")  # noqa: E731

    def truth(m):
        with torch.no_grad():
            return F.cross_entropy(m(X), y).item(), m(X)

    naive = ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, copy=True).model
    old = truth(model)
    report = ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, calibrate=loader, loss=loss)
    calibration = report.details["calibration"]
    # Means of two batches as large; float32.
    np.testing.assert_allclose(calibration.loss, [old[0], truth(naive)[0], truth(model)[0]], rtol=1e-5)
    far = [((m - old[1]).square().mean().sqrt() / old[1].std()).item() for m in (truth(naive)[1], truth(model)[1])]
    np.testing.assert_allclose(calibration.output, far, rtol=1e-2)
    assert any(note.startswith("loss ") for note in report.notes)


def test_what_data_held_out_say_of_a_calibration():
    model, held = net().eval(), [X[8:12], X[12:]]
    names = ("1", "4", "6")
    fitted, wanted = before_activation(model, [X[:8]], names), before_activation(model, held, names)
    mean = lambda y, _: y.square().mean(1)  # noqa: E731
    with torch.no_grad():
        losses = [mean(model(X[8:]), None).mean().item()]
    report = ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, calibrate=[X[:8]], held=held, within=10, loss=mean)
    found = before_activation(model, held, names)
    with torch.no_grad():
        losses.append(mean(model(X[8:]), None).mean().item())

    def off(new, old):
        return max(np.linalg.norm(a - b) / np.linalg.norm(old[1]) for a, b in zip(new, old, strict=True))

    for name, fit in report.details["calibration"].held.items():
        # float32 outputs, here stacked in another order.
        np.testing.assert_allclose(fit.off, off(found[name], wanted[name]), rtol=1e-4)
        np.testing.assert_allclose(fit.sampling, off(fitted[name], wanted[name]), rtol=1e-4)
    np.testing.assert_allclose(report.details["calibration"].held_loss, losses, rtol=1e-5)
    worst = max(off(found[name], wanted[name]) for name in names)
    assert f"on the data held out, moments are off by {worst:.1%} at most" in report.notes


def test_a_calibration_that_data_held_out_do_not_confirm_is_refused():
    model = net()
    before = state_hash(model, rng=True)
    pattern = (
        r"the data held out moments of [1-3] of 3 layers are off by more than 5%, the worst by \d+%(.|\n)*layer: 6"
    )
    with pytest.raises(ns.ProofError, match=pattern):  # 8 samples behind a pooling
        ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, calibrate=[X[:8]], held=[X[8:]])
    assert state_hash(model, rng=True) == before
    ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, calibrate=[X], held=[X])


def test_calibration_keeps_children_and_their_activation():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 8, 3), BatchNormAct2d(8, nn.ReLU()))
    for _ in range(5):
        model(X)
    model.eval()
    taps = {}
    for k in (1, 3):
        model[k].drop.register_forward_hook(lambda m, i, y, k=k: taps.setdefault(k, []).append(y))
    with torch.no_grad():
        model(X)
    wanted = {k: moments(ys.pop()) for k, ys in taps.items()}
    ns.convert(model, {"BatchNorm": "GroupNorm(2)"}, calibrate=[X])
    for ys in taps.values():
        ys.clear()
    with torch.no_grad():
        model(X)
    for k in (1, 3):
        np.testing.assert_allclose(moments(taps[k][-1])[1], wanted[k][1], rtol=1e-4)


def test_a_layer_without_gamma_gets_one_to_be_calibrated():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    model(X)
    ns.convert(model, {"0": "GroupNorm(1)"}, calibrate=[X])
    assert model[0].weight is not None
    plain = ns.convert(nn.Sequential(nn.BatchNorm2d(3, affine=False)), {"0": "GroupNorm(1)"}).model
    assert plain[0].weight is None


def test_what_is_not_calibrated_is_said():
    model = net()
    model.unused = nn.BatchNorm2d(4)
    tied = nn.BatchNorm2d(32)
    tied.weight = model[6].weight
    model.tied = nn.Sequential(tied)
    del model._modules["unused"], model._modules["tied"]
    model.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self[:9], x), model)
    model.unused, model.tied = nn.BatchNorm2d(4), tied
    report = ns.convert(
        model, {"1": "GlobalResponseNorm", "6": "GroupNorm(2)", "unused": "GroupNorm(2)"}, calibrate=[X]
    )
    notes = "\n".join(report.notes)
    assert "1: not calibrated, γ and β are not the last thing that it does" in notes
    assert "6: not calibrated, its γ is shared with another layer" in notes
    assert "unused: not calibrated, never reached by these batches" in notes


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"calibrate": []}, ns.DataError, "the loader is empty"),
        ({"calibrate": X}, ns.ArgumentError, "a tensor is one batch"),
        ({"calibrate": [X], "batches": 0}, ns.ArgumentError, "batches must be at least 1"),
        ({"calibrate": [X / 0]}, ns.DataError, "NaN or infinity comes out"),
        ({"calibrate": [X[:, :2]]}, RuntimeError, "expected input"),
        ({"held": [X]}, ns.ArgumentError, "held= judges a calibration"),
        ({"calibrate": [X], "held": X}, ns.ArgumentError, "a tensor is one batch"),
        ({"calibrate": [X], "held": []}, ns.DataError, "the loader is empty"),
        ({"calibrate": [X], "held": [X], "within": 0}, ns.ArgumentError, "within must be greater than 0"),
        (
            {"calibrate": [(X, 9)], "held": [(X, 1)], "forward": lambda m, batch: m[: batch[1]](batch[0])},
            ns.DataError,
            "the data held out never reach",
        ),
        ({"optimizer": 3}, ns.ArgumentError, "int is no optimizer"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters()), "copy": True},
            ns.ArgumentError,
            "not of its copy",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(options, error, sentence):
    model = net()
    before = state_hash(model, rng=True)
    with pytest.raises(error, match=sentence):
        ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, **options)
    assert state_hash(model, rng=True) == before


# --- optimizers -------------------------------------------------------------------------------------------------------


def step(model, optimizer):
    output = model(X)
    optimizer.zero_grad()
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()


def groups(optimizer):
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def test_shared_parameters_keep_their_state():
    model = net()
    optimizer = torch.optim.Adam(ns.optim.decay_groups(model), 1e-3)
    step(model, optimizer)
    before, state = groups(optimizer), optimizer.state[model[1].weight]
    ns.convert(model, {"BatchNorm": "GroupNorm(4)"}, optimizer=optimizer)
    assert groups(optimizer) == before
    assert optimizer.state[model[1].weight] is state
    weight = model[1].weight.clone()
    step(model, optimizer)
    assert not torch.equal(model[1].weight, weight)


def test_parameters_that_go_leave_and_new_ones_join_the_group_of_the_normalizers():
    model = net()
    no_decay = [p for k in (1, 4, 6) for p in model[k].parameters()]
    rest = [p for k in (0, 3, 8) for p in model[k].parameters()]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": no_decay, "weight_decay": 0.0}], 0.1, momentum=0.9)
    step(model, optimizer)
    before, state = groups(optimizer), dict(optimizer.state)
    gone = model[1].weight
    rules = {"1": "FrozenBatchNorm", "6": "FilterResponseNorm"}
    report = ns.convert(model, rules, optimizer=optimizer)
    assert id(gone) not in groups(optimizer)[1]
    assert gone not in optimizer.state
    assert [id(p) for p in rest] == groups(optimizer)[0]
    assert set(groups(optimizer)[1]) == {id(p) for k in (4, 6) for p in model[k].parameters()}
    assert len(groups(optimizer)[1]) == len(set(groups(optimizer)[1])) == 2 + len(list(model[6].parameters()))
    step(model, optimizer)
    report.undo()
    assert groups(optimizer) == before
    assert {id(p): id(s) for p, s in state.items()} == {id(p): id(s) for p, s in optimizer.state.items()}
    optimizer.state_dict()  # which fails over the state of a parameter that is in no group


def test_a_new_parameter_of_the_same_shape_takes_the_state():
    class Own(nn.GroupNorm):
        """One whose γ is its own business: it does not let the old one in."""

    model = nn.Sequential(nn.BatchNorm2d(3))
    optimizer = torch.optim.SGD([*model.named_parameters()], 0.1, momentum=0.9)
    step(model, optimizer)
    old, momentum = model[0].weight, optimizer.state[model[0].weight]
    from normscope.surgery.operation import operate
    from normscope.surgery.optimizers import rebind, watch

    def edit(draft):
        watch(draft, optimizer)
        before, draft.model[0] = draft.model[0], Own(1, 3)
        rebind(draft, optimizer, [("0", before, draft.model[0])])

    report = operate("edit", model, edit)
    assert optimizer.state[model[0].weight] is momentum
    assert old not in optimizer.state
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    report.undo()
    assert optimizer.state[old] is momentum


def test_a_fault_leaves_the_optimizer_as_it_was():
    model = net()
    optimizer = torch.optim.Adam(model.named_parameters(), 1e-3)
    step(model, optimizer)
    before, state, names = (
        groups(optimizer),
        list(optimizer.state.items()),
        list(optimizer.param_groups[0]["param_names"]),
    )
    with pytest.raises(ns.DataError):
        ns.convert(model, {"1": "FrozenBatchNorm", "6": "GroupNorm(2)"}, optimizer=optimizer, calibrate=[X / 0])
    assert groups(optimizer) == before
    assert optimizer.param_groups[0]["param_names"] == names
    assert all(a is c and b is d for (a, b), (c, d) in zip(state, optimizer.state.items(), strict=True))


# --- split_statistics -------------------------------------------------------------------------------------------------


def test_split_by_domain_keeps_the_function_and_separates_the_statistics():
    model = net()
    expected = copy.deepcopy(model).eval()(X)
    weight, keys = model[1].weight, len(list(model.parameters()))
    report = ns.split_statistics(model, 2, select=["1", "4"])
    assert report.changed == ("1", "4")
    for domain in (0, 1):
        use_domain(model, domain)
        torch.testing.assert_close(model.eval()(X), expected)
    assert model[1].domains[1].weight is weight
    assert len(list(model.parameters())) == keys
    before = [part.running_mean.clone() for part in model[1].domains]
    model.train()(X + 5)
    assert torch.equal(model[1].domains[0].running_mean, before[0])
    assert not torch.equal(model[1].domains[1].running_mean, before[1])
    assert (model.eval()(X) != expected).any()
    use_domain(model, 0)
    with pytest.raises(ns.ArgumentError, match="domain 2 is not one"):
        use_domain(model, 2)


def test_split_undo_and_separate_affine():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before, hashed = groups(optimizer), state_hash(model)
    report = ns.split_statistics(model, 3, share_affine=False, optimizer=optimizer)
    assert len(groups(optimizer)[0]) == len(before[0]) + 3 * 2 * 2
    assert set(groups(optimizer)[0]) == {id(p) for p in model.parameters()}
    assert torch.equal(model[1].domains[2].weight, model[1].domains[0].weight)
    report.undo()
    assert groups(optimizer) == before
    assert state_hash(model) == hashed


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.once = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, a, b=None):
        return self.norm(a), self.norm(a + 7 if b is None else b()), self.once(a)


def test_split_by_call_keeps_statistics_for_every_call():
    model = Siamese()
    report = ns.split_statistics(model, example=X)
    assert report.changed == ("norm",)
    for _ in range(200):
        model(X)
    with pytest.raises(ZeroDivisionError):
        model(X, lambda: 1 / 0)  # an error between the calls does not shift what follows
    model(X)
    first, second = (part.running_mean for part in model.norm.domains)
    # momentum 0.1 after 200 steps: 1e-9 of the initial value is left.
    torch.testing.assert_close(second - first, torch.full((3,), 7.0), atol=1e-4, rtol=0)
    assert model.norm.domains[0].num_batches_tracked == 202
    together = Siamese()
    for _ in range(200):
        together(X)
    mean = together.norm.running_mean - X.mean((0, 2, 3))
    assert (mean > 3).all()  # one running mean lies between the two and describes neither
    assert (mean < 4).all()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.eval()(X)[1], model.eval()(X)[1])


def test_split_says_what_it_leaves():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), Gained(3), nn.GroupNorm(1, 3)
    )
    freeze(model, select="0")
    reasons = dict(ns.split_statistics(model, 2).skipped)
    assert reasons["0"].startswith("frozen")
    assert reasons["1"] == "keeps no running statistics"
    assert "computes something besides" in reasons["2"]
    for options in ({}, {"domains": 1}):
        with pytest.raises(ns.ArgumentError):
            ns.split_statistics(model, **options)


# --- the command line -------------------------------------------------------------------------------------------------

THEIRS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.BatchNorm2d(48), nn.Flatten(), nn.Linear(48, 5))

def loader():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 9, 9, generator=g), torch.zeros(8).long()) for _ in range(4)]
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs_to_convert.py").write_text(THEIRS)
    yield lambda *arguments: CliRunner().invoke(cli.main, ["convert", "theirs_to_convert.py:build", *arguments])
    sys.modules.pop("theirs_to_convert", None)


def test_a_converted_checkpoint_is_read_safely_and_built_again(call, tmp_path):
    result = call("--rule", "BatchNorm=GroupNorm(48)", "--data", "loader", "--nearest", "-o", "gn.pt")
    assert result.exit_code == 0, result.output
    assert "written: gn.pt" in result.output
    body = torch.load(tmp_path / "gn.pt", weights_only=True)
    (operation,) = body["normscope"]["operations"]
    assert operation["layers"] == ["1", "4"]
    assert operation["to"] == ["GroupNorm(48)", "GroupNorm(24)"]  # the pooled map has one value per channel
    assert operation["shapes"] == [[8, 48, 7, 7], [8, 48, 1, 1]]
    json.dumps(operation)
    import theirs_to_convert as theirs

    model = ns.load(theirs.build, tmp_path / "gn.pt")
    assert (model[1].num_groups, model[4].num_groups) == (48, 24)
    expected = ns.convert(theirs.build(), {"BatchNorm": "GroupNorm(48)"}, calibrate=theirs.loader(), nearest=True).model
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(model.eval()(x), expected.eval()(x))
    # A second conversion keeps the list of the first.
    result = call("--weights", "gn.pt", "--rule", "4=LayerNorm2d", "-o", "ln.pt")
    assert result.exit_code == 0, result.output
    assert [type(m).__name__ for m in ns.load(theirs.build, tmp_path / "ln.pt")][1:5:3] == ["GroupNorm", "LayerNorm2d"]
    with pytest.raises(ns.ArgumentError, match="which this model does not have"):
        ns.load(lambda: nn.Sequential(nn.Linear(3, 3)), tmp_path / "gn.pt")


def test_data_held_out_decide_whether_a_checkpoint_is_written(call, tmp_path):
    rule = ("--rule", "BatchNorm=GroupNorm(24)", "--data", "loader", "--held", "loader", "-o", "gn.pt")
    assert call(*rule).exit_code == 0  # the calibration's own data: exact
    (tmp_path / "gn.pt").unlink()
    (tmp_path / "theirs_to_convert.py").write_text(THEIRS + "def other(): return [(torch.rand(8, 3, 9, 9), None)]\n")
    sys.modules.pop("theirs_to_convert", None)
    other = tuple("other" if part == "loader" and rule[i - 1] == "--held" else part for i, part in enumerate(rule))
    result = call(*other)
    assert result.exit_code == 2, result.output
    assert "held out" in result.output
    assert not (tmp_path / "gn.pt").exists()
    assert call(*other, "--within", "1e9").exit_code == 0
    assert call(*rule[:2], "--held", "loader", "-o", "gn.pt").exit_code == 2  # nothing is calibrated


def test_exit_codes_of_convert(call, tmp_path):
    result = call("--rule", "BatchNorm=GroupNorm(32)", "-o", "gn.pt")
    assert result.exit_code == 1
    assert "nearest=True takes 24" in result.output
    assert not (tmp_path / "gn.pt").exists()
    for arguments in (
        ("--rule", "BatchNorm", "-o", "gn.pt"),
        ("--rule", "LayerNorm=GroupNorm(2)", "-o", "gn.pt"),
        ("--rule", "BatchNorm=Foo", "-o", "gn.pt"),
        ("--rule", "BatchNorm=LayerNorm2d", "-o", "nowhere/gn.pt"),
        ("-o", "gn.pt"),
    ):
        assert call(*arguments).exit_code == 2, arguments


# --- timm, where it is installed --------------------------------------------------------------------------------------


def test_timms_layers_keep_what_they_do():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    report = ns.convert(model, {"BatchNorm": "GroupNorm(2)"}, calibrate=[X])
    assert report.changed == ("1",)
    x = model[0](X)
    torch.testing.assert_close(model[1](x), F.silu(F.group_norm(x, 2, model[1].weight, model[1].bias)))


def test_timms_split_converter_makes_every_layer_two_dimensional():
    layers = pytest.importorskip("timm.layers")
    model, x = nn.Sequential(nn.BatchNorm1d(8)), torch.randn(6, 8)
    with pytest.raises(ValueError, match="expected 4D input"):
        layers.convert_splitbn_model(copy.deepcopy(model), 2)(x)
    assert ns.split_statistics(model, 2).model(x).shape == (6, 8)
