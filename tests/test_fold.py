"""Fold: every layer, every way that calls can be wired, and what must stay as it is; torch's own results beside."""

import builtins
import concurrent.futures
import copy
import importlib
import importlib.util
import json
import re
import threading
import warnings

import pytest
import torch
from click.testing import CliRunner
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import normscope as ns
from normscope import cli, surgery
from normscope.doctor import checkpoint
from normscope.surgery import is_frozen, keep_float32, refold, state_hash

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a module when it is imported
    from torch.fx.experimental import optimization


ISINSTANCE = isinstance


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomized(model):
    """Numbers that tell everything apart: γ of both signs and one 0, statistics far from 0 and 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.uniform_(0.3, 3)
            elif b.is_floating_point():
                b.normal_()
        for m in model.modules():
            if hasattr(m, "running_mean") and getattr(m, "weight", None) is not None:
                m.weight[0] = 0.0
    return model.eval()


def exact(model, x):
    """The outputs in float64, computed with nothing of what is tested."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        return model(x.double() if x.is_floating_point() else x)


def close(model, x, expected, tolerance=2e-6):
    """Within a few roundings of float32 weights (2⁻²⁴ each) of the largest output."""
    output = exact(model, x)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()


def folds(model, x, changed, **options):
    expected = exact(model, x)
    report = ns.fold(model, x, **options)
    close(report.model, x, expected)
    assert report.changed == tuple(changed), report.skipped
    return report


def reasons(model, x, **options):
    """Nothing is folded, nothing is touched; why."""
    before = state_hash(model, rng=True)
    report = ns.fold(model, x, **options)
    assert report.changed == ()
    assert state_hash(model, rng=True) == before
    return dict(report.skipped)


# --- behind a layer -----------------------------------------------------------------------------------------------

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [CONV, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_behind_every_convolution(axes, kind, groups, bias):
    options = {"stride": 2, "dilation": 2, "padding": 1, "groups": groups, "bias": bias}
    model = randomized(nn.Sequential(kind[axes](4, 8, 3, **options), NORM[axes](8)))
    weight = model[0].weight
    folds(model, torch.randn(3, 4, *[7] * axes), ["1"])
    assert type(model[1]) is nn.Identity
    assert model[0].weight is weight
    assert model[0].bias.shape == (8,)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
def test_behind_a_convolution_padding_does_not_matter(mode, padding):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode), nn.BatchNorm2d(4), nn.ReLU())
    folds(randomized(model), torch.randn(2, 3, 8, 8), ["1"])


def norms():
    plain, frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
    yield "affine", plain
    yield "affine off", nn.BatchNorm2d(6, affine=False)
    yield "bias off", ns.nn.BatchNorm2d(6, bias=False)
    yield "one gamma zero, others negative", nn.BatchNorm2d(6)
    yield "ours", ns.nn.BatchNorm2d(6, eps=0.1)
    yield "momentum None", nn.BatchNorm2d(6, momentum=None)
    yield "frozen", ns.freeze(frozen).model
    yield "FrozenBatchNorm", ns.nn.FrozenBatchNorm(6)
    yield "instance", nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    yield "our instance", ns.nn.InstanceNorm2d(6, track_running_stats=True)
    yield "sync", nn.SyncBatchNorm(6)
    yield "our sync", ns.nn.SyncBatchNorm(6)
    yield "synchronized", ns.synchronize(nn.BatchNorm2d(6)).model
    yield "ghost", ns.nn.GhostBatchNorm(6, 2)
    yield "renorm", ns.nn.BatchRenorm(6)
    yield "mean only", ns.nn.MeanOnlyBatchNorm(6)
    yield "Norm", ns.nn.Norm("[n] c [h w]", 6, running=True)
    yield "float32", keep_float32(nn.BatchNorm2d(6)).model


@pytest.mark.parametrize(("name", "norm"), [*norms()], ids=[name for name, _ in norms()])
def test_every_normalizer_that_is_affine_in_evaluation(name, norm):
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 3, bias=name != "affine"), norm, nn.Tanh()))
    if name.startswith("one gamma"):
        model[1].weight.data.neg_().abs_().neg_()[0] = 0.0
    folds(model, torch.randn(2, 3, 6, 6), ["1"])


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda: nn.BatchNorm2d(6, track_running_stats=False), "keeps no running statistics"),
        (lambda: nn.InstanceNorm2d(6), "keeps no running statistics"),
        (lambda: ns.nn.EvalNorm(6), "no affine map of its channels"),
        (lambda: ns.nn.SwitchNorm(6), "no affine map of its channels"),
        (lambda: ns.nn.IterNorm(6), "could not be tried out|no affine map|axes"),
    ],
)
def test_normalizers_that_are_not_affine_are_left(norm, reason):
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 3), norm()))
    (found,) = reasons(model, torch.randn(2, 3, 6, 6)).values()
    assert re.search(reason, found), found


@pytest.mark.parametrize("activation", [*ns.kernels.activations.ACTIVATIONS])
def test_a_fused_activation_stays(activation):
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 6, 3), ns.nn.BatchNorm2d(6, activation=activation), nn.Conv2d(6, 2, 1))
    )
    folds(model, torch.randn(2, 3, 6, 6), ["1"])
    assert type(model[1]).__module__ == "torch.nn.modules.activation"
    assert not model[1].training


def test_linear_of_two_axes():
    folds(randomized(nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5))), torch.randn(4, 3), ["1"])


