"""The recipes: name → arms, each a job at its published size."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import normscope as ns
from normscope.errors import ArgumentError
from normscope.lab.recipes.items import Boxes, Crops, Restored, Sequences, noisy
from normscope.lab.recipes.job import Items, Job, Schedule
from normscope.lab.recipes.networks import BNInception, Detector, DnCNN, Pixels, ResNet50
from normscope.lab.restoration import Restorer, halved, psnr

__all__ = ["RECIPES", "Recipe", "find", "named", "resized"]


@dataclass(frozen=True)
class Recipe:
    """A published experiment at its size.

    Attributes:
        source: Paper, and the numbers that it reports.
        layout: What the folder of data holds.
        arms: Name → job.
    """

    title: str
    source: str
    layout: str
    arms: Mapping[str, Job]


def named(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES) or list(RECIPES)
        raise ArgumentError(f"there is no recipe {name!r}", cure=f"one of {', '.join(close)}")
    return RECIPES[name]


def find(name: str, arm: str) -> Job:
    """The job of an arm.

    Raises:
        ArgumentError: there is no such recipe or arm.
    """
    recipe = named(name)
    if arm not in recipe.arms:
        raise ArgumentError(f"{name} has no arm {arm!r}", cure=f"one of {', '.join(recipe.arms)}")
    return recipe.arms[arm]


# --- classification ---------------------------------------------------------------------------------------------------


def _hits(scores: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Accuracy of the first, and among the first five."""
    order = scores.topk(min(5, scores.shape[1])).indices == y[:, None]
    return {"top-1": order[:, 0], "top-5": order.any(1)}


def _crops(*, training: bool, light: bool = False) -> Callable[[Path, int], Items]:
    part = "train" if training else "val"
    return lambda folder, edge: Crops(folder / part, edge, training=training, light=light)


def _inception(steps: float, rate: float, *, norm: str = "BN", activation: str = "relu", modified: bool = True) -> Job:
    """With the paper's modifications or without: no dropout, a fifth of the decay, less distortion, no responses."""
    # GoogLeNet's rate falls by 4 % every 8 epochs of 1.28 million images; the paper's six times as fast.
    epochs = steps * 32 / 1.28e6
    factor = 0.96 ** (epochs / 8 * (6 if modified else 1))
    decay = 2e-4 / (5 if modified else 1)  # the decay of Inception is not in the paper; 2e-4 is GoogLeNet's in Caffe
    return Job(
        network=lambda classes, _: BNInception(
            classes, norm=norm, activation=activation, responses=not modified, dropout=0.0 if modified else 0.4
        ),
        training=_crops(training=True, light=not modified),
        testing=_crops(training=False),
        loss=F.cross_entropy,
        scores=_hits,
        schedule=Schedule(int(steps), 32, rate, decay=decay, factor=factor),
        edge=224,
    )


def _resnet(norm: str, images: int) -> Job:
    """So many images per process, eight processes: 100 epochs, the rate 0.1 for 32 images."""
    steps = round(100 * 1.281167e6 / (8 * images))
    return Job(
        network=lambda classes, _: ResNet50(classes, norm=norm),
        training=_crops(training=True),
        testing=_crops(training=False),
        loss=F.cross_entropy,
        scores=_hits,
        schedule=Schedule(steps, images, 0.1 * images / 32, decay=1e-4, falls=(0.3, 0.6, 0.9), factor=0.1),
        edge=224,
    )


# --- detection ------------------------------------------------------------------------------------------------------


def _overlap(output: Tensor, y: Tensor) -> Tensor:
    """Intersection over union of the boxes that cells tell and those that they lie in, (n, g, g)."""
    told, true = output[:, -4:].clamp(max=4).exp(), y[:, 1:]
    sides = torch.minimum(told, true)
    common = (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])
    areas = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (told, true)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-12)


