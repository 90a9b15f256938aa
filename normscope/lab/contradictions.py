"""Claims that cannot both hold, and what decides between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from normscope.records import Claim, Contradiction, Experiment, Judgement

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
)


def contradictions(claims: Sequence[Claim], experiments: Sequence[Experiment]) -> tuple[Contradiction, ...]:
    """Each with what the judged experiments say about its claims."""
    return tuple(_settle(pair, claims, experiments) for pair in CONTRADICTIONS)


def _settle(pair: _Pair, claims: Sequence[Claim], experiments: Sequence[Experiment]) -> Contradiction:
    judged = {e.registration.name for e in experiments if e.judgements}
    done = [name for name in pair.experiments if name in judged]
    said = [
        (claim.id, name, judgement)
        for claim in claims
        if claim.id in pair.claims
        for name, judgement in claim.judgements
        if name in pair.experiments
    ]
    sure = [row for row in said if row[2].verdict not in ("UNDECIDED", "open")]
    missing = [name for name in pair.experiments if name not in judged]
    state: Literal["decided", "in part", "open"] = (
        "open" if not sure else "decided" if not missing and len(sure) == len(said) else "in part"
    )
    parts = [f"{name} on {claim}: {j.verdict}. {j.outcome}" for claim, name, j in _distinct(said)]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    elif not sure:
        parts.append(f"{' and '.join(done)} could not decide at this size.")
    return Contradiction(pair.code, pair.text, pair.experiments, state, " ".join(parts))


def _distinct(said: Sequence[tuple[str, str, Judgement]]) -> list[tuple[str, str, Judgement]]:
    """Without a judgement that is about two claims of the same contradiction told twice."""
    kept: list[tuple[str, str, Judgement]] = []
    for row in said:
        if all(row[2] is not other[2] for other in kept):
            kept.append(row)
    return kept
