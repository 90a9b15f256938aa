"""Our layers in the place of torch's: state, signatures, modes, tools, dtypes, and the three added arguments."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fusion
from torch_cases import (
    FUNCTIONS,
    LAYERS,
    LAZY,
    ROUNDINGS,
    compare_layers,
    eps_of,
    largest,
    random_like,
    randomized,
    step,
)

import normscope as ns

# Layer → inputs it takes, and the option combinations that give it another state or another formula.
SHAPES = {
    "BatchNorm1d": ((4, 6), (4, 6, 5)),
    "BatchNorm2d": ((4, 6, 3, 5),),
    "BatchNorm3d": ((3, 6, 2, 3, 2),),
    "InstanceNorm1d": ((4, 6, 5), (6, 5)),
    "InstanceNorm2d": ((4, 6, 3, 5), (6, 3, 5)),
    "InstanceNorm3d": ((3, 6, 2, 3, 2), (6, 2, 3, 2)),
    "GroupNorm": ((4, 6), (4, 6, 5), (4, 6, 3, 5)),
    "LayerNorm": ((6,), (4, 6), (4, 3, 6)),
    "RMSNorm": ((6,), (4, 6), (4, 3, 6)),
}
TRACKING = [name for name in LAYERS if name[-1] == "d"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    **{
        name: [
            {},
            {"affine": True, "track_running_stats": True},
            {"affine": True, "bias": False, "track_running_stats": True},
            {"affine": False, "track_running_stats": True},
            {"affine": True, "track_running_stats": False},
            {"affine": False, "track_running_stats": False},
            {"eps": 0.1, "momentum": 0.4, "track_running_stats": True},
            {"momentum": 0.0, "track_running_stats": True},
        ]
        for name in TRACKING
    },
    "GroupNorm": [{}, {"affine": False}, {"bias": False}, {"eps": 0.1}],
    "LayerNorm": [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}],
    "RMSNorm": [{}, {"elementwise_affine": False}, {"eps": 0.1}],
}


def channels(layer: str) -> dict[str, Any]:
    if layer == "GroupNorm":
        return {"num_groups": 3, "num_channels": 6}
    return {"num_features": 6} if layer[-1] == "d" else {"normalized_shape": 6}


def label(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


COMBINATIONS = [
    pytest.param(layer, options, id=f"{layer}({label(options)})") for layer in LAYERS for options in OPTIONS[layer]
]


def pair(layer: str, seed: int = 5, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's, with equal random state."""
    arguments = channels(layer) | options
    mine, peer = (randomized(getattr(namespace, layer)(**arguments), seed) for namespace in (ns.nn, nn))
    return mine, peer


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator) + 1).to(dtype).requires_grad_()


def assert_same_state(mine: nn.Module, peer: nn.Module) -> None:
    ours, theirs = mine.state_dict(), peer.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


# --- signatures, repr, classes ---------------------------------------------------------------------------------------


def shown(parameters: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in parameters]


@pytest.mark.parametrize("layer", [*LAYERS, *LAZY])
def test_constructor_is_torchs_plus_activation(layer: str) -> None:
    """torch's lazy layers take `bias` too; all parameters keep their order, kind and default."""
    mine, peer = (
        list(inspect.signature(getattr(namespace, layer).__init__).parameters.values()) for namespace in (ns.nn, nn)
    )
    assert shown(mine[:-1]) == shown(peer)
    assert shown(mine[-1:]) == [("activation", inspect.Parameter.KEYWORD_ONLY, None)]


