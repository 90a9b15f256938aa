"""Pictures for restoration and for style: from the user's folder, checksums verified, nothing downloaded.

Set5, Set14, Set12 and BSD68 are the test sets of the literature on super-resolution and denoising; those of Berkeley
may be used for research and education that is not commercial. The paintings are in the public domain; the contents are
photographs by others, to be used and not published.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from normscope.data.folder import names, read
from normscope.errors import DataError, DependencyError

__all__ = ["PICTURES", "Picture", "load_pictures"]

# Set → how the paths of its files begin.
PICTURES = {
    "Set5": "restoration/Set5/",
    "Set14": "restoration/Set14/",
    "Set12": "restoration/Set12/",
    "BSD68": "restoration/BSD68/",
    "contents": "style/content_",
    "paintings": "style/style_",
}


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """Pixels (h, w) grey or (h, w, 3) colour, uint8, read-only."""

    name: str
    pixels: npt.NDArray[np.uint8]


def load_pictures(name: str) -> tuple[Picture, ...]:
    """All pictures of a set, in the order of their names.

    Args:
        name: Set5, Set14 (colour, super-resolution), Set12, BSD68 (grey, denoising), contents or paintings (colour,
            256 × 256, style transfer).

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
        found.append(Picture(path.removeprefix(PICTURES[name]).removesuffix(".png"), pixels))
    return tuple(found)
