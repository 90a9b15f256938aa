"""Conversion, recalibration and adaptation on small networks: the tables of docs/convert.md and docs/adapt.md.

python scripts/convert_experiment.py run mnist 0 results.jsonl    one network of one data set: train and measure
python scripts/convert_experiment.py table results.jsonl          the tables of all that is in the file

Data sets are mnist, fashion-mnist and cifar10 in $NORMSCOPE_DATA. A network is three convolutions, seconds to train.
"""

import copy
import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import normscope as ns
from normscope.statistics import bootstrap_difference

DATA = Path(os.environ.get("NORMSCOPE_DATA", "."))
BATCH, WIDTH, EPOCHS = 100, 16, {"mnist": 3, "fashion-mnist": 3, "cifar10": 6}
TARGETS = ("GroupNorm(1)", "GroupNorm(4)", "GroupNorm(8)", "LayerNorm2d")
SHIFTS = {
    "none": lambda x: x,
    "contrast 0.5": lambda x: (x - 0.5) * 0.5 + 0.5,
    "light 0.3": lambda x: 0.3 * x,
}


class Scaled(nn.Module):
    """Standardizes pixels by the training set."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("mean", x.mean((0, 2, 3), keepdim=True))
        self.register_buffer("std", x.std((0, 2, 3), keepdim=True))

    def forward(self, x):
        return (x - self.mean) / self.std


def load(name):
    """Images in [0, 1] and labels: 6000 (CIFAR-10: 10000) to train, 2000 to test."""
    if name == "cifar10":
        file = np.load(DATA / name / "cifar10_subset.npz")
        parts = [np.concatenate([file[f"{kind}_{part}"] for part in ("test", "valid")]) for kind in "xy"]
        return tuple(
            torch.tensor(t).float() / 255 if t.ndim == 4 else torch.tensor(t).long()
            for t in (file["x_train"], file["y_train"], *parts)
        )
    tensors = []
    for part, count in (("train", 6000), ("t10k", 2000)):
        raw = [
            gzip.decompress((DATA / name / f"{part}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        ]
        images = np.frombuffer(raw[0], np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
        labels = np.frombuffer(raw[1], np.uint8, offset=8)
        tensors += [torch.tensor(images).float() / 255, torch.tensor(labels[:count]).long()]
    return tensors


def network(x):
    """Convolution, BatchNorm, ReLU, three times."""
    channels, blocks = [x.shape[1], WIDTH, 2 * WIDTH, 4 * WIDTH], [Scaled(x)]
    for k in range(3):
        conv = nn.Conv2d(channels[k], channels[k + 1], 3, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(channels[k + 1]), nn.ReLU(), nn.MaxPool2d(2) if k < 2 else nn.Identity()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[3], 10))


def train(name, seed, x, y):
    """The network, and a moving average of its parameters alone, whose buffers are those of the beginning."""
    torch.manual_seed(seed)
    model = network(x)
    average, steps = copy.deepcopy(model), EPOCHS[name] * (len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x))
        chosen = order[step * BATCH % len(x) :][:BATCH]
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for own, p in zip(average.parameters(), model.parameters(), strict=True):
                own.lerp_(p, 0.05)
    return model.eval(), average.eval()


def accuracy(model, x, y):
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).double().mean().item()


def converted(model, batches, x, y):
    """Accuracy before, after the swap alone, and after a calibrated swap."""
    rows = {}
    for target in TARGETS:
        rules = {"BatchNorm2d": target}
        naive = ns.convert(model, rules, copy=True, example=batches[0]).model
        fitted = ns.convert(model, rules, copy=True, calibrate=batches).model
        rows[target] = [accuracy(m, x, y) for m in (model, naive, fitted)]
    return rows


def averaged(model, average, batches, x, y):
    """Accuracy of the network, of the average as it is, recalibrated, and after torch's update_bn."""
    theirs = copy.deepcopy(average)
    torch.optim.swa_utils.update_bn(batches, theirs)
    ours = ns.recalibrate(average, batches, copy=True, progress=False).model
    return [accuracy(m, x, y) for m in (model, average, ours, theirs.eval())]


def mixes(y, generator):
    """Indices of 200 images: balanced, two classes, one class."""
    order = torch.randperm(len(y), generator=generator)
    some = lambda classes: torch.cat([order[y[order] == c][: 200 // len(classes)] for c in classes])  # noqa: E731
    return {"balanced": some(range(10)), "two classes": some((1, 7)), "one class": some((3,))}


def adapted(model, x, y, seed):
    """By shift and mix: hits before, hits with the guard off, and whether the guard refuses."""
    generator, rows = torch.Generator().manual_seed(seed), {}
    for mix, chosen in mixes(y, generator).items():
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        for shift, change in SHIFTS.items():
            inputs, labels = change(x[chosen]), y[chosen]
            batches = list(zip(inputs.split(20), labels.split(20), strict=True))
            try:
                ns.adapt(model, batches, copy=True)
                refused = False
            except ns.ProofError:
                refused = True
            forced = ns.adapt(model, batches, copy=True, guard=False).model
            with torch.no_grad():
                hits = [m(inputs).argmax(1).eq(labels).int().tolist() for m in (model, forced)]
            rows[f"{shift}|{mix}"] = [refused, *hits]
    return rows


def run(name, seed, file):
    x, y, test_x, test_y = load(name)
    model, average = train(name, seed, x, y)
    batches = list(x[:2048].split(256))
    record = {
        "data": name,
        "seed": seed,
        "convert": converted(model, batches, test_x, test_y),
        "average": averaged(model, average, list(x.split(256)), test_x, test_y),
        "adapt": adapted(model, test_x, test_y, seed),
    }
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def _listed(values, form):
    return ", ".join(form.format(value) for value in values)


def table(file):
    records = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    names = sorted({r["data"] for r in records}, key=list(EPOCHS).index)
    percent = lambda values: f"{100 * np.mean(values):.1f}"  # noqa: E731
    print("| data | target | BatchNorm | swapped | calibrated | left of the loss |\n|---|---|---|---|---|---|")
    for name in names:
        for target in TARGETS:
            rows = np.array([r["convert"][target] for r in records if r["data"] == name])
            left = (rows[:, 0] - rows[:, 2]) / (rows[:, 0] - rows[:, 1])
            print(
                f"| {name} | {target} |",
                *(f"{percent(c)} % |" for c in rows.T),
                ", ".join(f"{v:.2f}" for v in left),
                "|",
            )
    print("\n| data | network | average | recalibrated | update_bn | restored |\n|---|---|---|---|---|---|")
    for name in names:
        rows = np.array([r["average"] for r in records if r["data"] == name])
        back = (rows[:, 2] - rows[:, 1]) / (rows[:, 0] - rows[:, 1])
        print(f"| {name} |", *(f"{percent(c)} % |" for c in rows.T), _listed(100 * back, "{:.0f} %"), "|")
    print("\n| shift | classes | data | before | adapted | gain [95 %] | refused |\n|---|---|---|---|---|---|---|")
    for key in records[0]["adapt"]:
        for name in names:
            rows = [r["adapt"][key] for r in records if r["data"] == name]
            before, after = (np.concatenate([row[k] for row in rows]).astype(float) for k in (1, 2))
            gain = bootstrap_difference(after, before, level=0.95)
            refused = sum(row[0] for row in rows)
            interval = f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] pp"
            cells = (*key.split("|"), name, f"{percent(before)} %", f"{percent(after)} %", interval)
            print("|", " | ".join(cells), f"| {refused} of {len(rows)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        table(sys.argv[2])
