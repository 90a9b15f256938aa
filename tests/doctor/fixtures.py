"""Defects put into small trained networks on purpose, and what merely looks like them.

For every rule three roles: "defect", "clean" and "near-miss"; for every role three kinds of network, "mlp", "conv" and
"seq" (convolutions and attention over time), and any seed. A rule with several ways of going wrong alternates between
them by seed. The networks are trained once per kind, seed and process, on synthetic classes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope.doctor import RULES, check
from normscope.doctor.cache import Batch
from normscope.doctor.defects import poison, shift_mean

KINDS = ("mlp", "conv", "seq")
ROLES = ("defect", "clean", "near-miss")
CLASSES = 10
BATCH = 64
BATCHES = 30
# Batches that split C gets on top: of the 640 samples that it is dealt, 3 are half a point, and what was lost and what
# came back each are differences of a few dozen.
HELD_OUT = 200
STEPS = 300
EARLY = 20
SHAPES = {"mlp": (20,), "conv": (3, 8, 8), "seq": (6, 16)}


# --- data ---------------------------------------------------------------------------------------------------------


@functools.cache
def templates(kind, seed):
    """What the classes look like: smooth, and with means of their own."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if kind == "mlp":
        return torch.randn(CLASSES, 20, generator=generator)
    if kind == "conv":
        coarse = torch.randn(CLASSES, 3, 2, 2, generator=generator)
        return F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=True)
    level = torch.randn(CLASSES, 6, 1, generator=generator)
    rate = torch.rand(CLASSES, 6, 1, generator=generator) * 3
    return 0.8 * level + torch.sin(rate * torch.arange(16.0) / 2)


NOISE = {"mlp": 1.3, "conv": 2.3, "seq": 1.9}


def sample(kind, seed, count, stream=0, labels=None):
    """Inputs off centre and their labels; every stream is fresh data of the same task."""
    generator = torch.Generator().manual_seed(7919 * (seed + 1) + 104729 * stream)
    if labels is None:
        labels = torch.randint(CLASSES, (count,), generator=generator)
    x = templates(kind, seed)[labels]
    noise = torch.randn(x.shape, generator=generator) * NOISE[kind]
    bright = 0.3 * torch.randn((count,) + (1,) * (x.dim() - 1), generator=generator)
    return x + noise + bright + 1.0, labels


def batches(kind, seed, count=BATCHES, size=BATCH, stream=1):
    """A list of batches."""
    x, y = sample(kind, seed, count * size, stream)
    return list(zip(x.split(size), y.split(size), strict=True))


# --- networks -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention over time of (n, channels, time)."""

    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = self.qkv(x.transpose(1, 2)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2)


class Block(nn.Module):
    """Operation, normalization, ReLU, perhaps around a shortcut."""

    def __init__(self, op, bn, residual=False):
        super().__init__()
        self.op, self.bn, self.residual = op, bn, residual

    def forward(self, x):
        y = self.op(x)
        return torch.relu(self.bn(x + y if self.residual else y))


class Net(nn.Module):
    """Blocks, pooling over what is not a channel, perhaps a normalized neck, and a linear classifier."""

    def __init__(self, kind, neck=False):
        super().__init__()
        if kind == "mlp":
            blocks = [Block(nn.Linear(a, 32), nn.BatchNorm1d(32)) for a in (20, 32, 32)]
        elif kind == "conv":
            widths = ((3, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 2))
            blocks = [Block(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b)) for a, b, s in widths]
        else:
            blocks = [
                Block(nn.Conv1d(6, 16, 3, padding=1), nn.BatchNorm1d(16)),
                Block(Attention(16), nn.BatchNorm1d(16), residual=True),
                Block(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)),
            ]
        self.blocks = nn.Sequential(*blocks)
        last = 32 if kind == "mlp" else 16
        self.neck = nn.BatchNorm1d(last) if neck else nn.Identity()
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(last, CLASSES)

    def features(self, x):
        x = self.blocks(x)
        return self.neck(x.flatten(2).mean(2) if x.dim() > 2 else x)

    def forward(self, x):
        return self.head(self.drop(self.features(x)))


