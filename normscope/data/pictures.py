"""Pictures for restoration and style, and a text: from the user's folder, checksums verified, nothing downloaded.

Set5, Set14, Set12 and BSD68 are the test sets of the literature on super-resolution and denoising; those of Berkeley
may be used for research and education that is not commercial. Of the style pictures, 256×256 pixels each, the paintings
are in the public domain, the two contents are photographs by others: none but the paintings may be published.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from normscope.data.folder import names, read
from normscope.errors import DataError, DependencyError

__all__ = ["PICTURES", "Picture", "load_pictures", "load_text"]

PICTURES = {
    "Set5": "restoration/Set5",
    "Set14": "restoration/Set14",
    "Set12": "restoration/Set12",
    "BSD68": "restoration/BSD68",
    "style": "style",
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Pixels (h, w) grey or (h, w, 3) colour, uint8, read-only."""

    name: str
    pixels: npt.NDArray[np.uint8]


def load_pictures(name: str) -> tuple[Picture, ...]:
    """All pictures of a set, in the order of their names.

    Raises:
        DataError: no such set, or a file is absent or damaged.
        DependencyError: Pillow is not installed.
    """
    if name not in PICTURES:
        raise DataError(f"there are no pictures called {name!r}", cure=f"choose one of {', '.join(PICTURES)}")
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError(
            "pictures need Pillow, which is not installed", cure="pip install 'normscope[lab]'"
        ) from error
    found = []
    for path in sorted(names(PICTURES[name])):
        pixels = np.asarray(Image.open(io.BytesIO(read(path))))
        pixels.setflags(write=False)
        found.append(Picture(path.rpartition("/")[2].removesuffix(".png"), pixels))
    return tuple(found)


def load_text() -> str:
    """Shakespeare, 1,115,394 characters of 65 kinds, in the public domain.

    Source: A. Karpathy's char-rnn, tinyshakespeare.

    Raises:
        DataError: the variable or the file is absent, or the file is damaged.
    """
    return read("text/tinyshakespeare/input.txt").decode("ascii")