def test_linear_of_more_axes_only_where_the_axis_matches():
    """(N, L, C) into BatchNorm1d over axis 1, which is L: torch's pair function folds it all the same."""
    square = randomized(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    x = torch.randn(4, 5, 3)
    expected = exact(square, x)
    wrong = fuse_linear_bn_eval(*copy.deepcopy(square)).double()(x.double())
    assert (wrong - expected).abs().max() > 0.1
    assert reasons(square, x) == {"1": "its channels are not those of 0; its output goes to the output of the model"}

    class Turned(nn.Module):
        def __init__(self, turn, back):
            super().__init__()
            self.linear, self.norm, self.turn, self.back = nn.Linear(3, 5), nn.BatchNorm1d(5), turn, back

        def forward(self, x):
            return self.back(self.norm(self.turn(self.linear(x))), x)

    for turn in (
        lambda y: y.transpose(1, 2), lambda y: y.transpose(-1, -2), lambda y: torch.permute(y, (0, 2, 1)),
        lambda y: y.permute(0, -1, 1), lambda y: y.flatten(0, 1), lambda y: torch.flatten(y, end_dim=1).contiguous(),
    ):  # fmt: skip
        folds(randomized(Turned(turn, lambda y, x: y * 2)), x, ["norm"])
    wrong = randomized(Turned(lambda y: y.transpose(0, 1), lambda y, x: y))
    assert "its channels are not those of linear" in reasons(wrong, torch.randn(5, 4, 3))["norm"]


def test_levit_writes_it_like_this():
    class LinearNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn = nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5)

        def forward(self, x):
            x = self.linear(x)
            return self.bn(x.flatten(0, 1)).reshape_as(x)

    folds(randomized(LinearNorm()), torch.randn(4, 7, 3), ["bn"])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(9, 5, padding_idx), nn.BatchNorm1d(5)

        def forward(self, i):
            return self.norm(self.table(i).transpose(1, 2))

    folds(randomized(Net()), torch.tensor([[1, 2, 8], [0, 2, 3]]), ["norm"])
    renormed = randomized(Net())
    renormed.table.max_norm = 1.0
    assert "max_norm" in reasons(renormed, torch.tensor([[1, 2, 8], [0, 2, 3]]))["norm"]


def test_unbatched_and_unlike_axes_are_left():
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm1d(6)))  # (C, H, W) as (N, C, L)
    assert "its channels are not those of 0" in reasons(model, torch.randn(3, 6, 6))["1"]
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(64)))
    assert "are other axes, too" in reasons(model, torch.randn(2, 3, 6, 6))["2"]
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.BatchNorm1d(4)))
    folds(model, torch.randn(2, 3, 6, 6), ["2"])


def test_concatenated_and_dropped_out():
    class Inception(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.BatchNorm2d(6)
            self.drop, self.dim = nn.Dropout2d(0.5), 1

        def forward(self, x):
            return self.norm(self.drop(torch.cat([self.a(x), self.b(x)], dim=self.dim)))

    folds(randomized(Inception()), torch.randn(2, 3, 6, 6), ["norm"])

    class Twice(Inception):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Conv2d(3, 3, 1)

    assert (
        "a gives it different channels in different calls"
        in reasons(randomized(Twice()), torch.randn(2, 3, 6, 6))["norm"]
    )

    class Rows(Inception):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 6, 1)
            self.b = nn.Conv2d(3, 6, 1)
            self.dim = 2

    assert "side by side" in reasons(randomized(Rows()), torch.randn(2, 3, 6, 6))["norm"]


# --- before a layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_before_a_convolution_without_padding(axes, groups):
    model = nn.Sequential(NORM[axes](4), CONV[axes](4, 6, 3, stride=2, groups=groups, bias=False))
    folds(randomized(model), torch.randn(2, 4, *[7] * axes), ["0"])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("shifted", [True, False])
def test_before_a_convolution_zeros_are_no_neighbours(mode, shifted):
    """A padded zero is not s·0 + t; a padded copy of the border is. Without a shift both are."""
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)))
    x = torch.randn(2, 4, 6, 6)
    if not shifted:
        model[0].running_mean.zero_()
        model[0].bias.data.zero_()
    if shifted and mode == "zeros":
        assert "pads with zeros" in reasons(model, x)["0"]
    else:
        folds(model, x, ["0"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({"kernel_size": 1}, True),
        ({"kernel_size": 1, "groups": 2}, True),
        ({"kernel_size": 3, "padding": 2}, True),
        ({"kernel_size": 3, "padding": 4, "dilation": 2}, True),
        ({"kernel_size": 3, "padding": 1}, False),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": 1, "stride": 2}, False),
        ({"kernel_size": 2, "stride": 2}, False),
    ],
)
def test_before_a_transposed_convolution(options, whole, bias):
    """Exact where every output gets every weight; elsewhere only without a shift."""
    x = torch.randn(2, 4, 7, 7)
    model = randomized(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, **options, bias=bias)))
    if not whole:
        assert "does not keep a constant" in reasons(model, x)["0"]
        model[0].running_mean.zero_()
        model[0].bias.data.zero_()
    folds(model, x, ["0"])


