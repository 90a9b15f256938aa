"""docs/features.md says what is so: every cell of our column has tests, they exist, and the page shows the table."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import normscope as ns

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("features", ROOT / "scripts" / "features.py")
features = importlib.util.module_from_spec(SPEC)
sys.modules["features"] = features  # dataclasses look their module up
SPEC.loader.exec_module(features)
ROWS = [row for _, _, rows in features.TABLES for row in rows]


def test_the_page_is_up_to_date():
    assert features.PAGE.read_text(encoding="utf-8") == features.page(), "run: python scripts/features.py"


def test_no_cell_is_unbacked():
    assert [row.name for row in ROWS if not row.tests or not row.ours] == []
    for _, packages, rows in features.TABLES:
        assert {len(row.others) for row in rows} == {len(packages)}


def shown(test):
    """As pytest prints it, in ASCII."""
    return test if test.isascii() else test.encode("unicode_escape").decode("ascii")


def unknown(nodes):
    return [test for test in features.named() if not any(node.startswith(shown(test)) for node in nodes)]


def test_every_named_test_exists(request):
    """Among the tests of this run, if it is the whole suite, else among those of the files."""
    if not unknown([item.nodeid for item in request.session.items]):
        return
    files = sorted({test.split("::")[0] for test in features.named()})
    run = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]
    assert unknown(done.stdout.splitlines()) == []


def test_what_is_missing_is_missing():
    """The parts of a row that our column leaves out or denies: found here one day, they change the table."""
    for name in ("SimpleNorm", "PolyNorm", "EvoNormB1", "EvoNormB2", "EvoNormS1", "EvoNormS2"):
        assert not hasattr(ns.nn, name)
    assert "inplace" not in inspect.signature(ns.nn.BatchNorm2d).parameters
    assert "weights" not in inspect.signature(ns.nn.BatchNorm2d.forward).parameters
