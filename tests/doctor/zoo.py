"""Small healthy models, properly trained: the doctor has nothing to find in them."""

from __future__ import annotations

import copy
import functools
import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normscope as ns
from normscope import data as package_data
from normscope.doctor import check
from normscope.surgery import state_hash


def conv(a, b, norm, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(b), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.body = nn.Sequential(conv(a, b, nn.BatchNorm2d, stride), nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b))
        self.short = nn.Sequential(nn.Conv2d(a, b, 1, stride), nn.BatchNorm2d(b))

    def forward(self, x):
        return torch.relu(self.body(x) + self.short(x))


class Rows(nn.Module):
    """An image as a sequence of its rows."""

    def forward(self, x):
        return x.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """Two layers that normalize first; the mean over time, or every step for the next character."""

    def __init__(self, embed, length, classes, causal=False, width=32):
        super().__init__()
        self.embed, self.causal = embed, causal
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.attend = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.place[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        for k in range(2):
            y = self.norms[2 * k](x)
            x = x + self.attend[k](y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + self.feed[k](self.norms[2 * k + 1](x))
        x = self.norms[4](x)
        return self.head(x if self.causal else x.mean(1))


class Recurrent(nn.Module):
    """An LSTM whose outputs are normalized: by layer, or the last one by batch."""

    def __init__(self, embed, width, classes, norm, every=False):
        super().__init__()
        self.embed, self.lstm, self.every = embed, nn.LSTM(width, 32, batch_first=True), every
        self.norm, self.head = norm(32), nn.Linear(32, classes)

    def forward(self, x):
        x = self.lstm(self.embed(x))[0]
        return self.head(self.norm(x if self.every else x[:, -1]))


def mlp(norm):
    def make(c, s, k):
        layers = [nn.Flatten()]
        for a, b in ((c * s * s, 64), (64, 64)):
            layers += [nn.Linear(a, b), norm(b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(64, k))

    return make


def plain(norm):
    def make(c, s, k):
        blocks = (conv(c, 16, norm, 1 if s < 16 else 2), conv(16, 32, norm, 2), conv(32, 32, norm))
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, k))

    return make


def residual_bn(c, s, k):
    blocks = (conv(c, 16, nn.BatchNorm2d, 1 if s < 16 else 2), Residual(16, 16, 1), Residual(16, 32, 2))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, k))


def rows_transformer(c, s, k):
    return Transformer(nn.Sequential(Rows(), nn.Linear(c * s, 32)), s, k)


class Places(nn.Module):
    """A map as a sequence of its places."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def mixed(c, s, k):
    """Convolutions with BatchNorm, then a transformer with LayerNorm over what they leave."""
    blocks = (conv(c, 16, nn.BatchNorm2d, 1 if s < 16 else 2), conv(16, 32, nn.BatchNorm2d, 2))
    side = (s if s < 16 else s // 2) // 2
    return Transformer(nn.Sequential(*blocks, Places()), side * side, k)


IMAGES = {
    "MLP, BatchNorm": mlp(nn.BatchNorm1d),
    "MLP, RMSNorm": mlp(nn.RMSNorm),
    "convolutions with BatchNorm, transformer with LayerNorm": mixed,
    "convolutions, BatchNorm": plain(nn.BatchNorm2d),
    "residual, BatchNorm": residual_bn,
    "convolutions, GroupNorm": plain(lambda c: nn.GroupNorm(4, c)),
    "convolutions, InstanceNorm": plain(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "transformer, LayerNorm": rows_transformer,
    "LSTM, LayerNorm": lambda c, s, k: Recurrent(Rows(), c * s, k, nn.LayerNorm),
    "LSTM, BatchNorm": lambda c, s, k: Recurrent(Rows(), c * s, k, nn.BatchNorm1d),
}
# Trained in other ways, on the digits alone: see `raised`.
RAISED = (
    "student of a teacher, BatchNorm",
    "new head on a frozen backbone, BatchNorm",
    "generator of a GAN, BatchNorm",
)
TEXT = {
    "transformer, LayerNorm": lambda k: Transformer(nn.Embedding(k, 32), 32, k, causal=True),
    "LSTM, LayerNorm": lambda k: Recurrent(nn.Embedding(k, 32), 32, k, nn.LayerNorm, every=True),
}


# --- data ---------------------------------------------------------------------------------------------------------

TRAIN, TEST = 6000, 3000
FOLDER = "NORMSCOPE_DATA"


def folder():
    return Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None


def data_sets():
    """The names of what is there."""
    root = folder()
    found = ["digits"]
    places = {
        "MNIST": "mnist",
        "Fashion-MNIST": "fashion-mnist",
        "CIFAR-10": "cifar10/cifar10_subset.npz",
        "text": "text/tinyshakespeare/input.txt",
    }
    return found + [name for name, place in places.items() if root is not None and (root / place).exists()]


def names_for(data):
    return list(TEXT if data == "text" else IMAGES) + list(RAISED if data == "digits" else ())


def pictures(x, top):
    x = torch.from_numpy(np.array(x)).float() / top
    x = x.unsqueeze(1) if x.dim() == 3 else x
    return (x - x.mean()) / x.std()


@functools.cache
def load(data):
    """(training, test) of tensors."""
    if data in ("digits", "MNIST"):
        d = package_data.load(data.lower())
        parts = [(pictures(x, d.top), y) for x, y in ((d.train_x, d.train_y), (d.test_x, d.test_y))]
    elif data == "Fashion-MNIST":
        place = folder() / "fashion-mnist"

        def idx(name, skip):
            return np.frombuffer(gzip.decompress((place / f"{name}.gz").read_bytes()), np.uint8, offset=skip)

        parts = [
            (pictures(idx(f"{p}-images-idx3-ubyte", 16).reshape(-1, 28, 28), 255), idx(f"{p}-labels-idx1-ubyte", 8))
            for p in ("train", "t10k")
        ]
    elif data == "CIFAR-10":
        with np.load(folder() / "cifar10" / "cifar10_subset.npz") as d:
            parts = [(pictures(d[f"x_{p}"], 255), d[f"y_{p}"]) for p in ("train", "test")]
    else:
        codes = np.frombuffer((folder() / "text" / "tinyshakespeare" / "input.txt").read_bytes(), np.uint8)
        codes = np.unique(codes, return_inverse=True)[1]
        lines = torch.from_numpy(codes[: len(codes) // 33 * 33].reshape(-1, 33)).long()
        return TensorDataset(lines[:-2000, :-1], lines[:-2000, 1:]), TensorDataset(
            lines[-2000:, :-1], lines[-2000:, 1:]
        )
    pairs = [
        TensorDataset(x[:n], torch.from_numpy(np.array(y[:n])).long())
        for (x, y), n in zip(parts, (TRAIN, TEST), strict=True)
    ]
    return pairs[0], pairs[1]


def loader(pairs, size, seed):
    return DataLoader(pairs, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def loss_of(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none")


def per_line(output, batch):
    """One loss per line of text."""
    return loss_of(output, batch[1]).view(len(output), -1).mean(1)


def hits_per_line(output, batch):
    return (output.argmax(-1) == batch[1]).float().mean(1)


def build(data, name, steps=None, seed=0):
    """A trained model in evaluation mode."""
    pairs = load(data)[0]
    steps = steps or {"digits": 300, "CIFAR-10": 600, "text": 400}.get(data, 400)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in RAISED:
            return raised(name, pairs, steps)
        x, _ = pairs[0]
        model = (
            TEXT[name](int(pairs.tensors[0].max()) + 1) if data == "text" else IMAGES[name](x.shape[0], x.shape[-1], 10)
        )
        return learn(model.parameters(), pairs, steps, lambda x, y: loss_of(model(x), y).mean(), model, seed=seed)


def learn(parameters, pairs, steps, loss, model, seed=0):
    """AdamW with a warm-up towards a rate of zero; `loss(x, y)` of a batch."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01)
    model.train()
    done = 0
    while done < steps:
        for x, y in loader(pairs, 64, seed + done):
            if done >= steps or len(x) < 64:
                break
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (done + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * done / steps))
            optimizer.zero_grad()
            loss(x, y).backward()
            nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
            optimizer.step()
            done += 1
    return model.eval()


