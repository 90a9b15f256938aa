"""C01: the batch of the statistics, at a fixed batch of the optimizer."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import Samples, available, batches, samples
from normscope.lab.sketch import dashes, line, points
from normscope.lab.training import Arm, Tuned, accuracies, build, descend, train
from normscope.lab.verdicts import by_effect, by_rivals, interval, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import paired_effect, slope

__all__ = ["EXPERIMENT", "StatisticsBatch"]

BATCH = 32
SIZES: Mapping[ProfileName, tuple[int, ...]] = {
    "quick": (32, 2),
    "cpu": (32, 16, 8, 4, 2, 1),
    "full": (32, 16, 8, 4, 2, 1),
}
OTHERS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("GN", "Online"),
    "cpu": ("none", "GN", "LN", "Online", "BRN2"),
    "full": ("none", "GN", "LN", "Online", "BRN2", "IN", "BRN4", "BRN1"),
}
NAMES = {
    "none": "none", "GN": "GroupNorm", "LN": "LayerNorm", "IN": "InstanceNorm", "Online": "Online Normalization",
    "BRN1": "Batch Renormalization over 1", "BRN2": "Batch Renormalization over 2",
    "BRN4": "Batch Renormalization over 4",
}  # fmt: skip
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 500, "full": 10_000}
# Batches from which EvalNorm learns its two weights, at a rate by which they could cross [0, 1].
CORRECTING = 200
# Wu & He 2018, figure 1: ResNet-50 on ImageNet, images per GPU 32 to 2.
PUBLISHED = ((32, 16, 8, 4, 2), (0.236, 0.237, 0.248, 0.273, 0.347))


# What a network is evaluated with.
WAYS = (("test", "running statistics"), ("precise", "recalibrated"), ("corrected", "EvalNorm"))


class StatisticsBatch(Tuned):
    """Ghost batches of 32 to 1 within a batch of 32."""

    registration = register(
        "C01",
        statement="With a small batch Batch Normalization clearly loses, and at a batch of 1 it is impossible.",
        source="Wu & He 2018, Figure 1; Ioffe 2017",
        confirms="the error's slope against log₂(1/B) is above 0, and so is error(2) − error(32)",
        refutes="the slope is at or below 0",
        thresholds={"slope": 0, "difference": 0, "trains": 0.2, "as good": 0.01},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9, batch 32; "
        "statistics over parts of 32, 16, 8, 4, 2, 1. Beside them, at the same batch of the optimizer: none, "
        "GroupNorm, LayerNorm, InstanceNorm, Online Normalization, Batch Renormalization over parts of 4, 2, 1 "
        "(bounds opened within the first 4 000 parts). Four evaluations of a network: running statistics; the "
        "population's, recalibrated on 2 048 training images; those of EvalNorm, whose weights learn from 200 "
        "training batches of the same size while all else is held; a test batch's own. GroupNorm is among the best "
        "for a small batch if none of the others that need no large batch is surely better, and none possibly by "
        "more than a point. Rates tuned with 2 seeds for every arm.",
        cuts=(
            "Batch Renormalization over 4 and over 1",
            "InstanceNorm (statistics over 1, evaluated with each image's own, are the same)",
            "10 000 steps down to 500",
            "10 seeds down to 6",
        ),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every ghost size, and norms without a batch."""
        name = available("cifar10") if profile != "quick" else "digits"
        norms = [*(f"ghost{size}" for size in SIZES[profile]), *OTHERS[profile]]
        return [{"data": name, "net": "cnn", "norm": norm, "steps": STEPS[profile]} for norm in norms]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train, and evaluate in four ways."""
        data = samples(task.text("data"), "half", 5_000, 1_000)
        network = build(task, data)
        found = train(
            network, data, task.seeds, steps=task.whole("steps"), batch=BATCH, rate=task.number("rate"), momentum=0.9
        )
        norm = task.text("norm")
        if norm.startswith("ghost") and task.text("stage") == "test" and isinstance(network, Convolutional):
            size = int(norm[5:])
            found["batch test"] = [_with_batch_statistics(network, data.test_x, data.test_y)]
            found["batch train"] = [_with_batch_statistics(network, data.train_x[:1024], data.train_y[:1024])]
            corrected = _with_evalnorm(network, data, size, task.seeds[0])
            found["corrected"] = accuracies(corrected, data.test_x, data.test_y, 1)
            found["precise"] = _recalibrated(network, data, max(size, 32))
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Slope, difference, batch of one, and where the loss comes from."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, batch {BATCH}, {task['steps']} steps, tuned"
        sizes = _sizes(results)
        errors = {size: [1 - v for v in self.at_best(results, "test", norm=f"ghost{size}")] for size in sizes}
        places = [math.log2(1 / size) for size in sizes]
        rate = paired_effect(slope(places, list(zip(*errors.values(), strict=True))))
        two = 2 if 2 in errors else sizes[-1]
        gap = paired_effect(errors[two], errors[sizes[0]])
        listed = ", ".join(f"{statistics.mean(errors[size]):.1%} at {size}" for size in sizes)
        shared = self.shared(results, "test", norm=f"ghost{sizes[0]}")
        worse = (
            f"Test error {listed}: {100 * rate.value:+.2f} points per halving; accuracy over {sizes[0]} {shared} "
            "(the network without)"
        )
        mended = "; ".join(
            f"{how} takes it at {two} to {self._mended(results, name, two, errors[sizes[0]], gap.value)}"
            for name, how in (("precise", "recalibration"), ("corrected", "EvalNorm"))
        )
        falls: LabVerdict = "REFUTED" if gap.low > 0 else "UNDECIDED" if gap.high >= 0 else "CONFIRMED"
        noise = paired_effect(errors[sizes[0]], errors[sizes[1]])
        others = {n: self.at_best(results, "test", norm=n) for n in NAMES if n != "none" and results.where(norm=n)}
        grouped = others.pop("GN")
        group = paired_effect(grouped, [1 - v for v in errors[two]])
        reached = ", ".join(f"{NAMES[n]} {1 - statistics.mean(row):.1%}" for n, row in others.items())
        return (
            by_effect(
                ("000-26", "002-10", "004-9"),
                "does it lose with a small statistics batch?",
                rate,
                f"{worse}; {mended}",
                valid,
                unit="error per halving of B",
            ),
            ruled(
                ("002-11",),
                "does the error fall as the batch shrinks?",
                falls if gap.n >= 6 else "UNDECIDED",
                f"error({two}) − error({sizes[0]}) = {100 * gap.value:+.1f} points ({100 * gap.low:+.1f} to "
                f"{100 * gap.high:+.1f}); "
                f"published for ResNet-50: +11.1. {self._one(results, sizes)}",
                valid,
                effect=interval(gap, "error, 2 − 32"),
                seeds=gap.n,
                tests=1,
            ),
            by_effect(
                ("000-6",),
                "does a little noise help?",
                noise,
                f"Error over {sizes[0]} less error over {sizes[1]}: {100 * noise.value:+.2f} points",
                valid,
                unit="of error",
            ),
            by_effect(
                ("004-20",),
                f"GroupNorm where statistics have {two} images?",
                group,
                f"Error of Batch Normalization over {two} less that of GroupNorm ({1 - statistics.mean(grouped):.1%})",
                valid,
                unit="of error",
            ),
            by_rivals(
                ("004-20",),
                "is GroupNorm among the best that need no large batch?",
                grouped,
                others,
                f"Test error: GroupNorm {1 - statistics.mean(grouped):.1%}, {reached}.",
                valid,
                unit="accuracy of GroupNorm",
                margin=self.threshold("as good"),
            ),
        )

    def _mended(self, results: Results, name: str, size: int, whole: list[float], gap: float) -> str:
        """The error with other statistics in evaluation, and how much of the gap to whole batches that closes."""
        error = 1 - statistics.mean(self.at_best(results, name, norm=f"ghost{size}"))
        share = f" ({1 - (error - statistics.mean(whole)) / gap:.0%} of the gap)" if gap > 0 else ""
        return f"{error:.1%}{share}"

    def _one(self, results: Results, sizes: list[int]) -> str:
        if 1 not in sizes:
            return "A batch of 1 was not run."
        value = statistics.mean(self.at_best(results, "test", norm="ghost1"))
        own = statistics.mean(self.at_best(results, "batch test", norm="ghost1"))
        works = "works" if own > self.threshold("trains") else "does not work"
        return (
            f"Statistics over one image reach {value:.1%} with running statistics, and {own:.1%} with each "
            f"image's own, as "
            f"InstanceNorm: it {works}."
        )

    def figure(self, results: Results) -> Picture:
        """Error against the statistics batch."""
        sizes = _sizes(results)
        series = []
        for k, (name, what) in enumerate(WAYS):
            rows = [[1 - v for v in self.at_best(results, name, norm=f"ghost{size}")] for size in sizes]
            within = [Interval(statistics.mean(r), min(r), max(r)) for r in rows]
            series += [
                points(what, sizes, [i.value for i in within], k, within=within),
                line("", sizes, [i.value for i in within], k),
            ]
        for k, norm in enumerate((n for n in ("GN", "Online", "none") if results.where(norm=n)), len(WAYS)):
            level = 1 - statistics.mean(self.at_best(results, "test", norm=norm))
            series.append(dashes(NAMES[norm], (sizes[0], sizes[-1]), (level, level), k))
        left = Plot("this experiment", "statistics batch", "test error", tuple(series), x_log=True)
        right = Plot(
            "ResNet-50, ImageNet (published)",
            "images per GPU",
            "validation error",
            (points("BatchNorm", *PUBLISHED),),
            x_log=True,
        )
        return Picture(
            "Test error against the number of samples that share statistics, the optimizer's batch fixed at 32; "
            "beside it the published curve.",
            (left, right),
        )


def _sizes(results: Results) -> list[int]:
    return sorted(
        {int(m.task.text("norm")[5:]) for m in results if m.task.text("norm").startswith("ghost")}, reverse=True
    )


@torch.no_grad()
def _with_batch_statistics(network: Convolutional, x: Tensor, y: Tensor) -> float:
    """Accuracy in training mode, batches as in training; the running statistics stay."""
    network.train()
    with ns.pause_statistics(network):
        scores = torch.cat([network(part) for part in torch.split(x, BATCH) if len(part) == BATCH])
    network.eval()
    return float((scores.argmax(1) == y[: len(scores)]).float().mean())


def _with_evalnorm(network: Convolutional, data: Samples, size: int, seed: int) -> Convolutional:
    """A copy with EvalNorm for ghosts of the size, its weights learnt from batches of as many."""
    twin = copy.deepcopy(network).requires_grad_(False).train()
    for block in twin.blocks:
        ghost = block[1]  # type: ignore[index]
        # Momentum 0: the running statistics are those of the network, and stay.
        norm = ns.nn.EvalNorm(ghost.num_features, momentum=0.0, alpha_init_value=1 / size)
        norm.load_state_dict(ghost.state_dict(), strict=False)
        block[1] = norm  # type: ignore[operator]
    weights = [p for name, p in twin.named_parameters() if name.endswith(("mean_weight", "var_weight"))]
    order = batches(len(data.train_y), size, seed)

    def losses() -> Iterator[Tensor]:
        for rows in order:
            # The scores of training do not depend on the two weights: EvalNorm's own loss moves them, in backward.
            yield twin(data.train_x[rows]).sum()

    descend(weights, losses(), CORRECTING, 0.01, adam=True)
    return twin.eval()


def _recalibrated(network: Convolutional, data: Samples, size: int) -> list[float]:
    loader = [data.train_x[k : k + size] for k in range(0, 2048, size) if k + size <= len(data.train_x)]
    ns.recalibrate(network, loader)
    return accuracies(network, data.test_x, data.test_y, 1)


EXPERIMENT = StatisticsBatch()
