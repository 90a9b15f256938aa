"""Surgery: what is found, replaced, proven and undone, bit for bit, whatever is thrown at it."""

import builtins
import collections
import copy
import io
import itertools
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_states import FrozenBatchNorm2d
from torch import fx, nn
from torch._dynamo import eval_frame

import normscope as ns
from normscope import surgery
from normscope.surgery import (
    Proof,
    Snapshot,
    absorb_bias,
    copy_buffers,
    exchange,
    find,
    fold,
    freeze,
    is_frozen,
    keep_float32,
    operate,
    recalibrate,
    set_eps,
    set_momentum,
    state_hash,
    trace,
    unfreeze,
)
from normscope.surgery.convert import replay
from normscope.surgery.fold import refold


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class MyBatchNorm(nn.BatchNorm2d):
    """What users do: a subclass with an attribute, a child and a parameter of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.tag, self.drop = "mine", nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.drop(super().forward(x)) * self.gain


class Net(nn.Module):
    """Shared, subclassed, frozen by hand, in a list, with hooks, gradients, buffers of all sorts and a generator."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mine, self.group = MyBatchNorm(4), nn.GroupNorm(2, 4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), self.norm, nn.ReLU(), nn.Dropout(0.3))
        self.aside = [self.norm, {"deep": nn.InstanceNorm2d(4, track_running_stats=True)}]
        self.embedding = nn.Embedding(5, 4, sparse=True)
        self.register_buffer("nan", torch.tensor([float("nan"), -0.0]))
        self.register_buffer("view", self.nan[1:], persistent=False)
        self.cache, self.generator, self.limit = torch.rand(3), torch.Generator(), float("nan")
        self.names, self.queue = {"a"}, collections.deque([torch.ones(2)], maxlen=3)

    def forward(self, x):
        y = self.mine(self.norm(self.conv(x)))
        y = self.group(self.block(y) + self.embedding.weight.sum(0)[:, None, None])
        return y.mean((2, 3)), {"aux": y.amax()}


X = torch.randn(4, 3, 6, 6)


def net():
    model = Net()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    outputs, _ = model(X)
    (outputs * torch.randn_like(outputs)).sum().backward()
    model.embedding.weight.grad = torch.sparse_coo_tensor([[1, 3]], torch.randn(2, 4), (5, 4), check_invariants=True)
    model.conv.weight.requires_grad_(False)
    model.mine.eval()
    for register in (model.norm.register_forward_hook, model.norm.register_full_backward_hook):
        register(noop)
    return model


def noop(*_):
    return None


def photograph(model):
    """Another account of a model's bits than that of the package: what every object is and what its bytes are."""

    def bits(t):
        if t.layout == torch.sparse_coo:
            return bits(t._indices()), bits(t._values())
        raw = io.BytesIO()
        torch.save(t.detach().clone(), raw)
        return str(t.dtype), tuple(t.shape), t.stride(), bytes(t.detach().clone().untyped_storage())

    shot = []
    for name, module in model.named_modules(remove_duplicate=False):
        shot.append((name, id(module), type(module), module.training, list(vars(module))))
        for registry in ("_parameters", "_buffers"):
            for key, t in getattr(module, registry).items():
                grad = None if t is None or t.grad is None else (id(t.grad), bits(t.grad))
                shot.append((key, id(t), None if t is None else (bits(t), t.requires_grad, t.data_ptr()), grad))
        for key, value in vars(module).items():
            if "hooks" in key:
                shot.append((key, [(k, id(hook)) for k, hook in value.items()] if isinstance(value, dict) else value))
            elif isinstance(value, (int, float, str, bool)):
                shot.append((key, repr(value)))
            elif isinstance(value, torch.Tensor):
                shot.append((key, id(value), bits(value)))
    return shot


# --- find ---------------------------------------------------------------------------------------------------------


def test_finds_every_normalizer_once_with_all_its_names():
    found = {f.name: (f.kind, f.paths, f.running) for f in find(net())}
    assert found == {
        "norm": ("BatchNorm", ("norm", "block.1"), True),
        "mine": ("BatchNorm", ("mine",), True),
        "group": ("GroupNorm", ("group",), False),
    }


