"""The command line: exit codes, streams and files."""

import io
import itertools
import json
import sys

import pytest
import rich.console
import torch
from click.testing import CliRunner

import normscope as ns
from normscope import cli, doctor, records
from normscope.cli import group
from normscope.errors import DataError
from normscope.lab import clinic, figure1

TINY = {"learning_rates": (0.5,), "steps": 12, "batch": 20, "hidden": (6, 5), "probes": 4, "warmup": 2}
SMALL = {"steps": 20, "more_steps": 10, "channels": (4,), "examined": 200}
names = (f"patient_code_{k}" for k in itertools.count())

THEIRS = """
import torch
from torch import nn

print("noise on stdout")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.head.weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
        self.head.bias.data.zero_()

    def forward(self, x):
        return self.head(self.bn(x))


def healthy():
    torch.manual_seed(0)
    model = Net()
    for _ in range(60):
        model(2 + torch.randn(64, 4))
    return model.eval()


def ill():
    model = healthy()
    model.bn.running_mean.fill_(-9.0)
    return model


def momentum():
    model = ill()
    model.bn.momentum = 0.99
    return model


def loader():
    g = torch.Generator().manual_seed(1)
    xs = [2 + torch.randn(20, 4, generator=g) for _ in range(24)]
    return [(x, (x[:, 0] < 2).long()) for x in xs]


ready = loader()
hits = lambda output, batch: (output.argmax(1) == batch[1]).float()


def no_norms():
    return nn.Linear(4, 2)


def empty():
    return []


def midway():
    yield from ready[:9]
    raise OSError("disk gone")


def raising():
    raise ValueError("no weights here")


def needs(size):
    return size


def number():
    return 3


def quits():
    raise SystemExit(4)


def stopped():
    raise KeyboardInterrupt


def bad_metric(output, batch):
    return 1 / 0


class Broken(Net):
    def forward(self, x):
        return super().forward(x).no_such()
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMSCOPE_DATA", raising=False)
    # Of --quick only the size changes: seconds become tenths.
    monkeypatch.setattr(figure1.Settings, "quick", classmethod(lambda cls, seed=0: cls(**TINY, seed=seed)))
    monkeypatch.setattr(clinic.Settings, "quick", classmethod(lambda cls, seed=0: cls(**SMALL, seed=seed)))
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
        "clinic.json",
        "figure1.png",
        "figure1.svg",
        "index.html",
        "patient1.html",
        "patient2.html",
        "results.json",
    ]
    record = records.from_json(records.Figure1, (folder / "results.json").read_text(encoding="utf-8"))
    assert (record.data.name, record.seed) == ("digits", 3)
    assert record.command == "normscope demo --quick --data digits --seed 3"
    assert record.command in (folder / "index.html").read_text(encoding="utf-8")
    assert f"{100 * record.runs[0].final.value:.1f}%" in result.stdout
    second = records.from_json(records.Clinic, (folder / "clinic.json").read_text(encoding="utf-8"))
    for patient in second.patients:
        assert f"broken {100 * patient.ill.value:.1f}%" in result.stdout
    learned = result.stdout[result.stdout.index("What was learned") :]
    assert [line[:2] for line in learned.splitlines() if line[:1].isdigit() and line[1:3] == ". "] == [
        "1.",
        "2.",
        "3.",
        "4.",
    ]


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


# --- check and fix on the user's own code -----------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch, tmp_path):
    """A module of a user in the current folder; `call` with its name put before every bare target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = next(names)
    (tmp_path / f"{name}.py").write_text(THEIRS, encoding="utf-8")

    def invoke(*arguments):
        full = [a.replace("@", f"{name}:") for a in arguments]
        return CliRunner().invoke(cli.main, full)

    before = set(sys.modules)
    yield invoke
    for added in set(sys.modules) - before:
        if str(getattr(sys.modules[added], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[added]


def test_check_finds_and_says_so(theirs, tmp_path):
    result = theirs("check", "@ill", "--data", "loader", "--html", "page.html")
    assert result.exit_code == 1, result.stderr
    assert "E NRM103 stale-statistics  bn" in result.stdout
    assert "next: normscope fix" in result.stdout
    assert len(result.stdout.splitlines()) <= 25
    assert "noise on stdout" not in result.stdout
    assert "noise on stdout" in result.stderr
    assert "NRM103 stale-statistics" in (tmp_path / "page.html").read_text(encoding="utf-8")
    # The page carries the record: it is a baseline, and can be compared.
    again = theirs("check", "@ill", "--data", "loader", "--baseline", "page.html", "--html", "again.html")
    assert again.exit_code == 0
    assert theirs("diff", "page.html", "again.html").stdout.startswith("Nothing changed")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("@healthy", "--data", "loader"), 0),
        (("@ill", "--data", "loader", "--fail-on", "never"), 0),
        (("@ill", "--data", "loader", "--ignore", "nrm1"), 0),
        (("@ill", "--data", "loader", "--select", "NRM103,NRM2"), 1),
        (("@ill", "--data", "ready", "--metric", "hits", "--budget", "20s"), 1),
        (("@no_norms", "--data", "loader"), 0),
        (("@healthy", "--data", "midway"), 0),
    ],
)
def test_check_exit_codes(theirs, arguments, code):
    result = theirs("check", *arguments)
    assert result.exit_code == code, result.output


