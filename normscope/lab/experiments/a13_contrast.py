"""A13: what happens to an image's contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normscope as ns
from normscope import data
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import points
from normscope.lab.verdicts import ruled, tiny
from normscope.records import Interval, Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Contrast"]

CONTRASTS = (0.25, 0.5, 1.0, 2.0, 4.0)
NORMS = ("BatchNorm, inference", "BatchNorm, training", "LayerNorm", "GroupNorm", "InstanceNorm")


class Contrast(Exact):
    """Copies of digits at five contrasts, through a random convolution and a normalizer."""

    registration = register(
        "A13",
        statement="Batch Normalization takes the contrast out of images.",
        source="tutorials, after Ulyanov et al. 2016, who say it of InstanceNorm",
        confirms="after it all images have the same contrast",
        refutes="the ratio of the contrasts of two images is what it was",
        thresholds={"kept": 1e-6, "removed": 0.02},
        design="40 digits at contrasts from 1/4 to 4, one random convolution of 8 channels without bias; the "
        "contrast of a sample is "
        "the standard deviation over all its values, of a channel of it for InstanceNorm; ratios to contrast 1; "
        "float64, ε = 1e-12.",
    )

    def measure(self, task: Task) -> Numbers:
        """The contrast of every copy after normalizing, relative to that of contrast 1."""
        images = torch.tensor(data.load_digits().train_x[:40]).double()[:, None] / 16
        copies = torch.cat([c * images for c in CONTRASTS])
        features = nn.functional.conv2d(copies, torch.randn(8, 1, 3, 3, dtype=torch.float64) / 3, padding=1)
        population = ns.moments(features[:80], "[n] c [h w]")
        outputs = (
            ns.normalize(features, "[n] c [h w]", eps=1e-12, moments=(population.mean, population.var)),
            ns.normalize(features, "[n] c [h w]", eps=1e-12),
            ns.normalize(features, "n [c h w]", eps=1e-12),
            ns.normalize(features, "n (g [c]) [h w]", g=2, eps=1e-12),
            ns.normalize(features, "n c [h w]", eps=1e-12),
        )
        found: dict[str, float | list[float]] = {name: _ratios(y) for name, y in zip(NORMS, outputs, strict=True)}
        found["level, inference"] = _level(outputs[0])
        found["level, training"] = _level(outputs[1])
        found["level, doubled, inference"] = _level(
            ns.normalize(2 * features, "[n] c [h w]", eps=1e-12, moments=(population.mean, population.var))
        )
        found["level, doubled, training"] = _level(ns.normalize(2 * features, "[n] c [h w]", eps=1e-12))
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Ratios kept or levelled."""
        run = self.first(results)
        kept = {name: max(abs(r / c - 1) for r, c in zip(run.row(name), CONTRASTS, strict=True)) for name in NORMS}
        level = {name: max(abs(r - 1) for r in run.row(name)) for name in NORMS}
        keeps = max(kept[NORMS[0]], kept[NORMS[1]]) < self.threshold("kept")
        levels = level["InstanceNorm"] < self.threshold("removed")
        absolute = [
            run.number(f"level, doubled, {mode}") / run.number(f"level, {mode}") for mode in ("inference", "training")
        ]
        outcome = (
            f"Ratios of contrasts are kept to {tiny(max(kept[NORMS[0]], kept[NORMS[1]]))} by BatchNorm, at "
            f"inference and within a "
            f"training batch; LayerNorm, GroupNorm and InstanceNorm level them to "
            f"{tiny(max(level[n] for n in NORMS[2:]))}. "
            f"When all images double their contrast, so does BatchNorm's output at inference (×{absolute[0]:.2f}), "
            f"and not in training (×{absolute[1]:.2f})."
        )
        size = Interval(
            run.row(NORMS[0])[-1], run.row(NORMS[0])[-1], run.row(NORMS[0])[-1], "ratio after BatchNorm, 4 before"
        )
        valid = "exact per image and channel; whether networks suffer is for training to say"
        return (
            ruled(
                ("000-15", "000-16"),
                "does it remove an image's contrast?",
                "REFUTED" if keeps and levels else "CONFIRMED",
                outcome,
                valid,
                effect=size,
            ),
            ruled(
                ("000-25",),
                "relative kept, absolute dropped?",
                "CONDITIONAL" if keeps and absolute[0] > 1.9 else "REFUTED",
                outcome,
                "true within a training batch, false at inference",
                effect=size,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Contrast out against contrast in."""
        run = self.first(results)
        shown = (NORMS[0], NORMS[2], NORMS[4])
        series = tuple(points(name, CONTRASTS, run.row(name), k) for k, name in enumerate(shown))
        plot = Plot("contrast of copies of an image", "before", "after", series, x_log=True, y_log=True)
        return Picture(
            "BatchNorm keeps the ratio of two images' contrasts; InstanceNorm and LayerNorm level them.", (plot,)
        )


def _ratios(y: Tensor) -> list[float]:
    """The median over images, and over channels, of a copy's contrast relative to that of the image itself."""
    per_copy = y.reshape(len(CONTRASTS), -1, *y.shape[1:])
    deviation = (per_copy - per_copy.mean((3, 4), keepdim=True)).square().mean((3, 4)).sqrt()
    ratios: list[float] = (deviation / deviation[CONTRASTS.index(1.0)]).flatten(1).median(1).values.tolist()
    return ratios


def _level(y: Tensor) -> float:
    """The mean over channels of the standard deviation."""
    return float(y.std((0, 2, 3)).mean())


EXPERIMENT = Contrast()
