"""F05: style transfer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.restoration import Restorer, patches, scenes
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, descend
from normscope.lab.verdicts import by_effect, by_rivals, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect, slope

__all__ = ["EXPERIMENT", "Style"]

STEPS: Mapping[ProfileName, int] = {"quick": 15, "cpu": 400, "full": 40_000}
NORMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN", "BN alike", "IN"),
    "cpu": ("none", "BN", "BN alike", "IN", "LN"),
    "full": ("none", "BN", "BN alike", "IN", "LN", "GN"),
}
BATCH, PATCH, WEIGHT = 4, 32, 10.0
CONTRASTS = (0.25, 0.5, 1.0)


class Style(Tuned):
    """A network that gives pictures the texture of another, measured at several contrasts of the content."""

    registration = register(
        "F05",
        statement="Batch Normalization can be used in style transfer, where contrast should not matter; or it suffers "
        "from mixing unrelated images, and InstanceNorm comes first.",
        source="tutorials; Ulyanov et al. 2016",
        confirms="the log of the loss with it − without, each tuned, lies below 0",
        refutes="it lies above 0",
        thresholds={"difference": 0},
        design="Feature maps of two layers of fixed random orthogonal 5 × 5 filters with ReLU; style is the Gram "
        "matrices of one procedural texture, content the second layer's maps, the loss content + 10 × style. The "
        "network has 2 residual blocks of 16 channels; procedural content in patches of 32 × 32, contrast 0.25 to 1 "
        "by patch, batch 4, Adam, two rates tuned with 2 seeds for every arm. None; Batch Normalization, batches of "
        "different pictures, or of patches of one; InstanceNorm; LayerNorm. The loss is over content not trained on, "
        "in evaluation mode, at contrasts 0.25, 0.5 and 1, and its slope against their logarithm.",
        cuts=("GroupNorm", "40 000 steps down to 400", "10 seeds down to 6", "VGG-16's features"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (1e-3, 3e-3),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer."""
        return [{"net": "restorer", "norm": norm, "steps": STEPS[profile]} for norm in NORMS[profile]]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train, and report at every contrast."""
        pictures, seed = scenes("textures"), task.seeds[0]
        norm, _, alike = task.text("norm").partition(" ")
        network = Restorer(norm, seed, blocks=2)
        g = torch.Generator().manual_seed(700 + seed)

        def contents() -> Iterator[Tensor]:
            sources = [patches(pictures.train[k : k + 1], BATCH, PATCH, seed + k) for k in range(len(pictures.train))]
            mixed = patches(pictures.train, BATCH, PATCH, seed)
            while True:
                which = int(torch.randint(len(sources), (), generator=g))
                yield next(sources[which]) if alike else next(mixed)

        def losses() -> Iterator[Tensor]:
            for content in contents():
                x = _at(content, 0.25 + 0.75 * torch.rand(BATCH, 1, 1, 1, generator=g))
                yield _loss(network(x), x)

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), adam=True)
        network.eval()
        found: dict[str, list[float]] = {}
        with torch.no_grad():
            for name, held in (("valid", pictures.valid), ("loss", pictures.test)):
                contents_ = [_at(held, torch.tensor(c)) for c in CONTRASTS]
                values = [float(_loss(network(x), x)) for x in contents_]
                found[name] = [math.log(v) if math.isfinite(v) else 10.0 for v in values]
        return {"loss": found["loss"], "valid": [-sum(found["valid"])]}

    def _losses(self, results: Results) -> dict[str, list[tuple[float, ...]]]:
        """Normalizer → a row of contrasts per seed."""
        found = {}
        for norm in results.texts("norm"):
            runs = results.where(stage="test", norm=norm, rate=self.best_rate(results, norm=norm))
            found[norm] = [m.row("loss") for m in sorted(runs, key=lambda m: m.task.seeds)]
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Of use, by mixing, InstanceNorm, and contrast."""
        task = results.where(stage="test")[0].task
        valid = f"procedural textures, random features, 2 residual blocks of 16 channels, {task['steps']} steps, tuned"
        rows = self._losses(results)
        mean = {norm: [sum(r) / len(r) for r in found] for norm, found in rows.items()}
        logs = [math.log(c) for c in CONTRASTS]
        steep = {norm: [abs(float(v)) for v in slope(logs, np.array(found))] for norm, found in rows.items()}
        listed = f"ln of the loss: {told(mean, '.2f')}; its slope against ln contrast: {told(steep, '.2f')}"
        gain = paired_effect(mean["none"], mean["BN"])
        judged = [
            by_effect(
                ("000-24",),
                "is it of use in style transfer?",
                gain,
                listed,
                valid,
                unit="ln of the loss, without − with",
            ),
            by_effect(
                ("000-15",),
                "does the loss depend less on the content's contrast with it?",
                paired_effect(steep["none"], steep["BN"]),
                listed,
                valid,
                unit="|slope|, without − with",
            ),
        ]
        alike = mean.get("BN alike", mean["BN"])
        judged.append(
            by_effect(
                ("000-27",),
                "does it suffer from mixing unrelated images in a batch?",
                paired_effect(mean["BN"], alike),
                f"ln of the loss trained on mixed batches − on batches of one picture; {listed}",
                valid,
                unit="ln of the loss, mixed − alike",
            )
        )
        rivals = {n: [-v for v in mean[n]] for n in mean if n not in ("IN", "none")}
        judged.append(
            by_rivals(
                ("004-20",),
                "is InstanceNorm the best normalizer here?",
                [-v for v in mean["IN"]],
                rivals,
                f"{listed}.",
                valid,
                unit="−ln of the loss",
            )
        )
        return tuple(judged)

    def figure(self, results: Results) -> Picture:
        """Loss at every contrast."""
        rows = self._losses(results)
        groups = {
            f"contrast {c:g}": {norm: [r[k] for r in found] for norm, found in rows.items()}
            for k, c in enumerate(CONTRASTS)
        }
        plot = beside("style and content together", "ln of the loss", groups)
        return Picture("Loss on content not trained on, mean and range over seeds, every arm tuned.", (plot,))


def _at(x: Tensor, contrast: Tensor) -> Tensor:
    return 0.5 + contrast * (x - 0.5)


@lru_cache(maxsize=1)
def _filters() -> tuple[Tensor, Tensor]:
    """Random orthogonal filters, the same for all runs."""
    g = torch.Generator().manual_seed(0)
    first, second = torch.empty(16, 25), torch.empty(32, 16 * 25)
    for weight in (first, second):
        nn.init.orthogonal_(weight, gain=math.sqrt(2), generator=g)
    return first.reshape(16, 1, 5, 5), second.reshape(32, 16, 5, 5)


def _features(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _filters()
    a = F.conv2d(x - 0.5, first, stride=1).relu()
    return a, F.conv2d(a, second, stride=2).relu()


def _grams(maps: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [torch.einsum("nchw,ndhw->ncd", m, m) / m[0, 0].numel() for m in maps]


@lru_cache(maxsize=1)
def _style() -> tuple[Tensor, ...]:
    """Gram matrices of the last texture that nothing is trained on."""
    return tuple(_grams(_features(scenes("textures").test[-1:])))


def _loss(found: Tensor, content: Tensor) -> Tensor:
    ours, theirs = _features(found), _features(content)
    style = [
        (a - b).square().sum((1, 2)).mean() / b.square().sum() for a, b in zip(_grams(ours), _style(), strict=True)
    ]
    return F.mse_loss(ours[1], theirs[1]) / theirs[1].square().mean() + WEIGHT * torch.stack(style).mean()


EXPERIMENT = Style()
