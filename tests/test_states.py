"""States of other systems: keys, numbers and errors; against the formulas, and against numbers recorded from them.

`scripts/states.py` compares with the systems themselves, where they are installed.
"""

import collections

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normscope as ns
from normscope import states
from normscope.oracle import field
from normscope.oracle.field import Running

# Recorded from Keras 3.15.1 (torch backend), Flax 0.12.8, inplace_abn b50bfe9 and timm 1.0.31, float32.
X = np.array([[0.5, -1.0], [2.0, 0.25], [-1.5, 3.0]], np.float32)
γ, β = np.array([1.5, -0.5], np.float32), np.array([0.25, 1.0], np.float32)
MEAN, VAR = np.array([0.5, -2.0], np.float32), np.array([0.0625, 4.0], np.float32)
KERAS = {"gamma": γ, "beta": β, "moving_mean": MEAN, "moving_variance": VAR}
KERAS_EVALUATION = [[0.25, 0.750031233], [9.178852081, 0.437570274], [-11.655136108, -0.249843836]]
KERAS_TRAINING = [[0.424329072, 1.523598671], [1.993290782, 1.149599552], [-1.667619944, 0.326801777]]
KERAS_MEAN_AFTER, KERAS_VARIANCE_AFTER = [0.498333335, -1.972499967], [0.082430556, 3.987916708]
STDDEV = np.sqrt(VAR + np.float32(1e-3))
RENORM = {**KERAS, "moving_stddev": STDDEV, "renorm_mean": MEAN, "renorm_stddev": STDDEV}
RENORM_TRAINING = [[-0.238506407, 1.187445402], [2.114935875, 0.874984384], [-3.376429796, 0.187570274]]
FLAX = {"params": {"scale": γ, "bias": β}, "batch_stats": {"mean": MEAN, "var": VAR}}
FLAX_EVALUATION = [[0.25, 0.750000298], [9.24928093, 0.437500715], [-11.749040604, -0.24999845]]
FLAX_TRAINING = [[0.424371034, 1.523691416], [1.993710399, 1.149626136], [-1.668081522, 0.326682389]]
IABN = {"weight": γ, "bias": β, "running_mean": MEAN, "running_var": VAR}
IABN_EVALUATION = [[0.25, 1.250004768], [9.249340057, 1.56251061], [-0.117491193, 2.250023603]]
EVONORM_X = [[[[0.5, -1.0]], [[2.0, 0.25]]], [[[-1.5, 3.0]], [[0.0, 1.0]]]]
EVONORM_EVALUATION = [
    [[[0.999500513, -5.702568054]], [[0.500062466, 0.937507808]]],
    [[[-1.249777794, 1.449928999]], [[1.0, 0.750031233]]],
]
# A few operations in float32, on values up to 12.
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


def close(a, b):
    a = a.detach().numpy() if isinstance(a, torch.Tensor) else a
    np.testing.assert_allclose(a, np.asarray(b), **CLOSE)


def loaded(layer, state, system, **options):
    return states.load(layer, state, system, **options).model


# --- numbers of the systems themselves ----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, ns.nn.BatchNorm1d])
def test_keras_evaluates_as_keras_did(cls):
    layer = loaded(cls(2), KERAS, "keras")
    close(layer.eval()(torch.from_numpy(X)), KERAS_EVALUATION)


def test_keras_trains_as_keras_did_but_for_the_estimator_of_the_variance():
    layer = loaded(nn.BatchNorm1d(2), KERAS, "keras")
    close(layer.train()(torch.from_numpy(X)), KERAS_TRAINING)
    close(layer.running_mean, KERAS_MEAN_AFTER)
    # Keras moves by the biased variance, torch by m/(m − 1) of it: here m = 3.
    step = np.asarray(KERAS_VARIANCE_AFTER) - 0.99 * VAR
    close(layer.running_var, 0.99 * VAR + step * 3 / 2)


def test_keras_renorm_corrects_as_keras_did():
    layer = ns.nn.BatchRenorm(2, rmax=1.5, dmax=0.5, schedule=None)
    states.load(layer, RENORM, "keras", kind="BatchRenorm")
    close(layer.train()(torch.from_numpy(X)), RENORM_TRAINING)


def test_renorm_with_statistics_of_two_speeds_is_refused():
    with pytest.raises(ns.StateError, match="renorm_mean is not the statistic of evaluation"):
        states.read({**RENORM, "renorm_mean": MEAN + 1}, "keras", kind="BatchRenorm")
    with pytest.raises(ns.StateError, match="renorm_stddev is not"):
        states.read({**RENORM, "renorm_stddev": STDDEV + 1}, "keras", kind="BatchRenorm")
    assert states.read(KERAS, "keras").keys() == {"weight", "bias", "running_mean", "running_var"}


