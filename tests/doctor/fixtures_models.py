"""Fixtures of rules about the structure, the numbers and the conversion of models; see fixtures.py."""

import copy

import torch
from fixtures import SHAPES, Fixture, FrozenNorm, Net, base, fixture, norms, replace
from fixtures_loops import groups_of_four, one_group, spatial, with_norms
from torch import nn
from torch.nn.utils import fusion

import normscope as ns
from normscope.surgery import absorb_bias

# --- 4xx: structure -----------------------------------------------------------------------------------------------


def with_biases(model):
    """Every convolution with a bias, which the running mean takes away again."""
    for block in model.blocks:
        if isinstance(block.op, nn.Conv2d):
            block.op.bias = nn.Parameter(torch.linspace(-1, 1, block.op.out_channels))
            block.bn.running_mean += block.op.bias.detach()
    return model


class Between(nn.Module):
    """ReLU, then the normalizer."""

    def __init__(self, bn):
        super().__init__()
        self.act, self.bn = nn.ReLU(), bn

    def forward(self, x):
        return self.bn(self.act(x))


@fixture("NRM401")
def nrm401(role, case):
    model = with_biases(case.model())
    f = Fixture(model, case.batches(), at="I")
    if role == "defect":
        f.layers = norms(model)
    if role == "clean":
        absorb_bias(model, f.loader[0])
    if role == "near-miss" and case.odd:
        with_norms(model, groups_of_four)
    elif role == "near-miss":
        for block in model.blocks:
            block.bn = Between(block.bn)
        f.model = case.recalibrated(model)
    return f


