"""A03: how well a batch estimates the population, and when m/(m − 1) is not enough."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import normscope as ns
from normscope import data
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import dashes, line, points
from normscope.lab.verdicts import ruled
from normscope.records import Interval, Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Estimates"]

SIZES = (2, 4, 8, 16, 32, 64)
IMAGES, PLANE, SHARES = (2, 4, 8, 16, 32), 7, (0.0, 0.3, 0.7)


class Estimates(Exact):
    """Monte Carlo with known population: independent values, and maps whose pixels belong together."""

    registration = register(
        "A03",
        statement="The population's variance is m/(m − 1) times the mean of the batch variances.",
        source="Ioffe & Szegedy 2015, Algorithm 2",
        confirms="for independent values the corrected estimate is unbiased, within 3 standard errors at every m",
        refutes="for maps whose images differ by a share ρ of the variance the corrected estimate is biased by −ρ/n, "
        "beyond 3 standard errors",
        thresholds={"standard errors": 3},
        design="Standard normal values in batches of 2 to 64; maps of 7 × 7 pixels with a share ρ of 0, 0.3, "
        "0.7 of the "
        "variance between images, in batches of 2 to 32 images; 60 000 batches of values, 3 000 to 20 000 of "
        "maps. ρ of real "
        "features: 16 random convolutions on the embedded digits.",
    )

    def measure(self, task: Task) -> Numbers:
        """Corrected variances with their standard errors."""
        g = torch.Generator().manual_seed(task.seeds[0])
        scale = 5 if task.text("size") == "small" else 1
        found: dict[str, float | list[float]] = {}
        rows = [_estimate(torch.randn(60_000 // scale, m, 1, 1, generator=g, dtype=torch.float64)) for m in SIZES]
        found["value"], found["value error"], found["mean sd"], found["spread"] = map(list, zip(*rows, strict=True))
        for rho in SHARES:
            maps = [_estimate(_maps(n, rho, 20_000 // (scale * math.isqrt(n)), g)) for n in IMAGES]
            found[f"map {rho:g}"], found[f"map {rho:g} error"], _, _ = map(list, zip(*maps, strict=True))
        found["rho"] = _real_shares(g)
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Bias against standard error."""
        run, bar = self.first(results), self.threshold("standard errors")
        off = [abs(v - 1) / e for v, e in zip(run.row("value"), run.row("value error"), strict=True)]
        independent = max(off) < bar
        low, error = run.row("map 0.7")[0], run.row("map 0.7 error")[0]
        theory = _expected(2, 0.7)
        biased = (1 - low) / error > bar and abs(low - theory) / error < bar
        sd = run.row("mean sd")
        root = [s * math.sqrt(m) for s, m in zip(sd, SIZES, strict=True)]
        rho = sorted(run.row("rho"))
        conditional = (
            f"Independent values: at most {max(off):.1f} standard errors from 1. Maps of 2 images with ρ = 0.7: "
            f"{low:.3f} in place of 1 (theory {theory:.3f}). Random convolutions on digits have ρ from {rho[0]:.2f} to "
            f"{rho[-1]:.2f}."
        )
        return (
            ruled(
                ("001-22",),
                "is m/(m − 1) enough?",
                "CONDITIONAL" if independent and biased else "CONFIRMED" if independent else "REFUTED",
                conditional,
                "true of independent values, false of the pixels of few images",
                effect=Interval(low - 1, low - 1 - 1.96 * error, low - 1 + 1.96 * error, "bias at n = 2, ρ = 0.7"),
                tests=11,
            ),
            ruled(
                ("000-9", "002-10"),
                "how good is a batch's estimate?",
                "CONFIRMED" if max(root) < 1.05 else "UNDECIDED",
                f"The standard deviation of a batch's mean is {sd[0]:.3f} σ at m = 2 and {sd[-1]:.3f} σ at 64: 1/√m to "
                f"{100 * max(abs(r - 1) for r in root):.1f} %. That of its σ is "
                f"{100 * run.row('spread')[0]:.0f} % at m = 2 and "
                f"{100 * run.row('spread')[-1]:.0f} % at 64.",
                "standard normal values",
                tests=6,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Corrected variance against the number of images."""
        run = self.first(results)
        series = []
        for k, rho in enumerate(SHARES):
            series.append(points(f"ρ = {rho:g}", IMAGES, run.row(f"map {rho:g}"), k))
            series.append(dashes("", IMAGES, [_expected(n, rho) for n in IMAGES], k))
        left = Plot("maps of 7 × 7", "images in the batch", "corrected variance (truth: 1)", tuple(series), x_log=True)
        right = Plot(
            "independent values",
            "values in the batch",
            "standard deviation of the mean",
            (line("measured", SIZES, run.row("mean sd")), dashes("1/√m", SIZES, [m**-0.5 for m in SIZES], 1)),
            x_log=True,
            y_log=True,
        )
        return Picture("The correction m/(m − 1) misses the variance between images: dashed, 1 − ρ/n.", (left, right))


def _expected(n: int, rho: float) -> float:
    """E[σ_B²]·m′/(m′ − 1) for n maps of p pixels: 1 − Var(batch mean) = 1 − ρ/n − (1 − ρ)/(np), corrected."""
    m = n * PLANE**2
    return (1 - rho / n - (1 - rho) / m) * m / (m - 1)


def _maps(n: int, rho: float, batches: int, g: torch.Generator) -> Tensor:
    image = torch.randn(batches, n, 1, 1, generator=g, dtype=torch.float64)
    pixel = torch.randn(batches, n, PLANE, PLANE, generator=g, dtype=torch.float64)
    return math.sqrt(rho) * image + math.sqrt(1 - rho) * pixel


def _estimate(x: Tensor) -> tuple[float, float, float, float]:
    """Corrected variance of each batch (batches, n, h, w): its mean and error; sd of the means; spread of σ."""
    found = ns.moments(x, "b [n h w]")
    m = x[0].numel()
    var = found.var * m / (m - 1)
    sigma = found.var.sqrt()
    return (
        float(var.mean()),
        float(var.std() / len(x) ** 0.5),
        float(found.mean.std()),
        float(sigma.std() / sigma.mean()),
    )


def _real_shares(g: torch.Generator) -> list[float]:
    """The share of the variance that lies between images, per channel of random convolutions on digits."""
    images = torch.tensor(data.load_digits().train_x[:512]).double()[:, None] / 16
    filters = torch.randn(16, 1, 3, 3, generator=g, dtype=torch.float64) / 3
    features = nn.functional.conv2d(images, filters, padding=1)
    means, _, _ = ns.moments(features, "n c [h w]")
    return (means.var(0) / ns.moments(features, "[n] c [h w]").var).tolist()


EXPERIMENT = Estimates()
