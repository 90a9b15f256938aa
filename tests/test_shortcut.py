"""Calls of a kind seen before skip the checks: they must give what the first one gave, and see every difference."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope.functional import shortcut
from normscope.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.autograd_missing() is not None, reason="there is no shortcut without the C++ steps")

G = torch.Generator().manual_seed(0)
C = 6


def draw(*shape):
    return torch.randn(*shape, generator=G) * 2 + 1


def running():
    return torch.zeros(C), torch.ones(C)


def batch_norm(x, w, b, **more):
    return ns.functional.batch_norm(x, None, None, w, b, True, activation="relu", **more)


def evaluation(x, w, b, **more):
    return ns.functional.batch_norm(x, torch.full((C,), 0.3), torch.full((C,), 2.0), w, b, **more)


CALLS = {
    "batch_norm": batch_norm,
    "evaluation": evaluation,
    "instance_norm": lambda x, w, b, **more: ns.functional.instance_norm(x, weight=w, bias=b, **more),
    "group_norm": lambda x, w, b, **more: ns.functional.group_norm(x, 3, w, b, **more),
    "layer_norm": lambda x, w, b, **more: ns.functional.layer_norm(x, (C,), w, b, **more),
    "rms_norm": lambda x, w, b, **more: ns.functional.rms_norm(x, (C,), w, **more),
    "normalize": lambda x, w, b, **more: ns.normalize(x, "n (g [c]) [h w]", weight=w, bias=b, g=2, **more),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def entered(monkeypatch):
    """How each call ended: True where the shortcut served."""
    monkeypatch.setattr(shortcut, "_doors", {})  # whatever other tests have left there
    ways, enter = [], shortcut.enter
    monkeypatch.setattr(shortcut, "enter", lambda *a, **k: [ways.append((y := enter(*a, **k)) is not None), y][1])
    return ways


def gradients(call, *inputs, **more):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = call(*inputs, **more)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    return y, *torch.autograd.grad(y, inputs, g, allow_unused=True)


def same(a, b):
    for first, second in zip(a, b, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)  # the same kernels on the same numbers


@calls
def test_the_second_call_enters_and_gives_the_same(call, entered):
    inputs = draw(4, C, 5, C), draw(C), draw(C)
    first = gradients(call, *inputs)
    del entered[:]
    same(first, gradients(call, *inputs))
    assert entered == [True]
    with torch.no_grad():
        assert torch.equal(call(*inputs), first[0])
    assert entered == [True, True]


@calls
def test_another_size_layout_or_set_of_parameters_is_looked_at(call, entered):
    call(draw(4, C, 5, C), draw(C), draw(C))
    for x, w, b in (
        (draw(4, C, 8, C), draw(C), draw(C)),
        (draw(4, C, 5, C).to(memory_format=torch.channels_last), draw(C), draw(C)),
        (draw(4, C, 5, C).bfloat16(), draw(C), draw(C)),
        (draw(4, C, 5, C), None, None),
    ):
        del entered[:]
        first = call(x, w, b)
        again = call(x, w, b)
        assert entered == [False, True]
        assert torch.equal(first, again)
        assert (first.dtype, first.stride()) == (again.dtype, again.stride())


@calls
def test_wrong_parameters_raise_what_they_raise_at_first(call):
    x, w, b = draw(4, C, 5, C), draw(C), draw(C)
    call(x, w, b)
    with pytest.raises(ns.ShapeError):
        call(x, draw(C + 1), b)
    with pytest.raises(ns.ShapeError):
        call(x, w, b, residual=draw(3, 1, 1))
    with pytest.raises(ns.ArgumentError, match="unknown"):
        ns.functional.group_norm(x, 3, activation="nothing")


@calls
def test_residuals_enter_and_masks_do_not(call, entered):
    x, w, b = draw(4, C, 5, C), draw(C), draw(C)
    shape = call(x, w, b).shape
    del entered[:]
    residual = draw(*shape)
    broadcast = residual[:1].expand(shape)
    assert torch.equal(call(x, w, b, residual=residual[:1]), call(x, w, b, residual=broadcast))
    torch.testing.assert_close(call(x, w, b, residual=residual), call(x, w, b, residual=residual.clone()))
    assert entered == [False, True, True, True]
    call(x, w, b, mask=torch.ones(shape, dtype=torch.bool))
    assert len(entered) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_running_statistics_move_once_per_batch(reentrant, entered):
    x = draw(4, C, 5, C).requires_grad_()
    mean, var = running()
    peer_mean, peer_var = running()

    def call(x):
        return ns.functional.batch_norm(x, mean, var, None, None, True, 0.25)

    def peer(x):
        return torch.nn.functional.batch_norm(x, peer_mean, peer_var, None, None, True, 0.25)

    call(x), peer(x)
    del entered[:]
    checkpoint(call, x, use_reentrant=reentrant).sum().backward()
    peer(x)
    assert entered == [True, True][: 1 + reentrant]  # the other kind of checkpoint leaves within the operator
    # float32 buffers, two moves: a few roundings.
    torch.testing.assert_close(mean, peer_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, peer_var, rtol=1e-6, atol=1e-6)


def test_other_buffers_are_looked_at(entered):
    x = draw(4, C, 5, C)
    for training in (True, False):
        ns.functional.batch_norm(x, *running(), training=training)
        ns.functional.batch_norm(x, *running(), training=training)
        assert entered.pop()
        for mean, var in (
            [t.double() for t in running()],
            [torch.stack([t, t], 1)[:, 0] for t in running()],
            [t.requires_grad_() for t in running()],
        ):
            with torch.no_grad():
                y = ns.functional.batch_norm(x, mean, var, training=training)
            assert not entered.pop()
            torch.testing.assert_close(y, ns.functional.batch_norm(x, *running(), training=training))
    with pytest.raises(ns.ShapeError, match="must be defined"):
        ns.functional.batch_norm(x, None, None)
    with pytest.raises(ns.ShapeError, match="both"):
        ns.functional.batch_norm(x, torch.zeros(C), None, training=True)
    cumulative = ns.functional.batch_norm(x, *running(), training=True, momentum=torch.tensor(0.5))
    assert not entered.pop()
    assert torch.equal(cumulative, ns.functional.batch_norm(x, *running(), training=True, momentum=0.5))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")  # torch's own, at the first dual number
@calls
def test_transformations_take_the_other_door(call, entered):
    x, w, b = draw(4, C, 5, C), draw(C), draw(C)
    y = call(x, w, b)
    call(x, w, b)
    del entered[:]
    with forward_ad.dual_level():
        dual = call(forward_ad.make_dual(x, torch.ones_like(x)), w, b)
        assert forward_ad.unpack_dual(dual).tangent is not None
    per_sample = torch.func.vmap(lambda x: call(x, w, b))(torch.stack([x, x]))
    torch.testing.assert_close(per_sample[1], y, rtol=1e-5, atol=1e-5)  # another order of float32 sums
    assert not any(entered)


@calls
def test_gradients_of_gradients(call):
    inputs = [t.requires_grad_() for t in (draw(4, C, 5, C), draw(C), draw(C))]
    call(*inputs)
    y = call(*inputs)
    (dx,) = torch.autograd.grad(y, inputs[0], torch.ones_like(y) + y.detach(), create_graph=True)
    assert dx.requires_grad
    assert torch.autograd.grad(dx.square().sum(), inputs[1])[0].abs().max() > 0


class Loud(torch.Tensor):
    pass


def test_subclasses_keep_their_class():
    x = draw(4, C, 5, C)
    ns.functional.group_norm(x, 3)
    assert type(ns.functional.group_norm(x.as_subclass(Loud), 3)) is Loud


def test_inference_mode_and_empty_batches(entered):
    x = draw(4, C, 5, C)
    y = ns.functional.group_norm(x, 3)
    with torch.inference_mode():
        assert torch.equal(ns.functional.group_norm(x, 3), y)
        assert ns.functional.batch_norm(x, *running(), training=True).is_inference()
        assert ns.functional.batch_norm(x, *running(), training=True).is_inference()
    assert entered == [False, True, False, True]
    for _ in range(2):
        assert ns.functional.batch_norm(x[:0], *running()).shape == (0, C, 5, C)
        assert not entered.pop()


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
@pytest.mark.parametrize("used", ["both", "norm", "sum"])
@pytest.mark.parametrize(
    ("shape", "swept"),
    [((37, 40), True), ((3, 5, 3000), True), ((2, 70001), True), ((64, 9000), True), ((6, 5), False)],
)
def test_a_sum_is_normalized_in_one_sweep(shape, swept, used, dtype, monkeypatch):
    """From the second call on, and bit for bit what adding first gives, gradients included."""
    monkeypatch.setattr(shortcut, "_doors", {})
    leaves = [torch.randn(shape, dtype=dtype) for _ in range(2)] + [torch.randn(shape[-1:]) for _ in range(2)]
    upstream = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    chosen, count = {"both": (slice(2), 4), "norm": (slice(1), 4), "sum": (slice(1, 2), 2)}[used]

    def call(**options):
        tensors = [t.clone().requires_grad_() for t in leaves]
        found = ns.functional.add_norm(*tensors[:2], shape[-1:], *tensors[2:], eps=1e-5, **options)
        gradients = torch.autograd.grad(found[chosen], tensors[:count], upstream[chosen])
        return found[0].grad_fn is found[1].grad_fn, [*found, *gradients]

    for options in ({}, {"center": False, "activation": "relu"}, {"activation": "gelu"}):
        (added, want), (together, got) = call(**options), call(**options)
        assert (added, together) == (False, swept)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_of_gradients(dtype):
    """vmap over the backward pass, as for Jacobians."""
    x, w = draw(4, 6).to(dtype).requires_grad_(), draw(6).requires_grad_()
    y, upstream = ns.functional.layer_norm(x, (6,), w), draw(5, 4, 6).to(dtype)
    together = torch.autograd.grad(y, [x, w], upstream, is_grads_batched=True, retain_graph=True)
    for i, gy in enumerate(upstream):
        for got, want in zip(together, torch.autograd.grad(y, [x, w], gy, retain_graph=True), strict=True):
            assert (got[i] - want).abs().max() <= 8 * torch.finfo(
                want.dtype
            ).eps * want.abs().max()  # sums of six cells


def test_second_gradients_of_a_sum():
    tensors = [torch.randn(3, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tensors += [torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def both(x, addend, weight, bias):
        return ns.functional.add_norm(x, addend, (9,), weight, bias, activation="gelu")

    both(*tensors)
    y, total = both(*tensors)
    assert y.grad_fn is total.grad_fn
    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradgradcheck(both, tensors)
