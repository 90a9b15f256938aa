"""Converted states against the systems they come from: outputs, running statistics, round trips.

python scripts/states.py

Compares with whatever is installed of keras, flax (and jax), timm, torchvision, detectron2, inplace_abn; the rest is
left out, and said to be. Random numbers in every value of a layer; the same layer here is built by `options` and
`read`. Differences are relative to the largest value.

- evaluation: of the outputs with the running statistics.
- training: of the outputs of one step.
- variance: which estimator their running variance moves by (how far it is from that), and how far it is from ours.
- round trip: whether `write(read(state))` is the state, bit for bit.
"""

import os

import numpy as np
import torch
from originals import import_torchvision

import normscope as ns

os.environ.setdefault("KERAS_BACKEND", "torch")
C, SHAPE = 8, (4, 8, 6, 5)
CELLS = 4 * 6 * 5


def numbers(shape, name, generator):
    """Values that tell keys apart; variances are positive."""
    value = generator.standard_normal(shape)
    return (np.abs(value) + 0.5 if "var" in name or "stddev" in name else value).astype(np.float32)


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def numpy(t):
    return t.detach().numpy()


def last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def first(y):
    return np.moveaxis(np.asarray(y), -1, 1)


class Case:
    """One layer of another system: its state by `system`, `kind`, and how it is called.

    `call(state, x, training)` returns outputs, both channels first, and the running variance.
    """

    def __init__(self, name, system, kind, ours, state, call, **options):
        self.name, self.system, self.kind, self.state, self.call = name, system, kind, state, call
        given = ns.states.options(system, kind=kind, **options)
        self.layer = ours(given)
        values = ns.states.read(state, system, kind=kind)
        self.layer.load_state_dict(values)
        again = ns.states.write(values, system, kind=kind)
        self.trips = flat(again) == flat(state)

    def row(self):
        x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32) + 0.5
        cells = []
        for training in (False, True):
            y, var = self.call(self.state, x, training)
            mine = self.layer.train(training)(torch.from_numpy(x))
            cells.append(f"{relative(y, numpy(mine)):.0e}")
        variance = "" if var is None else self.estimator(np.asarray(var, np.float64), x)
        return f"| {self.name} | {' | '.join(cells)} | {variance} | {'identical' if self.trips else 'other bits'} |"

    def estimator(self, var, x):
        """Which step of the running variance is theirs, and how far the layer's own is from it."""
        old = numpy(ns.states.read(self.state, self.system, kind=self.kind)["running_var"]).astype(np.float64)
        v, weight, eps = x.astype(np.float64).var((0, 2, 3)), self.layer.momentum, self.layer.eps
        steps = {
            "biased": old + weight * (v - old),
            "unbiased": old + weight * (v * CELLS / (CELLS - 1) - old),
            "mean of σ": ((1 - weight) * np.sqrt(old + eps) + weight * np.sqrt(v + eps)) ** 2 - eps,
        }
        nearest = min(steps, key=lambda name: relative(var, steps[name]))
        distances = relative(var, steps[nearest]), relative(var, numpy(self.layer.running_var))
        return f"{nearest} ({distances[0]:.0e}), from ours {distances[1]:.0e}"


def flat(state, path=()):
    """Bytes by path."""
    found = {}
    for key, value in state.items():
        here = (*path, str(key))
        if hasattr(value, "items"):
            found |= flat(value, here)
        else:
            array = np.asarray(value)
            found[here] = (array.shape, str(array.dtype), array.tobytes())
    return found


# --- Keras --------------------------------------------------------------------------------------------------------