def test_finds_every_family_and_says_what_it_does_not_know():
    class FancyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    class PreNorm(nn.Module):  # a wrapper, no normalizer
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

    class Standardize(nn.Module):  # no telling name, but running statistics
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

    class LayerNorm2d(nn.LayerNorm):
        pass

    model = nn.Sequential(
        nn.BatchNorm3d(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(3), LayerNorm2d(3),
        nn.RMSNorm(3),
        nn.LocalResponseNorm(3), ns.nn.Norm("... [c]", 3), ns.nn.GroupNorm(1, 3), FancyNorm(), PreNorm(), Standardize(),
        nn.Identity(),
    )  # fmt: skip
    assert [(f.name, f.kind) for f in find(model)] == [
        ("0", "BatchNorm"), ("1", "BatchNorm"), ("2", "BatchNorm"), ("3", "InstanceNorm"), ("4", "LayerNorm"),
        ("5", "RMSNorm"), ("6", "LocalResponseNorm"), ("7", "Norm"), ("8", "GroupNorm"), ("9", "custom"),
        ("10.norm", "LayerNorm"), ("11", "custom"),
    ]  # fmt: skip
    root = nn.LayerNorm(3)
    assert find(root)[0].paths == ("",)


def test_a_module_inside_itself_ends_the_walk():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].parent = model
    assert find(model)[0].paths == ("0",)
    with Snapshot(model):
        state_hash(model)


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("block", ["norm"]),
        ("mine", ["mine"]),
        (["norm", "gr*"], ["norm", "group"]),
        ("", ["norm", "mine", "group"]),
        (lambda name, module: isinstance(module, nn.GroupNorm), ["group"]),
    ],
)
def test_select(select, names):
    assert [f.name for f in find(net(), select)] == names


def test_select_of_nothing_is_an_error_that_lists_what_there_is():
    with pytest.raises(ns.ArgumentError, match="normalizers: norm, mine, group"):
        find(net(), "layer1")


def test_trace_gives_the_order_of_calls_and_restores():
    model = net()
    before = state_hash(model, rng=True)
    calls = trace(model, (X, "label"))
    assert [(c.name, c.index, c.shape) for c in calls] == [
        ("norm", 0, (4, 4, 4, 4)), ("mine", 0, (4, 4, 4, 4)), ("norm", 1, (4, 4, 4, 4)), ("group", 0, (4, 4, 4, 4)),
    ]  # fmt: skip
    assert state_hash(model, rng=True) == before


def test_trace_sees_into_compiled_code():
    compiled = torch.compile(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval(), backend="eager")
    with torch.no_grad():
        compiled(X)
    assert [call.name for call in trace(compiled, X)] == ["_orig_mod.0"]


# --- snapshot and hash --------------------------------------------------------------------------------------------

MUTATIONS = {
    "one bit of a parameter": lambda m: m.conv.weight.data.view(torch.int32).view(-1)[5].bitwise_xor_(1),
    "a payload of NaN": lambda m: m.nan.view(torch.int32)[0].bitwise_xor_(1),
    "the sign of zero": lambda m: m.nan[1].neg_(),
    "a buffer replaced": lambda m: setattr(m, "nan", m.nan.clone()),
    "a parameter replaced": lambda m: setattr(m.conv, "bias", nn.Parameter(m.conv.bias.detach().clone())),
    "data swapped": lambda m: setattr(m.conv.bias, "data", m.conv.bias.data + 1),
    "half precision": lambda m: m.half(),
    "float64": lambda m: m.double(),
    "another memory format": lambda m: m.to(memory_format=torch.channels_last),
    "storage resized": lambda m: m.cache.untyped_storage().resize_(4),
    "requires_grad": lambda m: m.conv.weight.requires_grad_(True),
    "a gradient in place": lambda m: m.block[0].weight.grad.mul_(2),
    "a sparse gradient in place": lambda m: m.embedding.weight.grad._values().mul_(2),
    "gradients gone": lambda m: m.zero_grad(set_to_none=True),
    "gradients zero": lambda m: m.zero_grad(set_to_none=False),
    "a gradient new": lambda m: setattr(m.conv.weight, "grad", torch.ones_like(m.conv.weight)),
    "a step of an optimizer": lambda m: torch.optim.SGD([*m.conv.parameters()], lr=0.1, momentum=0.9).step(),
    "training": lambda m: m.train(),
    "evaluation": lambda m: m.eval(),
    "momentum": lambda m: setattr(m.norm, "momentum", 0.2),
    "an attribute's type": lambda m: setattr(m.norm, "momentum", None),
    "an attribute new": lambda m: setattr(m, "flag", 1),
    "an attribute gone": lambda m: delattr(m.mine, "tag"),
    "attributes reordered": lambda m: vars(m.mine).update(eps=vars(m.mine).pop("eps")),
    "a hook new": lambda m: m.conv.register_forward_pre_hook(noop),
    "hooks gone": lambda m: m.norm._forward_hooks.clear(),
    "a state-dict hook": lambda m: m.register_state_dict_post_hook(noop),
    "a hook of a tensor": lambda m: m.conv.bias.register_hook(noop),
    "a tensor's attribute": lambda m: setattr(m.conv.bias, "no_decay", True),
    "a class": lambda m: setattr(m.norm, "__class__", MyBatchNorm),
    "a module replaced": lambda m: setattr(m.block, "2", nn.ReLU()),
    "a module new": lambda m: m.add_module("new", nn.ReLU()),
    "a module gone": lambda m: delattr(m, "group"),
    "modules reordered": lambda m: m._modules.update(conv=m._modules.pop("conv")),
    "a list": lambda m: m.aside.append(1),
    "a module in a list": lambda m: m.aside[1]["deep"].running_mean.add_(1),
    "a set": lambda m: m.names.add("b"),
    "a deque": lambda m: m.queue.append(torch.zeros(1)),
    "a tensor in a deque": lambda m: m.queue[0].add_(1),
    "a tensor that is no buffer": lambda m: m.cache.add_(1),
    "a generator": lambda m: torch.rand(1, generator=m.generator),
    "persistence": lambda m: m._non_persistent_buffers_set.clear(),
    "a forward in training": lambda m: m.train()(X),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.conv),
    "an override": lambda m: setattr(m.conv, "forward", noop),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_any_change_is_seen_and_taken_back(name):
    model = net()
    before, shot = state_hash(model), photograph(model)
    snapshot = Snapshot(model)
    assert snapshot.changed() == ()
    MUTATIONS[name](model)
    assert state_hash(model) != before
    assert snapshot.changed()
    snapshot.restore()
    assert snapshot.changed() == ()
    assert state_hash(model) == before
    assert photograph(model) == shot


