"""Edited models as checkpoints: the state_dict, and the operations that a state_dict cannot hold.

Only tensors, numbers and text are in the file, so that `torch.load(weights_only=True)` reads it. Statistics are in the
state_dict; being frozen, a momentum, a new buffer or another layer are not, and are done again before it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from normscope.doctor.remedies import (
    default_eps,
    give,
    instance_norm,
    lower_momentum,
    momentum,
    own_statistics,
    track,
    widen,
)
from normscope.errors import ArgumentError, DataError
from normscope.records import FixRecord
from normscope.surgery import Surgery, freeze, refold
from normscope.surgery.convert import replay

__all__ = ["load", "noted", "operations", "restore", "save", "write"]

FORMAT = 1
# Where the state_dict lies in checkpoints of others.
NESTS = ("state_dict", "model_state_dict", "model")
SHOWN = 5


def save(
    model: Module, fix: FixRecord, path: str | os.PathLike[str], *, earlier: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write a repaired model.

    Args:
        model: The repaired model.
        fix: What was done to it.
        path: The file; written whole or not at all.
        earlier: Operations that had been done before; see `operations`.
    """
    treatments = [
        {
            "code": t.remedy.code,
            "rule": t.rule,
            "safety": t.remedy.safety,
            "text": t.remedy.text,
            "layers": list(t.layers),
        }
        for t in fix.applied
    ]
    write(model, [*earlier, *treatments], path)


def noted(surgery: Surgery) -> dict[str, Any]:
    """An edit as an operation of a checkpoint."""
    return {
        "code": surgery.operation,
        "text": f"{surgery.operation} of {len(surgery.changed)} normalizers",
        "layers": list(surgery.changed),
        "recipe": dict(surgery.recipe),
    }


def write(model: Module, operations: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write an edited model: `{"normscope": {"format", "operations"}, "state_dict"}`.

    Args:
        model: The model.
        operations: What was done to it since it was built, in order: plain data.
        path: The file; written whole or not at all.
    """
    done = [dict(operation) for operation in operations]
    body = {"normscope": {"format": FORMAT, "operations": done}, "state_dict": model.state_dict()}
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        torch.save(body, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(builder: Callable[[], Module], path: str | os.PathLike[str]) -> Module:
    """A model as a checkpoint has it: built, the checkpoint's operations done again, its state_dict loaded.

    Args:
        builder: Returns the model as it was before the operations.
        path: What `normscope fix -o`, `fold -o` or `convert -o` wrote, or a plain state_dict; read with
            `weights_only=True`.

    Raises:
        ArgumentError: The checkpoint does not fit the model.
        DataError: It cannot be read.

    Example:
        >>> import tempfile, torch, normscope as ns
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.nn.LayerNorm(4).state_dict(), f"{folder}/model.pt")
        ...     ns.load(lambda: torch.nn.LayerNorm(4), f"{folder}/model.pt")
        LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    model = builder()
    restore(model, path)
    return model


def restore(model: Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Load a checkpoint into a model, and return what a user should know about it.

    Reads what `save` wrote, a plain state_dict, and one under "state_dict", "model_state_dict" or "model".

    Raises:
        ArgumentError: The checkpoint does not fit the model; missing buffers are forgiven, for they are what a check
            may be about.
        DataError: It cannot be read.
    """
    body = _read(path)
    state = _state(body, path)
    notes = [_replay(model, operation) for operation in _operations(body)]
    known = model.state_dict()
    if state and all(name.startswith("module.") for name in state) and not any(n.startswith("module.") for n in known):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        notes.append("the prefix 'module.' of DataParallel was taken off the checkpoint's names")
    missing = [name for name in known if name not in state]
    lost = [name for name in missing if name in dict(model.named_parameters(remove_duplicate=False))]
    surplus = [name for name in state if name not in known]
    if lost or surplus:
        raise ArgumentError(
            f"{Path(path).name} does not fit the model",
            **{k: v for k, v in {"missing": _some(lost), "unexpected": _some(surplus)}.items() if v},
            cure="build the model with which the checkpoint was saved",
        )
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ArgumentError(
            f"{Path(path).name} does not fit the model: {lines[min(1, len(lines) - 1)].strip()}",
            cure="build the model with which the checkpoint was saved",
        ) from None
    if missing:
        notes.append(f"the checkpoint has no {_some(missing)}: the model keeps its own")
    return tuple(note for note in notes if note)


def operations(path: str | os.PathLike[str]) -> tuple[Mapping[str, Any], ...]:
    """The operations noted in a checkpoint; none in one of others."""
    return _operations(_read(path))


def _read(path: str | os.PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", cure="check the path") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{Path(path).name} cannot be read: {reason}",
            cure="save it with torch.save(model.state_dict(), path); objects other than tensors are not unpickled, "
            "because that could run any code",
        ) from None


def _state(body: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    for nest in (None, *NESTS):
        inner = body if nest is None else body.get(nest) if isinstance(body, Mapping) else None
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return dict(inner)
    raise DataError(
        f"{Path(path).name} holds no state_dict",
        cure=f"save it with torch.save(model.state_dict(), path), or under one of {', '.join(NESTS)}",
    )


def _operations(body: Any) -> tuple[Mapping[str, Any], ...]:
    ours = body.get("normscope") if isinstance(body, Mapping) else None
    if not isinstance(ours, Mapping):
        return ()
    if ours.get("format") != FORMAT:
        raise DataError(
            f"the checkpoint has format {ours.get('format')}, this version reads {FORMAT}", cure="update normscope"
        )
    return tuple(ours.get("operations", ()))


# --- operations that a state_dict cannot hold -------------------------------------------------------------------------


def _freeze(model: Module, layers: list[str]) -> None:
    freeze(model, select=layers)


def _track(model: Module, layers: list[str]) -> None:
    track(model, layers)
    freeze(model, select=layers)


_REPLAY: dict[str, Callable[[Module, list[str]], object]] = {
    "freeze": _freeze,
    "freeze-norms": _freeze,
    "recal-freeze": _freeze,
    "momentum": momentum,
    "lower-momentum": lower_momentum,
    "own-statistics": own_statistics,
    "float32": widen,
    "float32-recal": widen,
    "default-eps": default_eps,
    "track-flag": _track,
    "track-again": track,
    "give-statistics": give,
    "replace-norm": instance_norm,
}


def _convert(model: Module, operation: Mapping[str, Any]) -> None:
    layers = zip(operation["layers"], operation["to"], operation["shapes"], strict=True)
    replay(model, layers, affine=bool(operation["affine"]))


def _refold(model: Module, operation: Mapping[str, Any]) -> None:
    refold(model, [str(name) for name in operation.get("layers", ())], operation.get("recipe", {}))


# Those that need more than the names of layers.
_AGAIN: dict[str, Callable[[Module, Mapping[str, Any]], object]] = {"convert": _convert, "fold": _refold}
# Their result lies in the state_dict.
_STORED = ("recal", "copy-buffers", "absorb-bias")


def _replay(model: Module, operation: Mapping[str, Any]) -> str:
    code, layers = str(operation.get("code")), [str(name) for name in operation.get("layers", ())]
    if code in _STORED:
        return ""
    if code in _REPLAY:
        _REPLAY[code](model, layers)
    elif code in _AGAIN:
        _AGAIN[code](model, operation)
    else:
        raise DataError(f"the checkpoint's operation {code!r} is unknown here", cure="update normscope")
    return f"done again: {operation.get('text')}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
