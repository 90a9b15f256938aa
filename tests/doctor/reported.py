"""Reported cases acted out: a small network on the embedded digits, and what was done wrong (or not) in the report.

A case is a record: the report, its cause in a few words, what the doctor should name first (nothing, where what was
reported is healthy or wanted), and a function that does again what was done there. They are no fixtures of rules: what
is expected is the cause that the report's thread settled on, whatever the doctor says.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fixtures import Fixture, FrozenNorm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fusion
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope import data
from normscope.doctor import check

# --- data and networks --------------------------------------------------------------------------------------------

LEARNT = 1000


@functools.cache
def digits():
    """All digits in random order, as (n, 1, 8, 8) from 0 to 1, and their labels."""
    kept = data.load("digits")
    parts = ((kept.train_x, kept.train_y), (kept.test_x, kept.test_y))
    x, y = (torch.cat([torch.tensor(part[k]) for part in parts]) for k in range(2))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order].reshape(-1, 1, 8, 8).float() / kept.top, y[order].long()


def held_out(size=32, change=lambda x: x):
    """Batches of digits that nothing was learnt from."""
    x, y = digits()
    return list(zip(change(x[LEARNT:]).split(size), y[LEARNT:].split(size), strict=True))[: 797 // size]


def feed(step, size=64, change=lambda x: x):
    """A batch to learn from."""
    x, y = digits()
    chosen = torch.randint(LEARNT, (size,), generator=torch.Generator().manual_seed(step))
    return change(x[chosen]), y[chosen]


def block(a, b, stride=1, norm=nn.BatchNorm2d, bias=False):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=bias), norm(b), nn.ReLU())


class Net(nn.Module):
    """Three convolutions with normalizers, pooling, a classifier."""

    def __init__(self, norm=nn.BatchNorm2d, width=16, bias=False):
        super().__init__()
        self.body = nn.Sequential(
            block(1, width, 1, norm, bias), block(width, width, 2, norm, bias), block(width, width, 1, norm, bias)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x).flatten(2).mean(2))


def mlp(before=nn.Identity, norm=nn.BatchNorm1d):
    layers = [nn.Flatten(), nn.Linear(64, 48), nn.ReLU()]
    return nn.Sequential(*layers, before(), nn.Linear(48, 48), norm(48), nn.ReLU(), nn.Linear(48, 10))


def bns(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


def seeded(make, *args, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **options)


def learn(model, steps=150, lr=0.1, batches=feed, forward=lambda m, x: m(x), start=0, mode=True, after=lambda: None):
    """Stochastic gradient descent towards a rate of zero."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=lr, momentum=0.9)
    if mode:
        model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            x, y = batches(start + step)
            optimizer.zero_grad()
            F.cross_entropy(forward(model, x), y).backward()
            optimizer.step()
            after()
    return model.eval()


@functools.cache
def _learnt(make, **options):
    return learn(seeded(make), **options)


def learnt(make=Net, **options):
    """A network that was trained properly."""
    return copy.deepcopy(_learnt(make, **options))


def momentum(model, value, eps=None):
    for bn in bns(model):
        bn.momentum = value
        bn.eps = bn.eps if eps is None else eps
    return model


def step(model, batch, optimizer):
    """A loop's body."""
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def train_step(model, batch, optimizer):
    step(model.train(), batch, optimizer)


def sgd(model, **options):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, **options)


def in_training(body, model):
    return {"train_step": body, "optimizer": sgd(model)}


def predict_as_is(model, x):
    with torch.no_grad():
        return model(x)


