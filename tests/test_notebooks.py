"""The notebooks of the docs: every code cell runs, and says what its stored output says."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch

import normscope as ns

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
CODE = re.compile(r"NRM\d{3}")
MOST_BYTES = 60_000


def cells(path):
    """(source, codes of rules in the stored output) of every code cell."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
            yield "".join(cell["source"]), set(CODE.findall(json.dumps(cell["outputs"])))


def execute(source, names):
    """As a notebook does: what a cell prints, and the last expression as HTML or text."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    html = getattr(value, "_repr_html_", lambda: None)()
    return printed.getvalue() + (html or repr(value) if value is not None else "")


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_says_what_is_stored(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with torch.random.fork_rng(devices=[]):
        for source, stored in cells(path):
            # Hints hang on a few samples more or less; alarms do not.
            found = set(CODE.findall(execute(source, names)))
            assert found ^ stored <= {"NRM902", "NRM103", "NRM304"}, source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_was_run(path):
    assert path.stat().st_size < MOST_BYTES
    book = json.loads(path.read_text(encoding="utf-8"))
    counts = [cell["execution_count"] for cell in book["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("text/html" in output.get("data", {}) for cell in book["cells"] for output in cell.get("outputs", ()))


class Evil(torch.nn.Module):
    """Names that would end up in the page as they are."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential()
        self.body.add_module("<script>alert(1)</script>", torch.nn.BatchNorm1d(4))
        self.body.add_module("b&b", torch.nn.Linear(4, 3))

    def forward(self, x):
        return self.body(x)


@pytest.fixture(scope="module")
def shown():
    """A check with an alarm, its repair and a self-test, as HTML."""
    generator = torch.Generator().manual_seed(0)
    loader = [
        (torch.randn(32, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator)) for _ in range(9)
    ]
    model = Evil()
    ns.recalibrate(model, loader, progress=False)
    model.body[0].running_mean[1] = float("nan")
    report = ns.check(model.eval(), loader, loss=lambda out, batch: out.square().mean(1))
    assert report.failures("W")[0].code == "NRM101"
    pages = [report._repr_html_(), report.fix()._repr_html_()]
    return [*pages, ns.selftest(model, loader, defects=["non-finite", "other-scale"])._repr_html_()]


def test_html_is_short_escaped_and_needs_nothing(shown):
    for page in shown:
        assert len(page) < 8000
        assert "<script" not in page
        assert "http" not in page
        assert "b&b" not in page.replace("b&amp;b", "")
        assert page.count("<div") == page.count("</div>") == 1
        assert page.count("<details") == page.count("</details>")
        assert "prefers-color-scheme: dark" in page
    assert "&lt;script&gt;alert(1)" in shown[0]
    assert "E NRM101" in shown[0]
    assert "applied" in shown[1]
    assert "confirmed" in shown[1]
    assert "<td>non-finite</td>" in shown[2]


def test_a_healthy_model_and_nothing_to_repair():
    loader = [torch.randn(32, 4) for _ in range(6)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).eval()
    report = ns.check(model, loader)
    assert "No normalization trouble was found" in report._repr_html_()
    assert "Nothing to repair" in report.fix()._repr_html_()


def test_a_watcher_shows_its_picture():
    pytest.importorskip("matplotlib")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    watcher = ns.watch(model)
    assert watcher._repr_html_() is None
    model(torch.randn(8, 4))
    watcher.stop()
    page = watcher._repr_html_()
    assert page.startswith('<div style="background: white')
    assert "<svg" in page[:80]


def test_a_kernel_runs_one(tmp_path):
    """The real thing, where it is installed: kernel, messages, display of HTML."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    book = nbformat.read(NOTEBOOKS[-1], as_version=4)
    client.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert any("ns-report" in output.get("data", {}).get("text/html", "") for output in shown)