@fixture("NRM402")
def nrm402(role, case):
    model = case.model()
    width = 32 if case.kind == "mlp" else 16
    groups = (width // 2 if case.odd else width) if role == "defect" else 1 if role == "clean" else width // 16
    model.neck = nn.GroupNorm(groups, width)
    return Fixture(model, case.batches(), layers=("neck",) if role == "defect" else ())


class Positions(nn.Module):
    """A linear layer at every position, and BatchNorm over positions or over features."""

    def __init__(self, kind, across):
        super().__init__()
        self.kind, self.across = kind, across
        positions, features = {"mlp": (5, 4), "conv": (64, 3), "seq": (16, 6)}[kind]
        self.linear = nn.Linear(features, 8)
        self.bn = nn.BatchNorm1d(positions if across else 8)
        self.head = nn.Linear(positions * 8, 10)

    def forward(self, x):
        x = x.view(-1, 5, 4) if self.kind == "mlp" else x.flatten(2).transpose(1, 2)
        x = self.linear(x)
        x = self.bn(x) if self.across else self.bn(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(x).flatten(1))


@fixture("NRM403")
def nrm403(role, case):
    if role == "clean":
        return base(case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = Positions(case.kind, role == "defect")
    return Fixture(case.recalibrated(model).eval(), case.batches(), layers=("bn",) if role == "defect" else ())


@fixture("NRM404")
def nrm404(role, case):
    f = base(case)
    if role == "clean":
        return f
    name = case.middle(f.model)
    bn = f.model.get_submodule(name)
    part = bn.num_features // 4
    with torch.no_grad():
        if role == "defect":
            bn.bias[:part], f.layers = -50.0, (name,)
        else:
            bn.weight[:part], bn.bias[:part] = 0.0, 1.0
    f.model = case.recalibrated(f.model)
    return f


@fixture("NRM405")
def nrm405(role, case):
    f = base(case)
    name = case.middle(f.model)
    if role == "defect":
        f.model.get_submodule(name).running_var[3] = 1e-9
        f.layers = (name,)
    if role == "near-miss":
        op = f.model.blocks[0].op  # its fourth channel is constant, in training and now
        with torch.no_grad():
            op.weight[3] = 0.0
        f.model = case.recalibrated(f.model)
    return f


class Dropped(Net):
    """Dropout between the first block and the others."""

    def __init__(self, kind, p=0.5):
        super().__init__(kind)
        self.early = nn.Dropout(p)

    def features(self, x):
        y = self.blocks[1:](self.early(self.blocks[0](x)))
        return y.flatten(2).mean(2) if y.dim() > 2 else y


def as_trained(case, model):
    """Running statistics as training makes them, dropout on."""
    bns = [model.get_submodule(name) for name in norms(model)]
    for bn in bns:
        bn.reset_running_stats()
        bn.momentum = None
    model.train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(case.seed)
        for x, _ in case.batches(count=60, stream=60):
            model(x)
    for bn in bns:
        bn.momentum = 0.1
    return model.eval()


@fixture("NRM406")
def nrm406(role, case):
    if role == "clean":
        return base(case, at="I")
    model = as_trained(case, case.model(cls=Dropped, p=0.5 if role == "defect" else 0.05))
    return Fixture(model, case.batches(), at="I", layers=("blocks.1.bn",) if role == "defect" else ())


@fixture("NRM407")
def nrm407(role, case):
    model = case.model(neck=role == "near-miss")
    if role == "defect":
        model.head = nn.Sequential(model.head, nn.BatchNorm1d(10))
    return Fixture(case.recalibrated(model), case.batches(), at="I", layers=("head.1",) if role == "defect" else ())


@fixture("NRM411")
def nrm411(role, case):
    model = case.model()
    name = case.middle(model)
    if role != "clean":
        bn = model.get_submodule(name)
        again = type(bn)(bn.num_features)
        replace(model, name, nn.Sequential(bn, again) if role == "defect" else nn.Sequential(bn, nn.ReLU(), again))
    return Fixture(case.recalibrated(model), case.batches(), at="I", layers=(f"{name}.1",) if role == "defect" else ())


# --- 5xx: numbers -------------------------------------------------------------------------------------------------


class HandNorm(nn.Module):
    """Normalizes the features of a sample, as written down."""

    def __init__(self, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(()))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        return self.weight * centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()


def in_dtype(dtype):
    return lambda model, batch: model(batch[0].to(dtype))


@fixture("NRM501")
def nrm501(role, case):
    dtype = torch.bfloat16 if role == "near-miss" else torch.float16
    model = case.model()
    model.neck = HandNorm(1e-5 if role == "clean" else 1e-12)
    model.to(dtype)
    layers = ("neck",) if role == "defect" else ()
    return Fixture(model, case.batches(), {"forward": in_dtype(dtype)}, layers)


def small_inputs(model, block, factor):
    """The input of one normalizer in another scale, and its statistics with it."""
    with torch.no_grad():
        for p in block.op.parameters():
            p.mul_(factor)
        block.bn.running_mean.mul_(factor)
        block.bn.running_var.mul_(factor**2)
    return model


@fixture("NRM502")
def nrm502(role, case):
    f = base(case)
    if role == "defect":
        f.model = case.recalibrated(small_inputs(f.model, f.model.blocks[0], 1e-3))
        f.layers = ("blocks.0.bn",)
    if role == "near-miss":
        f.model = case.muted(4)
        bn = f.model.get_submodule(case.middle(f.model))
        bn.running_var[:4] = 1e-7
    return f


def under_autocast(dtype):
    def forward(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            return model(batch[0])

    return forward


@fixture("NRM503")
def nrm503(role, case):
    f = base(case)
    dtype = torch.bfloat16 if role == "near-miss" else torch.float16
    if role != "clean":
        f.model = small_inputs(f.model, f.model.blocks[0], 8e3)
    if role == "defect":
        f.layers = ("blocks.0.bn",)
    f.options["forward"] = under_autocast(dtype)
    return f


@fixture("NRM504")
def nrm504(role, case):
    model = with_biases(case.model())
    op, bn = model.blocks[0].op, model.blocks[0].bn
    far = {"defect": 5000.0, "clean": 0.0, "near-miss": 5.0}[role]
    with torch.no_grad():
        op.bias += far * bn.running_var.sqrt()
        bn.running_mean += far * bn.running_var.sqrt()
    return Fixture(model, case.batches(), layers=("blocks.0.bn",) if role == "defect" else ())


@fixture("NRM505")
def nrm505(role, case):
    f = base(case, at="I")
    factor = {"defect": 1e4, "clean": 1.0, "near-miss": 20.0}[role]
    op, bn = f.model.blocks[0].op, f.model.blocks[0].bn
    with torch.no_grad():
        for p in op.parameters():
            p[0] *= factor
        bn.running_mean[0] *= factor
        bn.running_var[0] *= factor**2
    f.layers = ("blocks.0.bn",) if role == "defect" else ()
    return f


@fixture("NRM506")
def nrm506(role, case):
    f = base(case, at="E")
    f.model.train()
    if role == "clean":
        return f
    dtype = torch.float16 if case.odd else torch.bfloat16
    f.model.to(dtype)
    f.options["forward"] = in_dtype(dtype)
    if role == "near-miss":
        ns.freeze(f.model)
    else:
        f.layers = norms(f.model)
    return f


# --- 606 and 7xx: porting -----------------------------------------------------------------------------------------


@fixture("NRM606")
def nrm606(role, case):
    f = base(case, at="E")
    f.options["reference"] = case.model()
    if role == "clean":
        return f
    if role == "defect":
        f.layers = norms(f.model)
    if role == "defect" and case.odd:
        keep = {name: f.model.get_submodule(name) for name in norms(f.model)}
        with_norms(f.model, one_group)
        for name, bn in keep.items():
            f.model.get_submodule(name).load_state_dict({"weight": bn.weight, "bias": bn.bias})
        return f
    for name in norms(f.model):
        bn = f.model.get_submodule(name)
        if role == "defect":
            bn.eps = 0.1
        else:
            bn.momentum = 0.01
    return f


def folded(model, right=True):
    """Normalizers folded into what is before them, or nearly so."""
    for block in model.blocks:
        fuse = fusion.fuse_linear_bn_eval if isinstance(block.op, nn.Linear) else fusion.fuse_conv_bn_eval
        if block.residual:
            continue
        made = fuse(block.op, block.bn)
        if not right:  # the old bias is added as it is
            scale = block.bn.weight * (block.bn.running_var + block.bn.eps).rsqrt()
            with torch.no_grad():
                made.bias += block.op.bias * (1 - scale)
        block.op, block.bn = made, nn.Identity()
    return model


@fixture("NRM701")
def nrm701(role, case):
    reference = with_biases(case.model())
    model = copy.deepcopy(reference)
    gone = tuple(f"blocks.{k}.bn" for k, block in enumerate(model.blocks) if not block.residual)
    model = folded(model.double()).float() if role == "near-miss" else folded(model, right=role != "defect")
    f = Fixture(model.eval(), case.batches(), {"reference": reference}, at="E")
    f.layers = gone if role == "defect" else ()
    return f


@fixture("NRM703")
def nrm703(role, case):
    model = case.model()
    f = Fixture(model, case.batches(), at="E")
    if role == "clean":
        return f
    example = f.loader[0][0]
    model.train(role == "defect")
    model.drop.p = 0.0
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    f.model = torch.export.export(model, (example,), dynamic_shapes=shapes).module()
    return f


@fixture("NRM704")
def nrm704(role, case):
    f = base(case)
    reference = case.model()
    eps = {"defect": 0.1, "clean": 1e-5, "near-miss": 1e-6}[role]
    for name in norms(reference):
        reference.get_submodule(name).eps = eps
    f.options["reference"] = reference
    f.layers = norms(f.model) if role == "defect" else ()
    return f


@fixture("NRM705")
def nrm705(role, case):
    f = base(case)
    f.options["intent"] = ("per-tensor-quantization",)
    if role == "clean":
        return f
    bn = f.model.blocks[0].bn
    with torch.no_grad():
        middle = float(bn.weight.abs().median())
        bn.weight[3] = middle * (500 if role == "defect" else 3)
    f.model = case.recalibrated(f.model)
    f.layers = ("blocks.0.bn",) if role == "defect" else ()
    return f


# --- 8xx and 9xx --------------------------------------------------------------------------------------------------


@fixture("NRM802")
def nrm802(role, case):
    case = spatial(case)
    model = case.model().train()
    long = {"conv": (64, 64), "seq": (1024,)}[case.kind]
    shape = (64, SHAPES[case.kind][0], *long) if role == "defect" else (4, *SHAPES[case.kind])
    generator = torch.Generator().manual_seed(case.seed)
    f = Fixture(model, [torch.randn(shape, generator=generator) for _ in range(3)], at="I")
    if role == "near-miss":
        ns.freeze(model)
    f.options["select"] = ("NRM8",)
    f.layers = norms(model) if role == "defect" else ()
    return f


class MyBatchNorm1d(nn.BatchNorm1d):
    """A subclass."""


class MyBatchNorm2d(nn.BatchNorm2d):
    """A subclass."""


@fixture("NRM900")
def nrm900(role, case):
    f = base(case, at="I")
    name = case.middle(f.model)
    bn = f.model.get_submodule(name)
    if role == "defect":
        replace(f.model, name, FrozenNorm(bn))
        f.layers = (name,)
    if role == "near-miss":
        bn.__class__ = MyBatchNorm2d if case.kind == "conv" else MyBatchNorm1d
    return f


@fixture("NRM905")
def nrm905(role, case):
    f = base(case, at="I")
    if role == "defect":
        name = case.middle(f.model)
        replace(f.model, name.removesuffix(".bn"), Direct(f.model.get_submodule(name.removesuffix(".bn"))))
        f.layers = (name,)
    if role == "near-miss":
        f.model = torch.compile(f.model, backend="eager")
    return f


class Direct(nn.Module):
    """Calls a method in place of the module."""

    def __init__(self, block):
        super().__init__()
        self.op, self.bn, self.residual = block.op, block.bn, block.residual

    def forward(self, x):
        y = self.op(x)
        return torch.relu(self.bn.forward(x + y if self.residual else y))
