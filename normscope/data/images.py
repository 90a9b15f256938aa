"""Images of the user's own: files of any common format, and folders of them, sorted by class or not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from normscope.errors import DataError, DependencyError

__all__ = ["by_class", "images_in", "read_image"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def images_in(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths.

    Raises:
        DataError: there is none.
    """
    below = (Path(at) / name for at, _, names in os.walk(folder, followlinks=True) for name in names)
    found = sorted(path for path in below if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"there are no images in {folder}", cure=f"put files {', '.join(sorted(SUFFIXES))} there")
    return found


def by_class(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Images in one folder per class, as ImageNet is laid out: the files, their labels, and the classes by name.

    Raises:
        DataError: there are no classes or no images.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not classes:
        raise DataError(f"{folder} holds no folders of classes", cure="lay it out as <folder>/<class>/<image>")
    files = [(path, k) for k, name in enumerate(classes) for path in images_in(folder / name)]
    return [path for path, _ in files], [k for _, k in files], classes


def read_image(path: Path, *, grey: bool = False) -> npt.NDArray[np.uint8]:
    """Pixels (h, w, 3), or (h, w) in grey.

    Raises:
        DataError: the file is no image.
        DependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError(
            "images need Pillow, which is not installed", cure="pip install 'normscope[lab]'"
        ) from error
    try:
        with Image.open(path) as image:
            return np.array(image.convert("L" if grey else "RGB"))
    except OSError as error:
        raise DataError(f"{path} cannot be read as an image", cure="take it out of the folder", reason=error) from error
