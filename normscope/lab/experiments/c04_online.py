"""C04: online learning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import available, samples
from normscope.lab.sketch import beside, spread
from normscope.lab.training import Arm, Tuned
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot, Series
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Stream"]

IMAGES: Mapping[ProfileName, int] = {"quick": 200, "cpu": 3000, "full": 50_000}
NORMS = {"none": "none", "BN": "BatchNorm", "GN": "GroupNorm", "Online": "Online Normalization"}
REGIMES = {"one": "one image at a time", "varying": "1 to 16", "fixed": "16"}
# Accuracies told along the stream.
PARTS = 10


class Stream(Tuned):
    """Every image is named before it is learned, once; half way the stream turns negative."""

    registration = register(
        "C04",
        statement="Batch Normalization is bad for online learning, where batches vary or hold one sample.",
        source="Ba, Kiros & Hinton 2016, §1; Chiley et al. 2019",
        confirms="with one image at a time, the accuracy of naming images before they are learned, of the best of "
        "none, GroupNorm and Online Normalization − Batch Normalization, lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0, "as good": 0.005},
        design="Four convolutions, MNIST averaged to 14 × 14, SGD with momentum 0.9, one pass over 3 000 images in the "
        "order of the seed; the second half is inverted (1 − x). Batches of one; of 1 to 16, drawn; of 16. Each is "
        "named in evaluation mode, then learned in training mode. Rates times the square root of the batch, their "
        "base tuned with 2 other streams for every arm; the rival is the best of the three on those.",
        cuts=("50 000 images down to 3 000", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer in every regime."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": "cnn", "regime": regime, "norm": norm, "images": IMAGES[profile]}
            for regime in REGIMES
            for norm in NORMS
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Name and learn."""
        data = samples(task.text("data"), "half", 50_000, 100)
        count = min(task.whole("images"), len(data.train_y))
        g = torch.Generator().manual_seed(40_000 + task.seeds[0])
        order = torch.randperm(len(data.train_y), generator=g)[:count]
        x, y = data.train_x[order], data.train_y[order]
        x = torch.where(torch.arange(count).reshape(-1, 1, 1, 1) < count // 2, x, 1 - x)
        network = Convolutional(data.shape[0], data.classes, task.seeds[0], norm=task.text("norm"))
        right = _named(network, x, y, _sizes(task.text("regime"), count, g), task.number("rate"))
        along = [float(part.float().mean()) for part in right.chunk(PARTS)]
        return {"test": [float(right.float().mean())], "valid": [float(right.float().mean())], "along": along}

    def _rows(self, results: Results, regime: str) -> dict[str, tuple[float, ...]]:
        return {norm: self.at_best(results, "test", regime=regime, norm=norm) for norm in NORMS}

    def _rival(self, results: Results, regime: str) -> str:
        """The best of the others on the tuning streams."""

        def score(norm: str) -> float:
            rate = self.best_rate(results, regime=regime, norm=norm)
            runs = results.where(stage="tune", regime=regime, norm=norm, rate=rate)
            return statistics.mean(m.row("valid")[0] for m in runs)

        return max((norm for norm in NORMS if norm != "BN"), key=score)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """One at a time, varying against fixed, Online Normalization."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, four convolutions, a stream of {task['images']} images, tuned"
        rows = {regime: self._rows(results, regime) for regime in REGIMES}
        rivals = {regime: self._rival(results, regime) for regime in REGIMES}
        loss = {
            regime: [a - b for a, b in zip(rows[regime][rivals[regime]], rows[regime]["BN"], strict=True)]
            for regime in REGIMES
        }
        listed = "; ".join(f"{name}: {told(rows[regime])}" for regime, name in REGIMES.items())
        return (
            by_effect(
                ("002-18",),
                "does it lose, one image at a time?",
                paired_effect(loss["one"]),
                f"Named before learned, {listed}; the rival is {NORMS[rivals['one']]}",
                valid,
                unit="of accuracy, best other − BatchNorm",
            ),
            by_effect(
                ("002-18",),
                "does it lose more with varying batches than with fixed ones?",
                paired_effect(loss["varying"], loss["fixed"]),
                "Loss with batches of 1 to 16 less that with batches of 16",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                (),
                "is Online Normalization as good as Batch Normalization in batches of 16, or better?",
                paired_effect([v + self.threshold("as good") for v in rows["fixed"]["Online"]], rows["fixed"]["BN"]),
                f"Named before learned, {told(rows['fixed'])}",
                valid,
                unit="of accuracy, Online + half a point − BatchNorm",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy along the stream, and in all."""
        series: list[Series] = []
        for k, norm in enumerate(NORMS):
            rate = self.best_rate(results, regime="one", norm=norm)
            runs = results.where(stage="test", regime="one", norm=norm, rate=rate)
            series += spread(NORMS[norm], [(i + 0.5) / PARTS for i in range(PARTS)], [m.row("along") for m in runs], k)
        groups = {name: self._rows(results, regime) for regime, name in REGIMES.items()}
        return Picture(
            "Share of images named rightly before they are learned; the stream turns negative half way.",
            (
                Plot("one image at a time", "share of the stream", "accuracy", tuple(series)),
                beside("whole stream", "accuracy", groups),
            ),
        )


def _sizes(regime: str, count: int, g: torch.Generator) -> list[int]:
    if regime == "one":
        return [1] * count
    if regime == "fixed":
        return [16] * (count // 16)
    sizes: list[int] = torch.randint(1, 17, (count,), generator=g).tolist()
    total = 0
    return [size for size in sizes if (total := total + size) <= count]


def _named(network: Convolutional, x: Tensor, y: Tensor, sizes: list[int], base: float) -> Tensor:
    """Whether each image was named rightly before it was learned."""
    optimizer = torch.optim.SGD(network.parameters(), base, momentum=0.9)
    right, start = [], 0
    for size in sizes:
        images, labels = x[start : start + size], y[start : start + size]
        start += size
        with torch.no_grad():
            right.append(network.eval()(images).argmax(1) == labels)
        optimizer.param_groups[0]["lr"] = base * size**0.5
        optimizer.zero_grad()
        F.cross_entropy(network.train()(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return torch.cat(right)


EXPERIMENT = Stream()