def test_before_linear_and_through_flatten():
    folds(randomized(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))), torch.randn(5, 4), ["0"])
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(36, 3, bias=False))
    folds(randomized(model), torch.randn(2, 4, 3, 3), ["1"])
    wrong = randomized(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert "are not those that 1 sums over" in reasons(wrong, torch.randn(5, 4, 4))["0"]


def test_before_several_layers_or_none():
    class Fork(nn.Module):
        def __init__(self, third):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1, bias=False)
            self.third = third

        def forward(self, x):
            y = self.norm(x)
            return self.a(y) * self.b(y) + self.third(y)

    x = torch.randn(2, 4, 5, 5)
    folds(randomized(Fork(lambda y: y.shape[0])), x, ["norm"])
    assert "its output goes to" in reasons(randomized(Fork(lambda y: y[:, :2])), x)["norm"]


def test_before_a_layer_nobody_may_write_in_between():
    def wire(m, x):
        y = x * 1
        z = m.norm(y)
        y.relu_()
        return m.conv(z) + y

    assert "may be overwritten" in reasons(randomized(Wired(wire)), X)["norm"]
    folds(randomized(Wired(lambda m, x: m.conv(m.norm(x)).relu_())), X, ["norm"])


def test_an_activation_of_its_own_keeps_it_from_what_follows():
    model = randomized(nn.Sequential(nn.ReLU(), ns.nn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 1)))
    assert "its activation lies before" in reasons(model, torch.randn(2, 4, 5, 5))["1"]


# --- normalizers in a row -----------------------------------------------------------------------------------------


def test_one_behind_another_goes_all_the_way():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.ReLU()
    )
    folds(randomized(model), torch.randn(2, 3, 6, 6), ["1", "2", "3"])


@pytest.mark.parametrize(
    "first",
    [
        lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False), lambda: ns.nn.BatchNorm2d(4, bias=False),
        lambda: ns.nn.FrozenBatchNorm(4),
    ],
)  # fmt: skip
def test_one_behind_another_that_has_to_stay(first):
    model = randomized(nn.Sequential(nn.ReLU(), first(), nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4, activation="relu")))
    report = folds(model, torch.randn(2, 4, 6, 6), ["2", "3"])
    assert dict(report.skipped)["1"].startswith("its input is the output of 0 (ReLU)")
    folded = copy.deepcopy(model)
    again = refold(
        randomized(nn.Sequential(nn.ReLU(), first(), nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4, activation="relu"))),
        report.changed,
        report.recipe,
    ).model
    again.load_state_dict(folded.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(again(x), folded(x))


def test_two_that_go_together_where_neither_could_alone():
    """Each has a shift, which padding forbids; both together have none."""
    model = nn.Sequential(
        nn.ReLU(), nn.BatchNorm2d(4, eps=0.0), nn.BatchNorm2d(4, eps=0.0), nn.Conv2d(4, 2, 3, padding=1)
    )
    model[1].bias.data.fill_(0.5), model[2].running_mean.fill_(0.5), model[2].weight.data.fill_(2.0)
    folds(model.eval(), torch.randn(2, 4, 5, 5), ["1", "2"])


def test_two_before_a_layer():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    folds(randomized(model), torch.randn(6, 4), ["1", "2", "4"])


# --- who else is there --------------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Two convolutions and two normalizers, wired by a function."""

    def __init__(self, wire, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.other, self.norm, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), norm(4), norm(4)
        self.wire, self.flag = wire, True

    def forward(self, x):
        return self.wire(self, x)


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def by_torch(model):
    """torch's folding of a graph, or of all pairs that it finds there."""
    return optimization.fuse(copy.deepcopy(model).eval()).double()


def test_one_layer_called_twice_before_two_normalizers_or_alone():
    """torch folds the second normalizer into the layer it has folded the first into."""

    def two(m, x):
        return m.norm(m.conv(x)) + m.second(m.conv(x * 2))

    def alone(m, x):
        return m.norm(m.conv(x)) + m.conv(x * 2)

    for wire in (two, alone):
        model = randomized(Wired(wire))
        expected = exact(model, X)
        with torch.no_grad():
            wrong = by_torch(model)(X.double())
        assert (wrong - expected).abs().max() > 0.1
        assert "is called 2 times, 1 of them without it" in reasons(model, X)["norm"]


def test_layers_and_normalizers_that_always_come_together():
    folds(randomized(Wired(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())))), X, ["norm"])
    folds(randomized(Wired(lambda m, x: m.norm(m.conv(x)) * m.norm(m.other(x)))), X, ["norm"])
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x)) * m.norm(x.relu())))
    assert "its input is the result of relu" in reasons(model, X)["norm"]


@pytest.mark.parametrize(
    "wire",
    [
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),
        lambda m, x: (lambda y: m.norm(y) + m.other(y))(m.conv(x)),
        lambda m, x: (lambda y: torch.cat([m.norm(y), y[:, :1]], 1))(m.conv(x)),
    ],
)
def test_what_others_see_stays(wire):
    model = randomized(Wired(wire))
    assert "the output of conv (Conv2d) is used elsewhere, too" in reasons(model, X)["norm"]