def test_reading_a_model_changes_no_hash():
    model = net()
    before = state_hash(model, rng=True)
    for _ in range(2):
        model.state_dict(), list(model.named_modules()), repr(model), copy.deepcopy(model), pickle.dumps(model.norm)
        assert state_hash(model, rng=True) == before
    torch.rand(1)
    assert state_hash(model) == state_hash(model)
    assert state_hash(model, rng=True) != before


def test_handles_stay_valid_and_views_stay_views():
    model = net()
    handle = model.group.register_forward_hook(noop)
    with Snapshot(model):
        model.double()
        model.group._forward_hooks.clear()
        model.nan.fill_(1)
    handle.remove()
    assert not model.group._forward_hooks
    assert model.view.data_ptr() == model.nan.data_ptr() + 4
    model.norm.weight.data.fill_(2)
    assert model.block[1].weight[0] == 2


def test_lazy_modules_become_lazy_again():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    before = state_hash(model)
    with Snapshot(model):
        model(X)
        assert type(model[0]) is nn.Conv2d
    assert state_hash(model) == before
    assert model(X).shape == (4, 4, 4, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_models_are_restored_too():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    before = state_hash(model)
    with Snapshot(model):
        model(torch.randn(4, 3))
        model.eval()
        assert state_hash(model) != before
    assert state_hash(model) == before


def test_meta_models_can_be_kept():
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    before = state_hash(model)
    with Snapshot(model):
        model.eval()
    assert state_hash(model) == before


@pytest.mark.skipif(os.name == "nt", reason="os.kill is no Ctrl-C there")
def test_ctrl_c_waits_for_the_restoration():
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with surgery.state.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            finished = True
        raise AssertionError("the interrupt was lost")
    assert finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- freeze -------------------------------------------------------------------------------------------------------


def stack():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), MyBatchNorm(4), ns.nn.BatchNorm2d(4, activation="relu"),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), ns.nn.Norm("[n] c [h w]", 4, running=True),
        nn.GroupNorm(2, 4), nn.Flatten(2), nn.BatchNorm1d(4), nn.Unflatten(2, (4, 2, 2)), nn.BatchNorm3d(4),
    )  # fmt: skip


@pytest.mark.parametrize("affine", [False, True])
def test_frozen_survives_training_and_is_taken_back_exactly(affine):
    model = stack().train()
    model[1].weight.requires_grad_(False)
    before, keys, statistics = state_hash(model), list(model.state_dict()), [b.clone() for b in model.buffers()]
    report = freeze(model, affine=affine)
    assert report.changed == ("1", "2", "3", "4", "5", "8", "10")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        output = model(X)
        (output * torch.randn_like(output)).sum().backward()
    assert all(map(torch.equal, model.buffers(), statistics))
    assert list(model.state_dict()) == keys
    assert [isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model] == [
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in stack()
    ]
    assert model[8].weight.requires_grad != affine
    assert model[2].drop.training
    assert "frozen" in repr(model[1])
    assert optimizer.param_groups[0]["params"][2] is model[1].weight
    model.zero_grad()
    torch.testing.assert_close(model.eval()(X), model(X))
    assert unfreeze(model.train()).changed == report.changed
    assert state_hash(model) == before


