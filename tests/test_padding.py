"""Padding is invisible: alone, or padded to twice its length with anything at all, a batch gives the same.

Output, gradients of inputs and parameters, and running statistics, in training and in evaluation.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normscope as ns

sys.path.insert(0, str(Path(__file__).parent / "layers"))
from records import RECORDS
from test_layers import build, inputs_of, learn, random_like

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# The sums run over other numbers of terms. In float32 that is worth a few roundings, of 6e-8 each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
GARBAGE = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30])
N, C, T = 4, 6, 5


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and how they grow.

    Attributes:
        name: For the test's id.
        build: (dtype) → layer.
        inputs: (seed, dtype) → inputs.
        axes: For every input the axis that is padded, or None.
        call: (layer, inputs, options) → output.
        channels: The axis that a mask leaves out.
        residual: Whether a residual is taken.
        clean: The garbage goes through a product of the caller's first, whose gradient any NaN would spoil.
    """

    name: str
    build: Callable[[torch.dtype], nn.Module]
    inputs: Callable[[int, torch.dtype], list[Tensor]]
    axes: tuple[int | None, ...]
    call: Callable[..., Tensor] = lambda layer, *inputs, **options: layer(*inputs, **options)
    channels: int = 1
    residual: bool = True
    clean: bool = False

    def __str__(self) -> str:
        return self.name


def drop_in(name: str, build: Callable[..., nn.Module], shape: tuple[int, ...], axis: int, channels: int = 1) -> Case:
    def made(dtype: torch.dtype) -> nn.Module:
        layer = build(dtype=dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.5)
        return layer

    def inputs(seed: int, dtype: torch.dtype) -> list[Tensor]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return [(x * 2 + 1).to(dtype)]

    recurrent = name == "RecurrentBatchNorm"
    return Case(name, made, inputs, (axis,), channels=channels, residual=not recurrent)


def cases() -> Iterator[Case]:
    sequence, image, tokens = (N, C, T), (N, C, 3, T), (N, T, C)
    tracked: Any = {"affine": True, "track_running_stats": True}
    yield drop_in("BatchNorm1d", lambda **o: ns.nn.BatchNorm1d(C, **o), sequence, 2)
    yield drop_in("BatchNorm2d", lambda **o: ns.nn.BatchNorm2d(C, activation="silu", **o), image, 3)
    yield drop_in("BatchNorm3d", lambda **o: ns.nn.BatchNorm3d(C, momentum=None, **o), (N, C, 2, 3, T), 4)
    yield drop_in("SyncBatchNorm", lambda **o: ns.nn.SyncBatchNorm(C, **o), sequence, 2)
    yield drop_in("InstanceNorm1d", lambda **o: ns.nn.InstanceNorm1d(C, **o), sequence, 2)
    yield drop_in("InstanceNorm2d", lambda **o: ns.nn.InstanceNorm2d(C, **tracked, **o), image, 3)
    yield drop_in("InstanceNorm3d", lambda **o: ns.nn.InstanceNorm3d(C, **tracked, **o), (N, C, 2, 3, T), 4)
    yield drop_in("GroupNorm", lambda **o: ns.nn.GroupNorm(3, C, **o), sequence, 2)
    yield drop_in("GroupNorm 2d", lambda **o: ns.nn.GroupNorm(2, C, activation="relu", **o), image, 3)
    yield drop_in("LayerNorm", lambda **o: ns.nn.LayerNorm(C, **o), tokens, 1, 2)
    yield drop_in("RMSNorm", lambda **o: ns.nn.RMSNorm(C, **o), tokens, 1, 2)
    yield drop_in("Norm, one set per sample", lambda **o: ns.nn.Norm("n [c l]", C, **o), sequence, 2)
    yield drop_in("Norm, running", lambda **o: ns.nn.Norm("[n] c [h w]", C, running=True, **o), image, 3)
    yield drop_in("Norm, groups of samples", lambda **o: ns.nn.Norm("(g [n]) c [l]", C, g=2, **o), sequence, 2)
    yield drop_in("RecurrentBatchNorm", lambda **o: ns.nn.RecurrentBatchNorm(C, 2 * T, **o), (T, N, C), 0, 2)
    for record in RECORDS:
        if not record.mask:
            continue
        # Labels and features are padded, too; a wider kernel would see where they end.
        options: Any = {"kernel_size": 1} if "SPADE" in record.name else {}
        rank = 3 if 3 in record.ranks else record.ranks[-1]
        along = rank - 1 if record.axis == 1 else 1
        behind = record.call.__name__ == "call_behind"
        count = len(record.inputs(rank, 0))
        axes = (along, along) if "SPADE" in record.name else (along, *(None,) * (count - 1))
        yield Case(
            record.name,
            lambda dtype, record=record, options=options: build(record, dtype, **options),
            lambda seed, dtype, record=record, rank=rank: inputs_of(record, rank, seed, dtype),
            axes, record.call, record.axis % rank, record.residual, behind,
        )  # fmt: skip


