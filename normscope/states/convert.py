"""States as dictionaries: read another system's, write another system's; nothing is guessed and nothing is lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normscope.errors import ArgumentError, DtypeError, ShapeError, StateError
from normscope.states.systems import Kind, System, Values, known

__all__ = ["layers", "read", "write"]

_NEUTRAL = {"weight": 1.0, "bias": 0.0}
# Caffe's blobs have no names; a Scale layer has one or two, a BatchNorm layer three.
_BLOBS = {1: ("gamma",), 2: ("gamma", "beta"), 3: ("mean", "variance", "scale_factor")}
_CAFFE_LAYERS = {"BatchNorm": "", "Scale": ""}
SHOWN = 8

# Values of a state by layer and key.
_Layers = dict[str, dict[str, Any]]


def read(
    state: Mapping[str, Any],
    system: str,
    names: Mapping[str, str] | None = None,
    *,
    kind: str = "BatchNorm",
    eps: float | None = None,
) -> dict[str, Tensor]:
    """The state of normalizers of another system as a `state_dict`, ready for `load_state_dict`.

    In evaluation the layer computes with it what theirs computes, if it has their ε (`options`). Values are copied;
    they are the same bits where only the name changes. A β without γ gets γ = 1, since no layer of torch has β alone.
    Batches are not counted in Keras, Flax, Caffe: `load_state_dict` leaves the counter as it is.

    Args:
        state: Theirs, of arrays or tensors: of one layer, or of a model. Keras: `{w.path: w.numpy() for w in
            model.weights}`; Flax: the variables, or `nnx.to_pure_dict(nnx.state(model))`; Caffe: `{name: [b.data for b
            in blobs] for name, blobs in net.params.items()}`; the others: `model.state_dict()`.
        system: A name of `SYSTEMS`.
        names: Their layer's path → ours, for every layer that is wanted; None where the state is that of one layer.
            In Caffe a BatchNorm and the Scale behind it have the same path here; None takes "BatchNorm" and "Scale".
        kind: Which layer; a kind of the system.
        eps: Their ε, where a value depends on it; None for their default.

    Returns:
        New tensors by the keys of torch.

    Raises:
        StateError: A layer or key is missing or unknown, or its values have no equal here.
        ShapeError: The values of a layer have different shapes.
        ArgumentError: An unknown name, or ε where no value depends on it.

    Example:
        >>> import numpy as np, normscope as ns
        >>> keras = {"bn/gamma": np.full(3, 2.0), "bn/beta": np.zeros(3),
        ...          "bn/moving_mean": np.arange(3.0), "bn/moving_variance": np.ones(3)}
        >>> state = ns.states.read(keras, "keras", {"bn": "stem.norm"})
        >>> state["stem.norm.running_mean"]
        tensor([0., 1., 2.], dtype=torch.float64)
    """
    spec, lines = known(system, kind)
    eps = _epsilon(system, kind, eps)
    theirs = _split(state, spec, system)
    merged: dict[str, dict[str, tuple[str, Any]]] = {}
    for layer, path in _names(names, system).items():
        for key, value in _translated(layer, theirs, lines, system, kind).items():
            if key in merged.setdefault(path, {}):
                raise StateError(
                    f"two layers give {path or 'the layer'} its {key}", layers=f"{merged[path][key][0]}, {layer}",
                    cure="one layer here is one layer there; a BatchNorm and a Scale in Caffe",
                )  # fmt: skip
            merged[path][key] = layer, value
    result: dict[str, Tensor] = {}
    for path, found in merged.items():
        layer = ", ".join(dict.fromkeys(layer for layer, _ in found.values()))
        values = {key: _tensor(value, key, layer) for key, (_, value) in found.items()}
        _demand({lines.keys[key]: t for key, t in values.items()}, layer, [lines.keys[key] for key in lines.needs])
        values = _converted(lines.to_torch, values, eps, layer)
        _check_shapes(values, layer)
        if "bias" in values and "weight" not in values:
            values["weight"] = torch.ones_like(values["bias"])
        result |= {_joined(path, key, "."): values[key] for key in sorted(values, key=_order)}
    return result


def write(
    state: Mapping[str, Any],
    system: str,
    names: Mapping[str, str] | None = None,
    *,
    kind: str = "BatchNorm",
    eps: float | None = None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The state of normalizers here as the state of another system: `read` backwards, with the same `names`.

    Keras and Caffe get NumPy arrays in one dictionary, Flax in nested ones, the others tensors; bfloat16, which NumPy
    does not have, becomes float32. What the system has no place for, and no output depends on, is left out: the count
    of batches, and the running mean of EvoNormB0 in timm. Caffe's sums are written with the factor 1.

    Args:
        state: A `state_dict` of one layer, or of a model.
        system: A name of `SYSTEMS`.
        names: Their layer's path → ours, as in `read`.
        kind: Which layer.
        eps: Their ε, where a value depends on it; None for their default.
        without: "weight" for layers without γ there (`scale=False`), "bias" for those without β (`center=False`); the
            values left out must be 1, or 0.

    Raises:
        StateError: A layer or key is missing or unknown, or a value cannot be expressed there.
        ShapeError: The values of a layer have different shapes.
        ArgumentError: An unknown name, or ε where no value depends on it.

    Example:
        >>> import torch, normscope as ns
        >>> variables = ns.states.write(torch.nn.BatchNorm2d(2).state_dict(), "flax", {"BatchNorm_0": ""})
        >>> variables["batch_stats"]
        {'BatchNorm_0': {'mean': array([0., 0.], dtype=float32), 'var': array([1., 1.], dtype=float32)}}
    """
    spec, lines = known(system, kind)
    eps = _epsilon(system, kind, eps)
    if set(without) - _NEUTRAL.keys():
        raise ArgumentError(f"without={without!r}: only weight and bias can be left out", cure="name one, or both")
    ours = _grouped(state)
    theirs: dict[str, list[str]] = {}
    for layer, path in _names(names, system).items():
        theirs.setdefault(path, []).append(layer)
    flat: dict[str, Any] = {}
    for path, places in theirs.items():
        values = _given(ours, path, lines, system, kind)
        _demand(values, path, lines.wanted)
        _check_shapes(values, path)
        for key in without:
            _leave_out(values, key, path)
        values = _converted(lines.from_torch, values, eps, path)
        named = {lines.keys[key]: t if spec.tensors else _array(t) for key, t in values.items()}
        flat |= _placed(named, places, path, spec, system)
    return _nest(flat, spec.separator, numbered=not spec.collections) if spec.nested else flat


