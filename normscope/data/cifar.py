"""CIFAR-10, a part of it: 11,000 training and 1,000 test images of 3×32×32 pixels in ten classes.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Training: data_batch_1 and the
first thousand of data_batch_2; test: the first thousand of test_batch. Nothing is downloaded.
"""

from __future__ import annotations

import io

import numpy as np

from normscope.data.dataset import DataSet
from normscope.data.folder import read

__all__ = ["load_cifar10"]


def load_cifar10() -> DataSet:
    """The part of CIFAR-10 in `$NORMSCOPE_DATA/cifar10/cifar10_subset.npz`, checksum verified.

    Raises:
        DataError: the variable or the file is absent, or the file is damaged.
    """
    with np.load(io.BytesIO(read("cifar10/cifar10_subset.npz")), allow_pickle=False) as archive:
        x = np.concatenate((archive["x_train"], archive["x_valid"]))
        y = np.concatenate((archive["y_train"], archive["y_valid"]))
        test_x, test_y = archive["x_test"], archive["y_test"]
    return DataSet(
        name="cifar10",
        title="CIFAR-10 (11,000 training images)",
        train_x=x,
        train_y=y,
        test_x=test_x,
        test_y=test_y,
        top=255,
        classes=10,
        source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        licence="not stated by the author",
    )
