"""One record per layer of the field: how it is built, what it takes, its NumPy twin; tests and docs come from it.

A twin gets the layer's state as float64 arrays, the mode, the inputs, and which cells are kept; it returns y and the
buffers that have moved. `base` are the inputs at which a constant of the gradient is taken (Batch Renorm's r and d).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import normscope as ns
from normscope.oracle import field

C = 6
LAYOUTS = {2: (7, C), 3: (5, C, 4), 4: (4, C, 3, 5), 5: (3, C, 2, 3, 2)}
State = Mapping[str, np.ndarray]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """What there is to know about a layer.

    Attributes:
        name: Of the class, and of the option where a class has several records.
        build: Makes the layer, of any size of C = 6; keyword options are passed on.
        twin: (state, training, inputs, k, base) → y and moved buffers.
        scope: Which cells share moments, in the notation where it can say so; for the docs.
        training: Where the moments come from in training.
        inference: And in evaluation.
        inputs: (rank, seed) → inputs in float64, the first (N, C, *) or what `axis` says.
        call: How the layer is called.
        ranks: Of the first input.
        axis: Of the channels.
        mask: Whether `mask=` is taken.
        residual: Whether `residual=` and `activation=` are taken.
        whole: Whether a mask may only keep whole positions.
        running: The buffers that training moves.
        found: Whether `ns.freeze` sees running statistics.
        measured: Whether `ns.recalibrate` measures them; else it says why not.
        again: Whether a checkpoint may compute it again in training.
        double: Whether second derivatives exist.
        auxiliary: (state, inputs) → a loss whose gradient joins in training, or None.
        wide: Whether there is a product before the normalizer, so that only wide dtypes can be compared.
        exact: Whether the gradient is the derivative of the twin; Online Normalization's is not.
        documented: Whether it has a row of its own in docs/normalizers.md.
        refused: Constructions that are refused: options → error, and a part of its first line.
    """

    name: str
    build: Callable[..., nn.Module]
    twin: Callable[[State, bool, Inputs, Any, Inputs], tuple[np.ndarray, dict[str, np.ndarray]]]
    scope: str = ""
    training: str = ""
    inference: str = ""
    inputs: Callable[[int, int], Inputs] = lambda rank, seed: (data(LAYOUTS[rank], seed),)
    call: Callable[..., Tensor] = lambda layer, *inputs, **options: layer(*inputs, **options)
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    axis: int = 1
    mask: bool = True
    residual: bool = True
    whole: bool = False
    running: tuple[str, ...] = ()
    found: bool = True
    measured: bool = True
    again: bool = True
    double: bool = True
    auxiliary: Callable[[State, Inputs], float] | None = None
    wide: bool = False
    exact: bool = True
    documented: bool = True
    refused: tuple[tuple[dict[str, Any], type[Exception], str], ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def cls(self) -> type[nn.Module]:
        return getattr(ns.nn, self.name.split(",")[0])


def data(shape: tuple[int, ...], seed: int) -> Tensor:
    """Channels and samples of different mean and spread: equal ones would hide which of them was averaged."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) < 2:
        return x
    ones = (1,) * (len(shape) - 2)
    scale = 0.5 + torch.rand(*shape[:2], *ones, generator=generator, dtype=torch.float64)
    return x * scale + torch.randn(*shape[:2], *ones, generator=generator, dtype=torch.float64)


def running(state: State) -> field.Running:
    return field.Running(state["running_mean"], state["running_var"])


def moved(y: np.ndarray, after: field.Running) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return y, {"running_mean": after.E, "running_var": after.Var}


def affine(state: State) -> dict[str, Any]:
    return {"γ": state.get("weight", 1.0), "β": state.get("bias", 0.0)}


STATISTICS = ("running_mean", "running_var")
EPS, MOMENTUM = 1e-3, 0.3  # larger than the defaults, so that a forgotten ε or λ shows
COMMON = {"ε": EPS, "λ": MOMENTUM}
WRONG_EPS = ({"eps": 0.0}, ns.ArgumentError, "eps must be positive")


# --- twins ----------------------------------------------------------------------------------------------------------


def layer_norm_2d(s, training, inputs, k, base):
    return field.positional(inputs[0], **affine(s), ε=EPS, k=k), {}


def mean_only(s, training, inputs, k, base):
    return moved(*field.mean_only(inputs[0], running(s), training, b=s["bias"], λ=MOMENTUM, k=k))


def scale_norm(s, training, inputs, k, base):
    return field.scale_norm(inputs[0], float(s["g"]), EPS, k), {}


