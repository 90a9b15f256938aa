"""Real data for demos, tests and experiments: `load(name)` → `DataSet`. Nothing is ever downloaded.

A new data set is one function that returns a `DataSet` and one line in `LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from normscope.data.cifar import load_cifar10 as load_cifar10
from normscope.data.dataset import DataSet as DataSet
from normscope.data.digits import load_digits as load_digits
from normscope.data.images import by_class as by_class
from normscope.data.images import images_in as images_in
from normscope.data.images import read_image as read_image
from normscope.data.mnist import find_mnist as find_mnist
from normscope.data.mnist import load_fashion_mnist as load_fashion_mnist
from normscope.data.mnist import load_mnist as load_mnist
from normscope.data.pictures import PICTURES as PICTURES
from normscope.data.pictures import Picture as Picture
from normscope.data.pictures import load_pictures as load_pictures
from normscope.data.text import Text as Text
from normscope.data.text import load_text as load_text
from normscope.errors import DataError

__all__ = [
    "LOADERS",
    "PICTURES",
    "DataSet",
    "Picture",
    "Text",
    "by_class",
    "find_mnist",
    "images_in",
    "load",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_mnist",
    "load_pictures",
    "load_text",
    "read_image",
]

LOADERS: dict[str, Callable[[], DataSet]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "cifar10": load_cifar10,
}


def load(name: str) -> DataSet:
    """The data set called `name`; "auto" is MNIST where NORMSCOPE_DATA leads to it, else the embedded digits.

    Raises:
        DataError: no such data set, or its files are absent or damaged. A damaged MNIST is an error under "auto" too:
            quietly measuring something else would be worse.
    """
    if name == "auto":
        name = "digits" if find_mnist() is None else "mnist"
    if name not in LOADERS:
        raise DataError(f"there is no data set called {name!r}", cure=f"choose one of auto, {', '.join(LOADERS)}")
    return LOADERS[name]()
