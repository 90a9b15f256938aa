"""B05: robustness to hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Scalar, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import available, samples
from normscope.lab.sketch import line
from normscope.lab.training import columns, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "RandomSearch"]

SETTINGS: Mapping[ProfileName, int] = {"quick": 4, "cpu": 60, "full": 200}
NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "LN"),
    "full": ("none", "BN", "LN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 400, "full": 6000}
DRAWS = range(1, 21)


class RandomSearch(Experiment):
    """The same settings, drawn at random, for every normalizer."""

    registration = register(
        "B05",
        statement="Batch Normalization makes training robust to hyper-parameters.",
        source="a tutorial; Santurkar et al. 2018; Bjorck et al. 2018",
        confirms="the share of settings that end within 2 points of the best accuracy of any normalizer is larger "
        "with it than without",
        refutes="it is smaller",
        thresholds={"within": 0.02, "difference": 0},
        design="Settings drawn once for all: rate 10^U(−3, 0.5), momentum 0, 0.5 or 0.9, batch 16, 64 or 256, layers "
        "2, 4 or 8 of 100 units, sigmoid, tanh or ReLU, initial weights 10^U(−1, 0.5) times the usual; MNIST averaged "
        "to 14 × 14, 5 000 images, 400 steps. Accuracy on validation images; the best is of all normalizers and "
        "settings of a seed. Beside it the best of k settings, k = 1 to 20, expected over draws.",
        cuts=("200 settings down to 60", "6000 steps down to 400", "10 seeds down to 8", "convolutions"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """Every normalizer at every setting, all seeds at once."""
        name = available("mnist") if profile != "quick" else "digits"
        drawn = _settings(SETTINGS[profile])
        return [
            Task(self.name, tuple({"data": name, "norm": n, "steps": STEPS[profile], **one}.items()), tuple(seeds))
            for one in drawn
            for n in NORMS[profile]
        ]

    def measure(self, task: Task) -> Numbers:
        """Train."""
        data = samples(task.text("data"), "half", 5_000, 2_000).flat
        unit = task.text("unit")
        widths = (data.shape.numel(), *[100] * task.whole("layers"), data.classes)
        network = Perceptrons(widths, task.seeds, norm=task.text("norm"), activation=unit, scale=task.number("scale"))
        return train(
            network, data, task.seeds, steps=task.whole("steps"), batch=task.whole("batch"), rate=task.number("rate"),
            momentum=task.number("momentum"), probes=1,
        )  # fmt: skip

    def _accuracies(self, results: Results) -> dict[str, list[list[float]]]:
        """Normalizer → a row per seed, a number per setting."""
        norms = results.texts("norm")
        return {norm: columns([list(m.row("valid")) for m in results.where(norm=norm)]) for norm in norms}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Share of good settings, and the best of few."""
        task = next(iter(results)).task
        found = self._accuracies(results)
        count = len(found["BN"][0])
        valid = f"{task['data']} of 14 × 14 or less, perceptrons, {count} settings, {task['steps']} steps"
        best = [max(max(row) for row in rows) for rows in zip(*found.values(), strict=True)]
        bars = [value - self.threshold("within") for value in best]
        shares = {
            norm: [sum(v >= bar for v in row) / count for row, bar in zip(rows, bars, strict=True)]
            for norm, rows in found.items()
        }
        few = {norm: [_best_of(row, 5) for row in rows] for norm, rows in found.items()}
        return (
            by_effect(
                ("002-8",),
                "do more settings work?",
                paired_effect(shares["BN"], shares["none"]),
                f"Share of settings within 2 points of the best: {told(shares)}",
                valid,
                unit="of the settings, with − without",
            ),
            by_effect(
                (),
                "is the best of five settings better?",
                paired_effect(few["BN"], few["none"]),
                f"Expected best of five: {told(few)}",
                valid,
                unit="of accuracy, with − without",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """All accuracies in order; the best of k."""
        ordered, best = [], []
        for k, (norm, rows) in enumerate(self._accuracies(results).items()):
            values = sorted(v for row in rows for v in row)
            ordered.append(line(norm, values, [(i + 1) / len(values) for i in range(len(values))], k))
            draws = [n for n in DRAWS if n <= len(rows[0])]
            best.append(line(norm, draws, [sum(_best_of(row, n) for row in rows) / len(rows) for n in draws], k))
        return Picture(
            "How accuracies are spread over settings drawn at random, all seeds; the expected best of k settings.",
            (
                Plot("settings", "validation accuracy", "share of settings below", tuple(ordered)),
                Plot("search", "settings tried", "expected best accuracy", tuple(best)),
            ),
        )


def _settings(count: int) -> list[dict[str, Scalar]]:
    """The first of an endless row of settings."""
    rng = np.random.default_rng(0)
    return [
        {
            "rate": round(10 ** rng.uniform(-3, 0.5), 5),
            "scale": round(10 ** rng.uniform(-1, 0.5), 4),
            "momentum": float(rng.choice([0.0, 0.5, 0.9])),
            "batch": int(rng.choice([16, 64, 256])),
            "layers": int(rng.choice([2, 4, 8])),
            "unit": str(rng.choice(["sigmoid", "tanh", "relu"])),
        }
        for _ in range(count)
    ]


def _best_of(values: Sequence[float], k: int) -> float:
    """The expected largest of k values drawn without replacement."""
    n, k = len(values), min(k, len(values))
    return sum(v * math.comb(i, k - 1) for i, v in enumerate(sorted(values))) / math.comb(n, k)


EXPERIMENT = RandomSearch()
