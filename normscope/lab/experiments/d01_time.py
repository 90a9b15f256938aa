"""D01: time per step, time to accuracy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import available, samples
from normscope.lab.sketch import line, spread
from normscope.lab.training import Arm, columns, first_reaching, mean_of, train
from normscope.lab.verdicts import by_effect, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import MINIMUM_SEEDS, median_ratio, paired_effect, slope

__all__ = ["EXPERIMENT", "Cost"]

BATCHES: Mapping[ProfileName, tuple[int, ...]] = {
    "quick": (8, 64),
    "cpu": (8, 32, 128, 256),
    "full": (8, 16, 32, 64, 128, 256),
}
PAIRS: Mapping[ProfileName, int] = {"quick": 2, "cpu": 15, "full": 50}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 4000}
RATE = 0.1
NORMS = ("none", "BN")


class Cost(Experiment):
    """Steps with and without in turn, and the steps that an accuracy takes."""

    registration = register(
        "D01",
        statement="Batch Normalization needs fewer steps, but each is slower, the more so the larger the batch.",
        source="tutorials; Gitman & Ginsburg 2017: a quarter of ResNet-50's time on a Titan X Pascal",
        confirms="the ratio of the times of a training step, with over without, lies above 1",
        refutes="it lies at or below 1",
        thresholds={"ratio": 1, "quarter from": 0.15, "quarter to": 0.35, "target below": 0.01},
        design="Four convolutions, MNIST averaged to 14 × 14; training steps of both networks in turn, 15 pairs at "
        "each batch of 8 to 256, the median ratio per seed, the mean over batches; its growth is the slope against "
        "log₂ of the batch. Then both trained at rate 0.1 with momentum 0.9, batch 64, 5 000 images: time to the "
        "accuracy at which the one without ends, less a point, is the ratio of the steps times that of their times.",
        cuts=("batches of 16 and 64", "50 pairs down to 15", "4000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Clocks at every batch, then curves."""
        name = available("mnist") if profile != "quick" else "digits"
        clocks: list[Arm] = [{"data": name, "batch": size, "pairs": PAIRS[profile]} for size in BATCHES[profile]]
        curves: list[Arm] = [{"data": name, "norm": norm, "steps": STEPS[profile]} for norm in NORMS]
        return [Task(self.name, tuple(one.items()), (seed,)) for seed in seeds for one in clocks + curves]

    def measure(self, task: Task) -> Numbers:
        """Time or train."""
        data = samples(task.text("data"), "half", 5_000, 2_000)
        seed = task.seeds[0]

        def network(norm: str) -> Convolutional:
            return Convolutional(data.shape[0], data.classes, seed, norm=norm)

        if "norm" in dict(task.settings):
            norm, steps = task.text("norm"), task.whole("steps")
            return train(network(norm), data, task.seeds, steps=steps, batch=64, rate=RATE, momentum=0.9)
        size = task.whole("batch")
        rows = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))[:size]
        x, y = data.train_x[rows], data.train_y[rows]
        pair = [network(norm).train() for norm in NORMS]
        found = [[_seconds(one, x, y) for one in pair] for _ in range(task.whole("pairs") + 2)][2:]
        return {f"time {norm}": [row[k] for row in found] for k, norm in enumerate(NORMS)}

    def _ratios(self, results: Results) -> dict[int, list[float]]:
        """Batch → per seed, the median over pairs of the ratio with over without."""
        sizes = results.wholes("batch")
        return {
            size: [
                statistics.median(b / a for a, b in zip(m.row("time none"), m.row("time BN"), strict=True))
                for m in sorted(results.where(batch=size), key=lambda m: m.task.seeds)
            ]
            for size in sizes
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """A step's time, its growth with the batch, its share, and the time to an accuracy."""
        task = next(m.task for m in results if "norm" in dict(m.task.settings))
        valid = f"four convolutions on images of 14 × 14 or less, this machine's CPU; {task['steps']} steps of 64"
        ratios = self._ratios(results)
        logs = [[math.log(v) for v in row] for row in ratios.values()]
        mean = mean_of(logs)
        slower = paired_effect(mean)
        grows = paired_effect(slope([math.log2(n) for n in ratios], columns(logs)))
        listed = ", ".join(f"{statistics.median(row):.2f} at {size}" for size, row in ratios.items())
        share = 1 - math.exp(-slower.value)
        low, high = self.threshold("quarter from"), self.threshold("quarter to")
        quarter = (
            f"between {low:.0%} and {high:.0%}" if low <= share <= high else f"not between {low:.0%} and {high:.0%}"
        )
        return (
            by_effect(
                ("002-13",),
                "is a step slower?",
                slower,
                f"A step takes so many times as long with it: {listed}",
                valid,
                unit="ln of the times' ratio",
            ),
            by_effect(
                ("002-13",),
                "the more so the larger the batch?",
                grows,
                f"Ratio by batch: {listed}",
                valid,
                unit="ln of the ratio per doubling of the batch",
            ),
            ruled(
                ("002-14",),
                "is it a quarter of the training time?",
                "CONDITIONAL" if slower.n >= MINIMUM_SEEDS else "UNDECIDED",
                f"Its share of a step is {share:.0%} here, {quarter}; the number is of a Titan X Pascal.",
                f"the published number is on record only; {valid}",
                effect=Interval(share, 1 - math.exp(-slower.low), 1 - math.exp(-slower.high), "of a step"),
                seeds=slower.n,
            ),
            *self._whole(results, math.exp(slower.value), valid),
        )

    def _whole(self, results: Results, step: float, valid: str) -> list[Judgement]:
        """Time to an accuracy: the ratio of steps over that of a step's time."""
        target = statistics.median(results.per_seed("test", norm="none")) - self.threshold("target below")
        reached = {norm: _reached(results, norm, target) for norm in NORMS}
        steps = median_ratio(reached["none"], reached["BN"])
        ratio = [v / step for v in steps]
        seeds = len(reached["none"][0])
        verdict: LabVerdict = "UNDECIDED"
        if seeds >= MINIMUM_SEEDS:
            verdict = "CONFIRMED" if ratio[1] > 1 else "REFUTED" if ratio[2] <= 1 else "UNDECIDED"
        outcome = (
            f"To {target:.1%}: {steps[0]:.2f} times fewer steps ({steps[1]:.2f} to {steps[2]:.2f}), each {step:.2f} "
            f"times as long; in time {ratio[0]:.2f} times faster."
        )
        opposite: dict[LabVerdict, LabVerdict] = {"CONFIRMED": "REFUTED", "REFUTED": "CONFIRMED"}
        fourteen: LabVerdict = "CONDITIONAL" if verdict == "CONFIRMED" else verdict
        effect = Interval(ratio[0], ratio[1], ratio[2], "times less time")
        return [
            ruled((claim,), question, found, outcome, f"{note}{valid}", effect=effect, seeds=seeds, tests=1)
            for claim, question, found, note in (
                ("000-4", "is it faster by the clock?", verdict, ""),
                ("000-8", "is training too slow with it?", opposite.get(verdict, "UNDECIDED"), ""),
                ("001-6", "14 times less time?", fourteen, "faster by the clock, the number 14 is on record only; "),
            )
        ]

    def figure(self, results: Results) -> Picture:
        """Ratio against the batch, accuracy against steps."""
        ratios = self._ratios(results)
        left = spread("", list(ratios), columns(ratios.values()))
        right = [
            line({"none": "without", "BN": "with BN"}[norm] if i == 0 else "", m.row("steps"), m.row("curve"), k)
            for k, norm in enumerate(NORMS)
            for i, m in enumerate(results.where(norm=norm))
        ]
        levels = (("as long", 1.0),)
        return Picture(
            "Time of a training step with over without, medians of pairs, mean and range over seeds; accuracy.",
            (
                Plot("a step", "batch", "ratio of the times", left, x_log=True, levels=levels),
                Plot("steps", "step", "test accuracy", tuple(right)),
            ),
        )


def _seconds(network: Convolutional, x: torch.Tensor, y: torch.Tensor) -> float:
    """Of one forward and backward pass."""
    clock = time.perf_counter()
    F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - clock


def _reached(results: Results, norm: str, target: float) -> tuple[list[float], list[bool]]:
    runs = sorted(results.where(norm=norm), key=lambda m: m.task.seeds)
    pairs = [first_reaching(m.row("steps"), m.row("curve"), target) for m in runs]
    return [step for step, _ in pairs], [arrived for _, arrived in pairs]


EXPERIMENT = Cost()
