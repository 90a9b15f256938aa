"""The user's folder of data, named in NORMSCOPE_DATA, and files read from it with their checksums verified."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib import resources
from pathlib import Path

from normscope.errors import DataError

__all__ = ["FOLDER_VARIABLE", "folder_of", "names", "read"]

FOLDER_VARIABLE = "NORMSCOPE_DATA"


@cache
def _sums() -> dict[str, str]:
    """Path below the folder → sha256."""
    text = resources.files("normscope.data").joinpath("checksums.txt").read_text(encoding="utf-8")
    return {path: digest for digest, path in (line.split("  ", 1) for line in text.splitlines())}


def folder_of(part: str) -> Path | None:
    """The folder `$NORMSCOPE_DATA/part` if it is there."""
    root = os.environ.get(FOLDER_VARIABLE, "")
    found = Path(root) / part
    return found if root and found.is_dir() else None


def names(start: str) -> list[str]:
    """The known files whose paths begin so, e.g. with "restoration/Set5/"."""
    return [path for path in _sums() if path.startswith(start)]


def read(path: str) -> bytes:
    """A file below the folder, whole and as published.

    Raises:
        DataError: the variable or the file is absent, or the file is another one.
    """
    part, name = path.split("/", 1)
    folder = folder_of(part)
    if folder is None:
        root = os.environ.get(FOLDER_VARIABLE, "")
        raise DataError(
            f"{part} was not found in {root}" if root else f"{part} needs the environment variable {FOLDER_VARIABLE}",
            cure=f"put {name} into <folder>/{part} and set {FOLDER_VARIABLE}=<folder>",
        )
    try:
        blob = (folder / name).read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read", cure="check the folder and its permissions", path=folder / name,
            reason=error.strerror,
        ) from error  # fmt: skip
    digest = hashlib.sha256(blob).hexdigest()
    if digest != _sums()[path]:
        raise DataError(
            f"{path} is damaged or another edition", cure="delete it and get the original file again",
            path=folder / name, sha256=digest, expected=_sums()[path],
        )  # fmt: skip
    return blob
