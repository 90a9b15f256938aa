"""F03: are the residuals independent and Gaussian?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.restoration import TITLES, available_scenes, halved, patches, scenes
from normscope.lab.sketch import beside
from normscope.lab.verdicts import interval, ruled
from normscope.records import Judgement, LabVerdict, Picture
from normscope.statistics import Effect, decide, paired_effect

__all__ = ["EXPERIMENT", "Residuals"]

COUNT: Mapping[ProfileName, int] = {"quick": 64, "cpu": 512, "full": 4096}
LEVEL, PATCH = 25 / 255, 32
NAMES = {"spread": "spread of patch deviations", "kurtosis": "excess kurtosis", "correlation": "lag-1 correlation"}


class Residuals(Experiment):
    """What a network has to add: to a noisy picture, and to an enlarged one."""

    registration = register(
        "F03",
        statement="The residual of denoising is independent Gaussian noise of one level; that of super-resolution is "
        "not.",
        source="tutorials; Zhang et al. 2017 (DnCNN)",
        confirms="of the noise, the spread of the patches' standard deviations is surely below 5 %, excess kurtosis "
        "below 0.1, neighbours' correlation below 0.02; of super-resolution, the spread above 30 % and kurtosis above "
        "3",
        refutes="one of them surely lies on the other side",
        thresholds={
            "noise spread": 0.05, "noise kurtosis": 0.1, "noise correlation": 0.02, "enlarged spread": 0.3,
            "enlarged kurtosis": 3,
        },
        design="Patches of 32 × 32 from pictures, drawn by seed; the residual of noise of σ = 25/255, and that of "
        "halving (means over 2 × 2) and enlarging (bilinear). Spread: standard deviation of the patches' standard "
        "deviations over their mean. Kurtosis and correlation of horizontal neighbours over all pixels.",
        cuts=("4096 patches down to 512", "10 seeds down to 8"),
    )  # fmt: skip
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """One draw of patches per seed."""
        name = available_scenes() if profile != "quick" else "textures"
        return [Task(self.name, (("data", name), ("patches", COUNT[profile])), (seed,)) for seed in seeds]

    def measure(self, task: Task) -> Numbers:
        """Three numbers of both residuals."""
        pictures = scenes(task.text("data")).train
        clean = next(patches(pictures, task.whole("patches"), PATCH, task.seeds[0]))
        enlarged = F.interpolate(halved(clean), scale_factor=2, mode="bilinear", align_corners=False)
        noise = LEVEL * torch.randn(clean.shape, generator=torch.Generator().manual_seed(task.seeds[0]))
        return {
            f"{kind} {name}": value
            for kind, residual in (("noise", noise), ("enlarged", clean - enlarged))
            for name, value in _facts(residual).items()
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Both residuals against their thresholds."""
        task = next(iter(results)).task
        valid = f"{TITLES[task.text('data')]}, {task['patches']} patches of {PATCH} × {PATCH}"
        listed = {
            kind: ", ".join(f"{what} {_mean(results, f'{kind} {name}'):.3f}" for name, what in NAMES.items())
            for kind in ("noise", "enlarged")
        }
        below = {
            name: paired_effect([self.threshold(f"noise {name}") - abs(v) for v in _values(results, f"noise {name}")])
            for name in NAMES
        }
        above = {
            name: paired_effect([v - self.threshold(f"enlarged {name}") for v in _values(results, f"enlarged {name}")])
            for name in ("spread", "kurtosis")
        }
        return (
            ruled(
                ("000-22",),
                "is the residual of denoising independent noise of one level?",
                _all(below),
                f"Noise: {listed['noise']}.",
                valid,
                effect=interval(below["spread"], "spread, 0.05 − measured"),
                seeds=len(results),
                tests=len(below),
            ),
            ruled(
                ("000-23",),
                "is that of super-resolution neither?",
                _all(above),
                f"Super-resolution: {listed['enlarged']}.",
                valid,
                effect=interval(above["spread"], "spread, measured − 0.3"),
                seeds=len(results),
                tests=len(above),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """The numbers side by side."""
        kinds = {"noise": "noise", "enlarged": "super-resolution"}
        plots = [
            beside(what, what, {"": {told: _values(results, f"{kind} {name}") for kind, told in kinds.items()}})
            for name, what in NAMES.items()
        ]
        return Picture(
            "What a network has to add to a noisy and to an enlarged picture; a draw per seed.", tuple(plots)
        )


def _facts(residual: Tensor) -> dict[str, float]:
    deviations = residual.std((1, 2, 3))
    z = (residual - residual.mean()) / residual.std()
    return {
        "spread": float(deviations.std() / deviations.mean()),
        "kurtosis": float(z.pow(4).mean() - 3),
        "correlation": float((z[..., 1:] * z[..., :-1]).mean()),
    }


def _values(results: Results, name: str) -> list[float]:
    return [m.number(name) for m in sorted(results, key=lambda m: m.task.seeds)]


def _mean(results: Results, name: str) -> float:
    values = _values(results, name)
    return sum(values) / len(values)


def _all(effects: Mapping[str, Effect]) -> LabVerdict:
    """CONFIRMED if all are, REFUTED if one is."""
    found = {decide(effect) for effect in effects.values()}
    return "REFUTED" if "REFUTED" in found else found.pop() if len(found) == 1 else "UNDECIDED"


EXPERIMENT = Residuals()
