"""Two ways in which people really break a normalized network, and what `normscope.check` and `fix` make of them.

Source of the cases: an average of the weights without their statistics (YU1ut/MixMatch-pytorch#16,
pytorch/ignite#2590: 20 points of F1), and a backbone whose weights are frozen and whose statistics are not
(lightly-ai/lightly#1438, pytorch/pytorch#86590).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.data import DataSet
from normscope.errors import ArgumentError
from normscope.lab.figure1_judge import accuracy_interval
from normscope.lab.threads import threads
from normscope.records import Clinic, Interval, Patient

__all__ = ["Network", "Settings", "run"]

Tell = Callable[[int, int, str], None]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the numbers depend on, apart from the data.

    Raises:
        ArgumentError: a setting is out of range.
    """

    # Enough for 0.9 on MNIST; a minute would add little to the point.
    steps: int = 600
    # Steps of the second head: by then the running statistics (momentum 0.1) hold 0.9⁶⁰ = 0.2 % of what they were.
    more_steps: int = 60
    batch: int = 32
    rate: float = 0.05
    momentum: float = 0.9
    # Weight of the old average per step: a memory of 50 steps.
    decay: float = 0.98
    channels: tuple[int, ...] = (16, 32, 32)
    # Samples that the doctor sees; the rest of the test set measures what became of the patient.
    examined: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.more_steps, self.examined, *self.channels) < 1 or self.batch < 2:
            raise ArgumentError("steps, more_steps, examined and channels must be positive, batch at least 2")
        if not (self.rate > 0 and 0 <= self.momentum < 1 and 0 < self.decay < 1):
            raise ArgumentError("rate must be positive, momentum in [0, 1), decay in (0, 1)")

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """A few seconds on the embedded digits."""
        return cls(steps=200, seed=seed)

    def describe(self) -> tuple[tuple[str, str], ...]:
        """Name and value of every setting in words."""
        return (
            ("network", f"convolutions of {', '.join(map(str, self.channels))} channels, each with Batch Normalization "
             "and ReLU, then the mean over the image and a linear classifier"),
            ("training", f"{self.steps:,} steps of SGD, batch {self.batch}, rate {self.rate:g}, "
             f"momentum {self.momentum:g}"),
            ("average of the weights", f"exponential, {self.decay:g} of the old one per step"),
            ("second head", f"{self.more_steps:,} steps on the same images, brighter and paler (1 − x/2)"),
            ("seed", str(self.seed)),
        )  # fmt: skip


