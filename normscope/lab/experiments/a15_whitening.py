"""A15: the price of whitening."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import line
from normscope.lab.verdicts import identity, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import slope

__all__ = ["EXPERIMENT", "Whitening"]

CHANNELS = {"small": (64, 128, 256), "whole": (64, 128, 256, 512)}
SAMPLES = 1024
GAPS = (1e-1, 1e-3, 1e-5, 1e-7, 1e-9)
LAYERS = {"BatchNorm": ns.nn.BatchNorm1d, "ZCA by eigenvectors": ns.nn.DecorrelatedBatchNorm, "Newton": ns.nn.IterNorm}


class Whitening(Exact):
    """Forward and backward of BatchNorm, of whitening by eigenvectors, and by Newton's iteration."""

    registration = register(
        "A15",
        statement="Full whitening is expensive, and not differentiable everywhere.",
        source="Ioffe & Szegedy 2015, §3",
        confirms="its time grows faster with the channels than BatchNorm's, by at least half a power, and the "
        "gradient through "
        "eigenvectors grows without bound as two eigenvalues meet",
        refutes="it grows like BatchNorm's, or the gradient stays bounded",
        thresholds={"half a power": 0.5, "growth": 1e3, "bounded": 10},
        design="m = 1024 samples, 64 to 512 channels, forward and backward, median of 5, float32, one group. "
        "Gradient of D^(−1/2)Uᵀ (PCA), of "
        "UD^(−1/2)Uᵀ (ZCA) and of five Newton steps, at 2 × 2 covariances whose eigenvalues differ by 1e-1 to "
        "1e-9, float64.",
    )

    def measure(self, task: Task) -> Numbers:
        """Times, and norms of gradients."""
        channels = CHANNELS[task.text("size")]
        found: dict[str, float | list[float]] = {"channels": list(channels)}
        for name, layer in LAYERS.items():
            found[f"time {name}"] = [_seconds(layer(c), c) for c in channels]
        for name, white in (("PCA", _pca), ("ZCA", _zca), ("Newton", _newton)):
            found[f"gradient {name}"] = [_gradient(white, gap) for gap in GAPS]
        found["few samples"] = float(torch.linalg.matrix_rank(torch.cov(torch.randn(8, 4, dtype=torch.float64))))
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Powers of the channels, and gradients."""
        run = self.first(results)
        logs = np.log(run.row("channels"))
        power = {name: float(slope(logs, np.log(run.row(f"time {name}")))) for name in LAYERS}
        extra = power["ZCA by eigenvectors"] - power["BatchNorm"]
        times = [run.row(f"time {name}")[-1] / run.row("time BatchNorm")[-1] for name in LAYERS]
        grows, newton = (run.row(f"gradient {name}") for name in ("PCA", "Newton"))
        zca = run.row("gradient ZCA")
        singular = not math.isfinite(grows[-1]) or grows[-1] > self.threshold("growth") * grows[0]
        bounded = all(g < self.threshold("bounded") * newton[0] for g in newton)  # NaN is not below
        costly = extra > self.threshold("half a power")
        outcome = (
            f"Time grows with the channels to the power {power['BatchNorm']:.1f} (BatchNorm), "
            f"{power['ZCA by eigenvectors']:.1f} "
            f"(eigenvectors), {power['Newton']:.1f} (Newton); at {run.row('channels')[-1]:.0f} channels they "
            f"take {times[1]:.0f} and "
            f"{times[2]:.0f} times BatchNorm's. As two eigenvalues meet to 1e-9, PCA's gradient goes from "
            f"{grows[0]:.2g} to {grows[-1]:.2g}, "
            f"ZCA's, computed through the same eigenvectors, from {zca[0]:.2g} to {zca[-1]:.2g}; Newton's stays "
            f"at {newton[-1]:.1f}. "
            f"With 4 samples of 8 features the covariance has rank {run.number('few samples'):.0f}."
        )
        verdict: LabVerdict = (
            "CONDITIONAL" if costly and singular and bounded else "CONFIRMED" if costly and singular else "REFUTED"
        )
        size = Interval(extra, extra, extra, "more powers of C than BatchNorm")
        return (
            ruled(
                ("001-16",),
                "is whitening expensive and singular?",
                verdict,
                outcome,
                "true of eigenvectors; by Newton's iteration it is differentiable",
                effect=size,
            ),
            identity(
                ("001-15",),
                "is there a differentiable normalization for any parameters, from a batch alone?",
                bounded,
                "BatchNorm and Newton whitening compute on a batch and have finite gradients also where "
                "eigenvalues meet; "
                "whitening by PCA has not.",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Time against channels, gradient against the gap."""
        run = self.first(results)
        left = Plot(
            "forward and backward",
            "channels",
            "seconds",
            tuple(line(name, run.row("channels"), run.row(f"time {name}"), k) for k, name in enumerate(LAYERS)),
            x_log=True,
            y_log=True,
        )
        right = Plot(
            "gradient of the whitening matrix",
            "gap between eigenvalues",
            "norm",
            tuple(
                line(name, GAPS, run.row(f"gradient {name}"), k) for k, name in enumerate(("PCA", "ZCA", "Newton"), 1)
            ),
            x_log=True,
            y_log=True,
        )
        return Picture(
            "Whitening costs powers of the channels more, and its eigenvectors have no gradient where "
            "eigenvalues meet.",
            (left, right),
        )


def _seconds(layer: torch.nn.Module, channels: int) -> float:
    x, dy = torch.randn(SAMPLES, channels, requires_grad=True), torch.randn(SAMPLES, channels)
    clocks = []
    for _ in range(6):
        start = time.perf_counter()
        torch.autograd.grad(layer(x), x, dy)
        clocks.append(time.perf_counter() - start)
    return statistics.median(clocks[1:])


def _pca(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    white: Tensor = values.rsqrt()[:, None] * vectors.T
    return white


def _zca(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    white: Tensor = vectors @ (values.rsqrt()[:, None] * vectors.T)
    return white


def _newton(covariance: Tensor) -> Tensor:
    trace = covariance.trace()
    scaled, p = covariance / trace, torch.eye(len(covariance), dtype=covariance.dtype)
    for _ in range(5):
        p = (3 * p - p @ p @ p @ scaled) / 2
    return p / trace.sqrt()


def _gradient(white: Callable[[Tensor], Tensor], gap: float) -> float:
    """The norm of the gradient of a fixed linear function of the whitening matrix."""
    c, s = math.cos(0.4), math.sin(0.4)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    covariance = (turn @ torch.diag(torch.tensor([1.0, 1.0 + gap], dtype=torch.float64)) @ turn.T).requires_grad_()
    weights = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    return float(torch.autograd.grad((white(covariance) * weights).sum(), covariance)[0].norm())


EXPERIMENT = Whitening()