def keras_cases():
    import keras

    def make(name, kind, theirs, ours, **options):
        generator = np.random.default_rng(0)
        theirs.build((None, 6, 5, C))
        for w in theirs.weights:
            w.assign(numbers(w.shape, w.name, generator))
        if kind == "BatchRenorm":
            theirs.renorm_mean.assign(theirs.moving_mean)
            theirs.moving_stddev.assign(keras.ops.sqrt(theirs.moving_variance + theirs.epsilon))
            theirs.renorm_stddev.assign(theirs.moving_stddev)
        state = {w.name: keras.ops.convert_to_numpy(w).copy() for w in theirs.weights}

        def call(_, x, training):
            for w in theirs.weights:
                w.assign(state[w.name])
            y = first(keras.ops.convert_to_numpy(theirs(last(x), training=training)))
            return y, keras.ops.convert_to_numpy(theirs.moving_variance) if hasattr(theirs, "moving_variance") else None

        return Case(f"Keras {keras.__version__} {name}", "keras", kind, ours, state, call, **options)

    layers = keras.layers
    yield make("BatchNormalization", "BatchNorm", layers.BatchNormalization(), lambda o: ns.nn.BatchNorm2d(C, **o))
    yield make(
        "BatchNormalization(momentum=0.9)", "BatchNorm", layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
        lambda o: ns.nn.BatchNorm2d(C, **o), momentum=0.9, eps=1e-5,
    )  # fmt: skip
    yield make("LayerNormalization", "LayerNorm", layers.LayerNormalization(), lambda o: ns.nn.LayerNorm2d(C, **o))
    yield make("GroupNormalization(4)", "GroupNorm", layers.GroupNormalization(4), lambda o: ns.nn.GroupNorm(4, C, **o))
    yield make("RMSNormalization", "RMSNorm", layers.RMSNormalization(), lambda o: channels_last(ns.nn.RMSNorm(C, **o)))
    clipping = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}
    yield make(
        "BatchNormalization(renorm=True)", "BatchRenorm",
        layers.BatchNormalization(renorm=True, renorm_clipping=clipping),
        lambda o: ns.nn.BatchRenorm(C, rmax=1.5, dmax=0.5, schedule=None, **o),
    )  # fmt: skip


def channels_last(layer):
    """A layer over the last axis, for channels first."""
    forward = layer.forward
    layer.forward = lambda x: forward(x.movedim(1, -1)).movedim(-1, 1)
    return layer


# --- Flax ---------------------------------------------------------------------------------------------------------


def flax_cases():
    import flax
    import jax
    from flax import linen

    def make(name, kind, theirs, ours):
        generator = np.random.default_rng(0)
        running = kind == "BatchNorm"
        calls = {"use_running_average": True} if running else {}
        start = theirs.init(jax.random.key(0), np.zeros((1, 6, 5, C), np.float32), **calls)
        state = jax.tree_util.tree_map_with_path(lambda p, v: numbers(v.shape, str(p[-1]), generator), start)

        def call(variables, x, training):
            if not running:
                return first(theirs.apply(variables, last(x))), None
            y, moved = theirs.apply(variables, last(x), use_running_average=not training, mutable=["batch_stats"])
            return first(y), moved["batch_stats"]["var"]

        return Case(f"Flax {flax.__version__} linen.{name}", "flax", kind, ours, state, call)

    yield make("BatchNorm", "BatchNorm", linen.BatchNorm(), lambda o: ns.nn.BatchNorm2d(C, **o))
    yield make("LayerNorm", "LayerNorm", linen.LayerNorm(), lambda o: ns.nn.LayerNorm2d(C, **o))
    yield make("GroupNorm", "GroupNorm", linen.GroupNorm(4), lambda o: ns.nn.GroupNorm(4, C, **o))
    yield make(
        "InstanceNorm", "InstanceNorm", linen.InstanceNorm(), lambda o: ns.nn.InstanceNorm2d(C, affine=True, **o)
    )
    yield make("RMSNorm", "RMSNorm", linen.RMSNorm(), lambda o: channels_last(ns.nn.RMSNorm(C, **o)))


