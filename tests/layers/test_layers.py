"""Every layer of the field, by its record: twin, gradients, masks, empty batches, modes, state, compilers, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normscope as ns
from normscope.oracle import ACTIVATIONS

sys.path.insert(0, str(Path(__file__).parent))
from records import RECORDS, Record

HALVES = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
# torch.export asks its own tree specifications a deprecated question.
TORCH_EXPORTS = pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")


# So does dynamo, of autograd functions.
DYNAMO = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)


def every(**conditions: Any) -> Any:
    """The records with these values of their fields."""
    chosen = [r for r in RECORDS if all(bool(getattr(r, name)) is value for name, value in conditions.items())]
    return pytest.mark.parametrize("record", chosen, ids=str)


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def build(record: Record, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A layer whose state tells all its numbers apart; weights of a mixture lie within [0, 1]."""
    layer = record.build(dtype=dtype, **options) if "AdaIN" not in record.name else record.build(**options)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, t in layer.state_dict().items():
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                t.copy_(0.5 + noise.abs())
            elif name.endswith("running_whitening"):
                t.copy_(torch.eye(t.shape[-1]) + 0.1 * noise)
            elif name in ("mean_weight", "var_weight"):
                t.copy_(0.3 + 0.1 * noise.tanh())
            elif t.is_floating_point() and not name.startswith(("past", "error")):
                t.copy_((1 if name.endswith("weight") or name == "g" else 0) + 0.5 * noise)
    return layer