def test_a_question_for_the_shape_is_no_use():
    def wire(m, x):
        y = m.conv(x)
        n, c, h, w = y.shape
        return m.norm(y).reshape(n, c, h * w) / y.size(0)

    folds(randomized(Wired(wire)), X, ["norm"])


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (lambda m, x: m.norm(m.conv(x).relu()), "its input is the result of relu"),
        (lambda m, x: m.norm(m.conv(x) + m.other(x)), "its input is the result of add"),
        (lambda m, x: m.norm(m.conv(x).chunk(2, 1)[0].repeat(1, 2, 1, 1)), "its input is the result of repeat"),
        (lambda m, x: m.norm(x), "its input is that of the model"),
        (lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum(), "the model reads its weight"),
        (lambda m, x: m.norm(m.conv(x)) * m.norm.eps, "the model reads its eps"),
        (lambda m, x: m.norm(F.conv2d(x, m.conv.weight)), "its input is the result of conv2d"),
        (lambda m, x: m.norm(m.conv.forward(x)), "its input is the result of conv2d"),
    ],
)
def test_what_is_not_a_layer_and_its_normalizer(wire, reason):
    assert reason in reasons(randomized(Wired(wire)), X.abs())["norm"]


def test_not_called_is_not_folded():
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x))))
    assert folds(model, X, ["norm"]).skipped == (("second", "the example does not reach it"),)


def test_the_order_of_definition_means_nothing():
    model = randomized(Wired(lambda m, x: m.second(m.conv(m.norm(m.other(x))))))
    report = folds(model, X, ["norm", "second"])
    assert report.notes[:2] == ("norm → other", "second → conv")


def test_by_the_order_of_definition_another_layer_gets_the_normalizer():
    """What packages do that go through named_children(): a wrong output without a word."""
    model = randomized(Wired(lambda m, x: m.second(m.other(m.norm(m.conv(x)).relu()))))
    expected, theirs, last = exact(model, X), copy.deepcopy(model), None
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d) and last is not None:
            setattr(theirs, last, fuse_conv_bn_eval(getattr(model, last), child))
            setattr(theirs, name, nn.Identity())
        last = name if isinstance(child, nn.Conv2d) else None
    assert (exact(theirs, X) - expected).abs().max() > 0.1 * expected.abs().max()
    folds(model, X, ["norm", "second"])


def test_blocks_of_a_model_that_cannot_be_traced():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = Wired(lambda m, x: m.second(m.norm(m.conv(x)).relu()))
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(5))
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                if x.abs().max() < 1e9:
                    x = block(x)
            return self.norm(self.conv(x))

    report = folds(randomized(Model()), X, ["first.norm", *(f"blocks.{k}.1" for k in range(5))])
    assert "chooses between branches by the value of a tensor" in dict(report.skipped)["norm"]


def padded(m, x):
    """As TensorFlow pads, and MobileNets of transformers."""
    height, width = x.shape[-2:]
    below, right = (max(3 - (2 if size % 2 == 0 else size % 2), 0) for size in (height, width))
    return m.norm(m.conv(F.pad(x, (0, right, 0, below))))


def test_every_branch_is_traced():
    model = randomized(Wired(padded))
    expected = [exact(model, x) for x in (X, X[..., :-1], X[..., :-1, :], X[..., :1, :1])]
    folds(model, X, ["norm"])
    for x, y in zip((X, X[..., :-1], X[..., :-1, :], X[..., :1, :1]), expected, strict=True):
        close(model, x, y)


def test_what_holds_in_the_branch_of_the_example_alone_is_not_folded():
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x)) if x.shape[-1] > 4 else m.conv(x)))
    assert reasons(model, X)["norm"].startswith("conv is called 2 times, 1 of them without it")
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x)) if x.shape[-1] > 4 else m.norm(x)))
    assert "its input is that of the model" in reasons(model, X)["norm"]
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x)) if int(x.shape[-1]) > 4 else m.conv(x)))
    assert "cannot be traced: it makes a number of Python of a value" in reasons(model, X)["norm"]


def test_branches_that_end_the_same_are_folded_in_both():
    model = randomized(Wired(lambda m, x: m.norm(m.conv(x)).relu() if x.mean() > 0 else m.norm(m.conv(x))))
    expected = exact(model, -X)
    folds(model, X, ["norm"])
    close(model, -X, expected)


def test_objects_types_and_parameters_may_be_asked_as_they_are_now():
    class Config:
        normalized = True

    class Model(Wired):
        def __init__(self, kind):
            super().__init__(None)
            self.config, self.kind = Config(), kind

        def forward(self, x):
            y = self.conv(x.to(next(self.parameters()).dtype))
            if isinstance(y, torch.Tensor) and self.config.normalized and isinstance(x + 1, torch.Tensor):
                y = self.norm(y)
            return self.kind(y)

    folds(randomized(Model(torch.relu)), X, ["norm"])
    pair = randomized(Model(lambda y: y if isinstance(y.chunk(2, 1), tuple) else y * 2))
    assert "it asks for the type of a value that it has computed" in reasons(pair, X)["norm"]


def test_sizes_that_are_arguments_do_not_crash_torch():
    """Told that such a value is a tensor, torch's own code took the Python object for one."""

    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, shape):
            return self.conv(torch.zeros(shape) + 1)

    class Model(Wired):
        def __init__(self):
            super().__init__(None)
            self.position = Position()

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y + self.position((2, 4, 5, 5)).to(y.dtype)

    model = randomized(Model())
    report = ns.fold(model, X)
    assert report.changed == ("norm",)


def pausing(pause):
    """A model whose forward pauses while it is traced."""

    def wire(model, x):
        if isinstance(x, fx.Proxy):
            pause()
        return model.norm(model.conv(x))

    return randomized(Wired(wire))


