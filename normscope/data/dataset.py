"""What every loader returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from normscope.errors import DataError
from normscope.records import DataCard

__all__ = ["DataSet"]


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """Labelled samples, split into training and test as the source splits them.

    Shapes: `train_x` (n, ...) uint8, values 0 to `top`; `train_y` (n,) uint8, classes 0 to `classes` − 1; the test
    arrays likewise. The arrays are made read-only.

    Raises:
        DataError: the arrays do not fit each other.
    """

    name: str
    title: str
    train_x: npt.NDArray[np.uint8]
    train_y: npt.NDArray[np.uint8]
    test_x: npt.NDArray[np.uint8]
    test_y: npt.NDArray[np.uint8]
    top: int
    classes: int
    source: str
    licence: str

    def __post_init__(self) -> None:
        for part, x, y in (("training", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if len(x) != len(y) or len(x) == 0:
                raise DataError(
                    f"{self.name}: the {part} part has {len(x)} samples and {len(y)} labels",
                    cure="get the files of one and the same release",
                )
            if int(y.max()) >= self.classes or int(x.max()) > self.top:
                raise DataError(
                    f"{self.name}: the {part} part has labels up to {y.max()} and values up to {x.max()}; "
                    f"expected labels below {self.classes} and values up to {self.top}",
                    cure="get the files of one and the same release",
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DataError(
                f"{self.name}: training samples have shape {self.train_x.shape[1:]}, "
                f"test samples {self.test_x.shape[1:]}",
                cure="get the files of one and the same release",
            )
        for array in (self.train_x, self.train_y, self.test_x, self.test_y):
            array.setflags(write=False)

    @property
    def card(self) -> DataCard:
        """The description that goes into reports."""
        return DataCard(
            name=self.name,
            title=self.title,
            train=len(self.train_x),
            test=len(self.test_x),
            shape=tuple(self.train_x.shape[1:]),
            classes=self.classes,
            source=self.source,
            licence=self.licence,
        )