def frn(s, training, inputs, k, base):
    y = field.frn(inputs[0], **affine(s), ε=EPS, ε_l=s.get("eps_l", 0.0), τ=s.get("tau"), k=k)
    return y, {}


def grn(s, training, inputs, k, base):
    return field.grn(inputs[0], s["weight"], s["bias"], EPS, k), {}


def grn_last(s, training, inputs, k, base):
    x, k = np.moveaxis(inputs[0], -1, 1), None if k is None else np.moveaxis(k, -1, 1)
    return np.moveaxis(field.grn(x, s["weight"], s["bias"], EPS, k), 1, -1), {}


def dyt(s, training, inputs, k, base):
    return field.dyt(inputs[0], float(s["alpha"][0]), s["weight"], s["bias"]), {}


def dyt_first(s, training, inputs, k, base):
    x = np.moveaxis(inputs[0], 1, -1)
    return np.moveaxis(field.dyt(x, float(s["alpha"][0]), s["weight"], s["bias"]), -1, 1), {}


def evonorm_s0(s, training, inputs, k, base):
    return field.evonorm_s0(inputs[0], 3, s["v"], **affine(s), ε=EPS, k=k), {}


def evonorm_b0(s, training, inputs, k, base):
    return moved(*field.evonorm_b0(inputs[0], running(s), training, s["v"], **affine(s), **COMMON, k=k))


def frozen(s, training, inputs, k, base):
    return field.batch_norm(inputs[0], running(s), False, **affine(s), **COMMON, k=k)[0], {}


def batch_norm(s, training, inputs, k, base):
    return moved(*field.batch_norm(inputs[0], running(s), training, **affine(s), **COMMON, k=k))


def ghost(s, training, inputs, k, base):
    if not training:
        return batch_norm(s, training, inputs, k, base)
    n = len(inputs[0])
    sizes = {0: [], 3: [3], 4: [2, 2], 5: [3, 2], 7: [3, 2, 2]}[n]  # ghosts of 3 at most, as equal as can be
    return moved(*field.ghost(inputs[0], running(s), sizes, **affine(s), **COMMON, k=k))


def batch_renorm(s, training, inputs, k, base):
    if not training:
        return batch_norm(s, training, inputs, k, base)
    r, d = field.renorm_correction(base[0], running(s), 1.2, 0.3, EPS, k)
    return moved(*field.batch_renorm(inputs[0], r, d, running(s), **affine(s), **COMMON, k=k))


def eval_norm(s, training, inputs, k, base):
    if training:
        return batch_norm(s, training, inputs, k, base)
    weights = s["mean_weight"], s["var_weight"]
    return field.eval_norm(inputs[0], running(s), *weights, **affine(s), ε=EPS, k=k), {}


def eval_norm_loss(s, inputs):
    plain = {"γ": 1.0, "β": 0.0, "ε": EPS, "k": None}
    by_batch, after = field.batch_norm(inputs[0], running(s), True, **plain, λ=MOMENTUM)
    corrected = field.eval_norm(inputs[0], after, s["mean_weight"], s["var_weight"], **plain)
    return float(((by_batch - corrected) ** 2).mean())


def switch(s, training, inputs, k, base):
    weights = s["mean_weight"], s["var_weight"]
    return moved(*field.switch(inputs[0], running(s), training, *weights, **affine(s), **COMMON, k=k))


def split(s, training, inputs, k, base):
    x, domain = inputs
    y, after = np.zeros_like(x), {}
    for i in (0, 1):
        own = {name.removeprefix(f"domains.{i}."): a for name, a in s.items() if name.startswith(f"domains.{i}.")}
        cells = (domain == i).reshape(-1, *(1,) * (x.ndim - 1)) & (True if k is None else k)
        y_i, buffers = batch_norm(own, training, (x,), cells, base)
        y += y_i
        after |= {f"domains.{i}.{name}": a for name, a in buffers.items()}
    return y, after


def conditional(s, training, inputs, k, base):
    x, classes = inputs
    rows = {"γ": s["weight"][classes], "β": s["bias"][classes]}
    return moved(*field.batch_norm(x, running(s), training, **rows, **COMMON, k=k))


def conditional_pair(s, training, inputs, k, base):
    x, γ, β = inputs
    return moved(*field.batch_norm(x, running(s), training, γ=γ, β=β, **COMMON, k=k))


def adain(s, training, inputs, k, base):
    return field.adain(inputs[0], inputs[1], EPS, k), {}


def spade(s, training, inputs, k, base):
    x, m = inputs
    weights = [(s[f"{name}.weight"], s[f"{name}.bias"]) for name in ("shared", "gamma", "beta")]
    γ, β = field.spade_maps(m, x.shape[2:], weights)
    return moved(*field.batch_norm(x, running(s), training, γ=1 + γ, β=β, **COMMON, k=k))


