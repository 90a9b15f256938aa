"""Bad input: every mistake gets a typed error that names the shape and the cure, or a defined result."""

import pickle

import pytest
import torch
from torch.testing import assert_close

import normscope as ns

F = ns.functional
x4 = torch.zeros(2, 6, 4, 5)

MISTAKES = {
    "pattern with a comma": (lambda: ns.normalize(x4, "[n], c h w"), ns.NotationError, "is not an axis name"),
    "pattern of another rank": (
        lambda: ns.normalize(x4, "[n] c"),
        ns.ShapeError,
        "is for tensors of 2 axes, this one has 4",
    ),
    "no brackets": (lambda: ns.normalize(x4, "n c h w"), ns.NotationError, "no axis is averaged over"),
    "pattern that is no string": (lambda: ns.normalize(x4, ("n", "c")), ns.NotationError, "a scope is a pattern"),
    "missing group count": (
        lambda: ns.normalize(x4, "n (g [c]) [h w]"),
        ns.NotationError,
        "needs the sizes of all its factors",
    ),
    "group count that does not divide": (
        lambda: ns.normalize(x4, "n (g [c]) [h w]", g=4),
        ns.ShapeError,
        "does not fit (g [c]) with g=4",
    ),
    "group count of zero": (lambda: ns.normalize(x4, "n (g [c]) [h w]", g=0), ns.ArgumentError, "must be at least 1"),
    "group count that is no integer": (
        lambda: ns.normalize(x4, "n (g [c]) [h w]", g=2.0),
        ns.ArgumentError,
        "must be an integer",
    ),
    "misspelt option": (
        lambda: ns.normalize(x4, "[n] c [h w]", wieght=torch.ones(6)),
        ns.NotationError,
        "no axis 'wieght'",
    ),
    "one cell per set": (lambda: ns.normalize(torch.zeros(1, 3), "[n] c"), ns.DegenerateScopeError, "holds one cell"),
    "weight of another size": (
        lambda: ns.normalize(x4, "[n] c [h w]", weight=torch.ones(5)),
        ns.ShapeError,
        "weight of shape (5,) does not fit",
    ),
    "params that are no axis": (
        lambda: ns.normalize(x4, "[n] c [h w]", weight=torch.ones(6), params="d"),
        ns.NotationError,
        "params names 'd'",
    ),
    "unknown activation": (
        lambda: ns.normalize(x4, "[n] c [h w]", activation="swish"),
        ns.ArgumentError,
        "activation 'swish' is unknown",
    ),
    "negative eps": (
        lambda: ns.normalize(x4, "[n] c [h w]", eps=-1),
        ns.ArgumentError,
        "eps must be non-negative, but got -1",
    ),
    "integers": (lambda: ns.normalize(x4.long(), "[n] c [h w]"), ns.DtypeError, "not implemented for 'Long'"),
    "complex numbers": (
        lambda: ns.moments(x4 + 0j, "[n] c [h w]"),
        ns.DtypeError,
        "not implemented for 'ComplexFloat'",
    ),
    "mask of numbers": (
        lambda: ns.normalize(x4, "[n] c [h w]", mask=torch.ones(2, 4, 5)),
        ns.DtypeError,
        "mask must be boolean",
    ),
    "mask of another shape": (
        lambda: ns.normalize(x4, "[n] c [h w]", mask=torch.ones(2, 4, 4).bool()),
        ns.ShapeError,
        "a mask of shape (2, 4, 4) does not fit",
    ),
    "residual of another shape": (
        lambda: ns.normalize(x4, "[n] c [h w]", residual=torch.ones(3, 6, 4, 5)),
        ns.ShapeError,
        "a residual of shape (3, 6, 4, 5) does not fit",
    ),
    "moments of another shape": (
        lambda: ns.normalize(x4, "[n] c [h w]", moments=(torch.ones(5), torch.ones(5))),
        ns.ShapeError,
        "a given mean of shape (5,) does not fit",
    ),
    "one moment": (
        lambda: ns.normalize(x4, "[n] c [h w]", moments=(torch.ones(6),)),
        ns.ArgumentError,
        "moments must be a mean and a variance",
    ),
    "batch of one": (
        lambda: F.batch_norm(torch.zeros(1, 3), None, None, training=True),
        ns.ShapeError,
        "Expected more than 1 value per channel when training",
    ),
    "eps of zero in training": (
        lambda: F.batch_norm(x4, None, None, training=True, eps=0),
        ns.ArgumentError,
        "batch_norm eps must be positive during training, but got 0",
    ),
    "wrong channel count": (
        lambda: F.batch_norm(x4, torch.zeros(5), torch.ones(5)),
        ns.ShapeError,
        "running_mean should contain 6 elements not 5",
    ),
    "scalar": (lambda: F.batch_norm(torch.tensor(1.0), None, None, training=True), ns.ShapeError, "at least 2D input"),
    "normalized_shape of another size": (
        lambda: F.layer_norm(x4, (4,)),
        ns.ShapeError,
        "Given normalized_shape=[4], expected input with shape [*, 4]",
    ),
    "sum of two shapes": (
        lambda: F.add_norm(x4, x4[:, :3], (5,)),
        ns.ShapeError,
        "a residual of shape (2, 3, 4, 5) does not fit",
    ),
    "unknown activation of a layer": (
        lambda: ns.nn.LayerNorm(4, activation="swish"),
        ns.ArgumentError,
        "activation 'swish' is unknown",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_cure(mistake):
    call, error, sentence = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        call()
    first, *rest = str(caught.value).splitlines()
    assert sentence in first
    assert error in (ns.ArgumentError, ns.NotationError) or any(line.startswith("  cure: ") for line in rest)


def test_an_error_survives_pickling():
    error = ns.ShapeError("does not fit", shape=(2, 3), cure="transpose it")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "does not fit\n  shape: (2, 3)\n  cure: transpose it"


def test_our_errors_are_torchs_kinds_of_errors():
    for error, kinds in {
        ns.NotationError: (ValueError,),
        ns.ShapeError: (ValueError, RuntimeError),
        ns.DegenerateScopeError: (ValueError,),
        ns.DtypeError: (TypeError, NotImplementedError, RuntimeError),
    }.items():
        assert all(issubclass(error, kind) for kind in kinds)


@pytest.mark.parametrize("scope", ["[n] c [h w]", "n c [h w]", "n [c h w]", "n [c] h w"])
@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (2, 6, 0, 5), (2, 0, 4, 5)])
def test_an_empty_tensor_stays_empty(scope, shape):
    x = torch.zeros(shape, requires_grad=True)
    y = ns.normalize(x, scope, activation="relu")
    assert y.shape == shape
    y.backward(torch.ones_like(y))
    assert x.grad.shape == shape