# --- the record ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A reported case.

    Attributes:
        name: Of the collection, e.g. "A-01".
        report: Where it was reported.
        cause: What the thread settled on.
        expected: Rules of which one should lead; none where silence at W and E is right.
        act: Does it again: a fixture.
        at: "W" for W or E; "I" where the thread found it harmless, so that an alarm would be wrong.
        useless: Remedies that are not to be offered by the rule that leads.
    """

    name: str
    report: str
    cause: str
    expected: tuple[str, ...]
    act: Callable[[], Fixture]
    at: str = "W"
    useless: tuple[str, ...] = ()

    @property
    def rule(self):
        return f"case-{self.name}"


CASES: list[Case] = []


def case(name, report, cause, *expected, at="W", useless=()):
    def register(act):
        CASES.append(Case(name, report, cause, expected, act, at, useless))
        return act

    return register


@dataclass
class Said:
    """What the doctor said about a case; a row of the store.

    Attributes:
        rule: "case-" and its name.
        said: The first finding that nothing explains, of those at W and above; else the expected hint, or what passed.
        wrong: Whether it should have said something else.
    """

    rule: str
    said: str
    wrong: bool
    role: str = "case"
    kind: str = "digits"
    seed: int = 0


def examine(one):
    """Act a case out and ask the doctor."""
    f = one.act()
    report = check(f.model, f.loader, **f.options)
    roots = [x for x in report.findings if not x.explained_by]
    loud = [x for x in roots if x.severity != "I"]
    hints = [x for x in roots if x.code in one.expected]
    lead = (loud or hints or [None])[0]
    if lead is None:
        silent = report[one.expected[0]] if one.expected else None
        said = "nothing at W or E" if silent is None else f"{silent.code} {silent.status}: {silent.reason}"
    else:
        said = f"{lead.severity} {lead.code} {lead.name}: {lead.message}"
    if not one.expected:
        return Said(one.rule, said, bool(loud))
    named = lead is not None and lead.code in one.expected and (lead.severity == "I") == (one.at == "I")
    offered = {remedy.code for remedy in lead.remedies} if lead is not None else set()
    return Said(one.rule, said, not named or bool(offered & set(one.useless)))


# --- A: running statistics ----------------------------------------------------------------------------------------


@case("A-01", "discuss.pytorch.org/t/7146", "statistics of other activations", "NRM103", "NRM104")
def a01():
    model = momentum(learnt(), 0.001)
    return Fixture(learn(model, 20, 1.0, start=500), held_out())


@case("A-02", "pytorch#3869", "dropout before BatchNorm", "NRM406", "NRM103")
def a02():
    return Fixture(learn(seeded(mlp, lambda: nn.Dropout(0.7))), held_out())


@case("A-03", "keras#10666", "an average too slow for the number of steps", "NRM104")
def a03():
    return Fixture(learn(momentum(seeded(Net), 0.01), 60), held_out())


def inverted(x):
    return 1 - x


@case("A-04", "pretrained-models.pytorch#5", "fine-tuned with momentum 0: statistics never move", "NRM106", "NRM103")
def a04():
    model = momentum(learnt(), 0.0)
    return Fixture(learn(model, 80, batches=lambda k: feed(k, change=inverted)), held_out(change=inverted))


@case("A-05", "pix2pix-tensorflow#126", "the other library's momentum, without harm", "NRM106", at="I")
def a05():
    return Fixture(learn(momentum(seeded(Net), 0.9), batches=lambda k: feed(k, 256)), held_out())


@case("A-06", "tacotron_pytorch#19", "momentum 0.99 and ε 1e-3 copied", "NRM106")
def a06():
    return Fixture(learn(momentum(seeded(mlp), 0.99, 1e-3), 300, 0.05, lambda k: feed(k, 16)), held_out())


def faint(model, scale=0.03):
    """Activations as small as ε: what enters the first normalizer is scaled, and its statistics with it."""
    conv, bn = model.body[0][0], model.body[0][1]
    with torch.no_grad():
        conv.weight.mul_(scale)
        bn.running_mean.mul_(scale)
        bn.running_var.mul_(scale**2)
    return model


def with_small_inputs(eps):
    def make():
        model = seeded(Net)
        faint(model)
        return momentum(model, 0.1, eps)

    return make


@case("A-07", "transformers#19454", "a port without ε and momentum of the origin", "NRM704", "NRM606")
def a07():
    origin = learn(with_small_inputs(1e-3)())
    return Fixture(momentum(copy.deepcopy(origin), 0.1, 1e-5), held_out(), {"reference": origin})


@case("A-09", "Torch-Pruning#147", "rebuilt with ε 1e-5, trained with 1e-3", "NRM704", "NRM606")
def a09():
    origin = learn(with_small_inputs(1e-3)())
    model = Net()
    model.load_state_dict(origin.state_dict())
    return Fixture(model.eval(), held_out(), {"reference": origin})


@case("A-10", "pytorch#1206", "a batch with NaN entered the average", "NRM101")
def a10():
    model = learnt().train()
    x, _ = feed(9)
    x[3, 0, 2, 2] = math.nan
    model(x)
    return Fixture(model.eval(), held_out())


@case("A-11", "SparseConvNet#190", "one value per channel in training", "NRM301")
def a11():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    x, y = digits()
    return Fixture(model.train(), DataLoader(TensorDataset(x[:60], y[:60]), batch_size=1))


@case("A-12", "pytorch#90342", "an overflow, a skipped step, and the buffers are lost", "NRM101")
def a12():
    model = learnt().train()
    with torch.no_grad():
        model(feed(3)[0] * 1e38)
    return Fixture(model.eval(), held_out())


@case("A-13", "apex#144", "statistics cast to half precision: variances above 65504", "NRM101", "NRM506")
def a13():
    def large(x):
        return 2000 * x

    model = learn(seeded(Net), batches=lambda k: feed(k, change=large))
    for bn in bns(model):
        bn.running_var = bn.running_var.half().float()
    return Fixture(model, held_out(change=large))


@case("A-14", "tf-frrn#2", "running means were never updated", "NRM102")
def a14():
    model = learnt()
    for bn in bns(model):
        bn.reset_running_stats()
    return Fixture(model, held_out())


def parameters_only(model):
    made = Net()
    made.load_state_dict(dict(model.named_parameters()), strict=False)
    return made.train(model.training)


@case("A-15", "torch/nn#1165", "only parameters are checkpointed", "NRM607")
def a15():
    return Fixture(learnt(), held_out(), {"roundtrip": parameters_only})


def follower(decay, steps=150, buffers=False):
    """A network and one that follows its weights."""
    model = seeded(Net)
    behind = copy.deepcopy(model)

    def after():
        mine, theirs = (m.state_dict() if buffers else dict(m.named_parameters()) for m in (behind, model))
        with torch.no_grad():
            for name, value in mine.items():
                if value.is_floating_point():
                    value.lerp_(theirs[name], 1 - decay)

    learn(model, steps, after=after)
    return model, behind.eval()


@case("A-16", "mean-teacher#9", "the teacher averages parameters, not buffers", "NRM602", "NRM102")
def a16():
    model, teacher = follower(0.9)
    return Fixture(teacher, held_out(), {"reference": model})


@case("A-17", "ignite#2590", "an averaged model in evaluation mode with old buffers", "NRM602", "NRM103")
def a17():
    model, averaged = follower(0.9)
    early = learn(seeded(Net), 15)
    for bn, old in zip(bns(averaged), bns(early), strict=True):
        bn.running_mean.copy_(old.running_mean)
        bn.running_var.copy_(old.running_var)
        bn.num_batches_tracked.copy_(old.num_batches_tracked)
    return Fixture(averaged, held_out(), {"reference": model})


@case("A-18", "timm#245", "an average so slow that the weights lag; not the statistics' fault")
def a18():
    model, averaged = follower(0.995, 60, buffers=True)
    ns.recalibrate(averaged, [feed(k) for k in range(30)], progress=False)
    return Fixture(averaged, held_out(), {"reference": model})


@case("A-20", "keras-stochastic-weight-averaging#4", "weights averaged, statistics not", "NRM113", "NRM602", "NRM103")
def a20():
    model = learn(seeded(Net), 60)
    swa = AveragedModel(model)
    for k in range(1, 6):
        learn(model, 20, 0.2, start=100 * k)
        swa.update_parameters(model)
    return Fixture(swa.eval(), held_out())


@case("A-22", "PFLlib#260", "clients' parameters averaged, the server's buffers old", "NRM102", "NRM103", "NRM602")
def a22():
    server = seeded(Net)
    clients = [learn(copy.deepcopy(server), 100, start=1000 * k) for k in range(2)]
    with torch.no_grad():
        for mine, *theirs in zip(server.parameters(), *(c.parameters() for c in clients), strict=True):
            mine.copy_(sum(theirs) / len(theirs))
    return Fixture(server.eval(), held_out())


def rounded(model, levels):
    for p in model.parameters():
        if p.dim() > 1:
            scale = p.abs().max() / levels
            p.data = (p.data / scale).round() * scale
    return model


@case("A-23", "nncf#46", "weights in 4 bits, statistics of the old ones", "NRM113", "NRM103")
def a23():
    origin = learnt()
    return Fixture(rounded(copy.deepcopy(origin), 2), held_out(), {"reference": origin})


@case("A-24", "once-for-all#15", "a part of a supernet with the statistics of the whole", "NRM103", "NRM113")
def a24():
    wide, part = learnt(), Net(width=12)
    mine = part.state_dict()
    for name, value in wide.state_dict().items():
        mine[name].copy_(value[tuple(slice(n) for n in mine[name].shape)])
    return Fixture(part.eval(), held_out())


@case("A-25", "ultralytics#18149", "zeros in training mode to find out a stride", "NRM108", at="I")
def a25():
    model = seeded(Net).train()
    model(torch.zeros(1, 1, 16, 16))
    return Fixture(model, held_out())


def summary(model):
    """What a summary tool did."""
    model.train()
    with torch.no_grad():
        return model(torch.rand(2, 1, 8, 8)).shape


@case("A-26", "torchinfo#21", "a summary runs the model in training mode", "NRM208")
def a26():
    return Fixture(learnt(), held_out(), {"evaluate": summary})


class Checkpointed(Net):
    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False).flatten(2).mean(2))


@case("A-29", "pytorch#62471", "checkpointing averages every batch twice", "NRM601", at="I")
def a29():
    model = learnt(Checkpointed).train()
    return Fixture(model, held_out(), in_training(train_step, model))


def attacked(model, batch, optimizer):
    model.train()
    x = batch[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), x)
    train_step(model, (x.detach() + 0.1 * gradient.sign(), batch[1]), optimizer)


@case("A-30", "cifar10_challenge#22", "attacks are made in training mode; hardly an effect", "NRM610", "NRM601", at="I")
def a30():
    model = learnt().train()
    return Fixture(model, held_out(), in_training(attacked, model))


@case("A-31", "higher#55", "functional copies move their own statistics", "NRM102")
def a31():
    model = seeded(Net)

    def through_a_copy(module, x):
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        return torch.func.functional_call(module, {**dict(module.named_parameters()), **buffers}, (x,))

    return Fixture(learn(model, forward=through_a_copy), held_out())


@case("A-32", "pytorch#3122", "batches of three: stored variances are half as large again", "NRM112", at="I")
def a32():
    model = learnt(mlp)
    ns.recalibrate(model, [feed(k) for k in range(30)], progress=False)
    return Fixture(model, held_out(3)[:240])


@case("A-33", "IIC#10", "statistics of data with distractor classes", "NRM110", "NRM103")
def a33():
    model = learnt().train()
    with torch.no_grad():
        for k in range(60):
            model(torch.cat([feed(k, 16)[0], torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(k))]))
    return Fixture(model.eval(), held_out())


# --- B: modes and freezing ----------------------------------------------------------------------------------------


def frozen_weights(model):
    model.body.requires_grad_(False)
    return model.train()


@case("B-01", "lightly#1438", "a frozen extractor whose statistics move", "NRM203")
def b01():
    return Fixture(frozen_weights(learnt()), held_out())


@case("B-02", "chemprop#952", "frozen once, undone by the next train()", "NRM204")
def b02():
    model = frozen_weights(learnt())
    model.body.eval()
    return Fixture(model, held_out())


def freeze_bn(model):
    """As it was written: a method is looked up and not called."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval  # noqa: B018


