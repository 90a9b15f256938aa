"""Fixtures of rules about averages, modes, batches and training loops; see fixtures.py."""

import copy
import functools

import torch
from fixtures import (
    BATCH,
    STEPS,
    Case,
    Fixture,
    FrozenNorm,
    Net,
    Unreached,
    base,
    batches,
    fixture,
    norms,
    replace,
    sample,
    sgd,
    step,
    train,
    with_average,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import normscope as ns

# --- 1xx: averages ------------------------------------------------------------------------------------------------


@fixture("NRM105")
def nrm105(role, case):
    f = base(case)
    f.model.train()
    if role == "defect":
        with_average(f.model, case.past, 0.9)
        f.loader, f.layers = case.batches(count=240, size=8), norms(f.model)
        f.also = ("NRM302",)  # batches of 8 are noise, too
    if role == "near-miss":
        for name in norms(f.model):
            f.model.get_submodule(name).momentum = 0.3
        f.loader = case.batches(count=6, size=512)
    return f


class Siamese(Net):
    """Two branches through the same blocks."""

    def __init__(self, kind, second):
        super().__init__(kind)
        self.second = second

    def features(self, x):
        a, b = self.second(x)
        return 0.2 * super().features(a) + 0.8 * super().features(b)


def siamese(case, second):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = Siamese(case.kind, second)
    model.load_state_dict(case.past.final)
    return case.recalibrated(model.eval())


def shifted_pair(x):
    return x.roll(1, 0), 0.15 * x + 3


def alike_pair(x):
    return x.roll(1, 0), x


def scaled_pair(x):
    return x.roll(1, 0), 1.05 * x


@fixture("NRM107")
def nrm107(role, case):
    near = scaled_pair if case.odd else alike_pair
    model = siamese(case, {"defect": shifted_pair, "clean": alike_pair, "near-miss": near}[role])
    return Fixture(model, case.batches(), layers=norms(model) if role == "defect" else ())


@fixture("NRM108")
def nrm108(role, case):
    model, f = case.fresh().train(), Fixture(None, case.batches(), at="I")
    zeros = torch.zeros_like(case.batches(count=1)[0][0])
    if role == "clean":
        model.eval()
    with torch.no_grad():
        for _ in range(1 + case.seed % 3):
            model(zeros)
        if role == "near-miss":
            for x, _ in case.batches(count=60, stream=60):
                model(x)
    f.model = model
    f.layers = norms(model) if role == "defect" else ()
    return f


@fixture("NRM109")
def nrm109(role, case):
    f = base(case)
    if role == "defect":
        f.layers = norms(f.model)[:1]
        if case.kind == "conv" and case.seed % 3 == 2:
            change = lambda x: x.flip(1)  # noqa: E731
        else:
            change = (lambda x: 2 * x - 1) if case.odd else (lambda x: x / 255)
        f.loader = [(change(x), y) for x, y in f.loader]
    if role == "near-miss":
        f.loader = [((1.2 if case.odd else 0.8) * x, y) for x, y in f.loader]
        f.also = ("NRM103",)  # the statistics are of other data, if not of inputs in another scale
    return f


@fixture("NRM110")
def nrm110(role, case):
    f = base(case)
    target = case.batches(stream=30)
    if role == "defect":
        target, f.layers = [(0.3 * x, y) for x, y in target], norms(f.model)
    if role == "near-miss":
        target = case.batches(count=6, size=11, stream=30)
    f.options["deployment"] = target
    return f


@fixture("NRM111")
def nrm111(role, case):
    f = base(case)
    target = case.batches()
    if role == "defect":
        target, f.layers = [(0.3 * x + 1, y) for x, y in target], norms(f.model)
    if role == "near-miss":
        # A mild augmentation. Flips would be no near-miss here: the classes are not alike their mirror images.
        target = [(x + 0.1 * x.std() * torch.sin(37 * x), y) for x, y in target]
    f.options["deployment"] = target
    return f


@fixture("NRM112")
def nrm112(role, case):
    neck = case.kind != "mlp" and role != "near-miss"
    model = case.recalibrated(case.model(neck=neck))
    size = {"defect": 3, "clean": BATCH, "near-miss": 12 if case.kind == "mlp" else 3}[role]
    f = Fixture(model, case.batches(count=BATCH * 20 // size, size=size), at="I")
    if role == "defect":
        f.layers = ("neck",) if neck else norms(model)
    return f


# --- 2xx: modes ---------------------------------------------------------------------------------------------------


def step_as_is(model, batch, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@fixture("NRM202")
def nrm202(role, case):
    f = base(case)
    body = step_as_is if role == "defect" else step
    if role == "defect":
        f.layers = norms(f.model)
    if role == "near-miss":
        for part in (f.model.blocks, f.model.blocks[0])[case.odd :]:
            ns.freeze(part)
    f.options = {"train_step": body, "optimizer": sgd(f.model)}
    return f


@fixture("NRM206")
def nrm206(role, case):
    model = case.fresh() if role == "defect" else case.model()
    names = norms(model)
    if role != "clean":
        for name in names:
            replace(model, name, FrozenNorm(model.get_submodule(name), folded=role == "near-miss"))
    return Fixture(model.train(), case.batches(), layers=names if role == "defect" else ())


@fixture("NRM207")
def nrm207(role, case):
    f = base(case, at="I")
    f.model.train()
    if role == "defect":
        f.model.blocks[:2].eval()
        f.layers = norms(f.model)[:2]
    if role == "near-miss":
        ns.freeze(f.model.blocks[:2])
    return f


@functools.cache
def trained_otherwise(kind, seed, make, change=lambda x, y: (x, y)):
    """A network with other normalizers, trained, perhaps on other inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = with_norms(Net(kind), make)
        train(model, lambda step: change(*sample(kind, seed, BATCH, 100 + step)), STEPS)
        return model.eval()


def with_norms(model, make):
    """Other normalizers in place of BatchNorm."""
    for name in norms(model):
        replace(model, name, make(model.get_submodule(name)))
    return model


def tracked_instances(bn):
    cls = nn.InstanceNorm2d if isinstance(bn, nn.BatchNorm2d) else nn.InstanceNorm1d
    return cls(bn.num_features, affine=True, track_running_stats=True)


def groups_of_four(bn):
    return nn.GroupNorm(bn.num_features // 4, bn.num_features)


def one_group(bn):
    return nn.GroupNorm(1, bn.num_features)


def spatial(case):
    """The same seed, as a network over images or sequences."""
    return Case("conv", case.seed + 50) if case.kind == "mlp" else case


def contrasted(x, y):
    """Every sample in a contrast of its own, which InstanceNorm takes out."""
    generator = torch.Generator().manual_seed(int(y.sum()))
    scale = torch.exp(torch.randn(len(x), generator=generator))
    return x * scale.view(-1, *(1,) * (x.dim() - 1)), y


@fixture("NRM209")
def nrm209(role, case):
    case = spatial(case)
    model = copy.deepcopy(trained_otherwise(case.kind, case.seed, tracked_instances, contrasted))
    f = Fixture(model, [contrasted(x, y) for x, y in case.batches()])
    names = tuple(name for name, m in model.named_modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm))
    if role == "defect":
        f.layers = names
    elif role == "near-miss" and case.odd:
        f.options["intent"] = ("instance-running-stats",)
    else:
        for name in names:
            one = model.get_submodule(name)
            one.track_running_stats, one.running_mean, one.running_var = False, None, None
            one.num_batches_tracked = None
    return f


class Distilled(Net):
    """A student that carries its teacher with it."""

    def __init__(self, kind):
        super().__init__(kind)
        self.teacher = Net(kind)


def distil(model, batch, optimizer):
    x, y = batch
    optimizer.zero_grad()
    with torch.no_grad():
        target = model.teacher(x).softmax(1)
    out = model(x)
    (F.cross_entropy(out, y) + F.cross_entropy(out, target)).backward()
    optimizer.step()


def distil_in_training_mode(model, batch, optimizer):
    distil(model.train(), batch, optimizer)


def distil_with_care(model, batch, optimizer):
    model.train()
    model.teacher.eval()
    distil(model, batch, optimizer)


@fixture("NRM211")
def nrm211(role, case):
    model = case.model(cls=Distilled)
    model.teacher.load_state_dict(case.past.final)
    model.train()
    f = Fixture(model, case.batches())
    if role == "defect":
        f.layers = tuple(f"teacher.{name}" for name in norms(model.teacher))
    if role == "near-miss":
        model.teacher.requires_grad_(False)
    body = distil_in_training_mode if role == "defect" else distil_with_care
    f.options = {"train_step": body, "optimizer": sgd(model)}
    return f


# --- 3xx: batches -------------------------------------------------------------------------------------------------


@fixture("NRM303")
def nrm303(role, case):
    model = case.model().train()
    for name in norms(model):
        model.get_submodule(name).momentum = 0.3 if role == "defect" else 0.1
    rest = 48 if role == "near-miss" else 2
    data = case.data(BATCH * 12 + rest)
    loader = DataLoader(data, batch_size=BATCH, drop_last=role == "clean")
    return Fixture(model, loader, layers=norms(model) if role == "defect" else ())


LONGEST = 48


def padded(case, count, size, stream):
    """Sequences of 4 to 16 positions, filled up with zeros to the length of one that is not in the batch."""
    generator = torch.Generator().manual_seed(case.seed)
    made = []
    for x, y in batches("seq", case.seed, count, size, stream):
        lengths = torch.randint(4, 17, (len(x),), generator=generator)
        made.append((F.pad(x * (torch.arange(16) < lengths[:, None])[:, None], (0, LONGEST - 16)), y))
    return made


class OverFeatures(nn.Module):
    """LayerNorm over the channels of (n, channels, time)."""

    def __init__(self, bn):
        super().__init__()
        self.norm = nn.LayerNorm(bn.num_features)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@fixture("NRM305")
def nrm305(role, case):
    # Only sequences are filled up; the other kinds stand for other seeds.
    case = Case("seq", case.seed + {"mlp": 20, "conv": 30, "seq": 0}[case.kind])
    if role == "defect" and case.odd:
        model = case.model().train()
        return Fixture(model, padded(case, 20, 32, 1), layers=norms(model))
    if role == "near-miss" and case.odd:
        return Fixture(copy.deepcopy(trained_otherwise("seq", case.seed, OverFeatures)), padded(case, 20, 32, 1))
    model = copy.deepcopy(trained_otherwise("seq", case.seed, groups_of_four))
    if role == "defect":
        names = tuple(name for name, m in model.named_modules() if isinstance(m, nn.GroupNorm))
        return Fixture(model, padded(case, 20, 32, 1), layers=names)
    loader = case.batches(size=32)
    if role == "near-miss":  # one sample ends in a zero, which is no padding
        loader[3][0][5, :, -1] = 0.0
    return Fixture(model, loader)


@fixture("NRM306")
def nrm306(role, case):
    f = base(case)
    f.model.train()
    if role == "defect":
        for x, _ in f.loader[3:9]:
            x[7] *= 100
        f.layers = norms(f.model)
    if role == "near-miss":
        tails = torch.distributions.StudentT(3.0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            f.loader = [(x + tails.sample(x.shape), y) for x, y in f.loader]
    return f


def accumulating(times):
    def body(model, batch, optimizer):
        model.train()
        optimizer.zero_grad()
        for _ in range(times):
            (F.cross_entropy(model(batch[0]), batch[1]) / times).backward()
        optimizer.step()

    return body


@fixture("NRM308")
def nrm308(role, case):
    model = case.model().train()
    f = Fixture(model, case.batches(count=240, size=4))
    if role == "defect":
        f.layers = norms(model)
    if role == "clean":
        f.loader = case.batches()
    if role == "near-miss" and case.odd:
        f.model = with_norms(model, one_group)
    elif role == "near-miss":
        f.loader = case.batches()
    times = 1 if role == "clean" else 4 if role == "near-miss" else 16
    f.options = {"train_step": accumulating(times), "optimizer": sgd(f.model)}
    return f


class Encoder(nn.Module):
    """Two views of a sample to two embeddings, normalized in one batch.

    The embedding sees what enters the first normalizer and what comes out, as behind a shortcut: the difference is the
    batch's mean.
    """

    def __init__(self, kind):
        super().__init__()
        self.body = Net(kind)
        first = self.body.blocks[0].bn.num_features
        self.head = nn.Linear(self.body.head.in_features + 2 * first, 16)

    def embed(self, x):
        first = self.body.blocks[0]
        before = first.op(x)
        after = first.bn(before)
        parts = (before, after, self.body.blocks[1:](torch.relu(after)))
        return self.head(torch.cat([t.flatten(2).mean(2) if t.dim() > 2 else t for t in parts], 1))

    def forward(self, query, key):
        return self.embed(torch.cat([query, key])).chunk(2)


def views(kind, seed, size, stream):
    """What is told apart: two samples of one class are two views of an instance."""
    query, labels = sample(kind, seed, size, stream)
    return query, sample(kind, seed, size, stream + 50_000, labels)[0]


def discriminate(model, query, key, groups, mixed):
    """The loss of telling instances apart, normalized in groups; mixed: keys in another order than queries."""
    order = torch.randperm(len(key)) if mixed else torch.arange(len(key))
    if mixed:
        z = torch.cat([model.embed(part) for part in query.chunk(groups)])
        w = torch.cat([model.embed(part) for part in key[order].chunk(groups)])[order.argsort()]
    else:
        pairs = [model(q, k) for q, k in zip(query.chunk(groups), key.chunk(groups), strict=True)]
        z, w = (torch.cat(part) for part in zip(*pairs, strict=True))
    return F.cross_entropy(F.normalize(z) @ F.normalize(w).T / 0.1, torch.arange(len(query)))


@functools.cache
def told_apart(kind, seed, role):
    """An encoder whose loss compares samples: with its batch's statistics, without, or with keys in another order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder(kind)
        if role == "clean":
            with_norms(model.body, one_group)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(STEPS):
            optimizer.zero_grad()
            discriminate(model, *views(kind, seed, BATCH, 100 + step), 8, role == "near-miss").backward()
            optimizer.step()
        return model


@fixture("NRM307")
def nrm307(role, case):
    model = copy.deepcopy(told_apart(case.kind, case.seed, role))
    f = Fixture(model, [views(case.kind, case.seed, BATCH // 8, 10_000 + k) for k in range(60)])
    f.options = {"forward": lambda model, batch: model(*batch), "intent": ("contrastive-loss",)}
    f.layers = tuple(f"body.{name}" for name in norms(model.body)) if role == "defect" else ()
    return f


# --- 6xx: the loop ------------------------------------------------------------------------------------------------


class Checkpointed(Net):
    """Computes its blocks again for the backward pass."""

    def features(self, x):
        y = checkpoint(self.blocks, x, use_reentrant=False)
        return y.flatten(2).mean(2) if y.dim() > 2 else y


@fixture("NRM601")
def nrm601(role, case):
    model = case.model(cls=Checkpointed if role == "defect" else Net).train()
    f = Fixture(model, case.batches(), at="I", layers=norms(model) if role == "defect" else ())
    body = accumulating(4) if role == "near-miss" else step
    f.options = {"train_step": body, "optimizer": sgd(model)}
    return f


@fixture("NRM604")
def nrm604(role, case):
    f = base(case, at="I")
    groups = f.model.parameters()
    if role == "near-miss":
        groups = ns.optim.decay_groups(f.model, weight_decay=1e-2)
    decay = 0.0 if role == "clean" else 1e-2
    if role == "near-miss" and case.odd:
        moved = [p for name in norms(f.model) for p in f.model.get_submodule(name).parameters()]
        rest = [p for p in f.model.parameters() if all(p is not q for q in moved)]
        groups = [{"params": rest}, {"params": moved, "lr": 0.0}]
    f.options["optimizer"] = torch.optim.SGD(
        groups, lr=0.1, **({} if role == "near-miss" and not case.odd else {"weight_decay": decay})
    )
    f.layers = norms(f.model) if role == "defect" else ()
    return f


@fixture("NRM608")
def nrm608(role, case):
    f = base(case)
    own = [p for name in norms(f.model) for p in f.model.get_submodule(name).parameters()]
    rest = [p for p in f.model.parameters() if all(p is not q for q in own)]
    if role == "near-miss":
        for p in own:
            p.requires_grad_(False)
    f.options["optimizer"] = torch.optim.SGD(f.model.parameters() if role == "clean" else rest, lr=0.1)
    f.layers = norms(f.model) if role == "defect" else ()
    return f


def attacked(mode):
    """A step with a forward on changed inputs before it, in training or evaluation mode."""

    def body(model, batch, optimizer):
        x = batch[0].clone().requires_grad_()
        model.train(mode)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), x)
        step(model, (x.detach() + 0.1 * gradient.sign(), batch[1]), optimizer)

    return body


@fixture("NRM610")
def nrm610(role, case):
    f = base(case, at="I")
    f.model.train()
    body = {"defect": attacked(True), "clean": step, "near-miss": attacked(False)}[role]
    f.options = {"train_step": body, "optimizer": sgd(f.model)}
    f.layers = norms(f.model) if role == "defect" else ()
    return f


@fixture("NRM612")
def nrm612(role, case):
    f = base(case, at="E")
    f.options["intent"] = ("per-sample-gradients",)
    if role != "clean":
        f.model.train()
    if role == "near-miss":
        ns.freeze(f.model)
    f.layers = norms(f.model) if role == "defect" else ()
    return f


class TrainOnly(Unreached):
    """The auxiliary normalizer takes part in training only."""

    def features(self, x):
        y = super().features(x)
        return self.auxiliary(y) if self.training else y


@fixture("NRM409")
def nrm409(role, case):
    model = case.model(cls={"defect": Unreached, "clean": Net, "near-miss": TrainOnly}[role])
    f = Fixture(model, case.batches(), at="I", layers=("auxiliary",) if role == "defect" else ())
    f.options = {"train_step": step, "optimizer": sgd(model)}
    return f


@fixture("NRM410")
def nrm410(role, case):
    if role == "clean":
        return base(case, at="I")
    model = siamese(case, alike_pair)
    if role == "near-miss":
        model = with_norms(model, one_group)
    return Fixture(model, case.batches(), at="I", layers=norms(model))
