"""What the recipes read: folders of images, cropped and disturbed by each draw's own seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.data import by_class, images_in, read_image
from normscope.errors import DataError
from normscope.lab.recipes.job import Draw

__all__ = ["Boxes", "Crops", "Restored", "Sequences", "noisy"]

# Of ImageNet's pixels, in the three colours.
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Crops:
    """Images in a folder per class: in training a random part of each, perhaps mirrored; else its middle.

    Args:
        folder: <folder>/<class>/<image>.
        edge: Of what is returned, in pixels.
        training: Random parts.
        light: In training, brightness, contrast and colour change too ("photometric distortions").
    """

    def __init__(self, folder: Path, edge: int, *, training: bool, light: bool = False) -> None:
        self.files, self.labels, names = by_class(folder)
        self.classes, self.edge, self.training, self.light = len(names), edge, training, light

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(read_image(self.files[draw.index])).permute(2, 0, 1).float() / 255
        g = draw.generator()
        part = _part(pixels, g) if self.training else _middle(pixels)
        x = F.interpolate(part[None], (self.edge, self.edge), mode="bilinear", antialias=True)[0]
        if self.training and torch.rand((), generator=g) < 0.5:
            x = x.flip(2)
        if self.training and self.light:
            contrast, brightness = (0.8 + 0.4 * float(torch.rand((), generator=g)) for _ in range(2))
            x = ((x - x.mean()) * contrast + x.mean()) * brightness + 0.05 * torch.randn(3, 1, 1, generator=g)
        x = (x - MEAN[:, None, None]) / DEVIATION[:, None, None]
        return x, torch.tensor(self.labels[draw.index])


def _part(x: Tensor, g: torch.Generator) -> Tensor:
    """8 to 100 % of the area, sides 3:4 to 4:3 (Szegedy et al. 2015, §6); what does not fit becomes the middle."""
    height, width = x.shape[1:]
    area = height * width * (0.08 + 0.92 * float(torch.rand((), generator=g)))
    ratio = math.exp(math.log(4 / 3) * (2 * float(torch.rand((), generator=g)) - 1))
    h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
    if not 0 < h <= height or not 0 < w <= width:
        return _middle(x)
    top = int(torch.randint(height - h + 1, (), generator=g))
    left = int(torch.randint(width - w + 1, (), generator=g))
    return x[:, top : top + h, left : left + w]


def _middle(x: Tensor) -> Tensor:
    """The middle square of seven eighths of the shorter side."""
    height, width = x.shape[1:]
    side = max(1, round(0.875 * min(height, width)))
    top, left = (height - side) // 2, (width - side) // 2
    return x[:, top : top + side, left : left + side]


class Restored:
    """Grey patches, damaged, and as they were; in training random ones, else the middle of each picture.

    Args:
        folder: Of images, at any depth.
        edge: Of a patch, in pixels.
        training: Random patches.
        damage: From a clean patch (1, h, w) and a generator.
    """

    classes = 0

    def __init__(
        self, folder: Path, edge: int, *, training: bool, damage: Callable[[Tensor, torch.Generator], Tensor]
    ) -> None:
        self.files, self.edge, self.training, self.damage = images_in(folder), edge, training, damage

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        path, g = self.files[draw.index], draw.generator()
        pixels = torch.from_numpy(read_image(path, grey=True)).float() / 255
        spare = [n - self.edge for n in pixels.shape]
        if min(spare) < 0:
            raise DataError(f"{path} is smaller than a patch of {self.edge} pixels", cure="leave it out, or --edge")
        top, left = (int(torch.randint(n + 1, (), generator=g)) if self.training else n // 2 for n in spare)
        clean = pixels[None, top : top + self.edge, left : left + self.edge]
        if self.training and torch.rand((), generator=g) < 0.5:
            clean = clean.flip(2)
        return self.damage(clean, g), clean


class Boxes:
    """Pictures with boxes around objects, as COCO publishes them, squeezed to edge × edge.

    The second of a pair is (5, g, g) for cells of 32 × 32 pixels: 0 for background or the class from 1 on; and the
    distances of the cell's centre to the left, top, right and bottom side of its box, in edges. A cell belongs to the
    smallest box around its centre; a box around no centre has the cell of its own.

    Args:
        folder: Of annotations.json and the folder "images".
        edge: In pixels.
        training: Mirror half of them.
    """

    def __init__(self, folder: Path, edge: int, *, training: bool) -> None:
        self.folder, self.edge, self.training = folder, edge, training
        path = folder / "annotations.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            classes = {one["id"]: k for k, one in enumerate(sorted(said["categories"], key=lambda one: one["id"]))}
            self.pictures = [(one["file_name"], one["width"], one["height"]) for one in said["images"]]
            self.boxes: list[list[tuple[int, list[float]]]] = [[] for _ in self.pictures]
            place = {one["id"]: k for k, one in enumerate(said["images"])}
            for one in said["annotations"]:
                if not one.get("iscrowd", 0):
                    self.boxes[place[one["image_id"]]].append((classes[one["category_id"]], one["bbox"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            cure = "put COCO's instances_*.json there under this name"
            raise DataError(f"{path} holds no annotations of COCO's form", cure=cure, reason=error) from error
        self.classes = len(classes)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        name, width, height = self.pictures[draw.index]
        pixels = torch.from_numpy(read_image(self.folder / "images" / name)).permute(2, 0, 1).float() / 255
        x = F.interpolate(pixels[None], (self.edge, self.edge), mode="bilinear", antialias=True)[0]
        y = _cells(self.boxes[draw.index], width, height, math.ceil(self.edge / 32))
        if self.training and torch.rand((), generator=draw.generator()) < 0.5:
            x, y = x.flip(2), y.flip(2)[[0, 3, 2, 1, 4]]
        return (x - MEAN[:, None, None]) / DEVIATION[:, None, None], y


def _cells(boxes: list[tuple[int, list[float]]], width: float, height: float, g: int) -> Tensor:
    """What every cell is to answer; see `Boxes`."""
    y = torch.zeros(5, g, g)
    centre = (torch.arange(g) + 0.5) / g
    for label, (left, top, w, h) in sorted(boxes, key=lambda one: -one[1][2] * one[1][3]):
        x0, y0, x1, y1 = left / width, top / height, (left + w) / width, (top + h) / height
        across, down = (centre > x0) & (centre < x1), (centre > y0) & (centre < y1)
        inside = down[:, None] & across[None, :]
        inside[min(g - 1, int(g * (y0 + y1) / 2)), min(g - 1, int(g * (x0 + x1) / 2))] = True
        rows, columns = inside.nonzero(as_tuple=True)
        distances = (centre[columns] - x0, centre[rows] - y0, x1 - centre[columns], y1 - centre[rows])
        y[0, rows, columns] = label + 1
        y[1:, rows, columns] = torch.stack(distances).clamp(min=0)
    return y


def noisy(clean: Tensor, g: torch.Generator) -> Tensor:
    """With noise of σ = 25/255."""
    return clean + 25 / 255 * torch.randn(clean.shape, generator=g)


class Sequences:
    """Grey images in a folder per class, shrunk to edge × edge, their pixels one by one in one order for all.

    Args:
        folder: <folder>/<class>/<image>.
        edge: In pixels.
        permuted: In an order drawn once; else row by row.
    """

    def __init__(self, folder: Path, edge: int, *, permuted: bool) -> None:
        self.files, self.labels, names = by_class(folder)
        self.classes, self.edge = len(names), edge
        order = torch.randperm(edge * edge, generator=torch.Generator().manual_seed(0))
        self.order = order if permuted else torch.arange(edge * edge)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(read_image(self.files[draw.index], grey=True)).float() / 255
        if pixels.shape != (self.edge, self.edge):
            pixels = F.interpolate(pixels[None, None], (self.edge, self.edge), mode="bilinear", antialias=True)[0, 0]
        return pixels.flatten()[self.order, None], torch.tensor(self.labels[draw.index])
