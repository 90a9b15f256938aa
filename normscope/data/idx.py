"""The IDX format of MNIST and its descendants: gzip, big-endian header, then bytes."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from normscope.errors import DataError

__all__ = ["read_idx"]

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, *, shape: tuple[int, ...], sha256: str = "") -> npt.NDArray[np.uint8]:
    """The uint8 array in a gzipped IDX file.

    Args:
        path: The file.
        shape: The shape that the array must have.
        sha256: The checksum that the compressed file must have; empty for none.

    Raises:
        DataError: the file is absent, damaged, no IDX file of bytes, or of another shape.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be read", cure="check the folder and its permissions", path=path, reason=error.strerror
        ) from error
    digest = hashlib.sha256(blob).hexdigest()
    if sha256 and digest != sha256:
        raise DataError(
            f"{path.name} is damaged or another edition",
            cure="delete it and get the original file again",
            path=path,
            sha256=digest,
            expected=sha256,
        )
    try:
        raw = gzip.decompress(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path.name} is not a whole gzip file",
            cure="delete it and get the original file again",
            path=path,
            reason=error,
        ) from error
    return _parse(raw, path, shape)


def _parse(raw: bytes, path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    start = 4 + 4 * raw[3] if len(raw) >= 4 else 4
    if len(raw) < start or raw[:2] != b"\0\0" or raw[2] != UNSIGNED_BYTE:
        raise DataError(
            f"{path.name} is not an IDX file of bytes",
            cure="get the original file; it starts with 00 00 08 and the number of axes",
            path=path,
            header=raw[:4].hex(" "),
        )
    found: tuple[int, ...] = struct.unpack(f">{raw[3]}I", raw[4:start])
    if found != shape:
        raise DataError(
            f"{path.name} holds an array of shape {found}, expected {shape}",
            cure="check that training, test, image and label files were not swapped",
            path=path,
        )
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path.name} holds {len(raw) - start} bytes for shape {shape}, expected {math.prod(shape)}",
            cure="delete it and get the original file again",
            path=path,
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
