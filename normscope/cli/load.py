"""The user's own code, unedited: builders and functions by name, and what they return."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module

from normscope.doctor import checkpoint
from normscope.errors import NormscopeError

__all__ = ["LoadingError", "beside", "build_loader", "build_model", "describe", "function", "their_code", "weights"]

FORM = "write package.module:name or path/to/file.py:name"


class LoadingError(NormscopeError, ValueError):
    """Something that the user named cannot be found, built or read."""


@contextlib.contextmanager
def their_code() -> Iterator[None]:
    """What the user's code prints goes to stderr: stdout holds the report."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def build_model(target: str) -> Module:
    """The model that a target names: a function without arguments that returns it, a class, or the model itself."""
    model = _built(target, Module, "a torch.nn.Module")
    if not isinstance(model, Module):
        raise LoadingError(
            f"what {target} gives is {_a(model)}, not a torch.nn.Module",
            cure="name a function without arguments that returns the model",
        )
    return model


def build_loader(target: str, near: str) -> Any:
    """The loader that a target names: a function without arguments that returns it, or an iterable."""
    loader = _built(beside(target, near), None, "an iterable of batches")
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise LoadingError(
            f"what {target} gives is {_a(loader)}, not an iterable of batches",
            cure="name a function without arguments that returns a DataLoader, or a list of batches",
        )
    return loader


def function(target: str | None, near: str) -> Callable[..., Any] | None:
    """The function that a target names; a bare name is looked up where the model comes from."""
    if target is None:
        return None
    found = _find(beside(target, near))
    if not callable(found):
        raise LoadingError(f"{target} is {_a(found)}, not a function", cure=FORM)
    return found  # type: ignore[no-any-return]


def weights(model: Module, path: Path | None) -> None:
    """Load a checkpoint into the model, and say on stderr what is worth saying."""
    if path is not None:
        for note in checkpoint.restore(model, path):
            print(f"note: {note}", file=sys.stderr)  # noqa: T201


# --- names --------------------------------------------------------------------------------------------------------


def beside(target: str, near: str) -> str:
    """The target, in full: a bare name lies where another target does."""
    return target if ":" in target else f"{near.rpartition(':')[0]}:{target}"


def _find(target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise LoadingError(f"{target!r} names no function", cure=FORM)
    found: Any = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")])
            hint = f"did you mean {' or '.join(close)}?" if close else f"define {part} there, or name another function"
            raise LoadingError(f"{place} has no {name!r}", cure=hint)
        found = getattr(found, part)
    return found


def _module(place: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with their_code():
            return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ModuleNotFoundError as error:
        if place.endswith(".py") or error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise LoadingError(f"{place} cannot be imported: {error}", cure="install it, or mend the import") from error
        raise LoadingError(
            f"there is no module {error.name!r}",
            folder=here,
            cure="run from the folder that holds it, or name a file: path/to/file.py:name",
        ) from None
    except SystemExit as error:
        raise LoadingError(
            f"{place} ended the program while it was imported (exit code {error.code})",
            cure="put what a script does under: if __name__ == '__main__':",
        ) from None
    except LoadingError:
        raise
    except Exception as error:
        raise LoadingError(f"{place} raised {type(error).__name__} while it was imported", cure="mend it") from error


def _from_file(path: Path) -> ModuleType:
    """The module in a file, imported once, its neighbours importable as for a script."""
    path = path.resolve()
    if not path.is_file():
        raise LoadingError(f"there is no file {path.name}", path=path, cure="check the path")
    known = (m for m in list(sys.modules.values()) if getattr(m, "__file__", None))
    for module in known:
        if module.__file__ is not None and Path(module.__file__) == path:
            return module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadingError(f"{path.name} is no Python file", cure=FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _built(target: str, ready: type | None, wanted: str) -> Any:
    """What a builder returns; a thing that is no builder is returned itself."""
    found = _find(target)
    if (ready is not None and isinstance(found, ready)) or not callable(found):
        return found
    _check_signature(found, target, wanted)
    try:
        with their_code():
            return found()
    except SystemExit as error:
        raise LoadingError(f"{target} ended the program (exit code {error.code})", cure="let it return") from None
    except Exception as error:
        raise LoadingError(f"{target} raised {type(error).__name__}", cure="mend it; its traceback is above") from error


def _check_signature(builder: Callable[..., Any], target: str, wanted: str) -> None:
    try:
        signature = inspect.signature(builder)
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind()
    except TypeError as error:
        raise LoadingError(
            f"{target}{signature} cannot be called without arguments: {error}",
            cure=f"name a function that needs none and returns {wanted}",
        ) from None


def _a(thing: object) -> str:
    return "None" if thing is None else f"of type {type(thing).__name__}"


def describe(device: str | None) -> torch.device | None:
    """The device of an option."""
    if device is None:
        return None
    try:
        return torch.device(device)
    except RuntimeError:
        raise LoadingError(f"{device!r} is no device", cure="e.g. cpu or cuda:0") from None