@pytest.mark.parametrize("layer", [*LAYERS, *LAZY])
def test_forward_takes_the_input_then_residual_and_mask(layer: str) -> None:
    own = list(inspect.signature(getattr(ns.nn, layer).forward).parameters.values())
    theirs = list(inspect.signature(getattr(nn, layer).forward).parameters)
    assert [p.name for p in own] == [*theirs, "residual", "mask"]
    assert [p.default for p in own[2:]] == [None, None]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_have_torchs_signature_plus_three_keywords(function: str) -> None:
    mine = list(inspect.signature(getattr(ns.functional, function)).parameters.values())
    peer = list(inspect.signature(getattr(F, function)).parameters.values())
    assert shown(mine[: len(peer)]) == shown(peer)
    extra = [(name, inspect.Parameter.KEYWORD_ONLY, None) for name in ("activation", "residual", "mask")]
    assert shown(mine[len(peer) :]) == extra


@pytest.mark.parametrize(("layer", "options"), COMBINATIONS)
def test_class_repr_attributes_and_initial_state(layer: str, options: dict[str, Any]) -> None:
    arguments = channels(layer) | options
    mine, peer = getattr(ns.nn, layer)(**arguments), getattr(nn, layer)(**arguments)
    assert isinstance(mine, getattr(nn, layer))
    assert type(mine).__name__ == layer
    assert repr(mine) == repr(peer)
    assert_same_state(mine, peer)
    assert type(mine)._version == type(peer)._version
    for name in type(peer).__constants__:
        assert getattr(mine, name) == getattr(peer, name)
    for kind in ("_parameters", "_buffers"):  # also those registered as None
        assert [(k, v is None) for k, v in getattr(mine, kind).items()] == [
            (k, v is None) for k, v in getattr(peer, kind).items()
        ]
    randomized(mine, 3)
    mine.reset_parameters()
    assert_same_state(mine, peer)


@pytest.mark.parametrize("layer", LAYERS)
def test_repr_shows_an_activation(layer: str) -> None:
    mine = getattr(ns.nn, layer)(**channels(layer), activation="relu")
    plain = getattr(nn, layer)(**channels(layer))
    assert repr(mine) == repr(plain)[:-1] + ", activation='relu')"
    assert mine.activation == "relu"


@pytest.mark.parametrize("layer", LAYERS)
def test_unknown_activation_and_misspelt_option(layer: str) -> None:
    with pytest.raises(ns.errors.ArgumentError, match="reluu"):
        getattr(ns.nn, layer)(**channels(layer), activation="reluu")
    with pytest.raises(TypeError, match="momentun"):
        getattr(ns.nn, layer)(**channels(layer), momentun=0.2)


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "options"), COMBINATIONS)
def test_state_dict_goes_both_ways(layer: str, options: dict[str, Any]) -> None:
    mine, peer = pair(layer, **options)
    for source, target in ((mine, peer), (peer, mine)):
        randomized(source, 8)
        assert not any(target.load_state_dict(source.state_dict(), strict=True))
        assert_same_state(mine, peer)


