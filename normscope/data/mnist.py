"""MNIST and Fashion-MNIST from a local folder: 60,000 training and 10,000 test images each, 28×28 pixels, ten classes.

Sources: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", 1998; H. Xiao, K. Rasul,
R. Vollgraf, "Fashion-MNIST", 2017, arXiv 1708.07747. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from normscope.data.dataset import DataSet
from normscope.data.folder import FOLDER_VARIABLE, folder_of
from normscope.data.idx import read_idx
from normscope.errors import DataError

__all__ = ["FOLDER_VARIABLE", "find_mnist", "load_fashion_mnist", "load_mnist"]

# Part → (file, shape, sha256 of the compressed file as first published).
FILES: dict[str, tuple[str, tuple[int, ...], str]] = {
    "train_x": (
        "train-images-idx3-ubyte.gz",
        (60000, 28, 28),
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train_y": (
        "train-labels-idx1-ubyte.gz",
        (60000,),
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "test_x": (
        "t10k-images-idx3-ubyte.gz",
        (10000, 28, 28),
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "test_y": (
        "t10k-labels-idx1-ubyte.gz",
        (10000,),
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}

# The same names and shapes; checksums of the files that Zalando published.
FASHION = {
    "train_x": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train_y": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "test_x": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "test_y": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


def find_mnist() -> Path | None:
    """The folder with a file of MNIST: `$NORMSCOPE_DATA/mnist` or `$NORMSCOPE_DATA` itself; else None."""
    root = os.environ.get(FOLDER_VARIABLE, "")
    if not root:
        return None
    folders = (Path(root) / "mnist", Path(root))
    names = [name for name, _, _ in FILES.values()]
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def load_mnist() -> DataSet:
    """MNIST from the folder named in the environment variable NORMSCOPE_DATA, checksums verified.

    Raises:
        DataError: the variable or a file is absent, or a file is damaged or of the wrong shape.
    """
    folder = find_mnist()
    if folder is None:
        root = os.environ.get(FOLDER_VARIABLE, "")
        raise DataError(
            f"MNIST was not found in {root}" if root else f"MNIST needs the environment variable {FOLDER_VARIABLE}",
            cure=f"put {', '.join(name for name, _, _ in FILES.values())} into <folder>/mnist "
            f"and set {FOLDER_VARIABLE}=<folder>; or use the embedded digits",
        )
    return _read(
        folder,
        {key: sha for key, (_, _, sha) in FILES.items()},
        name="mnist",
        title="MNIST",
        source="Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits, 1998",
        licence="not stated by the authors",
    )


def load_fashion_mnist() -> DataSet:
    """Fashion-MNIST from `$NORMSCOPE_DATA/fashion-mnist`, checksums verified.

    Raises:
        DataError: the variable or a file is absent, or a file is damaged or of the wrong shape.
    """
    folder = folder_of("fashion-mnist")
    if folder is None:
        raise DataError(
            "Fashion-MNIST was not found",
            cure=f"put {', '.join(name for name, _, _ in FILES.values())} into <folder>/fashion-mnist "
            f"and set {FOLDER_VARIABLE}=<folder>",
        )
    return _read(
        folder,
        FASHION,
        name="fashion-mnist",
        title="Fashion-MNIST",
        source="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, 2017, arXiv 1708.07747",
        licence="MIT",
    )


def _read(folder: Path, checksums: Mapping[str, str], *, name: str, title: str, source: str, licence: str) -> DataSet:
    """Both have files of the same names and shapes."""
    part = {key: read_idx(folder / file, shape=shape, sha256=checksums[key]) for key, (file, shape, _) in FILES.items()}
    return DataSet(**part, name=name, title=title, top=255, classes=10, source=source, licence=licence)