def run(*actions):
    """Run in threads of their own."""
    with concurrent.futures.ThreadPoolExecutor(len(actions)) as pool:
        return [future.result(60) for future in [pool.submit(action) for action in actions]]


def test_other_threads_run_their_models_while_one_is_traced():
    """What the tracer patches, isinstance and the attributes and calls of modules, is its own thread's business."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)).eval()
    x = torch.randn(3, 4)
    expected = model(x)
    tracing, done = threading.Event(), threading.Event()

    def pause():
        tracing.set()
        assert done.wait(30)

    def other():
        assert tracing.wait(30)
        try:
            assert isinstance(x, torch.Tensor)
            assert not isinstance(x, list)
            assert model[1].track_running_stats
            return model(x), builtins.isinstance
        finally:
            done.set()

    report, (output, patched) = run(lambda: ns.fold(pausing(pause), X), other)
    assert report.changed == ("norm",)
    assert torch.equal(output, expected)
    assert patched is not ISINSTANCE  # it did run in the midst of it
    assert builtins.isinstance is ISINSTANCE


def test_random_numbers_of_another_thread_are_not_the_forwards():
    drawn = []

    def pause():
        if len(drawn) < 6:  # as many traces as there are without a second try
            drawn.append(run(lambda: torch.rand(1)))

    assert ns.fold(pausing(pause), X).changed == ("norm",)
    assert "draws random numbers" in reasons(pausing(lambda: torch.rand(1)), X)["norm"]


def test_two_threads_trace_one_after_the_other():
    """A second trace would take the first one's patches for the original, and bring them back for good."""
    tracing, both, finished = threading.Event(), threading.Event(), threading.Event()

    def pause_first():
        tracing.set()
        both.wait(0.5)  # in vain, unless both are traced at once

    def pause_second():
        both.set()
        finished.wait(0.5)

    def first():
        report = ns.fold(pausing(pause_first), X)
        finished.set()
        return report

    def second():
        tracing.wait(30)
        return ns.fold(pausing(pause_second), X)

    reports = run(first, second)
    assert [report.changed for report in reports] == [("norm",), ("norm",)]
    assert builtins.isinstance is ISINSTANCE
    assert "__getattribute__" not in vars(nn.Module)


def test_a_forward_that_keeps_what_it_computes_is_not_traced():
    class Model(Wired):
        def __init__(self):
            super().__init__(None)
            self.cache = {}

        def forward(self, x):
            y = self.norm(self.conv(x))
            self.cache.setdefault("y", y)
            return y

    class Cache:
        def __init__(self):
            self.kept = {}

    model = randomized(Model())
    assert "it keeps a state of its own" in reasons(model, X)["norm"]
    assert model.cache == {}

    class Aside(Model):
        def forward(self, x):
            y = self.norm(self.conv(x))
            self.cache.last = self.cache.kept["y"] = y
            return y

    model = randomized(Aside())
    model.cache = Cache()
    folded = ns.fold(model, X)
    assert "it keeps a state of its own" in dict(folded.skipped)["norm"]
    assert isinstance(model.cache.last, torch.Tensor)  # of the run on the example, which is theirs to keep
    assert not isinstance(model.cache.kept["y"], fx.Proxy)


def test_a_block_whose_inside_is_called_from_outside():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.block(x)
            return y + self.block[0](x) if int(y.abs().max()) < 1e9 else y

    assert "the forward of the model (Model) cannot be traced" in reasons(randomized(Model()), X)["block.1"]


# --- state --------------------------------------------------------------------------------------------------------


def simple(**options):
    return randomized(nn.Sequential(nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU()))


def test_training_is_refused():
    model = simple()
    before = state_hash(model)
    with pytest.raises(ns.ArgumentError, match=r"call model\.eval\(\) first"):
        ns.fold(model.train(), X)
    model.eval()
    assert state_hash(model) == before
    model[1].train()
    assert "in training mode" in reasons(model, X)["1"]


@pytest.mark.parametrize("where", [0, 1])
def test_hooks_would_miss_a_value(where):
    model = simple()
    handle = model[where].register_forward_hook(lambda *_: None)
    assert "has hooks" in reasons(model, X)["1"]
    handle.remove()
    folds(model, X, ["1"])


@pytest.mark.parametrize("tap", [nn.Identity, nn.Dropout, lambda: nn.Flatten(2)])
def test_hooks_between_would_see_another_value(tap):
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), tap(), nn.BatchNorm2d(6)))
    if isinstance(model[1], nn.Flatten):
        model[2].__class__ = nn.BatchNorm1d
    handle = model[1].register_forward_hook(lambda *_: None)
    assert "its input is the output of 1" in reasons(model, X)["2"]
    handle.remove()
    folds(model, X, ["2"])


def test_dropout_that_goes_on_in_evaluation_is_no_identity():
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Dropout(0.5), nn.BatchNorm2d(6)))
    model[1].train()
    assert "its input is the output of 1 (Dropout)" in reasons(model, X)["2"]


def test_blocks_with_hooks_are_looked_into():
    model = randomized(nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.ReLU()))
    model[0].register_forward_hook(lambda *_: None)
    folds(model, X, ["0.1"])


def test_hooks_elsewhere_do_not_matter():
    model, seen = simple(), []
    model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    model.register_forward_hook(lambda *_: None)
    folds(model, X, ["1"])
    seen.clear()
    assert model(X) is seen[0]


