"""accelerate and to_torch: the same numbers, fewer calls, and the module's own forward whenever something differs."""

import collections
import contextlib
import copy
import functools
import inspect
import io
import itertools
import pickle
import sys
import types

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope import surgery
from normscope.errors import ProofError
from normscope.kernels.activations import ACTIVATIONS
from normscope.surgery import find, foreign, fused, keep_float32, state_hash
from normscope.surgery.chains import activation_of
from normscope.surgery.fused import programs_of

C = 8


# --- networks -----------------------------------------------------------------------------------------------------


class Basic(nn.Module):
    """ResNet: one ReLU called twice, in place, an addition in place."""

    def __init__(self, norm=nn.BatchNorm2d, shortcut=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), norm(C)
        self.downsample = shortcut

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(self.bn2(out).relu_()) + x


class InvertedResidual(nn.Module):
    """MobileNet: the normalizer at the end of a Sequential meets the addition outside of it."""

    def __init__(self, activation):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(C, 2 * C, 1, bias=False), nn.BatchNorm2d(2 * C), activation()),
            nn.Sequential(nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C), nn.BatchNorm2d(2 * C), activation()),
            nn.Conv2d(2 * C, C, 1, bias=False),
            nn.BatchNorm2d(C),
        )

    def forward(self, x):
        return x + self.conv(x)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ns.nn.LayerNorm2d(C)
        self.conv, self.norm = nn.Conv2d(C, C, 7, padding=3, groups=C), nn.LayerNorm(C, eps=1e-6)
        self.wide, self.act, self.narrow = nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)
        self.gamma = nn.Parameter(torch.full((C,), 0.5))

    def forward(self, x):
        y = self.conv(self.stem(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.narrow(self.act(self.wide(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Transformer(nn.Module):
    """Before the second half, the sum is normalized and kept."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(C), norm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.drop = nn.Identity()

    def forward(self, x, scale=None):
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, y, y, need_weights=False)[0])
        return x + self.drop(self.mlp(self.norm2(x)))


class DenseLayer(nn.Module):
    """DenseNet: a list of tensors or one; dropout by function, off."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(2 * C), nn.Conv2d(2 * C, C, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)
        self.relu, self.drop_rate = nn.ReLU(inplace=True), 0.0

    def forward(self, features):
        features = [features] if isinstance(features, torch.Tensor) else features
        y = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        y = self.conv2(self.relu(self.norm2(y)))
        if self.drop_rate > 0:
            y = F.dropout(y, p=self.drop_rate, training=self.training)
        return y


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DenseLayer()

    def forward(self, x):
        return self.layer([x, x.flip(0)]) + self.layer(torch.cat([x, -x], 1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()

        def double(c):
            layers = (nn.Conv2d(c, C, 3, padding=1), nn.GroupNorm(2, C), nn.SiLU(), nn.Conv2d(C, C, 3, padding=1))
            return nn.Sequential(*layers, nn.InstanceNorm2d(C, affine=True, track_running_stats=True), nn.LeakyReLU())

        self.down, self.join = nn.ModuleList([double(C), double(C)]), double(2 * C)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        return self.join(torch.cat([F.interpolate(x, scale_factor=2), skips[0]], 1))


class Functions(nn.Module):
    """Activations as functions and methods, numbers and all; a mode that changes the path."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(C) for _ in range(8)])
        self.dropout = 0.0

    def forward(self, x):
        a, b, c, d, e, f, g, h = (norm(x) for norm in self.norms)
        x = F.gelu(a, approximate="tanh") + F.hardswish(b, inplace=True) + torch.sigmoid(c) + F.hardtanh(d, 0.0, 6.0)
        x = F.dropout(x, self.dropout, self.training)
        e += x
        return F.leaky_relu(f, 0.01) + torch.add(x, g).tanh() + F.elu(e) + h


class ConvNorm(nn.Module):
    """A wrapper that ends in its normalizer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.Identity()

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class Wrapped(nn.Module):
    """What follows a normalizer is with another module."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = ConvNorm(), ConvNorm(), ConvNorm()
        self.rate = 0.0

    def forward(self, x):
        y = self.second(F.silu(self.first(x)))
        if self.training and self.rate > 0:
            y = F.dropout(y, self.rate)
        return F.relu(y + x) + self.third(x)


def images(n=4):
    return torch.randn(n, C, 6, 6) + 0.5


NETS = {
    "basic": (Basic, images, ["bn1 → relu", "bn2 + residual → relu"]),
    "basic, downsample": (
        lambda: Basic(shortcut=nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))),
        images,
        ["bn1 → relu", "bn2 + residual → relu"],
    ),
    "basic, empty shortcut": (
        lambda: Basic(shortcut=nn.Sequential()), images, ["bn1 → relu", "bn2 + residual → relu"],
    ),
    "basic, GroupNorm": (lambda: Basic(lambda c: nn.GroupNorm(2, c)), images, ["bn1 → relu", "bn2 + residual → relu"]),
    "pre-activation": (PreActivation, images, ["bn1 → relu", "bn2 → relu"]),
    "inverted, relu6": (
        lambda: InvertedResidual(nn.ReLU6), images, ["conv.0.1 → relu6", "conv.1.1 → relu6", "conv.3 + residual"],
    ),
    "inverted, hardswish": (
        lambda: InvertedResidual(nn.Hardswish),
        images,
        ["conv.0.1 → hardswish", "conv.1.1 → hardswish", "conv.3 + residual"],
    ),
    "wrapped": (
        Wrapped, images, ["first.norm → silu", "second.norm + residual → relu", "third.norm + residual"],
    ),
    "convnext": (ConvNeXt, images, []),
    "transformer": (Transformer, lambda: torch.randn(4, 5, C), ["sum → norm2"]),
    "transformer, RMSNorm": (lambda: Transformer(nn.RMSNorm), lambda: torch.randn(4, 5, C), ["sum → norm2"]),
    "dense": (Dense, images, ["layer: norm1 → relu", "layer: norm2 → relu"]),
    "U-Net": (
        UNet,
        images,
        [f"{name}.{k} → {act}" for name in ("down.0", "down.1", "join") for k, act in ((1, "silu"), (4, "leaky_relu"))],
    ),
    "functions": (
        Functions,
        images,
        ["norms.0 → gelu_tanh", "norms.1 → hardswish", "norms.2 → sigmoid", "norms.3 → relu6",
         "norms.4 + residual → elu", "norms.5 → leaky_relu", "norms.6 + residual → tanh", "norms.7 + residual"],
    ),
    "MLP": (
        lambda: nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Tanh(), nn.LayerNorm(C), nn.Mish()),
        lambda: torch.randn(16, C),
        ["1 → tanh", "3 → mish"],
    ),
    "video": (
        lambda: nn.Sequential(nn.Conv3d(C, C, 3), nn.BatchNorm3d(C), nn.ELU(inplace=True)),
        lambda: torch.randn(2, C, 4, 5, 6),
        ["1 → elu"],
    ),
}  # fmt: skip


def shaken(build):
    """γ = 1, β = 0 and fresh statistics would hide what they do."""
    model = build()
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            t.data.add_(0.3 * torch.rand_like(t))
    return model


def step(model, x, g=None):
    """Output, gradients of input and parameters, and buffers after a training step, then the output in evaluation."""
    x = x.clone().requires_grad_()
    y = model.train()(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if g is None else g
    y.backward(g)
    grads = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    buffers = [b.clone() for b in model.buffers() if b.is_floating_point()]
    return [y.detach(), *grads, *buffers, model.eval()(x).detach()]


def assert_same(ours, theirs, tolerance):
    """|a − b| ≤ tolerance · max(1, max|b|): sums over the whole tensor round in another order, up to 2.1e-5."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))


def chains(model):
    return [
        f"{name}: {chain}" if name else chain
        for name, module in model.named_modules()
        for program in programs_of(module)[:1]
        for chain in program.chains
    ]


@contextlib.contextmanager
def without_modules():
    """Activation modules must not be called."""

    def refuse(self, x):
        raise AssertionError(f"{type(self).__name__} was called")

    kinds = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.ELU, nn.Tanh, nn.Mish, nn.Hardswish, nn.LeakyReLU, nn.Hardtanh)
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "forward", refuse)
        yield


# Double: rounding only. Single: a few of 2⁻²⁴ per layer, and its like in the gradient.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
@pytest.mark.parametrize("name", NETS)
def test_same_numbers_in_fewer_calls(name, dtype, tolerance):
    build, data, expected = NETS[name]
    model, x = shaken(build).to(dtype), data().to(dtype)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    held = [id(t) for t in (*model.modules(), *model.parameters(), *model.buffers())]
    report = ns.accelerate(model, x)
    assert report.model is model
    assert not report.skipped
    assert set(report.changed) == {f.name for f in find(before) if not isinstance(f.module, ns.nn.base.Layer)}
    assert chains(model) == expected
    assert report.notes[: len(expected)] == tuple(expected)
    assert list(model.state_dict()) == keys
    assert [id(t) for t in (*model.modules(), *model.parameters(), *model.buffers())] == held
    with without_modules():
        ours = step(model, x)
    assert_same(ours, step(before, x), tolerance)
    model.load_state_dict(copy.deepcopy(before).state_dict())
    fresh = shaken(build).to(dtype)
    hashed = state_hash(fresh)
    ns.accelerate(fresh, x).undo()
    assert state_hash(fresh) == hashed
    ns.accelerate(fresh)
    ns.to_torch(fresh)
    assert state_hash(fresh) == hashed


def test_an_optimizer_built_before_steps_as_it_would_have():
    model = shaken(Basic)
    before = copy.deepcopy(model)
    steps = []
    for each in (model, before):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        if each is model:
            ns.accelerate(each)
        for k in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, C, 6, 6, generator=torch.Generator().manual_seed(k))
            each(x).square().mean().backward()
            optimizer.step()
        steps.append([t.detach() for t in (*each.parameters(), *each.buffers())])
    assert_same(*steps, 1e-4)  # AdamW divides by the size of a gradient, which blows up rounding where that is small


def test_channels_last_stays():
    model, x = shaken(Basic), images().contiguous(memory_format=torch.channels_last)
    before = copy.deepcopy(model)
    ns.accelerate(model)
    assert_same(step(model, x), step(before, x), 5e-5)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = shaken(Basic).to(dtype), images().to(dtype)
    before = copy.deepcopy(model)
    ns.accelerate(model, x)
    # Ours rounds once where norm, sum and ReLU round three times.
    assert_same([model.eval()(x)], [before.eval()(x)], 4 * torch.finfo(dtype).eps)


def test_a_copy_leaves_the_model():
    model, x = Basic(), images()
    hashed = state_hash(model)
    report = ns.accelerate(model, x, copy=True)
    assert state_hash(model) == hashed
    assert report.model is not model
    assert chains(report.model) == NETS["basic"][2]
    assert not chains(report.undo())


def test_a_model_that_is_a_normalizer():
    model = nn.BatchNorm2d(C)
    report = ns.accelerate(model)
    assert (report.changed, report.model, type(model)) == (("",), model, ns.nn.BatchNorm2d)
    assert type(ns.to_torch(model).model) is nn.BatchNorm2d


def test_select_and_doing_it_twice():
    model = nn.Sequential(Basic(), Basic())
    report = ns.accelerate(model, select="0.bn1")
    assert report.changed == ("0.bn1",)
    assert chains(model) == ["0: bn1 → relu"]
    assert ns.accelerate(model, select="1").changed == ("1.bn1", "1.bn2")
    assert ns.accelerate(model, select="0.bn2").changed == ("0.bn2",)
    assert chains(model) == [f"{k}: {chain}" for k in (0, 1) for chain in NETS["basic"][2]]
    hashed = state_hash(model)
    assert ns.accelerate(model).changed == ()
    assert state_hash(model) == hashed
    with pytest.raises(ns.ArgumentError, match="matches no normalizer"):
        ns.accelerate(model, select="2")


def test_modes_flags_and_traits_are_kept():
    model, x = shaken(Basic).eval(), images()
    model.bn2.train()
    model.bn1.requires_grad_(False)
    model.bn1.note = "mine"
    ns.freeze(model, select="bn1")
    keep_float32(model, select="bn2")
    before = copy.deepcopy(model)
    ns.accelerate(model, x)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert model.bn1.note == "mine"
    assert "frozen" in repr(model.bn1)
    with without_modules():
        ours = step(model, x)
    assert_same(ours, step(before, x), 5e-5)
    ns.unfreeze(model)
    assert type(model.bn1) is ns.nn.BatchNorm2d


# --- what is left alone -------------------------------------------------------------------------------------------


def noop(*_):
    return None


class Sub(nn.BatchNorm2d):
    """What users do."""

    def forward(self, x):
        return 2 * super().forward(x)


class Line(nn.Module):
    """norm → act, by a function of the two and their input."""

    def __init__(self, function, norm=None, act=None):
        super().__init__()
        self.norm, self.act, self.drop = norm or nn.BatchNorm2d(C), act or nn.ReLU(), nn.Dropout(0.5)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def plain(self, x):
    return self.act(self.norm(x))


def hooked(name):
    line = Line(plain)
    getattr(line, name).register_forward_hook(noop)
    return line


def twice(self, x):
    return self.act(self.norm(x)) + self.norm(x)


def elsewhere(self, x):
    y = self.norm(x)
    return self.act(y) + y


def doubled(self, x):
    y = self.norm(x)
    return self.act(y + y)


def dropped(self, x):
    return self.act(self.drop(self.norm(x)))


def into_the_other(self, x):
    y = 2 * x
    y += self.norm(x)
    return self.act(y) + y


def overwritten(self, x):
    z = 2 * x
    y = self.norm(z)
    z.mul_(3)
    return self.act(y + z)


def overwritten_later(self, x):
    z = 2 * x
    y = self.act(self.norm(x) + z)
    return y + z.mul_(3)


def stateful(self, x):
    self.seen = getattr(self, "seen", 0) + 1
    return plain(self, x)


def random(self, x):
    return plain(self, x) if torch.rand(1) < 2 else x


def by_gradients(self, x):
    return plain(self, x) if torch.is_grad_enabled() else self.act(self.norm(2 * x))


def by_value(self, x):
    return plain(self, x) if x.dim() == 4 else x


def by_type(self, x):
    y = self.norm(x)
    return self.act(y) if isinstance(y, torch.Tensor) else y


def by_config(self, x):
    return plain(self, x) if self.settings.on else x


def with_settings():
    line = Line(by_config)
    line.settings = types.SimpleNamespace(on=True)
    return line


def collects(self, x):
    self.outputs.append(x)
    return plain(self, x)


def with_outputs():
    line = Line(collects)
    line.outputs = []
    return line


def makes_a_constant(self, x):
    return plain(self, x) + torch.ones(1)


def without_gradients(self, x):
    with torch.no_grad():
        y = 2 * x
    return plain(self, x) + y


def in_float32(self, x):
    with torch.autocast("cpu", enabled=False):
        return plain(self, x)


def checkpointed(self, x):
    return checkpoint(self.act, checkpoint(self.norm, x, use_reentrant=False), use_reentrant=False)


def saved_elsewhere(self, x):
    with torch.autograd.graph.save_on_cpu():
        return plain(self, x)


def by_dtype(self, x):
    return plain(self, x.to(next(self.parameters()).dtype))


def caught(self, x):
    try:
        y = 2 * x if x.sum() > 1e9 else x
    except Exception:
        y = 3 * x
    return plain(self, y)


def by_index(self, x):
    z = 2 * x
    y = self.norm(z)
    z[:, 0] = 0
    return self.act(y + z)


def unknown(self, x):
    z = 2 * x
    return self.act(self.norm(z) + self.writer(z))


class Writer(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def with_writer():
    line = Line(unknown)
    line.writer = Writer()
    return line


def tied():
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    model[3] = model[0]
    return model


def overridden():
    line = Line(plain)
    forward = line.norm.forward
    line.norm.forward = lambda x: forward(x)
    return line


LEFT = {
    "output used elsewhere": (lambda: Line(elsewhere), {"norm": "used elsewhere"}),
    "added to itself": (lambda: Line(doubled), {}),
    "hook on the normalizer": (lambda: hooked("norm"), {"norm": "norm has hooks"}),
    "hook on the activation": (lambda: hooked("act"), {"norm": "act has hooks"}),
    "called twice": (lambda: Line(twice), {"norm": "called 2 times"}),
    "tied": (tied, {"0": "called 2 times"}),
    "dropout between": (lambda: Line(dropped), {"norm": "Dropout lies between"}),
    "a subclass": (lambda: Line(plain, Sub(C)), {"norm": "Sub is no normalizer known here"}),
    "an activation with parameters": (lambda: Line(plain, act=nn.PReLU()), {"norm": "PReLU has no fused form"}),
    "another slope": (lambda: Line(plain, act=nn.LeakyReLU(0.2)), {"norm": "LeakyReLU has no fused form"}),
    "added into the other": (lambda: Line(into_the_other), {}),
    "input overwritten": (lambda: Line(overwritten), {"norm": "may be overwritten before"}),
    "residual overwritten": (lambda: Line(overwritten_later), {"norm": "may be overwritten later"}),
    "keeps a count": (lambda: Line(stateful), {"": "state of its own"}),
    "draws": (lambda: Line(random), {"": "random numbers"}),
    "asks for gradients": (lambda: Line(by_gradients), {"": "whether gradients or autocast"}),
    "asks for a value": (lambda: Line(by_value), {"": "by the value of a tensor"}),
    "asks for a type": (lambda: Line(by_type), {"": "type of a value"}),
    "asks an object": (with_settings, {"": "'settings', a SimpleNamespace"}),
    "collects outputs": (with_outputs, {"": "state of its own"}),
    "a constant": (lambda: Line(makes_a_constant), {"": "makes a tensor"}),
    "runs without gradients": (lambda: Line(without_gradients), {"": "modes of its own"}),
    "switches autocast off": (lambda: Line(in_float32), {"": "modes of its own"}),
    "checkpoints": (lambda: Line(checkpointed), {"": "cannot be traced"}),
    "saves elsewhere": (lambda: Line(saved_elsewhere), {"": "modes of its own"}),
    "asks for the dtype of a parameter": (lambda: Line(by_dtype), {"": "goes through its parameters"}),
    "catches what it should not": (lambda: Line(caught), {"": "by the value of a tensor"}),
    "input overwritten by index": (lambda: Line(by_index), {"norm": "may be overwritten before"}),
    "input overwritten by a module": (with_writer, {"norm": "may be overwritten before"}),
    "written by torch.fx": (lambda: fx.symbolic_trace(Line(plain)), {"": "torch.fx has written it"}),
    "forward overridden": (overridden, {"norm": "overridden on the instance"}),
    "parametrized": (
        lambda: Line(plain, nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(C))), {"norm": "parametrized"},
    ),
    "statistics torch never moves": (
        lambda: Line(plain, nn.InstanceNorm2d(C, momentum=None, track_running_stats=True)), {"norm": "never moves"},
    ),
    "SyncBatchNorm": (lambda: Line(plain, nn.SyncBatchNorm(C)), {"norm": "ns.synchronize"}),
    "its own activation": (lambda: Line(plain, ns.nn.BatchNorm2d(C, activation="silu")), {}),
    "a layer with more inside": (lambda: Line(plain, ns.nn.GhostBatchNorm(C, 2)), {}),
    "LocalResponseNorm": (lambda: Line(plain, nn.LocalResponseNorm(2)), {"norm": "no normalizer known here"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_left_alone_and_reported(name):
    build, reasons = LEFT[name]
    model, x = shaken(build), images(6)
    before, states = copy.deepcopy(model), (torch.get_rng_state(), vars(model).keys())
    kinds = [type(m) for m in model.modules()]
    report = ns.accelerate(model)
    assert not chains(model)
    skipped = dict(report.skipped)
    assert skipped.keys() == reasons.keys()
    assert all(reason in skipped[where] for where, reason in reasons.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert vars(model).keys() == states[1]
    assert not getattr(model, "outputs", [])
    if "drop" not in name:
        with torch.no_grad() if "overwritten" in name else contextlib.nullcontext():
            torch.testing.assert_close(model(x), before(x))
    report.undo()
    assert [type(m) for m in model.modules()] == kinds


def test_a_network_that_cannot_be_traced_has_blocks_that_can():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.BatchNorm2d(C), nn.Sequential(Basic(), nn.BatchNorm2d(C), nn.ReLU())

        def forward(self, x):
            x = self.stem(x)
            return self.blocks(x) if x.mean() < 1e9 else x

    model = nn.DataParallel(Net())
    report = ns.accelerate(model, images())
    assert chains(model) == [
        "module.blocks: 1 → relu", "module.blocks.0: bn1 → relu", "module.blocks.0: bn2 + residual → relu",
    ]  # fmt: skip
    ((name, reason),) = report.skipped
    assert name == "module"
    assert "cannot be traced: it chooses between branches by the value of a tensor" in reason


# --- a program steps aside ----------------------------------------------------------------------------------------


class Watched(Basic):
    """Options of all sorts."""

    def __init__(self):
        super().__init__()
        self.scale, self.pair, self.after = 1.0, (1, 2), nn.Identity()
        self.options, self.order = {"twice": False}, [0]

    def forward(self, x, shift=None, *, flag=False):
        if flag:
            return x
        y = super().forward(x)
        y = y if shift is None else y + shift
        y = 2 * y if self.options["twice"] else y + self.order[0]
        return self.after(y) * self.scale * self.pair[0]


def double(module, args, y):
    return 2 * y


def set_in(dictionary, values):
    dictionary.update(values)


CHANGES = {
    "a hook on the ReLU": lambda m: m.relu.register_forward_hook(double),
    "a hook put in by hand": lambda m: set_in(m.relu._forward_hooks, {-1: double}),
    "hooks in another dictionary": lambda m: (
        setattr(m.relu, "_forward_hooks", collections.OrderedDict()),
        m.relu.register_forward_hook(double),
    ),
    "a hook on a normalizer": lambda m: m.bn1.register_forward_hook(lambda m, args, y: y.abs()),
    "a hook before": lambda m: m.bn2.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "a backward hook": lambda m: m.conv2.register_full_backward_hook(lambda m, gi, go: (3 * gi[0],)),
    "an override": lambda m: setattr(m.relu, "forward", torch.sigmoid),
    "another activation": lambda m: setattr(m, "relu", nn.SiLU()),
    "another activation in the dictionary": lambda m: set_in(m._modules, {"relu": nn.SiLU()}),
    "another normalizer": lambda m: setattr(m, "bn1", nn.InstanceNorm2d(C)),
    "an activation in the normalizer": lambda m: (
        m.bn1.set_activation("silu")
        if isinstance(m.bn1, ns.nn.BatchNorm2d)
        else setattr(m, "bn1", nn.Sequential(m.bn1, nn.SiLU()))
    ),
    "a module where none was": lambda m: setattr(m, "downsample", nn.Conv2d(C, C, 1)),
    "a module more": lambda m: m.add_module("more", nn.ReLU()),
    "an identity no more": lambda m: setattr(m, "after", nn.Tanh()),
    "a number": lambda m: setattr(m, "scale", 2.0),
    "a tuple": lambda m: setattr(m, "pair", (3, 4)),
    "an entry": lambda m: m.options.update(twice=True),
    "an element": lambda m: m.order.insert(0, 1),
    "a class": lambda m: setattr(m.bn2, "__class__", nn.BatchNorm2d),
    "a class of the ReLU": lambda m: setattr(m.relu, "__class__", nn.Sigmoid),
    "torch's conversion": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_the_own_forward_runs_after_a_change(name, called):
    torch.manual_seed(1)
    model, x = shaken(Watched), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    if called:  # the program has been in use
        assert_same([model.eval()(x)], [before.eval()(x)], 1e-5)
    for each in (model, before):
        torch.manual_seed(2)
        CHANGES[name](each)
    assert_same(step(model, x), step(before, x), 5e-5)


@pytest.mark.parametrize("name", ["conv", "conv.0", "conv.0.2"])
def test_a_hook_on_what_was_looked_into(name):
    model, x = shaken(lambda: InvertedResidual(nn.ReLU6)).eval(), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    model(x)
    for each in (model, before):
        each.get_submodule(name).register_forward_hook(double)
    torch.testing.assert_close(model(x), before(x))


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1.0,), {}), ((), {"shift": torch.ones(C, 1, 1)}), ((), {"flag": True}), ((None,), {})]
)
def test_other_arguments(args, kwargs):
    model, x = shaken(Watched), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    torch.testing.assert_close(model(x, *args, **kwargs), before(x, *args, **kwargs))
    torch.testing.assert_close(model(x=x, **kwargs), before(x=x, **kwargs))
    with pytest.raises(TypeError, match="unexpected keyword argument 'shift_'"):
        model(x, shift_=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        model()


def test_arguments_that_are_passed_on_may_be_anything():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.scaled = nn.BatchNorm2d(C), nn.ReLU(), Scaled()

        def forward(self, x, scale=None, **kwargs):
            return self.scaled(self.act(self.norm(x)), scale)

    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x if scale is None else x * scale

    model, x = shaken(Block), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    with without_modules():
        ours = [model(x), model(x, 2.0), model(x, scale=torch.tensor(3.0))]
    assert_same(ours, [before(x), before(x, 2.0), before(x, scale=torch.tensor(3.0))], 1e-5)
    torch.testing.assert_close(model(x, other=1), before(x, other=1))


def test_a_residual_of_another_shape_or_dtype_is_added_as_before():
    def function(self, x):
        a, b, c = self.norms
        pooled = x.mean((2, 3), keepdim=True)
        return self.act(a(x) + self.bias), self.act(b(x) + x.double()), self.act(c(pooled) + x)

    model = Line(function)
    model.bias, model.norms = nn.Parameter(torch.randn(C, 1, 1)), nn.ModuleList([nn.BatchNorm2d(C) for _ in range(3)])
    before, x = copy.deepcopy(model), images()
    ns.accelerate(model)
    assert chains(model) == [f"norms.{k} + residual → relu" for k in range(3)]
    assert_same(model(x), before(x), 1e-5)


def test_a_replica_with_children_of_its_own():
    model, x = shaken(Basic).eval(), images()
    ns.accelerate(model)
    model(x)
    replica = copy.copy(model)  # as DataParallel makes them
    replica._modules = dict(model._modules, relu=nn.SiLU())
    torch.testing.assert_close(replica(x), ns.to_torch(copy.deepcopy(replica)).model(x))


def test_global_hooks_see_every_module():
    model, x, seen = ns.accelerate(Basic()).model, images(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen.count("ReLU") == 2


def test_taps_and_slices_of_a_sequential_get_what_they_did():
    model, x = shaken(lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.SiLU())).eval(), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    torch.testing.assert_close(model[:2](x), before[:2](x))
    torch.testing.assert_close(model[1](x), before[1](x))
    y = x
    for layer in model:
        y = layer(y)
    torch.testing.assert_close(y, before(x))
    model.append(nn.ReLU())
    torch.testing.assert_close(model(x), before(x).relu())


# --- what else is done with models --------------------------------------------------------------------------------


def clones(model):
    yield copy.deepcopy(model)
    yield copy.copy(model)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(model, protocol))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_copying_and_pickling():
    model, x = shaken(lambda: Basic(shortcut=nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))).eval(), images()
    ns.accelerate(model)
    expected = model(x)
    for clone in clones(model):
        with without_modules():
            assert torch.equal(clone(x), expected)
        if clone.bn1 is not model.bn1:  # copy.copy shares its children
            clone.relu = nn.SiLU()
            assert not torch.equal(clone(x), expected)
            assert type(ns.to_torch(clone).model) is Basic
    with without_modules():
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated")
def test_compilers_and_tracers_get_the_own_forward():
    model, x = shaken(Basic).eval(), images()
    expected = model(x)
    ns.accelerate(model)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes].count("relu") == 2
    torch.testing.assert_close(graph(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


def test_functional_transformations():
    model, x = shaken(lambda: Basic(lambda c: nn.GroupNorm(2, c))), images()
    before = copy.deepcopy(model)
    ns.accelerate(model)
    results = []
    for each in (model, before):
        parameters = dict(each.named_parameters())

        def loss(p, x, each=each):
            return torch.func.functional_call(each, p, (x.unsqueeze(0),)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        results.append([per_sample[name] for name in parameters])
    assert_same(*results, 1e-4)


def test_checkpointing_and_double_backward():
    model, x = shaken(lambda: Basic(lambda c: nn.GroupNorm(2, c))).double(), images(2).double().requires_grad_()
    ns.accelerate(model)
    g = torch.autograd.grad(model(x).square().sum(), x)[0]
    y = checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], g)
    assert torch.autograd.gradcheck(lambda x: torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0],
                                    x[:1, :, :2, :2].detach().requires_grad_())  # fmt: skip


def test_the_signature_and_the_name_stay():
    model = ns.accelerate(Watched()).model
    assert inspect.signature(model.forward) == inspect.signature(Watched().forward)
    assert type(model).__name__ == "Watched"
    assert "fused: bn1 → relu, bn2 + residual → relu" in repr(model)


def test_an_error_in_a_program_names_the_layer():
    model = ns.accelerate(nn.Sequential(nn.Sequential(nn.Identity(), nn.BatchNorm2d(C), nn.ReLU()))).model
    with pytest.raises(ns.ShapeError, match=r"layer: 0\.1 \(BatchNorm2d\)"):
        model(torch.randn(4, C + 1, 3, 3))


# --- proof --------------------------------------------------------------------------------------------------------

BROKEN = {
    "the residual is lost": lambda norm, x, residual, activation: fused._activated(norm, activation)(x),
    "the activation is lost": lambda norm, x, residual, activation: norm(x, residual),
    "the residual comes last": lambda norm, x, residual, activation: (
        fused._activated(norm, activation)(x) + (0 if residual is None else residual)
    ),
    "no gradient to the residual": lambda norm, x, residual, activation: fused._activated(norm, activation)(
        x, None if residual is None else residual.detach()
    ),
    "no gradient to γ": lambda norm, x, residual, activation: ACTIVATIONS[activation].forward(
        F.batch_norm(x, None, None, norm.weight.detach(), norm.bias, training=True, eps=norm.eps)
        + (0 if residual is None else residual)
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_example_catches_a_wrong_program(name, monkeypatch):
    model, x = shaken(Basic), images()
    hashed = state_hash(model)
    broken = functools.wraps(fused.fuse_norm)(BROKEN[name])
    for module in (fused, surgery.chains):
        monkeypatch.setattr(module, "fuse_norm", broken)
    fused._compiled.cache_clear()
    try:
        with pytest.raises(ProofError, match="accelerate would change what the model computes"):
            ns.accelerate(model, x)
    finally:
        fused._compiled.cache_clear()
    assert state_hash(model) == hashed


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_behind_a_tensor_of_other_strides(inplace):
    """torch draws random numbers by place in memory, and its LayerNorm loses channels_last."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.last = nn.LayerNorm(C), nn.Dropout(0.5, inplace), nn.Linear(C, C)

        def forward(self, x):
            y = self.norm(x) * 1
            return self.last(self.drop(y) + 0.1 * torch.randn_like(y))

    x = torch.randn(3, 5, 4, C).to(memory_format=torch.channels_last)
    strides = [norm(x).stride() for norm in (nn.LayerNorm(C), ns.nn.LayerNorm(C))]
    assert strides[0] != strides[1]  # else this shows nothing
    report = ns.accelerate(Model(), x)
    assert report.changed == ("norm",)
    assert report.notes[-1].startswith("same output in evaluation and training mode")


def test_the_proof_is_told():
    assert "same output in evaluation and training mode" in ns.accelerate(Basic(), images()).notes[-1]
    one = ns.accelerate(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()), torch.randn(1, C))
    assert "same output in evaluation mode" in one.notes[-1]


# --- classes of other libraries -----------------------------------------------------------------------------------


@pytest.fixture
def timm():
    """Classes with the names and the behaviour of timm's, and one of torchvision's, findable for pickle."""

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels, act=nn.ReLU, drop=nn.Identity):
            super().__init__(channels)
            self.drop, self.act = drop(), act()

        def forward(self, x):
            assert x.ndim == 4
            return self.act(self.drop(super().forward(x)))

    class GroupNorm(nn.GroupNorm):
        def __init__(self, channels, groups=2):
            super().__init__(groups, channels)
            self._fast_norm = False

        def forward(self, x):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    class GroupNorm1(GroupNorm):
        def __init__(self, channels):
            super().__init__(channels, 1)

    class LayerNorm(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def activated(name, base):
        def __init__(self, channels, act=nn.ReLU, drop=nn.Identity):
            base.__init__(self, channels)
            self.drop, self.act = drop(), act()

        return type(name, (base,), {"__init__": __init__, "forward": lambda s, x: s.act(s.drop(base.forward(s, x)))})

    places = {
        "timm.layers.norm_act": [
            BatchNormAct2d, activated("GroupNormAct", GroupNorm), activated("GroupNorm1Act", GroupNorm1),
            activated("LayerNormAct", LayerNorm), activated("LayerNormAct2d", LayerNorm2d),
        ],
        "timm.layers.norm": [GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d],
        "torchvision.models.convnext": [type("LayerNorm2d", (LayerNorm2d,), {})],
    }  # fmt: skip
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for place, classes in places.items():
            *packages, _ = itertools.accumulate(place.split("."), lambda a, b: f"{a}.{b}")
            for package in (*packages, place):
                patch.setitem(sys.modules, package, types.ModuleType(package))
            for cls in classes:
                cls.__module__, cls.__qualname__ = place, cls.__name__
                setattr(sys.modules[place], cls.__name__, cls)
                found[f"{'torchvision' if 'vision' in place else ''}{cls.__name__}"] = cls
        yield types.SimpleNamespace(**found)


TIMM = (
    "BatchNormAct2d", "GroupNormAct", "GroupNorm1Act", "LayerNormAct", "LayerNormAct2d", "GroupNorm", "GroupNorm1",
    "LayerNorm", "LayerNorm2d", "torchvisionLayerNorm2d",
)  # fmt: skip


@pytest.mark.parametrize("kind", TIMM)
def test_timm(timm, kind):
    cls = getattr(timm, kind)
    activates, last = "Act" in kind, kind in ("LayerNorm", "LayerNormAct")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.mix = cls(C), nn.Linear(C, C) if last else nn.Conv2d(C, C, 1)
            self.norm2 = cls(C, nn.Identity) if activates else cls(C)

        def forward(self, x):
            return self.norm2(self.mix(self.norm1(x))) + x

    model, x = shaken(Block), torch.randn(4, 5, C) if last else images()
    before, hashed = copy.deepcopy(model), state_hash(model)
    report = ns.accelerate(model, x)
    assert report.changed == ("norm1", "norm2")
    assert not report.skipped
    assert chains(model) == ["norm2 + residual"]
    assert ("norm1 → relu" in report.notes) == activates
    assert isinstance(model.norm1, cls)
    assert type(model.norm1).__name__ == cls.__name__
    with without_modules():
        ours = step(model, x)
    assert_same(ours, step(before, x), 5e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model.norm1))(x), before.norm1(x))
    model.norm1.load_state_dict(before.norm1.state_dict())
    fresh = shaken(Block)
    hashed = state_hash(fresh)
    ns.accelerate(fresh)
    assert ns.to_torch(fresh).changed == ("norm1", "norm2")
    assert state_hash(fresh) == hashed


def test_every_class_that_is_known_by_its_name_is_tested():
    names = {f"{'torchvision' if 'vision' in name else ''}{name.rpartition('.')[2]}" for name in foreign._KNOWN}
    assert names == set(TIMM)


def test_timm_left_alone(timm):
    model = nn.ModuleDict(
        {
            "drop": timm.BatchNormAct2d(C, drop=nn.Dropout),
            "prelu": timm.BatchNormAct2d(C, act=nn.PReLU),
            "fast": timm.GroupNormAct(C),
            "hook": timm.GroupNormAct(C),
            "other": timm.GroupNormAct(C),
        }
    )
    model.fast._fast_norm = True
    model.hook.act.register_forward_hook(noop)
    type(model.other).forward = lambda self, x: self.act(x)
    reasons = dict(ns.accelerate(model).skipped)
    assert list(reasons) == list(model)
    for name, words in {
        "drop": "Dropout lies between", "prelu": "PReLU has no fused form", "fast": "fast path",
        "hook": "hooks on its children", "other": "computes something else",
    }.items():  # fmt: skip
        assert words in reasons[name]


def test_timm_with_a_later_hook(timm):
    model, x, seen = shaken(lambda: timm.BatchNormAct2d(C)).eval(), images(), []
    expected = model(x)
    ns.accelerate(model)
    model.act.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    model.act = nn.SiLU()
    torch.testing.assert_close(model(x), F.silu(F.batch_norm(x, model.running_mean, model.running_var, model.weight,
                                                             model.bias)))  # fmt: skip
    assert seen == [1]


class LlamaRMSNorm(nn.Module):
    """Rounds before it multiplies."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self):
        return "llama"


class GemmaRMSNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class T5LayerNorm(LlamaRMSNorm):
    """A name that says otherwise."""


class SoftRMSNorm(LlamaRMSNorm):
    """No RMSNorm."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1)


@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm])
def test_rms_norms_of_language_models(cls):
    model, x = shaken(lambda: Transformer(cls)), torch.randn(4, 5, C)
    before, hashed = copy.deepcopy(model), state_hash(model)
    report = ns.accelerate(model, x)
    assert report.changed == ("norm1", "norm2")
    assert chains(model) == ["sum → norm2"]
    assert_same(step(model, x), step(before, x), 5e-5)
    assert repr(model.norm1) == repr(before.norm1)
    half = x.bfloat16()
    for each, other in (
        (model.norm1, before.norm1),
        (copy.deepcopy(model.norm1).bfloat16(), copy.deepcopy(before.norm1).bfloat16()),
    ):
        a, b = each(half), other(half)  # weights in float32, then in bfloat16
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)  # two roundings against one
    ns.accelerate(before)
    ns.to_torch(before)
    ns.to_torch(model).undo()
    report.undo()
    assert state_hash(model) != hashed  # the steps have moved it
    assert type(model.norm1) is cls


@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm])
def test_rms_norms_where_the_weight_has_another_dtype(cls):
    model, x = shaken(lambda: Line(lambda self, x: self.act(self.norm(2 * x) + x), cls(C))), torch.randn(4, C)
    before = copy.deepcopy(model)
    ns.accelerate(model)
    assert chains(model) == ["norm + residual → relu"]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        a, b = model(x.to(dtype)), before(x.to(dtype))
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu"):
        torch.testing.assert_close(model(x), before(x))


def test_a_name_is_no_proof():
    reasons = dict(ns.accelerate(nn.Sequential(SoftRMSNorm(C))).skipped)
    assert "computes something else" in reasons["0"]


# --- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"), (nn.ReLU6(inplace=True), "relu6"), (nn.LeakyReLU(), "leaky_relu"), (nn.ELU(), "elu"),
        (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.Mish(), "mish"),
        (nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"), (nn.Hardswish(), "hardswish"),
        (nn.Hardsigmoid(), "hardsigmoid"), (nn.Hardtanh(0, 6), "relu6"),
        (nn.LeakyReLU(0.2), None), (nn.ELU(0.5), None), (nn.Hardtanh(), None), (nn.Softplus(), None),
        (nn.PReLU(), None), (nn.RReLU(), None), (nn.Softmax(), None), (nn.SELU(), None), (nn.CELU(), "elu"),
        (nn.GLU(), None), (nn.Identity(), None), (nn.Dropout(0.0), None), (nn.Conv2d(1, 1, 1), None),
    ],
)  # fmt: skip
def test_activations_are_known_by_their_values(module, name):
    assert activation_of(module) == name
    assert activation_of(module.eval()) == name


# --- there and back -----------------------------------------------------------------------------------------------


def test_to_torch_refuses_what_torch_does_not_have():
    model = nn.Sequential(
        ns.nn.BatchNorm2d(C, activation="relu"), ns.nn.Norm("n [c] h w", C), ns.nn.GroupNorm(2, C), nn.BatchNorm2d(C)
    )
    report = ns.to_torch(model)
    assert report.changed == ("2",)
    assert [name for name, _ in report.skipped] == ["0", "1"]
    assert type(model[2]) is nn.GroupNorm
    report.undo()
    assert type(model[2]) is ns.nn.GroupNorm


def test_to_torch_of_a_part():
    model, x = shaken(Basic).eval(), images()
    expected = model(x)
    ns.accelerate(model)
    ns.to_torch(model, select="bn1")
    assert type(model) is Basic
    assert (type(model.bn1), type(model.bn2)) == (nn.BatchNorm2d, ns.nn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected)


def test_to_torch_after_a_child_has_gone():
    model = ns.accelerate(Basic()).model
    del model.bn1
    model.bn2 = nn.BatchNorm2d(C)
    ns.to_torch(model)
    assert type(model) is Basic


def test_the_model_of_torch_can_be_scripted():
    model, x = shaken(Basic).eval(), images()
    expected = model(x)
    ns.to_torch(ns.accelerate(model).model)
    with pytest.warns(DeprecationWarning, match="`torch.jit.script` is deprecated"):
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_torchs_conversion_drops_an_activation_and_ours_does_not():
    layer, x = shaken(lambda: nn.Sequential(ns.nn.BatchNorm2d(C, activation="relu"))).eval(), images()
    expected = layer(x)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert theirs(x).min() < 0 <= expected.min()
    torch.testing.assert_close(ns.synchronize(layer).model(x), expected)


@pytest.mark.parametrize("accelerated", [False, True])
def test_torchs_conversion_drops_the_activation_inside_a_class_of_timm_and_ours_does_not(timm, accelerated):
    model, x = shaken(lambda: nn.Sequential(timm.BatchNormAct2d(C))).eval(), images()
    expected = model(x)
    if accelerated:
        ns.accelerate(model)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert theirs(x).min() < 0 <= expected.min()
    ns.synchronize(model)
    assert isinstance(model[0], timm.BatchNormAct2d)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.train()(x), F.relu(F.batch_norm(x, None, None, *model[0].parameters(), True)))


def test_an_accelerated_model_survives_both_conversions():
    model, x = shaken(Basic).eval(), images()
    expected = model(x)
    ns.accelerate(model)
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(theirs.bn1) is nn.SyncBatchNorm
    torch.testing.assert_close(theirs(x), expected)
    ns.synchronize(model)
    with without_modules():  # still in one call
        torch.testing.assert_close(model(x), expected)