def norms(model):
    """Names of the normalizers."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))


class FrozenNorm(nn.Module):
    """What detectors use: everything is a buffer, nothing moves. Folded, the statistics are identities."""

    def __init__(self, bn, folded=False):
        super().__init__()
        scale = (bn.running_var + bn.eps).rsqrt()
        if folded:
            weight, bias = bn.weight * scale, bn.bias - bn.running_mean * bn.weight * scale
            mean, var = torch.zeros_like(scale), torch.ones_like(scale)
        else:
            weight, bias, mean, var = bn.weight, bn.bias, bn.running_mean, bn.running_var
        self.eps = 0.0 if folded else bn.eps
        for name, value in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, x):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(shape) + shift.view(shape)


class FunctionalNorm(nn.Module):
    """Batch statistics in every mode."""

    def __init__(self, bn):
        super().__init__()
        self.weight, self.bias = copy.deepcopy(bn.weight), copy.deepcopy(bn.bias)

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Whiten(FunctionalNorm):
    """The same under a name that tells nothing."""


class KeepsEval(Net):
    """Its train() leaves the first two blocks alone."""

    def train(self, mode=True):
        super().train(mode)
        self.blocks[:2].eval()
        return self


class Unreached(Net):
    """An auxiliary head that is registered and not used."""

    def __init__(self, kind):
        super().__init__(kind)
        self.auxiliary = nn.BatchNorm1d(32 if kind == "mlp" else 16)


class Routed(Unreached):
    """The auxiliary normalizer takes part in some batches only."""

    def features(self, x):
        y = super().features(x)
        return self.auxiliary(y) if float(x[0].mean()) > 1.0 else y


class Careless(Net):
    """Dropout as a function, which does not know of modes."""

    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.1))


class InputNorm(nn.Module):
    """Normalizes inputs only."""

    def __init__(self, kind):
        super().__init__()
        channels = SHAPES[kind][0]
        self.bn = (nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)(channels, momentum=0.001)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPES[kind]), 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x):
        return self.body(self.bn(x))


# --- training, once -----------------------------------------------------------------------------------------------


def train(model, feed, steps, lr=0.05, after=lambda step: None, decay=True):
    """Stochastic gradient descent, the rate constant for two thirds, then towards zero."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step in range(steps):
        late = max(0.0, step / steps - 2 / 3) * 3
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * late) if decay else 1)
        x, y = feed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(step)
    return model


@dataclass
class Trained:
    """What one training leaves behind.

    `early` and `adjacent` are checkpoints before the last, `follower` an average of the parameters alone, `averaged`
    one of all floating-point numbers, `averages` the running statistics by momentum: it does not touch the weights.
    """

    final: dict
    early: dict
    adjacent: dict
    follower: dict
    averaged: dict
    averages: dict


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@functools.cache
def trained(kind, seed, size=BATCH):
    """One network of this kind, trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(kind)
        follower, averaged, kept = copy.deepcopy(model), copy.deepcopy(model), {}
        copies = {m: {n: (torch.zeros(c), torch.ones(c)) for n, c in widths(model)} for m in (0.001, 0.9, 0.99)}

        def watch(name):
            def see(module, args):
                x = args[0].detach().transpose(0, 1).flatten(1)
                var, mean = torch.var_mean(x, 1)
                for m, store in copies.items():
                    store[name][0].lerp_(mean, m)
                    store[name][1].lerp_(var, m)

            return see

        handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in norms(model)]

        def after(step):
            with torch.no_grad():
                for ours, theirs in zip(follower.parameters(), model.parameters(), strict=True):
                    ours.lerp_(theirs, 0.05)
                for ours, theirs in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
                    ours.lerp_(theirs, 0.05) if ours.is_floating_point() else ours.copy_(theirs)
            if step == EARLY:
                kept["early"] = state(model)
            if step == STEPS - 2:
                kept["adjacent"] = state(model)

        train(model, lambda step: sample(kind, seed, size, 100 + step), STEPS, after=after)
        for handle in handles:
            handle.remove()
        return Trained(state(model), kept["early"], kept["adjacent"], state(follower), state(averaged), copies)


def widths(model):
    return [(name, model.get_submodule(name).num_features) for name in norms(model)]


@functools.cache
def trained_input_norm(kind, seed):
    """A network whose only normalizer sees data of mean 0 and variance 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InputNorm(kind)

        def feed(step):
            x, y = sample(kind, seed, BATCH, 100 + step)
            return standard(x, kind, seed), y

        train(model, feed, STEPS)
        return state(model)


