"""Every example runs: the docstrings of the package, README and the documents."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import normscope
from normscope.errors import DependencyError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules():
    names = [info.name for info in pkgutil.walk_packages(normscope.__path__, "normscope.")]
    return ["normscope", *(name for name in names if not name.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    torch.manual_seed(0)
    module = pytest.importorskip(name, exc_type=DependencyError)  # callbacks of libraries that are not here
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.exists()], ids=lambda path: path.name)
def test_document_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    result = doctest.testfile(str(path), module_relative=False, optionflags=OPTIONS, encoding="utf-8")
    assert result.failed == 0


@pytest.mark.parametrize("module", ["normscope", "normscope.nn", "normscope.functional"])
def test_public_names_have_examples(module):
    exported = importlib.import_module(module)
    for name in exported.__all__:
        item = getattr(exported, name)
        if callable(item) and not (isinstance(item, type) and issubclass(item, Exception | tuple)):
            # The lazy layers say «its arguments otherwise» of a class with an example.
            assert ">>>" in (item.__doc__ or "") or name.startswith("Lazy"), f"{module}.{name}"
