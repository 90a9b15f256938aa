"""`normscope lab` from outside: list, run, report, compare; here, in processes, on Ray."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from normscope.cli import main
from normscope.errors import DataError
from normscope.lab import ledger, registry, runner
from normscope.lab.store import Store
from normscope.records import Ledger, from_json, to_json
from normscope.report import advice, claims, plots

ROOT = Path(__file__).parents[2]


def call(*words, code=0):
    result = CliRunner().invoke(main, ["lab", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    path = tmp_path_factory.mktemp("lab") / "lab.sqlite"
    call("run", "A16", "a17", "A12", "--store", path)
    return path


def test_list():
    text = call("list")
    assert "A16 * Where the sigmoid has a gradient" in text
    text = call("list", "--claims")
    assert len(text.splitlines()) == 118
    assert "on record" in text


def test_run_says_what_it_found_and_does_nothing_twice(tmp_path):
    path = tmp_path / "lab.sqlite"
    first = call("run", "A16", "--store", path)
    assert "REFUTED     001-28" in first
    assert "1 runs done" in first
    assert "0 runs done" in call("run", "A16", "--store", path)


def test_the_record_keeps_where_it_comes_from(done):
    (run, *_) = ledger.read(done)
    record = ledger.judge(run)
    assert record.machines[0].versions[1][0] == "torch"
    assert record.commits == (runner.commit(),)
    assert record.seeds == (0,)
    assert record.command == f"normscope lab run {run.name} --profile quick"


def test_report(done, tmp_path):
    call("report", "--store", done, "--out", tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert "<script" not in page
    assert page.count("<svg ") == 3
    assert page.count('id="A17-') > 0
    record = from_json(Ledger, (tmp_path / "ledger.json").read_text(encoding="utf-8"))
    assert len(record.claims) == 118
    by_id = {claim.id: claim for claim in record.claims}
    assert by_id["001-28"].verdict == "REFUTED"
    assert by_id["001-1"].verdict == "RECORD"
    assert by_id["000-1"].verdict == "open"
    assert by_id["001-14"].undone == ("B13",)
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert all(f"**{claim.id}**" in text for claim in record.claims)
    # The exported results say the same.
    again = tmp_path / "again"
    call("report", tmp_path / "results", "--out", again, "--no-figures")
    assert (again / "claims.md").read_text(encoding="utf-8") == text
    assert (again / "ledger.json").read_text(encoding="utf-8") == to_json(record)


def test_a_report_of_several_sources_and_notes(done, tmp_path):
    other, out = tmp_path / "other.sqlite", tmp_path / "out"
    call("run", "A16", "A11", "--profile", "cpu", "--store", other)
    call("report", "--store", done, "--out", out, "--no-figures")
    both = ledger.read(done) + ledger.read(other)
    digests = {e.registration.name: e.digest for e in ledger.ledger(both).experiments}
    told = (("A17", "quick", "Seen <twice>."), ("A11", "cpu", "Once."), ("A16", "quick", "Of other runs."))
    notes = [f"{name}\t{profile}\t{digests[name]}\t{note}" for name, profile, note in told]
    (out / "notes.tsv").write_text("\n".join(notes) + "\n")
    call("report", other, out / "results", "--out", out, "--no-figures")
    record = from_json(Ledger, (out / "ledger.json").read_text(encoding="utf-8"))
    found = {e.registration.name: (e.profile, e.note) for e in record.experiments}
    # The larger profile, wherever it is; and a note only on the runs that it is about.
    assert found == {
        "A11": ("cpu", "Once."), "A12": ("quick", ""), "A16": ("cpu", ""), "A17": ("quick", "Seen <twice>.")
    }  # fmt: skip
    assert len(list((out / "results").iterdir())) == 4
    assert "- Note: Seen <twice>." in (out / "claims.md").read_text(encoding="utf-8")
    assert "Seen &lt;twice&gt;." in (out / "index.html").read_text(encoding="utf-8")
    (out / "notes.tsv").write_text("A17 seen twice")
    assert "is no note" in call("report", other, "--out", out, "--no-figures", code=2)


def test_what_enters_the_page_is_escaped(done):
    record = ledger.ledger(ledger.read(done))
    text = to_json(record).replace("Where the sigmoid has a gradient", "<script>alert(1)</script>")
    page = claims.page(from_json(Ledger, text), {})
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_figures_are_the_same_every_time(done):
    for experiment in ledger.ledger(ledger.read(done)).experiments:
        assert plots.as_file(experiment.picture) == plots.as_file(experiment.picture)


def test_compare(done, tmp_path):
    same, other = tmp_path / "same.sqlite", tmp_path / "other.sqlite"
    call("run", "A17", "A12", "--store", same)
    call("run", "A12", "--seeds", "5", "--store", other)
    assert "A17 quick: 1 of 1 runs the same bit for bit; the same verdicts" in call("compare", done, same)
    assert "A12 quick: 0 of 0 runs" in call("compare", done, other)
    call("compare", other, tmp_path, code=1)  # nothing in common
    store = Store(same)
    (row,) = store._db.execute("SELECT numbers FROM run WHERE experiment = 'A12'").fetchone()
    numbers = json.loads(row)
    numbers["after"][0] += 0.5
    store._db.execute("UPDATE run SET numbers = ? WHERE experiment = 'A12'", (json.dumps(numbers),))
    store.close()
    assert "A12 quick: 0 of 1 runs" in call("compare", done, same, code=1)


def test_two_threads_and_two_processes_give_the_same_verdict(done, tmp_path):
    path = tmp_path / "lab.sqlite"
    call("run", "A17", "A12", "--threads", "2", "--store", path)
    assert call("compare", done, path).count("the same verdicts") == 2
    processes = tmp_path / "processes.sqlite"
    call("run", "A17", "A12", "A16", "--jobs", "2", "--store", processes)
    assert call("compare", done, processes).count("1 of 1 runs the same bit for bit; the same verdicts") == 3


def test_a_local_ray_cluster_gives_the_same_numbers(done, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    path = tmp_path / "lab.sqlite"
    call("run", "A17", "A12", "A16", "--on", "ray", "--jobs", "2", "--store", path)
    assert call("compare", done, path).count("1 of 1 runs the same bit for bit; the same verdicts") == 3


def test_without_ray_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "normscope[cluster]" in call("run", "A16", "--on", "ray", "--store", tmp_path / "s", code=2)


@pytest.mark.parametrize("seeds", ["x", "3-1", "0-5000", "1,1"])
def test_wrong_seeds_are_told(seeds, tmp_path):
    assert "seeds" in call("run", "A16", "--seeds", seeds, "--store", tmp_path / "s", code=2)


def test_wrong_names_and_missing_results_are_told(tmp_path):
    assert "no experiment 'A99'" in call("run", "A99", "--store", tmp_path / "s", code=2)
    assert "no results" in call("report", "--store", tmp_path / "none", "--out", tmp_path, code=2)


def test_damaged_exports_are_told(done, tmp_path):
    call("report", "--store", done, "--out", tmp_path, "--no-figures")
    path = tmp_path / "results" / "A16.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:100])
    with pytest.raises(DataError, match="holds no results"):
        ledger.read(path.parent)
    head, rest = text.split("\n", 1)
    changed = json.dumps(json.loads(head) | {"registration": "0" * 16})
    path.write_text(changed + "\n" + rest)
    with pytest.raises(DataError, match="registered anew"):
        ledger.read(path.parent)


def test_the_import_stays_light():
    import subprocess

    heavy = ("sqlite3", "matplotlib", "ray", "normscope.lab")
    code = f"import normscope, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(not (ROOT / "docs" / "lab").is_dir(), reason="only in a checkout")
def test_the_published_ledger_is_what_the_published_results_say(monkeypatch):
    monkeypatch.delenv("NORMSCOPE_DATA", raising=False)  # a reader has the results, and not the data behind them
    lab = ROOT / "docs" / "lab"
    record = ledger.ledger(ledger.read(lab / "results"), ledger.read_notes(lab))
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == claims.markdown(record, "lab/figures")
    assert (ROOT / "docs" / "advice.md").read_text(encoding="utf-8") == advice.markdown(record)
    for experiment in record.experiments:
        if experiment.picture is not None:
            assert (ROOT / "docs" / "lab" / "figures" / f"{experiment.registration.name}.svg").is_file()
    assert {e.registration.name for e in record.experiments} >= {n for n in registry.runnable() if n.startswith("A")}