@pytest.mark.parametrize(
    "parametrize",
    [ns.parametrizations.weight_norm, ns.parametrizations.spectral_norm, ns.parametrizations.weight_standardization],
)
def test_parametrized_weights_are_made_plain_first(parametrize):
    model = simple()
    parametrize(model[0])
    model.eval()
    assert "parametrized; bake=True makes them plain" in reasons(model, X)["1"]
    before = state_hash(model, rng=True)
    report = folds(model, X, ["1"], bake=True)
    assert type(model[0]) is nn.Conv2d
    report.undo()
    assert state_hash(model, rng=True) == before
    folds(copy.deepcopy(model), X, ["1"], bake=True)  # and what it was copied from still is parametrized
    assert "parametrized" in reasons(model, X)["1"]


def test_tied_weights_stay():
    def tied():
        return randomized(Wired(lambda m, x: m.norm(m.conv(x)) + m.other(x)))

    same, view, aside = tied(), tied(), tied()
    same.other.weight = same.conv.weight
    view.other.weight.data = view.conv.weight.data.transpose(0, 1)
    aside.kept = [aside.conv.weight.data[:2]]
    for model, name in ((same, "other.weight"), (view, "other.weight"), (aside, "kept.0")):
        assert f"conv: its weights are shared with {name}" in reasons(model, X)["norm"]


def test_parameters_keep_their_identity_and_flags():
    model = simple(bias=False)
    weight, optimizer = model[0].weight, torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight.requires_grad_(False)
    model[0].weight.tag = "kept"
    ns.fold(model, X)
    assert model[0].weight is weight is optimizer.param_groups[0]["params"][0]
    assert (weight.requires_grad, model[0].bias.requires_grad, weight.tag) == (False, False, "kept")
    assert model[0].bias.dtype == weight.dtype
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(layout):
    model = simple().to(memory_format=layout)
    strides = model[0].weight.stride()
    folds(model, X, ["1"])
    assert model[0].weight.stride() == strides


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1e-4), (torch.float16, 1e-5)])
def test_half_precision_is_rounded_once_and_said(dtype, least):
    model = simple().to(dtype)
    conv, norm = copy.deepcopy(model[0]).double(), copy.deepcopy(model[1]).double()
    report = ns.fold(model, X.to(dtype))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.equal(model[0].weight, (conv.weight * scale[:, None, None, None]).to(dtype))
    assert torch.equal(model[0].bias, ((conv.bias - norm.running_mean) * scale + norm.bias).to(dtype))
    exactly, rounded = map(float, re.findall(r"(\d\S*e[-+]\d+) ", report.notes[-1]))
    assert exactly < 1e-14 < least < rounded < 0.05
    assert report.notes[-1].endswith(f"rounded to {str(dtype).removeprefix('torch.')}")


def test_weights_that_would_overflow_or_are_no_numbers():
    model = simple().half()
    model[0].weight.data.fill_(1000.0), model[1].weight.data.fill_(100.0)
    assert "0: its weights would overflow" in reasons(model, X.half())["1"]
    model = simple()
    model[1].running_mean[0] = float("nan")
    assert "not finite" in reasons(model, X)["1"]


def test_copy_leaves_the_original():
    model = simple()
    before = state_hash(model)
    report = folds(model, X, ["1"], copy=True)
    assert report.model is not model
    assert state_hash(model) == before


def test_undo_is_bit_identical():
    model = randomized(Wired(lambda m, x: m.second(m.other(m.norm(m.conv(x)).relu()))))
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = state_hash(model, rng=True)
    report = ns.fold(model, X, measure=True)
    assert re.fullmatch(r"latency on the example: .* ms before, .* ms after \(medians of 9 .*\)", report.notes[-1])
    assert state_hash(model, rng=True) != before
    report.undo()
    assert state_hash(model, rng=True) == before


def test_the_report_of_a_deep_model_ends_with_the_proof():
    model = randomized(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(20))))
    report = ns.fold(model, torch.randn(5, 4), measure=True)
    lines = str(report).splitlines()
    assert [line[11:29] for line in lines[-4:-1]] == ["… and 10 more", "19.1 → 19.0", "same output in eva"]
    assert lines[-1].startswith("           latency on the example")
    assert len(lines) == 1 + 13 + 13
    assert len(report.table(100).splitlines()) == 1 + 20 + 22


def test_a_model_that_cannot_be_copied_is_folded_without_its_latency():
    model = simple()
    model.lock = threading.Lock()
    assert ns.fold(model, X, measure=True).notes[-1] == "latency on the example: unknown: the model cannot be copied"


def test_select():
    model = randomized(Wired(lambda m, x: m.second(m.other(m.norm(m.conv(x)).relu()))))
    assert folds(model, X, ["second"], select="second").skipped == ()
    with pytest.raises(ns.ArgumentError, match="matches no normalizer"):
        ns.fold(model, X, select="nothing")


