"""The table of systems: what each calls the state of its normalizers, and what its numbers mean.

The keys are told from torch's point of view: torch's name → theirs. Where the numbers mean something else, too, a
system has a pair of functions between torch's values and its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

import torch
from torch import Tensor

from normscope.errors import ArgumentError, StateError

__all__ = ["SYSTEMS", "Kind", "System", "Values", "complement", "known", "options"]

Values = dict[str, Tensor]
# (values by torch's names, ε) → the same in the other system's meaning, and back.
Meaning = Callable[[Values, float], Values]


def _same(values: Values, _: float) -> Values:
    return values


@dataclass(frozen=True)
class Kind:
    """The state of one kind of layer in one system.

    Attributes:
        keys: torch's key → theirs; "collection/key" in a system whose outermost level is collections.
        eps: The default ε of their layer.
        momentum: The default momentum of their layer, in their convention; None where there are no running statistics.
        needs: Keys, by torch's names, without which a state of theirs is not one of this kind.
        wants: Keys without which a layer here cannot be written; None where they are the same.
        dropped: Keys of ours which they have no place for, and which change no output.
        to_torch: Their values → torch's.
        from_torch: torch's values → theirs.
        by_eps: Whether these two depend on ε.
    """

    keys: Mapping[str, str]
    eps: float
    momentum: float | None = None
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] | None = None
    dropped: tuple[str, ...] = ()
    to_torch: Meaning = _same
    from_torch: Meaning = _same
    by_eps: bool = False

    @property
    def written(self) -> tuple[str, ...]:
        """The keys of ours that can be written."""
        return (*self.wanted, *(key for key in self.keys if key not in self.needs))

    @property
    def wanted(self) -> tuple[str, ...]:
        """Those of them that must be there."""
        return self.needs if self.wants is None else self.wants


@dataclass(frozen=True)
class System:
    """A system and its kinds of layers.

    Attributes:
        kinds: By the name of our layer.
        separator: Between the names in a path.
        history: Whether its momentum is the weight of the old statistics (0.99), not of the newest batch (0.01).
        collections: Whether the outermost level of a state is kinds of variables, below which come the layers.
        nested: Whether a state is dictionaries in dictionaries; else one flat dictionary.
        tensors: Whether a state holds torch's tensors; else NumPy's arrays.
    """

    kinds: Mapping[str, Kind] = field(repr=False)
    separator: str = "."
    history: bool = False
    collections: bool = False
    nested: bool = False
    tensors: bool = True


# --- what the numbers mean --------------------------------------------------------------------------------------------


def complement(momentum: float) -> float:
    """1 − momentum, in decimal digits: the weight of the newest batch from that of the history, and back.

    Args:
        momentum: In [0, 1].

    Raises:
        ArgumentError: It lies outside.

    Example:
        >>> import normscope as ns
        >>> ns.states.complement(0.99), ns.states.complement(0.01), 1 - 0.99
        (0.01, 0.99, 0.010000000000000009)
    """
    if not 0 <= momentum <= 1:
        raise ArgumentError(
            f"momentum must lie in [0, 1], but is {momentum}", cure="0.99 of Keras and Flax is 0.01 here"
        )
    return float(1 - Decimal(repr(float(momentum))))


def _from_caffe(values: Values, _: float) -> Values:
    """Sums whose weights add up to the factor → means; 0 means that nothing has entered, and Caffe computes with 0."""
    values = _in_one_axis(values, 0.0)
    factor = values.pop("scale_factor")
    weight = torch.where(factor == 0, 0, factor.reciprocal())  # Caffe's own arithmetic, to the last bit
    return {key: t * weight if key.startswith("running") else t for key, t in values.items()}


def _to_caffe(values: Values, _: float) -> Values:
    return values | {"scale_factor": torch.ones_like(values["running_mean"][:1])}


def _in_one_axis(values: Values, _: float) -> Values:
    """(1, C, 1, 1), as old versions have it → (C,)."""
    return {key: t.reshape(-1) if t.dim() == 4 else t for key, t in values.items()}


def _from_renorm(values: Values, _: float) -> Values:
    """Keras corrects by a pair of statistics with a momentum of its own; the layer here by those of evaluation."""
    for key, of in (("renorm_mean", "running_mean"), ("renorm_stddev", "moving_stddev")):
        if not torch.equal(values[key], values[of]):
            raise StateError(
                f"{key} is not the statistic of evaluation, and BatchRenorm here keeps one pair of statistics",
                cure="renorm_momentum equal to momentum keeps them equal; without moving_stddev, renorm_mean and "
                'renorm_stddev the state reads as kind="BatchNorm", which evaluates the same',
            )
    return {key: t for key, t in values.items() if key not in _RENORM}


def _to_renorm(values: Values, eps: float) -> Values:
    stddev = (values["running_var"] + eps).sqrt()
    return values | {"moving_stddev": stddev, "renorm_stddev": stddev, "renorm_mean": values["running_mean"]}


def _with_eps(values: Values, eps: float) -> Values:
    """The variance to which ε has been added already."""
    return values | {"running_var": values["running_var"] + eps}


def _without_eps(values: Values, eps: float) -> Values:
    return values | {"running_var": values["running_var"] - eps}


def _unfolded(values: Values, eps: float) -> Values:
    """γ' · x + β' without statistics, as a layer whose √(σ² + ε) is 1."""
    one = torch.ones_like(values["weight"])
    return values | {"running_mean": torch.zeros_like(one), "running_var": one - eps}


def _folded(values: Values, eps: float) -> Values:
    weight = values["weight"] / (values["running_var"] + eps).sqrt()
    return {"weight": weight, "bias": values["bias"] - weight * values["running_mean"]}


def _magnitude(values: Values, eps: float) -> Values:
    """γ = |w| + ε, which never is 0, so that the layer can be inverted."""
    return values | {"weight": values["weight"].abs() + eps} if "weight" in values else values


def _signed(values: Values, eps: float) -> Values:
    if "weight" in values and bool((values["weight"] < eps).any()):
        raise StateError(
            f"in-place ABN computes with |weight| + {eps}, and γ is smaller in {int((values['weight'] < eps).sum())} "
            "channels",
            cure="such a layer cannot be written for it; its ABN, without in-place, reads torch's names and numbers",
        )
    return values | {"weight": values["weight"] - eps} if "weight" in values else values


def _unused_mean(values: Values, eps: float) -> Values:
    """The running mean that EvoNormB0 here keeps for the tools that look at it; no output depends on it."""
    values = _in_one_axis(values, eps)
    return values | {"running_mean": torch.zeros_like(values["running_var"])}


# --- the table --------------------------------------------------------------------------------------------------------

_STATISTICS = ("running_mean", "running_var")
_COUNTER = ("num_batches_tracked",)
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


def _keys(weight: str, bias: str | None = None, mean: str | None = None, var: str | None = None) -> dict[str, str]:
    theirs = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    return {key: name for key, name in theirs.items() if name is not None}


def _own(*keys: str) -> dict[str, str]:
    """Keys that are called as torch calls them."""
    return {key: key for key in keys}


_KERAS = _keys("gamma", "beta", "moving_mean", "moving_variance")
_LINEN = _keys("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var")
_NNX = _keys("scale", "bias", "mean", "var")
_TORCH = _own("weight", "bias", *_STATISTICS)
_FROZEN = Kind(_TORCH, 1e-5, None, tuple(_TORCH), dropped=_COUNTER)


def _flax(keys: dict[str, str]) -> dict[str, Kind]:
    affine = _keys(keys["weight"], keys["bias"])
    return {
        "BatchNorm": Kind(keys, 1e-5, 0.99, _STATISTICS, dropped=_COUNTER),
        "LayerNorm": Kind(affine, 1e-6),
        "GroupNorm": Kind(affine, 1e-6),
        "InstanceNorm": Kind(affine, 1e-6),
        "RMSNorm": Kind(_keys(keys["weight"]), 1e-6, needs=("weight",)),
    }


SYSTEMS: Mapping[str, System] = {
    "keras": System(
        {
            "BatchNorm": Kind(_KERAS, 1e-3, 0.99, _STATISTICS, dropped=_COUNTER),
            "BatchRenorm": Kind(
                _KERAS | _own(*_RENORM), 1e-3, 0.99, (*_STATISTICS, *_RENORM), _STATISTICS, _COUNTER,
                _from_renorm, _to_renorm, by_eps=True,
            ),
            "LayerNorm": Kind(_keys("gamma", "beta"), 1e-3),
            "GroupNorm": Kind(_keys("gamma", "beta"), 1e-3),
            "RMSNorm": Kind(_keys("scale"), 1e-6, needs=("weight",)),
        },
        separator="/", history=True, tensors=False,
    ),
    "flax": System(_flax(_LINEN), separator="/", history=True, collections=True, nested=True, tensors=False),
    "nnx": System(_flax(_NNX), separator="/", history=True, nested=True, tensors=False),
    "caffe": System(
        {
            "BatchNorm": Kind(
                _keys("gamma", "beta", "mean", "variance") | _own("scale_factor"), 1e-5, 0.999,
                (*_STATISTICS, "scale_factor"), _STATISTICS, _COUNTER, _from_caffe, _to_caffe,
            )
        },
        separator="/", history=True, tensors=False,
    ),
    "torchvision": System({"BatchNorm": _FROZEN}),
    "detectron2": System({"BatchNorm": _FROZEN}),
    "detectron2-v1": System(
        {
            "BatchNorm": Kind(
                _own("weight", "bias"), 1e-5, None, ("weight", "bias"), tuple(_TORCH), _COUNTER, _unfolded, _folded,
                by_eps=True,
            )
        }
    ),
    "detectron2-v2": System(
        {"BatchNorm": replace(_FROZEN, to_torch=_without_eps, from_torch=_with_eps, by_eps=True)}
    ),
    "inplace_abn": System(
        {
            "BatchNorm": Kind(
                _TORCH | _own(*_COUNTER), 1e-5, 0.1, _STATISTICS, to_torch=_magnitude, from_torch=_signed, by_eps=True
            )
        }
    ),
    "timm": System(
        {
            "EvoNormB0": Kind(
                _own("weight", "bias", "v", "running_var"), 1e-3, 0.1, ("weight", "bias", "v", "running_var"),
                dropped=("running_mean", *_COUNTER), to_torch=_unused_mean,
            ),
            "EvoNormS0": Kind(_own("weight", "bias", "v"), 1e-5, needs=("weight", "bias", "v"), to_torch=_in_one_axis),
            "FilterResponseNorm": Kind(
                _own("weight", "bias", "tau"), 1e-5, needs=("weight", "bias"), to_torch=_in_one_axis
            ),
            "GlobalResponseNorm": Kind(_own("weight", "bias"), 1e-6, needs=("weight", "bias")),
        }
    ),
}  # fmt: skip


def known(system: str, kind: str) -> tuple[System, Kind]:
    """The lines of the table; an unknown name raises ArgumentError."""
    if system not in SYSTEMS:
        raise ArgumentError(f"unknown system {system!r}", cure=f"one of {', '.join(SYSTEMS)}")
    kinds = SYSTEMS[system].kinds
    if kind not in kinds:
        raise ArgumentError(f"{system} has no kind {kind!r} here", cure=f"one of {', '.join(kinds)}")
    return SYSTEMS[system], kinds[kind]


def options(
    system: str, *, kind: str = "BatchNorm", eps: float | None = None, momentum: float | None = None
) -> dict[str, float]:
    """The arguments with which a layer here computes as theirs: ε and momentum in torch's convention.

    Args:
        system: A name of `SYSTEMS`.
        kind: Which layer; a kind of the system.
        eps: Their ε; None for their default, which mostly is not torch's.
        momentum: Their momentum, in their convention; None for their default.

    Raises:
        ArgumentError: An unknown name, a momentum outside [0, 1] or for a layer that has none.

    Example:
        >>> import normscope as ns
        >>> ns.states.options("keras")
        {'eps': 0.001, 'momentum': 0.01}
        >>> layer = ns.nn.BatchNorm2d(8, **ns.states.options("keras", momentum=0.9))
    """
    spec, lines = known(system, kind)
    given = {"eps": lines.eps if eps is None else eps}
    if lines.momentum is None:
        if momentum is not None:
            raise ArgumentError(f"{kind} has no momentum", cure="leave it out")
        return given
    theirs = lines.momentum if momentum is None else momentum
    return given | {"momentum": complement(theirs) if spec.history else theirs}
