"""Patches for the user's own code: what the printed diff makes of a real file heals it, and nothing is guessed."""

import importlib.util
import itertools
import re

import pytest
import torch

from normscope.doctor import check
from normscope.surgery import state_hash

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(9)]


def step_of(model, batch, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
"""
NET = """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.first(x))))
"""
# Name: source, rule, remedy, and what is checked of the module that the source makes.
CASES = {
    "evaluation in training mode": (
        NET + '''

def evaluate(model):
    """The share that is right."""
    hits = 0
    with torch.no_grad():
        for x, y in batches():
            hits += int((model(x).argmax(1) == y).sum())

    return hits / 144
''', "NRM208", "eval-mode", lambda m: (m.Net().train(), m.batches(), {"evaluate": m.evaluate}),
    ),
    "prediction in training mode": (
        NET + """

@torch.no_grad()
def predict(net, x):
    return net(x)
""", "NRM201", "eval-mode", lambda m: (m.Net().train(), m.batches(), {"predict": m.predict}),
    ),
    "training in evaluation mode": (
        NET + """

def step(model, batch, optimizer):
    # the loop's body
    step_of(model, batch, optimizer)
""", "NRM202", "train-mode", lambda m: stepping(m, m.Net().eval(), m.step),
    ),
    "a function on batch statistics": (
        """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = F.batch_norm(self.first(x), None, None, self.weight, training=True)
        return self.head(torch.relu(x))
""", "NRM210", "functional-batch-norm", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "one sample is left": (
        NET + """

def loader():
    data = TensorDataset(torch.randn(129, 6), torch.arange(129) % 3)
    return DataLoader(data, batch_size=16,
                      shuffle=False)
""", "NRM301", "drop-last", lambda m: (m.Net().train(), m.loader(), {}),
    ),
    "the wrong axis": (
        """

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return torch.relu(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Inner()])

    def forward(self, x):
        return self.body[0](x).mean(1)
""", "NRM403", "transpose", lambda m: (m.Net().eval(), [torch.randn(16, 5, 6) for _ in range(6)], {}),
    ),
    "twice in a row": (
        """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8),
            nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.body(x)
""", "NRM411", "remove-norm", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "one value per group": (
        """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 32), None, nn.Linear(32, 3)
        self.norm = nn.GroupNorm(num_groups=32, num_channels=32)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.first(x))))