def test_timm_freezes_two_axes_only_and_drops_hooks_and_parameters():
    theirs_freeze = pytest.importorskip("timm.utils.model").freeze
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(2), nn.BatchNorm1d(3))
    model[1].register_forward_hook(lambda *_: None)
    theirs, x = copy.deepcopy(model), torch.randn(4, 3, 2, 2)
    theirs_freeze(theirs)
    assert not theirs[1]._forward_hooks
    assert not isinstance(theirs[1].weight, nn.Parameter)
    theirs.train()(x)
    assert theirs[3].num_batches_tracked == 1  # frozen, they say

    assert freeze(model, affine=True).changed == ("1", "3")
    model.train()(x)
    assert model[3].num_batches_tracked == model[1].num_batches_tracked == 0
    assert model[1]._forward_hooks
    assert isinstance(model[1].weight, nn.Parameter)


def test_frozen_computes_what_evaluation_computes():
    model = stack()
    model[2].drop.p = 0.0
    expected = copy.deepcopy(model).eval()(X)
    freeze(model)
    assert torch.equal(model.train()(X), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_unfreezing_follows_the_mode_last_asked_for(mode):
    model = nn.Sequential(nn.BatchNorm1d(2))
    freeze(model)
    model.train(mode)
    unfreeze(model)
    assert model[0].training == mode


def clones(model):
    yield "deepcopy", copy.deepcopy(model)
    yield "copy", copy.copy(model)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"pickle {protocol}", pickle.loads(pickle.dumps(model, protocol))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield "torch.save", torch.load(file, weights_only=False)


def test_frozen_survives_copying_and_pickling():
    model = freeze(stack(), affine=True).model
    keep_float32(model, select="1")
    for how, clone in clones(model):
        clone.train()
        assert type(clone[1]) is type(model[1]), how
        assert is_frozen(clone[8]), how
        assert not clone[8].training, how
        if how != "copy":  # which shares its children
            unfreeze(clone)
            assert type(clone[8]) is nn.BatchNorm1d, how
            assert clone[8].weight.requires_grad, how
            assert clone[8].training, how
            assert is_frozen(model[8]), how


def test_frozen_loads_and_saves_plain_checkpoints():
    model, plain = freeze(stack()).model, stack()
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(stack().state_dict())
    assert not torch.equal(model[0].weight, plain[0].weight)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_frozen_is_compiled_traced_scripted_and_exported():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ns.nn.BatchNorm2d(4, activation="relu"))
    freeze(model)
    model.train()
    expected = model(X)
    # Compiled and interpreted code may round differently.
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    graph.train()
    torch.testing.assert_close(graph(X), expected)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), expected)
    scripted = torch.jit.script(model[:2])
    torch.testing.assert_close(scripted(X), model[:2](X))


def test_freezing_a_compiled_model_is_noticed():
    model = nn.Sequential(nn.BatchNorm2d(3))
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    mean = model[0].running_mean.clone()
    freeze(compiled)
    compiled.train()
    compiled(X + 5)
    assert torch.equal(model[0].running_mean, mean)


def test_what_cannot_be_frozen_is_said():
    model = nn.Sequential(
        nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2), nn.InstanceNorm1d(2), nn.BatchNorm1d(2)
    )
    assert freeze(model).skipped == (("0", "keeps no running statistics"), ("2", "keeps no running statistics"))
    assert dict(freeze(model).skipped)["3"] == "already frozen"
    assert freeze(model, affine=True).changed == ("3",)
    assert unfreeze(model, select="1").skipped == (("1", "not frozen"),)
    unfreeze(model)
    assert model[3].weight.requires_grad


def test_undo_of_freeze_keeps_what_was_trained_and_added_since():
    model = stack()
    report = freeze(model, affine=True, select="1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(X)
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    handle = model[1].register_forward_hook(noop)
    model[1].note = "added"
    weight = model[0].weight.detach().clone()
    report.undo()
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].weight.requires_grad
    assert torch.equal(model[0].weight, weight)
    assert model[1].note == "added"
    assert not hasattr(model[1], "_thawed")
    assert len(model[1]._forward_hooks) == 1
    handle.remove()
    assert not model[1]._forward_hooks


# --- replace and prove --------------------------------------------------------------------------------------------


def ours(found):
    old = found.module
    if found.kind != "BatchNorm":
        return None
    return ns.nn.BatchNorm2d(old.num_features, old.eps, old.momentum) if type(old) is nn.BatchNorm2d else "a subclass"


def convert(model, **options):
    return exchange("convert", model, ours, **options)