def test_flax_computes_as_flax_did():
    layer = loaded(nn.BatchNorm1d(2), FLAX, "flax")
    close(layer.eval()(torch.from_numpy(X)), FLAX_EVALUATION)
    close(layer.train()(torch.from_numpy(X)), FLAX_TRAINING)
    close(layer.running_mean, KERAS_MEAN_AFTER)


def test_in_place_abn_evaluates_as_it_did():
    layer = loaded(ns.nn.BatchNorm1d(2, activation="leaky_relu"), IABN, "inplace_abn")
    close(layer.eval()(torch.from_numpy(X)), IABN_EVALUATION)


def test_timm_evonorm_evaluates_as_it_did():
    state = {"weight": γ, "bias": β, "v": MEAN, "running_var": VAR}
    layer = loaded(ns.nn.EvoNormB0(2), state, "timm", kind="EvoNormB0")
    close(layer.eval()(torch.tensor(EVONORM_X)), EVONORM_EVALUATION)


# --- the formulas ---------------------------------------------------------------------------------------------------


def numbers(*names, channels=6):
    """One array per name, none like another; variances positive."""
    random = np.random.default_rng(0)
    return {n: random.random(channels) + 0.5 if "var" in n else random.standard_normal(channels) for n in names}


def sample():
    return np.random.default_rng(1).standard_normal((3, 6, 4, 2)) + 0.5


def evaluated(x, weight, bias, mean, var, eps):
    return field.batch_norm(x, Running(mean, var), False, γ=weight, β=bias, ε=eps, λ=0.0, k=None)[0]


def test_caffe_divides_its_sums_by_the_factor():
    n = numbers("gamma", "beta", "mean", "variance")
    factor = np.array([999.982])
    blobs = {
        "BatchNorm": [n["mean"] * factor, n["variance"] * factor, factor],
        "Scale": [n["gamma"], n["beta"]],
    }
    layer = loaded(ns.nn.BatchNorm2d(6).double(), blobs, "caffe").eval()
    expected = evaluated(sample(), n["gamma"], n["beta"], n["mean"], n["variance"], 1e-5)
    np.testing.assert_allclose(layer(torch.from_numpy(sample())).detach(), expected, rtol=1e-12)
    assert layer.momentum == 0.001


def test_caffe_into_which_nothing_has_entered_computes_with_zeros():
    one = np.ones(6)
    state = states.read({"BatchNorm": [one, one, np.zeros(1)]}, "caffe", {"BatchNorm": ""})
    assert state.keys() == {"running_mean", "running_var"}
    assert all(torch.equal(t, torch.zeros(6, dtype=torch.float64)) for t in state.values())


def test_caffe_has_a_scale_layer_for_the_affine_part():
    n = numbers("gamma", "beta", "mean", "variance")
    model = {"bn1": [n["mean"], n["variance"], np.ones(1)], "sc1": [n["gamma"]], "conv": [np.ones((2, 2)), np.ones(2)]}
    assert states.layers(model, "caffe") == ("bn1",)
    names = {"bn1": "stem.bn", "sc1": "stem.bn"}
    state = states.read(model, "caffe", names)
    assert [*state] == ["stem.bn.weight", "stem.bn.running_mean", "stem.bn.running_var"]
    again = states.write(state, "caffe", names)
    assert [len(again["bn1"]), len(again["sc1"])] == [3, 1]
    for k in range(3):
        np.testing.assert_array_equal(again["bn1"][k], model["bn1"][k])
    with pytest.raises(ns.StateError, match="has γ, and 1 layers of Caffe are named"):
        states.write(state, "caffe", {"bn1": "stem.bn"})
    del state["stem.bn.weight"]
    with pytest.raises(ns.StateError, match="has neither γ nor β, and 2 layers"):
        states.write(state, "caffe", names)
    with pytest.raises(ns.StateError, match="unknown key 'blob 0 of 5'"):
        states.read({"bn1": [np.ones(2)] * 5}, "caffe", {"bn1": "bn"})


def test_old_detectron2_has_eps_in_its_variance():
    n = numbers("weight", "bias", "running_mean", "running_var")
    layer = ns.nn.FrozenBatchNorm(6).double()
    states.load(layer, n, "detectron2-v2", eps=1e-3)
    y = evaluated(sample(), n["weight"], n["bias"], n["running_mean"], n["running_var"], 0.0)
    np.testing.assert_allclose(layer(torch.from_numpy(sample())), y, rtol=1e-12)
    back = states.write(layer.state_dict(), "detectron2-v2", eps=1e-3)
    np.testing.assert_allclose(back["running_var"], n["running_var"], rtol=1e-15)