def test_subclasses():
    class Logged(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    class Clamped(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    class Same(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return F.conv2d(F.pad(x, (2, 0, 1, 1)), weight, bias)

    class Plain(nn.Conv2d):
        pass

    class Holding(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.unused = nn.ReLU()

    for conv, norm, reason in (
        (nn.Conv2d, Logged, "Logged has a forward of its own"),
        (nn.Conv2d, Holding, "Holding holds other modules"),
        (Clamped, nn.BatchNorm2d, "0: Clamped computes more than the class it comes from"),
    ):
        model = randomized(nn.Sequential(conv(4, 3, 3), norm(3)))
        assert reason in reasons(model, X)["1"]
    for conv in (Same, Plain):
        folds(randomized(nn.Sequential(conv(4, 3, 3), nn.BatchNorm2d(3))), X, ["1"])
    folds(randomized(nn.Sequential(nn.BatchNorm2d(4), Plain(4, 3, 3))), X, ["0"])
    padded = randomized(nn.Sequential(nn.BatchNorm2d(4), Same(4, 3, 3)))
    assert "Same computes more than" in reasons(padded, X)["0"]


def test_accelerated_graph_and_compiled_models():
    fast = randomized(Wired(lambda m, x: m.second(m.other(m.norm(m.conv(x)).relu())) + x))
    ns.accelerate(fast, X)
    assert "fused" in repr(fast)
    folds(fast, X, ["norm", "second"])
    assert "fused" not in repr(fast)
    folds(fx.symbolic_trace(simple()), X, ["1"])
    compiled = torch.compile(simple(), backend="eager")
    with torch.no_grad():
        expected = compiled(X)
        assert ns.fold(compiled, X).changed == ("_orig_mod.1",)
        torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)


def test_a_wrong_proof_takes_everything_back():
    """A global variable is what no trace sees."""
    state = {"tap": False}

    def wire(m, x):
        y = m.conv(x)
        return m.norm(y) + (y if state["tap"] else 0)

    model = randomized(Wired(wire))
    before = state_hash(model, rng=True)

    def forward(model, batch):
        state["tap"] = True
        try:
            return model(batch)
        finally:
            state["tap"] = False

    with pytest.raises(ns.ProofError, match="fold would change what the model computes in evaluation mode"):
        ns.fold(model, X, forward=forward)
    assert state_hash(model, rng=True) == before


# --- what others get wrong ----------------------------------------------------------------------------------------


def test_torch_folds_transposed_convolutions_as_if_they_had_one_group():
    model = randomized(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError, match=r"size of tensor a \(2\) must match"):
        fuse_conv_bn_eval(*copy.deepcopy(model), transpose=True)
    folds(model, X, ["1"])


def test_torch_cannot_fold_linear_with_a_normalizer_without_affine():
    model = randomized(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)))
    with pytest.raises(TypeError):
        fuse_linear_bn_eval(*copy.deepcopy(model))
    folds(model, torch.randn(5, 4), ["1"])


def test_torch_rounds_the_scale_of_half_precision_first():
    model = simple().bfloat16()
    conv, norm = copy.deepcopy(model[0]).double(), copy.deepcopy(model[1]).double()
    best = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    torchs = fuse_conv_bn_eval(*copy.deepcopy(model)[:2]).weight.double()
    ns.fold(model, X.bfloat16())
    ours = model[0].weight.double()
    assert (ours - best).norm() < 0.8 * (torchs - best).norm()


@pytest.mark.filterwarnings("ignore")
def test_torch_divides_by_gamma_in_quantization_aware_training():
    """Where a channel's γ is 0, what it computes there is NaN."""
    from torch.ao import quantization
    from torch.ao.nn import intrinsic

    pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    randomized(pair)
    assert pair[1].weight[0] == 0
    fused = intrinsic.ConvBn2d(*copy.deepcopy(pair)).train()
    fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    theirs = intrinsic.qat.ConvBn2d.from_float(fused).eval()
    theirs.apply(quantization.disable_fake_quant), theirs.apply(quantization.disable_observer)
    assert theirs(X)[:, 0].isnan().all()
    folds(pair, X, ["1"])


def test_torch_cannot_trace_subclasses():
    class Own(nn.BatchNorm2d):
        pass

    model = randomized(nn.Sequential(nn.Conv2d(4, 4, 1), Own(4)))
    with pytest.raises(fx.proxy.TraceError):
        optimization.fuse(copy.deepcopy(model))
    folds(model, X, ["1"])


def test_a_bias_is_scaled_too():
    """Fixtures without bias hide this: yolov3 and ncnn added it as it was."""
    folds(simple(bias=True), X, ["1"])


# --- ONNX ---------------------------------------------------------------------------------------------------------

onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


@onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx_agrees_and_holds_no_normalizer(tmp_path):
    import onnx as theirs

    model = simple()
    expected = exact(model, X)
    report = ns.fold(model, X, onnx=tmp_path / "model.onnx")
    assert "onnxruntime agrees within" in report.notes[-1]
    close(model, X, expected)
    operators = {node.op_type for node in theirs.load(tmp_path / "model.onnx").graph.node}
    assert operators == {"Conv", "Relu"}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@onnx
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_onnx_in_half_precision(tmp_path, dtype):
    report = ns.fold(simple().to(dtype), X.to(dtype), onnx=tmp_path / "model.onnx")
    assert ("agrees within" if dtype == torch.float16 else "not compared: onnxruntime cannot run it") in report.notes[
        -1
    ]


@onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx_that_computes_something_else_takes_everything_back(tmp_path, monkeypatch):
    model = simple()
    before = state_hash(model, rng=True)
    monkeypatch.setattr(surgery.export, "TOLERANCE", -1.0)
    with pytest.raises(ns.ProofError, match="onnxruntime computes something else"):
        ns.fold(model, X, onnx=tmp_path / "model.onnx")
    assert state_hash(model, rng=True) == before
    assert not [*tmp_path.iterdir()]


@onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_model_with_named_inputs(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, scale, shift=0.0):
            return {"out": self.norm(self.conv(x)) * scale + shift, "in": x}

    batch = {"scale": torch.tensor(2.0), "x": X}
    report = ns.fold(randomized(Net()), batch, onnx=tmp_path / "model.onnx")
    assert report.changed == ("norm",)
    assert "onnxruntime agrees within" in report.notes[-1]


def test_onnx_that_is_not_installed_changes_nothing(tmp_path, monkeypatch):
    model = simple()
    before = state_hash(model, rng=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ns.DependencyError, match=r"normscope\[onnx\]"):
        ns.fold(model, X, onnx=tmp_path / "model.onnx")
    assert state_hash(model, rng=True) == before
    assert not [*tmp_path.iterdir()]


# --- files and command line ---------------------------------------------------------------------------------------


def build():
    """Everything that a folded checkpoint has to bring back: a new bias, new γ and β, an activation, baked weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), ns.nn.BatchNorm2d(6, activation="silu"), nn.BatchNorm2d(6, affine=False),
        nn.BatchNorm2d(6), nn.ReLU(), ns.parametrizations.weight_norm(nn.ConvTranspose2d(6, 4, 3, groups=2)),
        nn.BatchNorm2d(4), nn.GroupNorm(2, 4),
    )  # fmt: skip
    return randomized(model)


def test_a_checkpoint_does_the_fold_again(tmp_path):
    model = build()
    expected = exact(model, X)
    report = ns.fold(model, X, bake=True)
    assert report.changed == ("1", "3", "6")
    assert report.recipe == {"bake": True, "new": ["0", "2"]}
    checkpoint.write(model, [checkpoint.noted(report)], tmp_path / "a.pt")
    again = ns.load(build, tmp_path / "a.pt").eval()
    close(again, X, expected)
    assert torch.equal(again(X), model(X))
    assert repr(again) == repr(model)
    with pytest.raises(ns.ArgumentError, match="the model has no 1, 3, 6, 0, 2"):
        ns.load(lambda: nn.Linear(2, 2), tmp_path / "a.pt")


THEIRS = """
import torch
from torch import nn

import normscope as ns

print("noise on stdout")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))