def _detection(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every cell, and −ln of the overlap where there is an object (Yu et al. 2016, UnitBox)."""
    objects = y[:, 0] > 0
    boxes = -_overlap(output, y).clamp(min=1e-6).log()[objects].sum() / objects.sum().clamp(min=1)
    return F.cross_entropy(output[:, :-4], y[:, 0].long()) + boxes


def _cells(output: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Per picture, over the cells of objects: the share named rightly, and the mean overlap of the boxes."""
    objects = y[:, 0] > 0
    count = objects.sum((1, 2)).clamp(min=1)
    right = (output[:, :-4].argmax(1) == y[:, 0]) & objects
    return {"named": right.sum((1, 2)) / count, "overlap": (_overlap(output, y) * objects).sum((1, 2)) / count}


def _detector(norm: str, images: int, *, frozen: bool = False) -> Job:
    """90 000 steps, the rate 0.02 for 16 images in all of eight processes."""

    def network(classes: int, _: int) -> Detector:
        made = Detector(classes, norm=norm)
        if frozen:
            ns.freeze(made)
        return made

    def items(part: str) -> Callable[[Path, int], Items]:
        return lambda folder, edge: Boxes(folder / part, edge, training=part == "train")

    return Job(
        network=network, training=items("train"), testing=items("val"), loss=_detection, scores=_cells, edge=800,
        schedule=Schedule(90_000, images, 0.02 * images / 2, decay=1e-4, falls=(2 / 3, 8 / 9), factor=0.1), size=8,
    )  # fmt: skip


# --- restoration ------------------------------------------------------------------------------------------------------


def _quality(found: Tensor, clean: Tensor) -> dict[str, Tensor]:
    return {"psnr": torch.tensor(psnr(found, clean), device=found.device)}


def _restored(damage: Callable[[Tensor, torch.Generator], Tensor], *, training: bool) -> Callable[[Path, int], Items]:
    part = "train" if training else "val"
    return lambda folder, edge: Restored(folder / part, edge, training=training, damage=damage)


def _half(clean: Tensor, _: torch.Generator) -> Tensor:
    return halved(clean[None])[0]


def _dncnn(norm: str) -> Job:
    # 50 epochs of 128 × 1600 patches, the rate falling from 1e-1 to 1e-4 in the paper's SGD; here Adam's.
    schedule = Schedule(80_000, 128, 1e-3, optimizer="adam", falls=(0.6,), factor=0.1)
    return Job(
        network=lambda *_: DnCNN(norm), training=_restored(noisy, training=True),
        testing=_restored(noisy, training=False), loss=F.mse_loss, scores=_quality, schedule=schedule, edge=40,
    )  # fmt: skip


def _edsr(norm: str) -> Job:
    schedule = Schedule(300_000, 16, 1e-4, optimizer="adam", falls=(2 / 3,), factor=0.5)
    return Job(
        network=lambda *_: Restorer(norm, 0, blocks=16, channels=64, upscale=True),
        training=_restored(_half, training=True), testing=_restored(_half, training=False), loss=F.l1_loss,
        scores=_quality, schedule=schedule, edge=96,
    )  # fmt: skip


# --- sequences --------------------------------------------------------------------------------------------------------


def _pixels(norm: str, permuted: bool) -> Job:
    def items(part: str) -> Callable[[Path, int], Items]:
        return lambda folder, edge: Sequences(folder / part, edge, permuted=permuted)

    return Job(
        network=lambda classes, edge: Pixels(classes, edge**2, norm=norm), training=items("train"),
        testing=items("val"), loss=F.cross_entropy, scores=_hits, edge=28,
        schedule=Schedule(100_000, 64, 1e-3, optimizer="rmsprop", clip=1.0),
    )  # fmt: skip


CLASSES = "train/<class>/<image> and val/<class>/<image>"
PICTURES = "train/<image> and val/<image>, at any depth"

RECIPES = {
    "bn-inception": Recipe(
        "Inception on ImageNet with and without Batch Normalization",
        "Ioffe & Szegedy 2015, Figure 3: 72.2 % top-1 after 31.0 million steps of 32 without; with it alone 72.7 "
        "(13.3 million to 72.2), x5 73.0 (2.1), x30 74.8 (2.7), x5-sigmoid 69.8; an ensemble of six 4.9 % top-5 error",
        CLASSES,
        {
            "inception": _inception(31.0e6, 0.0015, norm="none", modified=False),
            "baseline": _inception(31.0e6, 0.0015, modified=False),
            "x5": _inception(6e6, 0.0075),
            "x30": _inception(6e6, 0.045),
            "x5-sigmoid": _inception(6e6, 0.0075, activation="sigmoid"),
            "sigmoid": _inception(6e6, 0.0015, norm="none", activation="sigmoid"),
        },
    ),
    "resnet50": Recipe(
        "ResNet-50 on ImageNet by the statistics batch",
        "Wu & He 2018, Table 2: error 23.6, 23.7, 24.8, 27.3, 34.7 % with 32, 16, 8, 4, 2 images per process; "
        "GroupNorm 24.1 to 24.2 throughout",
        CLASSES,
        {
            f"{told}-{images}": _resnet(norm, images)
            for told, norm in (("BN", "BN"), ("GN", "groups32"), ("LN", "LN"), ("IN", "IN"), ("Online", "Online"))
            for images in (32, 16, 8, 4, 2)
        },
    ),
    "detector": Recipe(
        "Fine-tuning of a detector with tiny batches",
        "Wu & He 2018, Table 4: box AP of Mask R-CNN on COCO 37.7 with frozen Batch Normalization, 38.6 with "
        "GroupNorm. This detector, of a single scale, tells classes and boxes of cells; what it reports is no AP",
        "train and val, each with annotations.json of COCO and the folder images; --weights of a resnet50",
        {
            "BN-2": _detector("BN", 2),
            "BN-1": _detector("BN", 1),
            "frozen-2": _detector("BN", 2, frozen=True),
            "Sync-2": _detector("Sync", 2),
            "GN-2": _detector("groups32", 2),
        },
    ),
    "dncnn": Recipe(
        "Denoising by DnCNN-S at σ = 25",
        "Zhang et al. 2017, Table II: 29.23 dB on BSD68",
        PICTURES,
        {"BN": _dncnn("BN"), "none": _dncnn("none"), "IN": _dncnn("IN"), "GN": _dncnn("groups32")},
    ),
    "edsr": Recipe(
        "Twofold super-resolution by a network of EDSR-baseline's size",
        "Lim et al. 2017, Table 1: 34.55 dB on DIV2K without Batch Normalization, 34.44 with it in SRResNet",
        PICTURES,
        {"none": _edsr("none"), "BN": _edsr("BN"), "IN": _edsr("IN"), "GN": _edsr("groups32")},
    ),
    "pixel-mnist": Recipe(
        "MNIST pixel by pixel",
        "Cooijmans et al. 2016, Table 1: in order 98.9 % for the LSTM and 99.0 with BN; permuted 90.2 and 95.4",
        CLASSES,
        {
            f"{norm}{'-permuted' if permuted else ''}": _pixels(norm, permuted)
            for norm in ("none", "BN", "LN")
            for permuted in (True, False)
        },
    ),
}


def resized(job: Job, *, steps: int | None, batch: int | None, edge: int | None) -> Job:
    """The same at another size, for a trial."""
    old = job.schedule
    schedule = dataclasses.replace(old, steps=steps or old.steps, batch=batch or old.batch)
    return dataclasses.replace(job, schedule=schedule, edge=edge or job.edge)