def freezing_step(model, batch, optimizer):
    model.train()
    freeze_bn(model)
    step(model, batch, optimizer)


@case("B-03", "indexnet_matting#35", "freeze_bn() takes no effect", "NRM203")
def b03():
    model = frozen_weights(learnt())
    return Fixture(model, held_out(), in_training(freezing_step, model))


@case("B-04", "pytorch-lightning#18930", "the loop calls train() on everything", "NRM203", "NRM204")
def b04():
    model = frozen_weights(learnt())
    model.body.eval()
    return Fixture(model, held_out(), in_training(train_step, model))


@case("B-05", "pytorch-lightning#15062", "frozen by track_running_stats=False", "NRM205")
def b05():
    model = learnt()
    for bn in bns(model.body):
        bn.track_running_stats = False
    model.body.requires_grad_(False)
    return Fixture(model.train(), held_out())


@case("B-07", "pytorch-lightning#19820", "fine-tuned in the mode in which it was loaded", "NRM202")
def b07():
    model = learnt()
    return Fixture(model, held_out(), in_training(step, model))


class Overridden(Net):
    def train(self, mode=True):
        super().train(mode)
        for bn in bns(self):
            bn.training = True
        return self


def predict(model, x):
    model.eval()
    return predict_as_is(model, x)


