"""Claims that cannot both hold, and what decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normscope.records import Contradiction, Experiment

__all__ = ["CONTRADICTIONS", "contradictions"]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A contradiction: its sides as claims, the experiments that decide, and what would settle it."""

    code: str
    text: str
    claims: tuple[str, ...]
    experiments: tuple[str, ...]


CONTRADICTIONS = (
    _Pair(
        "X1",
        "One text calls Batch Normalization bad for super-resolution, and very good for super-resolution and "
        "denoising.",
        ("000-14", "000-20", "000-21", "000-22", "000-23"),
        ("F01", "F02"),
    ),
    _Pair(
        "X2",
        "It is said to suit style transfer, and style transfer is named as where it hurts; others put "
        "InstanceNorm first.",
        ("000-15", "000-24", "000-27"),
        ("F05",),
    ),
    _Pair(
        "X3",
        "With it sigmoid is said to beat ReLU; and ReLU is named as the cure for the sigmoid's saturation.",
        ("000-10", "001-11"),
        ("B07",),
    ),
    _Pair(
        "X4",
        "Its place: before the activation, after the linear map, or better after the activation.",
        ("001-23", "003-7", "004-4"),
        ("B08",),
    ),
    _Pair(
        "X5",
        "A text says that the error falls as the batch shrinks; the figure beside it says that it rises.",
        ("002-11", "000-26"),
        ("C01", "C02"),
    ),
    _Pair(
        "X6",
        "A batch of 1 is called impossible; in a convolution it is InstanceNorm.",
        ("002-11",),
        ("A10", "C01"),
    ),
    _Pair(
        "X7",
        "It makes training too slow, or takes a fourteenth of the time at little overhead.",
        ("000-8", "001-6", "002-13"),
        ("D01", "B03"),
    ),
    _Pair(
        "X8",
        "It keeps gradients from exploding, or makes them explode: in depth, and along time.",
        ("000-7", "003-12", "002-2", "002-19"),
        ("B06", "E01"),
    ),
    _Pair(
        "X9",
        "It works by lessening covariate shift, or has nothing to do with it.",
        ("001-2", "002-2", "004-17"),
        ("B02", "B14"),
    ),
    _Pair(
        "X10",
        "γ and β are indispensable and restore what a layer can represent, or only make training harder.",
        ("000-17", "001-18", "003-8", "003-9"),
        ("B09", "F04"),
    ),
    _Pair(
        "X11",
        "Why tasks from pixel to pixel suffer: lost contrast, or mixed statistics of unrelated images; and still "
        "InstanceNorm, which removes most contrast, is recommended for generation.",
        ("000-16", "000-27", "004-20"),
        ("F01", "F05", "F06"),
    ),
    _Pair(
        "X12",
        "That inference uses other statistics than training is harmless, or makes models worse in production.",
        ("000-29", "002-16"),
        ("C05",),
    ),
    _Pair(
        "X13",
        "In recurrent networks it works vertically and explodes horizontally, or is of no use at all, or works so-so.",
        ("000-28", "002-19", "004-8"),
        ("E01",),
    ),
    _Pair(
        "X14",
        "LayerNorm is said to be useful in recurrent networks only; transformers and newer convolutional networks "
        "use it.",
        ("004-13",),
        ("H01",),
    ),
    _Pair(
        "X15",
        "All faults come from depending on the batch, which nearly all successors give up; a text lists SyncBN "
        "among the cures, which depends on a larger one.",
        ("002-21", "004-10", "004-11"),
        ("H01", "C03"),
    ),
    _Pair(
        "X16",
        "The noise of its statistics is a welcome regulariser, or the fault of small batches.",
        ("000-6", "000-26", "002-10", "003-13"),
        ("B10", "C01"),
    ),
    _Pair(
        "X17",
        "γ and β are one pair per feature map, and yet twice the batch size in number.",
        ("003-10",),
        ("A09",),
    ),
    _Pair(
        "X18",
        "Equal distributions generalise better under shift; stored statistics make shift worse.",
        ("002-17", "003-1", "003-5"),
        ("B17",),
    ),
    _Pair(
        "X19",
        "It is unfit for adversarial networks, where InstanceNorm comes first; DCGAN found it critical.",
        ("000-15", "004-20"),
        ("F06",),
    ),
    _Pair(
        "X20",
        "It replaces dropout; the best CaffeNet with it has dropout of 0.2.",
        ("001-5", "003-11"),
        ("B10",),
    ),
    _Pair(
        "X21",
        "Batches of unequal distribution slow training, and it cures that; on such batches it breaks.",
        ("003-2",),
        ("B16",),
    ),
    _Pair(
        "X22",
        "L2 penalties prevent overfitting and belong to the normalization of weights; under normalization they set "
        "the rate alone.",
        ("004-2", "004-3"),
        ("B11",),
    ),
    _Pair(
        "X23",
        "Decorrelated inputs train faster; it leaves correlation, and is said to need no more.",
        ("001-13", "001-17"),
        ("B18", "H03"),
    ),
)


def contradictions(experiments: Sequence[Experiment]) -> tuple[Contradiction, ...]:
    """Each with what the judged experiments say about its claims."""
    return tuple(_settle(pair, experiments) for pair in CONTRADICTIONS)


def _settle(pair: _Pair, experiments: Sequence[Experiment]) -> Contradiction:
    judged = {e.registration.name for e in experiments if e.judgements}
    said = tuple(
        (name, tuple(c for c in j.claims if c in pair.claims), j)
        for name in pair.experiments
        for e in experiments
        if e.registration.name == name
        for j in e.judgements
        if set(j.claims) & set(pair.claims)
    )
    undone = tuple(name for name in pair.experiments if name not in judged)
    sure = [j for _, _, j in said if j.verdict not in ("UNDECIDED", "open")]
    state: Literal["decided", "in part", "open"] = (
        "open" if not sure else "decided" if not undone and len(sure) == len(said) else "in part"
    )
    return Contradiction(pair.code, pair.text, pair.experiments, undone, state, said)
