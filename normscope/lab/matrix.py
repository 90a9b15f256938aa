"""The tasks of the matrix, each trained as in its own experiment, and the successors of Batch Normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normscope as ns
from normscope.lab import registry
from normscope.lab.experiment import Numbers, Task
from normscope.lab.restoration import available_scenes
from normscope.lab.samples import available, batches, samples
from normscope.lab.training import Arm, classify, descend

__all__ = ["MEASURE", "successors"]

# Adam's rates, as shares of those of SGD.
ADAM = 0.1


def _like(task: Task, experiment: str, settings: Arm) -> Task:
    """The run of another experiment with this one's norm, steps, stage and seeds; the others train with Adam."""
    kept = {key: value for key, value in task.settings if key in ("norm", "steps", "stage", "rate")}
    if experiment != "H01":
        kept["rate"] = ADAM * task.number("rate")
    return Task(experiment, tuple((kept | dict(settings)).items()), task.seeds)


def _classified(net: str) -> Callable[[Task], Numbers]:
    def measure(task: Task) -> Numbers:
        name, train, test = ("cifar10", 5_000, 1_000) if net == "cnn" else ("mnist", 5_000, 2_000)
        data = available(name) if not task["small"] else "digits"
        norm = "ghost2" if task.text("task") == "small batch" else task.text("norm")
        made = _like(task, "H01", {"data": data, "net": net, "norm": norm})
        return classify(made, form="half", train_size=train, test_size=test, batch=32, momentum=0.9)

    return measure


def _recurrent(task: Task) -> Numbers:
    norm = {"BN": "horizontal 0.1"}.get(task.text("norm"), task.text("norm"))
    data = available("mnist") if not task["small"] else "digits"
    # Tuning in E01 leaves out the gradients, which are not asked for here.
    made: Arm = {"data": data, "net": "rnn", "cell": "tanh", "sequence": "rows", "norm": norm, "stage": "tune"}
    return registry.load("E01").measure(_like(task, "E01", made))


def _restored(experiment: str) -> Callable[[Task], Numbers]:
    def measure(task: Task) -> Numbers:
        data = available_scenes() if not task["small"] else "textures"
        own: Arm = {"loss": "L1"} if experiment == "F01" else {"task": "noise", "residual": True}
        return registry.load(experiment).measure(_like(task, experiment, {"data": data, "net": "restorer", **own}))

    return measure


def _transformed(task: Task) -> Numbers:
    """Rows of images as tokens."""
    data = samples(available("mnist") if not task["small"] else "digits", "half", 5_000, 2_000)
    data = data.mapped(lambda x: x[:, 0])
    torch.manual_seed(task.seeds[0])
    network = _Transformer(data.shape[1], data.shape[0], data.classes, task.text("norm"))

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(data.train_y), 64, task.seeds[0]):
            yield F.cross_entropy(network(data.train_x[rows]), data.train_y[rows])

    rate = ADAM * task.number("rate")
    network.train()
    descend(list(network.parameters()), losses(), task.whole("steps"), rate, clip=1.0, adam=True)
    network.eval()
    found = {}
    with torch.no_grad():
        for name, x, y in (("valid", data.valid_x[:1000], data.valid_y[:1000]), ("test", data.test_x, data.test_y)):
            found[name] = [float((network(x).argmax(1) == y).float().mean())]
    return found


class _Transformer(nn.Module):
    """Two blocks of attention and perceptron, a normalizer in front of each, the mean over tokens, a classifier."""

    WIDTH, HEADS = 32, 2

    def __init__(self, features: int, length: int, classes: int, norm: str) -> None:
        super().__init__()
        self.embed = nn.Linear(features, self.WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(length, self.WIDTH))
        self.norms = nn.ModuleList(_of_tokens(norm, self.WIDTH) for _ in range(4))
        self.attention = nn.ModuleList(nn.Linear(self.WIDTH, 3 * self.WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(2))
        self.perceptron = nn.ModuleList(
            nn.Sequential(nn.Linear(self.WIDTH, 64), nn.GELU(), nn.Linear(64, self.WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(self.WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, features) to class scores."""
        x = self.embed(x) + self.place
        for k in range(2):
            parts = self.attention[k](self.norms[2 * k](x)).unflatten(2, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
            x = x + self.out[k](mixed.transpose(1, 2).flatten(2))
            x = x + self.perceptron[k](self.norms[2 * k + 1](x))
        scores: Tensor = self.head(x.mean(1))
        return scores


def _of_tokens(norm: str, width: int) -> nn.Module:
    if norm == "BN":
        return ns.nn.Norm("[n t] c", width, running=True)
    return ns.nn.LayerNorm(width) if norm == "LN" else nn.Identity()


MEASURE: Mapping[str, Callable[[Task], Numbers]] = {
    "perceptron": _classified("mlp3"),
    "convolutions": _classified("cnn"),
    "small batch": _classified("cnn"),
    "recurrent": _recurrent,
    "transformer": _transformed,
    "super-resolution": _restored("F01"),
    "denoising": _restored("F02"),
}

# Layers that followed Batch Normalization: for 8 channels.
SUCCESSORS: tuple[Callable[[], nn.Module], ...] = (
    lambda: ns.nn.LayerNorm2d(8),
    lambda: ns.nn.GroupNorm(2, 8),
    lambda: ns.nn.InstanceNorm2d(8),
    lambda: ns.nn.PositionalNorm(8),
    lambda: ns.nn.FilterResponseNorm(8),
    lambda: ns.nn.Norm("n [c] h w", 8, center=False),
    lambda: ns.nn.DynamicTanh(8, channels_last=False),
    lambda: ns.nn.EvoNormS0(8, 2),
    lambda: ns.nn.EvoNormB0(8),
    lambda: ns.nn.BatchRenorm(8, schedule=(0, 1, 1)),
    lambda: ns.nn.OnlineNorm(8),
    lambda: ns.nn.GhostBatchNorm(8, 2),
    lambda: ns.nn.SyncBatchNorm(8),
    lambda: ns.nn.MeanOnlyBatchNorm(8),
    lambda: ns.nn.SwitchNorm(8),
    lambda: ns.nn.DecorrelatedBatchNorm(8),
    lambda: ns.nn.IterNorm(8),
    lambda: ns.nn.SplitBatchNorm(8, 2),
)


@torch.no_grad()
def successors() -> tuple[int, int]:
    """How many give the last sample the same whatever the others are, of how many."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 8, 4, 4, generator=g)
    other = torch.cat([torch.randn(7, 8, 4, 4, generator=g), x[-1:]])
    alone = 0
    for make in SUCCESSORS:
        first, second = make().train(), make().train()
        alone += bool(torch.allclose(first(x)[-1], second(other)[-1], atol=1e-6))
    return alone, len(SUCCESSORS)