def layers(state: Mapping[str, Any], system: str, *, kind: str = "BatchNorm") -> tuple[str, ...]:
    """The paths of the layers of a kind in another system's state, by their keys; what `names` is made from.

    Args:
        state: Theirs; see `read`.
        system: A name of `SYSTEMS`.
        kind: Which layer. LayerNorm, GroupNorm and InstanceNorm mostly have the same keys; names tell them apart.

    Example:
        >>> import numpy as np, normscope as ns
        >>> zeros = np.zeros(3)
        >>> flax = {"params": {"Conv_0": {"kernel": zeros}, "BatchNorm_0": {"scale": zeros, "bias": zeros}},
        ...         "batch_stats": {"BatchNorm_0": {"mean": zeros, "var": zeros}}}
        >>> ns.states.layers(flax, "flax")
        ('BatchNorm_0',)
    """
    spec, lines = known(system, kind)
    needed = {lines.keys[key] for key in lines.needs or ("weight",)}
    found = _split(state, spec, system).items()
    return tuple(layer for layer, values in found if needed <= values.keys() <= set(lines.keys.values()))


# --- layers of a state ------------------------------------------------------------------------------------------------


def _names(names: Mapping[str, str] | None, system: str) -> Mapping[str, str]:
    if names is not None:
        return names
    return _CAFFE_LAYERS if system == "caffe" else {"": ""}


def _split(state: Mapping[str, Any], spec: System, system: str) -> _Layers:
    found: _Layers = {}
    for path, value in _leaves(state, spec.separator, blobs=system == "caffe"):
        *above, key = path.split(spec.separator)
        if spec.collections and above:
            key = f"{above.pop(0)}/{key}"
        found.setdefault(spec.separator.join(above), {})[key] = value
    return found


def _leaves(state: Mapping[str, Any], separator: str, path: str = "", *, blobs: bool) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        here = _joined(path, str(name), separator)
        if isinstance(value, Mapping):
            yield from _leaves(value, separator, here, blobs=blobs)
        elif blobs and isinstance(value, Sequence):
            keys = _BLOBS.get(len(value), [f"blob {k} of {len(value)}" for k in range(len(value))])
            yield from ((_joined(here, key, separator), blob) for key, blob in zip(keys, value, strict=True))
        else:
            yield here, value


def _translated(layer: str, theirs: _Layers, lines: Kind, system: str, kind: str) -> dict[str, Any]:
    """The values of one layer by torch's keys."""
    if layer not in theirs:
        raise StateError(
            f"no layer {layer!r} in this state of {system}", layers=_list(theirs),
            cure="names maps their layers to ours; ns.states.layers lists theirs",
        )  # fmt: skip
    keys = {name: key for key, name in lines.keys.items()}
    for key in theirs[layer]:
        if key not in keys:
            raise StateError(
                f"unknown key {key!r}", layer=layer or "(the layer itself)",
                expected=f"{', '.join(keys)} ({system} {kind})",
                cure="choose the kind= that the layer is; keys of other software have to be renamed first",
            )  # fmt: skip
    return {keys[key]: value for key, value in theirs[layer].items()}


def _grouped(state: Mapping[str, Any]) -> _Layers:
    ours: _Layers = {}
    for path, value in state.items():
        layer, _, key = path.rpartition(".")
        ours.setdefault(layer, {})[key] = value
    return ours


