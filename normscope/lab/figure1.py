"""Figure 1 of the Batch Normalization paper, in small: a sigmoid network on handwritten digits, with and without.

Source: S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
Covariate Shift", ICML 2015, arXiv 1502.03167, section 4.1. The network has three hidden layers of 100 sigmoid units and
is trained by plain SGD on mini-batches of 60. Recorded are the test accuracy and the 15th, 50th and 85th percentile of
what a typical unit of the last hidden layer receives.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.data import DataSet
from normscope.errors import ArgumentError
from normscope.lab.figure1_judge import accuracy_interval, judge, shown_rate, target_accuracy
from normscope.lab.threads import threads
from normscope.records import Bands, Curve, Figure1, Machine, TrainingRun

__all__ = ["DIFFERENCES", "Network", "Settings", "run"]

PERCENTILES = (15.0, 50.0, 85.0)

DIFFERENCES = (
    "The paper trains for 50,000 steps at a learning rate that it does not state; here training is shorter and every "
    "learning rate of the run is shown.",
    "The paper feeds binary images; here a pixel is its grey value scaled to 0 … 1.",
    "The paper says that the weights start as small random Gaussian values; here their standard deviation is "
    "1/√(number of inputs).",
    "The network with Batch Normalization is measured as it would be used: with running statistics, not with those of "
    "the batch it sees. The percentiles therefore start once these statistics have forgotten their initial values.",
)

CAVEAT = (
    "Every setting was trained once, with one seed: the intervals say how far another test set of the same size would "
    "move an accuracy, not how far another seed would. The best rate of each network was chosen on the test set, for "
    "both alike."
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the numbers depend on, apart from the data.

    Raises:
        ArgumentError: a setting is out of range.
    """

    # From a rate at which the plain network barely moves to one at which it fails; in between it trains well.
    learning_rates: tuple[float, ...] = (0.1, 1.0, 10.0)
    # At its best rate the plain network has nearly levelled off, and six trainings fit into a minute on two cores.
    steps: int = 2000
    # The paper's own.
    batch: int = 60
    hidden: tuple[int, ...] = (100, 100, 100)
    # Measurements along one training, denser at its beginning, where curves bend.
    probes: int = 32
    # Test samples behind the percentiles: a percentile of 500 is known to about ±2 percentage points.
    probe_samples: int = 500
    # By then the running statistics (momentum 0.1) hold 0.9⁵⁰ = 0.5 % of their initial values.
    warmup: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.learning_rates or any(not rate > 0 for rate in self.learning_rates):
            raise ArgumentError("learning_rates must hold positive numbers", learning_rates=self.learning_rates)
        if self.batch < 2:
            raise ArgumentError("batch must be at least 2: one sample has no variance", batch=self.batch)
        if not 0 <= self.warmup < self.steps:
            raise ArgumentError("warmup must lie between 0 and steps", warmup=self.warmup, steps=self.steps)
        if not self.hidden or min(*self.hidden, self.probes, self.probe_samples) < 1:
            raise ArgumentError("hidden, probes and probe_samples must be positive")
        if not 0 <= self.seed <= 2**62:
            raise ArgumentError("seed must lie between 0 and 2⁶²", seed=self.seed)

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """A few seconds, without the slow rate; too short for the network without BN, and the judge says so."""
        return cls(learning_rates=(1.0, 10.0), steps=400, probes=14, seed=seed)

    @property
    def schedule(self) -> tuple[int, ...]:
        """The steps after which the network is measured: quadratic, from 0 to `steps`."""
        return tuple(sorted({round(self.steps * (k / self.probes) ** 2) for k in range(self.probes + 1)}))

    def describe(self) -> tuple[tuple[str, str], ...]:
        """Name and value of every setting in words."""
        return (
            ("network", f"{' – '.join(str(width) for width in self.hidden)} sigmoid units, then softmax"),
            ("loss and optimizer", "cross-entropy, plain SGD: no momentum, no weight decay, constant rate"),
            ("learning rates", ", ".join(f"{rate:g}" for rate in self.learning_rates)),
            ("batch", f"{self.batch} samples, same order in every run"),
            ("steps", f"{self.steps:,} per run"),
            ("initial weights", "Gaussian, standard deviation 1/√(inputs), same in every run; biases 0"),
            (
                "Batch Normalization",
                "before each sigmoid, γ = 1, β = 0, ε = 1e-5, running statistics with momentum 0.1",
            ),
            ("percentiles", f"15, 50, 85 over the first {self.probe_samples} test samples at most"),
            ("typical unit", "the one whose median travels as far as the median unit's (maximum − minimum)"),
            ("seed", str(self.seed)),
            ("threads", "1, so that the numbers do not depend on the number of cores"),
        )


