"""What single layers promise beyond their record: schedules, streams, windows, equal eigenvalues."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import normscope as ns
from normscope.oracle import field

sys.path.insert(0, str(Path(__file__).parent))
from records import data


def test_online_norm_steers_its_gradient_as_the_paper_does() -> None:
    """Two batches, one of them masked; the errors go from one backward to the next."""
    layer = ns.nn.OnlineNorm(6, 0.8, 0.7, affine=False, control=None, dtype=torch.float64)
    μ, σ2, ε_y, ε_1 = np.zeros(6), np.ones(6), np.zeros(6), np.zeros(6)
    for seed, mask in ((0, None), (1, torch.rand(4, 1, 3, 5) > 0.3)):
        x = data((4, 6, 3, 5), seed).requires_grad_()
        g = data((4, 6, 3, 5), seed + 10)
        output = layer(x, mask=mask)
        output.backward(g)
        k = None if mask is None else mask.numpy()
        y, σ, μ, σ2 = field.online(x.detach().numpy(), μ, σ2, 0.8, layer.eps, k)
        dx, ε_y, ε_1 = field.online_backward(g.numpy() if k is None else np.where(k, g, 0), y, σ, ε_y, ε_1, 0.7, k)
        # float64, sums of 15 cells
        for ours, truth in ((output, y), (x.grad, dx), (layer.error_y, ε_y), (layer.error_1, ε_1)):
            assert_close(ours, torch.from_numpy(truth), rtol=1e-12, atol=1e-12)


def test_online_norm_makes_gradients_orthogonal_in_the_long_run() -> None:
    """To 1 and to y, which is what BatchNorm's are within a batch; without control the means below are 0.3 and 0.5."""
    layer = ns.nn.OnlineNorm(3, 0.99, 0.9, affine=False, control=None)
    along_1, along_y = [], []
    for _ in range(600):
        x = torch.randn(1, 3, 8, 8, requires_grad=True)
        y = layer(x)
        y.backward(0.5 * y.detach() + 0.3 + torch.randn_like(y))
        along_1.append(x.grad.mean())
        along_y.append((x.grad * y).mean())
    assert abs(torch.stack(along_1[100:]).mean()) < 0.03
    assert abs(torch.stack(along_y[100:]).mean()) < 0.03


def test_online_norm_clamps() -> None:
    layer = ns.nn.OnlineNorm(3, control="clamp", clamp=0.5)
    assert layer(torch.randn(4, 3, 8)).abs().max() == 0.5


def test_renorm_bounds_follow_the_papers_schedule() -> None:
    layer = ns.nn.BatchRenorm(3)
    bounds = {
        0: (1, 0),
        5000: (1, 0),
        15000: (1 + 2 * 10 / 35, 2.5),
        25000: (1 + 2 * 20 / 35, 5),
        40000: (3, 5),
        10**6: (3, 5),
    }
    for step, expected in bounds.items():
        layer.num_batches_tracked.fill_(step)
        assert [float(b) for b in layer.bounds()] == pytest.approx(expected, rel=1e-6)


def test_renorm_begins_as_batch_norm() -> None:
    x = torch.randn(4, 3, 5)
    assert_close(ns.nn.BatchRenorm(3)(x), ns.nn.BatchNorm1d(3)(x), rtol=1e-5, atol=1e-6)


def test_cross_iteration_is_exact_where_statistics_are_linear_in_the_weight() -> None:
    """The same inputs in every batch, another weight: the mean carried over is the mean that this weight gives."""
    h, first, second = data((5, 4, 3), 0), data((6, 4), 1), data((6, 4), 2)
    layer = ns.nn.CrossIterationBatchNorm(6, 4, window=2, momentum=1.0, dtype=torch.float64)
    for weight in (first, second):
        weight.requires_grad_()
        layer(torch.einsum("nfl,cf->ncl", h, weight), weight)
    expected = torch.einsum("nfl,cf->ncl", h, second).mean((0, 2))
    assert_close(layer.running_mean, expected.detach(), rtol=1e-12, atol=1e-12)


def test_cross_iteration_burn_in_is_batch_norm() -> None:
    layer, peer = ns.nn.CrossIterationBatchNorm(6, 4, window=3, burn_in=3), ns.nn.BatchNorm1d(6)
    weight = torch.randn(6, 4, requires_grad=True)
    outputs = []
    for _ in range(5):
        x = torch.einsum("nfl,cf->ncl", torch.randn(5, 4, 3), weight)
        outputs.append((layer(x, weight) - peer(x)).abs().max().item())
    assert max(outputs[:4]) < 1e-5  # the fourth batch is the first to be remembered
    assert outputs[4] > 1e-2


def test_cross_iteration_without_gradients_is_batch_norm() -> None:
    layer, x = ns.nn.CrossIterationBatchNorm(6, 4), torch.randn(5, 6, 3)
    with torch.no_grad():
        assert_close(layer(x, torch.randn(6, 4)), ns.nn.BatchNorm1d(6)(x), rtol=1e-5, atol=1e-6)
    assert layer.remembered == 0