def loader():
    return [(torch.randn(2, 4, 5, 5), torch.zeros(2))]


def none():
    return []


def twice(model, batch):
    twice.calls = getattr(twice, "calls", 0) + 1
    return model(batch[0]) * twice.calls
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"folded_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(THEIRS)

    def invoke(*arguments):
        return CliRunner().invoke(cli.main, ("fold", f"{name}:model", "--data", "loader", *arguments))

    invoke.build = lambda: importlib.import_module(name).model()
    return invoke


def test_the_command_writes_a_checkpoint_that_load_reads(call, tmp_path):
    result = call("-o", "folded.pt")
    assert result.exit_code == 0, result.output
    assert "fold: 1 changed, 1 skipped" in result.stdout
    assert "same output in evaluation mode" in result.stdout
    assert "latency on the example" in result.stdout
    assert "noise" not in result.stdout
    assert result.stdout.endswith("written: folded.pt\nnext: normscope.load(model, 'folded.pt')\n")
    model, x = ns.load(call.build, "folded.pt").eval(), torch.randn(2, 4, 5, 5)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), call.build().eval()(x))
    record = json.loads(call("--format", "json", "--no-measure", "--select", "1", "--select", "3").stdout)
    assert record["changed"] == ["1"]
    assert [entry["name"] for entry in record["skipped"]] == ["3"]
    assert record["written"] is None


def test_the_command_keeps_what_had_been_done_before(call):
    frozen = ns.freeze(call.build(), select="3")
    checkpoint.write(frozen.model, [checkpoint.noted(frozen)], "frozen.pt")
    assert call("--weights", "frozen.pt", "-o", "folded.pt").exit_code == 0
    assert [operation["code"] for operation in checkpoint.operations("folded.pt")] == ["freeze", "fold"]
    assert is_frozen(ns.load(call.build, "folded.pt")[3])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-o", "nowhere/folded.pt"), "there is no folder nowhere"),
        (("--data", "none"), "yields no batch"),
        (("--select", "layer9"), "select matches no normalizer"),
        (("--weights", "absent.pt"), "there is no file absent.pt"),
        (("--forward", "twice"), "fold would change what the model computes"),
    ],
)
def test_the_command_says_what_is_wrong(call, arguments, words):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


# --- classes of others --------------------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: the normalizer has its activation as a child."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class DetrFrozenBatchNorm2d(nn.Module):
    """As those of detectors: four buffers."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_activation_that_is_a_child_keeps_its_name(accelerated):
    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 2, 1)))
    act = model[1].act
    if accelerated:
        assert ns.accelerate(model, X).changed == ("1",)
    folds(model, X, ["1"])
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "1.drop", "1.act", "2"]
    assert model[1].act is act


def test_frozen_normalizers_of_detectors():
    folds(randomized(nn.Sequential(nn.Conv2d(4, 6, 3), DetrFrozenBatchNorm2d(6))), X, ["1"])

    class NoFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    model = randomized(nn.Sequential(nn.Conv2d(4, 6, 3), NoFrozenBatchNorm2d(6)))
    assert "no affine map of its channels in evaluation" in reasons(model, X)["1"]