class Network(nn.Module):
    """A sigmoid network that shows what the units of its last hidden layer receive.

    Shapes: input (n, inputs); output (n, last hidden width) before the sigmoid, and (n, classes) logits.
    """

    def __init__(self, inputs: int, settings: Settings, classes: int, *, normalized: bool) -> None:
        super().__init__()
        weights = torch.Generator().manual_seed(settings.seed)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise((inputs, *settings.hidden)):
            # β does what the bias would do.
            layers += [nn.Sigmoid()] * bool(layers) + [_linear(a, b, weights, bias=not normalized)]
            layers += [ns.nn.BatchNorm1d(b)] * normalized
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Sigmoid(), _linear(settings.hidden[-1], classes, weights, bias=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last hidden units receive, and the logits."""
        received = self.trunk(x)
        return received, self.head(received)


def run(
    data: DataSet,
    settings: Settings,
    *,
    command: str = "",
    on_step: Callable[[int, int, str], None] | None = None,
) -> Figure1:
    """Train every network of the figure and judge the paper's claims.

    The caller's random state and number of threads stay as they are.

    Args:
        data: The samples; pixels are scaled to 0 … 1.
        settings: What to train.
        command: The command that repeats the experiment, for the record.
        on_step: Called at every measurement with the steps done, all steps, and the name of the present run.
    """
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    with threads(1):
        runs = _train_all(data, settings, on_step)
    return Figure1(
        title="Batch Normalization and the sigmoid network",
        data=data.card,
        settings=settings.describe(),
        differences=DIFFERENCES,
        runs=runs,
        shown_rate=shown_rate(runs),
        target=target_accuracy(runs),
        statements=judge(runs, settings.steps, 1 / data.classes),
        caveat=CAVEAT,
        command=command,
        seed=settings.seed,
        started=started.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - clock,
        machine=Machine.measure(),
    )


def _train_all(
    data: DataSet, settings: Settings, on_step: Callable[[int, int, str], None] | None
) -> tuple[TrainingRun, ...]:
    grid = [(rate, normalized) for rate in sorted(settings.learning_rates) for normalized in (False, True)]
    arrays = _tensors(data)
    runs = []
    for index, (rate, normalized) in enumerate(grid):
        name = f"{'with' if normalized else 'without'} BN, rate {rate:g}"

        def tell(step: int, index: int = index, name: str = name) -> None:
            if on_step:
                on_step(index * settings.steps + step, len(grid) * settings.steps, name)

        runs.append(_train(arrays, settings, data.classes, rate, normalized, tell))
    return tuple(runs)


@dataclass(frozen=True, slots=True)
class _Tensors:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def _tensors(data: DataSet) -> _Tensors:
    # Copies: torch warns about read-only arrays, because it could write into them.
    def pixels(x: object) -> Tensor:
        return torch.tensor(x).flatten(1).float() / data.top

    return _Tensors(
        pixels(data.train_x), torch.tensor(data.train_y).long(), pixels(data.test_x), torch.tensor(data.test_y).long()
    )


def _linear(inputs: int, outputs: int, weights: torch.Generator, *, bias: bool) -> nn.Linear:
    # Without storage first: torch's own initial values would be drawn from the caller's generator.
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.normal_(0, inputs**-0.5, generator=weights)
        if bias:
            layer.bias.zero_()
    return layer


def _batches(samples: int, size: int, seed: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed + 1)
    size = min(size, samples)
    while True:
        epoch = torch.randperm(samples, generator=order)
        # The incomplete rest is dropped: the paper's batches all have one size.
        yield from (epoch[start : start + size] for start in range(0, samples - size + 1, size))


def _train(
    data: _Tensors, settings: Settings, classes: int, rate: float, normalized: bool, tell: Callable[[int], None]
) -> TrainingRun:
    clock = time.perf_counter()
    network = Network(data.train_x.shape[1], settings, classes, normalized=normalized)
    parameters = list(network.parameters())
    batches = _batches(len(data.train_x), settings.batch, settings.seed)
    schedule, accuracy, percentiles = set(settings.schedule), {}, {}
    for step in range(settings.steps + 1):
        if step in schedule:
            accuracy[step], percentiles[step] = _measure(network, data, settings)
            tell(step)
        if step == settings.steps:
            break
        batch = next(batches)
        loss = nn.functional.cross_entropy(network(data.train_x[batch])[1], data.train_y[batch])
        # By hand: the first step of torch.optim imports the compiler, which takes longer than the quick demo trains.
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
    bands, drift = _typical({step: q for step, q in percentiles.items() if step >= settings.warmup})
    return TrainingRun(
        normalized=normalized,
        learning_rate=rate,
        accuracy=Curve(tuple(accuracy), tuple(accuracy.values())),
        final=accuracy_interval(accuracy[settings.steps], len(data.test_y)),
        bands=bands,
        drift=drift,
        seconds=time.perf_counter() - clock,
    )


@torch.no_grad()
def _measure(network: Network, data: _Tensors, settings: Settings) -> tuple[float, Tensor]:
    """Test accuracy, and the percentiles (3, units) of what the last hidden units receive, with running statistics."""
    network.eval()
    received, logits = network(data.test_x)
    network.train()
    right = (logits.argmax(1) == data.test_y).sum().item()
    levels = torch.tensor(PERCENTILES) / 100
    return right / len(data.test_y), received[: settings.probe_samples].quantile(levels, dim=0)


def _typical(percentiles: dict[int, Tensor]) -> tuple[Bands, tuple[float, ...]]:
    """The bands of the unit with the median drift, and the drift of every unit."""
    history = torch.stack(list(percentiles.values()))  # (probes, 3, units)
    drift: list[float] = (history[:, 1].amax(0) - history[:, 1].amin(0)).tolist()
    # A network that blew up has units whose drift is NaN; they count as the largest, since NaN cannot be sorted.
    ranked = sorted(range(len(drift)), key=lambda unit: (drift[unit] != drift[unit], drift[unit]))
    unit = ranked[(len(ranked) - 1) // 2]
    low, middle, high = (tuple(history[:, row, unit].tolist()) for row in range(3))
    return Bands(unit, PERCENTILES, tuple(percentiles), low, middle, high), tuple(drift)