""".replace(", self.norm, self.head = nn.Linear(6, 32), None,", ", self.head = nn.Linear(6, 32),"),
        "NRM402", "other-axis", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "one class, two layers": (
        """

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.norm = nn.GroupNorm(32, 32)

    def forward(self, x):
        return torch.relu(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.body = nn.Sequential(*(Block() for _ in range(2)))

    def forward(self, x):
        return self.body(self.first(x))
""", "NRM402", "other-axis", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "decay on everything": (
        NET + """

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
""", "NRM604", "param-groups", lambda m: optimizing(m, m.Net()),
    ),
    "hooks that do not fire": (
        NET.replace("self.norm(self.first(x))", "self.norm.forward(self.first(x))"),
        "NRM905", "call-modules", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "dropout in every mode": (
        NET.replace("return self.head(torch.relu(", "return self.head(F.dropout(torch.relu(").replace(
            "(x))))", "(x))), 0.3))"
        ),
        "NRM903", "dropout", lambda m: (m.Net().eval(), m.batches(), {}),
    ),
    "a checkpoint of the parameters": (
        NET + """

def again(model):
    kept = dict(model.named_parameters())
    made = Net()
    made.load_state_dict(kept, strict=False)
    return made
""", "NRM607", "load-buffers", lambda m: (trained(m), m.batches(), {"roundtrip": m.again}),
    ),
}  # fmt: skip


def stepping(m, model, step):
    return model, m.batches(), {"train_step": step, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def optimizing(m, model):
    return model, m.batches(), {"optimizer": m.optimizer(model), "forward": lambda net, batch: net(batch[0])}


def trained(m):
    model = m.Net().train()
    for x, _ in m.batches():
        model(3 * x + 1)
    return model.eval()


numbers = itertools.count()


def made(folder, text):
    """A module of the user's, from its text."""
    name = f"theirs_{next(numbers)}"
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def applied(text, diff):
    """A text with a unified diff in it; lines that do not fit raise."""
    old, new, at = text.splitlines(), [], 0
    for line in diff.splitlines()[2:]:
        place = re.match(r"@@ -(\d+)", line)
        if place:
            start = int(place[1]) - 1
            new, at = new + old[at:start], start
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            assert old[at] == line[1:], f"line {at + 1}"
            new, at = new + ([] if line.startswith("-") else [old[at]]), at + 1
    return "\n".join(new + old[at:]) + "\n"


def examined(module, setting):
    torch.manual_seed(0)
    model, loader, options = setting(module)
    before = state_hash(model)
    report = check(model, loader, **options)
    assert state_hash(model) == before
    return report


def patch_of(report, rule, remedy):
    (finding,) = (f for f in report.findings if f.code == rule)
    return next(r.command for r in finding.remedies if r.code == remedy)


@pytest.mark.parametrize("name", CASES)
def test_the_printed_patch_fits_the_file_and_heals_it(name, tmp_path):
    source, rule, remedy, setting = CASES[name]
    module = made(tmp_path, HEAD + source)
    report = examined(module, setting)
    diff = patch_of(report, rule, remedy)
    assert diff.startswith("--- "), diff
    assert (tmp_path / f"{module.__name__}.py").read_text(encoding="utf-8") == HEAD + source, "nothing is applied"
    again = examined(made(tmp_path, applied(HEAD + source, diff)), setting)
    assert rule not in [f.code for f in again.findings], again[rule].reason


def test_a_patch_changes_nothing_beside_its_place(tmp_path):
    source, rule, remedy, setting = CASES["one sample is left"]
    diff = patch_of(examined(made(tmp_path, HEAD + source), setting), rule, remedy)
    changed = [line for line in diff.splitlines()[2:] if line[:1] in "+-"]
    assert changed == ["-                      shuffle=False)", "+                      shuffle=False, drop_last=True)"]


LAMBDA = NET + "\n\nevaluate = lambda model: model(torch.randn(4, 6)).sum()\n"
TWO = CASES["one sample is left"][0] + "\n\ndef other():\n    return DataLoader(batches())\n"
GIVEN = """

class Inner(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.norm = norm

    def forward(self, x):
        return torch.relu(self.norm(self.linear(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Inner(nn.BatchNorm1d(5))])

    def forward(self, x):
        return self.body[0](x).mean(1)
"""
TEXT = CASES["evaluation in training mode"][0].replace("    hits = 0\n", '    hits = len("""\n""") - 1\n')


@pytest.mark.parametrize(
    ("source", "of", "why"),
    [
        (LAMBDA, "evaluation in training mode", "is not defined by def"),
        (TWO, "one sample is left", "2 calls of DataLoader"),
        (GIVEN, "the wrong axis", "not built in Inner, but handed to it"),
        (TEXT, "evaluation in training mode", "text of several lines"),
    ],
)
def test_what_is_not_certain_stays_advice_with_its_reason(source, of, why, tmp_path):
    _, rule, remedy, setting = CASES[of]
    advice = patch_of(examined(made(tmp_path, HEAD + source), setting), rule, remedy)
    assert not advice.startswith("---")
    assert advice.splitlines()[-1].startswith("# no patch: ")
    assert why in advice


def test_code_without_a_file_has_advice_only():
    space = {"__name__": "nowhere"}
    exec(compile(HEAD + CASES["evaluation in training mode"][0], "<typed>", "exec"), space)
    model = space["Net"]().train()
    report = check(model, space["batches"](), evaluate=space["evaluate"])
    assert "# no patch: the source cannot be had" in patch_of(report, "NRM208", "eval-mode")


def test_code_of_installed_packages_is_not_the_users():
    model = torch.nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    report = check(model, [torch.randn(16, 5, 6) for _ in range(6)])
    assert "belongs to an installed package" in patch_of(report, "NRM407", "remove-norm")


def test_a_fix_prints_patches_and_applies_none(tmp_path, capsys):
    from rich.console import Console

    from normscope.report import terminal

    source, rule, _, setting = CASES["evaluation in training mode"]
    report = examined(made(tmp_path, HEAD + source), setting)
    fix = report.fix(unsafe=True)
    assert not [t for t in fix.applied if t.rule == rule]
    terminal.print_fix(fix.record, Console(width=80))
    printed = capsys.readouterr().out
    assert "+    was = model.training" in printed
    assert "an edit of your code" in printed