def _given(ours: _Layers, path: str, lines: Kind, system: str, kind: str) -> Values:
    """The values of one of our layers, without those that the system drops."""
    if path not in ours:
        raise StateError(
            f"no layer {path!r} in this state_dict", layers=_list(ours), cure="names maps their layers to ours"
        )
    for key in ours[path]:
        if key not in (*lines.written, *lines.dropped):
            raise StateError(
                f"{system} has no place for {key!r} in a {kind}", layer=path or "(the layer itself)",
                expected=", ".join((*lines.written, *lines.dropped)), cure="choose the kind= that the layer is",
            )  # fmt: skip
    return {key: _tensor(value, key, path) for key, value in ours[path].items() if key in lines.written}


def _placed(values: dict[str, Any], places: list[str], path: str, spec: System, system: str) -> dict[str, Any]:
    """The values of one layer under the paths of the layers there."""
    if system == "caffe":
        return _blobs(values, places, path)
    if len(places) != 1:
        raise ArgumentError(
            f"{path!r} is named by {len(places)} layers", layers=", ".join(places), cure="one layer is one layer there"
        )
    placed = {}
    for key, value in values.items():
        collection, _, name = key.rpartition("/") if spec.collections else ("", "", key)
        placed[spec.separator.join(part for part in (collection, places[0], name) if part)] = value
    return placed


def _blobs(values: dict[str, Any], places: list[str], path: str) -> dict[str, Any]:
    """Caffe: the statistics in a BatchNorm layer, γ and β in the Scale layer behind it."""
    affine = [values[key] for key in _BLOBS[2] if key in values]
    if len(places) != 1 + bool(affine):
        raise StateError(
            f"{path or 'the layer'} has {'γ' if affine else 'neither γ nor β'}, and {len(places)} layers of Caffe are "
            "named for it",
            layers=", ".join(places), cure="name a BatchNorm, and a Scale after it where there is γ",
        )  # fmt: skip
    return dict(zip(places, ([values[key] for key in _BLOBS[3]], affine), strict=False))


def _nest(flat: dict[str, Any], separator: str, *, numbered: bool) -> dict[str, Any]:
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        *above, key = (int(part) if numbered and part.isdigit() else part for part in path.split(separator))
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[key] = value
    return nested


def _joined(path: str, key: str, separator: str) -> str:
    return f"{path}{separator}{key}" if path else key


def _list(names: Mapping[str, Any]) -> str:
    shown = [name or "(the layer itself)" for name in names]
    return ", ".join(shown[:SHOWN]) + (f", … and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "") or "none"


# --- values -----------------------------------------------------------------------------------------------------------


def _epsilon(system: str, kind: str, eps: float | None) -> float:
    lines = known(system, kind)[1]
    if eps is not None and not lines.by_eps:
        raise ArgumentError(
            f"no value of {system}'s {kind} depends on ε",
            cure="leave eps out, and give it to the layer: ns.states.options",
        )
    return lines.eps if eps is None else eps


def _tensor(value: Any, key: str, layer: str) -> Tensor:
    """A copy as a tensor, bit for bit."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    array = np.array(value)
    if array.dtype.name == "bfloat16":  # of JAX, unknown to torch.from_numpy
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise DtypeError(f"{key} holds {array.dtype}", layer=layer, cure="pass arrays or tensors of numbers")
    return torch.from_numpy(array)


def _array(t: Tensor) -> np.ndarray[Any, Any]:
    return (t.float() if t.dtype == torch.bfloat16 else t).cpu().numpy()


def _demand(values: Mapping[str, Any], layer: str, needed: Collection[str]) -> None:
    missing = [key for key in needed if key not in values]
    if missing:
        raise StateError(
            f"missing key {', '.join(map(repr, missing))}", layer=layer or "(the layer itself)",
            expected=", ".join(needed), found=_list(values),
            cure="running statistics often lie apart from the parameters: pass both; or choose another kind=",
        )  # fmt: skip


def _converted(meaning: Any, values: Values, eps: float, layer: str) -> Values:
    try:
        return dict(meaning(dict(values), eps))
    except StateError as error:
        error.context = {"layer": layer or "(the layer itself)", **error.context}
        raise


def _check_shapes(values: Values, layer: str) -> None:
    shapes = {key: tuple(t.shape) for key, t in values.items() if key != "num_batches_tracked"}
    if len(set(shapes.values())) > 1:
        raise ShapeError(
            "the values of one layer have different shapes", layer=layer or "(the layer itself)",
            shapes=", ".join(f"{key} {shape}" for key, shape in shapes.items()),
            cure="all of them have one value per channel",
        )  # fmt: skip


def _leave_out(values: Values, key: str, layer: str) -> None:
    if key in values and bool((values.pop(key) != _NEUTRAL[key]).any()):
        raise StateError(
            f"{key} cannot be left out: it is not {_NEUTRAL[key]:.0f} everywhere", layer=layer or "(the layer itself)",
            cure="let the layer there have it",
        )  # fmt: skip


def _order(key: str) -> int:
    order = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return order.index(key) if key in order else len(order)
