"""The data of the lab, where the user's folder holds it."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from normscope import data
from normscope.data import folder
from normscope.errors import DataError, DependencyError

HERE = Path(os.environ.get("NORMSCOPE_DATA", "/nowhere"))
needs = pytest.mark.skipif(not (HERE / "restoration").is_dir(), reason="NORMSCOPE_DATA names no folder with the data")


@needs
def test_published_facts():
    fashion, cifar = data.load("fashion-mnist"), data.load("cifar10")
    assert np.bincount(fashion.train_y).tolist() == [6000] * 10
    assert fashion.train_x.mean() / 255 == pytest.approx(0.2860, abs=1e-4)
    assert fashion.test_y[:5].tolist() == [9, 2, 1, 1, 6]
    assert (cifar.train_x.shape, cifar.test_x.shape) == ((11000, 3, 32, 32), (1000, 3, 32, 32))
    assert np.bincount(cifar.train_y[:10000]).tolist() == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]


@needs
def test_pictures_and_text():
    counts = {name: len(data.load_pictures(name)) for name in data.PICTURES}
    assert counts == {"Set5": 5, "Set14": 13, "Set12": 11, "BSD68": 68, "contents": 2, "paintings": 3}
    butterfly = {p.name: p for p in data.load_pictures("Set5")}["butterfly_GT"].pixels
    assert butterfly.shape == (256, 256, 3)
    assert not butterfly.flags.writeable
    assert all(p.pixels.ndim == 2 for name in ("Set12", "BSD68") for p in data.load_pictures(name))
    style = data.load_pictures("contents") + data.load_pictures("paintings")
    assert {p.pixels.shape for p in style} == {(256, 256, 3)}
    assert [p.name for p in style[2:]] == ["composition_vii_256", "starry_night_256", "wave_256"]


@needs
def test_the_text():
    text = data.load_text()
    parts = (text.train, text.valid, text.test)
    assert [len(part) for part in parts] == [1003855, 55769, 55770]
    assert len(set(text.alphabet)) == len(text.alphabet) == 65
    whole = "".join(map(text.decode, parts))
    assert whole == (HERE / "text" / "tinyshakespeare" / "input.txt").read_text()
    assert not any(part.flags.writeable for part in parts)


PICTURES = [pytest.param(lambda name=name: data.load_pictures(name), id=name) for name in data.PICTURES]


@pytest.mark.parametrize("load", [data.load_cifar10, data.load_fashion_mnist, data.load_text, *PICTURES])
def test_absent_data_are_told(load, monkeypatch, tmp_path):
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="not found") as caught:
        load()
    assert "NORMSCOPE_DATA=<folder>" in str(caught.value)
    monkeypatch.delenv("NORMSCOPE_DATA")
    with pytest.raises(DataError):
        load()


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("text/tinyshakespeare/input.txt", data.load_text),
        ("style/style_composition_vii_256.png", lambda: data.load_pictures("paintings")),
        ("restoration/BSD68/test001.png", lambda: data.load_pictures("BSD68")),
    ],
)
def test_a_damaged_file_is_told(name, load, monkeypatch, tmp_path):
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("Words, words, words.")
    with pytest.raises(DataError, match="damaged") as caught:
        load()
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)


@needs
def test_a_set_of_which_one_picture_is_missing_is_told(monkeypatch, tmp_path):
    shutil.copytree(HERE / "restoration" / "Set5", tmp_path / "restoration" / "Set5")
    (tmp_path / "restoration" / "Set5" / "woman_GT.png").unlink()
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"Set5/woman_GT\.png cannot be read"):
        data.load_pictures("Set5")


def test_without_pillow_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DependencyError, match="pictures need Pillow"):
        data.load_pictures("Set5")


def test_an_unknown_set_is_told():
    with pytest.raises(DataError, match="no pictures called 'Set6'"):
        data.load_pictures("Set6")


@needs
def test_every_checksum_is_of_a_file_that_is_there():
    for path, digest in folder._sums().items():
        assert hashlib.sha256((HERE / path).read_bytes()).hexdigest() == digest
