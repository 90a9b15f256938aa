"""What a kernel computes besides its plan: the switches of y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Formula"]


class Formula(NamedTuple):
    """The constants of one normalization.

    Attributes:
        inside: Positions of the averaged parts.
        eps: ε, added to the variance.
        center: Whether μ_S is subtracted; without it σ²_S is the mean square.
        scale: Whether to divide by √(σ²_S + ε).
        activation: A name of the table of activations, or None.
    """

    inside: tuple[int, ...]
    eps: float
    center: bool = True
    scale: bool = True
    activation: str | None = None