def nnx_cases():
    import flax
    import jax
    from flax import nnx

    def make(name, kind, theirs, ours):
        generator = np.random.default_rng(0)
        start = nnx.to_pure_dict(nnx.state(theirs))
        state = {key: numbers(value.shape, key, generator) for key, value in start.items()}

        def call(values, x, training):
            own = nnx.state(theirs)
            nnx.replace_by_pure_dict(own, jax.tree.map(jax.numpy.asarray, values))  # it writes into NumPy's
            nnx.update(theirs, own)
            if kind != "BatchNorm":
                return first(theirs(last(x))), None
            y = theirs(last(x), use_running_average=not training)
            return first(y), np.asarray(nnx.to_pure_dict(nnx.state(theirs))["var"])

        return Case(f"Flax {flax.__version__} nnx.{name}", "nnx", kind, ours, state, call)

    rngs = nnx.Rngs(0)
    yield make("BatchNorm", "BatchNorm", nnx.BatchNorm(C, rngs=rngs), lambda o: ns.nn.BatchNorm2d(C, **o))
    yield make("LayerNorm", "LayerNorm", nnx.LayerNorm(C, rngs=rngs), lambda o: ns.nn.LayerNorm2d(C, **o))
    yield make("GroupNorm", "GroupNorm", nnx.GroupNorm(C, 4, rngs=rngs), lambda o: ns.nn.GroupNorm(4, C, **o))


# --- libraries of torch -------------------------------------------------------------------------------------------


def torch_case(name, system, kind, theirs, ours, **options):
    generator = np.random.default_rng(0)
    state = {
        key: torch.from_numpy(numbers(tuple(t.shape), key, generator))
        for key, t in theirs.state_dict().items()
        if t.is_floating_point()
    }

    def call(values, x, training):
        theirs.load_state_dict(values, strict=False)
        y = theirs.train(training)(torch.from_numpy(x.copy()))
        var = getattr(theirs, "running_var", None)
        return numpy(y), None if var is None or "Frozen" in name else numpy(var)

    return Case(name, system, kind, ours, state, call, **options)


def timm_cases():
    import timm
    from timm.layers import evo_norm, filter_response_norm, grn

    for theirs, kind, ours in (
        (evo_norm.EvoNorm2dB0(C), "EvoNormB0", lambda o: ns.nn.EvoNormB0(C, **o)),
        (evo_norm.EvoNorm2dS0(C, groups=4), "EvoNormS0", lambda o: ns.nn.EvoNormS0(C, 4, **o)),
        (
            filter_response_norm.FilterResponseNormTlu2d(C), "FilterResponseNorm",
            lambda o: ns.nn.FilterResponseNorm(C, **o),
        ),
        (
            filter_response_norm.FilterResponseNormAct2d(C), "FilterResponseNorm",
            lambda o: ns.nn.FilterResponseNorm(C, activation="relu", **o),
        ),
        (
            grn.GlobalResponseNorm(C, channels_last=False), "GlobalResponseNorm",
            lambda o: ns.nn.GlobalResponseNorm(C, channels_last=False, **o),
        ),
    ):  # fmt: skip
        yield torch_case(f"timm {timm.__version__} {type(theirs).__name__}", "timm", kind, theirs, ours)


def torchvision_cases():
    import torchvision
    from torchvision.ops import FrozenBatchNorm2d

    name = f"torchvision {torchvision.__version__} FrozenBatchNorm2d"
    yield torch_case(name, "torchvision", "BatchNorm", FrozenBatchNorm2d(C), lambda o: ns.nn.FrozenBatchNorm(C, **o))


def detectron2_cases():
    from detectron2.layers.batch_norm import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d(C)
    yield torch_case(
        "detectron2 FrozenBatchNorm2d", "detectron2", "BatchNorm", frozen, lambda o: ns.nn.FrozenBatchNorm(C, **o)
    )


def inplace_abn_cases():
    from inplace_abn import InPlaceABN

    yield torch_case(
        "in-place ABN InPlaceABN", "inplace_abn", "BatchNorm", InPlaceABN(C),
        lambda o: ns.nn.BatchNorm2d(C, activation="leaky_relu", **o),
    )  # fmt: skip


def main():
    """Print the table."""
    declared = import_torchvision()  # noqa: F841
    print("| layer | evaluation | training | step of the variance | round trip |\n|---|---:|---:|---|---|")
    for cases in (
        keras_cases, flax_cases, nnx_cases, timm_cases, torchvision_cases, detectron2_cases, inplace_abn_cases,
    ):  # fmt: skip
        try:
            for case in cases():
                print(case.row())
        except ImportError as error:
            print(f"| {cases.__name__.removesuffix('_cases')}: not installed ({error.name}) | | | | |")


if __name__ == "__main__":
    main()
