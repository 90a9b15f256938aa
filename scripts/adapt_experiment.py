"""How the guard of `ns.adapt` judges networks, shifts and mixes of classes that it was not made on (docs/adapt.md).

python scripts/adapt_experiment.py run digits residual 10 results.jsonl    train one network on one data set, measure
python scripts/adapt_experiment.py table results.jsonl                     the tables of all that is in the file

Data sets are digits (embedded), mnist, fashion-mnist and cifar10 in $NORMSCOPE_DATA. The guard's thresholds come from
scripts/convert_experiment.py: other networks, other shifts but for the contrast, other classes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from convert_experiment import BATCH, Scaled, load
from torch import nn

import normscope as ns
from normscope.data import load_digits
from normscope.statistics import bootstrap_difference
from normscope.surgery.adapt import judge

SHIFTS = {
    "none": lambda x: x,
    "contrast 0.7": lambda x: (x - 0.5) * 0.7 + 0.5,
    "contrast 0.3": lambda x: (x - 0.5) * 0.3 + 0.5,
    "brighter": lambda x: 0.5 * x + 0.5,
    "noise": lambda x: x + 0.25 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)),
    "inverted": lambda x: 1 - x,
}


class Residual(nn.Module):
    """x + a block of two convolutions, halving the map."""

    def __init__(self, width, out):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.way = nn.Sequential(nn.Conv2d(width, out, 1, 2, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        return (self.body(x) + self.way(x)).relu()


def separable(width, out, stride):
    """A convolution by channel, one by pixel."""
    return (
        nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
    )  # fmt: skip


def stem(channels, width, size=3):
    return nn.Conv2d(channels, width, size, 1, size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def head(width):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


NETWORKS = {
    "residual": lambda c, _: (*stem(c, 16), Residual(16, 32), Residual(32, 64), *head(64)),
    "separable": lambda c, _: (
        *stem(c, 24), *separable(24, 48, 2), *separable(48, 64, 1), *separable(64, 96, 2), *head(96),
    ),
    "shallow": lambda c, _: (
        *stem(c, 32, 5), nn.MaxPool2d(2), *stem(32, 64, 5), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    ),
    "perceptron": lambda _, n: (
        nn.Flatten(), nn.Linear(n, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    ),
}  # fmt: skip


def data(name):
    """Images in [0, 1] and labels, to train and to test."""
    if name != "digits":
        return load(name)
    found = load_digits()
    parts = (found.train_x, found.train_y, found.test_x, found.test_y)
    x, y, test_x, test_y = (torch.tensor(np.asarray(part)) for part in parts)
    return x[:, None] / 16, y.long(), test_x[:, None] / 16, test_y.long()


def train(network, name, seed, x, y):
    torch.manual_seed(seed)
    model = nn.Sequential(Scaled(x), *NETWORKS[network](x.shape[1], x[0].numel()))
    steps = 400 if name == "cifar10" else 200
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def mixes(y, generator):
    """Indices of up to 200 images: balanced, ever fewer of each further class, three, two and one class."""
    order, names = (torch.randperm(n, generator=generator) for n in (len(y), 10))
    first = lambda c, n: order[y[order] == c][:n]  # noqa: E731
    some = lambda classes: torch.cat([first(c, 200 // len(classes)) for c in classes])  # noqa: E731
    tail = torch.cat([first(c, max(1, 100 >> k)) for k, c in enumerate(names)])
    return {
        "balanced": some(names), "long tail": tail, "three classes": some(names[:3]), "two classes": some(names[3:5]),
        "one class": some(names[5:6]),
    }  # fmt: skip


def run(name, network, seed, file):
    x, y, test_x, test_y = data(name)
    model = train(network, name, seed, x, y)
    generator = torch.Generator().manual_seed(seed)
    with Path(file).open("a", encoding="utf-8") as out:
        for mix, chosen in mixes(test_y, generator).items():
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            for shift, change in SHIFTS.items():
                inputs, labels = change(test_x[chosen]), test_y[chosen]
                batches = list(zip(inputs.split(20), labels.split(20), strict=True))
                report = ns.adapt(model, batches, copy=True, guard=False)
                first = ns.adapt(model, batches, copy=True, guard=False, select=ns.surgery.find(model)[0].name).model
                refused = ""
                try:
                    judge(report.details["adaptation"])
                except ns.ProofError as error:
                    refused = "shift" if str(error).startswith("the first normalizer") else "classes"
                with torch.no_grad():
                    models = {"none": model, "first": first, "all": report.model}
                    hits = {key: m(inputs).argmax(1).eq(labels).int().tolist() for key, m in models.items()}
                case = {"data": name, "network": network, "seed": seed, "classes": mix, "shift": shift}
                out.write(json.dumps(case | {"refused": refused, "hits": hits}) + "\n")


def change(hits, follow):
    """What it does to the accuracy that so many normalizers follow: in points, with its interval."""
    before, after = (np.array(hits[key], float) for key in ("none", follow))
    gain = bootstrap_difference(after, before, level=0.95)
    return tuple(100 * value for value in (gain.value, gain.low, gain.high))


def table(file):
    """By every key: what the guard does with those that adapting harms and helps; what comes of three ways to adapt."""
    records = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    for r in records:
        everywhere, first = (change(r["hits"], follow) for follow in ("all", "first"))
        guarded = (0, 0, 0) if r["refused"] else everywhere
        r["ways"] = everywhere, guarded, first if r["refused"] == "classes" else guarded
    for key in ("classes", "shift", "network", "data"):
        print(f"| {key} | would lose: refused | would gain: accepted | guard off | guarded | or the first alone |")
        print("|---|---|---|---|---|---|")
        for value in [*dict.fromkeys(r[key] for r in records), "together"]:
            rows = [r for r in records if value in (r[key], "together")]
            harmed, helped = [r for r in rows if r["ways"][0][2] < 0], [r for r in rows if r["ways"][0][1] > 0]
            cells = [f"{sum(r['refused'] != '' for r in harmed)} of {len(harmed)}"]
            cells += [f"{sum(r['refused'] == '' for r in helped)} of {len(helped)}"]
            for way in zip(*(r["ways"] for r in rows), strict=True):
                cells.append(f"{np.mean([v[0] for v in way]):+.1f} pp, {sum(v[2] < 0 for v in way)} of {len(way)} lose")
            print("|", " | ".join((value, *cells)), "|")
        print()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        table(sys.argv[2])
