"""F02: denoising, and whether it differs from super-resolution."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.restoration import TITLES, Restorer, available_scenes, halved, patches, psnr, scenes
from normscope.lab.sketch import points
from normscope.lab.training import Arm, Tuned, descend
from normscope.lab.verdicts import by_effect, interval, merge, ruled
from normscope.records import Judgement, Picture, Plot
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Denoising"]

BATCH, PATCH, LEVEL = 8, 32, 25 / 255
CASES: Mapping[ProfileName, tuple[tuple[str, bool], ...]] = {
    "quick": (("noise", True), ("enlarged", True)),
    "cpu": (("noise", True), ("noise", False), ("blind", True), ("enlarged", True)),
    "full": (
        ("noise", True),
        ("noise", False),
        ("blind", True),
        ("blind", False),
        ("enlarged", True),
        ("enlarged", False),
    ),
}
STEPS: Mapping[ProfileName, int] = {"quick": 15, "cpu": 800, "full": 30_000}
TASKS = {"noise": "noise of one level", "blind": "noise of any level", "enlarged": "super-resolution"}


class Denoising(Tuned):
    """The same network removes noise of one level, of any level, or the blur of an enlarged picture."""

    registration = register(
        "F02",
        statement="Batch Normalization suits denoising, whose residual is noise of one level, more than "
        "super-resolution.",
        source="tutorials; Zhang et al. 2017 (DnCNN)",
        confirms="PSNR with it − without lies above 0 for noise of one level with a residual target, and above "
        "that for super-resolution",
        refutes="it lies below 0; the interaction lies below 0",
        thresholds={"difference": 0, "interaction": 0},
        design="3 residual blocks of 16 channels; noise of σ = 25/255, or σ from 5 to 55, or the picture halved "
        "and enlarged (bilinear); target the residual or the picture; "
        "patches of 32 × 32, batch 8, squared error, Adam, two rates tuned with 2 seeds for every arm; PSNR "
        "over pictures not trained on.",
        cuts=("direct targets of the other two tasks", "30 000 steps down to 800", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every task with and without."""
        name = available_scenes() if profile != "quick" else "textures"
        return [
            {"data": name, "net": "restorer", "task": task, "residual": residual, "norm": norm, "steps": STEPS[profile]}
            for task, residual in CASES[profile]
            for norm in ("none", "BN")
        ]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train and restore."""
        pictures = scenes(task.text("data"))
        network = Restorer(task.text("norm"), task.seeds[0], blocks=3, residual=bool(task["residual"]))
        g = torch.Generator().manual_seed(500 + task.seeds[0])

        def losses() -> Iterator[Tensor]:
            for clean in patches(pictures.train, BATCH, PATCH, task.seeds[0]):
                yield F.mse_loss(network(_damaged(clean, task.text("task"), g)), clean)

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), adam=True)
        network.eval()
        found = {}
        with torch.no_grad():
            for name, clean in (("valid", pictures.valid), ("psnr", pictures.test)):
                # The same noise for all arms and seeds: test items are shared.
                damaged = _damaged(clean, task.text("task"), torch.Generator().manual_seed(0))
                found[name] = psnr(network(damaged), clean)
        return found | {"valid": [statistics.mean(found["valid"])]}

    def _gain(self, results: Results, task: str, residual: bool) -> list[float]:
        """With − without in dB, per seed."""
        rows = []
        for norm in ("BN", "none"):
            rate = self.best_rate(results, task=task, residual=residual, norm=norm)
            runs = results.where(stage="test", task=task, residual=residual, norm=norm, rate=rate)
            rows.append([statistics.mean(m.row("psnr")) for m in sorted(runs, key=lambda m: m.task.seeds)])
        return [a - b for a, b in zip(*rows, strict=True)]

    def _cases(self, results: Results) -> dict[tuple[str, bool], list[float]]:
        cases = dict.fromkeys((m.task.text("task"), bool(m.task["residual"])) for m in results)
        return {case: self._gain(results, *case) for case in cases}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The gain in denoising, and its difference from the gain in super-resolution."""
        task = results.where(stage="test")[0].task
        valid = f"{TITLES[task.text('data')]}, 3 residual blocks of 16 channels, {task['steps']} steps, tuned"
        gains = self._cases(results)
        main, other = paired_effect(gains["noise", True]), paired_effect(gains["enlarged", True])
        interaction = paired_effect(gains["noise", True], gains["enlarged", True])
        listed = ", ".join(
            f"{TASKS[name]}{'' if residual else ' (direct)'} {statistics.mean(row):+.2f} dB"
            for (name, residual), row in gains.items()
        )
        shared = self.shared(results, "valid", task="noise", residual=True, norm="BN")
        text = f"PSNR with it − without: {listed}; denoising, on validation pictures with it {shared}"
        noise = by_effect(("000-22",), "does it help denoising?", main, text, valid, unit="dB, with − without")
        enlarged = by_effect(
            (), "does it help super-resolution by the same network?", other, text, valid, unit="dB, with − without"
        )
        return (
            noise,
            enlarged,
            ruled(
                ("000-21",),
                "very good for both?",
                merge([noise.verdict, enlarged.verdict]),
                f"{text}.",
                f"denoising and super-resolution; {valid}",
                effect=interval(main, "dB, denoising"),
                seeds=main.n,
            ),
            by_effect(
                ("000-23",),
                "does it suit denoising more than super-resolution?",
                interaction,
                f"{text}; the first less the last {interaction.value:+.2f} dB",
                valid,
                unit="dB, interaction",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Gains with their intervals."""
        gains = self._cases(results)
        within = [interval(paired_effect(row)) for row in gains.values()]
        dots = [(k, value) for k, row in enumerate(gains.values()) for value in row]
        series = (
            points("a seed", [k + 0.1 for k, _ in dots], [v for _, v in dots], 4),
            points("mean and 95 % interval", range(len(within)), [i.value for i in within], within=within),
        )
        ticks = tuple(f"{TASKS[name]}{'' if residual else ', direct'}" for name, residual in gains)
        plot = Plot(
            "what Batch Normalization adds",
            "",
            "PSNR with − without [dB]",
            series,
            ticks=ticks,
            levels=(("no difference", 0.0),),
        )
        return Picture(
            "The gain of Batch Normalization in denoising and in super-resolution, the same network, tuned.", (plot,)
        )


def _damaged(clean: Tensor, task: str, g: torch.Generator) -> Tensor:
    if task == "enlarged":
        return F.interpolate(halved(clean), scale_factor=2, mode="bilinear", align_corners=False)
    noise = torch.randn(clean.shape, generator=g)
    if task == "noise":
        return clean + LEVEL * noise
    levels = (5 + 50 * torch.rand(len(clean), 1, 1, 1, generator=g)) / 255
    return clean + levels * noise


EXPERIMENT = Denoising()