@functools.cache
def mean_and_deviation(kind, seed):
    many = sample(kind, seed, 4000, 99)[0].transpose(0, 1).flatten(1)
    shape = (1, -1) + (1,) * (len(SHAPES[kind]) - 1)
    return many.mean(1).view(shape), many.std(1).view(shape)


def standard(x, kind, seed):
    """Inputs of mean 0 and variance 1 by channel."""
    mean, deviation = mean_and_deviation(kind, seed)
    return (x - mean) / deviation


# --- a fixture ----------------------------------------------------------------------------------------------------


@dataclass
class Fixture:
    """A model to check.

    Attributes:
        options: For `check`.
        layers: Where the defect was put; () where that has no place.
        at: The least severity that counts as found.
        healthy: What a perfect repair would give, for the share of the loss that is restored.
        also: Other rules that rightly call out errors.
        pairs: Score it in batches of two, where the loss shows.
    """

    model: nn.Module
    loader: Any
    options: dict = field(default_factory=dict)
    layers: tuple = ()
    at: str = "W"
    healthy: nn.Module | None = None
    pairs: bool = False
    also: tuple = ()


@dataclass(frozen=True)
class Case:
    """Kind of network and seed."""

    kind: str
    seed: int

    @property
    def odd(self):
        return self.seed % 2 == 1

    @property
    def past(self):
        return trained(self.kind, self.seed)

    def model(self, weights=None, cls=Net, **options):
        """A network with these weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = cls(self.kind, **options)
        model.load_state_dict(self.past.final if weights is None else weights, strict=False)
        return model.eval()

    def fresh(self, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Net(self.kind, **options)

    def batches(self, **options):
        return batches(self.kind, self.seed, **options)

    def middle(self, model):
        return norms(model)[1]

    def recalibrated(self, model):
        """A copy with the statistics of many fresh samples."""
        model = copy.deepcopy(model)
        ns.recalibrate(model, self.batches(count=60, stream=50), progress=False)
        return model

    def muted(self, channels):
        """The first channels of the middle normalizer have γ = 0, and the layers behind know it."""
        model = self.model()
        with torch.no_grad():
            model.get_submodule(self.middle(model)).weight[:channels] = 0.0
        return self.recalibrated(model)

    def data(self, count, labels=None):
        return TensorDataset(*sample(self.kind, self.seed, count, 1, labels))

    def continued(self, model, steps, lr):
        """Training goes on."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            train(model, lambda step: sample(self.kind, self.seed, BATCH, 500 + step), steps, lr, decay=False)
        return model.eval()


FIXTURES = {}


def fixture(code):
    def register(make):
        FIXTURES[code] = make
        return make

    return register


def build(code, role, kind, seed):
    """The fixture of a rule."""
    return FIXTURES[code](role, Case(kind, seed))


def base(case, **options):
    return Fixture(case.model(), case.batches(), **options)


def replace(model, name, module):
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def step(model, batch, optimizer):
    """A training loop's body."""
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


# --- 1xx and 602: statistics --------------------------------------------------------------------------------------