def whitening(root):
    def twin(s, training, inputs, k, base):
        E, U = s["running_mean"], s["running_whitening"]
        y, E, U = field.whiten(inputs[0], E, U, training, root, **affine(s), **COMMON, k=k)
        return y, {"running_mean": E, "running_whitening": U}

    return twin


def online(s, training, inputs, k, base):
    x, μ, σ2 = inputs[0], s["running_mean"], s["running_var"]
    if training:
        y, _, μ, σ2 = field.online(x, μ, σ2, 0.8, EPS, k)
    else:
        y, _ = field.batch_norm(x, running(s), False, **COMMON, k=k)
    z = _keep(field._affine(s["weight"], x) * y + field._affine(s["bias"], x), k)
    mean = field._mean(z**2, tuple(range(1, x.ndim)), k)
    return z / np.sqrt(mean + EPS), {"running_mean": μ, "running_var": σ2} if training else {}


def _keep(y, k):
    return y if k is None else np.where(k, y, 0)


def cross_iteration(s, training, inputs, k, base):
    h, θ = inputs
    x = np.moveaxis(np.tensordot(h, θ, (1, 1)), -1, 1)
    if not training:
        return moved(*field.batch_norm(x, running(s), False, **affine(s), **COMMON, k=k))
    past = [remembered(s, i) for i in range(int(s["remembered"]))]
    y, μ̄, σ̄2 = field.cross_iteration(x, base[1], past, **affine(s), ε=EPS, k=k)
    kept = np.broadcast_to(True if k is None else k, (x.shape[0], 1, *x.shape[2:])).ravel()
    rows, cells = (np.moveaxis(a, 1, 0).reshape(a.shape[1], -1)[:, kept] for a in (x, h))
    m = max(int(kept.sum()), 1)
    after = {
        "running_mean": (1 - MOMENTUM) * s["running_mean"] + MOMENTUM * μ̄,
        "running_var": (1 - MOMENTUM) * s["running_var"] + MOMENTUM * σ̄2 * m / (m - 1),
    }
    # μ_c = mean over the cells of Σ_f θ_cf h_f, ν_c of its square: the derivatives by hand.
    μ, ν = rows.sum(1) / m, (rows**2).sum(1) / m
    dμ, dν = np.broadcast_to(cells.sum(1) / m, θ.shape), 2 * rows @ cells.T / m
    newest = (μ, ν - μ**2, dμ, dν - 2 * μ[:, None] * dμ, θ)
    for name, value in zip(("mean", "var", "dmean", "dvar", "weight"), newest, strict=True):
        after[f"past_{name}"] = np.concatenate([value[None], s[f"past_{name}"]])[:2]
    after["remembered"] = np.minimum(s["remembered"] + 1, 2)
    return y, after


def remembered(s: State, i: int) -> field.CBN:
    μ, σ2, dμ, dσ2, θ = (s[f"past_{name}"][i] for name in ("mean", "var", "dmean", "dvar", "weight"))
    return field.CBN(θ, μ, σ2 + μ**2, dμ, dσ2 + 2 * μ[:, None] * dμ)


# --- inputs and calls of several arguments --------------------------------------------------------------------------


def channels_last(rank, seed):
    return (data(LAYOUTS[rank], seed).movedim(1, -1).contiguous(),)


def with_domains(rank, seed):
    return data(LAYOUTS[rank], seed), torch.arange(LAYOUTS[rank][0]) % 2


def with_classes(rank, seed):
    return data(LAYOUTS[rank], seed), (torch.arange(LAYOUTS[rank][0]) + seed) % 3


def with_rows(rank, seed):
    return data(LAYOUTS[rank], seed), data(LAYOUTS[rank][:2], seed + 50), data(LAYOUTS[rank][:2], seed + 60)


def with_style(rank, seed):
    n, c, *space = LAYOUTS[rank]
    return data(LAYOUTS[rank], seed), data((n, c, *(s + 2 for s in space)), seed + 70)


def with_labels(rank, seed):
    n, _, *space = LAYOUTS[rank]
    return data(LAYOUTS[rank], seed), data((n, 2, *(2 * s for s in space)), seed + 80)


def with_weight(rank, seed):
    """What goes into the layer before, and that layer's weight, which takes small steps."""
    n, _, *space = LAYOUTS[rank]
    return data((n, 4, *space), seed), data((C, 4), 90) + 0.1 * data((C, 4), seed + 90)