@case("B-09", "Detectron.pytorch#104", "an own train() keeps BatchNorm in training mode", "NRM201", "NRM210")
def b09():
    return Fixture(learnt(Overridden), held_out(), {"predict": predict})


@case("B-10", "ganomaly#83", "no eval() at test: the score depends on shuffling", "NRM201")
def b10():
    return Fixture(learnt().train(), held_out(), {"predict": predict_as_is})


class Painter(nn.Module):
    """Noise to images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())

    def forward(self, z):
        return self.body(z)


def noise(count=24, size=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 16, generator=generator) for _ in range(count)]


def painted():
    model = seeded(Painter).train()
    for z in noise():
        model(z)
    return model


@case("B-11", "pytorch-CycleGAN-and-pix2pix#693", "batch statistics at test time, by design and declared")
def b11():
    options = {"predict": predict_as_is, "intent": ("gan-batchstats-test",)}
    return Fixture(painted(), noise(), options)


@case("B-12", "dcgan.torch#19", "an image depends on the other noise vectors", "NRM201")
def b12():
    return Fixture(painted(), noise(), {"predict": predict_as_is})


@case("B-13", "Person_reID_baseline_pytorch#218", "batch statistics hide stale ones", "NRM201", "NRM103")
def b13():
    model = learnt()
    for bn in bns(model):
        bn.running_mean += bn.running_var.sqrt()
    return Fixture(model.train(), held_out(8), {"predict": predict_as_is})


def lit(x, y):
    """Every image in a light of its own."""
    generator = torch.Generator().manual_seed(int(x.sum() * 1000))
    return x * torch.randn(1, generator=generator).exp() + 2 * torch.randn(1, generator=generator), y


@case("B-14", "DMS#30", "trained with one image per batch: evaluation collapses", "NRM302", "NRM103")
def b14():
    model = learn(seeded(Net), 600, 0.02, lambda k: lit(*feed(k, 1)))
    return Fixture(model.train(), [lit(x, y) for x, y in held_out(1)[:600]])


@case("B-15", "pytorch#156051", "no buffers: eval() changes nothing", "NRM210")
def b15():
    return Fixture(learnt(lambda: Net(lambda c: nn.BatchNorm2d(c, track_running_stats=False))), held_out(8))


class Functional(nn.Module):
    """Batch statistics, as it was written."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


