"""Weight normalizers, `bake`, and what regularizes weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torchs

import normscope as ns
from normscope import oracle
from normscope.optim import decay_groups, l1_penalty, l2_penalty, proximal_l1
from normscope.parametrizations import bake, weight_standardization
from normscope.surgery import state_hash

LAYERS = {
    "Linear": (lambda: nn.Linear(5, 3), (4, 5), 0),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6), 0),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 6), 0),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_standardization_is_the_papers(kind):
    make, shape, dim = LAYERS[kind]
    layer = make().double()
    original, x = copy.deepcopy(layer), torch.randn(shape, dtype=torch.float64)
    assert weight_standardization(layer, dim=dim) is layer
    W = original.weight.detach().numpy()
    rest = tuple(k for k in range(W.ndim) if k != dim)
    Ŵ = (W - W.mean(rest, keepdims=True)) / np.sqrt(W.var(rest, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer.weight.detach().numpy(), Ŵ, rtol=1e-12)
    layer(x).square().sum().backward()
    plain = copy.deepcopy(original)
    plain.weight.data.copy_(torch.from_numpy(Ŵ))
    plain(x).square().sum().backward()
    truth = oracle.backward(plain.weight.grad.numpy(), W, ("o [...]", "[i] o [...]")[dim], params="o").dx
    np.testing.assert_allclose(layer.parametrizations.weight.original.grad.numpy(), truth, rtol=1e-9, atol=1e-12)


def test_weight_standardization_refuses_what_would_vanish():
    with pytest.raises(ns.ArgumentError, match="one weight per channel"):
        weight_standardization(nn.Conv2d(4, 4, 1, groups=4))
    with pytest.raises(ns.ArgumentError, match="dim must be 0 or 1"):
        weight_standardization(nn.Conv2d(4, 4, 1), dim=2)


def test_torchs_are_re_exported():
    for name in ("weight_norm", "spectral_norm", "orthogonal"):
        assert getattr(ns.parametrizations, name) is getattr(torchs, name)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        weight_standardization(nn.Conv2d(3, 4, 3)), nn.GroupNorm(2, 4), torchs.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.Flatten(), torchs.spectral_norm(nn.Linear(64, 8)), torchs.orthogonal(nn.Linear(8, 8)),
        nn.utils.spectral_norm(nn.Linear(8, 5)),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_bake_keeps_the_function_of_evaluation(training):
    model = network().train(training)
    model[1].eval()
    first = model[0].parametrizations.weight.original
    first.requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(model).eval()(x)
    assert bake(model) is model
    assert [m.training for m in model] == [training, False, *[training] * 5]
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model[0].weight is first
    assert not first.requires_grad
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 8),
        nn.Linear(8, 5),
    )  # fmt: skip
    plain.load_state_dict(model.state_dict())
    for net in (model.eval(), plain.eval()):
        torch.testing.assert_close(net(x), expected)


def test_bake_of_a_plain_model_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = state_hash(model)
    bake(model)
    assert state_hash(model) == before


class LayerNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


def regularized():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), ns.nn.BatchNorm2d(4), nn.GroupNorm(2, 4), ns.nn.LayerNorm((4, 4, 4)), LayerNorm2d(),
        nn.LSTM(4, 4), nn.InstanceNorm2d(4, affine=True), nn.Embedding(3, 4), ns.nn.Norm("[n] c", 4),
    )  # fmt: skip
    model.add_module("again", nn.Conv2d(3, 4, 3))
    model.again.weight = model[0].weight
    return model


def test_decay_groups():
    model = regularized()
    decayed, spared = decay_groups(model, 0.05)
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert [names[p] for p in decayed["params"]] == ["0.weight", "5.weight_ih_l0", "5.weight_hh_l0", "7.weight"]
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    torch.optim.AdamW(decay_groups(model))
    with pytest.raises(ns.ArgumentError, match="weight_decay"):
        decay_groups(model, -1.0)


def test_penalties():
    model = regularized()
    weights = torch.cat([p.detach().double().flatten() for p in decay_groups(model)[0]["params"]])
    torch.testing.assert_close(l1_penalty(model).double(), weights.abs().sum())
    torch.testing.assert_close(l2_penalty(model).double(), weights.square().sum() / 2)
    l2_penalty(model).backward()
    assert model[1].weight.grad is None
    torch.testing.assert_close(model[0].weight.grad, model[0].weight)
    assert l1_penalty(nn.BatchNorm1d(3)) == 0


def test_l2_penalty_is_weight_decay():
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.load_state_dict(one.state_dict())
    groups, plain = torch.optim.SGD(decay_groups(one, 0.1), 0.5), torch.optim.SGD(other.parameters(), 0.5)
    x = torch.randn(4, 3)
    one(x).sum().backward()
    (other(x).sum() + 0.1 * l2_penalty(other)).backward()
    groups.step(), plain.step()
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_proximal_l1_gives_exact_zeros_and_the_minimum():
    """½‖w − a‖² + λ‖w‖₁ has the minimum sign(a) max(|a| − λ, 0)."""
    a, λ, rate = torch.tensor([[1.0, -0.3, 0.05, -2.0]]), 0.4, 0.5
    layer = nn.Linear(4, 1)
    bias = layer.bias.detach().clone()
    for _ in range(60):
        layer.weight.data -= rate * (layer.weight.data - a)
        proximal_l1(layer, rate * λ)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.6, 0.0, 0.0, -1.6]]))
    assert (layer.weight == 0).tolist() == [[False, True, True, False]]
    assert torch.equal(layer.bias, bias)
    with pytest.raises(ns.ArgumentError, match="threshold"):
        proximal_l1(layer, -1.0)


def test_bake_of_a_deep_copy_leaves_the_original():
    """torch keeps the property in a class that both have, and takes it away there."""
    layer = torchs.weight_norm(nn.Linear(3, 2))
    x = torch.randn(4, 3)
    expected = layer(x)
    assert torch.equal(bake(copy.deepcopy(layer))(x), expected)
    assert torch.equal(layer(x), expected)