def call_pair(layer, x, weight, bias, **options):
    return layer(x, (weight, bias), **options)


def call_behind(layer, h, weight, **options):
    return layer(torch.einsum("nf...,cf->nc...", h, weight), weight, **options)


def norm(name: str, *arguments: Any, **defaults: Any) -> Callable[..., nn.Module]:
    """A constructor with arguments that differ from the defaults wherever that shows."""
    return lambda **options: getattr(ns.nn, name)(*arguments, **{**defaults, **options})


BOTH = {"eps": EPS, "momentum": MOMENTUM}
BATCH, RUNNING = "the batch", "running mean and variance"
GROUPS = ({"num_groups": 4}, ns.ShapeError, "must be divisible by num_groups")

RECORDS = (
    Record(
        "LayerNorm2d", norm("LayerNorm2d", C, eps=EPS), layer_norm_2d,
        scope="`n [c] ...`", training="the position", inference="the position",
    ),
    Record(
        "PositionalNorm", norm("PositionalNorm", C, eps=EPS), layer_norm_2d,
        scope="`n [c] ...`", training="the position", inference="the position",
    ),
    Record(
        "ScaleNorm", norm("ScaleNorm", C, eps=EPS), scale_norm, inputs=channels_last, axis=-1,
        scope="`... [c]`", training="the vector", inference="the vector", refused=(WRONG_EPS,),
    ),
    Record(
        "FilterResponseNorm", norm("FilterResponseNorm", C, eps=EPS), frn, residual=False,
        scope="`n c [...]`, not centred", training="the sample", inference="the sample",
        refused=(WRONG_EPS, ({"activation": "tlv"}, ns.ArgumentError, "'tlv' is unknown")),
    ),
    Record(
        "FilterResponseNorm, learn_eps", norm("FilterResponseNorm", C, eps=EPS, learn_eps=True, activation=None), frn,
        residual=False, documented=False,
    ),
    Record(
        "GlobalResponseNorm", norm("GlobalResponseNorm", C, eps=EPS), grn_last, inputs=channels_last, axis=-1,
        residual=False, scope="`n [...] c`, then `n [c]` of the norms", training="the sample", inference="the sample",
        refused=(WRONG_EPS,),
    ),
    Record(
        "GlobalResponseNorm, channels first", norm("GlobalResponseNorm", C, eps=EPS, channels_last=False), grn,
        residual=False, documented=False,
    ),
    Record(
        "DynamicTanh", norm("DynamicTanh", C), dyt, inputs=channels_last, axis=-1, mask=False, residual=False,
        scope="none", training="none", inference="none",
    ),
    Record(
        "DynamicTanh, channels first", norm("DynamicTanh", C, channels_last=False), dyt_first, mask=False,
        residual=False, documented=False,
        refused=(({"normalized_shape": (2, 3)}, ns.ShapeError, "normalized_shape has one size, not 2"),),
    ),
    Record(
        "EvoNormS0", norm("EvoNormS0", C, groups=3, eps=EPS), evonorm_s0, residual=False,
        scope="`n (g [c]) [...]`", training="the sample", inference="the sample",
        refused=(WRONG_EPS, ({"groups": 4}, ns.ShapeError, "must be divisible by num_groups (4)")),
    ),
    Record(
        "EvoNormB0", norm("EvoNormB0", C, **BOTH), evonorm_b0, residual=False, running=STATISTICS,
        scope="`[n] c [...]` and `n c [...]`", training="the batch and the sample",
        inference="running variance and the sample", refused=(WRONG_EPS,),
    ),
    Record(
        "FrozenBatchNorm", norm("FrozenBatchNorm", C, eps=EPS), frozen, found=False,
        scope="`[n] c [...]`", training="buffers that stay", inference="the same",
    ),
    Record(
        "MeanOnlyBatchNorm", norm("MeanOnlyBatchNorm", C, momentum=MOMENTUM), mean_only, running=STATISTICS,
        scope="`[n] c [...]`, not scaled", training=BATCH, inference="running mean",
    ),
    Record(
        "GhostBatchNorm", norm("GhostBatchNorm", C, 3, **BOTH), ghost, running=STATISTICS,
        scope="`(g [n]) c [...]`", training="slices of the batch", inference=RUNNING,
        refused=(({"ghost_size": 0}, ns.ArgumentError, "ghost_size must be positive"),),
    ),
    Record(
        "BatchRenorm", norm("BatchRenorm", C, rmax=1.2, dmax=0.3, schedule=None, **BOTH), batch_renorm,
        running=STATISTICS, scope="`[n] c [...]`", training="the batch, corrected by the running statistics",
        inference=RUNNING, double=False, again=False,
        refused=(
            ({"rmax": 0.9}, ns.ArgumentError, "rmax must be 1 or more"),
            ({"schedule": (10, 5, 20)}, ns.ArgumentError, "with start before both"),
        ),
    ),
    Record(
        "EvalNorm", norm("EvalNorm", C, alpha_init_value=0.2, **BOTH), eval_norm, running=STATISTICS,
        auxiliary=eval_norm_loss, scope="`[n] c [...]`; `n c [...]`", training=BATCH,
        inference="a learned mixture of running and the sample's own", double=False,
        refused=(({"alpha_init_value": 1.5}, ns.ArgumentError, "must lie in [0, 1]"),),
    ),
    Record(
        "SwitchNorm", norm("SwitchNorm", C, **BOTH), switch, running=STATISTICS,
        scope="`n c [...]`, `n [c ...]`, `[n] c [...]`", training="a learned mixture of sample, layer and batch",
        inference="the same with running for the batch's",
    ),
    Record(
        "SplitBatchNorm", norm("SplitBatchNorm", C, 2, **BOTH), split, inputs=with_domains,
        running=tuple(f"domains.{i}.{name}" for i in (0, 1) for name in STATISTICS),
        scope="`[n] c [...]` per domain", training="the domain's samples in the batch",
        inference="the domain's running mean and variance",
        refused=(({"num_domains": 0}, ns.ArgumentError, "num_domains must be positive"),),
    ),
    Record(
        "ConditionalBatchNorm", norm("ConditionalBatchNorm", C, 3, **BOTH), conditional, inputs=with_classes,
        running=STATISTICS, scope="`[n] c [...]`", training=BATCH, inference=RUNNING,
    ),
    Record(
        "ConditionalBatchNorm, γ and β given", norm("ConditionalBatchNorm", C, None, **BOTH), conditional_pair,
        inputs=with_rows, call=call_pair, running=STATISTICS, documented=False,
    ),
    Record(
        "AdaIN", norm("AdaIN", C, eps=EPS), adain, inputs=with_style, ranks=(3, 4, 5),
        scope="`n c [...]`", training="the sample; γ and β from the style", inference="the same", refused=(WRONG_EPS,),
    ),
    *(
        Record(
            f"SPADE, dims={dims}" if dims != 2 else "SPADE", norm("SPADE", C, 2, 3, dims=dims, **BOTH), spade,
            inputs=with_labels, wide=True, ranks=(dims + 2,), running=STATISTICS, documented=dims == 2,
            scope="`[n] c [...]`", training="the batch; γ and β from the map of labels", inference=RUNNING,
            refused=(({"kernel_size": 2}, ns.ArgumentError, "kernel_size odd"),),
        )
        for dims in (1, 2, 3)
    ),
    Record(
        "IterNorm", norm("IterNorm", C, 2, 4, **BOTH), whitening(lambda Σ: field.iterative(Σ, 4)), whole=True,
        running=("running_mean", "running_whitening"), measured=False, scope="`[n] (g c) [...]`, whitened per g",
        training=BATCH, inference="running mean and matrix", refused=(WRONG_EPS, GROUPS),
    ),
    Record(
        "DecorrelatedBatchNorm", norm("DecorrelatedBatchNorm", C, 2, **BOTH), whitening(field.zca), whole=True,
        running=("running_mean", "running_whitening"), measured=False, double=False,
        scope="`[n] (g c) [...]`, whitened per g", training=BATCH, inference="running mean and matrix",
        refused=(WRONG_EPS, GROUPS),
    ),
    Record(
        "OnlineNorm", norm("OnlineNorm", C, 0.8, 0.7, eps=EPS), online, running=STATISTICS, exact=False, double=False,
        again=False, scope="`n c [...]` of earlier samples", training="the samples before, decaying",
        inference=RUNNING,
        refused=(
            ({"alpha_fwd": 1.0}, ns.ArgumentError, "alpha_fwd must lie in [0, 1)"),
            ({"control": "none"}, ns.ArgumentError, "control 'none' is unknown"),
        ),
    ),
    Record(
        "CrossIterationBatchNorm", norm("CrossIterationBatchNorm", C, 4, 3, **BOTH), cross_iteration,
        inputs=with_weight, call=call_behind, whole=True, wide=True,
        running=(
            *STATISTICS, "past_mean", "past_var", "past_dmean", "past_dvar", "past_weight", "remembered",
        ),
        double=False, again=False, scope="`[n] c [...]` over k batches",
        training="the last k batches, carried to the present weight", inference=RUNNING,
    ),
)  # fmt: skip