@case("B-16", "HowToTrainYourMAMLPytorch#24", "F.batch_norm(..., training=True)", "NRM210")
def b16():
    return Fixture(learnt(lambda: Net(Functional)), held_out(8))


def tracked(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)


@case("B-17", "CycleGAN#395", "InstanceNorm with running statistics", "NRM209")
def b17():
    return Fixture(learnt(lambda: Net(tracked)), held_out())


class Distilled(Net):
    def __init__(self):
        super().__init__()
        self.teacher = Net()


def distil(model, batch, optimizer):
    model.train()
    x, y = batch
    with torch.no_grad():
        target = model.teacher(x).softmax(1)
    optimizer.zero_grad()
    out = model(x)
    (F.cross_entropy(out, y) + F.cross_entropy(out, target)).backward()
    optimizer.step()


def taught():
    model = seeded(Distilled)
    model.load_state_dict(learnt().state_dict(), strict=False)
    model.teacher.load_state_dict(learnt().state_dict())
    return model.train()


@case("B-18", "unbiased-teacher#47", "the teacher's statistics move under no_grad", "NRM211")
def b18():
    model = taught()
    return Fixture(model, held_out(), in_training(distil, model))


@case("B-18b", "overhaul-distillation#37", "a teacher in training mode on purpose, declared")
def b18b():
    model = taught()
    return Fixture(model, held_out(), {**in_training(distil, model), "intent": ("teacher-train-mode",)})


def frozen_like_a_detector(model):
    for stage in model.body:
        stage[1] = FrozenNorm(stage[1])
    return model


@case("B-19", "vision#5443", "from scratch with frozen normalizers", "NRM206")
def b19():
    return Fixture(frozen_like_a_detector(seeded(Net)).train(), held_out())


