"""C05: statistics of training and of inference, and serving one request at a time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import Samples, available, samples
from normscope.lab.sketch import line, points
from normscope.lab.training import accuracies, train
from normscope.lab.verdicts import by_effect, by_equivalence, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Serving"]

SIZES: Mapping[ProfileName, tuple[int, ...]] = {"quick": (4, 64), "cpu": (4, 32, 256), "full": (2, 4, 32, 256)}
STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 400, "full": 4000}
REQUESTS = (1, 2, 4, 16, 64, 256)
RATE = 0.1


class Serving(Experiment):
    """Networks trained with statistics over few and many samples, served with stored ones and with the request's."""

    registration = register(
        "C05",
        statement="Batch Normalization uses other statistics at inference than in training, and served one at a "
        "time it does worse.",
        source="tutorials; Wu & Johnson 2021, Singh & Shrivastava 2019",
        confirms="trained with a large statistics batch, accuracy with stored statistics is more than 1 point "
        "below that in training mode",
        refutes="the two are equal to half a point",
        thresholds={"worse": 0.01, "equal": 0.005, "noticeable": 0.05},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9 and rate "
        "0.1, batch 256, statistics over parts of 4, 32, 256. The "
        "same test images in training mode with batches like the training's, with stored statistics, with "
        "recalibrated ones, and with the statistics of requests "
        "of 1 to 256.",
        cuts=("statistics over 2", "4000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """A network per statistics batch and seed."""
        name = available("cifar10") if profile != "quick" else "digits"
        return [
            Task(self.name, (("data", name), ("size", size), ("steps", STEPS[profile])), (seed,))
            for seed in seeds
            for size in SIZES[profile]
        ]

    def measure(self, task: Task) -> Numbers:
        """Train once, serve in every way."""
        data = samples(task.text("data"), "half", 5_000, 1_024)
        size = task.whole("size")
        network = Convolutional(data.shape[0], data.classes, task.seeds[0], norm=f"ghost{size}")
        train(network, data, task.seeds, steps=task.whole("steps"), batch=256, rate=RATE, momentum=0.9, probes=1)
        found = {
            "training": [_batchwise(network, data, size)],
            "stored": accuracies(network, data.test_x, data.test_y, 1),
            "requests": [_batchwise(network, data, n) for n in REQUESTS],
            "moments": _moment_error(network, data),
        }
        ns.recalibrate(
            network, [data.train_x[k : k + 256] for k in range(0, 2048, 256) if k + 256 <= len(data.train_x)]
        )
        return found | {"recalibrated": accuracies(network, data.test_x, data.test_y, 1)}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Stored against batch statistics, large and small; requests of one; cures."""
        sizes = sorted({m.task.whole("size") for m in results})
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps"

        def gap(size: int, name: str = "stored") -> tuple[tuple[float, ...], tuple[float, ...]]:
            return results.per_seed("training", size=size), results.per_seed(name, size=size)

        large, small = paired_effect(*gap(sizes[-1])), paired_effect(*gap(sizes[0]))
        text = (
            f"Trained with statistics over {sizes[-1]}: {statistics.mean(gap(sizes[-1])[0]):.1%} in training mode, "
            f"{statistics.mean(gap(sizes[-1])[1]):.1%} with stored statistics, whatever the request's size"
        )
        tiny = f"over {sizes[0]}: {statistics.mean(gap(sizes[0])[0]):.1%} and {statistics.mean(gap(sizes[0])[1]):.1%}"
        one = [results.where(size=sizes[-1])[k].row("requests")[0] for k in range(large.n)]
        mended = paired_effect(
            results.per_seed("recalibrated", size=sizes[0]), results.per_seed("stored", size=sizes[0])
        )
        harmless = by_equivalence((), "", large, text, valid, unit="", margin=self.threshold("equal")).verdict
        worse: LabVerdict = by_effect((), "", large, text, valid, unit="", least=self.threshold("worse")).verdict
        if harmless == "CONFIRMED":
            worse = "REFUTED"
        collapse = paired_effect(results.per_seed("stored", size=sizes[-1]), one)
        differ = paired_effect(results.per_seed("moments", size=sizes[0]))
        return (
            ruled(
                ("002-16",),
                "is it worse served one at a time?",
                worse,
                f"{text}; {tiny}. With the statistics of a request of one: {statistics.mean(one):.1%} "
                f"({100 * collapse.value:.1f} points below stored ones).",
                f"with stored statistics; {valid}",
                effect=Interval(large.value, large.low, large.high, "of accuracy, training mode − stored"),
                seeds=large.n,
                tests=2,
            ),
            by_equivalence(
                ("000-29",),
                "is the inconsistency harmless, trained with a large batch?",
                large,
                text,
                valid,
                unit="of accuracy, training mode − stored",
                margin=self.threshold("equal"),
            ),
            by_effect(
                ("004-9",),
                "does it cost, trained with a small batch?",
                small,
                f"Training mode − stored statistics, {tiny}",
                valid,
                unit="of accuracy, training mode − stored",
            ),
            by_effect(
                ("002-17",),
                "do statistics of the training set mend it?",
                mended,
                f"Recalibrated − stored, trained with statistics over {sizes[0]}: "
                f"{statistics.mean(results.per_seed('recalibrated', size=sizes[0])):.1%} against "
                f"{statistics.mean(gap(sizes[0])[1]):.1%}",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                ("004-21", "000-11"),
                "do the statistics differ?",
                differ,
                f"Median over channels of |ln(stored variance / test variance)|, trained with statistics over "
                f"{sizes[0]}: {differ.value:.2f}; over {sizes[-1]}: "
                f"{statistics.mean(results.per_seed('moments', size=sizes[-1])):.2f}",
                valid,
                unit="|ln variance ratio|",
                least=self.threshold("noticeable"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against the request's size; ways of serving."""
        sizes = sorted({m.task.whole("size") for m in results})
        curves, ways = [], []
        for k, size in enumerate(sizes):
            rows = [m.row("requests") for m in results.where(size=size)]
            curves.append(
                line(f"trained over {size}", REQUESTS, [statistics.mean(c) for c in zip(*rows, strict=True)], k)
            )
        for k, name in enumerate(("training", "stored", "recalibrated")):
            found = [results.per_seed(name, size=size) for size in sizes]
            within = [Interval(statistics.mean(r), min(r), max(r)) for r in found]
            label = {"training": "training mode", "stored": "stored statistics", "recalibrated": "recalibrated"}[name]
            ways.append(
                points(
                    label, [i + 0.15 * (k - 1) for i in range(len(sizes))], [i.value for i in within], k, within=within
                )
            )
        return Picture(
            "Test accuracy when a request is normalized by its own statistics, against its size, mean over seeds; and "
            "by how it is normalized, mean and range over seeds.",
            (
                Plot(
                    "by the request's own statistics", "images in a request", "test accuracy", tuple(curves), x_log=True
                ),
                Plot(
                    "ways of serving",
                    "trained with statistics over",
                    "test accuracy",
                    tuple(ways),
                    ticks=tuple(map(str, sizes)),
                ),
            ),
        )


@torch.no_grad()
def _batchwise(network: Convolutional, data: Samples, size: int) -> float:
    """Accuracy with the statistics of batches of a size; the running ones stay."""
    plain = _plain(network)
    parts = [part for part in torch.split(data.test_x, size) if len(part) == size]
    scores = torch.cat([plain(part) for part in parts])
    return float((scores.argmax(1) == data.test_y[: len(scores)]).float().mean())


def _plain(network: Convolutional) -> Convolutional:
    """The same weights with statistics over the whole batch, in training mode, tracking nothing that matters."""
    twin = Convolutional(network.blocks[0][0].in_channels, network.head.out_features, 0, norm="BN")  # type: ignore[index]
    twin.load_state_dict(network.state_dict())
    return twin.train()


@torch.no_grad()
def _moment_error(network: Convolutional, data: Samples) -> list[float]:
    """Of the second block: how far its running variances are from those of the test set."""
    network.eval()
    x: Tensor = network.blocks[0](data.test_x)
    conv, norm = network.blocks[1][0], network.blocks[1][1]  # type: ignore[index]
    seen = ns.moments(conv(x), "[n] c [h w]").var
    return [float((norm.running_var / seen).log().abs().median())]


EXPERIMENT = Serving()
