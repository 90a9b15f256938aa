"""C03: shards and synchronised statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Network, renew
from normscope.lab.samples import available
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, Tuned, classify, columns
from normscope.lab.verdicts import by_effect, by_equivalence, tiny, told
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect, slope

__all__ = ["EXPERIMENT", "Shards"]

SHARDS: Mapping[ProfileName, tuple[int, ...]] = {"quick": (1, 8), "cpu": (1, 4, 16), "full": (1, 2, 4, 8, 16)}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 300, "full": 10_000}
BATCH = 32


class Shards(Tuned):
    """A batch of 32 spread over workers, each with statistics of its own or all with common ones."""

    registration = register(
        "C03",
        statement="Spread over workers Batch Normalization loses, as each sees few samples; synchronised statistics "
        "repair it.",
        source="a tutorial; Luo et al. 2018, Switchable Normalization: 76.4 % with 32 images per GPU, 65.3 with 2",
        confirms="with local statistics the slope of the test error against log₂ of the workers lies above 0",
        refutes="it lies below 0",
        thresholds={"slope": 0, "equal": 0.01, "error": 1e-5},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9, batch 32 spread "
        "over 1, 4, 16 workers within one process: local statistics, or those of all shards, put together from the "
        "shards' means, variances and counts. Three rates tuned with 2 seeds for every arm. Whether synchronised "
        "statistics equal one worker's is told by test accuracies (within a point) and by the largest difference of "
        "output and gradient in one layer. Between processes the package's tests hold the same.",
        cuts=("2 and 8 workers", "10 000 steps down to 300", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Local statistics for every number of workers, synchronised ones for the largest."""
        name = available("cifar10") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "cnn", "steps": STEPS[profile]}
        most = max(SHARDS[profile])
        kinds = [(f"ghost{BATCH // k}", k) for k in SHARDS[profile]] + [("BN synchronised", most)]
        return [{**fixed, "norm": norm, "workers": k} for norm, k in kinds]

    def baseline(self, arm: Arm) -> Arm:
        """One worker."""
        return dict(arm) | {"norm": f"ghost{BATCH}", "workers": 1}

    def measure(self, task: Task) -> Numbers:
        """Train, and compare one layer."""

        def change(network: Network) -> None:
            if task.text("norm").endswith("synchronised"):
                renew(network, lambda norm: _Synchronised(norm.get_parameter("weight").numel(), task.whole("workers")))

        found = classify(task, form="half", train_size=5_000, test_size=1_000, batch=BATCH, momentum=0.9, change=change)
        return found | {"difference": [_difference(task.whole("workers"), task.seeds[0])]}

    def _errors(self, results: Results) -> dict[int, list[float]]:
        """Workers → the test error with local statistics, per seed."""
        workers = results.wholes("workers")
        return {
            k: [1 - v for v in self.at_best(results, "test", norm=f"ghost{BATCH // k}", workers=k)] for k in workers
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The slope, and the repair."""
        task = results.where(stage="test")[0].task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps of {BATCH}, tuned"
        errors = self._errors(results)
        rate = paired_effect(slope([math.log2(k) for k in errors], columns(errors.values())))
        common = [1 - v for v in self.at_best(results, "test", norm="BN synchronised")]
        listed = told({f"{k} workers" if k > 1 else "1 worker": row for k, row in errors.items()})
        worst = max(m.row("difference")[0] for m in results)
        exact = "within" if worst < self.threshold("error") else "beyond"
        return (
            by_effect(
                ("002-12",),
                "does it lose with more workers?",
                rate,
                f"Test error with local statistics: {listed}; synchronised {sum(common) / len(common):.1%}",
                valid,
                unit="error per doubling of the workers",
            ),
            by_equivalence(
                ("002-21",),
                "do synchronised statistics repair it?",
                paired_effect(common, errors[1]),
                f"Test error synchronised over {max(errors)} workers {sum(common) / len(common):.1%}, of one "
                f"{sum(errors[1]) / len(errors[1]):.1%}; one layer's output and gradient differ by "
                f"{tiny(worst)}, {exact} the rounding of float32",
                valid,
                unit="of error, synchronised − one worker",
                margin=self.threshold("equal"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Error against workers."""
        errors = self._errors(results)
        common = self.at_best(results, "test", norm="BN synchronised")
        series = spread("local statistics", list(errors), columns(errors.values()))
        level = (("synchronised", 1 - sum(common) / len(common)),)
        plot = Plot("a batch of 32 spread out", "workers", "test error", series, x_log=True, levels=level)
        return Picture("Test error against the number of workers, mean and range over seeds, every arm tuned.", (plot,))


class _Synchronised(ns.nn.BatchNorm2d):
    """Batch Normalization by statistics that are put together from those of the shards."""

    def __init__(self, channels: int, shards: int) -> None:
        super().__init__(channels)
        self.shards = shards

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Normalize (n, c, h, w)."""
        if not self.training:
            return super().forward(x)
        mean, var, count = _together(x, self.shards)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # type: ignore[union-attr, arg-type]
        return ns.normalize(x, "[n] c [h w]", moments=(mean, var), weight=self.weight, bias=self.bias)


def _together(x: Tensor, shards: int) -> tuple[Tensor, Tensor, int]:
    """Mean, variance and count of all, from those of every shard (Chan, Golub & LeVeque 1983)."""
    chunks = x.chunk(shards)
    parts = [ns.moments(part, "[n] c [h w]") for part in chunks]
    weights = [len(part) / len(x) for part in chunks]
    mean = torch.stack([w * p.mean for w, p in zip(weights, parts, strict=True)]).sum(0)
    within = [w * (p.var + (p.mean - mean).square()) for w, p in zip(weights, parts, strict=True)]
    return mean, torch.stack(within).sum(0), x.numel() // x.shape[1]


def _difference(shards: int, seed: int) -> float:
    """The largest difference of output and gradient between synchronised shards and the whole batch."""
    g = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(BATCH, 8, 4, 4, generator=g) for _ in range(2))
    found = []
    for norm in (_Synchronised(8, shards), ns.nn.BatchNorm2d(8)):
        given = x.clone().requires_grad_()
        y = norm(given)
        found.append((y.detach(), *torch.autograd.grad(y, [given], upstream)))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


EXPERIMENT = Shards()