@case("B-20", "spektral#417", "0.9 in training, half of that by evaluate() on the same data", "NRM104", "NRM103")
def b20():
    model = learn(momentum(seeded(mlp), 0.01), 50)
    x, y = digits()
    return Fixture(model, list(zip(x[:800].split(32), y[:800].split(32), strict=True)))


def keeps_eval(model, batch, optimizer):
    model.train()
    for bn in bns(model):
        bn.eval()
    step(model, batch, optimizer)


@case("B-22", "QAConv#16", "BatchNorm in evaluation mode throughout, on purpose, declared")
def b22():
    model = learnt()
    for bn in bns(model):
        bn.eval()
    return Fixture(model, held_out(), {**in_training(keeps_eval, model), "intent": ("bn-frozen-throughout",)})


# --- C: batches ---------------------------------------------------------------------------------------------------


@case("C-01", "pytorch#7716", "one sample is left for the last batch", "NRM301")
def c01():
    x, y = digits()
    return Fixture(learnt(mlp).train(), DataLoader(TensorDataset(x[:513], y[:513]), batch_size=64))


class Pooled(Net):
    """A branch of one pixel, as in a segmenter's image pooling."""

    def __init__(self):
        super().__init__()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x):
        x = self.body(x)
        return self.head((x + self.pool(x)).flatten(2).mean(2))


@case("C-02", "vision#1491", "pooling to one pixel before BatchNorm, two images per device", "NRM301")
def c02():
    return Fixture(learnt(Pooled).train(), held_out(2))


@case("C-03", "yolact#325", "batch 2 fails where batch 6 is fine", "NRM302", "NRM301")
def c03():
    model = learn(seeded(mlp), 300, 0.02, lambda k: feed(k, 2))
    return Fixture(model.train(), held_out(2))


def accumulating(model, batch, optimizer):
    model.train()
    optimizer.zero_grad()
    for _ in range(16):
        (F.cross_entropy(model(batch[0]), batch[1]) / 16).backward()
    optimizer.step()


@case("C-05", "mmcv#1869", "accumulation does not enlarge the normalizer's batch", "NRM308", "NRM302")
def c05():
    model = learnt(mlp).train()
    return Fixture(model, held_out(8), in_training(accumulating, model))


@case("C-08", "openpifpaf#308", "batches of one class", "NRM304")
def c08():
    x, y = (t[LEARNT:] for t in digits())
    order = y.argsort(stable=True)
    return Fixture(learnt().train(), list(zip(x[order].split(32), y[order].split(32), strict=True))[:24])


class Twice(Net):
    """Two batches through the same normalizers, one after the other."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, x):
        second = super().forward(self.other(x))
        return super().forward(x) + (0.0 * second if self.training else second)


def augmented(x):
    return 0.3 * x + 2


@case("C-09", "MixMatch-pytorch#20", "labelled and unlabelled batches through one BatchNorm", "NRM107", "NRM103")
def c09():
    return Fixture(learn(seeded(Twice, augmented)), held_out())


class Judge(nn.Module):
    """Tells digits from blurred and brighter ones, each sort in a batch of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(1, 16), block(16, 16, 2))
        self.head = nn.Linear(16, 1)

    def forward(self, real, fake):
        return torch.cat([self.head(self.body(x).flatten(2).mean(2)) for x in (real, fake)], 1)


def judged(output, batch):
    right = torch.tensor([[1.0, 0.0]]).expand(len(output), 2)
    return F.binary_cross_entropy_with_logits(output, right, reduction="none").mean(1)


def generated(x):
    return F.avg_pool2d(x, 3, 1, 1) + 0.5


def pairs():
    return [(x, generated(x.flip(0))) for x, _ in held_out()]


@case("C-10", "ganhacks#52", "real and generated samples in batches of their own", "NRM107", "NRM103")
def c10():
    model = seeded(Judge).train()
    optimizer = sgd(model, momentum=0.9)
    for k in range(200):
        optimizer.zero_grad()
        judged(model(feed(k)[0], generated(feed(k + 1000)[0])), None).mean().backward()
        optimizer.step()
    options = {"forward": lambda m, batch: m(*batch), "loss": judged}
    return Fixture(model.eval(), pairs(), options)