def test_check_of_a_file(theirs, tmp_path):
    file = tmp_path / "deep" / "code.py"
    file.parent.mkdir()
    file.write_text("from neighbour import *\n", encoding="utf-8")
    (file.parent / "neighbour.py").write_text(THEIRS, encoding="utf-8")
    result = theirs("check", "deep/code.py:ill", "--data", "deep/code.py:loader", "--format", "json")
    assert result.exit_code == 1, result.stderr
    record = records.from_json(records.CheckRecord, result.stdout)
    assert record.model == "Net"
    assert dict(record.settings)["command"] == "normscope check deep/code.py:ill --data deep/code.py:loader"


def test_check_says_what_was_wrong_with_model_or_loader(theirs):
    assert "no normalizers that normscope knows" in theirs("check", "@no_norms", "--data", "loader").stdout
    assert "OSError after 9 batches: disk gone" in theirs("check", "@healthy", "--data", "midway").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("good", "--data", "loader"), "'good' names no function"),
        (("no_such_module:f", "--data", "loader"), "there is no module 'no_such_module'"),
        (("no_such.py:f", "--data", "loader"), "there is no file no_such.py"),
        (("@heathly", "--data", "loader"), "did you mean healthy?"),
        (("@healthy", "--data", "needs"), "needs(size) cannot be called without arguments"),
        (("@number", "--data", "loader"), "of type int, not a torch.nn.Module"),
        (("@healthy", "--data", "number"), "of type int, not an iterable of batches"),
        (("@quits", "--data", "loader"), "ended the program (exit code 4)"),
        (("@healthy", "--data", "empty"), "the loader is empty"),
        (("@healthy", "--data", "loader", "--metric", "ready"), "of type list, not a function"),
        (("@healthy", "--data", "loader", "--select", "NRM77"), "matches no rule"),
        (("@healthy", "--data", "loader", "--device", "toaster"), "'toaster' is no device"),
        (("@healthy", "--data", "loader", "--weights", "none.pt"), "there is no file none.pt"),
        (("@healthy", "--data", "loader", "--budget", "soon"), "no number of seconds"),
        (("@healthy", "--data", "loader", "--html", "no/such.html"), "there is no folder no"),
        (("@healthy",), "Missing option '--data'"),
    ],
)
def test_loading_errors(theirs, arguments, words):
    result = theirs("check", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "theirs_shown", "words"),
    [
        (("@raising", "--data", "loader"), "in raising", "raised ValueError"),
        (("@Broken", "--data", "loader"), "in forward", "has no attribute 'no_such'"),
        (("@healthy", "--data", "loader", "--metric", "bad_metric"), "in bad_metric", "ZeroDivisionError"),
    ],
)
def test_the_users_traceback_is_shown_without_ours(theirs, arguments, theirs_shown, words):
    result = theirs("check", *arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert theirs_shown in result.stderr
    assert words in result.stderr
    assert str(cli.__file__).rpartition("cli")[0] not in result.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nosuchlib", "cannot be imported: No module named 'nosuchlib'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "raised ZeroDivisionError while it was imported"),
        ("import sys; sys.exit(0)", "if __name__ == '__main__':"),
    ],
)
def test_modules_that_cannot_be_imported(theirs, tmp_path, code, words):
    (tmp_path / "odd_code.py").write_text(code, encoding="utf-8")
    result = theirs("check", "odd_code:f", "--data", "g")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "importlib" not in result.stderr


def test_interrupt_of_the_users_code(theirs):
    result = theirs("check", "@stopped", "--data", "loader")
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted\n")


def test_a_model_that_was_not_restored_is_an_internal_error(theirs, monkeypatch):
    def fail(*_, **__):
        raise doctor.StateNotRestoredError("NRM904: changed", cure="report it")

    monkeypatch.setattr(doctor, "check", fail)
    result = theirs("check", "@healthy", "--data", "loader")
    assert result.exit_code == 3
    assert "NRM904" in result.stderr