def raised(name, pairs, steps):
    """A model that is not simply trained on labels."""
    made = plain(nn.BatchNorm2d)(1, 8, 10)
    if name.startswith("generator"):
        return generator(pairs, steps)
    learn(made.parameters(), pairs, steps, lambda x, y: loss_of(made(x), y).mean(), made)
    if name.startswith("student"):
        student = mlp(nn.BatchNorm1d)(1, 8, 10)

        def distilled(x, _):
            with torch.no_grad():
                soft = (made(x) / 2).softmax(1)
            return -(soft * (student(x) / 2).log_softmax(1)).sum(1).mean()

        return learn(student.parameters(), pairs, steps, distilled, student)
    ns.freeze(made[:3])
    made[:3].requires_grad_(False)
    made[-1].reset_parameters()
    return learn(made[-1].parameters(), pairs, steps // 2, lambda x, y: loss_of(made(x), y).mean(), made)


def generator(pairs, steps):
    """Of digits, against a discriminator without normalizers; both learn by Adam as in DCGAN."""
    made = nn.Sequential(
        nn.Linear(16, 64 * 4), nn.BatchNorm1d(64 * 4), nn.ReLU(), nn.Unflatten(1, (64, 2, 2)),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, 2, 1),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(),
        nn.Linear(64 * 4, 1),
    )  # fmt: skip
    ours, theirs = (torch.optim.Adam(m.parameters(), 1e-3, (0.5, 0.99)) for m in (made, judge))
    real = pairs.tensors[0]
    for _ in range(2 * steps):
        x, z = real[torch.randint(len(real), (64,))], torch.randn(64, 16)
        theirs.zero_grad()
        (F.softplus(-judge(x)) + F.softplus(judge(made(z).detach()))).mean().backward()
        theirs.step()
        ours.zero_grad()
        F.softplus(-judge(made(z))).mean().backward()
        ours.step()
    return made.eval()


@dataclass
class Health:
    """What the doctor says about a healthy model."""

    score: float
    errors: tuple
    warnings: tuple
    infos: tuple
    applied: tuple
    same: bool
    report: object


def examine(data, name, steps=None, seed=0, size=32):
    """Train, check, and try to fix what is not broken."""
    model = build(data, name, steps, seed)
    options = {"loss": per_line, "metric": hits_per_line} if data == "text" else {}
    given = loader(load(data)[1], size, seed)
    if name.startswith("generator"):
        given = list(torch.randn(40, size, 16, generator=torch.Generator().manual_seed(seed)))
    before = state_hash(model)
    report = check(model, given, **options)
    by = {s: tuple(f.code for f in report.findings if f.severity == s) for s in "EWI"}
    score = next((s.metric.value for s in report.record.scores if s.state == "eval" and s.metric is not None), math.nan)
    fixed = report.fix()
    applied = tuple(f"{t.rule} {t.remedy.code}" for t in fixed.applied)
    return Health(100 * score, by["E"], by["W"], by["I"], applied, state_hash(model) == before, copy.copy(report))
