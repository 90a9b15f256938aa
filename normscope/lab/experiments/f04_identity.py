"""F04: learning the identity, and contrast maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.restoration import Restorer, patches, scenes
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, descend
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Identity"]

STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 400, "full": 10_000}
NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN", "IN"),
    "cpu": ("none", "BN", "IN", "LN"),
    "full": ("none", "BN", "IN", "LN", "GN"),
}
BATCH, PATCH = 8, 16
MAPS = {"identity": "y = x", "doubled": "y = 2x", "own scale": "y = σ(x)·x", "shape": "y = (x − μ(x))/σ(x)"}


class Identity(Tuned):
    """A small network that is to return what it gets, at its own or another contrast."""

    registration = register(
        "F04",
        statement="γ and β could restore what normalizing removes, but learning to do so costs; better do without.",
        source="a tutorial; AdaDM 2021",
        confirms="the log₁₀ of the error with it − without, the mean over the maps that keep contrast, each tuned, "
        "lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0},
        design="2 residual blocks of 16 channels and no skip around them, patches of 16 × 16 of procedural textures "
        "stretched to a contrast of 0.2 to 1, batch 8, squared error, Adam; three rates tuned with 2 seeds for every "
        "arm. Maps: x; 2x; x times its own standard deviation; x without its mean and contrast. The error is over 256 "
        "patches of pictures not trained on, in evaluation mode, relative to the mean square of the target.",
        cuts=("GroupNorm", "10 000 steps down to 400", "10 seeds down to 8"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every map with every normalizer."""
        return [
            {"net": "restorer", "map": name, "norm": norm, "steps": STEPS[profile]}
            for name in MAPS
            for norm in NORMS[profile]
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train, and report on pictures not trained on."""
        pictures, which = scenes("textures"), task.text("map")
        network = Restorer(task.text("norm"), task.seeds[0], blocks=2, residual=False)

        def losses() -> Iterator[Tensor]:
            for x in patches(pictures.train, BATCH, PATCH, task.seeds[0]):
                yield F.mse_loss(network(x), _mapped(x, which))

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), adam=True)
        network.eval()
        found = {}
        with torch.no_grad():
            for name, held in (("valid", pictures.valid), ("error", pictures.test)):
                x = next(patches(list(held[:, 0]), 256, PATCH, 0))
                y = _mapped(x, which)
                error = float((F.mse_loss(network(x), y) / y.square().mean()).log10())
                found[name] = [error if math.isfinite(error) else 3.0]
        return {"error": found["error"], "valid": [-found["valid"][0]]}

    def _errors(self, results: Results, name: str) -> dict[str, tuple[float, ...]]:
        norms = results.texts("norm")
        return {norm: self.at_best(results, "error", map=name, norm=norm) for norm in norms}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Maps that keep contrast, and the one that does not."""
        task = next(iter(results)).task
        valid = f"procedural textures, 2 residual blocks of 16 channels, {task['steps']} steps, tuned"
        errors = {name: self._errors(results, name) for name in MAPS}
        keeping = [name for name in MAPS if name != "shape"]
        mean = {
            norm: [sum(c) / len(c) for c in zip(*(errors[name][norm] for name in keeping), strict=True)]
            for norm in errors["shape"]
        }
        listed = "; ".join(f"{MAPS[name]}: {told(rows, '.2f')}" for name, rows in errors.items())
        return (
            by_effect(
                ("000-17",),
                "does normalizing cost where contrast must be kept?",
                paired_effect(mean["BN"], mean["none"]),
                f"log₁₀ of the relative error, {listed}",
                valid,
                unit="log₁₀ of the error, with − without",
            ),
            by_effect(
                ("000-18",),
                "does removing contrast help where it is not wanted?",
                paired_effect(errors["shape"]["none"], errors["shape"]["IN"]),
                "Target without contrast: the error without less that with InstanceNorm",
                valid,
                unit="log₁₀ of the error, without − InstanceNorm",
            ),
            by_effect(
                (),
                "can InstanceNorm not keep an image's own scale?",
                paired_effect(errors["own scale"]["IN"], errors["own scale"]["none"]),
                "Target of the image's own scale: the error with InstanceNorm less that without",
                valid,
                unit="log₁₀ of the error, InstanceNorm − without",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Errors by map and normalizer."""
        groups = {MAPS[name]: self._errors(results, name) for name in MAPS}
        plot = beside("what the network is to return", "log₁₀ of the relative error", groups)
        return Picture("Error in evaluation mode by normalizer, mean and range over seeds, every arm tuned.", (plot,))


def _mapped(x: Tensor, name: str) -> Tensor:
    if name == "identity":
        return x
    if name == "doubled":
        return 2 * x
    deviation = x.std((1, 2, 3), keepdim=True)
    if name == "own scale":
        return deviation * x
    return (x - x.mean((1, 2, 3), keepdim=True)) / (deviation + 0.02)


EXPERIMENT = Identity()