class Domains(Net):
    """Every sample as it is and as another domain shows it; the answer is that of both."""

    def forward(self, x):
        return super().forward(x) + super().forward(4 * inverted(x))


@case("C-11", "DSBN#10", "two domains share the statistics", "NRM107")
def c11():
    return Fixture(learn(seeded(Domains)), held_out())


LONG = 24


def sequences(size=32, change=lambda x: x):
    """Digits as sequences of rows, of 3 to 8 of them, filled up with zeros."""
    made = []
    generator = torch.Generator().manual_seed(0)
    for x, y in held_out(size):
        lengths = torch.randint(3, 9, (len(x),), generator=generator)
        rows = x[:, 0] * (torch.arange(8) < lengths[:, None])[:, :, None]
        made.append((F.pad(change(rows).transpose(1, 2), (0, LONG - 8)), y))
    return made


class Rows(nn.Module):
    """Convolutions over rows."""

    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(8, 32, 3, padding=1), norm(32), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), norm(32), nn.ReLU()
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.body(x).amax(2))


def rows(step):
    x, y = feed(step)
    return x[:, 0].transpose(1, 2), y


@case("C-12", "deepspeech.pytorch#312", "padding in the batch's statistics", "NRM305")
def c12():
    return Fixture(learn(seeded(Rows, nn.BatchNorm1d), batches=rows).train(), sequences())