def test_decorrelation_is_differentiable_where_eigenvalues_coincide() -> None:
    """Whitened data have the covariance I: the eigenvectors' own derivative would divide by zero."""
    x = torch.linalg.qr(data((12, 4), 0) - data((12, 4), 0).mean(0)).Q.requires_grad_()
    layer = ns.nn.DecorrelatedBatchNorm(4, affine=False, eps=1e-3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x), x)


def test_a_second_derivative_of_decorrelation_is_refused() -> None:
    x = data((12, 4), 0).requires_grad_()
    y = ns.nn.DecorrelatedBatchNorm(4, dtype=torch.float64)(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_newtons_iteration_ends_at_zca() -> None:
    x = data((40, 6), 0)
    zca = ns.nn.DecorrelatedBatchNorm(6, affine=False, dtype=torch.float64)(x)
    newton = ns.nn.IterNorm(6, iterations=30, affine=False, dtype=torch.float64)(x)
    assert_close(newton, zca, rtol=1e-6, atol=1e-6)


def test_split_statistics_by_call_and_by_attribute() -> None:
    layer = ns.nn.SplitBatchNorm(3, 2, share_affine=True)
    assert layer.domains[0].weight is layer.domains[1].weight
    assert len(list(layer.parameters())) == 2
    layer(torch.randn(4, 3), 1)
    layer.domain = 1
    layer(torch.randn(4, 3))
    assert [int(norm.num_batches_tracked) for norm in layer.domains] == [0, 2]
    with pytest.raises(ns.ArgumentError, match="domain 2 is not one of the 2"):
        layer(torch.randn(4, 3), 2)
    with pytest.raises(ns.ShapeError, match="do not fit"):
        layer(torch.randn(4, 3), torch.tensor([0, 1]))


def test_frozen_batch_norm_loads_a_batch_norm_and_keeps_to_it() -> None:
    trained = nn.BatchNorm2d(3)
    trained(torch.randn(4, 3, 5, 5) * 2 + 1)
    layer = ns.nn.FrozenBatchNorm(3)
    assert not any(layer.load_state_dict(trained.state_dict()))
    x = torch.randn(2, 3, 5, 5)
    assert_close(layer.train()(x), trained.eval()(x), rtol=1e-5, atol=1e-6)


def test_one_value_per_channel_is_refused_in_training() -> None:
    x = torch.randn(1, 6)
    for layer in (
        ns.nn.GhostBatchNorm(6, 4),
        ns.nn.BatchRenorm(6),
        ns.nn.EvalNorm(6),
        ns.nn.SwitchNorm(6),
        ns.nn.IterNorm(6),
    ):
        with pytest.raises(ns.DegenerateScopeError, match="cure: "):
            layer(x)
        assert layer.eval()(x).isfinite().all()
        assert layer.num_batches_tracked == 0


def test_conditions_that_do_not_fit() -> None:
    layer = ns.nn.ConditionalBatchNorm(6, None)
    with pytest.raises(ns.ArgumentError, match="without classes"):
        layer(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ns.ShapeError, match="γ of shape"):
        layer(torch.randn(4, 6), (torch.randn(3, 6), torch.randn(4, 6)))
    with pytest.raises(ns.ShapeError, match="labels of shape"):
        ns.nn.SPADE(6, 2, 3)(torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4))


def test_a_mask_of_single_channels_is_refused_by_whitening() -> None:
    with pytest.raises(ns.ShapeError, match="keeps some channels"):
        ns.nn.IterNorm(6)(torch.randn(4, 6, 5), mask=torch.rand(4, 6, 5) > 0.5)


def test_a_batch_that_is_not_finite_moves_no_statistics() -> None:
    layers = (
        ns.nn.GhostBatchNorm(6, 2),
        ns.nn.BatchRenorm(6),
        ns.nn.SwitchNorm(6),
        ns.nn.IterNorm(6),
        ns.nn.OnlineNorm(6),
    )
    for layer in layers:
        layer(torch.full((2, 6, 4), float("inf")))
        for name in ("running_mean", "running_var", "running_whitening"):
            assert getattr(layer, name, torch.zeros(1)).isfinite().all(), layer


def test_recalibration_of_ghosts_measures_the_population() -> None:
    layer, x = ns.nn.GhostBatchNorm(6, 2), torch.randn(8, 6, 5)
    ns.recalibrate(layer, [x])
    assert_close(layer.running_var, x.var((0, 2)), rtol=1e-5, atol=1e-6)


# Dynamo's own questions, of autograd functions and of tensors between two graphs.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_cross_iteration_breaks_the_compilers_graph_and_is_right() -> None:
    torch.compiler.reset()
    layer = ns.nn.CrossIterationBatchNorm(6, 4, window=3, dtype=torch.float64)
    compiled, weight = copy.deepcopy(layer), data((6, 4), 1).requires_grad_()
    call = torch.compile(lambda h: compiled(torch.einsum("nfl,cf->ncl", h, weight), weight), backend="aot_eager")
    for seed in range(3):
        h = data((5, 4, 3), seed)
        assert_close(call(h), layer(torch.einsum("nfl,cf->ncl", h, weight), weight), rtol=1e-12, atol=1e-12)
    assert_close(compiled.state_dict(), layer.state_dict(), rtol=1e-12, atol=1e-12)
