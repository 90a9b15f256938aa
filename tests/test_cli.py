"""The command line: exit codes, streams and files."""

import json

import pytest
from click.testing import CliRunner

import normscope as ns
from normscope import cli, records
from normscope.errors import DataError
from normscope.lab import figure1

TINY = {"learning_rates": (0.5,), "steps": 12, "batch": 20, "hidden": (6, 5), "probes": 4, "warmup": 2}


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMSCOPE_DATA", raising=False)
    # Of --quick only the size changes: seconds become tenths.
    monkeypatch.setattr(figure1.Settings, "quick", classmethod(lambda cls, seed=0: cls(**TINY, seed=seed)))
    return lambda *arguments: CliRunner().invoke(cli.main, arguments)


def test_help(call):
    result = call("--help")
    assert result.exit_code == 0
    assert "demo" in result.stdout
    assert "backends" in result.stdout
    assert "..." not in result.stdout.replace("[ARGS]...", "")  # no sentence is cut off
    assert "--quick" in call("demo", "-h").stdout


def test_version(call):
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"normscope {ns.__version__} (torch 2.")


def test_backends(call):
    result = call("backends")
    assert result.exit_code == 0
    assert result.stdout == f"{ns.backends()}\n"


def test_demo_writes_its_files(call, tmp_path):
    result = call("demo", "--quick", "--seed", "3", "--out", "deep/er")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""  # no progress bar where stderr is no terminal
    assert "learning rate" in result.stdout
    folder = tmp_path / "deep" / "er"
    assert sorted(path.name for path in folder.iterdir()) == [
        "figure1.png",
        "figure1.svg",
        "index.html",
        "results.json",
    ]
    record = records.from_json(records.Figure1, (folder / "results.json").read_text(encoding="utf-8"))
    assert (record.data.name, record.seed) == ("digits", 3)
    assert record.command == "normscope demo --quick --data digits --seed 3"
    assert record.command in (folder / "index.html").read_text(encoding="utf-8")
    assert f"{100 * record.runs[0].final.value:.1f}%" in result.stdout


def test_demo_default_folder_and_quick_data(call, monkeypatch, tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"damaged, and never read")
    monkeypatch.setenv("NORMSCOPE_DATA", str(tmp_path))
    assert call("demo", "--quick").exit_code == 0
    assert json.loads((tmp_path / "normscope-demo" / "results.json").read_text(encoding="utf-8"))["seed"] == 0


def test_missing_data_is_one_message(call, tmp_path):
    result = call("demo", "--data", "mnist")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: MNIST needs the environment variable NORMSCOPE_DATA\n  cure: put ")
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [("demo", "--data", "cats"), ("demo", "--seed", "-1"), ("demo", "--no-such"), ("nothing",)]
)
def test_wrong_usage(call, arguments):
    assert call(*arguments).exit_code == 2


def test_folder_that_cannot_be_made(call, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/below"):
        result = call("demo", "--quick", "--out", out)
        assert result.exit_code == 2
        assert "--out" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("broken", cure="mend it"), 2, "error: broken\n  cure: mend it\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ZeroDivisionError("oh"), 3, "internal error in normscope"),
    ],
)
def test_errors_become_exit_codes(call, monkeypatch, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr(ns, "backends", fail)
    result = call("backends")
    assert result.exit_code == code
    assert result.stderr.startswith(words)
    assert ("Traceback" in result.stderr) == (code == 3)