def test_replacing_loses_nothing_and_undo_brings_back_every_bit():
    model, seen = net(), []
    old = model.norm
    handle = old.register_forward_hook(lambda module, *_: seen.append(module))
    old.register_load_state_dict_pre_hook(noop)
    old.color, old.weight.no_decay = "red", True
    old.eval()
    keys, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)
    report = convert(model, proof=Proof(X))
    new = model.norm
    assert type(new) is ns.nn.BatchNorm2d
    assert model.block[1] is new
    assert model.aside[0] is new
    assert new.weight is old.weight
    assert new.running_mean is old.running_mean
    assert new.color == "red"
    assert not new.training
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
    assert report.changed == ("norm",)
    assert report.skipped == (("mine", "a subclass"),)
    assert "same output in evaluation and training mode" in report.notes[0]
    seen.clear()
    model(X)
    assert seen == [new, new]
    assert next(iter(new._load_state_dict_pre_hooks.values())).hook is noop
    model.load_state_dict(model.state_dict())
    report.undo()
    assert model.norm is old
    handle.remove()
    assert len(old._forward_hooks) == 1


def test_undo_of_a_replacement_is_bit_identical():
    model = net()
    model.norm.register_load_state_dict_pre_hook(noop)
    model.norm._load_state_dict_pre_hooks[0] = nn.modules.module._WrappedHook(noop, model.norm)
    before, shot = state_hash(model, rng=True), photograph(model)
    report = convert(model, proof=Proof(X))
    assert next(iter(model.norm._load_state_dict_pre_hooks.values())).module() is model.norm
    assert state_hash(model, rng=True) != before
    report.undo()
    assert state_hash(model, rng=True) == before
    assert photograph(model) == shot


def test_the_root_itself_can_be_replaced():
    root = nn.BatchNorm2d(4)
    report = convert(root)
    assert type(report.model) is ns.nn.BatchNorm2d
    assert report.model.weight is root.weight
    assert report.undo() is root
    assert convert(root, copy=True).model.weight is not root.weight


def test_a_frozen_module_stays_frozen_when_replaced():
    model = nn.Sequential(nn.BatchNorm2d(4))
    freeze(model)
    exchange("convert", model, lambda found: ns.nn.BatchNorm2d(4))
    assert is_frozen(model[0])
    assert not model.train()[0].training
    assert isinstance(model[0], ns.nn.BatchNorm2d)
    unfreeze(model)
    assert type(model[0]) is ns.nn.BatchNorm2d


def test_new_parameters_take_device_and_dtype_and_old_ones_can_be_left_out():
    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    report = exchange(
        "convert", model, lambda found: nn.GroupNorm(2, 4),
        without=("running_mean", "running_var", "num_batches_tracked"),
    )  # fmt: skip
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert model[0].weight.dtype == torch.float64
    assert report.model(X[:, :1].expand(4, 4, 6, 6).double()).shape == (4, 4, 6, 6)


def test_parameters_of_the_new_module_alone_take_the_old_dtype():
    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    exchange("convert", model, lambda found: MyBatchNorm(4))
    assert model[0].gain.dtype == torch.float64


def test_modules_that_cannot_be_replaced_are_named():
    overridden, lazy, parametrized = nn.BatchNorm2d(4), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4)
    overridden.forward = noop
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(overridden, lazy, parametrized)
    report = exchange("convert", model, lambda found: nn.Identity())
    assert [reason.split(":")[0] for _, reason in report.skipped] == [
        "its forward has been overridden on the instance",
        "lazy and not yet initialized",
        "its parameters are parametrized",
    ]
    assert report.changed == ()


def wrong_eps(found):
    return ns.nn.BatchNorm2d(4, eps=0.1)


@pytest.mark.parametrize("double", [False, True])
def test_a_change_of_the_function_is_refused_and_undone(double):
    model = net()
    before, shot = state_hash(model, rng=True), photograph(model)
    with pytest.raises(ns.NormscopeError, match="would change what the model computes in evaluation mode") as caught:
        exchange("convert", model, wrong_eps, select="norm", proof=Proof((X, 0), double=double))
    assert "times the tolerance" in str(caught.value)
    assert state_hash(model, rng=True) == before
    assert photograph(model) == shot


def test_a_change_in_training_alone_is_refused():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))

    def edit(draft):
        draft.model[0].p = 0.2

    with pytest.raises(ns.NormscopeError, match="in training mode: output 0 differs by"):
        operate("edit", model, edit, proof=Proof(X))
    assert model[0].p == 0.5
    # Random numbers drawn by the edit do not matter.
    operate("edit", model, lambda draft: torch.rand(3), proof=Proof(X))
    # A batch that training cannot normalize proves evaluation alone.
    single = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108))
    report = operate("edit", single, lambda draft: None, proof=Proof(X[:1]))
    assert report.notes[0].startswith("same output in evaluation mode (")