def test_the_first_detectron2_has_an_affine_map():
    n = numbers("weight", "bias")
    layer = ns.nn.FrozenBatchNorm(6).double()
    states.load(layer, n, "detectron2-v1")
    lay = (1, 6, 1, 1)
    expected = sample() * n["weight"].reshape(lay) + n["bias"].reshape(lay)
    np.testing.assert_allclose(layer(torch.from_numpy(sample())), expected, rtol=1e-12)
    trained = numbers(*TORCH)
    folded = states.write({key: torch.from_numpy(value) for key, value in trained.items()}, "detectron2-v1", eps=1e-3)
    y = evaluated(sample(), *(trained[key] for key in TORCH), 1e-3)
    mapped = sample() * folded["weight"].numpy().reshape(lay) + folded["bias"].numpy().reshape(lay)
    np.testing.assert_allclose(mapped, y, rtol=1e-12)
    with pytest.raises(ns.StateError, match="missing key 'running_mean', 'running_var'"):
        states.write(nn.LayerNorm(2).state_dict(), "detectron2-v1")


def test_in_place_abn_has_no_sign_and_no_zero():
    n = numbers("weight", "bias", "running_mean", "running_var")
    n["weight"][0] = 0.0
    layer = ns.nn.BatchNorm2d(6, activation="leaky_relu").double()
    states.load(layer, n, "inplace_abn", eps=1e-3)
    z = evaluated(sample(), np.abs(n["weight"]) + 1e-3, n["bias"], n["running_mean"], n["running_var"], 1e-3)
    np.testing.assert_allclose(
        layer.eval()(torch.from_numpy(sample())).detach(), np.where(z > 0, z, 0.01 * z), rtol=1e-12
    )
    back = states.write(layer.state_dict(), "inplace_abn", eps=1e-3)
    np.testing.assert_allclose(back["weight"], np.abs(n["weight"]), atol=1e-15)
    with torch.no_grad():
        layer.weight[2] = 0.0005
    with pytest.raises(ns.StateError, match="γ is smaller in 1 channels"):
        states.write(layer.state_dict(), "inplace_abn", eps=1e-3)


@pytest.mark.parametrize(
    ("kind", "layer", "keys", "formula"),
    [
        ("EvoNormB0", lambda **o: ns.nn.EvoNormB0(6, **o), "weight bias v running_var", "evonorm_b0"),
        ("EvoNormS0", lambda **o: ns.nn.EvoNormS0(6, 3, **o), "weight bias v", "evonorm_s0"),
        ("FilterResponseNorm", lambda **o: ns.nn.FilterResponseNorm(6, **o), "weight bias tau", "frn"),
        (
            "GlobalResponseNorm",
            lambda **o: ns.nn.GlobalResponseNorm(6, channels_last=False, **o),
            "weight bias",
            "grn",
        ),
    ],
)
def test_timm_layers(kind, layer, keys, formula):
    n, x = numbers(*keys.split()), sample()
    layer = layer(**states.options("timm", kind=kind)).double()
    layer.load_state_dict(states.read(n, "timm", kind=kind))
    common = {"γ": n["weight"], "β": n["bias"], "k": None}
    expected = {
        "evonorm_b0": lambda: field.evonorm_b0(
            x, Running(None, n["running_var"]), False, n["v"], ε=1e-3, λ=0.1, **common
        )[0],
        "evonorm_s0": lambda: field.evonorm_s0(x, 3, n["v"], ε=1e-5, **common),
        "frn": lambda: field.frn(x, τ=n["tau"], ε=1e-5, **common),
        "grn": lambda: field.grn(x, n["weight"], n["bias"], 1e-6, None),
    }[formula]()
    np.testing.assert_allclose(layer.eval()(torch.from_numpy(x)).detach(), expected, rtol=1e-10, atol=1e-12)
    again = states.write(layer.state_dict(), "timm", kind=kind)
    assert {key: t.tolist() for key, t in again.items()} == {key: a.tolist() for key, a in n.items()}


def test_timm_checkpoints_of_old_versions_have_four_axes():
    n = {key: value.reshape(1, -1, 1, 1) for key, value in numbers("weight", "bias", "v").items()}
    assert states.read(n, "timm", kind="EvoNormS0")["v"].tolist() == n["v"].ravel().tolist()


# --- keys -----------------------------------------------------------------------------------------------------------

A, B, M, V = (np.arange(3.0) + k for k in (1, 4, 7, 10))
TORCH = {"weight": A, "bias": B, "running_mean": M, "running_var": V}
LAYOUTS = {
    "keras": ("m/bn", {"m/bn/gamma": A, "m/bn/beta": B, "m/bn/moving_mean": M, "m/bn/moving_variance": V}),
    "flax": (
        "Block_0/BatchNorm_1",
        {
            "params": {"Block_0": {"BatchNorm_1": {"scale": A, "bias": B}}},
            "batch_stats": {"Block_0": {"BatchNorm_1": {"mean": M, "var": V}}},
        },
    ),
    "nnx": ("blocks/0/bn", {"blocks": {0: {"bn": {"scale": A, "bias": B, "mean": M, "var": V}}}}),
    "torchvision": ("a.bn", {f"a.bn.{key}": torch.from_numpy(value) for key, value in TORCH.items()}),
    "detectron2": ("a.bn", {f"a.bn.{key}": torch.from_numpy(value) for key, value in TORCH.items()}),
}


