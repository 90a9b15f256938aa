"""What a project wants of its checks, in `[tool.normscope]` of its pyproject.toml."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normscope.doctor.thresholds import DEFAULTS, Thresholds
from normscope.errors import ArgumentError, DataError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Configuration", "configure", "nearest", "project"]

_LISTS = ("select", "ignore", "intent")


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings of a project.

    Attributes:
        select: Codes or their beginnings; () for all.
        ignore: The same, left out.
        intent: Declared intentions and uses.
        module_ignores: By pattern of module paths, the codes that do not count there.
        thresholds: By which the rules judge.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    intent: tuple[str, ...] = ()
    module_ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    thresholds: Thresholds = DEFAULTS

    def joined(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `check` that a call gives, with what the project wants.

        Intents and ignores add up; a selection and thresholds of the call are in place of the project's.

        Args:
            given: Any arguments of `check`.
        """
        made = dict(given)
        for name in ("ignore", "intent"):
            made[name] = (*getattr(self, name), *_listed(given.get(name)))
        made["module_ignores"] = {**self.module_ignores}
        for pattern, codes in (given.get("module_ignores") or {}).items():
            made["module_ignores"][pattern] = (*self.module_ignores.get(pattern, ()), *_listed(codes))
        made["select"] = given.get("select") or self.select or None
        made.setdefault("thresholds", self.thresholds)
        return made


def _listed(given: Iterable[str] | str | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def project(config: str | os.PathLike[str] | None = None) -> Configuration:
    """The settings in a file, or in the next pyproject.toml upwards from the working folder, or the defaults."""
    found = nearest(Path.cwd()) if config is None else config
    return Configuration() if found is None else configure(found)


def nearest(start: str | os.PathLike[str]) -> Path | None:
    """The next pyproject.toml with a table for normscope, from a folder upwards."""
    for folder in (Path(start).resolve(), *Path(start).resolve().parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            return path if _table(path) else None
    return None


def configure(path: str | os.PathLike[str]) -> Configuration:
    """Read `[tool.normscope]` of a file.

    Args:
        path: A pyproject.toml.

    Raises:
        ArgumentError: A name is unknown, or a value of the wrong kind.
        DataError: The file cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp(), "pyproject.toml")
        >>> _ = path.write_text("[tool.normscope.thresholds]" + chr(10) + "cost_error = 2")
        >>> configure(path).thresholds.cost_error
        2.0
    """
    table = dict(_table(Path(path)))
    lists = {name: _strings(table.pop(name, ()), name) for name in _LISTS}
    ignores = {
        pattern: _strings(codes, f"per-module-ignores.{pattern!r}")
        for pattern, codes in _mapping(table.pop("per-module-ignores", {}), "per-module-ignores").items()
    }
    thresholds = changed_thresholds(_mapping(table.pop("thresholds", {}), "thresholds"))
    if table:
        raise ArgumentError(
            f"[tool.normscope] of {path} has unknown entries: {', '.join(sorted(table))}",
            cure=f"it knows {', '.join((*_LISTS, 'thresholds', 'per-module-ignores'))}",
        )
    return Configuration(**lists, module_ignores=ignores, thresholds=thresholds)


def changed_thresholds(values: Mapping[str, Any]) -> Thresholds:
    """The defaults with some values changed; one that is unknown or no number raises ArgumentError."""
    known = [f.name for f in dataclasses.fields(Thresholds)]
    for name, value in values.items():
        if name not in known:
            raise ArgumentError(f"threshold {name!r} is unknown", cure=f"the thresholds are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentError(f"threshold {name} must be a number, but is {value!r}", cure="write it as 0.25")
    return dataclasses.replace(DEFAULTS, **{name: float(value) for name, value in values.items()})


def _table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = tomllib.load(file).get("tool", {}).get("normscope", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", cure="check the file") from None
    return _mapping(found, "tool.normscope")


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArgumentError(f"{name} must be a table, but is a {type(value).__name__}", cure=f"write [{name}]")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(one, str) for one in value):
        raise ArgumentError(f"{name} must be a list of text, but is {value!r}", cure='write ["NRM203"]')
    return tuple(value)