@pytest.mark.parametrize(
    ("forward", "error", "sentence"),
    [
        (lambda m, x: "text", ns.ArgumentError, "returns no tensor but str"),
        (lambda m, x: m(x[:, :2]), RuntimeError, "expected input"),
    ],
)
def test_a_proof_that_cannot_be_made_is_an_error(forward, error, sentence):
    model = net()
    before = state_hash(model)
    with pytest.raises(error, match=sentence):
        convert(model, proof=Proof(X, forward))
    assert state_hash(model) == before


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.001], "differs by"),
        ([1.0, float("nan")], [1.0, float("nan")], None),
        ([1.0, float("nan")], [1.0, 2.0], "differs by inf"),
        ([1.0, float("inf")], [1.0, float("inf")], None),
        ([1.0, float("inf")], [1.0, -float("inf")], "differs by inf"),
        ([0.0, 0.0], [0.0, 1e-3], "differs by"),
        ([0.0, 0.0], [0.0, 0.0, 0.0], "it was \\(2,\\)"),
        ([1, 2], [1, 3], "output 0 differs"),
    ],
)
def test_what_counts_as_the_same(before, after, problem):
    outputs = iter([before] * 2 + [after] * 2)
    call = lambda model, example: torch.tensor(next(outputs))  # noqa: E731
    if problem is None:
        operate("edit", nn.Identity(), lambda draft: None, proof=Proof(None, call))
    else:
        with pytest.raises(ns.NormscopeError, match=problem):
            operate("edit", nn.Identity(), lambda draft: None, proof=Proof(None, call))


# --- small edits --------------------------------------------------------------------------------------------------


def test_set_momentum_and_eps():
    model = net()
    before = state_hash(model)
    momentum = set_momentum(model, None, select=["norm", "mine"])
    eps = set_eps(model, 1e-3)
    assert momentum.changed == ("norm", "mine")
    assert eps.changed == ("norm", "mine", "group")
    assert (model.norm.momentum, model.group.eps) == (None, 1e-3)
    eps.undo()
    momentum.undo()
    assert state_hash(model) == before
    for call in (lambda: set_momentum(model, 1.1), lambda: set_eps(model, 0.0), lambda: set_eps(model, float("nan"))):
        with pytest.raises(ns.ArgumentError, match="must"):
            call()


@pytest.mark.parametrize("wrap", [lambda m: m, torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_copy_buffers_finds_them_under_other_names(wrap):
    trained, average = net(), Net()
    average.load_state_dict({k: v for k, v in trained.state_dict().items() if "running" not in k}, strict=False)
    wrapped = wrap(average)
    inner = getattr(wrapped, "module", wrapped)
    weight, buffer = inner.norm.weight, inner.norm.running_mean
    report = copy_buffers(wrapped, trained)
    assert torch.equal(inner.norm.running_mean, trained.norm.running_mean)
    assert inner.norm.running_mean is buffer
    assert inner.norm.running_mean is not trained.norm.running_mean
    assert inner.norm.weight is weight
    assert len(report.changed) == 2
    other = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    source = nn.Sequential(nn.BatchNorm1d(4))
    assert [reason for _, reason in copy_buffers(other, source).skipped] == [
        "running_mean is (4,) there, (3,) here",
        "the source has no module of this name",
    ]


NORMS = {
    "batch": lambda: nn.BatchNorm2d(3),
    "our batch": lambda: ns.nn.BatchNorm2d(3, activation="relu"),
    "layer": lambda: nn.LayerNorm(6),
    "group": lambda: nn.GroupNorm(1, 3),
    "instance": lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_keep_float32(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), NORMS[name](), nn.Conv2d(3, 2, 1))
    model[1].weight.data.copy_(torch.rand_like(model[1].weight) + 1e-4)
    exact, weight = copy.deepcopy(model[1]), model[1].weight
    report = keep_float32(model)
    model.to(dtype)
    assert {t.dtype for t in model[1].parameters()} == {torch.float32}
    assert model[1].weight is weight
    assert torch.equal(model[1].weight, exact.weight)
    assert model[2].weight.dtype == dtype
    x = X.to(dtype)
    output = model[1](x)
    assert output.dtype == dtype
    assert torch.equal(output, exact(x.float()).to(dtype))
    assert torch.equal(model[1](x.float()), exact(x.float()))
    (output.float() * torch.randn(output.shape)).sum().backward()
    assert weight.grad.dtype == torch.float32
    model.double()
    assert model[1].weight.dtype == torch.float64
    model.float().zero_grad()
    report.undo()
    assert type(model[1]) is type(exact)


def test_keep_float32_after_the_conversion_and_its_undo():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    model[1].weight.grad = torch.ones(3, dtype=torch.bfloat16)
    before, shot = state_hash(model), photograph(model)
    report = keep_float32(model)
    assert {t.dtype for t in (*model[1].parameters(), model[1].weight.grad, model[1].running_mean)} == {torch.float32}
    assert keep_float32(model).skipped == (("1", "in float32 already"),)
    assert model(torch.randn(4, 3).bfloat16()).dtype == torch.bfloat16
    model[1].running_mean.zero_(), model[1].running_var.fill_(1), model[1].num_batches_tracked.zero_()
    report.undo()
    assert state_hash(model) == before
    assert photograph(model) == shot


def test_keep_float32_is_one_node_for_fx_and_compiles():
    model = nn.Sequential(nn.BatchNorm2d(3), ns.nn.BatchNorm2d(3), MyBatchNorm(3)).eval()
    keep_float32(model)
    model.bfloat16()
    x = X.bfloat16()
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert torch.equal(graph(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def biased():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), ns.nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4), nn.Flatten(),
        nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 5), nn.LayerNorm(5),
    )  # fmt: skip


