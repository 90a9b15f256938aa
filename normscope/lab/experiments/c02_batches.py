"""C02: both batches together, the optimizer's and that of the statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import available
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, Tuned, classify, columns
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect, slope

__all__ = ["EXPERIMENT", "BothBatches"]

SIZES: Mapping[ProfileName, tuple[int, ...]] = {"quick": (32, 8), "cpu": (32, 8, 2), "full": (32, 16, 8, 4, 2)}
IMAGES: Mapping[ProfileName, int] = {"quick": 480, "cpu": 6400, "full": 320_000}
NORMS = {"none": "without", "BN": "BatchNorm", "GN": "GroupNorm"}


class BothBatches(Tuned):
    """Batches of 32 to 2, the same images seen in all."""

    registration = register(
        "C02",
        statement="With a smaller batch Batch Normalization's error rises.",
        source="Wu & He 2018, Figure 1: 23.6 to 34.7 % from 32 to 2 images, GroupNorm unchanged",
        confirms="the slope of its test error against log₂(1/N) lies above 0",
        refutes="it lies below 0",
        thresholds={"slope": 0},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images; batches of N = 32 to 2, statistics over "
        "the whole of each; the same number of images seen at every N; SGD with momentum 0.9; rates times N/32, their "
        "base tuned with 2 seeds for every arm.",
        cuts=("N = 16 and 4", "320 000 images down to 6 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer at every batch."""
        name = available("cifar10") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "cnn", "norm": norm, "batch": size, "steps": IMAGES[profile] // size}
            for size in SIZES[profile]
            for norm in NORMS
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def tuning(self, arm: Arm) -> Arm:
        """Half of the images."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train, the rate in proportion to the batch."""
        size = task.whole("batch")
        scaled = dict(task.settings) | {"rate": task.number("rate") * size / 32}
        return classify(
            Task(task.experiment, tuple(scaled.items()), task.seeds),
            form="half", train_size=5_000, test_size=1_000, batch=size, momentum=0.9,
        )  # fmt: skip

    def _errors(self, results: Results, norm: str) -> list[list[float]]:
        """A row per size, a number per seed."""
        return [
            [1 - v for v in self.at_best(results, "test", norm=norm, batch=size)]
            for size in results.wholes("batch")[::-1]
        ]

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Its slope, and its slope less that of the others."""
        task = results.where(stage="test")[0].task
        images = task.whole("steps") * task.whole("batch")
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {images} images, tuned"
        sizes = results.wholes("batch")[::-1]
        places = [math.log2(1 / size) for size in sizes]
        errors = {norm: self._errors(results, norm) for norm in NORMS}
        slopes = {n: slope(places, columns(rows)) for n, rows in errors.items()}
        listed = "; ".join(
            f"{NORMS[n]} {told({f'at {size}': row for size, row in zip(sizes, rows, strict=True)})}"
            for n, rows in errors.items()
        )
        unit = "error per halving of N"
        return (
            by_effect(
                ("000-26", "002-11"),
                "does the error rise as the batch shrinks?",
                paired_effect(slopes["BN"]),
                f"Test error: {listed}",
                valid,
                unit=unit,
            ),
            by_effect(
                (),
                "more than with GroupNorm?",
                paired_effect(slopes["BN"], slopes["GN"]),
                "Slope with BatchNorm less that with GroupNorm",
                valid,
                unit=unit,
            ),
            by_effect(
                (),
                "or is it the optimizer's batch: does it rise without a normalizer?",
                paired_effect(slopes["none"]),
                "Slope without",
                valid,
                unit=unit,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Error against the batch."""
        sizes = results.wholes("batch")[::-1]
        series = [
            s
            for k, (norm, name) in enumerate(NORMS.items())
            for s in spread(name, sizes, columns(self._errors(results, norm)), k)
        ]
        plot = Plot("one batch for optimizer and statistics", "batch", "test error", tuple(series), x_log=True)
        return Picture("Test error against the batch, mean and range over seeds, every arm tuned.", (plot,))


EXPERIMENT = BothBatches()
