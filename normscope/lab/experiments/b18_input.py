"""B18: scaling, standardising and whitening the input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import Samples, samples
from normscope.lab.sketch import beside, spread
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture, Plot, Series
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Inputs"]

STEPS: Mapping[ProfileName, int] = {"quick": 60, "cpu": 600, "full": 6000}
DEPTHS = {"linear": 0, "deep": 4}
# Input → the normalizer of the hidden layers.
ARMS = {"raw": "none", "log": "none", "standardised": "none", "whitened": "none", "standardised, BN inside": "BN"}


class Inputs(Tuned):
    """Features of very different scales, given to a linear and to a deep network in several ways."""

    registration = register(
        "B18",
        statement="Inputs of mean 0 and variance 1 train faster, and decorrelated ones faster still; but normalizing "
        "the input alone is not enough.",
        source="LeCun et al. 1998; Ioffe & Szegedy 2015, §2; tutorials",
        confirms="the mean test accuracy while training, standardised − raw, lies above 0 in the mean of both "
        "networks; and so for whitened − standardised, and in the deep network for normalizing every layer − the "
        "input only",
        refutes="the difference lies below 0",
        thresholds={"difference": 0, "ridge": 1e-3},
        design="Digits of 8 × 8; every pixel multiplied by a factor 10^U(−2, 2) drawn once. A linear classifier, and "
        "four layers of 50 tanh units. Inputs raw; sign(x) log(1 + |x|); standardised; whitened (ZCA of the "
        "standardised, 10⁻³ added to the eigenvalues); standardised and Batch Normalization in every layer. SGD "
        "without momentum, batch 32; rates from 10⁻⁴ to 3 tuned with 2 seeds for every arm; speed is the mean "
        "test accuracy over 20 marks, denser at the beginning.",
        cuts=("6000 steps down to 600",),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 10, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.1,),
        "cpu": (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0),
        "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
    }
    together = 10

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every way for both networks."""
        return [
            {"net": "mlp", "depth": depth, "input": given, "norm": norm, "steps": STEPS[profile]}
            for depth in DEPTHS
            for given, norm in ARMS.items()
            if depth == "deep" or norm == "none"
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train."""
        data = _given(samples("digits", "flat"), task.text("input"))
        widths = (data.shape[0], *[50] * DEPTHS[task.text("depth")], data.classes)
        network = Perceptrons(widths, task.seeds, norm=task.text("norm"), activation="tanh")
        steps, rate = task.whole("steps"), task.number("rate")
        return train(network, data, task.seeds, steps=steps, batch=32, rate=rate)

    def _speeds(self, results: Results, depth: str) -> dict[str, tuple[float, ...]]:
        given = dict.fromkeys(m.task.text("input") for m in results.where(depth=depth))
        return {arm: self.along(results, depth=depth, input=arm) for arm in given}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Step by step: scaled, whitened, every layer."""
        task = next(iter(results)).task
        valid = f"digits with scales from 0.01 to 100, {task['steps']} steps of 32, tuned"
        speeds = {depth: self._speeds(results, depth) for depth in DEPTHS}
        listed = "; ".join(f"{depth}: {told(rows)}" for depth, rows in speeds.items())
        both = {
            arm: [(a + b) / 2 for a, b in zip(speeds["linear"][arm], speeds["deep"][arm], strict=True)]
            for arm in speeds["linear"]
        }
        deep, unit = speeds["deep"], "of mean accuracy while training"
        return (
            by_effect(
                ("001-17", "001-31"),
                "do standardised inputs train faster than raw ones?",
                paired_effect(both["standardised"], both["raw"]),
                f"Mean test accuracy while training, {listed}",
                valid,
                unit=unit,
            ),
            by_effect(
                ("001-13",),
                "do decorrelated inputs train faster still?",
                paired_effect(both["whitened"], both["standardised"]),
                f"Whitened − standardised in the linear and the deep network; {listed}",
                valid,
                unit=unit,
            ),
            by_effect(
                ("003-3",),
                "is normalizing every layer better than the input only?",
                paired_effect(deep["standardised, BN inside"], deep["standardised"]),
                "Every layer − the input only, four hidden layers",
                valid,
                unit=unit,
            ),
            by_effect(
                ("001-31",),
                "do logarithms help?",
                paired_effect(both["log"], both["raw"]),
                "log − raw",
                valid,
                unit=unit,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Curves of the deep network, speeds of both."""
        series: list[Series] = []
        for k, given in enumerate(self._speeds(results, "deep")):
            rate = self.best_rate(results, depth="deep", input=given)
            series += spread(given, *self.curves(results, depth="deep", input=given, rate=rate), k)
        groups = {depth: self._speeds(results, depth) for depth in DEPTHS}
        return Picture(
            "Test accuracy while training by what the input has been through, each arm at its own best rate.",
            (
                Plot("four hidden layers", "step", "test accuracy", tuple(series), x_log=True),
                beside("mean while training", "test accuracy", groups),
            ),
        )


def _given(data: Samples, how: str) -> Samples:
    """The images as features of unequal scale, then changed by what the training part tells."""
    g = torch.Generator().manual_seed(0)
    scales = 10 ** (4 * torch.rand(data.shape[0], generator=g) - 2)
    data = data.mapped(lambda x: x * scales)
    if how == "raw":
        return data
    if how == "log":
        return data.mapped(lambda x: x.sign() * x.abs().log1p())
    mean, deviation = data.train_x.mean(0), data.train_x.std(0)
    deviation = torch.where(deviation > 0, deviation, torch.ones(()))  # pixels that are never drawn
    data = data.mapped(lambda x: (x - mean) / deviation)
    if how != "whitened":
        return data
    matrix = _whitening(data.train_x)
    return data.mapped(lambda x: x @ matrix)


def _whitening(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    scales: Tensor = (values + EXPERIMENT.threshold("ridge")).rsqrt()
    matrix: Tensor = vectors @ torch.diag(scales) @ vectors.T
    return matrix


EXPERIMENT = Inputs()