def test_an_empty_batch_moves_no_running_statistic():
    layer = ns.nn.BatchNorm2d(6)
    assert layer(torch.zeros(0, 6, 4, 5)).shape == (0, 6, 4, 5)
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()


def test_nan_stays_in_its_set():
    x = torch.randn(3, 6, 4, 5)
    clean = ns.normalize(x, "[n] c [h w]")
    x[1, 2, 3, 4] = float("nan")
    y = ns.normalize(x, "[n] c [h w]")
    assert y[:, 2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[:, others], clean[:, others])


def test_a_constant_set_gives_the_bias():
    # 0.1 has no exact float32, and the sum of 60 of them is rounded: what is left must not be amplified by 1/√ε.
    x = torch.full((3, 6, 4, 5), 0.1)
    bias = torch.randn(6)
    assert_close(ns.normalize(x, "[n] c [h w]", bias=bias), bias[:, None, None].expand_as(x), atol=1e-5, rtol=0)


def test_eps_zero_is_the_bare_formula():
    x = torch.randn(50, 3, dtype=torch.float64)
    y = ns.normalize(x, "[n] c", eps=0)
    assert_close(y.var(0, unbiased=False), torch.ones(3, dtype=torch.float64))


def test_a_failing_forward_leaves_the_layer_as_it_was():
    layer = ns.nn.BatchNorm1d(4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for wrong in (torch.zeros(1, 4), torch.zeros(5, 3), torch.zeros(2, 4, 3, 3), torch.zeros(5, 4).long()):
        with pytest.raises(ns.NormscopeError, match="cure: "):
            layer(wrong)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