class Network(nn.Module):
    """Images (n, 1, h, w) to class scores (n, classes); `second` is a head for another camera."""

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        inputs = 1
        for k, width in enumerate(settings.channels):
            parts += [nn.Conv2d(inputs, width, 3, padding=1, stride=2 if k else 1, bias=False)]
            parts += [ns.nn.BatchNorm2d(width, activation="relu")]
            inputs = width
        self.backbone = nn.Sequential(*parts)
        self.head = nn.Linear(inputs, classes)
        self.second = nn.Linear(inputs, classes)

    def features(self, x: Tensor) -> Tensor:
        """(n, 1, h, w) to (n, c)."""
        found: Tensor = self.backbone(x).mean((2, 3))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of the first head."""
        scores: Tensor = self.head(self.features(x))
        return scores


@dataclass(frozen=True, slots=True)
class _Ward:
    """The data as tensors: for training, for the doctor, and for what neither sees."""

    train: Batch
    examined: Batch
    unseen: Batch

    def loader(self, size: int) -> list[Batch]:
        """What the doctor sees, in batches."""
        x, y = self.examined
        return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def run(data: DataSet, settings: Settings, *, on_step: Tell | None = None) -> Clinic:
    """Train a network, break it in two ways, have each examined and repaired.

    The caller's random state and number of threads stay as they are.

    Args:
        data: The samples.
        settings: What to train.
        on_step: Called with the steps done, all steps, and the name of the present part.
    """
    clock, tell = time.perf_counter(), on_step or _silent
    with threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        ward = _ward(data, settings)
        network, average = _train(ward, settings, data.classes, tell)
        trained = _accuracy(network, ward.unseen)
        patients = (
            _average_patient(network, average, ward, settings, trained),
            _frozen_patient(network, ward, settings, trained, tell),
        )
        tell(1, 1, "repaired")
    return Clinic(
        data=data.card,
        settings=settings.describe(),
        patients=patients,
        lessons=tuple(_lesson(patient) for patient in patients),
        seed=settings.seed,
        seconds=time.perf_counter() - clock,
    )


def _silent(*_: object) -> None:
    """Tell nobody."""


def _ward(data: DataSet, settings: Settings) -> _Ward:
    def images(x: object) -> Tensor:
        pixels = torch.tensor(x).unsqueeze(1).float() / data.top
        # Large images are halved: a fourth of the time, and the point is not accuracy.
        return nn.functional.avg_pool2d(pixels, 2) if pixels.shape[-1] > 16 else pixels

    x, y = images(data.test_x), torch.tensor(data.test_y).long()
    # Test files are ordered, e.g. by writer.
    order = torch.randperm(len(y))
    size = min(settings.examined, 2 * len(y) // 3)
    seen, unseen = order[:size], order[size:]
    train = images(data.train_x), torch.tensor(data.train_y).long()
    return _Ward(train, (x[seen], y[seen]), (x[unseen], y[unseen]))


def _draws(samples: int, size: int) -> Iterator[Tensor]:
    while True:
        yield torch.randint(samples, (size,))


def _train(ward: _Ward, settings: Settings, classes: int, tell: Tell) -> tuple[Network, Network]:
    """A network trained well, and the average of its weights: without the statistics, as it is often written."""
    network = Network(settings, classes)
    average = copy.deepcopy(network)
    parameters = [p for name, p in network.named_parameters() if not name.startswith("second")]
    speeds = [torch.zeros_like(p) for p in parameters]
    x, y = ward.train
    network.train()
    for step, batch in zip(range(settings.steps), _draws(len(y), settings.batch), strict=False):
        loss = nn.functional.cross_entropy(network(x[batch]), y[batch])
        # By hand: the first step of torch.optim imports the compiler, which takes longer than the quick demo trains.
        with torch.no_grad():
            for p, v, g in zip(parameters, speeds, torch.autograd.grad(loss, parameters), strict=True):
                p.sub_(v.mul_(settings.momentum).add_(g), alpha=settings.rate)
            for ours, theirs in zip(average.parameters(), network.parameters(), strict=True):
                ours.lerp_(theirs, 1 - settings.decay)
        if step % 50 == 0:
            tell(step, settings.steps, "training a network")
    return network.eval(), average.eval()


@torch.no_grad()
def _accuracy(network: Network, samples: Batch) -> Interval:
    x, y = samples
    network.eval()
    hits = [(network(x[k : k + 1000]).argmax(1) == y[k : k + 1000]).sum().item() for k in range(0, len(y), 1000)]
    right = float(sum(hits))
    return accuracy_interval(right / len(y), len(y))


# --- the patients -----------------------------------------------------------------------------------------------------


def _average_patient(network: Network, average: Network, ward: _Ward, settings: Settings, trained: Interval) -> Patient:
    ill = _accuracy(average, ward.unseen)
    report = ns.check(average, ward.loader(settings.batch), reference=network)
    fixed = report.fix()
    return Patient(
        name="an average of the weights, without their statistics",
        story="While a network trained well, an exponential average of its weights was kept, as is often done for "
        "evaluation. The loop went over model.parameters(), and running statistics are not among them: they are "
        "buffers. The average has the weights of a trained network and the statistics of a new one.",
        trained=trained,
        ill=ill,
        cured=_accuracy(average, ward.unseen),
        check=report.record,
        fix=fixed.record,
    )


def _frozen_patient(network: Network, ward: _Ward, settings: Settings, trained: Interval, tell: Tell) -> Patient:
    for parameter in (*network.backbone.parameters(), *network.head.parameters()):
        parameter.requires_grad_(False)
    x, y = ward.train
    for step, batch in zip(range(settings.more_steps), _draws(len(y), settings.batch), strict=False):
        _second_head_step(network, (x[batch], y[batch]), None)
        tell(step, settings.more_steps, "training a second head")
    ill = _accuracy(network, ward.unseen)
    report = ns.check(network, ward.loader(settings.batch), train_step=_second_head_step)
    fixed = report.fix()
    return Patient(
        name="a frozen backbone, whose statistics are not frozen",
        story="The same network got a second head for another camera, whose images are brighter and paler. Backbone "
        "and first head were frozen with requires_grad_(False), so that the first task would stay as it was. But the "
        "loop called model.train(), and in training mode running statistics follow the data, frozen weights or not.",
        trained=trained,
        ill=ill,
        cured=_accuracy(network, ward.unseen),
        check=report.record,
        fix=fixed.record,
    )


def _second_head_step(model: nn.Module, batch: Batch, _: object) -> None:
    """One step of the second head; the rest of the network is frozen, or so it seems."""
    if not isinstance(model, Network):
        raise ArgumentError("this step trains a Network of this file")
    model.train()
    x, y = batch
    loss = nn.functional.cross_entropy(model.second(model.features(1 - x / 2)), y)
    parameters = list(model.second.parameters())
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.sub_(g, alpha=0.1)


def _lesson(patient: Patient) -> str:
    """What one patient teaches, in a line."""
    found = next(iter(patient.check.findings), None)
    named = "nothing" if found is None else f"{found.code} {found.name}"
    ill, cured = f"{patient.ill.value:.1%}", f"{patient.cured.value:.1%}"
    was = f"{patient.trained.value:.1%}"
    return f"{patient.title}: {ill} instead of {was}. Found as {named}, fixed to {cured}."
