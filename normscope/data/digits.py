"""Handwritten digits that travel inside the package: 1,797 images of 8×8 pixels, ten classes.

Provenance: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0. These are the 1,797 images of its test part, written by 13
people, as scikit-learn distributes them (`sklearn.datasets.load_digits`), unchanged apart from the storage as uint8.
A pixel counts the black points (0 to 16) of a 4×4 block of a binary 32×32 scan.

The archive was made once, with scikit-learn 1.9:

    digits = sklearn.datasets.load_digits()
    numpy.savez_compressed("digits.npz", x=digits.images.astype("uint8"), y=digits.target.astype("uint8"))
"""

from __future__ import annotations

import hashlib
import io
from importlib import resources

import numpy as np

from normscope.data.dataset import DataSet
from normscope.errors import DataError

__all__ = ["load_digits"]

SHA256 = "6f801551877abf69fbf3711373bb642a18dc933430a3385cd6febc235225ea6f"

# The file's order is kept: neighbours seem to come from one hand, and a shuffle would put such twins into both parts.
TRAIN = 1437


def load_digits() -> DataSet:
    """The embedded digits: the first 1,437 images train, the last 360 test.

    Raises:
        DataError: the archive in the installed package is damaged.
    """
    blob = resources.files("normscope.data").joinpath("digits.npz").read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if digest != SHA256:
        raise DataError(
            "the embedded file digits.npz is damaged",
            cure="install normscope again",
            sha256=digest,
            expected=SHA256,
        )
    with np.load(io.BytesIO(blob), allow_pickle=False) as archive:
        x, y = archive["x"], archive["y"]
    return DataSet(
        name="digits",
        title="UCI handwritten digits",
        train_x=x[:TRAIN],
        train_y=y[:TRAIN],
        test_x=x[TRAIN:],
        test_y=y[TRAIN:],
        top=16,
        classes=10,
        source="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository, 1998, doi 10.24432/C50P49",
        licence="CC BY 4.0",
    )