def inputs_of(
    record: Record, rank: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    given = record.inputs(record.ranks[-1] if rank is None else rank, seed)
    return [t.to(dtype) if t.is_floating_point() else t for t in given]


def learn(inputs: list[Tensor]) -> None:
    for t in inputs:
        t.requires_grad_(t.is_floating_point())


def state_of(layer: nn.Module) -> dict[str, np.ndarray]:
    return {name: t.detach().double().numpy().copy() for name, t in layer.state_dict().items()}


def arrays(inputs: list[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().double().numpy() if t.is_floating_point() else t.numpy() for t in inputs)


def twin_of(record: Record, layer: nn.Module, inputs: list[Tensor], k: Tensor | None = None) -> Any:
    given = arrays(inputs)
    return record.twin(state_of(layer), layer.training, given, None if k is None else k.numpy(), given)


def random_like(t: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(t.dtype)


def assert_near(name: str, ours: Tensor, truth: np.ndarray, roundings: float, scale: float = 0.0) -> None:
    """Within `roundings` units in the last place of float32 or float64, and one of the result's own dtype."""
    truth = torch.from_numpy(np.array(truth, dtype=np.float64))
    ours = ours if ours.is_floating_point() else ours.double()
    wide = torch.float64 if ours.dtype == torch.float64 else torch.float32
    largest = max(float(truth.abs().max()) if truth.numel() else 0.0, scale)
    bound = torch.finfo(ours.dtype).eps * largest + roundings * torch.finfo(wide).eps * max(largest, 1.0)
    torch.testing.assert_close(
        ours.detach().double(), truth, rtol=0, atol=bound, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


# --- values ---------------------------------------------------------------------------------------------------------


CASES = [
    pytest.param(r, rank, dtype, id=f"{r}-{rank}d-{str(dtype).removeprefix('torch.')}")
    for r in RECORDS
    for rank in r.ranks
    for dtype in (torch.float64, torch.float32, *(() if r.wide else HALVES))
]


@pytest.mark.parametrize(("record", "rank", "dtype"), CASES)
def test_agrees_with_its_twin(record: Record, rank: int, dtype: torch.dtype) -> None:
    """Two steps of training and an evaluation; parameters and buffers are float32 under half-width inputs.

    100 roundings: sums of up to 60 cells, divided by roots as small as 0.1; whitening by a matrix with entries of 10,
    which a wide computation of the same inputs does not see. The twin starts each step at the layer's own buffers.
    """
    layer = build(record, torch.float64 if dtype == torch.float64 else torch.float32)
    for seed, training in enumerate((True, True, False)):
        layer.train(training)
        inputs = inputs_of(record, rank, seed, dtype)
        learn(inputs)
        y, after = twin_of(record, layer, inputs)
        output = record.call(layer, *inputs)
        assert output.dtype == dtype
        assert output.shape == y.shape
        assert_near("y", output, y, 400)
        for name, value in after.items():
            assert_near(name, layer.get_buffer(name), value, 400)


def objective(record: Record, layer: nn.Module, dy: np.ndarray, base: tuple[np.ndarray, ...]) -> Any:
    """Σ dy·y of the twin, with what joins it, as a function of inputs and state."""
    state, training = state_of(layer), layer.training

    def value(inputs: tuple[np.ndarray, ...], changed: dict[str, np.ndarray]) -> float:
        total = float((dy * record.twin(state | changed, training, inputs, None, base)[0]).sum())
        if training and record.auxiliary is not None:
            total += record.auxiliary(state | changed, base)
        return total

    return value


@every(exact=True)
@MODES
def test_gradients_are_those_of_the_twin(record: Record, training: bool) -> None:
    """Along random directions, inputs and parameters one by one, by central differences of the NumPy twin.

    1e-6 of the largest gradient: a step of 1e-5 leaves 1e-10 of curvature and 1e-11 of rounding, times sums of 100.
    """
    layer = build(record).train(training)
    for seed in (2, 3) if record.running and training else ():  # a memory to look back on
        earlier = inputs_of(record, seed=seed)
        learn(earlier)
        record.call(layer, *earlier)
    inputs = inputs_of(record)
    learn(inputs)
    base = arrays(inputs)
    before = copy.deepcopy(layer)
    output = record.call(layer, *inputs)
    dy = random_like(output)
    output.backward(dy)
    value = objective(record, before, dy.numpy(), base)
    h, generator = 1e-5, np.random.default_rng(3)
    for i, t in enumerate(inputs):
        if t.requires_grad:
            for _ in range(2):
                v = generator.standard_normal(t.shape)
                up, down = (tuple(a + s * h * v if j == i else a for j, a in enumerate(base)) for s in (1, -1))
                check_slope(f"input {i}", t.grad, v, (value(up, {}) - value(down, {})) / (2 * h))
    state = state_of(before)
    for name, p in layer.named_parameters():
        v = generator.standard_normal(p.shape)
        up, down = ({name: state[name] + s * h * v} for s in (1, -1))
        slope = (value(base, up) - value(base, down)) / (2 * h)
        check_slope(name, torch.zeros_like(p) if p.grad is None else p.grad, v, slope)


def check_slope(name: str, gradient: Tensor, v: np.ndarray, slope: float) -> None:
    ours = float((gradient.numpy() * v).sum())
    scale = float(np.abs(gradient.numpy() * v).sum()) + 1
    assert abs(ours - slope) <= 1e-6 * scale, f"{name}: {ours} along a direction, the twin has {slope}"


@every(exact=True)
def test_gradcheck(record: Record) -> None:
    """torch's own check of the evaluated layer, and of its second derivative; in training where nothing is constant."""
    for training in (True, False):
        constant = record.auxiliary or record.name in ("BatchRenorm", "CrossIterationBatchNorm")
        if training and constant:
            continue
        layer = build(record).train(training)
        inputs = inputs_of(record, rank=record.ranks[0])
        learn(inputs)

        def once(*inputs: Tensor, layer: nn.Module = layer) -> Tensor:
            return record.call(copy.deepcopy(layer), *inputs)

        assert torch.autograd.gradcheck(once, inputs, fast_mode=True)
        if record.double or not training:
            assert torch.autograd.gradgradcheck(once, inputs, fast_mode=True)


@every(residual=True)
@MODES
def test_residual_and_activation(record: Record, training: bool) -> None:
    layer = build(record, activation="silu").train(training)
    inputs = inputs_of(record)
    learn(inputs)
    y, _ = twin_of(record, layer, inputs)
    residual = random_like(torch.from_numpy(y))
    silu, _ = ACTIVATIONS["silu"]
    assert_near("y", record.call(layer, *inputs, residual=residual), silu(y + residual.numpy()), 1000)


# --- masks, empty batches -------------------------------------------------------------------------------------------


def mask_for(record: Record, shape: torch.Size) -> Tensor:
    """A tenth of the cells left out; of one sample all, of another all but one position."""
    whole = list(shape)
    whole[record.axis] = 1
    mask = (
        torch.rand(whole if record.whole or record.axis < 0 else shape, generator=torch.Generator().manual_seed(1))
        > 0.1
    )
    mask[0] = False
    return mask


@every(mask=True)
@MODES
def test_masked_cells_take_no_part(record: Record, training: bool) -> None:
    """NaN outside the mask reaches no statistic and no gradient; those cells come out 0, residual included."""
    layer = build(record).train(training)
    inputs = inputs_of(record)
    mask = mask_for(record, inputs[0].shape)
    inputs[0] = torch.where(mask, inputs[0], 0)
    y, after = twin_of(record, layer, inputs, mask)
    behind = record.call.__name__ == "call_behind"
    if not behind:  # else a matrix product would spread the NaN
        inputs[0] = torch.where(mask, inputs[0], float("nan"))
    learn(inputs)
    output = record.call(layer, *inputs, mask=mask)
    assert_near("y", output, y, 1000)
    for name, value in after.items():
        assert_near(name, layer.get_buffer(name), value, 1000)
    output.backward(random_like(output))
    for t in [*inputs, *layer.parameters()]:
        assert t.grad is None or t.grad.isfinite().all()
    if not behind:
        assert inputs[0].grad.masked_select(~mask.expand(inputs[0].shape)).eq(0).all()


@every(mask=True)
def test_a_mask_without_cells_moves_nothing(record: Record) -> None:
    layer = build(record)
    inputs = inputs_of(record)
    shape = list(inputs[0].shape)
    del shape[record.axis]
    before = state_of(layer)
    output = record.call(layer, *inputs, mask=torch.zeros(shape, dtype=torch.bool))
    assert output.eq(0).all()
    for name in record.running:
        assert np.array_equal(before[name], state_of(layer)[name]), name


@every()
@MODES
def test_empty_batch(record: Record, training: bool) -> None:
    layer = build(record).train(training)
    inputs = inputs_of(record)
    size = len(inputs[0])
    inputs = [t[:0] if len(t) == size else t for t in inputs]
    learn(inputs)
    before = state_of(layer)
    output = record.call(layer, *inputs)
    assert output.shape[0] == 0
    for name in record.running:
        assert np.array_equal(before[name], state_of(layer)[name]), name
    output.backward(torch.empty_like(output))
    for t in [*inputs, *layer.parameters()]:
        assert t.grad is None or (t.grad.shape == t.shape and t.grad.eq(0).all())


# --- modes and state ------------------------------------------------------------------------------------------------


@every()
def test_evaluation_does_not_depend_on_the_batch(record: Record) -> None:
    layer = build(record).eval()
    inputs = inputs_of(record)
    size = len(inputs[0])
    before = state_of(layer)
    whole = record.call(layer, *inputs)
    alone = record.call(layer, *(t[1:2] if len(t) == size else t for t in inputs))
    assert_near("sample 1", alone, whole[1:2].detach().numpy(), 10)
    assert all(np.array_equal(value, state_of(layer)[name]) for name, value in before.items())


@every(found=True, running=True)
def test_freeze_and_recalibrate(record: Record) -> None:
    model = nn.ModuleDict({"norm": build(record)})
    inputs = inputs_of(record)
    learn(inputs)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return record.call(model["norm"], *batch)

    report = ns.recalibrate(model, [inputs], forward=forward)
    assert bool(report.changed) == record.measured
    assert record.measured or "whitening matrix" in report.skipped[0][1]
    moved = [n for n in record.running if not np.array_equal(state_of(model)[f"norm.{n}"], state_of(build(record))[n])]
    assert bool(moved) == record.measured
    assert ns.freeze(model).changed
    before = state_of(model.train())
    y = forward(model, inputs)
    assert torch.equal(y, forward(model, inputs))
    assert all(np.array_equal(value, state_of(model)[name]) for name, value in before.items())
    ns.unfreeze(model)
    forward(model, inputs)
    assert any(not np.array_equal(before[f"norm.{n}"], state_of(model)[f"norm.{n}"]) for n in record.running)


@every()
def test_copies_and_checkpoints(record: Record) -> None:
    layer = build(record, torch.float32)
    inputs = inputs_of(record, dtype=torch.float32)
    learn(inputs)
    record.call(layer, *inputs)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = record.build()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert repr(twin) == repr(layer)
        assert torch.equal(record.call(copy.deepcopy(twin), *inputs), record.call(copy.deepcopy(layer), *inputs))
    pristine = record.build().state_dict()
    layer.reset_parameters() if hasattr(layer, "reset_parameters") else None
    if not any(True for _ in layer.children()) and not isinstance(layer, ns.nn.FrozenBatchNorm):
        for name, value in layer.state_dict().items():
            if not name.startswith("past"):  # what is no longer remembered
                assert torch.equal(value, pristine[name]), name


@every()
def test_repr_builds_the_layer(record: Record) -> None:
    layer = record.build()
    if not any(True for _ in layer.children()):
        rebuilt = eval(f"ns.nn.{layer!r}")
        assert repr(rebuilt) == repr(layer)
        assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {
            n: t.shape for n, t in layer.state_dict().items()
        }


@every(running=True)
def test_momentum_none_is_the_mean_of_all_batches(record: Record) -> None:
    """Against the statistics that each batch alone leaves; 1/3 in float32 would be wrong by 1e-8."""
    if not hasattr(build(record), "momentum") or record.exact is False or "Ghost" in record.name:
        return  # no momentum of their own, a decay instead, several steps per batch
    cumulative, single = build(record, momentum=None), build(record, momentum=1.0)
    names = [n for n in record.running if n.startswith("running")]
    seen = []
    for seed in range(3):
        inputs = inputs_of(record, seed=seed)
        record.call(single, *inputs)
        record.call(cumulative, *inputs)
        seen.append({n: single.get_buffer(n).clone() for n in names})
    for n in names:
        torch.testing.assert_close(
            cumulative.get_buffer(n), torch.stack([s[n] for s in seen]).mean(0), rtol=1e-13, atol=1e-13
        )


@every()
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_nothing_or_is_refused(record: Record, reentrant: bool) -> None:
    """Output, gradients and buffers of two steps; what depends on state that has moved raises, and names itself."""
    layers = [Called(record, build(record)) for _ in range(2)]
    results: list[list[Tensor | None]] = [[], []]
    for seed in range(2):
        for layer, result in zip(layers, results, strict=True):
            inputs = inputs_of(record, seed=seed)
            learn(inputs)
            if layer is layers[0]:
                output = layer(*inputs)
            elif record.again:
                output = checkpoint(layer, *inputs, use_reentrant=reentrant)
            else:
                with pytest.raises(ns.RecomputationError, match=rf"layer: layer \({record.cls.__name__}\)"):
                    checkpoint(layer, *inputs, use_reentrant=reentrant).sum().backward()
                continue
            output.backward(random_like(output))
            result.extend([output, *(t.grad for t in inputs if t.is_floating_point())])
            result.extend([*(p.grad for p in layer.parameters()), *(b.clone() for b in layer.buffers())])
    for mine, truth in zip(results[1], results[0], strict=record.again):
        assert (mine is None) == (truth is None)
        # Reentrant ones run without a graph: there the kernels serve layers that compute their own moments, where
        # torch's operators do with one, and round otherwise.
        rounding = 1e-13 if reentrant else 0.0
        assert mine is None or torch.allclose(mine, truth, rtol=rounding, atol=rounding)


# --- layouts and offsets --------------------------------------------------------------------------------------------


FORMATS = [
    pytest.param(r, rank, memory_format, id=f"{r}-{rank}d")
    for r in RECORDS
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d))
    if rank in r.ranks and r.axis == 1 and r.call.__name__ != "call_behind"
]


@pytest.mark.parametrize(("record", "rank", "memory_format"), FORMATS)
@MODES
def test_the_memory_format_is_kept(
    record: Record, rank: int, memory_format: torch.memory_format, training: bool
) -> None:
    layer = build(record).train(training)
    inputs = inputs_of(record, rank)
    truth = record.call(copy.deepcopy(layer), *inputs)
    inputs[0] = inputs[0].contiguous(memory_format=memory_format)
    output = record.call(layer, *inputs)
    assert output.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(output, truth, rtol=1e-10, atol=1e-10)


@every()
@MODES
def test_as_accurate_at_8000_sigma(record: Record, training: bool) -> None:
    """float32 against the same layer in float64, of the same float32 numbers; a rounded mean costs 1e-4.

    Running means are given as float32 numbers, too: their own rounding is not what is measured.
    """
    if "DynamicTanh" in record.name or record.name == "GlobalResponseNorm":
        return  # saturated, and a product with x: nothing is taken away from an offset
    errors = []
    for offset in (0.0, 8000.0):
        layer = build(record, torch.float32).train(training)
        with torch.no_grad():
            for name, b in layer.named_buffers():
                if name.endswith("running_mean"):
                    b.copy_(torch.round(b * 256) / 256 + offset)
        for seed in range(2):
            inputs = inputs_of(record, seed=seed)
            behind = record.call.__name__ == "call_behind"
            # Small dyadic steps, exact in float32 there, as are their products.
            inputs[0] = torch.round(inputs[0] * (16 if behind else 256)) / (16 if behind else 256)
            if behind:  # a feature that is 1 everywhere brings the offset
                inputs[0][:, 0] = 1
                inputs[1] = torch.round(inputs[1] * 16) / 16
                inputs[1][:, 0] += offset
            else:
                inputs[0] += offset
            wide = copy.deepcopy(layer).double()
            pair = [[t.clone().to(d) if t.is_floating_point() else t for t in inputs] for d in WIDE]
            for given in pair:
                learn(given)
            truth, mine = record.call(wide, *pair[1]), record.call(layer, *pair[0])
            gy = random_like(truth)
            truth.backward(gy)
            mine.backward(gy.float())
            made = [(mine.detach(), truth.detach()), (pair[0][0].grad, pair[1][0].grad)]
        errors.append([float((a.double() - b).abs().max() / b.abs().max()) for a, b in made])
    for at_0, away in zip(*errors, strict=True):
        assert away <= 3 * max(at_0, 2**-22), errors


# --- compilers ------------------------------------------------------------------------------------------------------


def one_step(call: Any, layers: dict[str, nn.Module], inputs: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of all layers."""
    inputs = {name: [t.detach().clone() for t in given] for name, given in inputs.items()}
    for name, given in inputs.items():
        learn(given)
        layers[name].zero_grad()
    outputs = call(inputs)
    torch.autograd.backward(list(outputs.values()), [random_like(y) for y in outputs.values()])
    result = {name: y.detach() for name, y in outputs.items()}
    for name, layer in layers.items():
        result |= {f"{name}, input {i}": t.grad for i, t in enumerate(inputs[name]) if t.requires_grad}
        result |= {f"{name}, {key}": p.grad for key, p in layer.named_parameters()}
        result |= {f"{name}, {key}": b.clone() for key, b in layer.named_buffers()}
    return result


# Those that training does not move in a single graph, because each graph costs half a second.
GRAPHS = [
    pytest.param([r for r in RECORDS if r.documented and not r.running], False, id="eval"),
    *(pytest.param([r], True, id=f"train-{r}") for r in RECORDS if r.documented and r.running),
]


@DYNAMO
@pytest.mark.parametrize(("records", "training"), GRAPHS)
def test_compile_in_one_graph(records: list[Record], training: bool) -> None:
    """In training with AOTAutograd, which may compute a backward from buffers that have moved by then."""
    torch.compiler.reset()
    layers = {r.name: build(r, torch.float32).train(training) for r in records}
    compiled = copy.deepcopy(layers)

    def forward(layers: dict[str, nn.Module], inputs: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {r.name: r.call(layers[r.name], *inputs[r.name]) for r in records}

    backend = "aot_eager" if training else "eager"
    call = torch.compile(lambda inputs: forward(compiled, inputs), backend=backend, fullgraph=True)
    for seed in range(2):
        inputs = {r.name: inputs_of(r, 4, seed, torch.float32) for r in records}
        expected = one_step(lambda given: forward(layers, given), layers, inputs)
        # Cross-iteration BatchNorm asks for gradients of its statistics.
        with torch._dynamo.config.patch(trace_autograd_ops=training):
            mine = one_step(call, compiled, inputs)
        for name, value in expected.items():
            assert (mine[name] is None) == (value is None), name
            if value is not None:
                assert_near(name, mine[name].float(), value.double().numpy(), 2000)


class Called(nn.Module):
    def __init__(self, record: Record, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.function = layer, record.call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.layer, *inputs)


@TORCH_EXPORTS
@every()
def test_exports_to_aten(record: Record) -> None:
    model = Called(record, build(record, torch.float32)).eval()
    inputs = inputs_of(record, dtype=torch.float32)
    program = torch.export.export(model, tuple(inputs))
    for node in program.graph.nodes:
        if node.op == "call_function" and "getitem" not in str(node.target):
            assert node.target.namespace == "aten", node.target
    assert_near("y", program.module()(*inputs), model(*inputs).detach().numpy(), 100)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@every(wide=False)
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_half_width_layers(record: Record, dtype: torch.dtype) -> None:
    """Everything in half width: what is rounded are inputs, state and outputs, not the arithmetic."""
    layer = build(record, torch.float32).to(dtype).train()
    inputs = inputs_of(record, dtype=dtype)
    y, _ = twin_of(record, layer, inputs)
    output = record.call(layer, *inputs)
    assert output.dtype == dtype
    assert_near("y", output, y, 400)


@every()
def test_autocast_leaves_the_dtype(record: Record) -> None:
    layer = build(record, torch.float32)
    inputs = inputs_of(record, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = record.call(layer, *inputs)
    behind = record.call.__name__ == "call_behind"  # autocast multiplies in bfloat16 before it
    assert output.dtype == (torch.bfloat16 if behind else torch.float32)
    assert output.isfinite().all()


# --- errors ---------------------------------------------------------------------------------------------------------


@every()
def test_a_wrong_input_names_the_layer(record: Record) -> None:
    model = Called(record, record.build())
    inputs = inputs_of(record, dtype=torch.float32)
    if record.call.__name__ == "call_behind":
        inputs[1] = inputs[1][:-1]
    else:
        inputs[0] = inputs[0].narrow(record.axis, 0, inputs[0].shape[record.axis] - 1)
    with pytest.raises(ns.ShapeError, match="layer: layer") as caught:
        model(*inputs)
    assert "cure: " in str(caught.value)
    with pytest.raises(TypeError):
        record.build(epss=1.0)


REFUSED = [pytest.param(r, *case, id=f"{r}-{next(iter(case[0]))}") for r in RECORDS for case in r.refused]


@pytest.mark.parametrize(("record", "options", "error", "sentence"), REFUSED)
def test_a_wrong_option_is_refused(
    record: Record, options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    arguments = {"num_features": 6} | options
    required = {
        "GhostBatchNorm": {"ghost_size": 3},
        "SplitBatchNorm": {"num_domains": 2},
        "SPADE": {"label_channels": 2},
    }
    for name, needed in required.items():
        if record.name.startswith(name):
            arguments = needed | arguments
    if "DynamicTanh" in record.name:
        arguments = {"channels_last": False} | options
    with pytest.raises(error) as caught:
        record.cls(**arguments)
    assert sentence in str(caught.value).splitlines()[0]


def test_every_layer_has_a_record() -> None:
    """The drop-ins and `Norm` have tests of their own."""
    field = {"channels", "conditional", "estimators", "response", "scoped", "streaming", "whitening"}
    modules = {name: getattr(ns.nn, name).__module__.rsplit(".", 1)[1] for name in ns.nn.__all__}
    assert {n for n, m in modules.items() if m in field} == {r.cls.__name__ for r in RECORDS}


def test_the_table_in_the_docs_is_up_to_date() -> None:
    script = Path(__file__).parents[2] / "scripts" / "normalizers.py"
    result = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + "; run: python scripts/normalizers.py"