@fixture("NRM101")
def nrm101(role, case):
    f = base(case, at="E", healthy=case.model())
    bn = f.model.get_submodule(case.middle(f.model))
    if role == "defect":
        f.layers = (case.middle(f.model),)
        buffer, value = ((bn.running_mean, math.nan), (bn.running_var, math.inf), (bn.running_var, -1e-6))[
            case.seed % 3
        ]
        poison(buffer, value, 3)
    if role == "near-miss":
        f.model = case.muted(1)  # a channel that says nothing, so that only the rule in question is on trial
        f.model.get_submodule(case.middle(f.model)).running_var[0] = 1e6 if case.odd else 0.0
    return f


@fixture("NRM102")
def nrm102(role, case):
    if role == "clean":
        return base(case)
    if role == "defect":
        model = case.fresh().eval()
        whole = case.model()
        model.load_state_dict(dict(whole.named_parameters()), strict=False)
        return Fixture(model, case.batches(), layers=norms(model), healthy=whole)
    if case.odd:
        model = case.model()
        for name in norms(model):
            replace(model, name, FrozenNorm(model.get_submodule(name), folded=True))
        return Fixture(model, case.batches())
    return Fixture(case.fresh().eval(), case.batches())


@fixture("NRM103")
def nrm103(role, case):
    f = base(case)
    name = case.middle(f.model)
    bn = f.model.get_submodule(name)
    if role == "defect" and case.odd:
        for each in norms(f.model):
            f.model.get_submodule(each).momentum = 0.001
        case.continued(f.model, 20, 0.5)
        for each in norms(f.model):
            f.model.get_submodule(each).momentum = 0.1
        f.layers, f.healthy = norms(f.model), case.recalibrated(f.model)
    elif role == "defect":
        f.layers, f.healthy = (name,), case.model()
        shift_mean(bn, 0.5)
    elif role == "near-miss" and case.odd:
        f.model = case.muted(4)
        bn = f.model.get_submodule(name)
        shift_mean(bn, 5, slice(4))
    elif role == "near-miss":
        shift_mean(bn, 0.05)
    return f


def with_average(model, past, momentum):
    """The running statistics of a training with another momentum."""
    for name in norms(model):
        bn, (mean, var) = model.get_submodule(name), past.averages[momentum][name]
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn.momentum = momentum
    return model


@fixture("NRM104")
def nrm104(role, case):
    f = base(case)
    if role == "defect":
        with_average(f.model, case.past, 0.001)
        f.layers, f.healthy = norms(f.model), case.model()
    if role == "near-miss":
        f.model = InputNorm(case.kind)
        f.model.load_state_dict(trained_input_norm(case.kind, case.seed))
        f.model.eval()
        f.loader = [(standard(x, case.kind, case.seed), y) for x, y in case.batches()]
    return f


@fixture("NRM106")
def nrm106(role, case):
    f = base(case)
    if role == "defect":
        with_average(f.model, case.past, 0.99)
        f.layers, f.healthy, f.at = norms(f.model), case.model(), "I"
    if role == "near-miss" and case.odd:
        with_average(f.model, case.past, 0.9)
        f.options["intent"] = ("recalibrating",)
    elif role == "near-miss":
        for name in norms(f.model):
            f.model.get_submodule(name).momentum = None
    return f


def mean_of(a, b):
    return {n: (a[n] + b[n]) / 2 if a[n].is_floating_point() else b[n] for n in b}


def pruned(state, share=0.7):
    """Without the smallest weights of every layer."""
    made = dict(state)
    for name, value in state.items():
        if name.startswith("blocks") and value.dim() > 1:
            made[name] = value * (value.abs() > value.abs().quantile(share))
    return made


@fixture("NRM113")
def nrm113(role, case):
    past, reference = case.past, case.model()
    statistics = {n: v for n, v in past.final.items() if "running" in n or "tracked" in n}
    if role == "near-miss":
        weights = mean_of(past.adjacent, past.final)
    else:
        weights = pruned(past.final) if case.odd else mean_of(past.early, past.final)
    model = case.model({**weights, **statistics})
    f = Fixture(model, case.batches(), {"reference": reference})
    if role == "clean":
        f.model = case.recalibrated(model)
    if role == "defect":
        f.layers, f.healthy = norms(model), case.recalibrated(model)
    return f