@pytest.mark.parametrize("drop", [True, False])
def test_absorb_bias_keeps_the_function_in_both_modes(drop):
    model = biased()
    for p in model.parameters():
        p.data = torch.randn_like(p)
    model(X)
    other = copy.deepcopy(model)
    report = absorb_bias(model, [X], drop=drop)
    assert report.changed == ("0", "3", "7", "10")
    assert "same output" in report.notes[0]
    assert (model[0].bias is None) == drop
    assert model[12].bias is not None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), other.eval()(X), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.train()(X), other.train()(X), rtol=1e-3, atol=1e-4)
        # The running means went on together: evaluation agrees after a step, too.
        torch.testing.assert_close(model.eval()(X + 1), other.eval()(X + 1), rtol=1e-3, atol=1e-4)
    assert absorb_bias(model, X).changed == (() if drop else report.changed)


def test_absorb_bias_and_undo():
    model = biased()
    before, shot = state_hash(model, rng=True), photograph(model)
    report = absorb_bias(model, X)
    report.undo()
    assert state_hash(model, rng=True) == before
    assert photograph(model) == shot


class Branch(nn.Module):
    """The output of `conv` goes into the normalizer and somewhere else."""

    def __init__(self, use, norms=1):
        super().__init__()
        self.conv, self.norms, self.use = (
            nn.Conv2d(3, 3, 3),
            nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms)),
            use,
        )

    def forward(self, x):
        y = self.conv(x)
        assert y.shape[1] == y.size(1) == 3  # asking for the shape is no use
        outputs = [norm(y) for norm in self.norms]
        return outputs, self.use(y, outputs[0])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branch(lambda y, z: y + z), "its output is used elsewhere, too"),
        (Branch(lambda y, z: y), "its output is used elsewhere, too"),
        (Branch(lambda y, z: y.relu()), "its output is used elsewhere, too"),
        (Branch(lambda y, z: z, norms=2), "it feeds several normalizers"),
    ],
)
def test_absorb_bias_leaves_what_others_see(model, reason):
    report = absorb_bias(model, X)
    assert dict(report.skipped)["conv"] == reason
    assert report.changed == ()


def test_absorb_bias_leaves_shared_and_unlike_biases():
    tied = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    tied[2].bias = tied[0].bias
    assert absorb_bias(tied, torch.randn(4, 3)).skipped == (("0", "its bias is shared"),)
    last = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(7))  # (N, 7, 5): the bias runs along the last axis
    assert absorb_bias(last, torch.randn(4, 7, 3)).skipped == (("0", "its output is used elsewhere, too"),)
    hooked = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    hooked[0].register_forward_hook(noop)
    assert absorb_bias(hooked, torch.randn(4, 3)).changed == ()


def test_absorb_bias_that_proves_wrong_changes_nothing():
    def sly(y, z):  # a use that no function mode sees
        with torch._C.DisableTorchFunction():
            return y * 2

    model = Branch(sly)
    before = state_hash(model, rng=True)
    with pytest.raises(ns.NormscopeError, match="absorb_bias would change what the model computes"):
        absorb_bias(model, X)
    assert state_hash(model, rng=True) == before


# --- reports and faults -------------------------------------------------------------------------------------------


def test_a_report_is_a_short_table():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(20)), nn.BatchNorm1d(2, track_running_stats=False))
    report = freeze(model)
    lines = str(report).splitlines()
    assert lines[:3] == ["freeze: 20 changed, 1 skipped", "  changed  0", "           1"]
    assert lines[13] == "           … and 8 more"
    assert lines[-1] == "  skipped  20  keeps no running statistics"
    assert repr(report) == "Surgery('freeze', 20 changed, 1 skipped)"
    assert "(the model itself)" in str(freeze(nn.BatchNorm1d(2)))
    with pytest.raises(AttributeError):
        report.changed = ()


