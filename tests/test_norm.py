"""`ns.nn.Norm`: the layer of any scope, against the drop-in layers and against its own description."""

import copy
import io

import pytest
import torch
from torch.testing import assert_close

import normscope as ns

PAIRS = [
    (ns.nn.Norm("[n] c [h w]", 6, running=True), torch.nn.BatchNorm2d(6)),
    (ns.nn.Norm("[n] c [h w]", 6, running=True, momentum=None), torch.nn.BatchNorm2d(6, momentum=None)),
    (ns.nn.Norm("n c [h w]", 6, running=True), torch.nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
    (ns.nn.Norm("n c [h w]", 6, affine=False), torch.nn.InstanceNorm2d(6)),
    (ns.nn.Norm("n (g [c]) [h w]", 6, g=3), torch.nn.GroupNorm(3, 6)),
    (ns.nn.Norm("n [c h w]", (6, 4, 5), params="c h w"), torch.nn.LayerNorm((6, 4, 5))),
    (ns.nn.Norm("... [c]", 5, center=False, bias=False, eps=1e-6), torch.nn.RMSNorm(5, eps=1e-6)),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda layer: type(layer).__name__)
def test_equals_the_layer_it_describes(ours, theirs):
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
    for parameter, twin in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            twin.copy_(parameter.copy_(torch.randn(parameter.shape)))
    for step in range(4):
        if step == 3:
            ours.eval(), theirs.eval()
        x = (torch.randn(7, 6, 4, 5) * 3 + 1).requires_grad_()
        upstream = torch.randn_like(x)
        y, expected = ours(x), theirs(x)
        # 1e-5: some ten float32 roundings of values up to 10.
        assert_close(y, expected, atol=1e-5, rtol=1e-5)
        mine, reference = (
            (torch.autograd.grad(out, [x, *m.parameters()], upstream)) for out, m in ((y, ours), (expected, theirs))
        )
        assert_close(mine, reference, atol=1e-4, rtol=1e-4)
    # torch's InstanceNorm never counts its batches.
    assert_close(
        [b for n, b in ours.named_buffers() if "num" not in n], [b for n, b in theirs.named_buffers() if "num" not in n]
    )


def test_ghost_batch_norm_is_batch_norm_of_each_ghost():
    x = torch.randn(12, 6, 4, 5)
    layer = ns.nn.Norm("(g [n]) c [h w]", 6, g=4, running=True)
    expected = torch.cat([torch.nn.BatchNorm2d(6)(part) for part in x.split(3)])
    assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    means = torch.stack([part.mean((0, 2, 3)) for part in x.split(3)]).mean(0)
    variances = torch.stack([part.var((0, 2, 3)) for part in x.split(3)]).mean(0)
    assert_close(layer.running_mean, 0.1 * means, atol=1e-6, rtol=1e-5)
    assert_close(layer.running_var, 0.9 + 0.1 * variances, atol=1e-6, rtol=1e-5)


def test_params_in_another_order_than_the_axes():
    x = torch.randn(3, 4, 5, 6)
    layer = ns.nn.Norm("[n] c h w", (6, 4), params="w c", running=True)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 4))
    y = layer(x)
    xhat = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    assert_close(y, xhat * layer.weight.T[:, None, :], atol=1e-5, rtol=1e-5)
    assert layer.running_mean.shape == (6, 4)
    assert_close(layer.running_mean, 0.1 * x.mean(0).mean(1).T, atol=1e-6, rtol=1e-5)
    layer.eval()
    mean, var, weight = (t.T[:, None, :] for t in (layer.running_mean, layer.running_var, layer.weight))
    assert_close(layer(x), (x - mean) / (var + 1e-5).sqrt() * weight, atol=1e-5, rtol=1e-5)


def test_masked_running_statistics_are_those_of_the_kept_cells():
    x = torch.randn(5, 3, 7) * 2 + 4
    mask = torch.rand(5, 7) > 0.4
    layer = ns.nn.Norm("[n] c [t]", 3, running=True)
    with torch.no_grad():
        y = layer(x, mask=mask)
    kept = torch.stack([channel[mask] for channel in x.unbind(1)])
    assert_close(layer.running_mean, 0.1 * kept.mean(1), atol=1e-6, rtol=1e-5)
    assert_close(layer.running_var, 0.9 + 0.1 * kept.var(1), atol=1e-6, rtol=1e-5)
    assert y.masked_select(~mask[:, None].expand_as(y)).eq(0).all()


def test_a_mask_without_cells_moves_nothing():
    layer = ns.nn.Norm("[n] c [t]", 3, running=True)
    y = layer(torch.full((5, 3, 7), float("nan")), mask=torch.zeros(5, 7, dtype=torch.bool))
    assert y.eq(0).all()
    assert layer.running_mean.eq(0).all()
    assert layer.running_var.eq(1).all()


def test_a_single_kept_cell_moves_the_mean_and_no_variance():
    layer = ns.nn.Norm("[n] c [t]", 3, running=True)
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2, 3] = True
    x = torch.randn(5, 3, 7)
    y = layer(x, mask=mask)
    assert y.eq(0).all()  # x̂ = 0 and β = 0
    assert_close(layer.running_mean, 0.1 * x[2, :, 3])
    assert layer.running_var.eq(1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (dict(scope="[n c", size=3), ns.NotationError, "this bracket is never closed"),
        (dict(scope="[n] c", size=3, params="d"), ns.NotationError, "params names 'd'"),
        (dict(scope="[n] c", size=(3, 4)), ns.ShapeError, "size (3, 4) has 2 entries, params 'c' names 1 axes"),
        (dict(scope="... [c]", size=3, running=True), ns.NotationError, "need these axes outside the scope"),
        (dict(scope="[n] c", size=3, eps=-1.0), ns.ArgumentError, "eps must be non-negative"),
        (dict(scope="[n] c", size=3, activation="rleu"), ns.ArgumentError, "activation 'rleu' is unknown"),
        (dict(scope="[n] c", size=3, g=4), ns.NotationError, "size g=4 was given, but the pattern has no axis 'g'"),
        (
            dict(scope="n (g [c])", size=6),
            ns.NotationError,
            "the split (g [c]) needs the sizes of all its factors but one",
        ),
        (dict(scope="n (g [c])", size=6, g=4), ns.ShapeError, "axis 1 of size 6 does not fit (g [c]) with g=4"),
    ],
)
def test_a_wrong_layer_is_refused_when_it_is_built(arguments, error, sentence):
    with pytest.raises(error) as caught:
        ns.nn.Norm(**arguments)
    assert sentence in str(caught.value).splitlines()[0]


def test_a_wrong_input_names_the_layer_in_its_model():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(ns.nn.Norm("[n] c", 3)))
    with pytest.raises(ns.ShapeError, match=r"layer: 1\.0 \(Norm\)"):
        model(torch.randn(4, 5))
    with pytest.raises(ns.DegenerateScopeError, match="cure: "):
        model(torch.randn(1, 3))


def test_nothing_is_counted_when_a_forward_fails():
    layer = ns.nn.Norm("[n] c", 3, running=True)
    with pytest.raises(ns.ShapeError):
        layer(torch.randn(4, 5))
    assert layer.num_batches_tracked == 0


def test_state_survives_copying_and_saving():
    layer = ns.nn.Norm("n (g [c]) [h w]", 6, g=3, activation="silu")
    torch.nn.init.normal_(layer.weight)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 6, 4, 4)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer) == "Norm('n (g [c]) [h w]', 6, g=3, activation='silu')"