def contrasts(batch_list, seed, each=False):
    """Every batch, or every sample, with a contrast and a brightness of its own, as of another camera."""
    generator = torch.Generator().manual_seed(5 + seed)
    made = []
    for x, y in batch_list:
        shape = (len(x) if each else 1,) + (1,) * (x.dim() - 1)
        gain, shift = torch.exp(torch.randn(shape, generator=generator)), 3 * torch.randn(shape, generator=generator)
        made.append((gain * x + shift, y))
    return made


@functools.cache
def trained_on_contrasts(kind, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(kind)
        train(model, lambda step: contrasts([sample(kind, seed, BATCH, 100 + step)], step)[0], STEPS)
        return state(model)


@functools.cache
def trained_deep(seed):
    """Ten normalizers one after the other, each a little noisy with batches of few samples."""
    widths = [(3, 16, 1)] + [(16, 16, 1)] * 9

    def made():
        blocks = [Block(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b)) for a, b, s in widths]
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return train(made(), lambda step: sample("conv", seed, 4, 100 + step), 2 * STEPS, 0.02)


@fixture("NRM114")
def nrm114(role, case):
    if role == "clean":
        return base(case)
    if role == "near-miss" or case.seed % 3 == 1:
        model = case.model(trained_on_contrasts(case.kind, case.seed))
        f = Fixture(model, contrasts(case.batches(), case.seed), layers=norms(model))
        if role == "near-miss" and case.odd:
            f.options["intent"] = ("tta-bn/adabn",)
        elif role == "near-miss":  # many contrasts in every batch: bad whatever the statistics
            f.loader = contrasts(case.batches(), case.seed, each=True)
            ns.recalibrate(model, contrasts(case.batches(stream=50), case.seed, each=True), progress=False)
        return f
    if case.seed % 3 == 2 and case.kind == "conv":
        model = copy.deepcopy(trained_deep(case.seed)).train()
        return Fixture(model, case.batches(count=480, size=4), layers=norms(model))
    f = base(case, healthy=case.model())
    name = case.middle(f.model)
    bn, f.layers = f.model.get_submodule(name), (name,)
    few = bn.weight.abs().topk((bn.num_features - 1) // 10).indices  # fewer than a tenth of the channels
    shift_mean(bn, -30, few)
    return f


@fixture("NRM602")
def nrm602(role, case):
    past, student = case.past, case.model()
    follower = case.model(past.follower)
    if role == "defect":
        healthy = case.recalibrated(follower)
        return Fixture(follower, case.batches(), {"reference": student}, norms(follower), healthy=healthy)
    if role == "clean":
        return Fixture(case.model(past.averaged), case.batches(), {"reference": student})
    if case.odd:
        stranger = Case(case.kind, case.seed + 100).fresh().eval()
        return Fixture(student, case.batches(), {"reference": stranger})
    return Fixture(student, case.batches(), {"reference": follower, "intent": ("teacher-train-mode",)})


# --- 2xx: modes ---------------------------------------------------------------------------------------------------


def predict_as_is(model, x):
    with torch.no_grad():
        return model(x)


def predict_in_eval(model, x):
    model.eval()
    return predict_as_is(model, x)


def predict_with_dropout(model, x):
    model.eval()
    model.drop.train()
    return predict_as_is(model, x)


@fixture("NRM201")
def nrm201(role, case):
    f = base(case)
    paths = {"defect": predict_as_is, "clean": predict_in_eval, "near-miss": predict_with_dropout}
    f.options["predict"] = paths[role]
    f.model.train()
    if role == "defect":
        f.layers = norms(f.model)
    return f


@fixture("NRM203")
def nrm203(role, case):
    f = base(case)
    healthy = case.model()
    f.model.blocks.requires_grad_(False)
    f.model.train()
    names = norms(f.model)
    if role == "defect":
        f.layers, f.healthy = names, healthy
        if case.seed % 3 == 2:  # and other data have already gone through it
            with torch.no_grad():
                for x, _ in case.batches(count=20, stream=60):
                    f.model(0.4 * x + 1)
    if role == "clean":
        f.model.blocks.eval()
    if role == "near-miss":
        for name in names:
            f.model.get_submodule(name).momentum = 0.0
    if not case.odd:

        def keeps_eval(model, batch, optimizer):
            was = [m.training for m in model.modules()]
            step(model.train(), batch, optimizer) if role != "clean" else _step_in_modes(model, batch, optimizer, was)

        f.options |= {"train_step": keeps_eval, "optimizer": sgd(f.model)}
    elif role == "clean":
        f.model = freeze_blocks(case, healthy)
    return f


def freeze_blocks(case, model):
    model.blocks.requires_grad_(False)
    ns.freeze(model.blocks)
    return model.train()


def _step_in_modes(model, batch, optimizer, modes):
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _restoring_step(model, batch, optimizer):
    model.train()
    model.blocks[:2].eval()
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@fixture("NRM204")
def nrm204(role, case):
    f = base(case)
    if role == "clean":
        f.model = case.model(cls=KeepsEval)
    f.model.train()
    first = f.model.blocks[:2]
    first.requires_grad_(False)
    first.eval()
    if role == "defect":
        f.layers = norms(f.model)[:2]
    if role == "near-miss" or (role == "defect" and case.odd):
        f.options = {"train_step": step if role == "defect" else _restoring_step, "optimizer": sgd(f.model)}
    return f


@fixture("NRM205")
def nrm205(role, case):
    f = base(case, at="E")
    name = case.middle(f.model)
    bn = f.model.get_submodule(name)
    if role == "defect":
        bn.track_running_stats = False
        f.layers = (name,)
        if case.odd:  # training went on with it
            old = copy.deepcopy(bn)
            case.continued(f.model, 30, 0.3)
            bn.track_running_stats = True
            f.healthy = case.recalibrated(f.model)
            f.model = copy.deepcopy(f.healthy)
            bn = f.model.get_submodule(name)
            for buffer, value in old.named_buffers():
                bn.get_buffer(buffer).copy_(value)
            bn.track_running_stats = False
    if role == "clean":
        replace(f.model, name, without_buffers(bn))
        f.also = ("NRM201", "NRM210")  # this rule has nothing to say, those have
    if role == "near-miss":
        replace(f.model, name, FrozenNorm(bn))
    return f


def without_buffers(bn):
    twin = type(bn)(bn.num_features, track_running_stats=False)
    twin.load_state_dict({"weight": bn.weight, "bias": bn.bias})
    return twin.eval()


def evaluate_carelessly(data):
    def evaluate(model):
        with torch.no_grad():
            return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data) / len(data)

    return evaluate


