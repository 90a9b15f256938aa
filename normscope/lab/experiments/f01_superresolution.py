"""F01: super-resolution."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.restoration import TITLES, Restorer, available_scenes, contrast_error, halved, patches, psnr, scenes
from normscope.lab.sketch import points, spread
from normscope.lab.training import Arm, Tuned, descend, first_reaching, schedule
from normscope.lab.verdicts import by_effect, interval, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, crossed_effect, mcnemar, median_ratio

__all__ = ["EXPERIMENT", "SuperResolution"]

BATCH, PATCH = 8, 32
ARMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "BN late", "IN", "LN"),
    "full": ("none", "BN", "BN late", "IN", "LN", "GN"),
}
LOSSES: Mapping[ProfileName, tuple[str, ...]] = {"quick": ("L1",), "cpu": ("L1",), "full": ("L1", "L2")}
STEPS: Mapping[ProfileName, int] = {"quick": 15, "cpu": 800, "full": 30_000}
LATE = 0.7


class SuperResolution(Tuned):
    """A small network of residual blocks that doubles the resolution."""

    registration = register(
        "F01",
        statement="For super-resolution Batch Normalization is harmful: training is slower and less stable, and "
        "contrast is lost.",
        source="tutorials; Lim et al. 2017 (EDSR)",
        confirms="PSNR with it − without, both tuned, lies below 0",
        refutes="it lies at or above 0",
        thresholds={"difference": 0, "share of the gap": 0.5, "lost below bilinear": 1.0},
        design="4 residual blocks of 16 channels, pixel shuffle, the enlarged input added; twofold, low "
        "resolution by means over 2 × 2; patches of 32 × 32, batch 8, L1, "
        "Adam, three rates tuned with 2 seeds for every arm. Arms: none; BatchNorm; the same with running "
        "statistics for the last 30 % of the steps; InstanceNorm; "
        "LayerNorm. BatchNorm also evaluated with the statistics of the test batch. PSNR and "
        "|ln(contrast/target's)| per picture; seeds and pictures drawn again.",
        cuts=("L2", "GroupNorm", "30 000 steps down to 800", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer with every loss."""
        name = available_scenes() if profile != "quick" else "textures"
        return [
            {"data": name, "net": "restorer", "norm": norm, "loss": loss, "steps": STEPS[profile]}
            for loss in LOSSES[profile]
            for norm in ARMS[profile]
        ]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train, and restore the test pictures."""
        pictures, steps, norm = scenes(task.text("data")), task.whole("steps"), task.text("norm")
        network = Restorer(norm.split()[0], task.seeds[0], blocks=4, upscale=True)
        marks, curve = schedule(steps, 12), list[float]()

        def losses() -> Iterator[Tensor]:
            for high in patches(pictures.train, BATCH, PATCH, task.seeds[0]):
                found = network(halved(high))
                yield F.l1_loss(found, high) if task.text("loss") == "L1" else F.mse_loss(found, high)

        def on_step(step: int) -> None:
            if step in marks:
                curve.append(statistics.mean(_restored(network, pictures.valid)[0]))
            network.train()
            if norm == "BN late" and step >= LATE * steps:
                for layer in network.modules():
                    if isinstance(layer, ns.nn.BatchNorm2d):
                        layer.eval()  # running statistics; γ and β still learn

        network.train()
        descend(list(network.parameters()), losses(), steps, task.number("rate"), adam=True, on_step=on_step)
        quality, contrast = _restored(network, pictures.test)
        found: dict[str, list[float]] = {
            "valid": curve[-1:],
            "curve": curve,
            "steps": [float(m) for m in marks],
            "psnr": quality,
            "contrast": contrast,
            "bilinear": psnr(
                F.interpolate(halved(pictures.test), scale_factor=2, mode="bilinear", align_corners=False),
                pictures.test,
            ),
        }
        if norm == "BN":
            network.train()
            with torch.no_grad(), ns.pause_statistics(network):
                found["batch statistics"] = psnr(network(halved(pictures.test)), pictures.test)
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """PSNR, speed, divergence, and which mechanism."""
        task = next(iter(results)).task
        title, steps = TITLES[task.text("data")], results.where(stage="test")[0].task["steps"]
        valid = f"{title}, twofold, 4 residual blocks of 16 channels, {steps} steps, L1, tuned"
        arms = list(dict.fromkeys(m.task.text("norm") for m in results))
        rows = {norm: self._pictures(results, "psnr", norm) for norm in arms}
        mean = {norm: float(np.mean(row)) for norm, row in rows.items()}
        loss = crossed_effect(rows["none"], rows["BN"])
        lost = [
            [
                min(row) < b - self.threshold("lost below bilinear")
                for row, b in zip(rows[n], self._floor(results, n), strict=True)
            ]
            for n in ("BN", "none")
        ]
        times = [self._reached(results, norm, mean) for norm in ("BN", "none")]
        ratio = median_ratio(*times)
        listed = ", ".join(f"{norm} {value:.2f} dB" for norm, value in mean.items())
        slower: LabVerdict = "UNDECIDED"
        if loss.n >= MINIMUM_SEEDS:
            slower = "CONFIRMED" if ratio[1] > 1 else "REFUTED" if ratio[2] <= 1 else "UNDECIDED"
        main = by_effect(
            ("000-20", "004-9", "000-19"),
            "is it worse for super-resolution?",
            loss,
            f"{listed}; without − with {loss.value:+.2f} dB; on validation pictures with it "
            f"{self.shared(results, 'valid', norm='BN', loss='L1')}",
            valid,
            unit="dB, without − with",
        )
        opposite = {"CONFIRMED": "REFUTED", "REFUTED": "CONFIRMED"}
        good: LabVerdict = (
            "REFUTED"
            if opposite.get(main.verdict) == "REFUTED"
            else "CONFIRMED"
            if main.verdict == "REFUTED"
            else "UNDECIDED"
        )
        judged = [
            main,
            ruled(
                ("000-21",),
                "is it very good for super-resolution?",
                good,
                main.outcome,
                valid,
                effect=main.effect,
                seeds=loss.n,
            ),
            ruled(
                ("000-14",),
                "is it slower, and does it diverge?",
                slower,
                f"Steps to the worse network's PSNR: {ratio[0]:.2f} times as many with it ({ratio[1]:.2f} to "
                f"{ratio[2]:.2f}). Below bilinear by 1 dB on a picture: "
                f"{sum(lost[0])} of {loss.n} seeds with, {sum(lost[1])} without (McNemar p = {mcnemar(*lost):.2g}).",
                valid,
                effect=Interval(*ratio, "times the steps without"),
                seeds=loss.n,
                tests=2,
            ),
        ]
        return (*judged, *self._mechanism(results, arms, rows, mean, valid))

    def _mechanism(
        self,
        results: Results,
        arms: Sequence[str],
        rows: Mapping[str, Sequence[Sequence[float]]],
        mean: Mapping[str, float],
        valid: str,
    ) -> list[Judgement]:
        contrast = {norm: self._pictures(results, "contrast", norm) for norm in arms}
        worse = crossed_effect(contrast["BN"], contrast["none"])
        own = float(np.mean(self._pictures(results, "batch statistics", "BN")))
        sizes = ", ".join(f"{norm} {float(np.mean(row)):.4f}" for norm, row in contrast.items())
        judged = [
            by_effect(
                ("000-15", "000-16", "000-25"),
                "is contrast lost?",
                worse,
                f"|ln(contrast / target's)|: {sizes}; with the test batch's statistics {own:.2f} dB in place of "
                f"{mean['BN']:.2f}",
                valid,
                unit="|ln contrast|, with − without",
            )
        ]
        if "BN late" in arms and "IN" in arms:
            gap = mean["none"] - mean["BN"]
            late = crossed_effect(rows["BN late"], rows["BN"])
            closed = late.value / gap if gap > 0 else 0.0
            judged.append(
                ruled(
                    ("000-27",),
                    "is it the mixing of statistics?",
                    "UNDECIDED"
                    if late.n < MINIMUM_SEEDS or gap <= 0
                    else "CONFIRMED"
                    if late.low > 0 and closed >= self.threshold("share of the gap")
                    else "REFUTED"
                    if late.high < self.threshold("share of the gap") * gap
                    else "UNDECIDED",
                    f"Running statistics for the last 30 % of training change PSNR by {late.value:+.2f} dB, "
                    f"{closed:.0%} of the gap; InstanceNorm, which mixes nothing and removes "
                    f"contrast, lies at {mean['IN']:.2f} dB.",
                    valid,
                    effect=interval(late, "dB, late population statistics"),
                    seeds=late.n,
                    tests=1,
                )
            )
        return judged

    def _pictures(self, results: Results, name: str, norm: str) -> list[list[float]]:
        """A row of pictures per seed, at the best rate."""
        rate = self.best_rate(results, norm=norm, loss="L1")
        runs = sorted(results.where(stage="test", norm=norm, loss="L1", rate=rate), key=lambda m: m.task.seeds)
        return [list(m.row(name)) for m in runs]

    def _floor(self, results: Results, norm: str) -> list[float]:
        return [min(row) for row in self._pictures(results, "bilinear", norm)]

    def _reached(self, results: Results, norm: str, mean: Mapping[str, float]) -> tuple[list[float], list[bool]]:
        """Steps to the validation PSNR at which the worse of the two ends, per seed."""
        curves = {n: self._pictures(results, "curve", n) for n in ("none", "BN")}
        target = min(statistics.median(row[-1] for row in rows) for rows in curves.values()) - 0.05
        steps = self._pictures(results, "steps", norm)[0]
        pairs = [first_reaching(steps, row, target) for row in curves[norm]]
        return [step for step, _ in pairs], [arrived for _, arrived in pairs]

    def figure(self, results: Results) -> Picture:
        """PSNR against steps, PSNR and contrast error by arm."""
        arms = list(dict.fromkeys(m.task.text("norm") for m in results))
        curves: list[Series] = []
        for k, norm in enumerate(arms):
            curves += spread(norm, self._pictures(results, "steps", norm)[0], self._pictures(results, "curve", norm), k)
        plots = [Plot("while training", "step", "validation PSNR [dB]", tuple(curves))]
        for name, what in (("psnr", "test PSNR [dB]"), ("contrast", "|ln(contrast / target's)|")):
            rows = [[statistics.mean(row) for row in self._pictures(results, name, norm)] for norm in arms]
            within = [Interval(statistics.mean(r), min(r), max(r)) for r in rows]
            plots.append(
                Plot(
                    what,
                    "",
                    what,
                    (points("", range(len(arms)), [i.value for i in within], within=within),),
                    ticks=tuple(arms),
                )
            )
        return Picture(
            "Super-resolution by normalizer, each at its own best rate: mean and range over seeds.", tuple(plots)
        )


@torch.no_grad()
def _restored(network: Restorer, high: Tensor) -> tuple[list[float], list[float]]:
    network.eval()
    found = network(halved(high))
    return psnr(found, high), contrast_error(found, high)


EXPERIMENT = SuperResolution()
