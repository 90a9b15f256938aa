"""Training, measuring and tuning, the same for every arm."""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.lab.experiment import Experiment, ProfileName, Results, Scalar, Task
from normscope.lab.networks import Convolutional, Network, Perceptrons
from normscope.lab.samples import Form, Samples, batches, samples

__all__ = [
    "Arm",
    "Order",
    "Tuned",
    "accuracies",
    "build",
    "classify",
    "columns",
    "descend",
    "first_reaching",
    "mean_of",
    "schedule",
    "train",
]

Arm = Mapping[str, Scalar]
# The batches of one seed: (count, size, seed) to indices.
Order = Callable[[int, int, int], Iterator[Tensor]]

# Chosen by validation with these, reported with others.
TUNING_SEEDS = (100, 101)
CHUNK = 2000


def schedule(steps: int, probes: int) -> tuple[int, ...]:
    """The steps after which to measure: quadratic, denser at the beginning, from the first to the last."""
    return tuple(sorted({max(1, round(steps * (k / probes) ** 2)) for k in range(1, probes + 1)}))


def descend(
    parameters: Sequence[nn.Parameter], losses: Iterator[Tensor], steps: int, rate: float, *, momentum: float = 0.0,
    clip: float = math.inf, adam: bool = False, on_step: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Gradient descent; `on_step` is called after every step with its number, from 1.

    Args:
        parameters: What to train.
        losses: A loss per step; parameters that share no loss do not meet.
        steps: How many.
        rate: Of learning, constant.
        momentum: Of SGD.
        clip: The largest norm of the whole gradient.
        adam: Adam in place of SGD.
        on_step: To measure, or to change the network's mode.
    """
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(parameters, rate) if adam else torch.optim.SGD(parameters, rate, momentum=momentum)
    )
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        next(losses).backward()  # type: ignore[no-untyped-call]
        if clip < math.inf:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if on_step:
            on_step(step)


def _losses(network: Network, data: Samples, seeds: Sequence[int], size: int, order: Order) -> Iterator[Tensor]:
    """The sum over seeds of each network's mean loss on its own batch."""
    orders = [order(len(data.train_y), size, seed) for seed in seeds]
    while True:
        rows = torch.stack([next(order) for order in orders])
        if isinstance(network, Perceptrons):
            scores = network(data.train_x[rows]).flatten(0, 1)
        else:
            scores = network(data.train_x[rows[0]])
        yield F.cross_entropy(scores, data.train_y[rows].flatten()) * len(seeds)


def train(
    network: Network, data: Samples, seeds: Sequence[int], *, steps: int, batch: int, rate: float,
    momentum: float = 0.0, probes: int = 20, on_probe: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None, order: Order = batches,
) -> dict[str, list[float]]:  # fmt: skip
    """Train and measure; `on_step` is called after every step, `on_probe` after those at which was measured.

    Returns:
        "steps" at which was measured; "curve", the test accuracy of each seed at each of them, seeds outermost; and per
        seed "test", "valid" (accuracies at the end) and "loss" (of the last batch). A network that diverged has the
        accuracy that its scores give, about that of guessing.
    """
    marks = schedule(steps, probes)
    curve: list[list[float]] = []

    def after(step: int) -> None:
        if on_step:
            on_step(step)
        if step in marks:
            curve.append(accuracies(network, data.test_x, data.test_y, len(seeds)))
            if on_probe:
                on_probe(step)
            network.train()

    network.train()
    source = _losses(network, data, seeds, batch, order)
    descend(list(network.parameters()), source, steps, rate, momentum=momentum, on_step=after)
    return {
        "steps": [float(mark) for mark in marks],
        "curve": [row[k] for k in range(len(seeds)) for row in curve],
        "test": curve[-1],
        "valid": accuracies(network, data.valid_x, data.valid_y, len(seeds)),
        "train": accuracies(network, data.train_x[:CHUNK], data.train_y[:CHUNK], len(seeds)),
    }


def classify(
    task: Task, *, form: Form, train_size: int, test_size: int, batch: int, momentum: float,
    change: Callable[[Network], None] | None = None, order: Order = batches,
) -> dict[str, list[float]]:  # fmt: skip
    """Train the network that a task describes: net is "mlp3", "mlp8", "cnn" or "resnet".

    Args:
        task: See `build`.
        form: See `samples`, as are the sizes.
        train_size: Of the training set at most.
        test_size: Of the test set at most.
        batch: Of the optimizer.
        momentum: Of SGD.
        change: Called with the network before it is trained.
        order: Of the training images.
    """
    data = samples(task.text("data"), form, train_size, test_size)
    network = build(task, data)
    if change:
        change(network)
    if isinstance(network, Perceptrons) and form == "half":
        data = data.flat
    clock = time.perf_counter()
    found = train(
        network, data, task.seeds, steps=task.whole("steps"), batch=batch, rate=task.number("rate"), momentum=momentum,
        order=order,
    )  # fmt: skip
    return found | {"time": [time.perf_counter() - clock]}


def build(task: Task, data: Samples) -> Network:
    """The network of a task, with its norm, activation and place ("before" where it says nothing).

    Of the norm the first word counts; what follows is the experiment's own.
    """
    settings = dict(task.settings)
    net, norm = str(settings["net"]), str(settings["norm"]).split()[0]
    activation, place = str(settings.get("activation", "relu")), str(settings.get("place", "before"))
    if net.startswith("mlp"):
        widths = (data.shape.numel(), *[100] * int(net[3:]), data.classes)
        return Perceptrons(widths, task.seeds, norm=norm, activation=activation, place=place)
    return Convolutional(
        data.shape[0],
        data.classes,
        task.seeds[0],
        norm=norm,
        activation=activation,
        place=place,
        residual=net == "resnet",
    )


@torch.no_grad()
def accuracies(network: Network, x: Tensor, y: Tensor, seeds: int) -> list[float]:
    """The accuracy of every seed's network in evaluation."""
    network.eval()
    right = torch.zeros(seeds)
    for k in range(0, len(y), CHUNK):
        part = x[k : k + CHUNK]
        scores = network(part.expand(seeds, *part.shape)) if isinstance(network, Perceptrons) else network(part)[None]
        right += (scores.argmax(-1) == y[k : k + CHUNK]).sum(1)
    found: list[float] = (right / len(y)).tolist()
    return found


def columns(rows: Iterable[Sequence[float]]) -> list[list[float]]:
    """A row per arm as a row per seed, or the other way round."""
    return [list(column) for column in zip(*rows, strict=True)]


def mean_of(rows: Iterable[Sequence[float]]) -> list[float]:
    """The mean of several arms, seed by seed."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def first_reaching(steps: Sequence[float], values: Sequence[float], target: float) -> tuple[float, bool]:
    """The first step at which a value is at least the target; the last one, and False, where there is none."""
    for step, value in zip(steps, values, strict=True):
        if value >= target:
            return step, True
    return steps[-1], False


class Tuned(Experiment):
    """An experiment whose arms each get their own learning rate, chosen on validation data with tuning seeds.

    Attributes:
        rates: The grid, the same for every arm.
        together: How many seeds one run trains at once.
    """

    rates: Mapping[ProfileName, tuple[float, ...]]
    together: int = 1

    @abstractmethod
    def arms(self, profile: ProfileName) -> list[Arm]:
        """Everything about a run but its stage, rate and seeds."""

    def baseline(self, arm: Arm) -> Arm:
        """The arm whose best rate is the shared one: the same without normalizer."""
        return dict(arm) | {"norm": "none"}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Tune every arm; then train each at its own best rate and at the shared one."""
        arms = self.arms(profile)
        tuning = {_key(arm): self._tuning(arm, profile) for arm in arms}
        planned = [task for tasks in tuning.values() for task in tasks]
        if any(task not in results for task in planned):
            return planned
        best = {key: _best(tasks, results) for key, tasks in tuning.items()}
        for arm in arms:
            own, shared = best[_key(arm)], best.get(_key(self.baseline(arm)), best[_key(arm)])
            for rate in dict.fromkeys((own, shared)):
                planned += self._runs(arm, rate, seeds)
        return planned

    def tuning(self, arm: Arm) -> Arm:
        """What differs while tuning, e.g. fewer steps."""
        return arm

    def _tuning(self, arm: Arm, profile: ProfileName) -> list[Task]:
        count = 1 if profile == "quick" else len(TUNING_SEEDS)
        seeds = TUNING_SEEDS[:count]
        settings = self.tuning(arm)
        groups = self._groups(arm, seeds)
        return [self._task(settings, "tune", rate, group) for rate in self.rates[profile] for group in groups]

    def _runs(self, arm: Arm, rate: float, seeds: Sequence[int]) -> list[Task]:
        return [self._task(arm, "test", rate, group) for group in self._groups(arm, seeds)]

    def _groups(self, arm: Arm, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Perceptrons are trained several at once, other networks one by one."""
        size = self.together if str(arm.get("net", "mlp")).startswith("mlp") else 1
        return [tuple(seeds[k : k + size]) for k in range(0, len(seeds), size)]

    def _task(self, arm: Arm, stage: str, rate: float, seeds: tuple[int, ...]) -> Task:
        settings = {**arm, "stage": stage, "rate": rate}
        return Task(self.name, tuple(settings.items()), seeds, cost=float(arm.get("steps", 1)) * len(seeds))

    def best_rate(self, results: Results, **arm: Scalar) -> float:
        """The rate that was chosen for an arm."""
        return _best([m.task for m in results.where(stage="tune", **arm)], results)

    def at_best(self, results: Results, name: str, **arm: Scalar) -> tuple[float, ...]:
        """A number per seed of an arm at its own best rate."""
        return results.per_seed(name, stage="test", rate=self.best_rate(results, **arm), **arm)

    def along(self, results: Results, **arm: Scalar) -> tuple[float, ...]:
        """The mean test accuracy while an arm trains at its own best rate, a number per seed: its speed.

        The marks of the schedule lie closer at the beginning, where arms differ.
        """
        _, rows = self.curves(results, rate=self.best_rate(results, **arm), **arm)
        return tuple(statistics.mean(row) for row in rows)

    def shared(self, results: Results, name: str, **arm: Scalar) -> str:
        """The mean of an arm and of its baseline at the baseline's best rate, in words."""
        base = self.baseline(arm)
        if not results.where(stage="tune", **base):
            return "the baseline was not run"
        rate = self.best_rate(results, **base)
        ours, theirs = (statistics.mean(results.per_seed(name, stage="test", rate=rate, **one)) for one in (arm, base))
        return f"{ours:.3f} against {theirs:.3f} at the baseline's best rate, {rate:.3g}"

    def curves(self, results: Results, **settings: Scalar) -> tuple[list[float], list[list[float]]]:
        """Steps, and the test accuracy of every seed at them."""
        found = results.where(stage="test", **settings)
        steps = list(found[0].row("steps"))
        rows = [
            (seed, list(m.row("curve")[k * len(steps) : (k + 1) * len(steps)]))
            for m in found
            for k, seed in enumerate(m.task.seeds)
        ]
        return steps, [row for _, row in sorted(rows)]


def _key(arm: Arm) -> tuple[tuple[str, Scalar], ...]:
    return tuple(sorted(arm.items()))


def _best(tasks: Sequence[Task], results: Results) -> float:
    """The rate of the highest mean validation score; the smaller of two equals."""
    scores: dict[float, list[float]] = {}
    for task in tasks:
        values = results[task].row("valid")
        scores.setdefault(task.number("rate"), []).extend(v if math.isfinite(v) else -math.inf for v in values)
    return max(sorted(scores), key=lambda rate: sum(scores[rate]) / len(scores[rate]))