def leaves(state, path=()):
    """(path, type, dtype, bytes) of every value, in order; dictionaries may be nested."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), type(value), value.dtype, np.asarray(value).tobytes()


@pytest.mark.parametrize("system", LAYOUTS)
def test_whole_models_round_trip_bit_for_bit(system):
    path, theirs = LAYOUTS[system]
    state = states.read(theirs, system, {path: "stem.bn"})
    assert {key: value.tolist() for key, value in state.items()} == {
        f"stem.bn.{key}": value.tolist() for key, value in TORCH.items()
    }
    assert sorted(leaves(states.write(state, system, {path: "stem.bn"})), key=str) == sorted(leaves(theirs), key=str)
    assert states.layers(theirs, system) == (path,)


@pytest.mark.parametrize("system", ["keras", "flax", "nnx"])
@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm", "RMSNorm"])
def test_layers_without_running_statistics(system, kind):
    ours = {"weight": torch.randn(4), "bias": torch.randn(4)}
    if kind == "RMSNorm":
        del ours["bias"]
    names = {"norm": "a.norm"}
    theirs = states.write({f"a.norm.{k}": v for k, v in ours.items()}, system, names, kind=kind)
    scale = theirs["norm/gamma" if kind != "RMSNorm" else "norm/scale"] if system == "keras" else None
    scale = theirs["params"]["norm"]["scale"] if system == "flax" else scale
    scale = theirs["norm"]["scale"] if system == "nnx" else scale
    assert np.array_equal(scale, ours["weight"])
    again = states.read(theirs, system, names, kind=kind)
    assert all(torch.equal(again[f"a.norm.{k}"], v) for k, v in ours.items())
    assert states.layers(theirs, system, kind=kind) == ("norm",)
    assert states.layers(LAYOUTS[system][1], system, kind=kind) == ()


def test_reading_copies_and_keeps_dtypes():
    source = {"weight": torch.ones(2, dtype=torch.float16), **{k: torch.ones(2) for k in [*TORCH][1:]}}
    state = states.read(source, "torchvision")
    assert state["weight"].dtype == torch.float16
    state["bias"][0] = 5.0
    assert source["bias"][0] == 1.0
    keras = {key: value.copy() for key, value in KERAS.items()}
    states.read(keras, "keras")["weight"][0] = 9.0
    assert keras["gamma"][0] == γ[0]


def test_bfloat16_of_torch_becomes_float32_for_numpy():
    written = states.write({"weight": torch.tensor([1.5, 3.0], dtype=torch.bfloat16)}, "keras", kind="RMSNorm")
    assert written["scale"].dtype == np.float32
    assert written["scale"].tolist() == [1.5, 3.0]


def test_bfloat16_of_jax_stays_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    state = states.read({"scale": np.array([1.5, 2.25], ml_dtypes.bfloat16)}, "keras", kind="RMSNorm")
    assert state["weight"].dtype == torch.bfloat16
    assert state["weight"].tolist() == [1.5, 2.25]


def test_a_layer_without_gamma_gets_ones():
    keras = {key: value for key, value in KERAS.items() if key != "gamma"}
    state = states.read(keras, "keras")
    assert state["weight"].tolist() == [1.0, 1.0]
    assert "gamma" not in states.write(state, "keras", without=["weight"])
    state["weight"][1] = 1.5
    with pytest.raises(ns.StateError, match="weight cannot be left out: it is not 1 everywhere"):
        states.write(state, "keras", without=["weight"])
    with pytest.raises(ns.ArgumentError, match="only weight and bias"):
        states.write(state, "keras", without=["running_mean"])


def test_a_layer_without_gamma_and_beta_keeps_none():
    keras = {key: value for key, value in KERAS.items() if key.startswith("moving")}
    assert [*states.read(keras, "keras")] == ["running_mean", "running_var"]


def test_the_counter_of_torch_has_no_place_elsewhere():
    for system in ("keras", "flax", "nnx", "torchvision"):
        assert "num_batches_tracked" not in str(states.write(nn.BatchNorm2d(2).state_dict(), system))
    assert "num_batches_tracked" in states.write(nn.BatchNorm2d(2).state_dict(), "inplace_abn")


# --- momentum and ε -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.997, 0.999, 1.0])
def test_complement_goes_back(momentum):
    assert states.complement(states.complement(momentum)) == momentum


def test_options_are_torchs():
    assert states.options("keras") == {"eps": 1e-3, "momentum": 0.01}
    assert states.options("keras", eps=1e-5, momentum=0.9) == {"eps": 1e-5, "momentum": 0.1}
    assert states.options("flax", kind="LayerNorm") == {"eps": 1e-6}
    assert states.options("inplace_abn", momentum=0.2) == {"eps": 1e-5, "momentum": 0.2}
    assert states.options("torchvision") == {"eps": 1e-5}
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ns.ArgumentError, match="momentum must lie in"):
            states.options("keras", momentum=wrong)
    with pytest.raises(ns.ArgumentError, match="LayerNorm has no momentum"):
        states.options("flax", kind="LayerNorm", momentum=0.9)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_name_key_layer_and_what_was_expected():
    path, keras = LAYOUTS["keras"]
    with pytest.raises(ns.StateError) as error:
        states.read({**keras, "m/bn/gama": A}, "keras", {path: "bn"})
    assert str(error.value).splitlines()[:3] == [
        "unknown key 'gama'",
        "  layer: m/bn",
        "  expected: gamma, beta, moving_mean, moving_variance (keras BatchNorm)",
    ]
    with pytest.raises(ns.StateError) as error:
        states.read({key: value for key, value in keras.items() if "variance" not in key}, "keras", {path: "bn"})
    text = str(error.value)
    assert text.startswith("missing key 'moving_variance'\n  layer: m/bn\n")
    assert "found: gamma, beta, moving_mean" in text
    with pytest.raises(ns.StateError, match="no layer 'bn' in this state of keras") as error:
        states.read(keras, "keras", {"bn": "bn"})
    assert "layers: m/bn" in str(error.value)


def test_parameters_without_their_statistics_are_not_a_batch_norm():
    with pytest.raises(ns.StateError, match="missing key 'batch_stats/mean', 'batch_stats/var'"):
        states.read({"params": FLAX["params"]}, "flax")


def test_shapes_of_one_layer_agree():
    with pytest.raises(ns.ShapeError, match="different shapes") as error:
        states.read({**KERAS, "gamma": np.ones(3)}, "keras")
    assert "weight (3,), bias (2,)" in str(error.value)
    with pytest.raises(ns.ShapeError, match="different shapes"):
        states.write({**nn.BatchNorm1d(2).state_dict(), "weight": torch.ones(3)}, "keras")


def test_unknown_names():
    with pytest.raises(ns.ArgumentError, match="unknown system 'haiku'"):
        states.read({}, "haiku")
    with pytest.raises(ns.ArgumentError, match="timm has no kind 'BatchNorm'"):
        states.read({}, "timm")
    with pytest.raises(ns.ArgumentError, match="no value of keras's BatchNorm depends on ε"):
        states.read(KERAS, "keras", eps=1e-3)
    with pytest.raises(ns.DtypeError, match="weight holds <U1"):
        states.read({**KERAS, "gamma": np.array(["a", "b"])}, "keras")


def test_two_layers_for_one_and_one_for_two():
    keras = {f"{name}/{key}": value for name in ("a", "b") for key, value in KERAS.items()}
    with pytest.raises(ns.StateError, match="two layers give bn its weight"):
        states.read(keras, "keras", {"a": "bn", "b": "bn"})
    state = states.read(keras, "keras", {"a": "bn"})
    with pytest.raises(ns.ArgumentError, match="'bn' is named by 2 layers"):
        states.write(state, "keras", {"a": "bn", "b": "bn"})


def test_writing_names_what_has_no_place():
    with pytest.raises(ns.StateError, match="keras has no place for 'v' in a BatchNorm"):
        states.write(ns.nn.EvoNormB0(2).state_dict(), "keras")
    with pytest.raises(ns.StateError, match="no layer 'bn' in this state_dict"):
        states.write(nn.BatchNorm1d(2).state_dict(), "keras", {"x": "bn"})
    with pytest.raises(ns.StateError, match="missing key 'running_mean', 'running_var'"):
        states.write(nn.LayerNorm(2).state_dict(), "keras")
    with pytest.raises(ns.StateError, match="missing key 'running_mean', 'running_var'"):
        states.write(nn.LayerNorm(2).state_dict(), "caffe")


# --- load -----------------------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        collections.OrderedDict(conv=nn.Conv2d(3, 2, 1), bn=nn.BatchNorm2d(2), act=nn.ReLU(), last=nn.BatchNorm2d(2))
    )


def keras_network():
    return {f"{name}/{key}": value for name in ("b1", "b2") for key, value in KERAS.items()}


def test_load_sets_values_and_options_and_can_be_undone():
    model = network()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    parameters = [*model.parameters()]
    report = states.load(model, keras_network(), "keras", {"b1": "bn", "b2": "last"}, momentum=0.9)
    assert report.changed == ("bn", "last")
    assert (model.last.eps, model.last.momentum) == (1e-3, 0.1)
    assert model.last.running_var.tolist() == VAR.tolist()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    report.undo()
    assert (model.last.eps, model.last.momentum) == (1e-5, 0.1)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        ({"b1": "bn", "b2": "lost"}, ns.StateError, "the model has no module 'lost'"),
        ({"b1": "bn", "b2": "act"}, ns.StateError, "layer: act (ReLU)"),
        ({"b1": "bn", "b2": "conv"}, ns.ShapeError, "layer: conv"),
    ],
)
def test_load_changes_all_or_nothing(names, error, match):
    model = network()
    before = ns.surgery.state_hash(model)
    with pytest.raises(error) as caught:
        states.load(model, keras_network(), "keras", names)
    assert match in str(caught.value)
    assert ns.surgery.state_hash(model) == before


def test_load_refuses_other_sizes_and_layers_without_statistics():
    with pytest.raises(ns.ShapeError, match=r"weight has shape \(2,\) there and \(3,\) here"):
        states.load(nn.BatchNorm2d(3), KERAS, "keras")
    with pytest.raises(ns.StateError, match="Unexpected key"):
        states.load(nn.BatchNorm2d(2, affine=False), KERAS, "keras")
    with pytest.raises(ns.StateError, match="Unexpected key"):
        states.load(nn.GroupNorm(1, 2), KERAS, "keras")


def test_load_fills_what_theirs_does_not_have_and_says_so():
    model = network()
    with torch.no_grad():
        model.bn.weight.fill_(7.0)
        model.bn.bias.fill_(7.0)
    bare = {key: value for key, value in keras_network().items() if "moving" in key}
    report = states.load(model, bare, "keras", {"b1": "bn"})
    assert report.notes == ("bn: weight = 1, theirs has none", "bn: bias = 0, theirs has none")
    assert (model.bn.weight.tolist(), model.bn.bias.tolist()) == ([1.0, 1.0], [0.0, 0.0])
    assert states.load(ns.nn.FrozenBatchNorm(2), bare, "keras", {"b1": ""}).model.running_var.tolist() == VAR.tolist()


# --- modules of other libraries, as their formulas ------------------------------------------------------------------


class Four(nn.Module):
    """Four buffers, as torchvision, detectron2, DETR and maskrcnn-benchmark have them."""

    def __init__(self, eps=None, inside=0.0):
        super().__init__()
        random = torch.Generator().manual_seed(3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4, generator=random) + 0.5)
        self.inside = inside
        if eps is not None:
            self.eps = eps

    def forward(self, x):
        scale = self.weight * (self.running_var + getattr(self, "eps", self.inside)).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class FrozenBatchNorm2d(Four):
    pass


class ABN(nn.Module):
    """As in the package inplace_abn: BatchNorm and an activation."""

    def __init__(self, activation="leaky_relu", activation_param=0.01):
        super().__init__()
        self.eps, self.momentum, self.activation, self.activation_param = 1e-5, 0.1, activation, activation_param
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("running_mean", torch.randn(4))
        self.register_buffer("running_var", torch.rand(4) + 0.5)

    def gain(self):
        return self.weight

    def forward(self, x):
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.gain(), self.bias, self.training, self.momentum, self.eps
        )
        match self.activation:
            case "leaky_relu":
                return F.leaky_relu(y, self.activation_param)
            case "elu":
                return F.elu(y, self.activation_param)
        return y


class InPlaceABN(ABN):
    def gain(self):
        return self.weight.abs() + self.eps


class InPlaceABNSync(InPlaceABN):
    group = None


class FrozenBatchNormAct2d(Four):
    """As in timm."""

    def __init__(self, act, drop):
        super().__init__(1e-5)
        self.act, self.drop = act, drop

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class EvoNorm2dS0(nn.Module):
    """As in timm."""

    def __init__(self, apply_act=True):
        super().__init__()
        self.groups, self.eps = 2, 1e-5
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.v = nn.Parameter(torch.randn(4)) if apply_act else None

    def forward(self, x):
        weight, bias = (t.view(1, -1, 1, 1) for t in (self.weight, self.bias))
        if self.v is None:
            return x * weight + bias
        n, c = x.shape[:2]
        var = x.reshape(n, self.groups, -1).var(2, unbiased=False)
        std = (var + self.eps).sqrt().repeat_interleave(c // self.groups, 1).view(n, c, 1, 1)
        return x * (x * self.v.view(1, -1, 1, 1)).sigmoid() / std * weight + bias


def around(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())


def example():
    return torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("norm", "eps"),
    [(FrozenBatchNorm2d(1e-3), 1e-3), (FrozenBatchNorm2d(inside=1e-5), 1e-5), (FrozenBatchNorm2d(), 0.0)],
    ids=["torchvision", "DETR", "maskrcnn"],
)
def test_frozen_layers_are_taken_up_with_the_eps_they_compute_with(norm, eps):
    model = around(norm)
    before, expected = dict(norm.named_buffers()), model(example())
    hooked = []
    norm.register_forward_hook(lambda *_: hooked.append(1))
    report = states.take_up(model, example())
    assert report.changed == ("1",)
    assert type(model[1]) is ns.nn.FrozenBatchNorm
    assert model[1].eps == eps
    assert all(b is before[name] for name, b in model[1].named_buffers())
    hooked.clear()
    # Rounding of one multiplication and addition more or less.
    torch.testing.assert_close(model(example()), expected, rtol=1e-5, atol=1e-6)
    assert hooked == [1]
    assert report.undo()[1] is norm


@pytest.mark.parametrize("activation", [("leaky_relu", 0.01), ("elu", 1.0), ("identity", 0.01)])
@pytest.mark.parametrize("cls", [ABN, InPlaceABN])
def test_in_place_abn_is_taken_up(cls, activation):
    torch.manual_seed(5)
    norm = cls(*activation)
    model, weight = around(norm), norm.weight
    expected = model.train()(example()).detach()
    state = {key: t.clone() for key, t in norm.state_dict().items()}
    report = states.take_up(model, example())
    assert report.changed == ("1",), report
    assert isinstance(model[1], nn.modules.batchnorm._BatchNorm)
    assert model[1].activation == (None if activation[0] == "identity" else activation[0])
    assert (model[1].weight is weight) == (cls is ABN)
    torch.testing.assert_close(model.train()(example()), expected, rtol=1e-5, atol=1e-6)
    report.undo()
    assert model[1] is norm
    assert all(torch.equal(t, state[key]) for key, t in norm.state_dict().items() if "running" not in key)


def test_synchronized_in_place_abn_stays_synchronized():
    model = around(InPlaceABNSync())
    states.take_up(model, example())
    assert isinstance(model[1], ns.nn.SyncBatchNorm)
    assert model[1].activation == "leaky_relu"


def test_an_activation_inside_is_taken_up_with_its_layer():
    model = around(FrozenBatchNormAct2d(nn.SiLU(), nn.Identity()))
    expected = model(example())
    assert states.take_up(model, example()).changed == ("1",)
    assert model[1].activation == "silu"
    assert [*model[1].children()] == []
    torch.testing.assert_close(model(example()), expected, rtol=1e-5, atol=1e-6)


def test_layers_without_an_equal_are_left_with_the_reason():
    class Liar(Four):
        def forward(self, x):
            return super().forward(x) * 1.01

    Liar.__name__ = "FrozenBatchNorm2d"

    class Nan(Four):
        def forward(self, x):
            return super().forward(x) * float("nan")

    Nan.__name__ = "FrozenBatchNorm2d"

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.ones(4))

        def forward(self, x):
            return x

    Empty.__name__ = "FrozenBatchNorm2d"

    class Broken(Four):
        def forward(self, x):
            raise OSError("no such kernel")

    Broken.__name__ = "FrozenBatchNorm2d"
    learning, overridden = FrozenBatchNorm2d(1e-5), FrozenBatchNorm2d(1e-5)
    weight = learning.weight
    del learning.weight
    learning.weight = nn.Parameter(weight)
    overridden.forward = overridden.forward
    for norm, reason in (
        (Liar(1e-5), "computes something else than the layer its name suggests"),
        (Nan(1e-5), "computes something else than the layer its name suggests"),
        (Empty(), "could not be tried out: 'FrozenBatchNorm2d' object has no attribute 'weight'"),
        (Broken(1e-5), "could not be tried out: no such kernel"),
        (ABN("leaky_relu", 0.2), "its activation, leaky_relu with 0.2, has no fused form"),
        (EvoNorm2dS0(apply_act=False), "without its activation it does not normalize at all"),
        (learning, "it has parameters: weight"),
        (overridden, "its forward has been overridden on the instance"),
        (FrozenBatchNormAct2d(nn.ReLU(), nn.Dropout()), "Dropout lies between it and its activation"),
        (FrozenBatchNormAct2d(nn.PReLU(), nn.Identity()), "its PReLU has no fused form"),
    ):
        model = around(norm)
        report = states.take_up(model)
        assert model[1] is norm
        assert report.changed == ()
        assert reason in report.skipped[0][1]


def test_evonorm_is_taken_up_and_trains_the_same_parameters():
    norm = EvoNorm2dS0()
    model = around(norm)
    parameters = dict(norm.named_parameters())
    states.take_up(model, example())
    assert type(model[1]) is ns.nn.EvoNormS0
    assert (model[1].groups, model[1].eps) == (2, 1e-5)
    assert all(p is parameters[name] for name, p in model[1].named_parameters())


def test_a_module_held_twice_is_taken_up_once():
    norm = FrozenBatchNorm2d(1e-5)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    assert states.take_up(model).changed == ("a",)
    assert model["a"] is model["b"][0]


def test_taking_up_needs_no_gradients():
    with torch.no_grad():
        assert states.take_up(around(EvoNorm2dS0()), example()).changed == ("1",)


def test_a_model_whose_outputs_change_is_left_as_it_was():
    class Picky(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * (2.0 if isinstance(self[0], ns.nn.FrozenBatchNorm) else 1.0)

    model = Picky(FrozenBatchNorm2d(1e-5))
    before = ns.surgery.state_hash(model)
    with pytest.raises(ns.ProofError, match="take_up would change"):
        states.take_up(model, torch.randn(2, 4, 3, 3))
    assert ns.surgery.state_hash(model) == before
    assert type(model[0]) is FrozenBatchNorm2d


def test_the_trial_leaves_what_it_tries_alone():
    norm = ABN("elu", 0.3)
    before = ns.surgery.state_hash(norm)
    states.take_up(norm)
    assert ns.surgery.state_hash(norm) == before


# --- frozen and not ---------------------------------------------------------------------------------------------------


def frozen():
    layer = ns.nn.FrozenBatchNorm(4, activation="relu")
    for b in layer.buffers():
        b.copy_(torch.rand(4) + 0.5)
    return layer


def test_frozen_becomes_batch_norm_that_unfreeze_lets_train():
    layer = frozen()
    model = around(layer).train()
    expected, memory = model(example()), layer.weight.data_ptr()
    report = states.to_batch_norm(model, example())
    bn = model[1]
    assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
    assert bn.weight.data_ptr() == memory
    assert bn.activation == "relu"
    torch.testing.assert_close(model.train()(example()), expected, rtol=0, atol=0)
    assert not bn.weight.requires_grad
    ns.unfreeze(model)
    assert bn.weight.requires_grad
    model.train()(example()).sum().backward()
    assert bn.weight.grad is not None
    assert int(bn.num_batches_tracked) == 1
    report.undo()
    assert model[1] is layer


def test_frozen_of_another_library_is_named():
    report = states.to_batch_norm(around(FrozenBatchNorm2d(1e-5)))
    assert report.skipped == (("1", "of another library: ns.states.take_up(model) first"),)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ns.nn.BatchNorm2d, ns.nn.SyncBatchNorm])
def test_batch_norm_becomes_frozen(norm, held):
    bn = norm(4)
    with torch.no_grad():
        for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            t.copy_(torch.rand(4) + 0.5)
    model = around(bn).eval()
    if held:
        ns.freeze(model, affine=True)
    expected = model(example())
    report = states.to_frozen(model, example())
    layer = model[1]
    assert type(layer) is ns.nn.FrozenBatchNorm
    assert [*layer.parameters()] == []
    assert [*layer.state_dict()] == ["weight", "bias", "running_mean", "running_var"]
    for mode in (False, True):  # torch's kernel folds γ into the scale: other rounding
        torch.testing.assert_close(model.train(mode)(example()), expected, rtol=1e-5, atol=1e-6)
    report.undo()
    assert model[1] is bn


def test_an_activation_goes_into_the_frozen_layer():
    assert states.to_frozen(ns.nn.BatchNorm2d(4, activation="silu")).model.activation == "silu"


def test_what_is_not_frozen_says_why():
    model = nn.ModuleDict(
        {
            "bare": nn.BatchNorm2d(2, track_running_stats=False),
            "renorm": ns.nn.BatchRenorm(2),
            "group": nn.GroupNorm(1, 2),
            "plain": nn.BatchNorm2d(2, affine=False),
        }
    )
    report = states.to_frozen(model)
    assert report.changed == ("plain",)
    assert dict(report.skipped) == {
        "bare": "keeps no running statistics",
        "renorm": "BatchRenorm may do more than normalize by four buffers",
    }
    assert model["plain"].weight.tolist() == [1.0, 1.0]
    synchronized = ns.synchronize(nn.Sequential(nn.BatchNorm2d(2))).model
    assert states.to_frozen(synchronized).skipped == (("0", "something else was done to it before: undo that first"),)


def test_frozen_there_and_back_is_the_state_of_torchvision():
    bn = nn.BatchNorm2d(4)
    layer = states.to_frozen(bn).model
    written = states.write(bn.state_dict(), "torchvision")
    assert all(torch.equal(t, written[name]) for name, t in layer.state_dict().items())
    again = states.to_batch_norm(layer).model
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in written.items())