def test_fix_writes_what_it_proved(theirs, tmp_path):
    result = theirs("fix", "@ill", "--data", "loader", "-o", "fixed.pt", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "confirmed" in result.stdout
    assert "applied NRM103 recal [S1]  bn" in result.stdout
    body = torch.load(tmp_path / "fixed.pt", weights_only=True)
    assert [operation["code"] for operation in body["normscope"]["operations"]] == ["recal"]
    assert (body["state_dict"]["bn.running_mean"] - 2).abs().max() < 0.3
    assert theirs("check", "@ill", "--data", "loader", "--weights", "fixed.pt").exit_code == 0
    assert "The repair" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".part") == []


def test_fix_as_json(theirs):
    result = theirs("fix", "@ill", "--data", "loader", "--dry-run", "--format", "json")
    body = json.loads(result.stdout)
    fixed = records.from_json(records.FixRecord, json.dumps(body["fix"]))
    assert fixed.confirmed
    assert records.from_json(records.CheckRecord, json.dumps(body["check"])).findings


def test_fix_of_a_healthy_model_writes_nothing(theirs, tmp_path):
    result = theirs("fix", "@healthy", "--data", "loader", "-o", "fixed.pt")
    assert result.exit_code == 0
    assert "nothing to repair" in result.stdout
    assert not (tmp_path / "fixed.pt").exists()


def test_fix_that_may_not_do_what_helps_fails(theirs, tmp_path):
    result = theirs("fix", "@ill", "--data", "loader", "--rule", "NRM9", "--dry-run")
    assert result.exit_code == 0  # only these rules are asked, and they find nothing
    assert theirs("fix", "@ill", "--data", "loader").exit_code == 2
    assert theirs("fix", "@ill", "--data", "loader", "-o", "no/such.pt").exit_code == 2
    assert not list(tmp_path.glob("*.pt"))


def test_weights(theirs, tmp_path):
    def check(body):
        torch.save(body, tmp_path / "w.pt")
        return theirs("check", "@healthy", "--data", "loader", "--weights", "w.pt", "--select", "NRM1")

    net = torch.nn.Module()
    net.bn, net.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    state = net.state_dict()
    assert check({"state_dict": state}).exit_code in (0, 1)
    wrapped = check({f"module.{name}": value for name, value in state.items()})
    assert "prefix 'module.'" in wrapped.stderr
    partial = check({name: value for name, value in state.items() if "running" not in name})
    assert "note: the checkpoint has no bn.running_mean, bn.running_var" in partial.stderr
    assert partial.exit_code in (0, 1)
    for body, words in (
        ({"bn.weight": torch.ones(4)}, "missing: bn.bias"),
        ({**state, "extra": torch.ones(1)}, "unexpected: extra"),
        ({**state, "bn.weight": torch.ones(5)}, "size mismatch for bn.weight"),
        ({"a": 1}, "holds no state_dict"),
        ({"model": net}, "weights_only"),
    ):
        result = check(body)
        assert result.exit_code == 2
        assert words in result.stderr or "cannot be read" in result.stderr
        assert "Traceback" not in result.stderr
    (tmp_path / "w.pt").write_bytes(b"no checkpoint")
    assert "cannot be read" in theirs("check", "@healthy", "--data", "loader", "--weights", "w.pt").stderr


# --- rules ------------------------------------------------------------------------------------------------------------


def test_rules(call):
    result = call("rules")
    assert result.exit_code == 0
    assert all(f"  {code} {found.name}\n" in result.stdout for code, found in doctor.RULES.items())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "\\b" not in result.stdout
    listed = json.loads(call("rules", "--format", "json").stdout)
    assert [one["code"] for one in listed] == sorted(doctor.RULES)
    assert all(one["page"]["What it measures"] for one in listed)


@pytest.mark.parametrize("code", sorted(doctor.RULES))
def test_every_rule_has_its_page(call, code):
    result = call("rule", code.lower())
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{code} ")
    for heading in ("What it measures", "Why it hurts", "Threshold", "Evidence", "Fixes", "Intentional when"):
        assert f"\n{heading}\n  " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_no_such_rule(call):
    result = call("rule", "NRM999")
    assert result.exit_code == 2
    assert "NRM901" in result.stderr


@pytest.mark.parametrize("command", ["check", "fix", "fold", "rule", "rules", "demo"])
def test_help_fits_a_terminal(call, command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_progress_shows_what_is_done_and_the_time_that_is_left(monkeypatch):
    stream, real = io.StringIO(), rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: real(file=stream, force_terminal=True, width=80))
    with group.progress("checking, ≤ 60 s") as tell:
        tell(0, 0, "reading the loader")
        tell(3, 12, "pass 1 of 4: P2 evaluation (B)")
    shown = stream.getvalue()
    assert "pass 1 of 4: P2 evaluation (B)" in shown
    assert "left" in shown
