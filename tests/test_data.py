"""Loaders: what they return, and how they refuse."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from normscope import data
from normscope.data import digits, mnist
from normscope.data.idx import read_idx
from normscope.errors import DataError


def idx_bytes(array: np.ndarray, *, kind: int = 8) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def images(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(array)))
    return path, array


def test_digits_are_the_published_ones():
    found = data.load("digits")
    assert found.train_x.shape == (1437, 8, 8)
    assert found.test_x.shape == (360, 8, 8)
    assert found.train_x.dtype == found.train_y.dtype == np.uint8
    assert (int(found.train_x.max()), found.top, found.classes) == (16, 16, 10)
    counts = np.bincount(np.concatenate([found.train_y, found.test_y]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (found.card.train, found.card.test, found.card.shape) == (1437, 360, (8, 8))


def test_digits_equal_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = data.load("digits")
    np.testing.assert_array_equal(np.concatenate([ours.train_x, ours.test_x]), theirs.images)
    np.testing.assert_array_equal(np.concatenate([ours.train_y, ours.test_y]), theirs.target)


def test_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        data.load("digits").train_x[0] = 0


def test_damaged_digits_are_refused(monkeypatch):
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits\.npz is damaged"):
        data.load("digits")


def test_idx_is_read(images):
    path, array = images
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(read_idx(path, shape=(2, 3, 4), sha256=sha256), array)


def test_idx_absent(tmp_path):
    with pytest.raises(DataError, match=r"none\.gz cannot be read"):
        read_idx(tmp_path / "none.gz", shape=(1,))


def test_idx_checksum(images):
    with pytest.raises(DataError, match=r"images\.gz is damaged or another edition") as caught:
        read_idx(images[0], shape=(2, 3, 4), sha256="0" * 64)
    assert "expected: " + "0" * 64 in str(caught.value)


@pytest.mark.parametrize("damage", [lambda blob: blob[:-9], lambda blob: b"no gzip", lambda blob: b""])
def test_idx_no_whole_gzip(images, damage):
    path, _ = images
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"not a whole gzip file|not an IDX file"):
        read_idx(path, shape=(2, 3, 4))


def test_idx_corrupt_stream(images):
    path, _ = images
    blob = bytearray(path.read_bytes())
    blob[12] ^= 0xFF
    path.write_bytes(blob)
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_idx(path, shape=(2, 3, 4))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\0\0", "not an IDX file"),
        (b"\0\0\x08\x03" + b"\0" * 4, "not an IDX file"),  # a header that stops in its second size
        (b"PK\x08\x01" + struct.pack(">I", 2) + b"ab", "not an IDX file"),
        (idx_bytes(np.zeros((2, 3, 4), np.uint8), kind=0x0D), "not an IDX file"),
        (idx_bytes(np.zeros((2, 4, 3), np.uint8)), r"shape \(2, 4, 3\), expected \(2, 3, 4\)"),
        (idx_bytes(np.zeros((2, 3, 4), np.uint8))[:-1], "holds 23 bytes"),
        (idx_bytes(np.zeros((2, 3, 4), np.uint8)) + b"x", "holds 25 bytes"),
    ],
)
def test_idx_wrong_content(tmp_path, raw, message):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(DataError, match=message):
        read_idx(path, shape=(2, 3, 4))


def test_unknown_name():
    with pytest.raises(DataError, match="no data set called 'cats'") as caught:
        data.load("cats")
    assert "auto, digits, mnist" in caught.value.cure


def test_auto_is_digits_without_mnist(monkeypatch, tmp_path):
    monkeypatch.delenv("NORMSCOPE_DATA", raising=False)
    assert data.load("auto").name == "digits"
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    assert data.load("auto").name == "digits"


def test_mnist_absent_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("NORMSCOPE_DATA", raising=False)
    with pytest.raises(DataError, match="environment variable NORMSCOPE_DATA"):
        data.load("mnist")
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="was not found in") as caught:
        data.load("mnist")
    assert "train-images-idx3-ubyte.gz" in caught.value.cure


@pytest.mark.parametrize("inner", ["mnist", "."])
def test_mnist_is_read_from_either_layout(monkeypatch, tmp_path, inner):
    folder = tmp_path / inner
    folder.mkdir(exist_ok=True)
    files = {}
    for part, (name, shape, _) in mnist.FILES.items():
        array = np.full((3 if part.startswith("train") else 2, *shape[1:]), 7, np.uint8)
        blob = gzip.compress(idx_bytes(array))
        (folder / name).write_bytes(blob)
        files[part] = (name, array.shape, hashlib.sha256(blob).hexdigest())
    monkeypatch.setattr(mnist, "FILES", files)
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    found = data.load("auto")
    assert (found.name, found.train_x.shape, found.test_x.shape) == ("mnist", (3, 28, 28), (2, 28, 28))


def test_damaged_mnist_is_an_error_under_auto_too(monkeypatch, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"half a download")
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data.load("auto")


@pytest.mark.skipif(data.find_mnist() is None, reason="NORMSCOPE_DATA does not lead to MNIST")
def test_real_mnist():
    found = data.load("mnist")
    counts = np.bincount(found.train_y).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert found.train_x.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert found.test_x.shape == (10000, 28, 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.zeros(3, np.uint8)}, "4 samples and 3 labels"),
        ({"test_x": np.zeros((0, 2), np.uint8), "test_y": np.zeros(0, np.uint8)}, "0 samples"),
        ({"test_y": np.full(4, 9, np.uint8)}, "labels up to 9"),
        ({"train_x": np.full((4, 2), 99, np.uint8)}, "values up to 99"),
        ({"test_x": np.zeros((4, 3), np.uint8)}, r"shape \(2,\), test samples \(3,\)"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    good = {f"{part}_x": np.zeros((4, 2), np.uint8) for part in ("train", "test")}
    good |= {f"{part}_y": np.zeros(4, np.uint8) for part in ("train", "test")}
    words = {"name": "x", "title": "x", "source": "x", "licence": "x"}
    data.DataSet(**good, top=16, classes=2, **words)
    with pytest.raises(DataError, match=message):
        data.DataSet(**(good | change), top=16, classes=2, **words)