@pytest.mark.parametrize("layer", TRACKING)
def test_version_1_checkpoints_without_the_counter(layer: str) -> None:
    """Before torch 0.4.1 no checkpoint held num_batches_tracked; loading one must not demand it."""
    mine, peer = pair(layer, track_running_stats=True)
    for version in (None, 1):
        old = peer.state_dict()
        del old["num_batches_tracked"]
        old._metadata[""] = {} if version is None else {"version": version}
        mine.num_batches_tracked.fill_(4)
        assert not any(mine.load_state_dict(old, strict=True))
        assert int(mine.num_batches_tracked) == 4
    missing = peer.state_dict()
    del missing["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        mine.load_state_dict(missing, strict=True)


@pytest.mark.parametrize("layer", [name for name in TRACKING if name.startswith("Instance")])
def test_version_0_checkpoints_with_stray_running_statistics(layer: str) -> None:
    mine, peer = pair(layer)
    old = pair(layer, track_running_stats=True)[1].state_dict()
    messages = []
    for module in (mine, peer):
        state = copy.copy(old)
        state._metadata = {"": {}}
        with pytest.raises(RuntimeError) as caught:
            module.load_state_dict(state, strict=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(("layer", "options"), COMBINATIONS)
def test_pickle_deepcopy_and_save(layer: str, options: dict[str, Any]) -> None:
    mine = randomized(getattr(ns.nn, layer)(**channels(layer), **options, activation="silu"), 5)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    x = data(*SHAPES[layer][0])
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
        assert type(twin) is type(mine)
        assert repr(twin) == repr(mine)
        assert_same_state(twin, mine)
        assert not {t.data_ptr() for t in twin.state_dict().values()} & {
            t.data_ptr() for t in mine.state_dict().values()
        }
        assert torch.equal(copy.deepcopy(twin)(x), copy.deepcopy(mine)(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_weights_only_checkpoint(layer: str) -> None:
    mine, peer = pair(layer)
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    randomized(peer, 9).load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(mine, peer)


# --- behaviour --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "options"), COMBINATIONS)
def test_three_steps_in_both_modes(layer: str, options: dict[str, Any]) -> None:
    """Train, train, evaluate: the second step sees what the first one left, the third uses it."""
    for shape in SHAPES[layer]:
        mine, peer = pair(layer, **options)
        for seed, training in enumerate((True, True, False)):
            compare_layers(mine.train(training), peer.train(training), data(*shape, seed=seed))


def set_running_mean_to_none(m: Any) -> None:
    m.running_mean = None


def set_both_to_none(m: Any) -> None:
    m.running_mean = m.running_var = None


def set_counter_to_none(m: Any) -> None:
    m.num_batches_tracked = None


def set_weight_to_none(m: Any) -> None:
    m.weight = None


MUTATIONS = {
    "momentum": lambda m: setattr(m, "momentum", 0.9),
    "eps": lambda m: setattr(m, "eps", 0.7),
    "not-tracking": lambda m: setattr(m, "track_running_stats", False),
    "no-running-mean": set_running_mean_to_none,
    "no-running-statistics": set_both_to_none,
    "no-counter": set_counter_to_none,
    "reset": lambda m: m.reset_running_stats(),
    "new-running-var": lambda m: m.running_var.mul_(3.0),
    "no-weight": set_weight_to_none,
    "frozen": lambda m: m.requires_grad_(False),
}


def outcome(layer: nn.Module, x: Tensor) -> tuple[type, str] | None:
    """The error that a call raises on a copy, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy.deepcopy(layer)(x)
    except Exception as error:  # whichever torch raises
        return type(error), str(error).splitlines()[0]
    return None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm2d", "InstanceNorm1d"])
def test_attributes_changed_by_hand(layer: str, mutation: str, training: bool) -> None:
    """Users set attributes after construction and expect them to act; where torch then raises, so does ours."""
    mine, peer = pair(layer, affine=True, track_running_stats=True)
    for module in (mine, peer):
        MUTATIONS[mutation](module)
        module.train(training)
    x = data(*SHAPES[layer][-1 if layer == "BatchNorm1d" else 0])
    raised, expected = outcome(mine, x), outcome(peer, x)
    if expected is not None:
        assert raised is not None, f"torch raises {expected}"
        assert issubclass(raised[0], expected[0])
        assert expected[1] in raised[1]
    elif mutation == "frozen":
        x = x.detach()
        y = mine(x)
        torch.testing.assert_close(y, peer(x), rtol=1e-5, atol=1e-5)
        assert not y.requires_grad
        assert_buffers_close(mine, peer, steps=2)
    else:
        compare_layers(mine, peer, x)
        compare_layers(mine, peer, x)


def assert_buffers_close(mine: nn.Module, peer: nn.Module, steps: int) -> None:
    """Equal to some roundings per step, in units of the largest value."""
    for name, buffer in peer.named_buffers():
        if buffer.is_floating_point():
            bound = ROUNDINGS * steps * eps_of(buffer.dtype) * max(largest(buffer), 1.0)
            torch.testing.assert_close(mine.get_buffer(name), buffer, rtol=0, atol=bound)


@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_cumulative_average(layer: str) -> None:
    """momentum=None: after k batches the buffers hold the plain mean of the k batch statistics."""
    mine, peer = (m.train() for m in pair(layer, momentum=None))
    means, variances = [], []
    for seed in range(4):
        x = data(*SHAPES[layer][0], seed=seed).detach() * (seed + 1)
        axes = [a for a in range(x.dim()) if a != 1]
        means.append(x.double().mean(axes))
        variances.append(x.double().var(axes, correction=1))
        compare_layers(mine, peer, x.requires_grad_())
    for buffer, values in ((mine.running_mean, means), (mine.running_var, variances)):
        mean = torch.stack(values).mean(0)
        # four float32 updates, each rounded to half an ulp of the largest value
        torch.testing.assert_close(buffer.double(), mean, rtol=0, atol=4 * eps_of(torch.float32) * largest(mean))
    assert int(mine.num_batches_tracked) == 4


@pytest.mark.parametrize("layer", ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"])
def test_cumulative_average_of_instance_norm(layer: str) -> None:
    """Torch's InstanceNorm never learns with momentum=None (its weight is 0); ours averages as BatchNorm does."""
    mine = pair(layer, momentum=None, affine=True, track_running_stats=True)[0].train()
    means = []
    for seed in range(3):
        x = data(*SHAPES[layer][0], seed=seed).detach()
        means.append(x.double().mean([a for a in range(x.dim()) if a != 1]))
        mine(x)
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(
        mine.running_mean.double(), expected, rtol=0, atol=4 * eps_of(torch.float32) * largest(expected)
    )
    assert int(mine.num_batches_tracked) == 3


@pytest.mark.parametrize("layer", ["InstanceNorm1d", "InstanceNorm2d"])
def test_wrong_num_features_without_affine_warns_as_torch_does(layer: str) -> None:
    x = data(*SHAPES[layer][0]).detach()
    texts = []
    for namespace in (ns.nn, nn):
        with pytest.warns(UserWarning, match="does not match num_features") as caught:
            getattr(namespace, layer)(4)(x)
        texts.append(str(caught[0].message))
        assert caught[0].category is UserWarning
    assert texts[0] == texts[1]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("BatchNorm1d", (0, 6)),
        ("BatchNorm1d", (0, 6, 5)),
        ("BatchNorm2d", (0, 6, 3, 3)),
        ("BatchNorm2d", (2, 6, 0, 3)),
        ("BatchNorm3d", (0, 6, 2, 2, 2)),
        ("InstanceNorm1d", (0, 6, 5)),
        ("InstanceNorm2d", (0, 6, 3, 3)),
        ("InstanceNorm1d", (2, 6, 0)),
        ("GroupNorm", (0, 6)),
        ("GroupNorm", (0, 6, 4)),
        ("GroupNorm", (2, 6, 0)),
        ("LayerNorm", (0, 6)),
        ("LayerNorm", (3, 0, 6)),
        ("RMSNorm", (0, 6)),
    ],
)
def test_empty_input(layer: str, shape: tuple[int, ...], training: bool) -> None:
    """Torch's shapes and running statistics; every gradient is an empty sum, 0.

    Torch's GroupNorm has NaN for γ and β where the maps are empty and the batch is not.
    """
    options = {"track_running_stats": True} if layer.startswith("Batch") else {}
    mine, peer = (m.train(training) for m in pair(layer, **options))
    got, expected = step(mine, data(*shape), 7), step(peer, data(*shape), 7)
    assert list(got) == list(expected)
    for name, value in got.items():
        assert value.shape == expected[name].shape
        wanted = torch.zeros_like(value) if name.startswith("gradient") else expected[name]
        assert torch.equal(value, wanted), f"{name} is {value}"


@pytest.mark.parametrize("layer", LAZY)
def test_lazy_layers_before_and_after_the_first_call(layer: str) -> None:
    mine, peer = getattr(ns.nn, layer)(momentum=0.3, bias=False), getattr(nn, layer)(momentum=0.3, bias=False)
    assert repr(mine) == repr(peer)
    assert isinstance(mine, getattr(nn, layer))
    assert mine.has_uninitialized_params()
    assert list(mine.state_dict()) == list(peer.state_dict())
    x = data(*SHAPES[layer.removeprefix("Lazy")][0]).detach()
    mine(x), peer(x)
    assert type(mine) is getattr(ns.nn, layer.removeprefix("Lazy"))
    assert repr(mine) == repr(peer)
    assert list(mine.state_dict()) == list(peer.state_dict())
    assert mine.weight.shape == (6,)
    assert_buffers_close(mine, peer, steps=1)


def test_lazy_layer_keeps_its_activation_and_loads_a_checkpoint() -> None:
    lazy = ns.nn.LazyBatchNorm2d(activation="relu")
    source = randomized(nn.BatchNorm2d(6), 4)
    lazy.load_state_dict(source.state_dict())
    x = data(4, 6, 3, 5).detach()
    torch.testing.assert_close(lazy(x), source(x).relu(), rtol=1e-5, atol=1e-5)
    assert type(lazy) is ns.nn.BatchNorm2d
    assert lazy.activation == "relu"


# --- torch's own tools ----------------------------------------------------------------------------------------------


def convnet(namespace: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        namespace.BatchNorm2d(8, momentum=0.2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, bias=False),
        namespace.BatchNorm2d(4, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        namespace.BatchNorm1d(4),
    )


def test_update_bn() -> None:
    batches = [data(5, 3, 8, 8, seed=seed).detach() for seed in range(3)]
    models = [convnet(namespace) for namespace in (ns.nn, nn)]
    for model in models:
        torch.optim.swa_utils.update_bn(batches, model.train())
    assert [m.momentum for m in models[0] if hasattr(m, "momentum")] == [0.2, 0.1, 0.1]
    assert_buffers_close(*models, steps=10)  # the statistics of the last layer carry the errors of the whole net
    assert int(models[0][1].num_batches_tracked) == 3


def test_replace_all_batch_norm_modules() -> None:
    mine, peer = (torch.func.replace_all_batch_norm_modules_(convnet(namespace)) for namespace in (ns.nn, nn))
    for module in mine.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert not module.track_running_stats
            assert module.running_mean is None
            assert module.num_batches_tracked is None
    x = data(5, 3, 8, 8).detach()
    torch.testing.assert_close(mine(x), peer(x), rtol=1e-4, atol=1e-4)  # three layers of float32


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("transpose", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=label)
def test_fuse_conv_bn_eval(dim: int, transpose: bool, options: dict[str, Any]) -> None:
    name = f"Conv{'Transpose' if transpose else ''}{dim}d"
    torch.manual_seed(2)
    conv = getattr(nn, name)(3, 6, 3)
    mine, peer = (m.eval() for m in pair(f"BatchNorm{dim}d", **options))
    fused, expected = (fusion.fuse_conv_bn_eval(conv.eval(), bn, transpose) for bn in (mine, peer))
    assert_same_state(fused, expected)
    x = data(2, 3, *[5] * dim).detach()
    torch.testing.assert_close(fused(x), mine(conv(x)), rtol=1e-4, atol=1e-4)  # sums of up to 81 float32 products


def test_fuse_linear_bn_eval() -> None:
    linear = nn.Linear(5, 6)
    mine, peer = (m.eval() for m in pair("BatchNorm1d"))
    fused, expected = (fusion.fuse_linear_bn_eval(linear.eval(), bn) for bn in (mine, peer))
    assert_same_state(fused, expected)


def test_averaged_model_and_parametrization() -> None:
    """EMA of buffers and a parametrized weight work as with torch's layer."""
    models = [nn.Sequential(namespace.BatchNorm1d(6)) for namespace in (ns.nn, nn)]
    averaged = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in models]
    for seed in range(2):
        for model, average in zip(models, averaged, strict=True):
            model(data(4, 6, seed=seed).detach())
            average.update_parameters(model)
    assert_buffers_close(*averaged, steps=2)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    mine, peer = pair("LayerNorm")
    for module in (mine, peer):
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    x = data(4, 6).detach()
    torch.testing.assert_close(mine(x), peer(x), rtol=1e-5, atol=1e-5)


def test_a_subclass_of_ours() -> None:
    """Subclasses override _check_input_dim, as those of torch's layers do, and keep their attributes in a copy."""

    class AnyNorm(ns.nn.BatchNorm2d):
        def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
            if input.dim() < 2:
                raise ValueError("two axes at least")

    norm = AnyNorm(6)
    norm.note = "kept"
    assert copy.deepcopy(norm).note == "kept"
    compare_layers(norm, nn.BatchNorm1d(6), data(4, 6))
    with pytest.raises(ValueError, match="two axes at least"):
        norm(data(6))


# --- devices and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "options"), COMBINATIONS)
def test_meta_device_and_dtype_at_construction(layer: str, options: dict[str, Any]) -> None:
    for factory in ({"device": "meta"}, {"dtype": torch.float64}, {"device": "meta", "dtype": torch.bfloat16}):
        mine, peer = (getattr(n, layer)(**channels(layer), **options, **factory) for n in (ns.nn, nn))
        ours, theirs = mine.state_dict(), peer.state_dict()
        assert {k: (v.device, v.dtype, v.shape) for k, v in ours.items()} == {
            k: (v.device, v.dtype, v.shape) for k, v in theirs.items()
        }
    empty = getattr(ns.nn, layer)(**channels(layer), **options, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert_same_state(empty, getattr(nn, layer)(**channels(layer), **options))


@pytest.mark.parametrize("layer", LAYERS)
def test_meta_forward(layer: str) -> None:
    """Shapes without data: what memory planners and lazy initialisation do."""
    for training in (True, False):
        mine = getattr(ns.nn, layer)(**channels(layer), device="meta").train(training)
        x = torch.empty(SHAPES[layer][0], device="meta")
        y = mine(x)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "meta")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_model(layer: str, training: bool) -> None:
    """`.to(torch.bfloat16)` takes the buffers along, as torch does; output and gradients stay bfloat16."""
    options = {"track_running_stats": True} if layer in TRACKING else {}
    for shape in SHAPES[layer]:
        mine, peer = (m.to(torch.bfloat16).train(training) for m in pair(layer, **options))
        y = compare_layers(mine, peer, data(*shape, dtype=torch.bfloat16))
        assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_half_input_and_float32_parameters(layer: str, dtype: torch.dtype, training: bool) -> None:
    """The mixed precision of torch's CPU kernels: output in the input's dtype, gradients of γ, β in float32."""
    options = {"track_running_stats": True} if layer in TRACKING else {}
    for shape in SHAPES[layer]:
        mine, peer = (m.train(training) for m in pair(layer, **options))
        if layer == "RMSNorm":  # torch has no mixed kernel: it warns, and composes operators that round in between
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compare_layers(mine, peer, data(*shape, dtype=dtype))
            continue
        compare_layers(mine, peer, data(*shape, dtype=dtype))


# --- activation, residual, mask --------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": lambda z: F.relu6(z + 3) / 6,  # torch's own gradient is 1/6 rounded to float32, also in float64
}


def gradients(y: Tensor, of: list[Tensor], seed: int = 3) -> list[Tensor]:
    return list(torch.autograd.grad(y, of, random_like(y, seed)))


def assert_all_close(mine: list[Tensor], expected: list[Tensor]) -> None:
    """Float64 compositions of one formula; in sets of two cells (σ² + ε)^−½ is up to 316 and multiplies roundings."""
    assert len(mine) == len(expected)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1000 * eps_of(torch.float64) * max(largest(b), 1.0))


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("layer", LAYERS)
def test_activation_and_residual(layer: str, activation: str | None, residual: bool) -> None:
    """activation(norm(x) + residual), with the gradients of x, the residual, γ and β."""
    for training in (True, False):
        if layer not in TRACKING and not training:
            continue
        options = {"affine": True, "track_running_stats": True} if layer in TRACKING else {}
        mine, peer = (m.double().train(training) for m in pair(layer, **options))
        mine.activation = activation
        for shape in SHAPES[layer]:
            x, r = data(*shape, dtype=torch.float64), data(*shape, seed=9, dtype=torch.float64)
            y = mine(x, residual=r) if residual else mine(x)
            z = peer(x) + r if residual else peer(x)
            z = z if activation is None else ACTIVATIONS[activation](z)
            assert_all_close([y], [z])
            wanted = [x, *([r] if residual else [])]
            assert_all_close(
                gradients(y, wanted + list(mine.parameters())), gradients(z, wanted + list(peer.parameters()))
            )
        assert_buffers_close(mine, peer, steps=2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_take_activation_and_residual(function: str) -> None:
    x, r = data(4, 6, 5, dtype=torch.float64), data(4, 6, 5, seed=1, dtype=torch.float64)
    arguments: tuple[Any, ...] = {
        "batch_norm": (None, None),
        "layer_norm": ((6, 5),),
        "rms_norm": ((5,),),
        "group_norm": (2,),
        "instance_norm": (),
    }[function]
    keywords = {"training": True} if function == "batch_norm" else {}
    y = getattr(ns.functional, function)(x, *arguments, **keywords, activation="gelu", residual=r)
    z = F.gelu(getattr(F, function)(x, *arguments, **keywords) + r)
    assert_all_close([y, *gradients(y, [x, r])], [z, *gradients(z, [x, r])])


def masked_batch_norm(
    layer: nn.Module, x: Tensor, mask: Tensor, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The kept cells of every channel as one column, by plain operators; the rest is zero."""
    axes = [a for a in range(x.dim()) if a != 1]
    shape = [-1 if a == 1 else 1 for a in range(x.dim())]
    keep = mask.expand_as(x)
    count = keep.sum(axes)
    mean = torch.where(keep, x, 0).sum(axes) / count
    centred = x - mean.reshape(shape)
    var = torch.where(keep, centred.square(), 0).sum(axes) / count
    if not training:
        mean, var = layer.running_mean, layer.running_var
        centred = x - mean.reshape(shape)
    y = centred * (var.reshape(shape) + layer.eps).rsqrt() * layer.weight.reshape(shape) + layer.bias.reshape(shape)
    if not training:
        return torch.where(keep, y, 0), None, None
    m = layer.momentum
    return (
        torch.where(keep, y, 0),
        (1 - m) * layer.running_mean + m * mean,
        (1 - m) * layer.running_var + m * var * count / (count - 1),
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", ["full", "without-channels", "broadcast"])
@pytest.mark.parametrize("layer", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_mask_of_batch_norm(layer: str, form: str, training: bool) -> None:
    """Kept cells alone enter the statistics, the gradients and the running buffers; the others come out 0."""
    shape = SHAPES[layer][-1]
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand((*shape[:1], 1, *shape[2:]), generator=generator) < 0.6
    given = {
        "full": torch.rand(shape, generator=generator) < 0.6,
        "without-channels": mask.squeeze(1),
        "broadcast": mask,
    }[form]
    keep = given if form == "full" else mask
    mine, peer = (m.double().train(training) for m in pair(layer))
    x, r = data(*shape, dtype=torch.float64), data(*shape, seed=2, dtype=torch.float64)
    z, mean, var = masked_batch_norm(peer, x, keep, training)
    z = torch.where(keep, F.relu(z + r), 0)
    mine.activation = "relu"
    noisy = torch.where(keep, x, float("nan")).detach().requires_grad_()  # whatever is masked must not leak
    y = mine(noisy, residual=r, mask=given)
    assert_all_close([y], [z])
    assert not y[~keep.expand(shape)].any()
    assert_all_close(gradients(y, [noisy, r, *mine.parameters()]), gradients(z, [x, r, *peer.parameters()]))
    if training:
        assert_all_close([mine.running_mean, mine.running_var], [mean, var])  # type: ignore[list-item]
    assert int(mine.num_batches_tracked) == training


@pytest.mark.parametrize("layer", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d"])
def test_mask_of_batch_independent_layers(layer: str) -> None:
    """With whole trailing cells masked, each sample equals torch's layer on its kept cells alone."""
    shape = {"GroupNorm": (3, 6, 7), "InstanceNorm1d": (3, 6, 7), "InstanceNorm2d": (3, 6, 1, 7)}.get(layer, (3, 7, 6))
    options = {"affine": True} if layer in TRACKING else {}
    mine, peer = (m.double() for m in pair(layer, **options))
    x, r = data(*shape, dtype=torch.float64), data(*shape, seed=2, dtype=torch.float64)
    lengths = (7, 4, 2)
    trailing = layer in ("LayerNorm", "RMSNorm")
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    if layer == "InstanceNorm2d":
        mask = mask[:, None]
    noisy = x.detach().clone()
    parts, inputs = [], []
    for i, n in enumerate(lengths):
        noisy[i, n:] if trailing else noisy[i, ..., n:]
        (noisy[i, n:] if trailing else noisy[i, ..., n:]).fill_(float("nan"))
        part = (x[i : i + 1, :n] if trailing else x[i : i + 1, ..., :n]).detach().requires_grad_()
        own = r[i : i + 1, :n] if trailing else r[i : i + 1, ..., :n]
        inputs.append(part)
        parts.append(torch.tanh(peer(part) + own))
    mine.activation = "tanh"
    noisy.requires_grad_()
    y = mine(noisy, residual=r, mask=mask)
    upstream = random_like(y, 3)
    grads = torch.autograd.grad(y, [noisy, *mine.parameters()], upstream)
    expected_parameters = [torch.zeros_like(p) for p in peer.parameters()]
    for i, (n, part, z) in enumerate(zip(lengths, inputs, parts, strict=True)):
        at = (slice(i, i + 1), slice(None, n)) if trailing else (slice(i, i + 1), ..., slice(None, n))
        rest = (slice(i, i + 1), slice(n, None)) if trailing else (slice(i, i + 1), ..., slice(n, None))
        assert_all_close([y[at]], [z])
        assert not y[rest].any()
        dx, *dp = torch.autograd.grad(z, [part, *peer.parameters()], upstream[at])
        assert_all_close([grads[0][at]], [dx])
        assert not grads[0][rest].any()
        expected_parameters = [a + b for a, b in zip(expected_parameters, dp, strict=True)]
    assert_all_close(list(grads[1:]), expected_parameters)


def test_mask_with_no_cell_or_one_cell() -> None:
    """Masks never raise: no cell kept gives 0 and leaves the running statistics; one cell gives x̂ = 0."""
    norm = randomized(ns.nn.BatchNorm1d(3), 5).train()
    before = copy.deepcopy(norm.state_dict())
    x = data(4, 3)
    mask = torch.zeros(4, dtype=torch.bool)
    y = norm(x, mask=mask)
    assert not y.any()
    assert not gradients(y, [x])[0].any()
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.get_buffer(name), before[name])
    mask[2] = True
    y = norm(x, mask=mask)
    torch.testing.assert_close(y[2], norm.bias.detach(), rtol=0, atol=0)
    assert norm.running_var.isfinite().all()
    assert gradients(y, [x])[0].isfinite().all()


def test_masked_layer_is_the_plain_one_when_all_is_kept() -> None:
    for layer in LAYERS:
        mine, peer = pair(layer, **({"track_running_stats": True} if layer in TRACKING else {}))
        for shape in SHAPES[layer]:
            compare_layers(mine, peer, data(*shape), mask=torch.ones(shape, dtype=torch.bool))