def evaluate_in_eval(data):
    def evaluate(model):
        was = model.training
        model.eval()
        try:
            return evaluate_carelessly(data)(model)
        finally:
            model.train(was)

    return evaluate


@fixture("NRM208")
def nrm208(role, case):
    f = base(case, at="E")
    f.model.train()
    data = case.batches(count=2, stream=70)
    evaluate = evaluate_carelessly(data) if role == "defect" else evaluate_in_eval(data)
    if role == "defect":
        f.layers = norms(f.model)
    if role == "near-miss":
        seen = []

        def counting(model, inner=evaluate):
            seen.append(inner(model))
            return sum(seen) / len(seen)

        evaluate = counting
    f.options["evaluate"] = evaluate
    return f


@fixture("NRM210")
def nrm210(role, case):
    f = base(case)
    if role == "clean":
        return f
    name = case.middle(f.model)
    bn = f.model.get_submodule(name)
    if role == "defect":
        f.healthy, f.pairs = case.model(), True
    if case.odd:
        replace(f.model, name, (Whiten if case.seed % 4 == 3 else FunctionalNorm)(bn))
    else:
        replace(f.model, name, without_buffers(bn))
    f.layers = (name,)
    if role == "near-miss":
        f.options["intent"] = ("transductive-meta",)
    return f


# --- 3xx: batches -------------------------------------------------------------------------------------------------