def padded(t: Tensor, axis: int, spoil: bool) -> Tensor:
    """Twice as long, the second half garbage."""
    other = (
        GARBAGE.to(t.dtype).repeat(-(-t.numel() // 4))[: t.numel()].reshape(t.shape) if spoil else 7 * t.detach() + 3
    )
    return torch.cat([t, other], axis)


def assert_same(mine: Tensor | None, truth: Tensor | None, what: str) -> None:
    assert (mine is None) == (truth is None), what
    if mine is not None and truth is not None:
        scale = max(float(truth.detach().abs().max()) if truth.numel() else 0.0, 1.0)
        tolerance = TOLERANCE[truth.dtype] if truth.is_floating_point() else 0
        torch.testing.assert_close(mine, truth, rtol=0, atol=tolerance * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("case", list(cases()), ids=str)
@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_padding_is_invisible(case: Case, training: bool, dtype: torch.dtype) -> None:
    layer = case.build(dtype)
    long = copy.deepcopy(layer)
    along = case.axes[0]
    assert along is not None
    for seed in range(2):  # the second batch meets the statistics of the first
        last = seed == 1
        layer.train(training or not last), long.train(training or not last)
        layer.zero_grad(), long.zero_grad()
        inputs = case.inputs(seed, dtype)
        alike = zip(inputs, case.axes, strict=True)
        wide = [t if a is None else padded(t, a, i == 0 and not case.clean) for i, (t, a) in enumerate(alike)]
        wide = [t.detach().clone() for t in wide]
        learn(inputs), learn(wide)
        half = inputs[0].shape[along]
        keep = (torch.arange(2 * half) < half).reshape([-1 if k == along else 1 for k in range(inputs[0].dim())])
        mask = keep.expand(wide[0].shape).select(case.channels, 0)
        options, wide_options = {}, {"mask": mask}
        if case.residual:
            options["residual"] = random_like(inputs[0], 9)
            wide_options["residual"] = padded(options["residual"], along, True)
        if case.clean:  # what the caller's product makes has other axes
            options.pop("residual", None), wide_options.pop("residual", None)
        y, wide_y = case.call(layer, *inputs, **options), case.call(long, *wide, **wide_options)
        first, second = wide_y.split(half, along)
        assert_same(first, y, "output")
        assert second.eq(0).all()
        gy = random_like(y)
        y.backward(gy)
        wide_y.backward(padded(gy, along, False))
    for k, (t, w) in enumerate(zip(inputs, wide, strict=True)):
        if t.grad is None or case.axes[k] is None:
            assert_same(w.grad, t.grad, f"gradient of input {k}")
        else:
            first, second = w.grad.split(t.shape[case.axes[k]], case.axes[k])
            assert_same(first, t.grad, f"gradient of input {k}")
            assert second.eq(0).all(), f"gradient of input {k}"
    for (name, p), q in zip(layer.named_parameters(), long.parameters(), strict=True):
        assert_same(q.grad, p.grad, f"gradient of {name}")
    for (name, b), c in zip(layer.named_buffers(), long.buffers(), strict=True):
        assert_same(c, b, name)


def test_every_layer_with_a_mask_is_here() -> None:
    takes = {n for n in ns.nn.__all__ if "mask" in getattr(ns.nn, n).forward.__code__.co_varnames or n == "LayerNorm2d"}
    takes = {n for n in takes if not n.startswith("Lazy")}
    assert takes <= {case.name.split(",")[0].split(" ")[0] for case in cases()}


# --- recurrent layers -------------------------------------------------------------------------------------------------

KINDS = ("BatchNormLSTM", "LayerNormLSTM", "LayerNormGRU")


def recurrent(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    options: Any = {"max_length": 2 * T} if kind == "BatchNormLSTM" else {}
    return getattr(ns.nn, kind)(3, 4, num_layers=2, bidirectional=True, **options).to(dtype)


def outcome(net: nn.Module, x: Tensor, gy: Tensor, lengths: Tensor | None = None, pack: bool = False) -> dict[str, Any]:
    """Outputs, last states, gradients and buffers, of which the padding is cut off."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    if pack:
        y, last = net(pack_padded_sequence(x, lengths, enforce_sorted=False))
        y = pad_packed_sequence(y, total_length=len(x))[0]
    else:
        y, last = net(x, lengths=lengths)
    y.backward(gy)
    states = last if isinstance(last, tuple) else (last,)
    made = {"outputs": y.detach(), "input": x.grad} | {f"state {k}": s.detach() for k, s in enumerate(states)}
    made |= {name: p.grad.clone() for name, p in net.named_parameters()}
    return made | {name: b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@MODES
def test_padding_of_sequences_is_invisible(kind: str, pack: bool, dtype: torch.dtype, training: bool) -> None:
    net = recurrent(kind, dtype)
    long = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(1)
    for seed in range(2):
        net.train(training or seed == 0), long.train(training or seed == 0)
        x, gy = (torch.randn(T, N, k, generator=generator, dtype=torch.float64).to(dtype) for k in (3, 8))
        truth = outcome(net, x, gy)
        mine = outcome(long, padded(x, 0, True), padded(gy, 0, False), torch.full((N,), T), pack)
    for name in ("outputs", "input"):
        mine[name], rest = mine[name].split(T)
        assert rest.eq(0).all(), name
    for name, t in truth.items():
        assert_same(mine[name], t, name)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_a_sequence_among_longer_ones_is_itself(kind: str, pack: bool) -> None:
    net, lengths = recurrent(kind, torch.float64), torch.tensor([2, 5, 1, 4])
    x, gy = (torch.randn(T, N, k, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (3, 8))
    kept = torch.arange(T)[:, None] < lengths
    x = torch.where(kept[:, :, None], x, float("nan"))
    together = outcome(net, x, gy, lengths, pack)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for n, length in enumerate(lengths.tolist()):
        alone = outcome(net, x[:length, n : n + 1], gy[:length, n : n + 1])
        for name in ("outputs", "input"):
            assert_same(together[name][:length, n : n + 1], alone[name], name)
            assert together[name][length:, n].eq(0).all()
        assert_same(together["state 0"][:, n : n + 1], alone["state 0"], "last state")
        total = {name: t + alone[name] for name, t in total.items()}
    for name, t in total.items():
        assert_same(together[name], t, name)
