"""A text, character by character: from the user's folder, checksum verified, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from normscope.data.folder import read

__all__ = ["Text", "load_text"]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Codes of the characters, uint8, read-only: in order the first 90 % to train, then 5 % to choose by, and the rest.

    Attributes:
        alphabet: Every character of the text once; a code is a place in it.
    """

    alphabet: str
    train: npt.NDArray[np.uint8]
    valid: npt.NDArray[np.uint8]
    test: npt.NDArray[np.uint8]

    def decode(self, codes: npt.NDArray[np.uint8]) -> str:
        """The characters of some codes."""
        return "".join(self.alphabet[code] for code in codes)


def load_text() -> Text:
    """Shakespeare, 1,115,394 characters of 65 kinds, in the public domain.

    Source: A. Karpathy's char-rnn, tinyshakespeare; the split is his.

    Raises:
        DataError: the variable or the file is absent, or the file is damaged.
    """
    characters = np.frombuffer(read("text/tinyshakespeare/input.txt"), np.uint8)
    kinds, places = np.unique(characters, return_inverse=True)
    codes = places.astype(np.uint8)
    codes.setflags(write=False)
    train, valid = (round(share * len(codes)) for share in (0.9, 0.95))
    return Text(kinds.tobytes().decode("ascii"), codes[:train], codes[train:valid], codes[valid:])