def scores(model, batch):
    return model(batch).mean((2, 3))


def rises():
    """A metric that every call improves."""
    count = itertools.count()
    return lambda output, batch: next(count)


ISINSTANCE = isinstance  # which a trace patches
SOURCE = Net()
KERAS = {"bn/gamma": [2.0] * 4, "bn/beta": [1.0] * 4, "bn/moving_mean": [3.0] * 4, "bn/moving_variance": [4.0] * 4}
EDITS = {
    "freeze": lambda m: freeze(m, affine=True),
    "unfreeze": unfreeze,
    "convert": lambda m: convert(m, proof=Proof(X)),
    "keep_float32": keep_float32,
    "set_momentum": lambda m: set_momentum(m, 0.3),
    "copy_buffers": lambda m: copy_buffers(m, SOURCE),
    "absorb_bias": lambda m: absorb_bias(m, X),
    "recalibrate": lambda m: recalibrate(m, [X, X], select=["norm", "mine"]),
    "ns.convert": lambda m: ns.convert(m, {"BatchNorm": "GroupNorm(2)"}, optimizer=torch.optim.SGD(m.parameters())),
    "ns.convert, calibrated": lambda m: ns.convert(m, {"1": "BatchRenorm"}, calibrate=[X]),
    "adapt": lambda m: ns.adapt(m, [X, X + 5], forward=scores, metric=rises()),
    "adapt, entropy": lambda m: ns.adapt(m, [X, X + 5], method="entropy", forward=scores, guard=False),
    "split_statistics": lambda m: ns.split_statistics(m, 2, optimizer=torch.optim.SGD(m.parameters())),
    "fold": lambda m: fold(m, X, bake=True, measure=True),
    "set_eps": lambda m: set_eps(m, 0.3),
    "accelerate": lambda m: ns.accelerate(m, X),
    "to_torch": ns.to_torch,
    "synchronize": ns.synchronize,
    "desynchronize": ns.desynchronize,
    "split_statistics, by call": lambda m: ns.split_statistics(m, example=X),
    "states.load": lambda m: ns.states.load(m, KERAS, "keras", {"bn": "1"}),
    "states.to_frozen": lambda m: ns.states.to_frozen(m, X),
    "states.to_batch_norm": lambda m: ns.states.to_batch_norm(m, X),
    "states.take_up": lambda m: ns.states.take_up(m, X),
    "refold": lambda m: refold(m, ["1", "mine"], {"bake": True, "new": ["0"]}),
    "replay": lambda m: replay(m, [("1", "GroupNorm(2)", [])], affine=True),
}
# What a model has had done to it before: without that there would be nothing to do.
FIRST = {
    "unfreeze": freeze,
    "to_torch": ns.accelerate,
    "desynchronize": ns.synchronize,
    "states.to_batch_norm": ns.states.to_frozen,
    "states.take_up": lambda m: setattr(m, "1", FrozenBatchNorm2d()),
}
LONG = ("fold", "accelerate", "states.take_up", "replay")  # and their passes alike


def small():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), MyBatchNorm(4), nn.Dropout(0.5))
    model.norm = model[1]
    model.mine = model[2]
    return model


def in_surgery(name):
    """Whether a file is in the rooms that edit models, restoration aside."""
    path = Path(name)
    return path.parent.name in ("surgery", "states") and path.name != "state.py"


def interrupted_at(line, action, watched=in_surgery):
    """Run an action with a KeyboardInterrupt at the n-th line of the watched files."""
    count = itertools.count()

    def local(frame, event, argument):
        if event == "line" and next(count) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return local

    def call(frame, event, argument):
        return local if watched(frame.f_code.co_filename) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("name", EDITS)
def test_an_interrupt_at_any_line_leaves_no_trace(name):
    model = small()
    FIRST.get(name, lambda m: None)(model)
    if name == "fold":
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(model[0]), model[1]).eval()
    before = state_hash(model, rng=True)
    line, step = 0, 1
    EDITS[name](copy.deepcopy(model))  # what is imported and made once has its interrupts elsewhere
    while interrupted_at(line, lambda: EDITS[name](model)):
        assert state_hash(model, rng=True) == before, f"line {line}"
        assert torch.is_grad_enabled(), f"line {line}"
        assert eval_frame._stance.stance == "default", f"line {line}"
        assert builtins.isinstance is ISINSTANCE, f"line {line}"
        assert "__getattribute__" not in vars(nn.Module), f"line {line}"
        line += step
        step = 1 if line < 60 else max(97 if name in LONG else 19, line // 12)
    assert line > 30
    assert state_hash(model) != before