@case("C-13", "fairseq#3227", "GroupNorm over time: the answer depends on the longest", "NRM305")
def c13():
    return Fixture(learn(seeded(Rows, lambda c: nn.GroupNorm(c // 4, c)), batches=rows), sequences())


@case("C-15", "higher#55", "transductive evaluation, declared")
def c15():
    options = {"predict": predict_as_is, "intent": ("transductive-meta",)}
    return Fixture(learnt().train(), held_out(), options)


@case("C-17", "Learning2AdaptForStereo#5", "another camera at test time", "NRM110")
def c17():
    x, y = (t[:640].split(32) for t in digits())
    return Fixture(learnt(), held_out(), {"deployment": [(0.4 * a + 0.5, b) for a, b in zip(x, y, strict=True)]})


# --- D: numbers, structure, deployment ----------------------------------------------------------------------------


@case("D-01", "vision#2599", "a frozen normalizer without ε and a variance near 0", "NRM405", "NRM502", "NRM101")
def d01():
    model = learnt()
    frozen_like_a_detector(model)
    norm = model.body[1][1]
    norm.eps, norm.running_var[2] = 0.0, 1e-12
    return Fixture(model, held_out())


class Constant(nn.Module):
    """Rows of which the padded ones are all alike, normalized in half precision."""

    def __init__(self, eps):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(64, eps=eps), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.norm(x.flatten(1)))


@case("D-02", "pytorch#41527", "ε of 1e-12 is 0 in float16", "NRM501")
def d02():
    class LayerNormByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-12

        def forward(self, x):
            x = x - x.mean(1, keepdim=True)
            return self.weight * x / (x.square().mean(1, keepdim=True) + self.eps).sqrt()

    model = seeded(Constant, 1e-12)
    model.norm = LayerNormByHand()
    return Fixture(model.half().eval(), held_out(), {"forward": lambda m, batch: m(batch[0].half())})


@case("D-03", "TensorRT#2564", "overflow before the normalizer in float16", "NRM503")
def d03():
    model = faint(learnt(), 3e4)

    def forward(m, batch):
        with torch.autocast("cpu", dtype=torch.float16):
            return m(batch[0])

    return Fixture(model, held_out(), {"forward": forward})


def with_bias():
    return Net(bias=True)


def fused(model, right):
    for stage in model.body:
        conv, bn = stage[0], stage[1]
        made = fusion.fuse_conv_bn_eval(conv, bn)
        if not right:  # the bias of the convolution is added as it is
            with torch.no_grad():
                made.bias += conv.bias * (1 - bn.weight * (bn.running_var + bn.eps).rsqrt())
        stage[0], stage[1] = made, nn.Identity()
    return model


def biased():
    """The biases moved, as training without decay leaves them, and running means with them."""
    model = learnt(with_bias)
    generator = torch.Generator().manual_seed(0)
    for stage in model.body:
        shift = torch.randn(16, generator=generator)
        stage[0].bias.data += shift
        stage[1].running_mean += shift
    return model


@case("D-04", "yolov3#807", "a fold that adds the convolution's bias unscaled", "NRM701")
def d04():
    origin = biased()
    return Fixture(fused(copy.deepcopy(origin), right=False), held_out(), {"reference": origin})


@case("D-04b", "mmcv#747", "a right fold, suspected for a sum of differences")
def d04b():
    origin = biased()
    return Fixture(fused(copy.deepcopy(origin), right=True), held_out(), {"reference": origin})


@case("D-05", "mmdetection#2924", "a fused checkpoint in convolutions without bias", "NRM701", "NRM606")
def d05():
    origin = biased()
    model = fused(copy.deepcopy(origin), right=True)
    for stage in model.body:
        stage[0].bias = None
    return Fixture(model, held_out(), {"reference": origin})


@case("D-06", "onnxruntime#3873", "exported in training mode", "NRM703")
def d06():
    model = learnt().train()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    return Fixture(torch.export.export(model, (held_out()[0][0],), dynamic_shapes=shapes).module(), held_out())


@case("D-07", "nn-quantization-pytorch#3", "ranges after folding, for 8 bits per tensor", "NRM705")
def d07():
    model = learnt()
    with torch.no_grad():
        model.body[0][1].weight[3] *= 300
        model.body[1][0].weight[:, 3] /= 300
    return Fixture(model, held_out(), {"intent": ("per-tensor-quantization",)})


@case("D-08", "network-slimming#46", "γ near 0 and a large β: the channel still speaks")
def d08():
    model = learnt()
    with torch.no_grad():
        model.body[1][1].weight[:4], model.body[1][1].bias[:4] = 1e-6, 1.0
    ns.recalibrate(model, [feed(k) for k in range(30)], progress=False)
    return Fixture(model, held_out())


@case("D-09", "Pytorch-UNet#325", "a bias before BatchNorm: cosmetic", "NRM401", at="I")
def d09():
    return Fixture(learnt(with_bias), held_out())


@case("D-10", "yolov5#4104", "weight decay on normalizers: contradictory literature", "NRM604", at="I")
def d10():
    model = learnt()
    return Fixture(model, held_out(), {"optimizer": sgd(model, weight_decay=5e-4)})


@case("D-11", "mlcolvar#205", "dropout before BatchNorm: a variance that evaluation does not have", "NRM406", at="I")
def d11():
    return Fixture(learn(seeded(mlp, lambda: nn.Dropout(0.5))), held_out())


@case("D-12", "apex#437", "a converter took InstanceNorm for BatchNorm", "NRM606")
def d12():
    origin = learnt(lambda: Net(lambda c: nn.InstanceNorm2d(c, affine=True)))
    model = Net()
    model.load_state_dict(origin.state_dict(), strict=False)
    return Fixture(model.eval(), held_out(), {"reference": origin})


@case("D-13", "mmengine#1624", "a converter lost the frozen layers' mode", "NRM606")
def d13():
    origin = learnt()
    model = copy.deepcopy(origin)
    for bn in bns(model):
        bn.training = True
    return Fixture(model, held_out(), {"reference": origin})


@case("D-14", "opacus#319", "per-sample gradients through BatchNorm", "NRM612")
def d14():
    return Fixture(learnt().train(), held_out(), {"intent": ("per-sample-gradients",)})


@case("D-14b", "opacus#315", "frozen BatchNorm, refused elsewhere")
def d14b():
    model = learnt()
    ns.freeze(model)
    return Fixture(model.train(), held_out(), {"intent": ("per-sample-gradients",)})


@case("D-16", "kits19-cnn#22", "inputs that are scaled twice", "NRM109")
def d16():
    model = learnt()
    return Fixture(model, held_out(change=lambda x: x / 255))


@case("D-17", "mmaction2#1054", "a finished model, to which precise statistics give nothing")
def d17():
    return Fixture(learnt(), held_out())


@case("D-18", "fvcore#7", "trained with small batches: precise statistics do not mend the weights", "NRM302", "NRM301",
      useless=("recal",))  # fmt: skip
def d18():
    model = learn(seeded(mlp), 300, 0.02, lambda k: feed(k, 2))
    ns.recalibrate(model, [feed(k) for k in range(30)], progress=False)
    return Fixture(model.train(), held_out(2))