@fixture("NRM301")
def nrm301(role, case):
    neck = case.kind != "mlp"
    data = case.data(BATCH * 6 + 1)
    model = case.fresh(neck=neck).train()
    places = ("neck",) if neck else norms(model)
    if role == "defect" and case.odd:
        return Fixture(model, DataLoader(case.data(80), batch_size=2), layers=places, at="E")
    if role == "defect":
        return Fixture(model, DataLoader(data, batch_size=BATCH), layers=places, at="E")
    if role == "clean":
        return Fixture(model, DataLoader(data, batch_size=BATCH, drop_last=True))
    if not case.odd:
        return Fixture(model.eval(), DataLoader(data, batch_size=BATCH))
    if case.kind == "mlp":
        return Fixture(model, DataLoader(case.data(BATCH * 6 + 33), batch_size=BATCH))
    size = (3, 32, 32) if case.kind == "conv" else (6, 256)
    return Fixture(
        case.fresh().train(), [(x[None], torch.tensor([k % 10])) for k, x in enumerate(noise(case, 24, size))]
    )


def noise(case, count, shape):
    """Inputs that differ in nothing but noise, so that large maps hold as many values as they have pixels."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(case.seed)) + 1.0


@fixture("NRM302")
def nrm302(role, case):
    if role == "clean":
        f = base(case)
        f.model.train()
        return f
    if role == "defect":
        model = case.model(trained(case.kind, case.seed, 2).final).train()
        return Fixture(model, case.batches(count=240, size=2), layers=norms(model))
    if case.odd or case.kind == "mlp":
        model = case.model()
        ns.freeze(model)
        return Fixture(model.train(), case.batches(count=120, size=2))
    size = (3, 128, 128) if case.kind == "conv" else (6, 1024)
    x, y = noise(case, 24, size), torch.arange(24) % 10
    return Fixture(case.model().train(), list(zip(x.split(2), y.split(2), strict=True)))


@fixture("NRM304")
def nrm304(role, case):
    f = base(case)
    labels = torch.arange(BATCH * BATCHES) * CLASSES // (BATCH * BATCHES)
    ordered = DataLoader(case.data(len(labels), labels), batch_size=BATCH)
    if role == "clean":
        generator = torch.Generator().manual_seed(case.seed)
        f.loader = DataLoader(case.data(len(labels), labels), batch_size=BATCH, shuffle=True, generator=generator)
    elif role == "defect" or case.odd:
        f.loader = ordered
    else:
        stratified = torch.arange(BATCH * BATCHES) % CLASSES
        f.loader = DataLoader(case.data(len(labels), stratified), batch_size=BATCH)
    if role == "defect":
        f.layers = norms(f.model)
    if not (role == "near-miss" and case.odd):
        f.model.train()
    return f


# --- 9xx: the check itself ----------------------------------------------------------------------------------------


@fixture("NRM901")
def nrm901(role, case):
    if role == "clean":
        return base(case, at="I")
    if role == "defect":
        return Fixture(case.model(cls=Unreached), case.batches(), layers=("auxiliary",), at="I")
    return Fixture(case.recalibrated(case.model(cls=Routed)), case.batches(size=8, count=60), at="I")


@fixture("NRM902")
def nrm902(role, case):
    if role == "defect":
        return Fixture(case.model(), case.batches(count=6, size=10), at="I")
    if role == "clean":
        return Fixture(case.model(), case.batches(count=96, size=104), at="I")
    return Fixture(case.model(), [x for x, _ in case.batches(count=6, size=10)], at="I")


@fixture("NRM903")
def nrm903(role, case):
    f = base(case)
    if role == "defect":
        f.model = case.model(cls=Careless)
    if role == "near-miss":
        f.model.train()
    return f


# --- on trial -----------------------------------------------------------------------------------------------------

ORDER = {"E": 0, "W": 1, "I": 2}


@dataclass
class Result:
    """What the doctor said about one fixture.

    Attributes:
        severity: Of the rule's alarm; None where it was silent.
        wrong: Whether that is a miss (defect) or a false alarm (clean, near-miss).
        placed: Whether the injected layers lead the rule's list; None where nothing was found or there is no place.
        unrelated: Errors of other rules that neither explain this one nor are explained by it.
        loss: Points of accuracy on split C that the defect costs, where a cost was measured and a remedy is safe.
        restored: Points of these that `fix` gives back.
        first: Whether the first-ranked remedy of the rule was kept.
    """

    rule: str
    role: str
    kind: str
    seed: int
    severity: str | None
    status: str
    reason: str
    wrong: bool
    placed: bool | None
    unrelated: tuple
    others: dict
    loss: float | None = None
    restored: float | None = None
    first: bool | None = None
    treatments: tuple = ()

    @property
    def share(self):
        return None if not self.loss else self.restored / self.loss


def examine(rule, role, kind, seed):
    """Build a fixture, check it, and where that is to be judged, fix it."""
    f = build(rule, role, kind, seed)
    report = check(f.model, f.loader, **f.options)
    if rule not in RULES:
        return Result(rule, role, kind, seed, None, "absent", "no such rule", role == "defect", None, (), {})
    verdict = report[rule]
    found = {finding.code: finding for finding in report.findings}
    mine = found.get(rule)
    severity = None if mine is None else mine.severity
    loud = mine is not None and ORDER[severity] <= ORDER[f.at if role == "defect" else "I" if f.at == "I" else "W"]
    placed = None
    if role == "defect" and loud and f.layers:
        top = set(verdict.layers[:3])
        placed = bool(top) and (top <= set(f.layers) if len(f.layers) > 1 else set(f.layers) <= top)
    wrong = loud != (role == "defect")
    errors = [c for c, x in found.items() if x.severity == "E" and c not in (rule, *f.also)]
    unrelated = tuple(c for c in errors if not related(c, rule, found))
    others = {c: x.severity for c, x in found.items() if c != rule}
    result = Result(rule, role, kind, seed, severity, verdict.status, verdict.reason, wrong, placed, unrelated, others)
    if role == "defect" and mine is not None and f.healthy is not None and felt(mine):
        repair(result, f, report if f.pairs else with_more_in_c(report, kind, seed), mine)
    return result


def with_more_in_c(report, kind, seed):
    """The report with a split C of many more samples, which neither check nor the choice of remedies have seen."""
    more = batches(kind, seed, HELD_OUT, stream=90)
    c = (*report._ward.splits.c, *(Batch(-1, batch, len(batch[1])) for batch in more))
    ward = dataclasses.replace(report._ward, splits=dataclasses.replace(report._ward.splits, c=c))
    return dataclasses.replace(report, _ward=ward)


def related(code, rule, found):
    """Whether one explains the other, or a third both."""
    return bool({code, *chain(code, found)} & {rule, *chain(rule, found)})


def chain(code, found):
    seen = []
    while code in found and code not in seen:
        seen.append(code)
        code = found[code].explained_by
    return seen


def felt(finding):
    safe = finding.remedies and finding.remedies[0].safety in ("S0", "S1")
    return bool(safe) and finding.cost is not None and finding.cost.low > 0


def repair(result, f, report, finding):
    """What the fix gives back on split C."""
    held_out = [batch.data for batch in report._ward.splits.c]
    if f.pairs:
        held_out = [pair for x, y in held_out for pair in zip(x.split(2), y.split(2), strict=True)]
    before = accuracy(report.model, held_out)
    fixed = report.fix()
    result.loss = accuracy(f.healthy, held_out) - before
    result.restored = accuracy(fixed.model, held_out) - before
    result.first = any(t.rule == result.rule and t.remedy.code == finding.remedies[0].code for t in fixed.applied)
    result.treatments = tuple(f"{t.rule} {t.remedy.code}: {t.outcome}" for t in (*fixed.applied, *fixed.skipped))


def accuracy(model, data):
    """In percent, in evaluation mode, the model left alone."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in data]
    return 100 * float(torch.cat(hits).mean())
