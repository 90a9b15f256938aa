"""A11: does normalizing make data Gaussian?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import normscope as ns
from normscope import data
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, ProfileName, Results, Task
from normscope.lab.sketch import dashes, line
from normscope.lab.verdicts import by_effect, merge, ruled, tiny
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Gaussian"]

HIDDEN, STEPS, RATE, SAMPLES = 48, 300, 0.3, 400
LEVELS = tuple(k / 20 for k in range(1, 20))


class Gaussian(Exact):
    """Features of a small ReLU network, trained on the embedded digits, before and after normalizing."""

    registration = register(
        "A11",
        statement="Normalized data look Gaussian; and Wu + b is more symmetric and less sparse than u.",
        source="a tutorial for the first, Ioffe & Szegedy 2015 §3.2 for the second",
        confirms="normalizing brings skewness, kurtosis or the distance from the best normal distribution closer to "
        "those of a normal distribution",
        refutes="it leaves all three as they are",
        thresholds={"change": 1e-9, "non-zero": 0.0},
        design="Two hidden layers of 48 ReLU units, 300 steps on the digits, float64. u: output of the first "
        "layer; Wu + b: input of "
        "the second's ReLU. Per unit that is active: skewness, kurtosis, Kolmogorov–Smirnov distance from the "
        "normal of the same mean "
        "and variance, share of zeros; medians over units, paired over seeds.",
    )
    seeds: Mapping[ProfileName, int] = {"quick": 6, "cpu": 10, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """The same for all profiles: a run takes half a second."""
        return [Task(self.name, (("steps", STEPS),), (seed,)) for seed in seeds]

    def measure(self, task: Task) -> Numbers:
        """Shapes of the distributions of u and of Wu + b."""
        u, z = _features(task.whole("steps"))
        after = ns.normalize(torch.cat((u, z), 1), "[n] c", eps=1e-5)
        before = [_shape(torch.cat((u, z), 1)), _shape(after)]
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        typical = z[:, _middle(_shape(z)[2])], u[:, _middle(_shape(u)[2])]
        return {
            "change": max(float((a - b).abs().max()) for a, b in zip(*before, strict=True)),
            "skewness u": float(_shape(u)[0].abs().median()),
            "skewness z": float(_shape(z)[0].abs().median()),
            "kurtosis u": float(_shape(u)[1].median()),
            "kurtosis z": float(_shape(z)[1].median()),
            "distance u": float(_shape(u)[2].median()),
            "distance z": float(_shape(z)[2].median()),
            "zeros u": float((u == 0).double().mean()),
            "zeros z": float((z == 0).double().mean()),
            "quantiles z": ns.normalize(typical[0][:, None], "[n] c").flatten().quantile(levels).tolist(),
            "quantiles u": ns.normalize(typical[1][:, None], "[n] c").flatten().quantile(levels).tolist(),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """No change of shape; and what differs between u and Wu + b."""
        change = max(results.per_seed("change"))
        run = self.first(results)
        same = (
            f"Skewness, kurtosis and distance from the best normal distribution change by {tiny(change)}. An "
            f"affine map keeps the "
            f"shape: a kurtosis of {run.number('kurtosis u'):.1f} stays."
        )
        valid = "features of a small ReLU network on digits"
        judged = [
            by_effect(
                ("001-23",),
                question,
                paired_effect(results.per_seed(f"{name} u"), results.per_seed(f"{name} z")),
                f"{what}: {_mean(results, f'{name} u'):.3f} of u, {_mean(results, f'{name} z'):.3f} of Wu + b",
                valid,
                unit=what,
            )
            for name, question, what in (
                ("distance", "is Wu + b closer to a normal distribution?", "distance from the best normal"),
                ("skewness", "is Wu + b more symmetric?", "|skewness|"),
                ("zeros", "is Wu + b less sparse?", "share of zeros"),
            )
        ]
        sparse = (
            "CONDITIONAL" if merge([j.verdict for j in judged]) == "CONFIRMED" else merge([j.verdict for j in judged])
        )
        return (
            ruled(
                ("002-3",),
                "does normalizing make data Gaussian?",
                "REFUTED" if change < self.threshold("change") else "CONFIRMED",
                same,
                "any data: an affine map",
                tests=0,
            ),
            *judged,
            ruled(
                ("001-23",),
                "is it as the tutorial says?",
                sparse,
                "More symmetric, yes; “sparse” is a slip in translation: the paper says non-sparse, and so it is.",
                valid,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Quantiles of a typical unit against those of a normal distribution."""
        run = self.first(results)
        normal = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
        series = (
            line("u", normal, run.row("quantiles u"), 0),
            line("Wu + b", normal, run.row("quantiles z"), 1),
            dashes("normal", normal, normal, 2),
        )
        plot = Plot("quantiles after normalizing", "normal distribution", "a typical unit", series)
        return Picture("Normalizing shifts and scales; what bends away from the diagonal stays bent.", (plot,))


def _features(steps: int) -> tuple[Tensor, Tensor]:
    """u after the first ReLU and Wu + b before the second, of units that are active."""
    digits = data.load_digits()
    x, y = torch.tensor(digits.train_x).flatten(1).double() / 16, torch.tensor(digits.train_y).long()
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in ((64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10))]
    parameters = [p for layer in layers for p in layer.parameters()]
    for _ in range(steps):
        batch = torch.randint(len(y), (60,))
        h = layers[1](layers[0](x[batch]).relu()).relu()
        gradients = torch.autograd.grad(nn.functional.cross_entropy(layers[2](h), y[batch]), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=RATE)
    with torch.no_grad():
        u = layers[0](x[:SAMPLES]).relu()
        z = layers[1](u)
    return u[:, (u > 0).double().mean(0) > 0.05], z


def _shape(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Skewness, kurtosis and Kolmogorov–Smirnov distance from the normal of the same mean and variance, per column."""
    t = (x - x.mean(0)) / x.var(0, unbiased=False).sqrt()
    ordered = torch.special.ndtr(t.sort(0).values)
    steps = torch.arange(len(x) + 1, dtype=x.dtype)[:, None] / len(x)
    gap = torch.maximum((ordered - steps[:-1]).abs().amax(0), (ordered - steps[1:]).abs().amax(0))
    return (t**3).mean(0), (t**4).mean(0), gap


def _middle(values: Tensor) -> int:
    return int(values.argsort()[len(values) // 2])


def _mean(results: Results, name: str) -> float:
    values = results.per_seed(name)
    return sum(values) / len(values)


EXPERIMENT = Gaussian()
